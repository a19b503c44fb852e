//! Units that come, go and change; configuration; state.

use super::*;
use crate::block::OnError;

const NEW: Address = (5, 2);

#[test]
fn a_unit_is_plugged_and_unplugged() {
    let mut rig = Rig::new().ready();
    rig.listen(4);
    let new = drive(UnitOptions::default());
    assert_eq!(rig.run(NEW, &[0; 6], &[], 0).response, 3);
    rig.scsi.handle().plug(NEW, &new.unit).unwrap();
    assert_eq!(rig.event(), (1, [1, 5, 0, 2, 0, 0, 0, 0], 1));
    assert_eq!(rig.refused(NEW, &[0; 6], &[], 0), (6, 0x29, 0));
    rig.good(NEW, &write_10(4, 1), &[6; 512]);
    rig.scsi.handle().unplug(NEW);
    assert_eq!(rig.event(), (1, request::name(NEW), 2));
    new.ear.wait_until_gone();
    assert_eq!(rig.run(NEW, &[0; 6], &[], 0).response, 3);
    rig.good(DISK, &[0; 6], &[]);
    // And another one in its place.
    let next = drive(UnitOptions::default());
    rig.scsi.handle().plug(NEW, &next.unit).unwrap();
    assert_eq!(rig.event(), (1, request::name(NEW), 1));
    assert_eq!(rig.refused(NEW, &[0; 6], &[], 0), (6, 0x29, 0));
    assert_eq!(rig.get(NEW, &read_10(4, 1), 512), [0; 512]);
    assert_eq!(*lock(&next.ear.gone), 0);
}

#[test]
fn what_a_unit_has_in_hand_when_it_goes_is_finished() {
    let mut rig = Rig::new().ready();
    rig.disk.storage.hold();
    add(&mut rig.driver, 2, DISK, &write_10(1, 1), &[8; 512], 0);
    rig.driver.kick(2);
    rig.good(OTHER, &[0; 6], &[]);
    rig.scsi.handle().unplug(DISK);
    // Not there for others from now on.
    assert_eq!(rig.refused(DISK, &[0; 6], &[], 0), (5, 0x25, 0));
    assert_eq!(*lock(&rig.disk.ear.gone), 0);
    rig.disk.storage.let_go();
    assert_eq!(outcome(&rig.driver.wait(2)).status, 0);
    rig.disk.ear.wait_until_gone();
    assert_eq!(lock(&rig.disk.storage.state).data[512], 8);
}

#[test]
fn a_unit_goes_at_once_from_a_machine_that_is_paused() {
    let mut rig = Rig::new().ready();
    rig.good(DISK, &write_10(1, 1), &[8; 512]);
    rig.scsi.pause();
    rig.scsi.handle().unplug(DISK);
    assert_eq!(*lock(&rig.disk.ear.gone), 1);
    rig.scsi.resume();
    assert_eq!(rig.refused(DISK, &[0; 6], &[], 0), (5, 0x25, 0));
    // What is to be told is told when there is room for it.
    rig.listen(1);
    assert_eq!(rig.event(), (1, request::name(DISK), 2));
}

#[test]
fn a_place_takes_one_unit() {
    let rig = Rig::new();
    let new = drive(UnitOptions::default());
    let handle = rig.scsi.handle();
    let error = handle.plug(DISK, &new.unit).unwrap_err();
    assert_eq!(error.to_string(), "SCSI: unit 0 of target 0 is taken");
    assert!(handle.plug((0, 0x4000), &new.unit).is_err());
    handle.unplug((0, 1));
    for options in [
        UnitOptions {
            logical_block_size: 8192,
            physical_block_size: 8192,
            ..UnitOptions::default()
        },
        UnitOptions {
            logical_block_size: 4096,
            ..UnitOptions::default()
        },
    ] {
        let ear = Arc::new(Ear::default());
        assert!(Unit::new(options, MemoryStorage::new(), ear).is_err());
    }
    assert!(
        Scsi::new(ScsiOptions {
            queues: 0,
            ..ScsiOptions::default()
        })
        .is_err()
    );
}

/// As many as anybody keeps, and then that there were more.
#[test]
fn events_that_nobody_takes_are_counted_as_missed() {
    let mut rig = Rig::new().ready();
    for _ in 0..100 {
        rig.disk.unit.set_capacity(1 << 20);
    }
    rig.listen(1);
    let (what, whom, why) = rig.event();
    assert_eq!(what, 1 << 31 | 3);
    assert_eq!((whom, why), (request::name(DISK), 0x092a));
    rig.listen(63);
    for _ in 0..63 {
        assert_eq!(rig.event().0, 3);
    }
}

#[test]
fn a_new_size_is_told_and_used() {
    let mut rig = Rig::new().ready();
    rig.listen(1);
    rig.good(DISK, &write_10(2047, 1), &[1; 512]);
    rig.disk.unit.set_capacity(512 * 1000);
    assert_eq!(rig.event(), (3, request::name(DISK), 0x092a));
    assert_eq!(rig.refused(DISK, &[0; 6], &[], 0), (6, 0x2a, 9));
    assert_eq!(rig.get(DISK, &[0x25], 8)[..4], [0, 0, 3, 0xe7]);
    assert_eq!(
        rig.refused(DISK, &write_10(1000, 1), &[1; 512], 0),
        (5, 0x21, 0)
    );
}

