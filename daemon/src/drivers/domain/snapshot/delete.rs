//! Deleting snapshots: their descriptions, and what they hold.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use images::tree::same_file;
use xml_schemas::Domain as Definition;
use xml_schemas::snapshot::{Place, Snapshot};

use vmm_api::control::{Call, DiskSnapshot};

use super::create::{SNAPSHOT_LIMIT, set_definitions, tidy};
use super::tree::Tree;
use super::{disks, error, merge, unknown};
use crate::drivers::domain::block_jobs::chain::Link;
use crate::drivers::domain::block_jobs::{chain, disks_without_block_job};
use crate::drivers::domain::devices::behind_image;
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
    inside(domain, &snapshot, name, false).await?;
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
/// `leftover`: of one that was never made, whose images need not be there.
pub(super) async fn inside(
    domain: &Pinned,
    snapshot: &Snapshot,
    name: &str,
    leftover: bool,
) -> Result<()> {
    let mut images = internal_images(snapshot);
    images.retain(|image| !leftover || image.symlink_metadata().is_ok());
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
    let mut merges = merges(snapshot, definition);
    if merges.is_empty() {
        return Ok(());
    }
    let retried = snapshot.deleting;
    let mut above = look(domain, tree, name, &mut merges, retried).await?;
    for merge in &merges {
        let Merge { target, base, .. } = merge;
        // Another branch goes on from the same images: they must stay as they are.
        if !merge.done && shared(tree, name, base) {
            return Err(error(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!(
                    "disk '{target}': another snapshot goes on from '{}' too; delete that first",
                    base.display()
                ),
            ));
        }
    }
    let running = domain.lock().live.is_some();
    let left: Vec<Merge> = merges.iter().filter(|m| !m.done).cloned().collect();
    if running && !left.is_empty() {
        disks_without_block_job(domain).await?;
        for merge in &left {
            let links = behind_live(domain, merge)?;
            // It changes what the running domain has on top of it, too.
            above.retain(|(path, ..)| !links.iter().any(|link| Path::new(&link.path) == path));
        }
    }
    // What can't be opened is found out before anything changes.
    let opened = match running {
        true => Vec::new(),
        false => {
            let left = left.clone();
            blocking(move || {
                let all = left.iter();
                all.map(|merge| merge::Pair::open(&merge.overlay, &merge.base, &merge.format))
                    .collect::<Result<Vec<_>>>()
            })
            .await??
        }
    };
    // From the first merge on it is not what it was: nobody may go back to it.
    mark(driver, domain, name, snapshot, true)?;
    killpoint("snapshot.marked");
    for (number, merge) in left.iter().filter(|_| running).enumerate() {
        let merged = driver.merge_live(domain, &merge.target, &merge.overlay);
        if let Err(failure) = merged.await {
            // Nothing has been copied: it is what it was.
            if number == 0 && !failure.begun && !retried {
                mark(driver, domain, name, snapshot, false)?;
            }
            return Err(failure.error);
        }
        killpoint("snapshot.merged-one");
    }
    blocking(move || {
        for pair in opened {
            pair.commit()?;
            killpoint("snapshot.merged-one");
        }
        for (above, base, format) in &above {
            merge::rebase(above, base, format)?;
        }
        Ok::<(), Error>(())
    })
    .await??;
    killpoint("snapshot.committed");
    // Whoever named the overlay names what it was merged into; then it can go.
    let persistent = domain.lock().stored()?;
    let persistent = persistent.map(|definition| {
        let mut changed = Definition::clone(&definition);
        put_back(&mut changed, &merges);
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
            put_back(definition, &merges);
        }
        if tree.get(&other) != Some(&changed) {
            tree.save(&other, changed)
                .map_err(|e| Error::system("cannot write a snapshot's description", &e))?;
        }
    }
    for Merge { overlay, .. } in &merges {
        files::remove_if_there(overlay)
            .map_err(|e| Error::system(format!("cannot remove '{}'", overlay.display()), &e))?;
    }
    Ok(())
}

