//! One request queue on its thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::request::{self, HEADER_LEN, Rules, Status, Work};
use super::storage::{Completion, Op, Request, StorageQueue};
use super::{Action, Failure, Shared};
use crate::device::{Interrupt, QueueSetup};
use crate::queue::{Chain, Queue, QueueError};
use crate::worker::{self, Handler, Interest, Poll};

const KICK: u64 = 0;
const DONE: u64 = 1;

/// So many requests are begun before those that are done are given back: what the host's page
/// cache serves at once doesn't wait for the whole queue.
const BATCH: usize = 32;

/// A chain from the ring until it is given back. Reused: no allocation per request.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    work: Work,
    /// Storage requests it waits for.
    pending: u32,
    /// First failure among them.
    failed: Option<i32>,
}

/// A queue with the requests of it that are under way.
#[derive(Debug)]
pub(super) struct BlockQueue {
    index: u16,
    queue: Queue,
    kick: Arc<OwnedFd>,
    storage: Box<dyn StorageQueue>,
    shared: Arc<Shared>,
    interrupt: Arc<dyn Interrupt>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Chains that wait for the machine to be resumed, after a failure; oldest first.
    parked: Vec<usize>,
    /// Slots in the storage's hands.
    busy: usize,
    /// After a failure that stops the machine: nothing new is begun.
    stopped: bool,
    ending: bool,
    // Kept for their memory.
    done: Vec<Completion>,
    buffers: Vec<libc::iovec>,
}

// SAFETY: the raw pointers are in `buffers`, which is empty between calls.
unsafe impl Send for BlockQueue {}

