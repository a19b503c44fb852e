//! `-o`: what a new image is to be like.

use std::ffi::OsString;
use std::time::Duration;

use images::chain::Format;
use images::luks::{self, FilePart, Hash, Mode, Spec, Vector, Volume};
use images::qcow2::{self, Compression, Encrypt, Preallocation};
use images::tree::Stable;
use images::{Error, tree};

use super::Failure;
use super::args::{pairs, size};
use super::open::{KNOWN, Secrets, message, new_file};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Switch,
    Number,
    Size,
}

struct Option_ {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    default: &'static str,
}

const fn option(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    help: &'static str,
) -> Option_ {
    Option_ {
        name,
        kind,
        help,
        default,
    }
}

/// In the order in which they are printed when an image is made.
const QCOW2: &[Option_] = &[
    option(
        "encrypt.format",
        Kind::Text,
        "",
        "Encrypt the image, format choices: 'luks'",
    ),
    option(
        "encrypt.key-secret",
        Kind::Text,
        "",
        "ID of secret providing LUKS passphrase",
    ),
    option(
        "encrypt.cipher-alg",
        Kind::Text,
        "",
        "Name of encryption cipher algorithm",
    ),
    option(
        "encrypt.cipher-mode",
        Kind::Text,
        "",
        "Name of encryption cipher mode",
    ),
    option(
        "encrypt.ivgen-alg",
        Kind::Text,
        "",
        "Name of IV generator algorithm",
    ),
    option(
        "encrypt.ivgen-hash-alg",
        Kind::Text,
        "",
        "Name of IV generator hash algorithm",
    ),
    option(
        "encrypt.hash-alg",
        Kind::Text,
        "",
        "Name of encryption hash algorithm",
    ),
    option(
        "encrypt.iter-time",
        Kind::Number,
        "",
        "Time to spend in PBKDF in milliseconds",
    ),
    option("cluster_size", Kind::Size, "65536", "qcow2 cluster size"),
    option("extended_l2", Kind::Switch, "off", "Extended L2 tables"),
    option(
        "preallocation",
        Kind::Text,
        "",
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    option(
        "compression_type",
        Kind::Text,
        "zlib",
        "Compression method used for image cluster compression",
    ),
    option("size", Kind::Size, "", "Virtual disk size"),
    option(
        "compat",
        Kind::Text,
        "",
        "Compatibility level (v2 [0.10] or v3 [1.1])",
    ),
    option("backing_file", Kind::Text, "", "File name of a base image"),
    option(
        "backing_fmt",
        Kind::Text,
        "",
        "Image format of the base image",
    ),
    option(
        "data_file",
        Kind::Text,
        "",
        "File name of an external data file",
    ),
    option(
        "data_file_raw",
        Kind::Switch,
        "",
        "The external data file must stay valid as a raw image",
    ),
    option(
        "lazy_refcounts",
        Kind::Switch,
        "off",
        "Postpone refcount updates",
    ),
    option(
        "refcount_bits",
        Kind::Number,
        "16",
        "Width of a reference count entry in bits",
    ),
];

const RAW: &[Option_] = &[
    option("size", Kind::Size, "", "Virtual disk size"),
    option(
        "preallocation",
        Kind::Text,
        "",
        "Preallocation mode (allowed values: off, falloc, full)",
    ),
];

const LUKS: &[Option_] = &[
    option("size", Kind::Size, "", "Virtual disk size"),
    option(
        "key-secret",
        Kind::Text,
        "",
        "ID of the secret that provides the keyslot passphrase",
    ),
    option(
        "cipher-alg",
        Kind::Text,
        "",
        "Name of encryption cipher algorithm",
    ),
    option(
        "cipher-mode",
        Kind::Text,
        "",
        "Name of encryption cipher mode",
    ),
    option(
        "ivgen-alg",
        Kind::Text,
        "",
        "Name of IV generator algorithm",
    ),
    option(
        "ivgen-hash-alg",
        Kind::Text,
        "",
        "Name of IV generator hash algorithm",
    ),
    option(
        "hash-alg",
        Kind::Text,
        "",
        "Name of encryption hash algorithm",
    ),
    option(
        "iter-time",
        Kind::Number,
        "",
        "Time to spend in PBKDF in milliseconds",
    ),
];

fn table(format: Format) -> &'static [Option_] {
    match format {
        Format::Raw => RAW,
        Format::Qcow2 => QCOW2,
        Format::Luks => LUKS,
    }
}

