//! The control socket: framed JSON over a UNIX stream socket.
//!
//! A frame is a big-endian `u32` length (of what follows, at most [`MAX_FRAME`]) and one JSON
//! value. The caller sends [`Request`]s; the VMM answers each with a [`Reply`] carrying the same
//! id, and sends [`Event`]s of its own accord, in order, to every connection. Several connections
//! may be open. A frame that is too long or not understood ends its connection, not the VMM.
//!
//! Descriptors go alongside (SCM_RIGHTS, with the frame's first bytes); a request says how many are
//! its own. One job (a save, a dump) runs at a time: its call is answered when it is done, other
//! calls meanwhile. If whoever asked for it goes away, it is given up, and the guest runs on.

use serde::{Deserialize, Serialize};

use crate::config::LifecycleAction;
use crate::devices::{
    Bandwidth, ConsolePort, DeviceConfig, DiskLimits, ErrorPolicy, ImageConfig, IoThreadConfig,
    WatchdogAction,
};
use crate::migrate;

/// Longest frame in bytes, without its length field.
pub const MAX_FRAME: u32 = 1 << 20;

/// Bytes of one look at the guest's memory: each takes up to four in a frame.
pub const MAX_PEEK: u32 = 128 << 10;

/// A call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the caller.
    pub id: u64,
    /// What to do.
    pub call: Call,
    /// How many descriptors were passed with it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub descriptors: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What can be asked of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// State and facts: `Answer::Status`.
    Query,
    /// Stops all vCPUs between two instructions; returns when they are stopped.
    Pause,
    /// Lets them run.
    Resume,
    /// Ends the process at once, as pulling the plug does.
    Stop,
    /// Presses the ACPI power button.
    PowerButton,
    /// Hard reset, as the reset button does.
    Reset,
    /// NMI to every vCPU.
    Nmi,
    /// Presses keys of the keyboard, one after the other, and lets go of them later.
    SendKeys {
        /// At most 16, by their codes in scan code set 1; 0xe0XX those with a prefix.
        keys: Vec<u16>,
        /// Milliseconds they are held; 0: 100.
        hold_ms: u32,
    },
    /// What the guest's own power-off does from now on (libvirt's set-lifecycle-action; `reboot`
    /// is a power button press with `Restart` set, put back by the caller after `Event::Shutdown`).
    OnPoweroff(LifecycleAction),
    /// What the guest's own reset does from now on.
    OnReboot(LifecycleAction),
    /// What a panic of the guest does from now on.
    OnCrash(LifecycleAction),
    /// Counters of every device: `Answer::Stats`.
    Stats,
    /// A piece of the guest's memory: `Answer::Memory`.
    Peek {
        /// Where it begins.
        address: u64,
        /// How many bytes, at most [`MAX_PEEK`].
        bytes: u32,
        /// The address is one of those that vCPU 0 uses now.
        linear: bool,
    },
    /// The memory the guest is to keep, in bytes; done when the balloon has been told.
    SetBalloon {
        /// Bytes of RAM the guest keeps.
        target_bytes: u64,
    },
    /// How often the guest is asked for memory statistics; 0: never.
    SetBalloonPeriod {
        /// Seconds.
        seconds: u32,
    },
    /// Plugs or pulls a network card's cable.
    SetLink {
        /// The card.
        id: String,
        /// The cable is in.
        up: bool,
    },
    /// Changes a network card's limits.
    SetBandwidth {
        /// The card.
        id: String,
        /// To the guest, where it changes.
        inbound: Option<Bandwidth>,
        /// From the guest, where it changes.
        outbound: Option<Bandwidth>,
    },
    /// Changes a disk's limits.
    SetDiskLimits {
        /// The disk.
        id: String,
        /// All of them, anew.
        limits: DiskLimits,
        /// The group that it has them with from now on, as `DiskConfig::limits_group`.
        #[serde(default)]
        group: Option<String>,
    },
    /// The I/O threads, as [`Answer::IoThreads`].
    IoThreads,
    /// Makes an I/O thread, or changes the one of that number.
    SetIoThread(IoThreadConfig),
    /// Takes away an I/O thread that serves no disk.
    RemoveIoThread {
        /// Its number.
        id: u32,
    },
    /// Plugs a device into the empty slot of a root port. Descriptors in it count those passed along, from 0.
    AddDevice(Box<DeviceConfig>),
    /// Gives a virtio-serial device another port; the guest is told. Descriptors as for `AddDevice`.
    AddPort {
        /// The device.
        controller: String,
        /// Its port.
        port: Box<ConsolePort>,
    },
    /// Asks the guest to let go of a device behind a root port: `Event::DeviceRemoved` follows, unless it refuses.
    /// A port of a virtio-serial device is taken from it without asking.
    RemoveDevice {
        /// The device, or the port.
        id: String,
    },
    /// vCPUs come, one after the other; the guest is told. If one can't, those before it are there.
    PlugVcpus {
        /// Their numbers.
        vcpus: Vec<u32>,
    },
    /// Asks the guest to let go of a vCPU: `Event::VcpuRemoved` follows, or `Event::VcpuKept` if it says
    /// that it will not.
    UnplugVcpu {
        /// Its number.
        vcpu: u32,
    },
    /// The first write to the file of a disk's image that ends beyond an offset is told, once:
    /// `Event::BlockThreshold`.
    SetBlockThreshold {
        /// The disk.
        disk: String,
        /// Which of its images; the one on top is 0.
        image: u32,
        /// The offset; 0: nothing is told.
        bytes: u64,
    },
    /// Puts another medium into a CD-ROM drive: the tray opens, the medium changes, the tray closes.
    /// Where the guest has locked the tray it is asked to let go of the medium, and this is refused
    /// ([`Failure::locked`]); `Event::TrayMoved` tells when it has opened the tray, and then it can be tried again.
    ChangeMedium {
        /// The drive.
        id: String,
        /// The medium; `None`: the drive is left empty. Descriptors as for `AddDevice`.
        image: Option<Box<ImageConfig>>,
        /// Whatever the guest has locked.
        force: bool,
    },
    /// Makes a disk larger, or (raw) smaller; the guest is told.
    ResizeDisk {
        /// The disk.
        id: String,
        /// Bytes, a multiple of 512.
        bytes: u64,
    },
    /// Writes the whole machine into the empty file that is passed along (open for reading and
    /// writing, a regular file), as `crate::saved` has it. The machine stands still from the call
    /// on, and after it: the caller then ends it, or has it resume.
    Save {
        /// The domain's XML.
        xml: String,
        /// What tells this save from others.
        id: crate::saved::Id,
        /// The guest is to run when it is restored; `None`: if it runs now.
        running: Option<bool>,
    },
    /// As `Save`, while the guest runs: of the moment at which all that it has written until then is in the file, for
    /// which it stands still. At that moment new qcow2 images are put on top of disks, as by `SwitchDisks`; they are
    /// passed along after the file. A failure after that moment leaves them there; `Disks` tells.
    SaveLive {
        /// The domain's XML.
        xml: String,
        /// What tells this save from others.
        id: crate::saved::Id,
        /// Disks' ids, and how people call the new images.
        disks: Vec<(String, String)>,
    },
    /// Writes guest memory and registers into the empty file that is passed along, as an ELF core.
    Dump {
        /// The guest runs meanwhile. (Otherwise it goes on afterwards, if it ran.)
        live: bool,
        /// It stands still afterwards, if it did meanwhile, until it is told to run.
        #[serde(default)]
        hold: bool,
        /// Device states too, as a note.
        devices: bool,
    },
    /// Moves the machine to the process at the other end of the connected stream sockets that are
    /// passed along, as `crate::migrate` has it. The guest runs meanwhile. When the other side has
    /// everything, `Event::MigrationReady` says so, and both stand still until the other side asks
    /// for the right to run: then this call is answered, and the process ends. Until then
    /// `AbortJob` has the guest run on here.
    Migrate(MigrateOptions),
    /// Takes a machine that came from elsewhere over for good, without running it. (`Resume` does
    /// that too.)
    Claim,
    /// Of a machine that gave the right to run away and does not know whether it arrived: the other side has the guest
    /// (`gone`: the process ends), or never had it, and never will (this side has it again; a migration that still waits
    /// for a sign of it fails). Only who has asked the other side may say so.
    Settle {
        /// The other side has it.
        gone: bool,
    },
    /// Changes what the running migration keeps to.
    SetMigration {
        /// Bytes a second, 0: no limit.
        bandwidth: Option<u64>,
        /// Milliseconds the guest may stand still.
        downtime_ms: Option<u64>,
    },
    /// Puts a new qcow2 image on top of each of these disks, whose old one is then only read: all of
    /// them at one moment of the guest's, or none. The images' files are passed along in this
    /// order; each states a backing file, which is what the disk has now.
    SwitchDisks {
        /// Disks' ids, and how people call the new images.
        disks: Vec<(String, String)>,
    },
    /// Makes or deletes an internal snapshot in the qcow2 images on top of these disks: in all of
    /// them at one moment of the guest's. Making it is undone where one fails; deleting passes over
    /// images without one of that name.
    SnapshotDisks {
        /// Disks' ids.
        disks: Vec<String>,
        /// The snapshot's name.
        name: String,
        /// Seconds and nanoseconds since 1970.
        date: (u32, u32),
        /// What is done.
        what: DiskSnapshot,
    },
    /// Begins to move content between a disk's images while the guest runs. A disk has one such job
    /// at a time; `Event::BlockJob` tells how it goes on. The descriptor of the image that is written
    /// into and was only read before is passed along, open for writing; then, where an image that is
    /// not on top gets another one behind it, that image's. Of a copy: those of the image it is made to.
    StartBlockJob {
        /// The disk.
        disk: String,
        /// What is moved.
        job: BlockJob,
        /// Bytes a second at most; 0: no limit.
        speed: u64,
    },
    /// The disks' images and jobs: `Answer::Disks`.
    Disks,
    /// Changes the speed of a disk's job.
    SetBlockJobSpeed {
        /// The disk.
        disk: String,
        /// Bytes a second at most; 0: no limit.
        speed: u64,
    },
    /// Ends a disk's job: it is given up, or (`pivot`, when it is ready) the disk goes on with the
    /// image that was written into. `Event::BlockJob` follows. A copy that is given up when it is ready has the disk's
    /// content of that moment.
    EndBlockJob {
        /// The disk.
        disk: String,
        /// Not given up.
        pivot: bool,
    },
    /// Whoever remembers what a disk's image is knows that it is the copy that the disk went on with: until then the
    /// image before it got every write, too.
    SettleBlockJob {
        /// The disk.
        disk: String,
    },
    /// How far the job is: `Answer::Job`.
    JobStatus,
    /// Gives the job up; it fails, and the guest runs on.
    AbortJob,
}

