//! virtio-blk (5.2): a disk over any [`Storage`].
//!
//! Every request queue has a thread. A request goes from the ring straight to the storage, its
//! buffers being guest RAM; the storage answers by an eventfd. What is done is given back in
//! batches, with one interrupt each where the driver wants one.

mod config;
mod queue;
mod request;
mod storage;
#[cfg(test)]
pub(crate) mod tests;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

pub use request::SECTOR;
pub use storage::{Completion, Op, Request, Storage, StorageQueue};

use self::queue::BlockQueue;
use self::request::Rules;
use crate::device::{Activation, Device, DeviceError, Interrupt, Payload, QueueSetup};
use crate::life::{self, Life, lock, os};
use crate::memory::GuestMemory;
use crate::queue::Queue;
use crate::worker::Starter;

const ID: u16 = 2;
const KIND: &str = "virtio-blk";
const VERSION: u32 = 1;

/// Feature bits (5.2.3).
mod bits {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// What becomes of a request that failed on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The guest is told.
    #[default]
    Report,
    /// The machine stops, the request is tried again when it goes on.
    Stop,
    /// The guest is told that all is well.
    Ignore,
    /// Stops where the host's space is used up, else reports.
    Enospace,
}

/// A disk's error policy (`<driver error_policy=... rerror_policy=...>`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// For reads.
    pub read: OnError,
    /// For everything else.
    pub write: OnError,
}

impl Policy {
    /// What becomes of a request that failed with this error.
    #[must_use]
    pub fn action(&self, write: bool, errno: i32) -> Action {
        match if write { self.write } else { self.read } {
            OnError::Report => Action::Report,
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospace if errno == libc::ENOSPC => Action::Stop,
            OnError::Enospace => Action::Report,
        }
    }
}

/// What has been decided about a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The guest doesn't learn of it.
    Ignore,
    /// The guest sees an I/O error.
    Report,
    /// The request waits: the machine is to be paused, and tries again when it is resumed.
    Stop,
}

/// A request that failed on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// Not a read.
    pub write: bool,
    /// The host's error.
    pub errno: i32,
    /// What becomes of it.
    pub action: Action,
}

/// Who is to hear of failures.
pub trait Hooks: Send + Sync + fmt::Debug {
    /// A request failed. Called from the queue's thread: a machine that is to stop
    /// ([`Action::Stop`]) is paused from another one, later.
    fn failed(&self, failure: Failure);
}

/// What a disk looks like.
#[derive(Debug, Clone)]
pub struct Options {
    /// The guest can't write it.
    pub read_only: bool,
    /// Shown as its serial number; 20 bytes count.
    pub serial: String,
    /// Request queues, 1 to 256.
    pub queues: u16,
    /// Entries of each: a power of two, 4 to 1024.
    pub queue_size: u16,
    /// Logical block size in bytes: a power of two, 512 to 32768.
    pub logical_block_size: u32,
    /// Physical block size: a power of two, not below the logical one.
    pub physical_block_size: u32,
    /// Smallest advisable request in bytes, 0 for the physical block size.
    pub min_io_size: u32,
    /// Best request size in bytes, 0 for none.
    pub opt_io_size: u32,
    /// The guest may discard, and write zeroes.
    pub discard: bool,
    /// Preferred alignment of discards in bytes, 0 for the logical block size.
    pub discard_granularity: u32,
    /// What becomes of failures.
    pub policy: Policy,
    /// Who starts the queues' threads; `None`: whoever starts all others'.
    pub starter: Option<Starter>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            serial: String::new(),
            queues: 1,
            queue_size: 256,
            logical_block_size: 512,
            physical_block_size: 512,
            min_io_size: 0,
            opt_io_size: 0,
            discard: true,
            discard_granularity: 0,
            policy: Policy::default(),
            starter: None,
        }
    }
}

impl Options {
    fn check(&self) -> Result<(), DeviceError> {
        let power = |value: u32, from, to| value.is_power_of_two() && (from..=to).contains(&value);
        let bad = |what: &str| Err(DeviceError::Invalid(format!("{KIND}: {what}")));
        if !(1..=256).contains(&self.queues) {
            return bad("the number of queues is not between 1 and 256");
        }
        if !power(self.queue_size.into(), 4, 1024) {
            return bad("the queue size is not a power of two between 4 and 1024");
        }
        if !power(self.logical_block_size, 512, 32768) {
            return bad("the logical block size is not a power of two between 512 and 32768");
        }
        if !power(self.physical_block_size, self.logical_block_size, 1 << 21) {
            return bad("the physical block size is not a power of two above the logical one");
        }
        Ok(())
    }
}

