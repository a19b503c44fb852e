//! docs/compatibility.md is what the programs say.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use vireo_tests::Rig;

const HEAD: &str = "# Compatibility with libvirt\n\nMade by `make docs` from vireo's table of commands and vireod's \
                    table of procedures; not written by hand.\n\n";

/// Procedures that are only refused, and the command that needs each.
const REFUSED: &[(&str, &str)] = &[
    ("DOMAIN_SCREENSHOT", "screenshot"),
    ("DOMAIN_PM_SUSPEND_FOR_DURATION", "dompmsuspend"),
    ("DOMAIN_MIGRATE_GET_COMPRESSION_CACHE", "migrate-compcache"),
    ("DOMAIN_MIGRATE_SET_COMPRESSION_CACHE", "migrate-compcache"),
    ("DOMAIN_SET_LAUNCH_SECURITY_STATE", "domsetlaunchsecstate"),
    ("DOMAIN_FD_ASSOCIATE", "dom-fd-associate"),
    ("DOMAIN_QEMU_MONITOR_COMMAND", "qemu-monitor-command"),
    ("DOMAIN_QEMU_ATTACH", "qemu-attach"),
    (
        "CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER",
        "qemu-monitor-event",
    ),
    ("CONNECT_DOMAIN_XML_FROM_NATIVE", "domxml-from-native"),
    ("CONNECT_DOMAIN_XML_TO_NATIVE", "domxml-to-native"),
];

/// Those that no command of virsh needs: DOMAIN_OPEN_GRAPHICS and its kin.
const WITHOUT_COMMAND: usize = 2;

#[test]
fn the_documentation_is_what_the_programs_say() {
    let rig = Rig::new();
    let commands = rig.vireo(&["compatibility"]).ok();
    let procedures = rig.command("vireod").arg("--procedures").output().unwrap();
    let procedures = String::from_utf8(procedures.stdout).unwrap();
    let answered: BTreeSet<&str> = procedures.lines().collect();
    // The table of commands says that these drivers are not there.
    for driver in [
        "NWFILTER",
        "CONNECT_LIST_ALL_INTERFACES",
        "CHECKPOINT",
        "BACKUP",
    ] {
        let there: Vec<_> = answered
            .iter()
            .filter(|name| name.contains(driver))
            .collect();
        assert!(
            there.is_empty(),
            "{there:?}: cli/src/compatibility.rs says otherwise"
        );
    }
    // A command can't do what the only procedure behind it refuses.
    let refused: BTreeSet<&str> = answered
        .iter()
        .filter_map(|line| line.strip_suffix(" refused"))
        .collect();
    for (procedure, command) in REFUSED {
        assert!(refused.contains(procedure), "{procedure} is served now");
        let works = format!("| {command} | works |");
        assert!(!commands.contains(&works), "{command} can't work");
    }
    assert_eq!(
        refused.len(),
        REFUSED.len() + WITHOUT_COMMAND,
        "{refused:?}"
    );
    let mut text = format!("{HEAD}{}\n\n## Procedures\n\n", commands.trim_end());
    writeln!(
        text,
        "vireod answers {} of the protocol's procedures. Any other gets the answer that libvirt gives where a driver \
         lacks the function, or `unknown procedure`.\n",
        answered.len()
    )
    .unwrap();
    for name in &answered {
        let line = name.replace(" refused", ": refused, with the reason");
        writeln!(text, "- {line}").unwrap();
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/compatibility.md");
    if std::env::var_os("VIREO_UPDATE_DOCS").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    if written != text {
        let line = written
            .lines()
            .zip(text.lines())
            .find(|(old, new)| old != new);
        panic!("docs/compatibility.md is stale: run `make docs`; the first difference: {line:?}");
    }
}
