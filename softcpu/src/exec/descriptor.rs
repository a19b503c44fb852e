//! Descriptor tables, and instructions about selectors.

use super::bits::put;
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::op::Op;
use crate::state;
use crate::state::cr4;

/// LGDT, LIDT; `imm`: 0, 1; operand size in `a`.
pub(crate) fn load_table(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.privileged()?;
    let wide = cpu.mode & 3 == 2;
    let mut bytes = [0; 10];
    let len = if wide { 10 } else { 6 };
    let addr = cpu.operand(op, len, false)?;
    cpu.read_bytes(addr, &mut bytes[..len])?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut raw = [0; 8];
    raw[..len - 2].copy_from_slice(&bytes[2..len]);
    let mut base = u64::from_le_bytes(raw);
    if wide {
        cpu.check_canonical(base).map_err(|_| Exception::GP0)?;
    } else if op.a == 2 {
        base &= 0xff_ffff;
    }
    let table = state::Table { base, limit };
    if op.imm == 0 {
        cpu.s.gdtr = table;
    } else {
        cpu.s.idtr = table;
    }
    Ok(())
}

/// SGDT, SIDT; as `load_table`.
pub(crate) fn store_table(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    cpu.check_umip()?;
    let table = if op.imm == 0 { cpu.s.gdtr } else { cpu.s.idtr };
    let len = if cpu.mode & 3 == 2 { 10 } else { 6 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let addr = cpu.operand(op, len, true)?;
    cpu.write_bytes(addr, &bytes[..len])
}

impl Cpu {
    fn check_umip(&self) -> Fallible<()> {
        if self.s.cr4 & cr4::UMIP != 0 && self.s.cpl > 0 {
            return Err(Exception::GP0);
        }
        Ok(())
    }

    /// Writes a 16-bit system value to register `a` with size `b`, or to memory if `a` is
    /// `Op::NO_REG`.
    fn put_word(&mut self, op: &Op, value: u64) -> Fallible<()> {
        if op.a == Op::NO_REG {
            let addr = self.operand(op, 2, true)?;
            return self.write::<u16>(addr, value as u16);
        }
        put(self, op.a, value, op.b.into());
        Ok(())
    }

    /// Reads a 16-bit value from register `a`, or from memory.
    pub(crate) fn take_word(&mut self, op: &Op) -> Fallible<u16> {
        if op.a == Op::NO_REG {
            let addr = self.operand(op, 2, false)?;
            return self.read::<u16>(addr);
        }
        Ok(self.reg::<u16>(op.a))
    }
}

/// SLDT, STR, SMSW; `imm`: 0, 1, 2.
pub(crate) fn store_word(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if op.imm != 2 && !cpu.s.protected() {
        return Err(Exception::UD);
    }
    cpu.check_umip()?;
    let value = match op.imm {
        0 => cpu.s.ldtr.selector.into(),
        1 => cpu.s.tr.selector.into(),
        _ => cpu.s.cr0,
    };
    cpu.put_word(op, value)
}

/// LLDT, LTR; `imm`: 0, 1.
pub(crate) fn load_system(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if !cpu.s.protected() {
        return Err(Exception::UD);
    }
    cpu.privileged()?;
    let selector = cpu.take_word(op)?;
    if op.imm == 0 {
        cpu.load_ldt(selector)
    } else {
        cpu.load_tr(selector)
    }
}

/// VERR, VERW; `imm`: 0, 1.
pub(crate) fn verify(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if !cpu.s.protected() {
        return Err(Exception::UD);
    }
    let selector = cpu.take_word(op)?;
    let ok = cpu.verify(selector, op.imm != 0)?;
    cpu.s.cc = cpu.s.cc & !0x4000 | u64::from(ok) << 14;
    Ok(())
}

/// LAR, LSL; destination in `imm` (bits 0..8), size in `b`, bit 8: LSL; source `a` or memory.
pub(crate) fn lar_lsl(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if !cpu.s.protected() {
        return Err(Exception::UD);
    }
    let selector = cpu.take_word(op)?;
    let result = if op.imm & 0x100 != 0 {
        cpu.segment_limit(selector)?
    } else {
        cpu.access_rights(selector)?
    };
    cpu.s.cc = cpu.s.cc & !0x4000 | u64::from(result.is_some()) << 14;
    if let Some(value) = result {
        put(cpu, op.imm as u8, value.into(), op.b.into());
    }
    Ok(())
}

/// ARPL; source register in `imm`.
pub(crate) fn arpl(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if !cpu.s.protected() {
        return Err(Exception::UD);
    }
    let source = cpu.reg::<u16>(op.imm as u8);
    let dest = cpu.take_word(op)?;
    let raise = dest & 3 < source & 3;
    if raise {
        cpu.put_word(op, u64::from(dest & !3 | source & 3))?;
    }
    cpu.s.cc = cpu.s.cc & !0x4000 | u64::from(raise) << 14;
    Ok(())
}
