//! What waits to be sent on one connection.
//!
//! One task writes. Answers and raw data wait for room, so that a client which doesn't read slows down its own calls
//! and streams and nobody else's; events come from elsewhere and must not wait, so a client that lets too many pile up
//! loses its connection.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::frame::Frame;

/// Bytes that may wait before answers and raw data do.
const ROOM: usize = 2 * 1024 * 1024;
/// Bytes that may wait at all: one answer of any size beside a great many events.
const EVENTS_MAX: usize = 48 * 1024 * 1024;
/// What a waiting message costs beside its payload, so that empty ones count too.
const OVERHEAD: usize = 256;

/// The connection is closed, or its queue ran over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Closed;

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// Nothing more is taken; what waits is still sent.
    ending: bool,
    /// Nothing more is sent.
    closed: bool,
}

/// The queue of one connection.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    more: Notify,
    room: Notify,
    closed: Notify,
}

fn cost(frame: &Frame) -> usize {
    frame.payload.len() + OVERHEAD
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held; were it so, the data are still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message at once. Closes the connection if far too much waits already.
    pub(crate) fn push(&self, frame: Frame) -> Result<(), Closed> {
        let mut state = self.state();
        if state.closed || state.ending {
            return Err(Closed);
        }
        if state.bytes > EVENTS_MAX {
            drop(state);
            log::warn!("a client does not read its messages: closing its connection");
            self.close();
            return Err(Closed);
        }
        state.bytes += cost(&frame);
        state.frames.push_back(frame);
        drop(state);
        self.more.notify_one();
        Ok(())
    }

    /// Takes a message when there is room.
    pub(crate) async fn push_when_room(&self, frame: Frame) -> Result<(), Closed> {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            // Registered before looking, so that room made in between is not missed.
            room.as_mut().enable();
            {
                let state = self.state();
                if state.closed || state.ending {
                    return Err(Closed);
                }
                if state.bytes < ROOM {
                    break;
                }
            }
            room.await;
        }
        self.push(frame)
    }

    /// The next message to send; `None` when the connection is to be closed.
    pub(crate) async fn next(&self) -> Option<Frame> {
        loop {
            let more = self.more.notified();
            {
                let mut state = self.state();
                if state.closed {
                    return None;
                }
                if let Some(frame) = state.frames.pop_front() {
                    state.bytes -= cost(&frame);
                    drop(state);
                    self.room.notify_waiters();
                    return Some(frame);
                }
                if state.ending {
                    return None;
                }
            }
            more.await;
        }
    }

    /// Sends what waits, then no more.
    pub(crate) fn end(&self) {
        self.state().ending = true;
        self.more.notify_one();
        self.room.notify_waiters();
    }

    /// Sends no more, and says so to everybody who waits.
    pub(crate) fn close(&self) {
        {
            let mut state = self.state();
            state.closed = true;
            state.frames.clear();
            state.bytes = 0;
        }
        self.more.notify_one();
        self.room.notify_waiters();
        self.closed.notify_waiters();
    }

    /// Whether the connection is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Resolves when the connection is closed.
    pub(crate) async fn closed(&self) {
        loop {
            let closed = self.closed.notified();
            tokio::pin!(closed);
            closed.as_mut().enable();
            if self.is_closed() {
                return;
            }
            closed.await;
        }
    }
}
