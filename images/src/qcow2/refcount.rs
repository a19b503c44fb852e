//! Refcounts: who uses which cluster of the file, and where new ones come from.

use super::header::at;
use super::meta::Meta;
use crate::{Error, IoBuf};

/// How many bytes of the file are given a refcount ahead of their use: a flush then seldom finds
/// refcounts that have to be written, and synced, before the L2 tables.
const RESERVE: u64 = 16 << 20;
/// The least that the host is asked to set aside at once, bytes.
const SET_ASIDE: u64 = 1 << 20;
/// QEMU's bound on the refcount table, bytes.
const TABLE_MOST: u64 = 8 << 20;

/// Refcount `index` of a refcount block, refcounts having `1 << order` bits.
pub fn value(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let per = 8 >> order;
            let shift = (index % per) << order;
            u64::from(block[index / per] >> shift) & ((1 << (1 << order)) - 1)
        }
        _ => {
            let size = 1 << (order - 3);
            block[index * size..(index + 1) * size]
                .iter()
                .fold(0, |all, &byte| all << 8 | u64::from(byte))
        }
    }
}

/// Sets refcount `index`; `value` must fit.
pub fn set_value(block: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let per = 8 >> order;
            let shift = (index % per) << order;
            let mask = ((1_u16 << (1 << order)) - 1) as u8;
            let byte = &mut block[index / per];
            *byte = *byte & !(mask << shift) | (value as u8 & mask) << shift;
        }
        _ => {
            let size = 1 << (order - 3);
            block[index * size..(index + 1) * size]
                .copy_from_slice(&value.to_be_bytes()[8 - size..]);
        }
    }
}

impl Meta {
    /// The block that has the refcount of `cluster`; none if there is none.
    fn block(&mut self, index: u64) -> Result<Option<u64>, Error> {
        let entry = self
            .refcount_table
            .get(index as usize)
            .copied()
            .unwrap_or(0);
        if entry == 0 {
            return Ok(None);
        }
        if entry % self.geo.cluster() != 0
            || !self.in_file(entry)?
                && !self.refcounts.is_dirty()
                && !self.refcount_table_dirty.contains(&(index as usize))
        {
            return Err(self.corrupt(format!("refcount table entry {index} is {entry:#x}")));
        }
        Ok(Some(entry))
    }

    /// The refcount of a cluster of the file.
    pub fn refcount(&mut self, cluster: u64) -> Result<u64, Error> {
        let per = self.geo.refcounts();
        match self.block(cluster / per)? {
            None => Ok(0),
            Some(block) => {
                let block = self.refcounts.get(&self.file, block)?;
                Ok(value(
                    block,
                    self.geo.refcount_order,
                    (cluster % per) as usize,
                ))
            }
        }
    }

    /// Sets the refcounts of clusters whose blocks are there.
    pub fn set_refcounts(&mut self, first: u64, count: u64, to: u64) -> Result<(), Error> {
        let per = self.geo.refcounts();
        let (mut at, end) = (first, first + count);
        while at < end {
            let stop = ((at / per + 1) * per).min(end);
            let Some(block) = self.block(at / per)? else {
                return Err(
                    self.corrupt(format!("cluster {at} is in use, but has no refcount block"))
                );
            };
            let block = self.refcounts.change(&self.file, block)?;
            for cluster in at..stop {
                set_value(block, self.geo.refcount_order, (cluster % per) as usize, to);
            }
            at = stop;
        }
        Ok(())
    }

    /// One more reference to a cluster in use; false if its refcount can't count that far.
    pub fn share(&mut self, cluster: u64) -> Result<bool, Error> {
        let now = self.refcount(cluster)?;
        if now == self.geo.refcount_most() {
            return Ok(false);
        }
        self.set_refcounts(cluster, 1, now + 1)?;
        Ok(true)
    }

