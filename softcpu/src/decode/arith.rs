//! Integer arithmetic and moves.

use iced_x86::{Mnemonic as M, OpKind};

use super::pick::{by_four, by_kind, by_quiet, by_shift};
use super::{Context, Emit, by_ea, sized};
use crate::alu::{kind, scan, shift, unary};
use crate::exec::{arith, atomic, bits, mov, muldiv};
use crate::op::{Handler, Op};

pub(crate) fn decode(c: &Context) -> Option<Emit> {
    let m = c.insn.mnemonic();
    Some(match m {
        M::Add => alu(c, kind::ADD),
        M::Or => alu(c, kind::OR),
        M::Adc => alu(c, kind::ADC),
        M::Sbb => alu(c, kind::SBB),
        M::And => alu(c, kind::AND),
        M::Sub => alu(c, kind::SUB),
        M::Xor => alu(c, kind::XOR),
        M::Cmp => alu(c, kind::CMP),
        M::Test => alu(c, kind::TEST),
        M::Inc => one(c, unary::INC),
        M::Dec => one(c, unary::DEC),
        M::Neg => one(c, unary::NEG),
        M::Not => one(c, unary::NOT),
        M::Rol => shifts(c, shift::ROL),
        M::Ror => shifts(c, shift::ROR),
        M::Rcl => shifts(c, shift::RCL),
        M::Rcr => shifts(c, shift::RCR),
        M::Shl | M::Sal => shifts(c, shift::SHL),
        M::Shr => shifts(c, shift::SHR),
        M::Sar => shifts(c, shift::SAR),
        M::Mov => return moves(c),
        M::Movzx | M::Movsx | M::Movsxd => extend(c, m == M::Movzx),
        M::Lea => lea(c),
        M::Xchg => xchg(c),
        M::Bswap => {
            let op = Op {
                a: c.reg(0),
                ..c.op
            };
            Emit::Next(sized!(c.size(0), T => mov::bswap::<T> as Handler), op)
        }
        M::Cbw => Emit::Next(mov::extend_a::<u16, u8>, c.op),
        M::Cwde => Emit::Next(mov::extend_a::<u32, u16>, c.op),
        M::Cdqe => Emit::Next(mov::extend_a::<u64, u32>, c.op),
        M::Cwd => Emit::Next(mov::extend_d::<u16>, c.op),
        M::Cdq => Emit::Next(mov::extend_d::<u32>, c.op),
        M::Cqo => Emit::Next(mov::extend_d::<u64>, c.op),
        M::Imul if c.insn.op_count() > 1 => imul(c),
        M::Imul => wide(c, muldiv::imul),
        M::Mul => wide(c, muldiv::mul),
        M::Div => wide(c, muldiv::div),
        M::Idiv => wide(c, muldiv::idiv),
        M::Mulx if c.cpu.features.bmi2() => {
            let imm = c.size(0) as u64 | u64::from(c.reg(0)) << 8 | u64::from(c.reg(1)) << 16;
            let op = Op {
                b: c.reg_or_mem(2),
                imm,
                ..c.op
            };
            Emit::Plain(muldiv::mulx, op)
        }
        M::Bt => super::bits::bit(c, 0),
        M::Bts => super::bits::bit(c, 1),
        M::Btr => super::bits::bit(c, 2),
        M::Btc => super::bits::bit(c, 3),
        M::Bsf => super::bits::scans(c, scan::BSF),
        M::Bsr => super::bits::scans(c, scan::BSR),
        M::Tzcnt => super::bits::scans(
            c,
            if c.cpu.features.bmi1() {
                scan::TZCNT
            } else {
                scan::BSF
            },
        ),
        M::Lzcnt => super::bits::scans(
            c,
            if c.cpu.features.lzcnt() {
                scan::LZCNT
            } else {
                scan::BSR
            },
        ),
        M::Popcnt if c.cpu.features.popcnt() => super::bits::scans(c, scan::POPCNT),
        M::Crc32 if c.cpu.features.sse42() && is_x86_feature_detected!("sse4.2") => {
            let op = Op {
                a: c.reg(0),
                b: c.reg_or_mem(1),
                imm: c.size(1) as u64,
                ..c.op
            };
            Emit::Plain(bits::crc32, op)
        }
        M::Shld | M::Shrd => {
            let mut imm = c.size(0) as u64 | u64::from(m == M::Shrd) << 8;
            if c.is_reg(2) {
                imm |= 0x200;
            } else {
                imm |= (c.insn.immediate(2) & 0xff) << 16;
            }
            let op = Op {
                a: c.reg(1),
                b: c.reg_or_mem(0),
                imm,
                ..c.op
            };
            Emit::Plain(bits::double_shift, op)
        }
        M::Xadd => memory_or_reg(c, atomic::xadd, atomic::xadd_rr),
        M::Cmpxchg => memory_or_reg(c, atomic::cmpxchg, atomic::cmpxchg_rr),
        M::Cmpxchg8b if c.cpu.features.cx8() => Emit::Plain(atomic::cmpxchg8b, c.op),
        M::Cmpxchg16b if c.cpu.features.cx16() => Emit::Plain(atomic::cmpxchg16b, c.op),
        M::Movbe if c.cpu.features.movbe() => {
            let to_memory = c.is_mem(0);
            let (a, b) = if to_memory {
                (c.reg(1), 0)
            } else {
                (c.reg(0), Op::NO_REG)
            };
            let imm = c.size(0) as u64 | u64::from(to_memory) << 8;
            Emit::Plain(bits::movbe, Op { a, b, imm, ..c.op })
        }
        _ => return super::bits::conditional(c).or_else(|| super::bits::bmi_ops(c)),
    })
}

