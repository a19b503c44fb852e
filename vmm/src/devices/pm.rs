//! ACPI fixed hardware (ACPI 6.5, 4.8.3): PM1a event and control blocks, PM timer.
//!
//! General-purpose events (4.8.4.1) are there beside them, for a machine that has any. The machine is
//! always in ACPI mode. Power button and soft-off are here; the timer's carry
//! raises no event (no driver waits for it, as the timer has 32 bits).

use std::sync::{Arc, Mutex};
use std::time::Instant;

use hypervisor::Flow;
use serde::{Deserialize, Serialize};

use super::{Line, Request, Requests, lock};
use crate::bus::Device;
use crate::num::{low16, low32};

/// PM1a event block: status, enable.
pub const BASE: u16 = 0x600;
/// Offset of the PM1a control block.
pub const CONTROL: u16 = 4;
/// Offset of the PM timer.
pub const TIMER: u16 = 8;
/// Ports.
pub const LEN: u32 = 12;
/// General-purpose event block: status, enable, half of it each.
pub const GPE_BASE: u16 = 0x610;
/// Its ports.
pub const GPE_LEN: u8 = 4;
/// Pin of the system control interrupt.
pub const SCI: u8 = 9;
/// SLP_TYP value of S5, as `\_S5` says.
pub const S5: u8 = 5;

const POWER_BUTTON: u16 = 1 << 8;
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Timer frequency, Hz.
const TIMER_HZ: u128 = 3_579_545;

/// What the guest can observe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control, without the always-set SCI_EN.
    pub control: u16,
    /// Timer ticks at the state's taking.
    pub timer: u32,
    /// General-purpose events' status.
    #[serde(default)]
    pub gpe_status: u16,
    /// Those that raise the interrupt.
    #[serde(default)]
    pub gpe_enable: u16,
}

/// A general-purpose event; its bit's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gpe {
    /// vCPUs have come, or are to go.
    Cpus = 2,
}

#[derive(Debug)]
struct Inner {
    state: PmState,
    since: Instant,
}

/// The register block.
#[derive(Debug)]
pub struct Pm {
    inner: Mutex<Inner>,
    line: Line,
    requests: Arc<dyn Requests>,
}

