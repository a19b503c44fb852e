//! The common configuration structure (4.1.4.3): its registers, and every odd access to them.

use serde::{Deserialize, Serialize};

use super::Inner;
use super::status;
use crate::device::QueueSetup;
use crate::feature;

/// Registers: first byte and length.
const REGISTERS: [(u32, u8); 18] = [
    (DEVICE_FEATURE_SELECT, 4),
    (DEVICE_FEATURE, 4),
    (DRIVER_FEATURE_SELECT, 4),
    (DRIVER_FEATURE, 4),
    (CONFIG_VECTOR, 2),
    (NUM_QUEUES, 2),
    (STATUS, 1),
    (GENERATION, 1),
    (QUEUE_SELECT, 2),
    (QUEUE_SIZE, 2),
    (QUEUE_VECTOR, 2),
    (QUEUE_ENABLE, 2),
    (QUEUE_NOTIFY_OFF, 2),
    (QUEUE_DESCRIPTORS, 8),
    (QUEUE_DRIVER, 8),
    (QUEUE_DEVICE, 8),
    (QUEUE_NOTIFY_DATA, 2),
    (QUEUE_RESET, 2),
];

const DEVICE_FEATURE_SELECT: u32 = 0x00;
const DEVICE_FEATURE: u32 = 0x04;
const DRIVER_FEATURE_SELECT: u32 = 0x08;
const DRIVER_FEATURE: u32 = 0x0c;
const CONFIG_VECTOR: u32 = 0x10;
const NUM_QUEUES: u32 = 0x12;
const STATUS: u32 = 0x14;
const GENERATION: u32 = 0x15;
const QUEUE_SELECT: u32 = 0x16;
const QUEUE_SIZE: u32 = 0x18;
const QUEUE_VECTOR: u32 = 0x1a;
const QUEUE_ENABLE: u32 = 0x1c;
const QUEUE_NOTIFY_OFF: u32 = 0x1e;
const QUEUE_DESCRIPTORS: u32 = 0x20;
const QUEUE_DRIVER: u32 = 0x28;
const QUEUE_DEVICE: u32 = 0x30;
const QUEUE_NOTIFY_DATA: u32 = 0x38;
const QUEUE_RESET: u32 = 0x3a;
/// Bytes of the structure.
pub(super) const LEN: u32 = 0x3c;

/// What the driver has written about one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    pub setup: QueueSetup,
    pub enabled: bool,
}

/// What the driver has written.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Registers {
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub queue_select: u16,
    pub queues: Vec<QueueRegisters>,
}

impl Registers {
    /// As after a reset: queues have their largest size.
    pub fn new(sizes: &[u16]) -> Self {
        let queue = |&size| QueueRegisters {
            setup: QueueSetup {
                size,
                ..QueueSetup::default()
            },
            enabled: false,
        };
        Self {
            queues: sizes.iter().map(queue).collect(),
            ..Self::default()
        }
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }
}

/// The register that the byte at `offset` is in.
fn register(offset: u32) -> Option<(u32, u8)> {
    REGISTERS
        .into_iter()
        .find(|&(start, len)| (start..start + u32::from(len)).contains(&offset))
}

/// The half of a 64-bit feature set that `select` names.
fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}

impl Inner {
    /// Any access: registers give their bytes.
    pub(super) fn read_common(&self, offset: u32, width: u8) -> u32 {
        (0..u32::from(width)).rev().fold(0, |value, i| {
            let byte = register(offset + i).map_or(0, |(start, _)| {
                self.read_register(start) >> (8 * (offset + i - start)) & 0xff
            });
            value << 8 | byte as u32
        })
    }

    /// Any access: a part of a register changes that part, several registers are written in order.
    pub(super) fn write_common(&mut self, offset: u32, width: u8, value: u32) {
        let end = offset + u32::from(width);
        let mut at = offset;
        while at < end {
            let Some((start, len)) = register(at) else {
                return;
            };
            let stop = end.min(start + u32::from(len));
            let bits = (u64::MAX >> (64 - 8 * (stop - at))) << (8 * (at - start));
            let new = u64::from(value >> (8 * (at - offset))) << (8 * (at - start));
            let old = self.read_register(start);
            self.write_register(start, old & !bits | new & bits);
            at = stop;
        }
    }

