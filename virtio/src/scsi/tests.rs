//! virtio-scsi against its driver.

mod cdrom;
mod commands;
mod hostile;
mod tasks;
mod units;

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::*;
use crate::block::{Failure, Op, Policy};
use crate::feature;
use crate::testing::{Driver, Machine, MemoryStorage, Subject, Used, conformance};

/// What hooks heard.
#[derive(Debug, Default)]
struct Ear {
    failures: Mutex<Vec<Failure>>,
    trays: Mutex<Vec<bool>>,
    gone: Mutex<u32>,
    changed: Condvar,
}

impl Hooks for Ear {
    fn failed(&self, failure: Failure) {
        lock(&self.failures).push(failure);
    }
}

impl DriveHooks for Ear {
    fn tray_moved(&self, open: bool) {
        lock(&self.trays).push(open);
    }

    fn let_go(&self) {
        *lock(&self.gone) += 1;
        self.changed.notify_all();
    }
}

impl Ear {
    /// Waits until the unit has been let go of.
    fn wait_until_gone(&self) {
        let gone = lock(&self.gone);
        let limit = Duration::from_secs(20);
        let result = self
            .changed
            .wait_timeout_while(gone, limit, |gone| *gone == 0);
        assert!(!result.unwrap().1.timed_out(), "nobody let go of the unit");
    }
}

const DISK: Address = (0, 0);
const OTHER: Address = (0, 300);
const CD: Address = (2, 1);

/// A unit's content, who hears of it, and the unit.
struct Drive {
    storage: Arc<MemoryStorage>,
    ear: Arc<Ear>,
    unit: Arc<Unit>,
}

fn drive(options: UnitOptions) -> Drive {
    let storage = MemoryStorage::new();
    let ear = Arc::new(Ear::default());
    let unit = Unit::new(options, storage.clone(), ear.clone()).unwrap();
    Drive { storage, ear, unit }
}

fn cdrom_options() -> UnitOptions {
    UnitOptions {
        cdrom: true,
        medium: true,
        ..UnitOptions::default()
    }
}

struct Rig {
    scsi: Scsi,
    driver: Driver,
    disk: Drive,
    other: Drive,
    cd: Drive,
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Outcome {
    response: u8,
    status: u8,
    sense: (u8, u8, u8),
    residual: u32,
    data: Vec<u8>,
}

fn outcome(used: &Used) -> Outcome {
    let word = |at: usize| u32::from_le_bytes(used.data[at..at + 4].try_into().unwrap());
    let sense = &used.data[12..108];
    let filled = word(0) > 0;
    assert!(!filled || word(0) == 18 && sense[0] == 0x70);
    assert_eq!(filled, used.data[10] == 2);
    Outcome {
        response: used.data[11],
        status: used.data[10],
        sense: (sense[2], sense[12], sense[13]),
        residual: word(4),
        data: used.data[108..].to_vec(),
    }
}

fn head(address: Address, tag: u64, cdb: &[u8]) -> Vec<u8> {
    let mut bytes = request::name(address).to_vec();
    bytes.extend(tag.to_le_bytes());
    bytes.extend([0; 3]);
    bytes.extend(cdb);
    bytes.resize(51, 0);
    bytes
}

/// Adds a command to request queue `queue`, without a kick.
fn add(
    driver: &mut Driver,
    queue: usize,
    address: Address,
    cdb: &[u8],
    out: &[u8],
    room: u32,
) -> u16 {
    add_tagged(driver, queue, address, 77, cdb, out, room)
}

fn add_tagged(
    driver: &mut Driver,
    queue: usize,
    address: Address,
    tag: u64,
    cdb: &[u8],
    out: &[u8],
    room: u32,
) -> u16 {
    let head = head(address, tag, cdb);
    match (out.is_empty(), room) {
        (true, 0) => driver.add(queue, &[&head], &[108]),
        (true, _) => driver.add(queue, &[&head], &[108, room]),
        (false, _) => driver.add(queue, &[&head, out], &[108]),
    }
}

impl Rig {
    fn with(options: ScsiOptions, disk: UnitOptions) -> Self {
        let mut scsi = Scsi::new(options).unwrap();
        let (disk, other) = (drive(disk), drive(UnitOptions::default()));
        let cd = drive(cdrom_options());
        let handle = scsi.handle();
        for (address, drive) in [(DISK, &disk), (OTHER, &other), (CD, &cd)] {
            handle.plug(address, &drive.unit).unwrap();
        }
        let features = scsi.features() | feature::TRANSPORT;
        let mut driver = Driver::new(&scsi.queue_sizes(), features);
        scsi.activate(driver.activation()).unwrap();
        Self {
            scsi,
            driver,
            disk,
            other,
            cd,
        }
    }

    /// Fresh from its power-on.
    fn new() -> Self {
        Self::with(ScsiOptions::default(), UnitOptions::default())
    }

    /// The guest knows of the power-on.
    fn ready(self) -> Self {
        let mut rig = self;
        for address in [DISK, OTHER, CD] {
            let told = rig.run(address, &[0; 6], &[], 0);
            assert_eq!((told.status, told.sense), (2, (6, 0x29, 0)));
        }
        rig
    }

    fn run(&mut self, address: Address, cdb: &[u8], out: &[u8], room: u32) -> Outcome {
        add(&mut self.driver, 2, address, cdb, out, room);
        self.driver.kick(2);
        outcome(&self.driver.wait(2))
    }

