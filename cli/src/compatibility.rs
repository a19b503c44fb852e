//! Which of virsh's commands are there, as a table made from the commands themselves: `docs/compatibility.md`.

use std::fmt::Write;

use crate::command::{self, Group};

/// virsh 9.0's commands by group, each with its options.
const VIRSH: &str = include_str!("compatibility/virsh.txt");

/// Commands that are there, and what of them is not, beyond options that are missing: those are found by comparing.
const IN_PART: &[(&str, &str)] = &[
    (
        "start",
        "devices that need a screen, and empty floppy drives, are left out of the machine; others that are not there are refused by name",
    ),
    (
        "memtune",
        "a domain that starts without limits: memory from before the first one is not counted",
    ),
    ("domdirtyrate-calc", "by page sampling"),
    (
        "perf",
        "kept in definitions; a domain that asks for it does not start",
    ),
    ("cpu-stats", "no times by CPU of the host"),
    ("attach-device", PLUG_OR_MEDIUM),
    ("attach-disk", PLUG_OR_MEDIUM),
    (
        "attach-interface",
        "virtio cards; none of the host (type hostdev)",
    ),
    ("detach-device", PLUG),
    ("detach-device-alias", PLUG),
    (
        "update-device",
        "a running domain's network cards: no other filter, no VLANs on the bridge it is on",
    ),
    ("change-media", "no floppy drives"),
    ("domstats", "nothing of vm"),
    ("domiftune", "no floor"),
    (
        "event",
        "what can't happen here never comes: sleep, memory failures, changes of the clock",
    ),
    ("net-create", NETWORKS),
    ("net-define", NETWORKS),
    ("pool-create", POOLS),
    ("pool-create-as", POOLS),
    ("pool-define", POOLS),
    ("pool-define-as", POOLS),
    ("find-storage-pool-sources", SOURCES),
    ("find-storage-pool-sources-as", SOURCES),
];

const NETWORKS: &str = "no forward mode hostdev, virtual ports, firewalld zones";
const POOLS: &str = "types dir, fs, netfs";
const SOURCES: &str = "of netfs pools";

const PLUG: &str = "while the guest runs: virtio and SCSI disks, SCSI controllers, network cards, entropy sources, channels";
const PLUG_OR_MEDIUM: &str = "while the guest runs: virtio and SCSI disks, SCSI controllers, network cards, entropy sources, channels, and media of CD-ROM drives";

/// Commands that are answered with a refusal, and why.
const REFUSED: &[(&str, &str)] = &[
    ("dom-fd-associate", "disks are opened by the daemon"),
    ("nodedev-detach", "no VFIO yet"),
    ("nodedev-reattach", "no VFIO yet"),
    ("nodedev-reset", "no VFIO yet"),
    ("migrate-postcopy", "no post-copy"),
    ("update-memory-device", "no memory devices yet"),
];

/// Commands that mean nothing for this virtual machine monitor.
const NOT_APPLICABLE: &[(&str, &str)] = &[
    ("domdisplay", "guests have no graphics"),
    ("vncdisplay", "guests have no graphics"),
    ("screenshot", "guests have no graphics"),
    ("lxc-enter-namespace", "there are no containers"),
    ("qemu-attach", "there is no QEMU"),
    ("qemu-monitor-command", "there is no QEMU monitor"),
    ("qemu-monitor-event", "there is no QEMU monitor"),
    (
        "domlaunchsecinfo",
        "no encrypted guests: neither SEV nor TDX",
    ),
    (
        "domsetlaunchsecstate",
        "no encrypted guests: neither SEV nor TDX",
    ),
    ("nodesevinfo", "no encrypted guests: neither SEV nor TDX"),
    ("dompmsuspend", "guests have no S3"),
    ("dompmwakeup", "guests have no S3"),
    (
        "domxml-from-native",
        "QEMU's driver does not have it either",
    ),
    ("domxml-to-native", "there is no other format"),
    (
        "nodesuspend",
        "the host is not put to sleep under its guests",
    ),
    ("nodedev-create", "no mediated devices"),
    ("nodedev-destroy", "no mediated devices"),
    ("nodedev-define", "no mediated devices"),
    ("nodedev-undefine", "no mediated devices"),
    ("nodedev-start", "no mediated devices"),
    ("nodedev-autostart", "no mediated devices"),
    (
        "send-process-signal",
        "QEMU's driver does not have it either",
    ),
    ("migrate-compcache", "XBZRLE is QEMU's"),
];

