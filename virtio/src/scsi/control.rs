//! The control queue on its thread (5.6.6.2): what is to become of commands that are under way.
//!
//! A task management function goes to every request queue, which looks what it has that is meant. The storage can't be
//! stopped: what it has in hand is waited for, and then told as aborted. When no queue has the function any more it is
//! answered.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use super::request::{Response, Whom, whom};
use super::target::{Done, Shared, Task, Wish};
use crate::device::{Interrupt, QueueSetup};
use crate::life::lock;
use crate::queue::{Chain, Queue, QueueError};
use crate::worker::{self, Handler, Interest, Poll};

const KICK: u64 = 0;
const DONE: u64 = 1;

// Kinds of requests.
const TASK: u32 = 0;
const NOTIFICATION_QUERY: u32 = 1;
const NOTIFICATION_SUBSCRIBE: u32 = 2;

// Task management functions.
const ABORT_TASK: u32 = 0;
const ABORT_TASK_SET: u32 = 1;
const CLEAR_TASK_SET: u32 = 3;
const NEXUS_RESET: u32 = 4;
const UNIT_RESET: u32 = 5;
const QUERY_TASK: u32 = 6;
const QUERY_TASK_SET: u32 = 7;

/// Bytes of a task management function, and of a request for notifications.
const TASK_LEN: usize = 24;
const NOTIFICATION_LEN: usize = 16;

#[derive(Debug)]
struct Slot {
    chain: Chain,
    wish: Wish,
}

/// The control queue.
#[derive(Debug)]
pub(super) struct ControlQueue {
    index: u16,
    queue: Queue,
    kick: Arc<OwnedFd>,
    shared: Arc<Shared>,
    interrupt: Arc<dyn Interrupt>,
    done: Arc<Done>,
    /// Functions on their way.
    slots: Vec<Option<Slot>>,
    ending: bool,
}

