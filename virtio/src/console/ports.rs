//! The device's thread: all ports and the control queues.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::message::{self, Message};
use super::shared::{INPUT, Inner, Port, Shared};
use super::state::tell;
use crate::device::Interrupt;
use crate::life::lock;
use crate::queue::{Chain, Queue, QueueError};
use crate::worker::{Handler, Interest, Poll, take};

const WAKE: u64 = 1 << 32;
/// Queue with messages to the driver.
const CONTROL_RX: usize = 2;
/// Queue with messages from the driver.
const CONTROL_TX: usize = 3;
/// Bytes offered to the host at a time.
const CHUNK: usize = 16 << 10;
/// Such pieces, or chains, of one port before others have their turn.
const BUDGET: u32 = 64;

/// A port's queue to the guest; the one from the guest is the next (5.3.2).
pub(super) fn receive_queue(port: u32) -> usize {
    let port = port as usize;
    if port == 0 { 0 } else { 2 * port + 2 }
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    ToDriver,
    FromDriver,
    ToGuest(u32),
    FromGuest(u32),
}

fn role(index: usize) -> Role {
    let port = match index {
        CONTROL_RX => return Role::ToDriver,
        CONTROL_TX => return Role::FromDriver,
        0 | 1 => 0,
        // Queues are counted by u16.
        _ => (index / 2 - 1) as u32,
    };
    if index.is_multiple_of(2) {
        Role::ToGuest(port)
    } else {
        Role::FromGuest(port)
    }
}

/// What offering a chain to the host came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Offer {
    /// It took everything.
    Whole,
    /// It has no room.
    Full,
    /// There is more, but others wait.
    More,
}

/// Everything the thread has.
#[derive(Debug)]
pub(super) struct Ports {
    pub shared: Arc<Shared>,
    pub interrupt: Arc<dyn Interrupt>,
    pub multiport: bool,
    pub queues: Vec<Option<Queue>>,
    pub kicks: Vec<OwnedFd>,
    /// Ports with more output than fits into one turn.
    pub again: BTreeSet<u32>,
    pub chunk: Vec<u8>,
    pub broken: bool,
}

