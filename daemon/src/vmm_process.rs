//! One `vireo-vmm` process: started with its descriptors, recognised after a daemon's restart,
//! watched and ended through a pidfd.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Which process it is: a pid alone may be another one's by now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (proc(5), stat field 22).
    pub start_time: u64,
}

impl Identity {
    /// Reads `/proc/PID/stat`, or the copy that a starting VMM leaves (see [`spawn`]).
    pub fn parse_stat(stat: &str) -> Option<Self> {
        let (pid, rest) = stat.split_once(' ')?;
        // The program's name may contain anything, also parentheses and blanks.
        let (_, rest) = rest.rsplit_once(") ")?;
        Some(Self {
            pid: pid.parse().ok()?,
            start_time: rest.split(' ').nth(19)?.trim().parse().ok()?,
        })
    }

    /// The process that has this pid now.
    pub fn of(pid: u32) -> Option<Self> {
        Self::parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }
}

/// What a VMM is started with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its configuration.
    pub config: &'a Path,
    /// Standard output and error.
    pub log: File,
    /// Gets a copy of the process's own `/proc/self/stat` before the program runs: from the first
    /// instant on, a later daemon can find the process.
    pub stat_copy: File,
    /// Descriptors it inherits under the numbers they have here.
    pub inherited: Vec<OwnedFd>,
    /// `cgroup.procs` of the groups that it is in from its first instruction.
    pub groups: Vec<File>,
    /// Where its memory comes from: a policy of set_mempolicy(2), and a map of NUMA nodes.
    pub policy: Option<(libc::c_int, Vec<libc::c_ulong>)>,
}

/// A VMM process.
#[derive(Debug)]
pub struct VmmProcess {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
}

/// Starts a VMM in a session of its own. Our copies of its descriptors are closed.
///
/// # Errors
/// The system's: the program is not there, no memory, no process...
pub fn spawn(launch: Launch<'_>) -> io::Result<Spawned> {
    let inherited: Vec<RawFd> = launch.inherited.iter().map(AsRawFd::as_raw_fd).collect();
    let stat_copy = launch.stat_copy.as_raw_fd();
    let groups: Vec<RawFd> = launch.groups.iter().map(AsRawFd::as_raw_fd).collect();
    let policy = launch.policy;
    let mut command = Command::new(launch.program);
    command
        .arg("--config")
        .arg(launch.config)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(launch.log.try_clone()?)
        .stderr(launch.log);
    // SAFETY: between fork and exec the closure makes system calls on numbers and on its own
    // stack only; it neither allocates nor takes locks.
    unsafe {
        command.pre_exec(move || {
            enter(&groups, policy.as_ref())?;
            in_child(&inherited, stat_copy)
        });
    }
    let child = command.spawn()?;
    let pid = child.id();
    // Not waited for yet, so the pid is this child's, even if it has ended.
    let identity = Identity::of(pid).ok_or_else(|| io::Error::other("the process is gone"))?;
    Ok(Spawned {
        identity,
        pidfd: open_pidfd(pid)?,
    })
}

/// A process that was started, not watched yet.
#[derive(Debug)]
pub struct Spawned {
    identity: Identity,
    pidfd: OwnedFd,
}

impl Spawned {
    /// Watches it from now on. Needs the asynchronous runtime.
    ///
    /// # Errors
    /// The system's; the process is handed back.
    pub fn watch(self) -> Result<VmmProcess, (io::Error, Self)> {
        let identity = self.identity;
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
        let registered = unsafe { AsyncFd::register_with_interest(self.pidfd, Interest::READABLE) };
        match registered {
            Ok(pidfd) => Ok(VmmProcess { identity, pidfd }),
            Err(error) => {
                let (pidfd, error) = error.into_parts();
                Err((error, Self { identity, pidfd }))
            }
        }
    }

    /// Kills it at once.
    ///
    /// # Errors
    /// The system's; that it has ended already is none.
    pub fn kill(&self) -> io::Result<()> {
        send_signal(&self.pidfd, libc::SIGKILL)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// The system's; that it has ended already is none.
    pub fn signal(&self, signal: libc::c_int) -> io::Result<()> {
        send_signal(&self.pidfd, signal)
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        has_ended(&self.pidfd)
    }

    /// Ends it: it is asked first, killed after `grace`, and gone when this returns.
    ///
    /// # Errors
    /// The system's; it does not end.
    pub fn end(&self, grace: Duration) -> io::Result<()> {
        const KILL_LIMIT: Duration = Duration::from_secs(5);
        send_signal(&self.pidfd, libc::SIGTERM)?;
        if wait_for_end(&self.pidfd, grace) {
            return Ok(());
        }
        self.kill()?;
        if wait_for_end(&self.pidfd, KILL_LIMIT) {
            return Ok(());
        }
        Err(io::Error::from(io::ErrorKind::TimedOut))
    }
}

/// Finds a process that an earlier daemon started; `None` if it has ended.
///
/// # Errors
/// The system's.
pub fn find(identity: Identity) -> io::Result<Option<Spawned>> {
    let pidfd = match open_pidfd(identity.pid) {
        Ok(pidfd) => pidfd,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    // Asked after the pidfd is open: from then on it is the same process or none.
    Ok((Identity::of(identity.pid) == Some(identity)).then_some(Spawned { identity, pidfd }))
}

impl VmmProcess {
    /// Which process it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Waits for its end, and takes its exit status if it is our child.
    pub async fn ended(&self) -> Option<Ending> {
        loop {
            match self.pidfd.readable().await {
                Ok(mut guard) => {
                    if has_ended(self.pidfd.get_ref()) {
                        return reap(self.pidfd.get_ref());
                    }
                    guard.clear_ready();
                }
                Err(error) => {
                    // Only at the end of the runtime, when nobody waits any longer.
                    log::error!("cannot watch process {}: {error}", self.identity.pid);
                    return None;
                }
            }
        }
    }

    /// Kills it at once.
    ///
    /// # Errors
    /// The system's; that it has ended already is none.
    pub fn kill(&self) -> io::Result<()> {
        send_signal(self.pidfd.get_ref(), libc::SIGKILL)
    }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With this exit status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "it ended with status {status}"),
            Self::Signal(signal) => write!(f, "it was ended by signal {signal}"),
        }
    }
}

