//! x87, MMX, SSE and AVX: executed by the host's own CPU.

use iced_x86::Instruction;

use crate::cpu::Cpu;
use crate::op::Plain;

/// How to run a floating-point or SIMD instruction. The core fills in the rest of the `Op`
/// (memory operand, length, offset).
#[derive(Debug, Clone, Copy)]
pub struct FpOp {
    /// Runs it.
    pub handler: Plain,
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
    let _ = (cpu, insn, bytes);
    None
}
