//! `make bench`: figures as ratios against a peer measured in the same run, in turn (A B A B ...).
//!
//! Medians of VIREO_BENCH_RUNS runs (default 5). VIREO_BENCH chooses among `start`, `boot`,
//! `save`, `migrate`, `manager`, `networks`, `devices` and `workloads`, VIREO_BENCH_ONLY among the workloads
//! and the devices' lines (commas between). Nothing here passes or fails.

mod devices;
mod manager;
mod migrate;
mod networks;
mod save;
mod workloads;

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, have_kvm, linux_guest, tiny_kernel, which};

/// What one run of a process cost.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    wall: f64,
    cpu: f64,
    resident_mib: f64,
}

fn main() {
    let runs = std::env::var("VIREO_BENCH_RUNS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(5);
    println!("Medians of {runs} runs, Vireo and its peer in turn.\n");
    let parts = std::env::var("VIREO_BENCH").unwrap_or_default();
    let wanted = |part| parts.is_empty() || parts.split(',').any(|p| p == part);
    if wanted("start") {
        first_io(runs);
        start_and_destroy(runs);
    }
    if wanted("boot") {
        for kernel in [Kernel::V6_1, Kernel::V6_12] {
            boot(kernel, runs.min(5));
        }
    }
    if wanted("save") {
        save::run(runs);
    }
    if wanted("migrate") {
        migrate::run(runs);
    }
    if wanted("manager") {
        manager::run(runs);
    }
    if wanted("networks") {
        networks::run(runs);
    }
    if wanted("devices") {
        devices::run(runs);
    }
    if wanted("workloads") {
        workloads::run(runs);
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(what: &str, unit: &str, scale: f64, ours: Vec<f64>, peer: &str, theirs: Vec<f64>) {
    let min = |v: &[f64]| v.iter().copied().fold(f64::INFINITY, f64::min);
    let (a_min, b_min) = (min(&ours), min(&theirs));
    let (a, b) = (median(ours), median(theirs));
    if b.is_nan() {
        println!(
            "{what}: {:.1} {unit} (min {:.1}); no peer here",
            a * scale,
            a_min * scale
        );
    } else {
        println!(
            "{what}: {:.1} {unit} (min {:.1}); {peer}: {:.1} {unit} (min {:.1}); ratio {:.2} of medians, {:.2} of minima",
            a * scale,
            a_min * scale,
            b * scale,
            b_min * scale,
            a / b,
            a_min / b_min
        );
    }
}

/// Runs until `marker` is on its standard output, kills it, gives what it cost up to its end.
fn until(command: &mut Command, marker: &str, limit: Duration) -> Option<Cost> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    // SAFETY: prctl is async-signal-safe; the child must not outlive a bench that is interrupted.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        })
    };
    let start = Instant::now();
    let mut child = command.spawn().ok()?;
    let mut out = child.stdout.take()?;
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    let mut found = false;
    while !found && start.elapsed() < limit {
        match out.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => seen.extend_from_slice(&buffer[..n]),
        }
        let from = seen.len().saturating_sub(5000);
        found = seen[from..]
            .windows(marker.len())
            .any(|w| w == marker.as_bytes());
    }
    let wall = start.elapsed().as_secs_f64();
    // Peak resident memory before the kill, from the kernel's own account.
    let resident = resident_kib(child.id());
    let _ = child.kill();
    let usage = reap(&child)?;
    found.then_some(Cost {
        wall,
        cpu: usage,
        resident_mib: resident / 1024.0,
    })
}

/// Peak resident KiB.
fn resident_kib(pid: u32) -> f64 {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap_or_default()
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .and_then(|v| v.split_whitespace().next()?.parse().ok())
        .unwrap_or(f64::NAN)
}

/// Waits for a killed child; gives its CPU seconds.
fn reap(child: &Child) -> Option<f64> {
    let mut status = 0;
    // SAFETY: rusage is plain data, for which zeroes are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the out pointers are valid; the pid is our own unreaped child.
    let pid = unsafe { libc::wait4(child.id() as i32, &mut status, 0, &mut usage) };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    (pid > 0).then(|| seconds(usage.ru_utime) + seconds(usage.ru_stime))
}

