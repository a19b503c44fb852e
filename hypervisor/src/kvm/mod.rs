//! The backend on `/dev/kvm`: only the local APIC is in the kernel (split irqchip); the I/O
//! APIC and everything else are the VMM's, the same as on the soft backend.

mod insn;
mod ioctl;
mod kick;
mod routes;
mod state;
mod vcpu;

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_clock_data, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

pub use kick::kick_signal;

use crate::{
    Backend, CpuidEntry, Error, IOAPIC_PINS, IoAddress, Kicker, MemorySlot, Msi, Result, Vcpu, Vm,
};
use ioctl::os;
use routes::Routes;
use vcpu::KvmVcpu;

/// The only version of the API there is.
const API_VERSION: i32 = 12;

/// Below 4 GiB, above any device and under the firmware: three pages for the TSS and one for
/// the page table that Intel processors without unrestricted guests need.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A slot as the kernel knows it.
#[derive(Debug)]
struct Slot {
    region: kvm_userspace_memory_region,
    /// Pages devices wrote since the last log, one bit each; empty where nothing is logged.
    device_writes: Vec<u64>,
}

/// What vCPUs need of their VM.
#[derive(Debug)]
struct Shared {
    vm: VmFd,
    /// Bytes KVM_GET_XSAVE2 writes; 0: only KVM_GET_XSAVE.
    xsave_size: usize,
    /// MSRs that are part of a vCPU's state.
    msrs: Vec<u32>,
    has_mce: bool,
    has_xcrs: bool,
    has_debugregs: bool,
    /// The output of the PC/AT's interrupt controllers.
    pic_output: AtomicBool,
    /// vCPU 0, which has to leave the kernel to look at it.
    first: OnceLock<Arc<kick::KvmKicker>>,
}

/// A virtual machine on KVM.
#[derive(Debug)]
pub struct KvmVm {
    kvm: Kvm,
    shared: Arc<Shared>,
    slots: Mutex<BTreeMap<u32, Slot>>,
    /// Some slot logs.
    logging: AtomicBool,
    routes: Mutex<Routes>,
    max_vcpus: u32,
    readonly_memory: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while holding one of these locks leaves no half-done state worth dying for.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvmVm {
    /// Makes a VM through `/dev/kvm`.
    ///
    /// # Errors
    /// `Unavailable` where there is no KVM or no permission; `Missing` where it lacks
    /// something this backend cannot do without.
    pub fn new() -> Result<Self> {
        match std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
        {
            Ok(device) => Self::with_device(device.into()),
            Err(error) => Err(Error::Unavailable {
                backend: Backend::Kvm,
                reason: format!("/dev/kvm: {error}"),
            }),
        }
    }

    /// Makes a VM through an open `/dev/kvm`, for a process that may not open it itself.
    ///
    /// # Errors
    /// As [`KvmVm::new`].
    pub fn with_device(device: OwnedFd) -> Result<Self> {
        kick::install()?;
        // SAFETY: the descriptor is ours alone (OwnedFd); if it isn't /dev/kvm, the version
        // ioctl below fails.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(Error::Unavailable {
                backend: Backend::Kvm,
                reason: format!("KVM API version {version}, {API_VERSION} is needed"),
            });
        }
        for (cap, name) in [
            (Cap::SplitIrqchip, "the split interrupt controller"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::UserMemory, "user memory"),
            (Cap::ExtCpuid, "CPUID"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(Error::Missing(name));
            }
        }
        let vm = os("KVM_CREATE_VM", kvm.create_vm())?;
        if vm.check_extension(Cap::SetTssAddr) {
            os("KVM_SET_TSS_ADDR", vm.set_tss_address(TSS_ADDRESS))?;
        }
        if vm.check_extension(Cap::SetIdentityMapAddr) {
            let address = IDENTITY_MAP_ADDRESS;
            os(
                "KVM_SET_IDENTITY_MAP_ADDR",
                vm.set_identity_map_address(address),
            )?;
        }
        enable(&vm, KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS as u64)?;
        if vm.check_extension(Cap::X2ApicApi) {
            let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
            enable(&vm, KVM_CAP_X2APIC_API, u64::from(flags))?;
        }
        if vm.check_extension(Cap::X86UserSpaceMsr) {
            let reasons = KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL;
            enable(&vm, KVM_CAP_X86_USER_SPACE_MSR, u64::from(reasons))?;
        }
        if vm.check_extension_raw(u64::from(KVM_CAP_EXIT_ON_EMULATION_FAILURE)) > 0 {
            enable(&vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)?;
        }

        let xsave_size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let mut msrs = os("KVM_GET_MSR_INDEX_LIST", kvm.get_msr_index_list())?
            .as_slice()
            .to_vec();
        let has_mce = vm.check_extension(Cap::Mce);
        if has_mce {
            // The list leaves them out.
            msrs.extend(softcpu::MACHINE_CHECK_BANKS);
        }
        let max_vcpus = u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX);
        let readonly_memory = vm.check_extension(Cap::ReadonlyMem);
        let shared = Shared {
            xsave_size,
            msrs,
            has_mce,
            has_xcrs: vm.check_extension(Cap::Xcrs),
            has_debugregs: vm.check_extension(Cap::Debugregs),
            pic_output: AtomicBool::new(false),
            first: OnceLock::new(),
            vm,
        };
        Ok(Self {
            kvm,
            shared: Arc::new(shared),
            slots: Mutex::default(),
            logging: AtomicBool::new(false),
            routes: Mutex::default(),
            max_vcpus,
            readonly_memory,
        })
    }

    fn need(&self, cap: Cap, name: &'static str) -> Result<()> {
        if self.shared.vm.check_extension(cap) {
            Ok(())
        } else {
            Err(Error::Missing(name))
        }
    }

    fn set_region(&self, region: kvm_userspace_memory_region) -> Result<()> {
        // SAFETY: `map_memory`'s caller promises that the host range stays valid while the
        // slot exists; deleting a slot (size 0) is always sound.
        os("KVM_SET_USER_MEMORY_REGION", unsafe {
            self.shared.vm.set_user_memory_region(region)
        })
    }
}

