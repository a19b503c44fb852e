//! What the guest can observe of a balloon, and what it has said.

use serde::{Deserialize, Serialize};

use crate::device::QueueSetup;

/// What a balloon knows. Guest values as 5.5.6.3 has them, bytes or counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// RAM the guest keeps now, bytes.
    pub actual_bytes: u64,
    /// RAM the guest is asked to keep, bytes.
    pub target_bytes: u64,
    /// When the guest last said the following: seconds since 1970; 0: never.
    pub updated: u64,
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Count.
    pub major_faults: Option<u64>,
    /// Count.
    pub minor_faults: Option<u64>,
    /// Bytes nobody uses.
    pub free: Option<u64>,
    /// Bytes of RAM the guest knows.
    pub total: Option<u64>,
    /// Bytes that could be given to programs.
    pub available: Option<u64>,
    /// Bytes of disk caches.
    pub disk_caches: Option<u64>,
    /// Count.
    pub hugetlb_allocations: Option<u64>,
    /// Count.
    pub hugetlb_failures: Option<u64>,
    /// Bytes given back to the host by free-page reporting since the start.
    pub reported: u64,
}

/// Bytes of one statistic: a tag and a value.
const STAT: usize = 10;

impl Stats {
    /// Takes over what the guest says at time `now`. Tags nobody knows are passed over.
    pub fn update(&mut self, data: &[u8], now: u64) {
        let (stats, _) = data.as_chunks::<STAT>();
        for [a, b, value @ ..] in stats {
            let value = Some(u64::from_le_bytes(*value));
            match u16::from_le_bytes([*a, *b]) {
                0 => self.swap_in = value,
                1 => self.swap_out = value,
                2 => self.major_faults = value,
                3 => self.minor_faults = value,
                4 => self.free = value,
                5 => self.total = value,
                6 => self.available = value,
                7 => self.disk_caches = value,
                8 => self.hugetlb_allocations = value,
                9 => self.hugetlb_failures = value,
                _ => {}
            }
        }
        self.updated = now;
    }
}

/// A balloon's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Pages of 4 KiB the guest is asked to give up.
    pub pages: u32,
    /// Pages it says it has given up.
    pub actual: u32,
    /// What it has said last, and what it has reported.
    pub stats: Stats,
    /// The buffer at the head of the statistics queue has been looked at.
    pub stats_read: bool,
    /// The queues, by index.
    pub queues: Vec<Option<QueueSetup>>,
}

/// Page numbers as ranges of addresses, merged where they follow each other.
#[derive(Debug, Default)]
pub struct Ranges {
    pages: Vec<u32>,
}

/// Bytes of a page, whatever the guest's own are (5.5.6).
pub const PAGE: u64 = 4096;

impl Ranges {
    /// Adds little-endian page numbers.
    pub fn add(&mut self, data: &[u8]) {
        let (numbers, _) = data.as_chunks::<4>();
        self.pages
            .extend(numbers.iter().map(|n| u32::from_le_bytes(*n)));
    }

    /// Takes them all: first address and length of each range, ascending.
    pub fn take(&mut self) -> Vec<(u64, u64)> {
        self.pages.sort_unstable();
        self.pages.dedup();
        let ranges = self
            .pages
            .chunk_by(|a, b| a.checked_add(1) == Some(*b))
            .map(|run| (u64::from(run[0]) * PAGE, run.len() as u64 * PAGE))
            .collect();
        self.pages.clear();
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_merged() {
        let mut ranges = Ranges::default();
        for page in [5_u32, 3, 4, 9, 3, u32::MAX, u32::MAX - 1] {
            ranges.add(&page.to_le_bytes());
        }
        ranges.add(&[1, 2, 3]);
        assert_eq!(
            ranges.take(),
            [
                (3 * PAGE, 3 * PAGE),
                (9 * PAGE, PAGE),
                (0xffff_fffe * PAGE, 2 * PAGE)
            ]
        );
        assert!(ranges.take().is_empty());
    }

    #[test]
    fn every_tag() {
        let mut data = Vec::new();
        for tag in 0..12_u16 {
            data.extend(tag.to_le_bytes());
            data.extend((u64::from(tag) + 100).to_le_bytes());
        }
        data.push(1);
        let mut stats = Stats::default();
        stats.update(&data, 77);
        let expected = Stats {
            updated: 77,
            swap_in: Some(100),
            swap_out: Some(101),
            major_faults: Some(102),
            minor_faults: Some(103),
            free: Some(104),
            total: Some(105),
            available: Some(106),
            disk_caches: Some(107),
            hugetlb_allocations: Some(108),
            hugetlb_failures: Some(109),
            ..Stats::default()
        };
        assert_eq!(stats, expected);
    }
}
