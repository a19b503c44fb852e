//! What the device's threads reach without the function's lock: status, ISR, vectors.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::core::Pin;
use super::super::msix::{Msix, NO_VECTOR};
use super::status;
use crate::device::Interrupt;

/// ISR bits (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The way from device to driver.
#[derive(Debug)]
pub(super) struct Notifier {
    /// For messages.
    kind: &'static str,
    status: AtomicU8,
    generation: AtomicU8,
    isr: Mutex<u8>,
    msix: Arc<Msix>,
    pin: Arc<Pin>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Notifier {
    pub fn new(kind: &'static str, queues: usize, msix: Arc<Msix>, pin: Arc<Pin>) -> Self {
        Self {
            kind,
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            isr: Mutex::new(0),
            msix,
            pin,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// Device status without its lock; DEVICE_NEEDS_RESET comes from device threads.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    pub fn set_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    fn isr(&self) -> MutexGuard<'_, u8> {
        self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the next `take_isr` will give.
    pub fn peek_isr(&self) -> u8 {
        *self.isr()
    }

    /// Reading ISR clears it and lets go of the pin.
    pub fn take_isr(&self) -> u8 {
        let mut isr = self.isr();
        self.pin.set(false);
        std::mem::take(&mut *isr)
    }

    fn vector(&self, queue: Option<u16>) -> Option<&AtomicU16> {
        match queue {
            None => Some(&self.config_vector),
            Some(index) => self.queue_vectors.get(usize::from(index)),
        }
    }

    /// Vector of a queue, or of configuration changes (`None`).
    pub fn vector_of(&self, queue: Option<u16>) -> u16 {
        self.vector(queue)
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// A vector that isn't there reads back as none (4.1.5.1.2.1).
    pub fn set_vector(&self, queue: Option<u16>, vector: u16) {
        if let Some(place) = self.vector(queue) {
            let known = vector < self.msix.vectors();
            place.store(if known { vector } else { NO_VECTOR }, Ordering::Relaxed);
        }
    }

    fn notify(&self, queue: Option<u16>, bit: u8) {
        if self.msix.is_enabled() {
            match self.vector_of(queue) {
                NO_VECTOR => {}
                vector => self.msix.notify(vector),
            }
        } else {
            let mut isr = self.isr();
            *isr |= bit;
            self.pin.set(true);
        }
    }

    /// As after a reset of the device.
    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.take_isr();
    }

    pub fn load(&self, status: u8, generation: u8, isr: u8) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
        *self.isr() = isr;
    }
}

impl Interrupt for Notifier {
    fn queue(&self, index: u16) {
        self.notify(Some(index), ISR_QUEUE);
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.status() & status::DRIVER_OK != 0 {
            self.notify(None, ISR_CONFIG);
        }
    }

    fn needs_reset(&self, reason: &str) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if before & status::NEEDS_RESET != 0 {
            return;
        }
        log::warn!("{} needs a reset: {reason}", self.kind);
        if before & status::DRIVER_OK != 0 {
            self.notify(None, ISR_CONFIG);
        }
    }
}
