//! A write that needs new clusters, in two steps: their place first, and the map when the bytes are
//! there. Whoever writes them need not be a thread of ours that waits.

use std::sync::Arc;

use super::Qcow2;
use super::entry::State;
use crate::Error;
use crate::grace::Stay;
use crate::image::{Hold, Mapping, Plain, check_range};

/// New clusters for a write that is under way. Dropped before it has been [`Mapping::written`],
/// they are free again.
#[derive(Debug)]
struct Claimed {
    image: Arc<Qcow2>,
    _stay: Stay,
    /// Guest bytes: offset, how many.
    bytes: (u64, u64),
    host: u64,
    /// The file reads as zeroes there until they are written.
    fresh: bool,
    /// Something may refer to them.
    mapped: bool,
}

impl Qcow2 {
    /// A place for these bytes in new clusters, if nothing else has to be read, written or waited
    /// for: the metadata is in memory, space has a refcount already, and whatever else is in those
    /// clusters reads as zeroes.
    pub(super) fn claim_new(self: Arc<Self>, offset: u64, len: u64) -> Option<Plain> {
        check_range(&*self, offset, len).ok()?;
        let geo = self.geo;
        if self.cipher.is_some() || geo.extended || geo.external || len == 0 || !self.writable {
            return None;
        }
        let bits = geo.cluster_bits;
        let end = offset + len;
        let (first, last) = (offset >> bits, (end - 1) >> bits);
        let count = last - first + 1;
        let stay = self.grace.enter();
        let mut meta = self.meta();
        let room = !meta.l2.is_full() && !meta.refcounts.is_full();
        if !meta.begun
            || !room
            || meta.check_writable().is_err()
            || meta.reserve.end - meta.reserve.start < count
            || !meta.owns_table(first)
            || meta.any_busy(first, last + 1)
        {
            return None;
        }
        let (None, run) = meta.run_new(first, count).ok()? else {
            return None;
        };
        if run < count {
            return None;
        }
        let inside = geo.cluster() - 1;
        let cut = [(offset & inside != 0, first), (end & inside != 0, last)];
        for (_, guest) in cut.into_iter().filter(|(cut, _)| *cut) {
            let below = self.backing.as_ref().map_or(0, |backing| backing.size());
            let empty = match meta.entry(guest).ok()?.state(&geo, 0) {
                State::Zero => true,
                State::Absent => guest << bits >= below,
                State::Data | State::Compressed => false,
            };
            if !empty || meta.reserve.start < meta.fresh {
                return None;
            }
        }
        let (at, _) = meta.allocate(count).ok()?;
        let fresh = meta.take_fresh(at, count);
        meta.busy.push(first..last + 1);
        meta.record(offset, len);
        drop(meta);
        let claimed = Claimed {
            _stay: stay,
            bytes: (offset, len),
            host: at << bits,
            fresh,
            mapped: false,
            image: self,
        };
        let file = claimed.image.data.clone();
        let host = claimed.host + (offset & inside);
        Some(Plain::new(file, host, Hold::Mapping(Box::new(claimed))))
    }
}

