//! Making new images.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use super::entry::{COPIED, Entry};
use super::header::{self, Compression, Encryption, Header};
use super::refcount::set_value;
use super::{Geometry, NoBacking, Options, Qcow2};
use crate::luks::{self, FilePart, Passphrase, Spec, Volume};
use crate::{Error, File, Image};

/// The largest L1 table, bytes: what QEMU takes.
const L1_MOST: u64 = 32 << 20;

/// How much of a new image's space is set aside at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The tables; the data's space is a hole in the file.
    Metadata,
    /// The tables, and the host sets the data's space aside.
    Falloc,
    /// The tables, and zeroes are written.
    Full,
}

/// What a new image is to be like; as `qemu-img create -o`.
#[derive(Debug, Clone)]
pub struct Create {
    /// Size the guest sees, bytes, a multiple of 512.
    pub size: u64,
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// A power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Writers may leave refcounts for later.
    pub lazy_refcounts: bool,
    /// 32 subclusters a cluster; clusters of 16 KiB at least.
    pub extended_l2: bool,
    /// The backing file's name and format.
    pub backing: Option<(OsString, String)>,
    /// The external data file's name.
    pub data_file: Option<OsString>,
    /// The data file by itself is to be a raw image.
    pub data_file_raw: bool,
    /// How much is set aside at once.
    pub preallocation: Preallocation,
    /// Of compressed clusters.
    pub compression: Compression,
    /// Encrypts guest data.
    pub encryption: Option<Encrypt>,
}

/// How a new image is encrypted.
#[derive(Debug, Clone)]
pub struct Encrypt {
    /// The cipher.
    pub spec: Spec,
    /// What opens it.
    pub passphrase: Passphrase,
    /// How long trying a passphrase is to take on this machine.
    pub time: Duration,
}

impl Create {
    /// An ordinary image of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_size: 64 << 10,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            backing: None,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
            compression: Compression::Zlib,
            encryption: None,
        }
    }

    /// Whether there can be such an image.
    ///
    /// # Errors
    /// Why not: options that contradict each other, a size that is too large for the clusters.
    pub fn check(&self) -> Result<(), String> {
        let v3 = self.version == 3;
        let power = |value: u64, from: u64, to: u64| {
            value.is_power_of_two() && (from..=to).contains(&value)
        };
        if !v3 && self.version != 2 {
            return Err(format!("there is no qcow2 version {}", self.version));
        }
        if !power(self.cluster_size, 512, 2 << 20) {
            return Err("the cluster size is a power of two from 512 to 2 MiB".into());
        }
        if !power(self.refcount_bits.into(), 1, 64) {
            return Err("refcounts have 1, 2, 4, 8, 16, 32 or 64 bits".into());
        }
        if !v3
            && (self.refcount_bits != 16
                || self.lazy_refcounts
                || self.extended_l2
                || self.data_file.is_some()
                || self.compression != Compression::Zlib)
        {
            return Err(
                "version 2 (compat=0.10) has none of refcount_bits, lazy_refcounts, extended_l2, \
                        data_file and compression_type"
                    .into(),
            );
        }
        if self.extended_l2 && self.cluster_size < 16 << 10 {
            return Err("extended L2 entries need clusters of at least 16 KiB".into());
        }
        if !self.size.is_multiple_of(512) {
            return Err("the size is a multiple of 512 bytes".into());
        }
        let cluster = self.cluster_size;
        let l2_entries = cluster / if self.extended_l2 { 16 } else { 8 };
        if self.size.div_ceil(cluster * l2_entries) * 8 > L1_MOST {
            return Err(format!(
                "{} bytes are too much for clusters of {cluster} bytes",
                self.size
            ));
        }
        if self.data_file_raw && (self.data_file.is_none() || self.backing.is_some()) {
            return Err("data_file_raw needs a data file, and no backing file".into());
        }
        if self.data_file_raw && self.encryption.is_some() {
            return Err("an encrypted data file is no raw image".into());
        }
        if !v3 && self.encryption.is_some() && self.preallocation != Preallocation::Off {
            return Err(
                "version 2 (compat=0.10) has no zero clusters, which encrypted preallocation needs"
                    .into(),
            );
        }
        if self.backing.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return Err("with a backing file, only extended L2 entries allow preallocation".into());
        }
        Ok(())
    }
}

