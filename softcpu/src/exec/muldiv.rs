//! MUL, IMUL with one operand, DIV, IDIV, and BMI2's MULX.

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::op::Op;
use crate::state::gpr::{RAX, RDX};

/// Operand value: memory if the decoder set `b` to `Op::NO_REG`, else register `b`.
pub(crate) fn value(cpu: &mut Cpu, op: &Op, bytes: usize) -> Fallible<u64> {
    if op.b != Op::NO_REG {
        return Ok(match bytes {
            1 => cpu.reg::<u8>(op.b).into(),
            2 => cpu.reg::<u16>(op.b).into(),
            4 => cpu.reg::<u32>(op.b).into(),
            _ => cpu.reg::<u64>(op.b),
        });
    }
    let addr = cpu.operand(op, bytes, false)?;
    Ok(match bytes {
        1 => cpu.read::<u8>(addr)?.into(),
        2 => cpu.read::<u16>(addr)?.into(),
        4 => cpu.read::<u32>(addr)?.into(),
        _ => cpu.read::<u64>(addr)?,
    })
}

fn sign(value: u64, bytes: usize) -> i64 {
    let unused = 64 - 8 * bytes as u32;
    (value << unused) as i64 >> unused
}

/// Stores a double-width result in AX, DX:AX, EDX:EAX or RDX:RAX.
fn set_pair(cpu: &mut Cpu, low: u64, high: u64, bytes: usize) {
    match bytes {
        1 => cpu.set_reg::<u16>(0, (low & 0xff | high << 8) as u16),
        2 => {
            cpu.set_reg::<u16>(0, low as u16);
            cpu.set_reg::<u16>(16, high as u16);
        }
        4 => {
            cpu.set_reg::<u32>(0, low as u32);
            cpu.set_reg::<u32>(16, high as u32);
        }
        _ => {
            cpu.s.gpr[RAX] = low;
            cpu.s.gpr[RDX] = high;
        }
    }
}

/// CF and OF as MUL leaves them; SF, ZF, AF, PF are undefined and taken from the low half.
fn mul_flags(cpu: &mut Cpu, low: u64, bytes: usize, overflow: bool) {
    let negative = sign(low, bytes) < 0;
    let parity = (low as u8).count_ones().is_multiple_of(2);
    cpu.s.cc =
        0x200 | (u64::from(overflow) * 0x101) | u64::from(negative) << 15 | u64::from(parity) << 10;
}

/// MUL; operand size in `a`.
pub(crate) fn mul(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = usize::from(op.a);
    let bits = 8 * bytes as u32;
    let b = value(cpu, op, bytes)?;
    let a = cpu.s.gpr[RAX] & (u64::MAX >> (64 - bits));
    let product = u128::from(a) * u128::from(b);
    let low = product as u64 & (u64::MAX >> (64 - bits));
    let high = (product >> bits) as u64;
    set_pair(cpu, low, high, bytes);
    mul_flags(cpu, low, bytes, high != 0);
    Ok(())
}

/// IMUL with one operand; size in `a`.
pub(crate) fn imul(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = usize::from(op.a);
    let bits = 8 * bytes as u32;
    let b = sign(value(cpu, op, bytes)?, bytes);
    let a = sign(cpu.s.gpr[RAX], bytes);
    let product = i128::from(a) * i128::from(b);
    let low = product as u64 & (u64::MAX >> (64 - bits));
    let high = (product >> bits) as u64;
    set_pair(cpu, low, high, bytes);
    mul_flags(cpu, low, bytes, i128::from(sign(low, bytes)) != product);
    Ok(())
}

fn dividend(cpu: &Cpu, bytes: usize) -> u128 {
    let (a, d) = (cpu.s.gpr[RAX], cpu.s.gpr[RDX]);
    match bytes {
        1 => u128::from(a as u16),
        2 => u128::from(a as u16) | u128::from(d as u16) << 16,
        4 => u128::from(a as u32) | u128::from(d as u32) << 32,
        _ => u128::from(a) | u128::from(d) << 64,
    }
}

/// DIV; operand size in `a`.
pub(crate) fn div(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = usize::from(op.a);
    let bits = 8 * bytes as u32;
    let b = value(cpu, op, bytes)?;
    if b == 0 {
        return Err(Exception::DE);
    }
    let a = dividend(cpu, bytes);
    let (quotient, rest) = if a >> 64 == 0 {
        (u128::from(a as u64 / b), a as u64 % b)
    } else {
        (a / u128::from(b), (a % u128::from(b)) as u64)
    };
    if quotient >> bits != 0 {
        return Err(Exception::DE);
    }
    set_pair(cpu, quotient as u64, rest, bytes);
    Ok(())
}

/// IDIV; operand size in `a`.
pub(crate) fn idiv(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = usize::from(op.a);
    let bits = 8 * bytes as u32;
    let b = i128::from(sign(value(cpu, op, bytes)?, bytes));
    let unused = 128 - 2 * bits;
    let a = (dividend(cpu, bytes) << unused) as i128 >> unused;
    // The only overflow of 128 bits, i128::MIN / -1, overflows the result in any case.
    let (Some(quotient), Some(rest)) = (a.checked_div(b), a.checked_rem(b)) else {
        return Err(Exception::DE);
    };
    if quotient != i128::from(sign(quotient as u64, bytes)) {
        return Err(Exception::DE);
    }
    let mask = u64::MAX >> (64 - bits);
    set_pair(cpu, quotient as u64 & mask, rest as u64 & mask, bytes);
    Ok(())
}

/// MULX: `imm` holds size (bits 0..8), high destination (8..16), low destination (16..24).
pub(crate) fn mulx(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let bytes = op.imm as u8 as usize;
    let (high, low) = ((op.imm >> 8) as u8, (op.imm >> 16) as u8);
    let b = value(cpu, op, bytes)?;
    if bytes == 4 {
        let product = u64::from(cpu.s.gpr[RDX] as u32) * b;
        cpu.set_reg::<u32>(low, product as u32);
        cpu.set_reg::<u32>(high, (product >> 32) as u32);
    } else {
        let product = u128::from(cpu.s.gpr[RDX]) * u128::from(b);
        cpu.set_reg::<u64>(low, product as u64);
        cpu.set_reg::<u64>(high, (product >> 64) as u64);
    }
    Ok(())
}
