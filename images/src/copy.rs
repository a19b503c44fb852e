//! Copying a disk that is written meanwhile to another image.

use std::sync::{Arc, Mutex, PoisonError};

use crate::convert::{Options, Target, convert, threads, with_buffer};
use crate::follow::Follow;
use crate::noting::{Mirror, Noting};
use crate::{Error, Image, IoBuf, Job};

/// What is copied at once when catching up, bytes.
const PIECE: u64 = 512 << 10;
/// What is copied at once otherwise, bytes.
const LARGE_PIECE: u64 = 1 << 20;

/// A copy of a disk that goes on. The disk notes its writes from the copy's beginning on (it was at
/// rest then), which is the caller's to see to, and to end.
#[derive(Debug)]
pub struct Copy {
    source: Arc<Noting>,
    depth: Option<u32>,
    target: Target,
    options: CopyOptions,
    mirror: Mutex<Option<Arc<Mirror>>>,
}

/// How it is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyOptions {
    /// Only what the image on top has itself; the target has the rest behind it, too.
    pub shallow: bool,
    /// As soon as all is copied once, a change is answered when the copy has it, too: what is left
    /// only becomes less, however fast the guest writes.
    pub synchronous: bool,
    /// At most so many bytes are on their way at once, or about so many; 0: as usual.
    pub buffer: u64,
}

impl Copy {
    /// Begins one.
    #[must_use]
    pub fn new(source: Arc<Noting>, target: Target, options: CopyOptions) -> Self {
        Self {
            source,
            depth: options.shallow.then_some(1),
            target,
            options,
            mirror: Mutex::default(),
        }
    }

    fn failed(&self) -> Result<(), Error> {
        let mirror = self.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        match mirror.as_ref().and_then(|mirror| mirror.failure()) {
            Some(why) => Err(Error::Invalid(why)),
            None => Ok(()),
        }
    }

    /// What gets every change at once, from now on.
    fn mirror(&self) -> Option<Arc<Mirror>> {
        let mut mirror = self.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        if self.options.synchronous && mirror.is_none() {
            *mirror = Some(self.source.mirror_to(self.target.image.clone()));
        }
        mirror.clone()
    }

    /// Copies what is at `at`, at most `most` bytes: how many.
    fn piece(&self, at: u64, most: u64) -> Result<u64, Error> {
        let extent = self.source.extent(at, most)?;
        let len = extent.len.clamp(1, most);
        let target = &self.target.image;
        if extent.zero {
            // As well where it was given back: it may have been copied before.
            target.write_zeroes(at, len, true)?;
        } else if self.depth.is_none_or(|depth| extent.depth < depth) {
            with_buffer(PIECE, |buffer| {
                let io = IoBuf::from_slice(&mut buffer[..len as usize]);
                self.source.read(at, &[io])?;
                target.write(at, &[io])
            })?;
        }
        Ok(len)
    }
}

impl Follow for Copy {
    fn copy(&self, job: &Job) -> Result<(), Error> {
        if self.source.size() != self.target.image.size() {
            let words = "Source and target image have different sizes";
            return Err(Error::Invalid(words.to_owned()));
        }
        let (mut parallel, mut piece) = (threads(8), LARGE_PIECE);
        if self.options.buffer > 0 {
            piece = piece.min(self.options.buffer);
            let most = usize::try_from(self.options.buffer / piece).unwrap_or(usize::MAX);
            parallel = parallel.min(most.max(1));
        }
        let options = Options {
            depth: self.depth,
            parallel,
            piece,
            ..Options::default()
        };
        let source: Arc<dyn Image> = self.source.clone();
        convert(&source, &self.target, &options, job)
    }

    fn catch_up(&self, job: &Job) -> Result<u64, Error> {
        let mirror = self.mirror();
        self.failed()?;
        let runs = self.source.runs();
        let all = runs.iter().map(|(from, to)| to - from).sum();
        job.more(all);
        for (from, to) in runs {
            let mut at = from;
            while at < to {
                let most = (to - at).min(PIECE);
                let len = {
                    // A change meanwhile would be overwritten with what was there before.
                    let _range = mirror.as_ref().map(|mirror| mirror.take(at, most));
                    self.piece(at, most)?
                };
                at += len;
                job.advance(len, len)?;
            }
        }
        Ok(all)
    }

    fn flush(&self) -> Result<(), Error> {
        self.target.image.flush()
    }

