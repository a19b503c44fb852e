//! Save and restore: time to the first output of a restored guest, speed of saving; how long a live snapshot stops the
//! guest.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, linux_guest, tiny_kernel, which};
use vmm_api::control::{Answer, Call, FromVmm, Request};
use vmm_api::saved::{CHUNK, ChunkSum, Image, PAGE, Plan};

use crate::{Cost, report, until};

/// Guest memory in use.
const CONTENT: u64 = 96 << 20;
const MUCH: u64 = 512 << 20;

/// Restores of a small and of a large guest, and a save.
pub fn run(runs: usize) {
    println!("## Process start to the first output of a restored guest; saving (software CPU)");
    let rig = Rig::new();
    let kernel = rig.write("tiny.elf", tiny_kernel());
    let config = |mib: u64, more: &str| {
        format!(
            r#"{{"version":1,"name":"bench","uuid":"11111111-2222-3333-4444-555555555555","backend":"soft",
            "memory_bytes":{},"vcpus":1,"boot":{{"kernel":{{"path":"{kernel}"}}}},"serials":[{{"backend":"stdio"}}]{more}}}"#,
            mib << 20
        )
    };
    let mut times: Vec<Vec<f64>> = Vec::new();
    for (mib, content) in [(128, CONTENT), (4096, MUCH)] {
        let Some(image) = prepare(&rig, mib, content, &config) else {
            return println!("left out: the machine could not be saved");
        };
        let restore = format!(r#","restore":{{"image":{{"path":"{image}"}}}}"#);
        let restore = rig.write("restore.json", config(mib, &restore));
        let mut costs: Vec<Cost> = Vec::new();
        for _ in 0..runs * 4 {
            costs.extend(until(
                rig.command("vireo-vmm").args(["--config", &restore]),
                "TINY",
                Duration::from_secs(10),
            ));
        }
        times.push(costs.iter().map(|cost| cost.wall).collect());
    }
    let large = times.pop().unwrap_or_default();
    let small = times.pop().unwrap_or_default();
    report(
        "restore of 4 GiB (512 MiB in use) to first output",
        "ms",
        1e3,
        large,
        "of 128 MiB (96 MiB in use)",
        small,
    );
    save_speed(&rig, runs, &config);
    println!();
    live_snapshots(runs);
}

/// An image of a machine that has not run yet, with so much of its memory in use.
fn prepare(
    rig: &Rig,
    mib: u64,
    content: u64,
    config: &dyn Fn(u64, &str) -> String,
) -> Option<String> {
    let control = rig.path("control").display().to_string();
    let paused = format!(r#","start_paused":true,"control":{{"path":"{control}"}}"#);
    let mut child = start(rig, &config(mib, &paused))?;
    let empty = rig.path("empty.save");
    let saved = save(Path::new(&control), &empty);
    let _ = child.kill();
    let _ = child.wait();
    saved?;
    let from = File::open(&empty).ok()?;
    let sections = Image::open(&from).ok()?.sections().ok()?;
    let header = Image::open(&from).ok()?.header;
    let path = rig.path(&format!("{mib}.save"));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .ok()?;
    let mut plan = Plan::begin(&file, [1; 16], "", true, &sections, header.ram_bytes).ok()?;
    let sums = Image::open(&from).ok()?.sums().ok()?;
    let mut chunk = vec![0; CHUNK as usize];
    // The end of memory: the kernel and its tables are at the beginning.
    let first = (header.ram_bytes - content) / CHUNK;
    for index in 0..header.ram_bytes / CHUNK {
        let mut sum = ChunkSum::default();
        if index >= first {
            for (at, byte) in chunk.iter_mut().enumerate() {
                *byte = (at as u64 ^ index ^ at as u64 >> 8) as u8 | 1;
            }
        } else if sums.get(index as usize) == Some(&0) {
            continue;
        } else {
            from.read_exact_at(&mut chunk, header.ram_offset + index * CHUNK)
                .ok()?;
        }
        for (page, bytes) in vmm_api::saved::runs(&chunk) {
            sum.add(page, bytes);
            let at = plan.ram_offset() + index * CHUNK + u64::from(page) * PAGE;
            file.write_all_at(bytes, at).ok()?;
        }
        plan.set_sum(index as usize, sum);
    }
    plan.finish(&file).ok()?;
    Some(path.display().to_string())
}

fn start(rig: &Rig, config: &str) -> Option<Child> {
    let config = rig.write("machine.json", config);
    rig.command("vireo-vmm")
        .args(["--config", &config])
        .stdout(Stdio::null())
        .spawn()
        .ok()
}

fn ask(mut stream: &UnixStream, call: Call, fds: &[i32]) -> Option<Answer> {
    let request = Request {
        id: 1,
        call,
        descriptors: u32::try_from(fds.len()).ok()?,
    };
    let body = serde_json::to_vec(&request).ok()?;
    let frame = [&u32::try_from(body.len()).ok()?.to_be_bytes()[..], &body].concat();
    match fds {
        [] => stream.write_all(&frame).ok()?,
        fds => pass(stream, &frame, fds)?,
    }
    loop {
        let mut length = [0; 4];
        stream.read_exact(&mut length).ok()?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut body).ok()?;
        if let FromVmm::Reply(reply) = serde_json::from_slice(&body).ok()? {
            return reply.result.ok();
        }
    }
}

/// Saves through the control socket; the seconds it took.
fn save(control: &Path, to: &Path) -> Option<f64> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let stream = loop {
        match UnixStream::connect(control) {
            Ok(stream) => break stream,
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => return None,
        }
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(to)
        .ok()?;
    let call = Call::Save {
        xml: String::new(),
        id: [1; 16],
        running: Some(true),
    };
    // A machine that is being built does not answer yet.
    ask(&stream, Call::Query, &[])?;
    let began = Instant::now();
    let answer = ask(&stream, call, &[file.as_raw_fd()])?;
    matches!(answer, Answer::Job(_)).then(|| began.elapsed().as_secs_f64())
}

