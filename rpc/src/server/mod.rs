//! The server's side: sockets, connections, calls.
//!
//! Everything that is the same for every procedure is decided here, before a [`Service`] sees the call: who may
//! connect, what is served before the connection is opened, what a read-only connection may do, how many calls may
//! run, and how a client that doesn't read, hangs, sends garbage or leaves is treated.

mod connection;
mod router;

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, watch};

pub use self::connection::{Connection, EventError};
pub use self::router::{Call, Router};
use crate::error::RemoteError;
pub use crate::keepalive::Keepalive;
use crate::stream::Stream;
use crate::tls::TlsServer;
use crate::transport::{Peer, Transport};

/// What clients of a socket may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketAccess {
    /// Everything.
    ReadWrite,
    /// Look, not touch.
    ReadOnly,
}

/// Decides whether who is at the other end of a Unix socket may use it, as polkit does.
pub trait Authorizer: Send + Sync + fmt::Debug {
    /// Answers for one client; the error is what it is told. Must have a limit of its own.
    fn authorize(&self, peer: Peer, access: SocketAccess) -> Authorized;
}

/// The future of an [`Authorizer`]'s answer.
pub type Authorized = Pin<Box<dyn Future<Output = Result<(), RemoteError>> + Send>>;

/// What clients of a socket may do, and what they must prove before.
#[derive(Debug, Clone)]
pub struct Entrance {
    /// What they may do.
    pub access: SocketAccess,
    /// Asked about each client but the superuser (`auth_unix_rw = "polkit"`).
    pub authorizer: Option<Arc<dyn Authorizer>>,
}

impl From<SocketAccess> for Entrance {
    fn from(access: SocketAccess) -> Self {
        Entrance {
            access,
            authorizer: None,
        }
    }
}

/// Limits and intervals; the default is libvirt's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerConfig {
    /// Connections at one time; further ones are closed at once.
    pub max_clients: usize,
    /// Clients of one user, or all from the network, that have not opened their connection yet; nothing is read from
    /// further ones until one of those has, or leaves.
    pub max_anonymous_clients: usize,
    /// How long a client may take to open its connection.
    pub open_timeout: Duration,
    /// Calls of one client that run at one time; beyond that nothing is read from it.
    /// A call takes one, and another one for each MiB of it, up to half of them.
    pub max_client_requests: usize,
    /// Open streams of one client.
    pub max_client_streams: usize,
    /// Whether and how clients that can answer are asked whether they are alive.
    pub keepalive: Option<Keepalive>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            max_clients: 5000,
            max_anonymous_clients: 20,
            open_timeout: Duration::from_secs(60),
            // More than libvirt's 5: what waits for the disk together is written together.
            max_client_requests: 32,
            max_client_streams: 256,
            keepalive: Some(Keepalive {
                interval: Duration::from_secs(5),
                count: 5,
            }),
        }
    }
}

/// One call, for a [`Service`].
#[derive(Debug)]
pub struct Request {
    /// The connection it came on.
    pub connection: Connection,
    /// The procedure's number; one that exists, but perhaps unknown to the service.
    pub procedure: i32,
    /// The arguments, encoded.
    pub payload: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
    /// The raw data behind it, for procedures that have such.
    pub stream: Option<Stream>,
}

/// An answer, from a [`Service`].
#[derive(Debug, Default)]
pub struct Response {
    /// The answer, encoded.
    pub payload: Vec<u8>,
    /// Descriptors to send with it.
    pub fds: Vec<OwnedFd>,
}

/// The future of an answer.
pub type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response, RemoteError>> + Send>>;

/// What answers calls. [`Router`] is the usual one.
///
/// Calls run side by side, also those of one client, and run to their end even if the client leaves meanwhile.
pub trait Service: Send + Sync + 'static {
    /// Answers one call.
    fn call(&self, request: Request) -> ResponseFuture;

    /// A connection is gone: what was registered for it is to be dropped. Called once for each connection.
    fn disconnected(&self, connection: &Connection) {
        let _ = connection;
    }
}

/// A server. Cheap to clone; all clones are the same server.
#[derive(Clone)]
pub struct Server {
    inner: Arc<Inner>,
}

struct Inner {
    service: Arc<dyn Service>,
    config: ServerConfig,
    connections: Mutex<HashMap<u64, Connection>>,
    /// Room for clients that have not opened their connection, for each user; those of the network have none.
    anonymous: Mutex<HashMap<Option<u32>, Arc<Semaphore>>>,
    next_id: AtomicU64,
    stop: watch::Sender<bool>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("config", &self.inner.config)
            .field("clients", &self.clients())
            .finish()
    }
}

