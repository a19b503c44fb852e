//! A virtio device as a PCI function: the modern transport (4.1).

mod common;
mod interrupt;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};

use self::common::Registers;
use self::interrupt::Notifier;
use super::core::{self, Core};
use super::{BarKind, Config, Express, Function, Host, Ids, Msix, mask};
use crate::device::{Activation, Device, DeviceError, Payload, QueueSetup};
use crate::feature;
use crate::memory::GuestMemory;
use crate::worker;

const KIND: &str = "virtio-pci";
const VERSION: u32 = 1;

/// Device status (2.1).
pub(super) mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
    /// What the driver may set: ACKNOWLEDGE and DRIVER too.
    pub const DRIVERS: u8 = 1 | 2 | DRIVER_OK | FEATURES_OK | FAILED;
}

/// The one BAR, 32-bit: the four structures, then MSI-X.
const BAR: u8 = 0;
const BAR_LEN: u64 = 0x8000;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const DEVICE_LEN: u32 = 0x1000;
const NOTIFY: u32 = 0x3000;
/// Bytes between two queues' notify addresses.
const NOTIFY_STEP: u32 = 4;
const TABLE: u32 = 0x4000;
const PENDING: u32 = 0x6000;
/// So that the MSI-X table fits between the two.
const QUEUES_MAX: usize = 511;

/// virtio's vendor capability and its kinds (4.1.4).
const VENDOR_CAPABILITY: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// Class codes by device id, as QEMU gives them: guests' tools show them to people.
fn class(device: u16) -> u32 {
    match device {
        1 => 0x02_0000,
        2 => 0x01_0000,
        3 | 19 => 0x07_8000,
        8 => 0x01_0000,
        16 => 0x03_8000,
        18 => 0x09_8000,
        26 => 0x01_8000,
        _ => 0x00_ff00,
    }
}

/// A virtio device behind PCI.
#[derive(Debug)]
pub struct VirtioPci {
    inner: Mutex<Inner>,
    notifier: Arc<Notifier>,
    /// Notify addresses, by queue. Reached without the lock: this is the hot path where there are
    /// no ioeventfds.
    kicks: Arc<Vec<EventFd>>,
}

#[derive(Debug)]
struct Inner {
    core: Core,
    msix: Arc<Msix>,
    device: Box<dyn Device>,
    memory: Arc<dyn GuestMemory>,
    notifier: Arc<Notifier>,
    kicks: Arc<Vec<EventFd>>,
    queue_sizes: Vec<u16>,
    registers: Registers,
    /// The device has been activated.
    active: bool,
    /// The machine is paused.
    paused: bool,
    /// The device is let run: the machine is not paused, and the function may master the bus.
    running: bool,
    /// Offset of the capability that gives access to the BAR by configuration space.
    window: u16,
    /// Notify addresses that the hypervisor serves: queue and address.
    doorbells: Vec<(usize, u64)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    core: core::Saved,
    registers: Registers,
    status: u8,
    generation: u8,
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    active: bool,
    device: Payload,
}

