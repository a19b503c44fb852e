//! Opens an image by name, with everything behind it: for tools, which act for the user whose
//! files these are. (A VMM is handed its files, and is told every format.)

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::{DEPTH_MOST, Format};
use crate::lock::{self, Usage};
use crate::luks::{self, FilePart, Luks, Passphrase, Volume};
use crate::qcow2::{self, NoBacking};
use crate::{Error, File, Image, Qcow2, Raw};

/// When what is written to an image reaches stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stable {
    /// When it is flushed.
    #[default]
    Flushed,
    /// Before each write returns.
    Always,
    /// When the kernel likes.
    Never,
}

/// How an image is opened.
#[derive(Clone, Copy, Default)]
pub struct Opener<'a> {
    /// The first image's format; none to look at its content, as qemu-img does where the user
    /// doesn't say.
    pub format: Option<Format>,
    /// The first image is to be written.
    pub writable: bool,
    /// This one behind it is to be written too.
    pub also_writable: Option<&'a Path>,
    /// What is behind the first image is not opened, and reads as zeroes.
    pub no_backing: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// When what is written is on stable storage.
    pub stable: Stable,
    /// No lock: somebody else may be writing.
    pub share: bool,
    /// The content of this internal snapshot of the first image.
    pub snapshot: Option<&'a str>,
    /// What opens an encrypted image.
    pub passphrase: Option<&'a Passphrase>,
    /// An encrypted image without a passphrase can be opened, to be looked at; its content can't.
    pub metadata_only: bool,
}

impl std::fmt::Debug for Opener<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener")
            .field("format", &self.format)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

/// One of the images behind one another.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The file, as it was named and found.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// That was found by looking.
    pub probed: bool,
    /// The image, with everything behind it.
    pub image: Arc<dyn Image>,
    /// The same, if it is a qcow2 image.
    pub qcow2: Option<Arc<Qcow2>>,
    /// The same, if it is a raw image.
    pub raw: Option<Arc<Raw>>,
    /// The header of a LUKS image, or of an encrypted qcow2 image.
    pub luks: Option<luks::Header>,
    /// Where its external data file was found, if it has one.
    pub data_file: Option<PathBuf>,
    /// Where the name of its backing file leads to, if it has one.
    pub backing: Option<PathBuf>,
}

