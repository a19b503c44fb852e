//! What every PCI function here is made of: configuration space, BARs, MSI-X, the pin.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::capability::express::{DEVICE_CONTROL, FLR};
use super::config::{self, COMMAND, Config, INTX_DISABLE, MASTER, STATUS_INTX};
use super::{Express, Host, IntxLine, Msix, msix};
use crate::device::DeviceError;

/// The MSI capability; its body's first byte where addresses have 64 bits; its control word's enable bit.
const MSI: u8 = 0x05;
const MSI_64: u8 = 1 << 7;
const MSI_ENABLE: u16 = 1;

/// The pin of a function, with its status and disable bits.
#[derive(Debug)]
pub struct Pin {
    line: Arc<dyn IntxLine>,
    state: Mutex<PinState>,
}

#[derive(Debug, Default, Clone, Copy)]
struct PinState {
    wanted: bool,
    disabled: bool,
    asserted: bool,
}

impl Pin {
    fn new(line: Arc<dyn IntxLine>) -> Self {
        Self {
            line,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, PinState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut PinState)) {
        let mut state = self.lock();
        change(&mut state);
        let asserted = state.wanted && !state.disabled;
        if asserted != state.asserted {
            state.asserted = asserted;
            // With the lock held, so that two changes reach the line in their order.
            self.line.set(asserted);
        }
    }

    /// The function wants the pin asserted, or not.
    pub fn set(&self, wanted: bool) {
        self.change(|state| state.wanted = wanted);
    }

    fn is_wanted(&self) -> bool {
        self.lock().wanted
    }
}

/// What a configuration write asks of the function, beyond what [`Core`] does itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Event {
    /// A function-level reset.
    pub reset: bool,
    /// A BAR has moved, appeared or gone.
    pub moved: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Core {
    kind: &'static str,
    config: Config,
    host: Host,
    pin: Arc<Pin>,
    msix: Option<(Arc<Msix>, u16)>,
    /// Where the MSI capability is.
    msi: Option<u16>,
    express: Option<u16>,
    /// BARs the mapper knows of: number and address.
    mapped: Vec<(u8, u64)>,
}

/// Saved state of a [`Core`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    config: config::Saved,
    msix: Option<msix::Saved>,
    pin: bool,
}

impl Core {
    /// From a configuration space with its BARs. `kind` names the function in errors.
    #[must_use]
    pub fn new(kind: &'static str, config: Config, host: Host) -> Self {
        Self {
            kind,
            config,
            pin: Arc::new(Pin::new(Arc::clone(&host.intx))),
            host,
            msix: None,
            msi: None,
            express: None,
            mapped: Vec::new(),
        }
    }

    fn full(&self) -> DeviceError {
        DeviceError::Invalid(format!("{}: configuration space is full", self.kind))
    }

    /// Adds MSI-X with `vectors` vectors; table and pending bits lie in `bar` at these offsets.
    ///
    /// # Errors
    /// Configuration space is full.
    pub fn add_msix(
        &mut self,
        vectors: u16,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Result<Arc<Msix>, DeviceError> {
        let msix = Arc::new(Msix::new(vectors, Arc::clone(&self.host.msi)));
        let offset = msix
            .add_capability(&mut self.config, bar, table, pending)
            .ok_or_else(|| self.full())?;
        self.msix = Some((Arc::clone(&msix), offset));
        Ok(msix)
    }

    /// Adds MSI with one message, which may go anywhere (7.7.1).
    ///
    /// # Errors
    /// Configuration space is full.
    pub fn add_msi(&mut self) -> Result<(), DeviceError> {
        let mut body = [0; 12];
        body[0] = MSI_64;
        let at = self.add_capability(MSI, &body)?;
        self.config.allow16(at + 2, MSI_ENABLE);
        self.config.allow32(at + 4, !3);
        self.config.allow32(at + 8, u32::MAX);
        self.config.allow16(at + 12, u16::MAX);
        self.msi = Some(at);
        Ok(())
    }

    /// Software has switched MSI on: the pin is not used then.
    #[must_use]
    pub fn has_msi(&self) -> bool {
        self.msi
            .is_some_and(|at| self.config.read(at + 2, 2) as u16 & MSI_ENABLE != 0)
    }

    /// Sends the message, where MSI is on and software lets the function reach memory.
    pub fn send_msi(&self) {
        if let Some(at) = self.msi
            && self.has_msi()
            && self.is_master()
        {
            let address = u64::from(self.config.read(at + 4, 4))
                | u64::from(self.config.read(at + 8, 4)) << 32;
            self.host.msi.send(address, self.config.read(at + 12, 2));
        }
    }

    /// Adds the PCI Express capability; its offset.
    ///
    /// # Errors
    /// Configuration space is full.
    pub fn add_express(&mut self, kind: Express) -> Result<u16, DeviceError> {
        let offset = self.config.add_express(kind).ok_or_else(|| self.full())?;
        self.express = Some(offset);
        Ok(offset)
    }

    /// Adds any other capability with its body; its offset.
    ///
    /// # Errors
    /// Configuration space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> Result<u16, DeviceError> {
        self.config
            .add_capability(id, body)
            .ok_or_else(|| self.full())
    }

