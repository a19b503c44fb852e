//! The transport's registers, with an entropy device behind them.

use super::*;
use crate::rng::{Rng, Source};
use crate::testing::machine::{BAR, DEVICE, ISR, Machine, NOTIFY, TABLE, common};

type Mask = fn(&Machine, bool);
type Change = fn(&mut serde_json::Value);

fn machine() -> Machine {
    Machine::new(Box::new(Rng::new(Source::System, None).unwrap()), u64::MAX)
}

fn started() -> Machine {
    let mut machine = machine();
    machine.start();
    machine
}

#[test]
fn says_what_it_is() {
    let machine = machine();
    let function = &machine.function;
    assert_eq!(function.read_config(0, 4), 0x1044_1af4);
    assert_eq!(function.read_config(8, 4), 0x00ff_0001);
    assert_eq!(function.read_config(0x2c, 4), 0x1100_1af4);
    assert_eq!(function.read_config(0x3d, 1), 1, "INTA#");
    // Power management, Express, MSI-X, and virtio's five structures.
    let mut kinds = Vec::new();
    let mut at = function.read_config(0x34, 1) as u16;
    while at != 0 {
        let id = function.read_config(at, 1);
        let virtio = if id == 9 {
            function.read_config(at + 3, 1)
        } else {
            0
        };
        kinds.push((id, virtio));
        at = function.read_config(at + 1, 1) as u16;
    }
    let expected = [
        (1, 0),
        (0x10, 0),
        (0x11, 0),
        (9, 1),
        (9, 3),
        (9, 4),
        (9, 2),
        (9, 5),
    ];
    assert_eq!(kinds, expected);
}

#[test]
fn bars_and_doorbells_follow_the_registers() {
    let machine = machine();
    assert!(machine.host.bars.lock().unwrap().is_empty());
    machine.firmware();
    assert_eq!(*machine.host.bars.lock().unwrap(), [(0, BAR, 0x8000)]);
    let doorbells = || machine.host.doorbells.lock().unwrap().clone();
    assert_eq!(doorbells(), [BAR + 0x3000]);
    machine
        .function
        .write_config(0x10, 4, BAR as u32 + 0x1_0000);
    assert_eq!(doorbells(), [BAR + 0x1_3000]);
    machine.function.write_config(4, 2, 0);
    assert!(doorbells().is_empty());
    machine.function.write_config(4, 2, 2);
    assert_eq!(doorbells(), [BAR + 0x1_3000]);
    machine.function.reset();
    assert!(doorbells().is_empty());
    assert!(machine.host.bars.lock().unwrap().is_empty());
    machine.firmware();
    let host = machine.host.clone();
    drop(machine);
    assert!(host.bars.lock().unwrap().is_empty());
    assert!(host.doorbells.lock().unwrap().is_empty());
}

#[test]
fn memory_is_reached_only_by_a_bus_master() {
    let mut machine = machine();
    machine.prepare();
    let bytes = |machine: &Machine| machine.driver.ram.read(0, machine.driver.ram.len());
    let quiet = |machine: &Machine| {
        let before = bytes(machine);
        (0..machine.driver.queues.len()).for_each(|queue| machine.driver.ring(queue));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(before == bytes(machine), "RAM changed");
    };
    let ask = |machine: &mut Machine| {
        machine.driver.add(0, &[], &[32]);
        machine.driver.kick(0);
    };
    // Started without: the device waits, through a save and load too.
    machine.function.write_config(4, 2, 2);
    machine.set_status(15);
    ask(&mut machine);
    quiet(&machine);
    machine.function.pause();
    machine.replace(Box::new(Rng::new(Source::System, None).unwrap()));
    machine.function.resume();
    quiet(&machine);
    machine.function.write_config(4, 2, 6);
    assert_eq!(machine.driver.wait(0).data.len(), 32);
    // Taken away while it runs, and given back while the machine is paused.
    machine.function.write_config(4, 2, 2);
    ask(&mut machine);
    quiet(&machine);
    machine.function.pause();
    machine.function.write_config(4, 2, 6);
    quiet(&machine);
    machine.function.resume();
    assert_eq!(machine.driver.wait(0).data.len(), 32);
    assert_eq!(machine.status(), 15);
}

