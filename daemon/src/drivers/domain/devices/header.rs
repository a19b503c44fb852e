//! What a qcow2 image's header says of other files (QEMU's docs/interop/qcow2).

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;

/// Names in a header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    /// The backing file.
    pub backing: Option<OsString>,
    /// Its format, if stated.
    pub backing_format: Option<String>,
    /// The file that holds the data, if it is another one.
    pub data_file: Option<OsString>,
}

const MAGIC: u32 = 0x5146_49fb;
/// Longest name of a backing file, bytes.
const LONGEST_NAME: u32 = 1023;
/// All that is read of a header and its extensions, bytes: the smallest cluster holds less.
const MOST: usize = 64 << 10;
/// Incompatible feature: the data are in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;

/// Reads them.
///
/// # Errors
/// The system's, or it is no qcow2 image.
pub fn names(file: &File) -> io::Result<Names> {
    let mut bytes = vec![0; MOST];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    parse(&bytes).ok_or_else(|| io::Error::other("it is not a (whole) qcow2 image"))
}

fn parse(bytes: &[u8]) -> Option<Names> {
    let part = |at: usize, len: usize| bytes.get(at..at.checked_add(len)?);
    let word = |at: usize| Some(u32::from_be_bytes(part(at, 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_be_bytes(part(at, 8)?.try_into().ok()?));
    let version = word(4)?;
    if word(0)? != MAGIC || !matches!(version, 2 | 3) {
        return None;
    }
    let mut names = Names::default();
    let (name_at, name_len) = (long(8)?, word(16)?);
    if name_at != 0 && name_len != 0 {
        if name_len > LONGEST_NAME {
            return None;
        }
        let name = part(usize::try_from(name_at).ok()?, name_len as usize)?;
        names.backing = Some(OsString::from_vec(name.to_vec()));
    }
    let (features, mut at) = match version {
        2 => (0, 72),
        _ => (long(72)?, word(100)? as usize),
    };
    loop {
        let kind = match word(at) {
            None | Some(0) => break,
            Some(kind) => kind,
        };
        let len = word(at.checked_add(4)?)? as usize;
        let data_at = at.checked_add(8)?;
        let text = || {
            let data = part(data_at, len)?;
            Some(data.split(|&b| b == 0).next().unwrap_or_default().to_vec())
        };
        match kind {
            BACKING_FORMAT => names.backing_format = String::from_utf8(text()?).ok(),
            DATA_FILE => names.data_file = Some(OsString::from_vec(text()?)),
            _ => {}
        }
        at = data_at.checked_add(len.checked_next_multiple_of(8)?)?;
    }
    if features & EXTERNAL_DATA == 0 {
        names.data_file = None;
    }
    Some(names)
}

/// The size that the guest sees, bytes.
///
/// # Errors
/// As [`names`].
pub fn size(file: &File) -> io::Result<u64> {
    let mut bytes = [0; 32];
    file.read_exact_at(&mut bytes, 0)?;
    let magic = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    if magic != MAGIC {
        return Err(io::Error::other("it is not a qcow2 image"));
    }
    let mut size = [0; 8];
    size.copy_from_slice(&bytes[24..]);
    Ok(u64::from_be_bytes(size))
}
