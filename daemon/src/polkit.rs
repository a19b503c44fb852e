//! Asking polkit whether a client may use a socket, as libvirtd does: through `pkcheck`, about libvirt's actions.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
use rpc::server::{Authorized, Authorizer, SocketAccess};
use rpc::transport::Peer;
use tokio::process::Command;

/// How long a person may take to type a password.
const LIMIT: Duration = Duration::from_secs(120);

/// polkit's command-line client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Polkit {
    pkcheck: PathBuf,
}

impl Polkit {
    /// polkit, if its client is installed.
    pub fn find() -> Option<Self> {
        let path = env::var_os("PATH")?;
        env::split_paths(&path)
            .map(|folder| folder.join("pkcheck"))
            .find(|path| path.is_file())
            .map(|pkcheck| Self { pkcheck })
    }

    /// Whether polkit knows libvirt's actions: without, it would refuse everybody.
    pub fn knows_libvirt() -> bool {
        Path::new("/usr/share/polkit-1/actions/org.libvirt.unix.policy").is_file()
    }
}

/// When a process started, in the kernel's ticks: with its id it names one process for ever.
fn start_time(pid: i32) -> io::Result<u64> {
    /// Fields behind the name, which may hold blanks: proc(5) counts this one as the 22nd.
    const AFTER_NAME: usize = 19;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    rest.split_whitespace()
        .nth(AFTER_NAME)
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

impl Authorizer for Polkit {
    fn authorize(&self, peer: Peer, access: SocketAccess) -> Authorized {
        let pkcheck = self.pkcheck.clone();
        Box::pin(async move {
            let action = match access {
                SocketAccess::ReadWrite => "org.libvirt.unix.manage",
                SocketAccess::ReadOnly => "org.libvirt.unix.monitor",
            };
            let failed = |code: ErrorCode, text: String| {
                log::info!("user {}, process {:?}: {text}", peer.uid, peer.pid);
                RemoteError::new(code, ErrorDomain::POLKIT, text)
            };
            let denied = |text: String| failed(ErrorCode::AUTH_FAILED, text);
            let Some(pid) = peer.pid else {
                return Err(denied("the client's process is not known".to_owned()));
            };
            let started = start_time(pid)
                .map_err(|error| denied(format!("the client's process {pid}: {error}")))?;
            let mut command = Command::new(&pkcheck);
            command
                .args(["--action-id", action, "--process"])
                .arg(format!("{pid},{started},{}", peer.uid))
                .arg("--allow-user-interaction")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .kill_on_drop(true);
            let status = match tokio::time::timeout(LIMIT, command.status()).await {
                Err(_) => return Err(denied(format!("no answer from polkit about {action}"))),
                Ok(Err(error)) => {
                    return Err(denied(format!("{}: {error}", pkcheck.display())));
                }
                Ok(Ok(status)) => status,
            };
            // pkcheck(1).
            match status.code() {
                Some(0) => Ok(()),
                Some(2) => Err(failed(
                    ErrorCode::AUTH_UNAVAILABLE,
                    format!("no polkit agent available to authenticate action '{action}'"),
                )),
                Some(3) => Err(failed(
                    ErrorCode::AUTH_CANCELLED,
                    format!("user cancelled authentication process for action '{action}'"),
                )),
                _ => Err(denied("access denied by policy".to_owned())),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::files::testing::TempFolder;

    #[tokio::test]
    async fn pkcheck_is_asked_about_the_process_and_its_answer_counts() {
        let folder = TempFolder::new();
        let pkcheck = folder.0.join("pkcheck");
        let said = folder.0.join("said");
        let own = std::process::id() as i32;
        let peer = Peer {
            uid: 1000,
            gid: 1000,
            pid: Some(own),
        };
        for (status, code) in [
            (0, None),
            (1, Some(ErrorCode::AUTH_FAILED)),
            (2, Some(ErrorCode::AUTH_UNAVAILABLE)),
            (3, Some(ErrorCode::AUTH_CANCELLED)),
        ] {
            let script = format!(
                "#!/bin/sh\necho \"$@\" >{}\nexit {status}\n",
                said.display()
            );
            fs::write(&pkcheck, script).unwrap();
            fs::set_permissions(&pkcheck, fs::Permissions::from_mode(0o755)).unwrap();
            let polkit = Polkit {
                pkcheck: pkcheck.clone(),
            };
            let answer = polkit.authorize(peer, SocketAccess::ReadWrite).await;
            assert_eq!(answer.err().map(|error| error.code), code);
            let started = start_time(own).unwrap();
            assert_eq!(
                fs::read_to_string(&said).unwrap(),
                format!(
                    "--action-id org.libvirt.unix.manage --process {own},{started},1000 \
                     --allow-user-interaction\n"
                )
            );
        }
        let gone = Polkit {
            pkcheck: folder.0.join("nothing"),
        };
        let error = gone.authorize(peer, SocketAccess::ReadOnly).await;
        assert_eq!(error.unwrap_err().code, ErrorCode::AUTH_FAILED);
    }
}
