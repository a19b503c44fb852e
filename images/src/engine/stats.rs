//! What an engine has done.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Op;

/// Counters of one kind of request. They only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpStats {
    /// Requests that succeeded.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Time from submission to completion, summed up, in nanoseconds.
    pub nanos: u64,
    /// Requests that failed.
    pub failed: u64,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    nanos: AtomicU64,
    failed: AtomicU64,
}

/// Counters by kind of request.
#[derive(Debug, Default)]
pub struct Stats {
    read: Counters,
    write: Counters,
    flush: Counters,
    discard: Counters,
}

impl Stats {
    fn of(&self, op: Op) -> &Counters {
        match op {
            Op::Read => &self.read,
            Op::Write | Op::WriteZeroes { .. } => &self.write,
            Op::Flush => &self.flush,
            Op::Discard => &self.discard,
        }
    }

    /// The counters of this kind of request ([`Op::WriteZeroes`] counts as a write).
    #[must_use]
    pub fn get(&self, op: Op) -> OpStats {
        let counters = self.of(op);
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        OpStats {
            requests: load(&counters.requests),
            bytes: load(&counters.bytes),
            nanos: load(&counters.nanos),
            failed: load(&counters.failed),
        }
    }

    pub(super) fn count(&self, op: Op, bytes: u64, nanos: u64, ok: bool) {
        let counters = self.of(op);
        let add = |counter: &AtomicU64, value| counter.fetch_add(value, Ordering::Relaxed);
        if ok {
            add(&counters.requests, 1);
            add(&counters.bytes, bytes);
            add(&counters.nanos, nanos);
        } else {
            add(&counters.failed, 1);
        }
    }
}
