//! Commands about domains and the host beyond their life, through `vireo` and the stock virsh: the same output, error
//! and status.

use vireo_tests::{Rig, Run, left_out, tiny_guest, which};

/// Two domains of the same name in two Vireos, so that each client changes one of its own.
struct Pair {
    ours: Rig,
    theirs: Rig,
    there: bool,
}

impl Pair {
    fn new(xml: impl Fn(&Rig) -> String) -> Self {
        let (ours, theirs) = (Rig::new(), Rig::new());
        for rig in [&ours, &theirs] {
            rig.define(&xml(rig));
        }
        let there = which("virsh");
        if !there {
            left_out("the comparison needs virsh (libvirt-clients)");
        }
        Self {
            ours,
            theirs,
            there,
        }
    }

    /// What is different by nature: folders.
    fn plain(rig: &Rig, run: Run) -> Run {
        let root = rig.root().display().to_string();
        let plain = |text: String| {
            let text = text.replace(&root, "ROOT");
            // The number of a terminal.
            let parts = text
                .split("/dev/pts/")
                .enumerate()
                .map(|(at, part)| match at {
                    0 => part.to_owned(),
                    _ => part
                        .trim_start_matches(|c: char| c.is_ascii_digit())
                        .to_owned(),
                });
            parts.collect::<Vec<_>>().join("/dev/pts/N")
        };
        Run {
            status: run.status,
            out: plain(run.out),
            err: plain(run.err),
        }
    }

    /// Runs a command through `vireo` in one and through virsh in the other, and demands the same.
    #[track_caller]
    fn same(&self, args: &[&str]) -> Run {
        let ours = Self::plain(&self.ours, self.ours.vireo(args));
        if self.there {
            let theirs = Self::plain(&self.theirs, self.theirs.virsh(args));
            assert_eq!(
                ours, theirs,
                "{args:?}: vireo (left) and virsh (right) differ"
            );
        }
        ours
    }

    #[track_caller]
    fn all(&self, lines: &[&str]) {
        let mut wrong = String::new();
        for line in lines {
            let args: Vec<&str> = line.split(' ').collect();
            let ours = Self::plain(&self.ours, self.ours.vireo(&args));
            if self.there {
                let theirs = Self::plain(&self.theirs, self.theirs.virsh(&args));
                if ours != theirs {
                    wrong += &format!("{line}\n  vireo: {ours:?}\n  virsh: {theirs:?}\n");
                }
            }
        }
        assert!(wrong.is_empty(), "\n{wrong}");
    }

    #[track_caller]
    fn start(&self) {
        for rig in [&self.ours, &self.theirs] {
            rig.vireo(&["start", "one"]).ok();
        }
    }
}

fn guest(rig: &Rig) -> String {
    tiny_guest(rig, "one", "qemu")
        .replace("<vcpu>1</vcpu>", "<vcpu current='2'>4</vcpu>")
        .replace(
            "  <memory",
            "  <uuid>06df9427-4b0f-4db9-830c-95aadc4a9064</uuid>\n  <memory",
        )
}

