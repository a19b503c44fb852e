//! Hearing what a running domain does, to its end.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch::Sender;
use vmm_api::config::LifecycleAction;
use vmm_api::control::{
    Answer, Call, Event, ExitCause, ExitRecord, Failure, FromVmm, MachineState, Reply, Status,
};
use vmm_api::devices::{ErrorPolicy, WatchdogAction};
use xml_schemas::domain::LifecycleAction as XmlAction;
use xml_schemas::domain::device::Disk;

use super::Driver;
use super::job::{End, Operation};
use super::object::{Domain, Inner};
use super::record::Folder;
use super::state::{Lifecycle, PausedReason, RunningReason, ShutoffReason, State};
use crate::control::{Control, Frames};
use crate::events::DomainEvent;
use crate::files;
use crate::killpoint::killpoint;
use crate::logger;
use crate::vmm_process::{Ending, VmmProcess};

/// What an ended process has sent before is still read, for at most this long.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// From one attempt to reach a VMM that has closed its connection to the next.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);
/// From one balloon-change event of a domain to the next.
const BALLOON_INTERVAL: Duration = Duration::from_secs(1);

/// A running domain and the ends of its lines.
#[derive(Debug)]
pub struct Watched {
    /// The driver.
    pub driver: Arc<Driver>,
    /// The domain.
    pub domain: Arc<Domain>,
    /// Its process.
    pub process: Arc<VmmProcess>,
    /// Whose answers come with the frames.
    pub control: Control,
    /// Told when everything about the end is done.
    pub ended: Sender<bool>,
    /// The state may have changed while no daemon watched: the first status corrects it.
    pub catching_up: AtomicBool,
}

/// Watches what comes in `frames` until the process has ended, then clears away.
pub async fn watch(watched: Watched, mut frames: Frames) {
    let mut exit = None;
    let (mut connected, mut given_up) = (true, false);
    let process = Arc::clone(&watched.process);
    let ending = loop {
        tokio::select! {
            // In this order: what was sent before the end is heard before the end.
            biased;
            frame = frames.next(), if connected => {
                connected = watched.hear(frame, &mut exit);
            }
            ending = process.ended() => break ending,
            () = tokio::time::sleep(RECONNECT_INTERVAL), if !connected => {
                match watched.reconnect() {
                    Some(new) => {
                        frames = new;
                        (connected, given_up) = (true, false);
                    }
                    None if !given_up => {
                        given_up = true;
                        // One that has said that it ends may take a while for it.
                        if exit.is_none() {
                            watched.emit(&watched.domain.lock(), &DomainEvent::ControlError);
                        }
                    }
                    None => {}
                }
            }
        }
    };
    if connected {
        let drain = async { while watched.hear(frames.next().await, &mut exit) {} };
        // A child of the VMM could hold the connection open.
        let _ = tokio::time::timeout(DRAIN_LIMIT, drain).await;
    }
    // It may have to wait for the kernel.
    let finished = super::blocking(move || watched.finish(exit, ending));
    if let Err(error) = finished.await {
        log::error!("{error}");
    }
}

impl Watched {
    /// False at the end of the connection.
    fn hear(&self, frame: std::io::Result<Option<FromVmm>>, exit: &mut Option<ExitRecord>) -> bool {
        match frame {
            Ok(Some(FromVmm::Reply(reply))) => self.answered(reply),
            Ok(Some(FromVmm::Event(Event::Exiting(record)))) => *exit = Some(record),
            Ok(Some(FromVmm::Event(event))) => self.happened(&event),
            Ok(None) => {
                self.control.close();
                return false;
            }
            Err(error) => {
                let name = self.domain.name().name;
                log::error!("domain '{name}': its control connection: {error}");
                self.control.close();
                return false;
            }
        }
        true
    }