/// What is done with internal snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSnapshot {
    /// Made of the present content.
    Create,
    /// Forgotten.
    Delete,
}

/// What moves between a disk's images. They are counted from the one on top, which is 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockJob {
    /// What is behind the image on top goes into it, down to image `base`, which is then right behind
    /// it; without one, nothing is.
    Pull {
        /// That image.
        base: Option<u32>,
        /// What the image on top calls it then.
        name: Option<String>,
    },
    /// Images `top` to `base` (without it) go into image `base`, which takes their place. With `top` 0
    /// the job copies what is written until it is ended.
    Commit {
        /// The first.
        top: u32,
        /// The one that is written.
        base: u32,
        /// What the image above them calls it then.
        name: String,
    },
    /// All of the disk goes to another image, and what is written, until the job is ended.
    Copy(Box<BlockCopy>),
}

/// Where a disk is copied to, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockCopy {
    /// The image, with what is behind it. Descriptors in it count those passed along, from 0.
    pub image: ImageConfig,
    /// Only what the image on top has itself.
    pub shallow: bool,
    /// All of it reads as zeroes.
    pub zeroed: bool,
    /// What the guest writes is answered when the copy has it, too, once all has been copied.
    pub synchronous: bool,
    /// How many bytes are copied again where a part of them was written; 0: as usual.
    pub granularity: u64,
    /// How many bytes may be on their way at once; 0: as usual.
    pub buffer: u64,
}

