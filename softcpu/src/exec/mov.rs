//! Moves: MOV, MOVZX, MOVSX, LEA, XCHG of registers, sign extensions, BSWAP.

use super::{Ea, attempt, load, next, next_after_device, readable, store, writable};
use crate::cpu::Cpu;
use crate::mmu::Word;
use crate::op::Op;

/// Register to register.
pub(crate) unsafe fn rr<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = cpu.reg::<T>((*op).b);
        cpu.set_reg::<T>((*op).a, value);
        next(cpu, op)
    }
}

/// Immediate to register.
pub(crate) unsafe fn ri<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        cpu.set_reg::<T>((*op).a, T::cut((*op).imm));
        next(cpu, op)
    }
}

/// Memory to register.
pub(crate) unsafe fn rm<T: Word, E: Ea>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is readable guest RAM.
    unsafe {
        let p = readable!(cpu, op, T, E, rm_slow::<T>);
        cpu.set_reg::<T>((*op).a, p.read_unaligned());
        next(cpu, op)
    }
}

/// Memory of any form to register.
#[inline(never)]
pub(crate) unsafe fn rm_slow<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = attempt!(cpu, op, load::<T>(cpu, op));
        cpu.set_reg::<T>((*op).a, value);
        next_after_device(cpu, op)
    }
}

/// Register to memory.
pub(crate) unsafe fn mr<T: Word, E: Ea>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is writable guest RAM.
    unsafe {
        let p = writable!(cpu, op, T, E, mr_slow::<T>);
        p.write_unaligned(cpu.reg::<T>((*op).a));
        next(cpu, op)
    }
}

/// Register to memory of any form.
#[inline(never)]
pub(crate) unsafe fn mr_slow<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = cpu.reg::<T>((*op).a);
        attempt!(cpu, op, store::<T>(cpu, op, value));
        next_after_device(cpu, op)
    }
}

/// Immediate to memory.
pub(crate) unsafe fn mi<T: Word, E: Ea>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is writable guest RAM.
    unsafe {
        let p = writable!(cpu, op, T, E, mi_slow::<T>);
        p.write_unaligned(T::cut((*op).imm));
        next(cpu, op)
    }
}

/// Immediate to memory of any form.
#[inline(never)]
pub(crate) unsafe fn mi_slow<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = T::cut((*op).imm);
        attempt!(cpu, op, store::<T>(cpu, op, value));
        next_after_device(cpu, op)
    }
}

/// Zero extension, register.
pub(crate) unsafe fn zx_rr<D: Word, S: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = cpu.reg::<S>((*op).b).wide();
        cpu.set_reg::<D>((*op).a, D::cut(value));
        next(cpu, op)
    }
}

/// Zero extension, memory.
pub(crate) unsafe fn zx_rm<D: Word, S: Word, E: Ea>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is readable guest RAM.
    unsafe {
        let p = readable!(cpu, op, S, E, zx_slow::<D, S>);
        cpu.set_reg::<D>((*op).a, D::cut(p.read_unaligned().wide()));
        next(cpu, op)
    }
}

/// Zero extension, memory of any form.
#[inline(never)]
pub(crate) unsafe fn zx_slow<D: Word, S: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = attempt!(cpu, op, load::<S>(cpu, op)).wide();
        cpu.set_reg::<D>((*op).a, D::cut(value));
        next_after_device(cpu, op)
    }
}

/// Sign extension, register.
pub(crate) unsafe fn sx_rr<D: Word, S: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = cpu.reg::<S>((*op).b).sign() as u64;
        cpu.set_reg::<D>((*op).a, D::cut(value));
        next(cpu, op)
    }
}

/// Sign extension, memory.
pub(crate) unsafe fn sx_rm<D: Word, S: Word, E: Ea>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is readable guest RAM.
    unsafe {
        let p = readable!(cpu, op, S, E, sx_slow::<D, S>);
        cpu.set_reg::<D>((*op).a, D::cut(p.read_unaligned().sign() as u64));
        next(cpu, op)
    }
}

/// Sign extension, memory of any form.
#[inline(never)]
pub(crate) unsafe fn sx_slow<D: Word, S: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = attempt!(cpu, op, load::<S>(cpu, op)).sign() as u64;
        cpu.set_reg::<D>((*op).a, D::cut(value));
        next_after_device(cpu, op)
    }
}

/// LEA with base and displacement.
pub(crate) unsafe fn lea_base<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let addr = cpu.reg64((*op).base).wrapping_add((*op).disp as u64);
        cpu.set_reg::<T>((*op).a, T::cut(addr));
        next(cpu, op)
    }
}

/// LEA with everything.
pub(crate) unsafe fn lea_full<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let o = &*op;
        let addr = cpu
            .reg64(o.base)
            .wrapping_add(cpu.reg64(o.index) << o.scale())
            .wrapping_add(o.disp as u64);
        let addr = match o.ea_kind() {
            Op::EA_64 => addr,
            Op::EA_16 => addr & 0xffff,
            _ => addr & 0xffff_ffff,
        };
        cpu.set_reg::<T>(o.a, T::cut(addr));
        next(cpu, op)
    }
}

/// XCHG of two registers.
pub(crate) unsafe fn xchg_rr<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (a, b) = (cpu.reg::<T>((*op).a), cpu.reg::<T>((*op).b));
        cpu.set_reg::<T>((*op).a, b);
        cpu.set_reg::<T>((*op).b, a);
        next(cpu, op)
    }
}

/// CBW, CWDE, CDQE.
pub(crate) unsafe fn extend_a<D: Word, S: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = cpu.reg::<S>(0).sign() as u64;
        cpu.set_reg::<D>(0, D::cut(value));
        next(cpu, op)
    }
}

/// CWD, CDQ, CQO.
pub(crate) unsafe fn extend_d<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = (cpu.reg::<T>(0).sign() >> 63) as u64;
        cpu.set_reg::<T>(16, T::cut(value));
        next(cpu, op)
    }
}

/// BSWAP. With 16 bits it clears the register, as processors do.
pub(crate) unsafe fn bswap<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = match T::BYTES {
            2 => 0,
            bytes => cpu.reg::<T>((*op).a).wide().swap_bytes() >> (64 - 8 * bytes),
        };
        cpu.set_reg::<T>((*op).a, T::cut(value));
        next(cpu, op)
    }
}