    /// Reaches the VMM again, whose connection has ended while it runs on.
    fn reconnect(&self) -> Option<Frames> {
        let (name, folder) = {
            let inner = self.domain.lock();
            (inner.name.clone(), inner.live.as_ref()?.folder.clone())
        };
        let stream = files::connect_unix(&Folder(folder).control());
        match stream.and_then(|stream| self.control.reopen(stream)) {
            Ok(frames) => {
                log::info!("domain '{name}': its VMM is reached again");
                self.catching_up.store(true, Ordering::Relaxed);
                self.ask();
                Some(frames)
            }
            Err(error) => {
                log::debug!("domain '{name}': its VMM is not reached: {error}");
                None
            }
        }
    }

    fn answered(&self, reply: Reply) {
        let Some(waiting) = self.control.take(&reply) else {
            return;
        };
        // The state changes before the caller goes on, and in the order of the answers.
        match (&waiting.call, &reply.result) {
            (Call::Pause, Ok(_)) => self.happened(&Event::Paused),
            (Call::Resume, Ok(_)) => self.happened(&Event::Resumed),
            (Call::Claim, Ok(_)) => drop(self.domain.lock().coming.take()),
            (Call::Query, Ok(Answer::Status(status))) => self.is_now(status),
            (_, Err(Failure { message, .. })) => {
                log::debug!("domain '{}': {message}", self.domain.name().name);
            }
            _ => {}
        }
        waiting.answer(reply.result);
    }

    fn happened(&self, event: &Event) {
        let mut inner = self.domain.lock();
        match event {
            Event::Paused => {
                if matches!(inner.state, State::Running(_)) {
                    let work = inner.live.as_ref().and_then(|live| live.work.pauses());
                    let reason = work.unwrap_or(PausedReason::User);
                    let event = match reason {
                        PausedReason::Migration => Lifecycle::SuspendedMigrated,
                        _ => Lifecycle::SuspendedPaused,
                    };
                    self.change(&mut inner, State::Paused(reason), Some(event));
                }
            }
            Event::Resumed => {
                // It has come.
                inner.coming = None;
                self.has_come(&mut inner);
                if let Some(live) = inner.live.as_mut() {
                    live.disk_errors.clear();
                }
                if !matches!(inner.state, State::Running(_)) {
                    let came = inner
                        .live
                        .as_ref()
                        .is_some_and(|live| live.work.is(Operation::MigrationIn));
                    let (reason, event) = match inner.state {
                        State::Paused(PausedReason::Migration) if came => {
                            (RunningReason::Migrated, Lifecycle::ResumedMigrated)
                        }
                        State::Paused(PausedReason::Migration) => {
                            (RunningReason::MigrationCanceled, Lifecycle::ResumedMigrated)
                        }
                        State::Paused(PausedReason::Save) => {
                            (RunningReason::SaveCanceled, Lifecycle::ResumedUnpaused)
                        }
                        _ => (RunningReason::Unpaused, Lifecycle::ResumedUnpaused),
                    };
                    self.change(&mut inner, State::Running(reason), Some(event));
                }
            }
            Event::Shutdown => self.powered_off(&mut inner),
            Event::Reset => self.was_reset(&mut inner),
            Event::Crashed {
                reason,
                guest_fault,
            } => self.crashed(&mut inner, reason, *guest_fault),
            // Kept by who reads the frames.
            Event::Exiting(_) => {}
            Event::Watchdog(action) => self.barked(&mut inner, *action),
            Event::IoError {
                id, policy, reason, ..
            } => self.disk_failed(&mut inner, id, *policy, reason),
            Event::BalloonChange { actual_bytes } => {
                let Some(live) = inner.live.as_mut() else {
                    return;
                };
                Arc::make_mut(&mut live.definition).memory.current_kib = actual_bytes / 1024;
                self.balloon_changed(&mut inner);
            }
            Event::DeviceRemoved { id } => {
                self.driver.device_removed(&self.domain, &mut inner, id);
            }
            Event::VcpuRemoved { vcpu } => self.driver.vcpu_removed(&mut inner, *vcpu),
            Event::VcpuKept { vcpu } => {
                self.driver.vcpu_kept(&self.domain, &mut inner, *vcpu);
            }
            Event::BlockJob { id, kind, news } => {
                let driver = &self.driver;
                driver.block_job_news(&self.domain, &mut inner, id, *kind, news);
            }
            Event::PortState { id, open } => {
                self.driver
                    .port_changed(&self.domain, &mut inner, id, *open);
            }
            Event::BlockThreshold {
                id,
                image,
                threshold,
                excess,
            } => {
                let (which, far) = ((id.as_str(), *image), (*threshold, *excess));
                self.driver
                    .threshold_passed(&self.domain, &inner, which, far);
            }
            Event::TrayMoved { id, open } => {
                let driver = &self.driver;
                driver.tray_moved(&self.domain, &mut inner, id, *open);
            }
            Event::MigrationRound(number) => {
                let number = i32::try_from(*number).unwrap_or(i32::MAX);
                self.emit(&inner, &DomainEvent::MigrationIteration(number));
            }
            Event::TookOver => {
                if let Some(live) = &inner.live {
                    live.taken.store(true, Ordering::Release);
                }
            }
            Event::MigrationReady => {
                let waiting = inner.live.as_mut().and_then(|l| l.migration_ready.take());
                if let Some(waiting) = waiting {
                    // Whoever waited may have given up.
                    let _ = waiting.send(());
                }
            }
        }
    }

