//! A domain's life: start, stop, pause, name.

use rpc::args::{
    DomainCreateArgs, DomainCreateWithFlagsArgs, DomainDestroyArgs, DomainDestroyFlagsArgs,
    DomainHasManagedSaveImageArgs, DomainInjectNmiArgs, DomainManagedSaveRemoveArgs,
    DomainRebootArgs, DomainRenameArgs, DomainResetArgs, DomainResumeArgs, DomainSetAutostartArgs,
    DomainShutdownArgs, DomainShutdownFlagsArgs, DomainSuspendArgs,
};
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::types::Domain;

use super::{ANY, ID_OR_UUID, NAME_OR_ID, NAME_OR_UUID, console, find_domain, format_uuid};
use crate::command::{Args, Command, DOMAIN, Values, data, domain, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

/// `start`
pub const START: Command = Command {
    name: "start",
    summary: "start a (previously defined) inactive domain",
    description: "Starts a domain: from its managed save image, if it has one,\n    else with a fresh boot.",
    options: &[
        domain("name of the domain that is off"),
        flag("console", "connect to its console at once"),
        flag("paused", "leave the guest paused"),
        flag(
            "autodestroy",
            "destroy the guest when this program's connection ends",
        ),
        flag(
            "bypass-cache",
            "keep the saved state out of the file system cache",
        ),
        flag("force-boot", "throw a managed save image away and boot"),
        text("pass-fds", "descriptors N,M,... to hand to the guest"),
        flag("reset-nvram", "make the NVRAM anew from its template"),
    ],
    handler: start,
    connects: true,
};

/// `shutdown`
pub const SHUTDOWN: Command = Command {
    name: "shutdown",
    summary: "gracefully shutdown a domain",
    description: "Asks the guest to power itself off.",
    options: &[
        DOMAIN,
        text("mode", "how to ask: acpi|agent|initctl|signal|paravirt").values(MODES),
    ],
    handler: shutdown,
    connects: true,
};

/// `reboot`
pub const REBOOT: Command = Command {
    name: "reboot",
    summary: "reboot a domain",
    description: "Asks the guest to boot again.",
    options: &[
        DOMAIN,
        text("mode", "how to ask: acpi|agent|initctl|signal|paravirt").values(MODES),
    ],
    handler: reboot,
    connects: true,
};

/// `reset`
pub const RESET: Command = Command {
    name: "reset",
    summary: "reset a domain",
    description: "Resets a domain as the reset button would, without asking the guest.",
    options: &[DOMAIN],
    handler: reset,
    connects: true,
};

/// `destroy`
pub const DESTROY: Command = Command {
    name: "destroy",
    summary: "destroy (stop) a domain",
    description: "Stops a domain at once, as pulling the plug would. What it is made of stays.",
    options: &[
        DOMAIN,
        flag("graceful", "don't kill it if it doesn't stop in time"),
        flag("remove-logs", "remove its logs"),
    ],
    handler: destroy,
    connects: true,
};

/// `suspend`
pub const SUSPEND: Command = Command {
    name: "suspend",
    summary: "suspend a domain",
    description: "Pauses a running domain.",
    options: &[DOMAIN],
    handler: suspend,
    connects: true,
};

/// `resume`
pub const RESUME: Command = Command {
    name: "resume",
    summary: "resume a domain",
    description: "Lets a paused domain run on.",
    options: &[DOMAIN],
    handler: resume,
    connects: true,
};

/// `autostart`
pub const AUTOSTART: Command = Command {
    name: "autostart",
    summary: "autostart a domain",
    description: "Lets a domain start with the host.",
    options: &[
        DOMAIN,
        flag("disable", "don't start it with the host any more"),
    ],
    handler: autostart,
    connects: true,
};

/// `inject-nmi`
pub const INJECT_NMI: Command = Command {
    name: "inject-nmi",
    summary: "Inject NMI to the guest",
    description: "Raises a non-maskable interrupt in the guest.",
    options: &[DOMAIN],
    handler: inject_nmi,
    connects: true,
};

/// `domid`
pub const DOMID: Command = Command {
    name: "domid",
    summary: "convert a domain name or UUID to domain id",
    description: "",
    options: &[domain("domain name or uuid")],
    handler: domid,
    connects: true,
};

/// `domuuid`
pub const DOMUUID: Command = Command {
    name: "domuuid",
    summary: "convert a domain name or id to domain UUID",
    description: "",
    options: &[domain("domain id or name")],
    handler: domuuid,
    connects: true,
};

/// `domname`
pub const DOMNAME: Command = Command {
    name: "domname",
    summary: "convert a domain id or UUID to domain name",
    description: "",
    options: &[domain("domain id or uuid")],
    handler: domname,
    connects: true,
};

/// `domrename`
pub const DOMRENAME: Command = Command {
    name: "domrename",
    summary: "rename a domain",
    description: "Gives a domain that is off another name.",
    options: &[
        domain("domain name or uuid"),
        data("new-name", "its name from now on"),
    ],
    handler: domrename,
    connects: true,
};

/// Ways to ask a guest, with their bits in `virDomainShutdownFlags` and `virDomainReboot`.
const MODES: Values = Values::Words(&["acpi", "agent", "initctl", "paravirt", "signal"]);
const MODE_BITS: &[(&str, u32)] = &[
    ("acpi", 1 << 0),
    ("agent", 1 << 1),
    ("initctl", 1 << 2),
    ("signal", 1 << 3),
    ("paravirt", 1 << 4),
];

/// `VIR_DOMAIN_START_*`
pub const START_PAUSED: u32 = 1 << 0;
/// See [`START_PAUSED`].
pub const START_AUTODESTROY: u32 = 1 << 1;
const START_BYPASS_CACHE: u32 = 1 << 2;
const START_FORCE_BOOT: u32 = 1 << 3;
/// See [`START_PAUSED`].
pub const START_VALIDATE: u32 = 1 << 4;
/// See [`START_PAUSED`].
pub const START_RESET_NVRAM: u32 = 1 << 5;

/// Refuses descriptors: the daemon has nothing yet that takes them.
///
/// # Errors
///
/// Some were given.
pub fn refuse_descriptors(args: &Args) -> Result {
    match args.text("pass-fds")? {
        Some(_) => Err(Failure::new(
            "passing file descriptors to a guest (--pass-fds) is not supported",
        )),
        None => Ok(()),
    }
}

/// Option names and the bits that they set.
pub fn flags(args: &Args, bits: &[(&str, u32)]) -> u32 {
    bits.iter()
        .filter(|(name, _)| args.has(name))
        .fold(0, |flags, (_, bit)| flags | bit)
}

fn start(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, NAME_OR_UUID)?;
    if dom.active_id().is_some() {
        return Err(Failure::new("Domain is already active"));
    }
    refuse_descriptors(args)?;
    let flags = flags(
        args,
        &[
            ("paused", START_PAUSED),
            ("autodestroy", START_AUTODESTROY),
            ("bypass-cache", START_BYPASS_CACHE),
            ("force-boot", START_FORCE_BOOT),
            ("reset-nvram", START_RESET_NVRAM),
        ],
    );
    let dom = create(shell, &dom, flags)
        .with_context(|| format!("Failed to start domain '{}'", dom.name))?;
    shell
        .out
        .print_extra(format!("Domain '{}' started\n", dom.name));
    if args.has("console") {
        console::run(shell, &dom, None, 0)?;
    }
    Ok(())
}

