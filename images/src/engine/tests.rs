use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::*;
use crate::iovec::AlignedBuf;
use crate::limits::Rate;
use crate::testing::{Random, Scratch, have};
use crate::{Extent, File, ImageInfo, Raw, chain, luks};

const LIMIT: Duration = Duration::from_secs(60);

fn open(path: &Path, direct: bool) -> File {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(path)
        .unwrap();
    File::new(OwnedFd::from(file), "disk").unwrap()
}

fn queue(engine: &Arc<Engine>) -> Queue {
    engine.queue(Arc::new(())).unwrap()
}

fn request(op: Op, offset: u64, len: u64, buf: Option<IoBuf>, token: u64) -> Request {
    Request {
        op,
        offset,
        len,
        bufs: buf.into_iter().collect(),
        token,
    }
}

/// Submits one and waits for it.
fn run(queue: &mut Queue, request: Request) -> Result<(), Error> {
    let mut done = Vec::new();
    queue.submit(request);
    assert!(queue.drain(LIMIT, &mut done));
    assert_eq!(done.len(), 1);
    done.remove(0).result
}

/// Random requests, many in flight, none of which overlap unless both read; everything read is
/// compared with a model of the disk.
fn hammer(engine: &Arc<Engine>, align: u64, rounds: usize, random: &mut Random) {
    let size = engine.image().size();
    let mut model = vec![0_u8; size as usize];
    let mut queue = queue(engine);
    // By token: the request, its range and memory, and what it must have read.
    struct Flying {
        op: Op,
        start: u64,
        end: u64,
        memory: AlignedBuf,
        misaligned: usize,
    }
    let mut flying: HashMap<u64, Flying> = HashMap::new();
    let mut done = Vec::new();
    let settle = |done: &mut Vec<Completion>, flying: &mut HashMap<u64, Flying>, model: &[u8]| {
        for completion in done.drain(..) {
            completion.result.unwrap();
            let one = flying.remove(&completion.token).expect("a token once");
            if one.op == Op::Read {
                let got = &one.memory[one.misaligned..][..(one.end - one.start) as usize];
                let want = &model[one.start as usize..one.end as usize];
                assert!(got == want, "read of {}..{}", one.start, one.end);
            }
        }
    };
    for token in 0..rounds as u64 {
        let most = if random.below(8) == 0 {
            300_000
        } else {
            20_000
        };
        let len = random.below(most) / align * align;
        let start = random.below(size - len + 1) / align * align;
        let end = start + len;
        let op = match random.below(20) {
            0 => Op::Flush,
            1 => Op::WriteZeroes {
                unmap: random.below(2) == 0,
            },
            2..9 => Op::Write,
            _ => Op::Read,
        };
        let clash = flying.values().any(|other| {
            op != Op::Flush
                && other.start < end
                && start < other.end
                && (op != Op::Read || other.op != Op::Read)
        });
        if !clash {
            // Sometimes memory that O_DIRECT can't take.
            let misaligned = if random.below(8) == 0 { 24 } else { 0 };
            let mut memory = AlignedBuf::new(len as usize + misaligned).unwrap();
            if op == Op::Write && random.below(8) != 0 {
                random.fill(&mut memory[misaligned..]);
            }
            let io = memory.io(usize::MAX).part(misaligned, usize::MAX);
            // In pieces, as guests do.
            let cut = (random.below(len + 1) / 512 * 512) as usize;
            let data = matches!(op, Op::Read | Op::Write);
            let bufs = match data {
                true if cut == 0 => vec![io.part(0, len as usize)],
                true => vec![io.part(0, cut), io.part(cut, len as usize - cut)],
                false => Vec::new(),
            };
            let flush = op == Op::Flush;
            match op {
                Op::Write => model[start as usize..end as usize]
                    .copy_from_slice(&memory[misaligned..][..len as usize]),
                Op::WriteZeroes { .. } => model[start as usize..end as usize].fill(0),
                _ => {}
            }
            flying.insert(
                token,
                Flying {
                    op,
                    start: if flush { 0 } else { start },
                    end: if flush { 0 } else { end },
                    memory,
                    misaligned,
                },
            );
            queue.submit(Request {
                op,
                offset: if flush { 0 } else { start },
                len: if data || flush { 0 } else { len },
                bufs,
                token,
            });
        }
        if flying.len() >= 24 || random.below(6) == 0 {
            queue.complete(&mut done);
            settle(&mut done, &mut flying, &model);
        }
        if flying.len() >= 48 {
            assert!(queue.drain(LIMIT, &mut done));
            settle(&mut done, &mut flying, &model);
        }
    }
    assert!(queue.drain(LIMIT, &mut done));
    settle(&mut done, &mut flying, &model);
    assert!(flying.is_empty() && queue.in_flight() == 0);
    let mut whole = AlignedBuf::new(size as usize).unwrap();
    engine.image().read(0, &[whole.io(size as usize)]).unwrap();
    assert!(whole[..size as usize] == model[..], "the disk at the end");
}