/// What queues and handles share.
#[derive(Debug)]
struct Shared {
    /// Bytes.
    capacity: AtomicU64,
    read_only: bool,
    discard: bool,
    block_size: u32,
    serial: String,
    policy: Policy,
    hooks: Arc<dyn Hooks>,
    /// While active.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Shared {
    fn rules(&self) -> Rules {
        Rules {
            capacity: self.capacity.load(Ordering::Relaxed),
            block_size: self.block_size,
            read_only: self.read_only,
            discard: self.discard && !self.read_only,
        }
    }
}

/// Reaches a disk while its guest runs.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// The storage has another size now, in bytes: the guest is told.
    pub fn set_capacity(&self, capacity: u64) {
        self.0.capacity.store(capacity, Ordering::Relaxed);
        if let Some(interrupt) = &*lock(&self.0.interrupt) {
            interrupt.config();
        }
    }

    /// Size as the guest sees it, in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.0.capacity.load(Ordering::Relaxed)
    }
}

/// What an active device has.
#[derive(Debug)]
struct Active {
    memory: Arc<dyn GuestMemory>,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    kicks: Vec<Arc<OwnedFd>>,
    /// The queues that are on, as they were set up.
    setups: Vec<Option<QueueSetup>>,
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    options: Options,
    storage: Arc<dyn Storage>,
    /// Writes are durable when answered, unless the guest says otherwise.
    initial_writethrough: bool,
    shared: Arc<Shared>,
    active: Option<Active>,
    queues: Vec<Life<BlockQueue>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedQueue {
    setup: QueueSetup,
    /// Chains that wait after a failure, by their heads.
    parked: Vec<u16>,
}

/// Everything the guest can observe, beyond what the configuration says.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    writethrough: bool,
    queues: Vec<Option<SavedQueue>>,
}

impl Block {
    /// A disk of what `storage` holds.
    ///
    /// # Errors
    /// Options out of their ranges.
    pub fn new(
        options: Options,
        storage: Arc<dyn Storage>,
        hooks: Arc<dyn Hooks>,
    ) -> Result<Self, DeviceError> {
        options.check()?;
        let shared = Shared {
            capacity: AtomicU64::new(storage.capacity()),
            read_only: options.read_only,
            discard: options.discard,
            block_size: options.logical_block_size,
            serial: options.serial.clone(),
            policy: options.policy,
            hooks,
            interrupt: Mutex::new(None),
        };
        Ok(Self {
            initial_writethrough: storage.writethrough(),
            shared: Arc::new(shared),
            active: None,
            queues: (0..options.queues).map(|_| Life::Inactive).collect(),
            options,
            storage,
        })
    }

    /// For changes while the guest runs.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    fn set_writethrough(&self, on: bool) {
        if on != self.storage.writethrough()
            && let Err(error) = self.storage.set_writethrough(on)
        {
            log::error!("{KIND}: the write cache stays as it was: {error}");
        }
    }

    /// Takes the means of an activation; queues aren't there yet.
    fn take_over(&mut self, activation: Activation) {
        *lock(&self.shared.interrupt) = Some(Arc::clone(&activation.interrupt));
        self.active = Some(Active {
            memory: activation.memory,
            features: activation.features,
            interrupt: activation.interrupt,
            kicks: activation.kicks.into_iter().map(Arc::new).collect(),
            setups: activation.queues,
        });
    }

    /// The queue's handler, at rest. `None`: the driver has set it up wrongly, and knows it now.
    fn make_queue(&self, index: u16, parked: &[u16]) -> Result<Option<BlockQueue>, DeviceError> {
        let Some(active) = &self.active else {
            return Ok(None);
        };
        let at = usize::from(index);
        let (Some(Some(setup)), Some(kick)) = (active.setups.get(at), active.kicks.get(at)) else {
            return Ok(None);
        };
        let broken = |error: crate::QueueError| {
            active
                .interrupt
                .needs_reset(&format!("queue {index}: {error}"));
            Ok(None)
        };
        let queue = match Queue::new(&active.memory, setup, active.features) {
            Ok(queue) => queue,
            Err(error) => return broken(error),
        };
        let storage = self
            .storage
            .queue(Arc::clone(&active.memory))
            .map_err(os("the storage's queue"))?;
        let mut handler = BlockQueue::new(
            index,
            queue,
            Arc::clone(kick),
            storage,
            Arc::clone(&self.shared),
            Arc::clone(&active.interrupt),
        );
        match handler.park(parked) {
            Ok(()) => Ok(Some(handler)),
            Err(error) => broken(error),
        }
    }

    fn start_queue(&mut self, index: u16) -> Result<(), DeviceError> {
        let handler = self.make_queue(index, &[])?;
        match (handler, self.queues.get_mut(usize::from(index))) {
            (Some(handler), Some(queue)) => {
                queue.start_by(self.options.starter.as_ref(), &name(index), handler)
            }
            _ => Ok(()),
        }
    }
}

