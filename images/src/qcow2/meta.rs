//! The image's tables in memory, and the order in which they reach the file.
//!
//! Whatever refers to a cluster is written after the cluster's refcount and content, and a
//! cluster is freed after whatever referred to it has been written: data and copied content,
//! then refcounts, then L2 tables, then the L1 table, then refcounts of what was freed. A process
//! that dies at any point leaves clusters that nobody refers to, at worst. Between the steps the
//! file is synced where the next depends on it, so that a power failure does no more harm.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::Geometry;
use super::cache::{Cache, OffsetHash};
use super::entry::{COPIED, Entry, OFFSET, State};
use super::header::{self, Header};
use crate::grace::Mark;
use crate::{Error, File};

/// A piece of the guest's address range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest offset, bytes.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    pub place: Place,
}

/// Where a segment's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the data's file, at this offset.
    Data(u64),
    Zero,
    /// In the backing file, if there is one.
    Absent,
    /// In compressed form; the segment is a part of one cluster.
    Compressed(Entry),
}

/// References to clusters that were dropped from the tables in memory.
#[derive(Debug, Clone, Copy)]
pub struct Freed {
    pub clusters: (u64, u64),
    /// The guest has given the space up.
    pub punch: bool,
    /// Who looked them up before may still be using them.
    pub mark: Mark,
}

#[derive(Debug)]
pub struct Meta {
    pub file: Arc<File>,
    pub data_file: Option<Arc<File>>,
    pub geo: Geometry,
    pub header: Header,
    pub l1: Vec<u64>,
    pub l1_dirty: BTreeSet<usize>,
    pub l2: Cache,
    pub refcounts: Cache,
    pub refcount_table: Vec<u64>,
    pub refcount_table_dirty: BTreeSet<usize>,
    /// Clusters that hold metadata: no guest data may go there.
    pub fixed: HashSet<u64, OffsetHash>,
    /// No cluster below this is free.
    pub hint: u64,
    /// Clusters that have a refcount already but no use yet.
    pub reserve: Range<u64>,
    /// The host is asked to set space aside for them: to fill it costs less than to make the file
    /// longer with each write. Not with O_DIRECT: there each write into the middle of what is set
    /// aside has ext4 split an extent and merge it again, which may free, and discard, a block of its tree.
    pub set_aside: bool,
    /// Up to which cluster it has; 0 if it has not.
    pub ahead: u64,
    /// Clusters from here on have never been written to and read as zeroes.
    pub fresh: u64,
    /// Guest clusters that somebody is about to map.
    pub busy: Vec<Range<u64>>,
    pub freed: Vec<Freed>,
    /// Where the next compressed data goes, in a cluster that has some already; or 0.
    pub pack: u64,
    /// How often something was written that must be stable before the L2 tables are written.
    pub written: u64,
    /// Up to which of them it is.
    pub stable: u64,
    /// How many of `freed` nothing in the file refers to any more.
    pub freed_written: usize,
    /// What has to happen before the first change has happened.
    pub begun: bool,
    /// The persistent bitmaps, once they are needed.
    pub bitmaps: Option<Vec<super::bitmaps::Tracked>>,
    /// Who wants to know of writes.
    pub trackers: Vec<super::pull::Record>,
    /// Why no more is written.
    pub broken: Option<String>,
    /// The file has at least these bytes.
    pub file_end: u64,
}

impl Meta {
    /// The image's structures contradict each other: nothing is written from now on, and the
    /// image says so.
    pub fn corrupt(&mut self, reason: String) -> Error {
        if self.file.writable() && self.broken.is_none() {
            log::error!("{} is corrupt: {reason}", self.file.name());
            self.header.incompatible |= header::CORRUPT;
            if self.geo.version >= 3
                && let Err(error) = self.file.write_bytes(
                    header::at::INCOMPATIBLE,
                    &self.header.incompatible.to_be_bytes(),
                )
            {
                log::error!("marking it as corrupt: {error}");
            }
            self.broken = Some(reason.clone());
        }
        Error::Corrupt {
            image: self.file.name().to_owned(),
            reason,
        }
    }