fn enable(vm: &VmFd, cap: u32, arg: u64) -> Result<()> {
    let request = kvm_enable_cap {
        cap,
        args: [arg, 0, 0, 0],
        ..Default::default()
    };
    os("KVM_ENABLE_CAP", vm.enable_cap(&request))
}

impl Vm for KvmVm {
    fn backend(&self) -> Backend {
        Backend::Kvm
    }

    fn max_vcpus(&self) -> u32 {
        self.max_vcpus
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        let cpuid = os(
            "KVM_GET_SUPPORTED_CPUID",
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
        )?;
        let mut entries: Vec<CpuidEntry> = cpuid
            .as_slice()
            .iter()
            .map(|e| CpuidEntry {
                function: e.function,
                index: e.index,
                index_significant: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
            })
            .collect();
        // KVM leaves this bit to whoever makes the local APIC, and says so by capability.
        if self.shared.vm.check_extension(Cap::TscDeadlineTimer)
            && let Some(leaf) = entries.iter_mut().find(|e| e.function == 1)
        {
            leaf.ecx |= crate::cpu::bits::TSC_DEADLINE;
        }
        Ok(entries)
    }

    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()> {
        crate::check_slot(&slot)?;
        if slot.readonly && !self.readonly_memory {
            return Err(Error::Missing("read-only memory"));
        }
        let mut flags = 0;
        if slot.readonly {
            flags |= KVM_MEM_READONLY;
        }
        if slot.log_dirty {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags,
            guest_phys_addr: slot.gpa,
            memory_size: slot.len,
            userspace_addr: slot.host.addr() as u64,
        };
        let mut slots = lock(&self.slots);
        if let Some(old) = slots.get(&slot.id) {
            // The kernel changes a slot's dirty logging in place, and nothing else.
            let in_place = old.region.memory_size == region.memory_size
                && old.region.userspace_addr == region.userspace_addr
                && old.region.guest_phys_addr == region.guest_phys_addr
                && (old.region.flags ^ region.flags) & KVM_MEM_READONLY == 0;
            if !in_place {
                let gone = kvm_userspace_memory_region {
                    memory_size: 0,
                    flags: 0,
                    ..old.region
                };
                self.set_region(gone)?;
                slots.remove(&slot.id);
            }
        }
        self.set_region(region)?;
        let words = if slot.log_dirty {
            usize::try_from((slot.len >> 12).div_ceil(64))
                .map_err(|_| Error::Invalid(format!("memory slot {} is too large", slot.id)))?
        } else {
            0
        };
        let mut device_writes = slots
            .remove(&slot.id)
            .map_or(Vec::new(), |old| old.device_writes);
        device_writes.resize(words, 0);
        slots.insert(
            slot.id,
            Slot {
                region,
                device_writes,
            },
        );
        let logging = slots.values().any(|slot| !slot.device_writes.is_empty());
        self.logging.store(logging, Ordering::Release);
        Ok(())
    }

    fn unmap_memory(&self, id: u32) -> Result<()> {
        let mut slots = lock(&self.slots);
        let Some(old) = slots.get(&id) else {
            return Err(Error::Invalid(format!("there is no memory slot {id}")));
        };
        let gone = kvm_userspace_memory_region {
            memory_size: 0,
            flags: 0,
            ..old.region
        };
        self.set_region(gone)?;
        slots.remove(&id);
        Ok(())
    }

