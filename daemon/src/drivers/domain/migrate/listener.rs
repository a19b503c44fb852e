//! Where a guest that comes is awaited, and who is let in.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::Duration;

use rpc::tls::TlsServer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::timeout;
use uuid::Uuid;
use vmm_api::migrate::{self, CONNECTIONS_MOST, HEADER, Header, Kind, Preamble};

use super::uri::Place;
use super::{Params, tls};
use crate::error::{Error, Result};
use crate::node;

/// Ports for guests that come, as libvirt has them.
const PORTS: std::ops::RangeInclusive<u16> = 49152..=49215;
/// How long a stranger may take to say who it is.
pub(super) const PREAMBLE_LIMIT: Duration = Duration::from_secs(5);
/// Strangers that are turned away before the target gives up.
const STRANGERS: u32 = 64;

/// Where the target listens.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    /// With the path to be removed.
    Unix(UnixListener, PathBuf),
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self
            && let Err(error) = std::fs::remove_file(&*path)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove '{}': {error}", path.display());
        }
    }
}

/// A connection from the source.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<dyn tls::Stream>),
}

impl Stream {
    /// The same through TLS, if that is wanted.
    async fn secure(self, tls: Option<&TlsServer>) -> io::Result<Self> {
        let Some(tls) = tls else { return Ok(self) };
        Ok(match self {
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                Self::Tls(Box::new(tls.secure(stream).await?))
            }
            Self::Unix(stream) => Self::Tls(Box::new(tls.secure(stream).await?)),
            secure => secure,
        })
    }

    async fn read_exact(&mut self, to: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.read_exact(to).await.map(drop),
            Self::Unix(stream) => stream.read_exact(to).await.map(drop),
            Self::Tls(stream) => stream.read_exact(to).await.map(drop),
        }
    }

    pub(super) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes).await,
            Self::Unix(stream) => stream.write_all(bytes).await,
            Self::Tls(stream) => {
                stream.write_all(bytes).await?;
                stream.shutdown().await
            }
        }
    }

    /// Says who it is, and that it knows `token`; else why it is a stranger.
    pub(super) async fn introduce(
        self,
        uuid: Uuid,
        token: &str,
        tls: Option<&TlsServer>,
    ) -> std::result::Result<(Self, Preamble), String> {
        let introduced = async {
            let mut stream = self.secure(tls).await?;
            let preamble = stream.preamble().await?;
            Ok::<_, io::Error>((stream, preamble))
        };
        match timeout(PREAMBLE_LIMIT, introduced).await {
            Ok(Ok((stream, preamble)))
                if preamble.token == token && preamble.uuid == uuid.to_string() =>
            {
                Ok((stream, preamble))
            }
            Ok(Ok((_, preamble))) => Err(format!("it brings domain {}", preamble.uuid)),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("it says nothing".to_owned()),
        }
    }

    /// Who comes.
    async fn preamble(&mut self) -> io::Result<Preamble> {
        let mut head = [0; HEADER];
        self.read_exact(&mut head).await?;
        let header = Header::decode(head).map_err(io::Error::other)?;
        // Longer than any preamble: whoever sends it is a stranger.
        const MOST: u32 = 4096;
        if header.kind != Kind::Preamble || header.len > MOST {
            return Err(io::Error::other("no preamble"));
        }
        let mut body = vec![0; header.len as usize];
        self.read_exact(&mut body).await?;
        migrate::parse(&body).map_err(io::Error::other)
    }

    pub(super) fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(match self {
            Self::Tcp(stream) => stream.into_std()?.into(),
            Self::Unix(stream) => stream.into_std()?.into(),
            Self::Tls(stream) => tls::join(stream)?,
        })
    }
}

