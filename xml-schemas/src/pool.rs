//! Storage pools: definitions, and what the host can do with each type of pool.

mod capabilities;

use uuid::Uuid;

use crate::Validation;
use crate::dom::{self, Element, format_element};
use crate::error::{ErrorCode, ErrorDomain, XmlError};
use crate::grammar;

pub use capabilities::capabilities;

/// Longest name: with `.xml` and a temporary file's suffix it must fit a file name.
const MAX_NAME_BYTES: usize = 200;
/// The namespace of mount options.
const FS_NAMESPACE: &str = "http://libvirt.org/schemas/storagepool/fs/1.0";

/// The types of pools that libvirt names, in the order of virStoragePoolType.
pub const TYPES: &[&str] = &[
    "dir",
    "fs",
    "netfs",
    "logical",
    "disk",
    "iscsi",
    "iscsi-direct",
    "scsi",
    "mpath",
    "rbd",
    "sheepdog",
    "gluster",
    "zfs",
    "vstorage",
];

/// The types of pools there are here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolType {
    /// A folder.
    Dir,
    /// A file system on a block device, mounted while the pool is active.
    Fs,
    /// A network file system, mounted while the pool is active.
    Netfs,
}

impl PoolType {
    /// Its name in documents.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dir => "dir",
            Self::Fs => "fs",
            Self::Netfs => "netfs",
        }
    }

    /// The type of that name.
    ///
    /// # Errors
    /// VIR_ERR_INTERNAL_ERROR naming a type that is not there, in the words of a libvirt built
    /// without it; VIR_ERR_XML_ERROR for what is no type at all.
    pub fn from_name(name: &str) -> Result<Self, XmlError> {
        match name {
            "dir" => Ok(Self::Dir),
            "fs" => Ok(Self::Fs),
            "netfs" => Ok(Self::Netfs),
            other => Err(match TYPES.iter().position(|known| *known == other) {
                Some(number) => error(
                    ErrorCode::Internal,
                    format!("missing backend for pool type {number} ({other})"),
                ),
                None => xml(format!(
                    "Invalid value for attribute 'type' in element 'pool': '{other}'."
                )),
            }),
        }
    }

    /// What `<source><format type=…>` may be; the first is the default.
    pub fn formats(self) -> &'static [&'static str] {
        match self {
            Self::Dir => &[],
            Self::Fs => &[
                "auto", "ext2", "ext3", "ext4", "ufs", "iso9660", "udf", "gfs", "gfs2", "vfat",
                "hfs+", "xfs", "ocfs2", "vmfs",
            ],
            Self::Netfs => &["auto", "nfs", "glusterfs", "cifs"],
        }
    }
}

/// Mode, owner and group of a file or folder; what is not stated is left as it comes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Permissions {
    /// `chmod`'s bits.
    pub mode: Option<u32>,
    /// User id.
    pub owner: Option<u32>,
    /// Group id.
    pub group: Option<u32>,
    /// A security label.
    pub label: Option<String>,
}

impl Permissions {
    /// Reads `<permissions>`.
    pub(crate) fn read(element: &Element) -> Result<Self, XmlError> {
        let mode = match element.child_text("mode") {
            None => None,
            Some(text) => Some(
                u32::from_str_radix(text.trim(), 8)
                    .ok()
                    .filter(|mode| mode & !0o7777 == 0)
                    .ok_or_else(|| xml("malformed octal mode"))?,
            ),
        };
        let id = |name: &str| match element.child_text(name) {
            None => Ok(None),
            Some(text) if text.trim() == "-1" => Ok(None),
            Some(text) => match text.trim().parse::<u32>() {
                Ok(id) if id != u32::MAX => Ok(Some(id)),
                _ => Err(xml(format!("malformed {name} element"))),
            },
        };
        Ok(Self {
            mode,
            owner: id("owner")?,
            group: id("group")?,
            label: element.child_text("label").filter(|l| !l.is_empty()),
        })
    }

