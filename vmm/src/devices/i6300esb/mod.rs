//! The i6300ESB watchdog (Intel 6300ESB I/O Controller Hub datasheet, order number 300641,
//! chapter 18): what libvirt's `<watchdog model='i6300esb'>` gives a guest.

mod timer;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};
use virtio::pci::{BarKind, Config, Core, Function, Host, Ids, SavedCore};
use virtio::{DeviceError, Payload};

use super::lock;
pub use timer::Expiry;
use timer::{Timer, TimerState};

const KIND: &str = "i6300esb";
const VERSION: u32 = 1;
/// Bytes of the one BAR.
const BAR_LEN: u64 = 16;
/// Registers in configuration space.
const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;

/// The watchdog.
#[derive(Debug)]
pub struct I6300esb {
    inner: Mutex<Inner>,
    /// Readable when the timer's deadline has come.
    alarm: TimerFd,
    /// What deadlines count from.
    epoch: Instant,
}

#[derive(Debug)]
struct Inner {
    core: Core,
    timer: Timer,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    core: SavedCore,
    timer: TimerState,
}

impl I6300esb {
    /// A watchdog that nobody has started.
    ///
    /// # Errors
    /// No timer to be had.
    pub fn new(host: Host) -> Result<Self, DeviceError> {
        let ids = Ids {
            vendor: 0x8086,
            device: 0x25ab,
            revision: 0,
            class: 0x08_8000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut config = Config::endpoint(&ids);
        if !config.add_bar(0, BarKind::Memory32, BAR_LEN) {
            return Err(DeviceError::Invalid(format!("{KIND}: its header is full")));
        }
        let alarm = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
        )
        .map_err(|errno| DeviceError::Os {
            call: "timerfd_create",
            source: errno.into(),
        })?;
        Ok(Self {
            inner: Mutex::new(Inner {
                core: Core::new(KIND, config, host),
                timer: Timer::default(),
            }),
            alarm,
            epoch: Instant::now(),
        })
    }

    /// Readable when [`I6300esb::expired`] is to be called.
    pub fn alarm(&self) -> BorrowedFd<'_> {
        self.alarm.as_fd()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Does something to the timer, and sets the alarm as it says then.
    fn change<T>(
        &self,
        inner: &mut MutexGuard<'_, Inner>,
        f: impl FnOnce(&mut Timer, u64) -> T,
    ) -> T {
        let now = self.now();
        let before = inner.timer.deadline();
        let result = f(&mut inner.timer, now);
        let after = inner.timer.deadline();
        if before != after {
            let set = match after {
                Some(deadline) => {
                    // An alarm of 0 would switch it off.
                    let left = Duration::from_nanos(deadline.saturating_sub(now).max(1));
                    let once = Expiration::OneShot(TimeSpec::from_duration(left));
                    self.alarm.set(once, TimerSetTimeFlags::empty())
                }
                None => self.alarm.unset(),
            };
            if let Err(error) = set {
                log::error!("{KIND}: timerfd_settime: {error}");
            }
        }
        result
    }

    /// The alarm rang: whether the guest missed its last chance.
    pub fn expired(&self) -> bool {
        let mut inner = lock(&self.inner);
        // Nothing to read: it was set anew meanwhile.
        let rang = nix::unistd::read(&self.alarm, &mut [0; 8]).is_ok();
        let due = inner.timer.deadline().is_some_and(|at| at <= self.now());
        rang && due && self.change(&mut inner, Timer::expired) == Expiry::Fire
    }
}

impl Function for I6300esb {
    fn read_config(&self, offset: u16, width: u8) -> u32 {
        let inner = lock(&self.inner);
        match offset & !3 {
            CONFIG => u32::from(inner.timer.config()) >> (8 * (offset & 3)),
            LOCK => u32::from(inner.timer.lock()) >> (8 * (offset & 3)),
            _ => inner.core.read(offset, width),
        }
    }

    fn write_config(&self, offset: u16, width: u8, value: u32) {
        let mut inner = lock(&self.inner);
        match offset {
            CONFIG => inner.timer.set_config(value),
            LOCK => self.change(&mut inner, |timer, now| timer.set_lock(value, now)),
            _ => {
                inner.core.write(offset, width, value);
            }
        }
    }

    fn read_bar(&self, _bar: u8, offset: u32, _width: u8) -> u32 {
        lock(&self.inner).timer.read(offset)
    }

    fn write_bar(&self, _bar: u8, offset: u32, _width: u8, value: u32) {
        let mut inner = lock(&self.inner);
        self.change(&mut inner, |timer, now| timer.write(offset, value, now));
    }

    fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.core.reset();
        self.change(&mut inner, |timer, _| timer.reset());
    }

    fn pause(&self) {
        self.change(&mut lock(&self.inner), Timer::pause);
    }

    fn resume(&self) {
        self.change(&mut lock(&self.inner), Timer::resume);
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        let inner = lock(&self.inner);
        let saved = Saved {
            core: inner.core.save(),
            timer: inner.timer.state.clone(),
        };
        Payload::new(KIND, VERSION, &saved)
    }

    fn load(&self, payload: &Payload) -> Result<(), DeviceError> {
        let saved: Saved = payload.open(KIND, VERSION)?;
        let mut inner = lock(&self.inner);
        inner.core.load(&saved.core)?;
        self.change(&mut inner, |timer, _| timer.load(saved.timer));
        Ok(())
    }
}
