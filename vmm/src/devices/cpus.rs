//! vCPUs that come and go while the guest runs: the register block by which the guest's ACPI code
//! learns of them (QEMU, docs/specs/acpi_cpu_hotplug.rst, the modern interface).
//!
//! Not implemented: ejection by firmware (bit 4 of the control register), which needs SMM.

use std::sync::{Arc, Mutex};

use hypervisor::Flow;
use serde::{Deserialize, Serialize};
use vmm_api::control::Event;

use super::lock;
use super::pm::{Gpe, Pm};
use crate::bus::Device;
use crate::notices::{Notice, Notices};
use crate::num::{low8, to_usize};

/// Selector and status.
pub const BASE: u16 = 0x620;
/// Ports.
pub const LEN: u32 = 12;

// Bits of the status and control register.
const ENABLED: u8 = 1;
const INSERTING: u8 = 2;
const REMOVING: u8 = 4;
const EJECT: u8 = 8;

// Commands.
const NEXT_EVENT: u8 = 0;
const OST_EVENT: u8 = 1;
const OST_STATUS: u8 = 2;
const ARCHITECTURE_ID: u8 = 3;

/// Events of `_OST` that are about an ejection (ACPI 6.5, table 6.68 and 5.6.6): asked for by the
/// machine, and the guest's own.
const EJECTIONS: [u32; 2] = [0x003, 0x103];
/// The low byte of an `_OST` status that tells of a refusal (table 6.69): general failure, and those
/// of an ejection, of which 0x84 and 0x85 say that it is under way.
fn is_refusal(status: u32) -> bool {
    matches!(low8(status & 0xff), 1 | 2 | 0x80..=0x83)
}

/// A possible vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// It is there.
    pub present: bool,
    /// It has come, and the guest has not been told.
    pub inserting: bool,
    /// It is to go, and the guest has not been told.
    pub removing: bool,
    /// It is to go, and the guest has not answered.
    pub asked: bool,
    /// What `_OST` told last.
    pub ost_event: u32,
}

/// What the guest can observe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpusState {
    /// Selected vCPU.
    pub selector: u32,
    /// Last command.
    pub command: u8,
    /// All possible vCPUs.
    pub slots: Vec<Slot>,
}

impl CpusState {
    fn selected(&mut self) -> Option<&mut Slot> {
        self.slots.get_mut(to_usize(self.selector.into()))
    }

    /// Selects the next vCPU, the present one included, of which the guest has something to hear.
    fn find_event(&mut self) {
        let count = self.slots.len();
        let start = to_usize(self.selector.into());
        let all = (0..count).map(|step| (start + step) % count.max(1));
        let found = all.into_iter().find(|index| {
            let slot = self.slots.get(*index);
            slot.is_some_and(|slot| slot.inserting || slot.removing)
        });
        if let Some(index) = found.and_then(|index| u32::try_from(index).ok()) {
            self.selector = index;
        }
    }
}

/// The register block.
#[derive(Debug)]
pub struct Cpus {
    state: Mutex<CpusState>,
    apic_ids: Vec<u32>,
    pm: Arc<Pm>,
    notices: Arc<Notices>,
}

impl Cpus {
    /// `possible` says for each possible vCPU what its APIC id is, and whether it is there.
    pub fn new(
        possible: impl Iterator<Item = (u32, bool)>,
        pm: Arc<Pm>,
        notices: Arc<Notices>,
    ) -> Self {
        let (apic_ids, present): (Vec<u32>, Vec<bool>) = possible.unzip();
        let slot = |present| Slot {
            present,
            ..Slot::default()
        };
        let state = CpusState {
            slots: present.into_iter().map(slot).collect(),
            ..CpusState::default()
        };
        Self {
            state: Mutex::new(state),
            apic_ids,
            pm,
            notices,
        }
    }

