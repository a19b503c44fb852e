//! The host's devices, as the kernel shows them in sysfs. Nothing is kept: every call looks anew.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use xml_schemas::dom::{Element, format_element};

use crate::error::{Error, ErrorCode, ErrorDomain, Result};
use crate::smbios;

/// Bits of virConnectListAllNodeDeviceFlags by capability, and the capabilities' names.
pub const CAPS: [(&str, u32); 22] = [
    ("system", 1),
    ("pci", 1 << 1),
    ("usb_device", 1 << 2),
    ("usb", 1 << 3),
    ("net", 1 << 4),
    ("scsi_host", 1 << 5),
    ("scsi_target", 1 << 6),
    ("scsi", 1 << 7),
    ("storage", 1 << 8),
    ("fc_host", 1 << 9),
    ("vports", 1 << 10),
    ("scsi_generic", 1 << 11),
    ("drm", 1 << 12),
    ("mdev_types", 1 << 13),
    ("mdev", 1 << 14),
    ("ccw", 1 << 15),
    ("css", 1 << 16),
    ("vdpa", 1 << 17),
    ("ap_card", 1 << 18),
    ("ap_queue", 1 << 19),
    ("ap_matrix", 1 << 20),
    ("vpd", 1 << 21),
];

/// A device.
#[derive(Debug, Clone)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// The name of the device it is behind; none for the computer itself.
    pub parent: Option<String>,
    /// Its folder in sysfs.
    pub path: Option<PathBuf>,
    /// Its driver's name.
    pub driver: Option<String>,
    /// `pci`, `net`...
    pub capability: &'static str,
    details: Element,
}

impl Device {
    /// `<device>`
    pub fn format(&self) -> String {
        let mut device = Element::new("device").with_child(Element::with_text("name", &self.name));
        if let Some(path) = &self.path {
            device.push(Element::with_text("path", path.display().to_string()));
        }
        if let Some(parent) = &self.parent {
            device.push(Element::with_text("parent", parent));
        }
        if let Some(driver) = &self.driver {
            device.push(Element::new("driver").with_child(Element::with_text("name", driver)));
        }
        device.push(self.details.clone());
        let mut text = String::new();
        format_element(&mut text, &device, 0);
        text
    }
}

/// Looks at devices below this folder, `/sys`.
#[derive(Debug, Clone)]
pub struct Sysfs(PathBuf);

impl Default for Sysfs {
    fn default() -> Self {
        Self(PathBuf::from("/sys"))
    }
}

/// A name without what would be strange in one.
fn plain(text: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    text.chars().map(keep).collect()
}

fn read(folder: &Path, file: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(file)).ok()?;
    let text = text.trim();
    (!text.is_empty() && !text.chars().any(char::is_control)).then(|| text.to_owned())
}

fn link_name(path: PathBuf) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

fn text(name: &str, value: impl ToString) -> Element {
    Element::with_text(name, value.to_string())
}

fn capability(kind: &str) -> Element {
    Element::new("capability").with_attr("type", kind)
}

impl Sysfs {
    /// Real folders of the entries of a folder of links.
    fn entries(&self, folder: &str) -> Vec<(String, PathBuf)> {
        let Ok(entries) = fs::read_dir(self.0.join(folder)) else {
            return Vec::new();
        };
        let entry = |entry: fs::DirEntry| {
            let name = entry.file_name().to_str()?.to_owned();
            Some((name, fs::canonicalize(entry.path()).ok()?))
        };
        entries.filter_map(|e| entry(e.ok()?)).collect()
    }

    /// All devices, by name.
    pub fn all(&self) -> Vec<Device> {
        let mut devices = vec![computer()];
        let pci = self.entries("bus/pci/devices").into_iter();
        devices.extend(pci.filter_map(|(name, path)| pci_device(&name, path)));
        let usb = self.entries("bus/usb/devices").into_iter();
        devices.extend(usb.filter_map(|(name, path)| usb_device(&name, path)));
        let hosts = self.entries("class/scsi_host").into_iter();
        devices.extend(hosts.map(|(name, path)| scsi_host(&name, path)));
        let scsi = self.entries("bus/scsi/devices").into_iter();
        devices.extend(scsi.filter_map(|(name, path)| scsi_device(&name, path)));
        let generic = self.entries("class/scsi_generic").into_iter();
        devices.extend(generic.map(|(name, path)| scsi_generic(&name, path)));
        let nets = self.entries("class/net").into_iter();
        devices.extend(nets.filter_map(|(name, path)| net(&name, path)));
        let blocks = self.entries("class/block").into_iter();
        devices.extend(blocks.filter_map(|(name, path)| storage(&name, path)));
        // A device is behind the nearest one above its folder.
        let by_path: BTreeMap<PathBuf, String> = devices
            .iter()
            .filter_map(|d| Some((d.path.clone()?, d.name.clone())))
            .collect();
        for device in &mut devices {
            let Some(path) = &device.path else { continue };
            let above = path
                .ancestors()
                .skip(1)
                .find_map(|folder| by_path.get(folder));
            let above = above.cloned().unwrap_or_else(|| "computer".to_owned());
            device.parent = Some(above);
            device.driver = link_name(path.join("driver"));
        }
        devices.sort_by(|a, b| a.name.cmp(&b.name));
        devices.dedup_by(|a, b| a.name == b.name);
        devices
    }

