//! CPU models by libvirt's names.
//!
//! Some features that libvirt's definitions list are left out (`LEFT_OUT`): there is no nested
//! virtualization; a guest's MWAIT would keep a host CPU busy; performance counters are the
//! host's; and MXCSR.MM, which lets SSE instructions do without alignment, has no user.

/// CPUID's vendor string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD.
    Amd,
    /// HygonGenuine: AMD's design under another name.
    Hygon,
}

impl Vendor {
    /// CPUID's text.
    pub fn text(self) -> &'static [u8; 12] {
        match self {
            Self::Intel => b"GenuineIntel",
            Self::Amd => b"AuthenticAMD",
            Self::Hygon => b"HygonGenuine",
        }
    }
}

/// Features of libvirt's models that ours are without.
pub const LEFT_OUT: [&str; 7] = [
    "misalignsse",
    "monitor",
    "npt",
    "nrip-save",
    "perfctr_core",
    "svm",
    "svme-addr-chk",
];

/// A model: what it is called in CPUID, and its features.
#[derive(Debug)]
pub struct Model {
    /// libvirt's name.
    pub name: &'static str,
    /// Vendor.
    pub vendor: Vendor,
    /// Family, model, stepping, as displayed.
    pub signature: (u32, u32, u32),
    /// A model whose features it has too, or nothing.
    base: &'static str,
    /// Its own, separated by blanks.
    features: &'static str,
}

macro_rules! models {
    ($($name:literal, $vendor:ident, $signature:expr, $base:literal, $features:literal;)*) => {
        &[$(Model {
            name: $name,
            vendor: Vendor::$vendor,
            signature: $signature,
            base: $base,
            features: $features,
        }),*]
    };
}

