//! The client side of a VMM's control socket (`vmm_api::control`).

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use vmm_api::control::{Answer, Call, Failure, FromVmm, MAX_FRAME, Reply, Request};

/// Why a call to a VMM failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The VMM refused it.
    #[error("{0}")]
    Refused(String),
    /// No answer in time.
    #[error("the VMM does not answer")]
    TimedOut,
    /// The connection has ended.
    #[error("the VMM has closed its control connection")]
    Closed,
}

/// A call that waits for its answer.
#[derive(Debug)]
pub struct Waiting {
    /// What was asked.
    pub call: Call,
    sender: oneshot::Sender<Result<Answer, Failure>>,
}

impl Waiting {
    /// Hands the answer to the caller, if it still waits.
    pub fn answer(self, result: Result<Answer, Failure>) {
        // A caller that has given up does not miss it.
        let _ = self.sender.send(result);
    }
}

type Pending = Arc<Mutex<HashMap<u64, Waiting>>>;

/// A frame, and the descriptors that go with it.
type Outgoing = (Vec<u8>, Vec<OwnedFd>);

/// Sends calls. Whoever reads the frames hands the answers back through [`Control::take`].
#[derive(Debug, Clone)]
pub struct Control {
    requests: Arc<Mutex<mpsc::UnboundedSender<Outgoing>>>,
    pending: Pending,
    next: Arc<AtomicU64>,
}

/// Reads what the VMM sends.
#[derive(Debug)]
pub struct Frames {
    stream: Arc<UnixStream>,
    buffer: Vec<u8>,
}

/// Takes up a connection. Needs the asynchronous runtime; ends with the connection.
///
/// # Errors
/// The system's.
pub fn open(stream: StdUnixStream) -> io::Result<(Control, Frames)> {
    let (requests, frames) = take_up(stream)?;
    let control = Control {
        requests: Arc::new(Mutex::new(requests)),
        pending: Pending::default(),
        next: Arc::new(AtomicU64::new(1)),
    };
    Ok((control, frames))
}

fn take_up(stream: StdUnixStream) -> io::Result<(mpsc::UnboundedSender<Outgoing>, Frames)> {
    stream.set_nonblocking(true)?;
    let stream = Arc::new(UnixStream::from_std(stream)?);
    let (requests, mut queue) = mpsc::unbounded_channel::<Outgoing>();
    let writer = Arc::clone(&stream);
    tokio::spawn(async move {
        while let Some((frame, descriptors)) = queue.recv().await {
            let sent = match pass(&writer, &frame, &descriptors).await {
                Ok(sent) => write_all(&writer, &frame[sent..]).await,
                Err(error) => Err(error),
            };
            if let Err(error) = sent {
                log::debug!("control connection: {error}");
                return;
            }
        }
    });
    let frames = Frames {
        stream,
        buffer: Vec::new(),
    };
    Ok((requests, frames))
}

async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Passes descriptors along with the first bytes of a frame; how many bytes went.
async fn pass(stream: &UnixStream, frame: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
    if descriptors.is_empty() {
        return Ok(0);
    }
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    stream
        .async_io(Interest::WRITABLE, || send_with(stream, frame, &numbers))
        .await
}

/// sendmsg(2) with SCM_RIGHTS.
fn send_with(stream: &UnixStream, bytes: &[u8], numbers: &[RawFd]) -> io::Result<usize> {
    let payload = u32::try_from(size_of_val(numbers)).map_err(io::Error::other)?;
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: CMSG_SPACE and CMSG_LEN only compute; the control buffer has the room they say and
    // the alignment of its header; the message refers to live buffers for the call's duration.
    let sent = unsafe {
        let room = libc::CMSG_SPACE(payload) as usize;
        let mut control = vec![0u64; room.div_ceil(size_of::<u64>())];
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = room as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(payload) as _;
        std::ptr::copy_nonoverlapping(
            numbers.as_ptr().cast::<u8>(),
            libc::CMSG_DATA(header),
            payload as usize,
        );
        libc::sendmsg(
            stream.as_raw_fd(),
            &raw const message,
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

impl Control {
    /// Calls and waits at most `limit`.
    ///
    /// # Errors
    /// The VMM's refusal, silence, or the end of the connection.
    pub async fn call(&self, call: Call, limit: Duration) -> Result<Answer, ControlError> {
        let answer = self.send(call)?;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(failure))) => Err(ControlError::Refused(failure.message)),
            Ok(Err(_)) => Err(ControlError::Closed),
            Err(_) => Err(ControlError::TimedOut),
        }
    }

    /// Sends a call; the receiver gets the answer, or an error when the connection ends.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn send(
        &self,
        call: Call,
    ) -> Result<oneshot::Receiver<Result<Answer, Failure>>, ControlError> {
        self.send_with(call, Vec::new())
    }

    /// As [`Control::send`], and passes descriptors along.
    ///
    /// # Errors
    /// As [`Control::send`].
    pub fn send_with(
        &self,
        call: Call,
        descriptors: Vec<OwnedFd>,
    ) -> Result<oneshot::Receiver<Result<Answer, Failure>>, ControlError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = encode(&Request {
            id,
            call: call.clone(),
            descriptors: u32::try_from(descriptors.len()).unwrap_or(u32::MAX),
        })?;
        let (sender, receiver) = oneshot::channel();
        self.lock().insert(id, Waiting { call, sender });
        let sent = self
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send((frame, descriptors));
        if sent.is_err() {
            self.lock().remove(&id);
            return Err(ControlError::Closed);
        }
        Ok(receiver)
    }

    /// Goes on over another connection, after the end of the one before.
    ///
    /// # Errors
    /// The system's.
    pub fn reopen(&self, stream: StdUnixStream) -> io::Result<Frames> {
        let (requests, frames) = take_up(stream)?;
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner) = requests;
        Ok(frames)
    }

    /// The call that `reply` answers, if there is one.
    pub fn take(&self, reply: &Reply) -> Option<Waiting> {
        self.lock().remove(&reply.id)
    }

    /// Fails every waiting call: the connection has ended.
    pub fn close(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Waiting>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn encode(request: &Request) -> Result<Vec<u8>, ControlError> {
    let body = serde_json::to_vec(request).map_err(|e| ControlError::Refused(e.to_string()))?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|&l| l <= MAX_FRAME)
        .ok_or_else(|| ControlError::Refused("the request is too long".to_owned()))?;
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(body);
    Ok(frame)
}

