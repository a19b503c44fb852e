//! virtio-blk and virtio-net inside a Linux guest: the same guest image and the same image files on
//! the software CPU and on QEMU's TCG, in turn. Disks are read and written past the guest's cache;
//! the network is passt on both, to a TCP peer on this host's loopback.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vireo_tests::{Guest, Kernel, Rig, machine, which};
use vmm_api::config::Resource;
use vmm_api::devices::{
    CacheMode, DetectZeroes, DeviceConfig, DeviceKind, DiskBus, DiskConfig, DiskLimits,
    ErrorPolicy, ImageConfig, ImageFormat, IoMode, NetBackend, NetConfig, PciAddress,
};

use super::{report, resident_kib};

/// Bytes of each disk.
const DISK: u64 = 256 << 20;
/// What one network run carries.
const TRANSFER: usize = 64 << 20;
const LIMIT: Duration = Duration::from_secs(300);

/// A passt of its own for one guest, and the end that the guest's VMM gets.
struct Passt(Child);

impl Passt {
    fn start() -> Option<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair().ok()?;
        let theirs = OwnedFd::from(theirs);
        let fd = theirs.as_raw_fd();
        let mut command = Command::new("passt");
        command
            .args(["--foreground", "--one-off", "-q", "--fd", &fd.to_string()])
            .stderr(Stdio::null());
        // SAFETY: fcntl is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                libc::fcntl(fd, libc::F_SETFD, 0);
                Ok(())
            });
        }
        Some((Self(command.spawn().ok()?), ours.into()))
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends to whoever connects to the first port, takes from whoever connects to the second.
fn peers() -> Option<(u16, u16)> {
    let source = TcpListener::bind("127.0.0.1:0").ok()?;
    let sink = TcpListener::bind("127.0.0.1:0").ok()?;
    let ports = (
        source.local_addr().ok()?.port(),
        sink.local_addr().ok()?.port(),
    );
    // Both end with the process.
    std::thread::spawn(move || {
        let block = vec![b'x'; 1 << 20];
        for mut stream in source.incoming().flatten() {
            for _ in 0..TRANSFER / block.len() {
                if stream.write_all(&block).is_err() {
                    break;
                }
            }
        }
    });
    std::thread::spawn(move || {
        for stream in sink.incoming().flatten() {
            // A guest whose request goes wrong says so itself.
            let _ = answer_post(stream);
        }
    });
    Some(ports)
}

/// Takes an HTTP request with `TRANSFER` bytes behind its header, and says that all have come.
fn answer_post(stream: TcpStream) -> std::io::Result<()> {
    let mut stream = BufReader::with_capacity(1 << 20, stream);
    let mut line = String::new();
    while stream.read_line(&mut line)? > "\r\n".len() {
        line.clear();
    }
    let mut left = TRANSFER;
    while left > 0 {
        let got = stream.fill_buf()?.len().min(left);
        if got == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        stream.consume(got);
        left -= got;
    }
    let answer = b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\ndone";
    stream.get_mut().write_all(answer)
}

/// CPU time of a process's threads but the one that runs the guest's CPU, those that have ended
/// included: what its devices cost. Seconds.
fn device_cpu(pid: i32) -> f64 {
    let mut clock = 0;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: both fill what they are given.
    let failed = unsafe {
        libc::clock_getcpuclockid(pid, &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
    };
    if failed {
        return f64::NAN;
    }
    let whole = time.tv_sec as f64 + time.tv_nsec as f64 / 1e9;
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let cpus = tasks.into_iter().flatten().flatten().filter_map(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        if !name.starts_with("vcpu") && !name.starts_with("CPU ") {
            return None;
        }
        let times = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        times.split_whitespace().next()?.parse::<f64>().ok()
    });
    whole - cpus.sum::<f64>() / 1e9
}

fn disk(
    format: ImageFormat,
    path: &Path,
    device: u8,
    (cache, io): (CacheMode, IoMode),
) -> DeviceConfig {
    let image = ImageConfig {
        format,
        file: Resource::Path(path.into()),
        name: path.display().to_string(),
        data_file: None,
        backing: None,
        passphrase: None,
    };
    let disk = DiskConfig {
        bus: DiskBus::Virtio,
        cdrom: false,
        iothread: None,
        image: Some(image),
        readonly: false,
        shareable: false,
        cache,
        io,
        discard: true,
        detect_zeroes: DetectZeroes::Off,
        serial: String::new(),
        vendor: String::new(),
        product: String::new(),
        wwn: None,
        queues: 1,
        logical_block_size: 512,
        physical_block_size: 512,
        limits: DiskLimits::default(),
        limits_group: None,
        on_read_error: ErrorPolicy::Report,
        on_write_error: ErrorPolicy::Enospace,
    };
    at(
        format!("disk{device}"),
        device,
        DeviceKind::Disk(disk.into()),
    )
}

