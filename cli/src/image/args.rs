//! Options as getopt_long takes them: in any place, long ones shortened where that is clear. `-1M`
//! is a number.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::Failure;

/// An option that a sub-command has.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// `-x`; `\0` for none.
    pub short: char,
    /// `--xyz`, and other spellings of it; the first is its name in [`Args`].
    pub long: &'static [&'static str],
    /// It has a value.
    pub value: bool,
}

/// An option without a value.
pub const fn flag(short: char, long: &'static [&'static str]) -> Spec {
    Spec {
        short,
        long,
        value: false,
    }
}

/// An option with a value.
pub const fn value(short: char, long: &'static [&'static str]) -> Spec {
    Spec {
        short,
        long,
        value: true,
    }
}

/// What was given.
#[derive(Debug, Default)]
pub struct Args {
    options: Vec<(&'static str, OsString)>,
    /// What is no option.
    pub free: Vec<OsString>,
}

impl Args {
    /// Takes `words` apart.
    pub fn parse(command: &str, specs: &[Spec], words: Vec<OsString>) -> Result<Self, Failure> {
        let mut args = Self::default();
        let bad = |what: String| Failure::Usage {
            command: Some(command.to_owned()),
            what: format!("image {command}: {what}"),
            prefixed: true,
        };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let bytes = word.as_bytes();
            if bytes == b"--" {
                args.free.extend(words);
                break;
            }
            if let Some(long) = bytes.strip_prefix(b"--") {
                let (name, given) = match long.iter().position(|&byte| byte == b'=') {
                    Some(at) => (&long[..at], Some(OsStr::from_bytes(&long[at + 1..]))),
                    None => (long, None),
                };
                let shown = String::from_utf8_lossy(name);
                let exact = specs
                    .iter()
                    .find(|spec| spec.long.iter().any(|long| long.as_bytes() == name));
                let mut near: Vec<_> = specs
                    .iter()
                    .filter(|spec| {
                        spec.long
                            .iter()
                            .any(|long| long.as_bytes().starts_with(name))
                    })
                    .collect();
                let spec = match (exact, near.len()) {
                    (Some(spec), _) => spec,
                    (None, 1) => near.remove(0),
                    (None, 0) => return Err(bad(format!("unrecognized option '--{shown}'"))),
                    _ => return Err(bad(format!("option '--{shown}' is ambiguous"))),
                };
                let given = match (spec.value, given) {
                    (false, Some(_)) => {
                        return Err(bad(format!("option '--{shown}' doesn't allow an argument")));
                    }
                    (false, None) => OsString::new(),
                    (true, Some(given)) => given.to_owned(),
                    (true, None) => words.next().ok_or_else(|| {
                        bad(format!("option '--{}' requires an argument", spec.long[0]))
                    })?,
                };
                args.options.push((spec.long[0], given));
            } else if bytes.len() > 1 && bytes[0] == b'-' && !bytes[1].is_ascii_digit() {
                let mut rest = &bytes[1..];
                while let Some((&first, more)) = rest.split_first() {
                    rest = more;
                    let letter = char::from(first);
                    let spec = specs
                        .iter()
                        .find(|spec| spec.short == letter && letter != '\0')
                        .ok_or_else(|| bad(format!("invalid option -- '{letter}'")))?;
                    let mut given = OsString::new();
                    if spec.value {
                        given = if rest.is_empty() {
                            words.next().ok_or_else(|| {
                                bad(format!("option requires an argument -- '{letter}'"))
                            })?
                        } else {
                            OsString::from_vec(rest.to_vec())
                        };
                        rest = &[];
                    }
                    args.options.push((spec.long[0], given));
                }
            } else {
                args.free.push(word);
            }
        }
        Ok(args)
    }

    /// Whether an option was given.
    pub fn has(&self, name: &str) -> bool {
        self.options.iter().any(|(given, _)| *given == name)
    }

