//! Reading and writing guest data. No lock is held while data moves.

use std::ops::Range;
use std::sync::PoisonError;

use super::Qcow2;
use super::entry::{COPIED, Entry, State, ZERO};
use super::meta::{Meta, Place, Segment};
use crate::grace::Mark;
use crate::iovec::AlignedBuf;
use crate::{Error, Image, IoBuf, iovec};

/// The most that moves through a buffer of ours at once, bytes.
const BOUNCE: u64 = 1 << 20;
/// The most that is allocated at once, bytes.
const RUN: u64 = 16 << 20;

/// What a write does with the clusters it begins with.
pub(super) enum Plan {
    /// They are there: bytes at this host offset, so many.
    Over(u64, u64),
    /// So many guest clusters, from the first, are busy with us now and go to this host offset.
    /// `keep`: the host clusters were theirs before.
    New {
        host: u64,
        clusters: u64,
        keep: bool,
        fresh: bool,
    },
}

impl Meta {
    /// How many bytes at guest `offset` can be written over where they are, at most `len`, and
    /// where.
    pub fn own_run(&mut self, offset: u64, len: u64) -> Result<Option<(u64, u64)>, Error> {
        let geo = self.geo;
        let (mut at, end) = (offset, offset + len);
        let mut start = None;
        while at < end {
            let guest = at >> geo.cluster_bits;
            let most = ((end - 1) >> geo.cluster_bits) - guest + 1;
            let mut more = true;
            let before = at;
            let mut bad = false;
            self.entries(guest, most, |guest, entry| {
                more = false;
                bad = entry.problem(&geo).is_some();
                let (true, Some(host)) = (entry.is_own() && !bad, entry.host(&geo)) else {
                    return false;
                };
                let base = guest << geo.cluster_bits;
                let host = host + (at - base);
                if *start.get_or_insert(host) + (at - offset) != host {
                    return false;
                }
                let stop = (base + geo.cluster()).min(end);
                while at < stop {
                    let sub = (at - base) >> geo.sub_bits;
                    if entry.state(&geo, sub as u32) != State::Data {
                        return false;
                    }
                    at = (base + ((sub + 1) << geo.sub_bits)).min(stop);
                }
                more = true;
                true
            })?;
            if bad {
                self.entry(at >> geo.cluster_bits)?;
            }
            if !more || at == before {
                break;
            }
        }
        let Some(host) = start.filter(|_| at > offset) else {
            return Ok(None);
        };
        if !geo.external {
            let bits = geo.cluster_bits;
            for cluster in host >> bits..=(host + (at - offset) - 1) >> bits {
                if self.fixed.contains(&cluster) {
                    return Err(self.corrupt(format!("guest data at {offset:#x} lies on metadata")));
                }
            }
            if !self.in_file((host + (at - offset) - 1) & !(geo.cluster() - 1))? {
                return Err(self.corrupt(format!(
                    "guest data at {offset:#x} lies past the file's end"
                )));
            }
        }
        Ok(Some((host, at - offset)))
    }

    fn is_busy(&self, guest: u64) -> bool {
        self.busy.iter().any(|range| range.contains(&guest))
    }

    /// Whether somebody is about to map any of these guest clusters.
    pub fn any_busy(&self, first: u64, end: u64) -> bool {
        self.busy
            .iter()
            .any(|range| range.start < end && first < range.end)
    }

    /// How many of the guest clusters from `guest` on, at most `most`, can be given a place at once,
    /// none of them being all there or busy; and where they are if they have places of their own.
    pub(super) fn run_new(&mut self, guest: u64, most: u64) -> Result<(Option<u64>, u64), Error> {
        let geo = self.geo;
        let first = self.entry(guest)?;
        let keep = if geo.external {
            None
        } else {
            first.host(&geo).filter(|_| first.is_own())
        };
        let mut clusters = 0;
        let mut bad = None;
        let busy = std::mem::take(&mut self.busy);
        let found = self.entries(guest, most, |at, entry| {
            if entry.problem(&geo).is_some() {
                bad = Some(at);
                return false;
            }
            let fits = match keep {
                Some(host) => {
                    entry.is_own()
                        && entry.host(&geo) == Some(host + (clusters << geo.cluster_bits))
                }
                None => geo.external || !entry.is_own(),
            };
            // One that is there already ends the run.
            let there = entry.is_own()
                && (0..if geo.extended { 32 } else { 1 })
                    .all(|sub| entry.state(&geo, sub) == State::Data);
            let fits = fits && !there && !busy.iter().any(|range| range.contains(&at));
            clusters += u64::from(fits);
            fits
        });
        self.busy = busy;
        found?;
        if let Some(bad) = bad {
            self.entry(bad)?;
        }
        Ok((keep, clusters))
    }

