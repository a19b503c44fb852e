//! What libvirt fills in at define.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::device::{Balloon, Disk, Interface, PciAddress, Rng, Vsock, Watchdog};
use super::{BootDevice, CharDevice, CharSource, Domain, assign, vcpus};
use crate::dom::{Element, MAX_DOCUMENT_BYTES, MAX_NODES};
use crate::error::XmlError;
use crate::grammar;

/// The most vCPUs of a machine.
pub const MAX_VCPUS: u32 = 255;

/// What filling and checking must know about the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// Path of `vireo-vmm`, shown as `<emulator>`.
    pub emulator: String,
    /// Whether `/dev/kvm` runs ordinary guests, or why it does not.
    pub kvm: Result<(), String>,
    /// The host's memory in KiB.
    pub memory_kib: u64,
    /// The most vCPUs of a `kvm` domain; at most [`MAX_VCPUS`].
    pub kvm_max_vcpus: u32,
    /// The most vCPUs of a `qemu` domain; at most [`MAX_VCPUS`].
    pub soft_max_vcpus: u32,
}

/// A machine name that is understood. They all mean the one machine Vireo has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineName {
    /// The name in documents.
    pub name: &'static str,
    /// The versioned name it stands for, if it is an alias.
    pub canonical: Option<&'static str>,
}

impl MachineName {
    /// The machine of a definition that names none.
    pub const DEFAULT: &'static str = "pc-q35-7.2";

    /// Those that capabilities lists, the one first that clients take who have no wish. Other versions of the same
    /// families are understood too.
    pub const ALL: &'static [MachineName] = &[
        MachineName {
            name: "pc-q35-7.2",
            canonical: None,
        },
        MachineName {
            name: "q35",
            canonical: Some("pc-q35-7.2"),
        },
        MachineName {
            name: "pc-i440fx-7.2",
            canonical: None,
        },
        MachineName {
            name: "pc",
            canonical: Some("pc-i440fx-7.2"),
        },
        MachineName {
            name: "microvm",
            canonical: None,
        },
        MachineName {
            name: "vireo",
            canonical: None,
        },
    ];

    /// The name that is stored for `name`, or `None` if it is no machine of ours.
    pub fn canonical(name: &str) -> Option<String> {
        if let Some(known) = Self::ALL.iter().find(|m| m.name == name) {
            return Some(known.canonical.unwrap_or(known.name).to_owned());
        }
        let version = name
            .strip_prefix("pc-q35-")
            .or_else(|| name.strip_prefix("pc-i440fx-"))?;
        // X.Y, X.Y.Z, and a distribution's own names (rhel9.2.0, jammy, jammy-hpb).
        let plain = !version.is_empty()
            && version.len() <= 32
            && version
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
        plain.then(|| name.to_owned())
    }
}

pub(super) fn fill(domain: &mut Domain, host: &HostFacts) -> Result<(), XmlError> {
    fill_os(domain)?;
    fill_boot(domain);
    check_vcpus(domain, host)?;
    vcpus::fill(domain)?;
    check_topology(domain)?;
    if domain.memory.total_kib == 0 {
        return Err(XmlError::xml(
            "Memory size must be specified via <memory> or in the <numa> configuration",
        ));
    }
    if domain.memory.current_kib == 0 || domain.memory.current_kib > domain.memory.total_kib {
        domain.memory.current_kib = domain.memory.total_kib;
    }
    if domain.uuid.is_none() {
        domain.uuid = Some(Uuid::new_v4());
    }
    if domain.devices.emulator.is_none() {
        domain.devices.emulator = Some(host.emulator.clone());
    }
    fill_macs(&mut domain.devices.rest);
    fill_serials(domain)?;
    fill_devices(domain)?;
    assign::assign(domain)?;
    domain.devices.arrange();
    Ok(())
}

/// A topology is one of all vCPUs that there can be.
pub(super) fn check_topology(domain: &Domain) -> Result<(), XmlError> {
    let topology = domain.cpu.as_ref().and_then(|cpu| cpu.topology);
    match topology {
        Some(topology) if topology.vcpus() != Some(domain.vcpu.max) => Err(XmlError::unsupported(
            "CPU topology doesn't match maximum vcpu count",
        )),
        _ => Ok(()),
    }
}

/// What was taken must be readable again, and fit libvirt's protocol.
pub(super) fn check_text(text: &str) -> Result<(), XmlError> {
    // Half is spare: ids, aliases and paths of a running instance are still to come.
    let (bytes, nodes) = (MAX_DOCUMENT_BYTES / 2, MAX_NODES / 2);
    let elements = || text.bytes().filter(|byte| *byte == b'<').count();
    if text.len() > bytes || (text.len() > nodes && elements() > nodes) {
        return Err(XmlError::xml(format!(
            "the definition is too long: {} bytes and {} elements",
            text.len(),
            elements()
        )));
    }
    Ok(())
}

