//! Conversions that can't lose anything unnoticed.

/// A `usize` of a value the caller has already bounded by the size of something in memory.
/// (Vireo runs on 64-bit hosts only: both types are eight bytes, which this line checks.)
#[must_use]
pub const fn to_usize(value: u64) -> usize {
    usize::from_ne_bytes(value.to_ne_bytes())
}

/// The low 8 bits.
#[must_use]
pub const fn low8(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

/// The low 16 bits.
#[must_use]
pub const fn low16(value: u32) -> u16 {
    let bytes = value.to_le_bytes();
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// The low 32 bits.
#[must_use]
pub const fn low32(value: u64) -> u32 {
    let b = value.to_le_bytes();
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// Rounds up to a multiple of `align`, a power of two; `None` on overflow.
#[must_use]
pub const fn align_up(value: u64, align: u64) -> Option<u64> {
    match value.checked_add(align - 1) {
        Some(sum) => Some(sum & !(align - 1)),
        None => None,
    }
}

/// Little-endian fields of a byte slice; `None` where it is too short.
pub trait Fields {
    /// Two bytes at `offset`.
    fn u16_at(&self, offset: usize) -> Option<u16>;
    /// Four bytes at `offset`.
    fn u32_at(&self, offset: usize) -> Option<u32>;
    /// Eight bytes at `offset`.
    fn u64_at(&self, offset: usize) -> Option<u64>;
}

impl Fields for [u8] {
    fn u16_at(&self, offset: usize) -> Option<u16> {
        self.get(offset..)?
            .first_chunk()
            .map(|b| u16::from_le_bytes(*b))
    }

    fn u32_at(&self, offset: usize) -> Option<u32> {
        self.get(offset..)?
            .first_chunk()
            .map(|b| u32::from_le_bytes(*b))
    }

    fn u64_at(&self, offset: usize) -> Option<u64> {
        self.get(offset..)?
            .first_chunk()
            .map(|b| u64::from_le_bytes(*b))
    }
}
