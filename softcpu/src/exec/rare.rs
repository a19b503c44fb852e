//! Segment register moves, far pointers, flag operations, BCD, ENTER, BOUND, and the stack
//! operations of legacy modes.

use super::bits::{get, put};
use super::muldiv::value;
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::op::Op;
use crate::state::gpr::{RBP, RBX, RSP};
use crate::state::{rflags, seg};

/// MOV to a segment register (number in `imm`); source `b` or memory.
pub(crate) fn mov_to_seg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let selector = value(cpu, op, 2)? as u16;
    load_seg(cpu, op.imm as usize, selector)
}

fn load_seg(cpu: &mut Cpu, index: usize, selector: u16) -> Fallible<()> {
    if index == seg::CS || index > seg::GS {
        return Err(Exception::UD);
    }
    cpu.load_segment(index, selector)?;
    if index == seg::SS {
        cpu.set_shadow(true);
    }
    Ok(())
}

/// MOV from a segment register (`imm`) to register `a` of size `b`, or to memory.
pub(crate) fn mov_from_seg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let Some(segment) = cpu.s.seg.get(op.imm as usize) else {
        return Err(Exception::UD);
    };
    let selector = segment.selector;
    if op.a == Op::NO_REG {
        let addr = cpu.operand(op, 2, true)?;
        return cpu.write::<u16>(addr, selector);
    }
    put(cpu, op.a, selector.into(), op.b.into());
    Ok(())
}

/// PUSH of a segment register (`imm`), size `a`.
pub(crate) fn push_seg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let selector = cpu.s.seg[op.imm as usize].selector;
    cpu.push(selector.into(), op.a.into())
}

/// POP to a segment register (`imm`), size `a`.
pub(crate) fn pop_seg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let sp = cpu.s.gpr[RSP];
    let selector = cpu.peek_at(sp, op.a.into())? as u16;
    // The stack's size before the load counts.
    let mask = cpu.stack_mask();
    load_seg(cpu, op.imm as usize, selector)?;
    let new = sp.wrapping_add(op.a.into());
    cpu.s.gpr[RSP] = if mask == u64::MAX {
        new
    } else {
        sp & !mask | new & mask
    };
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS (`imm`); register `a`, offset size `b`.
pub(crate) fn load_far_pointer(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let size = usize::from(op.b);
    let addr = cpu.operand(op, size + 2, false)?;
    let mut bytes = [0; 10];
    cpu.read_bytes(addr, &mut bytes[..size + 2])?;
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&bytes[..size]);
    cpu.load_segment(op.imm as usize, selector)?;
    put(cpu, op.a, u64::from_le_bytes(offset), size);
    Ok(())
}

/// JMP, CALL far direct: selector in `disp`, offset in `imm`, size `a`, call in `b`.
pub(crate) fn far_direct(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.far_transfer(op.disp as u16, op.imm, op.a.into(), op.b != 0)
}

/// JMP, CALL far through memory: size `a`, call in `b`.
pub(crate) fn far_indirect(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let size = usize::from(op.a);
    let addr = cpu.operand(op, size + 2, false)?;
    let mut bytes = [0; 10];
    cpu.read_bytes(addr, &mut bytes[..size + 2])?;
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&bytes[..size]);
    cpu.far_transfer(selector, u64::from_le_bytes(offset), size, op.b != 0)
}

/// RETF; size `a`, bytes to drop in `imm`.
pub(crate) fn far_return(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.far_return(op.a.into(), op.imm)
}

/// PUSH in any mode: register `b`, memory, or with `ea` 0xff an immediate; size `a`.
pub(crate) fn push_any(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let size = usize::from(op.a);
    let v = value(cpu, op, size)?;
    cpu.push(v, size)
}

/// PUSH of an immediate in any mode.
pub(crate) fn push_imm(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.push(op.imm, op.a.into())
}

/// POP to register `b`, size `a`, any mode.
pub(crate) fn pop_reg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let v = cpu.pop(op.a.into())?;
    put(cpu, op.b, v, op.a.into());
    Ok(())
}

