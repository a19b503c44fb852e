//! ADD to TEST, shifts, INC/DEC/NEG/NOT: register and memory forms.

use super::{Ea, attempt, load, modify, next, next_after_device, readable, writable};
use crate::alu::{Alu, condition, kind};
use crate::cpu::Cpu;
use crate::exception::Fallible;
use crate::op::Op;

const fn writes(k: u8) -> bool {
    k != kind::CMP && k != kind::TEST
}

/// Register, register.
pub(crate) unsafe fn rr<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
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

/// `cc` of a result that is zero: ZF and PF.
pub(crate) const ZERO_FLAGS: u64 = 0x4600;

/// XOR or SUB of a register with itself.
pub(crate) unsafe fn zero<T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        cpu.s.cc = ZERO_FLAGS;
        cpu.set_reg::<T>((*op).a, T::cut(0));
        next(cpu, op)
    }
}

/// Register, immediate.
pub(crate) unsafe fn ri<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
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

#[inline(always)]
unsafe fn into_reg<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op, b: T) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::alu::<K>(cpu.s.cc, cpu.reg((*op).a), b);
        cpu.s.cc = cc;
        if writes(K) {
            cpu.set_reg::<T>((*op).a, r);
        }
        next(cpu, op)
    }
}

/// Register, memory.
pub(crate) unsafe fn rm<const K: u8, T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is readable guest RAM.
    unsafe {
        let p = readable!(cpu, op, T, E, rm_slow::<K, T>);
        into_reg::<K, T>(cpu, op, p.read_unaligned())
    }
}

/// Register, memory of any form.
#[inline(never)]
pub(crate) unsafe fn rm_slow<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    let b = attempt!(cpu, op, load::<T>(cpu, op));
    // SAFETY: the caller's promise (op::Handler).
    unsafe { into_reg::<K, T>(cpu, op, b) }
}

#[inline(always)]
unsafe fn to_memory<const K: u8, T: Alu, E: Ea>(
    cpu: &mut Cpu,
    op: *const Op,
    b: T,
    slow: crate::op::Handler,
) {
    // SAFETY: the caller's promise (op::Handler); a hit is guest RAM, and writable where it
    // has to be.
    unsafe {
        if writes(K) {
            let p = writable!(cpu, op, T, E, slow);
            let (r, cc) = T::alu::<K>(cpu.s.cc, p.read_unaligned(), b);
            cpu.s.cc = cc;
            p.write_unaligned(r);
        } else {
            let p = readable!(cpu, op, T, E, slow);
            cpu.s.cc = T::alu::<K>(cpu.s.cc, p.read_unaligned(), b).1;
        }
        next(cpu, op)
    }
}

fn to_memory_slow<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op, b: T) -> Fallible<()> {
    if writes(K) {
        modify::<T>(cpu, op, |cpu, a| {
            let (r, cc) = T::alu::<K>(cpu.s.cc, a, b);
            cpu.s.cc = cc;
            r
        })
    } else {
        let a = load::<T>(cpu, op)?;
        cpu.s.cc = T::alu::<K>(cpu.s.cc, a, b).1;
        Ok(())
    }
}

/// Memory, register.
pub(crate) unsafe fn mr<const K: u8, T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = cpu.reg((*op).a);
        to_memory::<K, T, E>(cpu, op, b, mr_slow::<K, T>)
    }
}

/// Memory of any form, register.
#[inline(never)]
pub(crate) unsafe fn mr_slow<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = cpu.reg((*op).a);
        attempt!(cpu, op, to_memory_slow::<K, T>(cpu, op, b));
        next_after_device(cpu, op)
    }
}

/// Memory, immediate.
pub(crate) unsafe fn mi<const K: u8, T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = T::cut((*op).imm);
        to_memory::<K, T, E>(cpu, op, b, mi_slow::<K, T>)
    }
}

/// Memory of any form, immediate.
#[inline(never)]
pub(crate) unsafe fn mi_slow<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = T::cut((*op).imm);
        attempt!(cpu, op, to_memory_slow::<K, T>(cpu, op, b));
        next_after_device(cpu, op)
    }
}

