//! ioeventfd without a kernel: a table looked at before the bus.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

use softcpu::{Bus, Flow};

use crate::{Error, IoAddress, Result};

/// What a write must be like to ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doorbell {
    /// Bytes written; 0: any number.
    pub(super) len: u8,
    /// Value written; `None`: any.
    pub(super) datamatch: Option<u64>,
}

impl Doorbell {
    fn rings(&self, data: &[u8]) -> bool {
        if self.len != 0 && usize::from(self.len) != data.len() {
            return false;
        }
        self.datamatch.is_none_or(|wanted| {
            let mut value = [0; 8];
            let len = data.len().min(8);
            value[..len].copy_from_slice(&data[..len]);
            u64::from_le_bytes(value) == wanted
        })
    }
}

/// All doorbells of a machine.
#[derive(Debug, Default)]
pub(super) struct Doorbells {
    /// How many there are: most writes are to a machine without any.
    count: AtomicUsize,
    table: RwLock<HashMap<IoAddress, Vec<(Doorbell, File)>>>,
}

impl Doorbells {
    pub(super) fn add(&self, fd: BorrowedFd<'_>, addr: IoAddress, bell: Doorbell) -> Result<()> {
        if !matches!(bell.len, 0 | 1 | 2 | 4 | 8) {
            return Err(Error::Invalid(format!("a doorbell of {} bytes", bell.len)));
        }
        let fd = fd.try_clone_to_owned().map_err(|source| Error::Os {
            call: "dup",
            source,
        })?;
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let bells = table.entry(addr).or_default();
        if bells.iter().any(|(other, _)| *other == bell) {
            return Err(Error::Invalid(format!(
                "there is a doorbell at {addr:x?} already"
            )));
        }
        bells.push((bell, fd.into()));
        self.count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    pub(super) fn remove(&self, addr: IoAddress, bell: Doorbell) -> Result<()> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let found = table.get_mut(&addr).and_then(|bells| {
            let index = bells.iter().position(|(other, _)| *other == bell)?;
            bells.swap_remove(index);
            Some(bells.is_empty())
        });
        let Some(last) = found else {
            return Err(Error::Invalid(format!("there is no doorbell at {addr:x?}")));
        };
        if last {
            table.remove(&addr);
        }
        self.count.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    /// Rings what listens to this write; whether anything does.
    fn ring(&self, addr: IoAddress, data: &[u8]) -> bool {
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let Some(bells) = table.get(&addr) else {
            return false;
        };
        let Some((_, file)) = bells.iter().find(|(bell, _)| bell.rings(data)) else {
            return false;
        };
        let mut file: &File = file;
        // Fails only where the counter is full: then the other side has a wake-up waiting.
        if let Err(error) = file.write(&1u64.to_ne_bytes()) {
            log::debug!("doorbell at {addr:x?}: {error}");
        }
        true
    }
}

/// The machine's bus behind its doorbells.
pub(super) struct DoorbellBus<'a> {
    pub(super) bus: &'a dyn Bus,
    pub(super) doorbells: &'a Doorbells,
}

impl Bus for DoorbellBus<'_> {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.bus.port_read(port, data);
    }
    fn port_write(&self, port: u16, data: &[u8]) -> Flow {
        if self.doorbells.ring(IoAddress::Port(port), data) {
            return Flow::Continue;
        }
        self.bus.port_write(port, data)
    }
    fn interrupt_acknowledge(&self) -> Option<u8> {
        self.bus.interrupt_acknowledge()
    }
    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        self.bus.mmio_read(addr, data);
    }
    fn mmio_write(&self, addr: u64, data: &[u8]) -> Flow {
        if self.doorbells.ring(IoAddress::Mmio(addr), data) {
            return Flow::Continue;
        }
        self.bus.mmio_write(addr, data)
    }
}
