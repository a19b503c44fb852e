//! FWAIT, and the x87 environment in memory: FNSTENV, FLDENV, FNSAVE, FRSTOR
//! (Intel SDM vol. 1, 8.1.10).

use super::execute::{check_pending, check_x87};
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::op::Op;
use crate::state::cr0;

/// Bytes of the eight registers after the environment.
const REGISTERS: usize = 80;

/// FWAIT.
pub(super) fn wait(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    const BOTH: u64 = cr0::MP | cr0::TS;
    if cpu.s.cr0 & BOTH == BOTH {
        return Err(Exception::NM);
    }
    check_pending(cpu)
}

/// The four layouts of an environment.
#[derive(Clone, Copy)]
struct Format {
    /// Operand size 32.
    wide: bool,
    /// Selectors beside offsets, not linear addresses in pieces.
    protected: bool,
}

impl Format {
    fn of(cpu: &Cpu, op: &Op) -> Self {
        Self {
            wide: op.imm != 0,
            protected: cpu.s.protected(),
        }
    }

    fn len(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from(get16(bytes, at)) | u32::from(get16(bytes, at + 2)) << 16
}

/// FOP, FIP, FCS, FDP, FDS.
#[derive(Default)]
struct Pointers {
    fop: u16,
    fip: u32,
    fcs: u16,
    fdp: u32,
    fds: u16,
}

impl Pointers {
    fn of(cpu: &Cpu) -> Self {
        let legacy = &cpu.s.fp.legacy;
        let selectors = !cpu.s.mode64();
        Self {
            fop: get16(legacy, 6) & 0x7ff,
            fip: get32(legacy, 8),
            fcs: if selectors { get16(legacy, 12) } else { 0 },
            fdp: get32(legacy, 16),
            fds: if selectors { get16(legacy, 20) } else { 0 },
        }
    }

    fn set(&self, cpu: &mut Cpu) {
        let legacy = &mut cpu.s.fp.legacy;
        legacy[6..8].copy_from_slice(&self.fop.to_le_bytes());
        legacy[8..12].copy_from_slice(&self.fip.to_le_bytes());
        legacy[12..16].copy_from_slice(&u32::from(self.fcs).to_le_bytes());
        legacy[16..20].copy_from_slice(&self.fdp.to_le_bytes());
        legacy[20..24].copy_from_slice(&u32::from(self.fds).to_le_bytes());
    }

    fn linear(offset: u32, selector: u16) -> u32 {
        offset.wrapping_add(u32::from(selector) << 4)
    }

    fn store(&self, format: Format, out: &mut [u8; 28]) {
        let fip = Self::linear(self.fip, self.fcs);
        let fdp = Self::linear(self.fdp, self.fds);
        let words: [u32; 4] = match (format.wide, format.protected) {
            (true, true) => [
                self.fip,
                u32::from(self.fcs) | u32::from(self.fop) << 16,
                self.fdp,
                u32::from(self.fds) | 0xffff_0000,
            ],
            (true, false) => [
                fip & 0xffff | 0xffff_0000,
                (fip >> 16) << 12 | u32::from(self.fop),
                fdp & 0xffff | 0xffff_0000,
                (fdp >> 16) << 12,
            ],
            (false, true) => [self.fip, self.fcs.into(), self.fdp, self.fds.into()],
            (false, false) => [
                fip,
                (fip >> 4) & 0xf000 | u32::from(self.fop),
                fdp,
                (fdp >> 4) & 0xf000,
            ],
        };
        for (i, word) in words.iter().enumerate() {
            let bytes = word.to_le_bytes();
            if format.wide {
                out[12 + 4 * i..][..4].copy_from_slice(&bytes);
            } else {
                out[6 + 2 * i..][..2].copy_from_slice(&bytes[..2]);
            }
        }
    }

