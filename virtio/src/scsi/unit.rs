//! A logical unit: a disk or a CD-ROM drive, and how the rest of the machine reaches it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};

use super::mmc::{self, BLOCK, CdState, Disc, Done};
use super::sense::{
    BAD_OPERATION, DATA_PROTECT, MEDIUM_ERROR, Sense, UNIT_ATTENTION, UNREADABLE, fixed,
};
use super::target::Shared;
use super::{DriveHooks, disk, inquiry};
use crate::block::{Policy, Storage};
use crate::device::DeviceError;
use crate::life::lock;

/// Most bytes of a parameter list.
pub(super) const LIST_MOST: u32 = 4096;

/// What a unit looks like.
#[derive(Debug, Clone)]
pub struct UnitOptions {
    /// A CD-ROM drive.
    pub cdrom: bool,
    /// The guest can't write it.
    pub read_only: bool,
    /// Its vendor: 8 bytes count; empty: as usual.
    pub vendor: String,
    /// Its product: 16 bytes count; empty: as usual.
    pub product: String,
    /// Its serial number; empty: it has none.
    pub serial: String,
    /// What it is called by where it has no serial number.
    pub name: String,
    /// Its world wide name.
    pub wwn: Option<u64>,
    /// Logical block size in bytes: a power of two, 512 to 4096. A CD-ROM drive's is 2048.
    pub logical_block_size: u32,
    /// Physical block size: a power of two, not below the logical one.
    pub physical_block_size: u32,
    /// What becomes of failures on the host.
    pub policy: Policy,
    /// A CD-ROM drive has a medium.
    pub medium: bool,
}

impl Default for UnitOptions {
    fn default() -> Self {
        Self {
            cdrom: false,
            read_only: false,
            vendor: String::new(),
            product: String::new(),
            serial: String::new(),
            name: String::new(),
            wwn: None,
            logical_block_size: 512,
            physical_block_size: 512,
            policy: Policy::default(),
            medium: false,
        }
    }
}

impl UnitOptions {
    fn check(&self) -> Result<(), DeviceError> {
        let power = |value: u32, from, to| value.is_power_of_two() && (from..=to).contains(&value);
        let bad = |what: &str| Err(DeviceError::Invalid(format!("SCSI: {what}")));
        if !power(self.logical_block_size, 512, 4096) {
            return bad("the logical block size is not a power of two between 512 and 4096");
        }
        if !power(self.physical_block_size, self.logical_block_size, 1 << 21) {
            return bad("the physical block size is not a power of two above the logical one");
        }
        Ok(())
    }
}

/// What the guest is told of before anything else (SAM-5, 5.14), a bit each.
pub(super) mod attention {
    /// Power on, or a reset.
    pub const RESET: u8 = 1;
    /// The capacity has changed.
    pub const CAPACITY: u8 = 2;
}

const WAS_RESET: Sense = (UNIT_ATTENTION, 0x29, 0);
const CAPACITY_CHANGED: Sense = (UNIT_ATTENTION, 0x2a, 9);
const NO_SPACE: Sense = (DATA_PROTECT, 0x27, 7);
const UNWRITABLE: Sense = (MEDIUM_ERROR, 0x0c, 0);

/// Everything of a unit that the guest can observe, beyond what the configuration says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitState {
    attention: u8,
    /// Writes are durable when they are answered.
    writethrough: bool,
    /// A CD-ROM drive's part.
    cd: CdState,
}

/// What there is to do for a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Todo {
    /// It has ended well.
    Good,
    /// It has not.
    Check(Sense),
    /// These bytes go to the guest.
    In(Vec<u8>),
    /// So many bytes come from the guest, at most [`LIST_MOST`]: [`Unit::list`] says what is to be done with them.
    Out(u32),
    /// Blocks go to the guest.
    Read { offset: u64, len: u64 },
    /// Blocks come from it. `through`: they are durable when that is answered.
    Write {
        offset: u64,
        len: u64,
        through: bool,
    },
    /// One block comes from the guest, and is to be everywhere in this range. `unmap`: its space may be given back
    /// if that is all zeroes. `zeroes`: there is no block, it is zeroes.
    Same {
        offset: u64,
        len: u64,
        unmap: bool,
        zeroes: bool,
    },
    /// What was written becomes durable.
    Flush,
    /// The same, and so is what will be.
    WriteThrough,
    /// These ranges (offset, length) are not needed any more.
    Discard(Vec<(u64, u64)>),
}

