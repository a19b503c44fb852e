//! `event` and its like: what happens, as it happens.

pub mod monitor;
pub mod object_events;

use std::time::Duration;

use rpc::args::{
    ConnectDomainEventCallbackDeregisterAnyArgs, ConnectDomainEventCallbackRegisterAnyArgs,
    DomainEventGraphicsAddress,
};
use rpc::client::{Client, Event};
use rpc::procs;
use rpc::types::{TypedParam, TypedValue};
use tokio::time::Instant;

use super::{ANY, lookup_domain, os_message};
use crate::command::{Args, Command, Values, flag, number, text};
use crate::failure::{Failure, Result};
use crate::output::Output;
use crate::shell::Shell;
use crate::signals::Interrupt;
use crate::time;

/// `event`
pub const EVENT: Command = Command {
    name: "event",
    summary: "Domain Events",
    description: "Waits for something to happen to domains, or lists what could.",
    options: &[
        text("domain", "only this domain (name, id or uuid)").values(Values::Domains),
        text("event", "what to wait for").values(Values::Events),
        flag("all", "wait for anything, not one kind only"),
        flag("loop", "go on after the first event"),
        number("timeout", "seconds to wait at most"),
        flag("list", "list what can be waited for"),
        flag("timestamp", "print when it happened"),
    ],
    handler: event,
    connects: true,
};

/// The events by number (`VIR_DOMAIN_EVENT_ID_*`).
pub const NAMES: &[&str] = &[
    "lifecycle",
    "reboot",
    "rtc-change",
    "watchdog",
    "io-error",
    "graphics",
    "io-error-reason",
    "control-error",
    "block-job",
    "disk-change",
    "tray-change",
    "pm-wakeup",
    "pm-suspend",
    "balloon-change",
    "pm-suspend-disk",
    "device-removed",
    "block-job-2",
    "tunable",
    "agent-lifecycle",
    "device-added",
    "migration-iteration",
    "job-completed",
    "device-removal-failed",
    "metadata-change",
    "block-threshold",
    "memory-failure",
    "memory-device-size-change",
];

fn event(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("all", "event")?;
    args.exclusive("list", "all")?;
    args.exclusive("list", "event")?;
    if args.has("list") {
        for name in NAMES {
            shell.out.print(format!("{name}\n"));
        }
        return Ok(());
    }
    let kinds: Vec<usize> = match args.text("event")? {
        Some(name) => vec![kind(NAMES, name)?],
        None if args.has("all") => (0..NAMES.len()).collect(),
        None => {
            return Err(Failure::new(
                "one of --list, --all, or --event <type> is required",
            ));
        }
    };
    let dom = match args.text("domain")? {
        Some(word) => Some(lookup_domain(shell, word, ANY)?),
        None => None,
    };
    let all = args.has("all");
    let register = |shell: &mut Shell, event_id: i32| {
        let asked = ConnectDomainEventCallbackRegisterAnyArgs {
            event_id,
            dom: dom.clone(),
        };
        match shell.call(procs::CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY, &asked) {
            Ok(ret) => Ok(Some(ret.callback_id)),
            // A daemon that doesn't know one of all kinds still tells about the others.
            Err(failure) if all && !failure.disconnected => Ok(None),
            Err(failure) => Err(failure),
        }
    };
    let deregister = |shell: &mut Shell, callback_id: i32| {
        let args = ConnectDomainEventCallbackDeregisterAnyArgs { callback_id };
        shell.call(procs::CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY, &args)
    };
    wait(shell, args, &kinds, register, deregister)
}

fn kind(names: &[&str], name: &str) -> Result<usize> {
    let kind = names.iter().position(|known| *known == name);
    kind.ok_or_else(|| Failure::new(format!("unknown event type {name}")))
}

/// Registers for these kinds, prints what comes, and takes the registrations back.
fn wait(
    shell: &mut Shell,
    args: &Args,
    kinds: &[usize],
    register: impl Fn(&mut Shell, i32) -> Result<Option<i32>>,
    deregister: impl Fn(&mut Shell, i32) -> Result,
) -> Result {
    let words = |event: &Event| describe(event).or_else(|| object_events::describe(event));
    wait_for(shell, args, kinds, register, deregister, words)
}

