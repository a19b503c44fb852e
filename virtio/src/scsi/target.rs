//! Which units a controller has, and what its queues tell each other.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};

use super::DriveHooks;
use super::unit::{Address, Unit};
use crate::device::DeviceError;
use crate::life::lock;
use crate::worker;

/// Most units of a controller that events are kept of while its driver doesn't take them.
const EVENTS_MOST: usize = 64;
/// The highest logical unit (5.6.6.1).
pub const LUN_MOST: u16 = 0x3fff;

/// Events (5.6.6.3.1).
pub(super) mod event {
    /// Some were lost.
    pub const MISSED: u32 = 1 << 31;
    pub const TRANSPORT_RESET: u32 = 1;
    pub const PARAM_CHANGE: u32 = 3;
    /// Why: a unit has come, or gone.
    pub const RESCAN: u32 = 1;
    pub const REMOVED: u32 = 2;
    /// The capacity has changed: code and qualifier of the unit attention.
    pub const CAPACITY: u32 = 0x092a;
}

/// What the driver is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Event {
    pub event: u32,
    pub target: u8,
    pub lun: u16,
    pub reason: u32,
}

/// Events that wait for a buffer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Events {
    pub waiting: VecDeque<Event>,
    pub missed: bool,
}

/// A unit in its place. The last that has it says that it is gone, when it is.
#[derive(Debug)]
pub(super) struct Seated {
    pub address: Address,
    pub unit: Arc<Unit>,
    /// The last field: what the unit has of the host has gone before.
    _gone: Gone,
}

#[derive(Debug)]
struct Gone(Arc<dyn DriveHooks>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.let_go();
    }
}

/// What a task management function wants of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// Which commands.
    Abort,
    /// As above, and they are told of a reset.
    Reset,
    /// Only whether there are any.
    Query,
}

/// A task management function on its way: when the last that has it lets go of it, it is done.
pub(super) struct Task {
    pub wish: Wish,
    pub target: u8,
    /// `None`: all of the target.
    pub lun: Option<u16>,
    /// `None`: all commands.
    pub tag: Option<u64>,
    /// There was such a command.
    pub found: AtomicBool,
    pub slot: usize,
    pub done: Arc<Done>,
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task")
            .field("wish", &self.wish)
            .finish_non_exhaustive()
    }
}

impl Task {
    /// Whether it is about this command.
    pub fn is_of(&self, address: Address, tag: u64) -> bool {
        self.target == address.0
            && self.lun.is_none_or(|lun| lun == address.1)
            && self.tag.is_none_or(|own| own == tag)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let found = self.found.load(Ordering::Acquire);
        lock(&self.done.list).push((self.slot, found));
        worker::signal(&self.done.wake);
    }
}

/// Task management functions that are done.
#[derive(Debug)]
pub(super) struct Done {
    pub list: Mutex<Vec<(usize, bool)>>,
    pub wake: EventFd,
}

/// Where a request queue is told of things.
#[derive(Debug)]
pub(super) struct Mailbox {
    pub tasks: Mutex<Vec<Arc<Task>>>,
    pub wake: EventFd,
}

/// What queues and handles share.
#[derive(Debug)]
pub struct Shared {
    units: RwLock<BTreeMap<Address, Arc<Seated>>>,
    /// Counts changes of `units`.
    generation: AtomicU64,
    events: Mutex<Events>,
    /// Events wait.
    pub(super) event_wake: EventFd,
    /// The driver knows of events: plugged, changed.
    pub(super) hotplug: AtomicBool,
    pub(super) change: AtomicBool,
    /// Of the request queues that are there.
    pub(super) mailboxes: Mutex<Vec<Option<Arc<Mailbox>>>>,
}

impl Shared {
    pub(super) fn new(queues: u16) -> Result<Self, DeviceError> {
        Ok(Self {
            units: RwLock::default(),
            generation: AtomicU64::new(0),
            events: Mutex::default(),
            event_wake: worker::eventfd().map_err(crate::life::os("eventfd"))?,
            hotplug: AtomicBool::new(false),
            change: AtomicBool::new(false),
            mailboxes: Mutex::new(vec![None; usize::from(queues)]),
        })
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<Address, Arc<Seated>>> {
        self.units
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<Address, Arc<Seated>>> {
        self.units
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn unit(&self, address: Address) -> Option<Arc<Seated>> {
        self.read().get(&address).cloned()
    }

    /// The units of a target; empty: there is no such target.
    pub(super) fn luns(&self, target: u8) -> Vec<u16> {
        let units = self.read();
        let own = units.range((target, 0)..=(target, u16::MAX));
        own.map(|((_, lun), _)| *lun).collect()
    }

    pub(super) fn all(&self) -> Vec<Arc<Seated>> {
        self.read().values().cloned().collect()
    }

    /// Every queue looks whether what it has is there still.
    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        for mailbox in lock(&self.mailboxes).iter().flatten() {
            worker::signal(&mailbox.wake);
        }
    }

    fn tell(&self, event: Event) {
        let mut events = lock(&self.events);
        if events.waiting.len() < EVENTS_MOST {
            events.waiting.push_back(event);
        } else {
            events.missed = true;
        }
        drop(events);
        worker::signal(&self.event_wake);
    }

    fn transport(&self, (target, lun): Address, reason: u32) {
        if self.hotplug.load(Ordering::Acquire) {
            self.tell(Event {
                event: event::TRANSPORT_RESET,
                target,
                lun,
                reason,
            });
        }
    }

    /// This unit is new to the guest.
    pub(super) fn plugged(&self, address: Address) {
        self.transport(address, event::RESCAN);
    }

    /// The capacity of this unit is another one.
    pub(super) fn capacity_changed(&self, (target, lun): Address) {
        if self.change.load(Ordering::Acquire) {
            self.tell(Event {
                event: event::PARAM_CHANGE,
                target,
                lun,
                reason: event::CAPACITY,
            });
        }
    }

    pub(super) fn events(&self) -> std::sync::MutexGuard<'_, Events> {
        lock(&self.events)
    }
}

/// Reaches a controller while its guest runs.
#[derive(Debug, Clone)]
pub struct ScsiHandle(pub(super) Arc<Shared>);

impl ScsiHandle {
    /// Puts a unit in its place; the guest is told.
    ///
    /// # Errors
    /// There is one, or can't be one.
    pub fn plug(&self, address: Address, unit: &Arc<Unit>) -> Result<(), DeviceError> {
        let (target, lun) = address;
        let bad = |what: String| Err(DeviceError::Invalid(format!("SCSI: {what}")));
        if lun > LUN_MOST {
            return bad(format!("there is no unit {lun}"));
        }
        let mut units = self.0.write();
        if units.contains_key(&address) {
            return bad(format!("unit {lun} of target {target} is taken"));
        }
        unit.take_seat(&self.0, address);
        let seated = Seated {
            address,
            unit: Arc::clone(unit),
            _gone: Gone(Arc::clone(&unit.hooks)),
        };
        units.insert(address, Arc::new(seated));
        drop(units);
        self.0.changed();
        self.0.plugged(address);
        Ok(())
    }

    /// Takes a unit away: it is not there for new commands, and the guest is told. When nobody has it any more, the
    /// commands that are in flight among them, [`super::DriveHooks::let_go`] says so.
    pub fn unplug(&self, address: Address) {
        let gone = self.0.write().remove(&address);
        if gone.is_none() {
            return;
        }
        drop(gone);
        self.0.changed();
        self.0.transport(address, event::REMOVED);
    }
}