/// The format that the beginning of a file looks like: any that QEMU knows, by name; `raw` where
/// it looks like none.
#[must_use]
pub fn looks_like(start: &[u8]) -> &'static str {
    let at = |offset: usize, magic: &[u8]| {
        start
            .get(offset..offset + magic.len())
            .is_some_and(|there| there == magic)
    };
    if at(0, b"QFI\xfb") {
        // A version of the future is still no raw image.
        let version = start.get(4..8).and_then(|b| b.try_into().ok());
        return match version.map(u32::from_be_bytes) {
            Some(1) => "qcow",
            Some(2..) => "qcow2",
            Some(0) | None => "raw",
        };
    }
    let known: [(usize, &[u8], &'static str); 14] = [
        (0, b"LUKS\xba\xbe", "luks"),
        (0, b"QED\0", "qed"),
        (0, b"KDMV", "vmdk"),
        (0, b"COWD", "vmdk"),
        (0, b"# Disk DescriptorFile", "vmdk"),
        (0, b"vhdxfile", "vhdx"),
        (0, b"conectix", "vpc"),
        (0x40, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
        (0, b"WithoutFreeSpace", "parallels"),
        (0, b"WithouFreSpacExt", "parallels"),
        (0, b"Bochs Virtual HD Image", "bochs"),
        (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
        (0, b"koly", "dmg"),
        (0, b"OOOM", "cow"),
    ];
    known
        .iter()
        .find(|(offset, magic, _)| at(*offset, magic))
        .map_or("raw", |(_, _, name)| name)
}

/// The format that `file` looks like.
///
/// # Errors
/// The host's I/O; [`Error::Unsupported`], by name, for a format that is known but not ours.
pub fn probe(file: &File) -> Result<Format, Error> {
    let mut start = [0; 512];
    file.read_bytes(0, &mut start)?;
    let name = looks_like(&start);
    Format::from_name(name).ok_or_else(|| Error::Unsupported {
        image: file.name().to_owned(),
        reason: format!("it is a {name} image, a format that is not supported"),
    })
}

/// The file that a name means: a path, or `file:` and a path.
///
/// # Errors
/// [`Error::Unsupported`] for another protocol.
pub fn local_path(name: &OsStr) -> Result<PathBuf, Error> {
    let bytes = name.as_bytes();
    let protocol = bytes
        .iter()
        .position(|byte| matches!(byte, b':' | b'/'))
        .filter(|&at| bytes[at] == b':' && at > 0)
        .map(|at| &bytes[..at]);
    match protocol {
        None => Ok(PathBuf::from(name)),
        Some(b"file") => {
            let rest = &bytes[5..];
            let path = rest.strip_prefix(b"//").unwrap_or(rest);
            Ok(PathBuf::from(OsStr::from_bytes(path)))
        }
        Some(other) => Err(Error::Unsupported {
            image: name.to_string_lossy().into_owned(),
            reason: format!(
                "the protocol {:?} is not supported",
                String::from_utf8_lossy(other)
            ),
        }),
    }
}

/// Where a name in the header of the image at `of` leads to: names are relative to the image.
///
/// # Errors
/// As [`local_path`].
pub fn resolve(of: &Path, name: &OsStr) -> Result<PathBuf, Error> {
    let path = local_path(name)?;
    if path.is_absolute() {
        return Ok(path);
    }
    Ok(match of.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.join(path),
        _ => path,
    })
}

/// Opens a file as an [`Opener`] says.
///
/// # Errors
/// The system's.
pub fn open_file(path: &Path, writable: bool, direct: bool, stable: Stable) -> Result<File, Error> {
    let name = path.display().to_string();
    let sync = if stable == Stable::Always {
        libc::O_DSYNC
    } else {
        0
    };
    let flags = sync | if direct { libc::O_DIRECT } else { 0 };
    // Not to wait for anybody where the name is a pipe's; a regular file does not care.
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(flags | libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| Error::Io {
            what: format!("opening {name}"),
            source,
        })?;
    let file = File::new(file.into(), name)?;
    Ok(if stable == Stable::Never {
        file.volatile()
    } else {
        file
    })
}

struct Found {
    path: PathBuf,
    format: Format,
    probed: bool,
    file: File,
    data: Option<(PathBuf, File)>,
    backing: Option<PathBuf>,
}

impl Opener<'_> {
    /// Opens the image `name` and what is behind it: from the first to the last.
    ///
    /// # Errors
    /// As [`crate::chain::open`], and what the system says to names; [`Error::Locked`].
    pub fn open(&self, name: &OsStr) -> Result<Vec<Layer>, Error> {
        let mut found: Vec<Found> = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some((local_path(name)?, self.format));
        while let Some((path, format)) = next.take() {
            if found.len() >= DEPTH_MOST {
                return Err(Error::Invalid(format!(
                    "more than {DEPTH_MOST} images behind one another"
                )));
            }
            let first = found.is_empty();
            let (one, backing_format) = self.find(path, format, first)?;
            if let Ok(meta) = std::fs::metadata(&one.path)
                && !seen.insert((meta.dev(), meta.ino()))
            {
                return Err(Error::Invalid(format!(
                    "{} is behind itself",
                    one.path.display()
                )));
            }
            if let Some(backing) = one.backing.clone().filter(|_| !self.no_backing) {
                next = Some((backing, backing_format));
            }
            found.push(one);
        }
        let mut layers: Vec<Layer> = Vec::new();
        while let Some(one) = found.pop() {
            let below = layers.last().map(|layer| layer.image.clone());
            layers.push(self.build(one, below, found.is_empty())?);
        }
        layers.reverse();
        Ok(layers)
    }

    fn find(
        &self,
        path: PathBuf,
        format: Option<Format>,
        first: bool,
    ) -> Result<(Found, Option<Format>), Error> {
        let writable = if first {
            self.writable
        } else {
            self.also_writable
                .is_some_and(|other| same_file(other, &path))
        };
        let file = open_file(&path, writable, self.direct, self.stable)?;
        let probed = format.is_none();
        let format = match format {
            Some(format) => format,
            None => probe(&file)?,
        };
        if !self.share {
            let usage = match (writable, format) {
                (false, _) => Usage::READ,
                (true, Format::Raw) => Usage::WRITE_RAW,
                (true, _) => Usage::WRITE,
            };
            lock::change(file.fd(), file.name(), Usage::NONE, usage)?;
        }
        let mut found = Found {
            path,
            format,
            probed,
            file,
            data: None,
            backing: None,
        };
        let mut backing_format = None;
        if format == Format::Qcow2 {
            let header = qcow2::Header::read(&found.file)?;
            if header.has_data_file() {
                let name = header.data_file.as_deref().ok_or_else(|| {
                    Error::Invalid(format!(
                        "{} needs a data file, but names none",
                        found.path.display()
                    ))
                })?;
                let path = resolve(&found.path, name)?;
                let file = open_file(&path, writable, self.direct, self.stable)?;
                if !self.share {
                    let usage = if writable {
                        Usage::WRITE_RAW
                    } else {
                        Usage::READ
                    };
                    lock::change(file.fd(), file.name(), Usage::NONE, usage)?;
                }
                found.data = Some((path, file));
            }
            if let Some(name) = &header.backing {
                found.backing = Some(resolve(&found.path, name)?);
                if let Some(format) = &header.backing_format {
                    // A block device as QEMU may call it.
                    let plain = matches!(format.as_str(), "host_device" | "file");
                    let known = Format::from_name(if plain { "raw" } else { format });
                    backing_format = Some(known.ok_or_else(|| Error::Unsupported {
                        image: found.path.display().to_string(),
                        reason: format!("its backing file's format {format:?} is not supported"),
                    })?);
                }
            }
        }
        Ok((found, backing_format))
    }

    fn build(
        &self,
        one: Found,
        below: Option<Arc<dyn Image>>,
        first: bool,
    ) -> Result<Layer, Error> {
        let name = one.file.name().to_owned();
        let mut layer = Layer {
            path: one.path,
            format: one.format,
            probed: one.probed,
            image: Arc::new(NoBacking),
            qcow2: None,
            raw: None,
            luks: None,
            data_file: one.data.as_ref().map(|(path, _)| path.clone()),
            backing: one.backing,
        };
        let passphrase = || {
            self.passphrase.ok_or_else(|| {
                Error::Invalid(format!("{name} is encrypted: it needs a passphrase"))
            })
        };
        let snapshot = self.snapshot.filter(|_| first).map(str::to_owned);
        if snapshot.is_some() && one.format != Format::Qcow2 {
            return Err(Error::Invalid(format!(
                "{name} is {}: it has no snapshots",
                one.format.name()
            )));
        }
        match one.format {
            Format::Raw => {
                let raw = Arc::new(Raw::new(one.file)?);
                layer.raw = Some(raw.clone());
                layer.image = raw;
            }
            Format::Luks => {
                let len = one.file.size()?;
                let place = FilePart {
                    file: &one.file,
                    start: 0,
                    len,
                };
                let header = luks::read_header(&place)?;
                if self.metadata_only && self.passphrase.is_none() {
                    let size = len.saturating_sub(header.payload);
                    layer.image = Arc::new(Raw::part(one.file, header.payload, size)?);
                } else {
                    let raw: Arc<dyn Image> = Arc::new(Raw::new(one.file)?);
                    layer.image = Arc::new(Luks::open(raw, &name, passphrase()?.as_bytes())?);
                }
                layer.luks = Some(header);
            }
            Format::Qcow2 => {
                let header = qcow2::Header::read(&one.file)?;
                let mut cipher = None;
                let mut blind = false;
                if let qcow2::Encryption::Luks { offset, length } = header.encryption {
                    let place = FilePart {
                        file: &one.file,
                        start: offset,
                        len: length,
                    };
                    layer.luks = Some(luks::read_header(&place)?);
                    if self.metadata_only && self.passphrase.is_none() {
                        blind = true;
                    } else {
                        let volume = Volume::open(&place, passphrase()?.as_bytes())?;
                        cipher = Some(volume.cipher()?);
                    }
                }
                let writable = one.file.writable();
                let backing = match below {
                    Some(below) => Some(below),
                    None if header.backing.is_some() => Some(Arc::new(NoBacking) as Arc<dyn Image>),
                    None => None,
                };
                let options = qcow2::Options {
                    backing,
                    data_file: one.data.map(|(_, file)| file),
                    cipher: if blind { Some(Arc::new(Blind)) } else { cipher },
                    l2_cache: 0,
                    read_only: !writable,
                    snapshot,
                };
                let image = Arc::new(Qcow2::open(one.file, options)?);
                layer.qcow2 = Some(image.clone());
                layer.image = image;
            }
        }
        Ok(layer)
    }
}

/// For an encrypted image whose content nobody asks for.
#[derive(Debug)]
struct Blind;

impl crate::Cipher for Blind {
    fn decrypt(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn encrypt(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
}

/// Whether two names lead to one file.
#[must_use]
pub fn same_file(a: &Path, b: &Path) -> bool {
    match (std::fs::metadata(a), std::fs::metadata(b)) {
        (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
        _ => false,
    }
}