/// The kinds of jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockJobKind {
    /// `BlockJob::Pull`
    Pull,
    /// `BlockJob::Commit`, not of the image on top.
    Commit,
    /// `BlockJob::Commit` of the image on top.
    ActiveCommit,
    /// `BlockJob::Copy`
    Copy,
}

/// How far a disk's job is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockJobStatus {
    /// What it does.
    pub kind: BlockJobKind,
    /// Bytes looked at.
    pub done: u64,
    /// Bytes to look at.
    pub total: u64,
    /// Bytes a second at most; 0: no limit.
    pub speed: u64,
    /// `EndBlockJob` may pivot.
    pub ready: bool,
}

/// A disk's images and job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskImages {
    /// The disk.
    pub id: String,
    /// Its images as people call them, the one on top first; none: a drive without a medium.
    pub images: Vec<String>,
    /// Of a CD-ROM drive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tray: Option<Tray>,
    /// Its job.
    pub job: Option<BlockJobStatus>,
    /// The job before, and how it ended: for whoever did not hear of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<(BlockJobKind, BlockJobNews)>,
    /// It has gone on with a copy, and nobody has said that this is remembered: `Call::SettleBlockJob`.
    #[serde(default)]
    pub unsettled: bool,
}

/// A CD-ROM drive's tray.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Tray {
    /// It is out.
    pub open: bool,
    /// The guest keeps it from being opened.
    pub locked: bool,
}

