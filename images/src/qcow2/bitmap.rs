//! Persistent bitmaps: kept as they are, and never left looking right when they are not.

use super::header::{self, Header};
use super::meta::Meta;
use super::words;
use crate::{Error, File};

/// The most entries that all bitmaps' tables may have.
const ENTRIES_MOST: u64 = 4 << 20;
/// Flag: not saved since it last changed.
pub const IN_USE: u32 = 1 << 0;
/// Flag: tracks every write.
pub const AUTO: u32 = 1 << 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// One persistent bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    /// Where its entry in the directory is.
    pub entry: u64,
    pub table_offset: u64,
    pub table_size: u32,
    pub flags: u32,
    pub granularity_bits: u8,
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
            entry: place.offset + at as u64,
            table_offset: words(&entry[..8])[0],
            table_size: word(8),
            flags: word(12),
            granularity_bits: entry[17],
        });
        at += (24 + extra + name).next_multiple_of(8);
    }
    Ok(list)
}

/// The table of one bitmap.
pub fn table(file: &File, bitmap: &Bitmap, cluster: u64) -> Result<Vec<u64>, Error> {
    if !bitmap.table_offset.is_multiple_of(cluster)
        || bitmap.table_offset >= 1 << 56
        || u64::from(bitmap.table_size) > ENTRIES_MOST
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

/// Before the first change: bitmaps that should see it are marked as not saved. Those that track
/// nothing stay valid.
pub fn begin(meta: &mut Meta) -> Result<(), Error> {
    if meta.header.autoclear & header::BITMAPS == 0 {
        return Ok(());
    }
    let mut changed = false;
    for bitmap in directory(&meta.file, &meta.header)? {
        if bitmap.flags & AUTO != 0 && bitmap.flags & IN_USE == 0 {
            meta.file
                .write_bytes(bitmap.entry + 12, &(bitmap.flags | IN_USE).to_be_bytes())?;
            changed = true;
        }
    }
    if changed { meta.sync() } else { Ok(()) }
}
