//! Deleting snapshots: their descriptions, and what they hold.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use xml_schemas::snapshot::{Place, Snapshot};

use vmm_api::control::{Call, DiskSnapshot};

use super::create::{SNAPSHOT_LIMIT, set_definitions, tidy};
use super::tree::Tree;
use super::{disks, error, merge, unknown};
use crate::drivers::domain::block_jobs::chain;
use crate::drivers::domain::lifecycle::ask_within;
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
    tidy(driver, domain).await?;
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
    let disks = snapshot.disks.iter();
    let on_top = disks
        .into_iter()
        .any(|disk| matches!(disk.place, Some(Place::External(_))));
    inside(domain, &snapshot, name).await?;
    if on_top {
        external(driver, domain, &tree, name, &snapshot).await?;
    }
    if let Some(Place::External(Some(file))) = &snapshot.memory {
        files::remove_if_there(Path::new(file))
            .map_err(|e| Error::system(format!("cannot remove '{file}'"), &e))?;
    }
    if snapshot.memory == Some(Place::Internal) {
        files::remove_if_there(&tree.memory(name))
            .map_err(|e| Error::system("cannot remove the snapshot's memory", &e))?;
    }
    Ok(())
}

/// Deletes what a snapshot has inside the disks' images.
pub(super) async fn inside(domain: &Pinned, snapshot: &Snapshot, name: &str) -> Result<()> {
    let images = internal_images(snapshot);
    if images.is_empty() {
        return Ok(());
    }
    let live = {
        let inner = domain.lock();
        let live = inner.live.as_ref();
        live.map(|live| disks::candidates(&live.definition))
    };
    let Some(live) = live else {
        let name = name.to_owned();
        return blocking(move || merge::internal(&images, &name, merge::Internal::Delete)).await?;
    };
    let mut ids = Vec::new();
    for image in &images {
        let disk = live.iter().find(|disk| disk.path == *image);
        let id = disk.and_then(|disk| disk.alias.clone()).ok_or_else(|| {
            error(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!(
                    "'{}' is only read by the running domain; what a snapshot has in it can be \
                     deleted while the domain is off, its description alone with --metadata",
                    image.display()
                ),
            )
        })?;
        ids.push(id);
    }
    let call = Call::SnapshotDisks {
        disks: ids,
        name: name.to_owned(),
        date: (0, 0),
        what: DiskSnapshot::Delete,
    };
    ask_within(domain, call, SNAPSHOT_LIMIT).await.map(drop)
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
    // Images on top of those that go, which are behind them no more then.
    let mut above: Vec<(PathBuf, PathBuf, String)> = Vec::new();
    for (target, overlay, base, format) in &merges {
        for child in tree.children(Some(name)) {
            above.extend(tree.get(child).into_iter().flat_map(|child| {
                images_above(child, overlay)
                    .into_iter()
                    .map(|above| (above, base.clone(), format.clone()))
            }));
        }
        // Another branch goes on from the same images: they must stay as they are.
        let shared = others.iter().filter(|other| **other != name).any(|other| {
            let Some(other) = tree.get(other) else {
                return false;
            };
            let Some(of) = other.domain.as_deref() else {
                return false;
            };
            // What is inside an image does not change with its content.
            let inside = |target: &str| {
                let mut disks = other.disks.iter();
                disks.any(|d| d.name == target && d.place == Some(Place::Internal))
            };
            disks::candidates(of)
                .iter()
                .any(|disk| disk.path == *base && !inside(&disk.target))
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
        let used = domain.lock().definition().is_some_and(|d| {
            disks::candidates(d)
                .iter()
                .any(|disk| disk.path == *overlay)
        });
        if !used && above.is_empty() {
            return Err(error(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!(
                    "disk '{target}': the domain does not use '{}' now; delete the description with --metadata",
                    overlay.display()
                ),
            ));
        }
    }
    let running = domain.lock().live.is_some();
    if running {
        for (target, overlay, base, _) in &merges {
            let links = chain::links(&domain.lock().live()?.definition, target);
            let at = links
                .iter()
                .position(|link| Path::new(&link.path) == overlay);
            let next = at.and_then(|at| links.get(at + 1));
            if next.is_none_or(|next| Path::new(&next.path) != base) {
                return Err(error(
                    ErrorCode::OPERATION_UNSUPPORTED,
                    format!(
                        "disk '{target}': '{}' is not right behind '{}' in the running domain; \
                         delete the snapshot while the domain is off",
                        base.display(),
                        overlay.display()
                    ),
                ));
            }
            // It changes what the running domain has on top of it, too.
            above.retain(|(path, ..)| !links.iter().any(|link| Path::new(&link.path) == path));
        }
        for (target, overlay, ..) in &merges {
            driver.merge_live(domain, target, overlay).await?;
        }
    }
    let work = merges.clone();
    blocking(move || {
        for (_, overlay, base, format) in work.iter().filter(|_| !running) {
            merge::commit(overlay, base, format)?;
        }
        for (above, base, format) in &above {
            merge::rebase(above, base, format)?;
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

/// The images that a snapshot put on top of `image`.
fn images_above(snapshot: &Snapshot, image: &Path) -> Vec<PathBuf> {
    let Some(of) = snapshot.domain.as_deref() else {
        return Vec::new();
    };
    let beneath: Vec<_> = disks::candidates(of)
        .into_iter()
        .filter(|disk| disk.path == image)
        .map(|disk| disk.target)
        .collect();
    let disks = snapshot.disks.iter();
    disks
        .filter(|disk| matches!(disk.place, Some(Place::External(_))))
        .filter(|disk| beneath.contains(&disk.name))
        .filter_map(|disk| disk.source.clone().map(PathBuf::from))
        .collect()
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
