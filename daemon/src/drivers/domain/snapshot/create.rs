//! Making snapshots.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use vmm_api::control::{Answer, Call, DiskSnapshot};
use xml_schemas::Domain as Definition;
use xml_schemas::domain::View;
use xml_schemas::snapshot::{Place, Snapshot, SnapshotState};

use super::disks::{self, Overlay};
use super::{error, memory, merge, unknown};
use crate::drivers::domain::block_jobs::{chain, disks_without_block_job};
use crate::drivers::domain::job::{self, End};
use crate::drivers::domain::lifecycle::{ask, ask_within, end};
use crate::drivers::domain::object::Pinned;
use crate::drivers::domain::record::Folder;
use crate::drivers::domain::state::{PausedReason, State};
use crate::drivers::domain::{Driver, agent, blocking, image_numbers};
use crate::error::{Error, ErrorCode, Result, check_flags};
use crate::files;
use crate::killpoint::killpoint;

/// virDomainSnapshotCreateFlags
mod flags {
    pub const REDEFINE: u32 = 1;
    pub const CURRENT: u32 = 2;
    pub const NO_METADATA: u32 = 4;
    pub const HALT: u32 = 8;
    pub const DISK_ONLY: u32 = 16;
    pub const REUSE_EXT: u32 = 32;
    pub const QUIESCE: u32 = 64;
    /// All of them always are.
    pub const ATOMIC: u32 = 128;
    pub const LIVE: u32 = 256;
    pub const VALIDATE: u32 = 512;
}

pub(super) async fn create(
    driver: &Arc<Driver>,
    domain: &Pinned,
    xml: &str,
    flags: u32,
) -> Result<String> {
    check_flags(flags, 0x3ff, "qemuSnapshotCreateXML")?;
    let has = |flag| flags & flag != 0;
    let _ = (flags::ATOMIC, flags::VALIDATE);
    if has(flags::QUIESCE) && !has(flags::DISK_ONLY) {
        return Err(Error::argument(
            "Flag 'VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY' is required by flag \
             'VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE'",
        ));
    }
    let snapshot = Snapshot::parse(xml, has(flags::REDEFINE))?;
    if has(flags::REDEFINE) {
        return redefine(driver, domain, snapshot, has(flags::CURRENT));
    }
    tidy(driver, domain).await?;
    let mut plan = Plan::new(driver, domain, snapshot, flags)?;
    if plan.running {
        disks_without_block_job(domain).await?;
        plan.live(driver, domain).await?;
    } else {
        plan.off(driver, domain).await?;
    }
    killpoint("snapshot.made");
    let inside = plan.inside();
    if !has(flags::NO_METADATA) {
        let mut tree = driver.tree(domain)?;
        tree.save(&plan.name, plan.snapshot)
            .and_then(|()| tree.set_current(Some(&plan.name)))
            .map_err(|e| Error::system("cannot write the snapshot's description", &e))?;
    }
    if inside {
        let ended = driver.tree(domain)?.ended(&plan.name);
        ended.map_err(|e| Error::system("cannot remove a note", &e))?;
    }
    if has(flags::HALT) && plan.running {
        domain.lock().live_mut()?.work.end = Some(End::Reverted);
        end(domain, false).await?;
    }
    Ok(plan.name)
}

/// Takes a description over as it is.
fn redefine(
    driver: &Arc<Driver>,
    domain: &Pinned,
    snapshot: Snapshot,
    current: bool,
) -> Result<String> {
    let name = snapshot.name.clone().ok_or_else(|| {
        error(
            ErrorCode::XML_ERROR,
            "a redefined snapshot must have a name",
        )
    })?;
    let mut tree = driver.tree(domain)?;
    if let Some(of) = &snapshot.domain
        && of.uuid.is_some_and(|uuid| uuid != domain.uuid)
    {
        return Err(error(
            ErrorCode::INVALID_ARG,
            format!(
                "definition for snapshot {name} must use uuid {}",
                domain.uuid
            ),
        ));
    }
    if let Some(parent) = &snapshot.parent {
        if *parent == name {
            return Err(error(
                ErrorCode::INVALID_ARG,
                format!("cannot set snapshot {name} as its own parent"),
            ));
        }
        if tree.get(parent).is_none() {
            return Err(error(
                ErrorCode::INVALID_ARG,
                format!("parent {parent} for snapshot {name} not found"),
            ));
        }
        if tree.descendants(Some(&name)).contains(&parent.as_str()) {
            return Err(error(
                ErrorCode::INVALID_ARG,
                format!("parent {parent} would create cycle to {name}"),
            ));
        }
    }
    tree.save(&name, snapshot)
        .and_then(|()| match current {
            true => tree.set_current(Some(&name)),
            false => Ok(()),
        })
        .map_err(|e| Error::system("cannot write the snapshot's description", &e))?;
    Ok(name)
}

