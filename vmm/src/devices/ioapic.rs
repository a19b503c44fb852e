//! I/O APIC (Intel 82093AA, with the EOI register of version 0x20): 24 pins, each sending the
//! message its redirection entry describes.

use std::sync::{Arc, Mutex};

use hypervisor::{Flow, Msi, Vm};
use serde::{Deserialize, Serialize};

use super::{Interrupt, lock};
use crate::bus::Device;
use crate::num::{low8, low32};

/// Where it answers.
pub const BASE: u64 = 0xfec0_0000;
/// Bytes it answers to.
pub const LEN: u32 = 0x1000;
/// Inputs.
pub const PINS: u8 = 24;

const REGSEL: u32 = 0x00;
const WINDOW: u32 = 0x10;
const EOI: u32 = 0x40;
const VERSION: u32 = 0x20;

// Redirection entry, 82093AA data sheet 3.2.4.
const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const STATUS: u64 = 1 << 12;
const LOGICAL: u64 = 1 << 11;
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// What the guest can observe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// Index register.
    pub select: u8,
    /// Identification register, bits 24..28.
    pub id: u8,
    /// Redirection table.
    pub entries: [u64; PINS as usize],
    /// Asserted inputs, a bit each.
    pub lines: u32,
}

impl Default for IoApicState {
    fn default() -> Self {
        Self {
            select: 0,
            id: 0,
            entries: [MASKED; PINS as usize],
            lines: 0,
        }
    }
}

type Routes = [Option<(Msi, bool)>; PINS as usize];

#[derive(Debug)]
struct Inner {
    state: IoApicState,
    routes: Routes,
}

/// The I/O APIC.
#[derive(Debug)]
pub struct IoApic {
    inner: Mutex<Inner>,
    vm: Arc<dyn Vm>,
}

/// The message an entry sends, and whether it is level-triggered. `None`: masked, or a
/// delivery mode that needs a device this machine does not have (SMI, ExtINT).
fn message(entry: u64) -> Option<(Msi, bool)> {
    let mode = (entry >> 8) & 7;
    if entry & MASKED != 0 || matches!(mode, 2 | 3 | 6 | 7) {
        return None;
    }
    let level = entry & LEVEL != 0;
    let destination = entry >> 56;
    let logical = u64::from(entry & LOGICAL != 0);
    let hint = u64::from(mode == 1);
    let address = 0xfee0_0000 | destination << 12 | hint << 3 | logical << 2;
    let data = (entry & 0xff) | mode << 8 | 1 << 14 | (entry & LEVEL);
    Some((
        Msi {
            address,
            data: low32(data),
        },
        level,
    ))
}

impl IoApic {
    /// All pins masked.
    pub fn new(vm: Arc<dyn Vm>) -> Self {
        let inner = Inner {
            state: IoApicState::default(),
            routes: [None; PINS as usize],
        };
        Self {
            inner: Mutex::new(inner),
            vm,
        }
    }

    /// What the guest can observe.
    pub fn state(&self) -> IoApicState {
        lock(&self.inner).state.clone()
    }

    /// Takes over a saved state. Sends nothing: whatever was due had been sent.
    pub fn load(&self, state: IoApicState) {
        let mut inner = lock(&self.inner);
        inner.state = IoApicState {
            id: state.id & 0xf,
            entries: state.entries.map(|entry| entry & (WRITABLE | REMOTE_IRR)),
            lines: state.lines & ((1 << PINS) - 1),
            ..state
        };
        self.publish(&mut inner);
    }

