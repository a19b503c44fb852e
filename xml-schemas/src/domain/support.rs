//! Whether this VMM can run a definition, decided at start and by name.
//!
//! Three kinds of things: what the machine has or what changes nothing for guest and host
//! (nothing is said), what a guest with a text console does without (left out, with a message),
//! and everything else (refused).

use std::collections::HashSet;

use super::support_devices::{Fate, fate, is_lost_drive, place, places, source_fault};
use super::{CharDevice, Domain, DomainType, HostFacts, LifecycleAction, Os};
use crate::dom::Element;
use crate::error::XmlError;

/// Serial ports of the machine.
pub const MAX_SERIAL_PORTS: u32 = 4;

/// Something a definition asks for that the machine does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported {
    /// What, as a person would name it: `disk 'vda'`, `tpm`, `cputune`.
    pub name: String,
    /// Why, or what to do about it; may be empty.
    pub reason: String,
}

impl Unsupported {
    pub(super) fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            reason: String::new(),
        }
    }

    fn because(name: impl Into<String>, reason: &str) -> Self {
        Self {
            name: name.into(),
            reason: reason.to_owned(),
        }
    }
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        if !self.reason.is_empty() {
            write!(f, " ({})", self.reason)?;
        }
        Ok(())
    }
}

/// A definition that can be started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Startable {
    /// What a guest with a text console does without; the log and `dominfo` name it.
    pub left_out: Vec<Unsupported>,
}

pub(super) fn check_startable(domain: &Domain, host: &HostFacts) -> Result<Startable, XmlError> {
    if domain.memory.total_kib > host.memory_kib {
        return Err(XmlError::unsupported(format!(
            "the domain's {} KiB of memory are more than the host's {} KiB",
            domain.memory.total_kib, host.memory_kib
        )));
    }
    if let (DomainType::Kvm, Err(reason)) = (domain.domain_type, &host.kvm) {
        return Err(XmlError::unsupported(format!(
            "domain type 'kvm' cannot run here: {reason}; type 'qemu' runs on the software CPU"
        )));
    }
    let refused = unsupported(domain);
    if refused.is_empty() {
        return Ok(Startable {
            left_out: left_out(domain),
        });
    }
    let names: Vec<String> = refused.iter().map(ToString::to_string).collect();
    Err(XmlError::unsupported(format!(
        "Vireo does not have what this domain asks for: {}",
        names.join(", ")
    )))
}

pub(super) fn unsupported(domain: &Domain) -> Vec<Unsupported> {
    let mut found = Vec::new();
    os(domain, &mut found);
    if let Some(features) = &domain.features {
        features
            .elements()
            .filter_map(feature)
            .for_each(|f| found.push(f));
    }
    cpu(domain, &mut found);
    domain
        .clock
        .timers
        .iter()
        .filter_map(timer)
        .for_each(|t| found.push(t));
    for (name, action) in [
        ("on_poweroff", domain.on_poweroff),
        ("on_reboot", domain.on_reboot),
        ("on_crash", domain.on_crash),
    ] {
        use LifecycleAction as Action;
        if action == Action::RenameRestart {
            found.push(Unsupported::new(format!("{name} '{}'", action.as_str())));
        }
    }
    if domain.memory.max.is_some() {
        found.push(Unsupported::new("maxMemory"));
    }
    if super::defaults::check_topology(domain).is_err() {
        let reason = "it is not one of all vCPUs that there can be";
        found.push(Unsupported::because("cpu topology", reason));
    }
    domain
        .rest
        .iter()
        .filter_map(section)
        .for_each(|s| found.push(s));
    serials(domain, &mut found);
    for device in &domain.devices.rest {
        if let Fate::Refused(what) = fate(device) {
            found.push(what);
        }
    }
    places(domain, &mut found);
    found
}

/// The same of one device: what the others say of how they are now (a job's, say) is no request.
pub(super) fn unsupported_device(domain: &Domain, at: usize) -> Option<Unsupported> {
    let device = domain.devices.rest.get(at)?;
    match fate(device) {
        Fate::Refused(what) => Some(what),
        Fate::Fine => place(domain, device),
        Fate::LeftOut(_) => None,
    }
}

