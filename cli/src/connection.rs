//! The connection to a daemon: reaching it, starting it if it is ours, calling it.

use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, IsTerminal, Read, Seek, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rpc::client::{Client, ClientConfig, ClientError};
use rpc::procs::{self, Access, Procedure};
use rpc::stream::StreamError;
use rpc::transport::Transport as Carrier;
use rpc::xdr::{Decode, Encode};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

use crate::commands::os_message;
use crate::failure::{Failure, Result};
use crate::far::{self, Passing};
use crate::uri::{Target, Transport};

/// How often, and how often in vain, a daemon is asked whether it is alive; `None` is virsh's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keepalive {
    interval: Option<u32>,
    count: Option<u32>,
}

impl Keepalive {
    /// As `--keepalive-interval` (seconds, 0 for never) and `--keepalive-count` say.
    pub fn new(interval: Option<u32>, count: Option<u32>) -> Self {
        Self { interval, count }
    }

    fn config(self) -> ClientConfig {
        let mut config = ClientConfig::default();
        if let Some(keepalive) = &mut config.keepalive {
            if let Some(interval) = self.interval {
                keepalive.interval = Duration::from_secs(interval.into());
            }
            if let Some(count) = self.count {
                keepalive.count = count;
            }
        }
        if self.interval == Some(0) {
            config.keepalive = None;
        }
        config
    }
}

/// How to connect.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    /// Only to look.
    pub readonly: bool,
    /// Signs of life.
    pub keepalive: Keepalive,
    /// The connection is served also between calls, as an interactive shell needs, so that the daemon doesn't take the
    /// silence for death.
    pub background: bool,
    /// A daemon of ours that isn't running is started.
    pub starts: bool,
}

/// A connection that was opened.
#[derive(Debug)]
pub struct Connection {
    // Before the runtime, which the client's task lives in.
    client: Client,
    runtime: Runtime,
    /// What passes the connection on, if something does.
    _passing: Option<Passing>,
    uri: String,
    readonly: bool,
}

impl Connection {
    /// Connects, and opens what the target names.
    ///
    /// # Errors
    ///
    /// There is nobody to connect to, or the daemon refuses.
    pub fn open(target: Target, manner: Manner) -> Result<Self> {
        let Manner {
            readonly,
            keepalive,
            background,
            starts,
        } = manner;
        let mut builder = if background {
            Builder::new_multi_thread()
        } else {
            Builder::new_current_thread()
        };
        if background {
            builder.worker_threads(1);
        }
        let runtime = builder.enable_all().build().map_err(|error| {
            Failure::new(format!(
                "cannot prepare a connection: {}",
                os_message(&error)
            ))
        })?;
        let config = keepalive.config();
        let mut passing = None;
        let client = match &target.transport {
            Transport::Local { root, socket } if starts => {
                reach_local(&runtime, root.as_deref(), socket, config)?
            }
            Transport::Local { socket, .. } | Transport::Unix(socket) => {
                connect_unix(&runtime, socket, config)
                    .map_err(|error| unreachable_socket(socket, &error))?
            }
            Transport::Tcp { host, port } => connect_tcp(&runtime, host, *port, config)?,
            Transport::Tls {
                host,
                port,
                certificates,
            } => far::connect_tls(&runtime, host, *port, certificates, config)?,
            Transport::Ssh(ssh) => {
                let (client, ssh) = far::connect_ssh(&runtime, ssh, config)?;
                passing = Some(ssh);
                client
            }
        };
        let opened = |client: &Client| runtime.block_on(client.open(Some(&target.name), readonly));
        let client = match (opened(&client), &target.transport) {
            // A daemon that was dying took the call. Nothing is lost by that: there will be another one.
            (Err(_), Transport::Local { root, socket }) if starts && client.is_closed() => {
                let client = reach_local(&runtime, root.as_deref(), socket, config)?;
                opened(&client).map_err(failure)?;
                client
            }
            (outcome, _) => outcome.map(|()| client).map_err(failure)?,
        };
        Ok(Self {
            client,
            runtime,
            _passing: passing,
            uri: target.uri,
            readonly,
        })
    }