fn alu(c: &Context, k: u8) -> Emit {
    let size = c.size(0);
    let by_imm = !c.is_reg(1) && !c.is_mem(1);
    let imm = if by_imm { c.insn.immediate(1) } else { 0 };
    if c.is_mem(0) {
        if c.insn.has_lock_prefix() {
            let from = if by_imm { 0 } else { 0x80 };
            let a = if by_imm { 0 } else { c.reg(1) };
            let op = Op {
                a,
                b: size as u8 | k << 4 | from,
                imm,
                ..c.op
            };
            return Emit::Plain(atomic::lock_alu, op);
        }
        if by_imm {
            let f = sized!(size, T => by_ea!(c.class, E =>
            by_kind!(k, K => arith::mi::<K, T, E> as Handler),
            by_kind!(k, K => arith::mi_slow::<K, T> as Handler)));
            return Emit::Next(f, Op { imm, ..c.op });
        }
        let f = sized!(size, T => by_ea!(c.class, E =>
            by_kind!(k, K => arith::mr::<K, T, E> as Handler),
            by_kind!(k, K => arith::mr_slow::<K, T> as Handler)));
        return Emit::Next(
            f,
            Op {
                a: c.reg(1),
                ..c.op
            },
        );
    }
    let a = c.reg(0);
    if by_imm {
        let f = sized!(size, T => by_kind!(k, K => arith::ri::<K, T> as Handler));
        return Emit::Next(f, Op { a, imm, ..c.op });
    }
    if c.is_mem(1) {
        let f = sized!(size, T => by_ea!(c.class, E =>
            by_kind!(k, K => arith::rm::<K, T, E> as Handler),
            by_kind!(k, K => arith::rm_slow::<K, T> as Handler)));
        return Emit::Next(f, Op { a, ..c.op });
    }
    let b = c.reg(1);
    if a == b && (k == kind::XOR || k == kind::SUB) {
        let f = sized!(size, T => arith::zero::<T> as Handler);
        return Emit::Next(f, Op { a, b, ..c.op });
    }
    let f = sized!(size, T => by_kind!(k, K => arith::rr::<K, T> as Handler));
    Emit::Next(f, Op { a, b, ..c.op })
}

fn one(c: &Context, k: u8) -> Emit {
    let size = c.size(0);
    if !c.is_mem(0) {
        let f = sized!(size, T => by_four!(k, K => arith::unary_r::<K, T> as Handler));
        return Emit::Next(
            f,
            Op {
                a: c.reg(0),
                ..c.op
            },
        );
    }
    if c.insn.has_lock_prefix() {
        return Emit::Plain(
            atomic::lock_unary,
            Op {
                b: size as u8 | k << 4,
                ..c.op
            },
        );
    }
    let f = sized!(size, T => by_ea!(c.class, E =>
        by_four!(k, K => arith::unary_m::<K, T, E> as Handler),
        by_four!(k, K => arith::unary_slow::<K, T> as Handler)));
    Emit::Next(f, c.op)
}

