//! What is behind a port: a disk or a CD-ROM drive, and how the rest of the machine reaches it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio::block::{Policy, Storage};
use virtio::scsi::DriveHooks;
use virtio::scsi::mmc::CdState;
use virtio::worker::Starter;

use super::atapi;
use super::fis::{Command, DRDY, Registers, SEEK};
use super::{ata, fis};
use crate::devices::lock;

/// What a drive looks like.
#[derive(Debug, Clone)]
pub struct DriveOptions {
    /// A CD-ROM drive.
    pub cdrom: bool,
    /// The guest can't write it.
    pub read_only: bool,
    /// Shown as its serial number; 20 bytes count.
    pub serial: String,
    /// Physical block size in bytes: a power of two, 512 to 64 KiB.
    pub physical_block_size: u32,
    /// What becomes of failures on the host.
    pub policy: Policy,
    /// Who starts its thread; `None`: whoever starts all others'.
    pub starter: Option<Starter>,
    /// A CD-ROM drive has a medium.
    pub medium: bool,
}

/// Everything of a drive that the guest can observe, beyond what the configuration says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveState {
    /// Sectors of a piece of READ MULTIPLE; 0: not there.
    pub multiple: u8,
    /// Transfer modes that were chosen: words 63 and 88 of the identity.
    pub multiword_mode: u8,
    /// As above.
    pub ultra_mode: u8,
    /// SMART is on.
    pub smart: bool,
    /// It looks after its attributes.
    pub smart_autosave: bool,
    /// Writes are durable when they are answered.
    pub writethrough: bool,
    /// The queued command that failed: tag and registers.
    pub failed_tag: Option<(u8, Registers)>,
    /// The guest holds it in reset.
    pub in_reset: bool,
    /// A CD-ROM drive's part.
    pub cd: CdState,
}

/// What there is to do for a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Todo {
    /// Nothing: this is the answer.
    Answer(Registers),
    /// The frame needs none.
    Quiet,
    /// The drive was reset, and says what it is.
    Signature,
    /// These bytes go to the guest.
    In(Vec<u8>),
    /// So many bytes come from the guest: [`Drive::data`] says what is to be done with them.
    Out(u64),
    /// Sectors go to the guest.
    Read {
        /// Where, in bytes.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Sectors come from it.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// Bytes.
        len: u64,
        /// They are durable when that is answered.
        through: bool,
    },
    /// What was written becomes durable.
    Flush,
    /// The same, and so is what will be.
    WriteThrough,
    /// These ranges (offset, length) are not needed any more.
    Discard(Vec<(u64, u64)>),
}

/// A drive.
pub struct Drive {
    pub(super) options: DriveOptions,
    pub(super) storage: Arc<dyn Storage>,
    /// Bytes.
    capacity: AtomicU64,
    initial_writethrough: bool,
    pub(super) hooks: Arc<dyn DriveHooks>,
    state: Mutex<DriveState>,
}

