//! PCI devices as a Linux guest sees them.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use vireo_tests::{Control, Guest, Kernel, Rig, left_out, machine, which};
use vmm_api::config::{CharBackend, Resource};
use vmm_api::control::{Call, Event};
use vmm_api::devices::{
    BalloonConfig, CacheMode, ConsoleConfig, ConsolePort, DetectZeroes, DeviceConfig, DeviceKind,
    DiskBus, DiskConfig, DiskLimits, ErrorPolicy, ImageConfig, ImageFormat, IoMode, NetBackend,
    NetConfig, PciAddress, RngConfig, RootPortConfig, WatchdogAction, WatchdogConfig,
};

fn at(bus: u8, device: u8) -> PciAddress {
    PciAddress {
        bus,
        device,
        function: 0,
    }
}

fn device(id: &str, address: PciAddress, kind: DeviceKind) -> DeviceConfig {
    DeviceConfig {
        id: id.into(),
        address,
        kind,
    }
}

fn root_port(device_number: u8, index: u8) -> DeviceConfig {
    let port = RootPortConfig {
        index,
        chassis: index,
        port: index,
        hotplug: false,
    };
    device(
        &format!("pci.{index}"),
        at(0, device_number),
        DeviceKind::RootPort(port),
    )
}

fn image(format: ImageFormat, path: &str) -> ImageConfig {
    ImageConfig {
        format,
        file: Resource::Path(path.into()),
        name: path.into(),
        data_file: None,
        backing: None,
        passphrase: None,
    }
}

fn disk(image: ImageConfig) -> DiskConfig {
    DiskConfig {
        bus: DiskBus::Virtio,
        cdrom: false,
        iothread: None,
        image: Some(image),
        readonly: false,
        shareable: false,
        cache: CacheMode::Writeback,
        io: IoMode::Threads,
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
    }
}

fn qemu_img(args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "qemu-img {args:?}: {text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    text
}

/// Sectors, each with its own number in it.
fn numbered(sectors: u32) -> Vec<u8> {
    (0..sectors)
        .flat_map(|n| [n.to_le_bytes(); 128].concat())
        .collect()
}