/// A logical unit.
pub struct Unit {
    pub(super) options: UnitOptions,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) hooks: Arc<dyn DriveHooks>,
    /// Bytes.
    capacity: AtomicU64,
    initial_writethrough: bool,
    /// There is an attention: looked at without the lock.
    attentive: AtomicBool,
    state: Mutex<UnitState>,
    /// Whom it is at, and where.
    seat: Mutex<(Weak<Shared>, Address)>,
}

/// Target and logical unit.
pub type Address = (u8, u16);

impl fmt::Debug for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unit")
            .field("options", &self.options)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Unit {
    /// A unit of what `storage` holds.
    ///
    /// # Errors
    /// Options out of their ranges.
    pub fn new(
        options: UnitOptions,
        storage: Arc<dyn Storage>,
        hooks: Arc<dyn DriveHooks>,
    ) -> Result<Arc<Self>, DeviceError> {
        let options = UnitOptions {
            logical_block_size: match options.cdrom {
                true => BLOCK as u32,
                false => options.logical_block_size,
            },
            physical_block_size: match options.cdrom {
                true => BLOCK as u32,
                false => options.physical_block_size,
            },
            read_only: options.read_only || options.cdrom,
            ..options
        };
        options.check()?;
        let state = UnitState {
            attention: attention::RESET,
            writethrough: storage.writethrough(),
            cd: CdState::new(options.medium),
        };
        Ok(Arc::new(Self {
            capacity: AtomicU64::new(storage.capacity()),
            initial_writethrough: storage.writethrough(),
            attentive: AtomicBool::new(true),
            state: Mutex::new(state),
            seat: Mutex::new((Weak::new(), (0, 0))),
            options,
            storage,
            hooks,
        }))
    }

    pub(super) fn take_seat(&self, shared: &Arc<Shared>, address: Address) {
        *lock(&self.seat) = (Arc::downgrade(shared), address);
    }

    /// Media come and go.
    #[must_use]
    pub fn is_cdrom(&self) -> bool {
        self.options.cdrom
    }

    /// Size as the guest sees it, in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// The storage has another size now, in bytes: the guest is told.
    pub fn set_capacity(&self, bytes: u64) {
        self.capacity.store(bytes, Ordering::Relaxed);
        if self.options.cdrom {
            return;
        }
        self.attend(&mut lock(&self.state), attention::CAPACITY);
        let seat = lock(&self.seat);
        if let Some(shared) = seat.0.upgrade() {
            shared.capacity_changed(seat.1);
        }
    }

    fn attend(&self, state: &mut UnitState, to: u8) {
        state.attention |= to;
        self.attentive
            .store(state.attention != 0, Ordering::Release);
    }

    /// Blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.capacity() / u64::from(self.options.logical_block_size)
    }

    /// A range of blocks in bytes, if it is on the disk.
    pub(super) fn place(&self, first: u64, count: u64) -> Option<(u64, u64)> {
        let block = u64::from(self.options.logical_block_size);
        let end = first.checked_add(count)?;
        // On the disk, so the products are no more than its size.
        (end <= self.blocks()).then(|| (first * block, count * block))
    }

    /// What is to be told before this command is carried out.
    fn attention(&self, operation: u8) -> Option<Sense> {
        if !self.attentive.load(Ordering::Acquire) || inquiry::is_quiet(operation) {
            return None;
        }
        self.take_attention(&mut lock(&self.state))
    }

    fn take_attention(&self, state: &mut UnitState) -> Option<Sense> {
        let (bit, sense) = match state.attention {
            0 => return None,
            set if set & attention::RESET != 0 => (attention::RESET, WAS_RESET),
            _ => (attention::CAPACITY, CAPACITY_CHANGED),
        };
        state.attention &= !bit;
        self.attend(state, 0);
        Some(sense)
    }

    /// What is to be done for a command.
    pub(super) fn run(&self, cdb: &[u8; 32]) -> Todo {
        let operation = cdb[0];
        if let Some(sense) = self.attention(operation) {
            return Todo::Check(sense);
        }
        match operation {
            inquiry::INQUIRY => inquiry::inquiry(self, cdb),
            inquiry::REQUEST_SENSE if self.attentive.load(Ordering::Acquire) => {
                let sense = self.take_attention(&mut lock(&self.state));
                let mut bytes = fixed(sense.unwrap_or_default()).to_vec();
                bytes.truncate(cdb[4].into());
                Todo::In(bytes)
            }
            _ if self.options.cdrom => self.packet(cdb),
            _ => disk::run(self, cdb),
        }
    }

    fn packet(&self, cdb: &[u8; 32]) -> Todo {
        let Some(packet) = cdb.first_chunk() else {
            return Todo::Check(BAD_OPERATION);
        };
        let disc = Disc {
            blocks: self.blocks(),
            interface: 1,
        };
        let mut state = lock(&self.state);
        let tray = state.cd.is_open();
        let result = mmc::run(disc, &mut state.cd, packet);
        let now = state.cd.is_open();
        drop(state);
        if now != tray {
            self.hooks.tray_moved(now);
        }
        match result {
            Ok(Done::Nothing) => Todo::Good,
            Ok(Done::Bytes(bytes)) => Todo::In(bytes),
            Ok(Done::Blocks(first, count)) => Todo::Read {
                offset: first * BLOCK,
                len: count * BLOCK,
            },
            Err(sense) => Todo::Check(sense),
        }
    }

    /// What is to be done with the parameter list that a command wanted.
    pub(super) fn list(&self, cdb: &[u8; 32], list: &[u8]) -> Todo {
        disk::list(self, cdb, list)
    }

    /// What the guest is told of a transfer that failed on the host.
    pub(super) fn failure(&self, write: bool, errno: i32) -> Sense {
        let sense = match errno {
            libc::ENOMEDIUM => mmc::NO_MEDIUM_CLOSED,
            libc::ENOSPC => NO_SPACE,
            _ if write => UNWRITABLE,
            _ => UNREADABLE,
        };
        if self.options.cdrom {
            lock(&self.state).cd.note(0, &Err(sense));
        }
        sense
    }

    /// Writes are durable when answered, or not. On a queue's thread, after a flush where that is turned on.
    pub(super) fn set_writethrough(&self, on: bool) -> bool {
        if on != self.storage.writethrough()
            && let Err(error) = self.storage.set_writethrough(on)
        {
            log::error!("SCSI: a write cache stays as it was: {error}");
            return false;
        }
        true
    }

    /// What a discard and zeroes are.
    pub(super) fn discards(&self) -> bool {
        !self.options.read_only
    }

    /// A task management function's reset.
    pub(super) fn reset_logical(&self) {
        let mut state = lock(&self.state);
        state.cd.reset();
        self.attend(&mut state, attention::RESET);
    }

    /// As after power-on: the tray is in.
    pub(super) fn reset(&self) {
        let mut state = lock(&self.state);
        state.attention = 0;
        self.attend(&mut state, attention::RESET);
        let moved = state.cd.power_on();
        drop(state);
        self.set_writethrough(self.initial_writethrough);
        if moved {
            self.hooks.tray_moved(false);
        }
    }

    /// What is to be saved.
    pub(super) fn save(&self) -> UnitState {
        let mut state = lock(&self.state).clone();
        state.writethrough = self.storage.writethrough();
        state
    }

    /// Takes it over. Another medium than there was then has been put in meanwhile.
    pub(super) fn load(&self, saved: UnitState) {
        self.set_writethrough(saved.writethrough);
        let mut state = lock(&self.state);
        let medium = state.cd.has_medium();
        *state = saved;
        if state.cd.has_medium() != medium {
            state.cd.change(medium);
        }
        self.attend(&mut state, 0);
    }

    /// The tray: out, locked.
    #[must_use]
    pub fn tray(&self) -> (bool, bool) {
        let state = lock(&self.state);
        (state.cd.is_open(), state.cd.is_locked())
    }

    /// Whether the medium may be taken out; if not, the guest is asked for it.
    #[must_use]
    pub fn ask_for_medium(&self) -> bool {
        lock(&self.state).cd.ask_for_medium()
    }

    /// The medium is another one, or there is none any more: the tray has opened and closed.
    pub fn medium_changed(&self, medium: bool) {
        self.capacity
            .store(self.storage.capacity(), Ordering::Relaxed);
        let was_open = {
            let mut state = lock(&self.state);
            let was_open = state.cd.is_open();
            state.cd.change(medium);
            was_open
        };
        if !was_open {
            self.hooks.tray_moved(true);
        }
        self.hooks.tray_moved(false);
    }
}
