//! Entries of L1 and L2 tables.

use super::Geometry;

/// Of L1 entries and standard L2 entries: the refcount is one.
pub const COPIED: u64 = 1 << 63;
/// Of L2 entries.
pub const COMPRESSED: u64 = 1 << 62;
/// Of standard L2 entries of version 3: reads as zeroes.
pub const ZERO: u64 = 1;
/// Of standard L2 entries: nobody has a meaning for these bits.
pub const RESERVED: u64 = !(COPIED | COMPRESSED | ZERO | OFFSET);
/// Where a host offset is in an entry.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An L2 entry as it is in the table; `bits` are the subclusters' with extended entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    pub raw: u64,
    pub bits: u64,
}

/// What an entry means for one subcluster (for all of the cluster without extended entries).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Ask the backing file.
    Absent,
    /// Reads as zeroes.
    Zero,
    /// In the host cluster.
    Data,
    /// In compressed data.
    Compressed,
}

impl Entry {
    /// Reads entry `index` of a piece of a table.
    pub fn get(geo: &Geometry, table: &[u8], index: usize) -> Self {
        let word = |at: usize| {
            table
                .get(at..at + 8)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u64::from_be_bytes)
        };
        if geo.extended {
            Self {
                raw: word(index * 16),
                bits: word(index * 16 + 8),
            }
        } else {
            Self {
                raw: word(index * 8),
                bits: 0,
            }
        }
    }

    /// Writes it as entry `index`.
    pub fn put(self, geo: &Geometry, table: &mut [u8], index: usize) {
        let size = geo.entry_size();
        let place = &mut table[index * size..(index + 1) * size];
        place[..8].copy_from_slice(&self.raw.to_be_bytes());
        if geo.extended {
            place[8..].copy_from_slice(&self.bits.to_be_bytes());
        }
    }

    /// A cluster of zeroes, which keeps the host cluster of `raw`, if any.
    pub fn zero(geo: &Geometry, raw: u64) -> Self {
        if geo.extended {
            Self {
                raw,
                bits: 0xffff_ffff << 32,
            }
        } else {
            Self {
                raw: raw | ZERO,
                bits: 0,
            }
        }
    }

    pub fn is_compressed(self) -> bool {
        self.raw & COMPRESSED != 0
    }

    /// The host cluster it owns or shares, if any.
    pub fn host(self, geo: &Geometry) -> Option<u64> {
        if self.is_compressed() {
            return None;
        }
        let host = self.raw & OFFSET;
        // With a data file host offset 0 is a place like any other.
        (host != 0 || geo.external && self.raw & COPIED != 0).then_some(host)
    }

    /// The host cluster may be written to.
    pub fn is_own(self) -> bool {
        self.raw & (COPIED | COMPRESSED) == COPIED
    }

    /// What it is for subcluster `sub`.
    pub fn state(self, geo: &Geometry, sub: u32) -> State {
        if self.is_compressed() {
            State::Compressed
        } else if geo.extended {
            if self.bits >> (32 + sub) & 1 == 1 {
                State::Zero
            } else if self.bits >> sub & 1 == 1 {
                State::Data
            } else {
                State::Absent
            }
        } else if self.raw & ZERO != 0 && geo.version >= 3 {
            State::Zero
        } else if self.host(geo).is_some() {
            State::Data
        } else {
            State::Absent
        }
    }

    /// Where compressed data begins, and how many bytes it may have.
    pub fn compressed(self, geo: &Geometry) -> (u64, u64) {
        let shift = 62 - (geo.cluster_bits - 8);
        let offset = self.raw & ((1 << shift) - 1) & ((1 << 56) - 1);
        let sectors = (self.raw & !(COPIED | COMPRESSED)) >> shift;
        (offset, (sectors + 1) * 512 - offset % 512)
    }

    /// An entry for `len` bytes of compressed data at `offset`; none when the offset is too high.
    pub fn new_compressed(geo: &Geometry, offset: u64, len: u64) -> Option<Self> {
        let shift = 62 - (geo.cluster_bits - 8);
        if offset + len >= 1 << shift.min(56) {
            return None;
        }
        let sectors = (offset + len - 1) / 512 - offset / 512;
        Some(Self {
            raw: COMPRESSED | sectors << shift | offset,
            bits: 0,
        })
    }

    /// What is wrong with it, if something is.
    pub fn problem(self, geo: &Geometry) -> Option<&'static str> {
        if self.is_compressed() {
            if geo.external {
                return Some("it is compressed, in an image with a data file");
            }
            return (geo.extended && self.bits != 0)
                .then_some("it is compressed, but has subclusters");
        }
        let host = self.raw & OFFSET;
        if !host.is_multiple_of(geo.cluster()) {
            return Some("its offset is not a multiple of the cluster size");
        }
        if geo.extended {
            let (there, zero) = (self.bits as u32, (self.bits >> 32) as u32);
            if there & zero != 0 {
                return Some("a subcluster is both there and zero");
            }
            if there != 0 && self.host(geo).is_none() {
                return Some("it has subclusters, but no place");
            }
        }
        None
    }
}
