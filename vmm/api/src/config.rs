//! `vireo-vmm --config machine.json`: what the machine is made of.
//!
//! Written by the daemon, or by hand. Unknown fields are refused.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Current version of this format.
pub const CONFIG_VERSION: u32 = 1;

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// [`CONFIG_VERSION`].
    pub version: u32,
    /// Name, for messages and the process title.
    pub name: String,
    /// RFC 4122 text form. The guest sees it (SMBIOS, later).
    pub uuid: String,
    /// Which CPU runs the guest.
    pub backend: Backend,
    /// Guest RAM in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// vCPUs the machine can have.
    pub vcpus: u32,
    /// Some of them may come and go while the machine runs; `None`: all are there for good.
    #[serde(default)]
    pub vcpu_hotplug: Option<VcpuHotplug>,
    /// CPU model and features.
    #[serde(default)]
    pub cpu: CpuConfig,
    /// What is loaded and entered.
    pub boot: BootConfig,
    /// ACPI tables are offered.
    #[serde(default = "yes")]
    pub acpi: bool,
    /// 16550A serial ports, COM1 first. At most 4.
    #[serde(default)]
    pub serials: Vec<SerialConfig>,
    /// The pvpanic ISA device (port 0x505) is there.
    #[serde(default)]
    pub pvpanic: bool,
    /// I/O threads: groups of threads that serve disks.
    #[serde(default)]
    pub iothreads: Vec<crate::devices::IoThreadConfig>,
    /// PCI devices. Buses before what is behind them.
    #[serde(default)]
    pub devices: Vec<crate::devices::DeviceConfig>,
    /// Virtual machine generation id (RFC 4122 text form), offered where it is given.
    #[serde(default)]
    pub generation_id: Option<String>,
    /// QEMU's isa-debug-exit: a write of V to this port ends the VMM with status (V<<1)|1.
    #[serde(default)]
    pub debug_exit_port: Option<u16>,
    /// Bochs-style debug console: bytes written to this port go to the VMM's standard error.
    #[serde(default)]
    pub debug_console_port: Option<u16>,
    /// RTC offset from UTC in seconds.
    #[serde(default)]
    pub rtc_offset_seconds: i64,
    /// What the guest's own power-off does.
    #[serde(default = "destroy")]
    pub on_poweroff: LifecycleAction,
    /// What the guest's own reset does, a triple fault among them.
    #[serde(default = "restart")]
    pub on_reboot: LifecycleAction,
    /// What a panic does.
    #[serde(default = "destroy")]
    pub on_crash: LifecycleAction,
    /// The machine goes on from here instead of booting. (A later reset boots.)
    #[serde(default)]
    pub restore: Option<RestoreConfig>,
    /// The machine comes over these connected stream sockets (`crate::migrate`, from the hello on)
    /// instead of booting. It stays paused until `resume`.
    #[serde(default)]
    pub incoming: Vec<Resource>,
    /// vCPUs stay paused until `resume`.
    #[serde(default)]
    pub start_paused: bool,
    /// Listening control socket; without it the VMM runs by hand and ends with the guest.
    #[serde(default)]
    pub control: Option<Resource>,
    /// Where the final [`crate::control::ExitRecord`] is written before the process ends
    /// (JSON; for a daemon that was away at that moment).
    #[serde(default)]
    pub exit_record: Option<Resource>,
}

/// vCPUs that come and go.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuHotplug {
    /// Numbers of those that are not there at the start. The first vCPU always is.
    #[serde(default)]
    pub absent: BTreeSet<u32>,
}

/// A saved machine to go on with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// The image (`crate::saved`). It must not change as long as the machine lives, unless it is
    /// copied; it may be unlinked.
    pub image: Resource,
    /// Guest memory is read whole, checked and copied before the machine counts as built. Otherwise
    /// it is mapped: pages come when they are touched, and checking goes on in the background.
    #[serde(default)]
    pub copy: bool,
}

