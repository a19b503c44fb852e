//! Keys for the guest's keyboard, in the numbers that clients have for them.

use std::sync::Arc;

use vmm_api::control::Call;

use super::Driver;
use super::lifecycle::ask;
use super::object::Pinned;
use crate::error::{Error, ErrorCode, Result, check_flags};

/// virKeycodeSet, and the names that virsh has for them.
const CODESETS: [&str; 10] = [
    "linux", "xt", "atset1", "atset2", "atset3", "os_x", "xt_kbd", "usb", "win32", "qnum",
];

/// A PC's keys: Linux's number (input-event-codes.h), the code in scan code set 1 (0xe0XX: with that
/// prefix), the usage on USB's keyboard page (HID Usage Tables 1.4, chapter 10), Windows' virtual key code;
/// 0 where there is none.
const KEYS: &[(u16, u16, u8, u8)] = &[
    (1, 0x01, 41, 0x1b),
    (2, 0x02, 30, 0x31),
    (3, 0x03, 31, 0x32),
    (4, 0x04, 32, 0x33),
    (5, 0x05, 33, 0x34),
    (6, 0x06, 34, 0x35),
    (7, 0x07, 35, 0x36),
    (8, 0x08, 36, 0x37),
    (9, 0x09, 37, 0x38),
    (10, 0x0a, 38, 0x39),
    (11, 0x0b, 39, 0x30),
    (12, 0x0c, 45, 0xbd),
    (13, 0x0d, 46, 0xbb),
    (14, 0x0e, 42, 0x08),
    (15, 0x0f, 43, 0x09),
    (16, 0x10, 20, 0x51),
    (17, 0x11, 26, 0x57),
    (18, 0x12, 8, 0x45),
    (19, 0x13, 21, 0x52),
    (20, 0x14, 23, 0x54),
    (21, 0x15, 28, 0x59),
    (22, 0x16, 24, 0x55),
    (23, 0x17, 12, 0x49),
    (24, 0x18, 18, 0x4f),
    (25, 0x19, 19, 0x50),
    (26, 0x1a, 47, 0xdb),
    (27, 0x1b, 48, 0xdd),
    (28, 0x1c, 40, 0x0d),
    (29, 0x1d, 224, 0xa2),
    (30, 0x1e, 4, 0x41),
    (31, 0x1f, 22, 0x53),
    (32, 0x20, 7, 0x44),
    (33, 0x21, 9, 0x46),
    (34, 0x22, 10, 0x47),
    (35, 0x23, 11, 0x48),
    (36, 0x24, 13, 0x4a),
    (37, 0x25, 14, 0x4b),
    (38, 0x26, 15, 0x4c),
    (39, 0x27, 51, 0xba),
    (40, 0x28, 52, 0xde),
    (41, 0x29, 53, 0xc0),
    (42, 0x2a, 225, 0xa0),
    (43, 0x2b, 49, 0xdc),
    (44, 0x2c, 29, 0x5a),
    (45, 0x2d, 27, 0x58),
    (46, 0x2e, 6, 0x43),
    (47, 0x2f, 25, 0x56),
    (48, 0x30, 5, 0x42),
    (49, 0x31, 17, 0x4e),
    (50, 0x32, 16, 0x4d),
    (51, 0x33, 54, 0xbc),
    (52, 0x34, 55, 0xbe),
    (53, 0x35, 56, 0xbf),
    (54, 0x36, 229, 0xa1),
    (55, 0x37, 85, 0x6a),
    (56, 0x38, 226, 0xa4),
    (57, 0x39, 44, 0x20),
    (58, 0x3a, 57, 0x14),
    (59, 0x3b, 58, 0x70),
    (60, 0x3c, 59, 0x71),
    (61, 0x3d, 60, 0x72),
    (62, 0x3e, 61, 0x73),
    (63, 0x3f, 62, 0x74),
    (64, 0x40, 63, 0x75),
    (65, 0x41, 64, 0x76),
    (66, 0x42, 65, 0x77),
    (67, 0x43, 66, 0x78),
    (68, 0x44, 67, 0x79),
    (69, 0x45, 83, 0x90),
    (70, 0x46, 71, 0x91),
    (71, 0x47, 95, 0x67),
    (72, 0x48, 96, 0x68),
    (73, 0x49, 97, 0x69),
    (74, 0x4a, 86, 0x6d),
    (75, 0x4b, 92, 0x64),
    (76, 0x4c, 93, 0x65),
    (77, 0x4d, 94, 0x66),
    (78, 0x4e, 87, 0x6b),
    (79, 0x4f, 89, 0x61),
    (80, 0x50, 90, 0x62),
    (81, 0x51, 91, 0x63),
    (82, 0x52, 98, 0x60),
    (83, 0x53, 99, 0x6e),
    (85, 0x76, 148, 0x00),
    (86, 0x56, 100, 0xe2),
    (87, 0x57, 68, 0x7a),
    (88, 0x58, 69, 0x7b),
    (89, 0x73, 135, 0x00),
    (90, 0x78, 146, 0x00),
    (91, 0x77, 147, 0x00),
    (92, 0x79, 138, 0x00),
    (93, 0x70, 136, 0x00),
    (94, 0x7b, 139, 0x00),
    (95, 0x5c, 140, 0x00),
    (96, 0xe01c, 88, 0x00),
    (97, 0xe01d, 228, 0xa3),
    (98, 0xe035, 84, 0x6f),
    (99, 0x54, 70, 0x2c),
    (100, 0xe038, 230, 0xa5),
    (102, 0xe047, 74, 0x24),
    (103, 0xe048, 82, 0x26),
    (104, 0xe049, 75, 0x21),
    (105, 0xe04b, 80, 0x25),
    (106, 0xe04d, 79, 0x27),
    (107, 0xe04f, 77, 0x23),
    (108, 0xe050, 81, 0x28),
    (109, 0xe051, 78, 0x22),
    (110, 0xe052, 73, 0x2d),
    (111, 0xe053, 76, 0x2e),
    (113, 0xe020, 127, 0xad),
    (114, 0xe02e, 129, 0xae),
    (115, 0xe030, 128, 0xaf),
    (116, 0xe05e, 102, 0x00),
    (117, 0x59, 103, 0x00),
    (119, 0xe046, 72, 0x13),
    (121, 0x7e, 133, 0x6c),
    (124, 0x7d, 137, 0x00),
    (125, 0xe05b, 227, 0x5b),
    (126, 0xe05c, 231, 0x5c),
    (127, 0xe05d, 101, 0x5d),
    (142, 0xe05f, 0, 0x5f),
    (143, 0xe063, 0, 0x00),
    (163, 0xe019, 0, 0xb0),
    (164, 0xe022, 0, 0xb3),
    (165, 0xe010, 0, 0xb1),
    (166, 0xe024, 0, 0xb2),
    (210, 0xe037, 0, 0x2a),
];

