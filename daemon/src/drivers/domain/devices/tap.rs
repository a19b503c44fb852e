//! Tap devices: descriptors of /dev/net/tun.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Longest name of a network device, bytes.
pub const LONGEST_NAME: usize = libc::IFNAMSIZ - 1;

/// Bytes of the header before each frame: `virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const HEADER: libc::c_int = 12;

/// Opens `queues` queues of the tap called `name`; a name with `%d` makes a new one with the
/// lowest free number. Frames have virtio's header. Also the device's name.
///
/// A tap that is made here goes with its last descriptor.
///
/// # Errors
/// The system's; [`io::ErrorKind::InvalidInput`] for a name that cannot be one.
pub fn open(name: &str, queues: u16) -> io::Result<(Vec<File>, String)> {
    let mut name = name.to_owned();
    let mut files = Vec::new();
    for _ in 0..queues.max(1) {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        name = match attach(&file, &name, flags) {
            // One that somebody has made for several queues can be used with one.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && queues <= 1 => {
                attach(&file, &name, flags | libc::IFF_MULTI_QUEUE)?
            }
            attached => attached?,
        };
        set_header(&file)?;
        files.push(file);
    }
    Ok((files, name))
}

fn attach(file: &File, name: &str, flags: libc::c_int) -> io::Result<String> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "not a device's name");
    if name.is_empty() || name.len() > LONGEST_NAME || name.bytes().any(|b| b == 0) {
        return Err(invalid());
    }
    // SAFETY: an ifreq of zeroes is valid: numbers, and a union of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the request, which lives here.
    if unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETIFF as libc::Ioctl,
            &mut request,
        )
    } < 0
    {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel ends the name with a zero byte within the array.
    let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
    name.to_str().map(str::to_owned).map_err(|_| invalid())
}

/// Frames get virtio's header, little-endian.
///
/// # Errors
/// The system's.
pub fn set_header(file: &File) -> io::Result<()> {
    let size = HEADER;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives here.
    if unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETVNETHDRSZ as libc::Ioctl,
            &size,
        )
    } < 0
    {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the flags of a macvtap's descriptor, which is attached already.
///
/// # Errors
/// The system's.
pub fn adopt(file: &File, queues: u16) -> io::Result<()> {
    // SAFETY: an ifreq of zeroes is valid: numbers, and a union of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes the request, which lives here.
    if unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNGETIFF as libc::Ioctl,
            &mut request,
        )
    } < 0
    {
        return Err(io::Error::last_os_error());
    }
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the request, which lives here.
    if unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETIFF as libc::Ioctl,
            &mut request,
        )
    } < 0
    {
        return Err(io::Error::last_os_error());
    }
    set_header(file)
}
