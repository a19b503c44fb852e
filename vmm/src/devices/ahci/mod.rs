//! An AHCI host controller (AHCI 1.3.1) as ICH9's, with disks (ACS-3) and CD-ROM drives (MMC-6) at its ports.
//!
//! ```text
//!   vCPU threads:   configuration space, ABAR ---> Hba (registers, one lock) ---> pin, MSI
//!                                                   ^  |  kick
//!   a drive's thread (Port):   take, done, tags ----'  v
//!                     command list --> Drive (what a command means) --> the disk's storage
//! ```
//!
//! A port's registers are the guest's and the drive's thread's. That thread is there from the port's first start on. It
//! takes slots from the list; until it has let go of them it may touch guest memory. A guest that stops a port sees it run
//! until then (PxCMD.CR); what comes of these commands it does not see any more. Queued commands run side by side, every
//! other command alone. A command that is kept for later, because the machine stopped for its error, is read anew from
//! guest memory then: nothing of it is in the saved state but its slot's number.

mod ata;
mod atapi;
mod drive;
mod fis;
mod hba;
mod identity;
mod port;
mod table;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};
use virtio::life::Life;
use virtio::pci::{BarKind, Config, Core, Function, Host, Ids, SavedCore};
use virtio::{DeviceError, GuestMemory, Payload, worker};

use self::drive::DriveState;
pub use self::drive::{Drive, DriveOptions};
use self::hba::{Effect, Hba, PortRegisters};
use self::port::Port;
use super::lock;

const KIND: &str = "ahci";
const VERSION: u32 = 1;
/// The BAR with the registers, and its length: six ports and more.
const ABAR: u8 = 5;
const ABAR_LEN: u64 = 0x2000;
/// Most ports.
pub const PORTS_MOST: u8 = 32;

/// The controller.
#[derive(Debug)]
pub struct Ahci {
    hba: Arc<Hba>,
    /// By port.
    seats: Vec<Option<Seat>>,
    threads: Mutex<Vec<Life<Port>>>,
    /// The machine stands still.
    paused: AtomicBool,
}

/// A port's drive.
#[derive(Debug)]
struct Seat {
    drive: Arc<Drive>,
    kick: Arc<EventFd>,
}

/// Everything the guest can observe, beyond what the configuration says.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    core: SavedCore,
    interrupt: bool,
    ports: Vec<PortRegisters>,
    drives: Vec<Option<DriveState>>,
}

impl Ahci {
    /// A controller with these drives at its ports.
    ///
    /// # Errors
    /// The host's refusal; too many ports.
    pub fn new(
        drives: Vec<Option<Arc<Drive>>>,
        memory: Arc<dyn GuestMemory>,
        host: Host,
    ) -> Result<Self, DeviceError> {
        if !(1..=usize::from(PORTS_MOST)).contains(&drives.len()) {
            return Err(DeviceError::Invalid(format!("{KIND}: 1 to 32 ports")));
        }
        let ids = Ids {
            vendor: 0x8086,
            device: 0x2922,
            revision: 2,
            class: 0x01_0601,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut config = Config::endpoint(&ids);
        config.set_pin(1);
        if !config.add_bar(ABAR, BarKind::Memory32, ABAR_LEN) {
            return Err(DeviceError::Invalid(format!("{KIND}: its header is full")));
        }
        let mut core = Core::new(KIND, config, host);
        core.add_msi()?;
        let seat = |drive: Option<Arc<Drive>>| -> Result<Option<Seat>, DeviceError> {
            let Some(drive) = drive else { return Ok(None) };
            let kick = worker::eventfd().map_err(virtio::life::os("eventfd"))?;
            let kick = Arc::new(kick);
            Ok(Some(Seat { drive, kick }))
        };
        let seats: Vec<_> = drives.into_iter().map(seat).collect::<Result<_, _>>()?;
        let ports = seats.iter().map(|seat| {
            let seat = seat.as_ref()?;
            Some((seat.drive.clone(), seat.kick.clone()))
        });
        let hba = Arc::new(Hba::new(core, ports.collect(), memory));
        Ok(Self {
            hba,
            threads: Mutex::new(seats.iter().map(|_| Life::Inactive).collect()),
            seats,
            paused: AtomicBool::new(false),
        })
    }

    /// Has threads run that are to.
    fn settle(&self) {
        let mut threads = lock(&self.threads);
        let paused = self.paused.load(Ordering::Acquire);
        let runs = |index| !paused && self.hba.is_started(index);
        for (index, (thread, seat)) in threads.iter_mut().zip(&self.seats).enumerate() {
            let Some(seat) = seat else { continue };
            let result = match (runs(index), &*thread) {
                (true, Life::Inactive) => self.begin(index, seat, thread),
                (true, Life::Paused(_)) => {
                    thread.resume_by(seat.drive.options.starter.as_ref(), &name(index))
                }
                _ => Ok(()),
            };
            if let Err(error) = result {
                log::error!("{KIND}: port {index}: {error}");
            }
        }
    }

    fn begin(&self, index: usize, seat: &Seat, thread: &mut Life<Port>) -> Result<(), DeviceError> {
        let (drive, kick) = (seat.drive.clone(), seat.kick.clone());
        let port = Port::new(index, self.hba.clone(), drive, kick)
            .map_err(virtio::life::os("the storage's queue"))?;
        thread.start_by(seat.drive.options.starter.as_ref(), &name(index), port)
    }

    /// Brings all threads to rest.
    fn rest(&self) {
        let mut threads = lock(&self.threads);
        threads.iter().for_each(Life::ask_to_stop);
        for (index, thread) in threads.iter_mut().enumerate() {
            if let Err(error) = thread.pause() {
                log::error!("{KIND}: port {index}: {error}");
            }
        }
    }

    /// Ends all threads, and has registers as after power-on; with `function` those of the PCI function, and the
    /// drives, too.
    fn reset_all(&self, function: bool) {
        let mut threads = lock(&self.threads);
        threads.iter().for_each(Life::ask_to_stop);
        for thread in threads.iter_mut() {
            thread.take();
        }
        for seat in self.seats.iter().flatten() {
            match function {
                true => seat.drive.reset(),
                false => seat.drive.reset_link(),
            }
        }
        self.hba.reset(function);
    }
}

fn name(index: usize) -> String {
    format!("sata {index}")
}

impl Function for Ahci {
    fn read_config(&self, offset: u16, width: u8) -> u32 {
        self.hba.core(|core| core.read(offset, width))
    }

