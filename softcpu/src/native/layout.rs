//! Where translated code finds things: distances from the `Cpu`.

use std::mem::offset_of;

use crate::cache::CodeCache;
use crate::cpu::Cpu;
use crate::op::Op;
use crate::simd::Runtime;
use crate::state::{CpuState, FpState};
use crate::tlb::TlbSet;

/// RDI points this far into the `Cpu`, so that more of it is within a byte's distance.
pub(super) const BIAS: i32 = 128;

const fn cpu(offset: usize) -> i32 {
    offset as i32 - BIAS
}

const fn state(offset: usize) -> i32 {
    cpu(offset_of!(Cpu, s) + offset)
}

pub(super) const BLOCK_RIP: i32 = state(offset_of!(CpuState, block_rip));
pub(super) const RIP: i32 = state(offset_of!(CpuState, rip));
pub(super) const CC: i32 = state(offset_of!(CpuState, cc));
pub(super) const CR0: i32 = state(offset_of!(CpuState, cr0));
pub(super) const CR4: i32 = state(offset_of!(CpuState, cr4));
pub(super) const MXCSR: i32 = state(offset_of!(CpuState, fp) + offset_of!(FpState, legacy) + 24);
pub(super) const SIMD_LIVE: i32 = cpu(offset_of!(Cpu, fp_runtime) + Runtime::SIMD_LIVE);
pub(super) const HOST_MXCSR: i32 = cpu(offset_of!(Cpu, fp_runtime) + Runtime::HOST_MXCSR as usize);
pub(super) const TLB: i32 = cpu(offset_of!(Cpu, tlb));
pub(super) const LEFT: i32 = cpu(offset_of!(Cpu, left));
pub(super) const LINK: i32 = cpu(offset_of!(Cpu, link));
pub(super) const ATTENTION: i32 = cpu(Cpu::ATTENTION);
pub(super) const ATTENTION_MASK: i32 = cpu(offset_of!(Cpu, attention_mask));
pub(super) const JUMP_KEY: i32 = cpu(offset_of!(Cpu, cache) + CodeCache::KEY);
pub(super) const TLB_READ: i32 = offset_of!(TlbSet, read) as i32;
pub(super) const TLB_WRITE: i32 = offset_of!(TlbSet, write) as i32;
pub(super) const OP_DISP: i32 = offset_of!(Op, disp) as i32;
pub(super) const OP_IMM: i32 = offset_of!(Op, imm) as i32;

/// General register `n`.
pub(super) fn gpr_slot(n: u8) -> i32 {
    state(offset_of!(CpuState, gpr)) + 8 * i32::from(n)
}

/// The low half of vector register `n`.
pub(super) fn xmm_slot(n: u8) -> i32 {
    state(offset_of!(CpuState, fp) + offset_of!(FpState, legacy) + 160) + 16 * i32::from(n)
}

/// Base added to addresses in segment `n`.
pub(super) fn segment_base(n: usize) -> i32 {
    state(offset_of!(CpuState, ea_base)) + 8 * n as i32
}
