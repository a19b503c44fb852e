//! Feature bits (5.1.3).

/// Frames from the guest may lack their checksum.
pub const CSUM: u64 = 1 << 0;
/// Frames to the guest may.
pub const GUEST_CSUM: u64 = 1 << 1;
/// Offloads to the guest can be switched.
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// The configuration has an MTU.
pub const MTU: u64 = 1 << 3;
/// The configuration has an address.
pub const MAC: u64 = 1 << 5;
/// TCP/IPv4 segments to the guest may be large.
pub const GUEST_TSO4: u64 = 1 << 7;
/// TCP/IPv6 segments to the guest.
pub const GUEST_TSO6: u64 = 1 << 8;
/// Such segments may carry ECN.
pub const GUEST_ECN: u64 = 1 << 9;
/// UDP datagrams to the guest.
pub const GUEST_UFO: u64 = 1 << 10;
/// TCP/IPv4 segments from the guest may be large.
pub const HOST_TSO4: u64 = 1 << 11;
/// TCP/IPv6 segments from the guest.
pub const HOST_TSO6: u64 = 1 << 12;
/// Such segments may carry ECN.
pub const HOST_ECN: u64 = 1 << 13;
/// UDP datagrams from the guest.
pub const HOST_UFO: u64 = 1 << 14;
/// A frame may fill several receive buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
/// The configuration has a status.
pub const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const CTRL_VQ: u64 = 1 << 17;
/// Receive modes.
pub const CTRL_RX: u64 = 1 << 18;
/// VLAN filter.
pub const CTRL_VLAN: u64 = 1 << 19;
/// More receive modes.
pub const CTRL_RX_EXTRA: u64 = 1 << 20;
/// The device can ask the guest to announce itself.
pub const GUEST_ANNOUNCE: u64 = 1 << 21;
/// Several pairs of queues.
pub const MQ: u64 = 1 << 22;
/// The guest may change its address.
pub const CTRL_MAC_ADDR: u64 = 1 << 23;

/// Everything `CTRL_GUEST_OFFLOADS` can switch (5.1.6.5.6).
pub const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO;
/// Large segments to the guest.
pub const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO;
/// What a backend with virtio-net headers adds.
pub const OFFLOADS: u64 = GUEST_OFFLOADS | CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_UFO;