    fn emit(&self, inner: &Inner, event: &DomainEvent) {
        self.driver.hub.emit(&self.domain.name_in(inner), event);
    }

    /// Told once in [`BALLOON_INTERVAL`], as QEMU does: a guest can change it thousands of times
    /// a second, and the last value is what counts.
    fn balloon_changed(&self, inner: &mut Inner) {
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        let kib = live.definition.memory.current_kib;
        let (told, due) = live.balloon_told;
        let wait = told.map(|told| BALLOON_INTERVAL.saturating_sub(told.elapsed()));
        match wait {
            None | Some(Duration::ZERO) if !due => {
                live.balloon_told = (Some(Instant::now()), false);
                self.emit(inner, &DomainEvent::BalloonChange(kib));
            }
            Some(wait) if !due => {
                live.balloon_told.1 = true;
                let id = live.id;
                let (driver, domain) = (Arc::clone(&self.driver), Arc::clone(&self.domain));
                tokio::spawn(async move {
                    tokio::time::sleep(wait).await;
                    let mut inner = domain.lock();
                    let Some(live) = inner.live.as_mut().filter(|live| live.id == id) else {
                        return;
                    };
                    live.balloon_told = (Some(Instant::now()), false);
                    let kib = live.definition.memory.current_kib;
                    let name = domain.name_in(&inner);
                    driver.hub.emit(&name, &DomainEvent::BalloonChange(kib));
                });
            }
            _ => {}
        }
    }

    fn barked(&self, inner: &mut Inner, action: WatchdogAction) {
        // virDomainEventWatchdogAction
        let number = match action {
            WatchdogAction::None => 0,
            WatchdogAction::Pause | WatchdogAction::Dump => 1,
            WatchdogAction::Reset => 2,
            WatchdogAction::Poweroff => 3,
            WatchdogAction::Shutdown => 4,
            WatchdogAction::InjectNmi => 6,
        };
        self.emit(inner, &DomainEvent::Watchdog(number));
        if number == 1 {
            self.paused_for(inner, PausedReason::Watchdog, Lifecycle::SuspendedWatchdog);
        }
        if matches!(action, WatchdogAction::Dump) {
            self.driver.dump_for_watchdog(&self.domain);
        }
    }

    /// The machine's own `Paused` event comes before or after this one.
    fn paused_for(&self, inner: &mut Inner, reason: PausedReason, event: Lifecycle) {
        match inner.state {
            State::Running(_) => self.change(inner, State::Paused(reason), Some(event)),
            State::Paused(PausedReason::User) => self.change(inner, State::Paused(reason), None),
            _ => {}
        }
    }

