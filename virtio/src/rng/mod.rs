//! virtio-rng (5.4): random bytes from the host.

mod source;
#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use source::Source;

use crate::device::{Activation, Device, DeviceError, Interrupt, Payload, QueueSetup};
use crate::life::{self, Life};
use crate::memory::GuestMemory;
use crate::queue::{Chain, Queue, QueueError};
use crate::worker::{self, Handler, Interest, Poll};

const ID: u16 = 4;
const KIND: &str = "virtio-rng";
const VERSION: u32 = 1;
const QUEUE_SIZE: u16 = 64;
const KICK: u64 = 0;
/// Most bytes given for one buffer: a guest that asks for more asks again.
const CHUNK: u32 = 64 << 10;
/// A source that has nothing now is asked again after this.
const PATIENCE: Duration = Duration::from_millis(10);

/// At most so many bytes in each period (`<rate bytes=... period=...>`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Bytes, at least 1.
    pub bytes: u64,
    /// How long a period is, at least 1 ms.
    pub period: Duration,
}

/// What the rate still allows.
#[derive(Debug)]
struct Budget {
    rate: Option<Rate>,
    left: u64,
    until: Instant,
}

impl Budget {
    fn new(rate: Option<Rate>) -> Self {
        Self {
            rate,
            left: 0,
            until: Instant::now(),
        }
    }

    fn left(&mut self, now: Instant) -> u64 {
        let Some(rate) = self.rate else {
            return u64::MAX;
        };
        if now >= self.until {
            self.left = rate.bytes;
            self.until = now + rate.period;
        }
        self.left
    }

    fn take(&mut self, bytes: u64) {
        self.left = self.left.saturating_sub(bytes);
    }
}

/// The queue on its thread.
#[derive(Debug)]
struct RngQueue {
    queue: Queue,
    chain: Chain,
    kick: Arc<OwnedFd>,
    interrupt: Arc<dyn Interrupt>,
    source: Arc<Source>,
    budget: Budget,
    /// Asked again then.
    retry: Option<Instant>,
}

impl RngQueue {
    /// Fills buffers as long as there are any, and the rate and the source allow.
    fn fill(&mut self) -> Result<(), QueueError> {
        self.retry = None;
        self.queue.disable_notifications();
        loop {
            while self.queue.has_available()? {
                let now = Instant::now();
                let left = self.budget.left(now);
                if left == 0 {
                    self.retry = Some(self.budget.until);
                    return Ok(());
                }
                if !self.queue.pop(&mut self.chain)? {
                    break;
                }
                let room = self.chain.writable().len().min(CHUNK);
                let wanted = u32::try_from(left).unwrap_or(u32::MAX).min(room);
                let written = self.source.fill(&self.chain, wanted);
                if written == 0 && wanted > 0 {
                    self.queue.undo_pop();
                    self.retry = Some(now + PATIENCE);
                    return Ok(());
                }
                self.budget.take(u64::from(written));
                self.queue.push(&self.chain, written);
            }
            if !self.queue.enable_notifications()? {
                return Ok(());
            }
            self.queue.disable_notifications();
        }
    }

    fn run(&mut self) {
        let result = self.fill();
        if self.queue.publish() {
            self.interrupt.queue(0);
        }
        if let Err(error) = result {
            self.interrupt.needs_reset(&error.to_string());
        }
    }
}

impl Handler for RngQueue {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&*self.kick, KICK, Interest::Read)?;
        self.run();
        Ok(())
    }

    fn ready(&mut self, _token: u64, _poll: &Poll) {
        worker::take(&*self.kick);
        if self.retry.is_none() {
            self.run();
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.retry
    }

    fn timer(&mut self, _poll: &Poll) {
        self.run();
    }
}

/// What an active device has.
#[derive(Debug)]
struct Active {
    memory: Arc<dyn GuestMemory>,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    kick: Arc<OwnedFd>,
    setup: Option<QueueSetup>,
}

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    source: Arc<Source>,
    rate: Option<Rate>,
    active: Option<Active>,
    queue: Life<RngQueue>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    queue: Option<QueueSetup>,
}

