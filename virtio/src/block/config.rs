//! The configuration structure (5.2.4).

use super::Options;
use super::request::{RANGE_SECTORS_MAX, RANGES_MAX, SECTOR};

/// Offset of the write cache's byte: 1 is on.
pub(super) const WRITEBACK: u32 = 32;
const LEN: usize = 72;

/// The structure's bytes. Fields of features that aren't offered are 0.
pub(super) fn structure(options: &Options, capacity: u64, writethrough: bool) -> [u8; LEN] {
    let logical = options.logical_block_size;
    let sectors = |bytes: u32| bytes / SECTOR as u32;
    let blocks = |bytes: u32| bytes / logical;
    let mut bytes = [0; LEN];
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    put(0, &(capacity / SECTOR).to_le_bytes());
    // Header and status take two descriptors of a chain.
    put(12, &(u32::from(options.queue_size) - 2).to_le_bytes());
    put(20, &logical.to_le_bytes());
    let exponent = (options.physical_block_size / logical).trailing_zeros();
    put(24, &[exponent as u8, 0]);
    let min = blocks(options.min_io_size.max(options.physical_block_size));
    put(26, &u16::try_from(min).unwrap_or(u16::MAX).to_le_bytes());
    put(28, &blocks(options.opt_io_size).to_le_bytes());
    put(WRITEBACK as usize, &[u8::from(!writethrough)]);
    put(34, &options.queues.to_le_bytes());
    if options.discard && !options.read_only {
        put(36, &RANGE_SECTORS_MAX.to_le_bytes());
        put(40, &RANGES_MAX.to_le_bytes());
        let granularity = options.discard_granularity.max(logical);
        put(44, &sectors(granularity).to_le_bytes());
        put(48, &RANGE_SECTORS_MAX.to_le_bytes());
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[1]);
    }
    bytes
}
