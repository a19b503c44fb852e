//! Locked operations, XCHG with memory, CMPXCHG, XADD: host atomics on guest RAM.

use std::arch::asm;

use super::bits::{get, put};
use crate::alu::{Alu, kind, unary};
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::mmu::Target;
use crate::op::Op;
use crate::state::gpr::{RAX, RBX, RCX, RDX};

/// Words the host can compare and exchange.
pub(crate) trait Atomic: Alu {
    /// `LOCK CMPXCHG`: what was there; the exchange happened if that is `old`.
    ///
    /// # Safety
    /// `p` is mapped and writable for the size of the word.
    unsafe fn compare_exchange(p: *mut Self, old: Self, new: Self) -> Self;
}

macro_rules! atomics {
    ($($t:ty, $class:ident, $ax:tt, $m:literal;)*) => {$(
        impl Atomic for $t {
            #[inline(always)]
            unsafe fn compare_exchange(p: *mut Self, old: Self, new: Self) -> Self {
                let mut seen = old;
                // SAFETY: the caller's promise. The instruction itself is used because the
                // guest's address need not be aligned, which Rust's atomics demand.
                unsafe {
                    asm!(
                        concat!("lock cmpxchg [{p}], {new", $m, "}"),
                        p = in(reg) p,
                        new = in($class) new,
                        inout($ax) seen,
                        options(nostack)
                    );
                }
                seen
            }
        }
    )*};
}
atomics! {
    u8, reg_byte, "al", "";
    u16, reg, "ax", ":x";
    u32, reg, "eax", ":e";
    u64, reg, "rax", ":r";
}

impl Cpu {
    /// Atomic read-modify-write; the old value. `f` may run several times.
    pub(crate) fn modify_locked<T: Atomic>(
        &mut self,
        addr: u64,
        mut f: impl FnMut(T) -> T,
    ) -> Fallible<T> {
        let target = self.locate_write(addr, T::BYTES)?;
        let (p, code) = match target {
            Target::Ram(p) => (p.cast::<T>(), None),
            Target::Code(p, gpa) => (p.cast::<T>(), Some(gpa)),
            Target::Mmio | Target::Split => {
                // No host instruction does this in one go: vCPUs take turns.
                let machine = self.machine.clone();
                let _turn = machine.split_turn();
                let old = T::cut(self.read_slow(addr, T::BYTES, self.data_mode)?);
                self.write_slow(addr, f(old).wide(), T::BYTES, self.data_mode)?;
                return Ok(old);
            }
        };
        // SAFETY: `locate_write` found T::BYTES of writable guest RAM at `p`.
        let mut old = unsafe { p.read_unaligned() };
        loop {
            // SAFETY: as above.
            let seen = unsafe { T::compare_exchange(p, old, f(old)) };
            if seen == old {
                break;
            }
            old = seen;
        }
        if let Some(gpa) = code {
            self.code_written(gpa, T::BYTES);
        }
        Ok(old)
    }
}

macro_rules! by_size {
    ($bytes:expr, $f:ident($($arg:expr),*)) => {
        match $bytes {
            1 => $f::<u8>($($arg),*),
            2 => $f::<u16>($($arg),*),
            4 => $f::<u32>($($arg),*),
            _ => $f::<u64>($($arg),*),
        }
    };
}

fn alu_dyn<T: Alu>(k: u8, cc: u64, a: T, b: T) -> (T, u64) {
    match k {
        kind::ADD => T::alu::<{ kind::ADD }>(cc, a, b),
        kind::OR => T::alu::<{ kind::OR }>(cc, a, b),
        kind::ADC => T::alu::<{ kind::ADC }>(cc, a, b),
        kind::SBB => T::alu::<{ kind::SBB }>(cc, a, b),
        kind::AND => T::alu::<{ kind::AND }>(cc, a, b),
        kind::SUB => T::alu::<{ kind::SUB }>(cc, a, b),
        _ => T::alu::<{ kind::XOR }>(cc, a, b),
    }
}

