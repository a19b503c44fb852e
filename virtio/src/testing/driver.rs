//! The driver's side of virtqueues.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{Random, TestInterrupt, TestRam};
use crate::device::{Activation, QueueSetup};
use crate::memory::GuestMemory;
use crate::{feature, worker};

const RAM: usize = 8 << 20;
/// Rings lie below, buffers above.
const BUFFERS: u64 = 1 << 20;

/// A chain the device has given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Used {
    pub head: u16,
    /// Bytes the device says it has written.
    pub len: u32,
    /// The writable part, all of it.
    pub data: Vec<u8>,
}

/// A chain the device has.
#[derive(Debug, Default)]
struct Flying {
    descriptors: Vec<u16>,
    buffers: Vec<(u64, u64)>,
    writable: Vec<(u64, u64)>,
}

pub(crate) struct DriverQueue {
    pub setup: QueueSetup,
    free: Vec<u16>,
    flying: HashMap<u16, Flying>,
    next_available: u16,
    /// Available index at the last kick.
    kicked: u16,
    next_used: u16,
    doorbell: Option<Box<dyn Fn() + Send>>,
}

impl fmt::Debug for DriverQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverQueue")
            .field("setup", &self.setup)
            .finish_non_exhaustive()
    }
}

/// A driver of one device.
#[derive(Debug)]
pub(crate) struct Driver {
    pub ram: Arc<TestRam>,
    pub interrupt: Arc<TestInterrupt>,
    pub features: u64,
    pub queues: Vec<DriverQueue>,
    /// Free pieces of RAM for buffers.
    holes: Vec<(u64, u64)>,
}

impl Driver {
    /// One queue of each of `sizes`, set up in RAM of 8 MiB; `features` are taken as negotiated.
    pub fn new(sizes: &[u16], features: u64) -> Self {
        let ram = Arc::new(TestRam::new(RAM));
        let mut driver = Self {
            holes: vec![(BUFFERS, ram.len() - BUFFERS)],
            ram,
            interrupt: Arc::default(),
            features,
            queues: Vec::new(),
        };
        let mut at = 0x1000;
        for &size in sizes {
            let size64 = u64::from(size);
            let setup = QueueSetup {
                size,
                descriptors: at,
                driver: at + 16 * size64,
                device: (at + 18 * size64 + 6).next_multiple_of(4),
                ..QueueSetup::default()
            };
            at = (setup.device + 8 * size64 + 6).next_multiple_of(0x100);
            driver.queues.push(DriverQueue {
                setup,
                free: (0..size).rev().collect(),
                flying: HashMap::new(),
                next_available: 0,
                kicked: 0,
                next_used: 0,
                doorbell: None,
            });
        }
        assert!(at <= BUFFERS);
        driver
    }

    /// What `Device::activate` wants; kicks go straight to the device.
    pub fn activation(&mut self) -> Activation {
        let kicks = self.queues.iter_mut().map(|queue| {
            let kick = worker::eventfd().unwrap();
            let ours = kick.as_fd_owned();
            queue.doorbell = Some(Box::new(move || worker::signal(&ours)));
            OwnedFd::from(kick)
        });
        Activation {
            kicks: kicks.collect(),
            memory: Arc::clone(&self.ram) as Arc<dyn GuestMemory>,
            features: self.features,
            queues: self.queues.iter().map(|q| Some(q.setup)).collect(),
            interrupt: Arc::clone(&self.interrupt) as _,
        }
    }

    /// The activation for a saved device's `load`: queues go on from where the old device was
    /// (`setups` as its transport kept them), everything in flight is still this driver's.
    pub fn reactivation(&mut self, setups: &[Option<QueueSetup>]) -> Activation {
        Activation {
            queues: setups.to_vec(),
            ..self.activation()
        }
    }

    /// Kicks of queue `index` go here from now on.
    pub fn set_doorbell(&mut self, index: usize, doorbell: impl Fn() + Send + 'static) {
        self.queues[index].doorbell = Some(Box::new(doorbell));
    }

    /// The queue as after a reset: empty rings, nothing in flight.
    pub fn reset_queue(&mut self, index: usize) {
        let setup = self.queues[index].setup;
        let end = setup.device + 6 + 8 * u64::from(setup.size);
        self.ram.write(
            setup.descriptors,
            &vec![0; (end - setup.descriptors) as usize],
        );
        let flying: Vec<Flying> = self.queues[index]
            .flying
            .drain()
            .map(|(_, flying)| flying)
            .collect();
        for flying in flying {
            self.free(&flying.buffers);
        }
        let queue = &mut self.queues[index];
        queue.free = (0..setup.size).rev().collect();
        (queue.next_available, queue.kicked, queue.next_used) = (0, 0, 0);
    }

    /// All queues as after a reset, and the interrupts forgotten.
    pub fn reset(&mut self) {
        (0..self.queues.len()).for_each(|index| self.reset_queue(index));
        self.interrupt.clear();
    }

