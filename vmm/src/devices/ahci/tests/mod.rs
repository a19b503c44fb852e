//! A controller with drives whose storage is memory, and a guest that drives it by hand.

#![allow(
    clippy::cast_possible_truncation,
    reason = "addresses and registers of a small machine"
)]

mod atapi;
mod disk;
mod hostile;
mod link;
mod ram;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use virtio::block::{
    Completion, Failure, Hooks, OnError, Op, Policy, Request, Storage, StorageQueue,
};
use virtio::pci::{Function, Host, IntxLine, MsiSink};
use virtio::scsi::DriveHooks;
use virtio::{GuestMemory, worker};

use super::{Ahci, Drive, DriveOptions};
use crate::devices::lock;
use ram::TestRam;

const CAPACITY: u64 = 1 << 20;
const RAM: usize = 4 << 20;
/// Where data is, below which are lists and tables.
const DATA: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(20);

// Registers of a port.
const IS: u32 = 0x10;
const IE: u32 = 0x14;
const CMD: u32 = 0x18;
const TFD: u32 = 0x20;
const SIG: u32 = 0x24;
const SSTS: u32 = 0x28;
const SCTL: u32 = 0x2c;
const SERR: u32 = 0x30;
const SACT: u32 = 0x34;
const CI: u32 = 0x38;

const ST: u32 = 1;
const FRE: u32 = 1 << 4;
const CR: u32 = 1 << 15;
const TFES: u32 = 1 << 30;

/// A request that is kept until it is let go of.
#[derive(Debug)]
struct Owned {
    op: Op,
    offset: u64,
    len: u64,
    buffers: Vec<(usize, usize)>,
    token: u64,
    outbox: Arc<Outbox>,
}

#[derive(Debug)]
struct Outbox {
    done: Mutex<Vec<Completion>>,
    fd: EventFd,
    _memory: Arc<dyn GuestMemory>,
}

#[derive(Debug, Default)]
struct StoreState {
    data: Vec<u8>,
    hold: bool,
    held: Vec<Owned>,
    /// What was asked for so far, without reads.
    log: Vec<Op>,
    errno: Option<i32>,
}

/// A drive's content in memory. It can hold requests back, and fail.
#[derive(Debug, Default)]
struct Store {
    state: Mutex<StoreState>,
    capacity: AtomicU64,
    writethrough: AtomicBool,
}

impl Store {
    fn new(capacity: u64) -> Arc<Self> {
        let store = Self::default();
        lock(&store.state).data = (0..capacity).map(|at| (at / 512 + at % 7) as u8).collect();
        store.capacity.store(capacity, Ordering::Relaxed);
        Arc::new(store)
    }

    fn data(&self) -> Vec<u8> {
        lock(&self.state).data.clone()
    }

    fn log(&self) -> Vec<Op> {
        std::mem::take(&mut lock(&self.state).log)
    }

    fn hold(&self) {
        lock(&self.state).hold = true;
    }

    fn held(&self) -> usize {
        lock(&self.state).held.len()
    }

    fn let_go(&self) {
        let mut state = lock(&self.state);
        state.hold = false;
        for request in std::mem::take(&mut state.held) {
            state.perform(&request);
        }
    }

    fn fail(&self, errno: Option<i32>) {
        lock(&self.state).errno = errno;
    }
}

impl StoreState {
    fn perform(&mut self, request: &Owned) {
        let result = match self.errno {
            Some(errno) => Err(errno),
            None => {
                self.change(request);
                Ok(())
            }
        };
        let token = request.token;
        lock(&request.outbox.done).push(Completion { token, result });
        worker::signal(&request.outbox.fd);
    }

    fn change(&mut self, request: &Owned) {
        let mut at = request.offset as usize;
        if request.op != Op::Read {
            self.log.push(request.op);
        }
        match request.op {
            Op::Read | Op::Write => {
                for &(base, len) in &request.buffers {
                    let place = &mut self.data[at..at + len];
                    // SAFETY: guest RAM that the port keeps until the completion is taken.
                    unsafe {
                        if request.op == Op::Read {
                            std::ptr::copy_nonoverlapping(place.as_ptr(), base as *mut u8, len);
                        } else {
                            let from = base as *const u8;
                            std::ptr::copy_nonoverlapping(from, place.as_mut_ptr(), len);
                        }
                    }
                    at += len;
                }
                assert_eq!(at as u64, request.offset + request.len);
            }
            Op::WriteZeroes { .. } | Op::Discard => {
                self.data[at..at + request.len as usize].fill(0);
            }
            Op::Flush => {}
        }
    }
}

#[derive(Debug)]
struct StoreHandle(Arc<Store>);

impl Storage for StoreHandle {
    fn capacity(&self) -> u64 {
        self.0.capacity.load(Ordering::Relaxed)
    }

