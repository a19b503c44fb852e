//! The PCI devices of a machine.

use serde::{Deserialize, Serialize};

use crate::config::{CharBackend, Resource};

/// Where a PCI function is (PCI 3.0, 3.2.2.3): segment 0 always.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(deny_unknown_fields)]
pub struct PciAddress {
    /// Bus number as the daemon counts them: 0 is the root bus, N the bus behind the root port
    /// with `index` N.
    pub bus: u8,
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            bus,
            device,
            function,
        } = self;
        write!(f, "{bus:02x}:{device:02x}.{function:x}")
    }
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// The name it is called by in messages, calls and events: libvirt's alias
    /// (`virtio-disk0`, `net0`). Unique in a machine.
    pub id: String,
    /// Its place.
    pub address: PciAddress,
    /// What it is.
    pub kind: DeviceKind,
}

impl DeviceConfig {
    /// Every file, socket and descriptor it is made from.
    pub fn resources_mut(&mut self) -> Vec<&mut Resource> {
        let mut all = Vec::new();
        match &mut self.kind {
            DeviceKind::Disk(disk) => {
                if let Some(of) = &mut disk.image {
                    all.extend(of.resources_mut());
                }
            }
            DeviceKind::Net(net) => match &mut net.backend {
                NetBackend::Tap(taps) => all.extend(taps),
                NetBackend::Stream(stream) => all.push(stream),
            },
            DeviceKind::Rng(rng) => all.push(&mut rng.source),
            DeviceKind::Vsock(vsock) => all.extend(vsock.listener.as_mut()),
            DeviceKind::Console(console) => {
                all.extend(
                    console
                        .ports
                        .iter_mut()
                        .flat_map(ConsolePort::resources_mut),
                );
            }
            DeviceKind::RootPort(_)
            | DeviceKind::Balloon(_)
            | DeviceKind::Watchdog(_)
            | DeviceKind::Ahci(_)
            | DeviceKind::Scsi(_) => {}
        }
        all
    }
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A PCI Express root port; devices with `bus` equal to its `index` are behind it.
    RootPort(RootPortConfig),
    /// A disk or CD-ROM drive: virtio-blk, or at a SATA or SCSI controller ([`DiskConfig::bus`]).
    Disk(Box<DiskConfig>),
    /// virtio-net.
    Net(NetConfig),
    /// virtio-console (serial): several ports.
    Console(ConsoleConfig),
    /// virtio-rng.
    Rng(RngConfig),
    /// virtio-balloon.
    Balloon(BalloonConfig),
    /// virtio-vsock.
    Vsock(VsockConfig),
    /// The i6300ESB watchdog.
    Watchdog(WatchdogConfig),
    /// A SATA controller: ICH9's AHCI host controller (8086:2922).
    Ahci(AhciConfig),
    /// A SCSI controller: virtio-scsi.
    Scsi(ScsiConfig),
}

/// A SATA controller. Its drives are devices of their own, which name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AhciConfig {
    /// 1 to 32; ICH9 has six.
    #[serde(default = "six")]
    pub ports: u8,
}

/// A virtio-scsi controller (virtio 1.2, 5.6). Its drives are devices of their own, which name it; they come and go
/// while the guest runs, without a slot of PCI Express.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScsiConfig {
    /// Request queues; 0: one a vCPU, at most 16.
    pub queues: u16,
    /// The I/O thread whose threads serve its queues, and its drives' host I/O; `None`: threads of its own.
    pub iothread: Option<u32>,
    /// What the guest is told of the longest transfer, in sectors of 512 bytes (libvirt's `max_sectors`).
    pub max_sectors: Option<u32>,
    /// What the guest is told of how many commands a drive takes at a time (libvirt's `cmd_per_lun`).
    pub cmd_per_lun: Option<u32>,
}

impl ScsiConfig {
    /// The highest target.
    pub const TARGET_MOST: u8 = 255;
    /// The highest logical unit of a target (virtio 1.2, 5.6.6.1: 14 bits).
    pub const LUN_MOST: u16 = 16383;
}

