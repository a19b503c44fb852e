//! The way to a daemon through ssh: the command that is run here, and what it has run on the far side.

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
    /// `known_hosts`: the file with the keys of hosts.
    pub known_hosts: Option<&'a str>,
    /// Seconds that connecting may take, where somebody waits who can't give up.
    pub patience: Option<u32>,
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
        if let Some(file) = self.known_hosts {
            // As its configuration has it: one word, which ends at no space.
            let file: String = file
                .chars()
                .filter(|c| *c != '"' && !c.is_control())
                .collect();
            add(&["-o", &format!("UserKnownHostsFile=\"{file}\"")]);
        }
        if let Some(seconds) = self.patience {
            add(&["-o", &format!("ConnectTimeout={seconds}")]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

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
        known_hosts: None,
        patience: None,
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
            known_hosts: Some("/a b\"\n"),
            patience: Some(7),
            silent: true,
            ..PARTS
        }
        .ssh();
        assert_eq!(ssh.program, "ssh");
        let (script, options) = ssh.args.split_last().unwrap();
        assert_eq!(
            options.join(" "),
            "-p 22 -l u -i /k -T -e none -o BatchMode=yes -o StrictHostKeyChecking=no \
             -o UserKnownHostsFile=\"/a b\" -o ConnectTimeout=7 -- h"
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
}
