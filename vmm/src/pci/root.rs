//! PCI Express root complex: configuration space through ports 0xcf8/0xcfc (PCI 3.0, 3.2.2.3.2)
//! and ECAM (PCI Express 7.2.2), and the reset control register at 0xcf9.

use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use hypervisor::Flow;
use serde::{Deserialize, Serialize};
use virtio::pci::{Function, RootPort};

use super::Place;
use crate::bus::Device;
use crate::devices::{Request, Requests, lock};
use crate::num::{low8, low16, low32};

/// Configuration address port.
pub const PORTS: u16 = 0xcf8;
/// Ports: address and data.
pub const PORTS_LEN: u32 = 8;
/// The reset control register: bit 1 hard reset, bit 2 does it.
pub const RESET: u16 = 0xcf9;
/// ECAM: 256 MiB, buses 0 to 255.
pub const ECAM: u64 = 0xe000_0000;
/// Bytes of ECAM.
pub const ECAM_LEN: u32 = 0x1000_0000;

/// Bits of the configuration address register.
const ADDRESS: u32 = 0x80ff_ffff;

/// Header type register (PCI 3.0, 6.2.1), and its bit for a slot with several functions.
const HEADER_TYPE: u16 = 0x0e;
const MULTIFUNCTION: u32 = 0x80;

/// What the guest can observe of the root complex itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// Configuration address register.
    pub address: u32,
    /// Reset control register.
    pub reset_control: u8,
}

/// The root of the PCI hierarchy.
#[derive(Debug)]
pub struct PciRoot {
    state: Mutex<PciState>,
    /// Behind root ports functions come and go.
    slots: RwLock<Vec<Slot>>,
    requests: Arc<dyn Requests>,
}

/// A function and where it is.
#[derive(Debug)]
struct Slot {
    place: Place,
    function: Arc<dyn Function>,
    /// For a root port: the bus behind it, as the configuration numbers them.
    port: Option<(u8, Arc<RootPort>)>,
    /// The slot has other functions too.
    shared: bool,
}

/// A function's place as the guest numbers buses, and a register's offset in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    bus: u8,
    /// Device and function: 5 and 3 bits.
    function: u8,
    register: u16,
}

/// A place that can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Another function has it.
    #[error("PCI address {0} is taken")]
    Taken(Place),
    /// There is no such bus, or no such slot on it.
    #[error("PCI address {0}: {1}")]
    Nowhere(Place, &'static str),
    /// Bus numbers of root ports are 1 to 255, each once.
    #[error("root port index {0} is 0, or used twice")]
    Index(u8),
}

impl PciRoot {
    /// Empty. Resets are asked of `requests`.
    pub fn new(requests: Arc<dyn Requests>) -> Self {
        Self {
            state: Mutex::default(),
            slots: RwLock::default(),
            requests,
        }
    }

    fn slots(&self) -> RwLockReadGuard<'_, Vec<Slot>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots_mut(&self) -> RwLockWriteGuard<'_, Vec<Slot>> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the functions out that are behind the root port which leads to bus `index`.
    pub fn take_behind(&self, index: u8) -> Vec<Arc<dyn Function>> {
        let mut taken = Vec::new();
        self.slots_mut().retain(|slot| {
            let stays = index == 0 || slot.place.bus != index;
            if !stays {
                taken.push(slot.function.clone());
            }
            stays
        });
        taken
    }

    /// The root port that leads to bus `index`.
    #[must_use]
    pub fn port(&self, index: u8) -> Option<Arc<RootPort>> {
        let slots = self.slots();
        let mut ports = slots.iter().filter_map(|slot| slot.port.as_ref());
        ports
            .find(|port| port.0 == index)
            .map(|port| port.1.clone())
    }

    /// Puts a function at its place.
    ///
    /// # Errors
    /// The place is taken, or there is no such place.
    pub fn insert(&self, place: Place, function: Arc<dyn Function>) -> Result<(), PlaceError> {
        self.put(place, function, None)
    }

    /// Puts a root port at its place on bus 0; it leads to bus `index` (1 to 255).
    ///
    /// # Errors
    /// The place is taken, or there is no such place.
    pub fn insert_port(
        &self,
        place: Place,
        index: u8,
        port: Arc<RootPort>,
    ) -> Result<(), PlaceError> {
        if place.bus != 0 {
            return Err(PlaceError::Nowhere(place, "root ports are on bus 0"));
        }
        if index == 0 || self.port_to(index).is_some() {
            return Err(PlaceError::Index(index));
        }
        self.put(place, port.clone(), Some((index, port)))
    }