/// Every cache mode and mechanism, over images that `make` opens.
fn every_mode(
    name: &str,
    rounds: usize,
    make: impl Fn(&Scratch, Cache, &mut Random) -> Arc<dyn Image>,
    check: impl Fn(&Scratch),
) {
    let mut random = Random::new(name);
    for cache in [
        Cache::None,
        Cache::Writeback,
        Cache::Writethrough,
        Cache::DirectSync,
        Cache::Unsafe,
    ] {
        for aio in [Aio::Threads, Aio::Ring] {
            for detect_zeroes in [DetectZeroes::Off, DetectZeroes::Unmap] {
                let dir = Scratch::new();
                let image = make(&dir, cache, &mut random);
                let options = Options {
                    cache,
                    aio,
                    discard: true,
                    detect_zeroes,
                    read_only: false,
                };
                println!("{options:?}");
                let engine = Engine::new(image, options);
                let align = if random.below(2) == 0 { 512 } else { 4096 };
                hammer(&engine, align, rounds, &mut random);
                engine.image().flush().unwrap();
                drop(engine);
                check(&dir);
            }
        }
    }
}

#[test]
fn raw_in_every_mode_is_a_disk() {
    every_mode(
        "raw",
        200,
        |dir, cache, _| {
            let path = dir.file("disk", 3 << 20);
            Arc::new(Raw::new(open(&path, cache.direct())).unwrap())
        },
        |_| {},
    );
}

#[test]
fn luks_in_every_mode_is_a_disk() {
    every_mode(
        "luks",
        80,
        |dir, cache, _| {
            let spec = luks::Spec::default();
            let size = luks::header_len(&spec).unwrap() + (2 << 20);
            let path = dir.file("disk", size);
            let below: Arc<dyn Image> = Arc::new(Raw::new(open(&path, cache.direct())).unwrap());
            let store = luks::ImageStore {
                image: &*below,
                name: "disk",
            };
            let time = Duration::from_millis(1);
            let volume = luks::Volume::create(&store, spec, b"secret", time).unwrap();
            let image = Arc::new(luks::Luks::new(below, &volume).unwrap());
            image.write_zeroes(0, image.size(), false).unwrap();
            image
        },
        |_| {},
    );
}

fn succeeds(program: &str, args: &[&str], dir: &Scratch) {
    let mut command = Command::new(program);
    command.args(args).current_dir(dir.path());
    let mut output = command.stdin(Stdio::null()).output().unwrap();
    for _ in 0..20 {
        // qemu-img times its own key derivation, and gives up where the host's clock of its CPU time is too coarse.
        if !String::from_utf8_lossy(&output.stderr).contains("accurate CPU usage") {
            break;
        }
        output = command.output().unwrap();
    }
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}

