//! The bits of a dirty bitmap in memory: only pieces that have any.

use std::collections::BTreeMap;

/// Bits of a piece.
const PIECE: u64 = 1 << 15;
const WORDS: usize = (PIECE / 64) as usize;
/// The most memory that one bitmap may take, bytes.
pub const BYTES_MOST: u64 = 256 << 20;

/// Which pieces of a disk were written: a bit for so many bytes each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bits {
    pieces: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl Bits {
    fn piece(&mut self, index: u64) -> &mut [u64; WORDS] {
        self.pieces
            .entry(index)
            .or_insert_with(|| Box::new([0; WORDS]))
    }

    /// Sets the bits of a range.
    pub fn set(&mut self, first: u64, end: u64) {
        let mut at = first;
        while at < end {
            let index = at / PIECE;
            let stop = end.min((index + 1) * PIECE);
            let piece = self.piece(index);
            while at < stop {
                let (word, bit) = ((at % PIECE / 64) as usize, at % 64);
                let count = (64 - bit).min(stop - at);
                let mask = if count == 64 {
                    u64::MAX
                } else {
                    ((1 << count) - 1) << bit
                };
                piece[word] |= mask;
                at += count;
            }
        }
    }

    /// Whether a bit is set.
    #[must_use]
    pub fn get(&self, at: u64) -> bool {
        self.pieces
            .get(&(at / PIECE))
            .is_some_and(|piece| piece[(at % PIECE / 64) as usize] >> (at % 64) & 1 == 1)
    }

    /// None is set any more.
    pub fn clear(&mut self) {
        self.pieces.clear();
    }

    /// How many are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.pieces
            .values()
            .flat_map(|piece| piece.iter())
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Drops bits from `end` on.
    pub fn truncate(&mut self, end: u64) {
        self.pieces.split_off(&end.div_ceil(PIECE));
        if !end.is_multiple_of(PIECE)
            && let Some(piece) = self.pieces.get_mut(&(end / PIECE))
        {
            let from = (end % PIECE / 64) as usize;
            piece[from] &= (1 << (end % 64)) - 1;
            piece[from + 1..].fill(0);
        }
    }

    /// The runs of bits that are set.
    #[must_use]
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (index, piece) in &self.pieces {
            for (n, &word) in piece.iter().enumerate() {
                let base = index * PIECE + n as u64 * 64;
                let mut left = word;
                while left != 0 {
                    let from = left.trailing_zeros();
                    let len = (left >> from).trailing_ones();
                    let (start, end) = (base + u64::from(from), base + u64::from(from + len));
                    match runs.last_mut() {
                        Some(last) if last.1 == start => last.1 = end,
                        _ => runs.push((start, end)),
                    }
                    left = if from + len == 64 {
                        0
                    } else {
                        left & (u64::MAX << (from + len))
                    };
                }
            }
        }
        runs
    }

    /// Sets what is set in `other`, whose bits stand for `theirs` bytes each where ours stand for
    /// `ours`.
    pub fn merge(&mut self, other: &Self, theirs: u64, ours: u64) {
        for (from, to) in other.runs() {
            let (from, to) = (from.saturating_mul(theirs), to.saturating_mul(theirs));
            self.set(from / ours, to.div_ceil(ours));
        }
    }

    /// `data` is what is stored from bit `first` on (a multiple of 8).
    pub fn load(&mut self, first: u64, data: &[u8]) {
        for (n, &byte) in data.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            let at = first + n as u64 * 8;
            self.piece(at / PIECE)[(at % PIECE / 64) as usize] |= u64::from(byte) << (at % 64);
        }
    }

    /// What is stored from bit `first` on, `bytes` of it; none if no bit is set there.
    #[must_use]
    pub fn store(&self, first: u64, bytes: usize) -> Option<Vec<u8>> {
        let end = first + bytes as u64 * 8;
        let mut out: Option<Vec<u8>> = None;
        for (index, piece) in self.pieces.range(first / PIECE..end.div_ceil(PIECE)) {
            for (n, &word) in piece.iter().enumerate().filter(|(_, word)| **word != 0) {
                for (k, byte) in word.to_le_bytes().into_iter().enumerate() {
                    let at = index * PIECE + n as u64 * 64 + k as u64 * 8;
                    if byte != 0 && (first..end).contains(&at) {
                        let out = out.get_or_insert_with(|| vec![0; bytes]);
                        out[((at - first) / 8) as usize] = byte;
                    }
                }
            }
        }
        out
    }

    /// Memory it takes, bytes.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.pieces.len() as u64 * PIECE / 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_kept_and_come_back_as_stored() {
        let mut bits = Bits::default();
        bits.set(3, 70);
        bits.set(PIECE - 1, 2 * PIECE + 5);
        assert_eq!(bits.runs(), [(3, 70), (PIECE - 1, 2 * PIECE + 5)]);
        assert_eq!(bits.count(), 67 + PIECE + 6);
        assert!(bits.get(69) && !bits.get(70));
        let mut again = Bits::default();
        for first in (0..3 * PIECE).step_by(4096) {
            if let Some(data) = bits.store(first, 512) {
                again.load(first, &data);
            }
        }
        assert_eq!(again, bits);
        again.truncate(65);
        assert_eq!(again.runs(), [(3, 65)]);
        assert_eq!(again.store(0, 16).unwrap()[8], 1);
        let mut coarse = Bits::default();
        coarse.merge(&bits, 512, 65536);
        assert_eq!(coarse.runs(), [(0, 1), (PIECE / 128 - 1, PIECE / 64 + 1)]);
    }
}
