//! A machine that moves to another process, or comes from one.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::epoll::{EpollEvent, EpollFlags};
use vmm_api::control::{Event, ExitCause, MachineState, MigrateOptions};
use vmm_api::migrate::{CONNECTIONS_MOST, Hello, HelloDisk};
use vmm_api::saved::{write_end, write_section};

use super::build::{self, TOKEN_PERMIT, os};
use super::{Machine, MachineError};
use crate::killpoint::killpoint;
use crate::migrate::disks;
use crate::migrate::link::Link;
use crate::migrate::{Permit, Right, Source, Tuning, moment};
use crate::state::job::{Job, Progress};

/// How long the other side's hold on the disks may outlast its process.
const UNLOCK: Duration = Duration::from_secs(4);

/// What the event loop keeps of a migration that runs.
#[derive(Debug)]
pub(super) struct Leaving {
    pub tuning: Arc<Tuning>,
    states: SyncSender<Result<Vec<u8>, String>>,
    /// It may not run before the migration has failed.
    stands_still: bool,
    /// Disks that go along.
    disks: Vec<disks::Leaving>,
    /// The connection that leads.
    line: UnixStream,
}

impl Machine {
    /// Begins to move the machine over these connections.
    pub(super) fn leave(
        &mut self,
        options: MigrateOptions,
        connections: Vec<OwnedFd>,
    ) -> Result<Job, String> {
        let words = |error: std::io::Error| error.to_string();
        if let MachineState::Crashed | MachineState::Halted = self.state {
            return Err("the guest has ended".to_owned());
        }
        if self.permit.is_some() {
            return Err("the machine has not come here yet".to_owned());
        }
        if connections.is_empty() || connections.len() > CONNECTIONS_MOST as usize {
            return Err(format!("{} connections", connections.len()));
        }
        let line = connections.first().ok_or("no connection")?.try_clone();
        // Any stream socket: the call that is made on it is the same.
        let line = UnixStream::from(line.map_err(words)?);
        let links = connections.into_iter().map(Link::new);
        let links = links.collect::<Result<Vec<_>, _>>().map_err(words)?;
        let leaf = |leaf: &hypervisor::CpuidEntry| {
            let index = leaf.index_significant.then_some(leaf.index);
            let values = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
            (leaf.function, index, values)
        };
        let disks = self.disks_along(&options.disks)?;
        let along = |disk: &disks::Leaving| HelloDisk {
            id: disk.id.clone(),
            bytes: images::Image::size(&*disk.image),
        };
        let shown = self.cpuid.first().map_or(&[][..], Vec::as_slice);
        let hello = Hello {
            program: format!("vireo-vmm {}", env!("CARGO_PKG_VERSION")),
            ram_bytes: self.memory.size(),
            vcpus: self.config.vcpus,
            cpuid: shown.iter().map(leaf).collect(),
            disks: disks.iter().map(along).collect(),
            // The job finds out.
            content: Vec::new(),
        };
        let tuning = Arc::new(Tuning::new(&options));
        // One answer to one question: it never has to wait.
        let (sender, states) = std::sync::mpsc::sync_channel(1);
        self.note_writes(&disks)?;
        if let Err(error) = self.log_writes(true) {
            disks.iter().for_each(|disk| disk.image.note(false));
            return Err(error);
        }
        let source = Source {
            links,
            memory: self.memory.clone(),
            vm: self.vm.clone(),
            hello,
            options,
            tuning: tuning.clone(),
            notices: self.notices.clone(),
            states: Mutex::new(states),
            brake: self.threads.brake(),
            disks: disks.clone(),
            stood_still: AtomicBool::new(false),
        };
        let progress = Progress::new(self.memory.size());
        match Job::start(progress, move |progress| source.run(progress)) {
            Ok(job) => {
                self.leaving = Some(Leaving {
                    tuning,
                    states: sender,
                    stands_still: false,
                    disks,
                    line,
                });
                Ok(job)
            }
            Err(error) => {
                disks.iter().for_each(|disk| disk.image.note(false));
                self.log_writes(false)?;
                Err(words(error))
            }
        }
    }

    /// The disks that are to go along.
    fn disks_along(&self, ids: &[String]) -> Result<Vec<disks::Leaving>, String> {
        let mut all: Vec<disks::Leaving> = Vec::new();
        for id in ids {
            if all.iter().any(|disk| disk.id == *id) {
                return Err(format!("disk '{id}' is named twice"));
            }
            all.push(disks::Leaving {
                id: id.clone(),
                image: self.devices.pci.disk(id)?.noting().clone(),
            });
        }
        Ok(all)
    }

    /// Has these disks note their writes, from a moment on at which none is in flight.
    fn note_writes(&mut self, disks: &[disks::Leaving]) -> Result<(), String> {
        if disks.is_empty() {
            return Ok(());
        }
        self.hold().map_err(|error| error.to_string())?;
        disks.iter().for_each(|disk| disk.image.note(true));
        if !self.gate.is_quiet() {
            self.handle_messages();
        } else if self.state == MachineState::Running {
            self.resume();
        }
        Ok(())
    }

    pub(super) fn log_writes(&self, on: bool) -> Result<(), String> {
        build::log_writes(&*self.vm, &self.memory, on).map_err(|error| error.to_string())
    }

    /// Whether a migration is under way.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Whether the dirty log has to be on.
    pub(super) fn logs_writes(&self) -> bool {
        self.is_leaving() || self.live_save.is_some()
    }

    /// Whether the job that is under way lets the guest run, and does not yet have it stand still.
    pub(super) fn may_still_run(&self) -> bool {
        let leaving = self.leaving.as_ref();
        let saving = self.live_save.as_ref();
        leaving.is_some_and(|leaving| !leaving.stands_still)
            || saving.is_some_and(|saving| !saving.stands_still())
    }

