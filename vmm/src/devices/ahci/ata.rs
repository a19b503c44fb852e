//! A disk's commands (ACS-3).

use super::drive::{Drive, DriveState, Todo};
use super::fis::{ABRT, Command, IDNF, LBA, Registers};
use super::identity;
use crate::num::{low8, low32, to_usize};

/// Most sectors of a piece of READ MULTIPLE.
pub const MULTIPLE_MOST: u8 = 16;
/// Most blocks of a DATA SET MANAGEMENT command's list.
pub const TRIM_BLOCKS: u16 = 8;
const SECTOR: u64 = 512;

/// Commands that appear elsewhere too.
const TRIM: u8 = 0x06;
const READ_QUEUED: u8 = 0x60;
const WRITE_QUEUED: u8 = 0x61;

/// Whether a command is queued: it has a tag, others are under way at the same time.
#[must_use]
pub fn is_queued(command: &Command) -> bool {
    command.is_command && matches!(command.command, READ_QUEUED | WRITE_QUEUED)
}

/// How a command's data goes.
#[must_use]
pub fn is_pio_in(command: &Command) -> bool {
    matches!(
        command.command,
        0x20 | 0x21 | 0x24 | 0x29 | 0x2f | 0xb0 | 0xc4 | 0xec | 0xa1
    )
}

fn aborted(command: &Command) -> Todo {
    Todo::Answer(Registers::failed(command, ABRT))
}

fn done(command: &Command) -> Todo {
    Todo::Answer(Registers::ok(command))
}

/// What a command's address and count mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// 28 bits, or cylinder, head and sector.
    Short,
    /// 48 bits.
    Long,
    /// 48 bits, the count is in the features.
    Queued,
}

/// The place that a command names, in bytes, if it is on the disk.
fn place(drive: &Drive, command: &Command, form: Form) -> Option<(u64, u64)> {
    let many = |count: u64, all: u64| if count == 0 { all } else { count };
    let sectors = match form {
        Form::Short => many(u64::from(command.count & 0xff), 256),
        Form::Long => many(command.count.into(), 1 << 16),
        Form::Queued => many(command.features.into(), 1 << 16),
    };
    let head = u64::from(command.device & 0xf);
    let first = if form != Form::Short {
        command.lba
    } else if command.device & LBA != 0 {
        command.lba & 0xff_ffff | head << 24
    } else {
        let (cylinder, sector) = (command.lba >> 8 & 0xffff, command.lba & 0xff);
        let track = cylinder * identity::HEADS + head;
        track * identity::SECTORS + sector.checked_sub(1)?
    };
    let (offset, len) = (first.checked_mul(SECTOR)?, sectors * SECTOR);
    let end = offset.checked_add(len)?;
    (end <= drive.capacity()).then_some((offset, len))
}

fn nowhere(command: &Command) -> Todo {
    Todo::Answer(Registers::failed(command, IDNF))
}

fn read(drive: &Drive, command: &Command, form: Form) -> Todo {
    match place(drive, command, form) {
        Some((offset, len)) => Todo::Read { offset, len },
        None => nowhere(command),
    }
}

fn write(drive: &Drive, command: &Command, form: Form, through: bool) -> Todo {
    if drive.options.read_only {
        return aborted(command);
    }
    match place(drive, command, form) {
        Some((offset, len)) => Todo::Write {
            offset,
            len,
            through,
        },
        None => nowhere(command),
    }
}

fn verify(drive: &Drive, command: &Command, form: Form) -> Todo {
    match place(drive, command, form) {
        Some(_) => done(command),
        None => nowhere(command),
    }
}

/// The last sector, as an answer.
fn last_sector(drive: &Drive, command: &Command, bits: u32) -> Todo {
    let sectors = drive.capacity() / SECTOR;
    let last = sectors.saturating_sub(1).min((1 << bits) - 1);
    let mut registers = Registers::ok(command);
    registers.lba = last;
    if bits == 28 {
        registers.lba = last & 0xff_ffff;
        registers.device = command.device & !0xf | low8(low32(last >> 24) & 0xf);
    }
    Todo::Answer(registers)
}

