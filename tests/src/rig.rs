//! A relocated Vireo of a test's own.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::Terminal;

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Exit status; -1 if killed by a signal.
    pub status: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Run {
    /// The command succeeded: gives its standard output.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(
            self.status, 0,
            "command failed\nstdout: {}\nstderr: {}",
            self.out, self.err
        );
        self.out
    }

    /// The command failed with exit status 1 and an error message: gives standard error.
    #[track_caller]
    pub fn fails(self) -> String {
        assert_eq!(
            self.status, 1,
            "command did not fail as it should\nstdout: {}\nstderr: {}",
            self.out, self.err
        );
        assert!(
            self.err.contains("error:"),
            "no error message: {:?}",
            self.err
        );
        self.err
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// One relocated Vireo.
#[derive(Debug)]
pub struct Rig {
    root: PathBuf,
    tag: String,
}

static COUNTER: AtomicU32 = AtomicU32::new(0);

impl Rig {
    /// An empty root; the first command starts the daemon.
    pub fn new() -> Self {
        // Short: a UNIX socket's path has at most 107 bytes.
        let tag = format!(
            "vireo-{}-{}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let root = std::env::temp_dir().join(&tag);
        fs::create_dir_all(&root).unwrap();
        Self { root, tag }
    }

    /// The folder that everything of this Vireo is in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below the root.
    pub fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.path("run/vireo/vireo-sock")
    }

    /// One of our programs, prepared to run in this root.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(binary(program));
        command
            .env("VIREO_ROOT", &self.root)
            .env("VIREO_TEST_RIG", &self.tag)
            .env("LC_ALL", "C.UTF-8")
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env_remove("VIREO_DEFAULT_URI")
            .env_remove("LIBVIRT_DEFAULT_URI")
            .stdin(Stdio::null());
        command
    }

    /// Runs `vireo` with these arguments, at most a minute.
    pub fn vireo(&self, args: &[&str]) -> Run {
        run(self.command("vireo").args(args), None)
    }

    /// Runs `vireo` with `input` on standard input.
    pub fn vireo_with_input(&self, args: &[&str], input: &str) -> Run {
        run(self.command("vireo").args(args), Some(input))
    }

    /// The stock virsh, prepared to talk to this daemon (which must be running).
    pub fn virsh_command(&self) -> Command {
        let mut command = Command::new("virsh");
        command
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", &self.root)
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("VIREO_TEST_RIG", &self.tag)
            .arg("-c")
            .arg(self.uri())
            .stdin(Stdio::null());
        command
    }

    /// A stock program, prepared to leave its traces in this root only.
    pub fn stock(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", &self.root)
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("VIREO_TEST_RIG", &self.tag)
            .stdin(Stdio::null());
        command
    }

    /// The URI by which stock clients reach this daemon.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    /// Runs the stock virsh.
    pub fn virsh(&self, args: &[&str]) -> Run {
        run(self.virsh_command().args(args), None)
    }

    /// Starts the daemon in the foreground and waits for its socket.
    pub fn daemon(&self) -> Child {
        self.listening(&mut self.command("vireod"))
    }

    /// As [`Self::daemon`], of one that is killed when it, or a VMM of its, gets to a named point.
    pub fn daemon_killed_at(&self, point: &str) -> Child {
        self.listening(self.command("vireod").env("VIREO_KILL_AT", point))
    }

    fn listening(&self, daemon: &mut Command) -> Child {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("daemon.log"))
            .unwrap();
        let child = daemon
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            assert!(
                Instant::now() < deadline,
                "the daemon did not listen: {}",
                fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }

    /// Writes a file below the root and gives its path.
    pub fn write(&self, below: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(below);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Defines a domain from XML text.
    #[track_caller]
    pub fn define(&self, xml: &str) {
        let file = self.write("define.xml", xml);
        self.vireo(&["define", &file]).ok();
    }

    /// `vireo domstate --reason`, one line.
    pub fn state(&self, domain: &str) -> String {
        self.vireo(&["domstate", "--reason", domain])
            .ok()
            .trim()
            .to_owned()
    }

    /// Waits until the domain's state (with reason) is `want`.
    #[track_caller]
    pub fn wait_state(&self, domain: &str, want: &str, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let state = self.state(domain);
            if state == want {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "domain {domain} is '{state}', not '{want}'; its log:\n{}",
                self.domain_log(domain)
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A client that prints a running domain's events: it has heard of one already.
    pub fn listen(&self, domain: &str) -> Terminal {
        const LIMIT: Duration = Duration::from_secs(90);
        let mut events = Terminal::start(
            self.command("vireo")
                .args(["event", domain, "--all", "--loop"]),
        );
        let heard = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let began = Instant::now();
                while !heard.load(Ordering::Relaxed) && began.elapsed() < LIMIT {
                    self.vireo(&["desc", domain, "--live", "--new-desc", "something"]);
                    std::thread::sleep(Duration::from_millis(200));
                }
            });
            events.expect("event 'metadata-change'", LIMIT);
            heard.store(true, Ordering::Relaxed);
        });
        events
    }

    /// Kills the daemon that a command started, and waits for its end: what connects next has another one.
    pub fn kill_daemon(&self) {
        const LIMIT: Duration = Duration::from_secs(60);
        let began = Instant::now();
        loop {
            let pids = self.processes("vireod");
            if pids.is_empty() {
                return;
            }
            assert!(began.elapsed() < LIMIT, "the daemon is still there");
            for pid in pids {
                // SAFETY: kill has no memory effects; the pid is this rig's daemon.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What a domain's VMM wrote.
    pub fn domain_log(&self, domain: &str) -> String {
        fs::read_to_string(self.path(&format!("var/log/vireo/domains/{domain}.log")))
            .unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// Live processes of this rig by program name.
    pub fn processes(&self, program: &str) -> Vec<i32> {
        let wanted = format!("VIREO_TEST_RIG={}", self.tag);
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|s| s.parse::<i32>().ok())
            else {
                continue;
            };
            let ours = fs::read(entry.path().join("environ"))
                .is_ok_and(|env| env.split(|&b| b == 0).any(|v| v == wanted.as_bytes()));
            let exe = fs::read_link(entry.path().join("exe"))
                .ok()
                .and_then(|p| Some(p.file_name()?.to_str()?.to_owned()));
            // Where it was built anew meanwhile, the kernel says so behind its name.
            let exe = exe
                .as_deref()
                .map(|name| name.trim_end_matches(" (deleted)"));
            if ours && (program.is_empty() || exe == Some(program)) {
                found.push(pid);
            }
        }
        found
    }
}

impl Rig {
    /// The control groups of its running domains, as the daemon has noted them.
    pub fn groups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let folders = fs::read_dir(self.path("run/vireo/domains")).into_iter();
        for folder in folders.flatten().flatten() {
            let state = fs::read(folder.path().join("state.json")).unwrap_or_default();
            let state: serde_json::Value = serde_json::from_slice(&state).unwrap_or_default();
            for group in state["groups"].as_array().into_iter().flatten() {
                let part = |name: &str| group[name].as_str().map(PathBuf::from);
                if let (Some(root), Some(below)) = (part("root"), part("below")) {
                    found.push(root.join(below));
                }
            }
        }
        found
    }

    /// What a daemon would have removed that was killed with its domains.
    fn remove_groups(&self) {
        for group in self.groups() {
            // Killed processes may still be in it for a moment.
            for _ in 0..200 {
                for part in fs::read_dir(&group).into_iter().flatten().flatten() {
                    if part.path().is_dir() {
                        let _ = fs::remove_dir(part.path());
                    }
                }
                if fs::remove_dir(&group).is_ok() || !group.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

impl Rig {
    /// What a test that fails leaves behind to be understood: its daemons' logs, and where they are now.
    fn post_mortem(&self) {
        for log in ["daemon.log", "var/log/vireo/vireod.log"] {
            let text = fs::read_to_string(self.path(log)).unwrap_or_default();
            eprintln!("{}: {log}:\n{text}", self.tag);
        }
        for pid in self.processes("vireod") {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let state = status.lines().find(|line| line.starts_with("State:"));
            eprintln!("{}: vireod {pid}: {}", self.tag, state.unwrap_or_default());
            // Where there is a debugger; it is stopped by it for a moment only.
            let stacks = Command::new("timeout")
                .args(["20", "gdb", "-nx", "-batch", "-p", &pid.to_string()])
                .args(["-ex", "thread apply all bt 12"])
                .stdin(Stdio::null())
                .output();
            let stacks = stacks.map(|output| output.stdout).unwrap_or_default();
            let stacks = String::from_utf8_lossy(&stacks);
            let frames = |line: &&str| line.starts_with("Thread ") || line.starts_with('#');
            for line in stacks.lines().filter(frames) {
                let line = line.split(" at ").next().unwrap_or_default();
                eprintln!("{}", line.chars().take(120).collect::<String>());
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.post_mortem();
        }
        // A daemon that dies may have been about to start another process: look again.
        for _ in 0..100 {
            let pids = self.processes("");
            let pids: Vec<_> = pids
                .iter()
                .filter(|&&p| p != std::process::id() as i32)
                .collect();
            if pids.is_empty() {
                break;
            }
            for &&pid in &pids {
                // SAFETY: kill has no memory effects; the pids carry this rig's mark.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.remove_groups();
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// Where cargo put one of our programs: beside the folder of the test's own executable.
fn binary(program: &str) -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let path = me.parent().unwrap().parent().unwrap().join(program);
    assert!(
        path.exists(),
        "{} is not built: run the tests through `make test`",
        path.display()
    );
    path
}

/// Runs a command to its end, killing it after a minute.
fn run(command: &mut Command, input: Option<&str>) -> Run {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().unwrap();
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // A command that ends early closes its end.
        let _ = stdin.write_all(input.as_bytes());
    }
    let pid = child.id();
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if told
            .recv_timeout(Duration::from_secs(60))
            .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            // SAFETY: kill has no memory effects; the child is not reaped before `tell` is dropped.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(tell);
    watchdog.join().unwrap();
    output.into()
}

/// Tells that a test cannot run here, and what it needs; `make test` counts these.
pub fn left_out(needs: &str) {
    println!("left out: {needs}");
}

/// Whether a program is installed.
pub fn which(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()))
}

/// Whether /dev/kvm can be opened.
pub fn have_kvm() -> bool {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
}

/// Whether the long forms of the tests are wanted (`make soak`).
pub fn soak() -> bool {
    std::env::var_os("VIREO_SOAK").is_some()
}

/// Both clients, ours and the stock one, say the same; it is returned.
#[track_caller]
pub fn both(rig: &Rig, args: &[&str]) -> String {
    let ours = rig.vireo(args).ok();
    assert_eq!(rig.virsh(args).ok(), ours, "{args:?}");
    ours
}

/// Both clients refuse it in the same words.
#[track_caller]
pub fn both_refuse(rig: &Rig, args: &[&str]) -> String {
    let ours = rig.vireo(args).fails();
    assert_eq!(rig.virsh(args).fails(), ours, "{args:?}");
    ours
}
