//! qcow2 images against QEMU's tools.
#![allow(missing_docs, reason = "a test")]

mod common;

use common::*;
use images::{File, Image, Qcow2, qcow2};

/// An image as qemu-img makes it, with some content, and what a guest should see in it.
struct Sample {
    scratch: Scratch,
    options: Vec<String>,
    model: Vec<u8>,
    snapshot: Option<Vec<u8>>,
    compressed: bool,
    resizable: bool,
}

fn sample(random: &mut Random) -> Sample {
    let scratch = Scratch::new();
    let old = random.one_in(5);
    let cluster = random.pick(&[512, 1024, 4096, 16384, 65536, 65536, 65536, 2 << 20]);
    let mut options = vec![format!("cluster_size={cluster}")];
    let extended = !old && cluster >= 16384 && random.one_in(3);
    let data_file = !old && random.one_in(5);
    let mut backing = random.one_in(2);
    let mut refcount_bits = 16;
    if old {
        options.push("compat=0.10".into());
    } else {
        options.push("compat=1.1".into());
        refcount_bits = random.pick(&[1, 2, 4, 8, 16, 32, 64]);
        options.push(format!("refcount_bits={refcount_bits}"));
        if extended {
            options.push("extended_l2=on".into());
        }
        if random.one_in(3) && !data_file {
            options.push("compression_type=zstd".into());
        }
        if random.one_in(4) && !data_file {
            options.push("lazy_refcounts=on".into());
        }
    }
    if data_file {
        options.push("data_file=data".into());
        if random.one_in(2) {
            options.push("data_file_raw=on".into());
            backing = false;
        }
    }
    let prealloc = (!backing || extended) && random.one_in(4);
    if prealloc {
        options.push(format!(
            "preallocation={}",
            random.pick(&["metadata", "falloc"])
        ));
    }
    let encrypted = random.one_in(5);
    if encrypted {
        options.push("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10".into());
    }
    let size = (1 + random.below(16384)) * 512;
    let mut args = vec![
        "create".to_owned(),
        "-q".into(),
        "-f".into(),
        "qcow2".into(),
        "--object".into(),
        SECRET.into(),
    ];
    if backing {
        let base = (1 + random.below(16384)) * 512;
        let mut data = vec![0; base as usize];
        let (from, to) = (random.below(base), random.below(base));
        random.fill(&mut data[from.min(to) as usize..from.max(to) as usize]);
        std::fs::write(scratch.path("base.raw"), data).unwrap();
        let (name, format) = if random.one_in(2) {
            qemu_img(&[
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-c",
                text(&scratch.path("base.raw")),
                text(&scratch.path("base.qcow2")),
            ]);
            ("base.qcow2", "qcow2")
        } else {
            ("base.raw", "raw")
        };
        args.extend(["-b".into(), name.into(), "-F".into(), format.into()]);
    }
    let image = scratch.path("image");
    args.extend([
        "-o".into(),
        options.join(","),
        text(&image).into(),
        size.to_string(),
    ]);
    // Names in the image are relative to its folder, but data_file is created in the present one.
    if data_file {
        let at = args.len() - 3;
        args[at] = args[at].replace(
            "data_file=data",
            &format!("data_file={}", text(&scratch.path("data"))),
        );
    }
    qemu_img(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let mut commands = Vec::new();
    // qemu-io writes compressed data to clusters without any only.
    let cluster = cluster as u64;
    let mut packed = std::collections::BTreeSet::new();
    for _ in 0..random.below(5) {
        let at = random.below(size / cluster + 1) * cluster;
        if at + cluster <= size && !data_file && !prealloc && !encrypted && packed.insert(at) {
            commands.push(format!(
                "write -c -P {} {at} {cluster}",
                1 + random.below(200)
            ));
        }
    }
    for _ in 0..random.below(6) {
        let offset = random.below(size / 512) * 512;
        let len = (1 + random.below(((size - offset) / 512).min(1000))) * 512;
        let kind = random.pick(&[
            "write -P 0x5a",
            "write -P 0xa5",
            "write -z",
            "write -z -u",
            "discard",
        ]);
        commands.push(format!("{kind} {offset} {len}"));
    }
    if !commands.is_empty() {
        qemu_io(&image, &commands);
    }
    let mut snapshot = None;
    if !data_file && !encrypted && refcount_bits >= 8 && random.one_in(3) {
        qemu_img(&["snapshot", "-c", "before", text(&image)]);
        snapshot = Some(content(&image, "qcow2", Some("before"), &scratch));
        let offset = random.below(size / 512) * 512;
        qemu_io(&image, &[format!("write -P 0x77 {offset} 512")]);
    }
    let model = content(&image, "qcow2", None, &scratch);
    let resizable = !old || snapshot.is_none();
    Sample {
        scratch,
        options,
        model,
        snapshot,
        compressed: !data_file,
        resizable,
    }
}

fn range(random: &mut Random, size: u64) -> (u64, u64) {
    let unit = random.pick(&[1, 512, 512, 4096, 65536]);
    let most = random.pick(&[512, 4096, 65536, 300_000, 5_000_000]);
    let offset = random.below(size) / unit * unit;
    let len = (random.below(most) + 1)
        .next_multiple_of(unit)
        .min(size - offset);
    (offset, len)
}

fn workload(sample: &mut Sample, random: &mut Random, steps: u64) {
    let path = sample.scratch.path("image");
    let mut image = Some(open(&path, true).unwrap());
    for _ in 0..steps {
        let it: &Qcow2 = image.as_ref().unwrap();
        let size = sample.model.len() as u64;
        let (offset, len) = range(random, size);
        let part = offset as usize..(offset + len) as usize;
        match random.below(20) {
            0..7 => {
                let mut data = vec![0; len as usize];
                random.fill(&mut data);
                write(it, offset, &data).unwrap();
                sample.model[part].copy_from_slice(&data);
            }
            7..11 => assert!(
                read(it, offset, len as usize).unwrap() == sample.model[part],
                "read {offset} {len}"
            ),
            11 | 12 => {
                it.write_zeroes(offset, len, random.one_in(2)).unwrap();
                sample.model[part].fill(0);
            }
            13 | 14 => {
                it.discard(offset, len).unwrap();
                let now = read(it, offset, len as usize).unwrap();
                for (new, old) in now.iter().zip(&mut sample.model[part]) {
                    assert!(*new == *old || *new == 0, "discard {offset} {len}");
                    *old = *new;
                }
            }
            15 => it.flush().unwrap(),
            16 => {
                drop(image.take());
                check_clean(&path);
                image = Some(open(&path, true).unwrap());
            }
            17 if sample.compressed => {
                let cluster = it.info().unwrap().cluster_size.unwrap();
                let offset = offset / cluster * cluster;
                let len = cluster.min(size - offset) as usize;
                let data: Vec<u8> = (0..len).map(|n| (n / 100) as u8 ^ offset as u8).collect();
                it.write_compressed(offset, &data).unwrap();
                sample.model[offset as usize..offset as usize + len].copy_from_slice(&data);
            }
            18 if sample.resizable && random.one_in(2) => {
                let new = (1 + random.below(20000)) * 512;
                it.resize(new).unwrap();
                sample.model.resize(new as usize, 0);
            }
            _ => {
                let mut at = offset;
                while at < offset + len {
                    let extent = it.extent(at, offset + len - at).unwrap();
                    assert!(extent.len > 0 && extent.start == at);
                    if extent.zero {
                        assert!(
                            sample.model[at as usize..(at + extent.len) as usize]
                                .iter()
                                .all(|&b| b == 0)
                        );
                    }
                    at += extent.len;
                }
            }
        }
    }
    let it = image.as_ref().unwrap();
    assert!(
        read(it, 0, sample.model.len()).unwrap() == sample.model,
        "all of it"
    );
    drop(image);
    check_clean(&path);
    assert!(
        content(&path, "qcow2", None, &sample.scratch) == sample.model,
        "as qemu-img reads it"
    );
    if let Some(snapshot) = &sample.snapshot {
        // qemu-img reads as much of it as the disk has now.
        let now = content(&path, "qcow2", Some("before"), &sample.scratch);
        let common = now.len().min(snapshot.len());
        assert!(now[..common] == snapshot[..common], "the snapshot");
    }
}

#[test]
fn whatever_qemu_makes_is_read_and_written_right() {
    if !have("images of qemu-img's", "qemu-img") {
        return;
    }
    let first = seed();
    for seed in first..first + rounds(6, 1500) {
        println!("VIREO_SEED={seed}");
        let mut random = Random::new(seed);
        let mut sample = sample(&mut random);
        println!("{:?}, {} bytes", sample.options, sample.model.len());
        workload(&mut sample, &mut random, 60);
    }
}

/// Options for `create` and what qemu-img would say of the image.
fn create_options(random: &mut Random, size: u64) -> qcow2::Create {
    let mut options = qcow2::Create::new(size);
    options.cluster_size = random.pick(&[512, 2048, 4096, 16384, 65536, 2 << 20]);
    if random.one_in(5) {
        options.version = 2;
    } else {
        options.refcount_bits = random.pick(&[1, 2, 4, 8, 16, 32, 64]);
        options.lazy_refcounts = random.one_in(3);
        options.extended_l2 = options.cluster_size >= 16384 && random.one_in(2);
        if random.one_in(4) {
            options.data_file = Some("data".into());
            options.data_file_raw = random.one_in(2);
        } else if random.one_in(2) {
            options.compression = qcow2::Compression::Zstd;
        }
    }
    if !options.data_file_raw && random.one_in(5) {
        options.encryption = Some(qcow2::Encrypt {
            spec: images::luks::Spec::default(),
            passphrase: PASSPHRASE.as_bytes().to_vec().into(),
            time: std::time::Duration::from_millis(10),
        });
    }
    if !options.data_file_raw && random.one_in(3) {
        options.backing = Some(("base.raw".into(), "raw".into()));
    }
    let old = options.version == 2 && options.encryption.is_some();
    if (options.backing.is_none() || options.extended_l2) && !old {
        use qcow2::Preallocation::{Falloc, Full, Metadata, Off};
        options.preallocation = random.pick(&[Off, Off, Metadata, Falloc, Full]);
    }
    options
}

#[test]
fn what_create_makes_is_what_qemu_takes_for_it() {
    if !have("our images in qemu-img", "qemu-img") {
        return;
    }
    let first = seed();
    for seed in first..first + rounds(6, 1000) {
        println!("VIREO_SEED={seed}");
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let size = (1 + random.below(16384)) * 512;
        let mut options = create_options(&mut random, size);
        // qemu-img looks for it from where it is started.
        options.data_file = options
            .data_file
            .map(|name| scratch.path(name.to_str().unwrap()).into());
        println!("{options:?}");
        let mut model = vec![0; size as usize];
        if options.backing.is_some() {
            let mut base = vec![0; (1 + random.below(16384) as usize) * 512];
            random.fill(&mut base);
            let common = base.len().min(model.len());
            model[..common].copy_from_slice(&base[..common]);
            std::fs::write(scratch.path("base.raw"), base).unwrap();
        }
        let image = scratch.path("image");
        let data = options
            .data_file
            .as_ref()
            .map(|_| File::create(&scratch.path("data")).unwrap());
        if let Err(error) = qcow2::create(File::create(&image).unwrap(), data, &options) {
            // Long names beside everything else are too much for a cluster of 512 bytes.
            let error = error.to_string();
            assert!(error.contains("the names don't fit"), "{error}");
            std::fs::remove_file(&image).unwrap();
            let _ = std::fs::remove_file(scratch.path("data"));
            continue;
        }
        check_clean(&image);
        let said = qemu_img(&["info", "-f", "qcow2", "--output=json", text(&image)]);
        for expected in [
            format!("\"virtual-size\": {size}"),
            format!("\"cluster-size\": {}", options.cluster_size),
            format!("\"refcount-bits\": {}", options.refcount_bits),
        ] {
            let absent = expected.contains("refcount-bits") && options.version == 2;
            assert!(absent || said.contains(&expected), "{expected}: {said}");
        }
        for (option, name) in [
            (options.lazy_refcounts, "lazy-refcounts"),
            (options.extended_l2, "extended-l2"),
            (options.data_file_raw, "data-file-raw"),
        ] {
            assert_eq!(
                option,
                said.contains(&format!("\"{name}\": true")),
                "{name}: {said}"
            );
        }
        assert_eq!(
            said.contains("zstd"),
            options.compression == qcow2::Compression::Zstd
        );
        assert!(
            content(&image, "qcow2", None, &scratch) == model,
            "what qemu-img reads"
        );
        let compressed = options.data_file.is_none();
        let mut sample = Sample {
            scratch,
            options: Vec::new(),
            model,
            snapshot: None,
            compressed,
            resizable: true,
        };
        workload(&mut sample, &mut random, 30);
        if options.data_file_raw {
            let data = std::fs::read(sample.scratch.path("data")).unwrap();
            let differs = data.iter().zip(&sample.model).position(|(a, b)| a != b);
            let lengths = (data.len(), sample.model.len());
            assert!(
                data == sample.model,
                "the data file alone: {differs:?}, {lengths:?}"
            );
        }
    }
}

#[test]
fn threads_do_not_get_into_each_others_way() {
    let first = seed();
    for seed in first..first + rounds(6, 200) {
        println!("VIREO_SEED={seed}");
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let image = scratch.path("image");
        let mut options = qcow2::Create::new(4 << 20);
        options.cluster_size = random.pick(&[512, 4096, 65536]);
        options.extended_l2 = options.cluster_size == 65536 && random.one_in(2);
        qcow2::create(File::create(&image).unwrap(), None, &options).unwrap();
        let it = open(&image, true).unwrap();
        // Sectors are dealt out to the threads like cards.
        const THREADS: u64 = 4;
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let work = |thread: u64| {
                let it = &it;
                let mut random = Random::new(seed ^ thread << 32);
                scope.spawn(move || {
                    let mut model = vec![0_u8; 4 << 20];
                    for step in 0..400 {
                        let sector = random.below((4 << 20) / 512 / THREADS) * THREADS + thread;
                        let part = sector as usize * 512..(sector as usize + 1) * 512;
                        match random.below(10) {
                            0..5 => {
                                model[part.clone()].fill(step as u8 | 1);
                                write(it, sector * 512, &model[part]).unwrap();
                            }
                            5 => {
                                model[part.clone()].fill(0);
                                it.write_zeroes(sector * 512, 512, true).unwrap();
                            }
                            6 => it.flush().unwrap(),
                            _ => assert!(
                                read(it, sector * 512, 512).unwrap() == model[part],
                                "sector {sector}"
                            ),
                        }
                    }
                    model
                })
            };
            let threads: Vec<_> = (0..THREADS).map(work).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let mut model = vec![0; 4 << 20];
        for (n, sector) in model.chunks_mut(512).enumerate() {
            sector.copy_from_slice(&models[n % THREADS as usize][n * 512..(n + 1) * 512]);
        }
        assert!(read(&it, 0, model.len()).unwrap() == model);
        drop(it);
        assert_eq!(
            qcow2::check(&File::open(&image, false).unwrap(), qcow2::Fix::None)
                .unwrap()
                .messages,
            [""; 0]
        );
    }
}
