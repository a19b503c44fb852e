//! Disks whose content goes along: on the source what the guest writes meanwhile is noted
//! ([`Noting`]), and sent again; on the target images are written before there is a machine.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use images::iovec::{AlignedBuf, is_zero};
pub use images::noting::BLOCK;
use images::noting::Noting;
use images::{Error, Image, read_bytes};
use vmm_api::migrate::{self, HEADER, Header, HelloDisk, Kind, StreamError};
use vmm_api::saved::CHUNK;

use super::link::{Link, part};
use crate::num::to_usize;

/// What one word of the log stands for, bytes.
pub const WORD: u64 = 64 * BLOCK;
/// Bytes of a disk frame's body before the content.
const PLACE: usize = 12;

/// A disk that goes along.
#[derive(Debug, Clone)]
pub struct Leaving {
    /// Its id.
    pub id: String,
    /// Its content.
    pub image: Arc<Noting>,
}

impl Leaving {
    fn failed(&self, error: impl std::fmt::Display) -> StreamError {
        StreamError::Refused(format!("reading disk {}: {error}", self.id))
    }

    /// The blocks to begin with.
    ///
    /// # Errors
    /// The image's.
    pub fn content(&self, own_only: bool) -> Result<Vec<u64>, StreamError> {
        self.image
            .content(own_only)
            .map_err(|error| self.failed(error))
    }

    /// Sends `len` bytes at `start` of the disk that is number `index`, and says how many bytes
    /// were sent.
    ///
    /// # Errors
    /// The connection's; the image's.
    pub fn send(
        &self,
        link: &Link,
        index: u32,
        start: u64,
        len: u64,
        buffer: &mut AlignedBuf,
    ) -> Result<u64, StreamError> {
        let end = start.saturating_add(len).min(self.image.size());
        let (mut at, mut sent) = (start, 0);
        while at < end {
            let extent = self.image.extent(at, end - at);
            let extent = extent.map_err(|error| self.failed(error))?;
            let mut len = extent.len.clamp(1, end - at);
            if !extent.zero {
                len = len.min(CHUNK);
                let data = buffer.get_mut(..to_usize(len)).unwrap_or(&mut []);
                read_bytes(&*self.image, at, data).map_err(|error| self.failed(error))?;
                if !is_zero(data) {
                    let mut head = [0u8; HEADER + PLACE];
                    let body = PLACE + data.len();
                    head[..HEADER].copy_from_slice(&Header::new(Kind::Disk, body)?.encode());
                    head[HEADER..HEADER + 4].copy_from_slice(&index.to_le_bytes());
                    head[HEADER + 4..].copy_from_slice(&at.to_le_bytes());
                    let mut parts = [
                        part(head.as_ptr(), head.len() as u64),
                        part(data.as_ptr(), data.len() as u64),
                    ];
                    // SAFETY: both live here, and longer than the call.
                    unsafe { link.send_parts(&mut parts)? };
                    sent += (head.len() + data.len()) as u64;
                    at += len;
                    continue;
                }
            }
            let mut body = index.to_le_bytes().to_vec();
            body.extend(at.to_le_bytes());
            body.extend(len.to_le_bytes());
            migrate::send(&mut &*link, Kind::DiskZero, &body)?;
            sent += (HEADER + body.len()) as u64;
            at += len;
        }
        Ok(sent)
    }
}

/// A disk that comes.
#[derive(Debug)]
pub struct Coming {
    id: String,
    image: Arc<dyn Image>,
    touched: AtomicBool,
}

impl Coming {
    /// If it fits what the source says of it.
    ///
    /// # Errors
    /// In words for the source.
    pub fn new(hello: &HelloDisk, image: Arc<dyn Image>) -> Result<Self, String> {
        let (id, size) = (&hello.id, image.size());
        if size != hello.bytes {
            return Err(format!(
                "disk {id} has {} bytes there, {size} here",
                hello.bytes
            ));
        }
        Ok(Self {
            id: id.clone(),
            image,
            touched: AtomicBool::new(false),
        })
    }

    fn failed(&self, what: &str, error: &Error) -> StreamError {
        StreamError::Refused(format!("{what} disk {}: {error}", self.id))
    }

    /// Everything that has come reaches the disk.
    ///
    /// # Errors
    /// The image's.
    pub fn flush(&self) -> Result<(), StreamError> {
        if !self.touched.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let flushed = self.image.flush();
        flushed.map_err(|error| self.failed("flushing", &error))
    }

    /// The same; the machine that is built next opens it anew.
    ///
    /// # Errors
    /// The image's.
    pub fn close(self) -> Result<(), StreamError> {
        let closed = self.image.rest();
        closed.map_err(|error| self.failed("flushing", &error))
    }
}

/// Takes a frame's content over.
///
/// # Errors
/// The connection's; the image's; what the source should not have sent.
pub fn receive(
    disks: &[Coming],
    from: &mut impl Read,
    header: Header,
    buffer: &mut Option<AlignedBuf>,
) -> Result<(), StreamError> {
    let bad = || StreamError::Protocol(format!("{:?} of {} bytes", header.kind, header.len));
    let mut place = [0u8; PLACE];
    let rest = (header.len as usize)
        .checked_sub(PLACE)
        .filter(|rest| *rest > 0)
        .ok_or_else(bad)?;
    from.read_exact(&mut place)?;
    let [i0, i1, i2, i3, offset @ ..] = place;
    let disk = u32::from_le_bytes([i0, i1, i2, i3]) as usize;
    let disk = disks.get(disk).ok_or_else(bad)?;
    let offset = u64::from_le_bytes(offset);
    let written = match header.kind {
        Kind::Disk => {
            let buffer = match buffer {
                Some(buffer) => buffer,
                none => none.insert(AlignedBuf::new(to_usize(CHUNK)).map_err(io::Error::other)?),
            };
            from.read_exact(buffer.get_mut(..rest).ok_or_else(bad)?)?;
            disk.image.write(offset, &[buffer.io(rest)])
        }
        _ => {
            let mut len = [0u8; 8];
            if rest != len.len() {
                return Err(bad());
            }
            from.read_exact(&mut len)?;
            // What is not there need not be.
            let len = u64::from_le_bytes(len);
            disk.image.write_zeroes(offset, len, true)
        }
    };
    disk.touched.store(true, Ordering::Release);
    written.map_err(|error| disk.failed("writing", &error))
}
