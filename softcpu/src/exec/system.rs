//! Privileged instructions that have no file of their own: flags, MSRs, ports, halting.

use super::bits::{get, put};
use crate::attention::Attention;
use crate::cpu::Cpu;
use crate::cpuid;
use crate::exception::{Exception, Fallible};
use crate::msr_core;
use crate::op::Op;
use crate::state::gpr::{RAX, RBX, RCX, RDX, RSP};
use crate::state::{cr4, rflags, seg};

/// PAUSE instructions a vCPU runs before it lets other threads run.
const PAUSES_BEFORE_YIELD: u32 = 128;

impl Cpu {
    /// #GP(0) above privilege level 0.
    pub(crate) fn privileged(&self) -> Fallible<()> {
        if self.s.cpl == 0 {
            Ok(())
        } else {
            Err(Exception::GP0)
        }
    }

    /// May this code use these ports? (IOPL and the TSS's permission map)
    pub(crate) fn check_port(&mut self, port: u16, size: usize) -> Fallible<()> {
        if !self.s.protected() && !self.s.v8086() {
            return Ok(());
        }
        if !self.s.v8086() && self.s.cpl <= self.s.iopl() {
            return Ok(());
        }
        let tr = self.s.tr;
        if tr.kind() & 8 == 0 || tr.unusable() || tr.limit < 103 {
            return Err(Exception::GP0);
        }
        let map = self.system_read::<u16>(self.wrap_system(tr.base.wrapping_add(102)))?;
        let offset = u32::from(map) + u32::from(port / 8);
        if offset + 1 > tr.limit {
            return Err(Exception::GP0);
        }
        let addr = self.wrap_system(tr.base.wrapping_add(offset.into()));
        let bits = self.system_read::<u16>(addr)? >> (port % 8);
        if bits & ((1 << size) - 1) != 0 {
            return Err(Exception::GP0);
        }
        Ok(())
    }

    /// IN.
    pub(crate) fn port_in(&mut self, port: u16, size: usize) -> u64 {
        let mut data = [0xff; 8];
        self.note_port(port, size);
        if let Some(bus) = self.bus() {
            bus.port_read(port, &mut data[..size]);
        }
        u64::from_le_bytes(data) & (u64::MAX >> (64 - 8 * size))
    }

    /// OUT.
    pub(crate) fn port_out(&mut self, port: u16, value: u64, size: usize) {
        self.note_port(port, size);
        if let Some(bus) = self.bus() {
            let flow = bus.port_write(port, &value.to_le_bytes()[..size]);
            self.after_write(flow);
        }
    }

    /// Interrupts stay off until after the next instruction.
    pub(crate) fn set_shadow(&mut self, stack: bool) {
        self.s.shadow = true;
        self.s.shadow_ss = stack;
        self.s.shadow_rip = self.s.rip;
    }
}

/// CLI.
pub(crate) fn cli(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    if let Err(e) = cpu.check_iopl() {
        if !cpu.virtual_interrupts() {
            return Err(e);
        }
        cpu.s.flags &= !rflags::VIF;
        return Ok(());
    }
    cpu.s.flags &= !rflags::IF;
    cpu.update_attention_mask();
    Ok(())
}

/// STI.
pub(crate) fn sti(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    if let Err(e) = cpu.check_iopl() {
        if !cpu.virtual_interrupts() || cpu.s.flags & rflags::VIP != 0 {
            return Err(e);
        }
        cpu.s.flags |= rflags::VIF;
        return Ok(());
    }
    if cpu.s.flags & rflags::IF == 0 {
        cpu.s.flags |= rflags::IF;
        cpu.update_attention_mask();
        cpu.set_shadow(false);
    }
    Ok(())
}

impl Cpu {
    fn check_iopl(&self) -> Fallible<()> {
        let checked = self.s.protected() || self.s.v8086();
        if checked && self.s.cpl > self.s.iopl() {
            return Err(Exception::GP0);
        }
        Ok(())
    }
}

/// HLT.
pub(crate) fn hlt(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.privileged()?;
    cpu.s.halted = true;
    cpu.dead_halt_reported = false;
    cpu.attention.raise(Attention::SELF);
    Ok(())
}