impl Inner {
    fn ticks(&self) -> u32 {
        let ticks = self.since.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000;
        let bytes = ticks.to_le_bytes();
        self.state
            .timer
            .wrapping_add(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}

impl Pm {
    /// `line` is the SCI.
    pub fn new(line: Line, requests: Arc<dyn Requests>) -> Self {
        let inner = Inner {
            state: PmState::default(),
            since: Instant::now(),
        };
        Self {
            inner: Mutex::new(inner),
            line,
            requests,
        }
    }

    /// What the guest can observe.
    pub fn state(&self) -> PmState {
        let inner = lock(&self.inner);
        PmState {
            timer: inner.ticks(),
            ..inner.state.clone()
        }
    }

    /// Takes over a saved state; the timer goes on from where it was.
    pub fn load(&self, state: PmState) {
        let mut inner = lock(&self.inner);
        *inner = Inner {
            state,
            since: Instant::now(),
        };
        self.update(&inner.state);
    }

    /// Power-on state.
    pub fn reset(&self) {
        *lock(&self.inner) = Inner {
            state: PmState::default(),
            since: Instant::now(),
        };
        self.line.set(false);
    }

    /// Presses the power button. False: the guest does not listen to it (yet).
    pub fn press_power_button(&self) -> bool {
        let mut inner = lock(&self.inner);
        inner.state.status |= POWER_BUTTON;
        self.update(&inner.state);
        inner.state.enable & POWER_BUTTON != 0
    }

    /// A general-purpose event happens.
    pub fn raise(&self, event: Gpe) {
        let mut inner = lock(&self.inner);
        inner.state.gpe_status |= 1 << event as u16;
        self.update(&inner.state);
    }

    fn update(&self, state: &PmState) {
        let fixed = state.status & state.enable != 0;
        self.line
            .set(fixed || state.gpe_status & state.gpe_enable != 0);
    }
}

/// The block of general-purpose events.
#[derive(Debug)]
pub struct Events(pub Arc<Pm>);

impl Device for Events {
    fn read(&self, offset: u32, _width: u8) -> u32 {
        let inner = lock(&self.0.inner);
        let register = match offset & !1 {
            0 => inner.state.gpe_status,
            _ => inner.state.gpe_enable,
        };
        u32::from(register >> ((offset & 1) * 8))
    }

    fn write(&self, offset: u32, _width: u8, value: u32) -> Flow {
        let mut inner = lock(&self.0.inner);
        let shift = (offset & 1) * 8;
        let (value, mask) = (low16(value & 0xff) << shift, 0xff << shift);
        let state = &mut inner.state;
        match offset & !1 {
            // A one clears it.
            0 => state.gpe_status &= !value,
            _ => state.gpe_enable = state.gpe_enable & !mask | value,
        }
        self.0.update(&inner.state);
        Flow::Continue
    }
}

impl Device for Pm {
    fn max_width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u32, _width: u8) -> u32 {
        let inner = lock(&self.inner);
        let state = &inner.state;
        let register = match offset & !3 {
            0 => u32::from(state.status) | u32::from(state.enable) << 16,
            4 => u32::from(state.control | SCI_ENABLED),
            _ => inner.ticks(),
        };
        register >> ((offset & 3) * 8)
    }

    fn write(&self, offset: u32, width: u8, value: u32) -> Flow {
        let shift = (offset & 3) * 8;
        let mask = low32(((1 << (u32::from(width) * 8)) - 1) << shift);
        let value = value << shift;
        let mut inner = lock(&self.inner);
        let state = &mut inner.state;
        match offset & !3 {
            0 => {
                // Status bits are cleared by writing ones.
                state.status &= !low16(value & mask);
                let enable = low16(mask >> 16);
                state.enable = state.enable & !enable | low16(value >> 16) & enable;
                self.update(state);
            }
            4 => {
                let mask = low16(mask);
                let control = state.control & !mask | low16(value) & mask;
                state.control = control & !SLEEP_ENABLE;
                if control & SLEEP_ENABLE != 0 {
                    let kind = (control >> 10) & 7;
                    if kind == u16::from(S5) {
                        self.requests.request(Request::PowerOff);
                        return Flow::Stop;
                    }
                    log::warn!("the guest wants sleep state {kind}, which is not offered");
                }
            }
            _ => {}
        }
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Recorder;

    fn pm() -> (Arc<Recorder>, Pm) {
        let recorder = Arc::new(Recorder::default());
        (
            recorder.clone(),
            Pm::new(Line::new(recorder.clone(), SCI), recorder),
        )
    }

    #[test]
    fn powers_off_by_word_and_by_byte() {
        let (recorder, pm) = pm();
        assert_eq!(pm.read(4, 2), 1, "ACPI mode");
        assert_eq!(pm.write(4, 2, 5 << 10), Flow::Continue, "type alone");
        assert_eq!(pm.write(4, 2, 5 << 10 | 1 << 13), Flow::Stop);
        assert_eq!(pm.write(5, 1, 0x34), Flow::Stop);
        assert_eq!(
            recorder.take_requests(),
            [Request::PowerOff, Request::PowerOff]
        );
        assert_eq!(
            pm.write(4, 2, 3 << 10 | 1 << 13),
            Flow::Continue,
            "S3 is not there"
        );
        assert_eq!(pm.read(4, 2) & 0x2000, 0, "SLP_EN reads as zero");
    }

    #[test]
    fn power_button_is_a_level() {
        let (recorder, pm) = pm();
        assert!(!pm.press_power_button(), "nobody listens");
        pm.write(0, 2, 0x100);
        recorder.take_lines();
        pm.write(2, 2, 0x100);
        assert_eq!(recorder.take_lines(), [(SCI, false)]);
        assert!(pm.press_power_button());
        assert_eq!(recorder.take_lines(), [(SCI, true)]);
        assert_eq!(pm.read(0, 2) & 0xffff, 0x100);
        assert_eq!(pm.read(0, 4), 0x0100_0100);
        pm.write(0, 2, 0x100);
        assert_eq!(recorder.take_lines(), [(SCI, false)]);
        pm.reset();
        assert_eq!(pm.read(2, 2) & 0xffff, 0);
    }

    #[test]
    fn timer_never_goes_back() {
        let (_, pm) = pm();
        let first = pm.read(8, 4);
        assert!(pm.read(8, 4) >= first);
        pm.write(8, 4, 0);
        assert!(pm.read(8, 4) >= first);
    }
}
