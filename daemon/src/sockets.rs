//! The one daemon of a root, and its sockets.

use std::ffi::CString;
use std::fmt;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

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
    #[error("another vireod{pid} serves {root} already")]
    Taken {
        /// Its process, as it says.
        pid: Process,
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

/// A daemon's process, if it has said which.
#[derive(Debug)]
pub struct Process(Option<u32>);

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(pid) => write!(f, " (process {pid})"),
            None => Ok(()),
        }
    }
}

/// How long one who has just become the daemon may take to write down who it is.
const NAMED_LIMIT: Duration = Duration::from_secs(1);
/// How long one who is dying may take to let go: nobody serves meanwhile, and whoever wants a daemon has started this one.
const DYING_LIMIT: Duration = Duration::from_millis(500);
/// From one look at that to the next.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// Who has written its process id there: one that lives.
fn named(file: &File) -> Option<u32> {
    let mut text = [0; 32];
    let len = file.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(text.get(..len)?).ok()?;
    let (first, _) = text.split_once('\n')?;
    let pid: u32 = first.parse().ok()?;
    Path::new("/proc").join(first).exists().then_some(pid)
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
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .open(&path)
        .map_err(system)?;
    let since = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(fs::TryLockError::WouldBlock) => {
                let pid = named(&file);
                let limit = pid.map_or(NAMED_LIMIT, |_| DYING_LIMIT);
                if since.elapsed() < limit {
                    std::thread::sleep(LOCK_INTERVAL);
                    continue;
                }
                return Err(LockError::Taken {
                    pid: Process(pid),
                    root: run.display().to_string(),
                });
            }
            Err(fs::TryLockError::Error(error)) => return Err(system(error)),
        }
    }
    // The first line is always whole, whoever reads it meanwhile.
    let own = format!("{}\n", std::process::id());
    file.write_all_at(own.as_bytes(), 0)
        .and_then(|()| file.set_len(own.len() as u64))
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

    /// One that dies holds it for a moment longer than it listens.
    #[test]
    fn one_that_dies_is_waited_for() {
        let folder = TempFolder::new();
        let held = lock(&folder.0).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(DYING_LIMIT / 10);
                drop(held);
            });
            lock(&folder.0).unwrap();
        });
    }

    /// One that has just begun may not have said yet who it is; nor is one that has died the one that serves.
    #[test]
    fn who_the_first_is_may_come_later() {
        let folder = TempFolder::new();
        let path = folder.0.join("vireod.pid");
        for before in ["", "999999999\n"] {
            fs::write(&path, before).unwrap();
            let first = OpenOptions::new().write(true).open(&path).unwrap();
            first.try_lock().unwrap();
            let error = lock(&folder.0).unwrap_err().to_string();
            assert!(error.starts_with("another vireod serves "), "{error}");
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(100));
                    let pid = format!("{}\n", std::process::id());
                    first.write_all_at(pid.as_bytes(), 0).unwrap();
                });
                let error = lock(&folder.0).unwrap_err().to_string();
                let pid = std::process::id();
                assert!(error.contains(&format!("(process {pid})")), "{error}");
            });
        }
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
