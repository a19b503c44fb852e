//! Network card (5.1).
//!
//! Each pair of queues has a thread and an end of the backend of its own. Frames are read from a
//! tap straight into the guest's buffers and written from there; a stream socket's are copied once.

mod backend;
mod control;
mod features;
mod filter;
mod limit;
mod pair;
mod receive;
mod shared;
mod state;
mod stream;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use std::sync::Arc;

pub use backend::{Backend, HEADER, LONGEST_FRAME, Trouble};
pub use filter::{Filter, Mac};
pub use limit::Bandwidth;
pub use shared::{NetHandle, Stats};
pub use state::State;
pub use stream::Stream;
pub use tap::Tap;

use features as f;
use pair::{Control, Pair, Work};
use receive::Receiver;
use shared::Shared;
use transmit::Sender;

use crate::device::{Activation, Device, DeviceError, Payload, QueueSetup};
use crate::life::{Life, lock, os, read_structure, restored};
use crate::queue::Queue;
use crate::worker::eventfd;

const KIND: &str = "virtio-net";
const VERSION: u32 = 1;
/// Entries of a receive or transmit queue.
const QUEUE_SIZE: u16 = 1024;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Most pairs of queues.
pub const MAX_PAIRS: usize = 8;

/// How a card is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetOptions {
    /// Its address.
    pub mac: Mac,
    /// What the guest is told, 68 to 65535.
    pub mtu: Option<u16>,
    /// The cable is in.
    pub link_up: bool,
    /// Frames from the guest with another source address are dropped, and the guest can't change
    /// its address.
    pub filter_source_mac: bool,
    /// Limit to the guest.
    pub inbound: Bandwidth,
    /// Limit from the guest.
    pub outbound: Bandwidth,
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    options: NetOptions,
    offered: u64,
    shared: Arc<Shared>,
    /// The ends that are not with a thread.
    backends: Vec<Option<Box<dyn Backend>>>,
    lives: Vec<Life<Pair>>,
    activation: Option<Active>,
}

/// What stays after activation.
#[derive(Debug)]
struct Active {
    memory: Arc<dyn crate::GuestMemory>,
    features: u64,
    interrupt: Arc<dyn crate::Interrupt>,
    announce: bool,
}

impl Net {
    /// A card with one queue pair for each of `backends`.
    ///
    /// # Errors
    /// None or more than [`MAX_PAIRS`] backends, an MTU below 68, a multicast address, or no
    /// eventfds.
    pub fn new(options: NetOptions, backends: Vec<Box<dyn Backend>>) -> Result<Self, DeviceError> {
        let invalid = |text: &str| Err(DeviceError::Invalid(text.to_owned()));
        if backends.is_empty() || backends.len() > MAX_PAIRS {
            return invalid("a network card has 1 to 8 pairs of queues");
        }
        if options.mtu.is_some_and(|mtu| mtu < 68) {
            return invalid("an MTU is 68 at least");
        }
        if options.mac[0] & 1 != 0 {
            return invalid("a network card's address can't be a multicast one");
        }
        let mut backends = backends;
        for backend in &mut backends[1..] {
            backend.set_active(false).map_err(os("detaching a queue"))?;
        }
        let offloads = backends.iter().fold(u64::MAX, |all, b| all & b.offloads());
        // At most MAX_PAIRS.
        let pairs = backends.len() as u16;
        let wakes = (0..pairs)
            .map(|_| eventfd())
            .collect::<Result<_, _>>()
            .map_err(os("eventfd"))?;
        let shared = Shared::new(
            options.mac,
            options.link_up,
            options.inbound,
            options.outbound,
            wakes,
        );
        Ok(Self {
            offered: pair::offered(
                offloads,
                pairs,
                options.mtu.is_some(),
                options.filter_source_mac,
            ),
            options,
            shared: Arc::new(shared),
            lives: backends.iter().map(|_| Life::Inactive).collect(),
            backends: backends.into_iter().map(Some).collect(),
            activation: None,
        })
    }

