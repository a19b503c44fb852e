//! TCP and TLS, what clients must prove, how many may come, and holes in streams.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{Folder, router};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};
use rpc::args::*;
use rpc::client::{Client, ClientConfig, ClientError, Keepalive};
use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
use rpc::frame::{Frame, FrameDecoder, Header, MessageType};
use rpc::procs;
use rpc::server::{Authorized, Authorizer, Entrance, Router, Server, ServerConfig, SocketAccess};
use rpc::stream::{Stream, StreamEvent};
use rpc::tls::{ClientFiles, ServerFiles, TlsClient, TlsServer};
use rpc::transport::{Peer, Transport};
use rpc::types::StorageVol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

/// Nothing here takes longer; what does hangs.
#[track_caller]
fn soon<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        tokio::time::timeout(Duration::from_secs(20), future)
            .await
            .unwrap_or_else(|_| panic!("this hangs: {caller}"))
    }
}

fn by_name(name: &str) -> DomainLookupByNameArgs {
    DomainLookupByNameArgs { name: name.into() }
}

/// Serves a port of its own on the loopback; returns the port.
async fn listen(server: &Server, tls: Option<TlsServer>) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = server.clone();
    tokio::spawn(async move {
        server
            .serve_tcp(listener, tls, SocketAccess::ReadWrite)
            .await
    });
    port
}

async fn tcp(port: u16) -> TcpStream {
    soon(TcpStream::connect(("127.0.0.1", port))).await.unwrap()
}

#[tokio::test]
async fn a_port_serves_as_a_socket_does_but_can_be_listened_to() {
    let (router, _gone) = router();
    let router = router.on(procs::CONNECT_IS_SECURE, |call, ()| async move {
        let secure = i32::from(rpc::server::Call::connection(&call).is_secure());
        Ok(ConnectIsSecureRet { secure })
    });
    let server = Server::new(router, ServerConfig::default());
    let port = listen(&server, None).await;
    let transport = Transport::new(tcp(port).await);
    let client = Client::new(transport, ClientConfig::default());
    soon(client.open(Some("vireo:///system"), false))
        .await
        .unwrap();
    let dom = soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("running")))
        .await
        .unwrap()
        .dom;
    assert_eq!(dom.id, 7);
    let answer = soon(client.call(procs::CONNECT_IS_SECURE, &())).await;
    assert_eq!(answer.unwrap().secure, 0);
    // No descriptors go there.
    let fd = std::fs::File::open("/dev/null").unwrap().into();
    let args = DomainFdAssociateArgs::default();
    let error = soon(client.call_with_fds(procs::DOMAIN_FD_ASSOCIATE, &args, vec![fd])).await;
    assert!(
        matches!(error, Err(ClientError::Disconnected(_))),
        "{error:?}"
    );
}

/// A certificate authority in a folder, as libvirt's users make one.
struct Authority {
    folder: Folder,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

fn params(name: &str, names: &[&str], usage: Option<ExtendedKeyUsagePurpose>) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages.extend(usage);
    params
}

