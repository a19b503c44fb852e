//! The watchdog's registers and two-stage timer (Intel 6300ESB I/O Controller Hub datasheet,
//! order number 300641, chapter 18), without PCI and without a clock: time is passed in.

use serde::{Deserialize, Serialize};

use crate::num::{low8, low16};

/// The timer counts the PCI clock, 33 MHz, divided by 2^15 or by 2^5.
const PCI_CLOCK_HZ: u64 = 33_000_000;
/// Stage values have 20 bits.
const STAGE_MASK: u32 = 0xf_ffff;

/// Reload register: the timer starts over.
const RELOAD: u32 = 1 << 8;
/// Reload register: the last reset was the watchdog's; writing one clears it.
const TIMED_OUT: u32 = 1 << 9;

/// Configuration register: the second stage's end does nothing.
const OUTPUT_DISABLED: u16 = 1 << 5;
/// Configuration register: the fast clock.
const FAST: u16 = 1 << 2;
/// Lock register bits: locked, enabled, free-running.
const LOCK: u8 = 1;
const ENABLE: u8 = 2;
const FREE_RUN: u8 = 4;

/// How far the unlocking sequence (0x80, then 0x86 to the reload register) has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Unlock {
    /// Not begun.
    #[default]
    Closed,
    /// 0x80 was written.
    Half,
    /// One register may be written.
    Open,
}

/// What the guest can observe of the timer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerState {
    /// Preload of the first stage.
    pub first: u32,
    /// Preload of the second stage.
    pub second: u32,
    /// Configuration register (PCI 0x60).
    pub config: u16,
    /// Lock register (PCI 0x68).
    pub lock: u8,
    /// The unlocking sequence.
    pub unlock: Unlock,
    /// The last reset was this watchdog's.
    pub timed_out: bool,
    /// The second stage runs.
    pub second_stage: bool,
    /// Nanoseconds left in this stage while the machine is paused.
    pub left_ns: Option<u64>,
}

impl Default for TimerState {
    fn default() -> Self {
        Self {
            first: STAGE_MASK,
            second: STAGE_MASK,
            config: 0,
            lock: 0,
            unlock: Unlock::Closed,
            timed_out: false,
            second_stage: false,
            left_ns: None,
        }
    }
}

/// What the end of a stage means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// The second stage has begun.
    Next,
    /// The guest did not feed it in time.
    Fire,
    /// It did not, and has asked for nothing to happen.
    Silent,
}

/// The timer.
#[derive(Debug, Default)]
pub struct Timer {
    /// What the guest can observe.
    pub state: TimerState,
    /// When this stage ends, nanoseconds of the caller's clock.
    deadline: Option<u64>,
}

impl Timer {
    /// When [`Timer::expired`] is due, nanoseconds of the caller's clock.
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    fn stage_ns(&self) -> u64 {
        let state = &self.state;
        let value = if state.second_stage {
            state.second
        } else {
            state.first
        };
        let shift = if state.config & FAST == 0 { 15 } else { 5 };
        // 2^20 * 2^15 * 10^9 needs more than 64 bits.
        let ns = (u128::from(value) << shift) * 1_000_000_000 / u128::from(PCI_CLOCK_HZ);
        u64::try_from(ns).unwrap_or(u64::MAX).max(1)
    }

    fn enabled(&self) -> bool {
        self.state.lock & ENABLE != 0
    }

    fn begin(&mut self, second_stage: bool, now: u64) {
        self.state.second_stage = second_stage;
        self.deadline = Some(now.saturating_add(self.stage_ns()));
    }

    /// Reads the memory BAR.
    pub fn read(&self, offset: u32) -> u32 {
        // Preloads can only be written.
        if offset == 0xc && self.state.timed_out {
            TIMED_OUT
        } else {
            0
        }
    }

    /// Writes the memory BAR.
    pub fn write(&mut self, offset: u32, value: u32, now: u64) {
        match (offset, value, self.state.unlock) {
            (0xc, 0x80, _) => {
                self.state.unlock = Unlock::Half;
                return;
            }
            (0xc, 0x86, Unlock::Half) => {
                self.state.unlock = Unlock::Open;
                return;
            }
            (0x0, _, Unlock::Open) => self.state.first = value & STAGE_MASK,
            (0x4, _, Unlock::Open) => self.state.second = value & STAGE_MASK,
            (0xc, _, Unlock::Open) => {
                if value & TIMED_OUT != 0 {
                    self.state.timed_out = false;
                }
                if value & RELOAD != 0 && self.enabled() {
                    self.begin(false, now);
                }
            }
            _ => {}
        }
        self.state.unlock = Unlock::Closed;
    }

    /// Configuration register (PCI 0x60).
    pub fn config(&self) -> u16 {
        self.state.config
    }

