//! Random instruction sequences over every encoding form the instruction tables know.

use iced_x86::{
    Code, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind as K,
    OpKind, Register,
};

use crate::case::{CODE_LEN, DATA_LEN, Gprs, Input, Shape};
use crate::flow::{is_branch, is_repeatable, set_branch, target, undefined_flags};
use crate::forms::{codes, comparable};
use crate::random::Random;

/// Registers that usually hold addresses: RBX, RSP, RBP, RSI, RDI, R13.
const POINTERS: [usize; 6] = [3, 4, 5, 6, 7, 13];
const STATUS: u64 = 0x8d5;
/// RFLAGS.AC.
const ALIGNMENT: u64 = 1 << 18;

/// Makes cases.
pub struct Generator {
    pub random: Random,
    pub codes: Vec<Code>,
    pub shape: Shape,
    /// Code size.
    pub bits: u32,
}

/// A case and what of its end isn't defined.
pub struct Case {
    pub input: Input,
    pub instructions: Vec<Instruction>,
    /// Status flags (RFLAGS bits) without a defined value before each instruction, and at the
    /// end.
    pub undefined: Vec<u64>,
}

impl Case {
    /// Status flags without a defined value where `rip` is the end.
    pub fn undefined(&self, rip: u64) -> u64 {
        let end = self.instructions.last().map_or(0, |i| i.next_ip());
        // (An instruction with its FWAIT is two.)
        match self.instructions.iter().rposition(|i| i.ip() <= rip) {
            Some(i) if rip < end => self.undefined[i],
            Some(_) => self.undefined.last().copied().unwrap_or_default(),
            None => self.undefined.last().copied().unwrap_or_default(),
        }
    }
}

impl Generator {
    pub fn new(seed: u64, shape: Shape, filter: Option<&str>) -> Self {
        let bits = shape.bits;
        let codes = codes(shape, filter);
        assert!(!codes.is_empty(), "no instruction is called that");
        Self {
            random: Random::new(seed),
            codes,
            shape,
            bits,
        }
    }

    /// The number of encoding forms to draw from.
    pub fn forms(&self) -> usize {
        self.codes.len()
    }

    fn address(&mut self) -> u64 {
        // Mostly in the writable pages, at times over an end.
        let offset = match self.random.below(12) {
            0 => self.random.below(4096) as u64,
            1 => (DATA_LEN - self.random.below(48)) as u64,
            2 => 8192 - self.random.below(48) as u64,
            3 => 4096 - self.random.below(32) as u64,
            _ => 4096 + self.random.below(DATA_LEN - 4096 - 1024) as u64,
        };
        let aligned = match self.random.below(3) {
            0 => offset,
            1 => offset & !15,
            _ => offset & !63,
        };
        self.shape.data() + aligned
    }

    /// A number of a register that exists.
    fn registers(&mut self) -> usize {
        self.random.below(if self.bits == 64 { 16 } else { 8 })
    }

    /// One of `POINTERS`.
    fn pointer(&mut self) -> usize {
        let known = if self.bits == 64 { 6 } else { 5 };
        self.random.pick(&POINTERS[..known])
    }

    fn gpr(&mut self, written: bool) -> usize {
        loop {
            let n = self.registers();
            if !written || !POINTERS.contains(&n) || self.random.one_in(16) {
                return n;
            }
        }
    }

    fn register(&mut self, kind: K, written: bool) -> Option<Register> {
        Some(match kind {
            K::r8_reg | K::r8_opcode | K::r8_or_mem => {
                let mut n = self.gpr(written) as u32;
                if self.bits != 64 {
                    n &= 3;
                }
                if n < 4 && self.random.one_in(4) {
                    Register::AH + n
                } else {
                    const LOW: [Register; 8] = [
                        Register::AL,
                        Register::CL,
                        Register::DL,
                        Register::BL,
                        Register::SPL,
                        Register::BPL,
                        Register::SIL,
                        Register::DIL,
                    ];
                    match LOW.get(n as usize) {
                        Some(&low) => low,
                        None => Register::R8L + (n - 8),
                    }
                }
            }
            K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode | K::r16_or_mem => {
                Register::AX + self.gpr(written) as u32
            }
            K::r32_reg
            | K::r32_reg_mem
            | K::r32_rm
            | K::r32_opcode
            | K::r32_vvvv
            | K::r32_or_mem => Register::EAX + self.gpr(written) as u32,
            K::r64_reg
            | K::r64_reg_mem
            | K::r64_rm
            | K::r64_opcode
            | K::r64_vvvv
            | K::r64_or_mem => Register::RAX + self.gpr(written) as u32,
            K::mm_reg | K::mm_rm | K::mm_or_mem => Register::MM0 + self.random.below(8) as u32,
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_or_mem => {
                Register::XMM0 + self.registers() as u32
            }
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_or_mem => {
                Register::YMM0 + self.registers() as u32
            }
            K::sti_opcode => Register::ST0 + self.random.below(8) as u32,
            K::st0 => Register::ST0,
            K::cl => Register::CL,
            K::al => Register::AL,
            K::ax => Register::AX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::dx => Register::DX,
            _ => return None,
        })
    }

