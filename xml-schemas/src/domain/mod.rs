//! The domain definition.

mod assign;

pub use assign::is_virtio_scsi;
mod canonical;
mod char_device;
mod cpu;
mod defaults;
pub mod device;
mod format;
mod live;
mod os;
mod parse;
pub mod support;
mod support_devices;
mod vcpus;

use std::fmt;
use std::str::FromStr;

pub use char_device::{
    CharDevice, CharLog, CharRole, CharSource, CharTarget, SocketMode, TcpProtocol,
};
pub use cpu::{Cpu, CpuFeature, CpuModel, CpuTopology, FeaturePolicy};
pub use defaults::{HostFacts, MAX_VCPUS, MachineName};
pub use os::{BootDevice, Os};
pub(crate) use parse::metadata as kept_metadata;
pub use parse::{ARCHITECTURES, check_name};
pub use support::{Startable, Unsupported};
pub use uuid::Uuid;
pub use vcpus::VcpuState;

use crate::dom::Element;
use crate::error::{Warning, XmlError};

/// A domain definition.
///
/// What Vireo acts on has a field of its own. Everything else that libvirt's schema allows is in
/// the `rest` of its place, and is printed in libvirt's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Which CPU runs it.
    pub domain_type: DomainType,
    /// The id of a running domain; live documents only.
    pub id: Option<u32>,
    /// The name: not empty, no `/`, no control characters.
    pub name: String,
    /// The UUID; [`Domain::fill_defaults`] makes one.
    pub uuid: Option<Uuid>,
    /// A short title, one line.
    pub title: Option<String>,
    /// Free text.
    pub description: Option<String>,
    /// The whole `<metadata>` element, each child in a namespace of its own.
    pub metadata: Option<Element>,
    /// How much memory.
    pub memory: Memory,
    /// How many vCPUs.
    pub vcpu: Vcpu,
    /// What is booted, on what machine.
    pub os: Os,
    /// The whole `<features>` element; see [`Domain::has_feature`].
    pub features: Option<Element>,
    /// CPU model and topology.
    pub cpu: Option<Cpu>,
    /// The clock the guest reads.
    pub clock: Clock,
    /// What the guest's own power-off does.
    pub on_poweroff: LifecycleAction,
    /// What the guest's own reset does.
    pub on_reboot: LifecycleAction,
    /// What a crash of the guest does.
    pub on_crash: LifecycleAction,
    /// The devices.
    pub devices: Devices,
    /// Every other child of `<domain>`, in libvirt's order.
    pub rest: Vec<Element>,
}

/// A parsed definition, and what was kept out of it.
#[derive(Debug, Clone)]
pub struct Parsed {
    /// The definition.
    pub domain: Domain,
    /// What a lenient parse kept out; empty after a strict one.
    pub warnings: Vec<Warning>,
}

/// `<domain type=…>`: the ones Vireo runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DomainType {
    /// `/dev/kvm`.
    Kvm,
    /// The software CPU.
    Qemu,
}

impl DomainType {
    /// The name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }
}

impl fmt::Display for DomainType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How much memory, in KiB.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Memory {
    /// `<memory>`: at boot. Never 0 once defaults are filled.
    pub total_kib: u64,
    /// `<currentMemory>`: what the guest is meant to use; 0 until defaults are filled.
    pub current_kib: u64,
    /// `<maxMemory>`: size and slots for hot-plugged memory.
    pub max: Option<MaxMemory>,
    /// `<memory dumpCore=…>`.
    pub dump_core: Option<bool>,
}

/// `<maxMemory>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxMemory {
    /// Upper bound in KiB.
    pub kib: u64,
    /// How many modules can be plugged.
    pub slots: u32,
}

/// `<vcpu>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vcpu {
    /// The most vCPUs the domain can have; at least 1.
    pub max: u32,
    /// vCPUs online at start if fewer than `max`.
    pub current: Option<u32>,
    /// `placement='auto'`: the host chooses the CPUs.
    pub auto_placement: bool,
    /// Host CPUs, as written.
    pub cpuset: Option<String>,
}

/// What a life-cycle event does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LifecycleAction {
    /// The domain ends.
    Destroy,
    /// The domain boots again.
    Restart,
    /// The domain stays, to be looked at.
    Preserve,
    /// The domain boots again under a new name.
    RenameRestart,
    /// Memory is dumped, then the domain ends (`on_crash` only).
    CoredumpDestroy,
    /// Memory is dumped, then the domain boots again (`on_crash` only).
    CoredumpRestart,
}

impl LifecycleAction {
    /// A dump comes first.
    pub fn dumps(self) -> bool {
        matches!(self, Self::CoredumpDestroy | Self::CoredumpRestart)
    }

