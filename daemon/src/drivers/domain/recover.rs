//! The daemon's start: what is defined, what still runs, what ended meanwhile, what is to run.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::{oneshot, watch as watch_channel};
use uuid::Uuid;
use vmm_api::control::{Answer, Call, Failure};
use xml_schemas::Domain as Definition;

use super::job::Work;
use super::object::{Live, Pinned};
use super::record::{Folder, Record};
use super::state::{PausedReason, ShutoffReason, State};
use super::stored::Stored;
use super::{Driver, blocking, saved_image, watch};
use crate::control;
use crate::files::{self, Durability};
use crate::store::{Loaded, Text};
use crate::vmm_process::{self, Spawned, VmmProcess};

/// How long the new daemon waits for the answers of all VMMs before it serves.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// How long a VMM that cannot be reached may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A VMM's answer to a new daemon's first question.
type FirstAnswer = oneshot::Receiver<Result<Answer, Failure>>;

/// Told when no client can take a running domain for one that is off: with the first question to its VMM, or dropped.
type Known = oneshot::Sender<FirstAnswer>;

/// Loads every definition and finds every running domain, all at once. What takes long (a process that has to end)
/// goes on while clients are served.
///
/// # Errors
/// The folders cannot be read.
pub async fn load(driver: &Arc<Driver>) -> io::Result<()> {
    load_definitions(driver)?;
    let mut looked_at = Vec::new();
    // All of them first: some are going to be removed.
    let entries: Vec<_> = fs::read_dir(driver.roots.live_domains())?.collect::<io::Result<_>>()?;
    for entry in entries {
        let path = entry.path();
        if !path.is_dir() {
            continue;
        }
        let folder = Folder(path);
        let uuid = folder.0.file_name().and_then(|n| n.to_str()?.parse().ok());
        let Some(uuid) = uuid else {
            log::warn!("{}: left alone: it is no domain's", folder.0.display());
            continue;
        };
        let (known, told) = oneshot::channel();
        let driver = Arc::clone(driver);
        tokio::spawn(async move {
            if let Err(why) = find_running(&driver, &folder, uuid, known).await {
                log::error!("{}: {why}", folder.0.display());
            }
        });
        looked_at.push(told);
    }
    let mut answers: Vec<FirstAnswer> = Vec::new();
    for told in looked_at {
        // Dropped: it does not run.
        answers.extend(told.await.ok());
    }
    // So that clients see what domains do now, rather than what they did when they were last
    // watched. One that does not answer is watched all the same.
    let all = async {
        for answer in answers {
            // Its end is the watcher's business.
            let _ = answer.await;
        }
    };
    if tokio::time::timeout(ANSWER_LIMIT, all).await.is_err() {
        log::warn!("a domain's VMM does not answer yet");
    }
    Ok(())
}

fn load_definitions(driver: &Driver) -> io::Result<()> {
    let host = driver.host();
    let load = |text: Text<'_>| {
        let (who, stored) = Stored::load(text, &host)?;
        Ok((who.clone(), (who, stored)))
    };
    for Loaded { object, autostart } in driver.store.load(load)? {
        let (who, stored) = object;
        if let Err(error) = driver.adopt(&who, stored, autostart) {
            log::error!("domain '{}': left out: {error}", who.name);
        }
    }
    Ok(())
}

/// Takes up the domain that a folder describes, or clears away after it.
async fn find_running(
    driver: &Arc<Driver>,
    folder: &Folder,
    uuid: Uuid,
    known: Known,
) -> Result<(), String> {
    let record = match Record::read(folder) {
        Ok(record) => record,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            log::info!(
                "{}: removing a start that did not get far",
                folder.0.display()
            );
            folder.remove();
            return Ok(());
        }
        Err(error) => return Err(format!("left alone: {error}")),
    };
    driver.ids_from(record.id.saturating_add(1));
    let same_boot = record.boot_id == driver.boot_id;
    let Some(identity) = record.process else {
        abandon_start(folder, &record, same_boot).await;
        return Ok(());
    };
    let process = if same_boot {
        vmm_process::find(identity).map_err(|e| format!("left alone: {e}"))?
    } else {
        None
    };
    let mut definition = folder
        .read_definition()
        .map_err(|e| format!("left alone: its definition: {e}"))?;
    definition.uuid = Some(uuid);
    let domain = driver
        .registry
        .pin_or_make(uuid, &definition.name)
        .map_err(|e| format!("left alone: {e}"))?;
    match process {
        Some(process) => {
            let found = (folder, record, definition, process);
            take_up(driver, &domain, found, known).await
        }
        None => {
            log::warn!("domain '{}' ended while no daemon watched", definition.name);
            ended_meanwhile(driver, &domain, folder, &record);
            Ok(())
        }
    }
}

