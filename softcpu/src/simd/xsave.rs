//! Saving and restoring state: FXSAVE, FXRSTOR, XSAVE and its kin, MXCSR, VZEROUPPER
//! (Intel SDM vol. 1, 10.5 and 13).

use super::execute::{check_avx, check_sse, check_x87};
use super::runtime::settle_fsw;
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::op::Op;
use crate::state::{FpState, cr0, cr4, efer};

/// Bits of MXCSR that exist: MXCSR_MASK.
const MXCSR_MASK: u32 = 0xffff;
/// MXCSR's initial value.
const MXCSR_INIT: u32 = 0x1f80;

/// Components: x87, SSE, AVX.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;

/// Legacy area and header.
const HEADER: usize = 512;
const FIXED: usize = 576;
/// Bytes of the AVX component, at `FIXED` in the standard and the compacted form.
const AVX_LEN: usize = 256;
/// XCOMP_BV: compacted form.
const COMPACTED: u64 = 1 << 63;

/// Which instruction, in `Op::imm`.
pub(super) const XSAVE: u64 = 0;
pub(super) const XSAVEOPT: u64 = 1;
pub(super) const XSAVEC: u64 = 2;
pub(super) const XSAVES: u64 = 3;
/// XRSTORS.
pub(super) const SUPERVISOR: u64 = 4;
/// With REX.W: 64-bit instruction and data pointers.
pub(super) const WIDE: u64 = 8;

/// The first bytes of an area as the x87 part is stored there: FCW up to FDP, without MXCSR.
fn x87_head(cpu: &Cpu, wide: bool) -> [u8; 24] {
    let mut head = [0; 24];
    head.copy_from_slice(&cpu.s.fp.legacy[..24]);
    if !wide && cpu.s.mode64() {
        // No selectors in 64-bit mode; the offsets are cut.
        head[12..16].fill(0);
        head[20..24].fill(0);
    }
    head
}

/// Takes over the x87 part of an area.
fn load_x87(fp: &mut FpState, area: &[u8], wide: bool) {
    fp.legacy[..24].copy_from_slice(&area[..24]);
    // Bits that don't exist read as hardware has them.
    fp.legacy[0] = fp.legacy[0] & 0x3f | 0x40;
    fp.legacy[1] &= 0x1f;
    fp.legacy[5] = 0;
    fp.legacy[7] &= 7;
    if !wide {
        fp.legacy[14..16].fill(0);
        fp.legacy[22..24].fill(0);
    }
    for i in (32..160).step_by(16) {
        fp.legacy[i..i + 10].copy_from_slice(&area[i..i + 10]);
        fp.legacy[i + 10..i + 16].fill(0);
    }
    settle_fsw(fp);
}