    /// The name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Destroy => "destroy",
            Self::Restart => "restart",
            Self::Preserve => "preserve",
            Self::RenameRestart => "rename-restart",
            Self::CoredumpDestroy => "coredump-destroy",
            Self::CoredumpRestart => "coredump-restart",
        }
    }
}

impl FromStr for LifecycleAction {
    type Err = ();

    fn from_str(s: &str) -> Result<Self, ()> {
        Ok(match s {
            "destroy" => Self::Destroy,
            "restart" => Self::Restart,
            "preserve" => Self::Preserve,
            "rename-restart" => Self::RenameRestart,
            "coredump-destroy" => Self::CoredumpDestroy,
            "coredump-restart" => Self::CoredumpRestart,
            _ => return Err(()),
        })
    }
}

/// `<clock>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clock {
    /// What the guest's RTC shows at start.
    pub offset: ClockOffset,
    /// `<timer>` elements.
    pub timers: Vec<Element>,
}

/// `<clock offset=…>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClockOffset {
    /// UTC.
    Utc {
        /// `reset` or seconds, as written.
        adjustment: Option<String>,
    },
    /// The host's local time.
    Localtime {
        /// `reset` or seconds, as written.
        adjustment: Option<String>,
    },
    /// The time in a zone of the host's tz database.
    Timezone(String),
    /// Seconds from UTC or local time, kept across restarts.
    Variable {
        /// Seconds to add.
        adjustment: i64,
        /// `utc` (the default) or `localtime`.
        localtime: bool,
    },
    /// The guest starts at this second of the epoch.
    Absolute {
        /// Seconds since 1970 UTC; `None`: now.
        start: Option<i64>,
    },
}

/// `<devices>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Devices {
    /// The program that runs the domain, as written.
    pub emulator: Option<String>,
    /// Serial ports, by port number once defaults are filled.
    pub serials: Vec<CharDevice>,
    /// Consoles. The first one is the first serial port again, unless its target says otherwise.
    pub consoles: Vec<CharDevice>,
    /// Every other device, in libvirt's order.
    pub rest: Vec<Element>,
}

/// Which document is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// What is stored, and what `dumpxml --inactive` prints: nothing of the running instance.
    Inactive,
    /// What runs now: id, device aliases, the paths of pseudo-terminals.
    Live,
}

impl Domain {
    /// Parses a definition as a client sends it to be defined or created: what belongs to a
    /// running instance (id, aliases but `ua-…`, pseudo-terminal paths) is ignored.
    /// Defaults are not filled yet.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for text that is not well-formed or holds a bad value,
    /// VIR_ERR_XML_INVALID_SCHEMA (strict) for what the schema does not allow,
    /// VIR_ERR_NO_NAME, VIR_ERR_INTERNAL_ERROR or VIR_ERR_CONFIG_UNSUPPORTED where libvirt says so.
    pub fn parse(xml: &str, validation: crate::Validation) -> Result<Parsed, XmlError> {
        parse::parse(xml, validation, View::Inactive)
    }

    /// Parses what [`Domain::format`] wrote with [`View::Live`], with everything in it.
    ///
    /// # Errors
    /// As [`Domain::parse`].
    pub fn parse_live(xml: &str) -> Result<Parsed, XmlError> {
        parse::parse(xml, crate::Validation::Lenient, View::Live)
    }

    /// The name and the uuid that a definition has, and nothing else of it is looked at. [`Domain::parse`]
    /// finds the same ones, if it finds no fault in the rest.
    ///
    /// # Errors
    /// As [`Domain::parse`], for faults before and in the two.
    pub fn identify(xml: &str) -> Result<(String, Option<Uuid>), XmlError> {
        parse::identify(xml)
    }

    /// Parses what [`Domain::format`] wrote with [`View::Inactive`] of a definition whose defaults had been
    /// filled: there is nothing left to fill.
    ///
    /// # Errors
    /// As [`Domain::parse`].
    pub fn parse_stored(xml: &str) -> Result<Domain, XmlError> {
        Ok(Self::parse(xml, crate::Validation::Lenient)?.domain)
    }

    /// The whole document, in libvirt's layout and order: what is stored, and what a client gets
    /// that asks for secrets (VIR_DOMAIN_XML_SECURE) and may write.
    pub fn format(&self, view: View) -> String {
        format::format(self, view, true)
    }

    /// The document without secrets: what every other client gets.
    pub fn format_public(&self, view: View) -> String {
        format::format(self, view, false)
    }

    /// What is stored of it, if it can be read again.
    ///
    /// # Errors
    /// As [`Domain::check_size`].
    pub fn stored_text(&self) -> Result<String, XmlError> {
        let text = self.format(View::Inactive);
        defaults::check_text(&text)?;
        Ok(text)
    }

    /// Refuses a definition that could not be read again, or not be sent: indentation, escapes and what was filled in
    /// make a document longer than it came.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR.
    pub fn check_size(&self) -> Result<(), XmlError> {
        defaults::check_text(&self.format(View::Live))
    }

