//! Internal snapshots of an open image: taken, gone back to, deleted.
//!
//! Each step leaves, if the process dies in it, clusters that nobody refers to at worst, or clusters
//! that are used once only and not said to be, which costs a copy when they are written. An image
//! of version 3 is marked as dirty meanwhile, so that whoever opens it next counts its refcounts
//! anew; version 2 has no such mark, and `check -r` mends it.
//!
//! Whoever calls these has no write in flight: one that is could still go to a place that has
//! just become the snapshot's.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::entry::{COPIED, Entry, OFFSET};
use super::header::{self, at};
use super::meta::Meta;
use super::snapshot::{Snapshot, Table};
use super::{Qcow2, words};
use crate::{Error, Image};

/// QEMU's bound.
const SNAPSHOTS_MOST: usize = 65_536;
const TEXT_MOST: usize = 255;

impl Qcow2 {
    /// The internal snapshots.
    ///
    /// # Errors
    /// The host's I/O, a corrupt table.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        let meta = self.meta();
        Ok(Table::read(&meta.file, &meta.header, self.geo)?.list)
    }

    /// The image's tables to ourselves, and in the file as they are in memory.
    fn settled(&self) -> Result<MutexGuard<'_, Meta>, Error> {
        self.check_writable()?;
        if self.geo.external {
            return Err(Error::Invalid(
                "an image with a data file of its own can have no internal snapshots".into(),
            ));
        }
        self.flush()?;
        let mut meta = self.changing()?;
        while !meta.busy.is_empty() {
            meta = self
                .mapped
                .wait(meta)
                .unwrap_or_else(PoisonError::into_inner);
            meta.check_writable()?;
        }
        meta.write_all()?;
        self.unpacked.forget();
        Ok(meta)
    }

    /// Takes a snapshot of the present content, called `name`. `date`: seconds and nanoseconds
    /// since 1970.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the refcounts can't count that far, the host's I/O.
    pub fn snapshot_create(&self, name: &str, date: (u32, u32)) -> Result<Snapshot, Error> {
        let mut meta = self.settled()?;
        let mut table = Table::read(&meta.file, &meta.header, self.geo)?;
        if table.list.len() >= SNAPSHOTS_MOST || name.len() > TEXT_MOST {
            return Err(Error::Invalid(
                "too many snapshots, or too long a name".into(),
            ));
        }
        let highest = table
            .list
            .iter()
            .filter_map(|one| one.id.parse::<u64>().ok())
            .max();
        let l1 = meta.l1.clone();
        meta.count_up(&l1)?;
        meta.clear_copied()?;
        meta.write_all()?;
        let (bits, cluster) = (self.geo.cluster_bits, self.geo.cluster());
        let clusters = (l1.len() as u64 * 8).div_ceil(cluster).max(1);
        let place = meta.allocate_row(clusters)?;
        let mut data: Vec<u8> = meta.l1.iter().flat_map(|one| one.to_be_bytes()).collect();
        data.resize((clusters * cluster) as usize, 0);
        meta.file.write_bytes(place << bits, &data)?;
        meta.fixed.extend(place..place + clusters);
        let mut extra = vec![0; 24];
        extra[8..16].copy_from_slice(&meta.header.size.to_be_bytes());
        let snapshot = Snapshot {
            id: highest.map_or(1, |id| id.saturating_add(1)).to_string(),
            name: name.to_owned(),
            l1_offset: place << bits,
            l1_size: l1.len() as u32,
            date,
            clock: 0,
            state_size: 0,
            disk_size: Some(meta.header.size),
            icount: Some(0),
            extra,
        };
        table.list.push(snapshot.clone());
        meta.put_snapshots(&table)?;
        Ok(snapshot)
    }

    /// The content becomes the snapshot's again, and the disk's size too.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none of that id or name, the host's I/O.
    pub fn snapshot_apply(&self, wanted: &str) -> Result<(), Error> {
        let mut meta = self.settled()?;
        let table = Table::read(&meta.file, &meta.header, self.geo)?;
        let one = found(&table, wanted)?;
        let size = one.disk_size.unwrap_or(meta.header.size);
        let mut new = meta.read_l1(one)?;
        // What is beyond the disk is the machine's state.
        new.truncate(meta.header.l1_needed(size) as usize);
        new.resize(meta.header.l1_needed(size).max(1) as usize, 0);
        for entry in &mut new {
            *entry &= OFFSET;
        }
        if size != meta.header.size {
            meta.resize_bitmaps(size)?;
        }
        let whole = size.max(meta.header.size);
        meta.record(0, whole);
        meta.set_dirty(true)?;
        meta.count_up(&new)?;
        let (bits, cluster) = (self.geo.cluster_bits, self.geo.cluster());
        let clusters = (new.len() as u64 * 8).div_ceil(cluster);
        let place = meta.allocate_row(clusters)?;
        let mut data: Vec<u8> = new.iter().flat_map(|one| one.to_be_bytes()).collect();
        data.resize((clusters * cluster) as usize, 0);
        meta.file.write_bytes(place << bits, &data)?;
        meta.fixed.extend(place..place + clusters);
        meta.write_refcounts()?;
        meta.sync()?;
        let old = std::mem::replace(&mut meta.l1, new);
        let old_place = (meta.header.l1_offset, u64::from(meta.header.l1_size) * 8);
        meta.header.l1_offset = place << bits;
        meta.header.l1_size = meta.l1.len() as u32;
        meta.header.size = size;
        meta.write_header()?;
        self.size.store(size, Ordering::Release);
        meta.count_down(&old)?;
        if old_place.1 > 0 {
            meta.release(old_place.0 >> bits, old_place.1.div_ceil(cluster), false)?;
        }
        meta.right_copied()?;
        meta.set_dirty(false)
    }

    /// Deletes a snapshot: its id or name.
    ///
    /// # Errors
    /// As [`Qcow2::snapshot_apply`].
    pub fn snapshot_delete(&self, wanted: &str) -> Result<(), Error> {
        let mut meta = self.settled()?;
        let mut table = Table::read(&meta.file, &meta.header, self.geo)?;
        let one = found(&table, wanted)?.clone();
        let l1 = meta.read_l1(&one)?;
        table.list.retain(|other| other.id != one.id);
        meta.set_dirty(true)?;
        meta.put_snapshots(&table)?;
        meta.count_down(&l1)?;
        let (bits, cluster) = (self.geo.cluster_bits, self.geo.cluster());
        let clusters = (u64::from(one.l1_size) * 8).div_ceil(cluster);
        if clusters > 0 {
            meta.release(one.l1_offset >> bits, clusters, true)?;
        }
        meta.right_copied()?;
        meta.set_dirty(false)
    }
}

