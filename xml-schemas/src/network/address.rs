//! Addresses and the networks they are in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A network: an address and how many of its bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet {
    /// An address in it.
    pub address: IpAddr,
    /// Bits.
    pub prefix: u8,
}

/// An address as a number, at the top of 128 bits.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(a.to_bits()) << 96,
        IpAddr::V6(a) => a.to_bits(),
    }
}

fn mask(prefix: u8) -> u128 {
    match prefix {
        0 => 0,
        n => u128::MAX << (128 - u32::from(n.min(128))),
    }
}

impl Subnet {
    /// Its lowest address.
    pub fn network(self) -> IpAddr {
        let low = bits(self.address) & mask(self.prefix);
        match self.address {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits((low >> 96) as u32)),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(low)),
        }
    }

    /// The highest address of an IPv4 network.
    pub fn broadcast(self) -> Option<Ipv4Addr> {
        match self.address {
            IpAddr::V4(a) => {
                let host = (u64::from(u32::MAX) >> self.prefix.min(32)) as u32;
                Some(Ipv4Addr::from_bits(a.to_bits() | host))
            }
            IpAddr::V6(_) => None,
        }
    }

    /// Whether an address is in it.
    pub fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4()
            && bits(address) & mask(self.prefix) == bits(self.address) & mask(self.prefix)
    }

    /// Whether the two have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        let wide = if self.prefix < other.prefix {
            self
        } else {
            other
        };
        wide.contains(self.address) && wide.contains(other.address)
    }

    /// An IPv4 network's mask.
    pub fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits((mask(self.prefix) >> 96) as u32)
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.network(), self.prefix)
    }
}

/// The network of an address, with its mask or prefix; without either, by its class, as ever.
/// `None`: the mask is none.
pub(super) fn subnet(
    address: IpAddr,
    netmask: Option<IpAddr>,
    prefix: Option<u8>,
) -> Option<Subnet> {
    let prefix = match (netmask, prefix, address) {
        (Some(IpAddr::V4(mask)), ..) => {
            let bits = mask.to_bits();
            if bits.leading_ones() + bits.trailing_zeros() < 32 {
                return None;
            }
            bits.leading_ones() as u8
        }
        (Some(IpAddr::V6(_)), ..) => return None,
        (None, Some(prefix), _) => prefix,
        (None, None, IpAddr::V6(_)) => 64,
        (None, None, IpAddr::V4(a)) => match a.octets()[0] {
            0..128 => 8,
            128..192 => 16,
            192..224 => 24,
            // Neither a network's nor a host's.
            _ => return None,
        },
    };
    Some(Subnet { address, prefix })
}

/// How many addresses there are from `start` to `end`, both included; as libvirt, at most 2^31.
pub(super) fn count(start: IpAddr, end: IpAddr) -> Option<u32> {
    let (first, last) = (bits(start), bits(end));
    let shift = if start.is_ipv4() { 96 } else { 0 };
    let steps = last.checked_sub(first)? >> shift;
    Some(
        u32::try_from(steps)
            .map_or(u32::MAX >> 1, |n| n.saturating_add(1))
            .min(u32::MAX >> 1),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Subnet {
        let (address, prefix) = text.split_once('/').unwrap();
        Subnet {
            address: address.parse().unwrap(),
            prefix: prefix.parse().unwrap(),
        }
    }

    #[test]
    fn networks_overlap_or_do_not() {
        assert!(net("192.168.122.1/24").overlaps(net("192.168.0.0/16")));
        assert!(net("10.0.0.0/8").overlaps(net("10.9.8.7/32")));
        assert!(!net("192.168.122.1/24").overlaps(net("192.168.123.1/24")));
        assert!(!net("0.0.0.0/8").overlaps(net("::/8")));
        assert!(net("fd00::1/64").overlaps(net("fd00::/48")));
        assert_eq!(net("192.168.122.77/24").to_string(), "192.168.122.0/24");
        assert_eq!(
            net("192.168.122.77/24").broadcast().unwrap().to_string(),
            "192.168.122.255"
        );
        assert_eq!(
            net("1.2.3.4/0").broadcast().unwrap().to_string(),
            "255.255.255.255"
        );
        assert_eq!(net("1.2.3.4/20").netmask().to_string(), "255.255.240.0");
    }

    #[test]
    fn masks_are_prefixes_or_nothing() {
        let of = |mask: &str| {
            subnet(
                "10.1.2.3".parse().unwrap(),
                Some(mask.parse().unwrap()),
                None,
            )
            .map(|s| s.prefix)
        };
        assert_eq!(of("255.255.255.0"), Some(24));
        assert_eq!(of("0.0.0.0"), Some(0));
        assert_eq!(of("255.255.255.255"), Some(32));
        assert_eq!(of("255.0.255.0"), None);
        assert_eq!(of("::"), None);
    }

    #[test]
    fn ranges_are_counted() {
        let of = |a: &str, b: &str| count(a.parse().unwrap(), b.parse().unwrap());
        assert_eq!(of("10.0.0.1", "10.0.0.254"), Some(254));
        assert_eq!(of("10.0.0.2", "10.0.0.1"), None);
        assert_eq!(of("fd00::10", "fd00::1f"), Some(16));
        assert_eq!(of("fd00::", "fe00::"), Some(u32::MAX >> 1));
    }
}
