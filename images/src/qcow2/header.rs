//! The header and its extensions: parsed and checked before anything else is looked at.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::{Error, File};

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Incompatible: refcounts may be wrong.
pub const DIRTY: u64 = 1 << 0;
/// Incompatible: don't write.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible: guest data is in another file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible: compressed clusters are not deflate.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible: 128-bit L2 entries.
pub const EXTENDED_L2: u64 = 1 << 4;
const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
/// Compatible: refcounts may be written late, with the dirty bit set.
pub const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear: the bitmaps are consistent.
pub const BITMAPS: u64 = 1 << 0;
/// Autoclear: the data file by itself is a raw image.
pub const DATA_FILE_RAW: u64 = 1 << 1;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURES: u32 = 0x6803_f857;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_CRYPTO: u32 = 0x0537_be77;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Where fields lie that are rewritten alone.
pub mod at {
    pub const SIZE: u64 = 24;
    pub const L1_SIZE: u64 = 36;
    pub const REFCOUNT_TABLE: u64 = 48;
    pub const SNAPSHOTS: u64 = 60;
    pub const INCOMPATIBLE: u64 = 72;
    pub const AUTOCLEAR: u64 = 88;
    pub const REFCOUNT_ORDER: u64 = 96;
}

/// Bounds that QEMU has too.
const L1_MOST: u64 = 32 << 20;
const REFCOUNT_TABLE_MOST: u64 = 8 << 20;
const SNAPSHOTS_MOST: u32 = 65_536;
const NAME_MOST: u32 = 1023;

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Raw deflate with a window of 4 KiB.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

/// How guest data is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encryption {
    /// Not at all.
    #[default]
    None,
    /// LUKS: its header lies in the image's file.
    Luks {
        /// Where, bytes.
        offset: u64,
        /// How long, bytes.
        length: u64,
    },
}

/// The bitmaps extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapDirectory {
    /// How many.
    pub count: u32,
    /// Bytes.
    pub size: u64,
    /// Where, bytes.
    pub offset: u64,
}

/// A qcow2 image's header with its extensions.
#[derive(Debug, Clone)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The backing file's name as the image has it, if it has one.
    pub backing: Option<OsString>,
    /// The backing file's format, if stated.
    pub backing_format: Option<String>,
    /// A cluster is `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// Size the guest sees, bytes.
    pub size: u64,
    /// How guest data is encrypted.
    pub encryption: Encryption,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub refcount_offset: u64,
    /// Its clusters.
    pub refcount_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// Feature bits that must all be understood.
    pub incompatible: u64,
    /// Feature bits that may be ignored.
    pub compatible: u64,
    /// Feature bits that are cleared by writers who don't know them.
    pub autoclear: u64,
    /// A refcount has `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// Of compressed clusters.
    pub compression: Compression,
    /// The external data file's name, if stated.
    pub data_file: Option<OsString>,
    /// Persistent bitmaps.
    pub bitmaps: Option<BitmapDirectory>,
    /// Extensions nobody here knows, kept as they are.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

fn be32(data: &[u8], at: usize) -> u32 {
    data.get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

fn be64(data: &[u8], at: usize) -> u64 {
    data.get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_be_bytes)
}