    /// The URI, as the user gave it.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Whether the daemon is gone.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Calls a procedure and waits for the answer.
    ///
    /// # Errors
    ///
    /// The connection is read-only and the call isn't; the daemon's; or the connection is lost.
    pub fn call<A: Encode, R: Decode>(
        &mut self,
        procedure: Procedure<A, R>,
        args: &A,
    ) -> Result<R> {
        self.check_access(procedure.number())?;
        self.runtime
            .block_on(self.client.call(procedure, args))
            .map_err(failure)
    }

    /// Calls a procedure on `other`, which is served in the background, and serves this connection meanwhile: its daemon
    /// would take the silence for death.
    ///
    /// # Errors
    ///
    /// The daemon's refusal, or the connection's end.
    pub fn call_on<A: Encode, R: Decode>(
        &self,
        other: &Self,
        procedure: Procedure<A, R>,
        args: &A,
    ) -> Result<R> {
        other.check_access(procedure.number())?;
        let calling = other.client.call(procedure, args);
        self.runtime.block_on(calling).map_err(failure)
    }

    /// Calls a procedure once for each of these, without waiting for one answer before the next call: a question about
    /// each of many domains costs one way there and back for a great many of them. Answers are in the order of the calls.
    ///
    /// # Errors
    ///
    /// The connection is read-only and the calls aren't.
    pub fn call_each<A, R>(
        &mut self,
        procedure: Procedure<A, R>,
        all: impl IntoIterator<Item = A>,
    ) -> Result<Vec<Result<R>>>
    where
        A: Encode + Send + Sync + 'static,
        R: Decode + Send + 'static,
    {
        /// As many as wait at one time.
        const AHEAD: usize = 64;
        self.check_access(procedure.number())?;
        let client = &self.client;
        Ok(self.runtime.block_on(async {
            let (mut answers, mut waiting) = (Vec::new(), VecDeque::new());
            for args in all {
                if waiting.len() == AHEAD {
                    answers.extend(answer(waiting.pop_front()).await);
                }
                let client = client.clone();
                waiting.push_back(tokio::spawn(
                    async move { client.call(procedure, &args).await },
                ));
            }
            while !waiting.is_empty() {
                answers.extend(answer(waiting.pop_front()).await);
            }
            answers
        }))
    }

    /// Refuses a change over a read-only connection, as libvirt's library does before it asks the daemon.
    ///
    /// # Errors
    ///
    /// The connection is read-only and the call isn't.
    pub fn check_access(&self, procedure: i32) -> Result {
        match procs::info(procedure) {
            Some(info) if self.readonly && info.access == Access::Write => {
                Err(Failure::new(format!(
                    "operation forbidden: read only access prevents {}",
                    info.function()
                )))
            }
            _ => Ok(()),
        }
    }

    /// Runs something that uses the client by itself: streams, events.
    pub fn run<T>(&self, work: impl AsyncFnOnce(Client) -> T) -> T {
        self.runtime.block_on(work(self.client.clone()))
    }
}

/// What came of a call that was made beside others.
async fn answer<R>(
    call: Option<JoinHandle<std::result::Result<R, ClientError>>>,
) -> Option<Result<R>> {
    let answered = call?.await;
    Some(match answered {
        Ok(answer) => answer.map_err(failure),
        Err(error) => Err(Failure::new(format!("a call failed inside: {error}"))),
    })
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.client.is_closed() {
            // Saying goodbye is polite; the daemon notices the end of the connection in any case.
            let _ = self.runtime.block_on(self.client.clone().close());
        }
    }
}

/// What the user is told about a failed call.
pub fn failure(error: ClientError) -> Failure {
    let disconnected = matches!(
        error,
        ClientError::Io(_)
            | ClientError::Disconnected(_)
            | ClientError::Stream(StreamError::Disconnected)
    );
    let line = match error.remote() {
        Some(remote) => remote.message().to_owned(),
        None => match &error {
            ClientError::Io(error) => os_message(error),
            other => other.to_string(),
        },
    };
    Failure {
        lines: vec![line],
        disconnected,
        code: error.code(),
    }
}

