//! Branches, stack, interrupts.

use iced_x86::{Code, Mnemonic as M, OpKind, Register};

use super::bits::condition_number;
use super::pick::by_condition;
use super::{Context, EaClass, Emit, reg, seg_number, sized};
use crate::alu::kind;
use crate::exec::{branch, entry, mov, rare, stack, system};
use crate::op::{Handler, Op};

pub(crate) fn decode(c: &Context) -> Option<Emit> {
    let m = c.insn.mnemonic();
    if c.insn.is_jcc_short_or_near() {
        let condition = condition_number(c)?;
        let (size, imm) = near(c);
        if usual(c, size) {
            let f = by_condition!(condition, C => branch::jcc::<C> as Handler);
            let b = c.links(imm);
            return Some(Emit::Branch(f, Op { b, imm, ..c.op }));
        }
        let op = Op {
            a: size,
            b: condition,
            imm,
            ..c.op
        };
        return Some(Emit::PlainEnd(branch::any_jcc, op));
    }
    Some(match m {
        M::Jmp => return jump(c, false),
        M::Call => return jump(c, true),
        M::Ret => {
            let imm = if c.insn.op_count() > 0 {
                c.insn.immediate(0) & 0xffff
            } else {
                0
            };
            if usual(c, word(c)) {
                let f: Handler = if c.flat {
                    branch::ret::<u32>
                } else {
                    branch::ret::<u64>
                };
                return Some(Emit::End(
                    f,
                    Op {
                        imm,
                        ea: c.op.ea & 3 | 2 << 2,
                        ..c.op
                    },
                ));
            }
            Emit::PlainEnd(
                branch::any_ret,
                Op {
                    a: word(c),
                    imm,
                    ..c.op
                },
            )
        }
        M::Retf => {
            let imm = if c.insn.op_count() > 0 {
                c.insn.immediate(0) & 0xffff
            } else {
                0
            };
            let a = match c.insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            Emit::PlainEnd(rare::far_return, Op { a, imm, ..c.op })
        }
        M::Loop | M::Loope | M::Loopne => {
            let (size, imm) = near(c);
            let ea = match m {
                M::Loop => 0,
                M::Loope => 1,
                _ => 2,
            };
            Emit::PlainEnd(
                branch::any_loop,
                Op {
                    a: size,
                    b: counter(c),
                    ea,
                    imm,
                    ..c.op
                },
            )
        }
        M::Jcxz | M::Jecxz | M::Jrcxz => {
            let (size, imm) = near(c);
            let b = match m {
                M::Jcxz => 2,
                M::Jecxz => 4,
                _ => 8,
            };
            Emit::PlainEnd(
                branch::any_jcxz,
                Op {
                    a: size,
                    b,
                    imm,
                    ..c.op
                },
            )
        }
        M::Push => push(c),
        M::Pop => pop(c),
        M::Pusha | M::Pushad => Emit::Plain(
            rare::pusha,
            Op {
                a: if m == M::Pusha { 2 } else { 4 },
                ..c.op
            },
        ),
        M::Popa | M::Popad => Emit::Plain(
            rare::popa,
            Op {
                a: if m == M::Popa { 2 } else { 4 },
                ..c.op
            },
        ),
        M::Pushf | M::Pushfd | M::Pushfq => Emit::Plain(
            system::pushf,
            Op {
                a: flags_size(m),
                ..c.op
            },
        ),
        M::Popf | M::Popfd | M::Popfq => Emit::PlainEnd(
            system::popf,
            Op {
                a: flags_size(m),
                ..c.op
            },
        ),
        M::Iret | M::Iretd | M::Iretq => Emit::PlainEnd(
            entry::iret,
            Op {
                a: flags_size(m),
                ..c.op
            },
        ),
        M::Leave => {
            let a = word(c);
            if usual(c, a) {
                let op = Op {
                    ea: c.op.ea & 3 | 2 << 2,
                    ..c.op
                };
                let f: Handler = if c.flat {
                    stack::leave::<u32>
                } else {
                    stack::leave::<u64>
                };
                return Some(Emit::Next(f, op));
            }
            Emit::Plain(rare::leave, Op { a, ..c.op })
        }
        M::Enter => {
            let imm = c.insn.immediate16() as u64 | u64::from(c.insn.immediate8_2nd()) << 16;
            let a = match c.insn.code() {
                Code::Enterw_imm16_imm8 => 2,
                Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            };
            Emit::Plain(rare::enter, Op { a, imm, ..c.op })
        }
        M::Int => Emit::PlainEnd(
            entry::int,
            Op {
                imm: c.insn.immediate(0) & 0xff,
                ..c.op
            },
        ),
        M::Int3 => Emit::PlainEnd(entry::int_trap, Op { imm: 3, ..c.op }),
        M::Int1 => Emit::PlainEnd(entry::int_trap, Op { imm: 1, ..c.op }),
        M::Into => Emit::PlainEnd(entry::into, c.op),
        M::Syscall if c.cpu.features.syscall() => Emit::PlainEnd(entry::syscall, c.op),
        M::Sysret | M::Sysretq if c.cpu.features.syscall() => Emit::PlainEnd(
            entry::sysret,
            Op {
                a: if m == M::Sysretq { 8 } else { 4 },
                ..c.op
            },
        ),
        M::Sysenter if c.cpu.features.sep() => Emit::PlainEnd(entry::sysenter, c.op),
        M::Sysexit | M::Sysexitq if c.cpu.features.sep() => Emit::PlainEnd(
            entry::sysexit,
            Op {
                a: if m == M::Sysexitq { 8 } else { 4 },
                ..c.op
            },
        ),
        _ => return None,
    })
}

