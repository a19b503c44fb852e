//! `net-start` and `net-destroy` of a NAT network with DHCP, against virsh and a private libvirtd.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vireo_tests::{Rig, namespace, which};

use super::report;

const NETWORK: &str = "<network><name>NAME</name><forward mode='nat'/>\
    <ip address='192.168.NUMBER.1' netmask='255.255.255.0'><dhcp>\
    <range start='192.168.NUMBER.2' end='192.168.NUMBER.254'/></dhcp></ip></network>";

/// Both, in turn, in one network namespace.
pub fn run(runs: usize) {
    println!("## `net-start` and `net-destroy`, NAT with DHCP");
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
            .virsh(&["net-define", &define("theirs", "202")])
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
            their_start.extend(timed(&mut peer.virsh(&["net-start", "theirs"])));
            their_destroy.extend(timed(&mut peer.virsh(&["net-destroy", "theirs"])));
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
}

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
            let listed = peer.virsh(&["net-list"]).output().ok()?;
            if listed.status.success() {
                return Some(peer);
            }
        }
        println!("(the peer is left out: libvirtd did not come up)");
        None
    }

    fn virsh(&self, args: &[&str]) -> Command {
        let mut command = Command::new("virsh");
        command.args(["-c", "network:///system"]).args(args);
        command
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // Nothing is left to complain to.
        let _ = self.virsh(&["net-destroy", "theirs"]).output();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
