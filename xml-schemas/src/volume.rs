//! Storage volumes.

use crate::Validation;
use crate::dom::{self, Element, format_element};
use crate::domain::device::SecretUse;
use crate::error::{ErrorCode, ErrorDomain, XmlError};
use crate::grammar;
use crate::pool::{Permissions, xml};
use crate::units::scale;

/// The formats that libvirt names for volumes in folders.
pub const FORMATS: &[&str] = &[
    "none", "raw", "dir", "bochs", "cloop", "dmg", "iso", "vpc", "vdi", "fat", "vhd", "ploop",
    "cow", "qcow", "qcow2", "qed", "vmdk",
];

/// What a volume is (virStorageVolType).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VolumeType {
    /// A file.
    #[default]
    File,
    /// A block device.
    Block,
    /// A folder.
    Dir,
}

impl VolumeType {
    /// Its name in documents.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Block => "block",
            Self::Dir => "dir",
        }
    }

    /// virStorageVolType.
    pub fn number(self) -> i32 {
        match self {
            Self::File => 0,
            Self::Block => 1,
            Self::Dir => 2,
        }
    }
}

/// Seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds.
    pub nanoseconds: i64,
}

/// When a file was read, written, changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// Last read.
    pub accessed: Time,
    /// Last written.
    pub modified: Time,
    /// Last change of its state.
    pub changed: Time,
}

/// The cipher of an encrypted volume, as the document has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CipherInfo {
    /// `aes`…
    pub name: String,
    /// Bits of the key.
    pub size: u32,
    /// `xts`, `cbc`…
    pub mode: Option<String>,
    /// `sha256`…
    pub hash: Option<String>,
}

/// Where initial vectors come from, as the document has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VectorInfo {
    /// `plain64`…
    pub name: String,
    /// Of `essiv`.
    pub hash: Option<String>,
}

/// `<encryption>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncryptionInfo {
    /// `luks`…
    pub format: String,
    /// What opens it.
    pub secrets: Vec<SecretUse>,
    /// How it is encrypted, if stated.
    pub cipher: Option<CipherInfo>,
    /// Where initial vectors come from, if stated.
    pub vector: Option<VectorInfo>,
}

/// Features of a qcow2 image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Subclusters.
    pub extended_l2: bool,
}

/// What is behind a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackingStore {
    /// Where.
    pub path: String,
    /// How it is stored, if stated.
    pub format: Option<String>,
    /// Of the file.
    pub permissions: Permissions,
    /// Of the file.
    pub times: Option<Times>,
}

/// A volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Volume {
    /// What it is.
    pub kind: VolumeType,
    /// Its name in the pool.
    pub name: String,
    /// Its name everywhere: its path.
    pub key: String,
    /// Bytes that a guest sees; none where a document leaves it to what the volume is made from.
    pub capacity: Option<u64>,
    /// Bytes that the host has given to it; none where a document does not say.
    pub allocation: Option<u64>,
    /// Bytes of the file.
    pub physical: Option<u64>,
    /// Where it is.
    pub path: String,
    /// How it is stored.
    pub format: String,
    /// Of the file.
    pub permissions: Permissions,
    /// Of the file.
    pub times: Option<Times>,
    /// How it is encrypted.
    pub encryption: Option<EncryptionInfo>,
    /// qcow2: the version, `0.10` or `1.1`.
    pub compat: Option<String>,
    /// qcow2: bytes of a cluster.
    pub cluster_size: Option<u64>,
    /// Not copied on write by its file system.
    pub nocow: bool,
    /// qcow2: features, of `compat` 1.1.
    pub features: Option<Features>,
    /// What is behind it.
    pub backing: Option<BackingStore>,
}

fn unsupported(message: impl std::fmt::Display) -> XmlError {
    XmlError::new(ErrorCode::ConfigUnsupported, ErrorDomain::Storage, message)
}

fn size(root: &Element, name: &str) -> Result<Option<u64>, XmlError> {
    let Some(element) = root.child(name) else {
        return Ok(None);
    };
    let value = element
        .text()
        .trim()
        .parse()
        .map_err(|_| xml(format!("malformed {name} element")))?;
    let unit = element.attr("unit").unwrap_or("bytes");
    let bytes = scale(value, unit)?;
    // No file is longer.
    if i64::try_from(bytes).is_err() {
        return Err(XmlError::new(
            ErrorCode::Overflow,
            ErrorDomain::Storage,
            format!("value too large: {value}{unit}"),
        ));
    }
    Ok(Some(bytes))
}

