//! What bad input gets: a clear error with libvirt's code, a non-zero exit, and nothing left behind.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vireo_tests::{Rig, Run, Terminal, left_out, tiny_guest, which};

/// Tries to define `xml`; gives the error.
#[track_caller]
fn refused(rig: &Rig, xml: &str) -> String {
    let file = rig.write("bad.xml", xml);
    let error = rig.vireo(&["define", &file]).fails();
    assert!(
        error.starts_with(&format!(
            "error: Failed to define domain from {file}\nerror: "
        )),
        "{error}"
    );
    assert_eq!(
        rig.vireo(&["list", "--all", "--name"]).ok(),
        "\n",
        "a partial object"
    );
    error
}

/// Defines and tries to start a tiny guest changed by `change`; gives the error.
#[track_caller]
fn start_refused(rig: &Rig, change: impl Fn(String) -> String) -> String {
    rig.define(&change(tiny_guest(rig, "guest", "qemu")));
    let error = rig.vireo(&["start", "guest"]).fails();
    assert!(
        error.starts_with("error: Failed to start domain 'guest'\nerror: "),
        "{error}"
    );
    assert_eq!(rig.vireo(&["domstate", "guest"]).ok(), "shut off\n\n");
    assert!(rig.processes("vireo-vmm").is_empty(), "a leaked process");
    let left: Vec<_> = std::fs::read_dir(rig.path("run/vireo/domains"))
        .map(|dir| {
            dir.flatten()
                .map(|e| e.path())
                .filter(|p| p.is_dir())
                .collect()
        })
        .unwrap_or_default();
    assert_eq!(left, Vec::<std::path::PathBuf>::new(), "leaked files");
    rig.vireo(&["undefine", "guest"]).ok();
    error
}

