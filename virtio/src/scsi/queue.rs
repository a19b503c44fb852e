//! One request queue on its thread.
//!
//! What a queue has of a unit (a line) is made at the unit's first command, and goes when the unit does, or the thread
//! comes to rest: then nothing here keeps a unit that was taken away.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::inquiry::{self, REPORT_LUNS, REQUEST_SENSE};
use super::request::{self, Answer, Command, Response, Sizes, Whom};
use super::sense::{BAD_FIELD, BAD_OPERATION, ILLEGAL_REQUEST, NO_SENSE, Sense, fixed};
use super::target::{Mailbox, Seated, Shared, Task, Wish};
use super::unit::{Address, Todo, Unit};
use crate::block::{Action, Completion, Failure, Op, Request, StorageQueue};
use crate::device::{Interrupt, QueueSetup};
use crate::life::lock;
use crate::memory::GuestMemory;
use crate::queue::{Chain, Queue, QueueError};
use crate::worker::{self, Handler, Interest, Poll};

const KICK: u64 = 0;
const MAIL: u64 = 1;
/// The first line's.
const LINE: u64 = 2;

/// So many requests are begun before those that are done are given back.
const BATCH: usize = 32;
/// Most pieces of memory that one write of a repeated block is made of.
const PIECES: usize = 1024;
/// So many of them are kept room for.
const BUFFERS_KEPT: usize = 2048;

const NO_SUCH_UNIT: Sense = (ILLEGAL_REQUEST, 0x25, 0);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Busy,
    /// It waits for the machine to be resumed, after a failure.
    Parked,
}

/// What is left of a block that is to be in many places.
#[derive(Debug, Clone, Copy)]
struct Pattern {
    offset: u64,
    left: u64,
}

/// A chain from the ring until it is given back. Reused: no allocation per request.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    state: State,
    address: Address,
    tag: u64,
    line: usize,
    /// Storage requests it waits for.
    pending: u32,
    /// First failure among them.
    failed: Option<i32>,
    /// Data goes to the guest: so many bytes of it.
    read: u32,
    residual: u32,
    pattern: Option<Pattern>,
    /// What is left after its data is written.
    then_flush: bool,
    then_through: bool,
    /// Who waits for its end, and has it not be what it would.
    tasks: Vec<Arc<Task>>,
}

/// A unit as this queue has it.
#[derive(Debug)]
struct Line {
    /// The first field: when `seated` says that the unit is gone, this is, too.
    storage: Option<Box<dyn StorageQueue>>,
    seated: Arc<Seated>,
    /// Slots in the storage's hands.
    busy: usize,
    /// The unit is there no more.
    stale: bool,
}

/// A queue with the requests of it that are under way.
#[derive(Debug)]
pub(super) struct RequestQueue {
    index: u16,
    queue: Queue,
    kick: Arc<OwnedFd>,
    memory: Arc<dyn GuestMemory>,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    interrupt: Arc<dyn Interrupt>,
    sizes: Sizes,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Oldest first.
    parked: Vec<usize>,
    lines: Vec<Option<Line>>,
    /// Of the units when they were last looked at.
    generation: u64,
    /// Slots in the storage's hands.
    busy: usize,
    /// After a failure that stops the machine: nothing new is begun.
    stopped: bool,
    ending: bool,
    // Kept for their memory.
    done: Vec<Completion>,
    buffers: Vec<libc::iovec>,
    /// Tasks that are let go of when what they wait for has been told.
    released: Vec<Arc<Task>>,
}

// SAFETY: the raw pointers are in `buffers`, which is empty between calls.
unsafe impl Send for RequestQueue {}

/// What a queue is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub queue: Queue,
    pub kick: Arc<OwnedFd>,
    pub memory: Arc<dyn GuestMemory>,
    pub shared: Arc<Shared>,
    pub interrupt: Arc<dyn Interrupt>,
    pub sizes: Sizes,
}