    /// The value that was given last.
    pub fn get(&self, name: &str) -> Option<&OsStr> {
        self.all(name).last()
    }

    /// The same as text.
    pub fn text(&self, name: &str) -> Option<String> {
        self.get(name)
            .map(|value| value.to_string_lossy().into_owned())
    }

    /// All values in the order in which they were given.
    pub fn all<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a OsStr> {
        self.options
            .iter()
            .filter(move |(given, _)| *given == name)
            .map(|(_, value)| value.as_os_str())
    }

    /// All options in their order.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &OsStr)> {
        self.options
            .iter()
            .map(|(name, value)| (*name, value.as_os_str()))
    }
}

/// `a=1,b=2`, where `,,` is a comma in a value; a name alone is `on`, or goes to `first`.
pub fn pairs(text: &str, first: Option<&str>) -> Vec<(String, String)> {
    let mut parts: Vec<String> = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let last = parts.len() - 1;
        if letter != ',' {
            parts[last].push(letter);
        } else if letters.next_if_eq(&',').is_some() {
            parts[last].push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
        .into_iter()
        .enumerate()
        .filter(|(_, part)| !part.is_empty())
        .map(|(n, part)| match (part.split_once('='), first) {
            (Some((name, value)), _) => (name.to_owned(), value.to_owned()),
            (None, Some(first)) if n == 0 => (first.to_owned(), part),
            (None, _) => (part, "on".to_owned()),
        })
        .collect()
}

/// A size in bytes: `1.5G`, `64k`, `0x1000`. None if it is none.
pub fn size(text: &str) -> Option<u64> {
    let text = text.trim_start();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok();
    }
    let digits = text
        .find(|letter: char| !letter.is_ascii_digit() && letter != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || part.contains('.') {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    if part.is_empty() {
        return (number == text.trim_end_matches(suffix)).then_some(whole);
    }
    if shift == 0 {
        return None;
    }
    let part = format!("0.{part}").parse::<f64>().ok()?;
    whole.checked_add((part * (1_u64 << shift) as f64).round() as u64)
}

/// A size for people: `1.5 GiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut power = 0;
    // The next unit where three digits would not do.
    while power < 6 && bytes as f64 / 1024_f64.powi(power) * 1.024 >= 1024.0 {
        power += 1;
    }
    let value = bytes as f64 / 1024_f64.powi(power);
    let places = if value > 0.0 && value < 0.9995 {
        3
    } else if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    let mut text = format!("{value:.places$}");
    if text.contains('.') {
        text.truncate(text.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{text} {}B", UNITS[power as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("1.5G", Some(3 << 29)),
            ("64k", Some(65536)),
            ("0x10", Some(16)),
            ("7E", Some(7 << 60)),
            ("16E", None),
            ("12q", None),
            ("-1", None),
            ("", None),
            ("1.5", None),
            ("k", None),
        ] {
            assert_eq!(size(text), bytes, "{text}");
        }
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (200_704, "196 KiB"),
            (1 << 30, "1 GiB"),
            (2_195_456, "2.09 MiB"),
            (1000 << 20, "0.977 GiB"),
            (12_554_240, "12 MiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn options_may_stand_anywhere() {
        let specs = [flag('q', &["quiet"]), value('f', &["format"])];
        let words = ["a", "-qfraw", "b", "--form=x", "--", "-q"];
        let args = Args::parse("x", &specs, words.iter().map(OsString::from).collect()).unwrap();
        assert!(args.has("quiet"));
        assert_eq!(args.all("format").collect::<Vec<_>>(), ["raw", "x"]);
        assert_eq!(args.free, ["a", "b", "-q"]);
        assert_eq!(
            pairs("x,a=1,,2,b", Some("driver")),
            [
                ("driver".to_owned(), "x".to_owned()),
                ("a".into(), "1,2".into()),
                ("b".into(), "on".into())
            ]
        );
    }
}