/// Where a drive is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskBus {
    /// A PCI function of its own, at the device's address.
    #[default]
    Virtio,
    /// At a port of a SATA controller, whose address is the drive's, too.
    Sata {
        /// The controller's id.
        controller: String,
        /// Its port, from 0.
        port: u8,
    },
    /// A logical unit of a SCSI controller, whose address is the drive's, too.
    Scsi {
        /// The controller's id.
        controller: String,
        /// At most [`ScsiConfig::TARGET_MOST`].
        target: u8,
        /// At most [`ScsiConfig::LUN_MOST`].
        lun: u16,
    },
}

impl DiskBus {
    /// virtio-blk.
    #[must_use]
    pub fn is_virtio(&self) -> bool {
        *self == Self::Virtio
    }
}

/// A root port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootPortConfig {
    /// 1 to 255: the `bus` of the devices behind it.
    pub index: u8,
    /// Slot's physical number, and chassis number.
    pub chassis: u8,
    /// Port number in the link capabilities.
    pub port: u8,
    /// Devices may be plugged and unplugged while the guest runs.
    #[serde(default)]
    pub hotplug: bool,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Where it is.
    #[serde(default, skip_serializing_if = "DiskBus::is_virtio")]
    pub bus: DiskBus,
    /// A CD-ROM drive (SATA and SCSI only): the guest reads, and takes media out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cdrom: bool,
    /// The guest's content; `None`: an empty drive (cdrom only).
    pub image: Option<ImageConfig>,
    /// The guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// Other users of the image are tolerated: no lock is taken against other writers that
    /// say so too.
    #[serde(default)]
    pub shareable: bool,
    /// How the host caches.
    #[serde(default)]
    pub cache: CacheMode,
    /// How host I/O is done.
    #[serde(default)]
    pub io: IoMode,
    /// The guest's discards reach the host.
    #[serde(default)]
    pub discard: bool,
    /// What writes of zeroes become.
    #[serde(default)]
    pub detect_zeroes: DetectZeroes,
    /// At most 20 bytes of ASCII (virtio 1.2, 5.2.6.1 `VIRTIO_BLK_T_GET_ID`); of SCSI 36.
    #[serde(default)]
    pub serial: String,
    /// SCSI only: INQUIRY's vendor, at most 8 printable ASCII bytes; empty: as usual.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub vendor: String,
    /// SCSI only: INQUIRY's product, at most 16 printable ASCII bytes; empty: as usual.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub product: String,
    /// SCSI only: its world wide name (VPD page 83h).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wwn: Option<u64>,
    /// Request queues; 0: one a vCPU, at most 16. Of virtio-blk only.
    #[serde(default)]
    pub queues: u16,
    /// Logical block size in bytes: 512 or 4096.
    #[serde(default = "sector")]
    pub logical_block_size: u32,
    /// Physical block size in bytes.
    #[serde(default = "sector")]
    pub physical_block_size: u32,
    /// Limits.
    #[serde(default)]
    pub limits: DiskLimits,
    /// Disks with the same name here have their limits together: whatever is set for one is for all.
    #[serde(default)]
    pub limits_group: Option<String>,
    /// The I/O thread whose threads serve it; `None`: threads of its own.
    #[serde(default)]
    pub iothread: Option<u32>,
    /// What a host error on a read does.
    #[serde(default)]
    pub on_read_error: ErrorPolicy,
    /// What a host error on a write does.
    #[serde(default = "enospace")]
    pub on_write_error: ErrorPolicy,
}

/// An image with everything behind it. Every file is opened by the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// Format of `file`: never guessed.
    pub format: ImageFormat,
    /// The file or block device.
    pub file: Resource,
    /// Its name, for messages.
    pub name: String,
    /// qcow2's external data file, where the image has one.
    #[serde(default)]
    pub data_file: Option<Resource>,
    /// What is behind it, where the image (or the definition) says so.
    #[serde(default)]
    pub backing: Option<Box<ImageConfig>>,
    /// A file (sealed memfd or pipe) that holds the LUKS passphrase, read once at start.
    #[serde(default)]
    pub passphrase: Option<Resource>,
}

impl ImageConfig {
    /// Everything on the host that it is made from, and what is behind it.
    pub fn resources_mut(&mut self) -> Vec<&mut Resource> {
        let mut all = Vec::new();
        let mut next = Some(self);
        while let Some(config) = next {
            all.push(&mut config.file);
            all.extend(config.data_file.as_mut());
            all.extend(config.passphrase.as_mut());
            next = config.backing.as_deref_mut();
        }
        all
    }
}