pub(super) fn left_out(domain: &Domain) -> Vec<Unsupported> {
    let mut found = Vec::new();
    if let Some(topology) = domain.cpu.as_ref().and_then(|c| c.topology) {
        if !topology.has_ids() {
            found.push(Unsupported::because(
                "cpu topology",
                "its vCPUs' APIC ids would not fit into 8 bits: the guest sees one socket of cores",
            ));
        } else if topology.dies > 1 {
            found.push(Unsupported::because(
                "cpu topology dies",
                "the guest sees one a socket",
            ));
        }
    }
    for device in &domain.devices.rest {
        if let Fate::LeftOut(what) = fate(device) {
            found.push(what);
        } else if is_lost_drive(domain, device)
            && let Some(what) = place(domain, device)
        {
            found.push(what);
        }
    }
    found
}

fn os(domain: &Domain, found: &mut Vec<Unsupported>) {
    let os = &domain.os;
    if os.kernel.is_none() {
        firmware(os, found);
    } else if os.firmware.is_some() || os.other("loader").is_some() || os.other("nvram").is_some() {
        found.push(Unsupported::because(
            "firmware",
            "the kernel is entered directly",
        ));
    }
    for e in &os.rest {
        match e.name.as_str() {
            "dtb" => found.push(Unsupported::new("dtb")),
            "acpi" if e.child("table").is_some() => found.push(Unsupported::new("acpi table")),
            "smbios" if e.attr("mode") != Some("emulate") => found.push(named(e, "mode")),
            // Firmware's matters, without effect where there is none, and containers'.
            _ => {}
        }
    }
}

/// What boots a domain that names no kernel is a BIOS.
fn firmware(os: &Os, found: &mut Vec<Unsupported>) {
    if let Some(other) = os.firmware.as_deref().filter(|name| *name != "bios") {
        found.push(Unsupported::because(
            format!("firmware '{other}'"),
            "there is 'bios' only",
        ));
    }
    let loader = os.other("loader");
    let flash = loader.and_then(|e| e.attr("type")) == Some("pflash");
    if flash || loader.and_then(|e| e.attr("secure")) == Some("yes") || os.other("nvram").is_some()
    {
        found.push(Unsupported::because(
            "firmware in flash memory",
            "there is a BIOS in a ROM only",
        ));
    }
}

/// `element 'value'` of one of its attributes, or the element's name alone.
pub(super) fn named(element: &Element, attribute: &str) -> Unsupported {
    Unsupported::new(match element.attr(attribute) {
        Some(value) => format!("{} '{value}'", element.name),
        None => element.name.to_string(),
    })
}

fn feature(feature: &Element) -> Option<Unsupported> {
    let on = |e: &Element| e.attr("state") != Some("off");
    match feature.name.as_str() {
        // There, or nothing that a guest here could tell.
        "acpi" | "apic" | "pae" | "hap" | "viridian" | "privnet" | "ioapic" | "tcg" => None,
        "hyperv" if feature.attr("mode") == Some("passthrough") => {
            Some(Unsupported::new("feature 'hyperv'"))
        }
        "hyperv" | "kvm" => feature
            .elements()
            .find(|e| on(e))
            .map(|e| Unsupported::new(format!("feature '{} {}'", feature.name, e.name))),
        name => on(feature).then(|| Unsupported::new(format!("feature '{name}'"))),
    }
}

fn cpu(domain: &Domain, found: &mut Vec<Unsupported>) {
    for e in domain.cpu.iter().flat_map(|cpu| &cpu.rest) {
        match e.name.as_str() {
            // One node for everything is what the machine is.
            "numa" if e.elements().count() <= 1 => {}
            "maxphysaddr" | "cache" if e.attr("mode") == Some("passthrough") => {}
            name => found.push(Unsupported::new(format!("cpu {name}"))),
        }
    }
}

