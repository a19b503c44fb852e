//! The event queue on its thread (5.6.6.3): what has come, gone and changed.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::request;
use super::target::{Event, Shared, event};
use crate::device::{Interrupt, QueueSetup};
use crate::queue::{Chain, Queue, QueueError};
use crate::worker::{self, Handler, Interest, Poll};

const KICK: u64 = 0;
const EVENT: u64 = 1;

/// Bytes of an event.
pub(super) const LEN: u32 = 16;

/// The event queue.
#[derive(Debug)]
pub(super) struct EventQueue {
    index: u16,
    queue: Queue,
    chain: Chain,
    kick: Arc<OwnedFd>,
    shared: Arc<Shared>,
    interrupt: Arc<dyn Interrupt>,
    ending: bool,
}

impl EventQueue {
    /// Queue `index` of the device.
    pub fn new(
        index: u16,
        queue: Queue,
        kick: Arc<OwnedFd>,
        shared: Arc<Shared>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            index,
            chain: queue.chain(),
            queue,
            kick,
            shared,
            interrupt,
            ending: false,
        }
    }

    pub fn setup(&self) -> QueueSetup {
        self.queue.setup()
    }

    fn run(&mut self, poll: &Poll) {
        if poll.abandoned() || self.ending {
            return;
        }
        if let Err(error) = self.tell() {
            let index = self.index;
            self.interrupt
                .needs_reset(&format!("queue {index}: {error}"));
        }
        if self.queue.publish() {
            self.interrupt.queue(self.index);
        }
    }

    /// Tells what there is as long as there are buffers.
    fn tell(&mut self) -> Result<(), QueueError> {
        loop {
            let shared = Arc::clone(&self.shared);
            let mut events = shared.events();
            if events.waiting.is_empty() && !events.missed {
                // A buffer that comes is not waited for before there is something to tell.
                return Ok(());
            }
            if !self.queue.has_available()? && !self.queue.enable_notifications()? {
                return Ok(());
            }
            if !self.queue.pop(&mut self.chain)? {
                return Ok(());
            }
            let next = events.waiting.pop_front();
            let missed = std::mem::take(&mut events.missed);
            drop(events);
            let flag = if missed { event::MISSED } else { 0 };
            let mut bytes = [0; LEN as usize];
            let what = next.map_or(0, |next| next.event);
            bytes[..4].copy_from_slice(&(what | flag).to_le_bytes());
            if let Some(Event {
                target,
                lun,
                reason,
                ..
            }) = next
            {
                bytes[4..12].copy_from_slice(&request::name((target, lun)));
                bytes[12..].copy_from_slice(&reason.to_le_bytes());
            }
            let len = self.chain.write_at(0, &bytes);
            self.queue.push(&self.chain, len as u32);
        }
    }
}

impl Handler for EventQueue {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&*self.kick, KICK, Interest::Read)?;
        poll.add(&self.shared.event_wake, EVENT, Interest::Read)?;
        self.ending = false;
        self.run(poll);
        Ok(())
    }

    fn ready(&mut self, token: u64, poll: &Poll) {
        if token == KICK {
            worker::take(&*self.kick);
        } else {
            worker::take(&self.shared.event_wake);
        }
        self.run(poll);
    }

    fn end(&mut self, _poll: &Poll) -> bool {
        self.ending = true;
        true
    }
}
