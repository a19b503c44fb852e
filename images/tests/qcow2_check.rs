//! Checking and repairing damaged qcow2 images, beside qemu-img.
#![allow(missing_docs, reason = "a test")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use common::*;
use images::qcow2::{self, Fix, Header};
use images::{Error, File, Image};

/// What `qemu-img check` counts: corruptions and leaks.
fn qemu_counts(path: &Path) -> (u64, u64) {
    let out = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output=json", text(path)])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let number = |name: &str| {
        let rest = said.split(&format!("\"{name}\": ")).nth(1);
        rest.map_or(0, |rest| {
            rest.chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
                .parse()
                .unwrap()
        })
    };
    assert!(!said.is_empty(), "{out:?}");
    (number("corruptions"), number("leaks"))
}

fn damaged(random: &mut Random, scratch: &Scratch) -> std::path::PathBuf {
    let image = scratch.path("image");
    let cluster = random.pick(&[512, 4096, 65536]);
    let bits = random.pick(&[1, 8, 16, 64]);
    let options = format!("cluster_size={cluster},refcount_bits={bits}");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &options,
        text(&image),
        "4M",
    ]);
    run(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 1 0 300k",
            "-c",
            "write -P 2 2M 64k",
            "-c",
            "write -c -P 3 3M 64k",
            text(&image),
        ],
    );
    let file = File::open(&image, false).unwrap();
    let header = Header::read(&file).unwrap();
    let raw = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let word = |at: u64| {
        let mut word = [0; 8];
        raw.read_exact_at(&mut word, at).unwrap();
        u64::from_be_bytes(word)
    };
    let block = word(header.refcount_offset);
    for _ in 0..1 + random.below(4) {
        match random.below(3) {
            // A refcount byte.
            0 => raw
                .write_all_at(&[random.next() as u8], block + random.below(16))
                .unwrap(),
            // A mapping dropped: leaks.
            1 => {
                let table = word(header.l1_offset) & 0x00ff_ffff_ffff_fe00;
                if table != 0 {
                    raw.write_all_at(&[0; 8], table + random.below(4) * 8)
                        .unwrap();
                }
            }
            // A COPIED flag.
            _ => {
                let table = word(header.l1_offset) & 0x00ff_ffff_ffff_fe00;
                if table != 0 {
                    let at = table + random.below(4) * 8;
                    raw.write_all_at(&(word(at) ^ 1 << 63).to_be_bytes(), at)
                        .unwrap();
                }
            }
        }
    }
    image
}

#[test]
fn damage_is_counted_as_qemu_does_and_repaired() {
    if !have("the check of images", "qemu-img") {
        return;
    }
    let first = seed();
    for seed in first..first + rounds(12, 500) {
        println!("VIREO_SEED={seed}");
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let image = damaged(&mut random, &scratch);
        let theirs = qemu_counts(&image);
        let report = qcow2::check(&File::open(&image, true).unwrap(), Fix::None).unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            theirs,
            "{:?}",
            report.messages
        );
        let report = qcow2::check(&File::open(&image, true).unwrap(), Fix::All).unwrap();
        if report.corruptions == 0 {
            check_clean(&image);
            let again = qcow2::check(&File::open(&image, true).unwrap(), Fix::None).unwrap();
            assert_eq!(
                (again.corruptions, again.leaks),
                (0, 0),
                "{:?}",
                again.messages
            );
        }
    }
}

