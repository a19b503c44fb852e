//! A tap or macvtap device's queue.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::backend::{Backend, HEADER, Trouble};
use super::features as f;

/// The kernel's interface: `linux/if_tun.h`.
mod tun {
    use std::ffi::{c_int, c_uint};

    nix::ioctl_write_int_bad!(set_offload, 0x4004_54d0);
    nix::ioctl_write_ptr_bad!(set_vnet_header_size, 0x4004_54d8, c_int);
    nix::ioctl_write_ptr_bad!(set_vnet_le, 0x4004_54dc, c_int);
    nix::ioctl_write_ptr_bad!(set_queue, 0x4004_54d9, libc::ifreq);
    nix::ioctl_read_bad!(get_interface, 0x8004_54d2, libc::ifreq);

    pub const CSUM: c_uint = 0x01;
    pub const TSO4: c_uint = 0x02;
    pub const TSO6: c_uint = 0x04;
    pub const TSO_ECN: c_uint = 0x08;
    pub const UFO: c_uint = 0x10;
}

/// One queue of a tap or macvtap device that was made with `IFF_VNET_HDR`.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// It can be detached from its device.
    multi_queue: bool,
    active: bool,
}

impl Tap {
    /// Takes over a descriptor of /dev/net/tun or /dev/tapN.
    ///
    /// # Errors
    /// Not such a device, made without `IFF_VNET_HDR`, or the kernel's refusal.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = flags(&fd)?;
        if flags & libc::IFF_VNET_HDR == 0 {
            return Err(io::Error::other(
                "the tap device was made without IFF_VNET_HDR",
            ));
        }
        let status = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(status | OFlag::O_NONBLOCK))?;
        let raw = fd.as_raw_fd();
        let size = HEADER as libc::c_int;
        // SAFETY: the descriptor is open, and the kernel reads one int.
        unsafe { tun::set_vnet_header_size(raw, &raw const size) }?;
        let little = 1;
        // SAFETY: as above.
        unsafe { tun::set_vnet_le(raw, &raw const little) }?;
        let mut tap = Self {
            fd,
            multi_queue: flags & libc::IFF_MULTI_QUEUE != 0,
            active: true,
        };
        tap.set_offloads(0)?;
        Ok(tap)
    }
}

/// The device's flags.
fn flags(fd: &OwnedFd) -> io::Result<libc::c_int> {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the kernel writes one ifreq.
    unsafe { tun::get_interface(fd.as_raw_fd(), &raw mut request) }?;
    // SAFETY: the kernel has filled in the flags.
    Ok(i32::from(unsafe { request.ifr_ifru.ifru_flags }) & 0xffff)
}

impl Backend for Tap {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn offloads(&self) -> u64 {
        f::OFFLOADS
    }

    fn set_offloads(&mut self, offloads: u64) -> io::Result<()> {
        let mut flags = 0;
        for (feature, flag) in [
            (f::GUEST_CSUM, tun::CSUM),
            (f::GUEST_TSO4, tun::TSO4),
            (f::GUEST_TSO6, tun::TSO6),
            (f::GUEST_ECN, tun::TSO_ECN),
            (f::GUEST_UFO, tun::UFO),
        ] {
            if offloads & feature != 0 {
                flags |= flag;
            }
        }
        // The kernel refuses segments without checksums (5.1.3.1 as well).
        if flags & tun::CSUM == 0 {
            flags = 0;
        } else if flags & (tun::TSO4 | tun::TSO6) == 0 {
            flags &= !tun::TSO_ECN;
        }
        // SAFETY: the descriptor is open; the argument is a number.
        unsafe { tun::set_offload(self.fd.as_raw_fd(), flags.cast_signed()) }?;
        Ok(())
    }

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        if active == self.active || !self.multi_queue {
            return Ok(());
        }
        // SAFETY: all zeroes is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if active {
            libc::IFF_ATTACH_QUEUE as libc::c_short
        } else {
            libc::IFF_DETACH_QUEUE as libc::c_short
        };
        // SAFETY: the descriptor is open, and the kernel reads one ifreq.
        unsafe { tun::set_queue(self.fd.as_raw_fd(), &raw const request) }?;
        self.active = active;
        Ok(())
    }

    unsafe fn receive(&mut self, buffers: &[libc::iovec]) -> Result<usize, Trouble> {
        // SAFETY: the caller vouches for the buffers; their number is passed with them.
        let read = unsafe {
            libc::readv(
                self.fd.as_raw_fd(),
                buffers.as_ptr(),
                buffers.len() as libc::c_int,
            )
        };
        match usize::try_from(read) {
            Ok(0) => Err(Trouble::Gone),
            Ok(read) => Ok(read),
            Err(_) => Err(failed()),
        }
    }

    unsafe fn send(&mut self, buffers: &[libc::iovec], _len: usize) -> Result<(), Trouble> {
        // SAFETY: as above.
        let written = unsafe {
            libc::writev(
                self.fd.as_raw_fd(),
                buffers.as_ptr(),
                buffers.len() as libc::c_int,
            )
        };
        if written < 0 { Err(failed()) } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Trouble> {
        Ok(())
    }
}

fn failed() -> Trouble {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // The device was taken away beneath us.
        Some(libc::EBADFD | libc::ENODEV | libc::ENXIO) => Trouble::Gone,
        _ => error.into(),
    }
}
