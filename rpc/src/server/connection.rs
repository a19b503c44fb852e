//! One client.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::{
    Authorizer, Entrance, Keepalive, Request, Response, ServerConfig, Service, SocketAccess,
};
use crate::args::{
    AuthListRet, AuthPolkitRet, ConnectOpenArgs, ConnectSupportsFeatureArgs,
    ConnectSupportsFeatureRet,
};
use crate::error::{ErrorCode, ErrorDomain, RemoteError};
use crate::frame::{Frame, FrameError, Header, MessageType, Status};
use crate::limits::{FDS_MAX, MESSAGE_MAX};
use crate::procs::{
    self, Access, KEEPALIVE_PROGRAM, KEEPALIVE_VERSION, Procedure, ProcedureInfo, QEMU_PROGRAM,
    QEMU_VERSION, REMOTE_PROGRAM, REMOTE_VERSION,
};
use crate::queue::Queue;
use crate::stream::{Side, StreamError, Streams};
use crate::transport::{Peer, ReadError, Sink, Source, Transport};
use crate::xdr::{Encode, XdrError, from_bytes, to_bytes};

/// `VIR_CONNECT_RO`: the client wants to look only.
const OPEN_READ_ONLY: u32 = 1;
/// `VIR_DRV_FEATURE_PROGRAM_KEEPALIVE`: who asks for it can answer our questions.
const FEATURE_KEEPALIVE: i32 = 10;

/// A call takes one of a client's places, and another one for each so many bytes of it.
const SLOT_BYTES: usize = 1 << 20;

/// How long a client that sends no more may take to read what is left for it.
const PARTING: Duration = Duration::from_secs(10);

/// A client's connection. Cheap to clone; all clones are the same connection.
#[derive(Debug, Clone)]
pub struct Connection {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: u64,
    peer: Option<Peer>,
    access: SocketAccess,
    secure: bool,
    read_only: AtomicBool,
    /// Whom to ask about the client, until it has been asked.
    unproved: Mutex<Option<Arc<dyn Authorizer>>>,
    /// Told when the client opens its connection.
    opening: Notify,
    opened: AtomicBool,
    /// The client has closed it by a call.
    goodbye: AtomicBool,
    /// The client can answer keepalives.
    keepalive: AtomicBool,
    heard: Mutex<Instant>,
    queue: Arc<Queue>,
    streams: Streams,
}

/// Why an event was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// The client is gone, or did not read its events and lost its connection.
    #[error("the connection is closed")]
    Closed,
    /// The message is beyond the protocol's limits.
    #[error(transparent)]
    Xdr(#[from] XdrError),
}

impl Connection {
    pub(super) fn new(id: u64, transport: &Transport, entrance: Entrance) -> Self {
        let (peer, access) = (transport.peer, entrance.access);
        // The superuser needs nobody's leave, and gets in where polkit is broken.
        let superuser = peer.is_some_and(|peer| peer.uid == 0);
        Connection {
            inner: Arc::new(Inner {
                id,
                peer,
                access,
                secure: transport.secure,
                read_only: AtomicBool::new(access == SocketAccess::ReadOnly),
                unproved: Mutex::new(entrance.authorizer.filter(|_| !superuser)),
                opening: Notify::new(),
                opened: AtomicBool::new(false),
                goodbye: AtomicBool::new(false),
                keepalive: AtomicBool::new(false),
                heard: Mutex::new(Instant::now()),
                queue: Arc::new(Queue::new(transport)),
                streams: Streams::default(),
            }),
        }
    }

    /// A number that no other connection of this server has or had.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// Who is at the other end, as the kernel says.
    pub fn peer(&self) -> Option<Peer> {
        self.inner.peer
    }

    /// Whether nobody can listen: a Unix socket, or TLS.
    pub fn is_secure(&self) -> bool {
        self.inner.secure
    }

