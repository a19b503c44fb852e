//! A small daemon for the tests: two domains, a console that echoes, events.
#![allow(dead_code)] // each test file uses its part

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rpc::args::*;
use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
use rpc::procs;
use rpc::server::{Call, Connection, Router, Server, ServerConfig, SocketAccess};
use rpc::stream::{Stream, serve_duplex};
use rpc::types::Domain;

pub struct Daemon {
    pub domains: Vec<Domain>,
    pub registered: Mutex<Vec<(i32, Connection)>>,
    pub gone: tokio::sync::mpsc::UnboundedSender<u64>,
}

pub type Answer<T> = Result<T, RemoteError>;

pub fn no_domain(name: &str) -> RemoteError {
    let text = format!("no domain with matching name '{name}'");
    RemoteError::new(ErrorCode::NO_DOMAIN, ErrorDomain::QEMU, text)
}

impl Daemon {
    fn domain(&self, name: &str) -> Answer<Domain> {
        self.domains
            .iter()
            .find(|dom| dom.name == name)
            .cloned()
            .ok_or_else(|| no_domain(name))
    }
}

async fn open(_: Call<Daemon>, _: ConnectOpenArgs) -> Answer<()> {
    Ok(())
}

async fn feature(
    _: Call<Daemon>,
    args: ConnectSupportsFeatureArgs,
) -> Answer<ConnectSupportsFeatureRet> {
    Ok(ConnectSupportsFeatureRet {
        supported: i32::from(matches!(args.feature, 10 | 14 | 15)),
    })
}

async fn nothing(_: Call<Daemon>, (): ()) -> Answer<()> {
    Ok(())
}

async fn list(
    call: Call<Daemon>,
    args: ConnectListAllDomainsArgs,
) -> Answer<ConnectListAllDomainsRet> {
    let wanted = |dom: &&Domain| match args.flags & 3 {
        1 => dom.active_id().is_some(),
        2 => dom.active_id().is_none(),
        _ => true,
    };
    let domains: Vec<Domain> = call
        .state()
        .domains
        .iter()
        .filter(wanted)
        .cloned()
        .collect();
    Ok(ConnectListAllDomainsRet {
        ret: domains.len() as u32,
        domains: domains.into(),
    })
}

async fn lookup(call: Call<Daemon>, args: DomainLookupByNameArgs) -> Answer<DomainLookupByNameRet> {
    Ok(DomainLookupByNameRet {
        dom: call.state().domain(&args.name)?,
    })
}

async fn state(call: Call<Daemon>, args: DomainGetStateArgs) -> Answer<DomainGetStateRet> {
    let dom = call.state().domain(&args.dom.name)?;
    Ok(DomainGetStateRet {
        state: if dom.active_id().is_some() { 1 } else { 5 },
        reason: 1,
    })
}

async fn create(call: Call<Daemon>, args: DomainCreateArgs) -> Answer<()> {
    let dom = call.state().domain(&args.dom.name)?;
    let text = "domain is already running";
    Err(RemoteError::new(ErrorCode::OPERATION_INVALID, ErrorDomain::QEMU, text).about(dom))
}

async fn node_info(_: Call<Daemon>, (): ()) -> Answer<NodeGetInfoRet> {
    Ok(NodeGetInfoRet {
        model: rpc::xdr::CharArray::from_text("x86_64"),
        memory: 2048 * 1024,
        cpus: 4,
        mhz: 3000,
        nodes: 1,
        sockets: 1,
        cores: 4,
        threads: 1,
    })
}

/// A console that gives back what it gets; "bye" ends it.
async fn console(call: Call<Daemon>, args: DomainOpenConsoleArgs, stream: Stream) -> Answer<()> {
    call.state().domain(&args.dom.name)?;
    tokio::spawn(async move {
        let (ours, theirs) = tokio::io::duplex(1000);
        let (from, to) = tokio::io::split(ours);
        let (mut guest_in, mut guest_out) = tokio::io::split(theirs);
        let echo = async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let mut chunk = [0; 4096];
            guest_out.write_all(b"hello from the guest\r\n").await?;
            loop {
                let got = guest_in.read(&mut chunk).await?;
                if got == 0 || chunk[..got].starts_with(b"bye") {
                    return Ok::<(), std::io::Error>(());
                }
                guest_out.write_all(&chunk[..got]).await?;
            }
        };
        let guest = tokio::spawn(echo);
        let _ = serve_duplex(stream, from, to).await;
        guest.abort();
    });
    Ok(())
}

async fn register(
    call: Call<Daemon>,
    args: ConnectDomainEventCallbackRegisterAnyArgs,
) -> Answer<ConnectDomainEventCallbackRegisterAnyRet> {
    let mut registered = call.state().registered.lock().unwrap();
    registered.push((args.event_id, call.connection().clone()));
    Ok(ConnectDomainEventCallbackRegisterAnyRet {
        callback_id: registered.len() as i32,
    })
}

pub fn router() -> (Router<Daemon>, tokio::sync::mpsc::UnboundedReceiver<u64>) {
    let (gone, is_gone) = tokio::sync::mpsc::unbounded_channel();
    let daemon = Daemon {
        domains: vec![
            Domain::new("running", [0x11; 16], Some(7)),
            Domain::new("idle", [0x22; 16], None),
        ],
        registered: Mutex::default(),
        gone,
    };
    let router = Router::new(daemon)
        .on(procs::CONNECT_OPEN, open)
        .on(procs::CONNECT_SUPPORTS_FEATURE, feature)
        .on(procs::CONNECT_REGISTER_CLOSE_CALLBACK, nothing)
        .on(procs::CONNECT_UNREGISTER_CLOSE_CALLBACK, nothing)
        .on(procs::CONNECT_LIST_ALL_DOMAINS, list)
        .on(procs::DOMAIN_LOOKUP_BY_NAME, lookup)
        .on(procs::DOMAIN_GET_STATE, state)
        .on(procs::DOMAIN_CREATE, create)
        .on(procs::NODE_GET_INFO, node_info)
        .on_stream(procs::DOMAIN_OPEN_CONSOLE, console)
        .on(procs::CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY, register)
        .on_disconnect(|daemon, connection| {
            let _ = daemon.gone.send(connection.id());
        });
    (router, is_gone)
}

/// A folder of this test's own, removed at the end.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("rpc-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn serve_at(path: &Path, access: SocketAccess, config: ServerConfig) -> Server {
    let server = Server::new(router().0, config);
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    let serving = server.clone();
    tokio::spawn(async move { serving.serve_unix(listener, access).await });
    server
}
