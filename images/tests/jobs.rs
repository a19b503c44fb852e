//! Work on images that are in use: pulling up what is behind them, committing them, snapshots;
//! and repair.
#![allow(missing_docs, reason = "a test")]

mod common;

use std::ffi::OsString;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use common::*;
use images::commit::Active;
use images::follow::Follow;
use images::qcow2::{self, Create, Fix, Options};
use images::{Error, File, Image, Job, Qcow2};

const SIZE: u64 = 6 << 20;

fn make(path: &Path, cluster: u64, extended: bool, backing: Option<&str>) {
    let mut create = Create::new(SIZE);
    create.cluster_size = cluster;
    create.extended_l2 = extended;
    create.backing = backing.map(|name| (OsString::from(name), "qcow2".to_owned()));
    qcow2::create(File::create(path).unwrap(), None, &create).unwrap();
}

fn open_on(path: &Path, backing: Option<Arc<dyn Image>>) -> Arc<Qcow2> {
    let options = Options {
        backing,
        ..Options::default()
    };
    Arc::new(Qcow2::open(File::open(path, true).unwrap(), options).unwrap())
}

fn fill(image: &dyn Image, model: &mut [u8], random: &mut Random, times: u64) {
    for _ in 0..times {
        let at = random.below(SIZE / 512) * 512;
        let len = ((1 + random.below(300)) * 512).min(SIZE - at);
        let byte = random.below(200) as u8;
        if byte < 20 {
            image.write_zeroes(at, len, true).unwrap();
            model[at as usize..(at + len) as usize].fill(0);
        } else {
            write(image, at, &vec![byte; len as usize]).unwrap();
            model[at as usize..(at + len) as usize].fill(byte);
        }
    }
}

/// Somebody who goes on writing to `image` until told to stop.
fn keep_writing<'a>(
    scope: &'a std::thread::Scope<'a, '_>,
    image: &'a Arc<Qcow2>,
    model: &'a Mutex<Vec<u8>>,
    stop: &'a AtomicBool,
    seed: u64,
) {
    scope.spawn(move || {
        let mut random = Random::new(seed);
        while !stop.load(Ordering::Relaxed) {
            fill(&**image, &mut model.lock().unwrap(), &mut random, 1);
            if random.one_in(10) {
                image.flush().unwrap();
            }
            std::thread::yield_now();
        }
    });
}

fn same(image: &dyn Image, model: &[u8], what: &str) {
    let seen = read(image, 0, model.len()).unwrap();
    let differ = seen.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(differ, None, "{what}");
}

fn sound(path: &Path, what: &str) {
    let report = qcow2::check(&File::open(path, false).unwrap(), Fix::None).unwrap();
    assert_eq!(
        (report.corruptions, report.leaks),
        (0, 0),
        "{what}: {:?}",
        report.messages
    );
}