    /// Whether the client may only look: by the socket it uses, or by its own wish.
    pub fn is_read_only(&self) -> bool {
        self.inner.read_only.load(Ordering::Acquire)
    }

    /// Sends an event. Does not wait; a client that lets too many pile up loses its connection.
    pub fn send_event<A: Encode>(
        &self,
        procedure: Procedure<A, ()>,
        message: &A,
    ) -> Result<(), EventError> {
        let frame = Frame::new(Header::event(procedure), message)?;
        self.inner.queue.push(frame).map_err(|_| EventError::Closed)
    }

    /// Whether the client has closed it, which one that dies does not.
    pub fn said_goodbye(&self) -> bool {
        self.inner.goodbye.load(Ordering::Acquire)
    }

    /// Closes the connection.
    pub fn close(&self) {
        self.inner.queue.close();
    }

    /// Whether the connection is closed.
    pub fn is_closed(&self) -> bool {
        self.inner.queue.is_closed()
    }

    /// Resolves when the connection is closed.
    pub async fn closed(&self) {
        self.inner.queue.closed().await;
    }

    /// Serves the client until it leaves or is thrown out.
    pub(super) async fn run(
        &self,
        transport: Transport,
        service: &Arc<dyn Service>,
        config: &ServerConfig,
        place: OwnedSemaphorePermit,
    ) {
        let Transport { source, sink, .. } = transport;
        let opening = async {
            let opened = tokio::time::timeout(config.open_timeout, self.inner.opening.notified());
            if opened.await.is_err() {
                log::info!("client {} does not open its connection", self.inner.id);
                return;
            }
            drop(place);
            std::future::pending().await
        };
        let reader = async {
            self.read(source, service, config).await;
            // What was answered already is still sent.
            self.inner.queue.end();
            tokio::time::sleep(PARTING).await;
        };
        tokio::select! {
            () = reader => {}
            () = self.write(sink) => {}
            () = self.keep_alive(config.keepalive) => {}
            () = opening => {}
            () = self.closed() => {}
        }
        self.close();
        self.inner.streams.fail_all();
    }

    async fn write(&self, mut sink: Sink) {
        while let Some(next) = self.inner.queue.next().await {
            if let Err(error) = sink.send(&next).await {
                log::debug!("client {}: cannot send: {error}", self.inner.id);
                return;
            }
        }
    }

    async fn keep_alive(&self, keepalive: Option<Keepalive>) {
        let Some(keepalive) = keepalive else {
            return std::future::pending().await;
        };
        let heard = || {
            let heard = *self
                .inner
                .heard
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            self.inner
                .keepalive
                .load(Ordering::Acquire)
                .then_some(heard)
        };
        keepalive.watch(&self.inner.queue, heard).await;
        log::info!(
            "client {} does not answer: closing its connection",
            self.inner.id
        );
    }

    async fn read(&self, mut source: Source, service: &Arc<dyn Service>, config: &ServerConfig) {
        let slots = Arc::new(Semaphore::new(config.max_client_requests.max(1)));
        loop {
            let frame = match source.next().await {
                Ok(Some(frame)) => frame,
                Ok(None) => return,
                Err(error) => {
                    log::info!("client {}: {error}", self.inner.id);
                    if let ReadError::Frame(FrameError::TooLarge {
                        header: Some(header),
                        ..
                    }) = &error
                        && header.kind == MessageType::Call
                    {
                        self.answer(*header, Err(RemoteError::rpc(error.to_string())))
                            .await;
                    }
                    return;
                }
            };
            *self
                .inner
                .heard
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Instant::now();
            // While this waits nothing more is read, so that only the socket tells whether the client has left.
            tokio::select! {
                () = self.take(frame, service, config, &slots) => {}
                () = source.hang_up() => return,
            }
        }
    }