/// PUSHF; size in `a`.
pub(crate) fn pushf(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let mut value = cpu.s.rflags();
    if cpu.s.v8086() && cpu.s.iopl() < 3 {
        if cpu.s.cr4 & cr4::VME == 0 || op.a != 2 {
            return Err(Exception::GP0);
        }
        value = cpu.virtual_flags();
    }
    cpu.push(value & !(rflags::RF | rflags::VM), op.a.into())
}

/// POPF; size in `a`.
pub(crate) fn popf(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if cpu.s.v8086() && cpu.s.iopl() < 3 {
        if cpu.s.cr4 & cr4::VME == 0 || op.a != 2 {
            return Err(Exception::GP0);
        }
        let sp = cpu.s.gpr[RSP];
        let value = cpu.peek_at(sp, 2)?;
        cpu.check_virtual_flags(value)?;
        cpu.set_sp(sp.wrapping_add(2));
        cpu.load_virtual_flags(value);
        return Ok(());
    }
    let value = cpu.pop(op.a.into())?;
    let mut keep = rflags::RF | rflags::VM | rflags::VIF | rflags::VIP;
    if cpu.s.protected() || cpu.s.v8086() {
        if cpu.s.cpl != 0 {
            keep |= rflags::IOPL;
        }
        if cpu.s.cpl > cpu.s.iopl() {
            keep |= rflags::IF;
        }
    }
    let old = cpu.s.flags;
    cpu.load_flags(value, op.a.into(), keep);
    cpu.s.flags &= !rflags::RF;
    if (old ^ cpu.s.flags) & rflags::AC != 0 {
        cpu.update_mode();
    }
    Ok(())
}

