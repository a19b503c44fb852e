//! The block layer against `qemu-img bench`, on the same files, in turn (A B A B ...).
//!
//! The same loop on both sides: a number of requests in flight, each replaced when it is complete.
//! A row is the sum of several runs of each, and who goes first changes every time: a disk may
//! have a limit that lets bursts through, and the best run of a few would be whoever met a burst.
//! A row in which ours is behind is measured again for longer, with QEMU against itself beside it,
//! which shows what a difference of that size means on this disk. Random offsets are steps of a fixed odd number of blocks around the image, which is what
//! qemu-img can do. CPU time is the process's, what it takes to start (as measured by a run of one
//! request) left out.
//!
//! VIREO_BENCH chooses this (`block`) among all of `make bench`. VIREO_BENCH_RUNS: how many runs of
//! each (default 4); VIREO_BENCH_ONLY chooses among the lines by words that all must occur in them. VIREO_BENCH_DIR is where the images are made
//! (default: the build's folder). Nothing here passes or fails.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use images::chain::{Format, ImageConfig};
use images::engine::{Aio, Cache, Engine, Op, Options, Request};
use images::iovec::AlignedBuf;
use images::{File, Image};

const SIZE: u64 = 256 << 20;
/// How long a run of ours takes about; QEMU gets as many requests.
const TIME: Duration = Duration::from_millis(150);
/// How many times as often a row is measured again in which ours is behind.
const AGAIN: u32 = 3;

#[derive(Clone, Copy)]
struct Case {
    format: Format,
    write: bool,
    random: bool,
    /// Into an image that is empty: clusters are allocated.
    fresh: bool,
    block: u64,
    depth: usize,
    direct: bool,
    aio: &'static str,
}

impl Case {
    fn name(&self) -> String {
        format!(
            "{:5} {:9} {:7} {:5} {:6} {:2} KiB x{:<2}",
            self.format.name(),
            if self.direct { "none" } else { "writeback" },
            self.aio,
            if self.write { "write" } else { "read" },
            match (self.fresh, self.random) {
                (true, _) => "fresh",
                (_, true) => "random",
                _ => "seq",
            },
            self.block >> 10,
            self.depth
        )
    }

    fn step(&self) -> u64 {
        // A prime number of blocks, of which the image has a power of two: every one comes up.
        self.block * if self.random { 10_007 } else { 1 }
    }

    fn options(&self) -> Options {
        Options {
            cache: if self.direct {
                Cache::None
            } else {
                Cache::Writeback
            },
            aio: if self.aio == "threads" {
                Aio::Threads
            } else {
                Aio::Ring
            },
            ..Options::default()
        }
    }
}