/// A qcow2 image of 3 MiB, as qemu-img makes it.
fn qcow2(dir: &Scratch, direct: bool, options: &str) -> Arc<dyn Image> {
    let create = ["create", "-q", "-f", "qcow2", "-o", options, "disk", "3M"];
    succeeds("qemu-img", &create, dir);
    let file = open(&dir.path().join("disk"), direct);
    chain::open(chain::ImageConfig::new(chain::Format::Qcow2, file)).unwrap()
}

#[test]
fn qcow2_in_every_mode_is_a_disk() {
    if !have("qemu-img") {
        eprintln!("left out: qcow2_in_every_mode_is_a_disk needs qemu-utils");
        return;
    }
    let options = [
        "cluster_size=64k",
        "cluster_size=4k,refcount_bits=8",
        "cluster_size=512,compat=0.10",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=128k,lazy_refcounts=on",
        "preallocation=metadata",
    ];
    every_mode(
        "qcow2",
        120,
        |dir, cache, random| {
            let options = options[random.below(options.len() as u64) as usize];
            println!("{options}");
            qcow2(dir, cache.direct(), options)
        },
        |dir| succeeds("qemu-img", &["check", "-q", "disk"], dir),
    );
}

#[test]
fn encrypted_qcow2_is_a_disk_that_qemu_reads() {
    if !have("qemu-img") {
        eprintln!("left out: encrypted_qcow2_is_a_disk_that_qemu_reads needs qemu-utils");
        return;
    }
    let mut random = Random::new("encrypted qcow2");
    let dir = Scratch::new();
    let secret = ["--object", "secret,id=s,data=secret"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let create = ["create", "-q", "-f", "qcow2", "-o", options, "disk", "3M"];
    succeeds(
        "qemu-img",
        &[&create[..1], &secret, &create[1..]].concat(),
        &dir,
    );
    let config = |passphrase: Option<&str>| {
        let file = open(&dir.path().join("disk"), false);
        chain::ImageConfig {
            passphrase: passphrase.map(|text| text.as_bytes().to_vec().into()),
            ..chain::ImageConfig::new(chain::Format::Qcow2, file)
        }
    };
    let said = chain::open(config(None)).unwrap_err().to_string();
    assert!(said.contains("needs a passphrase"), "{said}");
    let said = chain::open(config(Some("other"))).unwrap_err();
    assert!(matches!(said, Error::Passphrase { .. }), "{said}");
    let image = chain::open(config(Some("secret"))).unwrap();
    let engine = Engine::new(image, Options::default());
    hammer(&engine, 512, 400, &mut random);
    engine.image().flush().unwrap();
    let size = engine.image().size() as usize;
    let mut whole = AlignedBuf::new(size).unwrap();
    engine.image().read(0, &[whole.io(size)]).unwrap();
    fs::write(dir.path().join("plain"), &whole[..size]).unwrap();
    drop(engine);
    let theirs = "driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename=disk";
    let plain = "driver=raw,file.driver=file,file.filename=plain";
    let compare = ["compare", "--image-opts", theirs, plain];
    succeeds(
        "qemu-img",
        &[&compare[..1], &secret, &compare[1..]].concat(),
        &dir,
    );
    let check = ["check", "-q", "--image-opts", theirs];
    succeeds(
        "qemu-img",
        &[&check[..1], &secret, &check[1..]].concat(),
        &dir,
    );
}

/// An image that does what it is told to, and says what it was asked.
#[derive(Debug, Default)]
struct Mock {
    flushes: AtomicUsize,
    discards: AtomicUsize,
    zeroes: Mutex<Vec<bool>>,
    writes: AtomicUsize,
    slow: Option<Duration>,
    error: Option<i32>,
}

impl Image for Mock {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read(&self, _: u64, _: &[IoBuf]) -> Result<(), Error> {
        if let Some(time) = self.slow {
            std::thread::sleep(time);
        }
        match self.error {
            Some(0) => panic!("on purpose"),
            Some(errno) => Err(Error::Io {
                what: "reading".to_owned(),
                source: std::io::Error::from_raw_os_error(errno),
            }),
            None => Ok(()),
        }
    }
    fn write(&self, _: u64, _: &[IoBuf]) -> Result<(), Error> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, unmap: bool) -> Result<(), Error> {
        self.zeroes.lock().unwrap().push(unmap);
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), Error> {
        self.discards.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn flush(&self) -> Result<(), Error> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn extent(&self, _: u64, _: u64) -> Result<Extent, Error> {
        Err(Error::Invalid("not here".to_owned()))
    }
    fn info(&self) -> Result<ImageInfo, Error> {
        Ok(ImageInfo::default())
    }
    fn resize(&self, _: u64) -> Result<(), Error> {
        Ok(())
    }
}

#[test]
fn cache_modes_flush_as_they_promise() {
    let mut memory = AlignedBuf::new(4096).unwrap();
    for (cache, after_write, after_flush) in [
        (Cache::None, 0, 1),
        (Cache::Writeback, 0, 1),
        (Cache::Writethrough, 1, 2),
        (Cache::DirectSync, 1, 2),
        (Cache::Unsafe, 0, 0),
    ] {
        let mock = Arc::new(Mock::default());
        let options = Options {
            cache,
            ..Options::default()
        };
        let engine = Engine::new(mock.clone(), options);
        let mut queue = queue(&engine);
        run(
            &mut queue,
            request(Op::Write, 0, 0, Some(memory.io(512)), 1),
        )
        .unwrap();
        assert_eq!(
            mock.flushes.load(Ordering::SeqCst),
            after_write,
            "{cache:?}"
        );
        run(&mut queue, request(Op::Flush, 0, 0, None, 2)).unwrap();
        assert_eq!(
            mock.flushes.load(Ordering::SeqCst),
            after_flush,
            "{cache:?}"
        );
        // The guest turns its write cache off.
        engine.set_writethrough(true);
        run(
            &mut queue,
            request(Op::Write, 0, 0, Some(memory.io(512)), 3),
        )
        .unwrap();
        assert_eq!(mock.flushes.load(Ordering::SeqCst), after_flush + 1);
    }
}

#[test]
fn discards_and_zeroes_reach_the_image_only_where_allowed() {
    let mut zero = AlignedBuf::new(70_000).unwrap();
    for (discard, detect_zeroes, discards, expected) in [
        (false, DetectZeroes::Off, 0, &[false][..]),
        (true, DetectZeroes::Off, 1, &[true]),
        (true, DetectZeroes::On, 1, &[true, false]),
        (true, DetectZeroes::Unmap, 1, &[true, true]),
        (false, DetectZeroes::Unmap, 0, &[false, false]),
    ] {
        let mock = Arc::new(Mock::default());
        let options = Options {
            discard,
            detect_zeroes,
            ..Options::default()
        };
        let engine = Engine::new(mock.clone(), options);
        let mut queue = queue(&engine);
        run(&mut queue, request(Op::Discard, 0, 4096, None, 0)).unwrap();
        let unmap = Op::WriteZeroes { unmap: true };
        run(&mut queue, request(unmap, 0, 4096, None, 0)).unwrap();
        run(
            &mut queue,
            request(Op::Write, 0, 0, Some(zero.io(70_000)), 0),
        )
        .unwrap();
        let writes = mock.writes.load(Ordering::SeqCst);
        assert_eq!(mock.discards.load(Ordering::SeqCst), discards);
        assert_eq!(*mock.zeroes.lock().unwrap(), expected);
        assert_eq!(writes, usize::from(detect_zeroes == DetectZeroes::Off));
        // One byte anywhere is data.
        for at in [0, 7, 64, 511, 69_999] {
            zero[at] = 1;
            run(
                &mut queue,
                request(Op::Write, 0, 0, Some(zero.io(70_000)), 0),
            )
            .unwrap();
            zero[at] = 0;
        }
        assert_eq!(mock.writes.load(Ordering::SeqCst), writes + 5);
    }
}

#[test]
fn errors_carry_their_number_and_nothing_is_lost_by_a_panic() {
    let mut memory = AlignedBuf::new(4096).unwrap();
    for (error, expected) in [(libc::ENOSPC, libc::ENOSPC), (0, libc::EIO)] {
        let mock = Arc::new(Mock {
            error: Some(error),
            ..Mock::default()
        });
        let engine = Engine::new(mock, Options::default());
        let mut queue = queue(&engine);
        for _ in 0..3 {
            let result = run(&mut queue, request(Op::Read, 0, 0, Some(memory.io(512)), 1));
            assert_eq!(result.unwrap_err().errno(), expected);
        }
        assert_eq!(engine.stats().get(Op::Read).failed, 3);
        assert_eq!(engine.stats().get(Op::Read).requests, 0);
    }
    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let mock = Arc::new(Mock::default());
    let mut queue = queue(&Engine::new(mock.clone(), options));
    for op in [Op::Write, Op::Discard, Op::WriteZeroes { unmap: false }] {
        let result = run(&mut queue, request(op, 0, 512, None, 1));
        assert_eq!(result.unwrap_err().errno(), libc::EROFS);
    }
    assert_eq!(mock.writes.load(Ordering::SeqCst), 0);
    run(&mut queue, request(Op::Read, 0, 0, Some(memory.io(512)), 1)).unwrap();
}

#[test]
fn a_request_outside_the_image_fails_and_changes_nothing() {
    for aio in [Aio::Threads, Aio::Ring] {
        let dir = Scratch::new();
        let path = dir.file("disk", 1 << 20);
        let image = Arc::new(Raw::new(open(&path, false)).unwrap());
        let options = Options {
            aio,
            ..Options::default()
        };
        let engine = Engine::new(image, options);
        let mut queue = queue(&engine);
        let mut memory = AlignedBuf::new(4096).unwrap();
        for offset in [
            1 << 20,
            (1 << 20) - 512,
            u64::MAX,
            u64::MAX - 511,
            i64::MAX as u64,
        ] {
            for op in [Op::Read, Op::Write, Op::WriteZeroes { unmap: true }] {
                let data = matches!(op, Op::Read | Op::Write).then(|| memory.io(4096));
                let result = run(&mut queue, request(op, offset, 4096, data, 1));
                assert!(result.is_err(), "{op:?} at {offset}");
            }
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
    }
}

#[test]
fn disks_of_a_group_have_their_limits_together() {
    let meter = Arc::new(Meter::default());
    let engines = [(); 2].map(|()| {
        Engine::sharing(
            Arc::new(Mock::default()),
            Options::default(),
            meter.clone(),
            Arc::default(),
        )
    });
    let mut queues = [queue(&engines[0]), queue(&engines[1])];
    // The next one after it has to wait for more than an hour.
    let read_bytes = Rate {
        average: 1,
        ..Rate::default()
    };
    let limits = Limits {
        read_bytes,
        ..Limits::default()
    };
    engines[0].set_limits(limits).unwrap();
    assert_eq!(engines[1].limits(), limits);
    let mut memory = AlignedBuf::new(4096).unwrap();
    queues[0].submit(request(Op::Read, 0, 0, Some(memory.io(4096)), 1));
    assert!(queues[0].deadline().is_none());
    queues[1].submit(request(Op::Read, 0, 0, Some(memory.io(4096)), 2));
    assert!(queues[1].deadline().is_some(), "the other's read counts");
    for queue in &mut queues {
        assert!(queue.drain(LIMIT, &mut Vec::new()));
    }
}

#[test]
fn limits_hold_back_and_let_go() {
    let engine = Engine::new(Arc::new(Mock::default()), Options::default());
    let mut queue = queue(&engine);
    let rate = Rate {
        average: 1,
        ..Rate::default()
    };
    engine
        .set_limits(Limits {
            read_iops: rate,
            ..Limits::default()
        })
        .unwrap();
    let mut memory = AlignedBuf::new(4096).unwrap();
    let mut done = Vec::new();
    for token in 0..5 {
        queue.submit(request(Op::Read, 0, 0, Some(memory.io(512)), token));
    }
    assert!(queue.deadline().is_some(), "the second has to wait");
    // Writes and flushes pass by.
    queue.submit(request(Op::Write, 0, 0, Some(memory.io(512)), 10));
    queue.submit(request(Op::Flush, 0, 0, None, 11));
    let end = Instant::now() + LIMIT;
    while done.len() < 3 {
        assert!(Instant::now() < end);
        queue.complete(&mut done);
    }
    let mut tokens: Vec<u64> = done.drain(..).map(|one| one.token).collect();
    tokens.sort_unstable();
    assert_eq!(tokens[tokens.len() - 2..], [10, 11]);
    assert!(queue.in_flight() >= 1);
    // Without limits they go at the next look.
    engine.set_limits(Limits::default()).unwrap();
    while queue.in_flight() > 0 {
        assert!(Instant::now() < end);
        if queue.deadline().is_some_and(|at| at > Instant::now()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        queue.complete(&mut done);
    }
    assert!(queue.deadline().is_none());
    // A drain does not wait for them either.
    engine
        .set_limits(Limits {
            total_iops: rate,
            ..Limits::default()
        })
        .unwrap();
    for token in 0..50 {
        queue.submit(request(Op::Read, 0, 0, Some(memory.io(512)), token));
    }
    done.clear();
    assert!(queue.drain(LIMIT, &mut done));
    assert_eq!(done.len(), 50);
    assert_eq!(engine.stats().get(Op::Read).requests, 55);
    assert_eq!(engine.stats().get(Op::Read).bytes, 55 * 512);
}

#[test]
fn a_drain_has_a_limit_and_memory_outlives_what_is_given_up() {
    let mock = Arc::new(Mock {
        slow: Some(Duration::from_millis(200)),
        ..Mock::default()
    });
    let engine = Engine::new(mock, Options::default());
    let keeper = Arc::new(());
    let mut queue = engine.queue(keeper.clone()).unwrap();
    let mut memory = AlignedBuf::new(4096).unwrap();
    queue.submit(request(Op::Read, 0, 0, Some(memory.io(512)), 7));
    let mut done = Vec::new();
    assert!(!queue.drain(Duration::from_millis(20), &mut done));
    assert_eq!((done.len(), queue.in_flight()), (0, 1));
    assert!(Arc::strong_count(&keeper) > 1);
    // Dropping the queue waits for it.
    drop(queue);
    assert_eq!(engine.stats().get(Op::Read).requests, 1);
}

#[test]
fn a_pool_has_as_many_threads_as_it_is_told() {
    let count = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let named = |task: std::io::Result<std::fs::DirEntry>| {
            let name = std::fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
            (name.trim() == "a pool's").then_some(())
        };
        tasks.filter_map(named).count()
    };
    let reaches = |wanted: usize| {
        let until = Instant::now() + Duration::from_secs(20);
        while count() != wanted && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(count(), wanted);
    };
    let pool = Arc::new(Pool::named("a pool's"));
    pool.set_size(3, 5).unwrap();
    reaches(3);
    pool.set_size(3, 2).unwrap();
    reaches(2);
    pool.set_size(0, 0).unwrap();
    reaches(1);
    let (tell, told) = std::sync::mpsc::channel();
    for at in 0..5 {
        let tell = tell.clone();
        pool.run(Box::new(move || tell.send(at).unwrap())).unwrap();
    }
    let mut all: Vec<i32> = told.iter().take(5).collect();
    all.sort_unstable();
    assert_eq!(all, [0, 1, 2, 3, 4]);
}