/// What became of a disk's job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockJobNews {
    /// Everything is copied, and is kept so.
    Ready,
    /// It has ended well: the images have changed.
    Completed,
    /// It was given up.
    Cancelled,
    /// It failed; for people.
    Failed(String),
}

/// How a machine is moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateOptions {
    /// Bytes a second, 0: no limit.
    pub bandwidth: u64,
    /// Milliseconds the guest may stand still.
    pub downtime_ms: u64,
    /// Guest memory is packed with zstd at this level.
    pub zstd_level: Option<i32>,
    /// The guest is slowed down where it writes faster than can be sent: percent at first, and what
    /// is added each time.
    pub auto_converge: Option<(u8, u8)>,
    /// For VMMs of earlier builds, which took a closed connection for the other process's end where this was true: never.
    pub direct: bool,
    /// Ids of disks whose content goes along; the others are the same files on both sides.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Of those only what the image itself holds, nothing that is behind it.
    #[serde(default)]
    pub incremental: bool,
}

/// How far a save, a dump or a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct JobStatus {
    /// Bytes of guest memory.
    pub total: u64,
    /// Of those, done.
    pub processed: u64,
    /// Of those, zero: not written.
    pub zero: u64,
    /// Milliseconds since it began.
    pub elapsed_ms: u64,
    /// Of a migration.
    pub migration: Option<MigrationStatus>,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationStatus {
    /// Bytes sent over all connections.
    pub transferred: u64,
    /// Pages of guest memory sent with their content.
    pub pages: u64,
    /// Bytes of guest memory to be sent in this round and still to be.
    pub remaining: u64,
    /// Rounds begun.
    pub iteration: u32,
    /// Pages a second that the guest wrote during the last round.
    pub dirty_rate: u64,
    /// Bytes a second sent during the last round.
    pub rate: u64,
    /// Milliseconds the guest stands or stood still; before, what is to be expected.
    pub downtime_ms: u64,
    /// Milliseconds before the first page.
    pub setup_ms: u64,
    /// Percent of its time that the guest may not run, so that it writes less.
    pub throttle: u8,
    /// Bytes of the disks that go along.
    pub disk_total: u64,
    /// Bytes of them sent, zeroes counted too.
    pub disk_sent: u64,
    /// Bytes of them still to be sent.
    pub disk_left: u64,
    /// The other side has everything.
    pub ready: bool,
}

/// The answer to a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's id.
    pub id: u64,
    /// What came of it.
    pub result: Result<Answer, Failure>,
}

/// A call's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done.
    Done,
    /// To `Query`.
    Status(Status),
    /// To `Stats`.
    Stats(Stats),
    /// To `Disks`.
    Disks(Vec<DiskImages>),
    /// To `IoThreads`.
    IoThreads(Vec<IoThreadConfig>),
    /// To `Peek`: all that was asked for.
    Memory(Vec<u8>),
    /// To `JobStatus`, `None` without a job; to `Save` and `Dump`, at their end.
    Job(Option<JobStatus>),
}

