//! Guests that mean harm.

use super::*;
use crate::testing::Random;

#[test]
fn a_request_that_is_none_breaks_the_queue() {
    for (readable, writable) in [
        (&[0_u8; 18][..], &[108_u32][..]),
        (&[0; 50], &[108]),
        (&[0; 51], &[107]),
        (&[0; 51], &[]),
    ] {
        let mut rig = Rig::new();
        rig.driver.add(2, &[readable], writable);
        rig.driver.kick(2);
        rig.driver
            .interrupt
            .wait("needs reset", |seen| seen.needs_reset.is_some());
    }
}

#[test]
fn nobody_is_reached_by_a_name_that_is_none() {
    let mut rig = Rig::new();
    for name in [
        [0, 0, 0x40, 0, 0, 0, 0, 0],
        [2, 0, 0x40, 0, 0, 0, 0, 0],
        [1, 0, 0x40, 0, 0, 0, 0, 1],
        [1, 0, 0x80, 0, 0, 0, 0, 0],
        [1, 0, 0x01, 0, 0, 0, 0, 0],
        [0xc1, 1, 0, 0, 0, 0, 0, 0],
        [0xff; 8],
    ] {
        let mut head = head(DISK, 0, &[0x12, 0, 0, 0, 36, 0]);
        head[..8].copy_from_slice(&name);
        let used = rig.driver.request(2, &[&head], &[108, 36]);
        assert_eq!(outcome(&used).response, 3, "{name:x?}");
    }
    // Both ways of naming one.
    let mut head = head(DISK, 0, &[0x12, 0, 0, 0, 36, 0]);
    head[2] = 0x40;
    let used = rig.driver.request(2, &[&head], &[108, 36]);
    assert_eq!(outcome(&used).response, 0);
}

/// A disk that does not answer holds up nobody else, on its own queue neither.
#[test]
fn a_unit_that_hangs_holds_up_no_other() {
    let mut rig = Rig::new().ready();
    rig.disk.storage.hold();
    for i in 0..50 {
        add(&mut rig.driver, 2, DISK, &read_10(i, 1), &[], 512);
    }
    rig.driver.kick(2);
    for i in 0..100 {
        rig.good(OTHER, &write_10(i, 1), &[i as u8; 512]);
        assert_eq!(rig.get(OTHER, &read_10(i, 1), 512), [i as u8; 512]);
        rig.good(CD, &[0; 6], &[]);
    }
    rig.disk.storage.let_go();
    for _ in 0..50 {
        assert_eq!(outcome(&rig.driver.wait(2)).status, 0);
    }
}

#[test]
fn a_driver_cannot_have_more_in_flight_than_its_queue_has_entries() {
    let options = ScsiOptions {
        queue_size: 8,
        ..ScsiOptions::default()
    };
    let mut rig = Rig::with(options, UnitOptions::default()).ready();
    rig.disk.storage.hold();
    let head = add(&mut rig.driver, 2, DISK, &[0x35], &[], 0);
    // The same chain again and again, while the device has it.
    for _ in 0..20 {
        rig.driver.offer(2, head);
    }
    rig.driver.ring(2);
    rig.driver
        .interrupt
        .wait("needs reset", |seen| seen.needs_reset.is_some());
    assert!(lock(&rig.disk.storage.state).held.len() <= 8);
    rig.disk.storage.let_go();
}

/// Any command with any fields, to any unit, with functions and changes in between.
#[test]
fn any_command_is_answered() {
    let mut random = Random::new("scsi::any_command_is_answered");
    let mut rig = Rig::new();
    let soak = std::env::var_os("VIREO_SOAK").is_some_and(|value| value == "1");
    let known = [
        0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x1a, 0x1b, 0x1e, 0x25, 0x28, 0x2a, 0x2b, 0x2e, 0x2f,
        0x35, 0x41, 0x42, 0x43, 0x46, 0x4a, 0x51, 0x55, 0x5a, 0x88, 0x8a, 0x8e, 0x8f, 0x91, 0x93,
        0x9e, 0xa0, 0xa3, 0xa8, 0xaa, 0xad, 0xae, 0xaf, 0xbb, 0xbd, 0xbe,
    ];
    for _ in 0..if soak { 500_000 } else { 4000 } {
        let mut cdb = [0; 32];
        let sparse = random.once_in(2);
        for byte in &mut cdb {
            if !sparse || random.once_in(4) {
                *byte = random.next() as u8;
            }
        }
        if !random.once_in(16) {
            cdb[0] = random.pick(&known);
        }
        let address = random.pick(&[DISK, DISK, OTHER, CD, (2, 0), (8, 8)]);
        let len = random.pick(&[0, 1, 24, 512, 2048, 5000]);
        let out: Vec<u8> = (0..len).map(|_| random.next() as u8 & 0x1f).collect();
        let (out, room) = match random.once_in(2) {
            true => (&out[..], 0),
            false => (&[][..], len),
        };
        add(&mut rig.driver, 2, address, &cdb, out, room);
        rig.driver.kick(2);
        if random.once_in(8) {
            let function = tasks::function(random.below(9) as u32, address, 77);
            let used = rig.driver.request(0, &[&function], &[1]);
            assert!([0, 3, 10, 11, 12].contains(&used.data[0]));
        }
        let used = rig.driver.wait(2);
        assert!(used.data[11] <= 9, "{cdb:x?}");
        if random.once_in(64) {
            rig.cd.unit.medium_changed(random.once_in(2));
            let blocks = 1 + random.below(2048);
            rig.other.unit.set_capacity(512 * blocks);
        }
        if random.once_in(128) {
            rig.scsi.pause();
            rig.scsi.resume();
        }
    }
    rig.scsi.pause();
    assert!(rig.driver.ram.unreported().is_empty());
    rig.scsi.resume();
    let left = rig.run(DISK, &[0; 6], &[], 0);
    assert_eq!(left.response, 0);
}