    fn dirty_log(&self, id: u32) -> Result<Vec<u64>> {
        let mut slots = lock(&self.slots);
        match slots.get_mut(&id) {
            Some(slot) if slot.region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0 => {
                let len = usize::try_from(slot.region.memory_size)
                    .map_err(|_| Error::Invalid(format!("memory slot {id} is too large")))?;
                let mut log = os("KVM_GET_DIRTY_LOG", self.shared.vm.get_dirty_log(id, len))?;
                for (word, written) in log.iter_mut().zip(&mut slot.device_writes) {
                    *word |= std::mem::take(written);
                }
                Ok(log)
            }
            Some(_) => Err(crate::not_logged(id)),
            None => Err(Error::Invalid(format!("there is no memory slot {id}"))),
        }
    }

    fn memory_written(&self, gpa: u64, len: u64) {
        // The kernel notes only what vCPUs write.
        if len == 0 || !self.logging.load(Ordering::Acquire) {
            return;
        }
        for slot in lock(&self.slots).values_mut() {
            let end = slot.region.guest_phys_addr + slot.region.memory_size;
            let first = gpa.max(slot.region.guest_phys_addr);
            let last = gpa.saturating_add(len).min(end);
            if first >= last {
                continue;
            }
            let page = |at: u64| (at - slot.region.guest_phys_addr) >> 12;
            for page in page(first)..=page(last - 1) {
                let word = usize::try_from(page / 64).unwrap_or(usize::MAX);
                if let Some(word) = slot.device_writes.get_mut(word) {
                    *word |= 1 << (page % 64);
                }
            }
        }
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        let fd = os("KVM_CREATE_VCPU", self.shared.vm.create_vcpu(u64::from(id)))?;
        if self.shared.has_mce {
            ioctl::setup_mce(&fd, softcpu::MCG_CAP)?;
        }
        let vcpu = KvmVcpu::new(id, fd, Arc::clone(&self.shared));
        if id == 0 {
            // There is one vCPU 0: the kernel refuses a second.
            let _ = self.shared.first.set(vcpu.own_kicker());
        }
        Ok(Box::new(vcpu))
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        let request = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // 0: the guest blocked it (a disabled APIC), as hardware would.
        os("KVM_SIGNAL_MSI", self.shared.vm.signal_msi(request)).map(drop)
    }

    fn set_ioapic_routes(&self, pins: &[Option<(Msi, bool)>]) -> Result<()> {
        lock(&self.routes).set_pins(&self.shared.vm, pins)
    }

    fn set_pic_output(&self, level: bool) -> Result<()> {
        self.shared.pic_output.store(level, Ordering::SeqCst);
        if level && let Some(kicker) = self.shared.first.get() {
            kicker.kick();
        }
        Ok(())
    }

    fn register_irqfd(&self, fd: BorrowedFd<'_>, gsi: u32, msi: Msi) -> Result<()> {
        self.need(Cap::Irqfd, "irqfd")?;
        let mut routes = lock(&self.routes);
        let fresh = routes.add(&self.shared.vm, gsi, msi)?;
        if fresh {
            ioctl::irqfd(&self.shared.vm, fd, gsi, false).inspect_err(|_| {
                // The route alone does nothing; that it goes too is only tidiness.
                let _ = routes.remove(&self.shared.vm, gsi);
            })
        } else {
            Ok(())
        }
    }

    fn unregister_irqfd(&self, fd: BorrowedFd<'_>, gsi: u32) -> Result<()> {
        let mut routes = lock(&self.routes);
        ioctl::irqfd(&self.shared.vm, fd, gsi, true)?;
        routes.remove(&self.shared.vm, gsi)
    }

    fn register_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        addr: IoAddress,
        len: u8,
        datamatch: Option<u64>,
    ) -> Result<()> {
        self.need(Cap::Ioeventfd, "ioeventfd")?;
        ioctl::ioeventfd(&self.shared.vm, fd, addr, len, datamatch, false)
    }

    fn unregister_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        addr: IoAddress,
        len: u8,
        datamatch: Option<u64>,
    ) -> Result<()> {
        ioctl::ioeventfd(&self.shared.vm, fd, addr, len, datamatch, true)
    }

    fn clock(&self) -> Result<u64> {
        self.need(Cap::AdjustClock, "a settable clock")?;
        Ok(os("KVM_GET_CLOCK", self.shared.vm.get_clock())?.clock)
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<()> {
        self.need(Cap::AdjustClock, "a settable clock")?;
        let clock = kvm_clock_data {
            clock: nanoseconds,
            ..Default::default()
        };
        os("KVM_SET_CLOCK", self.shared.vm.set_clock(&clock))
    }
}