/// Families whose driver is not there: each answers as a libvirt without that driver does.
const ABSENT: &[(&str, &str)] = &[
    ("iface-", "vireod has no interface driver"),
    ("nwfilter-", "vireod has no network filter driver"),
    ("checkpoint-", "no checkpoints yet"),
    ("backup-", "no backup jobs yet"),
];

/// What is said of one command.
struct Row {
    name: &'static str,
    state: &'static str,
    note: String,
}

fn find(notes: &[(&str, &'static str)], name: &str) -> Option<&'static str> {
    notes
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, note)| *note)
}

fn row(groups: &[Group], name: &'static str, options: &[&str]) -> Row {
    let row = |state, note: &str| Row {
        name,
        state,
        note: note.to_owned(),
    };
    // A command may be there all the same, to show what the daemon says.
    if let Some(why) = find(NOT_APPLICABLE, name) {
        return row("not applicable", why);
    }
    if let Some(why) = find(REFUSED, name) {
        return row("not there", why);
    }
    if let Some((_, why)) = ABSENT.iter().find(|(family, _)| name.starts_with(family)) {
        return row("not there", why);
    }
    let Some(command) = command::find(groups, name) else {
        return row("not there", "");
    };
    let mut notes: Vec<String> = Vec::new();
    let missing: Vec<String> = options
        .iter()
        .filter(|option| !command.options.iter().any(|own| own.name == **option))
        .map(|option| format!("`--{option}`"))
        .collect();
    if !missing.is_empty() {
        notes.push(format!("without {}", missing.join(", ")));
    }
    notes.extend(find(IN_PART, name).map(str::to_owned));
    let state = if notes.is_empty() { "works" } else { "in part" };
    let note = notes.join("; ");
    Row { name, state, note }
}

/// The table, in Markdown.
pub fn table(groups: &[Group]) -> String {
    let mut body = String::new();
    let mut counts = [0; 4];
    const STATES: [&str; 4] = ["works", "in part", "not applicable", "not there"];
    let mut known = Vec::new();
    for line in VIRSH.lines() {
        // Writing to a String cannot fail.
        if let Some(title) = line.strip_prefix("# ") {
            let _ = write!(body, "\n### {title}\n\n| command | | |\n|---|---|---|\n");
            continue;
        }
        let mut words = line.split(' ');
        let Some(name) = words.next() else { continue };
        let options: Vec<&str> = words.collect();
        let row = row(groups, name, &options);
        known.push(name);
        if let Some(at) = STATES.iter().position(|state| *state == row.state) {
            counts[at] += 1;
        }
        let _ = writeln!(body, "| {} | {} | {} |", row.name, row.state, row.note);
    }
    let own: Vec<String> = groups
        .iter()
        .filter(|group| !group.is_hidden())
        .flat_map(|group| group.commands)
        .filter(|command| !known.contains(&command.name))
        .map(|command| format!("`{}`", command.name))
        .collect();
    let mut text = String::from("## Commands\n\n");
    let total: usize = counts.iter().sum();
    let said: Vec<String> = STATES
        .iter()
        .zip(counts)
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    let _ = writeln!(
        text,
        "Of virsh 9.0's {total} commands: {}.",
        said.join(", ")
    );
    if !own.is_empty() {
        let _ = writeln!(text, "Beyond virsh's: {}.", own.join(", "));
    }
    text.push_str(&body);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::GROUPS;

    fn is_virshs(name: &str) -> bool {
        VIRSH
            .lines()
            .any(|line| line.split(' ').next() == Some(name))
    }

    #[test]
    fn notes_are_on_what_they_say() {
        for (name, _) in IN_PART.iter().chain(NOT_APPLICABLE).chain(REFUSED) {
            assert!(is_virshs(name), "{name}");
        }
    }

    #[test]
    fn the_table_has_a_row_for_each_of_virshs_commands() {
        let table = table(GROUPS);
        assert!(table.contains("Of virsh 9.0's 274 commands"), "{table}");
        assert!(table.contains("\n| list | works |  |\n"), "{table}");
        assert!(table.contains("\n| iface-list | not there | vireod has no interface driver |\n"));
    }
}