    /// The places of the guest clusters from `guest` on that are about to be written, `most` of
    /// them, none of which can be written over.
    pub(super) fn plan_new(&mut self, guest: u64, most: u64) -> Result<Plan, Error> {
        let geo = self.geo;
        let (keep, clusters) = self.run_new(guest, most)?;
        let clusters = clusters.max(1);
        if let Some(host) = keep {
            let cluster = host >> geo.cluster_bits;
            if (cluster..cluster + clusters).any(|at| self.fixed.contains(&at)) {
                return Err(self.corrupt(format!("guest cluster {guest} lies on metadata")));
            }
            return Ok(Plan::New {
                host,
                clusters,
                keep: true,
                fresh: false,
            });
        }
        if geo.external {
            return Ok(Plan::New {
                host: guest << geo.cluster_bits,
                clusters,
                keep: true,
                fresh: false,
            });
        }
        let (at, clusters) = self.allocate(clusters)?;
        let fresh = self.take_fresh(at, clusters);
        Ok(Plan::New {
            host: at << geo.cluster_bits,
            clusters,
            keep: false,
            fresh,
        })
    }

    /// Maps the clusters that hold these guest bytes, which were written, at host offset `host`
    /// and on; their L2 table is our own. `keep`: the host clusters were theirs before.
    pub(super) fn map_new(
        &mut self,
        bytes: Range<u64>,
        host: u64,
        keep: bool,
        mark: Mark,
    ) -> Result<(), Error> {
        let geo = self.geo;
        let (bits, cluster) = (geo.cluster_bits, geo.cluster());
        let (first, last) = (bytes.start >> bits, (bytes.end - 1) >> bits);
        for guest in first..=last {
            let from = bytes.start.max(guest << bits);
            let to = bytes.end.min((guest + 1) << bits);
            let host = host + ((guest - first) << bits);
            let old = self.entry(guest)?;
            let mut new = Entry {
                raw: host | COPIED,
                bits: 0,
            };
            if geo.extended {
                let low = (from & (cluster - 1)) >> geo.sub_bits;
                let high = (to - (guest << bits)).div_ceil(1 << geo.sub_bits);
                let written = ((1_u64 << high) - (1 << low)) & 0xffff_ffff;
                let kept = if old.is_compressed() {
                    0
                } else {
                    old.bits & !(written | written << 32)
                };
                new.bits = kept | written;
            } else {
                new.raw &= !ZERO;
            }
            self.set_entry(guest, new)?;
            if !keep {
                self.drop_entry(old, false, mark);
            }
        }
        Ok(())
    }
}

impl Qcow2 {
    pub(super) fn read_mapped(&self, offset: u64, len: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        // Before the lookup: what is found stays where it is.
        let _stay = self.grace.enter();
        let mut map = Vec::with_capacity(4);
        {
            let mut meta = self.meta();
            meta.make_room()?;
            meta.map(offset, len, &mut map)?;
        }
        for segment in &map {
            let bufs = iovec::part(bufs, segment.start - offset, segment.len);
            self.read_segment(segment, &bufs)?;
        }
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, bufs: &[IoBuf]) -> Result<(), Error> {
        match segment.place {
            Place::Data(host) if self.cipher.is_none() => self.data.read(host, bufs),
            Place::Data(host) => self.read_encrypted(host, segment.len, bufs),
            Place::Zero => {
                iovec::zero(bufs);
                Ok(())
            }
            Place::Compressed(entry) => {
                let cluster = self.unpack(entry)?;
                let within = segment.start & (self.geo.cluster() - 1);
                iovec::scatter(
                    bufs,
                    &cluster[within as usize..(within + segment.len) as usize],
                );
                Ok(())
            }
            Place::Absent => {
                let below = match &self.backing {
                    Some(backing) => backing
                        .size()
                        .saturating_sub(segment.start)
                        .min(segment.len),
                    None => 0,
                };
                if let (Some(backing), 1..) = (&self.backing, below) {
                    backing.read(segment.start, &iovec::part(bufs, 0, below))?;
                }
                iovec::zero(&iovec::part(bufs, below, segment.len - below));
                Ok(())
            }
        }
    }

