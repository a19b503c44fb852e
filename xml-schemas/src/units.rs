//! Sizes with units, as libvirt reads them.

use crate::error::{ErrorCode, ErrorDomain, XmlError};

/// Bytes in `value` of `unit`: `b`, `bytes`, `KB`, `k`, `KiB`, `MB`, `M`, `MiB`… up to `E`
/// (upper or lower case alike; `xB` counts in thousands, the others in 1024s).
///
/// # Errors
/// VIR_ERR_INVALID_ARG for an unknown unit, VIR_ERR_OVERFLOW beyond 64 bits.
pub fn scale(value: u64, unit: &str) -> Result<u64, XmlError> {
    let lower = unit.to_ascii_lowercase();
    let unknown = || {
        XmlError::new(
            ErrorCode::InvalidArg,
            ErrorDomain::Domain,
            format!("unknown suffix '{unit}'"),
        )
    };
    let factor = if matches!(lower.as_str(), "b" | "byte" | "bytes") {
        1
    } else {
        let mut letters = lower.chars();
        let power = letters
            .next()
            .and_then(|c| "kmgtpe".find(c))
            .and_then(|i| u32::try_from(i + 1).ok())
            .ok_or_else(unknown)?;
        let base: u64 = match letters.as_str() {
            "" | "ib" => 1024,
            "b" => 1000,
            _ => return Err(unknown()),
        };
        base.pow(power)
    };
    value.checked_mul(factor).ok_or_else(|| {
        XmlError::new(
            ErrorCode::Overflow,
            ErrorDomain::Domain,
            format!("value too large: {value}{unit}"),
        )
    })
}

/// KiB in `value` of `unit` (`KiB` if none), rounded up.
///
/// # Errors
/// As [`scale`].
pub fn kib(value: u64, unit: Option<&str>) -> Result<u64, XmlError> {
    Ok(scale(value, unit.unwrap_or("KiB"))?.div_ceil(1024))
}

/// A decimal number as libvirt reads one: white space around it is not part of it.
pub(crate) fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let text = text.trim();
    if text.starts_with('+') {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_libvirt_knows() {
        for (unit, kibibytes) in [
            ("b", 1),
            ("bytes", 1),
            ("KB", 1000),
            ("k", 1024),
            ("KiB", 1024),
            ("MB", 1_000_000),
            ("M", 1 << 20),
            ("MiB", 1 << 20),
            ("GB", 1_000_000_000),
            ("G", 1 << 30),
            ("GiB", 1 << 30),
            ("TB", 1_000_000_000_000),
            ("T", 1 << 40),
            ("TiB", 1 << 40),
        ] {
            assert_eq!(scale(3, unit).unwrap(), 3 * kibibytes, "{unit}");
        }
        assert_eq!(kib(1, Some("b")).unwrap(), 1);
        assert_eq!(kib(7, None).unwrap(), 7);
        assert_eq!(
            scale(1, "foo").unwrap_err().to_string(),
            "invalid argument: unknown suffix 'foo'"
        );
        assert_eq!(
            scale(u64::MAX, "M").unwrap_err().code(),
            ErrorCode::Overflow
        );
        assert!(scale(1, "").is_err() && scale(1, "é").is_err());
    }
}
