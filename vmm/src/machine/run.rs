//! The event loop: consoles, control connections, signals, and the vCPUs' messages.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_api::control::{
    Answer, Call, Event, ExitCause, Failure, FromVmm, MachineState, Reply, Status,
};

use super::build::{
    TOKEN_CHANNELS, TOKEN_GATE, TOKEN_JOB, TOKEN_NOTICES, TOKEN_PERMIT, TOKEN_SIGNALS,
    TOKEN_WATCHDOGS, os,
};
use super::devices::net;
use super::{CLOSING, Ending, FAREWELL, Machine, MachineError};
use crate::chardev::{Channel, Outcome, TOKENS};
use crate::control::{self, Asked};
use crate::num::to_usize;
use crate::vcpu::{Job, nanoseconds};

impl Machine {
    /// SIGTERM, SIGINT and SIGHUP stop the machine from now on.
    ///
    /// Signals are blocked in this thread and those it starts: called before [`Machine::new`]
    /// starts any, through [`block_signals`].
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn watch_signals(&mut self) -> Result<(), MachineError> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signal_set(), flags).map_err(os("signalfd"))?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_SIGNALS);
        self.epoll.add(&signals, event).map_err(os("epoll"))?;
        self.signals = Some(signals);
        Ok(())
    }

    /// Runs the machine to its end.
    pub fn run(&mut self) -> Ending {
        self.start();
        let mut events = [EpollEvent::empty(); 16];
        loop {
            if let Some(ending) = self.ending.clone() {
                self.farewell(&ending);
                return ending;
            }
            match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => {
                    for event in &events[..count] {
                        self.dispatch(event.data(), event.events());
                    }
                }
                Err(Errno::EINTR) => {}
                Err(error) => self.end(ExitCause::Failed, format!("epoll_wait: {error}"), 1),
            }
            let now = Instant::now();
            for channel in self.channels.values_mut() {
                channel.tick(&self.epoll, now);
            }
            self.let_go_of_keys();
            self.start();
        }
    }

    /// Starts the guest as soon as the consoles it waits for are there.
    fn start(&mut self) {
        if !self.starts_by_itself {
            return;
        }
        let channels = &self.channels;
        self.awaited
            .retain(|index| channels.get(index).is_some_and(|c| !c.is_connected()));
        if self.awaited.is_empty() {
            self.starts_by_itself = false;
            self.resume();
            self.event(Event::Resumed);
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let deadlines = self.channels.values().filter_map(Channel::deadline);
        let Some(deadline) = deadlines.chain(self.held_until()).min() else {
            return EpollTimeout::NONE;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: too early would only mean another round.
        let millis = left.as_micros().div_ceil(1000).min(60_000);
        u16::try_from(millis).map_or(EpollTimeout::ZERO, EpollTimeout::from)
    }

    fn dispatch(&mut self, token: u64, events: EpollFlags) {
        match token {
            TOKEN_GATE => self.handle_messages(),
            TOKEN_SIGNALS => self.signalled(),
            TOKEN_NOTICES => self.handle_notices(),
            TOKEN_JOB => self.job_done(),
            TOKEN_PERMIT => self.permit_void(),
            TOKEN_WATCHDOGS..TOKEN_CHANNELS => self.watchdog_rang(token - TOKEN_WATCHDOGS),
            TOKEN_CHANNELS..control::TOKEN => {
                let index = to_usize((token - TOKEN_CHANNELS) / TOKENS);
                if let Some(channel) = self.channels.get_mut(&index)
                    && channel.ready(&self.epoll, token, events) == Outcome::Quit
                {
                    self.end(ExitCause::Stopped, "Ctrl-A x".into(), 0);
                }
            }
            _ => {
                let Some(control) = &mut self.control else {
                    return;
                };
                for asked in control.ready(&self.epoll, token, events) {
                    self.answer(asked);
                }
                self.check_asker();
            }
        }
    }

    fn signalled(&mut self) {
        let Some(signals) = &self.signals else { return };
        match signals.read_signal() {
            Ok(Some(info)) => {
                let name = i32::try_from(info.ssi_signo)
                    .ok()
                    .and_then(|n| Signal::try_from(n).ok());
                let name = name.map_or("a signal", Signal::as_str);
                self.end(ExitCause::Stopped, name.to_owned(), 0);
            }
            Ok(None) => {}
            Err(error) => log::error!("signalfd: {error}"),
        }
    }

    fn answer(&mut self, asked: Asked) {
        // What the guest did before comes first.
        self.handle_messages();
        if let Call::Save { .. } | Call::SaveLive { .. } | Call::Dump { .. } | Call::Migrate(_) =
            asked.request.call
        {
            let (by, id) = (asked.by, asked.request.id);
            if let Err(message) = self.begin_job(asked) {
                let result = Err(Failure::from(message));
                self.send(by, &FromVmm::Reply(Reply { id, result }));
            }
            return;
        }
        let result = match &asked.request.call {
            Call::SwitchDisks { disks } => self
                .switch_disks(disks, asked.descriptors)
                .map(|()| Answer::Done),
            Call::StartBlockJob { disk, job, speed } => self
                .start_block_job(disk, job, *speed, asked.descriptors)
                .map(|()| Answer::Done),
            Call::AddDevice(config) => self
                .add_device(config, asked.descriptors)
                .map(|()| Answer::Done),
            Call::AddPort { controller, port } => self
                .add_port(controller, port, asked.descriptors)
                .map(|()| Answer::Done),
            Call::ChangeMedium { id, image, force } => {
                let changed = self.change_medium(id, image.as_deref(), *force, asked.descriptors);
                let result = match changed {
                    Ok(true) => Ok(Answer::Done),
                    Ok(false) => Err(Failure {
                        locked: true,
                        ..format!("the guest has locked the tray of '{id}'").into()
                    }),
                    Err(message) => Err(message.into()),
                };
                return self.reply(asked.by, asked.request.id, result);
            }
            call => self.carry_out(call),
        };
        self.reply(asked.by, asked.request.id, result.map_err(Failure::from));
    }

    fn reply(&mut self, to: u64, id: u64, result: Result<Answer, Failure>) {
        self.send(to, &FromVmm::Reply(Reply { id, result }));
    }

    pub(super) fn send(&mut self, to: u64, message: &FromVmm) {
        if let Some(control) = &mut self.control {
            control.send(&self.epoll, to, message);
        }
    }

    fn carry_out(&mut self, call: &Call) -> Result<Answer, String> {
        match call {
            Call::Query => return Ok(Answer::Status(self.status())),
            Call::RemoveDevice { id } => {
                if !self.remove_port(id)? {
                    self.without_block_job(id)?;
                    self.remove_device(id)?;
                }
            }
            Call::PlugVcpus { vcpus } => self.plug_vcpus(vcpus)?,
            Call::UnplugVcpu { vcpu } => self.ask_vcpu_back(*vcpu)?,
            Call::AddDevice(_) | Call::AddPort { .. } => {
                return Err("a device comes with its descriptors".into());
            }
            Call::Pause => {
                self.stay_paused();
                self.pause()?;
            }
            Call::Resume | Call::Reset if self.job.is_some() && !self.may_still_run() => {
                return Err("a job is running".to_owned());
            }
            Call::Resume => match self.state {
                MachineState::Paused => {
                    self.ask_to_run()?;
                    self.have_disks()?;
                    self.starts_by_itself = false;
                    self.resume();
                    self.event(Event::Resumed);
                }
                MachineState::Running => {}
                MachineState::Crashed | MachineState::Halted => {
                    return Err("the machine has ended; it can only be reset or stopped".into());
                }
            },
            Call::Stop => self.end(ExitCause::Stopped, "stopped".into(), 0),
            Call::PowerButton => {
                if !self.config.acpi {
                    return Err("a machine without ACPI has no power button".into());
                }
                if !self.devices.pm.press_power_button() {
                    log::info!("power button pressed; the guest does not listen to it now");
                }
            }
            Call::Reset => {
                let was = self.state;
                self.have_disks()?;
                if let Err(error) = self.reset() {
                    self.fail(&error);
                    return Err(error.to_string());
                }
                self.event(Event::Reset);
                if was != MachineState::Paused {
                    self.resume();
                }
            }
            Call::Nmi => self.threads.each(|_| Job::Nmi),
            Call::SendKeys { keys, hold_ms } => self.send_keys(keys, *hold_ms)?,
            Call::OnPoweroff(action) => self.config.on_poweroff = *action,
            Call::OnReboot(action) => self.config.on_reboot = *action,
            Call::OnCrash(action) => self.config.on_crash = *action,
            Call::Peek {
                address,
                bytes,
                linear,
            } => return self.peek(*address, *bytes, *linear).map(Answer::Memory),
            Call::Stats => return Ok(Answer::Stats(self.devices.pci.stats())),
            Call::SetBalloon { target_bytes } => {
                if *target_bytes > self.memory.size() {
                    return Err(format!(
                        "{target_bytes} bytes are more than the machine's {}",
                        self.memory.size()
                    ));
                }
                self.devices.pci.balloon()?.set_target(*target_bytes);
            }
            Call::SetBalloonPeriod { seconds } => {
                self.devices.pci.balloon()?.set_stats_period(*seconds);
            }
            Call::SetLink { id, up } => self.devices.pci.net(id)?.set_link(*up),
            Call::SetBandwidth {
                id,
                inbound,
                outbound,
            } => net::set_bandwidth(self.devices.pci.net(id)?, *inbound, *outbound),
            Call::SetDiskLimits { id, limits, group } => {
                self.devices.pci.set_limits(id, limits, group.as_deref())?;
            }
            Call::IoThreads => {
                return Ok(Answer::IoThreads(self.devices.pci.iothreads().list()));
            }
            Call::SetIoThread(thread) => self.devices.pci.iothreads().set(*thread)?,
            Call::RemoveIoThread { id } => self.remove_iothread(*id)?,
            Call::SetBlockThreshold { disk, image, bytes } => {
                let known = self.devices.pci.disk(disk)?;
                known.set_threshold(disk, *image, *bytes, &self.notices)?;
            }
            Call::JobStatus => return Ok(self.job_status()),
            Call::AbortJob => self.abort_job()?,
            Call::Claim => self.ask_to_run()?,
            Call::Settle { gone } => self.settle(*gone)?,
            Call::SetMigration {
                bandwidth,
                downtime_ms,
            } => self.set_migration(*bandwidth, *downtime_ms)?,
            Call::Save { .. }
            | Call::SaveLive { .. }
            | Call::Dump { .. }
            | Call::Migrate(_)
            | Call::SwitchDisks { .. }
            | Call::ChangeMedium { .. }
            | Call::StartBlockJob { .. } => {
                return Err("that needs descriptors".to_owned());
            }
            Call::ResizeDisk { id, bytes } => {
                self.without_block_job(id)?;
                if self.live_save.is_some() {
                    return Err("a job is running".to_owned());
                }
                self.devices.pci.disk(id)?.resize(*bytes)?;
            }
            Call::SnapshotDisks {
                disks,
                name,
                date,
                what,
            } => self.snapshot_disks(disks, name, *date, *what)?,
            Call::Disks => return Ok(self.disk_images()),
            Call::SetBlockJobSpeed { disk, speed } => self.block_job(disk)?.set_speed(*speed),
            Call::EndBlockJob { disk, pivot } => self.end_block_job(disk, *pivot)?,
            Call::SettleBlockJob { disk } => self.settle_block_job(disk)?,
        }
        Ok(Answer::Done)
    }

    pub(super) fn pause(&mut self) -> Result<(), String> {
        // A start that still waits for a console's peer is off.
        self.starts_by_itself = false;
        if self.state != MachineState::Running {
            return Ok(());
        }
        if let Err(error) = self.hold() {
            let message = error.to_string();
            self.fail(&error.into());
            return Err(message);
        }
        self.was_stopped = true;
        self.state = MachineState::Paused;
        self.event(Event::Paused);
        Ok(())
    }

    fn status(&self) -> Status {
        Status {
            state: self.state,
            vcpu_time_ns: self.threads.cpu_times(),
            vcpus: Some(self.present().collect()),
            process_time_ns: process_time(),
            serial_ptys: self.serial_ptys(),
            port_ptys: self.port_ptys(),
            open_ports: Some(self.open_ports.iter().cloned().collect()),
            devices: Some(self.pluggable()),
            undecided: self.is_undecided(),
        }
    }

    /// Lets everybody know, and consoles have the last lines.
    fn farewell(&mut self, ending: &Ending) {
        if ending.record.cause == ExitCause::Stopped {
            // As pulling the plug: nobody waits for a vCPU that is, say, loading a kernel.
            self.threads.dismiss();
        } else if let Err(error) = self.hold() {
            log::error!("{error}");
        }
        let closed = self.close_images();
        let deadline = Instant::now() + FAREWELL;
        self.event(Event::Exiting(ending.record.clone()));
        for channel in self.channels.values_mut() {
            channel.finish(&self.epoll, deadline);
        }
        // A terminal gets its settings back.
        self.channels.clear();
        if let Some(control) = &mut self.control {
            control.finish(
                &self.epoll,
                deadline.max(Instant::now() + Duration::from_millis(10)),
            );
        }
        // A disk that does not answer keeps nobody from ending.
        if closed.recv_timeout(CLOSING) == Err(RecvTimeoutError::Timeout) {
            log::warn!("{}: a disk's image is left unclosed", self.config.name);
        }
    }

    /// Has block jobs ended and images tidied up, on a thread: nothing is lost without that, but a qcow2 image keeps
    /// clusters that it had set aside. The receiver is disconnected when it is done.
    fn close_images(&mut self) -> Receiver<()> {
        let (tell, told) = channel();
        let jobs = std::mem::take(&mut self.block_jobs);
        if self.without_disks {
            return told;
        }
        let images = self.devices.pci.images();
        let close = move || {
            // What they have in hand is done before images close.
            drop(jobs);
            for (id, image) in images {
                if let Err(error) = image.rest() {
                    log::warn!("{id}: closing its image: {error}");
                }
            }
            drop(tell);
        };
        let thread = std::thread::Builder::new().name("closing".to_owned());
        if let Err(error) = thread.spawn(close) {
            log::warn!("images are left unclosed: {error}");
        }
        told
    }
}

fn signal_set() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
        .into_iter()
        .collect()
}

/// Keeps the signals that [`Machine::watch_signals`] reads from ending the process.
///
/// # Errors
/// The kernel's refusal.
pub fn block_signals() -> Result<(), MachineError> {
    signal_set().thread_block().map_err(os("sigprocmask"))
}

/// CPU time of the process so far, nanoseconds.
fn process_time() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: fills the variable it is given.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    if failed == 0 { nanoseconds(&time) } else { 0 }
}
