//! PV EOI: the guest ends an interrupt by clearing a bit in its memory instead of writing to its
//! APIC (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_EOI_EN).
//!
//! The bit is set with an interrupt that no other one waits behind, and looked at before anything
//! of the APIC's priorities matters again: by then it is clear (the interrupt was ended) or is
//! taken back (its end will be written to the APIC). Nothing is outstanding outside of `run`.

use crate::cpu::Cpu;

const ENABLED: u64 = 1;
/// Bits of the MSR that must be zero.
pub(super) const RESERVED: u64 = 2;
/// In the guest's word: the interrupt can be ended by clearing this.
const PENDING: u8 = 1;

/// A vCPU's own part.
#[derive(Debug, Default)]
pub struct PvEoi {
    /// The MSR: where the guest's word is (4-byte aligned, guest-physical); bit 0: enabled.
    pub msr: u64,
    /// The bit is set for the interrupt in service.
    outstanding: bool,
}

impl PvEoi {
    /// As it is outside of `run`, with this MSR.
    #[must_use]
    pub fn at(msr: u64) -> Self {
        Self {
            msr,
            outstanding: false,
        }
    }
}

impl Cpu {
    /// The low byte of the guest's word, exchanged for `value`. Only this vCPU's own thread and
    /// its guest touch it. `None`: it is not in RAM that can be written.
    fn swap_eoi_word(&self, value: u8) -> Option<u8> {
        let gpa = self.pv.eoi.msr & !(ENABLED | RESERVED);
        let slot = self.slots.find(gpa).filter(|slot| !slot.readonly)?;
        slot.mark_dirty(gpa);
        // SAFETY: `find` says that `gpa` lies in the slot, whose memory stays mapped while the
        // snapshot is held; other threads of a hostile guest may write it too, so atomically.
        let word = unsafe {
            std::sync::atomic::AtomicU8::from_ptr(slot.host.add((gpa - slot.gpa) as usize))
        };
        Some(word.swap(value, std::sync::atomic::Ordering::SeqCst))
    }

    /// After an interrupt of the APIC's was delivered.
    pub(crate) fn offer_eoi(&mut self, vector: u8) {
        if self.pv.eoi.msr & ENABLED == 0 || !self.apic.ends_silently(vector) {
            return;
        }
        self.pv.eoi.outstanding = self.swap_eoi_word(PENDING).is_some();
    }

    /// Before anything depends on what is in service.
    #[inline]
    pub(crate) fn settle_eoi(&mut self) {
        if self.pv.eoi.outstanding {
            self.settle_eoi_now();
        }
    }

    #[cold]
    fn settle_eoi_now(&mut self) {
        self.pv.eoi.outstanding = false;
        if self
            .swap_eoi_word(0)
            .is_some_and(|word| word & PENDING == 0)
        {
            let effect = self.apic.end_of_interrupt();
            self.apic_effect(effect);
        }
    }

    /// WRMSR.
    pub(super) fn set_pv_eoi(&mut self, value: u64) {
        self.settle_eoi();
        self.pv.eoi.msr = value;
    }
}
