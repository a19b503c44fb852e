//! Helpers of this crate's tests.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use hypervisor::{Backend, CpuidEntry, Error, IoAddress, MemorySlot, Msi, Result, Vcpu, Vm};

use crate::devices::lock;

/// A folder that goes with the test.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "vireo-vmm-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

type Routes = Vec<Option<(Msi, bool)>>;

/// A VM that remembers interrupts.
#[derive(Debug, Default)]
pub struct FakeVm {
    sent: Mutex<Vec<Msi>>,
    routes: Mutex<Routes>,
}

impl FakeVm {
    pub fn sent(&self) -> Vec<Msi> {
        std::mem::take(&mut *lock(&self.sent))
    }

    pub fn routes(&self) -> Routes {
        lock(&self.routes).clone()
    }
}

fn no<T>() -> Result<T> {
    Err(Error::Invalid("not in tests".into()))
}

impl Vm for FakeVm {
    fn backend(&self) -> Backend {
        Backend::Soft
    }

    fn max_vcpus(&self) -> u32 {
        1
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        no()
    }

    unsafe fn map_memory(&self, _slot: MemorySlot) -> Result<()> {
        no()
    }

    fn unmap_memory(&self, _id: u32) -> Result<()> {
        no()
    }

    fn dirty_log(&self, _id: u32) -> Result<Vec<u64>> {
        no()
    }

    fn memory_written(&self, _: u64, _: u64) {}

    fn create_vcpu(&self, _id: u32) -> Result<Box<dyn Vcpu>> {
        no()
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        lock(&self.sent).push(msi);
        Ok(())
    }

    fn set_ioapic_routes(&self, pins: &[Option<(Msi, bool)>]) -> Result<()> {
        *lock(&self.routes) = pins.to_vec();
        Ok(())
    }

    fn set_pic_output(&self, _level: bool) -> Result<()> {
        no()
    }

    fn register_irqfd(&self, _fd: BorrowedFd<'_>, _gsi: u32, _msi: Msi) -> Result<()> {
        no()
    }

    fn unregister_irqfd(&self, _fd: BorrowedFd<'_>, _gsi: u32) -> Result<()> {
        no()
    }

    fn register_ioeventfd(
        &self,
        _fd: BorrowedFd<'_>,
        _addr: IoAddress,
        _len: u8,
        _datamatch: Option<u64>,
    ) -> Result<()> {
        no()
    }

    fn unregister_ioeventfd(
        &self,
        _fd: BorrowedFd<'_>,
        _addr: IoAddress,
        _len: u8,
        _datamatch: Option<u64>,
    ) -> Result<()> {
        no()
    }

    fn clock(&self) -> Result<u64> {
        no()
    }

    fn set_clock(&self, _nanoseconds: u64) -> Result<()> {
        no()
    }
}
