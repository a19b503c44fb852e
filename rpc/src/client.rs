//! The client's side: connect, open, call, receive events.
//!
//! A [`Client`] is cheap to clone and may be used by many tasks at once; answers find their calls by number. It answers
//! the server's keepalive questions, and asks its own if configured and if the server can answer.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use crate::args::{ConnectOpenArgs, ConnectSupportsFeatureArgs};
use crate::error::{ErrorCode, RemoteError};
use crate::frame::{Frame, Header, MessageType, Status};
pub use crate::keepalive::Keepalive;
use crate::limits::FDS_MAX;
use crate::procs::{self, KEEPALIVE_PROGRAM, Procedure, QEMU_PROGRAM, REMOTE_PROGRAM};
use crate::queue::Queue;
use crate::stream::{Side, Stream, StreamError, Streams};
use crate::transport::{Sink, Source, Transport};
use crate::xdr::{Decode, Encode, XdrError, from_bytes, to_bytes};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server says why.
    #[error("{0}")]
    Remote(RemoteError),
    /// The socket cannot be reached, or failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The connection is gone.
    #[error("{0}")]
    Disconnected(String),
    /// What came does not follow the protocol, or what was to go is beyond its limits.
    #[error("protocol error: {0}")]
    Xdr(#[from] XdrError),
    /// A stream ended early.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The server wants a way to log in that is not there.
    #[error("the server wants an authentication that is not supported (types {0:?})")]
    Authentication(Vec<i32>),
}

impl ClientError {
    /// The server's error, if it is one.
    pub fn remote(&self) -> Option<&RemoteError> {
        match self {
            ClientError::Remote(error) | ClientError::Stream(StreamError::Remote(error)) => {
                Some(error)
            }
            _ => None,
        }
    }

    /// The code of the server's error, if it is one.
    pub fn code(&self) -> Option<ErrorCode> {
        self.remote().map(|error| error.code)
    }
}

/// How a client behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientConfig {
    /// Whether and how a server that can answer is asked whether it is alive.
    pub keepalive: Option<Keepalive>,
    /// How long connecting to the socket may take.
    pub connect_timeout: Duration,
}

impl Default for ClientConfig {
    /// Every 5 seconds, six times at most: as virsh.
    fn default() -> Self {
        ClientConfig {
            keepalive: Some(Keepalive {
                interval: Duration::from_secs(5),
                count: 6,
            }),
            connect_timeout: Duration::from_secs(30),
        }
    }
}

/// Something the server said unasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The number of the event's procedure.
    pub procedure: i32,
    /// The message, encoded.
    pub payload: Vec<u8>,
}

impl Event {
    /// The message, if this is that event.
    ///
    /// ```
    /// # fn show(event: &rpc::client::Event) {
    /// if let Some(Ok(message)) = event.get(rpc::procs::DOMAIN_EVENT_CALLBACK_LIFECYCLE) {
    ///     println!("{} {}", message.msg.dom.name, message.msg.event);
    /// }
    /// # }
    /// ```
    pub fn get<A: Decode>(&self, procedure: Procedure<A, ()>) -> Option<Result<A, XdrError>> {
        (self.procedure == procedure.number()).then(|| from_bytes(&self.payload))
    }
}

/// Events that wait for a program that doesn't take them; later ones are lost, with a warning.
const EVENTS_MAX: usize = 16_384;
/// `VIR_CONNECT_RO`.
const OPEN_READ_ONLY: u32 = 1;
/// `VIR_DRV_FEATURE_PROGRAM_KEEPALIVE`.
const FEATURE_KEEPALIVE: i32 = 10;
/// `REMOTE_AUTH_NONE`.
const AUTH_NONE: i32 = 0;
/// `REMOTE_AUTH_POLKIT`: the server looks for itself who we are.
const AUTH_POLKIT: i32 = 2;
/// What is said of a server that does not answer when it is asked whether it is alive.
const SILENT: &str = "connection closed due to keepalive timeout";
/// How long closing waits for the server's answer.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

type Waiting = HashMap<u32, oneshot::Sender<Frame>>;

