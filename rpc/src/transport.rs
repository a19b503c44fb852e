//! The bytes under the messages: a Unix socket, with descriptors, or anything else that reads and writes.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use crate::frame::{Decoded, Frame, FrameDecoder, FrameError};

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

/// A connection's bytes. Make one from a [`UnixStream`] by `into()`, or from anything else by [`Transport::new`].
#[derive(Debug)]
pub struct Transport {
    pub(crate) source: Source,
    pub(crate) sink: Sink,
    pub(crate) peer: Option<Peer>,
    pub(crate) secure: bool,
}

impl From<UnixStream> for Transport {
    fn from(stream: UnixStream) -> Self {
        let peer = stream.peer_cred().ok().map(|it| Peer {
            uid: it.uid(),
            gid: it.gid(),
            pid: it.pid(),
        });
        let stream = Arc::new(stream);
        Transport {
            source: Source {
                kind: SourceKind::Unix(Arc::clone(&stream)),
                decoder: FrameDecoder::new(),
            },
            sink: Sink(SinkKind::Unix(stream)),
            peer,
            secure: true,
        }
    }
}

impl Transport {
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
    Unix(Arc<UnixStream>),
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
            SourceKind::Unix(stream) => loop {
                stream.readable().await?;
                match stream.try_read(buf) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    other => return other,
                }
            },
        }
    }

    async fn receive_fd(&mut self) -> io::Result<OwnedFd> {
        match &self.kind {
            SourceKind::Unix(stream) => {
                stream
                    .async_io(Interest::READABLE, || receive_fd(stream.as_raw_fd()))
                    .await
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
        let SourceKind::Unix(stream) = &self.kind else {
            return std::future::pending().await;
        };
        loop {
            match stream.ready(Interest::READABLE).await {
                Ok(ready) if !ready.is_read_closed() => {}
                _ => return,
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

enum SinkKind {
    Unix(Arc<UnixStream>),
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
    /// Sends a message and its descriptors.
    pub(crate) async fn send(&mut self, frame: &Frame) -> io::Result<()> {
        let bytes = frame
            .to_wire()
            .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        match &mut self.0 {
            SinkKind::Other(stream) => {
                if !frame.fds.is_empty() {
                    return Err(io::Error::new(
                        ErrorKind::Unsupported,
                        "this connection cannot pass file descriptors",
                    ));
                }
                stream.write_all(&bytes).await?;
                stream.flush().await
            }
            SinkKind::Unix(stream) => {
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    stream.writable().await?;
                    match stream.try_write(rest) {
                        Ok(0) => return Err(ErrorKind::WriteZero.into()),
                        Ok(sent) => rest = &rest[sent..],
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
                for fd in &frame.fds {
                    use std::os::fd::AsFd;
                    stream
                        .async_io(Interest::WRITABLE, || {
                            send_fd(stream.as_raw_fd(), fd.as_fd())
                        })
                        .await?;
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
