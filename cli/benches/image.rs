//! `vireo image` against qemu-img on the same images, in turn (A B A B ...).
//!
//! VIREO_BENCH chooses this (`image`) among all of `make bench`. VIREO_BENCH_RUNS runs each
//! (default 3), the best counts. VIREO_BENCH_DIR is where the images are made (default: the build's
//! folder). VIREO_BENCH_SMALL=1 makes them a sixteenth as large. Nothing here passes or fails.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// A command line, with what has to be done before each run.
struct Case {
    name: &'static str,
    before: fn(&Path),
    args: &'static [&'static str],
}

fn nothing(_: &Path) {}

fn remove_out(folder: &Path) {
    let _ = std::fs::remove_file(folder.join("out"));
}

/// A base, and an overlay with a quarter of it in pieces.
fn overlay(folder: &Path) {
    remove_out(folder);
    let _ = std::fs::remove_file(folder.join("top"));
    tool(folder, "cp", &["--reflink=auto", "full.qcow2", "base"]);
    let args = [
        "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", "top",
    ];
    tool(folder, "qemu-img", &args);
    let size = std::fs::metadata(folder.join("full.raw")).map_or(0, |meta| meta.len());
    let mut io = vec!["-f".to_owned(), "qcow2".into()];
    for n in 0..16 {
        io.push("-c".into());
        io.push(format!("write -q -P {n} {} {}", n * size / 16, size / 64));
    }
    io.push("top".into());
    tool(
        folder,
        "qemu-io",
        &io.iter().map(String::as_str).collect::<Vec<_>>(),
    );
}

const CASES: &[Case] = &[
    Case {
        name: "convert sparse raw to qcow2",
        before: remove_out,
        args: &["convert", "-f", "raw", "-O", "qcow2", "sparse.raw", "out"],
    },
    Case {
        name: "convert sparse qcow2 to raw",
        before: remove_out,
        args: &["convert", "-f", "qcow2", "-O", "raw", "sparse.qcow2", "out"],
    },
    Case {
        name: "convert full raw to qcow2",
        before: remove_out,
        args: &["convert", "-f", "raw", "-O", "qcow2", "full.raw", "out"],
    },
    Case {
        name: "convert full qcow2 to qcow2",
        before: remove_out,
        args: &["convert", "-f", "qcow2", "-O", "qcow2", "full.qcow2", "out"],
    },
    Case {
        name: "convert full qcow2 to raw",
        before: remove_out,
        args: &["convert", "-f", "qcow2", "-O", "raw", "full.qcow2", "out"],
    },
    Case {
        name: "convert -c zstd, full",
        before: remove_out,
        args: &[
            "convert",
            "-c",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            "-o",
            "compression_type=zstd",
            "full.qcow2",
            "out",
        ],
    },
    Case {
        name: "check full",
        before: nothing,
        args: &["check", "-q", "-f", "qcow2", "full.qcow2"],
    },
    Case {
        name: "compare full",
        before: nothing,
        args: &[
            "compare",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "full.qcow2",
            "full.raw",
        ],
    },
    Case {
        name: "compare sparse",
        before: nothing,
        args: &[
            "compare",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "sparse.qcow2",
            "sparse.raw",
        ],
    },
    Case {
        name: "create preallocation=metadata",
        before: remove_out,
        args: &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "preallocation=metadata",
            "out",
            "8G",
        ],
    },
    Case {
        name: "create preallocation=falloc",
        before: remove_out,
        args: &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "preallocation=falloc",
            "out",
            "2G",
        ],
    },
    Case {
        name: "create preallocation=full",
        before: remove_out,
        args: &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "preallocation=full",
            "out",
            "1G",
        ],
    },
    Case {
        name: "commit",
        before: overlay,
        args: &["commit", "-q", "-f", "qcow2", "top"],
    },
];

fn tool(folder: &Path, name: &str, args: &[&str]) {
    let status = Command::new(name)
        .args(args)
        .current_dir(folder)
        .stdin(Stdio::null())
        .status()
        .expect("it runs");
    assert!(status.success(), "{name} {args:?}");
}