/// Notes that a snapshot is being deleted; or that it is not, after all.
fn mark(
    driver: &Driver,
    domain: &Pinned,
    name: &str,
    snapshot: &Snapshot,
    deleting: bool,
) -> Result<()> {
    let mut marked = snapshot.clone();
    marked.deleting = deleting;
    driver
        .tree(domain)?
        .save(name, marked)
        .map_err(|e| Error::system("cannot write the snapshot's description", &e))
}

/// An image that goes, and the one behind it that it goes into.
#[derive(Debug, Clone)]
struct Merge {
    target: String,
    overlay: PathBuf,
    base: PathBuf,
    /// Of `base`.
    format: String,
    /// By an earlier attempt.
    done: bool,
}

/// What a snapshot's disks need.
fn merges(snapshot: &Snapshot, definition: &Definition) -> Vec<Merge> {
    let bases = disks::candidates(definition);
    let disks = snapshot.disks.iter();
    disks
        .filter(|disk| matches!(disk.place, Some(Place::External(_))))
        .filter_map(|disk| {
            let base = bases.iter().find(|base| base.target == disk.name)?;
            Some(Merge {
                target: disk.name.clone(),
                overlay: PathBuf::from(disk.source.as_ref()?),
                base: base.path.clone(),
                format: base.format.clone(),
                done: false,
            })
        })
        .collect()
}

/// Another snapshot is of the image at `base` as it is.
fn shared(tree: &Tree, name: &str, base: &Path) -> bool {
    let others = tree.descendants(None);
    others.iter().filter(|other| **other != name).any(|other| {
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
    })
}

/// Images behind one another, as their headers say; as far as they are there.
fn images_from(path: &Path, format: &str) -> Result<Vec<PathBuf>> {
    let mut list = Vec::new();
    let mut next = Some((path.to_owned(), format.to_owned()));
    while let Some((path, format)) = next
        && path.exists()
        && list.len() <= images::chain::DEPTH_MOST
    {
        next = behind_image(&path, &format)?;
        list.push(path);
    }
    Ok(list)
}

/// The images on top of those that go, which are behind them no more then: each with what is
/// behind it from then on, and its format.
type Above = Vec<(PathBuf, PathBuf, String)>;

/// Looks through all images that the domain and its other snapshots lead to: nobody may lose
/// anything by these merges.
///
/// # Errors
/// Somebody would.
async fn look(
    domain: &Pinned,
    tree: &Tree,
    name: &str,
    merges: &mut Vec<Merge>,
    retried: bool,
) -> Result<Above> {
    // An image that somebody starts from, its format, and who.
    let mut starts: Vec<(PathBuf, String, Option<String>)> = Vec::new();
    let mut inside: Vec<(PathBuf, String)> = Vec::new();
    {
        let inner = domain.lock();
        let live = inner.live.as_ref().map(|live| Arc::clone(&live.definition));
        for definition in live.into_iter().chain(inner.stored()?) {
            let all = disks::images(&definition);
            starts.extend(all.into_iter().map(|(path, format)| (path, format, None)));
        }
    }
    for other in tree.descendants(None) {
        let Some(snapshot) = tree.get(other).filter(|_| other != name) else {
            continue;
        };
        let all = snapshot.domain.as_deref().map(disks::images);
        let sources = snapshot.disks.iter().filter_map(|disk| {
            let format = disk.format.as_deref().unwrap_or("qcow2");
            Some((disk.source.clone()?.into(), format.to_owned()))
        });
        let all = all.into_iter().flatten().chain(sources);
        starts.extend(all.map(|(path, format)| (path, format, Some(other.to_owned()))));
        let own = internal_images(snapshot).into_iter();
        inside.extend(own.map(|image| (image, other.to_owned())));
    }
    let mut work = std::mem::take(merges);
    let (work, above) = blocking(move || {
        let mut chains = Vec::new();
        for (path, format, who) in starts {
            chains.push((images_from(&path, &format)?, who));
        }
        let mut above = Above::new();
        for merge in &mut work {
            no_snapshots_in(merge, &inside)?;
            look_at(merge, &chains, retried, &mut above)?;
        }
        Ok::<_, Error>((work, above))
    })
    .await??;
    *merges = work;
    Ok(above)
}

