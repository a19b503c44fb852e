//! Save, restore, managed save.
//!
//! A save is done when its image is on the disk under its name; the domain ends after that. What a
//! daemon that died in between left is seen to its end, or undone, by the next one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmm_api::control::Call;
use xml_schemas::Domain as Definition;
use xml_schemas::domain::View;

use super::job::{End, Operation, Saving};
use super::lifecycle::{ask, end};
use super::object::{Domain, Pinned};
use super::saved_image::{self, Contents};
use super::start::{self, Origin, StartOptions};
use super::state::{PausedReason, State};
use super::written::Writing;
use super::{Driver, blocking};
use crate::drivers::domain::block_jobs::without_block_job;
use crate::error::{Error, ErrorCode, ErrorDomain, Result, check_flags};
use crate::events::DomainEvent;
use crate::files;
use crate::killpoint::killpoint;

/// virDomainSaveRestoreFlags
pub mod flags {
    /// Past the page cache.
    pub const BYPASS_CACHE: u32 = 1;
    /// The guest runs when it is restored.
    pub const RUNNING: u32 = 2;
    /// It does not.
    pub const PAUSED: u32 = 4;
    /// Firmware variables are made anew: there are none.
    pub const RESET_NVRAM: u32 = 8;
}

/// What RUNNING and PAUSED say.
fn run_state(flags: u32) -> Result<Option<bool>> {
    match (flags & flags::RUNNING != 0, flags & flags::PAUSED != 0) {
        (true, true) => Err(Error::new(
            ErrorCode::INVALID_ARG,
            "running and paused flags are mutually exclusive",
        )),
        (true, false) => Ok(Some(true)),
        (false, true) => Ok(Some(false)),
        (false, false) => Ok(None),
    }
}

impl Driver {
    /// Where a domain's managed save is.
    pub fn managed_save(&self, name: &str) -> PathBuf {
        self.roots.saves().join(format!("{name}.save"))
    }

    /// Whether a domain has a managed save.
    pub fn has_managed_save(&self, domain: &Domain) -> bool {
        let name = domain.lock().name.clone();
        self.managed_save(&name).exists()
    }

    /// Saves a domain to `to`, and ends it.
    ///
    /// # Errors
    /// It is off; `dxml` is not its definition; the job was given up; what the host says. The
    /// domain runs on then.
    pub async fn save_to(
        self: &Arc<Self>,
        domain: Pinned,
        to: String,
        dxml: Option<String>,
        flags: u32,
    ) -> Result<()> {
        let known = flags::BYPASS_CACHE | flags::RUNNING | flags::PAUSED;
        check_flags(flags, known, "qemuDomainSaveFlags")?;
        let _job = domain.job().await?;
        self.save_domain(&domain, Path::new(&to), dxml, flags).await
    }

    /// Saves a domain to a place of the daemon's own, from which its next start goes on.
    ///
    /// # Errors
    /// As [`Driver::save_to`]; it is transient.
    pub async fn managed_save_domain(self: &Arc<Self>, domain: Pinned, flags: u32) -> Result<()> {
        let known = flags::BYPASS_CACHE | flags::RUNNING | flags::PAUSED;
        check_flags(flags, known, "qemuDomainManagedSave")?;
        let _job = domain.job().await?;
        let name = {
            let inner = domain.lock();
            inner.live()?;
            if inner.persistent.is_none() {
                return Err(Error::invalid(
                    "cannot do managed save for transient domain",
                ));
            }
            inner.name.clone()
        };
        files::make_folder(&self.roots.saves(), 0o700)
            .map_err(|e| Error::system("cannot make the folder of managed saves", &e))?;
        let path = self.managed_save(&name);
        self.save_domain(&domain, &path, None, flags).await
    }

    async fn save_domain(
        self: &Arc<Self>,
        domain: &Pinned,
        path: &Path,
        dxml: Option<String>,
        flags: u32,
    ) -> Result<()> {
        let running = run_state(flags)?;
        let live = Arc::clone(&domain.lock().live()?.definition);
        without_block_job(domain).await?;
        let xml = match dxml {
            Some(text) => {
                let given = self.parse(&text, false)?;
                check_same(&live, &given)?;
                given.format(View::Inactive)
            }
            None => live.format(View::Inactive),
        };
        let file = saved_image::create(path, flags & flags::BYPASS_CACHE != 0)?;
        let id = Uuid::new_v4().into_bytes();
        let writing = Writing {
            operation: Operation::Save,
            call: Call::Save { xml, id, running },
            more: Vec::new(),
            was_running: None,
            id: Some(id),
            points: ["save.begun", "save.written"],
        };
        let put = self.written(domain, file, path, writing).await?;
        killpoint("save.put");
        let finished = {
            let mut inner = domain.lock();
            let Ok(live) = inner.live_mut() else {
                return put.map(drop);
            };
            let finished = live.work.finish(put.as_ref().ok().copied());
            if put.is_ok() {
                live.work.end = Some(End::Saved);
            } else {
                live.work.saving = None;
            }
            self.write_record(&inner);
            finished
        };
        if let Err(error) = put {
            // After a failed save it runs on by itself; after a failed rename it has to be told.
            let saved = matches!(domain.lock().state, State::Paused(PausedReason::Save));
            if saved && let Err(error) = ask(domain, Call::Resume).await {
                log::warn!("domain '{}': {error}", domain.name().name);
            }
            return Err(error);
        }
        if let Some(statistics) = finished {
            let event = DomainEvent::JobCompleted(statistics.params(true));
            self.emit(&domain.name(), &event);
        }
        end(domain, false).await
    }