    fn read_encrypted(&self, host: u64, len: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        let Some(cipher) = &self.cipher else {
            return Ok(());
        };
        let (mut at, end) = (host, host + len);
        let mut bounce = AlignedBuf::new((len + 1024).min(BOUNCE) as usize)?;
        while at < end {
            let start = at & !511;
            let stop = end
                .next_multiple_of(512)
                .min((start + bounce.len() as u64) & !511);
            let count = (stop - start) as usize;
            let io = bounce.io(count);
            self.data.read(start, &[io])?;
            cipher.decrypt(start, &mut bounce[..count]);
            let next = stop.min(end);
            iovec::scatter(
                &iovec::part(bufs, at - host, next - at),
                &bounce[(at - start) as usize..(next - start) as usize],
            );
            at = next;
        }
        Ok(())
    }

    pub(super) fn write_mapped(&self, offset: u64, len: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        // Parts of encrypted sectors are read, changed and written back: by one at a time.
        let (whole, alone);
        if self.cipher.is_some() && (offset | len) & 511 != 0 {
            alone = Some(self.sectors.write().unwrap_or_else(PoisonError::into_inner));
            whole = None;
        } else {
            whole = self
                .cipher
                .as_ref()
                .map(|_| self.sectors.read().unwrap_or_else(PoisonError::into_inner));
            alone = None;
        }
        let _locks = (whole, alone);
        let mut done = 0;
        while done < len {
            let now = iovec::part(bufs, done, len - done);
            done += self.write_some(offset + done, len - done, &now)?;
        }
        Ok(())
    }

    /// Writes a part of a request, from its beginning: how many bytes.
    fn write_some(&self, offset: u64, len: u64, bufs: &[IoBuf]) -> Result<u64, Error> {
        let geo = self.geo;
        let guest = offset >> geo.cluster_bits;
        let _stay = self.grace.enter();
        let mut meta = self.changing()?;
        let plan = loop {
            if !meta.is_busy(guest) {
                if let Some((host, count)) = meta.own_run(offset, len)? {
                    break Plan::Over(host, count);
                }
                meta.own_table(guest, self.grace.mark())?;
                let last = (offset + len.min(RUN) - 1) >> geo.cluster_bits;
                let plan = meta.plan_new(guest, last - guest + 1)?;
                if let Plan::New { clusters, .. } = plan {
                    meta.busy.push(guest..guest + clusters);
                }
                break plan;
            }
            meta = self
                .mapped
                .wait(meta)
                .unwrap_or_else(PoisonError::into_inner);
            meta.check_writable()?;
        };
        let count = match plan {
            Plan::Over(_, count) => count,
            Plan::New { clusters, .. } => {
                len.min(((guest + clusters) << geo.cluster_bits) - offset)
            }
        };
        meta.record(offset, count);
        drop(meta);
        match plan {
            Plan::Over(host, count) => {
                self.write_data(host, count, &iovec::part(bufs, 0, count))?;
                Ok(count)
            }
            Plan::New {
                host,
                clusters,
                keep,
                fresh,
            } => {
                let now = iovec::part(bufs, 0, count);
                let mut mapped = false;
                let done = self.write_new(offset, count, &now, host, (keep, fresh), &mut mapped);
                let mut meta = self.meta();
                if done.is_err() && !keep && !mapped {
                    // Never mapped, so free at once; but they may hold something now.
                    if let Err(error) = meta.release(host >> geo.cluster_bits, clusters, false) {
                        log::error!("{error}");
                    }
                }
                self.no_longer_busy(&mut meta, guest);
                done.map(|()| count)
            }
        }
    }

    pub(super) fn no_longer_busy(&self, meta: &mut Meta, guest: u64) {
        if let Some(at) = meta.busy.iter().position(|range| range.start == guest) {
            meta.busy.swap_remove(at);
        }
        self.mapped.notify_all();
    }

