//! Live migration between two processes, against two QEMU TCG processes with the same guest: 1 GiB, 512 MiB in use, a
//! tick every millisecond. Times in all, the longest gap between two ticks as seen on the guest's console, and the rate
//! against a plain copy through the same kind of socket.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vireo_tests::{Kernel, Rig, which};
use vmm_api::control::{Answer, Call, Event, FromVmm, MigrateOptions, Request};

use crate::report;
use crate::save::pass;

/// Bytes of guest memory in use.
const IN_USE: usize = 512 << 20;
/// Nothing here takes longer.
const LIMIT: Duration = Duration::from_secs(240);

/// A process whose console is heard.
struct Heard {
    child: Child,
    keys: ChildStdin,
    ticks: Arc<Mutex<Vec<Instant>>>,
    ready: Arc<Mutex<bool>>,
    /// What the guest says was the longest time between two ticks.
    longest: Arc<Mutex<Option<f64>>>,
}

/// The number in what a guest says of the longest time between its ticks, in seconds.
fn longest_of(said: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(said).ok()?;
    let (_, rest) = text.split_once("LONGEST ")?;
    let (number, _) = rest.split_once(" us")?;
    number.parse::<f64>().ok().map(|us| us / 1e6)
}

impl Heard {
    fn start(command: &mut Command) -> Option<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(match std::env::var_os("VIREO_LOG") {
                Some(_) => Stdio::inherit(),
                None => Stdio::null(),
            })
            .spawn()
            .ok()?;
        let keys = child.stdin.take()?;
        let mut out = child.stdout.take()?;
        let (ticks, ready) = (Arc::default(), Arc::default());
        let (own_ticks, own_ready): (Arc<Mutex<Vec<Instant>>>, Arc<Mutex<bool>>) =
            (Arc::clone(&ticks), Arc::clone(&ready));
        let longest = Arc::default();
        let own_longest: Arc<Mutex<Option<f64>>> = Arc::clone(&longest);
        std::thread::spawn(move || {
            first_of_all();
            let mut buffer = [0; 4096];
            let mut before = Vec::new();
            let mut line = Vec::new();
            while let Ok(got) = out.read(&mut buffer) {
                let now = Instant::now();
                let Some(said) = buffer.get(..got).filter(|said| !said.is_empty()) else {
                    return;
                };
                if said.contains(&b'.')
                    && let Ok(mut ticks) = own_ticks.lock()
                {
                    ticks.push(now);
                }
                line.extend(said.iter().filter(|byte| **byte != b'.'));
                if let Some(longest) = longest_of(&line) {
                    *own_longest.lock().unwrap_or_else(|e| e.into_inner()) = Some(longest);
                    line.clear();
                }
                if line.len() > 4096 {
                    line.clear();
                }
                if before.len() < 1 << 20 {
                    before.extend_from_slice(said);
                    let is_ready = before.windows(5).any(|word| word == b"TICKS");
                    if is_ready && let Ok(mut ready) = own_ready.lock() {
                        *ready = true;
                        before.resize(1 << 20, 0);
                    }
                }
            }
        });
        Some(Self {
            child,
            keys,
            ticks,
            ready,
            longest,
        })
    }

    /// The longest time between two ticks by the guest's own clock since this was last asked.
    fn ask_longest(&mut self) -> Option<f64> {
        self.longest.lock().ok()?.take();
        self.type_key(b"g");
        until(|| self.longest.lock().ok()?.take())
    }

    fn is_ready(&self) -> bool {
        self.ready.lock().is_ok_and(|ready| *ready)
    }

    fn type_key(&mut self, key: &[u8]) {
        let _ = self.keys.write_all(key);
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The longest gap between two ticks of a guest that went from one process to another; none where
/// it did not tick on both sides.
fn gap(from: &Heard, to: &Heard, since: Instant) -> Option<f64> {
    let mut all: Vec<Instant> = Vec::new();
    for side in [from, to] {
        let before = all.len();
        if let Ok(ticks) = side.ticks.lock() {
            all.extend(ticks.iter().filter(|tick| **tick >= since));
        }
        if all.len() == before {
            return None;
        }
    }
    all.sort();
    let gaps = all.windows(2);
    gaps.map(|pair| (pair[1] - pair[0]).as_secs_f64())
        .max_by(f64::total_cmp)
}

fn until<T>(mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = done() {
            return Some(value);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What is measured of one move.
#[derive(Debug, Clone, Copy)]
struct Moved {
    seconds: f64,
    gap: Option<f64>,
    /// As the guest's own clock has it, which stands still with the guest.
    inside: Option<f64>,
}

impl Moved {
    /// What the consoles of both sides say of a move that began then, some moments after it.
    fn heard(seconds: f64, from: &Heard, to: &Heard, began: Instant) -> Self {
        std::thread::sleep(Duration::from_millis(300));
        Self {
            seconds,
            gap: gap(from, to, began),
            inside: None,
        }
    }
}

/// How a guest moves.
#[derive(Debug, Clone, Copy)]
struct How {
    connections: u32,
    downtime_ms: u64,
    writing: bool,
}

impl How {
    /// Bytes a second; of an idle guest as fast as it goes. A guest that writes does so at half of
    /// this.
    fn bandwidth(self) -> Option<u64> {
        self.writing.then_some(200_000_000)
    }
}

trait Side: Sized {
    fn boot(rig: &Rig, number: usize) -> Option<Self>;
    fn heard(&mut self) -> &mut Heard;
    fn pause(&mut self, on: bool) -> Option<()>;
    fn move_to(self, rig: &Rig, number: usize, how: How) -> Option<(Self, Moved)>;
}

/// Ours.
struct Ours {
    heard: Heard,
    control: UnixStream,
}

fn config(rig: &Rig, number: usize, more: &str) -> String {
    let kernel = Kernel::V6_1.folder().join("vmlinuz");
    let initrd = std::env::var("VIREO_BENCH_INITRD").unwrap_or_default();
    let control = rig.path(&format!("control{number}"));
    rig.write(
        "machine.json",
        format!(
            r#"{{"version":1,"name":"bench","uuid":"11111111-2222-3333-4444-555555555555","backend":"soft",
            "memory_bytes":{},"vcpus":2,"boot":{{"kernel":{{"path":"{}"}},"initrd":{{"path":"{initrd}"}},
            "cmdline":"console=ttyS0 quiet workload=ticks"}},"serials":[{{"backend":"stdio"}}],
            "control":{{"path":"{}"}}{more}}}"#,
            1u64 << 30,
            kernel.display(),
            control.display()
        ),
    )
}

impl Ours {
    fn start(rig: &Rig, number: usize, more: &str) -> Option<Self> {
        let config = config(rig, number, more);
        let heard = Heard::start(rig.command("vireo-vmm").args(["--config", &config]))?;
        let path = rig.path(&format!("control{number}"));
        let control = until(|| UnixStream::connect(&path).ok())?;
        Some(Self { heard, control })
    }

    fn send(&mut self, id: u64, call: Call, fds: &[i32]) -> Option<()> {
        let request = Request {
            id,
            call,
            descriptors: u32::try_from(fds.len()).ok()?,
        };
        let body = serde_json::to_vec(&request).ok()?;
        let frame = [&u32::try_from(body.len()).ok()?.to_be_bytes()[..], &body].concat();
        match fds {
            [] => self.control.write_all(&frame).ok(),
            fds => pass(&self.control, &frame, fds),
        }
    }

    fn next(&mut self) -> Option<FromVmm> {
        let mut length = [0; 4];
        self.control.read_exact(&mut length).ok()?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        self.control.read_exact(&mut body).ok()?;
        serde_json::from_slice(&body).ok()
    }

    fn answer(&mut self, id: u64) -> Option<Answer> {
        loop {
            match self.next()? {
                FromVmm::Reply(reply) if reply.id == id => return reply.result.ok(),
                FromVmm::Event(Event::Exiting(_)) => return None,
                _ => {}
            }
        }
    }
}

impl Side for Ours {
    fn boot(rig: &Rig, number: usize) -> Option<Self> {
        let ours = Self::start(rig, number, "")?;
        until(|| ours.heard.is_ready().then_some(()))?;
        Some(ours)
    }

    fn heard(&mut self) -> &mut Heard {
        &mut self.heard
    }

    fn pause(&mut self, on: bool) -> Option<()> {
        self.send(7, if on { Call::Pause } else { Call::Resume }, &[])?;
        self.answer(7).map(drop)
    }

    fn move_to(mut self, rig: &Rig, number: usize, how: How) -> Option<(Self, Moved)> {
        let place = rig.path(&format!("incoming{number}"));
        let listener = UnixListener::bind(&place).ok()?;
        let path = format!(r#"{{"path":"{}"}}"#, place.display());
        let paths = vec![path; how.connections as usize].join(",");
        let config = format!(r#","incoming":[{paths}]"#);
        let mut target = Self::start(rig, number, &config)?;
        let streams: Option<Vec<UnixStream>> = (0..how.connections)
            .map(|_| listener.accept().ok().map(|(stream, _)| stream))
            .collect();
        let streams = streams?;
        let fds: Vec<i32> = streams.iter().map(AsRawFd::as_raw_fd).collect();
        let options = MigrateOptions {
            bandwidth: how.bandwidth().unwrap_or(0),
            downtime_ms: how.downtime_ms,
            zstd_level: None,
            auto_converge: None,
            direct: true,
            disks: Vec::new(),
            incremental: false,
        };
        // It asks for the right to run as soon as it is there.
        target.send(1, Call::Resume, &[])?;
        let began = Instant::now();
        self.send(2, Call::Migrate(options), &fds)?;
        drop(streams);
        self.answer(2)?;
        let seconds = began.elapsed().as_secs_f64();
        target.answer(1)?;
        let moved = Moved::heard(seconds, &self.heard, &target.heard, began);
        Some((target, moved))
    }
}

/// QEMU.
struct Theirs {
    heard: Heard,
    control: UnixStream,
    rest: Vec<u8>,
}

impl Theirs {
    fn start(rig: &Rig, number: usize, more: &[&str]) -> Option<Self> {
        let kernel = Kernel::V6_1.folder().join("vmlinuz");
        let initrd = std::env::var("VIREO_BENCH_INITRD").unwrap_or_default();
        let path = rig.path(&format!("qmp{number}"));
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", "q35", "-accel", "tcg", "-m", "1024", "-smp", "2"])
            .args([
                "-nodefaults",
                "-nographic",
                "-no-user-config",
                "-serial",
                "stdio",
            ])
            .arg("-kernel")
            .arg(kernel)
            .args(["-initrd", &initrd])
            .args(["-append", "console=ttyS0 quiet workload=ticks"])
            .args(["-qmp", &format!("unix:{},server,nowait", path.display())])
            .args(more);
        let heard = Heard::start(&mut command)?;
        let control = until(|| UnixStream::connect(&path).ok())?;
        let mut theirs = Self {
            heard,
            control,
            rest: Vec::new(),
        };
        theirs.call("qmp_capabilities", json!({}))?;
        Some(theirs)
    }

    fn call(&mut self, name: &str, arguments: Value) -> Option<Value> {
        let call = json!({"execute": name, "arguments": arguments, "id": name});
        writeln!(self.control, "{call}").ok()?;
        loop {
            while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                let said: Value = serde_json::from_slice(&line).ok()?;
                if said.get("id").is_some() {
                    return said.get("return").cloned();
                }
            }
            let mut buffer = [0; 4096];
            let got = self.control.read(&mut buffer).ok().filter(|got| *got > 0)?;
            self.rest.extend_from_slice(&buffer[..got]);
        }
    }

    fn prepare(&mut self, how: How) -> Option<()> {
        let multi = how.connections > 1;
        let capabilities = json!([{"capability": "multifd", "state": multi}]);
        self.call(
            "migrate-set-capabilities",
            json!({ "capabilities": capabilities }),
        )?;
        let mut parameters = json!({
            "downtime-limit": how.downtime_ms,
            "max-bandwidth": how.bandwidth().unwrap_or(100_000_000_000),
        });
        if multi {
            parameters["multifd-channels"] = how.connections.into();
        }
        self.call("migrate-set-parameters", parameters).map(drop)
    }
}

impl Side for Theirs {
    fn boot(rig: &Rig, number: usize) -> Option<Self> {
        let theirs = Self::start(rig, number, &[])?;
        until(|| theirs.heard.is_ready().then_some(()))?;
        Some(theirs)
    }

    fn heard(&mut self) -> &mut Heard {
        &mut self.heard
    }

    fn pause(&mut self, on: bool) -> Option<()> {
        self.call(if on { "stop" } else { "cont" }, json!({}))
            .map(drop)
    }

    fn move_to(mut self, rig: &Rig, number: usize, how: How) -> Option<(Self, Moved)> {
        let place = format!("unix:{}", rig.path(&format!("qemu{number}")).display());
        let mut target = Self::start(rig, number, &["-incoming", "defer"])?;
        target.prepare(how)?;
        target.call("migrate-incoming", json!({ "uri": place }))?;
        self.prepare(how)?;
        let began = Instant::now();
        self.call("migrate", json!({ "uri": place }))?;
        until(|| {
            let info = self.call("query-migrate", json!({}))?;
            (info["status"] == "completed").then_some(())
        })?;
        let seconds = began.elapsed().as_secs_f64();
        let moved = Moved::heard(seconds, &self.heard, &target.heard, began);
        Some((target, moved))
    }
}

/// Touches more memory than a guest and its copy take, in huge pages, and gives it back. A host that is itself virtual
/// often has its memory backed at the first touch only, and takes back within seconds what is free: that takes longer
/// than all that is measured here, with a processor standing still meanwhile, and whoever gets such memory would pay for
/// it.
fn touch_memory() {
    const MUCH: usize = 3 << 29;
    // SAFETY: a new anonymous mapping that nobody else knows, written by whole pages, and gone again.
    unsafe {
        let (access, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        let at = libc::mmap(std::ptr::null_mut(), MUCH, access, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return;
        }
        libc::madvise(at, MUCH, libc::MADV_HUGEPAGE);
        for page in (0..MUCH).step_by(4096) {
            at.cast::<u8>().add(page).write_volatile(1);
        }
        libc::munmap(at, MUCH);
    }
}

/// The calling thread runs as soon as it has something to do, if that is allowed: what measures must not wait for a
/// processor itself.
fn first_of_all() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: 0 is the calling thread, and the struct lives for the call.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
}

/// Seconds that a plain copy of as much through a socket takes, to memory that is new.
fn plain_copy() -> Option<f64> {
    let (mut one, mut other) = UnixStream::pair().ok()?;
    let content: Vec<u8> = (0..IN_USE).map(|at| (at >> 3) as u8 | 1).collect();
    touch_memory();
    let began = Instant::now();
    let sender = std::thread::spawn(move || {
        for part in content.chunks(1 << 20) {
            if one.write_all(part).is_err() {
                return;
            }
        }
    });
    let mut to = vec![0u8; IN_USE];
    other.read_exact(&mut to).ok()?;
    let seconds = began.elapsed().as_secs_f64();
    sender.join().ok()?;
    Some(seconds)
}

/// A guest and how often it has moved.
struct Guest<S> {
    side: Option<S>,
    number: usize,
}

impl<S: Side> Guest<S> {
    fn boot(rig: &Rig) -> Option<Self> {
        let mut side = S::boot(rig, 0)?;
        side.pause(true)?;
        Some(Self {
            side: Some(side),
            number: 0,
        })
    }

    /// Runs only for its move.
    fn moved(&mut self, rig: &Rig, how: How) -> Option<Moved> {
        let mut side = self.side.take()?;
        self.number += 1;
        if how.writing {
            // Which takes seconds: the host takes back what the last guest had meanwhile, and processors stand still for
            // that, not in the middle of this move.
            std::thread::sleep(Duration::from_secs(4));
        }
        side.pause(false)?;
        side.heard().type_key(if how.writing { b"d" } else { b"s" });
        std::thread::sleep(Duration::from_millis(500));
        if !how.writing {
            touch_memory();
        }
        side.heard().ask_longest();
        let (mut side, mut moved) = side.move_to(rig, self.number, how)?;
        moved.inside = side.heard().ask_longest();
        side.pause(true)?;
        self.side = Some(side);
        Some(moved)
    }
}

/// Idle and writing guests, over one and several connections.
pub fn run(runs: usize) {
    println!(
        "## A guest of 1 GiB, 512 MiB in use, 2 vCPUs, that moves to another process (software CPU)"
    );
    if std::env::var_os("VIREO_BENCH_INITRD").is_none() {
        return println!("left out: needs VIREO_BENCH_INITRD (make bench)\n");
    }
    let rig = Rig::new();
    let Some(mut ours) = Guest::<Ours>::boot(&rig) else {
        return println!("left out: the guest does not boot\n");
    };
    let mut theirs = match which("qemu-system-x86_64") {
        true => Guest::<Theirs>::boot(&rig),
        false => None,
    };
    let cases = [
        ("idle, 1 connection", 1, 300, false),
        ("idle, 4 connections", 4, 300, false),
        ("writing 100 MB/s of 200, limit 300 ms", 1, 300, true),
        ("writing 100 MB/s of 200, limit 30 ms", 1, 30, true),
    ];
    let mut copies: Vec<f64> = Vec::new();
    for (name, connections, downtime_ms, writing) in cases {
        let how = How {
            connections,
            downtime_ms,
            writing,
        };
        let (mut own, mut peer) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            own.extend(ours.moved(&rig, how));
            peer.extend(theirs.as_mut().and_then(|theirs| theirs.moved(&rig, how)));
            if !writing {
                copies.extend(plain_copy());
            }
        }
        let column =
            |all: &[Moved], pick: fn(&Moved) -> Option<f64>| all.iter().filter_map(pick).collect();
        for (what, pick) in [
            (
                "in all",
                (|moved| Some(moved.seconds)) as fn(&Moved) -> Option<f64>,
            ),
            ("longest gap between ticks", |moved| moved.gap),
            ("the same by the guest's own clock", |moved| moved.inside),
        ] {
            let (a, b) = (column(&own, pick), column(&peer, pick));
            report(&format!("{name}: {what}"), "ms", 1e3, a, "QEMU TCG", b);
        }
        if !writing {
            let all: Vec<f64> = own.iter().map(|moved| moved.seconds).collect();
            let what = format!("{name}: in all");
            report(
                &what,
                "ms",
                1e3,
                all,
                "plain copy of 512 MiB",
                copies.clone(),
            );
        }
    }
    println!();
}
