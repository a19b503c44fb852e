//! An instruction without what differs between its uses: address, general register, segment.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::thunk::MEMORY;

/// Code (13 bits), four operands of 8 bits, and 16 bits for immediates (two bytes) or an x87
/// instruction's FOP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key(pub u64);

const NONE: u8 = 0;
const XMM: u8 = 1;
const YMM: u8 = 2;
const MM: u8 = 3;
const ST: u8 = 4;
const GPR16: u8 = 5;
const GPR32: u8 = 6;
const GPR64: u8 = 7;
const MEM: u8 = 8;
const IMM8: u8 = 9;
const IMM8_2ND: u8 = 10;

impl Key {
    /// The key of an instruction, and its explicit general register. `None` if it has an
    /// operand of a kind no x87, MMX, SSE or AVX instruction has. `fop` is used for x87.
    pub(super) fn new(insn: &Instruction, fop: u16) -> Option<(Self, Option<u8>)> {
        let code = insn.code() as u64;
        if code >= 1 << 13 || insn.op_count() > 4 {
            return None;
        }
        let mut key = code;
        let mut gpr = None;
        let mut immediates = if super::is_x87(insn) { fop } else { 0 };
        for i in 0..insn.op_count() {
            let operand = match insn.op_kind(i) {
                OpKind::Register => {
                    let r = insn.op_register(i);
                    let n = r.number() as u8 & 15;
                    if r.is_xmm() {
                        XMM << 4 | n
                    } else if r.is_ymm() {
                        YMM << 4 | n
                    } else if r.is_mm() {
                        MM << 4 | n & 7
                    } else if r.is_st() {
                        ST << 4 | n & 7
                    } else if r.is_gpr() && r.size() >= 2 && gpr.is_none() {
                        gpr = Some(n);
                        match r.size() {
                            2 => GPR16 << 4,
                            4 => GPR32 << 4,
                            _ => GPR64 << 4,
                        }
                    } else {
                        return None;
                    }
                }
                OpKind::Memory => MEM << 4,
                OpKind::Immediate8 => {
                    immediates |= u16::from(insn.immediate8());
                    IMM8 << 4
                }
                OpKind::Immediate8_2nd => {
                    immediates |= u16::from(insn.immediate8_2nd()) << 8;
                    IMM8_2ND << 4
                }
                _ => return None,
            };
            key |= u64::from(operand) << (13 + 8 * i);
        }
        Some((Self(key | u64::from(immediates) << 45), gpr))
    }

    /// The instruction with RAX as its general register and [RSI] as its memory operand.
    pub(super) fn instruction(self) -> Instruction {
        let mut insn = Instruction::default();
        if let Ok(code) = Code::try_from((self.0 & 0x1fff) as usize) {
            insn.set_code(code);
        }
        let immediates = (self.0 >> 45) as u16;
        for i in 0..4 {
            let operand = (self.0 >> (13 + 8 * i)) as u8;
            let n = u32::from(operand & 15);
            let register = match operand >> 4 {
                NONE => continue,
                XMM => Register::XMM0 + n,
                YMM => Register::YMM0 + n,
                MM => Register::MM0 + n,
                ST => Register::ST0 + n,
                GPR16 => Register::AX,
                GPR32 => Register::EAX,
                GPR64 => Register::RAX,
                MEM => {
                    insn.set_op_kind(i, OpKind::Memory);
                    insn.set_memory_base(MEMORY);
                    continue;
                }
                IMM8 => {
                    insn.set_op_kind(i, OpKind::Immediate8);
                    insn.set_immediate8(immediates as u8);
                    continue;
                }
                _ => {
                    insn.set_op_kind(i, OpKind::Immediate8_2nd);
                    insn.set_immediate8_2nd((immediates >> 8) as u8);
                    continue;
                }
            };
            insn.set_op_kind(i, OpKind::Register);
            insn.set_op_register(i, register);
        }
        insn
    }

    /// An x87 instruction's last 11 opcode bits.
    pub(super) fn fop(self) -> u16 {
        (self.0 >> 45) as u16 & 0x7ff
    }
}
