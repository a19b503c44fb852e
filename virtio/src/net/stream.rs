//! A stream socket that carries frames, each after its length as a big-endian `u32`: what passt
//! and QEMU's `-netdev stream` speak.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::backend::{Backend, HEADER, LONGEST_FRAME, List, Trouble};

/// Bytes of the length before each frame.
const PREFIX: usize = 4;
/// Read from the socket at a time: several of the longest frames.
const CHUNK: usize = 256 << 10;
/// Shortest frame: an Ethernet header.
const SHORTEST_FRAME: usize = 14;

/// One connected socket. It has no offloads: headers are all zeroes.
#[derive(Debug)]
pub struct Stream {
    /// `None` when the peer is gone.
    socket: Option<OwnedFd>,
    /// Received and not yet taken: `start..end`.
    input: Box<[u8]>,
    start: usize,
    end: usize,
    /// The end of a frame the socket had no room for.
    output: Vec<u8>,
    sent: usize,
    /// Buffers of the frame being sent.
    list: List,
}

impl Stream {
    /// Takes over a connected stream socket.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let status = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(status | OFlag::O_NONBLOCK))?;
        Ok(Self {
            socket: Some(socket),
            input: vec![0; CHUNK].into_boxed_slice(),
            start: 0,
            end: 0,
            output: Vec::new(),
            sent: 0,
            list: List::default(),
        })
    }

    fn gone(&mut self) -> Trouble {
        self.socket = None;
        self.output.clear();
        self.sent = 0;
        Trouble::Gone
    }

    /// The length of the frame at `start`, when it is there as a whole.
    fn complete(&mut self) -> Result<Option<usize>, Trouble> {
        let input = &self.input[self.start..self.end];
        let Some((length, rest)) = input.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length > LONGEST_FRAME {
            log::error!("network stream: a frame of {length} bytes; the connection is given up");
            return Err(self.gone());
        }
        Ok((rest.len() >= length).then_some(length))
    }

    /// Reads more from the socket.
    fn fill(&mut self) -> Result<(), Trouble> {
        let Some(socket) = &self.socket else {
            return Err(Trouble::Gone);
        };
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.input.len() - self.start < PREFIX + LONGEST_FRAME {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        match nix::unistd::read(socket, &mut self.input[self.end..]) {
            Ok(0) => Err(self.gone()),
            Ok(read) => {
                self.end += read;
                Ok(())
            }
            Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => match io::Error::from(error).into() {
                Trouble::Later => Err(Trouble::Later),
                // Bytes may be missing: no frame's beginning would be found again.
                _ => Err(self.gone()),
            },
        }
    }
}

