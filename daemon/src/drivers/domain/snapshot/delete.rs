//! Deleting snapshots: their descriptions, and what they hold.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use xml_schemas::snapshot::{Place, Snapshot};

use super::create::set_definitions;
use super::tree::Tree;
use super::{disks, error, merge, unknown};
use crate::drivers::domain::object::Pinned;
use crate::drivers::domain::{Driver, blocking};
use crate::error::{Error, ErrorCode, Result, check_flags};
use crate::files;
use crate::killpoint::killpoint;

/// virDomainSnapshotDeleteFlags
mod flags {
    pub const CHILDREN: u32 = 1;
    pub const METADATA_ONLY: u32 = 2;
    pub const CHILDREN_ONLY: u32 = 4;
}

pub(super) async fn delete(
    driver: &Arc<Driver>,
    domain: &Pinned,
    name: &str,
    flags: u32,
) -> Result<()> {
    check_flags(
        flags,
        flags::CHILDREN | flags::METADATA_ONLY | flags::CHILDREN_ONLY,
        "qemuDomainSnapshotDelete",
    )?;
    let tree = driver.tree(domain)?;
    tree.get(name).ok_or_else(|| unknown(name))?;
    let mut names: Vec<String> = Vec::new();
    if flags & (flags::CHILDREN | flags::CHILDREN_ONLY) != 0 {
        // The last first: what is merged goes into what stays.
        let after = tree.descendants(Some(name));
        names.extend(after.iter().rev().map(|name| (*name).to_owned()));
    }
    if flags & flags::CHILDREN_ONLY == 0 {
        names.push(name.to_owned());
    }
    for name in names {
        if flags & flags::METADATA_ONLY == 0 {
            contents(driver, domain, &name).await?;
        }
        killpoint("snapshot.merged");
        driver
            .tree(domain)?
            .remove(&name)
            .map_err(|e| Error::system("cannot remove the snapshot's description", &e))?;
    }
    Ok(())
}

/// Deletes what a snapshot holds.
async fn contents(driver: &Arc<Driver>, domain: &Pinned, name: &str) -> Result<()> {
    let tree = driver.tree(domain)?;
    let snapshot = tree.get(name).cloned().ok_or_else(|| unknown(name))?;
    let running = domain.lock().live.is_some();
    let internal: Vec<PathBuf> = internal_images(&snapshot);
    let disks = snapshot.disks.iter();
    let on_top = disks
        .into_iter()
        .any(|disk| matches!(disk.place, Some(Place::External(_))));
    if !internal.is_empty() || on_top {
        if running {
            return Err(error(
                ErrorCode::OPERATION_UNSUPPORTED,
                "what a snapshot holds can only be deleted or merged while the domain is off; \
                 its description alone with --metadata",
            ));
        }
        let name = name.to_owned();
        blocking(move || merge::internal(&internal, &name, merge::Internal::Delete)).await??;
    }
    if on_top {
        external(driver, domain, &tree, name, &snapshot).await?;
    }
    if let Some(Place::External(Some(file))) = &snapshot.memory {
        files::remove_if_there(Path::new(file))
            .map_err(|e| Error::system(format!("cannot remove '{file}'"), &e))?;
    }
    Ok(())
}

/// The images that hold an internal snapshot.
pub(super) fn internal_images(snapshot: &Snapshot) -> Vec<PathBuf> {
    let Some(definition) = &snapshot.domain else {
        return Vec::new();
    };
    let candidates = disks::candidates(definition);
    let disks = snapshot
        .disks
        .iter()
        .filter(|disk| disk.place == Some(Place::Internal));
    disks
        .filter_map(|disk| {
            let found = candidates.iter().find(|c| c.target == disk.name)?;
            Some(found.path.clone())
        })
        .collect()
}

