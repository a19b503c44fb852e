//! qcow2 images, versions 2 and 3 (QEMU's docs/interop/qcow2).

mod absent;
mod amend;
mod bitmap;
mod bitmaps;
mod bits;
mod cache;
mod check;
mod claim;
mod compress;
mod create;
mod entry;
mod header;
mod io;
mod meta;
mod pull;
mod refcount;
mod resize;
mod snapshot;
mod snapshots;
mod zero;

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

pub use absent::NoBacking;
pub use amend::{Amend, amend};
pub use bitmaps::BitmapInfo;
pub use bits::Bits;
pub use check::{Fix, Report, check};
pub use create::{Create, Encrypt, Preallocation, create};
pub use header::{BitmapDirectory, Compression, Encryption, Header};
pub use pull::Tracker;
pub use snapshot::Snapshot;

use self::cache::Cache;
use self::entry::OFFSET;
use self::meta::{Meta, Place};
use crate::grace::Grace;
use crate::image::{Hold, Plain, check_range};
use crate::{Cipher, Error, Extent, File, Image, ImageInfo, IoBuf, iovec};

/// Bytes of L2 tables that are kept in memory when the user does not say: enough for 256 GiB
/// with the usual cluster size.
pub const L2_CACHE: usize = 32 << 20;
const REFCOUNT_CACHE: usize = 4 << 20;
/// L2 tables are read and written in pieces of this many bytes.
const SLICE: u64 = 4096;

/// What is fixed about an image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_order: u32,
    pub extended: bool,
    /// Guest data is in a file of its own.
    pub external: bool,
    /// That file by itself is a raw image.
    pub raw: bool,
    /// Bits of a subcluster's size (a cluster's without extended entries).
    pub sub_bits: u32,
}

impl Geometry {
    pub(crate) fn new(header: &Header) -> Self {
        let extended = header.incompatible & header::EXTENDED_L2 != 0;
        Self {
            version: header.version,
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            extended,
            external: header.incompatible & header::DATA_FILE != 0,
            raw: header.autoclear & header::DATA_FILE_RAW != 0,
            sub_bits: header.cluster_bits - if extended { 5 } else { 0 },
        }
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) fn entry_size(&self) -> usize {
        if self.extended { 16 } else { 8 }
    }

    /// Bits of the number of entries of an L2 table.
    pub(crate) fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended { 4 } else { 3 }
    }

    fn slice(&self) -> u64 {
        SLICE.min(self.cluster())
    }

    fn slice_entries(&self) -> u64 {
        self.slice() / self.entry_size() as u64
    }

    /// The piece of its L2 table that has guest cluster `guest`: its offset in the table and the
    /// entry's index in it.
    fn slice_of(&self, guest: u64) -> (u64, usize) {
        let index = guest & ((1 << self.l2_bits()) - 1);
        let per = self.slice_entries();
        (index / per * self.slice(), (index % per) as usize)
    }

    /// Refcounts in a refcount block.
    pub(crate) fn refcounts(&self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// The highest refcount.
    pub(crate) fn refcount_most(&self) -> u64 {
        if self.refcount_order == 6 {
            u64::MAX
        } else {
            (1 << (1 << self.refcount_order)) - 1
        }
    }
}

/// Big-endian words.
fn words(data: &[u8]) -> Vec<u64> {
    data.chunks_exact(8)
        .filter_map(|b| b.try_into().ok())
        .map(u64::from_be_bytes)
        .collect()
}

/// What an image is opened with.
#[derive(Debug, Default)]
pub struct Options {
    /// The image's backing file, if it names one. Without it such an image can't be opened.
    pub backing: Option<Arc<dyn Image>>,
    /// The external data file, if the image has one.
    pub data_file: Option<File>,
    /// Decrypts an encrypted image.
    pub cipher: Option<Arc<dyn Cipher>>,
    /// Bytes of L2 tables to keep in memory; 0 is [`L2_CACHE`].
    pub l2_cache: usize,
    /// The file is writable, but the image is not to be written to.
    pub read_only: bool,
    /// The content of this internal snapshot (its id or name) is meant; it can only be read.
    pub snapshot: Option<String>,
}

