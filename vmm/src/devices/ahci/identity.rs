//! What drives say of themselves: IDENTIFY DEVICE (ACS-3, 7.12.7) and IDENTIFY PACKET DEVICE.

use super::ata::{MULTIPLE_MOST, TRIM_BLOCKS};
use super::drive::{Drive, DriveState};
use crate::num::{low16, low32};

/// The geometry that addresses by cylinder, head and sector are of.
pub const HEADS: u64 = 16;
/// As above.
pub const SECTORS: u64 = 63;
const CYLINDERS_MOST: u64 = 16383;

/// What all drives are called by.
pub const DISK: &str = "VIREO HARDDISK";
/// As above.
pub const CDROM: &str = "VIREO DVD-ROM";
/// Version of the drives' own firmware.
pub const REVISION: &str = "1.0";

/// All that a word's valid bit says.
const VALID: u16 = 1 << 14;

struct Page([u16; 256]);

impl Page {
    /// Text: the first of two bytes is the higher one.
    fn text(&mut self, at: usize, words: usize, text: &str) {
        let mut bytes = text.bytes().map(|b| {
            if b.is_ascii_graphic() || b == b' ' {
                b
            } else {
                b'_'
            }
        });
        for word in &mut self.0[at..at + words] {
            let mut next = || bytes.next().unwrap_or(b' ');
            *word = u16::from_be_bytes([next(), next()]);
        }
    }

    fn double(&mut self, at: usize, value: u32) {
        self.0[at] = low16(value);
        self.0[at + 1] = low16(value >> 16);
    }

    fn bytes(mut self) -> Vec<u8> {
        // The last word: a mark, and what makes the sum of all bytes zero.
        self.0[255] = 0xa5;
        let mut bytes: Vec<u8> = self.0.iter().flat_map(|word| word.to_le_bytes()).collect();
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        if let Some(last) = bytes.last_mut() {
            *last = 0u8.wrapping_sub(sum);
        }
        bytes
    }
}

fn common(drive: &Drive, state: &DriveState, model: &str) -> Page {
    let mut page = Page([0; 256]);
    page.text(10, 10, &drive.options.serial);
    page.text(23, 4, REVISION);
    page.text(27, 20, model);
    // LBA, DMA, IORDY.
    page.0[49] = 1 << 11 | 1 << 9 | 1 << 8;
    page.0[50] = VALID;
    // Words 64 to 70, and 88, are valid.
    page.0[53] = 1 << 2 | 1 << 1;
    page.0[63] = 0x07 | u16::from(state.multiword_mode) << 8;
    page.0[64] = 3;
    page.0[65..69].fill(120);
    // Generations 1 to 3.
    page.0[76] = 0b1110;
    // ATA-4 to ACS-3.
    page.0[80] = 0x7f0;
    page.0[83] = VALID;
    page.0[84] = VALID;
    page.0[86] = 0;
    page.0[87] = VALID;
    page.0[88] = 0x7f | u16::from(state.ultra_mode) << 8;
    // A serial transport, up to SATA 3.0.
    page.0[222] = 0x107f;
    page
}

/// A disk's.
#[must_use]
pub fn disk(drive: &Drive, state: &DriveState) -> Vec<u8> {
    let mut page = common(drive, state, DISK);
    let sectors = drive.capacity() / 512;
    let cylinders = (sectors / (HEADS * SECTORS)).min(CYLINDERS_MOST);
    page.0[0] = 1 << 6;
    page.0[1] = low16(low32(cylinders));
    page.0[3] = low16(low32(HEADS));
    page.0[6] = low16(low32(SECTORS));
    page.0[47] = 0x8000 | u16::from(MULTIPLE_MOST);
    if state.multiple > 0 {
        page.0[59] = 0x100 | u16::from(state.multiple);
    }
    page.double(60, low32(sectors.min(0x0fff_ffff)));
    // Queue depth, and that there is a queue.
    page.0[75] = u16::from(super::hba::SLOTS) - 1;
    page.0[76] |= 1 << 8;
    // SMART, power management, write cache, looking ahead, NOP; 48 bits, FLUSH CACHE (EXT); logs, FUA.
    page.0[82] = VALID | 1 << 6 | 1 << 5 | 1 << 3 | 1 << 0;
    page.0[83] = VALID | 1 << 13 | 1 << 12 | 1 << 10;
    page.0[84] = VALID | 1 << 6 | 1 << 5;
    let cached = if drive.storage.writethrough() {
        0
    } else {
        1 << 5
    };
    page.0[85] = VALID | 1 << 6 | cached | 1 << 3 | u16::from(state.smart);
    page.0[86] = 1 << 13 | 1 << 12 | 1 << 10;
    page.0[87] = VALID | 1 << 6 | 1 << 5;
    page.double(100, low32(sectors));
    page.double(102, low32(sectors >> 32));
    page.0[105] = TRIM_BLOCKS;
    let exponent = (drive.options.physical_block_size / 512)
        .checked_ilog2()
        .unwrap_or(0);
    if exponent > 0 {
        page.0[106] = VALID | 1 << 13 | low16(exponent);
    }
    if !drive.options.read_only {
        page.0[169] = 1;
    }
    page.bytes()
}

/// A CD-ROM drive's.
#[must_use]
pub fn cdrom(drive: &Drive, state: &DriveState) -> Vec<u8> {
    let mut page = common(drive, state, CDROM);
    // ATAPI, a CD-ROM drive, removable media, packets of 12 bytes at once.
    page.0[0] = 2 << 14 | 5 << 8 | 1 << 7 | 2 << 5;
    // PACKET, DEVICE RESET, NOP.
    page.0[82] = VALID | 1 << 9 | 1 << 4;
    page.0[85] = page.0[82];
    page.bytes()
}