/// Built, recorded, and not running yet.
const STARTING_UP: State = State::Paused(PausedReason::StartingUp);

/// A start that its daemon did not see through: nobody was told that the domain runs.
async fn abandon_start(folder: &Folder, record: &Record, same_boot: bool) {
    log::warn!("{}: ending a start that was cut short", folder.0.display());
    let identity = fs::read_to_string(folder.stat())
        .ok()
        .and_then(|stat| vmm_process::Identity::parse_stat(&stat))
        .filter(|_| same_boot);
    if let Some(identity) = identity {
        match vmm_process::find(identity) {
            // Gone before its groups can go.
            Ok(Some(process)) => {
                if let Err(error) = process.end(Duration::ZERO) {
                    log::error!("cannot end process {}: {error}", identity.pid);
                }
            }
            Ok(None) => {}
            Err(error) => log::error!("cannot look for process {}: {error}", identity.pid),
        }
    }
    record.made.clear_away();
    folder.remove();
}

fn ended_meanwhile(driver: &Driver, domain: &Pinned, folder: &Folder, record: &Record) {
    let managed = driver.managed_save(&domain.name().name);
    match record.state {
        STARTING_UP if !managed.exists() => saved_image::give_back(&managed),
        _ => saved_image::drop_taken(&managed),
    }
    let exit = folder.exit_record();
    let saved = record.saving.as_ref().is_some_and(|saving| {
        let there = saved_image::look(&saving.path).is_ok_and(|found| found.id == saving.id);
        if !there && let Err(error) = files::remove_if_there(&saving.temp) {
            log::warn!("cannot remove '{}': {error}", saving.temp.display());
        }
        there
    });
    domain.lock().state = State::Shutoff(if saved {
        ShutoffReason::Saved
    } else {
        watch::verdict(false, exit.as_ref()).0
    });
    watch::log_end(
        driver,
        &domain.name().name,
        "unknown",
        "while no daemon watched",
    );
    record.made.clear_away();
    folder.remove();
}

async fn take_up(
    driver: &Arc<Driver>,
    domain: &Pinned,
    (folder, record, definition, process): (&Folder, Record, Definition, Spawned),
    known: Known,
) -> Result<(), String> {
    // Until it is settled, nobody starts it again.
    let _job = domain.job_of_arrival().await.map_err(|e| e.to_string())?;
    let process = process.watch().map_err(|(e, _)| e.to_string())?;
    let process = Arc::new(process);
    let name = definition.name.clone();
    let stream = files::connect_unix(&folder.control());
    let (control, frames) = match stream.and_then(control::open) {
        Ok(opened) => opened,
        Err(error) => {
            let found = (folder, &record, &*process);
            return Err(refused(driver, domain, found, &error, known).await);
        }
    };
    if record.state == STARTING_UP {
        // Nobody was told, and not an instruction of it has run.
        log::warn!("domain '{name}': ending a start that was cut short");
        drop(known);
        end_now(&process).await;
        ended_meanwhile(driver, domain, folder, &record);
        return Ok(());
    }
    saved_image::drop_taken(&driver.managed_save(&name));
    let (ended_sender, ended) = watch_channel::channel(false);
    let saving = record.saving.clone();
    {
        let mut inner = domain.lock();
        inner.state = record.state;
        inner.agent_timeout = record.agent_timeout;
        inner.migration = record.migration;
        inner.live = Some(Live {
            id: record.id,
            definition: Arc::new(definition),
            process: Arc::clone(&process),
            control: control.clone(),
            folder: folder.0.clone(),
            made: record.made,
            disk_errors: Vec::new(),
            balloon_told: (None, false),
            dirty_rate: super::dirtyrate::DirtyRate::default(),
            autodestroy: record.autodestroy,
            destroying: false,
            suspended: false,
            rebooting: false,
            resetting: false,
            console: None,
            migration_ready: None,
            arrival: record.arrival.clone(),
            change_protection: false,
            settling: false,
            taken: Arc::default(),
            vcpus_change: false,
            vcpu_kept: None,
            next_image: record.next_image,
            block_jobs: Vec::new(),
            work: Work::left(saving.clone()),
            ended,
        });
    }
    let answer = control.send(Call::Query).map_err(|e| e.to_string())?;
    // Nobody waits if the daemon is about to end again.
    let _ = known.send(answer);
    log::info!(
        "domain '{name}' runs on (id {}, process {})",
        record.id,
        process.identity().pid
    );
    tokio::spawn(watch::watch(
        watch::Watched {
            driver: Arc::clone(driver),
            domain: Arc::clone(domain),
            process,
            control,
            ended: ended_sender,
            catching_up: AtomicBool::new(true),
        },
        frames,
    ));
    // Before a client can have it plug another one.
    let plugging = folder.read_plugging().unwrap_or_else(|error| {
        log::error!("domain '{name}': a device that was to be plugged: {error}");
        None
    });
    let changing = folder.read_changing().unwrap_or_else(|error| {
        log::error!("domain '{name}': a medium that was to be changed: {error}");
        None
    });
    if let Some(domain) = driver.registry.pin(domain) {
        let driver = Arc::clone(driver);
        tokio::spawn(async move {
            if let Err(error) = driver.settle_media(&domain, changing).await {
                log::warn!("domain '{}': its drives: {error}", domain.name().name);
            }
            if let Err(error) = driver.catch_up_devices(&domain, plugging).await {
                log::warn!("domain '{}': its devices: {error}", domain.name().name);
            }
            if let Err(error) = driver.catch_up_block_jobs(&domain).await {
                log::warn!("domain '{}': its disks: {error}", domain.name().name);
            }
        });
    }
    let held = matches!(
        record.state,
        State::Paused(PausedReason::Snapshot | PausedReason::Dump)
    );
    match (saving, driver.registry.pin(domain)) {
        (Some(saving), Some(domain)) => {
            tokio::spawn(Arc::clone(driver).settle_save(domain, saving));
        }
        // The last daemon held it for a moment, and would have let it go.
        (None, Some(domain)) if held => drop(tokio::spawn(super::save::let_go(domain))),
        _ => {}
    }
    if record.arrival.is_some_and(|arrival| arrival.paused) {
        driver.claim_arrival(domain);
    }
    if record.autodestroy {
        log::info!("domain '{name}': its creator's connection went with the last daemon");
        let ending = driver.registry.pin(domain);
        tokio::spawn(async move {
            if let Some(domain) = ending
                && let Err(error) = super::lifecycle::end(&domain, false).await
            {
                log::error!("domain '{}': {error}", domain.name().name);
            }
        });
    }
    Ok(())
}

