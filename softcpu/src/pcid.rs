//! Address spaces with identifiers (Intel SDM vol. 3, 4.10.1): the TLBs of those that ran last
//! are put aside on a change of CR3 and found again when it changes back.

use crate::cache::Ways;
use crate::cpu::Cpu;
use crate::state::cr4;
use crate::tlb::Tlbs;

/// Address spaces remembered beside the running one. (Linux uses six identifiers.)
const MOST: usize = 6;
/// CR3's identifier.
const PCID: u64 = 0xfff;

/// What is remembered of one address space.
pub(crate) struct Parked {
    pcid: u64,
    tlbs: Box<Tlbs>,
    ways: Ways,
}

impl Cpu {
    /// Goes over to the address space of the new CR3 while CR4.PCIDE is set: what is known of
    /// it is kept if `keep`, else what isn't global is forgotten.
    pub(crate) fn switch_pcid(&mut self, new: u64, keep: bool) {
        let (old, new) = (self.s.cr3 & PCID, new & PCID);
        if old == new {
            if !keep {
                self.flush_tlb_local();
            }
            return;
        }
        let phys_mask = self.tlbs.phys_mask;
        let next = match self.parked.iter().position(|p| p.pcid == new) {
            Some(i) => self.parked.remove(i),
            None => {
                // The one unused for longest makes room.
                let mut tlbs = if self.parked.len() == MOST {
                    let mut tlbs = self.parked.remove(0).tlbs;
                    tlbs.clear();
                    tlbs
                } else {
                    Tlbs::new()
                };
                tlbs.phys_mask = phys_mask;
                Parked {
                    pcid: new,
                    tlbs,
                    ways: self.cache.fresh_ways(),
                }
            }
        };
        self.parked.push(Parked {
            pcid: old,
            tlbs: std::mem::replace(&mut self.tlbs, next.tlbs),
            ways: self.cache.replace_ways(next.ways),
        });
        self.link = std::ptr::null_mut();
        self.select_tlb();
        if !keep {
            self.flush_tlb_local();
        }
    }

    /// Forgets the translation of one page in an address space.
    pub(crate) fn flush_pcid_page(&mut self, pcid: u64, addr: u64) {
        if pcid == self.s.cr3 & PCID || self.s.cr4 & cr4::PCIDE == 0 {
            self.flush_tlb_page(addr);
        } else {
            self.flush_pcid(pcid);
        }
    }

    /// Forgets an address space.
    pub(crate) fn flush_pcid(&mut self, pcid: u64) {
        if pcid == self.s.cr3 & PCID || self.s.cr4 & cr4::PCIDE == 0 {
            self.flush_tlb_local();
        } else {
            self.parked.retain(|p| p.pcid != pcid);
        }
    }

    /// Forgets what isn't global, in all address spaces.
    pub(crate) fn flush_all_pcids(&mut self) {
        self.parked.clear();
        self.flush_tlb_local();
    }

    /// Forgets a page in the address spaces that are not running: it may be global.
    pub(crate) fn flush_parked_page(&mut self, addr: u64) {
        for parked in &mut self.parked {
            if parked.tlbs.clear_page(addr) {
                parked.ways = self.cache.fresh_ways();
            } else {
                self.cache.forget_page_of(&mut parked.ways, addr);
            }
        }
    }

    /// From now on writes to the guest-physical page `gpa` need a closer look. Whether one
    /// could go through directly before.
    pub(crate) fn slow_writes(&mut self, gpa: u64) -> bool {
        let mut found = self.tlbs.slow_writes(gpa);
        for parked in &mut self.parked {
            found |= parked.tlbs.slow_writes(gpa);
        }
        found
    }

    /// Forgets all write translations.
    pub(crate) fn clear_writes(&mut self) {
        self.tlbs.clear_writes();
        for parked in &mut self.parked {
            parked.tlbs.clear_writes();
        }
    }
}
