//! `list`.

use std::cmp::Ordering;
use std::collections::HashMap;

use rpc::args::{
    ConnectGetAllDomainStatsArgs, DomainGetMetadataArgs, DomainGetStateArgs,
    DomainHasManagedSaveImageArgs,
};
use rpc::procs;
use rpc::types::{Domain, TypedValue};

use super::monitor::State;
use super::{format_uuid, list_domains, metadata};
use crate::command::{Args, Command, flag};
use crate::failure::{Context, Result};
use crate::shell::Shell;
use crate::table::Table;

/// The command.
pub const LIST: Command = Command {
    name: "list",
    summary: "list domains",
    description: "Shows the domains: those that run, or the chosen ones.",
    options: &[
        flag("inactive", "only domains that don't run"),
        flag("all", "domains that run and domains that don't"),
        flag("transient", "domains without a definition that stays"),
        flag("persistent", "domains with a definition that stays"),
        flag("with-snapshot", "domains that have a snapshot"),
        flag("without-snapshot", "domains that have no snapshot"),
        flag("with-checkpoint", "domains that have a checkpoint"),
        flag("without-checkpoint", "domains that have no checkpoint"),
        flag("state-running", "domains that are running"),
        flag("state-paused", "domains that are paused"),
        flag("state-shutoff", "domains that are shut off"),
        flag("state-other", "domains in any other state"),
        flag("autostart", "domains that start with the host"),
        flag("no-autostart", "domains that don't start with the host"),
        flag("with-managed-save", "domains with a managed save image"),
        flag(
            "without-managed-save",
            "domains without a managed save image",
        ),
        flag("uuid", "print UUIDs only"),
        flag("name", "print names only"),
        flag("id", "print ids only"),
        flag("table", "print a table (what happens anyway)"),
        flag(
            "managed-save",
            "tell which domains that are off have a managed save image",
        ),
        flag("title", "show the titles"),
    ],
    handler: list,
    connects: true,
};

const ACTIVE: u32 = 1;
const INACTIVE: u32 = 2;

/// Options that add a filter (`VIR_CONNECT_LIST_DOMAINS_*`).
const FILTERS: &[(&str, u32)] = &[
    ("persistent", 1 << 2),
    ("transient", 1 << 3),
    ("state-running", 1 << 4),
    ("state-paused", 1 << 5),
    ("state-shutoff", 1 << 6),
    ("state-other", 1 << 7),
    ("with-managed-save", 1 << 8),
    ("without-managed-save", 1 << 9),
    ("autostart", 1 << 10),
    ("no-autostart", 1 << 11),
    ("with-snapshot", 1 << 12),
    ("without-snapshot", 1 << 13),
    ("with-checkpoint", 1 << 14),
    ("without-checkpoint", 1 << 15),
];

fn filters(args: &Args) -> u32 {
    let chosen = if args.has("all") {
        ACTIVE | INACTIVE
    } else if args.has("inactive") || args.has("state-shutoff") {
        INACTIVE
    } else {
        ACTIVE
    };
    FILTERS
        .iter()
        .filter(|(name, _)| args.has(name))
        .fold(chosen, |flags, (_, flag)| flags | flag)
}

/// Running domains by id, then the others by name.
fn order(a: &Domain, b: &Domain) -> Ordering {
    match (a.active_id(), b.active_id()) {
        (Some(a), Some(b)) => a.cmp(&b),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => a
            .name
            .to_lowercase()
            .cmp(&b.name.to_lowercase())
            .then_with(|| a.name.cmp(&b.name)),
    }
}

fn list(shell: &mut Shell, args: &Args) -> Result {
    for kind in ["name", "uuid", "id"] {
        args.exclusive("table", kind)?;
    }
    let (uuids, names, ids) = (args.has("uuid"), args.has("name"), args.has("id"));
    let mut domains = list_domains(shell, filters(args)).context("Failed to list domains")?;
    domains.sort_by(order);
    if !(uuids || names || ids) {
        return table(shell, args, &domains);
    }
    for domain in &domains {
        let mut words = Vec::new();
        if uuids {
            words.push(format_uuid(&domain.uuid));
        }
        if ids {
            match domain.active_id() {
                Some(id) => words.push(id.to_string()),
                // A list of nothing but ids has only domains that have one.
                None if uuids || names => words.push("-".into()),
                None => continue,
            }
        }
        if names {
            words.push(domain.name.clone());
        }
        shell.out.print(words.join(" ") + "\n");
    }
    Ok(())
}

