//! Names the instruction that KVM could not execute.

use std::fmt::Write as _;

use iced_x86::{Decoder, DecoderOptions};

/// "cmpxchg16b (48 0f c7 0e)": `bytes` start at the instruction, decoded in `bitness` mode.
pub(super) fn describe(bytes: &[u8], bitness: u32, rip: u64) -> String {
    if bytes.is_empty() {
        return "(bytes unknown)".to_owned();
    }
    let mut decoder = Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let (name, len) = if instruction.is_invalid() {
        ("undecodable bytes".to_owned(), bytes.len())
    } else {
        let name = format!("{:?}", instruction.mnemonic()).to_lowercase();
        (name, instruction.len().min(bytes.len()))
    };
    let mut text = name;
    text.push_str(" (");
    for (index, byte) in bytes[..len].iter().enumerate() {
        let space = if index == 0 { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = write!(text, "{space}{byte:02x}");
    }
    text.push(')');
    text
}

#[cfg(test)]
mod tests {
    use super::describe;

    #[test]
    fn names_the_instruction_and_its_bytes_only() {
        let bytes = [0x48, 0x0f, 0xc7, 0x0e, 0x90, 0x90];
        assert_eq!(describe(&bytes, 64, 0), "cmpxchg16b (48 0f c7 0e)");
        assert_eq!(describe(&[0xcc], 32, 0), "int3 (cc)");
        assert_eq!(describe(&[0x0f], 32, 0), "undecodable bytes (0f)");
        assert_eq!(describe(&[], 32, 0), "(bytes unknown)");
    }
}
