//! Ends of blocks: branches, calls, returns, and falling through.

use super::arith::mi_slow;
use super::{Base, Ea, attempt, load, readable, stack};
use crate::alu::{Alu, condition, condition_dyn};
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::mmu::Word;
use crate::op::Op;
use crate::state::{gpr, seg};

/// Goes on at `target`, the way `slot` knows or is to learn. The decoder sets `b` in a slot
/// whose target lies in the block's own page: only then a link holds for ever.
#[inline(always)]
unsafe fn chain(cpu: &mut Cpu, slot: *const Op, target: u64) {
    // SAFETY: a link leads to operations of this vCPU's cache, which live until all links
    // are dropped with them.
    unsafe {
        let next = (*slot).disp as *const Op;
        if next.is_null() {
            return unlinked(cpu, slot, target);
        }
        cpu.link = slot.cast_mut();
        if cpu.busy() {
            cpu.s.rip = target;
            return;
        }
        cpu.s.block_rip = target;
        ((*next).f)(cpu, next)
    }
}

#[inline(never)]
unsafe fn unlinked(cpu: &mut Cpu, slot: *const Op, target: u64) {
    // SAFETY: the caller's slot.
    unsafe {
        if (*slot).b == 0 && cpu.finds_code_by_rip() {
            return indirect(cpu, target);
        }
    }
    cpu.link = slot.cast_mut();
    cpu.s.rip = target;
}

/// Goes on at a computed address (64-bit mode, or flat).
#[inline(always)]
pub(super) unsafe fn indirect(cpu: &mut Cpu, target: u64) {
    cpu.link = std::ptr::null_mut();
    if let Some(next) = cpu.cache.jump_ops(target)
        && !cpu.busy()
    {
        cpu.s.block_rip = target;
        // SAFETY: valid entries lead to operations of this vCPU's cache.
        unsafe { return ((*next).f)(cpu, next) }
    }
    cpu.s.rip = target;
}

/// Address after `op`.
#[inline(always)]
fn after(cpu: &Cpu, op: &Op) -> u64 {
    let at = u64::from(op.off) + u64::from(op.len);
    cpu.s.block_rip.wrapping_add(at) & cpu.rip_mask
}

/// Where the branch at `op` leads.
#[inline(always)]
fn leads(cpu: &Cpu, op: &Op) -> u64 {
    cpu.s.block_rip.wrapping_add(op.imm) & cpu.rip_mask
}

/// The block ends here, the next instruction starts another.
pub(crate) unsafe fn fall(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let target = cpu.s.block_rip.wrapping_add((*op).imm) & cpu.rip_mask;
        chain(cpu, op, target)
    }
}

/// JMP, 64-bit mode or flat.
pub(crate) unsafe fn jmp(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe { chain(cpu, op, leads(cpu, &*op)) }
}

/// Where a Jcc at `op` goes on: its own slot holds the way if taken, the one after it the
/// other way.
#[inline(always)]
unsafe fn branch(cpu: &mut Cpu, op: *const Op, taken: bool) {
    // SAFETY: the caller's: a Jcc with both its slots.
    unsafe {
        if taken {
            chain(cpu, op, leads(cpu, &*op))
        } else {
            chain(cpu, op.add(1), after(cpu, &*op))
        }
    }
}

/// Jcc, 64-bit mode or flat.
pub(crate) unsafe fn jcc<const C: u8>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe { branch(cpu, op, condition::<C>(cpu.s.cc)) }
}

/// CMP or TEST of two registers, fused with the Jcc after it.
pub(crate) unsafe fn rr_jcc<const K: u8, T: Alu, const C: u8>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (_, cc) = T::alu::<K>(0, cpu.reg((*op).a), cpu.reg((*op).b));
        cpu.s.cc = cc;
        branch(cpu, op.add(1), condition::<C>(cc))
    }
}

/// CMP or TEST of a register with an immediate, fused with the Jcc after it.
pub(crate) unsafe fn ri_jcc<const K: u8, T: Alu, const C: u8>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let (_, cc) = T::alu::<K>(0, cpu.reg((*op).a), T::cut((*op).imm));
        cpu.s.cc = cc;
        branch(cpu, op.add(1), condition::<C>(cc))
    }
}