/// The text of `-o help`.
pub fn help(format: Format) -> String {
    let mut out = format!("Supported {} options:\n", format.name());
    let mut all: Vec<_> = table(format).iter().collect();
    all.sort_by_key(|one| one.name);
    for one in all {
        let kind = match one.kind {
            Kind::Text => "str",
            Kind::Switch => "bool (on/off)",
            Kind::Number => "num",
            Kind::Size => "size",
        };
        let left = format!("{}=<{kind}>", one.name);
        out.push_str(&format!("  {left:<22} - {}\n", one.help));
    }
    out
}

/// A format that was asked for by name, of an image to be made.
pub fn format(name: Option<&str>, image: &str) -> Result<Format, Failure> {
    let name = name.unwrap_or("raw");
    let before = if image.is_empty() {
        String::new()
    } else {
        format!("{image}: ")
    };
    Format::from_name(name).ok_or_else(|| {
        Failure::new(if KNOWN.contains(&name) {
            format!("{before}the format '{name}' is not supported")
        } else {
            format!("{before}Unknown file format '{name}'")
        })
    })
}

/// Options of a new image.
#[derive(Debug, Clone)]
pub struct Given {
    /// Its format.
    pub format: Format,
    values: Vec<(&'static str, String)>,
}

impl Given {
    /// None yet.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            values: Vec::new(),
        }
    }

    /// Adds what a list says. Messages begin with `image`.
    pub fn add(&mut self, list: &str, image: &str) -> Result<(), Failure> {
        let bad = |what: String| Failure::new(format!("{image}{what}"));
        if list.is_empty() || list.starts_with(',') || list.ends_with(',') && !list.ends_with(",,")
        {
            return Err(Failure::new(format!("Invalid option list: {list}")));
        }
        for (name, value) in pairs(list, None) {
            let Some(one) = table(self.format).iter().find(|one| one.name == name) else {
                return Err(bad(format!("Invalid parameter '{name}'")));
            };
            let value = match one.kind {
                Kind::Text => value,
                Kind::Switch => match value.as_str() {
                    "on" | "yes" | "true" | "y" => "on".into(),
                    "off" | "no" | "false" | "n" => "off".into(),
                    _ => {
                        return Err(bad(format!("Parameter '{name}' expects 'on' or 'off'")));
                    }
                },
                Kind::Number => value
                    .parse::<u64>()
                    .map_err(|_| bad(format!("Parameter '{name}' expects a number")))?
                    .to_string(),
                Kind::Size => size(&value)
                    .ok_or_else(|| {
                        bad(format!(
                            "Parameter '{name}' expects a non-negative number below 2^64\n\
                             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, \
                             peta-\nand exabytes, respectively."
                        ))
                    })?
                    .to_string(),
            };
            self.set(one.name, value);
        }
        Ok(())
    }

    /// Sets one, if the format has it.
    pub fn set(&mut self, name: &'static str, value: impl Into<String>) {
        self.values.retain(|(own, _)| *own != name);
        self.values.push((name, value.into()));
    }

    /// Whether the format has an option.
    pub fn knows(&self, name: &str) -> bool {
        table(self.format).iter().any(|one| one.name == name)
    }

    /// What was given.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values
            .iter()
            .find(|(own, _)| *own == name)
            .map(|(_, value)| value.as_str())
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.get(name).and_then(|value| value.parse().ok())
    }

    fn on(&self, name: &str) -> bool {
        self.get(name) == Some("on")
    }

    /// The line that says what is made.
    pub fn line(&self, image: &str) -> String {
        let mut out = format!("Formatting '{image}', fmt={}", self.format.name());
        for one in table(self.format) {
            let value = self.get(one.name).unwrap_or(one.default);
            if !value.is_empty() {
                out.push_str(&format!(" {}={}", one.name, value.replace(',', ",,")));
            }
        }
        out.push('\n');
        out
    }

    /// The size that was given.
    pub fn size(&self) -> Option<u64> {
        self.number("size")
    }

    /// `preallocation`.
    pub fn preallocation(&self) -> Result<Preallocation, String> {
        let known = match self.get("preallocation") {
            None | Some("off" | "") => Some(Preallocation::Off),
            Some("metadata") if self.format == Format::Qcow2 => Some(Preallocation::Metadata),
            Some("falloc") => Some(Preallocation::Falloc),
            Some("full") => Some(Preallocation::Full),
            Some(_) => None,
        };
        known.ok_or_else(|| {
            format!(
                "Parameter 'preallocation' does not accept value '{}'",
                self.get("preallocation").unwrap_or_default()
            )
        })
    }

    fn spec(&self, prefix: &str) -> Result<Spec, String> {
        let get = |name: &str| self.get(&format!("{prefix}{name}"));
        let unknown = |name: &str, value: &str| {
            format!("Parameter '{prefix}{name}' does not accept value '{value}'")
        };
        let mode = match get("cipher-mode") {
            None | Some("xts") => Mode::Xts,
            Some("cbc") => Mode::Cbc,
            Some(other) => return Err(unknown("cipher-mode", other)),
        };
        let key = match get("cipher-alg") {
            None | Some("aes-256") => 32,
            Some("aes-192") => 24,
            Some("aes-128") => 16,
            Some(other) => return Err(unknown("cipher-alg", other)),
        };
        let hash = match get("hash-alg") {
            None | Some("sha256") => Hash::Sha256,
            Some("sha1") => Hash::Sha1,
            Some("sha512") => Hash::Sha512,
            Some(other) => return Err(unknown("hash-alg", other)),
        };
        let vector = match (get("ivgen-alg"), get("ivgen-hash-alg")) {
            (None | Some("plain64"), _) => Vector::Plain64,
            (Some("plain"), _) => Vector::Plain,
            (Some("essiv"), None | Some("sha256")) => Vector::EssivSha256,
            (Some("essiv"), Some(other)) => return Err(unknown("ivgen-hash-alg", other)),
            (Some(other), _) => return Err(unknown("ivgen-alg", other)),
        };
        Ok(Spec {
            mode,
            vector,
            hash,
            key_bytes: if mode == Mode::Xts { key * 2 } else { key },
        })
    }

    fn time(&self, name: &str) -> Duration {
        Duration::from_millis(self.number(name).unwrap_or(2000).min(600_000))
    }

    /// The description of a qcow2 image of `size` bytes.
    pub fn qcow2(&self, size: u64, secrets: Option<&Secrets>) -> Result<qcow2::Create, String> {
        let mut create = qcow2::Create::new(size);
        create.version = match self.get("compat") {
            None | Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(other) => {
                return Err(format!(
                    "Parameter 'version' does not accept value '{other}'"
                ));
            }
        };
        create.cluster_size = self.number("cluster_size").unwrap_or(65536);
        if !create.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&create.cluster_size)
        {
            return Err("Cluster size must be a power of two between 512 and 2048k".into());
        }
        let bits = self.number("refcount_bits").unwrap_or(16);
        if !bits.is_power_of_two() || bits > 64 {
            return Err("Refcount width must be a power of two and may not exceed 64 bits".into());
        }
        create.refcount_bits = bits as u32;
        create.extended_l2 = self.on("extended_l2");
        create.lazy_refcounts = self.on("lazy_refcounts");
        create.preallocation = self.preallocation()?;
        create.compression = match self.get("compression_type") {
            None | Some("zlib") => Compression::Zlib,
            Some("zstd") => Compression::Zstd,
            Some(other) => {
                return Err(format!(
                    "Parameter 'compression-type' does not accept value '{other}'"
                ));
            }
        };
        create.data_file = self.get("data_file").map(OsString::from);
        create.data_file_raw = self.on("data_file_raw");
        create.backing = match (self.get("backing_file"), self.get("backing_fmt")) {
            (Some(name), Some(format)) => Some((name.into(), format.into())),
            _ => None,
        };
        if create.version < 3 {
            let only = |what: &str| {
                Err(format!(
                    "{what} only supported with compatibility level 1.1 and above (use version=v3 \
                     or greater)"
                ))
            };
            if create.lazy_refcounts {
                return only("Lazy refcounts");
            }
            if create.data_file.is_some() {
                return only("External data files are");
            }
            if create.extended_l2 {
                return only("Extended L2 entries are");
            }
            if create.compression != Compression::Zlib {
                return only("Non-zlib compression type is");
            }
            if bits != 16 {
                return Err(
                    "Different refcount widths than 16 bits require compatibility level 1.1 or \
                     above (use version=v3 or greater)"
                        .into(),
                );
            }
        }
        if create.extended_l2 && create.cluster_size < 16 << 10 {
            return Err(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
                    .into(),
            );
        }
        if create.backing.is_some()
            && create.preallocation != Preallocation::Off
            && !create.extended_l2
        {
            return Err(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on"
                    .into(),
            );
        }
        match self.get("encrypt.format") {
            None => {}
            Some("luks") => {
                let spec = self.spec("encrypt.")?;
                let id = self.get("encrypt.key-secret");
                let passphrase = match (secrets, id) {
                    (Some(secrets), Some(id)) => secrets.get(id).map_err(words)?.clone(),
                    (None, _) => Vec::new().into(),
                    (Some(_), None) => {
                        return Err("Parameter 'encrypt.key-secret' is required for cipher".into());
                    }
                };
                create.encryption = Some(Encrypt {
                    spec,
                    passphrase,
                    time: self.time("encrypt.iter-time"),
                });
            }
            Some(other) => {
                return Err(format!(
                    "Parameter 'encrypt.format' does not accept value '{other}'"
                ));
            }
        }
        Ok(create)
    }

    /// The cipher of a LUKS image.
    pub fn luks(&self) -> Result<Spec, String> {
        self.spec("")
    }

    /// Makes the image.
    pub fn create(
        &self,
        name: &std::ffi::OsStr,
        secrets: &Secrets,
        stable: Stable,
    ) -> Result<(), String> {
        let path = tree::local_path(name).map_err(|error| message(&error))?;
        let new_file = |path| {
            new_file(path).map(|file| match stable {
                Stable::Never => file.volatile(),
                _ => file,
            })
        };
        let size = self.size().unwrap_or(0);
        let size = size
            .checked_next_multiple_of(512)
            .ok_or("the image size is too large")?;
        let said = |error: Error| match error {
            Error::Invalid(what) => what
                .strip_prefix(&format!("{}: ", path.display()))
                .unwrap_or(&what)
                .to_owned(),
            other => message(&other),
        };
        let preallocation = self.preallocation()?;
        match self.format {
            Format::Raw => {
                // A raw image may have any size.
                let size = self.size().unwrap_or(0);
                let file = new_file(&path).map_err(words)?;
                let image = images::Raw::new(file).map_err(said)?;
                match preallocation {
                    Preallocation::Off | Preallocation::Metadata => {
                        images::Image::resize(&image, size).map_err(said)
                    }
                    how => image.grow(size, how == Preallocation::Full).map_err(said),
                }
            }
            Format::Luks => {
                let spec = self.spec("")?;
                let id = self
                    .get("key-secret")
                    .ok_or("Parameter 'key-secret' is required for cipher")?;
                let secret = secrets.get(id).map_err(words)?;
                let header = luks::header_len(&spec).map_err(said)?;
                let file = new_file(&path).map_err(words)?;
                if !file.is_block_device() {
                    file.set_len(header + size).map_err(said)?;
                }
                let place = FilePart {
                    file: &file,
                    start: 0,
                    len: header,
                };
                Volume::create(&place, spec, secret.as_bytes(), self.time("iter-time"))
                    .map_err(said)?;
                Ok(())
            }
            Format::Qcow2 => {
                let create = self.qcow2(size, Some(secrets))?;
                // Nothing is made, or emptied, for what can't be.
                create.check()?;
                let file = new_file(&path).map_err(words)?;
                let data = match &create.data_file {
                    Some(name) => {
                        let path = tree::local_path(name).map_err(said)?;
                        Some(new_file(&path).map_err(words)?)
                    }
                    None => None,
                };
                qcow2::create(file, data, &create).map_err(said)
            }
        }
    }
}

/// What a failure says.
pub fn words(failure: Failure) -> String {
    match failure {
        Failure::Failed(what, _) | Failure::Usage { what, .. } => what,
    }
}
