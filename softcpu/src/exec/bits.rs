//! BT and family, scans, counts, double shifts, BMI1/BMI2, ADX, MOVBE.

use super::muldiv::value;
use super::{attempt, next};
use crate::alu::scan;
use crate::cpu::Cpu;
use crate::exception::Fallible;
use crate::mmu::Word;
use crate::op::Op;

const CF: u64 = 0x100;
const ZF: u64 = 0x4000;

fn mask(bytes: usize) -> u64 {
    u64::MAX >> (64 - 8 * bytes as u32)
}

/// Writes a register of `bytes`.
pub(crate) fn put(cpu: &mut Cpu, reg: u8, value: u64, bytes: usize) {
    match bytes {
        1 => cpu.set_reg::<u8>(reg, value as u8),
        2 => cpu.set_reg::<u16>(reg, value as u16),
        4 => cpu.set_reg::<u32>(reg, value as u32),
        _ => cpu.set_reg::<u64>(reg, value),
    }
}

/// Reads a register of `bytes`.
pub(crate) fn get(cpu: &Cpu, reg: u8, bytes: usize) -> u64 {
    match bytes {
        1 => cpu.reg::<u8>(reg).into(),
        2 => cpu.reg::<u16>(reg).into(),
        4 => cpu.reg::<u32>(reg).into(),
        _ => cpu.reg::<u64>(reg),
    }
}

/// BT, BTS, BTR, BTC by number 0..4.
fn bit_result(kind: u8, old: u64, bit: u32) -> u64 {
    match kind {
        1 => old | 1 << bit,
        2 => old & !(1 << bit),
        3 => old ^ 1 << bit,
        _ => old,
    }
}

/// BT family on a register with an immediate (in `imm`).
pub(crate) unsafe fn bt_ri<const K: u8, T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let bit = (*op).imm as u32 & (T::BITS - 1);
        bt_reg::<K, T>(cpu, (*op).a, bit);
        next(cpu, op)
    }
}

/// BT family on a register with a register.
pub(crate) unsafe fn bt_rr<const K: u8, T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let bit = cpu.reg::<T>((*op).b).wide() as u32 & (T::BITS - 1);
        bt_reg::<K, T>(cpu, (*op).a, bit);
        next(cpu, op)
    }
}

#[inline(always)]
fn bt_reg<const K: u8, T: Word>(cpu: &mut Cpu, reg: u8, bit: u32) {
    let old = cpu.reg::<T>(reg).wide();
    cpu.s.cc = cpu.s.cc & !CF | (old >> bit & 1) << 8;
    if K != 0 {
        cpu.set_reg::<T>(reg, T::cut(bit_result(K, old, bit)));
    }
}

/// BT family on memory. `imm`: kind (bits 0..2), locked (bit 2), bit number from register `a`
/// (bit 3) or from bits 16..24; size in `b`.
pub(crate) fn bt_memory(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = usize::from(op.b);
    let bits = 8 * bytes as u32;
    let kind = op.imm as u8 & 3;
    let write = kind != 0;
    let (bit, delta) = if op.imm & 8 != 0 {
        // The register's value reaches beyond the operand: a bit string.
        let unused = 64 - bits;
        let at = (get(cpu, op.a, bytes) << unused) as i64 >> unused;
        let word = at >> bits.trailing_zeros();
        (at as u32 & (bits - 1), word * bytes as i64)
    } else {
        ((op.imm >> 16) as u32 & (bits - 1), 0)
    };
    let shifted = Op {
        disp: op.disp.wrapping_add(delta),
        ..*op
    };
    let addr = cpu.operand(&shifted, bytes, write)?;
    let old = if !write {
        match bytes {
            2 => cpu.read::<u16>(addr)?.into(),
            4 => cpu.read::<u32>(addr)?.into(),
            _ => cpu.read::<u64>(addr)?,
        }
    } else if op.imm & 4 != 0 {
        let f = |old| bit_result(kind, old, bit);
        match bytes {
            2 => cpu
                .modify_locked::<u16>(addr, |old| u16::cut(f(old.wide())))?
                .wide(),
            4 => cpu
                .modify_locked::<u32>(addr, |old| u32::cut(f(old.wide())))?
                .wide(),
            _ => cpu.modify_locked::<u64>(addr, f)?,
        }
    } else {
        let mut seen = 0;
        let mut f = |old| {
            seen = old;
            bit_result(kind, old, bit)
        };
        match bytes {
            2 => cpu.modify::<u16>(addr, |_, old| u16::cut(f(old.wide())))?,
            4 => cpu.modify::<u32>(addr, |_, old| u32::cut(f(old.wide())))?,
            _ => cpu.modify::<u64>(addr, |_, old| f(old))?,
        }
        seen
    };
    cpu.s.cc = cpu.s.cc & !CF | (old >> bit & 1) << 8;
    Ok(())
}

