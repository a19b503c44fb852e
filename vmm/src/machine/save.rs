//! The states of the machine and its devices: taken for an image, taken over from one; and the jobs
//! that write them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hypervisor::{CpuidEntry, VcpuState};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use serde::{Deserialize, Serialize};
use virtio::Payload;
use vmm_api::config::{LifecycleAction, MachineConfig, VcpuHotplug};
use vmm_api::control::{Answer, Call, Event, Failure, FromVmm, JobStatus, MachineState, Reply};
use vmm_api::devices::{DeviceConfig, DeviceKind, PciAddress};
use vmm_api::saved::{Section, write_end, write_section};

use super::build::TOKEN_JOB;
use super::{Machine, MachineError};
use crate::control::Asked;
use crate::devices::cpus::CpusState;
use crate::migrate::Right;
use crate::num::to_usize;
use crate::state::core;
use crate::state::image::{self, Parts, RestoreError, Saved};
use crate::state::job::{Job, Progress};

/// Layout of the sections that have no version of their own.
const VERSION: u32 = 1;

/// What the machine is, and what of it is nobody's else.
#[derive(Debug, Serialize, Deserialize)]
struct Facts {
    vcpus: u32,
    acpi: bool,
    firmware: bool,
    /// The paravirtual clock.
    clock: u64,
    on_poweroff: LifecycleAction,
    /// The vCPUs that are there, where they may come and go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    present: Option<BTreeSet<u32>>,
}

/// A vCPU.
#[derive(Debug, Serialize, Deserialize)]
struct SavedVcpu {
    cpuid: Vec<CpuidEntry>,
    state: VcpuState,
}

/// A job, and who waits for it.
#[derive(Debug)]
pub(super) struct RunningJob {
    job: Job,
    by: u64,
    id: u64,
    /// The guest runs on when it has ended, if it fails.
    resume_if_failed: bool,
    /// And if it is done.
    resume_if_done: bool,
}

/// What was saved of the vCPUs, needed before there are any.
#[derive(Debug)]
pub(super) struct SavedVcpus {
    facts: Facts,
    vcpus: BTreeMap<u32, SavedVcpu>,
}

impl SavedVcpus {
    /// Takes them out of an image. Which of them are there, and whether they may come and go, is as it
    /// was there.
    ///
    /// # Errors
    /// There can be more or fewer than `config` says; one is not readable.
    pub(super) fn take(
        saved: &mut Saved,
        config: &mut MachineConfig,
    ) -> Result<Self, MachineError> {
        let facts: Facts = saved.state("machine", VERSION)?;
        let there = fit_vcpus(config, facts.vcpus, facts.present.as_ref())?;
        let mut all = Self {
            facts,
            vcpus: BTreeMap::new(),
        };
        for id in there {
            let vcpu = saved.state(&format!("vcpu{id}"), VERSION)?;
            all.vcpus.insert(id, vcpu);
        }
        Ok(all)
    }

    /// What a vCPU's guest was shown.
    pub(super) fn cpuid(&self, id: u32) -> Option<&[CpuidEntry]> {
        self.vcpus.get(&id).map(|vcpu| vcpu.cpuid.as_slice())
    }
}

/// Has `config` say what a machine that goes on has: `vcpus` of which those in `present` are there, or all
/// for good. Those.
fn fit_vcpus(
    config: &mut MachineConfig,
    vcpus: u32,
    present: Option<&BTreeSet<u32>>,
) -> Result<BTreeSet<u32>, MachineError> {
    let other = |reason: String| Err(RestoreError::Other(reason).into());
    let own = config.vcpus;
    let Some(present) = present else {
        // Builds before vCPUs could come and go saved a machine that has only those it began with.
        let hotplug = config.vcpu_hotplug.take();
        let absent = hotplug.map_or(0, |hotplug| hotplug.absent.len());
        if to_usize(vcpus.into()) == to_usize(own.into()) - absent {
            config.vcpus = vcpus;
        }
        if config.vcpus != vcpus {
            return other(format!("it has {vcpus} vCPUs, this one {own}"));
        }
        return Ok((0..vcpus).collect());
    };
    if vcpus != own {
        return other(format!("it can have {vcpus} vCPUs, this one {own}"));
    }
    if !present.contains(&0) || present.last().is_some_and(|last| *last >= vcpus) {
        return other(format!("its vCPUs can't be {present:?} of {vcpus}"));
    }
    let absent = (0..vcpus).filter(|id| !present.contains(id)).collect();
    config.vcpu_hotplug = Some(VcpuHotplug { absent });
    Ok(present.clone())
}

