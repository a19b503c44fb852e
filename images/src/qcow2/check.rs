//! Checking an image's structure, and repairing it.
//!
//! Every reference to every cluster is counted and compared with the refcounts, as `qemu-img
//! check` does it. Each L2 table is read once, however many snapshots share it, so the work is
//! bounded by the file's size.

use std::collections::HashMap;

use super::bitmap;
use super::cache::OffsetHash;
use super::entry::{COPIED, Entry, OFFSET, RESERVED};
use super::header::{self, Encryption, Header};
use super::refcount::{set_value, value};
use super::snapshot::Table;
use super::{Geometry, words};
use crate::{Error, File};

/// What to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fix {
    /// Nothing.
    #[default]
    None,
    /// Refcounts that are too high.
    Leaks,
    /// Refcounts, and the flags that depend on them: what a process that died may have left.
    Counts,
    /// All that can be, entries that point to nonsense among them: those read as zeroes then.
    All,
}

/// What a check found, counted as `qemu-img check` does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Clusters whose refcount is too high: lost space, nothing worse.
    pub leaks: u64,
    /// Contradictions that endanger data.
    pub corruptions: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Contradictions that were repaired.
    pub corruptions_fixed: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of these, with data of their own.
    pub allocated_clusters: u64,
    /// Of these, not following the one before.
    pub fragmented_clusters: u64,
    /// Of these, compressed.
    pub compressed_clusters: u64,
    /// Where the highest cluster in use ends, bytes.
    pub image_end_offset: u64,
    /// The first problems, in words.
    pub messages: Vec<String>,
}

const MESSAGES_MOST: usize = 100;
const PAGE: u64 = 1024;

/// References per cluster, for as many clusters as have any.
#[derive(Default)]
struct Counts(HashMap<u64, Box<[u32; PAGE as usize]>, OffsetHash>);

impl Counts {
    fn get(&self, cluster: u64) -> u64 {
        self.0
            .get(&(cluster / PAGE))
            .map_or(0, |page| u64::from(page[(cluster % PAGE) as usize]))
    }

    fn add(&mut self, cluster: u64, count: u32) {
        let page = self
            .0
            .entry(cluster / PAGE)
            .or_insert_with(|| Box::new([0; PAGE as usize]));
        let count_now = &mut page[(cluster % PAGE) as usize];
        *count_now = count_now.saturating_add(count);
    }

    fn drop_one(&mut self, cluster: u64) {
        if let Some(page) = self.0.get_mut(&(cluster / PAGE)) {
            let count = &mut page[(cluster % PAGE) as usize];
            *count = count.saturating_sub(1);
        }
    }

    /// The most references that any cluster has.
    fn most(&self) -> u64 {
        let pages = self.0.values().flat_map(|page| page.iter());
        pages.copied().max().map_or(0, u64::from)
    }

    /// Every cluster with a reference, in order.
    fn used(&self) -> Vec<u64> {
        let mut pages: Vec<_> = self.0.keys().copied().collect();
        pages.sort_unstable();
        let of = |page: u64| {
            let counts = &self.0[&page];
            (0..PAGE)
                .filter(move |&at| counts[at as usize] != 0)
                .map(move |at| page * PAGE + at)
        };
        pages.into_iter().flat_map(of).collect()
    }
}

impl Fix {
    fn counts(self) -> bool {
        matches!(self, Self::Counts | Self::All)
    }
}

struct Check<'a> {
    file: &'a File,
    fix: Fix,
    header: Header,
    geo: Geometry,
    file_size: u64,
    counts: Counts,
    table: Vec<u64>,
    /// Refcounts that differ from the count of references, as they are after repairs.
    differ: HashMap<u64, u64, OffsetHash>,
    /// The refcount structure itself can't be used.
    broken_table: bool,
    report: Report,
}

