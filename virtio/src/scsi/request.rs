//! What a driver's requests look like (5.6.6.1, 5.6.6.2).

use super::sense::{NO_SENSE, Sense, fixed};
use super::unit::Address;
use crate::queue::Chain;

/// What a command became of (5.6.6.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Response {
    Ok = 0,
    /// There are more data than room for them.
    Overrun = 1,
    Aborted = 2,
    BadTarget = 3,
    Reset = 4,
    Failure = 9,
    FunctionSucceeded = 10,
    FunctionRejected = 11,
    IncorrectLun = 12,
}

/// SCSI's status of a command that sense data says more of (SAM-5, 5.3).
const CHECK_CONDITION: u8 = 2;

/// Bytes of a request before its command, and of a response before sense data.
const HEAD: u32 = 19;
const RESPONSE: u32 = 12;
/// Bytes of a command that count.
const CDB: usize = 32;

/// Sizes that the driver can choose (5.6.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub sense: u32,
    pub cdb: u32,
}

impl Sizes {
    /// As the device has them at first.
    pub const FIRST: Self = Self { sense: 96, cdb: 32 };
    pub const SENSE_MOST: u32 = 252;
    pub const CDB_MOST: u32 = 260;

    /// Bytes of a request before the data that it brings.
    pub fn request(self) -> u32 {
        HEAD + self.cdb
    }

    /// Bytes of a response before the data that it takes.
    pub fn response(self) -> u32 {
        RESPONSE + self.sense
    }
}

/// Whom a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whom {
    Unit(Address),
    /// Nobody here can be meant.
    Nobody,
}

/// A unit's name in a request: the bus, the target, and one level of SAM's addresses (5.6.6.1).
pub(super) fn whom(bytes: [u8; 8]) -> Whom {
    let [bus, target, high, low, rest @ ..] = bytes;
    if bus != 1 || rest != [0; 4] {
        return Whom::Nobody;
    }
    match high >> 6 {
        // Peripheral, and flat space.
        0 if high == 0 => Whom::Unit((target, low.into())),
        1 => Whom::Unit((target, u16::from_be_bytes([high & 0x3f, low]))),
        _ => Whom::Nobody,
    }
}

/// The other way round, as REPORT LUNS and events have it: Linux knows units by what these two bytes say.
pub(super) fn reported(lun: u16) -> [u8; 2] {
    let [high, low] = lun.to_be_bytes();
    // Up to 255 as guests have always known them.
    [if high == 0 { 0 } else { high | 0x40 }, low]
}

/// A unit's name in an event.
pub(super) fn name((target, lun): Address) -> [u8; 8] {
    let [high, low] = reported(lun);
    [1, target, high, low, 0, 0, 0, 0]
}

/// A command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Command {
    pub whom: Whom,
    pub tag: u64,
    pub cdb: [u8; CDB],
    /// Bytes of data that it brings, and that it has room for.
    pub brings: u32,
    pub room: u32,
}

/// Too little of a request to be one (5.6.6.1 has no answer for it): the driver is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request that is too short")]
pub(super) struct Malformed;

/// Reads a command.
pub(super) fn parse(chain: &Chain, sizes: Sizes) -> Result<Command, Malformed> {
    let head: [u8; HEAD as usize] = chain.read_array(0).ok_or(Malformed)?;
    let brings = chain.readable().len().checked_sub(sizes.request());
    let room = chain.writable().len().checked_sub(sizes.response());
    let (Some(brings), Some(room)) = (brings, room) else {
        return Err(Malformed);
    };
    let [a, b, c, d, e, f, g, h, tag @ ..] = head;
    let tag = tag.first_chunk().map_or(0, |tag| u64::from_le_bytes(*tag));
    let mut cdb = [0; CDB];
    let len = CDB.min(sizes.cdb as usize);
    chain.read_at(HEAD, &mut cdb[..len]);
    Ok(Command {
        whom: whom([a, b, c, d, e, f, g, h]),
        tag,
        cdb,
        brings,
        room,
    })
}

/// What a command ended with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answer {
    pub response: Response,
    pub sense: Sense,
    /// Bytes of data that there was more room for, or that were more than wanted.
    pub residual: u32,
}

impl Answer {
    /// Without data.
    pub fn of(response: Response) -> Self {
        Self {
            response,
            sense: NO_SENSE,
            residual: 0,
        }
    }

    /// Writes it.
    pub fn put(&self, chain: &Chain, sizes: Sizes) {
        let mut bytes = [0; RESPONSE as usize + Sizes::SENSE_MOST as usize];
        let (head, sense) = bytes.split_at_mut(RESPONSE as usize);
        if self.sense != NO_SENSE {
            let own = fixed(self.sense);
            let len = own.len().min(sizes.sense as usize);
            sense[..len].copy_from_slice(&own[..len]);
            head[..4].copy_from_slice(&(len as u32).to_le_bytes());
            head[10] = CHECK_CONDITION;
        }
        head[4..8].copy_from_slice(&self.residual.to_le_bytes());
        head[11] = self.response as u8;
        chain.write_at(0, &bytes[..sizes.response() as usize]);
    }
}
