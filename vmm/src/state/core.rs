//! Guest memory and registers as an ELF core (System V ABI, chapter 4 and 5; AMD64 supplement), for
//! `gdb`, `crash` and `readelf`.
//!
//! One PT_LOAD a range of RAM, by physical address. One note a vCPU with the registers a debugger of
//! programs expects (NT_PRSTATUS, as the Linux kernel writes it), and one with the system registers as
//! QEMU writes it (owner "QEMU", type 0), which `crash` reads. Device states, where they are
//! wanted, are a note of owner "VIREO".

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use hypervisor::{Segment, VcpuState};

use super::job::Progress;
use super::ram::{self, Cached};
use crate::memory::{GuestMemory, PAGE};

const EHDR: u16 = 64;
const PHDR: u16 = 56;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;
/// Segment flags: readable, writable, executable.
const RWX: u32 = 7;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

#[derive(Debug, Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn align(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn note(&mut self, owner: &str, kind: u32, content: &[u8]) -> io::Result<()> {
        let len = u32::try_from(content.len()).map_err(io::Error::other)?;
        let owner_len = u32::try_from(owner.len() + 1).map_err(io::Error::other)?;
        self.u32(owner_len).u32(len).u32(kind);
        self.0.extend(owner.as_bytes());
        self.0.push(0);
        self.align();
        self.0.extend(content);
        self.align();
        Ok(())
    }
}

/// `struct elf_prstatus` of x86-64 Linux.
fn prstatus(number: u32, state: &VcpuState) -> Vec<u8> {
    let mut out = Bytes::default();
    // No signal, and nothing pending or held: 32 bytes.
    out.0.resize(32, 0);
    // Threads have numbers from 1 on.
    out.u32(number + 1).u32(0).u32(0).u32(0);
    // Times.
    out.0.resize(112, 0);
    let r = &state.regs;
    let s = &state.sregs;
    for value in [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        // Not in a system call.
        u64::MAX,
        r.rip,
        s.cs.selector.into(),
        r.rflags,
        r.rsp,
        s.ss.selector.into(),
        s.fs.base,
        s.gs.base,
        s.ds.selector.into(),
        s.es.selector.into(),
        s.fs.selector.into(),
        s.gs.selector.into(),
    ] {
        out.u64(value);
    }
    // No floating-point note, and the struct's padding.
    out.u64(0);
    out.0
}

/// The layout of QEMU's note of a processor's state, version 1.
fn system_registers(state: &VcpuState) -> Vec<u8> {
    const VERSION: u32 = 1;
    const SIZE: u32 = 440;
    let (r, s) = (&state.regs, &state.sregs);
    let mut out = Bytes::default();
    out.u32(VERSION).u32(SIZE);
    for value in [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15, r.rip, r.rflags,
    ] {
        out.u64(value);
    }
    let mut segment = |s: &Segment| {
        out.u32(s.selector.into()).u32(s.limit);
        // As in a descriptor's second half.
        out.u32((s.access & 0xffff) << 8).u32(0).u64(s.base);
    };
    for register in [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.ldt, &s.tr] {
        segment(register);
    }
    for table in [&s.gdt, &s.idt] {
        segment(&Segment {
            base: table.base,
            limit: table.limit.into(),
            ..Segment::default()
        });
    }
    for value in [s.cr0, 0, s.cr2, s.cr3, s.cr4] {
        out.u64(value);
    }
    let gs = state.msrs.iter().find(|msr| msr.0 == MSR_KERNEL_GS_BASE);
    out.u64(gs.map_or(0, |msr| msr.1));
    out.0
}

/// Writes a core.
///
/// # Errors
/// The system's refusal, or the job was given up.
pub fn write(
    file: &File,
    vcpus: &[VcpuState],
    devices: Option<&[u8]>,
    memory: &GuestMemory,
    progress: &Progress,
    moving: bool,
) -> io::Result<()> {
    let mut notes = Bytes::default();
    for (number, state) in (0..).zip(vcpus) {
        notes.note("CORE", NT_PRSTATUS, &prstatus(number, state))?;
    }
    for state in vcpus {
        notes.note("QEMU", 0, &system_registers(state))?;
    }
    if let Some(devices) = devices {
        notes.note("VIREO", 0, devices)?;
    }
    let ranges: Vec<_> = [memory.low(), memory.high()]
        .into_iter()
        .filter(|range| range.start < range.end)
        .collect();
    let mut headers: u16 = 1;
    for _ in &ranges {
        headers += 1;
    }
    let notes_at = u64::from(EHDR) + u64::from(PHDR) * u64::from(headers);
    let notes_len = notes.0.len() as u64;
    let ram_at = (notes_at + notes_len).next_multiple_of(PAGE);

    let mut out = Bytes::default();
    // 64 bits, little-endian, version 1, System V.
    out.0.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    out.u16(ET_CORE).u16(EM_X86_64).u32(1);
    out.u64(0).u64(EHDR.into()).u64(0).u32(0);
    out.u16(EHDR).u16(PHDR).u16(headers);
    out.u16(0).u16(0).u16(0);
    out.u32(PT_NOTE).u32(0).u64(notes_at);
    out.u64(0).u64(0).u64(notes_len).u64(notes_len).u64(0);
    let mut at = ram_at;
    for range in &ranges {
        let len = range.end - range.start;
        out.u32(PT_LOAD).u32(RWX).u64(at);
        out.u64(0).u64(range.start).u64(len).u64(len).u64(0);
        at += len;
    }
    out.0.extend(&notes.0);
    let cached = Cached::new(file)?;
    file.set_len(at)?;
    file.write_all_at(&out.0, 0)?;
    drop(cached);
    ram::write(memory, file, ram_at, progress, moving)?;
    file.sync_all()?;
    progress.check()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_have_the_sizes_that_readers_expect() {
        let mut state = VcpuState::default();
        state.regs.rip = 0x1122_3344;
        state.sregs.cr3 = 0x5566;
        let status = prstatus(0, &state);
        assert_eq!(status.len(), 336);
        assert_eq!(status[112 + 16 * 8..][..8], 0x1122_3344_u64.to_le_bytes());
        let system = system_registers(&state);
        assert_eq!(system.len(), 440);
        assert_eq!(system[392 + 3 * 8..][..8], 0x5566_u64.to_le_bytes());
    }
}
