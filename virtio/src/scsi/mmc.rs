//! What every CD-ROM drive does for a packet, wherever it is (MMC-6, SPC-3).

use serde::{Deserialize, Serialize};

use super::sense::{
    BAD_FIELD, BAD_OPERATION, ILLEGAL_REQUEST, NO_SENSE, NO_SUCH_BLOCK, NOT_READY, NOT_SAVED,
    Sense, UNIT_ATTENTION, fixed,
};

/// Bytes of a block.
pub const BLOCK: u64 = 2048;
/// What is larger is a DVD: 80 minutes.
const CD_BLOCKS: u64 = 80 * 60 * 75;
/// Blocks before address 0, in minutes, seconds and frames.
const LEAD_IN: u64 = 150;

/// No medium, and the tray is closed.
pub const NO_MEDIUM_CLOSED: Sense = (NOT_READY, 0x3a, 1);
const NO_MEDIUM_OPEN: Sense = (NOT_READY, 0x3a, 2);
const WRONG_MEDIUM: Sense = (ILLEGAL_REQUEST, 0x30, 2);
const LOCKED: Sense = (ILLEGAL_REQUEST, 0x53, 2);
const MEDIUM_CHANGED: Sense = (UNIT_ATTENTION, 0x28, 0);

/// Media events (MMC-6, 6.6.2.3).
const EVENT_EJECT: u8 = 1;
const EVENT_NEW: u8 = 2;
const EVENT_GONE: u8 = 3;

// Operation codes.
const TEST_UNIT_READY: u8 = 0x00;
const REQUEST_SENSE: u8 = 0x03;
/// Who the drive is: it depends on what it is connected by.
pub const INQUIRY: u8 = 0x12;
const START_STOP: u8 = 0x1b;
const PREVENT_ALLOW: u8 = 0x1e;
const READ_CAPACITY: u8 = 0x25;
const READ_10: u8 = 0x28;
const SEEK_10: u8 = 0x2b;
const READ_TOC: u8 = 0x43;
const GET_CONFIGURATION: u8 = 0x46;
const GET_EVENT: u8 = 0x4a;
const READ_DISC_INFORMATION: u8 = 0x51;
const MODE_SENSE_10: u8 = 0x5a;
const READ_12: u8 = 0xa8;
const READ_DVD_STRUCTURE: u8 = 0xad;
const SET_SPEED: u8 = 0xbb;
const MECHANISM_STATUS: u8 = 0xbd;
const READ_CD: u8 = 0xbe;

/// Tray, medium, and what the guest is still to be told of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdState {
    sense: Sense,
    /// The guest is told first thing that the medium is another one.
    changed: bool,
    /// The media event that is to be told, 0 for none.
    event: u8,
    open: bool,
    locked: bool,
    medium: bool,
}

impl CdState {
    /// With the tray in.
    #[must_use]
    pub fn new(medium: bool) -> Self {
        Self {
            sense: NO_SENSE,
            changed: false,
            event: 0,
            open: false,
            locked: false,
            medium,
        }
    }

    /// The tray is out.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// The guest keeps the tray from being opened.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.locked
    }

    /// There is something in the tray, wherever that is.
    #[must_use]
    pub fn has_medium(&self) -> bool {
        self.medium
    }

    /// A reset: the tray stays where it is, unlocked.
    pub fn reset(&mut self) {
        self.locked = false;
        self.sense = NO_SENSE;
    }

    /// Power-on: the tray is in. Whether it was out.
    pub fn power_on(&mut self) -> bool {
        let moved = self.open;
        *self = Self::new(self.medium);
        moved
    }

    /// Whether the medium may be taken out; if not, the guest is asked to let go of it.
    pub fn ask_for_medium(&mut self) -> bool {
        let free = self.open || !self.locked;
        if !free {
            self.event = EVENT_EJECT;
        }
        free
    }

    /// Another medium is in the tray, which is in again.
    pub fn change(&mut self, medium: bool) {
        self.open = false;
        self.medium = medium;
        self.changed = medium;
        self.event = if medium { EVENT_NEW } else { EVENT_GONE };
        if !medium {
            self.locked = false;
        }
    }

    /// What is kept of a command for whoever asks what was wrong with it.
    pub fn note(&mut self, operation: u8, result: &Result<Done, Sense>) {
        match result {
            Err(sense) => self.sense = *sense,
            // The command before it counts still.
            Ok(Done::Bytes(_)) if operation == GET_EVENT => {}
            Ok(_) => self.sense = NO_SENSE,
        }
    }

    /// There is a medium that can be read; otherwise why not.
    fn ready(&self) -> Result<(), Sense> {
        match (self.open, self.medium) {
            (false, true) => Ok(()),
            (false, false) => Err(NO_MEDIUM_CLOSED),
            (true, _) => Err(NO_MEDIUM_OPEN),
        }
    }
}

