//! The first page of a saved image.

use super::{CHUNK, STATE_MOST, SavedError, XML_MOST, damaged};

/// The first bytes of the file.
pub(super) const MAGIC: [u8; 8] = *b"VireoSav";
/// Version of the whole layout. (Sections have versions of their own.)
pub(super) const VERSION: u32 = 1;
/// Bytes of the header that mean something, its checksum the last four of them: no more than a
/// disk writes in one go.
pub(super) const LEN: usize = 512;
/// Unit of everything's place.
pub const PAGE: u64 = 4096;
/// Room for a domain's XML at least, so that it can be edited.
const XML_ROOM: u64 = 64 << 10;
/// Largest RAM that a file can hold and offsets stay far from overflow.
const RAM_MOST: u64 = 1 << 46;

/// What tells one save from every other.
pub type Id = [u8; 16];

/// What is where in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Made up for this save.
    pub id: Id,
    /// The guest is to run when it is restored.
    pub running: bool,
    /// Which of the two places for XML is in use.
    pub xml_slot: u32,
    /// Bytes of XML.
    pub xml_len: u32,
    /// Its checksum.
    pub xml_sum: u32,
    /// Bytes of each place.
    pub xml_capacity: u32,
    /// Where the device states are.
    pub state_offset: u64,
    /// Their bytes.
    pub state_len: u64,
    /// Their checksum.
    pub state_sum: u32,
    /// The checksum of the table.
    pub table_sum: u32,
    /// Where the table of RAM's checksums is.
    pub table_offset: u64,
    /// Where RAM is.
    pub ram_offset: u64,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Bytes of the whole file.
    pub file_bytes: u64,
}

/// Words of 4 bytes into a header, one after the other.
struct Encoder {
    bytes: [u8; LEN],
    at: usize,
}

impl Encoder {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
}

struct Decoder<'a>(&'a [u8]);

impl Decoder<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (first, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *first
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

fn pages(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE)
}

impl Header {
    /// Where everything goes; what is known later only comes later.
    pub(super) fn lay_out(
        id: Id,
        xml_len: usize,
        state_room: u64,
        ram_bytes: u64,
    ) -> Result<Self, SavedError> {
        let too_much = |what, bytes| Err(SavedError::TooMuch { what, bytes });
        if xml_len > XML_MOST {
            return too_much("domain XML", xml_len as u64);
        }
        if state_room > STATE_MOST {
            return too_much("device states", state_room);
        }
        if ram_bytes > RAM_MOST {
            return too_much("RAM", ram_bytes);
        }
        let capacity = pages((xml_len as u64 * 2).max(XML_ROOM));
        let state_offset = PAGE + 2 * capacity;
        let table_offset = state_offset + pages(state_room);
        let ram_offset = table_offset + pages(ram_bytes.div_ceil(CHUNK) * 4);
        Ok(Self {
            id,
            running: false,
            xml_slot: 0,
            // At most XML_MOST, and twice that.
            xml_len: xml_len as u32,
            xml_sum: 0,
            xml_capacity: capacity as u32,
            state_offset,
            state_len: 0,
            state_sum: 0,
            table_sum: 0,
            table_offset,
            ram_offset,
            ram_bytes,
            file_bytes: ram_offset + ram_bytes,
        })
    }

    /// Where a place for XML is.
    pub(super) fn xml_at(&self, slot: u32) -> u64 {
        PAGE + u64::from(slot) * u64::from(self.xml_capacity)
    }

    /// How many chunks RAM has.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.ram_bytes.div_ceil(CHUNK)
    }

    /// The header's bytes without the rest of its page.
    pub(super) fn encode_short(&self) -> [u8; LEN] {
        let mut out = Encoder {
            bytes: [0; LEN],
            at: 0,
        };
        out.put(&MAGIC);
        out.put(&VERSION.to_le_bytes());
        out.put(&u32::from(self.running).to_le_bytes());
        out.put(&self.id);
        for word in [
            self.xml_slot,
            self.xml_len,
            self.xml_sum,
            self.xml_capacity,
            self.state_sum,
            self.table_sum,
        ] {
            out.put(&word.to_le_bytes());
        }
        for word in [
            self.state_offset,
            self.state_len,
            self.table_offset,
            self.ram_offset,
            self.ram_bytes,
            self.file_bytes,
        ] {
            out.put(&word.to_le_bytes());
        }
        let sum = crc32c::crc32c(&out.bytes[..LEN - 4]);
        out.at = LEN - 4;
        out.put(&sum.to_le_bytes());
        out.bytes
    }

    /// The whole page.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut page = self.encode_short().to_vec();
        page.resize(PAGE as usize, 0);
        page
    }

    /// Reads it, and checks that it makes sense.
    pub(super) fn decode(bytes: &[u8; LEN]) -> Result<Self, SavedError> {
        let mut input = Decoder(bytes);
        let magic: [u8; 8] = input.take();
        if magic != MAGIC {
            return Err(if magic == [0; 8] && bytes.iter().all(|b| *b == 0) {
                SavedError::Unfinished
            } else {
                SavedError::Foreign
            });
        }
        let version = input.u32();
        if version != VERSION {
            return Err(SavedError::Version(version));
        }
        let sum = bytes
            .last_chunk::<4>()
            .map_or(0, |b| u32::from_le_bytes(*b));
        if crc32c::crc32c(&bytes[..LEN - 4]) != sum {
            return Err(damaged("its header has another checksum"));
        }
        let running = input.u32() & 1 != 0;
        let id = input.take();
        let [
            xml_slot,
            xml_len,
            xml_sum,
            xml_capacity,
            state_sum,
            table_sum,
        ] = std::array::from_fn(|_| input.u32());
        let [
            state_offset,
            state_len,
            table_offset,
            ram_offset,
            ram_bytes,
            file_bytes,
        ] = std::array::from_fn(|_| input.u64());
        let header = Self {
            id,
            running,
            xml_slot,
            xml_len,
            xml_sum,
            xml_capacity,
            state_offset,
            state_len,
            state_sum,
            table_sum,
            table_offset,
            ram_offset,
            ram_bytes,
            file_bytes,
        };
        if header.holds_together() {
            Ok(header)
        } else {
            Err(damaged("its header contradicts itself"))
        }
    }

    /// The parts lie one behind the other.
    fn holds_together(&self) -> bool {
        let capacity = u64::from(self.xml_capacity);
        let parts = [
            (PAGE, 2 * capacity),
            (self.state_offset, self.state_len),
            (self.table_offset, self.chunks().saturating_mul(4)),
            (self.ram_offset, self.ram_bytes),
            (self.file_bytes, 0),
        ];
        let in_order = parts.windows(2).all(|pair| {
            let end = pair[0].0.checked_add(pair[0].1);
            end.is_some_and(|end| end <= pair[1].0)
        });
        in_order
            && self.xml_slot < 2
            && self.xml_len <= self.xml_capacity
            && self.state_len <= STATE_MOST
            && self.ram_bytes <= RAM_MOST
            && self.ram_offset.is_multiple_of(PAGE)
            && self.ram_bytes.is_multiple_of(PAGE)
            && self.ram_offset.checked_add(self.ram_bytes) == Some(self.file_bytes)
    }
}
