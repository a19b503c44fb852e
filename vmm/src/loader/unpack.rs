//! Unpacking of a bzImage's payload: LZ4 legacy frames, zstd, gzip, xz.
//!
//! The output buffer is the whole output, so no format needs a window beside it.

use std::io::Read;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use crate::num::{Fields, to_usize};

/// A format this loader unpacks; the others have their own decompressor in the bzImage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// LZ4 legacy frames (`lz4 -l`), as Linux uses them.
    Lz4,
    /// RFC 8878.
    Zstd,
    /// RFC 1952.
    Gzip,
    /// The .xz file format 1.2.
    Xz,
}

impl Format {
    /// By the first bytes.
    #[must_use]
    pub fn of(payload: &[u8]) -> Option<Self> {
        match payload.first_chunk::<4>()? {
            [0x02, 0x21, 0x4c, 0x18] => Some(Self::Lz4),
            [0x28, 0xb5, 0x2f, 0xfd] => Some(Self::Zstd),
            [0x1f, 0x8b, 8, _] => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X'] => Some(Self::Xz),
            _ => None,
        }
    }
}

/// Length of the output: Linux's build appends it (little-endian), gzip has it there anyway.
#[must_use]
pub fn output_length(payload: &[u8]) -> Option<u32> {
    payload.u32_at(payload.len().checked_sub(4)?)
}

/// Unpacks `payload` (with its four bytes of length at the end) into `output`. Returns the
/// bytes written.
///
/// # Errors
/// What is wrong with the payload.
pub fn unpack(format: Format, payload: &[u8], output: &mut [u8]) -> Result<usize, String> {
    let Some(end) = payload.len().checked_sub(4) else {
        return Err("payload cut short".into());
    };
    match format {
        Format::Lz4 => lz4(&payload[..end], output),
        Format::Zstd => {
            let size = zstd_safe::decompress(output, &payload[..end]);
            size.map_err(|code| format!("zstd: {}", zstd_safe::get_error_name(code)))
        }
        Format::Gzip => gzip(payload, output),
        Format::Xz => xz(&payload[..end], output),
    }
}

/// Largest dictionary, in KiB: Linux's build uses 32 MiB, distributions up to 128.
const XZ_MEMORY_KIB: u32 = 192 << 10;

fn xz(payload: &[u8], output: &mut [u8]) -> Result<usize, String> {
    let mut reader = lzma_rust2::XzReader::new_mem_limit(payload, false, XZ_MEMORY_KIB);
    let mut written = 0;
    loop {
        let rest = &mut output[written..];
        let mut beyond = [0];
        let full = rest.is_empty();
        let target = if full { &mut beyond[..] } else { rest };
        match reader.read(target) {
            Ok(0) => return Ok(written),
            Ok(_) if full => return Err("xz: longer than its length says".into()),
            Ok(count) => written += count,
            Err(error) => return Err(format!("xz: {error}")),
        }
    }
}

/// Magic, then blocks of at most 8 MiB, each with its packed length before it.
fn lz4(payload: &[u8], output: &mut [u8]) -> Result<usize, String> {
    let (mut at, mut written) = (4, 0);
    while at < payload.len() {
        let length = payload.u32_at(at).ok_or("lz4: block header cut short")?;
        at += 4;
        // Concatenated files repeat the magic.
        if length == 0x184c_2102 {
            continue;
        }
        let block = payload
            .get(at..)
            .and_then(|rest| rest.get(..to_usize(length.into())));
        let block = block.ok_or("lz4: block cut short")?;
        let size = lz4_flex::block::decompress_into(block, &mut output[written..]);
        written += size.map_err(|error| format!("lz4: {error}"))?;
        at += block.len();
    }
    Ok(written)
}

fn gzip(payload: &[u8], output: &mut [u8]) -> Result<usize, String> {
    let body = gzip_body(payload).ok_or("gzip: header cut short")?;
    let mut state = Box::<DecompressorOxide>::default();
    let (status, _, written) = decompress(
        &mut state,
        body,
        output,
        0,
        TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
    );
    if status == TINFLStatus::Done {
        Ok(written)
    } else {
        Err(format!("gzip: {status:?}"))
    }
}

/// Skips the header (RFC 1952, 2.3).
fn gzip_body(payload: &[u8]) -> Option<&[u8]> {
    let flags = *payload.get(3)?;
    let mut rest = payload.get(10..)?;
    if flags & 4 != 0 {
        let length = rest.u16_at(0)?;
        rest = rest.get(2 + usize::from(length)..)?;
    }
    for flag in [8, 16] {
        if flags & flag != 0 {
            let end = rest.iter().position(|b| *b == 0)?;
            rest = &rest[end + 1..];
        }
    }
    if flags & 2 != 0 {
        rest = rest.get(2..)?;
    }
    Some(rest)
}
