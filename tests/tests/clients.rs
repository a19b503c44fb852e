//! Stock clients that other people wrote, as Debian has them: each must work as it does on libvirt.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use vireo_tests::{Rig, Run, left_out, tiny_guest, which};

/// Prepares a program of this test's own surroundings.
fn client(rig: &Rig, program: &str) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["300", program])
        .env("LC_ALL", "C.UTF-8")
        .env("HOME", rig.root())
        .env("XDG_CACHE_HOME", rig.path("cache"))
        .env("XDG_CONFIG_HOME", rig.path("config"))
        .env("XDG_DATA_HOME", rig.path("data"))
        .env("VIREO_TEST_RIG", rig.root().file_name().unwrap())
        .stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> Run {
    command.output().unwrap().into()
}

/// Whether an interpreter can load a module.
fn has(program: &str, args: &[&str]) -> bool {
    (program.starts_with('/') || which(program))
        && Command::new(program)
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}

fn script(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("clients")
        .join(name)
}

#[test]
fn pythons_bindings() {
    if !has("/usr/bin/python3", &["-c", "import libvirt"]) {
        left_out("Python's bindings need python3-libvirt");
        return;
    }
    let rig = Rig::new();
    let xml = rig.write("guest.xml", tiny_guest(&rig, "guest", "qemu"));
    // Clients of others do not start it.
    rig.vireo(&["list"]).ok();
    let mut command = client(&rig, "/usr/bin/python3");
    command.arg(script("bindings.py")).arg(rig.uri()).arg(xml);
    assert_eq!(run(&mut command).ok(), "all is well\n");
    assert!(rig.processes("vireo-vmm").is_empty());
}

#[test]
fn perls_bindings() {
    if !has("perl", &["-MSys::Virt", "-e", "1"]) {
        left_out("Perl's bindings need libsys-virt-perl");
        return;
    }
    let rig = Rig::new();
    let xml = rig.write("guest.xml", tiny_guest(&rig, "guest", "qemu"));
    // Clients of others do not start it.
    rig.vireo(&["list"]).ok();
    let mut command = client(&rig, "perl");
    command.arg(script("bindings.pl")).arg(rig.uri()).arg(xml);
    assert_eq!(run(&mut command).ok(), "all is well\n");
}

#[test]
fn virt_install_virt_xml_and_their_guests() {
    if !which("virt-install") {
        left_out("virt-install and virt-xml need virtinst");
        return;
    }
    let rig = Rig::new();
    // Clients of others do not start it.
    rig.vireo(&["list"]).ok();
    let guest = tiny_guest(&rig, "x", "qemu");
    let file = |tag: &str| {
        let (_, rest) = guest.split_once(&format!("<{tag}>")).unwrap();
        rest.split_once('<').unwrap().0.to_owned()
    };
    let install = |name: &str, more: &[&str]| {
        let mut command = client(&rig, "virt-install");
        command.args(["--connect", &rig.uri(), "--name", name]);
        command.args(["--memory", "64", "--vcpus", "1", "--virt-type", "qemu"]);
        command.args(["--osinfo", "detect=off,require=off", "--network", "none"]);
        command.args(["--graphics", "none", "--noautoconsole", "--wait", "0"]);
        command.args(more);
        run(&mut command)
    };
    // From a kernel; without a disk, which would need storage pools.
    let boot = format!("kernel={}", file("kernel"));
    let said = install("fresh", &["--import", "--disk", "none", "--boot", &boot]).ok();
    assert!(said.contains("Domain creation completed."), "{said}");
    rig.wait_state("fresh", "running (booted)", Duration::from_secs(60));
    let xml = rig.vireo(&["dumpxml", "--inactive", "fresh"]).ok();
    assert!(xml.contains("<kernel>"), "{xml}");
    rig.vireo(&["destroy", "fresh"]).ok();

    let virt_xml = |args: &[&str]| {
        let mut command = client(&rig, "virt-xml");
        command.args(["--connect", &rig.uri()]).args(args);
        run(&mut command)
    };
    virt_xml(&["fresh", "--edit", "--memory", "96", "--define"]).ok();
    let memory = rig.vireo(&["dominfo", "fresh"]).ok();
    assert!(memory.contains("Max memory:     98304 KiB"), "{memory}");
    virt_xml(&["fresh", "--edit", "--metadata", "title=A title", "--define"]).ok();
    assert_eq!(
        rig.vireo(&["desc", "--title", "fresh"]).ok().trim(),
        "A title"
    );
    virt_xml(&["fresh", "--add-device", "--rng", "/dev/urandom", "--define"]).ok();
    let xml = rig.vireo(&["dumpxml", "fresh"]).ok();
    assert!(xml.contains("<rng model='virtio'>"), "{xml}");
    virt_xml(&["fresh", "--remove-device", "--rng", "1", "--define"]).ok();
    assert!(!rig.vireo(&["dumpxml", "fresh"]).ok().contains("<rng"));
    let error = virt_xml(&["nobody", "--edit", "--memory", "1"]);
    assert_ne!(error.status, 0);
    assert!(error.err.contains("nobody"), "{error:?}");
}

#[test]
fn libvirt_dbus_shows_the_daemon_on_a_bus() {
    const PROGRAM: &str = "/usr/sbin/libvirt-dbus";
    if !Path::new(PROGRAM).exists() || !which("dbus-run-session") || !which("busctl") {
        left_out("the daemon on D-Bus needs libvirt-dbus, dbus and systemd's busctl");
        return;
    }
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    // It knows a few URIs by name and reads where their sockets are from libvirt's own settings: this one takes ours.
    rig.write(
        "config/libvirt/libvirt.conf",
        format!("uri_aliases = []\nuri_default = \"{}\"\n", rig.uri()),
    );
    let mut command = client(&rig, "dbus-run-session");
    command.env("LIBVIRT_DEFAULT_URI", rig.uri());
    command.args(["--", "sh", "-c"]).arg(format!(
        "{PROGRAM} --session & pid=$!; trap 'kill $pid' EXIT; \
         for i in $(seq 100); do busctl --user status org.libvirt >/dev/null 2>&1 && break; sleep 0.1; done; \
         busctl --user tree org.libvirt --list"
    ));
    let said = run(&mut command).ok();
    assert!(said.contains("/org/libvirt"), "{said}");
}