/// Shift or rotate of a register by an immediate.
pub(crate) unsafe fn shift_ri<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::shift::<K>(cpu.s.cc, cpu.reg((*op).a), (*op).imm as u8);
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// SHL, SHR or SAR of a register by an immediate, already masked and not 0.
pub(crate) unsafe fn shift_some<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::shift_some::<K>(cpu.reg((*op).a), (*op).imm as u8);
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// Shift or rotate of a register by CL.
pub(crate) unsafe fn shift_rc<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::shift::<K>(cpu.s.cc, cpu.reg((*op).a), cpu.reg(8));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// Shift or rotate of memory by an immediate, or by CL if `b` is set.
pub(crate) unsafe fn shift_m<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let count = if (*op).b != 0 {
            cpu.reg::<u8>(8)
        } else {
            (*op).imm as u8
        };
        let shifted = modify::<T>(cpu, op, |cpu, a| {
            let (r, cc) = T::shift::<K>(cpu.s.cc, a, count);
            cpu.s.cc = cc;
            r
        });
        attempt!(cpu, op, shifted);
        next_after_device(cpu, op)
    }
}

/// INC, DEC, NEG, NOT of a register.
pub(crate) unsafe fn unary_r<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::unary::<K>(cpu.s.cc, cpu.reg((*op).a));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// INC, DEC, NEG, NOT of memory.
pub(crate) unsafe fn unary_m<const K: u8, T: Alu, E: Ea>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is writable guest RAM.
    unsafe {
        let p = writable!(cpu, op, T, E, unary_slow::<K, T>);
        let (r, cc) = T::unary::<K>(cpu.s.cc, p.read_unaligned());
        cpu.s.cc = cc;
        p.write_unaligned(r);
        next(cpu, op)
    }
}

/// INC, DEC, NEG, NOT of memory of any form.
#[inline(never)]
pub(crate) unsafe fn unary_slow<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    let changed = modify::<T>(cpu, op, |cpu, a| {
        let (r, cc) = T::unary::<K>(cpu.s.cc, a);
        cpu.s.cc = cc;
        r
    });
    attempt!(cpu, op, changed);
    // SAFETY: the caller's promise (op::Handler).
    unsafe { next_after_device(cpu, op) }
}

/// IMUL register, register.
pub(crate) unsafe fn imul_rr<T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::imul2(cpu.s.cc, cpu.reg((*op).a), cpu.reg((*op).b));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// IMUL register, memory.
pub(crate) unsafe fn imul_rm<T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = attempt!(cpu, op, load::<T>(cpu, op));
        let (r, cc) = T::imul2(cpu.s.cc, cpu.reg((*op).a), b);
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// IMUL register, register, immediate.
pub(crate) unsafe fn imul_rri<T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (r, cc) = T::imul2(cpu.s.cc, cpu.reg((*op).b), T::cut((*op).imm));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// IMUL register, memory, immediate.
pub(crate) unsafe fn imul_rmi<T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let b = attempt!(cpu, op, load::<T>(cpu, op));
        let (r, cc) = T::imul2(cpu.s.cc, b, T::cut((*op).imm));
        cpu.s.cc = cc;
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// CMOVcc register, register.
pub(crate) unsafe fn cmov_rr<const C: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
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

#[inline(always)]
unsafe fn choose<const C: u8, T: Alu>(cpu: &mut Cpu, op: *const Op, b: T) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = if condition::<C>(cpu.s.cc) {
            b
        } else {
            cpu.reg::<T>((*op).a)
        };
        cpu.set_reg::<T>((*op).a, value);
        next(cpu, op)
    }
}

/// CMOVcc register, memory: memory is read in any case.
pub(crate) unsafe fn cmov_rm<const C: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    let b = attempt!(cpu, op, load::<T>(cpu, op));
    // SAFETY: the caller's promise (op::Handler).
    unsafe { choose::<C, T>(cpu, op, b) }
}

/// SETcc register.
pub(crate) unsafe fn set_r<const C: u8>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = u8::from(condition::<C>(cpu.s.cc));
        cpu.set_reg::<u8>((*op).a, value);
        next(cpu, op)
    }
}

/// `rr` where nobody will look at the flags.
pub(crate) unsafe fn quiet_rr<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let r = T::quiet::<K>(cpu.reg((*op).a), cpu.reg((*op).b));
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// `ri` where nobody will look at the flags.
pub(crate) unsafe fn quiet_ri<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let r = T::quiet::<K>(cpu.reg((*op).a), T::cut((*op).imm));
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// `shift_some` where nobody will look at the flags.
pub(crate) unsafe fn quiet_shift<const K: u8, T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let r = T::quiet_shift::<K>(cpu.reg((*op).a), (*op).imm as u8);
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}

/// `imul_rr` where nobody will look at the flags.
pub(crate) unsafe fn quiet_imul<T: Alu>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let r = T::quiet_imul(cpu.reg((*op).a), cpu.reg((*op).b));
        cpu.set_reg::<T>((*op).a, r);
        next(cpu, op)
    }
}
