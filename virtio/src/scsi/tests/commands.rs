//! A disk's commands.

use super::*;
use crate::block::OnError;

fn sized(logical: u32, physical: u32) -> UnitOptions {
    UnitOptions {
        logical_block_size: logical,
        physical_block_size: physical,
        ..UnitOptions::default()
    }
}

#[test]
fn a_disk_says_what_it_is() {
    let options = UnitOptions {
        vendor: "ACME".into(),
        product: "Roadrunner\u{e9}xyz1234567".into(),
        serial: "WD-123".into(),
        wwn: Some(0x5000_c500_15ea_71ab),
        ..UnitOptions::default()
    };
    // Without looking at what it has to tell first.
    let mut rig = Rig::with(ScsiOptions::default(), options);
    let inquiry = rig.get(DISK, &[0x12, 0, 0, 0, 96, 0], 96);
    assert_eq!(inquiry[..8], [0, 0, 5, 2, 31, 0, 0, 2]);
    assert_eq!(&inquiry[8..], b"ACME    Roadrunner__xyz11.0 ");
    let usual = rig.get(OTHER, &[0x12, 0, 0, 0, 36, 0], 36);
    assert_eq!(&usual[8..], b"VIREO   HARDDISK        1.0 ");
    assert_eq!(rig.get(DISK, &[0x12, 0, 0, 0, 5, 0], 96).len(), 5);
    let mut page = |address, number| rig.get(address, &[0x12, 1, number, 1, 0, 0], 256);
    assert_eq!(page(DISK, 0), [0, 0, 0, 6, 0, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    assert_eq!(page(DISK, 0x80), *b"\0\x80\0\x06WD-123");
    assert_eq!(page(OTHER, 0), [0, 0, 0, 5, 0, 0x83, 0xb0, 0xb1, 0xb2]);
    let mut ids = b"\0\x83\0\x16\x02\0\0\x06WD-123\x01\x03\0\x08".to_vec();
    ids.extend(0x5000_c500_15ea_71ab_u64.to_be_bytes());
    assert_eq!(page(DISK, 0x83), ids);
    let limits = page(DISK, 0xb0);
    assert_eq!((limits.len(), limits[4]), (64, 1));
    assert_eq!(limits[20..24], (1u32 << 21).to_be_bytes());
    assert_eq!(page(DISK, 0xb1).len(), 64);
    assert_eq!(page(DISK, 0xb2)[5..7], [0xe0, 2]);
    assert_eq!(
        rig.refused(OTHER, &[0x12, 1, 0x80, 0, 96, 0], &[], 96),
        (5, 0x24, 0)
    );
    assert_eq!(rig.refused(DISK, &[0xf0], &[], 96), (6, 0x29, 0));
}

#[test]
fn its_size_is_told() {
    let mut rig = Rig::with(ScsiOptions::default(), sized(512, 4096)).ready();
    assert_eq!(rig.get(DISK, &[0x25], 8), [0, 0, 7, 0xff, 0, 0, 2, 0]);
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
    let long = rig.get(DISK, &cdb, 32);
    assert_eq!(long[..12], [0, 0, 0, 0, 0, 0, 7, 0xff, 0, 0, 2, 0]);
    assert_eq!(long[12..16], [0, 3, 0x80, 0]);
    let mut rig = Rig::with(ScsiOptions::default(), sized(4096, 4096)).ready();
    assert_eq!(rig.get(DISK, &[0x25], 8), [0, 0, 0, 0xff, 0, 0, 0x10, 0]);
    assert_eq!(rig.refused(DISK, &read_10(256, 1), &[], 4096), (5, 0x21, 0));
    rig.good(DISK, &write_10(255, 1), &[4; 4096]);
    assert_eq!(lock(&rig.disk.storage.state).data[255 * 4096..], [4; 4096]);
}

/// In every form there is of it.
#[test]
fn what_was_written_is_read() {
    let mut rig = Rig::new().ready();
    let form = |operation: u8, count: u8| match operation >> 5 {
        0 => vec![operation, 0, 0, 9, count, 0],
        4 => vec![operation, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, count, 0, 0],
        5 => vec![operation, 0, 0, 0, 0, 9, 0, 0, 0, count, 0, 0],
        _ => vec![operation, 0, 0, 0, 0, 9, 0, 0, count, 0],
    };
    let reads = [0x08, 0x28, 0xa8, 0x88];
    let writes = [0x0a, 0x2a, 0xaa, 0x8a, 0x2e, 0xae, 0x8e];
    for (at, write) in writes.into_iter().enumerate() {
        let data = [at as u8 + 1; 1024];
        rig.good(DISK, &form(write, 2), &data);
        for read in reads {
            assert_eq!(rig.get(DISK, &form(read, 2), 1024), data, "{read:x}");
        }
    }
    // A count of 0 is 256 in the shortest form, and none in others.
    let all = rig.get(DISK, &[0x08, 0, 0, 0, 0, 0], 256 * 512);
    assert_eq!((all.len(), all[9 * 512]), (256 * 512, 7));
    assert!(rig.get(DISK, &read_10(0, 0), 512).is_empty());
    // WRITE AND VERIFY, and FUA: on the disk when it is answered.
    rig.good(DISK, &[0x2a, 1 << 3, 0, 0, 0, 0, 0, 0, 1, 0], &[1; 512]);
    let log = lock(&rig.disk.storage.state).log.clone();
    let flushes = log.iter().filter(|op| **op == Op::Flush).count();
    assert_eq!((log.len(), flushes), (7 + 3 + 2, 4));
    assert_eq!(*log.last().unwrap(), Op::Flush);
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    let mut rig = Rig::new().ready();
    let end = 2048;
    for (cdb, room) in [
        (read_10(end, 1), 512),
        (read_10(end - 1, 2), 1024),
        (read_10(u32::MAX, u16::MAX), 512),
        ([&[0x88, 0][..], &[0xff; 12], &[0, 0]].concat(), 512),
        ([&[0xa8, 0][..], &[0xff; 8], &[0, 0]].concat(), 512),
        (vec![0x2b, 0, 0, 0, 8, 0, 0, 0, 0, 0], 0),
        (vec![0x2f, 0, 0, 0, 8, 0, 0, 0, 1, 0], 0),
        (vec![0x35, 0, 0, 0, 8, 1, 0, 0, 0, 0], 0),
    ] {
        assert_eq!(rig.refused(DISK, &cdb, &[], room), (5, 0x21, 0), "{cdb:x?}");
    }
    assert_eq!(
        rig.refused(DISK, &write_10(end, 1), &[0; 512], 0),
        (5, 0x21, 0)
    );
    // Protection, comparing, persistent reservations, what nobody knows.
    assert_eq!(
        rig.refused(DISK, &[0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0], &[], 512),
        (5, 0x24, 0)
    );
    assert_eq!(
        rig.refused(DISK, &[0x2f, 2, 0, 0, 0, 0, 0, 0, 1, 0], &[], 0),
        (5, 0x24, 0)
    );
    for operation in [0x5e, 0x5f, 0x04, 0xc0, 0xff, 0x9e, 0xa3] {
        assert_eq!(rig.refused(DISK, &[operation], &[], 64), (5, 0x20, 0));
    }
    rig.good(DISK, &[0x2f, 0, 0, 0, 7, 0xff, 0, 0, 1, 0], &[]);
    assert!(lock(&rig.disk.storage.state).log.is_empty());
}

#[test]
fn data_that_do_not_fit_are_told() {
    let mut rig = Rig::new().ready();
    let short = rig.run(DISK, &read_10(0, 2), &[], 1023);
    assert_eq!((short.response, short.status), (1, 0));
    let short = rig.run(DISK, &write_10(0, 2), &[1; 1023], 0);
    assert_eq!(short.response, 1);
    let long = rig.run(DISK, &read_10(0, 1), &[], 700);
    assert_eq!((long.response, long.residual), (0, 188));
    let long = rig.run(DISK, &write_10(0, 1), &[1; 700], 0);
    assert_eq!((long.response, long.residual), (0, 188));
    // Both ways at a time.
    let head = head(DISK, 1, &read_10(0, 1));
    let used = rig.driver.request(2, &[&head, &[0; 512]], &[108, 512]);
    assert_eq!(outcome(&used).response, 9);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let options = UnitOptions {
        read_only: true,
        ..UnitOptions::default()
    };
    let mut rig = Rig::with(ScsiOptions::default(), options).ready();
    let unmap = [&[0, 22, 0, 16, 0, 0, 0, 0][..], &[0; 16]].concat();
    for (cdb, data) in [
        (write_10(0, 1), &[1; 512][..]),
        (vec![0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &unmap),
        (vec![0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[1; 512]),
    ] {
        assert_eq!(rig.refused(DISK, &cdb, data, 0), (7, 0x27, 0));
    }
    assert_eq!(rig.get(DISK, &[0x1a, 0, 0x3f, 0, 255, 0], 255)[2], 0x90);
    assert_eq!(rig.get(DISK, &[0x12, 1, 0xb2, 0, 8, 0], 8)[5..7], [0, 0]);
    assert!(lock(&rig.disk.storage.state).log.is_empty());
}

fn unmap_list(ranges: &[(u64, u32)]) -> Vec<u8> {
    let len = 16 * ranges.len() as u16;
    let mut list = (len + 6).to_be_bytes().to_vec();
    list.extend(len.to_be_bytes());
    list.extend([0; 4]);
    for (first, count) in ranges {
        list.extend(first.to_be_bytes());
        list.extend(count.to_be_bytes());
        list.extend([0; 4]);
    }
    list
}

#[test]
fn blocks_are_given_back() {
    let mut rig = Rig::new().ready();
    rig.good(DISK, &write_10(0, 16), &[7; 8192]);
    let mut unmap = |list: &[u8]| {
        let [high, low] = (list.len() as u16).to_be_bytes();
        let cdb = [0x42, 0, 0, 0, 0, 0, 0, high, low, 0];
        let got = rig.run(DISK, &cdb, list, 0);
        assert_eq!(got.response, 0);
        (got.status == 0, got.sense)
    };
    let good = (true, (0, 0, 0));
    assert_eq!(unmap(&unmap_list(&[(0, 2), (5, 0), (4, 1)])), good);
    assert_eq!(unmap(&unmap_list(&[])), good);
    assert_eq!(unmap(&unmap_list(&[(2048, 1)])), (false, (5, 0x21, 0)));
    assert_eq!(unmap(&unmap_list(&[(u64::MAX, 9)])), (false, (5, 0x21, 0)));
    assert_eq!(unmap(&unmap_list(&[(0, 1); 17])), (false, (5, 0x26, 0)));
    assert_eq!(unmap(&unmap_list(&[(0, 1)])[..20]), (false, (5, 0x1a, 0)));
    assert_eq!(unmap(&[0; 7]), (false, (5, 0x1a, 0)));
    let state = lock(&rig.disk.storage.state);
    assert_eq!(state.log, [Op::Write, Op::Discard, Op::Discard]);
    assert_eq!(state.data[..1024], [0; 1024]);
    assert_eq!(state.data[1024..2048], [7; 1024]);
}

#[test]
fn one_block_is_written_to_many_places() {
    let mut rig = Rig::new().ready();
    let long = |flags: u8, first: u16, count: u16| {
        let ([a, b], [c, d]) = (first.to_be_bytes(), count.to_be_bytes());
        [0x93, flags, 0, 0, 0, 0, 0, 0, a, b, 0, 0, c, d, 0, 0]
    };
    let block: Vec<u8> = (0..512).map(|i| (i % 251) as u8).collect();
    // More than one piece of it.
    rig.good(DISK, &long(0, 3, 2040), &block);
    {
        let state = lock(&rig.disk.storage.state);
        assert_eq!(state.data[..3 * 512], [0; 3 * 512]);
        for place in state.data[3 * 512..2043 * 512].chunks(512) {
            assert_eq!(place, block);
        }
        assert_eq!(state.data[2043 * 512..], [0; 5 * 512]);
        assert_eq!(state.log, [Op::Write, Op::Write]);
    }
    rig.good(DISK, &long(1 << 3, 3, 4), &[0; 512]);
    rig.good(DISK, &long(0, 7, 4), &[0; 512]);
    rig.good(DISK, &long(1 | 1 << 3, 11, 4), &[]);
    rig.good(DISK, &[0x41, 0, 0, 0, 0, 15, 0, 0, 1, 0], &[0; 512]);
    {
        let state = lock(&rig.disk.storage.state);
        let unmap = |unmap| Op::WriteZeroes { unmap };
        let expected = [unmap(true), unmap(false), unmap(true), unmap(false)];
        assert_eq!(state.log[2..], expected);
        assert_eq!(state.data[..16 * 512], [0; 16 * 512]);
        assert_eq!(state.data[16 * 512..][..512], block);
    }
    // None, more than there are, half a block.
    assert_eq!(rig.refused(DISK, &long(0, 0, 0), &block, 0), (5, 0x24, 0));
    assert_eq!(
        rig.refused(DISK, &long(0, 9, 2040), &block, 0),
        (5, 0x21, 0)
    );
    assert_eq!(rig.run(DISK, &long(0, 0, 1), &block[..511], 0).response, 1);
    let mut huge = long(0, 0, 1);
    huge[10..14].fill(0xff);
    assert_eq!(rig.refused(DISK, &huge, &block, 0), (5, 0x24, 0));
}

fn caching(rig: &mut Rig) -> u8 {
    rig.get(DISK, &[0x1a, 1 << 3, 8, 0, 255, 0], 255)[4 + 2]
}

#[test]
fn the_write_cache_is_turned_off_and_on() {
    let mut rig = Rig::new().ready();
    assert_eq!(caching(&mut rig), 1 << 2);
    let changeable = rig.get(DISK, &[0x1a, 1 << 3, 1 << 6 | 8, 0, 255, 0], 255);
    assert_eq!(changeable[4..7], [8, 18, 1 << 2]);
    let select = |cache: u8| {
        let mut list = vec![0; 4 + 20];
        (list[4], list[5], list[6]) = (8, 18, cache);
        list
    };
    let cdb = [0x15, 0x10, 0, 0, 24, 0];
    rig.good(DISK, &cdb, &select(0));
    assert_eq!(caching(&mut rig), 0);
    assert!(rig.disk.unit.storage.writethrough());
    assert_eq!(lock(&rig.disk.storage.state).log, [Op::Flush]);
    rig.good(DISK, &cdb, &select(1 << 2));
    assert_eq!(caching(&mut rig), 1 << 2);
    // By the longer form, with a block descriptor.
    let mut list = vec![0; 8 + 8 + 20];
    list[7] = 8;
    (list[16], list[17]) = (8, 18);
    rig.good(DISK, &[0x55, 0x10, 0, 0, 0, 0, 0, 0, 36, 0], &list);
    assert_eq!(caching(&mut rig), 0);
    // Anything else.
    let mut other = select(0);
    other[8] = 1;
    assert_eq!(rig.refused(DISK, &cdb, &other, 0), (5, 0x26, 0));
    assert_eq!(rig.refused(DISK, &cdb, &select(1), 0), (5, 0x26, 0));
    let cut = [0x15, 0x10, 0, 0, 20, 0];
    assert_eq!(rig.refused(DISK, &cut, &select(0)[..20], 0), (5, 0x1a, 0));
    let saving = [0x15, 0x11, 0, 0, 24, 0];
    assert_eq!(rig.refused(DISK, &saving, &select(0), 0), (5, 0x24, 0));
    // Nothing of that outlives a reset.
    rig.scsi.reset();
    assert!(!rig.disk.unit.storage.writethrough());
}

#[test]
fn pages_of_modes_are_told() {
    let mut rig = Rig::new().ready();
    let all = rig.get(DISK, &[0x1a, 0, 0x3f, 0, 255, 0], 255);
    assert_eq!(all[..4], [all.len() as u8 - 1, 0, 0x10, 8]);
    assert_eq!(all[4..12], [0, 0, 8, 0, 0, 0, 2, 0]);
    assert_eq!((all[12], all[24], all[44]), (0x01, 0x08, 0x0a));
    let long = rig.get(DISK, &[0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 255, 0], 255);
    assert_eq!(long[..8], [0, long.len() as u8 - 2, 0, 0x10, 0, 0, 0, 8]);
    assert_eq!(long[8..], all[4..]);
    assert_eq!(
        rig.refused(DISK, &[0x1a, 0, 0xc0 | 8, 0, 255, 0], &[], 255),
        (5, 0x39, 0)
    );
    assert_eq!(
        rig.refused(DISK, &[0x1a, 0, 0x2a, 0, 255, 0], &[], 255),
        (5, 0x24, 0)
    );
    // Which commands it knows.
    let known = |code| [0xa3, 0x0c, 1, code, 0, 0, 0, 0, 0, 64, 0, 0];
    assert_eq!(rig.get(DISK, &known(0x93), 64)[..5], [0, 3, 0, 16, 0x93]);
    assert_eq!(rig.get(DISK, &known(0x5f), 64), [0, 1, 0, 0]);
    let list = rig.get(DISK, &[0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0], 1024);
    assert_eq!(list.len() % 8, 4);
}

#[test]
fn targets_tell_their_units() {
    let mut rig = Rig::new();
    let report = |room: u8| [0xa0, 0, 0, 0, 0, 0, 0, 0, 0, room, 0, 0];
    let luns = rig.get(DISK, &report(255), 255);
    assert_eq!(luns[..8], [0, 0, 0, 16, 0, 0, 0, 0]);
    assert_eq!(luns[8..16], [0; 8]);
    assert_eq!(luns[16..18], [0x41, 0x2c]);
    // Of units that aren't there, too; unit 0 is always told.
    let luns = rig.get((2, 0), &report(255), 255);
    assert_eq!(luns[3], 16);
    assert_eq!(luns[16..18], [0, 1]);
    let nobody = rig.get((2, 0), &[0x12, 0, 0, 0, 36, 0], 36);
    assert_eq!((nobody.len(), nobody[0]), (36, 0x7f));
    assert_eq!(rig.refused((2, 0), &[0; 6], &[], 0), (5, 0x25, 0));
    let sense = rig.get((2, 0), &[0x03, 0, 0, 0, 18, 0], 18);
    assert_eq!((sense[2], sense[12]), (5, 0x25));
    assert_eq!(rig.refused((2, 1), &report(8), &[], 8), (5, 0x24, 0));
    assert_eq!(rig.run((3, 0), &report(255), &[], 255).response, 3);
    // The power-on is told still.
    let sense = rig.get(DISK, &[0x03, 0, 0, 0, 18, 0], 18);
    assert_eq!((sense[2], sense[12]), (6, 0x29));
    rig.good(DISK, &[0; 6], &[]);
    let sense = rig.get(DISK, &[0x03, 0, 0, 0, 18, 0], 18);
    assert_eq!((sense[2], sense[12]), (0, 0));
}

#[test]
fn failures_go_by_the_policy() {
    use crate::block::Action;
    for (policy, errno, expected, sense) in [
        (OnError::Report, libc::EIO, Action::Report, (3, 0x0c, 0)),
        (OnError::Report, libc::ENOSPC, Action::Report, (7, 0x27, 7)),
        (OnError::Ignore, libc::EIO, Action::Ignore, (0, 0, 0)),
        (OnError::Enospace, libc::EIO, Action::Report, (3, 0x0c, 0)),
        (OnError::Enospace, libc::ENOSPC, Action::Stop, (0, 0, 0)),
        (OnError::Stop, libc::EIO, Action::Stop, (0, 0, 0)),
    ] {
        let options = UnitOptions {
            policy: Policy {
                read: OnError::Report,
                write: policy,
            },
            ..UnitOptions::default()
        };
        let mut rig = Rig::with(ScsiOptions::default(), options).ready();
        rig.disk.storage.fail(Some(errno));
        add(&mut rig.driver, 2, DISK, &write_10(8, 1), &[5; 512], 0);
        rig.driver.kick(2);
        if expected == Action::Stop {
            // Told when the queue has it parked: answered by then.
            let query = tasks::function(6, DISK, 77);
            assert_eq!(rig.driver.request(0, &[&query], &[1]).data, [10]);
            rig.scsi.pause();
            rig.disk.storage.fail(None);
            rig.scsi.resume();
        }
        let got = outcome(&rig.driver.wait(2));
        assert_eq!((got.response, got.sense), (0, sense));
        let failure = Failure {
            write: true,
            errno,
            action: expected,
        };
        assert_eq!(*lock(&rig.disk.ear.failures), [failure]);
        let written = lock(&rig.disk.storage.state).data[8 * 512];
        let reached = expected == Action::Stop;
        assert_eq!(written, if reached { 5 } else { 0 });
        rig.disk.storage.fail(Some(errno));
        let read = rig.refused(DISK, &read_10(0, 1), &[], 512);
        let unreadable = (3, 0x11, 0);
        assert_eq!(
            read,
            if errno == libc::ENOSPC {
                (7, 0x27, 7)
            } else {
                unreadable
            }
        );
    }
}
