//! The instructions of a block, and how each is translated.

use iced_x86::{Code, Instruction, Mnemonic as M, OpAccess, OpKind, Register, RflagsBits};

use crate::cpu::Cpu;
use crate::op::Op;
use crate::simd;

const STATUS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// How an instruction is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Not at all.
    Nothing,
    /// The same on other registers.
    Same,
    /// The same, with an operand that is not named: RAX in and out.
    Accumulator,
    /// RAX in, RDX out.
    Extend,
    /// RAX in, RAX and RDX out.
    Wide,
    /// An SSE instruction.
    Sse(simd::Plainly),
    Lea,
    Push,
    Pop,
    Leave,
    /// By its operation.
    Call,
    /// It ends the block.
    End,
}

/// One instruction.
#[derive(Debug)]
pub(super) struct Item {
    pub insn: Instruction,
    pub kind: Kind,
    /// Its first slot, by number in the block.
    pub slot: usize,
    /// Its slots.
    pub slots: usize,
    /// For `Kind::Call`: the copy to run.
    pub copy: *const Op,
    /// It needs the flags before it.
    pub uses_flags: bool,
    /// It changes some flags.
    pub sets_flags: bool,
    /// It may leave to its operation.
    pub may_leave: bool,
    /// The flags before it matter to someone.
    pub flags_live: bool,
}

/// The guest's general register, and whether it is AH, CH, DH or BH.
pub(super) fn guest_gpr(register: Register) -> Option<u8> {
    if !register.is_gpr() {
        return None;
    }
    if matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    ) {
        return None;
    }
    Some((register.full_register() as u32 - Register::RAX as u32) as u8)
}

/// Whether it shifts or rotates by CL.
pub(super) fn by_cl(insn: &Instruction) -> bool {
    let count = match insn.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => 1,
        M::Shld | M::Shrd => 2,
        _ => return false,
    };
    insn.op_kind(count) == OpKind::Register
}

/// A memory operand that is translated: 64-bit addresses with 32-bit displacements.
fn simple_memory(insn: &Instruction) -> bool {
    let wide = |r: Register| r == Register::None || r.is_gpr64();
    let base = insn.memory_base();
    (wide(base) || base == Register::RIP)
        && wide(insn.memory_index())
        && i32::try_from(insn.memory_displacement64() as i64).is_ok()
        // Without registers: only where the address size is certain.
        && (base != Register::None || insn.memory_index() != Register::None)
}

fn simple_operands(insn: &Instruction) -> bool {
    (0..insn.op_count()).all(|n| match insn.op_kind(n) {
        OpKind::Register => guest_gpr(insn.op_register(n)).is_some(),
        OpKind::Memory => simple_memory(insn),
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => true,
        _ => false,
    })
}

/// Instructions that are their own translation: nothing but the operands they name, and no
/// exceptions but those of memory.
fn same(cpu: &Cpu, insn: &Instruction) -> bool {
    let new = !cpu.cache.native.oldest;
    match insn.mnemonic() {
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test => true,
        M::Inc | M::Dec | M::Neg | M::Not => true,
        M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shl | M::Sal | M::Shr | M::Sar => true,
        M::Shld | M::Shrd => true,
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Xchg | M::Bswap | M::Xadd => true,
        M::Imul => insn.op_count() > 1,
        M::Bsf | M::Bsr => true,
        M::Tzcnt => new && cpu.features.bmi1() && is_x86_feature_detected!("bmi1"),
        M::Popcnt => new && cpu.features.popcnt() && is_x86_feature_detected!("popcnt"),
        // With a register as index memory is somewhere else.
        M::Bt | M::Bts | M::Btr | M::Btc => {
            insn.op_kind(0) == OpKind::Register || insn.op_kind(1) != OpKind::Register
        }
        _ => insn.is_setcc_or_cmovcc(),
    }
}

trait Conditional {
    fn is_setcc_or_cmovcc(&self) -> bool;
}