/// An image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// LUKS version 1 on raw bytes.
    Luks,
}

/// libvirt's `<driver cache=…>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// O_DIRECT; the guest sees a write cache.
    None,
    /// The host's page cache; the guest sees a write cache.
    #[default]
    Writeback,
    /// Every write reaches the disk before it is answered.
    Writethrough,
    /// O_DIRECT and every write on the disk before it is answered.
    Directsync,
    /// As writeback, and the guest's flushes are ignored.
    Unsafe,
}

/// libvirt's `<driver io=…>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IoMode {
    /// System calls on worker threads.
    Threads,
    /// Asynchronous host I/O (io_uring serves this too).
    Native,
    /// io_uring; worker threads where the host has none.
    #[default]
    IoUring,
}

/// libvirt's `<driver detect_zeroes=…>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DetectZeroes {
    /// Zeroes are data.
    #[default]
    Off,
    /// Zeroes are written as zero clusters or holes that keep their space.
    On,
    /// As `On`, giving space back where `discard` allows.
    Unmap,
}

/// libvirt's `error_policy` and `rerror_policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorPolicy {
    /// The guest gets an I/O error.
    #[default]
    Report,
    /// The machine is paused, and the request done again when it is resumed.
    Stop,
    /// The guest is told that all went well.
    Ignore,
    /// `Stop` for lack of space, `Report` otherwise.
    Enospace,
}

/// The threads that serve the disks of an I/O thread: one a queue, workers that those disks share, and one that is
/// always there and starts the others. All have the name [`IoThreadConfig::thread_name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoThreadConfig {
    /// Its number, at most [`IoThreadConfig::MOST`].
    pub id: u32,
    /// Workers that are there, work or not.
    #[serde(default)]
    pub pool_min: Option<u32>,
    /// The most workers.
    #[serde(default)]
    pub pool_max: Option<u32>,
    /// How long a queue's thread looks for requests before it sleeps, in nanoseconds, at most; 0: not at all.
    #[serde(default)]
    pub poll_max_ns: u64,
    /// What that time grows by; 0: as usual.
    #[serde(default)]
    pub poll_grow: u32,
    /// What it shrinks by; 0: to nothing.
    #[serde(default)]
    pub poll_shrink: u32,
}

impl IoThreadConfig {
    /// The highest number: names of threads have room for no higher one.
    pub const MOST: u32 = 9_999_999;
    /// What the names of its threads begin with.
    pub const NAME: &str = "iothread";

    /// One that nothing is said of.
    #[must_use]
    pub fn new(id: u32) -> Self {
        Self {
            id,
            pool_min: None,
            pool_max: None,
            poll_max_ns: 0,
            poll_grow: 0,
            poll_shrink: 0,
        }
    }

    /// What its threads are called.
    #[must_use]
    pub fn thread_name(&self) -> String {
        format!("{}{}", Self::NAME, self.id)
    }
}

/// libvirt's `<iotune>`. 0: no limit. Rates are per second, in bytes or requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskLimits {
    /// Bytes, both directions.
    pub total_bytes: Limit,
    /// Bytes read.
    pub read_bytes: Limit,
    /// Bytes written.
    pub write_bytes: Limit,
    /// Requests, both directions.
    pub total_iops: Limit,
    /// Read requests.
    pub read_iops: Limit,
    /// Write requests.
    pub write_iops: Limit,
    /// A request counts once for every so many bytes; 0: once.
    pub iops_size: u64,
}

/// One rate with its burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limit {
    /// Units a second in the long run; 0: no limit.
    pub rate: u64,
    /// Units a second during a burst; 0: no burst.
    pub burst: u64,
    /// How long a burst may last, in seconds; 0 counts as 1.
    pub burst_seconds: u64,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The other end.
    pub backend: NetBackend,
    /// What the guest is told (`VIRTIO_NET_F_MTU`), 68 to 65535.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// The cable is in.
    #[serde(default = "yes")]
    pub link_up: bool,
    /// Pairs of queues, 1 to 8; a tap has as many descriptors.
    #[serde(default = "one")]
    pub queue_pairs: u16,
    /// Frames with another source address than `mac` are dropped.
    #[serde(default)]
    pub filter_source_mac: bool,
    /// To the guest.
    #[serde(default)]
    pub inbound: Bandwidth,
    /// From the guest.
    #[serde(default)]
    pub outbound: Bandwidth,
}