    fn read_register(&self, register: u32) -> u64 {
        let registers = &self.registers;
        let queue = registers.queue();
        let setup = queue.map_or(QueueSetup::default(), |queue| queue.setup);
        let select = registers.queue_select;
        match register {
            DEVICE_FEATURE_SELECT => registers.device_feature_select.into(),
            DEVICE_FEATURE => half(self.offered(), registers.device_feature_select),
            DRIVER_FEATURE_SELECT => registers.driver_feature_select.into(),
            DRIVER_FEATURE => half(registers.driver_features, registers.driver_feature_select),
            CONFIG_VECTOR => self.notifier.vector_of(None).into(),
            NUM_QUEUES => registers.queues.len() as u64,
            STATUS => self.notifier.status().into(),
            GENERATION => self.notifier.generation().into(),
            QUEUE_SELECT => select.into(),
            QUEUE_SIZE => setup.size.into(),
            QUEUE_VECTOR => self.notifier.vector_of(Some(select)).into(),
            QUEUE_ENABLE => queue.is_some_and(|queue| queue.enabled).into(),
            QUEUE_NOTIFY_OFF | QUEUE_NOTIFY_DATA if queue.is_some() => select.into(),
            QUEUE_DESCRIPTORS => setup.descriptors,
            QUEUE_DRIVER => setup.driver,
            QUEUE_DEVICE => setup.device,
            // A queue is reset before the write returns.
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u64) {
        let low = value as u32;
        match register {
            DEVICE_FEATURE_SELECT => self.registers.device_feature_select = low,
            DRIVER_FEATURE_SELECT => self.registers.driver_feature_select = low,
            DRIVER_FEATURE => self.write_features(low),
            CONFIG_VECTOR => self.notifier.set_vector(None, value as u16),
            STATUS => self.write_status(value as u8),
            QUEUE_SELECT => self.registers.queue_select = value as u16,
            QUEUE_VECTOR => {
                let queue = self.registers.queue_select;
                self.notifier.set_vector(Some(queue), value as u16);
            }
            QUEUE_ENABLE if value == 1 => self.enable_queue(),
            QUEUE_RESET if value == 1 => self.reset_queue(),
            QUEUE_SIZE | QUEUE_DESCRIPTORS | QUEUE_DRIVER | QUEUE_DEVICE => {
                self.write_queue(register, value);
            }
            _ => {}
        }
    }

    /// Settled once the device has agreed (3.1.1).
    fn write_features(&mut self, value: u32) {
        if self.notifier.status() & status::FEATURES_OK != 0 {
            return;
        }
        let features = &mut self.registers.driver_features;
        match self.registers.driver_feature_select {
            0 => *features = *features & !0xffff_ffff | u64::from(value),
            1 => *features = *features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    /// A queue's place can be changed only while it is off (4.1.4.3.2).
    fn write_queue(&mut self, register: u32, value: u64) {
        let index = usize::from(self.registers.queue_select);
        let (Some(queue), Some(&max)) = (
            self.registers.queues.get_mut(index),
            self.queue_sizes.get(index),
        ) else {
            return;
        };
        if queue.enabled {
            return;
        }
        match register {
            QUEUE_DESCRIPTORS => queue.setup.descriptors = value,
            QUEUE_DRIVER => queue.setup.driver = value,
            QUEUE_DEVICE => queue.setup.device = value,
            _ => {
                let size = value as u16;
                if size.is_power_of_two() && size <= max {
                    queue.setup.size = size;
                }
            }
        }
    }

    fn enable_queue(&mut self) {
        let index = self.registers.queue_select;
        let Some(queue) = self.registers.queues.get_mut(usize::from(index)) else {
            return;
        };
        if queue.enabled {
            return;
        }
        let active = self.active;
        // Queues come before DRIVER_OK, unless they can be reset one by one.
        if active && self.registers.driver_features & feature::RING_RESET == 0 {
            return;
        }
        queue.enabled = true;
        let setup = queue.setup;
        if !active {
            return;
        }
        if let Err(error) = self.device.enable_queue(index, setup) {
            self.broken(&error);
        }
        // The driver may do that while the function can't master the bus: the queue rests until it can.
        if !self.running {
            self.device.pause();
        }
    }

    fn reset_queue(&mut self) {
        let index = self.registers.queue_select;
        let (Some(queue), Some(&size)) = (
            self.registers.queues.get_mut(usize::from(index)),
            self.queue_sizes.get(usize::from(index)),
        ) else {
            return;
        };
        if self.registers.driver_features & feature::RING_RESET == 0 || !queue.enabled {
            return;
        }
        *queue = QueueRegisters {
            setup: QueueSetup {
                size,
                ..QueueSetup::default()
            },
            enabled: false,
        };
        if self.active {
            self.device.reset_queue(index);
        }
    }
}
