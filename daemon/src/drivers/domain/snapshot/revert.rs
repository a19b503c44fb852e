//! Going back to snapshots.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use xml_schemas::Domain as Definition;
use xml_schemas::snapshot::{Place, Snapshot, SnapshotState};

use super::create::{set_definitions, tidy};
use super::disks::{self, Overlay};
use super::tree::Tree;
use super::{delete, error, is_external, merge, unknown};
use crate::drivers::domain::job::End;
use crate::drivers::domain::lifecycle::end;
use crate::drivers::domain::object::Pinned;
use crate::drivers::domain::start::{self, Origin, StartOptions};
use crate::drivers::domain::state::{ShutoffReason, State};
use crate::drivers::domain::{Driver, blocking, saved_image};
use crate::error::{Error, ErrorCode, Result, check_flags};
use crate::files;
use crate::killpoint::killpoint;

/// virDomainSnapshotRevertFlags
mod flags {
    pub const RUNNING: u32 = 1;
    pub const PAUSED: u32 = 2;
    pub const FORCE: u32 = 4;
    pub const RESET_NVRAM: u32 = 8;
}

pub(super) async fn revert(
    driver: &Arc<Driver>,
    domain: &Pinned,
    name: &str,
    flags: u32,
) -> Result<()> {
    use flags::{FORCE, PAUSED, RESET_NVRAM, RUNNING};
    check_flags(
        flags,
        RUNNING | PAUSED | FORCE | RESET_NVRAM,
        "qemuDomainRevertToSnapshot",
    )?;
    if flags & RUNNING != 0 && flags & PAUSED != 0 {
        return Err(error(
            ErrorCode::INVALID_ARG,
            "running and paused flags are mutually exclusive",
        ));
    }
    tidy(driver, domain).await?;
    let tree = driver.tree(domain)?;
    let snapshot = tree.get(name).cloned().ok_or_else(|| unknown(name))?;
    if snapshot.deleting {
        return Err(Error::invalid(format!(
            "snapshot '{name}' was deleted in part, and can't be gone back to; delete it once more"
        )));
    }
    let Some(then) = snapshot.domain.clone() else {
        return Err(error(
            ErrorCode::SNAPSHOT_REVERT_RISKY,
            format!(
                "snapshot '{name}' lacks domain '{}' rollback info",
                domain.name().name
            ),
        ));
    };
    if domain.lock().persistent.is_none() {
        return Err(Error::invalid(
            "transient domain needs to request run state to revert to inactive snapshot",
        ));
    }
    let memory = match &snapshot.memory {
        Some(Place::External(Some(file))) => {
            // Looked at before anything is thrown away.
            let path = PathBuf::from(file);
            let known = path.clone();
            Some((blocking(move || saved_image::look(&known)).await??, path))
        }
        Some(Place::Internal) => {
            let path = tree.memory(name);
            let known = path.clone();
            Some((blocking(move || saved_image::look(&known)).await??, path))
        }
        _ => None,
    };
    let mut definition = driver.refill(*then, memory.is_some())?;
    let internal = delete::internal_images(&snapshot);
    not_beneath(&tree, name, &internal)?;
    let overlays = if is_external(&snapshot) {
        new_overlays(&definition, &snapshot)?
    } else {
        Vec::new()
    };
    if domain.lock().live.is_some() {
        domain.lock().live_mut()?.work.end = Some(End::Reverted);
        end(domain, false).await?;
    }
    killpoint("revert.stopped");
    driver.remove_managed_save(domain)?;
    let wanted = name.to_owned();
    blocking(move || merge::internal(&internal, &wanted, merge::Internal::Apply)).await??;
    let overlays = make(overlays).await?;
    killpoint("revert.images");
    let to: Vec<_> = overlays
        .iter()
        .map(|o| (o.disk.target.clone(), o.path.clone(), "qcow2".to_owned()))
        .collect();
    disks::redirect(&mut definition, &to);
    let before = domain.lock().stored()?;
    let definition = Arc::new(definition);
    if let Err(error) = set_definitions(driver, domain, Some(Arc::clone(&definition)), None).await {
        overlays.iter().for_each(Overlay::undo);
        return Err(error);
    }
    killpoint("revert.defined");
    settle_tree(driver, domain, name, &overlays, before.as_deref())?;
    let run = match snapshot.state {
        _ if flags & (RUNNING | PAUSED) != 0 => Some(flags & PAUSED != 0),
        Some(SnapshotState::Running) => Some(false),
        Some(SnapshotState::Paused) => Some(true),
        _ => None,
    };
    let Some(paused) = run else {
        domain.lock().state = State::Shutoff(ShutoffReason::FromSnapshot);
        return Ok(());
    };
    let from = match memory {
        Some((_, path)) => Some(Origin {
            file: saved_image::open(&path, false, false)?,
            path,
            copy: false,
            managed: false,
            snapshot: true,
        }),
        None => None,
    };
    let options = StartOptions {
        paused,
        autodestroy: false,
        from,
        arriving: None,
    };
    start::start(driver, domain, &definition, options).await
}