    fn put(
        &self,
        place: Place,
        function: Arc<dyn Function>,
        port: Option<(u8, Arc<RootPort>)>,
    ) -> Result<(), PlaceError> {
        if place.device > 31 || place.function > 7 {
            return Err(PlaceError::Nowhere(place, "there is no such slot"));
        }
        if self.slots().iter().any(|slot| slot.place == place) {
            return Err(PlaceError::Taken(place));
        }
        if place.bus != 0 {
            if self.port_to(place.bus).is_none() {
                return Err(PlaceError::Nowhere(place, "no root port leads to that bus"));
            }
            if place.device != 0 {
                return Err(PlaceError::Nowhere(place, "a root port has one slot, 0"));
            }
        }
        let mut shared = false;
        let mut slots = self.slots_mut();
        for slot in slots.iter_mut() {
            if (slot.place.bus, slot.place.device) == (place.bus, place.device) {
                slot.shared = true;
                shared = true;
            }
        }
        slots.push(Slot {
            place,
            function,
            port,
            shared,
        });
        Ok(())
    }

    /// Where the root port is that leads to bus `index`.
    #[must_use]
    pub fn port_to(&self, index: u8) -> Option<Place> {
        self.slots()
            .iter()
            .find(|slot| slot.port.as_ref().is_some_and(|port| port.0 == index))
            .map(|slot| slot.place)
    }

    /// Every function that is there, root ports before what is behind them.
    pub fn functions(&self) -> impl Iterator<Item = Arc<dyn Function>> + use<> {
        self.placed().map(|(_, function)| function)
    }

    /// Every function with its place, root ports before what is behind them.
    pub fn placed(&self) -> impl Iterator<Item = (Place, Arc<dyn Function>)> + use<> {
        let slots = self.slots();
        let all: Vec<_> = slots
            .iter()
            .map(|slot| (slot.place, slot.function.clone()))
            .collect();
        all.into_iter()
    }

    /// Takes over a saved state of the root complex itself.
    pub fn load(&self, state: PciState) {
        *lock(&self.state) = PciState {
            address: state.address & ADDRESS,
            reset_control: state.reset_control & 0x0a,
        };
    }

    /// What the guest can observe.
    pub fn state(&self) -> PciState {
        lock(&self.state).clone()
    }

    /// Power-on state, functions included.
    pub fn reset(&self) {
        *lock(&self.state) = PciState::default();
        for function in self.functions() {
            function.reset();
        }
    }

    /// The function the guest means: bus numbers are what it gave the root ports.
    fn find(&self, at: Target) -> Option<(Arc<dyn Function>, bool)> {
        let slots = self.slots();
        let bus = if at.bus == 0 {
            0
        } else {
            let behind = |slot: &Slot| {
                let (index, port) = slot.port.as_ref()?;
                (port.secondary() == at.bus).then_some(*index)
            };
            slots.iter().find_map(behind)?
        };
        let place = Place {
            bus,
            device: at.function >> 3,
            function: at.function & 7,
        };
        let slot = slots.iter().find(|slot| slot.place == place)?;
        Some((slot.function.clone(), slot.shared))
    }

    /// Reads up to 4 bytes of configuration space; all ones where there is no function.
    fn config_read(&self, at: Target, width: u8) -> u32 {
        let Some((function, shared)) = self.find(at) else {
            return mask(width);
        };
        let mut value = function.read_config(at.register, width);
        if shared && at.register & !3 == HEADER_TYPE & !3 {
            let bit = MULTIFUNCTION << (8 * u32::from(HEADER_TYPE & 3));
            value |= bit >> (8 * u32::from(at.register & 3));
        }
        value & mask(width)
    }

    fn config_write(&self, at: Target, width: u8, value: u32) {
        if let Some((function, _)) = self.find(at) {
            let value = value & mask(width);
            function.write_config(at.register, width, value);
        }
    }

    /// What the address register points at, if it is enabled.
    fn port_target(address: u32, offset: u32) -> Option<Target> {
        (address >> 31 == 1).then(|| Target {
            bus: low8(address >> 16),
            function: low8(address >> 8),
            register: u16::from(low8(address) & 0xfc) + low16(offset & 3),
        })
    }
}

fn mask(width: u8) -> u32 {
    low32((1 << (u32::from(width) * 8)) - 1)
}

impl Device for PciRoot {
    fn max_width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u32, width: u8) -> u32 {
        let state = self.state();
        match (offset, width) {
            (0, 4) => state.address,
            (1, 1) => u32::from(state.reset_control),
            (4.., _) => match Self::port_target(state.address, offset) {
                Some(target) => self.config_read(target, width),
                None => u32::MAX,
            },
            _ => u32::MAX,
        }
    }

    fn write(&self, offset: u32, width: u8, value: u32) -> Flow {
        let mut state = lock(&self.state);
        match (offset, width) {
            (0, 4) => state.address = value & ADDRESS,
            (1, 1) => {
                state.reset_control = low8(value) & 0x0a;
                if value & 4 != 0 {
                    self.requests.request(Request::Reset);
                    return Flow::Stop;
                }
            }
            (4.., _) => {
                let target = Self::port_target(state.address, offset);
                drop(state);
                if let Some(target) = target {
                    self.config_write(target, width, value);
                }
            }
            _ => {}
        }
        Flow::Continue
    }
}