    /// The element; none if nothing is stated.
    pub(crate) fn element(&self) -> Option<Element> {
        if *self == Self::default() {
            return None;
        }
        let mut element = Element::new("permissions");
        if let Some(mode) = self.mode {
            element.push(Element::with_text("mode", format!("{mode:04o}")));
        }
        for (name, id) in [("owner", self.owner), ("group", self.group)] {
            if let Some(id) = id {
                element.push(Element::with_text(name, id.to_string()));
            }
        }
        if let Some(label) = &self.label {
            element.push(Element::with_text("label", label));
        }
        Some(element)
    }
}

/// A server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// Its name or address.
    pub name: String,
    /// Its port, if not the usual one.
    pub port: Option<u16>,
}

/// Where a pool's file system comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// Servers.
    pub hosts: Vec<Host>,
    /// Block devices.
    pub devices: Vec<String>,
    /// The folder on the server.
    pub dir: Option<String>,
    /// A name (kept).
    pub name: Option<String>,
    /// Of [`PoolType::formats`].
    pub format: Option<String>,
    /// Version of NFS.
    pub protocol_version: Option<String>,
    /// Who made it (kept).
    pub vendor: Option<String>,
    /// What it is (kept).
    pub product: Option<String>,
}

/// A pool's definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// What it is.
    pub kind: PoolType,
    /// Its name.
    pub name: String,
    /// Its UUID; made where the document has none.
    pub uuid: Uuid,
    /// `<features><cow state=…>`.
    pub copy_on_write: Option<bool>,
    /// Where it comes from.
    pub source: Source,
    /// Where its volumes are.
    pub path: String,
    /// Of that folder.
    pub permissions: Permissions,
    /// More options for mounting it.
    pub mount_options: Vec<String>,
}

/// Sizes in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// All there is.
    pub capacity: u64,
    /// What is used.
    pub allocation: u64,
    /// What is free.
    pub available: u64,
}

fn error(code: ErrorCode, message: impl std::fmt::Display) -> XmlError {
    XmlError::new(code, ErrorDomain::Storage, message)
}

/// VIR_ERR_XML_ERROR of the storage driver.
pub(crate) fn xml(message: impl std::fmt::Display) -> XmlError {
    error(ErrorCode::Xml, message)
}

/// A path without trailing and doubled slashes.
pub fn clean_path(path: &str) -> String {
    let mut clean = String::with_capacity(path.len());
    for c in path.chars() {
        // POSIX leaves a meaning to exactly two slashes at the front; Linux gives them none.
        if c != '/' || !clean.ends_with('/') {
            clean.push(c);
        }
    }
    if clean.len() > 1 && clean.ends_with('/') {
        clean.pop();
    }
    clean
}

