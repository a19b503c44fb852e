//! A function that is nothing but its header: a host bridge, say.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::core::{Core, Saved};
use super::{Config, Function, Host, Ids};
use crate::device::{DeviceError, Payload};

const VERSION: u32 = 1;

/// A function without BARs and interrupts.
#[derive(Debug)]
pub struct Passive {
    kind: &'static str,
    core: Mutex<Core>,
}

impl Passive {
    /// `kind` names it in saved states and errors.
    #[must_use]
    pub fn new(kind: &'static str, ids: &Ids, host: Host) -> Self {
        Self {
            kind,
            core: Mutex::new(Core::new(kind, Config::endpoint(ids), host)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Function for Passive {
    fn read_config(&self, offset: u16, width: u8) -> u32 {
        self.lock().read(offset, width)
    }

    fn write_config(&self, offset: u16, width: u8, value: u32) {
        self.lock().write(offset, width, value);
    }

    fn read_bar(&self, _bar: u8, _offset: u32, width: u8) -> u32 {
        super::mask(width)
    }

    fn write_bar(&self, _bar: u8, _offset: u32, _width: u8, _value: u32) {}

    fn reset(&self) {
        self.lock().reset();
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        Payload::new(self.kind, VERSION, &self.lock().save())
    }

    fn load(&self, payload: &Payload) -> Result<(), DeviceError> {
        let saved: Saved = payload.open(self.kind, VERSION)?;
        self.lock().load(&saved)
    }
}
