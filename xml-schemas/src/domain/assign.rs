//! Places of devices: PCI addresses with the root ports they need, ports of virtio-serial
//! controllers. What a user stated is kept, and what is assigned at define stays for good.

mod drives;

pub use drives::is_virtio_scsi;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use super::device::{Disk, DriveAddress, PciAddress, channel_place};
use super::{Devices, Domain};
use crate::dom::Element;
use crate::error::XmlError;
use crate::units::number;

/// Most ports of a virtio-serial controller (QEMU's default), port 0 among them.
const SERIAL_PORTS: u32 = 31;

/// Assigns everything.
///
/// # Errors
/// VIR_ERR_XML_ERROR for places that cannot be, or that two devices claim.
pub(super) fn assign(domain: &mut Domain) -> Result<(), XmlError> {
    let i440fx = is_i440fx(domain);
    let has_ide = has_ide(domain);
    controllers(&mut domain.devices)?;
    drives::controllers(&mut domain.devices, i440fx, has_ide)?;
    serial_ports(&mut domain.devices)?;
    pci(&mut domain.devices, i440fx)
}

/// Places for the drives of a definition that was stored before drives had any.
///
/// # Errors
/// As [`assign`].
pub(super) fn place_drives(domain: &mut Domain) -> Result<(), XmlError> {
    // Left out then, so they had none.
    let without = |e: &Element| {
        drives::is_virtio_scsi(e) && !elsewhere(e) && PciAddress::of(e).ok().flatten().is_none()
    };
    let mut changed = domain.devices.rest.iter().any(without);
    for disk in domain.devices.rest.iter_mut().filter(|e| e.name == "disk") {
        changed |= DriveAddress::give_usual(disk)?;
    }
    if changed {
        let (i440fx, has_ide) = (is_i440fx(domain), has_ide(domain));
        drives::controllers(&mut domain.devices, i440fx, has_ide)?;
        pci(&mut domain.devices, i440fx)?;
        domain.devices.arrange();
    }
    Ok(())
}

/// What QEMU calls Q35 has none.
fn has_ide(domain: &Domain) -> bool {
    let machine = domain.os.machine.as_deref();
    machine.is_none_or(|machine| !machine.starts_with("pc-q35"))
}

fn is_i440fx(domain: &Domain) -> bool {
    let machine = domain.os.machine.as_deref();
    machine.is_some_and(|machine| machine.starts_with("pc-i440fx"))
}

/// A PCI device's turn, in libvirt's order; `None` for what is no PCI device of this machine.
fn turn(device: &Element) -> Option<u32> {
    let model = device.attr("model").unwrap_or_default();
    Some(match device.name.as_str() {
        "interface" if device.attr("type") != Some("hostdev") => 0,
        "controller" if device.attr("type") == Some("virtio-serial") => 1,
        "controller" if drives::is_virtio_scsi(device) => 1,
        "disk" if on_virtio(device) => 2,
        "memballoon" if model != "none" => 3,
        "rng" => 4,
        "vsock" => 6,
        _ => return None,
    })
}

fn on_virtio(disk: &Element) -> bool {
    disk.child("target").and_then(|t| t.attr("bus")) == Some("virtio")
}

/// Conventional PCI devices, which sit on the root bus: there is no bridge to that kind.
fn conventional(device: &Element, i440fx: bool) -> bool {
    device.name == "watchdog" && device.attr("model") == Some("i6300esb")
        || drives::is_card(device, i440fx)
}

fn is_controller(device: &Element, kind: &str) -> bool {
    device.name == "controller" && device.attr("type") == Some(kind)
}

fn index_of(controller: &Element) -> Option<u32> {
    controller.attr("index").and_then(number)
}

