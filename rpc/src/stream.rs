//! Raw data behind a call: a console, an upload, a download.
//!
//! Both sides send data as they like; there is no window, who doesn't read in time holds the other up. The end has
//! rules:
//! - The server has no more data: it says so by an empty packet ([`StreamWriter::end_of_data`], [`StreamEvent::EndOfData`]).
//! - The client is through: it sends "finish" and waits until the server confirms ([`StreamWriter::finish`] on both
//!   sides; the server sees [`StreamEvent::Finish`] first, and may answer with an error instead).
//! - Either gives up: [`StreamWriter::abort`]; dropping a stream does the same.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};

use crate::error::{ErrorCode, ErrorDomain, RemoteError};
use crate::frame::{Frame, Header, MessageType, Status};
use crate::limits::STREAM_CHUNK_MAX;
use crate::queue::Queue;
use crate::xdr::xdr_structs;

/// Packets that wait for their reader before the connection is held up.
const BACKLOG: usize = 8;

xdr_structs! {
    /// Bytes that are zero and were not sent.
    StreamHole {
        length: i64,
        flags: u32,
    }
}

/// What a stream's reader finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEvent {
    /// Raw data, never empty.
    Data(Vec<u8>),
    /// So many zero bytes that were not sent; only where both sides agreed on holes ([`Stream::allow_holes`]).
    Hole(u64),
    /// The server has no more data. Only clients see it.
    EndOfData,
    /// The client is through and awaits [`StreamWriter::finish`]. Only servers see it.
    Finish,
}

/// Why a stream ended early.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StreamError {
    /// The other side says why.
    #[error("{0}")]
    Remote(RemoteError),
    /// The other side gave up without saying why.
    #[error("the stream was aborted by the other side")]
    Aborted,
    /// The connection is gone.
    #[error("the connection was closed while a stream was open")]
    Disconnected,
    /// It was finished or aborted on this side already.
    #[error("the stream is closed already")]
    Closed,
}

/// Which side of the connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

#[derive(Debug, Default)]
struct State {
    /// The call was answered: data may flow.
    open: bool,
    /// Nothing more is sent.
    closed: bool,
    /// Why it ended early.
    error: Option<StreamError>,
    /// On a client: the server confirmed the end.
    confirmed: bool,
    /// Nobody wants what still comes.
    discard: bool,
    /// The call asked for holes.
    holes: bool,
}

/// What both halves and the connection share.
#[derive(Debug)]
pub(crate) struct Core {
    side: Side,
    header: Header,
    queue: Arc<Queue>,
    streams: Streams,
    state: Mutex<State>,
    changed: Notify,
}

/// The open streams of one connection, by the serial of their call.
#[derive(Debug, Clone, Default)]
pub(crate) struct Streams(Arc<Mutex<HashMap<u32, Entry>>>);

#[derive(Debug, Clone)]
struct Entry {
    core: Arc<Core>,
    sender: mpsc::Sender<StreamEvent>,
}

