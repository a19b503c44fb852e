//! The life-cycle contract.

use super::*;
use crate::testing::{Machine, Subject, conformance};

struct ConsoleSubject {
    zero: Arc<Host>,
    agent: Arc<Host>,
    handle: Mutex<Option<ConsoleHandle>>,
}

impl ConsoleSubject {
    fn agent(&self) -> PortHandle {
        let handle = self.handle.lock().unwrap();
        handle.as_ref().unwrap().port(1)
    }
}

impl Subject for ConsoleSubject {
    fn new() -> Self {
        Self {
            zero: Host::with_room(PLENTY),
            agent: Host::with_room(PLENTY),
            handle: Mutex::default(),
        }
    }

    fn device(&self) -> Box<dyn Device> {
        let console = new(&self.zero, &self.agent);
        *self.handle.lock().unwrap() = Some(console.handle());
        Box::new(console)
    }

    fn exercise(&self, machine: &mut Machine, fresh: bool) {
        let driver = &mut machine.driver;
        self.agent.room.store(PLENTY, Ordering::SeqCst);
        if fresh {
            shake_hands(driver);
        }
        for (queue, host) in [(1, &self.zero), (5, &self.agent)] {
            host.got.lock().unwrap().clear();
            driver.request(queue, &[b"some", b"thing"], &[]);
            host.has(b"something");
        }
        let agent = self.agent();
        // The device may not have heard yet that the port is open.
        self.agent
            .until("input", |_| agent.receive(b"question") == 8);
        let used = driver.request(4, &[], &[8]);
        assert_eq!(used.data, b"question");
    }

    fn begin(&self, machine: &mut Machine) {
        self.agent.got.lock().unwrap().clear();
        self.agent.room.store(5, Ordering::SeqCst);
        for data in [b"abc", b"def", b"ghi"] {
            machine.driver.add(5, &[data], &[]);
        }
        machine.driver.kick(5);
    }

    fn let_go(&self) {
        self.agent.room.store(PLENTY, Ordering::SeqCst);
        self.agent().output_room();
    }

    fn finish(&self, machine: &mut Machine) {
        for _ in 0..3 {
            machine.driver.wait(5);
        }
        self.agent.has(b"abcdefghi");
    }

    fn hostile_queue(&self) -> usize {
        3
    }
}

conformance!(ConsoleSubject);
