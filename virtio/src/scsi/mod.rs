//! SCSI: what drives do for commands, whatever brings those; and virtio-scsi (5.6), which brings them.
//!
//! ```text
//!   control queue's thread --- tasks ---> request queues' threads: command -> Unit (what it means)
//!        ^  done                               |                       -> its Storage, one queue a thread
//!        '-------------------------------------'
//!   event queue's thread <--- what has come, gone and changed --- ScsiHandle, Unit
//! ```
//!
//! A command that its storage has in hand holds up no other: each unit's requests go through a queue of its own.

mod control;
mod disk;
mod events;
mod inquiry;
pub mod mmc;
mod queue;
mod request;
pub mod sense;
mod target;
#[cfg(test)]
mod tests;
mod unit;

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use self::control::ControlQueue;
use self::events::EventQueue;
use self::queue::{Parts, RequestQueue};
use self::request::Sizes;
use self::target::{Events, Mailbox, Shared};
pub use self::target::{LUN_MOST, ScsiHandle};
pub use self::unit::{Address, Unit, UnitOptions, UnitState};
use crate::block::Hooks;
use crate::device::{Activation, Device, DeviceError, Interrupt, Payload, QueueSetup};
use crate::life::{self, Life, lock, os};
use crate::memory::GuestMemory;
use crate::queue::Queue;
use crate::worker::{self, Starter};

const ID: u16 = 8;
const KIND: &str = "virtio-scsi";
const VERSION: u32 = 1;

/// The queues before the request queues.
const CONTROL: u16 = 0;
const EVENTS: u16 = 1;
const FIRST: u16 = 2;

/// Feature bits (5.6.3).
mod bits {
    pub const HOTPLUG: u64 = 1 << 1;
    pub const CHANGE: u64 = 1 << 2;
}

/// Offsets in the configuration structure (5.6.4), and its length.
mod config {
    pub const SENSE_SIZE: u32 = 20;
    pub const CDB_SIZE: u32 = 24;
    pub const LEN: usize = 36;
}

/// Who is to hear of what a drive does.
pub trait DriveHooks: Hooks {
    /// A tray was opened or closed.
    fn tray_moved(&self, open: bool);

    /// Its controller has no part of it any more: it was unplugged, and is at rest; or the controller is gone.
    fn let_go(&self) {}
}

/// What a controller looks like.
#[derive(Debug, Clone)]
pub struct ScsiOptions {
    /// Request queues, 1 to 256.
    pub queues: u16,
    /// Entries of each: a power of two, 4 to 1024.
    pub queue_size: u16,
    /// The longest transfer in sectors of 512 bytes, as the driver is told.
    pub max_sectors: u32,
    /// Commands of a unit at a time, as the driver is told.
    pub cmd_per_lun: u32,
    /// Who starts the queues' threads; `None`: whoever starts all others'.
    pub starter: Option<Starter>,
}

impl Default for ScsiOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            max_sectors: 0xffff,
            cmd_per_lun: 128,
            starter: None,
        }
    }
}