    fn queue(&self, memory: Arc<dyn GuestMemory>) -> io::Result<Box<dyn StorageQueue>> {
        let outbox = Arc::new(Outbox {
            done: Mutex::default(),
            fd: worker::eventfd()?,
            _memory: memory,
        });
        let store = self.0.clone();
        Ok(Box::new(StoreQueue { store, outbox }))
    }

    fn writethrough(&self) -> bool {
        self.0.writethrough.load(Ordering::Relaxed)
    }

    fn set_writethrough(&self, on: bool) -> io::Result<()> {
        self.0.writethrough.store(on, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Debug)]
struct StoreQueue {
    store: Arc<Store>,
    outbox: Arc<Outbox>,
}

impl StorageQueue for StoreQueue {
    fn submit(&mut self, request: &Request<'_>) {
        let buffers = request.buffers.iter();
        let owned = Owned {
            op: request.op,
            offset: request.offset,
            len: request.len,
            buffers: buffers.map(|b| (b.iov_base as usize, b.iov_len)).collect(),
            token: request.token,
            outbox: self.outbox.clone(),
        };
        let mut state = lock(&self.store.state);
        if state.hold {
            state.held.push(owned);
        } else {
            state.perform(&owned);
        }
    }

    fn complete(&mut self, done: &mut Vec<Completion>) {
        worker::take(&self.outbox.fd);
        done.append(&mut lock(&self.outbox.done));
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.outbox.fd.as_fd()
    }
}

/// What the machine hears.
#[derive(Debug, Default)]
struct Ears {
    messages: Mutex<Vec<(u64, u32)>>,
    pin: AtomicBool,
    trays: Mutex<Vec<bool>>,
    failures: Mutex<Vec<Failure>>,
}

#[derive(Debug)]
struct Ear(Arc<Ears>);

impl MsiSink for Ear {
    fn send(&self, address: u64, data: u32) {
        lock(&self.0.messages).push((address, data));
    }
}

impl IntxLine for Ear {
    fn set(&self, asserted: bool) {
        self.0.pin.store(asserted, Ordering::SeqCst);
    }
}

impl Hooks for Ear {
    fn failed(&self, failure: Failure) {
        lock(&self.0.failures).push(failure);
    }
}

impl DriveHooks for Ear {
    fn tray_moved(&self, open: bool) {
        lock(&self.0.trays).push(open);
    }
}

/// A controller with a disk at port 0, a CD-ROM drive at port 1, and nothing at port 2.
struct Rig {
    ahci: Ahci,
    ram: Arc<TestRam>,
    disk: Arc<Store>,
    cd: Arc<Store>,
    drives: [Arc<Drive>; 2],
    ears: Arc<Ears>,
}

impl Rig {
    fn new() -> Self {
        Self::with(Policy::default())
    }

    fn with(policy: Policy) -> Self {
        Self::on(policy, Store::new(CAPACITY), Store::new(CAPACITY))
    }

    /// The same, of this content.
    fn on(policy: Policy, disk: Arc<Store>, cd: Arc<Store>) -> Self {
        let ears = Arc::new(Ears::default());
        let ram = Arc::new(TestRam::new(RAM));
        let drive = |store: &Arc<Store>, cdrom| {
            let options = DriveOptions {
                cdrom,
                read_only: cdrom,
                serial: "SN-1".into(),
                physical_block_size: 512,
                policy,
                starter: None,
                medium: true,
            };
            let storage = Arc::new(StoreHandle(store.clone()));
            Drive::new(options, storage, Arc::new(Ear(ears.clone())))
        };
        let drives = [drive(&disk, false), drive(&cd, true)];
        let host = Host {
            msi: Arc::new(Ear(ears.clone())),
            intx: Arc::new(Ear(ears.clone())),
            ..crate::pci::testing::host()
        };
        let seats = drives.iter().cloned().map(Some).chain([None]).collect();
        let ahci = Ahci::new(seats, ram.clone(), host).unwrap();
        Self {
            ahci,
            ram,
            disk,
            cd,
            drives,
            ears,
        }
    }

    /// A running one: memory and bus mastering on, ports started, all interrupts on.
    fn running() -> Self {
        Self::new().run()
    }

    fn run(self) -> Self {
        self.ahci.write_config(4, 2, 6);
        self.write(4, 1 << 1);
        for port in 0..2 {
            self.start(port);
        }
        self
    }

    fn read(&self, offset: u32) -> u32 {
        self.ahci.read_bar(5, offset, 4)
    }

    fn write(&self, offset: u32, value: u32) {
        self.ahci.write_bar(5, offset, 4, value);
    }

    fn get(&self, port: u32, register: u32) -> u32 {
        self.read(0x100 + 0x80 * port + register)
    }