fn fill_os(domain: &mut Domain) -> Result<(), XmlError> {
    let os = &mut domain.os;
    if os.os_type != "hvm" {
        return Err(XmlError::unsupported(format!(
            "no support for os type '{}': only 'hvm' domains run",
            os.os_type
        )));
    }
    match os.arch.as_deref() {
        None => os.arch = Some("x86_64".to_owned()),
        Some("x86_64" | "i686") => {}
        Some(other) => {
            return Err(XmlError::unsupported(format!(
                "No emulator found for arch '{other}'"
            )));
        }
    }
    // libvirt's usual machine is the one that has IDE, and clients count on it: they get what they mean.
    let usual = match domain.devices.rest.iter().any(is_ide) {
        true => "pc",
        false => MachineName::DEFAULT,
    };
    let wanted = os.machine.as_deref().unwrap_or(usual);
    match MachineName::canonical(wanted) {
        Some(canonical) => os.machine = Some(canonical),
        None => {
            return Err(XmlError::unsupported(format!(
                "unsupported machine type '{wanted}'"
            )));
        }
    }
    Ok(())
}

/// A disk at an IDE controller, or such a controller.
fn is_ide(device: &Element) -> bool {
    match device.name.as_str() {
        "disk" => Disk::read(device).is_ok_and(|disk| disk.bus == "ide"),
        "controller" => device.attr("type") == Some("ide"),
        _ => false,
    }
}

/// Without any boot order, the first disk is tried.
fn fill_boot(domain: &mut Domain) {
    let ordered = |device: &Element| device.child("boot").is_some();
    if domain.os.boot.is_empty() && !domain.devices.rest.iter().any(ordered) {
        domain.os.boot.push(BootDevice::Hd);
    }
}

fn check_vcpus(domain: &Domain, host: &HostFacts) -> Result<(), XmlError> {
    let limit = match domain.domain_type {
        super::DomainType::Kvm => host.kvm_max_vcpus,
        super::DomainType::Qemu => host.soft_max_vcpus,
    }
    .clamp(1, MAX_VCPUS);
    if domain.vcpu.max > limit {
        return Err(XmlError::unsupported(format!(
            "Maximum CPUs greater than specified machine type limit {limit}"
        )));
    }
    Ok(())
}

/// A random address in the range that libvirt's QEMU driver uses (52:54:00).
fn fill_macs(devices: &mut [Element]) {
    for interface in devices.iter_mut().filter(|e| e.name == "interface") {
        if interface.child("mac").is_none() {
            let random = Uuid::new_v4();
            let [a, b, c, ..] = random.into_bytes();
            let mac = Element::new("mac")
                .with_attr("address", format!("52:54:00:{a:02x}:{b:02x}:{c:02x}"));
            interface.children.insert(0, crate::dom::Node::Element(mac));
        }
    }
}

/// What libvirt says of single devices, and a memory balloon for who does not refuse one.
fn fill_devices(domain: &mut Domain) -> Result<(), XmlError> {
    let devices = &mut domain.devices.rest;
    let mut targets: HashMap<String, String> = HashMap::new();
    let mut orders = HashSet::new();
    let mut balloons = 0;
    for device in devices.iter_mut() {
        let line = device.line;
        match device.name.as_str() {
            "disk" => {
                Disk::fill(device)?;
                let disk = Disk::read(device)?;
                let path = disk.source.path().unwrap_or_default().to_owned();
                if let Some(other) = targets.get(&disk.target) {
                    return Err(XmlError::xml(format!(
                        "target '{}' duplicated for disk sources '{other}' and '{path}'",
                        disk.target
                    ))
                    .at(line));
                }
                targets.insert(disk.target, path);
            }
            "interface" => Interface::fill(device)?,
            "rng" => Rng::fill(device)?,
            "watchdog" => {
                let watchdog = Watchdog::read(device)?;
                device.set_attr("action", watchdog.action);
            }
            "panic" if device.attr("model").is_none() => device.set_attr("model", "isa"),
            "vsock" => {
                Vsock::read(device)?;
                if device.attr("model").is_none() {
                    device.set_attr("model", "virtio");
                }
            }
            "memballoon" => {
                Balloon::read(device)?;
                balloons += 1;
            }
            "channel" => fill_channel(device)?,
            _ => {}
        }
        PciAddress::of(device)?;
        if let Some(order) = device.child("boot").and_then(|boot| boot.attr("order"))
            && !orders.insert(order.to_owned())
        {
            return Err(XmlError::unsupported(format!(
                "boot order '{order}' used for more than one device"
            ))
            .at(line));
        }
    }
    match balloons {
        0 => devices.push(Element::new("memballoon").with_attr("model", "virtio")),
        1 => {}
        _ => {
            return Err(XmlError::internal(
                "only a single memory balloon device is supported",
            ));
        }
    }
    Ok(())
}

