//! The control socket's server (`vmm_api::control`).

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockFlag, accept4, recvmsg};
use vmm_api::control::{FromVmm, MAX_FRAME, Request};

use crate::num::to_usize;
use crate::resource::set_nonblocking;

/// Connections at a time; more wait in the listener's queue.
const CONNECTIONS: usize = 64;
/// A client that lets more than this pile up is disconnected.
const UNSENT: usize = 4 << 20;

/// Descriptors that come with one message, and that wait for their request, at most.
const DESCRIPTORS: usize = 64;

/// Token of the listener; connections count up from the next.
pub const TOKEN: u64 = 1 << 32;

#[derive(Debug)]
struct Connection {
    fd: OwnedFd,
    received: Vec<u8>,
    /// What came alongside, for requests yet to be read.
    passed: VecDeque<OwnedFd>,
    unsent: VecDeque<u8>,
    watching: EpollFlags,
}

/// Listener and connections.
#[derive(Debug)]
pub struct Control {
    listener: OwnedFd,
    connections: BTreeMap<u64, Connection>,
    next: u64,
    accepting: bool,
}

/// A request, and who asked.
#[derive(Debug)]
pub struct Asked {
    /// For [`Control::send`].
    pub by: u64,
    /// What.
    pub request: Request,
    /// The descriptors passed with it.
    pub descriptors: Vec<OwnedFd>,
}

/// One frame.
#[must_use]
pub fn frame(message: &FromVmm) -> Vec<u8> {
    let body = serde_json::to_vec(message).unwrap_or_else(|error| {
        log::error!("control message: {error}");
        Vec::new()
    });
    let length = u32::try_from(body.len()).unwrap_or(0);
    [&length.to_be_bytes()[..], &body].concat()
}

