//! Bit tests and scans, BMI, conditional moves and sets.

use iced_x86::{Mnemonic as M, OpKind};

use super::pick::{by_condition, by_four, by_kind};
use super::{Context, Emit, sized};
use crate::exec::{arith, bits, bits::bmi};
use crate::op::{Handler, Op};

pub(super) fn bit(c: &Context, k: u8) -> Emit {
    let size = c.size(0);
    let by_reg = c.is_reg(1);
    let imm = if by_reg {
        0
    } else {
        c.insn.immediate(1) & 0xff
    };
    if !c.is_mem(0) {
        let op = Op {
            a: c.reg(0),
            b: if by_reg { c.reg(1) } else { 0 },
            imm,
            ..c.op
        };
        let f = if by_reg {
            sized!(size, T => by_four!(k, K => bits::bt_rr::<K, T> as Handler))
        } else {
            sized!(size, T => by_four!(k, K => bits::bt_ri::<K, T> as Handler))
        };
        return Emit::Next(f, op);
    }
    let locked = u64::from(c.insn.has_lock_prefix()) << 2;
    let op = Op {
        a: if by_reg { c.reg(1) } else { 0 },
        b: size as u8,
        imm: u64::from(k) | locked | u64::from(by_reg) << 3 | imm << 16,
        ..c.op
    };
    Emit::Plain(bits::bt_memory, op)
}

pub(super) fn scans(c: &Context, k: u8) -> Emit {
    let size = c.size(0);
    if c.is_reg(1) && size >= 4 {
        let op = Op {
            a: c.reg(0),
            b: c.reg(1),
            ..c.op
        };
        let f = if size == 4 {
            by_kind!(k, K => bits::scan_rr::<K, u32> as Handler)
        } else {
            by_kind!(k, K => bits::scan_rr::<K, u64> as Handler)
        };
        return Emit::Next(f, op);
    }
    let op = Op {
        a: c.reg(0),
        b: c.reg_or_mem(1),
        imm: u64::from(k) | (size as u64) << 8,
        ..c.op
    };
    Emit::Plain(bits::scan_op, op)
}

pub(super) fn conditional(c: &Context) -> Option<Emit> {
    let condition = condition_number(c)?;
    if matches!(
        c.insn.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    ) {
        // Jcc, LOOPE and LOOPNE.
        return None;
    }
    let size = c.size(0);
    if c.insn.op_count() == 1 {
        return Some(if c.is_mem(0) {
            let f = by_condition!(condition, C => bits::set_m::<C> as Handler);
            Emit::Next(f, c.op)
        } else {
            let f = by_condition!(condition, C => arith::set_r::<C> as Handler);
            Emit::Next(
                f,
                Op {
                    a: c.reg(0),
                    ..c.op
                },
            )
        });
    }
    if !c.cpu.features.cmov() {
        return None;
    }
    macro_rules! pick {
        ($t:ty) => {
            if c.is_mem(1) {
                by_condition!(condition, C => arith::cmov_rm::<C, $t> as Handler)
            } else {
                by_condition!(condition, C => arith::cmov_rr::<C, $t> as Handler)
            }
        };
    }
    let f = match size {
        2 => pick!(u16),
        4 => pick!(u32),
        _ => pick!(u64),
    };
    Some(Emit::Next(
        f,
        Op {
            a: c.reg(0),
            b: c.reg_or_mem(1),
            ..c.op
        },
    ))
}

/// The condition's number in opcodes, of Jcc, SETcc, CMOVcc.
pub(crate) fn condition_number(c: &Context) -> Option<u8> {
    use iced_x86::ConditionCode as C;
    Some(match c.insn.condition_code() {
        C::None => return None,
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    })
}

pub(super) fn bmi_ops(c: &Context) -> Option<Emit> {
    let f = &c.cpu.features;
    let (kind, offered, source, extra) = match c.insn.mnemonic() {
        M::Andn => (bmi::ANDN, f.bmi1(), 2, Some(1)),
        M::Blsi => (bmi::BLSI, f.bmi1(), 1, None),
        M::Blsmsk => (bmi::BLSMSK, f.bmi1(), 1, None),
        M::Blsr => (bmi::BLSR, f.bmi1(), 1, None),
        M::Bextr => (bmi::BEXTR, f.bmi1(), 1, Some(2)),
        M::Bzhi => (bmi::BZHI, f.bmi2(), 1, Some(2)),
        M::Pdep => (bmi::PDEP, f.bmi2(), 2, Some(1)),
        M::Pext => (bmi::PEXT, f.bmi2(), 2, Some(1)),
        M::Rorx => (bmi::RORX, f.bmi2(), 1, None),
        M::Sarx => (bmi::SARX, f.bmi2(), 1, Some(2)),
        M::Shlx => (bmi::SHLX, f.bmi2(), 1, Some(2)),
        M::Shrx => (bmi::SHRX, f.bmi2(), 1, Some(2)),
        M::Adcx => (bmi::ADCX, f.adx(), 1, None),
        M::Adox => (bmi::ADOX, f.adx(), 1, None),
        _ => return None,
    };
    if !offered {
        return None;
    }
    let size = c.size(0);
    let extra = match extra {
        Some(n) => u64::from(c.reg(n)),
        None if kind == bmi::RORX => c.insn.immediate(2) & 0xff,
        None => 0,
    };
    // BLS* name their destination through VEX.vvvv, which is operand 0 here as well.
    let op = Op {
        a: c.reg(0),
        b: c.reg_or_mem(source),
        imm: u64::from(kind) | (size as u64) << 8 | extra << 16,
        ..c.op
    };
    Some(Emit::Plain(bits::bmi_op, op))
}
