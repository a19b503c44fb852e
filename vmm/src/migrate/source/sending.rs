//! Sending: pages and blocks over all connections.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use images::iovec::AlignedBuf;
use vmm_api::migrate::{self, HEADER, Header, Kind, LAST_ROUND, StreamError, Verdict};
use vmm_api::saved::{CHUNK, PAGE};

use super::Source;
use super::rounds::Dirty;
use super::tuning::Tuning;
use crate::devices::lock;
use crate::memory::{HUGE, Scratch};
use crate::migrate::disks::{self, WORD};
use crate::migrate::link::{Link, PARTS_MOST, part};
use crate::num::to_usize;
use crate::state::dirty::runs;
use crate::state::job::Progress;

/// A connection that has nothing to say says so this often.
const ALIVE: Duration = Duration::from_secs(5);

/// The connections of a round that are still at it.
struct Busy {
    number: Mutex<usize>,
    changed: Condvar,
}

impl Busy {
    /// Done with the own part: says now and then that the connection is alive, until all are.
    fn wait(&self, link: &Link, progress: &Progress) -> Result<(), StreamError> {
        let mut number = lock(&self.number);
        *number -= 1;
        self.changed.notify_all();
        while *number > 0 {
            let (after, timeout) = self
                .changed
                .wait_timeout(number, ALIVE)
                .unwrap_or_else(PoisonError::into_inner);
            number = after;
            if timeout.timed_out() {
                progress.check()?;
                migrate::send(&mut &*link, Kind::Alive, &[])?;
            }
        }
        Ok(())
    }

    /// The own part has failed.
    fn leave(&self) {
        let mut number = lock(&self.number);
        *number = number.saturating_sub(1);
        self.changed.notify_all();
    }
}

/// Pages whose beginnings are fetched while others are looked at.
const FETCHED_AHEAD: u64 = 16;

/// Has the processor fetch what is there, if anything is.
fn fetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which does not access memory as far as the program sees: any address is allowed.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Whether a page is all zero. The guest may write it meanwhile: then the dirty log has it.
fn is_zero(page: *const u8) -> bool {
    let words = page.cast::<u64>();
    (0..to_usize(PAGE / 8)).all(|n| {
        // SAFETY: a whole page of guest memory, aligned, that lives as long as the caller's
        // `GuestMemory`; volatile, as others may write it at any time.
        unsafe { words.add(n).read_volatile() == 0 }
    })
}