impl Pool {
    /// Reads a definition.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for what is malformed or lacks a part, VIR_ERR_XML_INVALID_SCHEMA for
    /// what a strict reading refuses, VIR_ERR_INTERNAL_ERROR for a type that is not there.
    pub fn parse(text: &str, validation: Validation) -> Result<Self, XmlError> {
        let mut root = dom::parse(text, "(storage_pool_definition)")?;
        if root.name != "pool" {
            return Err(xml(format!(
                "expecting root element of 'pool', not '{}'",
                root.name
            )));
        }
        grammar::pool().normalize(&mut root);
        if validation == Validation::Strict {
            grammar::pool().check(&root)?;
        }
        let kind = root
            .attr("type")
            .ok_or_else(|| xml("Missing required attribute 'type' in element 'pool'"))?;
        let kind = PoolType::from_name(kind)?;
        let source = match root.child("source") {
            Some(element) => Source::read(element, Some(kind))?,
            None => Source::default(),
        };
        let name = root
            .child_text("name")
            .filter(|name| !name.is_empty())
            .or_else(|| source.name.clone())
            .ok_or_else(|| xml("missing pool source name element"))?;
        check_name(&name)?;
        let uuid = match root.child_text("uuid") {
            None => Uuid::new_v4(),
            Some(text) => text
                .trim()
                .parse()
                .map_err(|_| xml("malformed uuid element"))?,
        };
        let copy_on_write = match root.child("features").and_then(|f| f.child("cow")) {
            None => None,
            Some(cow) => Some(match cow.attr("state") {
                Some("yes") => true,
                Some("no") => false,
                _ => return Err(xml("invalid cow feature state")),
            }),
        };
        if kind == PoolType::Netfs && source.hosts.is_empty() {
            return Err(xml("missing storage pool source host name"));
        }
        if kind == PoolType::Netfs && source.dir.is_none() {
            return Err(xml("missing storage pool source path"));
        }
        if kind == PoolType::Fs && source.devices.is_empty() {
            return Err(xml("missing storage pool source device name"));
        }
        let target = root.child("target");
        let path = target
            .and_then(|t| t.child_text("path"))
            .filter(|path| !path.is_empty())
            .ok_or_else(|| xml("missing storage pool target path"))?;
        if !path.starts_with('/') {
            return Err(xml(format!(
                "storage pool target path '{path}' is not absolute"
            )));
        }
        let permissions = match target.and_then(|t| t.child("permissions")) {
            Some(element) => Permissions::read(element)?,
            None => Permissions::default(),
        };
        Ok(Self {
            kind,
            name,
            uuid,
            copy_on_write,
            source,
            path: clean_path(&path),
            permissions,
            mount_options: mount_options(&root)?,
        })
    }

    /// The document in libvirt's layout.
    pub fn format(&self, sizes: Sizes) -> String {
        let mut root = Element::new("pool").with_attr("type", self.kind.name());
        if !self.mount_options.is_empty() {
            root.set_attr("xmlns:fs", FS_NAMESPACE);
        }
        root.push(Element::with_text("name", &self.name));
        root.push(Element::with_text("uuid", self.uuid.to_string()));
        for (name, bytes) in [
            ("capacity", sizes.capacity),
            ("allocation", sizes.allocation),
            ("available", sizes.available),
        ] {
            root.push(Element::with_text(name, bytes.to_string()).with_attr("unit", "bytes"));
        }
        if let Some(on) = self.copy_on_write {
            let state = if on { "yes" } else { "no" };
            root.push(
                Element::new("features").with_child(Element::new("cow").with_attr("state", state)),
            );
        }
        root.push(self.source.element(self.kind));
        let mut target = Element::new("target").with_child(Element::with_text("path", &self.path));
        if let Some(permissions) = self.permissions.element() {
            target.push(permissions);
        }
        root.push(target);
        if !self.mount_options.is_empty() {
            let mut options = Element::new("fs:mount_opts");
            for option in &self.mount_options {
                options.push(Element::new("fs:option").with_attr("name", option));
            }
            root.push(options);
        }
        let mut out = String::new();
        format_element(&mut out, &root, 0);
        // libvirt prints both tags of a source that has nothing in it.
        out.replace("\n  <source/>\n", "\n  <source>\n  </source>\n")
    }
}

fn check_name(name: &str) -> Result<(), XmlError> {
    if name.contains('/') {
        return Err(xml(format!("name {name} cannot contain '/'")));
    }
    if name.contains(|c: char| c.is_control()) || name.trim().is_empty() {
        return Err(xml(
            "a pool's name is not empty and has no control characters",
        ));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(xml(format!(
            "a pool's name has at most {MAX_NAME_BYTES} bytes"
        )));
    }
    Ok(())
}

fn mount_options(root: &Element) -> Result<Vec<String>, XmlError> {
    let Some(options) = root
        .elements()
        .find(|e| e.local_name() == "mount_opts" && e.namespace.as_deref() == Some(FS_NAMESPACE))
    else {
        return Ok(Vec::new());
    };
    options
        .elements()
        .filter(|e| e.local_name() == "option")
        .map(|option| {
            option
                .attr("name")
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .ok_or_else(|| xml("no storage pool mount option name specified"))
        })
        .collect()
}