/// Makes an image in `file`, which is empty, and in the data file if it has one.
///
/// # Errors
/// [`Error::Invalid`] for options that contradict each other; the host's I/O.
pub fn create(file: File, data_file: Option<File>, options: &Create) -> Result<(), Error> {
    let invalid = |reason: String| Error::Invalid(format!("{}: {reason}", file.name()));
    options.check().map_err(invalid)?;
    if options.data_file.is_some() != data_file.is_some() {
        return Err(invalid(
            "a data file needs a name, and a name a data file".into(),
        ));
    }
    let cluster = options.cluster_size;
    let bits = cluster.trailing_zeros();
    let mut header = Header {
        version: options.version,
        backing: options.backing.as_ref().map(|(name, _)| name.clone()),
        backing_format: options.backing.as_ref().map(|(_, format)| format.clone()),
        cluster_bits: bits,
        size: options.size,
        encryption: Encryption::None,
        l1_size: 0,
        l1_offset: 0,
        refcount_offset: cluster,
        refcount_clusters: 0,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: if options.lazy_refcounts {
            header::LAZY_REFCOUNTS
        } else {
            0
        },
        autoclear: if options.data_file_raw {
            header::DATA_FILE_RAW
        } else {
            0
        },
        refcount_order: options.refcount_bits.trailing_zeros(),
        compression: options.compression,
        data_file: options.data_file.clone(),
        bitmaps: None,
        unknown: Vec::new(),
    };
    for (wanted, bit) in [
        (options.data_file.is_some(), header::DATA_FILE),
        (
            options.compression != Compression::Zlib,
            header::COMPRESSION,
        ),
        (options.extended_l2, header::EXTENDED_L2),
    ] {
        header.incompatible |= if wanted { bit } else { 0 };
    }
    let geo = Geometry::new(&header);
    let l1_size = header.l1_needed(options.size);
    // Header, refcount table, refcount blocks, LUKS header, L1 table.
    let luks_bytes = match &options.encryption {
        Some(encrypt) => luks::header_len(&encrypt.spec)?,
        None => 0,
    };
    let (luks, l1) = (
        luks_bytes.div_ceil(cluster),
        (l1_size.max(1) * 8).div_ceil(cluster),
    );
    let data = if geo.external {
        0
    } else {
        options.size.div_ceil(cluster)
    };
    let in_full = data + (data >> geo.l2_bits()) + luks + l1 + 2;
    let table = (in_full.div_ceil(geo.refcounts()) * 9)
        .div_ceil(cluster)
        .clamp(1, 64);
    let mut blocks = 1;
    while (1 + table + blocks + luks + l1).div_ceil(geo.refcounts()) > blocks {
        blocks += 1;
    }
    let (luks_at, l1_at) = (1 + table + blocks, 1 + table + blocks + luks);
    let end = l1_at + l1;
    if (blocks * 8).div_ceil(cluster) > table {
        return Err(invalid("so large an image needs larger clusters".into()));
    }
    header.refcount_clusters = table as u32;
    header.l1_offset = l1_at << bits;
    header.l1_size = l1_size as u32;
    if options.encryption.is_some() {
        header.encryption = Encryption::Luks {
            offset: luks_at << bits,
            length: luks_bytes,
        };
    }
    let first = header.to_bytes().map_err(invalid)?;

    if !file.is_block_device() {
        file.set_len(0)?;
        file.set_len(end << bits)?;
    } else {
        file.zero(0, end << bits, false)?;
    }
    let entries: Vec<u8> = (0..blocks)
        .flat_map(|n| ((1 + table + n) << bits).to_be_bytes())
        .collect();
    file.write_bytes(cluster, &entries)?;
    for n in 0..blocks {
        let mut block = vec![0; cluster as usize];
        let start = n * geo.refcounts();
        for at in start..end.min(start + geo.refcounts()) {
            set_value(&mut block, geo.refcount_order, (at - start) as usize, 1);
        }
        file.write_bytes((1 + table + n) << bits, &block)?;
    }
    let mut cipher = None;
    if let Some(encrypt) = &options.encryption {
        let part = FilePart {
            file: &file,
            start: luks_at << bits,
            len: luks << bits,
        };
        let volume = Volume::create(
            &part,
            encrypt.spec,
            encrypt.passphrase.as_bytes(),
            encrypt.time,
        )?;
        cipher = Some(volume.cipher()?);
    }
    if let Some(data) = &data_file
        && !data.is_block_device()
    {
        data.set_len(options.size)?;
    }
    // What has a header is an image, so that comes last.
    file.sync()?;
    file.write_bytes(0, &first)?;
    file.sync()?;

    // A raw data file is read past the tables, which must therefore say nothing else.
    let preallocation = match options.preallocation {
        Preallocation::Off if options.data_file_raw => Preallocation::Metadata,
        other => other,
    };
    if preallocation == Preallocation::Off {
        return Ok(());
    }
    let backing = options
        .backing
        .as_ref()
        .map(|_| Arc::new(NoBacking) as Arc<dyn Image>);
    let image = Qcow2::open(
        file,
        Options {
            backing,
            data_file,
            cipher,
            ..Options::default()
        },
    )?;
    image.preallocate(0, preallocation)?;
    image.flush()
}

