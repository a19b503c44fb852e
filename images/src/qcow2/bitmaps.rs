//! Persistent bitmaps in use: kept up to date in memory while the image is open, marked as in use
//! in the file from the first change on, and stored when it is closed. A process that dies leaves
//! them marked: who comes next knows that they are not right.

use super::Qcow2;
use super::bitmap::{self, AUTO, Bitmap, DIRTY_TRACKING, IN_USE};
use super::bits::{BYTES_MOST, Bits};
use super::header::{self, BitmapDirectory, Header};
use super::meta::Meta;
use crate::{Error, Image};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Of a table's entry without an offset: all bits are set.
const ALL_ONES: u64 = 1;
/// QEMU's bounds.
const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;
const NAME_MOST: usize = 1023;
const COUNT_MOST: usize = 65_535;

/// What is to be known of a persistent bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk that a bit stands for.
    pub granularity: u64,
    /// It records writes.
    pub auto: bool,
    /// It was not stored after its last change: what it says can't be relied on.
    pub in_use: bool,
}

/// A bitmap of an open image.
#[derive(Debug)]
pub struct Tracked {
    disk: Bitmap,
    /// Its bits; none if it is not right, and can only be removed.
    bits: Option<Bits>,
    /// The bits, or its flags, are not what the file has.
    changed: bool,
    /// It is marked as in use in the file, by us.
    marked: bool,
}

impl Tracked {
    fn auto(&self) -> bool {
        self.disk.flags & AUTO != 0
    }
}

impl Meta {
    /// Reads all bitmaps, if that was not done before.
    fn load_bitmaps(&mut self) -> Result<&mut Vec<Tracked>, Error> {
        if self.bitmaps.is_none() {
            let mut list = Vec::new();
            let trusted = self.header.autoclear & header::BITMAPS != 0;
            for mut disk in bitmap::directory(&self.file, &self.header)? {
                if !trusted {
                    // Somebody wrote to the image who knew nothing of bitmaps.
                    disk.flags |= IN_USE;
                }
                let mut bits = None;
                if disk.flags & IN_USE == 0 {
                    match self.load_bits(&disk) {
                        Ok(loaded) => bits = Some(loaded),
                        Err(error) => log::warn!("bitmap {:?}: {error}", disk.name),
                    }
                }
                list.push(Tracked {
                    disk,
                    bits,
                    changed: false,
                    marked: false,
                });
            }
            self.bitmaps = Some(list);
        }
        Ok(self.bitmaps.get_or_insert_default())
    }

    fn load_bits(&self, disk: &Bitmap) -> Result<Bits, Error> {
        let cluster = self.geo.cluster();
        let corrupt = |reason: &str| Error::Corrupt {
            image: self.file.name().to_owned(),
            reason: format!("bitmap {:?}: {reason}", disk.name),
        };
        if disk.kind != DIRTY_TRACKING {
            return Err(corrupt("it is of a kind that is not known"));
        }
        if !GRANULARITY_BITS.contains(&u32::from(disk.granularity_bits)) {
            return Err(corrupt("its granularity makes no sense"));
        }
        let mut bits = Bits::default();
        let mut data = vec![0; cluster as usize];
        let all = self.header.size.div_ceil(1 << disk.granularity_bits);
        for (index, entry) in bitmap::table(&self.file, disk, cluster)?
            .into_iter()
            .enumerate()
        {
            let first = index as u64 * cluster * 8;
            match entry & OFFSET {
                0 if entry & ALL_ONES != 0 => {
                    let end = (first + cluster * 8).min(all);
                    if end.saturating_sub(first) / 8 > BYTES_MOST {
                        return Err(corrupt("it is too large"));
                    }
                    bits.set(first, end);
                }
                0 => {}
                offset if offset >= self.file.size()? => {
                    return Err(corrupt("it lies past the file's end"));
                }
                offset => {
                    self.file.read_bytes(offset, &mut data)?;
                    bits.load(first, &data);
                }
            }
            if bits.memory() > BYTES_MOST {
                return Err(corrupt("it is too large"));
            }
        }
        bits.truncate(all);
        Ok(bits)
    }

    /// Before the first change: bitmaps that record it are marked as in use.
    pub fn begin_bitmaps(&mut self) -> Result<(), Error> {
        if self.header.autoclear & header::BITMAPS == 0 || self.header.bitmaps.is_none() {
            return Ok(());
        }
        self.load_bitmaps()?;
        self.mark_bitmaps(|one| one.auto())
    }

