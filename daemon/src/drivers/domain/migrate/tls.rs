//! TLS for a guest on its way: the two daemons make it, and pass on what their VMMs send.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rpc::tls::{ClientFiles, ServerFiles, TlsClient, TlsServer};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::UnixStream;

use crate::error::{Error, ErrorCode, Result};

/// What is passed on at once, bytes.
const BUFFER: usize = 256 << 10;

/// Bytes both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The certificates for guests, named as QEMU has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificates {
    /// Their folder.
    pub folder: PathBuf,
    /// A source must show a certificate of the same CA.
    pub verify: bool,
}

impl Default for Certificates {
    fn default() -> Self {
        Self {
            folder: "/etc/pki/qemu".into(),
            verify: true,
        }
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    let text = format!("TLS for migration: {error}");
    Error::new(ErrorCode::OPERATION_FAILED, text)
}

impl Certificates {
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The side that a guest comes to.
    ///
    /// # Errors
    /// A file is missing or is something else.
    pub fn server(&self) -> Result<TlsServer> {
        let files = ServerFiles {
            ca: self.file("ca-cert.pem"),
            crl: Some(self.file("ca-crl.pem")).filter(|file| file.exists()),
            certificate: self.file("server-cert.pem"),
            key: self.file("server-key.pem"),
            verify: self.verify,
        };
        TlsServer::new(&files).map_err(failed)
    }

    /// The side that it leaves.
    ///
    /// # Errors
    /// A file is missing or is something else.
    pub fn client(&self) -> Result<TlsClient> {
        let identity = (self.file("client-cert.pem"), self.file("client-key.pem"));
        let files = ClientFiles {
            ca: self.file("ca-cert.pem"),
            identity: Some(identity).filter(|(certificate, _)| certificate.is_file()),
            verify: true,
        };
        TlsClient::new(&files).map_err(failed)
    }
}

/// Certificates of clients of daemons, where libvirt's clients look for them.
///
/// # Errors
/// A file is missing or is something else.
pub fn client_of_daemons(folder: Option<&Path>, verify: bool) -> Result<TlsClient> {
    let find = |name: &str, host: &str| match folder {
        Some(folder) => folder.join(name),
        None => Path::new(host).join(name),
    };
    let identity = (
        find("clientcert.pem", "/etc/pki/libvirt"),
        find("clientkey.pem", "/etc/pki/libvirt/private"),
    );
    let files = ClientFiles {
        ca: find("cacert.pem", "/etc/pki/CA"),
        identity: Some(identity).filter(|(certificate, _)| certificate.is_file()),
        verify,
    };
    TlsClient::new(&files).map_err(failed)
}

/// A socket for the VMM, from and to which everything is passed on until both sides have ended.
///
/// # Errors
/// No sockets.
pub fn join(mut line: impl Stream + 'static) -> io::Result<OwnedFd> {
    let (own, its) = std::os::unix::net::UnixStream::pair()?;
    own.set_nonblocking(true)?;
    let mut own = UnixStream::from_std(own)?;
    tokio::spawn(async move {
        let passed = copy_bidirectional_with_sizes(&mut line, &mut own, BUFFER, BUFFER).await;
        if let Err(error) = passed {
            log::debug!("a guest's TLS connection: {error}");
        }
    });
    Ok(its.into())
}
