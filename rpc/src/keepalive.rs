//! Asking a silent peer whether it is alive; the same on both sides.

use std::time::{Duration, Instant};

use crate::frame::{Frame, Header};
use crate::procs::{KEEPALIVE_PING, KEEPALIVE_PONG};
use crate::queue::Queue;

/// How the peer is asked whether it is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence after which it is asked.
    pub interval: Duration,
    /// Questions without an answer after which the connection is closed.
    pub count: u32,
}

impl Keepalive {
    /// Asks when nothing was heard for the interval; returns when too many questions had no answer, or when `heard`
    /// has no more to say. `heard` tells when the peer last sent anything, if it can be asked at all.
    pub(crate) async fn watch(self, queue: &Queue, heard: impl Fn() -> Option<Instant>) {
        let mut unanswered = 0;
        let mut asked = Instant::now();
        loop {
            tokio::time::sleep(self.interval).await;
            let Some(heard) = heard() else {
                unanswered = 0;
                continue;
            };
            if heard > asked {
                unanswered = 0;
            }
            if heard.elapsed() < self.interval {
                continue;
            }
            if unanswered >= self.count {
                return;
            }
            unanswered += 1;
            asked = Instant::now();
            if queue
                .push(Frame::raw(Header::keepalive(KEEPALIVE_PING), Vec::new()))
                .is_err()
            {
                return;
            }
        }
    }
}

/// Answers what the peer asks; waits while it doesn't read.
pub(crate) async fn take(queue: &Queue, procedure: i32) {
    if procedure == KEEPALIVE_PING {
        let pong = Frame::raw(Header::keepalive(KEEPALIVE_PONG), Vec::new());
        // A closed connection ends elsewhere.
        let _ = queue.push_when_room(pong).await;
    }
}
