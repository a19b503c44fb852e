//! Which floating-point and SIMD instructions exist.

use std::sync::OnceLock;

use iced_x86::{CpuidFeature, Instruction, Mnemonic};

use crate::features::Features;

/// Whether the instruction belongs to this module, whatever the vCPU offers.
pub(super) fn is_fp(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let integer = matches!(
        insn.mnemonic(),
        M::Crc32
            | M::Popcnt
            | M::Lfence
            | M::Mfence
            | M::Sfence
            | M::Pause
            | M::Clflush
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Prefetchw
            | M::Prefetch
            | M::Xgetbv
            | M::Xsetbv
    );
    insn.mnemonic() == M::Wait
        || !integer && insn.cpuid_features().iter().any(|&f| class(f).is_some())
}

/// Whether the vCPU's CPUID offers everything the instruction needs, and the host has it: a
/// CPUID made for another host must not make this one fault.
pub(super) fn offered(insn: &Instruction, features: &Features) -> bool {
    let host = host_fp_features();
    insn.cpuid_features()
        .iter()
        .all(|&f| class(f).is_none_or(|word| word(features) && word(&host)))
}

/// How to ask for a feature of this module; `None`: not one.
fn class(feature: CpuidFeature) -> Option<fn(&Features) -> bool> {
    use CpuidFeature as C;
    Some(match feature {
        C::FPU | C::FPU287 | C::FPU387 => |f| f.l1_edx & 1 != 0,
        C::MMX => Features::mmx,
        C::FXSR => Features::fxsr,
        C::SSE => Features::sse,
        C::SSE2 => Features::sse2,
        C::SSE3 => Features::sse3,
        C::SSSE3 => Features::ssse3,
        C::SSE4_1 => Features::sse41,
        C::SSE4_2 => Features::sse42,
        C::SSE4A => Features::sse4a,
        C::AES => Features::aes,
        C::PCLMULQDQ => Features::pclmulqdq,
        C::SHA => Features::sha,
        C::XSAVE => Features::xsave,
        C::XSAVEOPT => Features::xsaveopt,
        C::XSAVEC => Features::xsavec,
        C::XSAVES => Features::xsaves,
        C::AVX => Features::avx,
        C::AVX2 => Features::avx2,
        C::FMA => Features::fma,
        C::F16C => |f| f.l1_ecx & 1 << 29 != 0,
        C::VAES => Features::vaes,
        C::VPCLMULQDQ => Features::vpclmulqdq,
        C::GFNI => |f| f.l7_ecx & 1 << 8 != 0,
        C::FPU287XL_ONLY
        | C::FPU387SL_ONLY
        | C::CYRIX_FPU
        | C::D3NOW
        | C::D3NOWEXT
        | C::CYRIX_D3NOW
        | C::CYRIX_EMMI
        | C::FMA4
        | C::XOP
        | C::AVX_VNNI
        | C::AVX_IFMA
        | C::AVX_NE_CONVERT
        | C::AVX_VNNI_INT8
        | C::AVX_VNNI_INT16
        | C::AVX512F => |_| false,
        _ => return None,
    })
}

/// The floating-point and SIMD features this host can execute, and with it those a model may
/// offer. Words and bits that are no such features are 0.
///
/// AVX and what builds on it need the host's operating system to save its registers.
pub fn host_fp_features() -> Features {
    // On a host that is itself virtual each CPUID takes long.
    static HOST: OnceLock<Features> = OnceLock::new();
    *HOST.get_or_init(ask_host)
}

fn ask_host() -> Features {
    use std::arch::x86_64::{__cpuid_count, _xgetbv};
    let leaf = |function: u32, index| {
        if __cpuid_count(function & 0x8000_0000, 0).eax >= function {
            let r = __cpuid_count(function, index);
            (r.eax, r.ebx, r.ecx, r.edx)
        } else {
            (0, 0, 0, 0)
        }
    };
    let (_, _, l1_ecx, l1_edx) = leaf(1, 0);
    let (_, l7_ebx, l7_ecx, _) = leaf(7, 0);
    let (_, _, e1_ecx, e1_edx) = leaf(0x8000_0001, 0);
    let osxsave = l1_ecx & 1 << 27 != 0;
    // SAFETY: CPUID just said that XGETBV exists and the operating system enabled it.
    let avx = osxsave && unsafe { xcr0() } & 6 == 6 && l1_ecx & 1 << 28 != 0;
    /// XCR0.
    ///
    /// # Safety
    /// CR4.OSXSAVE is set.
    #[target_feature(enable = "xsave")]
    unsafe fn xcr0() -> u64 {
        // SAFETY: the caller's promise.
        unsafe { _xgetbv(0) }
    }
    // SSE3 PCLMULQDQ SSSE3 SSE4.1 SSE4.2 AES; FMA XSAVE AVX F16C.
    let ecx = 1 << 0 | 1 << 1 | 1 << 9 | 1 << 19 | 1 << 20 | 1 << 25;
    let ecx_avx = 1 << 12 | 1 << 28 | 1 << 29;
    // FPU MMX FXSR SSE SSE2.
    let edx = 1 << 0 | 1 << 23 | 1 << 24 | 1 << 25 | 1 << 26;
    let when = |on: bool, bits: u32| if on { bits } else { 0 };
    Features {
        // XSAVE is done in software.
        l1_ecx: l1_ecx & (ecx | when(avx, ecx_avx)) | 1 << 26,
        l1_edx: l1_edx & edx,
        l7_ebx: l7_ebx & (1 << 29 | when(avx, 1 << 5)),
        l7_ecx: l7_ecx & (1 << 8 | when(avx, 1 << 9 | 1 << 10)),
        // XSAVEOPT, XSAVEC, XGETBV with ECX = 1, XSAVES: software too.
        xsave_eax: 0xf,
        e1_ecx: e1_ecx & 1 << 6,
        e1_edx: e1_edx & (1 << 0 | 1 << 23 | 1 << 24),
        ..Features::default()
    }
}
