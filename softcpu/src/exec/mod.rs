//! What decoded operations do.

pub(crate) mod arith;
pub(crate) mod atomic;
pub(crate) mod bits;
pub(crate) mod branch;
pub(crate) mod control;
pub(crate) mod descriptor;
pub(crate) mod entry;
pub(crate) mod fuse;
pub(crate) mod mov;
pub(crate) mod muldiv;
pub(crate) mod rare;
pub(crate) mod stack;
pub(crate) mod string;
pub(crate) mod system;

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::mmu::{NOT_CANONICAL, Word};
use crate::op::{Op, Plain};
use crate::state::seg;

/// Goes on with the operation after `op`.
///
/// # Safety
/// As `op::Handler`, for an operation that is not the last of its block.
#[inline(always)]
pub(crate) unsafe fn next(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: an operation that falls through is followed by another one.
    unsafe {
        let op = op.add(1);
        ((*op).f)(cpu, op)
    }
}

/// `next` after an access that may have reached a device or a data breakpoint: they may have
/// asked to stop here.
///
/// # Safety
/// As `next`.
pub(crate) unsafe fn next_after_device(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: as in `next`.
    unsafe {
        if cpu.stop_after {
            let op = &*op;
            cpu.link = std::ptr::null_mut();
            cpu.s.rip = cpu
                .s
                .block_rip
                .wrapping_add(u64::from(op.off) + u64::from(op.len))
                & cpu.rip_mask;
            return;
        }
        next(cpu, op)
    }
}

/// Unwraps a `Fallible` in a handler, or delivers the exception.
macro_rules! attempt {
    ($cpu:ident, $op:ident, $e:expr) => {
        match $e {
            Ok(value) => value,
            Err(exception) => return $crate::exec::fault($cpu, $op, exception),
        }
    };
}
pub(crate) use attempt;

/// Ends the block with an exception of `op`.
#[cold]
#[inline(never)]
pub(crate) fn fault(cpu: &mut Cpu, op: *const Op, exception: Exception) {
    // SAFETY: handlers only pass the operation they were called with.
    let op = unsafe { &*op };
    cpu.s.rip = cpu.s.block_rip.wrapping_add(u64::from(op.off));
    cpu.raise(exception, op.seg() == seg::SS);
}

impl Cpu {
    /// Makes `exception` pending. `stack`: it came from an access through SS.
    pub(crate) fn raise(&mut self, mut exception: Exception, stack: bool) {
        if exception.vector == 13 && exception.cr2 == NOT_CANONICAL {
            exception = if stack {
                Exception::SS0
            } else {
                Exception::GP0
            };
        }
        self.link = std::ptr::null_mut();
        // An instruction that faults was not executed: no trap of its own remains.
        self.watch_hits = 0;
        self.pending = Some(exception);
    }

    /// Reads a register operand.
    #[inline(always)]
    pub(crate) fn reg<T: Word>(&self, offset: u8) -> T {
        debug_assert!(usize::from(offset) + T::BYTES <= 144);
        // SAFETY: the decoder's offsets lie in the registers at the start of the state.
        unsafe {
            (&raw const self.s)
                .cast::<u8>()
                .add(usize::from(offset))
                .cast::<T>()
                .read_unaligned()
        }
    }

    /// Writes a register operand: 32 bits clear the upper half, less leave the rest alone.
    #[inline(always)]
    pub(crate) fn set_reg<T: Word>(&mut self, offset: u8, value: T) {
        debug_assert!(usize::from(offset) + T::BYTES <= 128);
        // SAFETY: as in `reg`; 32-bit registers start at multiples of 8, where 8 bytes fit.
        unsafe {
            let p = (&raw mut self.s).cast::<u8>().add(usize::from(offset));
            if T::BYTES == 4 {
                p.cast::<u64>().write(value.wide());
            } else {
                p.cast::<T>().write_unaligned(value);
            }
        }
    }
}

/// Ways to compute the linear address of a memory operand that cannot fail.
pub(crate) trait Ea: 'static {
    fn addr(cpu: &Cpu, op: *const Op) -> u64;
}

/// 64-bit mode, base + displacement, no segment base.
pub(crate) struct Base;
/// 64-bit mode, any 64-bit form.
pub(crate) struct Full;

/// `MODE_FLAT` with 32-bit offsets. What crosses the end of 4 GiB crosses a page and so never hits.
pub(crate) struct Flat;

impl Ea for Flat {
    #[inline(always)]
    fn addr(cpu: &Cpu, op: *const Op) -> u64 {
        // SAFETY: handlers only pass the operation they were called with.
        let op = unsafe { &*op };
        let offset = cpu
            .reg64(op.base)
            .wrapping_add(cpu.reg64(op.index) << op.scale())
            .wrapping_add(op.disp as u64);
        offset & 0xffff_ffff
    }
}

