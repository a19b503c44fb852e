//! One pair of queues on its thread; the first one serves the control queue too.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::backend::{Backend, HEADER, Trouble};
use super::control::{self, Change};
use super::features as f;
use super::filter::{Filter, Mac};
use super::receive::{Receiver, Stopped, largest};
use super::shared::Shared;
use super::transmit::Sender;
use crate::device::Interrupt;
use crate::life::lock;
use crate::queue::{Chain, Queue, QueueError};
use crate::worker::{Handler, Interest, Poll, take};

/// Bytes of an announcement: the shortest Ethernet frame, without its checksum, behind the header.
const ANNOUNCEMENT: usize = HEADER + 60;

/// How often the guest's place is announced.
const ANNOUNCEMENTS: u32 = 5;
/// After the first time; each pause is longer by as much.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(50);

const RX: u64 = 0;
const TX: u64 = 1;
const BACKEND: u64 = 2;
const WAKE: u64 = 3;
const CONTROL: u64 = 4;

/// The control queue, with the first pair.
#[derive(Debug)]
pub(super) struct Control {
    pub queue: Option<Queue>,
    pub index: u16,
    pub kick: OwnedFd,
    pub max_pairs: u16,
}

/// Everything one thread needs.
#[derive(Debug)]
pub(super) struct Pair {
    pub number: u16,
    pub backend: Box<dyn Backend>,
    pub shared: Arc<Shared>,
    pub interrupt: Arc<dyn Interrupt>,
    pub features: u64,
    pub mtu: Option<u16>,
    /// Frames from the guest must come from here.
    pub source: Option<Mac>,
    pub rx: Receiver,
    pub tx: Sender,
    pub rx_kick: OwnedFd,
    pub tx_kick: OwnedFd,
    pub control: Option<Control>,
    pub work: Work,
}

/// What a pair waits for, and what it remembers of the shared state.
#[derive(Debug)]
pub(super) struct Work {
    generation: Option<u64>,
    filter: Filter,
    offloads: u64,
    active: bool,
    /// The driver broke a rule: nothing is touched any more.
    broken: bool,
    /// What the backend is waited for; `None`: not at all.
    interest: Option<Interest>,
    /// No buffers: the backend's frames wait.
    rx_starved: bool,
    /// The backend has no room.
    tx_full: bool,
    rx_at: Option<Instant>,
    tx_at: Option<Instant>,
    /// When the guest's place is announced again, and how often it has been.
    announce_at: Option<Instant>,
    announced: u32,
}

impl Work {
    pub fn new(mac: Mac) -> Self {
        Self {
            generation: None,
            filter: Filter::new(mac),
            offloads: 0,
            active: false,
            broken: false,
            interest: None,
            rx_starved: false,
            tx_full: false,
            rx_at: None,
            tx_at: None,
            announce_at: None,
            announced: 0,
        }
    }
}

impl Pair {
    fn fail(&mut self, error: QueueError) {
        self.work.broken = true;
        self.interrupt.needs_reset(&error.to_string());
    }

    /// Tells switches at once where the guest's address is now, and a few times more: a line that has just been
    /// connected may lose what comes first.
    pub fn announce(&mut self) {
        self.work.announced = 0;
        self.announce_again();
    }