fn shifts(c: &Context, k: u8) -> Emit {
    let size = c.size(0);
    let by_cl = c.is_reg(1);
    let imm = if by_cl { 0 } else { c.insn.immediate(1) & 0xff };
    if c.is_mem(0) {
        let op = Op {
            b: u8::from(by_cl),
            imm,
            ..c.op
        };
        let f = sized!(size, T => by_kind!(k, K => arith::shift_m::<K, T> as Handler));
        return Emit::Next(f, op);
    }
    let count = imm & if size == 8 { 63 } else { 31 };
    if !by_cl && count != 0 && k >= shift::SHL {
        let f = sized!(size, T => by_shift!(k, K => arith::shift_some::<K, T> as Handler));
        let op = Op {
            a: c.reg(0),
            imm: count,
            ..c.op
        };
        return Emit::Next(f, op);
    }
    let op = Op {
        a: c.reg(0),
        imm,
        ..c.op
    };
    let f = if by_cl {
        sized!(size, T => by_kind!(k, K => arith::shift_rc::<K, T> as Handler))
    } else {
        sized!(size, T => by_kind!(k, K => arith::shift_ri::<K, T> as Handler))
    };
    Emit::Next(f, op)
}

fn moves(c: &Context) -> Option<Emit> {
    let segment = |n| c.is_reg(n) && c.insn.op_register(n).is_segment_register();
    let special = |n| {
        let r = c.insn.op_register(n);
        c.is_reg(n) && (r.is_cr() || r.is_dr() || r.is_tr())
    };
    if segment(0) || segment(1) || special(0) || special(1) {
        return None;
    }
    let size = c.size(0);
    if c.is_mem(0) {
        if c.is_reg(1) {
            let f = sized!(size, T => by_ea!(c.class, E => mov::mr::<T, E> as Handler, mov::mr_slow::<T> as Handler));
            return Some(Emit::Next(
                f,
                Op {
                    a: c.reg(1),
                    ..c.op
                },
            ));
        }
        let f = sized!(size, T => by_ea!(c.class, E => mov::mi::<T, E> as Handler, mov::mi_slow::<T> as Handler));
        return Some(Emit::Next(
            f,
            Op {
                imm: c.insn.immediate(1),
                ..c.op
            },
        ));
    }
    let a = c.reg(0);
    Some(match c.insn.op1_kind() {
        OpKind::Register => {
            let f = sized!(size, T => mov::rr::<T> as Handler);
            Emit::Next(
                f,
                Op {
                    a,
                    b: c.reg(1),
                    ..c.op
                },
            )
        }
        OpKind::Memory => {
            let f = sized!(size, T => by_ea!(c.class, E => mov::rm::<T, E> as Handler, mov::rm_slow::<T> as Handler));
            Emit::Next(f, Op { a, ..c.op })
        }
        _ => {
            let f = sized!(size, T => mov::ri::<T> as Handler);
            Emit::Next(
                f,
                Op {
                    a,
                    imm: c.insn.immediate(1),
                    ..c.op
                },
            )
        }
    })
}

fn extend(c: &Context, zero: bool) -> Emit {
    let (to, from) = (c.size(0), c.size(1));
    macro_rules! pick {
        ($d:ty, $s:ty) => {
            match (c.is_mem(1), zero) {
                (false, true) => mov::zx_rr::<$d, $s> as Handler,
                (false, false) => mov::sx_rr::<$d, $s> as Handler,
                (true, true) => by_ea!(c.class, E => mov::zx_rm::<$d, $s, E> as Handler, mov::zx_slow::<$d, $s> as Handler),
                (true, false) => by_ea!(c.class, E => mov::sx_rm::<$d, $s, E> as Handler, mov::sx_slow::<$d, $s> as Handler),
            }
        };
    }
    let f = match (to, from) {
        (2, 1) => pick!(u16, u8),
        (2, _) => pick!(u16, u16),
        (4, 1) => pick!(u32, u8),
        (4, 2) => pick!(u32, u16),
        (4, _) => pick!(u32, u32),
        (_, 1) => pick!(u64, u8),
        (_, 2) => pick!(u64, u16),
        _ => pick!(u64, u32),
    };
    let b = if c.is_mem(1) { 0 } else { c.reg(1) };
    Emit::Next(
        f,
        Op {
            a: c.reg(0),
            b,
            ..c.op
        },
    )
}

