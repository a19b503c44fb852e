//! Devices that come, go and change.

mod media;

use rpc::args::*;
use rpc::procs;
use rpc::types::Domain;
use xml_schemas::dom::{self, Element};

use super::{AFFECT_CONFIG, AFFECT_LIVE, ANY, domain_xml, find_domain, read_definition};
use crate::command::{Args, Command, DOMAIN, Opt, Values, data, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

pub use self::media::CHANGE_MEDIA;

const FILE: Opt = data("file", "a file with the device, in XML").values(Values::Files);
const PERSISTENT: Opt = flag("persistent", "now, and from the next boot on");
const CONFIG: Opt = flag("config", "from the next boot on");
const LIVE: Opt = flag("live", "for the running domain");
const CURRENT: Opt = flag("current", "for the domain as it is now");
const PRINT: Opt = flag("print-xml", "only show the device");

/// `attach-device`
pub const ATTACH_DEVICE: Command = Command {
    name: "attach-device",
    summary: "attach device from an XML file",
    description: "Gives a domain another device.",
    options: &[DOMAIN, FILE, PERSISTENT, CONFIG, LIVE, CURRENT],
    handler: attach_device,
    connects: true,
};

/// `attach-disk`
pub const ATTACH_DISK: Command = Command {
    name: "attach-disk",
    summary: "attach disk device",
    description: "Gives a domain another disk.",
    options: &[
        DOMAIN,
        data("source", "the image, or the name of a network disk").allow_empty(),
        data("target", "what it is called in the guest: vdb"),
        text("targetbus", "its bus").named_only(),
        text("driver", "the driver's name").named_only(),
        text("subdriver", "the image's format").named_only(),
        text("iothread", "the I/O thread that serves it").named_only(),
        text("cache", "how the host caches").named_only(),
        text("io", "how host I/O is done").named_only(),
        text("type", "disk, cdrom, floppy or lun").named_only(),
        text("mode", "readonly or shareable").named_only(),
        text("sourcetype", "file, block or network").named_only(),
        text("serial", "its serial number").named_only(),
        text("wwn", "its world wide name").named_only(),
        text("alias", "an id of its own").named_only(),
        flag("rawio", "it needs raw I/O"),
        text("address", "its place").named_only(),
        flag("multifunction", "other functions are beside it"),
        PRINT,
        text("source-protocol", "protocol of a network disk").named_only(),
        text("source-host-name", "its host").named_only(),
        text("source-host-transport", "how the host is reached").named_only(),
        text("source-host-socket", "the host's socket").named_only(),
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: attach_disk,
    connects: true,
};

/// `attach-interface`
pub const ATTACH_INTERFACE: Command = Command {
    name: "attach-interface",
    summary: "attach network interface",
    description: "Gives a domain another network card.",
    options: &[
        DOMAIN,
        data("type", "network, bridge, direct ..."),
        data("source", "the network, bridge or device"),
        text("target", "the host's device").named_only(),
        text("mac", "its hardware address").named_only(),
        text("script", "a script that connects it").named_only(),
        text("model", "its model").named_only(),
        text("alias", "an id of its own").named_only(),
        text("inbound", "limit of what comes: average,peak,burst").named_only(),
        text("outbound", "limit of what goes").named_only(),
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
        PRINT,
        flag("managed", "a device of the host is taken and given back"),
        text("source-mode", "mode of the source").named_only(),
    ],
    handler: attach_interface,
    connects: true,
};

/// `detach-device`
pub const DETACH_DEVICE: Command = Command {
    name: "detach-device",
    summary: "detach device from an XML file",
    description: "Takes a device from a domain.",
    options: &[DOMAIN, FILE, PERSISTENT, CONFIG, LIVE, CURRENT],
    handler: detach_device,
    connects: true,
};

/// `detach-device-alias`
pub const DETACH_DEVICE_ALIAS: Command = Command {
    name: "detach-device-alias",
    summary: "detach device from an alias",
    description: "Takes the device with an id from a domain.",
    options: &[DOMAIN, data("alias", "the id"), CONFIG, LIVE, CURRENT],
    handler: detach_device_alias,
    connects: true,
};

/// `detach-disk`
pub const DETACH_DISK: Command = Command {
    name: "detach-disk",
    summary: "detach disk device",
    description: "Takes a disk from a domain.",
    options: &[
        DOMAIN,
        data("target", "what it is called in the guest").values(Values::Disks),
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
        PRINT,
    ],
    handler: detach_disk,
    connects: true,
};

/// `detach-interface`
pub const DETACH_INTERFACE: Command = Command {
    name: "detach-interface",
    summary: "detach network interface",
    description: "Takes a network card from a domain.",
    options: &[
        DOMAIN,
        data("type", "its type"),
        text("mac", "its hardware address").values(Values::Nics),
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
        PRINT,
    ],
    handler: detach_interface,
    connects: true,
};

/// `update-device`
pub const UPDATE_DEVICE: Command = Command {
    name: "update-device",
    summary: "update device from an XML file",
    description: "Changes a device of a domain.",
    options: &[
        DOMAIN,
        FILE,
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
        flag("force", "even if the guest is in the way"),
    ],
    handler: update_device,
    connects: true,
};

fn current_alone(args: &Args) -> Result {
    args.exclusive("persistent", "current")?;
    args.exclusive("current", "live")?;
    args.exclusive("current", "config")
}

/// Which definitions are meant, where `persistent` may say so too.
fn affected(shell: &mut Shell, args: &Args, dom: &Domain) -> Result<u32> {
    let persistent = args.has("persistent");
    let mut flags = 0;
    if args.has("config") || persistent {
        flags |= AFFECT_CONFIG;
    }
    if args.has("live") {
        flags |= AFFECT_LIVE;
    }
    if persistent {
        let asked = DomainIsActiveArgs { dom: dom.clone() };
        if shell.call(procs::DOMAIN_IS_ACTIVE, &asked)?.active != 0 {
            flags |= AFFECT_LIVE;
        }
    }
    Ok(flags)
}

fn attach(shell: &mut Shell, args: &Args, dom: Domain, xml: String) -> Result {
    let flags = affected(shell, args, &dom)?;
    if flags != 0 || args.has("current") {
        let asked = DomainAttachDeviceFlagsArgs { dom, xml, flags };
        return shell.call(procs::DOMAIN_ATTACH_DEVICE_FLAGS, &asked);
    }
    let asked = DomainAttachDeviceArgs { dom, xml };
    shell.call(procs::DOMAIN_ATTACH_DEVICE, &asked)
}

fn detach(shell: &mut Shell, args: &Args, dom: Domain, xml: String) -> Result {
    let flags = affected(shell, args, &dom)?;
    if flags != 0 || args.has("current") {
        let asked = DomainDetachDeviceFlagsArgs { dom, xml, flags };
        return shell.call(procs::DOMAIN_DETACH_DEVICE_FLAGS, &asked);
    }
    let asked = DomainDetachDeviceArgs { dom, xml };
    shell.call(procs::DOMAIN_DETACH_DEVICE, &asked)
}

fn attach_device(shell: &mut Shell, args: &Args) -> Result {
    current_alone(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let file = args.required("file")?.to_owned();
    let xml = read_definition(&file)?;
    attach(shell, args, dom, xml)
        .with_context(|| format!("Failed to attach device from {file}"))?;
    shell.out.print_extra("Device attached successfully\n");
    Ok(())
}

fn detach_device(shell: &mut Shell, args: &Args) -> Result {
    current_alone(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let file = args.required("file")?.to_owned();
    let xml = read_definition(&file)?;
    detach(shell, args, dom, xml)
        .with_context(|| format!("Failed to detach device from {file}"))?;
    shell.out.print_extra("Device detached successfully\n");
    Ok(())
}

fn detach_device_alias(shell: &mut Shell, args: &Args) -> Result {
    let flags = super::affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let alias = args.required("alias")?.to_owned();
    let asked = DomainDetachDeviceAliasArgs {
        dom,
        alias: alias.clone(),
        flags,
    };
    shell
        .call(procs::DOMAIN_DETACH_DEVICE_ALIAS, &asked)
        .with_context(|| format!("Failed to detach device with alias {alias}"))?;
    shell
        .out
        .print_extra("Device detach request sent successfully\n");
    Ok(())
}

fn update_device(shell: &mut Shell, args: &Args) -> Result {
    /// VIR_DOMAIN_DEVICE_MODIFY_FORCE
    const FORCE: u32 = 4;
    current_alone(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let file = args.required("file")?.to_owned();
    let xml = read_definition(&file)?;
    let mut flags = affected(shell, args, &dom)?;
    if args.has("force") {
        flags |= FORCE;
    }
    let asked = DomainUpdateDeviceFlagsArgs { dom, xml, flags };
    shell
        .call(procs::DOMAIN_UPDATE_DEVICE_FLAGS, &asked)
        .with_context(|| format!("Failed to update device from {file}"))?;
    shell.out.print_extra("Device updated successfully\n");
    Ok(())
}

fn format(element: &Element) -> String {
    let mut text = String::new();
    dom::format_element(&mut text, element, 0);
    text
}

/// An address as `attach-disk` takes it: `pci:0000.00.0a.0`.
fn address(word: &str, target: &str, multifunction: bool) -> Result<Element> {
    let invalid = || Failure::new("Invalid address.");
    let (kind, place) = word.split_once(':').ok_or_else(invalid)?;
    let parts: Vec<&str> = place.split('.').collect();
    let hex =
        |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).map_err(|_| invalid());
    let number = |text: &str| text.parse::<u32>().map_err(|_| invalid());
    // What disks of that name have.
    let (kinds, expected): (&[&str], &str) = match target.get(..2) {
        Some("vd") => (&["pci", "ccw"], "a pci:0000.00.00.00 or ccw:00.0.0000"),
        Some("sd") => (
            &["scsi", "usb", "sata"],
            "a scsi:00.00.00 or usb:00.00 or sata:00.00.00",
        ),
        Some("hd") => (&["ide"], "an ide:00.00.00"),
        _ => (&["pci", "ccw", "scsi", "usb", "sata", "ide"], ""),
    };
    let mut address = Element::new("address");
    let known = |length| parts.len() == length;
    match kind {
        "pci" if known(4) => {}
        "scsi" | "sata" | "ide" | "ccw" if known(3) => {}
        "usb" if known(2) => {}
        _ => return Err(invalid()),
    }
    if !kinds.contains(&kind) {
        return Err(Failure::new(format!("expecting {expected} address.")));
    }
    match (kind, parts.as_slice()) {
        ("pci", [domain, bus, slot, function]) => {
            address.set_attr("type", "pci");
            for (name, value, digits) in [
                ("domain", domain, 4),
                ("bus", bus, 2),
                ("slot", slot, 2),
                ("function", function, 1),
            ] {
                let value = hex(value)?;
                address.set_attr(name, format!("0x{value:0digits$x}"));
            }
            if multifunction {
                address.set_attr("multifunction", "on");
            }
        }
        ("ccw", [cssid, ssid, devno]) => {
            address.set_attr("type", "ccw");
            for (name, value, digits) in
                [("cssid", cssid, 2), ("ssid", ssid, 1), ("devno", devno, 4)]
            {
                let value = hex(value)?;
                address.set_attr(name, format!("0x{value:0digits$x}"));
            }
        }
        ("scsi" | "sata" | "ide", [controller, bus, unit]) => {
            address.set_attr("type", "drive");
            for (name, value) in [("controller", controller), ("bus", bus), ("unit", unit)] {
                address.set_attr(name, number(value)?.to_string());
            }
        }
        ("usb", [bus, port]) => {
            address.set_attr("type", "usb");
            address.set_attr("bus", number(bus)?.to_string());
            address.set_attr("port", number(port)?.to_string());
        }
        _ => return Err(invalid()),
    }
    Ok(address)
}

fn attach_disk(shell: &mut Shell, args: &Args) -> Result {
    use std::os::unix::fs::FileTypeExt;
    current_alone(args)?;
    args.requires("source-host-name", "source-protocol")?;
    let source = args.text("source")?.unwrap_or_default().to_owned();
    let target = args.required("target")?.to_owned();
    let mode = args.text("mode")?;
    if mode.is_some_and(|mode| !matches!(mode, "readonly" | "shareable")) {
        return Err(Failure::new(format!(
            "No support for {} in command 'attach-disk'",
            mode.unwrap_or_default()
        )));
    }
    let is_block =
        || std::fs::metadata(&source).is_ok_and(|found| found.file_type().is_block_device());
    let kind = match args.text("sourcetype")? {
        Some(kind @ ("file" | "block" | "network")) => kind,
        Some(other) => {
            return Err(Failure::new(format!("Unknown source type: '{other}'")));
        }
        None if args.has("source-protocol") => "network",
        None if is_block() => "block",
        None => "file",
    };
    let mut disk = Element::new("disk").with_attr("type", kind);
    disk.set_opt_attr("device", args.text("type")?);
    if args.has("rawio") {
        disk.set_attr("rawio", "yes");
    }
    let mut driver = Element::new("driver");
    for (attribute, option) in [
        ("name", "driver"),
        ("type", "subdriver"),
        ("iothread", "iothread"),
        ("cache", "cache"),
        ("io", "io"),
    ] {
        driver.set_opt_attr(attribute, args.text(option)?);
    }
    if !driver.is_empty() {
        disk.push(driver);
    }
    let mut from = Element::new("source");
    if kind == "network" {
        from.set_opt_attr("protocol", args.text("source-protocol")?);
    }
    if !source.is_empty() || args.has("source") {
        from.set_attr(
            match kind {
                "block" => "dev",
                "network" => "name",
                _ => "file",
            },
            &source,
        );
    }
    if kind == "network" {
        let mut host = Element::new("host");
        if let Some(name) = args.text("source-host-name")? {
            let (name, port) = match name.rsplit_once(':') {
                Some((name, port)) => (name, Some(port)),
                None => (name, None),
            };
            host.set_attr("name", name);
            host.set_opt_attr("port", port);
        }
        host.set_opt_attr("transport", args.text("source-host-transport")?);
        host.set_opt_attr("socket", args.text("source-host-socket")?);
        if !host.is_empty() {
            from.push(host);
        }
    }
    if !from.is_empty() {
        disk.push(from);
    }
    let mut to = Element::new("target").with_attr("dev", &target);
    to.set_opt_attr("bus", args.text("targetbus")?);
    disk.push(to);
    if let Some(mode) = mode {
        disk.push(Element::new(mode));
    }
    if let Some(serial) = args.text("serial")? {
        disk.push(Element::with_text("serial", serial));
    }
    if let Some(alias) = args.text("alias")? {
        disk.push(Element::new("alias").with_attr("name", alias));
    }
    if let Some(wwn) = args.text("wwn")? {
        disk.push(Element::with_text("wwn", wwn));
    }
    if let Some(word) = args.text("address")? {
        disk.push(address(word, &target, args.has("multifunction"))?);
    }
    let dom = find_domain(shell, args, ANY)?;
    let xml = format(&disk);
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    attach(shell, args, dom, xml).context("Failed to attach disk")?;
    shell.out.print_extra("Disk attached successfully\n");
    Ok(())
}

/// `average,peak,burst,floor`
fn rate(args: &Args, option: &str) -> Result<Option<Element>> {
    let Some(text) = args.text(option)? else {
        return Ok(None);
    };
    let bad = || Failure::new(format!("{option} format is incorrect"));
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > 4 {
        return Err(bad());
    }
    let mut rate = Element::new(option);
    for (name, part) in ["average", "peak", "burst", "floor"].into_iter().zip(parts) {
        if part.is_empty() {
            continue;
        }
        let malformed = || Failure::new(format!("field '{name}' is malformed"));
        let value: u64 = part.parse().map_err(|_| malformed())?;
        if value != 0 {
            rate.set_attr(name, value.to_string());
        }
    }
    if rate.attr("average").is_none() && rate.attr("floor").is_none() {
        return Err(Failure::new(format!(
            "either {option} average or floor is mandatory"
        )));
    }
    Ok(Some(rate))
}

fn attach_interface(shell: &mut Shell, args: &Args) -> Result {
    current_alone(args)?;
    let kind = args.required("type")?.to_owned();
    let source = args.required("source")?.to_owned();
    const KINDS: [&str; 13] = [
        "user",
        "ethernet",
        "vhostuser",
        "server",
        "client",
        "mcast",
        "network",
        "bridge",
        "internal",
        "direct",
        "hostdev",
        "udp",
        "vdpa",
    ];
    if !KINDS.contains(&kind.as_str()) {
        return Err(Failure::new(format!(
            "No support for {kind} in command 'attach-interface'"
        )));
    }
    let (inbound, outbound) = (rate(args, "inbound")?, rate(args, "outbound")?);
    let mode = args.text("source-mode")?;
    if let Some(mode) = mode.filter(|mode| !matches!(*mode, "server" | "client")) {
        return Err(Failure::new(format!("Invalid source mode: {mode}")));
    }
    let mut card = Element::new("interface").with_attr("type", &kind);
    if args.has("managed") {
        card.set_attr("managed", "yes");
    }
    let attribute = match kind.as_str() {
        "network" => "network",
        "bridge" => "bridge",
        "direct" | "vdpa" => "dev",
        "vhostuser" => {
            let Some(mode) = mode else {
                return Err(Failure::new("source-mode is mandatory"));
            };
            let from = Element::new("source")
                .with_attr("type", "unix")
                .with_attr("path", &source)
                .with_attr("mode", mode);
            card.push(from);
            ""
        }
        "hostdev" => {
            let place = address(&format!("pci:{}", source.replace(':', ".")), "vd", false)
                .map_err(|_| Failure::new(format!("cannot parse pci address '{source}'")))?;
            card.push(Element::new("source").with_child(place));
            ""
        }
        _ => {
            return Err(Failure::new(format!(
                "No support for {kind} in command 'attach-interface'"
            )));
        }
    };
    if !attribute.is_empty() {
        card.push(Element::new("source").with_attr(attribute, &source));
    }
    if let Some(target) = args.text("target")? {
        card.push(Element::new("target").with_attr("dev", target));
    }
    if let Some(mac) = args.text("mac")? {
        card.push(Element::new("mac").with_attr("address", mac));
    }
    if let Some(script) = args.text("script")? {
        card.push(Element::new("script").with_attr("path", script));
    }
    if let Some(model) = args.text("model")? {
        card.push(Element::new("model").with_attr("type", model));
    }
    if let Some(alias) = args.text("alias")? {
        card.push(Element::new("alias").with_attr("name", alias));
    }
    if inbound.is_some() || outbound.is_some() {
        let mut bandwidth = Element::new("bandwidth");
        inbound
            .into_iter()
            .chain(outbound)
            .for_each(|rate| bandwidth.push(rate));
        card.push(bandwidth);
    }
    let dom = find_domain(shell, args, ANY)?;
    let xml = format(&card);
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    attach(shell, args, dom, xml).context("Failed to attach interface")?;
    shell.out.print_extra("Interface attached successfully\n");
    Ok(())
}

/// A device as it stands in its domain's document, in libxml2's quotes: what virsh cuts out of it.
fn cut_out(element: &Element) -> String {
    /// Where devices are in a domain.
    const DEPTH: usize = 2;
    let mut text = String::new();
    dom::format_element(&mut text, element, DEPTH);
    let mut inside = false;
    let quote = |c: char| {
        inside = match c {
            '<' => true,
            '>' => false,
            _ => inside,
        };
        if inside && c == '\'' { '"' } else { c }
    };
    text.trim().chars().map(quote).collect()
}

/// VIR_DOMAIN_XML_INACTIVE
const XML_INACTIVE: u32 = 2;

/// Devices of a kind: of the stored definition if only that is meant.
fn devices(shell: &mut Shell, args: &Args, dom: &Domain, kind: &str) -> Result<Vec<Element>> {
    let flags = if args.has("config") && !args.has("live") {
        XML_INACTIVE
    } else {
        0
    };
    let xml = domain_xml(shell, dom, flags)?;
    let tree = dom::parse(&xml, "(domain)").map_err(|error| Failure::new(error.to_string()))?;
    let all = tree
        .child("devices")
        .into_iter()
        .flat_map(Element::elements);
    Ok(all.filter(|e| e.name == kind).cloned().collect())
}

/// Where a disk's source says what it is.
const SOURCES: [&str; 4] = ["file", "dev", "dir", "name"];

/// Whether a disk is meant by a target or a source.
fn is_disk(disk: &Element, name: &str) -> bool {
    let target = disk.child("target").and_then(|t| t.attr("dev"));
    let source = disk.child("source");
    target == Some(name)
        || source.is_some_and(|source| SOURCES.iter().any(|at| source.attr(at) == Some(name)))
}

fn find_disk(shell: &mut Shell, args: &Args, dom: &Domain, name: &str) -> Result<Element> {
    let all = devices(shell, args, dom, "disk")?;
    let found = all.into_iter().find(|disk| is_disk(disk, name));
    found.ok_or_else(|| {
        Failure::new(format!(
            "No disk found whose source path or target is {name}"
        ))
    })
}

fn detach_disk(shell: &mut Shell, args: &Args) -> Result {
    current_alone(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let target = args.required("target")?.to_owned();
    let xml = cut_out(&find_disk(shell, args, &dom, &target)?);
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    detach(shell, args, dom, xml).context("Failed to detach disk")?;
    shell.out.print_extra("Disk detached successfully\n");
    Ok(())
}

fn detach_interface(shell: &mut Shell, args: &Args) -> Result {
    current_alone(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let kind = args.required("type")?.to_owned();
    let wanted = args.text("mac")?.map(str::to_ascii_lowercase);
    let failed = |line: String| {
        let mut failure = Failure::new(line);
        failure.lines.push("Failed to detach interface".into());
        failure
    };
    let mut all = devices(shell, args, &dom, "interface")?;
    all.retain(|card| card.attr("type") == Some(&kind));
    if all.is_empty() {
        return Err(failed(format!("No interface found whose type is {kind}")));
    }
    let count = all.len();
    if let Some(wanted) = &wanted {
        let mac = |card: &Element| Some(card.child("mac")?.attr("address")?.to_ascii_lowercase());
        all.retain(|card| mac(card).as_ref() == Some(wanted));
        if all.is_empty() {
            return Err(failed(format!(
                "No interface with MAC address {wanted} was found"
            )));
        }
        if all.len() > 1 {
            return Err(failed(format!(
                "Domain has multiple interfaces matching MAC address {wanted}. You must use \
                 detach-device and specify the device pci address to remove it."
            )));
        }
    } else if count > 1 {
        return Err(failed(format!(
            "Domain has {count} interfaces. Please specify which one to detach using --mac"
        )));
    }
    let xml = cut_out(&all[0]);
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    detach(shell, args, dom, xml).context("Failed to detach interface")?;
    shell.out.print_extra("Interface detached successfully\n");
    Ok(())
}