fn at(id: String, device: u8, kind: DeviceKind) -> DeviceConfig {
    DeviceConfig {
        id,
        address: PciAddress {
            bus: 0,
            device,
            function: 0,
        },
        kind,
    }
}

fn ours(rig: &Rig, [raw, qcow2, direct]: &[PathBuf; 3], wire: OwnedFd) -> Guest {
    let cached = (CacheMode::Writeback, IoMode::Threads);
    let net = NetConfig {
        mac: [0x52, 0x54, 0, 1, 2, 3],
        backend: NetBackend::Stream(Resource::Fd(wire.as_raw_fd())),
        mtu: None,
        link_up: true,
        queue_pairs: 1,
        filter_source_mac: false,
        inbound: Default::default(),
        outbound: Default::default(),
    };
    let devices = vec![
        disk(ImageFormat::Raw, raw, 3, cached),
        disk(ImageFormat::Qcow2, qcow2, 4, cached),
        disk(
            ImageFormat::Raw,
            direct,
            6,
            (CacheMode::None, IoMode::IoUring),
        ),
        at("net0".into(), 5, DeviceKind::Net(net)),
    ];
    Guest::boot(rig, &machine(Kernel::V6_1, devices), &[wire])
}

fn theirs([raw, qcow2, direct]: &[PathBuf; 3], wire: OwnedFd) -> Guest {
    let folder = Kernel::V6_1.folder();
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35", "-accel", "tcg", "-m", "256", "-nodefaults"])
        .args(["-nographic", "-no-user-config", "-serial", "stdio"])
        .arg("-kernel")
        .arg(folder.join("vmlinuz"))
        .arg("-initrd")
        .arg(folder.join("initrd.img"))
        .args(["-append", "console=ttyS0 quiet"])
        .args(["-name", "guest,debug-threads=on"]);
    for (index, format, path, how) in [
        (3, "raw", raw, ""),
        (4, "qcow2", qcow2, ""),
        (6, "raw", direct, ",cache=none,aio=io_uring"),
    ] {
        let path = path.display();
        command
            .arg("-drive")
            .arg(format!(
                "file={path},if=none,id=d{index},format={format},discard=unmap{how}"
            ))
            .arg("-device")
            .arg(format!(
                "virtio-blk-pci,drive=d{index},addr={index},num-queues=1,disable-legacy=on"
            ));
    }
    command
        .arg("-netdev")
        .arg(format!(
            "stream,id=n0,addr.type=fd,addr.str={}",
            wire.as_raw_fd()
        ))
        .args([
            "-device",
            "virtio-net-pci,netdev=n0,addr=5,disable-legacy=on",
        ]);
    Guest::start(&mut command, &[wire])
}

/// One workload: what it is called, its line in the guest's shell, how many units it does.
struct Load {
    name: String,
    line: String,
    amount: f64,
    unit: &'static str,
}

fn loads((source, sink): (u16, u16)) -> Vec<Load> {
    let mut loads = Vec::new();
    let mut add = |name: String, line: String, amount, unit| {
        loads.push(Load {
            name,
            line,
            amount,
            unit,
        });
    };
    let mib = DISK as f64 / f64::from(1 << 20);
    // The last one past the host's cache, too, by the kernel's asynchronous I/O.
    for (disk, dev) in [("raw", "vda"), ("qcow2", "vdb"), ("direct", "vdc")] {
        let dd = |rest: &str| format!("dd {rest} 2>/dev/null");
        add(
            format!("{disk} read 1 MiB"),
            dd(&format!("if=/dev/{dev} of=/dev/null bs=1M iflag=direct")),
            mib,
            "MiB/s",
        );
        add(
            format!("{disk} write 1 MiB"),
            dd(&format!(
                "if=/dev/zero of=/dev/{dev} bs=1M count=128 oflag=direct conv=fsync"
            )),
            128.0,
            "MiB/s",
        );
        add(
            format!("{disk} read 4 KiB"),
            dd(&format!(
                "if=/dev/{dev} of=/dev/null bs=4k count=2000 iflag=direct"
            )),
            2000.0,
            "IO/s",
        );
        add(
            format!("{disk} write 4 KiB"),
            dd(&format!(
                "if=/dev/zero of=/dev/{dev} bs=4k count=2000 oflag=direct"
            )),
            2000.0,
            "IO/s",
        );
    }
    let transfer = TRANSFER as f64 / f64::from(1 << 20);
    add(
        "net to the guest".to_owned(),
        format!("[ $(nc $gw {source} | wc -c) = {TRANSFER} ]"),
        transfer,
        "MiB/s",
    );
    add(
        "net from the guest".to_owned(),
        // A pipe into nc would go in pieces of 1 KiB, which passt gives up on half way.
        format!(
            "[ -s /tmp/f ] || head -c {TRANSFER} /dev/zero | tr '\\000' v >/tmp/f; \
             [ \"$(wget -q -O - --post-file /tmp/f http://$gw:{sink}/)\" = done ]"
        ),
        transfer,
        "MiB/s",
    );
    loads
}