fn format_of(element: &Element) -> Result<Option<String>, XmlError> {
    let Some(format) = element.child("format").and_then(|e| e.attr("type")) else {
        return Ok(None);
    };
    if FORMATS.contains(&format) {
        Ok(Some(format.to_owned()))
    } else {
        Err(unsupported(format!("unknown volume format type {format}")))
    }
}

fn permissions_of(element: &Element) -> Result<Permissions, XmlError> {
    element
        .child("permissions")
        .map_or(Ok(Permissions::default()), Permissions::read)
}

impl Volume {
    /// Reads a definition.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for what is malformed or lacks a part, VIR_ERR_CONFIG_UNSUPPORTED for
    /// unknown formats, VIR_ERR_XML_INVALID_SCHEMA for what a strict reading refuses.
    pub fn parse(text: &str, validation: Validation) -> Result<Self, XmlError> {
        let root = dom::parse(text, "(storage_volume_definition)")?;
        if root.name != "volume" {
            return Err(xml(format!(
                "expecting root element of 'volume', not '{}'",
                root.name
            )));
        }
        if validation == Validation::Strict {
            grammar::volume().check(&root)?;
        }
        let name = root
            .child_text("name")
            .filter(|name| !name.is_empty())
            .ok_or_else(|| xml("missing volume name element"))?;
        let kind = match root.attr("type") {
            None | Some("file" | "network" | "netdir" | "ploop") => VolumeType::File,
            Some("block") => VolumeType::Block,
            Some("dir") => VolumeType::Dir,
            Some(other) => return Err(xml(format!("unknown volume type '{other}'"))),
        };
        let mut volume = Self {
            kind,
            name,
            format: "raw".to_owned(),
            ..Self::default()
        };
        if let Some(store) = root.child("backingStore")
            && let Some(path) = store.child_text("path").filter(|path| !path.is_empty())
        {
            volume.backing = Some(BackingStore {
                path,
                format: format_of(store)?,
                permissions: permissions_of(store)?,
                times: None,
            });
        }
        volume.capacity = size(&root, "capacity")?;
        volume.allocation = size(&root, "allocation")?;
        if let Some(target) = root.child("target") {
            volume.read_target(target)?;
        }
        if volume.format == "dir" {
            volume.kind = VolumeType::Dir;
        }
        Ok(volume)
    }