/// Sends a frame with up to 16 descriptors.
pub fn pass(stream: &UnixStream, frame: &[u8], fds: &[i32]) -> Option<()> {
    let mut part = libc::iovec {
        iov_base: frame.as_ptr().cast_mut().cast(),
        iov_len: frame.len(),
    };
    let mut control = [0u64; 12];
    let bytes = u32::try_from(size_of_val(fds.get(..16).unwrap_or(fds))).ok()?;
    // SAFETY: the message refers to live buffers; the control buffer has room for 16 descriptors.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(bytes) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(bytes) as _;
        let to = libc::CMSG_DATA(header);
        std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), to, bytes as usize);
        libc::sendmsg(stream.as_raw_fd(), &raw const message, 0)
    };
    (sent == frame.len() as isize).then_some(())
}

/// Saving 512 MiB, against writing the same bytes plainly, to the disk and to memory.
fn save_speed(rig: &Rig, runs: usize, config: &dyn Fn(u64, &str) -> String) {
    let image = rig.path("4096.save").display().to_string();
    let control = rig.path("control").display().to_string();
    let more = format!(
        r#","start_paused":true,"control":{{"path":"{control}"}},"restore":{{"image":{{"path":"{image}"}},"copy":true}}"#
    );
    let shm = Path::new("/dev/shm").join(format!("vireo-bench-{}", std::process::id()));
    let bytes: Vec<u8> = (0..MUCH).map(|at| (at ^ at >> 8) as u8 | 1).collect();
    for (place, to) in [("disk", rig.path("speed")), ("tmpfs", shm)] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            let Some(mut child) = start(rig, &config(4096, &more)) else {
                return;
            };
            ours.extend(save(Path::new(&control), &to));
            let _ = child.kill();
            let _ = child.wait();
            let _ = std::fs::remove_file(&to);
            let began = Instant::now();
            let plain = File::create(&to).and_then(|mut file| {
                for chunk in bytes.chunks(CHUNK as usize) {
                    file.write_all(chunk)?;
                }
                file.sync_all()
            });
            if plain.is_ok() {
                theirs.push(began.elapsed().as_secs_f64());
            }
            let _ = std::fs::remove_file(&to);
        }
        report(
            &format!("save of 4 GiB (512 MiB in use) to {place}"),
            "ms",
            1e3,
            ours,
            "plain write of 512 MiB, synced",
            theirs,
        );
    }
}

/// The longest time between two ticks of a process in a guest while snapshots of it are made, told by itself.
fn live_snapshots(runs: usize) {
    const BOOT: Duration = Duration::from_secs(240);
    const SOON: Duration = Duration::from_secs(60);
    println!(
        "## Live snapshots of a guest of 1 GiB, 512 MiB in use: longest time between two ticks (1 ms) of a process in it"
    );
    let Some(initrd) = std::env::var_os("VIREO_BENCH_INITRD") else {
        return println!("left out: needs VIREO_BENCH_INITRD (make bench)\n");
    };
    if !Kernel::V6_1.is_there() || !which("qemu-img") {
        return println!("left out: needs a guest kernel, and qemu-img (qemu-utils)\n");
    }
    let rig = Rig::new();
    let image = rig.path("disk.qcow2").display().to_string();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", &image, "64M"])
        .status();
    if !made.is_ok_and(|status| status.success()) {
        return println!("left out: qemu-img failed\n");
    }
    let own = Kernel::V6_1.folder().join("initrd.img");
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{image}'/><target dev='vda' bus='virtio'/></disk>\n    <console"
    );
    let xml = linux_guest("bench", Kernel::V6_1)
        .replace(
            &own.display().to_string(),
            &Path::new(&initrd).display().to_string(),
        )
        .replace("console=ttyS0", "console=ttyS0 quiet workload=pauses")
        .replace("<memory unit='MiB'>256", "<memory unit='MiB'>1024")
        .replace("<console", &disk);
    rig.define(&xml);
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "bench", "--console"]));
    terminal.expect("TICKS", BOOT);
    let longest = |terminal: &mut Terminal| {
        terminal.send("g");
        terminal.expect("LONGEST ", SOON);
        let told = terminal.expect(" us", SOON);
        told.split_whitespace()
            .next()
            .and_then(|number| number.parse::<f64>().ok())
            .map(|us| us / 1e6)
    };
    let mut number = 0;
    for (name, key, options) in [
        ("no snapshot, idle", "s", &[][..]),
        ("disk-only, idle", "s", &["--disk-only"]),
        ("with memory, --live, idle", "s", &["--live"]),
        ("no snapshot, writing 100 MB/s over 32 MiB", "d", &[]),
        ("with memory, --live, writing", "d", &["--live"]),
    ] {
        terminal.send(key);
        std::thread::sleep(Duration::from_secs(1));
        let mut ours = Vec::new();
        for _ in 0..runs {
            number += 1;
            let snapshot = format!("s{number}");
            let memory = rig.path("memory").display().to_string();
            longest(&mut terminal);
            if options.is_empty() {
                std::thread::sleep(Duration::from_secs(1));
            } else {
                let mut words = vec!["snapshot-create-as", "bench", &snapshot, "--no-metadata"];
                words.extend(options);
                if options == ["--live"] {
                    words.extend(["--memspec", &memory]);
                }
                rig.vireo(&words).ok();
            }
            ours.extend(longest(&mut terminal));
        }
        report(name, "ms", 1e3, ours, "", Vec::new());
    }
    rig.vireo(&["destroy", "bench"]).ok();
    println!();
}