    fn disk_failed(&self, inner: &mut Inner, id: &str, policy: ErrorPolicy, reason: &str) {
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        let disks = live
            .definition
            .devices
            .rest
            .iter()
            .filter(|e| e.name == "disk");
        let disk = disks
            .filter_map(|e| Disk::read(e).ok())
            .find(|disk| disk.alias.as_deref() == Some(id));
        let path = disk
            .as_ref()
            .and_then(|d| d.source.path())
            .unwrap_or_default();
        // virDomainEventIOErrorAction, virDomainDiskErrorCode
        let stopped = matches!(policy, ErrorPolicy::Stop | ErrorPolicy::Enospace);
        let action = match policy {
            ErrorPolicy::Ignore => 0,
            _ if stopped => 1,
            _ => 2,
        };
        let event = |with_reason| DomainEvent::IoError {
            with_reason,
            path: path.to_owned(),
            alias: id.to_owned(),
            action,
            reason: reason.to_owned(),
        };
        if stopped {
            let code = if reason == "enospc" { 2 } else { 1 };
            let target = disk
                .as_ref()
                .map_or_else(|| id.to_owned(), |d| d.target.clone());
            live.disk_errors.retain(|(other, _)| *other != target);
            live.disk_errors.push((target, code));
        }
        self.emit(inner, &event(false));
        self.emit(inner, &event(true));
        if stopped {
            self.paused_for(inner, PausedReason::IoError, Lifecycle::SuspendedIoError);
        }
    }

    fn powered_off(&self, inner: &mut Inner) {
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        if std::mem::take(&mut live.rebooting) {
            let action = match live.definition.on_poweroff {
                XmlAction::Restart => LifecycleAction::Restart,
                XmlAction::Preserve => LifecycleAction::Preserve,
                _ => LifecycleAction::Destroy,
            };
            // Its answer changes nothing here; a dead connection shows elsewhere.
            drop(self.control.send(Call::OnPoweroff(action)));
            return self.rebooted(inner);
        }
        if live.definition.on_poweroff == XmlAction::Restart {
            return self.rebooted(inner);
        }
        self.change(inner, State::Shutdown, Some(Lifecycle::ShutdownGuest));
        self.ask();
    }

    fn was_reset(&self, inner: &mut Inner) {
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        let by_host = std::mem::take(&mut live.resetting);
        if by_host || live.definition.on_reboot == XmlAction::Restart {
            self.rebooted(inner);
        } else {
            self.change(inner, State::Shutdown, Some(Lifecycle::ShutdownGuest));
        }
        self.ask();
    }

    fn rebooted(&self, inner: &Inner) {
        let name = self.domain.name_in(inner);
        self.driver.hub.emit(&name, &DomainEvent::Reboot);
    }

    fn crashed(&self, inner: &mut Inner, reason: &str, guest_fault: bool) {
        log::warn!("domain '{}' crashed: {reason}", inner.name);
        let event = guest_fault.then_some(Lifecycle::CrashedPanicked);
        self.change(inner, State::Crashed, event);
        self.ask();
        self.dump_if_crashed(inner);
    }

    /// A crashed guest whose definition wants a dump of it.
    fn dump_if_crashed(&self, inner: &Inner) {
        let action = inner.live.as_ref().map(|live| live.definition.on_crash);
        if inner.state == State::Crashed
            && let Some(action) = action.filter(|action| action.dumps())
        {
            let restart = action == XmlAction::CoredumpRestart;
            self.driver.dump_for_crash(&self.domain, restart);
        }
    }

    /// Asks what the machine does now; [`Watched::is_now`] hears the answer.
    fn ask(&self) {
        drop(self.control.send(Call::Query));
    }

    /// What follows a power-off, a reset or a crash depends on the machine's actions for them.
    fn is_now(&self, status: &Status) {
        let machine = status.state;
        let mut inner = self.domain.lock();
        if self.catching_up.swap(false, Ordering::Relaxed) {
            if let Some(open) = &status.open_ports {
                self.driver.ports_are(&self.domain, &mut inner, open);
            }
            self.driver.vcpus_are(&mut inner, status.vcpus.as_deref());
            self.driver.look_at_trays(&self.domain, &inner);
            let state = caught_up(inner.state, machine);
            if machine == MachineState::Running {
                inner.coming = None;
                self.has_come(&mut inner);
            }
            self.change(&mut inner, state, None);
            return self.dump_if_crashed(&inner);
        }
        let state = match (machine, inner.state) {
            (
                MachineState::Running,
                State::Shutdown | State::Crashed | State::Paused(PausedReason::ShuttingDown),
            ) => State::Running(RunningReason::Booted),
            (MachineState::Halted, State::Shutdown) => State::Paused(PausedReason::ShuttingDown),
            (MachineState::Crashed, State::Running(_) | State::Paused(_)) => State::Crashed,
            _ => return,
        };
        self.change(&mut inner, state, None);
    }