/// A connection to a server.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ClientConfig,
    queue: Arc<Queue>,
    streams: Streams,
    serial: AtomicU32,
    /// The calls without an answer; `None` once the connection is gone.
    waiting: Mutex<Option<Waiting>>,
    /// Why it is gone.
    reason: Mutex<Option<String>>,
    heard: Mutex<Instant>,
    /// The server can answer keepalives.
    keepalive: AtomicBool,
    events: Mutex<Option<mpsc::Receiver<Event>>>,
    want_events: AtomicBool,
}

/// Closes the connection with the last clone of the client; the task that serves it holds none. Streams end with it.
impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.end();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    /// Connects to a Unix socket. Nothing is said yet: [`Client::open`] comes next.
    pub async fn connect_unix(
        path: impl AsRef<Path>,
        config: ClientConfig,
    ) -> Result<Client, ClientError> {
        let connecting = UnixStream::connect(path.as_ref());
        let stream = tokio::time::timeout(config.connect_timeout, connecting)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        Ok(Client::new(Transport::unix(stream)?, config))
    }

    /// A client on a connection that is there already. Must be called within a tokio runtime.
    pub fn new(transport: Transport, config: ClientConfig) -> Client {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let inner = Arc::new(Inner {
            config,
            queue: Arc::new(Queue::new(&transport)),
            streams: Streams::default(),
            serial: AtomicU32::new(0),
            waiting: Mutex::new(Some(Waiting::new())),
            reason: Mutex::default(),
            heard: Mutex::new(Instant::now()),
            keepalive: AtomicBool::new(false),
            events: Mutex::new(Some(receiver)),
            want_events: AtomicBool::new(false),
        });
        tokio::spawn(run(
            transport,
            Task {
                inner: Arc::downgrade(&inner),
                queue: Arc::clone(&inner.queue),
                streams: inner.streams.clone(),
                events,
            },
        ));
        Client { inner }
    }

    /// What every connection begins with: authentication, keepalive, and opening `name` (a URI without transport).
    /// Returns what the server says against it.
    pub async fn open(&self, name: Option<&str>, read_only: bool) -> Result<(), ClientError> {
        let types = self.first_call(procs::AUTH_LIST, &()).await?.types.0;
        if types.contains(&AUTH_NONE) {
            // Nothing is to be proved.
        } else if types.contains(&AUTH_POLKIT) {
            self.call(procs::AUTH_POLKIT, &()).await?;
        } else {
            return Err(ClientError::Authentication(types));
        }
        if self.inner.config.keepalive.is_some() {
            let args = ConnectSupportsFeatureArgs {
                feature: FEATURE_KEEPALIVE,
            };
            match self
                .first_call(procs::CONNECT_SUPPORTS_FEATURE, &args)
                .await
            {
                Ok(answer) => self
                    .inner
                    .keepalive
                    .store(answer.supported != 0, Ordering::Release),
                // An old server; it is not asked then.
                Err(ClientError::Remote(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let flags = if read_only { OPEN_READ_ONLY } else { 0 };
        self.call(
            procs::CONNECT_OPEN,
            &ConnectOpenArgs {
                name: name.map(str::to_owned),
                flags,
            },
        )
        .await
    }

    /// As [`Client::call`], for what is asked before the server can be asked whether it is alive, and what nobody has
    /// to think about: whoever is silent for as long as a dead peer may be is given up.
    async fn first_call<A: Encode, R: Decode>(
        &self,
        procedure: Procedure<A, R>,
        args: &A,
    ) -> Result<R, ClientError> {
        let call = self.call(procedure, args);
        let Some(Keepalive { interval, count }) = self.inner.config.keepalive else {
            return call.await;
        };
        let limit = interval.saturating_mul(count.saturating_add(1));
        let answer = tokio::time::timeout(limit, call).await;
        answer.unwrap_or_else(|_| Err(ClientError::Disconnected(SILENT.to_owned())))
    }

    /// Calls a procedure and waits for its answer.
    pub async fn call<A: Encode, R: Decode>(
        &self,
        procedure: Procedure<A, R>,
        args: &A,
    ) -> Result<R, ClientError> {
        let header = Header::call(procedure, self.next_serial());
        let frame = self.exchange(Frame::new(header, args)?).await?;
        Ok(from_bytes(&frame.payload)?)
    }

    /// Calls a procedure that raw data belong to.
    pub async fn call_stream<A: Encode, R: Decode>(
        &self,
        procedure: Procedure<A, R>,
        args: &A,
    ) -> Result<(R, Stream), ClientError> {
        self.start_stream(procedure, args, false).await
    }

    /// The same for a call whose flags say that zeros may be skipped.
    pub async fn call_sparse_stream<A: Encode, R: Decode>(
        &self,
        procedure: Procedure<A, R>,
        args: &A,
    ) -> Result<(R, Stream), ClientError> {
        self.start_stream(procedure, args, true).await
    }

    async fn start_stream<A: Encode, R: Decode>(
        &self,
        procedure: Procedure<A, R>,
        args: &A,
        holes: bool,
    ) -> Result<(R, Stream), ClientError> {
        let header = Header::call(procedure, self.next_serial());
        let frame = Frame::new(header, args)?;
        let Some(stream) =
            self.inner
                .streams
                .add(Side::Client, header, Arc::clone(&self.inner.queue))
        else {
            return Err(ClientError::Stream(StreamError::Closed));
        };
        if holes {
            stream.allow_holes();
        }
        let answer = match self.exchange(frame).await {
            Ok(frame) => from_bytes(&frame.payload).map_err(ClientError::from),
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) => Ok((answer, stream)),
            Err(error) => {
                self.inner.streams.fail(header.serial, StreamError::Closed);
                Err(error)
            }
        }
    }

    /// Calls a procedure with descriptors, and returns those that came with the answer.
    pub async fn call_with_fds<A: Encode, R: Decode>(
        &self,
        procedure: Procedure<A, R>,
        args: &A,
        fds: Vec<OwnedFd>,
    ) -> Result<(R, Vec<OwnedFd>), ClientError> {
        if fds.len() > FDS_MAX {
            return Err(XdrError::TooLong {
                len: fds.len(),
                max: FDS_MAX,
            }
            .into());
        }
        let mut header = Header::call(procedure, self.next_serial());
        if !fds.is_empty() {
            header.kind = MessageType::CallWithFds;
        }
        let frame = self
            .exchange(Frame {
                header,
                payload: to_bytes(args)?,
                fds,
            })
            .await?;
        Ok((from_bytes(&frame.payload)?, frame.fds))
    }

    /// The events from now on. There is one receiver: `None` if it was taken before.
    pub fn take_events(&self) -> Option<mpsc::Receiver<Event>> {
        let receiver = lock(&self.inner.events).take()?;
        self.inner.want_events.store(true, Ordering::Release);
        Some(receiver)
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.inner.queue.is_closed()
    }

    /// Resolves when the connection is gone.
    pub async fn closed(&self) {
        self.inner.queue.closed().await;
    }

    /// Says goodbye and closes the connection, also for all clones.
    pub async fn close(self) -> Result<(), ClientError> {
        let goodbye = self.call(procs::CONNECT_CLOSE, &());
        let result = tokio::time::timeout(CLOSE_TIMEOUT, goodbye).await;
        self.inner.queue.close();
        match result {
            Ok(result) => result,
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        }
    }

    fn next_serial(&self) -> u32 {
        self.inner.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a call and waits for its answer, which is good.
    async fn exchange(&self, frame: Frame) -> Result<Frame, ClientError> {
        let call = frame.header;
        if frame.wire_len() > crate::limits::MESSAGE_MAX {
            let max = crate::limits::MESSAGE_MAX;
            return Err(XdrError::TooLong {
                len: frame.wire_len(),
                max,
            }
            .into());
        }
        let (sender, receiver) = oneshot::channel();
        match lock(&self.inner.waiting).as_mut() {
            Some(waiting) => waiting.insert(call.serial, sender),
            None => return Err(self.disconnected()),
        };
        // Whoever drops this call does not leave its number behind.
        let _forget = Forget {
            inner: &self.inner,
            serial: call.serial,
        };
        if self.inner.queue.push_when_room(frame).await.is_err() {
            return Err(self.disconnected());
        }
        let answer = receiver.await.map_err(|_| self.disconnected())?;
        match answer.header.status {
            Status::Ok => Ok(answer),
            _ => Err(ClientError::Remote(
                from_bytes::<RemoteError>(&answer.payload)?.for_client(),
            )),
        }
    }

    fn disconnected(&self) -> ClientError {
        let reason = lock(&self.inner.reason).clone();
        ClientError::Disconnected(reason.unwrap_or_else(|| "client socket is closed".to_owned()))
    }
}

/// Forgets a call that nobody waits for any more.
struct Forget<'a> {
    inner: &'a Inner,
    serial: u32,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = lock(&self.inner.waiting).as_mut() {
            waiting.remove(&self.serial);
        }
    }
}

/// What the task that serves the connection has. Not the client itself, which would then never be dropped.
struct Task {
    inner: std::sync::Weak<Inner>,
    queue: Arc<Queue>,
    streams: Streams,
    events: mpsc::Sender<Event>,
}

async fn run(transport: Transport, task: Task) {
    let Transport { source, sink, .. } = transport;
    let reason = tokio::select! {
        reason = task.read(source) => reason,
        reason = write(sink, &task.queue) => reason,
        reason = task.keep_alive() => reason,
        () = task.queue.closed() => "client socket is closed".to_owned(),
    };
    if let Some(inner) = task.inner.upgrade() {
        *lock(&inner.reason) = Some(reason);
        lock(&inner.waiting).take();
    }
    task.streams.fail_all();
    task.queue.close();
}

async fn write(mut sink: Sink, queue: &Queue) -> String {
    while let Some(next) = queue.next().await {
        if let Err(error) = sink.send(&next).await {
            return format!("Cannot write data: {error}");
        }
    }
    "client socket is closed".to_owned()
}

impl Task {
    async fn keep_alive(&self) -> String {
        let keepalive = self
            .inner
            .upgrade()
            .and_then(|inner| inner.config.keepalive);
        let Some(keepalive) = keepalive else {
            return std::future::pending().await;
        };
        let heard = || {
            let inner = self.inner.upgrade()?;
            inner
                .keepalive
                .load(Ordering::Acquire)
                .then(|| *lock(&inner.heard))
        };
        keepalive.watch(&self.queue, heard).await;
        SILENT.to_owned()
    }

    async fn read(&self, mut source: Source) -> String {
        loop {
            let frame = match source.next().await {
                Ok(Some(frame)) => frame,
                Ok(None) => return "End of file while reading data: Input/output error".to_owned(),
                Err(error) => return format!("Cannot read data: {error}"),
            };
            match self.inner.upgrade() {
                Some(inner) => *lock(&inner.heard) = Instant::now(),
                None => return String::new(),
            }
            let header = frame.header;
            match (header.program, header.kind) {
                (KEEPALIVE_PROGRAM, MessageType::Message) => {
                    crate::keepalive::take(&self.queue, header.procedure).await;
                }
                (REMOTE_PROGRAM | QEMU_PROGRAM, MessageType::Reply | MessageType::ReplyWithFds) => {
                    let waiting = self
                        .inner
                        .upgrade()
                        .and_then(|inner| lock(&inner.waiting).as_mut()?.remove(&header.serial));
                    if header.status == Status::Ok {
                        self.streams.open(header.serial);
                    }
                    if let Some(waiting) = waiting {
                        // Who asked may have gone.
                        let _ = waiting.send(frame);
                    }
                }
                (REMOTE_PROGRAM | QEMU_PROGRAM, MessageType::Message) => {
                    let wanted = self
                        .inner
                        .upgrade()
                        .is_some_and(|inner| inner.want_events.load(Ordering::Acquire));
                    let event = Event {
                        procedure: header.number(),
                        payload: frame.payload,
                    };
                    if wanted
                        && let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(event)
                    {
                        log::warn!("an event is lost: {EVENTS_MAX} wait already");
                    }
                }
                (REMOTE_PROGRAM, MessageType::Stream | MessageType::StreamHole) => {
                    self.streams.take(frame).await
                }
                (program, kind) => {
                    return format!("unexpected message {kind:?} of program {program:#x}");
                }
            }
        }
    }
}