fn create(shell: &mut Shell, dom: &Domain, flags: u32) -> Result<Domain> {
    // The call without flags is the older one, which every daemon has.
    if flags == 0 {
        shell.call(procs::DOMAIN_CREATE, &DomainCreateArgs { dom: dom.clone() })?;
        return Ok(dom.clone());
    }
    let with = |flags| DomainCreateWithFlagsArgs {
        dom: dom.clone(),
        flags,
    };
    match shell.call(procs::DOMAIN_CREATE_WITH_FLAGS, &with(flags)) {
        // An old daemon can be made to boot by removing the image first.
        Err(failure)
            if flags & START_FORCE_BOOT != 0
                && matches!(
                    failure.code,
                    Some(ErrorCode::NO_SUPPORT | ErrorCode::INVALID_ARG)
                ) =>
        {
            let saved = DomainHasManagedSaveImageArgs {
                dom: dom.clone(),
                flags: 0,
            };
            if shell
                .call(procs::DOMAIN_HAS_MANAGED_SAVE_IMAGE, &saved)?
                .result
                > 0
            {
                let remove = DomainManagedSaveRemoveArgs {
                    dom: dom.clone(),
                    flags: 0,
                };
                shell.call(procs::DOMAIN_MANAGED_SAVE_REMOVE, &remove)?;
            }
            Ok(shell
                .call(
                    procs::DOMAIN_CREATE_WITH_FLAGS,
                    &with(flags & !START_FORCE_BOOT),
                )?
                .dom)
        }
        result => Ok(result?.dom),
    }
}

fn modes(args: &Args, last: &str) -> Result<Option<u32>> {
    let Some(modes) = args.text("mode")? else {
        return Ok(None);
    };
    let mut flags = 0;
    for mode in modes.split(',') {
        let (_, bit) = MODE_BITS.iter().find(|(name, _)| *name == mode).ok_or_else(|| {
            Failure::new(format!(
                "Unknown mode {mode} value, expecting 'acpi', 'agent', 'initctl', 'signal'{last} 'paravirt'"
            ))
        })?;
        flags |= bit;
    }
    Ok(Some(flags))
}

