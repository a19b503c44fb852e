//! Compressed clusters.

use std::sync::{Arc, Mutex, PoisonError};

use miniz_oxide::deflate::core as deflate;
use miniz_oxide::inflate::core as inflate;

use super::entry::Entry;
use super::meta::Meta;
use super::{Compression, Qcow2};
use crate::image::check_range;
use crate::{Error, Image, IoBuf};

/// The window of qcow2's deflate streams, bytes.
const WINDOW: usize = 4096;
const DEFLATE_LEVEL: i32 = 6;
const ZSTD_LEVEL: i32 = 3;

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
    let mut out = vec![0; len];
    match how {
        Compression::Zlib => {
            let mut state = Box::<inflate::DecompressorOxide>::default();
            let flags = inflate::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
            let (_, _, got) = inflate::decompress(&mut state, data, &mut out, 0, flags);
            if got != len {
                return Err("deflate data that can't be decompressed");
            }
        }
        Compression::Zstd => {
            let (mut data, mut done) = (data, 0);
            while done < len {
                let bad = "zstd data that can't be decompressed";
                // The frame's own length: what is stored after it isn't ours.
                let frame = zstd_safe::find_frame_compressed_size(data).map_err(|_| bad)?;
                let got = zstd_safe::decompress(&mut out[done..], data.get(..frame).ok_or(bad)?)
                    .map_err(|_| bad)?;
                if got == 0 || frame == 0 {
                    return Err(bad);
                }
                done += got;
                data = &data[frame..];
            }
        }
    }
    Ok(out)
}

/// Compresses; none if that gains nothing.
pub fn pack(how: Compression, data: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; data.len() - 1];
    let len = match how {
        Compression::Zlib => {
            // Raw deflate. Readers have a window of 4 KiB only, so each 4 KiB begin anew.
            let flags = deflate::create_comp_flags_from_zip_params(DEFLATE_LEVEL, 0, 0);
            let mut state = deflate::CompressorOxide::new(flags);
            let (mut read, mut written) = (0, 0);
            while read < data.len() {
                let stop = (read + WINDOW).min(data.len());
                let flush = if stop == data.len() {
                    deflate::TDEFLFlush::Finish
                } else {
                    deflate::TDEFLFlush::Full
                };
                let (status, took, gave) =
                    deflate::compress(&mut state, &data[read..stop], &mut out[written..], flush);
                read += took;
                written += gave;
                match status {
                    deflate::TDEFLStatus::Done => break,
                    deflate::TDEFLStatus::Okay if read == stop && written < out.len() => {}
                    _ => return None,
                }
            }
            written
        }
        Compression::Zstd => zstd_safe::compress(out.as_mut_slice(), data, ZSTD_LEVEL).ok()?,
    };
    out.truncate(len);
    Some(out)
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