/// What is to be done for a command.
pub fn run(drive: &Drive, state: &mut DriveState, command: &Command) -> Todo {
    use Form::{Long, Queued, Short};
    match command.command {
        0x20 | 0x21 | 0xc8 | 0xc9 => read(drive, command, Short),
        0x24 | 0x25 => read(drive, command, Long),
        0x30 | 0x31 | 0xca | 0xcb => write(drive, command, Short, false),
        0x34 | 0x35 => write(drive, command, Long, false),
        0x3d => write(drive, command, Long, true),
        0xc4 | 0xc5 | 0x29 | 0x39 | 0xce if state.multiple == 0 => aborted(command),
        0xc4 => read(drive, command, Short),
        0x29 => read(drive, command, Long),
        0xc5 => write(drive, command, Short, false),
        0x39 => write(drive, command, Long, false),
        0xce => write(drive, command, Long, true),
        READ_QUEUED => read(drive, command, Queued),
        // Its device register's highest bit: FUA.
        WRITE_QUEUED => write(drive, command, Queued, command.device & 1 << 7 != 0),
        0x40 | 0x41 => verify(drive, command, Short),
        0x42 => verify(drive, command, Long),
        0x70 => done(command),
        0xc6 => match low8(command.count.into()) {
            count @ 0..=MULTIPLE_MOST if count == 0 || count.is_power_of_two() => {
                state.multiple = count;
                done(command)
            }
            _ => aborted(command),
        },
        0x27 => last_sector(drive, command, 48),
        0xf8 => last_sector(drive, command, 28),
        TRIM => match (command.features & 0xff, command.count) {
            (1, 1..=TRIM_BLOCKS) if !drive.options.read_only => {
                Todo::Out(u64::from(command.count) * SECTOR)
            }
            _ => aborted(command),
        },
        0xe7 | 0xea => Todo::Flush,
        0xec => Todo::In(identity::disk(drive, state)),
        0xef => set_features(drive, state, command),
        0xb0 => smart(state, command),
        0x2f => read_log(state, command),
        // Standby and idle, at once or later; sleep; each with its older code.
        0xe0..=0xe3 | 0xe6 | 0x94..=0x97 | 0x99 => done(command),
        0xe5 | 0x98 => {
            let mut registers = Registers::ok(command);
            // It is awake.
            registers.count = 0xff;
            Todo::Answer(registers)
        }
        0x90 => {
            let mut registers = drive.signature();
            registers.error = 1;
            Todo::Answer(registers)
        }
        // INITIALIZE DEVICE PARAMETERS: the geometry that it has anyway.
        0x91 => done(command),
        _ => aborted(command),
    }
}

/// Ranges to be trimmed (7.10.3.2): as many as are on the disk.
pub fn data(drive: &Drive, command: &Command, data: &[u8]) -> Todo {
    if command.command != TRIM {
        return aborted(command);
    }
    let capacity = drive.capacity();
    let mut ranges = Vec::new();
    for entry in data.chunks_exact(8) {
        let entry = entry.first_chunk().map_or(0, |e| u64::from_le_bytes(*e));
        let (first, count) = (entry & 0xffff_ffff_ffff, entry >> 48);
        if count == 0 {
            continue;
        }
        let (offset, len) = (first * SECTOR, count * SECTOR);
        match offset.checked_add(len) {
            Some(end) if end <= capacity => ranges.push((offset, len)),
            _ => return nowhere(command),
        }
    }
    Todo::Discard(ranges)
}

fn set_features(drive: &Drive, state: &mut DriveState, command: &Command) -> Todo {
    match command.features & 0xff {
        0x02 => {
            drive.set_writethrough(false);
            done(command)
        }
        0x82 => Todo::WriteThrough,
        0x03 => set_transfer_mode(state, command),
        // Looking ahead; power and noise; reverting to defaults: none of it makes a difference.
        0xaa | 0x55 | 0x05 | 0x85 | 0x42 | 0xc2 | 0x66 | 0xcc => done(command),
        _ => aborted(command),
    }
}

