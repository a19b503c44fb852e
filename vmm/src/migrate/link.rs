//! One connection of a migration: blocking, but never for long without a look around.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_api::migrate::{self, Kind, StreamError, Verdict};

use super::gate::{self, Gate};
use crate::devices::lock;
use crate::num::to_usize;
use crate::state::job::Progress;

/// How long a read or a write waits before it looks around.
const STEP: Duration = Duration::from_millis(100);
/// A peer from which, or to which, nothing moves for so long is gone.
pub const STALL: Duration = Duration::from_secs(30);
/// How long to wait between two looks at a peer that is about to say something.
const SHORT: Duration = Duration::from_millis(10);
/// Parts in one call (`UIO_MAXIOV` is 1024).
pub const PARTS_MOST: usize = 512;

/// A connection.
#[derive(Debug)]
pub struct Link {
    // Any connected stream socket: the calls are the same.
    stream: UnixStream,
    /// Waiting ends when this job is given up.
    job: Option<Arc<Progress>>,
    /// No longer.
    heedless: AtomicBool,
    /// A peer from which, or to which, nothing moves for so many milliseconds is gone.
    patience_ms: AtomicU64,
    /// The way of guest memory, from when it is first needed; none where the system has none.
    gate: OnceLock<Option<Mutex<Gate>>>,
}