/// A function that earlier builds did not make of the same definition, as they left empty drives and SCSI controllers
/// out. A guest that they saved has never seen it: it finds it as after a reset, when it looks next.
fn is_late(devices: &[DeviceConfig], place: PciAddress) -> bool {
    let controllers = devices
        .iter()
        .filter(|device| matches!(device.kind, DeviceKind::Ahci(_) | DeviceKind::Scsi(_)))
        .map(|device| device.address);
    // With the first function of its slot, which is there for its sake.
    let stated = devices.iter().any(|device| device.address == place);
    let mut slots = controllers.clone();
    controllers.clone().any(|own| own == place)
        || !stated
            && place.function == 0
            && slots.any(|own| (own.bus, own.device) == (place.bus, place.device))
}

fn section(id: impl Into<String>, state: &impl Serialize) -> Result<Section, String> {
    let id = id.into();
    let kind = id.trim_end_matches(|c: char| c.is_ascii_digit());
    Section::new(&*id, kind, VERSION, state).map_err(|error| format!("{id}: {error}"))
}

fn function_id(place: crate::pci::Place) -> String {
    format!("pci-{place}")
}

impl Machine {
    /// Brings the machine to rest, jobs of its vCPUs done and their messages heard.
    pub(super) fn rest(&mut self) -> Result<(), String> {
        self.come_to_rest(true)
    }

    /// As [`Machine::rest`]; for a moment only, nobody is told.
    pub(super) fn come_to_rest(&mut self, tell: bool) -> Result<(), String> {
        /// A guest can ask for something each time; not for ever.
        const ROUNDS: usize = 8;
        for _ in 0..ROUNDS {
            if tell {
                self.pause()?;
            } else {
                self.hold().map_err(|error| error.to_string())?;
            }
            self.threads.settle().map_err(|error| error.to_string())?;
            // Those that the guest let go of in its last moment are not part of it.
            self.let_vcpus_go();
            // What PCI functions have in hand: of a machine that never ran, too.
            self.hold().map_err(|error| error.to_string())?;
            if self.gate.is_quiet() {
                for channel in self.channels.values_mut() {
                    channel.hand_on(&self.epoll);
                }
                return match self.ending {
                    None => Ok(()),
                    Some(_) => Err("the machine has ended".to_owned()),
                };
            }
            self.handle_messages();
            if let MachineState::Crashed | MachineState::Halted = self.state {
                return Err("the guest has ended".to_owned());
            }
        }
        Err("the guest resets itself again and again".to_owned())
    }

    /// The vCPUs' states, while they stand still.
    fn vcpu_states(&self) -> Result<Vec<(u32, VcpuState)>, String> {
        self.present()
            .map(|id| {
                let state = self.threads.call(to_usize(id.into()), |vcpu| vcpu.state());
                let state = state.map_err(|error| error.to_string())?;
                let state = state.map_err(|error| format!("vCPU {id}: {error}"))?;
                Ok((id, state))
            })
            .collect()
    }

    /// The saved guest will not know that this process ended: nothing may be lost with it.
    fn flush_disks(&self) -> Result<(), String> {
        for (id, disk) in &self.devices.pci.disks {
            disk.flush().map_err(|error| format!("{id}: {error}"))?;
        }
        Ok(())
    }

    /// Everything but guest memory, while the machine stands still.
    pub(super) fn sections(&self) -> Result<Vec<Section>, String> {
        let devices = &self.devices;
        let clock = self.vm.clock().map_err(|error| error.to_string())?;
        let facts = Facts {
            vcpus: self.config.vcpus,
            acpi: self.config.acpi,
            firmware: devices.pc.is_some(),
            clock,
            on_poweroff: self.config.on_poweroff,
            present: devices.cpus.as_ref().map(|_| self.present().collect()),
        };
        let mut all = vec![section("machine", &facts)?];
        let states = self.vcpu_states()?;
        for (id, state) in states {
            let cpuid = self.cpuid.get(to_usize(id.into()));
            let vcpu = SavedVcpu {
                cpuid: cpuid.cloned().unwrap_or_default(),
                state,
            };
            all.push(section(format!("vcpu{id}"), &vcpu)?);
        }
        for (place, function) in devices.pci.root.placed() {
            let id = function_id(place);
            let payload = function.save().map_err(|error| format!("{id}: {error}"))?;
            let section = Section::new(&*id, payload.kind, payload.version, &payload.state);
            all.push(section.map_err(|error| format!("{id}: {error}"))?);
        }
        all.push(section("pci", &devices.pci.root.state())?);
        for (index, uart) in devices.uarts.iter().enumerate() {
            all.push(section(format!("uart{index}"), &uart.state())?);
        }
        all.push(section("i8042", &self.keyboard_without_hands())?);
        all.push(section("pm", &devices.pm.state())?);
        if let Some(cpus) = &devices.cpus {
            all.push(section("cpus", &cpus.state())?);
        }
        all.push(section("rtc", &devices.rtc.state())?);
        all.push(section("ioapic", &devices.ioapic.state())?);
        if let Some(pc) = &devices.pc {
            all.push(section("pic", &pc.pic.state())?);
            all.push(section("pit", &pc.pit.save())?);
            all.push(section("fw_cfg", &pc.fw_cfg.state())?);
        }
        Ok(all)
    }

