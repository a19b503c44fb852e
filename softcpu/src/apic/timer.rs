//! The APIC timer (SDM vol. 3, 11.5.4): one-shot and periodic at 1 GHz divided, and
//! TSC-deadline. Time is the host's TSC throughout.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Apic, LVT_MASKED, reg};
use crate::tsc;

/// No deadline.
const NEVER: u64 = u64::MAX;

/// Shortest period in nanoseconds: a guest that asks for less gets interrupts this often.
const MIN_PERIOD_NS: u64 = 20_000;

#[derive(Debug)]
pub(super) struct Timer {
    /// Host TSC at which it fires.
    deadline: AtomicU64,
    /// What the guest wrote to IA32_TSC_DEADLINE; 0: not armed.
    guest_deadline: AtomicU64,
    /// Guest TSC less host TSC.
    tsc_offset: AtomicU64,
}

impl Default for Timer {
    fn default() -> Self {
        Self {
            deadline: AtomicU64::new(NEVER),
            guest_deadline: AtomicU64::new(0),
            tsc_offset: AtomicU64::new(0),
        }
    }
}

impl Timer {
    pub(super) fn stop(&self) {
        self.deadline.store(NEVER, Ordering::Relaxed);
        self.guest_deadline.store(0, Ordering::Relaxed);
    }
}

/// The modes of the timer's LVT entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl Apic {
    pub(super) fn timer_mode(&self) -> TimerMode {
        match self.get(reg::LVT_TIMER) >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            // 3 is reserved, and never stored.
            _ => TimerMode::TscDeadline,
        }
    }

    /// Host TSC value at which the timer has to be looked at (`poll_timer`); `u64::MAX`: never.
    pub fn deadline(&self) -> u64 {
        self.timer.deadline.load(Ordering::Relaxed)
    }

    /// Fires the timer if the host's TSC has passed its deadline.
    pub fn poll_timer(&self, host_tsc: u64) {
        let deadline = self.deadline();
        if host_tsc < deadline {
            return;
        }
        let next = match self.timer_mode() {
            TimerMode::Periodic => {
                let period = tsc::from_ns(self.count_to_ns(self.get(reg::INITIAL_COUNT)));
                let period = period.max(tsc::from_ns(MIN_PERIOD_NS));
                // Ticks that were missed altogether are lost, as on a stopped processor.
                deadline.saturating_add(period).max(host_tsc)
            }
            TimerMode::OneShot => NEVER,
            TimerMode::TscDeadline => {
                self.timer.guest_deadline.store(0, Ordering::Relaxed);
                NEVER
            }
        };
        self.timer.deadline.store(next, Ordering::Relaxed);
        if self.get(reg::LVT_TIMER) & LVT_MASKED == 0 {
            self.fire(reg::LVT_TIMER);
        }
    }

    /// The divisor in DCR: bits 0, 1 and 3 (SDM figure 11-10).
    fn divisor_shift(&self) -> u32 {
        let value = self.get(reg::DIVIDE);
        ((value & 3 | value >> 1 & 4) + 1) & 7
    }

    fn count_to_ns(&self, count: u32) -> u64 {
        u64::from(count) << self.divisor_shift()
    }

    /// Starts counting down from `count`; 0 stops.
    pub(super) fn restart_timer(&self, count: u32, now: u64) {
        if self.timer_mode() == TimerMode::TscDeadline {
            return;
        }
        let deadline = match count {
            0 => NEVER,
            _ => now.saturating_add(tsc::from_ns(self.count_to_ns(count))),
        };
        self.timer.deadline.store(deadline, Ordering::Relaxed);
    }

    /// The current-count register.
    pub(super) fn current_count(&self, now: u64) -> u32 {
        let deadline = self.deadline();
        if self.timer_mode() == TimerMode::TscDeadline || deadline == NEVER {
            return 0;
        }
        let ns = tsc::to_ns(deadline.saturating_sub(now));
        u32::try_from(ns >> self.divisor_shift()).unwrap_or(u32::MAX)
    }

    /// A new divisor: what is left is counted at the new speed.
    pub(super) fn set_divisor(&self, value: u32, now: u64) {
        let left = self.current_count(now);
        self.set(reg::DIVIDE, value & 0xb);
        if left > 0 {
            self.restart_timer(left, now);
        }
    }

    /// A new LVT entry: into and out of TSC-deadline mode disarms the timer.
    pub(super) fn set_timer_lvt(&self, value: u32) {
        let old = self.timer_mode();
        self.set(reg::LVT_TIMER, value);
        let new = self.timer_mode();
        if old != new && (old == TimerMode::TscDeadline || new == TimerMode::TscDeadline) {
            self.timer.stop();
            self.set(reg::INITIAL_COUNT, 0);
        }
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        self.timer.guest_deadline.load(Ordering::Relaxed)
    }

    /// Arms the timer for guest TSC `value` (0: disarms), at host TSC `now`. Without effect in
    /// the other modes.
    pub fn set_tsc_deadline(&self, value: u64, now: u64) {
        if self.timer_mode() != TimerMode::TscDeadline {
            return;
        }
        let guest_now = now.wrapping_add(self.timer.tsc_offset.load(Ordering::Relaxed));
        let deadline = match value {
            0 => NEVER,
            _ => now.saturating_add(value.saturating_sub(guest_now)),
        };
        self.timer.guest_deadline.store(value, Ordering::Relaxed);
        self.timer.deadline.store(deadline, Ordering::Relaxed);
    }

    /// The guest's TSC is now the host's plus `offset`: an armed deadline moves with it.
    pub fn set_tsc_offset(&self, offset: u64, now: u64) {
        let old = self.timer.tsc_offset.swap(offset, Ordering::Relaxed);
        let armed = self.tsc_deadline();
        if old != offset && armed != 0 {
            self.set_tsc_deadline(armed, now);
        }
    }
}