/// What libvirt's own library says of them, which has a driver without any hypervisor.
#[test]
fn malformed_documents_get_libvirts_words() {
    if !which("virsh") {
        return left_out("the comparison needs virsh (libvirt-clients)");
    }
    let rig = Rig::new();
    let good = "<domain type='test'>\n  <name>x</name>\n  <memory unit='MiB'>64</memory>\n  <vcpu>1</vcpu>\n  <os>\
                <type arch='x86_64'>hvm</type></os>\n  <devices>\n    <emulator>/bin/x</emulator>\n  </devices>\n</domain>\n";
    let with = |old: &str, new: &str| {
        assert!(good.contains(old), "{old}");
        good.replace(old, new)
    };
    let named = |name: &str| with(">x<", &format!(">{name}<"));
    let typed = |attribute: &str| with("type='test'", attribute);
    let cut = |end: &str| good[..good.find(end).unwrap()].to_owned();
    let cases = [
        with("</os>", ""),
        "hello".into(),
        String::new(),
        "  \n".into(),
        "\n\n  x".into(),
        "<".into(),
        format!("{good}<x/>"),
        format!("{good}\n\n  text"),
        format!("{good}</domain>"),
        "</domain>".into(),
        "<!foo><domain/>".into(),
        named("a & b"),
        named("a &foo; b"),
        named("a &foo b"),
        named("&;"),
        named("&#0;"),
        named("&#xg;"),
        named("&#g;"),
        named("&#x110000;"),
        named("a < b"),
        named("a ]]> b"),
        named("a\u{1}b"),
        named("<![CDATA[a"),
        with("<name>", "<na\u{1}me>"),
        with("</name>", "</nam>"),
        with("</name>", "</name x>"),
        with("</name>", "</ name>"),
        with("  <vcpu>1</vcpu>", "\t\t<vcpu>1</vcp>"),
        with("</name>", "</name><title>\u{e4}\u{f6}</titl>"),
        with(
            "</name>",
            &format!("</name>{}<title>t</titl>", " ".repeat(100)),
        ),
        with("<vcpu>1</vcpu>", "<1vcpu>1</1vcpu>"),
        with("<vcpu>", "<!-- a -- b --><vcpu>"),
        with("<vcpu>", "<!-- a "),
        with("<vcpu>", "<?xml version='1.0'?><vcpu>"),
        with("<name>", "<!DOCTYPE x><name>"),
        format!("\n<?xml version='1.0'?>{good}"),
        format!("<?xml version='1.0' encoding='foo'?>{good}"),
        typed("type=test"),
        typed("type='test"),
        typed("type"),
        typed("type 'test'"),
        typed("type='test'id='1'"),
        typed("type='test' type='test'"),
        typed("1='test'"),
        typed("type='a<b'"),
        typed("type='a &foo b'"),
        typed("type='a & b'"),
        typed("type='a &foo; b'"),
        typed("type='a\u{1}'"),
        typed("a='1'\n  a='2'"),
        cut(" arch="),
        cut("</devices>"),
        cut("<devices>") + "</devices",
        cut("</domain>"),
        "<domain>".into(),
        "<domain>\n".into(),
        "<domain ".into(),
        "<domain type=".into(),
        "<domain type='a".into(),
    ];
    let mut wrong = String::new();
    for xml in cases {
        let file = rig.write("bad.xml", &xml);
        let ours = rig.vireo(&["define", &file]).fails();
        let mut virsh = rig.stock("virsh");
        let theirs = virsh
            .args(["-c", "test:///default", "define", &file])
            .output();
        let theirs: Run = theirs.unwrap().into();
        let theirs = theirs.fails();
        if ours != theirs {
            wrong += &format!("{xml:?}\nvireo: {ours}\nvirsh: {theirs}\n");
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

/// What libvirt's driver for QEMU says of them.
#[test]
fn actions_that_cannot_follow_are_refused_at_definition() {
    let rig = Rig::new();
    let with = |poweroff: &str, reboot: &str, crash: &str| {
        let actions = format!(
            "<on_poweroff>{poweroff}</on_poweroff><on_reboot>{reboot}</on_reboot><on_crash>{crash}</on_crash>\n  <devices>"
        );
        tiny_guest(&rig, "guest", "qemu").replace("<devices>", &actions)
    };
    let preserve = "error: unsupported configuration: qemu driver doesn't support the 'preserve' action for \
                    'on_reboot'/'on_poweroff'\n";
    let rename = "error: unsupported configuration: qemu driver doesn't support the 'rename-restart' action for \
                  'on_reboot'/'on_poweroff'/'on_crash'\n";
    let both = "error: unsupported configuration: qemu driver doesn't support 'onReboot' set to 'destroy and \
                'onPoweroff' set to 'reboot'\n";
    for (poweroff, reboot, crash, why) in [
        ("preserve", "restart", "destroy", preserve),
        ("destroy", "preserve", "destroy", preserve),
        ("restart", "destroy", "destroy", both),
        ("destroy", "restart", "rename-restart", rename),
        ("rename-restart", "preserve", "destroy", rename),
    ] {
        let error = refused(&rig, &with(poweroff, reboot, crash));
        assert!(error.trim_end().ends_with(why.trim_end()), "{error}");
    }
    for (poweroff, reboot, crash) in [
        ("restart", "restart", "preserve"),
        ("destroy", "destroy", "coredump-restart"),
    ] {
        let guest = with(poweroff, reboot, crash);
        rig.define(&guest.replace("guest<", &format!("{poweroff}<")));
    }
    let change = |event, action, why: &str| {
        let error = rig
            .vireo(&["set-lifecycle-action", "destroy", event, action])
            .fails();
        assert_eq!(
            error,
            format!("error: Unable to change lifecycle action.\n{why}")
        );
    };
    change("poweroff", "preserve", preserve);
    change("poweroff", "restart", both);
    change("crash", "rename-restart", rename);
}

#[test]
fn xml_that_cannot_be_a_domain() {
    let rig = Rig::new();
    let good = tiny_guest(&rig, "guest", "qemu");
    let cases: &[(&str, String, &[&str])] = &[
        ("not closed", good.replace("</os>", ""), &["line"]),
        ("not XML", "hello".into(), &[]),
        ("empty", String::new(), &[]),
        (
            "wrong root",
            "<network><name>x</name></network>".into(),
            &["network"],
        ),
        ("no name", good.replace("<name>guest</name>", ""), &["name"]),
        (
            "name with slash",
            good.replace("<name>guest</name>", "<name>a/b</name>"),
            &["name"],
        ),
        (
            "bad uuid",
            good.replace("<name>", "<uuid>12</uuid><name>"),
            &["uuid"],
        ),
        (
            "no memory",
            good.replace("<memory unit='MiB'>16</memory>", ""),
            &["memory"],
        ),
        ("memory 0", good.replace(">16<", ">0<"), &["memory"]),
        (
            "memory of nonsense",
            good.replace(">16<", ">lots<"),
            &["memory"],
        ),
        (
            "0 vCPUs",
            good.replace("<vcpu>1</vcpu>", "<vcpu>0</vcpu>"),
            &["vcpu"],
        ),
        (
            "a unit nobody knows",
            good.replace("'MiB'", "'parsec'"),
            &["parsec"],
        ),
        (
            "unknown domain type",
            good.replace("type='qemu'", "type='vax'"),
            &["vax"],
        ),
        (
            "unknown machine",
            good.replace("<type>", "<type machine='pdp11'>"),
            &["pdp11"],
        ),
        (
            "unknown arch",
            good.replace("<type>", "<type arch='vax'>"),
            &["vax"],
        ),
        (
            "entity bomb",
            format!(
                "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>]>{}",
                good.replace(">guest<", ">&b;<")
            ),
            &[],
        ),
        (
            "very deep",
            format!(
                "{}{}",
                "<domain>".repeat(100_000),
                "</domain>".repeat(100_000)
            ),
            &[],
        ),
    ];
    for (what, xml, words) in cases {
        let error = refused(&rig, xml).to_lowercase();
        for word in *words {
            assert!(error.contains(word), "{what}: {error}");
        }
    }
}

#[test]
fn validation_names_the_element_and_the_line() {
    let rig = Rig::new();
    let xml = tiny_guest(&rig, "guest", "qemu")
        .replace("  <devices>\n", "  <devices>\n    <flux capacity='1'/>\n");
    let file = rig.write("flux.xml", &xml);
    let error = rig.vireo(&["define", "--validate", &file]).fails();
    let line = 1 + xml.lines().position(|l| l.contains("flux")).unwrap();
    assert!(error.contains("flux"), "{error}");
    assert!(error.contains(&line.to_string()), "{error}");
    assert_eq!(rig.vireo(&["list", "--all", "--name"]).ok(), "\n");
    // Without --validate it is kept out, as libvirt does.
    rig.vireo(&["define", &file]).ok();
    assert!(!rig.vireo(&["dumpxml", "guest"]).ok().contains("flux"));
}

#[test]
fn names_and_uuids_that_are_taken() {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "guest", "qemu"));
    let uuid = rig.vireo(&["domuuid", "guest"]).ok().trim().to_owned();
    let other = tiny_guest(&rig, "guest", "qemu").replace(
        "<name>",
        "<uuid>11111111-2222-3333-4444-555555555555</uuid><name>",
    );
    let file = rig.write("other.xml", other);
    let error = rig.vireo(&["define", &file]).fails();
    assert!(
        error.contains(&format!("domain 'guest' already exists with uuid {uuid}")),
        "{error}"
    );
    let renamed = tiny_guest(&rig, "elsewhere", "qemu")
        .replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    let file = rig.write("renamed.xml", renamed);
    let error = rig.vireo(&["define", &file]).fails();
    assert!(
        error.contains(&format!(
            "domain 'guest' is already defined with uuid {uuid}"
        )),
        "{error}"
    );
    assert_eq!(rig.vireo(&["list", "--all", "--name"]).ok(), "guest\n\n");
    let error = rig.vireo(&["start", "nobody"]).fails();
    assert_eq!(error, "error: failed to get domain 'nobody'\n");
}

#[test]
fn kernels_that_are_none() {
    let rig = Rig::new();
    let tiny = rig.path("tiny.elf");
    let tiny = tiny.to_str().unwrap();
    let missing = rig.path("missing").to_str().unwrap().to_owned();
    let error = start_refused(&rig, |xml| xml.replace(tiny, &missing));
    assert!(
        error.contains(&missing) && error.contains("No such file"),
        "{error}"
    );
    let folder = rig.root().to_str().unwrap().to_owned();
    start_refused(&rig, |xml| xml.replace(tiny, &folder));
    for (name, content) in [
        ("empty", vec![]),
        ("text", b"I am not a kernel\n".repeat(1000)),
        ("elf-header-only", b"\x7fELF\x02\x01\x01\0".to_vec()),
        ("zeros", vec![0; 1 << 20]),
    ] {
        let path = rig.write(name, content);
        let error = start_refused(&rig, |xml| xml.replace(tiny, &path));
        assert!(error.contains(name), "the message names the file: {error}");
    }
    // A good kernel, cut short at several places.
    let good = std::fs::read(rig.path("tiny.elf")).unwrap();
    for cut in [65, 200, 4095] {
        let path = rig.write("cut", &good[..cut]);
        start_refused(&rig, |xml| xml.replace(tiny, &path));
    }
    let path = rig.write("initrd", "");
    std::fs::remove_file(&path).unwrap();
    let error = start_refused(&rig, |xml| {
        xml.replace("</kernel>", &format!("</kernel><initrd>{path}</initrd>"))
    });
    assert!(error.contains("initrd"), "{error}");
}

/// What a processor is asked to be and can't is named.
#[test]
fn cpus_that_do_not_fit() {
    let rig = Rig::new();
    let cpu = |text: &'static str| move |xml: String| xml.replace("<features>", text);
    for (asked, named) in [
        (
            "<cpu mode='custom' match='exact'><model>Pentium9</model></cpu><features>",
            &["Pentium9"][..],
        ),
        (
            "<cpu mode='custom' match='exact'><model fallback='forbid'>Opteron_G5</model></cpu><features>",
            &["xop", "tbm"],
        ),
        (
            "<cpu mode='custom' match='exact'><model>qemu64</model>\
             <feature policy='require' name='avx512f'/><feature policy='require' name='hle'/></cpu><features>",
            &["avx512f", "hle"],
        ),
        (
            "<cpu mode='host-passthrough'><feature policy='require' name='warp'/></cpu><features>",
            &["warp"],
        ),
    ] {
        let error = start_refused(&rig, cpu(asked));
        for name in named {
            assert!(error.contains(name), "{name} in {error}");
        }
    }
}

#[test]
fn machines_that_do_not_fit() {
    let rig = Rig::new();
    let error = start_refused(&rig, |xml| {
        xml.replace("<memory unit='MiB'>16", "<memory unit='TiB'>900")
    });
    assert!(error.to_lowercase().contains("memory"), "{error}");
    let file = rig.write(
        "many.xml",
        tiny_guest(&rig, "many", "qemu").replace("<vcpu>1</vcpu>", "<vcpu>10000</vcpu>"),
    );
    let mut run = rig.vireo(&["define", &file]);
    if run.status == 0 {
        run = rig.vireo(&["start", "many"]);
    }
    let error = run.fails().to_lowercase();
    assert!(error.contains("cpu"), "{error}");
    let error = start_refused(&rig, |xml| {
        xml.replace("<devices>", "<devices><disk type='file' device='disk'><source file='/x'/><target dev='sda' bus='usb'/></disk>")
    });
    assert!(error.contains("sda"), "the device is named: {error}");
    let error = start_refused(&rig, |xml| {
        xml.replace("<devices>", "<devices><disk type='file' device='disk'><source file='/nowhere/x'/><target dev='vda' bus='virtio'/></disk>")
    });
    assert!(error.contains("/nowhere/x"), "the file is named: {error}");
    // Firmware that is not there.
    let error = start_refused(&rig, |xml| {
        let start = xml.find("<kernel>").unwrap();
        let end = xml.find("</kernel>").unwrap() + "</kernel>".len();
        let xml = format!("{}<boot dev='hd'/>{}", &xml[..start], &xml[end..]);
        xml.replace("<os>", "<os firmware='efi'>")
    });
    assert!(error.contains("firmware 'efi'"), "{error}");
    // What a text console does without is left out, and said.
    rig.define(&tiny_guest(&rig, "guest", "qemu").replace(
        "<devices>",
        "<devices><graphics type='vnc' port='-1'/><video><model type='virtio'/></video><input type='tablet' bus='usb'/>",
    ));
    rig.vireo(&["start", "guest"]).ok();
    let info = rig.vireo(&["dominfo", "guest"]).ok();
    for device in ["graphics", "video", "input"] {
        assert!(info.contains(device), "{device} is not in dominfo: {info}");
        assert!(
            rig.domain_log("guest").contains(device),
            "{device} is not in the log"
        );
    }
}

#[test]
fn kvm_where_it_cannot_run_says_why() {
    let rig = Rig::new();
    if vireo_tests::have_kvm() {
        return vireo_tests::left_out("needs a host without /dev/kvm");
    }
    rig.define(&tiny_guest(&rig, "guest", "kvm"));
    let error = rig.vireo(&["start", "guest"]).fails();
    assert!(
        error.contains("kvm") && error.contains("type='qemu'"),
        "{error}"
    );
}

/// Frames that no client would send end their own connection, at most; the daemon goes on.
#[test]
fn frames_of_garbage() {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "guest", "qemu"));
    let call = |program: u32, version: u32, procedure: u32, kind: u32, payload: &[u8]| {
        let mut frame = Vec::new();
        frame.extend_from_slice(&(28 + payload.len() as u32).to_be_bytes());
        for word in [program, version, procedure, kind, 0, 0] {
            frame.extend_from_slice(&word.to_be_bytes());
        }
        frame.extend_from_slice(payload);
        frame
    };
    let remote = 0x2000_8086;
    let cases: Vec<Vec<u8>> = vec![
        vec![0xff; 4],                                                // a length of 4 GiB
        0x0200_0001u32.to_be_bytes().to_vec(),                        // one over the limit
        3u32.to_be_bytes().to_vec(),                                  // shorter than itself
        vec![0, 0],                                                   // cut in the length
        call(remote, 1, 66, 0, &[])[..20].to_vec(),                   // cut in the header
        call(remote, 1, 1, 0, &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]), // a string of 4 GiB
        call(remote, 1, 1, 0, &[0, 0, 0, 1]),                         // arguments that end early
        call(remote, 1, 99_999, 0, &[]),                              // no such procedure
        call(0x1234, 1, 1, 0, &[]),                                   // no such program
        call(remote, 9, 1, 0, &[]),                                   // no such version
        call(remote, 1, 1, 9, &[]),                                   // no such type
        call(remote, 1, 201, 3, b"stream data for nobody"),
        call(remote, 1, 11, 4, &[0xff; 8]), // descriptors that never come
    ];
    for (number, bytes) in cases.iter().enumerate() {
        let mut socket = UnixStream::connect(rig.socket()).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        let _ = socket.write_all(bytes);
        let mut answer = [0; 4096];
        let _ = socket.read(&mut answer);
        assert_eq!(
            rig.vireo(&["domid", "guest"]).ok(),
            "-\n\n",
            "after case {number}"
        );
    }
    // Random bytes, and a client that sends half a call and stays.
    let mut seed = 0x2545_f491_4f6c_dd1du64;
    println!("seed {seed:#x}");
    let mut stay = Vec::new();
    for _ in 0..50 {
        let mut socket = UnixStream::connect(rig.socket()).unwrap();
        let bytes: Vec<u8> = (0..64)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect();
        let _ = socket.write_all(&bytes);
        stay.push(socket);
    }
    assert_eq!(rig.vireo(&["domid", "guest"]).ok(), "-\n\n");
}

