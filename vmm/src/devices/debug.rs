//! Ports for developers of small kernels: QEMU's isa-debug-exit and Bochs' debug console.

use std::sync::Arc;

use hypervisor::Flow;

use super::{Request, Requests};
use crate::bus::Device;
use crate::chardev::Port;
use crate::num::low8;

/// Ports of isa-debug-exit: a write of 1, 2 or 4 bytes at the first is one value.
pub const EXIT_LEN: u32 = 4;

/// A write of V ends the VMM with status `(V << 1) | 1`.
#[derive(Debug)]
pub struct DebugExit {
    requests: Arc<dyn Requests>,
}

impl DebugExit {
    /// The end is asked of `requests`.
    pub fn new(requests: Arc<dyn Requests>) -> Self {
        Self { requests }
    }
}

impl Device for DebugExit {
    fn max_width(&self) -> u8 {
        4
    }

    fn read(&self, _offset: u32, _width: u8) -> u32 {
        0
    }

    fn write(&self, _offset: u32, _width: u8, value: u32) -> Flow {
        self.requests.request(Request::DebugExit(value));
        Flow::Stop
    }
}

/// Bytes written here go to the VMM's standard error.
#[derive(Debug)]
pub struct DebugConsole {
    port: Arc<Port>,
}

impl DebugConsole {
    /// Output goes to `port`.
    pub fn new(port: Arc<Port>) -> Self {
        Self { port }
    }
}

impl Device for DebugConsole {
    /// A guest finds the console by this value.
    fn read(&self, _offset: u32, _width: u8) -> u32 {
        0xe9
    }

    fn write(&self, _offset: u32, _width: u8, value: u32) -> Flow {
        self.port.send(low8(value));
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Recorder;

    #[test]
    fn exit_takes_the_value() {
        let recorder = Arc::new(Recorder::default());
        assert_eq!(
            DebugExit::new(recorder.clone()).write(0, 4, 0x10),
            Flow::Stop
        );
        assert_eq!(recorder.take_requests(), [Request::DebugExit(0x10)]);
    }

    #[test]
    fn console_passes_bytes_on() {
        let port = Arc::new(Port::new().unwrap());
        let console = DebugConsole::new(port.clone());
        assert_eq!(console.read(0, 1), 0xe9);
        console.write(0, 1, b'!'.into());
        assert_eq!(port.take_output(), b"!");
    }
}
