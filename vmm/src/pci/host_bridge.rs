//! The host bridge's own function.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::Function;
use crate::devices::lock;
use crate::num::low16;

/// I/O, memory, bus master, SERR, interrupt disable.
const COMMAND_BITS: u16 = 0x0507;

/// What the guest can observe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostBridgeState {
    /// Command register.
    pub command: u16,
}

/// The host bridge: known to every guest, driven by none.
#[derive(Debug, Default)]
pub struct HostBridge {
    state: Mutex<HostBridgeState>,
}

impl Function for HostBridge {
    fn config_read(&self, register: u16, _width: u8) -> u32 {
        let value = match register & !3 {
            // Red Hat's generic PCI Express host bridge.
            0x00 => 0x0008_1b36,
            0x04 => u32::from(lock(&self.state).command),
            // Class: bridge, host.
            0x08 => 0x0600_0000,
            0x2c => 0x1100_1af4,
            _ => 0,
        };
        value >> ((register & 3) * 8)
    }

    fn config_write(&self, register: u16, width: u8, value: u32) {
        if register & !3 != 4 {
            return;
        }
        let shift = u32::from(register & 3) * 8;
        let ones = low16(
            u32::MAX
                .checked_shr(32 - u32::from(width) * 8)
                .and_then(|ones| ones.checked_shl(shift))
                .unwrap_or(0),
        );
        let value = low16(value.checked_shl(shift).unwrap_or(0));
        let mut state = lock(&self.state);
        state.command = (state.command & !ones | value & ones) & COMMAND_BITS;
    }

    fn set_multifunction(&self) {}

    fn reset(&self) {
        *lock(&self.state) = HostBridgeState::default();
    }
}
