//! Typed parameters, as commands print them.

use rpc::types::{TypedParam, TypedValue};

/// A value for people.
pub fn text(value: &TypedValue) -> String {
    match value {
        TypedValue::Int(value) => value.to_string(),
        TypedValue::UInt(value) => value.to_string(),
        TypedValue::LLong(value) => value.to_string(),
        TypedValue::ULLong(value) => value.to_string(),
        TypedValue::Double(value) => format!("{value:.6}"),
        TypedValue::Boolean(value) => if *value { "yes" } else { "no" }.to_owned(),
        TypedValue::String(value) => value.clone(),
    }
}

/// One line a parameter, names in a column.
pub fn lines(params: &[TypedParam]) -> String {
    let mut out = String::new();
    for param in params {
        out.push_str(&format!("{:<15}: {}\n", param.field, text(&param.value)));
    }
    out
}

/// Bytes for people, in the largest unit of 1024s below them.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.3} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_virshs_form() {
        assert_eq!(human(16 << 20), "16.000 MiB");
        assert_eq!(human(200704), "196.000 KiB");
        assert_eq!(human(5), "5.000 B");
    }
}
