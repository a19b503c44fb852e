//! Ctrl-C as something to wait for.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// While this lives, Ctrl-C doesn't end the program but [`Interrupt::wait`].
#[derive(Debug)]
pub struct Interrupt {
    fd: AsyncFd<OwnedFd>,
    before: libc::sigset_t,
}

impl Interrupt {
    /// Takes SIGINT over. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset writes the whole set before it is used; pthread_sigmask writes `before` in full,
        // and fails only for an invalid first argument; all pointers are to live locals.
        let (fd, before) = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr());
            (
                libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK),
                before.assume_init(),
            )
        };
        if fd < 0 {
            let error = io::Error::last_os_error();
            restore(&before);
            return Err(error);
        }
        // SAFETY: the descriptor was made just now and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the descriptor is owned by the value and stays the same and open as long as it lives.
        match unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) } {
            Ok(fd) => Ok(Self { fd, before }),
            Err(error) => {
                restore(&before);
                Err(error.into())
            }
        }
    }

    /// Resolves when Ctrl-C was pressed.
    ///
    /// # Errors
    ///
    /// The system's.
    pub async fn wait(&self) -> io::Result<()> {
        self.fd.readable().await.map(|_| ())
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        // The signal that was waited for has done its work: taken out, it doesn't end the program now.
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        // SAFETY: the pointer is to a live local and the length is its own; the descriptor doesn't block.
        unsafe {
            libc::read(
                self.fd.get_ref().as_raw_fd(),
                info.as_mut_ptr().cast(),
                std::mem::size_of::<libc::signalfd_siginfo>(),
            )
        };
        restore(&self.before);
    }
}

fn restore(mask: &libc::sigset_t) {
    // SAFETY: the pointer is to a live set that the system filled in; the old one is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) };
}
