//! Commands of the control queue (5.1.6.5).

use std::collections::BTreeSet;

use super::features as f;
use super::state::{STATUS_ANNOUNCE, State};

/// `VIRTIO_NET_OK`.
pub const OK: u8 = 0;
/// `VIRTIO_NET_ERR`.
pub const ERR: u8 = 1;

/// Longest command looked at: two tables of addresses with room to spare.
pub const LONGEST: usize = 16 << 10;

/// What a command changed outside the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    Nothing,
    /// The filter: receiving threads look at it anew.
    Filter,
    /// Number of pairs in use.
    Pairs,
    /// Offloads on the way to the guest.
    Offloads,
}

/// Carries out one command (class, command, data); the answer, and what changed. `features`: what
/// was negotiated; a command without its feature is refused.
pub fn command(state: &mut State, features: u64, max_pairs: u16, data: &[u8]) -> (u8, Change) {
    let refused = (ERR, Change::Nothing);
    let Some(([class, command], data)) = data.split_first_chunk::<2>() else {
        return refused;
    };
    let has = |feature: u64| features & feature != 0;
    match (class, command, data) {
        (0, 0..=1, [on]) if has(f::CTRL_RX) => receive_mode(state, *command, *on),
        (0, 2..=5, [on]) if has(f::CTRL_RX_EXTRA) => receive_mode(state, *command, *on),
        (1, 0, data) if has(f::CTRL_RX) && state.filter.set_tables(data) => (OK, Change::Filter),
        (1, 1, data) if has(f::CTRL_MAC_ADDR) => match <[u8; 6]>::try_from(data) {
            Ok(mac) if mac[0] & 1 == 0 => {
                state.filter.mac = mac;
                (OK, Change::Filter)
            }
            _ => refused,
        },
        (2, 0..=1, [low, high]) if has(f::CTRL_VLAN) => {
            let id = u16::from_le_bytes([*low, *high]);
            if id > 0xfff {
                return refused;
            }
            let vlans = state.filter.vlans.get_or_insert_with(BTreeSet::new);
            if *command == 0 {
                vlans.insert(id);
            } else {
                vlans.remove(&id);
            }
            (OK, Change::Filter)
        }
        (3, 0, _) if has(f::GUEST_ANNOUNCE) => {
            state.status &= !STATUS_ANNOUNCE;
            (OK, Change::Nothing)
        }
        (4, 0, [low, high]) if has(f::MQ) => {
            let pairs = u16::from_le_bytes([*low, *high]);
            if pairs == 0 || pairs > max_pairs {
                return refused;
            }
            state.pairs = pairs;
            (OK, Change::Pairs)
        }
        (5, 0, data) if has(f::CTRL_GUEST_OFFLOADS) => match <[u8; 8]>::try_from(data) {
            Ok(bytes) => {
                let offloads = u64::from_le_bytes(bytes);
                if offloads & !(features & f::GUEST_OFFLOADS) != 0 {
                    return refused;
                }
                state.offloads = offloads;
                (OK, Change::Offloads)
            }
            Err(_) => refused,
        },
        _ => refused,
    }
}

fn receive_mode(state: &mut State, command: u8, on: u8) -> (u8, Change) {
    let filter = &mut state.filter;
    let mode = match command {
        0 => &mut filter.promiscuous,
        1 => &mut filter.all_multicast,
        2 => &mut filter.all_unicast,
        3 => &mut filter.no_multicast,
        4 => &mut filter.no_unicast,
        _ => &mut filter.no_broadcast,
    };
    *mode = on != 0;
    (OK, Change::Filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    fn run(state: &mut State, data: &[u8]) -> (u8, Change) {
        command(state, u64::MAX, 4, data)
    }

    #[test]
    fn each_class() {
        let mut state = State::new(MAC, true);
        assert_eq!(run(&mut state, &[0, 0, 0]), (OK, Change::Filter));
        assert!(!state.filter.promiscuous);
        assert_eq!(run(&mut state, &[0, 5, 1]), (OK, Change::Filter));
        assert!(state.filter.no_broadcast);
        assert_eq!(run(&mut state, &[1, 1, 2, 0, 0, 0, 0, 7]).0, OK);
        assert_eq!(state.filter.mac, [2, 0, 0, 0, 0, 7]);
        assert_eq!(run(&mut state, &[1, 1, 1, 0, 0, 0, 0, 7]).0, ERR);
        assert_eq!(run(&mut state, &[2, 0, 5, 0]).0, OK);
        assert_eq!(run(&mut state, &[2, 0, 0, 0x10]).0, ERR);
        assert!(state.filter.vlans.as_ref().unwrap().contains(&5));
        assert_eq!(run(&mut state, &[2, 1, 5, 0]).0, OK);
        assert!(state.filter.vlans.as_ref().unwrap().is_empty());
        state.status |= STATUS_ANNOUNCE;
        assert_eq!(run(&mut state, &[3, 0]).0, OK);
        assert_eq!(state.status & STATUS_ANNOUNCE, 0);
        assert_eq!(run(&mut state, &[4, 0, 3, 0]), (OK, Change::Pairs));
        assert_eq!(state.pairs, 3);
        assert_eq!(run(&mut state, &[4, 0, 5, 0]).0, ERR);
        assert_eq!(run(&mut state, &[4, 0, 0, 0]).0, ERR);
        let on = [&[5, 0][..], &f::GUEST_CSUM.to_le_bytes()].concat();
        assert_eq!(run(&mut state, &on), (OK, Change::Offloads));
        assert_eq!(state.offloads, f::GUEST_CSUM);
        let unknown = [&[5, 0][..], &u64::MAX.to_le_bytes()].concat();
        assert_eq!(run(&mut state, &unknown).0, ERR);
    }

    #[test]
    fn nonsense_and_what_was_not_negotiated_is_refused() {
        let mut state = State::new(MAC, true);
        let before = state.clone();
        for data in [&[][..], &[0], &[0, 0], &[0, 9, 1], &[9, 0], &[4, 0, 1]] {
            assert_eq!(run(&mut state, data).0, ERR, "{data:?}");
        }
        for data in [&[0, 0, 0][..], &[2, 0, 5, 0], &[3, 0], &[4, 0, 1, 0]] {
            assert_eq!(command(&mut state, 0, 4, data).0, ERR, "{data:?}");
        }
        assert_eq!(state, before);
    }
}