    fn change(&self, inner: &mut Inner, state: State, event: Option<Lifecycle>) {
        inner.state = state;
        if let Some(event) = event {
            let name = self.domain.name_in(inner);
            self.driver.hub.emit(&name, &DomainEvent::Lifecycle(event));
        }
        self.driver.write_record(inner);
    }

    /// A guest that came runs here: where nobody waits for that any more, what else was wanted of its migration is
    /// seen to now.
    fn has_come(&self, inner: &mut Inner) {
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        if !live.work.is(Operation::MigrationIn)
            && let Some(arrival) = live.arrival.take()
        {
            self.driver.see_arrival_through(&self.domain, arrival);
        }
    }

    fn finish(self, exit: Option<ExitRecord>, ending: Option<Ending>) {
        self.control.close();
        finish(&self.driver, &self.domain, exit, ending);
        // Nobody may be waiting.
        let _ = self.ended.send(true);
    }
}

/// The state that was recorded, unless the machine says that it is another one by now.
fn caught_up(recorded: State, machine: MachineState) -> State {
    match (machine, recorded) {
        (MachineState::Running, State::Running(_)) => recorded,
        (MachineState::Running, _) => State::Running(RunningReason::Unpaused),
        (MachineState::Paused, State::Paused(_)) => recorded,
        (MachineState::Paused, _) => State::Paused(PausedReason::User),
        (MachineState::Halted, _) => State::Paused(PausedReason::ShuttingDown),
        (MachineState::Crashed, _) => State::Crashed,
    }
}

/// Why a domain is off, and what is told about it.
pub(super) fn verdict(
    destroying: bool,
    exit: Option<&ExitRecord>,
) -> (ShutoffReason, Option<Lifecycle>, Lifecycle) {
    let migrated = exit.is_some_and(|exit| exit.cause == ExitCause::Migrated);
    if destroying && !migrated {
        let host = Some(Lifecycle::ShutdownHost);
        return (ShutoffReason::Destroyed, host, Lifecycle::StoppedDestroyed);
    }
    match exit.map(|exit| exit.cause) {
        Some(ExitCause::Shutdown) => (ShutoffReason::Shutdown, None, Lifecycle::StoppedShutdown),
        Some(ExitCause::Stopped) => (
            ShutoffReason::Shutdown,
            Some(Lifecycle::ShutdownHost),
            Lifecycle::StoppedShutdown,
        ),
        Some(ExitCause::Crashed) => (ShutoffReason::Crashed, None, Lifecycle::StoppedCrashed),
        Some(ExitCause::Migrated) => (ShutoffReason::Migrated, None, Lifecycle::StoppedMigrated),
        Some(ExitCause::Failed) => (ShutoffReason::Failed, None, Lifecycle::StoppedFailed),
        None => (ShutoffReason::Crashed, None, Lifecycle::StoppedFailed),
    }
}

