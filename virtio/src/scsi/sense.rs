//! Sense data: why a command was not carried out (SPC-4, 4.5).

/// Key, code, qualifier.
pub type Sense = (u8, u8, u8);

/// Nothing is wrong.
pub const NO_SENSE: Sense = (0, 0, 0);
/// The unit can't be accessed.
pub const NOT_READY: u8 = 2;
/// What is stored is damaged, or can't be.
pub const MEDIUM_ERROR: u8 = 3;
/// The command asks for what there is not.
pub const ILLEGAL_REQUEST: u8 = 5;
/// Something happened that the guest is to know of first.
pub const UNIT_ATTENTION: u8 = 6;
/// It can't be written.
pub const DATA_PROTECT: u8 = 7;

/// What was to be read can't be.
pub const UNREADABLE: Sense = (MEDIUM_ERROR, 0x11, 0);
/// There is no such command.
pub const BAD_OPERATION: Sense = (ILLEGAL_REQUEST, 0x20, 0);
/// It is beyond the end.
pub const NO_SUCH_BLOCK: Sense = (ILLEGAL_REQUEST, 0x21, 0);
/// The command has something that there is not.
pub const BAD_FIELD: Sense = (ILLEGAL_REQUEST, 0x24, 0);
/// Nothing is saved.
pub const NOT_SAVED: Sense = (ILLEGAL_REQUEST, 0x39, 0);

/// As REQUEST SENSE and a command's answer have it: fixed format (SPC-4, 4.5.3).
#[must_use]
pub fn fixed((key, code, qualifier): Sense) -> [u8; 18] {
    let mut bytes = [0; 18];
    (bytes[0], bytes[2], bytes[7]) = (0x70, key, 10);
    (bytes[12], bytes[13]) = (code, qualifier);
    bytes
}
