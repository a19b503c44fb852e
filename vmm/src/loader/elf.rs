//! ELF files (System V ABI, chapters 4 and 5): program headers, loading, Xen's PVH note.

use std::ops::Range;

use super::{LoadError, Named, Source};
use crate::layout::BOOT_DATA;
use crate::memory::{GuestMemory, MemoryError};
use crate::num::{Fields, align_up, to_usize};

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// More than any kernel has.
const MAX_HEADERS: u16 = 128;
/// Notes beyond this are not looked at.
const MAX_NOTES: u64 = 64 << 10;
/// XEN_ELFNOTE_PHYS32_ENTRY (Xen public headers, elfnote.h).
const PHYS32_ENTRY: u32 = 18;

#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// A kernel's program headers.
#[derive(Debug)]
pub struct Elf {
    /// Entry point as the header says.
    pub entry: u64,
    segments: Vec<Segment>,
}

/// What was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// First address after it.
    pub end: u64,
}

/// Why a segment could not be loaded.
#[derive(Debug)]
pub enum ElfError {
    /// The file.
    Damaged(String),
    /// The guest's memory.
    NoRoom(String),
    /// A segment would overwrite the file it is read from.
    OverSource,
}

impl ElfError {
    /// As an error about `kernel`.
    pub fn of(self, kernel: &Named) -> LoadError {
        match self {
            Self::Damaged(reason) => kernel.damaged(reason),
            Self::NoRoom(reason) => kernel.no_room(reason),
            Self::OverSource => kernel.no_room("no place to unpack it".into()),
        }
    }
}