impl Conditional for Instruction {
    fn is_setcc_or_cmovcc(&self) -> bool {
        use iced_x86::ConditionCode;
        self.condition_code() != ConditionCode::None
            && matches!(self.op0_kind(), OpKind::Register | OpKind::Memory)
    }
}

/// How `insn`, which does not end its block, is translated.
fn kind(cpu: &Cpu, insn: &Instruction) -> Kind {
    let on_stack = |size: i32| insn.stack_pointer_increment().abs() == size;
    match insn.mnemonic() {
        M::Cbw | M::Cwde | M::Cdqe => return Kind::Accumulator,
        M::Cwd | M::Cdq | M::Cqo => return Kind::Extend,
        M::Push if on_stack(8) => {
            let fits = match insn.op0_kind() {
                OpKind::Register => {
                    insn.op0_register().is_gpr64() && insn.op0_register() != Register::RSP
                }
                OpKind::Memory => false,
                _ => i32::try_from(insn.immediate(0) as i64).is_ok(),
            };
            return if fits { Kind::Push } else { Kind::Call };
        }
        M::Pop if on_stack(8) && insn.op0_kind() == OpKind::Register => {
            let register = insn.op0_register();
            let fits = register.is_gpr64() && register != Register::RSP;
            return if fits { Kind::Pop } else { Kind::Call };
        }
        M::Leave if insn.code() == Code::Leaveq => return Kind::Leave,
        M::Lea if insn.op0_register().size() >= 4 => {
            let displaced = i32::try_from(insn.memory_displacement64() as i64).is_ok();
            return if displaced && simple_memory(insn) {
                Kind::Lea
            } else {
                Kind::Call
            };
        }
        _ => {}
    }
    if simple_operands(insn) {
        match insn.mnemonic() {
            M::Mul => return Kind::Wide,
            M::Imul if insn.op_count() == 1 => return Kind::Wide,
            M::Cmpxchg if insn.op0_kind() == OpKind::Memory => return Kind::Accumulator,
            _ if same(cpu, insn) => return Kind::Same,
            _ => {}
        }
    }
    let memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
    match simd::plainly(cpu, insn) {
        Some(how) if !memory || simple_memory(insn) => Kind::Sse(how),
        _ => Kind::Call,
    }
}

impl Item {
    /// An instruction that runs by its operation, until `settle` finds something better.
    pub(super) fn new(insn: &Instruction, slot: usize, slots: usize) -> Self {
        Self {
            insn: *insn,
            kind: Kind::Call,
            slot,
            slots,
            copy: std::ptr::null(),
            uses_flags: true,
            sets_flags: true,
            may_leave: true,
            flags_live: true,
        }
    }