    fn write_config(&self, offset: u16, width: u8, value: u32) {
        let master = self.hba.core(|core| {
            let before = core.is_master();
            core.write(offset, width, value);
            (before != core.is_master()).then(|| core.is_master())
        });
        match master {
            Some(true) => self.settle(),
            // From now on it reaches no memory.
            Some(false) => self.rest(),
            None => {}
        }
    }

    fn read_bar(&self, _bar: u8, offset: u32, width: u8) -> u32 {
        let value = self.hba.read(offset) >> (8 * (offset & 3));
        value & (u32::MAX >> (32 - 8 * u32::from(width.clamp(1, 4))))
    }

    fn write_bar(&self, _bar: u8, offset: u32, width: u8, value: u32) {
        let bits = u32::MAX >> (32 - 8 * u32::from(width.clamp(1, 4)));
        let shift = 8 * (offset & 3);
        match self.hba.write(offset, value << shift, bits << shift) {
            Effect::None => {}
            Effect::Started => self.settle(),
            Effect::Reset => self.reset_all(false),
        }
    }

    fn reset(&self) {
        self.reset_all(true);
    }

    fn pause(&self) {
        self.paused.store(true, Ordering::Release);
        self.rest();
    }

    fn resume(&self) {
        self.paused.store(false, Ordering::Release);
        self.settle();
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        for thread in lock(&self.threads).iter() {
            thread.at_rest(KIND)?;
        }
        let (interrupt, ports) = self.hba.save();
        let drive = |seat: &Option<Seat>| seat.as_ref().map(|seat| seat.drive.save());
        let saved = Saved {
            core: self.hba.core(|core| core.save()),
            interrupt,
            ports,
            drives: self.seats.iter().map(drive).collect(),
        };
        Payload::new(KIND, VERSION, &saved)
    }

    fn load(&self, payload: &Payload) -> Result<(), DeviceError> {
        let saved: Saved = payload.open(KIND, VERSION)?;
        if saved.drives.len() != self.seats.len() {
            return Err(DeviceError::State {
                kind: KIND,
                reason: format!("{} ports", saved.drives.len()),
            });
        }
        for (index, (seat, state)) in self.seats.iter().zip(saved.drives).enumerate() {
            match (seat, state) {
                (Some(seat), Some(state)) => seat.drive.load(state),
                (None, None) => {}
                _ => {
                    return Err(DeviceError::State {
                        kind: KIND,
                        reason: format!("a drive at port {index} on one side only"),
                    });
                }
            }
        }
        self.paused.store(true, Ordering::Release);
        self.hba.core(|core| core.load(&saved.core))?;
        self.hba.load(saved.interrupt, saved.ports)
    }
}

impl Drop for Ahci {
    fn drop(&mut self) {
        self.paused.store(true, Ordering::Release);
        for thread in lock(&self.threads).iter_mut() {
            thread.take();
        }
    }
}
