//! Frames on their way from the guest: written to the backend straight from its buffers.

use std::time::Instant;

use super::backend::{Backend, HEADER, LONGEST_FRAME, List, MOST_BUFFERS, Trouble};
use super::filter::Mac;
use super::receive::Stopped;
use super::shared::Shared;
use crate::queue::{Chain, Queue, QueueError};

/// Frames sent before the thread looks after others.
const BUDGET: u32 = 256;
/// Bytes that are copied out before they are looked at: the guest could change them after that.
/// The virtio-net header and both addresses.
const COPIED: usize = HEADER + 12;
/// Shortest frame with its header.
const SHORTEST: usize = HEADER + 14;

/// The sending half of a pair.
#[derive(Debug)]
pub(super) struct Sender {
    pub queue: Option<Queue>,
    pub index: u16,
    chain: Option<Chain>,
    list: List,
    /// A frame in more pieces than a system call takes.
    whole: Vec<u8>,
    /// The backend has no offloads: what the guest writes into the header must ask for none.
    plain: bool,
}

impl Sender {
    pub fn new(queue: Option<Queue>, index: u16, plain: bool) -> Self {
        Self {
            queue,
            index,
            chain: None,
            list: List::default(),
            whole: Vec::new(),
            plain,
        }
    }

    /// Sends until something stops it. `source`: the only address frames may come from.
    pub fn run(
        &mut self,
        backend: &mut dyn Backend,
        shared: &Shared,
        source: Option<Mac>,
    ) -> Result<Stopped, QueueError> {
        let Some(queue) = &mut self.queue else {
            return Ok(Stopped::NoBuffers);
        };
        let chain = self.chain.get_or_insert_with(|| queue.chain());
        let counters = &shared.counters;
        queue.disable_notifications();
        for _ in 0..BUDGET {
            if !queue.has_available()? && !queue.enable_notifications()? {
                return Ok(Stopped::NoBuffers);
            }
            if shared.outbound.is_limited() && !shared.outbound.wait(Instant::now()).is_zero() {
                return Ok(Stopped::Limit);
            }
            if !queue.pop(chain)? {
                continue;
            }
            let len = chain.readable().len() as usize;
            let mut start = [0; COPIED];
            chain.read_at(0, &mut start);
            // Of the header: flags and the kind of segments (5.1.6).
            let asks = start[0] & 1 != 0 || start[1] != 0;
            let foreign = source.is_some_and(|mac| start[HEADER + 6..] != mac);
            if !(SHORTEST..=HEADER + LONGEST_FRAME).contains(&len)
                || !shared.link_up()
                || foreign
                || (self.plain && asks)
            {
                counters.tx_dropped.add(1);
                queue.push(chain, 0);
                continue;
            }
            // Means nothing in this direction.
            start[10..HEADER].fill(0);
            let list = &mut self.list.0;
            list.clear();
            for part in [&start[..HEADER], &start[HEADER..]] {
                list.push(libc::iovec {
                    iov_base: part.as_ptr().cast_mut().cast(),
                    iov_len: part.len(),
                });
            }
            chain.readable().iovecs(COPIED as u32, u32::MAX, list);
            if list.len() > MOST_BUFFERS {
                self.whole.resize(len - COPIED, 0);
                chain.read_at(COPIED as u32, &mut self.whole);
                list.truncate(2);
                list.push(libc::iovec {
                    iov_base: self.whole.as_ptr().cast_mut().cast(),
                    iov_len: self.whole.len(),
                });
            }
            // SAFETY: the list was made just now: of `start` and `whole`, which live till after
            // the call, and of the chain's buffers, which stay mapped as long as it does.
            match unsafe { backend.send(list, len) } {
                Ok(()) => {
                    let bytes = (len - HEADER) as u64;
                    shared.outbound.take(bytes);
                    counters.tx_packets.add(1);
                    counters.tx_bytes.add(bytes);
                }
                Err(Trouble::Later) => {
                    queue.undo_pop();
                    return Ok(Stopped::Empty);
                }
                Err(Trouble::Gone) => {
                    counters.tx_errors.add(1);
                    queue.push(chain, 0);
                    return Ok(Stopped::Gone);
                }
                Err(Trouble::Refused(error)) => {
                    log::debug!("sending: {error}");
                    counters.tx_errors.add(1);
                }
            }
            queue.push(chain, 0);
        }
        Ok(Stopped::Budget)
    }

    /// Shows the driver what is sent; whether to interrupt it.
    pub fn publish(&mut self) -> bool {
        self.queue.as_mut().is_some_and(Queue::publish)
    }
}
