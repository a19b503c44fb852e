//! Starting, stopping, resetting, ending: what happens to the machine as a whole.

use vmm_api::config::LifecycleAction;
use vmm_api::control::{Event, ExitCause, ExitRecord, FromVmm, MachineState};

use vmm_api::devices::WatchdogAction;

use super::{Ending, Machine, MachineError, build, cpu};
use crate::acpi::{self, mptable};
use crate::devices::Request;
use crate::loader;
use crate::notices::Notice;
use crate::num::{low8, to_usize};
use crate::vcpu::{Job, Message, NotStopping};

impl Machine {
    /// Puts tables and kernel into (zeroed) guest memory, and the vCPUs to their first
    /// instruction; a kernel that is to be unpacked first is left to the vCPU's own thread.
    pub(super) fn load(&mut self) -> Result<(), MachineError> {
        if let Some(rom) = &self.rom {
            rom.shadow(&self.memory)?;
        } else if self.config.acpi {
            acpi::write(&self.memory, &self.description)?;
        } else {
            let apic_ids = self.present().map(|id| self.apic_id(id));
            let on_root = self.config.devices.iter().map(|device| device.address);
            let on_root = on_root.filter(|address| address.bus == 0);
            let slots = on_root.map(|address| address.device).collect();
            mptable::write(&self.memory, apic_ids, &slots)?;
        }
        let mut first = Some(self.first_job()?);
        self.threads.forget_jobs();
        let power_on = &self.power_on;
        self.threads.each(|index| {
            let waiting = || power_on.get(&index).map(cpu::waiting).unwrap_or_default();
            let job = first.take();
            job.unwrap_or_else(|| Job::Load(Box::new(waiting())))
        });
        Ok(())
    }

    /// What brings the first vCPU to its first instruction: of the kernel, or of the firmware.
    fn first_job(&self) -> Result<Job, MachineError> {
        let first = self.power_on.get(&0).cloned().unwrap_or_default();
        let Some(boot) = self.boot.clone() else {
            return Ok(Job::Load(Box::new(first)));
        };
        let takes_long = loader::takes_long(&self.memory, &boot)?;
        let memory = self.memory.clone();
        let load = move || {
            let entry = loader::load(&memory, &boot)?;
            Ok(cpu::at_entry(&first, &entry))
        };
        Ok(if takes_long {
            Job::Boot(Box::new(load))
        } else {
            Job::Load(Box::new(load()?))
        })
    }

    pub(super) fn event(&mut self, event: Event) {
        log::debug!("{event:?}");
        if let Some(control) = &mut self.control {
            control.broadcast(&self.epoll, &FromVmm::Event(event));
        }
    }

    /// Lets the vCPUs run.
    pub(super) fn resume(&mut self) {
        self.state = MachineState::Running;
        self.undecided = false;
        if std::mem::take(&mut self.devices_paused) {
            self.devices.pci.root.functions().for_each(|f| f.resume());
        }
        if std::mem::take(&mut self.was_stopped) {
            self.threads.each(|_| Job::WasStopped);
        }
        self.threads.run();
        crate::migrate::moment("vCPUs run");
    }

    /// Stops the vCPUs, then the devices. From now on nothing touches guest memory.
    pub(super) fn hold(&mut self) -> Result<(), NotStopping> {
        self.threads.hold()?;
        if !std::mem::replace(&mut self.devices_paused, true) {
            self.devices.pci.root.functions().for_each(|f| f.pause());
        }
        Ok(())
    }

    /// What devices told.
    pub(super) fn handle_notices(&mut self) {
        for notice in self.notices.take() {
            match notice {
                Notice::Tell(event) => {
                    if let Event::PortState { id, open } = &event {
                        if *open {
                            self.open_ports.insert(id.clone());
                        } else {
                            self.open_ports.remove(id);
                        }
                    }
                    self.event(event);
                }
                Notice::StandStill if self.live_save.is_some() => self.live_moment(),
                Notice::StandStill => self.stand_still(),
                Notice::MemoryWritten => self.live_switch(),
                Notice::SlotOff(index) => self.slot_off(index),
                Notice::UnitGone(id) => self.unit_gone(&id),
                Notice::VcpuGone => self.let_vcpus_go(),
                Notice::BlockJob => {}
                Notice::Pause(event) => {
                    self.event(event);
                    if let Err(message) = self.pause() {
                        log::error!("{}: {message}", self.config.name);
                    }
                }
            }
        }
        // Whatever came of the notice itself: there is room for so many only.
        self.look_at_block_jobs();
    }

    /// The alarm of watchdog `index`.
    pub(super) fn watchdog_rang(&mut self, index: u64) {
        let Some(watchdog) = self.devices.pci.watchdogs.get(to_usize(index)) else {
            return;
        };
        if !watchdog.device.expired() {
            return;
        }
        let action = watchdog.action;
        log::warn!("{}: the watchdog was not fed", self.config.name);
        self.event(Event::Watchdog(action));
        match action {
            WatchdogAction::Reset => self.guest_reset(),
            WatchdogAction::Shutdown => {
                self.devices.pm.press_power_button();
            }
            WatchdogAction::Poweroff => self.powered_off(),
            WatchdogAction::Pause | WatchdogAction::Dump => {
                if let Err(message) = self.pause() {
                    log::error!("{}: {message}", self.config.name);
                }
            }
            WatchdogAction::None => {}
            WatchdogAction::InjectNmi => self.threads.each(|_| Job::Nmi),
        }
    }

