//! Steal time: how long the vCPU's thread waited for a host CPU, and whether the vCPU runs at
//! all now (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME).
//!
//! A vCPU that sleeps or is out of `run` says so in its record. Others then don't interrupt it
//! to flush its TLB, but leave a note (PV TLB flush) that is read before it goes on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering, fence};

use crate::cpu::{Cpu, host_tsc};
use crate::tsc;

// struct kvm_steal_time.
const STEAL: u64 = 0;
const VERSION: u64 = 8;
const PREEMPTED: u64 = 16;

/// In `preempted`: the vCPU does not run.
const AWAY: u8 = 1;
/// In `preempted`: its TLB is to be flushed before it runs on.
const FLUSH_TLB: u8 = 2;

/// Bits of the MSR that must be zero.
pub(super) const RESERVED: u64 = 0x3e;
const ENABLED: u64 = 1;

/// Nanoseconds between two updates at least.
const INTERVAL_NS: u64 = 1_000_000;

/// A vCPU's own part.
#[derive(Debug, Default)]
pub struct Steal {
    /// The MSR: where the record is (64-byte aligned, guest-physical); bit 0: enabled.
    pub msr: u64,
    /// The thread's scheduler statistics, open for as long as it runs the vCPU.
    statistics: Option<File>,
    /// Nanoseconds of waiting that the guest has been told of.
    told: u64,
    /// Host TSC of the next update.
    next: u64,
}

impl Steal {
    /// Nanoseconds the calling thread has waited for a host CPU; 0 where Linux doesn't tell.
    fn waited(&mut self) -> u64 {
        if self.statistics.is_none() {
            self.statistics = File::open("/proc/thread-self/schedstat").ok();
        }
        let mut text = [0; 96];
        let Some(Ok(len)) = self.statistics.as_ref().map(|f| f.read_at(&mut text, 0)) else {
            return 0;
        };
        // Time on a CPU, time waiting for one, turns.
        std::str::from_utf8(&text[..len])
            .ok()
            .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse().ok())
            .unwrap_or(0)
    }
}

impl Cpu {
    fn steal_record(&self) -> Option<u64> {
        let msr = self.pv.steal.msr;
        (msr & ENABLED != 0).then_some(msr & !(ENABLED | RESERVED))
    }

    /// WRMSR.
    pub(super) fn set_steal_time(&mut self, value: u64) {
        self.pv.steal.msr = value;
        if value & ENABLED != 0 {
            self.pv.steal.told = self.pv.steal.waited();
            self.pv.steal.next = 0;
            self.steal_back();
        }
    }

    /// Brings the record up to date, if that is due.
    pub(crate) fn update_steal_time(&mut self) {
        let Some(record) = self.steal_record() else {
            return;
        };
        let now = host_tsc();
        if now < self.pv.steal.next {
            return;
        }
        self.pv.steal.next = now.saturating_add(tsc::from_ns(INTERVAL_NS));
        let waited = self.pv.steal.waited();
        let more = waited.saturating_sub(self.pv.steal.told);
        self.pv.steal.told = waited;
        if more == 0 {
            return;
        }
        let memory = &self.machine.memory;
        let (mut steal, mut version) = ([0; 8], [0; 4]);
        if !memory.read(record + STEAL, &mut steal) || !memory.read(record + VERSION, &mut version)
        {
            log::debug!("the guest's steal time {record:#x} is not RAM");
            return;
        }
        // Odd while it changes.
        let version = u32::from_le_bytes(version) | 1;
        let steal = u64::from_le_bytes(steal).wrapping_add(more);
        self.pv_write(record + VERSION, &version.to_le_bytes());
        fence(Ordering::SeqCst);
        self.pv_write(record + STEAL, &steal.to_le_bytes());
        fence(Ordering::SeqCst);
        self.pv_write(record + VERSION, &version.wrapping_add(1).to_le_bytes());
    }

    /// Replaces the record's `preempted`; what it was.
    fn swap_preempted(&self, value: u8) -> u8 {
        let Some(gpa) = self.steal_record().map(|record| record + PREEMPTED) else {
            return 0;
        };
        let Some(slot) = self.slots.find(gpa).filter(|slot| !slot.readonly) else {
            return 0;
        };
        slot.mark_dirty(gpa);
        // SAFETY: `find` returned the slot that holds gpa; its memory stays mapped while
        // `slots` does, and others touch this byte atomically or not at all.
        unsafe {
            let byte = slot.host.add((gpa - slot.gpa) as usize);
            AtomicU8::from_ptr(byte).swap(value, Ordering::SeqCst)
        }
    }

    /// The vCPU stops running for a while.
    pub(crate) fn steal_away(&self) {
        self.swap_preempted(AWAY);
    }

    /// It runs again: does what others left for it to do.
    pub(crate) fn steal_back(&mut self) {
        if self.swap_preempted(0) & FLUSH_TLB != 0 {
            self.flush_tlb_all();
        }
    }

    /// The thread that ran the vCPU may be another one next time.
    pub(crate) fn forget_thread(&mut self) {
        if self.steal_record().is_some() {
            self.update_steal_time();
            self.pv.steal.statistics = None;
        }
    }
}