impl Streams {
    fn map(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are open.
    pub(crate) fn len(&self) -> usize {
        self.map().len()
    }

    /// A new stream that belongs to the call with this header; `None` if the serial has an open stream already.
    pub(crate) fn add(&self, side: Side, header: Header, queue: Arc<Queue>) -> Option<Stream> {
        let mut map = self.map();
        if map.contains_key(&header.serial) {
            return None;
        }
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let core = Arc::new(Core {
            side,
            header,
            queue,
            streams: self.clone(),
            state: Mutex::default(),
            changed: Notify::new(),
        });
        map.insert(
            header.serial,
            Entry {
                core: Arc::clone(&core),
                sender,
            },
        );
        Some(Stream {
            reader: StreamReader {
                core: Arc::clone(&core),
                receiver,
                over: false,
            },
            writer: StreamWriter { core },
        })
    }

    /// The call was answered: data may flow from now on.
    pub(crate) fn open(&self, serial: u32) {
        let entry = self.map().get(&serial).cloned();
        if let Some(entry) = entry {
            entry.core.open();
        }
    }

    /// The call failed, or the connection is gone.
    pub(crate) fn fail(&self, serial: u32, error: StreamError) {
        let entry = self.map().remove(&serial);
        if let Some(entry) = entry {
            entry.core.end(Some(error));
        }
    }

    /// The connection is gone.
    pub(crate) fn fail_all(&self) {
        let all: Vec<Entry> = self.map().drain().map(|(_, entry)| entry).collect();
        for entry in all {
            entry.core.end(Some(StreamError::Disconnected));
        }
    }

    /// Takes a packet that came. What belongs to no open stream is late, and ignored.
    pub(crate) async fn take(&self, frame: Frame) {
        let entry = self.map().get(&frame.header.serial).cloned();
        let Some(Entry { core, sender }) = entry else {
            return;
        };
        if core.header.procedure != frame.header.procedure {
            return;
        }
        if frame.header.kind == MessageType::StreamHole {
            return core.take_hole(&sender, &frame).await;
        }
        match (core.side, frame.header.status) {
            (Side::Server, Status::Continue) if frame.payload.is_empty() => {}
            (Side::Client, Status::Continue) if frame.payload.is_empty() => {
                core.deliver(&sender, StreamEvent::EndOfData).await;
            }
            (_, Status::Continue) => {
                core.deliver(&sender, StreamEvent::Data(frame.payload))
                    .await;
            }
            (Side::Server, Status::Ok) => {
                if !core.deliver(&sender, StreamEvent::Finish).await {
                    // Nobody reads (a download): there is nothing left to fail.
                    core.close_with(Status::Ok, None);
                }
            }
            (Side::Client, Status::Ok) => {
                core.state().confirmed = true;
                core.end(None);
            }
            (Side::Server, status) => {
                let text = match status {
                    Status::Error => "stream aborted at client request".to_owned(),
                    other => format!("stream aborted with unexpected status {}", i32::from(other)),
                };
                core.abort(RemoteError::new(ErrorCode::RPC, ErrorDomain::STREAMS, text));
                core.end(Some(StreamError::Aborted));
            }
            (Side::Client, _) => {
                let error = match crate::xdr::from_bytes::<RemoteError>(&frame.payload) {
                    Ok(error) => StreamError::Remote(error),
                    Err(_) => StreamError::Aborted,
                };
                core.end(Some(error));
            }
        }
    }
}

impl Core {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands an event to the reader, waiting for it if need be; tells whether there is one.
    async fn deliver(&self, sender: &mpsc::Sender<StreamEvent>, event: StreamEvent) -> bool {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = self.state();
                if state.discard || state.error.is_some() {
                    return false;
                }
            }
            tokio::select! {
                permit = sender.reserve() => return match permit {
                    Ok(permit) => {
                        permit.send(event);
                        true
                    }
                    Err(_) => false,
                },
                () = &mut changed => {}
                () = self.queue.closed() => return false,
            }
        }
    }

    async fn take_hole(&self, sender: &mpsc::Sender<StreamEvent>, frame: &Frame) {
        let length = match crate::xdr::from_bytes::<StreamHole>(&frame.payload) {
            Ok(hole) if hole.flags == 0 => u64::try_from(hole.length).ok(),
            _ => None,
        };
        let allowed = self.state().holes;
        match length {
            Some(length) if allowed && frame.header.status == Status::Continue => {
                self.deliver(sender, StreamEvent::Hole(length)).await;
            }
            _ if !allowed => self.abort(RemoteError::rpc("a hole in a stream was not asked for")),
            _ => self.abort(RemoteError::rpc("a hole in a stream makes no sense")),
        }
    }

    fn open(&self) {
        let dropped = {
            let mut state = self.state();
            state.open = true;
            state.closed.then(|| state.error.take()).flatten()
        };
        if let Some(StreamError::Remote(error)) = dropped {
            // It was given up before the call was answered; now the other side can be told.
            self.send(Status::Error, Some(&error));
            self.streams.map().remove(&self.header.serial);
        }
        self.changed.notify_waiters();
    }

    /// No more comes and no more is sent; the reader still gets what came before.
    fn end(&self, error: Option<StreamError>) {
        {
            let mut state = self.state();
            state.open = true;
            state.closed = true;
            if state.error.is_none() {
                state.error = error;
            }
        }
        // With the entry goes the sender, and the reader sees the end.
        self.streams.map().remove(&self.header.serial);
        self.changed.notify_waiters();
    }

    fn send(&self, status: Status, error: Option<&RemoteError>) {
        let header = self.header.answer(MessageType::Stream, status);
        let payload = error
            .and_then(|error| crate::xdr::to_bytes(error).ok())
            .unwrap_or_default();
        // A closed connection needs to be told nothing.
        let _ = self.queue.push(Frame::raw(header, payload));
    }

    /// Closes this side with a last packet, once.
    fn close_with(&self, status: Status, error: Option<RemoteError>) {
        let tell = {
            let mut state = self.state();
            if state.closed {
                return;
            }
            state.closed = true;
            if !state.open {
                state.error = error.clone().map(StreamError::Remote);
            }
            state.open
        };
        if tell {
            self.send(status, error.as_ref());
            if self.side == Side::Server {
                self.streams.map().remove(&self.header.serial);
            }
        }
        self.changed.notify_waiters();
    }

    fn abort(&self, error: RemoteError) {
        match self.side {
            Side::Server => self.close_with(Status::Error, Some(error)),
            // libvirt's clients send no reason.
            Side::Client => self.close_with(Status::Error, None),
        }
    }

    fn ensure_open(&self) -> Result<bool, StreamError> {
        let state = self.state();
        match &state.error {
            Some(error) => Err(error.clone()),
            None if state.closed => Err(StreamError::Closed),
            None => Ok(state.open),
        }
    }

    /// Waits until data may flow.
    async fn opened(&self) -> Result<(), StreamError> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.ensure_open()? {
                return Ok(());
            }
            changed.await;
        }
    }
}

