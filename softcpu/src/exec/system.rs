//! Privileged and system instructions.

use super::bits::{get, put};
use crate::attention::Attention;
use crate::cpu::Cpu;
use crate::cpuid;
use crate::exception::{Exception, Fallible};
use crate::interrupt::Source;
use crate::op::Op;
use crate::state::gpr::{RAX, RBX, RCX, RDX, RSP};
use crate::state::{Segment, cr0, cr4, efer, rflags, seg};
use crate::{msr_core, state};

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
        if let Some(bus) = self.bus() {
            bus.port_read(port, &mut data[..size]);
        }
        u64::from_le_bytes(data) & (u64::MAX >> (64 - 8 * size))
    }

    /// OUT.
    pub(crate) fn port_out(&mut self, port: u16, value: u64, size: usize) {
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

    /// MOV to CR3 and the like: also loads PAE's pointers.
    pub(crate) fn write_cr3(&mut self, value: u64) -> Fallible<()> {
        if self.paging() && self.s.cr4 & cr4::PAE != 0 && !self.s.long_mode() {
            self.load_pdptes(value)?;
        }
        self.s.cr3 = value;
        self.flush_tlb_local();
        Ok(())
    }

    fn load_pdptes(&mut self, cr3: u64) -> Fallible<()> {
        let reserved = !self.tlbs.phys_mask | 0x1e6;
        let mut loaded = [0; 4];
        for (i, entry) in loaded.iter_mut().enumerate() {
            let mut bytes = [0; 8];
            self.phys_read((cr3 & 0xffff_ffe0) + 8 * i as u64, &mut bytes);
            *entry = u64::from_le_bytes(bytes);
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Err(Exception::GP0);
            }
        }
        self.s.pdpte = loaded;
        Ok(())
    }

    fn write_cr0(&mut self, value: u64) -> Fallible<()> {
        let old = self.s.cr0;
        if value >> 32 != 0 {
            return Err(Exception::GP0);
        }
        let known = cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::NE | cr0::WP | cr0::AM;
        let new = value & (known | cr0::NW | cr0::CD | cr0::PG) | cr0::ET;
        if new & cr0::PG != 0 && new & cr0::PE == 0 || new & cr0::NW != 0 && new & cr0::CD == 0 {
            return Err(Exception::GP0);
        }
        if (old ^ new) & cr0::PG != 0 {
            if new & cr0::PG != 0 && self.s.efer & efer::LME != 0 {
                if self.s.cr4 & cr4::PAE == 0 || self.s.seg[seg::CS].long() {
                    return Err(Exception::GP0);
                }
                self.s.efer |= efer::LMA;
            } else if new & cr0::PG != 0 && self.s.cr4 & cr4::PAE != 0 {
                self.load_pdptes(self.s.cr3)?;
            } else if new & cr0::PG == 0 && self.s.long_mode() {
                if self.mode & 3 == 2 {
                    return Err(Exception::GP0);
                }
                self.s.efer &= !efer::LMA;
            }
        }
        self.s.cr0 = new;
        if (old ^ new) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.flush_tlb_all();
        }
        self.update_mode();
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Fallible<()> {
        let f = &self.features;
        let mut known = cr4::VME | cr4::PVI | cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE;
        known |= cr4::MCE | cr4::PGE | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        for (has, bit) in [
            (f.fsgsbase(), cr4::FSGSBASE),
            (f.smep(), cr4::SMEP),
            (f.smap(), cr4::SMAP),
            (f.umip(), cr4::UMIP),
            (f.la57(), cr4::LA57),
            (f.xsave(), cr4::OSXSAVE),
            (f.pcid(), cr4::PCIDE),
        ] {
            if has {
                known |= bit;
            }
        }
        let old = self.s.cr4;
        if value & !known != 0 {
            return Err(Exception::GP0);
        }
        let changed = old ^ value;
        if self.s.long_mode() && (value & cr4::PAE == 0 || changed & cr4::LA57 != 0) {
            return Err(Exception::GP0);
        }
        if changed & value & cr4::PCIDE != 0 && (!self.s.long_mode() || self.s.cr3 & 0xfff != 0) {
            return Err(Exception::GP0);
        }
        let paging = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::PCIDE;
        if self.paging() && !self.s.long_mode() && changed & paging != 0 && value & cr4::PAE != 0 {
            self.load_pdptes(self.s.cr3)?;
        }
        self.s.cr4 = value;
        if changed & (paging | cr4::LA57) != 0 {
            self.flush_tlb_all();
        }
        self.update_mode();
        Ok(())
    }
}

