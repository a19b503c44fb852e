//! Frames between host and drive (Serial ATA 3.0, 10.3).

use serde::{Deserialize, Serialize};

/// Status register: what is wrong is in the error register.
pub const ERR: u8 = 1 << 0;
/// The drive has data, or wants some.
pub const DRQ: u8 = 1 << 3;
/// As drives have always had it.
pub const SEEK: u8 = 1 << 4;
/// Ready.
pub const DRDY: u8 = 1 << 6;
/// Nothing else in the registers counts.
pub const BSY: u8 = 1 << 7;

/// Error register: not done.
pub const ABRT: u8 = 1 << 2;
/// There is no such sector.
pub const IDNF: u8 = 1 << 4;
/// The data can't be read.
pub const UNC: u8 = 1 << 6;

/// Device register: addresses are sector numbers.
pub const LBA: u8 = 1 << 6;

const HOST_TO_DEVICE: u8 = 0x27;
const DEVICE_TO_HOST: u8 = 0x34;
const SET_BITS: u8 = 0xa1;
const PIO_SETUP: u8 = 0x5f;
/// Flags: the frame is for the command register; it goes to the host; it interrupts.
const COMMAND: u8 = 1 << 7;
const TO_HOST: u8 = 1 << 5;
const INTERRUPT: u8 = 1 << 6;

/// What a host tells a drive: Register - Host to Device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Command {
    /// A command; otherwise only the control register counts.
    pub is_command: bool,
    /// The command.
    pub command: u8,
    /// Features, 16 bits.
    pub features: u16,
    /// Address, 48 bits.
    pub lba: u64,
    /// Count, 16 bits.
    pub count: u16,
    /// Device register.
    pub device: u8,
    /// Control register.
    pub control: u8,
}

impl Command {
    /// From a frame. `None`: it is no such frame, or not for this drive.
    #[must_use]
    pub fn parse(frame: &[u8; 20]) -> Option<Self> {
        let [kind, flags, command, features, rest @ ..] = *frame;
        let [a0, a1, a2, device, a3, a4, a5, features_high, rest @ ..] = rest;
        let [count, count_high, _, control, ..] = rest;
        // A port multiplier's ports: there is none.
        if kind != HOST_TO_DEVICE || flags & 0x0f != 0 {
            return None;
        }
        Some(Self {
            is_command: flags & COMMAND != 0,
            command,
            features: u16::from_le_bytes([features, features_high]),
            lba: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, 0, 0]),
            count: u16::from_le_bytes([count, count_high]),
            device,
            control,
        })
    }
}

/// What a drive's registers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Registers {
    /// Status.
    pub status: u8,
    /// Error.
    pub error: u8,
    /// Address, 48 bits.
    pub lba: u64,
    /// Count.
    pub count: u16,
    /// Device.
    pub device: u8,
}

impl Registers {
    /// What a command leaves there that went well.
    #[must_use]
    pub fn ok(command: &Command) -> Self {
        Self {
            status: DRDY | SEEK,
            error: 0,
            lba: command.lba,
            count: command.count,
            device: command.device,
        }
    }

    /// What one leaves there that did not.
    #[must_use]
    pub fn failed(command: &Command, error: u8) -> Self {
        Self {
            status: DRDY | SEEK | ERR,
            error,
            ..Self::ok(command)
        }
    }

    /// Whether it went wrong.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.status & ERR != 0
    }

    /// Status and error as a port's task file register has them.
    #[must_use]
    pub fn task_file(&self) -> u32 {
        u32::from(self.error) << 8 | u32::from(self.status)
    }

    /// The signature, as a port's register has it.
    #[must_use]
    pub fn signature(&self) -> u32 {
        let [a0, a1, a2, ..] = self.lba.to_le_bytes();
        u32::from_le_bytes([self.count.to_le_bytes()[0], a0, a1, a2])
    }
}

/// What both frames with registers begin with.
fn registers(kind: u8, flags: u8, of: &Registers) -> [u8; 20] {
    let [a0, a1, a2, a3, a4, a5, ..] = of.lba.to_le_bytes();
    let [count, count_high] = of.count.to_le_bytes();
    let (status, error, device) = (of.status, of.error, of.device);
    [
        kind, flags, status, error, a0, a1, a2, device, a3, a4, a5, 0, count, count_high, 0, 0, 0,
        0, 0, 0,
    ]
}

/// Register - Device to Host.
#[must_use]
pub fn device_to_host(of: &Registers, interrupt: bool) -> [u8; 20] {
    let flags = if interrupt { INTERRUPT } else { 0 };
    registers(DEVICE_TO_HOST, flags, of)
}

/// PIO Setup: `count` bytes go now, after which the status is `of`'s.
#[must_use]
pub fn pio_setup(of: &Registers, to_host: bool, interrupt: bool, count: u16) -> [u8; 20] {
    let flags = if to_host { TO_HOST } else { 0 } | if interrupt { INTERRUPT } else { 0 };
    let now = Registers {
        status: of.status | DRQ,
        ..*of
    };
    let mut frame = registers(PIO_SETUP, flags, &now);
    frame[15] = of.status;
    frame[16..18].copy_from_slice(&count.to_le_bytes());
    frame
}

/// Set Device Bits: these tags are done.
#[must_use]
pub fn set_bits(status: u8, error: u8, tags: u32) -> [u8; 8] {
    let [t0, t1, t2, t3] = tags.to_le_bytes();
    // The bits that the frame has no place for don't change (10.3.6).
    let status = status & 0x77;
    [SET_BITS, INTERRUPT, status, error, t0, t1, t2, t3]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_taken_apart_and_answered() {
        let mut frame = [0; 20];
        frame[..16].copy_from_slice(&[
            0x27, 0x80, 0x25, 0x11, 1, 2, 3, 0x40, 4, 5, 6, 0x22, 7, 8, 0, 9,
        ]);
        let command = Command::parse(&frame).unwrap();
        let expected = Command {
            is_command: true,
            command: 0x25,
            features: 0x2211,
            lba: 0x0605_0403_0201,
            count: 0x0807,
            device: 0x40,
            control: 9,
        };
        assert_eq!(command, expected);
        let answer = device_to_host(&Registers::failed(&command, ABRT), true);
        assert_eq!(
            answer[..14],
            [0x34, 0x40, 0x51, 4, 1, 2, 3, 0x40, 4, 5, 6, 0, 7, 8]
        );
        frame[1] = 0x81;
        assert_eq!(Command::parse(&frame), None, "a port multiplier's");
        frame[..2].copy_from_slice(&[0x34, 0x80]);
        assert_eq!(Command::parse(&frame), None, "another kind");
    }

    #[test]
    fn a_pio_setup_has_both_statuses() {
        let of = Registers::ok(&Command::default());
        let frame = pio_setup(&of, true, true, 512);
        assert_eq!(frame[..3], [0x5f, 0x60, 0x58]);
        assert_eq!((frame[15], frame[16], frame[17]), (0x50, 0, 2));
    }
}
