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
//! Nothing here opens a path by itself: whoever uses an image opens its files (the daemon does,
//! and hands the descriptors to the VMM), the backing files among them.

pub mod chain;
pub mod engine;
mod error;
mod file;
mod grace;
mod image;
pub mod iovec;
pub mod limits;
pub mod lock;
pub mod luks;
pub mod qcow2;
mod raw;
#[cfg(test)]
mod testing;

pub use error::Error;
pub use file::{Alignment, File};
pub use image::{Cipher, Extent, Image, ImageInfo, IoBuf, Plain};
pub use qcow2::Qcow2;
pub use raw::Raw;
