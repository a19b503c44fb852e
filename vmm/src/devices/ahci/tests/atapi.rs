//! A CD-ROM drive's packets.

use super::*;

const READY: [u8; 6] = [0; 6];
const NOT_READY: (u8, u8, u8) = (2, 0x3a, 2);
const CHANGED: (u8, u8, u8) = (6, 0x28, 0);

fn start_stop(bits: u8) -> [u8; 6] {
    [0x1b, 0, 0, 0, bits, 0]
}

fn event() -> [u8; 10] {
    [0x4a, 1, 0, 0, 1 << 4, 0, 0, 0, 8, 0]
}

#[test]
fn a_cdrom_drive_says_what_it_is() {
    let rig = Rig::running();
    let (status, _, page) = rig.carry_out(1, &ata(0xa1, 0, 0, 0), &[], 512);
    assert_eq!((status, page[0], page[1]), (0x50, 0xc0, 0x85));
    // Whoever takes it for a disk sees the signature.
    let (status, error, _) = rig.carry_out(1, &ata(0xec, 0, 0, 0), &[], 512);
    assert_eq!((status & 1, error), (1, 4));
    assert_eq!(rig.frame(1, 0x40, 7)[4..], [0x01, 0x14, 0xeb]);
    let inquiry = rig.packet(&[0x12, 0, 0, 0, 36, 0], 36).unwrap();
    assert_eq!(inquiry.len(), 36);
    assert_eq!(inquiry[..2], [5, 0x80]);
    assert_eq!(inquiry[8..], *b"VIREO   DVD-ROM         1.0 ");
    assert_eq!(rig.packet(&[0x12, 0, 0, 0, 5, 0], 36).unwrap().len(), 5);
    assert_eq!(
        rig.packet(&[0x12, 1, 0x80, 0, 36, 0], 36),
        Err((5, 0x24, 0))
    );
    assert_eq!(rig.packet(&[0xf0], 36), Err((5, 0x20, 0)));
}

#[test]
fn blocks_are_read() {
    let rig = Rig::running();
    let content = rig.cd.data();
    assert_eq!(rig.packet(&[0x25], 8).unwrap(), [0, 0, 1, 0xff, 0, 0, 8, 0]);
    let ways = [
        vec![0x28, 0, 0, 0, 0, 7, 0, 0, 2, 0],
        vec![0xa8, 0, 0, 0, 0, 7, 0, 0, 0, 2, 0, 0],
        vec![0xbe, 0, 0, 0, 0, 7, 0, 0, 2, 0x10, 0, 0],
    ];
    for way in &ways {
        let got = rig.packet(way, 4096).unwrap();
        assert!(got == content[7 * 2048..][..4096], "{way:x?}");
    }
    assert_eq!(
        rig.packet(&[0x28, 0, 0, 0, 2, 0, 0, 0, 1, 0], 2048),
        Err((5, 0x21, 0))
    );
    assert_eq!(
        rig.packet(&[0x28, 0, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0], 2048),
        Err((5, 0x21, 0))
    );
    assert_eq!(
        rig.packet(&[0xbe, 0, 0, 0, 0, 7, 0, 0, 2, 0xf8, 0, 0], 4704),
        Err((5, 0x24, 0))
    );
    rig.cd.fail(Some(libc::EIO));
    assert_eq!(
        rig.packet(&[0x28, 0, 0, 0, 0, 7, 0, 0, 2, 0], 4096),
        Err((3, 0x11, 0))
    );
    assert_eq!(lock(&rig.ears.failures).len(), 1);
}

#[test]
fn a_disc_is_described() {
    let rig = Rig::running();
    let toc = rig
        .packet(&[0x43, 0, 0, 0, 0, 0, 0, 0, 100, 0], 100)
        .unwrap();
    assert_eq!(toc[..12], [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0]);
    assert_eq!(toc[12..], [0, 0x14, 0xaa, 0, 0, 0, 2, 0]);
    let msf = rig
        .packet(&[0x43, 2, 0, 0, 0, 0, 0xaa, 0, 100, 0], 100)
        .unwrap();
    // 512 blocks and two seconds.
    assert_eq!(msf, [0, 10, 1, 1, 0, 0x14, 0xaa, 0, 0, 0, 8, 62]);
    assert_eq!(
        rig.packet(&[0x43, 0, 0, 0, 0, 0, 9, 0, 100, 0], 100),
        Err((5, 0x24, 0))
    );
    let sessions = rig.packet(&[0x43, 0, 1, 0, 0, 0, 0, 0, 12, 0], 12).unwrap();
    assert_eq!(sessions, [0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0]);
    assert_eq!(
        rig.packet(&[0x43, 2, 2, 0, 0, 0, 0, 0, 100, 0], 100)
            .unwrap()
            .len(),
        48
    );
    let configuration = rig
        .packet(&[0x46, 0, 0, 0, 0, 0, 0, 0, 255, 0], 255)
        .unwrap();
    assert_eq!(configuration[7], 8, "a CD-ROM");
    let len = u32::from_be_bytes(configuration[..4].try_into().unwrap());
    assert_eq!(len as usize + 4, configuration.len());
    assert_eq!(
        rig.packet(&[0x51, 0, 0, 0, 0, 0, 0, 0, 34, 0], 34).unwrap()[2],
        0x0e
    );
    let mode = rig
        .packet(&[0x5a, 0, 0x2a, 0, 0, 0, 0, 0, 28, 0], 28)
        .unwrap();
    assert_eq!((mode.len(), mode[8], mode[9]), (28, 0x2a, 18));
    assert_eq!(
        rig.packet(&[0x5a, 0, 0xea, 0, 0, 0, 0, 0, 28, 0], 28),
        Err((5, 0x39, 0))
    );
    // A CD has none of a DVD's structures, but the list of them can be had.
    let structure = |format| [0xad, 0, 0, 0, 0, 0, 0, format, 8, 4, 0, 0];
    assert_eq!(rig.packet(&structure(0), 2052), Err((5, 0x30, 2)));
    assert!(rig.packet(&structure(0xff), 2052).is_ok());
    rig.drives[1].set_capacity(4 << 30);
    assert_eq!(rig.packet(&structure(0), 2052).unwrap().len(), 2052);
}