/// A drive as the rest of it says it is.
#[derive(Debug, Clone, Copy)]
pub struct Disc {
    /// Blocks of what is in it.
    pub blocks: u64,
    /// What it is connected by (MMC-6, 5.3.2: 1 SCSI, 2 ATAPI).
    pub interface: u8,
}

/// What there is to do for a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Done {
    /// Nothing any more.
    Nothing,
    /// These go to the guest.
    Bytes(Vec<u8>),
    /// Blocks that are to be read: the first, how many.
    Blocks(u64, u64),
}

/// Two bytes of a packet, the higher first.
#[must_use]
pub fn half(packet: &[u8; 16], at: usize) -> u64 {
    u64::from(packet[at]) << 8 | u64::from(packet[at + 1])
}

fn word(packet: &[u8; 16], at: usize) -> u64 {
    half(packet, at) << 16 | half(packet, at + 2)
}

/// No more than the guest has room for.
#[must_use]
pub fn cut(mut bytes: Vec<u8>, room: u64) -> Done {
    bytes.truncate(room as usize);
    if bytes.is_empty() {
        return Done::Nothing;
    }
    Done::Bytes(bytes)
}

/// Blocks that are on the medium.
fn range(disc: Disc, first: u64, count: u64) -> Result<Done, Sense> {
    if first + count > disc.blocks {
        return Err(NO_SUCH_BLOCK);
    }
    match count {
        0 => Ok(Done::Nothing),
        _ => Ok(Done::Blocks(first, count)),
    }
}

/// What is to be done for a packet, but for [`INQUIRY`].
///
/// # Errors
/// What is wrong with it.
pub fn run(disc: Disc, cd: &mut CdState, packet: &[u8; 16]) -> Result<Done, Sense> {
    let result = carry_out(disc, cd, packet);
    cd.note(packet[0], &result);
    result
}

