//! Pieces of metadata in memory, as they are in the file.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use crate::{Error, File, IoBuf};

/// Hashes offsets: one multiplication, for they come from images that can't be made to collide
/// to more effect than being slow for themselves.
#[derive(Default, Clone, Copy, Debug)]
pub struct OffsetHasher(u64);

impl Hasher for OffsetHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// For maps with offsets as keys.
pub type OffsetHash = BuildHasherDefault<OffsetHasher>;

#[derive(Debug)]
struct Piece {
    data: Box<[u8]>,
    used: u64,
}

/// Pieces of equal size, found by offset in the file.
#[derive(Debug)]
pub struct Cache {
    unit: usize,
    most: usize,
    pieces: HashMap<u64, Piece, OffsetHash>,
    dirty: BTreeSet<u64>,
    tick: u64,
}

impl Cache {
    /// For pieces of `unit` bytes, about `bytes` of them in all.
    pub fn new(unit: usize, bytes: usize) -> Self {
        let most = (bytes / unit).max(16);
        Self {
            unit,
            most,
            pieces: HashMap::default(),
            dirty: BTreeSet::new(),
            tick: 0,
        }
    }

    /// Bytes of a piece.
    pub fn unit(&self) -> u64 {
        self.unit as u64
    }

    /// Whether there are more pieces than there should be.
    pub fn is_full(&self) -> bool {
        self.pieces.len() > self.most
    }

    /// Whether something has yet to be written.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    fn load(&mut self, file: &File, offset: u64) -> Result<&mut Piece, Error> {
        self.tick += 1;
        let piece = match self.pieces.entry(offset) {
            std::collections::hash_map::Entry::Occupied(there) => there.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => {
                let mut data = vec![0; self.unit].into_boxed_slice();
                file.read_bytes(offset, &mut data)?;
                free.insert(Piece { data, used: 0 })
            }
        };
        piece.used = self.tick;
        Ok(piece)
    }

    /// The piece at `offset`.
    pub fn get(&mut self, file: &File, offset: u64) -> Result<&[u8], Error> {
        Ok(&self.load(file, offset)?.data)
    }

    /// The piece at `offset`, to be changed.
    pub fn change(&mut self, file: &File, offset: u64) -> Result<&mut [u8], Error> {
        self.load(file, offset)?;
        self.dirty.insert(offset);
        Ok(&mut self.load(file, offset)?.data)
    }

    /// A piece that is new, or that somebody else has written.
    pub fn put(&mut self, offset: u64, data: Vec<u8>, dirty: bool) {
        self.tick += 1;
        self.pieces.insert(
            offset,
            Piece {
                data: data.into_boxed_slice(),
                used: self.tick,
            },
        );
        if dirty {
            self.dirty.insert(offset);
        } else {
            self.dirty.remove(&offset);
        }
    }

    /// Forgets the pieces in a range of the file, written or not.
    pub fn forget(&mut self, offset: u64, len: u64) {
        let mut at = offset;
        while at < offset + len {
            self.pieces.remove(&at);
            self.dirty.remove(&at);
            at += self.unit();
        }
    }

    /// Writes what has changed, neighbours at once.
    pub fn write_back(&mut self, file: &File) -> Result<(), Error> {
        let all: Vec<u64> = self.dirty.iter().copied().collect();
        let unit = self.unit();
        for run in all.chunk_by(|a, b| a + unit == *b) {
            for part in run.chunks(256) {
                let mut bufs = Vec::with_capacity(part.len());
                for offset in part {
                    if let Some(piece) = self.pieces.get_mut(offset) {
                        bufs.push(IoBuf::from_slice(&mut piece.data));
                    }
                }
                file.write(part[0], &bufs)?;
                for offset in part {
                    self.dirty.remove(offset);
                }
            }
        }
        Ok(())
    }

    /// Drops the quarter that was not used for longest. What has yet to be written stays.
    pub fn shrink(&mut self) {
        let mut ages: Vec<u64> = self.pieces.values().map(|piece| piece.used).collect();
        let quarter = ages.len() / 4;
        if quarter == 0 {
            return;
        }
        let (_, &mut limit, _) = ages.select_nth_unstable(quarter);
        let dirty = &self.dirty;
        self.pieces
            .retain(|offset, piece| piece.used > limit || dirty.contains(offset));
    }
}
