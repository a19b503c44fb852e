//! Disk images under virtio-blk: the two crates know nothing of each other.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use images::engine::{Completion, Engine, Op, Queue, Request};
use images::{Error, IoBuf};
use virtio::GuestMemory;
use virtio::block::{self, Storage, StorageQueue};

/// An engine as a disk's content.
#[derive(Debug)]
pub struct EngineStorage(pub Arc<Engine>);

/// Keeps guest memory as long as a request may touch it.
struct Keeper(#[expect(dead_code, reason = "held for its drop")] Arc<dyn GuestMemory>);

fn failure(error: &Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl Storage for EngineStorage {
    fn capacity(&self) -> u64 {
        self.0.image().size()
    }

    fn queue(&self, memory: Arc<dyn GuestMemory>) -> io::Result<Box<dyn StorageQueue>> {
        let queue = self.0.queue(Arc::new(Keeper(memory)));
        let queue = queue.map_err(|error| {
            log::error!("a disk's queue: {error}");
            failure(&error)
        })?;
        Ok(Box::new(EngineQueue {
            queue,
            done: Vec::new(),
        }))
    }

    fn writethrough(&self) -> bool {
        self.0.writethrough()
    }

    fn set_writethrough(&self, on: bool) -> io::Result<()> {
        self.0.set_writethrough(on);
        if on && let Err(error) = self.0.image().flush() {
            self.0.set_writethrough(false);
            log::error!("a disk's flush: {error}");
            return Err(failure(&error));
        }
        Ok(())
    }
}

#[derive(Debug)]
struct EngineQueue {
    queue: Queue,
    done: Vec<Completion>,
}

impl StorageQueue for EngineQueue {
    fn submit(&mut self, request: &block::Request<'_>) {
        let buffer = |buffer: &libc::iovec| {
            // SAFETY: guest RAM stays mapped as long as the keeper lives, which is until no
            // request can touch it any more.
            unsafe { IoBuf::new(buffer.iov_base.cast(), buffer.iov_len) }
        };
        let (op, with_len) = match request.op {
            block::Op::Read => (Op::Read, false),
            block::Op::Write => (Op::Write, false),
            block::Op::Flush => (Op::Flush, false),
            block::Op::Discard => (Op::Discard, true),
            block::Op::WriteZeroes { unmap } => (Op::WriteZeroes { unmap }, true),
        };
        self.queue.submit(Request {
            op,
            offset: request.offset,
            len: if with_len { request.len } else { 0 },
            bufs: request.buffers.iter().map(buffer).collect(),
            token: request.token,
        });
    }

    fn complete(&mut self, done: &mut Vec<block::Completion>) {
        self.queue.complete(&mut self.done);
        done.extend(self.done.drain(..).map(|completion| block::Completion {
            token: completion.token,
            result: completion.result.map_err(|error| {
                log::warn!("disk: {error}");
                error.errno()
            }),
        }));
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.queue.fd()
    }

    fn deadline(&self) -> Option<Instant> {
        self.queue.deadline()
    }
}
