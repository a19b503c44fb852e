//! Which encoding forms can be compared.

use crate::case::Shape;
use iced_x86::{
    Code, CpuidFeature, DecoderOptions, EncodingKind, Instruction, MemorySize, Mnemonic,
    OpCodeOperandKind as K, OpKind, Register,
};

/// Instructions that can't be compared: what they give depends on the machine around them, or
/// the host's kernel steps in.
fn excluded(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    let name = format!("{mnemonic:?}");
    // Where the last x87 instruction was, differs.
    let saves_pointers =
        name.starts_with("Fxsave") || name.starts_with("Xsave") || name.starts_with("Xrstor");
    saves_pointers
        || matches!(
            mnemonic,
            M::INVALID
                | M::Syscall
                | M::Sysret
                | M::Sysretq
                | M::Sysenter
                | M::Sysexit
                | M::Sysexitq
                | M::Int
                | M::Int1
                | M::Into
                | M::Iret
                | M::Iretd
                | M::Iretq
                | M::Retf
                | M::Ret
                | M::Jmpe
                | M::Rdtsc
                | M::Rdtscp
                | M::Rdpmc
                | M::Rdpru
                | M::Cpuid
                | M::Rdrand
                | M::Rdseed
                | M::Rdpid
                | M::Sgdt
                | M::Sidt
                | M::Sldt
                | M::Str
                | M::Smsw
                | M::Lsl
                | M::Lar
                | M::Verr
                | M::Verw
                | M::Lfs
                | M::Lgs
                | M::Lss
                | M::Wrfsbase
                | M::Wrgsbase
                | M::Rdfsbase
                | M::Rdgsbase
                | M::Popfq
                | M::Popf
                | M::Popfd
                | M::Xbegin
                | M::Xabort
                | M::Xend
                | M::Xtest
                | M::Monitor
                | M::Monitorx
                | M::Mwait
                | M::Mwaitx
                | M::Vmcall
                | M::Vmmcall
                | M::Clzero
                | M::Fnsave
                | M::Fnstenv
                | M::Fsave
                | M::Fstenv
                | M::Xgetbv
                | M::Mcommit
                | M::Umonitor
                | M::Umwait
                | M::Tpause
                | M::Ptwrite
                | M::Enter
                | M::Skinit
                | M::Getsec
                | M::Rsm
        )
}

/// Loads of segment registers, which 64-bit mode doesn't have.
fn excluded_in_32(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Lds | Mnemonic::Les | Mnemonic::Jmpe)
}

/// Whether host and model both have the feature.
fn has(feature: CpuidFeature) -> bool {
    use CpuidFeature as C;
    let fp = softcpu::simd::host_fp_features();
    match feature {
        C::INTEL8086
        | C::INTEL186
        | C::INTEL286
        | C::INTEL386
        | C::INTEL486
        | C::X64
        | C::CPUID
        | C::CX8
        | C::CMOV
        | C::MULTIBYTENOP
        | C::PAUSE
        | C::FPU
        | C::FPU287
        | C::FPU387
        | C::MMX
        | C::SSE
        | C::SSE2
        | C::FXSR
        | C::CLFSH => true,
        C::SSE3 => fp.sse3(),
        C::SSSE3 => fp.ssse3(),
        C::SSE4_1 => fp.sse41(),
        C::SSE4_2 => fp.sse42(),
        C::SSE4A => fp.sse4a(),
        C::AES => fp.aes(),
        C::PCLMULQDQ => fp.pclmulqdq(),
        C::SHA => fp.sha(),
        C::AVX => fp.avx(),
        C::AVX2 => fp.avx2(),
        C::FMA => fp.fma(),
        C::F16C => std::arch::is_x86_feature_detected!("f16c"),
        C::VAES => fp.vaes(),
        C::VPCLMULQDQ => fp.vpclmulqdq(),
        C::BMI1 => std::arch::is_x86_feature_detected!("bmi1"),
        C::BMI2 => std::arch::is_x86_feature_detected!("bmi2"),
        C::ADX => std::arch::is_x86_feature_detected!("adx"),
        C::LZCNT => std::arch::is_x86_feature_detected!("lzcnt"),
        C::POPCNT => std::arch::is_x86_feature_detected!("popcnt"),
        C::MOVBE => std::arch::is_x86_feature_detected!("movbe"),
        C::CMPXCHG16B => std::arch::is_x86_feature_detected!("cmpxchg16b"),
        C::PREFETCHW => true,
        _ => false,
    }
}

/// All instructions that `filter` (a part of the name) lets through.
pub fn codes(shape: Shape, filter: Option<&str>) -> Vec<Code> {
    let bits = shape.bits;
    Code::values()
        .filter(|&code| {
            let info = code.op_code();
            info.is_instruction()
                && match bits {
                    64 => info.mode64(),
                    32 => info.mode32() && !excluded_in_32(code.mnemonic()),
                    _ => info.mode16() && !excluded_in_32(code.mnemonic()),
                }
                && !info.is_privileged()
                && info.decoder_option() == DecoderOptions::NONE
                && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                && code.cpuid_features().iter().all(|&f| has(f))
                && !excluded(code.mnemonic())
                && !info.op_kinds().iter().any(|k| {
                    matches!(
                        k,
                        K::farbr2_2
                            | K::farbr4_2
                            | K::seg_reg
                            | K::cs
                            | K::ds
                            | K::es
                            | K::fs
                            | K::gs
                            | K::ss
                            | K::cr_reg
                            | K::dr_reg
                            | K::tr_reg
                            | K::mem_offs
                    )
                })
                && (shape.segmented
                    || !info
                        .op_kinds()
                        .iter()
                        .any(|k| matches!(k, K::br16_1 | K::br16_2)))
                && !code.is_jmp_near_indirect()
                && !code.is_jmp_far_indirect()
                && !code.is_call_near_indirect()
                && !code.is_call_far_indirect()
                && filter.is_none_or(|f| {
                    format!("{code:?}")
                        .to_lowercase()
                        .contains(&f.to_lowercase())
                })
        })
        .collect()
}

/// Whether this use of an allowed form can be compared.
pub fn comparable(insn: &Instruction) -> bool {
    let memory = insn.op_kinds().any(|k| k == OpKind::Memory);
    let name = format!("{:?}", insn.code());
    // AMD has no register forms of 0F0D.
    let missing = name.starts_with("Reservednop") && insn.op0_kind() == OpKind::Register;
    // Some read only the 24 bytes that count.
    let partial = insn.code() == Code::VEX_Vmovddup_ymm_ymmm256 && memory;
    // AMD's reads 32 bits there.
    let partial = partial || insn.code() == Code::Movsxd_r16_rm16 && memory;
    // The result of a 16-bit double shift by more than 16.
    let undefined = matches!(insn.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && insn.op1_register().size() == 2
        && (insn.op2_kind() != OpKind::Immediate8 || insn.immediate8() & 31 > 15);
    let sizeless = insn.memory_size() == MemorySize::Unknown
        && memory
        && !matches!(insn.mnemonic(), Mnemonic::Lea | Mnemonic::Nop);
    // The host's FS and GS bases are its own.
    let based = matches!(insn.segment_prefix(), Register::FS | Register::GS);
    !(missing || partial || undefined || sizeless || based)
}