impl Authority {
    fn new(name: &str) -> Self {
        let folder = Folder::new(name);
        let mut params = params(name, &[], None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(folder.0.join("cacert.pem"), issuer.pem()).unwrap();
        Authority { folder, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.0.join(name)
    }

    /// Makes `NAMEcert.pem` and `NAMEkey.pem`.
    fn issue(&self, name: &str, names: &[&str], usage: ExtendedKeyUsagePurpose, serial: u64) {
        let mut params = params(name, names, Some(usage));
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.path(&format!("{name}cert.pem")), certificate.pem()).unwrap();
        std::fs::write(self.path(&format!("{name}key.pem")), key.serialize_pem()).unwrap();
    }

    fn server(&self) -> ServerFiles {
        ServerFiles {
            ca: self.path("cacert.pem"),
            crl: None,
            certificate: self.path("servercert.pem"),
            key: self.path("serverkey.pem"),
            verify: true,
        }
    }

    fn client(&self, name: &str) -> ClientFiles {
        let file = |what: &str| self.path(&format!("{name}{what}.pem"));
        ClientFiles {
            ca: self.path("cacert.pem"),
            identity: Some((file("cert"), file("key"))),
            verify: true,
        }
    }
}

/// Connects to a server with certificates and makes a call.
async fn try_tls(port: u16, host: &str, files: &ClientFiles) -> Result<(), String> {
    let tls = TlsClient::new(files).map_err(|e| e.to_string())?;
    let transport = soon(tls.connect(host, tcp(port).await))
        .await
        .map_err(|e| e.to_string())?;
    let client = Client::new(transport, ClientConfig::default());
    soon(client.open(None, false))
        .await
        .map_err(|e| e.to_string())?;
    soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
        .await
        .map_err(|e| e.to_string())?;
    Ok(())
}

#[tokio::test]
async fn certificates_decide_who_gets_in() {
    let ours = Authority::new("tls-ours");
    let others = Authority::new("tls-others");
    for authority in [&ours, &others] {
        let names = ["localhost", "127.0.0.1"];
        authority.issue("server", &names, ExtendedKeyUsagePurpose::ServerAuth, 1);
        authority.issue("client", &[], ExtendedKeyUsagePurpose::ClientAuth, 2);
        authority.issue("old", &[], ExtendedKeyUsagePurpose::ClientAuth, 3);
    }
    let server = Server::new(router().0, ServerConfig::default());
    let tls = TlsServer::new(&ours.server()).unwrap();
    let port = listen(&server, Some(tls)).await;
    let good = ours.client("client");
    try_tls(port, "localhost", &good).await.unwrap();
    try_tls(port, "127.0.0.1", &good).await.unwrap();

    // Another CA's client, no certificate at all, a server's used for a client.
    let stranger = ClientFiles {
        ca: ours.path("cacert.pem"),
        ..others.client("client")
    };
    try_tls(port, "localhost", &stranger).await.unwrap_err();
    let nobody = ClientFiles {
        identity: None,
        ..good.clone()
    };
    try_tls(port, "localhost", &nobody).await.unwrap_err();
    let wrong = ours.client("server");
    try_tls(port, "localhost", &wrong).await.unwrap_err();

    // A server that is another than it says, or that another CA vouches for; who does not look gets in.
    try_tls(port, "elsewhere", &good).await.unwrap_err();
    let careful = ClientFiles {
        ca: others.path("cacert.pem"),
        ..good.clone()
    };
    try_tls(port, "localhost", &careful).await.unwrap_err();
    let careless = ClientFiles {
        verify: false,
        ..careful
    };
    try_tls(port, "elsewhere", &careless).await.unwrap();

    // What the CA took back.
    let crl = CertificateRevocationListParams {
        this_update: date_time_ymd(2020, 1, 1),
        next_update: date_time_ymd(2120, 1, 1),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from(3u64),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let crl = crl.signed_by(&ours.issuer).unwrap().pem().unwrap();
    std::fs::write(ours.path("cacrl.pem"), crl).unwrap();
    let files = ServerFiles {
        crl: Some(ours.path("cacrl.pem")),
        ..ours.server()
    };
    let strict = listen(&server, Some(TlsServer::new(&files).unwrap())).await;
    try_tls(strict, "localhost", &good).await.unwrap();
    let old = ours.client("old");
    try_tls(port, "localhost", &old).await.unwrap();
    try_tls(strict, "localhost", &old).await.unwrap_err();

    // Clients that want no TLS, or say nothing, hold nobody up.
    let mut plain = tcp(port).await;
    let hello = Frame::new(Header::call(procs::AUTH_LIST, 0), &()).unwrap();
    plain.write_all(&hello.to_wire().unwrap()).await.unwrap();
    let silent = tcp(port).await;
    let mut said = Vec::new();
    // An alert, and then the end.
    let _ = soon(plain.read_to_end(&mut said)).await;
    assert!(said.len() < 28, "an answer without TLS: {said:?}");
    try_tls(port, "localhost", &good).await.unwrap();
    drop(silent);
}

#[tokio::test]
async fn files_that_are_no_certificates_are_named() {
    let ours = Authority::new("tls-files");
    ours.issue(
        "server",
        &["localhost"],
        ExtendedKeyUsagePurpose::ServerAuth,
        1,
    );
    let files = ours.server();
    let said = |files: &ServerFiles| TlsServer::new(files).unwrap_err().to_string();
    let missing = ServerFiles {
        ca: ours.path("nothing.pem"),
        ..files.clone()
    };
    assert!(said(&missing).contains("nothing.pem"), "{}", said(&missing));
    std::fs::write(ours.path("bad.pem"), "hello").unwrap();
    let bad = ServerFiles {
        certificate: ours.path("bad.pem"),
        ..files.clone()
    };
    assert!(said(&bad).contains("bad.pem"), "{}", said(&bad));
    let swapped = ServerFiles {
        key: ours.path("servercert.pem"),
        ..files
    };
    assert!(said(&swapped).contains("private key"), "{}", said(&swapped));
}

#[derive(Debug)]
struct Polkit {
    asked: AtomicU32,
}

impl Authorizer for Polkit {
    fn authorize(&self, peer: Peer, access: SocketAccess) -> Authorized {
        assert_eq!(access, SocketAccess::ReadWrite);
        assert!(peer.pid.is_some());
        // The first is refused.
        let first = self.asked.fetch_add(1, Ordering::SeqCst) == 0;
        Box::pin(async move {
            if first {
                let text = "access denied by policy";
                return Err(RemoteError::new(
                    ErrorCode::AUTH_FAILED,
                    ErrorDomain::POLKIT,
                    text,
                ));
            }
            Ok(())
        })
    }
}

/// A connection whose peer the kernel says is no superuser. Run as root, the sockets are made by a thread that has become
/// somebody else: the credentials of a socket are those of who made it.
fn as_nobody(server: &Server, entrance: Entrance) -> Option<UnixStream> {
    // SAFETY: geteuid takes nothing and cannot fail.
    let superuser = unsafe { libc::geteuid() } == 0;
    let pair = || std::os::unix::net::UnixStream::pair().unwrap();
    let (ours, theirs) = if superuser {
        // On this thread only: the raw system call changes no other thread's.
        std::thread::spawn(move || {
            const NOBODY: libc::c_long = 65_534;
            // SAFETY: the system call changes this thread's effective user and no memory.
            let changed = unsafe {
                libc::syscall(
                    libc::SYS_setresuid,
                    -1 as libc::c_long,
                    NOBODY,
                    -1 as libc::c_long,
                )
            };
            (changed == 0).then(pair)
        })
        .join()
        .unwrap()?
    } else {
        pair()
    };
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).unwrap();
    }
    let theirs = UnixStream::from_std(theirs).unwrap();
    let server = server.clone();
    tokio::spawn(async move {
        server
            .serve(Transport::unix(theirs).unwrap(), entrance)
            .await
    });
    Some(UnixStream::from_std(ours).unwrap())
}

