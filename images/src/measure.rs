//! How large an image file would become, as `qemu-img measure` counts it.

use crate::convert::joined;
use crate::qcow2::{BitmapInfo, Create, Preallocation};
use crate::{Error, Image, luks};

/// Bytes of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// With the content it is to have.
    pub required: u64,
    /// With every cluster in use.
    pub fully_allocated: u64,
}

/// A raw image of `size` bytes.
#[must_use]
pub fn raw(size: u64) -> Measure {
    Measure {
        required: size,
        fully_allocated: size,
    }
}

/// A LUKS image of `size` bytes.
///
/// # Errors
/// [`Error::Invalid`]: there is no such cipher.
pub fn encrypted(size: u64, spec: &luks::Spec) -> Result<Measure, Error> {
    Ok(raw(size + luks::header_len(spec)?))
}

/// The qcow2 image that `options` make (their size included), with the content of `source` if
/// there is one.
///
/// # Errors
/// [`Error::Invalid`] for a size that no such image can have; the host's I/O.
pub fn qcow2(options: &Create, source: Option<&dyn Image>) -> Result<Measure, Error> {
    let cluster = options.cluster_size;
    let too_large =
        || Error::Invalid("The image size is too large (try using a larger cluster size)".into());
    let size = options
        .size
        .checked_next_multiple_of(cluster)
        .ok_or_else(too_large)?;
    let entry = if options.extended_l2 { 16 } else { 8 };
    let per_l2 = cluster / entry;
    let l1_bytes = (size / cluster).div_ceil(per_l2) * 8;
    if l1_bytes > 32 << 20 {
        return Err(too_large());
    }
    let luks = match &options.encryption {
        Some(encrypt) => luks::header_len(&encrypt.spec)?.next_multiple_of(cluster),
        None => 0,
    };
    let entries = (size / cluster).next_multiple_of(per_l2);
    let l2 = entries * entry;
    let l1 = (l2 / cluster).next_multiple_of(cluster / 8) * 8;
    let meta = cluster + l2 + l1;
    let fully = size + meta + refcounts((meta + size) / cluster, cluster, options.refcount_bits);
    let used = match source {
        Some(source) if options.backing.is_none() => used(source, cluster)?,
        Some(_) => size,
        None => 0,
    };
    let used = match options.preallocation {
        Preallocation::Full | Preallocation::Falloc => size,
        _ => used,
    };
    Ok(Measure {
        required: luks + fully - size + used,
        fully_allocated: luks + fully,
    })
}

/// Bytes that these bitmaps of a disk of `size` bytes take in a qcow2 image.
#[must_use]
pub fn bitmaps(list: &[BitmapInfo], size: u64, cluster: u64) -> u64 {
    let (mut bytes, mut directory) = (0, 0);
    for one in list {
        let clusters = size
            .div_ceil(one.granularity.max(1))
            .div_ceil(8)
            .div_ceil(cluster);
        bytes += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += (24 + one.name.len() as u64).next_multiple_of(8);
    }
    bytes + directory.next_multiple_of(cluster)
}

/// Bytes that refcounts of so many clusters take.
fn refcounts(clusters: u64, cluster: u64, bits: u32) -> u64 {
    let per_block = cluster * 8 / u64::from(bits);
    let (mut blocks, mut table, mut last) = (0_u64, 0_u64, 0);
    loop {
        blocks = (clusters + table + blocks).div_ceil(per_block);
        table = blocks.div_ceil(cluster / 8);
        let now = clusters + blocks + table;
        if now == last {
            return (blocks + table) * cluster;
        }
        last = now;
    }
}

/// Bytes of the clusters that have content.
fn used(source: &dyn Image, cluster: u64) -> Result<u64, Error> {
    let size = source.size();
    let (mut at, mut used, mut counted) = (0, 0, 0);
    while at < size {
        let (zero, len) = joined(source, at, size - at, |one| one.zero)?;
        if !zero {
            // A cluster that two extents share counts once.
            let from = (at & !(cluster - 1)).max(counted);
            let to = (at + len).next_multiple_of(cluster);
            used += to.saturating_sub(from);
            counted = to;
        }
        at += len;
    }
    Ok(used)
}