impl Header {
    /// Reads and checks it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what is not understood, by name; [`Error::Corrupt`] for what
    /// can't be; the host's I/O.
    pub fn read(file: &File) -> Result<Self, Error> {
        let image = || file.name().to_owned();
        let corrupt = |reason: String| Error::Corrupt {
            image: image(),
            reason,
        };
        let unsupported = |reason: String| Error::Unsupported {
            image: image(),
            reason,
        };
        let mut head = [0; 112];
        file.read_bytes(0, &mut head)?;
        if be32(&head, 0) != MAGIC {
            return Err(unsupported("this is not a qcow2 image".into()));
        }
        let version = be32(&head, 4);
        if version != 2 && version != 3 {
            return Err(unsupported(format!("qcow2 version {version} is not known")));
        }
        let cluster_bits = be32(&head, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(unsupported(format!(
                "clusters of 2^{cluster_bits} bytes (512 B to 2 MiB are)"
            )));
        }
        let cluster = 1_u64 << cluster_bits;
        let v3 = version >= 3;
        let header_length = if v3 { u64::from(be32(&head, 100)) } else { 72 };
        if v3 && (header_length < 104 || header_length % 8 != 0 || header_length > cluster) {
            return Err(corrupt(format!(
                "its header says it is {header_length} bytes long"
            )));
        }
        let backing_offset = be64(&head, 8);
        let backing_size = be32(&head, 16);
        if backing_offset != 0
            && (backing_size > NAME_MOST
                || backing_offset < header_length
                || backing_offset
                    .checked_add(backing_size.into())
                    .is_none_or(|end| end > cluster))
        {
            return Err(corrupt(
                "the backing file's name is not in the header".into(),
            ));
        }
        let mut area = vec![
            0;
            if backing_offset == 0 {
                cluster
            } else {
                backing_offset
            } as usize
        ];
        file.read_bytes(0, &mut area)?;
        let extensions = Extensions::parse(&area[header_length as usize..]).map_err(corrupt)?;

        let field = |at| if v3 { be64(&head, at) } else { 0 };
        let (incompatible, autoclear) = (field(72), field(88));
        let unknown = incompatible & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            return Err(unsupported(format!(
                "it needs features that are not known: {}",
                extensions.names(unknown)
            )));
        }
        let compression_type = if v3 && header_length > 104 {
            head[104]
        } else {
            0
        };
        let compression = match (incompatible & COMPRESSION != 0, compression_type) {
            (false, 0) => Compression::Zlib,
            (true, 1) => Compression::Zstd,
            (true, 2..) => {
                return Err(unsupported(format!(
                    "compression type {compression_type} is not known"
                )));
            }
            _ => {
                return Err(corrupt(
                    "its compression type and its feature bits contradict each other".into(),
                ));
            }
        };
        if incompatible & EXTENDED_L2 != 0 && cluster_bits < 14 {
            return Err(corrupt(
                "extended L2 entries need clusters of at least 16 KiB".into(),
            ));
        }
        let encryption = match (be32(&head, 32), extensions.crypto) {
            (0, _) => Encryption::None,
            (1, _) => {
                return Err(unsupported(
                    "it is encrypted with AES, qcow2's old and unsafe way".into(),
                ));
            }
            (2, Some((offset, length)))
                if offset % cluster == 0 && offset != 0 && length >= 592 =>
            {
                Encryption::Luks { offset, length }
            }
            (2, _) => {
                return Err(corrupt(
                    "it is encrypted with LUKS but says not where the LUKS header is".into(),
                ));
            }
            (other, _) => {
                return Err(unsupported(format!(
                    "encryption method {other} is not known"
                )));
            }
        };
        let refcount_order = if v3 { be32(&head, 96) } else { 4 };
        if refcount_order > 6 {
            return Err(corrupt(format!("refcounts of 2^{refcount_order} bits")));
        }
        let has_data_file = incompatible & DATA_FILE != 0;
        if autoclear & DATA_FILE_RAW != 0 && (!has_data_file || backing_offset != 0) {
            return Err(corrupt(
                "only an image with a data file and no backing file can have a raw data file"
                    .into(),
            ));
        }
        let mut backing = None;
        if backing_offset != 0 {
            let mut name = vec![0; backing_size as usize];
            file.read_bytes(backing_offset, &mut name)?;
            backing = Some(OsString::from_vec(name));
        }
        let header = Self {
            version,
            backing,
            backing_format: extensions.backing_format,
            cluster_bits,
            size: be64(&head, 24),
            encryption,
            l1_size: be32(&head, 36),
            l1_offset: be64(&head, 40),
            refcount_offset: be64(&head, 48),
            refcount_clusters: be32(&head, 56),
            snapshots: be32(&head, 60),
            snapshots_offset: be64(&head, 64),
            incompatible,
            compatible: field(80),
            autoclear,
            refcount_order,
            compression,
            data_file: extensions.data_file.filter(|_| has_data_file),
            bitmaps: extensions.bitmaps,
            unknown: extensions.unknown,
        };
        header.check().map_err(corrupt)?;
        Ok(header)
    }

    fn check(&self) -> Result<(), String> {
        let cluster = 1_u64 << self.cluster_bits;
        let aligned = |offset: u64, what: &str| {
            if !offset.is_multiple_of(cluster) || offset >= 1 << 56 {
                return Err(format!("{what} lies at {offset:#x}"));
            }
            Ok(())
        };
        aligned(self.l1_offset, "the L1 table")?;
        aligned(self.refcount_offset, "the refcount table")?;
        if self.size > 1 << 61 {
            return Err(format!("it claims a size of {} bytes", self.size));
        }
        let l1_bytes = u64::from(self.l1_size) * 8;
        if l1_bytes > L1_MOST {
            return Err(format!("its L1 table claims {} entries", self.l1_size));
        }
        if u64::from(self.l1_size) < self.l1_needed(self.size) {
            return Err(format!(
                "its L1 table of {} entries is too small for its size",
                self.l1_size
            ));
        }
        if self.l1_size > 0 && self.l1_offset == 0 {
            return Err("it has no L1 table".into());
        }
        if self.refcount_clusters == 0 || self.refcount_offset == 0 {
            return Err("it has no refcount table".into());
        }
        if u64::from(self.refcount_clusters) * cluster > REFCOUNT_TABLE_MOST.max(cluster) {
            return Err(format!(
                "its refcount table claims {} clusters",
                self.refcount_clusters
            ));
        }
        if self.snapshots > SNAPSHOTS_MOST {
            return Err(format!("it claims {} snapshots", self.snapshots));
        }
        if self.snapshots > 0 {
            aligned(self.snapshots_offset, "the snapshot table")?;
            if self.snapshots_offset == 0 {
                return Err("its snapshot table lies in the header".into());
            }
        }
        if self.autoclear & BITMAPS != 0 && self.bitmaps.is_none() {
            return Err("it says its bitmaps are right, but has none".into());
        }
        if let Some(bitmaps) = self.bitmaps {
            aligned(bitmaps.offset, "the bitmap directory")?;
            if bitmaps.count == 0
                || bitmaps.count > 65_535
                || bitmaps.size > 64 << 20
                || bitmaps.offset == 0
            {
                return Err("its bitmap directory makes no sense".into());
            }
        }
        Ok(())
    }

    /// It was not closed: refcounts may be wrong.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// It was found to contradict itself, and must not be written before it is repaired.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }

    /// Refcounts may be written late.
    #[must_use]
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible & LAZY_REFCOUNTS != 0
    }

    /// L2 entries have subclusters.
    #[must_use]
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible & EXTENDED_L2 != 0
    }

    /// The data file by itself is a raw image.
    #[must_use]
    pub fn has_raw_data_file(&self) -> bool {
        self.autoclear & DATA_FILE_RAW != 0
    }

    /// Guest data is in a file of its own.
    #[must_use]
    pub fn has_data_file(&self) -> bool {
        self.incompatible & DATA_FILE != 0
    }

    /// Entries that the L1 table of an image of `size` bytes has.
    #[must_use]
    pub fn l1_needed(&self, size: u64) -> u64 {
        let entry_bits = if self.incompatible & EXTENDED_L2 != 0 {
            4
        } else {
            3
        };
        let bits = self.cluster_bits + self.cluster_bits - entry_bits;
        size.div_ceil(1 << bits)
    }

    /// The first cluster of a new image with this header.
    ///
    /// # Errors
    /// What does not fit, in words.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        // The names of features are a courtesy, which small clusters have no room for.
        self.lay_out(true).or_else(|_| self.lay_out(false))
    }

    fn lay_out(&self, feature_names: bool) -> Result<Vec<u8>, String> {
        let v3 = self.version >= 3;
        let length = if v3 { 112 } else { 72 };
        let mut out = vec![0; length];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_be_bytes());
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(
            32,
            &u32::from(self.encryption != Encryption::None)
                .wrapping_mul(2)
                .to_be_bytes(),
        );
        put(36, &self.l1_size.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.refcount_offset.to_be_bytes());
        put(56, &self.refcount_clusters.to_be_bytes());
        put(60, &self.snapshots.to_be_bytes());
        put(64, &self.snapshots_offset.to_be_bytes());
        if v3 {
            put(72, &self.incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &112_u32.to_be_bytes());
            put(104, &[u8::from(self.compression == Compression::Zstd)]);
        }
        let mut extension = |kind: u32, data: &[u8]| {
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            extension(EXT_BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            extension(EXT_DATA_FILE, name.as_bytes());
        }
        if let Encryption::Luks { offset, length } = self.encryption {
            extension(
                EXT_CRYPTO,
                &[offset.to_be_bytes(), length.to_be_bytes()].concat(),
            );
        }
        if let Some(bitmaps) = self.bitmaps {
            let mut data = bitmaps.count.to_be_bytes().to_vec();
            data.extend([0; 4]);
            data.extend(bitmaps.size.to_be_bytes());
            data.extend(bitmaps.offset.to_be_bytes());
            extension(EXT_BITMAPS, &data);
        }
        if v3 && feature_names {
            let mut table = Vec::new();
            for (kind, bit, name) in FEATURE_NAMES {
                table.extend([kind, bit]);
                table.extend(name.as_bytes());
                table.resize(table.len().next_multiple_of(48), 0);
            }
            extension(EXT_FEATURES, &table);
        }
        for (kind, data) in &self.unknown {
            extension(*kind, data);
        }
        extension(EXT_END, &[]);
        if let Some(name) = &self.backing {
            if name.is_empty() || name.len() > NAME_MOST as usize {
                return Err(format!("a backing file's name has 1 to {NAME_MOST} bytes"));
            }
            let at = out.len() as u64;
            out.extend(name.as_bytes());
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        }
        if out.len() > 1 << self.cluster_bits {
            return Err("the names don't fit into the first cluster".into());
        }
        out.resize(1 << self.cluster_bits, 0);
        Ok(out)
    }
}