/// Both halves of a stream.
#[derive(Debug)]
pub struct Stream {
    /// What comes.
    pub reader: StreamReader,
    /// What goes.
    pub writer: StreamWriter,
}

impl Stream {
    /// Both sides may skip zeros from now on: a server says so in the function that answers a call whose flags ask for
    /// it; a client by the way it calls ([`crate::client::Client::call_sparse_stream`]).
    pub fn allow_holes(&self) {
        self.writer.core.state().holes = true;
    }
}

/// The half that reads.
#[derive(Debug)]
pub struct StreamReader {
    core: Arc<Core>,
    receiver: mpsc::Receiver<StreamEvent>,
    over: bool,
}

/// The half that writes and ends. Dropping it without [`StreamWriter::finish`] aborts the stream.
#[derive(Debug)]
pub struct StreamWriter {
    core: Arc<Core>,
}

impl StreamReader {
    /// The next event; `None` when the stream is closed and everything was read. Safe to cancel.
    pub async fn next(&mut self) -> Result<Option<StreamEvent>, StreamError> {
        match self.receiver.recv().await {
            Some(event) => Ok(Some(event)),
            None if self.over => Ok(None),
            None => {
                self.over = true;
                match self.core.state().error.clone() {
                    Some(error) => Err(error),
                    None => Ok(None),
                }
            }
        }
    }
}

impl StreamWriter {
    /// Sends data, in packets of at most 262,120 bytes, waiting for room.
    pub async fn write(&self, data: &[u8]) -> Result<(), StreamError> {
        self.core.opened().await?;
        for chunk in data.chunks(STREAM_CHUNK_MAX) {
            self.core.ensure_open()?;
            self.packet(chunk.to_vec()).await?;
        }
        Ok(())
    }

    /// Says that so many zero bytes are not sent. Without [`Stream::allow_holes`] they are sent.
    pub async fn hole(&self, length: u64) -> Result<(), StreamError> {
        self.core.opened().await?;
        if !self.core.state().holes {
            let zeros = vec![0; STREAM_CHUNK_MAX];
            let mut left = length;
            while left > 0 {
                let now = usize::try_from(left).map_or(zeros.len(), |left| left.min(zeros.len()));
                self.write(&zeros[..now]).await?;
                left -= now as u64;
            }
            return Ok(());
        }
        let hole = StreamHole {
            length: i64::try_from(length).unwrap_or(i64::MAX),
            flags: 0,
        };
        let mut header = self.core.header;
        header.kind = MessageType::StreamHole;
        header.status = Status::Continue;
        let payload = crate::xdr::to_bytes(&hole).unwrap_or_default();
        self.core
            .queue
            .push_when_room(Frame::raw(header, payload))
            .await
            .map_err(|_| StreamError::Disconnected)
    }

