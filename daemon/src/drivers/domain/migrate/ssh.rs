//! Another host's daemon through ssh: the system's own client, which nobody answers questions for.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rpc::client::{Client, ClientConfig};
use rpc::ssh::SshParts;
use rpc::transport::Transport;
use rpc::uri::Parts;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::{CONNECT_LIMIT, lock};
use crate::error::{Error, Result};

/// As much as is kept of what ssh says.
const WORDS_MOST: usize = 4096;
/// How long to wait for the end of it.
const WORDS_LIMIT: Duration = Duration::from_secs(2);

/// An ssh that passes on, which ends with this.
#[derive(Debug)]
pub(super) struct Passing {
    child: Child,
    words: Arc<Mutex<String>>,
    ended: watch::Receiver<bool>,
}

impl Passing {
    /// Why there is no way through, if ssh says so.
    pub(super) async fn said(&self) -> Option<String> {
        let mut ended = self.ended.clone();
        // What it has said until then is told in any case.
        let _ = timeout(WORDS_LIMIT, ended.wait_for(|&ended| ended)).await;
        let words = lock(&self.words);
        let words = words.trim();
        (!words.is_empty()).then(|| words.to_owned())
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        // It may have ended by itself; both only fail then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts ssh; whether it gets through shows when the connection is used.
pub(super) fn connect(parts: &Parts<'_>, config: ClientConfig) -> Result<(Client, Passing)> {
    let cannot = |error: std::io::Error| Error::system("cannot run ssh", &error);
    let ssh = SshParts {
        host: &parts.host,
        user: parts.user,
        port: parts.port,
        command: None,
        keyfile: parts.option("keyfile"),
        netcat: parts.option("netcat"),
        proxy: parts.option("proxy"),
        socket: parts.option("socket"),
        unverified: parts.flag("no_verify"),
        known_hosts: parts.option("known_hosts"),
        patience: u32::try_from(CONNECT_LIMIT.as_secs()).ok(),
        // Nobody is there who could type.
        silent: true,
        driver: parts.driver,
        path: parts.path,
        readonly: false,
    }
    .ssh();
    let (ours, theirs) = StdUnixStream::pair().map_err(cannot)?;
    ours.set_nonblocking(true).map_err(cannot)?;
    let input: OwnedFd = theirs.try_clone().map_err(cannot)?.into();
    let mut child = Command::new(&ssh.program)
        .args(&ssh.args)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::piped())
        // A signal to the daemon's terminal is none to it.
        .process_group(0)
        .spawn()
        .map_err(cannot)?;
    let words = Arc::new(Mutex::new(String::new()));
    let (tell, ended) = watch::channel(false);
    let errors = child.stderr.take();
    let passing = Passing {
        child,
        words: Arc::clone(&words),
        ended,
    };
    if let Some(mut errors) = errors {
        let reader = move || {
            let mut chunk = [0; 512];
            while let Ok(got @ 1..) = errors.read(&mut chunk) {
                let said = String::from_utf8_lossy(chunk.get(..got).unwrap_or_default());
                log::debug!("ssh: {}", said.trim_end());
                let mut words = lock(&words);
                if words.len() < WORDS_MOST {
                    words.push_str(&said);
                }
            }
            // Nobody may want to know.
            let _ = tell.send(true);
        };
        let thread = std::thread::Builder::new().name("ssh".into());
        thread.spawn(reader).map_err(cannot)?;
    }
    let stream = UnixStream::from_std(ours).map_err(cannot)?;
    // Descriptors don't get through, though this is a Unix socket.
    Ok((Client::new(Transport::new(stream), config), passing))
}
