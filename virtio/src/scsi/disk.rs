//! A disk's commands (SBC-3, SPC-4).

use super::inquiry::{REQUEST_SENSE, give};
use super::sense::{
    BAD_FIELD, BAD_OPERATION, DATA_PROTECT, ILLEGAL_REQUEST, NO_SENSE, NO_SUCH_BLOCK, NOT_SAVED,
    Sense, fixed,
};
use super::unit::{LIST_MOST, Todo, Unit};

/// Most ranges of an UNMAP command.
pub(super) const DISCARD_RANGES_MOST: u32 = 16;
/// Most blocks of an UNMAP or WRITE SAME command: 1 GiB of blocks of 512 bytes.
pub(super) const DISCARD_BLOCKS_MOST: u32 = 1 << 21;

const READ_ONLY: Sense = (DATA_PROTECT, 0x27, 0);
const BAD_LENGTH: Sense = (ILLEGAL_REQUEST, 0x1a, 0);
const BAD_LIST: Sense = (ILLEGAL_REQUEST, 0x26, 0);

const MODE_SELECT_6: u8 = 0x15;
const UNMAP: u8 = 0x42;
const MODE_SELECT_10: u8 = 0x55;

/// Every command, with its length and the bits of it that count, for those that ask (SPC-4, 6.35): a service action
/// where it has one.
const COMMANDS: [(u8, Option<u8>, u16); 32] = [
    (0x00, None, 6),
    (REQUEST_SENSE, None, 6),
    (0x08, None, 6),
    (0x0a, None, 6),
    (0x12, None, 6),
    (MODE_SELECT_6, None, 6),
    (0x1a, None, 6),
    (0x1b, None, 6),
    (0x25, None, 10),
    (0x28, None, 10),
    (0x2a, None, 10),
    (0x2b, None, 10),
    (0x2e, None, 10),
    (0x2f, None, 10),
    (0x35, None, 10),
    (0x41, None, 10),
    (UNMAP, None, 10),
    (MODE_SELECT_10, None, 10),
    (0x5a, None, 10),
    (0x88, None, 16),
    (0x8a, None, 16),
    (0x8e, None, 16),
    (0x8f, None, 16),
    (0x91, None, 16),
    (0x93, None, 16),
    (0x9e, Some(0x10), 16),
    (0xa0, None, 12),
    (0xa3, Some(0x0c), 12),
    (0xa8, None, 12),
    (0xaa, None, 12),
    (0xae, None, 12),
    (0xaf, None, 12),
];

/// A number of `len` bytes, the highest first.
fn number(cdb: &[u8], at: usize, len: usize) -> u64 {
    let bytes = cdb.get(at..at + len).unwrap_or_default();
    bytes.iter().fold(0, |sum, b| sum << 8 | u64::from(*b))
}

/// The blocks that a command names: the first, how many.
fn range(cdb: &[u8; 32]) -> (u64, u64) {
    match cdb[0] >> 5 {
        0 => {
            let count = if cdb[4] == 0 { 256 } else { cdb[4].into() };
            (number(cdb, 1, 3) & 0x1f_ffff, count)
        }
        4 => (number(cdb, 2, 8), number(cdb, 10, 4)),
        5 => (number(cdb, 2, 4), number(cdb, 6, 4)),
        _ => (number(cdb, 2, 4), number(cdb, 7, 2)),
    }
}

/// Where they are in bytes.
fn place(unit: &Unit, cdb: &[u8; 32]) -> Result<(u64, u64), Sense> {
    let (first, count) = range(cdb);
    unit.place(first, count).ok_or(NO_SUCH_BLOCK)
}

fn writable(unit: &Unit) -> Result<(), Sense> {
    if unit.options.read_only {
        return Err(READ_ONLY);
    }
    Ok(())
}

/// What is to be done for a command.
pub(super) fn run(unit: &Unit, cdb: &[u8; 32]) -> Todo {
    carry_out(unit, cdb).unwrap_or_else(Todo::Check)
}

