//! vCPUs that come and go: in a Linux guest, over a save, a migration and a reset; and what clients are told.

use std::fs;
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, left_out, linux_guest, tiny_guest, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(90);

fn console(rig: &Rig, name: &str) -> Terminal {
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", name]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("\r");
    terminal.expect("deb:/root# ", SOON);
    terminal
}

/// A shell on a console that has just come up.
fn ready(mut terminal: Terminal) -> Terminal {
    terminal.expect("deb:/root# ", BOOT);
    // Long lines are not to be broken by the guest's line editor.
    terminal.send("stty cols 500\r");
    terminal.expect("deb:/root# ", SOON);
    terminal
}

/// One line of a guest's shell, up to the mark that follows it.
fn shell(terminal: &mut Terminal, line: &str) -> String {
    terminal.send(&format!("{line}; echo DO''NE\r"));
    terminal.expect("DO''NE", SOON);
    terminal.expect("DONE\r\n", SOON)
}

/// Waits until the guest knows these vCPUs; those that have come are switched on, as udev does elsewhere.
#[track_caller]
fn guest_has(terminal: &mut Terminal, cpus: &str) {
    let deadline = Instant::now() + SOON;
    let line = "cd /sys/devices/system/cpu; for c in cpu[0-9]*/online; do \
                [ $(cat $c) = 1 ] || echo 1 >$c; done; echo \"<$(cat present) $(cat online)>\"; cd";
    loop {
        let seen = shell(terminal, line);
        if seen.contains(&format!("<{cpus} {cpus}>")) {
            return;
        }
        assert!(Instant::now() < deadline, "{cpus}: {seen}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// How many vCPUs the running domain has.
fn count(rig: &Rig) -> String {
    let counted = rig.vireo(&["vcpucount", "deb", "--live", "--active"]);
    counted.ok().trim().to_owned()
}

/// A guest under load may take longer than libvirt's five seconds to let go.
#[track_caller]
fn unplug(rig: &Rig, args: &[&str], left: &str) {
    let done = rig.vireo(args);
    if done.status != 0 {
        assert!(done.fails().contains("vcpu unplug request timed out"));
    }
    let deadline = Instant::now() + SOON;
    while count(rig) != left {
        assert!(Instant::now() < deadline, "{} are left", count(rig));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// CPU time of a vCPU, nanoseconds.
fn time(rig: &Rig, vcpu: u32) -> u64 {
    let stats = rig.vireo(&["domstats", "deb", "--vcpu"]).ok();
    let field = format!("vcpu.{vcpu}.time=");
    let line = stats
        .lines()
        .find_map(|line| line.trim().strip_prefix(&field));
    line.map_or(0, |time| time.parse().unwrap())
}

/// Names of a VMM's vCPU threads, and the CPUs of the host each may run on.
fn threads(rig: &Rig) -> Vec<(String, String)> {
    let pid = rig.processes("vireo-vmm")[0];
    let mut all = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap().path();
        // Another thread may end meanwhile.
        let status = fs::read_to_string(task.join("status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        let name = field("Name:");
        if name.starts_with("vcpu") {
            all.push((name, field("Cpus_allowed_list:")));
        }
    }
    all.sort();
    all
}

/// `<topology>`: what Linux makes of it, of a vCPU that comes later too.
#[test]
fn a_linux_guest_sees_sockets_cores_and_threads() {
    let rig = Rig::new();
    let cpu = |sockets: u32| {
        let topology = format!("<topology sockets='{sockets}' dies='1' cores='2' threads='2'/>");
        linux_guest("deb", Kernel::V6_12).replace(
            "<vcpu>1</vcpu>",
            &format!("<vcpu current='7'>8</vcpu>\n  <cpu mode='custom'>{topology}</cpu>"),
        )
    };
    let odd = rig.write("odd.xml", cpu(3));
    let error = rig.vireo(&["define", &odd]).fails();
    assert!(
        error.contains("unsupported configuration: CPU topology doesn't match maximum vcpu count"),
        "{error}"
    );
    rig.define(&cpu(2));
    let mut start = rig.command("vireo");
    let mut terminal = ready(Terminal::start(start.args(["start", "deb", "--console"])));
    let line = "cd /sys/devices/system/cpu; for c in cpu[0-9]*; do cd $c/topology; \
                echo \"<${c#cpu} $(cat physical_package_id core_id thread_siblings_list \
                core_siblings_list | tr '\\n' ' ')>\"; cd ../..; done; cd";
    let seen = shell(&mut terminal, line);
    for (cpu, package, threads, cores) in [
        (0, 0, "0-1", "0-3"),
        (3, 0, "2-3", "0-3"),
        (5, 1, "4-5", "4-6"),
        (6, 1, "6", "4-6"),
    ] {
        let own = format!("<{cpu} {package} ");
        let found = seen.lines().find(|text| text.starts_with(&own));
        let found = found.unwrap_or_else(|| panic!("no {own}: {seen}"));
        assert!(found.ends_with(&format!(" {threads} {cores} >")), "{found}");
    }
    // The last one comes, as the second thread of its core.
    rig.vireo(&["setvcpus", "deb", "8", "--live"]).ok();
    guest_has(&mut terminal, "0-7");
    let seen = shell(&mut terminal, line);
    assert!(seen.contains(" 6-7 4-7 >"), "{seen}");
    rig.vireo(&["destroy", "deb"]).ok();
}

/// Three cores, and three threads: APIC ids have gaps then, as real ones do.
#[test]
fn a_linux_guest_sees_uneven_sockets() {
    let (rig, other) = (Rig::new(), Rig::new());
    // Clients are told a socket, not a root: the daemons are there before.
    rig.vireo(&["list"]).ok();
    other.vireo(&["list"]).ok();
    let line = "cd /sys/devices/system/cpu; for c in cpu[0-9]*; do cd $c/topology; \
                echo \"<${c#cpu} $(cat physical_package_id thread_siblings_list core_siblings_list \
                | tr '\\n' ' ')>\"; cd ../..; done; cd; grep apicid /proc/cpuinfo | tr '\\n\\t' ' '";
    for ((cores, threads), ids, seen) in [
        (
            (3, 1),
            [0, 1, 2, 4, 5].as_slice(),
            [
                "<0 0 0 0-2 >",
                "<2 0 2 0-2 >",
                "<3 1 3 3-4 >",
                "<4 1 4 3-4 >",
            ],
        ),
        (
            (3, 2),
            [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12].as_slice(),
            [
                "<1 0 0-1 0-5 >",
                "<5 0 4-5 0-5 >",
                "<6 1 6-7 6-10 >",
                "<10 1 10 6-10 >",
            ],
        ),
    ] {
        let all = 2 * cores * threads;
        let last = all - 1;
        let cpu = format!("<topology sockets='2' cores='{cores}' threads='{threads}'/>");
        rig.define(&linux_guest("deb", Kernel::V6_12).replace(
            "<vcpu>1</vcpu>",
            &format!("<vcpu current='{last}'>{all}</vcpu>\n  <cpu mode='custom'>{cpu}</cpu>"),
        ));
        let mut start = rig.command("vireo");
        let mut terminal = ready(Terminal::start(start.args(["start", "deb", "--console"])));
        let found = shell(&mut terminal, line);
        for cpu in seen {
            assert!(found.contains(cpu), "no {cpu}: {found}");
        }
        let listed: Vec<u32> = found
            .split("initial apicid : ")
            .skip(1)
            .filter_map(|text| text.split_whitespace().next()?.parse().ok())
            .collect();
        assert_eq!(listed, ids, "{found}");
        // The last one comes into the second socket, gets the serial port's interrupts, and goes through a save or a migration.
        rig.vireo(&["setvcpus", "deb", &all.to_string(), "--live"])
            .ok();
        guest_has(&mut terminal, &format!("0-{last}"));
        let irq = "/proc/irq/4";
        shell(
            &mut terminal,
            &format!("echo {last} >{irq}/smp_affinity_list"),
        );
        let found = shell(
            &mut terminal,
            &format!("echo \"<$(cat {irq}/effective_affinity_list)>\""),
        );
        assert!(found.contains(&format!("<{last}>")), "{found}");
        drop(terminal);
        let rig = if threads == 1 {
            let image = rig.path("deb.save").display().to_string();
            rig.vireo(&["save", "deb", &image]).ok();
            rig.vireo(&["restore", &image]).ok();
            &rig
        } else {
            let at = format!("unix://{}", other.path("incoming").display());
            let to = other.uri();
            let options = ["migrate", "--live", "--unsafe", "--undefinesource"];
            rig.vireo(&[&options[..], &["deb", &to, "--migrateuri", &at]].concat())
                .ok();
            &other
        };
        let mut terminal = console(rig, "deb");
        let found = shell(&mut terminal, line);
        let whole = match threads {
            1 => "<5 1 5 3-5 >",
            _ => "<11 1 10-11 6-11 >",
        };
        assert!(found.contains(whole), "{found}");
        rig.vireo(&["destroy", "deb"]).ok();
        if threads == 1 {
            rig.vireo(&["undefine", "deb"]).ok();
        }
    }
}

#[test]
fn a_linux_guest_gets_vcpus_and_lets_go_of_them() {
    let (one, other) = (Rig::new(), Rig::new());
    // Clients are told a socket, not a root: the daemons are there before.
    one.vireo(&["list"]).ok();
    other.vireo(&["list"]).ok();
    one.define(&linux_guest("deb", Kernel::V6_12).replace(
        "<vcpu>1</vcpu>",
        "<vcpu current='1'>4</vcpu><cputune><vcpupin vcpu='2' cpuset='0'/></cputune>",
    ));
    let started = Terminal::start(one.command("vireo").args(["start", "deb", "--console"]));
    let mut terminal = ready(started);
    guest_has(&mut terminal, "0");
    let seen = shell(&mut terminal, "cat /sys/devices/system/cpu/possible");
    assert!(seen.contains("0-3"), "{seen}");

    one.vireo(&["setvcpus", "deb", "3", "--live"]).ok();
    guest_has(&mut terminal, "0-2");
    assert_eq!(count(&one), "3");
    let names = threads(&one);
    let names: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["vcpu0", "vcpu1", "vcpu2"]);
    assert_eq!(threads(&one)[2].1, "0", "as its definition has it");
    let xml = one.vireo(&["dumpxml", "deb"]).ok();
    assert!(
        xml.contains(
            "<vcpu placement='static' current='3'>4</vcpu>\n  <vcpus>\n    \
             <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>\n    \
             <vcpu id='1' enabled='yes' hotpluggable='yes' order='2'/>\n    \
             <vcpu id='2' enabled='yes' hotpluggable='yes' order='3'/>\n    \
             <vcpu id='3' enabled='no' hotpluggable='yes'/>\n  </vcpus>\n"
        ),
        "{xml}"
    );
    // It works there.
    let before = time(&one, 2);
    shell(
        &mut terminal,
        "for n in 1 2 3; do while :; do :; done & done; ps | wc -l",
    );
    let deadline = Instant::now() + SOON;
    while time(&one, 2) < before + 200_000_000 {
        assert!(Instant::now() < deadline, "vCPU 2 does nothing");
        std::thread::sleep(Duration::from_millis(100));
    }
    shell(&mut terminal, "kill $(jobs -p)");

    unplug(&one, &["setvcpu", "deb", "1", "--disable", "--live"], "2");
    guest_has(&mut terminal, "0,2");
    one.vireo(&["setvcpu", "deb", "3", "--enable", "--live"])
        .ok();
    guest_has(&mut terminal, "0,2-3");
    let info = one.vireo(&["vcpuinfo", "deb"]).ok();
    let numbers = info.lines().filter_map(|line| line.strip_prefix("VCPU:"));
    assert_eq!(numbers.map(str::trim).collect::<Vec<_>>(), ["0", "2", "3"]);

    // The next daemon knows, and so does a machine that was saved.
    one.kill_daemon();
    assert_eq!(count(&one), "3");
    drop(terminal);
    one.vireo(&["managedsave", "deb"]).ok();
    one.vireo(&["start", "deb"]).ok();
    assert_eq!(count(&one), "3");
    let mut terminal = console(&one, "deb");
    guest_has(&mut terminal, "0,2-3");
    assert_eq!(threads(&one)[1].1, "0");
    unplug(&one, &["setvcpus", "deb", "2", "--live"], "2");
    guest_has(&mut terminal, "0,2");
    drop(terminal);

    let (uri, at) = (
        other.uri(),
        format!("unix://{}", other.path("incoming").display()),
    );
    one.vireo(&[
        "migrate",
        "--live",
        "--unsafe",
        "deb",
        &uri,
        "--migrateuri",
        &at,
    ])
    .ok();
    assert_eq!(count(&other), "2");
    let mut terminal = console(&other, "deb");
    guest_has(&mut terminal, "0,2");
    other.vireo(&["setvcpus", "deb", "4", "--live"]).ok();
    guest_has(&mut terminal, "0-3");

    // A guest that begins anew finds them there.
    other.vireo(&["reset", "deb"]).ok();
    terminal.expect("Vireo guest:", BOOT);
    let mut terminal = ready(terminal);
    guest_has(&mut terminal, "0-3");
    assert_eq!(count(&other), "4");
    other.vireo(&["destroy", "deb"]).ok();
    // What was plugged was plugged into the running domain.
    one.vireo(&["start", "deb", "--paused"]).ok();
    assert_eq!(count(&one), "1");
    one.vireo(&["destroy", "deb"]).ok();
}

/// Answers of Debian's libvirt 9 with QEMU 7.2 to the same commands.
#[test]
fn clients_are_told_what_libvirt_tells_them() {
    let rig = Rig::new();
    let xml = tiny_guest(&rig, "deb", "qemu").replace("<vcpu>1<", "<vcpu current='1'>4<");
    rig.define(&xml);
    // Nobody in it lets go of anything.
    rig.vireo(&["start", "deb", "--paused"]).ok();
    let mut events = rig.listen("deb");
    let client = |args: &[&str]| match which("virsh") {
        true => rig.virsh(args),
        false => rig.vireo(args),
    };
    let live = |vcpus: &str| {
        let xml = rig.vireo(&["dumpxml", "deb"]).ok();
        assert!(xml.contains(vcpus), "{xml}");
    };
    client(&["setvcpu", "deb", "3", "--enable", "--live"]).ok();
    live(
        "<vcpu placement='static' current='2'>4</vcpu>\n  <vcpus>\n    \
         <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>\n    \
         <vcpu id='1' enabled='no' hotpluggable='yes'/>\n    \
         <vcpu id='2' enabled='no' hotpluggable='yes'/>\n    \
         <vcpu id='3' enabled='yes' hotpluggable='yes' order='2'/>\n  </vcpus>\n",
    );
    let stats = client(&["domstats", "deb", "--vcpu"]).ok();
    for (field, there) in [
        ("vcpu.current=2\n", true),
        ("vcpu.maximum=4\n", true),
        ("vcpu.3.state=1\n", true),
        ("vcpu.1.", false),
    ] {
        assert_eq!(stats.contains(field), there, "{stats}");
    }
    for (line, why) in [
        (
            "setvcpu deb 0 --disable --live",
            "Operation not supported: vcpu '0' can't be unplugged",
        ),
        (
            "setvcpu deb 9 --enable --live",
            "invalid argument: vcpu 9 is not present in live config",
        ),
        (
            "setvcpu deb 2,3 --enable --live",
            "invalid argument: vcpu '3' is already in requested state",
        ),
        (
            "setvcpu deb 2 --disable --live",
            "invalid argument: vcpu '2' is already in requested state",
        ),
        (
            "setvcpu deb 1,2 --enable --live",
            "Operation not supported: only one hotpluggable entity can be selected",
        ),
        (
            "setvcpus deb 5 --live",
            "invalid argument: requested vcpus is greater than max allowable vcpus for the live \
             domain: 5 > 4",
        ),
        (
            "setvcpus deb 1 --live",
            "Timed out during operation: vcpu unplug request timed out. Unplug result must be \
             manually inspected in the domain",
        ),
        (
            "vcpupin deb 9 0",
            "invalid argument: vcpu 9 is out of range of live cpu count 4",
        ),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let said = client(&words).fails();
        assert_eq!(said.trim(), format!("error: {why}"), "{line}");
    }
    client(&["vcpupin", "deb", "2", "0"]).ok();
    client(&["setvcpus", "deb", "4", "--live", "--config"]).ok();
    live("<vcpu placement='static'>4</vcpu>\n");
    live("<vcpu id='2' enabled='yes' hotpluggable='yes' order='4'/>\n");
    let pinned = threads(&rig).into_iter().find(|(name, _)| name == "vcpu2");
    assert_eq!(pinned.unwrap().1, "0", "one that was pinned before it came");
    // The vCPU that was asked for goes when the guest begins anew.
    client(&["reset", "deb"]).ok();
    assert_eq!(count(&rig), "3");
    live("<vcpu id='3' enabled='no' hotpluggable='yes'/>\n");
    let kept = rig.vireo(&["dumpxml", "deb", "--inactive"]).ok();
    assert!(kept.contains("<vcpu placement='static'>4</vcpu>\n"));
    assert!(!kept.contains("<vcpus>"), "{kept}");
    rig.vireo(&["destroy", "deb"]).ok();
    // Without any that can go.
    rig.vireo(&["start", "deb", "--paused"]).ok();
    let said = client(&["setvcpus", "deb", "2", "--live"]).fails();
    assert!(
        said.contains(
            "unsupported configuration: failed to find appropriate hotpluggable vcpus to reach the \
             desired target vcpu count"
        ),
        "{said}"
    );
    rig.vireo(&["destroy", "deb"]).ok();
    events.expect("Stopped", SOON);
    if !which("virsh") {
        left_out("the stock client needs virsh (libvirt-clients)");
    }
}

#[test]
fn a_list_of_vcpus_says_which_there_are() {
    let rig = Rig::new();
    let guest = |vcpus: &str| tiny_guest(&rig, "deb", "qemu").replace("<vcpu>1</vcpu>", vcpus);
    rig.define(&guest(
        "<vcpu>3</vcpu><vcpus><vcpu id='0' enabled='yes'/>\
         <vcpu id='2' enabled='yes' hotpluggable='yes'/></vcpus>",
    ));
    let listed = rig.vireo(&["dumpxml", "deb"]).ok();
    let expected = "<vcpu placement='static' current='2'>3</vcpu>\n  <vcpus>\n    \
                    <vcpu id='0' enabled='yes' hotpluggable='no'/>\n    \
                    <vcpu id='1' enabled='no' hotpluggable='yes'/>\n    \
                    <vcpu id='2' enabled='yes' hotpluggable='yes'/>\n  </vcpus>\n";
    assert!(listed.contains(expected), "{listed}");
    rig.vireo(&["start", "deb", "--paused"]).ok();
    let names: Vec<String> = threads(&rig).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["vcpu0", "vcpu2"]);
    let live = rig.vireo(&["dumpxml", "deb"]).ok();
    let ordered = "<vcpu id='2' enabled='yes' hotpluggable='yes' order='2'/>";
    assert!(live.contains(ordered), "{live}");
    rig.vireo(&["destroy", "deb"]).ok();
    rig.vireo(&["setvcpu", "deb", "1", "--enable", "--config"])
        .ok();
    rig.vireo(&["setvcpu", "deb", "2", "--disable", "--config"])
        .ok();
    let said = rig.vireo(&["setvcpu", "deb", "0", "--disable", "--config"]);
    assert!(said.fails().contains("vCPU '0' can't be modified"));
    let listed = rig.vireo(&["dumpxml", "deb"]).ok();
    for vcpu in [
        "<vcpu id='1' enabled='yes' hotpluggable='yes'/>",
        "<vcpu id='2' enabled='no' hotpluggable='yes'/>",
    ] {
        assert!(listed.contains(vcpu), "{listed}");
    }
    // Without ACPI nobody could be told of others.
    let without = listed.replace("<acpi/>", "");
    rig.define(&without);
    rig.vireo(&["start", "deb", "--paused"]).ok();
    assert_eq!(count(&rig), "2");
    assert!(
        rig.vireo(&["setvcpus", "deb", "3", "--live"])
            .fails()
            .contains("for good")
    );
    rig.vireo(&["destroy", "deb"]).ok();
    for (vcpus, why) in [
        (
            "<vcpu>2</vcpu><vcpus><vcpu id='0' enabled='no'/></vcpus>",
            "vcpu 0 can't be offline",
        ),
        (
            "<vcpu>2</vcpu><vcpus><vcpu id='0' enabled='yes'/><vcpu id='7' enabled='yes'/></vcpus>",
            "vcpu id '7' is out of range of maximum vcpu count",
        ),
    ] {
        let file = rig.write("bad.xml", guest(vcpus).replace("deb", "bad"));
        let said = rig.vireo(&["define", &file]).fails();
        assert!(said.contains(why), "{said}");
    }
}