impl Link {
    /// Over a connected stream socket.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(STEP))?;
        stream.set_write_timeout(Some(STEP))?;
        no_delay(&stream);
        room(&stream);
        let link = Self {
            stream,
            job: None,
            heedless: AtomicBool::new(false),
            patience_ms: AtomicU64::new(0),
            gate: OnceLock::new(),
        };
        link.be_patient(STALL);
        Ok(link)
    }

    /// Another way to the same connection, as patient as this one.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            stream: self.stream.try_clone()?,
            job: self.job.clone(),
            heedless: AtomicBool::new(self.heedless.load(Ordering::Relaxed)),
            patience_ms: AtomicU64::new(self.patience_ms.load(Ordering::Relaxed)),
            gate: OnceLock::new(),
        })
    }

    /// Waiting ends when `job` is given up.
    pub fn heed(&mut self, job: Arc<Progress>) {
        self.job = Some(job);
    }

    /// Waiting no longer ends with the job.
    pub fn forget_job(&self) {
        self.heedless.store(true, Ordering::Relaxed);
    }

    /// A peer from which, or to which, nothing moves for so long is gone.
    pub fn be_patient(&self, limit: Duration) {
        let limit = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.patience_ms.store(limit, Ordering::Relaxed);
    }

    /// Whether the peer has sent something, or gone, without waiting.
    pub fn has_said(&self) -> bool {
        self.peek().is_some()
    }

    /// Whether the peer says something, or goes, within `limit`.
    ///
    /// # Errors
    /// The system's.
    pub fn has_something_within(&self, limit: Duration) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, limit) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The refusal that a peer which is going sends last, if it comes within `limit`.
    pub fn last_word(&self, limit: Duration) -> Option<StreamError> {
        let since = Instant::now();
        // An error takes the place of the end once; what came before it can still be read.
        while self.peek() != Some(1) {
            if since.elapsed() >= limit || self.peek() == Some(0) {
                return None;
            }
            std::thread::sleep(SHORT);
        }
        let verdict = migrate::expect_json::<Verdict>(&mut &*self, Kind::Verdict);
        verdict.and_then(Verdict::into_result).err()
    }

    /// Waits until the peer has closed its end, at most for `limit`.
    pub fn await_end(&self, limit: Duration) {
        let since = Instant::now();
        let mut rest = [0u8; 4096];
        while since.elapsed() < limit {
            match (&self.stream).read(&mut rest) {
                Ok(0) => return,
                Err(error)
                    if !matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    return;
                }
                _ => {}
            }
        }
        log::warn!("the other side of a migration does not close its connection");
    }

    /// For waiting until the peer sends something or goes.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// After a wait of one step: whether to go on.
    fn look_around(&self, since: Instant) -> io::Result<()> {
        if let Some(job) = &self.job
            && !self.heedless.load(Ordering::Relaxed)
        {
            job.check()?;
        }
        let limit = Duration::from_millis(self.patience_ms.load(Ordering::Relaxed));
        if since.elapsed() >= limit {
            let text = format!("nothing moved for {} s", limit.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        Ok(())
    }

    /// Runs `step`, which moves some bytes, until it has moved some.
    fn persist(&self, mut step: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
        let since = Instant::now();
        loop {
            match step() {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    self.look_around(since)?;
                }
                result => return result,
            }
        }
    }

    /// Sends all of `parts`, in order.
    ///
    /// # Errors
    /// The connection's; it stalls; the job was given up.
    ///
    /// # Safety
    /// Every part is memory that may be read until this returns. (Others may change it meanwhile.)
    pub unsafe fn send_parts(&self, mut parts: &mut [libc::iovec]) -> io::Result<()> {
        while let Some(first) = parts.first_mut() {
            if first.iov_len == 0 {
                parts = &mut parts[1..];
                continue;
            }
            let count = parts.len().min(PARTS_MOST);
            let mut sent = self.persist(|| {
                // SAFETY: zero bytes are a valid msghdr.
                let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
                message.msg_iov = parts.as_mut_ptr();
                message.msg_iovlen = count as _;
                let fd = self.stream.as_raw_fd();
                // SAFETY: the header refers to `count` parts, which the caller vouches for.
                let sent = unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL) };
                usize::try_from(sent).map_err(|_| io::Error::last_os_error())
            })?;
            while sent > 0 {
                let Some(part) = parts.first_mut() else { break };
                let taken = sent.min(part.iov_len);
                part.iov_base = part.iov_base.cast::<u8>().wrapping_add(taken).cast();
                part.iov_len -= taken;
                sent -= taken;
                if part.iov_len == 0 {
                    parts = &mut parts[1..];
                }
            }
        }
        Ok(())
    }

    /// As [`Link::send_parts`], where long parts are guest memory that is sent again if it changes: they are not copied.
    ///
    /// # Errors
    /// As of that.
    ///
    /// # Safety
    /// As of that; and long parts (of [`gate::WORTH`] bytes) stay memory of a guest, or nobody cares what arrives.
    pub unsafe fn send_memory(&self, parts: &mut [libc::iovec]) -> io::Result<()> {
        let gate = self.gate.get_or_init(|| match Gate::new() {
            Ok(gate) => Some(Mutex::new(gate)),
            Err(error) => {
                log::debug!("memory is copied into the socket: {error}");
                None
            }
        });
        let mut done = 0;
        while let Some(gate) = gate
            && let Some(more) = parts[done..].iter().position(|p| p.iov_len >= gate::WORTH)
        {
            let (before, rest) = parts[done..].split_at_mut(more);
            // SAFETY: the caller's promise.
            unsafe { self.send_parts(before)? };
            done += more;
            // SAFETY: the caller's promise.
            if !unsafe { self.send_through(&lock(gate), &mut rest[0])? } {
                // What is left of it goes the other way, with all that follows.
                break;
            }
            done += 1;
        }
        // SAFETY: the caller's promise.
        unsafe { self.send_parts(&mut parts[done..]) }
    }

    /// Sends a part by reference to its pages; whether that went. If not, the part is what is left.
    ///
    /// # Safety
    /// As of [`Link::send_memory`].
    unsafe fn send_through(&self, gate: &Gate, part: &mut libc::iovec) -> io::Result<bool> {
        while part.iov_len > 0 {
            // SAFETY: the caller's promise.
            let mut taken = match unsafe { gate.take(part.iov_base.cast(), part.iov_len) } {
                Ok(taken) => taken,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::debug!("memory is copied into the socket: {error}");
                    return Ok(false);
                }
            };
            part.iov_base = part.iov_base.cast::<u8>().wrapping_add(taken).cast();
            part.iov_len -= taken;
            while taken > 0 {
                taken -= self.persist(|| gate.pass(self.stream.as_fd(), taken))?;
            }
        }
        Ok(true)
    }

    /// Receives at least one byte and at most `len` to `to`; how many.
    ///
    /// # Errors
    /// The connection's; it ends or stalls.
    ///
    /// # Safety
    /// `len` bytes from `to` on may be written until this returns, and are no reference's target.
    pub unsafe fn receive_to(&self, to: *mut u8, len: usize) -> io::Result<usize> {
        self.persist(|| {
            // SAFETY: the bytes that the caller vouches for.
            let got = unsafe { libc::recv(self.stream.as_raw_fd(), to.cast(), len, 0) };
            match usize::try_from(got) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => Ok(got),
                Err(_) => Err(io::Error::last_os_error()),
            }
        })
    }

    /// Whether the peer has closed its end, without waiting.
    pub fn is_closed(&self) -> bool {
        self.peek() == Some(0)
    }

    /// Without waiting: nothing yet; the end, or an error (0); or something (1).
    fn peek(&self) -> Option<usize> {
        let mut byte = 0u8;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: one byte of ours.
        let got = unsafe {
            let at = (&raw mut byte).cast();
            libc::recv(self.stream.as_raw_fd(), at, 1, flags)
        };
        match usize::try_from(got) {
            Ok(got) => Some(got),
            Err(_) if matches!(Errno::last(), Errno::EAGAIN | Errno::EINTR) => None,
            Err(_) => Some(0),
        }
    }
}

/// Whether this error says that the process at the other end is gone.
#[must_use]
pub fn says_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted
    )
}

fn no_delay(stream: &UnixStream) {
    const LEN: libc::socklen_t = 4;
    let on: i32 = 1;
    // SAFETY: an option whose value is an int of ours. A socket that is not TCP has no such option.
    unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NODELAY,
            (&raw const on).cast(),
            LEN,
        );
    }
}

