//! What units say of themselves (SPC-4, 6.6 and 7.8; SBC-3, 6.6).

use super::disk::{DISCARD_BLOCKS_MOST, DISCARD_RANGES_MOST};
use super::mmc::{cut, half};
use super::sense::BAD_FIELD;
use super::unit::{Todo, Unit};

pub(super) const INQUIRY: u8 = 0x12;
pub(super) const REQUEST_SENSE: u8 = 0x03;
pub(super) const REPORT_LUNS: u8 = 0xa0;
const GET_CONFIGURATION: u8 = 0x46;
const GET_EVENT: u8 = 0x4a;

const VENDOR: &str = "VIREO";
const DISK: &str = "HARDDISK";
const CDROM: &str = "DVD-ROM";
const REVISION: &str = "1.0";

/// A command that does not tell what the guest is to know first, and leaves it for others.
pub(super) fn is_quiet(operation: u8) -> bool {
    matches!(
        operation,
        INQUIRY | REQUEST_SENSE | REPORT_LUNS | GET_CONFIGURATION | GET_EVENT
    )
}

/// These bytes, as far as the guest has room.
pub(super) fn give(bytes: Vec<u8>, room: u64) -> Todo {
    use super::mmc::Done;
    match cut(bytes, room) {
        Done::Bytes(bytes) => Todo::In(bytes),
        _ => Todo::Good,
    }
}

/// Text of this many bytes.
fn text(text: &str, len: usize) -> impl Iterator<Item = u8> {
    let own = text.bytes().map(|b| match b {
        b' '..=b'~' => b,
        _ => b'_',
    });
    own.chain(std::iter::repeat(b' ')).take(len)
}

fn or<'a>(own: &'a str, usual: &'a str) -> &'a str {
    if own.is_empty() { usual } else { own }
}

pub(super) fn inquiry(unit: &Unit, cdb: &[u8; 32]) -> Todo {
    let options = &unit.options;
    let room = half16(cdb, 3);
    let kind = if options.cdrom { 5 } else { 0 };
    if cdb[1] & 1 != 0 {
        return match page(unit, cdb[2]) {
            Some(body) => {
                let len = u16::try_from(body.len()).unwrap_or(u16::MAX);
                let [high, low] = len.to_be_bytes();
                let mut bytes = vec![kind, cdb[2], high, low];
                bytes.extend(body);
                give(bytes, room)
            }
            None => Todo::Check(BAD_FIELD),
        };
    }
    if cdb[2] != 0 {
        return Todo::Check(BAD_FIELD);
    }
    // Removable media; SPC-3; 31 bytes follow; commands are queued.
    let removable = if options.cdrom { 0x80 } else { 0 };
    let mut bytes = vec![kind, removable, 5, 0x02, 31, 0, 0, 0x02];
    bytes.extend(text(or(&options.vendor, VENDOR), 8));
    let product = if options.cdrom { CDROM } else { DISK };
    bytes.extend(text(or(&options.product, product), 16));
    bytes.extend(text(REVISION, 4));
    give(bytes, room)
}

/// Where there is a target, but not this unit.
pub(super) fn nobody(cdb: &[u8; 32]) -> Todo {
    if cdb[1] & 1 != 0 || cdb[2] != 0 {
        return Todo::Check(BAD_FIELD);
    }
    // No device can be there.
    let mut bytes = vec![0; 36];
    (bytes[0], bytes[2], bytes[3], bytes[4]) = (0x7f, 5, 2, 31);
    give(bytes, half16(cdb, 3))
}

fn half16(cdb: &[u8; 32], at: usize) -> u64 {
    cdb.first_chunk().map_or(0, |packet| half(packet, at))
}

/// A page of vital product data, without its header.
fn page(unit: &Unit, number: u8) -> Option<Vec<u8>> {
    let options = &unit.options;
    let has_serial = !options.serial.is_empty();
    match number {
        0x00 => {
            let mut list = vec![0x00];
            list.extend(has_serial.then_some(0x80));
            list.push(0x83);
            if !options.cdrom {
                list.extend([0xb0, 0xb1, 0xb2]);
            }
            Some(list)
        }
        0x80 if has_serial => Some(text(&options.serial, options.serial.len().min(252)).collect()),
        0x83 => Some(identification(unit)),
        0xb0 if !options.cdrom => Some(limits(unit)),
        // How fast it turns is not known.
        0xb1 if !options.cdrom => Some(vec![0; 60]),
        0xb2 if !options.cdrom => {
            let mut page = vec![0; 4];
            if unit.discards() {
                // UNMAP, and WRITE SAME (16) and (10) that do the same; thin provisioning.
                page[1] = 1 << 7 | 1 << 6 | 1 << 5;
                page[2] = 2;
            }
            Some(page)
        }
        _ => None,
    }
}

fn identification(unit: &Unit) -> Vec<u8> {
    let options = &unit.options;
    let name = or(&options.serial, &options.name);
    let mut page = Vec::new();
    if !name.is_empty() {
        // ASCII, by the vendor, of the unit.
        let len = u8::try_from(name.len()).unwrap_or(u8::MAX).min(247);
        page.extend([2, 0, 0, len]);
        page.extend(text(name, len.into()));
    }
    if let Some(wwn) = options.wwn {
        // Binary, NAA, of the unit.
        page.extend([1, 3, 0, 8]);
        page.extend(wwn.to_be_bytes());
    }
    page
}

fn limits(unit: &Unit) -> Vec<u8> {
    let options = &unit.options;
    let mut page = vec![0; 60];
    let mut put =
        |at: usize, value: &[u8]| page[at - 4..at - 4 + value.len()].copy_from_slice(value);
    let physical = options.physical_block_size / options.logical_block_size;
    // WRITE SAME says how many.
    put(4, &[1]);
    put(
        6,
        &u16::try_from(physical).unwrap_or(u16::MAX).to_be_bytes(),
    );
    if unit.discards() {
        let most = DISCARD_BLOCKS_MOST;
        put(20, &most.to_be_bytes());
        put(24, &DISCARD_RANGES_MOST.to_be_bytes());
        put(28, &physical.to_be_bytes());
        put(36, &u64::from(most).to_be_bytes());
    }
    page
}
