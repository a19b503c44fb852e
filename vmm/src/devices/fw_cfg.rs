//! Firmware configuration (QEMU, docs/specs/fw_cfg.rst): items by number, and files by name,
//! read a byte at a time through a port or by DMA. Firmware learns from it what the machine is.

use std::sync::{Arc, Mutex};

use hypervisor::Flow;
use serde::{Deserialize, Serialize};
use virtio::GuestMemory;

use super::lock;
use crate::bus::Device;
use crate::num::{low16, low32, to_usize};

/// Selector (16 bits), data (8 bits), and the DMA address (2 × 32 bits, big-endian) at 4.
pub const BASE: u16 = 0x510;
/// Ports.
pub const LEN: u32 = 12;

const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const FILE_DIR: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// Bit of a selector that once asked to write.
const WRITE: u16 = 0x4000;

const DMA: u32 = 4;
/// What the DMA address register reads, high half first.
const DMA_SIGNATURE: [u32; 2] = [u32::from_be_bytes(*b"QEMU"), u32::from_be_bytes(*b" CFG")];

// Bits of a DMA request's control word.
const DMA_ERROR: u32 = 1;
const DMA_READ: u32 = 2;
const DMA_SKIP: u32 = 4;
const DMA_SELECT: u32 = 8;
const DMA_WRITE: u32 = 16;

/// Longest file name with its final zero.
const NAME: usize = 56;

/// What the guest can observe and change; items are the machine's description.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgState {
    /// Selected item.
    pub selector: u16,
    /// Next byte of it.
    pub offset: u32,
    /// High half of the next DMA request's address.
    pub dma_high: u32,
}

/// One: its number, and its bytes.
type Item = (u16, Vec<u8>);

/// The items: by number, bytes.
#[derive(Debug, Default)]
pub struct Items {
    numbered: Vec<Item>,
    files: Vec<(&'static str, Vec<u8>)>,
}

impl Items {
    /// Adds or replaces an item that has a number of its own.
    pub fn number(&mut self, key: u16, data: impl Into<Vec<u8>>) {
        self.numbered.retain(|(other, _)| *other != key);
        self.numbered.push((key, data.into()));
    }

    /// Adds a file.
    pub fn file(&mut self, name: &'static str, data: impl Into<Vec<u8>>) {
        debug_assert!(name.len() < NAME);
        self.files.push((name, data.into()));
    }

    fn directory(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(low32(self.files.len() as u64).to_be_bytes());
        for ((name, data), key) in self.files.iter().zip(FIRST_FILE..) {
            out.extend(low32(data.len() as u64).to_be_bytes());
            out.extend(key.to_be_bytes());
            out.extend([0; 2]);
            let mut field = [0; NAME];
            let len = name.len().min(NAME - 1);
            field[..len].copy_from_slice(&name.as_bytes()[..len]);
            out.extend(field);
        }
        out
    }

    fn finish(mut self) -> Vec<Item> {
        self.files.sort_by_key(|(name, _)| *name);
        let directory = self.directory();
        self.number(SIGNATURE, *b"QEMU");
        // The port interface, and DMA.
        self.number(ID, 3_u32.to_le_bytes());
        self.number(FILE_DIR, directory);
        let files = self.files.into_iter().zip(FIRST_FILE..);
        self.numbered
            .extend(files.map(|((_, data), key)| (key, data)));
        self.numbered
    }
}

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    state: Mutex<FwCfgState>,
    items: Mutex<Arc<[Item]>>,
    memory: Box<dyn GuestMemory>,
}

fn item(items: &[Item], selector: u16) -> &[u8] {
    let key = selector & !WRITE;
    let found = items.iter().find(|(other, _)| *other == key);
    found.map_or(&[], |(_, data)| data)
}

impl FwCfg {
    /// Offers `items`; DMA goes to `memory`.
    pub fn new(items: Items, memory: Box<dyn GuestMemory>) -> Self {
        Self {
            state: Mutex::default(),
            items: Mutex::new(items.finish().into()),
            memory,
        }
    }

    /// What the guest can observe.
    pub fn state(&self) -> FwCfgState {
        lock(&self.state).clone()
    }

