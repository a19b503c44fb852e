//! What domains use: `domstats`, `dommemstat`; and `set-lifecycle-action`.

use rpc::args::{
    ConnectGetAllDomainStatsArgs, DomainMemoryStatsArgs, DomainSetLifecycleActionArgs,
    DomainSetMemoryStatsPeriodArgs,
};
use rpc::procs;

use super::{ANY, affected, find_domain, lookup_domain, params};
use crate::command::{Args, Command, DOMAIN, Values, data, flag, number, rest};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

/// `domstats`
pub const DOMSTATS: Command = Command {
    name: "domstats",
    summary: "get statistics about one or multiple domains",
    description: "Shows what domains use: all of them, or those that are named.",
    options: &[
        flag("state", "state and its reason"),
        flag("cpu-total", "CPU time"),
        flag("balloon", "memory"),
        flag("vcpu", "virtual CPUs"),
        flag("interface", "network cards"),
        flag("block", "disks"),
        flag("perf", "performance events"),
        flag("iothread", "I/O threads"),
        flag("memory", "memory bandwidth"),
        flag("dirtyrate", "how fast memory changes"),
        flag("vm", "what the hypervisor counts"),
        flag("list-active", "only domains that run"),
        flag("list-inactive", "only domains that don't run"),
        flag(
            "list-persistent",
            "only domains with a definition that stays",
        ),
        flag(
            "list-transient",
            "only domains without a definition that stays",
        ),
        flag("list-running", "only domains that are running"),
        flag("list-paused", "only domains that are paused"),
        flag("list-shutoff", "only domains that are shut off"),
        flag("list-other", "only domains in any other state"),
        flag("raw", "values as they are"),
        flag("enforce", "fail if a group is not known"),
        flag("backing", "what is behind images, too"),
        flag("nowait", "leave out what would have to wait"),
        rest("domain", "the domains").values(Values::Domains),
    ],
    handler: domstats,
    connects: true,
};

/// `dommemstat`
pub const DOMMEMSTAT: Command = Command {
    name: "dommemstat",
    summary: "get memory statistics for a domain",
    description: "Shows how a running domain uses its memory, or changes how often the guest is asked.",
    options: &[
        DOMAIN,
        number("period", "seconds between two questions; 0: none").named_only(),
        flag("config", "from the next boot on"),
        flag("live", "for the running domain"),
        flag("current", "for the domain as it is now"),
    ],
    handler: dommemstat,
    connects: true,
};

/// `set-lifecycle-action`
pub const SET_LIFECYCLE_ACTION: Command = Command {
    name: "set-lifecycle-action",
    summary: "change lifecycle actions",
    description: "Changes what a guest's power-off, reset or crash does.",
    options: &[
        DOMAIN,
        data("type", "poweroff, reboot or crash").values(Values::Words(LIFECYCLES)),
        data("action", "what it does").values(Values::Words(ACTIONS)),
        flag("config", "from the next boot on"),
        flag("live", "for the running domain"),
        flag("current", "for the domain as it is now"),
    ],
    handler: set_lifecycle_action,
    connects: true,
};

/// virDomainLifecycle
const LIFECYCLES: &[&str] = &["poweroff", "reboot", "crash"];
/// virDomainLifecycleAction
const ACTIONS: &[&str] = &[
    "destroy",
    "restart",
    "rename-restart",
    "preserve",
    "coredump-destroy",
    "coredump-restart",
];

/// virDomainStatsTypes
const GROUPS: &[(&str, u32)] = &[
    ("state", 1),
    ("cpu-total", 1 << 1),
    ("balloon", 1 << 2),
    ("vcpu", 1 << 3),
    ("interface", 1 << 4),
    ("block", 1 << 5),
    ("perf", 1 << 6),
    ("iothread", 1 << 7),
    ("memory", 1 << 8),
    ("dirtyrate", 1 << 9),
    ("vm", 1 << 10),
];

/// virConnectGetAllDomainStatsFlags
const FLAGS: &[(&str, u32)] = &[
    ("list-active", 1),
    ("list-inactive", 1 << 1),
    ("list-persistent", 1 << 2),
    ("list-transient", 1 << 3),
    ("list-running", 1 << 4),
    ("list-paused", 1 << 5),
    ("list-shutoff", 1 << 6),
    ("list-other", 1 << 7),
    ("nowait", 1 << 29),
    ("backing", 1 << 30),
    ("enforce", 1 << 31),
];

fn bits(args: &Args, table: &[(&str, u32)]) -> u32 {
    table
        .iter()
        .filter(|(name, _)| args.has(name))
        .fold(0, |all, (_, bit)| all | bit)
}

fn domstats(shell: &mut Shell, args: &Args) -> Result {
    let mut doms = Vec::new();
    for word in args.rest("domain") {
        doms.push(lookup_domain(shell, word, ANY)?);
    }
    let asked = ConnectGetAllDomainStatsArgs {
        doms: doms.into(),
        stats: bits(args, GROUPS),
        flags: bits(args, FLAGS),
    };
    let found = shell.call(procs::CONNECT_GET_ALL_DOMAIN_STATS, &asked)?;
    for (at, record) in found.ret_stats.0.iter().enumerate() {
        let mut text = String::new();
        if at > 0 {
            text.push('\n');
        }
        text.push_str(&format!("Domain: '{}'\n", record.dom.name));
        for param in &record.params.0 {
            text.push_str(&format!(
                "  {}={}\n",
                param.field,
                params::text(&param.value)
            ));
        }
        shell.out.print(text);
    }
    Ok(())
}

/// virDomainMemoryStatTags by number.
const TAGS: [&str; 13] = [
    "swap_in",
    "swap_out",
    "major_fault",
    "minor_fault",
    "unused",
    "available",
    "actual",
    "rss",
    "usable",
    "last_update",
    "disk_caches",
    "hugetlb_pgalloc",
    "hugetlb_pgfail",
];

fn dommemstat(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    if let Some(period) = args.number::<i32>("period")? {
        if period < 0 {
            return Err(Failure::new(format!(
                "Invalid collection period value '{period}'"
            )));
        }
        let asked = DomainSetMemoryStatsPeriodArgs { dom, period, flags };
        return shell
            .call(procs::DOMAIN_SET_MEMORY_STATS_PERIOD, &asked)
            .context("Unable to change balloon collection period.");
    }
    let name = dom.name.clone();
    let asked = DomainMemoryStatsArgs {
        dom,
        max_stats: 13,
        flags: 0,
    };
    let found = shell
        .call(procs::DOMAIN_MEMORY_STATS, &asked)
        .context(format!("Failed to get memory statistics for domain {name}"))?;
    for stat in found.stats.0 {
        // A newer daemon's tags are left out.
        let tag = usize::try_from(stat.tag).ok().and_then(|tag| TAGS.get(tag));
        if let Some(tag) = tag {
            shell.out.print(format!("{tag} {}\n", stat.val));
        }
    }
    Ok(())
}

fn set_lifecycle_action(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let of = |words: &[&str], option: &str, what: &str| {
        let word = args.required(option)?;
        let at = words.iter().position(|known| *known == word);
        at.and_then(|at| u32::try_from(at).ok())
            .ok_or_else(|| Failure::new(format!("Invalid lifecycle {what} '{word}'.")))
    };
    let kind = of(LIFECYCLES, "type", "type")?;
    let action = of(ACTIONS, "action", "action")?;
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainSetLifecycleActionArgs {
        dom,
        kind,
        action,
        flags,
    };
    shell
        .call(procs::DOMAIN_SET_LIFECYCLE_ACTION, &asked)
        .context("Unable to change lifecycle action.")
}
