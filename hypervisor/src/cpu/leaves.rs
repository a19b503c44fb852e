//! A set of CPUID leaves that is being put together.

use super::features::{Place, Reg};
use crate::CpuidEntry;

/// Leaves, in the order they were first named.
#[derive(Debug, Clone, Default)]
pub(super) struct Leaves {
    entries: Vec<CpuidEntry>,
}

/// Leaves whose answer depends on ECX.
fn has_subleaves(function: u32) -> bool {
    matches!(
        function,
        4 | 7 | 0xb | 0xd | 0xf | 0x10 | 0x12 | 0x14 | 0x17..=0x1f | 0x8000_001d
    )
}

impl Leaves {
    pub(super) fn new(entries: Vec<CpuidEntry>) -> Self {
        Self { entries }
    }

    pub(super) fn into_entries(self) -> Vec<CpuidEntry> {
        self.entries
    }

    fn position(&self, function: u32, index: u32) -> Option<usize> {
        self.entries
            .iter()
            .position(|e| e.function == function && (!e.index_significant || e.index == index))
    }

    /// The leaf, where it is there.
    pub(super) fn get(&self, function: u32, index: u32) -> Option<&CpuidEntry> {
        self.position(function, index).map(|i| &self.entries[i])
    }

    /// The leaf, made if need be.
    pub(super) fn entry(&mut self, function: u32, index: Option<u32>) -> &mut CpuidEntry {
        let at = self
            .position(function, index.unwrap_or(0))
            .unwrap_or_else(|| {
                self.entries.push(CpuidEntry {
                    function,
                    index: index.unwrap_or(0),
                    index_significant: index.is_some(),
                    eax: 0,
                    ebx: 0,
                    ecx: 0,
                    edx: 0,
                });
                self.entries.len() - 1
            });
        &mut self.entries[at]
    }

    /// Replaces a leaf's four registers.
    pub(super) fn put(&mut self, function: u32, index: Option<u32>, regs: [u32; 4]) {
        let entry = self.entry(function, index);
        [entry.eax, entry.ebx, entry.ecx, entry.edx] = regs;
    }

    /// Takes leaves away.
    pub(super) fn remove(&mut self, functions: impl Fn(u32) -> bool) {
        self.entries.retain(|e| !functions(e.function));
    }

    pub(super) fn feature(&self, place: Place) -> bool {
        self.get(place.function, place.index)
            .is_some_and(|e| register(e, place.reg) >> place.bit & 1 != 0)
    }

    pub(super) fn set_feature(&mut self, place: Place, on: bool) {
        let index = has_subleaves(place.function).then_some(place.index);
        let entry = self.entry(place.function, index);
        let register = match place.reg {
            Reg::Eax => &mut entry.eax,
            Reg::Ebx => &mut entry.ebx,
            Reg::Ecx => &mut entry.ecx,
            Reg::Edx => &mut entry.edx,
        };
        if on {
            *register |= 1 << place.bit;
        } else {
            *register &= !(1 << place.bit);
        }
    }
}

fn register(entry: &CpuidEntry, reg: Reg) -> u32 {
    match reg {
        Reg::Eax => entry.eax,
        Reg::Ebx => entry.ebx,
        Reg::Ecx => entry.ecx,
        Reg::Edx => entry.edx,
    }
}