#[test]
fn vcpus_and_where_they_run() {
    let pair = Pair::new(guest);
    pair.all(&[
        "vcpucount one",
        "vcpuinfo one",
        "vcpuinfo one --pretty",
        "vcpupin one",
        "vcpupin one --vcpu 1",
        "vcpupin one --vcpu 9",
        "vcpupin one --live",
        "vcpupin one --config",
        "vcpupin one 0 0",
        "vcpupin one 0 0 --config",
        "vcpupin one 1 r --config",
        "vcpupin one 7 0 --config",
        "vcpupin one --cpulist 0",
        "vcpupin one 0 x --config",
        "vcpupin one 0 4000 --config",
        "vcpupin one",
        "emulatorpin one",
        "emulatorpin one 0",
        "emulatorpin one 0 --config",
        "emulatorpin one 0 --live",
        "emulatorpin one",
        "setvcpus one 3",
        "setvcpus one 3 --config",
        "setvcpus one 3 --live",
        "setvcpus one 9 --config",
        "setvcpus one 0 --config",
        "setvcpus one 5 --maximum",
        "setvcpus one 5 --maximum --config",
        "setvcpus one 5 --maximum --live",
        "setvcpus one 2 --current --live",
        "setvcpus one 2 --guest --config",
        "setvcpus one 2 --guest",
        "vcpucount one",
        "setvcpu one 4 --enable --config",
        "setvcpu one 0 --disable --config",
        "setvcpu one 4",
        "setvcpu one 4 --enable --disable",
        "setvcpu one 9 --enable --config",
        "setvcpu one x --enable --config",
        "setvcpu one 1,2 --disable --config",
        "vcpucount one",
        "vcpuinfo one",
        "guestvcpus one",
        "guestvcpus one --enable",
        "guestvcpus one --cpulist 0",
        "guestvcpus one --cpulist 0 --enable",
        "cpu-stats one",
        "iothreadinfo one",
        "iothreadinfo one --live",
        "iothreadinfo one --config",
        "iothreadadd one 0",
        "iothreadadd one 2 --config",
        "iothreadadd one 2 --config",
        "iothreadadd one 3 --live",
        "iothreadinfo one",
        "iothreadset one 2 --config",
        "iothreadset one 2 --poll-max-ns 5 --config",
        "iothreadset one 2 --thread-pool-min x --config",
        "iothreadpin one 2 0 --config",
        "iothreadpin one 5 0 --config",
        "iothreadinfo one",
        "iothreaddel one 2 --config",
        "iothreaddel one 2 --config",
        "iothreaddel one 0 --config",
        "iothreadinfo one",
    ]);
    let dump = pair.same(&["dumpxml", "one", "--xpath", "//cputune"]).ok();
    assert!(
        dump.contains("<vcpupin vcpu=\"0\" cpuset=\"0\"/>"),
        "{dump}"
    );
    assert!(dump.contains("<emulatorpin cpuset=\"0\"/>"), "{dump}");
    // Those that come later among them.
    pair.all(&["setvcpus one 2 --config"]);
    pair.start();
    pair.all(&[
        "vcpucount one",
        "vcpupin one",
        "vcpupin one --vcpu 9",
        "vcpupin one 1 0 --live",
        "vcpupin one 3 0 --live",
        "vcpupin one --live",
        "emulatorpin one 0 --live",
        "emulatorpin one",
        "setvcpus one 9 --live",
        "setvcpus one 3",
        "setvcpus one 3 --live --maximum",
        "setvcpu one 3 --enable --live",
        "iothreadinfo one",
        "iothreadadd one 3 --live",
        "guestvcpus one",
        "cpu-stats one --start -1",
        "cpu-stats one --count -1",
        "cpu-stats one --start 0",
        "cpu-stats one --start 99",
    ]);
    let total = pair.ours.vireo(&["cpu-stats", "one"]).ok();
    assert!(
        total.contains("No per-CPU stats availableTotal:\n\tcpu_time "),
        "{total}"
    );
    let info = pair.ours.vireo(&["vcpuinfo", "one"]).ok();
    assert!(info.contains("State:          running\n"), "{info}");
    // What was pinned is pinned in the host, before its first instruction and afterwards.
    let pids = pair.ours.processes("vireo-vmm");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", pids[0])).unwrap();
    let mut seen = 0;
    for task in tasks {
        let task = task.unwrap().path();
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        // Nobody has pinned those.
        let free = ["Name:\tvcpu4\n", "Name:\tiothread3\n"];
        if !free.iter().any(|name| status.starts_with(name)) {
            assert!(status.contains("\nCpus_allowed_list:\t0\n"), "{status}");
        }
        seen += usize::from(status.starts_with("Name:\tvcpu"));
    }
    let count = pair.same(&["vcpucount", "one", "--live", "--active"]).ok();
    assert_eq!(seen.to_string(), count.trim());
    assert!(seen > 2, "some came while it ran");
}

