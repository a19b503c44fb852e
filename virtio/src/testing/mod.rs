//! A driver without a guest, for the devices' tests: RAM in host memory, virtqueues in it, and a
//! count of interrupts.
//!
//! ```text
//! let mut driver = Driver::new(&device.queue_sizes(), features);
//! device.activate(driver.activation()).unwrap();
//! let used = driver.request(0, &[b"header"], &[512, 1]);   // add, kick, wait for it
//! assert_eq!(used.data[512], 0);
//! ```

// Devices' tests take what they need of it.
#![allow(dead_code, unused_imports)]

pub(crate) mod conformance;
mod driver;
pub(crate) mod machine;
mod ram;
mod random;
mod storage;

use std::sync::{Condvar, Mutex};
use std::time::Duration;

pub(crate) use conformance::{Subject, conformance};
pub(crate) use driver::{Driver, Used};
pub(crate) use machine::Machine;
pub(crate) use ram::TestRam;
pub(crate) use random::Random;
pub(crate) use storage::MemoryStorage;

use crate::device::Interrupt;

/// Longest wait for anything: a test that runs into it has failed.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Interrupts by queue.
    pub queues: Vec<u64>,
    /// Configuration changes.
    pub config: u64,
    /// Why the device needs a reset.
    pub needs_reset: Option<String>,
}

impl Seen {
    pub fn queue(&self, index: u16) -> u64 {
        self.queues.get(usize::from(index)).copied().unwrap_or(0)
    }
}

/// Counts what a device says.
#[derive(Debug, Default)]
pub(crate) struct TestInterrupt {
    seen: Mutex<Seen>,
    changed: Condvar,
}

impl TestInterrupt {
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    /// Forgets everything.
    pub fn clear(&self) {
        *self.seen.lock().unwrap() = Seen::default();
    }

    /// Waits until `condition` holds; panics with `what` if it never does.
    pub fn wait(&self, what: &str, condition: impl Fn(&Seen) -> bool) -> Seen {
        let seen = self.seen.lock().unwrap();
        let (seen, result) = self
            .changed
            .wait_timeout_while(seen, LIMIT, |seen| !condition(seen))
            .unwrap();
        assert!(!result.timed_out(), "{what}: never came; {seen:?}");
        seen.clone()
    }

    fn change(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().unwrap());
        self.changed.notify_all();
    }
}

impl Interrupt for TestInterrupt {
    fn queue(&self, index: u16) {
        self.change(|seen| {
            let index = usize::from(index);
            if seen.queues.len() <= index {
                seen.queues.resize(index + 1, 0);
            }
            seen.queues[index] += 1;
        });
    }

    fn config(&self) {
        self.change(|seen| seen.config += 1);
    }

    fn needs_reset(&self, reason: &str) {
        self.change(|seen| seen.needs_reset = Some(reason.to_owned()));
    }
}
