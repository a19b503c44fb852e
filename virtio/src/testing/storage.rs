//! A disk's content in memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::EventFd;

use crate::block::{Completion, Op, Request, Storage, StorageQueue};
use crate::life::lock;
use crate::memory::GuestMemory;
use crate::worker;

const CAPACITY: usize = 1 << 20;

/// A request that is held back.
#[derive(Debug)]
pub(crate) struct Owned {
    pub op: Op,
    offset: u64,
    len: u64,
    buffers: Vec<(usize, usize)>,
    token: u64,
    outbox: Arc<Outbox>,
}

#[derive(Debug)]
struct Outbox {
    done: Mutex<Vec<Completion>>,
    fd: EventFd,
    _memory: Arc<dyn GuestMemory>,
}

#[derive(Debug, Default)]
pub(crate) struct StoreState {
    pub data: Vec<u8>,
    pub hold: bool,
    pub held: Vec<Owned>,
    /// Changes asked for so far, without reads.
    pub log: Vec<Op>,
    pub errno: Option<i32>,
}

/// A disk in memory that can hold requests back, and fail.
#[derive(Debug)]
pub(crate) struct MemoryStorage {
    pub state: Arc<Mutex<StoreState>>,
    writethrough: AtomicBool,
}

impl MemoryStorage {
    pub fn new() -> Arc<Self> {
        Self::of(CAPACITY)
    }

    /// Of this many bytes.
    pub fn of(bytes: usize) -> Arc<Self> {
        let state = StoreState {
            data: vec![0; bytes],
            ..StoreState::default()
        };
        Arc::new(Self {
            state: Arc::new(Mutex::new(state)),
            writethrough: AtomicBool::new(false),
        })
    }

    pub fn hold(&self) {
        lock(&self.state).hold = true;
    }

    pub fn let_go(&self) {
        let mut state = lock(&self.state);
        state.hold = false;
        for request in std::mem::take(&mut state.held) {
            state.perform(&request);
        }
    }

    pub fn fail(&self, errno: Option<i32>) {
        lock(&self.state).errno = errno;
    }
}

impl StoreState {
    fn perform(&mut self, request: &Owned) {
        let result = match self.errno {
            Some(errno) => Err(errno),
            None => {
                self.change(request);
                Ok(())
            }
        };
        let outbox = &request.outbox;
        lock(&outbox.done).push(Completion {
            token: request.token,
            result,
        });
        worker::signal(&outbox.fd);
    }

    fn change(&mut self, request: &Owned) {
        let mut at = request.offset as usize;
        if request.op != Op::Read {
            self.log.push(request.op);
        }
        match request.op {
            Op::Read | Op::Write => {
                for &(base, len) in &request.buffers {
                    let place = &mut self.data[at..at + len];
                    // SAFETY: guest RAM that the device keeps until the completion is taken.
                    unsafe {
                        if request.op == Op::Read {
                            std::ptr::copy_nonoverlapping(place.as_ptr(), base as *mut u8, len);
                        } else {
                            std::ptr::copy_nonoverlapping(
                                base as *const u8,
                                place.as_mut_ptr(),
                                len,
                            );
                        }
                    }
                    at += len;
                }
                assert_eq!(at as u64, request.offset + request.len);
            }
            Op::WriteZeroes { .. } | Op::Discard => {
                self.data[at..at + request.len as usize].fill(0);
            }
            Op::Flush => {}
        }
    }
}

impl Storage for MemoryStorage {
    fn capacity(&self) -> u64 {
        lock(&self.state).data.len() as u64
    }

    fn queue(&self, memory: Arc<dyn GuestMemory>) -> io::Result<Box<dyn StorageQueue>> {
        let outbox = Arc::new(Outbox {
            done: Mutex::default(),
            fd: worker::eventfd()?,
            _memory: memory,
        });
        Ok(Box::new(MemoryQueue {
            state: Arc::clone(&self.state),
            outbox,
        }))
    }

    fn writethrough(&self) -> bool {
        self.writethrough.load(Ordering::Relaxed)
    }

    fn set_writethrough(&self, on: bool) -> io::Result<()> {
        self.writethrough.store(on, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Debug)]
struct MemoryQueue {
    state: Arc<Mutex<StoreState>>,
    outbox: Arc<Outbox>,
}

impl StorageQueue for MemoryQueue {
    fn submit(&mut self, request: &Request<'_>) {
        let owned = Owned {
            op: request.op,
            offset: request.offset,
            len: request.len,
            buffers: request
                .buffers
                .iter()
                .map(|b| (b.iov_base as usize, b.iov_len))
                .collect(),
            token: request.token,
            outbox: Arc::clone(&self.outbox),
        };
        let mut state = lock(&self.state);
        if state.hold {
            state.held.push(owned);
        } else {
            state.perform(&owned);
        }
    }

    fn complete(&mut self, done: &mut Vec<Completion>) {
        worker::take(&self.outbox.fd);
        done.append(&mut lock(&self.outbox.done));
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.outbox.fd.as_fd()
    }
}