/// An open qcow2 image.
#[derive(Debug)]
pub struct Qcow2 {
    file: Arc<File>,
    data: Arc<File>,
    backing: Option<Arc<dyn Image>>,
    cipher: Option<Arc<dyn Cipher>>,
    geo: Geometry,
    compression: Compression,
    writable: bool,
    size: AtomicU64,
    meta: Mutex<Meta>,
    /// Somebody has mapped what he was busy with.
    mapped: Condvar,
    grace: Arc<Grace>,
    flushing: Mutex<()>,
    unpacked: compress::Unpacked,
    /// With encryption: held for writing by who writes parts of sectors.
    sectors: RwLock<()>,
    /// Zeroes are stated, whatever is behind.
    explicit: AtomicBool,
}

impl Qcow2 {
    /// Opens the image in `file`, for writing if the file is and the options don't forbid it. A
    /// dirty image that is opened for writing is repaired.
    ///
    /// # Errors
    /// [`Error::Unsupported`] and [`Error::Corrupt`] as the header says, [`Error::Invalid`] when
    /// the options lack something the image needs, the host's I/O.
    pub fn open(file: File, options: Options) -> Result<Self, Error> {
        let mut header = Header::read(&file)?;
        let name = file.name().to_owned();
        let lacks = |what: &str| Err(Error::Invalid(format!("{name} needs its {what}")));
        if header.backing.is_some() && options.backing.is_none() {
            return lacks("backing file");
        }
        if header.incompatible & header::DATA_FILE != 0 && options.data_file.is_none() {
            return lacks("data file");
        }
        if header.encryption != Encryption::None && options.cipher.is_none() {
            return lacks("passphrase");
        }
        let mut writable = file.writable() && !options.read_only;
        if let Some(wanted) = &options.snapshot {
            writable = false;
            snapshot::Table::read(&file, &header, Geometry::new(&header))?
                .find(wanted)
                .ok_or_else(|| Error::Invalid(format!("{name} has no snapshot {wanted:?}")))?
                .take_place(&mut header);
        }
        if writable && header.incompatible & header::CORRUPT != 0 {
            return Err(Error::Corrupt {
                image: name,
                reason: "it is marked so; it can only be read until it is repaired".into(),
            });
        }
        if writable && header.incompatible & header::DIRTY != 0 {
            let report = check(&file, Fix::Counts)?;
            log::warn!(
                "{name} was not closed: {} refcounts repaired",
                report.corruptions_fixed + report.leaks_fixed
            );
            header = Header::read(&file)?;
            if header.incompatible & header::DIRTY != 0 {
                let reason = report
                    .messages
                    .first()
                    .cloned()
                    .unwrap_or_else(|| "it can't be repaired".into());
                return Err(Error::Corrupt {
                    image: name,
                    reason,
                });
            }
        }
        let geo = Geometry::new(&header);
        let data_file = options.data_file.map(Arc::new);
        if writable && data_file.as_ref().is_some_and(|data| !data.writable()) {
            return Err(Error::Invalid(format!(
                "{name}: its data file is not open for writing"
            )));
        }
        let file = Arc::new(file);
        let l2_cache = if options.l2_cache == 0 {
            L2_CACHE
        } else {
            options.l2_cache
        };
        let mut meta = Meta {
            file: file.clone(),
            data_file: data_file.clone(),
            geo,
            l1: Vec::new(),
            l1_dirty: BTreeSet::new(),
            l2: Cache::new(geo.slice() as usize, l2_cache),
            refcounts: Cache::new(geo.cluster() as usize, REFCOUNT_CACHE),
            refcount_table: Vec::new(),
            refcount_table_dirty: BTreeSet::new(),
            fixed: HashSet::default(),
            hint: 0,
            reserve: 0..0,
            set_aside: writable && !file.is_block_device() && file.direct().is_none(),
            ahead: 0,
            fresh: if file.is_block_device() {
                u64::MAX
            } else {
                file.size()?.div_ceil(geo.cluster())
            },
            busy: Vec::new(),
            freed: Vec::new(),
            pack: 0,
            written: 0,
            stable: 0,
            freed_written: 0,
            begun: false,
            bitmaps: None,
            trackers: Vec::new(),
            broken: None,
            file_end: file.size()?,
            header,
        };
        meta.load_l1()?;
        if writable {
            meta.load_refcount_table()?;
            meta.collect_fixed()?;
        }
        Ok(Self {
            data: data_file.unwrap_or_else(|| file.clone()),
            file,
            backing: options.backing.filter(|_| meta.header.backing.is_some()),
            cipher: options
                .cipher
                .filter(|_| meta.header.encryption != Encryption::None),
            geo,
            compression: meta.header.compression,
            writable,
            size: AtomicU64::new(meta.header.size),
            meta: Mutex::new(meta),
            mapped: Condvar::new(),
            grace: Arc::default(),
            flushing: Mutex::new(()),
            unpacked: compress::Unpacked::default(),
            sectors: RwLock::new(()),
            explicit: AtomicBool::new(false),
        })
    }

    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The header as it is now.
    #[must_use]
    pub fn header(&self) -> Header {
        self.meta().header.clone()
    }