impl ScsiOptions {
    fn check(&self) -> Result<(), DeviceError> {
        let bad = |what: &str| Err(DeviceError::Invalid(format!("{KIND}: {what}")));
        if !(1..=256).contains(&self.queues) {
            return bad("the number of queues is not between 1 and 256");
        }
        if !self.queue_size.is_power_of_two() || !(4..=1024).contains(&self.queue_size) {
            return bad("the queue size is not a power of two between 4 and 1024");
        }
        if self.max_sectors == 0 || self.cmd_per_lun == 0 {
            return bad("no sectors, or no commands, at a time");
        }
        Ok(())
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

/// A controller.
#[derive(Debug)]
pub struct Scsi {
    options: ScsiOptions,
    shared: Arc<Shared>,
    sizes: Sizes,
    active: Option<Active>,
    control: Life<ControlQueue>,
    events: Life<EventQueue>,
    queues: Vec<Life<RequestQueue>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedQueue {
    setup: QueueSetup,
    /// Chains that wait after a failure, by their heads.
    parked: Vec<u16>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedUnit {
    target: u8,
    lun: u16,
    state: UnitState,
}

/// Everything the guest can observe, beyond what the configuration says.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    sense_size: u32,
    cdb_size: u32,
    queues: Vec<Option<SavedQueue>>,
    events: Events,
    units: Vec<SavedUnit>,
}

fn name(index: u16) -> String {
    match index {
        CONTROL => "scsi control".to_owned(),
        EVENTS => "scsi events".to_owned(),
        index => format!("scsi {}", index - FIRST),
    }
}

impl Scsi {
    /// A controller with no units.
    ///
    /// # Errors
    /// Options out of their ranges; the host's refusal.
    pub fn new(options: ScsiOptions) -> Result<Self, DeviceError> {
        options.check()?;
        Ok(Self {
            shared: Arc::new(Shared::new(options.queues)?),
            sizes: Sizes::FIRST,
            active: None,
            control: Life::Inactive,
            events: Life::Inactive,
            queues: (0..options.queues).map(|_| Life::Inactive).collect(),
            options,
        })
    }

    /// For changes while the guest runs; units come by it.
    #[must_use]
    pub fn handle(&self) -> ScsiHandle {
        ScsiHandle(Arc::clone(&self.shared))
    }

    fn structure(&self) -> [u8; config::LEN] {
        let mut bytes = [0; config::LEN];
        let words = [
            self.options.queues.into(),
            // Request and response take two descriptors of a chain.
            u32::from(self.options.queue_size) - 2,
            self.options.max_sectors,
            self.options.cmd_per_lun,
            events::LEN,
            self.sizes.sense,
            self.sizes.cdb,
            // One channel, 256 targets.
            0xff << 16,
            LUN_MOST.into(),
        ];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Takes the means of an activation; queues aren't there yet.
    fn take_over(&mut self, activation: Activation) {
        let has = |bit| activation.features & bit != 0;
        self.shared
            .hotplug
            .store(has(bits::HOTPLUG), Ordering::Release);
        self.shared
            .change
            .store(has(bits::CHANGE), Ordering::Release);
        self.active = Some(Active {
            memory: activation.memory,
            features: activation.features,
            interrupt: activation.interrupt,
            kicks: activation.kicks.into_iter().map(Arc::new).collect(),
            setups: activation.queues,
        });
    }

    /// What queue `index` is made of. `None`: the driver has none, or has set it up wrongly, and knows it now.
    fn parts(&self, index: u16) -> Option<Parts> {
        let active = self.active.as_ref()?;
        let at = usize::from(index);
        let setup = active.setups.get(at)?.as_ref()?;
        let kick = Arc::clone(active.kicks.get(at)?);
        match Queue::new(&active.memory, setup, active.features) {
            Ok(queue) => Some(Parts {
                queue,
                kick,
                memory: Arc::clone(&active.memory),
                shared: Arc::clone(&self.shared),
                interrupt: Arc::clone(&active.interrupt),
                sizes: self.sizes,
            }),
            Err(error) => {
                active
                    .interrupt
                    .needs_reset(&format!("queue {index}: {error}"));
                None
            }
        }
    }

    fn make_control(&self) -> Result<Option<ControlQueue>, DeviceError> {
        let Some(parts) = self.parts(CONTROL) else {
            return Ok(None);
        };
        ControlQueue::new(
            CONTROL,
            parts.queue,
            parts.kick,
            parts.shared,
            parts.interrupt,
        )
        .map(Some)
        .map_err(os("eventfd"))
    }

    fn make_events(&self) -> Option<EventQueue> {
        let parts = self.parts(EVENTS)?;
        Some(EventQueue::new(
            EVENTS,
            parts.queue,
            parts.kick,
            parts.shared,
            parts.interrupt,
        ))
    }

    fn make_queue(&self, index: u16, parked: &[u16]) -> Result<Option<RequestQueue>, DeviceError> {
        let Some(parts) = self.parts(index) else {
            return Ok(None);
        };
        let mailbox = Arc::new(Mailbox {
            tasks: Mutex::default(),
            wake: worker::eventfd().map_err(os("eventfd"))?,
        });
        let interrupt = Arc::clone(&parts.interrupt);
        let mut handler = RequestQueue::new(index, parts, Arc::clone(&mailbox));
        if let Err(error) = handler.park(parked) {
            interrupt.needs_reset(&format!("queue {index}: {error}"));
            return Ok(None);
        }
        self.set_mailbox(index, Some(mailbox));
        Ok(Some(handler))
    }

    fn set_mailbox(&self, index: u16, mailbox: Option<Arc<Mailbox>>) {
        let mut mailboxes = lock(&self.shared.mailboxes);
        let place = mailboxes.get_mut(usize::from(index.wrapping_sub(FIRST)));
        let before = place.map(|place| std::mem::replace(place, mailbox));
        drop(mailboxes);
        // Functions that are in it are done: the queue is at rest.
        drop(before);
    }

    fn start_queue(&mut self, index: u16) -> Result<(), DeviceError> {
        let starter = self.options.starter.as_ref();
        match index {
            CONTROL => match self.make_control()? {
                Some(handler) => self.control.start_by(starter, &name(index), handler),
                None => Ok(()),
            },
            EVENTS => match self.make_events() {
                Some(handler) => self.events.start_by(starter, &name(index), handler),
                None => Ok(()),
            },
            _ => {
                let handler = self.make_queue(index, &[])?;
                let queue = self.queues.get_mut(usize::from(index - FIRST));
                match (handler, queue) {
                    (Some(handler), Some(queue)) => queue.start_by(starter, &name(index), handler),
                    _ => Ok(()),
                }
            }
        }
    }

    fn count(&self) -> u16 {
        FIRST + self.options.queues
    }

    fn needs_reset(&self, error: &dyn std::error::Error) {
        if let Some(active) = &self.active {
            active.interrupt.needs_reset(&error.to_string());
        }
    }
}

impl Device for Scsi {
    fn id(&self) -> u16 {
        ID
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn features(&self) -> u64 {
        bits::HOTPLUG | bits::CHANGE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.options.queue_size; usize::from(self.count())]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        life::read_structure(&self.structure(), offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // Two words can be written, before the device runs; what can't be is not taken.
        let Some(value) = data.first_chunk().map(|word| u32::from_le_bytes(*word)) else {
            return;
        };
        if self.active.is_some() {
            return;
        }
        match offset {
            config::SENSE_SIZE if value <= Sizes::SENSE_MOST => self.sizes.sense = value,
            config::CDB_SIZE if value <= Sizes::CDB_MOST => self.sizes.cdb = value,
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // The driver looks what there is.
        *self.shared.events() = Events::default();
        self.take_over(activation);
        // Functions of the control queue go to queues that are there.
        (EVENTS..self.count())
            .chain([CONTROL])
            .try_for_each(|index| self.start_queue(index))
    }

    fn reset(&mut self) {
        self.control.take();
        self.events.ask_to_stop();
        self.queues.iter().for_each(Life::ask_to_stop);
        self.events.take();
        for queue in &mut self.queues {
            queue.take();
        }
        for index in FIRST..self.count() {
            self.set_mailbox(index, None);
        }
        self.active = None;
        self.sizes = Sizes::FIRST;
        self.shared.hotplug.store(false, Ordering::Release);
        self.shared.change.store(false, Ordering::Release);
        *self.shared.events() = Events::default();
        for seated in self.shared.all() {
            seated.unit.reset();
        }
    }

    fn reset_queue(&mut self, index: u16) {
        match index {
            CONTROL => {
                self.control.take();
            }
            EVENTS => {
                self.events.take();
            }
            _ => {
                if let Some(queue) = self.queues.get_mut(usize::from(index - FIRST)) {
                    queue.take();
                }
                self.set_mailbox(index, None);
            }
        }
        let setups = self.active.as_mut().map(|active| &mut active.setups);
        if let Some(setup) = setups.and_then(|setups| setups.get_mut(usize::from(index))) {
            *setup = None;
        }
    }

    fn enable_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), DeviceError> {
        let setups = self.active.as_mut().map(|active| &mut active.setups);
        if let Some(place) = setups.and_then(|setups| setups.get_mut(usize::from(index))) {
            *place = Some(setup);
        }
        self.start_queue(index)
    }

    fn pause(&mut self) {
        // Functions first: what is on its way is done when the request queues are at rest.
        self.control.ask_to_stop();
        self.events.ask_to_stop();
        let mut results = vec![self.control.pause(), self.events.pause()];
        self.queues.iter().for_each(Life::ask_to_stop);
        results.extend(self.queues.iter_mut().map(Life::pause));
        for error in results.into_iter().filter_map(Result::err) {
            self.needs_reset(&error);
        }
        self.control.with(|control, _| control.settle());
    }

    fn resume(&mut self) {
        let starter = self.options.starter.as_ref();
        // What was kept for later is under way when functions come.
        let queues = (FIRST..).zip(&mut self.queues);
        let mut results: Vec<_> = queues
            .map(|(index, queue)| queue.resume_by(starter, &name(index)))
            .collect();
        results.push(self.events.resume_by(starter, &name(EVENTS)));
        results.push(self.control.resume_by(starter, &name(CONTROL)));
        for error in results.into_iter().filter_map(Result::err) {
            self.needs_reset(&error);
        }
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        self.control.at_rest(KIND)?;
        self.events.at_rest(KIND)?;
        self.queues.iter().try_for_each(|q| q.at_rest(KIND))?;
        let setups = self.active.as_ref().map(|active| &active.setups);
        let of = |at: usize, own: Option<(QueueSetup, Vec<u16>)>| {
            let (setup, parked) = match own {
                Some(own) => own,
                // On, but broken from the start.
                None => (setups.and_then(|setups| *setups.get(at)?)?, Vec::new()),
            };
            Some(SavedQueue { setup, parked })
        };
        let control = self.control.paused().map(|own| (own.setup(), Vec::new()));
        let events = self.events.paused().map(|own| (own.setup(), Vec::new()));
        let mut queues = vec![of(0, control), of(1, events)];
        for (at, queue) in self.queues.iter().enumerate() {
            let own = queue.paused().map(|own| (own.setup(), own.parked()));
            queues.push(of(at + usize::from(FIRST), own));
        }
        let units = self.shared.all();
        let saved = Saved {
            sense_size: self.sizes.sense,
            cdb_size: self.sizes.cdb,
            queues,
            events: self.shared.events().clone(),
            units: units
                .iter()
                .map(|seated| SavedUnit {
                    target: seated.address.0,
                    lun: seated.address.1,
                    state: seated.unit.save(),
                })
                .collect(),
        };
        Payload::new(KIND, VERSION, &saved)
    }

    fn load(
        &mut self,
        payload: &Payload,
        activation: Option<Activation>,
    ) -> Result<(), DeviceError> {
        let saved: Saved = payload.open(KIND, VERSION)?;
        let bad = |reason: &str| DeviceError::State {
            kind: KIND,
            reason: reason.to_owned(),
        };
        if saved.sense_size > Sizes::SENSE_MOST || saved.cdb_size > Sizes::CDB_MOST {
            return Err(bad("sizes that can't be"));
        }
        let mut units = self.shared.all();
        for saved in saved.units {
            let address = (saved.target, saved.lun);
            let place = units.iter().position(|own| own.address == address);
            let own = place.map(|place| units.remove(place));
            own.ok_or_else(|| bad("a unit is missing"))?
                .unit
                .load(saved.state);
        }
        self.sizes = Sizes {
            sense: saved.sense_size,
            cdb: saved.cdb_size,
        };
        let Some(mut activation) = activation else {
            return Ok(());
        };
        let setups: Vec<Option<QueueSetup>> = saved
            .queues
            .iter()
            .map(|queue| queue.as_ref().map(|queue| queue.setup))
            .collect();
        life::restored(KIND, &mut activation.queues, &setups)?;
        *self.shared.events() = saved.events;
        self.take_over(activation);
        // Those that were about to be taken away when it was saved: they are there, after all.
        for late in units {
            self.shared.plugged(late.address);
        }
        if let Some(handler) = self.make_control()? {
            self.control = Life::Paused(handler);
        }
        if let Some(handler) = self.make_events() {
            self.events = Life::Paused(handler);
        }
        for index in FIRST..self.count() {
            let parked = match saved.queues.get(usize::from(index)) {
                Some(Some(queue)) => &queue.parked[..],
                _ => &[],
            };
            if let Some(handler) = self.make_queue(index, parked)? {
                self.queues[usize::from(index - FIRST)] = Life::Paused(handler);
            }
        }
        Ok(())
    }
}

impl Drop for Scsi {
    fn drop(&mut self) {
        self.reset();
    }
}