#[test]
fn refcounts_that_are_gone_are_made_anew_when_a_dirty_image_is_opened() {
    if !have("the repair of a dirty image", "qemu-img") {
        return;
    }
    for (cluster, bits) in [(512, 64), (4096, 16), (65536, 1)] {
        let scratch = Scratch::new();
        let image = scratch.path("image");
        let options = format!("cluster_size={cluster},refcount_bits={bits},lazy_refcounts=on");
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            text(&image),
            "2M",
        ]);
        // Killed before it could write its refcounts.
        let kill = "sigraise 9";
        let _ = Command::new("qemu-io")
            .args([
                "-f",
                "qcow2",
                "-c",
                "write -P 7 0 1M",
                "-c",
                "flush",
                "-c",
                kill,
                text(&image),
            ])
            .output()
            .unwrap();
        let header = Header::read(&File::open(&image, false).unwrap()).unwrap();
        assert_eq!(header.incompatible & 1, 1, "the image is dirty");
        let raw = std::fs::OpenOptions::new()
            .write(true)
            .open(&image)
            .unwrap();
        raw.write_all_at(&[0; 16], header.refcount_offset).unwrap();
        // Reading needs no repair.
        let it = open(&image, false).unwrap();
        assert!(read(&it, 0, 1 << 20).unwrap().iter().all(|&byte| byte == 7));
        drop(it);
        let it = open(&image, true).unwrap();
        assert!(read(&it, 0, 1 << 20).unwrap().iter().all(|&byte| byte == 7));
        write(&it, 1 << 20, &[9; 70000]).unwrap();
        drop(it);
        check_clean(&image);
        let all = content(&image, "qcow2", None, &scratch);
        assert!(
            all[..1 << 20].iter().all(|&byte| byte == 7)
                && all[1 << 20..(1 << 20) + 70000].iter().all(|&b| b == 9)
        );
    }
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    if !have("unknown features", "qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.path("image");
    let refused = |at: u64, bytes: &[u8]| {
        let _ = std::fs::remove_file(&image);
        qemu_img(&["create", "-q", "-f", "qcow2", text(&image), "1M"]);
        let raw = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&image)
            .unwrap();
        raw.write_all_at(bytes, at).unwrap();
        // The name of incompatible bit 5, where the table has that of bit 4.
        let mut header = vec![0; 4096];
        raw.read_exact_at(&mut header, 0).unwrap();
        if let Some(place) = header.windows(8).position(|window| window == b"extended") {
            raw.write_all_at(b"\x05frobnicate\0", place as u64 - 1)
                .unwrap();
        }
        open(&image, true).map(|_| ()).unwrap_err().to_string()
    };
    let said = refused(79, &[1 << 5]);
    assert!(said.contains("\"frobnicate\""), "{said}");
    assert!(refused(72, &[0x80]).contains("bit 63"));
    assert!(refused(35, &[1]).contains("AES"));
    assert!(refused(4, &[0, 0, 0, 4]).contains("version 4"));
    assert!(refused(20, &[0, 0, 0, 40]).contains("2^40"));
    assert!(refused(79, &[2]).contains("marked"));
    assert!(open(&image, false).is_ok(), "a corrupt image can be read");
}

#[test]
fn guest_writes_never_reach_metadata() {
    if !have("the overlap check", "qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.path("image");
    let header_of = || Header::read(&File::open(&image, false).unwrap()).unwrap();
    for target in ["l1", "l2", "refcount table"] {
        let _ = std::fs::remove_file(&image);
        qemu_img(&["create", "-q", "-f", "qcow2", text(&image), "1M"]);
        run(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 1 0 128k", text(&image)],
        );
        let header = header_of();
        let raw = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&image)
            .unwrap();
        let mut word = [0; 8];
        raw.read_exact_at(&mut word, header.l1_offset).unwrap();
        let table = u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00;
        let at = match target {
            "l1" => header.l1_offset,
            "l2" => table,
            _ => header.refcount_offset,
        };
        raw.write_all_at(&(at | 1 << 63).to_be_bytes(), table)
            .unwrap();
        let before = std::fs::read(&image).unwrap();
        let it = open(&image, true).unwrap();
        let error = write(&it, 0, &[0xee; 4096]);
        assert!(
            matches!(error, Err(Error::Corrupt { .. })),
            "{target}: {error:?}"
        );
        assert!(it.flush().is_err(), "and nothing more is written");
        drop(it);
        let after = std::fs::read(&image).unwrap();
        let at = at as usize;
        assert_eq!(before[at..at + 4096], after[at..at + 4096], "{target}");
        assert_eq!(
            header_of().incompatible & 2,
            2,
            "{target}: it is marked as corrupt"
        );
    }
}

