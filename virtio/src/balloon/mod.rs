//! Memory balloon (5.5): the guest gives memory back, says how it fares, and reports free pages.

mod state;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::eventfd::EventFd;

pub use state::{State, Stats};

use state::PAGE;
use worker::Worker;

use crate::device::{Activation, Device, DeviceError, Interrupt, Payload, QueueSetup};
use crate::life::{Life, lock, os, read_structure, restored};
use crate::memory::GuestMemory;
use crate::queue::Queue;
use crate::worker::{eventfd, signal};

const KIND: &str = "virtio-balloon";
const VERSION: u32 = 1;
/// `VIRTIO_BALLOON_F_STATS_VQ`.
const F_STATS_VQ: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const F_PAGE_REPORTING: u64 = 1 << 5;
const QUEUE_SIZE: u16 = 128;

/// Hears how much RAM the guest keeps. Called from the transport's thread; may not block.
pub trait ActualHook: Send + Sync + std::fmt::Debug {
    /// So many bytes from now on.
    fn actual(&self, bytes: u64);
}

/// How a balloon is made.
#[derive(Debug, Clone)]
pub struct BalloonOptions {
    /// RAM of the machine, bytes.
    pub ram_bytes: u64,
    /// Bytes of RAM the guest is to keep at start; 0: all of it.
    pub target_bytes: u64,
    /// The guest is asked for statistics every so many seconds; 0: never.
    pub stats_period_seconds: u32,
    /// The guest reports free pages.
    pub free_page_reporting: bool,
    /// The guest takes memory back when it runs out.
    pub deflate_on_oom: bool,
    /// Hears of changes.
    pub hook: Option<Arc<dyn ActualHook>>,
}

/// What the thread, the transport and the VMM share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    teller: Mutex<Teller>,
    period_seconds: AtomicU32,
    wake: EventFd,
    ram_bytes: u64,
    reports: bool,
}

/// How the driver is told of its configuration, while it may be.
#[derive(Debug, Default)]
struct Teller {
    interrupt: Option<Arc<dyn Interrupt>>,
    paused: bool,
    owed: bool,
}

impl Shared {
    fn period(&self) -> Option<Duration> {
        let seconds = self.period_seconds.load(Ordering::Relaxed);
        (seconds > 0).then(|| Duration::from_secs(seconds.into()))
    }

    /// RAM without so many pages, bytes.
    fn without(&self, pages: u32) -> u64 {
        self.ram_bytes.saturating_sub(u64::from(pages) * PAGE)
    }

    /// Pages to give up so that `bytes` are kept.
    fn pages(&self, bytes: u64) -> u32 {
        let kept = if bytes == 0 { self.ram_bytes } else { bytes };
        u32::try_from(self.ram_bytes.saturating_sub(kept) / PAGE).unwrap_or(u32::MAX)
    }
}

/// A balloon at run time, for the VMM: usable from any thread, whatever state the device is in.
#[derive(Debug, Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Asks the guest to keep `bytes` of RAM; 0, or more than there is: all of it.
    pub fn set_target(&self, bytes: u64) {
        let shared = &self.0;
        let pages = shared.pages(bytes);
        let before = std::mem::replace(&mut lock(&shared.state).pages, pages);
        if before == pages {
            return;
        }
        let mut teller = lock(&shared.teller);
        if teller.paused {
            teller.owed = true;
        } else if let Some(interrupt) = &teller.interrupt {
            interrupt.config();
        }
    }

    /// Asks the guest for statistics every so many seconds from now on; 0: never.
    pub fn set_stats_period(&self, seconds: u32) {
        self.0.period_seconds.store(seconds, Ordering::Relaxed);
        signal(&self.0.wake);
    }

    /// The period, seconds; 0: never.
    #[must_use]
    pub fn stats_period(&self) -> u32 {
        self.0.period_seconds.load(Ordering::Relaxed)
    }

    /// What the balloon knows.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let state = lock(&self.0.state);
        Stats {
            actual_bytes: self.0.without(state.actual),
            target_bytes: self.0.without(state.pages),
            ..state.stats
        }
    }
}

/// A memory balloon.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    features: u64,
    hook: Option<Arc<dyn ActualHook>>,
    life: Life<Worker>,
    activation: Option<Active>,
}

/// What stays after activation.
#[derive(Debug)]
struct Active {
    memory: Arc<dyn GuestMemory>,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
}

impl Balloon {
    /// The device.
    ///
    /// # Errors
    /// No eventfd.
    pub fn new(options: BalloonOptions) -> Result<Self, DeviceError> {
        let mut features = F_STATS_VQ;
        if options.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        if options.free_page_reporting {
            features |= F_PAGE_REPORTING;
        }
        let shared = Shared {
            state: Mutex::default(),
            teller: Mutex::default(),
            period_seconds: AtomicU32::new(options.stats_period_seconds),
            wake: eventfd().map_err(os("eventfd"))?,
            ram_bytes: options.ram_bytes,
            reports: options.free_page_reporting,
        };
        lock(&shared.state).pages = shared.pages(options.target_bytes);
        Ok(Self {
            shared: Arc::new(shared),
            features,
            hook: options.hook,
            life: Life::default(),
            activation: None,
        })
    }

