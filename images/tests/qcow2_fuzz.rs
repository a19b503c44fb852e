//! Images with damaged metadata: errors, never a panic, a hang or a heap of memory.
#![allow(missing_docs, reason = "a test")]

mod common;

use std::time::{Duration, Instant};

use common::*;
use images::qcow2::{self, Fix, Header};
use images::{File, Image};

fn seeds(scratch: &Scratch) -> Vec<Vec<u8>> {
    let image = scratch.path("seed");
    let all = [
        "cluster_size=512",
        "cluster_size=4096,refcount_bits=1",
        "cluster_size=16384,extended_l2=on,refcount_bits=64",
        "cluster_size=4096,compression_type=zstd,lazy_refcounts=on",
        "cluster_size=1024,compat=0.10",
    ];
    all.iter()
        .map(|options| {
            let _ = std::fs::remove_file(&image);
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                options,
                text(&image),
                "512k",
            ]);
            run(
                "qemu-io",
                &[
                    "-f",
                    "qcow2",
                    "-c",
                    "write -c -P 3 128k 16k",
                    "-c",
                    "write -P 1 0 50k",
                    text(&image),
                ],
            );
            if !options.contains("refcount_bits=1") {
                qemu_img(&["snapshot", "-c", "one", text(&image)]);
                run(
                    "qemu-io",
                    &["-f", "qcow2", "-c", "write -P 2 10k 20k", text(&image)],
                );
            }
            if !options.contains("0.10") {
                qemu_img(&["bitmap", "--add", text(&image), "some"]);
            }
            std::fs::read(&image).unwrap()
        })
        .collect()
}

/// Places worth changing: the header, and wherever there are tables.
fn places(data: &[u8]) -> Vec<usize> {
    let header = data.len().min(256);
    let mut places: Vec<usize> = (0..header).collect();
    // Words that look like offsets.
    for at in (0..data.len().saturating_sub(8)).step_by(8) {
        let word = u64::from_be_bytes(data[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
        if word != 0 && word < data.len() as u64 * 2 {
            places.extend(at..at + 8);
        }
    }
    places
}

fn mutate(random: &mut Random, data: &mut Vec<u8>, places: &[usize]) {
    for _ in 0..1 + random.below(6) {
        let at = places[random.below(places.len() as u64) as usize];
        match random.below(5) {
            0 => data[at] ^= 1 << random.below(8),
            1 => data[at] = random.next() as u8,
            2 => data[at] = random.pick(&[0, 0xff, 0x7f, 0x80, 1]),
            3 => {
                let at = at & !7;
                let word =
                    (random.below(data.len() as u64 / 512 + 4) * 512) | (random.below(2) << 63);
                if at + 8 <= data.len() {
                    data[at..at + 8].copy_from_slice(&word.to_be_bytes());
                }
            }
            _ => {
                if random.one_in(20) {
                    let len = random.below(data.len() as u64) as usize;
                    data.truncate(len.max(512));
                    return;
                }
                let from = places[random.below(places.len() as u64) as usize];
                data[at] = data[from];
            }
        }
    }
}

#[test]
fn damaged_images_are_errors_and_nothing_worse() {
    if !have("the fuzzing of images", "qemu-img") {
        return;
    }
    let first = seed();
    println!("VIREO_SEED={first}");
    let scratch = Scratch::new();
    let seeds = seeds(&scratch);
    let places: Vec<_> = seeds.iter().map(|data| places(data)).collect();
    let path = scratch.path("image");
    let (mut opened, mut refused) = (0, 0);
    for seed in first..first + rounds(1500, 300_000) {
        let mut random = Random::new(seed);
        let which = random.below(seeds.len() as u64) as usize;
        let mut data = seeds[which].clone();
        mutate(&mut random, &mut data, &places[which]);
        std::fs::write(&path, &data).unwrap();
        let start = Instant::now();
        for writable in [false, true] {
            let file = File::open(&path, writable).unwrap();
            match qcow2::Qcow2::open(file, qcow2::Options::default()) {
                Err(_) => refused += 1,
                Ok(image) => {
                    opened += 1;
                    drive(&mut random, &image, writable);
                }
            }
        }
        for fix in [Fix::None, Fix::All] {
            let _ = qcow2::check(&File::open(&path, true).unwrap(), fix);
        }
        let _ = Header::read(&File::open(&path, false).unwrap());
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "seed {seed} took {:?}",
            start.elapsed()
        );
        let size = std::fs::metadata(&path).unwrap().len();
        assert!(
            size < 1 << 40,
            "seed {seed} made the file {size} bytes long"
        );
    }
    println!("{opened} opened, {refused} refused");
    assert!(
        opened > refused / 100,
        "hardly anything is fuzzed past the header"
    );
}

fn drive(random: &mut Random, image: &qcow2::Qcow2, writable: bool) {
    let size = image.size().min(1 << 20);
    let _ = read(image, 0, size as usize);
    let _ = image.extent(0, size.max(1));
    if !writable || size < 512 {
        return;
    }
    for _ in 0..8 {
        let offset = random.below(size / 512) * 512;
        let len = (random.below(40_000) + 1).min(size - offset);
        let _ = match random.below(5) {
            0 => image.discard(offset, len),
            1 => image.write_zeroes(offset, len, true),
            2 => image.flush(),
            _ => write(image, offset, &vec![0x5a; len as usize]),
        };
    }
    if random.one_in(4) {
        let _ = image.resize(random.below(4 << 20) / 512 * 512);
    }
}