fn carry_out(disc: Disc, cd: &mut CdState, packet: &[u8; 16]) -> Result<Done, Sense> {
    let operation = packet[0];
    let quiet = [REQUEST_SENSE, INQUIRY, GET_CONFIGURATION, GET_EVENT];
    if cd.changed && !cd.open && !quiet.contains(&operation) {
        cd.changed = false;
        return Err(MEDIUM_CHANGED);
    }
    match operation {
        TEST_UNIT_READY => cd.ready().map(|()| Done::Nothing),
        REQUEST_SENSE => Ok(request_sense(cd, packet)),
        START_STOP => start_stop(cd, packet),
        PREVENT_ALLOW => {
            cd.locked = packet[4] & 1 != 0;
            Ok(Done::Nothing)
        }
        READ_CAPACITY => {
            cd.ready()?;
            let last = u32::try_from(disc.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
            let mut bytes = last.to_be_bytes().to_vec();
            bytes.extend((BLOCK as u32).to_be_bytes());
            Ok(Done::Bytes(bytes))
        }
        READ_10 => {
            cd.ready()?;
            range(disc, word(packet, 2), half(packet, 7))
        }
        READ_12 => {
            cd.ready()?;
            range(disc, word(packet, 2), word(packet, 6))
        }
        READ_CD => {
            cd.ready()?;
            let count = u64::from(packet[6]) << 16 | half(packet, 7);
            match packet[9] & 0xf8 {
                0 => Ok(Done::Nothing),
                // User data, and nothing around it.
                0x10 => range(disc, word(packet, 2), count),
                _ => Err(BAD_FIELD),
            }
        }
        SEEK_10 => {
            cd.ready()?;
            range(disc, word(packet, 2), 1).map(|_| Done::Nothing)
        }
        READ_TOC => {
            cd.ready()?;
            read_toc(disc, packet)
        }
        GET_CONFIGURATION => get_configuration(disc, cd, packet),
        GET_EVENT => get_event(cd, packet),
        READ_DISC_INFORMATION => {
            cd.ready()?;
            if packet[1] & 7 != 0 {
                return Err(BAD_FIELD);
            }
            let mut bytes = vec![0; 34];
            // Length; a complete disc with a complete session; first track, sessions, tracks of the last
            // session; unrestricted use.
            bytes[..8].copy_from_slice(&[0, 32, 0x0e, 1, 1, 1, 1, 0x20]);
            Ok(cut(bytes, half(packet, 7)))
        }
        MODE_SENSE_10 => mode_sense(cd, packet),
        READ_DVD_STRUCTURE => read_dvd_structure(disc, cd, packet),
        SET_SPEED => Ok(Done::Nothing),
        MECHANISM_STATUS => {
            let mut bytes = vec![0; 8];
            // The door is open.
            bytes[1] = if cd.open { 1 << 4 } else { 0 };
            Ok(cut(bytes, half(packet, 8)))
        }
        _ => Err(BAD_OPERATION),
    }
}

fn request_sense(cd: &mut CdState, packet: &[u8; 16]) -> Done {
    if cd.sense == NO_SENSE && cd.changed && !cd.open {
        cd.changed = false;
        cd.sense = MEDIUM_CHANGED;
    }
    // Of the command before.
    let sense = std::mem::replace(&mut cd.sense, NO_SENSE);
    cut(fixed(sense).to_vec(), packet[4].into())
}

fn start_stop(cd: &mut CdState, packet: &[u8; 16]) -> Result<Done, Sense> {
    let (start, eject) = (packet[4] & 1 != 0, packet[4] & 2 != 0);
    // Another power condition: it makes no difference.
    if packet[4] >> 4 != 0 || !eject {
        return Ok(Done::Nothing);
    }
    match (start, cd.open) {
        (false, false) if cd.locked => Err(LOCKED),
        // What the guest does itself it need not be told: Linux takes no data from a medium that it hears is another
        // one while it opens the drive.
        _ => {
            cd.open = !start;
            Ok(Done::Nothing)
        }
    }
}

/// An address as a table of contents has it: in minutes, seconds and frames, or as a number.
fn address(block: u64, msf: bool) -> [u8; 4] {
    if !msf {
        return u32::try_from(block).unwrap_or(u32::MAX).to_be_bytes();
    }
    let at = block + LEAD_IN;
    // A DVD has more than an address has room for.
    let minutes = u8::try_from(at / 75 / 60).unwrap_or(u8::MAX);
    let [second, frame] = [at / 75 % 60, at % 75].map(|part| part as u8);
    [0, minutes, second, frame]
}

fn read_toc(disc: Disc, packet: &[u8; 16]) -> Result<Done, Sense> {
    let msf = packet[1] & 2 != 0;
    let format = match packet[2] & 0xf {
        // Where older drives had it.
        0 => packet[9] >> 6,
        format => format,
    };
    let end = disc.blocks;
    // One track of data, in one session; what follows it.
    const DATA: u8 = 0x14;
    const LEAD_OUT: u8 = 0xaa;
    let mut bytes = vec![0, 0, 1, 1];
    match format {
        0 => {
            let from = packet[6];
            if from > 1 && from != LEAD_OUT {
                return Err(BAD_FIELD);
            }
            for (track, at) in [(1, 0), (LEAD_OUT, end)] {
                if track >= from {
                    bytes.extend([0, DATA, track, 0]);
                    bytes.extend(address(at, msf));
                }
            }
        }
        1 => {
            bytes.extend([0, DATA, 1, 0]);
            bytes.extend(address(0, msf));
        }
        2 => {
            for (point, [_, m, s, f]) in [
                // First track, last track, where it ends, where the track begins.
                (0xa0, [0, 1, 0, 0]),
                (0xa1, [0, 1, 0, 0]),
                (0xa2, address(end, true)),
                (1, address(0, true)),
            ] {
                bytes.extend([1, DATA, 0, point, 0, 0, 0, 0, m, s, f]);
            }
        }
        _ => return Err(BAD_FIELD),
    }
    let len = u16::try_from(bytes.len() - 2).unwrap_or(u16::MAX);
    bytes[..2].copy_from_slice(&len.to_be_bytes());
    Ok(cut(bytes, half(packet, 7)))
}

const PROFILE_CD: u16 = 0x08;
const PROFILE_DVD: u16 = 0x10;

fn is_dvd(disc: Disc) -> bool {
    disc.blocks > CD_BLOCKS
}

fn get_configuration(disc: Disc, cd: &CdState, packet: &[u8; 16]) -> Result<Done, Sense> {
    let (which, from) = (packet[1] & 3, half(packet, 2));
    let current = match (cd.ready(), is_dvd(disc)) {
        (Err(_), _) => 0,
        (Ok(()), false) => PROFILE_CD,
        (Ok(()), true) => PROFILE_DVD,
    };
    let profile = |number: u16| {
        let [high, low] = number.to_be_bytes();
        [high, low, u8::from(number == current), 0]
    };
    let there = current != 0;
    let cd_there = current == PROFILE_CD;
    let blocking = [&(BLOCK as u32).to_be_bytes()[..], &[0, 1, 1, 0]].concat();
    // Feature, version and persistence, whether it is in use, what follows.
    let features: [(u16, u8, bool, Vec<u8>); 8] = [
        (
            0x0000,
            0x03,
            true,
            [profile(PROFILE_DVD), profile(PROFILE_CD)].concat(),
        ),
        // Core, and what it is connected by; it tells of events when it is asked; removable, with a lock and a tray that ejects.
        (
            0x0001,
            0x0b,
            true,
            vec![0, 0, 0, disc.interface, 1, 0, 0, 0],
        ),
        (0x0002, 0x07, true, vec![2, 0, 0, 0]),
        (0x0003, 0x03, true, vec![0x39, 0, 0, 0]),
        // Random reading; discs of several kinds; CDs; DVDs.
        (0x0010, 0x00, there, blocking),
        (0x001d, 0x00, cd_there, vec![]),
        (0x001e, 0x08, cd_there, vec![0, 0, 0, 0]),
        (0x001f, 0x00, current == PROFILE_DVD, vec![0, 0, 0, 0]),
    ];
    let mut bytes = vec![0; 8];
    for (feature, version, current, body) in features {
        let wanted = match which {
            0 => u64::from(feature) >= from,
            1 => u64::from(feature) >= from && current,
            2 => u64::from(feature) == from,
            _ => return Err(BAD_FIELD),
        };
        if wanted {
            bytes.extend(feature.to_be_bytes());
            bytes.extend([
                version | u8::from(current),
                u8::try_from(body.len()).unwrap_or(0),
            ]);
            bytes.extend(body);
        }
    }
    let len = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&len.to_be_bytes());
    bytes[6..8].copy_from_slice(&current.to_be_bytes());
    Ok(cut(bytes, half(packet, 7)))
}