    /// Goes on from a saved machine instead of booting. The vCPUs come first, interrupt controllers
    /// last: what devices say while they take over their states reaches nobody then, and whatever
    /// was due had been said before.
    pub(super) fn take_over(
        &mut self,
        mut saved: Saved,
        vcpus: SavedVcpus,
    ) -> Result<(), MachineError> {
        let facts = vcpus.facts;
        let own = (self.config.acpi, self.devices.pc.is_some());
        if own != (facts.acpi, facts.firmware) {
            let reason = format!(
                "ACPI, firmware: it has {}, {}, this one {}, {}",
                facts.acpi, facts.firmware, own.0, own.1
            );
            return Err(RestoreError::Other(reason).into());
        }
        for (id, vcpu) in vcpus.vcpus {
            let index = to_usize(id.into());
            let state = vcpu.state;
            let set = self.threads.call(index, move |vcpu| vcpu.set_state(&state));
            let set = set.map_err(|source| MachineError::Os {
                call: "restoring a vCPU",
                source,
            })?;
            set.map_err(|error| RestoreError::State {
                part: format!("vcpu{id}"),
                reason: error.to_string(),
            })?;
        }
        let devices = &self.devices;
        for (place, function) in devices.pci.root.placed() {
            let id = function_id(place);
            if !saved.has(&id) && is_late(&self.config.devices, place) {
                continue;
            }
            let section = saved.take(&id)?;
            let bad = |reason| RestoreError::State {
                part: id.clone(),
                reason,
            };
            let state = section.state().map_err(|error| bad(error.to_string()))?;
            let payload = Payload {
                kind: section.kind,
                version: section.version,
                state,
            };
            let loaded = function.load(&payload);
            loaded.map_err(|error| bad(error.to_string()))?;
        }
        devices.pci.root.load(saved.state("pci", VERSION)?);
        for (index, uart) in devices.uarts.iter().enumerate() {
            uart.load(saved.state(&format!("uart{index}"), VERSION)?);
        }
        devices.i8042.load(saved.state("i8042", VERSION)?);
        devices.pm.load(saved.state("pm", VERSION)?);
        if let Some(cpus) = &devices.cpus {
            let state: CpusState = saved.state("cpus", VERSION)?;
            let reason = match cpus.load(state) {
                Ok(()) if cpus.present() == self.threads.present() => None,
                Ok(()) => Some("it is of other vCPUs".to_owned()),
                Err(reason) => Some(reason),
            };
            if let Some(reason) = reason {
                let part = "cpus".to_owned();
                return Err(RestoreError::State { part, reason }.into());
            }
        }
        devices.rtc.load(saved.state("rtc", VERSION)?);
        if let Some(pc) = &devices.pc {
            pc.fw_cfg.load(saved.state("fw_cfg", VERSION)?);
            pc.pic.load(saved.state("pic", VERSION)?);
        }
        devices.ioapic.load(saved.state("ioapic", VERSION)?);
        self.vm.set_clock(facts.clock)?;
        if let Some(pc) = &devices.pc {
            // Its next edge may be due at once.
            pc.pit.load(saved.state("pit", VERSION)?);
        }
        saved.finish()?;
        self.config.on_poweroff = facts.on_poweroff;
        self.was_stopped = true;
        self.devices_paused = true;
        if self.config.restore.as_ref().is_some_and(|from| !from.copy) {
            let gate = self.gate.clone();
            saved
                .verify(move |what| gate.broken(what))
                .map_err(|source| MachineError::Os {
                    call: "a thread that checks the saved image",
                    source,
                })?;
        }
        Ok(())
    }

