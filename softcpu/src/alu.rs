//! Arithmetic with its status flags, done by the host's own instructions.
//!
//! Flags travel as LAHF and SETO leave them in AX (`CpuState::cc`), so one operation and its
//! exact flags, undefined ones included, are three or four host instructions.

use std::arch::asm;

use crate::mmu::Word;

/// Operations of the classic eight and TEST, by their number in opcodes.
pub(crate) mod kind {
    pub const ADD: u8 = 0;
    pub const OR: u8 = 1;
    pub const ADC: u8 = 2;
    pub const SBB: u8 = 3;
    pub const AND: u8 = 4;
    pub const SUB: u8 = 5;
    pub const XOR: u8 = 6;
    pub const CMP: u8 = 7;
    pub const TEST: u8 = 8;
}

/// Shifts and rotates, by their number in opcodes.
pub(crate) mod shift {
    pub const ROL: u8 = 0;
    pub const ROR: u8 = 1;
    pub const RCL: u8 = 2;
    pub const RCR: u8 = 3;
    pub const SHL: u8 = 4;
    pub const SHR: u8 = 5;
    pub const SAR: u8 = 7;
}

/// One-operand operations.
pub(crate) mod unary {
    pub const INC: u8 = 0;
    pub const DEC: u8 = 1;
    pub const NEG: u8 = 2;
    pub const NOT: u8 = 3;
}

/// Bit scans and counts.
pub(crate) mod scan {
    pub const BSF: u8 = 0;
    pub const BSR: u8 = 1;
    pub const TZCNT: u8 = 2;
    pub const LZCNT: u8 = 3;
    pub const POPCNT: u8 = 4;
}

/// Words with arithmetic. All functions return the result and the new `cc`.
pub(crate) trait Alu: Word {
    fn alu<const K: u8>(cc: u64, a: Self, b: Self) -> (Self, u64);
    fn shift<const K: u8>(cc: u64, a: Self, count: u8) -> (Self, u64);
    /// SHL, SHR, SAR by a masked count that is not 0: all flags are new.
    fn shift_some<const K: u8>(a: Self, count: u8) -> (Self, u64);
    /// ADD, OR, AND, SUB, XOR without flags.
    fn quiet<const K: u8>(a: Self, b: Self) -> Self;
    /// SHL, SHR, SAR by a masked count that is not 0, ROL and ROR by any, without flags.
    fn quiet_shift<const K: u8>(a: Self, count: u8) -> Self;
    /// IMUL without flags.
    fn quiet_imul(a: Self, b: Self) -> Self;
    fn unary<const K: u8>(cc: u64, a: Self) -> (Self, u64);
    fn imul2(cc: u64, a: Self, b: Self) -> (Self, u64);
}

macro_rules! host {
    // New flags only.
    ($op:literal, $a:ident, $b:ident, $class:ident, $m:literal) => {{
        let f: u16;
        let mut r = $a;
        // SAFETY: register arithmetic only.
        unsafe {
            asm!(
                concat!($op, " {a", $m, "}, {b", $m, "}"),
                "lahf",
                "seto al",
                a = inout($class) r,
                b = in($class) $b,
                out("ax") f,
                options(pure, nomem, nostack)
            );
        }
        (r, u64::from(f))
    }};
}

macro_rules! host_carry {
    ($op:literal, $cc:ident, $a:ident, $b:ident, $class:ident, $m:literal) => {{
        let mut f = $cc as u16;
        let mut r = $a;
        // SAFETY: register arithmetic only.
        unsafe {
            asm!(
                "sahf",
                concat!($op, " {a", $m, "}, {b", $m, "}"),
                "lahf",
                "seto al",
                a = inout($class) r,
                b = in($class) $b,
                inout("ax") f,
                options(pure, nomem, nostack)
            );
        }
        (r, u64::from(f))
    }};
}

macro_rules! host_shift {
    ($op:literal, $cc:ident, $a:ident, $count:ident, $class:ident, $m:literal) => {{
        let mut f = $cc as u16;
        let mut r = $a;
        // SAFETY: register arithmetic only.
        unsafe {
            asm!(
                "add al, 0x7f",
                "sahf",
                concat!($op, " {a", $m, "}, cl"),
                "lahf",
                "seto al",
                a = inout($class) r,
                in("cl") $count,
                inout("ax") f,
                options(pure, nomem, nostack)
            );
        }
        (r, u64::from(f))
    }};
}

macro_rules! host_shift_some {
    ($op:literal, $a:ident, $count:ident, $class:ident, $m:literal) => {{
        let f: u16;
        let mut r = $a;
        // SAFETY: register arithmetic only.
        unsafe {
            asm!(
                concat!($op, " {a", $m, "}, cl"),
                "lahf",
                "seto al",
                a = inout($class) r,
                in("cl") $count,
                out("ax") f,
                options(pure, nomem, nostack)
            );
        }
        (r, u64::from(f))
    }};
}

macro_rules! host_unary {
    ($op:literal, $cc:ident, $a:ident, $class:ident, $m:literal) => {{
        let mut f = $cc as u16;
        let mut r = $a;
        // SAFETY: register arithmetic only.
        unsafe {
            asm!(
                "add al, 0x7f",
                "sahf",
                concat!($op, " {a", $m, "}"),
                "lahf",
                "seto al",
                a = inout($class) r,
                inout("ax") f,
                options(pure, nomem, nostack)
            );
        }
        (r, u64::from(f))
    }};
}

