//! What a vCPU sees of the machine around it.

/// The machine's I/O as a vCPU reaches it: ports, and memory that is not RAM.
///
/// Called on the vCPU's own thread, with no lock held. Every access is 1, 2, 4 or 8 bytes
/// (ports: 1, 2 or 4) and never crosses the natural boundary of its size unless the guest
/// really did so on one page. Nobody home: reads give all ones, writes are dropped.
pub trait Bus: Send + Sync {
    /// `IN`: fills `data` (1, 2 or 4 bytes) from `port`.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// `OUT`: `data` (1, 2 or 4 bytes) to `port`.
    fn port_write(&self, port: u16, data: &[u8]) -> Flow;
    /// Reads `data.len()` bytes at guest-physical `addr`, outside RAM.
    fn mmio_read(&self, addr: u64, data: &mut [u8]);
    /// Writes `data` at guest-physical `addr`, outside RAM (or on read-only memory).
    fn mmio_write(&self, addr: u64, data: &[u8]) -> Flow;
    /// A processor takes the interrupt that a PC/AT's interrupt controllers ask for (their
    /// output is high): the vector. `None`: there are none.
    fn interrupt_acknowledge(&self) -> Option<u8> {
        None
    }
}

/// Whether a vCPU goes on after a write to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Run on.
    Continue,
    /// Finish this instruction and leave `run` with `Exit::Stopped`: the write powered off,
    /// reset or paused the machine.
    Stop,
}