/// POP to memory, size `a`, any mode: the address is computed with the new stack pointer.
pub(crate) fn pop_mem(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let size = usize::from(op.a);
    let sp = cpu.s.gpr[RSP];
    let v = cpu.pop(size)?;
    let result = cpu.operand(op, size, true).and_then(|addr| match size {
        2 => cpu.write::<u16>(addr, v as u16),
        4 => cpu.write::<u32>(addr, v as u32),
        _ => cpu.write::<u64>(addr, v),
    });
    if result.is_err() {
        cpu.s.gpr[RSP] = sp;
    }
    result
}

/// PUSHA; size `a`.
pub(crate) fn pusha(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let size = usize::from(op.a);
    let mut sp = cpu.s.gpr[RSP];
    for i in 0..8 {
        sp = cpu.push_at(sp, cpu.s.gpr[i], size)?;
    }
    cpu.set_sp(sp);
    Ok(())
}

/// POPA; size `a`.
pub(crate) fn popa(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let size = usize::from(op.a);
    let mut values = [0; 8];
    let mut sp = cpu.s.gpr[RSP];
    for i in (0..8).rev() {
        values[i] = cpu.peek_at(sp, size)?;
        sp = sp.wrapping_add(size as u64);
    }
    for (i, v) in values.into_iter().enumerate() {
        if i != RSP {
            put(cpu, i as u8 * 8, v, size);
        }
    }
    cpu.set_sp(sp);
    Ok(())
}

/// ENTER; operand size `a`, frame size in `imm` (bits 0..16), nesting level (16..24).
pub(crate) fn enter(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let size = usize::from(op.a);
    let step = size as u64;
    let frame_size = op.imm & 0xffff;
    let level = op.imm >> 16 & 31;
    let mask = cpu.stack_mask();
    let mut sp = cpu.push_at(cpu.s.gpr[RSP], cpu.s.gpr[RBP], size)?;
    let frame = sp;
    if level > 0 {
        let mut bp = cpu.s.gpr[RBP];
        for _ in 1..level {
            bp = bp.wrapping_sub(step);
            let v = cpu.peek_at(bp & mask, size)?;
            sp = cpu.push_at(sp, v, size)?;
        }
        sp = cpu.push_at(sp, frame, size)?;
    }
    sp = sp.wrapping_sub(frame_size);
    // The new stack top must be writable, or ENTER itself faults.
    let addr = cpu.stack_addr(sp, size, true)?;
    cpu.check_write(addr, size)?;
    put(cpu, 40, frame, size);
    cpu.set_sp(sp);
    Ok(())
}

/// LEAVE in any mode; size `a`.
pub(crate) fn leave(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let size = usize::from(op.a);
    let bp = cpu.s.gpr[RBP];
    let v = cpu.peek_at(bp, size)?;
    cpu.set_sp(bp.wrapping_add(size as u64));
    put(cpu, 40, v, size);
    Ok(())
}

/// BOUND; register `a`, size `b`.
pub(crate) fn bound(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let size = usize::from(op.b);
    let addr = cpu.operand(op, 2 * size, false)?;
    let second = cpu.wrap_linear(addr.wrapping_add(size as u64));
    let (low, high, index) = if size == 2 {
        (
            i32::from(cpu.read::<u16>(addr)? as i16),
            i32::from(cpu.read::<u16>(second)? as i16),
            i32::from(cpu.reg::<u16>(op.a) as i16),
        )
    } else {
        (
            cpu.read::<u32>(addr)? as i32,
            cpu.read::<u32>(second)? as i32,
            cpu.reg::<u32>(op.a) as i32,
        )
    };
    if index < low || index > high {
        return Err(Exception::BR);
    }
    Ok(())
}

/// CLC, STC, CMC, CLD, STD; `imm`: 0 to 4.
pub(crate) fn flag_op(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    match op.imm {
        0 => cpu.s.cc &= !0x100,
        1 => cpu.s.cc |= 0x100,
        2 => cpu.s.cc ^= 0x100,
        3 => cpu.s.flags &= !rflags::DF,
        _ => cpu.s.flags |= rflags::DF,
    }
    Ok(())
}

/// LAHF.
pub(crate) fn lahf(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    let flags = (cpu.s.cc >> 8) as u8;
    cpu.set_reg::<u8>(1, flags);
    Ok(())
}

/// SAHF.
pub(crate) fn sahf(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    let ah = u64::from(cpu.reg::<u8>(1));
    cpu.s.cc = cpu.s.cc & 1 | (ah & 0xd5 | 2) << 8;
    Ok(())
}

