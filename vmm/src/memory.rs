//! Guest RAM: one memfd, mapped shared, split around the 32-bit hole. In a restored machine, a
//! saved image mapped privately: its pages come when they are touched.

use std::ffi::c_void;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use hypervisor::MemorySlot;
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::unistd::Whence;

use crate::num::to_usize;

/// RAM below the hole ends here at the latest: 3 GiB. Above it are the PCI windows, ECAM,
/// the I/O APIC and the local APICs.
pub const LOW_MAX: u64 = 0xc000_0000;
/// RAM that did not fit below goes on here: 4 GiB.
pub const HIGH_START: u64 = 0x1_0000_0000;
/// Unit of guest memory.
pub const PAGE: u64 = 4096;
/// The host's huge pages: what x86-64 has.
pub const HUGE: u64 = 2 << 20;

/// What goes wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Size is zero or not whole pages.
    #[error("guest memory of {0} bytes is not a positive multiple of 4096")]
    Size(u64),
    /// More than the host could ever give.
    #[error("guest memory of {wanted} MiB is more than this host has ({host} MiB)")]
    TooLarge {
        /// MiB asked for.
        wanted: u64,
        /// MiB of RAM and swap.
        host: u64,
    },
    /// The kernel refused.
    #[error("{call} for guest memory: {errno}")]
    Os {
        /// System call.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// Outside RAM.
    #[error("guest memory {start:#x}..+{len:#x} is not RAM")]
    Outside {
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
    },
}

fn os(call: &'static str) -> impl Fn(Errno) -> MemoryError {
    move |errno| MemoryError::Os { call, errno }
}

/// An anonymous or shared mapping, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping is plain memory owned by this value; nothing in it is tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: access goes through raw pointers or `&mut`; see `GuestMemory` for the rules.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The first `len` bytes of it that begin with a huge page; the rest, of at least a huge page more, goes back.
    fn aligned(mut self, len: usize) -> Self {
        let skip = self.base.as_ptr().align_offset(to_usize(HUGE));
        let Some(rest) = self.len.checked_sub(skip.saturating_add(len)) else {
            return self;
        };
        let give_back = |at: NonNull<c_void>, len| {
            if len == 0 {
                return;
            }
            // SAFETY: a part of the mapping, which nobody knows yet.
            if let Err(error) = unsafe { munmap(at, len) } {
                log::error!("munmap: {error}");
            }
        };
        // SAFETY: both are inside the mapping, or its end.
        let (start, end) = unsafe { (self.base.byte_add(skip), self.base.byte_add(skip + len)) };
        give_back(self.base, skip);
        give_back(end, rest);
        (self.base, self.len) = (start, len);
        self
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by mmap with exactly this address and length, and no reference into it
        // outlives its owner.
        if let Err(error) = unsafe { munmap(self.base, self.len) } {
            log::error!("munmap: {error}");
        }
    }
}

/// What RAM is made of.
#[derive(Debug)]
enum Backing {
    /// Pages of its own.
    Own(File),
    /// A file's content, copied where it is written to.
    Private,
    /// Nobody else's, and in huge pages where much comes at once. Which of them are there is said by
    /// `/proc/self/pagemap`.
    Anonymous(File),
}

/// All RAM of one guest.
#[derive(Debug)]
pub struct GuestMemory {
    backing: Backing,
    map: Mapping,
    low: u64,
    high: u64,
}

