//! The life-cycle contract of [`crate::Device`], checked on any device behind its transport.
//!
//! ```text
//! crate::testing::conformance!(MySubject);
//! ```
//! in a device's tests makes a module of tests of it.

use std::time::Duration;

use super::Random;
use super::machine::{self, Machine, NEEDS_RESET, common};
use crate::device::{Device, Payload};
use crate::feature;
use crate::memory::GuestMemory;
use crate::pci::Function;

/// A device under test, with its host side, which outlives the device.
pub(crate) trait Subject: Sync {
    /// The host side, as it is before the first device.
    fn new() -> Self;

    /// A device made of the same configuration every time.
    fn device(&self) -> Box<dyn Device>;

    /// What the driver accepts of what is offered.
    fn features(&self) -> u64 {
        u64::MAX
    }

    /// One round of ordinary work, checked to its end: nothing is in flight before and after but
    /// buffers that wait for input. `fresh`: the first since the driver has set up its queues.
    fn exercise(&self, machine: &mut Machine, fresh: bool);

    /// Begins work that the host holds back as far as it can: returns with it in flight.
    fn begin(&self, machine: &mut Machine);

    /// The host goes on. Called once after each [`Self::begin`], from another thread.
    fn let_go(&self);

    /// Waits for what [`Self::begin`] has begun, and checks it.
    fn finish(&self, machine: &mut Machine);

    /// A queue whose chains the device looks at as soon as it is kicked.
    fn hostile_queue(&self) -> usize {
        0
    }
}

/// While `work` runs the host is let go, some time after it has begun.
fn letting_go<S: Subject>(subject: &S, work: impl FnOnce()) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            subject.let_go();
        });
        work();
    });
}

fn started<S: Subject>() -> (S, Machine) {
    let subject = S::new();
    let mut machine = Machine::new(subject.device(), subject.features());
    machine.start();
    (subject, machine)
}

/// At rest everything that the device wrote has been reported.
fn assert_reported(machine: &Machine) {
    let unreported = machine.driver.ram.unreported();
    assert!(
        unreported.is_empty(),
        "{} bytes from {:#x} changed unreported",
        unreported.len(),
        unreported[0]
    );
}

pub(crate) fn works<S: Subject>() {
    let subject = S::new();
    // With indirect tables and event indices, and without.
    for without in [0, feature::EVENT_IDX, feature::INDIRECT_DESC] {
        let mut machine = Machine::new(subject.device(), subject.features() & !without);
        machine.start();
        for round in 0..20 {
            subject.exercise(&mut machine, round == 0);
        }
        machine.function.pause();
        assert_reported(&machine);
        assert_eq!(machine.status(), machine::DRIVER_OK);
    }
}

pub(crate) fn resets_at_any_time<S: Subject>() {
    let (subject, mut machine) = started::<S>();
    // With work in flight, by the driver and by the machine; twice; while paused.
    for by_machine in [false, true] {
        subject.exercise(&mut machine, true);
        subject.begin(&mut machine);
        letting_go(&subject, || {
            if by_machine {
                machine.function.reset();
            } else {
                machine.set_status(0);
            }
        });
        assert_eq!(machine.status(), 0);
        let before = machine.driver.ram.read(0, machine.driver.ram.len());
        std::thread::sleep(Duration::from_millis(20));
        let after = machine.driver.ram.read(0, machine.driver.ram.len());
        assert!(before == after, "RAM changed after the reset");
        machine.set_status(0);
        machine.function.reset();
        machine.start();
    }
    machine.function.pause();
    machine.function.reset();
    machine.function.resume();
    machine.start();
    subject.exercise(&mut machine, true);
}

pub(crate) fn pauses_with_work_in_flight<S: Subject>() {
    let (subject, mut machine) = started::<S>();
    subject.exercise(&mut machine, true);
    for _ in 0..3 {
        subject.begin(&mut machine);
        letting_go(&subject, || machine.function.pause());
        assert_reported(&machine);
        let before = machine.driver.ram.read(0, machine.driver.ram.len());
        // Kicked while paused: nothing happens before it is resumed.
        (0..machine.driver.queues.len()).for_each(|queue| machine.driver.ring(queue));
        std::thread::sleep(Duration::from_millis(10));
        let after = machine.driver.ram.read(0, machine.driver.ram.len());
        assert!(before == after, "RAM changed while paused");
        machine.function.pause();
        machine.function.resume();
        machine.function.resume();
        subject.finish(&mut machine);
        subject.exercise(&mut machine, false);
    }
}