fn carry_out(unit: &Unit, cdb: &[u8; 32]) -> Result<Todo, Sense> {
    match cdb[0] {
        // TEST UNIT READY; START STOP UNIT: it turns always.
        0x00 | 0x1b => Ok(Todo::Good),
        REQUEST_SENSE => Ok(give(fixed(NO_SENSE).to_vec(), cdb[4].into())),
        // READ (6), (10), (12), (16)
        0x08 | 0x28 | 0xa8 | 0x88 => {
            let (offset, len) = place(unit, cdb)?;
            match cdb[0] {
                // Protection information, which there is none of.
                0x28 | 0xa8 | 0x88 if cdb[1] >> 5 != 0 => Err(BAD_FIELD),
                _ if len == 0 => Ok(Todo::Good),
                _ => Ok(Todo::Read { offset, len }),
            }
        }
        // WRITE (6), (10), (12), (16), and WRITE AND VERIFY
        0x0a | 0x2a | 0xaa | 0x8a | 0x2e | 0xae | 0x8e => {
            writable(unit)?;
            let (offset, len) = place(unit, cdb)?;
            let (long, verify) = (cdb[0] != 0x0a, cdb[0] & 0xf == 0xe);
            if long && cdb[1] >> 5 != 0 || verify && cdb[1] & 6 != 0 {
                return Err(BAD_FIELD);
            }
            let through = verify || long && cdb[1] & 1 << 3 != 0;
            match len {
                0 => Ok(Todo::Good),
                _ => Ok(Todo::Write {
                    offset,
                    len,
                    through,
                }),
            }
        }
        // VERIFY (10), (12), (16): what is written is there. Nothing is compared.
        0x2f | 0xaf | 0x8f => match cdb[1] & 6 {
            0 => place(unit, cdb).map(|_| Todo::Good),
            _ => Err(BAD_FIELD),
        },
        // SEEK (10)
        0x2b => match unit.place(number(cdb, 2, 4), 1) {
            Some(_) => Ok(Todo::Good),
            None => Err(NO_SUCH_BLOCK),
        },
        0x25 => Ok(read_capacity_10(unit)),
        0x9e if cdb[1] & 0x1f == 0x10 => Ok(read_capacity_16(unit, cdb)),
        // SYNCHRONIZE CACHE (10), (16): all of it, wherever it is.
        0x35 | 0x91 => {
            place(unit, cdb)?;
            Ok(Todo::Flush)
        }
        // WRITE SAME (10), (16)
        0x41 | 0x93 => write_same(unit, cdb),
        UNMAP => {
            writable(unit)?;
            want(number(cdb, 7, 2))
        }
        0x1a => mode_sense(unit, cdb, false),
        0x5a => mode_sense(unit, cdb, true),
        MODE_SELECT_6 => select(cdb, cdb[4].into()),
        MODE_SELECT_10 => select(cdb, number(cdb, 7, 2)),
        0xa3 if cdb[1] & 0x1f == 0x0c => report_operation_codes(cdb),
        _ => Err(BAD_OPERATION),
    }
}

fn want(len: u64) -> Result<Todo, Sense> {
    match u32::try_from(len) {
        Ok(0) => Ok(Todo::Good),
        Ok(len) if len <= LIST_MOST => Ok(Todo::Out(len)),
        _ => Err(BAD_FIELD),
    }
}

fn read_capacity_10(unit: &Unit) -> Todo {
    let last = unit.blocks().saturating_sub(1);
    let last = u32::try_from(last).unwrap_or(u32::MAX);
    let mut bytes = last.to_be_bytes().to_vec();
    bytes.extend(unit.options.logical_block_size.to_be_bytes());
    Todo::In(bytes)
}

fn read_capacity_16(unit: &Unit, cdb: &[u8; 32]) -> Todo {
    let options = &unit.options;
    let mut bytes = vec![0; 32];
    let last = unit.blocks().saturating_sub(1);
    bytes[..8].copy_from_slice(&last.to_be_bytes());
    bytes[8..12].copy_from_slice(&options.logical_block_size.to_be_bytes());
    let exponent = (options.physical_block_size / options.logical_block_size).trailing_zeros();
    bytes[13] = exponent as u8;
    if unit.discards() {
        // Thin provisioning.
        bytes[14] = 1 << 7;
    }
    give(bytes, number(cdb, 10, 4))
}