/// Numbers controllers, and makes sure that every channel has one.
fn controllers(devices: &mut Devices) -> Result<(), XmlError> {
    let virtio_console = devices
        .consoles
        .iter()
        .any(|c| c.target.target_type.as_deref() == Some("virtio"));
    let mut wanted: BTreeSet<u32> = virtio_console.then_some(0).into_iter().collect();
    for channel in devices.rest.iter().filter(|e| is_virtio_channel(e)) {
        wanted.insert(channel_place(channel)?.0);
    }
    let mut taken: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    for controller in devices.rest.iter().filter(|e| e.name == "controller") {
        let kind = controller.attr("type").unwrap_or_default();
        if let Some(index) = index_of(controller)
            && !taken.entry(kind.to_owned()).or_default().insert(index)
        {
            // USB companions share an index.
            if kind != "usb" {
                return Err(XmlError::xml(format!(
                    "Multiple '{kind}' controllers with index '{index}'"
                ))
                .at(controller.line));
            }
        }
    }
    for controller in devices.rest.iter_mut().filter(|e| e.name == "controller") {
        if index_of(controller).is_none() {
            let kind = controller.attr("type").unwrap_or_default().to_owned();
            let root = controller
                .attr("model")
                .is_some_and(|model| model.ends_with("-root"));
            let behind_root = kind == "pci" && !root;
            let taken = taken.entry(kind).or_default();
            if behind_root {
                // The root's own, which need not be listed.
                taken.insert(0);
            }
            let index = lowest_free(taken);
            taken.insert(index);
            controller.set_attr("index", index.to_string());
        }
    }
    let there = taken.remove("virtio-serial").unwrap_or_default();
    for index in wanted.difference(&there) {
        if *index > 255 {
            return Err(XmlError::xml(format!(
                "virtio serial controller {index} is missing"
            )));
        }
        devices.rest.push(
            Element::new("controller")
                .with_attr("type", "virtio-serial")
                .with_attr("index", index.to_string()),
        );
    }
    Ok(())
}

fn lowest_free(taken: &BTreeSet<u32>) -> u32 {
    (0..=u32::MAX).find(|i| !taken.contains(i)).unwrap_or(0)
}

fn is_virtio_channel(device: &Element) -> bool {
    device.name == "channel"
        && device.child("target").and_then(|t| t.attr("type")) == Some("virtio")
}

/// Ports not stated get the lowest free ones; port 0 is a console's.
fn serial_ports(devices: &mut Devices) -> Result<(), XmlError> {
    let mut taken: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    let limits: BTreeMap<u32, u32> = devices
        .rest
        .iter()
        .filter(|e| is_controller(e, "virtio-serial"))
        .filter_map(|e| {
            let ports = e.attr("ports").and_then(number);
            Some((index_of(e)?, ports.unwrap_or(SERIAL_PORTS)))
        })
        .collect();
    let mut claim = |controller: u32, port: u32, line: u32| {
        let most = limits.get(&controller).copied().unwrap_or(SERIAL_PORTS);
        if port >= most {
            return Err(XmlError::xml(format!(
                "virtio serial controller {controller} does not have port {port}"
            ))
            .at(line));
        }
        if !taken.entry(controller).or_default().insert(port) {
            return Err(XmlError::xml(format!(
                "virtio serial port {port} on controller {controller} is already occupied"
            ))
            .at(line));
        }
        Ok(())
    };
    for console in &devices.consoles {
        if let (controller, Some(port)) = super::device::place(&console.rest)? {
            claim(controller, port, 0)?;
        }
    }
    let channels = || devices.rest.iter().filter(|e| is_virtio_channel(e));
    for channel in channels() {
        if let (controller, Some(port)) = channel_place(channel)? {
            claim(controller, port, channel.line)?;
        }
    }
    let virtio_consoles: u32 = devices
        .consoles
        .iter()
        .filter(|c| c.target.target_type.as_deref() == Some("virtio"))
        .map(|_| 1)
        .sum();
    for channel in devices.rest.iter_mut().filter(|e| is_virtio_channel(e)) {
        let (controller, None) = channel_place(channel)? else {
            continue;
        };
        let taken = taken.entry(controller).or_default();
        let most = limits.get(&controller).copied().unwrap_or(SERIAL_PORTS);
        // Port 0, and the ports of further consoles, which are numbered at start.
        let first = virtio_consoles.max(1);
        let Some(port) = (first..most).find(|port| !taken.contains(port)) else {
            return Err(XmlError::xml("Unable to find a free virtio serial port"));
        };
        taken.insert(port);
        channel.take_children("address");
        channel.push(
            Element::new("address")
                .with_attr("type", "virtio-serial")
                .with_attr("controller", controller.to_string())
                .with_attr("bus", "0")
                .with_attr("port", port.to_string()),
        );
    }
    Ok(())
}

