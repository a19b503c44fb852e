//! The one daemon of a root, and its sockets.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use tokio::net::UnixListener;

use crate::files;

/// Held by the one daemon of a root, for as long as it lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon has it.
    #[error("another vireod (process {pid}) serves {root} already")]
    Taken {
        /// Its process id, as it says.
        pid: String,
        /// The folder.
        root: String,
    },
    /// The system's.
    #[error("cannot lock {path}: {error}")]
    System {
        /// The lock file.
        path: String,
        /// Why.
        error: io::Error,
    },
}

/// Becomes the one daemon of the root whose live state is in `run`.
///
/// # Errors
/// Another daemon is.
pub fn lock(run: &Path) -> Result<Lock, LockError> {
    let path = run.join("vireod.pid");
    let system = |error| LockError::System {
        path: path.display().to_string(),
        error,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .open(&path)
        .map_err(system)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // Only for the message.
            let _ = (&file).take(32).read_to_string(&mut pid);
            return Err(LockError::Taken {
                pid: pid.trim().to_owned(),
                root: run.display().to_string(),
            });
        }
        Err(fs::TryLockError::Error(error)) => return Err(system(error)),
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(system)?;
    Ok(Lock { _file: file })
}

/// Who may connect to a socket.
#[derive(Debug, Clone, Copy)]
pub struct Mode<'a> {
    /// The group that it belongs to, where there is such a group.
    pub group: Option<&'a str>,
    /// Its permissions; else the owner's and the group's.
    pub mode: Option<u32>,
}

/// Listens at `path`, replacing what a daemon before left there. The lock must be held.
///
/// # Errors
/// The system's.
pub fn listen(path: &Path, who: &Mode<'_>) -> io::Result<UnixListener> {
    files::remove_if_there(path)?;
    // Nobody gets in before the right mode is set.
    // SAFETY: umask(2) takes and returns a number.
    let before = unsafe { libc::umask(0o177) };
    let listener = files::listen_unix(path);
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    let listener = listener?;
    let grouped = match who.group.and_then(group) {
        Some(group) => chown(path, None, Some(group)).is_ok(),
        None => false,
    };
    let mode = who.mode.unwrap_or(if grouped { 0o770 } else { 0o700 });
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

fn group(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name is a C string; the record returned is read before any other call could
    // change it, as this runs only at the daemon's start, on one thread.
    unsafe {
        let group = libc::getgrnam(name.as_ptr());
        (!group.is_null()).then(|| (*group).gr_gid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempFolder;

    #[test]
    fn a_second_daemon_is_told_who_the_first_is() {
        let folder = TempFolder::new();
        let held = lock(&folder.0).unwrap();
        let error = lock(&folder.0).unwrap_err().to_string();
        let pid = std::process::id();
        assert!(error.contains(&format!("process {pid}")), "{error}");
        drop(held);
        lock(&folder.0).unwrap();
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced() {
        let folder = TempFolder::new();
        let path = folder.0.join("sock");
        let mut who = Mode {
            group: None,
            mode: None,
        };
        drop(listen(&path, &who).unwrap());
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        who.mode = Some(0o777);
        let _listener = listen(&path, &who).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o777);
    }
}
