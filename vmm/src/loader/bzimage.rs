//! Linux's bzImage (kernel documentation, arch/x86/boot): its payload unpacked here and entered
//! through its PVH note, or the whole entered by the 32-bit boot protocol.

use std::ops::Range;

use super::elf::{Elf, ElfError};
use super::unpack::{self, Format};
use super::{Boot, Entry, LoadError, Named, load_initrd, memory_map, pvh, write_cmdline};
use crate::layout::{GDT, HIMEM, ZERO_PAGE};
use crate::memory::{GuestMemory, PAGE, Scratch};
use crate::num::{Fields, align_up, low32, to_usize};

/// Largest unpacked kernel.
const UNPACKED_MAX: u32 = 1 << 30;
/// Oldest protocol with everything used here but the payload's place: 2.06 (2.6.22).
const OLDEST: u16 = 0x206;
/// First protocol that tells the payload's place.
const PAYLOAD: u16 = 0x208;

const HEADER: usize = 0x1f1;
const E820_COUNT: usize = 0x1e8;
const E820: usize = 0x2d0;
const RSDP: usize = 0x70;
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

/// The setup header.
#[derive(Debug)]
pub struct Header {
    /// The header's bytes as they stand in the file from offset 0x1f1 on.
    raw: Vec<u8>,
    version: u16,
    /// Where the protected-mode kernel starts in the file.
    body: u64,
    load_flags: u8,
    initrd_max: u32,
    cmdline_max: u32,
    payload: Option<Range<u64>>,
    /// Where it wants to run, and how much memory it needs there.
    needs: Option<Range<u64>>,
}

impl Header {
    /// The header in the first bytes of a file, if it is a bzImage.
    #[must_use]
    pub fn find(head: &[u8]) -> Option<Self> {
        if head.u16_at(0x1fe)? != 0xaa55 || head.get(0x202..0x206)? != b"HdrS" {
            return None;
        }
        let version = head.u16_at(0x206)?;
        let sectors = match head[HEADER] {
            0 => 4,
            n => u64::from(n),
        };
        let body = (sectors + 1) * 512;
        let end = 0x202 + usize::from(*head.get(0x201)?);
        let payload = (version >= PAYLOAD).then(|| {
            let start = body + u64::from(head.u32_at(0x248)?);
            Some(start..start + u64::from(head.u32_at(0x24c)?))
        });
        let needs = (version >= 0x20a).then(|| {
            let start = head.u64_at(0x258)?;
            Some(start..start.checked_add(u64::from(head.u32_at(0x260)?))?)
        });
        Some(Self {
            raw: head.get(HEADER..end)?.to_vec(),
            version,
            body,
            load_flags: *head.get(0x211)?,
            initrd_max: head.u32_at(0x22c)?,
            cmdline_max: head.u32_at(0x238)?,
            payload: payload.flatten(),
            needs: needs.flatten(),
        })
    }

    /// Whether an image of `size` bytes with this header can be loaded, as far as it tells.
    ///
    /// # Errors
    /// Too old, cut short, too large for the guest.
    pub fn check(&self, memory: &GuestMemory, kernel: &Named, size: u64) -> Result<(), LoadError> {
        if self.version < OLDEST || self.load_flags & 1 == 0 {
            return Err(kernel
                .not_kernel("a Linux image of a boot protocol older than 2.06, or no bzImage"));
        }
        if self.body >= size {
            return Err(kernel.damaged("nothing after the setup code"));
        }
        if self.payload.as_ref().is_some_and(|p| p.end > size) {
            return Err(kernel.damaged("the file ends within its payload"));
        }
        if let Some(needs) = &self.needs
            && needs.end > memory.low().end
        {
            return Err(kernel.no_room(format!(
                "it needs at least {} MiB",
                needs.end.div_ceil(1 << 20)
            )));
        }
        Ok(())
    }
}

/// Loads a bzImage of `size` bytes.
///
/// # Errors
/// As [`super::load`].
pub fn load(
    memory: &GuestMemory,
    boot: &Boot,
    header: &Header,
    size: u64,
) -> Result<Entry, LoadError> {
    header.check(memory, &boot.kernel, size)?;
    let unpacked = if boot.no_unpack {
        None
    } else {
        unpack_and_load(memory, boot, header)?
    };
    match unpacked {
        Some((entry, end)) => pvh::finish(
            memory,
            boot,
            entry,
            end.max(header.needs.as_ref().map_or(0, |n| n.end)),
        ),
        None => enter_by_protocol(memory, boot, header, size),
    }
}

