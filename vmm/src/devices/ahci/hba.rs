//! The controller's registers (AHCI 1.3.1, 3), as the guest and the drives' threads change them.

use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};
use virtio::pci::Core;
use virtio::{DeviceError, GuestMemory, worker};

use super::drive::Drive;
use super::fis::{self, BSY, DRQ, Registers};
use super::table;
use crate::devices::lock;
use crate::num::{low8, low32};

/// Command slots of a port.
pub const SLOTS: u8 = 32;
/// Where ports' registers begin, and how far they are apart.
const PORTS: u32 = 0x100;
const PORT: u32 = 0x80;

/// 64-bit addresses, native command queuing, command list override, 6 Gbit/s, AHCI only.
const CAP: u32 = 1 << 31 | 1 << 30 | 1 << 24 | 3 << 20 | 1 << 18 | (SLOTS as u32 - 1) << 8;
const VERSION: u32 = 0x0001_0301;

// Global control.
const GHC_RESET: u32 = 1 << 0;
const GHC_INTERRUPT: u32 = 1 << 1;
const GHC_AHCI: u32 = 1 << 31;

// PxCMD.
const START: u32 = 1 << 0;
/// Spun up, powered on: always.
const UP: u32 = 1 << 1 | 1 << 2;
const OVERRIDE: u32 = 1 << 3;
const RECEIVE: u32 = 1 << 4;
const SLOT_SHIFT: u32 = 8;
const SLOT_MASK: u32 = 0x1f << SLOT_SHIFT;
const RECEIVING: u32 = 1 << 14;
const RUNNING: u32 = 1 << 15;
/// What is only remembered: ATAPI, and what the activity light does.
const KEPT: u32 = 1 << 24 | 1 << 25;

// PxIS.
const IS_DEVICE: u32 = 1 << 0;
const IS_PIO: u32 = 1 << 1;
const IS_SET_BITS: u32 = 1 << 3;
const IS_DESCRIPTOR: u32 = 1 << 5;
const IS_CONNECT: u32 = 1 << 6;
const IS_PHY: u32 = 1 << 22;
const IS_OVERFLOW: u32 = 1 << 24;
const IS_BUS: u32 = 1 << 29;
const IS_TASK_FILE: u32 = 1 << 30;
const IS_ALL: u32 = 0xfdc0_00ff;

// PxSERR: the link has come up, the line has changed.
const ERR_EXCHANGED: u32 = 1 << 26;
const ERR_PHY: u32 = 1 << 16;

/// A link that is up: 6 Gbit/s, active.
const LINK_UP: u32 = 0x133;
const LINK_OFF: u32 = 4;
const DETECT: u32 = 0xf;
/// Nobody answers.
const NOTHING: u32 = 0x7f;

// Where frames are received.
const AT_PIO: u64 = 0x20;
const AT_REGISTERS: u64 = 0x40;
const AT_SET_BITS: u64 = 0x58;

/// A port's registers, and what of the guest's view they don't show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRegisters {
    list: u64,
    frames: u64,
    interrupts: u32,
    enabled: u32,
    command: u32,
    task_file: u32,
    signature: u32,
    link: u32,
    control: u32,
    errors: u32,
    active: u32,
    issue: u32,
    /// After an error: nothing goes on before the guest has stopped the port.
    halted: bool,
    /// Slots whose command is to be carried out once more: the machine was stopped for an error.
    again: u32,
    /// The signature's frame is still to be received.
    greeting: bool,
}

impl PortRegisters {
    /// As after power-on.
    fn fresh(drive: Option<&Arc<Drive>>) -> Self {
        let mut fresh = Self {
            list: 0,
            frames: 0,
            interrupts: 0,
            enabled: 0,
            command: UP,
            task_file: NOTHING,
            signature: u32::MAX,
            link: 0,
            control: 0,
            errors: 0,
            active: 0,
            issue: 0,
            halted: false,
            again: 0,
            greeting: false,
        };
        if let Some(drive) = drive {
            fresh.connect(&drive.signature());
        }
        fresh
    }