/// An image that later snapshots put others on top of must not change its content.
fn not_beneath(tree: &Tree, name: &str, images: &[PathBuf]) -> Result<()> {
    for other in tree.descendants(None) {
        let Some(snapshot) = tree.get(other).filter(|_| other != name) else {
            continue;
        };
        let Some(definition) = &snapshot.domain else {
            continue;
        };
        let outside = |target: &str| {
            snapshot
                .disks
                .iter()
                .any(|d| d.name == target && matches!(d.place, Some(Place::External(_))))
        };
        let beneath = disks::candidates(definition)
            .into_iter()
            .find(|disk| images.contains(&disk.path) && outside(&disk.target));
        if let Some(disk) = beneath {
            return Err(error(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!(
                    "disk '{}': the images of snapshot '{other}' are on top of '{}'; delete that \
                     snapshot first",
                    disk.target,
                    disk.path.display()
                ),
            ));
        }
    }
    Ok(())
}

/// New images on top of those that the snapshot is of: they stay as they are, to be gone back to
/// again.
fn new_overlays(definition: &Definition, snapshot: &Snapshot) -> Result<Vec<Overlay>> {
    let candidates = disks::candidates(definition);
    let stamp = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let mut list = Vec::new();
    for disk in &snapshot.disks {
        if !matches!(disk.place, Some(Place::External(_))) {
            continue;
        }
        let Some(base) = candidates.iter().find(|c| c.target == disk.name) else {
            continue;
        };
        let free = (0..1000).map(|number| {
            let suffix = match number {
                0 => stamp.to_string(),
                _ => format!("{stamp}-{number}"),
            };
            base.path.with_extension(suffix)
        });
        let path = free
            .into_iter()
            .find(|path| path.symlink_metadata().is_err())
            .ok_or_else(|| Error::failed("no free name for a new image"))?;
        list.push(Overlay {
            disk: base.clone(),
            path,
            reused: false,
        });
    }
    Ok(list)
}

async fn make(overlays: Vec<Overlay>) -> Result<Vec<Overlay>> {
    blocking(move || {
        for overlay in &overlays {
            if let Err(error) = overlay.make() {
                overlays.iter().for_each(Overlay::undo);
                return Err(error);
            }
        }
        Ok(overlays)
    })
    .await?
}

/// The snapshot is the current one, and says which images come after it now. Those that nothing
/// leads to any more are removed: what was written since the last snapshot was given up.
fn settle_tree(
    driver: &Arc<Driver>,
    domain: &Pinned,
    name: &str,
    overlays: &[Overlay],
    before: Option<&Definition>,
) -> Result<()> {
    let failed = |e: std::io::Error| Error::system("cannot write the snapshot's description", &e);
    let mut tree = driver.tree(domain)?;
    let mut snapshot = tree.get(name).cloned().ok_or_else(|| unknown(name))?;
    let gone = before.map_or_else(Vec::new, |before| unused(&tree, before));
    for overlay in overlays {
        for disk in snapshot
            .disks
            .iter_mut()
            .filter(|d| d.name == overlay.disk.target)
        {
            disk.source = Some(overlay.path.display().to_string());
        }
    }
    if !overlays.is_empty() && tree.children(Some(name)).is_empty() {
        tree.save(name, snapshot).map_err(failed)?;
    }
    tree.set_current(Some(name)).map_err(failed)?;
    if !overlays.is_empty() {
        for path in gone {
            log::info!("'{}' is given up by going back to '{name}'", path.display());
            if let Err(error) = files::remove_if_there(&path) {
                log::warn!("cannot remove '{}': {error}", path.display());
            }
        }
    }
    Ok(())
}

/// The images of a definition that a snapshot made and no snapshot is of.
fn unused(tree: &Tree, definition: &Definition) -> Vec<PathBuf> {
    let names = tree.descendants(None);
    let all: Vec<&Snapshot> = names.iter().filter_map(|name| tree.get(name)).collect();
    let made = |path: &Path| {
        all.iter().any(|snapshot| {
            snapshot.disks.iter().any(|disk| {
                disk.source
                    .as_deref()
                    .is_some_and(|source| Path::new(source) == path)
            })
        })
    };
    let kept = |path: &Path| {
        all.iter().any(|snapshot| {
            snapshot
                .domain
                .as_deref()
                .is_some_and(|of| disks::candidates(of).iter().any(|disk| disk.path == path))
        })
    };
    disks::candidates(definition)
        .into_iter()
        .map(|disk| disk.path)
        .filter(|path| made(path) && !kept(path))
        .collect()
}
