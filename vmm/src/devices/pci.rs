//! PCI Express host bridge: configuration space through ports 0xcf8/0xcfc (PCI 3.0, 3.2.2.3.2)
//! and ECAM (PCI Express 7.2.2), and the reset control register at 0xcf9.
//!
//! Bus 0 holds the host bridge's own function and nothing else yet.

use std::sync::{Arc, Mutex};

use hypervisor::Flow;
use serde::{Deserialize, Serialize};

use super::{Request, Requests, lock};
use crate::bus::Device;
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

/// Configuration space in bytes.
const SPACE: usize = 4096;

/// What the guest can observe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// Configuration address register.
    pub address: u32,
    /// Reset control register.
    pub reset_control: u8,
    /// Command register of the host bridge.
    pub bridge_command: u16,
}

/// The root of the PCI hierarchy.
#[derive(Debug)]
pub struct PciRoot {
    state: Mutex<PciState>,
    requests: Arc<dyn Requests>,
}

/// A function's place and a register's offset in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    bus: u8,
    /// Device and function: 5 and 3 bits.
    function: u8,
    register: u16,
}

impl PciRoot {
    /// Resets are asked of `requests`.
    pub fn new(requests: Arc<dyn Requests>) -> Self {
        Self {
            state: Mutex::default(),
            requests,
        }
    }

    /// What the guest can observe.
    pub fn state(&self) -> PciState {
        lock(&self.state).clone()
    }

    /// Power-on state.
    pub fn reset(&self) {
        *lock(&self.state) = PciState::default();
    }

    /// Reads up to 4 bytes of configuration space; all ones where there is no function.
    fn config_read(state: &PciState, at: Target, width: u8) -> u32 {
        if at.bus != 0 || at.function != 0 || usize::from(at.register) >= SPACE {
            return u32::MAX;
        }
        let register = match at.register & !3 {
            // Red Hat's generic PCI Express host bridge: known to every guest, driven by none.
            0x00 => 0x0008_1b36,
            0x04 => u32::from(state.bridge_command),
            // Class: bridge, host.
            0x08 => 0x0600_0000,
            0x2c => 0x1100_1af4,
            _ => 0,
        };
        (register >> ((at.register & 3) * 8)) & mask(width)
    }

    fn config_write(state: &mut PciState, at: Target, width: u8, value: u32) {
        if at.bus == 0 && at.function == 0 && at.register & !3 == 4 {
            let shift = (at.register & 3) * 8;
            let mask = low16(mask(width).checked_shl(shift.into()).unwrap_or(0));
            let value = low16(value.checked_shl(shift.into()).unwrap_or(0));
            // I/O, memory, bus master, SERR, interrupt disable.
            state.bridge_command = (state.bridge_command & !mask | value & mask) & 0x0507;
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
        let state = lock(&self.state);
        match (offset, width) {
            (0, 4) => state.address,
            (1, 1) => u32::from(state.reset_control),
            (4.., _) => match Self::port_target(state.address, offset) {
                Some(target) => Self::config_read(&state, target, width),
                None => u32::MAX,
            },
            _ => u32::MAX,
        }
    }

    fn write(&self, offset: u32, width: u8, value: u32) -> Flow {
        let mut state = lock(&self.state);
        match (offset, width) {
            (0, 4) => state.address = value & 0x80ff_ffff,
            (1, 1) => {
                state.reset_control = low8(value) & 0x0a;
                if value & 4 != 0 {
                    self.requests.request(Request::Reset);
                    return Flow::Stop;
                }
            }
            (4.., _) => {
                if let Some(target) = Self::port_target(state.address, offset) {
                    Self::config_write(&mut state, target, width, value);
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
        PciRoot::config_read(&lock(&self.0.state), ecam_target(offset), width)
    }

    fn write(&self, offset: u32, width: u8, value: u32) -> Flow {
        PciRoot::config_write(&mut lock(&self.0.state), ecam_target(offset), width, value);
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Recorder;

    fn root() -> (Arc<Recorder>, Arc<PciRoot>) {
        let recorder = Arc::new(Recorder::default());
        (recorder.clone(), Arc::new(PciRoot::new(recorder)))
    }

    #[test]
    fn shows_the_host_bridge_both_ways() {
        let (_, root) = root();
        let ecam = Ecam(root.clone());
        root.write(0, 4, 0x8000_0000);
        assert_eq!(root.read(4, 4), 0x0008_1b36);
        assert_eq!(root.read(6, 2), 8, "device id alone");
        assert_eq!(ecam.read(0, 2), 0x1b36);
        assert_eq!(ecam.read(0xb, 1), 6, "bridge");
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
        assert_eq!(ecam.read(0x1000, 2), u32::MAX);
        ecam.write(ECAM_LEN - 4, 4, 1);
        assert_eq!(ecam.read(0x100, 4), 0, "no extended capability");
    }

    #[test]
    fn command_register_holds() {
        let (_, root) = root();
        let ecam = Ecam(root.clone());
        ecam.write(4, 2, 0xffff);
        assert_eq!(ecam.read(4, 4), 0x0507);
        ecam.write(5, 1, 0);
        assert_eq!(ecam.read(4, 2), 0x0007);
        ecam.write(7, 1, 0xff);
        assert_eq!(ecam.read(4, 2), 0x0007);
        root.reset();
        assert_eq!(ecam.read(4, 2), 0);
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