/// Checks the image in `file`, and repairs it as told.
///
/// # Errors
/// As [`Header::read`]; the host's I/O; [`Error::Corrupt`] where a table can't even be found.
pub fn check(file: &File, fix: Fix) -> Result<Report, Error> {
    let header = Header::read(file)?;
    let mut check = Check::new(file, header, fix)?;
    check.count()?;
    let unrepairable = check.report.corruptions;
    let wrong = check.compare(fix)?;
    check.fix_refcounts(fix, &wrong)?;
    check.copied_flags(fix)?;
    check.report.total_clusters = check.header.size.div_ceil(check.geo.cluster());
    if fix.counts() && unrepairable == 0 && check.report.corruptions == 0 {
        check.clear_bits()?;
    }
    if fix != Fix::None {
        file.sync()?;
    }
    Ok(check.report)
}

/// Gives the refcounts of the image in `file`, which has no errors, another width.
///
/// # Errors
/// [`Error::Invalid`] if the image has errors, or the new width can't count its references; the
/// host's I/O.
pub fn recount(file: &File, order: u32) -> Result<(), Error> {
    let header = Header::read(file)?;
    let mut check = Check::new(file, header, Fix::None)?;
    check.count()?;
    if check.report.corruptions > 0 {
        return Err(Error::Invalid(format!(
            "{} must be repaired first",
            file.name()
        )));
    }
    check.geo.refcount_order = order;
    check.header.refcount_order = order;
    let most = check.geo.refcount_most();
    if check.counts.most() > most {
        return Err(Error::Invalid(format!(
            "Cannot decrease refcount entry width to {} bits: a cluster has more than {most} \
             references",
            1_u64 << order
        )));
    }
    check.rebuild()
}

impl<'a> Check<'a> {
    fn new(file: &'a File, header: Header, fix: Fix) -> Result<Self, Error> {
        Ok(Self {
            file,
            fix,
            geo: Geometry::new(&header),
            header,
            file_size: file.size()?,
            counts: Counts::default(),
            table: Vec::new(),
            differ: HashMap::default(),
            broken_table: false,
            report: Report::default(),
        })
    }

    fn corruption(&mut self, message: String) {
        self.report.corruptions += 1;
        self.say(message);
    }

    fn say(&mut self, message: String) {
        if self.report.messages.len() < MESSAGES_MOST {
            self.report.messages.push(message);
        }
    }

    /// Counts references to a piece of the file.
    fn refer(&mut self, offset: u64, len: u64, times: u32, what: &str) {
        if !self.try_refer(offset, len, times) {
            self.corruption(format!("{what} at {offset:#x} lies past the file's end"));
        }
    }

    /// As `refer`; false, and nothing is counted, if it lies past the file's end.
    fn try_refer(&mut self, offset: u64, len: u64, times: u32) -> bool {
        let bits = self.geo.cluster_bits;
        if len == 0 {
            return true;
        }
        let end = offset.saturating_add(len);
        // The last cluster may be cut short.
        if end > self.file_size.next_multiple_of(self.geo.cluster()) {
            return false;
        }
        for cluster in offset >> bits..=(end - 1) >> bits {
            self.counts.add(cluster, times);
        }
        true
    }

    fn read_words(&self, offset: u64, bytes: u64) -> Result<Vec<u64>, Error> {
        let mut data = vec![0; bytes as usize];
        self.file.read_bytes(offset, &mut data)?;
        Ok(words(&data))
    }

