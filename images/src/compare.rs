//! Whether two images have the same content.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::convert::{joined, with_buffer};
use crate::{Error, Extent, Image, IoBuf, Job, iovec, workers};

/// What is compared at once, bytes.
const PIECE: u64 = 512 << 10;
/// Where contents differ is told by sectors.
const SECTOR: usize = 512;
/// How far ahead the tables are looked at, bytes.
const AHEAD: u64 = 64 << 30;

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The same content, as far as both go; what one is longer reads as zeroes.
    Same,
    /// The contents differ here (the sector's offset); `tail` where one image has ended before.
    Differ {
        /// Bytes.
        at: u64,
        /// Past the end of the shorter image.
        tail: bool,
    },
    /// Strict only: one is stored where the other is not, from this offset on.
    Status {
        /// Bytes.
        at: u64,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Status {
    zero: bool,
    data: bool,
    present: bool,
    located: bool,
}

impl From<&Extent> for Status {
    fn from(extent: &Extent) -> Self {
        Self {
            zero: extent.zero,
            data: extent.data,
            present: extent.present,
            located: extent.offset.is_some(),
        }
    }
}

/// Compares two images; `strict`ly, whether the same of both is stored, too.
///
/// # Errors
/// [`Error::Cancelled`], the host's I/O.
pub fn compare(
    a: &dyn Image,
    b: &dyn Image,
    strict: bool,
    threads: usize,
    job: &Job,
) -> Result<Outcome, Error> {
    let common = a.size().min(b.size());
    let whole = a.size().max(b.size());
    job.more(whole);
    // The lowest place with a difference so far; the lowest bit tells how they differ there.
    let lowest = AtomicU64::new(u64::MAX);
    let mut at = 0;
    let mut known: [(Status, u64); 2] = [(
        Status {
            zero: false,
            data: false,
            present: false,
            located: false,
        },
        0,
    ); 2];
    let mut status = None;
    let next = || {
        while at < common && lowest.load(Ordering::Relaxed) > at {
            for (known, image) in known.iter_mut().zip([a, b]) {
                if known.1 == 0 {
                    *known = joined(image, at, (common - at).min(AHEAD), |one| Status::from(one))?;
                }
            }
            let (one, other) = (known[0].0, known[1].0);
            let mut len = known[0].1.min(known[1].1);
            if strict && one != other {
                status = Some(at);
                at = common;
                return Ok(None);
            }
            let skip = one.zero && other.zero;
            if !skip {
                len = len.min(PIECE - at % PIECE);
            }
            let from = at;
            at += len;
            for known in &mut known {
                known.1 -= len;
            }
            if !skip {
                return Ok(Some((from, len, [one.zero, other.zero])));
            }
            job.advance(len, 0)?;
        }
        Ok(None)
    };
    workers::run(threads, next, |(offset, len, zero)| {
        let found = with_buffer(2 * PIECE, |buffer| {
            let (one, other) = buffer.split_at_mut(PIECE as usize);
            let (one, other) = (&mut one[..len as usize], &mut other[..len as usize]);
            // What is known to be zeroes is not read.
            match zero {
                [true, _] => {
                    b.read(offset, &[IoBuf::from_slice(other)])?;
                    Ok(nonzero(other))
                }
                [_, true] => {
                    a.read(offset, &[IoBuf::from_slice(one)])?;
                    Ok(nonzero(one))
                }
                _ => {
                    a.read(offset, &[IoBuf::from_slice(one)])?;
                    b.read(offset, &[IoBuf::from_slice(other)])?;
                    Ok(different(one, other))
                }
            }
        })?;
        if let Some(within) = found {
            lowest.fetch_min(offset + within, Ordering::Relaxed);
        }
        job.advance(len, len)
    })?;
    let lowest = lowest.into_inner();
    if lowest != u64::MAX {
        return Ok(Outcome::Differ {
            at: lowest,
            tail: false,
        });
    }
    if let Some(at) = status {
        return Ok(Outcome::Status { at });
    }
    let longer = if a.size() > b.size() { a } else { b };
    Ok(match first_nonzero(longer, common, whole, job)? {
        Some(at) => Outcome::Differ { at, tail: true },
        None => Outcome::Same,
    })
}

/// The first sector in a range that is not zero.
fn first_nonzero(image: &dyn Image, from: u64, to: u64, job: &Job) -> Result<Option<u64>, Error> {
    let mut at = from;
    while at < to {
        let (zero, mut len) = joined(image, at, (to - at).min(AHEAD), |one| one.zero)?;
        if !zero {
            len = len.min(PIECE);
            let found = with_buffer(PIECE, |buffer| {
                let data = &mut buffer[..len as usize];
                image.read(at, &[IoBuf::from_slice(data)])?;
                Ok(nonzero(data))
            })?;
            if let Some(within) = found {
                return Ok(Some(at + within));
            }
        }
        job.advance(len, len)?;
        at += len;
    }
    Ok(None)
}

fn nonzero(data: &[u8]) -> Option<u64> {
    if iovec::is_zero(data) {
        return None;
    }
    data.chunks(SECTOR)
        .position(|sector| !iovec::is_zero(sector))
        .map(|n| (n * SECTOR) as u64)
}

fn different(one: &[u8], other: &[u8]) -> Option<u64> {
    if one == other {
        return None;
    }
    one.chunks(SECTOR)
        .zip(other.chunks(SECTOR))
        .position(|(one, other)| one != other)
        .map(|n| (n * SECTOR) as u64)
}
