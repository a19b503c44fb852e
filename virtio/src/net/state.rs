//! What the guest can observe of a network card.

use serde::{Deserialize, Serialize};

use super::filter::{Filter, Mac};
use crate::device::QueueSetup;

/// `VIRTIO_NET_S_LINK_UP`.
pub const STATUS_LINK_UP: u16 = 1;
/// `VIRTIO_NET_S_ANNOUNCE`.
pub const STATUS_ANNOUNCE: u16 = 2;

/// A network card's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The configuration's status: `STATUS_...`.
    pub status: u16,
    /// The receive filter.
    pub filter: Filter,
    /// Pairs of queues the guest uses.
    pub pairs: u16,
    /// Offloads to the guest that are on: feature bits.
    pub offloads: u64,
    /// The queues, by index.
    pub queues: Vec<Option<QueueSetup>>,
}

impl State {
    /// As after a reset.
    #[must_use]
    pub fn new(mac: Mac, link_up: bool) -> Self {
        Self {
            status: if link_up { STATUS_LINK_UP } else { 0 },
            filter: Filter::new(mac),
            pairs: 1,
            offloads: 0,
            queues: Vec::new(),
        }
    }
}