    /// Takes over a saved state.
    pub fn load(&self, state: FwCfgState) {
        *lock(&self.state) = state;
    }

    /// Power-on state, and from now on these items.
    pub fn reset(&self, items: Items) {
        *lock(&self.state) = FwCfgState::default();
        *lock(&self.items) = items.finish().into();
    }

    fn next(&self, state: &mut FwCfgState) -> u8 {
        let items = lock(&self.items);
        let byte = item(&items, state.selector).get(to_usize(state.offset.into()));
        state.offset = state.offset.saturating_add(1);
        // Beyond the end there are zeros.
        byte.copied().unwrap_or(0)
    }

    /// Copies the next `len` bytes to guest memory at `at`.
    fn read_dma(&self, state: &mut FwCfgState, at: u64, len: u32) -> bool {
        let Ok(host) = self.memory.host(at, len.into()) else {
            return false;
        };
        let items = lock(&self.items).clone();
        let item = item(&items, state.selector);
        let start = item.len().min(to_usize(state.offset.into()));
        let piece = &item[start..item.len().min(start + to_usize(len.into()))];
        // SAFETY: `host` has `len` bytes of guest RAM, which is never the target of a
        // reference; `piece` is no longer than that and is host memory of ours.
        unsafe {
            std::ptr::copy_nonoverlapping(piece.as_ptr(), host, piece.len());
            std::ptr::write_bytes(host.add(piece.len()), 0, to_usize(len.into()) - piece.len());
        }
        self.memory.wrote(at, len.into());
        state.offset = state.offset.saturating_add(len);
        true
    }

    /// Carries out the request at guest-physical `at`: control, length, address, big-endian.
    fn dma(&self, state: &mut FwCfgState, at: u64) {
        let Ok(host) = self.memory.host(at, 16) else {
            log::debug!("fw_cfg: DMA request at {at:#x}, which is not RAM");
            return;
        };
        let mut request = [0; 16];
        // SAFETY: 16 bytes of guest RAM into an array of ours.
        unsafe { std::ptr::copy_nonoverlapping(host, request.as_mut_ptr(), 16) };
        let word = |at: usize| {
            u32::from_be_bytes([
                request[at],
                request[at + 1],
                request[at + 2],
                request[at + 3],
            ])
        };
        let (control, len) = (word(0), word(4));
        let address = u64::from(word(8)) << 32 | u64::from(word(12));
        if control & DMA_SELECT != 0 {
            state.selector = low16(control >> 16);
            state.offset = 0;
        }
        let done = if control & DMA_READ != 0 {
            self.read_dma(state, address, len)
        } else if control & DMA_WRITE != 0 {
            // Nothing here is the guest's to change.
            false
        } else {
            if control & DMA_SKIP != 0 {
                state.offset = state.offset.saturating_add(len);
            }
            true
        };
        let answer = if done { 0 } else { DMA_ERROR }.to_be_bytes();
        // SAFETY: the first 4 of the 16 bytes checked above.
        unsafe { std::ptr::copy_nonoverlapping(answer.as_ptr(), host, 4) };
        self.memory.wrote(at, 4);
    }
}

