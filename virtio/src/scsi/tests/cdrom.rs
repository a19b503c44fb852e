//! CD-ROM drives. What they do for packets is tested with SATA's, too.

use super::*;

fn start_stop(bits: u8) -> [u8; 6] {
    [0x1b, 0, 0, 0, bits, 0]
}

#[test]
fn a_cdrom_drive_says_what_it_is_and_reads() {
    let mut rig = Rig::new().ready();
    let inquiry = rig.get(CD, &[0x12, 0, 0, 0, 96, 0], 96);
    assert_eq!(inquiry[..3], [5, 0x80, 5]);
    assert_eq!(&inquiry[8..], b"VIREO   DVD-ROM         1.0 ");
    assert_eq!(
        rig.get(CD, &[0x12, 1, 0, 0, 96, 0], 96),
        [5, 0, 0, 2, 0, 0x83]
    );
    assert_eq!(rig.get(CD, &[0x25], 8), [0, 0, 1, 0xff, 0, 0, 8, 0]);
    lock(&rig.cd.storage.state).data[7 * 2048..8 * 2048].fill(9);
    assert_eq!(rig.get(CD, &read_10(7, 1), 2048), [9; 2048]);
    assert_eq!(rig.refused(CD, &read_10(512, 1), &[], 2048), (5, 0x21, 0));
    assert_eq!(
        rig.refused(CD, &write_10(0, 1), &[0; 2048], 0),
        (5, 0x20, 0)
    );
    // Connected by SCSI.
    let core = rig.get(CD, &[0x46, 2, 0, 1, 0, 0, 0, 0, 64, 0], 64);
    assert_eq!(core[12..16], [0, 0, 0, 1]);
    rig.cd.storage.fail(Some(libc::EIO));
    assert_eq!(rig.refused(CD, &read_10(0, 1), &[], 2048), (3, 0x11, 0));
    assert_eq!(lock(&rig.cd.ear.failures).len(), 1);
}

#[test]
fn media_come_and_go() {
    let mut rig = Rig::new().ready();
    rig.good(CD, &[0x1e, 0, 0, 0, 1, 0], &[]);
    assert_eq!(rig.cd.unit.tray(), (false, true));
    assert_eq!(rig.refused(CD, &start_stop(2), &[], 0), (5, 0x53, 2));
    assert!(!rig.cd.unit.ask_for_medium());
    // The guest is asked for it.
    let event = [0x4a, 1, 0, 0, 1 << 4, 0, 0, 0, 8, 0];
    assert_eq!(rig.get(CD, &event, 8)[4..6], [1, 2]);
    rig.good(CD, &[0x1e, 0, 0, 0, 0, 0], &[]);
    rig.good(CD, &start_stop(2), &[]);
    assert_eq!(*lock(&rig.cd.ear.trays), [true]);
    assert_eq!(rig.refused(CD, &[0; 6], &[], 0), (2, 0x3a, 2));
    assert!(rig.cd.unit.ask_for_medium());
    // Another one.
    lock(&rig.cd.storage.state).data.truncate(2048 * 5);
    rig.cd.unit.medium_changed(true);
    assert_eq!(*lock(&rig.cd.ear.trays), [true, false]);
    assert_eq!(rig.get(CD, &event, 8)[4..6], [2, 2]);
    assert_eq!(rig.refused(CD, &[0; 6], &[], 0), (6, 0x28, 0));
    rig.good(CD, &[0; 6], &[]);
    assert_eq!(rig.get(CD, &[0x25], 8)[..4], [0, 0, 0, 4]);
    // None.
    rig.cd.unit.medium_changed(false);
    assert_eq!(rig.refused(CD, &[0; 6], &[], 0), (2, 0x3a, 1));
    // Whoever asks afterwards is told, too.
    let sense = rig.get(CD, &[0x03, 0, 0, 0, 18, 0], 18);
    assert_eq!((sense[2], sense[12]), (2, 0x3a));
}

/// What was saved with a medium, and is loaded with none.
#[test]
fn another_medium_than_was_saved_is_told() {
    let mut rig = Rig::new().ready();
    rig.good(CD, &[0x1e, 0, 0, 0, 1, 0], &[]);
    rig.scsi.pause();
    let saved = rig.scsi.save().unwrap();
    let mut next = Scsi::new(ScsiOptions::default()).unwrap();
    let empty = UnitOptions {
        medium: false,
        ..cdrom_options()
    };
    let cd = drive(empty);
    for (address, unit) in [
        (DISK, &rig.disk.unit),
        (OTHER, &rig.other.unit),
        (CD, &cd.unit),
    ] {
        next.handle().plug(address, unit).unwrap();
    }
    next.load(&saved, None).unwrap();
    assert_eq!(cd.unit.tray(), (false, false));
    assert!(cd.unit.ask_for_medium());
}