fn timer(timer: &Element) -> Option<Unsupported> {
    let present = timer.attr("present").map(|p| p == "yes");
    let fine = match timer.attr("name").unwrap_or_default() {
        "rtc" | "pit" => present != Some(false),
        "hpet" | "hypervclock" => present == Some(false),
        "kvmclock" => present != Some(false),
        "tsc" => timer.attr("frequency").is_none() && present != Some(false),
        _ => false,
    };
    (!fine).then(|| {
        let Unsupported { name, reason } = named(timer, "name");
        let not = if present == Some(false) {
            "without "
        } else {
            ""
        };
        Unsupported {
            name: format!("{not}{name}"),
            reason,
        }
    })
}

/// The children of `<domain>` that have no type of their own.
fn section(e: &Element) -> Option<Unsupported> {
    let refused = match e.name.as_str() {
        // How much of the host, not what machine; and what other hypervisors read.
        "resource" | "iothreads" | "iothreadids" | "defaultiothread" | "on_lockfailure" => false,
        name if name.starts_with("lxc:") || name.starts_with("bhyve:") => false,
        name if name.starts_with("xen:") || name.starts_with("vmware:") => false,
        "qemu:deprecation" | "genid" => false,
        "sysinfo" => e.attr("type") == Some("fwcfg"),
        "seclabel" => e.attr("type") == Some("static"),
        "perf" => e
            .elements()
            .any(|event| event.attr("enabled") == Some("yes")),
        "pm" => e
            .elements()
            .any(|state| state.attr("enabled") == Some("yes")),
        "vcpus" => false,
        // How much of the host, and where: not what machine. Parts of caches need resctrl.
        "cputune" => {
            let missing = ["cachetune", "memorytune"];
            let part = e.elements().find(|e| missing.contains(&e.name.as_str()));
            return part.map(|part| Unsupported::new(format!("cputune {}", part.name)));
        }
        "memtune" => return part(e, "min_guarantee"),
        // Nodes of the guest's own are not there.
        "numatune" => {
            let auto = e
                .child("memory")
                .and_then(|memory| memory.attr("placement"))
                == Some("auto");
            let auto = auto.then(|| Unsupported::new("numatune placement 'auto'".to_owned()));
            return auto.or_else(|| part(e, "memnode"));
        }
        "blkiotune" => false,
        "memoryBacking" => e.elements().any(|part| {
            let shared = part.name == "access" && part.attr("mode") == Some("shared");
            let memfd = part.name == "source" && part.attr("type") != Some("file");
            let lazy = part.name == "allocation" && part.attr("mode") != Some("immediate");
            // Nothing of a guest's memory is ever offered for sharing.
            let unshared = matches!(part.name.as_str(), "discard" | "nosharepages");
            !(shared || memfd || lazy || unshared)
        }),
        // Empty, they ask for nothing.
        "idmap" | "keywrap" => e.elements().next().is_some(),
        "launchSecurity" => return Some(named(e, "type")),
        _ => true,
    };
    refused.then(|| Unsupported::new(e.name.clone()))
}

/// A part of a section that is there and should not be.
fn part(section: &Element, name: &str) -> Option<Unsupported> {
    let found = section.child(name)?;
    Some(Unsupported::new(format!("{} {}", section.name, found.name)))
}

fn serials(domain: &Domain, found: &mut Vec<Unsupported>) {
    let mut ports = HashSet::new();
    for serial in &domain.devices.serials {
        let port = serial.target.port.unwrap_or(0);
        let name = format!("serial port {port}");
        if port >= MAX_SERIAL_PORTS {
            found.push(Unsupported::because(name, "there are 4, 0 to 3"));
        } else if !ports.insert(port) {
            found.push(Unsupported::because(name, "it is there twice"));
        } else if let Some(reason) = serial_fault(serial) {
            found.push(Unsupported::because(name, &reason));
        }
    }
    for (index, console) in domain.devices.consoles.iter().enumerate() {
        let kind = console.target.target_type.as_deref().unwrap_or("serial");
        let first_serial = domain
            .devices
            .serials
            .first()
            .is_some_and(CharDevice::is_isa);
        let name = format!("console '{kind}'");
        match kind {
            "virtio" => {
                if let Some(reason) = source_fault(console) {
                    found.push(Unsupported::because(name, &reason));
                }
            }
            "serial" if index > 0 || first_serial || domain.devices.serials.is_empty() => {}
            _ => found.push(Unsupported::new(name)),
        }
    }
}

