//! What a file in a pool is, by its own header, as libvirt lists volumes.
//!
//! Only what a pool lists is looked at this way. No domain's disk is: a guest can write any header
//! it likes into a raw image.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use images::luks::FilePart;
use images::qcow2::{Encryption, Header};
use xml_schemas::volume::{EncryptionInfo, Features};

/// Bytes of the beginning that are looked at.
const START: usize = 512;
/// Where ISO 9660 has its mark: sector 16, after a byte.
const ISO_MARK: u64 = 16 * 2048 + 1;

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// As libvirt names it.
    pub format: &'static str,
    /// Bytes that a guest sees, where the header says so.
    pub capacity: Option<u64>,
    /// How it is encrypted.
    pub encryption: Option<EncryptionInfo>,
    /// qcow2 of version 3.
    pub compat: Option<&'static str>,
    /// qcow2.
    pub cluster_size: Option<u64>,
    /// qcow2 of version 3.
    pub features: Option<Features>,
    /// What is behind it: a path (or what only QEMU understands), and its format if stated.
    pub backing: Option<(String, Option<String>)>,
}

fn le32(data: &[u8], at: usize) -> u32 {
    data.get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn be32(data: &[u8], at: usize) -> u32 {
    le32(data, at).swap_bytes()
}

fn le64(data: &[u8], at: usize) -> Option<u64> {
    data.get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map(u64::from_le_bytes)
}

fn be64(data: &[u8], at: usize) -> Option<u64> {
    le64(data, at).map(u64::swap_bytes)
}

/// Reads as much as there is.
fn read_start(file: &File, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// What the file is; raw where nothing is recognised.
///
/// # Errors
/// The system's. A damaged header is none: then only the format is known.
pub fn probe(file: &File, path: &Path) -> io::Result<Found> {
    let mut start = [0; START];
    let len = read_start(file, 0, &mut start)?;
    let start = &start[..len];
    let of = |format, capacity| Found {
        format,
        capacity,
        ..Found::default()
    };
    let found = match start {
        [b'Q', b'F', b'I', 0xfb, ..] => match be32(start, 4) {
            1 => of("qcow", be64(start, 24)),
            2 | 3 => qcow2(file, path, start),
            _ => of("raw", None),
        },
        [b'L', b'U', b'K', b'S', 0xba, 0xbe, 0, 1, ..] => luks(file, path),
        [b'K', b'D', b'M', b'V', ..] => {
            of("vmdk", le64(start, 12).and_then(|n| n.checked_mul(512)))
        }
        [b'Q', b'E', b'D', 0, ..] => of("qed", le64(start, 40)),
        [b'O', b'O', b'O', b'M', 0, 0, 0, 2, ..] => {
            let mut size = [0; 8];
            let got = read_start(file, 4 + 4 + 1024 + 4, &mut size)?;
            of("cow", be64(&size[..got], 0))
        }
        _ if start.starts_with(b"conectix") && be32(start, 12) == 0x10000 => {
            of("vpc", be64(start, 48))
        }
        _ if start.starts_with(b"Bochs Virtual HD Image") => of("bochs", None),
        _ if start.starts_with(b"#!/bin/sh\n#V2.0 Format\n") => of("cloop", None),
        _ if start.starts_with(b"WithoutFreeSpace") || start.starts_with(b"WithouFreSpacExt") => {
            of("ploop", le64(start, 36).and_then(|n| n.checked_mul(512)))
        }
        _ if le32(start, 64) == 0xbeda_107f && le32(start, 68) == 0x10001 => {
            of("vdi", le64(start, 0x170))
        }
        _ if len == START => {
            let mut mark = [0; 6];
            let got = read_start(file, ISO_MARK, &mut mark)?;
            let iso = mark[..got].starts_with(b"CD001\x01");
            of(if iso { "iso" } else { "raw" }, None)
        }
        _ => of("raw", None),
    };
    Ok(found)
}

fn image_file(file: &File, path: &Path) -> Option<images::File> {
    let copy = file.try_clone().ok()?;
    images::File::new(copy.into(), path.display().to_string()).ok()
}

fn encrypted(format: &str) -> Option<EncryptionInfo> {
    Some(EncryptionInfo {
        format: format.to_owned(),
        ..EncryptionInfo::default()
    })
}

fn luks(file: &File, path: &Path) -> Found {
    let capacity = image_file(file, path).and_then(|file| {
        let len = file.size().ok()?;
        let place = FilePart {
            file: &file,
            start: 0,
            len,
        };
        let header = images::luks::read_header(&place).ok()?;
        Some(len.saturating_sub(header.payload))
    });
    // libvirt lists it as a raw volume that is encrypted.
    Found {
        format: "raw",
        capacity,
        encryption: encrypted("luks"),
        ..Found::default()
    }
}

fn qcow2(file: &File, path: &Path, start: &[u8]) -> Found {
    let plain = Found {
        format: "qcow2",
        capacity: be64(start, 24),
        ..Found::default()
    };
    let Some(file) = image_file(file, path) else {
        return plain;
    };
    let header = match Header::read(&file) {
        Ok(header) => header,
        Err(error) => {
            log::debug!("{}: {error}", path.display());
            return plain;
        }
    };
    let version_3 = header.version == 3;
    Found {
        compat: version_3.then_some("1.1"),
        cluster_size: Some(1 << header.cluster_bits),
        features: version_3.then(|| Features {
            lazy_refcounts: header.has_lazy_refcounts(),
            extended_l2: header.has_extended_l2(),
        }),
        encryption: match header.encryption {
            Encryption::None => None,
            Encryption::Luks { .. } => encrypted("luks"),
        },
        backing: header
            .backing
            .map(|name| (resolve(path, &name), header.backing_format)),
        ..plain
    }
}

/// Where the image's backing file is: a relative name begins at the image's folder.
fn resolve(image: &Path, name: &OsStr) -> String {
    let bytes = name.as_bytes();
    let bytes = bytes.strip_prefix(b"file:").unwrap_or(bytes);
    let protocol = bytes
        .split(|&b| b == b'/')
        .next()
        .is_some_and(|first| first.contains(&b':'));
    let path = Path::new(OsStr::from_bytes(bytes));
    let whole = if protocol || path.is_absolute() {
        path.to_owned()
    } else {
        image.parent().unwrap_or(Path::new("/")).join(path)
    };
    whole.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::files::testing::TempFolder;

    fn of(content: &[u8]) -> Found {
        let temp = TempFolder::new();
        let path = temp.0.join("v");
        fs::write(&path, content).unwrap();
        probe(&File::open(&path).unwrap(), &path).unwrap()
    }

    #[test]
    fn formats_are_told_by_their_marks() {
        assert_eq!(of(b"").format, "raw");
        assert_eq!(of(&[0; 4096]).format, "raw");
        let mut iso = vec![0; 40000];
        iso[32769..32775].copy_from_slice(b"CD001\x01");
        assert_eq!(of(&iso).format, "iso");
        let mut vdi = vec![0; 1024];
        vdi[64..72].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe, 1, 0, 1, 0]);
        vdi[0x170..0x178].copy_from_slice(&5u64.to_le_bytes());
        assert_eq!((of(&vdi).format, of(&vdi).capacity), ("vdi", Some(5)));
        let mut vmdk = vec![0; 512];
        vmdk[..4].copy_from_slice(b"KDMV");
        vmdk[12..20].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!((of(&vmdk).format, of(&vmdk).capacity), ("vmdk", None));
    }

    #[test]
    fn damaged_headers_are_only_a_format() {
        let damaged = of(b"QFI\xfb\0\0\0\x03garbage");
        assert_eq!((damaged.format, damaged.capacity), ("qcow2", None));
        let mut huge = vec![0xff; 4096];
        huge[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        assert_eq!(of(&huge).format, "qcow2");
        assert_eq!(of(&huge).backing, None);
        let luks = of(b"LUKS\xba\xbe\0\x01");
        assert_eq!((luks.format, luks.capacity), ("raw", None));
    }

    #[test]
    fn backing_files_are_where_the_image_is() {
        let image = Path::new("/p/a");
        assert_eq!(resolve(image, OsStr::new("b")), "/p/b");
        assert_eq!(resolve(image, OsStr::new("file:/x/b")), "/x/b");
        assert_eq!(resolve(image, OsStr::new("nbd://h/x")), "nbd://h/x");
    }
}