    /// For the VMM: target, statistics.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }

    fn prepare(&mut self, activation: Activation) -> Worker {
        let (memory, features) = (activation.memory, activation.features);
        let interrupt = activation.interrupt;
        let mut queues = Vec::new();
        let mut broken = false;
        for setup in &activation.queues {
            let queue = setup.and_then(|setup| {
                Queue::new(&memory, &setup, features)
                    .map_err(|error| {
                        interrupt.needs_reset(&error.to_string());
                        broken = true;
                    })
                    .ok()
            });
            queues.push(queue);
        }
        lock(&self.shared.teller).interrupt = Some(Arc::clone(&interrupt));
        self.activation = Some(Active {
            memory: Arc::clone(&memory),
            features,
            interrupt: Arc::clone(&interrupt),
        });
        Worker {
            shared: Arc::clone(&self.shared),
            memory,
            interrupt,
            features,
            queues,
            kicks: activation.kicks,
            held: None,
            next: None,
            period: None,
            again: 0,
            broken,
        }
    }

    fn tell_hook(&self) {
        if let Some(hook) = &self.hook {
            hook.actual(self.handle().stats().actual_bytes);
        }
    }

    fn queue_count(&self) -> usize {
        if self.shared.reports { 5 } else { 3 }
    }
}

impl Device for Balloon {
    fn id(&self) -> u16 {
        5
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queue_count()]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let state = lock(&self.shared.state);
        let config = [state.pages.to_le_bytes(), state.actual.to_le_bytes()].concat();
        read_structure(&config, offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let mut state = lock(&self.shared.state);
        let mut actual = state.actual.to_le_bytes();
        for (at, byte) in (u64::from(offset)..).zip(data) {
            if let Some(place) = at.checked_sub(4)
                && let Some(place) = usize::try_from(place).ok().and_then(|p| actual.get_mut(p))
            {
                *place = *byte;
            }
        }
        let actual = u32::from_le_bytes(actual);
        let changed = std::mem::replace(&mut state.actual, actual) != actual;
        drop(state);
        if changed {
            self.tell_hook();
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let worker = self.prepare(activation);
        self.life.start("balloon", worker)
    }

    fn reset(&mut self) {
        self.life.take();
        self.activation = None;
        *lock(&self.shared.teller) = Teller::default();
        let mut state = lock(&self.shared.state);
        let changed = state.actual != 0;
        let reported = state.stats.reported;
        // A driver that comes anew starts with an empty balloon, and the target stands.
        let pages = state.pages;
        *state = State::default();
        state.pages = pages;
        state.stats.reported = reported;
        drop(state);
        if changed {
            self.tell_hook();
        }
    }

    fn reset_queue(&mut self, index: u16) {
        self.life.with(move |worker, poll| {
            worker.replace_queue(index.into(), None, poll.is_some());
        });
    }

    fn enable_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), DeviceError> {
        let Some(active) = &self.activation else {
            return Ok(());
        };
        match Queue::new(&active.memory, &setup, active.features) {
            Ok(queue) => {
                self.life.with(move |worker, poll| {
                    worker.replace_queue(index.into(), Some(queue), poll.is_some());
                });
            }
            Err(error) => active.interrupt.needs_reset(&error.to_string()),
        }
        Ok(())
    }

    fn pause(&mut self) {
        if let Err(error) = self.life.pause()
            && let Some(active) = &self.activation
        {
            active.interrupt.needs_reset(&error.to_string());
        }
        lock(&self.shared.teller).paused = true;
    }

    fn resume(&mut self) {
        let mut teller = lock(&self.shared.teller);
        teller.paused = false;
        if std::mem::take(&mut teller.owed)
            && let Some(interrupt) = &teller.interrupt
        {
            interrupt.config();
        }
        drop(teller);
        if let Err(error) = self.life.resume("balloon")
            && let Some(active) = &self.activation
        {
            active.interrupt.needs_reset(&error.to_string());
        }
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        self.life.at_rest(KIND)?;
        let mut state = lock(&self.shared.state).clone();
        state.queues = self.life.paused().map_or_else(
            || vec![None; self.queue_count()],
            |worker| {
                let queues = worker.queues.iter();
                queues.map(|q| q.as_ref().map(Queue::setup)).collect()
            },
        );
        Payload::new(KIND, VERSION, &state)
    }

    fn load(
        &mut self,
        payload: &Payload,
        activation: Option<Activation>,
    ) -> Result<(), DeviceError> {
        let mut state: State = payload.open(KIND, VERSION)?;
        let queues = std::mem::take(&mut state.queues);
        *lock(&self.shared.state) = state;
        self.tell_hook();
        let Some(mut activation) = activation else {
            return Ok(());
        };
        restored(KIND, &mut activation.queues, &queues)?;
        let worker = self.prepare(activation);
        lock(&self.shared.teller).paused = true;
        self.life = Life::Paused(worker);
        Ok(())
    }
}
