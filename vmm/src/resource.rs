//! Files, sockets and descriptors named in a config.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use vmm_api::config::Resource;

/// What goes wrong while a resource is opened.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// A path.
    #[error("{name}: {source}")]
    Path {
        /// The path, or `descriptor N`.
        name: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// Standard descriptors and descriptors that are not open can't be handed over.
    #[error("descriptor {0} was not handed to this process, or is named twice")]
    NotOpen(RawFd),
}

/// How a resource is called in messages.
#[must_use]
pub fn name(resource: &Resource) -> String {
    match resource {
        Resource::Fd(fd) => format!("descriptor {fd}"),
        Resource::Path(path) => path.display().to_string(),
    }
}

fn failed(resource: &Resource) -> impl FnOnce(std::io::Error) -> ResourceError {
    let name = name(resource);
    move |source| ResourceError::Path { name, source }
}

/// Takes over an inherited descriptor, once: what came through exec has no close-on-exec flag,
/// what this process opened, or has already taken over, does.
fn inherit(fd: RawFd) -> Result<OwnedFd, ResourceError> {
    if fd <= 2 {
        return Err(ResourceError::NotOpen(fd));
    }
    // SAFETY: F_GETFD and F_SETFD touch nothing but the flag; on a descriptor that is not open
    // they fail.
    unsafe {
        let flags = Errno::result(libc::fcntl(fd, libc::F_GETFD))
            .map_err(|_| ResourceError::NotOpen(fd))?;
        if flags & libc::FD_CLOEXEC != 0 {
            return Err(ResourceError::NotOpen(fd));
        }
        Errno::result(libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC))
            .map_err(|_| ResourceError::NotOpen(fd))?;
        // Open, and ours by the contract of `Resource::Fd`; the flag makes this its only owner.
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// For reading.
///
/// # Errors
/// Missing, unreadable, or not handed over.
pub fn open_read(resource: &Resource) -> Result<File, ResourceError> {
    match resource {
        Resource::Fd(fd) => Ok(inherit(*fd)?.into()),
        Resource::Path(path) => File::open(path).map_err(failed(resource)),
    }
}

/// For appending; created if missing.
///
/// # Errors
/// Not writable, or not handed over.
pub fn open_append(resource: &Resource) -> Result<File, ResourceError> {
    match resource {
        Resource::Fd(fd) => Ok(inherit(*fd)?.into()),
        Resource::Path(path) => File::options()
            .append(true)
            .create(true)
            .open(path)
            .map_err(failed(resource)),
    }
}

/// For writing anew.
///
/// # Errors
/// Not writable, or not handed over.
pub fn open_write(resource: &Resource) -> Result<File, ResourceError> {
    match resource {
        Resource::Fd(fd) => Ok(inherit(*fd)?.into()),
        Resource::Path(path) => File::create(path).map_err(failed(resource)),
    }
}

/// A descriptor as it is: a pseudo-terminal's master, a connected socket.
///
/// # Errors
/// Not handed over; a path that can't be opened.
pub fn open_device(resource: &Resource) -> Result<OwnedFd, ResourceError> {
    match resource {
        Resource::Fd(fd) => inherit(*fd),
        Resource::Path(path) => Ok(File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(failed(resource))?
            .into()),
    }
}

/// A disk's file or block device, for reading or for both; with `direct` past the page cache.
/// What is handed over must have been opened so.
///
/// # Errors
/// Not openable so, or not handed over.
pub fn open_disk(
    resource: &Resource,
    writable: bool,
    direct: bool,
) -> Result<OwnedFd, ResourceError> {
    match resource {
        Resource::Fd(fd) => inherit(*fd),
        Resource::Path(path) => Ok(File::options()
            .read(true)
            .write(writable)
            .custom_flags(if direct { libc::O_DIRECT } else { 0 })
            .open(path)
            .map_err(failed(resource))?
            .into()),
    }
}

/// A connected socket.
///
/// # Errors
/// Nobody listens, or not handed over.
pub fn connect(resource: &Resource) -> Result<OwnedFd, ResourceError> {
    match resource {
        Resource::Fd(fd) => inherit(*fd),
        Resource::Path(path) => Ok(UnixStream::connect(path).map_err(failed(resource))?.into()),
    }
}

/// A listening socket. A socket file that nobody listens on any more is replaced.
///
/// # Errors
/// In use, not creatable, or not handed over.
pub fn listen(resource: &Resource) -> Result<OwnedFd, ResourceError> {
    let path = match resource {
        Resource::Fd(fd) => return inherit(*fd),
        Resource::Path(path) => path,
    };
    if is_stale(path) {
        std::fs::remove_file(path).map_err(failed(resource))?;
    }
    Ok(UnixListener::bind(path).map_err(failed(resource))?.into())
}

fn is_stale(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
        && UnixStream::connect(path)
            .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// Reads and writes on `fd` no longer wait.
///
/// # Errors
/// The kernel's refusal.
pub fn set_nonblocking<F: AsFd>(fd: &F) -> Result<(), Errno> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_is_missing() {
        let error = open_read(&Resource::Path("/nowhere/kernel".into())).unwrap_err();
        assert!(
            error.to_string().starts_with("/nowhere/kernel: "),
            "{error}"
        );
        assert!(matches!(
            open_read(&Resource::Fd(1)),
            Err(ResourceError::NotOpen(1))
        ));
        assert!(matches!(
            open_read(&Resource::Fd(1_000_000)),
            Err(ResourceError::NotOpen(1_000_000))
        ));
    }

    #[test]
    fn replaces_a_dead_socket_but_not_a_live_one() {
        let dir = crate::testing::TempDir::new();
        let resource = Resource::Path(dir.path().join("sock"));
        let first = listen(&resource).unwrap();
        assert!(listen(&resource).is_err(), "somebody listens");
        drop(first);
        listen(&resource).unwrap();
    }
}
