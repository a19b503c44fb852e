//! The content of one volume into another.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use images::chain::{self, Format, ImageConfig};
use images::luks::Passphrase;
use images::{File, Image, IoBuf};
use xml_schemas::volume::Volume;

use super::create::Plan;
use super::volume::stored_as;
use super::{error, folder, image_error, system};
use crate::error::{ErrorCode, Result};

/// Bytes copied at a time.
const PIECE: usize = 2 << 20;

/// What is copied from.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) volume: Volume,
    pub(super) passphrase: Option<Passphrase>,
}

impl Source {
    /// Its file has its content as it is.
    pub(super) fn is_raw(&self) -> bool {
        matches!(stored_as(&self.volume), Ok(Format::Raw))
    }

    /// Its file could be the other's.
    pub(super) fn is_same_format(&self, other: &Volume) -> bool {
        self.volume.format == other.format && other.backing == self.volume.backing
    }

    /// What is behind it is behind the other.
    pub(super) fn has_same_backing(&self, other: &Volume) -> bool {
        match (&self.volume.backing, &other.backing) {
            (Some(own), Some(others)) => own.path == others.path,
            _ => false,
        }
    }

    fn file(&self) -> Result<File> {
        open_file(Path::new(&self.volume.path))
    }

    fn open(&self) -> Result<Arc<dyn Image>> {
        let mut config = ImageConfig::new(stored_as(&self.volume)?, self.file()?);
        config.passphrase = self.passphrase.clone();
        config.read_only = true;
        add_backing(&mut config)?;
        chain::open(config).map_err(image_error)
    }
}

fn open_file(path: &Path) -> Result<File> {
    let name = path.to_string_lossy();
    let file = folder::open(&name, false)
        .map_err(|e| system(format!("cannot open volume '{name}'"), &e))?;
    File::new(file.into(), name).map_err(image_error)
}

/// The same file once more.
pub(super) fn duplicate(file: &File) -> Result<File> {
    let copy = file
        .fd()
        .try_clone_to_owned()
        .map_err(|e| system(format!("cannot use '{}'", file.name()), &e))?;
    File::new(copy, file.name()).map_err(image_error)
}

/// Opens everything behind an image that its headers name, with the formats that they state.
pub(super) fn add_backing(config: &mut ImageConfig) -> Result<()> {
    let mut depth = 0;
    let mut current = config;
    loop {
        let peek = chain::peek(&current.file, current.format).map_err(image_error)?;
        let here = PathBuf::from(current.file.name());
        if let Some(name) = &peek.data_file {
            current.data_file = Some(open_file(&beside(&here, name)?)?);
        }
        let Some((name, format)) = peek.backing else {
            return Ok(());
        };
        depth += 1;
        if depth >= chain::DEPTH_MOST {
            return Err(error(
                ErrorCode::OPERATION_FAILED,
                format!(
                    "backing store for '{}' is self-referential or too long",
                    here.display()
                ),
            ));
        }
        let path = beside(&here, &name)?;
        let Some(format) = format else {
            return Err(error(
                ErrorCode::OPERATION_INVALID,
                format!(
                    "format of backing image '{}' of image '{}' was not specified in the image \
                     metadata",
                    path.display(),
                    here.display()
                ),
            ));
        };
        let Some(format) = Format::from_name(&format) else {
            return Err(error(
                ErrorCode::CONFIG_UNSUPPORTED,
                format!("backing image '{}' has format '{format}'", path.display()),
            ));
        };
        let next = current
            .backing
            .insert(Box::new(ImageConfig::new(format, open_file(&path)?)));
        current = next;
    }
}

fn beside(image: &Path, name: &OsStr) -> Result<PathBuf> {
    let bytes = name.as_bytes();
    let bytes = bytes.strip_prefix(b"file:").unwrap_or(bytes);
    let first = bytes.split(|&b| b == b'/').next().unwrap_or_default();
    if bytes.is_empty() || first.contains(&b':') {
        return Err(error(
            ErrorCode::CONFIG_UNSUPPORTED,
            format!(
                "image '{}' names '{}', and only files can be behind an image",
                image.display(),
                name.to_string_lossy()
            ),
        ));
    }
    let folder = image.parent().unwrap_or(Path::new("/"));
    Ok(folder.join(OsStr::from_bytes(bytes)))
}

