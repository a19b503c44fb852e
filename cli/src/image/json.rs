//! JSON as qemu-img prints it, so that scripts that look at its lines go on working.

use std::fmt::Write;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Number(u64),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Self>),
    /// Names and values, in any order.
    Object(Vec<(&'static str, Self)>),
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Number(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Number(value.into())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

/// Where QEMU's dictionaries, which are hash tables, have a name: that decides on the order in
/// which they are printed. (The hash is that of the database TDB, of 512 buckets.)
fn bucket(name: &str) -> u32 {
    let mut value = 0x238f_13af_u32.wrapping_mul(name.len() as u32);
    for (n, byte) in name.bytes().enumerate() {
        value = value.wrapping_add(u32::from(byte) << (n * 5 % 24));
    }
    1_103_515_243_u32.wrapping_mul(value).wrapping_add(12345) % 512
}

impl Value {
    /// The members of an object in QEMU's order.
    pub fn members(&self) -> Vec<&(&'static str, Self)> {
        let Self::Object(members) = self else {
            return Vec::new();
        };
        let mut members: Vec<_> = members.iter().collect();
        members.sort_by_key(|(name, _)| bucket(name));
        members
    }

    /// The text, an object's members on lines of their own.
    pub fn print(&self) -> String {
        let mut out = String::new();
        self.put(&mut out, 0);
        out.push('\n');
        out
    }

    fn put(&self, out: &mut String, depth: usize) {
        let line = |out: &mut String, depth: usize| {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', depth * 4));
        };
        // Writing to a String cannot fail.
        let _ = match self {
            Self::Bool(value) => write!(out, "{value}"),
            Self::Number(value) => write!(out, "{value}"),
            Self::Text(text) => {
                quote(text, out);
                Ok(())
            }
            Self::List(list) => {
                out.push('[');
                for (n, value) in list.iter().enumerate() {
                    out.push_str(if n == 0 { "" } else { "," });
                    line(out, depth + 1);
                    value.put(out, depth + 1);
                }
                line(out, depth);
                out.push(']');
                Ok(())
            }
            Self::Object(_) => {
                out.push('{');
                for (n, (name, value)) in self.members().into_iter().enumerate() {
                    out.push_str(if n == 0 { "" } else { "," });
                    line(out, depth + 1);
                    quote(name, out);
                    out.push_str(": ");
                    value.put(out, depth + 1);
                }
                line(out, depth);
                out.push('}');
                Ok(())
            }
        };
    }

    /// What `info` prints for people below "Format specific information".
    pub fn describe(&self, depth: usize, out: &mut String) {
        let indent = depth * 4;
        let each: Vec<(String, &Self)> = match self {
            Self::List(list) => list
                .iter()
                .enumerate()
                .map(|(n, value)| (format!("[{n}]"), value))
                .collect(),
            _ => self
                .members()
                .into_iter()
                .map(|(name, value)| (name.replace('-', " "), value))
                .collect(),
        };
        for (name, value) in each {
            let _ = write!(out, "{:indent$}{name}:", "");
            let _ = match value {
                Self::Bool(value) => writeln!(out, " {value}"),
                Self::Number(value) => writeln!(out, " {value}"),
                Self::Text(text) => writeln!(out, " {text}"),
                Self::List(_) | Self::Object(_) => {
                    out.push('\n');
                    value.describe(depth + 1, out);
                    Ok(())
                }
            };
        }
    }
}

/// A JSON string, in ASCII.
pub fn quote(text: &str, out: &mut String) {
    out.push('"');
    for unit in text.encode_utf16() {
        match unit {
            0x22 => out.push_str("\\\""),
            0x5c => out.push_str("\\\\"),
            0x08 => out.push_str("\\b"),
            0x0c => out.push_str("\\f"),
            0x0a => out.push_str("\\n"),
            0x0d => out.push_str("\\r"),
            0x09 => out.push_str("\\t"),
            0x20..=0x7e => out.push(unit as u8 as char),
            _ => {
                let _ = write!(out, "\\u{unit:04X}");
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_in_qemus_order() {
        let names = [
            "dirty-flag",
            "format",
            "children",
            "virtual-size",
            "backing-filename",
            "filename",
            "actual-size",
            "backing-filename-format",
            "snapshots",
            "format-specific",
            "full-backing-filename",
            "cluster-size",
        ];
        let object = Value::Object(names.iter().map(|&name| (name, true.into())).collect());
        let order: Vec<_> = object.members().iter().map(|member| member.0).collect();
        assert_eq!(
            order,
            [
                "children",
                "backing-filename-format",
                "snapshots",
                "virtual-size",
                "filename",
                "cluster-size",
                "format",
                "actual-size",
                "format-specific",
                "full-backing-filename",
                "backing-filename",
                "dirty-flag"
            ]
        );
    }

    #[test]
    fn texts_are_quoted_in_ascii() {
        let mut out = String::new();
        quote("a\"\\\n\u{e9}\u{1f600}", &mut out);
        assert_eq!(out, r#""a\"\\\n\u00E9\uD83D\uDE00""#);
    }
}