macro_rules! words {
    ($($t:ty, $class:ident, $m:literal, $imul:expr;)*) => {$(
        impl Alu for $t {
            #[inline(always)]
            fn alu<const K: u8>(cc: u64, a: Self, b: Self) -> (Self, u64) {
                match K {
                    kind::ADD => host!("add", a, b, $class, $m),
                    kind::OR => host!("or", a, b, $class, $m),
                    kind::ADC => host_carry!("adc", cc, a, b, $class, $m),
                    kind::SBB => host_carry!("sbb", cc, a, b, $class, $m),
                    kind::AND => host!("and", a, b, $class, $m),
                    kind::SUB => host!("sub", a, b, $class, $m),
                    kind::XOR => host!("xor", a, b, $class, $m),
                    kind::CMP => host!("cmp", a, b, $class, $m),
                    _ => host!("test", a, b, $class, $m),
                }
            }

            #[inline(always)]
            fn shift<const K: u8>(cc: u64, a: Self, count: u8) -> (Self, u64) {
                match K {
                    shift::ROL => host_shift!("rol", cc, a, count, $class, $m),
                    shift::ROR => host_shift!("ror", cc, a, count, $class, $m),
                    shift::RCL => host_shift!("rcl", cc, a, count, $class, $m),
                    shift::RCR => host_shift!("rcr", cc, a, count, $class, $m),
                    shift::SHR => host_shift!("shr", cc, a, count, $class, $m),
                    shift::SAR => host_shift!("sar", cc, a, count, $class, $m),
                    _ => host_shift!("shl", cc, a, count, $class, $m),
                }
            }

            #[inline(always)]
            fn shift_some<const K: u8>(a: Self, count: u8) -> (Self, u64) {
                match K {
                    shift::SHR => host_shift_some!("shr", a, count, $class, $m),
                    shift::SAR => host_shift_some!("sar", a, count, $class, $m),
                    _ => host_shift_some!("shl", a, count, $class, $m),
                }
            }

            #[inline(always)]
            fn quiet<const K: u8>(a: Self, b: Self) -> Self {
                match K {
                    kind::ADD => a.wrapping_add(b),
                    kind::OR => a | b,
                    kind::AND => a & b,
                    kind::SUB => a.wrapping_sub(b),
                    _ => a ^ b,
                }
            }

            #[inline(always)]
            fn quiet_shift<const K: u8>(a: Self, count: u8) -> Self {
                // Counts may exceed the size of 8 and 16-bit operands.
                let count = u32::from(count);
                match K {
                    shift::SHR => Self::cut(a.wide().checked_shr(count).unwrap_or(0)),
                    shift::SAR => Self::cut((a.sign() >> count.min(63)) as u64),
                    shift::ROL => a.rotate_left(count),
                    shift::ROR => a.rotate_right(count),
                    _ => Self::cut(a.wide().checked_shl(count).unwrap_or(0)),
                }
            }

            #[inline(always)]
            fn quiet_imul(a: Self, b: Self) -> Self {
                a.wrapping_mul(b)
            }

            #[inline(always)]
            fn unary<const K: u8>(cc: u64, a: Self) -> (Self, u64) {
                match K {
                    unary::INC => host_unary!("inc", cc, a, $class, $m),
                    unary::DEC => host_unary!("dec", cc, a, $class, $m),
                    unary::NEG => host_unary!("neg", cc, a, $class, $m),
                    _ => (Self::cut(!a.wide()), cc),
                }
            }

            #[inline(always)]
            fn imul2(cc: u64, a: Self, b: Self) -> (Self, u64) {
                let _ = cc;
                $imul(a, b)
            }
        }
    )*};
}

words! {
    u8, reg_byte, "", |a: u8, b: u8| (a.wrapping_mul(b), 0x200);
    u16, reg, ":x", |a: u16, b: u16| host!("imul", a, b, reg, ":x");
    u32, reg, ":e", |a: u32, b: u32| host!("imul", a, b, reg, ":e");
    u64, reg, ":r", |a: u64, b: u64| host!("imul", a, b, reg, ":r");
}

/// Condition codes, by their number in opcodes, on a `cc`.
#[inline(always)]
pub(crate) fn condition<const C: u8>(cc: u64) -> bool {
    let holds = match C >> 1 {
        0 => cc & 1 != 0,
        1 => cc & 0x100 != 0,
        2 => cc & 0x4000 != 0,
        3 => cc & 0x4100 != 0,
        4 => cc & 0x8000 != 0,
        5 => cc & 0x400 != 0,
        6 => (cc >> 15 ^ cc) & 1 != 0,
        _ => cc & 0x4000 != 0 || (cc >> 15 ^ cc) & 1 != 0,
    };
    holds != (C & 1 != 0)
}

/// `condition` with the code known at run time only.
pub(crate) fn condition_dyn(code: u8, cc: u64) -> bool {
    let even = match code >> 1 & 7 {
        0 => condition::<0>(cc),
        1 => condition::<2>(cc),
        2 => condition::<4>(cc),
        3 => condition::<6>(cc),
        4 => condition::<8>(cc),
        5 => condition::<10>(cc),
        6 => condition::<12>(cc),
        _ => condition::<14>(cc),
    };
    even != (code & 1 != 0)
}