    /// Counts all references.
    fn count(&mut self) -> Result<(), Error> {
        let geo = self.geo;
        let (bits, cluster) = (geo.cluster_bits, geo.cluster());
        let header = self.header.clone();
        self.refer(0, cluster, 1, "the header");
        // Tables: L2 offset -> how often it is referred to.
        let mut l2: HashMap<u64, u32, OffsetHash> = HashMap::default();
        let active = self.l1(
            header.l1_offset,
            header.l1_size,
            &mut l2,
            "the active L1 table",
        )?;
        let snapshots = Table::read(self.file, &header, geo)?;
        self.refer(
            header.snapshots_offset,
            snapshots.bytes,
            1,
            "the snapshot table",
        );
        let mut total = 0;
        for snapshot in &snapshots.list {
            total += u64::from(snapshot.l1_size);
            if total > 64 << 20 {
                return Err(Error::Unsupported {
                    image: self.file.name().to_owned(),
                    reason: "its snapshots have too many L1 entries".into(),
                });
            }
            self.l1(
                snapshot.l1_offset,
                snapshot.l1_size,
                &mut l2,
                "a snapshot's L1 table",
            )?;
        }
        // In the guest's order first, for the statistics.
        let mut last = 0;
        for &entry in &active {
            let table = entry & OFFSET;
            if let Some(times) = l2.remove(&table) {
                self.l2(table, times, Some(&mut last))?;
            }
        }
        let mut rest: Vec<_> = l2.into_iter().collect();
        rest.sort_unstable();
        for (table, times) in rest {
            self.l2(table, times, None)?;
        }
        if let Encryption::Luks { offset, length } = header.encryption {
            self.refer(offset, length, 1, "the LUKS header");
        }
        if let Some(place) = header.bitmaps {
            self.refer(place.offset, place.size, 1, "the bitmap directory");
            for bitmap in bitmap::directory(self.file, &header)? {
                let table = bitmap::table(self.file, &bitmap, cluster)?;
                self.refer(
                    bitmap.table_offset,
                    table.len() as u64 * 8,
                    1,
                    "a bitmap's table",
                );
                for entry in table {
                    if entry & OFFSET != 0 {
                        self.refer(entry & OFFSET, cluster, 1, "a bitmap's data");
                    }
                }
            }
        }
        let table_bytes = u64::from(header.refcount_clusters) << bits;
        self.refer(header.refcount_offset, table_bytes, 1, "the refcount table");
        self.table = self.read_words(header.refcount_offset, table_bytes)?;
        for index in 0..self.table.len() {
            let block = self.table[index];
            if block == 0 {
                continue;
            }
            if !block.is_multiple_of(cluster) || block >= self.file_size {
                self.corruption(format!("refcount block {index} is at {block:#x}"));
                self.broken_table = true;
                self.table[index] = 0;
                continue;
            }
            self.refer(block, cluster, 1, "a refcount block");
            if self.counts.get(block >> bits) != 1 {
                self.corruption(format!("refcount block {index} lies on something else"));
                self.broken_table = true;
            }
        }
        Ok(())
    }

    fn l1(
        &mut self,
        offset: u64,
        entries: u32,
        l2: &mut HashMap<u64, u32, OffsetHash>,
        what: &str,
    ) -> Result<Vec<u64>, Error> {
        let bytes = u64::from(entries) * 8;
        self.refer(offset, bytes, 1, what);
        let table = self.read_words(offset, bytes)?;
        for (index, entry) in table.iter().enumerate() {
            let offset = entry & OFFSET;
            if entry & !(OFFSET | COPIED) != 0 || !offset.is_multiple_of(self.geo.cluster()) {
                self.corruption(format!("{what}: entry {index} is {entry:#x}"));
            } else if offset != 0 {
                let times = l2.entry(offset).or_default();
                *times = times.saturating_add(1);
            }
        }
        Ok(table)
    }