#[test]
fn bitmaps_are_kept_up_to_date_and_say_so_when_they_are_not() {
    if !have("bitmaps", "qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.path("image");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&image), "1M"]);
    qemu_img(&["bitmap", "--add", text(&image), "tracks"]);
    qemu_img(&["bitmap", "--add", "--disable", text(&image), "rests"]);
    let flags = || {
        let said = qemu_img(&["info", "--output=json", text(&image)]);
        let said: String = said.split_whitespace().collect();
        let of = |name: &str| {
            let entry = said
                .split("\"flags\":[")
                .find(|part| part.contains(&format!("\"name\":\"{name}\"")));
            entry.unwrap().split(']').next().unwrap().to_owned()
        };
        (of("tracks"), of("rests"))
    };
    let before = flags();
    // Opened and read, even for writing: nothing has changed.
    let it = open(&image, true).unwrap();
    read(&it, 0, 1 << 20).unwrap();
    drop(it);
    assert_eq!(flags(), before);
    let it = open(&image, true).unwrap();
    write(&it, 70_000, &[1; 512]).unwrap();
    it.flush().unwrap();
    // Who is killed now leaves it like this.
    let killed = scratch.path("killed");
    std::fs::copy(&image, &killed).unwrap();
    let said = qemu_img(&["info", "-U", "--output=json", text(&killed)]);
    assert!(said.contains("in-use"), "{said}");
    it.resize(1 << 20 | 1 << 16).unwrap();
    drop(it);
    let after = flags();
    assert_eq!(after.0, before.0, "what was stored is right again");
    check_clean(&image);
    let it = open(&image, false).unwrap();
    let (bits, granularity) = it.bitmap_bits("tracks").unwrap();
    assert_eq!((bits.runs(), granularity), (vec![(1, 2)], 65536));
    assert_eq!(it.bitmap_bits("rests").unwrap().0.count(), 0);
    drop(it);
    // QEMU reads the same: it merges what is set into a new one, which then has it.
    qemu_img(&["bitmap", "--add", "--merge", "tracks", text(&image), "copy"]);
    let it = open(&image, false).unwrap();
    assert_eq!(it.bitmap_bits("copy").unwrap().0.runs(), [(1, 2)]);
    let it = open(&killed, true).unwrap();
    assert!(
        it.bitmap_bits("tracks").is_err(),
        "it may have missed a write"
    );
    drop(it);
    assert_eq!(after.1, before.1, "what tracks nothing is still right");
    check_clean(&image);
}

#[test]
fn lazy_refcounts_are_left_for_later_and_counted_anew_after_a_crash() {
    if !have("lazy refcounts", "qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.path("image");
    let mut options = qcow2::Create::new(8 << 20);
    options.lazy_refcounts = true;
    qcow2::create(File::create(&image).unwrap(), None, &options).unwrap();
    let dirty = |path| {
        qcow2::Header::read(&File::open(path, false).unwrap())
            .unwrap()
            .is_dirty()
    };
    assert!(!dirty(&image), "nothing was written yet");
    let data: Vec<u8> = (0..3 << 20).map(|n| (n / 4096) as u8 | 1).collect();
    let it = open(&image, true).unwrap();
    write(&it, 100_000, &data).unwrap();
    it.flush().unwrap();
    assert!(dirty(&image));
    // Who is killed now leaves it like this: what was flushed is there, its refcounts are not.
    let killed = scratch.path("killed");
    std::fs::copy(&image, &killed).unwrap();
    let report = qcow2::check(&File::open(&killed, false).unwrap(), qcow2::Fix::None).unwrap();
    assert!(report.corruptions >= 48, "{report:?}");
    let theirs = scratch.path("theirs");
    std::fs::copy(&killed, &theirs).unwrap();
    drop(open(&killed, true).unwrap());
    qemu_img(&["check", "-q", "-r", "all", text(&theirs)]);
    // A snapshot has to count, and goes back to leaving it for later.
    it.snapshot_create("one", (0, 0)).unwrap();
    write(&it, 0, &[7; 4096]).unwrap();
    it.snapshot_delete("one").unwrap();
    write(&it, 0, &[0; 4096]).unwrap();
    drop(it);
    for path in [&image, &killed, &theirs] {
        assert!(!dirty(path));
        check_clean(path);
        let now = read(&open(path, false).unwrap(), 100_000, data.len()).unwrap();
        assert!(now == data, "{}", path.display());
    }
}