    /// Power-on state; inputs stay as their devices drive them.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.state = IoApicState {
            lines: inner.state.lines,
            ..IoApicState::default()
        };
        self.publish(&mut inner);
    }

    /// A vCPU acknowledged level-triggered `vector`.
    pub fn eoi(&self, vector: u8) {
        let mut inner = lock(&self.inner);
        for pin in 0..usize::from(PINS) {
            let entry = inner.state.entries[pin];
            if entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR
                && entry & 0xff == u64::from(vector)
            {
                inner.state.entries[pin] &= !REMOTE_IRR;
                self.service(&mut inner.state, pin);
            }
        }
    }

    /// Sends a level-triggered pin's message if it is due.
    fn service(&self, state: &mut IoApicState, pin: usize) {
        let entry = state.entries[pin];
        let asserted = state.lines & (1 << pin) != 0;
        if asserted
            && entry & (LEVEL | REMOTE_IRR) == LEVEL
            && let Some((msi, _)) = message(entry)
        {
            state.entries[pin] |= REMOTE_IRR;
            self.send(msi);
        }
    }

    fn send(&self, msi: Msi) {
        if let Err(error) = self.vm.signal_msi(msi) {
            log::error!("interrupt {msi:x?}: {error}");
        }
    }

    /// Tells the backend when an entry's message changed. One that is masked while its interrupt is being
    /// served, as handlers in threads have it, is acknowledged all the same.
    fn publish(&self, inner: &mut Inner) {
        let mut routes: Routes = [None; PINS as usize];
        for (route, entry) in routes.iter_mut().zip(&inner.state.entries) {
            let served = entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR;
            *route = message(if served { entry & !MASKED } else { *entry });
        }
        if routes != inner.routes {
            inner.routes = routes;
            if let Err(error) = self.vm.set_ioapic_routes(&routes) {
                log::error!("interrupt routes: {error}");
            }
        }
    }

    fn read_register(state: &IoApicState) -> u32 {
        match state.select {
            0 | 2 => u32::from(state.id) << 24,
            1 => u32::from(PINS - 1) << 16 | VERSION,
            select @ 0x10..0x40 => {
                let entry = state.entries[usize::from((select - 0x10) / 2)];
                low32(if select & 1 == 0 { entry } else { entry >> 32 })
            }
            _ => 0,
        }
    }

    fn write_register(&self, inner: &mut Inner, value: u32) {
        match inner.state.select {
            0 => inner.state.id = low8(value >> 24) & 0xf,
            select @ 0x10..0x40 => {
                let pin = usize::from((select - 0x10) / 2);
                let shift = if select & 1 == 0 { 0 } else { 32 };
                let changed = (0xffff_ffff << shift) & WRITABLE;
                let entry = &mut inner.state.entries[pin];
                *entry = *entry & !changed | (u64::from(value) << shift) & changed;
                *entry &= !STATUS;
                if *entry & LEVEL == 0 {
                    *entry &= !REMOTE_IRR;
                }
                // Routes first: the acknowledgement of what is sent next must find them.
                self.publish(inner);
                self.service(&mut inner.state, pin);
            }
            _ => {}
        }
    }
}

impl Interrupt for IoApic {
    fn set(&self, pin: u8, level: bool) {
        if pin >= PINS {
            return;
        }
        let mut inner = lock(&self.inner);
        let state = &mut inner.state;
        let bit = 1 << pin;
        let rising = level && state.lines & bit == 0;
        state.lines = if level {
            state.lines | bit
        } else {
            state.lines & !bit
        };
        if !rising {
            return;
        }
        match message(state.entries[usize::from(pin)]) {
            Some((msi, false)) => self.send(msi),
            Some((_, true)) => self.service(state, usize::from(pin)),
            None => {}
        }
    }
}