/// What libvirt's library or its parser would not take, and what it tells of a domain that is off.
#[test]
fn a_domain_that_is_off_in_libvirts_words() {
    let disk = |rig: &Rig| rig.write("disk.raw", vec![1; 1 << 20]);
    let pair = Pair::new(|rig| {
        let disk = disk(rig);
        guest(rig).replace(
            "<devices>",
            &format!(
                "<devices><disk type='file'><source file='{disk}'/><target dev='vda'/></disk>"
            ),
        )
    });
    let refused = |args: &[&str], words: &str| {
        let said = pair.same(args).fails();
        assert!(said.contains(words), "{args:?}: {said}");
    };
    let zero = "memory in virDomainSetMemoryFlags must not be zero";
    refused(&["setmem", "one", "0", "--config"], zero);
    refused(&["setmaxmem", "one", "0", "--config"], zero);
    refused(&["setmem", "one", "1M"], "domain is not running");
    for state in ["--enable", "--disable"] {
        let words = "vCPU '0' can't be modified";
        refused(&["setvcpu", "one", "0", state, "--config"], words);
    }
    let words = "vcpu 9 is not present in persistent config";
    refused(&["setvcpu", "one", "9", "--enable", "--config"], words);
    let stats = pair.same(&["domstats", "one"]).ok();
    for line in [
        "  balloon.current=16384\n",
        "  block.0.allocation=1048576\n",
        "  block.0.capacity=1048576\n",
        "  block.0.physical=1048576\n",
    ] {
        assert!(stats.contains(line), "{line}: {stats}");
    }
    let uri = "http://example.org/x";
    pair.same(&["metadata", "one", uri, "--key", "k", "--set", "<x>1</x>"])
        .ok();
    assert_eq!(pair.same(&["metadata", "one", uri]).ok(), "<x>1</x>\n\n");
    let secret = "<secret ephemeral='no' private='no'><uuid>06df9427-4b0f-4db9-830c-95aadc4a9065</uuid></secret>";
    for rig in [&pair.ours, &pair.theirs] {
        rig.vireo(&["secret-define", &rig.write("secret.xml", secret)])
            .ok();
        let file = rig.write("empty", "");
        let uuid = "06df9427-4b0f-4db9-830c-95aadc4a9065";
        let said = rig
            .vireo(&["secret-set-value", uuid, "--file", &file, "--plain"])
            .fails();
        assert!(
            said.contains("value in virSecretSetValue must not be NULL"),
            "{said}"
        );
        let strange = guest(rig).replace("<acpi/>", "<acpi/><colour/>");
        let said = rig
            .vireo(&["define", &rig.write("strange.xml", strange)])
            .fails();
        assert!(said.contains("unexpected feature 'colour'"), "{said}");
    }
}

#[test]
fn tunables_are_kept_in_definitions() {
    let pair = Pair::new(guest);
    pair.all(&[
        "schedinfo one",
        "schedinfo one --set vcpu_quota=5000",
        "schedinfo one --config --set cpu_shares=512",
        "schedinfo one --config --set vcpu_period=1",
        "schedinfo one --set bogus=1",
        "schedinfo one --set bogus",
        "schedinfo one --live",
        "schedinfo one --weight 5",
        "memtune one",
        "memtune one --hard-limit 64M",
        "memtune one --soft-limit 1000 --config",
        "memtune one --swap-hard-limit 1 --config",
        "memtune one --hard-limit -1",
        "memtune one --hard-limit x",
        "memtune one --min-guarantee 5",
        "memtune one --live",
        "memtune one",
        "blkiotune one",
        "blkiotune one --weight 300",
        "blkiotune one --weight -1",
        "blkiotune one --device-weights /dev/null,300 --config",
        "blkiotune one --device-read-iops-sec /dev/null,5,/dev/zero,6 --config",
        "blkiotune one --device-read-iops-sec /dev/null --config",
        "blkiotune one --live",
        "blkiotune one",
        "numatune one",
        "numatune one --mode bogus",
        "numatune one --mode preferred --nodeset 0 --config",
        "numatune one --nodeset x --config",
        "numatune one --live",
        "numatune one",
        "perf one",
        "perf one --enable cpu_clock,page_faults",
        "perf one --disable cpu_clock --config",
        "perf one --enable bogus",
        "perf one --enable cmt --live",
        "perf one",
        "dumpxml one",
    ]);
    // What is not there is refused by name, and not forgotten silently.
    let refused = pair.ours.vireo(&["start", "one"]).fails();
    assert!(refused.contains("perf"), "{refused}");
}

