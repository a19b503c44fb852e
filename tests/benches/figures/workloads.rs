//! Workloads inside a Linux guest: one guest on the software CPU and one on QEMU's TCG, with the
//! same kernel and initramfs (tests/benches/guest/init.c), run each workload in turn and time it
//! by their own clocks, which are compared with the host's.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig};

use super::{median, resident_kib};

const WORKLOADS: [&str; 19] = [
    "intloop",
    "fib",
    "indirect",
    "sieve",
    "memcpy",
    "chase",
    "axpy",
    "sseint",
    "libm",
    "x87",
    "getppid",
    "faults",
    "forkexit",
    "forkexec",
    "pingpong",
    "sha256sum",
    "gzip",
    "shell",
    "awk",
];

/// How long a guest may take for anything.
const LIMIT: Duration = Duration::from_secs(120);

/// A booted guest that waits for workloads' names.
struct Guest {
    child: Child,
    keys: ChildStdin,
    lines: Receiver<String>,
}

/// One run of one workload.
#[derive(Debug, Clone, Default)]
struct Took {
    /// By the guest's clock, seconds.
    guest: f64,
    /// By the host's, the way over the serial line included.
    wall: f64,
    /// CPU time of the VMM, seconds.
    cpu: f64,
    result: String,
}

impl Guest {
    fn start(command: &mut Command) -> Option<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let keys = child.stdin.take()?;
        let out = BufReader::new(child.stdout.take()?);
        let (send, lines) = channel();
        // Ends with the guest's output, at the latest when the child is killed.
        std::thread::spawn(move || {
            for line in out.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let guest = Self { child, keys, lines };
        guest.line("READY").is_some().then_some(guest)
    }

    /// What follows `start` in the next line that has it.
    fn line(&self, start: &str) -> Option<String> {
        let end = Instant::now() + LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).ok()?;
            if let Some(at) = line.find(start) {
                return Some(line[at + start.len()..].trim().to_owned());
            }
        }
    }

    fn run(&mut self, workload: &str) -> Option<Took> {
        let before = cpu_seconds(self.child.id());
        let start = Instant::now();
        writeln!(self.keys, "{workload}").ok()?;
        self.keys.flush().ok()?;
        let rest = self.line(&format!("TOOK {workload} "))?;
        let wall = start.elapsed().as_secs_f64();
        let (seconds, result) = rest.split_once(' ')?;
        Some(Took {
            guest: seconds.parse().ok()?,
            wall,
            cpu: cpu_seconds(self.child.id()) - before,
            result: result.to_owned(),
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// User and system time a process has used, seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, may hold blanks; utime and stime are fields 14 and 15.
    let Some((_, rest)) = stat.rsplit_once(')') else {
        return f64::NAN;
    };
    let ticks: f64 = rest
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<f64>().ok())
        .sum();
    // SAFETY: sysconf has no preconditions.
    ticks / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64
}

/// The workloads in VIREO_BENCH_ONLY (names with commas between), or all.
fn chosen() -> Vec<&'static str> {
    let only = std::env::var("VIREO_BENCH_ONLY").unwrap_or_default();
    WORKLOADS
        .into_iter()
        .filter(|w| only.is_empty() || only.split(',').any(|o| o == *w))
        .collect()
}

pub fn run(runs: usize) {
    println!("## Workloads in a Linux guest, 256 MiB, 1 vCPU, software CPU against QEMU TCG");
    println!("(seconds by the guest's clock; ratios below 1: Vireo is quicker)");
    let Some(initrd) = std::env::var_os("VIREO_BENCH_INITRD") else {
        println!("left out: VIREO_BENCH_INITRD is not set: run this through `make bench`\n");
        return;
    };
    let initrd = initrd.to_string_lossy().into_owned();
    let rig = Rig::new();
    let kernel = Kernel::V6_1.folder().join("vmlinuz");
    let kernel = kernel.display().to_string();
    let config = rig.write(
        "machine.json",
        format!(
            r#"{{"version":1,"name":"bench","uuid":"11111111-2222-3333-4444-555555555555","backend":"soft",
            "memory_bytes":268435456,"vcpus":1,"boot":{{"kernel":{{"path":"{kernel}"}},"initrd":{{"path":"{initrd}"}},"cmdline":"console=ttyS0 quiet"}},
            "serials":[{{"backend":"stdio"}}]}}"#
        ),
    );
    let ours = Guest::start(rig.command("vireo-vmm").args(["--config", &config]));
    let theirs = Guest::start(
        Command::new("qemu-system-x86_64")
            .args(["-M", "q35", "-accel", "tcg", "-m", "256", "-nodefaults"])
            .args(["-nographic", "-no-user-config", "-serial", "stdio"])
            .args(["-kernel", &kernel, "-initrd", &initrd])
            .args(["-append", "console=ttyS0 quiet"]),
    );
    let (Some(mut ours), Some(mut theirs)) = (ours, theirs) else {
        println!("left out: a guest did not come up\n");
        return;
    };
    println!(
        "{:10} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7}  clock/wall, notes",
        "", "median", "min", "TCG med", "TCG min", "median", "min", "CPU"
    );
    for workload in chosen() {
        let mut both = [Vec::new(), Vec::new()];
        // The first run only warms up.
        for n in 0..=runs {
            for (guest, list) in [&mut ours, &mut theirs].into_iter().zip(&mut both) {
                let Some(took) = guest.run(workload) else {
                    println!("{workload}: a guest gave no answer\n");
                    return;
                };
                if n > 0 {
                    list.push(took);
                }
            }
        }
        row(workload, &both);
    }
    println!(
        "peak resident, 256 MiB of guest RAM included: {:.0} MiB; QEMU TCG: {:.0} MiB\n",
        resident_kib(ours.child.id()) / 1024.0,
        resident_kib(theirs.child.id()) / 1024.0
    );
}

fn row(workload: &str, both: &[Vec<Took>; 2]) {
    let [ours, theirs] = both;
    let column = |list: &[Took], f: fn(&Took) -> f64| list.iter().map(f).collect::<Vec<_>>();
    let guest = |list: &[Took]| median(column(list, |t| t.guest));
    let least = |list: &[Took], f: fn(&Took) -> f64| {
        column(list, f).into_iter().fold(f64::INFINITY, f64::min)
    };
    let mut notes = String::new();
    for (name, list) in [("", ours), (" TCG", theirs)] {
        let drift = median(column(list, |t| t.guest / t.wall));
        notes.push_str(&format!("{name} {drift:.3}"));
    }
    if ours.first().map(|t| &t.result) != theirs.first().map(|t| &t.result) {
        notes.push_str(", results differ");
    }
    println!(
        "{workload:10} {:8.3} {:8.3} {:8.3} {:8.3} {:7.2} {:7.2} {:7.2} {notes}",
        guest(ours),
        least(ours, |t| t.guest),
        guest(theirs),
        least(theirs, |t| t.guest),
        guest(ours) / guest(theirs),
        least(ours, |t| t.guest) / least(theirs, |t| t.guest),
        least(ours, |t| t.cpu) / least(theirs, |t| t.cpu),
    );
}