    /// A RARP request (RFC 903), which nobody has to understand. The guest itself says more, if it can.
    fn announce_again(&mut self) {
        self.work.announced += 1;
        let pause = ANNOUNCE_AFTER * self.work.announced;
        self.work.announce_at = (self.work.announced < ANNOUNCEMENTS).then(|| now() + pause);
        if !self.shared.link_up() {
            return;
        }
        let mac = lock(&self.shared.state).filter.mac;
        let mut frame = [0u8; ANNOUNCEMENT];
        let (header, frame_part) = frame.split_at_mut(HEADER);
        frame_part[..6].fill(0xff);
        frame_part[6..12].copy_from_slice(&mac);
        // Ethertype, hardware, protocol, their lengths, the operation.
        frame_part[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        frame_part[22..28].copy_from_slice(&mac);
        frame_part[32..38].copy_from_slice(&mac);
        let part = |bytes: &mut [u8]| libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let parts = [part(header), part(frame_part)];
        // SAFETY: two parts of an array that lives here.
        if let Err(error) = unsafe { self.backend.send(&parts, ANNOUNCEMENT) } {
            log::warn!("a network card cannot say where it is now: {error:?}");
        }
    }

    /// Looks at the shared state, if it has changed.
    fn refresh(&mut self) {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if self.work.generation == Some(generation) {
            return;
        }
        self.work.generation = Some(generation);
        let state = lock(&self.shared.state);
        self.work.filter.clone_from(&state.filter);
        let (offloads, active) = (state.offloads, self.number < state.pairs);
        drop(state);
        if active != self.work.active {
            if let Err(error) = self.backend.set_active(active) {
                log::error!("queue pair {}: {error}", self.number);
            }
            self.work.active = active;
        }
        if offloads != self.work.offloads {
            // A device-wide setting: any of the pairs may make it.
            if self.number == 0
                && let Err(error) = self.backend.set_offloads(offloads)
            {
                log::error!("switching offloads: {error}");
            }
            self.work.offloads = offloads;
        }
    }

    fn receive(&mut self, poll: &Poll) {
        self.work.rx_at = None;
        self.work.rx_starved = false;
        if self.work.broken || !self.work.active || self.backend.fd().is_none() {
            return;
        }
        let backend = &mut *self.backend;
        let stopped = if self.shared.link_up() {
            let largest = largest(self.work.offloads, self.mtu);
            let filter = &self.work.filter;
            let result = self.rx.run(backend, &self.shared, filter, largest);
            if self.rx.publish() {
                self.interrupt.queue(self.rx.index);
            }
            result
        } else {
            Ok(self.rx.drain(backend, &self.shared))
        };
        match stopped {
            // The backend is looked at again at once where it still has frames.
            Ok(Stopped::Empty | Stopped::Budget) => {}
            Ok(Stopped::NoBuffers) => self.work.rx_starved = true,
            Ok(Stopped::Limit) => self.work.rx_at = Some(later(self.shared.inbound.wait(now()))),
            Ok(Stopped::Gone) => self.gone(poll),
            Err(error) => self.fail(error),
        }
        // A backend that holds frames it has read already isn't readable for them.
        if matches!(stopped, Ok(Stopped::Budget)) {
            self.work.rx_at = Some(now());
        }
    }

    fn transmit(&mut self, poll: &Poll) {
        self.work.tx_at = None;
        self.work.tx_full = false;
        if self.work.broken {
            return;
        }
        let result = self.tx.run(&mut *self.backend, &self.shared, self.source);
        if self.tx.publish() {
            self.interrupt.queue(self.tx.index);
        }
        match result {
            Ok(Stopped::NoBuffers) => {}
            Ok(Stopped::Empty) => self.work.tx_full = true,
            Ok(Stopped::Budget) => self.work.tx_at = Some(now()),
            Ok(Stopped::Limit) => self.work.tx_at = Some(later(self.shared.outbound.wait(now()))),
            Ok(Stopped::Gone) => {
                self.gone(poll);
                self.work.tx_at = Some(now());
            }
            Err(error) => self.fail(error),
        }
    }

    /// The other end is gone: the link is down, and nothing is waited for there.
    fn gone(&mut self, poll: &Poll) {
        self.watch(poll, None);
        self.shared.backend_gone();
    }

    /// Waits at the backend for just what can be dealt with.
    fn rewatch(&mut self, poll: &Poll) {
        let reads = self.work.active
            && !self.work.broken
            && !self.work.rx_starved
            && self.work.rx_at.is_none()
            && self.rx.queue.is_some();
        let interest = match (reads, self.work.tx_full && !self.work.broken) {
            (true, true) => Some(Interest::Both),
            (true, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Write),
            // A hang-up would be told again and again.
            (false, false) => None,
        };
        self.watch(poll, interest);
    }

    fn watch(&mut self, poll: &Poll, interest: Option<Interest>) {
        if self.work.interest == interest {
            return;
        }
        let Some(fd) = self.backend.fd() else {
            // Closed, which removed it.
            self.work.interest = None;
            return;
        };
        let result = match (self.work.interest, interest) {
            (None, Some(interest)) => poll.add(fd, BACKEND, interest),
            (_, Some(interest)) => poll.modify(fd, BACKEND, interest),
            (_, None) => poll.remove(fd),
        };
        match result {
            Ok(()) => self.work.interest = interest,
            Err(error) => log::error!("waiting for a network card's other end: {error}"),
        }
    }

    fn commands(&mut self) {
        if self.work.broken {
            return;
        }
        let result = self.run_commands();
        if let Some(control) = &mut self.control
            && control.queue.as_mut().is_some_and(Queue::publish)
        {
            self.interrupt.queue(control.index);
        }
        if let Err(error) = result {
            self.fail(error);
        }
    }

    fn run_commands(&mut self) -> Result<(), QueueError> {
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        let max_pairs = control.max_pairs;
        let Some(queue) = &mut control.queue else {
            return Ok(());
        };
        let mut chain = queue.chain();
        loop {
            while queue.pop(&mut chain)? {
                let change = answer(&chain, &self.shared, self.features, max_pairs);
                if change != Change::Nothing {
                    self.shared.changed();
                }
                queue.push(&chain, u32::from(!chain.writable().is_empty()));
            }
            if !queue.enable_notifications()? {
                return Ok(());
            }
        }
    }

    /// A queue by its index in the device.
    fn queue(&mut self, index: u16) -> Option<&mut Option<Queue>> {
        if index == self.rx.index {
            Some(&mut self.rx.queue)
        } else if index == self.tx.index {
            Some(&mut self.tx.queue)
        } else {
            let control = self.control.as_mut()?;
            (index == control.index).then_some(&mut control.queue)
        }
    }

    /// Takes a queue out of use, or into it.
    pub fn replace_queue(&mut self, index: u16, queue: Option<Queue>, poll: Option<&Poll>) {
        if index == self.rx.index {
            self.rx.rest();
        }
        if let Some(place) = self.queue(index) {
            *place = queue;
        }
        if let Some(poll) = poll {
            self.receive(poll);
            self.transmit(poll);
            self.commands();
            self.rewatch(poll);
        }
    }

    /// Gives back what was taken in advance.
    pub fn rest(&mut self) {
        self.rx.rest();
    }
}

/// Carries out the command in `chain` and writes its answer.
fn answer(chain: &Chain, shared: &Shared, features: u64, max_pairs: u16) -> Change {
    let len = (chain.readable().len() as usize).min(control::LONGEST + 1);
    let mut data = vec![0; len];
    chain.read_at(0, &mut data);
    let (answer, change) = if len > control::LONGEST {
        (control::ERR, Change::Nothing)
    } else {
        control::command(&mut lock(&shared.state), features, max_pairs, &data)
    };
    chain.write_at(0, &[answer]);
    change
}

fn now() -> Instant {
    Instant::now()
}

/// At least a little: the thread doesn't spin for the last byte of a limit.
fn later(wait: Duration) -> Instant {
    let longest = Duration::from_secs(1);
    now() + wait.clamp(Duration::from_millis(1), longest)
}

impl Handler for Pair {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        self.work.generation = None;
        self.work.interest = None;
        poll.add(&self.rx_kick, RX, Interest::Read)?;
        poll.add(&self.tx_kick, TX, Interest::Read)?;
        poll.add(
            &self.shared.wakes[usize::from(self.number)],
            WAKE,
            Interest::Read,
        )?;
        if let Some(control) = &self.control {
            poll.add(&control.kick, CONTROL, Interest::Read)?;
        }
        self.commands();
        self.refresh();
        self.transmit(poll);
        self.receive(poll);
        self.rewatch(poll);
        Ok(())
    }

