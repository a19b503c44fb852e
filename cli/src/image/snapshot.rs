//! `snapshot`: an image's internal snapshots.

use std::time::{SystemTime, UNIX_EPOCH};

use images::qcow2::Snapshot;
use images::tree::Opener;

use super::args::{Args, Spec, flag, human, value};
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, OBJECT, QUIET, SHARE, Secrets, message};
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    SHARE,
    flag('l', &["list"]),
    value('c', &["create"]),
    value('a', &["apply"]),
    value('d', &["delete"]),
];

/// The snapshots as a table.
pub fn list(all: &[Snapshot]) -> String {
    let mut out = format!(
        "Snapshot list:\n{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for one in all {
        let seconds = one.clock / 1_000_000_000;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            one.clock / 1_000_000 % 1000
        );
        let count = one.icount.map_or(String::new(), |count| count.to_string());
        out.push_str(&format!(
            "{:<7} {:<16} {:>8} {:>19} {clock:>15} {count:>10}\n",
            one.id,
            one.name,
            human(one.state_size),
            date(one.date.0.into())
        ));
    }
    out
}

/// Local time, as `2026-11-28 22:50:54`.
fn date(seconds: i64) -> String {
    let mut parts = std::mem::MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: reads the number and writes the structure; both outlive the call.
    let done = unsafe { libc::localtime_r(&raw const seconds, parts.as_mut_ptr()) };
    if done.is_null() {
        return seconds.to_string();
    }
    // SAFETY: zeroed, which is a valid value, and filled by the call.
    let parts = unsafe { parts.assume_init() };
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        parts.tm_year + 1900,
        parts.tm_mon + 1,
        parts.tm_mday,
        parts.tm_hour,
        parts.tm_min,
        parts.tm_sec
    )
}

pub fn run(args: Args) -> Done {
    let named = open::one_file(&args, "snapshot", "Expecting one image file name")?;
    let mut actions = args
        .each()
        .filter(|(name, _)| matches!(*name, "list" | "create" | "apply" | "delete"));
    let action = actions.next().unwrap_or(("list", "".as_ref()));
    if actions.next().is_some() {
        return Err(Failure::usage(
            "snapshot",
            "Cannot mix '-l', '-a', '-c', '-d'",
        ));
    }
    let secrets = Secrets::of(&args)?;
    let opener = Opener {
        share: args.has("force-share"),
        ..Opener::default()
    };
    if action.0 == "list" {
        let layer = open::first(named.open(
            &Opener {
                metadata_only: true,
                no_backing: true,
                ..opener
            },
            &secrets,
        )?)?;
        let all = match &layer.qcow2 {
            Some(qcow2) => qcow2.snapshots()?,
            None => Vec::new(),
        };
        if !all.is_empty() {
            say(&list(&all));
        }
        return Ok(0);
    }
    let name = action.1.to_string_lossy().into_owned();
    let layer = open::first(open::open_writable(
        &named,
        &opener,
        &secrets,
        args.has("quiet"),
    )?)?;
    let verb = action.0;
    let cannot = |why: &str| Failure::new(format!("Could not {verb} snapshot '{name}': {why}"));
    let Some(qcow2) = &layer.qcow2 else {
        return Err(cannot("Operation not supported"));
    };
    let done = match verb {
        "create" => {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
            qcow2
                .snapshot_create(&name, (seconds, now.subsec_nanos()))
                .map(|_| ())
        }
        "apply" => qcow2.snapshot_apply(&name),
        _ => qcow2.snapshot_delete(&name),
    };
    done.map_err(|error| match (verb, message(&error)) {
        ("apply", why) if why == "snapshot not found" => {
            cannot("Failed to load snapshot: No such file or directory")
        }
        (_, why) => cannot(&why),
    })?;
    Ok(0)
}