const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<OsString>,
    crypto: Option<(u64, u64)>,
    bitmaps: Option<BitmapDirectory>,
    features: Vec<(u8, u8, String)>,
    unknown: Vec<(u32, Vec<u8>)>,
}

impl Extensions {
    fn parse(mut area: &[u8]) -> Result<Self, String> {
        let mut found = Self::default();
        while area.len() >= 8 {
            let (kind, length) = (be32(area, 0), be32(area, 4) as usize);
            if kind == EXT_END {
                break;
            }
            let Some(data) = area.get(8..).and_then(|rest| rest.get(..length)) else {
                return Err(format!(
                    "the header extension {kind:#010x} is longer than the header"
                ));
            };
            let short = |most: usize| {
                if data.is_empty() || data.len() > most {
                    return Err(format!(
                        "the header extension {kind:#010x} has {} bytes",
                        data.len()
                    ));
                }
                Ok(data)
            };
            match kind {
                EXT_BACKING_FORMAT => {
                    found.backing_format = Some(String::from_utf8_lossy(short(15)?).into_owned());
                }
                EXT_DATA_FILE => {
                    found.data_file =
                        Some(OsStr::from_bytes(short(NAME_MOST as usize)?).to_owned());
                }
                EXT_CRYPTO if length == 16 => found.crypto = Some((be64(data, 0), be64(data, 8))),
                EXT_BITMAPS if length == 24 => {
                    found.bitmaps = Some(BitmapDirectory {
                        count: be32(data, 0),
                        size: be64(data, 8),
                        offset: be64(data, 16),
                    });
                }
                EXT_CRYPTO | EXT_BITMAPS => {
                    return Err(format!(
                        "the header extension {kind:#010x} has {length} bytes"
                    ));
                }
                EXT_FEATURES => {
                    for entry in data.chunks_exact(48).take(192) {
                        let name = entry[2..]
                            .split(|&byte| byte == 0)
                            .next()
                            .unwrap_or_default();
                        found.features.push((
                            entry[0],
                            entry[1],
                            String::from_utf8_lossy(name).into_owned(),
                        ));
                    }
                }
                _ => found.unknown.push((kind, data.to_vec())),
            }
            area = area
                .get(8 + length.next_multiple_of(8)..)
                .unwrap_or_default();
        }
        Ok(found)
    }

    /// The names of incompatible features, for people.
    fn names(&self, bits: u64) -> String {
        let name = |bit: u8| {
            let known = self
                .features
                .iter()
                .find(|(kind, at, name)| *kind == 0 && *at == bit && !name.is_empty());
            known.map_or_else(|| format!("bit {bit}"), |(_, _, name)| format!("{name:?}"))
        };
        let names: Vec<_> = (0..64)
            .filter(|bit| bits >> bit & 1 == 1)
            .map(name)
            .collect();
        names.join(", ")
    }
}