/// SWAPGS.
pub(crate) fn swapgs(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    if cpu.mode & 3 != 2 {
        return Err(Exception::UD);
    }
    cpu.privileged()?;
    let s = &mut cpu.s;
    std::mem::swap(&mut s.seg[seg::GS].base, &mut s.msr.kernel_gs_base);
    s.ea_base[seg::GS] = s.seg[seg::GS].base;
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE; register in `a`, size in `b`, `imm`: segment,
/// bit 8 write.
pub(crate) fn fsgsbase(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if cpu.mode & 3 != 2 || cpu.s.cr4 & cr4::FSGSBASE == 0 {
        return Err(Exception::UD);
    }
    let index = op.imm as u8 as usize;
    let size = usize::from(op.b);
    if op.imm & 0x100 == 0 {
        let base = cpu.s.seg[index].base;
        put(cpu, op.a, base, size);
    } else {
        let base = get(cpu, op.a, size);
        cpu.check_canonical(base).map_err(|_| Exception::GP0)?;
        cpu.s.seg[index].base = base;
        cpu.s.ea_base[index] = base;
    }
    Ok(())
}

/// RDMSR.
pub(crate) fn rdmsr(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let value = msr_core::read(cpu, cpu.s.gpr[RCX] as u32)?;
    cpu.s.gpr[RAX] = value & 0xffff_ffff;
    cpu.s.gpr[RDX] = value >> 32;
    Ok(())
}

/// WRMSR.
pub(crate) fn wrmsr(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let value = cpu.s.gpr[RAX] & 0xffff_ffff | cpu.s.gpr[RDX] << 32;
    msr_core::write(cpu, cpu.s.gpr[RCX] as u32, value)?;
    cpu.deadline = cpu.apic.deadline();
    Ok(())
}

/// CPUID.
pub(crate) fn cpuid(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    drain_stores();
    let regs = cpuid::query(cpu, cpu.s.gpr[RAX] as u32, cpu.s.gpr[RCX] as u32);
    for (index, value) in [RAX, RBX, RCX, RDX].into_iter().zip(regs) {
        cpu.s.gpr[index] = value.into();
    }
    Ok(())
}

/// RDTSC; `imm` 1: RDTSCP.
pub(crate) fn rdtsc(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if cpu.s.cr4 & cr4::TSD != 0 && cpu.s.cpl != 0 {
        return Err(Exception::GP0);
    }
    // Guests order the counter with LFENCE and RDTSCP: the host must not read it before the
    // guest's earlier loads are done either.
    // SAFETY: LFENCE is part of SSE2, which every x86-64 processor has.
    unsafe { std::arch::x86_64::_mm_lfence() };
    let value = cpu.tsc();
    cpu.s.gpr[RAX] = value & 0xffff_ffff;
    cpu.s.gpr[RDX] = value >> 32;
    if op.imm != 0 {
        cpu.s.gpr[RCX] = cpu.s.msr.tsc_aux & 0xffff_ffff;
    }
    Ok(())
}

/// RDPID; register in `a`.
pub(crate) fn rdpid(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let value = cpu.s.msr.tsc_aux;
    put(cpu, op.a, value, if cpu.mode & 3 == 2 { 8 } else { 4 });
    Ok(())
}

/// RDPMC: there are no counters.
pub(crate) fn rdpmc(_: &mut Cpu, _: &Op) -> Fallible<()> {
    Err(Exception::GP0)
}

/// WBINVD, INVD: caches are coherent.
pub(crate) fn wbinvd(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.privileged()
}

/// IN; size `b`, port in `imm` or DX (bit 16).
pub(crate) fn port_in(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let port = if op.imm & 0x1_0000 != 0 {
        cpu.s.gpr[RDX] as u16
    } else {
        op.imm as u16
    };
    let size = usize::from(op.b);
    cpu.check_port(port, size)?;
    let value = cpu.port_in(port, size);
    put(cpu, 0, value, size);
    Ok(())
}

/// OUT; as `port_in`.
pub(crate) fn port_out(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let port = if op.imm & 0x1_0000 != 0 {
        cpu.s.gpr[RDX] as u16
    } else {
        op.imm as u16
    };
    let size = usize::from(op.b);
    cpu.check_port(port, size)?;
    let value = get(cpu, 0, size);
    cpu.port_out(port, value, size);
    Ok(())
}

/// STAC, CLAC; `imm`: 1, 0.
pub(crate) fn set_ac(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if cpu.s.cpl != 0 {
        return Err(Exception::UD);
    }
    if op.imm != 0 {
        cpu.s.flags |= rflags::AC;
    } else {
        cpu.s.flags &= !rflags::AC;
    }
    cpu.data_mode = usize::from(cpu.s.cr4 & cr4::SMAP != 0 && op.imm == 0);
    cpu.select_tlb();
    Ok(())
}

/// RDRAND, RDSEED (`imm` 0, 1): the host's own; register `a`, size `b`.
pub(crate) fn random(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let mut bytes = [0u8; 8];
    // SAFETY: fills a local buffer. The kernel's generator never blocks after boot, and
    // GRND_NONBLOCK makes sure.
    let got =
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    let ok = got == bytes.len() as isize;
    let value = if ok { u64::from_le_bytes(bytes) } else { 0 };
    put(cpu, op.a, value, op.b.into());
    cpu.s.cc = 0x200 | u64::from(ok) << 8;
    Ok(())
}

/// MONITOR: checks only.
pub(crate) fn monitor(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.privileged()?;
    if cpu.s.gpr[RCX] as u32 != 0 {
        return Err(Exception::GP0);
    }
    let addr = cpu.wrap_linear(cpu.s.gpr[RAX].wrapping_add(cpu.s.ea_base[seg::DS]));
    cpu.read::<u8>(addr)?;
    Ok(())
}

/// MWAIT: waking at once is allowed.
pub(crate) fn mwait(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.privileged()?;
    if cpu.s.gpr[RCX] as u32 & !1 != 0 {
        return Err(Exception::GP0);
    }
    Ok(())
}

/// SERIALIZE.
pub(crate) fn serialize(_: &mut Cpu, _: &Op) -> Fallible<()> {
    drain_stores();
    Ok(())
}

/// SFENCE: the guest's non-temporal stores are the host's.
pub(crate) fn sfence(_: &mut Cpu, _: &Op) -> Fallible<()> {
    // SAFETY: SSE exists on every x86-64 CPU.
    unsafe { std::arch::x86_64::_mm_sfence() };
    Ok(())
}

/// What serializing instructions do too (Intel SDM vol. 3, 9.3): all stores, which are the
/// host's and may wait in its store buffer, are visible before what follows.
pub(crate) fn drain_stores() {
    // SAFETY: SSE2 exists on every x86-64 CPU.
    unsafe { std::arch::x86_64::_mm_mfence() };
}

/// PAUSE. Who spins for long may be waiting for a vCPU whose thread has no host CPU.
pub(crate) fn pause(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(PAUSES_BEFORE_YIELD) {
        std::thread::yield_now();
    }
    Ok(())
}

/// VMCALL, VMMCALL.
pub(crate) fn hypercall(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    crate::paravirt::hypercall(cpu)
}