impl Device for IoApic {
    fn max_width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u32, _width: u8) -> u32 {
        let inner = lock(&self.inner);
        match offset {
            REGSEL => u32::from(inner.state.select),
            WINDOW => Self::read_register(&inner.state),
            _ => 0,
        }
    }

    fn write(&self, offset: u32, _width: u8, value: u32) -> Flow {
        match offset {
            REGSEL => lock(&self.inner).state.select = low8(value),
            WINDOW => self.write_register(&mut lock(&self.inner), value),
            EOI => self.eoi(low8(value)),
            _ => {}
        }
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeVm;

    fn ioapic() -> (Arc<FakeVm>, IoApic) {
        let vm = Arc::new(FakeVm::default());
        (vm.clone(), IoApic::new(vm))
    }

    fn set_entry(ioapic: &IoApic, pin: u32, entry: u64) {
        ioapic.write(REGSEL, 4, 0x11 + pin * 2);
        ioapic.write(WINDOW, 4, low32(entry >> 32));
        ioapic.write(REGSEL, 4, 0x10 + pin * 2);
        ioapic.write(WINDOW, 4, low32(entry));
    }

    fn entry(ioapic: &IoApic, pin: usize) -> u64 {
        ioapic.state().entries[pin]
    }

    #[test]
    fn identifies_itself() {
        let (_, ioapic) = ioapic();
        ioapic.write(REGSEL, 4, 1);
        assert_eq!(ioapic.read(WINDOW, 4), 0x0017_0020);
        ioapic.write(REGSEL, 4, 0x10);
        assert_eq!(ioapic.read(WINDOW, 4), 0x0001_0000, "masked at power-on");
    }

    #[test]
    fn edge_sends_once_a_rise() {
        let (vm, ioapic) = ioapic();
        set_entry(&ioapic, 4, 2 << 56 | 0x31);
        ioapic.set(4, true);
        ioapic.set(4, true);
        assert_eq!(
            vm.sent(),
            [Msi {
                address: 0xfee0_2000,
                data: 0x4031
            }]
        );
        ioapic.set(4, false);
        ioapic.set(4, true);
        assert_eq!(vm.sent().len(), 1);
        assert_eq!(entry(&ioapic, 4) & REMOTE_IRR, 0);
    }

    #[test]
    fn masked_edge_is_lost() {
        let (vm, ioapic) = ioapic();
        ioapic.set(4, true);
        set_entry(&ioapic, 4, 0x31);
        assert_eq!(vm.sent(), []);
    }

    #[test]
    fn level_repeats_until_released() {
        let (vm, ioapic) = ioapic();
        set_entry(&ioapic, 9, LEVEL | 0x40);
        ioapic.set(9, true);
        assert_eq!(
            vm.sent(),
            [Msi {
                address: 0xfee0_0000,
                data: 0xc040
            }]
        );
        assert_ne!(entry(&ioapic, 9) & REMOTE_IRR, 0);
        ioapic.eoi(0x41);
        assert_eq!(vm.sent(), [], "another vector");
        ioapic.eoi(0x40);
        assert_eq!(vm.sent().len(), 1, "still asserted");
        ioapic.set(9, false);
        ioapic.write(EOI, 4, 0x40);
        assert_eq!(vm.sent(), []);
        assert_eq!(entry(&ioapic, 9) & REMOTE_IRR, 0);
    }

    #[test]
    fn unmasking_delivers_a_waiting_level() {
        let (vm, ioapic) = ioapic();
        ioapic.set(9, true);
        set_entry(&ioapic, 9, LEVEL | MASKED | 0x40);
        assert_eq!(vm.sent(), []);
        set_entry(&ioapic, 9, LEVEL | 0x40);
        assert_eq!(vm.sent().len(), 1);
    }

    #[test]
    fn an_interrupt_that_is_masked_while_it_is_served_is_acknowledged() {
        let (vm, ioapic) = ioapic();
        set_entry(&ioapic, 9, LEVEL | 0x40);
        ioapic.set(9, true);
        assert_eq!(vm.sent().len(), 1);
        set_entry(&ioapic, 9, LEVEL | MASKED | 0x40);
        assert!(vm.routes()[9].is_some(), "the backend looks out for it");
        ioapic.eoi(0x40);
        assert_eq!(entry(&ioapic, 9) & REMOTE_IRR, 0);
        set_entry(&ioapic, 9, LEVEL | MASKED | 0x40);
        assert_eq!(vm.routes()[9], None);
        set_entry(&ioapic, 9, LEVEL | 0x40);
        assert_eq!(vm.sent().len(), 1, "still asserted");
    }

    #[test]
    fn guest_cannot_write_read_only_bits() {
        let (_, ioapic) = ioapic();
        set_entry(&ioapic, 3, u64::MAX);
        assert_eq!(entry(&ioapic, 3), WRITABLE);
    }

    #[test]
    fn routes_follow_the_table_and_reset_clears_them() {
        let (vm, ioapic) = ioapic();
        set_entry(&ioapic, 9, 1 << 56 | LEVEL | 0x40);
        assert_eq!(
            vm.routes()[9],
            Some((
                Msi {
                    address: 0xfee0_1000,
                    data: 0xc040
                },
                true
            ))
        );
        ioapic.reset();
        assert_eq!(vm.routes()[9], None);
        ioapic.write(REGSEL, 4, 0xff);
        assert_eq!(ioapic.read(WINDOW, 4), 0, "no such register");
        ioapic.write(WINDOW, 4, 1);
        ioapic.set(200, true);
    }
}
