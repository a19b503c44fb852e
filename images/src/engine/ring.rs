//! One queue's io_uring.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use crate::IoBuf;

/// Submissions the kernel takes at a time; more are submitted in between.
const ENTRIES: u32 = 256;
/// As many are handed over at once: few enough that the disk has work while the next ones are
/// made up, and enough for neighbours to become one (a disk at depth 64 does a quarter more small
/// random writes than when it gets all at the end, and no fewer sequential ones).
const BATCH: usize = 8;
/// Completions that have room; the kernel keeps what is beyond.
const COMPLETIONS: u32 = 2048;
/// The token of the wait for the eventfd.
const EVENT: u64 = u64::MAX;

/// One plain read or write. Kept until its completion has been taken.
#[derive(Debug)]
pub struct Transfer {
    pub write: bool,
    /// The file is open as long as `keep` is there.
    pub fd: RawFd,
    pub offset: u64,
    pub bufs: Vec<IoBuf>,
    /// Durable when complete.
    pub sync: bool,
}

/// The ring, and what is in flight in it.
pub struct Ring<T> {
    ring: ManuallyDrop<IoUring>,
    slots: ManuallyDrop<Vec<Option<(Transfer, T)>>>,
    free: Vec<usize>,
    in_flight: usize,
    unsubmitted: usize,
    /// The eventfd is being waited for.
    watching: bool,
    /// What the transfers' files and memory live by.
    keep: ManuallyDrop<Arc<dyn Send + Sync>>,
}

impl<T> std::fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl<T> Ring<T> {
    /// A ring whose descriptor is ready when a transfer is complete, or the eventfd is signalled
    /// that [`Ring::take`] was last called with.
    pub fn new(keep: Arc<dyn Send + Sync>) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_cqsize(COMPLETIONS)
            .setup_coop_taskrun()
            .build(ENTRIES)?;
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            slots: ManuallyDrop::default(),
            free: Vec::new(),
            in_flight: 0,
            unsubmitted: 0,
            watching: false,
            keep: ManuallyDrop::new(keep),
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's own descriptor, borrowed no longer than it.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Waits (in the ring) for `event` to be signalled.
    fn watch(&mut self, event: BorrowedFd<'_>) -> io::Result<()> {
        let wait = opcode::PollAdd::new(types::Fd(event.as_raw_fd()), libc::POLLIN as u32)
            .build()
            .user_data(EVENT);
        self.push(&wait)?;
        self.submit()?;
        self.watching = true;
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        for _ in 0..2 {
            // SAFETY: the entry's memory and file are kept in a slot until it is complete (the
            // wait for the eventfd has none of its own, and holds the file itself).
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.unsubmitted += 1;
                return Ok(());
            }
            self.submit()?;
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// Takes a transfer; it goes to the kernel with the next [`Ring::submit`] at the latest.
    ///
    /// # Errors
    /// The kernel's refusal, with the transfer given back.
    pub fn start(&mut self, transfer: Transfer, data: T) -> Result<(), (Transfer, T, io::Error)> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let entry = {
            let fd = types::Fd(transfer.fd);
            let (base, count) = (
                transfer.bufs.as_ptr().cast::<libc::iovec>(),
                transfer.bufs.len() as u32,
            );
            let flags = if transfer.sync { libc::RWF_DSYNC } else { 0 };
            match (&transfer.bufs[..], transfer.write) {
                ([one], false) if one.len() <= i32::MAX as usize => {
                    opcode::Read::new(fd, one.base(), one.len() as u32)
                        .offset(transfer.offset)
                        .build()
                }
                ([one], true) if one.len() <= i32::MAX as usize => {
                    opcode::Write::new(fd, one.base(), one.len() as u32)
                        .offset(transfer.offset)
                        .rw_flags(flags)
                        .build()
                }
                (_, false) => opcode::Readv::new(fd, base, count)
                    .offset(transfer.offset)
                    .build(),
                (_, true) => opcode::Writev::new(fd, base, count)
                    .offset(transfer.offset)
                    .rw_flags(flags)
                    .build(),
            }
        };
        match self.push(&entry.user_data(slot as u64)) {
            Ok(()) => {
                self.slots[slot] = Some((transfer, data));
                self.in_flight += 1;
                if self.unsubmitted >= BATCH
                    && let Err(error) = self.submit()
                {
                    // It is in the ring: the next `submit` tries again, and says so.
                    log::debug!("io_uring: {error}");
                }
                Ok(())
            }
            Err(error) => {
                self.free.push(slot);
                Err((transfer, data, error))
            }
        }
    }

    /// Hands the kernel what it has not seen yet.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(taken) => self.unsubmitted = self.unsubmitted.saturating_sub(taken.max(1)),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The kernel wants completions taken first, or has no memory right now.
                    Some(libc::EBUSY | libc::EAGAIN) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Calls `done` for each complete transfer with what the kernel answered: bytes, or a
    /// negative error number. An eventfd that was signalled is cleared and watched again.
    pub fn take(
        &mut self,
        event: BorrowedFd<'_>,
        mut done: impl FnMut(Transfer, T, i32),
    ) -> io::Result<()> {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                break;
            };
            if entry.user_data() == EVENT {
                // Signalled, or given up because the thread that waited has ended.
                self.watching = false;
                continue;
            }
            let slot = entry.user_data() as usize;
            if let Some((transfer, data)) = self.slots.get_mut(slot).and_then(Option::take) {
                self.free.push(slot);
                self.in_flight -= 1;
                done(transfer, data, entry.result());
            }
        }
        if self.unsubmitted > 0 {
            self.submit()?;
        }
        // Here and not in `new`: the kernel does its part of a wait on the thread that began it,
        // which must be the one that uses the ring.
        if !self.watching {
            // Before what was signalled is looked at: a later signal is a new one.
            let _ = nix::unistd::read(event, &mut [0; 8]);
            self.watch(event)?;
        }
        Ok(())
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            // The kernel may still write to the memory: nothing of it is ever freed.
            log::warn!("{} requests of a disk never ended", self.in_flight);
            return;
        }
        // SAFETY: not used after this, and dropped nowhere else.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.slots);
            ManuallyDrop::drop(&mut self.keep);
        }
    }
}