#[test]
fn linux_reads_and_writes_disks_of_every_kind() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let raw = rig.write("raw.img", numbered(2048));
    let base = rig.path("base.qcow2").display().to_string();
    let top = rig.path("top.qcow2").display().to_string();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", &raw, &base]);
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top, "64M",
    ]);
    let cd = rig.write("cd.iso", numbered(4096));
    let mut chain = image(ImageFormat::Qcow2, &top);
    chain.backing = Some(Box::new(image(ImageFormat::Qcow2, &base)));
    let first = DiskConfig {
        serial: "WD-1234567890".into(),
        cache: CacheMode::None,
        io: IoMode::IoUring,
        ..disk(image(ImageFormat::Raw, &raw))
    };
    let second = DiskConfig {
        queues: 2,
        ..disk(chain)
    };
    let third = DiskConfig {
        readonly: true,
        logical_block_size: 4096,
        physical_block_size: 4096,
        ..disk(image(ImageFormat::Raw, &cd))
    };
    let devices = vec![
        device("virtio-disk0", at(0, 3), DeviceKind::Disk(first.into())),
        device("virtio-disk1", at(2, 0), DeviceKind::Disk(second.into())),
        device("virtio-disk2", at(0, 5), DeviceKind::Disk(third.into())),
        root_port(1, 1),
        root_port(2, 2),
    ];
    let mut guest = Guest::boot(&rig, &machine(Kernel::V6_1, devices), &[]);
    // Stable places: whose disk is whose is told by the PCI address.
    let name = |guest: &mut Guest, place: &str| {
        let found = guest.run(&format!("ls /sys/bus/pci/devices/{place}/virtio*/block"));
        found.ok().trim().to_owned()
    };
    let [raw_dev, qcow2_dev, cd_dev] =
        ["0000:00:03.0", "0000:02:00.0", "0000:00:05.0"].map(|place| name(&mut guest, place));
    let serial = guest.run(&format!("cat /sys/block/{raw_dev}/serial"));
    assert_eq!(serial.ok(), "WD-1234567890");
    let sizes = format!(
        "cat /sys/block/{raw_dev}/size /sys/block/{qcow2_dev}/size /sys/block/{cd_dev}/ro \
         /sys/block/{cd_dev}/queue/logical_block_size; ls /sys/block/{qcow2_dev}/mq | wc -l"
    );
    assert_eq!(guest.run(&sizes).ok(), "2048\n131072\n1\n4096\n1\n");
    // The same content through every format.
    let sums = format!(
        "for d in {raw_dev} {qcow2_dev}; do dd if=/dev/$d bs=1M count=1 2>/dev/null | sha256sum; done"
    );
    let sums = guest.run(&sums).ok();
    let lines: Vec<&str> = sums.lines().collect();
    assert_eq!(lines[0], lines[1], "{sums}");
    let fails = guest.run(&format!("dd if=/dev/zero of=/dev/{cd_dev} count=8"));
    assert_ne!(fails.status, 0, "a read-only disk was written");
    // Written in one order, read back by another way.
    let write = format!(
        "for d in {raw_dev} {qcow2_dev}; do yes vireo | dd of=/dev/$d bs=4096 seek=10 count=100 \
         iflag=fullblock conv=fsync 2>/dev/null || echo bad; done"
    );
    assert_eq!(guest.run(&write).ok(), "");
    let zero = format!(
        "blkdiscard -o 65536 -l 65536 /dev/{qcow2_dev} && echo 3 >/proc/sys/vm/drop_caches"
    );
    guest.run(&zero).ok();
    let head = guest.run(&format!(
        "dd if=/dev/{raw_dev} bs=4096 skip=50 count=1 2>/dev/null | head -n 1"
    ));
    // 4096 is not a multiple of a line's six bytes.
    assert!("vireo\n".repeat(2).contains(&head.ok()));
    guest.run("sync").ok();
    guest.power_off();

    let mut expected = numbered(2048);
    let written: Vec<u8> = b"vireo\n".iter().copied().cycle().take(409_600).collect();
    expected[40_960..450_560].copy_from_slice(&written);
    assert!(fs::read(&raw).unwrap() == expected, "raw image");
    qemu_img(&["check", "-q", "-f", "qcow2", &top]);
    let flat = rig.path("flat.raw").display().to_string();
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &top, &flat]);
    expected[65_536..131_072].fill(0);
    expected.resize(64 << 20, 0);
    let flat = fs::read(&flat).unwrap();
    // What a discarded range reads as is zeroes or what was there before.
    assert_eq!(flat.len(), expected.len());
    assert!(flat[..65_536] == expected[..65_536]);
    assert!(flat[131_072..] == expected[131_072..]);
    let again = rig.path("again.raw").display().to_string();
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &base, &again]);
    assert!(
        fs::read(again).unwrap() == numbered(2048),
        "the backing file was written"
    );
}