#[test]
fn how_fast_memory_changes_is_measured() {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    rig.vireo(&["start", "one"]).ok();
    let rate = || rig.vireo(&["domstats", "one", "--dirtyrate"]).ok();
    let at_first = "Domain: 'one'\n  dirtyrate.calc_status=0\n  dirtyrate.calc_start_time=0\n  \
                    dirtyrate.calc_period=0\n  dirtyrate.calc_mode=page-sampling\n";
    assert_eq!(rate().trim_end(), at_first.trim_end());
    for (args, why) in [
        (
            ["--seconds", "0"],
            "unsupported configuration: seconds=0 is invalid, please choose value within [1, 60].",
        ),
        (
            ["--mode", "dirty-ring"],
            "dirty-ring calculation mode requires dirty-ring feature enabled.",
        ),
        (["--mode", "dirty-bitmap"], "measured by page-sampling only"),
    ] {
        let refused = rig
            .vireo(&[&["domdirtyrate-calc", "one"], &args[..]].concat())
            .fails();
        assert!(refused.contains(why), "{refused}");
    }
    rig.vireo(&["domdirtyrate-calc", "one", "--seconds", "1"])
        .ok();
    let began = std::time::Instant::now();
    while !rate().contains("dirtyrate.calc_status=2\n") {
        assert!(
            began.elapsed() < std::time::Duration::from_secs(60),
            "{}",
            rate()
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    // It reads a port, and writes no memory.
    let found = rate();
    assert!(found.contains("dirtyrate.calc_period=1\n"), "{found}");
    assert!(
        found.contains("dirtyrate.megabytes_per_second=0\n"),
        "{found}"
    );
}

#[test]
fn what_a_guest_without_an_agent_or_a_screen_answers() {
    let pair = Pair::new(guest);
    let lines = [
        "qemu-agent-command one {\"execute\":\"guest-ping\"}",
        "qemu-agent-command one --timeout 0 x",
        "qemu-agent-command one --timeout 5 --block x",
        "guest-agent-timeout one",
        "guest-agent-timeout one --timeout 5",
        "guest-agent-timeout one --timeout -7",
        "domtime one",
        "domtime one --now --sync",
        "domtime one --now",
        "domtime one --time 5",
        "domhostname one",
        "domhostname one --source lease",
        "domhostname one --source x",
        "guestinfo one",
        "domfsinfo one",
        "domfsfreeze one",
        "domfsthaw one",
        "domfstrim one",
        "domfstrim one --mountpoint /x",
        "set-user-password one root x",
        "get-user-sshkeys one root",
        "set-user-sshkeys one root",
        "set-user-sshkeys one root --reset",
        "set-user-sshkeys one root --reset --remove",
        "set-user-sshkeys one root --file /nonexistent",
        "shutdown one --mode agent",
        "reboot one --mode agent",
        "dompmsuspend one mem",
        "dompmsuspend one x",
        "dompmwakeup one",
        "send-key one KEY_A KEY_B",
        "send-key one --codeset x 5",
        "send-key one KEY_BOGUS",
        "send-process-signal one 1 SIGTERM",
        "send-process-signal one 1 sig_kill",
        "send-process-signal one x 5",
        "send-process-signal one 1 bogus",
        "domjobinfo one",
        "domjobinfo one --completed",
        "domjobabort one",
        "screenshot one",
        "vncdisplay one",
        "domdisplay one",
        "domdisplay one --type vnc",
        "domdisplay one --all",
        "qemu-monitor-command one info",
        "qemu-monitor-command one --hmp info",
        "domxml-from-native qemu-argv /etc/hostname",
        "domxml-to-native qemu-argv --domain one",
        "domxml-to-native qemu-argv",
        "domblkthreshold one vda 5",
        "domdirtyrate-calc one",
        "domdirtyrate-calc one --mode x",
        "domlaunchsecinfo one",
        "domsetlaunchsecstate one",
        "dom-fd-associate one x 0",
        "dom-fd-associate one x 777",
        "update-memory-device one --requested-size 5",
        "domcontrol one",
        "domblkerror one",
        "undefine nosuch",
        "dumpxml one --migratable",
        "dumpxml one --update-cpu",
    ];
    pair.all(&lines);
    pair.start();
    pair.all(&lines);
    pair.all(&[
        "set-lifecycle-action one reboot destroy --live",
        "set-lifecycle-action one crash preserve --live --config",
        "set-lifecycle-action one crash bogus",
    ]);
    let dump = pair
        .same(&["dumpxml", "one", "--xpath", "//on_reboot"])
        .ok();
    assert!(dump.contains("destroy"), "{dump}");
}

#[test]
fn the_host_and_its_devices() {
    let pair = Pair::new(guest);
    let file = |rig: &Rig, name: &str, text: &str| {
        rig.write(name, text);
    };
    for rig in [&pair.ours, &pair.theirs] {
        file(rig, "one.xml", "<cpu><model>Penryn</model></cpu>");
        file(rig, "no.xml", "<nothing/>");
        file(rig, "bad.xml", "<cpu><model>Bogus</model></cpu>");
        file(
            rig,
            "two.xml",
            "<cpu><arch>x86_64</arch><model>SandyBridge</model><vendor>Intel</vendor></cpu>\
             <domain><cpu><model>Westmere</model></cpu></domain>",
        );
    }
    pair.all(&[
        "nodecpustats --cpu 99",
        "nodememstats --cell 99",
        "freepages",
        "freepages --cellno 0 --pagesize 5",
        "freepages --cellno 0 --pagesize 2048",
        "freepages --cellno 99",
        "freepages --cellno -5",
        "freepages --cellno 0 --all",
        "allocpages 4 5",
        "allocpages 5 5",
        "allocpages x 5",
        "allocpages 2048 1 --cellno 99",
        "nodesuspend mem 60",
        "nodesuspend mem 5",
        "nodesuspend x 60",
        "nodesuspend mem -1",
        "nodesevinfo",
        "node-memory-tune --shm-pages-to-scan x",
        "cpu-models x86_64",
        "cpu-models bogus",
        "sysinfo",
        "maxvcpus",
        "maxvcpus --type bogus",
        "domcapabilities",
        "nodecpumap",
        "nodecpumap --pretty",
        "nodedev-list",
        "nodedev-list --tree",
        "nodedev-list --cap net",
        "nodedev-list --cap pci,storage",
        "nodedev-list --cap bogus",
        "nodedev-list --inactive",
        "nodedev-list --all",
        "nodedev-list --tree --cap net",
        "nodedev-list --tree --all",
        "nodedev-dumpxml computer",
        "nodedev-dumpxml bogus",
        "nodedev-dumpxml computer --xpath //name",
        "nodedev-info computer",
        "nodedev-detach computer",
        "nodedev-detach bogus",
        "nodedev-reattach computer",
        "nodedev-reset computer",
        "nodedev-create /nonexistent",
        "nodedev-destroy computer",
        "nodedev-undefine computer",
        "nodedev-start computer",
        "nodedev-autostart computer",
        "nodedev-autostart computer --disable",
        "iface-list",
        "iface-list --inactive",
        "iface-list --all",
        "iface-dumpxml lo",
        "iface-name 52:54:00:00:00:01",
        "iface-define /nonexistent",
        "iface-begin",
        "iface-commit",
        "iface-rollback",
        "nwfilter-list",
        "nwfilter-dumpxml bogus",
        "nwfilter-undefine 06df9427-4b0f-4db9-830c-95aadc4a9064",
        "nwfilter-define /nonexistent",
        "nwfilter-binding-list",
        "nwfilter-binding-dumpxml bogus",
    ]);
    let info = pair.same(&["nodedev-info", "computer"]).ok();
    assert!(
        info.contains("Persistent:     yes\nAutostart:      yes\n"),
        "{info}"
    );
    let refused = pair.same(&["nodedev-destroy", "computer"]).fails();
    assert!(
        refused.contains("unsupported configuration: Unsupported device type"),
        "{refused}"
    );
    // Documents about CPUs: files are in each Vireo's own folder.
    let both = |args: &[&str]| {
        let run = |rig: &Rig, run: &dyn Fn(&[&str]) -> Run| {
            let paths: Vec<String> = args
                .iter()
                .map(|word| match word.ends_with(".xml") {
                    true => rig.path(word).display().to_string(),
                    false => (*word).to_owned(),
                })
                .collect();
            Pair::plain(
                rig,
                run(&paths.iter().map(String::as_str).collect::<Vec<_>>()),
            )
        };
        let ours = run(&pair.ours, &|args| pair.ours.vireo(args));
        if pair.there {
            let theirs = run(&pair.theirs, &|args| pair.theirs.virsh(args));
            assert_eq!(
                ours, theirs,
                "{args:?}: vireo (left) and virsh (right) differ"
            );
        }
        ours
    };
    for command in ["cpu-compare", "hypervisor-cpu-compare"] {
        for file in ["one.xml", "no.xml", "bad.xml", "two.xml", "missing.xml"] {
            both(&[command, file]);
            both(&[command, file, "--error"]);
        }
    }
    for command in ["cpu-baseline", "hypervisor-cpu-baseline"] {
        for file in ["one.xml", "no.xml", "bad.xml", "two.xml"] {
            both(&[command, file]);
            both(&[command, file, "--features"]);
        }
    }
    both(&["hypervisor-cpu-baseline"]);
    both(&["hypervisor-cpu-baseline", "--model", "Penryn"]);
    let baseline = pair.ours.vireo(&[
        "cpu-baseline",
        &pair.ours.path("two.xml").display().to_string(),
    ]);
    let baseline = baseline.ok();
    assert!(
        baseline.contains("<model fallback='forbid'>Westmere</model>"),
        "{baseline}"
    );
    // Values that change from one call to the next: their form only.
    for (args, wanted) in [
        (vec!["nodecpustats"], "user:           "),
        (vec!["nodecpustats", "--percent"], "usage:          "),
        (vec!["nodememstats"], "total  : "),
        (vec!["nodememstats", "--cell", "0"], "total  : "),
        (vec!["freepages", "--all"], "Node 0:\n4KiB: "),
        (
            vec!["freepages", "--cellno", "0", "--pagesize", "4"],
            "4KiB: ",
        ),
    ] {
        let form = |text: String| -> String {
            let digits = |c: char| if c.is_ascii_digit() { '0' } else { c };
            let text: String = text.chars().map(digits).collect();
            text.split(['0', ' '])
                .filter(|part| !part.is_empty())
                .collect()
        };
        let ours = pair.ours.vireo(&args).ok();
        assert!(ours.contains(wanted), "{ours}");
        if pair.there {
            assert_eq!(form(ours), form(pair.theirs.virsh(&args).ok()), "{args:?}");
        }
    }
}
