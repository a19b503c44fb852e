//! Daemons on other hosts: through TLS with certificates, or through ssh and a helper on the far side.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rpc::client::{Client, ClientConfig};
use rpc::ssh::Ssh;
use rpc::tls::{ClientFiles, TlsClient};
use rpc::transport::Transport;
use tokio::runtime::Runtime;

use crate::commands::os_message;
use crate::failure::{Failure, Result};

/// The certificates of a client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Certificates {
    /// `pkipath`: the one folder that holds them all.
    pub folder: Option<PathBuf>,
    /// The user's own, if there are any: `$HOME/.pki/libvirt`.
    pub own: Option<PathBuf>,
    /// `no_verify`: the server may be anybody.
    pub unverified: bool,
}

impl Certificates {
    /// Where libvirt's clients look: in the folder that was named; else the user's own files; else the host's.
    fn files(&self) -> ClientFiles {
        let find = |name: &str, host: &str| match (&self.folder, &self.own) {
            (Some(folder), _) => folder.join(name),
            (None, Some(own)) if own.join(name).is_file() => own.join(name),
            _ => PathBuf::from(host).join(name),
        };
        let certificate = find("clientcert.pem", "/etc/pki/libvirt");
        let key = find("clientkey.pem", "/etc/pki/libvirt/private");
        ClientFiles {
            ca: find("cacert.pem", "/etc/pki/CA"),
            // A server may want none; one that does says so.
            identity: certificate.is_file().then_some((certificate, key)),
            verify: !self.unverified,
        }
    }
}

/// Connects through TLS.
///
/// # Errors
///
/// The host cannot be reached, or one side does not like the other's certificate.
pub fn connect_tls(
    runtime: &Runtime,
    host: &str,
    port: u16,
    certificates: &Certificates,
    config: ClientConfig,
) -> Result<Client> {
    let tls = TlsClient::new(&certificates.files()).map_err(|e| Failure::new(e.to_string()))?;
    runtime.block_on(async {
        let stream = super::connection::reach_tcp(host, port, config).await?;
        let transport = tls.connect(host, stream).await.map_err(|error| {
            Failure::new(format!(
                "unable to use TLS with '{host}:{port}': {}",
                os_message(&error)
            ))
        })?;
        Ok(Client::new(transport, config))
    })
}

/// Connects through a program's standard input and output.
///
/// # Errors
///
/// It cannot be started.
pub fn connect_ssh(
    runtime: &Runtime,
    ssh: &Ssh,
    config: ClientConfig,
) -> Result<(Client, Passing)> {
    let cannot = |error: io::Error| {
        Failure::new(format!(
            "cannot run {}: {}",
            ssh.program,
            os_message(&error)
        ))
    };
    let (ours, theirs) = StdUnixStream::pair().map_err(cannot)?;
    ours.set_nonblocking(true).map_err(cannot)?;
    let input: OwnedFd = theirs.try_clone().map_err(cannot)?.into();
    let child = Command::new(&ssh.program)
        .args(&ssh.args)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .map_err(cannot)?;
    let passing = Passing(child);
    let _inside = runtime.enter();
    let stream = tokio::net::UnixStream::from_std(ours).map_err(cannot)?;
    // Descriptors don't get through, though this is a Unix socket.
    Ok((Client::new(Transport::new(stream), config), passing))
}

/// The program that passes on, which ends with its connection.
#[derive(Debug)]
pub struct Passing(Child);

impl Drop for Passing {
    fn drop(&mut self) {
        // It may have ended by itself; both only fail then.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Passes standard input and output on to a socket until that ends.
///
/// # Errors
///
/// The socket cannot be reached.
pub fn pass(socket: &Path) -> Result {
    let cannot = |error: io::Error| {
        Failure::new(format!(
            "Failed to connect socket to '{}': {}",
            socket.display(),
            os_message(&error)
        ))
    };
    let mut from = StdUnixStream::connect(socket).map_err(cannot)?;
    let mut to = from.try_clone().map_err(cannot)?;
    std::thread::spawn(move || {
        // However that ends, the daemon is told that nothing more comes, and ends the rest.
        let _ = copy(&mut io::stdin(), &mut to);
        let _ = to.shutdown(std::net::Shutdown::Write);
    });
    // The far side going away is this program's normal end.
    let _ = copy(&mut from, &mut io::stdout());
    Ok(())
}

/// Passes on what comes as it comes.
fn copy(from: &mut impl io::Read, to: &mut impl io::Write) -> io::Result<()> {
    let mut chunk = vec![0; 256 * 1024];
    loop {
        let got = match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(&chunk[..got])?;
        to.flush()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_where_libvirt_has_them() {
        let host = Certificates::default().files();
        assert_eq!(host.ca, Path::new("/etc/pki/CA/cacert.pem"));
        assert!(host.verify);
        let named = Certificates {
            folder: Some("/p".into()),
            unverified: true,
            ..Certificates::default()
        };
        assert_eq!(named.files().ca, Path::new("/p/cacert.pem"));
        assert!(!named.files().verify);
    }
}
