//! Every command of issue 2 through `vireo` and through the stock virsh, with the same output.

use std::time::Duration;

use vireo_tests::{Rig, Run, left_out, tiny_guest, which};

/// Runs the same command through both clients and demands the same output, error and status.
#[track_caller]
fn same(rig: &Rig, args: &[&str]) -> Run {
    let ours = rig.vireo(args);
    if which("virsh") {
        let theirs = rig.virsh(args);
        assert_eq!(
            ours, theirs,
            "{args:?}: vireo (left) and virsh (right) differ"
        );
    }
    ours
}

fn two_domains() -> Rig {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    rig.define(&tiny_guest(&rig, "two", "qemu").replace(
        "  <memory",
        "  <title>The second</title>\n  <description>Of two</description>\n  <memory",
    ));
    rig
}

#[test]
fn list_with_all_its_options() {
    let rig = two_domains();
    rig.vireo(&["start", "one"]).ok();
    rig.vireo(&["autostart", "two"]).ok();
    let options: &[&[&str]] = &[
        &[],
        &["--all"],
        &["--inactive"],
        &["--all", "--name"],
        &["--all", "--uuid"],
        &["--all", "--id"],
        &["--id"],
        &["--all", "--name", "--uuid"],
        &["--all", "--title"],
        &["--all", "--table", "--title"],
        &["--all", "--managed-save"],
        &["--all", "--autostart"],
        &["--all", "--no-autostart"],
        &["--all", "--persistent"],
        &["--all", "--transient"],
        &["--all", "--with-snapshot"],
        &["--all", "--without-snapshot"],
        &["--all", "--state-running"],
        &["--all", "--state-paused"],
        &["--all", "--state-shutoff"],
        &["--all", "--state-other"],
        &["--all", "--with-managed-save"],
        &["--all", "--without-managed-save"],
        &["--name", "--table"],
        &["--bogus"],
        &["bogus"],
    ];
    for extra in options {
        let args: Vec<&str> = [&["list"], *extra].concat();
        same(&rig, &args);
    }
    let all = rig.vireo(&["list", "--all"]).ok();
    assert_eq!(
        all,
        " Id   Name   State\n-----------------------\n 1    one    running\n -    two    shut off\n\n"
    );
}

#[test]
fn facts_about_a_domain_and_the_node() {
    let rig = two_domains();
    rig.vireo(&["start", "one"]).ok();
    for domain in ["one", "two", "nobody"] {
        for command in [
            "domstate",
            "domid",
            "domuuid",
            "domname",
            "dumpxml",
            "ttyconsole",
        ] {
            same(&rig, &[command, domain]);
        }
        same(&rig, &["domstate", "--reason", domain]);
        same(&rig, &["dumpxml", "--inactive", domain]);
        // CPU time goes on between the two.
        let strip = |run: Run| {
            run.out
                .lines()
                .filter(|l| !l.starts_with("CPU time"))
                .collect::<Vec<_>>()
                .join("\n")
                + &run.err
        };
        let ours = strip(rig.vireo(&["dominfo", domain]));
        if which("virsh") {
            assert_eq!(ours, strip(rig.virsh(&["dominfo", domain])));
        }
    }
    for command in ["nodeinfo", "capabilities", "domcapabilities", "hostname"] {
        same(&rig, &[command]);
    }
    assert_eq!(
        rig.vireo(&["domname", rig.vireo(&["domuuid", "two"]).ok().trim()])
            .ok(),
        "two\n\n"
    );
    assert_eq!(rig.vireo(&["domid", "one"]).ok(), "1\n\n");
    assert_eq!(rig.vireo(&["domid", "two"]).ok(), "-\n\n");
    let uri = rig.vireo(&["uri"]).ok();
    assert!(uri.contains("///system"), "{uri}");
    let version = rig.vireo(&["version", "--daemon"]).ok();
    assert!(version.contains("Running against daemon:"), "{version}");
}