pub fn run(runs: usize) {
    println!("## Disks and network inside a Linux guest, software CPU against QEMU TCG");
    println!("(seconds by the host's clock; ratios below 1: Vireo is quicker)");
    for program in ["qemu-system-x86_64", "qemu-img", "passt"] {
        if !which(program) {
            println!("left out: needs {program}\n");
            return;
        }
    }
    let rig = Rig::new();
    let Some(ports) = peers() else {
        println!("left out: no listeners on loopback\n");
        return;
    };
    let mut images = Vec::new();
    for side in ["ours", "theirs"] {
        let raw = rig.path(&format!("{side}.raw"));
        let qcow2 = rig.path(&format!("{side}.qcow2"));
        let direct = rig.path(&format!("{side}.direct"));
        let content = vec![b'v'; DISK as usize];
        let made = [&raw, &direct]
            .iter()
            .all(|path| std::fs::write(path, &content).is_ok())
            && Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", "qcow2"])
                .args([&raw, &qcow2])
                .status()
                .is_ok_and(|status| status.success());
        if !made {
            println!("left out: the images can't be made\n");
            return;
        }
        images.push([raw, qcow2, direct]);
    }
    let (Some((our_passt, our_wire)), Some((their_passt, their_wire))) =
        (Passt::start(), Passt::start())
    else {
        println!("left out: passt does not start\n");
        return;
    };
    let mut guests = [
        ours(&rig, &images[0], our_wire),
        theirs(&images[1], their_wire),
    ];
    let set_up = "ip link set eth0 up && udhcpc -i eth0 -s /etc/udhcpc.script -n -q >/dev/null 2>&1; gw=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'); [ \"$gw\" ]";
    for guest in &mut guests {
        if guest.run(set_up).status != 0 {
            println!("left out: a guest has no network\n");
            return;
        }
    }
    let only = std::env::var("VIREO_BENCH_ONLY").unwrap_or_default();
    let wanted = |name: &str| only.is_empty() || only.split(',').any(|part| name.contains(part));
    for load in loads(ports).iter().filter(|load| wanted(&load.name)) {
        let mut took = [Vec::new(), Vec::new()];
        let mut device = [f64::INFINITY; 2];
        // The first run only warms up.
        for n in 0..=runs {
            for ((guest, list), device) in guests.iter_mut().zip(&mut took).zip(&mut device) {
                let pid = guest.terminal().pid();
                let before = device_cpu(pid);
                let start = Instant::now();
                let said = guest.run_within(&load.line, LIMIT);
                if said.status != 0 {
                    println!("{}: a guest failed: {}\n", load.name, said.output);
                    return;
                }
                let wall = start.elapsed().as_secs_f64();
                let cpu = device_cpu(pid) - before;
                if n > 0 {
                    list.push(wall);
                    *device = device.min(cpu);
                }
            }
        }
        let [ours, theirs] = took;
        let best = ours.iter().copied().fold(f64::INFINITY, f64::min);
        let name = format!(
            "{} ({:.0} {} at best)",
            load.name,
            load.amount / best,
            load.unit
        );
        report(&name, "ms", 1e3, ours, "QEMU TCG", theirs);
        let [ours, theirs] = device.map(|cpu| cpu * 1e6 / load.amount);
        println!(
            "    CPU time beside the guest's CPU: {ours:.1} us per {}; QEMU: {theirs:.1}; ratio {:.2} of minima",
            load.unit.trim_end_matches("/s"),
            ours / theirs
        );
    }
    for (guest, name) in guests.iter_mut().zip(["Vireo", "QEMU"]) {
        let pid = u32::try_from(guest.terminal().pid()).unwrap_or(0);
        println!(
            "peak resident, {name}: {:.0} MiB",
            resident_kib(pid) / 1024.0
        );
    }
    println!();
    drop((our_passt, their_passt));
}
