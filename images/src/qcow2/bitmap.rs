//! Persistent bitmaps as they are in the file.

use super::header::Header;
use super::words;
use crate::{Error, File};

/// The most entries that all bitmaps' tables may have.
const ENTRIES_MOST: u64 = 4 << 20;
/// Flag: not saved since it last changed.
pub const IN_USE: u32 = 1 << 0;
/// The one kind of bitmap that is known.
pub const DIRTY_TRACKING: u8 = 1;
/// Flag: tracks every write.
pub const AUTO: u32 = 1 << 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// One persistent bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    pub raw_name: Vec<u8>,
    /// What else is recorded, as it is.
    pub extra: Vec<u8>,
    /// Where its entry in the directory is.
    pub entry: u64,
    pub table_offset: u64,
    pub table_size: u32,
    pub flags: u32,
    pub granularity_bits: u8,
    /// [`DIRTY_TRACKING`], or something nobody here knows.
    pub kind: u8,
}

/// The directory of an image's bitmaps.
pub fn directory(file: &File, header: &Header) -> Result<Vec<Bitmap>, Error> {
    let Some(place) = header.bitmaps else {
        return Ok(Vec::new());
    };
    let corrupt = |reason: &str| Error::Corrupt {
        image: file.name().to_owned(),
        reason: reason.into(),
    };
    if place.offset.saturating_add(place.size)
        > file.size()?.next_multiple_of(1 << header.cluster_bits)
    {
        return Err(corrupt("its bitmap directory lies past the file's end"));
    }
    let mut data = vec![0; place.size as usize];
    file.read_bytes(place.offset, &mut data)?;
    let mut list = Vec::new();
    let mut at = 0;
    for _ in 0..place.count {
        let Some(entry) = data.get(at..).filter(|rest| rest.len() >= 24) else {
            return Err(corrupt("its bitmap directory is cut short"));
        };
        let word = |at: usize| {
            entry[at..at + 4]
                .iter()
                .fold(0, |all, &byte| all << 8 | u32::from(byte))
        };
        let (name, extra) = (
            entry[18] as usize * 256 + entry[19] as usize,
            word(20) as usize,
        );
        let Some(text) = extra
            .checked_add(24)
            .and_then(|from| entry.get(from..from.checked_add(name)?))
        else {
            return Err(corrupt("its bitmap directory is cut short"));
        };
        list.push(Bitmap {
            name: String::from_utf8_lossy(text).into_owned(),
            raw_name: text.to_vec(),
            extra: entry[24..24 + extra].to_vec(),
            entry: place.offset + at as u64,
            table_offset: words(&entry[..8])[0],
            table_size: word(8),
            flags: word(12),
            granularity_bits: entry[17],
            kind: entry[16],
        });
        at += (24 + extra + name).next_multiple_of(8);
    }
    Ok(list)
}

/// The table of one bitmap.
pub fn table(file: &File, bitmap: &Bitmap, cluster: u64) -> Result<Vec<u64>, Error> {
    let bytes = u64::from(bitmap.table_size) * 8;
    if !bitmap.table_offset.is_multiple_of(cluster)
        || bitmap.table_offset >= 1 << 56
        || u64::from(bitmap.table_size) > ENTRIES_MOST
        || bitmap.table_offset + bytes > file.size()?.next_multiple_of(cluster)
    {
        return Err(Error::Corrupt {
            image: file.name().to_owned(),
            reason: format!("bitmap {:?} has no valid table", bitmap.name),
        });
    }
    let mut data = vec![0; bitmap.table_size as usize * 8];
    file.read_bytes(bitmap.table_offset, &mut data)?;
    Ok(words(&data))
}

/// The clusters that bitmaps use, directory apart.
pub fn metadata(file: &File, header: &Header) -> Result<Vec<u64>, Error> {
    let (bits, cluster) = (header.cluster_bits, 1 << header.cluster_bits);
    let mut clusters = Vec::new();
    for bitmap in directory(file, header)? {
        let table = table(file, &bitmap, cluster)?;
        let end = (bitmap.table_offset + table.len() as u64 * 8).div_ceil(cluster);
        clusters.extend(bitmap.table_offset >> bits..end);
        clusters.extend(
            table
                .iter()
                .map(|entry| entry & OFFSET)
                .filter(|&at| at != 0)
                .map(|at| at >> bits),
        );
        if clusters.len() as u64 > ENTRIES_MOST {
            return Err(Error::Unsupported {
                image: file.name().to_owned(),
                reason: "its bitmaps are too large".into(),
            });
        }
    }
    Ok(clusters)
}

/// Appends its entry to a directory.
pub fn put(bitmap: &Bitmap, directory: &mut Vec<u8>) {
    directory.extend(bitmap.table_offset.to_be_bytes());
    directory.extend(bitmap.table_size.to_be_bytes());
    directory.extend(bitmap.flags.to_be_bytes());
    directory.extend([bitmap.kind, bitmap.granularity_bits]);
    directory.extend((bitmap.raw_name.len() as u16).to_be_bytes());
    directory.extend((bitmap.extra.len() as u32).to_be_bytes());
    directory.extend(&bitmap.extra);
    directory.extend(&bitmap.raw_name);
    directory.resize(directory.len().next_multiple_of(8), 0);
}
