//! String operations. REP forms move whole pieces of pages where both ends are RAM.

use super::bits::{get, put};
use crate::alu::{Alu, kind as alu};
use crate::cpu::Cpu;
use crate::exception::Fallible;
use crate::op::Op;
use crate::state::gpr::{RCX, RDI, RSI};
use crate::state::{rflags, seg};

/// Operation in bits 0..8 of `Op::imm`.
pub(crate) mod kind {
    #![allow(missing_docs)]
    pub const MOVS: u8 = 0;
    pub const CMPS: u8 = 1;
    pub const STOS: u8 = 2;
    pub const LODS: u8 = 3;
    pub const SCAS: u8 = 4;
    pub const INS: u8 = 5;
    pub const OUTS: u8 = 6;
}

/// Packs `Op::imm`: element size, repetition (0 none, 1 REP/REPE, 2 REPNE), address size.
pub(crate) fn pack(kind: u8, size: usize, rep: u8, addr_size: usize) -> u64 {
    u64::from(kind) | (size as u64) << 8 | u64::from(rep) << 16 | (addr_size as u64) << 24
}

struct Shape {
    kind: u8,
    size: usize,
    rep: u8,
    /// Mask of the address size.
    mask: u64,
}

impl Shape {
    fn of(op: &Op) -> Self {
        Self {
            kind: op.imm as u8,
            size: (op.imm >> 8) as u8 as usize,
            rep: (op.imm >> 16) as u8,
            mask: match op.imm >> 24 {
                2 => 0xffff,
                4 => 0xffff_ffff,
                _ => u64::MAX,
            },
        }
    }
}

impl Cpu {
    /// Linear address of a string operand.
    fn string_addr(&mut self, seg: usize, offset: u64, len: usize, write: bool) -> Fallible<u64> {
        if self.mode & 3 == 2 {
            Ok(offset.wrapping_add(self.s.ea_base[seg]))
        } else {
            self.segmented(seg, offset, len, write)
        }
    }

    fn load_n(&mut self, addr: u64, size: usize) -> Fallible<u64> {
        Ok(match size {
            1 => self.read::<u8>(addr)?.into(),
            2 => self.read::<u16>(addr)?.into(),
            4 => self.read::<u32>(addr)?.into(),
            _ => self.read::<u64>(addr)?,
        })
    }

    fn store_n(&mut self, addr: u64, value: u64, size: usize) -> Fallible<()> {
        match size {
            1 => self.write::<u8>(addr, value as u8),
            2 => self.write::<u16>(addr, value as u16),
            4 => self.write::<u32>(addr, value as u32),
            _ => self.write::<u64>(addr, value),
        }
    }

    /// Advances an index register within its address size.
    fn advance(&mut self, reg: usize, by: u64, mask: u64) {
        let old = self.s.gpr[reg];
        let new = old.wrapping_add(by);
        self.s.gpr[reg] = match mask {
            0xffff => old & !0xffff | new & 0xffff,
            _ => new & mask,
        };
    }
}

fn compare(cpu: &mut Cpu, a: u64, b: u64, size: usize) {
    fn go<T: Alu>(a: u64, b: u64) -> u64 {
        T::alu::<{ alu::CMP }>(0, T::cut(a), T::cut(b)).1
    }
    cpu.s.cc = match size {
        1 => go::<u8>(a, b),
        2 => go::<u16>(a, b),
        4 => go::<u32>(a, b),
        _ => go::<u64>(a, b),
    };
}

/// One element.
fn element(cpu: &mut Cpu, op: &Op, shape: &Shape) -> Fallible<()> {
    let &Shape {
        kind, size, mask, ..
    } = shape;
    let by = if cpu.s.flags & rflags::DF != 0 {
        (size as u64).wrapping_neg()
    } else {
        size as u64
    };
    let (si, di) = (cpu.s.gpr[RSI] & mask, cpu.s.gpr[RDI] & mask);
    match kind {
        kind::MOVS => {
            let from = cpu.string_addr(op.seg(), si, size, false)?;
            let value = cpu.load_n(from, size)?;
            let to = cpu.string_addr(seg::ES, di, size, true)?;
            cpu.store_n(to, value, size)?;
        }
        kind::CMPS => {
            let a = cpu.string_addr(op.seg(), si, size, false)?;
            let a = cpu.load_n(a, size)?;
            let b = cpu.string_addr(seg::ES, di, size, false)?;
            let b = cpu.load_n(b, size)?;
            compare(cpu, a, b, size);
        }
        kind::STOS => {
            let to = cpu.string_addr(seg::ES, di, size, true)?;
            cpu.store_n(to, cpu.s.gpr[0], size)?;
        }
        kind::LODS => {
            let from = cpu.string_addr(op.seg(), si, size, false)?;
            let value = cpu.load_n(from, size)?;
            put(cpu, 0, value, size);
        }
        kind::SCAS => {
            let from = cpu.string_addr(seg::ES, di, size, false)?;
            let b = cpu.load_n(from, size)?;
            let a = get(cpu, 0, size);
            compare(cpu, a, b, size);
        }
        kind::INS => {
            let port = cpu.s.gpr[2] as u16;
            cpu.check_port(port, size)?;
            let to = cpu.string_addr(seg::ES, di, size, true)?;
            // The device must not be read if the write will fault.
            cpu.check_write(to, size)?;
            let value = cpu.port_in(port, size);
            cpu.store_n(to, value, size)?;
        }
        _ => {
            let port = cpu.s.gpr[2] as u16;
            cpu.check_port(port, size)?;
            let from = cpu.string_addr(op.seg(), si, size, false)?;
            let value = cpu.load_n(from, size)?;
            cpu.port_out(port, value, size);
        }
    }
    if matches!(kind, kind::MOVS | kind::CMPS | kind::LODS | kind::OUTS) {
        cpu.advance(RSI, by, mask);
    }
    if matches!(
        kind,
        kind::MOVS | kind::CMPS | kind::STOS | kind::SCAS | kind::INS
    ) {
        cpu.advance(RDI, by, mask);
    }
    Ok(())
}

