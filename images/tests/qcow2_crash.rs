//! A writer that is killed leaves an image without errors, and everything that it flushed.
#![allow(missing_docs, reason = "a test")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::*;
use images::{File, Image, qcow2};

const SIZE: u64 = 8 << 20;
/// Tells the child which image to write to, and with which seed.
const CHILD: &str = "VIREO_CRASH_CHILD";

/// Change number `n`: where, how long, and whether it is a write (with `n` in every word), or
/// zeroes, or a discard.
fn change(random: &mut Random) -> (u64, u64, u64) {
    let offset = random.below(SIZE / 512) * 512;
    let most = random.pick(&[512, 4096, 65536, 300_000]);
    let len = (random.below(most) / 512 * 512 + 512).min(SIZE - offset);
    (offset, len, random.below(12))
}

/// Not a test of its own: the process that is killed.
#[test]
fn child() {
    let Ok(what) = std::env::var(CHILD) else {
        return;
    };
    let (seed, path) = what.split_once(' ').unwrap();
    let mut random = Random::new(seed.parse().unwrap());
    let image = open(path.as_ref(), true).unwrap();
    let out = std::io::stdout();
    for n in 1_u64.. {
        let (offset, len, kind) = change(&mut random);
        match kind {
            0 => image.write_zeroes(offset, len, true).unwrap(),
            1 => image.write_zeroes(offset, len, false).unwrap(),
            2 => image.discard(offset, len).unwrap(),
            _ => write(&image, offset, &n.to_le_bytes().repeat(len as usize / 8)).unwrap(),
        }
        if n % 7 == 0 {
            image.flush().unwrap();
            let mut out = out.lock();
            writeln!(out, "\nflushed {n}").unwrap();
            out.flush().unwrap();
        }
    }
}

#[test]
fn a_killed_writer_leaves_an_image_without_errors_and_loses_nothing_it_flushed() {
    if !have("the crash test", "qemu-img") {
        return;
    }
    let first = seed();
    for seed in first..first + rounds(8, 400) {
        println!("VIREO_SEED={seed}");
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let image = scratch.path("image");
        let mut options = qcow2::Create::new(SIZE);
        options.cluster_size = random.pick(&[512, 4096, 65536]);
        options.refcount_bits = random.pick(&[8, 16, 64]);
        options.lazy_refcounts = random.one_in(3);
        options.extended_l2 = options.cluster_size == 65536 && random.one_in(2);
        qcow2::create(File::create(&image).unwrap(), None, &options).unwrap();
        println!("{options:?}");
        let snapshot = random.one_in(2);
        if snapshot {
            run(
                "qemu-io",
                &["-f", "qcow2", "-c", "write -P 0 0 8M", text(&image)],
            );
            qemu_img(&["snapshot", "-c", "before", text(&image)]);
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(CHILD, format!("{seed} {}", text(&image)))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || {
            let flushed = |line: String| {
                line.strip_prefix("flushed ")
                    .and_then(|n| n.parse::<u64>().ok())
            };
            BufReader::new(out)
                .lines()
                .map_while(Result::ok)
                .filter_map(flushed)
                .last()
                .unwrap_or(0)
        });
        std::thread::sleep(Duration::from_millis(50 + random.below(400)));
        child.kill().unwrap();
        child.wait().unwrap();
        let flushed = reader.join().unwrap();
        println!("flushed up to {flushed}");

        if options.lazy_refcounts {
            // Its refcounts are wrong, and it says so: whoever opens it next counts.
            if random.one_in(2) {
                drop(open(&image, true).unwrap());
            } else {
                qemu_img(&["check", "-q", "-r", "all", text(&image)]);
            }
        }
        // 0: clean, 3: leaks and nothing else.
        let check = Command::new("qemu-img")
            .args(["check", "-f", "qcow2", text(&image)])
            .output()
            .unwrap();
        assert!(
            matches!(check.status.code(), Some(0 | 3)),
            "{}",
            String::from_utf8_lossy(&check.stderr)
        );
        let report = qcow2::check(&File::open(&image, true).unwrap(), qcow2::Fix::Leaks).unwrap();
        assert_eq!(report.corruptions, 0, "{:?}", report.messages);
        check_clean(&image);

        // Each sector is what it was at the flush, or what a later change made it.
        let mut changes = Random::new(seed);
        let mut model = vec![vec![0_u64]; (SIZE / 512) as usize];
        for n in 1..flushed + 2000 {
            let (offset, len, kind) = change(&mut changes);
            for sector in &mut model[(offset / 512) as usize..((offset + len) / 512) as usize] {
                match (kind, n <= flushed) {
                    (0 | 1, true) => *sector = vec![0],
                    // What the guest discards may stay.
                    (0..=2, _) => sector.push(0),
                    (_, true) => *sector = vec![n],
                    (_, false) => sector.push(n),
                }
            }
        }
        let now = read(&open(&image, false).unwrap(), 0, SIZE as usize).unwrap();
        for (at, (data, allowed)) in now.chunks(512).zip(&model).enumerate() {
            let word = u64::from_le_bytes(data[..8].try_into().unwrap());
            assert!(
                data.chunks(8).all(|w| w == word.to_le_bytes()),
                "sector {at} is torn"
            );
            assert!(
                allowed.contains(&word),
                "sector {at} is {word}, not one of {allowed:?}"
            );
        }
    }
}