    fn read_target(&mut self, target: &Element) -> Result<(), XmlError> {
        if let Some(format) = format_of(target)? {
            self.format = format;
        }
        self.permissions = permissions_of(target)?;
        self.encryption = target
            .child("encryption")
            .map(EncryptionInfo::read)
            .transpose()?;
        self.compat = target.child_text("compat");
        if let Some(compat) = &self.compat {
            let mut parts = compat.split('.');
            let number = |part: Option<&str>| {
                part.is_some_and(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
            };
            if !number(parts.next()) || !number(parts.next()) || parts.next().is_some() {
                return Err(xml("forbidden characters in 'compat' attribute"));
            }
        }
        self.cluster_size = size(target, "clusterSize")?;
        self.nocow = target.child("nocow").is_some();
        if let Some(element) = target.child("features") {
            let mut features = Features::default();
            for feature in element.elements() {
                match feature.name.as_str() {
                    "lazy_refcounts" => features.lazy_refcounts = true,
                    "extended_l2" => features.extended_l2 = true,
                    other => return Err(xml(format!("unsupported feature {other}"))),
                }
            }
            self.compat.get_or_insert_with(|| "1.1".to_owned());
            self.features = Some(features);
        }
        Ok(())
    }

    /// The document in libvirt's layout.
    pub fn format(&self) -> String {
        let bytes = |name: &str, value: u64| {
            Element::with_text(name, value.to_string()).with_attr("unit", "bytes")
        };
        let mut root = Element::new("volume").with_attr("type", self.kind.name());
        root.push(Element::with_text("name", &self.name));
        root.push(Element::with_text("key", &self.key));
        root.push(bytes("capacity", self.capacity.unwrap_or(0)));
        root.push(bytes("allocation", self.allocation.unwrap_or(0)));
        if let Some(physical) = self.physical.filter(|bytes| *bytes > 0) {
            root.push(bytes("physical", physical));
        }
        root.push(self.target());
        if let Some(backing) = &self.backing {
            let mut element = Element::new("backingStore");
            element.push(Element::with_text("path", &backing.path));
            let format = backing.format.as_deref().unwrap_or("raw");
            element.push(Element::new("format").with_attr("type", format));
            if let Some(permissions) = backing.permissions.element() {
                element.push(permissions);
            }
            if let Some(times) = &backing.times {
                element.push(times.element());
            }
            root.push(element);
        }
        let mut out = String::new();
        format_element(&mut out, &root, 0);
        // libvirt prints both tags of an encryption that has nothing in it.
        out.replace(
            "    <encryption format='luks'/>\n",
            "    <encryption format='luks'>\n    </encryption>\n",
        )
    }

    fn target(&self) -> Element {
        let mut target = Element::new("target");
        target.push(Element::with_text("path", &self.path));
        target.push(Element::new("format").with_attr("type", &self.format));
        if let Some(permissions) = self.permissions.element() {
            target.push(permissions);
        }
        if let Some(times) = &self.times {
            target.push(times.element());
        }
        if let Some(encryption) = &self.encryption {
            target.push(encryption.element());
        }
        if let Some(compat) = &self.compat {
            target.push(Element::with_text("compat", compat));
        }
        if let Some(bytes) = self.cluster_size.filter(|bytes| *bytes > 0) {
            target
                .push(Element::with_text("clusterSize", bytes.to_string()).with_attr("unit", "B"));
        }
        if let Some(features) = &self.features {
            let mut element = Element::new("features");
            if features.lazy_refcounts {
                element.push(Element::new("lazy_refcounts"));
            }
            if features.extended_l2 {
                element.push(Element::new("extended_l2"));
            }
            target.push(element);
        }
        target
    }
}

impl Times {
    fn element(&self) -> Element {
        let mut element = Element::new("timestamps");
        for (name, time) in [
            ("atime", self.accessed),
            ("mtime", self.modified),
            ("ctime", self.changed),
            // Nobody asks the file system for it, libvirt neither.
            ("btime", Time::default()),
        ] {
            let mut text = time.seconds.to_string();
            if time.nanoseconds != 0 {
                text.push_str(&format!(".{:09}", time.nanoseconds));
            }
            element.push(Element::with_text(name, text));
        }
        element
    }
}

impl EncryptionInfo {
    fn read(element: &Element) -> Result<Self, XmlError> {
        let format = element
            .attr("format")
            .ok_or_else(|| xml("missing volume encryption format"))?;
        if !["default", "qcow", "luks", "luks2"].contains(&format) {
            return Err(unsupported(format!(
                "unknown volume encryption format type {format}"
            )));
        }
        let mut secrets = Vec::new();
        for secret in element.elements().filter(|e| e.name == "secret") {
            match secret.attr("type") {
                Some("passphrase") => {}
                Some(other) => {
                    return Err(unsupported(format!(
                        "unknown volume encryption secret type {other}"
                    )));
                }
                None => return Err(xml("unknown volume encryption secret type")),
            }
            let (uuid, usage) = (secret.attr("uuid"), secret.attr("usage"));
            if uuid.is_some() == usage.is_some() {
                return Err(xml("invalid secret: one of uuid and usage is needed"));
            }
            secrets.push(SecretUse {
                format: format.to_owned(),
                uuid: uuid.map(str::to_owned),
                usage: usage.map(str::to_owned),
            });
        }
        let cipher = match element.child("cipher") {
            None => None,
            Some(cipher) => Some(CipherInfo {
                name: cipher
                    .attr("name")
                    .ok_or_else(|| xml("cipher info missing 'name' attribute"))?
                    .to_owned(),
                size: cipher
                    .attr("size")
                    .and_then(|size| size.parse().ok())
                    .ok_or_else(|| xml("cannot parse cipher size"))?,
                mode: cipher.attr("mode").map(str::to_owned),
                hash: cipher.attr("hash").map(str::to_owned),
            }),
        };
        let vector = match element.child("ivgen") {
            None => None,
            Some(vector) => Some(VectorInfo {
                name: vector
                    .attr("name")
                    .ok_or_else(|| xml("missing ivgen info name string"))?
                    .to_owned(),
                hash: vector.attr("hash").map(str::to_owned),
            }),
        };
        Ok(Self {
            format: format.to_owned(),
            secrets,
            cipher,
            vector,
        })
    }