impl Frames {
    /// The next frame; `None` at the end of the connection. May be given up and called again
    /// without losing anything.
    ///
    /// # Errors
    /// The system's, or a frame that no VMM of ours sends.
    pub async fn next(&mut self) -> io::Result<Option<FromVmm>> {
        loop {
            if let Some(frame) = self.whole_frame()? {
                return Ok(Some(frame));
            }
            self.stream.readable().await?;
            let mut chunk = [0u8; 4096];
            match self.stream.try_read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn whole_frame(&mut self) -> io::Result<Option<FromVmm>> {
        let Some((&length, rest)) = self.buffer.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(length);
        if length > MAX_FRAME {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a frame of {length} bytes"),
            ));
        }
        let length = length as usize;
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = serde_json::from_slice(body)?;
        self.buffer.drain(..4 + length);
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use vmm_api::control::Event;

    use super::*;

    fn frame(value: &FromVmm) -> Vec<u8> {
        let body = serde_json::to_vec(value).unwrap();
        let mut frame = u32::try_from(body.len()).unwrap().to_be_bytes().to_vec();
        frame.extend(body);
        frame
    }

    #[tokio::test]
    async fn answers_find_their_calls_in_pieces_and_out_of_order() {
        let (ours, mut theirs) = StdUnixStream::pair().unwrap();
        let (control, mut frames) = open(ours).unwrap();
        let first = control.send(Call::Pause).unwrap();
        let second = control.send(Call::Resume).unwrap();
        let vmm = std::thread::spawn(move || {
            let mut bytes = [0u8; 4];
            for _ in 0..2 {
                theirs.read_exact(&mut bytes).unwrap();
                let mut body = vec![0; u32::from_be_bytes(bytes) as usize];
                theirs.read_exact(&mut body).unwrap();
                let request: Request = serde_json::from_slice(&body).unwrap();
                assert!(matches!(request.call, Call::Pause | Call::Resume));
            }
            let done = |id| {
                FromVmm::Reply(Reply {
                    id,
                    result: Ok(Answer::Done),
                })
            };
            let mut all = frame(&done(2));
            all.extend(frame(&FromVmm::Event(Event::Paused)));
            all.extend(frame(&done(1)));
            for piece in all.chunks(3) {
                theirs.write_all(piece).unwrap();
            }
        });
        let mut events = 0;
        while let Some(frame) = frames.next().await.unwrap() {
            match frame {
                FromVmm::Reply(reply) => {
                    control.take(&reply).unwrap().answer(reply.result.clone());
                }
                FromVmm::Event(_) => events += 1,
            }
        }
        vmm.join().unwrap();
        assert_eq!(events, 1);
        assert_eq!(first.await.unwrap(), Ok(Answer::Done));
        assert_eq!(second.await.unwrap(), Ok(Answer::Done));
    }

    #[tokio::test]
    async fn silence_and_the_end_are_errors() {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let (control, mut frames) = open(ours).unwrap();
        let silence = control.call(Call::Query, Duration::from_millis(1)).await;
        assert_eq!(silence, Err(ControlError::TimedOut));
        let waiting = control.send(Call::Query).unwrap();
        drop(theirs);
        assert!(frames.next().await.unwrap().is_none());
        control.close();
        assert!(waiting.await.is_err());
    }

    #[tokio::test]
    async fn goes_on_over_another_connection() {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let (control, mut frames) = open(ours).unwrap();
        drop(theirs);
        assert!(frames.next().await.unwrap().is_none());
        control.close();
        let (ours, mut theirs) = StdUnixStream::pair().unwrap();
        let mut frames = control.reopen(ours).unwrap();
        // Who had the handle before reaches the new connection.
        let answer = control.clone().send(Call::Query).unwrap();
        let vmm = std::thread::spawn(move || {
            let mut bytes = [0u8; 4];
            theirs.read_exact(&mut bytes).unwrap();
            let mut body = vec![0; u32::from_be_bytes(bytes) as usize];
            theirs.read_exact(&mut body).unwrap();
            let request: Request = serde_json::from_slice(&body).unwrap();
            let done = FromVmm::Reply(Reply {
                id: request.id,
                result: Ok(Answer::Done),
            });
            theirs.write_all(&frame(&done)).unwrap();
            theirs
        });
        let Some(FromVmm::Reply(reply)) = frames.next().await.unwrap() else {
            panic!("no reply");
        };
        control.take(&reply).unwrap().answer(reply.result.clone());
        assert_eq!(answer.await.unwrap(), Ok(Answer::Done));
        vmm.join().unwrap();
    }

    #[tokio::test]
    async fn nonsense_is_an_error_not_a_panic() {
        for nonsense in [&[0xff; 8][..], b"\0\0\0\x02{}", b"\0\0\0\x01\xff"] {
            let (ours, mut theirs) = StdUnixStream::pair().unwrap();
            let (_control, mut frames) = open(ours).unwrap();
            theirs.write_all(nonsense).unwrap();
            assert!(frames.next().await.is_err());
        }
    }
}
