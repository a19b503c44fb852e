//! The port and memory buses: who answers at which address, and every odd access width.

use std::borrow::Borrow;
use std::sync::{Arc, PoisonError, RwLock};

use hypervisor::Flow;

use crate::devices::pic::Pic;

/// Something that answers on a bus.
///
/// Every access a device sees is 1, 2, 4 bytes, aligned to its size, not wider than
/// [`Device::max_width`], and inside the range it was registered for: the bus cuts up the rest.
/// Called on vCPU threads, several at the same time.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// Widest register in bytes: 1, 2 or 4.
    fn max_width(&self) -> u8 {
        1
    }

    /// Value of the `width` bytes at `offset`; bits above them are dropped.
    fn read(&self, offset: u32, width: u8) -> u32;

    /// Writes `width` bytes at `offset`; bits of `value` above them are zero.
    fn write(&self, offset: u32, width: u8, value: u32) -> Flow;
}

#[derive(Debug, Clone)]
struct Range {
    start: u64,
    end: u64,
    device: Arc<dyn Device>,
}

impl Range {
    /// The longest first piece of an access at `addr`, which is inside, that the device may see,
    /// and its offset.
    fn piece(&self, addr: u64, len: usize) -> (u8, u32) {
        let mut width = self.device.max_width().clamp(1, 4);
        while usize::from(width) > len
            || !addr.is_multiple_of(u64::from(width))
            || addr + u64::from(width) > self.end
        {
            width /= 2;
        }
        let offset = u32::try_from(addr - self.start).unwrap_or(u32::MAX);
        (width, offset)
    }

    /// Writes one piece, given its bytes.
    fn write(&self, offset: u32, bytes: &[u8]) -> Flow {
        let mut value = [0; 4];
        value[..bytes.len()].copy_from_slice(bytes);
        let width = u8::try_from(bytes.len()).unwrap_or(4);
        self.device.write(offset, width, u32::from_le_bytes(value))
    }
}

/// One address space. Filled while the machine is built, unchanged while it runs.
#[derive(Debug, Default)]
pub struct Space {
    ranges: Vec<Range>,
}

/// Two devices at one address: a mistake in the machine's description.
#[derive(Debug, thiserror::Error)]
#[error("addresses {start:#x}..{end:#x} are already taken")]
pub struct Overlap {
    start: u64,
    end: u64,
}

impl Space {
    /// Puts a device at `start ..= last`.
    ///
    /// # Errors
    /// [`Overlap`] if another device answers to any of it.
    pub fn insert(&mut self, start: u64, len: u32, device: Arc<dyn Device>) -> Result<(), Overlap> {
        let end = start.saturating_add(u64::from(len));
        let at = self.ranges.partition_point(|r| r.end <= start);
        if self.ranges.get(at).is_some_and(|r| r.start < end) {
            return Err(Overlap { start, end });
        }
        self.ranges.insert(at, Range { start, end, device });
        Ok(())
    }

    fn find(&self, addr: u64) -> Option<&Range> {
        let at = self.ranges.partition_point(|r| r.end <= addr);
        self.ranges.get(at).filter(|r| r.start <= addr)
    }

    /// Reads `data.len()` bytes at `addr`; all ones where nobody is home.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        read_pieces(|at| self.find(at), addr, data);
    }

    /// Writes `data` at `addr`; dropped where nobody is home. Stops as soon as a device says so.
    pub fn write(&self, addr: u64, data: &[u8]) -> Flow {
        write_pieces(|at| self.find(at), addr, data)
    }
}

fn read_pieces<R: Borrow<Range>>(find: impl Fn(u64) -> Option<R>, addr: u64, data: &mut [u8]) {
    let (mut addr, mut rest) = (addr, data);
    while !rest.is_empty() {
        let mut piece = 1;
        match find(addr) {
            Some(range) => {
                let range = range.borrow();
                let (width, offset) = range.piece(addr, rest.len());
                let value = range.device.read(offset, width).to_le_bytes();
                piece = usize::from(width);
                rest[..piece].copy_from_slice(&value[..piece]);
            }
            None => rest[0] = 0xff,
        }
        addr = addr.wrapping_add(piece as u64);
        rest = &mut rest[piece..];
    }
}

fn write_pieces<R: Borrow<Range>>(find: impl Fn(u64) -> Option<R>, addr: u64, data: &[u8]) -> Flow {
    let (mut addr, mut rest) = (addr, data);
    let mut flow = Flow::Continue;
    while !rest.is_empty() {
        let mut piece = 1;
        if let Some(range) = find(addr) {
            let range = range.borrow();
            let (width, offset) = range.piece(addr, rest.len());
            piece = usize::from(width);
            if range.write(offset, &rest[..piece]) == Flow::Stop {
                flow = Flow::Stop;
            }
        }
        addr = addr.wrapping_add(piece as u64);
        rest = &rest[piece..];
    }
    flow
}

/// What moves while the machine runs: the memory BARs of PCI functions, which the guest places.
#[derive(Debug, Default)]
pub struct Movable {
    space: RwLock<Space>,
}

impl Movable {
    /// Puts a device at `start .. start + len`.
    ///
    /// # Errors
    /// [`Overlap`] if another device answers to any of it.
    pub fn place(&self, start: u64, len: u32, device: Arc<dyn Device>) -> Result<(), Overlap> {
        let mut space = self.space.write().unwrap_or_else(PoisonError::into_inner);
        space.insert(start, len, device)
    }