fn field(scsi: &Scsi, offset: u32) -> u32 {
    let mut bytes = [0; 4];
    scsi.read_config(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

#[test]
fn its_configuration_says_what_it_is() {
    let mut scsi = Scsi::new(ScsiOptions {
        queues: 4,
        queue_size: 128,
        max_sectors: 512,
        cmd_per_lun: 7,
        starter: None,
    })
    .unwrap();
    assert_eq!(scsi.queue_sizes(), [128; 6]);
    let words: Vec<u32> = (0..9).map(|at| field(&scsi, 4 * at)).collect();
    assert_eq!(words, [4, 126, 512, 7, 16, 96, 32, 0xff_0000, 0x3fff]);
    assert_eq!(field(&scsi, 36), 0);
    scsi.write_config(20, &40u32.to_le_bytes());
    scsi.write_config(24, &16u32.to_le_bytes());
    // What can't be.
    scsi.write_config(20, &1000u32.to_le_bytes());
    scsi.write_config(24, &u32::MAX.to_le_bytes());
    scsi.write_config(0, &9u32.to_le_bytes());
    assert_eq!(
        [field(&scsi, 0), field(&scsi, 20), field(&scsi, 24)],
        [4, 40, 16]
    );
    // Requests have these sizes.
    let unit = drive(UnitOptions::default()).unit;
    scsi.handle().plug(DISK, &unit).unwrap();
    let features = scsi.features() | feature::TRANSPORT;
    let mut driver = Driver::new(&scsi.queue_sizes(), features);
    scsi.activate(driver.activation()).unwrap();
    let head = head(DISK, 0, &[0; 6]);
    let used = driver.request(2, &[&head[..35]], &[52]);
    assert_eq!((used.data[10], used.data[14], used.data[24]), (2, 6, 0x29));
    scsi.pause();
    let saved = scsi.save().unwrap();
    scsi.reset();
    assert_eq!([field(&scsi, 20), field(&scsi, 24)], [96, 32]);
    scsi.load(&saved, None).unwrap();
    assert_eq!([field(&scsi, 20), field(&scsi, 24)], [40, 16]);
}

#[test]
fn what_waits_after_a_failure_is_saved_and_done_by_the_next_device() {
    let options = UnitOptions {
        policy: Policy {
            read: OnError::Stop,
            write: OnError::Stop,
        },
        ..UnitOptions::default()
    };
    let mut rig = Rig::with(ScsiOptions::default(), options.clone()).ready();
    rig.disk.storage.fail(Some(libc::ENOSPC));
    for i in 0..4 {
        let data = [i as u8 + 1; 512];
        add(&mut rig.driver, 2, DISK, &write_10(i, 1), &data, 0);
    }
    rig.driver.kick(2);
    let query = tasks::function(6, DISK, 77);
    assert_eq!(rig.driver.request(0, &[&query], &[1]).data, [10]);
    rig.disk.unit.set_capacity(1 << 20);
    rig.scsi.pause();
    let saved = rig.scsi.save().unwrap();
    let setups: Vec<_> = rig.driver.queues.iter().map(|q| Some(q.setup)).collect();
    rig.scsi.reset();
    let ear = rig.disk.ear.clone();
    let mut next = Scsi::new(ScsiOptions::default()).unwrap();
    let unit = Unit::new(options, rig.disk.storage.clone(), ear).unwrap();
    let handle = next.handle();
    handle.plug(DISK, &unit).unwrap();
    handle.plug(OTHER, &rig.other.unit).unwrap();
    let activation = rig.driver.reactivation(&setups);
    assert!(next.load(&saved, None).is_err(), "a unit is missing");
    handle.plug(CD, &rig.cd.unit).unwrap();
    next.load(&saved, Some(activation)).unwrap();
    assert_eq!(next.save().unwrap(), saved);
    rig.disk.storage.fail(None);
    next.resume();
    // The first finds what the new size left to tell; the driver would try again.
    let results: Vec<u8> = (0..4)
        .map(|_| outcome(&rig.driver.wait(2)).status)
        .collect();
    assert_eq!(results.iter().filter(|status| **status == 2).count(), 1);
    let state = lock(&rig.disk.storage.state);
    assert_eq!(state.log.len(), 3);
    drop(state);
    rig.listen(1);
    assert_eq!(rig.event(), (3, request::name(DISK), 0x092a));
}

/// A unit that was taken away while the machine was saved, but is in its configuration still.
#[test]
fn a_unit_that_the_state_does_not_have_is_told() {
    let mut rig = Rig::new().ready();
    rig.scsi.pause();
    rig.scsi.handle().unplug(OTHER);
    let saved = rig.scsi.save().unwrap();
    let setups: Vec<_> = rig.driver.queues.iter().map(|q| Some(q.setup)).collect();
    let mut next = Scsi::new(ScsiOptions::default()).unwrap();
    let other = drive(UnitOptions::default());
    for (address, unit) in [
        (DISK, &rig.disk.unit),
        (OTHER, &other.unit),
        (CD, &rig.cd.unit),
    ] {
        next.handle().plug(address, unit).unwrap();
    }
    rig.scsi.reset();
    let activation = rig.driver.reactivation(&setups);
    next.load(&saved, Some(activation)).unwrap();
    next.resume();
    rig.listen(2);
    // Unit 300 by the name that REPORT LUNS has for it.
    assert_eq!(rig.event(), (1, [1, 0, 0x41, 0x2c, 0, 0, 0, 0], 2));
    assert_eq!(rig.event(), (1, request::name(OTHER), 1));
    assert_eq!(rig.refused(OTHER, &[0; 6], &[], 0), (6, 0x29, 0));
    rig.good(OTHER, &[0; 6], &[]);
}
