//! The table's patterns: literal characters and `[classes]`, each with `?`, `*`, `+` or `{m,n}`.
//!
//! No groups and no alternatives: a kind has several patterns instead.

/// A pattern that a whole value must match.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    parts: Vec<Part>,
}

#[derive(Debug, PartialEq, Eq)]
struct Part {
    /// Inclusive ranges.
    ranges: Vec<(char, char)>,
    negated: bool,
    min: usize,
    max: usize,
}

impl Part {
    fn takes(&self, c: char) -> bool {
        self.ranges.iter().any(|&(a, b)| a <= c && c <= b) != self.negated
    }
}

impl Pattern {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut chars = text.chars().peekable();
        let mut parts = Vec::new();
        let bad = || format!("bad pattern {text}");
        while let Some(c) = chars.next() {
            let mut part = Part {
                ranges: Vec::new(),
                negated: false,
                min: 1,
                max: 1,
            };
            match c {
                // As in regular expressions: anything but a line's end.
                '.' => {
                    part.negated = true;
                    part.ranges = vec![('\n', '\n'), ('\r', '\r')];
                }
                '[' => {
                    if chars.next_if_eq(&'^').is_some() {
                        part.negated = true;
                    }
                    loop {
                        let from = match chars.next().ok_or_else(bad)? {
                            ']' => break,
                            '\\' => escaped(chars.next().ok_or_else(bad)?),
                            c => c,
                        };
                        let mut to = from;
                        let mut ahead = chars.clone();
                        if ahead.next() == Some('-') && ahead.next().is_some_and(|c| c != ']') {
                            chars.next();
                            to = chars.next().ok_or_else(bad)?;
                        }
                        part.ranges.push((from, to));
                    }
                }
                '\\' => {
                    let c = escaped(chars.next().ok_or_else(bad)?);
                    part.ranges.push((c, c));
                }
                c => part.ranges.push((c, c)),
            }
            match chars.peek() {
                Some('?') => part.min = 0,
                Some('*') => (part.min, part.max) = (0, usize::MAX),
                Some('+') => part.max = usize::MAX,
                Some('{') => {
                    chars.next();
                    let inside: String = chars.by_ref().take_while(|&c| c != '}').collect();
                    let (min, max) = inside.split_once(',').unwrap_or((&inside, &inside));
                    part.min = min.parse().map_err(|_| bad())?;
                    part.max = if max.is_empty() {
                        usize::MAX
                    } else {
                        max.parse().map_err(|_| bad())?
                    };
                    parts.push(part);
                    continue;
                }
                _ => {
                    parts.push(part);
                    continue;
                }
            }
            chars.next();
            parts.push(part);
        }
        Ok(Self { parts })
    }

    pub(super) fn matches(&self, value: &str) -> bool {
        // The set of positions reached so far: time grows with value times pattern, whatever
        // they are.
        let chars: Vec<char> = value.chars().collect();
        let mut reached = vec![false; chars.len() + 1];
        reached[0] = true;
        // `before[i]`: how many positions below `i` were reached.
        let mut before = vec![0_usize; chars.len() + 2];
        for part in &self.parts {
            for (i, &there) in reached.iter().enumerate() {
                before[i + 1] = before[i] + usize::from(there);
            }
            // How many characters before `i` this part takes in a row.
            let mut run = 0;
            for i in 0..=chars.len() {
                if i > 0 {
                    run = if part.takes(chars[i - 1]) { run + 1 } else { 0 };
                }
                let longest = run.min(part.max);
                reached[i] = longest >= part.min && before[i - part.min + 1] > before[i - longest];
            }
        }
        reached[chars.len()]
    }
}

fn escaped(c: char) -> char {
    match c {
        'n' => '\n',
        's' => ' ',
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_value_takes_no_longer_than_its_length() {
        let part = "a".repeat(200_000);
        let text = format!("[{part}] {part}");
        let p = Pattern::parse("\\[[^\\]]+\\]\\s.+").unwrap();
        assert!(p.matches(&text));
        assert!(!p.matches(&text[1..]));
    }

    #[test]
    fn patterns_match_whole_values() {
        for (pattern, yes, no) in [
            ("/.+", "/a", "/"),
            ("0?x?[0-9a-f]{1,4}", "0xffff", "0xfffff"),
            ("[^,]{0,3}", "a b", "a,b"),
            ("[a-z]+[0-9]*", "abc", "1"),
            ("[0-9]{1,2}\\.[0-9]{1,2}", "1.10", "1x10"),
            ("[a-z.-]+", "a-.", "A"),
        ] {
            let p = Pattern::parse(pattern).unwrap();
            assert!(p.matches(yes), "{pattern} {yes}");
            assert!(!p.matches(no), "{pattern} {no}");
        }
    }
}