    /// Takes one message. Waits while the client has enough calls running, or too much data waiting.
    async fn take(
        &self,
        frame: Frame,
        service: &Arc<dyn Service>,
        config: &ServerConfig,
        slots: &Arc<Semaphore>,
    ) {
        let header = frame.header;
        match (header.program, header.version, header.kind) {
            (KEEPALIVE_PROGRAM, KEEPALIVE_VERSION, MessageType::Message) => {
                crate::keepalive::take(&self.inner.queue, header.procedure).await;
            }
            (REMOTE_PROGRAM, REMOTE_VERSION, MessageType::Stream | MessageType::StreamHole) => {
                self.inner.streams.take(frame).await;
            }
            (REMOTE_PROGRAM, REMOTE_VERSION, MessageType::Call | MessageType::CallWithFds)
            | (QEMU_PROGRAM, QEMU_VERSION, MessageType::Call | MessageType::CallWithFds) => {
                if header.status != Status::Ok {
                    let text = format!("Unexpected message status {}", i32::from(header.status));
                    return self.answer(header, Err(RemoteError::rpc(text))).await;
                }
                // A large one takes more, lest a client have this process hold many of them.
                let most =
                    u32::try_from(config.max_client_requests.div_ceil(2)).unwrap_or(u32::MAX);
                let size = u32::try_from(frame.payload.len() / SLOT_BYTES).unwrap_or(u32::MAX);
                let slots = Arc::clone(slots);
                let Ok(slot) = slots
                    .acquire_many_owned(size.saturating_add(1).min(most.max(1)))
                    .await
                else {
                    return;
                };
                self.call(frame, service, config, slot);
            }
            (REMOTE_PROGRAM, REMOTE_VERSION, kind) => {
                let text = format!("Unexpected message type {}", i32::from(kind));
                self.answer(header, Err(RemoteError::rpc(text))).await;
            }
            (program, version, _) => {
                let text = format!("Cannot find program {program} version {version}");
                self.answer(header, Err(RemoteError::rpc(text))).await;
            }
        }
    }

    /// Runs a call in a task of its own.
    fn call(
        &self,
        frame: Frame,
        service: &Arc<dyn Service>,
        config: &ServerConfig,
        slot: OwnedSemaphorePermit,
    ) {
        let connection = self.clone();
        let service = Arc::clone(service);
        let max_streams = config.max_client_streams;
        tokio::spawn(async move {
            let header = frame.header;
            let result = match connection.admit(&frame) {
                Ok(info) => {
                    connection
                        .dispatch(info, frame, &service, max_streams)
                        .await
                }
                Err(error) => Err(error),
            };
            let goodbye = header.number() == procs::CONNECT_CLOSE.number();
            if goodbye {
                connection.inner.goodbye.store(true, Ordering::Release);
            }
            connection.answer(header, result).await;
            if goodbye {
                connection.inner.queue.end();
            }
            drop(slot);
        });
    }