/// The word with which the user named the domain, which most messages repeat.
fn named(args: &Args) -> Result<String> {
    args.required("domain").map(str::to_owned)
}

fn shutdown(shell: &mut Shell, args: &Args) -> Result {
    let modes = modes(args, ", or")?;
    let name = named(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let asked = match modes {
        Some(flags) => shell.call(
            procs::DOMAIN_SHUTDOWN_FLAGS,
            &DomainShutdownFlagsArgs { dom, flags },
        ),
        None => shell.call(procs::DOMAIN_SHUTDOWN, &DomainShutdownArgs { dom }),
    };
    asked.with_context(|| format!("Failed to shutdown domain '{name}'"))?;
    shell
        .out
        .print_extra(format!("Domain '{name}' is being shutdown\n"));
    Ok(())
}

fn reboot(shell: &mut Shell, args: &Args) -> Result {
    let flags = modes(args, " or")?.unwrap_or(0);
    let name = named(args)?;
    let dom = find_domain(shell, args, ANY)?;
    shell
        .call(procs::DOMAIN_REBOOT, &DomainRebootArgs { dom, flags })
        .with_context(|| format!("Failed to reboot domain '{name}'"))?;
    shell
        .out
        .print_extra(format!("Domain '{name}' is being rebooted\n"));
    Ok(())
}

fn reset(shell: &mut Shell, args: &Args) -> Result {
    let name = named(args)?;
    let dom = find_domain(shell, args, ANY)?;
    shell
        .call(procs::DOMAIN_RESET, &DomainResetArgs { dom, flags: 0 })
        .with_context(|| format!("Failed to reset domain '{name}'"))?;
    shell
        .out
        .print_extra(format!("Domain '{name}' was reset\n"));
    Ok(())
}

fn destroy(shell: &mut Shell, args: &Args) -> Result {
    let name = named(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let flags = flags(args, &[("graceful", 1 << 0), ("remove-logs", 1 << 1)]);
    let destroyed = if flags == 0 {
        shell.call(procs::DOMAIN_DESTROY, &DomainDestroyArgs { dom })
    } else {
        shell.call(
            procs::DOMAIN_DESTROY_FLAGS,
            &DomainDestroyFlagsArgs { dom, flags },
        )
    };
    destroyed.with_context(|| format!("Failed to destroy domain '{name}'"))?;
    shell
        .out
        .print_extra(format!("Domain '{name}' destroyed\n"));
    Ok(())
}

fn suspend(shell: &mut Shell, args: &Args) -> Result {
    let name = named(args)?;
    let dom = find_domain(shell, args, ANY)?;
    shell
        .call(procs::DOMAIN_SUSPEND, &DomainSuspendArgs { dom })
        .with_context(|| format!("Failed to suspend domain '{name}'"))?;
    shell
        .out
        .print_extra(format!("Domain '{name}' suspended\n"));
    Ok(())
}

fn resume(shell: &mut Shell, args: &Args) -> Result {
    let name = named(args)?;
    let dom = find_domain(shell, args, ANY)?;
    shell
        .call(procs::DOMAIN_RESUME, &DomainResumeArgs { dom })
        .with_context(|| format!("Failed to resume domain '{name}'"))?;
    shell.out.print_extra(format!("Domain '{name}' resumed\n"));
    Ok(())
}

fn autostart(shell: &mut Shell, args: &Args) -> Result {
    let name = named(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let (mark, autostart) = if args.has("disable") {
        ("unmark", 0)
    } else {
        ("mark", 1)
    };
    shell
        .call(
            procs::DOMAIN_SET_AUTOSTART,
            &DomainSetAutostartArgs { dom, autostart },
        )
        .with_context(|| format!("Failed to {mark} domain '{name}' as autostarted"))?;
    shell
        .out
        .print_extra(format!("Domain '{name}' {mark}ed as autostarted\n"));
    Ok(())
}

fn inject_nmi(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    shell.call(
        procs::DOMAIN_INJECT_NMI,
        &DomainInjectNmiArgs { dom, flags: 0 },
    )
}

fn domid(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, NAME_OR_UUID)?;
    let id = dom
        .active_id()
        .map_or_else(|| "-".to_owned(), |id| id.to_string());
    shell.out.print(id + "\n");
    Ok(())
}

fn domuuid(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, NAME_OR_ID)?;
    shell.out.print(format_uuid(&dom.uuid) + "\n");
    Ok(())
}

fn domname(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ID_OR_UUID)?;
    shell.out.print(dom.name + "\n");
    Ok(())
}

fn domrename(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, NAME_OR_UUID)?;
    let new_name = Some(args.required("new-name")?.to_owned());
    shell.call(
        procs::DOMAIN_RENAME,
        &DomainRenameArgs {
            dom,
            new_name,
            flags: 0,
        },
    )?;
    shell.out.print_extra("Domain successfully renamed\n");
    Ok(())
}