    /// What the guest can observe.
    pub fn state(&self) -> CpusState {
        lock(&self.state).clone()
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// It is of a machine with another number of vCPUs.
    pub fn load(&self, state: CpusState) -> Result<(), String> {
        let mut own = lock(&self.state);
        let (count, other) = (own.slots.len(), state.slots.len());
        if count != other {
            return Err(format!("{other} vCPUs where this machine has {count}"));
        }
        *own = state;
        Ok(())
    }

    /// The vCPUs that are there.
    pub fn present(&self) -> Vec<usize> {
        let state = lock(&self.state);
        let slots = state.slots.iter().enumerate();
        slots
            .filter(|(_, slot)| slot.present)
            .map(|(index, _)| index)
            .collect()
    }

    /// A vCPU has come: the guest is told.
    pub fn plug(&self, index: usize) {
        if let Some(slot) = lock(&self.state).slots.get_mut(index) {
            *slot = Slot {
                present: true,
                inserting: true,
                ..Slot::default()
            };
        }
        self.pm.raise(Gpe::Cpus);
    }

    /// Asks the guest to let go of a vCPU.
    pub fn ask_back(&self, index: usize) {
        if let Some(slot) = lock(&self.state).slots.get_mut(index) {
            slot.removing = true;
            slot.asked = true;
        }
        self.pm.raise(Gpe::Cpus);
    }

    /// A guest that begins anew finds the vCPUs that are there, and has let go of those it was
    /// asked for.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        for slot in &mut state.slots {
            *slot = Slot {
                present: slot.present && !slot.asked,
                ..Slot::default()
            };
        }
        state.selector = 0;
        state.command = 0;
    }

    fn control(&self, state: &mut CpusState, value: u8) {
        let first = state.selector == 0;
        let Some(slot) = state.selected() else { return };
        if value & INSERTING != 0 {
            slot.inserting = false;
        } else if value & REMOVING != 0 {
            slot.removing = false;
        } else if value & EJECT != 0 && slot.present && !first {
            // Gone for the guest from here on; its thread goes when the event loop hears of it.
            *slot = Slot::default();
            self.notices.send(Notice::VcpuGone);
        }
    }

    fn data(&self, state: &mut CpusState, value: u32) {
        let (command, index) = (state.command, state.selector);
        let Some(slot) = state.selected() else { return };
        match command {
            OST_EVENT => slot.ost_event = value,
            OST_STATUS
                if slot.asked && EJECTIONS.contains(&slot.ost_event) && is_refusal(value) =>
            {
                // Once for each time it was asked: a guest can't flood anybody.
                slot.asked = false;
                slot.removing = false;
                let refused = Event::VcpuKept { vcpu: index };
                self.notices.send(Notice::Tell(refused));
            }
            _ => {}
        }
    }
}

