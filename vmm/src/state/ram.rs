//! Guest memory into a file and out of it, chunk by chunk, on several threads.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use vmm_api::saved::{CHUNK, ChunkSum, PAGE, runs, verify_chunk};

use super::job::Progress;
use crate::devices::lock;
use crate::memory::{GuestMemory, Scratch};
use crate::num::to_usize;

/// Threads at most: one checks and sums while another waits for the disk.
const THREADS: usize = 4;

/// Runs `each` for every chunk's number, on several threads, until all are done or one fails.
pub(super) fn for_chunks(
    chunks: u64,
    each: impl Fn(u64, &mut Scratch) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let next = AtomicU64::new(0);
    let failure: Mutex<Option<io::Error>> = Mutex::new(None);
    let work = || {
        let mut buffer = match Scratch::new(to_usize(CHUNK)) {
            Ok(buffer) => buffer,
            Err(error) => {
                lock(&failure).get_or_insert(io::Error::other(error));
                return;
            }
        };
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= chunks || lock(&failure).is_some() {
                return;
            }
            if let Err(error) = each(index, &mut buffer) {
                lock(&failure).get_or_insert(error);
            }
        }
    };
    let parallel = std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS));
    std::thread::scope(|scope| {
        for _ in 1..parallel {
            // Without more threads this one does it all.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    failure
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .map_or(Ok(()), Err)
}

/// Where RAM has content, so that the rest need not be looked at.
struct Content<'a> {
    memory: &'a GuestMemory,
    /// As last asked: from the first offset on there is nothing before the range.
    known: Mutex<(u64, Range<u64>)>,
}

impl Content<'_> {
    /// Whether anything between the two offsets may be other than zero.
    fn between(&self, start: u64, end: u64) -> bool {
        let mut known = lock(&self.known);
        let (asked, range) = &*known;
        if range.start < end && start < range.end {
            return true;
        }
        if *asked <= start && end <= range.start {
            return false;
        }
        let range = self
            .memory
            .next_content(start)
            .unwrap_or(u64::MAX..u64::MAX);
        let some = range.start < end;
        *known = (start, range);
        some
    }
}

