//! Compressed clusters.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use zlib_rs::{Deflate, DeflateFlush, Inflate, InflateFlush, Status};
use zstd_safe::{CCtx, DCtx};

use super::entry::Entry;
use super::meta::Meta;
use super::{Compression, Qcow2};
use crate::image::check_range;
use crate::{Error, Image, IoBuf};

/// Readers of qcow2's deflate streams have a window of 4 KiB.
const WINDOW_BITS: u8 = 12;
/// What we read may come from who did not care.
const WINDOW_BITS_MOST: u8 = 15;
const DEFLATE_LEVEL: i32 = 6;
const ZSTD_LEVEL: i32 = 3;

thread_local! {
    /// Each thread's compressors: to make one costs about as much as a cluster.
    static DEFLATE: RefCell<Option<Deflate>> = const { RefCell::new(None) };
    static ZSTD: RefCell<Option<CCtx<'static>>> = const { RefCell::new(None) };
    static UNZSTD: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// The compressed cluster that was read last.
#[derive(Debug, Default)]
pub struct Unpacked(Mutex<Option<(u64, Arc<Vec<u8>>)>>);

impl Unpacked {
    /// What is stored may change.
    pub fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Decompresses exactly `len` bytes; what follows in `data` does not matter.
pub fn unpack(how: Compression, data: &[u8], len: usize) -> Result<Vec<u8>, &'static str> {
    match how {
        Compression::Zlib => {
            let bad = "deflate data that can't be decompressed";
            let mut out = vec![0; len];
            let mut state = Inflate::new(false, WINDOW_BITS_MOST);
            // The stream need not end where the cluster does; what counts is that all is there.
            let _ = state.decompress(data, &mut out, InflateFlush::Finish);
            if state.total_out() != len as u64 {
                return Err(bad);
            }
            Ok(out)
        }
        Compression::Zstd => UNZSTD.with(|cell| {
            let bad = "zstd data that can't be decompressed";
            let mut state = cell.take().or_else(DCtx::try_create).ok_or(bad)?;
            let mut out = vec![0; len];
            let (mut data, mut done) = (data, 0);
            while done < len {
                // The frame's own length: what is stored after it isn't ours.
                let frame = zstd_safe::find_frame_compressed_size(data).map_err(|_| bad)?;
                let got = state
                    .decompress(&mut out[done..], data.get(..frame).ok_or(bad)?)
                    .map_err(|_| bad)?;
                if got == 0 || frame == 0 {
                    return Err(bad);
                }
                done += got;
                data = &data[frame..];
            }
            cell.replace(Some(state));
            Ok(out)
        }),
    }
}

/// Compresses; none if that gains nothing.
pub fn pack(how: Compression, data: &[u8]) -> Option<Vec<u8>> {
    let most = data.len() - 1;
    match how {
        Compression::Zlib => DEFLATE.with(|cell| {
            let mut state = cell
                .take()
                .unwrap_or_else(|| Deflate::new(DEFLATE_LEVEL, false, WINDOW_BITS));
            state.reset();
            let mut out = vec![0; most];
            let done = state.compress(data, &mut out, DeflateFlush::Finish);
            let len = state.total_out() as usize;
            cell.replace(Some(state));
            if done != Ok(Status::StreamEnd) {
                return None;
            }
            out.truncate(len);
            Some(out)
        }),
        Compression::Zstd => ZSTD.with(|cell| {
            let mut state = cell.take().or_else(CCtx::try_create)?;
            let mut out = vec![0; most];
            let done = state.compress(out.as_mut_slice(), data, ZSTD_LEVEL);
            cell.replace(Some(state));
            out.truncate(done.ok()?);
            Some(out)
        }),
    }
}

impl Qcow2 {
    /// A compressed cluster's content.
    pub(super) fn unpack(&self, entry: Entry) -> Result<Arc<Vec<u8>>, Error> {
        let last = self
            .unpacked
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some((raw, data)) = last
            && raw == entry.raw
        {
            return Ok(data);
        }
        let (offset, len) = entry.compressed(&self.geo);
        // A cluster that gained nothing from compression is not stored so, give or take a sector.
        let len = len.min(2 * self.geo.cluster() + 1024);
        let mut data = vec![0; len as usize];
        self.file.read_bytes(offset, &mut data)?;
        let data =
            unpack(self.compression, &data, self.geo.cluster() as usize).map_err(|reason| {
                Error::Corrupt {
                    image: self.file.name().to_owned(),
                    reason: format!("{reason}, at {offset:#x}"),
                }
            })?;
        let data = Arc::new(data);
        *self
            .unpacked
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some((entry.raw, data.clone()));
        Ok(data)
    }

    /// Writes a cluster in compressed form, if that gains anything. `data` is the whole cluster
    /// at `offset`, or what there is of the image's last one.
    ///
    /// # Errors
    /// As [`Image::write`]; [`Error::Invalid`] if it isn't a cluster, or the image has an
    /// external data file.
    pub fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        let packed = self.compress(data);
        self.write_packed(offset, data, packed)
    }

    /// A cluster's content (or what there is of the image's last one) in compressed form; none if
    /// that gains nothing, or is not possible.
    #[must_use]
    pub fn compress(&self, data: &[u8]) -> Option<Vec<u8>> {
        if self.cipher.is_some() || self.geo.external || data.is_empty() {
            return None;
        }
        let cluster = self.geo.cluster() as usize;
        if data.len() >= cluster {
            return pack(self.compression, &data[..cluster]);
        }
        let mut padded = data.to_vec();
        padded.resize(cluster, 0);
        pack(self.compression, &padded)
    }

    /// Writes a cluster, in compressed form if `packed` is what [`Qcow2::compress`] made of it.
    ///
    /// # Errors
    /// As [`Qcow2::write_compressed`].
    pub fn write_packed(
        &self,
        offset: u64,
        data: &[u8],
        packed: Option<Vec<u8>>,
    ) -> Result<(), Error> {
        let geo = self.geo;
        check_range(self, offset, data.len() as u64)?;
        let whole = geo.cluster().min(self.size() - offset);
        if !offset.is_multiple_of(geo.cluster()) || data.len() as u64 != whole || data.is_empty() {
            return Err(Error::Invalid(
                "compressed writes are of whole clusters".into(),
            ));
        }
        if geo.external {
            return Err(Error::Invalid(format!(
                "{}: nothing in a data file is compressed",
                self.file.name()
            )));
        }
        let Some(packed) = packed else {
            // SAFETY: only read from, and borrowed until the call returns.
            let buf = unsafe { IoBuf::new(data.as_ptr().cast_mut(), data.len()) };
            return self.write(offset, &[buf]);
        };
        let guest = offset >> geo.cluster_bits;
        let len = packed.len() as u64;
        let _stay = self.grace.enter();
        let mut meta = self.changing()?;
        while meta.any_busy(guest, guest + 1) {
            meta = self
                .mapped
                .wait(meta)
                .unwrap_or_else(PoisonError::into_inner);
            meta.check_writable()?;
        }
        meta.own_table(guest, self.grace.mark())?;
        let at = meta.pack(len)?;
        let Some(entry) = Entry::new_compressed(&geo, at, len) else {
            let error = Error::Invalid(format!(
                "{} is too large for compressed data",
                self.file.name()
            ));
            let (first, count) = span(&meta, at, len);
            meta.release(first, count, false)?;
            return Err(error);
        };
        meta.busy.push(guest..guest + 1);
        meta.record(offset, whole);
        drop(meta);
        let done = self.file.write_bytes(at, &packed);
        let mut meta = self.meta();
        self.no_longer_busy(&mut meta, guest);
        if done.is_err() {
            let (first, count) = span(&meta, at, len);
            meta.release(first, count, false)?;
            return done;
        }
        let mark = self.grace.mark();
        let old = meta.entry(guest)?;
        meta.written += 1;
        meta.own_table(guest, mark)?;
        meta.set_entry(guest, entry)?;
        meta.drop_entry(old, false, mark);
        Ok(())
    }
}

