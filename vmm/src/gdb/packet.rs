//! Packets of gdb's remote protocol (gdb manual, E.1): `$data#checksum`, acknowledged or not.

use std::io::{Read, Write};

/// Longest packet's data.
pub const MAX: usize = 0x4000;

/// What comes from gdb.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// A packet's data.
    Packet(Vec<u8>),
    /// Ctrl-C.
    Interrupt,
}

/// Takes packets out of what comes in.
#[derive(Debug, Default)]
pub struct Parser {
    pending: Vec<u8>,
    /// `+` and `-` are no longer sent.
    pub no_ack: bool,
}

fn checksum(data: &[u8]) -> u8 {
    data.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Two hexadecimal digits a byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The reverse; `None` where it isn't that.
pub fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |c: u8| {
        char::from(c)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    };
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks(2)
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
        .collect()
}

/// A hexadecimal number.
pub fn number(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
}

impl Parser {
    /// Reads once from `source`; false at its end.
    ///
    /// # Errors
    /// The connection is broken, or what comes is no protocol of gdb's.
    pub fn fill(&mut self, source: &mut impl Read) -> std::io::Result<bool> {
        let mut buffer = [0; 4096];
        let count = source.read(&mut buffer)?;
        self.pending.extend(&buffer[..count]);
        if self.pending.len() > 4 * MAX {
            return Err(std::io::Error::other("a packet that doesn't end"));
        }
        Ok(count > 0)
    }

    /// The next packet that is complete; acknowledges it on `sink`.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn next(&mut self, sink: &mut impl Write) -> std::io::Result<Option<Input>> {
        loop {
            match self.pending.first() {
                None => return Ok(None),
                Some(3) => {
                    self.pending.remove(0);
                    return Ok(Some(Input::Interrupt));
                }
                Some(b'$') => {}
                // Acknowledgements; and whatever else stands between packets.
                Some(_) => {
                    self.pending.remove(0);
                    continue;
                }
            }
            let Some(end) = self.pending.iter().position(|byte| *byte == b'#') else {
                return Ok(None);
            };
            let Some(sum) = self.pending.get(end + 1..end + 3) else {
                return Ok(None);
            };
            let data = self.pending[1..end].to_vec();
            let good = unhex(sum) == Some(vec![checksum(&data)]);
            self.pending.drain(..end + 3);
            if !self.no_ack {
                sink.write_all(if good { b"+" } else { b"-" })?;
            }
            if good {
                return Ok(Some(Input::Packet(data)));
            }
        }
    }
}

/// Sends a packet. Answers here are hexadecimal digits or text without special characters, but
/// for the target's description.
///
/// # Errors
/// The connection is broken.
pub fn send(sink: &mut impl Write, data: &str) -> std::io::Result<()> {
    let mut escaped = Vec::with_capacity(data.len() + 4);
    escaped.push(b'$');
    for byte in data.bytes() {
        if matches!(byte, b'$' | b'#' | b'}' | b'*') {
            escaped.extend([b'}', byte ^ 0x20]);
        } else {
            escaped.push(byte);
        }
    }
    let sum = checksum(&escaped[1..]);
    escaped.extend(format!("#{sum:02x}").bytes());
    sink.write_all(&escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_packets_apart() {
        let mut parser = Parser::default();
        let mut acks = Vec::new();
        let mut wire: &[u8] = b"+$?#3f\x03$g#00$m1,2";
        assert!(parser.fill(&mut wire).unwrap());
        assert_eq!(
            parser.next(&mut acks).unwrap(),
            Some(Input::Packet(b"?".to_vec()))
        );
        assert_eq!(parser.next(&mut acks).unwrap(), Some(Input::Interrupt));
        assert_eq!(
            parser.next(&mut acks).unwrap(),
            None,
            "a bad checksum, and half a packet"
        );
        assert_eq!(acks, b"+-");
        assert!(!parser.fill(&mut wire).unwrap());
        let mut endless = std::io::repeat(b'$');
        assert!((0..100).any(|_| parser.fill(&mut endless).is_err()));
    }

    #[test]
    fn sends_and_escapes() {
        let mut wire = Vec::new();
        send(&mut wire, "l<a>#").unwrap();
        assert_eq!(wire, b"$l<a>}\x03#c7");
        assert_eq!(unhex(b"0aFf"), Some(vec![10, 255]));
        assert_eq!(unhex(b"0"), None);
        assert_eq!(hex(&[10, 255]), "0aff");
    }
}
