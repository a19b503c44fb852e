//! `net-start` and `net-destroy` of a NAT network with DHCP, and a pool of many volumes, against
//! virsh and a private libvirtd.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vireo_tests::{Rig, namespace, which};

use super::report;

const NETWORK: &str = "<network><name>NAME</name><forward mode='nat'/>\
    <ip address='192.168.NUMBER.1' netmask='255.255.255.0'><dhcp>\
    <range start='192.168.NUMBER.2' end='192.168.NUMBER.254'/></dhcp></ip></network>";

/// Volumes of the pool; one in ten is qcow2.
const VOLUMES: usize = 10_000;

/// Both, in turn, in one network namespace.
pub fn run(runs: usize) {
    println!("## `net-start` and `net-destroy`, NAT with DHCP; a pool of {VOLUMES} volumes");
    // Its namespaces are for this thread and what it starts.
    let done = std::thread::spawn(move || match namespace::enter() {
        Ok(()) => measure(runs),
        Err(needs) => println!("(left out: {needs})"),
    });
    if done.join().is_err() {
        println!("(it failed)");
    }
    println!();
}

fn measure(runs: usize) {
    let rig = Rig::new();
    let define = |name: &str, number: &str| {
        let xml = NETWORK.replace("NAME", name).replace("NUMBER", number);
        rig.write(&format!("{name}.xml"), xml)
    };
    rig.vireo(&["net-define", &define("ours", "201")]).ok();
    let peer = Libvirt::start(&rig);
    if let Some(peer) = &peer {
        let defined = peer
            .virsh(NETWORKS, &["net-define", &define("theirs", "202")])
            .status();
        if !defined.is_ok_and(|status| status.success()) {
            println!("(the peer does not define its network)");
        }
    }
    let timed = |command: &mut Command| {
        let began = Instant::now();
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        status
            .is_ok_and(|s| s.success())
            .then(|| began.elapsed().as_secs_f64())
    };
    let (mut start, mut destroy) = (Vec::new(), Vec::new());
    let (mut their_start, mut their_destroy) = (Vec::new(), Vec::new());
    for _ in 0..runs * 2 {
        start.extend(timed(rig.command("vireo").args(["net-start", "ours"])));
        destroy.extend(timed(rig.command("vireo").args(["net-destroy", "ours"])));
        if let Some(peer) = &peer {
            their_start.extend(timed(&mut peer.virsh(NETWORKS, &["net-start", "theirs"])));
            their_destroy.extend(timed(&mut peer.virsh(NETWORKS, &["net-destroy", "theirs"])));
        }
    }
    report(
        "net-start",
        "ms",
        1e3,
        start,
        "virsh + libvirtd",
        their_start,
    );
    report(
        "net-destroy",
        "ms",
        1e3,
        destroy,
        "virsh + libvirtd",
        their_destroy,
    );
    if let Err(why) = volumes(&rig, peer.as_ref(), runs, &timed) {
        println!("(no pool of volumes: {why})");
    }
}

/// One folder that is a pool of both.
fn volumes(
    rig: &Rig,
    peer: Option<&Libvirt>,
    runs: usize,
    timed: &impl Fn(&mut Command) -> Option<f64>,
) -> std::io::Result<()> {
    let folder = rig.path("volumes");
    std::fs::create_dir(&folder)?;
    let image = rig.path("image.qcow2").display().to_string();
    rig.vireo(&["image", "create", "-q", "-f", "qcow2", &image, "1G"])
        .ok();
    let header = std::fs::read(&image)?;
    for n in 0..VOLUMES {
        if n % 10 == 0 {
            std::fs::write(folder.join(format!("volume{n}.qcow2")), &header)?;
        } else {
            std::fs::File::create(folder.join(format!("volume{n}.img")))?.set_len(1 << 20)?;
        }
    }
    let folder = folder.display().to_string();
    let define = ["pool-define-as", "many", "dir", "--target", &folder];
    rig.vireo(&define).ok();
    rig.vireo(&["pool-start", "many"]).ok();
    let peer = peer.filter(|peer| {
        let ok = |args: &[&str]| peer.virsh(POOLS, args).status().is_ok_and(|s| s.success());
        ok(&define) && ok(&["pool-start", "many"])
    });
    for line in [
        &["pool-refresh", "many"][..],
        &["vol-list", "many"],
        &["vol-list", "many", "--details"],
    ] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            ours.extend(timed(rig.command("vireo").args(line)));
            if let Some(peer) = peer {
                theirs.extend(timed(&mut peer.virsh(POOLS, line)));
            }
        }
        let name = line.join(" ");
        report(&name, "ms", 1e3, ours, "virsh + libvirtd", theirs);
    }
    if let Some(peer) = peer {
        let _ = peer.virsh(POOLS, &["pool-destroy", "many"]).output();
    }
    Ok(())
}

/// What of libvirtd a command is for.
const NETWORKS: &str = "network:///system";
const POOLS: &str = "storage:///system";

/// A libvirtd as root whose folders are the rig's.
struct Libvirt {
    daemon: Child,
}

impl Libvirt {
    fn start(rig: &Rig) -> Option<Self> {
        if !which("libvirtd") && !std::path::Path::new("/usr/sbin/libvirtd").exists() {
            println!("(the peer is left out: needs libvirtd)");
            return None;
        }
        let folder = rig.path("libvirt").display().to_string();
        // Its QEMU driver wants a user of its own, which only a host with all of libvirt has.
        let script = format!(
            "set -e; for d in etc lib run cache; do mkdir -p {folder}/$d; done
             mkdir -p /etc/libvirt /var/lib/libvirt /run/libvirt /var/cache/libvirt
             mount --bind {folder}/etc /etc/libvirt; mount --bind {folder}/lib /var/lib/libvirt
             mount --bind {folder}/run /run/libvirt; mount --bind {folder}/cache /var/cache/libvirt
             for f in passwd group; do cp /etc/$f {folder}/$f; done
             id libvirt-qemu >/dev/null 2>&1 || echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin' >>{folder}/passwd
             getent group libvirt-qemu >/dev/null || echo 'libvirt-qemu:x:64055:' >>{folder}/group
             getent group kvm >/dev/null || echo 'kvm:x:64056:' >>{folder}/group
             mount --bind {folder}/passwd /etc/passwd; mount --bind {folder}/group /etc/group
             printf 'auth_unix_rw=\"none\"\\nauth_unix_ro=\"none\"\\n' >/etc/libvirt/libvirtd.conf
             exec libvirtd -f /etc/libvirt/libvirtd.conf"
        );
        let daemon = Command::new("sh")
            .args(["-c", &script])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let peer = Self { daemon };
        for _ in 0..200 {
            std::thread::sleep(Duration::from_millis(100));
            let listed = peer.virsh(NETWORKS, &["net-list"]).output().ok()?;
            if listed.status.success() {
                return Some(peer);
            }
        }
        println!("(the peer is left out: libvirtd did not come up)");
        None
    }

    fn virsh(&self, uri: &str, args: &[&str]) -> Command {
        let mut command = Command::new("virsh");
        command.args(["-c", uri]).args(args);
        command
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // Nothing is left to complain to.
        let _ = self.virsh(NETWORKS, &["net-destroy", "theirs"]).output();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
