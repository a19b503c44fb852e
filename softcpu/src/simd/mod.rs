//! x87, MMX, SSE and AVX: executed by the host's own CPU.
//!
//! For each distinct instruction a small native routine (a thunk) is made once: it loads the
//! guest's vector registers that the instruction uses, runs the guest's own instruction with
//! its memory operand redirected to [RSI], and stores what was written. So results are the
//! host's to the bit: rounding, NaN payloads, flags. All checks and memory accesses happen
//! around it, in Rust. Instructions with several or conditional memory accesses, and those
//! that save and restore state, are done by hand.
//!
//! x87 state stays in the host's x87 unit from one x87 or MMX instruction to the next;
//! `Cpu::sync_fp` fetches it.
//!
//! Needs an x86-64 host.

mod arena;
mod cache;
mod element;
mod env;
mod execute;
mod fast;
mod features;
mod key;
mod runtime;
#[cfg(test)]
mod tests;
mod thunk;
mod xsave;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the software CPU executes floating point on the host: it needs x86-64");

use iced_x86::{CpuidFeature, Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::op::Plain;

pub(crate) use arena::Arena;
pub use fast::Fast;
pub use features::host_fp_features;
pub use runtime::Runtime;

/// How to run a floating-point or SIMD instruction. The core fills in the rest of the `Op`
/// (memory operand, length, offset).
#[derive(Debug, Clone, Copy)]
pub struct FpOp {
    /// Runs it.
    pub handler: Plain,
    /// Runs it too, in most cases faster.
    pub fast: Option<Fast>,
    /// Goes to `Op::a`.
    pub a: u8,
    /// Goes to `Op::b`.
    pub b: u8,
    /// Goes to `Op::imm`: an immediate, or the address of something that lives as long as
    /// the process.
    pub data: u64,
}

/// Recognises every x87, MMX, SSE, AES, PCLMUL, SHA and AVX instruction, and
/// FXSAVE/FXRSTOR/XSAVE*/XRSTOR*/LDMXCSR/STMXCSR/EMMS. `None`: not one of them, or not
/// offered by this vCPU's CPUID. `bytes` is the instruction.
pub fn decode_fp(cpu: &Cpu, insn: &Instruction, bytes: &[u8]) -> Option<FpOp> {
    if !features::is_fp(insn) || !features::offered(insn, &cpu.features) {
        return None;
    }
    if let Some(op) = by_hand(insn) {
        return Some(op);
    }
    let fop = if is_x87(insn) { fop(bytes) } else { 0 };
    let (key, gpr) = key::Key::new(insn, fop)?;
    let (handler, fast, data) = match cache::find(key)? {
        cache::Found::Kept(desc) => (
            execute::kept as Plain,
            fast::handlers(desc),
            std::ptr::from_ref(desc).addr() as u64,
        ),
        cache::Found::NoRoom(desc) => (execute::scratch as Plain, None, desc.key.0),
    };
    Some(FpOp {
        handler,
        fast,
        a: gpr.unwrap_or(0) * 8,
        b: 0,
        data,
    })
}

/// Instructions that are not run by a thunk.
fn by_hand(insn: &Instruction) -> Option<FpOp> {
    use Mnemonic as M;
    let plain = |handler: Plain, data: u64| {
        Some(FpOp {
            handler,
            fast: None,
            a: 0,
            b: 0,
            data,
        })
    };
    match insn.mnemonic() {
        M::Wait => plain(env::wait, 0),
        M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor => {
            // 14/28 bytes, with 80 more of registers: the operand size.
            let wide = matches!(insn.memory_size().size(), 28 | 108);
            plain(
                match insn.mnemonic() {
                    M::Fnstenv => env::fnstenv,
                    M::Fldenv => env::fldenv,
                    M::Fnsave => env::fnsave,
                    _ => env::frstor,
                },
                wide.into(),
            )
        }
        M::Fxsave => plain(xsave::fxsave, 0),
        M::Fxsave64 => plain(xsave::fxsave, 1),
        M::Fxrstor => plain(xsave::fxrstor, 0),
        M::Fxrstor64 => plain(xsave::fxrstor, 1),
        M::Xsave => plain(xsave::xsave, xsave::XSAVE),
        M::Xsave64 => plain(xsave::xsave, xsave::XSAVE | xsave::WIDE),
        M::Xsaveopt => plain(xsave::xsave, xsave::XSAVEOPT),
        M::Xsaveopt64 => plain(xsave::xsave, xsave::XSAVEOPT | xsave::WIDE),
        M::Xsavec => plain(xsave::xsave, xsave::XSAVEC),
        M::Xsavec64 => plain(xsave::xsave, xsave::XSAVEC | xsave::WIDE),
        M::Xsaves => plain(xsave::xsave, xsave::XSAVES),
        M::Xsaves64 => plain(xsave::xsave, xsave::XSAVES | xsave::WIDE),
        M::Xrstor => plain(xsave::xrstor, 0),
        M::Xrstor64 => plain(xsave::xrstor, xsave::WIDE),
        M::Xrstors => plain(xsave::xrstor, xsave::SUPERVISOR),
        M::Xrstors64 => plain(xsave::xrstor, xsave::SUPERVISOR | xsave::WIDE),
        M::Ldmxcsr => plain(xsave::ldmxcsr, 0),
        M::Vldmxcsr => plain(xsave::ldmxcsr, 1),
        M::Stmxcsr => plain(xsave::stmxcsr, 0),
        M::Vstmxcsr => plain(xsave::stmxcsr, 1),
        M::Vzeroupper => plain(xsave::vzero, 0),
        M::Vzeroall => plain(xsave::vzero, 1),
        _ => element::decode(insn),
    }
}

/// What translated code must see to for an SSE instruction that it runs itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plainly {
    /// Mask of address bits that must be 0.
    pub align: u8,
    /// It uses MXCSR.
    pub mxcsr: bool,
}

/// How an SSE instruction can be run as it is, on the guest's XMM registers. `None`: only by its
/// thunk.
pub(crate) fn plainly(cpu: &Cpu, insn: &Instruction) -> Option<Plainly> {
    if !features::is_fp(insn) || !features::offered(insn, &cpu.features) || is_x87(insn) {
        return None;
    }
    if by_hand(insn).is_some() {
        return None;
    }
    let (key, _) = key::Key::new(insn, 0)?;
    match cache::find(key)? {
        cache::Found::Kept(desc) => desc.plainly(insn),
        cache::Found::NoRoom(_) => None,
    }
}

/// Whether it belongs to the x87 instruction set.
fn is_x87(insn: &Instruction) -> bool {
    insn.cpuid_features().iter().any(|f| {
        matches!(
            f,
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
        )
    })
}

/// The 11 opcode bits an x87 instruction leaves in FOP (Intel SDM vol. 1, 8.1.9).
fn fop(bytes: &[u8]) -> u16 {
    match bytes.iter().position(|b| (0xd8..=0xdf).contains(b)) {
        Some(i) => {
            let modrm = bytes.get(i + 1).copied().unwrap_or_default();
            u16::from(bytes[i] & 7) << 8 | u16::from(modrm)
        }
        None => 0,
    }
}