impl Device for FwCfg {
    fn max_width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u32, width: u8) -> u32 {
        match (offset, width) {
            (1, _) => self.next(&mut lock(&self.state)).into(),
            (DMA | 8, 4) => DMA_SIGNATURE[to_usize(u64::from(offset / 4 - 1))].swap_bytes(),
            _ => u32::MAX,
        }
    }

    fn write(&self, offset: u32, width: u8, value: u32) -> Flow {
        let mut state = lock(&self.state);
        match (offset, width) {
            (0, 2) => {
                state.selector = low16(value);
                state.offset = 0;
            }
            (DMA, 4) => state.dma_high = value.swap_bytes(),
            (8, 4) => {
                let high = std::mem::take(&mut state.dma_high);
                self.dma(
                    &mut state,
                    u64::from(high) << 32 | u64::from(value.swap_bytes()),
                );
            }
            _ => {}
        }
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use virtio::OutsideRam;

    use super::*;

    /// 64 KiB of guest memory.
    #[derive(Debug, Clone)]
    struct Ram(Arc<Mutex<Vec<u8>>>);

    impl GuestMemory for Ram {
        fn host(&self, start: u64, len: u64) -> Result<*mut u8, OutsideRam> {
            let mut bytes = lock(&self.0);
            match start.checked_add(len) {
                Some(end) if end <= bytes.len() as u64 => {
                    Ok(bytes.as_mut_ptr().wrapping_add(to_usize(start)))
                }
                _ => Err(OutsideRam { start, len }),
            }
        }
        fn wrote(&self, _start: u64, _len: u64) {}
        fn discard(&self, _start: u64, _len: u64) -> Result<(), OutsideRam> {
            Ok(())
        }
    }

    fn device() -> (Ram, FwCfg) {
        let ram = Ram(Arc::new(Mutex::new(vec![0xaa; 64 << 10])));
        let mut items = Items::default();
        items.number(5, 2_u16.to_le_bytes());
        items.file("etc/two", vec![1, 2, 3]);
        items.file("etc/one", vec![9; 5]);
        let device = FwCfg::new(items, Box::new(ram.clone()));
        (ram, device)
    }

    fn bytes(device: &FwCfg, key: u32, count: usize) -> Vec<u8> {
        device.write(0, 2, key);
        (0..count)
            .map(|_| crate::num::low8(device.read(1, 1)))
            .collect()
    }

    fn request(ram: &Ram, device: &FwCfg, control: u32, len: u32, address: u64) -> u32 {
        {
            let mut bytes = lock(&ram.0);
            bytes[..4].copy_from_slice(&control.to_be_bytes());
            bytes[4..8].copy_from_slice(&len.to_be_bytes());
            bytes[8..16].copy_from_slice(&address.to_be_bytes());
        }
        device.write(4, 4, 0);
        device.write(8, 4, 0);
        u32::from_be_bytes(lock(&ram.0)[..4].try_into().unwrap())
    }

    #[test]
    fn items_and_directory_by_port() {
        let (_, device) = device();
        assert_eq!(bytes(&device, 0, 6), b"QEMU\0\0");
        assert_eq!(bytes(&device, 1, 4), [3, 0, 0, 0]);
        assert_eq!(bytes(&device, 5, 2), [2, 0]);
        let directory = bytes(&device, 0x19, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..12], [0, 0, 0, 5, 0, 0x20, 0, 0]);
        assert_eq!(&directory[12..20], b"etc/one\0");
        assert_eq!(bytes(&device, 0x21, 4), [1, 2, 3, 0]);
        assert_eq!(bytes(&device, 0x3ff, 1), [0]);
        assert_eq!(device.read(4, 4).to_le_bytes(), *b"QEMU");
        assert_eq!(device.read(8, 4).to_le_bytes(), *b" CFG");
    }

    #[test]
    fn dma_reads_skips_and_refuses() {
        let (ram, device) = device();
        let select = 0x21 << 16 | DMA_SELECT;
        assert_eq!(request(&ram, &device, select | DMA_READ, 5, 0x100), 0);
        assert_eq!(lock(&ram.0)[0x100..0x106], [1, 2, 3, 0, 0, 0xaa]);
        assert_eq!(request(&ram, &device, select | DMA_SKIP, 2, 0), 0);
        assert_eq!(request(&ram, &device, DMA_READ, 1, 0x200), 0);
        assert_eq!(lock(&ram.0)[0x200], 3);
        assert_eq!(
            request(&ram, &device, select | DMA_WRITE, 1, 0x200),
            DMA_ERROR
        );
        assert_eq!(request(&ram, &device, DMA_READ, u32::MAX, 0x10), DMA_ERROR);
        assert_eq!(request(&ram, &device, DMA_READ, 16, u64::MAX), DMA_ERROR);
        // A request outside RAM is nobody's.
        device.write(4, 4, u32::MAX);
        device.write(8, 4, u32::MAX);
        device.reset(Items::default());
        assert_eq!(device.state(), FwCfgState::default());
    }
}
