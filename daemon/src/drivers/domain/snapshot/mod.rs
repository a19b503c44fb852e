//! Snapshots: made, listed, gone back to, deleted.
//!
//! A snapshot counts when its file is written, which is last. Before a running domain's disks are
//! switched to new images, its definitions name them: a new image that is still empty reads as
//! what is behind it, so whatever happens in between nothing is lost.

mod create;
mod delete;
mod disks;
mod memory;
mod merge;
mod revert;
mod tree;

use std::sync::Arc;

use xml_schemas::Domain as Definition;
use xml_schemas::snapshot::{Place, Snapshot, SnapshotState};

pub(super) use self::create::set_definitions;
use self::tree::Tree;
use super::Driver;
use super::object::{Domain, Pinned};
use crate::error::{Error, ErrorCode, ErrorDomain, Result, check_flags};

/// virDomainSnapshotListFlags
pub mod list_flags {
    /// Those without a parent; of one's: all after it, not only the next.
    pub const ROOTS_OR_DESCENDANTS: u32 = 1;
    /// Those that have metadata: all.
    pub const METADATA: u32 = 2;
    /// Those without children.
    pub const LEAVES: u32 = 4;
    /// Those with children.
    pub const NO_LEAVES: u32 = 8;
    /// Those without metadata: none.
    pub const NO_METADATA: u32 = 16;
    /// Of a domain that was off.
    pub const INACTIVE: u32 = 32;
    /// Of a domain with its memory.
    pub const ACTIVE: u32 = 64;
    /// Of its disks only.
    pub const DISK_ONLY: u32 = 128;
    /// In the disks' own images.
    pub const INTERNAL: u32 = 256;
    /// In files of their own.
    pub const EXTERNAL: u32 = 512;
    /// All of them, and parents before children: every list here is so.
    pub const ALL: u32 = 0x7ff;
}

/// Has a disk of a definition use another image.
pub(super) fn redirect_disk(definition: &mut Definition, target: &str, path: &str, format: &str) {
    let to = (target.to_owned(), path.into(), format.to_owned());
    disks::redirect(definition, &[to]);
}

fn error(code: ErrorCode, text: impl Into<String>) -> Error {
    Error::of(ErrorDomain::DOMAIN_SNAPSHOT, code, text)
}

fn unknown(name: &str) -> Error {
    Error::new(
        ErrorCode::NO_DOMAIN_SNAPSHOT,
        format!("no domain snapshot with matching name '{name}'"),
    )
}

/// Some part of it is in a file of its own.
fn is_external(snapshot: &Snapshot) -> bool {
    matches!(snapshot.memory, Some(Place::External(_)))
        || snapshot
            .disks
            .iter()
            .any(|disk| matches!(disk.place, Some(Place::External(_))))
}

/// Whether a list with these filters has this snapshot. No filter of a pair, or both: no matter.
fn passes(tree: &Tree, name: &str, snapshot: &Snapshot, flags: u32) -> bool {
    use list_flags::*;
    let pair = |yes: u32, no: u32, is: bool| match (flags & yes != 0, flags & no != 0) {
        (true, false) => is,
        (false, true) => !is,
        _ => true,
    };
    let leaf = tree.children(Some(name)).is_empty();
    let kind = match snapshot.state {
        Some(SnapshotState::Shutoff) => INACTIVE,
        Some(SnapshotState::DiskSnapshot) => DISK_ONLY,
        _ => ACTIVE,
    };
    let kinds = flags & (INACTIVE | ACTIVE | DISK_ONLY);
    pair(METADATA, NO_METADATA, true)
        && pair(LEAVES, NO_LEAVES, leaf)
        && pair(INTERNAL, EXTERNAL, !is_external(snapshot))
        && (kinds == 0 || kinds & kind != 0)
}

impl Driver {
    fn tree(&self, domain: &Domain) -> Result<Tree> {
        let name = domain.lock().name.clone();
        Tree::load(self.roots.snapshots().join(name))
            .map_err(|e| Error::system("cannot read the domain's snapshots", &e))
    }