fn init_x87(fp: &mut FpState) {
    fp.legacy[..24].fill(0);
    fp.legacy[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    fp.legacy[32..160].fill(0);
}

/// Where the XMM registers end that exist in the current mode.
fn xmm_end(cpu: &Cpu) -> usize {
    if cpu.s.mode64() { 416 } else { 288 }
}

/// The same for FXSAVE and FXRSTOR: with EFER.FFXSR a 64-bit kernel's leave them out.
fn fxsave_end(cpu: &Cpu) -> usize {
    let fast = cpu.s.efer & efer::FFXSR != 0 && cpu.s.cpl == 0 && cpu.s.mode64();
    if fast { 160 } else { xmm_end(cpu) }
}

fn mxcsr_at(area: &[u8]) -> Fallible<u32> {
    let value = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
    if value & !MXCSR_MASK != 0 {
        return Err(Exception::GP0);
    }
    Ok(value)
}

/// MXCSR and MXCSR_MASK.
fn mxcsr_pair(fp: &FpState) -> [u8; 8] {
    (u64::from(fp.mxcsr()) | u64::from(MXCSR_MASK) << 32).to_le_bytes()
}

/// FXSAVE, FXSAVE64.
pub(super) fn fxsave(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_x87(cpu)?;
    let addr = cpu.operand(op, 512, true)?;
    if addr & 15 != 0 {
        return Err(Exception::GP0);
    }
    cpu.check_write(addr, 512)?;
    cpu.sync_fp();
    let end = fxsave_end(cpu);
    let mut area = cpu.s.fp.legacy;
    area[..24].copy_from_slice(&x87_head(cpu, op.imm != 0));
    area[24..32].copy_from_slice(&mxcsr_pair(&cpu.s.fp));
    cpu.write_bytes(addr, &area[..end])
}

/// FXRSTOR, FXRSTOR64.
pub(super) fn fxrstor(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_x87(cpu)?;
    let addr = cpu.operand(op, 512, false)?;
    if addr & 15 != 0 {
        return Err(Exception::GP0);
    }
    let mut area = [0; 512];
    cpu.read_bytes(addr, &mut area)?;
    let mxcsr = mxcsr_at(&area)?;
    cpu.sync_fp();
    let end = fxsave_end(cpu);
    let fp = &mut cpu.s.fp;
    load_x87(fp, &area, op.imm != 0);
    fp.set_mxcsr(mxcsr);
    fp.legacy[160..end].copy_from_slice(&area[160..end]);
    Ok(())
}

/// The checks before XSAVE and XRSTOR; the components asked for that are enabled.
fn requested(cpu: &Cpu, supervisor: bool) -> Fallible<u64> {
    if cpu.s.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    if cpu.s.cr0 & cr0::TS != 0 {
        return Err(Exception::NM);
    }
    if supervisor && cpu.s.cpl != 0 {
        return Err(Exception::GP0);
    }
    // No supervisor component exists, so IA32_XSS adds none.
    let mask = cpu.s.gpr[0] & 0xffff_ffff | cpu.s.gpr[2] << 32;
    Ok(mask & cpu.s.xcr0 & (X87 | SSE | AVX))
}

/// Components that are not in their initial state.
fn in_use(cpu: &Cpu, mxcsr_counts: bool) -> u64 {
    let fp = &cpu.s.fp;
    let zero = |bytes: &[u8]| bytes.iter().all(|&b| b == 0);
    let mut used = 0;
    if fp.legacy[..2] != 0x37f_u16.to_le_bytes()
        || !zero(&fp.legacy[2..24])
        || !zero(&fp.legacy[32..160])
    {
        used |= X87;
    }
    if !zero(&fp.legacy[160..xmm_end(cpu)]) || mxcsr_counts && fp.mxcsr() != MXCSR_INIT {
        used |= SSE;
    }
    if !zero(fp.ymm_high.as_flattened()) {
        used |= AVX;
    }
    used
}

/// XSAVE, XSAVEOPT, XSAVEC, XSAVES.
pub(super) fn xsave(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let kind = op.imm & 3;
    let compact = kind >= XSAVEC;
    let wanted = requested(cpu, kind == XSAVES)?;
    let len = if wanted & AVX != 0 {
        FIXED + AVX_LEN
    } else {
        FIXED
    };
    let addr = cpu.operand(op, len, true)?;
    if addr & 63 != 0 {
        return Err(Exception::GP0);
    }
    cpu.check_write(addr, len)?;
    cpu.sync_fp();
    let used = in_use(cpu, compact);
    // Only XSAVE stores what is in its initial state.
    let stored = if kind == XSAVE { wanted } else { wanted & used };
    let mut state_bv = wanted & used;
    if !compact {
        state_bv |= cpu.read_u64(addr.wrapping_add(HEADER as u64))? & !wanted;
    }
    if stored & X87 != 0 {
        let head = x87_head(cpu, op.imm & WIDE != 0);
        cpu.write_bytes(addr, &head)?;
        let mut registers = [0; 128];
        registers.copy_from_slice(&cpu.s.fp.legacy[32..160]);
        cpu.write_bytes(addr.wrapping_add(32), &registers)?;
    }
    let mxcsr = if compact {
        stored & SSE
    } else {
        wanted & (SSE | AVX)
    };
    if mxcsr != 0 {
        let pair = mxcsr_pair(&cpu.s.fp);
        cpu.write_bytes(addr.wrapping_add(24), &pair)?;
    }
    if stored & SSE != 0 {
        let end = xmm_end(cpu);
        let legacy = cpu.s.fp.legacy;
        cpu.write_bytes(addr.wrapping_add(160), &legacy[160..end])?;
    }
    if stored & AVX != 0 {
        let high = cpu.s.fp.ymm_high;
        let end = if cpu.s.mode64() { 16 } else { 8 };
        cpu.write_bytes(addr.wrapping_add(FIXED as u64), high[..end].as_flattened())?;
    }
    cpu.write_u64(addr.wrapping_add(HEADER as u64), state_bv)?;
    if compact {
        cpu.write_u64(addr.wrapping_add(HEADER as u64 + 8), COMPACTED | wanted)?;
    }
    Ok(())
}

/// XRSTOR, XRSTORS.
pub(super) fn xrstor(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let supervisor = op.imm & SUPERVISOR != 0;
    let wanted = requested(cpu, supervisor)?;
    let addr = cpu.operand(op, FIXED, false)?;
    if addr & 63 != 0 {
        return Err(Exception::GP0);
    }
    let mut area = [0; FIXED + AVX_LEN];
    cpu.read_bytes(addr, &mut area[..FIXED])?;
    let mut header = [0_u64; 8];
    for (word, bytes) in header.iter_mut().zip(area[HEADER..FIXED].chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    }
    let [state_bv, comp_bv, reserved @ ..] = header;
    let compact = comp_bv & COMPACTED != 0;
    let components = comp_bv & !COMPACTED;
    let bad = if compact {
        !cpu.features.xsavec()
            || components & !cpu.s.xcr0 != 0
            || state_bv & !components != 0
            || reserved.iter().any(|&r| r != 0)
    } else {
        supervisor || state_bv & !cpu.s.xcr0 != 0 || comp_bv != 0 || reserved[0] != 0
    };
    if bad {
        return Err(Exception::GP0);
    }
    let loaded = wanted & state_bv;
    // The standard form has an MXCSR for SSE and AVX alike, whatever XSTATE_BV says.
    let mxcsr = if compact {
        if loaded & SSE != 0 {
            Some(mxcsr_at(&area)?)
        } else {
            (wanted & SSE != 0).then_some(MXCSR_INIT)
        }
    } else if wanted & (SSE | AVX) != 0 {
        Some(mxcsr_at(&area)?)
    } else {
        None
    };
    if loaded & AVX != 0 {
        let addr = cpu.operand(op, FIXED + AVX_LEN, false)?;
        cpu.read_bytes(addr.wrapping_add(FIXED as u64), &mut area[FIXED..])?;
    }
    cpu.sync_fp();
    let end = xmm_end(cpu);
    let fp = &mut cpu.s.fp;
    if loaded & X87 != 0 {
        load_x87(fp, &area, op.imm & WIDE != 0);
    } else if wanted & X87 != 0 {
        init_x87(fp);
    }
    if loaded & SSE != 0 {
        fp.legacy[160..end].copy_from_slice(&area[160..end]);
    } else if wanted & SSE != 0 {
        fp.legacy[160..end].fill(0);
    }
    if wanted & AVX != 0 {
        let registers = (end - 160) / 16;
        let high = fp.ymm_high[..registers].as_flattened_mut();
        if loaded & AVX != 0 {
            high.copy_from_slice(&area[FIXED..FIXED + high.len()]);
        } else {
            high.fill(0);
        }
    }
    if let Some(value) = mxcsr {
        fp.set_mxcsr(value);
    }
    Ok(())
}

fn check_mxcsr(cpu: &Cpu, op: &Op) -> Fallible<()> {
    if op.imm != 0 {
        check_avx(cpu)
    } else {
        check_sse(cpu)
    }
}

/// LDMXCSR, VLDMXCSR.
pub(super) fn ldmxcsr(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_mxcsr(cpu, op)?;
    let addr = cpu.operand(op, 4, false)?;
    let value = cpu.read_u32(addr)?;
    if value & !MXCSR_MASK != 0 {
        return Err(Exception::GP0);
    }
    cpu.sync_mxcsr();
    cpu.s.fp.set_mxcsr(value);
    Ok(())
}

/// STMXCSR, VSTMXCSR.
pub(super) fn stmxcsr(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_mxcsr(cpu, op)?;
    let addr = cpu.operand(op, 4, true)?;
    cpu.sync_mxcsr();
    cpu.write_u32(addr, cpu.s.fp.mxcsr())
}

/// VZEROUPPER, VZEROALL.
pub(super) fn vzero(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_avx(cpu)?;
    let end = xmm_end(cpu);
    let fp = &mut cpu.s.fp;
    fp.ymm_high[..(end - 160) / 16].fill([0; 16]);
    if op.imm != 0 {
        fp.legacy[160..end].fill(0);
    }
    Ok(())
}