impl Qcow2 {
    /// Gives every guest cluster from byte `from` on, none of which has one, a host cluster of its
    /// own. With extended entries they read as before, else as zeroes.
    pub(super) fn preallocate(&self, from: u64, how: Preallocation) -> Result<(), Error> {
        let geo = self.geo;
        let bits = geo.cluster_bits;
        let clusters = self.size().div_ceil(geo.cluster());
        // What is encrypted, or lies on a device, reads as anything until it is written.
        let zeroes = !geo.extended && (self.cipher.is_some() || self.data.is_block_device());
        // What the raw data file has is what the guest has.
        let bits_there = if geo.extended && geo.raw {
            0xffff_ffff
        } else {
            0
        };
        let mut guest = from.div_ceil(geo.cluster());
        let mut end = 0;
        // How much space that takes is for `how` to say.
        self.meta().set_aside = false;
        while guest < clusters {
            let mut meta = self.changing()?;
            let per = geo.slice_entries();
            let most = (per - guest % per).min(clusters - guest);
            meta.own_table(guest, self.grace.mark())?;
            let (host, count) = if geo.external {
                (guest << bits, most)
            } else {
                let (first, count) = meta.allocate(most)?;
                meta.take_fresh(first, count);
                (first << bits, count)
            };
            let len = (count << bits).min(if geo.external {
                self.size() - host
            } else {
                u64::MAX
            });
            match how {
                Preallocation::Off => {}
                Preallocation::Metadata => {}
                Preallocation::Falloc => {
                    if !self.data.allocate(host, len)? {
                        return Err(Error::Invalid(format!(
                            "{}: the host can't set space aside here",
                            self.data.name()
                        )));
                    }
                }
                Preallocation::Full => {
                    self.data.write_zeroes(host, len)?;
                    self.data.begin_sync(host, len);
                }
            }
            end = end.max(host + len);
            for n in 0..count {
                let raw = (host + (n << bits)) | COPIED;
                meta.set_entry(
                    guest + n,
                    if zeroes {
                        Entry::zero(&geo, raw)
                    } else {
                        Entry {
                            raw,
                            bits: bits_there,
                        }
                    },
                )?;
            }
            guest += count;
        }
        if !self.data.is_block_device() && self.data.size()? < end {
            self.data.set_len(end)?;
        }
        Ok(())
    }
}