    /// Back to power-on: everything as if just started.
    pub(super) fn reset(&mut self) -> Result<(), MachineError> {
        self.threads.hold()?;
        // Devices are reset while they run: what they had in hand is history too.
        if std::mem::take(&mut self.devices_paused) {
            self.devices.pci.root.functions().for_each(|f| f.resume());
        }
        // A guest that begins anew has let go of everything.
        for (index, _) in std::mem::take(&mut self.unplugging) {
            self.slot_off(index);
        }
        // What the vCPUs asked for before is history.
        self.gate.take_messages();
        self.held.clear();
        let devices = &self.devices;
        devices.pci.root.reset();
        devices.i8042.reset();
        devices.pm.reset();
        devices.rtc.reset();
        for uart in &devices.uarts {
            uart.reset();
        }
        devices.ioapic.reset();
        if let Some(cpus) = &devices.cpus {
            cpus.reset();
        }
        self.let_vcpus_go();
        self.describe_vcpus();
        self.memory.clear()?;
        self.load()?;
        // The backend forgets what it knows of the old content.
        build::map(&*self.vm, &self.memory, self.logs_writes())?;
        if self.logs_writes() {
            // The log began anew: all of it may have changed.
            for range in [self.memory.low(), self.memory.high()] {
                self.vm.memory_written(range.start, range.end - range.start);
            }
        }
        Ok(())
    }

    /// Something the machine can't go on after.
    pub(super) fn fail(&mut self, error: &MachineError) {
        self.end(ExitCause::Failed, error.to_string(), 1);
    }

    pub(super) fn end(&mut self, cause: ExitCause, message: String, status: i32) {
        self.ending.get_or_insert(Ending {
            record: ExitRecord { cause, message },
            status,
        });
    }

    fn reset_and_run(&mut self) {
        match self.reset() {
            Ok(()) => self.resume(),
            Err(error) => self.fail(&error),
        }
    }

    fn preserve(&mut self, state: MachineState) {
        match self.hold() {
            Ok(()) => {
                self.gate.take_messages();
                self.state = state;
            }
            Err(error) => self.fail(&error.into()),
        }
    }

    /// Deals with what the vCPUs reported.
    pub(super) fn handle_messages(&mut self) {
        // The first decides; whatever else was on its way belongs to the machine before.
        let Some(message) = self.gate.take_messages().pop_front() else {
            return;
        };
        if self.ending.is_some() {
            return;
        }
        match message {
            Message::Request(Request::PowerOff) => self.powered_off(),
            Message::Request(Request::Reset) => self.guest_reset(),
            Message::Request(Request::Panic) => {
                self.crashed("the guest's kernel panicked".into(), true)
            }
            Message::Request(Request::DebugExit(value)) => {
                let status = value.wrapping_shl(1) | 1;
                let message = format!("debug exit with {value:#x}");
                self.end(ExitCause::Shutdown, message, i32::from(low8(status)));
            }
            Message::TripleFault => {
                // As on hardware, where the chipset resets the processor: some systems reboot
                // this way.
                log::info!("{}: triple fault", self.config.name);
                self.guest_reset();
            }
            Message::Broken(reason) => self.crashed(reason, false),
        }
    }

    fn powered_off(&mut self) {
        self.event(Event::Shutdown);
        match self.config.on_poweroff {
            LifecycleAction::Destroy => {
                self.end(ExitCause::Shutdown, "the guest powered off".into(), 0)
            }
            LifecycleAction::Restart => self.reset_and_run(),
            LifecycleAction::Preserve => self.preserve(MachineState::Halted),
        }
    }

    fn guest_reset(&mut self) {
        self.event(Event::Reset);
        match self.config.on_reboot {
            LifecycleAction::Destroy => {
                self.end(ExitCause::Shutdown, "the guest reset itself".into(), 0)
            }
            LifecycleAction::Restart => self.reset_and_run(),
            LifecycleAction::Preserve => self.preserve(MachineState::Halted),
        }
    }

    fn crashed(&mut self, reason: String, guest_fault: bool) {
        log::warn!("{}: {reason}", self.config.name);
        self.event(Event::Crashed {
            reason: reason.clone(),
            guest_fault,
        });
        match (self.config.on_crash, guest_fault) {
            (LifecycleAction::Preserve, _) => self.preserve(MachineState::Crashed),
            (LifecycleAction::Restart, true) => self.reset_and_run(),
            // What the backend could not do once it can't do again: no restart.
            (_, false) => self.end(ExitCause::Failed, reason, 1),
            (LifecycleAction::Destroy, true) => self.end(ExitCause::Crashed, reason, 1),
        }
    }
}