    /// Decides whether a call is served: the one place where that is decided.
    fn admit(&self, frame: &Frame) -> Result<&'static ProcedureInfo, RemoteError> {
        let number = frame.header.number();
        let Some(info) = procs::info(number).filter(|info| !info.event) else {
            return Err(RemoteError::unknown_procedure(frame.header.procedure));
        };
        let opened = self.inner.opened.load(Ordering::Acquire);
        let open = procs::CONNECT_OPEN.number();
        if number == open && opened {
            return Err(RemoteError::new(
                ErrorCode::INTERNAL_ERROR,
                ErrorDomain::RPC,
                "connection already open",
            ));
        }
        let proving = [
            procs::CONNECT_CLOSE.number(),
            procs::AUTH_LIST.number(),
            procs::AUTH_SASL_INIT.number(),
            procs::AUTH_SASL_START.number(),
            procs::AUTH_SASL_STEP.number(),
            procs::AUTH_POLKIT.number(),
        ];
        if !proving.contains(&number) && self.unproved().is_some() {
            return Err(RemoteError::rpc("authentication required"));
        }
        let before = [
            open,
            procs::CONNECT_CLOSE.number(),
            procs::CONNECT_SUPPORTS_FEATURE.number(),
            procs::AUTH_LIST.number(),
            procs::AUTH_SASL_INIT.number(),
            procs::AUTH_SASL_START.number(),
            procs::AUTH_SASL_STEP.number(),
            procs::AUTH_POLKIT.number(),
        ];
        if !opened && !before.contains(&number) {
            return Err(RemoteError::new(
                ErrorCode::INTERNAL_ERROR,
                ErrorDomain::RPC,
                "hypervisor connection not open",
            ));
        }
        if self.is_read_only() {
            permit(info, &frame.payload)?;
        }
        Ok(info)
    }

    /// Passes a call to the service, and does what belongs to the connection itself.
    async fn dispatch(
        &self,
        info: &ProcedureInfo,
        frame: Frame,
        service: &Arc<dyn Service>,
        max_streams: usize,
    ) -> Result<Response, RemoteError> {
        let number = info.number;
        if number == procs::AUTH_LIST.number() {
            let kind = if self.unproved().is_some() {
                AUTH_POLKIT
            } else {
                AUTH_NONE
            };
            let list = AuthListRet {
                types: vec![kind].into(),
            };
            let payload = to_bytes(&list).map_err(|error| RemoteError::rpc(error.to_string()))?;
            return Ok(Response {
                payload,
                fds: Vec::new(),
            });
        }
        if number == procs::CONNECT_CLOSE.number() {
            return Ok(Response::default());
        }
        if number == procs::AUTH_POLKIT.number() {
            return self.prove().await;
        }
        let stream = match info.stream {
            None => None,
            Some(_) if self.inner.streams.len() >= max_streams => {
                return Err(RemoteError::rpc(format!(
                    "too many open streams, the limit is {max_streams}"
                )));
            }
            Some(_) => {
                let queue = Arc::clone(&self.inner.queue);
                let Some(stream) = self.inner.streams.add(Side::Server, frame.header, queue) else {
                    return Err(RemoteError::rpc(format!(
                        "serial {} has an open stream",
                        frame.header.serial
                    )));
                };
                Some(stream)
            }
        };
        // What the connection itself learns from a call that succeeds.
        let open_flags = (number == procs::CONNECT_OPEN.number())
            .then(|| from_bytes::<ConnectOpenArgs>(&frame.payload).map_or(0, |args| args.flags));
        let asks_keepalive = number == procs::CONNECT_SUPPORTS_FEATURE.number()
            && from_bytes::<ConnectSupportsFeatureArgs>(&frame.payload)
                .is_ok_and(|args| args.feature == FEATURE_KEEPALIVE);

        let call = service.call(Request {
            connection: self.clone(),
            procedure: number,
            payload: frame.payload,
            fds: frame.fds,
            stream,
        });
        // A mistake that panics is one client's failed call and no more.
        let response = caught(call).await.unwrap_or_else(|panic| {
            log::error!("{} failed: {panic}", info.name);
            let text = format!("{} failed unexpectedly", info.function());
            Err(RemoteError::new(
                ErrorCode::INTERNAL_ERROR,
                ErrorDomain::RPC,
                text,
            ))
        })?;

        if let Some(flags) = open_flags {
            if flags & OPEN_READ_ONLY != 0 {
                self.inner.read_only.store(true, Ordering::Release);
            }
            self.inner.opened.store(true, Ordering::Release);
            self.inner.opening.notify_one();
        }
        if asks_keepalive
            && from_bytes::<ConnectSupportsFeatureRet>(&response.payload)
                .is_ok_and(|it| it.supported != 0)
        {
            self.inner.keepalive.store(true, Ordering::Release);
        }
        Ok(response)
    }

    fn unproved(&self) -> Option<Arc<dyn Authorizer>> {
        let unproved = self.inner.unproved.lock();
        unproved.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks whether the client may be here.
    async fn prove(&self) -> Result<Response, RemoteError> {
        let denied = |text: &str| {
            RemoteError::new(ErrorCode::AUTH_FAILED, ErrorDomain::RPC, text.to_owned())
        };
        let Some(authorizer) = self.unproved() else {
            return Err(denied("client tried invalid PolicyKit init request"));
        };
        let Some(peer) = self.inner.peer else {
            return Err(denied("the client's identity is not known"));
        };
        authorizer.authorize(peer, self.inner.access).await?;
        *self
            .inner
            .unproved
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        let payload = to_bytes(&AuthPolkitRet { complete: 1 })
            .map_err(|error| RemoteError::rpc(error.to_string()))?;
        Ok(Response {
            payload,
            fds: Vec::new(),
        })
    }

    /// Sends the answer to a call, and opens or closes the stream behind it.
    async fn answer(&self, header: Header, result: Result<Response, RemoteError>) {
        let result = result.and_then(|response| {
            let kind = if response.fds.is_empty() {
                MessageType::Reply
            } else {
                MessageType::ReplyWithFds
            };
            let frame = Frame {
                header: header.answer(kind, Status::Ok),
                payload: response.payload,
                fds: response.fds,
            };
            if frame.wire_len() > MESSAGE_MAX {
                return Err(RemoteError::rpc(format!(
                    "answer of {} bytes is too large",
                    frame.wire_len()
                )));
            }
            if frame.fds.len() > FDS_MAX {
                return Err(RemoteError::rpc(format!(
                    "answer has too many descriptors: {}",
                    frame.fds.len()
                )));
            }
            Ok(frame)
        });
        match result {
            Ok(frame) => {
                // A client that is gone needs no answer.
                let _ = self.inner.queue.push_when_room(frame).await;
                self.inner.streams.open(header.serial);
            }
            Err(error) => {
                log::debug!(
                    "client {}: procedure {}: {error}",
                    self.inner.id,
                    header.procedure
                );
                self.inner.streams.fail(header.serial, StreamError::Closed);
                // The error of raw data goes back as raw data.
                let kind = match header.kind {
                    MessageType::Stream | MessageType::StreamHole => MessageType::Stream,
                    _ => MessageType::Reply,
                };
                let payload = to_bytes(&error).unwrap_or_default();
                let frame = Frame::raw(header.answer(kind, Status::Error), payload);
                let _ = self.inner.queue.push_when_room(frame).await;
            }
        }
    }
}

