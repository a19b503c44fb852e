//! Memory and virtual CPUs: `setmem`, `setmaxmem`, `vcpucount`.

use rpc::args::{DomainGetVcpusFlagsArgs, DomainSetMemoryFlagsArgs};
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::types::Domain;

use super::{AFFECT_CONFIG, AFFECT_LIVE, ANY, affected, find_domain};
use crate::command::{Args, Command, DOMAIN, flag, number};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::size;

/// `setmaxmem`
pub const SETMAXMEM: Command = Command {
    name: "setmaxmem",
    summary: "change maximum memory limit",
    description: "Changes how much memory a domain can have at most.",
    options: &[
        DOMAIN,
        number("size", "the new limit, with a unit (KiB without one)").required(),
        flag("config", "from the next boot on"),
        flag("live", "for the running domain"),
        flag("current", "for the domain as it is now"),
    ],
    handler: setmaxmem,
    connects: true,
};

/// `setmem`
pub const SETMEM: Command = Command {
    name: "setmem",
    summary: "change memory allocation",
    description: "Changes how much memory a domain has.",
    options: &[
        DOMAIN,
        number("size", "the new amount, with a unit (KiB without one)").required(),
        flag("config", "from the next boot on"),
        flag("live", "for the running domain"),
        flag("current", "for the domain as it is now"),
    ],
    handler: setmem,
    connects: true,
};

/// `vcpucount`
pub const VCPUCOUNT: Command = Command {
    name: "vcpucount",
    summary: "domain vcpu counts",
    description: "Shows how many virtual CPUs a domain has.",
    options: &[
        DOMAIN,
        flag("maximum", "how many it can have at most"),
        flag("active", "how many it has"),
        flag("live", "of the running domain"),
        flag("config", "from the next boot on"),
        flag("current", "of the domain as it is now"),
        flag("guest", "ask the guest instead"),
    ],
    handler: vcpucount,
    connects: true,
};

/// The size that was asked for, in KiB, rounded up.
fn kibibytes(args: &Args) -> Result<u64> {
    let text = args.required("size")?;
    let bytes = size::parse(text, 1024).map_err(|why| {
        let failure = Failure::new(format!(
            "Scaled numeric value '{text}' for <size> option is malformed or out of range"
        ));
        match why {
            Some(why) => Failure {
                lines: [failure.lines, vec![why]].concat(),
                ..failure
            },
            None => failure,
        }
    })?;
    Ok(bytes.div_ceil(1024))
}

/// `VIR_DOMAIN_MEM_MAXIMUM`
const MEM_MAXIMUM: u32 = 1 << 2;

fn setmaxmem(shell: &mut Shell, args: &Args) -> Result {
    set_memory(shell, args, MEM_MAXIMUM).context("Unable to change MaxMemorySize")
}

fn setmem(shell: &mut Shell, args: &Args) -> Result {
    set_memory(shell, args, 0)
}

fn set_memory(shell: &mut Shell, args: &Args, what: u32) -> Result {
    let mut flags = affected(args)? | what;
    // Asked for nothing in particular, virsh means the running domain.
    if flags == 0 && !args.has("current") {
        flags = AFFECT_LIVE;
    }
    let dom = find_domain(shell, args, ANY)?;
    let memory = kibibytes(args)?;
    let args = DomainSetMemoryFlagsArgs { dom, memory, flags };
    shell.call(procs::DOMAIN_SET_MEMORY_FLAGS, &args)
}

/// `VIR_DOMAIN_VCPU_*`
const VCPU_MAXIMUM: u32 = 1 << 2;
const VCPU_GUEST: u32 = 1 << 3;

fn count(shell: &mut Shell, dom: &Domain, flags: u32) -> Result<i32> {
    let args = DomainGetVcpusFlagsArgs {
        dom: dom.clone(),
        flags,
    };
    Ok(shell.call(procs::DOMAIN_GET_VCPUS_FLAGS, &args)?.num)
}

fn vcpucount(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("active", "maximum")?;
    args.exclusive("guest", "config")?;
    args.exclusive("live", "config")?;
    args.exclusive("current", "config")?;
    // virsh takes --current beside --live.
    let mut flags = match (args.has("live"), args.has("config")) {
        (true, _) => AFFECT_LIVE,
        (_, true) => AFFECT_CONFIG,
        _ => 0,
    };
    let dom = find_domain(shell, args, ANY)?;
    // A daemon that knows the call says enough by itself.
    let too_old = |failure: Failure, line: String| match failure.code {
        Some(ErrorCode::INVALID_ARG | ErrorCode::NO_SUPPORT) => failure.context(line),
        _ => failure,
    };
    if args.has("guest") {
        let number = count(shell, &dom, flags | VCPU_GUEST).map_err(|failure| {
            too_old(
                failure,
                "Failed to retrieve vCPU count from the guest".into(),
            )
        })?;
        shell.out.print(format!("{number}\n"));
        return Ok(());
    }
    if args.has("maximum") {
        flags |= VCPU_MAXIMUM;
    }
    let one = ["maximum", "active", "live", "config", "current"]
        .iter()
        .any(|name| args.has(name));
    if one {
        let what = if args.has("maximum") {
            "maximum"
        } else {
            "current"
        };
        let number = count(shell, &dom, flags)
            .map_err(|failure| too_old(failure, format!("Failed to retrieve {what} vcpu count")))?;
        shell.out.print(format!("{number}\n"));
        return Ok(());
    }
    for (name, kind) in [("maximum", VCPU_MAXIMUM), ("current", 0)] {
        for (state, affect) in [("config", AFFECT_CONFIG), ("live", AFFECT_LIVE)] {
            match count(shell, &dom, kind | affect) {
                Ok(number) => shell
                    .out
                    .print(format!("{name:<12} {state:<12} {number:>3}\n")),
                // It has no definition that stays, or isn't running: there is nothing to tell.
                Err(failure)
                    if matches!(
                        failure.code,
                        Some(ErrorCode::OPERATION_INVALID | ErrorCode::INVALID_ARG)
                    ) => {}
                Err(failure) => {
                    let what = if kind == VCPU_MAXIMUM {
                        "maximum"
                    } else {
                        "current"
                    };
                    return Err(failure.context(format!("Failed to retrieve {what} vcpu count")));
                }
            }
        }
    }
    Ok(())
}
