//! Internal snapshots: their table, and the clusters that their tables use.

use std::collections::HashSet;

use super::entry::OFFSET;
use super::{Geometry, Header, words};
use crate::{Error, File};

/// The most that all snapshots' L1 tables may have, bytes.
const L1_MOST: u64 = 64 << 20;
const TABLE_MOST: u64 = 64 << 20;
const EXTRA_MOST: u64 = 1024;

/// One internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique.
    pub id: String,
    /// For people.
    pub name: String,
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// The L1 table's entries.
    pub l1_size: u32,
    /// When it was taken: seconds and nanoseconds since 1970.
    pub date: (u32, u32),
    /// How long the guest had run, nanoseconds.
    pub clock: u64,
    /// Bytes of machine state.
    pub state_size: u64,
    /// Size of the guest's disk, bytes; none where it is not recorded.
    pub disk_size: Option<u64>,
    /// Instructions the guest had executed, where that was counted.
    pub icount: Option<u64>,
    /// What else is recorded, as it is.
    pub(super) extra: Vec<u8>,
}

impl Snapshot {
    /// The header becomes one whose active content is the snapshot's.
    pub(super) fn take_place(&self, header: &mut Header) {
        header.l1_offset = self.l1_offset;
        header.l1_size = self.l1_size;
        if let Some(size) = self.disk_size {
            header.size = size;
        }
    }
}

/// All snapshots of an image.
#[derive(Debug, Default)]
pub struct Table {
    pub list: Vec<Snapshot>,
    /// Length of the table in the file.
    pub bytes: u64,
}

impl Table {
    pub fn read(file: &File, header: &Header, geo: Geometry) -> Result<Self, Error> {
        let corrupt = |reason: String| Error::Corrupt {
            image: file.name().to_owned(),
            reason,
        };
        let mut table = Self::default();
        for n in 0..header.snapshots {
            let mut fixed = [0; 40];
            let at = header.snapshots_offset + table.bytes;
            file.read_bytes(at, &mut fixed)?;
            let half = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
            let word = |at: usize| u32::from(half(at)) << 16 | u32::from(half(at + 2));
            let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
            let (id, name, extra) = (
                u64::from(half(12)),
                u64::from(half(14)),
                u64::from(word(36)),
            );
            if extra > EXTRA_MOST {
                return Err(corrupt(format!(
                    "snapshot {n} claims {extra} bytes of extra data"
                )));
            }
            let mut rest = vec![0; (extra + id + name) as usize];
            file.read_bytes(at + 40, &mut rest)?;
            let more = |at: u64| {
                (extra >= at + 8)
                    .then(|| words(&rest[at as usize..at as usize + 8]).first().copied())
                    .flatten()
            };
            let text = |from: u64, len: u64| {
                String::from_utf8_lossy(&rest[from as usize..(from + len) as usize]).into_owned()
            };
            let snapshot = Snapshot {
                id: text(extra, id),
                name: text(extra + id, name),
                l1_offset: long(0),
                l1_size: word(8),
                date: (word(16), word(20)),
                clock: long(24),
                state_size: more(0).unwrap_or_else(|| word(32).into()),
                disk_size: more(8),
                // All ones where instructions were not counted.
                icount: more(16).filter(|&count| count != u64::MAX),
                extra: rest[..extra as usize].to_vec(),
            };
            if !snapshot.l1_offset.is_multiple_of(geo.cluster())
                || snapshot.l1_offset >= 1 << 56
                || u64::from(snapshot.l1_size) * 8 > 32 << 20
            {
                return Err(corrupt(format!("snapshot {n} has no valid L1 table")));
            }
            table.bytes += (40 + extra + id + name).next_multiple_of(8);
            if table.bytes > TABLE_MOST {
                return Err(corrupt("its snapshot table is too long".into()));
            }
            table.list.push(snapshot);
        }
        Ok(table)
    }

    /// The snapshot of that id, or of that name.
    pub fn find(&self, wanted: &str) -> Option<&Snapshot> {
        let by_id = self.list.iter().find(|one| one.id == wanted);
        by_id.or_else(|| self.list.iter().find(|one| one.name == wanted))
    }

    /// The table as it is in the file; what does not say how large the disk was gets `size`.
    pub fn to_bytes(&self, size: u64) -> Vec<u8> {
        let mut out = Vec::new();
        for one in &self.list {
            let mut extra = one.extra.clone();
            if extra.len() < 16 {
                extra.resize(16, 0);
            }
            extra[..8].copy_from_slice(&one.state_size.to_be_bytes());
            let size = one.disk_size.unwrap_or(size);
            extra[8..16].copy_from_slice(&size.to_be_bytes());
            out.extend(one.l1_offset.to_be_bytes());
            out.extend(one.l1_size.to_be_bytes());
            out.extend((one.id.len() as u16).to_be_bytes());
            out.extend((one.name.len() as u16).to_be_bytes());
            out.extend(one.date.0.to_be_bytes());
            out.extend(one.date.1.to_be_bytes());
            out.extend(one.clock.to_be_bytes());
            out.extend(u32::try_from(one.state_size).unwrap_or(0).to_be_bytes());
            out.extend((extra.len() as u32).to_be_bytes());
            out.extend(extra);
            out.extend(one.id.as_bytes());
            out.extend(one.name.as_bytes());
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out
    }

    /// The L1 tables: offset and entries.
    pub fn l1_tables(&self, file: &File) -> Result<Vec<(u64, Vec<u64>)>, Error> {
        let mut tables = Vec::new();
        let mut total = 0;
        for snapshot in &self.list {
            let len = u64::from(snapshot.l1_size) * 8;
            total += len;
            if total > L1_MOST {
                return Err(Error::Unsupported {
                    image: file.name().to_owned(),
                    reason: format!("its snapshots' L1 tables have more than {L1_MOST} bytes"),
                });
            }
            let mut data = vec![0; len as usize];
            file.read_bytes(snapshot.l1_offset, &mut data)?;
            tables.push((snapshot.l1_offset, words(&data)));
        }
        Ok(tables)
    }

    /// The clusters of the snapshots' L1 and L2 tables.
    pub fn metadata(&self, file: &File, geo: Geometry) -> Result<HashSet<u64>, Error> {
        let mut clusters = HashSet::new();
        for (offset, table) in self.l1_tables(file)? {
            let end = (offset + table.len() as u64 * 8).div_ceil(geo.cluster());
            clusters.extend(offset >> geo.cluster_bits..end);
            let tables = table
                .iter()
                .map(|entry| entry & OFFSET)
                .filter(|&offset| offset != 0);
            clusters.extend(tables.map(|offset| offset >> geo.cluster_bits));
        }
        Ok(clusters)
    }
}
