//! Writing what an image and those between have into one behind them.

use std::sync::Arc;

use crate::convert::{Options, Target, convert};
use crate::{Error, Image, Job, Qcow2};

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
