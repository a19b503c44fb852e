//! What the machine gives its PCI functions: interrupts, places for BARs, doorbells.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use hypervisor::{Flow, IoAddress, Msi, Vm};
use virtio::pci::{BarMapper, Doorbells, Function, Host, IntxLine, MsiSink};

use super::Place;
use crate::acpi::PCI_PINS;
use crate::bus::{Device, Movable};
use crate::devices::{Interrupt, lock};

/// Makes each function's [`Host`].
#[derive(Debug)]
pub struct Hosts {
    vm: Arc<dyn Vm>,
    bars: Arc<Movable>,
    pins: Arc<Pins>,
}

/// Says which function a [`Host`] was made for, once there is one.
#[derive(Debug)]
pub struct Owner(Arc<Bars>);

impl Owner {
    /// The function that has been made with the host.
    pub fn set(&self, function: &Arc<dyn Function>) {
        // A second time would change nothing: the first function stays.
        let _ = self.0.function.set(Arc::downgrade(function));
    }
}

impl Hosts {
    /// For the functions of `vm`, whose interrupt pins are lines of `controller`.
    pub fn new(vm: Arc<dyn Vm>, bars: Arc<Movable>, controller: Arc<dyn Interrupt>) -> Self {
        Self {
            vm,
            bars,
            pins: Arc::new(Pins {
                controller,
                asserted: Mutex::default(),
            }),
        }
    }

    /// For a function whose pin INTA# leaves the root bus at device `slot`: its own, or that of
    /// the root port before it.
    #[must_use]
    pub fn host(&self, slot: u8) -> (Host, Owner) {
        let bars = Arc::new(Bars {
            space: self.bars.clone(),
            function: OnceLock::new(),
            mapped: Mutex::default(),
        });
        let host = Host {
            msi: Arc::new(Messages(self.vm.clone())),
            intx: Arc::new(Line {
                pins: self.pins.clone(),
                line: usize::from(slot % PCI_PINS.count),
            }),
            bars: bars.clone(),
            doorbells: Arc::new(Bells(self.vm.clone())),
        };
        (host, Owner(bars))
    }
}

#[derive(Debug)]
struct Messages(Arc<dyn Vm>);

impl MsiSink for Messages {
    fn send(&self, address: u64, data: u32) {
        if let Err(error) = self.0.signal_msi(Msi { address, data }) {
            log::warn!("interrupt message {data:#x} to {address:#x}: {error}");
        }
    }
}

/// The I/O APIC's pins that PCI functions share.
#[derive(Debug)]
struct Pins {
    controller: Arc<dyn Interrupt>,
    /// How many functions assert each line now.
    asserted: Mutex<[u16; PCI_PINS.count as usize]>,
}

#[derive(Debug)]
struct Line {
    pins: Arc<Pins>,
    line: usize,
}

impl IntxLine for Line {
    fn set(&self, asserted: bool) {
        let mut counts = lock(&self.pins.asserted);
        let count = &mut counts[self.line];
        *count = if asserted {
            count.saturating_add(1)
        } else {
            count.saturating_sub(1)
        };
        let pin = PCI_PINS.first + u8::try_from(self.line).unwrap_or(0);
        // With the lock held, so that two changes reach the controller in their order.
        self.pins.controller.set(pin, *count > 0);
    }
}

#[derive(Debug)]
struct Bars {
    space: Arc<Movable>,
    function: OnceLock<Weak<dyn Function>>,
    /// BARs that answer now, and where.
    mapped: Mutex<Vec<(u8, u64)>>,
}

impl BarMapper for Bars {
    fn map(&self, bar: u8, address: u64, len: u64) {
        let (Some(function), Ok(len)) = (self.function.get(), u32::try_from(len)) else {
            return;
        };
        let device = Arc::new(Bar {
            function: function.clone(),
            bar,
        });
        match self.space.place(address, len, device) {
            Ok(()) => lock(&self.mapped).push((bar, address)),
            // The guest's mistake: on hardware two devices would answer at once.
            Err(error) => log::warn!("BAR {bar} at {address:#x}: {error}"),
        }
    }

    fn unmap(&self, bar: u8) {
        lock(&self.mapped).retain(|&(mapped, address)| {
            if mapped == bar {
                self.space.take(address);
            }
            mapped != bar
        });
    }
}

/// A BAR on the bus.
#[derive(Debug)]
struct Bar {
    function: Weak<dyn Function>,
    bar: u8,
}

impl Device for Bar {
    fn max_width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u32, width: u8) -> u32 {
        self.function
            .upgrade()
            .map_or(u32::MAX, |f| f.read_bar(self.bar, offset, width))
    }

    fn write(&self, offset: u32, width: u8, value: u32) -> Flow {
        if let Some(function) = self.function.upgrade() {
            function.write_bar(self.bar, offset, width, value);
        }
        Flow::Continue
    }
}

#[derive(Debug)]
struct Bells(Arc<dyn Vm>);

/// A notify address takes writes of any length, whatever they say: of two bytes, or of four with
/// `VIRTIO_F_NOTIFICATION_DATA`.
const NOTIFY_BYTES: u8 = 0;

impl Doorbells for Bells {
    fn register(&self, fd: BorrowedFd<'_>, address: u64) -> io::Result<()> {
        self.0
            .register_ioeventfd(fd, IoAddress::Mmio(address), NOTIFY_BYTES, None)
            .map_err(io::Error::other)
    }

    fn unregister(&self, fd: BorrowedFd<'_>, address: u64) {
        if let Err(error) =
            self.0
                .unregister_ioeventfd(fd, IoAddress::Mmio(address), NOTIFY_BYTES, None)
        {
            log::warn!("doorbell at {address:#x}: {error}");
        }
    }
}

/// The slot whose `_PRT` entry a function's pin has.
#[must_use]
pub fn pin_slot(place: Place, port: Option<Place>) -> u8 {
    port.unwrap_or(place).device
}
