//! Sets of CPUs or NUMA nodes as libvirt writes them: `0-3,^2,8`.

use std::collections::BTreeSet;

/// The highest number that may be in a set.
pub const MAX: u32 = 16_383;

/// Reads a set: numbers, ranges, and what is taken out again after `^`.
pub fn parse(text: &str) -> Option<BTreeSet<u32>> {
    let mut set = BTreeSet::new();
    for part in text.split(',') {
        let part = part.trim();
        let number = |text: &str| -> Option<u32> {
            let text = text.trim();
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|n| digits && *n <= MAX)
        };
        if let Some(out) = part.strip_prefix('^') {
            set.remove(&number(out)?);
        } else if let Some((first, last)) = part.split_once('-') {
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return None;
            }
            set.extend(first..=last);
        } else {
            set.insert(number(part)?);
        }
    }
    Some(set)
}

/// Writes a set, ranges first to last.
pub fn format(set: &BTreeSet<u32>) -> String {
    let mut parts = Vec::new();
    let mut numbers = set.iter().copied().peekable();
    while let Some(first) = numbers.next() {
        let mut last = first;
        while let Some(next) = numbers.next_if(|next| *next == last + 1) {
            last = next;
        }
        parts.push(if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        });
    }
    parts.join(",")
}

/// The numbers of the bits that are set in a map, lowest first in each byte.
pub fn from_map(map: &[u8]) -> BTreeSet<u32> {
    let bits = (0u32..).zip(
        map.iter()
            .flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1)),
    );
    bits.take_while(|(number, _)| *number <= MAX)
        .filter_map(|(number, bit)| (bit != 0).then_some(number))
        .collect()
}

/// A map of `length` bytes with those bits set that have room.
pub fn to_map(set: &BTreeSet<u32>, length: usize) -> Vec<u8> {
    let mut map = vec![0u8; length];
    for number in set {
        if let Some(byte) = map.get_mut(*number as usize / 8) {
            *byte |= 1 << (number % 8);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_read_and_written() {
        let set = parse("0-3,^2,8").unwrap();
        assert_eq!(set, BTreeSet::from([0, 1, 3, 8]));
        assert_eq!(format(&set), "0-1,3,8");
        assert_eq!(to_map(&set, 2), [0b1011, 1]);
        assert_eq!(from_map(&[0b1011, 1]), set);
        assert_eq!(to_map(&set, 1), [0b1011]);
        for bad in ["", "x", "3-1", "1,,2", "-1", "99999", "^", "+1"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
