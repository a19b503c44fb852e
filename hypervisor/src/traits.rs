//! The trait family every backend implements.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::Bus;

/// Which CPU runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Hardware virtualization through `/dev/kvm`.
    Kvm,
    /// The software CPU of the `softcpu` crate.
    Soft,
}

/// What went wrong in a backend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host cannot run this backend at all.
    #[error("{backend:?} is not usable here: {reason}")]
    Unavailable {
        /// The backend asked for.
        backend: Backend,
        /// Why not, in words for the user.
        reason: String,
    },
    /// An optional capability that is needed is missing.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
    /// A system call failed.
    #[error("{call}: {source}")]
    Os {
        /// The ioctl or system call.
        call: &'static str,
        /// Its error.
        source: std::io::Error,
    },
    /// The caller asked for something impossible.
    #[error("{0}")]
    Invalid(String),
}

/// Result of backend calls.
pub type Result<T> = std::result::Result<T, Error>;

/// A range of guest-physical memory backed by host memory.
#[derive(Debug, Clone, Copy)]
pub struct MemorySlot {
    /// Slot number; a second `map_memory` with the same number replaces the first.
    pub id: u32,
    /// Guest-physical start, 4 KiB aligned.
    pub gpa: u64,
    /// Length in bytes, a multiple of 4 KiB.
    pub len: u64,
    /// Host address of the first byte, 4 KiB aligned.
    pub host: *mut u8,
    /// Guest writes become `Bus::mmio_write` (ROM).
    pub readonly: bool,
    /// Record written pages for `dirty_log`.
    pub log_dirty: bool,
}

/// A message-signalled interrupt (Intel SDM vol. 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Msi {
    /// Address the device would write to.
    pub address: u64,
    /// Data it would write.
    pub data: u32,
}

/// A CPUID leaf as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on input.
    pub function: u32,
    /// ECX on input, where `index_significant`.
    pub index: u32,
    /// The leaf depends on ECX.
    pub index_significant: bool,
    /// Result.
    pub eax: u32,
    /// Result.
    pub ebx: u32,
    /// Result.
    pub ecx: u32,
    /// Result.
    pub edx: u32,
}

/// Where a doorbell (ioeventfd) listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoAddress {
    /// A port.
    Port(u16),
    /// Guest-physical memory outside RAM.
    Mmio(u64),
}

/// A virtual machine: memory, interrupts, clock, and the maker of its vCPUs.
pub trait Vm: Send + Sync + std::fmt::Debug {
    /// Which backend this is.
    fn backend(&self) -> Backend;

    /// Largest number of vCPUs.
    fn max_vcpus(&self) -> u32;

    /// Leaves this backend can give a guest (the set to choose from, host-independent bits
    /// such as APIC ids left zero).
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>>;

    /// Makes host memory visible to the guest.
    ///
    /// # Safety
    /// `slot.host .. + slot.len` must stay mapped, readable and writable until the slot is
    /// unmapped or the VM and all of its vCPUs are dropped, and must be memory that anyone
    /// may write at any time (it is never the target of a Rust reference).
    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()>;

    /// Takes a slot away.
    fn unmap_memory(&self, id: u32) -> Result<()>;

    /// Pages of slot `id` written since the last call, one bit a 4 KiB page, and clears them.
    fn dirty_log(&self, id: u32) -> Result<Vec<u64>>;

    /// A device has written `len` bytes of RAM at guest-physical `gpa` (through the host mapping):
    /// dirty logs record it, and a software CPU forgets code it decoded there. To be called
    /// before the guest is told of the bytes.
    fn memory_written(&self, gpa: u64, len: u64);

    /// Makes vCPU `id` (also its initial APIC id).
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;

    /// Begins to record writes to a slot anew, or ends: `slot` is mapped already, and but for that is as it was, content
    /// too.
    ///
    /// # Safety
    /// As `map_memory`.
    ///
    /// # Errors
    /// As `map_memory`.
    unsafe fn log_writes(&self, slot: MemorySlot) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.map_memory(slot) }
    }

    /// Does once what otherwise the first instructions would wait for, where there is such a thing.
    fn get_ready(&self) {}

    /// Where the code is that each vCPU has run lately, by its number, for [`Vcpu::decode_ahead`] of another machine with
    /// the same memory; nothing where that would gain nothing.
    fn recent_code(&self) -> Vec<(u32, Vec<u64>)> {
        Vec::new()
    }

    /// Delivers an MSI now.
    fn signal_msi(&self, msi: Msi) -> Result<()>;

    /// Tells the backend which MSI each of the I/O APIC's pins would send, `None` where
    /// masked, and whether it is level-triggered: it then reports EOIs of those vectors
    /// (`Exit::IoapicEoi`).
    fn set_ioapic_routes(&self, pins: &[Option<(Msi, bool)>]) -> Result<()>;

    /// The output of a PC/AT's interrupt controllers is now `level`: vCPU 0 gets it at LINT0,
    /// and asks the bus for the vector (`Bus::interrupt_acknowledge`) when it takes it.
    fn set_pic_output(&self, level: bool) -> Result<()>;

    /// Every time `fd` (an eventfd) is signalled, `msi` is delivered. `gsi` names the
    /// registration (24 to 4095; 0..24 are the I/O APIC's pins); registering it again with
    /// the same `fd` changes the message.
    fn register_irqfd(&self, fd: BorrowedFd<'_>, gsi: u32, msi: Msi) -> Result<()>;

    /// Undoes `register_irqfd`.
    fn unregister_irqfd(&self, fd: BorrowedFd<'_>, gsi: u32) -> Result<()>;

    /// A write of `len` bytes (any value where `datamatch` is `None`) to `addr` signals `fd`
    /// instead of reaching the bus.
    fn register_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        addr: IoAddress,
        len: u8,
        datamatch: Option<u64>,
    ) -> Result<()>;

    /// Undoes `register_ioeventfd`.
    fn unregister_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        addr: IoAddress,
        len: u8,
        datamatch: Option<u64>,
    ) -> Result<()>;

    /// The paravirtual clock, nanoseconds since the VM's start.
    fn clock(&self) -> Result<u64>;

    /// Sets the paravirtual clock (resume, restore). All vCPUs are out of `run`.
    fn set_clock(&self, nanoseconds: u64) -> Result<()>;
}

