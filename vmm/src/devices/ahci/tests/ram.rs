//! Guest RAM from address 0, that knows which changes of a device's were reported.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Mutex;

use virtio::{GuestMemory, OutsideRam};

use crate::devices::lock;

#[derive(Debug)]
pub struct TestRam {
    base: *mut u8,
    len: usize,
    /// What RAM holds as far as the guest's writes and `wrote` tell.
    told: Mutex<Vec<u8>>,
}

// SAFETY: plain memory, owned by this value, freed when it goes.
unsafe impl Send for TestRam {}
// SAFETY: reached by raw copies only, as guest memory is.
unsafe impl Sync for TestRam {}

fn layout(len: usize) -> Layout {
    Layout::from_size_align(len, 4096).unwrap()
}

impl TestRam {
    pub fn new(len: usize) -> Self {
        // SAFETY: the size is not zero.
        let base = unsafe { alloc_zeroed(layout(len)) };
        assert!(!base.is_null());
        Self {
            base,
            len,
            told: Mutex::new(vec![0; len]),
        }
    }

    pub fn write(&self, start: u64, data: &[u8]) {
        let target = self.host(start, data.len() as u64).unwrap();
        // SAFETY: inside RAM (`host`), and `data` isn't.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), target, data.len()) };
        self.wrote(start, data.len() as u64);
    }

    pub fn read(&self, start: u64, len: u64) -> Vec<u8> {
        let source = self.host(start, len).unwrap();
        let mut data = vec![0; len as usize];
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(source, data.as_mut_ptr(), data.len()) };
        data
    }

    /// Whether something changed although nobody said so; only while the device is at rest.
    pub fn has_unreported(&self) -> bool {
        self.read(0, self.len as u64) != *lock(&self.told)
    }
}

impl Drop for TestRam {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base, layout(self.len)) };
    }
}

impl GuestMemory for TestRam {
    fn host(&self, start: u64, len: u64) -> Result<*mut u8, OutsideRam> {
        match start.checked_add(len) {
            Some(end) if end <= self.len as u64 => Ok(self.base.wrapping_add(start as usize)),
            _ => Err(OutsideRam { start, len }),
        }
    }

    fn wrote(&self, start: u64, len: u64) {
        let mut told = lock(&self.told);
        let now = self.read(start, len);
        told[start as usize..][..len as usize].copy_from_slice(&now);
    }

    fn discard(&self, start: u64, len: u64) -> Result<(), OutsideRam> {
        self.host(start, len).map(drop)
    }
}
