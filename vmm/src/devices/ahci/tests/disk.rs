//! A disk's commands.

use super::*;

#[test]
fn a_disk_says_what_it_is() {
    let rig = Rig::running();
    let (status, error, data) = rig.carry_out(0, &ata(0xec, 0, 0, 0), &[], 512);
    assert_eq!((status, error), (0x50, 0));
    let word = |at: usize| u16::from_le_bytes([data[2 * at], data[2 * at + 1]]);
    let text = |from: usize, to: usize| -> String {
        let bytes = data[2 * from..2 * to].chunks(2);
        bytes
            .flat_map(|pair| [pair[1] as char, pair[0] as char])
            .collect()
    };
    assert_eq!(text(27, 47).trim(), "VIREO HARDDISK");
    assert_eq!(text(10, 20).trim(), "SN-1");
    assert_eq!((word(60), word(100), word(75)), (2048, 2048, 31));
    assert_eq!(data.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
    // By PIO Setup, with both statuses, and no other frame (ACS-3 PIO data-in).
    assert_eq!(rig.get(0, IS), 1 << 1);
    let frame = rig.frame(0, 0x20, 20);
    assert_eq!(
        (frame[0], frame[1], frame[2], frame[15]),
        (0x5f, 0x60, 0x58, 0x50)
    );
    assert_eq!(rig.count(0, 0), 512);
    // Another size is seen when it is asked again.
    rig.drives[0].set_capacity(2 << 20);
    let (_, _, data) = rig.carry_out(0, &ata(0xec, 0, 0, 0), &[], 512);
    assert_eq!(data[200..202], [0, 16]);
}

#[test]
fn sectors_come_and_go_every_way() {
    let rig = Rig::running();
    let content = rig.disk.data();
    // DMA and PIO, with addresses of 28 and 48 bits.
    for command in [0xc8, 0x25, 0x20, 0x24, 0xc4, 0x29] {
        let (status, _, data) = rig.carry_out(0, &ata(command, 5, 4, 0), &[], 2048);
        assert_eq!(status, 0x50, "{command:#x}");
        assert!(data == content[5 * 512..][..2048], "{command:#x}");
    }
    for (at, command) in (10u64..).zip([0xca, 0x35, 0x30, 0x34, 0xc5, 0x39]) {
        rig.ram.write(DATA, &[command; 512]);
        let (status, _, _) = rig.carry_out(0, &ata(command, at, 1, 0), &[], 512);
        assert_eq!(status, 0x50, "{command:#x}");
        assert_eq!(rig.disk.data()[at as usize * 512..][..512], [command; 512]);
    }
    // Into pieces of odd lengths, whatever they are.
    let regions = [(DATA + 3, 5), (DATA + 0x1001, 1), (DATA + 0x2000, 700)];
    rig.put(0, 0, &ata(0x25, 1, 1, 0), &[], &regions);
    rig.set(0, CI, 1);
    rig.wait("a read", || rig.get(0, CI) == 0);
    let got = [(3, 5), (0x1001, 1), (0x2000, 506)].map(|(at, len)| rig.ram.read(DATA + at, len));
    assert!(got.concat() == content[512..1024]);
    assert_eq!(rig.count(0, 0), 512);
    // A cylinder, a head and a sector: 0, 1, 1 is sector 63.
    let mut frame = ata(0xc8, 1, 1, 0);
    frame[7] = 1;
    let (_, _, data) = rig.carry_out(0, &frame, &[], 512);
    assert!(data == content[63 * 512..][..512]);
    rig.ahci.pause();
    assert!(!rig.ram.has_unreported());
}

#[test]
fn queued_commands_run_side_by_side() {
    let rig = Rig::running();
    let content = rig.disk.data();
    rig.disk.hold();
    for tag in 0..32 {
        let at = DATA + 0x1000 * u64::from(tag);
        let command = queued(0x60, 3 * u64::from(tag), 3, tag);
        rig.put(0, tag, &command, &[], &[(at, 1536)]);
    }
    rig.set(0, SACT, u32::MAX);
    rig.set(0, CI, u32::MAX);
    // All are taken, none is done.
    rig.wait("all to be begun", || rig.disk.held() == 32);
    assert_eq!((rig.get(0, CI), rig.get(0, SACT)), (0, u32::MAX));
    assert_eq!(rig.get(0, IS), 0);
    rig.disk.let_go();
    rig.wait("all to be done", || rig.get(0, SACT) == 0);
    assert_eq!(rig.get(0, IS), 1 << 3, "by Set Device Bits");
    assert_eq!(rig.frame(0, 0x58, 3), [0xa1, 0x40, 0x50]);
    for tag in 0..32usize {
        let got = rig.ram.read(DATA + 0x1000 * tag as u64, 1536);
        assert!(got == content[tag * 1536..][..1536], "{tag}");
    }
    // A queued write that is to be on the disk.
    rig.disk.log();
    let mut command = queued(0x61, 7, 1, 4);
    command[7] |= 1 << 7;
    rig.put(0, 4, &command, &[], &[(DATA, 512)]);
    rig.set(0, SACT, 1 << 4);
    rig.set(0, CI, 1 << 4);
    rig.wait("a write", || rig.get(0, SACT) == 0);
    assert_eq!(rig.disk.log(), [Op::Write, Op::Flush]);
    rig.ahci.pause();
    assert!(!rig.ram.has_unreported());
}

#[test]
fn an_error_stops_the_port_until_the_guest_has_seen_it() {
    let rig = Rig::running();
    // Beyond the end.
    rig.put(0, 0, &ata(0x25, 2047, 2, 0), &[], &[(DATA, 1024)]);
    rig.put(0, 1, &ata(0x25, 0, 1, 0), &[], &[(DATA, 512)]);
    rig.set(0, CI, 0b01);
    rig.wait("an error", || rig.get(0, IS) & TFES != 0);
    rig.set(0, CI, 0b10);
    assert_eq!(rig.get(0, TFD), 0x1051, "IDNF");
    assert_eq!(
        rig.get(0, CI),
        0b11,
        "the slot is not done, and nothing else begins"
    );
    assert_eq!(rig.get(0, CMD) >> 8 & 0x1f, 0, "which one it was");
    rig.stop(0);
    assert_eq!(rig.get(0, CI), 0);
    rig.start(0);
    assert_eq!(rig.carry_out(0, &ata(0x25, 0, 1, 0), &[], 512).0, 0x50);
    // Regions for less than there is data.
    let (status, error, _) = rig.carry_out(0, &ata(0x25, 0, 2, 0), &[], 512);
    assert_eq!((status, error), (0x51, 4));
    // The host's error; unknown commands.
    rig.disk.fail(Some(libc::EIO));
    assert_eq!(rig.carry_out(0, &ata(0x25, 0, 1, 0), &[], 512).1, 0x40);
    assert_eq!(lock(&rig.ears.failures).len(), 1);
    rig.disk.fail(None);
    for command in [0x00, 0xa0, 0xa1, 0xf4, 0xff] {
        assert_eq!(
            rig.carry_out(0, &ata(command, 0, 0, 0), &[], 0).1,
            4,
            "{command:#x}"
        );
    }
    // Memory that isn't there.
    rig.put(0, 0, &ata(0x25, 0, 1, 0), &[], &[(1 << 30, 512)]);
    rig.set(0, CI, 1);
    rig.wait("a bus error", || rig.get(0, IS) & 1 << 29 != 0);
    rig.stop(0);
}

#[test]
fn pieces_of_memory_are_as_many_as_anybody_needs() {
    let rig = Rig::running();
    let content = rig.disk.data();
    // 32 sectors, two bytes at a time; then one at a time.
    for (len, works) in [(2, true), (1, false)] {
        let count = 32 * 512 / len;
        rig.put(0, 0, &ata(0x25, 0, 32, 0), &[], &[]);
        let table = 2 << 20;
        let header = [5 | count << 16, 0, table, 0]
            .map(u32::to_le_bytes)
            .concat();
        rig.ram.write(Rig::list(0), &header);
        rig.ram.write(table.into(), &ata(0x25, 0, 32, 0));
        let regions: Vec<u8> = (0..count)
            .flat_map(|n| [DATA as u32 + n * len, 0, 0, len - 1])
            .flat_map(u32::to_le_bytes)
            .collect();
        rig.ram.write(u64::from(table) + 0x80, &regions);
        rig.start(0);
        rig.set(0, IS, u32::MAX);
        rig.set(0, CI, 1);
        rig.wait("the command", || rig.get(0, IS) != 0);
        assert_eq!(rig.get(0, IS), if works { 1 } else { 1 << 29 });
        assert!(rig.ram.read(DATA, 32 * 512) == content[..32 * 512]);
        rig.stop(0);
    }
}

#[test]
fn a_queued_command_that_fails_is_in_the_log() {
    let rig = Rig::running();
    let put = |tag: u32, lba| {
        rig.put(
            0,
            tag,
            &queued(0x60, lba, 1, tag),
            &[],
            &[(DATA + 0x1000 * u64::from(tag), 512)],
        );
    };
    put(3, 0);
    put(9, 5000);
    rig.disk.hold();
    for tag in [3, 9] {
        rig.set(0, SACT, 1 << tag);
        rig.set(0, CI, 1 << tag);
    }
    rig.wait("an error", || rig.get(0, IS) & TFES != 0);
    // The other one is given up with it, and is not told of any more.
    rig.disk.let_go();
    rig.set(0, CMD, FRE);
    rig.wait("the port's end", || rig.get(0, CMD) & CR == 0);
    rig.set(0, CMD, FRE | ST);
    let (status, _, log) = rig.carry_out(0, &ata(0x2f, 0x10, 1, 0), &[], 512);
    assert_eq!(status, 0x50);
    assert_eq!(log[..5], [9, 0, 0x51, 0x10, 0x88]);
    assert_eq!(log.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    let (_, _, log) = rig.carry_out(0, &ata(0x2f, 0x10, 1, 0), &[], 512);
    assert_eq!(log[0], 0x80, "once");
}

#[test]
fn caches_are_flushed_and_ranges_trimmed() {
    let rig = Rig::running();
    rig.disk.log();
    for command in [0xe7, 0xea] {
        assert_eq!(rig.carry_out(0, &ata(command, 0, 0, 0), &[], 0).0, 0x50);
    }
    assert_eq!(rig.disk.log(), [Op::Flush, Op::Flush]);
    // Without the write cache.
    assert_eq!(rig.carry_out(0, &ata(0xef, 0, 0, 0x82), &[], 0).0, 0x50);
    assert!(rig.disk.writethrough.load(Ordering::Relaxed));
    assert_eq!(rig.disk.log(), [Op::Flush]);
    let cached = |rig: &Rig| {
        let page = rig.carry_out(0, &ata(0xec, 0, 0, 0), &[], 512).2;
        page[170] & 1 << 5 != 0
    };
    assert!(!cached(&rig));
    assert_eq!(rig.carry_out(0, &ata(0xef, 0, 0, 0x02), &[], 0).0, 0x50);
    assert!(cached(&rig));
    // Two ranges, and entries that say nothing.
    let mut list = vec![0; 512];
    for (at, (first, count)) in [(10u64, 2u64), (100, 1)].into_iter().enumerate() {
        list[8 * at..8 * at + 8].copy_from_slice(&(first | count << 48).to_le_bytes());
    }
    rig.ram.write(DATA, &list);
    let before = rig.disk.data();
    assert_eq!(rig.carry_out(0, &ata(0x06, 0, 1, 1), &[], 512).0, 0x50);
    let mut expected = before.clone();
    expected[5120..6144].fill(0);
    expected[51200..51712].fill(0);
    assert!(rig.disk.data() == expected);
    // One beyond the end: none of it.
    list[..8].copy_from_slice(&(2047u64 | 2 << 48).to_le_bytes());
    rig.ram.write(DATA, &list);
    assert_eq!(rig.carry_out(0, &ata(0x06, 0, 1, 1), &[], 512).1, 0x10);
    assert!(rig.disk.data() == expected);
}

#[test]
fn small_things_are_as_drives_have_them() {
    let rig = Rig::running();
    // CHECK POWER MODE: awake. READ NATIVE MAX ADDRESS EXT: the last sector.
    rig.carry_out(0, &ata(0xe5, 0, 0, 0), &[], 0);
    assert_eq!(rig.frame(0, 0x40, 20)[12], 0xff);
    rig.carry_out(0, &ata(0x27, 0, 0, 0), &[], 0);
    assert_eq!(rig.frame(0, 0x40, 20)[4..7], [0xff, 0x07, 0]);
    // SMART: well; its data have a checksum; off is off.
    let smart = |feature, len| rig.carry_out(0, &ata(0xb0, 0xc2_4f00, 1, feature), &[], len);
    assert_eq!(smart(0xda, 0).0, 0x50);
    assert_eq!(rig.frame(0, 0x40, 20)[5..7], [0x4f, 0xc2]);
    for feature in [0xd0, 0xd1] {
        let (status, _, page) = smart(feature, 512);
        assert_eq!(status, 0x50);
        assert_eq!(
            page.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        assert_eq!(page[2], 5, "reallocated sectors");
    }
    assert_eq!(smart(0xd9, 0).0, 0x50);
    assert_eq!(smart(0xda, 0).1, 4);
    assert_eq!(smart(0xd8, 0).0, 0x50);
    // SET MULTIPLE MODE, transfer modes.
    for (count, status) in [(8, 0x50), (3, 0x51), (32, 0x51), (0, 0x50)] {
        assert_eq!(rig.carry_out(0, &ata(0xc6, 0, count, 0), &[], 0).0, status);
    }
    assert_eq!(
        rig.carry_out(0, &ata(0xc4, 0, 1, 0), &[], 512).1,
        4,
        "no multiple"
    );
    assert_eq!(rig.carry_out(0, &ata(0xef, 0, 0x22, 3), &[], 0).0, 0x50);
    let page = rig.carry_out(0, &ata(0xec, 0, 0, 0), &[], 512).2;
    assert_eq!((page[127], page[177]), (4, 0), "multiword 2");
}
