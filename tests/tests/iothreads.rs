//! I/O threads of a running domain: which threads serve which disk, where they run, and what is refused.

use std::fs;
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, left_out, linux_guest, tiny_guest};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(90);

/// One line of a guest's shell, up to the mark that follows it.
fn shell(terminal: &mut Terminal, line: &str) -> String {
    terminal.send(&format!("{line}; echo DO''NE\r"));
    terminal.expect("DO''NE", SOON);
    terminal.expect("DONE\r\n", SOON)
}

/// Names of a VMM's threads, and the CPUs of the host each may run on.
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
        all.push((field("Name:"), field("Cpus_allowed_list:")));
    }
    all
}

/// Where the threads of that name may run.
fn of(rig: &Rig, name: &str) -> Vec<String> {
    let own = threads(rig).into_iter().filter(|(own, _)| own == name);
    own.map(|(_, cpus)| cpus).collect()
}

/// Waits until the threads of that name are as they should be.
#[track_caller]
fn until(rig: &Rig, name: &str, fine: impl Fn(&[String]) -> bool) {
    let deadline = Instant::now() + SOON;
    while !fine(&of(rig, name)) {
        assert!(Instant::now() < deadline, "{name}: {:?}", threads(rig));
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn cpus_of_the_host() -> Vec<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mut lines = status.lines();
    let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let mut all = Vec::new();
    for part in list.unwrap().trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = first.parse::<u32>().unwrap()..=last.parse().unwrap();
        all.extend(range.map(|cpu| cpu.to_string()));
    }
    all
}

/// What `iothreadinfo` lists: numbers, and CPUs.
fn listed(rig: &Rig, how: &str) -> Vec<(String, String)> {
    let shown = rig.vireo(&["iothreadinfo", "deb", how]).ok();
    let rows = shown.lines().skip(2).filter_map(|row| {
        let mut words = row.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    });
    rows.collect()
}