impl GuestMemory {
    /// `size` bytes of zeroed RAM. Nothing is touched: pages come when they are used.
    ///
    /// # Errors
    /// Size 0, not whole pages or beyond the host's memory; the kernel's refusal.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        let fd = memfd_create(c"vireo-ram", MFdFlags::MFD_CLOEXEC).map_err(os("memfd_create"))?;
        let len = i64::try_from(size).map_err(|_| MemoryError::Size(size))?;
        nix::unistd::ftruncate(&fd, len).map_err(os("ftruncate"))?;
        let map = Self::map(size, &fd, 0, MapFlags::MAP_SHARED)?;
        Ok(Self::of(size, map, Backing::Own(fd.into())))
    }

    /// `size` bytes of zeroed RAM for a machine that comes from elsewhere, most of it in large pieces: the host gives such
    /// memory, and the processor finds it, much faster in huge pages, which a memfd has only where the host's owner says
    /// so.
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn arriving(size: u64) -> Result<Self, MemoryError> {
        let Ok(pages) = File::open("/proc/self/pagemap") else {
            return Self::new(size);
        };
        let length = Self::length(size)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        let more = length.saturating_add(to_usize(HUGE));
        // SAFETY: a new anonymous mapping at an address the kernel picks.
        match unsafe { mmap_anonymous(None, more, prot, flags) } {
            Ok(base) => {
                let len = more.get();
                let map = Mapping { base, len }.aligned(length.get());
                Ok(Self::of(size, map, Backing::Anonymous(pages)))
            }
            // A host that promises no more than it has counts this in full, and a memfd as it is used.
            Err(_) => Self::new(size),
        }
    }

    /// `size` bytes of RAM whose content is at `offset` (whole pages) of `file`, which must not
    /// change from now on. Nothing is read yet.
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn from_file(size: u64, file: &File, offset: u64) -> Result<Self, MemoryError> {
        let offset = i64::try_from(offset).map_err(|_| MemoryError::Size(size))?;
        let map = Self::map(size, file, offset, MapFlags::MAP_PRIVATE)?;
        Ok(Self::of(size, map, Backing::Private))
    }

    fn of(size: u64, map: Mapping, backing: Backing) -> Self {
        let low = size.min(LOW_MAX);
        Self {
            backing,
            map,
            low,
            high: size - low,
        }
    }

    fn map<F: AsFd>(
        size: u64,
        file: F,
        offset: i64,
        sharing: MapFlags,
    ) -> Result<Mapping, MemoryError> {
        let length = Self::length(size)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = sharing | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address the kernel picks. Others may change a private
        // mapping's file; guest RAM is memory that anyone may change at any time.
        let base = unsafe { mmap(None, length, prot, flags, file, offset) }.map_err(os("mmap"))?;
        Ok(Mapping {
            base,
            len: length.get(),
        })
    }

    /// A size that this host can give.
    fn length(size: u64) -> Result<NonZeroUsize, MemoryError> {
        if size == 0 || !size.is_multiple_of(PAGE) {
            return Err(MemoryError::Size(size));
        }
        let host = host_memory()?;
        if size > host {
            return Err(MemoryError::TooLarge {
                wanted: size >> 20,
                host: host >> 20,
            });
        }
        NonZeroUsize::new(to_usize(size)).ok_or(MemoryError::Size(size))
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.low + self.high
    }

    /// RAM below 3 GiB, from address 0.
    #[must_use]
    pub fn low(&self) -> Range<u64> {
        0..self.low
    }

    /// RAM from 4 GiB up; empty for small guests.
    #[must_use]
    pub fn high(&self) -> Range<u64> {
        HIGH_START..HIGH_START + self.high
    }

    /// What to hand to the hypervisor.
    #[must_use]
    pub fn slots(&self) -> Vec<MemorySlot> {
        let base: *mut u8 = self.map.base.as_ptr().cast();
        let slot = |id, gpa, len, host| MemorySlot {
            id,
            gpa,
            len,
            host,
            readonly: false,
            log_dirty: false,
        };
        let mut slots = vec![slot(0, 0, self.low, base)];
        if self.high > 0 {
            slots.push(slot(
                1,
                HIGH_START,
                self.high,
                base.wrapping_add(to_usize(self.low)),
            ));
        }
        slots
    }

    /// Where bytes of [`GuestMemory::bytes`] are in the guest: in one place, or in two around the hole.
    #[must_use]
    pub fn places(&self, start: u64, len: u64) -> Vec<(u64, u64)> {
        let end = start.saturating_add(len).min(self.size());
        let low = start..end.min(self.low);
        let high = start.max(self.low)..end;
        let gpa = |offset: u64| offset - self.low + HIGH_START;
        let mut places = Vec::with_capacity(1);
        if !low.is_empty() {
            places.push((low.start, low.end - low.start));
        }
        if !high.is_empty() {
            places.push((gpa(high.start), high.end - high.start));
        }
        places
    }

    /// Offset in the file of a range that is all RAM.
    fn locate(&self, start: u64, len: u64) -> Result<usize, MemoryError> {
        let outside = || MemoryError::Outside { start, len };
        let end = start.checked_add(len).ok_or_else(outside)?;
        if end <= self.low {
            Ok(to_usize(start))
        } else if start >= HIGH_START && end <= HIGH_START + self.high {
            Ok(to_usize(start - HIGH_START + self.low))
        } else {
            Err(outside())
        }
    }

    /// Host address of guest-physical `start`: all `len` bytes from there are RAM, side by side in
    /// host memory, and mapped as long as this value lives.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] where any byte is not RAM.
    pub fn host(&self, start: u64, len: u64) -> Result<*mut u8, MemoryError> {
        let offset = self.locate(start, len)?;
        Ok(self.map.base.as_ptr().cast::<u8>().wrapping_add(offset))
    }

    /// Copies `data` to guest-physical `start`.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] where any byte is not RAM; nothing is written then.
    pub fn write(&self, start: u64, data: &[u8]) -> Result<(), MemoryError> {
        let offset = self.locate(start, data.len() as u64)?;
        // SAFETY: `locate` has checked that the target lies in the mapping. `data` does not
        // overlap it: it is either outside guest RAM, or came from `slice`, whose caller has
        // promised so.
        unsafe {
            let target = self.map.base.as_ptr().cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(data.as_ptr(), target, data.len());
        }
        Ok(())
    }

    /// Fills `data` from guest-physical `start`.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] where any byte is not RAM.
    pub fn read(&self, start: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let offset = self.locate(start, data.len() as u64)?;
        // SAFETY: as in `write`, the other way round.
        unsafe {
            let source = self.map.base.as_ptr().cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(source, data.as_mut_ptr(), data.len());
        }
        Ok(())
    }

    /// Whether its pages are a file's: the others are best written where they are mapped.
    #[must_use]
    pub fn is_file(&self) -> bool {
        matches!(self.backing, Backing::Own(_))
    }

    /// Copies `data` to `offset` of [`GuestMemory::bytes`]. A file's pages that were never touched are taken from the host
    /// without being cleared first, and are mapped when they are touched: for much content that is not looked at here.
    ///
    /// # Errors
    /// Beyond RAM; the kernel's refusal.
    pub fn fill(&self, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.check(offset, data.len() as u64)?;
        let Backing::Own(file) = &self.backing else {
            // SAFETY: inside the mapping, as was just checked; `data` is no guest memory, as in `write`.
            unsafe {
                let target = self.map.base.as_ptr().cast::<u8>().add(to_usize(offset));
                std::ptr::copy_nonoverlapping(data.as_ptr(), target, data.len());
            }
            return Ok(());
        };
        file.write_all_at(data, offset).map_err(|error| {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            os("pwrite")(errno)
        })
    }

    /// Whether these bytes of [`GuestMemory::bytes`] are there.
    fn check(&self, start: u64, len: u64) -> Result<(), MemoryError> {
        match start.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(MemoryError::Outside { start, len }),
        }
    }

    /// The bytes themselves, for the loader: no copy in between.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] where any byte is not RAM.
    ///
    /// # Safety
    /// As long as the slice lives nobody else touches those bytes: no vCPU runs, and no other
    /// slice overlaps it.
    // The exclusive borrow is the caller's promise: RAM is shared memory by nature.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: u64, len: u64) -> Result<&mut [u8], MemoryError> {
        let offset = self.locate(start, len)?;
        // SAFETY: inside the mapping (`locate`), initialised (zero pages), and exclusive by the
        // caller's promise.
        Ok(unsafe {
            let first = self.map.base.as_ptr().cast::<u8>().add(offset);
            std::slice::from_raw_parts_mut(first, to_usize(len))
        })
    }

    /// Gives whole pages back to the host: they read as zero afterwards.
    ///
    /// # Errors
    /// [`MemoryError::Outside`], or the kernel's refusal.
    pub fn discard(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            return Ok(());
        }
        let offset = self.locate(range.start, len)?;
        self.zero_bytes(offset as u64, len)
    }

    /// Whole pages become zero, and go back to the host: `len` bytes from `offset` on of
    /// [`GuestMemory::bytes`].
    ///
    /// # Errors
    /// Beyond RAM; the kernel's refusal.
    pub fn zero_bytes(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        self.check(offset, len)?;
        let fd = match &self.backing {
            Backing::Own(fd) => fd,
            Backing::Private => return self.zero(to_usize(offset), to_usize(len)),
            Backing::Anonymous(_) => {
                return self.advise(offset..offset + len, libc::MADV_DONTNEED);
            }
        };
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(MemoryError::Outside { start: offset, len });
        };
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(fd, flags, offset, len).map_err(os("fallocate"))
    }

    /// Puts zero pages in the place of a private file's. (Without them the file's old content
    /// would come back.)
    fn zero(&self, offset: usize, len: usize) -> Result<(), MemoryError> {
        let start = self.map.base.as_ptr().cast::<u8>().wrapping_add(offset);
        let (Some(length), Some(at)) = (NonZeroUsize::new(len), NonZeroUsize::new(start.addr()))
        else {
            return Ok(());
        };
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
        // SAFETY: whole pages inside this value's own mapping, which stays one block of addresses;
        // guest RAM is never the target of a reference, and may change at any time.
        match unsafe { mmap_anonymous(Some(at), length, prot, flags) } {
            Ok(_) => Ok(()),
            // A process has so many mappings and no more.
            Err(Errno::ENOMEM) => {
                // SAFETY: `locate` has checked that the bytes lie in the mapping.
                unsafe { std::ptr::write_bytes(start, 0, len) };
                Ok(())
            }
            Err(errno) => Err(os("mmap")(errno)),
        }
    }

    /// All RAM becomes zero (a reset).
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn clear(&self) -> Result<(), MemoryError> {
        self.discard(self.low())?;
        self.discard(self.high())
    }

    /// All of RAM in the host's memory, as it lies in a saved image: what is below the hole, then
    /// what is above.
    #[must_use]
    pub fn bytes(&self) -> (*mut u8, usize) {
        (self.map.base.as_ptr().cast(), self.map.len)
    }

    /// The next range of RAM, from `offset` on, that may hold something other than zeroes, as
    /// offsets in [`GuestMemory::bytes`]. Cheap where nothing was ever touched.
    #[must_use]
    pub fn next_content(&self, offset: u64) -> Option<Range<u64>> {
        let size = self.size();
        let fd = match &self.backing {
            Backing::Own(fd) => fd,
            Backing::Private => return (offset < size).then_some(offset..size),
            Backing::Anonymous(pages) => return self.next_there(pages, offset),
        };
        let seek = |from: u64, whence| {
            let from = i64::try_from(from).map_err(|_| Errno::EINVAL)?;
            let at = nix::unistd::lseek(fd, from, whence)?;
            u64::try_from(at).map_err(|_| Errno::EINVAL)
        };
        let start = match seek(offset, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return None,
            // Nothing is known: then everything is content.
            Err(_) => offset,
        };
        if start >= size {
            return None;
        }
        let end = seek(start, Whence::SeekHole).unwrap_or(size);
        Some(start..end.clamp(start, size))
    }

    /// The next range of anonymous RAM that has pages, in memory or swapped out (Documentation/admin-guide/mm/pagemap.rst).
    /// Where that can't be read everything may hold something.
    fn next_there(&self, pages: &File, offset: u64) -> Option<Range<u64>> {
        /// Present, or swapped out.
        const THERE: u64 = 1 << 63 | 1 << 62;
        /// Entries read at first, and at most: what is there is often in one piece, and often not.
        const FEW: usize = 64;
        const MANY: usize = 8192;
        let size = self.size();
        let first = self.map.base.as_ptr().addr() as u64 / PAGE;
        let last = size / PAGE;
        let (mut page, mut start) = (offset / PAGE, None);
        let mut entries = vec![0u8; FEW * 8];
        while page < last {
            let count = entries.len().min(to_usize(last - page) * 8);
            let part = entries.get_mut(..count).unwrap_or(&mut []);
            if let Err(error) = pages.read_exact_at(part, (first + page) * 8) {
                log::debug!("/proc/self/pagemap: {error}");
                return (offset < size).then_some(offset..size);
            }
            for entry in part.as_chunks::<8>().0 {
                match (start, u64::from_ne_bytes(*entry) & THERE != 0) {
                    (None, true) => start = Some(page * PAGE),
                    (Some(start), false) => return Some(start..page * PAGE),
                    _ => {}
                }
                page += 1;
            }
            if entries.len() < MANY * 8 {
                entries.resize(entries.len() * 2, 0);
            }
        }
        start.map(|start| start..size)
    }

    /// Much is about to come to this range of [`GuestMemory::bytes`]: huge pages are worth it there.
    pub fn expect(&self, range: Range<u64>) {
        if !matches!(self.backing, Backing::Anonymous(_))
            || self.check(range.start, range.end - range.start).is_err()
        {
            return;
        }
        // The host's huge pages, not the guest's, and only such as are all RAM.
        let base = self.map.base.as_ptr().addr() as u64;
        let start = ((base + range.start) / HUGE * HUGE).max(base) - base;
        let end = ((base + range.end).next_multiple_of(HUGE) - base).min(self.size());
        if let Err(error) = self.advise(start..end, libc::MADV_HUGEPAGE) {
            // A kernel without them.
            log::debug!("{error}");
        }
    }

    fn advise(&self, range: Range<u64>, advice: libc::c_int) -> Result<(), MemoryError> {
        self.check(range.start, range.end.saturating_sub(range.start))?;
        let at = self
            .map
            .base
            .as_ptr()
            .cast::<u8>()
            .wrapping_add(to_usize(range.start));
        // SAFETY: inside the mapping, as was just checked; guest RAM is never the target of a reference, and may change at
        // any time.
        let result = unsafe { libc::madvise(at.cast(), to_usize(range.end - range.start), advice) };
        match result {
            0 => Ok(()),
            _ => Err(os("madvise")(Errno::last())),
        }
    }

    /// Bytes of RAM that are really there.
    #[cfg(test)]
    pub fn resident(&self) -> u64 {
        let mut ranges = Vec::new();
        while let Some(range) = self.next_content(ranges.last().map_or(0, |r: &Range<u64>| r.end)) {
            ranges.push(range);
        }
        ranges.iter().map(|range| range.end - range.start).sum()
    }
}

