//! Pseudo-terminals: noticing that somebody opens the other end.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use super::{CharError, os};
use crate::resource::set_nonblocking;

/// How often to look where the kernel can't tell about opens (no inotify instance left).
pub const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// The master side.
#[derive(Debug)]
pub struct Pty {
    master: OwnedFd,
    path: String,
    inotify: Option<Inotify>,
}

impl Pty {
    /// A new pseudo-terminal in raw mode.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn open() -> Result<Self, CharError> {
        // SAFETY: opens a file and returns a new descriptor or -1.
        let fd = Errno::result(unsafe {
            libc::open(
                c"/dev/ptmx".as_ptr(),
                libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
            )
        })
        .map_err(os("opening /dev/ptmx"))?;
        // SAFETY: just opened, owned by nobody else.
        Self::from_master(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// A pseudo-terminal somebody else opened; put into raw mode.
    ///
    /// # Errors
    /// Not the master side of a pseudo-terminal, or the kernel's refusal.
    pub fn from_master(master: OwnedFd) -> Result<Self, CharError> {
        set_nonblocking(&master).map_err(os("pseudo-terminal"))?;
        let (mut number, unlock): (libc::c_int, libc::c_int) = (0, 0);
        // SAFETY: both ioctls read or write one int, which lives through the call.
        unsafe {
            let fd = master.as_raw_fd();
            Errno::result(libc::ioctl(fd, libc::TIOCGPTN, &raw mut number))
                .map_err(os("not the master of a pseudo-terminal"))?;
            Errno::result(libc::ioctl(fd, libc::TIOCSPTLCK, &raw const unlock))
                .map_err(os("unlocking the pseudo-terminal"))?;
        }
        let path = format!("/dev/pts/{number}");
        // Opened and closed once: from then on the master says "hung up" while nobody is there.
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor or -1.
        let slave =
            Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })
                .map_err(os("opening the pseudo-terminal's other side"))?;
        // SAFETY: just opened, owned by nobody else.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        let mut termios = tcgetattr(&slave).map_err(os("tcgetattr"))?;
        cfmakeraw(&mut termios);
        tcsetattr(&slave, SetArg::TCSANOW, &termios).map_err(os("tcsetattr"))?;
        let inotify = Self::watch(&path).inspect_err(|error| {
            log::warn!(
                "{path}: opens are noticed by looking every {POLL_INTERVAL:?} (inotify: {error})"
            );
        });
        Ok(Self {
            master,
            path,
            inotify: inotify.ok(),
        })
    }

    fn watch(path: &str) -> Result<Inotify, Errno> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(path, AddWatchFlags::IN_OPEN)?;
        Ok(inotify)
    }

    /// Path of the other side.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The master.
    #[must_use]
    pub fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Readable when the other side was opened; `None`: look every [`POLL_INTERVAL`].
    #[must_use]
    pub fn opens(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Takes back the wake-up of [`Pty::opens`].
    pub fn acknowledge(&self) {
        if let Some(inotify) = &self.inotify
            && let Err(error) = inotify.read_events()
            && error != Errno::EAGAIN
        {
            log::error!("{}: inotify: {error}", self.path);
        }
    }

    /// Somebody has the other side open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let mut fds = [PollFd::new(self.master(), PollFlags::POLLOUT)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(_) => !fds[0]
                .revents()
                .is_some_and(|r| r.contains(PollFlags::POLLHUP)),
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_opening_and_closing() {
        let pty = Pty::open().unwrap();
        assert!(!pty.is_open());
        let slave = std::fs::File::options()
            .read(true)
            .write(true)
            .open(pty.path())
            .unwrap();
        assert!(pty.is_open());
        let mut fds = [PollFd::new(pty.opens().unwrap(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(5000_u16)), Ok(1));
        pty.acknowledge();
        drop(slave);
        assert!(!pty.is_open());
    }

    #[test]
    fn refuses_what_is_not_a_pty() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Pty::from_master(file.into()).is_err());
    }
}