    fn check_writable(&self) -> Result<(), Error> {
        if self.writable {
            return Ok(());
        }
        Err(Error::Io {
            what: format!("writing {}", self.file.name()),
            source: std::io::Error::from_raw_os_error(libc::EROFS),
        })
    }

    /// The lock, for a change: what must precede the first one has happened.
    fn changing(&self) -> Result<MutexGuard<'_, Meta>, Error> {
        self.check_writable()?;
        let mut meta = self.meta();
        meta.check_writable()?;
        meta.make_room()?;
        if !meta.begun {
            meta.begin()?;
            meta.begun = true;
        }
        Ok(meta)
    }

    fn release_freed(&self, meta: &mut Meta, count: usize) -> Result<(), Error> {
        let freed: Vec<_> = meta.freed.drain(..count.min(meta.freed.len())).collect();
        let mut kept = Vec::new();
        // What is free may be used for other compressed data.
        self.unpacked.forget();
        for one in freed {
            if self.grace.passed(one.mark) {
                meta.release(one.clusters.0, one.clusters.1, one.punch)?;
            } else {
                kept.push(one);
            }
        }
        meta.freed_written = kept.len();
        meta.freed.splice(0..0, kept);
        Ok(())
    }

    /// Writes and syncs everything, and leaves nothing that has to be tidied up.
    fn close(&self) -> Result<(), Error> {
        if !self.writable {
            return Ok(());
        }
        self.flush()?;
        let mut meta = self.meta();
        if meta.broken.is_some() {
            return Ok(());
        }
        meta.store_bitmaps()?;
        meta.give_back()?;
        if meta.postpones() {
            meta.set_dirty(false)?;
        }
        meta.write_all()?;
        if meta.needs_sync() {
            meta.sync()?;
        }
        // Whoever goes on using it marks first again what it changes.
        meta.begun = false;
        Ok(())
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            log::error!("closing {}: {error}", self.file.name());
        }
    }
}

impl Meta {
    fn load_l1(&mut self) -> Result<(), Error> {
        let len = u64::from(self.header.l1_size) * 8;
        let offset = self.header.l1_offset;
        if len > 0 && !self.in_file(offset)? {
            return Err(self.corrupt("its L1 table lies past the file's end".into()));
        }
        let mut data = vec![0; len as usize];
        self.file.read_bytes(offset, &mut data)?;
        self.l1 = words(&data);
        Ok(())
    }

