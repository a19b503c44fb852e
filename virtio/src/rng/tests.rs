use std::fs::File;

use super::*;
use crate::testing::{Driver, Machine, Subject, conformance};

fn run(driver: &mut Driver, rng: &mut Rng) {
    rng.activate(driver.activation()).unwrap();
}

#[test]
fn gives_random_bytes() {
    let mut rng = Rng::new(Source::System, None).unwrap();
    let mut driver = Driver::new(&rng.queue_sizes(), 0);
    run(&mut driver, &mut rng);
    let used = driver.request(0, &[], &[40, 60]);
    assert_eq!(used.len, 100);
    assert_ne!(used.data, [0; 100]);
    let again = driver.request(0, &[], &[40, 60]);
    assert_ne!(used.data, again.data);
    rng.pause();
    assert!(driver.ram.unreported().is_empty());
}

#[test]
fn gives_what_a_file_has() {
    let path = std::env::temp_dir().join(format!("vireo-rng-{}", std::process::id()));
    std::fs::write(&path, b"0123456789").unwrap();
    let source = Source::File(File::open(&path).unwrap().into());
    std::fs::remove_file(&path).unwrap();
    let mut rng = Rng::new(source, None).unwrap();
    let mut driver = Driver::new(&rng.queue_sizes(), 0);
    run(&mut driver, &mut rng);
    let used = driver.request(0, &[], &[6]);
    assert_eq!((used.len, &used.data[..]), (6, &b"012345"[..]));
    let used = driver.request(0, &[], &[100]);
    assert_eq!((used.len, &used.data[..4]), (4, &b"6789"[..]));
}

#[test]
fn keeps_to_its_rate() {
    let rate = Rate {
        bytes: 10,
        period: Duration::from_millis(50),
    };
    let mut rng = Rng::new(Source::System, Some(rate)).unwrap();
    let mut driver = Driver::new(&rng.queue_sizes(), 0);
    run(&mut driver, &mut rng);
    let start = Instant::now();
    let mut got = 0;
    while got < 45 {
        got += driver.request(0, &[], &[100]).len;
    }
    // 45 bytes need five periods: four full ones have passed.
    assert!(start.elapsed() >= rate.period * 4);
    assert!(Rng::new(Source::System, Some(Rate { bytes: 0, ..rate })).is_err());
}

struct RngSubject;

impl Subject for RngSubject {
    fn new() -> Self {
        Self
    }

    fn device(&self) -> Box<dyn Device> {
        Box::new(Rng::new(Source::System, None).unwrap())
    }

    fn exercise(&self, machine: &mut Machine, _fresh: bool) {
        let used = machine.driver.request(0, &[], &[16, 7]);
        assert_eq!(used.len, 23);
    }

    fn begin(&self, machine: &mut Machine) {
        for _ in 0..5 {
            machine.driver.add(0, &[], &[60_000]);
        }
        machine.driver.kick(0);
    }

    fn let_go(&self) {}

    fn finish(&self, machine: &mut Machine) {
        for _ in 0..5 {
            assert_eq!(machine.driver.wait(0).len, 60_000);
        }
    }
}

conformance!(RngSubject);
