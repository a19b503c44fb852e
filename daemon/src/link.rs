//! The host's network devices, by rtnetlink(7).

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use xml_schemas::network::Subnet;
use xml_schemas::network::vlan::Tag;

/// struct nlmsghdr, bytes.
const HEADER: usize = 16;

const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_MACVLAN_MODE: u16 = 1;
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_STP_STATE: u16 = 5;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
const BRIDGE_VLAN_INFO_PVID: u16 = 1 << 1;
const BRIDGE_VLAN_INFO_UNTAGGED: u16 = 1 << 2;
const BRIDGE_VLAN_INFO_RANGE_BEGIN: u16 = 1 << 3;
const BRIDGE_VLAN_INFO_RANGE_END: u16 = 1 << 4;
const IFLA_PROTINFO: u16 = 12;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const NLA_F_NESTED: u16 = 1 << 15;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
/// `/proc/sys/net/ipv4/conf` counts in hundredths of a second.
const USER_HZ: u64 = 100;

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
        self.send_link(kind, flags, libc::AF_UNSPEC as u8, index, up)
    }

    fn send_link(
        self,
        kind: u16,
        flags: libc::c_int,
        family: u8,
        index: u32,
        up: Option<bool>,
    ) -> io::Result<()> {
        // struct ifinfomsg
        let mut info = vec![family, 0, 0, 0];
        info.extend(index.to_ne_bytes());
        let up_flag = libc::IFF_UP as u32;
        let (value, mask) = match up {
            None => (0, 0),
            Some(up) => (if up { up_flag } else { 0 }, up_flag),
        };
        info.extend(value.to_ne_bytes());
        info.extend(mask.to_ne_bytes());
        self.send_as(kind, flags, &info)
    }

    /// Sends it behind the structure that its kind of message begins with.
    fn send_as(self, kind: u16, flags: libc::c_int, info: &[u8]) -> io::Result<()> {
        let length = u32::try_from(HEADER + info.len() + self.body.len())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut bytes = Vec::new();
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        let flags = flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK;
        bytes.extend((flags as u16).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(info);
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

/// A bridge to be made.
#[derive(Debug, Clone, Copy)]
pub struct Bridge<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its longest packet, bytes.
    pub mtu: Option<u32>,
    /// It takes part in the spanning tree protocol.
    pub stp: bool,
    /// Its forward delay, seconds.
    pub delay: u64,
    /// Its ports are in VLANs.
    pub vlans: bool,
}

/// Makes a bridge, which is down.
///
/// # Errors
/// The system's; there is a device of that name.
pub fn make_bridge(bridge: Bridge<'_>) -> io::Result<()> {
    let mut data = Message::default();
    let delay = u32::try_from(bridge.delay.saturating_mul(USER_HZ)).unwrap_or(u32::MAX);
    data.word(IFLA_BR_FORWARD_DELAY, delay)?;
    data.word(IFLA_BR_STP_STATE, u32::from(bridge.stp))?;
    if bridge.vlans {
        data.attribute(IFLA_BR_VLAN_FILTERING, &[1])?;
    }
    let mut info = Message::default();
    info.attribute(IFLA_INFO_KIND, b"bridge\0")?;
    info.nested(IFLA_INFO_DATA, data)?;
    let mut message = Message::default();
    let mut bytes = bridge.name.as_bytes().to_vec();
    bytes.push(0);
    message.attribute(libc::IFLA_IFNAME, &bytes)?;
    message.attribute(libc::IFLA_ADDRESS, &bridge.mac)?;
    if let Some(mtu) = bridge.mtu {
        message.word(libc::IFLA_MTU, mtu)?;
    }
    message.nested(libc::IFLA_LINKINFO, info)?;
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    message.send(libc::RTM_NEWLINK, flags, 0, None)
}

/// Whether a bridge's port reaches other isolated ports.
///
/// # Errors
/// The system's; it is no bridge's port.
pub fn isolate_port(index: u32, isolated: bool) -> io::Result<()> {
    let mut settings = Message::default();
    settings.attribute(IFLA_BRPORT_ISOLATED, &[u8::from(isolated)])?;
    let mut message = Message::default();
    message.nested(IFLA_PROTINFO | NLA_F_NESTED, settings)?;
    message.send_link(libc::RTM_SETLINK, 0, libc::AF_BRIDGE as u8, index, None)
}

/// A bridge's port is in these VLANs, and in no other.
///
/// # Errors
/// The system's; it is no bridge's port.
pub fn set_vlans(index: u32, tags: &[Tag]) -> io::Result<()> {
    let send = |kind: u16, infos: &[(u16, u16)]| {
        let mut spec = Message::default();
        for (flags, id) in infos {
            // struct bridge_vlan_info
            let mut info = flags.to_ne_bytes().to_vec();
            info.extend(id.to_ne_bytes());
            spec.attribute(IFLA_BRIDGE_VLAN_INFO, &info)?;
        }
        let mut message = Message::default();
        message.nested(IFLA_AF_SPEC | NLA_F_NESTED, spec)?;
        message.send_link(kind, 0, libc::AF_BRIDGE as u8, index, None)
    };
    // What every new port is in by default goes first.
    send(
        libc::RTM_DELLINK,
        &[
            (BRIDGE_VLAN_INFO_RANGE_BEGIN, 1),
            (BRIDGE_VLAN_INFO_RANGE_END, 4094),
        ],
    )?;
    for tag in tags {
        let mut flags = 0;
        if tag.native {
            flags |= BRIDGE_VLAN_INFO_PVID;
        }
        if tag.untagged {
            flags |= BRIDGE_VLAN_INFO_UNTAGGED;
        }
        send(libc::RTM_SETLINK, &[(flags, tag.id)])?;
    }
    Ok(())
}

/// Whether the bridge called `name` tells VLANs apart.
pub fn filters_vlans(name: &str) -> bool {
    let path = std::path::Path::new("/sys/class/net")
        .join(name)
        .join("bridge/vlan_filtering");
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    family as u8
}

/// Gives the device with that number an address.
///
/// # Errors
/// The system's.
pub fn add_address(index: u32, subnet: Subnet) -> io::Result<()> {
    // A bridge without ports never finishes the detection of duplicates, and nothing can be
    // bound to the address until then.
    let flags = if subnet.address.is_ipv6() {
        libc::IFA_F_NODAD as u8
    } else {
        0
    };
    // struct ifaddrmsg
    let mut info = vec![
        family(subnet.address),
        subnet.prefix,
        flags,
        libc::RT_SCOPE_UNIVERSE,
    ];
    info.extend(index.to_ne_bytes());
    let mut message = Message::default();
    let bytes = octets(subnet.address);
    message.attribute(libc::IFA_LOCAL, &bytes)?;
    message.attribute(libc::IFA_ADDRESS, &bytes)?;
    if let Some(broadcast) = subnet.broadcast().filter(|_| subnet.prefix < 31) {
        message.attribute(libc::IFA_BROADCAST, &broadcast.octets())?;
    }
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    message.send_as(libc::RTM_NEWADDR, flags, &info)
}

/// Adds a route by a gateway behind the device with that number.
///
/// # Errors
/// The system's.
pub fn add_route(index: u32, to: Subnet, gateway: IpAddr, metric: u32) -> io::Result<()> {
    // struct rtmsg
    let mut info = vec![
        family(to.address),
        to.prefix,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        libc::RT_SCOPE_UNIVERSE,
        libc::RTN_UNICAST,
    ];
    info.extend(0u32.to_ne_bytes());
    let mut message = Message::default();
    message.attribute(RTA_DST, &octets(to.network()))?;
    message.attribute(RTA_GATEWAY, &octets(gateway))?;
    message.word(RTA_OIF, index)?;
    message.word(RTA_PRIORITY, metric)?;
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    message.send_as(libc::RTM_NEWROUTE, flags, &info)
}

/// The hardware address of the device called `name`; `None` if there is none.
pub fn mac(name: &str) -> Option<[u8; 6]> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)).ok()?;
    // SAFETY: an ifreq of zeroes is valid: numbers, and a union of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: SIOCGIFHWADDR reads and writes the request, which lives here.
    let done = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFHWADDR as libc::Ioctl,
            &mut request,
        )
    };
    if done < 0 {
        return None;
    }
    // SAFETY: the call filled this member of the union.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(address.sa_data) {
        *to = from as u8;
    }
    Some(mac)
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
