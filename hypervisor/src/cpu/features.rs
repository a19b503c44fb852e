//! CPU features by libvirt's names, and where CPUID shows them (Intel SDM vol. 2, CPUID;
//! AMD APM vol. 3, appendix E).

/// A register of CPUID's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reg {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Where a feature is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Leaf.
    pub function: u32,
    /// Subleaf; 0 where there are none.
    pub index: u32,
    /// Register.
    pub reg: Reg,
    /// Bit number.
    pub bit: u32,
}

type Group = (u32, u32, Reg, &'static [(&'static str, u32)]);

/// All features, by the register that shows them.
static GROUPS: &[Group] = &[
    (
        1,
        0,
        Reg::Edx,
        &[
            ("fpu", 0),
            ("vme", 1),
            ("de", 2),
            ("pse", 3),
            ("tsc", 4),
            ("msr", 5),
            ("pae", 6),
            ("mce", 7),
            ("cx8", 8),
            ("apic", 9),
            ("sep", 11),
            ("mtrr", 12),
            ("pge", 13),
            ("mca", 14),
            ("cmov", 15),
            ("pat", 16),
            ("pse36", 17),
            ("pn", 18),
            ("clflush", 19),
            ("ds", 21),
            ("acpi", 22),
            ("mmx", 23),
            ("fxsr", 24),
            ("sse", 25),
            ("sse2", 26),
            ("ss", 27),
            ("ht", 28),
            ("tm", 29),
            ("ia64", 30),
            ("pbe", 31),
        ],
    ),
    (
        1,
        0,
        Reg::Ecx,
        &[
            ("pni", 0),
            ("pclmuldq", 1),
            ("dtes64", 2),
            ("monitor", 3),
            ("ds_cpl", 4),
            ("vmx", 5),
            ("smx", 6),
            ("est", 7),
            ("tm2", 8),
            ("ssse3", 9),
            ("cid", 10),
            ("fma", 12),
            ("cx16", 13),
            ("xtpr", 14),
            ("pdcm", 15),
            ("pcid", 17),
            ("dca", 18),
            ("sse4.1", 19),
            ("sse4.2", 20),
            ("x2apic", 21),
            ("movbe", 22),
            ("popcnt", 23),
            ("tsc-deadline", 24),
            ("aes", 25),
            ("xsave", 26),
            ("avx", 28),
            ("f16c", 29),
            ("rdrand", 30),
            ("hypervisor", 31),
        ],
    ),
    (6, 0, Reg::Eax, &[("arat", 2)]),
    (
        7,
        0,
        Reg::Ebx,
        &[
            ("fsgsbase", 0),
            ("tsc_adjust", 1),
            ("bmi1", 3),
            ("hle", 4),
            ("avx2", 5),
            ("smep", 7),
            ("bmi2", 8),
            ("erms", 9),
            ("invpcid", 10),
            ("rtm", 11),
            ("mpx", 14),
            ("avx512f", 16),
            ("avx512dq", 17),
            ("rdseed", 18),
            ("adx", 19),
            ("smap", 20),
            ("avx512ifma", 21),
            ("clflushopt", 23),
            ("clwb", 24),
            ("intel-pt", 25),
            ("avx512pf", 26),
            ("avx512er", 27),
            ("avx512cd", 28),
            ("sha-ni", 29),
            ("avx512bw", 30),
            ("avx512vl", 31),
        ],
    ),
    (
        7,
        0,
        Reg::Ecx,
        &[
            ("avx512vbmi", 1),
            ("umip", 2),
            ("pku", 3),
            ("waitpkg", 5),
            ("avx512vbmi2", 6),
            ("gfni", 8),
            ("vaes", 9),
            ("vpclmulqdq", 10),
            ("avx512vnni", 11),
            ("avx512bitalg", 12),
            ("avx512-vpopcntdq", 14),
            ("la57", 16),
            ("rdpid", 22),
            ("bus-lock-detect", 24),
            ("cldemote", 25),
            ("movdiri", 27),
            ("movdir64b", 28),
        ],
    ),
    (
        7,
        0,
        Reg::Edx,
        &[
            ("avx512-4vnniw", 2),
            ("avx512-4fmaps", 3),
            ("fsrm", 4),
            ("avx512-vp2intersect", 8),
            ("md-clear", 10),
            ("serialize", 14),
            ("tsx-ldtrk", 16),
            ("amx-bf16", 22),
            ("avx512-fp16", 23),
            ("amx-tile", 24),
            ("amx-int8", 25),
            ("spec-ctrl", 26),
            ("stibp", 27),
            ("flush-l1d", 28),
            ("arch-capabilities", 29),
            ("core-capability", 30),
            ("ssbd", 31),
        ],
    ),
    (
        7,
        1,
        Reg::Eax,
        &[
            ("avx-vnni", 4),
            ("avx512-bf16", 5),
            ("fzrm", 10),
            ("fsrs", 11),
            ("fsrc", 12),
        ],
    ),
    (
        0xd,
        1,
        Reg::Eax,
        &[
            ("xsaveopt", 0),
            ("xsavec", 1),
            ("xgetbv1", 2),
            ("xsaves", 3),
        ],
    ),
    (
        0x8000_0001,
        0,
        Reg::Ecx,
        &[
            ("lahf_lm", 0),
            ("cmp_legacy", 1),
            ("svm", 2),
            ("extapic", 3),
            ("cr8legacy", 4),
            ("abm", 5),
            ("sse4a", 6),
            ("misalignsse", 7),
            ("3dnowprefetch", 8),
            ("osvw", 9),
            ("ibs", 10),
            ("xop", 11),
            ("skinit", 12),
            ("wdt", 13),
            ("lwp", 15),
            ("fma4", 16),
            ("tce", 17),
            ("nodeid_msr", 19),
            ("tbm", 21),
            ("topoext", 22),
            ("perfctr_core", 23),
            ("perfctr_nb", 24),
        ],
    ),
    (
        0x8000_0001,
        0,
        Reg::Edx,
        &[
            ("syscall", 11),
            ("nx", 20),
            ("mmxext", 22),
            ("fxsr_opt", 25),
            ("pdpe1gb", 26),
            ("rdtscp", 27),
            ("lm", 29),
            ("3dnowext", 30),
            ("3dnow", 31),
        ],
    ),
    (0x8000_0007, 0, Reg::Edx, &[("invtsc", 8)]),
    (
        0x8000_0008,
        0,
        Reg::Ebx,
        &[
            ("clzero", 0),
            ("xsaveerptr", 2),
            ("wbnoinvd", 9),
            ("ibpb", 12),
            ("ibrs", 14),
            ("amd-stibp", 15),
            ("amd-ssbd", 24),
            ("virt-ssbd", 25),
            ("amd-no-ssb", 26),
        ],
    ),
];

/// Every feature and its place.
pub fn all() -> impl Iterator<Item = (&'static str, Place)> {
    GROUPS.iter().flat_map(|&(function, index, reg, names)| {
        names.iter().map(move |&(name, bit)| {
            let place = Place {
                function,
                index,
                reg,
                bit,
            };
            (name, place)
        })
    })
}

/// Where the feature `name` is shown; libvirt's and QEMU's other spellings are understood.
pub fn find(name: &str) -> Option<Place> {
    let name = match name {
        "sse3" => "pni",
        "pclmulqdq" => "pclmuldq",
        "sse4_1" => "sse4.1",
        "sse4_2" => "sse4.2",
        "tsc_deadline" => "tsc-deadline",
        "lahf-lm" => "lahf_lm",
        "sha_ni" => "sha-ni",
        "fxsr-opt" => "fxsr_opt",
        "tsc-adjust" => "tsc_adjust",
        other => other,
    };
    all().find(|(known, _)| *known == name).map(|(_, p)| p)
}