    /// For the VMM: link, limits, counters.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        NetHandle(Arc::clone(&self.shared))
    }

    fn pairs(&self) -> u16 {
        // At most MAX_PAIRS.
        self.lives.len() as u16
    }

    /// The control queue's index (5.1.2).
    fn control_index(&self, features: u64) -> u16 {
        if features & f::MQ != 0 {
            2 * self.pairs()
        } else {
            2
        }
    }

    /// Whether a queue has a use with these features; the driver may set up others.
    fn uses(&self, index: u16, features: u64) -> bool {
        let pairs = if features & f::MQ != 0 {
            self.pairs()
        } else {
            1
        };
        let control = features & f::CTRL_VQ != 0 && index == self.control_index(features);
        index < 2 * pairs || control
    }

    /// The pair a queue belongs to.
    fn pair_of(&self, index: u16, features: u64) -> usize {
        if index == self.control_index(features) {
            0
        } else {
            usize::from(index / 2)
        }
    }

    /// Makes the pairs with their queues. A queue that is no good is the driver's fault.
    fn prepare(&mut self, activation: Activation) -> Result<Vec<Pair>, DeviceError> {
        let Activation {
            memory,
            features,
            queues,
            kicks,
            interrupt,
        } = activation;
        let mut kicks: Vec<_> = kicks.into_iter().map(Some).collect();
        let mut kick = |index: u16| {
            kicks
                .get_mut(usize::from(index))
                .and_then(Option::take)
                .ok_or_else(|| DeviceError::Invalid(format!("no kick for queue {index}")))
        };
        let mut bad = None;
        let mut queue = |index: u16| {
            let setup = queues.get(usize::from(index)).copied().flatten()?;
            Queue::new(&memory, &setup, features)
                .map_err(|error| bad = Some(error))
                .ok()
        };
        let control_index = self.control_index(features);
        let multi = features & f::MQ != 0;
        let used = if multi { self.pairs() } else { 1 };
        let plain = self.offered & f::CSUM == 0;
        let source = self.options.filter_source_mac.then_some(self.options.mac);
        let mergeable = features & f::MRG_RXBUF != 0;
        let mut pairs = Vec::new();
        for number in 0..used {
            let (rx, tx) = (2 * number, 2 * number + 1);
            let control = (number == 0 && features & f::CTRL_VQ != 0)
                .then(|| {
                    Ok::<_, DeviceError>(Control {
                        queue: queue(control_index),
                        index: control_index,
                        kick: kick(control_index)?,
                        max_pairs: used,
                    })
                })
                .transpose()?;
            let (rx_kick, tx_kick) = (kick(rx)?, kick(tx)?);
            let Some(backend) = self.backends[usize::from(number)].take() else {
                return Err(DeviceError::Invalid(
                    "a queue pair's thread still has its backend".into(),
                ));
            };
            pairs.push(Pair {
                number,
                backend,
                shared: Arc::clone(&self.shared),
                interrupt: Arc::clone(&interrupt),
                features,
                mtu: self.options.mtu,
                source,
                rx: Receiver::new(queue(rx), rx, mergeable),
                tx: Sender::new(queue(tx), tx, plain),
                rx_kick,
                tx_kick,
                control,
                work: Work::new(self.options.mac),
            });
        }
        if let Some(error) = bad {
            interrupt.needs_reset(&error.to_string());
        }
        {
            let mut teller = lock(&self.shared.teller);
            teller.interrupt = Some(Arc::clone(&interrupt));
            teller.features = features;
        }
        self.activation = Some(Active {
            memory,
            features,
            interrupt,
            announce: false,
        });
        Ok(pairs)
    }

    fn name(number: usize) -> String {
        format!("net-{number}")
    }

    fn halt(&mut self) {
        for life in &self.lives {
            life.ask_to_stop();
        }
        for life in &mut self.lives {
            if let Err(error) = life.pause()
                && let Some(active) = &self.activation
            {
                active.interrupt.needs_reset(&error.to_string());
            }
        }
    }

    fn queue_count(&self) -> usize {
        2 * self.lives.len() + 1
    }

    /// The state as it is, for saving.
    fn snapshot(&self) -> State {
        let mut state = lock(&self.shared.state).clone();
        state.queues = vec![None; self.queue_count()];
        for pair in self.lives.iter().filter_map(Life::paused) {
            let control = pair.control.as_ref();
            for (index, queue) in [
                (pair.rx.index, pair.rx.queue.as_ref()),
                (pair.tx.index, pair.tx.queue.as_ref()),
                (
                    control.map_or(u16::MAX, |c| c.index),
                    control.and_then(|c| c.queue.as_ref()),
                ),
            ] {
                if let Some(queue) = queue {
                    state.queues[usize::from(index)] = Some(queue.setup());
                }
            }
        }
        state
    }
}