/// What devices have counted since the machine's start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// Disks, by id.
    pub disks: Vec<(String, DiskStats)>,
    /// Network cards, by id.
    pub nets: Vec<(String, NetStats)>,
    /// The balloon, where there is one.
    pub balloon: Option<BalloonStats>,
    /// Offsets whose passing is told, in the files of images behind a disk's: its id, the image's number, bytes.
    #[serde(default)]
    pub thresholds: Vec<(String, u32, u64)>,
}

/// A disk's counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskStats {
    /// Requests.
    pub read_requests: u64,
    /// Bytes.
    pub read_bytes: u64,
    /// Nanoseconds, summed over requests.
    pub read_ns: u64,
    /// Requests.
    pub write_requests: u64,
    /// Bytes.
    pub write_bytes: u64,
    /// Nanoseconds, summed over requests.
    pub write_ns: u64,
    /// Requests.
    pub flush_requests: u64,
    /// Nanoseconds, summed over requests.
    pub flush_ns: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Size the guest sees, bytes.
    pub capacity: u64,
    /// Bytes the host has given to the image's file.
    pub allocation: u64,
    /// Highest byte offset in use in the image's file.
    pub physical: u64,
    /// The offset in the image's file whose passing is told; 0: none.
    pub threshold: u64,
}

/// A network card's counters, as the guest sees the directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NetStats {
    /// To the guest.
    pub rx_bytes: u64,
    /// To the guest.
    pub rx_packets: u64,
    /// Frames the host could not take from the backend.
    pub rx_errors: u64,
    /// Frames for which the guest had no room, or beyond its limit.
    pub rx_dropped: u64,
    /// From the guest.
    pub tx_bytes: u64,
    /// From the guest.
    pub tx_packets: u64,
    /// Frames the backend refused.
    pub tx_errors: u64,
    /// Frames dropped by filter, limit or a pulled cable.
    pub tx_dropped: u64,
    /// The cable is in.
    pub link_up: bool,
}

/// What a balloon knows. Guest values as virtio 1.2, 5.5.6.3 has them, bytes or counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BalloonStats {
    /// RAM the guest keeps now, bytes.
    pub actual_bytes: u64,
    /// RAM the guest is asked to keep, bytes.
    pub target_bytes: u64,
    /// When the guest last said the following: seconds since 1970; 0: never.
    pub updated: u64,
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Count.
    pub major_faults: Option<u64>,
    /// Count.
    pub minor_faults: Option<u64>,
    /// Bytes nobody uses.
    pub free: Option<u64>,
    /// Bytes of RAM the guest knows.
    pub total: Option<u64>,
    /// Bytes that could be given to programs.
    pub available: Option<u64>,
    /// Bytes of disk caches.
    pub disk_caches: Option<u64>,
    /// Count.
    pub hugetlb_allocations: Option<u64>,
    /// Count.
    pub hugetlb_failures: Option<u64>,
    /// Bytes given back to the host by free-page reporting since the start.
    pub reported: u64,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For people.
    pub message: String,
    /// How far it was, if it was a job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobStatus>,
    /// Of a migration: the right to run the guest was given away, and whether it arrived is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undecided: Option<bool>,
    /// The guest has locked a drive's tray (`Call::ChangeMedium`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub locked: bool,
}

impl Failure {
    /// Whether the guest may run on the other side of a migration by now.
    #[must_use]
    pub fn is_undecided(&self) -> bool {
        // VMMs of before this field said it in words only.
        (self.undecided).unwrap_or_else(|| self.message.contains(migrate::UNKNOWN))
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self {
            message,
            job: None,
            undecided: None,
            locked: false,
        }
    }
}