impl Elf {
    /// Reads the headers; `None` if it is no ELF file.
    ///
    /// # Errors
    /// An ELF file, but not one of this machine, or a damaged one.
    pub fn parse<S: Source + ?Sized>(source: &S) -> Result<Option<Self>, &'static str> {
        let mut ident = [0; 16];
        if !source.read(0, &mut ident) || !ident.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        let wide = match ident[4] {
            1 => false,
            2 => true,
            _ => return Err("neither a 32-bit nor a 64-bit ELF file"),
        };
        if ident[5] != 1 {
            return Err("a big-endian ELF file");
        }
        let mut header = [0; 64];
        let length = if wide { 64 } else { 52 };
        let cut = "ELF header cut short";
        if !source.read(0, &mut header[..length]) {
            return Err(cut);
        }
        if !matches!(header.u16_at(18), Some(3 | 62)) {
            return Err("an ELF file for another processor");
        }
        let field = |wide_at, narrow_at| {
            if wide {
                header.u64_at(wide_at)
            } else {
                header.u32_at(narrow_at).map(u64::from)
            }
        };
        let entry = field(24, 24).ok_or(cut)?;
        let table = field(32, 28).ok_or(cut)?;
        let at = if wide { 54 } else { 42 };
        let size = header.u16_at(at).ok_or(cut)?;
        let count = header.u16_at(at + 2).ok_or(cut)?;
        let expected: u16 = if wide { 56 } else { 32 };
        if size < expected || count == 0 || count > MAX_HEADERS {
            return Err("no usable program headers");
        }
        let mut segments = Vec::with_capacity(count.into());
        for i in 0..u64::from(count) {
            let mut raw = [0; 56];
            let raw = &mut raw[..expected.into()];
            let offset = table.checked_add(i * u64::from(size)).ok_or(cut)?;
            if !source.read(offset, raw) {
                return Err("program headers cut short");
            }
            segments.push(Self::segment(raw, wide).ok_or(cut)?);
        }
        Ok(Some(Self { entry, segments }))
    }

    fn segment(raw: &[u8], wide: bool) -> Option<Segment> {
        let narrow = |at| raw.u32_at(at).map(u64::from);
        Some(if wide {
            Segment {
                kind: raw.u32_at(0)?,
                offset: raw.u64_at(8)?,
                address: raw.u64_at(24)?,
                file_size: raw.u64_at(32)?,
                memory_size: raw.u64_at(40)?,
            }
        } else {
            Segment {
                kind: raw.u32_at(0)?,
                offset: narrow(4)?,
                address: narrow(12)?,
                file_size: narrow(16)?,
                memory_size: narrow(20)?,
            }
        })
    }

    /// The 32-bit entry point of Xen's PVH ABI, if the kernel offers it.
    pub fn pvh_entry<S: Source + ?Sized>(&self, source: &S) -> Option<u32> {
        let notes = self.segments.iter().filter(|s| s.kind == PT_NOTE);
        notes
            .filter_map(|segment| {
                let mut raw = vec![0; to_usize(segment.file_size.min(MAX_NOTES))];
                source
                    .read(segment.offset, &mut raw)
                    .then(|| find_note(&raw))?
            })
            .next()
    }

    /// Copies the segments to their physical addresses. The rest of memory is zero already.
    /// `source_at`: where in guest memory `source` lies, if it does.
    ///
    /// # Errors
    /// Segments that lie outside the file, outside RAM, over boot data, or over each other.
    pub fn load<S: Source + ?Sized>(
        &self,
        source: &S,
        memory: &GuestMemory,
        source_at: Option<Range<u64>>,
    ) -> Result<Loaded, ElfError> {
        let mut placed: Vec<Range<u64>> = Vec::new();
        for segment in self
            .segments
            .iter()
            .filter(|s| s.kind == PT_LOAD && s.memory_size > 0)
        {
            let range = segment.range()?;
            if !source_fits(segment, source.length()) {
                return Err(ElfError::Damaged(
                    "a segment goes beyond the end of the file".into(),
                ));
            }
            let is_ram = [memory.low(), memory.high()]
                .iter()
                .any(|ram| ram.start <= range.start && range.end <= ram.end);
            if !is_ram {
                return Err(ElfError::NoRoom(format!(
                    "a segment at {:#x}..{:#x} is not in RAM",
                    range.start, range.end
                )));
            }
            if overlap(&range, &BOOT_DATA) {
                return Err(ElfError::NoRoom(format!(
                    "a segment at {:#x} lies over boot data",
                    range.start
                )));
            }
            if placed.iter().any(|other| overlap(other, &range)) {
                return Err(ElfError::Damaged("segments overlap".into()));
            }
            if source_at.as_ref().is_some_and(|at| overlap(at, &range)) {
                return Err(ElfError::OverSource);
            }
            placed.push(range);
        }
        if placed.is_empty() {
            return Err(ElfError::Damaged("nothing to load".into()));
        }
        for segment in self
            .segments
            .iter()
            .filter(|s| s.kind == PT_LOAD && s.file_size > 0 && s.memory_size > 0)
        {
            let outside = |e: MemoryError| ElfError::NoRoom(e.to_string());
            // SAFETY: no vCPU runs while a kernel is loaded; the source does not overlap (above).
            let target =
                unsafe { memory.slice(segment.address, segment.file_size) }.map_err(outside)?;
            if !source.read(segment.offset, target) {
                return Err(ElfError::Damaged("reading a segment failed".into()));
            }
        }
        Ok(Loaded {
            end: placed.iter().map(|r| r.end).max().unwrap_or(0),
        })
    }
}

impl Segment {
    fn range(&self) -> Result<Range<u64>, ElfError> {
        if self.file_size > self.memory_size {
            return Err(ElfError::Damaged(
                "a segment is larger in the file than in memory".into(),
            ));
        }
        match self.address.checked_add(self.memory_size) {
            Some(end) => Ok(self.address..end),
            None => Err(ElfError::Damaged("a segment's address overflows".into())),
        }
    }
}

fn source_fits(segment: &Segment, len: u64) -> bool {
    segment.file_size == 0
        || segment
            .offset
            .checked_add(segment.file_size)
            .is_some_and(|end| end <= len)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Goes through a note segment: name size, descriptor size, type, then both, each padded to 4.
fn find_note(mut raw: &[u8]) -> Option<u32> {
    loop {
        let name_size = u64::from(raw.u32_at(0)?);
        let descriptor_size = u64::from(raw.u32_at(4)?);
        let kind = raw.u32_at(8)?;
        let descriptor = 12 + align_up(name_size, 4)?;
        let next = descriptor + align_up(descriptor_size, 4)?;
        if kind == PHYS32_ENTRY && raw.get(12..)?.get(..to_usize(name_size))? == b"Xen\0" {
            let at = to_usize(descriptor);
            return match descriptor_size {
                4 => raw.u32_at(at),
                8 => raw.u64_at(at).and_then(|entry| u32::try_from(entry).ok()),
                _ => None,
            };
        }
        raw = raw.get(to_usize(next)..)?;
    }
}
