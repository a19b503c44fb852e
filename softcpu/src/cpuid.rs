//! CPUID: the table of leaves and what depends on the vCPU's state.

use crate::cpu::Cpu;
use crate::features::Features;

/// A leaf as set from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// EAX on input.
    pub function: u32,
    /// ECX on input, or `None` where the leaf doesn't depend on it.
    pub index: Option<u32>,
    /// EAX, EBX, ECX, EDX.
    pub regs: [u32; 4],
}

/// All leaves of a vCPU.
#[derive(Debug, Clone, Default)]
pub struct Cpuid {
    leaves: Vec<Leaf>,
}

impl Cpuid {
    /// A table of these leaves.
    pub fn new(leaves: &[Leaf]) -> Self {
        Self {
            leaves: leaves.to_vec(),
        }
    }

    /// A leaf as it was set.
    pub fn leaf(&self, function: u32, index: u32) -> Option<[u32; 4]> {
        self.leaves
            .iter()
            .find(|l| l.function == function && l.index.is_none_or(|i| i == index))
            .map(|l| l.regs)
    }

    /// The instructions these leaves offer.
    pub fn features(&self) -> Features {
        let [_, _, l1_ecx, l1_edx] = self.leaf(1, 0).unwrap_or_default();
        let [_, l7_ebx, l7_ecx, l7_edx] = self.leaf(7, 0).unwrap_or_default();
        let [xsave_eax, ..] = self.leaf(0xd, 1).unwrap_or_default();
        let [_, _, e1_ecx, e1_edx] = self.leaf(0x8000_0001, 0).unwrap_or_default();
        let phys_bits = match self.leaf(0x8000_0008, 0) {
            Some([eax, ..]) => (eax & 0xff).clamp(32, 52) as u8,
            None => 36,
        };
        Features {
            l1_ecx,
            l1_edx,
            l7_ebx,
            l7_ecx,
            l7_edx,
            xsave_eax,
            e1_ecx,
            e1_edx,
            phys_bits,
        }
    }
}

/// What CPUID answers on this vCPU now (OSXSAVE, APIC id and such filled in).
pub fn query(cpu: &Cpu, function: u32, index: u32) -> [u32; 4] {
    cpu.cpuid.leaf(function, index).unwrap_or_default()
}