impl Ports {
    /// Runs `work`, shows the driver what it did with queue `index`, and deals with its error.
    fn on_queue<R: Default>(
        &mut self,
        index: usize,
        work: impl FnOnce(&mut Queue, &Shared, &mut Vec<u8>) -> Result<R, QueueError>,
    ) -> R {
        if self.broken {
            return R::default();
        }
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return R::default();
        };
        let result = work(queue, &self.shared, &mut self.chunk);
        if queue.publish() {
            // The device has at most 1024 queues.
            self.interrupt.queue(index as u16);
        }
        result.unwrap_or_else(|error| {
            self.broken = true;
            self.interrupt.needs_reset(&error.to_string());
            R::default()
        })
    }

    /// Input of one port, as far as the guest has given buffers.
    fn feed(&mut self, number: u32) {
        let wanted = self.on_queue(receive_queue(number), |queue, shared, chunk| {
            let mut chain = queue.chain();
            queue.disable_notifications();
            while lock(&shared.inner)
                .port(number)
                .is_some_and(|p| !p.input.is_empty())
            {
                if !queue.pop(&mut chain)? {
                    if queue.enable_notifications()? {
                        continue;
                    }
                    break;
                }
                chunk.clear();
                if let Some(port) = lock(&shared.inner).port(number) {
                    let room = (chain.writable().len() as usize).min(CHUNK);
                    chunk.extend(port.input.drain(..room.min(port.input.len())));
                }
                chain.write_at(0, chunk);
                // At most CHUNK.
                queue.push(&chain, chunk.len() as u32);
            }
            let mut inner = lock(&shared.inner);
            Ok(inner.port(number).and_then(|port| {
                let room = port.guest_open && port.input.len() <= INPUT / 2;
                (room && std::mem::take(&mut port.wants_room)).then(|| Arc::clone(&port.host))
            }))
        });
        if let Some(host) = wanted {
            host.input_room();
        }
    }

    /// Output of one port, as far as its other end takes it.
    fn drain(&mut self, number: u32) {
        let more = self.on_queue(receive_queue(number) + 1, |queue, shared, chunk| {
            queue.disable_notifications();
            let mut chain = queue.chain();
            let mut budget = BUDGET;
            while budget > 0 {
                if !queue.pop(&mut chain)? {
                    if queue.enable_notifications()? {
                        continue;
                    }
                    return Ok(false);
                }
                budget -= 1;
                let offer = offer(&chain, number, shared, chunk, &mut budget);
                if offer != Offer::Whole {
                    // The rest stays in the queue.
                    queue.undo_pop();
                    return Ok(offer == Offer::More);
                }
                queue.push(&chain, 0);
            }
            Ok(true)
        });
        if more {
            self.again.insert(number);
        }
    }

    /// Tells the driver what it is to know, as far as it has given buffers.
    fn tell(&mut self) {
        if !self.multiport {
            return;
        }
        self.on_queue(CONTROL_RX, |queue, shared, _| {
            let mut chain = queue.chain();
            while has_news(&lock(&shared.inner)) {
                if !queue.pop(&mut chain)? {
                    if queue.enable_notifications()? {
                        continue;
                    }
                    break;
                }
                let Some(bytes) = next_message(&mut lock(&shared.inner)) else {
                    queue.undo_pop();
                    break;
                };
                let written = chain.write_at(0, &bytes);
                if written < bytes.len() {
                    log::debug!("virtio-serial: the driver's buffer is too small for a message");
                }
                // A message is short.
                queue.push(&chain, written as u32);
            }
            Ok(())
        });
    }

    /// Hears what the driver says.
    fn hear(&mut self) {
        if !self.multiport {
            return;
        }
        self.on_queue(CONTROL_TX, |queue, shared, _| {
            let mut chain = queue.chain();
            loop {
                while queue.pop(&mut chain)? {
                    if let Some(bytes) = chain.read_array::<8>(0) {
                        heard(Message::decode(bytes), shared);
                    }
                    queue.push(&chain, 0);
                }
                if !queue.enable_notifications()? {
                    return Ok(());
                }
            }
        });
        self.tell();
    }

    /// Something has happened on the host side.
    fn look(&mut self) {
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for (number, port) in &mut lock(&self.shared.inner).ports {
            if !port.input.is_empty() {
                inputs.push(*number);
            }
            if std::mem::take(&mut port.output_room) {
                outputs.push(*number);
            }
        }
        for port in inputs {
            self.feed(port);
        }
        for port in outputs {
            self.drain(port);
        }
        self.tell();
    }

    fn kicked(&mut self, index: usize) {
        match role(index) {
            Role::ToDriver => self.tell(),
            Role::FromDriver => self.hear(),
            Role::ToGuest(port) => self.feed(port),
            Role::FromGuest(port) => self.drain(port),
        }
    }

    /// Takes a queue out of use, or into it.
    pub fn replace_queue(&mut self, index: usize, queue: Option<Queue>, running: bool) {
        if let Some(place) = self.queues.get_mut(index) {
            *place = queue;
        }
        if let Role::FromGuest(port) = role(index)
            && let Some(port) = lock(&self.shared.inner).port(port)
        {
            port.taken = 0;
        }
        if running {
            self.kicked(index);
        }
    }
}

/// Offers the host what is in `chain`.
fn offer(
    chain: &Chain,
    number: u32,
    shared: &Shared,
    chunk: &mut Vec<u8>,
    budget: &mut u32,
) -> Offer {
    let (host, mut taken) = match lock(&shared.inner).port(number) {
        Some(port) => (Arc::clone(&port.host), port.taken),
        // Nobody is there to hear it.
        None => return Offer::Whole,
    };
    let offer = loop {
        if taken >= chain.readable().len() {
            break Offer::Whole;
        }
        if *budget == 0 {
            break Offer::More;
        }
        *budget -= 1;
        chunk.resize(CHUNK, 0);
        let read = chain.read_at(taken, chunk);
        let sent = host.send(&chunk[..read]).min(read);
        // At most CHUNK.
        taken += sent as u32;
        if sent < read {
            break Offer::Full;
        }
    };
    if let Some(port) = lock(&shared.inner).port(number) {
        port.taken = if offer == Offer::Whole { 0 } else { taken };
    }
    offer
}