/// What a future gives, or what it says when it panics.
async fn caught<T>(mut future: Pin<Box<dyn Future<Output = T> + Send>>) -> Result<T, String> {
    std::future::poll_fn(|context| {
        // Nobody sees the future again after it has panicked: it is dropped.
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context)));
        match polled {
            Ok(poll) => poll.map(Ok),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().copied();
                let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
                Poll::Ready(Err(text.unwrap_or("a panic").to_owned()))
            }
        }
    })
    .await
}

/// `REMOTE_AUTH_NONE`: nothing is to be proved.
const AUTH_NONE: i32 = 0;
/// `REMOTE_AUTH_POLKIT`: the client asks us to ask polkit.
const AUTH_POLKIT: i32 = 2;

/// Whether a read-only connection may make a call.
fn permit(info: &ProcedureInfo, payload: &[u8]) -> Result<(), RemoteError> {
    let denied = match info.access {
        Access::Read => None,
        Access::Write => Some(format!("read only access prevents {}", info.function())),
        Access::ReadUnless { back, mask } => {
            let word = payload
                .len()
                .checked_sub(back)
                .and_then(|start| payload[start..].first_chunk::<4>());
            // What is too short to have the word is refused by the decoder.
            word.filter(|word| u32::from_be_bytes(**word) & mask != 0)
                .map(|_| format!("{} with secure flag", info.function()))
        }
    };
    match denied {
        None => Ok(()),
        Some(text) => Err(RemoteError::new(
            ErrorCode::OPERATION_DENIED,
            info.error_domain(),
            text,
        )),
    }
}
