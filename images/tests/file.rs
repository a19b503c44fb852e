//! Files below images: O_DIRECT with any alignment.
#![allow(missing_docs, reason = "a test")]

mod common;

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use common::*;
use images::{Error, File, Image, IoBuf, Qcow2, Raw, qcow2};

/// Opens with O_DIRECT; none, and said so, where the file system can't.
fn direct(test: &str, path: &Path) -> Option<File> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path);
    match file {
        Ok(file) => Some(File::new(file.into(), "disk").unwrap()),
        Err(_) => {
            println!("left out: {test} needs O_DIRECT in {}", path.display());
            None
        }
    }
}

fn any_range(random: &mut Random, size: u64) -> (u64, u64) {
    let unit = random.pick(&[1, 1, 512, 4096]);
    let offset = random.below(size) / unit * unit;
    let most = random.pick(&[1000, 100_000, 3 << 20]);
    let len = (1 + random.below(most)).next_multiple_of(unit);
    (offset, len.min(size - offset))
}

fn drive(random: &mut Random, image: &dyn Image, model: &mut [u8]) {
    for _ in 0..80 {
        let (offset, len) = any_range(random, model.len() as u64);
        let part = offset as usize..(offset + len) as usize;
        match random.below(8) {
            0..4 => {
                random.fill(&mut model[part.clone()]);
                write(image, offset, &model[part]).unwrap();
            }
            4 => {
                image.write_zeroes(offset, len, random.one_in(2)).unwrap();
                model[part].fill(0);
            }
            5 => image.flush().unwrap(),
            _ => assert!(
                read(image, offset, len as usize).unwrap() == model[part],
                "{offset} {len}"
            ),
        }
    }
    assert!(read(image, 0, model.len()).unwrap() == model);
}

#[test]
fn o_direct_takes_any_alignment() {
    let first = seed();
    for seed in first..first + rounds(4, 300) {
        println!("VIREO_SEED={seed}");
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let path = scratch.path("disk");
        // Of any length: the last block is cut short.
        let mut model = vec![0; 1 + random.below(4 << 20) as usize];
        random.fill(&mut model);
        std::fs::write(&path, &model).unwrap();
        let Some(file) = direct("unaligned O_DIRECT", &path) else {
            return;
        };
        drive(&mut random, &Raw::new(file).unwrap(), &mut model);
        assert!(
            std::fs::read(&path).unwrap() == model,
            "and nothing behind it"
        );
    }
}

#[test]
fn qcow2_works_with_o_direct_whatever_its_clusters() {
    let first = seed();
    for seed in first..first + rounds(4, 300) {
        println!("VIREO_SEED={seed}");
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let path = scratch.path("disk");
        let mut options = qcow2::Create::new(2 << 20);
        options.cluster_size = random.pick(&[512, 2048, 65536]);
        qcow2::create(File::create(&path).unwrap(), None, &options).unwrap();
        let Some(file) = direct("qcow2 with O_DIRECT", &path) else {
            return;
        };
        let mut model = vec![0; 2 << 20];
        let image = Qcow2::open(file, qcow2::Options::default()).unwrap();
        drive(&mut random, &image, &mut model);
        drop(image);
        let report = qcow2::check(&File::open(&path, false).unwrap(), qcow2::Fix::None).unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{:?}",
            report.messages
        );
        assert!(read(&open(&path, false).unwrap(), 0, model.len()).unwrap() == model);
    }
}

#[test]
fn threads_that_write_parts_of_one_block_lose_nothing() {
    let scratch = Scratch::new();
    let path = scratch.path("disk");
    std::fs::write(&path, vec![0; 8192]).unwrap();
    let Some(file) = direct("parts of blocks", &path) else {
        return;
    };
    std::thread::scope(|scope| {
        for thread in 0..8_usize {
            let file = &file;
            scope.spawn(move || {
                for round in 1..40 {
                    let mut data = vec![round; 100];
                    // SAFETY: lives until the call has returned.
                    let buf = unsafe { IoBuf::new(data.as_mut_ptr(), data.len()) };
                    file.write(thread as u64 * 100, &[buf]).unwrap();
                }
            });
        }
    });
    let data = std::fs::read(&path).unwrap();
    assert!(
        data[..800].iter().all(|&byte| byte == 39) && data[800..].iter().all(|&byte| byte == 0)
    );
}

#[test]
fn a_descriptor_of_the_wrong_kind_is_refused() {
    let folder = std::fs::File::open("/").unwrap();
    assert!(matches!(
        File::new(folder.into(), "folder"),
        Err(Error::Invalid(_))
    ));
    let scratch = Scratch::new();
    let only_writable = std::fs::File::create(scratch.path("w")).unwrap();
    assert!(matches!(
        File::new(only_writable.into(), "w"),
        Err(Error::Invalid(_))
    ));
    let readable = std::fs::File::open(scratch.path("w")).unwrap();
    let image = Raw::new(File::new(readable.into(), "w").unwrap()).unwrap();
    assert!(
        matches!(image.write_zeroes(0, 0, true), Err(Error::Io { .. })),
        "read-only is read-only"
    );
}
