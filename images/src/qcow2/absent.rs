//! What stands for a backing file that is not there.

use crate::{Error, Extent, Image, ImageInfo, IoBuf};

/// Stands for a backing file that is not looked at: it has no bytes at all, so what an image has
/// not itself reads as zeroes.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoBacking;

impl Image for NoBacking {
    fn size(&self) -> u64 {
        0
    }
    fn read(&self, _: u64, _: &[IoBuf]) -> Result<(), Error> {
        Err(nothing())
    }
    fn write(&self, _: u64, _: &[IoBuf]) -> Result<(), Error> {
        Err(nothing())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), Error> {
        Err(nothing())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), Error> {
        Err(nothing())
    }
    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }
    fn extent(&self, _: u64, _: u64) -> Result<Extent, Error> {
        Err(nothing())
    }
    fn info(&self) -> Result<ImageInfo, Error> {
        Ok(ImageInfo::default())
    }
    fn resize(&self, _: u64) -> Result<(), Error> {
        Err(nothing())
    }
}

fn nothing() -> Error {
    Error::Invalid("the backing file was not opened".into())
}