/// CMP or TEST of memory with an immediate, fused with the Jcc after it.
pub(crate) unsafe fn mi_jcc<const K: u8, T: Alu, const C: u8>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is readable guest RAM.
    unsafe {
        let p = readable!(cpu, op, T, Base, mi_slow::<K, T>);
        let (_, cc) = T::alu::<K>(0, p.read_unaligned(), T::cut((*op).imm));
        cpu.s.cc = cc;
        branch(cpu, op.add(1), condition::<C>(cc))
    }
}

/// CALL, 64-bit mode (`T` is u64) or flat (u32).
pub(crate) unsafe fn call<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is writable guest RAM.
    unsafe {
        let sp = stack::below::<T>(cpu);
        let Some(p) = cpu.hit_write::<T>(sp) else {
            return call_slow::<T>(cpu, op);
        };
        p.write_unaligned(T::cut(after(cpu, &*op)));
        cpu.s.gpr[gpr::RSP] = sp;
        chain(cpu, op, leads(cpu, &*op))
    }
}

#[cold]
#[inline(never)]
unsafe fn call_slow<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let back = after(cpu, &*op);
        attempt!(cpu, op, cpu.push(back, T::BYTES));
        chain(cpu, op, leads(cpu, &*op))
    }
}

fn call_to<T: Word>(cpu: &mut Cpu, op: *const Op, target: u64) -> Fallible<()> {
    cpu.check_target(target)?;
    // SAFETY: handlers only pass the operation they were called with.
    let back = after(cpu, unsafe { &*op });
    cpu.push(back, T::BYTES)
}

/// CALL register, 64-bit mode or flat.
pub(crate) unsafe fn call_r<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let target = cpu.reg::<T>((*op).a).wide();
        attempt!(cpu, op, call_to::<T>(cpu, op, target));
        indirect(cpu, target)
    }
}

/// CALL memory, 64-bit mode or flat.
pub(crate) unsafe fn call_m<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let target = attempt!(cpu, op, load::<T>(cpu, op)).wide();
        attempt!(cpu, op, call_to::<T>(cpu, op, target));
        indirect(cpu, target)
    }
}

/// JMP register, 64-bit mode or flat.
pub(crate) unsafe fn jmp_r<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let target = cpu.reg::<T>((*op).a).wide();
        attempt!(cpu, op, cpu.check_target(target));
        indirect(cpu, target)
    }
}

/// JMP memory, 64-bit mode or flat.
pub(crate) unsafe fn jmp_m<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let target = attempt!(cpu, op, load::<T>(cpu, op)).wide();
        attempt!(cpu, op, cpu.check_target(target));
        indirect(cpu, target)
    }
}

/// RET, with `imm` more bytes to drop, 64-bit mode or flat.
pub(crate) unsafe fn ret<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); a hit is readable guest RAM, a known target
    // is canonical.
    unsafe {
        let sp = stack::top::<T>(cpu);
        let Some(p) = cpu.hit_read::<T>(sp) else {
            return ret_slow::<T>(cpu, op);
        };
        let target = p.read_unaligned().wide();
        let Some(next) = cpu.cache.jump_ops(target) else {
            return ret_slow::<T>(cpu, op);
        };
        stack::drop_bytes::<T>(cpu, (T::BYTES as u64).wrapping_add((*op).imm));
        cpu.link = std::ptr::null_mut();
        if cpu.busy() {
            cpu.s.rip = target;
            return;
        }
        cpu.s.block_rip = target;
        ((*next).f)(cpu, next)
    }
}

#[cold]
#[inline(never)]
unsafe fn ret_slow<T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let sp = cpu.s.gpr[gpr::RSP];
        let target = attempt!(cpu, op, cpu.peek_at(sp, T::BYTES));
        attempt!(cpu, op, cpu.check_target(target));
        stack::drop_bytes::<T>(cpu, (T::BYTES as u64).wrapping_add((*op).imm));
        cpu.link = std::ptr::null_mut();
        cpu.s.rip = target;
    }
}

impl Cpu {
    /// #GP(0) for a branch target that is not canonical.
    #[inline(always)]
    fn check_target(&self, target: u64) -> Fallible<()> {
        if ((target << 16) as i64 >> 16) as u64 == target {
            return Ok(());
        }
        self.check_canonical(target).map_err(|_| Exception::GP0)
    }