/// BSF, BSR, TZCNT, LZCNT, POPCNT; kind and size in `imm`, source in `b` or memory.
pub(crate) fn scan_op(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = (op.imm >> 8) as u8 as usize;
    let bits = 8 * bytes as u32;
    let kind = op.imm as u8;
    let v = value(cpu, op, bytes)?;
    scan_into(cpu, kind, op.a, v, bytes, bits);
    Ok(())
}

fn scan_into(cpu: &mut Cpu, kind: u8, to: u8, v: u64, bytes: usize, bits: u32) {
    let cc = cpu.s.cc;
    match kind {
        scan::BSF | scan::BSR => {
            if v == 0 {
                // The destination keeps its value on all processors there are (on some of
                // Intel's a 32-bit one loses its upper half).
                cpu.s.cc = cc & !0xff01 | 0x200 | ZF | 0x400;
                return;
            }
            let n = if kind == scan::BSF {
                v.trailing_zeros()
            } else {
                63 - v.leading_zeros()
            };
            cpu.s.cc = 0x200 | u64::from((n as u8).count_ones().is_multiple_of(2)) << 10;
            put(cpu, to, n.into(), bytes);
        }
        scan::POPCNT => {
            cpu.s.cc = 0x200 | u64::from(v == 0) << 14;
            put(cpu, to, v.count_ones().into(), bytes);
        }
        _ => {
            let n = if kind == scan::TZCNT {
                v.trailing_zeros().min(bits)
            } else {
                v.leading_zeros() - (64 - bits)
            };
            cpu.s.cc = 0x200 | u64::from(v == 0) << 8 | u64::from(n == 0) << 14;
            put(cpu, to, n.into(), bytes);
        }
    }
}

/// The same for 32 and 64-bit registers, in one slot.
pub(crate) unsafe fn scan_rr<const K: u8, T: Word>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let v = cpu.reg::<T>((*op).b).wide();
        scan_into(cpu, K, (*op).a, v, T::BYTES, T::BITS);
        next(cpu, op)
    }
}

/// CRC32 (SSE4.2) of register `a` with register `b` or memory of `imm` bytes. The decoder has
/// made sure that the host has it.
pub(crate) fn crc32(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    /// # Safety
    /// The host has SSE4.2.
    #[target_feature(enable = "sse4.2")]
    unsafe fn step(crc: u32, v: u64, bytes: usize) -> u32 {
        use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u16, _mm_crc32_u32, _mm_crc32_u64};
        match bytes {
            1 => _mm_crc32_u8(crc, v as u8),
            2 => _mm_crc32_u16(crc, v as u16),
            4 => _mm_crc32_u32(crc, v as u32),
            _ => _mm_crc32_u64(crc.into(), v) as u32,
        }
    }
    let bytes = op.imm as usize;
    let v = value(cpu, op, bytes)?;
    // SAFETY: the decoder asked for SSE4.2 before it emitted this operation.
    let crc = unsafe { step(cpu.reg::<u32>(op.a), v, bytes) };
    cpu.set_reg::<u32>(op.a, crc);
    Ok(())
}

