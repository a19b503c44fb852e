//! Kernels into guest memory: bzImage, ELF with a PVH note, Multiboot 1.
//!
//! Everything in a file is hostile: every offset and length is checked before it is used, and
//! nothing is loaded over boot data or outside RAM.

pub mod bzimage;
pub mod elf;
pub mod multiboot;
pub mod pvh;
pub mod unpack;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::layout::{self, CMDLINE, CMDLINE_MAX, HIMEM, Region};
use crate::memory::{GuestMemory, MemoryError, PAGE};
use crate::num::{align_up, low32};

/// Larger files are not read: no kernel or initial RAM disk comes near (4 GiB).
const FILE_MAX: u64 = 1 << 32;

/// What goes wrong while a kernel is loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Reading failed.
    #[error("{name}: {source}")]
    Read {
        /// The file.
        name: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// Something else than a kernel.
    #[error("{name}: not a kernel: {reason}")]
    NotKernel {
        /// The file.
        name: String,
        /// What was looked for.
        reason: &'static str,
    },
    /// Something that cannot be a PC's firmware.
    #[error("{name}: not firmware: {reason}")]
    NotFirmware {
        /// The file.
        name: String,
        /// What was looked for.
        reason: &'static str,
    },
    /// A kernel, but damaged.
    #[error("{name}: damaged kernel: {reason}")]
    Damaged {
        /// The file.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The guest has too little memory for it.
    #[error("{name}: does not fit into guest memory: {reason}")]
    NoRoom {
        /// The file.
        name: String,
        /// What was needed.
        reason: String,
    },
    /// The command line is too long.
    #[error("kernel command line of {length} bytes: {name} takes {limit} at most")]
    Cmdline {
        /// The kernel.
        name: String,
        /// Bytes given.
        length: usize,
        /// Bytes possible.
        limit: u64,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Bytes by which a kernel's kind is known (a Multiboot header lies in the first 8 KiB).
const HEAD: usize = 8192;

/// A file with its name for messages.
#[derive(Debug)]
pub struct Named {
    /// Open for reading.
    pub file: File,
    /// As the user knows it.
    pub name: String,
}

impl Named {
    pub(crate) fn size(&self) -> Result<u64, LoadError> {
        let size = self
            .file
            .metadata()
            .map_err(|source| self.unreadable(source))?;
        if size.is_dir() {
            return Err(self.unreadable(std::io::Error::from_raw_os_error(libc::EISDIR)));
        }
        if size.len() > FILE_MAX {
            return Err(self.no_room(format!("file of {} MiB", size.len() >> 20)));
        }
        Ok(size.len())
    }

    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), LoadError> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| self.unreadable(source))
    }

    /// The first bytes of a file of `size` bytes.
    fn head<'a>(&self, size: u64, buffer: &'a mut [u8; HEAD]) -> Result<&'a [u8], LoadError> {
        let head = &mut buffer[..crate::num::to_usize(size.min(HEAD as u64))];
        self.read_at(0, head)?;
        Ok(head)
    }

    fn unreadable(&self, source: std::io::Error) -> LoadError {
        LoadError::Read {
            name: self.name.clone(),
            source,
        }
    }

    fn not_kernel(&self, reason: &'static str) -> LoadError {
        LoadError::NotKernel {
            name: self.name.clone(),
            reason,
        }
    }

    fn damaged<S: Into<String>>(&self, reason: S) -> LoadError {
        LoadError::Damaged {
            name: self.name.clone(),
            reason: reason.into(),
        }
    }

    fn no_room(&self, reason: String) -> LoadError {
        LoadError::NoRoom {
            name: self.name.clone(),
            reason,
        }
    }
}

/// Bytes a loader takes apart: a file, or its unpacked payload.
pub trait Source {
    /// Length in bytes.
    fn length(&self) -> u64;
    /// Fills `buffer` from `offset`; false where the source is too short or unreadable.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> bool;
}

impl Source for [u8] {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> bool {
        let part = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..)?.get(..buffer.len()));
        part.is_some_and(|part| {
            buffer.copy_from_slice(part);
            true
        })
    }
}

/// A file of known length.
#[derive(Debug)]
pub struct FileSource<'a> {
    file: &'a File,
    len: u64,
}

impl Source for FileSource<'_> {
    fn length(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.file.read_exact_at(buffer, offset).is_ok()
    }
}

/// What to boot.
#[derive(Debug)]
pub struct Boot {
    /// The kernel.
    pub kernel: Named,
    /// Initial RAM disk, or first Multiboot module.
    pub initrd: Option<Named>,
    /// Command line.
    pub cmdline: String,
    /// Leave a bzImage's payload to its own decompressor.
    pub no_unpack: bool,
    /// ACPI's root pointer, where there are tables.
    pub rsdp: Option<u64>,
}