fn name(index: u16) -> String {
    format!("virtio-blk {index}")
}

impl Device for Block {
    fn id(&self) -> u16 {
        ID
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn features(&self) -> u64 {
        let mut features =
            bits::SEG_MAX | bits::BLK_SIZE | bits::FLUSH | bits::TOPOLOGY | bits::CONFIG_WCE;
        if self.options.queues > 1 {
            features |= bits::MQ;
        }
        if self.options.read_only {
            features |= bits::RO;
        }
        if self.shared.rules().discard {
            features |= bits::DISCARD | bits::WRITE_ZEROES;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.options.queue_size; usize::from(self.options.queues)]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let structure = config::structure(
            &self.options,
            self.shared.capacity.load(Ordering::Relaxed),
            self.storage.writethrough(),
        );
        life::read_structure(&structure, offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // Only the write cache's byte can be written, once that was agreed on (5.2.5).
        let agreed = self
            .active
            .as_ref()
            .is_some_and(|active| active.features & bits::CONFIG_WCE != 0);
        let at = config::WRITEBACK.checked_sub(offset);
        if let Some(&byte) = at.and_then(|at| data.get(at as usize))
            && agreed
        {
            self.set_writethrough(byte & 1 == 0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // A driver that can't flush gets a disk without a write cache (5.2.5.2).
        if activation.features & (bits::FLUSH | bits::CONFIG_WCE) == 0 {
            self.set_writethrough(true);
        }
        self.take_over(activation);
        (0..self.options.queues).try_for_each(|index| self.start_queue(index))
    }

    fn reset(&mut self) {
        self.queues.iter().for_each(Life::ask_to_stop);
        for queue in &mut self.queues {
            queue.take();
        }
        self.active = None;
        *lock(&self.shared.interrupt) = None;
        self.set_writethrough(self.initial_writethrough);
    }

    fn reset_queue(&mut self, index: u16) {
        let at = usize::from(index);
        if let Some(queue) = self.queues.get_mut(at) {
            queue.take();
        }
        if let Some(setup) = self.active.as_mut().and_then(|a| a.setups.get_mut(at)) {
            *setup = None;
        }
    }

    fn enable_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), DeviceError> {
        let at = usize::from(index);
        if let Some(place) = self.active.as_mut().and_then(|a| a.setups.get_mut(at)) {
            *place = Some(setup);
        }
        self.start_queue(index)
    }

    fn pause(&mut self) {
        self.queues.iter().for_each(Life::ask_to_stop);
        for queue in &mut self.queues {
            if let Err(error) = queue.pause()
                && let Some(active) = &self.active
            {
                active.interrupt.needs_reset(&error.to_string());
            }
        }
    }

    fn resume(&mut self) {
        for (index, queue) in (0..).zip(&mut self.queues) {
            if let Err(error) = queue.resume_by(self.options.starter.as_ref(), &name(index))
                && let Some(active) = &self.active
            {
                active.interrupt.needs_reset(&error.to_string());
            }
        }
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        self.queues.iter().try_for_each(|q| q.at_rest(KIND))?;
        let setups = self.active.as_ref().map(|active| &active.setups);
        let queue = |(at, queue): (usize, &Life<BlockQueue>)| match queue.paused() {
            Some(handler) => Some(SavedQueue {
                setup: handler.setup(),
                parked: handler.parked(),
            }),
            // On, but broken from the start.
            None => setups
                .and_then(|setups| *setups.get(at)?)
                .map(|setup| SavedQueue {
                    setup,
                    parked: Vec::new(),
                }),
        };
        let saved = Saved {
            writethrough: self.storage.writethrough(),
            queues: self.queues.iter().enumerate().map(queue).collect(),
        };
        Payload::new(KIND, VERSION, &saved)
    }

    fn load(
        &mut self,
        payload: &Payload,
        activation: Option<Activation>,
    ) -> Result<(), DeviceError> {
        let saved: Saved = payload.open(KIND, VERSION)?;
        self.set_writethrough(saved.writethrough);
        let Some(mut activation) = activation else {
            return Ok(());
        };
        let setups: Vec<Option<QueueSetup>> = saved
            .queues
            .iter()
            .map(|queue| queue.as_ref().map(|queue| queue.setup))
            .collect();
        life::restored(KIND, &mut activation.queues, &setups)?;
        self.take_over(activation);
        for index in 0..self.options.queues {
            let at = usize::from(index);
            let parked = match saved.queues.get(at) {
                Some(Some(queue)) => &queue.parked[..],
                _ => &[],
            };
            if let Some(handler) = self.make_queue(index, parked)? {
                self.queues[at] = Life::Paused(handler);
            }
        }
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}
