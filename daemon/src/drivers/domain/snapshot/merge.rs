//! What is done inside images: internal snapshots, and merging an image into the one behind it.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use images::lock::{self, Usage};
use images::qcow2::{self, Header, NoBacking};
use images::{File, Image, IoBuf, Qcow2, Raw};

use crate::error::{Error, Result};
use crate::killpoint::killpoint;

/// Copied at once, bytes.
const PIECE: usize = 1 << 20;

/// What is done with an internal snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Internal {
    /// Made of the present content, at that time: seconds since 1970.
    Create(u32),
    /// The content becomes its again.
    Apply,
    /// Forgotten, where it is there.
    Delete,
}

/// Makes, applies or deletes the internal snapshot `name` in all of these images, which nobody else
/// uses.
///
/// # Errors
/// An image's. What was made before is undone; nothing is applied where one of them has no such
/// snapshot.
pub fn internal(images: &[PathBuf], name: &str, what: Internal) -> Result<()> {
    let mut all = Vec::new();
    for path in images {
        let image = alone(path)?;
        let there = image.snapshots().map_err(|e| failed(path, e))?;
        let id = there.into_iter().find(|one| one.name == name).map(|o| o.id);
        match (what, &id) {
            (Internal::Create(_), Some(_)) => {
                return Err(failed(path, format!("it has a snapshot '{name}' already")));
            }
            (Internal::Apply, None) => {
                return Err(failed(path, format!("it has no snapshot '{name}'")));
            }
            _ => all.push((path, image, id)),
        }
    }
    let mut made: Vec<(&Qcow2, String)> = Vec::new();
    for (path, image, id) in &all {
        let done = match (what, id) {
            (Internal::Create(when), _) => image
                .snapshot_create(name, (when, 0))
                .map(|new| made.push((image, new.id))),
            // By its id: another one's may be this name.
            (Internal::Apply, Some(id)) => image.snapshot_apply(id),
            (Internal::Delete, Some(id)) => image.snapshot_delete(id),
            (_, None) => Ok(()),
        };
        killpoint("snapshot.inside");
        if let Err(error) = done {
            for (image, id) in made {
                if let Err(error) = image.snapshot_delete(&id) {
                    log::error!("undoing a snapshot: {error}");
                }
            }
            return Err(failed(path, error));
        }
    }
    Ok(())
}

/// None of these images has a snapshot of that name. Their guest may be running.
///
/// # Errors
/// One has; an image's.
pub fn not_taken(images: &[PathBuf], name: &str) -> Result<()> {
    for path in images {
        let image = by_itself(path, open(path, false, false)?)?;
        let there = image.snapshots().map_err(|e| failed(path, e))?;
        if there.iter().any(|one| one.name == name) {
            return Err(failed(path, format!("it has a snapshot '{name}' already")));
        }
    }
    Ok(())
}

/// The snapshots inside a qcow2 image. Its guest may be running.
///
/// # Errors
/// The image's.
pub fn inside(path: &Path) -> Result<Vec<String>> {
    let image = by_itself(path, open(path, false, false)?)?;
    let there = image.snapshots().map_err(|e| failed(path, e))?;
    Ok(there.into_iter().map(|one| one.name).collect())
}

/// An image by itself, to be written; what is behind it is not looked at.
fn alone(path: &Path) -> Result<Qcow2> {
    by_itself(path, open(path, true, true)?)
}

fn by_itself(path: &Path, file: File) -> Result<Qcow2> {
    let header = Header::read(&file).map_err(|e| failed(path, e))?;
    let backing: Option<Arc<dyn Image>> = match header.backing {
        Some(_) => Some(Arc::new(NoBacking)),
        None => None,
    };
    let options = qcow2::Options {
        backing,
        ..qcow2::Options::default()
    };
    Qcow2::open(file, options).map_err(|e| failed(path, e))
}

fn failed(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::failed(format!("'{}': {error}", path.display()))
}

/// Opens a file; with a lock, one that nobody else writes.
fn open(path: &Path, writable: bool, locked: bool) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .open(path)
        .map_err(|e| Error::system(format!("cannot open '{}'", path.display()), &e))?;
    let name = path.display().to_string();
    let file = File::new(file.into(), &name).map_err(|e| failed(path, e))?;
    if locked {
        let usage = if writable { Usage::WRITE } else { Usage::READ };
        lock::change(file.fd(), &name, Usage::NONE, usage).map_err(|e| failed(path, e))?;
    }
    Ok(file)
}