/// CPU time of children so far, seconds.
fn cpu() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: writes one structure at the address given.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()) };
    // SAFETY: zeroed, which is a valid value, and perhaps filled.
    let usage = unsafe { usage.assume_init() };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Wall clock and CPU time, seconds.
fn once(folder: &Path, ours: bool, case: &Case) -> (f64, f64) {
    (case.before)(folder);
    let mut command = if ours {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.arg("image");
        command
    } else {
        Command::new("qemu-img")
    };
    command
        .args(case.args)
        .current_dir(folder)
        .stdin(Stdio::null());
    let (begun, before) = (Instant::now(), cpu());
    let status = command.status().expect("it runs");
    assert!(status.success(), "{:?}", case.args);
    (begun.elapsed().as_secs_f64(), cpu() - before)
}

fn main() {
    let parts = std::env::var("VIREO_BENCH").unwrap_or_default();
    if !parts.is_empty() && !parts.split(',').any(|part| part == "image") {
        return;
    }
    let runs = std::env::var("VIREO_BENCH_RUNS")
        .ok()
        .and_then(|runs| runs.parse().ok())
        .unwrap_or(3);
    let small = std::env::var_os("VIREO_BENCH_SMALL").is_some_and(|small| small == "1");
    let scale = if small { 16 } else { 1 };
    let folder = std::env::var_os("VIREO_BENCH_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    let folder = folder.join(format!("image-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the images");
    // 8 GiB with a megabyte in every 64, and 2 GiB of noise that compresses by half.
    let full = (2_u64 << 30) / scale;
    let sparse = (8_u64 << 30) / scale;
    let mut io = vec!["-f".to_owned(), "raw".into()];
    for at in (0..sparse).step_by(64 << 20) {
        io.push("-c".into());
        io.push(format!("write -q -P 90 {at} 1M"));
    }
    io.push("sparse.raw".into());
    let text = sparse.to_string();
    tool(
        &folder,
        "qemu-img",
        &["create", "-q", "-f", "raw", "sparse.raw", &text],
    );
    tool(
        &folder,
        "qemu-io",
        &io.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    {
        use std::io::Write;
        let file = std::fs::File::create(folder.join("full.raw")).expect("a file");
        let mut out = std::io::BufWriter::with_capacity(1 << 20, file);
        let mut state = 1_u64;
        for _ in 0..full / 16 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            out.write_all(&state.to_le_bytes()).expect("room");
            out.write_all(&[0x5a; 8]).expect("room");
        }
        out.flush().expect("room");
    }
    for name in ["full", "sparse"] {
        let (raw, qcow2) = (format!("{name}.raw"), format!("{name}.qcow2"));
        tool(
            &folder,
            "qemu-img",
            &["convert", "-f", "raw", "-O", "qcow2", &raw, &qcow2],
        );
    }
    println!(
        "vireo image against qemu-img, best of {runs} runs each in turn: seconds of the clock and of \
         CPU time;\nratios above 1: ours is better."
    );
    println!(
        "{:32} {:>8} {:>8} {:>6}   {:>8} {:>8} {:>6}",
        "", "ours", "qemu", "ratio", "ours CPU", "qemu CPU", "ratio"
    );
    for case in CASES {
        let mut best = [(f64::MAX, f64::MAX); 2];
        for _ in 0..runs {
            for (n, best) in best.iter_mut().enumerate() {
                let (wall, cpu) = once(&folder, n == 0, case);
                *best = (best.0.min(wall), best.1.min(cpu));
            }
        }
        println!(
            "{:32} {:8.3} {:8.3} {:6.2}   {:8.3} {:8.3} {:6.2}",
            case.name,
            best[0].0,
            best[1].0,
            best[1].0 / best[0].0,
            best[0].1,
            best[1].1,
            best[1].1 / best[0].1
        );
    }
    let _ = std::fs::remove_dir_all(&folder);
}
