//! SCSI: what drives do for commands, whatever brings those.

pub mod mmc;
pub mod sense;

use crate::block::Hooks;

/// Who is to hear of what a drive does.
pub trait DriveHooks: Hooks {
    /// A tray was opened or closed.
    fn tray_moved(&self, open: bool);
}
