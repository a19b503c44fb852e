//! Limits of domains by control groups, of either version: what is asked for is in force, seen in the kernel's own files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vireo_tests::{Rig, Terminal, left_out, tiny_guest};

const SOON: Duration = Duration::from_secs(60);
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "blkio"];

/// Whether groups of these controllers can be made here; says what is missing.
fn can_limit(controllers: &[&str]) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for controller in controllers {
        let writable = mounts.lines().any(|line| {
            let (first, last) = line.split_once(" - ").unwrap();
            let folder = Path::new(first.split(' ').nth(4).unwrap());
            let mut last = last.split(' ');
            let there = match last.next() {
                Some("cgroup") => last.nth(1).unwrap().split(',').any(|o| o == *controller),
                Some("cgroup2") => {
                    let name = if *controller == "blkio" {
                        "io"
                    } else {
                        controller
                    };
                    let all = fs::read_to_string(folder.join("cgroup.controllers"));
                    all.unwrap_or_default()
                        .split_whitespace()
                        .any(|c| c == name)
                }
                _ => false,
            };
            static TRIALS: AtomicU32 = AtomicU32::new(0);
            let number = TRIALS.fetch_add(1, Ordering::Relaxed);
            let trial = folder.join(format!("vireo-trial-{}-{number}", std::process::id()));
            there
                && fs::create_dir(&trial)
                    .and_then(|()| fs::remove_dir(&trial))
                    .is_ok()
        });
        if !writable {
            left_out(&format!(
                "needs root and the cgroup controller {controller}"
            ));
            return false;
        }
    }
    true
}

/// The domain's group that has a file, and the version that the file belongs to.
fn group_with(rig: &Rig, file_v1: &str, file_v2: &str) -> (PathBuf, bool) {
    for group in rig.groups() {
        for (file, first) in [(file_v1, true), (file_v2, false)] {
            if group.join(file).exists() {
                return (group, first);
            }
        }
    }
    panic!("none of {:?} has {file_v1} or {file_v2}", rig.groups());
}

fn text(path: impl AsRef<Path>) -> String {
    let text = fs::read_to_string(path.as_ref());
    text.unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
        .trim()
        .to_owned()
}

/// Period and quota of a group or a part of it.
fn bandwidth(group: &Path, first: bool) -> (String, String) {
    if first {
        return (
            text(group.join("cpu.cfs_period_us")),
            text(group.join("cpu.cfs_quota_us")),
        );
    }
    let text = text(group.join("cpu.max"));
    let (quota, period) = text.split_once(' ').unwrap();
    (period.to_owned(), quota.to_owned())
}

fn hard_limit(group: &Path, first: bool) -> String {
    text(group.join(if first {
        "memory.limit_in_bytes"
    } else {
        "memory.max"
    }))
}

fn guest(rig: &Rig, inside: &str) -> String {
    tiny_guest(rig, "one", "qemu").replace("</vcpu>", &format!("</vcpu>{inside}"))
}

fn values(output: &str) -> Vec<(String, String)> {
    let pair = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.trim().to_owned(), value.trim().to_owned()))
    };
    output.lines().filter_map(pair).collect()
}

#[track_caller]
fn has(output: &str, name: &str, value: &str) {
    let pair = (name.to_owned(), value.to_owned());
    assert!(
        values(output).contains(&pair),
        "{name} is not {value}:\n{output}"
    );
}

