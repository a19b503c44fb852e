//! Which frames the guest wants to receive (5.1.6.5.1 to 5.1.6.5.3).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// A hardware address.
pub type Mac = [u8; 6];

/// Most addresses of one kind that are told apart; more means "all of that kind".
const TABLE: usize = 64;
/// Bytes of a frame the filter looks at: both addresses, type, VLAN tag.
pub const LOOKED_AT: usize = 18;

/// The receive filter, as the driver set it by control commands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Everything goes through.
    pub promiscuous: bool,
    /// All multicast frames.
    pub all_multicast: bool,
    /// All unicast frames.
    pub all_unicast: bool,
    /// No multicast frames.
    pub no_multicast: bool,
    /// No unicast frames.
    pub no_unicast: bool,
    /// No broadcast frames.
    pub no_broadcast: bool,
    /// The card's own address.
    pub mac: Mac,
    /// Further unicast addresses; `None`: more than can be told apart.
    pub unicast: Option<BTreeSet<Mac>>,
    /// Multicast addresses; `None`: more than can be told apart.
    pub multicast: Option<BTreeSet<Mac>>,
    /// VLANs whose frames are wanted; `None`: all.
    pub vlans: Option<BTreeSet<u16>>,
}

impl Filter {
    /// As after a reset: everything, until the driver says otherwise.
    #[must_use]
    pub fn new(mac: Mac) -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            mac,
            unicast: Some(BTreeSet::new()),
            multicast: Some(BTreeSet::new()),
            vlans: None,
        }
    }

    /// Is this frame wanted? `start`: at least the destination address, at best [`LOOKED_AT`]
    /// bytes.
    #[must_use]
    pub fn wants(&self, start: &[u8]) -> bool {
        if self.promiscuous {
            return true;
        }
        let Some((to, rest)) = start.split_first_chunk::<6>() else {
            return false;
        };
        if let (Some(vlans), Some([0x81, 0x00, high, low])) = (&self.vlans, rest.get(6..10))
            && !vlans.contains(&(u16::from_be_bytes([*high, *low]) & 0xfff))
        {
            return false;
        }
        if *to == [0xff; 6] {
            return !self.no_broadcast;
        }
        let (none, all, table) = if to[0] & 1 == 1 {
            (self.no_multicast, self.all_multicast, &self.multicast)
        } else {
            (self.no_unicast, self.all_unicast, &self.unicast)
        };
        let own = to[0] & 1 == 0 && *to == self.mac;
        !none && (all || own || table.as_ref().is_none_or(|t| t.contains(to)))
    }

    /// Sets both address tables; false: the data makes no sense, and nothing changed.
    pub fn set_tables(&mut self, data: &[u8]) -> bool {
        let Some((first, rest)) = table(data) else {
            return false;
        };
        let Some((second, [])) = table(rest) else {
            return false;
        };
        self.unicast = first;
        self.multicast = second;
        true
    }
}

/// A count and so many addresses (`virtio_net_ctrl_mac`).
fn table(data: &[u8]) -> Option<(Option<BTreeSet<Mac>>, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (addresses, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let (addresses, _) = addresses.as_chunks::<6>();
    let table = (count <= TABLE).then(|| addresses.iter().copied().collect());
    Some((table, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [0x52, 0x54, 0, 1, 2, 3];
    const OTHER: Mac = [0x52, 0x54, 0, 9, 9, 9];
    const GROUP: Mac = [1, 0, 0x5e, 0, 0, 1];

    fn frame(to: Mac) -> Vec<u8> {
        [&to[..], &OTHER, &[8, 0, 0, 0, 0, 0]].concat()
    }

    fn strict() -> Filter {
        Filter {
            promiscuous: false,
            ..Filter::new(OWN)
        }
    }

    #[test]
    fn modes() {
        assert!(Filter::new(OWN).wants(&frame(OTHER)), "everything at first");
        let mut filter = strict();
        assert!(filter.wants(&frame(OWN)));
        assert!(!filter.wants(&frame(OTHER)));
        assert!(!filter.wants(&frame(GROUP)));
        assert!(filter.wants(&frame([0xff; 6])));
        filter.all_multicast = true;
        assert!(filter.wants(&frame(GROUP)));
        filter.no_multicast = true;
        assert!(!filter.wants(&frame(GROUP)));
        filter.no_broadcast = true;
        assert!(!filter.wants(&frame([0xff; 6])));
        filter.all_unicast = true;
        assert!(filter.wants(&frame(OTHER)));
        filter.no_unicast = true;
        assert!(!filter.wants(&frame(OWN)));
        assert!(!filter.wants(&[1, 2, 3]));
    }

    #[test]
    fn tables() {
        let mut filter = strict();
        let data = [&[1, 0, 0, 0][..], &OTHER, &[1, 0, 0, 0], &GROUP].concat();
        assert!(filter.set_tables(&data));
        assert!(filter.wants(&frame(OTHER)));
        assert!(filter.wants(&frame(GROUP)));
        for bad in [
            &data[..data.len() - 1],
            &[&data[..], &[0]].concat(),
            &[0xff; 8],
            &[],
        ] {
            assert!(!filter.set_tables(bad));
        }
        let mut many = u32::try_from(TABLE + 1).unwrap().to_le_bytes().to_vec();
        many.extend([0xaa].repeat(6 * (TABLE + 1)));
        many.extend([0; 4]);
        assert!(filter.set_tables(&many));
        assert!(filter.wants(&frame([2, 2, 2, 2, 2, 2])), "overflowed: all");
        assert!(!filter.wants(&frame(GROUP)));
    }

    #[test]
    fn vlans() {
        let mut filter = strict();
        let tagged = [&OWN[..], &OTHER, &[0x81, 0, 0x20, 5, 8, 0]].concat();
        assert!(filter.wants(&tagged));
        filter.vlans = Some(BTreeSet::new());
        assert!(!filter.wants(&tagged));
        filter.vlans = Some(BTreeSet::from([5]));
        assert!(filter.wants(&tagged));
        assert!(filter.wants(&frame(OWN)), "no tag");
    }
}