/// Unpacks the payload and loads it as ELF; `None` where it is neither. Returns the PVH entry
/// and the kernel's end.
fn unpack_and_load(
    memory: &GuestMemory,
    boot: &Boot,
    header: &Header,
) -> Result<Option<(u32, u64)>, LoadError> {
    let kernel = &boot.kernel;
    let Some(range) = header.payload.clone().filter(|r| r.end - r.start > 4) else {
        return Ok(None);
    };
    let mut edges = [0; 8];
    kernel.read_at(range.start, &mut edges[..4])?;
    kernel.read_at(range.end - 4, &mut edges[4..])?;
    let Some(format) = Format::of(&edges) else {
        log::info!(
            "{}: its payload is left to its own decompressor",
            kernel.name
        );
        return Ok(None);
    };
    let length = unpack::output_length(&edges).filter(|l| *l > 0 && *l <= UNPACKED_MAX);
    let length = length.ok_or_else(|| kernel.damaged("impossible unpacked length"))?;

    // Unpacked at the top of guest memory, where nothing is yet, it costs the host nothing
    // beyond guest memory; where the guest is too small for that, in memory of our own.
    let packed = range.end - range.start;
    let total = align_up(u64::from(length) + packed, PAGE).unwrap_or(u64::MAX);
    let lowest = header.needs.as_ref().map_or(HIMEM, |n| n.end);
    let staging = memory
        .low()
        .end
        .checked_sub(total)
        .filter(|start| *start >= lowest);
    if let Some(start) = staging.map(|s| s & !(PAGE - 1)) {
        let place = start..memory.low().end;
        // SAFETY: no vCPU runs while a kernel is loaded; segments that would be copied over
        // the slice are refused (`source_at`).
        let stage = unsafe { memory.slice(start, total)? };
        let result = from_stage(
            memory,
            boot,
            format,
            range.clone(),
            stage,
            to_usize(length.into()),
            Some(place.clone()),
        );
        memory.discard(place)?;
        match result {
            Err(Failed::OverStage) => log::debug!("{}: unpacked outside guest memory", kernel.name),
            Err(Failed::Load(error)) => return Err(error),
            Ok(entry) => return Ok(entry),
        }
    }
    let mut stage = Scratch::new(to_usize(total))?;
    match from_stage(
        memory,
        boot,
        format,
        range,
        &mut stage,
        to_usize(length.into()),
        None,
    ) {
        Ok(entry) => Ok(entry),
        Err(Failed::Load(error)) => Err(error),
        Err(Failed::OverStage) => Err(kernel.no_room("no place to unpack it".into())),
    }
}

enum Failed {
    OverStage,
    Load(LoadError),
}

impl From<LoadError> for Failed {
    fn from(error: LoadError) -> Self {
        Self::Load(error)
    }
}

fn from_stage(
    memory: &GuestMemory,
    boot: &Boot,
    format: Format,
    payload: Range<u64>,
    stage: &mut [u8],
    length: usize,
    stage_at: Option<Range<u64>>,
) -> Result<Option<(u32, u64)>, Failed> {
    let kernel = &boot.kernel;
    let (output, packed) = stage.split_at_mut(length);
    // The stage is whole pages: what follows the payload is slack.
    let packed = &mut packed[..to_usize(payload.end - payload.start)];
    kernel.read_at(payload.start, packed)?;
    let written =
        unpack::unpack(format, packed, output).map_err(|reason| kernel.damaged(reason))?;
    let output = &output[..written];
    let Some(elf) = Elf::parse(output).map_err(|reason| kernel.damaged(reason))? else {
        log::info!(
            "{}: its payload is no ELF file: left to its own decompressor",
            kernel.name
        );
        return Ok(None);
    };
    let Some(entry) = elf.pvh_entry(output) else {
        log::info!(
            "{}: no PVH note: entered through its own decompressor",
            kernel.name
        );
        return Ok(None);
    };
    match elf.load(output, memory, stage_at) {
        Ok(loaded) => Ok(Some((entry, loaded.end))),
        Err(ElfError::OverSource) => Err(Failed::OverStage),
        Err(error) => Err(Failed::Load(error.of(kernel))),
    }
}

/// The 32-bit boot protocol: the whole protected-mode part at 1 MiB, a zero page, a GDT.
fn enter_by_protocol(
    memory: &GuestMemory,
    boot: &Boot,
    header: &Header,
    size: u64,
) -> Result<Entry, LoadError> {
    let kernel = &boot.kernel;
    let length = size - header.body;
    let end = HIMEM + length;
    if end > memory.low().end {
        return Err(kernel.no_room(format!("{} MiB", length >> 20)));
    }
    // SAFETY: no vCPU runs while a kernel is loaded, and this is the only slice alive.
    kernel.read_at(header.body, unsafe { memory.slice(HIMEM, length)? })?;
    let cmdline = write_cmdline(
        memory,
        kernel,
        boot.cmdline.as_bytes(),
        header.cmdline_max.into(),
    )?;
    let needed = header.needs.as_ref().map_or(end, |n| n.end.max(end));
    let initrd = load_initrd(memory, boot, needed, header.initrd_max.into())?;

    let mut page = [0; 4096];
    let fits = header.raw.len().min(E820 - HEADER);
    page[HEADER..HEADER + fits].copy_from_slice(&header.raw[..fits]);
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x210, &[0xff]);
    put(0x228, &cmdline.to_le_bytes());
    let (start, length) = initrd.map_or((0, 0), |r| (low32(r.start), low32(r.end - r.start)));
    put(0x218, &start.to_le_bytes());
    put(0x21c, &length.to_le_bytes());
    put(RSDP, &boot.rsdp.unwrap_or(0).to_le_bytes());
    let map = memory_map(memory, boot);
    put(E820_COUNT, &[u8::try_from(map.len()).unwrap_or(0)]);
    for (i, region) in map.iter().enumerate() {
        let at = E820 + i * 20;
        put(at, &region.range.start.to_le_bytes());
        put(
            at + 8,
            &(region.range.end - region.range.start).to_le_bytes(),
        );
        put(at + 16, &region.kind.number().to_le_bytes());
    }
    memory.write(ZERO_PAGE, &page)?;
    // Null, unused, flat 32-bit code and data (Intel SDM vol. 3, 3.4.5).
    let gdt: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    memory.write(GDT, gdt.map(u64::to_le_bytes).as_flattened())?;
    Ok(Entry {
        eip: low32(HIMEM),
        esi: low32(ZERO_PAGE),
        selectors: Some((CODE, DATA)),
        ..Entry::default()
    })
}
