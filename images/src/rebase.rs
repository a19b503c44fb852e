//! Giving an image another backing file, with its content unchanged.

use std::sync::Arc;

use crate::convert::{threads, with_buffer};
use crate::{Error, Image, IoBuf, Job, Qcow2, iovec, workers};

/// What is compared at once, bytes.
const PIECE: u64 = 512 << 10;

/// Writes into `image` whatever it does not have itself and `new` does not have the same. What is
/// at `shared` or deeper in the chain is known to be the same in both.
///
/// The image's content stays what it is all the time; its header ([`Qcow2::set_backing`]) can be
/// changed when this has returned.
///
/// # Errors
/// [`Error::Cancelled`], the host's I/O.
pub fn rebase(
    image: &Arc<Qcow2>,
    new: Option<&Arc<dyn Image>>,
    shared: Option<u32>,
    compress: bool,
    job: &Job,
) -> Result<(), Error> {
    let size = image.size();
    image.explicit_zeroes();
    job.more(size);
    let unit = image.unit();
    let cluster = 1_u64 << image.header().cluster_bits;
    // Compressed clusters are written whole, where nothing of them is there.
    let compress = compress && unit == cluster;
    let piece = PIECE.max(cluster);
    let mut at = 0;
    let next = || {
        while at < size {
            let own = image.own_extent(at, (size - at).min(piece - at % piece))?;
            let mut len = own.len;
            let mut skip = own.present;
            if !skip && shared.is_some() {
                let below = image.extent(at, len)?;
                if below.len.is_multiple_of(unit) || at + below.len == size {
                    len = below.len;
                    skip = below.present && shared.is_some_and(|shared| below.depth >= shared);
                }
            }
            let from = at;
            at += len;
            if !skip {
                return Ok(Some((from, len)));
            }
            job.advance(len, 0)?;
        }
        Ok(None)
    };
    let below = new.map_or(0, |new| new.size());
    workers::run(threads(4), next, |(offset, len)| {
        job.check()?;
        with_buffer(2 * piece, |buffer| {
            let (old, other) = buffer.split_at_mut(piece as usize);
            let (old, other) = (&mut old[..len as usize], &mut other[..len as usize]);
            image.read(offset, &[IoBuf::from_slice(old)])?;
            other.fill(0);
            let there = below.saturating_sub(offset).min(len) as usize;
            if let (Some(new), 1..) = (new, there) {
                new.read(offset, &[IoBuf::from_slice(&mut other[..there])])?;
            }
            let mut from = 0;
            while from < len {
                let to = len.min(from + unit);
                let part = from as usize..to as usize;
                if old[part.clone()] != other[part.clone()] {
                    put(image, offset + from, &mut old[part], compress)?;
                }
                from = to;
            }
            Ok(())
        })?;
        job.advance(len, len)
    })?;
    image.flush()
}

fn put(image: &Qcow2, offset: u64, data: &mut [u8], compress: bool) -> Result<(), Error> {
    if iovec::is_zero(data) {
        image.write_zeroes(offset, data.len() as u64, true)
    } else if compress {
        image.write_compressed(offset, data)
    } else {
        image.write(offset, &[IoBuf::from_slice(data)])
    }
}
