//! What CPUID offers, in the form the decoder asks for it.

/// The feature words of CPUID that decide which instructions exist.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// Leaf 1, ECX.
    pub l1_ecx: u32,
    /// Leaf 1, EDX.
    pub l1_edx: u32,
    /// Leaf 7.0, EBX.
    pub l7_ebx: u32,
    /// Leaf 7.0, ECX.
    pub l7_ecx: u32,
    /// Leaf 7.0, EDX.
    pub l7_edx: u32,
    /// Leaf 0xd.1, EAX.
    pub xsave_eax: u32,
    /// Leaf 0x8000_0001, ECX.
    pub e1_ecx: u32,
    /// Leaf 0x8000_0001, EDX.
    pub e1_edx: u32,
    /// Leaf 0x8000_0008, EBX.
    pub e8_ebx: u32,
    /// AMD's or Hygon's, by leaf 0.
    pub amd: bool,
    /// Physical address width in bits (leaf 0x8000_0008, EAX bits 0..8; 36 without it).
    pub phys_bits: u8,
}

macro_rules! bits {
    ($($name:ident: $field:ident[$bit:literal], $doc:literal;)*) => {
        impl Features {
            $(#[doc = $doc]
            #[inline]
            pub const fn $name(&self) -> bool {
                self.$field >> $bit & 1 != 0
            })*
        }
    };
}

bits! {
    sse3: l1_ecx[0], "SSE3.";
    pclmulqdq: l1_ecx[1], "PCLMULQDQ.";
    monitor: l1_ecx[3], "MONITOR/MWAIT.";
    ssse3: l1_ecx[9], "SSSE3.";
    fma: l1_ecx[12], "FMA.";
    cx16: l1_ecx[13], "CMPXCHG16B.";
    pcid: l1_ecx[17], "PCID.";
    sse41: l1_ecx[19], "SSE4.1.";
    sse42: l1_ecx[20], "SSE4.2.";
    x2apic: l1_ecx[21], "x2APIC.";
    movbe: l1_ecx[22], "MOVBE.";
    popcnt: l1_ecx[23], "POPCNT.";
    tsc_deadline: l1_ecx[24], "The local APIC timer's TSC-deadline mode.";
    aes: l1_ecx[25], "AES.";
    xsave: l1_ecx[26], "XSAVE.";
    avx: l1_ecx[28], "AVX.";
    f16c: l1_ecx[29], "F16C.";
    rdrand: l1_ecx[30], "RDRAND.";
    fpu: l1_edx[0], "x87.";
    vme: l1_edx[1], "Virtual-8086 mode extensions.";
    de: l1_edx[2], "Debugging extensions.";
    pse: l1_edx[3], "4 MiB pages.";
    tsc: l1_edx[4], "RDTSC.";
    msr: l1_edx[5], "RDMSR and WRMSR.";
    pae: l1_edx[6], "PAE.";
    mce: l1_edx[7], "Machine checks.";
    cx8: l1_edx[8], "CMPXCHG8B.";
    sep: l1_edx[11], "SYSENTER.";
    mtrr: l1_edx[12], "MTRRs.";
    pge: l1_edx[13], "Global pages.";
    mca: l1_edx[14], "Machine check architecture.";
    cmov: l1_edx[15], "CMOV.";
    pat: l1_edx[16], "The page attribute table.";
    pse36: l1_edx[17], "4 MiB pages beyond 4 GiB.";
    clflush: l1_edx[19], "CLFLUSH.";
    mmx: l1_edx[23], "MMX.";
    fxsr: l1_edx[24], "FXSAVE.";
    sse: l1_edx[25], "SSE.";
    sse2: l1_edx[26], "SSE2.";
    fsgsbase: l7_ebx[0], "RDFSBASE and family.";
    tsc_adjust: l7_ebx[1], "IA32_TSC_ADJUST.";
    bmi1: l7_ebx[3], "BMI1.";
    avx2: l7_ebx[5], "AVX2.";
    smep: l7_ebx[7], "SMEP.";
    bmi2: l7_ebx[8], "BMI2.";
    invpcid: l7_ebx[10], "INVPCID.";
    rdseed: l7_ebx[18], "RDSEED.";
    adx: l7_ebx[19], "ADX.";
    smap: l7_ebx[20], "SMAP.";
    clflushopt: l7_ebx[23], "CLFLUSHOPT.";
    clwb: l7_ebx[24], "CLWB.";
    sha: l7_ebx[29], "SHA.";
    umip: l7_ecx[2], "UMIP.";
    vaes: l7_ecx[9], "VAES.";
    vpclmulqdq: l7_ecx[10], "VPCLMULQDQ.";
    la57: l7_ecx[16], "5-level paging.";
    rdpid: l7_ecx[22], "RDPID.";
    serialize: l7_edx[14], "SERIALIZE.";
    xsaveopt: xsave_eax[0], "XSAVEOPT.";
    xsavec: xsave_eax[1], "XSAVEC.";
    xgetbv1: xsave_eax[2], "XGETBV with ECX = 1.";
    xsaves: xsave_eax[3], "XSAVES.";
    lahf64: e1_ecx[0], "LAHF in 64-bit mode.";
    lzcnt: e1_ecx[5], "LZCNT.";
    sse4a: e1_ecx[6], "SSE4a.";
    osvw: e1_ecx[9], "OSVW.";
    prefetchw: e1_ecx[8], "PREFETCHW.";
    syscall: e1_edx[11], "SYSCALL.";
    nx: e1_edx[20], "No-execute pages.";
    ffxsr: e1_edx[25], "Fast FXSAVE.";
    gib_pages: e1_edx[26], "1 GiB pages.";
    rdtscp: e1_edx[27], "RDTSCP.";
    long_mode: e1_edx[29], "Long mode.";
    clzero: e8_ebx[0], "CLZERO.";
    ibpb: e8_ebx[12], "Prediction barriers by AMD's bit.";
    ibrs: e8_ebx[14], "IBRS by AMD's bit.";
    amd_stibp: e8_ebx[15], "STIBP by AMD's bit.";
    amd_ssbd: e8_ebx[24], "SSBD by AMD's bit.";
}
