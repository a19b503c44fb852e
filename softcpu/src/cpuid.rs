//! CPUID: the table of leaves and what depends on the vCPU's state.

use crate::cpu::Cpu;
use crate::features::Features;
use crate::state::cr4;

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
        let [_, e8_ebx, ..] = self.leaf(0x8000_0008, 0).unwrap_or_default();
        let vendor = self.leaf(0, 0).unwrap_or_default()[1];
        let amd = [*b"Auth", *b"Hygo"].contains(&vendor.to_le_bytes());
        Features {
            l1_ecx,
            l1_edx,
            l7_ebx,
            l7_ecx,
            l7_edx,
            xsave_eax,
            e1_ecx,
            e1_edx,
            e8_ebx,
            amd,
            phys_bits,
        }
    }

    /// The leaf that answers for `function`: beyond the last of its range, the last basic
    /// one, as Intel's processors do (SDM vol. 2, CPUID).
    fn effective(&self, function: u32) -> u32 {
        let max_of = |first: u32| self.leaf(first, 0).map_or(0, |[eax, ..]| eax);
        let basic = max_of(0);
        let known = match function >> 28 {
            0 => function <= basic,
            4 => function <= max_of(0x4000_0000),
            8 => function <= max_of(0x8000_0000),
            _ => false,
        };
        if known { function } else { basic }
    }
}

const OSXSAVE: u32 = 1 << 27;
const APIC: u32 = 1 << 9;
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// What CPUID answers on this vCPU now (OSXSAVE, APIC id and such filled in).
pub fn query(cpu: &Cpu, function: u32, index: u32) -> [u32; 4] {
    let table = &cpu.cpuid;
    let function = table.effective(function);
    let Some(mut regs) = table.leaf(function, index) else {
        if TOPOLOGY.contains(&function)
            && let Some([.., id]) = table.leaf(function, 0)
        {
            // A level that isn't there: its number and the id are still told.
            return [0, 0, index & 0xff, id];
        }
        return [0; 4];
    };
    match (function, index) {
        (1, _) => {
            if cpu.s.cr4 & cr4::OSXSAVE != 0 {
                regs[2] |= OSXSAVE;
            } else {
                regs[2] &= !OSXSAVE;
            }
            if cpu.apic.base() >> 11 & 1 == 0 {
                regs[3] &= !APIC;
            }
        }
        (0xd, 0) => regs[1] = xsave_size(table, cpu.s.xcr0),
        // Nothing is compacted that isn't in XCR0: IA32_XSS is 0.
        (0xd, 1) if regs[0] & 2 != 0 => regs[1] = xsave_size(table, cpu.s.xcr0),
        _ => {}
    }
    regs
}

/// Bytes XSAVE uses for the components in `xcr0`, in the standard form.
fn xsave_size(table: &Cpuid, xcr0: u64) -> u32 {
    const LEGACY_AND_HEADER: u32 = 576;
    (2..63)
        .filter(|&component| xcr0 >> component & 1 != 0)
        .filter_map(|component| table.leaf(0xd, component))
        .map(|[size, offset, ..]| size.saturating_add(offset))
        .fold(LEGACY_AND_HEADER, u32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: Option<u32>, regs: [u32; 4]) -> Leaf {
        Leaf {
            function,
            index,
            regs,
        }
    }

    #[test]
    fn a_leaf_beyond_the_last_is_the_last_basic_one() {
        let table = Cpuid::new(&[
            leaf(0, None, [7, 0, 0, 0]),
            leaf(0x4000_0000, None, [0x4000_0001, 0, 0, 0]),
            leaf(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        ]);
        assert_eq!(table.effective(7), 7);
        assert_eq!(table.effective(8), 7);
        assert_eq!(table.effective(0x4000_0001), 0x4000_0001);
        assert_eq!(table.effective(0x8000_0009), 7);
        assert_eq!(table.effective(0xc000_0000), 7);
    }

    #[test]
    fn the_xsave_area_grows_with_xcr0() {
        let table = Cpuid::new(&[leaf(0xd, Some(2), [256, 576, 0, 0])]);
        assert_eq!(xsave_size(&table, 3), 576);
        assert_eq!(xsave_size(&table, 7), 832);
    }
}