/// RAM and swap of the host in bytes.
fn host_memory() -> Result<u64, MemoryError> {
    // SAFETY: sysinfo fills a struct of plain integers, for which zero bytes are valid.
    let info = unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        Errno::result(libc::sysinfo(&raw mut info)).map_err(os("sysinfo"))?;
        info
    };
    Ok(info
        .totalram
        .saturating_add(info.totalswap)
        .saturating_mul(u64::from(info.mem_unit)))
}

/// Memory for a while, given back to the host at once when dropped (a `Vec` may stay with the
/// allocator).
#[derive(Debug)]
pub struct Scratch {
    map: Option<Mapping>,
}

impl Scratch {
    /// `len` zeroed bytes.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn new(len: usize) -> Result<Self, MemoryError> {
        let Some(length) = NonZeroUsize::new(len) else {
            return Ok(Self { map: None });
        };
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address the kernel picks.
        let base = unsafe { mmap_anonymous(None, length, prot, flags) }.map_err(os("mmap"))?;
        Ok(Self {
            map: Some(Mapping { base, len }),
        })
    }
}

impl std::ops::Deref for Scratch {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.map {
            // SAFETY: the mapping is this value's own and borrowed shared as long as the slice.
            Some(map) => unsafe { std::slice::from_raw_parts(map.base.as_ptr().cast(), map.len) },
            None => &[],
        }
    }
}