    /// Fills clusters that are busy with us, and maps them.
    pub(super) fn write_new(
        &self,
        offset: u64,
        count: u64,
        bufs: &[IoBuf],
        host: u64,
        (keep, fresh): (bool, bool),
        mapped: &mut bool,
    ) -> Result<(), Error> {
        let geo = self.geo;
        let (bits, cluster) = (geo.cluster_bits, geo.cluster());
        let end = offset + count;
        let (first, last) = (offset >> bits, (end - 1) >> bits);
        let base = first << bits;
        let (head, tail) = {
            let mut meta = self.meta();
            (
                meta.entry(first)?,
                if last == first {
                    Entry::default()
                } else {
                    meta.entry(last)?
                },
            )
        };
        let tail = if last == first { head } else { tail };
        // What is written besides the request's own bytes: whole clusters or subclusters.
        let whole = |entry: Entry| {
            !geo.extended
                || entry.is_compressed()
                || !keep && entry.host(&geo).is_some() && entry.bits as u32 != 0
        };
        let unit = |entry| {
            if whole(entry) {
                cluster
            } else {
                1 << geo.sub_bits
            }
        };
        let mut start = offset & !(unit(head) - 1);
        let mut stop = end.next_multiple_of(unit(tail));
        if geo.external {
            // The data file is no longer than the guest's disk.
            stop = stop.min(self.size().max(end));
        }
        // Only what is missing has to be filled; a subcluster that is there is written over.
        if geo.extended && keep && (self.cipher.is_none() || (offset | end) & 511 == 0) {
            if head.state(&geo, ((offset - base) >> geo.sub_bits) as u32) == State::Data {
                start = offset;
            }
            if tail.state(&geo, (((end - 1) & (cluster - 1)) >> geo.sub_bits) as u32) == State::Data
            {
                stop = end;
            }
        }
        let mut before = self.old_content(start, offset - start)?;
        let mut after = self.old_content(end, stop - end)?;
        let zeroes = [&before, &after]
            .iter()
            .all(|part| part.as_ref().is_none_or(|data| iovec::is_zero(data)));
        if fresh && zeroes && self.cipher.is_none() {
            // The file has zeroes there already.
            (before, after) = (None, None);
        } else if self.cipher.is_some() || stop - end > 0 || offset - start > 0 {
            // Past the guest's end the rest of a cluster needs no content, but has to be there.
            let fill = |part: &mut Option<AlignedBuf>, len: u64| -> Result<(), Error> {
                if part.is_none() && len > 0 {
                    *part = Some(AlignedBuf::new(len as usize)?);
                }
                Ok(())
            };
            fill(&mut before, offset - start)?;
            fill(&mut after, stop - end)?;
        }
        let ahead = if before.is_some() { offset - start } else { 0 };
        let mut all = Vec::with_capacity(bufs.len() + 2);
        all.extend(
            before
                .as_mut()
                .map(|data| data.io((offset - start) as usize)),
        );
        all.extend_from_slice(bufs);
        all.extend(after.as_mut().map(|data| data.io((stop - end) as usize)));
        let total = iovec::total(&all)?;
        self.write_data(host + (offset - ahead - base), total, &all)?;
        let mut meta = self.changing()?;
        if !(fresh && zeroes) {
            meta.written += 1;
        }
        let mark = self.grace.mark();
        meta.own_table(first, mark)?;
        *mapped = true;
        meta.map_new(start..stop, host, keep, mark)
    }

    /// What guest bytes are made of before they are mapped anew; none when they are zeroes
    /// because nothing is there.
    fn old_content(&self, offset: u64, len: u64) -> Result<Option<AlignedBuf>, Error> {
        // Past the guest's end there is nothing to keep.
        let len = len.min(self.size().saturating_sub(offset));
        if len == 0 {
            return Ok(None);
        }
        let mut map = Vec::new();
        self.meta().map(offset, len, &mut map)?;
        let below = self.backing.as_ref().map_or(0, |backing| backing.size());
        let nothing = |segment: &Segment| match segment.place {
            Place::Zero => true,
            Place::Absent => segment.start >= below,
            _ => false,
        };
        if map.iter().all(nothing) {
            return Ok(None);
        }
        // As long as the caller wants it, zeroes at the end.
        let mut data = AlignedBuf::new(self.geo.cluster() as usize)?;
        let io = data.io(len as usize);
        for segment in &map {
            self.read_segment(
                segment,
                &iovec::part(&[io], segment.start - offset, segment.len),
            )?;
        }
        Ok(Some(data))
    }

    /// Writes to the data's file, encrypted if the image is.
    fn write_data(&self, host: u64, len: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        let Some(cipher) = &self.cipher else {
            return self.data.write(host, bufs);
        };
        let end = host + len;
        let mut bounce = AlignedBuf::new((len + 1024).min(BOUNCE) as usize)?;
        let mut at = host;
        while at < end {
            let start = at & !511;
            let stop = end
                .next_multiple_of(512)
                .min((start + bounce.len() as u64) & !511);
            let next = stop.min(end);
            let count = (stop - start) as usize;
            let io = bounce.io(count);
            if at != start || next != stop {
                self.read_encrypted(start, stop - start, &[io])?;
            }
            iovec::gather(
                &iovec::part(bufs, at - host, next - at),
                &mut bounce[(at - start) as usize..(next - start) as usize],
            );
            cipher.encrypt(start, &mut bounce[..count]);
            self.data.write(start, &[io])?;
            at = next;
        }
        Ok(())
    }
}
