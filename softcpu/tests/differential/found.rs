//! Instructions that once differed from the host, each from many states.

use iced_x86::{Decoder, DecoderOptions};

use crate::case::CODE_LEN;
use crate::flow::undefined_flags;
use crate::generate::{Case, Generator};

/// What went wrong, in how many bits, and the code.
pub const FOUND: [(&str, u32, &[u8]); 22] = [
    ("LOOPE was a SETE", 64, &[0x67, 0xe1, 0x00]),
    ("LOOPNE was a SETNE", 64, &[0xe0, 0x00]),
    (
        "SHLD of 64 bits lost its carry",
        64,
        &[0x48, 0x0f, 0xa4, 0x55, 0x10, 0x17],
    ),
    ("SHLD by CL", 64, &[0x48, 0x0f, 0xa5, 0xc2]),
    (
        "a failed CMPXCHG cleared the upper half of its destination",
        64,
        &[0x45, 0x0f, 0xb1, 0xd1],
    ),
    (
        "CRC32 was missing",
        64,
        &[0xf2, 0x44, 0x0f, 0x38, 0xf0, 0xda],
    ),
    (
        "CRC32 of 64 bits",
        64,
        &[0xf2, 0x4c, 0x0f, 0x38, 0xf1, 0xf0],
    ),
    ("a hint was no NOP", 64, &[0x0f, 0x1c, 0x07]),
    (
        "BTR reached beyond 32-bit addresses",
        64,
        &[
            0xf0, 0x67, 0x48, 0x0f, 0xb3, 0x04, 0x25, 0x10, 0x3a, 0x00, 0x20,
        ],
    ),
    (
        "BSF of 0 cleared half of its destination",
        64,
        &[0x44, 0x0f, 0xbc, 0xd2],
    ),
    ("BSR of 0 likewise", 64, &[0x45, 0x0f, 0xbd, 0xc8]),
    ("LEAVE of 16 bits raised #GP for #SS", 64, &[0x66, 0xc9]),
    (
        "a DS prefix made an access through RBP one through DS",
        64,
        &[0x3e, 0x48, 0x8b, 0x45, 0x00],
    ),
    ("ARPL cleared the upper half", 32, &[0x63, 0xc2]),
    (
        "CVTPD2PI took any address",
        64,
        &[0x66, 0x0f, 0x2d, 0x47, 0x08],
    ),
    (
        "an unmasked CVTPS2PI left x87 state alone",
        64,
        &[0x0f, 0x2c, 0xd8],
    ),
    ("CVTPI2PS from memory became MMX", 64, &[0x0f, 0x2a, 0x13]),
    (
        "ADDSUBPS stored despite underflow",
        64,
        &[0xc5, 0x5b, 0xd0, 0xfa],
    ),
    ("SHA wanted alignment", 64, &[0x0f, 0x38, 0xcb, 0x3e]),
    ("MASKMOVQ through CS", 32, &[0x2e, 0x0f, 0xf7, 0xd9]),
    ("FNINIT", 64, &[0xdb, 0xe3, 0xd9, 0xe8]),
    ("MULPS", 64, &[0x44, 0x0f, 0x59, 0xfc]),
];

impl Generator {
    /// A random state for the given code.
    pub fn with_code(&mut self, bytes: &[u8]) -> Option<Case> {
        let mut case = self.case(1);
        let mut code = [0xcc; CODE_LEN];
        code[..bytes.len()].copy_from_slice(bytes);
        case.input.code = code;
        case.instructions.clear();
        let mut decoder =
            Decoder::with_ip(self.bits, bytes, self.shape.code(), DecoderOptions::NONE);
        while decoder.can_decode() {
            case.instructions.push(decoder.decode());
        }
        case.undefined = undefined_flags(&case.instructions)?;
        Some(case)
    }
}