fn lea(c: &Context) -> Emit {
    let size = c.size(0);
    let simple = c.op.ea_kind() == Op::EA_64 && c.op.index == Op::NO_REG;
    let f = if simple {
        sized!(size, T => mov::lea_base::<T> as Handler)
    } else {
        sized!(size, T => mov::lea_full::<T> as Handler)
    };
    Emit::Next(
        f,
        Op {
            a: c.reg(0),
            ..c.op
        },
    )
}

fn xchg(c: &Context) -> Emit {
    let size = c.size(0);
    if c.is_mem(0) || c.is_mem(1) {
        let a = c.reg(u32::from(c.is_mem(0)));
        let op = Op {
            a,
            b: size as u8,
            ..c.op
        };
        return Emit::Plain(atomic::xchg, op);
    }
    let f = sized!(size, T => mov::xchg_rr::<T> as Handler);
    Emit::Next(
        f,
        Op {
            a: c.reg(0),
            b: c.reg(1),
            ..c.op
        },
    )
}

fn imul(c: &Context) -> Emit {
    let size = c.size(0);
    let a = c.reg(0);
    if c.insn.op_count() == 3 {
        let op = Op {
            a,
            b: c.reg_or_mem(1),
            imm: c.insn.immediate(2),
            ..c.op
        };
        let f = if c.is_mem(1) {
            sized!(size, T => arith::imul_rmi::<T> as Handler)
        } else {
            sized!(size, T => arith::imul_rri::<T> as Handler)
        };
        return Emit::Next(f, op);
    }
    let op = Op {
        a,
        b: c.reg_or_mem(1),
        ..c.op
    };
    let f = if c.is_mem(1) {
        sized!(size, T => arith::imul_rm::<T> as Handler)
    } else {
        sized!(size, T => arith::imul_rr::<T> as Handler)
    };
    Emit::Next(f, op)
}

fn wide(c: &Context, f: crate::op::Plain) -> Emit {
    let op = Op {
        a: c.size(0) as u8,
        b: c.reg_or_mem(0),
        ..c.op
    };
    Emit::Plain(f, op)
}

fn memory_or_reg(c: &Context, mem: crate::op::Plain, regs: crate::op::Plain) -> Emit {
    let op = Op {
        a: c.reg(1),
        b: c.size(0) as u8,
        ..c.op
    };
    if c.is_mem(0) {
        return Emit::Plain(mem, op);
    }
    Emit::Plain(
        regs,
        Op {
            imm: c.reg(0).into(),
            ..op
        },
    )
}

/// The handler to use instead where nobody will look at the flags, for those instructions
/// that have one.
pub(super) fn quiet(c: &Context) -> Option<Handler> {
    let k = match c.insn.mnemonic() {
        M::Add => kind::ADD,
        M::Or => kind::OR,
        M::And => kind::AND,
        M::Sub => kind::SUB,
        M::Xor => kind::XOR,
        m @ (M::Shl | M::Shr | M::Sar) => {
            let size = c.size(0);
            let mask = if size == 8 { 63 } else { 31 };
            if !c.is_reg(0) || c.is_reg(1) || c.insn.immediate(1) & mask == 0 {
                return None;
            }
            let k = match m {
                M::Shr => shift::SHR,
                M::Sar => shift::SAR,
                _ => shift::SHL,
            };
            let f = sized!(size, T => by_shift!(k, K => arith::quiet_shift::<K, T> as Handler));
            return Some(f);
        }
        m @ (M::Rol | M::Ror) if c.is_reg(0) && !c.is_reg(1) => {
            let size = c.size(0);
            return Some(if m == M::Ror {
                sized!(size, T => arith::quiet_shift::<{ shift::ROR }, T> as Handler)
            } else {
                sized!(size, T => arith::quiet_shift::<{ shift::ROL }, T> as Handler)
            });
        }
        M::Imul if c.insn.op_count() == 2 && c.is_reg(1) => {
            return Some(sized!(c.size(0), T => arith::quiet_imul::<T> as Handler));
        }
        _ => return None,
    };
    if !c.is_reg(0) || c.is_mem(1) {
        return None;
    }
    let size = c.size(0);
    Some(if c.is_reg(1) {
        sized!(size, T => by_quiet!(k, K => arith::quiet_rr::<K, T> as Handler))
    } else {
        sized!(size, T => by_quiet!(k, K => arith::quiet_ri::<K, T> as Handler))
    })
}