impl Rng {
    /// A device that gives what `source` gives, at most at `rate`.
    ///
    /// # Errors
    /// A rate of nothing.
    pub fn new(source: Source, rate: Option<Rate>) -> Result<Self, DeviceError> {
        if rate.is_some_and(|rate| rate.bytes == 0 || rate.period < Duration::from_millis(1)) {
            let reason = format!("{KIND}: a rate needs at least one byte and one millisecond");
            return Err(DeviceError::Invalid(reason));
        }
        Ok(Self {
            source: Arc::new(source),
            rate,
            active: None,
            queue: Life::Inactive,
        })
    }

    fn take_over(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { queues, kicks, .. } = activation;
        let kick = kicks.into_iter().next();
        self.active = Some(Active {
            memory: activation.memory,
            features: activation.features,
            interrupt: activation.interrupt,
            kick: Arc::new(
                kick.ok_or_else(|| DeviceError::Invalid(format!("{KIND}: no kick for its queue")))?,
            ),
            setup: queues.into_iter().next().flatten(),
        });
        Ok(())
    }

    /// `None`: there is no queue, or the driver has set it up wrongly, and knows it now.
    fn make_queue(&self) -> Option<RngQueue> {
        let active = self.active.as_ref()?;
        match Queue::new(&active.memory, active.setup.as_ref()?, active.features) {
            Ok(queue) => Some(RngQueue {
                chain: queue.chain(),
                queue,
                kick: Arc::clone(&active.kick),
                interrupt: Arc::clone(&active.interrupt),
                source: Arc::clone(&self.source),
                budget: Budget::new(self.rate),
                retry: None,
            }),
            Err(error) => {
                active.interrupt.needs_reset(&error.to_string());
                None
            }
        }
    }

    fn start(&mut self) -> Result<(), DeviceError> {
        match self.make_queue() {
            Some(handler) => self.queue.start(KIND, handler),
            None => Ok(()),
        }
    }
}

impl Device for Rng {
    fn id(&self) -> u16 {
        ID
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.take_over(activation)?;
        self.start()
    }

    fn reset(&mut self) {
        self.queue.take();
        self.active = None;
    }

    fn reset_queue(&mut self, _index: u16) {
        self.queue.take();
        if let Some(active) = &mut self.active {
            active.setup = None;
        }
    }

    fn enable_queue(&mut self, _index: u16, setup: QueueSetup) -> Result<(), DeviceError> {
        if let Some(active) = &mut self.active {
            active.setup = Some(setup);
        }
        self.start()
    }

    fn pause(&mut self) {
        if let Err(error) = self.queue.pause()
            && let Some(active) = &self.active
        {
            active.interrupt.needs_reset(&error.to_string());
        }
    }

    fn resume(&mut self) {
        if let Err(error) = self.queue.resume(KIND)
            && let Some(active) = &self.active
        {
            active.interrupt.needs_reset(&error.to_string());
        }
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        self.queue.at_rest(KIND)?;
        let at_start = self.active.as_ref().and_then(|active| active.setup);
        let now = self.queue.paused().map(|handler| handler.queue.setup());
        let saved = Saved {
            queue: now.or(at_start),
        };
        Payload::new(KIND, VERSION, &saved)
    }

    fn load(
        &mut self,
        payload: &Payload,
        activation: Option<Activation>,
    ) -> Result<(), DeviceError> {
        let saved: Saved = payload.open(KIND, VERSION)?;
        let Some(mut activation) = activation else {
            return Ok(());
        };
        life::restored(KIND, &mut activation.queues, &[saved.queue])?;
        self.take_over(activation)?;
        if let Some(handler) = self.make_queue() {
            self.queue = Life::Paused(handler);
        }
        Ok(())
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.reset();
    }
}
