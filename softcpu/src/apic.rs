//! The local APIC.

use std::sync::Arc;

use crate::attention::Attention;
use crate::exception::{Exception, Fallible};

/// What the core has to do after a write to a local APIC register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApicEffect {
    /// Nothing.
    None,
    /// A level-triggered interrupt with this vector was acknowledged: leave `run` with
    /// `Exit::IoapicEoi`.
    Eoi(u8),
}

/// One vCPU's local APIC. Other threads inject through it.
#[derive(Debug)]
pub struct Apic {
    id: u32,
    attention: Arc<Attention>,
}

impl Apic {
    /// A local APIC after reset.
    pub fn new(id: u32, attention: Arc<Attention>) -> Self {
        Self { id, attention }
    }

    /// Initial APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The flags of the vCPU it belongs to.
    pub fn attention(&self) -> &Arc<Attention> {
        &self.attention
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        0xfee0_0900
    }

    /// Host TSC value at which the timer has to be looked at (`poll_timer`); `u64::MAX`: never.
    pub fn deadline(&self) -> u64 {
        u64::MAX
    }

    /// Fires the timer if the host's TSC has passed its deadline.
    pub fn poll_timer(&self, host_tsc: u64) {
        let _ = host_tsc;
    }

    /// Takes the interrupt to deliver now, moving it from IRR to ISR; `None` where priorities
    /// hold everything back. Clears `Attention::IRQ` when nothing more is deliverable.
    pub fn take_interrupt(&self) -> Option<u8> {
        self.attention.clear(Attention::IRQ);
        None
    }

    /// CR8 (bits 4..8 of TPR).
    pub fn cr8(&self) -> u64 {
        0
    }

    /// Sets CR8.
    pub fn set_cr8(&self, value: u64) {
        let _ = value;
    }

    /// Reads 32 bits at `offset` (16-byte aligned) of the register page.
    pub fn mmio_read(&self, offset: u32) -> u32 {
        let _ = offset;
        0
    }

    /// Writes 32 bits at `offset` (16-byte aligned) of the register page.
    pub fn mmio_write(&self, offset: u32, value: u32) -> ApicEffect {
        let _ = (offset, value);
        ApicEffect::None
    }

    /// Reads IA32_APIC_BASE, TSC_DEADLINE or an x2APIC MSR.
    pub fn msr_read(&self, index: u32) -> Fallible<u64> {
        let _ = index;
        Err(Exception::GP0)
    }

    /// Writes IA32_APIC_BASE, TSC_DEADLINE or an x2APIC MSR.
    pub fn msr_write(&self, index: u32, value: u64) -> Fallible<ApicEffect> {
        let _ = (index, value);
        Err(Exception::GP0)
    }
}