/// The first vCPU's start: 32-bit protected mode without paging, flat segments, interrupts off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub eip: u32,
    /// As the boot protocol wants it.
    pub eax: u32,
    /// As the boot protocol wants it.
    pub ebx: u32,
    /// As the boot protocol wants it.
    pub esi: u32,
    /// Code and data selectors, where the protocol names them; their GDT is at `layout::GDT`.
    pub selectors: Option<(u16, u16)>,
}

/// Whether loading takes long: a bzImage is to be unpacked. What a quick look can tell to be
/// wrong with it is told here, all the rest by [`load`].
///
/// # Errors
/// A file can't be read, or won't do.
pub fn takes_long(memory: &GuestMemory, boot: &Boot) -> Result<bool, LoadError> {
    let kernel = &boot.kernel;
    let size = kernel.size()?;
    let Some(header) = bzimage::Header::find(kernel.head(size, &mut [0; HEAD])?) else {
        return Ok(false);
    };
    header.check(memory, kernel, size)?;
    let initrd = boot.initrd.as_ref().map_or(Ok(0), Named::size)?;
    if initrd > memory.low().end {
        return Err(kernel.no_room(format!("beside an initrd of {initrd} bytes")));
    }
    Ok(true)
}

/// Loads `boot` into `memory`, which is all zero.
///
/// # Errors
/// The file can't be read, is no kernel, is damaged, or does not fit. Guest memory then holds
/// an unfinished load.
pub fn load(memory: &GuestMemory, boot: &Boot) -> Result<Entry, LoadError> {
    let kernel = &boot.kernel;
    let size = kernel.size()?;
    let mut head = [0; HEAD];
    let head = kernel.head(size, &mut head)?;
    if let Some(header) = bzimage::Header::find(head) {
        return bzimage::load(memory, boot, &header, size);
    }
    let source = FileSource {
        file: &kernel.file,
        len: size,
    };
    let multiboot = multiboot::Header::find(head);
    if let Some(elf) = elf::Elf::parse(&source).map_err(|reason| kernel.damaged(reason))? {
        if let Some(entry) = elf.pvh_entry(&source) {
            let loaded = elf.load(&source, memory, None).map_err(|e| e.of(kernel))?;
            return pvh::finish(memory, boot, entry, loaded.end);
        }
        return match multiboot {
            Some(header) => multiboot::load(memory, boot, &header, &source, Some(&elf)),
            None => {
                Err(kernel.not_kernel("an ELF file with neither a PVH note nor a Multiboot header"))
            }
        };
    }
    match multiboot {
        Some(header) => multiboot::load(memory, boot, &header, &source, None),
        None => {
            Err(kernel.not_kernel("neither a Linux bzImage, an ELF kernel nor a Multiboot kernel"))
        }
    }
}

/// Puts the command line into boot data; returns its address.
fn write_cmdline(
    memory: &GuestMemory,
    kernel: &Named,
    cmdline: &[u8],
    limit: u64,
) -> Result<u32, LoadError> {
    let limit = limit.min(CMDLINE_MAX - 1);
    if cmdline.len() as u64 > limit || cmdline.contains(&0) {
        return Err(LoadError::Cmdline {
            name: kernel.name.clone(),
            length: cmdline.len(),
            limit,
        });
    }
    memory.write(CMDLINE, cmdline)?;
    memory.write(CMDLINE + cmdline.len() as u64, &[0])?;
    Ok(low32(CMDLINE))
}

/// Loads the initial RAM disk as high as possible in low RAM, but above the kernel's end and
/// up to `last`.
fn load_initrd(
    memory: &GuestMemory,
    boot: &Boot,
    kernel_end: u64,
    last: u64,
) -> Result<Option<Range<u64>>, LoadError> {
    let Some(initrd) = &boot.initrd else {
        return Ok(None);
    };
    let size = initrd.size()?;
    if size == 0 {
        return Ok(None);
    }
    let lowest = align_up(kernel_end.max(HIMEM), PAGE).unwrap_or(u64::MAX);
    let top = memory.low().end.min(last.saturating_add(1));
    let start = top
        .checked_sub(size)
        .map(|s| s & !(PAGE - 1))
        .filter(|s| *s >= lowest)
        .ok_or_else(|| {
            let room = top.saturating_sub(lowest);
            initrd.no_room(format!(
                "{size} bytes, but only {room} are left beside the kernel"
            ))
        })?;
    // SAFETY: no vCPU runs while a kernel is loaded, and this is the only slice alive.
    let target = unsafe { memory.slice(start, size)? };
    initrd.read_at(0, target)?;
    Ok(Some(start..start + size))
}

/// Little-endian structures, built field by field.
#[derive(Debug, Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }
}

fn memory_map(memory: &GuestMemory, boot: &Boot) -> Vec<Region> {
    let mut map = layout::memory_map(memory);
    if boot.rsdp.is_none() {
        map.retain(|region| region.kind != layout::Kind::Acpi);
    }
    map
}

#[cfg(test)]
mod tests;
