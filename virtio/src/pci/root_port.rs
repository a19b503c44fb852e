//! A PCI Express root port with one slot (PCI Express Base Specification 5.0, 6.7 and 7.5.3).

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::capability::express::{LINK_ACTIVE, LINK_STATUS, SLOT_CONTROL, SLOT_STATUS};
use super::core::{Core, Saved};
use super::{BarKind, Config, Express, Function, Host, Ids, Msix};
use crate::device::{DeviceError, Payload};

const KIND: &str = "pcie-root-port";
const VERSION: u32 = 1;

/// The one BAR: MSI-X table, then pending bits.
const BAR: u8 = 0;
const BAR_LEN: u64 = 0x1000;
const PENDING: u32 = 0x800;

/// Slot status: the button, presence and link changed; something is in the slot.
const BUTTON: u16 = 1 << 0;
const PRESENCE_CHANGED: u16 = 1 << 3;
const PRESENT: u16 = 1 << 6;
const LINK_CHANGED: u16 = 1 << 8;
/// Slot control: hot-plug interrupts at all; link-change interrupts; power is off.
const INTERRUPTS: u16 = 1 << 5;
const LINK_INTERRUPTS: u16 = 1 << 12;
const POWER_OFF: u16 = 1 << 10;
/// Slot control's power indicator, and its value "off".
const INDICATOR: u16 = 3 << 8;
const INDICATOR_OFF: u16 = 3 << 8;
const BRIDGE_CONTROL: u16 = 0x3e;
const SECONDARY_RESET: u16 = 1 << 6;

/// What a root port asks of the machine.
pub trait SlotHost: Send + Sync + fmt::Debug {
    /// The guest has switched the slot off: what is in it may be taken out, and
    /// [`RootPort::set_present`] called. Called with the port's lock held: to be done later, from
    /// another thread.
    fn powered_off(&self);

    /// The guest resets what is behind the port: [`Function::reset`] it. Called with the port's
    /// lock held, in the vCPU's thread.
    fn reset_secondary(&self);
}

/// A root port.
#[derive(Debug)]
pub struct RootPort {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    core: Core,
    msix: Arc<Msix>,
    express: u16,
    slot: Arc<dyn SlotHost>,
}