    fn set(&self, port: u32, register: u32, value: u32) {
        self.write(0x100 + 0x80 * port + register, value);
    }

    /// Where a port's list is; 1 KiB later frames come in.
    fn list(port: u32) -> u64 {
        0x2_0000 * (u64::from(port) + 1)
    }

    fn table(port: u32, slot: u32) -> u64 {
        Self::list(port) + 0x1000 + 0x800 * u64::from(slot)
    }

    fn start(&self, port: u32) {
        self.set(port, 0x00, Self::list(port) as u32);
        self.set(port, 0x08, (Self::list(port) + 0x400) as u32);
        self.set(port, IE, u32::MAX);
        self.set(port, CMD, FRE);
        self.set(port, CMD, FRE | ST);
    }

    fn stop(&self, port: u32) {
        self.set(port, CMD, FRE);
        self.wait("the port's end", || self.get(port, CMD) & CR == 0);
    }

    /// Puts a command into a slot.
    fn put(&self, port: u32, slot: u32, frame: &[u8], packet: &[u8], regions: &[(u64, u32)]) {
        let table = Self::table(port, slot);
        let flags = 5 | if packet.is_empty() { 0 } else { 1 << 5 } | (regions.len() as u32) << 16;
        let header = [flags, 0, table as u32, 0].map(u32::to_le_bytes).concat();
        self.ram
            .write(Self::list(port) + 32 * u64::from(slot), &header);
        let mut whole = [0; 0x80];
        whole[..frame.len()].copy_from_slice(frame);
        whole[0x40..0x40 + packet.len()].copy_from_slice(packet);
        self.ram.write(table, &whole);
        for (at, (address, len)) in (table + 0x80..).step_by(16).zip(regions) {
            let words = [*address as u32, 0, 0, len - 1].map(u32::to_le_bytes);
            self.ram.write(at, &words.concat());
        }
    }

    fn count(&self, port: u32, slot: u32) -> u32 {
        let at = Self::list(port) + 32 * u64::from(slot) + 4;
        u32::from_le_bytes(self.ram.read(at, 4).try_into().unwrap())
    }

    fn frame(&self, port: u32, at: u64, len: u64) -> Vec<u8> {
        self.ram.read(Self::list(port) + 0x400 + at, len)
    }

    #[track_caller]
    fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < LIMIT, "timed out waiting for {what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Has a command in slot 0 carried out; status and error, and its data.
    fn carry_out(&self, port: u32, frame: &[u8], packet: &[u8], len: u32) -> (u8, u8, Vec<u8>) {
        let regions = [(DATA, len.max(1))];
        let regions = if len == 0 { &[][..] } else { &regions };
        self.put(port, 0, frame, packet, regions);
        self.set(port, IS, u32::MAX);
        self.set(port, CI, 1);
        self.wait("a command", || {
            self.get(port, CI) & 1 == 0 || self.get(port, IS) & TFES != 0
        });
        let tfd = self.get(port, TFD);
        if self.get(port, IS) & TFES != 0 {
            self.stop(port);
            self.set(port, CMD, FRE | ST);
        }
        let data = self.ram.read(DATA, u64::from(len));
        (tfd as u8, (tfd >> 8) as u8, data)
    }

    /// A packet's data; its sense if it fails.
    fn packet(&self, packet: &[u8], len: u32) -> Result<Vec<u8>, (u8, u8, u8)> {
        self.ram.write(DATA, &vec![0xee; len as usize]);
        let (status, _, data) = self.carry_out(1, &ata(0xa0, 0, 0, 1), packet, len);
        if status & 1 == 0 {
            let count = self.count(1, 0) as usize;
            return Ok(data[..count].to_vec());
        }
        let sense = [3, 0, 0, 0, 18, 0];
        let (status, _, sense) = self.carry_out(1, &ata(0xa0, 0, 0, 1), &sense, 18);
        assert_eq!(status & 1, 0);
        Err((sense[2], sense[12], sense[13]))
    }
}

/// A command's frame.
fn ata(command: u8, lba: u64, count: u16, features: u16) -> [u8; 20] {
    let [a0, a1, a2, a3, a4, a5, ..] = lba.to_le_bytes();
    let [f0, f1] = features.to_le_bytes();
    let [c0, c1] = count.to_le_bytes();
    [
        0x27, 0x80, command, f0, a0, a1, a2, 0x40, a3, a4, a5, f1, c0, c1, 0, 0, 0, 0, 0, 0,
    ]
}

/// A queued one.
fn queued(command: u8, lba: u64, sectors: u16, tag: u32) -> [u8; 20] {
    ata(command, lba, (tag as u16) << 3, sectors)
}

fn stop_for_errors() -> Policy {
    Policy {
        read: OnError::Stop,
        write: OnError::Stop,
    }
}