/// The other end of a network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetBackend {
    /// Descriptors of a tap or macvtap device made with `IFF_VNET_HDR`, one a queue pair.
    Tap(Vec<Resource>),
    /// A connected UNIX stream socket that carries frames, each after its length as a big-endian
    /// `u32` (passt, and QEMU's `-netdev stream`).
    Stream(Resource),
}

/// libvirt's `<bandwidth>`. 0: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bandwidth {
    /// Bytes a second in the long run.
    pub average: u64,
    /// Bytes a second during a burst.
    pub peak: u64,
    /// Bytes of one burst.
    pub burst: u64,
}

/// A virtio-serial device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Its ports. Port 0 is always a console, or unused.
    pub ports: Vec<ConsolePort>,
    /// Most ports, 1 to 511.
    pub max_ports: u32,
}

/// A port of a virtio-serial device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsolePort {
    /// The name it is called by: libvirt's alias (`channel0`, `console1`).
    pub id: String,
    /// 0 to `max_ports - 1`.
    pub number: u32,
    /// A console (hvc); otherwise a channel.
    pub console: bool,
    /// What the guest finds in /dev/virtio-ports; at most 63 bytes; empty: none.
    #[serde(default)]
    pub name: String,
    /// The other end.
    pub backend: CharBackend,
    /// Everything the guest writes is appended here too.
    #[serde(default)]
    pub log: Option<Resource>,
}

impl ConsolePort {
    /// Every file, socket and descriptor it is made from.
    pub fn resources_mut(&mut self) -> Vec<&mut Resource> {
        let mut all = Vec::new();
        match &mut self.backend {
            CharBackend::Null | CharBackend::Stdio => {}
            CharBackend::Pty(master) => all.extend(master.as_mut()),
            CharBackend::File(own)
            | CharBackend::Listen { socket: own, .. }
            | CharBackend::Connected(own) => all.push(own),
        }
        all.extend(self.log.as_mut());
        all
    }
}

/// A source of entropy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Read for what the guest gets: /dev/urandom, a hardware generator, an EGD socket is not
    /// offered.
    pub source: Resource,
    /// At most so many bytes in each `period_ms`; 0: no limit.
    #[serde(default)]
    pub max_bytes: u32,
    /// Milliseconds.
    #[serde(default = "second")]
    pub period_ms: u32,
}

/// A memory balloon.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// Bytes of RAM the guest is to keep at start; 0: all of it.
    pub target_bytes: u64,
    /// The guest is asked for statistics every so many seconds; 0: never.
    pub stats_period_seconds: u32,
    /// The guest reports free pages, which go back to the host.
    pub free_page_reporting: bool,
    /// The guest takes memory back when it runs out.
    pub deflate_on_oom: bool,
}

/// A socket between guest and host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// Host programs connect here and send `CONNECT port\n` (Firecracker's and crosvm's
    /// hybrid scheme). A listening UNIX socket.
    #[serde(default)]
    pub listener: Option<Resource>,
    /// What the guest connects to: for host port P the UNIX socket `<prefix>_P`.
    #[serde(default)]
    pub prefix: Option<std::path::PathBuf>,
}

/// A watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchdogConfig {
    /// What happens when it is not fed.
    pub action: WatchdogAction,
}

/// libvirt's `<watchdog action=…>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WatchdogAction {
    /// Hard reset.
    Reset,
    /// The power button is pressed.
    Shutdown,
    /// The power goes off.
    Poweroff,
    /// The machine is paused.
    Pause,
    /// Only the event is sent.
    None,
    /// The daemon dumps the memory; the VMM pauses for it.
    Dump,
    /// NMI to every vCPU.
    InjectNmi,
}

fn yes() -> bool {
    true
}

fn one() -> u16 {
    1
}

fn six() -> u8 {
    6
}

fn sector() -> u32 {
    512
}

fn second() -> u32 {
    1000
}

fn enospace() -> ErrorPolicy {
    ErrorPolicy::Enospace
}