/// The image at `path`, with what is behind it. Only the first is ever written, and locked.
fn chain(path: &Path, format: &str, writable: bool, depth: usize) -> Result<Arc<dyn Image>> {
    if depth > images::chain::DEPTH_MOST {
        return Err(failed(path, "too many images behind one another"));
    }
    let file = open(path, writable, depth == 0)?;
    match format {
        "raw" => Ok(Arc::new(Raw::new(file).map_err(|e| failed(path, e))?)),
        "qcow2" => {
            let header = Header::read(&file).map_err(|e| failed(path, e))?;
            let backing = match header.backing {
                None => None,
                Some(backing) => {
                    let behind = path.parent().unwrap_or(Path::new("/")).join(&backing);
                    let format = header
                        .backing_format
                        .ok_or_else(|| failed(path, "it does not say its backing file's format"))?;
                    Some(chain(&behind, &format, false, depth + 1)?)
                }
            };
            let options = qcow2::Options {
                backing,
                data_file: None,
                cipher: None,
                l2_cache: 0,
                read_only: !writable,
                snapshot: None,
            };
            Ok(Arc::new(
                Qcow2::open(file, options).map_err(|e| failed(path, e))?,
            ))
        }
        other => Err(failed(
            path,
            format!("an image of format {other} can't be merged"),
        )),
    }
}

/// A buffer for one request that is over when the call returns.
fn whole(piece: &mut [u8]) -> IoBuf {
    // SAFETY: an image's `read` and `write` are done with a buffer when they return, and the slice
    // lives longer than that.
    unsafe { IoBuf::new(piece.as_mut_ptr(), piece.len()) }
}

/// An image that is to go, and the one behind it that it goes into; both locked.
pub struct Pair {
    overlay: PathBuf,
    base: PathBuf,
    from: Arc<dyn Image>,
    into: Arc<dyn Image>,
}

impl Pair {
    /// Opens them.
    ///
    /// # Errors
    /// One of them is not there, damaged, or in use.
    pub fn open(overlay: &Path, base: &Path, format: &str) -> Result<Self> {
        Ok(Self {
            overlay: overlay.to_owned(),
            base: base.to_owned(),
            from: chain(overlay, "qcow2", false, 0)?,
            // The same file once more, to be written. What is copied is what the overlay itself decides,
            // so nothing is read from what is being written.
            into: chain(base, format, true, 0)?,
        })
    }

    /// Writes what the one has of its own into the other. If it does not come to its end nothing is lost: the
    /// overlay reads as before all the time.
    ///
    /// # Errors
    /// An image's.
    pub fn commit(self) -> Result<()> {
        let from_failed = |e| failed(&self.overlay, e);
        let into_failed = |e| failed(&self.base, e);
        let (from, into) = (&self.from, &self.into);
        if into.size() < from.size() {
            into.resize(from.size()).map_err(into_failed)?;
        }
        let size = from.size();
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        while at < size {
            let extent = from
                .extent(at, (size - at).min(PIECE as u64))
                .map_err(from_failed)?;
            let len = extent.len.clamp(1, size - at);
            // Past the end of a shorter base nothing is there, and reads as zeroes.
            if extent.depth == 0 {
                if extent.zero {
                    into.write_zeroes(at, len, true).map_err(into_failed)?;
                } else {
                    let piece = &mut buffer[..len as usize];
                    from.read(at, &[whole(piece)]).map_err(from_failed)?;
                    into.write(at, &[whole(piece)]).map_err(into_failed)?;
                }
            }
            at += len;
        }
        into.flush().map_err(into_failed)
    }
}

/// Has `image` name `base` as what is right behind it, which its chain has by now.
///
/// # Errors
/// The image's.
pub fn rebase(image: &Path, base: &Path, format: &str) -> Result<()> {
    let name = base.as_os_str().to_owned();
    alone(image)?
        .set_backing(Some((name, Some(format.to_owned()))))
        .map_err(|e| failed(image, e))
}