    fn memory(&mut self, insn: &mut Instruction, gpr: &mut Gprs, kind: K) {
        let target = self.address();
        let vsib = match kind {
            K::mem_vsib32x | K::mem_vsib64x => Some(Register::XMM0),
            K::mem_vsib32y | K::mem_vsib64y => Some(Register::YMM0),
            _ => None,
        };
        insn.set_memory_displ_size(0);
        let wide = self.bits == 64;
        if let Some(first) = vsib {
            let class = if wide { Register::RAX } else { Register::EAX };
            insn.set_memory_base(class + self.pointer() as u32);
            insn.set_memory_index(first + self.registers() as u32);
            insn.set_memory_index_scale(self.random.pick(&[1, 2, 4, 8]));
            return;
        }
        let most = if self.bits == 16 { 4 } else { 1 };
        if self.shape.segmented && self.random.below(5) < most {
            return self.memory_16(insn, gpr);
        }
        match self.random.below(8) {
            // Relative to RIP: the encoder wants the target.
            0 if wide => {
                insn.set_memory_base(Register::RIP);
                insn.set_memory_displ_size(8);
                insn.set_memory_displacement64(target);
            }
            1 => {
                // 4: with the address-size prefix.
                let size = if wide {
                    self.random.pick(&[4, 8, 8])
                } else {
                    4
                };
                insn.set_memory_displ_size(size);
                insn.set_memory_displacement64(target);
            }
            kind => {
                let base = self.pointer();
                let short = !wide || self.random.one_in(6);
                let class = if short { Register::EAX } else { Register::RAX };
                insn.set_memory_base(class + base as u32);
                let mut disp = match kind {
                    2 => (self.random.next() as i8).into(),
                    3 => self.random.below(4096) as i64 - 2048,
                    _ => 0,
                };
                if kind >= 5 {
                    let index = self.registers();
                    if index != 4 {
                        insn.set_memory_index(class + index as u32);
                        insn.set_memory_index_scale(self.random.pick(&[1, 2, 4, 8]));
                        if !POINTERS.contains(&index) {
                            gpr[index] &= 0xff;
                        } else {
                            disp -= (self.shape.data() as i64) & 0x7fff_ffff;
                        }
                    }
                }
                let fits_byte = i8::try_from(disp).is_ok();
                insn.set_memory_displacement64(disp as u64);
                insn.set_memory_displ_size(match disp {
                    0 => 0,
                    _ if fits_byte => 1,
                    _ if short => 4,
                    _ => 8,
                });
            }
        }
    }

    /// A memory operand with 16-bit registers.
    fn memory_16(&mut self, insn: &mut Instruction, gpr: &Gprs) {
        use Register as R;
        let (base, index) = self.random.pick(&[
            (R::BX, R::SI),
            (R::BX, R::DI),
            (R::BP, R::SI),
            (R::BP, R::DI),
            (R::SI, R::None),
            (R::DI, R::None),
            (R::BP, R::None),
            (R::BX, R::None),
            (R::None, R::None),
        ]);
        insn.set_memory_base(base);
        insn.set_memory_index(index);
        let near = self.random.next() as i8 as i64;
        let disp = match (base, index) {
            (R::None, _) => self.address() as i64,
            (_, R::None) => self.random.pick(&[0, near, near * 16]),
            // The sum wraps around, or not, at the same place.
            _ => near - (gpr[index.number()] & 0xffff) as i64,
        };
        insn.set_memory_displacement64(disp as u64 & 0xffff);
        insn.set_memory_displ_size(match disp {
            0 if base != R::None && base != R::BP => 0,
            _ if base != R::None && i8::try_from(disp).is_ok() => 1,
            _ => 2,
        });
    }