impl RequestQueue {
    /// Queue `index` of the device, which hears of things by `mailbox`.
    pub fn new(index: u16, parts: Parts, mailbox: Arc<Mailbox>) -> Self {
        Self {
            index,
            queue: parts.queue,
            kick: parts.kick,
            memory: parts.memory,
            shared: parts.shared,
            mailbox,
            interrupt: parts.interrupt,
            sizes: parts.sizes,
            slots: Vec::new(),
            free: Vec::new(),
            parked: Vec::new(),
            lines: Vec::new(),
            generation: 0,
            busy: 0,
            stopped: false,
            ending: false,
            done: Vec::new(),
            buffers: Vec::new(),
            released: Vec::new(),
        }
    }

    /// Takes up chains that were parked when the device was saved.
    pub fn park(&mut self, heads: &[u16]) -> Result<(), QueueError> {
        for &head in heads {
            let slot = self.slot();
            self.queue.pop_head(head, &mut self.slots[slot].chain)?;
            self.slots[slot].state = State::Parked;
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
                state: State::Free,
                address: (0, 0),
                tag: 0,
                line: 0,
                pending: 0,
                failed: None,
                read: 0,
                residual: 0,
                pattern: None,
                then_flush: false,
                then_through: false,
                tasks: Vec::new(),
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
            self.look_at_units(poll);
            self.read_mail(poll);
            let mut some = self.finish_done(poll);
            if let Err(error) = self.begin_available(poll) {
                self.broken(&error);
            }
            some |= self.finish_done(poll);
            if self.queue.publish() {
                self.interrupt.queue(self.index);
            }
            self.released.clear();
            if some {
                // What follows what is done has been begun: others have had their turn in between.
                continue;
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

    /// Lets go of units that have been taken away.
    fn look_at_units(&mut self, poll: &Poll) {
        let generation = self.shared.generation();
        if generation != self.generation {
            self.generation = generation;
            for line in self.lines.iter_mut().flatten() {
                let now = self.shared.unit(line.seated.address);
                line.stale |= !now.is_some_and(|now| Arc::ptr_eq(&now, &line.seated));
            }
        }
        self.drop_lines(poll, |line| line.stale);
    }

    fn drop_lines(&mut self, poll: &Poll, which: impl Fn(&Line) -> bool) {
        for place in &mut self.lines {
            let idle = place.as_ref().filter(|line| line.busy == 0);
            if let Some(line) = idle
                && which(line)
            {
                if let Some(storage) = &line.storage
                    && let Err(error) = poll.remove(storage.fd())
                {
                    log::error!("a disk's queue: {error}");
                }
                *place = None;
            }
        }
    }

    /// The line to a unit, if that is there.
    fn line(&mut self, address: Address) -> Option<usize> {
        let is = |line: &Line| !line.stale && line.seated.address == address;
        let known = self.lines.iter().position(|l| l.as_ref().is_some_and(is));
        if known.is_some() && self.generation == self.shared.generation() {
            return known;
        }
        let seated = self.shared.unit(address)?;
        let same = |line: &Line| Arc::ptr_eq(&line.seated, &seated);
        let known = self.lines.iter().position(|l| l.as_ref().is_some_and(same));
        if known.is_some() {
            return known;
        }
        let line = Some(Line {
            seated,
            storage: None,
            busy: 0,
            stale: false,
        });
        match self.lines.iter().position(Option::is_none) {
            Some(free) => {
                self.lines[free] = line;
                Some(free)
            }
            None => {
                self.lines.push(line);
                Some(self.lines.len() - 1)
            }
        }
    }

    /// What task management functions want of this queue.
    fn read_mail(&mut self, poll: &Poll) {
        let tasks = std::mem::take(&mut *lock(&self.mailbox.tasks));
        if tasks.is_empty() {
            return;
        }
        // They are about what the driver had put into the ring before, too.
        for _ in 0..self.queue.setup().size {
            match self.take(poll) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    self.broken(&error);
                    break;
                }
            }
        }
        for task in tasks {
            for slot in &mut self.slots {
                if slot.state == State::Free || !task.is_of(slot.address, slot.tag) {
                    continue;
                }
                task.found.store(true, Ordering::Release);
                if task.wish != Wish::Query {
                    slot.tasks.push(Arc::clone(&task));
                }
            }
            self.released.push(task);
        }
        let (gone, kept) = std::mem::take(&mut self.parked)
            .into_iter()
            .partition(|slot: &usize| !self.slots[*slot].tasks.is_empty());
        self.parked = kept;
        for slot in gone {
            self.answer(slot, Answer::of(Response::Aborted));
        }
    }

    /// Begins up to a batch of requests.
    fn begin_available(&mut self, poll: &Poll) -> Result<(), QueueError> {
        for _ in 0..BATCH {
            if self.ending || self.stopped || !self.take(poll)? {
                break;
            }
        }
        Ok(())
    }

    /// Takes one request, and begins it if that may be; whether there was one.
    fn take(&mut self, poll: &Poll) -> Result<bool, QueueError> {
        if !self.queue.has_available()? {
            return Ok(false);
        }
        let slot = self.slot();
        match self.queue.pop(&mut self.slots[slot].chain) {
            Ok(true) => {
                self.start(slot, poll);
                Ok(true)
            }
            other => {
                self.free.push(slot);
                other
            }
        }
    }

    /// Begins the request in `slot`, or answers it, or keeps it for later.
    fn start(&mut self, slot: usize, poll: &Poll) {
        let own = &mut self.slots[slot];
        let command = match request::parse(&own.chain, self.sizes) {
            Ok(command) => command,
            Err(error) => {
                own.state = State::Free;
                self.released.append(&mut own.tasks);
                self.free.push(slot);
                return self.broken(&error);
            }
        };
        own.state = State::Busy;
        own.tag = command.tag;
        (own.pending, own.failed) = (0, None);
        (own.read, own.residual) = (0, command.room.max(command.brings));
        own.pattern = None;
        (own.then_flush, own.then_through) = (false, false);
        let Whom::Unit(address) = command.whom else {
            return self.answer(slot, Answer::of(Response::BadTarget));
        };
        own.address = address;
        if self.ending || self.stopped {
            own.state = State::Parked;
            return self.parked.push(slot);
        }
        if command.brings > 0 && command.room > 0 {
            // Both ways at a time was not offered.
            return self.answer(slot, Answer::of(Response::Failure));
        }
        let todo = match self.line(address) {
            _ if command.cdb[0] == REPORT_LUNS => self.report_luns(address.0, &command.cdb),
            Some(line) => {
                self.slots[slot].line = line;
                let unit = self.unit(slot);
                unit.map(|unit| unit.run(&command.cdb))
            }
            None if self.shared.luns(address.0).is_empty() => None,
            None => Some(match command.cdb[0] {
                inquiry::INQUIRY => inquiry::nobody(&command.cdb),
                REQUEST_SENSE => inquiry::give(fixed(NO_SUCH_UNIT).to_vec(), command.cdb[4].into()),
                _ => Todo::Check(NO_SUCH_UNIT),
            }),
        };
        match todo {
            Some(todo) => self.carry_out(slot, &command, todo, poll),
            None => self.answer(slot, Answer::of(Response::BadTarget)),
        }
    }

    fn unit(&self, slot: usize) -> Option<Arc<Unit>> {
        let line = self.lines.get(self.slots[slot].line)?.as_ref()?;
        Some(Arc::clone(&line.seated.unit))
    }

    /// Which units a target has (SPC-4, 6.33). Unit 0 is always among them. `None`: no target.
    fn report_luns(&self, target: u8, cdb: &[u8; 32]) -> Option<Todo> {
        let mut luns = self.shared.luns(target);
        if luns.is_empty() {
            return None;
        }
        let room = u32::from_be_bytes([cdb[6], cdb[7], cdb[8], cdb[9]]);
        match cdb[2] {
            0 | 2 if room >= 16 => {}
            // Well-known ones, which there are none of.
            1 if room >= 16 => luns.clear(),
            _ => return Some(Todo::Check(BAD_FIELD)),
        }
        if cdb[2] != 1 && luns.first() != Some(&0) {
            luns.insert(0, 0);
        }
        let len = 8 * luns.len() as u32;
        let mut bytes = len.to_be_bytes().to_vec();
        bytes.extend([0; 4]);
        for lun in luns {
            bytes.extend(request::reported(lun));
            bytes.extend([0; 6]);
        }
        Some(inquiry::give(bytes, room.into()))
    }

    fn carry_out(&mut self, slot: usize, command: &Command, todo: Todo, poll: &Poll) {
        let (brings, room) = (command.brings, command.room);
        match todo {
            Todo::Good => self.succeed(slot),
            Todo::Check(sense) => self.check(slot, sense),
            Todo::In(bytes) => {
                let own = &mut self.slots[slot];
                let len = bytes.len().min(room as usize);
                own.chain.write_at(self.sizes.response(), &bytes[..len]);
                (own.read, own.residual) = (len as u32, room - len as u32);
                self.succeed(slot);
            }
            Todo::Out(len) if brings < len => self.overrun(slot),
            Todo::Out(len) => {
                let own = &mut self.slots[slot];
                own.residual = brings - len;
                let mut list = vec![0; len as usize];
                own.chain.read_at(self.sizes.request(), &mut list);
                let Some(unit) = self.unit(slot) else {
                    return self.answer(slot, Answer::of(Response::BadTarget));
                };
                match unit.list(&command.cdb, &list) {
                    Todo::Out(_) => self.check(slot, BAD_OPERATION),
                    todo => self.carry_out(slot, command, todo, poll),
                }
            }
            Todo::Read { len, .. } if u64::from(room) < len => self.overrun(slot),
            Todo::Read { offset, len } => {
                let own = &mut self.slots[slot];
                // No more than the room.
                let bytes = len as u32;
                (own.read, own.residual) = (bytes, room - bytes);
                let data = own.chain.writable();
                data.iovecs(self.sizes.response(), bytes, &mut self.buffers);
                self.submit(slot, Op::Read, offset, len, poll);
            }
            Todo::Write { len, .. } if u64::from(brings) < len => self.overrun(slot),
            Todo::Write {
                offset,
                len,
                through,
            } => {
                let own = &mut self.slots[slot];
                let bytes = len as u32;
                own.residual = brings - bytes;
                own.then_flush = through;
                let data = own.chain.readable();
                data.iovecs(self.sizes.request(), bytes, &mut self.buffers);
                self.submit(slot, Op::Write, offset, len, poll);
            }
            Todo::Same {
                offset,
                len,
                unmap,
                zeroes,
            } => {
                let Some(unit) = self.unit(slot) else {
                    return self.answer(slot, Answer::of(Response::BadTarget));
                };
                let block = unit.options.logical_block_size;
                if !zeroes && brings < block {
                    return self.overrun(slot);
                }
                let own = &mut self.slots[slot];
                own.residual = brings - if zeroes { 0 } else { block };
                let mut bytes = vec![0; if zeroes { 0 } else { block as usize }];
                own.chain.read_at(self.sizes.request(), &mut bytes);
                if bytes.iter().all(|byte| *byte == 0) {
                    return self.submit(slot, Op::WriteZeroes { unmap }, offset, len, poll);
                }
                own.pattern = Some(Pattern { offset, left: len });
                self.repeat(slot, block, poll);
            }
            Todo::Flush => self.submit(slot, Op::Flush, 0, 0, poll),
            Todo::WriteThrough => {
                self.slots[slot].then_through = true;
                self.submit(slot, Op::Flush, 0, 0, poll);
            }
            Todo::Discard(ranges) => {
                for (offset, len) in &ranges {
                    if self.slots[slot].state == State::Busy {
                        self.submit(slot, Op::Discard, *offset, *len, poll);
                    }
                }
                if ranges.is_empty() {
                    self.succeed(slot);
                }
            }
        }
    }

    /// Writes the block that a request brings to the next of the places that are left. Straight from guest memory:
    /// the guest may change it meanwhile, which is its own affair.
    fn repeat(&mut self, slot: usize, block: u32, poll: &Poll) {
        let own = &mut self.slots[slot];
        let Some(pattern) = &mut own.pattern else {
            return;
        };
        let data = own.chain.readable();
        let pieces = data.slice(self.sizes.request(), block).count().max(1);
        let blocks = (PIECES / pieces).max(1) as u64;
        let len = pattern.left.min(blocks * u64::from(block));
        for _ in 0..len / u64::from(block) {
            data.iovecs(self.sizes.request(), block, &mut self.buffers);
        }
        let offset = pattern.offset;
        pattern.offset += len;
        pattern.left -= len;
        self.submit(slot, Op::Write, offset, len, poll);
    }

    /// Has the storage do it, with `buffers`.
    fn submit(&mut self, slot: usize, op: Op, offset: u64, len: u64, poll: &Poll) {
        if let Err(error) = self.open_storage(self.slots[slot].line, poll) {
            log::error!("a disk's queue: {error}");
            self.buffers.clear();
            // Others of this command may be under way.
            self.slots[slot].failed.get_or_insert(libc::EIO);
            if self.slots[slot].pending == 0 {
                self.answer(slot, Answer::of(Response::Failure));
            }
            return;
        }
        let own = &mut self.slots[slot];
        let Some(Some(line)) = self.lines.get_mut(own.line) else {
            return;
        };
        if own.pending == 0 {
            self.busy += 1;
            line.busy += 1;
        }
        own.pending += 1;
        if let Some(storage) = &mut line.storage {
            storage.submit(&Request {
                op,
                offset,
                len,
                buffers: &self.buffers,
                token: slot as u64,
            });
        }
        self.buffers.clear();
        self.buffers.shrink_to(BUFFERS_KEPT);
    }

    fn open_storage(&mut self, at: usize, poll: &Poll) -> io::Result<()> {
        let Some(Some(line)) = self.lines.get_mut(at) else {
            return Err(io::Error::other("its unit is gone"));
        };
        if line.storage.is_none() {
            let storage = line.seated.unit.storage.queue(Arc::clone(&self.memory))?;
            poll.add(storage.fd(), LINE + at as u64, Interest::Read)?;
            line.storage = Some(storage);
        }
        Ok(())
    }

    /// Takes what the storages have done; whether there was something.
    fn finish_done(&mut self, poll: &Poll) -> bool {
        let mut done = std::mem::take(&mut self.done);
        for line in self.lines.iter_mut().flatten() {
            if let Some(storage) = &mut line.storage
                && line.busy > 0
            {
                storage.complete(&mut done);
            }
        }
        let any = !done.is_empty();
        for completion in done.drain(..) {
            if let Some(slot) = self.completed(&completion) {
                self.finish(slot, poll);
            }
        }
        self.done = done;
        any
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
        if let Some(Some(line)) = self.lines.get_mut(slot.line) {
            line.busy -= 1;
        }
        Some(index)
    }

    /// Nobody wants them: the device has been given up.
    fn drop_completions(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        for storage in self.lines.iter_mut().flatten() {
            if let Some(storage) = &mut storage.storage {
                storage.complete(&mut done);
            }
        }
        for completion in done.drain(..) {
            self.completed(&completion);
        }
        self.done = done;
    }

    /// All that a command waited for is done.
    fn finish(&mut self, slot: usize, poll: &Poll) {
        let Some(unit) = self.unit(slot) else {
            return self.answer(slot, Answer::of(Response::BadTarget));
        };
        let own = &mut self.slots[slot];
        let aborted = !own.tasks.is_empty();
        let Some(errno) = own.failed else {
            if own.pattern.is_some_and(|pattern| pattern.left > 0) && !aborted {
                return self.repeat(slot, unit.options.logical_block_size, poll);
            }
            if std::mem::take(&mut own.then_flush) && !aborted {
                return self.submit(slot, Op::Flush, 0, 0, poll);
            }
            if std::mem::take(&mut own.then_through) && !unit.set_writethrough(true) {
                return self.check(slot, unit.failure(true, libc::EIO));
            }
            return self.succeed(slot);
        };
        let write = own.read == 0;
        // A drive without a medium is the guest's business, not the host's.
        if errno == libc::ENOMEDIUM {
            return self.check(slot, unit.failure(write, errno));
        }
        let action = match unit.options.policy.action(write, errno) {
            // Nobody waits for it to be tried again.
            Action::Stop if aborted => Action::Report,
            action => action,
        };
        unit.hooks.failed(Failure {
            write,
            errno,
            action,
        });
        match action {
            Action::Ignore => self.succeed(slot),
            Action::Report => self.check(slot, unit.failure(write, errno)),
            Action::Stop => {
                self.stopped = true;
                self.slots[slot].state = State::Parked;
                self.parked.push(slot);
            }
        }
    }

    fn succeed(&mut self, slot: usize) {
        let residual = self.slots[slot].residual;
        self.answer(
            slot,
            Answer {
                residual,
                ..Answer::of(Response::Ok)
            },
        );
    }

    fn check(&mut self, slot: usize, sense: Sense) {
        // Nothing of its data counts.
        let chain = &self.slots[slot].chain;
        let room = chain.writable().len() - self.sizes.response();
        let residual = room.max(chain.readable().len() - self.sizes.request());
        self.answer(
            slot,
            Answer {
                residual,
                sense,
                ..Answer::of(Response::Ok)
            },
        );
    }

    /// There are more data than the guest has room for, or than it brings.
    fn overrun(&mut self, slot: usize) {
        self.answer(slot, Answer::of(Response::Overrun));
    }

    /// Gives the chain back.
    fn answer(&mut self, slot: usize, mut answer: Answer) {
        let own = &mut self.slots[slot];
        if let Some(task) = own.tasks.first() {
            answer = Answer::of(match task.wish {
                Wish::Reset => Response::Reset,
                Wish::Abort | Wish::Query => Response::Aborted,
            });
            answer.sense = NO_SENSE;
        }
        answer.put(&own.chain, self.sizes);
        self.queue
            .push(&own.chain, self.sizes.response() + own.read);
        own.state = State::Free;
        // They are told when the driver sees this.
        self.released.append(&mut own.tasks);
        self.free.push(slot);
    }
}

impl Handler for RequestQueue {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&*self.kick, KICK, Interest::Read)?;
        poll.add(&self.mailbox.wake, MAIL, Interest::Read)?;
        self.ending = false;
        self.stopped = self.queue.is_broken();
        for slot in std::mem::take(&mut self.parked) {
            self.start(slot, poll);
        }
        self.run(poll);
        Ok(())
    }

    fn ready(&mut self, token: u64, poll: &Poll) {
        match token {
            KICK => {
                worker::take(&*self.kick);
            }
            MAIL => {
                worker::take(&self.mailbox.wake);
            }
            _ => {}
        }
        self.run(poll);
    }

    fn deadline(&self) -> Option<Instant> {
        let lines = self.lines.iter().flatten();
        let storages = lines.filter_map(|line| line.storage.as_ref());
        storages.filter_map(|storage| storage.deadline()).min()
    }

    fn timer(&mut self, poll: &Poll) {
        self.run(poll);
    }

    fn end(&mut self, poll: &Poll) -> bool {
        if !self.ending {
            self.ending = true;
            self.run(poll);
        }
        if self.busy == 0 {
            self.drop_lines(poll, |_| true);
        }
        self.busy == 0
    }
}
