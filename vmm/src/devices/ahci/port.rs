//! A drive's thread: takes commands from the port's list, has the storage do what they want, answers them.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use virtio::GuestMemory;
use virtio::block::{Action, Completion, Failure, Op, Request, StorageQueue};
use virtio::worker::{self, Handler, Interest, Poll};

use super::ata;
use super::atapi;
use super::drive::{Drive, Todo};
use super::fis::{ABRT, Command, Registers};
use super::hba::{End, Hba, SLOTS, Taken};
use super::table::{Header, Regions};

const KICK: u64 = 0;
const DONE: u64 = 1;
/// So many pieces of guest memory are kept room for.
const BUFFERS_KEPT: usize = 1024;

/// A command in hand.
#[derive(Debug, Default)]
struct Slot {
    header: Header,
    command: Command,
    /// It has a tag; otherwise it is alone.
    queued: bool,
    /// Data goes to the guest.
    to_guest: bool,
    regions: Regions,
    /// Storage requests it waits for.
    pending: u32,
    /// First failure among them.
    failed: Option<i32>,
    /// Its data is written; what is left is a flush.
    then_flush: bool,
    /// After the flush, writes are durable when answered.
    then_through: bool,
}

/// The thread's part of a port.
#[derive(Debug)]
pub struct Port {
    index: usize,
    hba: Arc<Hba>,
    drive: Arc<Drive>,
    kick: Arc<EventFd>,
    storage: Box<dyn StorageQueue>,
    slots: Vec<Slot>,
    /// Slots in hand, one bit each.
    busy: u32,
    /// One of them is alone.
    alone: bool,
    /// Queued commands that are done, to be told of together.
    tags: u32,
    /// The guest wants to know of descriptors of theirs.
    descriptor: bool,
    /// After a failure that stops the machine: nothing new is begun.
    stopped: bool,
    ending: bool,
    // Kept for their memory.
    done: Vec<Completion>,
    buffers: Vec<libc::iovec>,
}

// SAFETY: the raw pointers are in `buffers`, which is empty between calls.
unsafe impl Send for Port {}

