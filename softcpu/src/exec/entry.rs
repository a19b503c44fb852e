//! Ways into the kernel and back: INT, IRET, SYSCALL, SYSENTER.

use crate::cpu::Cpu;
use crate::debug::TrapRule;
use crate::exception::{Exception, Fallible};
use crate::interrupt::Source;
use crate::op::Op;
use crate::state;
use crate::state::gpr::{RCX, RDX, RSP};
use crate::state::{Segment, cr0, efer, rflags, seg};

/// IRET; size in `a`.
pub(crate) fn iret(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    super::system::drain_stores();
    cpu.iret(op.a.into())
}

/// INT n (vector in `imm`).
pub(crate) fn int(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.trap_rule = TrapRule::Never;
    cpu.deliver(op.imm as u8, None, Source::Software)
}

/// INT3, INT1 (vector in `imm`).
pub(crate) fn int_trap(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.trap_rule = TrapRule::Never;
    let source = if op.imm == 1 {
        Source::Exception
    } else {
        Source::Trap
    };
    cpu.deliver(op.imm as u8, None, source)
}

/// INTO.
pub(crate) fn into(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    if cpu.s.cc & 1 != 0 {
        cpu.trap_rule = TrapRule::Never;
        return cpu.deliver(4, None, Source::Trap);
    }
    Ok(())
}

fn flat(selector: u16, access: u32) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        access,
        selector,
    }
}

/// SYSCALL.
pub(crate) fn syscall(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    // Intel's processors know it in 64-bit mode only.
    if cpu.s.efer & efer::SCE == 0 || cpu.mode & 3 != 2 {
        return Err(Exception::UD);
    }
    let s = &mut cpu.s;
    s.gpr[RCX] = s.rip;
    s.gpr[state::gpr::RDI + 4] = s.rflags() & !rflags::RF;
    s.rip = s.msr.lstar;
    let flags = s.rflags() & !s.msr.sfmask & !rflags::RF | 2;
    s.set_status(flags);
    s.flags = flags & !rflags::STATUS;
    let selector = (s.msr.star >> 32) as u16 & !3;
    s.seg[seg::CS] = flat(selector, 0xa09b);
    s.seg[seg::SS] = flat(selector.wrapping_add(8), 0xc093);
    s.cpl = 0;
    cpu.update_mode();
    cpu.end_system_call();
    Ok(())
}

impl Cpu {
    /// SYSCALL and SYSRET are followed by a single-step trap if they leave RFLAGS.TF set.
    fn end_system_call(&mut self) {
        self.trap_rule = TrapRule::After;
        if self.s.flags & rflags::TF != 0 {
            self.note_step();
        }
    }
}

/// SYSRET; operand size in `a`.
pub(crate) fn sysret(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if cpu.s.efer & efer::SCE == 0 || cpu.mode & 3 != 2 {
        return Err(Exception::UD);
    }
    cpu.privileged()?;
    let selector = (cpu.s.msr.star >> 48) as u16;
    let (rip, cs) = if op.a == 8 {
        let rip = cpu.s.gpr[RCX];
        cpu.check_canonical(rip).map_err(|_| Exception::GP0)?;
        (rip, flat(selector.wrapping_add(16) | 3, 0xa0fb))
    } else {
        (cpu.s.gpr[RCX] & 0xffff_ffff, flat(selector | 3, 0xc0fb))
    };
    let s = &mut cpu.s;
    s.rip = rip;
    let flags = s.gpr[11] & 0x3c_7fd7 & !(rflags::RF | rflags::VM) | 2;
    s.set_status(flags);
    s.flags = flags & !rflags::STATUS;
    s.seg[seg::CS] = cs;
    s.seg[seg::SS] = flat(selector.wrapping_add(8) | 3, 0xc0f3);
    s.cpl = 3;
    cpu.update_mode();
    cpu.end_system_call();
    Ok(())
}

/// SYSENTER.
pub(crate) fn sysenter(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    let selector = cpu.s.msr.sysenter_cs as u16;
    if cpu.s.cr0 & cr0::PE == 0 || selector & !3 == 0 {
        return Err(Exception::GP0);
    }
    let long = cpu.s.long_mode();
    let s = &mut cpu.s;
    s.flags &= !(rflags::VM | rflags::IF | rflags::RF);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    s.gpr[RSP] = s.msr.sysenter_esp & mask;
    s.rip = s.msr.sysenter_eip & mask;
    s.seg[seg::CS] = flat(selector & !3, if long { 0xa09b } else { 0xc09b });
    s.seg[seg::SS] = flat((selector & !3).wrapping_add(8), 0xc093);
    s.cpl = 0;
    cpu.update_mode();
    Ok(())
}

/// SYSEXIT; operand size in `a`.
pub(crate) fn sysexit(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let selector = cpu.s.msr.sysenter_cs as u16 & !3;
    if cpu.s.cr0 & cr0::PE == 0 || selector == 0 {
        return Err(Exception::GP0);
    }
    cpu.privileged()?;
    let (rip, sp) = (cpu.s.gpr[RDX], cpu.s.gpr[RCX]);
    let (cs, ss);
    if op.a == 8 {
        cpu.check_canonical(rip).map_err(|_| Exception::GP0)?;
        cpu.check_canonical(sp).map_err(|_| Exception::GP0)?;
        cs = flat(selector.wrapping_add(32) | 3, 0xa0fb);
        ss = selector.wrapping_add(40) | 3;
        (cpu.s.rip, cpu.s.gpr[RSP]) = (rip, sp);
    } else {
        cs = flat(selector.wrapping_add(16) | 3, 0xc0fb);
        ss = selector.wrapping_add(24) | 3;
        (cpu.s.rip, cpu.s.gpr[RSP]) = (rip & 0xffff_ffff, sp & 0xffff_ffff);
    }
    cpu.s.seg[seg::CS] = cs;
    cpu.s.seg[seg::SS] = flat(ss, 0xc0f3);
    cpu.s.cpl = 3;
    cpu.update_mode();
    Ok(())
}