/// What is inside an image goes with it.
fn no_snapshots_in(merge: &Merge, inside: &[(PathBuf, String)]) -> Result<()> {
    let overlay = &merge.overlay;
    let known = inside.iter().find(|(image, _)| same_file(image, overlay));
    let words = match known {
        Some((_, other)) => format!("snapshot '{other}' is inside '{}'", overlay.display()),
        None if overlay.exists() => match merge::inside(overlay)?.first() {
            Some(other) => format!("'{}' has a snapshot '{other}' inside", overlay.display()),
            None => return Ok(()),
        },
        None => return Ok(()),
    };
    Err(error(
        ErrorCode::OPERATION_UNSUPPORTED,
        format!("disk '{}': {words}; delete that first", merge.target),
    ))
}

fn look_at(
    merge: &mut Merge,
    chains: &[(Vec<PathBuf>, Option<String>)],
    retried: bool,
    above: &mut Above,
) -> Result<()> {
    let Merge {
        target,
        overlay,
        base,
        format,
        done,
    } = merge;
    let refuse = |words: String| {
        error(
            ErrorCode::OPERATION_UNSUPPORTED,
            format!("disk '{target}': {words}"),
        )
    };
    let position = |chain: &[PathBuf], image: &Path| chain.iter().position(|i| same_file(i, image));
    // Whoever led to it leads to what it was merged into.
    *done = retried && !chains.iter().any(|(c, _)| position(c, overlay).is_some());
    if *done {
        return Ok(());
    }
    let own = images_from(overlay, "qcow2")?;
    if own.get(1).is_none_or(|behind| !same_file(behind, base)) {
        return Err(refuse(format!(
            "'{}' is not right behind '{}'",
            base.display(),
            overlay.display()
        )));
    }
    let mut used = false;
    for (chain, who) in chains {
        match position(chain, overlay) {
            Some(0) => used |= who.is_none(),
            Some(at) => {
                if let Some(image) = chain.get(at - 1)
                    && !above.iter().any(|(known, ..)| known == image)
                {
                    above.push((image.clone(), base.clone(), format.clone()));
                }
            }
            None => {
                let by = match who {
                    Some(other) => format!("snapshot '{other}'"),
                    None => "the domain".to_owned(),
                };
                match position(chain, base) {
                    // A snapshot of it: see `shared`.
                    Some(0) if who.is_some() => {}
                    // An earlier attempt put it there, and base is nothing new to it.
                    Some(1..) if retried => {}
                    Some(_) => {
                        return Err(refuse(format!(
                            "{by} goes on from '{}' without '{}', which can't be merged into it",
                            base.display(),
                            overlay.display()
                        )));
                    }
                    None => {}
                }
            }
        }
    }
    if !used && above.is_empty() {
        return Err(refuse(format!(
            "the domain does not use '{}' now; delete the description with --metadata",
            overlay.display()
        )));
    }
    Ok(())
}

/// The images of a running domain's disk, of which one goes.
fn behind_live(domain: &Pinned, merge: &Merge) -> Result<Vec<Link>> {
    let links = chain::links(&domain.lock().live()?.definition, &merge.target);
    let mut at = links.iter();
    let at = at.position(|link| Path::new(&link.path) == merge.overlay);
    let next = at.and_then(|at| links.get(at + 1));
    if next.is_none_or(|next| Path::new(&next.path) != merge.base) {
        return Err(error(
            ErrorCode::OPERATION_UNSUPPORTED,
            format!(
                "disk '{}': '{}' is not right behind '{}' in the running domain; \
                 delete the snapshot while the domain is off",
                merge.target,
                merge.base.display(),
                merge.overlay.display()
            ),
        ));
    }
    Ok(links)
}

/// Has a definition name the merged images instead of what went into them.
fn put_back(definition: &mut Definition, back: &[Merge]) {
    let used = disks::candidates(definition);
    let to: Vec<_> = back
        .iter()
        .filter(|merge| {
            used.iter()
                .any(|disk| disk.target == merge.target && disk.path == merge.overlay)
        })
        .map(|merge| {
            (
                merge.target.clone(),
                merge.base.clone(),
                merge.format.clone(),
            )
        })
        .collect();
    disks::redirect(definition, &to);
}