/// SHLD, SHRD. `imm`: size (bits 0..8), right (bit 8), count from CL (bit 9) or bits 16..24;
/// destination `b` or memory, source `a`.
pub(crate) fn double_shift(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = op.imm as u8 as usize;
    let bits = 8 * bytes as u32;
    let right = op.imm & 0x100 != 0;
    let count = if op.imm & 0x200 != 0 {
        cpu.s.gpr[1] as u8
    } else {
        (op.imm >> 16) as u8
    };
    let count = u32::from(count) & if bytes == 8 { 63 } else { 31 };
    let source = get(cpu, op.a, bytes);
    let compute = |cc: u64, dest: u64| -> (u64, u64) {
        if count == 0 {
            return (dest, cc);
        }
        // Counts above 16 of a 16-bit operand are undefined; rotating through what is there
        // is what processors do.
        let wide = |hi: u64, lo: u64| u128::from(hi) << bits | u128::from(lo);
        let (result, carry) = if right {
            let all = if bits == 16 {
                wide(source, dest) | u128::from(dest) << 32
            } else {
                wide(source, dest)
            };
            ((all >> count) as u64, (all >> (count - 1)) as u64 & 1)
        } else {
            let (all, width) = if bits == 16 {
                (
                    u128::from(dest) << 32 | u128::from(source) << 16 | u128::from(dest),
                    48,
                )
            } else {
                (wide(dest, source), 2 * bits)
            };
            (
                (all >> (width - bits - count)) as u64,
                (all >> (width - count)) as u64 & 1,
            )
        };
        let result = result & mask(bytes);
        let top = |v: u64| v >> (bits - 1) & 1;
        let cc = 0x200
            | carry << 8
            | u64::from(result == 0) << 14
            | top(result) << 15
            | u64::from((result as u8).count_ones().is_multiple_of(2)) << 10
            | (top(result) ^ top(dest));
        (result, cc)
    };
    if op.b != Op::NO_REG {
        let (result, cc) = compute(cpu.s.cc, get(cpu, op.b, bytes));
        cpu.s.cc = cc;
        put(cpu, op.b, result, bytes);
        return Ok(());
    }
    let addr = cpu.operand(op, bytes, true)?;
    macro_rules! go {
        ($t:ty) => {
            cpu.modify::<$t>(addr, |cpu, old| {
                let (result, cc) = compute(cpu.s.cc, old.wide());
                cpu.s.cc = cc;
                <$t>::cut(result)
            })
        };
    }
    match bytes {
        2 => go!(u16),
        4 => go!(u32),
        _ => go!(u64),
    }
}

/// Number of a BMI operation in `Op::imm`.
pub(crate) mod bmi {
    #![allow(missing_docs)]
    pub const ANDN: u8 = 0;
    pub const BLSI: u8 = 1;
    pub const BLSMSK: u8 = 2;
    pub const BLSR: u8 = 3;
    pub const BEXTR: u8 = 4;
    pub const BZHI: u8 = 5;
    pub const PDEP: u8 = 6;
    pub const PEXT: u8 = 7;
    pub const RORX: u8 = 8;
    pub const SARX: u8 = 9;
    pub const SHLX: u8 = 10;
    pub const SHRX: u8 = 11;
    pub const ADCX: u8 = 12;
    pub const ADOX: u8 = 13;
}

fn deposit(source: u64, mut mask: u64) -> u64 {
    let (mut result, mut bit) = (0, 1u64);
    while mask != 0 {
        if source & bit != 0 {
            result |= mask & mask.wrapping_neg();
        }
        mask &= mask - 1;
        bit = bit.wrapping_shl(1);
    }
    result
}

fn extract(source: u64, mut mask: u64) -> u64 {
    let (mut result, mut bit) = (0, 1u64);
    while mask != 0 {
        if source & mask & mask.wrapping_neg() != 0 {
            result |= bit;
        }
        mask &= mask - 1;
        bit = bit.wrapping_shl(1);
    }
    result
}

