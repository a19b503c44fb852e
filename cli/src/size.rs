//! Sizes with units, as people write them.

/// Reads a size in bytes; a number without a unit counts `default` bytes.
///
/// Units are libvirt's: k, M, G, T, P, E and the same with `iB` are powers of 1024, with `B` powers of 1000,
/// `b` and `bytes` are bytes; upper and lower case are the same.
///
/// # Errors
///
/// It isn't a number, doesn't fit 64 bits, or has an unknown unit, for which there is a message.
pub fn parse(text: &str, default: u64) -> Result<u64, Option<String>> {
    let digits = text.trim_start_matches([' ', '\t']);
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    let number: u64 = digits[..end].parse().map_err(|_| None)?;
    let unit = digits[end..].trim_start_matches([' ', '\t']);
    let scale = match unit.to_ascii_lowercase().as_str() {
        "" => default,
        "b" | "byte" | "bytes" => 1,
        lower => {
            let (letter, rest) = lower.split_at(lower.chars().next().map_or(0, char::len_utf8));
            let power = "kmgtpe"
                .find(letter)
                .and_then(|power| u32::try_from(power + 1).ok());
            let base = match rest {
                "" | "ib" => Some(1024u64),
                "b" => Some(1000),
                _ => None,
            };
            match (power, base) {
                (Some(power), Some(base)) => base.pow(power),
                _ => return Err(Some(format!("invalid argument: unknown suffix '{unit}'"))),
            }
        }
    };
    number
        .checked_mul(scale)
        .ok_or_else(|| Some("Numerical overflow: value too large".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_scale() {
        assert_eq!(parse("5", 1024), Ok(5120));
        assert_eq!(parse("5b", 1024), Ok(5));
        assert_eq!(parse("1k", 1), Ok(1024));
        assert_eq!(parse("1KB", 1), Ok(1000));
        assert_eq!(parse("1 GiB", 1), Ok(1 << 30));
        assert_eq!(parse("2g", 1), Ok(2 << 30));
        assert_eq!(parse("15E", 1), Ok(15 << 60));
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(parse("", 1), Err(None));
        assert_eq!(parse("-1", 1), Err(None));
        assert_eq!(parse("x", 1), Err(None));
        assert_eq!(
            parse("1x", 1),
            Err(Some("invalid argument: unknown suffix 'x'".into()))
        );
        assert_eq!(
            parse("1é", 1),
            Err(Some("invalid argument: unknown suffix 'é'".into()))
        );
        assert!(parse("16E", 1).is_err());
        assert!(parse("99999999999999999999", 1).is_err());
    }
}
