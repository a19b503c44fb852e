//! Daemons on other hosts: through TLS with certificates, or through ssh and a helper on the far side.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rpc::client::{Client, ClientConfig};
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

/// A program that passes everything on: ssh, as a rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ssh {
    /// The program.
    pub program: String,
    /// What it is told.
    pub args: Vec<String>,
}

/// What an ssh URI says.
#[derive(Debug, Clone, Copy)]
pub struct SshParts<'a> {
    /// `user@host`
    pub host: &'a str,
    /// `user@`
    pub user: Option<&'a str>,
    /// `:port`
    pub port: Option<u16>,
    /// `command`: the program instead of ssh.
    pub command: Option<&'a str>,
    /// `keyfile`
    pub keyfile: Option<&'a str>,
    /// `netcat`: the program that reaches a socket on the far side.
    pub netcat: Option<&'a str>,
    /// `proxy`: `auto`, `native` or `netcat`.
    pub proxy: Option<&'a str>,
    /// `socket`: on the far side.
    pub socket: Option<&'a str>,
    /// `no_verify`: the host's key may be anything.
    pub unverified: bool,
    /// `no_tty`: nobody is there to type passwords.
    pub silent: bool,
    /// `vireo` or `qemu`.
    pub driver: &'a str,
    /// `/system` or `/session`.
    pub path: &'a str,
    /// Only to look.
    pub readonly: bool,
}

/// A word that a shell takes as it is.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl SshParts<'_> {
    /// The command that reaches the daemon.
    pub fn ssh(&self) -> Ssh {
        let mut args: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| args.extend(words.iter().map(|word| (*word).to_owned()));
        if let Some(port) = self.port {
            add(&["-p", &port.to_string()]);
        }
        if let Some(user) = self.user {
            add(&["-l", user]);
        }
        if let Some(key) = self.keyfile {
            add(&["-i", key]);
        }
        add(&["-T", "-e", "none"]);
        if self.silent {
            add(&["-o", "BatchMode=yes"]);
        }
        if self.unverified {
            add(&["-o", "StrictHostKeyChecking=no"]);
        }
        add(&["--", self.host, &format!("sh -c {}", quote(&self.script()))]);
        Ssh {
            program: self.command.unwrap_or("ssh").to_owned(),
            args,
        }
    }

    /// What runs on the far side: our helper, libvirt's, or netcat on whichever daemon's socket is there.
    fn script(&self) -> String {
        let flag = if self.readonly { " -r" } else { "" };
        let long = if self.readonly { " --readonly" } else { "" };
        let ro = if self.readonly { "-ro" } else { "" };
        let uri = match self.socket {
            Some(socket) => format!("{}+unix://{}?socket={socket}", self.driver, self.path),
            None => format!("{}://{}", self.driver, self.path),
        };
        let mut script = String::new();
        if self.proxy != Some("netcat") {
            script.push_str(&format!(
                "if command -v vireo >/dev/null 2>&1; then exec vireo ssh-helper{long} {}; fi; ",
                quote(&uri)
            ));
            if self.socket.is_none() {
                let uri = format!("qemu://{}", self.path);
                script.push_str(&format!(
                    "if command -v virt-ssh-helper >/dev/null 2>&1; then exec virt-ssh-helper{flag} {}; fi; ",
                    quote(&uri)
                ));
            }
        }
        if self.proxy == Some("native") {
            script.push_str("echo 'neither vireo nor virt-ssh-helper is installed' >&2; exit 1");
            return script;
        }
        let netcat = quote(self.netcat.unwrap_or("nc"));
        match self.socket {
            Some(socket) => script.push_str(&format!("exec {netcat} -U {}", quote(socket))),
            None => {
                let folder = if self.path == "/system" {
                    "/run"
                } else {
                    "${XDG_RUNTIME_DIR:-/run/user/$(id -u)}"
                };
                script.push_str(&format!(
                    "s={folder}/vireo/vireo-sock{ro}; \
                     if ! [ -S \"$s\" ]; then s={folder}/libvirt/libvirt-sock{ro}; fi; \
                     exec {netcat} -U \"$s\""
                ));
            }
        }
        script
    }
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

    const PARTS: SshParts<'_> = SshParts {
        host: "h",
        user: None,
        port: None,
        command: None,
        keyfile: None,
        netcat: None,
        proxy: None,
        socket: None,
        unverified: false,
        silent: false,
        driver: "vireo",
        path: "/system",
        readonly: false,
    };

    #[test]
    fn ssh_is_told_what_the_uri_says() {
        let ssh = SshParts {
            user: Some("u"),
            port: Some(22),
            keyfile: Some("/k"),
            unverified: true,
            silent: true,
            ..PARTS
        }
        .ssh();
        assert_eq!(ssh.program, "ssh");
        let (script, options) = ssh.args.split_last().unwrap();
        assert_eq!(
            options.join(" "),
            "-p 22 -l u -i /k -T -e none -o BatchMode=yes -o StrictHostKeyChecking=no -- h"
        );
        assert!(script.starts_with("sh -c '"), "{script}");
    }

    #[test]
    fn a_hostile_uri_stays_one_word() {
        let script = SshParts {
            socket: Some("/x'; echo broken; '"),
            netcat: Some("echo"),
            proxy: Some("netcat"),
            ..PARTS
        }
        .script();
        let shown = Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&shown.stdout),
            "-U /x'; echo broken; '\n"
        );
    }

    #[test]
    fn the_far_side_is_asked_for_a_helper_or_netcat() {
        let auto = PARTS.script();
        assert!(
            auto.contains("exec vireo ssh-helper 'vireo:///system'"),
            "{auto}"
        );
        assert!(
            auto.contains("exec virt-ssh-helper 'qemu:///system'"),
            "{auto}"
        );
        assert!(auto.contains("s=/run/vireo/vireo-sock;"), "{auto}");
        let netcat = SshParts {
            proxy: Some("netcat"),
            netcat: Some("/bin/nc"),
            socket: Some("/s"),
            ..PARTS
        };
        assert_eq!(netcat.script(), "exec '/bin/nc' -U '/s'");
        let native = SshParts {
            proxy: Some("native"),
            readonly: true,
            ..PARTS
        };
        assert!(
            native
                .script()
                .contains("vireo ssh-helper --readonly 'vireo:///system'")
        );
        assert!(!native.script().contains("nc"));
    }

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