    /// One reference less to each of `count` clusters. Those that are free then are given back
    /// to the host with `punch`.
    pub fn release(&mut self, first: u64, count: u64, punch: bool) -> Result<(), Error> {
        let mut hole = first..first;
        for cluster in first..first + count {
            let now = self.refcount(cluster)?;
            if now == 0 {
                return Err(
                    self.corrupt(format!("cluster {cluster} was in use with a refcount of 0"))
                );
            }
            self.set_refcounts(cluster, 1, now - 1)?;
            if now > 1 {
                continue;
            }
            self.hint = self.hint.min(cluster);
            let bits = self.geo.cluster_bits;
            if self.pack >> bits == cluster {
                self.pack = 0;
            }
            if self.fixed.remove(&cluster) {
                self.l2.forget(cluster << bits, self.geo.cluster());
                self.refcounts.forget(cluster << bits, self.geo.cluster());
            }
            if hole.end != cluster {
                self.punch(&hole, punch);
                hole.start = cluster;
            }
            hole.end = cluster + 1;
        }
        self.punch(&hole, punch);
        Ok(())
    }

    fn punch(&self, clusters: &std::ops::Range<u64>, really: bool) {
        if !really || clusters.is_empty() {
            return;
        }
        let bits = self.geo.cluster_bits;
        let len = (clusters.end - clusters.start) << bits;
        if let Err(error) = self.file.punch(clusters.start << bits, len) {
            // The space stays with the file, which is all that happens.
            log::warn!("{error}");
        }
    }

    /// Up to `most` free clusters in a row, which now have a refcount of one: the first, and how
    /// many.
    pub fn allocate(&mut self, most: u64) -> Result<(u64, u64), Error> {
        if self.reserve.is_empty() {
            self.reserve = self.find(most)?;
        }
        let count = most.min(self.reserve.end - self.reserve.start);
        let first = self.reserve.start;
        self.reserve.start += count;
        self.check_free(first, count)?;
        Ok((first, count))
    }

    /// Nothing may be placed on metadata, whatever the refcounts say.
    fn check_free(&mut self, first: u64, count: u64) -> Result<(), Error> {
        if (first..first + count).any(|cluster| self.fixed.contains(&cluster)) {
            return Err(self.corrupt(format!(
                "metadata in the {count} clusters at {first} has a refcount of 0"
            )));
        }
        Ok(())
    }

    /// Whether clusters that were just allocated read as zeroes. They don't from now on.
    pub fn take_fresh(&mut self, first: u64, count: u64) -> bool {
        let fresh = first >= self.fresh;
        self.fresh = self.fresh.max(first + count);
        fresh
    }

    /// Finds free clusters, `most` and a reserve if there are that many in a row, and gives them
    /// a refcount of one.
    fn find(&mut self, most: u64) -> Result<std::ops::Range<u64>, Error> {
        let per = self.geo.refcounts();
        let order = self.geo.refcount_order;
        let want = most.max(RESERVE >> self.geo.cluster_bits);
        loop {
            let index = self.hint / per;
            let Some(block) = self.block(index)? else {
                self.new_block(index)?;
                continue;
            };
            let block = self.refcounts.get(&self.file, block)?;
            let free = |cluster: &u64| value(block, order, (cluster % per) as usize) == 0;
            let end = (index + 1) * per;
            let Some(first) = (self.hint..end).find(free) else {
                self.hint = end;
                self.make_room()?;
                continue;
            };
            let stop = end.min(first + want);
            let last = (first..stop).find(|cluster| !free(cluster)).unwrap_or(stop);
            self.set_refcounts(first, last - first, 1)?;
            self.hint = last;
            self.set_aside(first..last);
            return Ok(first..last);
        }
    }