/// Locked ADD, OR, ADC, SBB, AND, SUB, XOR. `b`: size, kind << 4, from register `a` (0x80)
/// or from `imm`.
pub(crate) fn lock_alu(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    fn go<T: Atomic>(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
        let b = if op.b & 0x80 != 0 {
            cpu.reg::<T>(op.a)
        } else {
            T::cut(op.imm)
        };
        let k = op.b >> 4 & 7;
        let addr = cpu.operand(op, T::BYTES, true)?;
        let cc = cpu.s.cc;
        let old = cpu.modify_locked::<T>(addr, |a| alu_dyn(k, cc, a, b).0)?;
        cpu.s.cc = alu_dyn(k, cc, old, b).1;
        Ok(())
    }
    by_size!(op.b & 15, go(cpu, op))
}

/// Locked INC, DEC, NEG, NOT. `b`: size, kind << 4.
pub(crate) fn lock_unary(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    fn apply<T: Alu>(k: u8, cc: u64, a: T) -> (T, u64) {
        match k {
            unary::INC => T::unary::<{ unary::INC }>(cc, a),
            unary::DEC => T::unary::<{ unary::DEC }>(cc, a),
            unary::NEG => T::unary::<{ unary::NEG }>(cc, a),
            _ => T::unary::<{ unary::NOT }>(cc, a),
        }
    }
    fn go<T: Atomic>(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
        let k = op.b >> 4;
        let addr = cpu.operand(op, T::BYTES, true)?;
        let cc = cpu.s.cc;
        let old = cpu.modify_locked::<T>(addr, |a| apply(k, cc, a).0)?;
        cpu.s.cc = apply(k, cc, old).1;
        Ok(())
    }
    by_size!(op.b & 15, go(cpu, op))
}

/// XCHG of memory with register `a`; size in `b`.
pub(crate) fn xchg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    fn go<T: Atomic>(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
        let new = cpu.reg::<T>(op.a);
        let addr = cpu.operand(op, T::BYTES, true)?;
        let old = cpu.modify_locked::<T>(addr, |_| new)?;
        cpu.set_reg::<T>(op.a, old);
        Ok(())
    }
    by_size!(op.b, go(cpu, op))
}

/// XADD with memory, locked or not; size in `b`, register `a`.
pub(crate) fn xadd(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    fn go<T: Atomic>(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
        let add = cpu.reg::<T>(op.a);
        let addr = cpu.operand(op, T::BYTES, true)?;
        let old = cpu.modify_locked::<T>(addr, |old| alu_dyn(kind::ADD, 0, old, add).0)?;
        cpu.s.cc = alu_dyn(kind::ADD, 0, old, add).1;
        cpu.set_reg::<T>(op.a, old);
        Ok(())
    }
    by_size!(op.b, go(cpu, op))
}

/// XADD of registers `imm` (destination) and `a`; size in `b`.
pub(crate) fn xadd_rr(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    fn go<T: Alu>(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
        let to = op.imm as u8;
        let (a, b) = (cpu.reg::<T>(to), cpu.reg::<T>(op.a));
        let (sum, cc) = alu_dyn(kind::ADD, 0, a, b);
        cpu.s.cc = cc;
        cpu.set_reg::<T>(op.a, a);
        cpu.set_reg::<T>(to, sum);
        Ok(())
    }
    by_size!(op.b, go(cpu, op))
}

/// CMPXCHG with memory, locked or not; size in `b`, register `a`.
pub(crate) fn cmpxchg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    fn go<T: Atomic>(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
        let (expected, new) = (cpu.reg::<T>(0), cpu.reg::<T>(op.a));
        let addr = cpu.operand(op, T::BYTES, true)?;
        // Memory is written in any case, with what was there if the comparison fails.
        let old = cpu.modify_locked::<T>(addr, |old| if old == expected { new } else { old })?;
        cpu.s.cc = T::alu::<{ kind::CMP }>(0, expected, old).1;
        if old != expected {
            cpu.set_reg::<T>(0, old);
        }
        Ok(())
    }
    by_size!(op.b, go(cpu, op))
}