#[test]
fn life_of_a_domain() {
    let rig = two_domains();
    assert_eq!(
        rig.vireo(&["start", "one"]).ok(),
        "Domain 'one' started\n\n"
    );
    assert_eq!(rig.state("one"), "running (booted)");
    let again = same(&rig, &["start", "one"]).fails();
    assert!(again.contains("error: Domain is already active"), "{again}");
    assert_eq!(
        rig.vireo(&["suspend", "one"]).ok(),
        "Domain 'one' suspended\n\n"
    );
    assert_eq!(rig.state("one"), "paused (user)");
    assert_eq!(
        rig.vireo(&["resume", "one"]).ok(),
        "Domain 'one' resumed\n\n"
    );
    assert_eq!(rig.state("one"), "running (unpaused)");
    assert_eq!(
        rig.vireo(&["reset", "one"]).ok(),
        "Domain 'one' was reset\n\n"
    );
    assert_eq!(
        rig.vireo(&["reboot", "one"]).ok(),
        "Domain 'one' is being rebooted\n\n"
    );
    assert_eq!(
        rig.vireo(&["shutdown", "one"]).ok(),
        "Domain 'one' is being shutdown\n\n"
    );
    assert_eq!(
        rig.vireo(&["destroy", "one"]).ok(),
        "Domain 'one' destroyed\n\n"
    );
    assert_eq!(rig.state("one"), "shut off (destroyed)");
    for command in [
        "destroy", "suspend", "resume", "reset", "reboot", "shutdown",
    ] {
        same(&rig, &[command, "one"]).fails();
    }
    assert_eq!(
        rig.vireo(&["start", "one", "--paused"]).ok(),
        "Domain 'one' started\n\n"
    );
    assert_eq!(rig.state("one"), "paused (user)");
    assert_eq!(
        rig.vireo(&["destroy", "--graceful", "one"]).ok(),
        "Domain 'one' destroyed\n\n"
    );
    assert_eq!(
        rig.vireo(&["autostart", "one"]).ok(),
        "Domain 'one' marked as autostarted\n\n"
    );
    assert!(rig.path("etc/vireo/domains/autostart/one.xml").exists());
    assert_eq!(
        rig.vireo(&["autostart", "--disable", "one"]).ok(),
        "Domain 'one' unmarked as autostarted\n\n"
    );
    assert!(!rig.path("etc/vireo/domains/autostart/one.xml").exists());
    assert_eq!(
        rig.vireo(&["undefine", "one"]).ok(),
        "Domain 'one' has been undefined\n\n"
    );
    assert!(!rig.path("etc/vireo/domains/one.xml").exists());
    same(&rig, &["domstate", "one"]).fails();
    // A transient domain is gone with its end.
    let file = rig.write("t.xml", tiny_guest(&rig, "transient", "qemu"));
    assert_eq!(
        rig.vireo(&["create", &file]).ok(),
        format!("Domain 'transient' created from {file}\n\n")
    );
    assert_eq!(
        rig.vireo(&["list", "--transient", "--name"]).ok(),
        "transient\n\n"
    );
    rig.vireo(&["destroy", "transient"]).ok();
    rig.vireo(&["domstate", "transient"]).fails();
    assert!(rig.processes("vireo-vmm").is_empty());
}