    /// The time has come: nothing moves from now on, and the disks are the other side's.
    pub(super) fn stand_still(&mut self) {
        if self.leaving.is_none() {
            return;
        }
        if let Some(leaving) = &mut self.leaving {
            leaving.stands_still = true;
        }
        moment("the event loop has heard so");
        let states = self.rest().and_then(|()| {
            moment("it stands still");
            let sections = self.sections()?;
            let mut row = Vec::new();
            for section in &sections {
                write_section(&mut row, section).map_err(|error| error.to_string())?;
            }
            write_end(&mut row).map_err(|error| error.to_string())?;
            moment("its states are written down");
            let along: Vec<String> = match &self.leaving {
                Some(leaving) => leaving.disks.iter().map(|disk| disk.id.clone()).collect(),
                None => Vec::new(),
            };
            self.devices.pci.let_go_of_disks(&along)?;
            Ok(row)
        });
        self.without_disks = states.is_ok();
        if let Some(leaving) = &mut self.leaving {
            // A job that was given up meanwhile does not ask any more.
            if leaving.states.try_send(states).is_err() {
                log::debug!("nobody waits for the machine's states any more");
            }
        }
    }

    /// The migration has ended; whether the machine may go on here.
    pub(super) fn left(&mut self, result: &Result<(), String>) -> bool {
        let Some(leaving) = self.leaving.take() else {
            return true;
        };
        leaving.disks.iter().for_each(|disk| disk.image.note(false));
        // The other side may wait for its end before it lets go of the disks.
        drop(leaving.line);
        match (result, leaving.tuning.right()) {
            (Ok(()), _) | (_, Right::Given) => {
                let message = "the guest goes on in another process".to_owned();
                self.end(ExitCause::Migrated, message, 0);
                false
            }
            (Err(error), Right::Unknown) => {
                killpoint("vmm.migrate-unknown");
                // Never two: it stays as it is until somebody knows.
                log::error!("{}: {error}", self.config.name);
                self.undecided = true;
                false
            }
            (Err(_), Right::Own) => {
                let since = Instant::now();
                while let Err(error) = self.have_disks() {
                    if since.elapsed() >= UNLOCK {
                        log::error!("{}: it can't go on: {error}", self.config.name);
                        return false;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                if let Err(error) = self.log_writes(false) {
                    log::warn!("{}: {error}", self.config.name);
                }
                true
            }
        }
    }

    /// The guest was given away, and nobody has told yet what became of it.
    pub(super) fn is_undecided(&self) -> bool {
        let leaving = self.leaving.as_ref();
        self.undecided || leaving.is_some_and(|leaving| leaving.tuning.right() != Right::Own)
    }

    /// Whoever has asked the other side knows whether it has the guest. The line may have ended by then, and the job with
    /// it, or be about to.
    pub(super) fn settle(&mut self, gone: bool) -> Result<(), String> {
        if !self.is_undecided() {
            return Err("the guest was not given away".to_owned());
        }
        if gone {
            let message = "the guest goes on in another process".to_owned();
            self.end(ExitCause::Migrated, message, 0);
            return Ok(());
        }
        self.undecided = false;
        let Some(leaving) = &self.leaving else {
            if !self.logs_writes()
                && let Err(error) = self.log_writes(false)
            {
                log::warn!("{}: {error}", self.config.name);
            }
            return Ok(());
        };
        leaving.tuning.was_not_taken();
        // The job waits for a sign of it no longer.
        match leaving.line.shutdown(Shutdown::Both) {
            Err(error) if error.kind() != std::io::ErrorKind::NotConnected => {
                Err(error.to_string())
            }
            _ => Ok(()),
        }
    }

    /// Takes the disks back that were let go of, before anything runs.
    pub(super) fn have_disks(&mut self) -> Result<(), String> {
        if self.without_disks {
            self.devices.pci.take_disks_back()?;
            self.without_disks = false;
        }
        Ok(())
    }

    /// Changes what the migration keeps to.
    pub(super) fn set_migration(
        &self,
        bandwidth: Option<u64>,
        downtime_ms: Option<u64>,
    ) -> Result<(), String> {
        let leaving = self.leaving.as_ref().ok_or("no migration is running")?;
        leaving.tuning.set(bandwidth, downtime_ms);
        Ok(())
    }

    /// The machine is built: what is left is the right to run it.
    pub(super) fn arrived(&mut self, permit: Permit) -> Result<(), MachineError> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, TOKEN_PERMIT);
        self.epoll.add(permit.fd(), event).map_err(os("epoll"))?;
        permit
            .ready()
            .map_err(|source| MachineError::Incoming(source.to_string()))?;
        self.permit = Some(permit);
        Ok(())
    }

    /// The source has said something unasked, or gone: it does not want to give the machine away.
    pub(super) fn permit_void(&mut self) {
        if let Some(permit) = self.permit.take() {
            let why = match permit.is_void() {
                true => "the source of the migration has gone",
                false => "the source of the migration has changed its mind",
            };
            self.end(ExitCause::Failed, why.to_owned(), 1);
        }
    }

    /// Before the first step of a machine that came from elsewhere: the other one gives it away.
    pub(super) fn ask_to_run(&mut self) -> Result<(), String> {
        let Some(permit) = self.permit.take() else {
            return Ok(());
        };
        permit.ask().map_err(|error| {
            let why = format!("the source keeps the guest: {error}");
            self.end(ExitCause::Failed, why.clone(), 1);
            why
        })?;
        // Whoever hears that the process has ended knows by this whether the guest can have run.
        self.event(Event::TookOver);
        killpoint("vmm.incoming-taken");
        Ok(())
    }
}