    /// Counts what an L2 table refers to, and the table.
    fn l2(&mut self, offset: u64, times: u32, mut last: Option<&mut u64>) -> Result<(), Error> {
        let geo = self.geo;
        let before = self.report.corruptions;
        self.refer(offset, geo.cluster(), times, "an L2 table");
        if self.report.corruptions != before {
            return Ok(());
        }
        let mut table = vec![0; geo.cluster() as usize];
        self.file.read_bytes(offset, &mut table)?;
        let mut changed = false;
        for index in 0..1_usize << geo.l2_bits() {
            let entry = Entry::get(&geo, &table, index);
            if entry == Entry::default() {
                continue;
            }
            if !entry.is_compressed() && entry.raw & RESERVED != 0 {
                // What it means is not known: nothing that could be repaired.
                self.corruption(format!(
                    "ERROR found l2 entry with reserved bits set: {:x}",
                    entry.raw
                ));
            }
            let mut wrong = entry.problem(&geo);
            if wrong.is_none() && entry.is_compressed() {
                let (at, len) = entry.compressed(&geo);
                // Its last sector may be cut short.
                let len = len
                    .min(self.file_size.next_multiple_of(512).saturating_sub(at))
                    .max(1);
                if entry.raw & COPIED != 0 {
                    wrong = Some("it is compressed, but marked as copied");
                } else if !self.try_refer(at, len, times) {
                    wrong = Some("its compressed data lies past the file's end");
                } else if last.is_some() {
                    self.report.allocated_clusters += 1;
                    self.report.compressed_clusters += 1;
                    self.report.fragmented_clusters += 1;
                }
            } else if let (None, Some(host)) = (wrong, entry.host(&geo)) {
                if !geo.external && !self.try_refer(host, geo.cluster(), times) {
                    wrong = Some("its data lies past the file's end");
                } else if let Some(next) = last.as_deref_mut() {
                    self.report.allocated_clusters += 1;
                    self.report.fragmented_clusters += u64::from(*next != 0 && *next != host);
                    *next = host + geo.cluster();
                }
            }
            let Some(problem) = wrong else { continue };
            let message = format!("L2 table {offset:#x}, entry {index}: {problem}");
            if self.fix != Fix::All {
                self.corruption(message);
                continue;
            }
            self.say(message);
            self.report.corruptions_fixed += 1;
            changed = true;
            let new = if geo.version >= 3 {
                Entry::zero(&geo, 0)
            } else {
                Entry::default()
            };
            new.put(&geo, &mut table, index);
        }
        if changed {
            self.file.write_bytes(offset, &table)?;
        }
        Ok(())
    }

    /// Compares refcounts with references: which clusters differ, and whether all can be
    /// repaired in place.
    fn compare(&mut self, fix: Fix) -> Result<Vec<(u64, u64)>, Error> {
        let geo = self.geo;
        let per = geo.refcounts();
        let clusters = self.file_size.div_ceil(geo.cluster());
        let mut wrong = Vec::new();
        let mut highest = 0;
        let mut block = vec![0; geo.cluster() as usize];
        for index in 0..self.table.len() {
            if self.table[index] == 0 {
                continue;
            }
            self.file.read_bytes(self.table[index], &mut block)?;
            let first = index as u64 * per;
            for cluster in first..(first + per) {
                let stored = value(&block, geo.refcount_order, (cluster - first) as usize);
                let counted = self.counts.get(cluster);
                if stored != 0 || counted != 0 {
                    highest = highest.max(if cluster < clusters { cluster } else { highest });
                }
                if stored == counted {
                    continue;
                }
                wrong.push((cluster, counted));
                // What lies past the file's end takes no space.
                if stored > counted && cluster >= clusters {
                    continue;
                }
                self.count_wrong(cluster, stored, counted, fix, false);
            }
        }
        for cluster in self.counts.used() {
            let index = (cluster / per) as usize;
            if self.table.get(index).copied().unwrap_or(0) == 0 {
                let counted = self.counts.get(cluster);
                highest = highest.max(cluster);
                self.count_wrong(cluster, 0, counted, fix, true);
            }
        }
        self.report.image_end_offset = (highest + 1) << geo.cluster_bits;
        Ok(wrong)
    }