    fn mark_bitmaps(&mut self, which: impl Fn(&Tracked) -> bool) -> Result<(), Error> {
        let mut changed = false;
        for one in self.bitmaps.iter_mut().flatten() {
            // What is not in the directory yet has no place there.
            if which(one) && !one.marked && one.disk.flags & IN_USE == 0 && one.disk.entry != 0 {
                self.file.write_bytes(
                    one.disk.entry + 12,
                    &(one.disk.flags | IN_USE).to_be_bytes(),
                )?;
                one.marked = true;
                changed = true;
            }
        }
        if changed { self.sync() } else { Ok(()) }
    }

    /// These bytes of the disk are written.
    pub fn record(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        self.tell_trackers(offset, len);
        for one in self.bitmaps.iter_mut().flatten() {
            if one.auto()
                && let Some(bits) = &mut one.bits
            {
                let shift = one.disk.granularity_bits;
                bits.set(offset >> shift, ((offset + len - 1) >> shift) + 1);
                one.changed = true;
            }
        }
    }

    /// The disk has another size. All bitmaps that are right follow.
    pub fn resize_bitmaps(&mut self, size: u64) -> Result<(), Error> {
        if self.header.bitmaps.is_none() {
            return Ok(());
        }
        self.load_bitmaps()?;
        self.mark_bitmaps(|_| true)?;
        for one in self.bitmaps.iter_mut().flatten() {
            if let Some(bits) = &mut one.bits {
                bits.truncate(size.div_ceil(1 << one.disk.granularity_bits));
                one.changed = true;
            }
        }
        Ok(())
    }

    /// Writes what has changed, and then a directory that says so.
    pub fn store_bitmaps(&mut self) -> Result<(), Error> {
        let Some(mut list) = self.bitmaps.take() else {
            return Ok(());
        };
        let before = self.header.bitmaps;
        let same = before.map_or(0, |place| place.count as usize) == list.len()
            && !list.iter().any(|one| one.changed || one.marked);
        if same || self.broken.is_some() {
            self.bitmaps = Some(list);
            return Ok(());
        }
        let old = self.bitmap_clusters(&self.header)?;
        let mut kept = std::collections::HashSet::new();
        for one in &mut list {
            if one.changed || one.disk.table_offset == 0 {
                self.store_bits(one)?;
            } else {
                kept.extend(self.clusters_of(&one.disk)?);
            }
        }
        let mut directory = Vec::new();
        for one in &mut list {
            one.disk.entry = directory.len() as u64;
            bitmap::put(&one.disk, &mut directory);
        }
        let place = if directory.is_empty() {
            None
        } else {
            let cluster = self.geo.cluster();
            let clusters = (directory.len() as u64).div_ceil(cluster);
            let at = self.allocate_row(clusters)?;
            let offset = at << self.geo.cluster_bits;
            self.fixed.extend(at..at + clusters);
            let mut data = directory.clone();
            data.resize((clusters * cluster) as usize, 0);
            self.file.write_bytes(offset, &data)?;
            for one in &mut list {
                one.disk.entry += offset;
            }
            Some(BitmapDirectory {
                count: list.len() as u32,
                size: directory.len() as u64,
                offset,
            })
        };
        self.write_refcounts()?;
        self.sync()?;
        self.header.bitmaps = place;
        self.header.autoclear &= !header::BITMAPS;
        if place.is_some() {
            self.header.autoclear |= header::BITMAPS;
        }
        self.write_header()?;
        for one in &mut list {
            (one.changed, one.marked) = (false, false);
        }
        self.bitmaps = Some(list);
        for cluster in old {
            if !kept.contains(&cluster) {
                self.release(cluster, 1, true)?;
            }
        }
        Ok(())
    }

    /// The clusters of the directory and of all bitmaps.
    fn bitmap_clusters(&self, header: &Header) -> Result<Vec<u64>, Error> {
        let bits = self.geo.cluster_bits;
        let mut all = bitmap::metadata(&self.file, header)?;
        if let Some(place) = header.bitmaps {
            all.extend(
                place.offset >> bits..(place.offset + place.size).div_ceil(self.geo.cluster()),
            );
        }
        Ok(all)
    }