impl Ea for Base {
    #[inline(always)]
    fn addr(cpu: &Cpu, op: *const Op) -> u64 {
        // SAFETY: handlers only pass the operation they were called with.
        let op = unsafe { &*op };
        cpu.reg64(op.base).wrapping_add(op.disp as u64)
    }
}

impl Ea for Full {
    #[inline(always)]
    fn addr(cpu: &Cpu, op: *const Op) -> u64 {
        // SAFETY: as above; the decoder knows six segment registers.
        let (op, base) = unsafe {
            let op = &*op;
            (op, *cpu.s.ea_base.get_unchecked(op.seg()))
        };
        cpu.reg64(op.base)
            .wrapping_add(cpu.reg64(op.index) << op.scale())
            .wrapping_add(op.disp as u64)
            .wrapping_add(base)
    }
}

/// Reads the memory operand, of any form.
pub(crate) fn load<T: Word>(cpu: &mut Cpu, op: *const Op) -> Fallible<T> {
    // SAFETY: handlers only pass the operation they were called with.
    let addr = cpu.operand(unsafe { &*op }, T::BYTES, false)?;
    cpu.read(addr)
}

/// Writes the memory operand, of any form.
pub(crate) fn store<T: Word>(cpu: &mut Cpu, op: *const Op, value: T) -> Fallible<()> {
    // SAFETY: as in `load`.
    let addr = cpu.operand(unsafe { &*op }, T::BYTES, true)?;
    cpu.write(addr, value)
}

/// Changes the memory operand, of any form.
pub(crate) fn modify<T: Word>(
    cpu: &mut Cpu,
    op: *const Op,
    f: impl FnOnce(&mut Cpu, T) -> T,
) -> Fallible<()> {
    // SAFETY: as in `load`.
    let addr = cpu.operand(unsafe { &*op }, T::BYTES, true)?;
    cpu.modify(addr, f)
}

/// Host address of the memory operand if it can be read directly, or goes the slow way.
macro_rules! readable {
    ($cpu:ident, $op:ident, $t:ty, $e:ty, $slow:expr) => {
        match $cpu.hit_read::<$t>(<$e>::addr($cpu, $op)) {
            Some(p) => p,
            None => return $slow($cpu, $op),
        }
    };
}
pub(crate) use readable;

/// The same for writing.
macro_rules! writable {
    ($cpu:ident, $op:ident, $t:ty, $e:ty, $slow:expr) => {
        match $cpu.hit_write::<$t>(<$e>::addr($cpu, $op)) {
            Some(p) => p,
            None => return $slow($cpu, $op),
        }
    };
}
pub(crate) use writable;

/// The plain handler of a two-slot operation.
unsafe fn plain_of(op: *const Op) -> Plain {
    // SAFETY: the decoder puts the handler's address into the second slot's `imm`.
    unsafe { std::mem::transmute::<usize, Plain>((*op.add(1)).imm as usize) }
}

/// Runs a plain handler and goes on after its second slot.
pub(crate) unsafe fn plain(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: a two-slot operation.
    let (handler, o) = unsafe { (plain_of(op), &*op) };
    cpu.s.rip = cpu
        .s
        .block_rip
        .wrapping_add(u64::from(o.off) + u64::from(o.len));
    attempt!(cpu, op, handler(cpu, o));
    // SAFETY: it is followed by another operation after its second slot, which has the same
    // offset and length.
    unsafe { next_after_device(cpu, op.add(1)) }
}

/// Runs a plain handler that ends its block: what comes next is up to `CpuState::rip`.
pub(crate) unsafe fn plain_end(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: a two-slot operation.
    let (handler, o) = unsafe { (plain_of(op), &*op) };
    cpu.s.rip = cpu
        .s
        .block_rip
        .wrapping_add(u64::from(o.off) + u64::from(o.len))
        & cpu.rip_mask;
    cpu.link = std::ptr::null_mut();
    attempt!(cpu, op, handler(cpu, o));
    if cpu.finds_code_by_rip() && cpu.pending.is_none() {
        // SAFETY: between blocks, and RIP is a linear address.
        unsafe { branch::indirect(cpu, cpu.s.rip) }
    }
}

/// Does nothing.
pub(crate) unsafe fn nop(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: not the last operation of its block.
    unsafe { next(cpu, op) }
}

/// Longer than 15 bytes.
pub(crate) unsafe fn overlong(cpu: &mut Cpu, op: *const Op) {
    fault(cpu, op, Exception::GP0)
}

/// MFENCE: guest loads and stores are the host's, so is their order.
pub(crate) unsafe fn fence(cpu: &mut Cpu, op: *const Op) {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    // SAFETY: not the last operation of its block.
    unsafe { next(cpu, op) }
}

/// #UD.
pub(crate) unsafe fn undefined(cpu: &mut Cpu, op: *const Op) {
    fault(cpu, op, Exception::UD)
}