fn table(shell: &mut Shell, args: &Args, domains: &[Domain]) -> Result {
    let titles = args.has("title");
    let header: &[&str] = if titles {
        &["Id", "Name", "State", "Title"]
    } else {
        &["Id", "Name", "State"]
    };
    let mut table = Table::new(header);
    for (domain, state) in domains.iter().zip(states(shell, args, domains)?) {
        let id = domain
            .active_id()
            .map_or_else(|| "-".to_owned(), |id| id.to_string());
        let shown = if args.has("managed-save")
            && state == State::SHUT_OFF
            && has_managed_save(shell, domain)?
        {
            "saved"
        } else {
            state.name()
        };
        if titles {
            let title = title(shell, domain)?;
            table.row([id.as_str(), &domain.name, shown, &title]);
        } else {
            table.row([id.as_str(), &domain.name, shown]);
        }
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

/// The states of domains: all at once, and one by one where that is not to be had.
fn states(shell: &mut Shell, args: &Args, domains: &[Domain]) -> Result<Vec<State>> {
    /// VIR_DOMAIN_STATS_STATE
    const STATE: u32 = 1;
    /// The filters that both calls have (VIR_CONNECT_GET_ALL_DOMAINS_STATS_*).
    const ALIKE: u32 = 0xff;
    let mut known = HashMap::new();
    if domains.len() > 1 {
        let asked = ConnectGetAllDomainStatsArgs {
            stats: STATE,
            flags: filters(args) & ALIKE,
            ..Default::default()
        };
        match shell.call(procs::CONNECT_GET_ALL_DOMAIN_STATS, &asked) {
            Ok(ret) => {
                for record in ret.ret_stats.0.iter() {
                    let state = record.params.0.iter().find(|p| p.field == "state.state");
                    if let Some(TypedValue::Int(state)) = state.map(|param| &param.value) {
                        known.insert(record.dom.uuid, State(*state));
                    }
                }
            }
            Err(failure) if failure.disconnected => return Err(failure),
            Err(_) => {}
        }
    }
    let unknown = domains.iter().filter(|dom| !known.contains_key(&dom.uuid));
    let asked: Vec<_> = unknown
        .map(|dom| DomainGetStateArgs {
            dom: dom.clone(),
            flags: 0,
        })
        .collect();
    let uuids: Vec<_> = asked.iter().map(|args| args.dom.uuid).collect();
    let answers = shell
        .connection()?
        .call_each(procs::DOMAIN_GET_STATE, asked)?;
    for (uuid, answer) in uuids.into_iter().zip(answers) {
        let state = match answer {
            Ok(ret) => State(ret.state),
            Err(failure) if failure.disconnected => return Err(failure),
            // A domain that went away since it was listed.
            Err(_) => State(0),
        };
        known.insert(uuid, state);
    }
    let state = |dom: &Domain| known.get(&dom.uuid).copied().unwrap_or(State(0));
    Ok(domains.iter().map(state).collect())
}

fn has_managed_save(shell: &mut Shell, domain: &Domain) -> Result<bool> {
    let args = DomainHasManagedSaveImageArgs {
        dom: domain.clone(),
        flags: 0,
    };
    match shell.call(procs::DOMAIN_HAS_MANAGED_SAVE_IMAGE, &args) {
        Ok(ret) => Ok(ret.result > 0),
        Err(failure) if failure.is_unsupported() => Ok(false),
        Err(failure) => Err(failure.context("Failed to check for managed save image")),
    }
}

/// The domain's title, or nothing if it has none.
fn title(shell: &mut Shell, domain: &Domain) -> Result<String> {
    let args = DomainGetMetadataArgs {
        dom: domain.clone(),
        kind: metadata::TITLE,
        uri: None,
        flags: 0,
    };
    match shell.call(procs::DOMAIN_GET_METADATA, &args) {
        Ok(ret) => Ok(ret.metadata),
        Err(failure) if failure.disconnected => Err(failure),
        Err(_) => Ok(String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::GROUPS;
    use crate::parser::parse_line;

    #[test]
    fn running_domains_come_first_and_the_others_by_name() {
        let mut domains = [
            Domain::new("b", [0; 16], None),
            Domain::new("z", [0; 16], Some(2)),
            Domain::new("A", [0; 16], None),
            Domain::new("y", [0; 16], Some(10)),
        ];
        domains.sort_by(order);
        assert_eq!(domains.map(|domain| domain.name), ["z", "y", "A", "b"]);
    }

    #[test]
    fn options_become_filters() {
        let flags = |line: &str| filters(&parse_line(GROUPS, line).unwrap()[0].args);
        assert_eq!(flags("list"), 1);
        assert_eq!(flags("list --inactive"), 2);
        assert_eq!(flags("list --all"), 3);
        assert_eq!(flags("list --state-shutoff"), 2 | 64);
        assert_eq!(flags("list --transient --no-autostart"), 1 | 8 | 2048);
        assert_eq!(flags("list --all --without-checkpoint"), 3 | 32768);
    }
}