fn get_event(cd: &mut CdState, packet: &[u8; 16]) -> Result<Done, Sense> {
    const MEDIA: u8 = 4;
    // Only when it is asked: nothing is queued here.
    if packet[1] & 1 == 0 {
        return Err(BAD_FIELD);
    }
    let room = half(packet, 7);
    if packet[4] & 1 << MEDIA == 0 {
        return Ok(cut(vec![0, 2, 1 << 7, 1 << MEDIA], room));
    }
    let present = if cd.medium && !cd.open { 2 } else { 0 };
    let mut bytes = vec![0, 6, MEDIA, 1 << MEDIA];
    bytes.extend([cd.event, u8::from(cd.open) | present, 0, 0]);
    if room > 4 {
        cd.event = 0;
    }
    Ok(cut(bytes, room))
}

fn mode_sense(cd: &CdState, packet: &[u8; 16]) -> Result<Done, Sense> {
    let (control, page) = (packet[2] >> 6, packet[2] & 0x3f);
    if control == 3 {
        return Err(NOT_SAVED);
    }
    let changeable = control == 1;
    // Errors are corrected, and reading goes on.
    let recovery = [0x01, 6, 0, 5, 0, 0, 0, 0];
    // Reads CD-R, CD-RW and DVD; locks, ejects, has a tray; speeds, volumes and memory don't mean much.
    let lock = 1 << 5 | 1 << 3 | 1 << 0 | u8::from(cd.locked) << 1;
    let [fast, slow] = 7056u16.to_be_bytes();
    let capabilities = [
        0x2a, 18, 0x0b, 0, 0x60, 0x00, lock, 0, fast, slow, 0, 2, 2, 0, fast, slow, 0, 0, 0, 0,
    ];
    let mut bytes = vec![0; 8];
    let mut add = |page: &[u8]| {
        let body = page.iter().enumerate();
        // Nothing can be changed.
        bytes.extend(body.map(|(at, byte)| if changeable && at > 1 { 0 } else { *byte }));
    };
    match page {
        0x01 => add(&recovery),
        0x2a => add(&capabilities),
        0x3f => {
            add(&recovery);
            add(&capabilities);
        }
        _ => return Err(BAD_FIELD),
    }
    let len = u16::try_from(bytes.len() - 2).unwrap_or(u16::MAX);
    bytes[..2].copy_from_slice(&len.to_be_bytes());
    // A disc with data, none, or an open door.
    bytes[2] = match (cd.open, cd.medium) {
        (true, _) => 0x71,
        (false, true) => 0x01,
        (false, false) => 0x70,
    };
    Ok(cut(bytes, half(packet, 7)))
}