fn serial_fault(serial: &CharDevice) -> Option<String> {
    if !serial.is_isa() {
        let kind = serial.target.target_type.as_deref().unwrap_or_default();
        return Some(format!("target type '{kind}'"));
    }
    source_fault(serial)
}

impl CharDevice {
    /// A 16550A at one of the PC's four addresses.
    pub(super) fn is_isa(&self) -> bool {
        matches!(
            self.target.target_type.as_deref(),
            None | Some("isa-serial")
        )
    }
}

impl Domain {
    /// Whether the machine has the pvpanic device (`<panic/>` or `<panic model='isa'/>`).
    pub fn has_pvpanic(&self) -> bool {
        self.devices
            .rest
            .iter()
            .any(|e| e.name == "panic" && matches!(e.attr("model"), None | Some("isa")))
    }

    /// Serial ports by number, once defaults are filled: COM1 is 0.
    pub fn serial_ports(&self) -> Vec<(u32, &CharDevice)> {
        let mut ports: Vec<_> = self
            .devices
            .serials
            .iter()
            .map(|serial| (serial.target.port.unwrap_or(0), serial))
            .collect();
        ports.sort_by_key(|(port, _)| *port);
        ports
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Validation;

    fn names(found: &[Unsupported]) -> Vec<&str> {
        found.iter().map(|u| u.name.as_str()).collect()
    }

    fn domain(inside: &str, devices: &str) -> Domain {
        let xml = format!(
            "<domain type='qemu'><name>a</name><memory>65536</memory>{inside}\
             <os><type>hvm</type><kernel>/k</kernel></os><devices>{devices}</devices></domain>"
        );
        let mut domain = Domain::parse(&xml, Validation::Strict).unwrap().domain;
        domain.fill_defaults(&host()).unwrap();
        domain
    }

    fn host() -> HostFacts {
        HostFacts {
            emulator: "/usr/bin/vireo-vmm".into(),
            kvm: Err("no /dev/kvm".into()),
            memory_kib: 1 << 20,
            kvm_max_vcpus: 8,
            soft_max_vcpus: 8,
        }
    }

    #[test]
    fn what_the_machine_does_not_have_is_refused_by_name() {
        let d = domain(
            "<cputune><shares>5</shares><cachetune vcpus='0'>\
             <cache id='0' level='3' type='both' size='1'/></cachetune></cputune><features><acpi/><hyperv><vapic state='on'/>\
             </hyperv></features><clock offset='utc'><timer name='hpet' present='yes'/></clock>\
             <on_crash>rename-restart</on_crash>",
            "<disk type='file'><source file='/x'/><target dev='sda' bus='usb'/></disk>\
             <disk type='network'><source protocol='nbd' name='x'><host name='h'/></source><target dev='vdb'/></disk>\
             <disk type='file'><source file='/y'/><target dev='vdc'/>\
             <address type='pci' bus='2' slot='3'/></disk>\
             <controller type='pci' index='1' model='pcie-root-port'/>\
             <controller type='pci' index='2' model='pcie-to-pci-bridge'/>\
             <interface type='user'><mac address='52:54:00:00:00:01'/><model type='e1000e'/></interface>\
             <interface type='network'><mac address='52:54:00:00:00:02'/>\
             <source network='default'/></interface>\
             <rng model='virtio'><backend model='egd' type='unix'><source path='/s'/></backend></rng>\
             <tpm model='tpm-crb'><backend type='emulator'/></tpm>\
             <watchdog model='ib700'/><memballoon model='virtio'/>\
             <serial type='udp'><source mode='connect' host='h' service='1'/></serial>\
             <serial type='null'><target port='7'/></serial>\
             <console type='pty'><target type='virtio'/></console>\
             <console type='spicevmc'><target type='virtio'/></console>",
        );
        assert_eq!(
            names(&d.unsupported()),
            [
                "feature 'hyperv vapic'",
                "timer 'hpet'",
                "on_crash 'rename-restart'",
                "cputune cachetune",
                "serial port 0",
                "serial port 7",
                "console 'virtio'",
                "disk 'sda'",
                "disk 'vdb'",
                "interface '52:54:00:00:00:01'",
                "tpm",
                "watchdog 'ib700'",
                "rng 'virtio'",
                "disk 'vdc'",
            ]
        );
        let error = d.check_startable(&host()).unwrap_err().to_string();
        assert!(
            error.contains("disk 'sda' (bus 'usb': use virtio, scsi or sata)"),
            "{error}"
        );
    }

    #[test]
    fn what_a_text_console_does_without_is_left_out_and_named() {
        let d = domain(
            "<seclabel type='none'/><resource><partition>/m</partition></resource>\
             <pm><suspend-to-mem enabled='no'/></pm>",
            "<emulator>/usr/bin/qemu-system-x86_64</emulator>\
             <controller type='usb' index='0' model='qemu-xhci'/>\
             <controller type='pci' index='0' model='pcie-root'/>\
             <controller type='pci' index='1' model='pcie-root-port'/>\
             <input type='tablet' bus='usb'/><graphics type='vnc'/><sound model='ich9'/>\
             <audio id='1' type='none'/><video><model type='vga'/></video>\
             <redirdev bus='usb' type='spicevmc'/><hub type='usb'/>\
             <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>\
             <disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk>\
             <panic model='isa'/><memballoon model='none'/>",
        );
        assert_eq!(names(&d.unsupported()), [""; 0]);
        assert!(d.has_pvpanic());
        assert_eq!(
            names(&d.check_startable(&host()).unwrap().left_out),
            [
                "disk 'fda'",
                "controller 'usb'",
                "input 'tablet'",
                "graphics 'vnc'",
                "sound 'ich9'",
                "audio 'none'",
                "video 'vga'",
                "redirdev 'usb'",
                "hub 'usb'",
            ]
        );
        // The guest may need what is in one.
        let d = domain(
            "",
            "<disk type='file' device='floppy'><source file='/x.img'/><target dev='fda' bus='fdc'/></disk>\
             <disk type='file'><source file='/y'/><target dev='sda' bus='sata'/>\
             <address type='drive' controller='0' bus='0' unit='6'/></disk>",
        );
        let found: Vec<_> = d.unsupported().iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "disk 'fda' (bus 'fdc': use virtio, scsi or sata)",
                "disk 'sda' (no such place at a sata controller: controller='0' bus='0' target='0' unit='6')",
            ]
        );
    }

    #[test]
    fn firmware_kvm_and_memory_are_refused_clearly() {
        let xml = "<domain type='kvm'><name>a</name><memory unit='GiB'>1</memory>\
                   <os firmware='efi'><type>hvm</type><boot dev='hd'/></os></domain>";
        let d = Domain::parse(xml, Validation::Strict).unwrap().domain;
        let error = |host: &HostFacts| d.check_startable(host).unwrap_err().to_string();
        let mut host = host();
        assert!(error(&host).contains("no /dev/kvm"));
        host.kvm = Ok(());
        assert!(error(&host).contains("firmware 'efi' (there is 'bios' only)"));
        host.memory_kib = 1000;
        assert!(error(&host).contains("more than the host's 1000 KiB"));
        let with = |os: &str| {
            let xml = xml
                .replace(" firmware='efi'", "")
                .replace("<boot dev='hd'/>", os);
            Domain::parse(&xml, Validation::Strict).unwrap().domain
        };
        host.memory_kib = 1 << 30;
        let flash = "<loader readonly='yes' type='pflash'>/x.fd</loader>";
        assert!(
            with(flash)
                .check_startable(&host)
                .unwrap_err()
                .to_string()
                .contains("firmware in flash memory")
        );
        for fine in ["<boot dev='hd'/>", "<loader>/x.bin</loader>"] {
            with(fine).check_startable(&host).unwrap();
        }
    }
}
