//! For live block jobs: content copied up from behind an image that is in use, and what was
//! written meanwhile.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Qcow2;
use super::bits::Bits;
use super::entry::Entry;
use super::io::Plan;
use super::meta::{Meta, Place};
use crate::iovec::{self, AlignedBuf};
use crate::{Error, Image, Job};

/// What is copied at once, bytes.
const PIECE: u64 = 1 << 20;
/// What a bit of a [`Tracker`] stands for, bytes.
const GRANULARITY: u64 = 64 << 10;
/// How long requests that were in flight may take to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Records what is written to an image from when it was made until it is dropped.
#[derive(Debug)]
pub struct Tracker(Arc<Mutex<Bits>>);

/// An image's end of a [`Tracker`].
#[derive(Debug)]
pub struct Record(Weak<Mutex<Bits>>);

impl Meta {
    /// Tells whoever tracks writes; nobody is told who has gone.
    pub fn tell_trackers(&mut self, offset: u64, len: u64) {
        self.trackers.retain(|record| {
            let Some(bits) = record.0.upgrade() else {
                return false;
            };
            bits.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .set(offset / GRANULARITY, (offset + len).div_ceil(GRANULARITY));
            true
        });
    }
}

impl Qcow2 {
    /// Has writes recorded from now on.
    #[must_use]
    pub fn track(&self) -> Tracker {
        let bits = Arc::default();
        self.meta().trackers.push(Record(Arc::downgrade(&bits)));
        Tracker(bits)
    }

    /// What was written since the last call: ranges in bytes. Writes that were recorded before
    /// have reached the image when this returns, those in flight then come with the next call.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a request in flight does not end.
    pub fn tracked(&self, tracker: &Tracker) -> Result<Vec<(u64, u64)>, Error> {
        let bits = {
            // Nobody records while we look: whoever has, has come in.
            let _meta = self.meta();
            let mut bits = tracker.0.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *bits)
        };
        let runs = bits.runs();
        if !runs.is_empty() {
            let mark = self.grace.mark();
            let begun = Instant::now();
            loop {
                let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
                if self.grace.passed(mark) {
                    break;
                }
                drop(_one);
                if begun.elapsed() > PATIENCE {
                    return Err(Error::Invalid(format!(
                        "{}: requests in flight don't end",
                        self.file.name()
                    )));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let size = self.size();
        Ok(runs
            .into_iter()
            .map(|(from, to)| (from * GRANULARITY, (to * GRANULARITY).min(size)))
            .filter(|(from, to)| from < to)
            .collect())
    }

    /// Copies into the image what is decided between it and the image at `depth` behind it (none:
    /// in all of its chain), while it may be in use. Then it reads the same with that image (or
    /// nothing) right behind it: see [`Qcow2::set_backing`]. If it does not come to its end
    /// nothing is lost either; what was copied stays.
    ///
    /// # Errors
    /// [`Error::Cancelled`], the host's I/O.
    pub fn pull(&self, depth: Option<u32>, job: &Job) -> Result<(), Error> {
        self.check_writable()?;
        if depth.is_some() {
            // It gets another image behind it, which may be longer.
            self.explicit_zeroes();
        }
        job.more(self.size());
        let mut buffer = AlignedBuf::new(PIECE as usize)?;
        let mut at = 0;
        while at < self.size() {
            job.check()?;
            let left = (self.size() - at).min(PIECE);
            let own = self.own_extent(at, left)?;
            let mut len = own.len;
            let mut moved = 0;
            if !own.present {
                let below = self.extent(at, len)?;
                len = below.len;
                let wanted = match depth {
                    // Without anything behind it, what is not there reads as zeroes.
                    None => !below.zero,
                    // One that ends sooner, this one included, hides what is behind it, as zeroes do.
                    Some(depth) => below.depth < depth,
                };
                if wanted {
                    self.fill(at, len, below.zero, &mut buffer)?;
                    moved = len;
                }
            }
            at += len;
            job.advance(len, moved)?;
        }
        self.flush()
    }

    /// Copies up what is still not there of a range.
    fn fill(
        &self,
        offset: u64,
        len: u64,
        zero: bool,
        buffer: &mut AlignedBuf,
    ) -> Result<(), Error> {
        let geo = self.geo;
        let (bits, cluster) = (geo.cluster_bits, geo.cluster());
        let (mut at, end) = (offset, offset + len);
        let _whole = self.sectors.read().unwrap_or_else(PoisonError::into_inner);
        while at < end {
            let _stay = self.grace.enter();
            let guest = at >> bits;
            let mut meta = self.changing()?;
            while meta.any_busy(guest, guest + 1) {
                meta = self
                    .mapped
                    .wait(meta)
                    .unwrap_or_else(PoisonError::into_inner);
                meta.check_writable()?;
            }
            let mut map = Vec::new();
            meta.map(at, (end - at).min(PIECE), &mut map)?;
            let Some(first) = map.first().copied() else {
                break;
            };
            if first.place != Place::Absent {
                // Somebody has written it meanwhile.
                at += first.len;
                continue;
            }
            meta.own_table(guest, self.grace.mark())?;
            if zero
                && geo.version >= 3
                && at.is_multiple_of(cluster)
                && first.len >= cluster
                && meta.entry(guest)? == Entry::default()
            {
                meta.set_entry(guest, Entry::zero(&geo, 0))?;
                at += cluster;
                continue;
            }
            let last = (at + first.len - 1) >> bits;
            let Plan::New {
                host,
                clusters,
                keep,
                fresh,
            } = meta.plan_new(guest, last - guest + 1)?
            else {
                continue;
            };
            meta.busy.push(guest..guest + clusters);
            drop(meta);
            let count = first.len.min(((guest + clusters) << bits) - at);
            let mut mapped = false;
            let io = buffer.io(count as usize);
            let done = self
                .read_below(at, count, io)
                .and_then(|()| self.write_new(at, count, &[io], host, (keep, fresh), &mut mapped));
            let mut meta = self.meta();
            if done.is_err()
                && !keep
                && !mapped
                && let Err(error) = meta.release(host >> bits, clusters, false)
            {
                log::error!("{error}");
            }
            self.no_longer_busy(&mut meta, guest);
            done?;
            at += count;
        }
        Ok(())
    }

    fn read_below(&self, offset: u64, len: u64, io: crate::IoBuf) -> Result<(), Error> {
        let there = match &self.backing {
            Some(backing) => backing.size().saturating_sub(offset).min(len),
            None => 0,
        };
        iovec::zero(&[io.part(there as usize, (len - there) as usize)]);
        match &self.backing {
            Some(backing) if there > 0 => backing.read(offset, &[io.part(0, there as usize)]),
            _ => Ok(()),
        }
    }
}