impl std::ops::DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &self.map {
            // SAFETY: as above, borrowed exclusively.
            Some(map) => unsafe {
                std::slice::from_raw_parts_mut(map.base.as_ptr().cast(), map.len)
            },
            None => &mut [],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_was_written_and_discards_it() {
        let ram = GuestMemory::new(1 << 20).unwrap();
        ram.write(0xff0, &[7; 32]).unwrap();
        let mut back = [0; 32];
        ram.read(0xff0, &mut back).unwrap();
        assert_eq!(back, [7; 32]);
        ram.clear().unwrap();
        ram.read(0xff0, &mut back).unwrap();
        assert_eq!(back, [0; 32]);
    }

    #[test]
    fn content_that_came_is_found_and_given_back() {
        const CHUNK: u64 = 1 << 20;
        for ram in [
            GuestMemory::new(64 * CHUNK),
            GuestMemory::arriving(64 * CHUNK),
        ] {
            let ram = ram.unwrap();
            assert_eq!(ram.next_content(0), None);
            // A single page, and more than two huge pages.
            ram.fill(3 * PAGE, &vec![7; to_usize(PAGE)]).unwrap();
            ram.expect(20 * CHUNK..26 * CHUNK);
            let much = vec![9; to_usize(6 * CHUNK)];
            ram.fill(20 * CHUNK, &much).unwrap();
            assert_eq!(ram.next_content(0), Some(3 * PAGE..4 * PAGE));
            // Huge pages may hold more than was asked for.
            let found = ram.next_content(4 * PAGE).unwrap();
            assert!(
                (18 * CHUNK..=20 * CHUNK).contains(&found.start),
                "{found:?}"
            );
            assert!((26 * CHUNK..=28 * CHUNK).contains(&found.end), "{found:?}");
            assert_eq!(ram.next_content(found.end), None);
            assert_eq!(ram.next_content(23 * CHUNK), Some(23 * CHUNK..found.end));
            let mut back = [0; 3];
            ram.read(26 * CHUNK - 3, &mut back).unwrap();
            assert_eq!(back, [9; 3]);
            // Half of a huge page.
            ram.discard(22 * CHUNK..23 * CHUNK).unwrap();
            ram.read(22 * CHUNK, &mut back).unwrap();
            assert_eq!(back, [0; 3]);
            ram.read(23 * CHUNK, &mut back).unwrap();
            assert_eq!(back, [9; 3]);
            assert!(ram.fill(64 * CHUNK - 1, &[1; 2]).is_err());
            ram.expect(63 * CHUNK..70 * CHUNK);
            ram.clear().unwrap();
            assert_eq!(ram.next_content(0), None);
            ram.read(0, &mut back).unwrap();
            assert_eq!(back, [0; 3]);
        }
    }

