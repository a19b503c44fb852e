//! Control and debug registers, XCR0, and what invalidates translations.

use super::bits::{get, put};
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::op::Op;
use crate::state::gpr::{RAX, RCX, RDX};
use crate::state::{cr0, cr4, efer, seg};

/// Bit of a value for CR3: translations stay valid.
const KEEP: u64 = 1 << 63;

impl Cpu {
    /// MOV to CR3 and the like: also loads PAE's pointers. `keep`: with process-context
    /// identifiers, what is known of the new address space stays valid.
    pub(crate) fn write_cr3(&mut self, value: u64, keep: bool) -> Fallible<()> {
        if self.paging() && self.s.cr4 & cr4::PAE != 0 && !self.s.long_mode() {
            self.load_pdptes(value)?;
        }
        if self.s.cr4 & cr4::PCIDE != 0 {
            self.switch_pcid(value, keep);
        } else {
            self.flush_tlb_local();
        }
        self.s.cr3 = value;
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
        let pae = self.s.cr4 & cr4::PAE != 0;
        let caching = (old ^ new) & (cr0::CD | cr0::NW) != 0;
        if new & old & cr0::PG != 0 && caching && pae && !self.s.long_mode() {
            self.load_pdptes(self.s.cr3)?;
        }
        if new & cr0::PG == 0 && self.s.cr4 & cr4::PCIDE != 0 {
            return Err(Exception::GP0);
        }
        if (old ^ new) & cr0::PG != 0 {
            if new & cr0::PG != 0 && self.s.efer & efer::LME != 0 {
                if !pae || self.s.seg[seg::CS].long() {
                    return Err(Exception::GP0);
                }
                self.s.efer |= efer::LMA;
            } else if new & cr0::PG != 0 && pae {
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
        let mut known = cr4::PCE;
        for (has, bit) in [
            (f.vme(), cr4::VME | cr4::PVI),
            (f.tsc(), cr4::TSD),
            (f.de(), cr4::DE),
            (f.pse(), cr4::PSE),
            (f.pae(), cr4::PAE),
            (f.mce(), cr4::MCE),
            (f.pge(), cr4::PGE),
            (f.fxsr(), cr4::OSFXSR),
            (f.sse(), cr4::OSXMMEXCPT),
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
    super::system::drain_stores();
    let value = get(cpu, op.a, op.b.into());
    match op.imm {
        0 => cpu.write_cr0(value),
        2 => {
            cpu.s.cr2 = value;
            Ok(())
        }
        3 => {
            let (mut value, mut keep) = (value, false);
            if cpu.s.long_mode() {
                if cpu.s.cr4 & cr4::PCIDE != 0 {
                    keep = value & KEEP != 0;
                    value &= !KEEP;
                }
                if value & !cpu.tlbs.phys_mask != 0 {
                    return Err(Exception::GP0);
                }
            }
            cpu.write_cr3(value, keep)
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
            }
        }
        n => cpu.s.dr[n & 3] = value,
    }
    cpu.debug_registers_changed();
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

/// INVLPG.
pub(crate) fn invlpg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    super::system::drain_stores();
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
    super::system::drain_stores();
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
    let identifiers = cpu.s.cr4 & cr4::PCIDE != 0;
    if kind > 3 || pcid >> 12 != 0 || kind < 2 && pcid != 0 && !identifiers {
        return Err(Exception::GP0);
    }
    match kind {
        0 => {
            cpu.check_canonical(linear).map_err(|_| Exception::GP0)?;
            cpu.flush_pcid_page(pcid, linear);
        }
        1 => cpu.flush_pcid(pcid),
        2 => cpu.flush_tlb_all(),
        _ => cpu.flush_all_pcids(),
    }
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