impl RootPort {
    /// A port with slot number `slot`; with `hotplug` its occupant may come and go. `present`: the
    /// slot is not empty when the machine starts.
    ///
    /// # Errors
    /// None with this layout; the type is that of what it is built from.
    pub fn new(
        slot: u16,
        hotplug: bool,
        present: bool,
        slot_host: Arc<dyn SlotHost>,
        host: Host,
    ) -> Result<Self, DeviceError> {
        let ids = Ids {
            vendor: 0x1b36,
            device: 0x000c,
            revision: 0,
            class: 0x06_0400,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        let mut config = Config::bridge(&ids);
        config.set_pin(1);
        let bar = config.add_bar(BAR, BarKind::Memory32, BAR_LEN);
        let power = config.add_power_management();
        if !bar || power.is_none() {
            return Err(DeviceError::Invalid(format!("{KIND}: its header is full")));
        }
        let mut core = Core::new(KIND, config, host);
        let express = core.add_express(Express::RootPort { slot, hotplug })?;
        let msix = core.add_msix(1, BAR, 0, PENDING)?;
        let mut inner = Inner {
            core,
            msix,
            express,
            slot: slot_host,
        };
        inner.set_present(present);
        Ok(Self {
            inner: Mutex::new(inner),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of the bus behind the port, as the guest (or firmware) set it; 0 before.
    #[must_use]
    pub fn secondary(&self) -> u8 {
        self.lock().core.config().read(0x19, 1) as u8
    }

    /// Highest bus number behind the port.
    #[must_use]
    pub fn subordinate(&self) -> u8 {
        self.lock().core.config().read(0x1a, 1) as u8
    }

    /// The slot has been filled or emptied: the guest is told.
    pub fn set_present(&self, present: bool) {
        let mut inner = self.lock();
        if inner.set_present(present) {
            inner.status(PRESENCE_CHANGED | LINK_CHANGED);
        }
    }

    /// Presses the slot's button: the guest is asked to let go of what is in the slot (it takes
    /// five seconds, then [`SlotHost::powered_off`] comes, unless the guest refuses).
    pub fn press_button(&self) {
        self.lock().status(BUTTON);
    }
}

impl Inner {
    /// Whether that is a change.
    fn set_present(&mut self, present: bool) -> bool {
        let (status, link) = (self.express + SLOT_STATUS, self.express + LINK_STATUS);
        let was = self.core.config().read(status, 2) as u16 & PRESENT != 0;
        let config = self.core.config_mut();
        if present {
            config.change16(status, 0, PRESENT);
            config.change16(link, 0, LINK_ACTIVE);
        } else {
            config.change16(status, PRESENT, 0);
            config.change16(link, LINK_ACTIVE, 0);
        }
        was != present
    }

    /// Sets status bits and interrupts.
    fn status(&mut self, bits: u16) {
        self.core
            .config_mut()
            .change16(self.express + SLOT_STATUS, 0, bits);
        self.interrupt(bits);
    }

    /// Slot control's low bits enable the status bits of the same places, but for link changes.
    fn due(&self) -> u16 {
        let config = self.core.config();
        let control = config.read(self.express + SLOT_CONTROL, 2) as u16;
        let status = config.read(self.express + SLOT_STATUS, 2) as u16;
        let link = if control & LINK_INTERRUPTS != 0 {
            LINK_CHANGED
        } else {
            0
        };
        if control & INTERRUPTS == 0 {
            return 0;
        }
        status & (control & 0x1f | link)
    }

    /// Interrupts for `new` status bits; the pin follows what is due.
    fn interrupt(&mut self, new: u16) {
        let due = self.due();
        if self.msix.is_enabled() {
            self.core.pin().set(false);
            if due & new != 0 {
                self.msix.notify(0);
            }
        } else {
            self.core.pin().set(due != 0);
        }
    }

    fn control(&self) -> (u16, u16) {
        let config = self.core.config();
        (
            config.read(self.express + SLOT_CONTROL, 2) as u16,
            config.read(BRIDGE_CONTROL, 2) as u16,
        )
    }
}

impl Function for RootPort {
    fn read_config(&self, offset: u16, width: u8) -> u32 {
        self.lock().core.read(offset, width)
    }

    fn write_config(&self, offset: u16, width: u8, value: u32) {
        let mut inner = self.lock();
        let (slot_before, bridge_before) = inner.control();
        let due_before = inner.due();
        inner.core.write(offset, width, value);
        let (slot, bridge) = inner.control();
        let new = inner.due() & !due_before;
        inner.interrupt(new);
        let off = |control: u16| control & POWER_OFF != 0 && control & INDICATOR == INDICATOR_OFF;
        let present =
            inner.core.config().read(inner.express + SLOT_STATUS, 2) as u16 & PRESENT != 0;
        if off(slot) && !off(slot_before) && present {
            inner.slot.powered_off();
        }
        // The reset lasts as long as the bit is set; what is behind is reset once, at its end.
        if bridge_before & SECONDARY_RESET != 0 && bridge & SECONDARY_RESET == 0 {
            inner.slot.reset_secondary();
        }
    }

    fn read_bar(&self, _bar: u8, offset: u32, width: u8) -> u32 {
        let inner = self.lock();
        if offset < PENDING {
            inner.msix.read_table(offset, width)
        } else {
            inner.msix.read_pending(offset - PENDING, width)
        }
    }

    fn write_bar(&self, _bar: u8, offset: u32, width: u8, value: u32) {
        if offset < PENDING {
            self.lock().msix.write_table(offset, width, value);
        }
    }

    fn reset(&self) {
        let mut inner = self.lock();
        let status = inner.express + SLOT_STATUS;
        let present = inner.core.config().read(status, 2) as u16 & PRESENT != 0;
        inner.core.reset();
        inner.set_present(present);
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        Payload::new(KIND, VERSION, &self.lock().core.save())
    }

    fn load(&self, payload: &Payload) -> Result<(), DeviceError> {
        let saved: Saved = payload.open(KIND, VERSION)?;
        self.lock().core.load(&saved)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::testing::machine::TestHost;

    #[derive(Debug, Default)]
    struct Slot {
        off: AtomicU32,
        resets: AtomicU32,
    }

    impl SlotHost for Slot {
        fn powered_off(&self) {
            self.off.fetch_add(1, Ordering::SeqCst);
        }

        fn reset_secondary(&self) {
            self.resets.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn port(present: bool) -> (Arc<TestHost>, Arc<Slot>, RootPort) {
        let host = Arc::new(TestHost::default());
        let slot = Arc::new(Slot::default());
        let port = RootPort::new(3, true, present, slot.clone(), host.host()).unwrap();
        (host, slot, port)
    }

    /// Express capability: after power management.
    const EXPRESS: u16 = 0x48;

    #[test]
    fn buses_are_numbered_by_software() {
        let (_, _, port) = port(true);
        assert_eq!(port.read_config(0x0e, 1), 1, "a bridge");
        assert_eq!(port.read_config(EXPRESS, 1), 0x10);
        assert_eq!(port.read_config(EXPRESS + 2, 2), 0x0142);
        assert_eq!(port.read_config(EXPRESS + 0x14, 4) >> 19, 3);
        assert_eq!(port.secondary(), 0);
        port.write_config(0x18, 4, 0x00_05_02_00);
        assert_eq!((port.secondary(), port.subordinate()), (2, 5));
        let saved = port.save().unwrap();
        port.reset();
        assert_eq!(port.secondary(), 0);
        port.load(&saved).unwrap();
        assert_eq!(port.secondary(), 2);
    }

    #[test]
    fn the_guest_hears_of_what_comes_and_goes() {
        let (host, slot, port) = port(false);
        let status = || port.read_config(EXPRESS + 0x1a, 2) as u16;
        let link = || port.read_config(EXPRESS + 0x12, 2) as u16 & LINK_ACTIVE != 0;
        let pin = || *host.pin.lock().unwrap();
        assert!(status() & PRESENT == 0 && !link());
        // Presence, button and link interrupts.
        port.write_config(EXPRESS + 0x18, 2, 0x1029);
        port.set_present(true);
        assert_eq!(status(), PRESENT | PRESENCE_CHANGED | LINK_CHANGED);
        assert!(link() && pin());
        port.write_config(EXPRESS + 0x1a, 2, 0xffff);
        assert_eq!(status(), PRESENT);
        assert!(!pin());
        port.press_button();
        assert!(status() & BUTTON != 0 && pin());
        // The guest lets go: indicator off, power off; once.
        for _ in 0..2 {
            port.write_config(EXPRESS + 0x18, 2, 0x1029 | 0x0700);
        }
        assert_eq!(slot.off.load(Ordering::SeqCst), 1);
        port.set_present(false);
        assert!(status() & PRESENT == 0 && !link());
    }

    #[test]
    fn a_secondary_bus_reset_reaches_what_is_behind() {
        let (_, slot, port) = port(true);
        port.write_config(BRIDGE_CONTROL, 2, 0x40);
        port.write_config(BRIDGE_CONTROL, 2, 0);
        assert_eq!(slot.resets.load(Ordering::SeqCst), 1);
    }
}
