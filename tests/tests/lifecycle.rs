//! How a guest's own power-off, reset, panic and triple fault end, on both CPUs.

use std::fs;
use std::io::Read;
use std::time::Duration;

use vireo_tests::{
    Rig, Terminal, have_kvm, left_out, tiny_guest, tiny_guest_with_panic_port, which,
};

const SOON: Duration = Duration::from_secs(60);

/// Runs `test` for every CPU this machine has.
fn on_each_backend(test: impl Fn(&str)) {
    test("qemu");
    if have_kvm() {
        test("kvm");
    } else {
        left_out("needs /dev/kvm (the software CPU was tested)");
    }
}

/// Starts the guest and types `key` on its console.
fn start_and_press(rig: &Rig, key: &str) -> Terminal {
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "guest", "--console"]));
    terminal.expect("Escape character", SOON);
    terminal.expect("TINY", SOON);
    terminal.send(key);
    terminal
}

#[test]
fn power_off() {
    on_each_backend(|virt| {
        let rig = Rig::new();
        rig.define(&tiny_guest(&rig, "guest", virt));
        let mut terminal = start_and_press(&rig, "q");
        terminal.wait(SOON);
        rig.wait_state("guest", "shut off (shutdown)", SOON);
        drop(terminal);

        let rig = Rig::new();
        let xml = tiny_guest(&rig, "guest", virt).replace(
            "  <devices>",
            "  <on_poweroff>restart</on_poweroff>\n  <devices>",
        );
        rig.define(&xml);
        let mut terminal = start_and_press(&rig, "q");
        terminal.expect("TINY", SOON);
    });
}

#[test]
fn reset() {
    on_each_backend(|virt| {
        let rig = Rig::new();
        rig.define(&tiny_guest(&rig, "guest", virt));
        let mut terminal = start_and_press(&rig, "r");
        terminal.expect("TINY", SOON);
        terminal.send("x");
        terminal.expect("x", SOON);
        assert_eq!(rig.state("guest"), "running (booted)");
        drop(terminal);
        rig.vireo(&["destroy", "guest"]).ok();

        let xml = rig
            .vireo(&["dumpxml", "--inactive", "guest"])
            .ok()
            .replace("<on_reboot>restart", "<on_reboot>destroy");
        rig.define(&xml);
        let mut terminal = start_and_press(&rig, "r");
        terminal.wait(SOON);
        rig.wait_state("guest", "shut off (shutdown)", SOON);
    });
}

#[test]
fn panic_and_triple_fault() {
    on_each_backend(|virt| {
        let rig = Rig::new();
        let with_action = |action| {
            tiny_guest_with_panic_port(&rig, "guest", virt, action).replace(
                "<name>",
                "<uuid>6f0a3c7e-5d0b-4c8e-9a51-2f6f1e7f9b11</uuid><name>",
            )
        };
        rig.define(&with_action("destroy"));
        let mut terminal = start_and_press(&rig, "p");
        terminal.wait(SOON);
        rig.wait_state("guest", "shut off (crashed)", SOON);
        drop(terminal);

        rig.define(&with_action("preserve"));
        let terminal = start_and_press(&rig, "p");
        rig.wait_state("guest", "crashed (panicked)", SOON);
        rig.vireo(&["destroy", "guest"]).ok();
        drop(terminal);

        // A dump comes first.
        let dumps = || {
            let found = fs::read_dir(rig.path("var/lib/vireo/dump"));
            let paths = found.map(|all| all.map(|entry| entry.unwrap().path()).collect());
            let paths: Vec<_> = paths.unwrap_or_default();
            for path in &paths {
                let mut start = [0; 4];
                let mut file = fs::File::open(path).unwrap();
                file.read_exact(&mut start).unwrap();
                assert_eq!(&start, b"\x7fELF", "{}", path.display());
            }
            paths.len()
        };
        assert_eq!(dumps(), 0);
        rig.define(&with_action("coredump-destroy"));
        let terminal = start_and_press(&rig, "p");
        rig.wait_state("guest", "shut off (crashed)", SOON);
        assert_eq!(dumps(), 1);
        drop(terminal);
        rig.define(&with_action("destroy"));
        let mut terminal = start_and_press(&rig, "z");
        rig.vireo(&["set-lifecycle-action", "guest", "crash", "coredump-restart"])
            .ok();
        terminal.send("p");
        terminal.expect("TINY", SOON);
        rig.wait_state("guest", "running (booted)", SOON);
        assert_eq!(dumps(), 2);
        rig.vireo(&["destroy", "guest"]).ok();
        drop(terminal);

        rig.define(&with_action("restart"));
        let mut terminal = start_and_press(&rig, "p");
        terminal.expect("TINY", SOON);
        // A triple fault is a reset, as on hardware: on_reboot decides, not on_crash.
        terminal.send("f");
        terminal.expect("TINY", SOON);
        terminal.send("x");
        terminal.expect("x", SOON);
    });
}

