//! Command lists and tables in guest memory (AHCI 1.3.1, 4.2): copied out, then checked, then used.

use virtio::{GuestMemory, OutsideRam};

use crate::num::{low16, to_usize};

/// Bytes of a command header.
const HEADER: u64 = 32;
/// Where a command table has its packet, and its regions.
const PACKET: u64 = 0x40;
const REGIONS: u64 = 0x80;
/// Bytes of a region's descriptor.
const REGION: u64 = 16;

/// Most regions of one command: the longest there is, a page each, and then some. More would cost this process more than
/// they are worth to anybody.
const REGIONS_MOST: usize = 8192 + 64;
/// So many are kept room for.
const REGIONS_KEPT: usize = 1024;

/// A copy of guest memory.
///
/// # Errors
/// It isn't RAM.
pub fn read<const N: usize>(memory: &dyn GuestMemory, address: u64) -> Result<[u8; N], OutsideRam> {
    let source = memory.host(address, N as u64)?;
    let mut bytes = [0; N];
    // SAFETY: `host` has checked that these bytes are RAM, which stays mapped as long as `memory`; no reference to guest
    // memory exists, and whatever mixture a guest makes of it is checked afterwards.
    unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), N) };
    Ok(bytes)
}

/// Writes guest memory.
///
/// # Errors
/// It isn't RAM.
pub fn write(memory: &dyn GuestMemory, address: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
    let len = bytes.len() as u64;
    let target = memory.host(address, len)?;
    // SAFETY: as in `read`, the other way round.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    memory.wrote(address, len);
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// A command's header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Where it is.
    at: u64,
    /// There is a packet.
    pub packet: bool,
    /// Descriptors of regions.
    regions: u16,
    /// The command's table.
    table: u64,
}

impl Header {
    /// That of slot `slot` in the list at `list`.
    ///
    /// # Errors
    /// It isn't in RAM.
    pub fn read(memory: &dyn GuestMemory, list: u64, slot: u8) -> Result<Self, OutsideRam> {
        let at = list.wrapping_add(HEADER * u64::from(slot));
        let bytes: [u8; 16] = read(memory, at)?;
        let flags = word(&bytes, 0);
        Ok(Self {
            at,
            packet: flags & 1 << 5 != 0,
            regions: low16(flags >> 16),
            table: u64::from(word(&bytes, 8) & !0x7f) | u64::from(word(&bytes, 12)) << 32,
        })
    }

    /// The frame for the drive.
    ///
    /// # Errors
    /// It isn't in RAM.
    pub fn frame(&self, memory: &dyn GuestMemory) -> Result<[u8; 20], OutsideRam> {
        read(memory, self.table)
    }

    /// The packet.
    ///
    /// # Errors
    /// It isn't in RAM.
    pub fn packet(&self, memory: &dyn GuestMemory) -> Result<[u8; 16], OutsideRam> {
        read(memory, self.table.wrapping_add(PACKET))
    }

    /// Says how many bytes have gone.
    ///
    /// # Errors
    /// It isn't in RAM.
    pub fn set_count(&self, memory: &dyn GuestMemory, bytes: u32) -> Result<(), OutsideRam> {
        write(memory, self.at.wrapping_add(4), &bytes.to_le_bytes())
    }

    /// The regions that the first `most` bytes go to or come from, less than that where there are none for more.
    ///
    /// # Errors
    /// Descriptors or regions outside RAM, or too many of them.
    pub fn regions(
        &self,
        memory: &dyn GuestMemory,
        most: u64,
        regions: &mut Regions,
    ) -> Result<(), OutsideRam> {
        regions.clear();
        for index in 0..u64::from(self.regions) {
            if regions.total == most {
                break;
            }
            let at = self.table.wrapping_add(REGIONS + REGION * index);
            let bytes: [u8; 16] = read(memory, at)?;
            let address = u64::from(word(&bytes, 0)) | u64::from(word(&bytes, 4)) << 32;
            let last = word(&bytes, 12);
            let len = (u64::from(last & 0x3f_ffff) + 1).min(most - regions.total);
            memory.host(address, len)?;
            if regions.list.len() == REGIONS_MOST {
                return Err(OutsideRam { start: at, len });
            }
            regions.list.push((address, len));
            regions.total += len;
            regions.interrupt |= last >> 31 != 0;
        }
        Ok(())
    }
}

/// Pieces of guest memory.
#[derive(Debug, Default)]
pub struct Regions {
    list: Vec<(u64, u64)>,
    /// Bytes of all of them.
    pub total: u64,
    /// The guest wants to know when one of them is through.
    pub interrupt: bool,
}

impl Regions {
    /// None at all.
    pub fn clear(&mut self) {
        self.list.clear();
        self.list.shrink_to(REGIONS_KEPT);
        self.total = 0;
        self.interrupt = false;
    }

    /// Appends where they are in this process.
    ///
    /// # Errors
    /// They aren't RAM.
    pub fn buffers(
        &self,
        memory: &dyn GuestMemory,
        to: &mut Vec<libc::iovec>,
    ) -> Result<(), OutsideRam> {
        for &(address, len) in &self.list {
            to.push(libc::iovec {
                iov_base: memory.host(address, len)?.cast(),
                iov_len: to_usize(len),
            });
        }
        Ok(())
    }

    /// They were written.
    pub fn wrote(&self, memory: &dyn GuestMemory) {
        for &(address, len) in &self.list {
            memory.wrote(address, len);
        }
    }

    /// Writes `bytes` there, as far as there is room.
    ///
    /// # Errors
    /// They aren't RAM.
    pub fn fill(&self, memory: &dyn GuestMemory, bytes: &[u8]) -> Result<(), OutsideRam> {
        let mut left = bytes;
        for &(address, len) in &self.list {
            let (now, rest) = left.split_at(left.len().min(to_usize(len)));
            write(memory, address, now)?;
            left = rest;
        }
        Ok(())
    }

    /// What is there.
    ///
    /// # Errors
    /// They aren't RAM.
    pub fn gather(&self, memory: &dyn GuestMemory) -> Result<Vec<u8>, OutsideRam> {
        let mut bytes = vec![0; to_usize(self.total)];
        let mut left = &mut bytes[..];
        for &(address, len) in &self.list {
            let source = memory.host(address, len)?;
            let (now, rest) = left.split_at_mut(to_usize(len));
            // SAFETY: as in `read`; `now` is as long as the region.
            unsafe { std::ptr::copy_nonoverlapping(source, now.as_mut_ptr(), now.len()) };
            left = rest;
        }
        Ok(bytes)
    }
}