#[test]
fn features_are_agreed_on_once_and_only_what_is_offered() {
    let machine = machine();
    let offered = |select| {
        machine.write(common::DEVICE_FEATURE_SELECT, 4, select);
        machine.read(common::DEVICE_FEATURE, 4)
    };
    assert_eq!(offered(0), 3 << 28);
    assert_eq!(offered(1), 1 | 1 << 6 | 1 << 8);
    assert_eq!(offered(2), 0);
    assert!(!machine.negotiate(feature::EVENT_IDX), "not modern");
    assert!(!machine.negotiate(feature::VERSION_1 | 1 << 24));
    machine.set_status(15);
    assert_eq!(machine.status(), 3, "no DRIVER_OK without FEATURES_OK");
    assert!(machine.negotiate(feature::VERSION_1));
    machine.write(common::DRIVER_FEATURE_SELECT, 4, 0);
    machine.write(common::DRIVER_FEATURE, 4, u32::MAX);
    assert_eq!(machine.read(common::DRIVER_FEATURE, 4), 0, "settled");
    assert_eq!(machine.function.features(), feature::VERSION_1);
}

#[test]
fn odd_accesses_mean_the_bytes_they_name() {
    let machine = machine();
    machine.write(common::QUEUE_DESCRIPTORS + 3, 1, 0x12);
    machine.write(common::QUEUE_DESCRIPTORS + 4, 2, 0x3456);
    assert_eq!(machine.read(common::QUEUE_DESCRIPTORS, 4), 0x1200_0000);
    assert_eq!(machine.read(common::QUEUE_DESCRIPTORS + 4, 4), 0x3456);
    // Status, generation and queue select in one.
    machine.write(common::STATUS, 4, 0x0007_ff03);
    assert_eq!(machine.read(common::STATUS, 4), 0x0007_0003);
    assert_eq!(machine.read(common::NUM_QUEUES, 1), 1);
    assert_eq!(machine.read(common::CONFIG_VECTOR, 4), 0x0001_ffff);
    assert_eq!(machine.read(0x3c, 4), 0, "beyond the structure");
    assert_eq!(machine.function.read_bar(0, 0x7ffc, 4), 0);
    assert_eq!(machine.function.read_bar(0, 0x8000, 4), u32::MAX);
    assert_eq!(machine.function.read_bar(1, 0, 2), 0xffff);
}

#[test]
fn queues_are_set_up_within_bounds() {
    let machine = machine();
    assert!(machine.negotiate(feature::VERSION_1));
    assert_eq!(machine.read(common::QUEUE_SIZE, 2), 64);
    for (size, kept) in [(0, 64), (65, 64), (128, 64), (32, 32), (48, 32)] {
        machine.write(common::QUEUE_SIZE, 2, size);
        assert_eq!(machine.read(common::QUEUE_SIZE, 2), kept);
    }
    machine.write(common::QUEUE_VECTOR, 2, 2);
    assert_eq!(
        machine.read(common::QUEUE_VECTOR, 2),
        0xffff,
        "no such vector"
    );
    machine.write(common::QUEUE_VECTOR, 2, 1);
    assert_eq!(machine.read(common::QUEUE_VECTOR, 2), 1);
    machine.write(common::QUEUE_ENABLE, 2, 1);
    machine.write(common::QUEUE_SIZE, 2, 16);
    assert_eq!(machine.read(common::QUEUE_SIZE, 2), 32, "it is on");
    machine.write(common::QUEUE_RESET, 2, 1);
    assert_eq!(machine.read(common::QUEUE_ENABLE, 2), 1, "not negotiated");
    machine.write(common::QUEUE_SELECT, 2, 1);
    for register in [
        common::QUEUE_SIZE,
        common::QUEUE_ENABLE,
        common::QUEUE_DRIVER,
    ] {
        machine.write(register, 2, 1);
        assert_eq!(machine.read(register, 2), 0, "no such queue");
    }
}

#[test]
fn the_pin_is_asserted_until_isr_is_read() {
    let mut machine = started();
    let msix = machine.capability(0x11);
    machine.function.write_config(msix + 2, 2, 0);
    let pin = || *machine.host.pin.lock().unwrap();
    let status = || machine.function.read_config(6, 2) & 8 != 0;
    assert!(!pin() && !status());
    machine.driver.add(0, &[], &[8]);
    machine.driver.kick(0);
    machine
        .driver
        .interrupt
        .wait("the pin", |seen| seen.queue(0) > 0);
    assert!(pin() && status());
    machine.function.write_config(4, 2, 6 | 1 << 10);
    assert!(!pin() && status(), "the pin is switched off");
    machine.function.write_config(4, 2, 6);
    assert!(pin());
    // Saved with the pin asserted.
    machine.function.pause();
    machine.replace(Box::new(Rng::new(Source::System, None).unwrap()));
    machine.function.resume();
    assert!(*machine.host.pin.lock().unwrap());
    assert_eq!(machine.read(ISR, 1), 1);
    assert!(!*machine.host.pin.lock().unwrap());
    assert_eq!(machine.read(ISR, 1), 0);
    assert_eq!(machine.driver.used(0).unwrap().len, 8);
}