/// CMPXCHG of registers `imm` (destination) and `a`; size in `b`.
pub(crate) fn cmpxchg_rr(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = usize::from(op.b);
    let to = op.imm as u8;
    let (expected, old, new) = (
        get(cpu, 0, bytes),
        get(cpu, to, bytes),
        get(cpu, op.a, bytes),
    );
    fn flags<T: Alu>(a: u64, b: u64) -> u64 {
        T::alu::<{ kind::CMP }>(0, T::cut(a), T::cut(b)).1
    }
    cpu.s.cc = by_size!(bytes, flags(expected, old));
    if old == expected {
        put(cpu, to, new, bytes);
    } else {
        put(cpu, 0, old, bytes);
    }
    Ok(())
}

/// CMPXCHG8B.
pub(crate) fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let pair = |hi: u64, lo: u64| hi << 32 | lo & 0xffff_ffff;
    let expected = pair(cpu.s.gpr[RDX], cpu.s.gpr[RAX]);
    let new = pair(cpu.s.gpr[RCX], cpu.s.gpr[RBX]);
    let addr = cpu.operand(op, 8, true)?;
    let old = cpu.modify_locked::<u64>(addr, |old| if old == expected { new } else { old })?;
    if old == expected {
        cpu.s.cc |= 0x4000;
    } else {
        cpu.s.cc &= !0x4000;
        cpu.s.gpr[RAX] = old & 0xffff_ffff;
        cpu.s.gpr[RDX] = old >> 32;
    }
    Ok(())
}

/// CMPXCHG16B.
pub(crate) fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let addr = cpu.operand(op, 16, true)?;
    if addr & 15 != 0 {
        return Err(Exception::GP0);
    }
    let (mut low, mut high) = (cpu.s.gpr[RAX], cpu.s.gpr[RDX]);
    let (new_low, new_high) = (cpu.s.gpr[RBX], cpu.s.gpr[RCX]);
    let equal: u8;
    match cpu.locate_write(addr, 16)? {
        Target::Ram(p) | Target::Code(p, _) => {
            let out: u64;
            // SAFETY: 16 bytes of writable guest RAM, aligned. RBX is LLVM's own, so the new
            // low half is swapped in and out around the instruction; fixed registers keep
            // the other operands out of it.
            unsafe {
                asm!(
                    "xchg rbx, rsi",
                    "lock cmpxchg16b [rdi]",
                    "sete cl",
                    "mov rbx, rsi",
                    in("rdi") p,
                    inout("rsi") new_low => _,
                    inout("rax") low,
                    inout("rdx") high,
                    inout("rcx") new_high => out,
                    options(nostack)
                );
            }
            equal = out as u8;
        }
        Target::Mmio | Target::Split => {
            let machine = cpu.machine.clone();
            let _turn = machine.split_turn();
            let mut data = [0; 16];
            cpu.read_bytes(addr, &mut data)?;
            let old = u128::from_le_bytes(data);
            let expected = u128::from(high) << 64 | u128::from(low);
            equal = u8::from(old == expected);
            if equal != 0 {
                let new = u128::from(new_high) << 64 | u128::from(new_low);
                cpu.write_bytes(addr, &new.to_le_bytes())?;
            }
            low = old as u64;
            high = (old >> 64) as u64;
        }
    }
    if let Target::Code(_, gpa) = cpu.locate_write(addr, 16)? {
        cpu.code_written(gpa, 16);
    }
    if equal != 0 {
        cpu.s.cc |= 0x4000;
    } else {
        cpu.s.cc &= !0x4000;
        cpu.s.gpr[RAX] = low;
        cpu.s.gpr[RDX] = high;
    }
    Ok(())
}