/// Which functions of the machine's buses are taken.
#[derive(Debug, Default)]
struct Map {
    taken: BTreeSet<PciAddress>,
    /// Of each bus but 0: its controller's model.
    buses: BTreeMap<u8, String>,
    i440fx: bool,
}

impl Map {
    /// Slots of `bus` that devices may be in.
    fn slots(&self, bus: u8) -> std::ops::RangeInclusive<u8> {
        match self.buses.get(&bus).map(String::as_str) {
            _ if bus == 0 => 1..=31,
            Some(model) if model.ends_with("bridge") || model.ends_with("bus") => 1..=31,
            _ => 0..=0,
        }
    }

    /// What the machine itself has on bus 0: on q35 the bridge in slot 31, on i440fx in slot 1.
    fn is_fixed(&self, address: PciAddress) -> bool {
        let slot = if self.i440fx { 1 } else { 31 };
        address.bus == 0 && (address.slot == 0 || address.slot == slot)
    }

    fn claim(&mut self, address: PciAddress, line: u32) -> Result<(), XmlError> {
        let slots = self.slots(address.bus);
        let bad = if address.slot < *slots.start() {
            Some(format!("slot must be >= {}", slots.start()))
        } else if address.slot > *slots.end() {
            Some(format!("slot must be <= {}", slots.end()))
        } else {
            None
        };
        if let Some(bad) = bad {
            return Err(XmlError::xml(format!("Invalid PCI address {address}. {bad}")).at(line));
        }
        if !self.taken.insert(address) {
            return Err(
                XmlError::xml(format!("Attempted double use of PCI Address {address}")).at(line),
            );
        }
        Ok(())
    }

    fn slot_is_free(&self, bus: u8, slot: u8) -> bool {
        let first = PciAddress {
            bus,
            slot,
            function: 0,
        };
        !self.is_fixed(first)
            && (0..8).all(|function| !self.taken.contains(&PciAddress { function, ..first }))
    }

    fn free_slot(&self, bus: u8) -> Option<PciAddress> {
        let lowest = if bus == 0 && self.i440fx {
            2
        } else {
            *self.slots(bus).start()
        };
        (lowest..=*self.slots(bus).end())
            .find(|&slot| self.slot_is_free(bus, slot))
            .map(|slot| PciAddress {
                bus,
                slot,
                function: 0,
            })
    }
}

fn full() -> XmlError {
    XmlError::internal("No more available PCI slots")
}

