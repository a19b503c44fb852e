//! The values that attributes and texts may have.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::pattern::Pattern;

/// Alternatives; a value must be one of them.
#[derive(Debug, Default)]
pub(super) struct Values {
    words: Vec<&'static str>,
    ranges: Vec<(i128, i128)>,
    patterns: Vec<Pattern>,
    kinds: Vec<&'static str>,
    text: bool,
}

/// The named kinds of a table.
#[derive(Debug, Default)]
pub(super) struct Kinds {
    named: HashMap<&'static str, Values>,
    /// Every name that was referred to.
    used: Vec<&'static str>,
}

impl Kinds {
    /// `kind NAME ALTERNATIVE...`
    pub(super) fn define(&mut self, line: &'static str) -> Result<(), String> {
        let mut words = line.split_whitespace().skip(1);
        let name = words.next().ok_or("kind without a name")?;
        let mut values = Values::default();
        for word in words {
            self.alternative(&mut values, word)?;
        }
        match self.named.insert(name, values) {
            None => Ok(()),
            Some(_) => Err(format!("kind {name} twice")),
        }
    }

    /// `A|N..M|$kind`
    pub(super) fn values(&mut self, text: &'static str) -> Result<Values, String> {
        if text.is_empty() {
            return Err("no values".to_owned());
        }
        let mut values = Values::default();
        for word in text.split('|') {
            self.alternative(&mut values, word)?;
        }
        Ok(values)
    }

    fn alternative(&mut self, values: &mut Values, word: &'static str) -> Result<(), String> {
        if word == "$text" {
            values.text = true;
        } else if let Some(kind) = word.strip_prefix('$') {
            self.used.push(kind);
            values.kinds.push(kind);
        } else if let Some(pattern) = word.strip_prefix('~') {
            values.patterns.push(Pattern::parse(pattern)?);
        } else if let Some((low, high)) = word.split_once("..") {
            let bound = |s: &str, open: i128| {
                if s.is_empty() {
                    Ok(open)
                } else {
                    s.parse().map_err(|_| format!("bad range {word}"))
                }
            };
            values
                .ranges
                .push((bound(low, i128::MIN)?, bound(high, i128::MAX)?));
        } else {
            values.words.push(word);
        }
        Ok(())
    }

    /// Every name that is used must be defined here or built in.
    pub(super) fn check(&self) -> Result<(), String> {
        match self
            .used
            .iter()
            .find(|k| !self.named.contains_key(*k) && built_in(k, "").is_none())
        {
            Some(kind) => Err(format!("no kind {kind}")),
            None => Ok(()),
        }
    }

    pub(super) fn allow(&self, values: &Values, value: &str) -> bool {
        if values.text {
            return true;
        }
        let trimmed = value.trim();
        values.words.contains(&trimmed)
            || (!values.ranges.is_empty() && in_ranges(&values.ranges, trimmed))
            || values.patterns.iter().any(|p| p.matches(value))
            || values.kinds.iter().any(|kind| match self.named.get(kind) {
                Some(values) => self.allow(values, value),
                None => built_in(kind, value).unwrap_or(false),
            })
    }
}

impl Values {
    /// The words that are allowed, for messages.
    pub(super) fn words(&self) -> &[&'static str] {
        &self.words
    }
}

fn in_ranges(ranges: &[(i128, i128)], value: &str) -> bool {
    let digits = value.strip_prefix('-').unwrap_or(value);
    if digits.is_empty() || digits.len() > 30 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return false;
    }
    value
        .parse::<i128>()
        .is_ok_and(|n| ranges.iter().any(|&(low, high)| low <= n && n <= high))
}

/// Kinds that no pattern describes. `None`: there is no such kind.
fn built_in(kind: &str, value: &str) -> Option<bool> {
    Some(match kind {
        "ipv4" => value.parse::<Ipv4Addr>().is_ok(),
        "ipv6" => value.parse::<Ipv6Addr>().is_ok(),
        "cpuset" => cpuset(value),
        "ncname" => {
            let letter = |c: char| c.is_alphabetic() || c == '_';
            value.starts_with(letter)
                && value
                    .chars()
                    .all(|c| letter(c) || c.is_alphanumeric() || ".-".contains(c))
        }
        _ => return None,
    })
}

/// `0-3,^2,8`
fn cpuset(value: &str) -> bool {
    let number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    value.split(',').all(|part| {
        part.strip_prefix('^').map_or_else(
            || {
                part.split_once('-')
                    .map_or_else(|| number(part), |(a, b)| number(a) && number(b))
            },
            number,
        )
    })
}