/// Life-cycle events as a stock client gets them.
#[test]
fn events_through_stock_virsh() {
    if !which("virsh") {
        return left_out("needs virsh (libvirt-clients)");
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let mut events = Terminal::start(rig.virsh_command().args(["event", "--all", "--loop"]));
    // Registered once the first event arrives; define until it does.
    let xml = tiny_guest_with_panic_port(&rig, "guest", "qemu", "destroy");
    std::thread::sleep(Duration::from_millis(500));
    rig.define(&xml);
    events.expect("event 'lifecycle' for domain 'guest': Defined Added", SOON);
    rig.vireo(&["start", "guest"]).ok();
    events.expect(
        "event 'lifecycle' for domain 'guest': Resumed Unpaused",
        SOON,
    );
    events.expect("event 'lifecycle' for domain 'guest': Started Booted", SOON);
    rig.vireo(&["suspend", "guest"]).ok();
    events.expect(
        "event 'lifecycle' for domain 'guest': Suspended Paused",
        SOON,
    );
    rig.vireo(&["resume", "guest"]).ok();
    events.expect(
        "event 'lifecycle' for domain 'guest': Resumed Unpaused",
        SOON,
    );
    rig.vireo(&["destroy", "guest"]).ok();
    events.expect(
        "event 'lifecycle' for domain 'guest': Stopped Destroyed",
        SOON,
    );
    let mut terminal = start_and_press(&rig, "q");
    events.expect("event 'lifecycle' for domain 'guest': Started Booted", SOON);
    events.expect(
        "event 'lifecycle' for domain 'guest': Shutdown Finished",
        SOON,
    );
    events.expect(
        "event 'lifecycle' for domain 'guest': Stopped Shutdown",
        SOON,
    );
    terminal.wait(SOON);
    let mut terminal = start_and_press(&rig, "r");
    events.expect("event 'reboot' for domain 'guest'", SOON);
    terminal.expect("TINY", SOON);
    terminal.send("p");
    events.expect(
        "event 'lifecycle' for domain 'guest': Crashed Panicked",
        SOON,
    );
    events.expect(
        "event 'lifecycle' for domain 'guest': Stopped Crashed",
        SOON,
    );
    terminal.wait(SOON);
    rig.vireo(&["undefine", "guest"]).ok();
    events.expect(
        "event 'lifecycle' for domain 'guest': Undefined Removed",
        SOON,
    );
    drop(events);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

/// The guest agent's channel: closed at the start, which events and the running definition say.
#[test]
fn channels_begin_closed() {
    let rig = Rig::new();
    let channel =
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
    let xml = tiny_guest(&rig, "guest", "qemu");
    rig.define(&xml.replace("<devices>", &format!("<devices>{channel}")));
    rig.vireo(&["start", "guest", "--paused"]).ok();
    let mut events = rig.listen("guest");
    let target = "<target type='virtio' name='org.qemu.guest_agent.0'";
    let live = rig.vireo(&["dumpxml", "guest"]).ok();
    assert!(
        live.contains(&format!("{target} state='disconnected'/>")),
        "{live}"
    );
    let stored = rig.vireo(&["dumpxml", "guest", "--inactive"]).ok();
    assert!(stored.contains(&format!("{target}/>")), "{stored}");
    // Who defines what he saw does not bring it along.
    rig.define(&live);
    let stored = rig.vireo(&["dumpxml", "guest", "--inactive"]).ok();
    assert!(stored.contains(&format!("{target}/>")), "{stored}");
    rig.vireo(&["destroy", "guest"]).ok();
    rig.vireo(&["start", "guest"]).ok();
    events.expect(
        "event 'lifecycle' for domain 'guest': Stopped Destroyed",
        SOON,
    );
    events.expect(
        "event 'agent-lifecycle' for domain 'guest': state: 'disconnected' reason: 'domain started'",
        SOON,
    );
    events.expect("event 'lifecycle' for domain 'guest': Started Booted", SOON);
    rig.vireo(&["managedsave", "guest"]).ok();
    rig.vireo(&["start", "guest"]).ok();
    events.expect(
        "event 'lifecycle' for domain 'guest': Started Restored",
        SOON,
    );
    events.expect(
        "event 'lifecycle' for domain 'guest': Resumed Snapshot",
        SOON,
    );
}

/// The character back ends of a serial port.
#[test]
fn serial_to_file_unix_and_tcp() {
    use std::io::{Read, Write};
    let rig = Rig::new();
    let out = rig.path("serial.out");
    let sock = rig.path("serial.sock");
    let with =
        |devices: &str| tiny_guest(&rig, "guest", "qemu").replace("<console type='pty'/>", devices);
    let file = rig.write(
        "f.xml",
        with(&format!(
            "<serial type='file'><source path='{}'/></serial>",
            out.display()
        )),
    );
    rig.vireo(&["create", &file]).ok();
    let deadline = std::time::Instant::now() + SOON;
    while std::fs::read_to_string(&out).unwrap_or_default() != "TINY\n" {
        assert!(std::time::Instant::now() < deadline, "nothing in the file");
        std::thread::sleep(Duration::from_millis(10));
    }
    rig.vireo(&["destroy", "guest"]).ok();

    let talk = |stream: &mut dyn ReadWrite| {
        stream.write_all(b"abc").unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 100];
        while !seen.ends_with(b"abc") {
            let n = stream.read(&mut buffer).unwrap();
            assert!(n > 0);
            seen.extend_from_slice(&buffer[..n]);
        }
    };
    let file = rig.write(
        "u.xml",
        with(&format!(
            "<serial type='unix'><source mode='bind' path='{}'/></serial>",
            sock.display()
        )),
    );
    rig.vireo(&["create", &file]).ok();
    let mut stream = std::os::unix::net::UnixStream::connect(&sock).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    talk(&mut stream);
    drop(stream);
    // A second peer after the first has gone.
    let mut stream = std::os::unix::net::UnixStream::connect(&sock).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    talk(&mut stream);
    rig.vireo(&["destroy", "guest"]).ok();

    // A port nobody has at this moment.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let file = rig.write("t.xml", with(&format!(
        "<serial type='tcp'><source mode='bind' host='127.0.0.1' service='{port}'/><protocol type='raw'/></serial>")));
    rig.vireo(&["create", &file]).ok();
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    talk(&mut stream);
    rig.vireo(&["destroy", "guest"]).ok();

    let file = rig.write("n.xml", with("<serial type='null'/>"));
    rig.vireo(&["create", &file]).ok();
    rig.vireo(&["destroy", "guest"]).ok();

    trait ReadWrite: Read + Write {}
    impl<T: Read + Write> ReadWrite for T {}
}