fn span(meta: &Meta, at: u64, len: u64) -> (u64, u64) {
    let bits = meta.geo.cluster_bits;
    (at >> bits, ((at + len - 1) >> bits) - (at >> bits) + 1)
}

impl Meta {
    /// A place for `len` bytes of compressed data, less than a cluster: behind the last if that
    /// can be.
    fn pack(&mut self, len: u64) -> Result<u64, Error> {
        let (bits, cluster) = (self.geo.cluster_bits, self.geo.cluster());
        let last = self.pack >> bits;
        let room = if self.pack == 0 {
            0
        } else {
            cluster - self.pack % cluster
        };
        let at = if len <= room && self.share(last)? {
            self.pack
        } else {
            let (new, _) = self.allocate(1)?;
            self.take_fresh(new, 1);
            if room > 0 && len > room && new == last + 1 && self.share(last)? {
                self.pack
            } else {
                new << bits
            }
        };
        let end = at + len;
        self.pack = if end.is_multiple_of(cluster) { 0 } else { end };
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_back_whatever_follows() {
        let data: Vec<u8> = (0..65536_u32)
            .map(|n| (n / 7 % 251) as u8 ^ (n >> 12) as u8)
            .collect();
        for how in [Compression::Zlib, Compression::Zstd] {
            let mut packed = pack(how, &data).unwrap();
            assert!(packed.len() < data.len() / 2, "{how:?}: {}", packed.len());
            packed.extend([0xa5; 300]);
            assert_eq!(unpack(how, &packed, data.len()).unwrap(), data);
            assert!(unpack(how, &packed[..packed.len() / 2], data.len()).is_err());
            assert!(unpack(how, &[0xff; 100], data.len()).is_err());
        }
    }

    #[test]
    fn noise_is_not_packed() {
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .take(4096)
        .collect();
        assert!(pack(Compression::Zlib, &noise).is_none());
        assert!(pack(Compression::Zstd, &noise).is_none());
    }
}