fn found<'a>(table: &'a Table, wanted: &str) -> Result<&'a Snapshot, Error> {
    table
        .find(wanted)
        .ok_or_else(|| Error::Invalid("snapshot not found".into()))
}

impl Meta {
    fn read_l1(&self, one: &Snapshot) -> Result<Vec<u64>, Error> {
        let mut data = vec![0; one.l1_size as usize * 8];
        self.file.read_bytes(one.l1_offset, &mut data)?;
        Ok(words(&data))
    }

    /// Writes the snapshot table, and has the header say so.
    fn put_snapshots(&mut self, table: &Table) -> Result<(), Error> {
        let (bits, cluster) = (self.geo.cluster_bits, self.geo.cluster());
        let old = Table::read(&self.file, &self.header, self.geo)?.bytes;
        let old = (self.header.snapshots_offset >> bits, old.div_ceil(cluster));
        let mut data = table.to_bytes(self.header.size);
        let mut offset = 0;
        if !data.is_empty() {
            let clusters = (data.len() as u64).div_ceil(cluster);
            let place = self.allocate_row(clusters)?;
            data.resize((clusters * cluster) as usize, 0);
            self.file.write_bytes(place << bits, &data)?;
            self.fixed.extend(place..place + clusters);
            offset = place << bits;
        }
        self.write_refcounts()?;
        self.sync()?;
        self.header.snapshots = table.list.len() as u32;
        self.header.snapshots_offset = offset;
        let mut fields = self.header.snapshots.to_be_bytes().to_vec();
        fields.extend(offset.to_be_bytes());
        self.file.write_bytes(at::SNAPSHOTS, &fields)?;
        self.sync()?;
        if old.1 > 0 {
            self.release(old.0, old.1, false)?;
        }
        Ok(())
    }

    /// Refcounts may be wrong for a while, or are right again.
    pub fn set_dirty(&mut self, dirty: bool) -> Result<(), Error> {
        if !dirty {
            self.write_refcounts_now()?;
            self.write_all()?;
        }
        if self.geo.version < 3 {
            return self.sync();
        }
        self.sync()?;
        if dirty {
            self.header.incompatible |= header::DIRTY;
        } else {
            self.header.incompatible &= !header::DIRTY;
            // Who leaves refcounts for later says so again first.
            self.begun &= !self.header.has_lazy_refcounts();
        }
        self.file
            .write_bytes(at::INCOMPATIBLE, &self.header.incompatible.to_be_bytes())?;
        self.sync()
    }

