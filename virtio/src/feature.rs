//! The feature bits that don't depend on the kind of device (6), as masks.

/// A chain may go on in a table of its own (2.7.5.3).
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Both sides say from which index on they want to hear of progress (2.7.7, 2.7.10).
pub const EVENT_IDX: u64 = 1 << 29;
/// The modern interface: everything here needs it (6.1).
pub const VERSION_1: u64 = 1 << 32;
/// A notification says how far the driver is (2.9); the device finds that out itself anyway.
pub const NOTIFICATION_DATA: u64 = 1 << 38;
/// One queue can be reset on its own (2.6.1).
pub const RING_RESET: u64 = 1 << 40;

/// What every device here offers, whatever its kind.
pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | NOTIFICATION_DATA | RING_RESET;
