//! Commands that tell how a domain is: `dominfo`, `domstate`, `domcontrol`.

use rpc::args::{
    DomainGetAutostartArgs, DomainGetControlInfoArgs, DomainGetInfoArgs, DomainGetMessagesArgs,
    DomainGetOsTypeArgs, DomainGetSecurityLabelArgs, DomainGetStateArgs,
    DomainHasManagedSaveImageArgs, DomainIsPersistentArgs,
};
use rpc::procs;
use rpc::types::Domain;

use super::{ANY, find_domain, format_uuid};
use crate::command::{Args, Command, DOMAIN, flag};
use crate::failure::{Failure, Result};
use crate::shell::Shell;

/// `dominfo`
pub const DOMINFO: Command = Command {
    name: "dominfo",
    summary: "domain information",
    description: "Shows what a domain is made of and how it is.",
    options: &[DOMAIN],
    handler: dominfo,
    connects: true,
};

/// `domstate`
pub const DOMSTATE: Command = Command {
    name: "domstate",
    summary: "domain state",
    description: "Shows whether a domain runs, is paused, or is off.",
    options: &[DOMAIN, flag("reason", "also tell how it came to be so")],
    handler: domstate,
    connects: true,
};

/// `domcontrol`
pub const DOMCONTROL: Command = Command {
    name: "domcontrol",
    summary: "domain control interface state",
    description: "Shows whether the daemon can control a running domain, or what keeps it busy.",
    options: &[DOMAIN],
    handler: domcontrol,
    connects: true,
};

/// A domain's state (`VIR_DOMAIN_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State(pub i32);

impl State {
    /// `VIR_DOMAIN_SHUTOFF`
    pub const SHUT_OFF: Self = Self(5);

    /// The state for people.
    pub fn name(self) -> &'static str {
        const NAMES: [&str; 8] = [
            "no state",
            "running",
            "idle",
            "paused",
            "in shutdown",
            "shut off",
            "crashed",
            "pmsuspended",
        ];
        usize::try_from(self.0)
            .ok()
            .and_then(|state| NAMES.get(state))
            .unwrap_or(&NAMES[0])
    }

    /// The reason for the state, for people.
    pub fn reason(self, reason: i32) -> &'static str {
        let reasons: &[&str] = match self.0 {
            1 => &[
                "unknown",
                "booted",
                "migrated",
                "restored",
                "from snapshot",
                "unpaused",
                "migration canceled",
                "save canceled",
                "event wakeup",
                "crashed",
                "post-copy",
                "post-copy failed",
            ],
            3 => &[
                "unknown",
                "user",
                "migrating",
                "saving",
                "dumping",
                "I/O error",
                "watchdog",
                "from snapshot",
                "shutting down",
                "creating snapshot",
                "crashed",
                "starting up",
                "post-copy",
                "post-copy failed",
                "api error",
            ],
            4 => &["unknown", "user"],
            5 => &[
                "unknown",
                "shutdown",
                "destroyed",
                "crashed",
                "migrated",
                "saved",
                "failed",
                "from snapshot",
                "daemon",
            ],
            6 => &["unknown", "panicked"],
            _ => &["unknown"],
        };
        usize::try_from(reason)
            .ok()
            .and_then(|reason| reasons.get(reason))
            .unwrap_or(&"unknown")
    }
}

/// Asks for a domain's state and its reason.
///
/// # Errors
///
/// The daemon's.
pub fn state(shell: &mut Shell, dom: &Domain) -> Result<(State, i32)> {
    let ret = shell.call(
        procs::DOMAIN_GET_STATE,
        &DomainGetStateArgs {
            dom: dom.clone(),
            flags: 0,
        },
    )?;
    Ok((State(ret.state), ret.reason))
}

/// What a call answered, or nothing if the daemon refused; only a lost connection is a failure.
fn optional<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(failure) if failure.disconnected => Err(failure),
        Err(_) => Ok(None),
    }
}