impl Port {
    /// At rest.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn new(
        index: usize,
        hba: Arc<Hba>,
        drive: Arc<Drive>,
        kick: Arc<EventFd>,
    ) -> io::Result<Self> {
        let storage = drive.storage.queue(Arc::clone(hba.memory()))?;
        Ok(Self {
            index,
            hba,
            drive,
            kick,
            storage,
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            busy: 0,
            alone: false,
            tags: 0,
            descriptor: false,
            stopped: false,
            ending: false,
            done: Vec::new(),
            buffers: Vec::new(),
        })
    }

    fn memory(&self) -> Arc<dyn GuestMemory> {
        Arc::clone(self.hba.memory())
    }

    fn slot(&mut self, slot: u8) -> &mut Slot {
        &mut self.slots[usize::from(slot & (SLOTS - 1))]
    }

    /// Answers what is done and begins what is there, until there is neither.
    fn run(&mut self, poll: &Poll) {
        if poll.abandoned() {
            return self.drop_completions();
        }
        loop {
            let begun = self.begin_available();
            // What waited for its turn may have it now.
            let ended = self.finish_done();
            self.tell_tags();
            if !begun && !ended || self.ending || self.stopped {
                return;
            }
        }
    }

    /// Begins as many commands as there are slots; whether there was one.
    fn begin_available(&mut self) -> bool {
        let mut begun = false;
        for _ in 0..SLOTS {
            if self.ending || self.stopped || self.alone {
                break;
            }
            let Some(taken) = self.hba.take(self.index) else {
                break;
            };
            if !self.start(&taken) {
                break;
            }
            begun = true;
        }
        begun
    }

    /// Begins a command. False: it waits for others.
    fn start(&mut self, taken: &Taken) -> bool {
        let slot = taken.slot;
        let memory = self.memory();
        let read = Header::read(&*memory, taken.list, slot)
            .and_then(|header| Ok((header, header.frame(&*memory)?)));
        let (header, frame) = match read {
            Ok(read) => read,
            Err(error) => {
                if self.busy != 0 {
                    self.hba.give_back(self.index, slot);
                    return false;
                }
                log::debug!("AHCI: a command that can't be read: {error}");
                self.busy |= 1 << slot;
                self.alone = true;
                self.end(slot, &End::Fault, false);
                return true;
            }
        };
        let command = Command::parse(&frame);
        let queued =
            command.is_some_and(|command| ata::is_queued(&command)) && !self.drive.options.cdrom;
        if self.alone || !queued && self.busy != 0 {
            self.hba.give_back(self.index, slot);
            return false;
        }
        self.busy |= 1 << slot;
        self.alone = !queued;
        let own = self.slot(slot);
        own.header = header;
        own.command = command.unwrap_or_default();
        own.queued = queued;
        own.to_guest = false;
        own.pending = 0;
        own.failed = None;
        (own.then_flush, own.then_through) = (false, false);
        own.regions.clear();
        let Some(command) = command else {
            // Not for this drive: nobody answers, as on the wire.
            self.end(slot, &End::Fault, false);
            return true;
        };
        let mut fault = false;
        let todo = self.drive.run(&command, || {
            header.packet(&*memory).unwrap_or_else(|_| {
                fault = true;
                [0; 16]
            })
        });
        if fault {
            self.end(slot, &End::Fault, false);
            return true;
        }
        if queued {
            // Its tag is what it is known by, which this controller has be the slot's number.
            if usize::from(command.count >> 3 & 31) != usize::from(slot) {
                let registers = Registers::failed(&command, ABRT);
                self.fail(slot, &registers);
                return true;
            }
            self.hba
                .accepted(self.index, slot, &Registers::ok(&command));
        }
        self.carry_out(slot, todo);
        true
    }

    fn carry_out(&mut self, slot: u8, todo: Todo) {
        match todo {
            Todo::Answer(registers) => self.answer(slot, &registers),
            Todo::Quiet => self.end(slot, &End::Quiet, false),
            Todo::Signature => self.end(slot, &End::Signature, false),
            Todo::In(bytes) => self.give(slot, &bytes),
            Todo::Out(len) => self.want(slot, len),
            Todo::Read { offset, len } => {
                self.slot(slot).to_guest = true;
                self.transfer(slot, Op::Read, offset, len);
            }
            Todo::Write {
                offset,
                len,
                through,
            } => {
                self.slot(slot).then_flush = through;
                self.transfer(slot, Op::Write, offset, len);
            }
            Todo::Flush => self.submit(slot, Op::Flush, 0, 0),
            Todo::WriteThrough => {
                self.slot(slot).then_through = true;
                self.submit(slot, Op::Flush, 0, 0);
            }
            Todo::Discard(ranges) => {
                for (offset, len) in &ranges {
                    self.submit(slot, Op::Discard, *offset, *len);
                }
                if ranges.is_empty() {
                    self.succeed(slot);
                }
            }
        }
    }

    /// Where data goes to or comes from; false if that isn't RAM.
    fn find_regions(&mut self, slot: u8, most: u64) -> bool {
        let memory = self.memory();
        let own = self.slot(slot);
        let found = own.header.regions(&*memory, most, &mut own.regions);
        if let Err(error) = &found {
            log::debug!("AHCI: {error}");
        }
        found.is_ok()
    }

    /// Bytes for the guest.
    fn give(&mut self, slot: u8, bytes: &[u8]) {
        if !self.find_regions(slot, bytes.len() as u64) {
            return self.fault(slot);
        }
        let memory = self.memory();
        let own = self.slot(slot);
        if own.regions.fill(&*memory, bytes).is_err() {
            return self.fault(slot);
        }
        self.succeed(slot);
    }

    /// Bytes from the guest.
    fn want(&mut self, slot: u8, len: u64) {
        if !self.find_regions(slot, len) {
            return self.fault(slot);
        }
        let memory = self.memory();
        let own = self.slot(slot);
        let command = own.command;
        if own.regions.total < len {
            return self.too_short(slot);
        }
        match own.regions.gather(&*memory) {
            Ok(bytes) => {
                let todo = self.drive.data(&command, &bytes);
                self.carry_out(slot, todo);
            }
            Err(_) => self.fault(slot),
        }
    }

    fn transfer(&mut self, slot: u8, op: Op, offset: u64, len: u64) {
        if !self.find_regions(slot, len) {
            return self.fault(slot);
        }
        if self.slot(slot).regions.total < len {
            return self.too_short(slot);
        }
        let memory = self.memory();
        let mut buffers = std::mem::take(&mut self.buffers);
        let found = self.slot(slot).regions.buffers(&*memory, &mut buffers);
        self.buffers = buffers;
        match found {
            Ok(()) => self.submit(slot, op, offset, len),
            Err(_) => self.fault(slot),
        }
        self.buffers.clear();
        self.buffers.shrink_to(BUFFERS_KEPT);
    }

    fn submit(&mut self, slot: u8, op: Op, offset: u64, len: u64) {
        self.slot(slot).pending += 1;
        self.storage.submit(&Request {
            op,
            offset,
            len,
            buffers: &self.buffers,
            token: slot.into(),
        });
    }

    /// Takes what the storage has done; whether there was something.
    fn finish_done(&mut self) -> bool {
        let mut done = std::mem::take(&mut self.done);
        let mut any = false;
        loop {
            self.storage.complete(&mut done);
            if done.is_empty() {
                break;
            }
            any = true;
            for completion in done.drain(..) {
                if let Some(slot) = self.completed(&completion) {
                    self.finish(slot);
                }
            }
        }
        self.done = done;
        any
    }

    /// The slot, if this was the last it waited for.
    fn completed(&mut self, completion: &Completion) -> Option<u8> {
        let index = u8::try_from(completion.token).ok()?;
        let slot = self.slots.get_mut(usize::from(index))?;
        if let Err(errno) = completion.result {
            slot.failed.get_or_insert(errno);
        }
        slot.pending = slot.pending.checked_sub(1)?;
        (slot.pending == 0).then_some(index)
    }

    /// Nobody wants them: the drive has been given up.
    fn drop_completions(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.storage.complete(&mut done);
        for completion in done.drain(..) {
            if let Some(slot) = self.completed(&completion) {
                self.busy &= !(1 << slot);
            }
        }
        self.done = done;
    }

    /// All that a command waited for is done.
    fn finish(&mut self, slot: u8) {
        let own = self.slot(slot);
        let Some(errno) = own.failed else {
            if std::mem::take(&mut own.then_flush) {
                return self.submit(slot, Op::Flush, 0, 0);
            }
            if std::mem::take(&mut own.then_through) && !self.drive.set_writethrough(true) {
                let registers = Registers::failed(&self.slot(slot).command, ABRT);
                return self.answer(slot, &registers);
            }
            return self.succeed(slot);
        };
        let write = !own.to_guest;
        let command = own.command;
        // A drive without a medium is the guest's business, not the host's.
        if errno == libc::ENOMEDIUM {
            let registers = self.drive.failure(&command, write, errno);
            return self.answer(slot, &registers);
        }
        let action = self.drive.options.policy.action(write, errno);
        self.drive.hooks.failed(Failure {
            write,
            errno,
            action,
        });
        match action {
            Action::Ignore => self.succeed(slot),
            Action::Report => {
                let registers = self.drive.failure(&command, write, errno);
                self.answer(slot, &registers);
            }
            Action::Stop => {
                self.stopped = true;
                self.release(slot);
                self.hba.keep(self.index, slot);
            }
        }
    }

    /// The slot is out of hand.
    fn release(&mut self, slot: u8) {
        self.busy &= !(1 << slot);
        if !self.slot(slot).queued {
            self.alone = false;
        }
    }

    /// A command has ended well.
    fn succeed(&mut self, slot: u8) {
        let memory = self.memory();
        let cdrom = self.drive.options.cdrom;
        let own = self.slot(slot);
        let command = own.command;
        if own.to_guest {
            own.regions.wrote(&*memory);
        }
        if own.queued {
            self.descriptor |= own.regions.interrupt;
            self.tags |= 1 << slot;
            return self.release(slot);
        }
        let bytes = u32::try_from(own.regions.total).unwrap_or(u32::MAX);
        if own.header.set_count(&*memory, bytes).is_err() {
            return self.fault(slot);
        }
        let packet = cdrom && command.command == 0xa0;
        let end = if packet {
            End::Registers(atapi::good(&command))
        } else if own.regions.total > 0 && ata::is_pio_in(&command) {
            End::Pio(Registers::ok(&command), 512)
        } else {
            End::Registers(Registers::ok(&command))
        };
        self.end(slot, &end, false);
    }

    /// A command ends with these registers.
    fn answer(&mut self, slot: u8, registers: &Registers) {
        if self.slot(slot).queued {
            self.fail(slot, registers);
        } else {
            self.end(slot, &End::Registers(*registers), false);
        }
    }

    /// A queued command fails, and all others with it.
    fn fail(&mut self, slot: u8, registers: &Registers) {
        // What is done by now is.
        self.tell_tags();
        self.release(slot);
        if self.hba.tag_failed(self.index, slot, registers) {
            self.drive.tag_failed(slot, registers);
        }
    }

    /// The guest has less room than the command has data.
    fn too_short(&mut self, slot: u8) {
        let registers = Registers::failed(&self.slot(slot).command, ABRT);
        if self.slot(slot).queued {
            return self.fail(slot, &registers);
        }
        self.end(slot, &End::Registers(registers), true);
    }

    fn fault(&mut self, slot: u8) {
        self.end(slot, &End::Fault, false);
    }

    fn end(&mut self, slot: u8, end: &End, overflow: bool) {
        self.tell_tags();
        self.release(slot);
        let descriptor = self.slot(slot).regions.interrupt;
        self.hba.done(self.index, slot, end, descriptor, overflow);
    }

    /// Tells of the queued commands that are done.
    fn tell_tags(&mut self) {
        let tags = std::mem::take(&mut self.tags);
        let descriptor = std::mem::take(&mut self.descriptor);
        self.hba.tags_done(self.index, tags, descriptor);
    }
}

impl Handler for Port {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&*self.kick, KICK, Interest::Read)?;
        poll.add(self.storage.fd(), DONE, Interest::Read)?;
        self.ending = false;
        self.stopped = false;
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
