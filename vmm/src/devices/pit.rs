//! Interval timer (Intel 8254), ports 0x40 to 0x43, and port 0x61: the speaker's gate, the
//! memory refresh toggle, and the NMI sources that are never active here.
//!
//! Nothing counts: everything is computed from the time since a counter was loaded. Only
//! channel 0's rising edges need somebody to wait for them; that thread starts with the first
//! use of the channel.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use hypervisor::Flow;
use serde::{Deserialize, Serialize};

use super::{Line, lock};
use crate::bus::Device;
use crate::num::low8;

/// First port: channels 0 to 2, control.
pub const BASE: u16 = 0x40;
/// Ports.
pub const LEN: u32 = 4;
/// Port of the speaker and of NMI status.
pub const SPEAKER: u16 = 0x61;

/// Input clock in Hz.
const HZ: u64 = 1_193_182;
/// A refresh request every 15 µs turns bit 4 of port 0x61.
const REFRESH_NS: u64 = 15_085;
/// Channel 0 never interrupts more often than this, whatever the guest asks for: what no
/// processor of the time could have kept up with is not worth a thread's whole time.
const SHORTEST: Duration = Duration::from_micros(50);

/// One channel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// Mode 0 to 5.
    pub mode: u8,
    /// Counts in decimal.
    pub bcd: bool,
    /// Bytes moved at each access: 1 low, 2 high, 3 low then high.
    pub access: u8,
    /// The count as it was written; 0 stands for the largest.
    pub reload: u16,
    /// Nanoseconds on the timer's clock at which the count was loaded or triggered; `None`:
    /// it does not count.
    pub start: Option<u64>,
    /// The low byte of a count whose high byte is still to come.
    pub half: Option<u8>,
    /// The high byte is read next.
    pub read_high: bool,
    /// A latched count.
    pub latch: Option<u16>,
    /// A latched status.
    pub status: Option<u8>,
    /// The gate input.
    pub gate: bool,
}

/// What the guest can observe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// The three channels.
    pub channels: [ChannelState; 3],
    /// Port 0x61's speaker enable.
    pub speaker: bool,
}

impl Default for PitState {
    fn default() -> Self {
        let mut channels: [ChannelState; 3] = std::array::from_fn(|_| ChannelState {
            mode: 3,
            access: 3,
            gate: true,
            ..ChannelState::default()
        });
        channels[2].gate = false;
        Self {
            channels,
            speaker: false,
        }
    }
}

fn ticks(ns: u64) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(HZ) / 1_000_000_000).unwrap_or(u64::MAX)
}

fn nanoseconds(ticks: u64) -> u64 {
    u64::try_from((u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(HZ))).unwrap_or(u64::MAX)
}

fn from_bcd(value: u16) -> u16 {
    (0..4).rev().fold(0, |sum, digit| {
        sum * 10 + (value >> (digit * 4) & 15).min(9)
    })
}

fn to_bcd(value: u64) -> u16 {
    (0..4_u32).fold(0, |sum, digit| {
        sum | u16::try_from(value / 10_u64.pow(digit) % 10).unwrap_or(0) << (digit * 4)
    })
}

impl ChannelState {
    fn period(&self) -> u64 {
        let (count, largest) = if self.bcd {
            (from_bcd(self.reload), 10_000)
        } else {
            (self.reload, 0x1_0000)
        };
        if count == 0 { largest } else { count.into() }
    }

    /// Ticks since it started to count.
    fn elapsed(&self, now: u64) -> Option<u64> {
        Some(ticks(now.saturating_sub(self.start?)))
    }

    /// The counter as it reads.
    fn count(&self, now: u64) -> u16 {
        let period = self.period();
        let Some(elapsed) = self.elapsed(now) else {
            return self.reload;
        };
        let value = match self.mode {
            2 => period - elapsed % period,
            // Counts down twice as fast, twice.
            3 => (period - (elapsed * 2) % period) & !1,
            // Goes on from the top after it reached 0.
            _ if self.bcd => (period + 10_000 - elapsed % 10_000) % 10_000,
            _ => period.wrapping_sub(elapsed),
        };
        if self.bcd {
            to_bcd(value % 10_000)
        } else {
            (value & 0xffff) as u16
        }
    }