impl Device for Cpus {
    fn max_width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u32, _width: u8) -> u32 {
        let mut state = lock(&self.state);
        let (selector, command) = (state.selector, state.command);
        let Some(slot) = state.selected() else {
            return 0;
        };
        let register = match offset & !3 {
            4 => {
                let bit = |is, bit| if is { bit } else { 0 };
                let status = bit(slot.present, ENABLED)
                    | bit(slot.inserting, INSERTING)
                    | bit(slot.removing, REMOVING);
                u32::from(status)
            }
            8 if command == NEXT_EVENT => selector,
            8 if command == ARCHITECTURE_ID => {
                let apic_id = self.apic_ids.get(to_usize(selector.into()));
                apic_id.copied().unwrap_or(0)
            }
            _ => 0,
        };
        register >> ((offset & 3) * 8)
    }

    fn write(&self, offset: u32, width: u8, value: u32) -> Flow {
        let mut state = lock(&self.state);
        match (offset, width) {
            (0, 4) => state.selector = value,
            (4, 1) => self.control(&mut state, low8(value)),
            (5, 1) if state.selected().is_some() => {
                state.command = low8(value);
                if state.command == NEXT_EVENT {
                    state.find_event();
                }
            }
            (8, 4) => self.data(&mut state, value),
            _ => {}
        }
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Recorder;
    use crate::devices::{Interrupt, Line, pm};

    fn rig(present: &[bool]) -> (Arc<Recorder>, Arc<Pm>, Arc<Notices>, Cpus) {
        let recorder = Arc::new(Recorder::default());
        let interrupt: Arc<dyn Interrupt> = recorder.clone();
        let pm = Arc::new(Pm::new(Line::new(interrupt, pm::SCI), recorder.clone()));
        let notices = Arc::new(Notices::new().unwrap());
        // As with three threads a core: there is a gap.
        let apic_ids = (0..).map(|id| id / 3 * 4 + id % 3);
        let possible = apic_ids.zip(present.iter().copied());
        let cpus = Cpus::new(possible, pm.clone(), notices.clone());
        (recorder, pm, notices, cpus)
    }

    fn select(cpus: &Cpus, index: u32) -> u32 {
        cpus.write(0, 4, index);
        cpus.read(4, 1) & 0xff
    }

    #[test]
    fn one_that_comes_is_announced_until_the_guest_has_seen_it() {
        let (recorder, pm, _, cpus) = rig(&[true, false, false]);
        assert_eq!([0, 1, 2, 3].map(|n| select(&cpus, n)), [1, 0, 0, 0]);
        pm::Events(pm.clone()).write(2, 1, 1 << 2);
        recorder.take_lines();
        cpus.plug(2);
        assert_eq!(recorder.take_lines(), [(pm::SCI, true)]);
        select(&cpus, 0);
        cpus.write(5, 1, 0);
        assert_eq!(cpus.read(8, 4), 2, "the one with an event");
        assert_eq!(cpus.read(4, 1), 3);
        cpus.write(4, 1, 2);
        assert_eq!(cpus.read(4, 1), 1);
        cpus.write(5, 1, 3);
        assert_eq!((cpus.read(8, 4), cpus.read(0, 4)), (2, 0));
        assert_eq!(cpus.present(), [0, 2]);
    }

    #[test]
    fn one_that_is_asked_for_goes_or_is_kept() {
        let (_, _, notices, cpus) = rig(&[true, true]);
        cpus.ask_back(1);
        assert_eq!(select(&cpus, 1), 5);
        cpus.write(4, 1, 4);
        // Under way, refused, and refused without having been asked.
        for status in [0x84, 0x82, 0x82] {
            cpus.write(5, 1, 1);
            cpus.write(8, 4, 0x103);
            cpus.write(5, 1, 2);
            cpus.write(8, 4, status);
        }
        let kept = Notice::Tell(Event::VcpuKept { vcpu: 1 });
        assert_eq!(notices.take(), [kept]);
        cpus.ask_back(1);
        cpus.write(4, 1, 8);
        cpus.write(4, 1, 8);
        assert_eq!(notices.take(), [Notice::VcpuGone]);
        assert_eq!(select(&cpus, 1), 0);
        select(&cpus, 0);
        cpus.write(4, 1, 8);
        assert_eq!(cpus.present(), [0], "the first stays");
    }

    #[test]
    fn a_reset_lets_go_of_what_was_asked_for() {
        let (_, _, _, cpus) = rig(&[true, true, false]);
        cpus.plug(2);
        cpus.ask_back(1);
        cpus.reset();
        assert_eq!([0, 1, 2].map(|n| select(&cpus, n)), [1, 0, 1]);
    }

    #[test]
    fn takes_over_what_fits() {
        let (_, _, _, cpus) = rig(&[true, true]);
        let (_, _, _, other) = rig(&[true, false]);
        other.write(0, 4, u32::MAX);
        other.write(5, 1, 3);
        other.write(4, 1, 0xff);
        other.write(8, 4, 1);
        cpus.load(other.state()).unwrap();
        assert_eq!(cpus.state(), other.state());
        assert_eq!(
            (cpus.read(4, 1), cpus.read(8, 4)),
            (0, 0),
            "nobody is selected"
        );
        let (_, _, _, three) = rig(&[true, false, false]);
        assert!(cpus.load(three.state()).is_err());
    }
}