#[test]
fn a_medium_changes_and_the_guest_hears_of_it() {
    let rig = Rig::running();
    let drive = &rig.drives[1];
    let trays = || std::mem::take(&mut *lock(&rig.ears.trays));
    assert!(rig.packet(&READY, 0).is_ok());
    assert_eq!(
        rig.packet(&event(), 8).unwrap(),
        [0, 6, 4, 0x10, 0, 2, 0, 0]
    );
    // From outside.
    drive.medium_changed(true);
    assert_eq!(trays(), [true, false]);
    assert_eq!(rig.packet(&event(), 8).unwrap()[4..6], [2, 2], "new media");
    assert_eq!(rig.packet(&event(), 8).unwrap()[4..6], [0, 2], "once");
    assert_eq!(rig.packet(&READY, 0), Err(CHANGED));
    assert!(rig.packet(&READY, 0).is_ok());
    drive.medium_changed(false);
    assert_eq!(rig.packet(&READY, 0), Err((2, 0x3a, 1)));
    assert_eq!(rig.packet(&event(), 8).unwrap()[4..6], [3, 0]);
    assert_eq!(
        rig.packet(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 2048),
        Err((2, 0x3a, 1))
    );
    drive.medium_changed(true);
    assert_eq!(rig.packet(&READY, 0), Err(CHANGED));
    trays();

    // Locked: the guest is asked.
    rig.packet(&[0x1e, 0, 0, 0, 1, 0], 0).unwrap();
    assert_eq!(drive.tray(), (false, true));
    assert!(!drive.ask_for_medium());
    rig.packet(&event(), 8)
        .map(|event| assert_eq!(event[4..6], [1, 2]))
        .unwrap();
    assert_eq!(rig.packet(&start_stop(2), 0), Err((5, 0x53, 2)));
    rig.packet(&[0x1e, 0, 0, 0, 0, 0], 0).unwrap();
    rig.packet(&start_stop(2), 0).unwrap();
    assert_eq!((trays(), drive.tray()), (vec![true], (true, false)));
    assert!(drive.ask_for_medium());
    assert_eq!(rig.packet(&READY, 0), Err(NOT_READY));
    assert_eq!(rig.packet(&event(), 8).unwrap()[5], 1, "open");
    assert_eq!(
        rig.packet(&[0xbd, 0, 0, 0, 0, 0, 0, 0, 0, 8], 8).unwrap()[1],
        0x10
    );
    rig.packet(&start_stop(3), 0).unwrap();
    assert_eq!(trays(), [false]);
    assert!(rig.packet(&READY, 0).is_ok());
    // A change while the tray is out closes it.
    rig.packet(&start_stop(2), 0).unwrap();
    drive.medium_changed(true);
    assert_eq!(trays(), [true, false]);
    // A reset has it come in, unlocked.
    assert_eq!(rig.packet(&READY, 0), Err(CHANGED));
    rig.packet(&start_stop(2), 0).unwrap();
    rig.ahci.reset();
    assert_eq!((trays(), drive.tray()), (vec![true, false], (false, false)));
}

#[test]
fn what_was_saved_with_another_medium_tells_of_it() {
    let rig = Rig::running();
    rig.packet(&[0x1e, 0, 0, 0, 1, 0], 0).unwrap();
    rig.ahci.pause();
    let saved = rig.ahci.save().unwrap();
    let same = Rig::new();
    same.ram.write(0, &rig.ram.read(0, RAM as u64));
    same.ahci.load(&saved).unwrap();
    same.ahci.resume();
    assert_eq!(same.drives[1].tray(), (false, true));
    assert!(same.packet(&READY, 0).is_ok());
    let without = Rig::new();
    without.drives[1].medium_changed(false);
    without.ram.write(0, &rig.ram.read(0, RAM as u64));
    without.ahci.load(&saved).unwrap();
    without.ahci.resume();
    assert_eq!(without.packet(&READY, 0), Err((2, 0x3a, 1)));
}
