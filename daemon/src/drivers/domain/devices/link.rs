//! The host's network devices, by rtnetlink(7).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// struct nlmsghdr and struct ifinfomsg, bytes.
const HEADER: usize = 16;
const INFO: usize = 16;

const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_MACVLAN_MODE: u16 = 1;

/// How long the kernel may take to answer, seconds.
const LIMIT: libc::time_t = 5;

/// What is done to a device.
#[derive(Debug, Default)]
struct Message {
    body: Vec<u8>,
}

impl Message {
    fn attribute(&mut self, kind: u16, value: &[u8]) -> io::Result<()> {
        let len = u16::try_from(value.len() + 4)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.body.extend(len.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        Ok(())
    }

    fn word(&mut self, kind: u16, value: u32) -> io::Result<()> {
        self.attribute(kind, &value.to_ne_bytes())
    }

    fn nested(&mut self, kind: u16, inside: Self) -> io::Result<()> {
        self.attribute(kind, &inside.body)
    }

    /// Sends it as a message about device `index`, and waits for the kernel's answer.
    fn send(self, kind: u16, flags: libc::c_int, index: u32, up: Option<bool>) -> io::Result<()> {
        let length = u32::try_from(HEADER + INFO + self.body.len())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut bytes = Vec::new();
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        let flags = flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK;
        bytes.extend((flags as u16).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend([0; 4]);
        bytes.extend(index.to_ne_bytes());
        let up_flag = libc::IFF_UP as u32;
        let (value, mask) = match up {
            None => (0, 0),
            Some(up) => (if up { up_flag } else { 0 }, up_flag),
        };
        bytes.extend(value.to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes.extend(self.body);
        let mut socket = socket()?;
        socket.write_all(&bytes)?;
        let mut answer = [0; 4096];
        let n = socket.read(&mut answer)?;
        // An nlmsghdr of type NLMSG_ERROR, and a negative errno or 0.
        let kind = answer[..n]
            .get(4..6)
            .map(|b| u16::from_ne_bytes([b[0], b[1]]));
        let code = answer[..n]
            .get(16..20)
            .and_then(|b| b.try_into().ok())
            .map(i32::from_ne_bytes);
        match (kind.map(libc::c_int::from), code) {
            (Some(libc::NLMSG_ERROR), Some(0)) => Ok(()),
            (Some(libc::NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
            _ => Err(io::Error::other("the kernel's answer makes no sense")),
        }
    }
}

fn socket() -> io::Result<File> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket(2) takes numbers and returns a descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    let socket = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let limit = libc::timeval {
        tv_sec: LIMIT,
        tv_usec: 0,
    };
    // SAFETY: the timeval lives here and has the size that is named.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const limit).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// The number of the device called `name`.
///
/// # Errors
/// There is none.
pub fn index(name: &str) -> io::Result<u32> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: the name ends with a zero byte and lives here.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Settings of a device; what is `None` stays.
#[derive(Debug, Clone, Copy, Default)]
pub struct Settings {
    /// Its hardware address.
    pub mac: Option<[u8; 6]>,
    /// Its longest packet, bytes.
    pub mtu: Option<u32>,
    /// The number of the bridge it is a port of.
    pub bridge: Option<u32>,
    /// Up or down.
    pub up: Option<bool>,
}

/// Changes the device with that number.
///
/// # Errors
/// The system's.
pub fn set(index: u32, settings: Settings) -> io::Result<()> {
    // The kernel takes one message's attributes in an order of its own: the port's settings
    // first, as a bridge takes its MTU from its ports, then up.
    let mut message = Message::default();
    if let Some(mac) = settings.mac {
        message.attribute(libc::IFLA_ADDRESS, &mac)?;
    }
    if let Some(mtu) = settings.mtu {
        message.word(libc::IFLA_MTU, mtu)?;
    }
    if !message.body.is_empty() {
        message.send(libc::RTM_NEWLINK, 0, index, None)?;
    }
    if let Some(bridge) = settings.bridge {
        let mut message = Message::default();
        message.word(libc::IFLA_MASTER, bridge)?;
        message.send(libc::RTM_NEWLINK, 0, index, None)?;
    }
    match settings.up {
        Some(up) => Message::default().send(libc::RTM_NEWLINK, 0, index, Some(up)),
        None => Ok(()),
    }
}

/// Makes a macvtap on the device with the number `lower`.
///
/// # Errors
/// The system's.
pub fn make_macvtap(name: &str, lower: u32, mode: u32, mac: [u8; 6]) -> io::Result<()> {
    let mut data = Message::default();
    data.word(IFLA_MACVLAN_MODE, mode)?;
    let mut info = Message::default();
    info.attribute(IFLA_INFO_KIND, b"macvtap\0")?;
    info.nested(IFLA_INFO_DATA, data)?;
    let mut message = Message::default();
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    message.attribute(libc::IFLA_IFNAME, &bytes)?;
    message.attribute(libc::IFLA_ADDRESS, &mac)?;
    message.word(libc::IFLA_LINK, lower)?;
    message.nested(libc::IFLA_LINKINFO, info)?;
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    message.send(libc::RTM_NEWLINK, flags, 0, None)
}

/// Removes a device; that it is not there is fine.
///
/// # Errors
/// The system's.
pub fn remove(name: &str) -> io::Result<()> {
    match index(name) {
        Ok(index) => Message::default().send(libc::RTM_DELLINK, 0, index, None),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether the device called `name` is a bridge.
pub fn is_bridge(name: &str) -> bool {
    std::path::Path::new("/sys/class/net")
        .join(name)
        .join("bridge")
        .exists()
}