async fn end_now(process: &VmmProcess) {
    if let Err(error) = process.kill() {
        log::error!("cannot kill process {}: {error}", process.identity().pid);
    }
    if tokio::time::timeout(END_LIMIT, process.ended())
        .await
        .is_err()
    {
        log::error!("process {} does not end", process.identity().pid);
    }
}

/// A process without a control socket is about to end, or is of no use to anybody.
async fn refused(
    driver: &Driver,
    domain: &Pinned,
    (folder, record, process): (&Folder, &Record, &VmmProcess),
    error: &io::Error,
    known: Known,
) -> String {
    let mut why = format!("its VMM cannot be reached: {error}");
    // One that is about to end is off when the first client asks.
    if tokio::time::timeout(ANSWER_LIMIT, process.ended())
        .await
        .is_ok()
    {
        ended_meanwhile(driver, domain, folder, record);
        return why;
    }
    drop(known);
    if tokio::time::timeout(END_LIMIT, process.ended())
        .await
        .is_err()
    {
        why.push_str("; it is killed");
        if let Err(error) = process.kill() {
            return format!("{why}; left alone, as that failed: {error}");
        }
        if tokio::time::timeout(END_LIMIT, process.ended())
            .await
            .is_err()
        {
            return format!("{why}; left alone, as it does not end");
        }
    }
    ended_meanwhile(driver, domain, folder, record);
    why
}

/// Starts what is to be started with the host, once a boot.
pub async fn autostart(driver: &Arc<Driver>) {
    let marker = driver.roots.live_domains().join("autostarted");
    if fs::read_to_string(&marker).is_ok_and(|id| id == driver.boot_id) {
        return;
    }
    let boot = driver.boot_id.clone();
    let written =
        blocking(move || files::write_atomically(&marker, boot.as_bytes(), Durability::Process))
            .await;
    match written {
        Ok(Ok(())) => {}
        // Started twice is worse than not at all.
        Ok(Err(error)) => return log::error!("no autostart: cannot note it: {error}"),
        Err(error) => return log::error!("no autostart: {error}"),
    }
    for domain in driver.registry.all() {
        let name = {
            let inner = domain.lock();
            if !inner.autostart || inner.is_active() || inner.persistent.is_none() {
                continue;
            }
            inner.name.clone()
        };
        let Some(domain) = driver.registry.pin(&domain) else {
            continue;
        };
        match driver.create(domain, 0).await {
            Ok(()) => log::info!("domain '{name}' started with the host"),
            Err(error) => log::error!("autostart of domain '{name}': {error}"),
        }
    }
}