    fn ready(&mut self, token: u64, poll: &Poll) {
        match token {
            RX => {
                take(&self.rx_kick);
                // Unless buffers were waited for, the backend's readiness says when.
                if self.work.rx_starved || self.rx.is_pending() {
                    self.receive(poll);
                }
            }
            TX => {
                take(&self.tx_kick);
                if !self.work.tx_full {
                    self.transmit(poll);
                }
            }
            WAKE => {
                take(&self.shared.wakes[usize::from(self.number)]);
                self.refresh();
                self.transmit(poll);
                self.receive(poll);
            }
            CONTROL => {
                if let Some(control) = &self.control {
                    take(&control.kick);
                }
                self.commands();
                self.refresh();
            }
            _ => {
                if self.work.tx_full {
                    match self.backend.flush() {
                        Ok(()) | Err(Trouble::Refused(_)) => self.transmit(poll),
                        Err(Trouble::Later) => {}
                        Err(Trouble::Gone) => self.gone(poll),
                    }
                }
                if self.work.rx_at.is_none() && !self.work.rx_starved {
                    self.receive(poll);
                }
            }
        }
        self.rewatch(poll);
    }

    fn deadline(&self) -> Option<Instant> {
        if self.work.broken {
            return None;
        }
        [self.work.rx_at, self.work.tx_at, self.work.announce_at]
            .into_iter()
            .flatten()
            .min()
    }

    fn timer(&mut self, poll: &Poll) {
        let now = now();
        if self.work.rx_at.is_some_and(|at| at <= now) {
            self.receive(poll);
        }
        if self.work.tx_at.is_some_and(|at| at <= now) {
            self.transmit(poll);
        }
        if self.work.announce_at.is_some_and(|at| at <= now) {
            self.announce_again();
        }
        self.rewatch(poll);
    }

    fn end(&mut self, _poll: &Poll) -> bool {
        self.rest();
        true
    }
}

/// The features of the control queue and their conditions are in one place: what follows from the
/// device's configuration.
pub(super) fn offered(backend: u64, pairs: u16, mtu: bool, fixed_source: bool) -> u64 {
    let mut features = backend
        | f::MAC
        | f::STATUS
        | f::MRG_RXBUF
        | f::CTRL_VQ
        | f::CTRL_RX
        | f::CTRL_VLAN
        | f::CTRL_RX_EXTRA
        | f::GUEST_ANNOUNCE;
    if mtu {
        features |= f::MTU;
    }
    if pairs > 1 {
        features |= f::MQ;
    }
    if backend & f::GUEST_CSUM != 0 {
        features |= f::CTRL_GUEST_OFFLOADS;
    }
    if !fixed_source {
        features |= f::CTRL_MAC_ADDR;
    }
    features
}
