//! One connection between a port of the guest and a UNIX socket.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::packet::{HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::queue::Chain;
use crate::worker::Interest;

/// Bytes from the guest that are kept for a host program that doesn't read: what it is told.
pub(super) const BUFFER: u32 = 128 << 10;
/// How long the guest may take to answer a request, or to let go of what is over; and a host
/// program to take what is left for it.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// Buffers one system call takes (`IOV_MAX`).
const MOST_BUFFERS: usize = 1024;

/// A connection's two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub host: u32,
    pub guest: u32,
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest has been asked, or will be.
    Asked,
    /// Data flows.
    Open,
    /// The host's end is closed; the guest is to let go of it.
    Closing,
}

/// What the guest is still to be told: bits.
mod tell {
    pub const REQUEST: u8 = 1;
    pub const RESPONSE: u8 = 2;
    pub const CREDIT: u8 = 4;
    pub const ASK_CREDIT: u8 = 8;
    pub const SHUTDOWN: u8 = 16;
}

/// The connection is over; the guest is told so by a `RST`, or knows already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    Reset,
    Silent,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub key: Key,
    /// What it is known by to the poll.
    pub token: u64,
    stream: UnixStream,
    phase: Phase,
    tell: u8,
    /// Flags of the last `SHUTDOWN` to the guest.
    ended: u32,
    /// Flags of the guest's.
    guest_ended: u32,
    /// Room the guest has said it has, what has left its buffer, and what was sent: modulo 2^32.
    guest_room: u32,
    guest_forwarded: u32,
    sent: u32,
    /// From the guest; what of it has gone on; and what the guest knows of that: modulo 2^32.
    received: u32,
    forwarded: u32,
    told: u32,
    /// From the guest, not yet taken by the host.
    output: VecDeque<u8>,
    /// The socket may have something to read.
    readable: bool,
    /// What the poll waits for.
    pub interest: Option<Interest>,
    /// It is in the list of those that have something for the guest.
    pub listed: bool,
    pub deadline: Option<Instant>,
}

impl Connection {
    fn new(key: Key, token: u64, stream: UnixStream, phase: Phase, tell: u8) -> Self {
        Self {
            key,
            token,
            stream,
            phase,
            tell,
            ended: 0,
            guest_ended: 0,
            guest_room: 0,
            guest_forwarded: 0,
            sent: 0,
            received: 0,
            forwarded: 0,
            told: 0,
            output: VecDeque::new(),
            readable: false,
            interest: None,
            listed: false,
            deadline: None,
        }
    }

    /// A host program wants to talk to the guest.
    pub fn to_guest(key: Key, token: u64, stream: UnixStream) -> Self {
        let mut new = Self::new(key, token, stream, Phase::Asked, tell::REQUEST);
        new.deadline = Some(Instant::now() + PATIENCE);
        new
    }

    /// The guest wants to talk to a host program, which has accepted.
    pub fn from_guest(key: Key, token: u64, stream: UnixStream, request: &Header) -> Self {
        let mut new = Self::new(key, token, stream, Phase::Open, tell::RESPONSE);
        new.credit(request);
        new
    }

    pub fn fd(&self) -> impl AsFd {
        self.stream.as_fd()
    }

    /// Bytes the guest has room for.
    fn room(&self) -> u32 {
        let flying = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_room.saturating_sub(flying)
    }

    fn credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// Data may go to the guest, as far as both sides of the socket are concerned.
    fn can_send(&self) -> bool {
        self.phase == Phase::Open
            && self.ended & SHUTDOWN_SEND == 0
            && self.guest_ended & SHUTDOWN_RECEIVE == 0
    }

    /// There is something for the guest.
    pub fn has_packet(&self) -> bool {
        self.tell != 0 || (self.readable && self.can_send() && self.room() > 0)
    }

    /// What the poll is to wait for; `None`: nothing, as even a hang-up means nothing now.
    pub fn wanted(&self) -> Option<Interest> {
        let writes = !self.output.is_empty();
        if self.phase != Phase::Open {
            return None;
        }
        let reads = self.can_send() && !self.readable;
        match (reads, writes) {
            (true, true) => Some(Interest::Both),
            (true, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Write),
            // The end of it is worth knowing once the host has ended its direction; while data
            // waits for the guest, a hang-up would be told again and again.
            (false, false) => (!self.readable).then_some(Interest::None),
        }
    }

