//! A daemon of its own for each test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rpc::args::{
    ConnectListAllDomainsArgs, DomainDefineXmlArgs, DomainGetXmlDescArgs, DomainLookupByNameArgs,
};
use rpc::client::{Client, ClientConfig, ClientError};
use rpc::procs;
use rpc::types::Domain;

/// Nothing here takes longer on the slowest machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A root folder, removed with it.
#[derive(Debug)]
pub struct Root(pub PathBuf);

impl Root {
    /// A new, empty one.
    pub fn new() -> Self {
        let path = std::env::temp_dir().join(format!("vireod-it-{}", uuid::Uuid::new_v4()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Persistent definitions.
    pub fn domains(&self) -> PathBuf {
        self.0.join("etc/vireo/domains")
    }

    /// The socket for managing.
    pub fn socket(&self) -> PathBuf {
        self.0.join("run/vireo/vireo-sock")
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running daemon, killed with it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts one, and waits until it serves.
    pub fn start(root: &Root) -> Self {
        Self::start_with(root, &[])
    }

    /// The same with environment variables.
    pub fn start_with(root: &Root, env: &[(&str, &str)]) -> Self {
        let _ = fs::remove_file(root.socket());
        let child = Command::new(env!("CARGO_BIN_EXE_vireod"))
            .arg("--root")
            .arg(&root.0)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut daemon = Self { child };
        let start = Instant::now();
        while !root.socket().exists() {
            assert!(
                daemon.child.try_wait().unwrap().is_none(),
                "the daemon ended"
            );
            assert!(start.elapsed() < LIMIT, "the daemon does not serve");
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it has died by itself.
    pub fn wait(mut self) {
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < LIMIT, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// SIGTERM, and its exit status.
    pub fn terminate(mut self) -> std::process::ExitStatus {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
        self.child.wait().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client of it.
pub async fn connect(root: &Root) -> Client {
    connect_to(&root.socket()).await
}

/// A client of a socket.
pub async fn connect_to(socket: &Path) -> Client {
    let start = Instant::now();
    loop {
        match Client::connect_unix(socket, ClientConfig::default()).await {
            Ok(client) => {
                client.open(Some("qemu:///system"), false).await.unwrap();
                return client;
            }
            // Bound, not yet listening.
            Err(error) => assert!(start.elapsed() < LIMIT, "{error}"),
        }
    }
}

/// A definition.
pub fn definition(name: &str, number: u128, title: &str) -> String {
    let uuid = uuid::Uuid::from_u128(number);
    format!(
        "<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><title>{title}</title>\
         <memory unit='MiB'>16</memory><os><type>hvm</type></os></domain>"
    )
}

/// Defines a domain.
pub async fn define(client: &Client, xml: &str) -> Result<Domain, ClientError> {
    let args = DomainDefineXmlArgs {
        xml: xml.to_owned(),
    };
    Ok(client.call(procs::DOMAIN_DEFINE_XML, &args).await?.dom)
}

/// Finds a domain.
pub async fn lookup(client: &Client, name: &str) -> Result<Domain, ClientError> {
    let args = DomainLookupByNameArgs {
        name: name.to_owned(),
    };
    Ok(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &args).await?.dom)
}

/// A domain's definition.
pub async fn xml(client: &Client, dom: Domain) -> String {
    let args = DomainGetXmlDescArgs { dom, flags: 0 };
    client
        .call(procs::DOMAIN_GET_XML_DESC, &args)
        .await
        .unwrap()
        .xml
}

/// Names of all domains.
pub async fn names(client: &Client) -> Vec<String> {
    let args = ConnectListAllDomainsArgs {
        need_results: 1,
        flags: 0,
    };
    let all = client
        .call(procs::CONNECT_LIST_ALL_DOMAINS, &args)
        .await
        .unwrap();
    all.domains.iter().map(|dom| dom.name.clone()).collect()
}

/// What went wrong, as a client sees it: code, domain, message.
pub fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (i32, i32, String) {
    match result.unwrap_err() {
        ClientError::Remote(error) => (error.code.0, error.domain.0, error.message().to_owned()),
        other => panic!("{other}"),
    }
}
