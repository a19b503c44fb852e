//! Saved images as files: made beside their place, looked into, changed, used up.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vmm_api::saved::{Image, SavedError};

use crate::error::{Error, ErrorCode, Result};
use crate::files::{self, NewFile};

/// A file that will be `path` when it is whole. Goes with its drop unless it is put there.
///
/// # Errors
/// The system's; what is there already is no file.
pub fn create(path: &Path, direct: bool) -> Result<NewFile> {
    let cannot = |error: &io::Error| {
        let path = path.display();
        Error::system(format!("Failed to create file '{path}'"), error)
    };
    match fs::metadata(path) {
        Ok(meta) if !meta.is_file() => {
            return Err(Error::new(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!("'{}' is there and is not a regular file", path.display()),
            ));
        }
        _ => {}
    }
    if !path.is_absolute() {
        return Err(Error::new(
            ErrorCode::INVALID_ARG,
            format!("'{}' is not an absolute path", path.display()),
        ));
    }
    NewFile::beside(path, if direct { libc::O_DIRECT } else { 0 }).map_err(|e| cannot(&e))
}

/// Opens an image.
///
/// # Errors
/// The system's.
pub fn open(path: &Path, write: bool, direct: bool) -> Result<File> {
    // Without O_NONBLOCK a FIFO would block here.
    let flags = libc::O_NONBLOCK | if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags)
        .open(path)
        .map_err(|e| Error::system(format!("Failed to open file '{}'", path.display()), &e))
}

/// Why a file can't be restored, in words that name it.
pub fn refuse(path: &Path, error: &SavedError) -> Error {
    let code = match error {
        SavedError::Io(error) => {
            return Error::system(format!("saved image '{}'", path.display()), error);
        }
        SavedError::TooMuch { .. } => ErrorCode::OPERATION_UNSUPPORTED,
        _ => ErrorCode::OPERATION_FAILED,
    };
    Error::new(code, format!("saved image '{}': {error}", path.display()))
}

/// What an image says of itself.
#[derive(Debug)]
pub struct Contents {
    /// The domain's XML.
    pub xml: String,
    /// The guest is to run.
    pub running: bool,
    /// What tells it from other saves.
    pub id: [u8; 16],
}

/// Looks into an image: everything but guest memory is checked.
///
/// # Errors
/// What is wrong with it.
pub fn look(path: &Path) -> Result<Contents> {
    let file = open(path, false, false)?;
    let look = || {
        let image = Image::open(&file)?;
        image.check()?;
        Ok(Contents {
            xml: image.xml()?,
            running: image.header.running,
            id: image.header.id,
        })
    };
    look().map_err(|error| refuse(path, &error))
}

/// Replaces an image's XML, and says whether its guest is to run.
///
/// # Errors
/// What is wrong with it; the system's.
pub fn rewrite(path: &Path, xml: &str, running: bool) -> Result<()> {
    let file = open(path, true, false)?;
    let rewrite = || Image::open(&file)?.set_xml(xml, running);
    rewrite().map_err(|error| refuse(path, &error))
}

/// The name an image has between its taking and its guest's first instruction: whoever starts the
/// domain later must not find it, for its guest may have written to disks since.
fn taken(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".used");
    name.into()
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    files::sync_folder(to.parent().unwrap_or(Path::new("/")))
}

/// Takes a managed save out of the way: its guest goes on.
///
/// # Errors
/// The system's.
pub fn take(path: &Path) -> Result<()> {
    rename(path, &taken(path))
        .map_err(|e| Error::system(format!("cannot rename '{}'", path.display()), &e))
}

/// Puts it back, if it was taken: its guest did not run.
pub fn give_back(path: &Path) {
    match rename(&taken(path), path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::error!("cannot put '{}' back: {error}", path.display());
        }
        _ => {}
    }
}

/// Removes one that was taken: its guest runs.
pub fn drop_taken(path: &Path) {
    if let Err(error) = files::remove_if_there(&taken(path)) {
        log::warn!("cannot remove '{}': {error}", taken(path).display());
    }
}