#[test]
fn limits_hold_from_the_start_through_changes_and_restarts_to_the_end() {
    if !can_limit(&CONTROLLERS) {
        return;
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let limited = guest(
        &rig,
        "<cputune><shares>300</shares><quota>20000</quota><emulator_period>50000</emulator_period></cputune>\
         <memtune><hard_limit unit='MiB'>500</hard_limit></memtune>\
         <blkiotune><device><path>/nope</path><read_iops_sec>7</read_iops_sec></device></blkiotune>\
         <numatune><memory mode='strict' nodeset='0'/></numatune>",
    );
    rig.define(&limited.replace("<vcpu>1<", "<vcpu current='1'>2<"));
    // A start that fails leaves no group behind.
    let refused = rig.vireo(&["start", "one"]).fails();
    assert!(
        refused.contains("Path '/nope' is not accessible"),
        "{refused}"
    );
    assert_eq!(rig.groups(), Vec::<PathBuf>::new());
    rig.vireo(&["blkiotune", "one", "--device-read-iops-sec", "/nope,0"])
        .ok();
    rig.vireo(&["start", "one"]).ok();

    let (cpu, first) = group_with(&rig, "cpu.shares", "cpu.weight");
    let shares = cpu.join(if first { "cpu.shares" } else { "cpu.weight" });
    assert_eq!(text(&shares), "300");
    let of = |part: &str| bandwidth(&cpu.join(part), first);
    assert_eq!(of("vcpu0"), ("100000".into(), "20000".into()));
    assert_eq!(of("emulator").0, "50000");
    let (memory, memory_first) = group_with(&rig, "memory.limit_in_bytes", "memory.max");
    assert_eq!(
        hard_limit(&memory, memory_first),
        (500u64 << 20).to_string()
    );
    let (nodes, _) = group_with(&rig, "cpuset.mems", "cpuset.mems");
    assert_eq!(text(nodes.join("cpuset.mems")), "0");

    // Every thread of the process is where it belongs.
    let pid = rig.processes("vireo-vmm")[0];
    let mut vcpus = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap().path();
        let name = text(task.join("comm"));
        let part = if name == "vcpu0" { "vcpu0" } else { "emulator" };
        let groups = text(task.join("cgroup"));
        let mut paths = groups.lines().filter_map(|line| line.rsplit_once(':'));
        let inside = cpu.file_name().unwrap().to_str().unwrap();
        assert!(
            paths.any(|(_, path)| path.ends_with(&format!("{inside}/{part}"))),
            "{name}: {groups}"
        );
        vcpus += usize::from(part == "vcpu0");
    }
    assert_eq!(vcpus, 1);
    // One that comes later, too.
    rig.vireo(&["setvcpus", "one", "2", "--live"]).ok();
    assert_eq!(of("vcpu1"), ("100000".into(), "20000".into()));
    let tasks = cpu.join("vcpu1");
    let tasks = tasks.join(if first { "tasks" } else { "cgroup.threads" });
    let thread = text(tasks);
    assert_eq!(text(format!("/proc/{pid}/task/{thread}/comm")), "vcpu1");

    // Read back, changed live, told to who listens, and kept apart from the definition.
    let shown = rig.vireo(&["schedinfo", "one", "--live"]).ok();
    has(&shown, "cpu_shares", "300");
    has(&shown, "vcpu_quota", "20000");
    has(&shown, "emulator_period", "50000");
    let mut events = listen(&rig);
    rig.vireo(&[
        "schedinfo",
        "one",
        "--live",
        "--set",
        "cpu_shares=700",
        "vcpu_quota=30000",
    ])
    .ok();
    events.expect("event 'tunable' for domain 'one'", SOON);
    events.expect("cputune.cpu_shares: 700", SOON);
    events.expect("cputune.vcpu_quota: 30000", SOON);
    drop(events);
    assert_eq!(text(&shares), "700");
    assert_eq!(of("vcpu0").1, "30000");
    has(
        &rig.vireo(&["schedinfo", "one", "--config"]).ok(),
        "cpu_shares",
        "300",
    );
    rig.vireo(&["memtune", "one", "--hard-limit", "600M", "--live"])
        .ok();
    assert_eq!(
        hard_limit(&memory, memory_first),
        (600u64 << 20).to_string()
    );
    has(&rig.vireo(&["memtune", "one"]).ok(), "hard_limit", "614400");

    // What the kernel refuses changes nothing.
    let refused = rig
        .vireo(&["schedinfo", "one", "--live", "--set", "cpu_shares=0"])
        .fails();
    assert!(
        refused.contains("shares '0' must be in range ["),
        "{refused}"
    );
    let refused = rig
        .vireo(&["schedinfo", "one", "--live", "--set", "global_quota=500"])
        .fails();
    assert!(
        refused.contains("value of 'global_quota' is out of range [1000, 17592186044415]"),
        "{refused}"
    );
    let refused = rig
        .vireo(&["numatune", "one", "--mode", "preferred", "--live"])
        .fails();
    assert!(
        refused.contains("can't change numatune mode for running domain"),
        "{refused}"
    );
    assert_eq!(text(&shares), "700");

    // The next daemon knows them.
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    let shown = rig.vireo(&["schedinfo", "one"]).ok();
    has(&shown, "cpu_shares", "700");
    has(&shown, "vcpu_quota", "30000");
    rig.vireo(&["schedinfo", "one", "--live", "--set", "vcpu_quota=-1"])
        .ok();
    assert!(["-1", "max"].contains(&of("vcpu0").1.as_str()));
    let groups = rig.groups();
    assert!(groups.len() >= 3, "{groups:?}");
    rig.vireo(&["destroy", "one"]).ok();
    let left: Vec<_> = groups.iter().filter(|group| group.exists()).collect();
    assert!(left.is_empty(), "{left:?}");

    // One that ends while no daemon is there leaves groups, until the next comes.
    rig.vireo(&["start", "one"]).ok();
    let groups = rig.groups();
    assert!(groups.iter().all(|group| group.exists()), "{groups:?}");
    let vmm = rig.processes("vireo-vmm")[0];
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    // SAFETY: kill has no memory effects; the process carries this rig's mark.
    unsafe { libc::kill(vmm, libc::SIGKILL) };
    let began = Instant::now();
    while Path::new(&format!("/proc/{vmm}/task")).exists() && began.elapsed() < SOON {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut daemon = rig.daemon();
    assert_eq!(rig.state("one"), "shut off (crashed)");
    let left: Vec<_> = groups.iter().filter(|group| group.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

/// A client that hears of events: it has heard of one already.
fn listen(rig: &Rig) -> Terminal {
    let mut events = Terminal::start(
        rig.command("vireo")
            .args(["event", "one", "--all", "--loop"]),
    );
    std::thread::scope(|scope| {
        let (heard, told) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            let wait = Duration::from_millis(200);
            while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = told.recv_timeout(wait) {
                rig.vireo(&["desc", "one", "--live", "--new-desc", "something"]);
            }
        });
        events.expect("event 'metadata-change'", SOON);
        drop(heard);
    });
    events
}

#[test]
fn a_domain_without_limits_gets_groups_when_one_is_set() {
    if !can_limit(&CONTROLLERS) {
        return;
    }
    let rig = Rig::new();
    rig.define(&guest(&rig, "<iothreads>1</iothreads>"));
    rig.vireo(&["start", "one"]).ok();
    assert_eq!(rig.groups(), Vec::<PathBuf>::new());
    // What the kernel starts with.
    let shown = rig.vireo(&["schedinfo", "one"]).ok();
    has(&shown, "vcpu_period", "100000");
    has(
        &rig.vireo(&["memtune", "one"]).ok(),
        "hard_limit",
        "unlimited",
    );
    rig.vireo(&["blkiotune", "one"]).ok();
    assert_eq!(rig.groups(), Vec::<PathBuf>::new());

    // A part may have no more than the whole, in whatever order they are set.
    for set in [
        "global_quota=50000",
        "vcpu_quota=40000",
        "global_quota=90000",
        "vcpu_quota=80000",
    ] {
        rig.vireo(&["schedinfo", "one", "--live", "--set", set])
            .ok();
    }
    let (cpu, first) = group_with(&rig, "cpu.shares", "cpu.weight");
    assert_eq!(bandwidth(&cpu, first).1, "90000");
    assert_eq!(bandwidth(&cpu.join("vcpu0"), first).1, "80000");
    rig.vireo(&[
        "schedinfo",
        "one",
        "--live",
        "--set",
        "vcpu_quota=30000",
        "global_quota=40000",
    ])
    .ok();
    assert_eq!(bandwidth(&cpu, first).1, "40000");
    assert_eq!(bandwidth(&cpu.join("vcpu0"), first).1, "30000");
    // 0 leaves a running domain's as it is, and takes a definition's away.
    for set in ["vcpu_quota=50000", "vcpu_quota=0"] {
        rig.vireo(&["schedinfo", "one", "--config", "--set", set])
            .ok();
        rig.vireo(&["schedinfo", "one", "--live", "--set", "vcpu_quota=0"])
            .ok();
        assert_eq!(bandwidth(&cpu.join("vcpu0"), first).1, "30000");
        let stored = rig.vireo(&["dumpxml", "one", "--inactive"]).ok();
        let there = stored.contains("<quota>50000</quota>");
        assert_eq!(there, set != "vcpu_quota=0", "{stored}");
    }
    has(
        &rig.vireo(&["schedinfo", "one", "--live"]).ok(),
        "vcpu_quota",
        "30000",
    );
    // What would keep the domain from starting, or would do nothing, is refused.
    for (scope, set, why) in [
        (
            "--config",
            "cpu_shares=1",
            "shares '1' must be in range [2, 262144]",
        ),
        (
            "--config",
            "cpu_shares=300000",
            "shares '300000' must be in range [2, 262144]",
        ),
    ] {
        let refused = rig
            .vireo(&["schedinfo", "one", scope, "--set", set])
            .fails();
        assert!(refused.contains(why), "{scope} {set}: {refused}");
    }

    // I/O threads have limits of their own, those that come later too.
    for set in ["iothread_period=50000", "iothread_quota=20000"] {
        rig.vireo(&["schedinfo", "one", "--live", "--set", set])
            .ok();
    }
    rig.vireo(&["iothreadadd", "one", "4", "--live"]).ok();
    for part in ["iothread1", "iothread4"] {
        let limit = ("50000".to_owned(), "20000".to_owned());
        assert_eq!(bandwidth(&cpu.join(part), first), limit);
        let threads = if first { "tasks" } else { "cgroup.threads" };
        let thread = text(cpu.join(part).join(threads));
        let name = text(Path::new("/proc").join(thread).join("comm"));
        assert_eq!(name, part);
    }
    let shown = rig.vireo(&["schedinfo", "one", "--live"]).ok();
    has(&shown, "iothread_quota", "20000");
    has(&shown, "iothread_period", "50000");
    assert_eq!(bandwidth(&cpu.join("vcpu0"), first).1, "30000");

    rig.vireo(&["memtune", "one", "--soft-limit", "300M", "--live"])
        .ok();
    has(&rig.vireo(&["memtune", "one"]).ok(), "soft_limit", "307200");
    let refused = rig
        .vireo(&[
            "memtune",
            "one",
            "--hard-limit",
            "300M",
            "--swap-hard-limit",
            "200M",
            "--live",
        ])
        .fails();
    assert!(
        refused.contains(
            "memory hard_limit tunable value must be lower than or equal to swap_hard_limit"
        ),
        "{refused}"
    );
    rig.vireo(&["numatune", "one", "--nodeset", "0", "--live"])
        .ok();
    let refused = rig
        .vireo(&["numatune", "one", "--nodeset", "1", "--live"])
        .fails();
    assert!(
        refused.contains("requires restrictive numa mode"),
        "{refused}"
    );
    let refused = rig
        .vireo(&[
            "blkiotune",
            "one",
            "--device-write-bytes-sec",
            "/dev/null,5",
            "--live",
        ])
        .fails();
    assert!(
        refused.contains("Path '/dev/null' must be a block device: Invalid argument"),
        "{refused}"
    );
    let dump = rig.vireo(&["dumpxml", "one"]).ok();
    for part in [
        "<global_quota>40000</global_quota>",
        "<soft_limit unit='KiB'>307200</soft_limit>",
    ] {
        assert!(dump.contains(part), "{part}: {dump}");
    }
    assert!(!dump.contains("/dev/null"), "{dump}");
    // Not in the definition: they went with the domain.
    let groups = rig.groups();
    rig.vireo(&["destroy", "one"]).ok();
    assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");
    let dump = rig.vireo(&["dumpxml", "one"]).ok();
    assert!(!dump.contains("quota"), "{dump}");
}

/// A block device that is a file; goes with this.
struct Loop(String);

impl Loop {
    fn new(rig: &Rig) -> Option<Self> {
        let file = rig.path("loop.img");
        fs::File::create(&file).unwrap().set_len(8 << 20).unwrap();
        let mut losetup = Command::new("losetup");
        let made = losetup.args(["--find", "--show"]).arg(&file).output();
        match made {
            Ok(made) if made.status.success() => {
                let name = String::from_utf8(made.stdout).unwrap();
                Some(Self(name.trim().to_owned()))
            }
            _ => {
                left_out("needs root, losetup and a free loop device");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn limits_of_block_devices_are_in_force() {
    if !can_limit(&["blkio"]) {
        return;
    }
    let rig = Rig::new();
    let Some(device) = Loop::new(&rig) else {
        return;
    };
    rig.define(&guest(&rig, ""));
    let set = |scope: &str, bytes: u32| {
        let limit = format!("{},{bytes}", device.0);
        rig.vireo(&[
            "blkiotune",
            "one",
            scope,
            "--device-write-bytes-sec",
            &limit,
        ])
        .ok()
    };
    let number = fs::metadata(&device.0).unwrap().rdev();
    let number = format!("{}:{}", libc::major(number), libc::minor(number));
    // What the kernel has for that device.
    let limit = || -> Option<String> {
        let (group, first) = group_with(&rig, "blkio.throttle.write_bps_device", "io.max");
        let file = if first {
            "blkio.throttle.write_bps_device"
        } else {
            "io.max"
        };
        let all = text(group.join(file));
        let own = all.lines().find_map(|line| line.strip_prefix(&number))?;
        let own = own.split(' ').map(|word| word.trim_start_matches("wbps="));
        own.map(str::to_owned)
            .find(|word| word.parse::<u64>().is_ok())
    };
    // From the start, changed live, and taken away.
    set("--config", 2_000_000);
    rig.vireo(&["start", "one"]).ok();
    assert_eq!(limit().as_deref(), Some("2000000"));
    set("--live", 3_000_000);
    assert_eq!(limit().as_deref(), Some("3000000"));
    let shown = rig.vireo(&["blkiotune", "one", "--live"]).ok();
    has(
        &shown,
        "device_write_bytes_sec",
        &format!("{},3000000", device.0),
    );
    set("--live", 0);
    assert_eq!(limit(), None);
    rig.vireo(&["destroy", "one"]).ok();

    // A group that is made for it.
    set("--config", 0);
    rig.vireo(&["start", "one"]).ok();
    assert_eq!(rig.groups(), Vec::<PathBuf>::new());
    set("--live", 4_000_000);
    assert_eq!(limit().as_deref(), Some("4000000"));
    rig.vireo(&["destroy", "one"]).ok();
}

#[test]
fn a_busy_guest_gets_its_quota_and_no_more() {
    // So little that even a share of a crowded host is more.
    const QUOTA: u64 = 3000;
    if !can_limit(&["cpu"]) {
        return;
    }
    let rig = Rig::new();
    rig.define(&guest(
        &rig,
        &format!("<cputune><period>100000</period><quota>{QUOTA}</quota></cputune>"),
    ));
    rig.vireo(&["start", "one"]).ok();
    let (cpu, _) = group_with(&rig, "cpu.shares", "cpu.weight");
    let pid = rig.processes("vireo-vmm")[0];
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let vcpu = tasks
        .map(|task| task.unwrap().path())
        .find(|task| text(task.join("comm")) == "vcpu0")
        .unwrap();
    let counted = |name: &str| -> u64 {
        let stat = text(cpu.join("vcpu0/cpu.stat"));
        let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = lines.find(|(known, _)| *known == name).unwrap();
        value.parse().unwrap()
    };
    // Nanoseconds on a CPU (`/proc/PID/schedstat`).
    let used = || -> u64 {
        let stat = text(vcpu.join("schedstat"));
        stat.split(' ').next().unwrap().parse().unwrap()
    };
    // It polls its serial port without a pause, so it is held back in period after period. By the kernel's
    // accounting, not by a clock: on a busy host the periods in which it wants more than it has take longer to come.
    let (periods, before) = (counted("nr_periods"), used());
    let began = Instant::now();
    while counted("nr_throttled") < 10 {
        assert!(began.elapsed() < SOON, "it was never held back");
        std::thread::sleep(Duration::from_millis(20));
    }
    let spent = used() - before;
    let periods = counted("nr_periods") - periods;
    // A period at each end, in part; and what the kernel notices one tick late and takes off the next periods.
    let most = (periods + 2) * QUOTA * 1000 + 10_000_000;
    assert!(
        spent <= most,
        "{spent} ns in {periods} periods, more than {most}"
    );
    // It did run, and used up what it has.
    let least = 3 * QUOTA * 1000;
    assert!(spent >= least, "{spent} ns, less than {least}");
    rig.vireo(&["destroy", "one"]).ok();
}

#[test]
fn without_controllers_only_limits_are_refused() {
    if !can_limit(&[]) || !unmounts() {
        return left_out("needs root, to unmount control groups in a mount namespace");
    }
    let rig = Rig::new();
    // A daemon that sees no control groups.
    let vireod = rig.command("vireod");
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "sh",
        "-c",
        "umount -Rl /sys/fs/cgroup; exec \"$0\"",
    ]);
    command.arg(vireod.get_program());
    for (name, value) in vireod.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let mut daemon = command.stdin(std::process::Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while std::os::unix::net::UnixStream::connect(rig.socket()).is_err() {
        assert!(began.elapsed() < SOON, "the daemon did not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    rig.define(&guest(&rig, ""));
    rig.vireo(&["start", "one"]).ok();
    for (command, why) in [
        (
            "schedinfo",
            "Requested operation is not valid: cgroup CPU controller is not mounted",
        ),
        (
            "memtune",
            "Requested operation is not valid: cgroup memory controller is not mounted",
        ),
        (
            "blkiotune",
            "Requested operation is not valid: blkio cgroup isn't mounted",
        ),
    ] {
        let refused = rig.vireo(&[command, "one"]).fails();
        assert!(refused.contains(why), "{refused}");
    }
    let refused = rig
        .vireo(&["memtune", "one", "--hard-limit", "64M"])
        .fails();
    assert!(
        refused.contains("cgroup memory controller is not mounted"),
        "{refused}"
    );
    rig.vireo(&["destroy", "one"]).ok();
    for (inside, why) in [
        (
            "<cputune><shares>300</shares></cputune>",
            "unsupported configuration: CPU tuning is not available on this host",
        ),
        (
            "<memtune><hard_limit>300000</hard_limit></memtune>",
            "unsupported configuration: Memory cgroup is not available on this host",
        ),
        (
            "<blkiotune><weight>300</weight></blkiotune>",
            "unsupported configuration: Block I/O tuning is not available on this host",
        ),
    ] {
        let uuid = rig.vireo(&["domuuid", "one"]).ok();
        let name = format!("<name>one</name><uuid>{}</uuid>", uuid.trim());
        rig.define(&guest(&rig, inside).replace("<name>one</name>", &name));
        let refused = rig.vireo(&["start", "one"]).fails();
        assert!(refused.contains(why), "{refused}");
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

/// Whether a mount namespace can be had, and control groups can be taken out of it.
fn unmounts() -> bool {
    let tried = Command::new("unshare")
        .args(["--mount", "sh", "-c", "umount -Rl /sys/fs/cgroup"])
        .output();
    tried.is_ok_and(|output| output.status.success())
}
