//! The balloon's thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::state::{PAGE, Ranges};
use super::{F_PAGE_REPORTING, F_STATS_VQ, Shared};
use crate::device::Interrupt;
use crate::life::lock;
use crate::memory::GuestMemory;
use crate::queue::{Chain, Queue, QueueError};
use crate::worker::{Handler, Interest, Poll, take};

const WAKE: u64 = 1 << 32;
/// Page numbers of one chain that are looked at: what 4 GiB have. Linux sends 256.
const MOST_NUMBERS: u32 = 1 << 20;
/// Bytes of them read at a time.
const CHUNK: u32 = 16 << 10;
/// Bytes of statistics that are looked at.
const MOST_STATS: u32 = 4096;
/// Chains of one queue before others have their turn.
const BUDGET: u32 = 16;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Report,
}

/// By 5.5.2 free pages are reported on queue 4. Drivers count only the queues that are there,
/// which makes it 3, or 2 without statistics. All are taken.
fn role(index: usize, features: u64) -> Option<Role> {
    match index {
        0 => Some(Role::Inflate),
        1 => Some(Role::Deflate),
        2 if features & F_STATS_VQ != 0 => Some(Role::Stats),
        _ => (features & F_PAGE_REPORTING != 0).then_some(Role::Report),
    }
}

/// Everything the thread has.
#[derive(Debug)]
pub(super) struct Worker {
    pub shared: Arc<Shared>,
    pub memory: Arc<dyn GuestMemory>,
    pub interrupt: Arc<dyn Interrupt>,
    pub features: u64,
    pub queues: Vec<Option<Queue>>,
    pub kicks: Vec<OwnedFd>,
    /// The driver's buffer for statistics, until new ones are wanted.
    pub held: Option<Chain>,
    /// When they are.
    pub next: Option<Instant>,
    pub period: Option<Duration>,
    /// Queues with more than fits into one turn: bits.
    pub again: u32,
    pub broken: bool,
}

impl Worker {
    fn fail(&mut self, error: QueueError) {
        self.broken = true;
        self.interrupt.needs_reset(&error.to_string());
    }

    fn kicked(&mut self, index: usize) {
        if self.broken {
            return;
        }
        let Some(role) = role(index, self.features) else {
            return;
        };
        let result = match role {
            Role::Stats => self.statistics(index),
            _ => self.pages(index, role),
        };
        self.publish(index);
        if let Err(error) = result {
            self.fail(error);
        }
    }

    fn publish(&mut self, index: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(index)
            && queue.publish()
        {
            // There are five.
            self.interrupt.queue(index as u16);
        }
    }

    /// Takes pages from the guest, or lets it have them again.
    fn pages(&mut self, index: usize, role: Role) -> Result<(), QueueError> {
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return Ok(());
        };
        let mut chain = queue.chain();
        for _ in 0..BUDGET {
            if !queue.pop(&mut chain)? {
                if queue.enable_notifications()? {
                    continue;
                }
                return Ok(());
            }
            match role {
                Role::Inflate => inflate(&chain, &*self.memory),
                Role::Report => {
                    let mut bytes = 0;
                    for segment in chain.writable().segments() {
                        bytes += discard(&*self.memory, segment.address, segment.len.into());
                    }
                    lock(&self.shared.state).stats.reported += bytes;
                }
                // The pages come back by being touched.
                Role::Deflate | Role::Stats => {}
            }
            queue.push(&chain, 0);
        }
        self.again |= 1 << index;
        Ok(())
    }

    /// Reads statistics and keeps their buffer.
    fn statistics(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return Ok(());
        };
        for _ in 0..BUDGET {
            let mut chain = queue.chain();
            if !queue.pop(&mut chain)? {
                if queue.enable_notifications()? {
                    continue;
                }
                return Ok(());
            }
            let mut state = lock(&self.shared.state);
            if !std::mem::replace(&mut state.stats_read, true) || self.held.is_some() {
                let mut data = vec![0; chain.readable().len().min(MOST_STATS) as usize];
                chain.read_at(0, &mut data);
                let now = SystemTime::now().duration_since(UNIX_EPOCH);
                // A clock before 1970 has no better answer.
                state
                    .stats
                    .update(&data, now.map_or(0, |now| now.as_secs()));
            }
            drop(state);
            if let Some(before) = self.held.replace(chain) {
                queue.push(&before, 0);
            }
        }
        self.again |= 1 << index;
        Ok(())
    }

    /// Asks for new statistics, by giving their buffer back.
    fn ask(&mut self) {
        let index = 2;
        if self.broken {
            return;
        }
        if let (Some(Some(queue)), Some(chain)) = (self.queues.get_mut(index), self.held.take()) {
            lock(&self.shared.state).stats_read = false;
            queue.push(&chain, 0);
        }
        self.publish(index);
    }

    /// The period may have changed.
    fn look(&mut self) {
        let period = self.shared.period();
        if period != self.period {
            self.period = period;
            self.next = period.map(|_| Instant::now());
        }
    }

    /// Takes a queue out of use, or into it.
    pub fn replace_queue(&mut self, index: usize, queue: Option<Queue>, running: bool) {
        if role(index, self.features) == Some(Role::Stats) {
            self.held = None;
            lock(&self.shared.state).stats_read = false;
        }
        if let Some(place) = self.queues.get_mut(index) {
            *place = queue;
        }
        if running {
            self.kicked(index);
        }
    }
}

/// Gives the pages that are named in `chain` back to the host.
fn inflate(chain: &Chain, memory: &dyn GuestMemory) {
    let len = chain.readable().len().min(4 * MOST_NUMBERS);
    let mut ranges = Ranges::default();
    let mut data = vec![0; CHUNK as usize];
    let mut offset = 0;
    while offset < len {
        let want = CHUNK.min(len - offset);
        let read = chain.read_at(offset, &mut data[..want as usize]);
        ranges.add(&data[..read]);
        offset += want;
    }
    for (start, len) in ranges.take() {
        if memory.discard(start, len).is_err() {
            // Part of it is not RAM: only the rest counts.
            for page in 0..len / PAGE {
                discard(memory, start + page * PAGE, PAGE);
            }
        }
    }
}

/// Gives a range back; how many bytes. What is not RAM is the guest's mistake and no harm.
fn discard(memory: &dyn GuestMemory, start: u64, len: u64) -> u64 {
    match memory.discard(start, len) {
        Ok(()) => len,
        Err(error) => {
            log::debug!("balloon: {error}");
            0
        }
    }
}

impl Handler for Worker {
    fn begin(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&self.shared.wake, WAKE, Interest::Read)?;
        for (index, kick) in (0..).zip(&self.kicks) {
            poll.add(kick, index, Interest::Read)?;
        }
        for index in 0..self.queues.len() {
            self.kicked(index);
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
        if self.again != 0 {
            return Some(Instant::now());
        }
        self.next.filter(|_| self.held.is_some() && !self.broken)
    }

    fn timer(&mut self, _poll: &Poll) {
        let again = std::mem::take(&mut self.again);
        for index in 0..self.queues.len() {
            if again & (1 << index) != 0 {
                self.kicked(index);
            }
        }
        let now = Instant::now();
        if self.next.is_some_and(|at| at <= now) && self.held.is_some() {
            self.next = self.period.and_then(|period| now.checked_add(period));
            self.ask();
        }
    }

    fn end(&mut self, _poll: &Poll) -> bool {
        if let (Some(_), Some(Some(queue))) = (self.held.take(), self.queues.get_mut(2)) {
            queue.undo_pop();
        }
        self.again = 0;
        true
    }
}