/// Takes the process that calls it into groups, and sets its policy of memory. Runs in the child between fork and
/// exec: system calls only.
fn enter(groups: &[RawFd], policy: Option<&(libc::c_int, Vec<libc::c_ulong>)>) -> io::Result<()> {
    for &group in groups {
        // SAFETY: one byte is read from a constant.
        if unsafe { libc::write(group, b"0".as_ptr().cast(), 1) } != 1 {
            return Err(io::Error::last_os_error());
        }
    }
    if let Some((policy, nodes)) = policy {
        // The kernel counts one bit less than it is given.
        let bits = nodes.len() * libc::c_ulong::BITS as usize + 1;
        // SAFETY: the kernel reads as many bits as the map has.
        let failed =
            unsafe { libc::syscall(libc::SYS_set_mempolicy, *policy, nodes.as_ptr(), bits) };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Runs in the child between fork and exec: system calls only.
fn in_child(inherited: &[RawFd], stat_copy: RawFd) -> io::Result<()> {
    const STAT: &CStr = c"/proc/self/stat";
    let check = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    };
    // SAFETY: numbers in, numbers out; the buffer outlives the calls that use it.
    unsafe {
        check(libc::setsid())?;
        // What the daemon itself inherited without close-on-exec is no business of the VMM.
        check(libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        ) as libc::c_int)?;
        for &fd in inherited {
            check(libc::fcntl(fd, libc::F_SETFD, 0))?;
        }
        let stat = check(libc::open(STAT.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC))?;
        let mut buffer = [0u8; 1024];
        let length = libc::read(stat, buffer.as_mut_ptr().cast(), buffer.len());
        let Ok(length) = usize::try_from(length) else {
            return Err(io::Error::last_os_error());
        };
        if libc::write(stat_copy, buffer.as_ptr().cast(), length) != length as isize {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

pub(crate) fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two numbers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn send_signal(pidfd: &OwnedFd, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: pidfd_send_signal(2) with no siginfo takes only numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error),
    }
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    wait_for_end(pidfd, Duration::ZERO)
}

/// Whether the process ends within `limit`.
pub(crate) fn wait_for_end(pidfd: &OwnedFd, limit: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let limit = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut poll, 1, limit) == 1 }
}

/// Takes the exit status of a child; another daemon's child has none for us.
fn reap(pidfd: &OwnedFd) -> Option<Ending> {
    // SAFETY: an all-zero siginfo_t is valid, waitid(2) fills it, and the fields read are those
    // that it sets for an ended child.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let result = libc::waitid(
            libc::P_PIDFD,
            pidfd.as_raw_fd() as libc::id_t,
            &mut info,
            libc::WEXITED | libc::WNOHANG,
        );
        if result != 0 || info.si_pid() == 0 {
            return None;
        }
        Some(match info.si_code {
            libc::CLD_EXITED => Ending::Status(info.si_status()),
            _ => Ending::Signal(info.si_status()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempFolder;

    fn launch_script(folder: &Path, script: &str, inherited: Vec<OwnedFd>) -> Spawned {
        let program = folder.join("vmm");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&program, mode).unwrap();
        spawn(Launch {
            program: &program,
            config: Path::new("/config.json"),
            log: File::create(folder.join("log")).unwrap(),
            stat_copy: File::create(folder.join("stat")).unwrap(),
            inherited,
            groups: Vec::new(),
            policy: None,
        })
        .unwrap()
    }

    #[test]
    fn stat_lines_with_strange_names_are_understood() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 777 9 9";
        let identity = Identity::parse_stat(stat).unwrap();
        assert_eq!((identity.pid, identity.start_time), (42, 777));
        assert_eq!(Identity::parse_stat("half (x"), None);
    }

    #[tokio::test]
    async fn a_process_inherits_what_it_is_given_and_is_seen_to_end() {
        let folder = TempFolder::new();
        let target: OwnedFd = File::create(folder.0.join("out")).unwrap().into();
        let number = target.as_raw_fd();
        // Not `>&N`, which this shell knows up to 9 only.
        let script = format!("echo \"$@\" >/proc/self/fd/{number}; exit 3");
        let process = launch_script(&folder.0, &script, vec![target]);
        let process = process.watch().unwrap();
        assert_eq!(process.ended().await, Some(Ending::Status(3)));
        let out = fs::read_to_string(folder.0.join("out")).unwrap();
        assert_eq!(out, "--config /config.json\n");
        let stat = fs::read_to_string(folder.0.join("stat")).unwrap();
        assert_eq!(Identity::parse_stat(&stat), Some(process.identity()));
        assert!(find(process.identity()).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_process_is_found_again_and_killed() {
        let folder = TempFolder::new();
        let process = launch_script(&folder.0, "sleep 600", Vec::new());
        let identity = process.identity;
        let wrong = Identity {
            start_time: identity.start_time + 1,
            ..identity
        };
        assert!(find(wrong).unwrap().is_none());
        let found = find(identity).unwrap().unwrap().watch().unwrap();
        found.kill().unwrap();
        assert_eq!(found.ended().await, Some(Ending::Signal(9)));
    }
}