/// F3 41 90, which looks like PAUSE to the instruction tables, is XCHG of R8 with RAX.
pub(super) fn exchange_like_pause(c: &Context, bytes: &[u8]) -> Option<Emit> {
    let [.., rex, 0x90] = bytes else {
        return None;
    };
    if !c.mode64 || c.insn.mnemonic() != M::Pause || rex & 0xf1 != 0x41 {
        return None;
    }
    let size = match (rex & 8 != 0, bytes.contains(&0x66)) {
        (true, _) => 8,
        (_, true) => 2,
        _ => 4,
    };
    let op = Op {
        a: reg(Register::R8),
        b: reg(Register::RAX),
        ..c.op
    };
    Some(Emit::Next(
        sized!(size, T => mov::xchg_rr::<T> as Handler),
        op,
    ))
}

fn flags_size(m: M) -> u8 {
    match m {
        M::Pushf | M::Popf | M::Iret => 2,
        M::Pushfd | M::Popfd | M::Iretd => 4,
        _ => 8,
    }
}

/// Size of what a stack operation moves.
fn word(c: &Context) -> u8 {
    match c.insn.code() {
        Code::Retnw | Code::Retnw_imm16 | Code::Leavew => 2,
        Code::Retnd | Code::Retnd_imm16 | Code::Leaved => 4,
        _ => 8,
    }
}

/// Whether branches and stack operations of `size` bytes are the ordinary ones of 64-bit or flat code, which
/// have handlers of their own.
fn usual(c: &Context, size: u8) -> bool {
    c.mode64 && size == 8 || c.flat && size == 4
}

/// Operand size and target (relative to the block) of a near branch.
fn near(c: &Context) -> (u8, u64) {
    match c.insn.op0_kind() {
        OpKind::NearBranch16 => (2, c.insn.near_branch16().into()),
        OpKind::NearBranch32 => (4, i64::from(c.insn.near_branch32() as i32) as u64),
        _ => (8, c.insn.near_branch64()),
    }
}

/// Size of LOOP's counter.
fn counter(c: &Context) -> u8 {
    match c.insn.code() {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_64_RCX | Code::Loope_rel8_64_RCX | Code::Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}

fn jump(c: &Context, call: bool) -> Option<Emit> {
    let kind = c.insn.op0_kind();
    let b = u8::from(call);
    Some(match kind {
        OpKind::FarBranch16 | OpKind::FarBranch32 => {
            let (a, imm) = if kind == OpKind::FarBranch16 {
                (2, u64::from(c.insn.far_branch16()))
            } else {
                (4, u64::from(c.insn.far_branch32()))
            };
            let disp = i64::from(c.insn.far_branch_selector());
            Emit::PlainEnd(
                rare::far_direct,
                Op {
                    a,
                    b,
                    imm,
                    disp,
                    ..c.op
                },
            )
        }
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            let (a, imm) = near(c);
            if usual(c, a) {
                let f: Handler = match (call, c.flat) {
                    (true, false) => branch::call::<u64>,
                    (true, true) => branch::call::<u32>,
                    (false, _) => branch::jmp,
                };
                let ea = c.op.ea & 3 | 2 << 2;
                let b = c.links(imm);
                return Some(Emit::End(f, Op { b, imm, ea, ..c.op }));
            }
            let f = if call {
                branch::any_call
            } else {
                branch::any_jmp
            };
            Emit::PlainEnd(f, Op { a, imm, ..c.op })
        }
        OpKind::Register => {
            let (a, r) = (c.size(0) as u8, c.reg(0));
            if usual(c, a) {
                let f: Handler = match (call, c.flat) {
                    (true, false) => branch::call_r::<u64>,
                    (true, true) => branch::call_r::<u32>,
                    (false, false) => branch::jmp_r::<u64>,
                    (false, true) => branch::jmp_r::<u32>,
                };
                return Some(Emit::End(f, Op { a: r, ..c.op }));
            }
            let f = if call {
                branch::any_call_r
            } else {
                branch::any_jmp_r
            };
            Emit::PlainEnd(
                f,
                Op {
                    a,
                    b: r & !7,
                    ..c.op
                },
            )
        }
        OpKind::Memory => {
            let far = c.insn.is_jmp_far_indirect() || c.insn.is_call_far_indirect();
            let size = c.insn.memory_size().size() as u8;
            if far {
                let op = Op {
                    a: size - 2,
                    b,
                    ..c.op
                };
                return Some(Emit::PlainEnd(rare::far_indirect, op));
            }
            if usual(c, size) {
                let f: Handler = match (call, c.flat) {
                    (true, false) => branch::call_m::<u64>,
                    (true, true) => branch::call_m::<u32>,
                    (false, false) => branch::jmp_m::<u64>,
                    (false, true) => branch::jmp_m::<u32>,
                };
                return Some(Emit::End(f, c.op));
            }
            let f = if call {
                branch::any_call_m
            } else {
                branch::any_jmp_m
            };
            Emit::PlainEnd(f, Op { a: size, ..c.op })
        }
        _ => return None,
    })
}