    /// The devices with one of the capabilities of `flags`; all without any.
    pub fn list(&self, flags: u32) -> Vec<Device> {
        /// VIR_CONNECT_LIST_NODE_DEVICES_INACTIVE and _ACTIVE: every device here is active.
        const INACTIVE: u32 = 1 << 30;
        const ACTIVE: u32 = 1 << 31;
        let caps = flags & !(INACTIVE | ACTIVE);
        if flags & (INACTIVE | ACTIVE) == INACTIVE {
            return Vec::new();
        }
        let bit = |device: &Device| {
            let found = CAPS.iter().find(|(name, _)| *name == device.capability);
            found.map_or(0, |(_, bit)| *bit)
        };
        let mut all = self.all();
        all.retain(|device| caps == 0 || bit(device) & caps != 0);
        all
    }

    /// The device with that name.
    ///
    /// # Errors
    /// VIR_ERR_NO_NODE_DEVICE.
    pub fn find(&self, name: &str) -> Result<Device> {
        let found = self.all().into_iter().find(|device| device.name == name);
        found.ok_or_else(|| {
            Error::of(
                ErrorDomain::NODEDEV,
                ErrorCode::NO_NODE_DEVICE,
                format!("no node device with matching name '{name}'"),
            )
        })
    }
}

fn computer() -> Device {
    let mut system = capability("system");
    if let Some(product) = smbios::value("product_name") {
        system.push(text("product", product));
    }
    let mut part = |name: &str, entries: &[(&str, &str)]| {
        let mut part = Element::new(name);
        for (entry, file) in entries {
            if let Some(value) = smbios::value(file) {
                part.push(text(entry, value));
            }
        }
        system.push(part);
    };
    part(
        "hardware",
        &[
            ("vendor", "sys_vendor"),
            ("version", "product_version"),
            ("serial", "product_serial"),
            ("uuid", "product_uuid"),
        ],
    );
    part(
        "firmware",
        &[
            ("vendor", "bios_vendor"),
            ("version", "bios_version"),
            ("release_date", "bios_date"),
        ],
    );
    Device {
        name: "computer".to_owned(),
        parent: None,
        path: None,
        driver: None,
        capability: "system",
        details: system,
    }
}

fn device(name: String, path: PathBuf, capability: &'static str, details: Element) -> Device {
    Device {
        name,
        parent: None,
        path: Some(path),
        driver: None,
        capability,
        details,
    }
}

/// Domain, bus, slot and function of `0000:00:1f.2`.
fn pci_place(name: &str) -> Option<[u32; 4]> {
    let (rest, function) = name.split_once('.')?;
    let mut parts = rest.split(':');
    let mut hex = || u32::from_str_radix(parts.next()?, 16).ok();
    let place = [
        hex()?,
        hex()?,
        hex()?,
        u32::from_str_radix(function, 16).ok()?,
    ];
    Some(place)
}

fn pci_device(name: &str, path: PathBuf) -> Option<Device> {
    let [domain, bus, slot, function] = pci_place(name)?;
    let mut pci = capability("pci");
    if let Some(class) = read(&path, "class") {
        pci.push(text("class", class));
    }
    for (part, value) in [
        ("domain", domain),
        ("bus", bus),
        ("slot", slot),
        ("function", function),
    ] {
        pci.push(text(part, value));
    }
    for (part, file) in [("product", "device"), ("vendor", "vendor")] {
        if let Some(id) = read(&path, file) {
            pci.push(Element::new(part).with_attr("id", id));
        }
    }
    if let Some(group) = link_name(path.join("iommu_group")) {
        let mut list = Element::new("iommuGroup").with_attr("number", group);
        let members = fs::read_dir(path.join("iommu_group/devices"))
            .into_iter()
            .flatten();
        let mut members: Vec<_> = members
            .filter_map(|m| pci_place(m.ok()?.file_name().to_str()?))
            .collect();
        members.sort_unstable();
        for [domain, bus, slot, function] in members {
            list.push(
                Element::new("address")
                    .with_attr("domain", format!("0x{domain:04x}"))
                    .with_attr("bus", format!("0x{bus:02x}"))
                    .with_attr("slot", format!("0x{slot:02x}"))
                    .with_attr("function", format!("0x{function:x}")),
            );
        }
        pci.push(list);
    }
    if let Some(node) = read(&path, "numa_node").filter(|node| !node.starts_with('-')) {
        pci.push(Element::new("numa").with_attr("node", node));
    }
    Some(device(format!("pci_{}", plain(name)), path, "pci", pci))
}