    pub fn check_writable(&self) -> Result<(), Error> {
        match &self.broken {
            Some(reason) => Err(Error::Corrupt {
                image: self.file.name().to_owned(),
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Whether the file reaches beyond `offset`.
    pub fn in_file(&mut self, offset: u64) -> Result<bool, Error> {
        if offset >= self.file_end {
            self.file_end = self.file.size()?;
        }
        Ok(offset < self.file_end)
    }

    /// Where the piece of the L2 table for guest cluster `guest` is, and the entry's index in it;
    /// none if there is no table.
    fn slice(&mut self, guest: u64) -> Result<Option<(u64, usize)>, Error> {
        let index = (guest >> self.geo.l2_bits()) as usize;
        let Some(&entry) = self.l1.get(index) else {
            return Err(self.corrupt(format!("guest cluster {guest} is beyond its L1 table")));
        };
        let table = entry & OFFSET;
        if table == 0 {
            return Ok(None);
        }
        if !table.is_multiple_of(self.geo.cluster())
            || !self.l1_dirty.contains(&index) && !self.in_file(table)?
        {
            return Err(self.corrupt(format!("L1 entry {index} is {entry:#x}")));
        }
        let (slice, index) = self.geo.slice_of(guest);
        Ok(Some((table + slice, index)))
    }

    /// The entries from guest cluster `guest` on, as many as are at hand (one at least), at most
    /// `most`, given to `each` until it says stop.
    pub fn entries(
        &mut self,
        guest: u64,
        most: u64,
        mut each: impl FnMut(u64, Entry) -> bool,
    ) -> Result<u64, Error> {
        let geo = self.geo;
        let in_slice = geo.slice_entries() - geo.slice_of(guest).1 as u64;
        let count = in_slice.min(most);
        let Some((offset, first)) = self.slice(guest)? else {
            for n in 0..count {
                if !each(guest + n, Entry::default()) {
                    return Ok(n + 1);
                }
            }
            return Ok(count);
        };
        let table = self.l2.get(&self.file, offset)?;
        for n in 0..count {
            if !each(guest + n, Entry::get(&geo, table, first + n as usize)) {
                return Ok(n + 1);
            }
        }
        Ok(count)
    }

    /// The entry of one guest cluster, checked.
    pub fn entry(&mut self, guest: u64) -> Result<Entry, Error> {
        let mut found = Entry::default();
        self.entries(guest, 1, |_, entry| {
            found = entry;
            false
        })?;
        self.checked(guest, found)?;
        Ok(found)
    }

    fn checked(&mut self, guest: u64, entry: Entry) -> Result<(), Error> {
        if let Some(problem) = entry.problem(&self.geo) {
            return Err(self.corrupt(format!(
                "L2 entry {:#x} of guest cluster {guest}: {problem}",
                entry.raw
            )));
        }
        Ok(())
    }

    /// Changes the entry of one guest cluster; its table must be our own ([`Meta::own_table`]).
    pub fn set_entry(&mut self, guest: u64, entry: Entry) -> Result<(), Error> {
        let Some((offset, index)) = self.slice(guest)? else {
            return Err(self.corrupt(format!("guest cluster {guest} has no L2 table")));
        };
        let geo = self.geo;
        entry.put(&geo, self.l2.change(&self.file, offset)?, index);
        Ok(())
    }

    /// Where the guest's bytes are: appends to `out` what covers `len` bytes at `offset`.
    pub fn map(&mut self, offset: u64, len: u64, out: &mut Vec<Segment>) -> Result<(), Error> {
        let geo = self.geo;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let guest = at >> geo.cluster_bits;
            let most = ((end - 1) >> geo.cluster_bits) - guest + 1;
            let mut bad = None;
            self.entries(guest, most, |guest, entry| {
                if entry.problem(&geo).is_some() {
                    bad = Some((guest, entry));
                    return false;
                }
                let stop = ((guest + 1) << geo.cluster_bits).min(end);
                while at < stop {
                    let within = at & (geo.cluster() - 1);
                    let sub = (within >> geo.sub_bits) as u32;
                    let next = if geo.extended && !entry.is_compressed() {
                        ((at >> geo.sub_bits) + 1) << geo.sub_bits
                    } else {
                        stop
                    };
                    let next = next.min(stop);
                    let place = match entry.state(&geo, sub) {
                        State::Absent => Place::Absent,
                        State::Zero => Place::Zero,
                        State::Data => Place::Data(entry.host(&geo).unwrap_or_default() + within),
                        State::Compressed => Place::Compressed(entry),
                    };
                    push(
                        out,
                        Segment {
                            start: at,
                            len: next - at,
                            place,
                        },
                    );
                    at = next;
                }
                true
            })?;
            if let Some((guest, entry)) = bad {
                self.checked(guest, entry)?;
            }
        }
        if !geo.external {
            for segment in out.iter() {
                let host = match segment.place {
                    Place::Data(host) => host + segment.len - 1,
                    Place::Compressed(entry) => entry.compressed(&geo).0,
                    _ => continue,
                };
                // The last cluster may be cut short.
                if !self.in_file(host & !(geo.cluster() - 1))? {
                    return Err(self.corrupt(format!(
                        "guest offset {:#x} is at {host:#x}, past the file's end",
                        segment.start
                    )));
                }
            }
        }
        Ok(())
    }

    /// Whether the L2 table for guest cluster `guest` is there and ours alone.
    pub fn owns_table(&self, guest: u64) -> bool {
        let index = (guest >> self.geo.l2_bits()) as usize;
        self.l1.get(index).is_some_and(|entry| entry & COPIED != 0)
    }

    /// Makes sure that the L2 table for guest cluster `guest` is there and ours alone.
    pub fn own_table(&mut self, guest: u64, mark: Mark) -> Result<(), Error> {
        let index = (guest >> self.geo.l2_bits()) as usize;
        let old = match self.slice(guest)? {
            Some(_) if self.l1[index] & COPIED != 0 => return Ok(()),
            Some(_) => Some(self.l1[index] & OFFSET),
            None => None,
        };
        let unit = self.l2.unit();
        let cluster = self.geo.cluster();
        let (new, _) = self.allocate(1)?;
        let new = new << self.geo.cluster_bits;
        self.fixed.insert(new >> self.geo.cluster_bits);
        for at in (0..cluster).step_by(unit as usize) {
            let data = match old {
                Some(old) => self.l2.get(&self.file, old + at)?.to_vec(),
                None => vec![0; unit as usize],
            };
            self.l2.put(new + at, data, true);
        }
        self.l1[index] = new | COPIED;
        self.l1_dirty.insert(index);
        if let Some(old) = old {
            self.freed.push(Freed {
                clusters: (old >> self.geo.cluster_bits, 1),
                punch: false,
                mark,
            });
        }
        Ok(())
    }

    /// Drops whatever an entry refers to, once the table that no longer says so is written.
    pub fn drop_entry(&mut self, entry: Entry, punch: bool, mark: Mark) {
        if self.geo.external {
            return;
        }
        let bits = self.geo.cluster_bits;
        let clusters = if entry.is_compressed() {
            let (offset, len) = entry.compressed(&self.geo);
            (
                offset >> bits,
                ((offset + len - 1) >> bits) - (offset >> bits) + 1,
            )
        } else if let Some(host) = entry.host(&self.geo) {
            (host >> bits, 1)
        } else {
            return;
        };
        let mergeable = self.freed.len() > self.freed_written;
        match self.freed.last_mut().filter(|_| mergeable) {
            Some(last)
                if last.clusters.0 + last.clusters.1 == clusters.0
                    && last.punch == punch
                    && last.mark == mark =>
            {
                last.clusters.1 += clusters.1;
            }
            _ => self.freed.push(Freed {
                clusters,
                punch,
                mark,
            }),
        }
    }

    pub fn sync(&mut self) -> Result<(), Error> {
        if let Some(data) = &self.data_file {
            data.sync()?;
        }
        self.file.sync()?;
        self.stable = self.written;
        Ok(())
    }

    /// Whether the L2 tables can't be written without a sync.
    pub fn needs_sync(&self) -> bool {
        self.stable < self.written
    }

    /// Refcounts are left for later (`lazy_refcounts`): the image says that those in its file may
    /// be wrong, and who finds it so counts them anew.
    pub fn postpones(&self) -> bool {
        self.header.has_lazy_refcounts() && self.header.incompatible & header::DIRTY != 0
    }

    /// Writes the refcounts that have changed, unless that is left for later.
    pub fn write_refcounts(&mut self) -> Result<(), Error> {
        if self.postpones() {
            return Ok(());
        }
        self.write_refcounts_now()
    }

    /// Writes the refcounts that have changed.
    pub fn write_refcounts_now(&mut self) -> Result<(), Error> {
        if self.refcounts.is_dirty() {
            self.written += 1;
            self.refcounts.write_back(&self.file)?;
        }
        if !self.refcount_table_dirty.is_empty() {
            self.sync()?;
            self.written += 1;
            let offset = self.header.refcount_offset;
            write_table(
                &self.file,
                offset,
                &self.refcount_table,
                &mut self.refcount_table_dirty,
            )?;
        }
        Ok(())
    }

    /// Writes everything that has changed, in order. What was freed stays so for now.
    pub fn write_all(&mut self) -> Result<(), Error> {
        self.write_refcounts()?;
        if self.l2.is_dirty() || !self.l1_dirty.is_empty() {
            if self.needs_sync() {
                self.sync()?;
            }
            self.l2.write_back(&self.file)?;
        }
        if !self.l1_dirty.is_empty() {
            self.sync()?;
            write_table(
                &self.file,
                self.header.l1_offset,
                &self.l1,
                &mut self.l1_dirty,
            )?;
        }
        Ok(())
    }

    /// Keeps the caches within their bounds; before an operation, not in it.
    pub fn make_room(&mut self) -> Result<(), Error> {
        for which in 0..2 {
            let cache = if which == 0 {
                &mut self.l2
            } else {
                &mut self.refcounts
            };
            if cache.is_full() {
                if self.broken.is_none() {
                    self.write_refcounts_now()?;
                    self.write_all()?;
                }
                let cache = if which == 0 {
                    &mut self.l2
                } else {
                    &mut self.refcounts
                };
                cache.shrink();
            }
        }
        Ok(())
    }

    /// Whether anything is left to write.
    pub fn is_clean(&self) -> bool {
        !self.needs_sync()
            && !self.l2.is_dirty()
            && self.l1_dirty.is_empty()
            && (self.postpones()
                || !self.refcounts.is_dirty() && self.refcount_table_dirty.is_empty())
            && self.freed.is_empty()
    }
}

/// Appends, merging with the last where both are one.
fn push(out: &mut Vec<Segment>, segment: Segment) {
    if let Some(last) = out.last_mut() {
        let joins = match (last.place, segment.place) {
            (Place::Data(a), Place::Data(b)) => a + last.len == b,
            (Place::Zero, Place::Zero) | (Place::Absent, Place::Absent) => true,
            _ => false,
        };
        if joins {
            last.len += segment.len;
            return;
        }
    }
    out.push(segment);
}

/// Writes the entries of a table that have changed, neighbours at once.
fn write_table(
    file: &File,
    offset: u64,
    table: &[u64],
    dirty: &mut BTreeSet<usize>,
) -> Result<(), Error> {
    let all: Vec<usize> = dirty.iter().copied().collect();
    for run in all.chunk_by(|a, b| a + 1 == *b) {
        let (first, last) = (run[0], run[run.len() - 1]);
        let data: Vec<u8> = table[first..=last]
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        file.write_bytes(offset + first as u64 * 8, &data)?;
    }
    dirty.clear();
    Ok(())
}