    fn count_wrong(&mut self, cluster: u64, stored: u64, counted: u64, fix: Fix, no_block: bool) {
        let fixed = fix.counts() || fix == Fix::Leaks && stored > counted;
        let what = match (fixed, stored > counted) {
            (true, _) => "Repairing",
            (false, true) => "Leaked",
            (false, false) => "ERROR",
        };
        self.say(format!(
            "{what} cluster {cluster} refcount={stored} reference={counted}"
        ));
        if !fixed {
            self.differ.insert(cluster, stored);
        }
        if stored < counted {
            self.broken_table |= no_block;
            if fix.counts() {
                self.report.corruptions_fixed += 1;
            } else {
                self.report.corruptions += 1;
            }
        } else if fix == Fix::None {
            self.report.leaks += 1;
        } else {
            self.report.leaks_fixed += 1;
        }
    }

    fn fix_refcounts(&mut self, fix: Fix, wrong: &[(u64, u64)]) -> Result<(), Error> {
        let geo = self.geo;
        if fix.counts() && self.broken_table {
            return self.rebuild();
        }
        if fix == Fix::None || wrong.is_empty() {
            return Ok(());
        }
        let per = geo.refcounts();
        let mut data = vec![0; geo.cluster() as usize];
        for run in wrong.chunk_by(|a, b| a.0 / per == b.0 / per) {
            let at = self.table[(run[0].0 / per) as usize];
            self.file.read_bytes(at, &mut data)?;
            for &(cluster, counted) in run {
                let index = (cluster % per) as usize;
                let stored = value(&data, geo.refcount_order, index);
                if fix.counts() || stored > counted {
                    set_value(
                        &mut data,
                        geo.refcount_order,
                        index,
                        counted.min(geo.refcount_most()),
                    );
                }
            }
            self.file.write_bytes(at, &data)?;
        }
        Ok(())
    }

    /// Makes a new refcount table with new blocks, behind everything that is in use.
    fn rebuild(&mut self) -> Result<(), Error> {
        let geo = self.geo;
        let (bits, cluster, per) = (geo.cluster_bits, geo.cluster(), geo.refcounts());
        // The old ones are no longer needed.
        let old = self.header.refcount_offset >> bits;
        for at in old..old + u64::from(self.header.refcount_clusters) {
            self.counts.drop_one(at);
        }
        for block in std::mem::take(&mut self.table) {
            if block != 0 {
                self.counts.drop_one(block >> bits);
            }
        }
        let used = self.counts.used();
        let start = self
            .file_size
            .div_ceil(cluster)
            .max(used.last().map_or(1, |last| last + 1));
        let old_blocks: std::collections::BTreeSet<u64> = used.iter().map(|at| at / per).collect();
        let (mut blocks, mut table) = (1, 1);
        let all = loop {
            let end = start + blocks + table;
            let mut all = old_blocks.clone();
            all.extend(start / per..=(end - 1) / per);
            let entries = all.last().map_or(1, |last| last + 1);
            let (b, t) = (all.len() as u64, (entries * 8).div_ceil(cluster));
            if b <= blocks && t <= table {
                break all;
            }
            (blocks, table) = (b.max(blocks), t.max(table));
        };
        if table * cluster > (8 << 20).max(cluster) {
            return Err(Error::Invalid(format!(
                "{} can't grow any more",
                self.file.name()
            )));
        }
        for at in start..start + blocks + table {
            self.counts.add(at, 1);
        }
        let mut entries = vec![0_u64; (table * cluster / 8) as usize];
        // As many blocks as were counted get a place; a spare one stays empty.
        let mut places = start..start + blocks;
        for index in all {
            let Some(place) = places.next() else { break };
            let mut data = vec![0; cluster as usize];
            for at in 0..per {
                let count = self.counts.get(index * per + at);
                if count != 0 {
                    set_value(
                        &mut data,
                        geo.refcount_order,
                        at as usize,
                        count.min(geo.refcount_most()),
                    );
                }
            }
            self.file.write_bytes(place << bits, &data)?;
            entries[index as usize] = place << bits;
        }
        let at = (start + blocks) << bits;
        let data: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        self.file.write_bytes(at, &data)?;
        self.file.sync()?;
        self.header.refcount_offset = at;
        self.header.refcount_clusters = table as u32;
        // All that says how refcounts are stored lies in one sector and is written at once.
        let mut fields =
            vec![0; (header::at::REFCOUNT_ORDER + 4 - header::at::REFCOUNT_TABLE) as usize];
        self.file
            .read_bytes(header::at::REFCOUNT_TABLE, &mut fields)?;
        fields[..8].copy_from_slice(&at.to_be_bytes());
        fields[8..12].copy_from_slice(&self.header.refcount_clusters.to_be_bytes());
        let order = (header::at::REFCOUNT_ORDER - header::at::REFCOUNT_TABLE) as usize;
        if geo.version >= 3 {
            fields[order..].copy_from_slice(&geo.refcount_order.to_be_bytes());
        } else {
            fields.truncate(12);
        }
        self.file.write_bytes(header::at::REFCOUNT_TABLE, &fields)?;
        self.file.sync()?;
        self.table = entries;
        Ok(())
    }