impl Source {
    /// Reads a document that is nothing but a `<source>` (`find-storage-pool-sources`).
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR.
    pub fn parse(text: &str, kind: PoolType) -> Result<Self, XmlError> {
        let root = dom::parse(text, "(storage_source_specification)")?;
        if root.name != "source" {
            return Err(xml("root element was not source"));
        }
        Self::read(&root, Some(kind))
    }

    fn read(element: &Element, kind: Option<PoolType>) -> Result<Self, XmlError> {
        let named = |child: &str, attribute: &str| {
            element
                .child(child)
                .and_then(|e| e.attr(attribute))
                .filter(|value| !value.is_empty())
                .map(str::to_owned)
        };
        let mut hosts = Vec::new();
        for host in element.elements().filter(|e| e.name == "host") {
            let name = host
                .attr("name")
                .filter(|name| !name.is_empty())
                .ok_or_else(|| xml("missing storage pool host name"))?;
            let port = match host.attr("port") {
                None => None,
                Some(text) => Some(
                    text.parse()
                        .map_err(|_| xml(format!("Invalid port number: {text}")))?,
                ),
            };
            hosts.push(Host {
                name: name.to_owned(),
                port,
            });
        }
        let mut devices = Vec::new();
        for device in element.elements().filter(|e| e.name == "device") {
            let path = device
                .attr("path")
                .filter(|path| !path.is_empty())
                .ok_or_else(|| xml("missing storage pool source device path"))?;
            devices.push(path.to_owned());
        }
        let formats = kind.map_or(&[][..], PoolType::formats);
        let format = match named("format", "type") {
            // Types without formats don't look at it.
            _ if formats.is_empty() => None,
            Some(format) if !formats.contains(&format.as_str()) => {
                return Err(error(
                    ErrorCode::ConfigUnsupported,
                    format!("unknown pool format type {format}"),
                ));
            }
            other => other,
        };
        let protocol_version = named("protocol", "ver");
        if let Some(version) = &protocol_version
            && (!version.bytes().all(|b| b.is_ascii_digit() || b == b'.') || version.len() > 10)
        {
            return Err(xml(format!(
                "malformed storage protocol version '{version}'"
            )));
        }
        Ok(Self {
            hosts,
            devices,
            dir: named("dir", "path").map(|dir| clean_path(&dir)),
            name: element.child_text("name").filter(|name| !name.is_empty()),
            format,
            protocol_version,
            vendor: named("vendor", "name"),
            product: named("product", "name"),
        })
    }

    fn element(&self, kind: PoolType) -> Element {
        let mut element = Element::new("source");
        for host in &self.hosts {
            let mut e = Element::new("host").with_attr("name", &host.name);
            e.set_opt_attr("port", host.port.map(|port| port.to_string()));
            element.push(e);
        }
        for device in &self.devices {
            element.push(Element::new("device").with_attr("path", device));
        }
        if let Some(dir) = self.dir.as_ref().filter(|_| kind == PoolType::Netfs) {
            element.push(Element::new("dir").with_attr("path", dir));
        }
        if let Some(name) = &self.name {
            element.push(Element::with_text("name", name));
        }
        if let Some(default) = kind.formats().first() {
            let format = self.format.as_deref().unwrap_or(default);
            element.push(Element::new("format").with_attr("type", format));
        }
        if let Some(version) = &self.protocol_version {
            element.push(Element::new("protocol").with_attr("ver", version));
        }
        for (name, value) in [("vendor", &self.vendor), ("product", &self.product)] {
            if let Some(value) = value {
                element.push(Element::new(name).with_attr("name", value));
            }
        }
        element
    }
}

/// The document that lists what was found on a server.
pub fn sources(found: &[Source], kind: PoolType) -> String {
    let mut root = Element::new("sources");
    for source in found {
        root.push(source.element(kind));
    }
    let mut out = String::new();
    format_element(&mut out, &root, 0);
    out
}

#[cfg(test)]
mod tests;
