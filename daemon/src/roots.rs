//! Where everything lives that the system owns.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use crate::files::make_folder;

/// The folders of one installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// Definitions: `etc/vireo`.
    pub config: PathBuf,
    /// What is kept across boots and is not a definition: `var/lib/vireo`.
    pub data: PathBuf,
    /// Logs: `var/log/vireo`.
    pub log: PathBuf,
    /// Live state and sockets: `run/vireo`.
    pub run: PathBuf,
    /// A user's own daemon rather than the host's.
    pub session: bool,
}

/// No place could be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no home directory is known: set HOME and XDG_RUNTIME_DIR, or give --root DIR")]
pub struct NoPlace;

impl Roots {
    /// Chooses: `root` (from `--root` or VIREO_ROOT), else the host's folders for the superuser,
    /// else the user's XDG folders.
    ///
    /// # Errors
    /// Neither XDG variables nor HOME are set for a user.
    pub fn choose(
        root: Option<&Path>,
        superuser: bool,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, NoPlace> {
        if let Some(root) = root {
            return Ok(Self::below(root, !superuser));
        }
        if superuser {
            return Ok(Self::below(Path::new("/"), false));
        }
        let set = |name: &str| env(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let xdg = |name: &str, default: &str| {
            set(name)
                .or_else(|| set("HOME").map(|home| home.join(default)))
                .map(|folder| folder.join("vireo"))
                .ok_or(NoPlace)
        };
        Ok(Self {
            config: xdg("XDG_CONFIG_HOME", ".config")?,
            data: xdg("XDG_DATA_HOME", ".local/share")?,
            log: xdg("XDG_CACHE_HOME", ".cache")?.join("log"),
            run: xdg("XDG_RUNTIME_DIR", ".cache/vireo/run")?,
            session: true,
        })
    }

    fn below(root: &Path, session: bool) -> Self {
        Self {
            config: root.join("etc/vireo"),
            data: root.join("var/lib/vireo"),
            log: root.join("var/log/vireo"),
            run: root.join("run/vireo"),
            session,
        }
    }

    /// Makes the folders that are missing.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn make(&self) -> io::Result<()> {
        // The read-only socket is for everybody, so its folder can be entered by everybody;
        // what must not be seen in it has a folder of its own.
        make_folder(&self.run, 0o755)?;
        for folder in [self.live_domains(), self.config.clone(), self.data.clone()] {
            make_folder(&folder, 0o700)?;
        }
        make_folder(&self.domain_logs(), 0o700)
    }

    /// What is added to names on the host that another installation's daemon might choose too: nothing for the host's.
    pub fn suffix(&self) -> String {
        use std::hash::{DefaultHasher, Hash, Hasher};
        if self.run == Path::new("/run/vireo") {
            return String::new();
        }
        let mut hasher = DefaultHasher::new();
        self.run.hash(&mut hasher);
        format!(".{:08x}", hasher.finish() as u32)
    }

    /// Persistent domain definitions.
    pub fn domains(&self) -> PathBuf {
        self.config.join("domains")
    }

    /// Persistent network definitions.
    pub fn networks(&self) -> PathBuf {
        self.config.join("networks")
    }

    /// One folder for each network that is up, named by uuid.
    pub fn live_networks(&self) -> PathBuf {
        self.run.join("networks")
    }

    /// Addresses that networks have given to guests.
    pub fn leases(&self) -> PathBuf {
        self.data.join("dnsmasq")
    }

    /// Definitions and values of secrets.
    pub fn secrets(&self) -> PathBuf {
        self.config.join("secrets")
    }

    /// Persistent definitions of storage pools.
    pub fn storage(&self) -> PathBuf {
        self.config.join("storage")
    }

    /// One file for each active storage pool.
    pub fn live_storage(&self) -> PathBuf {
        self.run.join("storage")
    }

    /// Dumps that nobody has given a name.
    pub fn dumps(&self) -> PathBuf {
        self.data.join("dump")
    }

    /// Managed saves.
    pub fn saves(&self) -> PathBuf {
        self.data.join("save")
    }

    /// Descriptions of snapshots, a folder for each domain.
    pub fn snapshots(&self) -> PathBuf {
        self.data.join("snapshot")
    }

    /// Sockets of guests' channels, a folder for each running domain.
    pub fn channels(&self) -> PathBuf {
        self.data.join("channel/target")
    }

    /// One folder for each running domain, named by uuid.
    pub fn live_domains(&self) -> PathBuf {
        self.run.join("domains")
    }

    /// `NAME.log` of every domain.
    pub fn domain_logs(&self) -> PathBuf {
        self.log.join("domains")
    }

    /// The daemon's own log.
    pub fn daemon_log(&self) -> PathBuf {
        self.log.join("vireod.log")
    }

    /// The socket for managing.
    pub fn socket(&self) -> PathBuf {
        self.run.join("vireo-sock")
    }

    /// The socket for looking.
    pub fn read_only_socket(&self) -> PathBuf {
        self.run.join("vireo-sock-ro")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<OsString> {
        match name {
            "HOME" => Some("/home/u".into()),
            "XDG_RUNTIME_DIR" => Some("/run/user/7".into()),
            _ => None,
        }
    }

    #[test]
    fn a_root_relocates_everything() {
        let roots = Roots::choose(Some(Path::new("/x")), true, |_| None).unwrap();
        assert_eq!(roots.domains(), Path::new("/x/etc/vireo/domains"));
        assert_eq!(roots.socket(), Path::new("/x/run/vireo/vireo-sock"));
        assert_eq!(roots.domain_logs(), Path::new("/x/var/log/vireo/domains"));
    }

    #[test]
    fn a_user_gets_xdg_folders() {
        let roots = Roots::choose(None, false, env).unwrap();
        assert_eq!(roots.config, Path::new("/home/u/.config/vireo"));
        assert_eq!(roots.socket(), Path::new("/run/user/7/vireo/vireo-sock"));
        assert_eq!(roots.log, Path::new("/home/u/.cache/vireo/log"));
        assert!(roots.session);
        assert!(Roots::choose(None, false, |_| None).is_err());
    }
}