/// Which CPU runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// `/dev/kvm`.
    Kvm,
    /// The software CPU.
    Soft,
}

/// CPU model and features.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// A libvirt CPU model name; `None` is the backend's default (everything it has).
    #[serde(default)]
    pub model: Option<String>,
    /// Features switched on (`true`) or off beyond the model, by libvirt's names.
    #[serde(default)]
    pub features: Vec<(String, bool)>,
    /// How the vCPUs are arranged; `None`: as cores of one socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<TopologyConfig>,
}

/// How vCPUs are arranged. The product is their number; the first ones share a core, then a socket. A vCPU's APIC id has
/// as many bits for its thread, and for its core, as their numbers need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopologyConfig {
    /// Sockets.
    pub sockets: u32,
    /// Cores of a socket.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

/// A file, socket or device the VMM uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resource {
    /// A descriptor inherited from the parent.
    Fd(i32),
    /// Opened (or, for a listening socket, bound) by the VMM itself: use by hand.
    Path(PathBuf),
}

/// What is loaded and entered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// bzImage, ELF with a PVH note, or Multiboot kernel. This or `firmware`.
    #[serde(default)]
    pub kernel: Option<Resource>,
    /// A PC's firmware, which finds out itself what to boot.
    #[serde(default)]
    pub firmware: Option<FirmwareConfig>,
    /// Initial RAM disk (Multiboot: the first module).
    #[serde(default)]
    pub initrd: Option<Resource>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Enter a bzImage through its own decompressor instead of unpacking it here.
    #[serde(default)]
    pub no_unpack: bool,
}

/// A PC's firmware: entered at its reset vector, with the devices of a PC/AT around it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirmwareConfig {
    /// The ROM's image: whole pages, 64 to 256 KiB. It ends at 4 GiB, and its copy at 1 MiB.
    pub rom: Resource,
    /// Its console is on COM1 (SeaBIOS: `etc/sercon-port`).
    #[serde(default)]
    pub serial_console: bool,
    /// It offers its boot menu for so many milliseconds.
    #[serde(default)]
    pub boot_menu_ms: Option<u32>,
    /// Ids of the devices it tries to boot from, the first one first, and no others. Empty: all, in
    /// its own order.
    #[serde(default)]
    pub boot_order: Vec<String>,
    /// With nothing to boot it starts over after so many milliseconds; else it stays as it is.
    #[serde(default)]
    pub retry_ms: Option<u16>,
}

/// A serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// The other end.
    pub backend: CharBackend,
    /// Everything the guest writes is appended here too.
    #[serde(default)]
    pub log: Option<Resource>,
}

/// The host's end of a character device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CharBackend {
    /// Nothing: output is dropped, there is no input.
    Null,
    /// Standard input and output of the VMM (use by hand).
    Stdio,
    /// The master side of a pseudo-terminal; `None`: the VMM makes one and says where.
    Pty(Option<Resource>),
    /// Output only.
    File(Resource),
    /// A listening UNIX or TCP socket: one peer at a time. (telnet: TCP with telnet negotiation.)
    Listen {
        /// The socket.
        socket: Resource,
        /// RFC 854 telnet commands are answered and stripped.
        #[serde(default)]
        telnet: bool,
        /// The guest starts only after the first peer connected.
        #[serde(default)]
        wait: bool,
    },
    /// A connected UNIX or TCP socket.
    Connected(Resource),
}

/// What a life-cycle event of the guest does (libvirt's on_poweroff, on_reboot, on_crash).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LifecycleAction {
    /// The process ends.
    Destroy,
    /// The machine is reset and boots again.
    Restart,
    /// The machine stays, paused, to be looked at.
    Preserve,
}

fn yes() -> bool {
    true
}

fn destroy() -> LifecycleAction {
    LifecycleAction::Destroy
}

fn restart() -> LifecycleAction {
    LifecycleAction::Restart
}