    /// Starts the domain that is saved in `from`.
    ///
    /// # Errors
    /// The image's, the definition's, the start's. The image stays.
    pub async fn restore(
        self: &Arc<Self>,
        from: String,
        dxml: Option<String>,
        flags: u32,
    ) -> Result<Arc<Domain>> {
        let known = flags::BYPASS_CACHE | flags::RUNNING | flags::PAUSED | flags::RESET_NVRAM;
        check_flags(flags, known, "qemuDomainRestoreInternal")?;
        let run = run_state(flags)?;
        let path = PathBuf::from(&from);
        let (definition, contents) = self.look(&path, dxml).await?;
        let uuid = definition.uuid.unwrap_or_default();
        let domain = self.registry.pin_or_make(uuid, &definition.name)?;
        let _job = domain.job().await?;
        if domain.lock().live.is_some() {
            return Err(Error::of(
                ErrorDomain::DOMAIN,
                ErrorCode::OPERATION_INVALID,
                format!("domain is already active as '{}'", definition.name),
            ));
        }
        let copy = flags & flags::BYPASS_CACHE != 0;
        let options = StartOptions {
            paused: !run.unwrap_or(contents.running),
            autodestroy: false,
            arriving: None,
            from: Some(Origin {
                file: saved_image::open(&path, false, copy)?,
                path,
                copy,
                managed: false,
                snapshot: false,
            }),
        };
        start::start(self, &domain, &Arc::new(definition), options).await?;
        Ok(Arc::clone(&domain))
    }

    /// An image's definition, or another one of the same machine.
    async fn look(
        self: &Arc<Self>,
        path: &Path,
        dxml: Option<String>,
    ) -> Result<(Definition, Contents)> {
        let known = path.to_owned();
        let contents = blocking(move || saved_image::look(&known)).await??;
        let saved = self.parse_of_guest(&contents.xml)?;
        let definition = match dxml {
            Some(text) => {
                let given = self.parse(&text, false)?;
                check_same(&saved, &given)?;
                given
            }
            None => saved,
        };
        Ok((definition, contents))
    }

    /// How a start of `domain` goes on from its managed save, if it has one. `force_boot`: that is
    /// thrown away.
    ///
    /// # Errors
    /// The image's.
    pub(super) async fn managed_origin(
        self: &Arc<Self>,
        name: &str,
        copy: bool,
        force_boot: bool,
    ) -> Result<Option<(Arc<Definition>, bool, Origin)>> {
        let path = self.managed_save(name);
        if !path.exists() {
            return Ok(None);
        }
        if force_boot {
            files::remove_if_there(&path)
                .and_then(|()| files::sync_folder(&self.roots.saves()))
                .map_err(|e| Error::system(format!("cannot remove '{}'", path.display()), &e))?;
            return Ok(None);
        }
        let (definition, contents) = self.look(&path, None).await?;
        let origin = Origin {
            file: saved_image::open(&path, false, copy)?,
            path,
            copy,
            managed: true,
            snapshot: false,
        };
        Ok(Some((Arc::new(definition), contents.running, origin)))
    }

    /// The XML of a saved image.
    ///
    /// # Errors
    /// The image's.
    pub async fn image_xml(self: &Arc<Self>, file: String) -> Result<String> {
        let (definition, _) = self.look(Path::new(&file), None).await?;
        Ok(definition.format(View::Inactive))
    }

    /// Replaces the XML of a saved image, and whether its guest is to run.
    ///
    /// # Errors
    /// The image's; it is another machine's XML.
    pub async fn image_define(
        self: &Arc<Self>,
        file: PathBuf,
        dxml: String,
        flags: u32,
    ) -> Result<()> {
        check_flags(
            flags,
            flags::RUNNING | flags::PAUSED,
            "qemuDomainSaveImageDefineXML",
        )?;
        let run = run_state(flags)?;
        let (definition, contents) = self.look(&file, Some(dxml)).await?;
        let running = run.unwrap_or(contents.running);
        let xml = definition.format(View::Inactive);
        blocking(move || saved_image::rewrite(&file, &xml, running)).await?
    }

    /// The path of a domain's managed save, which must be there.
    ///
    /// # Errors
    /// There is none.
    pub fn existing_managed_save(&self, domain: &Domain) -> Result<PathBuf> {
        let name = domain.lock().name.clone();
        let path = self.managed_save(&name);
        if path.exists() {
            return Ok(path);
        }
        Err(Error::invalid("domain does not have managed save image"))
    }