/// The same configuration space through memory.
#[derive(Debug)]
pub struct Ecam(pub Arc<PciRoot>);

fn ecam_target(offset: u32) -> Target {
    Target {
        bus: low8(offset >> 20),
        function: low8(offset >> 12),
        register: low16(offset & 0xfff),
    }
}

impl Device for Ecam {
    fn max_width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u32, width: u8) -> u32 {
        self.0.config_read(ecam_target(offset), width)
    }

    fn write(&self, offset: u32, width: u8, value: u32) -> Flow {
        self.0.config_write(ecam_target(offset), width, value);
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use virtio::pci::{Ids, Passive};

    use super::*;
    use crate::devices::testing::Recorder;
    use crate::pci::testing;

    /// A root complex with nothing but an endpoint 1af4:0008 at 0.
    fn root() -> (Arc<Recorder>, Arc<PciRoot>) {
        let recorder = Arc::new(Recorder::default());
        let root = PciRoot::new(recorder.clone());
        root.insert(place(0, 0, 0), endpoint(8)).unwrap();
        (recorder, Arc::new(root))
    }

    #[test]
    fn shows_a_function_both_ways() {
        let (_, root) = root();
        let ecam = Ecam(root.clone());
        root.write(0, 4, 0x8000_0000);
        assert_eq!(root.read(4, 4), 0x0008_1af4);
        assert_eq!(root.read(6, 2), 8, "device id alone");
        assert_eq!(ecam.read(0, 2), 0x1af4);
        assert_eq!(root.read(0, 4), 0x8000_0000);
        root.write(0, 4, 0);
        assert_eq!(root.read(4, 4), u32::MAX, "not enabled");
    }

    #[test]
    fn is_empty_otherwise() {
        let (_, root) = root();
        let ecam = Ecam(root.clone());
        root.write(0, 4, 0x8000_0800);
        assert_eq!(root.read(4, 4), u32::MAX);
        assert_eq!(ecam.read(0x10_0000, 4), u32::MAX);
        assert_eq!(ecam.read(0x1000, 2), 0xffff);
        ecam.write(ECAM_LEN - 4, 4, 1);
        assert_eq!(ecam.read(0x100, 4), 0, "no extended capability");
    }

    fn place(bus: u8, device: u8, function: u8) -> Place {
        Place {
            bus,
            device,
            function,
        }
    }

    /// An endpoint with this device id.
    fn endpoint(device: u16) -> Arc<dyn Function> {
        let ids = Ids {
            vendor: 0x1af4,
            device,
            revision: 0,
            class: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        Arc::new(Passive::new("test", &ids, testing::host()))
    }

    fn port() -> Arc<RootPort> {
        let port = RootPort::new(1, false, true, Arc::new(testing::Nothing), testing::host());
        Arc::new(port.unwrap())
    }

    #[test]
    fn root_ports_lead_to_the_buses_the_guest_numbered() {
        let root = PciRoot::new(Arc::new(Recorder::default()));
        root.insert(place(0, 0, 0), endpoint(1)).unwrap();
        root.insert_port(place(0, 1, 0), 1, port()).unwrap();
        root.insert_port(place(0, 1, 1), 2, port()).unwrap();
        root.insert(place(2, 0, 0), endpoint(20)).unwrap();
        for (bad, what) in [
            (place(0, 1, 1), "taken"),
            (place(0, 32, 0), "no such slot"),
            (place(3, 0, 0), "no root port"),
            (place(1, 1, 0), "one slot"),
        ] {
            let error = root.insert(bad, endpoint(0)).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        assert!(root.insert_port(place(0, 2, 0), 2, port()).is_err());
        let ecam = Ecam(Arc::new(root));
        let at = |bus: u32, slot: u32, function: u32| bus << 20 | slot << 15 | function << 12;
        assert_eq!(ecam.read(at(0, 0, 0) + 0xe, 1), 0, "one function");
        assert_eq!(
            ecam.read(at(0, 1, 0) + 0xc, 4) >> 16,
            0x81,
            "a bridge among others"
        );
        assert_eq!(ecam.read(at(0, 1, 1) + 0xe, 1), 0x81);
        assert_eq!(ecam.read(at(7, 0, 0), 4), u32::MAX, "not numbered yet");
        ecam.write(at(0, 1, 1) + 0x18, 4, 0x0007_0700);
        assert_eq!(ecam.read(at(7, 0, 0) + 2, 2), 20);
        assert_eq!(ecam.read(at(7, 1, 0), 4), u32::MAX);
        ecam.0.reset();
        assert_eq!(ecam.read(at(7, 0, 0), 4), u32::MAX);
    }

    #[test]
    fn resets() {
        let (recorder, root) = root();
        assert_eq!(root.write(1, 1, 2), Flow::Continue);
        assert_eq!(root.read(1, 1), 2);
        assert_eq!(root.write(1, 1, 6), Flow::Stop);
        assert_eq!(recorder.take_requests(), [Request::Reset]);
    }
}
