//! Hosts of a test's own: namespaces of network and mounts on one switch, each with its own Vireo; and a guest that
//! checks itself and tells the switch's own place of it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::namespace::ip;
use crate::{Kernel, Rig, Run, linux_guest};

/// The switch's own address: a third place, neither of the hosts.
pub const SWITCH: &str = "10.97.0.1";
/// The guest's.
pub const GUEST: &str = "10.97.0.50";
/// The guest's card.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x97, 0, 0x50];

/// Makes the switch in the namespace of this thread (`namespace::enter`).
pub fn switch() {
    ip("link add sw0 type bridge");
    ip(&format!("addr add {SWITCH}/24 dev sw0"));
    ip("link set sw0 up");
}

/// A host on the switch.
#[derive(Debug)]
pub struct Host {
    /// Its Vireo, and its files.
    pub rig: Rig,
    process: Child,
    number: u8,
    images: String,
}

impl Host {
    /// Host `number`, whose folder `images` is its own although all have it at the same path.
    pub fn new(number: u8, images: &str) -> Self {
        let rig = Rig::new();
        let own = rig.path("images");
        fs::create_dir_all(&own).unwrap();
        let own = own.display();
        let setup = format!(
            "mount --make-rprivate / && mount -t sysfs sysfs /sys && mount --bind {own} {images} && \
             echo there && exec sleep 36000"
        );
        let mut command = Command::new("unshare");
        let marked = rig.command("vireod");
        command
            .envs(
                marked
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .args(["--net", "--mount", "sh", "-c", &setup])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut said = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        assert_eq!(said, "there\n", "no namespace for host {number}");
        let host = Self {
            rig,
            process,
            number,
            images: images.to_owned(),
        };
        let (here, pid) = (host.port(), host.process.id());
        ip(&format!(
            "link add {here} type veth peer name eth0 netns {pid}"
        ));
        ip(&format!("link set {here} master sw0"));
        ip(&format!("link set {here} up"));
        for line in [
            "ip link set lo up",
            // An address of its own: otherwise it takes the lowest of its ports', which is the guest's tap's where eth0
            // got a high one. The taps of all hosts have the same.
            &format!("ip link add br0 address 52:54:00:97:01:{number:02x} type bridge"),
            "ip link set eth0 master br0",
            "ip link set eth0 up",
            &format!("ip addr add {}/24 dev br0", host.address()),
            "ip link set br0 up",
        ] {
            host.run(line).ok();
        }
        host
    }

    /// Its device on the switch.
    pub fn port(&self) -> String {
        format!("host{}", self.number)
    }

    /// Its address.
    pub fn address(&self) -> String {
        format!("10.97.0.{}", 10 + self.number)
    }

    /// A program in its namespaces.
    pub fn enter(&self, program: &Command) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.process.id().to_string(), "-n", "-m", "--"])
            .arg(program.get_program())
            .args(program.get_args())
            .stdin(Stdio::null());
        for (name, value) in program.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }

    /// Runs a line of shell there.
    pub fn run(&self, line: &str) -> Run {
        let mut shell = Command::new("sh");
        shell.args(["-c", line]);
        self.enter(&shell).output().unwrap().into()
    }

    /// Starts its daemon with these arguments and waits until it is there.
    pub fn daemon(&self, args: &[&str]) -> Child {
        let log = self.rig.path("daemon.log");
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .unwrap();
        let mut daemon = self.rig.command("vireod");
        daemon.args(args);
        let child = self
            .enter(&daemon)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::os::unix::net::UnixStream::connect(self.rig.socket()).is_err() {
            assert!(Instant::now() < deadline, "host {}: no daemon", self.number);
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }

    /// Where its `images` are seen from outside.
    pub fn image(&self, name: &str) -> std::path::PathBuf {
        self.rig.path("images").join(name)
    }

    /// The folder that it has at the same path as all others.
    pub fn images(&self) -> &str {
        &self.images
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One file of a cpio archive ("newc"), whole and with its end.
fn archive(name: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, mode, content) in [(name, mode, content), ("TRAILER!!!", 0, &[][..])] {
        let fields = [
            1,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(content.len()).unwrap(),
            0,
            0,
            0,
            0,
            u32::try_from(name.len() + 1).unwrap(),
            0,
        ];
        out.extend(b"070701");
        for field in fields {
            out.extend(format!("{field:08X}").into_bytes());
        }
        out.extend(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(content);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// Domain XML of a Linux guest with the checker as `/guard`, on the hosts' bridges, with these disks.
pub fn guarded_guest(rig: &Rig, name: &str, disks: &[&str]) -> String {
    let source = rig.write("guard.c", include_str!("guard.c"));
    let program = rig.path("guard");
    let built = Command::new("gcc")
        .args(["-static", "-O1", "-o"])
        .arg(&program)
        .arg(&source)
        .output();
    Run::from(built.unwrap()).ok();
    let folder = Kernel::V6_1.folder();
    let mut initrd = fs::read(folder.join("initrd.img")).unwrap();
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.extend(archive("guard", 0o100_755, &fs::read(&program).unwrap()));
    let initrd = rig.write("initrd.img", initrd);
    let mut devices = String::new();
    for (disk, letter) in disks.iter().zip('a'..) {
        devices += &format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>\
             <target dev='vd{letter}' bus='virtio'/></disk>"
        );
    }
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    devices += &format!(
        "<interface type='bridge'><mac address='{mac}'/><source bridge='br0'/><model type='virtio'/></interface>"
    );
    let old = format!("{}/initrd.img", folder.display());
    linux_guest(name, Kernel::V6_1)
        .replace(&old, &initrd)
        .replace("<console", &format!("{devices}<console"))
}

/// What the checker has said.
#[derive(Debug, Clone, Default)]
struct Said {
    memory: u64,
    disk: u64,
    number: u64,
    ended: Option<String>,
}

/// The other end of the checker's connection.
#[derive(Debug)]
pub struct Guard {
    said: Arc<Mutex<Said>>,
    port: u16,
}

impl Guard {
    /// Waits for a checker at the switch.
    pub fn listen() -> Self {
        let listener = TcpListener::bind((SWITCH, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let said = Arc::new(Mutex::new(Said::default()));
        let of = Arc::clone(&said);
        std::thread::spawn(move || {
            let end = |why: String| of.lock().unwrap().ended = Some(why);
            let (mut stream, _) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => return end(error.to_string()),
            };
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            loop {
                let line = match lines.next() {
                    Some(Ok(line)) => line,
                    other => return end(format!("the connection ended: {other:?}")),
                };
                let numbers: Vec<u64> = line.split(' ').filter_map(|n| n.parse().ok()).collect();
                let [memory, disk, number] = numbers[..] else {
                    return end(line);
                };
                {
                    let mut said = of.lock().unwrap();
                    (said.memory, said.disk) = (memory, disk);
                    if number != said.number + 1 {
                        said.ended = Some(format!("{number} after {}", said.number));
                        return;
                    }
                    said.number = number;
                }
                if let Err(error) = writeln!(stream, "{number}") {
                    return end(error.to_string());
                }
            }
        });
        Self { said, port }
    }

    /// What is typed in the guest: it is announced by an address of IPv6 only when nobody can have the same any more.
    pub fn command(&self, disks: &str) -> String {
        format!(
            "ip addr add {GUEST}/24 dev eth0; ip link set eth0 up; \
             until ip -6 addr show dev eth0 | grep fe80 | grep -qv tentative; do sleep 0.1; done; \
             /guard {SWITCH} {} {disks} &\r",
            self.port
        )
    }

    /// Memory, disks and the connection go on from where they are now, and nothing has been wrong.
    #[track_caller]
    pub fn goes_on(&self, limit: Duration) {
        let before = self.said.lock().unwrap().clone();
        let deadline = Instant::now() + limit;
        loop {
            let now = self.said.lock().unwrap().clone();
            assert_eq!(now.ended, None, "after {before:?}");
            // Each whole round of memory and of the blocks finds what the one before wrote.
            if now.memory > before.memory + 8
                && now.disk > before.disk + 160
                && now.number > before.number + 5
            {
                return;
            }
            assert!(Instant::now() < deadline, "{before:?}, then only {now:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Frames that come into the switch from a host.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Listens at a device of this namespace.
    pub fn new(device: &str) -> Self {
        const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();
        let name = std::ffi::CString::new(device).unwrap();
        // SAFETY: takes numbers and a string that lives here; the descriptor is this function's own.
        let (fd, index): (RawFd, u32) = unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_PACKET, kind, i32::from(ALL));
            (fd, libc::if_nametoindex(name.as_ptr()))
        };
        assert!(fd >= 0 && index > 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the kernel just gave it to us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let place = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ALL,
            sll_ifindex: i32::try_from(index).unwrap(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // Only the guest's own frames: whatever else passes would fill the socket's buffer.
        let step = |code, on_no, value| libc::sock_filter {
            code,
            jt: 0,
            jf: on_no,
            k: value,
        };
        let [a, b, c, d, e, f] = GUEST_MAC;
        let mut steps = [
            // A word, then a half-word, of the sender's address; all of the frame, or none.
            step(0x20, 0, 6),
            step(0x15, 3, u32::from_be_bytes([a, b, c, d])),
            step(0x28, 0, 10),
            step(0x15, 1, u32::from_be_bytes([0, 0, e, f])),
            step(0x06, 0, u32::MAX),
            step(0x06, 0, 0),
        ];
        let program = libc::sock_fprog {
            len: steps.len() as u16,
            filter: steps.as_mut_ptr(),
        };
        // SAFETY: a program that lives here, and its size.
        let filtered = unsafe {
            let len = size_of_val(&program) as libc::socklen_t;
            let (level, name) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
            libc::setsockopt(
                fd.as_raw_fd(),
                level,
                name,
                (&raw const program).cast(),
                len,
            )
        };
        assert_eq!(filtered, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: an address that lives here, and its size.
        let bound = unsafe {
            let len = size_of_val(&place) as libc::socklen_t;
            libc::bind(fd.as_raw_fd(), (&raw const place).cast(), len)
        };
        assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
        Self(fd)
    }

    /// The next frame that came from the guest's card: its ethertype and what follows.
    fn next(&self) -> Option<(u16, Vec<u8>)> {
        const OUTGOING: u8 = 4;
        loop {
            let mut frame = [0u8; 256];
            // SAFETY: zero bytes are a valid address.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut len = size_of_val(&from) as libc::socklen_t;
            // SAFETY: a buffer and an address that live here, with their sizes.
            let got = unsafe {
                libc::recvfrom(
                    self.0.as_raw_fd(),
                    frame.as_mut_ptr().cast(),
                    frame.len(),
                    0,
                    (&raw mut from).cast(),
                    &raw mut len,
                )
            };
            let got = usize::try_from(got).ok()?;
            if from.sll_pkttype != OUTGOING && got >= 14 && frame[6..12] == GUEST_MAC {
                let kind = u16::from_be_bytes([frame[12], frame[13]]);
                return Some((kind, frame[14..got].to_vec()));
            }
        }
    }

    /// The card says where it is now (RARP), and so does the guest itself, by a gratuitous ARP and, with IPv6, an
    /// unsolicited neighbour advertisement.
    #[track_caller]
    pub fn announced(&self, limit: Duration) {
        const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let deadline = Instant::now() + limit;
        let mut seen = [false; 3];
        loop {
            match self.next() {
                Some((kind, rest)) => {
                    seen[0] |= kind == 0x8035;
                    // Sender and target are the same address.
                    seen[1] |= kind == 0x0806 && rest.len() >= 28 && rest[14..18] == rest[24..28];
                    // RFC 4861: ICMPv6 type 136 to all nodes, without the flag "solicited".
                    seen[2] |= kind == 0x86dd
                        && rest.len() >= 64
                        && rest[6] == 58
                        && rest[24..40] == ALL_NODES
                        && rest[40] == 136
                        && rest[44] & 0x40 == 0;
                    if seen == [true; 3] {
                        return;
                    }
                }
                None => {
                    assert!(
                        Instant::now() < deadline,
                        "seen of RARP, ARP, NDP: {seen:?}"
                    );
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }
}
