//! Runs the real program with small guests, on every backend that is there.

#![allow(dead_code)]

pub mod bios;
pub mod guests;

use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vmm_api::config::{
    Backend, BootConfig, CONFIG_VERSION, CharBackend, CpuConfig, LifecycleAction, MachineConfig,
    Resource, SerialConfig,
};
use vmm_api::control::{Answer, Call, Event, ExitRecord, FromVmm, MachineState, Request, Status};

/// Longest wait for anything: far beyond what a loaded machine needs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Backends to test on; says what is left out.
pub fn backends() -> Vec<Backend> {
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if kvm.is_err() {
        println!("left out: kvm needs /dev/kvm");
        return vec![Backend::Soft];
    }
    vec![Backend::Soft, Backend::Kvm]
}

/// Waits until `done` gives something.
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Reads until exactly `expected` has come.
pub fn expect<R: Read>(reader: &mut R, expected: &str) {
    let mut got = vec![0; expected.len()];
    reader
        .read_exact(&mut got)
        .unwrap_or_else(|error| panic!("waiting for {expected:?}: {error}"));
    assert_eq!(String::from_utf8_lossy(&got), expected);
}

/// A folder with a kernel and a config, and the process that runs it.
pub struct Rig {
    dir: PathBuf,
    pub config: MachineConfig,
    child: Option<Child>,
}

impl Rig {
    /// A machine with `kernel`, 16 MiB, COM1 to the file `serial`.
    pub fn new(backend: Backend, kernel: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "vireo-vmm-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("kernel");
        std::fs::write(&path, kernel).unwrap();
        let config = MachineConfig {
            version: CONFIG_VERSION,
            name: "tiny".into(),
            uuid: "8a3dc1e9-0000-4000-8000-000000000001".into(),
            backend,
            memory_bytes: 16 << 20,
            vcpus: 1,
            vcpu_hotplug: None,
            cpu: CpuConfig::default(),
            boot: BootConfig {
                kernel: Some(Resource::Path(path)),
                firmware: None,
                initrd: None,
                cmdline: String::new(),
                no_unpack: false,
            },
            acpi: true,
            serials: vec![SerialConfig {
                backend: CharBackend::File(Resource::Path(dir.join("serial"))),
                log: None,
            }],
            pvpanic: true,
            iothreads: Vec::new(),
            devices: Vec::new(),
            generation_id: None,
            debug_exit_port: Some(0xf4),
            debug_console_port: None,
            rtc_offset_seconds: 0,
            on_poweroff: LifecycleAction::Destroy,
            on_reboot: LifecycleAction::Restart,
            on_crash: LifecycleAction::Destroy,
            restore: None,
            incoming: Vec::new(),
            start_paused: false,
            control: Some(Resource::Path(dir.join("control"))),
            exit_record: Some(Resource::Path(dir.join("record"))),
        };
        Self {
            dir,
            config,
            child: None,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Starts the program.
    pub fn start(&mut self) -> &mut Child {
        self.start_with(&[])
    }

    /// Starts it with more arguments.
    pub fn start_with(&mut self, arguments: &[&str]) -> &mut Child {
        let config = self.path("config.json");
        std::fs::write(&config, serde_json::to_vec(&self.config).unwrap()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vireo-vmm"))
            .arg("--config")
            .arg(config)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        self.child.insert(child)
    }

    /// Waits for the program's end.
    pub fn wait(&mut self) -> ExitStatus {
        let child = self.child.as_mut().unwrap();
        wait_for("the end", || child.try_wait().unwrap())
    }

    /// Starts it and waits for its end: exit status.
    pub fn run(&mut self) -> i32 {
        self.start();
        self.wait().code().unwrap()
    }

    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path("serial")).unwrap_or_default())
            .into_owned()
    }

    pub fn record(&self) -> ExitRecord {
        serde_json::from_slice(&std::fs::read(self.path("record")).unwrap()).unwrap()
    }

    /// What it said on standard error, after its end.
    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        let child = self.child.as_mut().unwrap();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        text
    }

    /// What it said on standard output, after its end.
    pub fn stdout(&mut self) -> String {
        let mut text = String::new();
        let child = self.child.as_mut().unwrap();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        text
    }

    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.as_ref().unwrap().id()).unwrap();
        // SAFETY: a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// It has ended: what it said.
    pub fn ended(&mut self) -> Option<String> {
        let ended = self.child.as_mut()?.try_wait().unwrap()?;
        Some(format!("{ended}: {}", self.stderr()))
    }

    pub fn connect(&self) -> Client {
        Client::new(&self.path("control"))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

/// A control connection.
pub struct Client {
    pub stream: UnixStream,
    next: u64,
    /// Events that came while a reply was waited for.
    pub events: Vec<Event>,
}

impl Client {
    fn new(path: &Path) -> Self {
        let stream = wait_for("the control socket", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self {
            stream,
            next: 1,
            events: Vec::new(),
        }
    }

    pub fn receive(&mut self) -> Option<FromVmm> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).ok()?;
        let mut body = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap()];
        self.stream.read_exact(&mut body).ok()?;
        Some(serde_json::from_slice(&body).unwrap())
    }

    pub fn send_raw(&mut self, body: &[u8]) {
        let length = u32::try_from(body.len()).unwrap();
        self.stream.write_all(&length.to_be_bytes()).unwrap();
        self.stream.write_all(body).unwrap();
    }

    pub fn call(&mut self, call: Call) -> Result<Answer, String> {
        self.call_with(call, &[])
    }

    /// Sends a call with a file; its id.
    pub fn send_with(&mut self, call: Call, files: &[&std::fs::File]) -> u64 {
        let id = self.next;
        self.next += 1;
        let descriptors = u32::try_from(files.len()).unwrap();
        let request = Request {
            id,
            call,
            descriptors,
        };
        let body = serde_json::to_vec(&request).unwrap();
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let frame = [&length[..], &body].concat();
        let numbers: Vec<_> = files.iter().map(|file| file.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if files.is_empty() {
            &rights[..0]
        } else {
            &rights[..]
        };
        let parts = [IoSlice::new(&frame)];
        let fd = self.stream.as_raw_fd();
        let sent = sendmsg::<()>(fd, &parts, rights, MsgFlags::empty(), None).unwrap();
        assert_eq!(sent, frame.len());
        id
    }

    pub fn call_with(&mut self, call: Call, files: &[&std::fs::File]) -> Result<Answer, String> {
        let id = self.send_with(call, files);
        self.answer(id)
    }

    /// The answer to a call that was sent.
    pub fn answer(&mut self, id: u64) -> Result<Answer, String> {
        loop {
            match self.receive().expect("a reply") {
                FromVmm::Reply(reply) => {
                    assert_eq!(reply.id, id);
                    return reply.result.map_err(|failure| failure.message);
                }
                FromVmm::Event(event) => self.events.push(event),
            }
        }
    }

    pub fn status(&mut self) -> Status {
        match self.call(Call::Query) {
            Ok(Answer::Status(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    pub fn state(&mut self) -> MachineState {
        self.status().state
    }

    /// All events to the connection's end.
    pub fn rest(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.events);
        while let Some(message) = self.receive() {
            if let FromVmm::Event(event) = message {
                events.push(event);
            }
        }
        events
    }
}
