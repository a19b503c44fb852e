//! CPU models by libvirt's names.
//!
//! `svm`, `vmx` and `monitor`, which some of libvirt's definitions list, are left out: there
//! is no nested virtualization, and a guest's MWAIT would keep a host CPU busy.

/// CPUID's vendor string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD.
    Amd,
}

/// A model: what it is called in CPUID, and its features.
#[derive(Debug)]
pub struct Model {
    /// libvirt's name.
    pub name: &'static str,
    /// Vendor.
    pub vendor: Vendor,
    /// Family, model, stepping, as displayed.
    pub signature: (u32, u32, u32),
    /// A model whose features it has too.
    base: Option<&'static str>,
    /// Its own.
    features: &'static [&'static str],
}

const fn intel(
    name: &'static str,
    signature: (u32, u32, u32),
    base: &'static str,
    features: &'static [&'static str],
) -> Model {
    Model {
        name,
        vendor: Vendor::Intel,
        signature,
        base: Some(base),
        features,
    }
}

const fn amd(
    name: &'static str,
    signature: (u32, u32, u32),
    base: &'static str,
    features: &'static [&'static str],
) -> Model {
    Model {
        name,
        vendor: Vendor::Amd,
        signature,
        base: Some(base),
        features,
    }
}

static MODELS: &[Model] = &[
    // The psABI's levels, with what any system needs around them.
    Model {
        name: "x86-64-v1",
        vendor: Vendor::Intel,
        signature: (15, 6, 1),
        base: None,
        features: &[
            "apic", "clflush", "cmov", "cx8", "de", "fpu", "fxsr", "lm", "mca", "mce", "mmx",
            "msr", "mtrr", "nx", "pae", "pat", "pge", "pse", "pse36", "sep", "sse", "sse2",
            "syscall", "tsc",
        ],
    },
    intel(
        "x86-64-v2",
        (6, 26, 3),
        "x86-64-v1",
        &[
            "cx16", "lahf_lm", "pni", "popcnt", "sse4.1", "sse4.2", "ssse3",
        ],
    ),
    intel(
        "x86-64-v3",
        (6, 60, 1),
        "x86-64-v2",
        &[
            "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave",
        ],
    ),
    intel("kvm64", (15, 6, 1), "x86-64-v1", &["cx16", "pni"]),
    amd(
        "qemu64",
        (15, 107, 1),
        "x86-64-v1",
        &["cx16", "lahf_lm", "pni"],
    ),
    intel(
        "Conroe",
        (6, 15, 3),
        "x86-64-v1",
        &["lahf_lm", "pni", "ssse3"],
    ),
    intel("Penryn", (6, 23, 3), "Conroe", &["cx16", "sse4.1"]),
    intel("Nehalem", (6, 26, 3), "Penryn", &["popcnt", "sse4.2"]),
    intel("Westmere", (6, 44, 1), "Nehalem", &["aes"]),
    intel(
        "SandyBridge",
        (6, 42, 1),
        "Westmere",
        &[
            "avx",
            "pclmuldq",
            "rdtscp",
            "tsc-deadline",
            "x2apic",
            "xsave",
        ],
    ),
    intel(
        "IvyBridge",
        (6, 58, 9),
        "SandyBridge",
        &["erms", "f16c", "fsgsbase", "rdrand", "smep"],
    ),
    intel(
        "Haswell-noTSX",
        (6, 60, 1),
        "IvyBridge",
        &["avx2", "bmi1", "bmi2", "fma", "invpcid", "movbe", "pcid"],
    ),
    intel("Haswell", (6, 60, 1), "Haswell-noTSX", &["hle", "rtm"]),
    intel(
        "Broadwell-noTSX",
        (6, 61, 2),
        "Haswell-noTSX",
        &["3dnowprefetch", "adx", "rdseed", "smap"],
    ),
    intel("Broadwell", (6, 61, 2), "Broadwell-noTSX", &["hle", "rtm"]),
    intel(
        "Skylake-Client-noTSX-IBRS",
        (6, 94, 3),
        "Broadwell-noTSX",
        &[
            "abm",
            "arat",
            "clflushopt",
            "spec-ctrl",
            "ssbd",
            "vme",
            "xgetbv1",
            "xsavec",
            "xsaveopt",
        ],
    ),
    intel(
        "Skylake-Client",
        (6, 94, 3),
        "Broadwell",
        &["abm", "arat", "mpx", "vme", "xgetbv1", "xsavec", "xsaveopt"],
    ),
    amd("Opteron_G1", (15, 6, 1), "x86-64-v1", &["pni"]),
    amd(
        "Opteron_G2",
        (15, 6, 1),
        "Opteron_G1",
        &["cx16", "lahf_lm", "rdtscp"],
    ),
    amd(
        "Opteron_G3",
        (16, 2, 3),
        "Opteron_G2",
        &["abm", "misalignsse", "popcnt", "sse4a"],
    ),
    amd(
        "Opteron_G4",
        (21, 1, 2),
        "Opteron_G3",
        &[
            "3dnowprefetch",
            "aes",
            "avx",
            "fma4",
            "pclmuldq",
            "pdpe1gb",
            "sse4.1",
            "sse4.2",
            "ssse3",
            "xop",
            "xsave",
        ],
    ),
    amd(
        "Opteron_G5",
        (21, 2, 0),
        "Opteron_G4",
        &["f16c", "fma", "tbm"],
    ),
    amd(
        "EPYC",
        (23, 1, 2),
        "x86-64-v3",
        &[
            "3dnowprefetch",
            "adx",
            "aes",
            "arat",
            "clflushopt",
            "cr8legacy",
            "fsgsbase",
            "fxsr_opt",
            "misalignsse",
            "mmxext",
            "osvw",
            "pclmuldq",
            "pdpe1gb",
            "rdrand",
            "rdseed",
            "rdtscp",
            "sha-ni",
            "smap",
            "smep",
            "sse4a",
            "vme",
            "xgetbv1",
            "xsavec",
            "xsaveopt",
        ],
    ),
];

/// All models' names.
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|m| m.name)
}

/// The model called `name`.
pub fn find(name: &str) -> Option<&'static Model> {
    MODELS.iter().find(|m| m.name == name)
}

impl Model {
    /// All its features, with its bases'.
    pub fn features(&self) -> Vec<&'static str> {
        let mut list = self.features.to_vec();
        let mut base = self.base;
        while let Some(model) = base.and_then(find) {
            list.extend(model.features);
            base = model.base;
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::features;

    #[test]
    fn every_model_is_made_of_known_features_and_models() {
        for model in MODELS {
            assert!(model.base.is_none_or(|b| find(b).is_some()), "{model:?}");
            for name in model.features() {
                assert!(features::find(name).is_some(), "{}: {name}", model.name);
            }
        }
    }
}