    fn instruction(
        &mut self,
        factory: &mut InstructionInfoFactory,
        gpr: &mut Gprs,
    ) -> Option<Instruction> {
        let code = self.random.pick(&self.codes);
        let info = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        // Both operands of a string instruction have the same address size.
        let other = self.shape.segmented && self.random.one_in(4);
        let string_size = match (self.bits, other) {
            (64, _) => 2,
            (32, false) | (16, true) => 1,
            _ => 0,
        };
        for (i, &kind) in info.op_kinds().iter().enumerate() {
            let i = i as u32;
            let immediate = |insn: &mut Instruction, op: OpKind, value: u64| {
                insn.set_op_kind(i, op);
                insn.try_set_immediate_u64(i, value).is_ok()
            };
            let value = self.random.integer();
            let either = matches!(
                kind,
                K::r8_or_mem
                    | K::r16_or_mem
                    | K::r32_or_mem
                    | K::r64_or_mem
                    | K::mm_or_mem
                    | K::xmm_or_mem
                    | K::ymm_or_mem
            );
            match kind {
                K::imm8 if i > 0 && insn.op_kind(i - 1) == OpKind::Immediate8 => {
                    insn.set_op_kind(i, OpKind::Immediate8_2nd);
                    insn.set_immediate8_2nd(value as u8);
                }
                K::imm8 => {
                    insn.set_op_kind(i, OpKind::Immediate8);
                    insn.set_immediate8(value as u8);
                }
                K::imm8_const_1 => {
                    insn.set_op_kind(i, OpKind::Immediate8);
                    insn.set_immediate8(1);
                }
                K::imm8sex16 => {
                    insn.set_op_kind(i, OpKind::Immediate8to16);
                    insn.set_immediate8to16(value as i8 as i16);
                }
                K::imm8sex32 => {
                    insn.set_op_kind(i, OpKind::Immediate8to32);
                    insn.set_immediate8to32(value as i8 as i32);
                }
                K::imm8sex64 => {
                    insn.set_op_kind(i, OpKind::Immediate8to64);
                    insn.set_immediate8to64(value as i8 as i64);
                }
                K::imm16 => {
                    immediate(&mut insn, OpKind::Immediate16, value & 0xffff);
                }
                K::imm32 => {
                    immediate(&mut insn, OpKind::Immediate32, value & 0xffff_ffff);
                }
                K::imm32sex64 => {
                    insn.set_op_kind(i, OpKind::Immediate32to64);
                    insn.set_immediate32to64(value as i32 as i64);
                }
                K::imm64 => {
                    immediate(&mut insn, OpKind::Immediate64, value);
                }
                K::seg_rSI | K::es_rDI | K::seg_rDI => {
                    let sizes = match kind {
                        K::seg_rSI => [
                            OpKind::MemorySegSI,
                            OpKind::MemorySegESI,
                            OpKind::MemorySegRSI,
                        ],
                        K::es_rDI => [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI],
                        _ => [
                            OpKind::MemorySegDI,
                            OpKind::MemorySegEDI,
                            OpKind::MemorySegRDI,
                        ],
                    };
                    insn.set_op_kind(i, sizes[string_size]);
                }
                K::seg_rBX_al => {
                    insn.set_op_kind(i, OpKind::Memory);
                    insn.set_memory_base(match self.bits {
                        64 => Register::RBX,
                        32 => Register::EBX,
                        _ => Register::BX,
                    });
                    insn.set_memory_index(Register::AL);
                }
                K::br64_1 | K::br64_4 => {
                    insn.set_op_kind(i, OpKind::NearBranch64);
                }
                K::br32_1 | K::br32_4 => {
                    insn.set_op_kind(i, OpKind::NearBranch32);
                }
                K::br16_1 | K::br16_2 => {
                    insn.set_op_kind(i, OpKind::NearBranch16);
                }
                K::mem | K::mem_vsib32x | K::mem_vsib32y | K::mem_vsib64x | K::mem_vsib64y => {
                    insn.set_op_kind(i, OpKind::Memory);
                    self.memory(&mut insn, gpr, kind);
                }
                _ if either && self.random.one_in(2) => {
                    insn.set_op_kind(i, OpKind::Memory);
                    self.memory(&mut insn, gpr, kind);
                }
                _ => {
                    let register = self.register(kind, i == 0)?;
                    insn.set_op_kind(i, OpKind::Register);
                    insn.set_op_register(i, register);
                }
            }
        }
        let access = factory.info(&insn).op_access(0);
        let in_memory = insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory;
        if info.can_use_lock_prefix()
            && in_memory
            && matches!(access, OpAccess::ReadWrite | OpAccess::ReadCondWrite)
            && self.random.one_in(3)
        {
            insn.set_has_lock_prefix(true);
        }
        if is_repeatable(insn.mnemonic()) && self.random.one_in(2) {
            if self.random.one_in(2) {
                insn.set_has_rep_prefix(true);
            } else {
                insn.set_has_repne_prefix(true);
            }
        }
        // Undefined: the result of a 16-bit double shift by more than 16.
        if matches!(insn.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
            && insn.op1_register().size() == 2
        {
            if insn.op2_kind() != OpKind::Immediate8 {
                return None;
            }
            insn.set_immediate8(insn.immediate8() & 15);
        }
        comparable(&insn).then_some(insn)
    }

    /// A case of up to `most` instructions.
    pub fn case(&mut self, most: usize) -> Case {
        loop {
            if let Some(case) = self.try_case(most) {
                return case;
            }
        }
    }

    fn try_case(&mut self, most: usize) -> Option<Case> {
        let mut factory = InstructionInfoFactory::new();
        let mut gpr = [0; 16];
        for (i, value) in gpr.iter_mut().enumerate() {
            *value = if POINTERS.contains(&i) {
                self.address()
            } else {
                self.random.integer()
            };
        }
        if self.random.one_in(2) {
            gpr[1] &= 0x3f;
        }
        if self.bits != 64 {
            for value in &mut gpr {
                *value &= 0xffff_ffff;
            }
        }
        gpr[4] = gpr[4] & !7 | 0x1000;
        let wanted = 1 + self.random.below(most);
        let mut instructions: Vec<Instruction> = Vec::new();
        let mut tries = 0;
        while instructions.len() < wanted && tries < 100 {
            tries += 1;
            let Some(insn) = self.instruction(&mut factory, &mut gpr) else {
                continue;
            };
            if Encoder::new(self.bits)
                .encode(&insn, self.shape.code())
                .is_err()
                && !is_branch(&insn)
            {
                continue;
            }
            instructions.push(insn);
        }
        let code = self.assemble(&mut instructions);
        let undefined = undefined_flags(&instructions)?;
        let direction = if self.random.one_in(6) { 0x400 } else { 0 };
        let alignment = if self.random.one_in(8) { ALIGNMENT } else { 0 };
        let input = Input {
            gpr,
            rflags: 0x202 | self.random.next() & STATUS | direction | alignment,
            code,
            xsave: self.xsave(),
            shape: self.shape,
        };
        Some(Case {
            input,
            instructions,
            undefined,
        })
    }

    /// Code bytes; branches lead to one of the following instructions. Instructions past the
    /// end of the room are dropped.
    fn assemble(&mut self, instructions: &mut Vec<Instruction>) -> [u8; CODE_LEN] {
        let bits = self.bits;
        let origin = self.shape.code();
        let encode = |insn: &Instruction, ip: u64| {
            let mut encoder = Encoder::new(bits);
            let mut insn = *insn;
            if is_branch(&insn) && target(&insn) == 0 {
                set_branch(&mut insn, ip + 16);
            }
            match encoder.encode(&insn, ip) {
                Ok(_) => encoder.take_buffer(),
                Err(_) => Vec::new(),
            }
        };
        let mut starts = Vec::new();
        let mut ip = origin;
        instructions.retain(|insn| {
            let len = encode(insn, ip).len() as u64;
            if len == 0 || ip + len > origin + CODE_LEN as u64 - 16 {
                return false;
            }
            starts.push(ip);
            ip += len;
            true
        });
        starts.push(ip);
        let mut code = [0xcc; CODE_LEN];
        for (i, insn) in instructions.iter_mut().enumerate() {
            if is_branch(insn) {
                let later = starts.len() - 1 - i;
                set_branch(insn, starts[i + 1 + self.random.below(later)]);
            }
            let bytes = encode(insn, starts[i]);
            insn.set_len(bytes.len());
            insn.set_ip(starts[i]);
            let at = (starts[i] - origin) as usize;
            code[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        code
    }
}
