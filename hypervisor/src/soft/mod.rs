//! The backend on the software CPU of the `softcpu` crate.

mod doorbells;
mod irqfds;
mod state;
mod vcpu;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use softcpu::Machine;
use softcpu::apic::{Message, deliver};

use crate::{
    Backend, CpuidEntry, Error, IOAPIC_PINS, IoAddress, MemorySlot, Msi, Result, Vcpu, Vm,
};
use doorbells::{Doorbell, Doorbells};
use irqfds::IrqFds;
use vcpu::SoftVcpu;

/// Threads this backend can usefully run; well under what x2APIC ids could name.
const MAX_VCPUS: u32 = 255;

/// A virtual machine on the software CPU.
#[derive(Debug)]
pub struct SoftVm {
    machine: Arc<Machine>,
    doorbells: Arc<Doorbells>,
    irqfds: Mutex<Option<IrqFds>>,
    /// Slots, and whether they log dirty pages.
    slots: Mutex<BTreeMap<u32, bool>>,
    /// Vectors of the I/O APIC's level-triggered pins.
    level_vectors: Mutex<[u64; 4]>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while holding one of these locks leaves no half-done state worth dying for.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(machine: &Machine, msi: Msi) {
    match Message::from_msi(msi.address, msi.data) {
        Some(message) => deliver(&machine.apics(), &message),
        None => log::debug!("an MSI to {:#x} reaches no local APIC", msi.address),
    }
}

impl SoftVm {
    /// Makes a VM; there is nothing a host could lack for it but the architecture.
    pub fn new() -> Self {
        softcpu::tsc::begin();
        Self {
            machine: Machine::new(),
            doorbells: Arc::default(),
            irqfds: Mutex::default(),
            slots: Mutex::default(),
            level_vectors: Mutex::default(),
        }
    }
}

impl Default for SoftVm {
    fn default() -> Self {
        Self::new()
    }
}

fn invalid(error: impl std::fmt::Display) -> Error {
    Error::Invalid(error.to_string())
}

impl Vm for SoftVm {
    fn backend(&self) -> Backend {
        Backend::Soft
    }

    fn max_vcpus(&self) -> u32 {
        MAX_VCPUS
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        Ok(crate::cpu::soft_leaves())
    }

    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()> {
        crate::check_slot(&slot)?;
        let mut slots = lock(&self.slots);
        // SAFETY: the caller's promise is what the machine asks for.
        unsafe {
            self.machine.map_memory(
                slot.id,
                slot.gpa,
                slot.len,
                slot.host,
                slot.readonly,
                slot.log_dirty,
            )
        }
        .map_err(invalid)?;
        slots.insert(slot.id, slot.log_dirty);
        Ok(())
    }

    unsafe fn log_writes(&self, slot: MemorySlot) -> Result<()> {
        let mut slots = lock(&self.slots);
        let logged = self.machine.log_writes(slot.id, slot.log_dirty);
        logged.map_err(invalid)?;
        slots.insert(slot.id, slot.log_dirty);
        Ok(())
    }

    fn unmap_memory(&self, id: u32) -> Result<()> {
        let mut slots = lock(&self.slots);
        self.machine.unmap_memory(id).map_err(invalid)?;
        slots.remove(&id);
        Ok(())
    }

    fn dirty_log(&self, id: u32) -> Result<Vec<u64>> {
        if lock(&self.slots).get(&id) == Some(&false) {
            return Err(crate::not_logged(id));
        }
        self.machine.dirty_log(id).map_err(invalid)
    }

    fn memory_written(&self, gpa: u64, len: u64) {
        self.machine.memory_written(gpa, len);
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        if id >= MAX_VCPUS {
            return Err(Error::Invalid(format!(
                "vCPU {id}: this backend has at most {MAX_VCPUS}"
            )));
        }
        // Under the lock, so that two threads cannot make the same one, and routes set
        // meanwhile reach it.
        let vectors = lock(&self.level_vectors);
        if self.machine.apics().iter().any(|apic| apic.id() == id) {
            return Err(Error::Invalid(format!("there is a vCPU {id} already")));
        }
        let vcpu = SoftVcpu::new(&self.machine, id, Arc::clone(&self.doorbells));
        for apic in self.machine.apics() {
            apic.set_ioapic_vectors(*vectors);
        }
        Ok(Box::new(vcpu))
    }

    fn get_ready(&self) {
        softcpu::get_ready();
    }

    fn recent_code(&self) -> Vec<(u32, Vec<u64>)> {
        self.machine.recent_code()
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        send(&self.machine, msi);
        Ok(())
    }

    fn set_ioapic_routes(&self, pins: &[Option<(Msi, bool)>]) -> Result<()> {
        if pins.len() > IOAPIC_PINS {
            return Err(Error::Invalid(format!(
                "{} pins, an I/O APIC has {IOAPIC_PINS}",
                pins.len()
            )));
        }
        let mut vectors = [0; 4];
        for (msi, level) in pins.iter().flatten() {
            let vector = msi.data & 0xff;
            if *level {
                vectors[(vector >> 6) as usize] |= 1 << (vector & 63);
            }
        }
        let mut current = lock(&self.level_vectors);
        if *current != vectors {
            *current = vectors;
            for apic in self.machine.apics() {
                apic.set_ioapic_vectors(vectors);
            }
        }
        Ok(())
    }

    fn set_pic_output(&self, level: bool) -> Result<()> {
        if let Some(apic) = self.machine.apics().iter().find(|apic| apic.id() == 0) {
            apic.set_lint0(level);
        }
        Ok(())
    }

    fn register_irqfd(&self, fd: BorrowedFd<'_>, gsi: u32, msi: Msi) -> Result<()> {
        let mut slot = lock(&self.irqfds);
        let irqfds = match &mut *slot {
            Some(irqfds) => irqfds,
            none => none.insert(IrqFds::start(&self.machine)?),
        };
        irqfds.add(fd, gsi, msi)
    }

    fn unregister_irqfd(&self, _fd: BorrowedFd<'_>, gsi: u32) -> Result<()> {
        match &*lock(&self.irqfds) {
            Some(irqfds) => irqfds.remove(gsi),
            None => Err(irqfds::unknown(gsi)),
        }
    }

    fn register_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        addr: IoAddress,
        len: u8,
        datamatch: Option<u64>,
    ) -> Result<()> {
        self.doorbells.add(fd, addr, Doorbell { len, datamatch })
    }

    fn unregister_ioeventfd(
        &self,
        _fd: BorrowedFd<'_>,
        addr: IoAddress,
        len: u8,
        datamatch: Option<u64>,
    ) -> Result<()> {
        self.doorbells.remove(addr, Doorbell { len, datamatch })
    }

    fn clock(&self) -> Result<u64> {
        Ok(self.machine.clock())
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<()> {
        self.machine.set_clock(nanoseconds);
        Ok(())
    }
}