/// A snapshot that is about to be made.
struct Plan {
    name: String,
    snapshot: Snapshot,
    definition: Arc<Definition>,
    running: bool,
    overlays: Vec<Overlay>,
    /// Images, and their disks' ids while the domain runs.
    internal: Vec<(PathBuf, String)>,
    memory: Option<PathBuf>,
    quiesce: bool,
    /// The guest runs while its memory is written.
    runs_on: bool,
}

impl Plan {
    fn new(
        driver: &Arc<Driver>,
        domain: &Pinned,
        mut snapshot: Snapshot,
        flags: u32,
    ) -> Result<Self> {
        let has = |flag| flags & flag != 0;
        let (definition, state, running) = {
            let inner = domain.lock();
            let definition = inner.definition()?;
            (definition, inner.state, inner.live.is_some())
        };
        let definition = definition.ok_or_else(|| unknown(""))?;
        let outside = matches!(snapshot.memory, Some(Place::External(_)));
        if has(flags::LIVE) && !(running && outside) {
            return Err(error(
                ErrorCode::OPERATION_UNSUPPORTED,
                "live snapshot creation is supported only during full system snapshots",
            ));
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let name = snapshot.name.clone().unwrap_or_else(|| now.to_string());
        let tree = driver.tree(domain)?;
        if tree.get(&name).is_some() {
            return Err(error(
                ErrorCode::OPERATION_FAILED,
                format!("domain snapshot {name} already exists"),
            ));
        }
        let disk_only = has(flags::DISK_ONLY);
        let memory = match (&snapshot.memory, disk_only) {
            (Some(Place::External(_) | Place::Internal), true) => {
                return Err(error(
                    ErrorCode::CONFIG_UNSUPPORTED,
                    "memory state cannot be saved with a disk-only snapshot",
                ));
            }
            (Some(Place::External(Some(file))), false) if running => Some(PathBuf::from(file)),
            (Some(Place::External(_)), false) if !running => {
                return Err(error(
                    ErrorCode::XML_ERROR,
                    "memory state cannot be saved with offline or disk-only snapshot",
                ));
            }
            (Some(Place::Internal) | None, false) if running => Some(tree.memory(&name)),
            (Some(Place::External(_)), false) => {
                return Err(error(
                    ErrorCode::XML_ERROR,
                    "memory state cannot be saved with offline or disk-only snapshot",
                ));
            }
            _ => None,
        };
        let no_memory = running && memory.is_none();
        let default = if disk_only || outside || no_memory {
            Place::External(None)
        } else {
            Place::Internal
        };
        let mut settled = disks::settle(&definition, &snapshot.disks, &default)?;
        let overlays = disks::overlays(&mut settled, &name, has(flags::REUSE_EXT))?;
        let internal: Vec<_> = settled
            .iter()
            .filter(|(_, disk)| disk.place == Some(Place::Internal))
            .collect();
        // libvirt's own rules: everything inside, or everything outside.
        if let Some((_, disk)) = internal.first().filter(|_| running && no_memory) {
            return Err(error(
                ErrorCode::CONFIG_UNSUPPORTED,
                format!(
                    "active qemu domains require external disk snapshots; disk {} requested internal",
                    disk.name
                ),
            ));
        }
        let mixed = if outside {
            !internal.is_empty()
        } else {
            !no_memory && !overlays.is_empty()
        };
        if running && mixed || !internal.is_empty() && !overlays.is_empty() {
            return Err(error(
                ErrorCode::CONFIG_UNSUPPORTED,
                "mixing internal and external targets for a snapshot is not yet supported",
            ));
        }
        for (candidate, disk) in &internal {
            if candidate.format != "qcow2" {
                return Err(error(
                    ErrorCode::CONFIG_UNSUPPORTED,
                    format!(
                        "internal snapshot for disk {} unsupported for storage type {}",
                        disk.name, candidate.format
                    ),
                ));
            }
        }
        let internal = internal
            .iter()
            .map(|(disk, _)| (disk.path.clone(), disk.alias.clone().unwrap_or_default()))
            .collect();
        snapshot.name = Some(name.clone());
        snapshot.parent = tree.current().map(str::to_owned);
        snapshot.created = i64::try_from(now).ok();
        snapshot.state = Some(match state {
            _ if !running => SnapshotState::Shutoff,
            _ if disk_only || no_memory => SnapshotState::DiskSnapshot,
            State::Running(_) => SnapshotState::Running,
            _ => SnapshotState::Paused,
        });
        if !outside {
            snapshot.memory = Some(match memory {
                Some(_) => Place::Internal,
                None => Place::No,
            });
        }
        let settled = settled.into_iter().map(|(_, disk)| disk).collect();
        snapshot.disks = disks::with_others(&definition, settled);
        // As it was before: what is gone back to.
        let parsed = Definition::parse(
            &definition.format(View::Inactive),
            xml_schemas::Validation::Lenient,
        )?;
        snapshot.domain = Some(Box::new(parsed.domain));
        Ok(Self {
            name,
            snapshot,
            definition,
            running,
            overlays,
            internal,
            memory,
            quiesce: has(flags::QUIESCE),
            runs_on: has(flags::LIVE),
        })
    }

    /// Of a domain that is off.
    async fn off(&mut self, driver: &Arc<Driver>, domain: &Pinned) -> Result<()> {
        if self.inside() {
            self.begin(driver, domain).await?;
            let images: Vec<_> = self.internal.iter().map(|one| one.0.clone()).collect();
            let (name, when) = (self.name.clone(), self.date());
            let what = merge::Internal::Create(when);
            let done = blocking(move || merge::internal(&images, &name, what)).await?;
            if done.is_err() {
                undo_inside(driver, domain).await;
            }
            done?;
        }
        let made = self.make_overlays().await?;
        drop(made);
        let redirected = self.redirect(driver, domain).await;
        if redirected.is_err() {
            self.undo();
        }
        redirected.map(drop)
    }

    async fn make_overlays(&mut self) -> Result<Vec<OwnedFd>> {
        let overlays = std::mem::take(&mut self.overlays);
        let (overlays, made) = blocking(move || {
            let made: Result<Vec<_>> = overlays.iter().map(Overlay::make).collect();
            if made.is_err() {
                overlays.iter().for_each(Overlay::undo);
            }
            (overlays, made)
        })
        .await?;
        self.overlays = overlays;
        made
    }

    fn undo(&self) {
        self.overlays.iter().for_each(Overlay::undo);
    }

    /// Has the domain's definitions name the new images; the ones before.
    async fn redirect(
        &self,
        driver: &Arc<Driver>,
        domain: &Pinned,
    ) -> Result<(Option<Arc<Definition>>, Option<Arc<Definition>>)> {
        let to: Vec<_> = self
            .overlays
            .iter()
            .map(|o| (o.disk.target.clone(), o.path.clone(), "qcow2".to_owned()))
            .collect();
        let (persistent, live) = {
            let inner = domain.lock();
            let live = inner.live.as_ref().map(|live| Arc::clone(&live.definition));
            (inner.stored()?, live)
        };
        if to.is_empty() {
            return Ok((persistent, live));
        }
        let changed = |definition: &Arc<Definition>| {
            let mut changed = Definition::clone(definition);
            disks::redirect(&mut changed, &to);
            changed
        };
        let stored = persistent.as_ref().map(|old| Arc::new(changed(old)));
        let running = match &live {
            Some(old) => {
                let mut new = changed(old);
                let noted = domain.lock().live()?.next_image;
                let mut next = image_numbers::next(old, noted);
                for (target, ..) in &to {
                    let before = chain::links(old, target);
                    chain::refresh(&mut new, target, &before, &mut next)?;
                }
                let mut inner = domain.lock();
                inner.live_mut()?.next_image = next;
                driver.write_record(&inner);
                drop(inner);
                Some(Arc::new(new))
            }
            None => None,
        };
        set_definitions(driver, domain, stored, running).await?;
        Ok((persistent, live))
    }

    /// Something of it is in the disks' images, or beside its description.
    fn inside(&self) -> bool {
        !self.internal.is_empty() || self.snapshot.memory == Some(Place::Internal)
    }

    fn date(&self) -> u32 {
        let created = self.snapshot.created.unwrap_or_default();
        u32::try_from(created).unwrap_or_default()
    }

    /// Notes what is about to be made.
    async fn begin(&self, driver: &Arc<Driver>, domain: &Pinned) -> Result<()> {
        // Whatever has that name now is not ours, and must not be taken for a remnant.
        let images: Vec<_> = self.internal.iter().map(|one| one.0.clone()).collect();
        let name = self.name.clone();
        blocking(move || merge::not_taken(&images, &name)).await??;
        let noted = driver.tree(domain)?.begin(&self.name, &self.snapshot);
        noted.map_err(|e| Error::system("cannot note the snapshot", &e))?;
        killpoint("snapshot.noted");
        Ok(())
    }

    /// Of a domain that runs.
    async fn live(&mut self, driver: &Arc<Driver>, domain: &Pinned) -> Result<()> {
        let made = self.make_overlays().await?;
        if self.inside()
            && let Err(error) = self.begin(driver, domain).await
        {
            self.undo();
            return Err(error);
        }
        let result = self.live_made(driver, domain, made).await;
        if self.memory.is_some() {
            memory::settled(driver, domain);
        }
        if result.is_err() {
            self.undo();
            if self.inside() {
                undo_inside(driver, domain).await;
            }
        }
        result
    }

    async fn live_made(
        &mut self,
        driver: &Arc<Driver>,
        domain: &Pinned,
        made: Vec<OwnedFd>,
    ) -> Result<()> {
        let definition = Arc::clone(&self.definition);
        if self.quiesce {
            let definition = Arc::clone(&definition);
            blocking(move || agent::command(&definition, "guest-fsfreeze-freeze")).await??;
        }
        let result = self.frozen(driver, domain, made).await;
        if self.quiesce {
            let thawed =
                blocking(move || agent::command(&definition, "guest-fsfreeze-thaw")).await?;
            if let Err(error) = thawed {
                log::error!("domain '{}': {error}", domain.name().name);
            }
        }
        result
    }

    async fn frozen(
        &mut self,
        driver: &Arc<Driver>,
        domain: &Pinned,
        made: Vec<OwnedFd>,
    ) -> Result<()> {
        let was_running = matches!(domain.lock().state, State::Running(_));
        if let Some(path) = self.memory.clone().filter(|_| self.runs_on) {
            return self.save_live(driver, domain, path, made).await;
        }
        if let Some(path) = self.memory.clone() {
            self.save_memory(driver, domain, path, was_running).await?;
        }
        let result = match self.internal.is_empty() {
            true => self.switch(driver, domain, made).await,
            false => self.inside_images(domain).await,
        };
        if self.memory.is_some() {
            if was_running && let Err(error) = ask(domain, Call::Resume).await {
                log::error!("domain '{}': {error}", domain.name().name);
            }
            if let (Err(_), Some(path)) = (&result, &self.memory)
                && let Err(error) = std::fs::remove_file(path)
            {
                log::warn!("cannot remove '{}': {error}", path.display());
            }
        }
        result
    }

    /// Into a file; the guest stands still afterwards.
    async fn save_memory(
        &self,
        driver: &Arc<Driver>,
        domain: &Pinned,
        path: PathBuf,
        was_running: bool,
    ) -> Result<()> {
        let call = Call::Save {
            xml: self.definition.format(View::Inactive),
            id: Uuid::new_v4().into_bytes(),
            running: None,
        };
        let put = memory::written(driver, domain, &path, was_running, call, Vec::new()).await;
        let paused = matches!(domain.lock().state, State::Paused(PausedReason::Snapshot));
        if put.is_err() && paused && was_running {
            drop(ask(domain, Call::Resume).await);
        }
        put
    }

    /// Into a file while the guest runs; the disks get their new images at the moment of which it is.
    async fn save_live(
        &mut self,
        driver: &Arc<Driver>,
        domain: &Pinned,
        path: PathBuf,
        made: Vec<OwnedFd>,
    ) -> Result<()> {
        let before = self.redirect(driver, domain).await?;
        killpoint("snapshot.redirected");
        let call = Call::SaveLive {
            xml: self.definition.format(View::Inactive),
            id: Uuid::new_v4().into_bytes(),
            disks: self.tops(),
        };
        // It is never paused for that.
        let result = memory::written(driver, domain, &path, false, call, made).await;
        if result.is_err() && !self.overlays.is_empty() {
            match self.is_on_top(domain).await {
                Ok(false) => set_definitions(driver, domain, before.0, before.1).await?,
                // The guest writes into the new images; or nobody knows, and then their names are right either way.
                _ => self.overlays.clear(),
            }
        }
        result
    }

    /// Whether the domain has the new images on top of its disks.
    async fn is_on_top(&self, domain: &Pinned) -> Result<bool> {
        let Answer::Disks(disks) = ask(domain, Call::Disks).await? else {
            return Err(Error::internal("the VMM does not know its disks"));
        };
        let tops = self.tops();
        Ok(disks.iter().any(|disk| {
            let top = disk.images.first();
            top.is_some_and(|top| tops.iter().any(|(id, name)| *id == disk.id && name == top))
        }))
    }

    /// The new images, by their disks' ids.
    fn tops(&self) -> Vec<(String, String)> {
        let overlays = self.overlays.iter();
        overlays
            .map(|overlay| {
                let id = overlay.disk.alias.clone().unwrap_or_default();
                (id, overlay.path.display().to_string())
            })
            .collect()
    }

    /// In the images of a domain whose memory is saved.
    async fn inside_images(&self, domain: &Pinned) -> Result<()> {
        let call = Call::SnapshotDisks {
            disks: self.internal.iter().map(|one| one.1.clone()).collect(),
            name: self.name.clone(),
            date: (self.date(), 0),
            what: DiskSnapshot::Create,
        };
        let made = ask_within(domain, call, SNAPSHOT_LIMIT).await;
        killpoint("snapshot.inside");
        made.map(drop)
    }

    async fn switch(
        &self,
        driver: &Arc<Driver>,
        domain: &Pinned,
        made: Vec<OwnedFd>,
    ) -> Result<()> {
        if self.overlays.is_empty() {
            return Ok(());
        }
        let before = self.redirect(driver, domain).await?;
        killpoint("snapshot.redirected");
        let control = domain.lock().live()?.control.clone();
        let answer = control
            .send_with(Call::SwitchDisks { disks: self.tops() }, made)
            .map_err(job::not_begun)?;
        let result = match tokio::time::timeout(SWITCH_LIMIT, answer).await {
            Ok(Ok(Ok(_))) => Ok(()),
            Ok(Ok(Err(failure))) => Err(Error::failed(failure.message)),
            Ok(Err(_)) => Err(Error::failed("domain is no longer running")),
            // It may be switched or not: the definitions name the new images, which is right
            // either way.
            Err(_) => {
                return Err(Error::new(
                    ErrorCode::OPERATION_TIMEOUT,
                    "the domain's VMM does not answer",
                ));
            }
        };
        killpoint("snapshot.switched");
        if result.is_err() {
            set_definitions(driver, domain, before.0, before.1).await?;
        }
        result
    }
}

/// How long making or deleting a snapshot inside large images may take.
pub(super) const SNAPSHOT_LIMIT: std::time::Duration = std::time::Duration::from_secs(300);

/// What was noted has failed; if it can't be undone now the note says so to whoever comes next.
async fn undo_inside(driver: &Arc<Driver>, domain: &Pinned) {
    if let Err(error) = tidy(driver, domain).await {
        log::warn!("domain '{}': {error}", domain.name().name);
    }
}

/// Removes what is left of snapshots inside images whose making was cut short.
pub(super) async fn tidy(driver: &Arc<Driver>, domain: &Pinned) -> Result<()> {
    let cannot = |e: std::io::Error| Error::system("cannot read the domain's snapshots", &e);
    let tree = driver.tree(domain)?;
    for snapshot in tree.unfinished().map_err(cannot)? {
        let name = snapshot.name.clone().unwrap_or_default();
        if tree.get(&name).is_none() {
            log::warn!("domain '{}': undoing snapshot '{name}'", domain.name().name);
            // The note stays for the next time, and is in nobody's way.
            if let Err(error) = super::delete::inside(domain, &snapshot, &name, true).await {
                log::error!("domain '{}': {error}", domain.name().name);
                continue;
            }
            files::remove_if_there(&tree.memory(&name)).map_err(cannot)?;
        }
        tree.ended(&name).map_err(cannot)?;
    }
    Ok(())
}

/// How long putting new images on top may take.
const SWITCH_LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// Replaces a domain's definitions, on the disk first.
pub(in crate::drivers::domain) async fn set_definitions(
    driver: &Arc<Driver>,
    domain: &Pinned,
    persistent: Option<Arc<Definition>>,
    live: Option<Arc<Definition>>,
) -> Result<()> {
    let stored = match &persistent {
        Some(definition) => Some(driver.save(definition).await?),
        None => None,
    };
    let folder = domain
        .lock()
        .live
        .as_ref()
        .map(|live| Folder(live.folder.clone()));
    if let (Some(folder), Some(definition)) = (folder, live.clone()) {
        blocking(move || folder.write_definition(&definition))
            .await?
            .map_err(|e| Error::system("cannot write the domain's state", &e))?;
    }
    let mut inner = domain.lock();
    if stored.is_some() {
        inner.persistent = stored;
    }
    if let (Some(definition), Ok(running)) = (live, inner.live_mut()) {
        running.definition = definition;
    }
    Ok(())
}
