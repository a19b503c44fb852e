//! Pools: their life, what is refused, file systems, a pool that hangs.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use vireo_tests::{Rig, Run, left_out};

use super::{both, both_refuse, is_root, missing, pool, program, steady};

#[test]
fn a_pools_life() {
    if missing(&["virsh"]) {
        return;
    }
    let rig = Rig::new();
    let target = rig.path("p").display().to_string();
    let defined = rig.vireo(&["pool-define-as", "p", "dir", "--target", &target]);
    assert_eq!(defined.ok(), "Pool p defined\n\n");
    // Durable by now; its file follows.
    let deadline = Instant::now() + Duration::from_secs(30);
    while !rig.path("etc/vireo/storage/p.xml").exists() {
        assert!(Instant::now() < deadline, "no file of the pool");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(
        both_refuse(&rig, &["pool-start", "p"]),
        format!(
            "error: Failed to start pool p\nerror: cannot open directory '{target}': No such file or directory\n"
        )
    );
    both(&rig, &["pool-build", "p"]);
    let mode = fs::metadata(&target).unwrap().mode();
    assert_eq!(mode & 0o777, 0o711);
    rig.virsh(&["pool-start", "p"]).ok();
    assert!(both_refuse(&rig, &["pool-start", "p"]).contains("storage pool 'p' is already active"));
    both(&rig, &["pool-autostart", "p"]);
    assert_eq!(
        both(&rig, &["pool-list", "--all"]),
        " Name   State    Autostart\n----------------------------\n p      active   yes\n\n"
    );
    both(&rig, &["pool-list", "--details"]);
    both(&rig, &["pool-list", "--all", "--name"]);
    both(&rig, &["pool-list", "--type", "dir", "--uuid"]);
    both(&rig, &["pool-info", "p"]);
    both(&rig, &["pool-info", "p", "--bytes"]);
    let xml = both(&rig, &["pool-dumpxml", "p"]);
    assert_eq!(
        steady(&xml),
        format!(
            "<pool type='dir'>
  <name>p</name>
  <source>
  </source>
  <target>
    <path>{target}</path>
    <permissions>
      <mode>0711</mode>
      <owner>{}</owner>
      <group>{}</group>
    </permissions>
  </target>
</pool>

",
            fs::metadata(&target).unwrap().uid(),
            fs::metadata(&target).unwrap().gid(),
        )
    );
    both(&rig, &["pool-dumpxml", "p", "--inactive"]);
    let uuid = both(&rig, &["pool-uuid", "p"]);
    assert_eq!(both(&rig, &["pool-name", uuid.trim()]), "p\n\n");
    both(&rig, &["pool-refresh", "p"]);
    both(&rig, &["pool-capabilities"]);
    for word in ["pool-delete", "pool-undefine"] {
        assert!(both_refuse(&rig, &[word, "p"]).contains("storage pool 'p' is still active"));
    }
    fs::write(rig.path("p/v"), "x").unwrap();
    rig.virsh(&["pool-destroy", "p"]).ok();
    assert!(both_refuse(&rig, &["pool-destroy", "p"]).contains("'p' is not active"));
    assert!(both_refuse(&rig, &["vol-list", "p"]).contains("'p' is not active"));
    assert!(both_refuse(&rig, &["pool-delete", "p"]).contains("Directory not empty"));
    fs::remove_file(rig.path("p/v")).unwrap();
    rig.virsh(&["pool-delete", "p"]).ok();
    assert!(!Path::new(&target).exists());
    rig.vireo(&["pool-undefine", "p"]).ok();
    assert!(!rig.path("etc/vireo/storage/p.xml").exists());
    assert!(
        both_refuse(&rig, &["pool-info", "p"]).contains("no storage pool with matching name 'p'")
    );
}

#[test]
fn bad_pools_are_refused_in_libvirts_words() {
    if missing(&["virsh"]) {
        return;
    }
    let (rig, folder) = pool();
    let folder = folder.display().to_string();
    let other = rig.path("other").display().to_string();
    let as_ = |name: &str, kind: &str, more: &[&str]| {
        let mut args = vec!["pool-define-as", name, kind];
        args.extend(more);
        both_refuse(&rig, &args)
    };
    assert!(as_("x", "bogus", &[]).contains("Invalid value for attribute 'type'"));
    for kind in [
        "logical", "disk", "iscsi", "rbd", "zfs", "gluster", "scsi", "mpath",
    ] {
        let said = as_("x", kind, &["--target", &other]);
        assert!(said.contains(&format!("({kind})")), "{said}");
    }
    assert!(as_("y", "dir", &[]).contains("missing storage pool target path"));
    assert!(as_("y/z", "dir", &["--target", &other]).contains("cannot contain '/'"));
    assert!(as_("y", "dir", &["--target", "foo"]).contains("not absolute"));
    assert!(as_("p", "dir", &["--target", &other]).contains("pool 'p' already exists with uuid"));
    assert!(as_("q", "dir", &["--target", &folder]).contains("conflict with pool: 'p'"));
    assert!(as_("n", "netfs", &["--target", &other]).contains("source host name"));
    assert!(as_("f", "fs", &["--target", &other]).contains("source device name"));
    assert!(!rig.path("etc/vireo/storage/y.xml").exists());
    let strict = rig.write(
        "bad.xml",
        format!(
            "<pool type='dir'><name>b</name><bogus/><target><path>{other}</path></target></pool>"
        ),
    );
    assert!(both_refuse(&rig, &["pool-define", &strict, "--validate"]).contains("bogus"));
    assert!(both_refuse(&rig, &["pool-autostart", "p"]).contains("pool has no config file"));
    assert!(
        both_refuse(&rig, &["find-storage-pool-sources", "dir"])
            .contains("does not support source discovery")
    );
    assert!(
        both_refuse(&rig, &["find-storage-pool-sources", "netfs"])
            .contains("hostname must be specified")
    );
    // A transient pool that can't start leaves nothing.
    let gone = rig.vireo(&["pool-create-as", "t", "dir", "--target", "/nonexistent/x"]);
    assert!(gone.fails().contains("cannot open directory"));
    assert!(rig.vireo(&["pool-info", "t"]).fails().contains("not found"));
}

#[test]
fn pools_survive_the_daemon() {
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    for (name, words) in [("kept", "pool-define-as"), ("transient", "pool-create-as")] {
        let target = rig.path(name).display().to_string();
        fs::create_dir(&target).unwrap();
        rig.vireo(&[words, name, "dir", "--target", &target]).ok();
    }
    rig.vireo(&["pool-start", "kept"]).ok();
    rig.vireo(&["pool-autostart", "kept"]).ok();
    rig.vireo(&["vol-create-as", "kept", "v", "1M"]).ok();
    let before = rig.vireo(&["pool-list", "--all"]).ok();
    // SAFETY: kill(2) has no memory effects; the process is this test's child.
    unsafe { libc::kill(daemon.id() as i32, libc::SIGKILL) };
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    assert_eq!(rig.vireo(&["pool-list", "--all"]).ok(), before);
    let listed = rig.vireo(&["vol-list", "kept"]).ok();
    assert!(listed.contains(" v "), "{listed}");
    // One whose folder has gone meanwhile is not active any more.
    fs::remove_dir(rig.path("transient")).unwrap();
    // SAFETY: as above.
    unsafe { libc::kill(daemon.id() as i32, libc::SIGKILL) };
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    let deadline = Instant::now() + Duration::from_secs(30);
    while rig
        .vireo(&["pool-list", "--all", "--name"])
        .ok()
        .contains("transient")
    {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    // After the host's boot nothing is active but what starts with it.
    // SAFETY: as above.
    unsafe { libc::kill(daemon.id() as i32, libc::SIGKILL) };
    daemon.wait().unwrap();
    fs::remove_dir_all(rig.path("run")).unwrap();
    let mut daemon = rig.daemon();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !rig.vireo(&["pool-list", "--name"]).ok().contains("kept") {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

/// A file system whose server never answers; gone when it is dropped.
struct Silent {
    path: CString,
    _server: File,
}

impl Silent {
    fn mount(path: &Path) -> Option<Self> {
        let server = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .ok()?;
        let path = CString::new(path.to_str()?).ok()?;
        let options = CString::new(format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        ))
        .ok()?;
        // SAFETY: all strings are terminated and live here.
        let mounted = unsafe {
            libc::mount(
                c"vireo-test".as_ptr(),
                path.as_ptr(),
                c"fuse".as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        (mounted == 0).then_some(Self {
            path,
            _server: server,
        })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        // SAFETY: the string is terminated and lives here.
        unsafe { libc::umount2(self.path.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn a_pool_that_hangs_holds_up_nobody_else() {
    if !is_root() {
        return left_out("needs root and /dev/fuse");
    }
    let (rig, folder) = pool();
    let hanging = rig.path("hanging");
    fs::create_dir(&hanging).unwrap();
    fs::write(hanging.join("v"), "x").unwrap();
    let target = hanging.display().to_string();
    rig.vireo(&["pool-define-as", "h", "dir", "--target", &target])
        .ok();
    rig.vireo(&["pool-start", "h"]).ok();
    rig.vireo(&["vol-list", "h"]).ok();
    let Some(silent) = Silent::mount(&hanging) else {
        return left_out("needs root and /dev/fuse");
    };
    let mut waiting: Vec<_> = (0..12)
        .map(|n| {
            let args: &[&str] = match n % 3 {
                0 => &["pool-refresh", "h"],
                1 => &["vol-info", "v", "h"],
                _ => &["vol-create-as", "h", "new", "1M"],
            };
            rig.command("vireo").args(args).spawn().unwrap()
        })
        .collect();
    // Long enough for all of them to have arrived there.
    std::thread::sleep(Duration::from_millis(500));
    assert!(
        waiting.iter_mut().any(|c| c.try_wait().unwrap().is_none()),
        "it does hang"
    );
    rig.vireo(&["vol-create-as", "p", "v", "1M"]).ok();
    rig.vireo(&["vol-info", "v", "p"]).ok();
    rig.vireo(&["pool-refresh", "p"]).ok();
    assert!(folder.join("v").exists());
    let listed = rig.vireo(&["pool-list", "--all", "--details"]).ok();
    assert!(listed.contains(" h "), "{listed}");
    rig.vireo(&["vol-list", "h"]).ok();
    rig.vireo(&["pool-dumpxml", "h"]).ok();
    rig.vireo(&["vol-path", &format!("{}/v", folder.display())])
        .ok();
    rig.vireo(&["list", "--all"]).ok();
    drop(silent);
    for mut client in waiting {
        client.wait().unwrap();
    }
}

#[test]
fn what_happens_to_pools_is_told() {
    let rig = Rig::new();
    rig.vireo(&["pool-list"]).ok();
    let log = rig.path("events");
    let mut listener = rig
        .command("vireo")
        .args(["pool-event", "--loop", "--event", "lifecycle"])
        .stdout(File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let heard = || fs::read_to_string(&log).unwrap();
    let target = rig.path("p").display().to_string();
    let deadline = Instant::now() + Duration::from_secs(30);
    // Until it listens.
    while heard().is_empty() {
        assert!(Instant::now() < deadline);
        rig.vireo(&["pool-define-as", "first", "dir", "--target", "/nonexistent"])
            .ok();
        rig.vireo(&["pool-undefine", "first"]).ok();
    }
    rig.vireo(&["pool-define-as", "p", "dir", "--target", &target])
        .ok();
    for word in [
        "pool-build",
        "pool-start",
        "pool-destroy",
        "pool-delete",
        "pool-undefine",
    ] {
        rig.vireo(&[word, "p"]).ok();
    }
    let words = [
        "Defined",
        "Created",
        "Started",
        "Stopped",
        "Deleted",
        "Undefined",
    ];
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let text = heard();
        let of: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("pool 'p'") || line.contains("pool p"))
            .filter_map(|line| line.split_whitespace().last())
            .collect();
        if of == words {
            break;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::sleep(Duration::from_millis(20));
    }
    listener.kill().unwrap();
    listener.wait().unwrap();
}

#[test]
fn a_file_system_is_mounted_for_its_pool() {
    if !is_root() {
        return left_out("needs root and loop devices");
    }
    if missing(&["losetup", "mkfs.ext4", "mount"]) {
        return;
    }
    let rig = Rig::new();
    let image = rig.path("fs.img");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let attached: Run = Command::new("losetup")
        .args(["--find", "--show"])
        .arg(&image)
        .output()
        .unwrap()
        .into();
    if attached.status != 0 {
        return left_out("needs root and loop devices");
    }
    let device = attached.out.trim().to_owned();
    let detach = || program("losetup", &["--detach", &device]);
    let target = rig.path("mnt").display().to_string();
    rig.vireo(&[
        "pool-define-as",
        "f",
        "fs",
        "--source-dev",
        &device,
        "--source-format",
        "ext4",
        "--target",
        &target,
    ])
    .ok();
    let built = rig.vireo(&["pool-build", "f", "--no-overwrite"]);
    if built.status != 0 {
        detach();
        panic!("{}", built.err);
    }
    let again = rig.vireo(&["pool-build", "f", "--no-overwrite"]);
    let started = rig.vireo(&["pool-start", "f"]);
    let volume = rig.vireo(&["vol-create-as", "f", "v", "1M"]);
    let mounted = fs::read_to_string("/proc/self/mounts").unwrap();
    let stopped = rig.vireo(&["pool-destroy", "f"]);
    let after = fs::read_to_string("/proc/self/mounts").unwrap();
    detach();
    assert!(again.fails().contains("known already"));
    started.ok();
    volume.ok();
    stopped.ok();
    assert!(mounted.contains(&target));
    assert!(!after.contains(&target));
    assert!(!rig.path("mnt/v").exists());
}

#[test]
fn a_pool_whose_server_is_silent_is_starting_up_and_nothing_else() {
    if !is_root() {
        return left_out("needs root");
    }
    let (rig, _) = pool();
    let mount = rig.write(
        "bin/mount",
        "#!/bin/sh\nhere=$(dirname \"$0\")/..\ntouch \"$here/asked\"\n\
         while [ ! -e \"$here/down\" ]; do sleep 0.05; done\n\
         echo 'mount.nfs: Connection timed out' >&2; exit 32\n",
    );
    program("chmod", &["+x", &mount]);
    // The daemon, which the first one started, has no such `mount`.
    rig.kill_daemon();
    let path = format!(
        "{}:{}",
        rig.path("bin").display(),
        std::env::var("PATH").unwrap()
    );
    let command = |args: &[&str]| {
        let mut command = rig.command("vireo");
        command.env("PATH", &path).args(args);
        command
    };
    let vireo = |args: &[&str]| -> Run { command(args).output().unwrap().into() };
    let target = rig.path("mnt").display().to_string();
    let source = ["--source-host", "server", "--source-path", "/exports/c"];
    let place = ["--target", target.as_str()];
    let define = [&["pool-define-as", "n", "netfs"], &source[..], &place].concat();
    vireo(&define).ok();
    vireo(&["pool-build", "n"]).ok();
    let mut starting = command(&["pool-start", "n"]).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !rig.path("asked").exists() {
        assert!(Instant::now() < deadline, "nothing is mounted");
        assert!(starting.try_wait().unwrap().is_none(), "it does not hang");
        std::thread::sleep(Duration::from_millis(20));
    }
    for what in ["start", "undefine", "destroy", "delete", "build", "refresh"] {
        let said = vireo(&[&format!("pool-{what}"), "n"]).fails();
        assert!(said.contains("pool 'n' is starting up"), "{what}: {said}");
    }
    vireo(&["pool-refresh", "p"]).ok();
    assert!(
        vireo(&["pool-list", "--all"])
            .ok()
            .contains(" n      inactive")
    );
    fs::write(rig.path("down"), "").unwrap();
    assert_eq!(starting.wait().unwrap().code(), Some(1));
    vireo(&["pool-undefine", "n"]).ok();
    assert!(!vireo(&["pool-list", "--all"]).ok().contains(" n "));
    assert!(!rig.path("run/vireo/storage/n.xml").exists());
}

#[test]
fn a_network_file_system_is_mounted_for_its_pool() {
    if !is_root() {
        return left_out("needs root");
    }
    // There is no server here: what mounts is a stand-in that mounts memory by the same name.
    let rig = Rig::new();
    let script = |name: &str, text: &str| {
        let file = rig.write(&format!("bin/{name}"), format!("#!/bin/sh\n{text}\n"));
        program("chmod", &["+x", &file]);
    };
    script(
        "mount",
        "echo \"$@\" > \"$(dirname \"$0\")/../asked\"\n\
         [ -e \"$(dirname \"$0\")/../down\" ] && { echo 'mount.nfs: Connection refused' >&2; exit 32; }\n\
         exec /bin/mount -t tmpfs \"$5\" \"$6\"",
    );
    script(
        "showmount",
        "[ \"$3\" = server ] && printf '/exports/a b  *\\n/exports/c 192.0.2.0/24\\n'",
    );
    let path = format!(
        "{}:{}",
        rig.path("bin").display(),
        std::env::var("PATH").unwrap()
    );
    let vireo = |args: &[&str]| -> Run {
        rig.command("vireo")
            .env("PATH", &path)
            .args(args)
            .output()
            .unwrap()
            .into()
    };
    let target = rig.path("mnt").display().to_string();
    vireo(&[
        "pool-define-as",
        "n",
        "netfs",
        "--source-host",
        "server",
        "--source-path",
        "/exports/c",
        "--source-format",
        "nfs",
        "--source-protocol-ver",
        "4.2",
        "--target",
        &target,
    ])
    .ok();
    vireo(&["pool-build", "n"]).ok();
    fs::write(rig.path("down"), "").unwrap();
    let said = vireo(&["pool-start", "n"]).fails();
    assert!(
        said.contains("unexpected exit status 32: mount.nfs: Connection refused"),
        "{said}"
    );
    fs::remove_file(rig.path("down")).unwrap();
    vireo(&["pool-start", "n"]).ok();
    let asked = fs::read_to_string(rig.path("asked")).unwrap();
    assert_eq!(
        asked,
        format!("-o nodev,nosuid,noexec,nfsvers=4.2 -t nfs server:/exports/c {target}\n")
    );
    vireo(&["vol-create-as", "n", "v", "1M"]).ok();
    let mounted = || {
        fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains(&target)
    };
    assert!(mounted());
    // A pool whose file system somebody took away is stopped when that is seen.
    program("umount", &[&target]);
    let said = vireo(&["pool-refresh", "n"]).fails();
    assert!(said.contains("is not mounted"), "{said}");
    assert!(vireo(&["pool-info", "n"]).ok().contains("inactive"));
    vireo(&["pool-start", "n"]).ok();
    vireo(&["pool-destroy", "n"]).ok();
    assert!(!mounted());
    let sources = vireo(&["find-storage-pool-sources-as", "netfs", "server"]).ok();
    assert_eq!(
        sources,
        "<sources>
  <source>
    <host name='server'/>
    <dir path='/exports/a b'/>
    <format type='nfs'/>
  </source>
  <source>
    <host name='server'/>
    <dir path='/exports/c'/>
    <format type='nfs'/>
  </source>
</sources>

"
    );
    let said = vireo(&["find-storage-pool-sources-as", "netfs", "other"]).fails();
    assert!(
        said.contains("no storage pools were found on host 'other'"),
        "{said}"
    );
}
