//! `snapshot-list`.

use rpc::args::{DomainListAllSnapshotsArgs, DomainSnapshotListAllChildrenArgs};
use rpc::procs;
use rpc::types::Snapshot;

use super::{current_of, lookup, parent_of, parsed};
use crate::command::{Args, Command, DOMAIN, flag, text};
use crate::commands::domain::flags;
use crate::commands::{ANY, find_domain};
use crate::failure::Result;
use crate::shell::Shell;
use crate::table::Table;
use crate::time;

/// `snapshot-list`
pub const SNAPSHOT_LIST: Command = Command {
    name: "snapshot-list",
    summary: "List snapshots for a domain",
    description: "Lists a domain's snapshots.",
    options: &[
        DOMAIN,
        flag("parent", "add a column showing parent snapshot"),
        flag("roots", "list only snapshots without parents"),
        flag("leaves", "list only snapshots without children"),
        flag(
            "no-leaves",
            "list only snapshots that aren't leaves (with children)",
        ),
        flag(
            "metadata",
            "list only snapshots that have metadata that would prevent undefine",
        ),
        flag(
            "no-metadata",
            "list only snapshots that have no metadata managed by libvirt",
        ),
        flag("inactive", "filter by snapshots taken while inactive"),
        flag(
            "active",
            "filter by snapshots taken while active (full system snapshots)",
        ),
        flag("disk-only", "filter by disk-only snapshots"),
        flag("internal", "filter by internal snapshots"),
        flag("external", "filter by external snapshots"),
        flag("tree", "list snapshots in a tree"),
        text("from", "limit list to children of given snapshot"),
        flag("current", "limit list to children of current snapshot"),
        flag("descendants", "with --from, list all descendants"),
        flag("name", "list snapshot names only"),
        flag("topological", "sort list topologically rather than by name"),
    ],
    handler: list,
    connects: true,
};

fn list(shell: &mut Shell, args: &Args) -> Result {
    for (one, other) in [
        ("tree", "name"),
        ("parent", "roots"),
        ("parent", "tree"),
        ("roots", "tree"),
        ("roots", "from"),
        ("roots", "current"),
        ("current", "from"),
    ] {
        args.exclusive(one, other)?;
    }
    let mut bits = flags(
        args,
        &[
            ("roots", 1 << 0),
            ("metadata", 1 << 1),
            ("leaves", 1 << 2),
            ("no-leaves", 1 << 3),
            ("no-metadata", 1 << 4),
            ("inactive", 1 << 5),
            ("active", 1 << 6),
            ("disk-only", 1 << 7),
            ("internal", 1 << 8),
            ("external", 1 << 9),
            ("topological", 1 << 10),
        ],
    );
    let dom = find_domain(shell, args, ANY)?;
    let start = match args.text("from")? {
        Some(name) => Some(lookup(shell, &dom, name)?),
        None if args.has("current") => Some(current_of(shell, &dom)?),
        None => None,
    };
    let mut snapshots: Vec<Snapshot> = match &start {
        None => {
            let args = DomainListAllSnapshotsArgs {
                dom: dom.clone(),
                need_results: 1,
                flags: bits,
            };
            let ret = shell.call(procs::DOMAIN_LIST_ALL_SNAPSHOTS, &args)?;
            ret.snapshots.into_iter().collect()
        }
        Some(start) => {
            if args.has("descendants") || args.has("tree") {
                bits |= 1;
            }
            let call = DomainSnapshotListAllChildrenArgs {
                snapshot: start.clone(),
                need_results: 1,
                flags: bits,
            };
            let ret = shell.call(procs::DOMAIN_SNAPSHOT_LIST_ALL_CHILDREN, &call)?;
            ret.snapshots.into_iter().collect()
        }
    };
    if !args.has("topological") {
        snapshots.sort_by(|a, b| a.name.cmp(&b.name));
    }
    if args.has("tree") {
        if let Some(start) = start {
            snapshots.insert(0, start);
        }
        return tree(shell, &snapshots);
    }
    if args.has("name") {
        for snapshot in snapshots {
            shell.out.print(format!("{}\n", snapshot.name));
        }
        return Ok(());
    }
    let with_parent = args.has("parent");
    let mut table = Table::new(if with_parent {
        &["Name", "Creation Time", "State", "Parent"]
    } else {
        &["Name", "Creation Time", "State"]
    });
    for snapshot in &snapshots {
        let document = parsed(shell, snapshot)?;
        let created = document.child_text("creationTime");
        let created = created
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        let mut cells = vec![
            snapshot.name.clone(),
            time::local_at("%Y-%m-%d %H:%M:%S %z", created),
            document.child_text("state").unwrap_or_default(),
        ];
        if with_parent {
            cells.push(parent_of(shell, snapshot)?.unwrap_or_default());
        }
        table.row(cells);
    }
    let header = !shell.out.quiet;
    shell.out.print(table.format(header));
    Ok(())
}

/// Every snapshot below the one before it.
fn tree(shell: &mut Shell, snapshots: &[Snapshot]) -> Result {
    let mut nodes = Vec::new();
    for snapshot in snapshots {
        nodes.push((snapshot.name.clone(), parent_of(shell, snapshot)?));
    }
    print_tree(shell, nodes);
    Ok(())
}

/// Prints names as trees, each below the one that it comes after; whose parent is not there is a root.
pub fn print_tree(shell: &mut Shell, mut nodes: Vec<(String, Option<String>)>) {
    let names: Vec<String> = nodes.iter().map(|node| node.0.clone()).collect();
    for (_, parent) in &mut nodes {
        parent.take_if(|parent| !names.contains(parent));
    }
    let roots: Vec<usize> = (0..nodes.len())
        .filter(|at| nodes[*at].1.is_none())
        .collect();
    let mut text = String::new();
    for root in roots {
        branch(&nodes, root, true, true, &mut String::new(), &mut text);
    }
    shell.out.print(text);
}

fn branch(
    nodes: &[(String, Option<String>)],
    at: usize,
    root: bool,
    last: bool,
    indent: &mut String,
    text: &mut String,
) {
    let name = &nodes[at].0;
    let mark = if root { "" } else { "+- " };
    text.push_str(&format!("{indent}{mark}{name}\n"));
    let before = indent.len();
    if !root {
        indent.push_str(if last { "  " } else { "| " });
    }
    let children: Vec<usize> = (0..nodes.len())
        .filter(|child| nodes[*child].1.as_deref() == Some(name))
        .collect();
    if !children.is_empty() {
        text.push_str(&format!("{indent}  |\n"));
    }
    indent.push_str("  ");
    for (number, child) in children.iter().enumerate() {
        let last = number + 1 == children.len();
        branch(nodes, *child, false, last, indent, text);
    }
    indent.truncate(indent.len() - 2);
    if children.is_empty() && last {
        text.push_str(&format!("{indent}\n"));
    }
    indent.truncate(before);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_look_as_virshs() {
        let node = |name: &str, parent: Option<&str>| (name.to_owned(), parent.map(str::to_owned));
        let nodes = [
            node("a", None),
            node("b", Some("a")),
            node("c", Some("b")),
            node("d", Some("a")),
        ];
        let mut text = String::new();
        branch(&nodes, 0, true, true, &mut String::new(), &mut text);
        assert_eq!(
            text,
            "a\n  |\n  +- b\n  |   |\n  |   +- c\n  |     \n  +- d\n    \n"
        );
    }
}