/// As [`wait`], for what has words.
fn wait_for(
    shell: &mut Shell,
    args: &Args,
    kinds: &[usize],
    register: impl Fn(&mut Shell, i32) -> Result<Option<i32>>,
    deregister: impl Fn(&mut Shell, i32) -> Result,
    words: impl Fn(&Event) -> Option<String>,
) -> Result {
    let uri = shell.call(procs::CONNECT_GET_URI, &())?.uri;
    let timeout = match args.number::<i32>("timeout")? {
        Some(seconds @ 1..) => Some(Duration::from_secs(seconds.unsigned_abs().into())),
        None => None,
        Some(seconds) => {
            return Err(Failure::new(format!(
                "Numeric value '{seconds}' for <timeout> option is malformed or out of range"
            )));
        }
    };
    let waiting = Waiting {
        deadline: timeout.map(|timeout| Instant::now() + timeout),
        forever: args.has("loop"),
        stamps: args.has("timestamp"),
    };
    let mut registrations = Vec::new();
    for kind in kinds {
        registrations.extend(register(shell, i32::try_from(*kind).unwrap_or(i32::MAX))?);
    }
    // What is printed goes out at once: the connection is busy meanwhile, so the output is not the shell's.
    shell.out.flush();
    let mut out = Output::new(shell.out.quiet);
    let outcome = shell
        .connection()?
        .run(async |client: Client| waiting.run(&client, &mut out, &words).await);
    for callback_id in registrations {
        match deregister(shell, callback_id) {
            Err(failure) if failure.disconnected => break,
            // The daemon forgets it with the connection in any case.
            _ => {}
        }
    }
    let (count, end) = outcome?;
    match end {
        End::Interrupted => shell.out.print("event loop interrupted\n"),
        End::TimedOut => shell.out.print("event loop timed out\n"),
        End::Enough => {}
        End::Disconnected => {
            shell
                .out
                .error(&format!("Disconnected from {uri} due to end of file"));
        }
    }
    shell.out.print(format!("events received: {count}\n"));
    if matches!(end, End::Disconnected) {
        let lost = Failure::new("internal error: client socket is closed");
        return Err(Failure {
            disconnected: true,
            ..lost
        });
    }
    if count > 0 {
        Ok(())
    } else {
        Err(Failure::silent())
    }
}

/// How to wait.
struct Waiting {
    deadline: Option<Instant>,
    forever: bool,
    stamps: bool,
}

/// Why waiting ended.
enum End {
    Enough,
    Interrupted,
    TimedOut,
    Disconnected,
}

impl Waiting {
    /// Prints events as they come; returns how many came.
    async fn run(
        &self,
        client: &Client,
        out: &mut Output,
        words: &impl Fn(&Event) -> Option<String>,
    ) -> Result<(u64, End)> {
        let mut events = client.take_events().ok_or_else(|| {
            Failure::new("events of this connection were waited for before: connect again")
        })?;
        let interrupt = Interrupt::new().map_err(|error| {
            Failure::new(format!("cannot wait for Ctrl-C: {}", os_message(&error)))
        })?;
        let mut count = 0;
        loop {
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else {
                        return Ok((count, End::Disconnected));
                    };
                    let Some(text) = words(&event) else {
                        continue;
                    };
                    if self.stamps {
                        out.print(format!("{}: ", time::event_stamp()));
                    }
                    out.print(text);
                    out.flush();
                    count += 1;
                    if !self.forever {
                        return Ok((count, End::Enough));
                    }
                }
                interrupted = interrupt.wait() => {
                    interrupted.map_err(|error| Failure::new(os_message(&error)))?;
                    return Ok((count, End::Interrupted));
                }
                () = elapsed(self.deadline) => return Ok((count, End::TimedOut)),
                () = client.closed() => return Ok((count, End::Disconnected)),
            }
        }
    }
}