pub(crate) fn goes_on_from_a_saved_state<S: Subject>() {
    let (subject, mut machine) = started::<S>();
    subject.exercise(&mut machine, true);
    for _ in 0..3 {
        subject.begin(&mut machine);
        letting_go(&subject, || machine.function.pause());
        let saved = machine.replace(subject.device());
        assert_eq!(
            machine.function.save().unwrap(),
            saved,
            "the loaded device's own state"
        );
        machine.function.resume();
        subject.finish(&mut machine);
        subject.exercise(&mut machine, false);
        assert_eq!(machine.status(), machine::DRIVER_OK);
    }
    // One that was reset after it was loaded.
    machine.function.pause();
    machine.replace(subject.device());
    machine.function.reset();
    machine.function.resume();
    machine.start();
    subject.exercise(&mut machine, true);
    // One saved before its driver came.
    machine.set_status(0);
    machine.function.pause();
    machine.replace(subject.device());
    machine.function.resume();
    machine.start();
    subject.exercise(&mut machine, true);
}

pub(crate) fn refuses_states_that_are_not_its_own<S: Subject>() {
    let (subject, machine) = started::<S>();
    assert!(machine.function.save().is_err(), "it runs");
    machine.function.pause();
    let good = machine.function.save().unwrap();
    let mut newer = good.clone();
    newer.version += 1;
    let mut other = good.clone();
    other.kind.push('x');
    let mut device_newer = good.clone();
    device_newer.state["device"]["version"] = 1000.into();
    let mut device_other = good.clone();
    device_other.state["device"]["kind"] = "other".into();
    let mut nonsense = good.clone();
    nonsense.state["device"]["state"] = "nonsense".into();
    // One that misses the indices of a queue in use, and one with another place's.
    let mut missing = good.clone();
    first_queue(&mut missing).take();
    let mut elsewhere = good.clone();
    let queue = first_queue(&mut elsewhere);
    let queue = match queue.get("setup") {
        Some(_) => &mut queue["setup"],
        None => queue,
    };
    queue["descriptors"] = 0x10.into();
    for bad in [
        newer,
        other,
        device_newer,
        device_other,
        nonsense,
        missing,
        elsewhere,
    ] {
        let fresh = Machine::new(subject.device(), subject.features());
        assert!(fresh.function.load(&bad).is_err(), "{bad:?}");
    }
}

/// The first queue in a device's own state.
fn first_queue(payload: &mut Payload) -> &mut serde_json::Value {
    let state = &mut payload.state["device"]["state"];
    if state.get("queue").is_some() {
        &mut state["queue"]
    } else {
        &mut state["queues"][0]
    }
}

pub(crate) fn resets_one_queue<S: Subject>() {
    let (subject, mut machine) = started::<S>();
    assert!(machine.driver.features & feature::RING_RESET != 0);
    subject.exercise(&mut machine, true);
    subject.begin(&mut machine);
    letting_go(&subject, || {
        for queue in 0..machine.driver.queues.len() {
            machine.write(common::QUEUE_SELECT, 2, queue as u32);
            machine.write(common::QUEUE_RESET, 2, 1);
            assert_eq!(machine.read(common::QUEUE_RESET, 2), 0);
            assert_eq!(machine.read(common::QUEUE_ENABLE, 2), 0);
        }
    });
    assert_reported(&machine);
    for queue in 0..machine.driver.queues.len() {
        machine.driver.reset_queue(queue);
        machine.set_up_queue(queue);
        assert_eq!(machine.read(common::QUEUE_ENABLE, 2), 1);
    }
    subject.exercise(&mut machine, true);
    machine.function.pause();
    machine.replace(subject.device());
    machine.function.resume();
    subject.exercise(&mut machine, false);
    assert_eq!(machine.status(), machine::DRIVER_OK);
}

/// The device is marked, the driver hears of it, and after a reset all is well.
fn assert_broken_then_well<S: Subject>(subject: &S, machine: &mut Machine) {
    machine
        .driver
        .interrupt
        .wait("the configuration interrupt", |seen| seen.config > 0);
    assert!(machine.status() & NEEDS_RESET != 0);
    // It can be saved, and stays broken.
    machine.function.pause();
    machine.replace(subject.device());
    machine.function.resume();
    assert!(machine.status() & NEEDS_RESET != 0);
    assert_reported(machine);
    machine.start();
    assert_eq!(machine.status(), machine::DRIVER_OK);
    subject.exercise(machine, true);
}