impl Source {
    pub(super) fn count_sent(&self, bytes: u64) {
        self.tuning.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Sends this over all connections. `paced`: no faster than is wished.
    pub(super) fn round(
        &self,
        dirty: &Dirty,
        number: u32,
        progress: &Progress,
        paced: bool,
    ) -> Result<(), StreamError> {
        self.tell_left(dirty);
        let pace = Pace {
            began: Instant::now(),
            before: self.tuning.sent.load(Ordering::Relaxed),
            on: paced,
        };
        let all = self.links.len();
        let busy = Busy {
            number: Mutex::new(all),
            changed: Condvar::new(),
        };
        std::thread::scope(|scope| -> Result<(), StreamError> {
            let mut others = Vec::new();
            for (index, link) in self.links.iter().enumerate().skip(1) {
                let (pace, busy) = (&pace, &busy);
                let thread = std::thread::Builder::new()
                    .name("outgoing".into())
                    .spawn_scoped(scope, move || {
                        let part = (index, all);
                        self.part(link, dirty, part, number, progress, pace, busy)
                    })?;
                others.push(thread);
            }
            let own = self.part(
                self.main()?,
                dirty,
                (0, all),
                number,
                progress,
                &pace,
                &busy,
            );
            for thread in others {
                let ended = |_| StreamError::Protocol("a sending thread panicked".to_owned());
                thread.join().map_err(ended)??;
            }
            own
        })
    }

    /// One connection's part of a round; done when all have done theirs.
    #[expect(clippy::too_many_arguments, reason = "what the parts of a round share")]
    fn part(
        &self,
        link: &Link,
        dirty: &Dirty,
        which: (usize, usize),
        number: u32,
        progress: &Progress,
        pace: &Pace,
        busy: &Busy,
    ) -> Result<(), StreamError> {
        let sent = self
            .share_disks(link, dirty, which, progress, pace)
            .and_then(|()| self.share(link, &dirty.pages, which, number, progress, pace));
        match sent {
            // Nobody waits for others while the guest stands still.
            Ok(()) if number != LAST_ROUND => busy.wait(link, progress),
            sent => {
                busy.leave();
                sent
            }
        }
    }

    /// One connection's part of the disks.
    fn share_disks(
        &self,
        link: &Link,
        dirty: &Dirty,
        (index, all): (usize, usize),
        progress: &Progress,
        pace: &Pace,
    ) -> Result<(), StreamError> {
        let mut buffer = None;
        for (number, (disk, blocks)) in (0u32..).zip(self.disks.iter().zip(&dirty.disks)) {
            for (word, blocks) in blocks.iter().enumerate() {
                if *blocks == 0 || word % all != index {
                    continue;
                }
                let buffer = match &mut buffer {
                    Some(buffer) => buffer,
                    none => {
                        none.insert(AlignedBuf::new(to_usize(CHUNK)).map_err(io::Error::other)?)
                    }
                };
                for (first, count) in runs(&[*blocks]) {
                    if index == 0 {
                        self.listen(link)?;
                    }
                    progress.check()?;
                    let start = word as u64 * WORD + first * disks::BLOCK;
                    let len = count * disks::BLOCK;
                    let sent = disk.send(link, number, start, len, buffer)?;
                    self.count_sent(sent);
                    self.tuning.disk_sent.fetch_add(len, Ordering::Relaxed);
                    self.tuning.disk_left.fetch_sub(len, Ordering::Relaxed);
                    pace.wait(&self.tuning, progress, link)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the other side has said no meanwhile, on the connection that leads.
    pub(super) fn listen(&self, mut link: &Link) -> Result<(), StreamError> {
        if link.has_said() {
            let header = Header::read(&mut link)?;
            let body = header.body(&mut link)?;
            match header.kind {
                Kind::CodeTaken => {}
                Kind::Verdict => migrate::parse::<Verdict>(&body)?.into_result()?,
                kind => {
                    let text = format!("{kind:?} in place of a verdict");
                    return Err(StreamError::Protocol(text));
                }
            }
        }
        Ok(())
    }

    /// One connection's part of the pages: every so-many-th pair of chunks, which is a huge page on the other side.
    fn share(
        &self,
        link: &Link,
        dirty: &[u64],
        (index, all): (usize, usize),
        number: u32,
        progress: &Progress,
        pace: &Pace,
    ) -> Result<(), StreamError> {
        const WORDS: usize = (CHUNK / PAGE / 64) as usize;
        const UNIT: usize = (HUGE / CHUNK) as usize;
        let mut packer = match self.options.zstd_level {
            Some(level) => Some(Packer::new(level)?),
            None => None,
        };
        for (chunk, words) in dirty.chunks(WORDS).enumerate() {
            if chunk / UNIT % all != index || words.iter().all(|word| *word == 0) {
                continue;
            }
            progress.check()?;
            if index == 0 {
                self.listen(link)?;
            }
            let at = chunk as u64 * CHUNK;
            match &mut packer {
                Some(packer) => self.send_packed(link, at, words, packer)?,
                None => self.send_plain(link, at, words)?,
            }
            let pages: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
            self.tuning.left.fetch_sub(pages * PAGE, Ordering::Relaxed);
            if number == 0 {
                progress.add(CHUNK.min(self.memory.size() - at), 0);
            }
            pace.wait(&self.tuning, progress, link)?;
        }
        migrate::send(&mut &*link, Kind::Round, &number.to_le_bytes())
    }

    /// Splits dirty pages of a chunk at `at` into those with content and those without.
    fn sorted(&self, at: u64, words: &[u64]) -> Vec<(u64, u64, bool)> {
        let base = self.memory.bytes().0.wrapping_add(to_usize(at));
        let mut sorted: Vec<(u64, u64, bool)> = Vec::new();
        for (first, len) in runs(words) {
            for page in first..first + len {
                // Most pages are told by their first bytes, which have to come from memory.
                fetch(base.wrapping_add(to_usize((page + FETCHED_AHEAD) * PAGE)));
                let zero = is_zero(base.wrapping_add(to_usize(page * PAGE)));
                match sorted.last_mut() {
                    Some((start, pages, kind)) if *kind == zero && *start + *pages == page => {
                        *pages += 1;
                    }
                    _ => sorted.push((page, 1, zero)),
                }
            }
        }
        sorted
    }

    /// Straight from guest memory, a chunk in one call.
    fn send_plain(&self, link: &Link, at: u64, words: &[u64]) -> Result<(), StreamError> {
        const FRAME: usize = HEADER + 16;
        let base = self.memory.bytes().0;
        let sorted = self.sorted(at, words);
        for group in sorted.chunks(PARTS_MOST / 2) {
            let mut heads = Vec::with_capacity(group.len());
            for (first, pages, zero) in group {
                let (start, len) = (at + first * PAGE, pages * PAGE);
                let mut head = [0u8; FRAME];
                let (kind, body) = if *zero {
                    (Kind::Zero, 16)
                } else {
                    (Kind::Pages, to_usize(8 + len))
                };
                head[..HEADER].copy_from_slice(&Header::new(kind, body)?.encode());
                head[HEADER..HEADER + 8].copy_from_slice(&start.to_le_bytes());
                head[HEADER + 8..].copy_from_slice(&len.to_le_bytes());
                heads.push(head);
            }
            let mut parts = Vec::with_capacity(2 * group.len());
            let mut bytes = 0;
            for ((first, pages, zero), head) in group.iter().zip(&heads) {
                if *zero {
                    parts.push(part(head.as_ptr(), FRAME as u64));
                    bytes += FRAME as u64;
                    continue;
                }
                let (start, len) = (at + first * PAGE, pages * PAGE);
                parts.push(part(head.as_ptr(), HEADER as u64 + 8));
                parts.push(part(base.wrapping_add(to_usize(start)), len));
                bytes += HEADER as u64 + 8 + len;
                self.tuning.pages.fetch_add(*pages, Ordering::Relaxed);
            }
            // SAFETY: heads, which outlive the call and are short, and ranges of guest memory, which is mapped as long as
            // `self.memory` lives; what is written there meanwhile is in the dirty log.
            unsafe { link.send_memory(&mut parts)? };
            self.count_sent(bytes);
        }
        Ok(())
    }

    fn send_packed(
        &self,
        link: &Link,
        at: u64,
        words: &[u64],
        packer: &mut Packer,
    ) -> Result<(), StreamError> {
        let base = self.memory.bytes().0;
        for (first, pages, zero) in self.sorted(at, words) {
            let (start, len) = (at + first * PAGE, pages * PAGE);
            let mut body = start.to_le_bytes().to_vec();
            if zero {
                body.extend(len.to_le_bytes());
                migrate::send(&mut &*link, Kind::Zero, &body)?;
                self.count_sent((HEADER + body.len()) as u64);
                continue;
            }
            self.tuning.pages.fetch_add(pages, Ordering::Relaxed);
            let from = base.wrapping_add(to_usize(start));
            // SAFETY: a range of guest memory, which outlives the call.
            let packed = unsafe { packer.pack(from, to_usize(len)) };
            let kind = match packed {
                Some(packed) => {
                    let len = u32::try_from(len).unwrap_or(u32::MAX);
                    body.extend(len.to_le_bytes());
                    body.extend(packed);
                    Kind::Packed
                }
                None => {
                    body.extend(packer.plain(to_usize(len)));
                    Kind::Pages
                }
            };
            migrate::send(&mut &*link, kind, &body)?;
            self.count_sent((HEADER + body.len()) as u64);
        }
        Ok(())
    }
}

/// Keeps to a rate.
struct Pace {
    began: Instant,
    before: u64,
    on: bool,
}

impl Pace {
    fn wait(&self, tuning: &Tuning, progress: &Progress, link: &Link) -> io::Result<()> {
        const STEP: Duration = Duration::from_millis(50);
        let mut told = Instant::now();
        loop {
            let rate = tuning.bandwidth.load(Ordering::Relaxed);
            if !self.on || rate == 0 {
                return Ok(());
            }
            let sent = tuning.sent.load(Ordering::Relaxed) - self.before;
            let due = Duration::from_secs_f64(sent as f64 / rate as f64);
            let Some(ahead) = due.checked_sub(self.began.elapsed()) else {
                return Ok(());
            };
            progress.check()?;
            if link.is_closed() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if told.elapsed() >= ALIVE {
                told = Instant::now();
                migrate::send(&mut &*link, Kind::Alive, &[]).map_err(io::Error::other)?;
            }
            std::thread::sleep(ahead.min(STEP));
        }
    }
}

/// Packs guest memory.
struct Packer {
    copy: Scratch,
    out: Scratch,
    context: zstd_safe::CCtx<'static>,
    level: i32,
}

impl Packer {
    fn new(level: i32) -> Result<Self, StreamError> {
        let len = to_usize(CHUNK);
        Ok(Self {
            copy: Scratch::new(len).map_err(io::Error::other)?,
            // What does not get smaller is not packed.
            out: Scratch::new(len).map_err(io::Error::other)?,
            context: zstd_safe::CCtx::create(),
            level,
        })
    }

    /// The packed form, if it is shorter. A copy is packed: the guest may write meanwhile.
    ///
    /// # Safety
    /// `len` bytes from `from` on can be read.
    unsafe fn pack(&mut self, from: *const u8, len: usize) -> Option<&[u8]> {
        let copy = self.copy.get_mut(..len)?;
        // SAFETY: the caller's promise; `copy` is ours and as long.
        unsafe { std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), len) };
        let out = self.out.get_mut(..len)?;
        // Too large for the buffer: it does not get smaller.
        let packed = self.context.compress(out, copy, self.level).ok()?;
        self.out
            .get(..packed)
            .filter(|packed| packed.len() + 4 < len)
    }

    /// What was to be packed last.
    fn plain(&self, len: usize) -> &[u8] {
        self.copy.get(..len).unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;

    #[test]
    fn zero_pages_are_seen() {
        let memory = GuestMemory::new(8 * PAGE).unwrap();
        let (base, _) = memory.bytes();
        assert!(is_zero(base));
        memory.write(PAGE - 1, &[1]).unwrap();
        assert!(!is_zero(base));
        assert!(is_zero(base.wrapping_add(to_usize(PAGE))));
    }
}
