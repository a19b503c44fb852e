//! A PC keyboard at the controller's first port (IBM PS/2 Hardware Interface Technical Reference,
//! "Keyboards"; Microsoft, "Keyboard Scan Code Specification" 1.3a).
//!
//! Keys are named by their codes in scan code set 1, those with a prefix as 0xe0XX.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Bytes that wait for the guest.
const QUEUE: usize = 256;
const ACK: u8 = 0xfa;
/// It understood nothing, and asks to say it again.
const RESEND: u8 = 0xfe;
const TEST_PASSED: u8 = 0xaa;
/// A prefix of keys that the first PC did not have.
const EXTENDED: u8 = 0xe0;
/// In set 2: the key that follows was let go.
const RELEASED: u8 = 0xf0;
/// The highest bit of a code in set 1: the key was let go.
const UP: u8 = 0x80;
/// Pause has no code of its own, and is never let go.
const PAUSE: u16 = 0xe046;

/// What set 2 has for each code of set 1: the controller's translation, the other way round.
const SET_2: [u8; 128] = [
    0x00, 0x76, 0x16, 0x1e, 0x26, 0x25, 0x2e, 0x36, 0x3d, 0x3e, 0x46, 0x45, 0x4e, 0x55, 0x66, 0x0d,
    0x15, 0x1d, 0x24, 0x2d, 0x2c, 0x35, 0x3c, 0x43, 0x44, 0x4d, 0x54, 0x5b, 0x5a, 0x14, 0x1c, 0x1b,
    0x23, 0x2b, 0x34, 0x33, 0x3b, 0x42, 0x4b, 0x4c, 0x52, 0x0e, 0x12, 0x5d, 0x1a, 0x22, 0x21, 0x2a,
    0x32, 0x31, 0x3a, 0x41, 0x49, 0x4a, 0x59, 0x7c, 0x11, 0x29, 0x58, 0x05, 0x06, 0x04, 0x0c, 0x03,
    0x0b, 0x83, 0x0a, 0x01, 0x09, 0x77, 0x7e, 0x6c, 0x75, 0x7d, 0x7b, 0x6b, 0x73, 0x74, 0x79, 0x69,
    0x72, 0x7a, 0x70, 0x71, 0x84, 0x60, 0x61, 0x78, 0x07, 0x0f, 0x17, 0x1f, 0x27, 0x2f, 0x37, 0x3f,
    0x47, 0x4f, 0x56, 0x5e, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x40, 0x48, 0x50, 0x57, 0x6f,
    0x13, 0x19, 0x39, 0x51, 0x53, 0x5c, 0x5f, 0x62, 0x63, 0x64, 0x65, 0x67, 0x68, 0x6a, 0x6d, 0x6e,
];

/// What the controller makes of a byte of set 2 where it translates. Answers are no codes.
pub fn translated(byte: u8) -> u8 {
    let found = SET_2.iter().position(|code| *code == byte);
    match found.map(u8::try_from) {
        Some(Ok(code)) if byte != 0 => code,
        _ => byte,
    }
}

/// What the guest can observe of a keyboard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyboardState {
    /// Bytes for the controller.
    queue: VecDeque<u8>,
    /// Keys are told of.
    scanning: bool,
    /// Scan code set, 1 or 2.
    set: u8,
    /// Command that waits for its parameter.
    command: Option<u8>,
    /// The byte before.
    last: u8,
}

impl Default for KeyboardState {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            scanning: true,
            set: 2,
            command: None,
            last: 0,
        }
    }
}

impl KeyboardState {
    /// A saved one is what a guest could have made of it.
    pub fn check(&mut self) {
        self.queue.truncate(QUEUE);
        self.set = self.set.clamp(1, 2);
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.queue.len() + bytes.len() <= QUEUE {
            self.queue.extend(bytes);
        }
    }