/// A channel without a kind of target is one libvirt cannot name.
fn fill_channel(channel: &mut Element) -> Result<(), XmlError> {
    if channel
        .child("target")
        .and_then(|t| t.attr("type"))
        .is_none()
    {
        return Err(XmlError::unsupported(
            "unknown target type '(null)' specified for character device",
        )
        .at(channel.line));
    }
    Ok(())
}

/// Port numbers, target types, and libvirt's rule that the first console is the first serial port.
fn fill_serials(domain: &mut Domain) -> Result<(), XmlError> {
    let devices = &mut domain.devices;
    for console in &mut devices.consoles {
        if console.target.target_type.is_none() {
            console.target.target_type = Some("serial".to_owned());
        }
    }
    let is_serial = |c: &CharDevice| c.target.target_type.as_deref() == Some("serial");
    match (devices.serials.first(), devices.consoles.first()) {
        (None, Some(console)) if is_serial(console) => {
            let mut serial = console.clone();
            serial.target.target_type = None;
            devices.serials.push(serial);
        }
        (Some(serial), None) if serial.is_isa() => {
            let mut console = CharDevice::new(serial.source.clone());
            console.target.target_type = Some("serial".to_owned());
            devices.consoles.push(console);
        }
        _ => {}
    }
    number_ports(&mut devices.serials)?;
    number_ports(&mut devices.consoles)?;
    for serial in &mut devices.serials {
        let target = serial
            .target
            .target_type
            .get_or_insert_with(|| "isa-serial".to_owned());
        if serial.target.model.is_none() {
            serial.target.model = match target.as_str() {
                "isa-serial" | "pci-serial" | "usb-serial" | "isa-debugcon" => Some(target.clone()),
                _ => None,
            };
        }
    }
    alias_first_console(devices);
    Ok(())
}

/// The first console, if it is of type serial, says again what the first serial port says.
fn alias_first_console(devices: &mut super::Devices) {
    let (Some(serial), Some(console)) = (devices.serials.first(), devices.consoles.first_mut())
    else {
        return;
    };
    if console.target.target_type.as_deref() == Some("serial") {
        console.source = serial.source.clone();
        console.source_rest = serial.source_rest.clone();
        console.log = serial.log.clone();
        console.alias = serial.alias.clone();
        console.target.port = serial.target.port;
        console.rest.clear();
    }
}

/// Ports not stated get the next number after the highest one so far.
fn number_ports(devices: &mut [CharDevice]) -> Result<(), XmlError> {
    let mut next: u32 = 0;
    for device in devices {
        let port = *device.target.port.get_or_insert(next);
        next = next.max(port.checked_add(1).ok_or_else(|| {
            XmlError::xml("Invalid value for attribute 'port' in element 'target'")
        })?);
    }
    Ok(())
}

impl super::Devices {
    /// Gives devices the ids that libvirt gives them in a running domain (`serial0`, `console1`,
    /// `virtio-disk0`, `net0`…), where the user gave none.
    pub fn assign_aliases(&mut self) {
        assign::aliases(self);
        for (index, serial) in self.serials.iter_mut().enumerate() {
            serial.alias.get_or_insert_with(|| format!("serial{index}"));
        }
        for (index, console) in self.consoles.iter_mut().enumerate() {
            console
                .alias
                .get_or_insert_with(|| format!("console{index}"));
        }
        alias_first_console(self);
        self.arrange();
    }

    /// Brings what was added into libvirt's order, as a document that is read again has it.
    pub fn arrange(&mut self) {
        let mut devices = Element::new("devices");
        std::mem::take(&mut self.rest)
            .into_iter()
            .for_each(|device| devices.push(device));
        let mut root = Element::new("domain").with_child(devices);
        grammar::domain().arrange(&mut root);
        self.rest = root
            .take_child("devices")
            .map(|mut devices| devices.take_elements())
            .unwrap_or_default();
    }

    /// Writes the path of a running domain's pseudo-terminal into serial port `index`, and into
    /// the console that stands for it.
    pub fn set_pty_path(&mut self, index: usize, path: &str) {
        if let Some(CharDevice {
            source: CharSource::Pty { path: slot },
            ..
        }) = self.serials.get_mut(index)
        {
            *slot = Some(path.to_owned());
        }
        if index == 0 {
            alias_first_console(self);
        }
    }
}
