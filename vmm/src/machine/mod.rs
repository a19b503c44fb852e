//! One machine: built from its config, run by an event loop on the calling thread.

mod block_jobs;
mod build;
mod cpu;
mod devices;
mod keys;
mod lifecycle;
mod live_save;
mod migrate;
mod pc;
mod peek;
mod plug;
mod run;
mod save;
mod vcpus;

use build::waits;
pub use run::block_signals;

use pc::Pc;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::{CpuidEntry, Vcpu, VcpuState, Vm};
use nix::sys::epoll::Epoll;
use nix::sys::signalfd::SignalFd;
use vmm_api::config::MachineConfig;
use vmm_api::control::{BlockJobKind, BlockJobNews, ExitRecord, MachineState};

use self::block_jobs::DiskJob;
use self::devices::PciDevices;
use self::live_save::LiveSave;
use self::migrate::Leaving;
use self::save::RunningJob;
use crate::acpi::{AcpiError, Description};
use crate::bus::Overlap;
use crate::chardev::{Channel, CharError};
use crate::control::Control;
use crate::devices::cpus::Cpus;
use crate::devices::i8042::I8042;
use crate::devices::ioapic::IoApic;
use crate::devices::pm::Pm;
use crate::devices::rtc::Rtc;
use crate::devices::uart::Uart;
use crate::firmware::Rom;
use crate::gdb;
use crate::loader::{Boot, LoadError};
use crate::memory::{GuestMemory, MemoryError};
use crate::migrate::Permit;
use crate::notices::Notices;
use crate::resource::ResourceError;
use crate::state::image::RestoreError;
use crate::vcpu::{Gate, NotStopping, Threads};

/// How long the end waits for readers of consoles and control connections.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long the end waits for disks: images are tidied up, and synced before that.
const CLOSING: Duration = Duration::from_secs(5);

/// Why a machine can't be built, or can't go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The config contradicts itself or asks for what is not there.
    #[error("config: {0}")]
    Config(String),
    /// A file, socket or descriptor.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// A serial port's other end.
    #[error("serial port {port}: {source}")]
    Serial {
        /// COM number.
        port: usize,
        /// What went wrong.
        source: CharError,
    },
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The machine's tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A port used twice.
    #[error("{device}: {source}")]
    Overlap {
        /// Which device.
        device: &'static str,
        /// Where.
        source: Overlap,
    },
    /// The CPU.
    #[error(transparent)]
    Backend(#[from] hypervisor::Error),
    /// The CPU model.
    #[error(transparent)]
    Cpu(#[from] hypervisor::cpu::CpuError),
    /// The saved machine it was to go on from.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The machine that was to come from another process.
    #[error("migration: {0}")]
    Incoming(String),
    /// A vCPU is stuck.
    #[error(transparent)]
    NotStopping(#[from] NotStopping),
    /// The kernel's refusal of something ordinary.
    #[error("{call}: {source}")]
    Os {
        /// System call.
        call: &'static str,
        /// Its error.
        source: std::io::Error,
    },
}

/// Devices whose state the machine resets.
#[derive(Debug)]
struct Devices {
    ioapic: Arc<IoApic>,
    uarts: Vec<Arc<Uart>>,
    i8042: Arc<I8042>,
    pm: Arc<Pm>,
    /// Where vCPUs may come and go.
    cpus: Option<Arc<Cpus>>,
    rtc: Arc<Rtc>,
    pci: PciDevices,
    /// With firmware.
    pc: Option<Pc>,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// For the daemon.
    pub record: ExitRecord,
    /// The process's exit status.
    pub status: i32,
}

/// A machine.
#[derive(Debug)]
pub struct Machine {
    config: MachineConfig,
    /// Dropped first: no vCPU may run when the rest goes.
    threads: Threads,
    gate: Arc<Gate>,
    notices: Arc<Notices>,
    devices: Devices,
    channels: BTreeMap<usize, Channel>,
    /// No number is used twice: what the kernel still has to say of one that is gone reaches nobody.
    next_channel: usize,
    /// Which channel is which virtio-serial port's, by the port's id.
    port_channels: Vec<(String, usize)>,
    /// Those that the guest has open.
    open_ports: BTreeSet<String>,
    control: Option<Control>,
    signals: Option<SignalFd>,
    epoll: Epoll,
    /// The kernel; none with firmware.
    boot: Option<Arc<Boot>>,
    description: Description,
    /// The vCPUs that are or were there, as the backend made them.
    power_on: BTreeMap<usize, VcpuState>,
    /// What each possible one is shown.
    cpuid: Vec<Vec<CpuidEntry>>,
    /// Those that have gone, where the backend can't make them again.
    gone: BTreeMap<usize, Box<dyn Vcpu>>,
    /// A save or a dump that is being written.
    job: Option<RunningJob>,
    /// Disks' jobs.
    block_jobs: Vec<DiskJob>,
    /// What became of each disk's last one.
    ended_block_jobs: BTreeMap<String, (BlockJobKind, BlockJobNews)>,
    /// If that job moves it to another process.
    leaving: Option<Leaving>,
    /// If that job saves it while it runs.
    live_save: Option<LiveSave>,
    /// The disks were let go of, and are not ours until they are taken back.
    without_disks: bool,
    /// It came from another process, which has not given it away yet.
    permit: Option<Permit>,
    /// Whether another process has the guest is not known.
    undecided: bool,
    state: MachineState,
    /// The guest ran, and was stopped by its owner.
    was_stopped: bool,
    /// PCI functions are paused, or were never resumed.
    devices_paused: bool,
    /// Buses whose devices the guest was asked to let go of, and when.
    unplugging: Vec<(u8, Instant)>,
    /// SCSI disks that were taken away, and are in use still.
    units_going: Vec<String>,
    /// Keys that are pressed, until their time has come.
    held: Vec<keys::Chord>,
    /// Consoles whose first peer the start waits for.
    awaited: Vec<usize>,
    /// The guest starts when they have come.
    starts_by_itself: bool,
    ending: Option<Ending>,
    vm: Arc<dyn Vm>,
    memory: Arc<GuestMemory>,
    /// Firmware. After the VM, which maps it.
    rom: Option<Rom>,
}

impl Machine {
    /// The pseudo-terminals of the virtio-serial ports that have one, by their ids.
    fn port_ptys(&self) -> Vec<(String, String)> {
        let path = |(id, index): &(String, usize)| {
            let path = self.channels.get(index)?.pty_path()?;
            Some((id.clone(), path.to_owned()))
        };
        self.port_channels.iter().filter_map(path).collect()
    }

    /// Awaits gdb at `address`; the guest's first instruction waits for it too, if asked to.
    ///
    /// # Errors
    /// The socket can't be had.
    pub fn serve_gdb(&self, address: &gdb::Address, wait: bool) -> Result<(), MachineError> {
        let debugger = self.threads.debugger(wait);
        gdb::start(address, debugger, self.vm.clone(), self.memory.clone()).map_err(|source| {
            MachineError::Os {
                call: "gdb's socket",
                source,
            }
        })
    }

    /// The pseudo-terminals of the serial ports that have one.
    #[must_use]
    pub fn serial_ptys(&self) -> Vec<Option<String>> {
        let uarts = self.devices.uarts.len();
        self.channels
            .values()
            .take(uarts)
            .map(|c| c.pty_path().map(str::to_owned))
            .collect()
    }
}