fn connect_unix(
    runtime: &Runtime,
    socket: &Path,
    config: ClientConfig,
) -> std::result::Result<Client, ClientError> {
    runtime.block_on(Client::connect_unix(socket, config))
}

fn unreachable_socket(socket: &Path, error: &ClientError) -> Failure {
    let why = match error {
        ClientError::Io(error) => os_message(error),
        other => other.to_string(),
    };
    Failure::new(format!(
        "Failed to connect socket to '{}': {why}",
        socket.display()
    ))
}

fn connect_tcp(runtime: &Runtime, host: &str, port: u16, config: ClientConfig) -> Result<Client> {
    runtime.block_on(async {
        let stream = reach_tcp(host, port, config).await?;
        Ok(Client::new(Carrier::new(stream), config))
    })
}

/// Connects to a port.
///
/// # Errors
///
/// Nobody answers there.
pub async fn reach_tcp(host: &str, port: u16, config: ClientConfig) -> Result<TcpStream> {
    let connecting = TcpStream::connect((host, port));
    let stream = within(config.connect_timeout, connecting)
        .await
        .map_err(|error| {
            Failure::new(format!(
                "unable to connect to server at '{host}:{port}': {}",
                os_message(&error)
            ))
        })?;
    // Calls are small and each waits for its answer; if this fails, they are only slower.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// Passes standard input and output on to a daemon on this host, which is started if it is ours and isn't running.
///
/// # Errors
///
/// It cannot be reached, or is on another host.
pub fn pass(target: &Target) -> Result {
    let socket = match &target.transport {
        Transport::Unix(socket) => socket,
        Transport::Local { root, socket } => {
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| Failure::new(os_message(&error)))?;
            // This one says nothing and goes: it only sees to it that somebody listens.
            reach_local(&runtime, root.as_deref(), socket, ClientConfig::default())?;
            socket
        }
        _ => {
            return Err(Failure::new(
                "only a daemon on this host can be passed on to",
            ));
        }
    };
    far::pass(socket)
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// How long a daemon that was started may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(15);
/// How long to go on trying after the started daemon ended: another client's may be coming up.
const GRACE: Duration = Duration::from_secs(2);
/// A daemon that a client started ends after so many seconds without clients and running domains.
const IDLE_SECONDS: u32 = 120;

/// Connects to a daemon of ours; starts it first if it isn't running.
fn reach_local(
    runtime: &Runtime,
    root: Option<&Path>,
    socket: &Path,
    config: ClientConfig,
) -> Result<Client> {
    // Or it dies, and took the connection before.
    let absent = |error: &ClientError| {
        use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};
        matches!(error, ClientError::Io(error)
            if matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe))
    };
    let first = match connect_unix(runtime, socket, config) {
        Ok(client) => return Ok(client),
        Err(error) => error,
    };
    // The host's daemon is root's to start.
    // SAFETY: geteuid takes nothing, changes nothing and cannot fail.
    let superuser = unsafe { libc::geteuid() } == 0;
    let system = root.is_none() && socket.starts_with("/run/vireo");
    if !absent(&first) || (system && !superuser) {
        return Err(unreachable_socket(socket, &first));
    }
    let mut daemon = Started::new(root)?;
    let began = Instant::now();
    let mut progress = Progress::new("Starting vireod");
    let mut ended: Option<Instant> = None;
    let mut pause = Duration::from_millis(2);
    loop {
        match connect_unix(runtime, socket, config) {
            Ok(client) => return Ok(client),
            Err(error) if !absent(&error) => return Err(unreachable_socket(socket, &error)),
            Err(_) => {}
        }
        let now = Instant::now();
        if ended.is_none() && daemon.has_ended() {
            ended = Some(now);
        }
        let in_vain = ended.is_some_and(|ended| now.duration_since(ended) > GRACE);
        if in_vain || began.elapsed() > START_LIMIT {
            progress.clear();
            return Err(unreachable_socket(socket, &first).context(daemon.complaint()));
        }
        progress.tick();
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// A daemon that this program started. It lives on.
struct Started {
    program: PathBuf,
    child: Child,
    /// What it writes to standard error before it is up.
    errors: std::fs::File,
}

impl Started {
    fn new(root: Option<&Path>) -> Result<Self> {
        let program = find_daemon();
        let cannot = |error: &io::Error| {
            Failure::new(format!(
                "cannot start the daemon {}: {}",
                program.display(),
                os_message(error)
            ))
        };
        let errors = memory_file().map_err(|error| cannot(&error))?;
        let stderr = errors.try_clone().map_err(|error| cannot(&error))?;
        let mut command = Command::new(&program);
        if let Some(root) = root {
            command.arg("--root").arg(root);
        }
        command.arg("--timeout").arg(IDLE_SECONDS.to_string());
        // No folder of the user's is kept busy by it, and no terminal holds it.
        command
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        // SAFETY: between fork and exec only setsid is called, which is safe there: it takes nothing and
        // touches no memory.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 {
                    Err(io::Error::last_os_error())
                } else {
                    Ok(())
                }
            });
        }
        let child = command.spawn().map_err(|error| cannot(&error))?;
        Ok(Self {
            program,
            child,
            errors,
        })
    }

    fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Why it does not answer.
    fn complaint(&mut self) -> String {
        let how = match self.child.try_wait() {
            Ok(Some(status)) => format!("ended ({status})"),
            _ => "does not answer".into(),
        };
        let mut text = String::new();
        let read = self
            .errors
            .rewind()
            .and_then(|()| (&mut self.errors).take(4096).read_to_string(&mut text));
        let last = text
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .filter(|_| read.is_ok());
        match last {
            Some(line) => format!("the daemon {} {how}: {line}", self.program.display()),
            None => format!("the daemon {} {how}", self.program.display()),
        }
    }
}

