//! Connection URIs: which daemon to talk to, and how to reach it.
//!
//! `vireo:///system` is the host's daemon, `vireo:///session` the user's own. `qemu:///…` is another spelling
//! of the same, so that configuration written for libvirt works. `+unix` and `?socket=PATH` name a socket,
//! also that of a stock libvirtd, whose other drivers (`test+unix:///default?socket=…`) then work as well.

use std::path::PathBuf;

use rpc::ssh::{Ssh, SshParts};
use rpc::uri::Parts;

use crate::failure::{Failure, Result};
use crate::far::Certificates;

/// A daemon and the way to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The URI as the user gave it, which `uri` prints.
    pub uri: String,
    /// What the daemon is asked to open: without transport and options.
    pub name: String,
    /// How to reach it.
    pub transport: Transport,
}

/// The way to a daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// A daemon of ours at its own place; started if it isn't running.
    Local {
        /// The folder that the daemon is told to live in (`--root`).
        root: Option<PathBuf>,
        /// Its socket.
        socket: PathBuf,
    },
    /// A socket that the user named.
    Unix(PathBuf),
    /// TLS.
    Tls {
        /// Host name or address.
        host: String,
        /// Port number.
        port: u16,
        /// Where the certificates are.
        certificates: Certificates,
    },
    /// A program that passes on.
    Ssh(Ssh),
    /// Plain TCP.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port number.
        port: u16,
    },
}

/// Where the user is: what decides the defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// `--root` or VIREO_ROOT.
    pub root: Option<PathBuf>,
    /// The effective user is root.
    pub superuser: bool,
    /// `$XDG_RUNTIME_DIR`
    pub runtime: Option<PathBuf>,
    /// `$HOME`
    pub home: Option<PathBuf>,
    /// `$VIREO_DEFAULT_URI`, or `$LIBVIRT_DEFAULT_URI` without it.
    pub default_uri: Option<String>,
}

