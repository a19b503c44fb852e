//! A driver's request, read from its chain (5.2.6).

use super::storage::Op;
use crate::queue::Chain;

/// Bytes of a sector, whatever the block size (5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of the header and of a range of discards.
pub(super) const HEADER_LEN: u32 = 16;
const RANGE_LEN: u32 = 16;
/// Bytes of the disk's name.
const ID_LEN: usize = 20;

/// Most ranges in one discard or write-zeroes request.
pub(super) const RANGES_MAX: u32 = 16;
/// Most sectors of one such range: 1 GiB.
pub(super) const RANGE_SECTORS_MAX: u32 = 1 << 21;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// A range's flag: its space may be given back.
const UNMAP: u32 = 1;

/// What the driver is told (5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a disk allows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub capacity: u64,
    pub block_size: u32,
    pub read_only: bool,
    pub discard: bool,
}

/// A range of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub offset: u64,
    pub len: u64,
}

/// What there is to do for a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Nothing: this is the answer.
    Answer(Status),
    /// Reads into the writable part, but for its last byte; or writes the readable part after the
    /// header.
    Transfer { op: Op, range: Range },
    /// A flush.
    Flush,
    /// `count` ranges, see [`range`]. Checked, but they can change: to be checked again.
    Ranges { zeroes: bool, count: u32 },
    /// The name, up to this many bytes.
    Id { room: u32 },
}

/// No header, or no place for an answer: the driver is broken (5.2.6.2 has no answer for it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request without header or without a status byte")]
pub(super) struct Malformed;

/// Reads a request.
pub(super) fn parse(chain: &Chain, rules: &Rules) -> Result<Work, Malformed> {
    let header: [u8; 16] = chain.read_array(0).ok_or(Malformed)?;
    let room = chain.writable().len().checked_sub(1).ok_or(Malformed)?;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let [_, _, _, _, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let data = chain.readable().len() - HEADER_LEN;
    Ok(match kind {
        IN => transfer(rules, Op::Read, sector, room),
        OUT if rules.read_only => Work::Answer(Status::IoError),
        OUT => transfer(rules, Op::Write, sector, data),
        FLUSH => Work::Flush,
        GET_ID => Work::Id { room },
        DISCARD | WRITE_ZEROES if !rules.discard => Work::Answer(Status::Unsupported),
        DISCARD | WRITE_ZEROES => {
            let zeroes = kind == WRITE_ZEROES;
            let count = data / RANGE_LEN;
            if !data.is_multiple_of(RANGE_LEN) || !(1..=RANGES_MAX).contains(&count) {
                return Ok(Work::Answer(Status::IoError));
            }
            let refused = (0..count).find_map(|index| range(chain, rules, zeroes, index).err());
            match refused {
                Some(status) => Work::Answer(status),
                None => Work::Ranges { zeroes, count },
            }
        }
        _ => Work::Answer(Status::Unsupported),
    })
}

fn transfer(rules: &Rules, op: Op, sector: u64, len: u32) -> Work {
    match checked(rules, sector, u64::from(len)) {
        // No bytes: nothing to ask the storage for.
        Some(Range { len: 0, .. }) => Work::Answer(Status::Ok),
        Some(range) => Work::Transfer { op, range },
        None => Work::Answer(Status::IoError),
    }
}

/// A range that lies on the disk, in whole blocks.
fn checked(rules: &Rules, sector: u64, len: u64) -> Option<Range> {
    let offset = sector.checked_mul(SECTOR)?;
    let block = u64::from(rules.block_size);
    let whole = offset.is_multiple_of(block) && len.is_multiple_of(block);
    let end = offset.checked_add(len)?;
    (whole && end <= rules.capacity).then_some(Range { offset, len })
}

/// Range `index` of a discard or write-zeroes request, and what to do with it.
pub(super) fn range(
    chain: &Chain,
    rules: &Rules,
    zeroes: bool,
    index: u32,
) -> Result<(Op, Range), Status> {
    let bytes: [u8; 16] = chain
        .read_array(HEADER_LEN + RANGE_LEN * index)
        .ok_or(Status::IoError)?;
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
    let (sectors, flags) = (word(8), word(12));
    // Discards have no flags; only one is known for zeroes (5.2.6.2).
    if flags & !UNMAP != 0 || (!zeroes && flags != 0) {
        return Err(Status::Unsupported);
    }
    if sectors > RANGE_SECTORS_MAX {
        return Err(Status::IoError);
    }
    let range = checked(rules, sector, u64::from(sectors) * SECTOR).ok_or(Status::IoError)?;
    let op = if zeroes {
        Op::WriteZeroes {
            unmap: flags & UNMAP != 0,
        }
    } else {
        Op::Discard
    };
    Ok((op, range))
}

/// The disk's name as GET_ID gives it: cut, or filled with zeroes.
pub(super) fn id(serial: &str) -> [u8; ID_LEN] {
    let mut id = [0; ID_LEN];
    for (to, from) in id.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    id
}