#[test]
fn an_image_in_use_can_be_pulled_up_and_committed() {
    let first = seed();
    println!("VIREO_SEED={first}");
    for round in 0..rounds(6, 200) {
        let seed = first + round;
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let what = format!("seed {seed}");
        let [base, middle, top] = ["base", "middle", "top"].map(|name| scratch.path(name));
        let cluster = random.pick(&[4096, 65536]);
        make(&base, 65536, false, None);
        make(&middle, cluster, false, Some("base"));
        let extended = cluster == 65536 && random.one_in(2);
        make(&top, cluster, extended, Some("middle"));
        let mut model = vec![0; SIZE as usize];
        let base_image = open_on(&base, None);
        fill(&*base_image, &mut model, &mut random, 8);
        let base_model = model.clone();
        let middle_image = open_on(&middle, Some(base_image.clone()));
        fill(&*middle_image, &mut model, &mut random, 8);
        let top_image = open_on(&top, Some(middle_image.clone()));
        fill(&*top_image, &mut model, &mut random, 4);
        let model = Mutex::new(model);
        let stop = AtomicBool::new(false);
        let how = random.below(3);
        let job = Job::new();
        let active = Active::new(
            top_image.clone(),
            2,
            base_image.clone(),
            Some(base_image.clone()),
        );
        std::thread::scope(|scope| {
            keep_writing(scope, &top_image, &model, &stop, seed + 1);
            match how {
                0 => top_image.pull(None, &job).unwrap(),
                1 => top_image.pull(Some(2), &job).unwrap(),
                _ => {
                    active.copy(&job).unwrap();
                    for _ in 0..3 {
                        active.catch_up(&job).unwrap();
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        let model = model.into_inner().unwrap();
        same(&*top_image, &model, &what);
        if how == 2 {
            active.finish(&job).unwrap();
            same(&*base_image, &model, &what);
        } else {
            same(&*base_image, &base_model, &what);
            let backing = (how == 1).then(|| ("base".into(), Some("qcow2".to_owned())));
            top_image.set_backing(backing).unwrap();
        }
        drop((active, top_image, middle_image));
        if how != 2 {
            let below: Option<Arc<dyn Image>> = (how == 1).then(|| base_image.clone() as _);
            same(&*open_on(&top, below), &model, &what);
        }
        drop(base_image);
        for path in [&base, &middle, &top] {
            sound(path, &what);
        }
    }
}

#[test]
fn a_cancelled_job_stops_and_harms_nothing() {
    let scratch = Scratch::new();
    let [base, top] = ["base", "top"].map(|name| scratch.path(name));
    make(&base, 65536, false, None);
    make(&top, 65536, false, Some("base"));
    let mut model = vec![0; SIZE as usize];
    let base_image = open_on(&base, None);
    fill(&*base_image, &mut model, &mut Random::new(1), 20);
    let top_image = open_on(&top, Some(base_image));
    let job = Job::new();
    job.set_speed(1 << 20);
    std::thread::scope(|scope| {
        let pull = scope.spawn(|| top_image.pull(None, &job));
        while job.progress().0 == 0 {
            std::thread::yield_now();
        }
        job.cancel();
        assert!(matches!(pull.join().unwrap(), Err(Error::Cancelled)));
    });
    same(&*top_image, &model, "half pulled");
    drop(top_image);
    sound(&top, "half pulled");
}

#[test]
fn an_image_that_was_rested_marks_its_bitmaps_again() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, 65536, false, None);
    let image = open_on(&path, None);
    image.bitmap_add("b", None, true).unwrap();
    image.rest().unwrap();
    let in_use = || {
        let file = File::open(&path, false).unwrap();
        let other = Qcow2::open(file, Options::default()).unwrap();
        other.bitmaps().unwrap()[0].in_use
    };
    assert!(!in_use());
    write(&*image, 0, &[1; 512]).unwrap();
    assert!(in_use(), "a write that it might miss");
    drop(image);
    assert!(!in_use());
}

#[test]
fn entries_that_point_to_nonsense_are_repaired() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, 65536, false, None);
    let image = open_on(&path, None);
    let mut model = vec![0; SIZE as usize];
    model[..4 << 16].fill(7);
    write(&*image, 0, &vec![7; 4 << 16]).unwrap();
    let l1 = image.header().l1_offset;
    drop(image);
    let file = File::open(&path, true).unwrap();
    let mut word = [0; 8];
    file.read_bytes(l1, &mut word).unwrap();
    let l2 = u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00;
    // Not a multiple of the cluster size; past the file's end; compressed data past its end.
    for (index, entry) in [
        (1_u64, 1 << 63 | 0x5_0200_u64),
        (2, 1 << 63 | 1 << 40),
        (3, 1 << 62 | 1 << 40),
    ] {
        file.write_bytes(l2 + index * 8, &entry.to_be_bytes())
            .unwrap();
        model[(index << 16) as usize..((index + 1) << 16) as usize].fill(0);
    }
    let found = qcow2::check(&file, Fix::None).unwrap();
    assert!(found.corruptions >= 3, "{:?}", found.messages);
    let fixed = qcow2::check(&file, Fix::All).unwrap();
    assert!(
        fixed.corruptions_fixed >= 3 && fixed.corruptions == 0,
        "{fixed:?}"
    );
    drop(file);
    sound(&path, "repaired");
    same(
        &*open_on(&path, None),
        &model,
        "what was sound is still there",
    );
    if have("the repaired image", "qemu-img") {
        check_clean(&path);
    }
}