/// Where the daemon's program is: `$VIREOD`, beside this program, or in `$PATH`.
fn find_daemon() -> PathBuf {
    if let Some(named) = std::env::var_os("VIREOD").filter(|value| !value.is_empty()) {
        return named.into();
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join("vireod")));
    beside
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from("vireod"))
}

/// A file that has no name and goes away with its last user.
fn memory_file() -> io::Result<std::fs::File> {
    // SAFETY: the name is a valid C string; the call has no other effect than making a descriptor.
    let fd = unsafe { libc::memfd_create(c"vireod-stderr".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Shows on a terminal that something takes longer than a second.
struct Progress {
    what: &'static str,
    began: Instant,
    shown: u64,
}

impl Progress {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            began: Instant::now(),
            shown: 0,
        }
    }

    fn tick(&mut self) {
        let seconds = self.began.elapsed().as_secs();
        if seconds > self.shown && io::stderr().is_terminal() {
            self.shown = seconds;
            // Only for people who watch; nothing is lost without it.
            let _ = write!(io::stderr(), "\r{} ({seconds} s)", self.what);
        }
    }

    fn clear(&mut self) {
        if self.shown > 0 {
            self.shown = 0;
            // As above.
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keepalive_options_change_only_what_they_name() {
        let default = ClientConfig::default();
        assert_eq!(Keepalive::default().config(), default);
        assert_eq!(Keepalive::new(Some(0), Some(3)).config().keepalive, None);
        let keepalive = Keepalive::new(None, Some(3)).config().keepalive.unwrap();
        assert_eq!(keepalive.count, 3);
        assert_eq!(keepalive.interval, default.keepalive.unwrap().interval);
    }

    #[test]
    fn a_socket_nobody_listens_on_is_named() {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let socket = std::env::temp_dir().join(format!("vireo-nobody-{}", std::process::id()));
        let error = connect_unix(&runtime, &socket, ClientConfig::default()).unwrap_err();
        let failure = unreachable_socket(&socket, &error);
        let expected = format!(
            "Failed to connect socket to '{}': No such file or directory",
            socket.display()
        );
        assert_eq!(failure.lines, [expected]);
    }
}