    /// Throws a managed save away; that there is none is fine.
    ///
    /// # Errors
    /// The system's.
    pub async fn managed_save_remove(self: &Arc<Self>, domain: Pinned, flags: u32) -> Result<()> {
        check_flags(flags, 0, "qemuDomainManagedSaveRemove")?;
        let _job = domain.job().await?;
        self.remove_managed_save(&domain)
    }

    /// As [`Driver::managed_save_remove`], for who holds the domain's job.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn remove_managed_save(&self, domain: &Domain) -> Result<()> {
        let name = domain.lock().name.clone();
        let path = self.managed_save(&name);
        if !path.exists() {
            return Ok(());
        }
        files::remove_if_there(&path)
            .and_then(|()| files::sync_folder(&self.roots.saves()))
            .map_err(|e| {
                Error::system(
                    format!("Failed to remove managed save file '{}'", path.display()),
                    &e,
                )
            })
    }

    /// What the last daemon's save left: if the image is at its place the domain is saved, and
    /// ends; if not, there was no save, and the domain runs on.
    pub(super) async fn settle_save(self: Arc<Self>, domain: Pinned, saving: Saving) {
        let name = domain.name().name;
        let path = saving.path.clone();
        let there = blocking(move || saved_image::look(&path)).await;
        let committed = matches!(there, Ok(Ok(contents)) if contents.id == saving.id);
        if committed {
            log::info!("domain '{name}' was saved by the last daemon");
            if let Ok(live) = domain.lock().live_mut() {
                live.work.end = Some(End::Saved);
            }
            if let Err(error) = end(&domain, false).await {
                log::error!("domain '{name}': {error}");
            }
            return;
        }
        log::info!("domain '{name}': a save of the last daemon's was not finished");
        if let Err(error) = files::remove_if_there(&saving.temp) {
            log::warn!("cannot remove '{}': {error}", saving.temp.display());
        }
        if saving.was_running {
            resume(&domain).await;
        }
        let mut inner = domain.lock();
        if let Ok(live) = inner.live_mut() {
            live.work.saving = None;
        }
        self.write_record(&inner);
    }
}

/// Has a domain run on that the last daemon had stopped for a moment.
async fn resume(domain: &Domain) {
    /// The VMM may first have to notice that who wanted the job is gone.
    const TRIES: u32 = 100;
    const PAUSE: Duration = Duration::from_millis(50);
    for _ in 0..TRIES {
        if ask(domain, Call::Resume).await.is_ok() {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
    log::error!("domain '{}' does not run on", domain.name().name);
}

/// As [`resume`], for a task of its own.
pub(super) async fn let_go(domain: Pinned) {
    resume(&domain).await;
}

/// Whether two definitions are of the same machine, as far as a guest that has run on one of them
/// can tell. (What else differs is found when the states are loaded.)
pub(super) fn check_same(saved: &Definition, given: &Definition) -> Result<()> {
    let differ = |what: &str, given: &dyn std::fmt::Display, saved: &dyn std::fmt::Display| {
        Err(Error::unsupported(format!(
            "Target domain {what} {given} does not match source {saved}"
        )))
    };
    let uuid = |d: &Definition| d.uuid.unwrap_or_default();
    if uuid(saved) != uuid(given) {
        return differ("uuid", &uuid(given), &uuid(saved));
    }
    if saved.memory.total_kib != given.memory.total_kib {
        return differ(
            "max memory",
            &given.memory.total_kib,
            &saved.memory.total_kib,
        );
    }
    if saved.vcpu.max != given.vcpu.max {
        return differ("vCPU max", &given.vcpu.max, &saved.vcpu.max);
    }
    let (own, its) = (saved.online_vcpus(), given.online_vcpus());
    if let Some(number) = own.symmetric_difference(&its).next() {
        return Err(Error::unsupported(format!(
            "State of vCPU '{number}' differs between source and destination definitions"
        )));
    }
    if saved.name != given.name {
        return differ("name", &given.name, &saved.name);
    }
    // One that is chosen anew on each host is compared when it is known.
    let model = |d: &Definition| {
        let cpu = d.cpu.as_ref()?;
        let custom = cpu.mode.as_deref().unwrap_or("custom") == "custom";
        let model = cpu.model.as_ref().filter(|_| custom)?;
        Some(model.name.clone())
    };
    if let (Some(given), Some(saved)) = (model(given), model(saved))
        && given != saved
    {
        return differ("CPU model", &given, &saved);
    }
    let serials = (given.devices.serials.len(), saved.devices.serials.len());
    if serials.0 != serials.1 {
        return differ("serial count", &serials.0, &serials.1);
    }
    for (name, what) in [
        ("disk", "disk count"),
        ("interface", "net card count"),
        ("channel", "channel count"),
        ("hostdev", "host device count"),
        ("watchdog", "watchdog count"),
        ("rng", "RNG device count"),
        ("vsock", "vsock count"),
    ] {
        let count = |d: &Definition| d.devices.rest.iter().filter(|e| e.name == name).count();
        let (given, saved) = (count(given), count(saved));
        if given != saved {
            return differ(what, &given, &saved);
        }
    }
    Ok(())
}