    /// Takes away what begins at `start`; nothing happens if nothing does.
    pub fn take(&self, start: u64) {
        let mut space = self.space.write().unwrap_or_else(PoisonError::into_inner);
        space.ranges.retain(|range| range.start != start);
    }

    /// A copy: a device's access may take long, and may itself move something.
    fn find(&self, addr: u64) -> Option<Range> {
        let space = self.space.read().unwrap_or_else(PoisonError::into_inner);
        space.find(addr).cloned()
    }
}

/// A machine's two buses, as vCPUs see them.
#[derive(Debug, Default)]
pub struct Buses {
    /// Ports.
    pub ports: Space,
    /// Memory that is not RAM.
    pub mmio: Space,
    /// Memory BARs of PCI functions: asked where `mmio` has nobody.
    pub bars: Arc<Movable>,
    /// A PC/AT's interrupt controllers, where the machine has them.
    pub pic: Option<Arc<Pic>>,
}

impl hypervisor::Bus for Buses {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(u64::from(port), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Flow {
        self.ports.write(u64::from(port), data)
    }

    fn interrupt_acknowledge(&self) -> Option<u8> {
        self.pic.as_ref().map(|pic| pic.acknowledge())
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        if self.mmio.find(addr).is_some() {
            self.mmio.read(addr, data);
        } else {
            read_pieces(|at| self.bars.find(at), addr, data);
        }
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) -> Flow {
        if self.mmio.find(addr).is_some() {
            self.mmio.write(addr, data)
        } else {
            write_pieces(|at| self.bars.find(at), addr, data)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers the accesses it saw.
    #[derive(Debug)]
    struct Probe {
        width: u8,
        seen: Mutex<Vec<(u32, u8, u32)>>,
    }

    impl Probe {
        fn new(width: u8) -> Arc<Self> {
            Arc::new(Self {
                width,
                seen: Mutex::default(),
            })
        }

        fn seen(&self) -> Vec<(u32, u8, u32)> {
            std::mem::take(&mut *self.seen.lock().unwrap())
        }
    }

    impl Device for Probe {
        fn max_width(&self) -> u8 {
            self.width
        }

        fn read(&self, offset: u32, width: u8) -> u32 {
            self.seen.lock().unwrap().push((offset, width, 0));
            0x4433_2211
        }

        fn write(&self, offset: u32, width: u8, value: u32) -> Flow {
            self.seen.lock().unwrap().push((offset, width, value));
            if value == 0x99 {
                Flow::Stop
            } else {
                Flow::Continue
            }
        }
    }

    #[test]
    fn cuts_accesses_to_the_device_width() {
        let mut space = Space::default();
        let byte = Probe::new(1);
        let dword = Probe::new(4);
        space.insert(0x100, 4, byte.clone()).unwrap();
        space.insert(0x104, 8, dword.clone()).unwrap();
        let mut data = [0; 4];
        space.read(0x100, &mut data);
        assert_eq!(byte.seen(), [(0, 1, 0), (1, 1, 0), (2, 1, 0), (3, 1, 0)]);
        assert_eq!(data, [0x11; 4]);
        space.write(0x104, &0x0807_0605_0403_0201_u64.to_le_bytes());
        assert_eq!(dword.seen(), [(0, 4, 0x0403_0201), (4, 4, 0x0807_0605)]);
        space.write(0x105, &[1, 2, 3, 4]);
        assert_eq!(
            dword.seen(),
            [(1, 1, 1), (2, 2, 0x0302), (4, 1, 4)],
            "misaligned"
        );
    }

    #[test]
    fn leaves_the_ends_alone() {
        let mut space = Space::default();
        let probe = Probe::new(4);
        space.insert(0x10, 2, probe.clone()).unwrap();
        let mut data = [0; 8];
        space.read(0xe, &mut data);
        assert_eq!(data, [0xff, 0xff, 0x11, 0x22, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(probe.seen(), [(0, 2, 0)]);
        space.read(u64::MAX, &mut data);
    }

    #[test]
    fn bars_move() {
        use hypervisor::Bus;
        let buses = Buses::default();
        let probe = Probe::new(4);
        buses.bars.place(0x1000, 8, probe.clone()).unwrap();
        assert!(buses.bars.place(0x1004, 8, Probe::new(4)).is_err());
        let mut data = [0; 8];
        buses.mmio_read(0x1004, &mut data);
        assert_eq!(data, [0x11, 0x22, 0x33, 0x44, 0xff, 0xff, 0xff, 0xff]);
        buses.bars.take(0x1000);
        buses.bars.place(0x1_0000_2000, 8, probe.clone()).unwrap();
        buses.mmio_read(0x1004, &mut data);
        assert_eq!(data, [0xff; 8]);
        assert_eq!(buses.mmio_write(0x1_0000_2000, &[0x99]), Flow::Stop);
        assert_eq!(probe.seen(), [(4, 4, 0), (0, 1, 0x99)]);
    }

    #[test]
    fn refuses_overlap_and_passes_stop_on() {
        let mut space = Space::default();
        space.insert(0x10, 4, Probe::new(1)).unwrap();
        assert!(space.insert(0x13, 1, Probe::new(1)).is_err());
        assert!(space.insert(0xe, 3, Probe::new(1)).is_err());
        space.insert(0x14, 1, Probe::new(1)).unwrap();
        assert_eq!(space.write(0x10, &[0x99, 0]), Flow::Stop);
        assert_eq!(space.write(0x20, &[0x99]), Flow::Continue);
    }
}
