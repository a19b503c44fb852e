//! A machine with one virtio function in it, driven by its registers.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use super::{Driver, TestInterrupt};
use crate::device::{Device, Interrupt, Payload};
use crate::feature;
use crate::memory::GuestMemory;
use crate::pci::{BarMapper, Doorbells, Express, Function, Host, IntxLine, MsiSink, VirtioPci};

/// Where the driver puts the BAR.
pub(crate) const BAR: u64 = 0xd000_0000;

/// Registers of the common configuration (4.1.4.3).
pub(crate) mod common {
    pub const DEVICE_FEATURE_SELECT: u32 = 0x00;
    pub const DEVICE_FEATURE: u32 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u32 = 0x08;
    pub const DRIVER_FEATURE: u32 = 0x0c;
    pub const CONFIG_VECTOR: u32 = 0x10;
    pub const NUM_QUEUES: u32 = 0x12;
    pub const STATUS: u32 = 0x14;
    pub const GENERATION: u32 = 0x15;
    pub const QUEUE_SELECT: u32 = 0x16;
    pub const QUEUE_SIZE: u32 = 0x18;
    pub const QUEUE_VECTOR: u32 = 0x1a;
    pub const QUEUE_ENABLE: u32 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u32 = 0x1e;
    pub const QUEUE_DESCRIPTORS: u32 = 0x20;
    pub const QUEUE_DRIVER: u32 = 0x28;
    pub const QUEUE_DEVICE: u32 = 0x30;
    pub const QUEUE_RESET: u32 = 0x3a;
}
pub(crate) const ISR: u32 = 0x1000;
pub(crate) const DEVICE: u32 = 0x2000;
pub(crate) const NOTIFY: u32 = 0x3000;
pub(crate) const TABLE: u32 = 0x4000;

/// Status bits.
pub(crate) const DRIVER_OK: u8 = 15;
pub(crate) const NEEDS_RESET: u8 = 64;

/// The machine around the function. MSI-X vector 0 is for configuration changes, `n + 1` for
/// queue `n`: the message's data is the vector.
#[derive(Debug, Default)]
pub(crate) struct TestHost {
    pub interrupt: Arc<TestInterrupt>,
    pub pin: Mutex<bool>,
    pub bars: Mutex<Vec<(u8, u64, u64)>>,
    pub doorbells: Mutex<Vec<u64>>,
}

impl MsiSink for TestHost {
    fn send(&self, address: u64, data: u32) {
        // Fuzzing writes other messages into the table, too.
        match data {
            _ if address != 0xfee0_1000 => {}
            0 => self.interrupt.config(),
            vector if vector <= 0x800 => self.interrupt.queue(vector as u16 - 1),
            _ => {}
        }
    }
}

impl IntxLine for TestHost {
    fn set(&self, asserted: bool) {
        *self.pin.lock().unwrap() = asserted;
        if asserted {
            // Whatever it was: wakes a waiting test.
            self.interrupt.queue(0);
        }
    }
}

impl BarMapper for TestHost {
    fn map(&self, bar: u8, address: u64, len: u64) {
        self.bars.lock().unwrap().push((bar, address, len));
    }

    fn unmap(&self, bar: u8) {
        let mut bars = self.bars.lock().unwrap();
        assert!(bars.iter().any(|mapped| mapped.0 == bar), "not mapped");
        bars.retain(|mapped| mapped.0 != bar);
    }
}

impl Doorbells for TestHost {
    fn register(&self, _fd: BorrowedFd<'_>, address: u64) -> io::Result<()> {
        self.doorbells.lock().unwrap().push(address);
        Ok(())
    }

    fn unregister(&self, _fd: BorrowedFd<'_>, address: u64) {
        let mut doorbells = self.doorbells.lock().unwrap();
        assert!(doorbells.contains(&address), "not registered");
        doorbells.retain(|&registered| registered != address);
    }
}

impl TestHost {
    pub fn host(self: &Arc<Self>) -> Host {
        Host {
            msi: self.clone(),
            intx: self.clone(),
            bars: self.clone(),
            doorbells: self.clone(),
        }
    }
}

/// A machine with its driver.
#[derive(Debug)]
pub(crate) struct Machine {
    pub function: Arc<VirtioPci>,
    pub host: Arc<TestHost>,
    pub driver: Driver,
}

impl Machine {
    /// With `device` plugged in, and a driver that will accept `features` (as far as offered).
    pub fn new(device: Box<dyn Device>, features: u64) -> Self {
        let offered = device.features() | feature::TRANSPORT;
        let driver = Driver::new(&device.queue_sizes(), offered & features);
        let (function, host) = plug(device, &driver);
        Self {
            function,
            host,
            driver,
        }
    }