    /// The guest's command, or a command's parameter.
    pub fn write(&mut self, byte: u8) {
        match (self.command.take(), byte) {
            // Which set it uses; its lamps; how fast it repeats; how a key is told of (set 3).
            (Some(0xf0), 0) => {
                let set = self.set;
                self.answer(&[ACK, set]);
            }
            (Some(0xf0), 1 | 2) => {
                self.set = byte;
                self.answer(&[ACK]);
            }
            (Some(0xed | 0xf3 | 0xfb..=0xfd), 0..=0x7f) => self.answer(&[ACK]),
            // Anything else is a new command.
            (_, 0xed | 0xf0 | 0xf3 | 0xfb..=0xfd) => {
                self.command = Some(byte);
                self.answer(&[ACK]);
            }
            (_, 0xee) => self.answer(&[0xee]),
            (_, 0xf2) => self.answer(&[ACK, 0xab, 0x83]),
            (_, 0xf4) => {
                self.queue.clear();
                self.scanning = true;
                self.answer(&[ACK]);
            }
            (_, 0xf5 | 0xf6) => {
                *self = Self {
                    scanning: byte == 0xf6,
                    ..Self::default()
                };
                self.answer(&[ACK]);
            }
            (_, 0xf7..=0xfa) => self.answer(&[ACK]),
            (_, 0xfe) => {
                let last = self.last;
                self.answer(&[last]);
            }
            (_, 0xff) => {
                *self = Self::default();
                self.answer(&[ACK, TEST_PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    /// A key was pressed, or let go. One for which there is no room is as if never touched.
    pub fn key(&mut self, key: u16, down: bool) {
        if !self.scanning {
            return;
        }
        let [prefix, code] = key.to_be_bytes();
        let code = code & !UP;
        let mut bytes = Vec::with_capacity(8);
        let mut one = |prefix: &[u8], code: u8, down: bool| {
            bytes.extend(prefix);
            match (self.set, down) {
                (1, _) => bytes.push(code | if down { 0 } else { UP }),
                (_, true) => bytes.push(SET_2[usize::from(code)]),
                (_, false) => bytes.extend([RELEASED, SET_2[usize::from(code)]]),
            }
        };
        if key == PAUSE {
            if down {
                // Control with Num Lock, as the first PC's was.
                one(&[0xe1], 0x1d, true);
                one(&[], 0x45, true);
                one(&[0xe1], 0x1d, false);
                one(&[], 0x45, false);
            }
        } else if prefix == EXTENDED {
            one(&[EXTENDED], code, down);
        } else {
            one(&[], code, down);
        }
        self.answer(&bytes);
    }

    /// The next byte.
    pub fn take(&mut self) -> Option<u8> {
        let byte = self.queue.pop_front()?;
        self.last = byte;
        Some(byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(keyboard: &mut KeyboardState) -> Vec<u8> {
        std::iter::from_fn(|| keyboard.take()).collect()
    }

    fn said(keyboard: &mut KeyboardState, bytes: &[u8]) -> Vec<u8> {
        for byte in bytes {
            keyboard.write(*byte);
        }
        drain(keyboard)
    }

    #[test]
    fn answers_what_drivers_ask() {
        let mut keyboard = KeyboardState::default();
        assert_eq!(said(&mut keyboard, &[0xff]), [0xfa, 0xaa]);
        assert_eq!(said(&mut keyboard, &[0xf2]), [0xfa, 0xab, 0x83]);
        assert_eq!(said(&mut keyboard, &[0xed, 2]), [0xfa, 0xfa]);
        assert_eq!(said(&mut keyboard, &[0xf3, 0x20]), [0xfa, 0xfa]);
        assert_eq!(said(&mut keyboard, &[0xf0, 0]), [0xfa, 0xfa, 2]);
        assert_eq!(said(&mut keyboard, &[0xf0, 3]), [0xfa, 0xfe]);
        assert_eq!(said(&mut keyboard, &[0xee]), [0xee]);
        assert_eq!(said(&mut keyboard, &[0xfe]), [0xee]);
        // A parameter that is none.
        assert_eq!(said(&mut keyboard, &[0xed, 0xee]), [0xfa, 0xee]);
        assert_eq!(said(&mut keyboard, &[0x12]), [0xfe]);
    }

    #[test]
    fn keys_in_both_sets() {
        let mut keyboard = KeyboardState::default();
        for key in [0x1e, 0xe048, 0x41, 0x54] {
            keyboard.key(key, true);
            keyboard.key(key, false);
        }
        assert_eq!(
            drain(&mut keyboard),
            [
                0x1c, 0xf0, 0x1c, 0xe0, 0x75, 0xe0, 0xf0, 0x75, 0x83, 0xf0, 0x83, 0x84, 0xf0, 0x84
            ]
        );
        assert_eq!(said(&mut keyboard, &[0xf0, 1]), [0xfa, 0xfa]);
        for key in [0x1e, 0xe048, PAUSE] {
            keyboard.key(key, true);
            keyboard.key(key, false);
        }
        assert_eq!(
            drain(&mut keyboard),
            [
                0x1e, 0x9e, 0xe0, 0x48, 0xe0, 0xc8, 0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5
            ]
        );
        keyboard.write(0xf5);
        keyboard.key(0x1e, true);
        assert_eq!(drain(&mut keyboard), [0xfa], "told not to");
    }

    #[test]
    fn a_guest_that_never_reads_gets_whole_keys_at_most() {
        let mut keyboard = KeyboardState::default();
        for _ in 0..1000 {
            keyboard.key(0xe048, true);
            keyboard.key(0xe048, false);
        }
        let all = drain(&mut keyboard);
        assert!(all.len() <= QUEUE && all.len() > QUEUE - 5, "{}", all.len());
    }

    #[test]
    fn every_code_has_one_of_its_own() {
        for code in 1..=127_u8 {
            assert_eq!(translated(SET_2[usize::from(code)]), code);
        }
        for answer in [0, ACK, RESEND, TEST_PASSED, 0xee, 0xab, EXTENDED] {
            assert_eq!(translated(answer), answer);
        }
    }
}