    /// A piece of RAM.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let len = len.max(1).next_multiple_of(16);
        let hole = self
            .holes
            .iter_mut()
            .find(|hole| hole.1 >= len)
            .expect("test RAM is used up");
        let start = hole.0;
        *hole = (start + len, hole.1 - len);
        start
    }

    fn free(&mut self, buffers: &[(u64, u64)]) {
        for &(start, len) in buffers {
            self.holes.push((start, len.max(1).next_multiple_of(16)));
        }
        self.holes.sort_unstable();
        self.holes.dedup_by(|next, hole| {
            let joins = hole.0 + hole.1 == next.0;
            if joins {
                hole.1 += next.1;
            }
            joins
        });
        self.holes.retain(|hole| hole.1 > 0);
    }

    /// Room for a chain of `count` descriptors.
    pub fn has_room(&self, queue: usize, count: usize) -> bool {
        self.queues[queue].free.len() >= count
    }

    /// Chains the device has.
    pub fn in_flight(&self, queue: usize) -> usize {
        self.queues[queue].flying.len()
    }

    /// Adds a chain (no kick): readable buffers, then writable ones of these lengths.
    pub fn add(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> u16 {
        self.add_chain(queue, readable, writable, false)
    }

    /// As [`Self::add`], by an indirect table.
    pub fn add_indirect(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> u16 {
        self.add_chain(queue, readable, writable, true)
    }

    fn add_chain(
        &mut self,
        index: usize,
        readable: &[&[u8]],
        writable: &[u32],
        indirect: bool,
    ) -> u16 {
        let mut flying = Flying::default();
        let mut parts = Vec::new();
        for data in readable {
            let at = self.alloc(data.len() as u64);
            self.ram.write(at, data);
            flying.buffers.push((at, data.len() as u64));
            parts.push((at, data.len() as u32, 0));
        }
        for &len in writable {
            let at = self.alloc(u64::from(len));
            flying.buffers.push((at, u64::from(len)));
            flying.writable.push((at, u64::from(len)));
            parts.push((at, len, 2));
        }
        let last = parts.len() - 1;
        let head = if indirect {
            let len = 16 * parts.len() as u64;
            let table = self.alloc(len);
            flying.buffers.push((table, len));
            for (i, &(address, len, flags)) in parts.iter().enumerate() {
                let flags = flags | u16::from(i < last);
                self.write_descriptor_at(table, i as u16, address, len, flags, i as u16 + 1);
            }
            let head = self.queues[index].free.pop().expect("a free descriptor");
            flying.descriptors.push(head);
            self.write_descriptor(index, head, table, len as u32, 4, 0);
            head
        } else {
            let free = &mut self.queues[index].free;
            let descriptors = free.split_off(free.len() - parts.len());
            for (i, &(address, len, flags)) in parts.iter().enumerate() {
                let flags = flags | u16::from(i < last);
                let next = descriptors.get(i + 1).copied().unwrap_or(0);
                self.write_descriptor(index, descriptors[i], address, len, flags, next);
            }
            let head = descriptors[0];
            flying.descriptors = descriptors;
            head
        };
        self.queues[index].flying.insert(head, flying);
        self.offer(index, head);
        head
    }

    /// Writes a descriptor of the queue's table: flags 1 next, 2 write, 4 indirect.
    pub fn write_descriptor(
        &self,
        queue: usize,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let table = self.queues[queue].setup.descriptors;
        self.write_descriptor_at(table, index, address, len, flags, next);
    }

    /// Writes a descriptor of any table.
    pub fn write_descriptor_at(
        &self,
        table: u64,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.ram.write(table + 16 * u64::from(index), &bytes);
    }

    /// Makes descriptor `head` available (no kick).
    pub fn offer(&mut self, queue: usize, head: u16) {
        let state = &mut self.queues[queue];
        let slot = u64::from(state.next_available & (state.setup.size - 1));
        self.ram
            .write(state.setup.driver + 4 + 2 * slot, &head.to_le_bytes());
        state.next_available = state.next_available.wrapping_add(1);
        let index = state.next_available;
        self.set_available(queue, index);
    }

    /// Writes the available index.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        fence(Ordering::SeqCst);
        self.ram
            .write(self.queues[queue].setup.driver + 2, &index.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// Writes the available ring's flags: 1 wants no interrupts.
    pub fn set_flags(&mut self, queue: usize, flags: u16) {
        self.ram
            .write(self.queues[queue].setup.driver, &flags.to_le_bytes());
    }

    fn half(&self, address: u64) -> u16 {
        let bytes = self.ram.read(address, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Kicks if the device wants to be; whether it did.
    pub fn kick(&mut self, queue: usize) -> bool {
        fence(Ordering::SeqCst);
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let state = &self.queues[queue];
        let (old, new) = (state.kicked, state.next_available);
        let wanted = if event_idx {
            let event = self.half(state.setup.device + 4 + 8 * u64::from(state.setup.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.half(state.setup.device) & 1 == 0
        };
        self.queues[queue].kicked = new;
        if wanted {
            self.ring(queue);
        }
        wanted
    }

    /// Kicks in any case.
    pub fn ring(&self, queue: usize) {
        (self.queues[queue].doorbell.as_ref().expect("activated"))();
    }

    /// Takes a used chain if there is one.
    pub fn used(&mut self, queue: usize) -> Option<Used> {
        let state = &self.queues[queue];
        let (next, setup) = (state.next_used, state.setup);
        if self.half(setup.device + 2) == next {
            return None;
        }
        fence(Ordering::SeqCst);
        let slot = u64::from(next & (setup.size - 1));
        let element = self.ram.read(setup.device + 4 + 8 * slot, 8);
        let head = u32::from_le_bytes(element[..4].try_into().unwrap());
        let len = u32::from_le_bytes(element[4..].try_into().unwrap());
        let state = &mut self.queues[queue];
        state.next_used = next.wrapping_add(1);
        let head = u16::try_from(head).expect("a head");
        let flying = state
            .flying
            .remove(&head)
            .unwrap_or_else(|| panic!("queue {queue}: {head} used but not in flight"));
        state.free.extend(flying.descriptors.iter().rev());
        let mut data = Vec::new();
        for &(at, len) in &flying.writable {
            data.extend(self.ram.read(at, len));
        }
        self.free(&flying.buffers);
        Some(Used { head, len, data })
    }

    /// Asks for an interrupt when the next chain is used.
    pub fn set_used_event(&mut self, queue: usize) {
        if self.features & feature::EVENT_IDX != 0 {
            let state = &self.queues[queue];
            self.ram.write(
                state.setup.driver + 4 + 2 * u64::from(state.setup.size),
                &state.next_used.to_le_bytes(),
            );
        }
    }

    /// Waits for the next used chain as a driver does: asks for an interrupt, sleeps until it
    /// comes. Panics if it never does.
    pub fn wait(&mut self, queue: usize) -> Used {
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            let count = self.interrupt.seen().queue(queue as u16);
            self.set_used_event(queue);
            fence(Ordering::SeqCst);
            if let Some(used) = self.used(queue) {
                return used;
            }
            self.interrupt
                .wait(&format!("interrupt of queue {queue}"), |seen| {
                    seen.queue(queue as u16) > count || seen.needs_reset.is_some()
                });
            if let Some(reason) = self.interrupt.seen().needs_reset {
                panic!("the device needs a reset: {reason}");
            }
        }
    }

    /// Adds a chain, kicks, waits for the next used chain.
    pub fn request(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Used {
        self.add(queue, readable, writable);
        self.kick(queue);
        self.wait(queue)
    }

    /// Fills the queue's rings and descriptor table with what a hostile driver might, and offers
    /// it: for fuzzing.
    pub fn scramble(&mut self, queue: usize, random: &mut Random) {
        let setup = self.queues[queue].setup;
        let size = u64::from(setup.size);
        for index in 0..setup.size.min(16) {
            let address = match random.below(6) {
                0 => random.next(),
                1 => self.ram.len() - random.below(64),
                2 => setup.descriptors + random.below(16 * size),
                3 => setup.device + random.below(8 * size),
                _ => BUFFERS + random.below(1 << 16),
            };
            let len = match random.below(8) {
                0 => random.next() as u32,
                1 => 0,
                2 => u32::MAX,
                3 => 16 * random.below(64) as u32,
                _ => random.below(8192) as u32,
            };
            let flags = if random.once_in(8) {
                random.next() as u16
            } else {
                random.pick(&[0, 1, 1, 2, 3, 3])
            };
            let next = if random.once_in(8) {
                random.next() as u16
            } else {
                random.below(size.min(16)) as u16
            };
            self.write_descriptor(queue, index, address, len, flags, next);
        }
        for slot in 0..size.min(16) {
            let head = if random.once_in(16) {
                random.next() as u16
            } else {
                random.below(size.min(16)) as u16
            };
            self.ram
                .write(setup.driver + 4 + 2 * slot, &head.to_le_bytes());
        }
        // Something at the buffers: requests' headers.
        for _ in 0..64 {
            let at = BUFFERS + random.below(1 << 16);
            let value = if random.once_in(2) {
                random.next()
            } else {
                random.below(16)
            };
            self.ram.write(at, &value.to_le_bytes());
        }
        let state = &mut self.queues[queue];
        state.next_available = if random.once_in(8) {
            random.next() as u16
        } else {
            state
                .next_available
                .wrapping_add(random.below(size.min(16) + 1) as u16)
        };
        let index = state.next_available;
        self.set_available(queue, index);
        self.ring(queue);
    }
}

/// A second descriptor for the same eventfd.
trait Second {
    fn as_fd_owned(&self) -> OwnedFd;
}

impl Second for nix::sys::eventfd::EventFd {
    fn as_fd_owned(&self) -> OwnedFd {
        use std::os::fd::AsFd;
        self.as_fd().try_clone_to_owned().unwrap()
    }
}