/// Shares the blocks of the whole file, where the file system can.
pub(super) fn reflink(source: &Source, to: &File) -> Result<()> {
    /// FICLONE
    const CLONE: libc::c_ulong = 0x4004_9409;
    let from = source.file()?;
    // SAFETY: FICLONE takes a descriptor by value and touches no memory.
    let cloned = unsafe { libc::ioctl(to.fd().as_raw_fd(), CLONE, from.fd().as_raw_fd()) };
    if cloned != 0 {
        return Err(system(
            format!("failed to clone files from '{}'", from.name()),
            &io::Error::last_os_error(),
        ));
    }
    Ok(())
}

/// A buffer for one piece.
struct Piece(Vec<u8>);

impl Piece {
    fn new() -> Self {
        Self(vec![0; PIECE])
    }

    fn read(&mut self, image: &dyn Image, offset: u64, len: usize) -> Result<&mut [u8]> {
        let piece = &mut self.0[..len];
        // SAFETY: the memory is exclusively ours until the call, which is synchronous, returns.
        let buffer = unsafe { IoBuf::new(piece.as_mut_ptr(), len) };
        image.read(offset, &[buffer]).map_err(image_error)?;
        Ok(piece)
    }
}

fn write(image: &dyn Image, offset: u64, data: &mut [u8]) -> Result<()> {
    // SAFETY: as above; it is only read from.
    let buffer = unsafe { IoBuf::new(data.as_mut_ptr(), data.len()) };
    image.write(offset, &[buffer]).map_err(image_error)
}

/// Walks through what has content, piece by piece. `only_top` leaves out what is behind.
fn walk(
    from: &dyn Image,
    len: u64,
    only_top: bool,
    mut found: impl FnMut(u64, u64, bool) -> Result<()>,
) -> Result<()> {
    let len = len.min(from.size());
    let mut at = 0;
    while at < len {
        let extent = from.extent(at, len - at).map_err(image_error)?;
        if extent.len == 0 {
            return Err(error(
                ErrorCode::INTERNAL_ERROR,
                "an image does not say where its content is",
            ));
        }
        let own = extent.present && extent.depth == 0;
        if !only_top || own {
            found(at, extent.len, extent.zero)?;
        }
        at += extent.len;
    }
    Ok(())
}

fn pieces(start: u64, len: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = start + len;
    (0..len.div_ceil(PIECE as u64)).map(move |n| {
        let at = start + n * PIECE as u64;
        let count = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
        (at, count)
    })
}

/// Into an image that reads as zeroes where nothing is written. With `only_top` both have the
/// same image behind them, and what comes from there is not copied.
pub(super) fn into_image(source: &Source, to: &dyn Image, only_top: bool) -> Result<()> {
    let from = source.open()?;
    let mut piece = Piece::new();
    walk(&*from, to.size(), only_top, |start, len, zero| {
        if zero {
            // Behind a new image there may be something that must not show through.
            if only_top {
                to.write_zeroes(start, len, true).map_err(image_error)?;
            }
            return Ok(());
        }
        for (at, count) in pieces(start, len) {
            let data = piece.read(&*from, at, count)?;
            if only_top || data.iter().any(|byte| *byte != 0) {
                write(to, at, data)?;
            }
        }
        Ok(())
    })
}

/// Into an image with something behind it that has nothing to do with the source: all of it.
pub(super) fn into_image_with_backing(source: &Source, to: &dyn Image) -> Result<()> {
    let from = source.open()?;
    let mut piece = Piece::new();
    walk(&*from, to.size(), false, |start, len, zero| {
        if zero {
            return to.write_zeroes(start, len, true).map_err(image_error);
        }
        for (at, count) in pieces(start, len) {
            let data = piece.read(&*from, at, count)?;
            write(to, at, data)?;
        }
        Ok(())
    })?;
    let end = from.size();
    if to.size() > end {
        to.write_zeroes(end, to.size() - end, true)
            .map_err(image_error)?;
    }
    Ok(())
}

/// Into a raw file of the right length, which is all holes.
pub(super) fn into_raw(source: &Source, to: &File, plan: &Plan) -> Result<()> {
    let from = source.open()?;
    let mut piece = Piece::new();
    let len = plan.volume.capacity.unwrap_or(0);
    walk(&*from, len, false, |start, len, zero| {
        if zero {
            return Ok(());
        }
        for (at, count) in pieces(start, len) {
            let data = piece.read(&*from, at, count)?;
            if data.iter().any(|byte| *byte != 0) {
                to.write_bytes(at, data).map_err(image_error)?;
            }
        }
        Ok(())
    })
}