/// Why `run` returned. Port I/O and MMIO do not leave `run`: they go to the [`Bus`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// `Kicker::kick` was called, or a signal arrived.
    Kicked,
    /// A bus write returned `Flow::Stop`.
    Stopped,
    /// Triple fault.
    Shutdown,
    /// The guest acknowledged a level-triggered interrupt of the I/O APIC with this vector.
    IoapicEoi(u8),
    /// `hlt` with interrupts off and nothing that could wake this vCPU but NMI, INIT or SMI;
    /// reported once per halt where the backend can tell, so that a stopped machine is noticed.
    DeadHalt,
    /// A breakpoint, a watched access or a single step of `Vcpu::set_debug`. RIP is at the
    /// breakpoint, or behind the instruction that accessed or stepped.
    Debug {
        /// Linear address of what is watched and was accessed.
        watch: Option<u64>,
    },
    /// The backend cannot execute the guest's next instruction.
    InternalError {
        /// What the backend says, with the instruction's bytes where known.
        reason: String,
        /// Guest RIP.
        rip: u64,
    },
}

/// What an external debugger wants of a vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugControl {
    /// Leave `run` after every instruction.
    pub single_step: bool,
    /// Leave `run` before the instruction at one of these linear addresses.
    pub breakpoints: Vec<u64>,
    /// Leave `run` after an instruction that accesses one of these.
    pub watchpoints: Vec<Watchpoint>,
}

/// Data that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    /// Linear address of the first byte.
    pub address: u64,
    /// Bytes. KVM: 1, 2, 4 or 8, and the address a multiple of them.
    pub len: u64,
    /// Reads count too, not only writes.
    pub reads: bool,
}

/// One virtual CPU. Created on any thread, run on one.
pub trait Vcpu: Send + std::fmt::Debug {
    /// Runs the guest until something other than I/O needs the caller. A kick that came
    /// before the call makes it return at once. A halted vCPU sleeps inside `run`.
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit>;

    /// A handle that other threads use to get this vCPU out of `run`.
    fn kicker(&self) -> Arc<dyn Kicker>;

    /// Sets what CPUID answers. Before the first `run`.
    fn set_cpuid(&mut self, leaves: &[CpuidEntry]) -> Result<()>;

    /// The whole guest-visible state. Not while in `run`.
    fn state(&mut self) -> Result<crate::VcpuState>;

    /// Replaces the whole guest-visible state. Not while in `run`.
    fn set_state(&mut self, state: &crate::VcpuState) -> Result<()>;

    /// Replaces what an external debugger wants. Not while in `run`. KVM uses the processor's
    /// own four breakpoints for it, which the guest then can't: more are refused.
    fn set_debug(&mut self, control: &DebugControl) -> Result<()>;

    /// Has the guest know that the machine was stopped for a while, if it reads the paravirtual
    /// clock: its watchdogs then forgive the gap. Not while in `run`.
    fn was_stopped(&mut self) -> Result<()>;

    /// Gets ready for code at these guest-physical addresses as long as `go_on` says so, where that gains something.
    /// They may be wrong, and what is there may change afterwards if the VM is told (`Vm::memory_written`).
    fn decode_ahead(&mut self, code: &[u64], go_on: &dyn Fn() -> bool) {
        let _ = (code, go_on);
    }

    /// Non-maskable interrupt.
    fn inject_nmi(&self) -> Result<()>;
}

/// Gets a vCPU out of `run`, from any thread.
pub trait Kicker: Send + Sync + std::fmt::Debug {
    /// The vCPU's current or next `run` returns `Exit::Kicked` (within 1 ms).
    fn kick(&self);
}

/// Pins of the machine's I/O APIC.
pub const IOAPIC_PINS: usize = 24;
