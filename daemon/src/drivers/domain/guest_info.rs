//! What a guest agent's answers mean (QEMU guest agent protocol reference), as libvirt's clients get it:
//! named parameters. Lists are bounded: the guest decides how long they are.

use rpc::types::{TypedParam, TypedValue};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// virDomainGuestInfoTypes, all of them.
pub const ALL: u32 = (1 << 7) - 1;
/// Most entries of one list that are passed on.
const LIST_MAX: usize = 256;

/// Finds the targets of a file system's disks.
type Find<'a> = &'a (dyn Fn(&Filesystem) -> Vec<String> + Sync);

/// One kind of information.
pub struct Part {
    /// Its virDomainGuestInfoTypes.
    pub bit: u32,
    /// What asks for it.
    pub command: &'static str,
    /// The answer's parameters.
    pub params: fn(Value, Find<'_>) -> Result<Vec<TypedParam>>,
}

/// All kinds, in the order in which they are told.
pub const PARTS: &[Part] = &[
    Part {
        bit: 1,
        command: "guest-get-users",
        params: users,
    },
    Part {
        bit: 2,
        command: "guest-get-osinfo",
        params: os,
    },
    Part {
        bit: 4,
        command: "guest-get-timezone",
        params: timezone,
    },
    Part {
        bit: 8,
        command: "guest-get-host-name",
        params: hostname,
    },
    Part {
        bit: 16,
        command: "guest-get-fsinfo",
        params: filesystem_params,
    },
    Part {
        bit: 32,
        command: "guest-get-disks",
        params: disks,
    },
    Part {
        bit: 64,
        command: "guest-network-get-interfaces",
        params: interfaces,
    },
];

fn read<T: DeserializeOwned>(answer: Value) -> Result<T> {
    serde_json::from_value(answer).map_err(|error| {
        Error::internal(format!("the guest agent's answer makes no sense: {error}"))
    })
}

/// As many entries as are passed on.
fn read_list<T: DeserializeOwned>(answer: Value) -> Result<Vec<T>> {
    let mut list: Vec<T> = read(answer)?;
    list.truncate(LIST_MAX);
    Ok(list)
}

/// A list's parameters while it is written.
struct Params(Vec<TypedParam>);

impl Params {
    fn add(&mut self, name: impl Into<String>, value: impl Into<TypedValue>) {
        self.0.push(TypedParam::new(name, value));
    }