/// A client that goes away in the middle of a console frees it.
#[test]
fn a_console_whose_client_is_killed_is_free_again() {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "guest", "qemu"));
    rig.vireo(&["start", "guest"]).ok();
    for _ in 0..3 {
        let mut terminal = Terminal::start(rig.command("vireo").args(["console", "guest"]));
        terminal.expect("Escape character", Duration::from_secs(30));
        terminal.wait_raw(Duration::from_secs(30));
        terminal.send("x");
        terminal.expect("x", Duration::from_secs(30));
        // SAFETY: kill has no memory effects; the child is ours and not reaped yet.
        unsafe { libc::kill(terminal.pid(), libc::SIGKILL) };
        terminal.wait(Duration::from_secs(30));
        // The daemon sees the hang-up within a moment.
        std::thread::sleep(Duration::from_millis(200));
    }
    let mut first = Terminal::start(rig.command("vireo").args(["console", "guest"]));
    first.expect("Escape character", Duration::from_secs(30));
    first.wait_raw(Duration::from_secs(30));
    let mut second = Terminal::start(rig.command("vireo").args(["console", "guest"]));
    second.expect(
        "Active console session exists for this domain",
        Duration::from_secs(30),
    );
    let mut third = Terminal::start(rig.command("vireo").args(["console", "guest", "--force"]));
    third.expect("Escape character", Duration::from_secs(30));
    third.wait_raw(Duration::from_secs(30));
    third.send("y");
    third.expect("y", Duration::from_secs(30));
}
