use super::*;
use crate::feature;
use crate::testing::{Driver, Machine, MemoryStorage, Subject, Used, conformance};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const CAPACITY: usize = 1 << 20;

#[derive(Debug, Default)]
struct TestHooks(Mutex<Vec<Failure>>);

impl Hooks for TestHooks {
    fn failed(&self, failure: Failure) {
        lock(&self.0).push(failure);
    }
}

struct Disk {
    storage: Arc<MemoryStorage>,
    hooks: Arc<TestHooks>,
    block: Block,
    driver: Driver,
}

fn disk_with(options: Options, features: u64) -> Disk {
    let storage = MemoryStorage::new();
    let hooks = Arc::new(TestHooks::default());
    let mut block = Block::new(options, storage.clone(), hooks.clone()).unwrap();
    let features = features & (block.features() | feature::TRANSPORT);
    let mut driver = Driver::new(&block.queue_sizes(), features);
    block.activate(driver.activation()).unwrap();
    Disk {
        storage,
        hooks,
        block,
        driver,
    }
}

fn disk(options: Options) -> Disk {
    disk_with(options, u64::MAX)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

fn status(used: &Used) -> u8 {
    *used.data.last().unwrap()
}

fn write(driver: &mut Driver, sector: u64, data: &[u8]) -> u8 {
    status(&driver.request(0, &[&header(OUT, sector), data], &[1]))
}

fn read(driver: &mut Driver, sector: u64, len: u32) -> (u8, Vec<u8>) {
    let used = driver.request(0, &[&header(IN, sector)], &[len, 1]);
    assert_eq!(used.len, len + 1);
    (status(&used), used.data[..len as usize].to_vec())
}

#[test]
fn reads_what_was_written() {
    let mut disk = disk(Options::default());
    let data: Vec<u8> = (0..4096).map(|i| (i / 7) as u8).collect();
    assert_eq!(write(&mut disk.driver, 3, &data), 0);
    assert_eq!(read(&mut disk.driver, 3, 4096), (0, data.clone()));
    assert_eq!(read(&mut disk.driver, 5, 512), (0, data[1024..1536].into()));
    // Header and data in odd pieces, status with the data.
    let header = header(IN, 3);
    let used = disk
        .driver
        .request(0, &[&header[..5], &header[5..]], &[100, 411, 2]);
    assert_eq!(used.data[..512], data[..512]);
    assert_eq!(status(&used), 0);
    disk.block.pause();
    assert!(disk.driver.ram.unreported().is_empty());
}

#[test]
fn many_requests_at_a_time_on_several_queues() {
    let mut disk = disk(Options {
        queues: 4,
        ..Options::default()
    });
    for round in 0..50_u64 {
        for queue in 0..4 {
            for i in 0..20_u64 {
                let sector = queue as u64 * 500 + i;
                let data = [(round + i) as u8; 512];
                disk.driver
                    .add_indirect(queue, &[&header(OUT, sector), &data], &[1]);
            }
            disk.driver.kick(queue);
        }
        for queue in 0..4 {
            for _ in 0..20 {
                assert_eq!(status(&disk.driver.wait(queue)), 0);
            }
        }
    }
    let (result, data) = read(&mut disk.driver, 500 * 3 + 19, 512);
    assert_eq!((result, data[0]), (0, 49 + 19));
}

#[test]
fn refuses_what_is_not_on_the_disk() {
    let mut disk = disk(Options {
        logical_block_size: 4096,
        physical_block_size: 4096,
        ..Options::default()
    });
    let end = CAPACITY as u64 / 512;
    assert_eq!(write(&mut disk.driver, end - 8, &[1; 4096]), 0);
    for (sector, len) in [
        (end, 4096),
        (end - 8, 8192),
        (u64::MAX, 4096),
        (u64::MAX / 512, 4096),
        (1, 4096),
        (0, 512),
        (0, 100),
    ] {
        assert_eq!(write(&mut disk.driver, sector, &vec![0; len]), 1);
    }
    assert_eq!(status(&disk.driver.request(0, &[&header(77, 0)], &[1])), 2);
    let state = lock(&disk.storage.state);
    assert_eq!(state.log, [Op::Write]);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut disk = disk(Options {
        read_only: true,
        ..Options::default()
    });
    assert_ne!(disk.block.features() & bits::RO, 0);
    assert_eq!(disk.block.features() & bits::DISCARD, 0);
    assert_eq!(write(&mut disk.driver, 0, &[1; 512]), 1);
    let used = disk
        .driver
        .request(0, &[&header(DISCARD, 0), &range(0, 8, 0)], &[1]);
    assert_eq!(status(&used), 2);
    assert_eq!(read(&mut disk.driver, 0, 512), (0, vec![0; 512]));
    assert!(lock(&disk.storage.state).log.is_empty());
}

#[test]
fn flushes_discards_and_zeroes() {
    let mut disk = disk(Options::default());
    write(&mut disk.driver, 0, &[7; 8192]);
    let request = |driver: &mut Driver, parts: &[&[u8]]| status(&driver.request(0, parts, &[1]));
    let driver = &mut disk.driver;
    assert_eq!(request(driver, &[&header(FLUSH, 0)]), 0);
    let ranges = [range(0, 2, 0), range(4, 1, 0)].concat();
    assert_eq!(request(driver, &[&header(DISCARD, 0), &ranges]), 0);
    let zeroes = [range(8, 1, 1), range(9, 1, 0)].concat();
    assert_eq!(request(driver, &[&header(WRITE_ZEROES, 0), &zeroes]), 0);
    // Unmap means nothing for discards, other flags nothing at all.
    for (kind, flags) in [(DISCARD, 1), (WRITE_ZEROES, 2), (DISCARD, 1 << 31)] {
        assert_eq!(request(driver, &[&header(kind, 0), &range(0, 1, flags)]), 2);
    }
    // Beyond the end, too many, half a range, none.
    let beyond = range(CAPACITY as u64 / 512, 1, 0);
    let many = range(0, 1, 0).repeat(17);
    for bad in [&beyond[..], &many, &range(0, 1, 0)[..15], &[]] {
        assert_eq!(request(driver, &[&header(DISCARD, 0), bad]), 1);
    }
    let empty = range(5, 0, 0);
    assert_eq!(request(driver, &[&header(DISCARD, 0), &empty]), 0);
    let state = lock(&disk.storage.state);
    let expected = [
        Op::Write,
        Op::Flush,
        Op::Discard,
        Op::Discard,
        Op::WriteZeroes { unmap: true },
        Op::WriteZeroes { unmap: false },
    ];
    assert_eq!(state.log, expected);
    assert_eq!(state.data[..1024], [0; 1024]);
    assert_eq!(state.data[1024..2048], [7; 1024]);
}

#[test]
fn tells_its_serial() {
    let mut disk = disk(Options {
        serial: "WD-1234567890-abcdefghij".into(),
        ..Options::default()
    });
    let used = disk.driver.request(0, &[&header(GET_ID, 0)], &[20, 1]);
    assert_eq!(&used.data[..20], b"WD-1234567890-abcdef");
    assert_eq!(status(&used), 0);
    let used = disk.driver.request(0, &[&header(GET_ID, 0)], &[4, 1]);
    assert_eq!(&used.data[..4], b"WD-1");
}

fn field(block: &Block, offset: u32, len: usize) -> u64 {
    let mut bytes = [0; 8];
    block.read_config(offset, &mut bytes[..len]);
    u64::from_le_bytes(bytes)
}

#[test]
fn its_configuration_says_what_it_is() {
    let disk = disk(Options {
        queues: 2,
        queue_size: 128,
        physical_block_size: 4096,
        opt_io_size: 65536,
        discard_granularity: 65536,
        ..Options::default()
    });
    let block = &disk.block;
    assert_eq!(field(block, 0, 8), CAPACITY as u64 / 512);
    assert_eq!(field(block, 12, 4), 126, "seg_max");
    assert_eq!(field(block, 20, 4), 512, "blk_size");
    assert_eq!(field(block, 24, 1), 3, "physical_block_exp");
    assert_eq!(field(block, 26, 2), 8, "min_io_size");
    assert_eq!(field(block, 28, 4), 128, "opt_io_size");
    assert_eq!(field(block, 32, 1), 1, "writeback");
    assert_eq!(field(block, 34, 2), 2, "num_queues");
    assert_eq!(field(block, 44, 4), 128, "discard_sector_alignment");
    assert_eq!(field(block, 500, 8), 0);
    for bad in [
        Options {
            queues: 0,
            ..Options::default()
        },
        Options {
            queue_size: 100,
            ..Options::default()
        },
        Options {
            logical_block_size: 256,
            ..Options::default()
        },
        Options {
            logical_block_size: 4096,
            ..Options::default()
        },
    ] {
        let hooks = Arc::new(TestHooks::default());
        assert!(Block::new(bad, MemoryStorage::new(), hooks).is_err());
    }
}

#[test]
fn the_guest_can_turn_the_write_cache_off_until_it_is_reset() {
    let mut disk = disk(Options::default());
    disk.block.write_config(config::WRITEBACK, &[0]);
    assert!(disk.storage.writethrough());
    assert_eq!(field(&disk.block, 32, 1), 0);
    disk.block.pause();
    let saved = disk.block.save().unwrap();
    disk.block.reset();
    assert!(!disk.storage.writethrough());
    disk.block.load(&saved, None).unwrap();
    assert!(disk.storage.writethrough());
    // A driver that knows no flush gets durable writes.
    let disk = disk_with(Options::default(), !(bits::FLUSH | bits::CONFIG_WCE));
    assert!(disk.storage.writethrough());
}

#[test]
fn a_new_size_is_told_and_used() {
    let mut disk = disk(Options::default());
    assert_eq!(write(&mut disk.driver, 2047, &[1; 512]), 0);
    disk.block.handle().set_capacity(512 * 1000);
    let seen = disk.driver.interrupt.wait("config", |seen| seen.config > 0);
    assert_eq!(seen.config, 1);
    assert_eq!(field(&disk.block, 0, 8), 1000);
    assert_eq!(write(&mut disk.driver, 2047, &[1; 512]), 1);
}

#[test]
fn failures_go_by_the_policy() {
    use OnError::{Enospace, Ignore, Report, Stop};
    for (policy, errno, expected, status) in [
        (Report, libc::EIO, Action::Report, 1),
        (Ignore, libc::EIO, Action::Ignore, 0),
        (Enospace, libc::EIO, Action::Report, 1),
        (Enospace, libc::ENOSPC, Action::Stop, 0),
        (Stop, libc::EIO, Action::Stop, 0),
    ] {
        let policy = Policy {
            read: Report,
            write: policy,
        };
        let mut disk = disk(Options {
            policy,
            ..Options::default()
        });
        disk.storage.fail(Some(errno));
        disk.driver.add(0, &[&header(OUT, 8), &[5; 512]], &[1]);
        disk.driver.kick(0);
        if expected == Action::Stop {
            while lock(&disk.hooks.0).is_empty() {
                std::thread::yield_now();
            }
            disk.block.pause();
            disk.storage.fail(None);
            disk.block.resume();
        }
        let used = disk.driver.wait(0);
        assert_eq!(used.data, [status]);
        let failure = Failure {
            write: true,
            errno,
            action: expected,
        };
        assert_eq!(*lock(&disk.hooks.0), [failure]);
        let written = lock(&disk.storage.state).data[8 * 512];
        let reached = expected == Action::Stop;
        assert_eq!(written, if reached { 5 } else { 0 });
        disk.storage.fail(Some(errno));
        assert_eq!(read(&mut disk.driver, 0, 512).0, 1);
    }
}

#[test]
fn what_waits_after_a_failure_is_saved_and_done_by_the_next_device() {
    let options = Options {
        policy: Policy {
            read: OnError::Stop,
            write: OnError::Stop,
        },
        ..Options::default()
    };
    let mut disk = disk(options.clone());
    disk.storage.fail(Some(libc::ENOSPC));
    for i in 0..4 {
        let data = [i as u8 + 1; 512];
        disk.driver.add(0, &[&header(OUT, i), &data], &[1]);
    }
    disk.driver.kick(0);
    while lock(&disk.hooks.0).is_empty() {
        std::thread::yield_now();
    }
    disk.block.pause();
    let saved = disk.block.save().unwrap();
    let setups = vec![Some(disk.driver.queues[0].setup)];
    disk.block.reset();
    disk.storage.fail(None);
    let mut next = Block::new(options, disk.storage.clone(), disk.hooks.clone()).unwrap();
    let activation = disk.driver.reactivation(&setups);
    next.load(&saved, Some(activation)).unwrap();
    assert_eq!(next.save().unwrap(), saved);
    next.resume();
    for _ in 0..4 {
        assert_eq!(status(&disk.driver.wait(0)), 0);
    }
    let state = lock(&disk.storage.state);
    for i in 0..4 {
        assert_eq!(state.data[i * 512], i as u8 + 1);
    }
}

#[test]
fn a_request_without_header_or_status_breaks_the_queue() {
    for (readable, writable) in [(&[0_u8; 8][..], &[1_u32][..]), (&[0; 16], &[])] {
        let mut disk = disk(Options::default());
        disk.driver.add(0, &[readable], writable);
        disk.driver.kick(0);
        disk.driver
            .interrupt
            .wait("needs reset", |seen| seen.needs_reset.is_some());
    }
}

#[test]
fn a_driver_cannot_have_more_in_flight_than_its_queue_has_entries() {
    let mut disk = disk(Options {
        queue_size: 8,
        ..Options::default()
    });
    disk.storage.hold();
    let head = disk.driver.add(0, &[&header(FLUSH, 0)], &[1]);
    disk.driver.kick(0);
    // The same chain again and again, while the device has it.
    for _ in 0..20 {
        disk.driver.offer(0, head);
        disk.driver.ring(0);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    disk.driver
        .interrupt
        .wait("needs reset", |seen| seen.needs_reset.is_some());
    assert!(lock(&disk.storage.state).held.len() <= 8);
    disk.storage.let_go();
}

struct BlockSubject(Arc<MemoryStorage>);

impl Subject for BlockSubject {
    fn new() -> Self {
        Self(MemoryStorage::new())
    }

    fn device(&self) -> Box<dyn Device> {
        let options = Options {
            queues: 2,
            queue_size: 64,
            ..Options::default()
        };
        let hooks = Arc::new(TestHooks::default());
        Box::new(Block::new(options, self.0.clone(), hooks).unwrap())
    }

    fn exercise(&self, machine: &mut Machine, _fresh: bool) {
        for queue in 0..2 {
            let data = [queue as u8 + 1; 1024];
            let used = machine
                .driver
                .request(queue, &[&header(OUT, 10), &data], &[1]);
            assert_eq!(used.data, [0]);
            let used = machine
                .driver
                .request(queue, &[&header(IN, 10)], &[1024, 1]);
            assert_eq!(used.data[..1024], data);
            assert_eq!(used.data[1024], 0);
        }
    }

    fn begin(&self, machine: &mut Machine) {
        self.0.hold();
        for queue in 0..2 {
            for i in 0..10 {
                machine
                    .driver
                    .add(queue, &[&header(OUT, 100 + i), &[9; 512]], &[1]);
                machine.driver.add(queue, &[&header(IN, i)], &[512, 1]);
            }
            machine.driver.kick(queue);
        }
    }

    fn let_go(&self) {
        self.0.let_go();
    }

    fn finish(&self, machine: &mut Machine) {
        for queue in 0..2 {
            for _ in 0..20 {
                assert_eq!(status(&machine.driver.wait(queue)), 0);
            }
        }
    }
}

conformance!(BlockSubject);
