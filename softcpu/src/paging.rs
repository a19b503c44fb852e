//! Page tables (Intel SDM vol. 3, chapter 4): the walk, permissions, accessed and dirty bits.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::state::{cr0, cr4};
use crate::tlb::{HUGE, LARGE};

/// What an access wants to do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    pub write: bool,
    pub fetch: bool,
    /// CPL 3 access.
    pub user: bool,
    /// A supervisor data access that may not touch user pages (SMAP applies).
    pub smap: bool,
}

/// Where a linear page leads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Translation {
    /// Guest-physical address of the linear address itself.
    pub gpa: u64,
    pub global: bool,
    /// `LARGE`, `HUGE` or 0.
    pub size: u64,
}

const P: u64 = 1;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

const ERR_P: u32 = 1;
const ERR_W: u32 = 2;
const ERR_U: u32 = 4;
const ERR_RSVD: u32 = 8;
const ERR_I: u32 = 16;

/// Bits of a 4 MiB page's entry that would be address bits beyond what the processor has.
fn pde_reserved_36(phys_mask: u64) -> u64 {
    (!phys_mask >> 32 & 0xff) << 13
}

impl Cpu {
    /// Translates a canonical linear address, checks permissions, sets accessed and dirty
    /// bits.
    pub(crate) fn walk(&mut self, addr: u64, access: Access) -> Fallible<Translation> {
        if !self.paging() {
            return Ok(Translation {
                gpa: addr & 0xffff_ffff,
                global: false,
                size: 0,
            });
        }
        // A racing change of an entry by another vCPU makes us start over; it can't do so
        // for ever without the guest's own doing, which then gets a page fault.
        for _ in 0..64 {
            if let Some(result) = self.try_walk(addr, access) {
                return result;
            }
        }
        Err(self.page_fault(addr, access, 0))
    }

    fn page_fault(&self, addr: u64, access: Access, code: u32) -> Exception {
        let mut code = code;
        if access.write {
            code |= ERR_W;
        }
        if access.user {
            code |= ERR_U;
        }
        let no_execute = self.nx_enabled() && self.s.cr4 & cr4::PAE != 0;
        if access.fetch && (no_execute || self.s.cr4 & cr4::SMEP != 0) {
            code |= ERR_I;
        }
        Exception::pf(addr, code)
    }

    /// `None`: an entry changed under the walk.
    fn try_walk(&mut self, addr: u64, access: Access) -> Option<Fallible<Translation>> {
        let long = self.s.long_mode();
        let pae = self.s.cr4 & cr4::PAE != 0;
        if !pae && !long {
            return self.try_walk_32(addr, access);
        }
        // Without the no-execute feature bit 63 is reserved.
        let nxe = self.nx_enabled();
        let phys = self.tlbs.phys_mask;
        // Bits 52..63 of an entry are ignored in 4-level paging, reserved in PAE's.
        let reserved = (!phys & 0x000f_ffff_ffff_f000)
            | if nxe { 0 } else { NX }
            | if long { 0 } else { 0x7ff0_0000_0000_0000 };
        let fault = |cpu: &Self, code| Some(Err(cpu.page_fault(addr, access, code)));

        let (mut table, mut level, mut permitted);
        if long {
            level = if self.s.cr4 & cr4::LA57 != 0 { 5 } else { 4 };
            table = self.s.cr3 & phys & !0xfff;
            permitted = RW | US;
        } else {
            let pdpte = self.s.pdpte[(addr >> 30 & 3) as usize];
            if pdpte & P == 0 {
                return fault(self, 0);
            }
            level = 2;
            table = pdpte & phys & !0xfff;
            permitted = RW | US;
        }
        let mut nx = false;
        loop {
            let index = addr >> (12 + 9 * (level - 1)) & 0x1ff;
            let slot = table + index * 8;
            let entry = self.load_entry(slot);
            if entry & P == 0 {
                return fault(self, 0);
            }
            let leaf = level == 1 || entry & PS != 0;
            let mut bad = entry & reserved;
            if level > 1 && entry & PS != 0 {
                bad |= match level {
                    2 => entry & 0x001f_e000,
                    3 if self.features.gib_pages() => entry & 0x3fff_e000,
                    _ => PS,
                };
            }
            if bad != 0 {
                return fault(self, ERR_P | ERR_RSVD);
            }
            permitted &= entry;
            nx |= entry & NX != 0;
            if !leaf {
                if entry & A == 0 && !self.mark_entry(slot, entry, A) {
                    return None;
                }
                table = entry & phys & !0xfff;
                level -= 1;
                continue;
            }
            if !self.allowed(permitted, nx, access) {
                return fault(self, ERR_P);
            }
            let mark = A | if access.write { D } else { 0 };
            if entry & mark != mark && !self.mark_entry(slot, entry, mark) {
                return None;
            }
            let offset_bits = 12 + 9 * (level - 1);
            let mask = (1u64 << offset_bits) - 1;
            return Some(Ok(Translation {
                gpa: (entry & phys & 0x000f_ffff_ffff_f000 & !mask) | (addr & mask),
                global: entry & G != 0 && self.s.cr4 & cr4::PGE != 0,
                size: [0, 0, LARGE, HUGE, HUGE, HUGE][level as usize],
            }));
        }
    }

