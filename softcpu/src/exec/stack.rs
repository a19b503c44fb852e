//! PUSH, POP and LEAVE in 64-bit mode and in flat 32-bit code, and the stack in all modes for everything else.

use super::{attempt, load, next, next_after_device};
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::mmu::Word;
use crate::op::Op;
use crate::state::{gpr, seg};

const RSP: u8 = 32;
const RBP: u8 = 40;

/// The stack pointer's bits, where words of type `T` are the ordinary ones: 32 in flat code.
const fn bits<T: Word>() -> u64 {
    if T::BYTES == 4 { 0xffff_ffff } else { u64::MAX }
}

/// Linear address of the word on top of the stack.
#[inline(always)]
pub(super) fn top<T: Word>(cpu: &Cpu) -> u64 {
    cpu.s.gpr[gpr::RSP] & bits::<T>()
}

/// Linear address of the next word to be pushed.
#[inline(always)]
pub(super) fn below<T: Word>(cpu: &Cpu) -> u64 {
    cpu.s.gpr[gpr::RSP].wrapping_sub(T::BYTES as u64) & bits::<T>()
}

/// Takes bytes off the stack.
#[inline(always)]
pub(super) fn drop_bytes<T: Word>(cpu: &mut Cpu, len: u64) {
    cpu.s.gpr[gpr::RSP] = cpu.s.gpr[gpr::RSP].wrapping_add(len) & bits::<T>();
}

#[inline(always)]
unsafe fn push<T: Word>(cpu: &mut Cpu, op: *const Op, value: T) {
    let sp = below::<T>(cpu);
    // SAFETY: the caller's promise (op::Handler); a hit is writable guest RAM.
    unsafe {
        let Some(p) = cpu.hit_write::<T>(sp) else {
            return push_slow::<T>(cpu, op, value);
        };
        p.write_unaligned(value);
        cpu.s.gpr[gpr::RSP] = sp;
        next(cpu, op)
    }
}

#[cold]
#[inline(never)]
unsafe fn push_slow<T: Word>(cpu: &mut Cpu, op: *const Op, value: T) {
    attempt!(cpu, op, cpu.push(value.wide(), T::BYTES));
    // SAFETY: the caller's promise (op::Handler).
    unsafe { next_after_device(cpu, op) }
}

/// PUSH register, 64-bit mode, or flat where `T` is u32; so the others.
pub(crate) unsafe fn push_r<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe { push::<T>(cpu, op, cpu.reg::<T>((*op).a)) }
}

/// PUSH immediate.
pub(crate) unsafe fn push_i<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe { push::<T>(cpu, op, T::cut((*op).imm)) }
}

/// PUSH memory.
pub(crate) unsafe fn push_m<T: Word>(cpu: &mut Cpu, op: *const Op) {
    let value = attempt!(cpu, op, load::<T>(cpu, op));
    attempt!(cpu, op, cpu.push(value.wide(), T::BYTES));
    // SAFETY: the caller's promise (op::Handler).
    unsafe { next_after_device(cpu, op) }
}

/// POP register.
pub(crate) unsafe fn pop_r<T: Word>(cpu: &mut Cpu, op: *const Op) {
    let sp = top::<T>(cpu);
    // SAFETY: the caller's promise (op::Handler); a hit is readable guest RAM.
    unsafe {
        let Some(p) = cpu.hit_read::<T>(sp) else {
            return pop_slow::<T>(cpu, op);
        };
        let value = p.read_unaligned();
        drop_bytes::<T>(cpu, T::BYTES as u64);
        cpu.set_reg::<T>((*op).a, value);
        next(cpu, op)
    }
}

#[cold]
#[inline(never)]
unsafe fn pop_slow<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = attempt!(cpu, op, cpu.pop(T::BYTES));
        cpu.set_reg::<T>((*op).a, T::cut(value));
        next_after_device(cpu, op)
    }
}

/// LEAVE.
pub(crate) unsafe fn leave<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let bp = cpu.reg::<T>(RBP).wide();
        let value = attempt!(cpu, op, cpu.peek_at(bp, T::BYTES));
        cpu.set_reg::<T>(RSP, T::cut(bp.wrapping_add(T::BYTES as u64)));
        cpu.set_reg::<T>(RBP, T::cut(value));
        next(cpu, op)
    }
}

impl Cpu {
    /// Mask of the stack pointer's size: SS.B outside 64-bit mode.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.mode & 3 == 2 {
            u64::MAX
        } else if self.s.seg[seg::SS].big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the part of RSP that the stack's size covers.
    pub(crate) fn set_sp(&mut self, value: u64) {
        let mask = self.stack_mask();
        let rsp = &mut self.s.gpr[gpr::RSP];
        *rsp = *rsp & !mask | value & mask;
        // A 32-bit stack pointer is written like any 32-bit register.
        if mask == 0xffff_ffff {
            *rsp &= mask;
        }
    }

    /// Linear address of stack offset `sp`.
    pub(crate) fn stack_addr(&mut self, sp: u64, len: usize, write: bool) -> Fallible<u64> {
        if self.mode & 3 == 2 {
            self.check_canonical(sp).map_err(|_| Exception::SS0)?;
            Ok(sp)
        } else {
            self.segmented(seg::SS, sp & self.stack_mask(), len, write)
        }
    }

    /// Writes `value` of `len` bytes (2, 4, 8) below `sp`; the new `sp`. RSP is not changed.
    pub(crate) fn push_at(&mut self, sp: u64, value: u64, len: usize) -> Fallible<u64> {
        let sp = sp.wrapping_sub(len as u64);
        let addr = self.stack_addr(sp, len, true)?;
        match len {
            2 => self.write::<u16>(addr, value as u16)?,
            4 => self.write::<u32>(addr, value as u32)?,
            _ => self.write::<u64>(addr, value)?,
        }
        Ok(sp)
    }

    /// Reads `len` bytes (2, 4, 8) at stack offset `sp`. RSP is not changed.
    pub(crate) fn peek_at(&mut self, sp: u64, len: usize) -> Fallible<u64> {
        let addr = self.stack_addr(sp, len, false)?;
        Ok(match len {
            2 => self.read::<u16>(addr)?.into(),
            4 => self.read::<u32>(addr)?.into(),
            _ => self.read::<u64>(addr)?,
        })
    }

    /// PUSH.
    pub(crate) fn push(&mut self, value: u64, len: usize) -> Fallible<()> {
        let sp = self.push_at(self.s.gpr[gpr::RSP], value, len)?;
        self.set_sp(sp);
        Ok(())
    }

    /// POP.
    pub(crate) fn pop(&mut self, len: usize) -> Fallible<u64> {
        let sp = self.s.gpr[gpr::RSP];
        let value = self.peek_at(sp, len)?;
        self.set_sp(sp.wrapping_add(len as u64));
        Ok(value)
    }
}