/// A machine's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Running, paused...
    pub state: MachineState,
    /// CPU time of all vCPU threads so far, nanoseconds, by vCPU; 0 for one that is not there.
    pub vcpu_time_ns: Vec<u64>,
    /// The vCPUs that are there; `None` from one that can't tell: all it gives times of.
    #[serde(default)]
    pub vcpus: Option<Vec<u32>>,
    /// CPU time of the whole process, nanoseconds.
    pub process_time_ns: u64,
    /// For each serial port: its pseudo-terminal's path, where it has one.
    pub serial_ptys: Vec<Option<String>>,
    /// The pseudo-terminals of virtio console ports that have one, by port id.
    #[serde(default)]
    pub port_ptys: Vec<(String, String)>,
    /// The virtio console ports that the guest has open, by id; `None` from one that can't tell.
    #[serde(default)]
    pub open_ports: Option<Vec<String>>,
    /// What can be plugged and is there, by id: devices behind root ports, and virtio console ports; `None` from one
    /// that can't tell.
    #[serde(default)]
    pub devices: Option<Vec<String>>,
    /// The guest was given away, and whether the other side has it is not known here.
    #[serde(default)]
    pub undecided: bool,
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// vCPUs run.
    Running,
    /// Paused by the user, or started so.
    Paused,
    /// Preserved after a panic (`on_crash` preserve).
    Crashed,
    /// Preserved after power-off or reset.
    Halted,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// vCPUs stopped (a `Pause`).
    Paused,
    /// vCPUs run.
    Resumed,
    /// The guest powered itself off.
    Shutdown,
    /// The guest reset itself, or was reset; it boots again if `on_reboot` says so.
    Reset,
    /// The guest panicked (pvpanic), or the backend gave up.
    Crashed {
        /// What happened, for people.
        reason: String,
        /// True for pvpanic; false where the backend cannot go on.
        guest_fault: bool,
    },
    /// The watchdog was not fed.
    Watchdog(WatchdogAction),
    /// A disk request failed on the host's side.
    IoError {
        /// The disk.
        id: String,
        /// The machine was paused for it (`Event::Paused` follows), ignored it, or told the guest.
        policy: ErrorPolicy,
        /// `enospc`, or empty.
        reason: String,
        /// For people.
        message: String,
    },
    /// The guest gave memory to its balloon, or took some back.
    BalloonChange {
        /// RAM the guest keeps now, bytes.
        actual_bytes: u64,
    },
    /// A device was taken out of its slot.
    DeviceRemoved {
        /// The device.
        id: String,
    },
    /// A vCPU has gone.
    VcpuRemoved {
        /// Its number.
        vcpu: u32,
    },
    /// The guest will not let go of a vCPU that it was asked for.
    VcpuKept {
        /// Its number.
        vcpu: u32,
    },
    /// A program in the guest opened or closed a channel (the guest agent, say).
    PortState {
        /// The port's id.
        id: String,
        /// Open.
        open: bool,
    },
    /// A disk's job has come to this point.
    BlockJob {
        /// The disk.
        id: String,
        /// What the job does.
        kind: BlockJobKind,
        /// The point.
        news: BlockJobNews,
    },
    /// A write to the file of one of a disk's images went beyond what was asked for.
    BlockThreshold {
        /// The disk.
        id: String,
        /// Which of its images it was then; the one on top is 0.
        image: u32,
        /// The offset that was asked for.
        threshold: u64,
        /// Bytes beyond it.
        excess: u64,
    },
    /// A CD-ROM drive's tray was opened or closed, by the guest or from outside.
    TrayMoved {
        /// The drive.
        id: String,
        /// It is out.
        open: bool,
    },
    /// A migration's round begins.
    MigrationRound(u32),
    /// The other side of a migration has everything; both stand still.
    MigrationReady,
    /// A machine that came from elsewhere was given the right to run: told before its first step. One whose process ends
    /// without that has never run.
    TookOver,
    /// The process ends now; nothing follows.
    Exiting(ExitRecord),
}

/// A frame from the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromVmm {
    /// Answers a request.
    Reply(Reply),
    /// Happened by itself.
    Event(Event),
}

/// Why a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The cause.
    pub cause: ExitCause,
    /// Details for people; may be empty.
    pub message: String,
}

/// The cause of a VMM's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitCause {
    /// The guest powered off, or reset with `on_reboot` destroy.
    Shutdown,
    /// `Call::Stop` or SIGTERM.
    Stopped,
    /// The guest panicked with `on_crash` destroy.
    Crashed,
    /// The machine could not be built, or the backend cannot go on.
    Failed,
    /// It goes on in another process.
    Migrated,
}