    /// Writes the configuration register.
    pub fn set_config(&mut self, value: u32) {
        self.state.config = low16(value) & (OUTPUT_DISABLED | FAST | 3);
    }

    /// Lock register (PCI 0x68).
    pub fn lock(&self) -> u8 {
        self.state.lock
    }

    /// Writes the lock register: once locked it stays as it is until a reset.
    pub fn set_lock(&mut self, value: u32, now: u64) {
        if self.state.lock & LOCK != 0 {
            return;
        }
        let was = self.enabled();
        self.state.lock = low8(value) & (LOCK | ENABLE | FREE_RUN);
        match (was, self.enabled()) {
            (false, true) => self.begin(false, now),
            (true, false) => self.deadline = None,
            _ => {}
        }
    }

    /// This stage's deadline has come.
    pub fn expired(&mut self, now: u64) -> Expiry {
        if !self.state.second_stage && self.state.lock & FREE_RUN == 0 {
            self.begin(true, now);
            return Expiry::Next;
        }
        if self.state.config & OUTPUT_DISABLED != 0 {
            self.begin(false, now);
            return Expiry::Silent;
        }
        self.deadline = None;
        self.state.second_stage = false;
        self.state.timed_out = true;
        Expiry::Fire
    }

    /// The machine is paused: the stage stands still.
    pub fn pause(&mut self, now: u64) {
        if let Some(deadline) = self.deadline.take() {
            self.state.left_ns = Some(deadline.saturating_sub(now));
        }
    }

    /// It goes on.
    pub fn resume(&mut self, now: u64) {
        if let Some(left) = self.state.left_ns.take() {
            self.deadline = Some(now.saturating_add(left));
        }
    }

    /// Takes over a saved state; the stage stands still until [`Timer::resume`].
    pub fn load(&mut self, state: TimerState) {
        self.state = TimerState {
            first: state.first & STAGE_MASK,
            second: state.second & STAGE_MASK,
            ..state
        };
        self.deadline = None;
    }

    /// Power-on, but for the note of who did it.
    pub fn reset(&mut self) {
        let timed_out = self.state.timed_out;
        *self = Self::default();
        self.state.timed_out = timed_out;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn unlocked(timer: &mut Timer, offset: u32, value: u32, now: u64) {
        timer.write(0xc, 0x80, now);
        timer.write(0xc, 0x86, now);
        timer.write(offset, value, now);
    }

    /// As Linux's driver sets 2 seconds: two stages of 512 units each second.
    fn armed(now: u64) -> Timer {
        let mut timer = Timer::default();
        timer.set_config(0x3);
        unlocked(&mut timer, 0x0, 2 << 9, now);
        unlocked(&mut timer, 0x4, 2 << 9, now);
        timer.set_lock(2, now);
        timer
    }

    #[test]
    fn fires_after_both_stages() {
        let mut timer = armed(0);
        let first = timer.deadline().unwrap();
        assert!(first.abs_diff(SECOND) < SECOND / 50, "{first}");
        assert_eq!(timer.expired(first), Expiry::Next);
        let second = timer.deadline().unwrap();
        assert!(second.abs_diff(2 * SECOND) < SECOND / 25, "{second}");
        assert_eq!(timer.expired(second), Expiry::Fire);
        assert_eq!(timer.deadline(), None);
        timer.reset();
        assert_eq!(
            timer.read(0xc),
            TIMED_OUT,
            "the guest sees whose reset it was"
        );
        unlocked(&mut timer, 0xc, TIMED_OUT, 0);
        assert_eq!(timer.read(0xc), 0);
    }

    #[test]
    fn is_fed_only_when_unlocked() {
        let mut timer = armed(0);
        let before = timer.deadline();
        timer.write(0xc, RELOAD, SECOND / 2);
        assert_eq!(timer.deadline(), before);
        unlocked(&mut timer, 0xc, RELOAD, SECOND / 2);
        assert!(timer.deadline() > before);
        timer.write(0x0, 1, 0);
        assert_eq!(timer.state.first, 2 << 9, "one register for each unlocking");
    }

    #[test]
    fn can_be_locked_and_told_to_be_silent() {
        let mut timer = armed(0);
        timer.set_config(u32::from(OUTPUT_DISABLED));
        timer.set_lock(3, 0);
        timer.set_lock(0, 0);
        assert_eq!(timer.lock(), 3);
        timer.expired(0);
        assert_eq!(timer.expired(0), Expiry::Silent);
        assert!(timer.deadline().is_some());
    }

    #[test]
    fn stands_still_while_paused() {
        let mut timer = armed(0);
        let left = timer.deadline().unwrap() - 100;
        timer.pause(100);
        assert_eq!(timer.deadline(), None);
        timer.resume(50 * SECOND);
        assert_eq!(timer.deadline(), Some(50 * SECOND + left));
    }
}