    /// Finds out where metadata is, so that nothing else is written there, and that no two
    /// pieces of it overlap.
    fn collect_fixed(&mut self) -> Result<(), Error> {
        let bits = self.geo.cluster_bits;
        let cluster = self.geo.cluster();
        let header = self.header.clone();
        let mut areas = vec![
            ("the header", 0, cluster),
            (
                "the L1 table",
                header.l1_offset,
                u64::from(header.l1_size) * 8,
            ),
            (
                "the refcount table",
                header.refcount_offset,
                u64::from(header.refcount_clusters) << bits,
            ),
        ];
        if let Encryption::Luks { offset, length } = header.encryption {
            if length > 64 << 20 {
                return Err(self.corrupt(format!("its LUKS header claims {length} bytes")));
            }
            areas.push(("the LUKS header", offset, length));
        }
        let snapshots = snapshot::Table::read(&self.file, &header, self.geo)?;
        areas.push((
            "the snapshot table",
            header.snapshots_offset,
            snapshots.bytes,
        ));
        if let Some(bitmaps) = header.bitmaps {
            areas.push(("the bitmap directory", bitmaps.offset, bitmaps.size));
        }
        for (what, offset, len) in areas {
            for at in offset >> bits..(offset + len).div_ceil(cluster) {
                if !self.fixed.insert(at) {
                    return Err(self.corrupt(format!("{what} lies on other metadata")));
                }
            }
        }
        for index in 0..self.refcount_table.len() {
            let entry = self.refcount_table[index];
            if entry == 0 {
                continue;
            }
            if !entry.is_multiple_of(cluster)
                || !self.in_file(entry)?
                || !self.fixed.insert(entry >> bits)
            {
                return Err(self.corrupt(format!("refcount table entry {index} is {entry:#x}")));
            }
        }
        for index in 0..self.l1.len() {
            let table = self.l1[index] & OFFSET;
            if table == 0 {
                continue;
            }
            if !table.is_multiple_of(cluster)
                || !self.in_file(table)?
                || !self.fixed.insert(table >> bits)
            {
                return Err(self.corrupt(format!("L1 entry {index} is {:#x}", self.l1[index])));
            }
        }
        // Snapshots share L2 tables with each other and with the active L1 table.
        for table in snapshots.metadata(&self.file, self.geo)? {
            self.fixed.insert(table);
        }
        for table in bitmap::metadata(&self.file, &header)? {
            self.fixed.insert(table);
        }
        Ok(())
    }

    /// Before the first change.
    fn begin(&mut self) -> Result<(), Error> {
        let known = header::BITMAPS | header::DATA_FILE_RAW;
        if self.header.autoclear & !known != 0 {
            self.header.autoclear &= known;
            self.file
                .write_bytes(header::at::AUTOCLEAR, &self.header.autoclear.to_be_bytes())?;
            self.sync()?;
        }
        if self.header.has_lazy_refcounts() {
            self.set_dirty(true)?;
        }
        self.begin_bitmaps()
    }
}

