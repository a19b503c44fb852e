//! Guest RAM from address 0, that checks that every byte a device changes is reported.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Mutex;

use crate::memory::{GuestMemory, OutsideRam};

const PAGE: usize = 4096;

#[derive(Debug)]
pub(crate) struct TestRam {
    base: *mut u8,
    len: usize,
    /// What RAM holds as far as the driver's writes and `wrote` tell.
    told: Mutex<Vec<u8>>,
}

// SAFETY: plain memory, owned by this value, freed when it goes.
unsafe impl Send for TestRam {}
// SAFETY: reached by raw copies only, as guest memory is.
unsafe impl Sync for TestRam {}

impl TestRam {
    /// `len` zero bytes, whole pages.
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len, PAGE).unwrap();
        // SAFETY: the size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        assert!(!base.is_null());
        Self {
            base,
            len,
            told: Mutex::new(vec![0; len]),
        }
    }

    pub fn len(&self) -> u64 {
        self.len as u64
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

    /// Bytes that changed although nobody said so; only while the device is at rest.
    pub fn unreported(&self) -> Vec<u64> {
        let now = self.read(0, self.len());
        let told = self.told.lock().unwrap();
        (0..self.len)
            .filter(|&i| now[i] != told[i])
            .map(|i| i as u64)
            .collect()
    }
}

impl Drop for TestRam {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base, Layout::from_size_align(self.len, PAGE).unwrap()) };
    }
}

impl GuestMemory for TestRam {
    fn host(&self, start: u64, len: u64) -> Result<*mut u8, OutsideRam> {
        match start.checked_add(len) {
            Some(end) if end <= self.len() => {
                // SAFETY: just checked.
                Ok(unsafe { self.base.add(start as usize) })
            }
            _ => Err(OutsideRam { start, len }),
        }
    }

    fn wrote(&self, start: u64, len: u64) {
        let mut told = self.told.lock().unwrap();
        let now = self.read(start, len);
        told[start as usize..][..len as usize].copy_from_slice(&now);
    }

    fn discard(&self, start: u64, len: u64) -> Result<(), OutsideRam> {
        self.host(start, len)?;
        let end = (start + len) / PAGE as u64 * PAGE as u64;
        let start = start.next_multiple_of(PAGE as u64);
        if start < end {
            self.write(start, &vec![0; (end - start) as usize]);
        }
        Ok(())
    }
}
