//! The bytes under the messages: a Unix socket, with descriptors, or anything else that reads and writes.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as Socket;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use crate::frame::{Decoded, Frame, FrameDecoder, FrameError};
use crate::queue::Outgoing;

/// Who is at the other end of a Unix socket, as the kernel says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The process, where known.
    pub pid: Option<i32>,
}

/// A connection's bytes. Make one from a [`UnixStream`] by [`Transport::unix`], or from anything else by
/// [`Transport::new`].
#[derive(Debug)]
pub struct Transport {
    pub(crate) source: Source,
    pub(crate) sink: Sink,
    pub(crate) peer: Option<Peer>,
    pub(crate) secure: bool,
}

impl Transport {
    /// A transport that can pass descriptors, and knows its peer. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The system's.
    pub fn unix(stream: UnixStream) -> io::Result<Self> {
        let peer = stream.peer_cred().ok().map(|it| Peer {
            uid: it.uid(),
            gid: it.gid(),
            pid: it.pid(),
        });
        // Without an interest in writing: that would wake a thread each time that the peer has read something.
        let socket = watch(stream.into_std()?, Interest::READABLE)?;
        let socket = Arc::new(socket);
        Ok(Transport {
            source: Source {
                kind: SourceKind::Unix(Arc::clone(&socket)),
                decoder: FrameDecoder::new(),
            },
            sink: Sink(SinkKind::Unix(Direct(socket))),
            peer,
            secure: true,
        })
    }

    /// A transport that can pass no descriptors and knows no peer.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Sync + 'static) -> Self {
        let (read, write) = tokio::io::split(stream);
        Transport {
            source: Source {
                kind: SourceKind::Other(Box::new(read)),
                decoder: FrameDecoder::new(),
            },
            sink: Sink(SinkKind::Other(Box::new(write))),
            peer: None,
            secure: false,
        }
    }

    /// The same for a line that nobody can listen to.
    pub fn secure(stream: impl AsyncRead + AsyncWrite + Send + Sync + 'static) -> Self {
        Transport {
            secure: true,
            ..Self::new(stream)
        }
    }
}

/// Why no more messages come.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// What came is not a message.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Reading failed; `UnexpectedEof` if the peer left in the middle of a message.
    #[error(transparent)]
    Io(#[from] io::Error),
}

enum SourceKind {
    Unix(Arc<AsyncFd<Socket>>),
    Other(Box<dyn AsyncRead + Send + Sync + Unpin>),
}

/// The half that reads.
pub(crate) struct Source {
    kind: SourceKind,
    decoder: FrameDecoder,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("decoder", &self.decoder)
            .finish_non_exhaustive()
    }
}