fn read_dvd_structure(disc: Disc, cd: &CdState, packet: &[u8; 16]) -> Result<Done, Sense> {
    let (media, layer, format) = (packet[1] & 0xf, packet[6], packet[7]);
    if media != 0 {
        return Err(BAD_FIELD);
    }
    let mut body = match format {
        // What there is: physical format, copyright, manufacturer's.
        0xff => vec![
            0x00, 0x40, 0x08, 0x04, 0x01, 0x40, 0x00, 0x08, 0x04, 0x40, 0x08, 0x04,
        ],
        _ => {
            cd.ready()?;
            if !is_dvd(disc) {
                return Err(WRONG_MEDIUM);
            }
            match (format, layer) {
                (0, 0) => {
                    // A read-only DVD of 120 mm, one layer; from its first sector to its last.
                    let mut body = vec![0; 2048];
                    (body[0], body[1], body[2]) = (0x01, 0x0f, 0x01);
                    let first: u32 = 0x3_0000;
                    let last = u32::try_from(disc.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
                    body[4..8].copy_from_slice(&first.to_be_bytes());
                    let last = first.saturating_add(last).min(0xff_ffff);
                    body[8..12].copy_from_slice(&last.to_be_bytes());
                    body
                }
                // Not protected, all regions.
                (1, _) => vec![0; 4],
                (4, _) => vec![0; 2048],
                _ => return Err(BAD_FIELD),
            }
        }
    };
    let len = u16::try_from(body.len() + 2).unwrap_or(u16::MAX);
    let mut bytes = len.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.append(&mut body);
    Ok(cut(bytes, half(packet, 8)))
}
