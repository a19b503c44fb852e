//! What the guest can observe of a virtio-serial device.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::device::QueueSetup;

/// What the driver is still to be told of a port: bits, told in this order.
pub mod tell {
    /// It is gone.
    pub const REMOVE: u8 = 1;
    /// It is there.
    pub const ADD: u8 = 2;
    /// It is a console.
    pub const CONSOLE: u8 = 4;
    /// Its name.
    pub const NAME: u8 = 8;
    /// Whether somebody is at its other end.
    pub const OPEN: u8 = 16;
    /// The console's size.
    pub const RESIZE: u8 = 32;
}

/// A virtio-serial device's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The driver has said that it is ready (with several ports).
    pub ready: bool,
    /// Columns of the console; 0: unknown.
    pub columns: u16,
    /// Rows of the console; 0: unknown.
    pub rows: u16,
    /// The ports by number.
    pub ports: BTreeMap<u32, PortState>,
    /// The queues, by index.
    pub queues: Vec<Option<QueueSetup>>,
}

/// One port's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// The driver has set it up.
    pub ready: bool,
    /// Somebody in the guest has it open.
    pub guest_open: bool,
    /// What the driver knows of the other end.
    pub host_open: bool,
    /// What it is still to be told (`tell`).
    pub tell: u8,
    /// It is unplugged; the driver has not heard of it yet.
    pub gone: bool,
    /// On its way to the guest.
    pub input: Vec<u8>,
    /// Bytes of the next chain from the guest that the host has taken already.
    pub taken: u32,
}