fn write_same(unit: &Unit, cdb: &[u8; 32]) -> Result<Todo, Sense> {
    writable(unit)?;
    let (first, count) = range(cdb);
    // ANCHOR, LBDATA and PBDATA; protection information.
    if cdb[1] & 0b1111_0110 != 0 {
        return Err(BAD_FIELD);
    }
    // No data comes along (of the longer form only).
    let zeroes = cdb[0] == 0x93 && cdb[1] & 1 != 0;
    if count == 0 || count > u64::from(DISCARD_BLOCKS_MOST) {
        return Err(BAD_FIELD);
    }
    let (offset, len) = unit.place(first, count).ok_or(NO_SUCH_BLOCK)?;
    Ok(Todo::Same {
        offset,
        len,
        unmap: cdb[1] & 1 << 3 != 0,
        zeroes,
    })
}

/// The caching page (SBC-3, 6.5.5): whether there is a write cache.
fn caching(unit: &Unit) -> [u8; 20] {
    let mut page = [0; 20];
    (page[0], page[1]) = (0x08, 18);
    page[2] = u8::from(!unit.storage.writethrough()) << 2;
    page
}

fn mode_sense(unit: &Unit, cdb: &[u8; 32], long: bool) -> Result<Todo, Sense> {
    let (control, page, subpage) = (cdb[2] >> 6, cdb[2] & 0x3f, cdb[3]);
    if control == 3 {
        return Err(NOT_SAVED);
    }
    if subpage != 0 && subpage != 0xff {
        return Err(BAD_FIELD);
    }
    let options = &unit.options;
    // Errors are corrected, and blocks that are bad replaced; commands are carried out in any order.
    let mut recovery = [0; 12];
    (recovery[0], recovery[1], recovery[2]) = (0x01, 10, 1 << 7);
    let mut order = [0; 12];
    (order[0], order[1], order[3]) = (0x0a, 10, 1 << 4);
    let mut cache = caching(unit);
    if control == 1 {
        // The write cache can be changed.
        recovery[2..].fill(0);
        order[2..].fill(0);
        cache[2] = 1 << 2;
    }
    let mut pages = Vec::new();
    match page {
        0x01 => pages.extend(recovery),
        0x08 => pages.extend(cache),
        0x0a => pages.extend(order),
        0x3f => {
            pages.extend(recovery);
            pages.extend(cache);
            pages.extend(order);
        }
        _ => return Err(BAD_FIELD),
    }
    let blocks = match cdb[1] & 1 << 3 {
        0 => {
            let blocks = u32::try_from(unit.blocks()).unwrap_or(u32::MAX);
            let mut descriptor = blocks.to_be_bytes().to_vec();
            descriptor.extend(options.logical_block_size.to_be_bytes());
            descriptor
        }
        _ => Vec::new(),
    };
    // It can't be written; it knows FUA.
    let device = u8::from(options.read_only) << 7 | 1 << 4;
    let (of_blocks, all) = (blocks.len() as u8, blocks.len() + pages.len());
    let mut bytes = match long {
        true => {
            let [high, low] = (all as u16 + 6).to_be_bytes();
            vec![high, low, 0, device, 0, 0, 0, of_blocks]
        }
        false => vec![all as u8 + 3, 0, device, of_blocks],
    };
    bytes.extend(blocks);
    bytes.extend(pages);
    let room = if long {
        number(cdb, 7, 2)
    } else {
        cdb[4].into()
    };
    Ok(give(bytes, room))
}

fn select(cdb: &[u8; 32], len: u64) -> Result<Todo, Sense> {
    // Nothing is saved.
    match cdb[1] & 1 {
        0 => want(len),
        _ => Err(BAD_FIELD),
    }
}