/// Without REP.
pub(crate) fn single(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    element(cpu, op, &Shape::of(op))
}

/// Elements that lie from `offset` on in its page, and before the address size wraps.
fn in_page(linear: u64, offset: u64, shape: &Shape) -> u64 {
    let page = 4096 - (linear & 0xfff);
    let wrap = (shape.mask - offset).saturating_add(1);
    page.min(wrap) / shape.size as u64
}

/// Moves or stores as many elements at once as lie in one page of RAM, upwards; how many.
fn piece(cpu: &mut Cpu, op: &Op, shape: &Shape, count: u64) -> Fallible<u64> {
    if cpu.s.flags & rflags::DF != 0 || !matches!(shape.kind, kind::MOVS | kind::STOS) {
        return Ok(0);
    }
    let (si, di) = (cpu.s.gpr[RSI] & shape.mask, cpu.s.gpr[RDI] & shape.mask);
    let size = shape.size as u64;
    let to = cpu.string_addr(seg::ES, di, shape.size, true)?;
    let mut n = count.min(in_page(to, di, shape));
    if shape.kind == kind::STOS {
        if n < 2 {
            return Ok(0);
        }
        let len = (n * size) as usize;
        cpu.string_addr(seg::ES, di, len, true)?;
        let Some(p) = cpu.host_ptr(to, len, true) else {
            return Ok(0);
        };
        let value = cpu.s.gpr[0];
        // SAFETY: `len` bytes of writable guest RAM at `p`.
        unsafe {
            match shape.size {
                1 => p.write_bytes(value as u8, len),
                2 => fill(p.cast::<u16>(), value as u16, n),
                4 => fill(p.cast::<u32>(), value as u32, n),
                _ => fill(p.cast::<u64>(), value, n),
            }
        }
        cpu.advance(RDI, n * size, shape.mask);
        return Ok(n);
    }
    let from = cpu.string_addr(op.seg(), si, shape.size, false)?;
    n = n.min(in_page(from, si, shape));
    if n < 2 {
        return Ok(0);
    }
    let len = (n * size) as usize;
    cpu.string_addr(seg::ES, di, len, true)?;
    cpu.string_addr(op.seg(), si, len, false)?;
    let (Some(p), Some(q)) = (cpu.host_ptr(to, len, true), cpu.host_ptr(from, len, false)) else {
        return Ok(0);
    };
    let distance = (p as usize).wrapping_sub(q as usize);
    // SAFETY: `len` bytes of guest RAM each, `p` writable. Where the destination overlaps the
    // source from above, the copy repeats the source as the guest's own loop would.
    unsafe {
        if distance != 0 && distance < len {
            for i in 0..n as usize {
                std::ptr::copy(q.add(i * shape.size), p.add(i * shape.size), shape.size);
            }
        } else {
            std::ptr::copy(q, p, len);
        }
    }
    cpu.advance(RSI, n * size, shape.mask);
    cpu.advance(RDI, n * size, shape.mask);
    Ok(n)
}

unsafe fn fill<T: Copy>(p: *mut T, value: T, n: u64) {
    for i in 0..n as usize {
        // SAFETY: the caller's: `n` elements fit at `p`, which need not be aligned.
        unsafe { p.add(i).write_unaligned(value) };
    }
}

/// With REP, REPE or REPNE. Ends its block: other events get their turn between elements.
pub(crate) fn repeat(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let shape = Shape::of(op);
    let conditional = matches!(shape.kind, kind::CMPS | kind::SCAS);
    // Bounds the time between two looks at the attention flags to some ten microseconds.
    let mut budget = 64;
    loop {
        let rcx = cpu.s.gpr[RCX];
        let count = rcx & shape.mask;
        if count == 0 {
            return Ok(());
        }
        let mut n = piece(cpu, op, &shape, count)?;
        if n == 0 {
            element(cpu, op, &shape)?;
            n = 1;
        }
        let left = count - n;
        cpu.s.gpr[RCX] = match shape.mask {
            0xffff => rcx & !0xffff | left,
            _ => left,
        };
        if left == 0 {
            return Ok(());
        }
        if conditional && (cpu.s.cc & 0x4000 != 0) != (shape.rep == 1) {
            return Ok(());
        }
        budget -= 1;
        if budget == 0 || cpu.attention.get() & cpu.attention_mask != 0 {
            // Come back to this instruction.
            cpu.s.rip = cpu.s.block_rip.wrapping_add(op.off.into());
            return Ok(());
        }
    }
}