    /// Fills what a definition may leave out, as libvirt does at define: uuid, architecture,
    /// canonical machine name, emulator, MAC addresses, currentMemory, serial ports and consoles.
    ///
    /// # Errors
    /// VIR_ERR_CONFIG_UNSUPPORTED for a machine, architecture or vCPU count that is not offered.
    pub fn fill_defaults(&mut self, host: &HostFacts) -> Result<(), XmlError> {
        defaults::fill(self, host)
    }

    /// Refuses what cannot follow a power-off, reset or crash, as libvirt's driver for QEMU does when a domain is
    /// defined.
    ///
    /// # Errors
    /// VIR_ERR_CONFIG_UNSUPPORTED.
    pub fn check_actions(&self) -> Result<(), XmlError> {
        use LifecycleAction::{Destroy, Preserve, RenameRestart, Restart};
        let has = |action| [self.on_poweroff, self.on_reboot].contains(&action);
        if has(RenameRestart) || self.on_crash == RenameRestart {
            return Err(XmlError::unsupported(
                "qemu driver doesn't support the 'rename-restart' action for \
                 'on_reboot'/'on_poweroff'/'on_crash'",
            ));
        }
        if (self.on_poweroff, self.on_reboot) == (Restart, Destroy) {
            // The quote that is missing is missing there.
            return Err(XmlError::unsupported(
                "qemu driver doesn't support 'onReboot' set to 'destroy and 'onPoweroff' set to 'reboot'",
            ));
        }
        if has(Preserve) {
            return Err(XmlError::unsupported(
                "qemu driver doesn't support the 'preserve' action for 'on_reboot'/'on_poweroff'",
            ));
        }
        Ok(())
    }

    /// As [`Domain::fill_defaults`], of a definition that was stored by an earlier version, which may have taken what
    /// this one refuses.
    ///
    /// # Errors
    /// As [`Domain::fill_defaults`].
    pub fn fill_stored(&mut self, host: &HostFacts) -> Result<(), XmlError> {
        if vcpus::fill(self).is_err() {
            // Taken before it was looked at: the machine started with its first ones.
            self.rest.retain(|e| e.name != "vcpus");
        }
        // They were disks that a guest can only read.
        for disk in self.devices.rest.iter_mut().filter(|e| e.name == "disk") {
            let bus = disk.child("target").and_then(|e| e.attr("bus"));
            if bus == Some("virtio") && disk.attr("device") == Some("cdrom") {
                disk.set_attr("device", "disk");
            }
        }
        defaults::fill(self, host)
    }

    /// What decides whether the domain can be started here: the devices left out of the machine
    /// (with the reason), or everything this VMM does not have, by name.
    ///
    /// # Errors
    /// VIR_ERR_CONFIG_UNSUPPORTED naming every device or setting that is not there.
    pub fn check_startable(&self, host: &HostFacts) -> Result<Startable, XmlError> {
        support::check_startable(self, host)
    }

    /// Everything that start refuses, by name; empty if nothing.
    pub fn unsupported(&self) -> Vec<Unsupported> {
        support::unsupported(self)
    }

    /// Why the machine cannot have the device at `at`, whatever the others are.
    pub fn unsupported_device(&self, at: usize) -> Option<Unsupported> {
        support::unsupported_device(self, at)
    }

    /// Whether a device is a controller of disks without any, which the machine does without.
    pub fn is_without_drives(&self, device: &Element) -> bool {
        support_devices::is_without_drives(self, device)
    }

    /// Whether a device is a drive with nothing in it at a controller that the machine does without.
    pub fn is_lost_drive(&self, device: &Element) -> bool {
        support_devices::is_lost_drive(self, device)
    }

    /// Gives drives places and controllers, where a definition of an earlier version has none.
    ///
    /// # Errors
    /// As [`Domain::fill_defaults`].
    pub fn place_drives(&mut self) -> Result<(), XmlError> {
        assign::place_drives(self)
    }

    /// What start leaves out of the machine, each with its name ("graphics 'vnc'").
    pub fn left_out(&self) -> Vec<Unsupported> {
        support::left_out(self)
    }

    /// Whether `<features>` switches `name` on (present, and not `state='off'`).
    pub fn has_feature(&self, name: &str) -> bool {
        self.features
            .as_ref()
            .and_then(|f| f.child(name))
            .is_some_and(|f| f.attr("state") != Some("off"))
    }

    /// The `<pm>` setting for `suspend-to-mem` or `suspend-to-disk`, if stated.
    pub fn pm_enabled(&self, name: &str) -> Option<bool> {
        let pm = self.rest.iter().find(|e| e.name == "pm")?;
        Some(pm.child(name)?.attr("enabled")? == "yes")
    }
}