    /// The output.
    fn output(&self, now: u64) -> bool {
        let period = self.period();
        let Some(elapsed) = self.elapsed(now) else {
            return self.mode != 0;
        };
        match self.mode {
            0 | 1 => elapsed >= period,
            2 => elapsed % period != period - 1,
            3 => elapsed % period < period.div_ceil(2),
            _ => elapsed != period,
        }
    }

    /// When the output rises next after `now`.
    fn next_edge(&self, now: u64) -> Option<u64> {
        let start = self.start?;
        let elapsed = self.elapsed(now)?;
        let period = self.period();
        let edge = match self.mode {
            2 | 3 => (elapsed / period + 1) * period,
            0 | 1 if elapsed < period => period,
            // A low pulse of one tick.
            4 | 5 if elapsed <= period => period + 1,
            _ => return None,
        };
        Some(start + nanoseconds(edge))
    }

    fn load(&mut self, count: u16, now: u64) {
        self.reload = count;
        // Modes 1 and 5 wait for the gate to rise; a periodic count in progress should finish
        // first, which nobody depends on.
        self.start = (self.gate && !matches!(self.mode, 1 | 5)).then_some(now);
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate) {
            (1 | 5, true) => self.start = Some(now),
            (1 | 5, false) => {}
            (2 | 3, _) => self.start = gate.then_some(now),
            // Modes 0 and 4 go on where they were: taken as a new start, from the top.
            (_, true) => self.start = Some(now),
            (_, false) => self.start = None,
        }
    }

    fn write(&mut self, value: u8, now: u64) {
        match self.access {
            1 => self.load(value.into(), now),
            2 => self.load(u16::from(value) << 8, now),
            _ => match self.half.take() {
                None => {
                    self.half = Some(value);
                    if self.mode == 0 {
                        // The first byte stops the count.
                        self.start = None;
                    }
                }
                Some(low) => self.load(u16::from_le_bytes([low, value]), now),
            },
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latch.unwrap_or_else(|| self.count(now)).to_le_bytes();
        let both = self.access == 3;
        let want_high = if both {
            self.read_high
        } else {
            self.access == 2
        };
        self.read_high = both && !self.read_high;
        if !self.read_high {
            self.latch = None;
        }
        if want_high { high } else { low }
    }

    fn control(&mut self, value: u8, now: u64) {
        let access = value >> 4 & 3;
        if access == 0 {
            if self.latch.is_none() {
                self.latch = Some(self.count(now));
            }
            return;
        }
        *self = Self {
            // Modes 6 and 7 are 2 and 3.
            mode: match value >> 1 & 7 {
                mode @ 6.. => mode - 4,
                mode => mode,
            },
            bcd: value & 1 != 0,
            access,
            gate: self.gate,
            ..Self::default()
        };
    }

    fn read_back(&mut self, value: u8, now: u64) {
        if value & 0x20 == 0 && self.latch.is_none() {
            self.latch = Some(self.count(now));
        }
        if value & 0x10 == 0 && self.status.is_none() {
            let null = self.start.is_none();
            self.status = Some(
                u8::from(self.output(now)) << 7
                    | u8::from(null) << 6
                    | self.access << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    state: PitState,
    /// The thread that waits for channel 0 has been started.
    waiting: bool,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
    origin: Instant,
    /// What the timer's clock showed at `origin`, modulo 2^64.
    ahead: AtomicU64,
    line: Line,
}

impl Shared {
    /// Nanoseconds on the timer's clock.
    fn now(&self) -> u64 {
        let elapsed = u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        elapsed.wrapping_add(self.ahead.load(Ordering::Relaxed))
    }
}

/// A timer's state, and when it was so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPit {
    /// What the guest can observe.
    pub state: PitState,
    /// What the timer's clock showed.
    pub now: u64,
}

/// The timer.
#[derive(Debug)]
pub struct Pit {
    shared: Arc<Shared>,
}

/// Waits for channel 0's edges until the timer goes.
fn wait_for_edges(weak: &Weak<Shared>) {
    while let Some(shared) = weak.upgrade() {
        let inner = lock(&shared.inner);
        let now = shared.now();
        let next = inner.state.channels[0].next_edge(now);
        // Never long: a timer that is gone must let its thread go too.
        let limit = Duration::from_millis(500);
        let wait = next.map_or(limit, |at| {
            Duration::from_nanos(at - now).max(SHORTEST).min(limit)
        });
        let (inner, _) = wait_timeout(&shared, inner, wait);
        let due = next.is_some_and(|at| shared.now() >= at)
            && next == inner.state.channels[0].next_edge(now);
        drop(inner);
        if due {
            // The controllers see an edge.
            shared.line.set(true);
            shared.line.set(false);
        }
    }
}

fn wait_timeout<'a>(
    shared: &'a Shared,
    inner: MutexGuard<'a, Inner>,
    wait: Duration,
) -> (MutexGuard<'a, Inner>, bool) {
    let (guard, timeout) = shared
        .changed
        .wait_timeout(inner, wait)
        .unwrap_or_else(PoisonError::into_inner);
    (guard, timeout.timed_out())
}

impl Pit {
    /// `line` is IRQ 0.
    pub fn new(line: Line) -> Self {
        Self {
            shared: Arc::new(Shared {
                inner: Mutex::default(),
                changed: Condvar::new(),
                origin: Instant::now(),
                ahead: AtomicU64::new(0),
                line,
            }),
        }
    }

    /// What the guest can observe.
    pub fn state(&self) -> PitState {
        lock(&self.shared.inner).state.clone()
    }

    /// What to save.
    pub fn save(&self) -> SavedPit {
        SavedPit {
            state: self.state(),
            now: self.shared.now(),
        }
    }

    /// Takes over a saved state; its clock goes on from there.
    pub fn load(&self, saved: SavedPit) {
        let mut inner = lock(&self.shared.inner);
        let behind = saved.now.wrapping_sub(self.shared.now());
        self.shared.ahead.fetch_add(behind, Ordering::Relaxed);
        inner.state = saved.state;
        for channel in &mut inner.state.channels {
            channel.mode = channel.mode.min(5);
        }
        self.changed(&mut inner);
    }

    /// Power-on state.
    pub fn reset(&self) {
        lock(&self.shared.inner).state = PitState::default();
        self.shared.changed.notify_all();
    }

    /// Has channel 0's thread look again; starts it where there is something to wait for.
    fn changed(&self, inner: &mut Inner) {
        if !inner.waiting && inner.state.channels[0].start.is_some() {
            let weak = Arc::downgrade(&self.shared);
            // The vCPU that sets the timer has limits that are not meant for it.
            match virtio::worker::start_thread("pit".into(), move || wait_for_edges(&weak)) {
                Ok(_) => inner.waiting = true,
                Err(error) => log::error!("the interval timer's thread: {error}"),
            }
        }
        self.shared.changed.notify_all();
    }
}

impl Device for Pit {
    fn read(&self, offset: u32, _width: u8) -> u32 {
        let now = self.shared.now();
        let mut inner = lock(&self.shared.inner);
        match inner.state.channels.get_mut(offset as usize) {
            Some(channel) => channel.read(now).into(),
            None => 0xff,
        }
    }

    fn write(&self, offset: u32, _width: u8, value: u32) -> Flow {
        let now = self.shared.now();
        let value = low8(value);
        let mut inner = lock(&self.shared.inner);
        let channels = &mut inner.state.channels;
        if let Some(channel) = channels.get_mut(offset as usize) {
            channel.write(value, now);
        } else if value >> 6 == 3 {
            for (index, channel) in channels.iter_mut().enumerate() {
                if value >> (index + 1) & 1 != 0 {
                    channel.read_back(value, now);
                }
            }
        } else {
            channels[usize::from(value >> 6)].control(value, now);
        }
        if offset == 0 || offset == 3 {
            self.changed(&mut inner);
        }
        Flow::Continue
    }
}

/// Port 0x61.
#[derive(Debug)]
pub struct Speaker(pub Arc<Pit>);

impl Device for Speaker {
    fn read(&self, _offset: u32, _width: u8) -> u32 {
        let shared = &self.0.shared;
        let now = shared.now();
        let inner = lock(&shared.inner);
        let channel = &inner.state.channels[2];
        u32::from(channel.gate)
            | u32::from(inner.state.speaker) << 1
            | u32::from(!(now / REFRESH_NS).is_multiple_of(2)) << 4
            | u32::from(channel.output(now)) << 5
    }

    fn write(&self, _offset: u32, _width: u8, value: u32) -> Flow {
        let shared = &self.0.shared;
        let now = shared.now();
        let mut inner = lock(&shared.inner);
        inner.state.channels[2].set_gate(value & 1 != 0, now);
        inner.state.speaker = value & 2 != 0;
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Recorder;

    const MS: u64 = 1_000_000;

    fn channel(control: u8, count: u16) -> ChannelState {
        let mut channel = ChannelState {
            gate: true,
            ..ChannelState::default()
        };
        channel.control(control, 0);
        let [low, high] = count.to_le_bytes();
        channel.write(low, 0);
        channel.write(high, 0);
        channel
    }

    #[test]
    fn one_shot_rises_at_its_end() {
        let channel = channel(0x30, 11_932);
        assert!(!channel.output(9 * MS));
        assert!(channel.output(11 * MS));
        assert_eq!(channel.count(5 * MS), 11_932 - 5_965);
        let edge = channel.next_edge(0).unwrap();
        assert!((10 * MS..10 * MS + 2_000).contains(&edge), "{edge}");
        assert_eq!(channel.next_edge(11 * MS), None);
        assert_eq!(
            channel.count(11 * MS),
            11_932_u16.wrapping_sub(13_125),
            "wraps"
        );
    }

    #[test]
    fn periodic_edges_stay_on_their_grid() {
        let channel = channel(0x34, 11_932);
        let mut at = 0;
        for turn in 1..=100 {
            at = channel.next_edge(at).unwrap();
            let expected = nanoseconds(turn * 11_932);
            assert_eq!(at, expected);
        }
        let square = self::channel(0x36, 1000);
        assert!(square.output(0));
        assert!(!square.output(nanoseconds(600)));
        assert_eq!(square.count(nanoseconds(100)), 800);
        assert_eq!(self::channel(0x36, 0).period(), 0x1_0000);
    }

    #[test]
    fn decimal_counts() {
        let channel = channel(0x31, 0x1000);
        assert_eq!(channel.period(), 1000);
        assert_eq!(channel.count(nanoseconds(1)), 0x0999);
        assert_eq!(channel.count(nanoseconds(1001)), 0x9999);
    }

    #[test]
    fn latches_and_reads_back() {
        let mut channel = channel(0x34, 0x1234);
        channel.control(0x00, 0);
        assert_eq!(channel.read(5 * MS), 0x34, "latched at 0");
        assert_eq!(channel.read(5 * MS), 0x12);
        channel.read_back(0xe2, 0);
        assert_eq!(channel.read(0), 0x80 | 0x34);
        let mut low_only = self::channel(0x10, 0);
        low_only.load(0x80, 0);
        assert_eq!(low_only.read(0), 0x80);
        assert_eq!(low_only.read(0), 0x80);
    }

    #[test]
    fn gate_starts_and_stops_channel_2() {
        let recorder = Arc::new(Recorder::default());
        let pit = Arc::new(Pit::new(Line::new(recorder, 0)));
        let speaker = Speaker(pit.clone());
        pit.write(3, 1, 0xb0);
        pit.write(2, 1, 0xff);
        pit.write(2, 1, 0xff);
        assert_eq!(pit.state().channels[2].start, None, "the gate is closed");
        speaker.write(0, 1, 1);
        assert!(pit.state().channels[2].start.is_some());
        assert_eq!(speaker.read(0, 1) & 0x23, 1, "counting");
        pit.reset();
        assert_eq!(pit.state(), PitState::default());
        assert_eq!(pit.read(3, 1), 0xff);
    }

    #[test]
    fn channel_0_interrupts() {
        let recorder = Arc::new(Recorder::default());
        let pit = Pit::new(Line::new(recorder.clone(), 0));
        pit.write(3, 1, 0x34);
        pit.write(0, 1, 0xa9);
        pit.write(0, 1, 0x04);
        let deadline = Instant::now() + Duration::from_secs(20);
        while lock(&recorder.lines).len() < 6 {
            assert!(Instant::now() < deadline, "no interrupts");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(recorder.take_lines()[..2], [(0, true), (0, false)]);
    }

    #[test]
    fn counts_survive_nonsense() {
        let recorder = Arc::new(Recorder::default());
        let pit = Pit::new(Line::new(recorder, 0));
        let seed = std::process::id();
        println!("seed {seed}");
        let mut value = seed;
        for _ in 0..20_000 {
            value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            pit.write(value >> 8 & 3, 1, value >> 16);
            pit.read(value >> 10 & 3, 1);
        }
    }
}