/// Clears away after a process that has ended.
pub fn finish(
    driver: &Driver,
    domain: &Arc<Domain>,
    exit: Option<ExitRecord>,
    ending: Option<Ending>,
) {
    let inner = domain.lock();
    let Some(live) = &inner.live else { return };
    let (folder, made) = (Folder(live.folder.clone()), live.made.clone());
    let exit = exit.or_else(|| folder.exit_record());
    if live.work.is(Operation::MigrationOut) {
        // Known before what says it is gone: the next daemon, too, is to see to what follows from it.
        let (reason, ..) = verdict(live.destroying, exit.as_ref());
        let migrated = reason == ShutoffReason::Migrated && inner.coming.is_none();
        driver.note_job_ended(domain, live.work.clone().into_last(migrated).as_ref());
    }
    drop(inner);
    // Before it counts as off: the next start makes them again.
    made.clear_away();
    folder.remove();
    killpoint("domain.cleared-away");
    let mut inner = domain.lock();
    let Some(live) = inner.live.take() else {
        return;
    };
    let coming = inner.coming.take();
    let (reason, before, event) = match (coming, live.work.end) {
        (Some(coming), _) => {
            let (reason, event) = coming.end();
            (reason, None, event)
        }
        (None, Some(End::Saved)) => (ShutoffReason::Saved, None, Lifecycle::StoppedSaved),
        (None, Some(End::Crashed)) => (ShutoffReason::Crashed, None, Lifecycle::StoppedCrashed),
        (None, Some(End::Reverted)) => (
            ShutoffReason::FromSnapshot,
            None,
            Lifecycle::StoppedFromSnapshot,
        ),
        (None, None) => verdict(live.destroying, exit.as_ref()),
    };
    let words = match (&exit, ending) {
        (Some(exit), _) if !exit.message.is_empty() => exit.message.clone(),
        (Some(exit), _) => format!("{:?}", exit.cause).to_lowercase(),
        (None, Some(ending)) => format!("the VMM died: {ending}"),
        (None, None) => "the VMM died".to_owned(),
    };
    log::info!("domain '{}' is off: {reason:?} ({words})", inner.name);
    log_end(
        driver,
        &inner.name,
        &format!("{reason:?}").to_lowercase(),
        &words,
    );
    let groups = live.made.groups;
    let migrated = matches!(reason, ShutoffReason::Migrated);
    let moves = live.work.is(Operation::MigrationOut);
    inner.last_job = live.work.into_last(migrated);
    if moves {
        driver.note_job_ended(domain, inner.last_job.as_ref());
    }
    inner.state = State::Shutoff(reason);
    let name = domain.name_in(&inner);
    if let Some(before) = before {
        driver.hub.emit(&name, &DomainEvent::Lifecycle(before));
    }
    driver.hub.emit(&name, &DomainEvent::Lifecycle(event));
    drop(inner);
    // One may have been made since.
    groups.remove();
    driver.registry.remove_if_unused(domain);
    if !domain.lock().visible() {
        driver.forget_job(domain);
    }
}

/// Notes a domain's end in its log.
pub(super) fn log_end(driver: &Driver, name: &str, reason: &str, words: &str) {
    let path = driver.roots.domain_logs().join(format!("{name}.log"));
    let now = logger::timestamp(SystemTime::now());
    let written = logger::open_log(&path)
        .and_then(|mut log| writeln!(log, "{now}: shutting down, reason={reason} ({words})"));
    if let Err(error) = written {
        log::warn!("cannot write {}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_have_libvirts_reasons_and_events() {
        let exit = |cause| ExitRecord {
            cause,
            message: String::new(),
        };
        let of = |destroying, cause: Option<ExitCause>| {
            let (reason, before, event) = verdict(destroying, cause.map(exit).as_ref());
            (
                State::Shutoff(reason).numbers().1,
                before.map(|b| b.numbers()),
                event.numbers(),
            )
        };
        let host = Some((6, 2));
        assert_eq!(of(true, Some(ExitCause::Stopped)), (2, host, (5, 1)));
        assert_eq!(of(true, None), (2, host, (5, 1)));
        assert_eq!(of(false, Some(ExitCause::Shutdown)), (1, None, (5, 0)));
        assert_eq!(of(false, Some(ExitCause::Stopped)), (1, host, (5, 0)));
        assert_eq!(of(false, Some(ExitCause::Crashed)), (3, None, (5, 2)));
        assert_eq!(of(false, Some(ExitCause::Failed)), (6, None, (5, 5)));
        assert_eq!(of(true, Some(ExitCause::Migrated)), (4, None, (5, 3)));
        assert_eq!(of(false, None), (3, None, (5, 5)));
    }
}