impl Image for Qcow2 {
    fn own_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        let len = iovec::total(bufs)?;
        check_range(self, offset, len)?;
        self.read_mapped(offset, len, bufs)
    }

    fn write(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        let len = iovec::total(bufs)?;
        check_range(self, offset, len)?;
        self.check_writable()?;
        self.write_mapped(offset, len, bufs)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        check_range(self, offset, len)?;
        self.zero_range(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        check_range(self, offset, len)?;
        self.discard_range(offset, len)
    }

    fn rest(&self) -> Result<(), Error> {
        self.close()
    }

    fn flush(&self) -> Result<(), Error> {
        if !self.writable {
            return Ok(());
        }
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut meta = self.meta();
        meta.check_writable()?;
        let clean = meta.is_clean();
        let mut freed = 0;
        if !clean {
            meta.write_refcounts()?;
            if meta.needs_sync() {
                // Most of what has to be stable becomes so while others go on.
                let written = meta.written;
                drop(meta);
                self.sync()?;
                meta = self.meta();
                meta.stable = meta.stable.max(written);
            }
            meta.write_all()?;
            freed = meta.freed.len();
            meta.freed_written = freed;
        }
        drop(meta);
        self.sync()?;
        if freed > 0 {
            let mut meta = self.meta();
            self.release_freed(&mut meta, freed)?;
        }
        Ok(())
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        let extent = self.own_extent(offset, len)?;
        match &self.backing {
            Some(backing) if !extent.present && offset < backing.size() => {
                let below = backing.extent(offset, extent.len.min(backing.size() - offset))?;
                Ok(Extent {
                    depth: below.depth + 1,
                    ..below
                })
            }
            _ => Ok(extent),
        }
    }

    fn info(&self) -> Result<ImageInfo, Error> {
        Ok(ImageInfo {
            virtual_size: self.size(),
            allocated: self.file.allocated()?,
            end: self.file.size()?,
            cluster_size: Some(self.geo.cluster()),
        })
    }

    fn resize(&self, size: u64) -> Result<(), Error> {
        self.set_size(size)
    }

    fn plain(&self, offset: u64, len: u64, write: bool) -> Option<Plain> {
        check_range(self, offset, len).ok()?;
        if self.cipher.is_some() || len == 0 || write && !self.writable {
            return None;
        }
        let stay = self.grace.enter();
        let mut meta = self.meta();
        if write && (!meta.begun || meta.check_writable().is_err()) {
            return None;
        }
        let host = if write {
            let (host, run) = meta.own_run(offset, len).ok()??;
            if run < len {
                return None;
            }
            meta.record(offset, len);
            host
        } else {
            let mut map = Vec::with_capacity(1);
            meta.map(offset, len, &mut map).ok()?;
            match map[..] {
                [
                    meta::Segment {
                        place: Place::Data(host),
                        ..
                    },
                ] => host,
                _ => return None,
            }
        };
        drop(meta);
        Some(Plain::new(
            self.data.clone(),
            host,
            Hold::Stay { _stay: stay },
        ))
    }

    fn claim(self: Arc<Self>, offset: u64, len: u64) -> Option<Plain> {
        self.claim_new(offset, len)
    }
}

impl Qcow2 {
    /// As [`Image::extent`], but of this image alone: what it leaves to its backing file is not
    /// `present`.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn own_extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        check_range(self, offset, len)?;
        let mut map = Vec::new();
        // As far as one look at a table's piece goes.
        let end =
            ((offset >> self.geo.cluster_bits) + self.geo.slice_entries()) << self.geo.cluster_bits;
        let mut meta = self.meta();
        meta.make_room()?;
        meta.map(offset, len.min(end - offset), &mut map)?;
        drop(meta);
        let Some(first) = map.first() else {
            return Err(Error::Invalid("an extent has at least one byte".into()));
        };
        let mut extent = Extent {
            start: offset,
            len: first.len,
            zero: false,
            data: true,
            present: true,
            compressed: false,
            depth: 0,
            offset: None,
        };
        match first.place {
            Place::Data(host) if self.cipher.is_none() => {
                extent.offset = Some(host);
                // A hole in the file reads as zeroes: space that was set aside, say.
                let (data, len) = self.data.data_at(host, extent.len)?;
                (extent.zero, extent.len) = (!data, len.clamp(1, extent.len));
            }
            Place::Data(_) => {}
            Place::Zero => (extent.zero, extent.data) = (true, false),
            Place::Compressed(_) => extent.compressed = true,
            Place::Absent => (extent.zero, extent.data, extent.present) = (true, false, false),
        }
        Ok(extent)
    }

    /// What is behind it, if something is.
    #[must_use]
    pub fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    /// The smallest piece that has a place of its own, bytes: a cluster, or a part of one.
    #[must_use]
    pub fn unit(&self) -> u64 {
        1 << self.geo.sub_bits
    }

    /// Syncs the file, and the data's if that is another, without a lock.
    fn sync(&self) -> Result<(), Error> {
        if self.geo.external {
            self.data.sync()?;
        }
        self.file.sync()
    }
}