impl Device for Net {
    fn id(&self) -> u16 {
        1
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; self.queue_count()];
        if let Some(last) = sizes.last_mut() {
            *last = CONTROL_SIZE;
        }
        sizes
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let state = lock(&self.shared.state);
        let mut config = [0; 12];
        config[..6].copy_from_slice(&state.filter.mac);
        config[6..8].copy_from_slice(&state.status.to_le_bytes());
        config[8..10].copy_from_slice(&self.pairs().to_le_bytes());
        config[10..12].copy_from_slice(&self.options.mtu.unwrap_or(0).to_le_bytes());
        read_structure(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {
        // Everything is read-only in the modern interface (5.1.4).
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        {
            let mut state = lock(&self.shared.state);
            let features = activation.features;
            state.offloads = features & f::GUEST_OFFLOADS;
            // With the command to choose VLANs there are none at first.
            state.filter.vlans = (features & f::CTRL_VLAN != 0).then(Default::default);
        }
        let pairs = self.prepare(activation)?;
        for (number, pair) in pairs.into_iter().enumerate() {
            self.lives[number].start(&Self::name(number), pair)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.halt();
        for (life, backend) in self.lives.iter_mut().zip(&mut self.backends) {
            if let Some(mut pair) = life.take() {
                // The next driver starts without offloads, and with one pair.
                let active = pair.number == 0;
                if let Err(error) = pair.backend.set_active(active) {
                    log::error!("resetting a network card: {error}");
                }
                if active && let Err(error) = pair.backend.set_offloads(0) {
                    log::error!("resetting a network card: {error}");
                }
                *backend = Some(pair.backend);
            }
        }
        self.activation = None;
        *lock(&self.shared.teller) = shared::Teller::default();
        *lock(&self.shared.state) = State::new(self.options.mac, self.shared.link_up());
    }

    fn reset_queue(&mut self, index: u16) {
        let Some(active) = &self.activation else {
            return;
        };
        let pair = self.pair_of(index, active.features);
        if let Some(life) = self.lives.get_mut(pair) {
            life.with(move |pair, poll| pair.replace_queue(index, None, poll));
        }
    }

    fn enable_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), DeviceError> {
        let Some(active) = &self.activation else {
            return Ok(());
        };
        match Queue::new(&active.memory, &setup, active.features) {
            Ok(queue) => {
                let pair = self.pair_of(index, active.features);
                if let Some(life) = self.lives.get_mut(pair) {
                    life.with(move |pair, poll| pair.replace_queue(index, Some(queue), poll));
                }
            }
            Err(error) => active.interrupt.needs_reset(&error.to_string()),
        }
        Ok(())
    }

    fn pause(&mut self) {
        self.halt();
        self.shared.pause();
    }

    fn resume(&mut self) {
        let announce = match &mut self.activation {
            Some(active) => std::mem::take(&mut active.announce),
            None => false,
        };
        if announce && let Some(Life::Paused(pair)) = self.lives.first_mut() {
            pair.announce();
        }
        for (number, life) in self.lives.iter_mut().enumerate() {
            if let Err(error) = life.resume(&Self::name(number))
                && let Some(active) = &self.activation
            {
                active.interrupt.needs_reset(&error.to_string());
            }
        }
        self.shared.resume();
        if announce {
            self.shared.announce();
        }
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        self.lives.iter().try_for_each(|life| life.at_rest(KIND))?;
        Payload::new(KIND, VERSION, &self.snapshot())
    }

    fn load(
        &mut self,
        payload: &Payload,
        activation: Option<Activation>,
    ) -> Result<(), DeviceError> {
        let mut state: State = payload.open(KIND, VERSION)?;
        if state.pairs == 0 || state.pairs > self.pairs() {
            return Err(DeviceError::State {
                kind: KIND,
                reason: format!("{} queue pairs of {}", state.pairs, self.pairs()),
            });
        }
        let before = state.status;
        state.status &= !state::STATUS_LINK_UP;
        if self.shared.link_up() {
            state.status |= state::STATUS_LINK_UP;
        }
        let link_changed = before != state.status;
        let queues = std::mem::take(&mut state.queues);
        *lock(&self.shared.state) = state;
        let Some(mut activation) = activation else {
            return Ok(());
        };
        for (index, queue) in (0..).zip(&mut activation.queues) {
            if !self.uses(index, activation.features) {
                *queue = None;
            }
        }
        restored(KIND, &mut activation.queues, &queues)?;
        self.shared.pause();
        let pairs = self.prepare(activation)?;
        for (life, pair) in self.lives.iter_mut().zip(pairs) {
            *life = Life::Paused(pair);
        }
        if let Some(active) = &mut self.activation {
            // The network may know the guest at another place.
            active.announce = true;
        }
        if link_changed {
            self.shared.owe();
        }
        Ok(())
    }
}
