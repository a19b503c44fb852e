//! Images are locked while in use, in the way QEMU and qemu-img do it, so that each respects the
//! other's: shared OFD locks on single bytes of the image file say what their holder does
//! (100 + permission) and what it can't have others do (200 + permission). Whoever comes sets its
//! own bytes first, then looks whether somebody else holds one of the opposite bytes.
//!
//! An OFD lock belongs to the open file description, not to the process: **whoever runs an image
//! (the VMM, when it builds a disk) locks it on the descriptor it was handed**. The lock lasts as
//! long as any copy of that descriptor does, whatever becomes of the daemon, which opened it. A
//! file that is opened again (by path or through `/proc/self/fd`) has no lock.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::{fs, io};

use crate::Error;

/// QEMU's permissions, by bit: reads consistent content.
const READ: u8 = 1 << 0;
/// Writes content.
const WRITE: u8 = 1 << 1;
/// Changes the file's size.
const RESIZE: u8 = 1 << 3;

/// First byte that says what a holder does.
const DOES: i64 = 100;
/// First byte that says what a holder can't have others do.
const DENIES: i64 = 200;

/// What somebody does with an image, and what he lets others do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    does: u8,
    denies: u8,
}

impl Usage {
    /// Not in use: no lock.
    pub const NONE: Self = Self { does: 0, denies: 0 };

    /// Read only: a read-only disk, a backing file. Others may read too, but not write.
    pub const READ: Self = Self {
        does: READ,
        denies: WRITE | RESIZE,
    };

    /// A raw image that is written. Others may not write.
    pub const WRITE_RAW: Self = Self {
        does: READ | WRITE,
        denies: WRITE,
    };

    /// An image with metadata of its own (qcow2, LUKS) that is written. Others may not write, nor
    /// read it as that format.
    pub const WRITE: Self = Self {
        does: READ | WRITE | RESIZE,
        denies: WRITE | RESIZE,
    };

    /// A raw image that several guests write, who come to terms with each other (`<shareable/>`).
    pub const SHARED: Self = Self {
        does: READ | WRITE,
        denies: 0,
    };
}

/// Changes what the open file description behind `file` has locked from one usage to another;
/// `from` is what it has now ([`Usage::NONE`] for one just opened). `name` is for messages.
///
/// # Errors
/// [`Error::Locked`] with the holder where it can be found, or `Error::Io`; the locks are then as
/// they were.
pub fn change(file: impl AsFd, name: &str, from: Usage, to: Usage) -> Result<(), Error> {
    let fd = file.as_fd();
    let io_error = |source| Error::Io {
        what: format!("locking {name}"),
        source,
    };
    let gained = [
        (DOES, to.does & !from.does),
        (DENIES, to.denies & !from.denies),
    ];
    let lost = [
        (DOES, from.does & !to.does),
        (DENIES, from.denies & !to.denies),
    ];
    let undo = |error| {
        for byte in bytes(gained) {
            // Failing to unlock what was just locked leaves more locked than needed, no less.
            let _ = set(fd, byte, libc::F_UNLCK);
        }
        error
    };
    for byte in bytes(gained) {
        match set(fd, byte, libc::F_RDLCK) {
            Ok(()) => {}
            // Somebody holds an exclusive lock: not QEMU's way, but a lock.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                return Err(undo(locked(fd, name, byte)));
            }
            Err(error) => return Err(undo(io_error(error))),
        }
    }
    for byte in bytes([(DENIES, to.does), (DOES, to.denies)]) {
        match held_by_another(fd, byte) {
            Ok(false) => {}
            Ok(true) => return Err(undo(locked(fd, name, byte))),
            Err(error) => return Err(undo(io_error(error))),
        }
    }
    for byte in bytes(lost) {
        set(fd, byte, libc::F_UNLCK).map_err(io_error)?;
    }
    Ok(())
}

fn bytes(sets: [(i64, u8); 2]) -> impl Iterator<Item = i64> {
    sets.into_iter().flat_map(|(base, bits)| {
        (0..8)
            .filter(move |bit| bits & (1 << bit) != 0)
            .map(move |bit| base + bit)
    })
}

fn flock(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        // 0, 1 or 2.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn set(fd: BorrowedFd<'_>, byte: i64, kind: i32) -> io::Result<()> {
    let lock = flock(byte, kind);
    // SAFETY: an open descriptor and a lock that outlives the call.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether another open file description has a lock on that byte.
fn held_by_another(fd: BorrowedFd<'_>, byte: i64) -> io::Result<bool> {
    let mut lock = flock(byte, libc::F_WRLCK);
    // SAFETY: an open descriptor and a lock that outlives the call, which writes to it.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } {
        0 => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

fn locked(fd: BorrowedFd<'_>, name: &str, byte: i64) -> Error {
    Error::Locked {
        image: name.to_owned(),
        holder: holder(fd, byte)
            .map(|(pid, program)| format!(" by process {pid} ({program})"))
            .unwrap_or_default(),
    }
}

/// Who has a lock on that byte of the file: the kernel does not say for OFD locks, so it is looked
/// up among all open files. Another process than this one if there is one.
fn holder(fd: BorrowedFd<'_>, byte: i64) -> Option<(u32, String)> {
    let own = fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
    let me = std::process::id();
    let mut this_process = None;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // A process that has gone meanwhile, or that is not ours to look into.
        let Ok(files) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        for file in files.flatten() {
            let number = file.file_name();
            if pid == me && number.to_str() == Some(fd.as_raw_fd().to_string().as_str()) {
                continue;
            }
            let same = fs::metadata(file.path())
                .is_ok_and(|other| other.dev() == own.dev() && other.ino() == own.ino());
            if !same {
                continue;
            }
            let Ok(info) = fs::read_to_string(process.path().join("fdinfo").join(&number)) else {
                continue;
            };
            if !info.lines().any(|line| covers(line, byte)) {
                continue;
            }
            let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            let found = (pid, program.trim_end().escape_debug().to_string());
            if pid != me {
                return Some(found);
            }
            this_process = Some(found);
        }
    }
    this_process
}

/// Whether a line of fdinfo is a lock on that byte:
/// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:123 100 101`, where the end may be `EOF`.
fn covers(line: &str, byte: i64) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else {
        return false;
    };
    let mut fields = lock.split_whitespace().rev();
    let end = fields.next();
    let start = fields.next().and_then(|start| start.parse::<i64>().ok());
    let end = match end {
        Some("EOF") => Some(i64::MAX),
        Some(end) => end.parse().ok(),
        None => None,
    };
    matches!((start, end), (Some(start), Some(end)) if start <= byte && byte <= end)
}

#[cfg(test)]
mod tests;