/// What the guest was told is on disk is there after a kill, whenever it comes.
#[test]
fn linux_loses_no_durable_write_when_the_vmm_is_killed() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let path = rig.path("disk.qcow2").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &path, "256M"]);
    let devices = vec![device(
        "virtio-disk0",
        at(0, 3),
        DeviceKind::Disk(disk(image(ImageFormat::Qcow2, &path)).into()),
    )];
    let mut guest = Guest::boot(&rig, &machine(Kernel::V6_1, devices), &[]);
    // Every block says which it is; each fourth is followed by a flush and told. Another writer
    // keeps clusters being allocated all the time.
    guest.terminal().send(
        "(while :; do dd if=/dev/urandom of=/dev/vda bs=64k seek=2048 count=1000 2>/dev/null; done) & \
         n=0; while :; do yes block-$n | dd of=/dev/vda bs=16k seek=$n count=1 iflag=fullblock conv=fsync 2>/dev/null \
         && echo synced-$n; n=$((n+1)); done\r",
    );
    guest
        .terminal()
        .expect("synced-20\r\n", Duration::from_secs(100));
    std::thread::sleep(Duration::from_millis(300));
    let seen = {
        let text = guest.terminal().seen();
        guest.kill();
        text
    };
    let last: usize = seen
        .rsplit("synced-")
        .find_map(|part| part.split_once('\r').and_then(|(n, _)| n.parse().ok()))
        .unwrap();
    assert!(last >= 20, "{last}");
    let check = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", &path])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&check.stdout).into_owned();
    // 3: leaked clusters only, which cost space and nothing else.
    assert!(
        matches!(check.status.code(), Some(0 | 3)),
        "{text}{}",
        String::from_utf8_lossy(&check.stderr)
    );
    let flat = rig.path("flat.raw").display().to_string();
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &path, &flat]);
    let flat = fs::read(&flat).unwrap();
    for n in 0..=last {
        let line = format!("block-{n}\n");
        let start = &flat[n * 16_384..n * 16_384 + line.len()];
        assert_eq!(
            start,
            line.as_bytes(),
            "block {n} of {last} was told to be durable"
        );
    }
}

/// A second machine must not get an image that is being written.
#[test]
fn an_image_in_use_is_refused_with_its_holder() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let path = rig.path("disk.qcow2").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &path, "16M"]);
    let kind = || DeviceKind::Disk(disk(image(ImageFormat::Qcow2, &path)).into());
    let mut config = machine(Kernel::V6_1, vec![device("virtio-disk0", at(0, 3), kind())]);
    config.start_paused = true;
    config.control = Some(Resource::Path(rig.path("control")));
    let file = rig.write("first.json", serde_json::to_vec(&config).unwrap());
    let mut first = rig
        .command("vireo-vmm")
        .args(["--config", &file])
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while UnixStream::connect(rig.path("control")).is_err() {
        assert!(
            Instant::now() < deadline,
            "the first machine does not answer"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    config.control = None;
    let file = rig.write("second.json", serde_json::to_vec(&config).unwrap());
    // The control socket is bound before the disks are opened: the lock may still be coming.
    let refused = loop {
        let qemu = Command::new("qemu-img")
            .args(["info", &path])
            .output()
            .unwrap();
        if !qemu.status.success() {
            break String::from_utf8_lossy(&qemu.stderr).into_owned();
        }
        assert!(Instant::now() < deadline, "qemu-img does not see the lock");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(refused.contains("lock"), "{refused}");
    let second = rig
        .command("vireo-vmm")
        .args(["--config", &file])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success());
    assert!(said.contains("disk.qcow2 is in use by process"), "{said}");
    assert!(said.contains(&first.id().to_string()), "{said}");
    first.kill().unwrap();
    first.wait().unwrap();
}

/// A frame on the wire after its length, as `NetBackend::Stream` has it.
fn send_frame(wire: &mut UnixStream, frame: &[u8]) {
    let len = u32::try_from(frame.len()).unwrap();
    wire.write_all(&len.to_be_bytes()).unwrap();
    wire.write_all(frame).unwrap();
}

fn next_frame(wire: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    wire.read_exact(&mut len).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(len) as usize];
    wire.read_exact(&mut frame).unwrap();
    frame
}

/// Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()
}