/// Sends without waiting and without `SIGPIPE`.
///
/// # Safety
/// Every buffer is mapped.
unsafe fn send(socket: &OwnedFd, buffers: &mut [libc::iovec]) -> io::Result<usize> {
    // SAFETY: all zeroes is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.as_mut_ptr();
    message.msg_iovlen = buffers.len();
    // SAFETY: the message points to the caller's buffers, which the caller vouches for.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Copies `data` to `buffers`, cut to their size.
///
/// # Safety
/// As [`Backend::receive`].
unsafe fn scatter(buffers: &[libc::iovec], mut skip: usize, mut data: &[u8]) {
    for buffer in buffers {
        let start = skip.min(buffer.iov_len);
        skip -= start;
        let (now, rest) = data.split_at((buffer.iov_len - start).min(data.len()));
        // SAFETY: `start + now.len()` bytes are within the buffer, which the caller vouches for.
        unsafe {
            let to = buffer.iov_base.cast::<u8>().add(start);
            std::ptr::copy_nonoverlapping(now.as_ptr(), to, now.len());
        }
        data = rest;
    }
}

impl Backend for Stream {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    fn offloads(&self) -> u64 {
        0
    }

    fn set_offloads(&mut self, _offloads: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_active(&mut self, _active: bool) -> io::Result<()> {
        Ok(())
    }

    unsafe fn receive(&mut self, buffers: &[libc::iovec]) -> Result<usize, Trouble> {
        let room: usize = buffers.iter().map(|b| b.iov_len).sum();
        loop {
            if self.socket.is_none() {
                return Err(Trouble::Gone);
            }
            let Some(length) = self.complete()? else {
                self.fill()?;
                continue;
            };
            let frame = self.start + PREFIX..self.start + PREFIX + length;
            self.start = frame.end;
            if length < SHORTEST_FRAME {
                return Err(Trouble::Refused(io::Error::other("a frame too short")));
            }
            // SAFETY: the caller vouches for the buffers.
            unsafe {
                scatter(buffers, 0, &[0; HEADER]);
                scatter(buffers, HEADER, &self.input[frame]);
            }
            return Ok(room.min(HEADER + length));
        }
    }

    unsafe fn send(&mut self, buffers: &[libc::iovec], len: usize) -> Result<(), Trouble> {
        self.flush()?;
        let Some(socket) = &self.socket else {
            return Err(Trouble::Gone);
        };
        let length = len - HEADER;
        let prefix = u32::try_from(length)
            .map_err(|_| Trouble::Refused(io::Error::other("a frame too long")))?
            .to_be_bytes();
        let list = &mut self.list.0;
        list.clear();
        list.push(libc::iovec {
            iov_base: prefix.as_ptr().cast_mut().cast(),
            iov_len: PREFIX,
        });
        list.extend(&buffers[1..]);
        // SAFETY: the prefix lives till the end, and the caller vouches for the rest.
        match unsafe { send(socket, list) } {
            Ok(sent) if sent == PREFIX + length => Ok(()),
            Ok(sent) => {
                // The rest must go before anything else: it is kept.
                self.output.extend(&prefix[sent.min(PREFIX)..]);
                let mut skip = sent.saturating_sub(PREFIX);
                for buffer in &buffers[1..] {
                    let start = skip.min(buffer.iov_len);
                    skip -= start;
                    let (from, len) = (self.output.len(), buffer.iov_len - start);
                    self.output.resize(from + len, 0);
                    // SAFETY: within the buffer, which the caller vouches for; the room was just
                    // made.
                    unsafe {
                        std::ptr::copy_nonoverlapping(
                            buffer.iov_base.cast::<u8>().add(start),
                            self.output[from..].as_mut_ptr(),
                            len,
                        );
                    }
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(Trouble::Later),
            Err(error) => match error.into() {
                Trouble::Gone => Err(self.gone()),
                trouble => Err(trouble),
            },
        }
    }

    fn flush(&mut self) -> Result<(), Trouble> {
        while self.sent < self.output.len() {
            let Some(socket) = &self.socket else {
                return Err(Trouble::Gone);
            };
            let rest = &self.output[self.sent..];
            let mut buffers = [libc::iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            }];
            // SAFETY: the buffer is our own.
            match unsafe { send(socket, &mut buffers) } {
                Ok(sent) => self.sent += sent,
                Err(error) => match error.into() {
                    Trouble::Later => return Err(Trouble::Later),
                    // The middle of a frame can't be left out.
                    _ => return Err(self.gone()),
                },
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Stream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, Stream::new(theirs.into()).unwrap())
    }

    fn receive(stream: &mut Stream, sizes: &[usize]) -> Result<Vec<u8>, Trouble> {
        let mut room: Vec<Vec<u8>> = sizes.iter().map(|n| vec![0xee; *n]).collect();
        let buffers: Vec<libc::iovec> = room
            .iter_mut()
            .map(|b| libc::iovec {
                iov_base: b.as_mut_ptr().cast(),
                iov_len: b.len(),
            })
            .collect();
        // SAFETY: the buffers are our own.
        let len = unsafe { stream.receive(&buffers) }?;
        let mut all = room.concat();
        all.truncate(len);
        Ok(all)
    }

    fn send_all(stream: &mut Stream, frame: &[u8]) -> Result<(), Trouble> {
        let header = [0; HEADER];
        let (first, second) = frame.split_at(7);
        let buffers: Vec<libc::iovec> = [&header[..], first, second]
            .iter()
            .map(|b| libc::iovec {
                iov_base: b.as_ptr().cast_mut().cast(),
                iov_len: b.len(),
            })
            .collect();
        // SAFETY: the buffers are our own.
        unsafe { stream.send(&buffers, HEADER + frame.len()) }
    }

    fn frame(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn frames_come_in_pieces_and_several_at_once() {
        let (mut peer, mut stream) = pair();
        let mut bytes = Vec::new();
        for length in [14, 1514, LONGEST_FRAME, 60] {
            bytes.extend((length as u32).to_be_bytes());
            bytes.extend(frame(length));
        }
        let writer = std::thread::spawn(move || {
            for piece in bytes.chunks(1000) {
                peer.write_all(piece).unwrap();
            }
            peer
        });
        for length in [14, 1514, LONGEST_FRAME, 60] {
            let got = loop {
                match receive(&mut stream, &[5, 30, 70_000]) {
                    Err(Trouble::Later) => std::thread::yield_now(),
                    other => break other.unwrap(),
                }
            };
            assert_eq!(got[..HEADER], [0; HEADER]);
            assert_eq!(got[HEADER..], frame(length));
        }
        drop(writer.join().unwrap());
        assert!(matches!(receive(&mut stream, &[2000]), Err(Trouble::Gone)));
        assert!(stream.fd().is_none());
    }

    #[test]
    fn a_length_beyond_all_sense_ends_the_connection() {
        let (mut peer, mut stream) = pair();
        peer.write_all(&[0xff; 100]).unwrap();
        assert!(matches!(receive(&mut stream, &[100]), Err(Trouble::Gone)));
    }

    #[test]
    fn a_runt_is_refused_and_the_next_frame_taken() {
        let (mut peer, mut stream) = pair();
        peer.write_all(&[0, 0, 0, 1, 9]).unwrap();
        peer.write_all(&[&[0, 0, 0, 20][..], &frame(20)].concat())
            .unwrap();
        let first = receive(&mut stream, &[100]);
        assert!(matches!(first, Err(Trouble::Refused(_))));
        assert_eq!(receive(&mut stream, &[100]).unwrap()[HEADER..], frame(20));
    }

    #[test]
    fn a_frame_longer_than_the_buffers_is_cut() {
        let (mut peer, mut stream) = pair();
        peer.write_all(&[&[0, 0, 0, 200][..], &frame(200)].concat())
            .unwrap();
        assert_eq!(receive(&mut stream, &[100]).unwrap().len(), 100);
    }

    #[test]
    fn a_slow_peer_gets_whole_frames() {
        let (mut peer, mut stream) = pair();
        let mut sent = 0;
        while send_all(&mut stream, &frame(60_000)).is_ok() {
            sent += 1;
            assert!(sent < 1000, "it never fills up");
        }
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            peer.read_to_end(&mut all).unwrap();
            all
        });
        while matches!(stream.flush(), Err(Trouble::Later)) {
            std::thread::yield_now();
        }
        drop(stream);
        let all = reader.join().unwrap();
        assert_eq!(all.len(), sent * 60_004);
        for piece in all.chunks(60_004) {
            assert_eq!(piece[..4], 60_000_u32.to_be_bytes());
            assert_eq!(piece[4..], frame(60_000));
        }
    }

    #[test]
    fn a_peer_that_is_gone_is_noticed_by_the_sender() {
        let (peer, mut stream) = pair();
        drop(peer);
        assert!(matches!(
            send_all(&mut stream, &frame(100)),
            Err(Trouble::Gone)
        ));
        assert!(stream.fd().is_none());
    }
}