    /// The next packet for the guest, its data read straight into `room` (whose first bytes are
    /// the header's).
    pub fn packet(&mut self, cid: u64, chain: &Chain) -> Result<Option<Header>, Over> {
        let mut header = Header {
            src_cid: HOST_CID,
            dst_cid: cid,
            src_port: self.key.host,
            dst_port: self.key.guest,
            kind: TYPE_STREAM,
            ..Header::default()
        };
        let bit = self.tell & self.tell.wrapping_neg();
        self.tell &= !bit;
        header.op = match bit {
            tell::REQUEST => op::REQUEST,
            tell::RESPONSE => op::RESPONSE,
            tell::CREDIT => op::CREDIT_UPDATE,
            tell::ASK_CREDIT => op::CREDIT_REQUEST,
            tell::SHUTDOWN => {
                header.flags = self.ended;
                op::SHUTDOWN
            }
            _ => {
                header.len = match self.read(chain) {
                    Ok(len) => len,
                    Err(error) if is_later(&error) => {
                        self.readable = false;
                        return Ok(None);
                    }
                    Err(_) => {
                        self.close();
                        return Ok(None);
                    }
                };
                if header.len == 0 {
                    return Ok(None);
                }
                self.sent = self.sent.wrapping_add(header.len);
                if self.room() == 0 {
                    self.tell |= tell::ASK_CREDIT;
                }
                op::RW
            }
        };
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
        self.told = self.forwarded;
        self.tell &= !tell::CREDIT;
        Ok(Some(header))
    }

    /// Reads from the socket into the chain behind the header; how many bytes. 0: nothing now.
    fn read(&mut self, chain: &Chain) -> io::Result<u32> {
        let header = super::packet::HEADER as u32;
        let mut list = Vec::new();
        chain.writable().iovecs(header, self.room(), &mut list);
        list.truncate(MOST_BUFFERS);
        if list.is_empty() {
            return Ok(0);
        }
        // SAFETY: the buffers are the chain's, which is held all the while; nothing else refers
        // to them.
        let read = unsafe {
            libc::readv(
                self.stream.as_raw_fd(),
                list.as_ptr(),
                list.len() as libc::c_int,
            )
        };
        match u32::try_from(read) {
            Ok(0) => {
                self.host_ended();
                Ok(0)
            }
            Ok(read) => Ok(read),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// The host program sends no more; perhaps it is gone altogether.
    fn host_ended(&mut self) {
        self.readable = false;
        if self.is_hung_up() {
            self.close();
        } else if self.ended & SHUTDOWN_SEND == 0 {
            self.ended |= SHUTDOWN_SEND;
            self.tell |= tell::SHUTDOWN;
        }
    }

    fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds[0].revents().is_some_and(|r| r.intersects(gone))
    }

    /// The host program is gone: the guest is to let go.
    fn close(&mut self) {
        if self.phase == Phase::Closing {
            return;
        }
        self.phase = Phase::Closing;
        self.readable = false;
        self.output.clear();
        self.ended = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        self.tell |= tell::SHUTDOWN;
        self.deadline = Some(Instant::now() + PATIENCE);
    }

    /// The socket is ready.
    pub fn ready(&mut self) -> Result<(), Over> {
        if self.phase != Phase::Open {
            return Ok(());
        }
        if !self.output.is_empty() {
            self.flush()?;
        }
        if self.can_send() {
            self.readable = true;
        } else if self.is_hung_up() {
            self.close();
        }
        Ok(())
    }

    /// Writes what waits for the host.
    fn flush(&mut self) -> Result<(), Over> {
        while !self.output.is_empty() {
            let (first, _) = self.output.as_slices();
            match self.stream.write(first) {
                Ok(0) => break,
                Ok(written) => {
                    self.output.drain(..written);
                    self.forward(written);
                }
                Err(error) if is_later(&error) => break,
                Err(_) => {
                    self.close();
                    return Ok(());
                }
            }
        }
        self.after_output()
    }

    /// So many bytes have gone on to the host.
    fn forward(&mut self, bytes: usize) {
        // Never more than was received.
        self.forwarded = self.forwarded.wrapping_add(bytes as u32);
        let unknown = self.received.wrapping_sub(self.told);
        if self.phase == Phase::Open && self.forwarded != self.told && unknown >= BUFFER / 2 {
            self.tell |= tell::CREDIT;
        }
    }

    /// What the guest's end of a direction means once everything before it has gone.
    fn after_output(&mut self) -> Result<(), Over> {
        if !self.output.is_empty() || self.guest_ended & SHUTDOWN_SEND == 0 {
            return Ok(());
        }
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            return Err(Over::Reset);
        }
        // Fails only if the other end is gone, of which the poll tells.
        if let Err(error) = self.stream.shutdown(Shutdown::Write) {
            log::debug!("vsock: {error}");
        }
        Ok(())
    }

