//! Messages of the control queues (5.3.6.2).

/// `VIRTIO_CONSOLE_DEVICE_READY`: from the driver.
pub const DEVICE_READY: u16 = 0;
/// `VIRTIO_CONSOLE_DEVICE_ADD`: there is a port.
pub const PORT_ADD: u16 = 1;
/// `VIRTIO_CONSOLE_DEVICE_REMOVE`: a port is gone.
pub const PORT_REMOVE: u16 = 2;
/// `VIRTIO_CONSOLE_PORT_READY`: from the driver.
pub const PORT_READY: u16 = 3;
/// `VIRTIO_CONSOLE_CONSOLE_PORT`: the port is a console.
pub const CONSOLE_PORT: u16 = 4;
/// `VIRTIO_CONSOLE_RESIZE`: the console's size.
pub const RESIZE: u16 = 5;
/// `VIRTIO_CONSOLE_PORT_OPEN`: from either side.
pub const PORT_OPEN: u16 = 6;
/// `VIRTIO_CONSOLE_PORT_NAME`: what the driver calls it.
pub const PORT_NAME: u16 = 7;

/// The fixed part of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Port.
    pub port: u32,
    /// One of the numbers above.
    pub event: u16,
    /// What about it.
    pub value: u16,
}

impl Message {
    /// As it is in a buffer, `rest` after it.
    #[must_use]
    pub fn encode(self, rest: &[u8]) -> Vec<u8> {
        let mut bytes = self.port.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes.extend(rest);
        bytes
    }

    /// Out of a buffer.
    #[must_use]
    pub fn decode(bytes: [u8; 8]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }
}