fn usb_device(name: &str, path: PathBuf) -> Option<Device> {
    if name.contains(':') {
        let mut usb = capability("usb");
        let hex = |file: &str| u32::from_str_radix(&read(&path, file)?, 16).ok();
        usb.push(text("number", hex("bInterfaceNumber")?));
        for (part, file) in [
            ("class", "bInterfaceClass"),
            ("subclass", "bInterfaceSubClass"),
            ("protocol", "bInterfaceProtocol"),
        ] {
            usb.push(text(part, hex(file)?));
        }
        return Some(device(format!("usb_{}", plain(name)), path, "usb", usb));
    }
    let mut usb = capability("usb_device");
    usb.push(text("bus", read(&path, "busnum")?));
    usb.push(text("device", read(&path, "devnum")?));
    for (part, id, words) in [
        ("product", "idProduct", "product"),
        ("vendor", "idVendor", "manufacturer"),
    ] {
        let name = read(&path, words).unwrap_or_default();
        usb.push(text(part, name).with_attr("id", format!("0x{}", read(&path, id)?)));
    }
    Some(device(
        format!("usb_{}", plain(name)),
        path,
        "usb_device",
        usb,
    ))
}

fn scsi_host(name: &str, path: PathBuf) -> Device {
    let mut host = capability("scsi_host");
    host.push(text("host", name.trim_start_matches("host")));
    if let Some(id) = read(&path, "unique_id") {
        host.push(text("unique_id", id));
    }
    // /sys/devices/.../hostN/scsi_host/hostN: what is behind it is beside this folder.
    let path = path
        .parent()
        .and_then(Path::parent)
        .map_or(path.clone(), Path::to_path_buf);
    device(format!("scsi_{}", plain(name)), path, "scsi_host", host)
}

fn scsi_device(name: &str, path: PathBuf) -> Option<Device> {
    if let Some(target) = name.strip_prefix("target") {
        let details =
            capability("scsi_target").with_child(text("target", format!("target{target}")));
        return Some(device(
            format!("scsi_{}", plain(name)),
            path,
            "scsi_target",
            details,
        ));
    }
    let parts: Vec<u32> = name
        .split(':')
        .map(|part| part.parse().ok())
        .collect::<Option<_>>()?;
    let [host, bus, target, lun] = parts[..] else {
        return None;
    };
    let mut scsi = capability("scsi");
    for (part, value) in [
        ("host", host),
        ("bus", bus),
        ("target", target),
        ("lun", lun),
    ] {
        scsi.push(text(part, value));
    }
    let kind = match read(&path, "type")?.as_str() {
        "0" => "disk",
        "1" => "tape",
        "2" => "printer",
        "3" => "processor",
        "4" => "worm",
        "5" => "cdrom",
        "6" => "scanner",
        "7" => "mod",
        "8" => "changer",
        "12" => "raid",
        _ => "unknown",
    };
    scsi.push(text("type", kind));
    Some(device(format!("scsi_{}", plain(name)), path, "scsi", scsi))
}

fn scsi_generic(name: &str, path: PathBuf) -> Device {
    let details = capability("scsi_generic").with_child(text("char", format!("/dev/{name}")));
    device(
        format!("scsi_generic_{}", plain(name)),
        path,
        "scsi_generic",
        details,
    )
}

fn net(name: &str, path: PathBuf) -> Option<Device> {
    let address = read(&path, "address")?;
    let mut net = capability("net");
    net.push(text("interface", name));
    net.push(text("address", &address));
    let mut link = Element::new("link");
    let speed = read(&path, "speed").and_then(|speed| speed.parse::<u32>().ok());
    if let Some(speed) = speed.filter(|speed| *speed > 0) {
        link.set_attr("speed", speed.to_string());
    }
    link.set_attr(
        "state",
        read(&path, "operstate").unwrap_or_else(|| "unknown".into()),
    );
    net.push(link);
    // Ethernet by its type (ARPHRD_ETHER), wireless by what its driver adds.
    if path.join("phy80211").exists() {
        net.push(capability("80211"));
    } else if read(&path, "type").as_deref() == Some("1") {
        net.push(capability("80203"));
    }
    let full = format!("net_{}_{}", plain(name), plain(&address));
    Some(device(full, path, "net", net))
}