    /// 32-bit paging, with 4 MiB pages and PSE-36.
    fn try_walk_32(&mut self, addr: u64, access: Access) -> Option<Fallible<Translation>> {
        let fault = |cpu: &Self, code| Some(Err(cpu.page_fault(addr, access, code)));
        let pde_slot = (self.s.cr3 & 0xffff_f000) + (addr >> 22 & 0x3ff) * 4;
        let pde = u64::from(self.load_entry_32(pde_slot));
        if pde & P == 0 {
            return fault(self, 0);
        }
        let pge = self.s.cr4 & cr4::PGE != 0;
        let mark = A | if access.write { D } else { 0 };
        if pde & PS != 0 && self.s.cr4 & cr4::PSE != 0 {
            let reserved = if self.features.pse36() {
                1 << 21 | pde_reserved_36(self.tlbs.phys_mask)
            } else {
                0x003f_e000
            };
            if pde & reserved != 0 {
                return fault(self, ERR_P | ERR_RSVD);
            }
            if !self.allowed(pde, false, access) {
                return fault(self, ERR_P);
            }
            if pde & mark != mark && !self.mark_entry_32(pde_slot, pde as u32, mark as u32) {
                return None;
            }
            let base = (pde & 0xffc0_0000) | (pde >> 13 & 0xff) << 32;
            return Some(Ok(Translation {
                gpa: (base | addr & 0x3f_ffff) & self.tlbs.phys_mask,
                global: pde & G != 0 && pge,
                size: LARGE,
            }));
        }
        let pte_slot = (pde & 0xffff_f000) + (addr >> 12 & 0x3ff) * 4;
        let pte = u64::from(self.load_entry_32(pte_slot));
        if pte & P == 0 {
            return fault(self, 0);
        }
        if !self.allowed(pde & pte & (RW | US), false, access) {
            return fault(self, ERR_P);
        }
        if pde & A == 0 && !self.mark_entry_32(pde_slot, pde as u32, A as u32) {
            return None;
        }
        if pte & mark != mark && !self.mark_entry_32(pte_slot, pte as u32, mark as u32) {
            return None;
        }
        Some(Ok(Translation {
            gpa: pte & 0xffff_f000 | addr & 0xfff,
            global: pte & G != 0 && pge,
            size: 0,
        }))
    }

    /// `permitted` is the conjunction of all levels' R/W and U/S bits.
    fn allowed(&self, permitted: u64, nx: bool, access: Access) -> bool {
        let user_page = permitted & US != 0;
        if nx && access.fetch {
            return false;
        }
        if access.user {
            return user_page && (!access.write || permitted & RW != 0);
        }
        if access.fetch {
            return !(user_page && self.s.cr4 & cr4::SMEP != 0);
        }
        if user_page && access.smap {
            return false;
        }
        !access.write || permitted & RW != 0 || self.s.cr0 & cr0::WP == 0
    }

    /// Outside RAM nothing answers: all ones, which has reserved bits set.
    fn load_entry(&self, gpa: u64) -> u64 {
        match self.slots.host(gpa) {
            // SAFETY: 8-byte aligned address inside a slot's mapping, touched atomically.
            Some(host) => unsafe { &*host.cast::<AtomicU64>() }.load(Ordering::Acquire),
            None => u64::MAX,
        }
    }

    fn load_entry_32(&self, gpa: u64) -> u32 {
        match self.slots.host(gpa) {
            // SAFETY: 4-byte aligned address inside a slot's mapping, touched atomically.
            Some(host) => unsafe { &*host.cast::<AtomicU32>() }.load(Ordering::Acquire),
            None => u32::MAX,
        }
    }

    /// Sets bits in an entry unless it has changed. Read-only memory stays as it is.
    fn mark_entry(&self, gpa: u64, old: u64, bits: u64) -> bool {
        let Some(slot) = self.slots.find(gpa) else {
            return true;
        };
        if slot.readonly {
            return true;
        }
        slot.mark_dirty(gpa);
        // SAFETY: 8-byte aligned address inside the slot's mapping, touched atomically.
        let entry = unsafe { &*slot.host.add((gpa - slot.gpa) as usize).cast::<AtomicU64>() };
        entry
            .compare_exchange(old, old | bits, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    fn mark_entry_32(&self, gpa: u64, old: u32, bits: u32) -> bool {
        let Some(slot) = self.slots.find(gpa) else {
            return true;
        };
        if slot.readonly {
            return true;
        }
        slot.mark_dirty(gpa);
        // SAFETY: 4-byte aligned address inside the slot's mapping, touched atomically.
        let entry = unsafe { &*slot.host.add((gpa - slot.gpa) as usize).cast::<AtomicU32>() };
        entry
            .compare_exchange(old, old | bits, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}
