//! What copies an image that is written meanwhile.

use crate::{Error, Job};

/// [`Follow::copy`], then [`Follow::catch_up`] until little is left; then nobody may write to the
/// image, [`Follow::finish`], and the copy has its content.
pub trait Follow: Send + Sync + std::fmt::Debug {
    /// Copies all there is.
    ///
    /// # Errors
    /// [`Error::Cancelled`], the host's I/O.
    fn copy(&self, job: &Job) -> Result<(), Error>;

    /// Copies what was written since the last time: how many bytes that were.
    ///
    /// # Errors
    /// As [`Follow::copy`].
    fn catch_up(&self, job: &Job) -> Result<u64, Error>;

    /// Has all that was copied so far reach stable storage.
    ///
    /// # Errors
    /// The host's I/O.
    fn flush(&self) -> Result<(), Error>;

    /// Copies the rest, while nobody writes to the image, and has all of it reach stable storage.
    ///
    /// # Errors
    /// As [`Follow::copy`].
    fn finish(&self, job: &Job) -> Result<(), Error> {
        while self.catch_up(job)? > 0 {}
        self.flush()
    }
}
