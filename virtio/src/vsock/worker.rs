//! The device's thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::muxer::Muxer;
use super::packet::HEADER;
use crate::device::Interrupt;
use crate::queue::{Queue, QueueError};
use crate::worker::{Handler, Interest, Poll, take};

pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENT: usize = 2;
/// How many queues there are.
pub(super) const QUEUES: usize = 3;
/// Packets of one direction before the other has its turn.
const BUDGET: u32 = 64;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: u32 = 0;

/// Everything the thread has.
#[derive(Debug)]
pub(super) struct Worker {
    pub muxer: Muxer,
    pub interrupt: Arc<dyn Interrupt>,
    pub queues: Vec<Option<Queue>>,
    pub kicks: Vec<OwnedFd>,
    /// The guest is to hear that all connections are gone.
    pub lost: bool,
    /// There was more than fits into one turn.
    pub again: bool,
    pub broken: bool,
}

impl Worker {
    /// Moves packets both ways as far as buffers go.
    fn run(&mut self, poll: &Poll) {
        self.again = false;
        if self.broken {
            return;
        }
        let result = self.work(poll);
        for (index, queue) in (0..).zip(&mut self.queues) {
            if queue.as_mut().is_some_and(Queue::publish) {
                self.interrupt.queue(index);
            }
        }
        if let Err(error) = result {
            self.broken = true;
            self.interrupt.needs_reset(&error.to_string());
        }
    }

    fn work(&mut self, poll: &Poll) -> Result<(), QueueError> {
        self.tell_lost()?;
        // What the guest says first: it may have credit in it.
        let heard = self.hear(poll)?;
        let said = self.say(poll)?;
        // Answers may have made room to listen again.
        self.again = heard || said;
        Ok(())
    }

    /// Takes packets from the guest; whether there are more.
    fn hear(&mut self, poll: &Poll) -> Result<bool, QueueError> {
        let Some(Some(queue)) = self.queues.get_mut(TX) else {
            return Ok(false);
        };
        let mut chain = queue.chain();
        for _ in 0..BUDGET {
            if !self.muxer.listens() {
                // The guest must take its answers first.
                return Ok(false);
            }
            if !queue.pop(&mut chain)? {
                if queue.enable_notifications()? {
                    continue;
                }
                return Ok(false);
            }
            self.muxer.hear(&chain, poll);
            queue.push(&chain, 0);
        }
        Ok(true)
    }

    /// Gives packets to the guest; whether there are more and buffers for them.
    fn say(&mut self, poll: &Poll) -> Result<bool, QueueError> {
        let Some(Some(queue)) = self.queues.get_mut(RX) else {
            return Ok(false);
        };
        let mut chain = queue.chain();
        let listened = self.muxer.listens();
        for _ in 0..BUDGET {
            if !self.muxer.has_packet() {
                return Ok(!listened);
            }
            if !queue.pop(&mut chain)? {
                if queue.enable_notifications()? {
                    continue;
                }
                return Ok(!listened && self.muxer.listens());
            }
            if chain.writable().len() as usize <= HEADER {
                // Not even one byte of data has room.
                log::debug!("vsock: a buffer too small");
                queue.push(&chain, 0);
                continue;
            }
            match self.muxer.packet(&chain, poll) {
                Some(len) => queue.push(&chain, len),
                None => queue.undo_pop(),
            }
        }
        Ok(true)
    }

    /// Says that all connections are gone, if that is owed.
    fn tell_lost(&mut self) -> Result<(), QueueError> {
        if !self.lost {
            return Ok(());
        }
        let Some(Some(queue)) = self.queues.get_mut(EVENT) else {
            return Ok(());
        };
        let mut chain = queue.chain();
        loop {
            if queue.pop(&mut chain)? {
                let event = TRANSPORT_RESET.to_le_bytes();
                let written = chain.write_at(0, &event);
                // Four at most.
                queue.push(&chain, written as u32);
                self.lost = false;
                return Ok(());
            }
            if !queue.enable_notifications()? {
                return Ok(());
            }
        }
    }

    /// Takes a queue out of use, or into it.
    pub fn replace_queue(&mut self, index: usize, queue: Option<Queue>, poll: Option<&Poll>) {
        if let Some(place) = self.queues.get_mut(index) {
            *place = queue;
        }
        if let Some(poll) = poll {
            self.run(poll);
        }
    }
}

impl Handler for Worker {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        for (index, kick) in (0..).zip(&self.kicks) {
            poll.add(kick, index, Interest::Read)?;
        }
        self.muxer.begin(poll);
        self.run(poll);
        Ok(())
    }

    fn ready(&mut self, token: u64, poll: &Poll) {
        if let Some(kick) = usize::try_from(token).ok().and_then(|i| self.kicks.get(i)) {
            take(kick);
        } else {
            self.muxer.ready(token, poll);
        }
        self.run(poll);
    }

    fn deadline(&self) -> Option<Instant> {
        if self.again {
            return Some(Instant::now());
        }
        self.muxer.deadline()
    }

    fn timer(&mut self, poll: &Poll) {
        if self.muxer.deadline().is_some_and(|at| at <= Instant::now()) {
            self.muxer.timer(poll);
        }
        self.run(poll);
    }
}
