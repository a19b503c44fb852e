//! A network of a test's own: namespaces that go with the test's process.

use std::ffi::CString;
use std::io;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Rig, Run};

/// Gives the calling thread, and whatever it starts from now on, a network and mounts of its own.
/// `Err` says what is missing for that.
///
/// # Errors
/// It needs root, and the program ip.
pub fn enter() -> Result<(), String> {
    // SAFETY: geteuid takes nothing; unshare takes a number, and this thread's own view changes.
    let entered = unsafe {
        if libc::geteuid() != 0 {
            return Err("needs root, for a network namespace".to_owned());
        }
        libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS)
    };
    if entered != 0 {
        let error = io::Error::last_os_error();
        return Err(format!("needs a network namespace: {error}"));
    }
    let mount = |source: &str, target: &str, kind: &str, flags: libc::c_ulong| {
        let word = |text: &str| CString::new(text).unwrap();
        let (source, target, kind) = (word(source), word(target), word(kind));
        // SAFETY: three strings that live here, and no data.
        let mounted = unsafe {
            libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                flags,
                std::ptr::null(),
            )
        };
        if mounted == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        Err(format!("needs the right to mount: {error}"))
    };
    mount("none", "/", "none", libc::MS_REC | libc::MS_PRIVATE)?;
    // It shows the devices of the namespace in which it was mounted.
    mount("sysfs", "/sys", "sysfs", 0)?;
    if !crate::which("ip") {
        return Err("needs ip (iproute2)".to_owned());
    }
    ip("link set lo up");
    Ok(())
}

/// Puts a file in the place of a program, for this thread and what it starts.
pub fn replace_program(path: &str, with: &str) {
    let word = |text: &str| CString::new(text).unwrap();
    let (source, target, none) = (word(with), word(path), word("none"));
    // SAFETY: three strings that live here, and no data.
    let mounted = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            none.as_ptr(),
            libc::MS_BIND,
            std::ptr::null(),
        )
    };
    assert_eq!(mounted, 0, "{path}: {}", io::Error::last_os_error());
}

/// Runs `ip` with these words.
#[track_caller]
pub fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    Run::from(output).ok()
}

/// Another host: a network namespace with one card, whose other end is here.
#[derive(Debug)]
pub struct Peer {
    process: Child,
}

impl Peer {
    /// A host with this address (`10.0.0.2/24`), and a device here with that one.
    pub fn new(rig: &Rig, device: &str, here: &str, there: &str) -> Self {
        let process = rig
            .command("vireod")
            .get_envs()
            .fold(Command::new("unshare"), |mut command, (name, value)| {
                if let Some(value) = value {
                    command.env(name, value);
                }
                command
            })
            .args(["--net", "sleep", "3600"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let peer = Self { process };
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::fs::read_link(format!("/proc/{}/ns/net", peer.process.id())).unwrap() == own {
            assert!(Instant::now() < deadline, "no second namespace");
            std::thread::sleep(Duration::from_millis(5));
        }
        ip(&format!("link add {device} type veth peer name {device}p"));
        ip(&format!("link set {device}p netns {}", peer.process.id()));
        ip(&format!("addr add {here} dev {device}"));
        ip(&format!("link set {device} up"));
        peer.run("ip link set lo up").ok();
        peer.run(&format!("ip addr add {there} dev {device}p")).ok();
        peer.run(&format!("ip link set {device}p up")).ok();
        peer
    }

    /// Runs a command there.
    pub fn run(&self, line: &str) -> Run {
        self.command(line).output().unwrap().into()
    }

    /// A command to be run there.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.process.id().to_string(), "-n", "sh", "-c", line]);
        command
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