async fn elapsed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// A number's name, or `unknown`.
fn name(names: &[&'static str], number: i32) -> &'static str {
    usize::try_from(number)
        .ok()
        .and_then(|number| names.get(number))
        .copied()
        .unwrap_or("unknown")
}

/// What an event says, in virsh's words; nothing if it is not about domains, or cannot be understood.
fn describe(event: &Event) -> Option<String> {
    macro_rules! message {
        ($procedure:ident) => {
            event.get(procs::$procedure).transpose().ok().flatten()
        };
    }
    let line = |event: &str, domain: &str, rest: &str| {
        Some(format!("event '{event}' for domain '{domain}'{rest}\n"))
    };
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_LIFECYCLE) {
        let (event, detail) = lifecycle(m.msg.event, m.msg.detail);
        return line("lifecycle", &m.msg.dom.name, &format!(": {event} {detail}"));
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_REBOOT) {
        return line("reboot", &m.msg.dom.name, "");
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_RTC_CHANGE) {
        return line(
            "rtc-change",
            &m.msg.dom.name,
            &format!(": {}", m.msg.offset),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_WATCHDOG) {
        let actions = [
            "none",
            "pause",
            "reset",
            "poweroff",
            "shutdown",
            "debug",
            "inject-nmi",
        ];
        return line(
            "watchdog",
            &m.msg.dom.name,
            &format!(": {}", name(&actions, m.msg.action)),
        );
    }
    let io_actions = ["none", "pause", "report"];
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_IO_ERROR) {
        let action = name(&io_actions, m.msg.action);
        return line(
            "io-error",
            &m.msg.dom.name,
            &format!(": {} ({}) {action}", m.msg.src_path, m.msg.dev_alias),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_IO_ERROR_REASON) {
        let (m, action) = (&m.msg, name(&io_actions, m.msg.action));
        let rest = format!(
            ": {} ({}) {action} due to {}",
            m.src_path, m.dev_alias, m.reason
        );
        return line("io-error-reason", &m.dom.name, &rest);
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_GRAPHICS) {
        let phase = name(&["connect", "initialize", "disconnect"], m.msg.phase);
        let address = |a: &DomainEventGraphicsAddress| {
            format!(
                "[{} {} {}]",
                name(&["IPv4", "IPv6", "unix"], a.family),
                a.node,
                a.service
            )
        };
        let mut rest = format!(
            ": {phase} local{} remote{} {}\n",
            address(&m.msg.local),
            address(&m.msg.remote),
            m.msg.auth_scheme
        );
        for identity in m.msg.subject.iter() {
            rest.push_str(&format!("\t{}={}\n", identity.kind, identity.name));
        }
        return line("graphics", &m.msg.dom.name, rest.trim_end_matches('\n'));
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_CONTROL_ERROR) {
        return line("control-error", &m.msg.dom.name, "");
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_BLOCK_JOB) {
        return line(
            "block-job",
            &m.msg.dom.name,
            &block_job(m.msg.kind, m.msg.status, &m.msg.path),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_BLOCK_JOB_2) {
        return line(
            "block-job-2",
            &m.dom.name,
            &block_job(m.kind, m.status, &m.dst),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_DISK_CHANGE) {
        let (m, reason) = (&m.msg, name(&["changed", "dropped"], m.msg.reason));
        let (old, new) = (
            m.old_src_path.as_deref().unwrap_or(""),
            m.new_src_path.as_deref().unwrap_or(""),
        );
        return line(
            "disk-change",
            &m.dom.name,
            &format!(" disk {}: {old} -> {new}: {reason}", m.dev_alias),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_TRAY_CHANGE) {
        let reason = name(&["opened", "closed"], m.msg.reason);
        return line(
            "tray-change",
            &m.msg.dom.name,
            &format!(" disk {}: {reason}", m.msg.dev_alias),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_PMWAKEUP) {
        return line("pm-wakeup", &m.msg.dom.name, "");
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_PMSUSPEND) {
        return line("pm-suspend", &m.msg.dom.name, "");
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_PMSUSPEND_DISK) {
        return line("pm-suspend-disk", &m.msg.dom.name, "");
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_BALLOON_CHANGE) {
        return line(
            "balloon-change",
            &m.msg.dom.name,
            &format!(": {}KiB", m.msg.actual),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_DEVICE_REMOVED) {
        return line(
            "device-removed",
            &m.msg.dom.name,
            &format!(": {}", m.msg.dev_alias),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_TUNABLE) {
        return line("tunable", &m.dom.name, &format!(":{}", params(&m.params)));
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_AGENT_LIFECYCLE) {
        let state = name(&["unknown", "connected", "disconnected"], m.state);
        let reason = name(&["unknown", "domain started", "channel event"], m.reason);
        return line(
            "agent-lifecycle",
            &m.dom.name,
            &format!(": state: '{state}' reason: '{reason}'"),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_DEVICE_ADDED) {
        return line("device-added", &m.dom.name, &format!(": {}", m.dev_alias));
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_MIGRATION_ITERATION) {
        return line(
            "migration-iteration",
            &m.dom.name,
            &format!(": iteration: '{}'", m.iteration),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_JOB_COMPLETED) {
        return line(
            "job-completed",
            &m.dom.name,
            &format!(":{}", params(&m.params)),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_DEVICE_REMOVAL_FAILED) {
        return line(
            "device-removal-failed",
            &m.dom.name,
            &format!(": {}", m.dev_alias),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_CALLBACK_METADATA_CHANGE) {
        let kind = name(&["description", "title", "element"], m.kind);
        let uri = m.nsuri.as_deref().unwrap_or("");
        return line(
            "metadata-change",
            &m.dom.name,
            &format!(": type {kind}, uri {uri}"),
        );
    }
    if let Some(m) = message!(DOMAIN_EVENT_BLOCK_THRESHOLD) {
        let path = m.path.as_deref().unwrap_or("");
        let rest = format!(": dev: {}({path}) {} {}", m.dev, m.threshold, m.excess);
        return line("block-threshold", &m.dom.name, &rest);
    }
    if let Some(m) = message!(DOMAIN_EVENT_MEMORY_FAILURE) {
        let recipient = name(&["hypervisor", "guest"], m.recipient);
        let action = name(&["ignore", "inject", "fatal", "reset"], m.action);
        let rest = format!(
            ":\nrecipient: {recipient}\naction: {action}\nflags:\n\taction required: {}\n\trecursive: {}",
            m.flags & 1,
            m.flags >> 1 & 1
        );
        return line("memory-failure", &m.dom.name, &rest);
    }
    if let Some(m) = message!(DOMAIN_EVENT_MEMORY_DEVICE_SIZE_CHANGE) {
        let rest = format!(":\nalias: {}\nsize: {}", m.alias, m.size);
        return line("memory-device-size-change", &m.dom.name, &rest);
    }
    None
}

/// What happened in a domain's life, and why (`VIR_DOMAIN_EVENT_*`).
fn lifecycle(event: i32, detail: i32) -> (&'static str, &'static str) {
    const EVENTS: &[(&str, &[&str])] = &[
        ("Defined", &["Added", "Updated", "Renamed", "Snapshot"]),
        ("Undefined", &["Removed", "Renamed"]),
        (
            "Started",
            &["Booted", "Migrated", "Restored", "Snapshot", "Event wakeup"],
        ),
        (
            "Suspended",
            &[
                "Paused",
                "Migrated",
                "I/O Error",
                "Watchdog",
                "Restored",
                "Snapshot",
                "API error",
                "Post-copy",
                "Post-copy Error",
            ],
        ),
        (
            "Resumed",
            &[
                "Unpaused",
                "Migrated",
                "Snapshot",
                "Post-copy",
                "Post-copy Error",
            ],
        ),
        (
            "Stopped",
            &[
                "Shutdown",
                "Destroyed",
                "Crashed",
                "Migrated",
                "Saved",
                "Failed",
                "Snapshot",
            ],
        ),
        (
            "Shutdown",
            &[
                "Finished",
                "Finished after guest request",
                "Finished after host request",
            ],
        ),
        ("PMSuspended", &["Memory", "Disk"]),
        ("Crashed", &["Panicked", "Crashloaded"]),
    ];
    match usize::try_from(event)
        .ok()
        .and_then(|event| EVENTS.get(event))
    {
        Some((event, details)) => (event, name(details, detail)),
        None => ("unknown", "unknown"),
    }
}

fn block_job(kind: i32, status: i32, disk: &str) -> String {
    let kinds = [
        "Unknown job",
        "Block Pull",
        "Block Copy",
        "Block Commit",
        "Active Block Commit",
        "Backup",
    ];
    let statuses = ["completed", "failed", "canceled", "ready"];
    format!(
        ": {} for {disk} {}",
        name(&kinds, kind),
        name(&statuses, status)
    )
}

/// Named values, one a line.
fn params(params: &[TypedParam]) -> String {
    let mut text = String::new();
    for param in params {
        let value = match &param.value {
            TypedValue::Int(value) => value.to_string(),
            TypedValue::UInt(value) => value.to_string(),
            TypedValue::LLong(value) => value.to_string(),
            TypedValue::ULLong(value) => value.to_string(),
            TypedValue::Double(value) => format!("{value:.6}"),
            TypedValue::Boolean(value) => u8::from(*value).to_string(),
            TypedValue::String(value) => value.clone(),
        };
        text.push_str(&format!("\n\t{}: {value}", param.field));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc::args::{DomainEventCallbackLifecycleMsg, DomainEventLifecycleMsg};
    use rpc::types::Domain;
    use rpc::xdr::to_bytes;

    #[test]
    fn a_lifecycle_event_is_told_in_virshs_words() {
        let dom = Domain::new("x", [0; 16], Some(1));
        let msg = DomainEventLifecycleMsg {
            dom,
            event: 5,
            detail: 1,
        };
        let payload = to_bytes(&DomainEventCallbackLifecycleMsg {
            callback_id: 0,
            msg,
        })
        .unwrap();
        let event = Event {
            procedure: 318,
            payload,
        };
        assert_eq!(
            describe(&event).unwrap(),
            "event 'lifecycle' for domain 'x': Stopped Destroyed\n"
        );
    }

    #[test]
    fn what_is_not_understood_is_left_out() {
        assert_eq!(
            describe(&Event {
                procedure: 318,
                payload: vec![1, 2, 3]
            }),
            None
        );
        assert_eq!(
            describe(&Event {
                procedure: 315,
                payload: Vec::new()
            }),
            None
        );
    }

    #[test]
    fn unknown_numbers_have_a_name() {
        assert_eq!(lifecycle(2, 0), ("Started", "Booted"));
        assert_eq!(lifecycle(6, 2), ("Shutdown", "Finished after host request"));
        assert_eq!(lifecycle(99, 0), ("unknown", "unknown"));
        assert_eq!(lifecycle(-1, -1), ("unknown", "unknown"));
    }
}