/// Merges what the guest wrote after an external snapshot into the images from before it.
async fn external(
    driver: &Arc<Driver>,
    domain: &Pinned,
    tree: &Tree,
    name: &str,
    snapshot: &Snapshot,
) -> Result<()> {
    let Some(definition) = &snapshot.domain else {
        return Err(error(
            ErrorCode::OPERATION_UNSUPPORTED,
            "the snapshot does not say which images it is of; delete its description with --metadata",
        ));
    };
    let bases = disks::candidates(definition);
    // What goes: an image written after the snapshot, what is behind it, and the latter's format.
    let mut merges: Vec<(String, PathBuf, PathBuf, String)> = Vec::new();
    for disk in &snapshot.disks {
        if let (Some(Place::External(_)), Some(overlay)) = (&disk.place, &disk.source)
            && let Some(base) = bases.iter().find(|base| base.target == disk.name)
        {
            merges.push((
                disk.name.clone(),
                PathBuf::from(overlay),
                base.path.clone(),
                base.format.clone(),
            ));
        }
    }
    let others: Vec<&str> = tree.descendants(None);
    for (target, overlay, base, _) in &merges {
        let children = tree.children(Some(name));
        let later = children.iter().any(|child| {
            let of = tree.get(child).and_then(|child| child.domain.as_deref());
            of.is_some_and(|of| {
                disks::candidates(of)
                    .iter()
                    .any(|disk| disk.path == *overlay)
            })
        });
        if later {
            return Err(error(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!(
                    "disk '{target}': later snapshots are of '{}'; delete them first, or with it (--children)",
                    overlay.display()
                ),
            ));
        }
        // Another branch goes on from the same images: they must stay as they are.
        let shared = others.iter().filter(|other| **other != name).any(|other| {
            let Some(of) = tree.get(other).and_then(|other| other.domain.as_deref()) else {
                return false;
            };
            disks::candidates(of).iter().any(|disk| disk.path == *base)
        });
        if shared {
            return Err(error(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!(
                    "disk '{target}': another snapshot goes on from '{}' too; delete that first",
                    base.display()
                ),
            ));
        }
        let used = domain.lock().persistent.as_ref().is_some_and(|d| {
            disks::candidates(d)
                .iter()
                .any(|disk| disk.path == *overlay)
        });
        if !used {
            return Err(error(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!(
                    "disk '{target}': the domain does not use '{}' now; delete the description with --metadata",
                    overlay.display()
                ),
            ));
        }
    }
    let work = merges.clone();
    blocking(move || {
        for (_, overlay, base, format) in &work {
            merge::commit(overlay, base, format)?;
        }
        Ok::<(), Error>(())
    })
    .await??;
    killpoint("snapshot.committed");
    // Whoever named the overlay names what it was merged into; then it can go.
    let back: Vec<_> = merges
        .iter()
        .map(|(target, overlay, base, format)| {
            (
                target.clone(),
                overlay.clone(),
                base.clone(),
                format.clone(),
            )
        })
        .collect();
    let persistent = domain.lock().persistent.clone();
    let persistent = persistent.map(|definition| {
        let mut changed = xml_schemas::Domain::clone(&definition);
        put_back(&mut changed, &back);
        Arc::new(changed)
    });
    set_definitions(driver, domain, persistent, None).await?;
    let mut tree = driver.tree(domain)?;
    let names: Vec<String> = tree
        .descendants(None)
        .iter()
        .map(|n| (*n).to_owned())
        .collect();
    for other in names {
        let Some(mut changed) = tree.get(&other).cloned() else {
            continue;
        };
        if other == name {
            continue;
        }
        if let Some(definition) = &mut changed.domain {
            put_back(definition, &back);
        }
        if tree.get(&other) != Some(&changed) {
            tree.save(&other, changed)
                .map_err(|e| Error::system("cannot write a snapshot's description", &e))?;
        }
    }
    for (_, overlay, ..) in &merges {
        files::remove_if_there(overlay)
            .map_err(|e| Error::system(format!("cannot remove '{}'", overlay.display()), &e))?;
    }
    Ok(())
}

/// Has a definition name the merged images instead of what went into them.
fn put_back(definition: &mut xml_schemas::Domain, back: &[(String, PathBuf, PathBuf, String)]) {
    let used = disks::candidates(definition);
    let to: Vec<_> = back
        .iter()
        .filter(|(target, overlay, ..)| {
            used.iter()
                .any(|disk| disk.target == *target && disk.path == *overlay)
        })
        .map(|(target, _, base, format)| (target.clone(), base.clone(), format.clone()))
        .collect();
    disks::redirect(definition, &to);
}