    /// What a command that ends well says, as much as there is of it.
    fn get(&mut self, address: Address, cdb: &[u8], room: u32) -> Vec<u8> {
        let mut got = self.run(address, cdb, &[], room);
        assert_eq!((got.response, got.status), (0, 0), "{cdb:x?}: {got:?}");
        got.data.truncate((room - got.residual) as usize);
        got.data
    }

    /// A command that does not end well.
    fn refused(&mut self, address: Address, cdb: &[u8], out: &[u8], room: u32) -> (u8, u8, u8) {
        let got = self.run(address, cdb, out, room);
        assert_eq!((got.response, got.status), (0, 2), "{cdb:x?}: {got:?}");
        got.sense
    }

    fn good(&mut self, address: Address, cdb: &[u8], out: &[u8]) {
        let got = self.run(address, cdb, out, 0);
        assert_eq!((got.response, got.status), (0, 0), "{cdb:x?}: {got:?}");
    }

    /// Buffers for `count` events.
    fn listen(&mut self, count: usize) {
        for _ in 0..count {
            self.driver.add(1, &[], &[16]);
        }
        self.driver.kick(1);
    }

    /// The next event: what, whom, why.
    fn event(&mut self) -> (u32, [u8; 8], u32) {
        event(&self.driver.wait(1))
    }
}

fn event(used: &Used) -> (u32, [u8; 8], u32) {
    let word = |at: usize| u32::from_le_bytes(used.data[at..at + 4].try_into().unwrap());
    (word(0), used.data[4..12].try_into().unwrap(), word(12))
}

fn read_10(block: u32, count: u16) -> Vec<u8> {
    let mut cdb = vec![0x28, 0];
    cdb.extend(block.to_be_bytes());
    cdb.push(0);
    cdb.extend(count.to_be_bytes());
    cdb.push(0);
    cdb
}

fn write_10(block: u32, count: u16) -> Vec<u8> {
    let mut cdb = read_10(block, count);
    cdb[0] = 0x2a;
    cdb
}

struct ScsiSubject {
    storages: [Arc<MemoryStorage>; 2],
    cd: Arc<MemoryStorage>,
}

impl Subject for ScsiSubject {
    fn new() -> Self {
        Self {
            storages: [MemoryStorage::new(), MemoryStorage::new()],
            cd: MemoryStorage::new(),
        }
    }

    fn device(&self) -> Box<dyn Device> {
        let scsi = Scsi::new(ScsiOptions {
            queues: 2,
            queue_size: 64,
            ..ScsiOptions::default()
        });
        let scsi = scsi.unwrap();
        let handle = scsi.handle();
        let ear = Arc::new(Ear::default());
        let plug = |address, storage: &Arc<MemoryStorage>, options| {
            let unit = Unit::new(options, storage.clone(), ear.clone()).unwrap();
            handle.plug(address, &unit).unwrap();
        };
        plug(DISK, &self.storages[0], UnitOptions::default());
        plug(OTHER, &self.storages[1], UnitOptions::default());
        plug(CD, &self.cd, cdrom_options());
        Box::new(scsi)
    }

    fn exercise(&self, machine: &mut Machine, fresh: bool) {
        let driver = &mut machine.driver;
        let mut run = |queue, address, cdb: &[u8], out: &[u8], room| {
            add(driver, queue, address, cdb, out, room);
            driver.kick(queue);
            outcome(&driver.wait(queue))
        };
        if fresh {
            for address in [DISK, OTHER, CD] {
                // Units that have been reset along with the device say so.
                let told = run(2, address, &[0; 6], &[], 0);
                assert!([(6, 0x29, 0), (0, 0, 0)].contains(&told.sense));
            }
        }
        for queue in [2, 3] {
            for address in [DISK, OTHER] {
                let data = [queue as u8 + address.1 as u8; 1024];
                let wrote = run(queue, address, &write_10(10, 2), &data, 0);
                assert_eq!((wrote.response, wrote.status, wrote.residual), (0, 0, 0));
                let read = run(queue, address, &read_10(10, 2), &[], 1024);
                assert_eq!((read.response, read.status, read.residual), (0, 0, 0));
                assert_eq!(read.data, data);
            }
            assert_eq!(run(queue, CD, &read_10(3, 1), &[], 2048).status, 0);
            // Nobody there; nobody here.
            assert_eq!(run(queue, (9, 0), &[0; 6], &[], 0).response, 3);
            assert_eq!(run(queue, (2, 0), &[0; 6], &[], 0).sense, (5, 0x25, 0));
        }
        let reset = tasks::function(5, DISK, 0);
        assert_eq!(machine.driver.request(0, &[&reset], &[1]).data, [0]);
        let told = {
            add(&mut machine.driver, 2, DISK, &[0; 6], &[], 0);
            machine.driver.kick(2);
            outcome(&machine.driver.wait(2))
        };
        assert_eq!(told.sense, (6, 0x29, 0));
    }

    fn begin(&self, machine: &mut Machine) {
        self.storages.iter().for_each(|storage| storage.hold());
        let driver = &mut machine.driver;
        for queue in [2, 3] {
            for i in 0..8 {
                add(driver, queue, DISK, &write_10(100 + i, 1), &[9; 512], 0);
                add(driver, queue, OTHER, &read_10(i, 1), &[], 512);
            }
            driver.kick(queue);
        }
    }

    fn let_go(&self) {
        self.storages.iter().for_each(|storage| storage.let_go());
    }

    fn finish(&self, machine: &mut Machine) {
        for queue in [2, 3] {
            for _ in 0..16 {
                let got = outcome(&machine.driver.wait(queue));
                assert_eq!((got.response, got.status), (0, 0));
            }
        }
    }

    fn hostile_queue(&self) -> usize {
        2
    }
}

conformance!(ScsiSubject);