/// The code in scan code set 1 of a key that codeset number `codeset` calls `code`.
fn scan_code(codeset: &str, code: u32) -> Option<u16> {
    let wanted = u16::try_from(code).ok().filter(|code| *code != 0)?;
    let found = KEYS
        .iter()
        .find(|(linux, scan, usage, windows)| match codeset {
            "linux" => *linux == wanted,
            "xt" | "atset1" => *scan == wanted,
            // Seven bits, and an eighth for the prefix.
            "qnum" => scan & 0x7f | if *scan > 0xff { 0x80 } else { 0 } == wanted,
            "usb" => u16::from(*usage) == wanted,
            "win32" => u16::from(*windows) == wanted,
            _ => false,
        });
    found.map(|(_, scan, ..)| *scan)
}

impl Driver {
    /// Presses keys together, and lets go of them after `hold_ms` milliseconds (0: 100).
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if the domain is off, VIR_ERR_INVALID_ARG for what no keyboard has.
    pub async fn send_keys(
        self: &Arc<Self>,
        domain: Pinned,
        codeset: u32,
        hold_ms: u32,
        codes: &[u32],
        flags: u32,
    ) -> Result<()> {
        check_flags(flags, 0, "qemuDomainSendKey")?;
        let name = usize::try_from(codeset)
            .ok()
            .and_then(|index| CODESETS.get(index).copied())
            .ok_or_else(|| {
                let text = format!("Unsupported codeset: {codeset}");
                Error::new(ErrorCode::INVALID_ARG, text)
            })?;
        let key = |code: &u32| {
            scan_code(name, *code).ok_or_else(|| {
                Error::internal(format!(
                    "cannot translate keycode {code} of {name} codeset to qnum keycode"
                ))
            })
        };
        let keys = codes.iter().map(key).collect::<Result<_>>()?;
        let _job = domain.job().await?;
        ask(&domain, Call::SendKeys { keys, hold_ms })
            .await
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_a_number_in_each_codeset() {
        for (codeset, code) in [
            ("linux", 111),
            ("atset1", 0xe053),
            ("qnum", 0xd3),
            ("usb", 76),
            ("win32", 0x2e),
        ] {
            assert_eq!(scan_code(codeset, code), Some(0xe053), "{codeset}");
        }
        assert_eq!(scan_code("linux", 0), None);
        assert_eq!(scan_code("usb", 0), None);
        assert_eq!(scan_code("linux", 0x1_001e), None);
        assert_eq!(scan_code("os_x", 30), None);
    }

    #[test]
    fn no_two_keys_are_the_same() {
        for (at, key) in KEYS.iter().enumerate() {
            for other in &KEYS[..at] {
                assert!(key.0 != other.0 && key.1 != other.1, "{key:?} {other:?}");
                assert!(key.2 != other.2 || key.2 == 0, "{key:?} {other:?}");
                assert!(key.3 != other.3 || key.3 == 0, "{key:?} {other:?}");
            }
        }
    }
}