#[tokio::test]
async fn nothing_is_served_before_polkit_agrees() {
    let polkit = Arc::new(Polkit {
        asked: AtomicU32::new(0),
    });
    let server = Server::new(router().0, ServerConfig::default());
    let entrance = Entrance {
        access: SocketAccess::ReadWrite,
        authorizer: Some(polkit.clone()),
    };
    let Some(stream) = as_nobody(&server, entrance.clone()) else {
        println!("left out: a client that is not root needs the right to become another user");
        return;
    };
    let client = Client::new(Transport::unix(stream).unwrap(), ClientConfig::default());
    let types = soon(client.call(procs::AUTH_LIST, &()))
        .await
        .unwrap()
        .types;
    assert_eq!(types.0, [2]);
    let error = soon(client.call(procs::CONNECT_OPEN, &ConnectOpenArgs::default())).await;
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("authentication required")
    );
    let error = soon(client.open(None, false)).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::AUTH_FAILED));
    assert!(
        error.to_string().contains("access denied by policy"),
        "{error}"
    );
    let error = soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle"))).await;
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("authentication required")
    );
    // The second time it agrees.
    soon(client.open(None, false)).await.unwrap();
    soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
        .await
        .unwrap();
    assert_eq!(polkit.asked.load(Ordering::SeqCst), 2);
    // Nobody is asked about the superuser.
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn({
            let server = server.clone();
            async move {
                server
                    .serve(Transport::unix(theirs).unwrap(), entrance)
                    .await
            }
        });
        let root = Client::new(Transport::unix(ours).unwrap(), ClientConfig::default());
        soon(root.open(None, false)).await.unwrap();
        assert_eq!(polkit.asked.load(Ordering::SeqCst), 2);
    }
}

fn connect(server: &Server) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = server.clone();
    tokio::spawn(async move {
        server
            .serve(Transport::unix(theirs).unwrap(), SocketAccess::ReadWrite)
            .await
    });
    ours
}