impl Mapping for Claimed {
    fn written(mut self: Box<Self>) -> Result<(), Error> {
        let image = self.image.clone();
        let mut meta = image.meta();
        meta.check_writable()?;
        if !self.fresh {
            meta.written += 1;
        }
        let mark = image.grace.mark();
        let (offset, len) = self.bytes;
        let bits = image.geo.cluster_bits;
        meta.own_table(offset >> bits, mark)?;
        self.mapped = true;
        let result = meta.map_new(offset..offset + len, self.host, false, mark);
        drop(meta);
        result
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let bits = self.image.geo.cluster_bits;
        let (offset, len) = self.bytes;
        let (first, last) = (offset >> bits, (offset + len - 1) >> bits);
        let mut meta = self.image.meta();
        if !self.mapped
            && let Err(error) = meta.release(self.host >> bits, last - first + 1, false)
        {
            log::error!("{error}");
        }
        self.image.no_longer_busy(&mut meta, first);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::iovec::AlignedBuf;
    use crate::qcow2::{Create, Options, create};
    use crate::testing::{Scratch, have};
    use crate::{File, Image};

    const CLUSTER: u64 = 64 << 10;

    /// An image whose first cluster is written, so that its tables are there and in memory.
    fn image(dir: &Scratch) -> Arc<Qcow2> {
        let path = dir.file("disk", 0);
        let open = || {
            let file = fs::File::options().read(true).write(true).open(&path);
            File::new(OwnedFd::from(file.unwrap()), "disk").unwrap()
        };
        create(open(), None, &Create::new(8 << 20)).unwrap();
        let image = Qcow2::open(open(), Options::default()).unwrap();
        image.write(0, &[filled(1).io(CLUSTER as usize)]).unwrap();
        Arc::new(image)
    }

    fn filled(byte: u8) -> AlignedBuf {
        let mut data = AlignedBuf::new(CLUSTER as usize).unwrap();
        data.fill(byte);
        data
    }

    fn byte_at(image: &Qcow2, offset: u64) -> u8 {
        let mut byte = [0];
        crate::read_bytes(image, offset, &mut byte).unwrap();
        byte[0]
    }

    fn checked(dir: &Scratch) {
        if have("qemu-img") {
            let disk = dir.path().join("disk");
            let output = Command::new("qemu-img").arg("check").arg(disk).output();
            let output = output.unwrap();
            assert!(output.status.success(), "{output:?}");
        }
    }

    #[test]
    fn a_claim_is_seen_when_it_is_written_and_not_before() {
        let dir = Scratch::new();
        let image = image(&dir);
        // Two clusters, the second in part: what is not written of it is zeroes.
        let at = 4 * CLUSTER;
        let plain = image.clone().claim(at, CLUSTER + 512).unwrap();
        let mut data = filled(7);
        plain
            .file()
            .write(plain.offset(), &[data.io(usize::MAX)])
            .unwrap();
        let rest = [data.io(512)];
        plain.file().write(plain.offset() + CLUSTER, &rest).unwrap();
        assert_eq!(byte_at(&image, at), 0);
        assert!(image.plain(at, CLUSTER, true).is_none());
        plain.end().unwrap();
        assert_eq!(byte_at(&image, at), 7);
        assert_eq!(byte_at(&image, at + CLUSTER + 511), 7);
        assert_eq!(byte_at(&image, at + CLUSTER + 512), 0);
        assert!(image.plain(at, 2 * CLUSTER, true).is_some());
        drop(image);
        checked(&dir);
    }

    #[test]
    fn a_claim_that_is_given_up_leaves_nothing() {
        let dir = Scratch::new();
        let image = image(&dir);
        let before = fs::metadata(dir.path().join("disk")).unwrap().len();
        let mut others = (4 << 20..8 << 20).step_by(CLUSTER as usize);
        for _ in 0..1000 {
            let Some(plain) = image.clone().claim(CLUSTER, CLUSTER) else {
                // Space has to be found first: this does.
                let at = others.next().expect("what is given back is used again");
                image.write(at, &[filled(2).io(usize::MAX)]).unwrap();
                continue;
            };
            plain
                .file()
                .write(plain.offset(), &[filled(9).io(usize::MAX)])
                .unwrap();
            drop(plain);
            assert_eq!(byte_at(&image, CLUSTER), 0);
            image.flush().unwrap();
        }
        // The same place again and again; but it is not taken for one that reads as zeroes.
        image.write(CLUSTER + 512, &[filled(3).io(512)]).unwrap();
        assert_eq!(byte_at(&image, CLUSTER + 512), 3);
        assert_eq!(byte_at(&image, CLUSTER), 0);
        assert_eq!(byte_at(&image, CLUSTER + 1024), 0);
        drop(image);
        let after = fs::metadata(dir.path().join("disk")).unwrap().len();
        assert!(after < before + (64 << 20), "{before} {after}");
        checked(&dir);
    }

    #[test]
    fn who_writes_to_a_claimed_cluster_waits_for_it() {
        let dir = Scratch::new();
        let image = image(&dir);
        let plain = image.clone().claim(CLUSTER, CLUSTER).unwrap();
        assert!(image.clone().claim(CLUSTER + 512, 512).is_none());
        let other = {
            let image = image.clone();
            std::thread::spawn(move || image.write(CLUSTER, &[filled(5).io(512)]).unwrap())
        };
        std::thread::sleep(Duration::from_millis(20));
        plain
            .file()
            .write(plain.offset(), &[filled(4).io(usize::MAX)])
            .unwrap();
        plain.end().unwrap();
        other.join().unwrap();
        assert_eq!(byte_at(&image, CLUSTER), 5, "the later one");
        assert_eq!(byte_at(&image, CLUSTER + 512), 4);
        drop(image);
        checked(&dir);
    }

    #[test]
    fn what_is_in_a_cluster_is_never_claimed_away() {
        let dir = Scratch::new();
        let image = image(&dir);
        // There already; in another table; past the end.
        assert!(image.clone().claim(0, CLUSTER).is_none());
        assert!(image.clone().claim(0, 2 * CLUSTER).is_none());
        assert!(image.clone().claim(8 << 20, 512).is_none());
        assert!(image.clone().claim(u64::MAX, 2).is_none());
        // A part of a compressed cluster; all of one.
        image.write_compressed(CLUSTER, &filled(6)).unwrap();
        assert!(image.clone().claim(CLUSTER, 512).is_none());
        let plain = image.clone().claim(CLUSTER, CLUSTER).unwrap();
        plain
            .file()
            .write(plain.offset(), &[filled(8).io(usize::MAX)])
            .unwrap();
        assert_eq!(byte_at(&image, CLUSTER), 6);
        plain.end().unwrap();
        assert_eq!(byte_at(&image, CLUSTER), 8);
        image.flush().unwrap();
        drop(image);
        checked(&dir);
    }
}
