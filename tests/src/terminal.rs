//! A person at a terminal: drives a program through a pseudo-terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A program with its own controlling terminal.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    master: File,
    seen: Vec<u8>,
    mark: usize,
}

impl Terminal {
    /// Starts the program.
    pub fn start(command: &mut Command) -> Self {
        let (mut master, mut slave) = (-1, -1);
        let size = libc::winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the out pointers are valid, name and termios may be null.
        let result = unsafe {
            libc::openpty(
                &mut master,
                &mut slave,
                std::ptr::null_mut(),
                std::ptr::null(),
                &size,
            )
        };
        assert_eq!(result, 0, "openpty: {}", std::io::Error::last_os_error());
        // SAFETY: openpty gave two descriptors that are ours alone.
        let (master, slave) =
            unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        // SAFETY: setting flags of our own descriptor.
        unsafe {
            libc::fcntl(master.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC);
            libc::fcntl(master.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK);
        }
        command
            .stdin(Stdio::from(slave.try_clone().unwrap()))
            .stdout(Stdio::from(slave.try_clone().unwrap()))
            .stderr(Stdio::from(slave));
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        // The parent's copies of the slave must close, or its end is never seen.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self {
            child,
            master: File::from(master),
            seen: Vec::new(),
            mark: 0,
        }
    }

    /// Types.
    pub fn send(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the program has taken the terminal over (as a console does): what is typed
    /// before would be echoed and held back by the terminal itself.
    #[track_caller]
    pub fn wait_raw(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            // SAFETY: termios is plain data, for which zeroes are valid.
            let mut termios: libc::termios = unsafe { std::mem::zeroed() };
            // SAFETY: fills the struct it is given. The master tells the terminal's settings.
            let result = unsafe { libc::tcgetattr(self.master.as_raw_fd(), &mut termios) };
            assert_eq!(result, 0, "tcgetattr: {}", std::io::Error::last_os_error());
            if termios.c_lflag & libc::ICANON == 0 {
                return;
            }
            assert!(
                self.read_some() && Instant::now() < deadline,
                "the terminal did not become raw; seen:\n{}",
                self.seen()
            );
        }
    }

    /// Waits for `text` after what was expected last; gives everything up to and with it.
    #[track_caller]
    pub fn expect(&mut self, text: &str, limit: Duration) -> String {
        self.await_text(text, limit, false)
    }

    /// The same, however long it takes, unless nothing at all comes for `silence`.
    #[track_caller]
    pub fn expect_while_talking(&mut self, text: &str, silence: Duration) -> String {
        self.await_text(text, silence, true)
    }

    #[track_caller]
    fn await_text(&mut self, text: &str, limit: Duration, renewed: bool) -> String {
        let mut deadline = Instant::now() + limit;
        loop {
            let fresh = &self.seen[self.mark..];
            if let Some(at) = fresh.windows(text.len()).position(|w| w == text.as_bytes()) {
                let end = at + text.len();
                let got = String::from_utf8_lossy(&fresh[..end]).into_owned();
                self.mark += end;
                return got;
            }
            let known = self.seen.len();
            let more = self.read_some();
            if renewed && self.seen.len() > known {
                deadline = Instant::now() + limit;
            }
            assert!(
                more && Instant::now() < deadline,
                "'{text}' did not come{}; seen:\n{}",
                if more {
                    " in time"
                } else {
                    " before the program ended"
                },
                self.seen()
            );
        }
    }

    /// Everything seen so far.
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Reads what is there, waiting a moment; false at the end.
    fn read_some(&mut self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.master.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut poll, 1, 50) };
        let mut buffer = [0; 65536];
        match self.master.read(&mut buffer) {
            Ok(0) => false,
            Ok(n) => {
                self.seen.extend_from_slice(&buffer[..n]);
                true
            }
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }

    /// Waits for the program's end; gives its exit status.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> i32 {
        let deadline = Instant::now() + limit;
        loop {
            self.read_some();
            if let Some(status) = self.child.try_wait().unwrap() {
                // What it wrote last; a background process may hold the terminal open.
                for _ in 0..4 {
                    if !self.read_some() {
                        break;
                    }
                }
                return status.code().unwrap_or(-1);
            }
            assert!(
                Instant::now() < deadline,
                "the program did not end; seen:\n{}",
                self.seen()
            );
        }
    }

    /// The program's process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