    #[test]
    fn refuses_what_is_not_ram() {
        let ram = GuestMemory::new(1 << 20).unwrap();
        assert!(ram.write((1 << 20) - 1, &[0; 2]).is_err());
        assert!(ram.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(ram.read(HIGH_START, &mut [0; 1]).is_err());
        assert!(ram.discard(0..(1 << 21)).is_err());
    }

    #[test]
    fn goes_on_above_4_gib() {
        let size = LOW_MAX + (1 << 20);
        let ram = match GuestMemory::new(size) {
            Ok(ram) => ram,
            Err(MemoryError::TooLarge { .. }) => return println!("left out: needs 3 GiB of RAM"),
            Err(error) => panic!("{error}"),
        };
        assert_eq!(ram.high(), HIGH_START..HIGH_START + (1 << 20));
        ram.write(HIGH_START + 5, b"high").unwrap();
        let mut back = [0; 4];
        ram.read(HIGH_START + 5, &mut back).unwrap();
        assert_eq!(&back, b"high");
        assert!(
            ram.write(LOW_MAX - 1, &[1, 2]).is_err(),
            "crosses into the hole"
        );
        assert_eq!(ram.slots().len(), 2);
        let around = ram.places(LOW_MAX - PAGE, 3 * PAGE);
        assert_eq!(around, [(LOW_MAX - PAGE, PAGE), (HIGH_START, 2 * PAGE)]);
        assert_eq!(ram.places(PAGE, PAGE), [(PAGE, PAGE)]);
        assert_eq!(
            ram.places(LOW_MAX + PAGE, u64::MAX),
            [(HIGH_START + PAGE, (1 << 20) - PAGE)]
        );
        assert_eq!(ram.next_content(0), Some(LOW_MAX..LOW_MAX + PAGE));
        ram.clear().unwrap();
        assert_eq!(ram.next_content(0), None);
    }

    #[test]
    fn a_file_gives_its_content_and_takes_nothing() {
        use std::os::unix::fs::FileExt;

        let file = File::from(memfd_create(c"image", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(PAGE + (1 << 20)).unwrap();
        file.write_all_at(b"saved", PAGE + 0x5000).unwrap();
        file.write_all_at(b"too", PAGE + 0x7000).unwrap();
        let ram = GuestMemory::from_file(1 << 20, &file, PAGE).unwrap();
        let read = |at| {
            let mut back = [0; 5];
            ram.read(at, &mut back).unwrap();
            back
        };
        assert_eq!(&read(0x5000), b"saved");
        ram.write(0x5000, b"other").unwrap();
        ram.discard(0x7000..0x8000).unwrap();
        assert_eq!(
            read(0x7000),
            [0; 5],
            "discarded is zero, not what the file has"
        );
        assert_eq!(&read(0x5000), b"other");
        ram.clear().unwrap();
        assert_eq!(read(0x5000), [0; 5]);
        let mut back = [0; 5];
        file.read_exact_at(&mut back, PAGE + 0x5000).unwrap();
        assert_eq!(&back, b"saved");
    }

    #[test]
    fn refuses_odd_and_huge_sizes() {
        assert!(matches!(GuestMemory::new(0), Err(MemoryError::Size(0))));
        assert!(matches!(
            GuestMemory::new(4097),
            Err(MemoryError::Size(4097))
        ));
        assert!(matches!(
            GuestMemory::new(1 << 60),
            Err(MemoryError::TooLarge { .. })
        ));
    }
}