#[tokio::test]
async fn clients_that_do_not_open_wait_for_each_other_and_not_for_ever() {
    let config = ServerConfig {
        max_anonymous_clients: 2,
        open_timeout: Duration::from_millis(300),
        ..Default::default()
    };
    let server = Server::new(router().0, config);
    let opened = Client::new(
        Transport::unix(connect(&server)).unwrap(),
        ClientConfig::default(),
    );
    soon(opened.open(None, false)).await.unwrap();
    let mut idle = [connect(&server), connect(&server)];
    // The third has to wait until these are given up; who is in goes on.
    let late = Client::new(
        Transport::unix(connect(&server)).unwrap(),
        ClientConfig::default(),
    );
    soon(opened.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
        .await
        .unwrap();
    soon(late.open(None, false)).await.unwrap();
    for stream in &mut idle {
        let mut byte = [0];
        assert_eq!(
            soon(stream.read(&mut byte)).await.unwrap(),
            0,
            "it is given up"
        );
    }
    // Who opened in time stays.
    tokio::time::sleep(Duration::from_millis(400)).await;
    for client in [&opened, &late] {
        soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_given_up() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let config = ClientConfig {
        keepalive: Some(Keepalive {
            interval: Duration::from_millis(20),
            count: 2,
        }),
        ..Default::default()
    };
    let client = Client::new(Transport::unix(ours).unwrap(), config);
    // A server that opens the connection and then falls silent.
    tokio::spawn(async move {
        let mut decoder = FrameDecoder::new();
        let mut chunk = [0; 4096];
        let mut answered = 0;
        loop {
            let wanted = decoder.wanted().min(chunk.len());
            let got = theirs.read(&mut chunk[..wanted]).await.unwrap();
            if got == 0 {
                return;
            }
            let Ok(Some(decoded)) = decoder.feed(&chunk[..got]) else {
                continue;
            };
            let header = decoded.frame.header;
            if header.kind != MessageType::Call || answered == 3 {
                continue;
            }
            answered += 1;
            let payload = match header.procedure {
                66 => vec![0, 0, 0, 1, 0, 0, 0, 0],
                60 => vec![0, 0, 0, 1],
                _ => Vec::new(),
            };
            let reply = header.answer(MessageType::Reply, rpc::frame::Status::Ok);
            let reply = Frame {
                header: reply,
                payload,
                fds: Vec::new(),
            };
            theirs.write_all(&reply.to_wire().unwrap()).await.unwrap();
        }
    });
    soon(client.open(None, false)).await.unwrap();
    let error = soon(client.call(procs::CONNECT_GET_HOSTNAME, &())).await;
    let text = error.unwrap_err().to_string();
    assert_eq!(text, "connection closed due to keepalive timeout");
}

/// Sends back the shape of what it got: holes and data.
fn sparse_router() -> Router<common::Daemon> {
    let (router, _) = router();
    router.on_stream(
        procs::STORAGE_VOL_UPLOAD,
        |_, args: StorageVolUploadArgs, mut stream: Stream| async move {
            /// VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM
            const SPARSE: u32 = 1;
            if args.flags & SPARSE != 0 {
                stream.allow_holes();
            }
            tokio::spawn(async move {
                while let Ok(Some(event)) = stream.reader.next().await {
                    let sent = match event {
                        StreamEvent::Data(data) => stream.writer.write(&data).await,
                        StreamEvent::Hole(length) => stream.writer.hole(length).await,
                        StreamEvent::EndOfData => Ok(()),
                        StreamEvent::Finish => return stream.writer.finish().await.unwrap(),
                    };
                    sent.unwrap();
                }
            });
            Ok(())
        },
    )
}

#[tokio::test]
async fn holes_are_passed_where_they_were_asked_for_and_nowhere_else() {
    let server = Server::new(sparse_router(), ServerConfig::default());
    let client = Client::new(
        Transport::unix(connect(&server)).unwrap(),
        ClientConfig::default(),
    );
    soon(client.open(None, false)).await.unwrap();
    let mut args = StorageVolUploadArgs {
        vol: StorageVol::default(),
        flags: 1,
        ..Default::default()
    };
    let ((), mut stream) = soon(client.call_sparse_stream(procs::STORAGE_VOL_UPLOAD, &args))
        .await
        .unwrap();
    soon(stream.writer.write(b"abc")).await.unwrap();
    soon(stream.writer.hole(1 << 40)).await.unwrap();
    soon(stream.writer.write(b"def")).await.unwrap();
    let mut came = Vec::new();
    for _ in 0..3 {
        came.push(soon(stream.reader.next()).await.unwrap().unwrap());
    }
    assert_eq!(
        came,
        [
            StreamEvent::Data(b"abc".to_vec()),
            StreamEvent::Hole(1 << 40),
            StreamEvent::Data(b"def".to_vec())
        ]
    );
    soon(stream.writer.finish()).await.unwrap();

    // Without the flag zeros travel.
    args.flags = 0;
    let ((), mut stream) = soon(client.call_stream(procs::STORAGE_VOL_UPLOAD, &args))
        .await
        .unwrap();
    soon(stream.writer.hole(5)).await.unwrap();
    let zeros = soon(stream.reader.next()).await.unwrap();
    assert_eq!(zeros, Some(StreamEvent::Data(vec![0; 5])));
    soon(stream.writer.finish()).await.unwrap();

    // A hole that was not agreed on ends the stream and nothing else.
    let ((), mut stream) = soon(client.call_sparse_stream(procs::STORAGE_VOL_UPLOAD, &args))
        .await
        .unwrap();
    soon(stream.writer.hole(5)).await.unwrap();
    let error = soon(stream.reader.next()).await.unwrap_err();
    assert!(error.to_string().contains("not asked for"), "{error}");
    soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
        .await
        .unwrap();
}
