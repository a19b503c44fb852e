//! What a card's threads, its transport and the VMM share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};

use super::filter::Mac;
use super::limit::{Bandwidth, Limiter};
use super::state::{STATUS_ANNOUNCE, STATUS_LINK_UP, State};
use crate::device::Interrupt;
use crate::life::lock;
use crate::worker::signal;

/// A network card's counters, as the guest sees the directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stats {
    /// To the guest.
    pub rx_bytes: u64,
    /// To the guest.
    pub rx_packets: u64,
    /// Frames the host could not take from the backend.
    pub rx_errors: u64,
    /// Frames for which the guest had no room, or that came while the cable was out.
    pub rx_dropped: u64,
    /// From the guest.
    pub tx_bytes: u64,
    /// From the guest.
    pub tx_packets: u64,
    /// Frames the backend refused.
    pub tx_errors: u64,
    /// Frames dropped by filter, for their shape or a pulled cable.
    pub tx_dropped: u64,
    /// The cable is in.
    pub link_up: bool,
}

/// Counts one thing.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of all pairs together.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub rx_bytes: Counter,
    pub rx_packets: Counter,
    pub rx_errors: Counter,
    pub rx_dropped: Counter,
    pub tx_bytes: Counter,
    pub tx_packets: Counter,
    pub tx_errors: Counter,
    pub tx_dropped: Counter,
}

/// How the device tells the driver of its configuration, while it may.
#[derive(Debug, Default)]
pub(super) struct Teller {
    pub interrupt: Option<Arc<dyn Interrupt>>,
    pub features: u64,
    paused: bool,
    owed: bool,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub state: Mutex<State>,
    /// Changes whenever the threads must look at `state` again.
    pub generation: AtomicU64,
    /// What the administrator wants.
    cable: AtomicBool,
    /// Pairs whose backend is gone.
    gone: AtomicBool,
    pub inbound: Limiter,
    pub outbound: Limiter,
    pub counters: Counters,
    pub teller: Mutex<Teller>,
    /// One for each pair.
    pub wakes: Vec<EventFd>,
}

impl Shared {
    pub fn new(
        mac: Mac,
        link_up: bool,
        inbound: Bandwidth,
        outbound: Bandwidth,
        wakes: Vec<EventFd>,
    ) -> Self {
        Self {
            state: Mutex::new(State::new(mac, link_up)),
            generation: AtomicU64::new(0),
            cable: AtomicBool::new(link_up),
            gone: AtomicBool::new(false),
            inbound: Limiter::new(inbound),
            outbound: Limiter::new(outbound),
            counters: Counters::default(),
            teller: Mutex::default(),
            wakes,
        }
    }

    pub fn link_up(&self) -> bool {
        self.cable.load(Ordering::Relaxed) && !self.gone.load(Ordering::Relaxed)
    }

    /// The threads look at the state again.
    pub fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
        for wake in &self.wakes {
            signal(wake);
        }
    }

    /// Tells the driver that the configuration has changed: now, or when the machine goes on.
    fn tell(&self) {
        let mut teller = lock(&self.teller);
        if teller.paused {
            teller.owed = true;
        } else if let Some(interrupt) = &teller.interrupt {
            interrupt.config();
        }
    }

    /// The driver is to be told when the machine goes on.
    pub fn owe(&self) {
        lock(&self.teller).owed = true;
    }

    pub fn pause(&self) {
        lock(&self.teller).paused = true;
    }

    pub fn resume(&self) {
        let mut teller = lock(&self.teller);
        teller.paused = false;
        if std::mem::take(&mut teller.owed)
            && let Some(interrupt) = &teller.interrupt
        {
            interrupt.config();
        }
    }

    /// The link's status follows from cable and backend.
    pub fn update_link(&self) {
        let mut state = lock(&self.state);
        let before = state.status;
        state.status &= !STATUS_LINK_UP;
        if self.link_up() {
            state.status |= STATUS_LINK_UP;
        }
        let changed = state.status != before;
        drop(state);
        if changed {
            self.tell();
            self.changed();
        }
    }

    /// The other end has gone away.
    pub fn backend_gone(&self) {
        if !self.gone.swap(true, Ordering::Relaxed) {
            log::warn!("a network card's other end is gone: its link is down");
            self.update_link();
        }
    }

    /// Asks the guest to tell the network where it is, if it can.
    pub fn announce(&self) {
        if lock(&self.teller).features & super::features::GUEST_ANNOUNCE == 0 {
            return;
        }
        lock(&self.state).status |= STATUS_ANNOUNCE;
        self.tell();
    }
}

/// A card at run time, for the VMM: usable from any thread, whatever state the device is in.
#[derive(Debug, Clone)]
pub struct NetHandle(pub(super) Arc<Shared>);

impl NetHandle {
    /// Puts the cable in or pulls it.
    pub fn set_link(&self, up: bool) {
        self.0.cable.store(up, Ordering::Relaxed);
        self.0.update_link();
    }

    /// Changes the limits, to the guest and from it.
    pub fn set_bandwidth(&self, inbound: Option<Bandwidth>, outbound: Option<Bandwidth>) {
        let now = Instant::now();
        for (limiter, limit) in [(&self.0.inbound, inbound), (&self.0.outbound, outbound)] {
            if let Some(limit) = limit {
                limiter.set(limit, now);
            }
        }
        self.0.changed();
    }

    /// Asks the guest to announce its address to the network (`VIRTIO_NET_F_GUEST_ANNOUNCE`):
    /// after it has moved.
    pub fn announce(&self) {
        self.0.announce();
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let counters = &self.0.counters;
        Stats {
            rx_bytes: counters.rx_bytes.get(),
            rx_packets: counters.rx_packets.get(),
            rx_errors: counters.rx_errors.get(),
            rx_dropped: counters.rx_dropped.get(),
            tx_bytes: counters.tx_bytes.get(),
            tx_packets: counters.tx_packets.get(),
            tx_errors: counters.tx_errors.get(),
            tx_dropped: counters.tx_dropped.get(),
            link_up: self.0.link_up(),
        }
    }

    /// The guest's address now: it may have changed it.
    #[must_use]
    pub fn mac(&self) -> Mac {
        lock(&self.0.state).filter.mac
    }
}
