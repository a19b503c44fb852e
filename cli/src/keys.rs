//! Names of keys, for `send-key`.

/// virKeycodeSet
pub const CODESETS: [&str; 11] = [
    "linux", "xt", "atset1", "atset2", "atset3", "os_x", "xt_kbd", "usb", "win32", "qnum", "rfb",
];

/// Keys of a PC by Linux's names (input-event-codes.h), without `KEY_`.
const KEYS: &[(u32, &str)] = &[
    (1, "ESC"),
    (2, "1"),
    (3, "2"),
    (4, "3"),
    (5, "4"),
    (6, "5"),
    (7, "6"),
    (8, "7"),
    (9, "8"),
    (10, "9"),
    (11, "0"),
    (12, "MINUS"),
    (13, "EQUAL"),
    (14, "BACKSPACE"),
    (15, "TAB"),
    (16, "Q"),
    (17, "W"),
    (18, "E"),
    (19, "R"),
    (20, "T"),
    (21, "Y"),
    (22, "U"),
    (23, "I"),
    (24, "O"),
    (25, "P"),
    (26, "LEFTBRACE"),
    (27, "RIGHTBRACE"),
    (28, "ENTER"),
    (29, "LEFTCTRL"),
    (30, "A"),
    (31, "S"),
    (32, "D"),
    (33, "F"),
    (34, "G"),
    (35, "H"),
    (36, "J"),
    (37, "K"),
    (38, "L"),
    (39, "SEMICOLON"),
    (40, "APOSTROPHE"),
    (41, "GRAVE"),
    (42, "LEFTSHIFT"),
    (43, "BACKSLASH"),
    (44, "Z"),
    (45, "X"),
    (46, "C"),
    (47, "V"),
    (48, "B"),
    (49, "N"),
    (50, "M"),
    (51, "COMMA"),
    (52, "DOT"),
    (53, "SLASH"),
    (54, "RIGHTSHIFT"),
    (55, "KPASTERISK"),
    (56, "LEFTALT"),
    (57, "SPACE"),
    (58, "CAPSLOCK"),
    (59, "F1"),
    (60, "F2"),
    (61, "F3"),
    (62, "F4"),
    (63, "F5"),
    (64, "F6"),
    (65, "F7"),
    (66, "F8"),
    (67, "F9"),
    (68, "F10"),
    (69, "NUMLOCK"),
    (70, "SCROLLLOCK"),
    (71, "KP7"),
    (72, "KP8"),
    (73, "KP9"),
    (74, "KPMINUS"),
    (75, "KP4"),
    (76, "KP5"),
    (77, "KP6"),
    (78, "KPPLUS"),
    (79, "KP1"),
    (80, "KP2"),
    (81, "KP3"),
    (82, "KP0"),
    (83, "KPDOT"),
    (85, "ZENKAKUHANKAKU"),
    (86, "102ND"),
    (87, "F11"),
    (88, "F12"),
    (89, "RO"),
    (90, "KATAKANA"),
    (91, "HIRAGANA"),
    (92, "HENKAN"),
    (93, "KATAKANAHIRAGANA"),
    (94, "MUHENKAN"),
    (95, "KPJPCOMMA"),
    (96, "KPENTER"),
    (97, "RIGHTCTRL"),
    (98, "KPSLASH"),
    (99, "SYSRQ"),
    (100, "RIGHTALT"),
    (101, "LINEFEED"),
    (102, "HOME"),
    (103, "UP"),
    (104, "PAGEUP"),
    (105, "LEFT"),
    (106, "RIGHT"),
    (107, "END"),
    (108, "DOWN"),
    (109, "PAGEDOWN"),
    (110, "INSERT"),
    (111, "DELETE"),
    (112, "MACRO"),
    (113, "MUTE"),
    (114, "VOLUMEDOWN"),
    (115, "VOLUMEUP"),
    (116, "POWER"),
    (117, "KPEQUAL"),
    (118, "KPPLUSMINUS"),
    (119, "PAUSE"),
    (120, "SCALE"),
    (121, "KPCOMMA"),
    (122, "HANGEUL"),
    (123, "HANJA"),
    (124, "YEN"),
    (125, "LEFTMETA"),
    (126, "RIGHTMETA"),
    (127, "COMPOSE"),
];

/// A key's number: as it is written, or by its name in the codeset.
pub fn code(codeset: usize, word: &str) -> Option<u32> {
    if codeset == 0
        && let Some(name) = word.strip_prefix("KEY_")
    {
        let found = KEYS.iter().find(|(_, known)| *known == name);
        return found.map(|(code, _)| *code);
    }
    let number = match word.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    };
    number.filter(|code| *code > 0 && *code <= 0xffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_linuxs_numbers() {
        assert_eq!(code(0, "KEY_A"), Some(30));
        assert_eq!(code(0, "KEY_F12"), Some(88));
        assert_eq!(code(0, "0x1e"), Some(30));
        assert_eq!(code(1, "KEY_A"), None);
        assert_eq!(code(0, "0"), None);
    }
}
