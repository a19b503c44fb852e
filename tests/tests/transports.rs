//! The ways to the daemon beside its socket: ports, TLS, ssh, polkit; with our client and with stock virsh.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vireo_tests::certificates::certificates;
use vireo_tests::sshd::Sshd;
use vireo_tests::{Rig, Run, left_out, tiny_guest, which};

/// Starts the daemon with these arguments and waits until it says that it serves `what`; returns the port.
fn daemon_with_port(rig: &Rig, args: &[&str], what: &str) -> u16 {
    let log = rig.path("daemon.log");
    let mut command = rig.command("vireod");
    command
        .args(args)
        .arg("-v")
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap());
    drop(command.spawn().unwrap());
    let wanted = format!("serving {what} ");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let said = fs::read_to_string(&log).unwrap_or_default();
        let found = said.lines().find_map(|line| {
            let (_, address) = line.split_once(&wanted)?;
            address.trim().rsplit_once(':')?.1.parse().ok()
        });
        if let Some(port) = found {
            return port;
        }
        assert!(Instant::now() < deadline, "it does not listen: {said}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A command of ours without the rig's own root, so that only the URI says where to go.
fn far(rig: &Rig, uri: &str, args: &[&str]) -> Run {
    let mut command = rig.command("vireo");
    command
        .env_remove("VIREO_ROOT")
        .env("HOME", rig.root())
        .args(["-c", uri])
        .args(args);
    command.output().unwrap().into()
}

fn stock(rig: &Rig, uri: &str, args: &[&str]) -> Run {
    let mut command = Command::new("virsh");
    command
        .env("LC_ALL", "C.UTF-8")
        .env("HOME", rig.root())
        .env("XDG_CACHE_HOME", rig.path("cache"))
        .args(["-c", uri])
        .args(args)
        .stdin(Stdio::null());
    command.output().unwrap().into()
}

#[test]
fn a_port_for_everybody_is_off_until_it_is_asked_for() {
    let rig = Rig::new();
    rig.write("etc/vireo/vireod.conf", "listen_tcp = 1\n");
    let error = rig.vireo(&["list"]).fails();
    assert!(error.contains("auth_tcp"), "{error}");
    rig.write("etc/vireo/vireod.conf", "# nothing\n");
    let port = daemon_with_port(&rig, &["--listen-tcp", "127.0.0.1:0"], "TCP");
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    let uri = format!("vireo+tcp://127.0.0.1:{port}/system");
    assert_eq!(
        far(&rig, &uri, &["list", "--all", "--name"]).ok(),
        "one\n\n"
    );
    if which("virsh") {
        let uri = format!("qemu+tcp://127.0.0.1:{port}/system");
        assert_eq!(
            stock(&rig, &uri, &["list", "--all", "--name"]).ok(),
            "one\n\n"
        );
    }
}

#[test]
fn certificates_open_the_tls_port_to_both_clients() {
    let rig = Rig::new();
    let ours = rig.path("pki");
    certificates(&ours, &["localhost", "127.0.0.1"]);
    let others = rig.path("others");
    certificates(&others, &["localhost", "127.0.0.1"]);
    let conf = format!(
        "listen_tls = 1\nlisten_addr = \"127.0.0.1\"\ntls_port = \"0\"\nca_file = \"{0}/cacert.pem\"\n\
         cert_file = \"{0}/servercert.pem\"\nkey_file = \"{0}/serverkey.pem\"\n",
        ours.display()
    );
    rig.write("etc/vireo/vireod.conf", conf);
    let port = daemon_with_port(&rig, &[], "TLS");
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    let uri = |scheme: &str, folder: &Path| {
        format!(
            "{scheme}://localhost:{port}/system?pkipath={}",
            folder.display()
        )
    };
    let list = ["list", "--all", "--name"];
    assert_eq!(far(&rig, &uri("vireo+tls", &ours), &list).ok(), "one\n\n");
    // Without a transport, a host means TLS.
    assert_eq!(far(&rig, &uri("qemu", &ours), &list).ok(), "one\n\n");
    let error = far(&rig, &uri("vireo+tls", &others), &list).fails();
    assert!(error.contains("unable to use TLS"), "{error}");
    if !which("virsh") {
        left_out("stock virsh through TLS needs virsh");
        return;
    }
    assert_eq!(stock(&rig, &uri("qemu", &ours), &list).ok(), "one\n\n");
    // virsh may die of a signal when it is hung up on.
    assert_ne!(stock(&rig, &uri("qemu", &others), &list).status, 0);
}

#[test]
fn ssh_leads_to_the_daemon_which_is_started_there() {
    let rig = Rig::new();
    let Some(sshd) = Sshd::start(&rig) else {
        return;
    };
    let options = format!(
        "keyfile={}&no_verify=1&no_tty=1&known_hosts=/dev/null",
        sshd.key.display()
    );
    let uri = |scheme: &str, more: &str| {
        format!(
            "{scheme}+ssh://root@127.0.0.1:{}/system?{options}{more}",
            sshd.port
        )
    };
    // The helper on the far side starts the daemon.
    let list = ["list", "--all", "--name"];
    assert_eq!(far(&rig, &uri("vireo", ""), &list).ok(), "\n");
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    assert_eq!(far(&rig, &uri("qemu", ""), &list).ok(), "one\n\n");
    assert_eq!(
        far(&rig, &uri("vireo", ""), &["uri"]).ok().trim(),
        uri("vireo", "")
    );
    let looking = |args: &[&str]| far(&rig, &uri("vireo", ""), &[&["-r"], args].concat());
    assert_eq!(looking(&list).ok(), "one\n\n");
    let error = looking(&["undefine", "one"]).fails();
    assert!(error.contains("read only access prevents"), "{error}");
    let socket = format!("&socket={}", rig.socket().display());
    if which("nc") {
        let netcat = format!("{socket}&proxy=netcat");
        assert_eq!(far(&rig, &uri("vireo", &netcat), &list).ok(), "one\n\n");
    } else {
        left_out("ssh with netcat needs nc");
    }
    if which("virsh") && which("nc") {
        let netcat = format!("{socket}&proxy=netcat");
        assert_eq!(stock(&rig, &uri("qemu", &netcat), &list).ok(), "one\n\n");
        // Under libvirt's name our helper is found by stock clients.
        let native = uri("qemu", "&proxy=native");
        assert_eq!(stock(&rig, &native, &list).ok(), "one\n\n");
    }
    // A daemon that cannot be reached is told as what ssh said.
    let error = far(&rig, &uri("vireo", "&socket=/nonexistent/sock"), &list).fails();
    assert!(error.contains("failed to connect"), "{error}");
}

#[test]
fn polkit_decides_for_who_is_not_root() {
    // SAFETY: geteuid takes nothing and cannot fail.
    let superuser = unsafe { libc::geteuid() } == 0;
    if !superuser || !which("setpriv") || !which("virsh") {
        left_out("clients of another user need root, setpriv and virsh");
        return;
    }
    let rig = Rig::new();
    // Stands for polkit: it says what the file says, and notes what it was asked.
    let pkcheck = rig.write(
        "bin/pkcheck",
        format!(
            "#!/bin/sh\necho \"$@\" >>{0}/asked\nexit $(cat {0}/answer)\n",
            rig.root().display()
        ),
    );
    let executable = |path: &Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    executable(Path::new(&pkcheck));
    executable(rig.root());
    rig.write("etc/vireo/vireod.conf", "auth_unix_rw = \"polkit\"\n");
    let mut daemon = rig.command("vireod");
    let path = std::env::var("PATH").unwrap_or_default();
    daemon.env("PATH", format!("{}/bin:{path}", rig.root().display()));
    daemon.stdout(Stdio::null()).stderr(Stdio::null());
    drop(daemon.spawn().unwrap());
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(rig.socket()).is_err() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    let as_nobody = |args: &[&str]| -> Run {
        let mut command = Command::new("setpriv");
        command
            .args([
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "virsh",
                "-c",
            ])
            .arg(rig.uri())
            .args(args)
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", "/nonexistent")
            .env("XDG_CACHE_HOME", "/nonexistent")
            .env("VIREO_TEST_RIG", rig.root().file_name().unwrap())
            .stdin(Stdio::null());
        command.output().unwrap().into()
    };
    rig.write("answer", "1");
    let error = as_nobody(&["list"]).fails();
    assert!(error.contains("access denied by policy"), "{error}");
    rig.write("answer", "0");
    as_nobody(&["list"]).ok();
    let asked = fs::read_to_string(rig.path("asked")).unwrap();
    // virsh asks again and again while it is refused.
    assert!(asked.lines().count() >= 2, "{asked}");
    assert!(
        asked.lines().all(
            |line| line.starts_with("--action-id org.libvirt.unix.manage --process")
                && line.contains(",65534 ")
        ),
        "{asked}"
    );
    // Root is not asked about.
    rig.write("answer", "1");
    rig.virsh(&["list"]).ok();
}
