//! Multiboot 1 (specification 0.6.96).

use super::elf::Elf;
use super::{Boot, Entry, Fields, LoadError, Source, load_initrd, memory_map, write_cmdline};
use crate::layout::{BOOT_DATA, CMDLINE_MAX, HIMEM, Kind, MULTIBOOT};
use crate::memory::GuestMemory;
use crate::num::{Fields as _, low32};

const HEADER_MAGIC: u32 = 0x1bad_b002;
const ENTRY_MAGIC: u32 = 0x2bad_b002;
const HAS_ADDRESSES: u32 = 1 << 16;
/// Requirements a loader must know: page-aligned modules, memory, video mode.
const KNOWN: u32 = 0b111;
/// Offsets within the information's page.
const MODULES: u64 = 0x80;
const NAME: u64 = 0xa0;
const MAP: u64 = 0x100;

/// The header within a kernel's first 8 KiB.
#[derive(Debug)]
pub struct Header {
    at: u64,
    flags: u32,
    /// Header, load, load end, BSS end and entry addresses.
    addresses: Option<[u32; 5]>,
}

impl Header {
    /// Looks for a header whose checksum is right.
    #[must_use]
    pub fn find(head: &[u8]) -> Option<Self> {
        (0..head.len()).step_by(4).find_map(|at| {
            let (magic, flags, sum) =
                (head.u32_at(at)?, head.u32_at(at + 4)?, head.u32_at(at + 8)?);
            if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(sum) != 0 {
                return None;
            }
            let mut addresses = None;
            if flags & HAS_ADDRESSES != 0 {
                let mut all = [0; 5];
                for (i, address) in all.iter_mut().enumerate() {
                    *address = head.u32_at(at + 12 + i * 4)?;
                }
                addresses = Some(all);
            }
            Some(Self {
                at: at as u64,
                flags,
                addresses,
            })
        })
    }
}

/// Loads a Multiboot kernel.
///
/// # Errors
/// As [`super::load`].
pub fn load<S: Source>(
    memory: &GuestMemory,
    boot: &Boot,
    header: &Header,
    source: &S,
    elf: Option<&Elf>,
) -> Result<Entry, LoadError> {
    let kernel = &boot.kernel;
    if header.flags & 0xffff & !KNOWN != 0 {
        return Err(kernel.not_kernel("its Multiboot header wants what this loader does not know"));
    }
    if header.flags & 4 != 0 {
        log::warn!(
            "{}: wants a video mode, which this machine does not have",
            kernel.name
        );
    }
    let (entry, end) = match (header.addresses, elf) {
        (Some(addresses), _) => load_flat(memory, boot, header, addresses, source)?,
        (None, Some(elf)) => {
            let loaded = elf.load(source, memory, None).map_err(|e| e.of(kernel))?;
            let entry =
                u32::try_from(elf.entry).map_err(|_| kernel.damaged("its entry is above 4 GiB"))?;
            (entry, loaded.end)
        }
        (None, None) => {
            return Err(kernel.damaged("a Multiboot header without addresses in no ELF file"));
        }
    };
    // As other loaders do: the kernel's name, then its arguments.
    let mut line = kernel.name.clone();
    if !boot.cmdline.is_empty() {
        line = line + " " + &boot.cmdline;
    }
    let cmdline = write_cmdline(memory, kernel, line.as_bytes(), CMDLINE_MAX - 1)?;
    let module = load_initrd(memory, boot, end, u64::from(u32::MAX))?;
    if let Some(range) = &module {
        let mut entry = Fields::default();
        entry
            .u32(low32(range.start))
            .u32(low32(range.end))
            .u32(low32(MULTIBOOT + NAME))
            .u32(0);
        memory.write(MULTIBOOT + MODULES, &entry.0)?;
    }
    memory.write(MULTIBOOT + NAME, b"vireo\0")?;
    let mut map = Fields::default();
    for region in memory_map(memory, boot) {
        let length = region.range.end - region.range.start;
        map.u32(20)
            .u64(region.range.start)
            .u64(length)
            .u32(region.kind.number());
    }
    memory.write(MULTIBOOT + MAP, &map.0)?;
    write_info(memory, boot, cmdline, module.is_some(), map.0.len())?;
    Ok(Entry {
        eip: entry,
        eax: ENTRY_MAGIC,
        ebx: low32(MULTIBOOT),
        ..Entry::default()
    })
}

fn write_info(
    memory: &GuestMemory,
    boot: &Boot,
    cmdline: u32,
    module: bool,
    map_len: usize,
) -> Result<(), LoadError> {
    let ram = memory_map(memory, boot);
    let kib = |start: u64| {
        let region = ram
            .iter()
            .find(|r| r.kind == Kind::Ram && r.range.start == start);
        low32(region.map_or(0, |r| (r.range.end - r.range.start) >> 10))
    };
    // Memory, command line, modules, memory map, loader's name.
    let flags = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
    let mut info = Fields::default();
    info.u32(flags)
        .u32(kib(0))
        .u32(kib(HIMEM))
        .u32(0)
        .u32(cmdline);
    info.u32(u32::from(module)).u32(low32(MULTIBOOT + MODULES));
    info.u32(0).u32(0).u32(0).u32(0);
    info.u32(low32(map_len as u64)).u32(low32(MULTIBOOT + MAP));
    info.u32(0).u32(0).u32(0).u32(low32(MULTIBOOT + NAME));
    memory.write(MULTIBOOT, &info.0)?;
    Ok(())
}

/// A kernel whose header says where it goes; returns its entry and end.
fn load_flat<S: Source>(
    memory: &GuestMemory,
    boot: &Boot,
    header: &Header,
    [header_addr, load_addr, load_end, bss_end, entry]: [u32; 5],
    source: &S,
) -> Result<(u32, u64), LoadError> {
    let kernel = &boot.kernel;
    let bad = || kernel.damaged("the addresses in its Multiboot header contradict each other");
    let before = u64::from(header_addr.checked_sub(load_addr).ok_or_else(bad)?);
    let offset = header.at.checked_sub(before).ok_or_else(bad)?;
    let length = match load_end {
        0 => source.length() - offset,
        end => u64::from(end.checked_sub(load_addr).ok_or_else(bad)?),
    };
    if offset + length > source.length() {
        return Err(kernel.damaged("shorter than its Multiboot header says"));
    }
    let start = u64::from(load_addr);
    let end = (start + length).max(bss_end.into());
    if start < BOOT_DATA.end && BOOT_DATA.start < end {
        return Err(kernel.no_room(format!("{start:#x}..{end:#x} lies over boot data")));
    }
    if end > memory.low().end {
        return Err(kernel.no_room(format!("it reaches to {end:#x}")));
    }
    // SAFETY: no vCPU runs while a kernel is loaded, and this is the only slice alive.
    let target = unsafe { memory.slice(start, length)? };
    if !source.read(offset, target) {
        return Err(kernel.damaged("reading it failed"));
    }
    Ok((entry, end))
}