    pub fn read(&self, offset: u32, width: u8) -> u32 {
        self.function.read_bar(0, offset, width)
    }

    pub fn write(&self, offset: u32, width: u8, value: u32) {
        self.function.write_bar(0, offset, width, value);
    }

    pub fn status(&self) -> u8 {
        self.read(common::STATUS, 1) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.write(common::STATUS, 1, u32::from(status));
    }

    /// Configuration space as firmware leaves it: BAR placed, MSI-X on with its table.
    pub fn firmware(&self) {
        let function = &self.function;
        function.write_config(0x10, 4, BAR as u32);
        function.write_config(0x04, 2, 6);
        let msix = self.capability(0x11);
        let vectors = function.read_config(msix + 2, 2) & 0x7ff;
        for vector in 0..=vectors {
            let entry = TABLE + 16 * vector;
            for (word, value) in [0xfee0_1000, 0, vector, 0].into_iter().enumerate() {
                self.write(entry + 4 * word as u32, 4, value);
            }
        }
        function.write_config(msix + 2, 2, 1 << 15);
    }

    /// Offset of the first capability with this id.
    pub fn capability(&self, id: u32) -> u16 {
        let mut at = self.function.read_config(0x34, 1);
        while at != 0 {
            if self.function.read_config(at as u16, 1) == id {
                return at as u16;
            }
            at = self.function.read_config(at as u16 + 1, 1);
        }
        panic!("capability {id:#x} is not there");
    }

    /// Agrees on features; whether the device does.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        for half in 0..2 {
            self.write(common::DRIVER_FEATURE_SELECT, 4, half);
            self.write(common::DRIVER_FEATURE, 4, (features >> (32 * half)) as u32);
        }
        self.set_status(11);
        self.status() & 8 != 0
    }

    pub fn set_up_queue(&self, index: usize) {
        let setup = self.driver.queues[index].setup;
        self.write(common::QUEUE_SELECT, 2, index as u32);
        self.write(common::QUEUE_SIZE, 2, u32::from(setup.size));
        self.write(common::QUEUE_VECTOR, 2, index as u32 + 1);
        for (register, value) in [
            (common::QUEUE_DESCRIPTORS, setup.descriptors),
            (common::QUEUE_DRIVER, setup.driver),
            (common::QUEUE_DEVICE, setup.device),
        ] {
            self.write(register, 4, value as u32);
            self.write(register + 4, 4, (value >> 32) as u32);
        }
        self.write(common::QUEUE_ENABLE, 2, 1);
    }

    /// From whatever state to a running device with empty queues.
    pub fn start(&mut self) {
        self.prepare();
        self.set_status(DRIVER_OK);
    }

    /// All but DRIVER_OK.
    pub fn prepare(&mut self) {
        self.set_status(0);
        self.firmware();
        self.driver.reset();
        assert!(self.negotiate(self.driver.features));
        self.write(common::CONFIG_VECTOR, 2, 0);
        for index in 0..self.driver.queues.len() {
            self.set_up_queue(index);
        }
        self.connect();
    }

    /// The driver's kicks reach this function.
    fn connect(&mut self) {
        for index in 0..self.driver.queues.len() {
            let function = Arc::clone(&self.function);
            let address = NOTIFY + 4 * index as u32;
            self.driver.set_doorbell(index, move || {
                function.write_bar(0, address, 2, index as u32)
            });
        }
    }

    /// Saves the paused function, has `device` take its place, loads. It is paused then.
    pub fn replace(&mut self, device: Box<dyn Device>) -> Payload {
        let payload = self.function.save().unwrap();
        self.replace_with(device, &payload);
        payload
    }

    pub fn replace_with(&mut self, device: Box<dyn Device>, payload: &Payload) {
        // As it travels between hosts.
        let text = serde_json::to_string(payload).unwrap();
        let (function, host) = plug(device, &self.driver);
        self.function = function;
        self.host = host;
        self.connect();
        let payload: Payload = serde_json::from_str(&text).unwrap();
        self.function.load(&payload).unwrap();
    }
}

fn plug(device: Box<dyn Device>, driver: &Driver) -> (Arc<VirtioPci>, Arc<TestHost>) {
    let host = Arc::new(TestHost {
        interrupt: Arc::clone(&driver.interrupt),
        ..TestHost::default()
    });
    let memory: Arc<dyn GuestMemory> = driver.ram.clone();
    let function = VirtioPci::new(device, Express::Endpoint, memory, host.host()).unwrap();
    (Arc::new(function), host)
}
