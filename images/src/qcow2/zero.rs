//! Writing zeroes and discarding, by changing the tables where that is possible.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::entry::{COPIED, Entry, State};
use super::meta::{Meta, Place};
use crate::iovec::AlignedBuf;
use crate::{Error, Image};

/// Zeroes that are written plainly at once, bytes.
const PLAIN: u64 = 1 << 20;
/// After so many freed pieces they are made use of, flush or no flush.
const FREED_MOST: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// The range must read as zeroes.
    Zero { unmap: bool },
    /// The range may read as zeroes, and should use no space.
    Discard,
}

/// What becomes of an entry.
enum Change {
    Keep,
    Set(Entry),
    /// The tables can't say it: zeroes must be written.
    Write,
}

impl Qcow2 {
    pub(super) fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        self.check_writable()?;
        let end = offset + len;
        if self.geo.raw && self.cipher.is_some() {
            return self.write_zeroes_plainly(offset, end);
        }
        if self.geo.raw {
            return self.zero_raw(offset, end, unmap);
        }
        let (first, last) = self.inner(offset, end, false);
        if first >= last {
            return self.zero_plainly(offset, end);
        }
        self.zero_plainly(offset, first)?;
        self.change_range(first, last, Wish::Zero { unmap })?;
        self.zero_plainly(last.min(end), end)
    }

    pub(super) fn discard_range(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check_writable()?;
        let end = offset + len;
        if self.geo.raw && self.cipher.is_some() {
            // A hole would be decrypted to anything.
            return Ok(());
        }
        if self.geo.raw {
            let _stay = self.grace.enter();
            self.changing()?.record(offset, len);
            return self.data.punch(offset, len).map(|_| ());
        }
        let (first, last) = self.inner(offset, end, true);
        if first < last {
            self.change_range(first, last, Wish::Discard)
        } else {
            Ok(())
        }
    }

    /// Up to where the tables have to say of zeroes that they are zeroes.
    fn below(&self) -> u64 {
        if self.explicit.load(Ordering::Relaxed) {
            return u64::MAX;
        }
        self.backing.as_ref().map_or(0, |backing| backing.size())
    }

    /// The tables say of all zeroes that are written from now on that they are zeroes, even where
    /// nothing is behind the image: it is about to get another backing file.
    pub(crate) fn explicit_zeroes(&self) {
        self.explicit.store(true, Ordering::Relaxed);
    }

    /// The whole (sub)clusters in a range; what ends with the image has its last one whole.
    fn inner(&self, offset: u64, end: u64, clusters: bool) -> (u64, u64) {
        let unit = if clusters {
            self.geo.cluster()
        } else {
            1 << self.geo.sub_bits
        };
        let last = if end == self.size() {
            end.next_multiple_of(self.geo.cluster())
        } else {
            end & !(unit - 1)
        };
        (offset.next_multiple_of(unit), last)
    }

    /// The data file by itself has to read as zeroes too.
    fn zero_raw(&self, offset: u64, end: u64, unmap: bool) -> Result<(), Error> {
        let mut at = offset;
        while at < end {
            let _stay = self.grace.enter();
            let mut meta = self.changing()?;
            let run = meta.own_run(at, end - at)?;
            meta.record(at, run.map_or(0, |(_, len)| len));
            drop(meta);
            match run {
                Some((host, len)) => {
                    self.data.zero(host, len, unmap)?;
                    at += len;
                }
                None => {
                    let stop = (at + 1).next_multiple_of(self.geo.cluster()).min(end);
                    self.write_zeroes_plainly(at, stop)?;
                    at = stop;
                }
            }
        }
        Ok(())
    }

    /// Zeroes for a range that the tables can't describe, unless it reads as zeroes already.
    fn zero_plainly(&self, offset: u64, end: u64) -> Result<(), Error> {
        if offset >= end {
            return Ok(());
        }
        let below = self.below();
        let mut map = Vec::new();
        self.meta().map(offset, end - offset, &mut map)?;
        for segment in map {
            let zero = match segment.place {
                Place::Zero => true,
                Place::Absent => segment.start >= below,
                _ => false,
            };
            if !zero {
                self.write_zeroes_plainly(segment.start, segment.start + segment.len)?;
            }
        }
        Ok(())
    }

    pub(super) fn write_zeroes_plainly(&self, offset: u64, end: u64) -> Result<(), Error> {
        let end = end.min(self.size());
        let mut zeroes = AlignedBuf::new((end.saturating_sub(offset)).min(PLAIN) as usize)?;
        let mut at = offset;
        while at < end {
            let count = (end - at).min(PLAIN);
            let io = zeroes.io(count as usize);
            self.write_mapped(at, count, &[io])?;
            at += count;
        }
        Ok(())
    }

    /// Changes the entries of whole (sub)clusters.
    fn change_range(&self, first: u64, end: u64, wish: Wish) -> Result<(), Error> {
        let geo = self.geo;
        let below = self.below();
        let mut at = first;
        let mut many = false;
        while at < end {
            let mut meta = self.changing()?;
            let guest = at >> geo.cluster_bits;
            let in_slice = geo.slice_entries() - geo.slice_of(guest).1 as u64;
            let stop = end.min((guest + in_slice) << geo.cluster_bits);
            while meta.any_busy(guest, ((stop - 1) >> geo.cluster_bits) + 1) {
                meta = self
                    .mapped
                    .wait(meta)
                    .unwrap_or_else(PoisonError::into_inner);
                meta.check_writable()?;
            }
            let mark = self.grace.mark();
            let mut plain = None;
            meta.record(at, stop.min(self.size()).saturating_sub(at));
            while at < stop {
                let guest = at >> geo.cluster_bits;
                let next = ((guest + 1) << geo.cluster_bits).min(stop);
                let old = meta.entry(guest)?;
                let behind = (guest << geo.cluster_bits) < below;
                match meta.changed(old, (at, next), wish, behind) {
                    Change::Keep => {}
                    Change::Write => {
                        plain = Some((at, next));
                        at = next;
                        break;
                    }
                    Change::Set(new) => {
                        meta.own_table(guest, mark)?;
                        meta.set_entry(guest, new)?;
                        let (had, has) = (old.host(&geo), new.host(&geo));
                        if old.is_compressed() || had != has {
                            meta.drop_entry(old, true, mark);
                        }
                        if let (true, Some(host), None) =
                            (geo.external && self.cipher.is_none(), had, has)
                        {
                            // Reads as zeroes, old table or new.
                            self.data.punch(host, next - at)?;
                        }
                    }
                }
                at = next;
            }
            many |= meta.freed.len() > FREED_MOST;
            drop(meta);
            if let Some((from, to)) = plain {
                self.write_zeroes_plainly(from, to)?;
            }
        }
        if many { self.flush() } else { Ok(()) }
    }
}