/// Bytes a PUSH or POP moves the stack pointer by.
fn step(c: &Context) -> u8 {
    c.insn.stack_pointer_increment().unsigned_abs() as u8
}

fn push(c: &Context) -> Emit {
    let a = step(c);
    let on_stack = c.op.ea & 3 | 2 << 2;
    match c.insn.op0_kind() {
        OpKind::Register if c.insn.op0_register().is_segment_register() => {
            let imm = seg_number(c.insn.op0_register()) as u64;
            Emit::Plain(rare::push_seg, Op { a, imm, ..c.op })
        }
        OpKind::Register if c.mode64 || usual(c, a) => {
            let f: Handler = match a {
                8 => stack::push_r::<u64>,
                4 => stack::push_r::<u32>,
                _ => stack::push_r::<u16>,
            };
            Emit::Next(
                f,
                Op {
                    a: c.reg(0),
                    ea: on_stack,
                    ..c.op
                },
            )
        }
        OpKind::Register => Emit::Plain(
            rare::push_any,
            Op {
                a,
                b: c.reg(0),
                ..c.op
            },
        ),
        OpKind::Memory if c.mode64 || usual(c, a) => {
            let f: Handler = match a {
                8 => stack::push_m::<u64>,
                4 => stack::push_m::<u32>,
                _ => stack::push_m::<u16>,
            };
            Emit::Next(f, c.op)
        }
        OpKind::Memory => Emit::Plain(
            rare::push_any,
            Op {
                a,
                b: Op::NO_REG,
                ..c.op
            },
        ),
        _ if c.mode64 || usual(c, a) => {
            let f: Handler = match a {
                8 => stack::push_i::<u64>,
                4 => stack::push_i::<u32>,
                _ => stack::push_i::<u16>,
            };
            Emit::Next(
                f,
                Op {
                    imm: c.insn.immediate(0),
                    ea: on_stack,
                    ..c.op
                },
            )
        }
        _ => Emit::Plain(
            rare::push_imm,
            Op {
                a,
                imm: c.insn.immediate(0),
                ..c.op
            },
        ),
    }
}

fn pop(c: &Context) -> Emit {
    let a = step(c);
    let on_stack = c.op.ea & 3 | 2 << 2;
    if c.is_mem(0) {
        return Emit::Plain(rare::pop_mem, Op { a, ..c.op });
    }
    let register = c.insn.op0_register();
    if register.is_segment_register() {
        let imm = seg_number(register) as u64;
        return Emit::PlainEnd(rare::pop_seg, Op { a, imm, ..c.op });
    }
    if c.mode64 || usual(c, a) {
        let f: Handler = match a {
            8 => stack::pop_r::<u64>,
            4 => stack::pop_r::<u32>,
            _ => stack::pop_r::<u16>,
        };
        return Emit::Next(
            f,
            Op {
                a: c.reg(0),
                ea: on_stack,
                ..c.op
            },
        );
    }
    Emit::Plain(
        rare::pop_reg,
        Op {
            a,
            b: c.reg(0),
            ..c.op
        },
    )
}

/// A CMP or TEST that can run together with a Jcc after it.
#[derive(Clone, Copy)]
pub(super) struct Compare {
    test: bool,
    size: usize,
    /// The first operand is memory.
    memory: bool,
    immediate: bool,
}

/// Whether this instruction is one.
pub(super) fn fusible(c: &Context) -> Option<Compare> {
    let m = c.insn.mnemonic();
    let memory = c.is_mem(0);
    let operands = if memory {
        c.class == EaClass::Base && !c.is_reg(1)
    } else {
        c.is_reg(0) && !c.is_mem(1)
    };
    let fits = (c.mode64 || c.flat) && matches!(m, M::Cmp | M::Test) && operands;
    fits.then(|| Compare {
        test: m == M::Test,
        size: c.size(0),
        memory,
        immediate: !c.is_reg(1),
    })
}

/// The handler of `compare` together with this instruction, if that is a Jcc.
pub(super) fn fused(compare: Compare, c: &Context) -> Option<Handler> {
    if !c.insn.is_jcc_short_or_near() {
        return None;
    }
    let condition = condition_number(c)?;
    macro_rules! pick {
        ($k:expr) => {
            sized!(compare.size, T => by_condition!(condition, C => if compare.memory {
                branch::mi_jcc::<{ $k }, T, C> as Handler
            } else if compare.immediate {
                branch::ri_jcc::<{ $k }, T, C> as Handler
            } else {
                branch::rr_jcc::<{ $k }, T, C> as Handler
            }))
        };
    }
    Some(if compare.test {
        pick!(kind::TEST)
    } else {
        pick!(kind::CMP)
    })
}