/// The mode that data is transferred in. It makes no difference, but can be read back.
pub fn set_transfer_mode(state: &mut DriveState, command: &Command) -> Todo {
    let mode = low8(command.count.into());
    let bit = 1 << (mode & 7);
    match mode >> 3 {
        0 | 1 => {}
        4 => (state.multiword_mode, state.ultra_mode) = (bit, 0),
        8 => (state.multiword_mode, state.ultra_mode) = (0, bit),
        _ => return aborted(command),
    }
    done(command)
}

/// The sum of all bytes is zero.
fn with_checksum(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(last) = bytes.last_mut() {
        *last = last.wrapping_sub(sum);
    }
    bytes
}

/// Attributes: id, flags, value and worst, raw value, threshold.
const ATTRIBUTES: [(u8, u16, u8, u64, u8); 5] = [
    // Reallocated sectors, power-on hours, starts, temperature, uncorrectable sectors.
    (5, 0x0003, 100, 0, 36),
    (9, 0x0003, 100, 1, 0),
    (12, 0x0003, 100, 1, 0),
    (194, 0x0002, 69, 31, 50),
    (198, 0x0010, 100, 0, 0),
];

fn smart(state: &mut DriveState, command: &Command) -> Todo {
    let feature = command.features & 0xff;
    if command.lba >> 8 & 0xffff != 0xc24f || !state.smart && feature != 0xd8 {
        return aborted(command);
    }
    let mut page = vec![0; 512];
    match feature {
        0xd0 => {
            page[0] = 1;
            for (at, (id, flags, value, raw, _)) in (2..).step_by(12).zip(ATTRIBUTES) {
                page[at] = id;
                page[at + 1..at + 3].copy_from_slice(&flags.to_le_bytes());
                page[at + 3..at + 5].fill(value);
                page[at + 5..at + 11].copy_from_slice(&raw.to_le_bytes()[..6]);
            }
            // Collected of itself, no self-tests; attributes are saved, errors are logged.
            page[362] = if state.smart_autosave { 0x82 } else { 0x02 };
            page[367] = 1;
            page[368] = 3;
            page[370] = 1;
            Todo::In(with_checksum(page))
        }
        0xd1 => {
            page[0] = 1;
            for (at, (id, _, _, _, threshold)) in (2..).step_by(12).zip(ATTRIBUTES) {
                (page[at], page[at + 1]) = (id, threshold);
            }
            Todo::In(with_checksum(page))
        }
        0xd2 => {
            state.smart_autosave = command.count & 0xff != 0;
            done(command)
        }
        // Its log of errors, and of self-tests: neither has anything.
        0xd5 => match command.lba & 0xff {
            1 => {
                page[0] = 1;
                Todo::In(with_checksum(page))
            }
            6 => {
                page[0] = 1;
                Todo::In(with_checksum(page))
            }
            _ => aborted(command),
        },
        0xd8 => {
            state.smart = true;
            done(command)
        }
        0xd9 => {
            state.smart = false;
            done(command)
        }
        // It is well: address as it came.
        0xda => done(command),
        _ => aborted(command),
    }
}

/// READ LOG EXT: which logs there are, and what went wrong with a queued command.
fn read_log(state: &mut DriveState, command: &Command) -> Todo {
    let (log, page) = (command.lba & 0xff, command.lba >> 8 & 0xff);
    let pages = to_usize(command.count.into());
    let mut bytes = vec![0; 512];
    match (log, page, pages) {
        (0, 0, 1) => {
            bytes[0] = 1;
            bytes[0x20] = 1;
            Todo::In(bytes)
        }
        (0x10, 0, 1) => {
            match state.failed_tag.take() {
                Some((tag, registers)) => {
                    let [a0, a1, a2, a3, a4, a5, ..] = registers.lba.to_le_bytes();
                    let [count, count_high] = registers.count.to_le_bytes();
                    let (status, error) = (registers.status, registers.error);
                    let head = [
                        tag,
                        0,
                        status,
                        error,
                        a0,
                        a1,
                        a2,
                        registers.device,
                        a3,
                        a4,
                        a5,
                        0,
                        count,
                        count_high,
                    ];
                    bytes[..head.len()].copy_from_slice(&head);
                }
                // Not a queued one.
                None => bytes[0] = 1 << 7,
            }
            Todo::In(with_checksum(bytes))
        }
        _ => aborted(command),
    }
}