pub(crate) fn survives_hostile_queues<S: Subject>() {
    let (subject, mut machine) = started::<S>();
    let queue = subject.hostile_queue();
    for attack in 0..5 {
        if attack != 4 {
            subject.exercise(&mut machine, true);
        }
        machine.driver.interrupt.clear();
        let size = machine.driver.queues[queue].setup.size;
        match attack {
            0 => {
                machine.driver.set_available(queue, 0x8000);
                machine.driver.ring(queue);
            }
            1 => {
                machine.driver.offer(queue, size);
                machine.driver.ring(queue);
            }
            2 => {
                machine.driver.write_descriptor(queue, 0, 0, 1, 1, 0);
                machine.driver.offer(queue, 0);
                machine.driver.ring(queue);
            }
            3 => {
                let outside = u64::MAX - 5;
                machine.driver.write_descriptor(queue, 0, outside, 16, 0, 0);
                machine.driver.offer(queue, 0);
                machine.driver.ring(queue);
            }
            _ => {
                // Rings outside RAM.
                machine.prepare();
                machine.write(common::QUEUE_SELECT, 2, queue as u32);
                machine.write(common::QUEUE_RESET, 2, 1);
                machine.write(common::QUEUE_DRIVER + 4, 4, 0xffff_ffff);
                machine.write(common::QUEUE_ENABLE, 2, 1);
                machine.set_status(machine::DRIVER_OK);
                machine.driver.ring(queue);
            }
        }
        assert_broken_then_well(&subject, &mut machine);
        machine.start();
    }
}

pub(crate) fn answers_every_access_to_its_configuration<S: Subject>() {
    let (subject, mut machine) = started::<S>();
    for width in [1, 2, 4] {
        for offset in (0..0x200).step_by(usize::from(width)) {
            let at = machine::DEVICE + offset;
            let whole: Vec<u8> = (0..u32::from(width))
                .map(|i| machine.read(at + i, 1) as u8)
                .collect();
            let value = machine.read(at, width).to_le_bytes();
            assert_eq!(value[..usize::from(width)], whole, "offset {offset:#x}");
        }
    }
    assert_eq!(machine.read(machine::DEVICE + 0xffc, 4), 0);
    subject.exercise(&mut machine, true);
}

/// Random rings, registers, configuration and life-cycle calls. Long with `VIREO_SOAK=1`.
pub(crate) fn survives_anything<S: Subject>(test: &str) {
    let mut random = Random::new(test);
    let soak = std::env::var_os("VIREO_SOAK").is_some_and(|value| value == "1");
    let end = std::time::Instant::now() + Duration::from_millis(if soak { 60_000 } else { 700 });
    let (subject, mut machine) = started::<S>();
    let queues = machine.driver.queues.len() as u64;
    let mut rounds = 0;
    while rounds < 20 || std::time::Instant::now() < end {
        rounds += 1;
        machine.start();
        if random.once_in(2) {
            subject.begin(&mut machine);
            subject.let_go();
        }
        for _ in 0..random.below(12) {
            match random.below(12) {
                0 => machine.write(random.below(0x40) as u32, 1, random.next() as u32),
                1 => {
                    let width = random.pick(&[1, 2, 4]);
                    let offset = random.below(0x8000 / u64::from(width)) as u32 * u32::from(width);
                    machine.write(offset, width, random.next() as u32);
                }
                2 => {
                    let width = random.pick(&[1, 2, 4]);
                    let offset = random.below(0x8000 / u64::from(width)) as u32 * u32::from(width);
                    machine.read(offset, width);
                }
                3 => {
                    let offset = machine::DEVICE + 4 * random.below(0x20) as u32;
                    machine.write(offset, 4, random.next() as u32);
                }
                4 => {
                    machine.function.pause();
                    machine.function.resume();
                }
                5 if random.once_in(3) => {
                    machine.function.pause();
                    machine.replace(subject.device());
                    machine.function.resume();
                }
                6 if random.once_in(3) => machine.function.reset(),
                7 => {
                    let offset = random.below(64) as u16 * 4;
                    machine
                        .function
                        .write_config(offset, 4, random.next() as u32);
                }
                8 => {
                    let queue = random.below(queues) as u32;
                    machine.write(common::QUEUE_SELECT, 2, queue);
                    machine.write(common::QUEUE_RESET, 2, 1);
                    if random.once_in(2) {
                        machine.set_up_queue(queue as usize);
                    }
                }
                _ => {
                    let queue = random.below(queues) as usize;
                    machine.driver.scramble(queue, &mut random);
                }
            }
        }
        machine.function.pause();
        machine.function.resume();
    }
    println!("{test}: {rounds} rounds");
    machine.start();
    subject.exercise(&mut machine, true);
    assert_eq!(machine.status(), machine::DRIVER_OK);
}

macro_rules! conformance {
    ($subject:ty) => {
        crate::testing::conformance!(
            $subject,
            works,
            resets_at_any_time,
            pauses_with_work_in_flight,
            goes_on_from_a_saved_state,
            refuses_states_that_are_not_its_own,
            resets_one_queue,
            survives_hostile_queues,
            answers_every_access_to_its_configuration
        );
    };
    ($subject:ty, $($test:ident),+) => {
        mod contract {
            use super::*;

            $(
                #[test]
                fn $test() {
                    crate::testing::conformance::$test::<$subject>();
                }
            )+

            #[test]
            fn survives_anything() {
                let name = concat!(module_path!(), "::survives_anything");
                crate::testing::conformance::survives_anything::<$subject>(name);
            }
        }
    };
}
pub(crate) use conformance;