fn dominfo(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let line = |shell: &mut Shell, name: &str, value: &str| {
        shell.out.print(format!("{name:<15} {value}\n"));
    };
    let id = dom
        .active_id()
        .map_or_else(|| "-".to_owned(), |id| id.to_string());
    line(shell, "Id:", &id);
    line(shell, "Name:", &dom.name);
    line(shell, "UUID:", &format_uuid(&dom.uuid));
    let os = shell.call(
        procs::DOMAIN_GET_OS_TYPE,
        &DomainGetOsTypeArgs { dom: dom.clone() },
    );
    if let Some(os) = optional(os)? {
        line(shell, "OS Type:", &os.kind);
    }
    let info = shell.call(
        procs::DOMAIN_GET_INFO,
        &DomainGetInfoArgs { dom: dom.clone() },
    )?;
    line(
        shell,
        "State:",
        State(i32::try_from(info.state).unwrap_or(0)).name(),
    );
    line(shell, "CPU(s):", &info.nr_virt_cpu.to_string());
    if info.cpu_time != 0 {
        // Nanoseconds.
        line(
            shell,
            "CPU time:",
            &format!("{:.1}s", info.cpu_time as f64 / 1e9),
        );
    }
    let max = if info.max_mem == u64::MAX {
        "no limit".into()
    } else {
        format!("{} KiB", info.max_mem)
    };
    line(shell, "Max memory:", &max);
    line(shell, "Used memory:", &format!("{} KiB", info.memory));

    let yes_no = |value: Option<i32>| match value {
        Some(0) => "no",
        Some(1..) => "yes",
        _ => "unknown",
    };
    let persistent = shell.call(
        procs::DOMAIN_IS_PERSISTENT,
        &DomainIsPersistentArgs { dom: dom.clone() },
    );
    line(
        shell,
        "Persistent:",
        yes_no(optional(persistent)?.map(|ret| ret.persistent)),
    );
    let autostart = shell.call(
        procs::DOMAIN_GET_AUTOSTART,
        &DomainGetAutostartArgs { dom: dom.clone() },
    );
    if let Some(ret) = optional(autostart)? {
        line(
            shell,
            "Autostart:",
            if ret.autostart != 0 {
                "enable"
            } else {
                "disable"
            },
        );
    }
    let saved = DomainHasManagedSaveImageArgs {
        dom: dom.clone(),
        flags: 0,
    };
    let saved = shell.call(procs::DOMAIN_HAS_MANAGED_SAVE_IMAGE, &saved);
    line(
        shell,
        "Managed save:",
        yes_no(optional(saved)?.map(|ret| ret.result)),
    );
    security(shell, &dom)?;

    let messages = DomainGetMessagesArgs { dom, flags: 0 };
    let messages = match shell.call(procs::DOMAIN_GET_MESSAGES, &messages) {
        Ok(ret) => ret.msgs.0,
        Err(failure) if failure.is_unsupported() => Vec::new(),
        Err(failure) => return Err(failure),
    };
    for (index, message) in messages.iter().enumerate() {
        line(shell, if index == 0 { "Messages:" } else { "" }, message);
    }
    Ok(())
}

fn security(shell: &mut Shell, dom: &Domain) -> Result {
    let model = match shell.call(procs::NODE_GET_SECURITY_MODEL, &()) {
        Ok(model) => model,
        Err(failure) if failure.is_unsupported() => return Ok(()),
        Err(failure) => return Err(failure),
    };
    if model.model.text().is_empty() {
        return Ok(());
    }
    shell.out.print(format!(
        "{:<15} {}\n",
        "Security model:",
        model.model.text()
    ));
    shell
        .out
        .print(format!("{:<15} {}\n", "Security DOI:", model.doi.text()));
    let args = DomainGetSecurityLabelArgs { dom: dom.clone() };
    let label = match shell.call(procs::DOMAIN_GET_SECURITY_LABEL, &args) {
        Ok(label) => label,
        Err(failure) if failure.is_unsupported() => return Ok(()),
        Err(failure) => return Err(failure),
    };
    if !label.label.text().is_empty() {
        let enforcing = if label.enforcing != 0 {
            "enforcing"
        } else {
            "permissive"
        };
        shell.out.print(format!(
            "{:<15} {} ({enforcing})\n",
            "Security label:",
            label.label.text()
        ));
    }
    Ok(())
}

fn domstate(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let (state, reason) = state(shell, &dom)?;
    if args.has("reason") {
        shell
            .out
            .print(format!("{} ({})\n", state.name(), state.reason(reason)));
    } else {
        shell.out.print(format!("{}\n", state.name()));
    }
    Ok(())
}

fn domcontrol(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let info = shell.call(
        procs::DOMAIN_GET_CONTROL_INFO,
        &DomainGetControlInfoArgs { dom, flags: 0 },
    )?;
    let (ok, error) = (0, 3);
    let state = match info.state {
        0 => "ok",
        1 => "background job",
        2 => "occupied",
        3 => "error",
        other => {
            return Err(Failure::new(format!(
                "unknown state {other} of the control interface"
            )));
        }
    };
    let text = if info.state == error {
        let details = match info.details {
            2 => "monitor failure",
            3 => "internal (locking) error",
            _ => "unknown",
        };
        format!("{state}: {details}\n")
    } else if info.state != ok && info.state_time > 0 {
        // Milliseconds.
        format!("{state} ({:.3}s)\n", info.state_time as f64 / 1000.0)
    } else {
        format!("{state}\n")
    };
    shell.out.print(text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_and_reasons_have_virshs_names() {
        assert_eq!(State(1).name(), "running");
        assert_eq!(State(5).name(), "shut off");
        assert_eq!(State(99).name(), "no state");
        assert_eq!(State(-1).name(), "no state");
        assert_eq!(State(1).reason(1), "booted");
        assert_eq!(State(3).reason(1), "user");
        assert_eq!(State(5).reason(2), "destroyed");
        assert_eq!(State(6).reason(1), "panicked");
        assert_eq!(State(5).reason(77), "unknown");
    }
}
