//! pvpanic: the port through which a guest says that it panicked (QEMU's docs/specs/pvpanic).

use std::sync::Arc;

use hypervisor::Flow;

use super::{Request, Requests};
use crate::bus::Device;

/// Its port.
pub const PORT: u16 = 0x505;

const PANICKED: u32 = 1;
const CRASH_LOADED: u32 = 2;

/// The port. It has no state.
#[derive(Debug)]
pub struct Pvpanic {
    requests: Arc<dyn Requests>,
}

impl Pvpanic {
    /// Panics are reported to `requests`.
    pub fn new(requests: Arc<dyn Requests>) -> Self {
        Self { requests }
    }
}

impl Device for Pvpanic {
    /// The events it understands.
    fn read(&self, _offset: u32, _width: u8) -> u32 {
        PANICKED | CRASH_LOADED
    }

    fn write(&self, _offset: u32, _width: u8, value: u32) -> Flow {
        if value & PANICKED != 0 {
            self.requests.request(Request::Panic);
            return Flow::Stop;
        }
        if value & CRASH_LOADED != 0 {
            log::warn!("the guest panicked and starts its crash kernel");
        }
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Recorder;

    #[test]
    fn tells_a_panic() {
        let recorder = Arc::new(Recorder::default());
        let pvpanic = Pvpanic::new(recorder.clone());
        assert_eq!(pvpanic.read(0, 1), 3);
        assert_eq!(pvpanic.write(0, 1, 2), Flow::Continue);
        assert_eq!(pvpanic.write(0, 1, 0x80), Flow::Continue);
        assert_eq!(pvpanic.write(0, 1, 1), Flow::Stop);
        assert_eq!(recorder.take_requests(), [Request::Panic]);
    }
}