/// What runs cost, in all: seconds of wall and of CPU time for one request of each.
#[derive(Clone, Copy, Default)]
struct Cost {
    wall: f64,
    cpu: f64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

/// Runs both `runs` times, the one or the other first in turn; what each cost. `None` if one of
/// them can't.
fn in_turn(
    runs: u32,
    one: &dyn Fn() -> Option<Cost>,
    other: &dyn Fn() -> Option<Cost>,
) -> Option<(Cost, Cost)> {
    let (mut first, mut second) = (Cost::default(), Cost::default());
    for run in 0..runs {
        if run % 2 == 0 {
            first += one()?;
        }
        second += other()?;
        if run % 2 == 1 {
            first += one()?;
        }
    }
    Some((first, second))
}

fn cpu(who: i32) -> f64 {
    // SAFETY: the kernel fills the structure, which is valid when zeroed.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(who, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn open(path: &Path, case: &Case) -> Arc<dyn Image> {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(if case.direct { libc::O_DIRECT } else { 0 })
        .open(path)
        .expect("the image can be opened");
    let file = File::new(OwnedFd::from(file), "disk").expect("a file");
    images::chain::open(ImageConfig::new(case.format, file)).expect("an image")
}

/// Runs requests for about `TIME`, or as many as `count`; how many, and what they cost.
fn ours(path: &Path, case: &Case, count: Option<u64>) -> (u64, Cost) {
    let engine = Engine::new(open(path, case), case.options());
    let mut queue = engine.queue(Arc::new(())).expect("a queue");
    let mut memory = AlignedBuf::new(case.block as usize).expect("memory");
    memory.fill(0x5a);
    // One for all of them, as qemu-img has it: its bytes are in the processor's cache.
    let buffer = memory.io(usize::MAX);
    let op = if case.write { Op::Write } else { Op::Read };
    let mut offset = 0;
    let mut next = |token: u64| {
        let request = Request {
            op,
            offset,
            len: 0,
            bufs: vec![buffer],
            token,
        };
        offset = (offset + case.step()) % SIZE;
        request
    };
    let cpu_before = cpu(libc::RUSAGE_SELF);
    let begun = Instant::now();
    let mut submitted = case.depth as u64;
    let mut completed = 0;
    let mut done = Vec::new();
    for token in 0..case.depth as u64 {
        queue.submit(next(token));
    }
    let mut last = count.unwrap_or(u64::MAX);
    while completed < submitted {
        queue.complete(&mut done);
        if done.is_empty() {
            let mut fds = libc::pollfd {
                fd: std::os::fd::AsRawFd::as_raw_fd(&queue.fd()),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one descriptor, whose structure outlives the call.
            unsafe { libc::poll(&raw mut fds, 1, 10_000) };
            continue;
        }
        if count.is_none() && last == u64::MAX && begun.elapsed() > TIME {
            last = submitted;
        }
        for completion in done.drain(..) {
            completion.result.expect("success");
            completed += 1;
            if submitted < last {
                queue.submit(next(completion.token));
                submitted += 1;
            }
        }
    }
    let wall = begun.elapsed().as_secs_f64();
    let cost = Cost {
        wall: wall / completed as f64,
        cpu: (cpu(libc::RUSAGE_SELF) - cpu_before) / completed as f64,
    };
    (completed, cost)
}

fn qemu_run(path: &Path, case: &Case, count: u64) -> Option<(f64, f64)> {
    let before = cpu(libc::RUSAGE_CHILDREN);
    let mut command = Command::new("qemu-img");
    command
        .args(["bench", "-f", case.format.name(), "-i", case.aio])
        .args(["-t", if case.direct { "none" } else { "writeback" }])
        .args(["-c", &count.to_string(), "-d", &case.depth.to_string()])
        .args([
            "-s",
            &case.block.to_string(),
            "-S",
            &case.step().to_string(),
        ]);
    if case.write {
        command.args(["-w", "--pattern", "90"]);
    }
    let output = command
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .expect("qemu-img runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let wall = said
        .split("Run completed in ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .and_then(|seconds| seconds.parse().ok());
    let Some(wall) = wall else {
        println!("qemu-img: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    };
    Some((wall, cpu(libc::RUSAGE_CHILDREN) - before))
}

fn qemus(path: &Path, case: &Case, count: u64, start: f64) -> Option<Cost> {
    let (wall, cpu) = qemu_run(path, case, count)?;
    Some(Cost {
        wall: wall / count as f64,
        cpu: (cpu - start).max(0.0) / count as f64,
    })
}

fn create(path: &Path, format: Format, options: Option<&str>) {
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", format.name()])
        .args(options)
        .arg(path)
        .arg(SIZE.to_string())
        .status()
        .expect("qemu-img runs");
    assert!(status.success());
}

fn make(folder: &Path, format: Format) -> PathBuf {
    let path = folder.join(format!("disk.{}", format.name()));
    let preallocated = (format != Format::Raw).then_some("-opreallocation=metadata");
    create(&path, format, preallocated);
    let output = Command::new("qemu-io")
        .args([
            "-f",
            format.name(),
            "-c",
            &format!("write -q -P 90 0 {SIZE}"),
        ])
        .args(["-c", "flush"])
        .arg(&path)
        .status()
        .expect("qemu-io runs");
    assert!(output.success());
    path
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for format in [Format::Raw, Format::Qcow2] {
        for direct in [false, true] {
            let aios: &[&'static str] = if direct {
                &["threads", "native", "io_uring"]
            } else {
                &["threads", "io_uring"]
            };
            for &aio in aios {
                for write in [false, true] {
                    for random in [false, true] {
                        for block in [4096, 65536] {
                            for depth in [1, 64] {
                                cases.push(Case {
                                    format,
                                    write,
                                    random,
                                    fresh: false,
                                    block,
                                    depth,
                                    direct,
                                    aio,
                                });
                            }
                        }
                    }
                }
                for (block, depth) in [(4096, 1), (65536, 1), (65536, 64)] {
                    if format == Format::Qcow2 {
                        cases.push(Case {
                            format,
                            write: true,
                            random: false,
                            fresh: true,
                            block,
                            depth,
                            direct,
                            aio,
                        });
                    }
                }
            }
        }
    }
    cases
}

fn main() {
    let parts = std::env::var("VIREO_BENCH").unwrap_or_default();
    if !parts.is_empty() && !parts.split(',').any(|part| part == "block") {
        return;
    }
    let runs = std::env::var("VIREO_BENCH_RUNS")
        .ok()
        .and_then(|runs| runs.parse().ok())
        .unwrap_or(4);
    let only = std::env::var("VIREO_BENCH_ONLY").unwrap_or_default();
    let folder = std::env::var_os("VIREO_BENCH_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    let folder = folder.join(format!("block-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for the images");
    println!(
        "Block layer against qemu-img bench, {runs} runs of each in turn, thousands of\n\
         requests a second and microseconds of CPU time for each; ratio above 1: ours is better."
    );
    let mut paths: Vec<(Format, PathBuf, f64)> = Vec::new();
    let mut ratios = Vec::new();
    for case in cases() {
        let name = case.name();
        if !only
            .split_whitespace()
            .all(|word| name.split_whitespace().any(|part| part == word))
        {
            continue;
        }
        if !paths.iter().any(|(format, ..)| *format == case.format) {
            let path = make(&folder, case.format);
            let mut one = case;
            one.aio = "threads";
            one.direct = false;
            let start = (0..5)
                .filter_map(|_| qemu_run(&path, &one, 1))
                .map(|(_, cpu)| cpu)
                .fold(f64::INFINITY, f64::min);
            paths.push((case.format, path, start));
        }
        let Some((_, path, start)) = paths.iter().find(|(format, ..)| *format == case.format)
        else {
            continue;
        };
        let fresh = folder.join("fresh");
        // An empty image each time, and no more requests than fit into it.
        let prepare = || {
            if !case.fresh {
                return path.as_path();
            }
            let _ = fs::remove_file(&fresh);
            create(&fresh, case.format, None);
            &fresh
        };
        let count = case.fresh.then_some((SIZE / 2 / case.block).min(8192));
        let (count, alone) = ours(prepare(), &case, count);
        let mine = || Some(ours(prepare(), &case, Some(count)).1);
        let peers = || qemus(prepare(), &case, count, *start);
        let Some((cost, peer)) = in_turn(runs, &mine, &peers) else {
            println!("{name}  {:8.1} k/s; no peer here", 1e-3 / alone.wall);
            continue;
        };
        let rate = |cost: Cost| 1e-3 / cost.wall * f64::from(runs);
        let micros = |cost: Cost| cost.cpu * 1e6 / f64::from(runs);
        let mut ratio = peer.wall / cost.wall;
        let mut again = String::new();
        if ratio < 1.0
            && let Some((cost, peer)) = in_turn(runs * AGAIN, &mine, &peers)
            && let Some((one, other)) = in_turn(runs * AGAIN, &peers, &peers)
        {
            ratio = peer.wall / cost.wall;
            again = format!(
                "   for longer {ratio:.2}, QEMU and itself {:.2}",
                other.wall / one.wall
            );
        }
        ratios.push(ratio);
        println!(
            "{name}  {:8.1} k/s, QEMU {:8.1}: {:5.2}   CPU {:6.1} us, QEMU {:6.1}: {:5.2}{again}",
            rate(cost),
            rate(peer),
            peer.wall / cost.wall,
            micros(cost),
            micros(peer),
            peer.cpu / cost.cpu
        );
    }
    ratios.sort_by(f64::total_cmp);
    if let (Some(least), Some(middle)) = (ratios.first(), ratios.get(ratios.len() / 2)) {
        println!(
            "{} lines: throughput ratio at least {least:.2}, median {middle:.2}",
            ratios.len()
        );
    }
    let _ = fs::remove_dir_all(&folder);
}