impl ControlQueue {
    /// Queue `index` of the device.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn new(
        index: u16,
        queue: Queue,
        kick: Arc<OwnedFd>,
        shared: Arc<Shared>,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        Ok(Self {
            index,
            queue,
            kick,
            shared,
            interrupt,
            done: Arc::new(Done {
                list: Mutex::default(),
                wake: worker::eventfd()?,
            }),
            slots: Vec::new(),
            ending: false,
        })
    }

    pub fn setup(&self) -> QueueSetup {
        self.queue.setup()
    }

    /// Answers what is done. Everything is when the request queues are at rest.
    pub fn settle(&mut self) {
        let done = std::mem::take(&mut *lock(&self.done.list));
        for (index, found) in done {
            let Some(slot) = self.slots.get_mut(index).and_then(Option::take) else {
                continue;
            };
            let response = match (slot.wish, found) {
                (Wish::Query, true) => Response::FunctionSucceeded,
                _ => Response::Ok,
            };
            self.answer(&slot.chain, &[response as u8]);
        }
        if self.queue.publish() {
            self.interrupt.queue(self.index);
        }
    }

    fn answer(&mut self, chain: &Chain, bytes: &[u8]) {
        chain.write_at(0, bytes);
        self.queue.push(chain, bytes.len() as u32);
    }

    fn run(&mut self, poll: &Poll) {
        if poll.abandoned() {
            return;
        }
        self.queue.disable_notifications();
        loop {
            let result = self.take_all();
            self.settle();
            let more = match result {
                _ if self.ending => return,
                Ok(()) => self.queue.enable_notifications(),
                Err(error) => Err(error),
            };
            match more {
                Ok(true) => self.queue.disable_notifications(),
                Ok(false) => return,
                Err(error) => {
                    let index = self.index;
                    return self
                        .interrupt
                        .needs_reset(&format!("queue {index}: {error}"));
                }
            }
        }
    }

    fn take_all(&mut self) -> Result<(), QueueError> {
        // A request is given back, or counted as the driver's: no more than its queue has entries.
        while !self.ending && self.queue.has_available()? {
            let mut chain = self.queue.chain();
            if !self.queue.pop(&mut chain)? {
                break;
            }
            self.begin(chain);
        }
        Ok(())
    }

    fn begin(&mut self, chain: Chain) {
        let kind: Option<[u8; 4]> = chain.read_array(0);
        match kind.map(u32::from_le_bytes) {
            Some(TASK) => self.task(chain),
            Some(NOTIFICATION_QUERY | NOTIFICATION_SUBSCRIBE) => {
                let head: Option<[u8; NOTIFICATION_LEN]> = chain.read_array(0);
                let response = head.map(|head| {
                    let [_, _, _, _, lun @ ..] = head;
                    self.present(lun.first_chunk().copied().unwrap_or_default())
                });
                // Nothing is notified of this way.
                let mut bytes = [0; 5];
                bytes[4] = response.unwrap_or(Response::Failure) as u8;
                self.answer(&chain, &bytes);
            }
            _ => self.answer(&chain, &[Response::Failure as u8]),
        }
    }

    /// Whether there is such a unit.
    fn present(&self, lun: [u8; 8]) -> Response {
        match whom(lun) {
            Whom::Unit(address) if self.shared.unit(address).is_some() => Response::Ok,
            Whom::Unit((target, _)) if !self.shared.luns(target).is_empty() => {
                Response::IncorrectLun
            }
            _ => Response::BadTarget,
        }
    }

    fn task(&mut self, chain: Chain) {
        let Some(head) = chain.read_array::<TASK_LEN>(0) else {
            return self.answer(&chain, &[Response::Failure as u8]);
        };
        let [_, _, _, _, a, b, c, d, lun @ ..] = head;
        let function = u32::from_le_bytes([a, b, c, d]);
        let (lun, tag) = lun.split_at(8);
        let lun: [u8; 8] = lun.first_chunk().copied().unwrap_or_default();
        let tag = tag.first_chunk().map_or(0, |tag| u64::from_le_bytes(*tag));
        let Whom::Unit(address) = whom(lun) else {
            return self.answer(&chain, &[Response::BadTarget as u8]);
        };
        let whole = function == NEXUS_RESET;
        let refused = match (function, self.present(lun)) {
            (8.. | 2, _) => Some(Response::FunctionRejected),
            (_, Response::IncorrectLun) if whole => None,
            (_, Response::Ok) => None,
            (_, why) => Some(why),
        };
        if let Some(why) = refused {
            return self.answer(&chain, &[why as u8]);
        }
        let (wish, tag) = match function {
            ABORT_TASK => (Wish::Abort, Some(tag)),
            ABORT_TASK_SET | CLEAR_TASK_SET => (Wish::Abort, None),
            QUERY_TASK => (Wish::Query, Some(tag)),
            QUERY_TASK_SET => (Wish::Query, None),
            UNIT_RESET | NEXUS_RESET => (Wish::Reset, None),
            _ => return self.answer(&chain, &[Response::FunctionRejected as u8]),
        };
        if wish == Wish::Reset {
            for seated in self.shared.all() {
                if seated.address == address || whole && seated.address.0 == address.0 {
                    seated.unit.reset_logical();
                }
            }
        }
        let slot = self.slots.iter().position(Option::is_none);
        let slot = slot.unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(Slot { chain, wish });
        let task = Arc::new(Task {
            wish,
            target: address.0,
            lun: (!whole).then_some(address.1),
            tag,
            found: AtomicBool::new(false),
            slot,
            done: Arc::clone(&self.done),
        });
        for mailbox in lock(&self.shared.mailboxes).iter().flatten() {
            lock(&mailbox.tasks).push(Arc::clone(&task));
            worker::signal(&mailbox.wake);
        }
    }
}

impl Handler for ControlQueue {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&*self.kick, KICK, Interest::Read)?;
        poll.add(&self.done.wake, DONE, Interest::Read)?;
        self.ending = false;
        self.run(poll);
        Ok(())
    }

    fn ready(&mut self, token: u64, poll: &Poll) {
        if token == KICK {
            worker::take(&*self.kick);
        } else {
            worker::take(&self.done.wake);
        }
        self.run(poll);
    }

    /// What is on its way ends with the request queues.
    fn end(&mut self, _poll: &Poll) -> bool {
        self.ending = true;
        true
    }
}
