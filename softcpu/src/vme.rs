//! Extensions of virtual-8086 mode, and protected-mode virtual interrupts (Intel SDM vol. 3,
//! 21.3 and 21.4).

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::state::{cr4, rflags, seg};

/// Where the TSS says how its I/O permission map lies.
const MAP_BASE: u64 = 102;
/// Bytes of the interrupt redirection map, which lies right before it.
const REDIRECTION: u32 = 32;

impl Cpu {
    /// CLI and STI change VIF instead of IF (the current privilege level exceeds IOPL).
    pub(crate) fn virtual_interrupts(&self) -> bool {
        let s = &self.s;
        if s.v8086() {
            s.cr4 & cr4::VME != 0
        } else {
            s.protected() && s.cpl == 3 && s.cr4 & cr4::PVI != 0
        }
    }

    /// INT n of a virtual-8086 program goes to its own handler.
    pub(crate) fn redirected(&mut self, vector: u8) -> Fallible<bool> {
        if self.s.cr4 & cr4::VME == 0 {
            return Ok(false);
        }
        let tr = self.s.tr;
        if tr.kind() & 8 == 0 || tr.unusable() || tr.limit < MAP_BASE as u32 + 1 {
            return Err(Exception::GP0);
        }
        let base = self.system_read::<u16>(self.wrap_system(tr.base.wrapping_add(MAP_BASE)))?;
        let offset = u32::from(base) + u32::from(vector / 8);
        if offset < REDIRECTION || offset - REDIRECTION > tr.limit {
            return Err(Exception::GP0);
        }
        let at = tr.base.wrapping_add(u64::from(offset - REDIRECTION));
        let bits = self.system_read::<u8>(self.wrap_system(at))?;
        Ok(bits >> (vector % 8) & 1 == 0)
    }

    /// INT n through the interrupt table of the virtual-8086 program.
    pub(crate) fn deliver_8086(&mut self, vector: u8) -> Fallible<()> {
        let entry = self.read::<u32>(u64::from(vector) * 4)?;
        let virtual_if = self.s.iopl() < 3;
        let flags = if virtual_if {
            self.virtual_flags()
        } else {
            self.s.rflags()
        };
        let selector = self.s.seg[seg::CS].selector;
        let sp = self.s.gpr[crate::state::gpr::RSP];
        let sp = self.push_at(sp, flags & 0xffff, 2)?;
        let sp = self.push_at(sp, selector.into(), 2)?;
        let sp = self.push_at(sp, self.s.rip & 0xffff, 2)?;
        self.set_sp(sp);
        let off = if virtual_if { rflags::VIF } else { rflags::IF };
        self.s.flags &= !(off | rflags::TF | rflags::RF);
        self.s.seg[seg::CS] = self.real_segment(seg::CS, (entry >> 16) as u16);
        self.s.rip = u64::from(entry & 0xffff);
        self.update_mode();
        Ok(())
    }

    /// RFLAGS as a virtual-8086 program with IOPL below 3 sees them: VIF for IF, IOPL 3.
    pub(crate) fn virtual_flags(&self) -> u64 {
        let flags = self.s.rflags();
        let on = if flags & rflags::VIF != 0 {
            rflags::IF
        } else {
            0
        };
        flags & !rflags::IF | on | rflags::IOPL
    }

    /// #GP(0) if these flags may not be loaded that way.
    pub(crate) fn check_virtual_flags(&self, value: u64) -> Fallible<()> {
        let waiting = value & rflags::IF != 0 && self.s.flags & rflags::VIP != 0;
        if waiting || value & rflags::TF != 0 {
            return Err(Exception::GP0);
        }
        Ok(())
    }

    /// The 16-bit POPF and IRET of such a program.
    pub(crate) fn load_virtual_flags(&mut self, value: u64) {
        self.load_flags(value, 2, rflags::IF | rflags::IOPL);
        self.s.flags &= !rflags::VIF;
        if value & rflags::IF != 0 {
            self.s.flags |= rflags::VIF;
        }
    }
}