    /// A packet of the guest's, its data in `chain` behind the header.
    pub fn hear(&mut self, header: &Header, chain: &Chain) -> Result<(), Over> {
        match (header.op, self.phase) {
            (op::RST, _) => return Err(Over::Silent),
            (op::RESPONSE, Phase::Asked) if self.tell & tell::REQUEST == 0 => {
                self.credit(header);
                self.phase = Phase::Open;
                self.deadline = None;
                let greeting = format!("OK {}\n", self.key.host);
                // A few bytes always fit into a fresh socket, unless its other end is gone.
                if self.stream.write_all(greeting.as_bytes()).is_err() {
                    self.close();
                }
            }
            (op::RW, Phase::Open) => {
                self.credit(header);
                if self.guest_ended & SHUTDOWN_SEND != 0 {
                    return Err(Over::Reset);
                }
                self.data(header.len, chain)?;
            }
            (op::SHUTDOWN, Phase::Open) => {
                self.credit(header);
                let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
                self.guest_ended |= header.flags & both;
                if self.guest_ended == both {
                    self.readable = false;
                    self.deadline = Some(Instant::now() + PATIENCE);
                }
                self.after_output()?;
            }
            (op::CREDIT_UPDATE, Phase::Open) => self.credit(header),
            (op::CREDIT_REQUEST, Phase::Open) => {
                self.credit(header);
                self.tell |= tell::CREDIT;
            }
            // The guest doesn't know yet that it is over.
            (op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST, Phase::Closing) => {}
            (op::SHUTDOWN, Phase::Closing) => return Err(Over::Reset),
            _ => return Err(Over::Reset),
        }
        if self.room() > 0 {
            self.tell &= !tell::ASK_CREDIT;
        }
        Ok(())
    }

    /// `len` bytes from the guest.
    fn data(&mut self, len: u32, chain: &Chain) -> Result<(), Over> {
        let kept = self.received.wrapping_sub(self.forwarded);
        if len > BUFFER - kept.min(BUFFER) {
            log::debug!("vsock: the guest sends more than there is room for");
            return Err(Over::Reset);
        }
        self.received = self.received.wrapping_add(len);
        let mut done = 0;
        if self.output.is_empty() {
            done = match self.write(len, chain) {
                Ok(done) => done,
                Err(error) if is_later(&error) => 0,
                Err(_) => {
                    self.close();
                    return Ok(());
                }
            };
        }
        let start = self.output.len();
        let rest = (len - done) as usize;
        self.output.resize(start + rest, 0);
        if rest > 0 {
            let at = super::packet::HEADER as u32 + done;
            let output = self.output.make_contiguous();
            chain.read_at(at, &mut output[start..]);
        }
        self.forward(done as usize);
        Ok(())
    }

    /// Writes the chain's data straight to the socket; how many bytes.
    fn write(&mut self, len: u32, chain: &Chain) -> io::Result<u32> {
        let mut list = Vec::new();
        let header = super::packet::HEADER as u32;
        chain.readable().iovecs(header, len, &mut list);
        list.truncate(MOST_BUFFERS);
        // SAFETY: all zeroes is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = list.as_mut_ptr();
        message.msg_iovlen = list.len();
        // SAFETY: the message points to the chain's buffers, which is held all the while.
        let sent = unsafe {
            libc::sendmsg(
                self.stream.as_raw_fd(),
                &raw const message,
                libc::MSG_NOSIGNAL,
            )
        };
        u32::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// A host program that has connected and not yet said to what port.
#[derive(Debug)]
pub(super) struct Greeting {
    pub stream: UnixStream,
    line: Vec<u8>,
    pub deadline: Instant,
}

/// What a greeting came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Greeted {
    /// It isn't complete yet.
    Later,
    /// To this port of the guest's.
    Port(u32),
    /// It isn't one, or its sender has gone.
    Nonsense,
}

/// Longest line: `CONNECT 4294967295\n`, with some room.
const LINE: usize = 32;

impl Greeting {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
            deadline: Instant::now() + PATIENCE,
        }
    }

    /// Reads on. Byte by byte: what follows the line is the guest's.
    pub fn read(&mut self) -> Greeted {
        while self.line.len() < LINE {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => return Greeted::Nonsense,
                Ok(_) if byte == *b"\n" => {
                    let port = std::str::from_utf8(&self.line)
                        .ok()
                        .and_then(|line| line.trim_end().strip_prefix("CONNECT "))
                        .and_then(|port| port.trim().parse().ok());
                    return port.map_or(Greeted::Nonsense, Greeted::Port);
                }
                Ok(_) => self.line.extend(byte),
                Err(error) if is_later(&error) => return Greeted::Later,
                Err(_) => return Greeted::Nonsense,
            }
        }
        Greeted::Nonsense
    }
}