    fn element(&self) -> Element {
        let mut element = Element::new("encryption").with_attr("format", &self.format);
        for secret in &self.secrets {
            let mut e = Element::new("secret").with_attr("type", "passphrase");
            e.set_opt_attr("uuid", secret.uuid.as_ref());
            e.set_opt_attr("usage", secret.usage.as_ref());
            element.push(e);
        }
        if let Some(cipher) = &self.cipher {
            let mut e = Element::new("cipher")
                .with_attr("name", &cipher.name)
                .with_attr("size", cipher.size.to_string());
            e.set_opt_attr("mode", cipher.mode.as_ref());
            e.set_opt_attr("hash", cipher.hash.as_ref());
            element.push(e);
        }
        if let Some(vector) = &self.vector {
            let mut e = Element::new("ivgen").with_attr("name", &vector.name);
            e.set_opt_attr("hash", vector.hash.as_ref());
            element.push(e);
        }
        element
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        Volume::parse(text, Validation::Lenient)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_volume_is_printed_as_libvirt_prints_it() {
        let text = "<volume>
  <name>v&amp;2</name>
  <capacity unit='MiB'>10</capacity>
  <target>
    <format type='qcow2'/>
    <permissions><mode>0640</mode><owner>1</owner><group>-1</group></permissions>
    <encryption format='luks'><secret type='passphrase' usage='/x'/></encryption>
    <clusterSize unit='KiB'>128</clusterSize>
    <features><lazy_refcounts/></features>
  </target>
  <backingStore><path>/b</path><format type='raw'/></backingStore>
</volume>";
        let mut volume = Volume::parse(text, Validation::Strict).unwrap();
        volume.key = "/p/v&2".into();
        volume.path = "/p/v&2".into();
        volume.times = Some(Times {
            accessed: Time {
                seconds: 5,
                nanoseconds: 7,
            },
            ..Times::default()
        });
        let printed = "<volume type='file'>
  <name>v&amp;2</name>
  <key>/p/v&amp;2</key>
  <capacity unit='bytes'>10485760</capacity>
  <allocation unit='bytes'>0</allocation>
  <target>
    <path>/p/v&amp;2</path>
    <format type='qcow2'/>
    <permissions>
      <mode>0640</mode>
      <owner>1</owner>
    </permissions>
    <timestamps>
      <atime>5.000000007</atime>
      <mtime>0</mtime>
      <ctime>0</ctime>
      <btime>0</btime>
    </timestamps>
    <encryption format='luks'>
      <secret type='passphrase' usage='/x'/>
    </encryption>
    <compat>1.1</compat>
    <clusterSize unit='B'>131072</clusterSize>
    <features>
      <lazy_refcounts/>
    </features>
  </target>
  <backingStore>
    <path>/b</path>
    <format type='raw'/>
  </backingStore>
</volume>
";
        assert_eq!(volume.format(), printed);
        Volume::parse(printed, Validation::Strict).unwrap();
    }

    #[test]
    fn what_libvirt_refuses_is_refused_in_its_words() {
        assert_eq!(
            refused("<vol/>"),
            "XML error: expecting root element of 'volume', not 'vol'"
        );
        assert_eq!(
            refused("<volume/>"),
            "XML error: missing volume name element"
        );
        let with = |inner: &str| refused(&format!("<volume><name>v</name>{inner}</volume>"));
        assert_eq!(
            with("<capacity>x</capacity>"),
            "XML error: malformed capacity element"
        );
        assert_eq!(
            with("<capacity unit='foo'>1</capacity>"),
            "invalid argument: unknown suffix 'foo'"
        );
        assert_eq!(
            with("<capacity unit='EiB'>100</capacity>"),
            "numerical overflow: value too large: 100EiB"
        );
        assert_eq!(
            with("<target><format type='bogus'/></target>"),
            "unsupported configuration: unknown volume format type bogus"
        );
        assert_eq!(
            with("<target><encryption format='bogus'/></target>"),
            "unsupported configuration: unknown volume encryption format type bogus"
        );
        assert!(with("<target><compat>1</compat></target>").contains("'compat'"));
        assert!(
            with("<target><features><x/></features></target>").contains("unsupported feature x")
        );
        let strict = "<volume><name>v</name><bogus/></volume>";
        assert!(Volume::parse(strict, Validation::Lenient).is_ok());
        assert!(Volume::parse(strict, Validation::Strict).is_err());
    }
}