    /// Begins a save or a dump; it is answered when it is done.
    pub(super) fn begin_job(&mut self, asked: Asked) -> Result<(), String> {
        if self.job.is_some() {
            return Err("another job is running".to_owned());
        }
        if self.has_block_jobs() && !matches!(asked.request.call, Call::Dump { .. }) {
            return Err("domain has active block job".to_owned());
        }
        let was_running = self.state == MachineState::Running;
        let one = |descriptors: Vec<OwnedFd>| {
            <[OwnedFd; 1]>::try_from(descriptors)
                .map(|[file]| File::from(file))
                .map_err(|all| format!("one descriptor is needed, not {}", all.len()))
        };
        let (job, done) = match asked.request.call {
            Call::Migrate(options) => (Ok(self.leave(options, asked.descriptors)?), false),
            Call::SaveLive { xml, id, disks } => {
                let job = self.save_live((id, xml), &disks, asked.descriptors)?;
                (Ok(job), false)
            }
            Call::Save { xml, id, running } => {
                if let MachineState::Crashed | MachineState::Halted = self.state {
                    return Err("the guest has ended".to_owned());
                }
                let file = one(asked.descriptors)?;
                let sections = self
                    .rest()
                    .and_then(|()| self.flush_disks())
                    .and_then(|()| self.sections());
                let parts = Parts {
                    id,
                    xml,
                    running: running.unwrap_or(was_running),
                    sections: self.or_resume(was_running, sections)?,
                };
                let memory = self.memory.clone();
                let work =
                    move |progress: &Arc<Progress>| image::write(&file, &parts, &memory, progress);
                (Job::start(Progress::new(self.memory.size()), work), false)
            }
            Call::Dump {
                live,
                hold,
                devices,
            } => {
                let file = one(asked.descriptors)?;
                let states = self.dump_states(devices, !live);
                if live && was_running && self.state == MachineState::Running {
                    self.resume();
                }
                let (vcpus, devices) = self.or_resume(was_running, states)?;
                let memory = self.memory.clone();
                let work = move |progress: &Arc<Progress>| {
                    core::write(&file, &vcpus, devices.as_deref(), &memory, progress, live)
                        .map_err(|error| error.to_string())
                };
                let progress = Progress::new(self.memory.size());
                (Job::start(progress, work), was_running && !live && !hold)
            }
            _ => return Err("that is no job".to_owned()),
        };
        let job = self.or_resume(was_running, job.map_err(|error| error.to_string()))?;
        let watch = EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_JOB);
        if let Err(error) = self.epoll.add(job.fd(), watch) {
            job.progress.abort();
            // It notices between two chunks.
            let result = job.finish().map(drop);
            if self.is_leaving() {
                self.left(&result);
            }
            self.live_save_ended();
            return self.or_resume(was_running, Err(format!("epoll: {error}")));
        }
        self.job = Some(RunningJob {
            job,
            by: asked.by,
            id: asked.request.id,
            // One that runs on meanwhile is not for the job to pause or resume.
            resume_if_failed: was_running && self.live_save.is_none(),
            resume_if_done: done,
        });
        Ok(())
    }

    /// A machine that ended may be dumped too: it stands still as it is.
    fn dump_states(
        &mut self,
        devices: bool,
        tell: bool,
    ) -> Result<(Vec<VcpuState>, Option<Vec<u8>>), String> {
        if !matches!(self.state, MachineState::Crashed | MachineState::Halted) {
            self.come_to_rest(tell)?;
        }
        let states = self.vcpu_states()?;
        let states = states.into_iter().map(|(_, state)| state).collect();
        if !devices {
            return Ok((states, None));
        }
        let mut note = Vec::new();
        for section in self.sections()? {
            write_section(&mut note, &section).map_err(|error| error.to_string())?;
        }
        write_end(&mut note).map_err(|error| error.to_string())?;
        Ok((states, Some(note)))
    }

    /// A job that could not begin leaves the guest as it was.
    fn or_resume<T>(&mut self, was_running: bool, result: Result<T, String>) -> Result<T, String> {
        if result.is_err() {
            self.go_on(was_running);
        }
        result
    }

    fn go_on(&mut self, run: bool) {
        if run && self.state == MachineState::Paused && self.ending.is_none() {
            self.resume();
            self.event(Event::Resumed);
        }
    }

    /// Puts new images on top of disks.
    pub(super) fn switch_disks(
        &mut self,
        disks: &[(String, String)],
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if descriptors.len() != disks.len() {
            return Err("each disk needs one descriptor".to_owned());
        }
        if self.job.is_some() {
            return Err("a job is running".to_owned());
        }
        for (id, _) in disks {
            self.without_block_job(id)?;
        }
        self.for_a_moment(|machine| machine.put_tops(disks, descriptors))
    }

    /// Does something while nothing moves. A moment that nobody need be told of.
    pub(super) fn for_a_moment<T>(
        &mut self,
        what: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        let held = self.hold().map_err(|error| error.to_string());
        let result = held.and_then(|()| what(self));
        if !self.gate.is_quiet() {
            // The guest wanted something at that very moment; that decides how it goes on.
            self.handle_messages();
        } else if self.state == MachineState::Running {
            self.resume();
        }
        result
    }

    fn put_tops(
        &self,
        disks: &[(String, String)],
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let mut tops = Vec::new();
        for ((id, name), fd) in disks.iter().zip(descriptors) {
            let disk = self.devices.pci.disk(id)?;
            disk.flush()?;
            tops.push((disk, disk.open_top(fd, name)?));
        }
        // Nothing has changed so far, and nothing goes wrong from here on but a 256th time.
        for (disk, top) in tops {
            disk.put_top(top)?;
        }
        Ok(())
    }

    /// The job has come to its end.
    pub(super) fn job_done(&mut self) {
        let Some(RunningJob {
            job,
            by,
            id,
            resume_if_failed,
            resume_if_done,
        }) = self.job.take()
        else {
            return;
        };
        let asker_there = self.control.as_ref().is_some_and(|control| control.has(by));
        let mut so_far = job.progress.status();
        let mut result = job.finish();
        self.add_migration(result.as_mut().unwrap_or(&mut so_far));
        let leaving = self.leaving.as_ref();
        let undecided = leaving.map(|leaving| leaving.tuning.right() != Right::Own);
        let may_run =
            !self.is_leaving() || self.left(&result.as_ref().map(|_| ()).map_err(Clone::clone));
        let run = may_run
            && if result.is_ok() && asker_there {
                resume_if_done
            } else {
                resume_if_failed
            };
        if let Err(error) = &result {
            log::warn!("{}: a job failed: {error}", self.config.name);
        }
        self.live_save_ended();
        self.go_on(run);
        let result = result
            .map(|status| Answer::Job(Some(status)))
            .map_err(|message| Failure {
                message,
                job: Some(so_far),
                undecided,
                locked: false,
            });
        self.send(by, &FromVmm::Reply(Reply { id, result }));
    }

    /// A job whose asker is gone is given up.
    pub(super) fn check_asker(&mut self) {
        if let (Some(job), Some(control)) = (&self.job, &self.control)
            && !control.has(job.by)
        {
            job.job.progress.abort();
        }
    }

    /// The guest does not run on after the job: its owner has paused it meanwhile.
    pub(super) fn stay_paused(&mut self) {
        if let Some(job) = &mut self.job {
            job.resume_if_done = false;
            job.resume_if_failed = false;
        }
    }

    /// How far the job is.
    pub(super) fn job_status(&self) -> Answer {
        let status = self.job.as_ref().map(|job| {
            let mut status = job.job.progress.status();
            self.add_migration(&mut status);
            status
        });
        Answer::Job(status)
    }

    fn add_migration(&self, status: &mut JobStatus) {
        status.migration = self.leaving.as_ref().map(|leaving| leaving.tuning.status());
    }

    /// Gives the job up.
    pub(super) fn abort_job(&self) -> Result<(), String> {
        let job = self.job.as_ref().ok_or("no job is running")?;
        job.job.progress.abort();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_api::devices::{AhciConfig, BalloonConfig, ScsiConfig};

    #[test]
    fn controllers_of_drives_that_were_left_out_are_late() {
        let at = |device, function| PciAddress {
            bus: 0,
            device,
            function,
        };
        let device = |address, kind| DeviceConfig {
            id: String::new(),
            address,
            kind,
        };
        let balloon = || DeviceKind::Balloon(BalloonConfig::default());
        let ahci = || DeviceKind::Ahci(AhciConfig { ports: 6 });
        let devices = [
            device(at(3, 0), balloon()),
            device(at(0x1f, 2), ahci()),
            device(at(4, 0), balloon()),
            device(at(4, 1), ahci()),
            device(at(5, 0), DeviceKind::Scsi(ScsiConfig::default())),
        ];
        let late = |place| is_late(&devices, place);
        assert!(late(at(0x1f, 2)) && late(at(0x1f, 0)) && late(at(4, 1)) && late(at(5, 0)));
        assert!(!late(at(3, 0)) && !late(at(4, 0)) && !late(at(0, 0)) && !late(at(0x1f, 1)));
    }
}