fn pci(devices: &mut Devices, i440fx: bool) -> Result<(), XmlError> {
    let root_model = if i440fx { "pci-root" } else { "pcie-root" };
    if !devices
        .rest
        .iter()
        .any(|e| is_controller(e, "pci") && index_of(e) == Some(0))
    {
        devices.rest.push(
            Element::new("controller")
                .with_attr("type", "pci")
                .with_attr("index", "0")
                .with_attr("model", root_model),
        );
    }
    let mut map = Map {
        i440fx,
        ..Map::default()
    };
    for controller in devices.rest.iter().filter(|e| is_controller(e, "pci")) {
        let index = index_of(controller).unwrap_or(0);
        let model = controller.attr("model").unwrap_or_default();
        match u8::try_from(index) {
            Ok(0) => {}
            Ok(index) => {
                map.buses.insert(index, model.to_owned());
            }
            Err(_) => {
                return Err(XmlError::xml(format!(
                    "a PCI controller index of {index} is beyond 255"
                ))
                .at(controller.line));
            }
        }
    }
    let mut root_ports: BTreeSet<u8> = BTreeSet::new();
    let mut last = map.buses.keys().last().copied().unwrap_or(0);
    for device in &devices.rest {
        if let Some(address) = PciAddress::of(device)? {
            last = last.max(address.bus);
        }
    }
    // Buses that a stated address needs.
    for bus in 1..=last {
        if let Entry::Vacant(vacant) = map.buses.entry(bus) {
            if i440fx {
                return Err(XmlError::xml(format!(
                    "no PCI controller has index {bus}, which an address needs"
                )));
            }
            vacant.insert("pcie-root-port".to_owned());
            devices.rest.push(root_port(bus));
        }
    }
    for device in &devices.rest {
        if let Some(address) = PciAddress::of(device)? {
            map.claim(address, device.line)?;
        }
    }
    for (bus, model) in &map.buses {
        if model == "pcie-root-port" {
            root_ports.insert(*bus);
        }
    }
    let free_port = |map: &Map, ports: &BTreeSet<u8>| {
        ports.iter().copied().find(|&bus| map.slot_is_free(bus, 0))
    };
    for wanted in 0..=6 {
        for at in 0..devices.rest.len() {
            let device = &devices.rest[at];
            // Where there is no root port, cards have their turn with the other controllers.
            let card = i440fx && drives::is_card(device, i440fx);
            if turn(device).or(card.then_some(1)) != Some(wanted)
                || PciAddress::of(device)?.is_some()
                || elsewhere(device)
            {
                continue;
            }
            let address = if i440fx {
                map.free_slot(0).ok_or_else(full)?
            } else {
                let bus = match free_port(&map, &root_ports) {
                    Some(bus) => bus,
                    None => add_port(devices, &mut map, &mut root_ports)?,
                };
                map.free_slot(bus).ok_or_else(full)?
            };
            map.claim(address, 0)?;
            address.give(&mut devices.rest[at]);
        }
    }
    // One is kept free for a device to be plugged later.
    if !i440fx && free_port(&map, &root_ports).is_none() {
        match add_port(devices, &mut map, &mut root_ports) {
            Ok(_) => {}
            // All 256 buses are in use: so be it.
            Err(_) if map.buses.len() == 255 => {}
            Err(error) => return Err(error),
        }
    }
    place_ports(devices, &mut map)?;
    for device in devices.rest.iter_mut().filter(|e| conventional(e, i440fx)) {
        if PciAddress::of(device)?.is_none() {
            let address = map.free_slot(0).ok_or_else(full)?;
            map.claim(address, 0)?;
            address.give(device);
        }
    }
    Ok(())
}

/// Whether a device has an address of another kind (ccw, virtio-mmio…), which start looks at.
fn elsewhere(device: &Element) -> bool {
    device
        .child("address")
        .and_then(|e| e.attr("type"))
        .is_some_and(|kind| kind != "pci")
}

fn root_port(index: u8) -> Element {
    Element::new("controller")
        .with_attr("type", "pci")
        .with_attr("index", index.to_string())
        .with_attr("model", "pcie-root-port")
}

fn add_port(
    devices: &mut Devices,
    map: &mut Map,
    ports: &mut BTreeSet<u8>,
) -> Result<u8, XmlError> {
    let bus = (1..=255u8)
        .find(|bus| !map.buses.contains_key(bus))
        .ok_or_else(full)?;
    map.buses.insert(bus, "pcie-root-port".to_owned());
    ports.insert(bus);
    devices.rest.push(root_port(bus));
    Ok(bus)
}