#[test]
fn masked_vectors_are_pending_and_come_when_unmasked() {
    let mut machine = started();
    let masks: [Mask; 2] = [
        |machine, on| machine.write(TABLE + 16 + 12, 4, u32::from(on)),
        |machine, on| {
            let msix = machine.capability(0x11);
            let control = 1 << 15 | u32::from(on) << 14;
            machine.function.write_config(msix + 2, 2, control);
        },
    ];
    for mask in masks {
        let before = machine.driver.interrupt.seen().queue(0);
        mask(&machine, true);
        // Asks for an interrupt with the next one.
        machine.driver.set_used_event(0);
        machine.driver.add(0, &[], &[8]);
        machine.driver.kick(0);
        while machine.read(0x6000, 1) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(machine.read(0x6000, 4), 2, "vector 1");
        assert_eq!(machine.driver.interrupt.seen().queue(0), before);
        // It is still pending in a loaded function.
        machine.function.pause();
        machine.replace(Box::new(Rng::new(Source::System, None).unwrap()));
        machine.function.resume();
        mask(&machine, false);
        assert_eq!(machine.driver.interrupt.seen().queue(0), before + 1);
        assert_eq!(machine.read(0x6000, 4), 0);
        machine.driver.used(0).unwrap();
    }
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let machine = machine();
    let function = &machine.function;
    let mut at = machine.capability(9);
    while function.read_config(at + 3, 1) != 5 {
        at = function.read_config(at + 1, 1) as u16;
    }
    let point = |offset, width| {
        function.write_config(at + 8, 4, offset);
        function.write_config(at + 12, 4, width);
    };
    point(common::NUM_QUEUES, 2);
    assert_eq!(function.read_config(at + 16, 4), 1);
    assert_eq!(function.read_config(at + 16, 2), 1);
    point(common::STATUS, 1);
    function.write_config(at + 16, 1, 3);
    assert_eq!(machine.status(), 3);
    // Nonsense is not an access: the bytes are just kept.
    for (offset, width) in [(0, 3), (0, 0), (1, 4), (0x8000, 4), (u32::MAX, 1)] {
        point(offset, width);
        function.write_config(at + 16, 4, 0x55);
        assert_eq!(function.read_config(at + 16, 4), 0x55);
    }
    assert_eq!(machine.status(), 3);
}

#[test]
fn a_function_level_reset_resets_everything() {
    let machine = started();
    let express = machine.capability(0x10);
    assert_ne!(machine.function.read_config(express + 4, 4) & 1 << 28, 0);
    machine.function.write_config(express + 8, 2, 1 << 15);
    assert_eq!(machine.status(), 0);
    assert_eq!(machine.function.read_config(4, 2), 0);
    assert_eq!(machine.function.read_config(express + 8, 2), 0);
}

#[test]
fn contradictory_states_are_refused() {
    let machine = started();
    machine.function.pause();
    let good = machine.function.save().unwrap();
    let changes: [(&str, Change); 6] = [
        ("size", |s| {
            s["registers"]["queues"][0]["setup"]["size"] = 63.into()
        }),
        ("large", |s| {
            s["registers"]["queues"][0]["setup"]["size"] = 128.into()
        }),
        ("queues", |s| {
            s["registers"]["queues"] = serde_json::json!([])
        }),
        ("features", |s| {
            s["registers"]["driver_features"] = (1_u64 << 50).into()
        }),
        ("status", |s| s["status"] = 0.into()),
        ("vectors", |s| {
            s["core"]["msix"]["entries"] = serde_json::json!([])
        }),
    ];
    for (what, change) in changes {
        let mut bad = good.clone();
        change(&mut bad.state);
        let other = super::tests::machine();
        assert!(other.function.load(&bad).is_err(), "{what}");
    }
}

#[test]
fn notifications_reach_the_device_by_the_bus() {
    let mut machine = started();
    machine.driver.add(0, &[], &[4]);
    // A queue that isn't there.
    machine.write(NOTIFY + 4, 2, 1);
    machine.write(NOTIFY, 2, 0);
    assert_eq!(machine.driver.wait(0).len, 4);
    // With the queue's next index above its number (VIRTIO_F_NOTIFICATION_DATA).
    machine.driver.add(0, &[], &[4]);
    machine.write(NOTIFY, 4, 2 << 16);
    assert_eq!(machine.driver.wait(0).len, 4);
    assert_eq!(machine.read(NOTIFY, 4), 0);
    assert_eq!(machine.read(DEVICE, 4), 0);
}