    fn clusters_of(&self, disk: &Bitmap) -> Result<Vec<u64>, Error> {
        let (bits, cluster) = (self.geo.cluster_bits, self.geo.cluster());
        let table = bitmap::table(&self.file, disk, cluster)?;
        let end = (disk.table_offset + table.len() as u64 * 8).div_ceil(cluster);
        let mut all: Vec<u64> = (disk.table_offset >> bits..end).collect();
        all.extend(
            table
                .iter()
                .map(|entry| entry & OFFSET)
                .filter(|&offset| offset != 0)
                .map(|offset| offset >> bits),
        );
        Ok(all)
    }

    fn store_bits(&mut self, one: &mut Tracked) -> Result<(), Error> {
        let (bits, cluster) = (self.geo.cluster_bits, self.geo.cluster());
        let Some(content) = &one.bits else {
            // Not right, and left as it is.
            return Ok(());
        };
        let all = self
            .header
            .size
            .div_ceil(1 << one.disk.granularity_bits)
            .div_ceil(8);
        let entries = all.div_ceil(cluster).max(u64::from(all == 0));
        let mut table = Vec::new();
        for index in 0..entries {
            let Some(data) = content.store(index * cluster * 8, cluster as usize) else {
                table.extend(0_u64.to_be_bytes());
                continue;
            };
            let (at, _) = self.allocate(1)?;
            self.take_fresh(at, 1);
            self.fixed.insert(at);
            self.file.write_bytes(at << bits, &data)?;
            table.extend((at << bits).to_be_bytes());
        }
        let clusters = (table.len() as u64).div_ceil(cluster);
        let at = self.allocate_row(clusters)?;
        self.fixed.extend(at..at + clusters);
        one.disk.table_offset = at << bits;
        one.disk.table_size = entries as u32;
        table.resize((clusters * cluster) as usize, 0);
        self.file.write_bytes(at << bits, &table)
    }

    /// Writes the header as it is in memory, with the names behind it.
    pub fn write_header(&mut self) -> Result<(), Error> {
        let data = self
            .header
            .to_bytes()
            .map_err(|reason| Error::Invalid(format!("{}: {reason}", self.file.name())))?;
        self.file.write_bytes(0, &data)?;
        self.sync()
    }
}

