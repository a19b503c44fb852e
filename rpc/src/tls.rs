//! TLS with certificates on both sides, as libvirt's `tls` transport: files in PEM, and one byte (1) from the server
//! inside the session once it has accepted the client's certificate, which the client waits for.

use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::transport::Transport;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(15);
/// What the server says when it has accepted the client.
const WELCOME: u8 = 1;

/// Why TLS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds something else.
    #[error("cannot use {what} '{}': {why}", path.display())]
    File {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The certificates do not fit together.
    #[error("cannot use the certificates: {0}")]
    Setup(String),
}

impl From<Error> for TlsError {
    fn from(error: Error) -> Self {
        TlsError::Setup(error.to_string())
    }
}

fn file_error(what: &'static str, path: &Path, why: impl fmt::Display) -> TlsError {
    TlsError::File {
        what,
        path: path.to_owned(),
        why: why.to_string(),
    }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|e| file_error(what, path, e))?
        .collect();
    let found = found.map_err(|e| file_error(what, path, e))?;
    if found.is_empty() {
        return Err(file_error(what, path, "there is no certificate in it"));
    }
    Ok(found)
}

fn authorities(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    const WHAT: &str = "the CA certificate";
    let mut roots = RootCertStore::empty();
    for certificate in certificates(WHAT, path)? {
        roots
            .add(certificate)
            .map_err(|e| file_error(WHAT, path, e))?;
    }
    Ok(Arc::new(roots))
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|e| file_error("the private key", path, e))
}

fn revoked(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    const WHAT: &str = "the revocation list";
    CertificateRevocationListDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| file_error(WHAT, path, e))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A server's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFiles {
    /// The CA's certificate: who signs for clients.
    pub ca: PathBuf,
    /// The CA's list of what it takes back, if there is one.
    pub crl: Option<PathBuf>,
    /// The server's certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Clients must show a certificate. Without, anybody who reaches the port may do everything.
    pub verify: bool,
}

/// The server's side.
#[derive(Clone)]
pub struct TlsServer {
    acceptor: TlsAcceptor,
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServer").finish_non_exhaustive()
    }
}

impl TlsServer {
    /// A server with these files.
    pub fn new(files: &ServerFiles) -> Result<Self, TlsError> {
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let builder = if files.verify {
            let mut verifier =
                WebPkiClientVerifier::builder_with_provider(authorities(&files.ca)?, provider);
            if let Some(crl) = &files.crl {
                verifier = verifier
                    .with_crls(revoked(crl)?)
                    .only_check_end_entity_revocation()
                    .allow_unknown_revocation_status();
            }
            let verifier = verifier
                .build()
                .map_err(|e| TlsError::Setup(e.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let chain = certificates("the server certificate", &files.certificate)?;
        let mut config = builder.with_single_cert(chain, key(&files.key)?)?;
        // libvirt's clients take the first thing that comes for the welcome, and give up on a ticket.
        config.send_tls13_tickets = 0;
        Ok(TlsServer {
            acceptor: TlsAcceptor::from(Arc::new(config)),
        })
    }

    /// Makes a connection of a client that connected, if its certificate is good.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<Transport> {
        let work = async {
            let mut stream = self.acceptor.accept(stream).await?;
            stream.write_all(&[WELCOME]).await?;
            stream.flush().await?;
            Ok(Transport::secure(stream))
        };
        within(HANDSHAKE, work).await
    }
}

impl TlsServer {
    /// Makes the line of a peer that connected a private one, if its certificate is good: without libvirt's welcome.
    pub async fn secure<S: AsyncRead + AsyncWrite + Send + Unpin>(
        &self,
        stream: S,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<S>> {
        within(HANDSHAKE, async { self.acceptor.accept(stream).await }).await
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        Err(io::Error::new(
            ErrorKind::TimedOut,
            "TLS handshake timed out",
        ))
    })
}

/// A client's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFiles {
    /// The CA's certificate: who signs for servers.
    pub ca: PathBuf,
    /// The client's certificate and its key, if it has any.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The server must be who it says. Without, the line may be listened to.
    pub verify: bool,
}

/// The client's side.
#[derive(Clone)]
pub struct TlsClient {
    connector: TlsConnector,
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsClient").finish_non_exhaustive()
    }
}

impl TlsClient {
    /// A client with these files.
    pub fn new(files: &ClientFiles) -> Result<Self, TlsError> {
        let provider = provider();
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let builder = if files.verify {
            let verifier =
                WebPkiServerVerifier::builder_with_provider(authorities(&files.ca)?, provider)
                    .build()
                    .map_err(|e| TlsError::Setup(e.to_string()))?;
            builder.with_webpki_verifier(verifier)
        } else {
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        };
        let config = match &files.identity {
            Some((certificate, private)) => {
                let chain = certificates("the client certificate", certificate)?;
                builder.with_client_auth_cert(chain, key(private)?)?
            }
            None => builder.with_no_client_auth(),
        };
        Ok(TlsClient {
            connector: TlsConnector::from(Arc::new(config)),
        })
    }

    /// Makes a line to `host`, which must have a certificate for that name, a private one: without libvirt's welcome.
    pub async fn secure<S: AsyncRead + AsyncWrite + Send + Unpin>(
        &self,
        host: &str,
        stream: S,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<S>> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|e| io::Error::new(ErrorKind::InvalidInput, e))?;
        within(HANDSHAKE, async {
            self.connector.connect(name, stream).await
        })
        .await
    }

    /// Makes a connection to a server, which must have a certificate for `host`, and waits until it accepts ours.
    pub async fn connect(&self, host: &str, stream: TcpStream) -> io::Result<Transport> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|e| io::Error::new(ErrorKind::InvalidInput, e))?;
        let work = async {
            let mut stream = self.connector.connect(name, stream).await?;
            let mut welcome = [0];
            let refused = || {
                io::Error::new(
                    ErrorKind::ConnectionRefused,
                    "server verification (of our certificate or IP address) failed",
                )
            };
            match stream.read_exact(&mut welcome).await {
                Ok(_) if welcome == [WELCOME] => Ok(Transport::secure(stream)),
                Ok(_) => Err(refused()),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(refused()),
                Err(error) => Err(error),
            }
        };
        within(HANDSHAKE, work).await
    }
}

/// Takes any certificate, but still wants proof that the server holds its key.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.0.signature_verification_algorithms;
        tokio_rustls::rustls::crypto::verify_tls12_signature(message, certificate, signed, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.0.signature_verification_algorithms;
        tokio_rustls::rustls::crypto::verify_tls13_signature(message, certificate, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