impl BlockQueue {
    pub fn new(
        index: u16,
        queue: Queue,
        kick: Arc<OwnedFd>,
        storage: Box<dyn StorageQueue>,
        shared: Arc<Shared>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            index,
            queue,
            kick,
            storage,
            shared,
            interrupt,
            slots: Vec::new(),
            free: Vec::new(),
            parked: Vec::new(),
            busy: 0,
            stopped: false,
            ending: false,
            done: Vec::new(),
            buffers: Vec::new(),
        }
    }

    /// Takes up chains that were parked when the device was saved.
    pub fn park(&mut self, heads: &[u16]) -> Result<(), QueueError> {
        for &head in heads {
            let slot = self.slot();
            self.queue.pop_head(head, &mut self.slots[slot].chain)?;
            self.parked.push(slot);
        }
        Ok(())
    }

    pub fn setup(&self) -> QueueSetup {
        self.queue.setup()
    }

    /// Heads of the parked chains.
    pub fn parked(&self) -> Vec<u16> {
        let head = |&slot: &usize| self.slots[slot].chain.head();
        self.parked.iter().map(head).collect()
    }

    /// A free slot, taken.
    fn slot(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                chain: self.queue.chain(),
                work: Work::Answer(Status::Ok),
                pending: 0,
                failed: None,
            });
            self.slots.len() - 1
        })
    }

    /// The driver broke its queue.
    fn broken(&mut self, error: &dyn std::error::Error) {
        self.stopped = true;
        let index = self.index;
        self.interrupt
            .needs_reset(&format!("queue {index}: {error}"));
    }

    /// Gives back what is done and begins what is there, until there is neither.
    fn run(&mut self, poll: &Poll) {
        if poll.abandoned() {
            self.drop_completions();
            return;
        }
        self.queue.disable_notifications();
        loop {
            self.finish_done();
            if let Err(error) = self.begin_available() {
                self.broken(&error);
            }
            self.finish_done();
            if self.queue.publish() {
                self.interrupt.queue(self.index);
            }
            if self.ending || self.stopped {
                return;
            }
            match self.queue.enable_notifications() {
                Ok(true) => self.queue.disable_notifications(),
                Ok(false) => return,
                Err(error) => return self.broken(&error),
            }
        }
    }

    /// Begins up to a batch of requests.
    fn begin_available(&mut self) -> Result<(), QueueError> {
        for _ in 0..BATCH {
            if self.ending || self.stopped || !self.queue.has_available()? {
                break;
            }
            let slot = self.slot();
            match self.queue.pop(&mut self.slots[slot].chain) {
                Ok(true) => self.start(slot),
                other => {
                    self.free.push(slot);
                    return other.map(drop);
                }
            }
        }
        Ok(())
    }

    /// Begins the request in `slot`, or answers it.
    fn start(&mut self, slot: usize) {
        let rules = self.shared.rules();
        let work = match request::parse(&self.slots[slot].chain, &rules) {
            Ok(work) => work,
            Err(error) => {
                self.free.push(slot);
                return self.broken(&error);
            }
        };
        self.slots[slot].work = work;
        self.slots[slot].failed = None;
        let chain = &self.slots[slot].chain;
        match work {
            Work::Answer(status) => self.answer(slot, status),
            Work::Id { room } => {
                let id = request::id(&self.shared.serial);
                let len = id.len().min(room as usize);
                chain.write_at(0, &id[..len]);
                self.answer(slot, Status::Ok);
            }
            Work::Flush => self.submit(slot, Op::Flush, request::Range { offset: 0, len: 0 }),
            Work::Transfer { op, range } => {
                // At most 4 GiB: the chain's own limit.
                let len = range.len as u32;
                if op == Op::Read {
                    chain.writable().iovecs(0, len, &mut self.buffers);
                } else {
                    chain.readable().iovecs(HEADER_LEN, len, &mut self.buffers);
                }
                self.submit(slot, op, range);
                self.buffers.clear();
            }
            Work::Ranges { zeroes, count } => self.submit_ranges(slot, &rules, zeroes, count),
        }
    }

    fn submit_ranges(&mut self, slot: usize, rules: &Rules, zeroes: bool, count: u32) {
        for index in 0..count {
            match request::range(&self.slots[slot].chain, rules, zeroes, index) {
                Ok((_, request::Range { len: 0, .. })) => {}
                Ok((op, range)) => self.submit(slot, op, range),
                // The driver has changed it since it was checked.
                Err(_) => self.slots[slot].failed = Some(libc::EINVAL),
            }
        }
        if self.slots[slot].pending == 0 {
            self.finish(slot);
        }
    }

    fn submit(&mut self, slot: usize, op: Op, range: request::Range) {
        if self.slots[slot].pending == 0 {
            self.busy += 1;
        }
        self.slots[slot].pending += 1;
        self.storage.submit(&Request {
            op,
            offset: range.offset,
            len: range.len,
            buffers: &self.buffers,
            token: slot as u64,
        });
    }

    /// Takes what the storage has done.
    fn finish_done(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.storage.complete(&mut done);
        for completion in done.drain(..) {
            if let Some(slot) = self.completed(&completion) {
                self.finish(slot);
            }
        }
        self.done = done;
    }

    /// The slot, if this was the last it waited for.
    fn completed(&mut self, completion: &Completion) -> Option<usize> {
        let index = usize::try_from(completion.token).ok()?;
        let slot = self.slots.get_mut(index)?;
        if let Err(errno) = completion.result {
            slot.failed.get_or_insert(errno);
        }
        slot.pending = slot.pending.checked_sub(1)?;
        if slot.pending > 0 {
            return None;
        }
        self.busy -= 1;
        Some(index)
    }

    /// Nobody wants them: the device has been given up.
    fn drop_completions(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.storage.complete(&mut done);
        for completion in done.drain(..) {
            self.completed(&completion);
        }
        self.done = done;
    }

    fn finish(&mut self, slot: usize) {
        let Some(errno) = self.slots[slot].failed else {
            return self.answer(slot, Status::Ok);
        };
        let write = !matches!(self.slots[slot].work, Work::Transfer { op: Op::Read, .. });
        let action = self.shared.policy.action(write, errno);
        self.shared.hooks.failed(Failure {
            write,
            errno,
            action,
        });
        match action {
            Action::Ignore => self.answer(slot, Status::Ok),
            Action::Report => self.answer(slot, Status::IoError),
            Action::Stop => {
                self.stopped = true;
                self.parked.push(slot);
            }
        }
    }

    /// Gives the chain back.
    fn answer(&mut self, slot: usize, status: Status) {
        let chain = &self.slots[slot].chain;
        let len = chain.writable().len();
        chain.write_at(len - 1, &[status as u8]);
        self.queue.push(chain, len);
        self.free.push(slot);
    }
}

impl Handler for BlockQueue {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&*self.kick, KICK, Interest::Read)?;
        poll.add(self.storage.fd(), DONE, Interest::Read)?;
        self.ending = false;
        self.stopped = self.queue.is_broken();
        for slot in std::mem::take(&mut self.parked) {
            self.start(slot);
        }
        self.run(poll);
        Ok(())
    }

    fn ready(&mut self, token: u64, poll: &Poll) {
        if token == KICK {
            worker::take(&*self.kick);
        }
        self.run(poll);
    }

    fn deadline(&self) -> Option<Instant> {
        self.storage.deadline()
    }

    fn timer(&mut self, poll: &Poll) {
        self.run(poll);
    }

    fn end(&mut self, poll: &Poll) -> bool {
        if !self.ending {
            self.ending = true;
            self.run(poll);
        }
        self.busy == 0
    }
}