    /// Says that no more data will come; only a server does.
    pub async fn end_of_data(&self) -> Result<(), StreamError> {
        self.core.opened().await?;
        self.packet(Vec::new()).await
    }

    async fn packet(&self, data: Vec<u8>) -> Result<(), StreamError> {
        let header = self
            .core
            .header
            .answer(MessageType::Stream, Status::Continue);
        self.core
            .queue
            .push_when_room(Frame::raw(header, data))
            .await
            .map_err(|_| StreamError::Disconnected)
    }

    /// A client: says that it is through and waits until the server confirms; data that still come are dropped.
    /// A server: confirms.
    pub async fn finish(self) -> Result<(), StreamError> {
        self.core.opened().await?;
        self.core.close_with(Status::Ok, None);
        match self.core.side {
            Side::Server => Ok(()),
            Side::Client => self.settled().await,
        }
    }

    /// Gives up. A server says why; a client waits until the server has taken note.
    pub async fn abort(self, error: RemoteError) {
        self.core.abort(error);
        if self.core.side == Side::Client && self.core.state().open {
            // However the server took it, it is over.
            let _ = self.settled().await;
        }
    }

    /// A client waits for the server's last packet.
    async fn settled(&self) -> Result<(), StreamError> {
        self.core.state().discard = true;
        self.core.changed.notify_waiters();
        loop {
            let changed = self.core.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = self.core.state();
                if state.confirmed {
                    return Ok(());
                }
                if let Some(error) = &state.error {
                    return Err(error.clone());
                }
            }
            tokio::select! {
                () = &mut changed => {}
                () = self.core.queue.closed() => return Err(StreamError::Disconnected),
            }
        }
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        self.core.abort(RemoteError::new(
            ErrorCode::RPC,
            ErrorDomain::STREAMS,
            "stream had unexpected termination",
        ));
        if self.core.side == Side::Client {
            self.core.state().discard = true;
            self.core.changed.notify_waiters();
        }
    }
}

/// How long a client may take to end a stream after the server's end of data.
const PARTING: Duration = Duration::from_secs(30);

/// A server's side of a console or channel: passes data both ways until one side ends, then ends the stream properly.
///
/// `from` and `to` are the two directions of what the client is connected to. Returns when all is over; an error is
/// that of `from` or `to`, which the client was told.
pub async fn serve_duplex(
    stream: Stream,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let Stream { mut reader, writer } = stream;
    let outward = async {
        let mut chunk = vec![0; 64 * 1024];
        loop {
            match from.read(&mut chunk).await {
                // A pty's master says EIO once nobody has the other side open any more: that is its end.
                Ok(0) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
                Err(error) => return Err(error),
                Ok(got) => {
                    if writer.write(&chunk[..got]).await.is_err() {
                        // The reader learns why and ends it all.
                        return std::future::pending().await;
                    }
                }
            }
        }
    };
    let inward = async {
        loop {
            match reader.next().await {
                Ok(Some(StreamEvent::Data(data))) => to.write_all(&data).await?,
                // Nobody allowed any here.
                Ok(Some(StreamEvent::EndOfData | StreamEvent::Hole(_))) => {}
                Ok(Some(StreamEvent::Finish)) => return Ok(true),
                Ok(None) | Err(_) => return Ok(false),
            }
        }
    };
    let over = tokio::select! {
        over = inward => over,
        over = outward => over.map(|()| false),
    };
    match over {
        Ok(true) => {
            // The client left in the meantime at worst.
            let _ = writer.finish().await;
            Ok(())
        }
        Ok(false) => {
            if writer.end_of_data().await.is_ok() {
                let parting = async {
                    loop {
                        match reader.next().await {
                            Ok(Some(StreamEvent::Finish)) => return true,
                            Ok(Some(_)) => {}
                            Ok(None) | Err(_) => return false,
                        }
                    }
                };
                if tokio::time::timeout(PARTING, parting).await == Ok(true) {
                    let _ = writer.finish().await;
                }
            }
            Ok(())
        }
        Err(error) => {
            writer
                .abort(RemoteError::system(
                    ErrorDomain::STREAMS,
                    &error,
                    "stream had I/O failure",
                ))
                .await;
            Err(error)
        }
    }
}