impl Inner {
    fn connections(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The room that clients of a user have before they open their connections.
    fn anonymous(&self, uid: Option<u32>) -> Arc<Semaphore> {
        let mut all = self
            .anonymous
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let room = all
            .entry(uid)
            .or_insert_with(|| Arc::new(Semaphore::new(self.config.max_anonymous_clients.max(1))));
        Arc::clone(room)
    }
}

/// How long accepting rests after it failed, as it does while there are no free descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Server {
    /// A server that passes calls to `service`.
    pub fn new(service: impl Service, config: ServerConfig) -> Self {
        Server {
            inner: Arc::new(Inner {
                service: Arc::new(service),
                config,
                connections: Mutex::default(),
                anonymous: Mutex::default(),
                next_id: AtomicU64::new(1),
                stop: watch::Sender::new(false),
            }),
        }
    }

    /// Accepts and serves clients of a Unix socket until [`Server::shutdown`].
    pub async fn serve_unix(
        &self,
        listener: UnixListener,
        entrance: impl Into<Entrance>,
    ) -> io::Result<()> {
        let entrance = entrance.into();
        let mut stop = self.inner.stop.subscribe();
        loop {
            tokio::select! {
                () = async { drop(stop.wait_for(|stop| *stop).await) } => return Ok(()),
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let (server, entrance) = (self.clone(), entrance.clone());
                        tokio::spawn(async move {
                            match Transport::unix(stream) {
                                Ok(transport) => server.serve(transport, entrance).await,
                                Err(error) => log::warn!("cannot serve a connection: {error}"),
                            }
                        });
                    }
                    Err(error) => {
                        log::warn!("cannot accept a connection: {error}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    /// Accepts and serves clients of a TCP port until [`Server::shutdown`]: with TLS, or else for everybody who
    /// reaches the port.
    pub async fn serve_tcp(
        &self,
        listener: TcpListener,
        tls: Option<TlsServer>,
        access: SocketAccess,
    ) -> io::Result<()> {
        let mut stop = self.inner.stop.subscribe();
        loop {
            tokio::select! {
                () = async { drop(stop.wait_for(|stop| *stop).await) } => return Ok(()),
                accepted = listener.accept() => match accepted {
                    Ok((stream, from)) => {
                        let (server, tls) = (self.clone(), tls.clone());
                        tokio::spawn(async move { server.welcome(stream, from, tls, access).await });
                    }
                    Err(error) => {
                        log::warn!("cannot accept a connection: {error}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    async fn welcome(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        tls: Option<TlsServer>,
        access: SocketAccess,
    ) {
        // Without it answers only come later.
        let _ = stream.set_nodelay(true);
        let transport = match tls {
            None => Transport::new(stream),
            Some(tls) => {
                // Handshakes cost more than anything else that strangers can ask for.
                let room = self.inner.anonymous(None);
                let Ok(_place) = room.acquire().await else {
                    return;
                };
                match tls.accept(stream).await {
                    Ok(transport) => transport,
                    Err(error) => {
                        log::info!("a client from {from} is turned away: {error}");
                        return;
                    }
                }
            }
        };
        self.serve(transport, access).await;
    }

    /// Serves one client until it leaves.
    pub async fn serve(&self, transport: Transport, entrance: impl Into<Entrance>) {
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let connection = Connection::new(id, &transport, entrance.into());
        {
            let mut connections = self.inner.connections();
            if *self.inner.stop.borrow() || connections.len() >= self.inner.config.max_clients {
                log::warn!(
                    "a client is turned away: {} are connected",
                    connections.len()
                );
                return;
            }
            connections.insert(id, connection.clone());
        }
        log::debug!("client {id} connected: {:?}", transport.peer);
        let room = self.inner.anonymous(transport.peer.map(|peer| peer.uid));
        tokio::select! {
            place = room.acquire_owned() => if let Ok(place) = place {
                connection
                    .run(transport, &self.inner.service, &self.inner.config, place)
                    .await;
            },
            () = connection.closed() => {}
        }
        self.inner.connections().remove(&id);
        self.inner.service.disconnected(&connection);
        log::debug!("client {id} is gone");
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        self.inner.connections().len()
    }

    /// Accepts no more clients and closes the connections. Calls that run go on to their end.
    pub fn shutdown(&self) {
        self.inner.stop.send_replace(true);
        let connections: Vec<Connection> = self.inner.connections().values().cloned().collect();
        for connection in connections {
            connection.close();
        }
    }
}
