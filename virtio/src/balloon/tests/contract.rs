//! The life-cycle contract.

use super::*;
use crate::testing::{Machine, Subject, conformance};

struct BalloonSubject {
    handle: Mutex<Option<BalloonHandle>>,
}

impl BalloonSubject {
    fn set_period(&self, seconds: u32) {
        let handle = self.handle.lock().unwrap();
        handle.as_ref().unwrap().set_stats_period(seconds);
    }
}

/// The driver's statistics wait for being asked for.
fn offer_statistics(driver: &mut Driver) {
    if driver.in_flight(2) == 0 {
        driver.add(2, &[&stat(4, 1000)], &[]);
        driver.kick(2);
    }
}

impl Subject for BalloonSubject {
    fn new() -> Self {
        Self {
            handle: Mutex::default(),
        }
    }

    fn device(&self) -> Box<dyn Device> {
        let balloon = Balloon::new(options()).unwrap();
        *self.handle.lock().unwrap() = Some(balloon.handle());
        Box::new(balloon)
    }

    fn exercise(&self, machine: &mut Machine, _fresh: bool) {
        let driver = &mut machine.driver;
        offer_statistics(driver);
        driver.ram.write(RAM - PAGE, &[7; 16]);
        driver.request(0, &[&numbers(&[(RAM / PAGE) as u32 - 1])], &[]);
        assert_eq!(driver.ram.read(RAM - PAGE, 16), [0; 16]);
        driver.request(1, &[&numbers(&[1, 2])], &[]);
        driver.request(3, &[], &[4096, 4096]);
    }

    fn begin(&self, machine: &mut Machine) {
        self.set_period(0);
        offer_statistics(&mut machine.driver);
    }

    fn let_go(&self) {
        self.set_period(1);
    }

    fn finish(&self, machine: &mut Machine) {
        // The device may be another by now.
        self.set_period(1);
        machine.driver.wait(2);
        self.set_period(0);
        offer_statistics(&mut machine.driver);
    }
}

conformance!(BalloonSubject);