/// Root ports share slots of bus 0, eight in each; then what a port says of itself.
fn place_ports(devices: &mut Devices, map: &mut Map) -> Result<(), XmlError> {
    let is_port =
        |e: &Element| is_controller(e, "pci") && e.attr("model") == Some("pcie-root-port");
    let mut order: Vec<usize> = (0..devices.rest.len())
        .filter(|&at| is_port(&devices.rest[at]))
        .collect();
    order.sort_by_key(|&at| index_of(&devices.rest[at]));
    let mut shared: BTreeSet<u8> = BTreeSet::new();
    for &at in &order {
        if let Some(address) = PciAddress::of(&devices.rest[at])?
            && address.bus == 0
            && devices.rest[at]
                .child("address")
                .and_then(|a| a.attr("multifunction"))
                == Some("on")
        {
            shared.insert(address.slot);
        }
    }
    for &at in &order {
        let port = &devices.rest[at];
        if PciAddress::of(port)?.is_some() {
            continue;
        }
        let beside = shared.iter().find_map(|&slot| {
            (1..8)
                .map(|function| PciAddress {
                    bus: 0,
                    slot,
                    function,
                })
                .find(|address| !map.taken.contains(address))
        });
        let address = match beside {
            Some(address) => address,
            None => map.free_slot(0).ok_or_else(full)?,
        };
        map.claim(address, 0)?;
        shared.insert(address.slot);
        address.give(&mut devices.rest[at]);
    }
    for &at in &order {
        let Some(address) = PciAddress::of(&devices.rest[at])? else {
            continue;
        };
        let company = (1..8).any(|function| {
            map.taken.contains(&PciAddress {
                function,
                ..address
            })
        });
        let port = &mut devices.rest[at];
        if address.function == 0 && company {
            for e in port.elements_mut().filter(|e| e.name == "address") {
                e.set_attr("multifunction", "on");
            }
        }
        if port.child("model").is_none() {
            port.push(Element::new("model").with_attr("name", "pcie-root-port"));
        }
        let index = index_of(port).unwrap_or(0);
        let mut target = port
            .take_child("target")
            .unwrap_or_else(|| Element::new("target"));
        if target.attr("chassis").is_none() {
            target.set_attr("chassis", index.to_string());
        }
        if target.attr("port").is_none() {
            let number = u32::from(address.slot) << 3 | u32::from(address.function);
            target.set_attr("port", format!("0x{number:x}"));
        }
        port.push(target);
    }
    Ok(())
}

/// A disk's place on a controller of disks, as it is in its id.
fn drive(disk: &Disk) -> Option<String> {
    let place = disk.drive.filter(|_| disk.bus != "virtio")?;
    let target = match disk.bus.as_str() {
        "scsi" => format!("-{}", place.target),
        _ => String::new(),
    };
    Some(format!(
        "{}-{}{target}-{}",
        place.controller, place.bus, place.unit
    ))
}

/// Gives every device of a running domain the id that libvirt gives it.
pub(super) fn aliases(devices: &mut Devices) {
    let root = |e: &Element| is_controller(e, "pci") && e.attr("model") == Some("pci-root");
    let i440fx = devices.rest.iter().any(root);
    let mut counts: BTreeMap<&'static str, u32> = BTreeMap::new();
    let mut next = |prefix: &'static str| {
        let count = counts.entry(prefix).or_default();
        *count += 1;
        format!("{prefix}{}", *count - 1)
    };
    for device in &mut devices.rest {
        let name = match device.name.as_str() {
            "disk" => match Disk::read(device) {
                Ok(disk) => match (drive(&disk), disk.index()) {
                    (Some(drive), _) => format!("{}{drive}", disk.bus),
                    (None, Some(index)) => format!("{}-disk{index}", disk.bus),
                    (None, None) => next("disk"),
                },
                Err(_) => next("disk"),
            },
            "controller" => {
                let index = index_of(device).unwrap_or(0);
                match device.attr("type").unwrap_or_default() {
                    "pci" if index == 0 && device.attr("model") == Some("pci-root") => {
                        "pci.0".into()
                    }
                    "pci" if index == 0 => "pcie.0".into(),
                    "pci" => format!("pci.{index}"),
                    // As QEMU calls the one that is on the board.
                    "sata" if index == 0 && !i440fx => "ide".into(),
                    "ide" if index == 0 && i440fx => "ide".into(),
                    kind => format!("{kind}{index}"),
                }
            }
            "interface" => next("net"),
            "channel" => next("channel"),
            "rng" => next("rng"),
            "memballoon" if device.attr("model") != Some("none") => next("balloon"),
            "watchdog" => next("watchdog"),
            "vsock" => next("vsock"),
            "panic" => next("panic"),
            _ => continue,
        };
        super::device::give_alias(device, name);
    }
}

#[cfg(test)]
mod tests;