    /// Has the host set space aside for clusters that were never used.
    fn set_aside(&mut self, clusters: std::ops::Range<u64>) {
        let bits = self.geo.cluster_bits;
        let len = (clusters.end - clusters.start) << bits;
        if !self.set_aside || clusters.start < self.fresh || len < SET_ASIDE {
            return;
        }
        // Where the host can't, or has no room for so much, a write finds its own.
        self.set_aside = matches!(self.file.allocate(clusters.start << bits, len), Ok(true));
        if self.set_aside {
            self.ahead = clusters.end;
        }
    }

    /// A refcount block for a part of the file where every cluster is free: it takes the first.
    fn new_block(&mut self, index: u64) -> Result<(), Error> {
        if index >= self.refcount_table.len() as u64 {
            return self.allocate_far(0).map(|_| ());
        }
        let cluster = index * self.geo.refcounts();
        self.check_free(cluster, 1)?;
        let mut data = vec![0; self.geo.cluster() as usize];
        set_value(&mut data, self.geo.refcount_order, 0, 1);
        self.add_block(index, cluster, data);
        Ok(())
    }

    fn add_block(&mut self, index: u64, cluster: u64, data: Vec<u8>) {
        let offset = cluster << self.geo.cluster_bits;
        self.refcounts.put(offset, data, true);
        self.refcount_table[index as usize] = offset;
        self.refcount_table_dirty.insert(index as usize);
        self.fixed.insert(cluster);
        self.take_fresh(cluster, 1);
    }

    /// `count` clusters in a row, beyond all that are in use, with a refcount of one. The
    /// refcount table grows as needed.
    pub fn allocate_far(&mut self, count: u64) -> Result<u64, Error> {
        let per = self.geo.refcounts();
        let cluster = self.geo.cluster();
        let used = self
            .refcount_table
            .iter()
            .rposition(|&entry| entry != 0)
            .map_or(0, |last| last as u64 + 1);
        let first = used * per;
        // All that is new, refcount blocks for all that is new, and perhaps a longer table.
        let (mut blocks, mut table) = (1, 0);
        loop {
            let needed = (count + blocks + table).div_ceil(per).max(1);
            let entries = used + needed;
            let longer = if entries > self.refcount_table.len() as u64 {
                (entries + entries / 2 + 1)
                    .saturating_mul(8)
                    .div_ceil(cluster)
            } else {
                0
            };
            if needed <= blocks && longer <= table {
                break;
            }
            (blocks, table) = (blocks.max(needed), table.max(longer));
        }
        if table * cluster > TABLE_MOST.max(cluster) {
            return Err(Error::Invalid(format!(
                "{} can't grow any more",
                self.file.name()
            )));
        }
        let (blocks_at, table_at) = (first + count, first + count + blocks);
        let end = table_at + table;
        self.check_free(first, end - first)?;
        if table > 0 {
            self.refcount_table
                .resize((table * cluster / 8) as usize, 0);
        }
        for n in 0..blocks {
            let start = first + n * per;
            let mut data = vec![0; cluster as usize];
            for at in start..end.min(start + per) {
                set_value(&mut data, self.geo.refcount_order, (at - start) as usize, 1);
            }
            self.add_block(used + n, blocks_at + n, data);
        }
        self.take_fresh(first, end - first);
        if table > 0 {
            self.refcounts.write_back(&self.file)?;
            let data: Vec<u8> = self
                .refcount_table
                .iter()
                .flat_map(|entry| entry.to_be_bytes())
                .collect();
            self.file
                .write_bytes(table_at << self.geo.cluster_bits, &data)?;
            self.sync()?;
            let (old, clusters) = (self.header.refcount_offset, self.header.refcount_clusters);
            self.header.refcount_offset = table_at << self.geo.cluster_bits;
            self.header.refcount_clusters = table as u32;
            let mut fields = self.header.refcount_offset.to_be_bytes().to_vec();
            fields.extend(self.header.refcount_clusters.to_be_bytes());
            self.file.write_bytes(at::REFCOUNT_TABLE, &fields)?;
            self.sync()?;
            self.refcount_table_dirty.clear();
            self.fixed.extend(table_at..end);
            self.release(old >> self.geo.cluster_bits, clusters.into(), false)?;
        }
        Ok(first)
    }

