//! A vCPU's whole state, the same for every backend.

use serde::{Deserialize, Serialize};

/// General registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Regs {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base.
    pub base: u64,
    /// Limit in bytes (granularity applied).
    pub limit: u32,
    /// Access rights as in bits 8..24 of a descriptor's second doubleword (type, S, DPL, P,
    /// limit bits zero, AVL, L, D/B, G), shifted right by 8; bit 16 set = unusable.
    pub access: u32,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// System registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Sregs {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: Table,
    pub idt: Table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
}

/// What a vCPU is doing (KVM's MP states).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Executing.
    #[default]
    Runnable,
    /// In `hlt`.
    Halted,
    /// After INIT, or an application processor before its first SIPI.
    WaitForSipi,
}

/// Events in flight between two instructions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Exception to be delivered: vector and error code.
    pub exception: Option<(u8, Option<u32>)>,
    /// Interrupt accepted from the APIC but not yet delivered.
    pub interrupt: Option<u8>,
    /// One instruction after `sti` or `mov ss`.
    pub interrupt_shadow: bool,
    /// An NMI is waiting.
    pub nmi_pending: bool,
    /// NMIs are blocked until `iret`.
    pub nmi_masked: bool,
}

/// Everything a guest can observe of a vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers, RIP, RFLAGS.
    pub regs: Regs,
    /// Segments, tables, control registers.
    pub sregs: Sregs,
    /// DR0..DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// XSAVE area in standard (non-compacted) form (Intel SDM vol. 1, 13.4); the legacy
    /// FXSAVE image is its first 512 bytes.
    pub xsave: Vec<u8>,
    /// XCR0.
    pub xcr0: u64,
    /// Model-specific registers: index, value.
    pub msrs: Vec<(u32, u64)>,
    /// The local APIC's register page, 1 KiB, as KVM_GET_LAPIC gives it.
    pub apic: Vec<u8>,
    /// Executing, halted, waiting.
    pub run_state: RunState,
    /// Events in flight.
    pub events: Events,
}
