//! Disk images and the block layer: raw, qcow2, LUKS, backing chains.
//!
//! ```text
//!   virtio-blk, block jobs, the image tool
//!        |
//!     Engine        runs requests against an image: worker threads or io_uring, limits
//!        |
//!     Image         raw | qcow2 | luks: guest offsets -> offsets in files
//!        |
//!     File          one open file or block device: buffered or O_DIRECT, locked
//! ```
//!
//! Nothing here opens a path by itself, [`tree`] apart: whoever uses an image opens its files (the
//! daemon does, and hands the descriptors to the VMM), the backing files among them. `tree` opens
//! an image and everything behind it by name, for tools.
//!
//! What works on whole images ([`convert`], [`compare`], [`commit`], [`copy`], [`rebase`]) needs bounded
//! memory, tells a [`Job`] how far it is, and stops when that is cancelled.

pub mod chain;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod copy;
pub mod engine;
mod error;
mod file;
pub mod follow;
mod grace;
mod image;
pub mod iovec;
mod job;
pub mod limits;
pub mod lock;
pub mod luks;
pub mod measure;
pub mod noting;
pub mod qcow2;
mod raw;
pub mod rebase;
#[cfg(test)]
mod testing;
pub mod tree;
mod workers;

pub use error::Error;
pub use file::{Alignment, File, Mark};
pub use image::{Cipher, Extent, Image, ImageInfo, IoBuf, Plain, read_bytes};
pub use job::Job;
pub use qcow2::Qcow2;
pub use raw::Raw;
