//! Error conversion, and the ioctls whose wrappers in kvm-ioctls ask for more than we have.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVMIO, kvm_interrupt, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_irqfd,
};

use crate::{Error, IoAddress, Result};

/// Names the call in an error of kvm-ioctls.
pub(super) fn os<T>(
    call: &'static str,
    result: std::result::Result<T, kvm_ioctls::Error>,
) -> Result<T> {
    result.map_err(|error| Error::Os {
        call,
        source: std::io::Error::from_raw_os_error(error.errno()),
    })
}

/// `_IOW(KVMIO, nr, T)` (Linux, include/uapi/asm-generic/ioctl.h).
const fn iow<T>(nr: u64) -> u64 {
    (1 << 30) | ((size_of::<T>() as u64) << 16) | ((KVMIO as u64) << 8) | nr
}

const KVM_INTERRUPT: u64 = iow::<kvm_interrupt>(0x86);
const KVM_IRQFD: u64 = iow::<kvm_irqfd>(0x76);
const KVM_IOEVENTFD: u64 = iow::<kvm_ioeventfd>(0x79);
const KVM_X86_SETUP_MCE: u64 = iow::<u64>(0x9c);
/// `KVM_IRQFD_FLAG_DEASSIGN`.
const IRQFD_DEASSIGN: u32 = 1;

fn write_ioctl<T>(fd: &impl AsRawFd, call: &'static str, request: u64, value: &T) -> Result<()> {
    // SAFETY: every `request` passed here is an _IOW whose size is that of `T`, so the kernel
    // only reads `size_of::<T>()` bytes of a live value.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_ref(value)) } {
        -1 => Err(Error::Os {
            call,
            source: std::io::Error::last_os_error(),
        }),
        _ => Ok(()),
    }
}

/// Injects an interrupt as an 8259 would.
pub(super) fn interrupt(vcpu: &impl AsRawFd, vector: u8) -> Result<()> {
    let request = kvm_interrupt { irq: vector.into() };
    write_ioctl(vcpu, "KVM_INTERRUPT", KVM_INTERRUPT, &request)
}

/// Gives a vCPU the machine-check banks of this IA32_MCG_CAP.
pub(super) fn setup_mce(vcpu: &impl AsRawFd, mcg_cap: u64) -> Result<()> {
    write_ioctl(vcpu, "KVM_X86_SETUP_MCE", KVM_X86_SETUP_MCE, &mcg_cap)
}

/// Connects `fd` with `gsi`, or undoes it.
pub(super) fn irqfd(vm: &impl AsRawFd, fd: BorrowedFd<'_>, gsi: u32, deassign: bool) -> Result<()> {
    let request = kvm_irqfd {
        fd: fd.as_raw_fd().cast_unsigned(),
        gsi,
        flags: if deassign { IRQFD_DEASSIGN } else { 0 },
        ..Default::default()
    };
    write_ioctl(vm, "KVM_IRQFD", KVM_IRQFD, &request)
}

/// Registers a doorbell, or takes it away.
pub(super) fn ioeventfd(
    vm: &impl AsRawFd,
    fd: BorrowedFd<'_>,
    addr: IoAddress,
    len: u8,
    datamatch: Option<u64>,
    deassign: bool,
) -> Result<()> {
    let mut flags = 0;
    let addr = match addr {
        IoAddress::Port(port) => {
            flags |= 1 << kvm_ioeventfd_flag_nr_pio;
            u64::from(port)
        }
        IoAddress::Mmio(addr) => addr,
    };
    if datamatch.is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    if deassign {
        flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
    }
    let request = kvm_ioeventfd {
        datamatch: datamatch.unwrap_or(0),
        addr,
        len: u32::from(len),
        fd: fd.as_raw_fd(),
        flags,
        ..Default::default()
    };
    write_ioctl(vm, "KVM_IOEVENTFD", KVM_IOEVENTFD, &request)
}