/// BMI1, BMI2 and ADX. `imm`: operation (bits 0..8), size (8..16), second register or
/// immediate (16..24); first source in `b` or memory; destination `a`.
pub(crate) fn bmi_op(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = (op.imm >> 8) as u8 as usize;
    let bits = 8 * bytes as u32;
    let extra = (op.imm >> 16) as u8;
    let v = value(cpu, op, bytes)?;
    let all = mask(bytes);
    let second = |cpu: &Cpu| get(cpu, extra, bytes);
    let flags = |result: u64, carry: bool| {
        0x200
            | u64::from(carry) << 8
            | u64::from(result == 0) << 14
            | (result >> (bits - 1) & 1) << 15
    };
    let result = match op.imm as u8 {
        bmi::ANDN => {
            let r = !second(cpu) & v & all;
            cpu.s.cc = flags(r, false);
            r
        }
        bmi::BLSI => {
            let r = v & v.wrapping_neg();
            cpu.s.cc = flags(r, v != 0);
            r
        }
        bmi::BLSMSK => {
            let r = (v ^ v.wrapping_sub(1)) & all;
            cpu.s.cc = flags(r, v == 0);
            r
        }
        bmi::BLSR => {
            let r = v & v.wrapping_sub(1);
            cpu.s.cc = flags(r, v == 0);
            r
        }
        bmi::BEXTR => {
            let control = second(cpu);
            let (start, len) = (control as u8, (control >> 8) as u8);
            let shifted = v.checked_shr(start.into()).unwrap_or(0);
            let r = match len {
                0 => 0,
                1..64 => shifted & (u64::MAX >> (64 - len)),
                _ => shifted,
            };
            cpu.s.cc = flags(r, false) & !0x8000;
            r
        }
        bmi::BZHI => {
            let n = u32::from(second(cpu) as u8);
            let r = if n < bits { v & !(u64::MAX << n) } else { v };
            cpu.s.cc = flags(r, n >= bits);
            r
        }
        bmi::PDEP => deposit(second(cpu), v),
        bmi::PEXT => extract(second(cpu), v),
        bmi::RORX => {
            let n = u32::from(extra) & (bits - 1);
            (v >> n | v.checked_shl(bits - n).unwrap_or(0)) & all
        }
        bmi::SHLX => v << (second(cpu) as u32 & (bits - 1)) & all,
        bmi::SHRX => v >> (second(cpu) as u32 & (bits - 1)),
        bmi::SARX => {
            let unused = 64 - bits;
            let signed = (v << unused) as i64 >> unused;
            (signed >> (second(cpu) as u32 & (bits - 1))) as u64 & all
        }
        kind => {
            let flag = if kind == bmi::ADCX { 8 } else { 0 };
            let carry = cpu.s.cc >> flag & 1;
            let sum = u128::from(get(cpu, op.a, bytes)) + u128::from(v) + u128::from(carry);
            cpu.s.cc = cpu.s.cc & !(1 << flag) | ((sum >> bits) as u64 & 1) << flag;
            sum as u64 & all
        }
    };
    // PDEP and PEXT take the mask from the first source, the value from the second.
    put(cpu, op.a, result, bytes);
    Ok(())
}

/// MOVBE; size in `imm`, bit 8: to memory.
pub(crate) fn movbe(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = op.imm as u8 as usize;
    let swap = |v: u64| v.swap_bytes() >> (64 - 8 * bytes as u32);
    if op.imm & 0x100 == 0 {
        let v = value(cpu, op, bytes)?;
        put(cpu, op.a, swap(v), bytes);
        return Ok(());
    }
    let v = swap(get(cpu, op.a, bytes));
    let addr = cpu.operand(op, bytes, true)?;
    match bytes {
        2 => cpu.write::<u16>(addr, v as u16),
        4 => cpu.write::<u32>(addr, v as u32),
        _ => cpu.write::<u64>(addr, v),
    }
}

/// SETcc to memory.
pub(crate) unsafe fn set_m<const C: u8>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler).
    unsafe {
        let value = u8::from(crate::alu::condition::<C>(cpu.s.cc));
        attempt!(cpu, op, super::store::<u8>(cpu, op, value));
        next(cpu, op)
    }
}
