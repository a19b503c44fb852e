//! The machine's devices, one file each: registers, guest-visible state, I/O, tests.
//!
//! A device keeps what the guest can observe in one plain serde struct (`...State`), separate
//! from its host resources. `reset` puts it into the state of power-on; the vCPUs are stopped
//! then.

pub mod ahci;
pub mod cpus;
pub mod debug;
pub mod fw_cfg;
pub mod i6300esb;
pub mod i8042;
pub mod ioapic;
pub mod keyboard;

pub mod pic;
pub mod pit;
pub mod pm;
pub mod pvpanic;
pub mod rtc;
pub mod uart;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Locks; a panic of another thread while it held the lock does not spread (device state is
/// plain data: any value of it is valid).
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An input of the interrupt controller.
pub trait Interrupt: Send + Sync + std::fmt::Debug {
    /// The level of line `pin` (true: asserted) is now `level`.
    fn set(&self, pin: u8, level: bool);
}

/// One interrupt line of a device.
#[derive(Debug, Clone)]
pub struct Line {
    controller: Arc<dyn Interrupt>,
    pin: u8,
}

impl Line {
    /// Line `pin` of `controller`.
    #[must_use]
    pub fn new(controller: Arc<dyn Interrupt>, pin: u8) -> Self {
        Self { controller, pin }
    }

    /// Asserts or releases it.
    pub fn set(&self, level: bool) {
        self.controller.set(self.pin, level);
    }
}

/// A pin that several devices drive: asserted while any of them asserts it.
#[derive(Debug)]
pub struct SharedPin {
    controller: Arc<dyn Interrupt>,
    pin: u8,
    levels: Mutex<u8>,
}

impl SharedPin {
    /// Pin `pin` of `controller`; its inputs are numbered 0 to 7.
    #[must_use]
    pub fn new(controller: Arc<dyn Interrupt>, pin: u8) -> Self {
        Self {
            controller,
            pin,
            levels: Mutex::new(0),
        }
    }
}

impl Interrupt for SharedPin {
    fn set(&self, pin: u8, level: bool) {
        let mut levels = lock(&self.levels);
        let bit = 1 << (pin & 7);
        *levels = if level { *levels | bit } else { *levels & !bit };
        self.controller.set(self.pin, *levels != 0);
    }
}

/// The interrupt lines of a PC/AT's devices, which reach the I/O APIC and the older controllers.
#[derive(Debug)]
pub struct IsaLines {
    /// The I/O APIC: line 0, the interval timer's, is on its pin 2.
    pub ioapic: Arc<dyn Interrupt>,
    /// The 8259As.
    pub pic: Arc<dyn Interrupt>,
}

impl Interrupt for IsaLines {
    fn set(&self, pin: u8, level: bool) {
        self.pic.set(pin, level);
        match pin {
            0 => self.ioapic.set(2, level),
            // The cascade.
            2 => {}
            pin => self.ioapic.set(pin, level),
        }
    }
}

/// What a device asks of the machine as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Soft-off (ACPI S5).
    PowerOff,
    /// Hard reset.
    Reset,
    /// The guest says that it panicked.
    Panic,
    /// isa-debug-exit: end with this value.
    DebugExit(u32),
}

/// Whoever carries requests out. The caller returns `Flow::Stop` to its vCPU after asking.
pub trait Requests: Send + Sync + std::fmt::Debug {
    /// Asks; returns at once.
    fn request(&self, request: Request);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_pin_is_the_or_of_its_inputs() {
        let recorder = Arc::new(testing::Recorder::default());
        let shared = Arc::new(SharedPin::new(recorder.clone(), 4));
        let (first, second) = (Line::new(shared.clone(), 0), Line::new(shared, 1));
        first.set(true);
        second.set(true);
        first.set(false);
        second.set(false);
        let levels: Vec<bool> = recorder
            .take_lines()
            .iter()
            .map(|(_, level)| *level)
            .collect();
        assert_eq!(levels, [true, true, true, false]);
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Remembers line changes and requests.
    #[derive(Debug, Default)]
    pub struct Recorder {
        pub lines: Mutex<Vec<(u8, bool)>>,
        pub requests: Mutex<Vec<Request>>,
    }

    impl Recorder {
        pub fn take_lines(&self) -> Vec<(u8, bool)> {
            std::mem::take(&mut *lock(&self.lines))
        }

        pub fn take_requests(&self) -> Vec<Request> {
            std::mem::take(&mut *lock(&self.requests))
        }
    }

    impl Interrupt for Recorder {
        fn set(&self, pin: u8, level: bool) {
            lock(&self.lines).push((pin, level));
        }
    }

    impl Requests for Recorder {
        fn request(&self, request: Request) {
            lock(&self.requests).push(request);
        }
    }
}