    /// Goes to `target` in the same code segment, with operand size `bytes` (any mode).
    fn jump_near(&mut self, target: u64, bytes: usize) -> Fallible<()> {
        let target = match bytes {
            2 => target & 0xffff,
            4 => target & 0xffff_ffff,
            _ => target,
        };
        if self.mode & 3 == 2 {
            self.check_target(target)?;
        } else if target > u64::from(self.s.seg[seg::CS].limit) {
            return Err(Exception::GP0);
        }
        self.s.rip = target;
        Ok(())
    }
}

/// Operand size in bytes, as the decoder leaves it in `a` of the handlers below.
fn size(op: &Op) -> usize {
    usize::from(op.a)
}

fn target(cpu: &Cpu, op: &Op) -> u64 {
    cpu.s.block_rip.wrapping_add(op.imm)
}

/// JMP, any mode.
pub(crate) fn any_jmp(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.jump_near(target(cpu, op), size(op))
}

/// Jcc, any mode; the condition in `b`.
pub(crate) fn any_jcc(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if condition_dyn(op.b, cpu.s.cc) {
        return cpu.jump_near(target(cpu, op), size(op));
    }
    Ok(())
}

/// CALL, any mode.
pub(crate) fn any_call(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let back = cpu.s.rip;
    let to = target(cpu, op);
    near_call(cpu, to, back, size(op))
}

fn near_call(cpu: &mut Cpu, to: u64, back: u64, bytes: usize) -> Fallible<()> {
    let sp = cpu.push_at(cpu.s.gpr[gpr::RSP], back, bytes)?;
    cpu.jump_near(to, bytes)?;
    cpu.set_sp(sp);
    Ok(())
}

/// CALL through a register (`b`), any mode.
pub(crate) fn any_call_r(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let (to, back) = (cpu.reg64(op.b), cpu.s.rip);
    near_call(cpu, to, back, size(op))
}

/// Reads a word of `bytes` at the operand.
fn load_sized(cpu: &mut Cpu, op: &Op, bytes: usize) -> Fallible<u64> {
    let addr = cpu.operand(op, bytes, false)?;
    Ok(match bytes {
        2 => cpu.read::<u16>(addr)?.wide(),
        4 => cpu.read::<u32>(addr)?.wide(),
        _ => cpu.read::<u64>(addr)?,
    })
}

/// CALL through memory, any mode.
pub(crate) fn any_call_m(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let back = cpu.s.rip;
    let to = load_sized(cpu, op, size(op))?;
    near_call(cpu, to, back, size(op))
}

/// JMP through a register (`b`), any mode.
pub(crate) fn any_jmp_r(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.jump_near(cpu.reg64(op.b), size(op))
}

/// JMP through memory, any mode.
pub(crate) fn any_jmp_m(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let to = load_sized(cpu, op, size(op))?;
    cpu.jump_near(to, size(op))
}

/// RET, any mode.
pub(crate) fn any_ret(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let sp = cpu.s.gpr[gpr::RSP];
    let to = cpu.peek_at(sp, size(op))?;
    cpu.jump_near(to, size(op))?;
    cpu.set_sp(sp.wrapping_add(size(op) as u64).wrapping_add(op.imm));
    Ok(())
}

/// The count register's mask: by address size in `b` (2, 4, 8).
fn count_mask(op: &Op) -> u64 {
    match op.b {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// LOOP, LOOPE, LOOPNE (kind in `ea`: 0, 1, 2).
pub(crate) fn any_loop(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let mask = count_mask(op);
    let rcx = cpu.s.gpr[gpr::RCX];
    let count = rcx.wrapping_sub(1) & mask;
    let zf = cpu.s.cc & 0x4000 != 0;
    let go = count != 0
        && match op.ea {
            0 => true,
            1 => zf,
            _ => !zf,
        };
    if go {
        cpu.jump_near(target(cpu, op), size(op))?;
    }
    cpu.s.gpr[gpr::RCX] = match op.b {
        2 => rcx & !0xffff | count,
        _ => count,
    };
    Ok(())
}

/// JCXZ, JECXZ, JRCXZ.
pub(crate) fn any_jcxz(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if cpu.s.gpr[gpr::RCX] & count_mask(op) == 0 {
        return cpu.jump_near(target(cpu, op), size(op));
    }
    Ok(())
}