impl Read for &Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.persist(|| (&self.stream).read(buffer))
    }
}

impl Write for &Link {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.persist(|| (&self.stream).write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has the system take more at once, so that the two sides need not wait for each other all the time. A local socket, as
/// daemons have that relay, holds no more than a fifth of what is sent in one call otherwise; TCP finds out by itself what
/// it needs.
fn room(stream: &UnixStream) {
    use nix::sys::socket::{
        AddressFamily, SockaddrLike, SockaddrStorage, getsockname, setsockopt, sockopt,
    };
    const BYTES: usize = 1 << 20;
    let family = getsockname::<SockaddrStorage>(stream.as_raw_fd()).map(|address| address.family());
    if family != Ok(Some(AddressFamily::Unix)) {
        return;
    }
    // Beyond the administrator's limit where that is allowed; else as far as it goes.
    if setsockopt(stream, sockopt::SndBufForce, &BYTES).is_err()
        && let Err(error) = setsockopt(stream, sockopt::SndBuf, &BYTES)
    {
        log::debug!("a socket's buffer: {error}");
    }
}

/// Bytes as a part for [`Link::send_parts`].
#[must_use]
pub fn part(start: *const u8, len: u64) -> libc::iovec {
    libc::iovec {
        iov_base: start.cast_mut().cast(),
        iov_len: to_usize(len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_parts_arrive_in_order() {
        let (one, other) = UnixStream::pair().unwrap();
        let (one, other) = (
            Link::new(one.into()).unwrap(),
            Link::new(other.into()).unwrap(),
        );
        let data: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let expected = data.clone();
        let sender = std::thread::spawn(move || {
            let mut parts: Vec<_> = data
                .chunks(1999)
                .map(|chunk| part(chunk.as_ptr(), chunk.len() as u64))
                .collect();
            // SAFETY: parts of `data`, which outlives the call.
            unsafe { one.send_parts(&mut parts) }.unwrap();
            one
        });
        let mut got = vec![0; expected.len()];
        (&mut &other).read_exact(&mut got).unwrap();
        assert!(got == expected);
        assert!(!other.is_closed());
        drop(sender.join().unwrap());
        assert!(other.is_closed());
    }

    fn tcp() -> (OwnedFd, OwnedFd) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let one = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one.into(), listener.accept().unwrap().0.into())
    }

    /// Long and short parts, whole pages and others, to a reader that is slow at times.
    #[test]
    fn memory_arrives_in_order() {
        let local = || {
            let (one, other) = UnixStream::pair().unwrap();
            (one.into(), other.into())
        };
        for (one, other) in [local(), tcp()] {
            let (one, other) = (Link::new(one).unwrap(), Link::new(other).unwrap());
            let data: Vec<u8> = (0..26_000_000u32).map(|n| (n % 251) as u8).collect();
            let expected = data.clone();
            let sender = std::thread::spawn(move || {
                let mut rest = &data[..];
                for len in [24, 1 << 20, 3_000_001, 70_000, 1, 4096, 2 << 20, 65_536, 5].repeat(4) {
                    let (first, behind) = rest.split_at(len);
                    let (some, more) = first.split_at(len / 3);
                    rest = behind;
                    let mut parts =
                        [some, more].map(|piece| part(piece.as_ptr(), piece.len() as u64));
                    // SAFETY: parts of `data`, which nobody changes until all of it has been read.
                    unsafe { one.send_memory(&mut parts) }.unwrap();
                }
                let left = rest.len();
                (one, data, left)
            });
            let sent =
                4 * (24 + (1 << 20) + 3_000_001 + 70_000 + 1 + 4096 + (2 << 20) + 65_536 + 5);
            let mut got = vec![0; sent.min(expected.len())];
            for (number, piece) in got.chunks_mut(700_001).enumerate() {
                if number % 9 == 0 {
                    // Longer than the sender waits at a time.
                    std::thread::sleep(2 * STEP);
                }
                (&mut &other).read_exact(piece).unwrap();
            }
            let (one, _data, left) = sender.join().unwrap();
            assert_eq!(got.len() + left, expected.len());
            assert!(got == expected[..got.len()]);
            drop(one);
            assert!(other.is_closed());
        }
    }

    #[test]
    fn memory_to_one_who_is_gone_or_silent_is_given_up() {
        let memory = vec![1u8; 8 << 20];
        let (one, other) = tcp();
        let one = Link::new(one).unwrap();
        drop(other);
        let send = |link: &Link| {
            let mut parts = [part(memory.as_ptr(), memory.len() as u64)];
            // SAFETY: memory that nobody changes.
            unsafe { link.send_memory(&mut parts) }
        };
        // The first may still find room.
        let error = (0..10).find_map(|_| send(&one).err()).unwrap();
        assert!(says_gone(&error), "{error}");
        let (one, _other) = UnixStream::pair().unwrap();
        let one = Link::new(one.into()).unwrap();
        one.be_patient(2 * STEP);
        let error = send(&one).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    }
}
