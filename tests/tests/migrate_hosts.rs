//! Live migration between two hosts (namespaces of network and mounts, each with its own daemon), seen from a third
//! place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vireo_tests::certificates::certificates;
use vireo_tests::hosts::{Guard, Host, Tap, guarded_guest, switch};
use vireo_tests::namespace::{self, ip};
use vireo_tests::{Kernel, Rig, Terminal, left_out, soak, tiny_guest, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(60);

/// A namespace with a switch; false after saying what is missing.
fn prepared() -> bool {
    for program in ["nsenter", "unshare", "virsh", "gcc"] {
        if !which(program) {
            left_out(&format!("needs {program}"));
            return false;
        }
    }
    if let Err(needs) = namespace::enter() {
        left_out(&needs);
        return false;
    }
    switch();
    true
}

/// A folder that is another one on each host, gone with the test.
struct Images(PathBuf);

impl Images {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vireo-images-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn host(&self, number: u8) -> Host {
        Host::new(number, &self.0.display().to_string())
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// A pool of the folder that is the host's own.
fn pool(host: &Host) {
    let xml = format!(
        "<pool type='dir'><name>images</name><target><path>{}</path></target></pool>",
        host.images()
    );
    let file = host.rig.write("pool.xml", xml);
    host.rig.vireo(&["pool-create", &file]).ok();
}

fn secure(host: &Host, pki: &Path) {
    let pki = pki.display();
    let conf = format!(
        "listen_tls = 1\nlisten_tcp = 1\nauth_tcp = \"none\"\nlisten_addr = \"{}\"\n\
         ca_file = \"{pki}/cacert.pem\"\ncert_file = \"{pki}/servercert.pem\"\n\
         key_file = \"{pki}/serverkey.pem\"\nmigrate_tls_x509_cert_dir = \"{pki}\"\n",
        host.address()
    );
    host.rig.write("etc/vireo/vireod.conf", conf);
}

fn running_here_only(here: &Host, there: &Host, name: &str) {
    let state = here.rig.state(name);
    assert!(state.starts_with("running"), "{state}");
    let list = there.rig.vireo(&["list", "--name"]).ok();
    assert!(!list.lines().any(|line| line == name), "{list}");
    // The process is reaped a moment after the list is right.
    let vmms = || [here, there].map(|host| host.rig.processes("vireo-vmm").len());
    let began = Instant::now();
    while vmms() != [1, 0] {
        assert!(began.elapsed() < SOON, "{:?}", vmms());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_guest_under_guard_moves_between_two_hosts_and_a_third_place_sees_it_work_on() {
    if !prepared() {
        return;
    }
    if !Kernel::V6_1.is_there() {
        return left_out("needs a guest's kernel (make test)");
    }
    let images = Images::new();
    let hosts = [images.host(1), images.host(2)];
    let common = Rig::new();
    let pki = common.path("pki");
    certificates(&pki, &["10.97.0.11", "10.97.0.12"]);
    let _daemons: Vec<Child> = hosts
        .iter()
        .map(|host| {
            secure(host, &pki);
            host.daemon(&[])
        })
        .collect();
    hosts.iter().for_each(pool);
    let shared = common.write("shared.img", vec![0; 1 << 20]);
    // Two disks: one that both hosts have, one that each has for itself.
    fs::write(hosts[0].image("own.img"), vec![0; 3 << 20]).unwrap();
    let xml = guarded_guest(&common, "deb", &[&shared, &images.path("own.img")]);
    hosts[0].rig.define(&xml);
    let mut start = hosts[0].rig.command("vireo");
    let mut terminal = Terminal::start(start.args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    let guard = Guard::listen();
    terminal.send(&guard.command("/dev/vda /dev/vdb"));
    guard.goes_on(SOON);
    terminal.send("\x1d");
    terminal.wait(SOON);
    let pkipath = pki.display();
    let ways = [
        (false, "vireo", vec!["--migrateuri", "tcp://ADDRESS"]),
        (
            true,
            "qemu+tcp://ADDRESS/system",
            vec!["--parallel", "--parallel-connections", "3"],
        ),
        (
            false,
            "virsh",
            vec!["--compressed", "--comp-methods", "zstd"],
        ),
        (
            true,
            "qemu+tls://ADDRESS/system?pkipath=PKI",
            vec!["--tls", "--auto-converge"],
        ),
    ];
    let rounds = if soak() { 30 } else { ways.len() };
    let mut sides = [&hosts[0], &hosts[1]];
    for round in 0..rounds {
        let [from, to] = sides;
        let (direct, how, options) = &ways[round % ways.len()];
        let fill = |text: &str| {
            text.replace("ADDRESS", &to.address())
                .replace("PKI", &pkipath.to_string())
        };
        let target = if *direct { fill(how) } else { to.rig.uri() };
        let place = format!("tcp://{}", to.address());
        let mut args = vec!["migrate", "--live", "--unsafe", "deb", &target];
        args.extend(["--copy-storage-all", "--migrate-disks", "vdb"]);
        if *direct {
            args.push("--p2p");
        }
        let options: Vec<String> = options.iter().map(|option| fill(option)).collect();
        args.extend(options.iter().map(String::as_str));
        if !options.iter().any(|option| option == "--migrateuri") {
            args.extend(["--migrateuri", &place]);
        }
        let tap = Tap::new(&to.port());
        let moved = match *how {
            "virsh" => from.rig.virsh(&args),
            _ => from.rig.vireo(&args),
        };
        moved.ok();
        tap.announced(SOON);
        running_here_only(to, from, "deb");
        guard.goes_on(SOON);
        let done = to.rig.vireo(&["domjobinfo", "deb", "--completed"]).ok();
        assert!(done.contains("File total:       3.000 MiB"), "{done}");
        sides = [to, from];
    }
    // The volume was made where it was missing.
    assert_eq!(
        fs::metadata(hosts[1].image("own.img")).unwrap().len(),
        3 << 20
    );
    let [here, _] = sides;
    here.rig.vireo(&["destroy", "deb"]).ok();
}

/// A tiny guest with more memory in use than moves in a moment, and a disk of the host's own.
fn busy_guest(host: &Host, name: &str, disk: Option<&str>) {
    let mut state = 1u64;
    let noise: Vec<u8> = (0..(8 << 20) / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    let initrd = host.rig.write("noise", noise);
    let mut xml = tiny_guest(&host.rig, name, "qemu")
        .replace("</kernel>", &format!("</kernel><initrd>{initrd}</initrd>"))
        .replace("<memory unit='MiB'>16<", "<memory unit='MiB'>48<");
    if let Some(path) = disk {
        let disk = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/>\
             <target dev='vda' bus='virtio'/></disk><console"
        );
        let disk = match path.ends_with(".qcow2") {
            true => disk.replace("type='raw'", "type='qcow2'"),
            false => disk,
        };
        xml = xml.replace("<console", &disk);
    }
    host.rig.define(&xml);
    host.rig.vireo(&["start", name]).ok();
    answers(host, name);
}

/// It echoes what is typed.
fn answers(host: &Host, name: &str) {
    let mut terminal = Terminal::start(host.rig.command("vireo").args(["console", name]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("xyz");
    terminal.expect("xyz", SOON);
    terminal.send("\x1d");
    terminal.wait(SOON);
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + 2 * SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_line_that_goes_dead_is_waited_for_only_so_long() {
    if !prepared() {
        return;
    }
    let images = Images::new();
    let (one, other) = (images.host(1), images.host(2));
    let _daemons = [one.daemon(&[]), other.daemon(&[])];
    busy_guest(&one, "tiny", None);
    one.rig.vireo(&["migrate-setspeed", "tiny", "1"]).ok();
    let place = format!("tcp://{}", other.address());
    let mut moving = one.rig.command("vireo");
    moving
        .args([
            "migrate",
            "--live",
            "tiny",
            &other.rig.uri(),
            "--migrateuri",
            &place,
        ])
        .stderr(Stdio::piped());
    let moving = moving.spawn().unwrap();
    eventually("it moves", || {
        let info = one.rig.vireo(&["domjobinfo", "tiny"]).ok();
        info.contains("Outgoing migration") && !other.rig.processes("vireo-vmm").is_empty()
    });
    ip(&format!("link set {} down", other.port()));
    let output = moving.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(said.contains("nothing moved for 30 s"), "{said}");
    eventually("the target gives up", || {
        other.rig.processes("vireo-vmm").is_empty()
    });
    running_here_only(&one, &other, "tiny");
    answers(&one, "tiny");
    let last = one.rig.vireo(&["domjobinfo", "tiny", "--completed"]).ok();
    assert!(last.contains("Failed"), "{last}");
    // Its ports are free again, and it can still go.
    ip(&format!("link set {} up", other.port()));
    one.rig.vireo(&["migrate-setspeed", "tiny", "0"]).ok();
    let args = [
        "migrate",
        "--live",
        "tiny",
        &other.rig.uri(),
        "--migrateuri",
        &place,
    ];
    one.rig.vireo(&args).ok();
    running_here_only(&other, &one, "tiny");
    answers(&other, "tiny");
}

#[test]
fn a_full_target_leaves_the_guest_where_it_is() {
    if !prepared() {
        return;
    }
    let images = Images::new();
    let (one, other) = (images.host(1), images.host(2));
    let _daemons = [one.daemon(&[]), other.daemon(&[])];
    let small = format!("mount -t tmpfs -o size=4m none {}", images.0.display());
    other.run(&small).ok();
    pool(&other);
    // More than has room there.
    let content: Vec<u8> = (0..8u32 << 20).map(|n| (n % 251) as u8).collect();
    fs::write(one.image("own.img"), &content).unwrap();
    busy_guest(&one, "tiny", Some(&images.path("own.img")));
    let place = format!("tcp://{}", other.address());
    let uri = other.rig.uri();
    let args = |how: &'static str| {
        [
            "migrate",
            "--live",
            "tiny",
            &uri,
            "--migrateuri",
            &place,
            how,
        ]
        .map(str::to_owned)
    };
    let run = |how| {
        let args = args(how);
        one.rig
            .vireo(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let said = run("--copy-storage-all").fails();
    assert!(said.contains("No space left on device"), "{said}");
    running_here_only(&one, &other, "tiny");
    answers(&one, "tiny");
    // What was made for it is gone again.
    let left = other.run(&format!("ls {}", images.0.display())).ok();
    assert_eq!(left, "");
    // Only what an image holds itself, of something that is not there.
    let said = run("--copy-storage-inc").fails();
    assert!(said.contains("incremental storage migration"), "{said}");
    // Without its disk it may not go: each host has another file there.
    let said = run("--verbose").fails();
    assert!(
        said.contains("Migration may lead to data corruption"),
        "{said}"
    );
    running_here_only(&one, &other, "tiny");
    // With room it goes.
    other.run(&format!("umount {}", images.0.display())).ok();
    run("--copy-storage-all").ok();
    running_here_only(&other, &one, "tiny");
    answers(&other, "tiny");
    assert!(fs::read(other.image("own.img")).unwrap() == content);
}

#[test]
fn all_of_a_chain_becomes_one_image_there() {
    if !prepared() {
        return;
    }
    let images = Images::new();
    let (one, other) = (images.host(1), images.host(2));
    let _daemons = [one.daemon(&[]), other.daemon(&[])];
    pool(&other);
    let content: Vec<u8> = (0..2u32 << 20).map(|n| (n % 251) as u8).collect();
    fs::write(one.image("base.img"), &content).unwrap();
    let top = images.path("top.qcow2");
    let tool = |host: &Host, words: &str| {
        let vireo = host.rig.command("vireo");
        let program = vireo.get_program().to_string_lossy().into_owned();
        host.run(&format!("{program} image {words}")).ok()
    };
    let base = images.path("base.img");
    tool(&one, &format!("create -q -f qcow2 -b {base} -F raw {top}"));
    busy_guest(&one, "tiny", Some(&top));
    let place = format!("tcp://{}", other.address());
    let uri = other.rig.uri();
    one.rig
        .vireo(&[
            "migrate",
            "--live",
            "--copy-storage-all",
            "tiny",
            &uri,
            "--migrateuri",
            &place,
        ])
        .ok();
    running_here_only(&other, &one, "tiny");
    answers(&other, "tiny");
    let xml = other.rig.vireo(&["dumpxml", "tiny"]).ok();
    assert!(!xml.contains("base.img"), "{xml}");
    other.rig.vireo(&["destroy", "tiny"]).ok();
    let info = tool(&other, &format!("info {top}"));
    assert!(!info.contains("backing file"), "{info}");
    let raw = images.path("raw");
    tool(&other, &format!("convert -O raw {top} {raw}"));
    assert!(fs::read(other.image("raw")).unwrap() == content);
}