impl Meta {
    fn changed(&self, old: Entry, (from, to): (u64, u64), wish: Wish, behind: bool) -> Change {
        let geo = &self.geo;
        let cluster = geo.cluster();
        let subs = if geo.extended { 32 } else { 1 };
        let low = ((from & (cluster - 1)) >> geo.sub_bits) as u32;
        let high = low + ((to - from) >> geo.sub_bits) as u32;
        let whole = high - low == subs;
        let is = |state| (low..high).all(|sub| old.state(geo, sub) == state);
        if is(State::Absent) && !behind && (!whole || old.host(geo).is_none()) {
            return Change::Keep;
        }
        if !whole {
            let mask = ((1_u64 << high) - (1 << low)) & 0xffff_ffff;
            return match wish {
                Wish::Discard => Change::Keep,
                Wish::Zero { .. } if old.is_compressed() => Change::Write,
                Wish::Zero { .. } => Change::Set(Entry {
                    raw: old.raw,
                    bits: old.bits & !mask | mask << 32,
                }),
            };
        }
        if geo.version < 3 {
            return match wish {
                _ if !behind => Change::Set(Entry::default()),
                Wish::Discard => Change::Keep,
                Wish::Zero { .. } => Change::Write,
            };
        }
        if wish == Wish::Discard && is(State::Absent) {
            // Nothing to give back, and the backing file's content is as good as zeroes.
            return Change::Keep;
        }
        let keep = wish == Wish::Zero { unmap: false } && old.is_own() && old.host(geo).is_some();
        let new = Entry::zero(
            geo,
            if keep {
                old.host(geo).unwrap_or_default() | COPIED
            } else {
                0
            },
        );
        if new == old {
            Change::Keep
        } else {
            Change::Set(new)
        }
    }
}