/// Process start to the guest's first I/O with a tiny guest.
fn first_io(runs: usize) {
    println!("## Process start to the guest's first output, tiny guest, 128 MiB");
    let rig = Rig::new();
    let kernel = rig.write("tiny.elf", tiny_kernel());
    for backend in ["kvm", "soft"] {
        if backend == "kvm" && !have_kvm() {
            println!("kvm: left out: needs /dev/kvm");
            continue;
        }
        let config = rig.write(
            "machine.json",
            format!(
                r#"{{"version":1,"name":"bench","uuid":"11111111-2222-3333-4444-555555555555","backend":"{backend}",
                "memory_bytes":134217728,"vcpus":1,"boot":{{"kernel":{{"path":"{kernel}"}}}},"serials":[{{"backend":"stdio"}}]}}"#
            ),
        );
        let accel = if backend == "kvm" { "kvm" } else { "tcg" };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..runs * 4 {
            ours.extend(until(
                rig.command("vireo-vmm").args(["--config", &config]),
                "TINY",
                Duration::from_secs(10),
            ));
            theirs.extend(until(
                Command::new("qemu-system-x86_64").args([
                    "-M",
                    "microvm,acpi=off",
                    "-accel",
                    accel,
                    "-m",
                    "128",
                    "-nodefaults",
                    "-nographic",
                    "-no-user-config",
                    "-serial",
                    "stdio",
                    "-kernel",
                    &kernel,
                ]),
                "TINY",
                Duration::from_secs(10),
            ));
        }
        let peer = format!("QEMU microvm {accel}");
        let column =
            |costs: &[Cost], pick: fn(&Cost) -> f64| costs.iter().map(pick).collect::<Vec<_>>();
        report(
            &format!("{backend}: wall"),
            "ms",
            1e3,
            column(&ours, |c| c.wall),
            &peer,
            column(&theirs, |c| c.wall),
        );
        report(
            &format!("{backend}: CPU"),
            "ms",
            1e3,
            column(&ours, |c| c.cpu),
            &peer,
            column(&theirs, |c| c.cpu),
        );
        report(
            &format!("{backend}: resident"),
            "MiB",
            1.0,
            column(&ours, |c| c.resident_mib),
            &peer,
            column(&theirs, |c| c.resident_mib),
        );
    }
    println!();
}

/// `start` to "running", and `destroy`, against virsh + libvirtd + QEMU.
fn start_and_destroy(runs: usize) {
    println!("## `vireo start` to running, and `vireo destroy`, Linux guest on the software CPU");
    let rig = Rig::new();
    let xml = linux_guest("bench", Kernel::V6_1);
    rig.define(&xml);
    let peer = Libvirt::start(&rig, &xml);
    let (mut start, mut destroy) = (Vec::new(), Vec::new());
    let (mut their_start, mut their_destroy) = (Vec::new(), Vec::new());
    let timed = |command: &mut Command| {
        let began = Instant::now();
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        status
            .is_ok_and(|s| s.success())
            .then(|| began.elapsed().as_secs_f64())
    };
    for _ in 0..runs * 2 {
        start.extend(timed(rig.command("vireo").args(["start", "bench"])));
        destroy.extend(timed(rig.command("vireo").args(["destroy", "bench"])));
        if let Some(peer) = &peer {
            their_start.extend(timed(peer.virsh().args(["start", "bench"])));
            their_destroy.extend(timed(peer.virsh().args(["destroy", "bench"])));
        }
    }
    report(
        "start",
        "ms",
        1e3,
        start,
        "virsh + libvirtd + QEMU",
        their_start,
    );
    report(
        "destroy",
        "ms",
        1e3,
        destroy,
        "virsh + libvirtd + QEMU",
        their_destroy,
    );
    println!();
}

/// A private libvirtd in session mode, as user nobody, in the rig's folder.
struct Libvirt {
    folder: PathBuf,
    daemon: Child,
}

