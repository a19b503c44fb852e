//! What the software CPU offers.

use super::features::{self, Place, Reg};
use super::leaves::Leaves;
use crate::CpuidEntry;

/// Features the software CPU has on any host, by libvirt's names.
///
/// Left out on purpose: `pku`, CET; `monitor`; what `models::LEFT_OUT` names.
static FEATURES: &[&str] = &[
    "3dnowprefetch",
    "abm",
    "adx",
    "amd-ssbd",
    "amd-stibp",
    "apic",
    "arat",
    "arch-capabilities",
    "bmi1",
    "bmi2",
    "clflush",
    "clflushopt",
    "clwb",
    "clzero",
    "cmov",
    "cmp_legacy",
    "cr8legacy",
    "cx16",
    "cx8",
    "de",
    "erms",
    "flush-l1d",
    "fsgsbase",
    "fsrm",
    "fxsr_opt",
    "hypervisor",
    "ibpb",
    "ibrs",
    "invpcid",
    "invtsc",
    "la57",
    "lahf_lm",
    "lm",
    "mca",
    "mce",
    "md-clear",
    "mmxext",
    "movbe",
    "msr",
    "mtrr",
    "nx",
    "osvw",
    "pae",
    "pat",
    "pcid",
    "pdpe1gb",
    "pge",
    "popcnt",
    "pse",
    "pse36",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "sep",
    "smap",
    "smep",
    "spec-ctrl",
    "ssbd",
    "stibp",
    "syscall",
    "tsc",
    "tsc-deadline",
    "tsc_adjust",
    "umip",
    "vme",
    "wbnoinvd",
    "x2apic",
    "xsaveerptr",
];

/// Offered, but not part of the default model: `smap` costs every copy from and to a user
/// program, extended states every switch between programs; `pcid` saves the
/// guest less than its own book-keeping for it costs; `sse4a` is AMD's; what says that a processor is immune is for models that would
/// otherwise be known not to be; the rest is for models that have it, and gains nothing.
const NOT_BY_DEFAULT: [&str; 34] = [
    "amd-ssbd",
    "amd-stibp",
    "clzero",
    "cmp_legacy",
    "cr8legacy",
    "flush-l1d",
    "fxsr_opt",
    "ibpb",
    "ibrs",
    "la57",
    "md-clear",
    "mmxext",
    "osvw",
    "ssbd",
    "stibp",
    "tsc_adjust",
    "umip",
    "vme",
    "wbnoinvd",
    "xsaveerptr",
    "xsaves",
    "arch-capabilities",
    "pcid",
    "smap",
    "spec-ctrl",
    "sse4a",
    "xsave",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
    "avx",
    "avx2",
    "fma",
    "f16c",
];

/// Bytes of the XSAVE area for x87, SSE and AVX in the standard form.
const XSAVE_SIZE: u32 = 832;

/// Whether a feature the software CPU offers belongs to its default model.
pub(super) fn by_default(name: &str) -> bool {
    !NOT_BY_DEFAULT.contains(&name)
}

/// Floating-point and SIMD features run on the host's own units: what it has.
fn host_features() -> impl Iterator<Item = Place> {
    let host = softcpu::simd::host_fp_features();
    features::all().filter_map(move |(_, place)| {
        let word = match (place.function, place.index, place.reg) {
            (1, _, Reg::Ecx) => host.l1_ecx,
            (1, _, Reg::Edx) => host.l1_edx,
            (7, 0, Reg::Ebx) => host.l7_ebx,
            (7, 0, Reg::Ecx) => host.l7_ecx,
            (0xd, 1, Reg::Eax) => host.xsave_eax,
            (0x8000_0001, _, Reg::Ecx) => host.e1_ecx,
            _ => 0,
        };
        (word >> place.bit & 1 != 0).then_some(place)
    })
}

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
    for place in host_features() {
        leaves.set_feature(place, true);
    }
    let avx = features::find("avx").is_some_and(|place| leaves.feature(place));
    let (mask, size) = if avx { (7, XSAVE_SIZE) } else { (3, 576) };
    leaves.put(0xd, Some(0), [mask, size, size, 0]);
    if avx {
        // YMM registers' upper halves: 256 bytes at 576.
        leaves.put(0xd, Some(2), [256, 576, 0, 0]);
    }
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
    leaves.into_entries()
}