/// XLAT: `base` holds RBX, `index` AL's stand-in is computed here.
pub(crate) fn xlat(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let al = u64::from(cpu.reg::<u8>(0));
    let at = Op {
        disp: op.disp.wrapping_add(al as i64),
        base: (RBX * 8) as u8,
        index: Op::NO_REG,
        ..*op
    };
    let addr = cpu.operand(&at, 1, false)?;
    let v = cpu.read::<u8>(addr)?;
    cpu.set_reg::<u8>(0, v);
    Ok(())
}

/// SF, ZF, PF of a byte, with AF and CF given.
fn byte_flags(v: u8, carry: bool, adjust: bool) -> u64 {
    0x200
        | u64::from(carry) << 8
        | u64::from(adjust) << 12
        | u64::from(v == 0) << 14
        | u64::from(v & 0x80) << 8
        | u64::from(v.count_ones().is_multiple_of(2)) << 10
}

/// AAA, AAS (`imm` 0, 1), DAA, DAS (2, 3).
pub(crate) fn bcd(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let al = cpu.reg::<u8>(0);
    let af = cpu.s.cc & 0x1000 != 0;
    let cf = cpu.s.cc & 0x100 != 0;
    if op.imm < 2 {
        let adjust = al & 15 > 9 || af;
        let mut ax = cpu.reg::<u16>(0);
        if adjust {
            ax = if op.imm == 0 {
                ax.wrapping_add(0x106)
            } else {
                ax.wrapping_sub(6).wrapping_sub(0x100)
            };
        }
        ax &= 0xff0f;
        cpu.set_reg::<u16>(0, ax);
        cpu.s.cc = byte_flags(ax as u8, adjust, adjust);
        return Ok(());
    }
    let (mut v, mut carry) = (al, false);
    let low = al & 15 > 9 || af;
    let add = op.imm == 2;
    if low {
        carry = cf || if add { al > 0xf9 } else { al < 6 };
        v = if add {
            v.wrapping_add(6)
        } else {
            v.wrapping_sub(6)
        };
    }
    if al > 0x99 || cf {
        v = if add {
            v.wrapping_add(0x60)
        } else {
            v.wrapping_sub(0x60)
        };
        carry = true;
    }
    cpu.set_reg::<u8>(0, v);
    cpu.s.cc = byte_flags(v, carry, low);
    Ok(())
}

/// AAM, with its base in `imm`.
pub(crate) fn aam(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let (al, base) = (cpu.reg::<u8>(0), op.imm as u8);
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(Exception::DE);
    };
    cpu.set_reg::<u16>(0, u16::from(high) << 8 | u16::from(low));
    cpu.s.cc = byte_flags(low, false, false);
    Ok(())
}

/// AAD, with its base in `imm`.
pub(crate) fn aad(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let [al, ah] = cpu.reg::<u16>(0).to_le_bytes();
    let v = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    cpu.set_reg::<u16>(0, v.into());
    cpu.s.cc = byte_flags(v, false, false);
    Ok(())
}

/// SALC.
pub(crate) fn salc(cpu: &mut Cpu, _: &Op) -> Fallible<()> {
    let v = if cpu.s.cc & 0x100 != 0 { 0xff } else { 0 };
    cpu.set_reg::<u8>(0, v);
    Ok(())
}

/// MOVNTI and plain stores that have no fast form: register `a`, size `b`.
pub(crate) fn store_reg(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let v = get(cpu, op.a, op.b.into());
    let addr = cpu.operand(op, op.b.into(), true)?;
    match op.b {
        4 => cpu.write::<u32>(addr, v as u32),
        _ => cpu.write::<u64>(addr, v),
    }
}

/// CLFLUSH and family, which fault like a read and do nothing more.
pub(crate) fn touch(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let addr = cpu.operand(op, 1, false)?;
    cpu.read::<u8>(addr)?;
    Ok(())
}

/// CLZERO: clears the cache line of its operand.
pub(crate) fn clzero(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    const LINE: u64 = 64;
    let at = Op {
        disp: 0,
        index: Op::NO_REG,
        ..*op
    };
    let addr = cpu.operand(&at, 1, true)? & !(LINE - 1);
    cpu.write_bytes(addr, &[0; LINE as usize])
}
