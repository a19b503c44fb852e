//! Task management functions.

use super::*;

pub(super) fn function(function: u32, address: Address, tag: u64) -> Vec<u8> {
    let mut bytes = 0u32.to_le_bytes().to_vec();
    bytes.extend(function.to_le_bytes());
    bytes.extend(request::name(address));
    bytes.extend(tag.to_le_bytes());
    bytes
}

const ABORT: u32 = 0;
const ABORT_SET: u32 = 1;
const CLEAR_ACA: u32 = 2;
const NEXUS_RESET: u32 = 4;
const UNIT_RESET: u32 = 5;
const QUERY: u32 = 6;
const QUERY_SET: u32 = 7;

fn ask(rig: &mut Rig, what: u32, address: Address, tag: u64) -> u8 {
    let used = rig
        .driver
        .request(0, &[&function(what, address, tag)], &[1]);
    used.data[0]
}

fn begin(rig: &mut Rig, address: Address, tag: u64) {
    let cdb = write_10(1, 1);
    add_tagged(&mut rig.driver, 2, address, tag, &cdb, &[1; 512], 0);
    rig.driver.kick(2);
}

#[test]
fn commands_are_found_by_their_tags() {
    let mut rig = Rig::new().ready();
    assert_eq!(ask(&mut rig, QUERY, DISK, 5), 0);
    rig.disk.storage.hold();
    begin(&mut rig, DISK, 5);
    assert_eq!(ask(&mut rig, QUERY, DISK, 5), 10);
    assert_eq!(ask(&mut rig, QUERY, DISK, 6), 0);
    assert_eq!(ask(&mut rig, QUERY, OTHER, 5), 0);
    assert_eq!(ask(&mut rig, QUERY_SET, DISK, 0), 10);
    assert_eq!(ask(&mut rig, QUERY_SET, OTHER, 0), 0);
    rig.disk.storage.let_go();
    assert_eq!(outcome(&rig.driver.wait(2)).response, 0);
}

/// Answered only when nothing of the command is left, and the command is told first.
#[test]
fn an_aborted_command_is_over_before_that_is_said() {
    for (what, response) in [
        (ABORT, 2),
        (ABORT_SET, 2),
        (UNIT_RESET, 4),
        (NEXUS_RESET, 4),
    ] {
        let mut rig = Rig::new().ready();
        rig.disk.storage.hold();
        begin(&mut rig, DISK, 5);
        if what == ABORT {
            begin(&mut rig, DISK, 6);
        }
        // It is in hand: a reset is told to what comes later.
        assert_eq!(ask(&mut rig, QUERY_SET, DISK, 0), 10);
        rig.driver.add(0, &[&function(what, DISK, 5)], &[1]);
        rig.driver.kick(0);
        // The next function is answered, so this one has been taken; others are served; this one still waits.
        assert_eq!(ask(&mut rig, QUERY_SET, DISK, 0), 10);
        rig.good(CD, &[0; 6], &[]);
        assert_eq!(rig.driver.used(0), None);
        rig.disk.storage.let_go();
        assert_eq!(rig.driver.wait(0).data, [0]);
        // By now the command has been given back.
        let first = outcome(&rig.driver.used(2).unwrap());
        assert_eq!(first.response, response);
        if what == ABORT {
            assert_eq!(outcome(&rig.driver.wait(2)).response, 0);
        }
        if response == 4 {
            assert_eq!(rig.refused(DISK, &[0; 6], &[], 0), (6, 0x29, 0));
        }
        rig.good(DISK, &[0; 6], &[]);
    }
}

#[test]
fn a_target_that_is_reset_takes_all_its_units_along() {
    let mut rig = Rig::new().ready();
    assert_eq!(ask(&mut rig, NEXUS_RESET, DISK, 0), 0);
    assert_eq!(rig.refused(OTHER, &[0; 6], &[], 0), (6, 0x29, 0));
    assert_eq!(rig.refused(DISK, &[0; 6], &[], 0), (6, 0x29, 0));
    rig.good(CD, &[0; 6], &[]);
    assert_eq!(ask(&mut rig, UNIT_RESET, OTHER, 0), 0);
    assert_eq!(rig.refused(OTHER, &[0; 6], &[], 0), (6, 0x29, 0));
    rig.good(DISK, &[0; 6], &[]);
}

#[test]
fn what_can_not_be_asked_is_refused() {
    let mut rig = Rig::new().ready();
    assert_eq!(ask(&mut rig, CLEAR_ACA, DISK, 0), 11);
    assert_eq!(ask(&mut rig, 99, DISK, 0), 11);
    assert_eq!(ask(&mut rig, UNIT_RESET, (0, 1), 0), 12);
    assert_eq!(ask(&mut rig, UNIT_RESET, (7, 0), 0), 3);
    // Notifications that nobody gives.
    let mut query = 2u32.to_le_bytes().to_vec();
    query.extend(request::name(CD));
    query.extend([0xff; 4]);
    let used = rig.driver.request(0, &[&query], &[5]);
    assert_eq!(used.data, [0, 0, 0, 0, 0]);
    // Nothing that is known, too little of it, no room for an answer.
    let used = rig.driver.request(0, &[&[9, 0, 0, 0]], &[1]);
    assert_eq!(used.data, [9]);
    let used = rig.driver.request(0, &[&function(0, DISK, 0)[..20]], &[1]);
    assert_eq!(used.data, [9]);
    rig.driver.request(0, &[&function(0, DISK, 0)], &[]);
    assert_eq!(ask(&mut rig, QUERY, DISK, 0), 0);
}

/// A machine that stops while a function waits: both are told before it is at rest.
#[test]
fn what_is_on_its_way_is_told_when_the_machine_pauses() {
    let mut rig = Rig::new().ready();
    rig.disk.storage.hold();
    begin(&mut rig, DISK, 5);
    assert_eq!(ask(&mut rig, QUERY, DISK, 5), 10);
    rig.driver.add(0, &[&function(ABORT, DISK, 5)], &[1]);
    rig.driver.kick(0);
    // The next one is answered, so the function has been taken.
    assert_eq!(ask(&mut rig, QUERY, DISK, 5), 10);
    let (storage, scsi) = (rig.disk.storage.clone(), &mut rig.scsi);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            storage.let_go();
        });
        scsi.pause();
    });
    assert_eq!(outcome(&rig.driver.used(2).unwrap()).response, 2);
    assert_eq!(rig.driver.used(0).unwrap().data, [0]);
    rig.scsi.resume();
    rig.good(DISK, &[0; 6], &[]);
}

/// A command that waits for the machine to be resumed, after a failure, can be aborted.
#[test]
fn what_waits_after_a_failure_can_be_aborted() {
    let policy = Policy {
        read: crate::block::OnError::Stop,
        write: crate::block::OnError::Stop,
    };
    let options = UnitOptions {
        policy,
        ..UnitOptions::default()
    };
    let mut rig = Rig::with(ScsiOptions::default(), options).ready();
    rig.disk.storage.fail(Some(libc::EIO));
    begin(&mut rig, DISK, 5);
    assert_eq!(ask(&mut rig, QUERY, DISK, 5), 10);
    // What comes after it waits as well.
    begin(&mut rig, DISK, 6);
    assert_eq!(ask(&mut rig, ABORT, DISK, 5), 0);
    assert_eq!(outcome(&rig.driver.used(2).unwrap()).response, 2);
    rig.scsi.pause();
    rig.disk.storage.fail(None);
    rig.scsi.resume();
    assert_eq!(outcome(&rig.driver.wait(2)).response, 0);
    assert_eq!(lock(&rig.disk.storage.state).log, [Op::Write]);
}