    /// Every cluster that an L1 table refers to, tables among them, once for each reference. What
    /// is in memory must be in the file.
    fn each_reference(
        &mut self,
        l1: &[u64],
        mut each: impl FnMut(&mut Self, u64) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let geo = self.geo;
        let bits = geo.cluster_bits;
        let mut data = vec![0; geo.cluster() as usize];
        for (index, entry) in l1.iter().enumerate() {
            let table = entry & OFFSET;
            if table == 0 {
                continue;
            }
            if !table.is_multiple_of(geo.cluster()) || !self.in_file(table)? {
                return Err(self.corrupt(format!("L1 entry {index} is {entry:#x}")));
            }
            self.file.read_bytes(table, &mut data)?;
            if !each(self, table >> bits)? {
                return Ok(());
            }
            for at in 0..1_usize << geo.l2_bits() {
                let entry = Entry::get(&geo, &data, at);
                if let Some(problem) = entry.problem(&geo) {
                    return Err(self.corrupt(format!("L2 table {table:#x}, entry {at}: {problem}")));
                }
                let clusters = if entry.is_compressed() {
                    let (offset, len) = entry.compressed(&geo);
                    offset >> bits..((offset + len - 1) >> bits) + 1
                } else if let Some(host) = entry.host(&geo) {
                    host >> bits..(host >> bits) + 1
                } else {
                    continue;
                };
                for cluster in clusters {
                    if !each(self, cluster)? {
                        return Ok(());
                    }
                }
            }
            // The tables' entries are written in order of the clusters they are for; nothing else
            // of what is cached is needed twice.
            self.make_room()?;
        }
        Ok(())
    }

    /// One more reference to everything; all or nothing.
    fn count_up(&mut self, l1: &[u64]) -> Result<(), Error> {
        let (mut done, mut full) = (0_u64, false);
        let counted = self.each_reference(l1, |meta, cluster| {
            // Compressed data may be said to go on past the file's end, where nothing counts.
            full = !meta.share(cluster)?;
            done += u64::from(!full);
            Ok(!full)
        });
        if counted.is_ok() && !full {
            self.write_refcounts()?;
            return self.sync();
        }
        let mut left = done;
        self.each_reference(l1, |meta, cluster| {
            if left > 0 {
                meta.release(cluster, 1, false)?;
                left -= 1;
            }
            Ok(left > 0)
        })?;
        counted?;
        Err(Error::Invalid(format!(
            "{}: its refcounts can't count one more snapshot",
            self.file.name()
        )))
    }

    fn count_down(&mut self, l1: &[u64]) -> Result<(), Error> {
        self.each_reference(l1, |meta, cluster| {
            meta.release(cluster, 1, true)?;
            Ok(true)
        })
    }

    /// Nothing that the active tables refer to is theirs alone any more.
    fn clear_copied(&mut self) -> Result<(), Error> {
        self.change_flags(|_, _| Ok(false))
    }

    /// The flags say again which clusters are used once only.
    fn right_copied(&mut self) -> Result<(), Error> {
        self.change_flags(|meta, cluster| Ok(meta.refcount(cluster)? == 1))
    }

    fn change_flags(
        &mut self,
        own: impl Fn(&mut Self, u64) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let geo = self.geo;
        let bits = geo.cluster_bits;
        let flagged = |raw: u64, own: bool| if own { raw | COPIED } else { raw & !COPIED };
        for index in 0..self.l1.len() {
            let table = self.l1[index] & OFFSET;
            if table == 0 {
                continue;
            }
            let right = flagged(self.l1[index], own(self, table >> bits)?);
            if right != self.l1[index] {
                self.l1[index] = right;
                self.l1_dirty.insert(index);
            }
            let per = geo.slice_entries() as usize;
            for slice in 0..(geo.cluster() / geo.slice()) {
                let at = table + slice * geo.slice();
                let old: Vec<Entry> = {
                    let data = self.l2.get(&self.file, at)?;
                    (0..per).map(|n| Entry::get(&geo, data, n)).collect()
                };
                let mut new = Vec::new();
                for (n, entry) in old.iter().enumerate() {
                    let Some(host) = entry.host(&geo) else {
                        continue;
                    };
                    let raw = flagged(entry.raw, own(self, host >> bits)?);
                    if raw != entry.raw {
                        new.push((n, Entry { raw, ..*entry }));
                    }
                }
                if !new.is_empty() {
                    let data = self.l2.change(&self.file, at)?;
                    for (n, entry) in new {
                        entry.put(&geo, data, n);
                    }
                }
                self.make_room()?;
            }
        }
        Ok(())
    }
}