    fn count(&mut self, name: &str, list: usize) {
        self.add(
            format!("{name}.count"),
            u32::try_from(list).unwrap_or(u32::MAX),
        );
    }
}

fn users(answer: Value, _: Find<'_>) -> Result<Vec<TypedParam>> {
    #[derive(Deserialize)]
    struct User {
        user: String,
        domain: Option<String>,
        #[serde(rename = "login-time")]
        login_time: f64,
    }
    let list: Vec<User> = read_list(answer)?;
    let mut params = Params(Vec::new());
    params.count("user", list.len());
    for (at, user) in list.into_iter().enumerate() {
        params.add(format!("user.{at}.name"), user.user);
        if let Some(domain) = user.domain {
            params.add(format!("user.{at}.domain"), domain);
        }
        // Seconds become milliseconds; a float's cast saturates.
        params.add(
            format!("user.{at}.login-time"),
            (user.login_time * 1000.0) as u64,
        );
    }
    Ok(params.0)
}

fn os(answer: Value, _: Find<'_>) -> Result<Vec<TypedParam>> {
    const FIELDS: [&str; 10] = [
        "id",
        "name",
        "pretty-name",
        "version",
        "version-id",
        "machine",
        "variant",
        "variant-id",
        "kernel-release",
        "kernel-version",
    ];
    let field = |name: &&str| {
        let value = answer.get(*name)?.as_str()?;
        Some(TypedParam::new(format!("os.{name}"), value))
    };
    Ok(FIELDS.iter().filter_map(field).collect())
}

fn timezone(answer: Value, _: Find<'_>) -> Result<Vec<TypedParam>> {
    #[derive(Deserialize)]
    struct Zone {
        zone: Option<String>,
        offset: i32,
    }
    let zone: Zone = read(answer)?;
    let mut params = Params(Vec::new());
    if let Some(name) = zone.zone {
        params.add("timezone.name", name);
    }
    params.add("timezone.offset", zone.offset);
    Ok(params.0)
}

fn hostname(answer: Value, _: Find<'_>) -> Result<Vec<TypedParam>> {
    #[derive(Deserialize)]
    struct Name {
        #[serde(rename = "host-name")]
        name: String,
    }
    let name: Name = read(answer)?;
    Ok(vec![TypedParam::new("hostname", name.name)])
}

/// A file system in the guest.
#[derive(Debug, Deserialize)]
pub struct Filesystem {
    /// The device it is on, as the guest names it.
    pub name: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes.
    #[serde(rename = "total-bytes")]
    pub total: Option<u64>,
    /// Bytes.
    #[serde(rename = "used-bytes")]
    pub used: Option<u64>,
    /// What it is on.
    #[serde(rename = "disk", default)]
    pub disks: Vec<GuestDisk>,
}

/// A disk as the guest sees it.
#[derive(Debug, Deserialize)]
pub struct GuestDisk {
    /// Where its controller is.
    #[serde(rename = "pci-controller")]
    pub controller: Option<Place>,
    /// Its serial number.
    pub serial: Option<String>,
    /// Its node below /dev.
    pub dev: Option<String>,
}

/// A place on PCI as the guest numbers it; negative numbers are unknown ones.
#[derive(Debug)]
pub struct Place {
    /// Bus.
    pub bus: u32,
    /// Slot.
    pub slot: u32,
    /// Function.
    pub function: u32,
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            bus: i64,
            slot: i64,
            function: i64,
        }
        let raw = Raw::deserialize(from)?;
        let number = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(Self {
            bus: number(raw.bus),
            slot: number(raw.slot),
            function: number(raw.function),
        })
    }
}

/// The guest's file systems.
///
/// # Errors
/// The answer makes no sense.
pub fn filesystems(answer: Value) -> Result<Vec<Filesystem>> {
    let mut list: Vec<Filesystem> = read_list(answer)?;
    list.iter_mut().for_each(|fs| fs.disks.truncate(LIST_MAX));
    Ok(list)
}

fn filesystem_params(answer: Value, find: Find<'_>) -> Result<Vec<TypedParam>> {
    let list = filesystems(answer)?;
    let mut params = Params(Vec::new());
    params.count("fs", list.len());
    for (at, fs) in list.into_iter().enumerate() {
        let targets = find(&fs);
        params.add(format!("fs.{at}.name"), fs.name);
        params.add(format!("fs.{at}.mountpoint"), fs.mountpoint);
        params.add(format!("fs.{at}.fstype"), fs.kind);
        for (name, value) in [("total-bytes", fs.total), ("used-bytes", fs.used)] {
            if let Some(value) = value {
                params.add(format!("fs.{at}.{name}"), value);
            }
        }
        params.count(&format!("fs.{at}.disk"), fs.disks.len());
        for (number, disk) in fs.disks.into_iter().enumerate() {
            let name = format!("fs.{at}.disk.{number}");
            if let Some(target) = targets.get(number) {
                params.add(format!("{name}.alias"), target.clone());
            }
            if let Some(serial) = disk.serial {
                params.add(format!("{name}.serial"), serial);
            }
            if let Some(dev) = disk.dev {
                params.add(format!("{name}.device"), dev);
            }
        }
    }
    Ok(params.0)
}

fn disks(answer: Value, _: Find<'_>) -> Result<Vec<TypedParam>> {
    #[derive(Deserialize)]
    struct Disk {
        name: String,
        partition: bool,
        #[serde(default)]
        dependencies: Vec<String>,
        address: Option<GuestDisk>,
        alias: Option<String>,
    }
    let list: Vec<Disk> = read_list(answer)?;
    let mut params = Params(Vec::new());
    params.count("disk", list.len());
    for (at, disk) in list.into_iter().enumerate() {
        params.add(format!("disk.{at}.name"), disk.name);
        params.add(format!("disk.{at}.partition"), disk.partition);
        if !disk.dependencies.is_empty() {
            let dependencies = disk.dependencies.into_iter().take(LIST_MAX);
            params.count(&format!("disk.{at}.dependency"), dependencies.len());
            for (number, name) in dependencies.enumerate() {
                params.add(format!("disk.{at}.dependency.{number}.name"), name);
            }
        }
        if let Some(serial) = disk.address.and_then(|address| address.serial) {
            params.add(format!("disk.{at}.serial"), serial);
        }
        if let Some(alias) = disk.alias {
            params.add(format!("disk.{at}.guest_alias"), alias);
        }
    }
    Ok(params.0)
}