impl Listener {
    /// Listens where the client wants it, or at a free port; says where.
    pub(super) async fn bind(params: &Params) -> Result<(Self, Place)> {
        let place = match &params.uri {
            Some(uri) => Place::parse(uri)?,
            None => Place::Tcp {
                host: reachable(node::hostname())?,
                port: None,
            },
        };
        let (host, port) = match place {
            Place::Unix(path) => {
                let cannot = |error: io::Error| {
                    Error::system(format!("cannot listen at '{}'", path.display()), &error)
                };
                let is_socket = || {
                    std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.file_type().is_socket())
                };
                let listener = match UnixListener::bind(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_socket() => {
                        // What a daemon that died has left is nobody's.
                        match UnixStream::connect(&path).await {
                            Err(dead) if dead.kind() == io::ErrorKind::ConnectionRefused => {
                                std::fs::remove_file(&path).map_err(cannot)?;
                                UnixListener::bind(&path)
                            }
                            _ => Err(error),
                        }
                    }
                    bound => bound,
                };
                let listener = listener.map_err(cannot)?;
                return Ok((Self::Unix(listener, path.clone()), Place::Unix(path)));
            }
            Place::Tcp { host, port } => (host, port),
        };
        let addresses: Vec<&str> = match &params.listen {
            Some(address) => vec![address],
            None => vec!["::", "0.0.0.0"],
        };
        let ports = match port {
            Some(port) => port..=port,
            None => PORTS,
        };
        let mut failure = io::Error::from(io::ErrorKind::AddrInUse);
        for port in ports {
            for address in &addresses {
                match TcpListener::bind((*address, port)).await {
                    Ok(listener) => {
                        let port = Some(port);
                        return Ok((Self::Tcp(listener), Place::Tcp { host, port }));
                    }
                    Err(error) => {
                        let taken = error.kind() == io::ErrorKind::AddrInUse;
                        failure = error;
                        if taken {
                            break;
                        }
                    }
                }
            }
        }
        Err(Error::system("cannot listen for the guest", &failure))
    }

    /// As [`Listener::bind`], at a place that somebody is about to leave, perhaps.
    pub(super) async fn bind_soon(params: &Params, is_left: bool) -> Result<(Self, Place)> {
        const ATTEMPTS: u32 = 50;
        const INTERVAL: Duration = Duration::from_millis(10);
        let mut bound = Self::bind(params).await;
        for _ in 0..ATTEMPTS {
            if bound.is_ok() || !is_left {
                break;
            }
            tokio::time::sleep(INTERVAL).await;
            bound = Self::bind(params).await;
        }
        bound
    }

    pub(super) async fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Tcp(listener) => Stream::Tcp(listener.accept().await?.0),
            Self::Unix(listener, _) => Stream::Unix(listener.accept().await?.0),
        })
    }

    /// All connections of the source that knows `token`, in their order.
    pub(super) async fn gather(
        &self,
        uuid: Uuid,
        token: &str,
        tls: Option<&TlsServer>,
    ) -> Result<Vec<Stream>> {
        let mut found: Vec<Option<Stream>> = Vec::new();
        let mut strangers = 0;
        while found.is_empty() || found.iter().any(Option::is_none) {
            let stream = self
                .accept()
                .await
                .map_err(|error| Error::system("cannot accept the guest's connection", &error))?;
            let (stream, known) = match stream.introduce(uuid, token, tls).await {
                Ok(known) => known,
                Err(why) => {
                    log::warn!("a connection that is not the guest's: {why}");
                    strangers += 1;
                    if strangers > STRANGERS {
                        return Err(Error::failed("too many strangers connect"));
                    }
                    continue;
                }
            };
            let total = known.total.clamp(1, CONNECTIONS_MOST) as usize;
            found.resize_with(total, || None);
            if let Some(place) = found.get_mut(known.index as usize) {
                *place = Some(stream);
            }
        }
        Ok(found.into_iter().flatten().collect())
    }
}

/// A name of this host by which another one can find it.
fn reachable(hostname: String) -> Result<String> {
    match hostname.starts_with("localhost") {
        false => Ok(hostname),
        true => Err(Error::internal(
            "hostname on destination resolved to localhost, but migration requires an FQDN",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_calls_itself_localhost_is_not_found_by_that() {
        assert_eq!(reachable("east".to_owned()).unwrap(), "east");
        for name in ["localhost", "localhost.localdomain"] {
            let error = reachable(name.to_owned()).unwrap_err();
            assert!(error.message.contains("requires an FQDN"), "{error}");
        }
    }
}