/// Writes all of `memory` to `offset` of `file`, leaving out what is zero; the checksum of each
/// chunk. `moving`: the guest runs meanwhile.
///
/// # Errors
/// The system's refusal, or the job was given up.
pub fn write(
    memory: &GuestMemory,
    file: &File,
    offset: u64,
    progress: &Progress,
    moving: bool,
) -> io::Result<Vec<ChunkSum>> {
    let size = memory.size();
    let chunks = size.div_ceil(CHUNK);
    let sums: Mutex<Vec<ChunkSum>> = Mutex::new(vec![ChunkSum::default(); to_usize(chunks)]);
    let content = Content {
        memory,
        known: Mutex::new((0, 0..0)),
    };
    for_chunks(chunks, |index, buffer| {
        progress.check()?;
        if index == chunks / 2 {
            crate::killpoint::killpoint("vmm.ram-half");
        }
        let at = index * CHUNK;
        let len = (size - at).min(CHUNK);
        if !content.between(at, at + len) {
            progress.add(len, len);
            return Ok(());
        }
        let start = memory.bytes().0.wrapping_add(to_usize(at));
        let len = to_usize(len);
        let bytes: &[u8] = if moving {
            // SAFETY: `len` bytes inside the mapping of guest RAM, which lives as long as `memory`,
            // into a buffer of ours that is as long. The guest may write them meanwhile: each byte
            // is the old one or the new one.
            unsafe { std::ptr::copy_nonoverlapping(start, buffer.as_mut_ptr(), len) };
            &buffer[..len]
        } else {
            // SAFETY: as above; and the machine stands still: nothing writes guest RAM until the
            // job, and this slice with it, has ended.
            unsafe { std::slice::from_raw_parts(start, len) }
        };
        let mut sum = ChunkSum::default();
        let mut written = 0;
        for (first, pages) in runs(bytes) {
            sum.add(first, pages);
            file.write_all_at(pages, offset + at + u64::from(first) * PAGE)?;
            written += pages.len();
        }
        if let Some(place) = lock(&sums).get_mut(to_usize(index)) {
            *place = sum;
        }
        progress.add(len as u64, (len - written) as u64);
        Ok(())
    })?;
    Ok(sums
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// Whether a sparse file has anything between the two offsets; where that can't be told, yes.
pub(super) fn has_data(file: &File, start: u64, end: u64) -> bool {
    let Ok(from) = i64::try_from(start) else {
        return true;
    };
    match lseek(file, from, Whence::SeekData) {
        Ok(at) => u64::try_from(at).is_ok_and(|at| at < end),
        Err(errno) => errno != Errno::ENXIO,
    }
}

/// Reads guest memory from `offset` of `file` into fresh `memory`, and checks it.
///
/// # Errors
/// The system's refusal; what is damaged.
pub fn read(memory: &GuestMemory, file: &File, offset: u64, sums: &[u32]) -> io::Result<()> {
    let size = memory.size();
    for_chunks(size.div_ceil(CHUNK), |index, _| {
        let at = index * CHUNK;
        let len = to_usize((size - at).min(CHUNK));
        let sum = sums.get(to_usize(index)).copied().unwrap_or_default();
        let from = offset + at;
        if !has_data(file, from, from + len as u64) {
            return verify_chunk(to_usize(index), &[], sum).map_err(io::Error::other);
        }
        // SAFETY: `len` bytes inside the mapping of guest RAM, which lives as long as `memory`; no
        // guest runs yet, and no other thread has this chunk.
        let bytes = unsafe {
            let start = memory.bytes().0.wrapping_add(to_usize(at));
            std::slice::from_raw_parts_mut(start, len)
        };
        file.read_exact_at(bytes, from)?;
        verify_chunk(to_usize(index), bytes, sum).map_err(io::Error::other)
    })
}

/// Checks guest memory at `offset` of `file` without keeping it; `go_on` is asked now and then.
///
/// # Errors
/// The system's refusal; what is damaged.
pub fn verify(
    file: &File,
    offset: u64,
    size: u64,
    sums: &[u32],
    go_on: impl Fn() -> bool,
) -> io::Result<()> {
    let mut buffer = Scratch::new(to_usize(CHUNK)).map_err(io::Error::other)?;
    for (index, sum) in sums.iter().enumerate() {
        if !go_on() {
            return Ok(());
        }
        let at = index as u64 * CHUNK;
        let len = to_usize(size.saturating_sub(at).min(CHUNK));
        let from = offset + at;
        let bytes = if has_data(file, from, from + len as u64) {
            file.read_exact_at(&mut buffer[..len], from)?;
            &buffer[..len]
        } else {
            &[]
        };
        verify_chunk(index, bytes, *sum).map_err(io::Error::other)?;
    }
    Ok(())
}

/// While this lives, a file that was opened to go past the page cache does not: what is not in whole
/// pages could not be read or written otherwise.
#[derive(Debug)]
pub struct Cached<'a> {
    file: &'a File,
    flags: Option<i32>,
}

impl<'a> Cached<'a> {
    /// Through the cache for now.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn new(file: &'a File) -> io::Result<Self> {
        // SAFETY: F_GETFL and F_SETFL take and give numbers.
        let flags = Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
        if flags & libc::O_DIRECT == 0 {
            return Ok(Self { file, flags: None });
        }
        set_flags(file, flags & !libc::O_DIRECT)?;
        Ok(Self {
            file,
            flags: Some(flags),
        })
    }
}

fn set_flags(file: &File, flags: i32) -> io::Result<()> {
    // SAFETY: as above.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) })?;
    Ok(())
}

impl Drop for Cached<'_> {
    fn drop(&mut self) {
        if let Some(flags) = self.flags
            && let Err(error) = set_flags(self.file, flags)
        {
            log::warn!("O_DIRECT: {error}");
        }
    }
}