    fn load(format: Format, image: &[u8]) -> Self {
        let word = |i: usize| {
            if format.wide {
                get32(image, 12 + 4 * i)
            } else {
                u32::from(get16(image, 6 + 2 * i))
            }
        };
        let fop = |w: u32| w as u16 & 0x7ff;
        match (format.wide, format.protected) {
            (true, true) => Self {
                fip: word(0),
                fcs: word(1) as u16,
                fop: fop(word(1) >> 16),
                fdp: word(2),
                fds: word(3) as u16,
            },
            (true, false) => Self {
                fip: word(0) & 0xffff | (word(1) >> 12) << 16,
                fop: fop(word(1)),
                fdp: word(2) & 0xffff | (word(3) >> 12) << 16,
                ..Self::default()
            },
            (false, true) => Self {
                fip: word(0),
                fcs: word(1) as u16,
                fop: 0,
                fdp: word(2),
                fds: word(3) as u16,
            },
            (false, false) => Self {
                fip: word(0) | (word(1) & 0xf000) << 4,
                fop: fop(word(1)),
                fdp: word(2) | (word(3) & 0xf000) << 4,
                ..Self::default()
            },
        }
    }
}

/// FCW, FSW, FTW and the pointers in `format`, in its first `format.len()` bytes. Masks all
/// exceptions.
fn take(cpu: &mut Cpu, format: Format) -> [u8; 28] {
    let native = cpu.fp_runtime.store_environment(&mut cpu.s.fp);
    let mut out = [0; 28];
    for i in 0..3 {
        let word = [native[4 * i], native[4 * i + 1]];
        if format.wide {
            out[4 * i..4 * i + 4].copy_from_slice(&[word[0], word[1], 0xff, 0xff]);
        } else {
            out[2 * i..2 * i + 2].copy_from_slice(&word);
        }
    }
    Pointers::of(cpu).store(format, &mut out);
    out
}

/// FNSTENV.
pub(super) fn fnstenv(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_x87(cpu)?;
    let format = Format::of(cpu, op);
    let addr = cpu.operand(op, format.len(), true)?;
    cpu.check_write(addr, format.len())?;
    let image = take(cpu, format);
    cpu.write_bytes(addr, &image[..format.len()])
}

/// FNSAVE.
pub(super) fn fnsave(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_x87(cpu)?;
    let format = Format::of(cpu, op);
    let len = format.len() + REGISTERS;
    let addr = cpu.operand(op, len, true)?;
    cpu.check_write(addr, len)?;
    let mut image = [0; 28 + REGISTERS];
    let environment = take(cpu, format);
    image[..28].copy_from_slice(&environment);
    for (i, slot) in cpu.s.fp.legacy[32..160].chunks_exact(16).enumerate() {
        image[format.len() + 10 * i..][..10].copy_from_slice(&slot[..10]);
    }
    cpu.write_bytes(addr, &image[..len])?;
    cpu.fp_runtime.initialise(&mut cpu.s.fp);
    cpu.s.fp.legacy[6..24].fill(0);
    Ok(())
}

fn load(cpu: &mut Cpu, format: Format, image: &[u8]) {
    let mut native = [0; 28];
    for i in 0..3 {
        let at = if format.wide { 4 * i } else { 2 * i };
        native[4 * i..4 * i + 2].copy_from_slice(&image[at..at + 2]);
    }
    cpu.fp_runtime.load_environment(&mut cpu.s.fp, &native);
    Pointers::load(format, image).set(cpu);
}

/// FLDENV.
pub(super) fn fldenv(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_x87(cpu)?;
    check_pending(cpu)?;
    let format = Format::of(cpu, op);
    let mut image = [0; 28];
    let addr = cpu.operand(op, format.len(), false)?;
    cpu.read_bytes(addr, &mut image[..format.len()])?;
    load(cpu, format, &image);
    Ok(())
}

/// FRSTOR.
pub(super) fn frstor(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_x87(cpu)?;
    check_pending(cpu)?;
    let format = Format::of(cpu, op);
    let len = format.len() + REGISTERS;
    let mut image = [0; 28 + REGISTERS];
    let addr = cpu.operand(op, len, false)?;
    cpu.read_bytes(addr, &mut image[..len])?;
    load(cpu, format, &image);
    let registers = image[format.len()..].chunks_exact(10);
    for (slot, register) in cpu.s.fp.legacy[32..160].chunks_exact_mut(16).zip(registers) {
        slot[..10].copy_from_slice(register);
        slot[10..].fill(0);
    }
    Ok(())
}