fn has_news(inner: &Inner) -> bool {
    inner.ready && inner.ports.values().any(|port| port.tell != 0)
}

/// The next message for the driver.
fn next_message(inner: &mut Inner) -> Option<Vec<u8>> {
    if !inner.ready {
        return None;
    }
    let (columns, rows) = (inner.columns, inner.rows);
    let (&number, port) = inner.ports.iter_mut().find(|(_, port)| port.tell != 0)?;
    let bit = port.tell & port.tell.wrapping_neg();
    port.tell &= !bit;
    let message = |event, value: bool, rest: &[u8]| {
        let value = value.into();
        Message {
            port: number,
            event,
            value,
        }
        .encode(rest)
    };
    Some(match bit {
        tell::REMOVE => {
            inner.removed(number);
            message(message::PORT_REMOVE, true, &[])
        }
        tell::ADD => message(message::PORT_ADD, true, &[]),
        tell::CONSOLE => message(message::CONSOLE_PORT, true, &[]),
        tell::NAME => message(message::PORT_NAME, true, port.name.as_bytes()),
        tell::OPEN => {
            port.host_open = port.connected;
            message(message::PORT_OPEN, port.connected, &[])
        }
        // Linux takes the rows first, against 5.3.6.2, and has done so ever since 2010.
        _ => {
            let size = [rows.to_le_bytes(), columns.to_le_bytes()].concat();
            message(message::RESIZE, true, &size)
        }
    })
}

/// The driver has said something.
fn heard(message: Message, shared: &Shared) {
    let mut inner = lock(&shared.inner);
    let on = message.value != 0;
    if message.event == message::DEVICE_READY {
        inner.ready = on;
        for port in inner.ports.values_mut().filter(|p| !p.gone) {
            port.tell = if on { tell::ADD } else { 0 };
        }
        return;
    }
    let (has_size, ready) = (inner.rows != 0 && inner.columns != 0, inner.ready);
    let Some(port) = inner.port(message.port).filter(|_| ready) else {
        return;
    };
    match message.event {
        message::PORT_READY => set_ready(port, on, has_size && message.port == 0),
        message::PORT_OPEN => {
            let news = port.open(on);
            drop(inner);
            if let Some((host, room)) = news {
                host.guest_open(on);
                if room {
                    host.input_room();
                }
            }
        }
        _ => {}
    }
}

fn set_ready(port: &mut Port, ready: bool, has_size: bool) {
    port.ready = ready;
    if !ready {
        return;
    }
    if port.console {
        port.tell |= tell::CONSOLE;
        if has_size {
            port.tell |= tell::RESIZE;
        }
    }
    if !port.name.is_empty() {
        port.tell |= tell::NAME;
    }
    if port.connected {
        port.tell |= tell::OPEN;
    }
}

impl Handler for Ports {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&self.shared.wake, WAKE, Interest::Read)?;
        for (index, kick) in (0..).zip(&self.kicks) {
            poll.add(kick, index, Interest::Read)?;
        }
        for index in 0..self.queues.len() {
            if self.queues[index].is_some() {
                self.kicked(index);
            }
        }
        self.look();
        Ok(())
    }

    fn ready(&mut self, token: u64, _poll: &Poll) {
        if token == WAKE {
            take(&self.shared.wake);
            self.look();
            return;
        }
        // Tokens are indices of queues.
        let index = token as usize;
        if let Some(kick) = self.kicks.get(index) {
            take(kick);
        }
        self.kicked(index);
    }

    fn deadline(&self) -> Option<Instant> {
        (!self.again.is_empty()).then(Instant::now)
    }

    fn timer(&mut self, _poll: &Poll) {
        for port in std::mem::take(&mut self.again) {
            self.drain(port);
        }
    }

    fn end(&mut self, _poll: &Poll) -> bool {
        // Looked at again when it begins again.
        self.again.clear();
        true
    }
}