impl Control {
    /// Serves `listener`.
    ///
    /// # Errors
    /// Not a descriptor that can be waited for.
    pub fn new(epoll: &Epoll, listener: OwnedFd) -> Result<Self, Errno> {
        set_nonblocking(&listener)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, TOKEN))?;
        Ok(Self {
            listener,
            connections: BTreeMap::new(),
            next: TOKEN + 1,
            accepting: true,
        })
    }

    /// A token from [`TOKEN`] on fired. Returns what was asked.
    pub fn ready(&mut self, epoll: &Epoll, token: u64, events: EpollFlags) -> Vec<Asked> {
        if token == TOKEN {
            self.accept(epoll);
            return Vec::new();
        }
        let mut asked = Vec::new();
        if events.contains(EpollFlags::EPOLLOUT) {
            self.flush(epoll, token);
        }
        let readable = EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        if events.intersects(readable)
            && let Some(connection) = self.connections.get_mut(&token)
            && !connection.receive(token, &mut asked)
        {
            self.close(epoll, token);
        }
        asked
    }

    fn accept(&mut self, epoll: &Epoll) {
        while self.connections.len() < CONNECTIONS {
            let fd = match accept4(
                self.listener.as_raw_fd(),
                SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            ) {
                // SAFETY: accept4 returned a new descriptor that nobody else owns.
                Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(error) => {
                    log::error!("control socket: {error}");
                    return;
                }
            };
            let token = self.next;
            self.next += 1;
            if let Err(error) = epoll.add(&fd, EpollEvent::new(EpollFlags::EPOLLIN, token)) {
                log::error!("control socket: {error}");
                continue;
            }
            let connection = Connection {
                fd,
                received: Vec::new(),
                passed: VecDeque::new(),
                unsent: VecDeque::new(),
                watching: EpollFlags::EPOLLIN,
            };
            self.connections.insert(token, connection);
        }
        self.listen(epoll, false);
    }

    fn listen(&mut self, epoll: &Epoll, on: bool) {
        if self.accepting == on {
            return;
        }
        let flags = if on {
            EpollFlags::EPOLLIN
        } else {
            EpollFlags::empty()
        };
        match epoll.modify(&self.listener, &mut EpollEvent::new(flags, TOKEN)) {
            Ok(()) => self.accepting = on,
            Err(error) => log::error!("control socket: {error}"),
        }
    }

    /// Whether a connection is still there.
    #[must_use]
    pub fn has(&self, token: u64) -> bool {
        self.connections.contains_key(&token)
    }

    fn close(&mut self, epoll: &Epoll, token: u64) {
        // Closing the descriptor takes it out of epoll.
        self.connections.remove(&token);
        self.listen(epoll, true);
    }

    /// Sends to one connection, if it is still there.
    pub fn send(&mut self, epoll: &Epoll, to: u64, message: &FromVmm) {
        if let Some(connection) = self.connections.get_mut(&to) {
            connection.unsent.extend(frame(message));
            self.flush(epoll, to);
        }
    }

    /// Sends to everyone.
    pub fn broadcast(&mut self, epoll: &Epoll, message: &FromVmm) {
        let bytes = frame(message);
        let tokens: Vec<u64> = self.connections.keys().copied().collect();
        for token in tokens {
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.unsent.extend(&bytes);
            }
            self.flush(epoll, token);
        }
    }

    fn flush(&mut self, epoll: &Epoll, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if !connection.flush() || connection.unsent.len() > UNSENT {
            self.close(epoll, token);
            return;
        }
        let mut wanted = EpollFlags::EPOLLIN;
        wanted.set(EpollFlags::EPOLLOUT, !connection.unsent.is_empty());
        if wanted != connection.watching {
            match epoll.modify(&connection.fd, &mut EpollEvent::new(wanted, token)) {
                Ok(()) => connection.watching = wanted,
                Err(error) => {
                    log::error!("control socket: {error}");
                    self.close(epoll, token);
                }
            }
        }
    }

    /// Sends what is left, until `deadline` at the latest: the process ends.
    pub fn finish(&mut self, epoll: &Epoll, deadline: Instant) {
        loop {
            let tokens: Vec<u64> = self
                .connections
                .iter()
                .filter(|(_, c)| !c.unsent.is_empty())
                .map(|(t, _)| *t)
                .collect();
            if tokens.is_empty() || Instant::now() >= deadline {
                return;
            }
            for token in tokens {
                self.flush(epoll, token);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Connection {
    /// Reads what is there and takes whole requests out of it. False: the connection is over.
    fn receive(&mut self, token: u64, asked: &mut Vec<Asked>) -> bool {
        let mut buffer = [0; 16 << 10];
        match self.read(&mut buffer) {
            Ok(0) => return false,
            Ok(length) => self.received.extend(&buffer[..length]),
            Err(Errno::EAGAIN | Errno::EINTR) => return true,
            Err(_) => return false,
        }
        loop {
            match take_frame(&mut self.received) {
                Ok(None) => return true,
                Ok(Some(body)) => match serde_json::from_slice::<Request>(&body) {
                    Ok(request) => {
                        let count = to_usize(request.descriptors.into());
                        if count > self.passed.len() {
                            log::warn!("control socket: a request without its descriptors");
                            return false;
                        }
                        asked.push(Asked {
                            by: token,
                            request,
                            descriptors: self.passed.drain(..count).collect(),
                        });
                    }
                    Err(error) => {
                        log::warn!("control socket: a request not understood: {error}");
                        return false;
                    }
                },
                Err(length) => {
                    log::warn!("control socket: a frame of {length} bytes");
                    return false;
                }
            }
        }
    }

    /// Reads bytes, and takes the descriptors that come with them.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS]);
        let mut parts = [IoSliceMut::new(buffer)];
        let message = recvmsg::<()>(
            self.fd.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part {
                // SAFETY: the kernel made these descriptors for us just now; nobody else knows them.
                let owned = fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
                self.passed.extend(owned);
            }
        }
        if message.flags.contains(MsgFlags::MSG_CTRUNC) || self.passed.len() > DESCRIPTORS {
            log::warn!("control socket: too many descriptors");
            return Ok(0);
        }
        Ok(message.bytes)
    }

    fn flush(&mut self) -> bool {
        while !self.unsent.is_empty() {
            let (first, _) = self.unsent.as_slices();
            match nix::unistd::write(&self.fd, first) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(Errno::EAGAIN) => return true,
                Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
        }
        true
    }
}

/// Takes one whole frame's body from the front; `Err` for one that is too long.
fn take_frame(received: &mut Vec<u8>) -> Result<Option<Vec<u8>>, u32> {
    let Some(length) = received
        .first_chunk::<4>()
        .map(|bytes| u32::from_be_bytes(*bytes))
    else {
        return Ok(None);
    };
    if length > MAX_FRAME {
        return Err(length);
    }
    let end = 4 + to_usize(length.into());
    if received.len() < end {
        return Ok(None);
    }
    let body = received[4..end].to_vec();
    received.drain(..end);
    Ok(Some(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_whole_in_pieces_or_not_at_all() {
        let mut received = vec![0, 0];
        assert_eq!(take_frame(&mut received), Ok(None));
        received.extend([0, 2, b'h']);
        assert_eq!(take_frame(&mut received), Ok(None));
        received.extend(b"i\0");
        assert_eq!(take_frame(&mut received), Ok(Some(b"hi".to_vec())));
        assert_eq!(received, [0]);
        assert_eq!(take_frame(&mut vec![0xff; 4]), Err(u32::MAX));
    }
}
