//! vCPUs that come and go while the guest runs.
//!
//! A vCPU that is not there does not exist in the backend either: it has no thread, no local APIC that a
//! broadcast could reach, and costs nothing. It is made when it comes. KVM can't make one a second time,
//! so one that goes is kept there, reset and without a thread, for when it comes back.

use hypervisor::{Backend, Vcpu};

use super::{Machine, Pc, cpu};
use crate::firmware;
use crate::num::{low32, to_usize};

/// Goes on through a reset: set again, vCPU by vCPU, the counters would differ
/// (IA32_TIME_STAMP_COUNTER).
const MSR_TSC: u32 = 0x10;

impl Machine {
    /// Numbers of the vCPUs that are there.
    pub(super) fn present(&self) -> impl Iterator<Item = u32> + use<> {
        let present = self.threads.present().into_iter();
        present.map(|index| low32(index as u64))
    }

    /// A vCPU's APIC id.
    pub(super) fn apic_id(&self, vcpu: u32) -> u32 {
        let known = self.description.apic_ids.get(to_usize(vcpu.into()));
        known.copied().unwrap_or(vcpu)
    }

    /// vCPUs come, and wait for the guest to start them.
    pub(super) fn plug_vcpus(&mut self, vcpus: &[u32]) -> Result<(), String> {
        self.may_change_vcpus()?;
        // What the guest has let go of just now may come again.
        self.let_vcpus_go();
        for id in vcpus {
            let index = to_usize((*id).into());
            if index >= self.cpuid.len() {
                let most = self.cpuid.len();
                return Err(format!("vCPU {id}: this machine can have {most}"));
            }
            if self.threads.present().contains(&index) {
                return Err(format!("vCPU {id} is there already"));
            }
            let failed = |error: &dyn std::fmt::Display| format!("vCPU {id}: {error}");
            let vcpu = self.vcpu(index).map_err(|error| failed(&error))?;
            self.threads
                .add(index, vcpu)
                .map_err(|error| failed(&error))?;
            if let Some(cpus) = &self.devices.cpus {
                cpus.plug(index);
            }
        }
        Ok(())
    }

    /// A vCPU that waits for its start-up message.
    fn vcpu(&mut self, index: usize) -> hypervisor::Result<Box<dyn Vcpu>> {
        let mut vcpu = match self.gone.remove(&index) {
            Some(vcpu) => vcpu,
            None => {
                let apic_id = self.apic_id(low32(index as u64));
                let mut vcpu = self.vm.create_vcpu(apic_id)?;
                vcpu.set_cpuid(self.cpuid.get(index).map_or(&[], Vec::as_slice))?;
                vcpu
            }
        };
        // Read in any case: KVM then takes note of what was sent to one that was kept.
        let state = vcpu.state()?;
        let power_on = self.power_on.entry(index);
        let power_on = power_on.or_insert_with(|| as_made(state));
        vcpu.set_state(&cpu::waiting(power_on))?;
        Ok(vcpu)
    }

    /// Asks the guest to let go of a vCPU.
    pub(super) fn ask_vcpu_back(&self, vcpu: u32) -> Result<(), String> {
        self.may_change_vcpus()?;
        if vcpu == 0 {
            return Err("the first vCPU stays".to_owned());
        }
        let index = to_usize(vcpu.into());
        match &self.devices.cpus {
            Some(cpus) if cpus.present().contains(&index) => cpus.ask_back(index),
            _ => return Err(format!("there is no vCPU {vcpu}")),
        }
        Ok(())
    }

    fn may_change_vcpus(&self) -> Result<(), String> {
        if self.devices.cpus.is_none() {
            return Err("the vCPUs of this machine are there for good".to_owned());
        }
        if self.job.is_some() {
            return Err("a job is running".to_owned());
        }
        Ok(())
    }

    /// Takes away the vCPUs that the guest has let go of.
    pub(super) fn let_vcpus_go(&mut self) {
        let Some(cpus) = &self.devices.cpus else {
            return;
        };
        let stay = cpus.present();
        for index in self.threads.present() {
            if stay.contains(&index) {
                continue;
            }
            let vcpu = match self.threads.remove(index) {
                Ok(vcpu) => vcpu,
                Err(error) => return self.fail(&error.into()),
            };
            if let Some(mut vcpu) = vcpu.filter(|_| self.vm.backend() == Backend::Kvm) {
                let reset = self.power_on.get(&index).map(cpu::waiting);
                if let Some(Err(error)) = reset.map(|state| vcpu.set_state(&state)) {
                    log::warn!("vCPU {index}, which is not there any more: {error}");
                }
                self.gone.insert(index, vcpu);
            }
            let vcpu = low32(index as u64);
            self.event(vmm_api::control::Event::VcpuRemoved { vcpu });
        }
    }

    /// A guest that begins anew is told of the vCPUs that are there now.
    pub(super) fn describe_vcpus(&mut self) {
        let present: Vec<u32> = self.present().collect();
        if let Some(absent) = &mut self.description.absent {
            *absent = (0..self.config.vcpus)
                .filter(|id| !present.contains(id))
                .collect();
        }
        if let (Some(pc), Some(with)) = (&self.devices.pc, &self.config.boot.firmware) {
            Pc::describe(self.description.present(), &self.memory, &self.devices.rtc);
            let items = firmware::items(&self.config, with, &self.description, &self.memory);
            pc.reset(items);
        }
    }
}

/// A vCPU's state as the backend makes it, for each time that the machine is reset.
pub(super) fn as_made(mut state: hypervisor::VcpuState) -> hypervisor::VcpuState {
    state.msrs.retain(|(index, _)| *index != MSR_TSC);
    state
}