/// The whole life through the stock virsh.
#[test]
fn life_of_a_domain_through_stock_virsh() {
    if !which("virsh") {
        return left_out("needs virsh (libvirt-clients)");
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let file = rig.write("t.xml", tiny_guest(&rig, "guest", "qemu"));
    assert_eq!(
        rig.virsh(&["define", &file]).ok(),
        format!("Domain 'guest' defined from {file}\n\n")
    );
    let steps: &[(&[&str], &str)] = &[
        (&["start", "guest"], "running (booted)"),
        (&["suspend", "guest"], "paused (user)"),
        (&["resume", "guest"], "running (unpaused)"),
        (&["reset", "guest"], "running (unpaused)"),
        (&["destroy", "guest"], "shut off (destroyed)"),
        (&["start", "--paused", "guest"], "paused (user)"),
        (&["destroy", "--graceful", "guest"], "shut off (destroyed)"),
        (&["autostart", "guest"], "shut off (destroyed)"),
        (&["autostart", "--disable", "guest"], "shut off (destroyed)"),
    ];
    for (args, state) in steps {
        rig.virsh(args).ok();
        assert_eq!(
            rig.virsh(&["domstate", "--reason", "guest"]).ok().trim(),
            *state,
            "after {args:?}"
        );
    }
    rig.virsh(&["undefine", "guest"]).ok();
    assert_eq!(rig.virsh(&["list", "--all", "--name"]).ok(), "\n");
    rig.virsh(&["create", &file, "--paused"]).ok();
    rig.virsh(&["destroy", "guest"]).ok();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn dumpxml_is_valid_and_stable() {
    let rig = two_domains();
    let first = rig.vireo(&["dumpxml", "one"]).ok();
    rig.define(&first);
    assert_eq!(rig.vireo(&["dumpxml", "one"]).ok(), first);
    rig.vireo(&["start", "one"]).ok();
    let live = rig.vireo(&["dumpxml", "one"]).ok();
    assert!(live.contains("<domain type='qemu' id='1'>"), "{live}");
    assert!(live.contains("/dev/pts/"), "{live}");
    let schema = "/usr/share/libvirt/schemas/domain.rng";
    if !std::path::Path::new(schema).exists() || !which("xmllint") {
        return left_out("needs libvirt's schemas (libvirt0) and xmllint");
    }
    for (name, xml) in [("inactive", &first), ("live", &live)] {
        let file = rig.write("check.xml", xml);
        let output = std::process::Command::new("xmllint")
            .args(["--noout", "--relaxng", schema, &file])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{name}: {}\n{xml}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn secrets_are_for_those_who_ask_and_may_write() {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "guest", "qemu").replace(
        "<devices>",
        "<devices><graphics type='vnc' port='-1' passwd='hunter2'/>",
    ));
    assert!(!rig.vireo(&["dumpxml", "guest"]).ok().contains("hunter2"));
    let secure = ["dumpxml", "guest", "--security-info"];
    assert!(rig.vireo(&secure).ok().contains("hunter2"));
    let refused = rig
        .vireo(&["-r", "dumpxml", "guest", "--security-info"])
        .fails();
    assert!(!refused.contains("hunter2"), "{refused}");
    assert!(refused.contains("operation forbidden"), "{refused}");
    // What is stored has it still.
    rig.vireo(&["autostart", "guest"]).ok();
    assert!(rig.vireo(&secure).ok().contains("hunter2"));
}

#[test]
fn shell_takes_commands_from_standard_input_and_arguments() {
    let rig = two_domains();
    let run = rig.vireo_with_input(&["-q"], "domid one\nlist --all --name; domstate 'two'\n");
    assert!(run.out.contains("one\ntwo\n"), "{run:?}");
    assert!(run.out.contains("shut off"), "{run:?}");
    let run = rig.vireo(&["domstate one; domstate two"]).ok();
    assert_eq!(run, "shut off\n\nshut off\n\n");
    let help = rig.vireo(&["help"]).ok();
    for group in [
        "Domain Management",
        "Domain Monitoring",
        "Host and Hypervisor",
    ] {
        assert!(help.contains(group), "{help}");
    }
    let help = rig.vireo(&["help", "start"]).ok();
    assert!(
        help.contains("SYNOPSIS") && help.contains("--console"),
        "{help}"
    );
    let unknown = same(&rig, &["frobnicate"]);
    assert_eq!(unknown.status, 1);
}

#[test]
fn interactive_shell_has_history_and_completion() {
    let rig = two_domains();
    let mut terminal = vireo_tests::Terminal::start(rig.command("vireo").env("TERM", "vt100"));
    let soon = Duration::from_secs(30);
    terminal.expect("vireo # ", soon);
    terminal.send("domstate tw\t\r");
    terminal.expect("shut off", soon);
    terminal.expect("vireo # ", soon);
    // The arrow up brings it back.
    terminal.send("\x1b[A\r");
    terminal.expect("shut off", soon);
    terminal.send("quit\r");
    assert_eq!(terminal.wait(soon), 0);
}

#[test]
fn host_validate_says_which_cpu_guests_get() {
    let rig = Rig::new();
    let run = rig.vireo(&["host-validate"]);
    assert!(run.out.contains("/dev/kvm"), "{run:?}");
    assert!(
        run.out.contains("software CPU") || run.out.contains("KVM"),
        "{run:?}"
    );
}

/// What a stock libvirt says here, compared with it by hand.
#[test]
fn answers_that_scripts_read() {
    let rig = Rig::new();
    let channel =
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
    let xml = tiny_guest(&rig, "one", "qemu")
        .replace("<vcpu>1</vcpu>", "<vcpu current='3'>4</vcpu>")
        .replace("</devices>", &format!("{channel}</devices>"));
    rig.define(&xml);
    // A domain that is off uses what it will have.
    rig.vireo(&["setmem", "one", "8M", "--config"]).ok();
    let info = rig.vireo(&["dominfo", "one"]).ok();
    assert!(info.contains("Used memory:    8192 KiB"), "{info}");
    // Those that can't go come first.
    let error = rig.vireo(&["setvcpu", "one", "1", "--disable", "--config"]);
    let error = error.fails();
    let words = "vcpu '1' can't be modified as it is followed by non-hotpluggable online vcpus";
    assert!(error.contains(words), "{error}");
    rig.vireo(&["setvcpu", "one", "2", "--disable", "--config"])
        .ok();
    rig.vireo(&["setvcpu", "one", "3", "--enable", "--config"])
        .ok();
    // Whoever means a running domain hears that it is off before anything is said of the document.
    let bad = rig.write("bad.xml", "<disk");
    for command in ["attach-device", "detach-device", "update-device"] {
        let error = rig.vireo(&[command, "one", &bad, "--live"]).fails();
        assert!(error.contains("domain is not running"), "{error}");
    }
    let error = rig.vireo(&["qemu-agent-command", "one", "x"]).fails();
    assert!(error.contains("domain is not running"), "{error}");
    for (part, words) in [
        (
            "<interface type='network'><mac address='zz'/><source network='d'/></interface>",
            "unable to parse mac address 'zz'",
        ),
        (
            "<interface type='network'><mac address='53:54:00:00:00:01'/><source network='d'/></interface>",
            "expected unicast mac address, found multicast '53:54:00:00:00:01'",
        ),
        (
            "<disk type='file'><source file='/x'/><target dev='foo'/></disk>",
            "Unknown disk name 'foo' and no address specified",
        ),
        (
            "<disk type='file'><target dev='vda'/></disk>",
            "error: missing source information for device vda",
        ),
        (
            "<disk type='file'><driver name='tap'/><source file='/x'/><target dev='vda'/></disk>",
            "unsupported driver name 'tap' for disk 'vda'",
        ),
    ] {
        let xml = tiny_guest(&rig, "bad", "qemu");
        let file = rig.write(
            "bad.xml",
            xml.replace("</devices>", &format!("{part}</devices>")),
        );
        let error = rig.vireo(&["define", &file]).fails();
        assert!(error.contains(words), "{error}");
    }
    // Nothing in a document that another host gets is this run's only.
    rig.vireo(&["start", "one"]).ok();
    let live = rig.vireo(&["dumpxml", "one"]).ok();
    let moved = rig.vireo(&["dumpxml", "one", "--migratable"]).ok();
    for part in [
        "'qemu' id='",
        "<alias",
        "/dev/pts/",
        "domain-1-one",
        "state='",
    ] {
        assert!(live.contains(part), "{part}: {live}");
        assert!(!moved.contains(part), "{part}: {moved}");
    }
    assert!(moved.contains("org.qemu.guest_agent.0"), "{moved}");
    let file = rig.write("moved.xml", &moved);
    rig.vireo(&["destroy", "one"]).ok();
    rig.vireo(&["define", &file]).ok();
}

/// A file in UTF-16, as a Windows editor leaves it.
#[test]
fn definitions_in_utf16() {
    let rig = Rig::new();
    let xml =
        tiny_guest(&rig, "one", "qemu").replace("  <memory", "  <title>Grün 🌲</title>\n  <memory");
    let text = format!("<?xml version='1.0' encoding='UTF-16'?>\n{xml}");
    let bytes = text.encode_utf16().flat_map(u16::to_le_bytes);
    let file: Vec<u8> = [0xff, 0xfe].into_iter().chain(bytes).collect();
    let path = rig.write("utf16.xml", &file);
    rig.vireo(&["define", &path]).ok();
    assert_eq!(rig.vireo(&["desc", "one", "--title"]).ok(), "Grün 🌲\n");
    let path = rig.write("torn.xml", &file[..file.len() - 1]);
    let error = rig.vireo(&["define", &path]).fails();
    assert!(error.contains("it is not UTF-8 text"), "{error}");
}
