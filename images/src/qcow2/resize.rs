//! Changing the size of the guest's disk.

use std::sync::atomic::Ordering;

use super::entry::{Entry, OFFSET};
use super::header::{self, at};
use super::meta::{Freed, Meta};
use super::{Preallocation, Qcow2};
use crate::{Error, Image};

/// QEMU's bound on an L1 table, bytes.
const L1_MOST: u64 = 32 << 20;

impl Qcow2 {
    /// As [`Image::resize`], where what is added has its space set aside.
    ///
    /// # Errors
    /// As [`Image::resize`].
    pub fn grow(&self, size: u64, how: Preallocation) -> Result<(), Error> {
        let old = self.size();
        self.set_size(size)?;
        if how == Preallocation::Off || size <= old {
            return Ok(());
        }
        // Where there is something behind it, it says so that there is nothing.
        let below = self.backing().map_or(0, |backing| backing.size());
        self.preallocate(old.max(below), how)?;
        self.flush()
    }

    pub(super) fn set_size(&self, size: u64) -> Result<(), Error> {
        if !size.is_multiple_of(512) {
            return Err(Error::Invalid(format!(
                "a size is a multiple of 512 bytes, {size} is not"
            )));
        }
        let old = self.size();
        {
            let mut meta = self.changing()?;
            if meta.header.snapshots > 0 && self.geo.version < 3 {
                // Version 2 does not record a snapshot's size.
                return Err(Error::Invalid(
                    "Can't resize a v2 image which has snapshots".into(),
                ));
            }
            meta.resize_bitmaps(size)?;
            if size > old {
                meta.grow_l1(size)?;
            }
        }
        if size > old {
            if self.geo.external && !self.data.is_block_device() && self.data.size()? < size {
                self.data.set_len(size)?;
            }
            // The guest's last cluster may hold anything past its end, and so may the backing
            // file: what is new reads as zeroes.
            let in_last = (old.next_multiple_of(self.geo.cluster())).min(size);
            let below = self
                .backing
                .as_ref()
                .map_or(0, |backing| backing.size())
                .min(size);
            self.size.store(size, Ordering::Release);
            let cleared = self.zero_range(old, in_last - old, false).and_then(|()| {
                let end = below.max(in_last);
                self.zero_range(in_last, end - in_last, true)
            });
            if let Err(error) = cleared {
                self.size.store(old, Ordering::Release);
                return Err(error);
            }
            self.meta().write_all()?;
            self.meta().write_size(size)
        } else {
            self.size.store(size, Ordering::Release);
            self.meta().write_size(size)?;
            self.drop_from(size)?;
            self.flush()?;
            // That file alone is the disk too.
            if self.geo.external
                && !self.data.is_block_device()
                && self.meta().header.autoclear & header::DATA_FILE_RAW != 0
            {
                self.data.set_len(size)?;
            }
            Ok(())
        }
    }

    /// Frees what lies past the guest's end.
    pub(super) fn drop_from(&self, size: u64) -> Result<(), Error> {
        let geo = self.geo;
        let mut guest = size.div_ceil(geo.cluster());
        let per = 1_u64 << geo.l2_bits();
        loop {
            let mut meta = self.changing()?;
            let entries = meta.l1.len() as u64;
            if guest >= entries * per {
                return Ok(());
            }
            let index = guest / per;
            let mark = self.grace.mark();
            let end = (index + 1) * per;
            if meta.l1[index as usize] & OFFSET == 0 {
                guest = end;
                continue;
            }
            let whole = guest == index * per;
            if meta.any_busy(guest, end) {
                drop(meta);
                std::thread::yield_now();
                continue;
            }
            meta.own_table(guest, mark)?;
            for at in guest..end {
                let entry = meta.entry(at)?;
                if entry != Entry::default() {
                    meta.set_entry(at, Entry::default())?;
                    meta.drop_entry(entry, true, mark);
                }
            }
            if whole {
                let table = meta.l1[index as usize] & OFFSET;
                meta.l1[index as usize] = 0;
                meta.l1_dirty.insert(index as usize);
                meta.freed.push(Freed {
                    clusters: (table >> geo.cluster_bits, 1),
                    punch: true,
                    mark,
                });
            }
            guest = end;
        }
    }
}

impl Meta {
    fn write_size(&mut self, size: u64) -> Result<(), Error> {
        self.sync()?;
        self.header.size = size;
        self.file.write_bytes(at::SIZE, &size.to_be_bytes())?;
        self.sync()
    }

    /// Makes the L1 table long enough for a disk of `size` bytes: a new one, if need be.
    fn grow_l1(&mut self, size: u64) -> Result<(), Error> {
        let needed = self.header.l1_needed(size);
        if needed <= self.l1.len() as u64 {
            return Ok(());
        }
        if needed * 8 > L1_MOST || size > 1 << 61 {
            return Err(Error::Invalid(format!(
                "{size} bytes are too much for its cluster size"
            )));
        }
        let (bits, cluster) = (self.geo.cluster_bits, self.geo.cluster());
        let clusters = (needed * 8).div_ceil(cluster);
        let new = self.allocate_row(clusters)?;
        // What it will refer to must be there first.
        self.write_all()?;
        let (old, old_len) = (self.header.l1_offset, self.l1.len() as u64 * 8);
        self.l1.resize(needed as usize, 0);
        let mut data: Vec<u8> = self
            .l1
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        data.resize((clusters << bits) as usize, 0);
        self.file.write_bytes(new << bits, &data)?;
        self.sync()?;
        self.header.l1_size = needed as u32;
        self.header.l1_offset = new << bits;
        let mut fields = self.header.l1_size.to_be_bytes().to_vec();
        fields.extend(self.header.l1_offset.to_be_bytes());
        self.file.write_bytes(at::L1_SIZE, &fields)?;
        self.sync()?;
        self.fixed.extend(new..new + clusters);
        if old_len > 0 {
            self.release(old >> bits, old_len.div_ceil(cluster), false)?;
        }
        Ok(())
    }
}