    fn finish(&self, job: &Job) -> Result<(), Error> {
        while self.catch_up(job)? > 0 {}
        self.failed()?;
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::*;
    use crate::testing::{Random, Scratch};
    use crate::{File, Raw, read_bytes};

    const SIZE: u64 = 8 << 20;

    fn raw(scratch: &Scratch, name: &str) -> Arc<dyn Image> {
        let path = scratch.file(name, SIZE);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        Arc::new(Raw::new(File::new(file.into(), name).unwrap()).unwrap())
    }

    fn content(image: &dyn Image) -> Vec<u8> {
        let mut data = vec![0; SIZE as usize];
        read_bytes(image, 0, &mut data).unwrap();
        data
    }

    /// A disk that is written by two all the time; the copy is what it is at the end, and once more
    /// when each has become the other's.
    fn copied(synchronous: bool) {
        let scratch = Scratch::new();
        let (from, to) = (raw(&scratch, "from"), raw(&scratch, "to"));
        let disk = Arc::new(Noting::new(from.clone()));
        let target = Target {
            image: to.clone(),
            qcow2: None,
            zeroed: true,
        };
        disk.note_by(4096);
        let options = CopyOptions {
            synchronous,
            buffer: 1,
            ..CopyOptions::default()
        };
        let copy = Copy::new(disk.clone(), target, options);
        let (stop, done) = (AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for n in 0..2u64 {
                let (disk, stop, done) = (&disk, &stop, &done);
                scope.spawn(move || {
                    let mut random = Random::new(&format!("writer {n}"));
                    let mut data = vec![0; 64 << 10];
                    while !stop.load(Ordering::Relaxed) {
                        random.fill(&mut data);
                        let len = random.below(data.len() as u64 - 1) + 1;
                        done.fetch_add(1, Ordering::Relaxed);
                        // The same quarter, so that they meet.
                        let at = random.below(SIZE / 4 - len);
                        match random.below(8) {
                            0 => disk.write_zeroes(at, len, true).unwrap(),
                            1 => disk.discard(at, len).unwrap(),
                            _ => {
                                let io = IoBuf::from_slice(&mut data[..len as usize]);
                                disk.write(at, &[io]).unwrap();
                            }
                        }
                    }
                });
            }
            let job = Job::new();
            copy.copy(&job).unwrap();
            while done.load(Ordering::Relaxed) < 2000 {
                copy.catch_up(&job).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        copy.finish(&Job::new()).unwrap();
        assert!(content(&*from) == content(&*to));
        assert!(content(&*to).iter().any(|byte| *byte != 0));
        // Both from now on.
        disk.note(false);
        disk.mirror_to(to.clone());
        let mut more = vec![0x5a; 3 << 20];
        let io = IoBuf::from_slice(&mut more);
        disk.write(SIZE - (3 << 20), &[io]).unwrap();
        assert!(disk.plain(0, 512, true).is_none());
        assert!(content(&*from) == content(&*to));
        disk.mirror_no_more();
        disk.write_zeroes(0, SIZE, false).unwrap();
        assert!(content(&*from) != content(&*to));
        assert!(disk.plain(0, 512, true).is_some());
    }

    #[test]
    fn a_copy_has_what_was_written_meanwhile() {
        copied(false);
        copied(true);
    }

    /// One whose writes fail.
    #[derive(Debug)]
    struct Full(Arc<dyn Image>);

    impl Image for Full {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
            self.0.read(offset, bufs)
        }
        fn write(&self, _: u64, _: &[IoBuf]) -> Result<(), Error> {
            Err(Error::Invalid("no space".into()))
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), Error> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> Result<(), Error> {
            Ok(())
        }
        fn flush(&self) -> Result<(), Error> {
            Ok(())
        }
        fn extent(&self, offset: u64, len: u64) -> Result<crate::Extent, Error> {
            self.0.extent(offset, len)
        }
        fn info(&self) -> Result<crate::ImageInfo, Error> {
            self.0.info()
        }
        fn resize(&self, size: u64) -> Result<(), Error> {
            self.0.resize(size)
        }
    }

    #[test]
    fn a_copy_that_fails_is_nothing_to_the_guest() {
        let scratch = Scratch::new();
        let from = raw(&scratch, "from");
        let disk = Arc::new(Noting::new(from.clone()));
        let target = Target {
            image: Arc::new(Full(raw(&scratch, "to"))),
            qcow2: None,
            zeroed: true,
        };
        disk.note(true);
        let options = CopyOptions {
            synchronous: true,
            ..CopyOptions::default()
        };
        let copy = Copy::new(disk.clone(), target, options);
        copy.copy(&Job::new()).unwrap();
        assert_eq!(copy.catch_up(&Job::new()).unwrap(), 0);
        let mut data = vec![7; 4096];
        let io = IoBuf::from_slice(&mut data);
        disk.write(0, &[io]).unwrap();
        let error = copy.finish(&Job::new()).unwrap_err();
        assert!(error.to_string().contains("no space"), "{error}");
        assert_eq!(content(&*from)[..4096], data[..]);
    }
}
