//! Changing what an image's header says: its version, how refcounts are kept.

use std::ffi::OsString;

use super::check::recount;
use super::entry::{Entry, State};
use super::header::{self, Header};
use super::{Geometry, Qcow2};
use crate::{Error, File, Image, Job};

/// What is to change; what is none stays.
#[derive(Debug, Clone, Default)]
pub struct Amend {
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`). Version 2 has no zero clusters: see
    /// [`Qcow2::expand_zeroes`].
    pub version: Option<u32>,
    /// Writers may leave refcounts for later.
    pub lazy_refcounts: Option<bool>,
    /// A power of two from 1 to 64.
    pub refcount_bits: Option<u32>,
    /// The external data file's name, if there is one.
    pub data_file: Option<OsString>,
    /// The data file by itself is to be a raw image.
    pub data_file_raw: Option<bool>,
}

/// Changes the header of the image in `file`, which nobody has open. What is to be written is
/// written at once: the header is the old or the new one, whatever happens (short of a disk that
/// breaks a write in the middle of a sector).
///
/// # Errors
/// [`Error::Invalid`] for what contradicts itself, the host's I/O.
pub fn amend(file: &File, change: &Amend) -> Result<(), Error> {
    let invalid = |reason: &str| Err(Error::Invalid(reason.to_owned()));
    let mut header = Header::read(file)?;
    if header.incompatible & (header::DIRTY | header::CORRUPT) != 0 {
        return Err(Error::Invalid(format!(
            "{} must be repaired first",
            file.name()
        )));
    }
    let version = change.version.unwrap_or(header.version);
    if version > header.version {
        header.version = version;
    }
    if let Some(bits) = change.refcount_bits {
        if !bits.is_power_of_two() || bits > 64 {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if bits != 1 << header.refcount_order {
            if version < 3 {
                return invalid(
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                     (use compat=1.1 or greater)",
                );
            }
            header.write(file)?;
            recount(file, bits.trailing_zeros())?;
            header = Header::read(file)?;
        }
    }
    match change.lazy_refcounts {
        Some(true) if version < 3 => {
            return invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use \
                 compat=1.1 or greater)",
            );
        }
        Some(true) => header.compatible |= header::LAZY_REFCOUNTS,
        Some(false) => header.compatible &= !header::LAZY_REFCOUNTS,
        None => {}
    }
    if let Some(name) = &change.data_file {
        if !header.has_data_file() {
            return invalid("data-file can only be set for images that use an external data file");
        }
        header.data_file = Some(name.clone());
    }
    match change.data_file_raw {
        Some(true) if header.autoclear & header::DATA_FILE_RAW == 0 => {
            return invalid("data-file-raw cannot be set on existing images");
        }
        Some(false) => header.autoclear &= !header::DATA_FILE_RAW,
        _ => {}
    }
    if version < header.version {
        if header.refcount_order != 4 {
            return invalid("compat=0.10 requires refcount_bits=16");
        }
        if header.incompatible & (header::DATA_FILE | header::EXTENDED_L2 | header::COMPRESSION)
            != 0
        {
            return invalid(
                "Cannot downgrade an image with an external data file, extended L2 entries or \
                 another compression than zlib",
            );
        }
        header.version = version;
        header.incompatible = 0;
        header.compatible = 0;
        header.autoclear = 0;
    }
    header.write(file)
}

impl Header {
    fn write(&self, file: &File) -> Result<(), Error> {
        let data = self
            .to_bytes()
            .map_err(|reason| Error::Invalid(format!("{}: {reason}", file.name())))?;
        file.sync()?;
        file.write_bytes(0, &data)?;
        file.sync()
    }
}

impl Qcow2 {
    /// Writes zeroes plainly where the tables say that there are zeroes: version 2 can't say so.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are internal snapshots, [`Error::Cancelled`], the host's I/O.
    pub fn expand_zeroes(&self, job: &Job) -> Result<(), Error> {
        let geo: Geometry = self.geo;
        if self.meta().header.snapshots > 0 {
            return Err(Error::Invalid(
                "zero clusters of internal snapshots can't be written plainly".into(),
            ));
        }
        let below = self.backing().map_or(0, |backing| backing.size());
        job.more(self.size());
        let (mut guest, clusters) = (0, self.size().div_ceil(geo.cluster()));
        while guest < clusters {
            let mut meta = self.changing()?;
            let mut found = None;
            let looked = meta.entries(guest, clusters - guest, |at, entry| {
                found = (entry.state(&geo, 0) == State::Zero).then_some((at, entry));
                found.is_none()
            })?;
            let next = guest + looked;
            if let Some((at, old)) = found {
                let start = at << geo.cluster_bits;
                if old.host(&geo).is_none() && start >= below {
                    let mark = self.grace.mark();
                    meta.own_table(at, mark)?;
                    meta.set_entry(at, Entry::default())?;
                } else {
                    drop(meta);
                    self.write_zeroes_plainly(start, start + geo.cluster())?;
                }
            }
            job.advance((next - guest) << geo.cluster_bits, 0)?;
            guest = next;
        }
        self.flush()
    }

    /// The image has no content of its own any more: all is the backing file's. The file shrinks.
    ///
    /// # Errors
    /// The host's I/O.
    pub fn empty(&self) -> Result<(), Error> {
        self.check_writable()?;
        if self.geo.raw {
            return Err(Error::Invalid(
                "an image whose data file is a raw image has all of its content".into(),
            ));
        }
        self.drop_from(0)?;
        self.flush()?;
        let mut meta = self.meta();
        meta.give_back()?;
        meta.write_all()?;
        meta.cut_end()
    }
}

impl Qcow2 {
    /// The header names another backing file from now on. As long as the image is open, what is
    /// behind it stays what it was.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name does not fit, the host's I/O.
    pub fn set_backing(&self, backing: Option<(OsString, Option<String>)>) -> Result<(), Error> {
        self.flush()?;
        let mut meta = self.changing()?;
        let before = meta.header.clone();
        meta.header.backing = backing.as_ref().map(|(name, _)| name.clone());
        meta.header.backing_format = backing.and_then(|(_, format)| format);
        let done = meta.write_header();
        if done.is_err() {
            meta.header = before;
        }
        done
    }
}