impl Qcow2 {
    /// The persistent bitmaps.
    ///
    /// # Errors
    /// The host's I/O, a corrupt image.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>, Error> {
        let mut meta = self.meta();
        let info = |disk: &Bitmap, in_use| BitmapInfo {
            name: disk.name.clone(),
            granularity: 1_u64.checked_shl(disk.granularity_bits.into()).unwrap_or(0),
            auto: disk.flags & AUTO != 0,
            in_use,
        };
        if !self.writable {
            let trusted = meta.header.autoclear & header::BITMAPS != 0;
            let header = meta.header.clone();
            let list = bitmap::directory(&meta.file, &header)?;
            return Ok(list
                .iter()
                .map(|disk| info(disk, disk.flags & IN_USE != 0 || !trusted))
                .collect());
        }
        Ok(meta
            .load_bitmaps()?
            .iter()
            .map(|one| info(&one.disk, one.bits.is_none()))
            .collect())
    }

    /// The bits of a bitmap that is right, and the bytes each stands for.
    ///
    /// # Errors
    /// [`Error::Invalid`]: there is none, or it is not right.
    pub fn bitmap_bits(&self, name: &str) -> Result<(Bits, u64), Error> {
        let mut meta = self.meta();
        let list = meta.load_bitmaps()?;
        let one = find(list, name)?;
        let bits = right(one)?.clone();
        Ok((bits, 1 << one.disk.granularity_bits))
    }

    /// A new bitmap, empty. Without a granularity it has QEMU's default.
    ///
    /// # Errors
    /// [`Error::Invalid`]: there is one of that name, or no such granularity.
    pub fn bitmap_add(
        &self,
        name: &str,
        granularity: Option<u64>,
        auto: bool,
    ) -> Result<(), Error> {
        let granularity = granularity.unwrap_or_else(|| self.geo.cluster().clamp(4096, 65536));
        if !granularity.is_power_of_two() {
            return Err(Error::Invalid("Granularity must be power of 2".into()));
        }
        let shift = granularity.trailing_zeros();
        if shift < *GRANULARITY_BITS.start() {
            let least = 1 << GRANULARITY_BITS.start();
            return Err(Error::Invalid(format!(
                "Granularity must be at least {least}"
            )));
        }
        if shift > *GRANULARITY_BITS.end() {
            return Err(Error::Invalid(format!(
                "Granularity exceeds maximum ({} bytes)",
                1_u64 << GRANULARITY_BITS.end()
            )));
        }
        if name.is_empty() {
            return Err(Error::Invalid("Bitmap name cannot be empty".into()));
        }
        if name.len() > NAME_MOST {
            return Err(Error::Invalid(format!(
                "Bitmap name is longer than {NAME_MOST} bytes"
            )));
        }
        let mut meta = self.changing()?;
        if self.geo.version < 3 {
            return Err(Error::Invalid(
                "Cannot store dirty bitmaps in qcow2 v2 files".into(),
            ));
        }
        let bytes = self.size().div_ceil(granularity).div_ceil(8);
        if bytes > BYTES_MOST {
            return Err(Error::Invalid(
                "Bitmap with this granularity would be too large".into(),
            ));
        }
        let list = meta.load_bitmaps()?;
        if list.iter().any(|one| one.disk.name == name) {
            return Err(Error::Invalid(format!("Bitmap already exists: {name}")));
        }
        if list.len() >= COUNT_MOST {
            return Err(Error::Invalid(
                "Maximum number of persistent bitmaps is already reached".into(),
            ));
        }
        list.push(Tracked {
            disk: Bitmap {
                name: name.to_owned(),
                raw_name: name.as_bytes().to_vec(),
                extra: Vec::new(),
                entry: 0,
                table_offset: 0,
                table_size: 0,
                flags: if auto { AUTO } else { 0 },
                granularity_bits: shift as u8,
                kind: DIRTY_TRACKING,
            },
            bits: Some(Bits::default()),
            changed: true,
            marked: false,
        });
        Ok(())
    }

    /// Removes a bitmap, one that is not right too.
    ///
    /// # Errors
    /// [`Error::Invalid`]: there is none.
    pub fn bitmap_remove(&self, name: &str) -> Result<(), Error> {
        let mut meta = self.changing()?;
        let list = meta.load_bitmaps()?;
        find(list, name)?;
        list.retain(|one| one.disk.name != name);
        Ok(())
    }

    /// Changes a bitmap that is right: `change` is given its bits and whether it records writes.
    fn change_bitmap(
        &self,
        name: &str,
        change: impl FnOnce(&mut Bits, &mut u32, u64),
    ) -> Result<(), Error> {
        let mut meta = self.changing()?;
        right(find(meta.load_bitmaps()?, name)?)?;
        meta.mark_bitmaps(|one| one.disk.name == name)?;
        let one = find(meta.load_bitmaps()?, name)?;
        if let Some(bits) = &mut one.bits {
            change(bits, &mut one.disk.flags, 1 << one.disk.granularity_bits);
            one.changed = true;
        }
        Ok(())
    }

    /// No bit of it is set any more.
    ///
    /// # Errors
    /// [`Error::Invalid`]: there is none, or it is not right.
    pub fn bitmap_clear(&self, name: &str) -> Result<(), Error> {
        self.change_bitmap(name, |bits, _, _| bits.clear())
    }

    /// Whether it records writes from now on.
    ///
    /// # Errors
    /// As [`Qcow2::bitmap_clear`].
    pub fn bitmap_enable(&self, name: &str, enable: bool) -> Result<(), Error> {
        self.change_bitmap(name, |_, flags, _| {
            *flags = if enable {
                *flags | AUTO
            } else {
                *flags & !AUTO
            };
        })
    }

    /// Sets the bits that are set in `from`, which stand for `granularity` bytes each.
    ///
    /// # Errors
    /// As [`Qcow2::bitmap_clear`].
    pub fn bitmap_merge(&self, name: &str, from: &Bits, granularity: u64) -> Result<(), Error> {
        let size = self.size();
        self.change_bitmap(name, |bits, _, ours| {
            bits.merge(from, granularity, ours);
            bits.truncate(size.div_ceil(ours));
        })
    }
}

fn find<'a>(list: &'a mut [Tracked], name: &str) -> Result<&'a mut Tracked, Error> {
    list.iter_mut()
        .find(|one| one.disk.name == name)
        .ok_or_else(|| Error::Invalid(format!("Dirty bitmap '{name}' not found")))
}

fn right(one: &Tracked) -> Result<&Bits, Error> {
    one.bits.as_ref().ok_or_else(|| {
        Error::Invalid(format!(
            "Bitmap '{}' is inconsistent and cannot be used",
            one.disk.name
        ))
    })
}
