//! A CD-ROM drive's commands: PACKET (ACS-3, 7.18), and what comes in packets (MMC-6, SPC-3).

use virtio::scsi::mmc::{self, BLOCK, Disc, Done, NO_MEDIUM_CLOSED, cut, half};
use virtio::scsi::sense::{BAD_FIELD, ILLEGAL_REQUEST, Sense, UNREADABLE};

use super::ata;
use super::drive::{Drive, DriveState, Todo};
use super::fis::{ABRT, Command, DRDY, ERR, Registers, SEEK};
use super::identity;

/// What the drive is connected by (MMC-6, 5.3.2).
const ATAPI: u8 = 2;

/// A packet's end: data are complete, the status follows (interrupt reason: to the host, for the command).
fn ended(command: &Command, error: u8) -> Registers {
    Registers {
        status: DRDY | if error == 0 { SEEK } else { ERR },
        error,
        lba: command.lba,
        count: 3,
        device: command.device,
    }
}

fn check_condition(command: &Command, sense: Sense) -> Registers {
    let aborted = if sense.0 == ILLEGAL_REQUEST { ABRT } else { 0 };
    ended(command, sense.0 << 4 | aborted)
}

/// What the guest is told of a transfer that failed on the host.
pub fn failure(state: &mut DriveState, command: &Command, errno: i32) -> Registers {
    let sense = match errno {
        libc::ENOMEDIUM => NO_MEDIUM_CLOSED,
        _ => UNREADABLE,
    };
    state.cd.note(command.command, &Err(sense));
    check_condition(command, sense)
}

/// What is to be done for a command.
pub fn run(
    drive: &Drive,
    state: &mut DriveState,
    command: &Command,
    packet: impl FnOnce() -> [u8; 16],
) -> Todo {
    match command.command {
        0xa0 => {
            // The command before it counts no more, but for whoever asks what was wrong with it.
            let packet = packet();
            let result = if packet[0] == mmc::INQUIRY {
                let result = inquiry(&packet);
                state.cd.note(packet[0], &result);
                result
            } else {
                let disc = Disc {
                    blocks: drive.capacity() / BLOCK,
                    interface: ATAPI,
                };
                mmc::run(disc, &mut state.cd, &packet)
            };
            match result {
                Ok(Done::Nothing) => Todo::Answer(ended(command, 0)),
                Ok(Done::Bytes(bytes)) => Todo::In(bytes),
                Ok(Done::Blocks(first, count)) => Todo::Read {
                    offset: first * BLOCK,
                    len: count * BLOCK,
                },
                Err(sense) => Todo::Answer(check_condition(command, sense)),
            }
        }
        0xa1 => Todo::In(identity::cdrom(drive, state)),
        // DEVICE RESET
        0x08 => {
            state.cd.reset();
            Todo::Signature
        }
        // Whoever takes it for a disk is told what it is (ACS-3, 7.12.1).
        0xec | 0x20 | 0x21 => {
            let signature = drive.signature();
            Todo::Answer(Registers {
                status: DRDY | ERR,
                error: ABRT,
                ..signature
            })
        }
        0x90 => Todo::Answer(drive.signature()),
        0xef if command.features & 0xff == 3 => ata::set_transfer_mode(state, command),
        0xe0..=0xe3 | 0xe6 => Todo::Answer(Registers::ok(command)),
        0xe5 => {
            let mut registers = Registers::ok(command);
            registers.count = 0xff;
            Todo::Answer(registers)
        }
        _ => Todo::Answer(Registers::failed(command, ABRT)),
    }
}

/// A packet's answer when it has ended well.
#[must_use]
pub fn good(command: &Command) -> Registers {
    ended(command, 0)
}
fn inquiry(packet: &[u8; 16]) -> Result<Done, Sense> {
    let room = half(packet, 3);
    if packet[1] & 1 != 0 {
        // Vital product data: the list of pages, which is the only one.
        return match packet[2] {
            0 => Ok(cut(vec![5, 0, 0, 1, 0], room)),
            _ => Err(BAD_FIELD),
        };
    }
    if packet[2] != 0 {
        return Err(BAD_FIELD);
    }
    // A CD-ROM drive with removable media; SPC-3; ATAPI; 31 bytes follow.
    let mut bytes = vec![5, 0x80, 5, 0x32, 31, 0, 0, 0];
    bytes.extend(format!("{:8}{:16}{:4}", "VIREO", "DVD-ROM", identity::REVISION).bytes());
    Ok(cut(bytes, room))
}
