//! The GSI routing table: the kernel takes it only as a whole.

use std::collections::BTreeMap;

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;

use super::os;
use crate::{Error, IOAPIC_PINS, Msi, Result};

/// Trigger mode bit of an MSI's data: level (Intel SDM vol. 3, 11.11.2).
const LEVEL: u32 = 1 << 15;
/// `KVM_MAX_IRQ_ROUTES`: GSIs are below this.
const MAX_GSI: u32 = 4096;

#[derive(Debug, Default)]
pub(super) struct Routes {
    table: BTreeMap<u32, Msi>,
}

impl Routes {
    /// Replaces the routes of the I/O APIC's pins. The kernel sends nothing through them: it
    /// reads from them which vectors' EOIs must be reported.
    pub(super) fn set_pins(&mut self, vm: &VmFd, pins: &[Option<(Msi, bool)>]) -> Result<()> {
        if pins.len() > IOAPIC_PINS {
            return Err(Error::Invalid(format!(
                "{} pins, an I/O APIC has {IOAPIC_PINS}",
                pins.len()
            )));
        }
        let mut next = self.table.split_off(&(IOAPIC_PINS as u32));
        let old = std::mem::take(&mut self.table);
        for (gsi, pin) in (0..).zip(pins) {
            if let Some((mut msi, level)) = *pin {
                if level {
                    msi.data |= LEVEL;
                } else {
                    msi.data &= !LEVEL;
                }
                next.insert(gsi, msi);
            }
        }
        let unchanged = next.range(..IOAPIC_PINS as u32).eq(old.iter());
        self.table = next;
        if unchanged { Ok(()) } else { self.commit(vm) }
    }

    /// Sets the route of `gsi`; whether it is new.
    pub(super) fn add(&mut self, vm: &VmFd, gsi: u32, msi: Msi) -> Result<bool> {
        if !(IOAPIC_PINS as u32..MAX_GSI).contains(&gsi) {
            return Err(Error::Invalid(format!(
                "GSI {gsi} is not in {IOAPIC_PINS}..{MAX_GSI}"
            )));
        }
        let old = self.table.insert(gsi, msi);
        if old != Some(msi) {
            self.commit(vm)?;
        }
        Ok(old.is_none())
    }

    /// Takes the route of `gsi` away.
    pub(super) fn remove(&mut self, vm: &VmFd, gsi: u32) -> Result<()> {
        self.table.remove(&gsi);
        self.commit(vm)
    }

    fn commit(&self, vm: &VmFd) -> Result<()> {
        let entries: Vec<_> = self
            .table
            .iter()
            .map(|(&gsi, msi)| {
                let mut entry = kvm_irq_routing_entry {
                    gsi,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                entry.u.msi.address_lo = msi.address as u32;
                entry.u.msi.address_hi = (msi.address >> 32) as u32;
                entry.u.msi.data = msi.data;
                entry
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Invalid("too many interrupt routes".to_owned()))?;
        os("KVM_SET_GSI_ROUTING", vm.set_gsi_routing(&table))
    }
}
