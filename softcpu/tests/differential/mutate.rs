//! Damaged instructions: what isn't an instruction any more must raise #UD here as there, and
//! prefixes in odd places must mean the same.

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind};

use crate::case::CODE_LEN;
use crate::flow::{is_branch, undefined_flags};
use crate::forms::comparable;
use crate::generate::{Case, Generator};

const PREFIXES: [u8; 14] = [
    0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x40, 0x41, 0x44, 0x48, 0x4f,
];

impl Generator {
    /// A case with a bit flipped or a prefix added. `None`: the result can't be compared.
    pub fn mutated(&mut self, mut case: Case) -> Option<Case> {
        let which = self.random.below(case.instructions.len());
        let insn = case.instructions.get(which)?;
        let origin = self.shape.code();
        let at = (insn.ip() - origin) as usize;
        let code = &mut case.input.code;
        if self.random.one_in(2) {
            code.copy_within(at..CODE_LEN - 1, at + 1);
            code[at] = self.random.pick(&PREFIXES);
        } else {
            let byte = at + self.random.below(insn.len().min(6));
            code[byte] ^= 1 << self.random.below(8);
        }
        case.instructions.clear();
        let mut decoder = Decoder::with_ip(self.bits, code, origin, DecoderOptions::NONE);
        while decoder.can_decode() {
            let insn = decoder.decode();
            if insn.mnemonic() == Mnemonic::Int3 {
                break;
            }
            if insn.is_invalid() {
                // This host runs PCMPxSTRx with LOCK and VPCMPxSTRx with any vvvv.
                let bytes = &code[(insn.ip() - origin) as usize..];
                let strings = bytes.windows(3).take(8).any(|b| {
                    b[0] == 0xc4 && b[1] & 31 == 3 || b[..2] == [0x0f, 0x3a] && b[2] >> 2 == 0x18
                });
                // Hosts with AVX-512 run mask instructions (VEX.0F 41 to 4b and 90 to 99) that name
                // a register beyond k7.
                let mask = |op: u8| matches!(op, 0x41..=0x4b | 0x90..=0x99);
                let masks = bytes.windows(4).take(8).any(|b| {
                    b[0] == 0xc5 && mask(b[2]) || b[0] == 0xc4 && b[1] & 31 == 1 && mask(b[3])
                });
                if strings || masks {
                    return None;
                }
                case.instructions.push(insn);
                break;
            }
            // With VEX.W they are no instructions to this host, and the same ones to others.
            let wide =
                self.bits != 64 && matches!(insn.mnemonic(), Mnemonic::Vpinsrd | Mnemonic::Vpextrd);
            if wide
                || is_branch(&insn)
                || insn.op0_kind() == OpKind::NearBranch16
                || !comparable(&insn)
                || !self.codes.contains(&insn.code())
            {
                return None;
            }
            case.instructions.push(insn);
        }
        case.undefined = undefined_flags(&case.instructions)?;
        Some(case)
    }
}