/// What is to be done with a command's parameter list.
pub(super) fn list(unit: &Unit, cdb: &[u8; 32], list: &[u8]) -> Todo {
    let todo = match cdb[0] {
        UNMAP => unmap(unit, list),
        MODE_SELECT_6 => mode_select(unit, list, false),
        MODE_SELECT_10 => mode_select(unit, list, true),
        _ => Err(BAD_OPERATION),
    };
    todo.unwrap_or_else(Todo::Check)
}

fn unmap(unit: &Unit, list: &[u8]) -> Result<Todo, Sense> {
    if list.len() < 8 {
        return Err(BAD_LENGTH);
    }
    let len = number(list, 2, 2) as usize;
    let descriptors = list.get(8..8 + len).ok_or(BAD_LENGTH)?;
    if descriptors.len() / 16 > DISCARD_RANGES_MOST as usize {
        return Err(BAD_LIST);
    }
    let (mut ranges, mut sum) = (Vec::new(), 0);
    for descriptor in descriptors.chunks_exact(16) {
        let (first, count) = (number(descriptor, 0, 8), number(descriptor, 8, 4));
        let place = unit.place(first, count).ok_or(NO_SUCH_BLOCK)?;
        sum += count;
        if sum > u64::from(DISCARD_BLOCKS_MOST) {
            return Err(BAD_LIST);
        }
        if count > 0 {
            ranges.push(place);
        }
    }
    Ok(Todo::Discard(ranges))
}

/// MODE SELECT: the write cache is all that can be changed.
fn mode_select(unit: &Unit, list: &[u8], long: bool) -> Result<Todo, Sense> {
    let (head, of_blocks) = match long {
        true => (8, number(list, 6, 2) as usize),
        false => (4, number(list, 3, 1) as usize),
    };
    let mut pages = list.get(head + of_blocks..).ok_or(BAD_LENGTH)?;
    let mut cached = None;
    while let [code, len, ..] = *pages {
        let page = pages.get(2..2 + usize::from(len)).ok_or(BAD_LENGTH)?;
        match (code & 0x7f, page) {
            (0x08, [flags, rest @ ..]) if len == 18 => {
                if flags & !(1 << 2) != 0 || rest != &caching(unit)[3..] {
                    return Err(BAD_LIST);
                }
                cached = Some(flags & 1 << 2 != 0);
            }
            // As they are.
            (0x01, page) if len == 10 && page[1..] == [0; 9] => {}
            (0x0a, page) if len == 10 && page[2..] == [0; 8] => {}
            _ => return Err(BAD_LIST),
        }
        pages = &pages[2 + usize::from(len)..];
    }
    if !pages.is_empty() {
        return Err(BAD_LENGTH);
    }
    Ok(match cached {
        Some(true) => {
            unit.set_writethrough(false);
            Todo::Good
        }
        Some(false) => Todo::WriteThrough,
        None => Todo::Good,
    })
}

fn report_operation_codes(cdb: &[u8; 32]) -> Result<Todo, Sense> {
    let (option, code, action) = (cdb[2] & 7, cdb[3], number(cdb, 4, 2));
    let room = number(cdb, 6, 4);
    let known = |(own, service, _): &&(u8, Option<u8>, u16)| {
        *own == code && service.is_none_or(|service| u64::from(service) == action)
    };
    let mut bytes;
    match option {
        0 => {
            bytes = vec![0; 4];
            for (code, service, len) in COMMANDS {
                let [high, low] = len.to_be_bytes();
                let action = service.unwrap_or(0);
                let has_action = u8::from(service.is_some());
                bytes.extend([code, 0, 0, action, 0, has_action, high, low]);
            }
            let len = bytes.len() as u32 - 4;
            bytes[..4].copy_from_slice(&len.to_be_bytes());
        }
        1..=3 => match COMMANDS.iter().find(known) {
            Some((code, service, len)) => {
                // As the standard has it, all bits count.
                bytes = vec![0, 3, 0, *len as u8, *code];
                bytes.extend(vec![0xff; usize::from(*len) - 1]);
                if let Some(service) = service {
                    bytes[5] = *service;
                }
            }
            None => bytes = vec![0, 1, 0, 0],
        },
        _ => return Err(BAD_FIELD),
    }
    Ok(give(bytes, room))
}
