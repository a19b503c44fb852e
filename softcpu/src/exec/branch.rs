//! Ends of blocks: branches, calls, returns, and falling through.

use super::{Ea, attempt, load};
use crate::alu::{condition, condition_dyn};
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::mmu::Word;
use crate::op::{Block, Op};
use crate::state::{gpr, seg};

/// Goes on at `op.imm` from the block's start; `way` is the block's link to use.
#[inline(always)]
unsafe fn direct(cpu: &mut Cpu, op: *const Op, way: usize) -> *const Block {
    // SAFETY: `current` is the running block.
    unsafe {
        cpu.s.rip = cpu.s.block_rip.wrapping_add((*op).imm);
        let link = &raw const (*cpu.current).next[way];
        cpu.link = link;
        (*link).get()
    }
}

/// Goes on at a computed address (64-bit mode).
#[inline(always)]
unsafe fn indirect(cpu: &mut Cpu, rip: u64) -> *const Block {
    cpu.s.rip = rip;
    cpu.link = std::ptr::null();
    std::ptr::null()
}

/// The block ends here, the next instruction starts another.
pub(crate) unsafe fn fall(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        cpu.s.rip = cpu.s.block_rip.wrapping_add((*op).imm) & cpu.rip_mask();
        let link = &raw const (*cpu.current).next[0];
        cpu.link = link;
        (*link).get()
    }
}

/// JMP, 64-bit mode.
pub(crate) unsafe fn jmp(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe { direct(cpu, op, 1) }
}

/// Jcc, 64-bit mode.
pub(crate) unsafe fn jcc<const C: u8>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        if condition::<C>(cpu.s.cc) {
            return direct(cpu, op, 1);
        }
        not_taken(cpu, op)
    }
}

/// Goes on after the instruction.
#[inline(always)]
pub(crate) unsafe fn not_taken(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: `current` is the running block.
    unsafe {
        cpu.s.rip = cpu
            .s
            .block_rip
            .wrapping_add(u64::from((*op).off) + u64::from((*op).len));
        let link = &raw const (*cpu.current).next[0];
        cpu.link = link;
        (*link).get()
    }
}

/// `direct`, for fused operations.
#[inline(always)]
pub(crate) unsafe fn taken(cpu: &mut Cpu, op: *const Op, target: u64) -> *const Block {
    // SAFETY: `current` is the running block.
    unsafe {
        let _ = op;
        cpu.s.rip = cpu.s.block_rip.wrapping_add(target);
        let link = &raw const (*cpu.current).next[1];
        cpu.link = link;
        (*link).get()
    }
}

/// CALL, 64-bit mode.
pub(crate) unsafe fn call(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let sp = cpu.s.gpr[gpr::RSP].wrapping_sub(8);
        let back = cpu
            .s
            .block_rip
            .wrapping_add(u64::from((*op).off) + u64::from((*op).len));
        attempt!(cpu, op, cpu.write::<u64>(sp, back));
        cpu.s.gpr[gpr::RSP] = sp;
        // The write may have changed the target's code, never the block's own links.
        direct(cpu, op, 1)
    }
}

#[inline(always)]
fn call_to(cpu: &mut Cpu, op: *const Op, target: u64) -> Fallible<()> {
    cpu.check_target(target)?;
    let sp = cpu.s.gpr[gpr::RSP].wrapping_sub(8);
    // SAFETY: handlers only pass the operation they were called with.
    let op = unsafe { &*op };
    let back = cpu
        .s
        .block_rip
        .wrapping_add(u64::from(op.off) + u64::from(op.len));
    cpu.write::<u64>(sp, back)?;
    cpu.s.gpr[gpr::RSP] = sp;
    Ok(())
}

/// CALL register, 64-bit mode.
pub(crate) unsafe fn call_r(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let target = cpu.reg::<u64>((*op).a);
        attempt!(cpu, op, call_to(cpu, op, target));
        indirect(cpu, target)
    }
}

/// CALL memory, 64-bit mode.
pub(crate) unsafe fn call_m<E: Ea>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let target = attempt!(cpu, op, load::<u64, E>(cpu, op));
        attempt!(cpu, op, call_to(cpu, op, target));
        indirect(cpu, target)
    }
}

/// JMP register, 64-bit mode.
pub(crate) unsafe fn jmp_r(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let target = cpu.reg::<u64>((*op).a);
        attempt!(cpu, op, cpu.check_target(target));
        indirect(cpu, target)
    }
}

/// JMP memory, 64-bit mode.
pub(crate) unsafe fn jmp_m<E: Ea>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let target = attempt!(cpu, op, load::<u64, E>(cpu, op));
        attempt!(cpu, op, cpu.check_target(target));
        indirect(cpu, target)
    }
}

/// RET, with `imm` more bytes to drop, 64-bit mode.
pub(crate) unsafe fn ret(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let sp = cpu.s.gpr[gpr::RSP];
        let target = attempt!(cpu, op, cpu.read::<u64>(sp));
        attempt!(cpu, op, cpu.check_target(target));
        cpu.s.gpr[gpr::RSP] = sp.wrapping_add(8).wrapping_add((*op).imm);
        indirect(cpu, target)
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

    /// The instruction pointer's size: by CS, outside 64-bit mode.
    pub(crate) fn rip_mask(&self) -> u64 {
        if self.mode & 3 == 2 {
            u64::MAX
        } else {
            0xffff_ffff
        }
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