impl fmt::Debug for Drive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drive")
            .field("options", &self.options)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Drive {
    /// A drive of what `storage` holds.
    pub fn new(
        options: DriveOptions,
        storage: Arc<dyn Storage>,
        hooks: Arc<dyn DriveHooks>,
    ) -> Arc<Self> {
        let state = DriveState {
            multiple: ata::MULTIPLE_MOST,
            multiword_mode: 0,
            ultra_mode: 1 << 5,
            smart: true,
            smart_autosave: true,
            writethrough: storage.writethrough(),
            failed_tag: None,
            in_reset: false,
            cd: CdState::new(options.medium),
        };
        Arc::new(Self {
            capacity: AtomicU64::new(storage.capacity()),
            initial_writethrough: storage.writethrough(),
            state: Mutex::new(state),
            options,
            storage,
            hooks,
        })
    }

    /// Media come and go.
    #[must_use]
    pub fn is_cdrom(&self) -> bool {
        self.options.cdrom
    }

    /// Bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// The storage has another size now. The guest is not told: it sees it when it looks again.
    pub fn set_capacity(&self, bytes: u64) {
        self.capacity.store(bytes, Ordering::Relaxed);
    }

    /// What it says it is after a reset.
    pub fn signature(&self) -> Registers {
        Registers {
            status: if self.options.cdrom { 0 } else { DRDY | SEEK },
            // Its diagnostics have found nothing.
            error: 1,
            lba: if self.options.cdrom { 0xeb_1401 } else { 1 },
            count: 1,
            device: 0,
        }
    }

    /// What is to be done for a frame.
    pub fn run(&self, command: &Command, packet: impl FnOnce() -> [u8; 16]) -> Todo {
        let mut state = lock(&self.state);
        if !command.is_command {
            // The reset bit, on and off again.
            let on = command.control & 1 << 2 != 0;
            if !on && std::mem::take(&mut state.in_reset) {
                self.reset_registers(&mut state);
                return Todo::Signature;
            }
            state.in_reset |= on;
            return Todo::Quiet;
        }
        if self.options.cdrom {
            let tray = state.cd.is_open();
            let todo = atapi::run(self, &mut state, command, packet);
            let now = state.cd.is_open();
            drop(state);
            if now != tray {
                self.hooks.tray_moved(now);
            }
            todo
        } else {
            ata::run(self, &mut state, command)
        }
    }

    /// The same, with the data that the command wanted.
    pub fn data(&self, command: &Command, data: &[u8]) -> Todo {
        ata::data(self, command, data)
    }

    /// What the guest is told of a transfer that failed on the host.
    pub fn failure(&self, command: &Command, write: bool, errno: i32) -> Registers {
        if self.options.cdrom {
            return atapi::failure(&mut lock(&self.state), command, errno);
        }
        let error = if write { fis::ABRT } else { fis::UNC };
        Registers::failed(command, error)
    }

    /// A queued command has failed, for the log of that.
    pub fn tag_failed(&self, tag: u8, registers: &Registers) {
        lock(&self.state).failed_tag = Some((tag, *registers));
    }

    /// Writes are durable when answered, or not. On its own thread, after a flush where that is turned on.
    pub fn set_writethrough(&self, on: bool) -> bool {
        if on != self.storage.writethrough()
            && let Err(error) = self.storage.set_writethrough(on)
        {
            log::error!("AHCI: a write cache stays as it was: {error}");
            return false;
        }
        true
    }

    fn reset_registers(&self, state: &mut DriveState) {
        state.multiple = ata::MULTIPLE_MOST;
        state.failed_tag = None;
        state.in_reset = false;
        state.cd.reset();
    }

    /// The link was reset.
    pub fn reset_link(&self) {
        self.reset_registers(&mut lock(&self.state));
    }

    /// As after power-on: the tray is in.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        self.reset_registers(&mut state);
        (state.multiword_mode, state.ultra_mode) = (0, 1 << 5);
        (state.smart, state.smart_autosave) = (true, true);
        let moved = state.cd.power_on();
        drop(state);
        self.set_writethrough(self.initial_writethrough);
        if moved {
            self.hooks.tray_moved(false);
        }
    }

    /// What is to be saved.
    pub fn save(&self) -> DriveState {
        let mut state = lock(&self.state).clone();
        state.writethrough = self.storage.writethrough();
        state
    }

    /// Takes it over. Another medium than there was then has been put in meanwhile.
    pub fn load(&self, saved: DriveState) {
        self.set_writethrough(saved.writethrough);
        let mut state = lock(&self.state);
        let medium = state.cd.has_medium();
        *state = saved;
        if state.cd.has_medium() != medium {
            state.cd.change(medium);
        }
    }

    /// The tray: out, locked.
    pub fn tray(&self) -> (bool, bool) {
        let state = lock(&self.state);
        (state.cd.is_open(), state.cd.is_locked())
    }

    /// Whether the medium may be taken out; if not, the guest is asked for it.
    pub fn ask_for_medium(&self) -> bool {
        lock(&self.state).cd.ask_for_medium()
    }

    /// The medium is another one, or there is none any more: the tray has opened and closed.
    pub fn medium_changed(&self, medium: bool) {
        self.set_capacity(self.storage.capacity());
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
