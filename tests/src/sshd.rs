//! An ssh server of a test's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Rig, left_out, which};

/// An ssh server of the test's own on the loopback.
#[derive(Debug)]
pub struct Sshd {
    child: Child,
    /// Where it listens.
    pub port: u16,
    /// The key that it lets in.
    pub key: PathBuf,
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sshd {
    /// Starts one whose sessions find this rig's daemon; none after saying what is missing.
    pub fn start(rig: &Rig) -> Option<Self> {
        // SAFETY: geteuid takes nothing and cannot fail.
        let superuser = unsafe { libc::geteuid() } == 0;
        if !superuser || !Path::new("/usr/sbin/sshd").exists() || !which("ssh") {
            left_out("a connection through ssh needs root, ssh and sshd");
            return None;
        }
        let folder = rig.path("ssh");
        fs::create_dir_all(&folder).unwrap();
        for key in ["host", "user"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(folder.join(key))
                .status();
            assert!(made.unwrap().success());
        }
        // Where the parent of its sessions lives; distributions make it at boot.
        fs::create_dir_all("/run/sshd").unwrap();
        fs::copy(folder.join("user.pub"), folder.join("authorized")).unwrap();
        let own = rig.command("vireo");
        let bin = Path::new(own.get_program()).parent().unwrap();
        // As on a host without libvirt whose owner wants stock clients to find ours.
        fs::create_dir_all(rig.path("bin")).unwrap();
        let helper = bin.join("vireo-ssh-helper");
        std::os::unix::fs::symlink(helper, rig.path("bin/virt-ssh-helper")).unwrap();
        // A free port: found, let go, and taken again at once.
        for _ in 0..10 {
            let port = std::net::TcpListener::bind("127.0.0.1:0")
                .unwrap()
                .local_addr()
                .unwrap()
                .port();
            let config = format!(
                "ListenAddress 127.0.0.1:{port}\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\n\
                 StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\n\
                 PermitRootLogin prohibit-password\n\
                 SetEnv VIREO_ROOT={1} PATH={2}:{1}/bin:/usr/bin:/bin VIREO_TEST_RIG={3}\n",
                folder.display(),
                rig.root().display(),
                bin.display(),
                rig.root().file_name().unwrap().to_str().unwrap(),
            );
            fs::write(folder.join("config"), config).unwrap();
            let mut child = Command::new("/usr/sbin/sshd")
                .arg("-D")
                .arg("-e")
                .arg("-f")
                .arg(folder.join("config"))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(fs::File::create(folder.join("log")).unwrap())
                .spawn()
                .unwrap();
            let deadline = Instant::now() + Duration::from_secs(10);
            while child.try_wait().unwrap().is_none() && Instant::now() < deadline {
                if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return Some(Self {
                        child,
                        port,
                        key: folder.join("user"),
                    });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!(
            "sshd does not listen: {}",
            fs::read_to_string(folder.join("log")).unwrap_or_default()
        );
    }
}
