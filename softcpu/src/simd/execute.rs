//! Running thunks: the checks before, memory around, exceptions after.

use super::cache;
use super::key::Key;
use super::runtime::unmasked;
use super::thunk::{Desc, Entry, Unit};
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::op::Op;
use crate::state::{cr0, cr4, rflags};

/// MXCSR: all exception masks.
pub(super) const MASKS: u32 = 0x1f80;
/// MXCSR: all exception flags.
pub(super) const FLAGS: u32 = 0x3f;
/// Exceptions found before the operation: invalid, denormal, divide by zero.
const EARLY: u32 = 7;
/// Underflow.
const UNDERFLOW: u32 = 0x10;
/// MXCSR: flush to zero.
const FTZ: u32 = 0x8000;

/// The instruction that `op` stands for, with all checks.
pub(super) fn kept(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    // SAFETY: `decode_fp` put the address of a leaked Desc there.
    let desc = unsafe { &*(op.imm as usize as *const Desc) };
    run(cpu, op, desc)
}

/// An instruction there was no room for.
pub(super) fn scratch(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cache::with_scratch(Key(op.imm), |desc| run(cpu, op, desc)).unwrap_or(Err(Exception::UD))
}

/// #UD or #NM unless legacy SSE instructions may run now (Intel SDM vol. 3, 13.1).
#[inline]
pub(super) fn check_sse(cpu: &Cpu) -> Fallible<()> {
    if cpu.s.cr0 & (cr0::EM | cr0::TS) == 0 && cpu.s.cr4 & cr4::OSFXSR != 0 {
        return Ok(());
    }
    if cpu.s.cr0 & cr0::EM != 0 || cpu.s.cr4 & cr4::OSFXSR == 0 {
        return Err(Exception::UD);
    }
    Err(Exception::NM)
}

/// #UD or #NM unless VEX-encoded instructions may run now.
#[inline]
pub(super) fn check_avx(cpu: &Cpu) -> Fallible<()> {
    if cpu.s.cr4 & cr4::OSXSAVE == 0 || cpu.s.xcr0 & 6 != 6 || !cpu.s.protected() {
        return Err(Exception::UD);
    }
    if cpu.s.cr0 & cr0::TS != 0 {
        return Err(Exception::NM);
    }
    Ok(())
}

/// #NM unless x87 instructions may run now.
#[inline]
pub(super) fn check_x87(cpu: &Cpu) -> Fallible<()> {
    if cpu.s.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(Exception::NM);
    }
    Ok(())
}

/// #MF if an unmasked x87 exception waits. (Also with CR0.NE clear: there is no FERR# line and
/// no interrupt 13.)
#[inline]
pub(super) fn check_pending(cpu: &Cpu) -> Fallible<()> {
    if cpu.fp_runtime.pending(&cpu.s.fp) {
        return Err(Exception::MF);
    }
    Ok(())
}

fn check(cpu: &Cpu, desc: &Desc) -> Fallible<()> {
    match desc.unit {
        Unit::Integer => Ok(()),
        Unit::Sse => check_sse(cpu),
        Unit::Avx => check_avx(cpu),
        Unit::X87 => {
            check_x87(cpu)?;
            if desc.no_wait {
                return Ok(());
            }
            check_pending(cpu)
        }
        Unit::Mmx => {
            if cpu.s.cr0 & cr0::EM != 0 || desc.mixed && cpu.s.cr4 & cr4::OSFXSR == 0 {
                return Err(Exception::UD);
            }
            if cpu.s.cr0 & cr0::TS != 0 {
                return Err(Exception::NM);
            }
            check_pending(cpu)
        }
    }
}

/// Calls the thunk; whether it stopped at an unmasked SIMD exception.
#[inline(always)]
pub(super) fn call(cpu: &mut Cpu, op: &Op, desc: &Desc, mem: *mut u8) -> bool {
    enter(cpu, op, desc.entry, mem)
}

/// Calls the thunk's quick form, for a guest whose MXCSR is `MASKS` but for flags.
#[inline(always)]
pub(super) fn call_quick(cpu: &mut Cpu, op: &Op, desc: &Desc, mem: *mut u8) {
    cpu.fp_runtime.gather();
    enter(cpu, op, desc.quick, mem);
}

#[inline(always)]
fn enter(cpu: &mut Cpu, op: &Op, entry: Entry, mem: *mut u8) -> bool {
    // SAFETY: the thunk reads and writes `mem` for the operand's length (the caller sees to
    // it), vector registers in `fp`, `cc` around it, fields of `runtime`, and the general register at op.a,
    // which the decoder set to 8 times a register number, or 0 where it uses the first three.
    unsafe {
        let gpr = cpu.s.gpr.as_mut_ptr().byte_add(usize::from(op.a));
        entry(&raw mut cpu.s.fp, mem, 0, 0, gpr, &raw mut cpu.fp_runtime) != 0
    }
}

fn run(cpu: &mut Cpu, op: &Op, desc: &Desc) -> Fallible<()> {
    check(cpu, desc)?;
    if desc.len == 0 {
        return perform(cpu, op, desc, std::ptr::null_mut()).map(|_| ());
    }
    let len = usize::from(desc.len);
    let addr = cpu.operand(op, len, desc.writes)?;
    if addr & u64::from(desc.align) != 0 {
        return Err(Exception::GP0);
    }
    if !(desc.writes && desc.two_stage)
        && let Some(mem) = cpu.host_ptr(addr, len, desc.writes)
    {
        perform(cpu, op, desc, mem)?;
    } else if desc.writes {
        cpu.check_write(addr, len)?;
        let mem = cpu.fp_runtime.bounce.0.as_mut_ptr();
        if perform(cpu, op, desc, mem)? {
            let data = cpu.fp_runtime.bounce.0;
            cpu.write_bytes(addr, &data[..len])?;
        }
    } else {
        let mut data = [0; 64];
        cpu.read_bytes(addr, &mut data[..len])?;
        cpu.fp_runtime.bounce.0[..len].copy_from_slice(&data[..len]);
        let mem = cpu.fp_runtime.bounce.0.as_mut_ptr();
        perform(cpu, op, desc, mem)?;
    }
    if desc.unit == Unit::X87 && !desc.control {
        let offset = addr.wrapping_sub(cpu.s.ea_base[op.seg()]);
        set_data_pointer(cpu, op, offset);
    }
    Ok(())
}