    /// The drive is there and says what it is.
    fn connect(&mut self, signature: &Registers) {
        self.link = LINK_UP;
        self.signature = signature.signature();
        self.task_file = signature.task_file();
        self.greeting = true;
    }

    /// Nothing is to be done any more.
    fn forget(&mut self) {
        self.issue = 0;
        self.active = 0;
        self.again = 0;
        self.halted = false;
        self.command &= !SLOT_MASK;
    }
}

/// A port.
#[derive(Debug)]
struct Port {
    registers: PortRegisters,
    drive: Option<Arc<Drive>>,
    /// Wakes the drive's thread.
    kick: Option<Arc<EventFd>>,
    /// Slots in that thread's hands.
    taken: u32,
    /// What is in its hands is nobody's any more.
    stopping: bool,
    /// The link comes up as soon as nothing is in its hands.
    connecting: bool,
    /// The slot that was taken last.
    last: u8,
}

/// What is behind the lock.
#[derive(Debug)]
struct Inner {
    core: Core,
    interrupt: bool,
    /// The guest was to hear of something when that was last looked at.
    pending: bool,
    ports: Vec<Port>,
}

/// What a write asks of the controller as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// A port was started: its drive's thread is needed.
    Started,
    /// Everything but the PCI function is to be reset.
    Reset,
}

/// A command that a drive's thread has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Its slot.
    pub slot: u8,
    /// The command list.
    pub list: u64,
}

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With the drive's registers.
    Registers(Registers),
    /// Data has gone to the guest through the data register, `count` bytes in the last piece.
    Pio(Registers, u16),
    /// The frame needs no answer.
    Quiet,
    /// The drive was reset, and says what it is.
    Signature,
    /// Memory that isn't there.
    Fault,
}

/// The registers.
#[derive(Debug)]
pub struct Hba {
    inner: Mutex<Inner>,
    memory: Arc<dyn GuestMemory>,
}

