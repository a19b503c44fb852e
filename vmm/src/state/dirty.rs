//! Which pages of guest memory have changed: a bit each, in the order of [`GuestMemory::bytes`].

use hypervisor::Vm;
use vmm_api::saved::PAGE;

use crate::memory::{GuestMemory, HUGE};
use crate::num::to_usize;

/// Most ranges of [`dense`].
pub const DENSE_MOST: usize = 4096;

/// All pages that may hold something.
#[must_use]
pub fn content(memory: &GuestMemory) -> Vec<u64> {
    let size = memory.size();
    let mut dirty = vec![0u64; to_usize((size / PAGE).div_ceil(64))];
    let mut at = 0;
    while let Some(range) = memory.next_content(at) {
        let pages = range.start / PAGE..range.end.div_ceil(PAGE).min(size / PAGE);
        for page in pages {
            if let Some(word) = dirty.get_mut(to_usize(page / 64)) {
                *word |= 1 << (page % 64);
            }
        }
        at = range.end.max(at + PAGE);
    }
    dirty
}

/// The huge pages most of whose pages are set, as offset and length; not endlessly many.
#[must_use]
pub fn dense(words: &[u64]) -> Vec<(u64, u64)> {
    const PAGES: u64 = HUGE / PAGE;
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (index, words) in (0..).zip(words.chunks(to_usize(PAGES / 64))) {
        if count(words) <= PAGES / 2 {
            continue;
        }
        let start = index * HUGE;
        match all.last_mut() {
            Some((first, len)) if *first + *len == start => *len += HUGE,
            _ => all.push((start, HUGE)),
        }
        if all.len() == DENSE_MOST {
            break;
        }
    }
    all
}

/// What was written since the last call; the dirty log is on.
///
/// # Errors
/// The backend's refusal.
pub fn written(vm: &dyn Vm, memory: &GuestMemory) -> Result<Vec<u64>, hypervisor::Error> {
    let mut dirty = Vec::new();
    // The second range begins at 3 GiB, a multiple of 64 pages.
    for slot in memory.slots() {
        dirty.extend(vm.dirty_log(slot.id)?);
    }
    Ok(dirty)
}

/// How many bits are set.
#[must_use]
pub fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// Runs of ones: first bit and number of bits.
#[must_use]
pub fn runs(words: &[u64]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (index, word) in (0..).zip(words) {
        let mut rest = *word;
        let mut base = index * 64;
        while rest != 0 {
            let skip = rest.trailing_zeros();
            rest >>= skip;
            base += u64::from(skip);
            let ones = rest.trailing_ones();
            match runs.last_mut() {
                Some((start, len)) if *start + *len == base => *len += u64::from(ones),
                _ => runs.push((base, ones.into())),
            }
            base += u64::from(ones);
            rest = rest.checked_shr(ones).unwrap_or(0);
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_pages_go_over_words() {
        assert_eq!(runs(&[0, 0]), []);
        assert_eq!(runs(&[u64::MAX, u64::MAX]), [(0, 128)]);
        assert_eq!(runs(&[1 << 63, 1]), [(63, 2)]);
        assert_eq!(runs(&[0b1011, 0, 1 << 5]), [(0, 2), (3, 1), (133, 1)]);
        assert_eq!(count(&[0b1011, 0, 1 << 5]), 4);
        let mut words = vec![u64::MAX; 3 * 8 + 4];
        words[8..12].fill(0);
        assert_eq!(dense(&words), [(0, HUGE), (2 * HUGE, HUGE)]);
        words[8] = 1;
        assert_eq!(dense(&words), [(0, 3 * HUGE)]);
    }
}
