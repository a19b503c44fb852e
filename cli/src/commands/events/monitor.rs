//! `qemu-monitor-event`: what QEMU's monitor tells, of a daemon whose domains have one.

use rpc::args::{
    QemuConnectDomainMonitorEventDeregisterArgs, QemuConnectDomainMonitorEventRegisterArgs,
};
use rpc::client::Event;
use rpc::procs;

use super::super::agent::pretty;
use super::super::{ANY, lookup_domain};
use super::wait_for;
use crate::command::{Args, Command, Values, flag, number, text};
use crate::failure::Result;
use crate::shell::Shell;

/// `qemu-monitor-event`
pub const QEMU_MONITOR_EVENT: Command = Command {
    name: "qemu-monitor-event",
    summary: "QEMU Monitor Events",
    description: "Waits for an event of QEMU's monitor.",
    options: &[
        text("domain", "only this domain (name, id or uuid)").values(Values::Domains),
        text("event", "only events of this name"),
        flag("pretty", "print JSON in several lines"),
        flag("loop", "go on after the first event"),
        number("timeout", "seconds to wait at most"),
        flag("regex", "the event's name is a pattern"),
        flag("no-case", "upper and lower case are the same"),
        flag("timestamp", "print when it came"),
    ],
    handler: monitor_event,
    connects: true,
};

/// VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX
const REGEX: u32 = 1;
/// VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_NOCASE
const NO_CASE: u32 = 2;

fn monitor_event(shell: &mut Shell, args: &Args) -> Result {
    let mut flags = 0;
    if args.has("regex") {
        flags |= REGEX;
    }
    if args.has("no-case") {
        flags |= NO_CASE;
    }
    let event = args.text("event")?.map(str::to_owned);
    let dom = match args.text("domain")? {
        Some(word) => Some(lookup_domain(shell, word, ANY)?),
        None => None,
    };
    let register = |shell: &mut Shell, _| {
        let asked = QemuConnectDomainMonitorEventRegisterArgs {
            dom: dom.clone(),
            event: event.clone(),
            flags,
        };
        let made = shell.call(procs::CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER, &asked)?;
        Ok(Some(made.callback_id))
    };
    let deregister = |shell: &mut Shell, callback_id| {
        let asked = QemuConnectDomainMonitorEventDeregisterArgs { callback_id };
        shell.call(procs::CONNECT_DOMAIN_QEMU_MONITOR_EVENT_DEREGISTER, &asked)
    };
    let (stamped, in_lines) = (args.has("timestamp"), args.has("pretty"));
    wait_for(shell, args, &[0], register, deregister, |event| {
        describe(event, stamped, in_lines)
    })
}

/// An event in virsh's words; nothing if it is not one of a monitor.
fn describe(event: &Event, stamped: bool, in_lines: bool) -> Option<String> {
    let message = event.get(procs::DOMAIN_QEMU_MONITOR_EVENT)?.ok()?;
    let details = message.details.unwrap_or_else(|| "<null>".to_owned());
    let details = if in_lines { pretty(&details) } else { details };
    let (name, domain) = (message.event, message.dom.name);
    Some(if stamped {
        format!("event {name} for domain '{domain}': {details}\n")
    } else {
        let (seconds, micros) = (message.seconds, message.micros);
        format!("event {name} at {seconds}.{micros:06} for domain '{domain}': {details}\n")
    })
}
