//! What a character device is connected to: opening it, reading and writing without waiting.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockFlag, accept4};
use vmm_api::config::CharBackend;

use super::{CharError, Pty, Stdio, os, telnet};
use crate::resource;

/// A connected peer of a socket.
#[derive(Debug)]
pub struct Peer {
    pub(super) fd: OwnedFd,
    telnet: Option<telnet::Decoder>,
}

/// The other end.
#[derive(Debug)]
pub enum Link {
    /// Output is dropped.
    Null,
    /// Output only.
    File(File),
    /// The process's own descriptors.
    Stdio(Stdio),
    /// A pseudo-terminal.
    Pty(Pty),
    /// A socket, listening where there is a listener, and its peer while there is one.
    Socket {
        /// Where peers come from.
        listener: Option<OwnedFd>,
        /// The one peer.
        peer: Option<Peer>,
        /// New peers speak telnet.
        telnet: bool,
    },
}

/// What a read brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// For the guest; may be empty.
    Data(Vec<u8>),
    /// Nothing now.
    Later,
    /// Nothing any more.
    End,
    /// Ctrl-A x.
    Quit,
}

/// Bytes asked for at a time: several UART FIFOs full.
const CHUNK: usize = 256;
/// A descriptor that may not be made non-blocking gets this much after it said it is ready.
const SMALL: usize = 512;

impl Link {
    /// Opens, binds or takes over what `backend` names.
    ///
    /// # Errors
    /// Not there, not permitted, in use.
    pub fn open(backend: &CharBackend) -> Result<Self, CharError> {
        Ok(match backend {
            CharBackend::Null => Self::Null,
            CharBackend::Stdio => Self::Stdio(Stdio::open()?),
            CharBackend::Pty(None) => Self::Pty(Pty::open()?),
            CharBackend::Pty(Some(at)) => Self::Pty(Pty::from_master(resource::open_device(at)?)?),
            CharBackend::File(at) => Self::File(resource::open_append(at)?),
            CharBackend::Listen { socket, telnet, .. } => {
                let listener = resource::listen(socket)?;
                resource::set_nonblocking(&listener).map_err(os(resource::name(socket)))?;
                Self::Socket {
                    listener: Some(listener),
                    peer: None,
                    telnet: *telnet,
                }
            }
            CharBackend::Connected(at) => {
                let fd = resource::connect(at)?;
                resource::set_nonblocking(&fd).map_err(os(resource::name(at)))?;
                Self::Socket {
                    listener: None,
                    peer: Some(Peer { fd, telnet: None }),
                    telnet: false,
                }
            }
        })
    }

    /// Takes the next peer. Returns what to send it first.
    pub fn accept(&mut self) -> Option<Vec<u8>> {
        let Self::Socket {
            listener: Some(listener),
            peer: peer @ None,
            telnet,
        } = self
        else {
            return None;
        };
        match accept4(
            std::os::fd::AsRawFd::as_raw_fd(listener),
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        ) {
            Ok(fd) => {
                // SAFETY: accept4 returned a new descriptor that nobody else owns.
                let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
                *peer = Some(Peer {
                    fd,
                    telnet: telnet.then(telnet::Decoder::default),
                });
                Some(if *telnet {
                    telnet::GREETING.to_vec()
                } else {
                    Vec::new()
                })
            }
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => None,
            Err(error) => {
                log::error!("accepting a console connection: {error}");
                None
            }
        }
    }

    /// Gives up the peer, or the input that ended.
    pub fn hang_up(&mut self) {
        if let Self::Socket { peer, .. } = self {
            *peer = None;
        }
    }

    /// Where input comes from, while there is somebody.
    #[must_use]
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Null | Self::File(_) => None,
            Self::Stdio(stdio) => stdio.input(),
            Self::Pty(pty) => Some(pty.master()),
            Self::Socket { peer, .. } => peer.as_ref().map(|p| p.fd.as_fd()),
        }
    }

    /// Reads what is there.
    pub fn read(&mut self, reply: &mut Vec<u8>) -> Input {
        let mut buffer = [0; CHUNK];
        let Some(fd) = self.input() else {
            return Input::End;
        };
        // Shared with other processes: it can't be made non-blocking here.
        let ready = PollFlags::POLLIN | PollFlags::POLLHUP;
        if matches!(self, Self::Stdio(_)) && !is_ready(fd, ready) {
            return Input::Later;
        }
        let input = match nix::unistd::read(fd, &mut buffer) {
            Ok(0) => return Input::End,
            Ok(length) => &buffer[..length],
            Err(Errno::EAGAIN | Errno::EINTR) => return Input::Later,
            Err(_) => return Input::End,
        };
        match self {
            Self::Stdio(stdio) => {
                let typed = stdio.typed(input);
                if typed.quit {
                    Input::Quit
                } else {
                    Input::Data(typed.data)
                }
            }
            Self::Socket {
                peer:
                    Some(Peer {
                        telnet: Some(decoder),
                        ..
                    }),
                ..
            } => {
                let mut data = Vec::with_capacity(input.len());
                decoder.decode(input, &mut data, reply);
                Input::Data(data)
            }
            _ => Input::Data(input.to_vec()),
        }
    }

    /// Output needs escaping.
    #[must_use]
    pub fn is_telnet(&self) -> bool {
        matches!(
            self,
            Self::Socket {
                peer: Some(Peer {
                    telnet: Some(_),
                    ..
                }),
                ..
            }
        )
    }

    /// Writes as much as goes without waiting. `EAGAIN`: nothing goes now.
    ///
    /// # Errors
    /// The other end is gone, or the kernel's refusal.
    pub fn write(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        match self {
            Self::Null => Ok(bytes.len()),
            Self::File(file) => match file.write(bytes) {
                Ok(length) => Ok(length),
                Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
            },
            Self::Stdio(stdio) => {
                // As in `read`.
                if !is_ready(stdio.output(), PollFlags::POLLOUT | PollFlags::POLLERR) {
                    return Err(Errno::EAGAIN);
                }
                nix::unistd::write(stdio.output(), &bytes[..bytes.len().min(SMALL)])
            }
            Self::Pty(pty) => nix::unistd::write(pty.master(), bytes),
            Self::Socket {
                peer: Some(peer), ..
            } => nix::unistd::write(&peer.fd, bytes),
            Self::Socket { peer: None, .. } => Err(Errno::ENOTCONN),
        }
    }
}

/// One of `events` is there now: a call does not wait.
fn is_ready(fd: BorrowedFd<'_>, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd, events)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => fds[0]
            .revents()
            .is_some_and(|revents| revents.intersects(events)),
        Err(_) => false,
    }
}