impl Libvirt {
    fn start(rig: &Rig, xml: &str) -> Option<Self> {
        // SAFETY: geteuid has no preconditions.
        if !which("libvirtd") || !which("setpriv") || unsafe { libc::geteuid() } != 0 {
            println!("(the peer is left out: needs libvirtd with its QEMU driver, and root)");
            return None;
        }
        let folder = rig.path("libvirt");
        for sub in ["config", "run", "cache", "data", "home"] {
            fs::create_dir_all(folder.join(sub)).ok()?;
        }
        for file in ["vmlinuz", "initrd.img"] {
            fs::copy(Kernel::V6_1.folder().join(file), folder.join(file)).ok()?;
        }
        let xml = xml.replace(Kernel::V6_1.folder().to_str()?, folder.to_str()?);
        fs::write(folder.join("bench.xml"), xml).ok()?;
        Command::new("chown")
            .args(["-R", "65534:65534"])
            .arg(&folder)
            .status()
            .ok()?;
        let daemon = Self::unprivileged(&folder, "libvirtd")
            .args(["-t", "600"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let peer = Self { folder, daemon };
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(100));
            let defined = peer
                .virsh()
                .arg("define")
                .arg(peer.folder.join("bench.xml"))
                .output()
                .ok()?;
            if defined.status.success() {
                return Some(peer);
            }
        }
        println!("(the peer is left out: libvirtd did not come up)");
        None
    }

    fn unprivileged(folder: &Path, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", program])
            .env("HOME", folder.join("home"))
            .env("XDG_CONFIG_HOME", folder.join("config"))
            .env("XDG_RUNTIME_DIR", folder.join("run"))
            .env("XDG_CACHE_HOME", folder.join("cache"))
            .env("XDG_DATA_HOME", folder.join("data"));
        command
    }

    fn virsh(&self) -> Command {
        let mut command = Self::unprivileged(&self.folder, "virsh");
        command.args(["-c", "qemu:///session"]);
        command
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        let _ = self.virsh().args(["destroy", "bench"]).output();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Boot of a Debian kernel to its shell on the software CPU, against QEMU TCG.
fn boot(kernel: Kernel, runs: usize) {
    println!(
        "## Boot of Debian's {}x cloud kernel to a busybox shell, 256 MiB, 1 vCPU, software CPU",
        kernel.release()
    );
    let rig = Rig::new();
    let folder = kernel.folder();
    let (image, initrd) = (folder.join("vmlinuz"), folder.join("initrd.img"));
    let config = rig.write(
        "machine.json",
        format!(
            r#"{{"version":1,"name":"bench","uuid":"11111111-2222-3333-4444-555555555555","backend":"soft",
            "memory_bytes":268435456,"vcpus":1,"boot":{{"kernel":{{"path":"{}"}},"initrd":{{"path":"{}"}},"cmdline":"console=ttyS0 quiet"}},
            "serials":[{{"backend":"stdio"}}]}}"#,
            image.display(),
            initrd.display()
        ),
    );
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.extend(until(
            rig.command("vireo-vmm").args(["--config", &config]),
            "/root# ",
            Duration::from_secs(120),
        ));
        theirs.extend(until(
            Command::new("qemu-system-x86_64")
                .args([
                    "-M",
                    "q35",
                    "-accel",
                    "tcg",
                    "-m",
                    "256",
                    "-nodefaults",
                    "-nographic",
                    "-no-user-config",
                    "-serial",
                    "stdio",
                ])
                .arg("-kernel")
                .arg(&image)
                .arg("-initrd")
                .arg(&initrd)
                .args(["-append", "console=ttyS0 quiet"]),
            "/root# ",
            Duration::from_secs(120),
        ));
    }
    let column =
        |costs: &[Cost], pick: fn(&Cost) -> f64| costs.iter().map(pick).collect::<Vec<_>>();
    report(
        "wall",
        "s",
        1.0,
        column(&ours, |c| c.wall),
        "QEMU TCG",
        column(&theirs, |c| c.wall),
    );
    report(
        "CPU",
        "s",
        1.0,
        column(&ours, |c| c.cpu),
        "QEMU TCG",
        column(&theirs, |c| c.cpu),
    );
    report(
        "peak resident, guest RAM included",
        "MiB",
        1.0,
        column(&ours, |c| c.resident_mib),
        "QEMU TCG",
        column(&theirs, |c| c.resident_mib),
    );
    println!();
}