fn interfaces(answer: Value, _: Find<'_>) -> Result<Vec<TypedParam>> {
    let list = super::agent::cards(answer)?;
    let mut params = Params(Vec::new());
    let list = &list[..list.len().min(LIST_MAX)];
    params.count("if", list.len());
    for (at, card) in list.iter().enumerate() {
        params.add(format!("if.{at}.name"), card.name.clone());
        if !card.mac.is_empty() {
            params.add(format!("if.{at}.hwaddr"), card.mac.clone());
        }
        params.count(&format!("if.{at}.addr"), card.addresses.len());
        for (number, (address, prefix)) in card.addresses.iter().enumerate() {
            let name = format!("if.{at}.addr.{number}");
            let kind = if address.is_ipv6() { "ipv6" } else { "ipv4" };
            params.add(format!("{name}.type"), kind);
            params.add(format!("{name}.addr"), address.to_string());
            params.add(format!("{name}.prefix"), *prefix);
        }
    }
    Ok(params.0)
}

/// A vCPU as the guest sees it.
#[derive(Debug, Deserialize)]
pub struct GuestVcpu {
    /// The guest's number.
    #[serde(rename = "logical-id")]
    pub id: u32,
    /// The guest uses it.
    pub online: bool,
    /// It can do without it.
    #[serde(rename = "can-offline", default)]
    pub can_offline: bool,
}

/// The guest's vCPUs.
///
/// # Errors
/// The answer makes no sense.
pub fn vcpus(answer: Value) -> Result<Vec<GuestVcpu>> {
    let mut list: Vec<GuestVcpu> = read(answer)?;
    list.truncate(4096);
    list.retain(|vcpu| vcpu.id <= xml_schemas::cpuset::MAX);
    Ok(list)
}

/// Base 64 (RFC 4648, 4), in which the agent takes passwords.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            if place <= chunk.len() {
                let digit = (word >> (18 - 6 * place)) as usize & 63;
                out.push(char::from(DIGITS[digit]));
            } else {
                out.push('=');
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn base64_is_rfc_4648s() {
        for (text, wanted) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ] {
            assert_eq!(base64(text.as_bytes()), wanted);
        }
    }

    #[test]
    fn answers_become_parameters() {
        let none = |_: &Filesystem| vec!["vda".to_owned()];
        let text = |part: usize, answer: Value| -> String {
            let params = (PARTS[part].params)(answer, &none).unwrap();
            let line = |param: &TypedParam| format!("{}={} ", param.field, param.value);
            params.iter().map(line).collect()
        };
        let users = json!([{"user": "root", "login-time": 1.5}]);
        assert_eq!(
            text(0, users),
            "user.count=1 user.0.name=root user.0.login-time=1500 "
        );
        let zone = json!({"zone": "UTC", "offset": 0});
        assert_eq!(text(2, zone), "timezone.name=UTC timezone.offset=0 ");
        let fs = json!([{"name": "vda1", "mountpoint": "/", "type": "ext4", "disk": [
            {"bus-type": "virtio", "bus": 0, "target": 0, "unit": 0, "dev": "/dev/vda1",
             "pci-controller": {"domain": 0, "bus": 1, "slot": -1, "function": 0}}]}]);
        assert_eq!(
            text(4, fs),
            "fs.count=1 fs.0.name=vda1 fs.0.mountpoint=/ fs.0.fstype=ext4 fs.0.disk.count=1 \
             fs.0.disk.0.alias=vda fs.0.disk.0.device=/dev/vda1 "
        );
        assert!(filesystems(json!([{"name": 1}])).is_err());
        assert!(vcpus(json!("x")).is_err());
    }
}