    /// `count` clusters in a row, with a refcount of one, not far behind what is in use.
    pub fn allocate_row(&mut self, count: u64) -> Result<u64, Error> {
        if count <= 1 {
            let (first, _) = self.allocate(1)?;
            self.take_fresh(first, 1);
            return Ok(first);
        }
        let per = self.geo.refcounts();
        if count >= per / 2 {
            return self.allocate_far(count);
        }
        let (mut at, mut run) = (self.hint, 0);
        while run < count {
            let index = at / per;
            if self.block(index)?.is_none() {
                self.new_block(index)?;
                run = 0;
            }
            run = if self.refcount(at)? == 0 { run + 1 } else { 0 };
            at += 1;
        }
        let first = at - count;
        self.set_refcounts(first, count, 1)?;
        self.check_free(first, count)?;
        self.take_fresh(first, count);
        Ok(first)
    }

    /// Gives back what was set aside and not used.
    pub fn give_back(&mut self) -> Result<(), Error> {
        let rest = std::mem::take(&mut self.reserve);
        if rest.is_empty() {
            return Ok(());
        }
        self.hint = self.hint.min(rest.start);
        self.set_refcounts(rest.start, rest.end - rest.start, 0)?;
        if self.ahead != rest.end {
            return Ok(());
        }
        self.ahead = 0;
        let bits = self.geo.cluster_bits;
        if self.file.size()? == rest.end << bits {
            self.file.set_len(rest.start << bits)?;
            self.file_end = self.file_end.min(rest.start << bits);
        } else {
            self.punch(&rest, true);
        }
        Ok(())
    }

    /// Cuts off what is free at the file's end.
    pub fn cut_end(&mut self) -> Result<(), Error> {
        if self.file.is_block_device() {
            return Ok(());
        }
        let bits = self.geo.cluster_bits;
        let mut end = self.file.size()?.div_ceil(1 << bits);
        let all = end;
        while end > 1 && self.refcount(end - 1)? == 0 {
            end -= 1;
            self.make_room()?;
        }
        if end < all {
            self.sync()?;
            self.file.set_len(end << bits)?;
            self.file_end = end << bits;
            // What comes back by growing is zeroes.
            self.fresh = end;
        }
        Ok(())
    }

    /// Reads the refcount table.
    pub fn load_refcount_table(&mut self) -> Result<(), Error> {
        let len = u64::from(self.header.refcount_clusters) << self.geo.cluster_bits;
        let offset = self.header.refcount_offset;
        if !self.in_file(offset)? {
            return Err(self.corrupt("its refcount table lies past the file's end".into()));
        }
        let mut data = vec![0; len as usize];
        self.file.read(offset, &[IoBuf::from_slice(&mut data)])?;
        self.refcount_table = super::words(&data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_keep_to_themselves() {
        for order in 0..=6 {
            let most = if order == 6 {
                u64::MAX
            } else {
                (1 << (1 << order)) - 1
            };
            let mut block = vec![0; 512];
            let count = (512 * 8) >> order;
            set_value(&mut block, order, 5, most);
            set_value(&mut block, order, count - 1, 1);
            assert_eq!(value(&block, order, 5), most);
            assert_eq!(value(&block, order, count - 1), 1);
            let sum: u32 = (0..count)
                .map(|at| u32::from(value(&block, order, at) != 0))
                .sum();
            assert_eq!(sum, 2, "order {order}");
            set_value(&mut block, order, 5, 0);
            assert_eq!(value(&block, order, 5), 0);
        }
        // Sub-byte refcounts begin at the least significant bit.
        let mut block = [0];
        set_value(&mut block, 0, 0, 1);
        assert_eq!(block, [1]);
    }
}