fn storage(name: &str, path: PathBuf) -> Option<Device> {
    const SECTOR: u64 = 512;
    let disk = ["sd", "vd", "nvme", "mmcblk", "xvd", "hd"]
        .iter()
        .any(|kind| name.starts_with(kind));
    let cdrom = name.starts_with("sr");
    if path.join("partition").exists() || !(disk || cdrom) {
        return None;
    }
    let mut storage = capability("storage");
    storage.push(text("block", format!("/dev/{name}")));
    let hardware = path.join("device");
    storage.push(text("drive_type", if cdrom { "cdrom" } else { "disk" }));
    let model = read(&hardware, "model");
    if let Some(model) = &model {
        storage.push(text("model", model));
    }
    if let Some(vendor) = read(&hardware, "vendor").filter(|vendor| !vendor.starts_with("0x")) {
        storage.push(text("vendor", vendor));
    }
    let serial = read(&hardware, "serial").or_else(|| read(&path, "serial"));
    if let Some(serial) = &serial {
        storage.push(text("serial", serial));
    }
    let blocks: u64 = read(&path, "size")?.parse().ok()?;
    let block_size: u64 = read(&path, "queue/logical_block_size")
        .and_then(|size| size.parse().ok())
        .filter(|size| *size > 0)
        .unwrap_or(SECTOR);
    let bytes = blocks.saturating_mul(SECTOR);
    let mut sizes = vec![
        text("size", bytes),
        text("logical_block_size", block_size),
        text("num_blocks", bytes / block_size),
    ];
    if cdrom || read(&path, "removable").as_deref() == Some("1") {
        let medium = if bytes > 0 { "1" } else { "0" };
        let mut removable = capability("removable").with_child(text("media_available", medium));
        for (at, size) in sizes.drain(..).enumerate() {
            let name = ["media_size", "logical_block_size", "num_blocks"][at];
            removable.push(text(name, size.text()));
        }
        storage.push(removable);
    }
    sizes.into_iter().for_each(|size| storage.push(size));
    let full = match &serial {
        Some(serial) => format!("block_{}_{}", plain(name), plain(serial)),
        None => format!("block_{}", plain(name)),
    };
    Some(device(full, path, "storage", storage))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_tree_of_devices_is_read() {
        let temp = crate::files::testing::TempFolder::new();
        let root = fs::canonicalize(&temp.0).unwrap();
        let put = |file: &str, text: &str| {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let card = "devices/pci0000:00/0000:00:1f.2";
        put(&format!("{card}/class"), "0x020000\n");
        put(&format!("{card}/device"), "0x1041\n");
        put(&format!("{card}/vendor"), "0x1af4\n");
        put(&format!("{card}/net/eth0/address"), "52:54:00:00:00:01\n");
        put(&format!("{card}/net/eth0/type"), "1\n");
        put(&format!("{card}/net/eth0/operstate"), "up\n");
        put(&format!("{card}/net/eth0/speed"), "-1\n");
        put("devices/virtual/block/sda/size", "2048\n");
        put("devices/virtual/block/sda/sda1/partition", "1\n");
        for (link, to) in [
            ("bus/pci/devices/0000:00:1f.2", card),
            ("class/net/eth0", &format!("{card}/net/eth0")),
            ("class/block/sda", "devices/virtual/block/sda"),
            ("class/block/sda1", "devices/virtual/block/sda/sda1"),
        ] {
            let link = root.join(link);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(root.join(to), link).unwrap();
        }
        let sysfs = Sysfs(root.clone());
        let names: Vec<String> = sysfs.all().into_iter().map(|d| d.name).collect();
        assert_eq!(
            names,
            [
                "block_sda",
                "computer",
                "net_eth0_52_54_00_00_00_01",
                "pci_0000_00_1f_2"
            ]
        );
        let net = sysfs.find("net_eth0_52_54_00_00_00_01").unwrap();
        assert_eq!(net.parent.as_deref(), Some("pci_0000_00_1f_2"));
        assert!(
            net.format().contains("<link state='up'/>"),
            "{}",
            net.format()
        );
        let pci = sysfs.find("pci_0000_00_1f_2").unwrap();
        let wanted = "    <class>0x020000</class>\n    <domain>0</domain>\n    <bus>0</bus>\n    \
                      <slot>31</slot>\n    <function>2</function>\n    <product id='0x1041'/>\n    \
                      <vendor id='0x1af4'/>\n";
        assert!(pci.format().contains(wanted), "{}", pci.format());
        assert_eq!(sysfs.list(1 << 8).len(), 1);
        assert_eq!(sysfs.list(1 << 30).len(), 0);
        assert_eq!(sysfs.find("x").unwrap_err().code.0, 53);
    }
}