/// Executes the instruction, now that its operand is at `mem`. `false`: an unmasked x87
/// exception kept it from writing there.
fn perform(cpu: &mut Cpu, op: &Op, desc: &Desc, mem: *mut u8) -> Fallible<bool> {
    if desc.flags {
        cpu.fp_runtime.flags = cpu.s.rflags() & rflags::STATUS | 2;
    }
    let mut written = true;
    match desc.unit {
        Unit::X87 => {
            cpu.fp_runtime.enter(&cpu.s.fp);
            call(cpu, op, desc, mem);
            if cpu.fp_runtime.fsw & 0x80 != 0 {
                cpu.sync_fp();
                // All but the precision exception keep a store from happening.
                written = desc.no_wait || unmasked(&cpu.s.fp) & 0x1f == 0;
            }
            if !desc.control {
                let rip = cpu.s.rip.wrapping_sub(u64::from(op.len));
                set_instruction_pointer(cpu, rip, desc);
            } else if desc.initialises {
                cpu.s.fp.legacy[6..24].fill(0);
            }
        }
        _ if desc.mxcsr => simd(cpu, op, desc, mem)?,
        Unit::Mmx => {
            cpu.fp_runtime.enter(&cpu.s.fp);
            call(cpu, op, desc, mem);
        }
        _ => {
            call(cpu, op, desc, mem);
        }
    }
    if desc.flags {
        cpu.s.set_status(cpu.fp_runtime.flags);
    }
    Ok(written)
}

/// MXCSR to run an instruction with: all exceptions masked, no flags, and no bits that don't
/// exist, whatever a restored state brought.
#[inline(always)]
pub(super) fn control(mxcsr: u32) -> u32 {
    (mxcsr | MASKS) & 0xffff & !FLAGS
}

/// Executes an instruction that depends on MXCSR.
fn simd(cpu: &mut Cpu, op: &Op, desc: &Desc, mem: *mut u8) -> Fallible<()> {
    cpu.sync_mxcsr();
    let mxcsr = cpu.s.fp.mxcsr();
    let unmasked = !(mxcsr >> 7) & FLAGS;
    let mmx = desc.unit == Unit::Mmx;
    if mmx && unmasked != 0 {
        // The thunk can't take back what was written to an MMX register.
        cpu.sync_fp();
    }
    let before = (mmx && unmasked != 0).then_some(cpu.s.fp.legacy);
    if mmx {
        cpu.fp_runtime.enter(&cpu.s.fp);
    }
    let runtime = &mut cpu.fp_runtime;
    runtime.run_mxcsr = control(mxcsr);
    runtime.unmasked = unmasked;
    if unmasked & UNDERFLOW != 0 {
        // Unmasked, also an exact tiny result is an underflow. Flushing to zero reports it,
        // and changes nothing if there is none.
        runtime.run_mxcsr |= FTZ;
    }
    if !call(cpu, op, desc, mem) {
        return Ok(());
    }
    let mut raised = cpu.fp_runtime.out_mxcsr & FLAGS;
    if raised & unmasked & EARLY != 0 {
        raised &= EARLY;
    } else if raised & unmasked & UNDERFLOW != 0 {
        // Flushing always counts as inexact; look again without it, and undo what that stores
        // if nothing is inexact.
        let kept = cpu.s.fp;
        cpu.fp_runtime.run_mxcsr = control(mxcsr) & !FTZ;
        cpu.fp_runtime.unmasked = FLAGS;
        call(cpu, op, desc, mem);
        raised = cpu.fp_runtime.out_mxcsr & FLAGS | UNDERFLOW;
        cpu.s.fp = kept;
    }
    if let Some(before) = before {
        // The change to MMX remains, only the destination doesn't.
        cpu.sync_fp();
        cpu.s.fp.legacy = before;
        cpu.fp_runtime.become_mmx(&mut cpu.s.fp);
    }
    cpu.s.fp.set_mxcsr(mxcsr | raised);
    if cpu.s.cr4 & cr4::OSXMMEXCPT == 0 {
        return Err(Exception::UD);
    }
    Err(Exception::XM)
}

/// FOP, FIP and FCS of the instruction just run.
#[inline]
pub(super) fn set_instruction_pointer(cpu: &mut Cpu, rip: u64, desc: &Desc) {
    let wide = cpu.s.mode64();
    let fip = if wide {
        rip
    } else {
        rip & 0xffff_ffff | u64::from(cpu.s.seg[crate::state::seg::CS].selector) << 32
    };
    let legacy = &mut cpu.s.fp.legacy;
    legacy[6..8].copy_from_slice(&desc.fop.to_le_bytes());
    legacy[8..16].copy_from_slice(&fip.to_le_bytes());
}

/// FDP and FDS of the instruction just run.
#[inline]
pub(super) fn set_data_pointer(cpu: &mut Cpu, op: &Op, offset: u64) {
    let fdp = if cpu.s.mode64() {
        offset
    } else {
        offset & 0xffff_ffff | u64::from(cpu.s.seg[op.seg()].selector) << 32
    };
    cpu.s.fp.legacy[16..24].copy_from_slice(&fdp.to_le_bytes());
}
