//! `vireo` against a stock libvirtd: what it prints there is what virsh prints.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vireo_tests::{Rig, Run, left_out, which};

/// A libvirtd in folders of its own, with its test driver.
struct Stock {
    rig: Rig,
    daemon: Child,
}

impl Stock {
    /// `None` where there is none, which has been said then.
    fn start() -> Option<Self> {
        if !which("libvirtd") || !which("virsh") {
            left_out("needs libvirtd (libvirt-daemon) and virsh");
            return None;
        }
        let rig = Rig::new();
        let mut command = Command::new("libvirtd");
        for (name, sub) in [
            ("HOME", "home"),
            ("XDG_CONFIG_HOME", "config"),
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_DATA_HOME", "data"),
        ] {
            let folder = rig.path(sub);
            std::fs::create_dir_all(&folder).unwrap();
            command.env(name, &folder);
            // As root it would take the host's own folders.
            let _ = std::os::unix::fs::chown(&folder, Some(65534), Some(65534));
        }
        // SAFETY: geteuid takes nothing.
        if unsafe { libc::geteuid() } == 0 {
            command.uid(65534).gid(65534);
        }
        let daemon = command
            .args(["-t", "600"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stock = Self { rig, daemon };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !stock.socket().exists() {
            assert!(Instant::now() < deadline, "libvirtd does not come up");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(stock)
    }

    fn socket(&self) -> std::path::PathBuf {
        self.rig.path("run/libvirt/libvirt-sock")
    }

    fn uri(&self) -> String {
        format!("test+unix:///default?socket={}", self.socket().display())
    }

    fn vireo(&self, words: &[&str]) -> Run {
        let mut command = self.rig.command("vireo");
        // It must not start a daemon of its own.
        command.env("VIREOD", "/bin/false");
        let done = command.arg("-c").arg(self.uri()).args(words).output();
        done.unwrap().into()
    }

    fn virsh(&self, words: &[&str]) -> Run {
        let mut command = self.rig.stock("virsh");
        let done = command.arg("-c").arg(self.uri()).args(words).output();
        done.unwrap().into()
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[test]
fn a_stock_libvirtd_is_managed() {
    let Some(stock) = Stock::start() else { return };
    let mut wrong = String::new();
    // The test driver forgets everything with its last client: a line is one connection.
    for line in [
        "list --all",
        "list --all --title",
        "list --uuid --name",
        "uri",
        "hostname",
        "nodeinfo",
        "domstate test --reason",
        "dumpxml test",
        "vcpucount test",
        "domblklist test",
        "domiflist test",
        "net-list --all",
        "net-dumpxml default",
        "net-info default",
        "pool-list --all --details",
        "pool-dumpxml default-pool",
        "pool-info default-pool",
        "vol-list default-pool",
        "nodedev-list",
        "secret-list",
        "nwfilter-list",
        "iface-list --all",
        "iface-list --inactive",
        "iface-dumpxml eth1",
        "iface-dumpxml eth1 --inactive --xpath //mac",
        "iface-mac eth1; iface-name aa:bb:cc:dd:ee:ff; iface-mac missing",
        "iface-begin; iface-destroy eth1; iface-list --all; iface-undefine eth1; iface-rollback; iface-list --all",
        "iface-begin; iface-begin",
        "iface-begin; iface-commit; iface-commit",
        "iface-destroy eth1; iface-start eth1; iface-start eth1",
        "snapshot-list test",
        "suspend test; domstate test; resume test; domstate test",
        "shutdown test; domstate test; start test; domstate test",
        "desc test --title --config New; desc test --title --config; list --title",
        "vol-create-as default-pool v.img 1M; vol-list default-pool; vol-info v.img default-pool; vol-delete v.img default-pool",
        "snapshot-create-as test one; snapshot-list test --name; snapshot-delete test one",
        "undefine test; destroy test; list --all",
        "dominfo missing",
        "net-info missing",
        "migrate-getspeed test",
        "setmem test 1M; setmem test 0; setmem test --kilobytes 1024; setmem test 1M --current",
        "shutdown test; setmem test 1M; setmem test 1M --config; domblkstat test vda",
        "event --event lifecycle --timeout 0",
        "net-event --event lifecycle --timeout 0",
        "node-memory-tune",
        "iface-name eth1",
        "domif-getlink test 52:54:00:00:00:ff",
        "domiftune test aa:bb:cc:dd:ee:ff --inbound x",
        "domiftune test aa:bb:cc:dd:ee:ff --inbound ,5",
        "domiftune test aa:bb:cc:dd:ee:ff --inbound 1,2,3,4,5",
        "domiftune test aa:bb:cc:dd:ee:ff --outbound 1,2,3,4",
        "attach-disk",
        "attach-disk test /x vdz --shareable --print-xml",
        "change-media test vda --eject",
        "change-media test vda --insert",
        "change-media test vda",
        "secret-set-value 06df9427-4b0f-4db9-830c-95aadc4a9064",
        "metadata test http://a.b/c",
        "checkpoint-list test; checkpoint-create-as test a text; checkpoint-create-as test b; checkpoint-create-as test b; \
         checkpoint-list test --name; checkpoint-list test --tree; checkpoint-list test --roots --name; \
         checkpoint-list test --leaves --name; checkpoint-list test --no-leaves --name; \
         checkpoint-list test --from a --name; checkpoint-list test a --tree; checkpoint-info test b; \
         checkpoint-info test none; checkpoint-parent test b; checkpoint-parent test a; \
         checkpoint-dumpxml test a --xpath //disks; checkpoint-delete test b --children-only; \
         checkpoint-delete test b --metadata; checkpoint-delete test a --children; checkpoint-list test",
        "checkpoint-delete test; checkpoint-edit test; checkpoint-list test --descendants; \
         checkpoint-list test --roots --parent; checkpoint-create test /nonexistent",
        "checkpoint-create-as test q --print-xml --diskspec vda,checkpoint=bitmap,bitmap=x --diskspec vdb,checkpoint=no",
        "checkpoint-create-as test q --diskspec vda,colour=red",
        "backup-begin test; backup-dumpxml test; migrate-compcache test",
        "blockcopy test vda; blockcopy test vda /x --xml /y; blockcopy test vda /x --pivot --finish",
        "blockcopy test vda /x --format qcow2 --print-xml",
        "blockcopy test vda /x --blockdev --print-xml",
    ] {
        let run = |run: &dyn Fn(&[&str]) -> Run| {
            let words: Vec<&str> = if line.contains(';') {
                vec![line]
            } else {
                line.split(' ').collect()
            };
            run(&words)
        };
        let (ours, theirs) = (run(&|w| stock.vireo(w)), run(&|w| stock.virsh(w)));
        if ours != theirs {
            wrong += &format!("{line}\n  vireo: {ours:?}\n  virsh: {theirs:?}\n");
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    // Events come from there too.
    let heard = stock.vireo(&[
        "event test --event lifecycle --timeout 1; suspend test; resume test; domid test",
    ]);
    assert!(heard.out.contains("event loop timed out"), "{heard:?}");
}