/// Turns a ping around: the answer to an ICMP echo request (RFC 792).
fn pong(request: &[u8]) -> Vec<u8> {
    let mut frame = request.to_vec();
    frame[..6].copy_from_slice(&request[6..12]);
    frame[6..12].copy_from_slice(&request[..6]);
    frame[26..30].copy_from_slice(&request[30..34]);
    frame[30..34].copy_from_slice(&request[26..30]);
    frame[34] = 0;
    frame[36..38].fill(0);
    let sum = checksum(&frame[34..]);
    frame[36..38].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn linux_talks_through_its_network_card_and_gets_entropy() {
    let rig = Rig::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    let net = NetConfig {
        mac,
        backend: NetBackend::Stream(Resource::Fd(theirs.as_raw_fd())),
        mtu: Some(1400),
        link_up: true,
        queue_pairs: 1,
        filter_source_mac: true,
        inbound: Default::default(),
        outbound: Default::default(),
    };
    let rng = RngConfig {
        source: Resource::Path("/dev/urandom".into()),
        max_bytes: 0,
        period_ms: 1000,
    };
    let devices = vec![
        device("net0", at(0, 2), DeviceKind::Net(net)),
        device("rng0", at(0, 3), DeviceKind::Rng(rng)),
    ];
    let mut guest = Guest::boot(&rig, &machine(Kernel::V6_1, devices), &[theirs]);
    assert_eq!(
        guest.run("cat /sys/class/net/eth0/address").ok(),
        "52:54:00:12:34:56\n"
    );
    assert_eq!(guest.run("cat /sys/class/net/eth0/mtu").ok(), "1400\n");

    let mut wire = ours;
    wire.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let answering = std::thread::spawn(move || {
        let mut pings = 0;
        while pings < 3 {
            let frame = next_frame(&mut wire);
            let kind = u16::from_be_bytes([frame[12], frame[13]]);
            match kind {
                // An ARP request (RFC 826) for us.
                0x0806 if frame[20..22] == [0, 1] => {
                    let mut reply = frame.clone();
                    let us = [2, 0, 0, 0, 0, 1];
                    reply[..6].copy_from_slice(&frame[6..12]);
                    reply[6..12].copy_from_slice(&us);
                    reply[21] = 2;
                    reply[22..28].copy_from_slice(&us);
                    reply[28..32].copy_from_slice(&frame[38..42]);
                    reply[32..38].copy_from_slice(&frame[22..28]);
                    reply[38..42].copy_from_slice(&frame[28..32]);
                    send_frame(&mut wire, &reply);
                }
                0x0800 if frame[23] == 1 && frame[34] == 8 => {
                    pings += 1;
                    send_frame(&mut wire, &pong(&frame));
                }
                _ => {}
            }
        }
        // Kept open until the guest is done.
        wire
    });
    guest
        .run("ip addr add 10.9.8.7/24 dev eth0 && ip link set eth0 up")
        .ok();
    let said = guest.run("ping -c 3 -s 1300 10.9.8.1").ok();
    assert!(
        said.contains("3 packets received, 0% packet loss"),
        "{said}"
    );
    let wire = answering.join().unwrap();

    let entropy = guest.run("cat /sys/class/misc/hw_random/rng_current").ok();
    assert!(entropy.starts_with("virtio_rng"), "{entropy}");
    let sums = guest.run(
        "for i in 1 2; do dd if=/dev/hwrng bs=64 count=4 2>/dev/null | sha256sum; done | sort -u | wc -l",
    );
    assert_eq!(sums.ok(), "2\n");
    guest.power_off();
    drop(wire);
}

/// Feeds and starves the watchdog by its registers: Debian's cloud kernels have no driver for it.
#[test]
fn linux_is_reset_by_a_watchdog_that_it_does_not_feed() {
    let rig = Rig::new();
    let watchdog = WatchdogConfig {
        action: WatchdogAction::Reset,
    };
    let devices = vec![device(
        "watchdog0",
        at(0, 4),
        DeviceKind::Watchdog(watchdog),
    )];
    let mut guest = Guest::boot(&rig, &machine(Kernel::V6_1, devices), &[]);
    let device = "/sys/bus/pci/devices/0000:00:04.0";
    let ids = guest.run(&format!(
        "cat {device}/vendor {device}/device {device}/class"
    ));
    assert_eq!(ids.ok(), "0x8086\n0x25ab\n0x088000\n");
    guest
        .run(&format!(
            "echo 1 >{device}/enable; bar=$(cut -d' ' -f1 {device}/resource | head -n 1)"
        ))
        .ok();
    let unlock = "devmem $((bar+12)) 16 0x80; devmem $((bar+12)) 16 0x86";
    // Two stages of half a second each, then half a second more than one stage unfed.
    let start = format!(
        "{unlock}; devmem $bar 32 512; {unlock}; devmem $((bar+4)) 32 512; \
         printf '\\002' | dd of={device}/config bs=1 seek=104 conv=notrunc 2>/dev/null"
    );
    guest.run(&start).ok();
    let feed = format!(
        "for i in 1 2 3 4 5 6; do usleep 300000; {unlock}; devmem $((bar+12)) 16 0x100; done"
    );
    guest.run(&feed).ok();
    assert_eq!(guest.run("echo alive").ok(), "alive\n");
    // Nobody feeds it any more.
    guest.ready();
    let why = format!(
        "echo 1 >{device}/enable; bar=$(cut -d' ' -f1 {device}/resource | head -n 1); devmem $((bar+12)) 16"
    );
    assert_eq!(
        guest.run(&why).ok(),
        "0x0200\n",
        "the guest sees whose reset it was"
    );
    guest.power_off();
}

#[test]
fn linux_has_channels_consoles_and_a_balloon() {
    let rig = Rig::new();
    let (mut agent, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    let log = rig.path("console.log");
    let port = |number, console, name: &str, backend| ConsolePort {
        id: format!("port{number}"),
        number,
        console,
        name: name.into(),
        backend,
        log: None,
    };
    let console = ConsoleConfig {
        ports: vec![
            port(0, true, "", CharBackend::File(Resource::Path(log.clone()))),
            port(
                1,
                false,
                "org.qemu.guest_agent.0",
                CharBackend::Connected(Resource::Fd(theirs.as_raw_fd())),
            ),
            port(5, false, "org.example.null", CharBackend::Null),
        ],
        max_ports: 31,
    };
    let balloon = BalloonConfig {
        stats_period_seconds: 1,
        free_page_reporting: true,
        deflate_on_oom: true,
        target_bytes: 0,
    };
    let devices = vec![
        device("virtio-serial0", at(0, 3), DeviceKind::Console(console)),
        device("balloon0", at(0, 4), DeviceKind::Balloon(balloon)),
    ];
    let mut config = machine(Kernel::V6_1, devices);
    config.control = Some(Resource::Path(rig.path("control")));
    let mut guest = Guest::boot(&rig, &config, &[theirs]);
    let mut control = Control::connect(&rig.path("control"));

    let names = guest.run("cat /sys/class/virtio-ports/*/name | sort");
    assert_eq!(names.ok(), "org.example.null\norg.qemu.guest_agent.0\n");
    // hvc0 is a console.
    guest.run("echo from hvc0 >/dev/hvc0").ok();
    // An agent: what it is asked comes back turned around, more than any buffer holds.
    guest
        .run("exec 3<>/dev/virtio-ports/org.qemu.guest_agent.0; (while read -r l <&3; do echo \"$l\" | rev >&3; done) & true")
        .ok();
    control.event(|e| matches!(e, Event::PortState { id, open: true } if id == "port1"));
    agent
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let line: String = (0..1000).map(|n| format!("{n:04}-")).collect();
    for _ in 0..40 {
        agent.write_all(line.as_bytes()).unwrap();
        agent.write_all(b"\n").unwrap();
        let mut back = vec![0; line.len() + 1];
        agent.read_exact(&mut back).unwrap();
        let expected: String = line.chars().rev().chain(['\n']).collect();
        assert_eq!(String::from_utf8(back).unwrap(), expected);
    }
    // Output to nobody is dropped, and holds nobody up.
    guest
        .run("dd if=/dev/zero of=/dev/virtio-ports/org.example.null bs=64k count=16 2>/dev/null")
        .ok();
    assert_eq!(guest.run("echo alive").ok(), "alive\n");
    assert!(fs::read_to_string(&log).unwrap().contains("from hvc0\r\n"));

    // The balloon: half of the memory goes to the host and comes back.
    let free = |guest: &mut Guest| -> u64 {
        let text = guest.run("grep MemFree /proc/meminfo").ok();
        text.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let before = free(&mut guest);
    assert!(
        control
            .call(Call::SetBalloon {
                target_bytes: 1 << 40
            })
            .is_err()
    );
    control
        .call(Call::SetBalloon {
            target_bytes: 128 << 20,
        })
        .unwrap();
    control.event(
        |e| matches!(e, Event::BalloonChange { actual_bytes } if *actual_bytes == 128 << 20),
    );
    let during = free(&mut guest);
    assert!(before - during > 100 << 10, "{before} then {during}");
    let stats = control.stats().balloon.unwrap();
    assert_eq!(
        (stats.actual_bytes, stats.target_bytes),
        (128 << 20, 128 << 20)
    );
    let deadline = Instant::now() + Duration::from_secs(60);
    let stats = loop {
        let stats = control.stats().balloon.unwrap();
        if stats.updated > 0 {
            break stats;
        }
        assert!(Instant::now() < deadline, "no statistics came");
        std::thread::sleep(Duration::from_millis(50));
    };
    let total = stats.total.unwrap();
    assert!((64 << 20..=256 << 20).contains(&total), "{stats:?}");
    assert!(
        stats.free.unwrap() < total && stats.available.unwrap() < total,
        "{stats:?}"
    );
    control
        .call(Call::SetBalloon {
            target_bytes: 256 << 20,
        })
        .unwrap();
    control.event(
        |e| matches!(e, Event::BalloonChange { actual_bytes } if *actual_bytes == 256 << 20),
    );
    let after = free(&mut guest);
    assert!(after - during > 100 << 10, "{during} then {after}");
    guest.power_off();
}

/// Limits, statistics, a larger disk, a pulled cable, an NMI: changes while the guest runs.
#[test]
fn linux_notices_what_changes_while_it_runs() {
    let rig = Rig::new();
    let raw = rig.write("raw.img", vec![7; 8 << 20]);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    let net = NetConfig {
        mac: [0x52, 0x54, 0, 1, 2, 3],
        backend: NetBackend::Stream(Resource::Fd(theirs.as_raw_fd())),
        mtu: None,
        link_up: false,
        queue_pairs: 1,
        filter_source_mac: false,
        inbound: Default::default(),
        outbound: Default::default(),
    };
    let disk = disk(image(ImageFormat::Raw, &raw));
    let devices = vec![
        device("virtio-disk0", at(0, 3), DeviceKind::Disk(disk.into())),
        device("net0", at(0, 2), DeviceKind::Net(net)),
    ];
    let mut config = machine(Kernel::V6_1, devices);
    config.control = Some(Resource::Path(rig.path("control")));
    let mut guest = Guest::boot(&rig, &config, &[theirs]);
    let mut control = Control::connect(&rig.path("control"));

    guest.run("ip link set eth0 up").ok();
    assert_eq!(guest.run("cat /sys/class/net/eth0/carrier").ok(), "0\n");
    let link = |id: &str, up| Call::SetLink { id: id.into(), up };
    assert!(control.call(link("net7", true)).is_err());
    control.call(link("net0", true)).unwrap();
    let wait = "for i in 1 2 3 4 5 6 7 8 9; do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && echo up && break; sleep 1; done";
    assert_eq!(guest.run(wait).ok(), "up\n");
    assert!(control.stats().nets[0].1.link_up);

    let before = control.stats().disks[0].1;
    guest
        .run("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null bs=1M count=4; dd if=/dev/zero of=/dev/vda bs=64k count=8 conv=fsync")
        .ok();
    let after = control.stats().disks[0].1;
    assert!(after.read_bytes - before.read_bytes >= 4 << 20, "{after:?}");
    assert!(
        after.write_bytes - before.write_bytes >= 512 << 10,
        "{after:?}"
    );
    assert!(after.flush_requests > before.flush_requests, "{after:?}");
    assert!(after.read_ns > before.read_ns && after.write_ns > before.write_ns);
    assert_eq!(after.capacity, 8 << 20);

    // 1 MiB/s: reading two more MiB than the burst allows takes the better part of two seconds.
    let mut limits = DiskLimits::default();
    limits.read_bytes.rate = 1 << 20;
    let id = || "virtio-disk0".to_owned();
    control
        .call(Call::SetDiskLimits {
            id: id(),
            limits,
            group: None,
        })
        .unwrap();
    let timed = "echo 3 >/proc/sys/vm/drop_caches; a=$(cut -d. -f1 /proc/uptime); dd if=/dev/vda of=/dev/null bs=256k count=16 2>/dev/null; b=$(cut -d. -f1 /proc/uptime); echo $((b-a))";
    let seconds: u64 = guest.run(timed).ok().trim().parse().unwrap();
    assert!(seconds >= 2, "4 MiB in {seconds} s");
    let limits = DiskLimits::default();
    control
        .call(Call::SetDiskLimits {
            id: id(),
            limits,
            group: None,
        })
        .unwrap();

    let grow = Call::ResizeDisk {
        id: id(),
        bytes: 16 << 20,
    };
    control.call(grow).unwrap();
    let wait = "for i in 1 2 3 4 5 6 7 8 9; do [ $(cat /sys/block/vda/size) = 32768 ] && echo grown && break; sleep 1; done";
    assert_eq!(guest.run(wait).ok(), "grown\n");
    let odd = Call::ResizeDisk {
        id: id(),
        bytes: 1000,
    };
    assert!(control.call(odd).is_err());

    control.call(Call::Pause).unwrap();
    control.call(Call::Resume).unwrap();
    control.call(Call::Nmi).unwrap();
    let nmi = guest.run("sleep 1; dmesg | grep -c 'NMI received'");
    assert_ne!(nmi.output.trim(), "0");
    guest
        .run("dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null")
        .ok();
    guest.power_off();
    assert_eq!(fs::metadata(&raw).unwrap().len(), 16 << 20);
}

/// The other kernel, two vCPUs with a queue each, and the generation id.
#[test]
fn linux_6_12_has_a_queue_a_vcpu_and_a_generation_id() {
    let rig = Rig::new();
    let raw = rig.write("raw.img", numbered(16384));
    let disk = DiskConfig {
        queues: 0,
        ..disk(image(ImageFormat::Raw, &raw))
    };
    let devices = vec![device(
        "virtio-disk0",
        at(0, 3),
        DeviceKind::Disk(disk.into()),
    )];
    let mut config = machine(Kernel::V6_12, devices);
    config.vcpus = 2;
    config.generation_id = Some("11223344-5566-7788-99aa-bbccddeeff00".into());
    let mut guest = Guest::boot(&rig, &config, &[]);
    assert_eq!(
        guest.run("nproc; ls /sys/block/vda/mq | wc -l").ok(),
        "2\n2\n"
    );
    guest
        .run("for c in 0 1; do taskset -c $c dd if=/dev/vda of=/dev/null bs=4k count=500 skip=$((c*600)) & done 2>/dev/null; wait")
        .ok();
    let queues = guest.run("grep -c 'virtio0-req' /proc/interrupts");
    assert_eq!(queues.ok(), "2\n");
    let sum = guest.run("sha256sum </dev/vda | cut -c1-64").ok();
    let here = Command::new("sha256sum").arg(&raw).output().unwrap();
    assert_eq!(sum.trim(), &String::from_utf8_lossy(&here.stdout)[..64]);
    let driver = guest.run("ls /sys/bus/*/drivers/vmgenid");
    assert!(driver.clone().ok().contains("VIRE0001:00"), "{driver:?}");
    guest.power_off();
}