// The psABI's levels with what any system needs around them, then libvirt's: name, vendor,
// signature, a model whose features it has too, and its own beyond those.
static MODELS: &[Model] = models! {
    "x86-64-v1", Intel, (15, 6, 1), "",
        "apic clflush cmov cx8 de fpu fxsr lm mca mce mmx msr mtrr nx pae pat pge pse pse36 sep \
         sse sse2 syscall tsc";
    "x86-64-v2", Intel, (6, 26, 3), "x86-64-v1", "cx16 lahf_lm pni popcnt sse4.1 sse4.2 ssse3";
    "x86-64-v3", Intel, (6, 60, 1), "x86-64-v2", "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave";
    "486", Intel, (4, 8, 0), "", "fpu pse vme";
    "pentium", Intel, (5, 4, 3), "486", "cx8 de mce mmx msr tsc";
    "pentiumpro", Intel, (6, 1, 2), "",
        "apic cmov cx8 de fpu fxsr mce mmx msr pae pat pge pse sep sse sse2 tsc";
    "pentium2", Intel, (6, 5, 2), "pentium", "cmov fxsr mca mtrr pae pat pge pse36 sep";
    "qemu32", Intel, (6, 6, 3), "pentiumpro", "pni";
    "pentium3", Intel, (6, 7, 3), "pentium2", "sse";
    "kvm32", Intel, (15, 6, 1), "qemu32", "clflush mca mtrr pse36";
    "athlon", Amd, (6, 2, 3), "pentiumpro", "3dnow 3dnowext mmxext mtrr pse36 vme";
    "coreduo", Intel, (6, 14, 8), "qemu32", "clflush mca mtrr nx vme";
    "n270", Intel, (6, 28, 2), "coreduo", "ssse3";
    "Opteron_G1", Amd, (15, 6, 1), "x86-64-v1", "pni";
    "cpu64-rhel5", Intel, (6, 6, 3), "Opteron_G1", "";
    "kvm64", Intel, (15, 6, 1), "Opteron_G1", "cx16";
    "qemu64", Amd, (15, 107, 1), "kvm64", "";
    "Conroe", Intel, (6, 15, 3), "Opteron_G1", "lahf_lm ssse3";
    "core2duo", Intel, (6, 15, 11), "Opteron_G1", "ssse3 vme";
    "cpu64-rhel6", Intel, (6, 13, 3), "kvm64", "lahf_lm";
    "Opteron_G2", Amd, (15, 6, 1), "cpu64-rhel6", "rdtscp";
    "Penryn", Intel, (6, 23, 3), "Conroe", "cx16 sse4.1";
    "phenom", Amd, (16, 2, 3), "Opteron_G1", "3dnow 3dnowext fxsr_opt mmxext";
    "Nehalem", Intel, (6, 26, 3), "x86-64-v2", "";
    "Opteron_G3", Amd, (16, 2, 3), "Opteron_G2", "abm popcnt sse4a";
    "Nehalem-IBRS", Intel, (6, 26, 3), "Nehalem", "spec-ctrl";
    "Westmere", Intel, (6, 44, 1), "x86-64-v2", "aes";
    "Westmere-IBRS", Intel, (6, 44, 1), "Westmere", "spec-ctrl";
    "SandyBridge", Intel, (6, 42, 1), "Westmere",
        "avx pclmuldq rdtscp tsc-deadline x2apic xsave";
    "SandyBridge-IBRS", Intel, (6, 42, 1), "SandyBridge", "spec-ctrl";
    "Opteron_G4", Amd, (21, 1, 2), "Westmere",
        "3dnowprefetch abm avx fma4 pclmuldq pdpe1gb rdtscp sse4a xop xsave";
    "IvyBridge", Intel, (6, 58, 9), "SandyBridge", "erms f16c fsgsbase rdrand smep vme";
    "IvyBridge-IBRS", Intel, (6, 58, 9), "IvyBridge", "spec-ctrl";
    "Opteron_G5", Amd, (21, 2, 0), "Opteron_G4", "f16c fma tbm";
    "Haswell-noTSX", Intel, (6, 60, 1), "SandyBridge",
        "avx2 bmi1 bmi2 erms fma fsgsbase invpcid movbe pcid smep";
    "Haswell-noTSX-IBRS", Intel, (6, 60, 1), "Haswell-noTSX", "spec-ctrl";
    "Haswell", Intel, (6, 60, 1), "Haswell-noTSX", "hle rtm";
    "Haswell-IBRS", Intel, (6, 60, 1), "Haswell", "spec-ctrl";
    "Broadwell-noTSX", Intel, (6, 61, 2), "Haswell-noTSX", "3dnowprefetch adx rdseed smap";
    "Broadwell-noTSX-IBRS", Intel, (6, 61, 2), "Broadwell-noTSX", "spec-ctrl";
    "Broadwell", Intel, (6, 61, 2), "Broadwell-noTSX", "hle rtm";
    "Broadwell-IBRS", Intel, (6, 61, 2), "Broadwell", "spec-ctrl";
    "Dhyana", Hygon, (24, 0, 1), "x86-64-v3",
        "3dnowprefetch adx arat clflushopt cr8legacy fsgsbase fxsr_opt ibpb mmxext osvw pdpe1gb \
         rdrand rdseed rdtscp smap smep sse4a vme xgetbv1 xsavec xsaveopt";
    "Skylake-Client-noTSX-IBRS", Intel, (6, 94, 3), "Broadwell-noTSX-IBRS",
        "abm arat f16c rdrand vme xgetbv1 xsavec xsaveopt";
    "EPYC", Amd, (23, 1, 2), "x86-64-v3",
        "3dnowprefetch adx aes arat clflushopt cr8legacy fsgsbase fxsr_opt mmxext osvw pclmuldq \
         pdpe1gb rdrand rdseed rdtscp sha-ni smap smep sse4a vme xgetbv1 xsavec xsaveopt";
    "Skylake-Client", Intel, (6, 94, 3), "Broadwell",
        "abm arat f16c mpx rdrand vme xgetbv1 xsavec xsaveopt";
    "EPYC-IBPB", Amd, (23, 1, 2), "EPYC", "ibpb";
    "Skylake-Client-IBRS", Intel, (6, 94, 3), "Skylake-Client", "spec-ctrl";
    "Snowridge", Intel, (6, 134, 1), "Westmere-IBRS",
        "3dnowprefetch arat arch-capabilities cldemote clflushopt clwb core-capability erms \
         fsgsbase gfni movbe movdir64b movdiri pclmuldq pdpe1gb rdrand rdseed rdtscp sha-ni smap \
         smep split-lock-detect ssbd tsc-deadline umip vme x2apic xgetbv1 xsave xsavec xsaveopt";
    "Skylake-Server-noTSX-IBRS", Intel, (6, 85, 4), "Skylake-Client-noTSX-IBRS",
        "avx512bw avx512cd avx512dq avx512f avx512vl clwb mpx pdpe1gb";
    "Skylake-Server", Intel, (6, 85, 4), "Skylake-Client",
        "avx512bw avx512cd avx512dq avx512f avx512vl clwb pdpe1gb";
    "EPYC-Rome", Amd, (23, 49, 0), "EPYC-IBPB",
        "amd-stibp clwb clzero rdpid umip wbnoinvd xsaveerptr";
    "Skylake-Server-IBRS", Intel, (6, 85, 4), "Skylake-Server", "spec-ctrl";
    "Cascadelake-Server-noTSX", Intel, (6, 85, 6), "Skylake-Server-noTSX-IBRS",
        "avx512vnni clflushopt ssbd";
    "Cascadelake-Server", Intel, (6, 85, 6), "Cascadelake-Server-noTSX", "hle rtm";
    "Icelake-Client-noTSX", Intel, (6, 126, 0), "Skylake-Client-noTSX-IBRS",
        "avx512-vpopcntdq avx512bitalg avx512vbmi avx512vbmi2 avx512vnni gfni mpx pku ssbd umip \
         vaes vpclmulqdq wbnoinvd";
    "Icelake-Client", Intel, (6, 126, 0), "Icelake-Client-noTSX", "hle rtm";
    "EPYC-Milan", Amd, (25, 1, 1), "EPYC-Rome",
        "amd-ssbd erms fsrm ibrs invpcid pcid pku xsaves";
    "Cooperlake", Intel, (6, 85, 10), "Skylake-Client-noTSX-IBRS",
        "arch-capabilities avx512-bf16 avx512bw avx512cd avx512dq avx512f avx512vl avx512vnni \
         clflushopt clwb hle ibrs-all mds-no pdpe1gb pku pschange-mc-no rdctl-no rtm skip-l1dfl-vmentry ssbd \
         stibp taa-no";
    "Icelake-Server-noTSX", Intel, (6, 106, 6), "Icelake-Client-noTSX",
        "avx512bw avx512cd avx512dq avx512f avx512vl clflushopt clwb la57 pdpe1gb";
    "Icelake-Server", Intel, (6, 106, 6), "Icelake-Server-noTSX", "hle rtm";
};

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
        let mut list: Vec<_> = self.features.split_ascii_whitespace().collect();
        let mut base = self.base;
        while let Some(model) = find(base) {
            list.extend(model.features.split_ascii_whitespace());
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
            assert!(
                model.base.is_empty() || find(model.base).is_some(),
                "{model:?}"
            );
            for name in model.features() {
                assert!(features::find(name).is_some(), "{}: {name}", model.name);
            }
        }
    }

    /// Values of an attribute of all elements that start with `element`.
    fn attributes(text: &str, element: &str) -> Vec<String> {
        text.split(element)
            .skip(1)
            .filter_map(|rest| rest.split_once('>'))
            .filter(|(tag, _)| !tag.contains("removed='yes'"))
            .filter_map(|(tag, _)| tag.split('\'').nth(1).map(str::to_owned))
            .collect()
    }

    #[test]
    fn models_are_what_libvirt_says() {
        let Ok(folder) = std::fs::read_dir("/usr/share/libvirt/cpu_map") else {
            println!("left out: models_are_what_libvirt_says needs libvirt's CPU map");
            return;
        };
        for file in folder.flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            let text = std::fs::read_to_string(file.path()).unwrap();
            let text: String = text
                .split("<!--")
                .map(|part| part.split_once("-->").map_or(part, |(_, rest)| rest))
                .collect();
            let names = attributes(&text, "<model ");
            if !name.starts_with("x86_") || names.len() != 1 {
                continue;
            }
            let Some(model) = find(&names[0]) else {
                println!("a model of a newer libvirt: {}", names[0]);
                continue;
            };
            let mut theirs = attributes(&text, "<feature ");
            // No processor and no hypervisor has MPX any more; this model is to remain one
            // that can be had.
            let without_mpx = model.name == "Skylake-Client-noTSX-IBRS";
            theirs.retain(|f| !(LEFT_OUT.contains(&f.as_str()) || without_mpx && f == "mpx"));
            theirs.sort();
            let mut ours = model.features();
            ours.sort_unstable();
            assert_eq!(ours, theirs, "{}", model.name);
        }
    }
}
