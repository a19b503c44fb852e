//! Writing what an image and those between have into one behind them.

use std::sync::Arc;

use crate::convert::{Options, Target, convert, with_buffer};
use crate::follow::Follow;
use crate::qcow2::Tracker;
use crate::{Error, Image, IoBuf, Job, Qcow2};

/// What is copied at once when catching up, bytes.
const PIECE: u64 = 512 << 10;

/// Copies what is decided in the first `depth` images of `top` into `base`, the image at that
/// depth, which is open for writing, and grows it to `top`'s size if it is smaller. When this
/// returns all of it is on stable storage, so that what was copied can be dropped from `top`
/// ([`Qcow2::empty`]). If it does not come to its end nothing is lost: `base` has a part of the
/// changes, and `top` all of them.
///
/// # Errors
/// [`Error::Cancelled`], the host's I/O.
pub fn commit(
    top: &Arc<dyn Image>,
    depth: u32,
    base: &Arc<dyn Image>,
    base_qcow2: Option<&Arc<Qcow2>>,
    job: &Job,
) -> Result<(), Error> {
    if base.size() < top.size() {
        base.resize(top.size())?;
    }
    let target = Target {
        image: base.clone(),
        qcow2: base_qcow2.cloned(),
        zeroed: false,
    };
    let options = Options {
        depth: Some(depth),
        ..Options::default()
    };
    convert(top, &target, &options, job)?;
    base.flush()
}

/// A commit of an image that is written meanwhile, as [`Follow`] has it: in the end whoever uses
/// the image goes on with `base` in its place. Until then the image stays what it is, and can be
/// used further if the commit is given up.
#[derive(Debug)]
pub struct Active {
    top: Arc<Qcow2>,
    depth: u32,
    base: Arc<dyn Image>,
    base_qcow2: Option<Arc<Qcow2>>,
    tracker: Tracker,
}

impl Active {
    /// Begins one: as [`commit`]'s parameters.
    #[must_use]
    pub fn new(
        top: Arc<Qcow2>,
        depth: u32,
        base: Arc<dyn Image>,
        base_qcow2: Option<Arc<Qcow2>>,
    ) -> Self {
        // What is given back above the end of a shorter image behind it reads as zeroes, and must
        // with a longer one behind it, too.
        top.explicit_zeroes();
        Self {
            tracker: top.track(),
            top,
            depth,
            base,
            base_qcow2,
        }
    }
}

impl Follow for Active {
    fn copy(&self, job: &Job) -> Result<(), Error> {
        let top: Arc<dyn Image> = self.top.clone();
        commit(&top, self.depth, &self.base, self.base_qcow2.as_ref(), job)
    }

    fn catch_up(&self, job: &Job) -> Result<u64, Error> {
        let runs = self.top.tracked(&self.tracker)?;
        let all = runs.iter().map(|(from, to)| to - from).sum();
        job.more(all);
        if self.base.size() < self.top.size() {
            self.base.resize(self.top.size())?;
        }
        for (from, to) in runs {
            let mut at = from;
            while at < to {
                let extent = self.top.extent(at, (to - at).min(PIECE))?;
                let len = extent.len;
                // One that is not there above `depth` is past the end of a shorter image: zeroes.
                if extent.depth >= self.depth {
                    // As before, or given back: the base has it.
                } else if extent.zero {
                    self.base.write_zeroes(at, len, true)?;
                } else {
                    with_buffer(PIECE, |buffer| {
                        let io = IoBuf::from_slice(&mut buffer[..len as usize]);
                        self.top.read(at, &[io])?;
                        self.base.write(at, &[io])
                    })?;
                }
                at += len;
                job.advance(len, len)?;
            }
        }
        Ok(all)
    }

    fn flush(&self) -> Result<(), Error> {
        self.base.flush()
    }

    fn finish(&self, job: &Job) -> Result<(), Error> {
        while self.catch_up(job)? > 0 {}
        self.base.flush()
    }
}