impl Surroundings {
    /// Those of this process.
    pub fn of_process(root: Option<PathBuf>) -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let uri = |name: &str| variable(name).and_then(|value| value.into_string().ok());
        Self {
            root: root.or_else(|| variable("VIREO_ROOT").map(PathBuf::from)),
            // SAFETY: geteuid takes nothing, changes nothing and cannot fail.
            superuser: unsafe { libc::geteuid() } == 0,
            runtime: variable("XDG_RUNTIME_DIR").map(PathBuf::from),
            home: variable("HOME").map(PathBuf::from),
            default_uri: uri("VIREO_DEFAULT_URI").or_else(|| uri("LIBVIRT_DEFAULT_URI")),
        }
    }

    /// The folder of the sockets of the host's (`system`) or the user's own daemon.
    fn run_folder(&self, system: bool) -> Result<PathBuf> {
        if let Some(root) = &self.root {
            return Ok(root.join("run/vireo"));
        }
        if system || self.superuser {
            return Ok(PathBuf::from("/run/vireo"));
        }
        self.runtime
            .as_ref()
            .map(|folder| folder.join("vireo"))
            .or_else(|| {
                self.home
                    .as_ref()
                    .map(|home| home.join(".cache/vireo/run/vireo"))
            })
            .ok_or_else(|| {
                Failure::new(
                    "no home directory is known: set HOME and XDG_RUNTIME_DIR, or give --root DIR",
                )
            })
    }

    /// Resolves a URI, or the default one.
    ///
    /// # Errors
    ///
    /// The URI makes no sense, or asks for something that is not there.
    pub fn resolve(&self, uri: Option<&str>, readonly: bool) -> Result<Target> {
        let chosen = match uri
            .filter(|uri| !uri.is_empty())
            .or(self.default_uri.as_deref())
        {
            Some(uri) => uri.to_owned(),
            None if self.superuser => "vireo:///system".into(),
            None => "vireo:///session".into(),
        };
        let parts = Parts::parse(&chosen).map_err(|error| Failure::new(error.to_string()))?;
        let name = parts.name();
        let socket_name = if readonly {
            "vireo-sock-ro"
        } else {
            "vireo-sock"
        };
        let ours = matches!(parts.driver, "vireo" | "qemu");
        let transport = match parts.transport {
            None | Some("unix") if parts.host.is_empty() => match parts.option("socket") {
                Some(socket) => Transport::Unix(PathBuf::from(socket)),
                None if ours => {
                    let system = match parts.path {
                        "/system" => true,
                        "/session" => false,
                        path => {
                            return Err(Failure::new(format!(
                                "internal error: unexpected URI path '{path}', try {}:///system or {}:///session",
                                parts.driver, parts.driver
                            )));
                        }
                    };
                    let folder = self.run_folder(system)?;
                    Transport::Local {
                        root: self.root.clone(),
                        socket: folder.join(socket_name),
                    }
                }
                None => {
                    return Err(Failure::new(format!(
                        "no connection driver available for {chosen}: name the daemon's socket, as in \
                         {}+unix://{}?socket=PATH",
                        parts.driver, parts.path
                    )));
                }
            },
            Some("tcp") => Transport::Tcp {
                host: if parts.host.is_empty() {
                    "localhost".into()
                } else {
                    parts.host.clone()
                },
                port: parts.port.unwrap_or(16509),
            },
            Some("unix") => {
                return Err(Failure::new(format!(
                    "invalid argument: using unix socket and remote server '{}' is not supported",
                    parts.host
                )));
            }
            None | Some("tls") => Transport::Tls {
                host: if parts.host.is_empty() {
                    "localhost".into()
                } else {
                    parts.host.clone()
                },
                port: parts.port.unwrap_or(16514),
                certificates: Certificates {
                    folder: parts.option("pkipath").map(PathBuf::from),
                    own: self
                        .home
                        .as_ref()
                        .filter(|_| !self.superuser)
                        .map(|home| home.join(".pki/libvirt")),
                    unverified: parts.flag("no_verify"),
                },
            },
            Some("ssh") if parts.host.is_empty() => {
                return Err(Failure::new(format!(
                    "invalid argument: '{chosen}' names no host"
                )));
            }
            Some("ssh") => Transport::Ssh(
                SshParts {
                    host: &parts.host,
                    user: parts.user,
                    port: parts.port,
                    command: parts.option("command"),
                    keyfile: parts.option("keyfile"),
                    netcat: parts.option("netcat"),
                    proxy: parts.option("proxy"),
                    socket: parts.option("socket"),
                    unverified: parts.flag("no_verify"),
                    known_hosts: parts.option("known_hosts"),
                    patience: None,
                    silent: parts.flag("no_tty"),
                    driver: parts.driver,
                    path: parts.path,
                    readonly,
                }
                .ssh(),
            ),
            Some(other) => {
                return Err(Failure::new(format!(
                    "invalid argument: transport '{other}' in '{chosen}' is not supported: use +unix, +tcp, +tls or +ssh"
                )));
            }
        };
        Ok(Target {
            uri: chosen,
            name,
            transport,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Surroundings {
        Surroundings {
            superuser: true,
            ..Surroundings::default()
        }
    }

    fn user() -> Surroundings {
        Surroundings {
            runtime: Some("/run/user/7".into()),
            home: Some("/home/u".into()),
            ..Surroundings::default()
        }
    }

    fn local(path: &str) -> Transport {
        Transport::Local {
            root: None,
            socket: path.into(),
        }
    }

    #[test]
    fn the_default_is_the_hosts_daemon_for_root_and_the_own_one_for_others() {
        let target = root().resolve(None, false).unwrap();
        assert_eq!(
            (target.uri.as_str(), target.name.as_str()),
            ("vireo:///system", "vireo:///system")
        );
        assert_eq!(target.transport, local("/run/vireo/vireo-sock"));
        let target = user().resolve(None, true).unwrap();
        assert_eq!(target.uri, "vireo:///session");
        assert_eq!(target.transport, local("/run/user/7/vireo/vireo-sock-ro"));
        let bare = Surroundings {
            home: Some("/home/u".into()),
            ..Surroundings::default()
        };
        let target = bare.resolve(None, false).unwrap();
        assert_eq!(
            target.transport,
            local("/home/u/.cache/vireo/run/vireo/vireo-sock")
        );
        assert!(Surroundings::default().resolve(None, false).is_err());
    }

    #[test]
    fn a_root_moves_the_socket_and_the_daemon_is_told() {
        let surroundings = Surroundings {
            root: Some("/x".into()),
            ..user()
        };
        let target = surroundings.resolve(Some("qemu:///system"), false).unwrap();
        let socket = PathBuf::from("/x/run/vireo/vireo-sock");
        assert_eq!(
            target.transport,
            Transport::Local {
                root: Some("/x".into()),
                socket
            }
        );
    }

    #[test]
    fn the_environment_names_a_default() {
        let surroundings = Surroundings {
            default_uri: Some("qemu:///session".into()),
            ..user()
        };
        let target = surroundings.resolve(None, false).unwrap();
        assert_eq!(target.uri, "qemu:///session");
        assert_eq!(
            surroundings
                .resolve(Some("vireo:///system"), false)
                .unwrap()
                .uri,
            "vireo:///system"
        );
    }

    #[test]
    fn a_named_socket_is_used_and_kept_from_the_daemon() {
        let target = root()
            .resolve(Some("qemu+unix:///system?socket=/a%20b/sock&x=1"), false)
            .unwrap();
        assert_eq!(target.name, "qemu:///system?x=1");
        assert_eq!(target.uri, "qemu+unix:///system?socket=/a%20b/sock&x=1");
        assert_eq!(target.transport, Transport::Unix("/a b/sock".into()));
        let target = root()
            .resolve(Some("test+unix:///default?socket=/s"), false)
            .unwrap();
        assert_eq!(target.name, "test:///default");
        assert_eq!(target.transport, Transport::Unix("/s".into()));
    }

    #[test]
    fn tcp_has_libvirts_port() {
        let tcp = |uri| root().resolve(Some(uri), false).unwrap().transport;
        assert_eq!(
            tcp("vireo+tcp://h/system"),
            Transport::Tcp {
                host: "h".into(),
                port: 16509
            }
        );
        assert_eq!(
            tcp("qemu+tcp://u@[::1]:99/system"),
            Transport::Tcp {
                host: "::1".into(),
                port: 99
            }
        );
    }

    #[test]
    fn other_hosts_are_reached_by_tls_or_ssh() {
        let transport = |uri| user().resolve(Some(uri), true).unwrap().transport;
        for uri in ["qemu://h/system", "vireo+tls://h/system"] {
            let Transport::Tls {
                host,
                port,
                certificates,
            } = transport(uri)
            else {
                panic!("{uri}");
            };
            assert_eq!((host.as_str(), port), ("h", 16514));
            assert_eq!(certificates.own, Some("/home/u/.pki/libvirt".into()));
        }
        let Transport::Tls { certificates, .. } =
            transport("vireo+tls://h:1/system?pkipath=/p&no_verify=1")
        else {
            panic!();
        };
        assert_eq!(certificates.folder, Some("/p".into()));
        assert!(certificates.unverified);
        let Transport::Ssh(ssh) = transport("vireo+ssh://u@h:7/system?keyfile=/k%20k&command=/c")
        else {
            panic!();
        };
        assert_eq!(ssh.program, "/c");
        assert_eq!(&ssh.args[..6], ["-p", "7", "-l", "u", "-i", "/k k"]);
        assert!(ssh.args.last().unwrap().contains("ssh-helper --readonly"));
    }

    #[test]
    fn what_is_not_there_is_refused() {
        for uri in [
            "x",
            "://",
            "vireo://",
            "vireo:///foo",
            "xen:///system",
            "qemu+ssh:///system",
            "qemu+libssh2://host/system",
            "qemu+unix://host/system",
            "vireo+tcp://[::1/system",
            "vireo+tcp://h:x/system",
            "qemu+unix:///system?socket=%zz",
        ] {
            assert!(root().resolve(Some(uri), false).is_err(), "{uri}");
        }
    }
}