impl VirtioPci {
    /// Puts `device` behind a function of its own. `express`: [`Express::Endpoint`] behind a root
    /// port, [`Express::Integrated`] on the root bus.
    ///
    /// # Errors
    /// Too many queues, or no eventfds.
    pub fn new(
        device: Box<dyn Device>,
        express: Express,
        memory: Arc<dyn GuestMemory>,
        host: Host,
    ) -> Result<Self, DeviceError> {
        let queue_sizes = device.queue_sizes();
        if queue_sizes.len() > QUEUES_MAX {
            let reason = format!("{} queues: at most {QUEUES_MAX}", queue_sizes.len());
            return Err(DeviceError::Invalid(reason));
        }
        let ids = Ids {
            vendor: 0x1af4,
            device: 0x1040 + device.id(),
            revision: 1,
            class: class(device.id()),
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut config = Config::endpoint(&ids);
        config.set_pin(1);
        // Below 4 GiB: reading the ISR status has an effect, so the region is not prefetchable, and bridges
        // pass on no other above. (Linux with PAE, moreover, loses the upper half of such addresses: ioremap
        // since 6.1.)
        if !config.add_bar(BAR, BarKind::Memory32, BAR_LEN)
            || config.add_power_management().is_none()
        {
            return Err(DeviceError::Invalid(format!("{KIND}: its header is full")));
        }
        let mut core = Core::new(KIND, config, host);
        core.add_express(express)?;
        let msix = core.add_msix(queue_sizes.len() as u16 + 1, BAR, TABLE, PENDING)?;
        let notify_len = NOTIFY_STEP * queue_sizes.len() as u32;
        for (kind, offset, len, extra) in [
            (COMMON_CFG, 0, common::LEN, None),
            (ISR_CFG, ISR, 1, None),
            (DEVICE_CFG, DEVICE, DEVICE_LEN, None),
            (NOTIFY_CFG, NOTIFY, notify_len, Some(NOTIFY_STEP)),
        ] {
            core.add_capability(VENDOR_CAPABILITY, &structure(kind, offset, len, extra))?;
        }
        let window = core.add_capability(VENDOR_CAPABILITY, &structure(PCI_CFG, 0, 0, Some(0)))?;
        let config = core.config_mut();
        config.allow8(window + 4, 0xff);
        for register in [8, 12, 16] {
            config.allow32(window + register, u32::MAX);
        }
        let kicks = queue_sizes
            .iter()
            .map(|_| worker::eventfd())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| DeviceError::Os {
                call: "eventfd",
                source,
            })?;
        let kicks = Arc::new(kicks);
        let notifier = Arc::new(Notifier::new(
            device.kind(),
            queue_sizes.len(),
            Arc::clone(&msix),
            Arc::clone(core.pin()),
        ));
        let inner = Inner {
            registers: Registers::new(&queue_sizes),
            notifier: Arc::clone(&notifier),
            kicks: Arc::clone(&kicks),
            active: false,
            paused: false,
            running: false,
            doorbells: Vec::new(),
            core,
            msix,
            device,
            memory,
            queue_sizes,
            window,
        };
        Ok(Self {
            inner: Mutex::new(inner),
            notifier,
            kicks,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Device status as the driver sees it (2.1).
    #[must_use]
    pub fn status(&self) -> u8 {
        self.notifier.status()
    }

    /// Features the driver has accepted; 0 before FEATURES_OK.
    #[must_use]
    pub fn features(&self) -> u64 {
        if self.status() & status::FEATURES_OK != 0 {
            self.lock().registers.driver_features
        } else {
            0
        }
    }
}

/// Body of one of virtio's capabilities.
fn structure(kind: u8, offset: u32, len: u32, extra: Option<u32>) -> Vec<u8> {
    let mut body = vec![0, kind, BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(extra.into_iter().flat_map(u32::to_le_bytes));
    body[0] = body.len() as u8 + 2;
    body
}

impl Inner {
    /// Everything the device and the transport can do.
    fn offered(&self) -> u64 {
        self.device.features() | feature::TRANSPORT
    }

    fn broken(&self, error: &DeviceError) {
        use crate::device::Interrupt;
        self.notifier.needs_reset(&error.to_string());
    }

    /// Status bits are only ever added (2.1.1); 0 resets (4.1.4.3.1).
    fn write_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset_device();
        }
        let before = self.notifier.status();
        let mut new = value & status::DRIVERS & !before;
        let features = self.registers.driver_features;
        let acceptable = features & !self.offered() == 0 && features & feature::VERSION_1 != 0;
        if new & status::FEATURES_OK != 0 && !acceptable {
            log::warn!(
                "{}: the driver's features {features:#x} are not what is offered",
                self.device.kind()
            );
            new &= !status::FEATURES_OK;
        }
        if (before | new) & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.notifier.set_status(new);
        if self.running && self.is_due() {
            self.activate();
        }
    }

    /// The driver has started the device, but it has not been activated: the function can't
    /// master the bus yet, or the machine was saved then.
    fn is_due(&self) -> bool {
        let seen = self.notifier.status() & (status::DRIVER_OK | status::NEEDS_RESET);
        seen == status::DRIVER_OK && !self.active
    }

    /// Has the device run or rest, after a change of what it depends on.
    fn settle(&mut self) {
        let run = !self.paused && self.core.is_master();
        if run == std::mem::replace(&mut self.running, run) {
            return;
        }
        if !run {
            self.device.pause();
        } else if self.is_due() {
            self.activate();
        } else {
            self.device.resume();
        }
    }

    /// What the device starts with. Indices are 0: a saved device knows its own.
    fn activation(&self) -> Result<Activation, DeviceError> {
        let second = |kick: &EventFd| -> Result<OwnedFd, DeviceError> {
            kick.as_fd()
                .try_clone_to_owned()
                .map_err(|source| DeviceError::Os {
                    call: "dup",
                    source,
                })
        };
        let setup = |queue: &common::QueueRegisters| queue.enabled.then_some(queue.setup);
        Ok(Activation {
            memory: Arc::clone(&self.memory),
            features: self.registers.driver_features,
            queues: self.registers.queues.iter().map(setup).collect(),
            kicks: self.kicks.iter().map(second).collect::<Result<_, _>>()?,
            interrupt: Arc::clone(&self.notifier) as _,
        })
    }

    fn activate(&mut self) {
        let result = self
            .activation()
            .and_then(|activation| self.device.activate(activation));
        match result {
            Ok(()) => self.active = true,
            Err(error) => self.broken(&error),
        }
    }

    /// The driver's reset: BARs, MSI-X and doorbells stay.
    fn reset_device(&mut self) {
        self.device.reset();
        self.active = false;
        self.registers = Registers::new(&self.queue_sizes);
        self.notifier.reset();
        for kick in &*self.kicks {
            // One of the time before would be a spurious one now.
            worker::take(kick);
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.core.reset();
        self.move_doorbells();
        self.settle();
    }

    /// Has the hypervisor serve notify addresses where the BAR is now.
    fn move_doorbells(&mut self) {
        let doorbells = &self.core.host().doorbells;
        for (queue, address) in self.doorbells.drain(..) {
            doorbells.unregister(self.kicks[queue].as_fd(), address);
        }
        let Some(base) = self.core.bar(BAR) else {
            return;
        };
        for (queue, kick) in self.kicks.iter().enumerate() {
            let address = base + u64::from(NOTIFY) + u64::from(NOTIFY_STEP) * queue as u64;
            match doorbells.register(kick.as_fd(), address) {
                Ok(()) => self.doorbells.push((queue, address)),
                Err(error) => {
                    log::debug!("no doorbell at {address:#x}, taking the bus: {error}");
                    return;
                }
            }
        }
    }

    fn read_bar(&self, offset: u32, width: u8) -> u32 {
        match offset {
            0..ISR => self.read_common(offset, width),
            ISR => u32::from(self.notifier.take_isr()),
            DEVICE..NOTIFY => {
                let mut bytes = [0; 4];
                let data = &mut bytes[..usize::from(width.min(4))];
                self.device.read_config(offset - DEVICE, data);
                u32::from_le_bytes(bytes)
            }
            TABLE..PENDING => self.msix.read_table(offset - TABLE, width),
            PENDING.. => self.msix.read_pending(offset - PENDING, width),
            _ => 0,
        }
    }

    fn write_bar(&mut self, offset: u32, width: u8, value: u32) {
        match offset {
            0..ISR => self.write_common(offset, width, value),
            DEVICE..NOTIFY => {
                let bytes = value.to_le_bytes();
                let data = &bytes[..usize::from(width.min(4))];
                self.device.write_config(offset - DEVICE, data);
            }
            NOTIFY..TABLE => notify(&self.kicks, offset),
            TABLE..PENDING => self.msix.write_table(offset - TABLE, width, value),
            _ => {}
        }
    }

    /// The access that the window's registers describe (4.1.4.9), if it is a valid one.
    fn window_access(&self) -> Option<(u32, u8)> {
        let config = self.core.config();
        let bar = config.read(self.window + 4, 1);
        let offset = config.read(self.window + 8, 4);
        let width = config.read(self.window + 12, 4);
        let valid = bar == u32::from(BAR)
            && matches!(width, 1 | 2 | 4)
            && offset.is_multiple_of(width)
            && u64::from(offset) + u64::from(width) <= BAR_LEN;
        valid.then_some((offset, width as u8))
    }

    /// Whether an access to configuration space touches the window's data.
    fn is_window(&self, offset: u16, width: u8) -> bool {
        let data = self.window + 16;
        offset < data + 4 && offset + u16::from(width) > data
    }
}

fn notify(kicks: &[EventFd], offset: u32) {
    let queue = (offset - NOTIFY) / NOTIFY_STEP;
    if let Some(kick) = kicks.get(queue as usize) {
        worker::signal(kick);
    }
}

impl Function for VirtioPci {
    fn read_config(&self, offset: u16, width: u8) -> u32 {
        let mut inner = self.lock();
        if inner.is_window(offset, width)
            && let Some((at, len)) = inner.window_access()
        {
            let value = inner.read_bar(at, len);
            let data = inner.window + 16;
            inner.core.config_mut().write(data, 4, value & mask(len));
        }
        inner.core.read(offset, width)
    }

    fn write_config(&self, offset: u16, width: u8, value: u32) {
        let mut inner = self.lock();
        let event = inner.core.write(offset, width, value);
        if event.moved {
            inner.move_doorbells();
        }
        if event.reset {
            return inner.reset();
        }
        inner.settle();
        if inner.is_window(offset, width)
            && let Some((at, len)) = inner.window_access()
        {
            let value = inner.core.config().read(inner.window + 16, 4);
            inner.write_bar(at, len, value & mask(len));
        }
    }

    fn read_bar(&self, bar: u8, offset: u32, width: u8) -> u32 {
        if bar != BAR || u64::from(offset) + u64::from(width) > BAR_LEN {
            return mask(width);
        }
        self.lock().read_bar(offset, width) & mask(width)
    }

    fn write_bar(&self, bar: u8, offset: u32, width: u8, value: u32) {
        if bar != BAR || u64::from(offset) + u64::from(width) > BAR_LEN {
            return;
        }
        if (NOTIFY..TABLE).contains(&offset) {
            return notify(&self.kicks, offset);
        }
        self.lock().write_bar(offset, width, value & mask(width));
    }

    fn reset(&self) {
        self.lock().reset();
    }

    fn pause(&self) {
        let mut inner = self.lock();
        inner.paused = true;
        inner.settle();
    }

    fn resume(&self) {
        let mut inner = self.lock();
        inner.paused = false;
        inner.settle();
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        let inner = self.lock();
        let notifier = &inner.notifier;
        let vectors = 0..inner.queue_sizes.len() as u16;
        let saved = Saved {
            core: inner.core.save(),
            registers: inner.registers.clone(),
            status: notifier.status(),
            generation: notifier.generation(),
            isr: notifier.peek_isr(),
            config_vector: notifier.vector_of(None),
            queue_vectors: vectors.map(|i| notifier.vector_of(Some(i))).collect(),
            active: inner.active,
            device: inner.device.save()?,
        };
        Payload::new(KIND, VERSION, &saved)
    }

    fn load(&self, payload: &Payload) -> Result<(), DeviceError> {
        let saved: Saved = payload.open(KIND, VERSION)?;
        let mut inner = self.lock();
        let inner = &mut *inner;
        let sizes = &inner.queue_sizes;
        let fits = |(queue, &max): (&common::QueueRegisters, &u16)| {
            let QueueSetup { size, .. } = queue.setup;
            size.is_power_of_two() && size <= max
        };
        let unknown = saved.registers.driver_features & !inner.offered();
        let settled = saved.status & status::FEATURES_OK != 0;
        let bad = |reason: &str| DeviceError::State {
            kind: KIND,
            reason: reason.to_owned(),
        };
        if saved.registers.queues.len() != sizes.len()
            || saved.queue_vectors.len() != sizes.len()
            || !saved.registers.queues.iter().zip(sizes).all(fits)
        {
            return Err(bad("its queues are not this device's"));
        }
        if settled && unknown != 0 {
            return Err(bad(&format!("features {unknown:#x} are not offered here")));
        }
        if saved.active && !settled {
            return Err(bad("it is active without agreed features"));
        }
        inner.registers = saved.registers;
        let notifier = &inner.notifier;
        notifier.load(saved.status, saved.generation, saved.isr);
        notifier.set_vector(None, saved.config_vector);
        for (queue, &vector) in (0..).zip(&saved.queue_vectors) {
            notifier.set_vector(Some(queue), vector);
        }
        inner.core.load(&saved.core)?;
        inner.move_doorbells();
        let mut activation = saved.active.then(|| inner.activation()).transpose()?;
        // A device that needs a reset touches its queues no more, here neither.
        if saved.status & status::NEEDS_RESET != 0
            && let Some(activation) = &mut activation
        {
            activation.queues.fill(None);
        }
        inner.device.load(&saved.device, activation)?;
        inner.active = saved.active;
        (inner.paused, inner.running) = (true, false);
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.device.reset();
        let doorbells = &self.core.host().doorbells;
        for (queue, address) in self.doorbells.drain(..) {
            doorbells.unregister(self.kicks[queue].as_fd(), address);
        }
    }
}
