//! Entry through Xen's PVH ABI (Xen public headers, arch-x86/hvm/start_info.h).

use super::{Boot, Entry, Fields, LoadError, load_initrd, memory_map, write_cmdline};
use crate::layout::{CMDLINE_MAX, START_INFO};
use crate::memory::GuestMemory;
use crate::num::low32;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
/// Offsets within the page of the start info.
const MODULES: u64 = 0x40;
const MAP: u64 = 0x100;

/// Loads what goes with a kernel that lies in memory up to `kernel_end`, and describes it.
///
/// # Errors
/// The initial RAM disk or the command line does not fit.
pub fn finish(
    memory: &GuestMemory,
    boot: &Boot,
    entry: u32,
    kernel_end: u64,
) -> Result<Entry, LoadError> {
    let cmdline = write_cmdline(
        memory,
        &boot.kernel,
        boot.cmdline.as_bytes(),
        CMDLINE_MAX - 1,
    )?;
    let initrd = load_initrd(memory, boot, kernel_end, u64::from(u32::MAX))?;
    if let Some(range) = &initrd {
        let mut module = Fields::default();
        module
            .u64(range.start)
            .u64(range.end - range.start)
            .u64(0)
            .u64(0);
        memory.write(START_INFO + MODULES, &module.0)?;
    }
    let map = memory_map(memory, boot);
    let mut entries = Fields::default();
    for region in &map {
        let length = region.range.end - region.range.start;
        entries
            .u64(region.range.start)
            .u64(length)
            .u32(region.kind.number())
            .u32(0);
    }
    memory.write(START_INFO + MAP, &entries.0)?;
    let mut info = Fields::default();
    info.u32(MAGIC)
        .u32(VERSION)
        .u32(0)
        .u32(u32::from(initrd.is_some()));
    info.u64(if initrd.is_some() {
        START_INFO + MODULES
    } else {
        0
    });
    info.u64(cmdline.into()).u64(boot.rsdp.unwrap_or(0));
    info.u64(START_INFO + MAP)
        .u32(u32::try_from(map.len()).unwrap_or(0))
        .u32(0);
    memory.write(START_INFO, &info.0)?;
    Ok(Entry {
        eip: entry,
        ebx: low32(START_INFO),
        ..Entry::default()
    })
}
