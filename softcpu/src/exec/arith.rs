//! ADD to TEST, shifts, INC/DEC/NEG/NOT: register and memory forms.

use super::{Ea, attempt, load, modify, next};
use crate::alu::{Alu, condition, kind};
use crate::cpu::Cpu;
use crate::exception::Fallible;
use crate::op::{Block, Op};

const fn writes(k: u8) -> bool {
    k != kind::CMP && k != kind::TEST
}

/// Register, register.
pub(crate) unsafe fn rr<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::alu::<K>(cpu.s.cc, cpu.reg((*op).a), cpu.reg((*op).b));
        cpu.s.cc = cc;
        if writes(K) {
            cpu.set_reg::<T>((*op).a, r);
        }
        next(cpu, op)
    }
}

/// XOR or SUB of a register with itself.
pub(crate) unsafe fn zero<T: Alu>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        cpu.s.cc = 0x4600;
        cpu.set_reg::<T>((*op).a, T::cut(0));
        next(cpu, op)
    }
}

/// Register, immediate.
pub(crate) unsafe fn ri<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::alu::<K>(cpu.s.cc, cpu.reg((*op).a), T::cut((*op).imm));
        cpu.s.cc = cc;
        if writes(K) {
            cpu.set_reg::<T>((*op).a, r);
        }
        next(cpu, op)
    }
}

/// Register, memory.
pub(crate) unsafe fn rm<const K: u8, T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = attempt!(cpu, op, load::<T, E>(cpu, op));
        let (r, cc) = T::alu::<K>(cpu.s.cc, cpu.reg((*op).a), b);
        cpu.s.cc = cc;
        if writes(K) {
            cpu.set_reg::<T>((*op).a, r);
        }
        next(cpu, op)
    }
}

#[inline(always)]
fn to_memory<const K: u8, T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op, b: T) -> Fallible<()> {
    if writes(K) {
        modify::<T, E>(cpu, op, |cpu, a| {
            let (r, cc) = T::alu::<K>(cpu.s.cc, a, b);
            cpu.s.cc = cc;
            r
        })
    } else {
        let a = load::<T, E>(cpu, op)?;
        cpu.s.cc = T::alu::<K>(cpu.s.cc, a, b).1;
        Ok(())
    }
}

/// Memory, register.
pub(crate) unsafe fn mr<const K: u8, T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = cpu.reg((*op).a);
        attempt!(cpu, op, to_memory::<K, T, E>(cpu, op, b));
        next(cpu, op)
    }
}

/// Memory, immediate.
pub(crate) unsafe fn mi<const K: u8, T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = T::cut((*op).imm);
        attempt!(cpu, op, to_memory::<K, T, E>(cpu, op, b));
        next(cpu, op)
    }
}

/// Shift or rotate of a register by an immediate.
pub(crate) unsafe fn shift_ri<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::shift::<K>(cpu.s.cc, cpu.reg((*op).a), (*op).imm as u8);
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// Shift or rotate of a register by CL.
pub(crate) unsafe fn shift_rc<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::shift::<K>(cpu.s.cc, cpu.reg((*op).a), cpu.reg(8));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// Shift or rotate of memory by an immediate.
pub(crate) unsafe fn shift_mi<const K: u8, T: Alu, E: Ea>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let count = (*op).imm as u8;
        attempt!(
            cpu,
            op,
            modify::<T, E>(cpu, op, |cpu, a| {
                let (r, cc) = T::shift::<K>(cpu.s.cc, a, count);
                cpu.s.cc = cc;
                r
            })
        );
        next(cpu, op)
    }
}

/// Shift or rotate of memory by CL.
pub(crate) unsafe fn shift_mc<const K: u8, T: Alu, E: Ea>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        attempt!(
            cpu,
            op,
            modify::<T, E>(cpu, op, |cpu, a| {
                let (r, cc) = T::shift::<K>(cpu.s.cc, a, cpu.reg(8));
                cpu.s.cc = cc;
                r
            })
        );
        next(cpu, op)
    }
}

/// INC, DEC, NEG, NOT of a register.
pub(crate) unsafe fn unary_r<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::unary::<K>(cpu.s.cc, cpu.reg((*op).a));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// INC, DEC, NEG, NOT of memory.
pub(crate) unsafe fn unary_m<const K: u8, T: Alu, E: Ea>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        attempt!(
            cpu,
            op,
            modify::<T, E>(cpu, op, |cpu, a| {
                let (r, cc) = T::unary::<K>(cpu.s.cc, a);
                cpu.s.cc = cc;
                r
            })
        );
        next(cpu, op)
    }
}

/// IMUL register, register.
pub(crate) unsafe fn imul_rr<T: Alu>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::imul2(cpu.s.cc, cpu.reg((*op).a), cpu.reg((*op).b));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// IMUL register, memory.
pub(crate) unsafe fn imul_rm<T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = attempt!(cpu, op, load::<T, E>(cpu, op));
        let (r, cc) = T::imul2(cpu.s.cc, cpu.reg((*op).a), b);
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// IMUL register, register, immediate.
pub(crate) unsafe fn imul_rri<T: Alu>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::imul2(cpu.s.cc, cpu.reg((*op).b), T::cut((*op).imm));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// IMUL register, memory, immediate.
pub(crate) unsafe fn imul_rmi<T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = attempt!(cpu, op, load::<T, E>(cpu, op));
        let (r, cc) = T::imul2(cpu.s.cc, b, T::cut((*op).imm));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// CMOVcc register, register.
pub(crate) unsafe fn cmov_rr<const C: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let from = if condition::<C>(cpu.s.cc) {
            (*op).b
        } else {
            (*op).a
        };
        let value = cpu.reg::<T>(from);
        cpu.set_reg::<T>((*op).a, value);
        next(cpu, op)
    }
}

/// CMOVcc register, memory: memory is read in any case.
pub(crate) unsafe fn cmov_rm<const C: u8, T: Alu, E: Ea>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = attempt!(cpu, op, load::<T, E>(cpu, op));
        let value = if condition::<C>(cpu.s.cc) {
            b
        } else {
            cpu.reg::<T>((*op).a)
        };
        cpu.set_reg::<T>((*op).a, value);
        next(cpu, op)
    }
}

/// SETcc register.
pub(crate) unsafe fn set_r<const C: u8>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = u8::from(condition::<C>(cpu.s.cc));
        cpu.set_reg::<u8>((*op).a, value);
        next(cpu, op)
    }
}
