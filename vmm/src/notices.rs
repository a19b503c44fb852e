//! What devices tell the event loop from their own threads.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vmm_api::control::Event;

use crate::devices::lock;

/// Notices kept for a busy event loop; a guest can cause any number. The oldest go first.
const KEPT: usize = 1024;
/// Of those the moves of one drive's tray.
const TRAYS: usize = 8;

/// Something a device tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// For whoever listens at the control socket.
    Tell(Event),
    /// The same, and the machine is paused for it.
    Pause(Event),
    /// A migration, or a live save, has come to the point where the machine is to stand still.
    StandStill,
    /// A live save has all of guest memory: the machine may go on.
    MemoryWritten,
    /// A block job has come to another phase.
    BlockJob,
    /// The guest has switched off the slot before this bus.
    SlotOff(u8),
    /// Nothing of this SCSI disk is in use any more.
    UnitGone(String),
    /// The guest has let go of a vCPU.
    VcpuGone,
}

/// A bounded queue with a wake-up.
#[derive(Debug)]
pub struct Notices {
    queue: Mutex<VecDeque<Notice>>,
    wake: EventFd,
}

impl Notices {
    /// An empty queue.
    ///
    /// # Errors
    /// No eventfd.
    pub fn new() -> Result<Self, Errno> {
        Ok(Self {
            queue: Mutex::default(),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })
    }

    /// Device side. A balloon's change replaces the one before: only the last size counts.
    pub fn send(&self, notice: Notice) {
        let mut queue = lock(&self.queue);
        let is_balloon = |n: &Notice| matches!(n, Notice::Tell(Event::BalloonChange { .. }));
        if is_balloon(&notice) {
            queue.retain(|n| !is_balloon(n));
        }
        if let Notice::Tell(Event::TrayMoved { id, .. }) = &notice {
            // A guest can move a tray any number of times: the last ones count.
            let own = |n: &Notice| matches!(n, Notice::Tell(Event::TrayMoved { id: other, .. }) if other == id);
            if queue.iter().filter(|n| own(n)).count() >= TRAYS
                && let Some(oldest) = queue.iter().position(own)
            {
                queue.remove(oldest);
            }
        }
        if notice == Notice::VcpuGone {
            // Whoever hears of it looks which.
            queue.retain(|n| *n != Notice::VcpuGone);
        }
        if queue.len() == KEPT {
            queue.pop_front();
        }
        queue.push_back(notice);
        drop(queue);
        // Only a counter at its limit could refuse, and then the event loop is awake already.
        if let Err(error) = self.wake.write(1) {
            log::debug!("eventfd: {error}");
        }
    }

    /// Readable when there is something to take.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Everything told so far.
    pub fn take(&self) -> VecDeque<Notice> {
        if let Err(error) = self.wake.read()
            && error != Errno::EAGAIN
        {
            log::error!("eventfd: {error}");
        }
        std::mem::take(&mut *lock(&self.queue))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_and_one_balloon() {
        let notices = Notices::new().unwrap();
        let balloon = |actual_bytes| Notice::Tell(Event::BalloonChange { actual_bytes });
        notices.send(balloon(1));
        notices.send(balloon(2));
        assert_eq!(notices.take(), [balloon(2)]);
        assert!(notices.take().is_empty());
        for n in 0..=KEPT {
            notices.send(Notice::Tell(Event::PortState {
                id: n.to_string(),
                open: true,
            }));
        }
        let kept = notices.take();
        assert_eq!(kept.len(), KEPT);
        assert!(matches!(&kept[0], Notice::Tell(Event::PortState { id, .. }) if id == "1"));
    }

    #[test]
    fn a_tray_that_never_rests_pushes_nothing_else_out() {
        let notices = Notices::new().unwrap();
        let moved = |id: &str, open| {
            Notice::Tell(Event::TrayMoved {
                id: id.into(),
                open,
            })
        };
        notices.send(Notice::SlotOff(1));
        notices.send(moved("b", true));
        for n in 0..10_000 {
            notices.send(moved("a", n % 2 == 0));
        }
        let kept = notices.take();
        assert_eq!(kept.len(), 2 + TRAYS);
        assert_eq!(
            (&kept[0], &kept[1]),
            (&Notice::SlotOff(1), &moved("b", true))
        );
        assert_eq!(kept.back(), Some(&moved("a", false)), "the last one counts");
    }
}