    /// Finds out how it is translated. `forced`: by its operation.
    pub(super) fn settle(&mut self, cpu: &Cpu, forced: bool) {
        if self.kind == Kind::End {
            return;
        }
        self.kind = if forced {
            Kind::Call
        } else if self.slots == 0 {
            Kind::Nothing
        } else {
            kind(cpu, &self.insn)
        };
        if self.kind == Kind::Call {
            (self.uses_flags, self.sets_flags, self.may_leave) = (true, true, true);
            return;
        }
        if self.kind == Kind::Nothing {
            (self.uses_flags, self.sets_flags, self.may_leave) = (false, false, false);
            return;
        }
        let insn = &self.insn;
        let read = insn.rflags_read() & STATUS;
        let modified = insn.rflags_modified() & STATUS;
        // A shift by nothing leaves them alone.
        let shift = matches!(
            insn.mnemonic(),
            M::Shl
                | M::Sal
                | M::Shr
                | M::Sar
                | M::Rol
                | M::Ror
                | M::Rcl
                | M::Rcr
                | M::Shld
                | M::Shrd
        );
        let perhaps = shift && (by_cl(insn) || insn.immediate_count() & 31 == 0);
        self.sets_flags = modified != 0 || shift;
        self.uses_flags = read != 0 || perhaps || self.sets_flags && modified != STATUS;
        self.may_leave = matches!(
            self.kind,
            Kind::Push | Kind::Pop | Kind::Leave | Kind::Sse(_)
        ) || self.kind != Kind::Lea
            && (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
    }
}

trait Count {
    fn immediate_count(&self) -> u8;
}

impl Count for Instruction {
    /// A shift's count, if it is a constant.
    fn immediate_count(&self) -> u8 {
        let n = self.op_count().saturating_sub(1);
        if self.op_kind(n) == OpKind::Immediate8 {
            self.immediate8()
        } else {
            1
        }
    }
}

/// Fills in whether the flags before each instruction matter.
pub(super) fn find_live_flags(items: &mut [Item]) {
    let mut live = true;
    for item in items.iter_mut().rev() {
        live = item.uses_flags || item.may_leave || live && !item.sets_flags;
        item.flags_live = live;
    }
}

pub(super) fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// The form of an instruction for any register where it has one for the accumulator alone.
pub(super) fn general_form(code: Code) -> Code {
    use Code as C;
    match code {
        C::Add_AL_imm8 => C::Add_rm8_imm8,
        C::Add_AX_imm16 => C::Add_rm16_imm16,
        C::Add_EAX_imm32 => C::Add_rm32_imm32,
        C::Add_RAX_imm32 => C::Add_rm64_imm32,
        C::Or_AL_imm8 => C::Or_rm8_imm8,
        C::Or_AX_imm16 => C::Or_rm16_imm16,
        C::Or_EAX_imm32 => C::Or_rm32_imm32,
        C::Or_RAX_imm32 => C::Or_rm64_imm32,
        C::Adc_AL_imm8 => C::Adc_rm8_imm8,
        C::Adc_AX_imm16 => C::Adc_rm16_imm16,
        C::Adc_EAX_imm32 => C::Adc_rm32_imm32,
        C::Adc_RAX_imm32 => C::Adc_rm64_imm32,
        C::Sbb_AL_imm8 => C::Sbb_rm8_imm8,
        C::Sbb_AX_imm16 => C::Sbb_rm16_imm16,
        C::Sbb_EAX_imm32 => C::Sbb_rm32_imm32,
        C::Sbb_RAX_imm32 => C::Sbb_rm64_imm32,
        C::And_AL_imm8 => C::And_rm8_imm8,
        C::And_AX_imm16 => C::And_rm16_imm16,
        C::And_EAX_imm32 => C::And_rm32_imm32,
        C::And_RAX_imm32 => C::And_rm64_imm32,
        C::Sub_AL_imm8 => C::Sub_rm8_imm8,
        C::Sub_AX_imm16 => C::Sub_rm16_imm16,
        C::Sub_EAX_imm32 => C::Sub_rm32_imm32,
        C::Sub_RAX_imm32 => C::Sub_rm64_imm32,
        C::Xor_AL_imm8 => C::Xor_rm8_imm8,
        C::Xor_AX_imm16 => C::Xor_rm16_imm16,
        C::Xor_EAX_imm32 => C::Xor_rm32_imm32,
        C::Xor_RAX_imm32 => C::Xor_rm64_imm32,
        C::Cmp_AL_imm8 => C::Cmp_rm8_imm8,
        C::Cmp_AX_imm16 => C::Cmp_rm16_imm16,
        C::Cmp_EAX_imm32 => C::Cmp_rm32_imm32,
        C::Cmp_RAX_imm32 => C::Cmp_rm64_imm32,
        C::Test_AL_imm8 => C::Test_rm8_imm8,
        C::Test_AX_imm16 => C::Test_rm16_imm16,
        C::Test_EAX_imm32 => C::Test_rm32_imm32,
        C::Test_RAX_imm32 => C::Test_rm64_imm32,
        C::Xchg_r16_AX => C::Xchg_rm16_r16,
        C::Xchg_r32_EAX => C::Xchg_rm32_r32,
        C::Xchg_r64_RAX => C::Xchg_rm64_r64,
        _ => code,
    }
}