impl Source {
    /// The next message with its descriptors; `None` when the peer left between two messages.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, ReadError> {
        // As large as needed, so that a client which says nothing costs nothing.
        let mut chunk = Vec::new();
        loop {
            let wanted = self.decoder.wanted();
            if chunk.len() < wanted {
                chunk = vec![0; wanted];
            }
            let got = self.read(&mut chunk[..wanted]).await?;
            if got == 0 {
                return if self.decoder.is_idle() {
                    Ok(None)
                } else {
                    Err(io::Error::new(
                        ErrorKind::UnexpectedEof,
                        "the peer left in the middle of a message",
                    )
                    .into())
                };
            }
            if let Some(Decoded { mut frame, fds }) = self.decoder.feed(&chunk[..got])? {
                for _ in 0..fds {
                    frame.fds.push(self.receive_fd().await?);
                }
                return Ok(Some(frame));
            }
        }
    }

    async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.kind {
            SourceKind::Other(stream) => stream.read(buf).await,
            SourceKind::Unix(socket) => {
                let read = |mut socket: &Socket| io::Read::read(&mut socket, buf);
                socket.async_io(Interest::READABLE, read).await
            }
        }
    }

    async fn receive_fd(&mut self) -> io::Result<OwnedFd> {
        match &self.kind {
            SourceKind::Unix(socket) => {
                let receive = |socket: &Socket| receive_fd(socket.as_raw_fd());
                socket.async_io(Interest::READABLE, receive).await
            }
            SourceKind::Other(_) => Err(io::Error::new(
                ErrorKind::Unsupported,
                "this connection cannot pass file descriptors",
            )),
        }
    }

    /// Resolves when the peer has left, also while there is something to read; never for what is no Unix socket.
    pub(crate) async fn hang_up(&self) {
        /// How often it is looked at while there is something to read, which would end any wait at once.
        const INTERVAL: Duration = Duration::from_millis(200);
        let SourceKind::Unix(socket) = &self.kind else {
            return std::future::pending().await;
        };
        loop {
            match socket.ready(Interest::READABLE).await {
                Ok(guard) if !guard.ready().is_read_closed() => {}
                _ => return,
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

/// A socket that says when it can be read or written.
fn watch(socket: Socket, interest: Interest) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: a socket owns its descriptor, and gives the same one for as long as it lives; nobody gets it mutably.
    let watched = unsafe { AsyncFd::register_with_interest(socket, interest) };
    Ok(watched?)
}

/// A Unix socket that somebody writes to at once.
#[derive(Debug, Clone)]
pub(crate) struct Direct(Arc<AsyncFd<Socket>>);

impl Direct {
    /// Writes as much as there is room for, which may be nothing.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut socket = self.0.get_ref();
        let mut sent = 0;
        while sent < bytes.len() {
            match io::Write::write(&mut socket, &bytes[sent..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(more) => sent += more,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sent)
    }

    /// Waits until there is room.
    async fn room(&self) -> io::Result<()> {
        // A descriptor of its own, which can be watched for that.
        let socket = self.0.get_ref().as_fd().try_clone_to_owned()?;
        let socket = watch(Socket::from(socket), Interest::WRITABLE)?;
        socket.writable().await.map(drop)
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        loop {
            bytes = &bytes[self.write(bytes)?..];
            if bytes.is_empty() {
                return Ok(());
            }
            self.room().await?;
        }
    }

    async fn send_fd(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        loop {
            match send_fd(self.0.as_raw_fd(), fd) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.room().await?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

enum SinkKind {
    Unix(Direct),
    Other(Box<dyn AsyncWrite + Send + Sync + Unpin>),
}

/// The half that writes.
pub(crate) struct Sink(SinkKind);

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sink")
    }
}

impl Sink {
    /// The way around the task that writes, where there is one.
    pub(crate) fn direct(&self) -> Option<Direct> {
        match &self.0 {
            SinkKind::Unix(direct) => Some(direct.clone()),
            SinkKind::Other(_) => None,
        }
    }

    /// Sends a message and its descriptors, or what is left of one.
    pub(crate) async fn send(&mut self, what: &Outgoing) -> io::Result<()> {
        let wire;
        let (bytes, fds) = match what {
            Outgoing::Rest(bytes) => (bytes, &[][..]),
            Outgoing::Frame(frame) => {
                wire = frame
                    .to_wire()
                    .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
                (&wire, &frame.fds[..])
            }
        };
        match &mut self.0 {
            SinkKind::Other(_) if !fds.is_empty() => Err(io::Error::new(
                ErrorKind::Unsupported,
                "this connection cannot pass file descriptors",
            )),
            SinkKind::Other(stream) => {
                stream.write_all(bytes).await?;
                stream.flush().await
            }
            SinkKind::Unix(socket) => {
                socket.write_all(bytes).await?;
                for fd in fds {
                    socket.send_fd(fd.as_fd()).await?;
                }
                Ok(())
            }
        }
    }
}

/// Room for one control message with one descriptor, aligned as the kernel wants it.
#[repr(C)]
union Control {
    header: libc::cmsghdr,
    bytes: [u8; 64],
}

/// The message header of one byte and one control block.
fn message(iov: &mut libc::iovec, control: &mut Control, control_len: usize) -> libc::msghdr {
    // SAFETY: all zero bytes are a valid `msghdr`: null pointers and zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    message.msg_control = std::ptr::from_mut(control).cast();
    message.msg_controllen = control_len;
    message
}

/// Bytes of a descriptor.
const FD_SIZE: libc::c_uint = size_of::<libc::c_int>() as libc::c_uint;

/// Sends one byte with a descriptor.
fn send_fd(socket: i32, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = 0u8;
    let mut iov = libc::iovec {
        iov_base: std::ptr::from_mut(&mut byte).cast(),
        iov_len: 1,
    };
    let mut control = Control { bytes: [0; 64] };
    // SAFETY: a pure computation.
    let space = unsafe { libc::CMSG_SPACE(FD_SIZE) } as usize;
    let message = message(&mut iov, &mut control, space);
    // SAFETY: `message` points at `control`, which is aligned as a header, zeroed, and larger than `space`; so the
    // first header and one descriptor behind it are inside. `iov` and `byte` live until `sendmsg` returns.
    let sent = unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(FD_SIZE) as _;
        libc::CMSG_DATA(header)
            .cast::<libc::c_int>()
            .write_unaligned(fd.as_raw_fd());
        libc::sendmsg(socket, &message, libc::MSG_NOSIGNAL)
    };
    match sent {
        1 => Ok(()),
        0 => Err(ErrorKind::WriteZero.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Receives one byte and the descriptor that comes with it.
fn receive_fd(socket: i32) -> io::Result<OwnedFd> {
    let mut byte = 0u8;
    let mut iov = libc::iovec {
        iov_base: std::ptr::from_mut(&mut byte).cast(),
        iov_len: 1,
    };
    let mut control = Control { bytes: [0; 64] };
    // SAFETY: a pure computation. The room is for exactly one descriptor: the kernel closes any more by itself.
    let space = unsafe { libc::CMSG_LEN(FD_SIZE) } as usize;
    let mut message = message(&mut iov, &mut control, space);
    // SAFETY: `message` points at buffers that live and are as long as stated.
    match unsafe { libc::recvmsg(socket, &mut message, libc::MSG_CMSG_CLOEXEC) } {
        0 => return Err(ErrorKind::UnexpectedEof.into()),
        1 => {}
        _ => return Err(io::Error::last_os_error()),
    }
    // SAFETY: the kernel filled `control` and set its length in `message`; the header is looked at only if there is
    // one, and the descriptor only if the header says that one is there. It is new and nobody else's.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        if header.is_null()
            || (*header).cmsg_level != libc::SOL_SOCKET
            || (*header).cmsg_type != libc::SCM_RIGHTS
            || (*header).cmsg_len != libc::CMSG_LEN(FD_SIZE) as _
        {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "a file descriptor is missing behind a message",
            ));
        }
        Ok(OwnedFd::from_raw_fd(
            libc::CMSG_DATA(header)
                .cast::<libc::c_int>()
                .read_unaligned(),
        ))
    }
}
