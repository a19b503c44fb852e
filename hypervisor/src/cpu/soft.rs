//! What the software CPU offers.

use super::features::{self, Reg};
use super::leaves::Leaves;
use crate::CpuidEntry;

/// Features the software CPU has, by libvirt's names.
///
/// Left out on purpose: `smap` (STAC and CLAC in every user copy), `la57`, `umip`, `pku`,
/// CET; `monitor`; `pcid` (no tagged TLB).
pub(super) static FEATURES: &[&str] = &[
    "3dnowprefetch",
    "apic",
    "arat",
    "clflush",
    "cmov",
    "cx16",
    "cx8",
    "de",
    "erms",
    "fpu",
    "fsgsbase",
    "fsrm",
    "fxsr",
    "hypervisor",
    "invtsc",
    "lahf_lm",
    "lm",
    "mca",
    "mce",
    "mmx",
    "msr",
    "mtrr",
    "nx",
    "pae",
    "pat",
    "pdpe1gb",
    "pge",
    "pni",
    "popcnt",
    "pse",
    "pse36",
    "rdrand",
    "rdseed",
    "rdtscp",
    "sep",
    "smep",
    "sse",
    "sse2",
    "sse4.1",
    "sse4.2",
    "ssse3",
    "syscall",
    "tsc",
    "tsc-deadline",
    "x2apic",
];

/// Family, model and stepping of the default model. Linux knows this family of in-order
/// processors as one that does not speculate, which is true of an interpreter, and so leaves
/// out page-table isolation, retpolines and the buffer clearing that would only cost time.
/// (The host's own processor speculates under the software CPU all the same: a guest's
/// processes are as isolated from its kernel as two parts of one host process are.)
pub(super) const SIGNATURE: (u32, u32, u32) = (6, 0x1c, 10);

/// Physical address bits.
const PHYSICAL_BITS: u32 = 46;

/// Everything the software CPU offers, as a backend reports it.
pub fn soft_leaves() -> Vec<CpuidEntry> {
    let mut leaves = Leaves::default();
    for name in FEATURES {
        if let Some(place) = features::find(name) {
            leaves.set_feature(place, true);
        }
    }
    // EDX 8 of leaf 0xd.1 and such need no entry: nothing of XSAVE is offered.
    leaves.entry(0x8000_0008, None).eax = PHYSICAL_BITS | 48 << 8;
    let signature = leaves.entry(0x4000_0000, None);
    signature.eax = 0x4000_0010;
    signature.ebx = u32::from_le_bytes(*b"KVMK");
    signature.ecx = u32::from_le_bytes(*b"VMKV");
    signature.edx = u32::from_le_bytes(*b"M\0\0\0");
    leaves.entry(0x4000_0001, None).eax = softcpu::paravirt::feature::ALL;
    let timing = leaves.entry(0x4000_0010, None);
    timing.eax = u32::try_from(softcpu::tsc::khz()).unwrap_or(0);
    // The APIC timer's clock: 1 GHz.
    timing.ebx = 1_000_000;
    debug_assert!(leaves.feature(features::Place {
        function: 1,
        index: 0,
        reg: Reg::Edx,
        bit: 0
    }));
    leaves.into_entries()
}