    /// The registers.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The registers, for the function's own ones. Writes from software go by [`Self::write`].
    pub fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    /// The interrupt pin.
    #[must_use]
    pub fn pin(&self) -> &Arc<Pin> {
        &self.pin
    }

    /// What it was made with.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Whether software lets the function reach memory (Bus Master Enable, 7.5.1.1.3).
    #[must_use]
    pub fn is_master(&self) -> bool {
        self.config.read(COMMAND, 2) as u16 & MASTER != 0
    }

    /// Where a BAR answers now.
    #[must_use]
    pub fn bar(&self, bar: u8) -> Option<u64> {
        self.mapped
            .iter()
            .find(|mapped| mapped.0 == bar)
            .map(|m| m.1)
    }

    /// Reads configuration space.
    #[must_use]
    pub fn read(&self, offset: u16, width: u8) -> u32 {
        let value = self.config.read(offset, width);
        // Status is the upper half of the register at 4.
        let status = if self.pin.is_wanted() { STATUS_INTX } else { 0 };
        let shift = match offset {
            4 => Some(16),
            6 => Some(0),
            _ => None,
        };
        shift.map_or(value, |shift| {
            value | (status << shift) & super::mask(width)
        })
    }

    /// Writes configuration space, and does what follows from it.
    pub fn write(&mut self, offset: u16, width: u8, value: u32) -> Event {
        self.config.write(offset, width, value);
        let mut event = Event {
            moved: self.apply(),
            reset: false,
        };
        if let Some(at) = self.express {
            let control = at + DEVICE_CONTROL;
            let shift = i32::from(control + 1) - i32::from(offset);
            let written = (0..i32::from(width)).contains(&shift);
            // The bit reads as zero: it isn't kept.
            event.reset = written && value >> (8 * shift) & u32::from(FLR >> 8) != 0;
        }
        event
    }

    /// Tells everybody what the registers say; whether a BAR has moved.
    fn apply(&mut self) -> bool {
        let command = self.config.read(COMMAND, 2) as u16;
        if let Some((msix, offset)) = &self.msix {
            // A message is a write to memory: without bus mastering it waits as if masked.
            let control = self.config.read(offset + 2, 2) as u16;
            let held = if self.is_master() {
                0
            } else {
                msix::FUNCTION_MASK
            };
            msix.set_control(control | held);
        }
        self.pin
            .change(|pin| pin.disabled = command & INTX_DISABLE != 0);
        let wanted: Vec<(u8, u64, u64)> = self
            .config
            .places()
            .filter_map(|(bar, address, len)| Some((bar, address?, len)))
            .collect();
        let before = self.mapped.len();
        let mapper = &self.host.bars;
        self.mapped.retain(|&(bar, address)| {
            let stays = wanted.iter().any(|w| (w.0, w.1) == (bar, address));
            if !stays {
                mapper.unmap(bar);
            }
            stays
        });
        let mut moved = self.mapped.len() != before;
        for (bar, address, len) in wanted {
            if !self.mapped.contains(&(bar, address)) {
                self.host.bars.map(bar, address, len);
                self.mapped.push((bar, address));
                moved = true;
            }
        }
        moved
    }

    /// As after power-on: BARs unmapped, MSI-X off, the pin silent.
    pub fn reset(&mut self) {
        self.config.reset();
        if let Some((msix, _)) = &self.msix {
            msix.reset();
        }
        self.pin.set(false);
        self.apply();
    }

    /// What to save.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved {
            config: self.config.save(),
            msix: self.msix.as_ref().map(|(msix, _)| msix.save()),
            pin: self.pin.is_wanted(),
        }
    }

    /// Takes over what was saved; maps BARs.
    ///
    /// # Errors
    /// Another function's state.
    pub fn load(&mut self, saved: &Saved) -> Result<(), DeviceError> {
        match (&self.msix, &saved.msix) {
            (Some((msix, _)), Some(saved)) => msix.load(saved, self.kind)?,
            (None, None) => {}
            _ => {
                return Err(DeviceError::State {
                    kind: self.kind,
                    reason: "MSI-X on one side only".into(),
                });
            }
        }
        self.config.load(&saved.config, self.kind)?;
        self.apply();
        self.pin.set(saved.pin);
        Ok(())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.pin.set(false);
        for (bar, _) in self.mapped.drain(..) {
            self.host.bars.unmap(bar);
        }
    }
}