    /// How many snapshots a domain has.
    ///
    /// # Errors
    /// Their folder can't be read.
    pub fn count_snapshots(&self, domain: &Domain) -> Result<usize> {
        Ok(self.tree(domain)?.len())
    }

    /// The names of a domain's snapshots that pass the filters, parents first; `after`: of those
    /// that come after this one.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn list_snapshots(
        &self,
        domain: &Domain,
        after: Option<&str>,
        flags: u32,
    ) -> Result<Vec<String>> {
        check_flags(flags, list_flags::ALL, "qemuDomainSnapshotListNames")?;
        let tree = self.tree(domain)?;
        if let Some(name) = after {
            tree.get(name).ok_or_else(|| unknown(name))?;
        }
        let nearest = flags & list_flags::ROOTS_OR_DESCENDANTS != 0;
        // For the domain's own list the flag narrows, for one snapshot's it widens.
        let names = if nearest == after.is_some() {
            tree.descendants(after)
        } else {
            tree.children(after)
        };
        let mut list = Vec::new();
        for name in names {
            if let Some(snapshot) = tree.get(name)
                && passes(&tree, name, snapshot, flags)
            {
                list.push(name.to_owned());
            }
        }
        Ok(list)
    }

    /// The one of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn snapshot(&self, domain: &Domain, name: &str) -> Result<Snapshot> {
        let tree = self.tree(domain)?;
        tree.get(name).cloned().ok_or_else(|| unknown(name))
    }

    /// The one the domain goes on from, if there is one.
    ///
    /// # Errors
    /// The folder's.
    pub fn current_snapshot(&self, domain: &Domain) -> Result<Option<String>> {
        Ok(self.tree(domain)?.current().map(str::to_owned))
    }

    /// The parent of a snapshot.
    ///
    /// # Errors
    /// There is no such snapshot, or it has none.
    pub fn snapshot_parent(&self, domain: &Domain, name: &str) -> Result<String> {
        let tree = self.tree(domain)?;
        tree.get(name).ok_or_else(|| unknown(name))?;
        let parent = tree.parent(name).map(str::to_owned);
        parent.ok_or_else(|| {
            Error::new(
                ErrorCode::NO_DOMAIN_SNAPSHOT,
                format!("snapshot '{name}' does not have a parent"),
            )
        })
    }

    /// Before a domain is undefined: its snapshots' descriptions go, or keep it from it.
    ///
    /// # Errors
    /// There are some, and they are to stay.
    pub(super) fn forget_snapshots(&self, domain: &Domain, allowed: bool) -> Result<()> {
        let mut tree = self.tree(domain)?;
        if tree.len() > 0 && !allowed {
            return Err(Error::invalid(format!(
                "cannot delete inactive domain with {} snapshots",
                tree.len()
            )));
        }
        let names: Vec<String> = tree
            .descendants(None)
            .iter()
            .rev()
            .map(|n| (*n).to_owned())
            .collect();
        for name in names {
            tree.remove(&name)
                .map_err(|e| Error::system("cannot remove a snapshot's description", &e))?;
        }
        // Another domain of this name would find them.
        tree.clear_away()
            .map_err(|e| Error::system("cannot remove what snapshots left", &e))
    }

    /// Makes a snapshot; its name.
    ///
    /// # Errors
    /// The document's; what is not possible; what the host says. The domain is as before then.
    pub async fn create_snapshot(
        self: &Arc<Self>,
        domain: Pinned,
        xml: String,
        flags: u32,
    ) -> Result<String> {
        let _job = domain.job().await?;
        create::create(self, &domain, &xml, flags).await
    }

    /// Brings a domain back to a snapshot.
    ///
    /// # Errors
    /// There is none; it can't be gone back to; what the host says.
    pub async fn revert(self: &Arc<Self>, domain: Pinned, name: String, flags: u32) -> Result<()> {
        let _job = domain.job().await?;
        revert::revert(self, &domain, &name, flags).await
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// There is none; what it holds can't be merged; what the host says.
    pub async fn delete_snapshot(
        self: &Arc<Self>,
        domain: Pinned,
        name: String,
        flags: u32,
    ) -> Result<()> {
        let _job = domain.job().await?;
        delete::delete(self, &domain, &name, flags).await
    }
}