impl Hba {
    /// As after power-on.
    pub fn new(
        core: Core,
        ports: Vec<Option<(Arc<Drive>, Arc<EventFd>)>>,
        memory: Arc<dyn GuestMemory>,
    ) -> Self {
        let port = |drive: Option<(Arc<Drive>, Arc<EventFd>)>| {
            let (drive, kick) = drive.unzip();
            Port {
                registers: PortRegisters::fresh(drive.as_ref()),
                drive,
                kick,
                taken: 0,
                stopping: false,
                connecting: false,
                last: SLOTS - 1,
            }
        };
        Self {
            inner: Mutex::new(Inner {
                core,
                interrupt: false,
                pending: false,
                ports: ports.into_iter().map(port).collect(),
            }),
            memory,
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<dyn GuestMemory> {
        &self.memory
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Does something with the PCI function's registers.
    pub fn core<T>(&self, what: impl FnOnce(&mut Core) -> T) -> T {
        let mut inner = self.lock();
        let before = (inner.core.has_msi(), inner.core.is_master());
        let result = what(&mut inner.core);
        if before != (inner.core.has_msi(), inner.core.is_master()) {
            inner.tell(true);
        }
        result
    }

    /// Whether this port has been started: its drive's thread has something to do.
    pub fn is_started(&self, port: usize) -> bool {
        let inner = self.lock();
        inner.core.is_master()
            && (inner.ports.get(port)).is_some_and(|port| {
                port.drive.is_some() && port.registers.command & (START | RUNNING) != 0
            })
    }

    /// Reads 32 bits.
    pub fn read(&self, offset: u32) -> u32 {
        let inner = self.lock();
        let count = u32::try_from(inner.ports.len()).unwrap_or(SLOTS.into());
        match offset & !3 {
            0x00 => CAP | count.saturating_sub(1),
            0x04 if inner.interrupt => GHC_AHCI | GHC_INTERRUPT,
            0x04 => GHC_AHCI,
            0x08 => inner.status(),
            0x0c => u32::MAX >> (32 - count.clamp(1, 32)),
            0x10 => VERSION,
            at @ PORTS.. => {
                let index = crate::num::to_usize(((at - PORTS) / PORT).into());
                let port = inner.ports.get(index);
                port.map_or(0, |port| port.registers.read(at % PORT))
            }
            _ => 0,
        }
    }

    /// Writes those of 32 bits that are in `bits`.
    pub fn write(&self, offset: u32, value: u32, bits: u32) -> Effect {
        let mut inner = self.lock();
        let value = value & bits;
        match offset & !3 {
            0x04 if value & GHC_RESET != 0 => return Effect::Reset,
            0x04 if bits & GHC_INTERRUPT != 0 => {
                inner.interrupt = value & GHC_INTERRUPT != 0;
                inner.tell(false);
            }
            // What is still pending at a port is pending here: nothing is lost between the two.
            0x08 => inner.tell(true),
            at @ PORTS.. => {
                let index = crate::num::to_usize(((at - PORTS) / PORT).into());
                return inner.write_port(&*self.memory, index, at % PORT, value, bits);
            }
            _ => {}
        }
        Effect::None
    }

    /// As after power-on, drives apart. Nothing is in their threads' hands.
    pub fn reset(&self, function: bool) {
        let mut inner = self.lock();
        inner.interrupt = false;
        for port in &mut inner.ports {
            port.registers = PortRegisters::fresh(port.drive.as_ref());
            (port.taken, port.stopping, port.connecting) = (0, false, false);
            port.last = SLOTS - 1;
        }
        if function {
            inner.core.reset();
        }
        inner.tell(false);
    }

    /// Takes the next command of a port.
    pub fn take(&self, port: usize) -> Option<Taken> {
        let mut inner = self.lock();
        let master = inner.core.is_master();
        let port = inner.ports.get_mut(port)?;
        let own = &mut port.registers;
        let goes = own.command & START != 0 && own.link == LINK_UP && master;
        if !goes || own.halted || port.stopping || port.connecting {
            return None;
        }
        let there = (own.issue | own.again) & !port.taken;
        if there == 0 {
            return None;
        }
        // The one after the last, in a ring (5.3.2).
        let after = u32::from(port.last) + 1;
        let ahead = there.rotate_right(after & 31).trailing_zeros();
        let slot = low8((ahead + after) & 31);
        port.last = slot;
        port.taken |= 1 << slot;
        own.command = own.command & !SLOT_MASK | u32::from(slot) << SLOT_SHIFT;
        own.task_file |= u32::from(BSY);
        let list = own.list;
        Some(Taken { slot, list })
    }

    /// It is not this command's turn yet.
    pub fn give_back(&self, port: usize, slot: u8) {
        let mut inner = self.lock();
        if let Some(own) = inner.ports.get_mut(port) {
            own.last = slot.wrapping_sub(1) & (SLOTS - 1);
            own.registers.task_file &= !u32::from(BSY);
        }
        inner.release(&*self.memory, port, 1 << slot);
    }

    /// The machine stops for an error: the command is for later.
    pub fn keep(&self, port: usize, slot: u8) {
        let mut inner = self.lock();
        if inner.release(&*self.memory, port, 1 << slot)
            && let Some(own) = inner.ports.get_mut(port)
        {
            own.registers.again |= 1 << slot;
        }
    }

    /// A queued command has been taken by the drive: its slot is free, its tag is not.
    pub fn accepted(&self, port: usize, slot: u8, registers: &Registers) {
        let mut inner = self.lock();
        let Some(port) = inner.ports.get_mut(port).filter(|port| !port.stopping) else {
            return;
        };
        port.receive(
            &*self.memory,
            AT_REGISTERS,
            &fis::device_to_host(registers, false),
        );
        let own = &mut port.registers;
        own.task_file = registers.task_file();
        own.issue &= !(1 << slot);
        own.again &= !(1 << slot);
    }

    /// Queued commands are done.
    pub fn tags_done(&self, port: usize, tags: u32, descriptor: bool) {
        let mut inner = self.lock();
        if tags == 0 || !inner.release(&*self.memory, port, tags) {
            return;
        }
        let Some(port) = inner.ports.get_mut(port) else {
            return;
        };
        if port.registers.halted {
            // The drive has given up all of its queue.
            return;
        }
        let status = fis::DRDY | fis::SEEK;
        port.receive(&*self.memory, AT_SET_BITS, &fis::set_bits(status, 0, tags));
        let own = &mut port.registers;
        own.task_file = own.task_file & !0xff77 | u32::from(status & 0x77);
        own.active &= !tags;
        own.interrupts |= IS_SET_BITS;
        if descriptor {
            own.interrupts |= IS_DESCRIPTOR;
        }
        inner.tell(true);
    }

    /// A queued command has failed, and with it all others (13.6.3.2 of ACS-3). Whether anybody is to hear of it.
    pub fn tag_failed(&self, port: usize, slot: u8, registers: &Registers) -> bool {
        let mut inner = self.lock();
        if !inner.release(&*self.memory, port, 1 << slot) {
            return false;
        }
        let Some(port) = inner.ports.get_mut(port).filter(|p| !p.registers.halted) else {
            return false;
        };
        let frame = fis::set_bits(registers.status, registers.error, 0);
        port.receive(&*self.memory, AT_SET_BITS, &frame);
        let own = &mut port.registers;
        own.task_file = registers.task_file();
        own.interrupts |= IS_TASK_FILE;
        own.halted = true;
        inner.tell(true);
        true
    }

    /// A command has ended.
    pub fn done(&self, port: usize, slot: u8, end: &End, descriptor: bool, overflow: bool) {
        let mut inner = self.lock();
        if !inner.release(&*self.memory, port, 1 << slot) {
            return;
        }
        let Some(port) = inner.ports.get_mut(port) else {
            return;
        };
        let mut raised = match end {
            End::Registers(registers) => {
                let frame = fis::device_to_host(registers, true);
                port.receive(&*self.memory, AT_REGISTERS, &frame);
                port.registers.task_file = registers.task_file();
                match registers.is_error() {
                    true => IS_TASK_FILE,
                    false => IS_DEVICE,
                }
            }
            End::Pio(registers, count) => {
                let frame = fis::pio_setup(registers, true, true, *count);
                port.receive(&*self.memory, AT_PIO, &frame);
                port.registers.task_file = registers.task_file();
                IS_PIO
            }
            End::Quiet => {
                port.registers.task_file &= !u32::from(BSY);
                0
            }
            End::Signature => {
                if let Some(drive) = port.drive.clone() {
                    port.registers.connect(&drive.signature());
                    port.greet(&*self.memory);
                }
                0
            }
            End::Fault => IS_BUS,
        };
        let own = &mut port.registers;
        if raised & (IS_TASK_FILE | IS_BUS) == 0 {
            own.issue &= !(1 << slot);
        } else {
            own.halted = true;
        }
        own.again &= !(1 << slot);
        if descriptor {
            raised |= IS_DESCRIPTOR;
        }
        if overflow {
            raised |= IS_OVERFLOW;
        }
        own.interrupts |= raised;
        inner.tell(raised != 0);
    }

    /// What is to be saved: interrupts are on, and each port's registers.
    pub fn save(&self) -> (bool, Vec<PortRegisters>) {
        let inner = self.lock();
        let ports = inner.ports.iter().map(|port| port.registers.clone());
        (inner.interrupt, ports.collect())
    }

    /// Takes it over.
    ///
    /// # Errors
    /// It is of another number of ports, or of other drives.
    pub fn load(&self, interrupt: bool, saved: Vec<PortRegisters>) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        let bad = |reason: &str| {
            Err(DeviceError::State {
                kind: super::KIND,
                reason: reason.to_owned(),
            })
        };
        if saved.len() != inner.ports.len() {
            return bad("another number of ports");
        }
        for (port, mut saved) in inner.ports.iter_mut().zip(saved) {
            if port.drive.is_none() && saved.link & DETECT == 3 {
                return bad("a drive that is not there");
            }
            // Only what the guest could have written.
            saved.list &= !0x3ff;
            saved.frames &= !0xff;
            port.registers = saved;
        }
        inner.interrupt = interrupt;
        // The line is as it was; a message was sent then.
        inner.tell(false);
        Ok(())
    }
}

impl PortRegisters {
    fn read(&self, at: u32) -> u32 {
        match at {
            0x00 => low32(self.list),
            0x04 => low32(self.list >> 32),
            0x08 => low32(self.frames),
            0x0c => low32(self.frames >> 32),
            0x10 => self.interrupts,
            0x14 => self.enabled,
            0x18 => self.command,
            0x20 => self.task_file,
            0x24 => self.signature,
            0x28 => self.link,
            0x2c => self.control,
            0x30 => self.errors,
            0x34 => self.active,
            0x38 => self.issue,
            _ => 0,
        }
    }
}

/// Half of a 64-bit register, with `value` in those of its bits that are in `bits`.
fn half(old: u64, high: bool, value: u32, bits: u32) -> u64 {
    let shift = if high { 32 } else { 0 };
    old & !(u64::from(bits) << shift) | u64::from(value) << shift
}

impl Port {
    /// A frame comes in.
    fn receive(&mut self, memory: &dyn GuestMemory, at: u64, frame: &[u8]) {
        if self.registers.command & RECEIVE != 0
            && let Err(error) = table::write(memory, self.registers.frames.wrapping_add(at), frame)
        {
            log::debug!("AHCI: a frame for a guest that has no place for it: {error}");
        }
    }

    /// The signature's frame, once it can be received.
    fn greet(&mut self, memory: &dyn GuestMemory) {
        let receives = self.registers.command & RECEIVE != 0;
        if let Some(drive) = &self.drive
            && self.registers.greeting
            && receives
        {
            self.registers.greeting = false;
            let frame = fis::device_to_host(&drive.signature(), false);
            self.receive(memory, AT_REGISTERS, &frame);
        }
    }

    fn wake(&self) {
        if let Some(kick) = &self.kick {
            worker::signal(&**kick);
        }
    }

    /// The guest has the link come up anew: the drive is reset.
    fn link_up(&mut self, memory: &dyn GuestMemory) {
        self.connecting = false;
        let Some(drive) = &self.drive else {
            self.registers.link = 0;
            return;
        };
        drive.reset_link();
        let signature = drive.signature();
        self.registers.connect(&signature);
        self.registers.errors |= ERR_EXCHANGED | ERR_PHY;
        self.registers.interrupts |= IS_CONNECT | IS_PHY;
        self.greet(memory);
    }

    /// PxSCTL.DET has changed.
    fn detect(&mut self, memory: &dyn GuestMemory, before: u32) {
        let now = self.registers.control & DETECT;
        if before == now {
            return;
        }
        if now == 0 {
            if self.taken == 0 {
                self.link_up(memory);
            } else {
                // What the drive has in hand ends first.
                self.connecting = true;
                self.registers.task_file = BSY.into();
            }
            return;
        }
        self.connecting = false;
        self.stopping = self.taken != 0;
        self.registers.forget();
        self.registers.link = if now == LINK_OFF { LINK_OFF } else { 0 };
        self.registers.task_file = NOTHING;
        self.registers.signature = u32::MAX;
        self.registers.greeting = false;
    }

    /// PxCMD was written.
    fn command(&mut self, memory: &dyn GuestMemory, value: u32, bits: u32) -> Effect {
        let own = &mut self.registers;
        let writable = (START | RECEIVE | KEPT) & bits;
        let before = own.command;
        own.command = before & !writable | value & writable;
        if value & OVERRIDE != 0 && own.command & START == 0 {
            own.task_file &= !u32::from(BSY | DRQ);
        }
        let receiving = own.command & RECEIVE != 0;
        own.command = own.command & !RECEIVING | if receiving { RECEIVING } else { 0 };
        let effect = match (before & START != 0, own.command & START != 0) {
            (false, true) => {
                own.command |= RUNNING;
                own.halted = false;
                Effect::Started
            }
            (true, false) => {
                own.forget();
                self.stopping = self.taken != 0;
                if !self.stopping {
                    own.command &= !RUNNING;
                }
                Effect::None
            }
            _ => Effect::None,
        };
        if effect == Effect::Started {
            self.wake();
        }
        self.greet(memory);
        effect
    }
}

impl Inner {
    /// Ports whose interrupts the guest wants to hear of.
    fn status(&self) -> u32 {
        let ports = (0u32..).zip(&self.ports);
        ports
            .filter(|(_, port)| port.registers.interrupts & port.registers.enabled != 0)
            .fold(0, |status, (index, _)| status | 1 << index)
    }

    /// Has the guest hear of what is pending; with `anew` once more, where that is a message.
    fn tell(&mut self, anew: bool) {
        let pending = self.interrupt && self.status() != 0;
        if self.core.has_msi() {
            self.core.pin().set(false);
            if pending && (anew || !self.pending) {
                self.core.send_msi();
            }
        } else {
            self.core.pin().set(pending);
        }
        self.pending = pending;
    }

    /// Slots are out of the thread's hands. False: they are nobody's any more.
    fn release(&mut self, memory: &dyn GuestMemory, port: usize, slots: u32) -> bool {
        let Some(own) = self.ports.get_mut(port) else {
            return false;
        };
        own.taken &= !slots;
        if !own.stopping {
            return true;
        }
        if own.taken == 0 {
            own.stopping = false;
            if own.registers.command & START == 0 {
                own.registers.command &= !RUNNING;
            }
            if own.connecting {
                own.link_up(memory);
                self.tell(true);
            }
        }
        false
    }

    fn write_port(
        &mut self,
        memory: &dyn GuestMemory,
        index: usize,
        at: u32,
        value: u32,
        bits: u32,
    ) -> Effect {
        let Some(port) = self.ports.get_mut(index) else {
            return Effect::None;
        };
        let own = &mut port.registers;
        match at {
            0x00 => own.list = half(own.list, false, value & !0x3ff, bits),
            0x04 => own.list = half(own.list, true, value, bits),
            0x08 => own.frames = half(own.frames, false, value & !0xff, bits),
            0x0c => own.frames = half(own.frames, true, value, bits),
            0x10 => {
                // These two are as long as what they tell of (3.3.5).
                let stay = if own.errors & ERR_EXCHANGED != 0 {
                    IS_CONNECT
                } else {
                    0
                } | if own.errors & ERR_PHY != 0 { IS_PHY } else { 0 };
                own.interrupts &= !value | stay;
                self.tell(false);
            }
            0x14 => {
                own.enabled = own.enabled & !bits | value & IS_ALL;
                self.tell(false);
            }
            0x18 => return port.command(memory, value, bits),
            0x2c => {
                let before = own.control & DETECT;
                own.control = (own.control & !bits | value) & 0xfff;
                port.detect(memory, before);
                self.tell(true);
            }
            0x30 => {
                own.errors &= !value;
                if own.errors & ERR_EXCHANGED == 0 {
                    own.interrupts &= !IS_CONNECT;
                }
                if own.errors & ERR_PHY == 0 {
                    own.interrupts &= !IS_PHY;
                }
                self.tell(false);
            }
            0x34 if own.command & START != 0 => own.active |= value,
            0x38 if own.command & START != 0 => {
                own.issue |= value;
                port.wake();
            }
            _ => {}
        }
        Effect::None
    }
}
