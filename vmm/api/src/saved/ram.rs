//! Checksums of guest RAM in a saved image.

use super::{PAGE, SavedError, damaged};

/// Bytes of RAM that have a checksum together.
pub const CHUNK: u64 = 1 << 20;

/// The checksum of one chunk: of the pages that are not all zero, and their places. (A sparse file
/// need not be read where it has nothing.)
#[derive(Debug, Clone, Copy, Default)]
pub struct ChunkSum(u32);

impl ChunkSum {
    /// Adds whole pages that are not all zero, the first of them page `first` of the chunk.
    pub fn add(&mut self, first: u32, pages: &[u8]) {
        self.0 = crc32c::crc32c_append(self.0, &first.to_le_bytes());
        self.0 = crc32c::crc32c_append(self.0, pages);
    }

    /// As it stands in the table.
    #[must_use]
    pub fn value(self) -> u32 {
        self.0
    }
}

/// Splits `chunk` into runs of pages that are not all zero: their first page's number and bytes.
pub fn runs(chunk: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    let page = PAGE as usize;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < chunk.len() && is_zero(&chunk[at..chunk.len().min(at + page)]) {
            at += page;
        }
        let start = at;
        while at < chunk.len() && !is_zero(&chunk[at..chunk.len().min(at + page)]) {
            at += page;
        }
        let end = at.min(chunk.len());
        (start < end).then(|| ((start / page) as u32, &chunk[start..end]))
    })
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<128>();
    // Most pages with content differ early.
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |sum, byte| sum | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Checks a chunk that has been read.
///
/// # Errors
/// It is not what was written.
pub fn verify_chunk(index: usize, chunk: &[u8], sum: u32) -> Result<(), SavedError> {
    let mut own = ChunkSum::default();
    for (first, pages) in runs(chunk) {
        own.add(first, pages);
    }
    if own.value() == sum {
        Ok(())
    } else {
        let at = index as u64 * CHUNK;
        Err(damaged(format!(
            "guest memory at {at:#x} has another checksum"
        )))
    }
}