/// CLI.
pub(crate) fn cli(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.check_iopl()?;
    cpu.s.flags &= !rflags::IF;
    cpu.update_attention_mask();
    Ok(())
}

/// STI.
pub(crate) fn sti(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.check_iopl()?;
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
    if cpu.s.v8086() && cpu.s.iopl() < 3 {
        return Err(Exception::GP0);
    }
    let value = cpu.s.rflags() & !(rflags::RF | rflags::VM);
    cpu.push(value, op.a.into())
}

/// POPF; size in `a`.
pub(crate) fn popf(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if cpu.s.v8086() && cpu.s.iopl() < 3 {
        return Err(Exception::GP0);
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

/// IRET; size in `a`.
pub(crate) fn iret(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.iret(op.a.into())
}

/// INT n (vector in `imm`).
pub(crate) fn int(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.deliver(op.imm as u8, None, Source::Software)
}

/// INT3, INT1 (vector in `imm`).
pub(crate) fn int_trap(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
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
    s.seg[seg::SS] = flat(selector + 8, 0xc093);
    s.cpl = 0;
    cpu.update_mode();
    Ok(())
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
    if s.flags & rflags::TF != 0 {
        cpu.attention.raise(Attention::SELF);
    }
    cpu.update_mode();
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
    s.seg[seg::SS] = flat((selector & !3) + 8, 0xc093);
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
        cs = flat((selector + 32) | 3, 0xa0fb);
        ss = (selector + 40) | 3;
        (cpu.s.rip, cpu.s.gpr[RSP]) = (rip, sp);
    } else {
        cs = flat((selector + 16) | 3, 0xc0fb);
        ss = (selector + 24) | 3;
        (cpu.s.rip, cpu.s.gpr[RSP]) = (rip & 0xffff_ffff, sp & 0xffff_ffff);
    }
    cpu.s.seg[seg::CS] = cs;
    cpu.s.seg[seg::SS] = flat(ss, 0xc0f3);
    cpu.s.cpl = 3;
    cpu.update_mode();
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

/// MOV from CRn; register `a`, number in `imm`, size `b`.
pub(crate) fn mov_from_cr(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let value = match op.imm {
        0 => cpu.s.cr0,
        2 => cpu.s.cr2,
        3 => cpu.s.cr3,
        4 => cpu.s.cr4,
        8 => cpu.apic.cr8(),
        _ => return Err(Exception::UD),
    };
    put(cpu, op.a, value, op.b.into());
    Ok(())
}

/// MOV to CRn; as `mov_from_cr`.
pub(crate) fn mov_to_cr(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let value = get(cpu, op.a, op.b.into());
    match op.imm {
        0 => cpu.write_cr0(value),
        2 => {
            cpu.s.cr2 = value;
            Ok(())
        }
        3 => {
            let mut value = value;
            if cpu.s.long_mode() {
                if cpu.s.cr4 & cr4::PCIDE != 0 {
                    value &= !(1 << 63);
                }
                if value & !cpu.tlbs.phys_mask != 0 {
                    return Err(Exception::GP0);
                }
            }
            cpu.write_cr3(value)
        }
        4 => cpu.write_cr4(value),
        8 => {
            if value >> 4 != 0 {
                return Err(Exception::GP0);
            }
            cpu.apic.set_cr8(value);
            Ok(())
        }
        _ => Err(Exception::UD),
    }
}

/// MOV from DRn; as `mov_from_cr`.
pub(crate) fn mov_from_dr(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let number = cpu.debug_register(op.imm)?;
    let value = match number {
        6 => cpu.s.dr6,
        7 => cpu.s.dr7,
        n => cpu.s.dr[n & 3],
    };
    put(cpu, op.a, value, op.b.into());
    Ok(())
}

/// MOV to DRn; as `mov_from_cr`.
pub(crate) fn mov_to_dr(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let number = cpu.debug_register(op.imm)?;
    let value = get(cpu, op.a, op.b.into());
    match number {
        6 | 7 => {
            if value >> 32 != 0 {
                return Err(Exception::GP0);
            }
            if number == 6 {
                cpu.s.dr6 = value & 0xe00f | 0xffff_0ff0;
            } else {
                cpu.s.dr7 = value & 0xffff_2bff | 0x400;
                cpu.attention.raise(Attention::SELF);
            }
        }
        n => cpu.s.dr[n & 3] = value,
    }
    Ok(())
}

impl Cpu {
    fn debug_register(&mut self, number: u64) -> Fallible<usize> {
        let number = match number {
            4 | 5 if self.s.cr4 & cr4::DE != 0 => return Err(Exception::UD),
            4 | 5 => number + 2,
            0..=7 => number,
            _ => return Err(Exception::UD),
        };
        if self.s.dr7 & 1 << 13 != 0 {
            self.s.dr7 &= !(1 << 13);
            self.s.dr6 |= 1 << 13;
            return Err(Exception::DB);
        }
        Ok(number as usize)
    }
}

/// LGDT, LIDT; `imm`: 0, 1; operand size in `a`.
pub(crate) fn load_table(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let wide = cpu.mode & 3 == 2;
    let mut bytes = [0; 10];
    let len = if wide { 10 } else { 6 };
    let addr = cpu.operand(op, len, false)?;
    cpu.read_bytes(addr, &mut bytes[..len])?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut raw = [0; 8];
    raw[..len - 2].copy_from_slice(&bytes[2..len]);
    let mut base = u64::from_le_bytes(raw);
    if wide {
        cpu.check_canonical(base).map_err(|_| Exception::GP0)?;
    } else if op.a == 2 {
        base &= 0xff_ffff;
    }
    let table = state::Table { base, limit };
    if op.imm == 0 {
        cpu.s.gdtr = table;
    } else {
        cpu.s.idtr = table;
    }
    Ok(())
}

/// SGDT, SIDT; as `load_table`.
pub(crate) fn store_table(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.check_umip()?;
    let table = if op.imm == 0 { cpu.s.gdtr } else { cpu.s.idtr };
    let len = if cpu.mode & 3 == 2 { 10 } else { 6 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let addr = cpu.operand(op, len, true)?;
    cpu.write_bytes(addr, &bytes[..len])
}

impl Cpu {
    fn check_umip(&self) -> Fallible<()> {
        if self.s.cr4 & cr4::UMIP != 0 && self.s.cpl > 0 {
            return Err(Exception::GP0);
        }
        Ok(())
    }

    /// Writes a 16-bit system value to register `a` with size `b`, or to memory if `a` is
    /// `Op::NO_REG`.
    fn put_word(&mut self, op: &Op, value: u64) -> Fallible<()> {
        if op.a == Op::NO_REG {
            let addr = self.operand(op, 2, true)?;
            return self.write::<u16>(addr, value as u16);
        }
        put(self, op.a, value, op.b.into());
        Ok(())
    }

    /// Reads a 16-bit value from register `a`, or from memory.
    fn take_word(&mut self, op: &Op) -> Fallible<u16> {
        if op.a == Op::NO_REG {
            let addr = self.operand(op, 2, false)?;
            return self.read::<u16>(addr);
        }
        Ok(self.reg::<u16>(op.a))
    }
}

/// SLDT, STR, SMSW; `imm`: 0, 1, 2.
pub(crate) fn store_word(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if op.imm != 2 && !cpu.s.protected() {
        return Err(Exception::UD);
    }
    cpu.check_umip()?;
    let value = match op.imm {
        0 => cpu.s.ldtr.selector.into(),
        1 => cpu.s.tr.selector.into(),
        _ => cpu.s.cr0,
    };
    cpu.put_word(op, value)
}

/// LLDT, LTR; `imm`: 0, 1.
pub(crate) fn load_system(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if !cpu.s.protected() {
        return Err(Exception::UD);
    }
    cpu.privileged()?;
    let selector = cpu.take_word(op)?;
    if op.imm == 0 {
        cpu.load_ldt(selector)
    } else {
        cpu.load_tr(selector)
    }
}

/// LMSW.
pub(crate) fn lmsw(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let value = u64::from(cpu.take_word(op)?);
    // PE can be set this way, not cleared.
    cpu.write_cr0(cpu.s.cr0 & !0xe | value & 0xf)
}

/// CLTS.
pub(crate) fn clts(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    cpu.privileged()?;
    cpu.s.cr0 &= !cr0::TS;
    Ok(())
}

/// VERR, VERW; `imm`: 0, 1.
pub(crate) fn verify(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if !cpu.s.protected() {
        return Err(Exception::UD);
    }
    let selector = cpu.take_word(op)?;
    let ok = cpu.verify(selector, op.imm != 0)?;
    cpu.s.cc = cpu.s.cc & !0x4000 | u64::from(ok) << 14;
    Ok(())
}

/// LAR, LSL; destination in `imm` (bits 0..8), size in `b`, bit 8: LSL; source `a` or memory.
pub(crate) fn lar_lsl(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if !cpu.s.protected() {
        return Err(Exception::UD);
    }
    let selector = cpu.take_word(op)?;
    let result = if op.imm & 0x100 != 0 {
        cpu.segment_limit(selector)?
    } else {
        cpu.access_rights(selector)?
    };
    cpu.s.cc = cpu.s.cc & !0x4000 | u64::from(result.is_some()) << 14;
    if let Some(value) = result {
        put(cpu, op.imm as u8, value.into(), op.b.into());
    }
    Ok(())
}

/// ARPL; source register in `imm`.
pub(crate) fn arpl(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if !cpu.s.protected() {
        return Err(Exception::UD);
    }
    let source = cpu.reg::<u16>(op.imm as u8);
    let dest = cpu.take_word(op)?;
    let raise = dest & 3 < source & 3;
    if raise {
        cpu.put_word(op, u64::from(dest & !3 | source & 3))?;
    }
    cpu.s.cc = cpu.s.cc & !0x4000 | u64::from(raise) << 14;
    Ok(())
}

/// INVLPG.
pub(crate) fn invlpg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let offset = cpu
        .reg64(op.base)
        .wrapping_add(cpu.reg64(op.index) << op.scale())
        .wrapping_add(op.disp as u64);
    let base = cpu.s.ea_base[op.seg()];
    let addr = cpu.wrap_linear(base.wrapping_add(offset));
    cpu.flush_tlb_page(addr);
    Ok(())
}

/// INVPCID; type register in `a`.
pub(crate) fn invpcid(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let kind = if cpu.mode & 3 == 2 {
        cpu.reg::<u64>(op.a)
    } else {
        cpu.reg::<u32>(op.a).into()
    };
    let addr = cpu.operand(op, 16, false)?;
    let mut bytes = [0; 16];
    cpu.read_bytes(addr, &mut bytes)?;
    let (pcid, linear) = bytes.split_at(8);
    let pcid = u64::from_le_bytes(pcid.try_into().unwrap_or_default());
    let linear = u64::from_le_bytes(linear.try_into().unwrap_or_default());
    if kind > 3 || kind < 2 && pcid >> 12 != 0 {
        return Err(Exception::GP0);
    }
    if kind == 0 {
        cpu.check_canonical(linear).map_err(|_| Exception::GP0)?;
        cpu.flush_tlb_page(linear);
    } else if kind == 2 {
        cpu.flush_tlb_all();
    } else {
        cpu.flush_tlb_local();
    }
    Ok(())
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

/// XGETBV.
pub(crate) fn xgetbv(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    if cpu.s.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    let value = match cpu.s.gpr[RCX] as u32 {
        0 => cpu.s.xcr0,
        1 if cpu.features.xgetbv1() => cpu.s.xcr0 & (cpu.s.fp.header[0] | 1),
        _ => return Err(Exception::GP0),
    };
    cpu.s.gpr[RAX] = value & 0xffff_ffff;
    cpu.s.gpr[RDX] = value >> 32;
    Ok(())
}

/// XSETBV.
pub(crate) fn xsetbv(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    if cpu.s.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    cpu.privileged()?;
    let value = cpu.s.gpr[RAX] & 0xffff_ffff | cpu.s.gpr[RDX] << 32;
    let known = if cpu.features.avx() { 7 } else { 3 };
    let avx_without_sse = value & 6 == 4;
    if cpu.s.gpr[RCX] as u32 != 0 || value & 1 == 0 || value & !known != 0 || avx_without_sse {
        return Err(Exception::GP0);
    }
    cpu.s.xcr0 = value;
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

/// PAUSE: lets another vCPU's thread run if this host CPU is all there is.
pub(crate) fn pause(_: &mut Cpu, _: &Op) -> Fallible<()> {
    std::hint::spin_loop();
    Ok(())
}

/// VMCALL, VMMCALL.
pub(crate) fn hypercall(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    crate::paravirt::hypercall(cpu)
}
