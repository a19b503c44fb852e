//! What waits to be sent on one connection.
//!
//! One task writes what has to wait; where nothing waits, and the socket has room, whoever has a message writes it, which
//! saves waking that task. Answers and raw data wait for room, so that a client which doesn't read slows down its own calls
//! and streams and nobody else's; events come from elsewhere and must not wait, so a client that lets too many pile up
//! loses its connection.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::frame::Frame;
use crate::transport::{Direct, Transport};

/// Bytes that may wait before answers and raw data do.
const ROOM: usize = 2 * 1024 * 1024;
/// Bytes that may wait at all: one answer of any size beside a great many events.
const EVENTS_MAX: usize = 48 * 1024 * 1024;
/// What a waiting message costs beside its payload, so that empty ones count too.
const OVERHEAD: usize = 256;

/// The connection is closed, or its queue ran over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Closed;

/// What waits to be sent.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// A message.
    Frame(Frame),
    /// The end of a message without descriptors, whose beginning was sent.
    Rest(Vec<u8>),
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Outgoing>,
    bytes: usize,
    /// The way around the task that writes.
    direct: Option<Direct>,
    /// That task has a message that may not be sent yet.
    sending: bool,
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

fn cost(what: &Outgoing) -> usize {
    let length = match what {
        Outgoing::Frame(frame) => frame.payload.len(),
        Outgoing::Rest(bytes) => bytes.len(),
    };
    length + OVERHEAD
}

impl State {
    /// Sends a message, or what there is room for now. Gives what is left to be sent.
    fn send_now(&self, frame: Frame) -> Option<Outgoing> {
        let Some(direct) = &self.direct else {
            return Some(Outgoing::Frame(frame));
        };
        if !self.waiting.is_empty() || self.sending || !frame.fds.is_empty() {
            return Some(Outgoing::Frame(frame));
        }
        // Whatever is wrong, the task that writes finds it too, and closes the connection.
        let Ok(mut bytes) = frame.to_wire() else {
            return Some(Outgoing::Frame(frame));
        };
        let sent = direct.write(&bytes).unwrap_or_default();
        (sent < bytes.len()).then(|| Outgoing::Rest(bytes.split_off(sent)))
    }
}

impl Queue {
    /// The queue of a connection whose messages go there.
    pub(crate) fn new(transport: &Transport) -> Self {
        let queue = Self::default();
        queue.state().direct = transport.sink.direct();
        queue
    }

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
        let Some(left) = state.send_now(frame) else {
            return Ok(());
        };
        state.bytes += cost(&left);
        state.waiting.push_back(left);
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

    /// What is to be sent next, as the one before is; `None` when the connection is to be closed.
    pub(crate) async fn next(&self) -> Option<Outgoing> {
        loop {
            let more = self.more.notified();
            {
                let mut state = self.state();
                if state.closed {
                    return None;
                }
                let next = state.waiting.pop_front();
                state.sending = next.is_some();
                if let Some(next) = next {
                    state.bytes -= cost(&next);
                    drop(state);
                    self.room.notify_waiters();
                    return Some(next);
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
            state.waiting.clear();
            state.bytes = 0;
            // The socket is closed when nobody has it any more.
            state.direct = None;
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::net::UnixStream;

    use super::*;
    use crate::frame::Header;
    use crate::procs;

    fn frame(serial: u32, length: usize) -> Frame {
        let header = Header::call(procs::CONNECT_CLOSE, serial);
        Frame::raw(header, vec![serial as u8; length])
    }

    /// Whether messages are written at once or by the task, in whole or in part, they come whole and in order.
    #[tokio::test]
    async fn what_is_sent_past_the_task_keeps_its_place() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let Transport { sink, source, .. } = Transport::unix(ours).unwrap();
        let mut theirs = Transport::unix(theirs).unwrap().source;
        let queue = Arc::new(Queue::default());
        let mut sink = sink;
        queue.state().direct = sink.direct();
        // Far more than a socket holds, and nobody writes it yet; then little ones, and one with a descriptor.
        queue.push(frame(0, 10)).unwrap();
        assert_eq!(queue.state().waiting.len(), 0, "the socket has room");
        queue.push(frame(1, 3 << 20)).unwrap();
        assert!(matches!(
            queue.state().waiting.front(),
            Some(Outgoing::Rest(_))
        ));
        queue.push(frame(2, 0)).unwrap();
        let mut with_fd = frame(3, 4);
        with_fd.header.kind = crate::frame::MessageType::CallWithFds;
        with_fd
            .fds
            .push(std::fs::File::open("/dev/null").unwrap().into());
        queue.push(with_fd).unwrap();
        let writer = tokio::spawn({
            let queue = Arc::clone(&queue);
            async move {
                while let Some(next) = queue.next().await {
                    sink.send(&next).await.unwrap();
                }
            }
        });
        let reader = tokio::spawn(async move {
            for expected in 0..500 {
                let got = theirs.next().await.unwrap().unwrap();
                assert_eq!(got.header.serial, expected);
                assert!(got.payload.iter().all(|b| *b == expected as u8));
                assert_eq!(got.fds.len(), usize::from(expected == 3));
            }
            theirs
        });
        for serial in 4..500_u32 {
            let length = (serial as usize * 7919) % 300_000;
            queue.push_when_room(frame(serial, length)).await.unwrap();
        }
        let mut theirs = reader.await.unwrap();
        queue.end();
        writer.await.unwrap();
        drop(source);
        queue.close();
        assert!(
            theirs.next().await.unwrap().is_none(),
            "the socket is closed"
        );
    }
}
