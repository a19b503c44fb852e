//! Images with everything behind them, from open files and a description; and what an image
//! says it needs, for whoever opens the files.

use std::ffi::OsString;
use std::sync::Arc;

use crate::luks::{FilePart, Luks, Passphrase, Volume, read_header};
use crate::qcow2::{self, NoBacking};
use crate::{Error, File, Image, Qcow2, Raw};

/// The most images behind one another.
pub const DEPTH_MOST: usize = 200;

/// How an image is stored. Always stated by whoever uses it, never guessed from the content:
/// a guest can write any header it likes into a raw image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// The guest's bytes as they are.
    #[default]
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// LUKS version 1 over the bytes as they are.
    Luks,
}

impl Format {
    /// The format of that name, as libvirt and QEMU write it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            "luks" => Some(Self::Luks),
            _ => None,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Luks => "luks",
        }
    }
}

/// An image to be opened.
#[derive(Debug)]
pub struct ImageConfig {
    /// How it is stored.
    pub format: Format,
    /// Its file.
    pub file: File,
    /// Its external data file, if it has one.
    pub data_file: Option<File>,
    /// What is behind it, if it has a backing file.
    pub backing: Option<Box<ImageConfig>>,
    /// What its header names behind it is not looked at, and nothing is there: zeroes.
    pub alone: bool,
    /// Opens an encrypted image.
    pub passphrase: Option<Passphrase>,
    /// Not to be written to, even if its file could be. Backing images never are.
    pub read_only: bool,
    /// Bytes of L2 tables to keep in memory; 0 is [`qcow2::L2_CACHE`].
    pub l2_cache: usize,
}

impl ImageConfig {
    /// An image of which nothing but its file and format is to be said.
    #[must_use]
    pub fn new(format: Format, file: File) -> Self {
        Self {
            format,
            file,
            data_file: None,
            backing: None,
            alone: false,
            passphrase: None,
            read_only: false,
            l2_cache: 0,
        }
    }
}

/// Opens an image and everything behind it.
///
/// # Errors
/// As [`Qcow2::open`]; [`Error::Invalid`] for something behind a raw image, or too long a chain.
pub fn open(config: ImageConfig) -> Result<Arc<dyn Image>, Error> {
    let opened = open_all(config)?.into_iter().next();
    opened
        .map(|opened| opened.image)
        .ok_or_else(|| Error::Invalid("no image".into()))
}

/// An image of a chain that was opened.
#[derive(Debug, Clone)]
pub struct Opened {
    /// With everything behind it.
    pub image: Arc<dyn Image>,
    /// The same, where that is its format.
    pub qcow2: Option<Arc<Qcow2>>,
}

/// As [`open`]: every image of the chain, the first one first.
///
/// # Errors
/// As [`open`].
pub fn open_all(config: ImageConfig) -> Result<Vec<Opened>, Error> {
    // From the last image forward, so that a long chain needs no deep stack.
    let mut chain = vec![config];
    while let Some(next) = chain.last_mut().and_then(|image| image.backing.take()) {
        if chain.len() >= DEPTH_MOST {
            return Err(Error::Invalid(format!(
                "more than {DEPTH_MOST} images behind one another"
            )));
        }
        chain.push(*next);
    }
    let mut all: Vec<Opened> = Vec::new();
    while let Some(config) = chain.pop() {
        let below = all.last().map(|below| below.image.clone());
        all.push(open_one(config, below, chain.is_empty())?);
    }
    all.reverse();
    Ok(all)
}

fn open_one(
    config: ImageConfig,
    backing: Option<Arc<dyn Image>>,
    first: bool,
) -> Result<Opened, Error> {
    let name = config.file.name().to_owned();
    let other = |image: Arc<dyn Image>| Ok(Opened { image, qcow2: None });
    match config.format {
        Format::Raw | Format::Luks if backing.is_some() => Err(Error::Invalid(format!(
            "{name} is {}: nothing can be behind it",
            config.format.name()
        ))),
        Format::Raw => other(Arc::new(Raw::new(config.file)?)),
        Format::Luks => {
            let passphrase = needed(&name, config.passphrase.as_ref())?;
            let below = Arc::new(Raw::new(config.file)?);
            other(Arc::new(Luks::open(below, &name, passphrase.as_bytes())?))
        }
        Format::Qcow2 => {
            let read_only = config.read_only || !first;
            let header = qcow2::Header::read(&config.file)?;
            if backing.is_some() && header.backing.is_none() {
                return Err(Error::Invalid(format!(
                    "{name} has no backing file, but is given one"
                )));
            }
            let cipher = match header.encryption {
                qcow2::Encryption::None => None,
                qcow2::Encryption::Luks { offset, length } => {
                    let passphrase = needed(&name, config.passphrase.as_ref())?;
                    let place = FilePart {
                        file: &config.file,
                        start: offset,
                        len: length,
                    };
                    Some(Volume::open(&place, passphrase.as_bytes())?.cipher()?)
                }
            };
            let nothing = || config.alone.then(|| Arc::new(NoBacking) as Arc<dyn Image>);
            let backing = backing.or_else(|| nothing().filter(|_| header.backing.is_some()));
            let options = qcow2::Options {
                backing,
                data_file: config.data_file,
                cipher,
                l2_cache: config.l2_cache,
                read_only,
                snapshot: None,
            };
            let qcow2 = Arc::new(Qcow2::open(config.file, options)?);
            Ok(Opened {
                image: qcow2.clone(),
                qcow2: Some(qcow2),
            })
        }
    }
}

fn needed<'a>(name: &str, passphrase: Option<&'a Passphrase>) -> Result<&'a Passphrase, Error> {
    passphrase.ok_or_else(|| Error::Invalid(format!("{name} is encrypted: it needs a passphrase")))
}

/// What an image says of itself and of the files it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peek {
    /// Size the guest sees, bytes.
    pub size: u64,
    /// The backing file's name as the image has it (relative names are relative to the image's
    /// folder) and its format, if stated.
    pub backing: Option<(OsString, Option<String>)>,
    /// The external data file's name as the image has it; empty if it needs one but names none.
    pub data_file: Option<OsString>,
    /// A passphrase is needed.
    pub encrypted: bool,
}

/// Reads an image's header, and nothing else: a few megabytes at most, whatever is in it.
///
/// # Errors
/// As [`Qcow2::open`].
pub fn peek(file: &File, format: Format) -> Result<Peek, Error> {
    match format {
        Format::Raw => Ok(Peek {
            size: file.size()?,
            backing: None,
            data_file: None,
            encrypted: false,
        }),
        Format::Luks => {
            let len = file.size()?;
            let place = FilePart {
                file,
                start: 0,
                len,
            };
            Ok(Peek {
                size: len.saturating_sub(read_header(&place)?.payload),
                backing: None,
                data_file: None,
                encrypted: true,
            })
        }
        Format::Qcow2 => {
            let header = qcow2::Header::read(file)?;
            let data_file = header
                .has_data_file()
                .then(|| header.data_file.clone().unwrap_or_default());
            Ok(Peek {
                size: header.size,
                backing: header.backing.map(|name| (name, header.backing_format)),
                data_file,
                encrypted: header.encryption != qcow2::Encryption::None,
            })
        }
    }
}