#[test]
fn a_disks_threads_are_its_iothreads() {
    let cpus = cpus_of_the_host();
    let [first, .., last] = &cpus[..] else {
        return left_out("needs two CPUs");
    };
    let rig = Rig::new();
    let image = rig.write("vda.img", vec![1; 8 << 20]);
    let more = rig.write("vdb.img", vec![2; 1 << 20]);
    let xml = linux_guest("deb", Kernel::V6_12)
        .replace(
            "</vcpu>",
            &format!(
                "</vcpu>\n  <iothreads>2</iothreads>\n  <cputune>\
                 <iothreadpin iothread='2' cpuset='{last}'/>\
                 <iothreadsched iothreads='2' scheduler='batch'/></cputune>"
            ),
        )
        .replace(
            "<devices>",
            &format!(
                "<devices><disk type='file'><driver name='qemu' type='raw' iothread='1'/>\
                 <source file='{image}'/><target dev='vda' bus='virtio'/></disk>"
            ),
        );
    rig.define(&xml);
    let mut start = rig.command("vireo");
    let mut terminal = Terminal::start(start.args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    terminal.send("stty cols 500\r");
    terminal.expect("deb:/root# ", SOON);

    // The disk has no threads elsewhere; the other one is where the definition wants it.
    let read = |disk: &str| format!("dd if=/dev/{disk} of=/dev/null bs=64k iflag=direct");
    shell(&mut terminal, &read("vda"));
    assert!(of(&rig, "iothread1").len() >= 2, "{:?}", threads(&rig));
    let strays = threads(&rig);
    let stray = |(name, _): &&(String, String)| name.starts_with("virtio-blk") || name == "disk";
    assert_eq!(strays.iter().find(stray), None);
    assert_eq!(of(&rig, "iothread2"), [last.as_str()]);
    assert_eq!(listed(&rig, "--live")[1], ("2".to_owned(), last.clone()));
    assert_eq!(listed(&rig, "--config").len(), 2);
    let scheduler = |name: &str| {
        let pid = rig.processes("vireo-vmm")[0];
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let mut tasks = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
        let is = |task: &String| {
            let comm = fs::read_to_string(format!("/proc/{pid}/task/{task}/comm"));
            comm.is_ok_and(|comm| comm.trim() == name)
        };
        let task = tasks.find(is).unwrap().parse().unwrap();
        // SAFETY: asks for a number.
        unsafe { libc::sched_getscheduler(task) }
    };
    assert_eq!(scheduler("iothread2"), libc::SCHED_BATCH);
    assert_eq!(scheduler("iothread1"), libc::SCHED_OTHER);

    // Pinned: those that are there, and those that come later (workers, and the queues' after a pause).
    rig.vireo(&["iothreadpin", "deb", "1", first, "--live"])
        .ok();
    let pinned = |of: &[String]| of.len() >= 2 && of.iter().all(|cpus| cpus == first);
    assert!(pinned(&of(&rig, "iothread1")), "{:?}", threads(&rig));
    rig.vireo(&[
        "iothreadset",
        "deb",
        "1",
        "--thread-pool-min",
        "3",
        "--thread-pool-max",
        "5",
    ])
    .ok();
    until(&rig, "iothread1", |of| of.len() >= 5);
    rig.vireo(&["suspend", "deb"]).ok();
    rig.vireo(&["resume", "deb"]).ok();
    shell(&mut terminal, &read("vda"));
    assert!(pinned(&of(&rig, "iothread1")), "{:?}", threads(&rig));
    let all_cpus = of(&rig, "vcpu0");
    assert_ne!(all_cpus, [first.as_str()]);
    assert_eq!(of(&rig, "iothread2"), [last.as_str()]);

    // The next daemon knows.
    rig.kill_daemon();
    drop(terminal);
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", "deb"]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("\r");
    terminal.expect("deb:/root# ", SOON);
    assert_eq!(
        listed(&rig, "--live"),
        [
            ("1".to_owned(), first.clone()),
            ("2".to_owned(), last.clone())
        ]
    );
    let live = rig.vireo(&["dumpxml", "deb"]).ok();
    for part in [
        format!("<iothreadpin iothread='1' cpuset='{first}'/>"),
        "<iothread id='1' thread_pool_min='3' thread_pool_max='5'/>".to_owned(),
    ] {
        assert!(live.contains(&part), "no {part}: {live}");
    }
    let stored = rig.vireo(&["dumpxml", "deb", "--inactive"]).ok();
    assert!(!stored.contains("<iothreadpin iothread='1'"), "{stored}");
    assert!(!stored.contains("thread_pool_min"), "{stored}");

    // One comes, serves a disk that comes too, and goes after it.
    rig.vireo(&[
        "iothreadset",
        "deb",
        "1",
        "--poll-max-ns",
        "5000",
        "--poll-shrink",
        "4",
    ])
    .ok();
    rig.vireo(&["iothreadadd", "deb", "5", "--live"]).ok();
    rig.vireo(&[
        "attach-disk",
        "deb",
        &more,
        "vdb",
        "--iothread",
        "5",
        "--live",
    ])
    .ok();
    shell(&mut terminal, "until [ -b /dev/vdb ]; do sleep 0.1; done");
    shell(&mut terminal, &read("vdb"));
    assert!(of(&rig, "iothread5").len() >= 2, "{:?}", threads(&rig));
    let stats = rig.vireo(&["domstats", "deb", "--iothread"]).ok();
    for line in [
        "iothread.count=3",
        "iothread.1.poll-max-ns=5000",
        "iothread.1.poll-shrink=4",
        "iothread.5.poll-max-ns=0",
    ] {
        assert!(stats.contains(line), "no {line}: {stats}");
    }
    let refused = rig.vireo(&["iothreaddel", "deb", "5", "--live"]).fails();
    assert!(
        refused.contains("cannot remove IOThread 5 since it is being used by disk 'vdb'"),
        "{refused}"
    );
    rig.vireo(&["detach-disk", "deb", "vdb", "--live"]).ok();
    let deadline = Instant::now() + SOON;
    while rig.vireo(&["domblklist", "deb"]).ok().contains("vdb") {
        assert!(Instant::now() < deadline, "the disk stays");
        std::thread::sleep(Duration::from_millis(100));
    }
    rig.vireo(&["iothreaddel", "deb", "5", "--live"]).ok();
    until(&rig, "iothread5", <[String]>::is_empty);
    rig.vireo(&["destroy", "deb"]).ok();
    assert_eq!(listed(&rig, "--config").len(), 2);
}

/// In libvirt's words.
#[test]
fn what_makes_no_sense_is_refused() {
    let rig = Rig::new();
    let image = rig.write("vda.img", vec![1; 1 << 20]);
    let xml = tiny_guest(&rig, "deb", "qemu")
        .replace("</vcpu>", "</vcpu><iothreads>2</iothreads>")
        .replace(
            "<devices>",
            &format!(
                "<devices><disk type='file'><driver name='qemu' type='raw' iothread='1'/>\
                 <source file='{image}'/><target dev='vda' bus='virtio'/></disk>"
            ),
        );
    let bad = rig.write("bad.xml", xml.replace("iothread='1'", "iothread='4'"));
    let error = rig.vireo(&["define", &bad]).fails();
    assert!(
        error.contains("unsupported configuration: Disk iothread '4' not defined in iothreadid"),
        "{error}"
    );
    rig.define(&xml);
    rig.vireo(&["start", "deb"]).ok();
    for (line, wanted) in [
        (
            "iothreadpin deb 7 0",
            "invalid argument: iothread 7 not found",
        ),
        (
            "iothreadpin deb 7 0 --config",
            "invalid argument: iothreadid 7 not found",
        ),
        (
            "iothreadadd deb 2",
            "invalid argument: an IOThread is already using iothread_id '2'",
        ),
        (
            "iothreaddel deb 1",
            "invalid argument: cannot remove IOThread 1 since it is being used by disk 'vda'",
        ),
        (
            "iothreaddel deb 9",
            "invalid argument: cannot find IOThread '9' in iothreadids list",
        ),
        (
            "iothreadset deb 9 --poll-max-ns 8",
            "invalid argument: cannot find IOThread '9' in iothreadids",
        ),
        (
            "iothreadset deb 1 --poll-max-ns 5000 --config",
            "Operation not supported: configuring persistent polling values is not supported",
        ),
        (
            "iothreadset deb 1 --thread-pool-min 4 --thread-pool-max 2",
            "Requested operation is not valid: thread_pool_min (4) can't be greater than thread_pool_max (2)",
        ),
        (
            "iothreadset deb 1 --thread-pool-min -2",
            "unsupported configuration: thread_pool_min (-2) must be equal to or greater than -1",
        ),
        (
            "iothreadset deb 1 --thread-pool-min 0",
            "Requested operation is not valid: thread_pool_min (0) can't be greater than thread_pool_max (-1)",
        ),
        (
            "iothreadset deb 1 --thread-pool-max 0",
            "unsupported configuration: thread_pool_max (0) must be a positive number or -1",
        ),
    ] {
        let args: Vec<&str> = line.split(' ').collect();
        let error = rig.vireo(&args).fails();
        assert!(error.contains(wanted), "{line}: {error}");
    }
    // All that was refused has changed nothing; what comes and goes in both comes and goes in both.
    rig.vireo(&["iothreadadd", "deb", "7", "--live", "--config"])
        .ok();
    until(&rig, "iothread7", |of| of.len() == 1);
    assert_eq!(listed(&rig, "--live").len(), 3);
    assert_eq!(listed(&rig, "--config").len(), 3);
    rig.vireo(&["iothreaddel", "deb", "7", "--live", "--config"])
        .ok();
    until(&rig, "iothread7", <[String]>::is_empty);
    assert_eq!(listed(&rig, "--config").len(), 2);
    // A saved guest comes back with what it had.
    rig.vireo(&["iothreadadd", "deb", "9", "--live"]).ok();
    let cpu = cpus_of_the_host()[0].clone();
    rig.vireo(&["iothreadpin", "deb", "9", &cpu, "--live"]).ok();
    rig.vireo(&["managedsave", "deb"]).ok();
    rig.vireo(&["start", "deb"]).ok();
    assert_eq!(of(&rig, "iothread9"), [cpu.as_str()]);
    assert_eq!(listed(&rig, "--live")[2], ("9".to_owned(), cpu));
    rig.vireo(&["destroy", "deb"]).ok();
}