    /// The flags that say that a refcount is one, where they matter: in the active tables.
    fn copied_flags(&mut self, fix: Fix) -> Result<(), Error> {
        let geo = self.geo;
        let (offset, bytes) = (self.header.l1_offset, u64::from(self.header.l1_size) * 8);
        let mut l1 = self.read_words(offset, bytes)?;
        let mut l1_changed = false;
        let mut seen = std::collections::HashSet::new();
        let mut data = vec![0; geo.cluster() as usize];
        for (index, place) in l1.iter_mut().enumerate() {
            let table = *place & OFFSET;
            if table == 0
                || !table.is_multiple_of(geo.cluster())
                || table >= self.file_size
                || !seen.insert(table)
            {
                continue;
            }
            let right = self.with_flag(*place, table);
            if right != *place {
                self.flag_wrong(format!("L1 entry {index} is {:#x}", *place), fix);
                if fix.counts() {
                    *place = right;
                    l1_changed = true;
                }
            }
            self.file.read_bytes(table, &mut data)?;
            let mut changed = false;
            for at in 0..1_usize << geo.l2_bits() {
                let mut entry = Entry::get(&geo, &data, at);
                let Some(host) = entry
                    .host(&geo)
                    .filter(|_| !geo.external && entry.problem(&geo).is_none())
                else {
                    continue;
                };
                let right = self.with_flag(entry.raw, host);
                if right != entry.raw {
                    self.flag_wrong(
                        format!("L2 table {table:#x}, entry {at} is {:#x}", entry.raw),
                        fix,
                    );
                    entry.raw = right;
                    entry.put(&geo, &mut data, at);
                    changed = true;
                }
            }
            if changed && fix.counts() {
                self.file.write_bytes(table, &data)?;
            }
        }
        if l1_changed {
            let data: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.file.write_bytes(offset, &data)?;
        }
        Ok(())
    }

    fn flag_wrong(&mut self, message: String, fix: Fix) {
        if fix.counts() {
            self.report.corruptions_fixed += 1;
            self.say(message);
        } else {
            self.corruption(message);
        }
    }

    fn with_flag(&self, entry: u64, offset: u64) -> u64 {
        let cluster = offset >> self.geo.cluster_bits;
        let refcount = self
            .differ
            .get(&cluster)
            .copied()
            .unwrap_or_else(|| self.counts.get(cluster));
        if refcount == 1 {
            entry | COPIED
        } else {
            entry & !COPIED
        }
    }

    fn clear_bits(&mut self) -> Result<(), Error> {
        let bits = self.header.incompatible & !(header::DIRTY | header::CORRUPT);
        if self.geo.version >= 3 && bits != self.header.incompatible {
            self.file.sync()?;
            self.file
                .write_bytes(header::at::INCOMPATIBLE, &bits.to_be_bytes())?;
        }
        Ok(())
    }
}
