//! Handlers for the common case of an instruction that runs by a thunk: the unit is enabled,
//! nothing is pending, all exceptions are masked, and the operand can be reached directly.
//! Everything else goes through `execute::kept`.

use super::execute::{
    FLAGS, MASKS, call, call_quick, control, kept, set_data_pointer, set_instruction_pointer,
};
use super::thunk::{Desc, Unit};
use crate::cpu::Cpu;
use crate::exec::{self, Ea, attempt};
use crate::op::{Handler, Op};
use crate::state::{cr0, cr4, rflags};

/// Kinds of memory operand.
const NONE: u8 = 0;
const READ: u8 = 1;
const WRITE: u8 = 2;

/// Handlers in the core's form.
#[derive(Debug, Clone, Copy)]
pub enum Fast {
    /// Without memory operand.
    Registers(Handler),
    /// With one, by the way its address is computed.
    Memory {
        /// For `exec::Base`.
        base: Handler,
        /// For `exec::Full`.
        full: Handler,
    },
}

/// The handlers for `desc`, if there are any.
pub(super) fn handlers(desc: &Desc) -> Option<Fast> {
    macro_rules! by_memory {
        ($unit:ident, $mx:literal, $flags:literal) => {{
            const U: u8 = Unit::$unit as u8;
            match (desc.len, desc.writes) {
                (0, _) => Fast::Registers(fast::<U, NONE, $mx, $flags, exec::Base>),
                (_, false) => Fast::Memory {
                    base: fast::<U, READ, $mx, $flags, exec::Base>,
                    full: fast::<U, READ, $mx, $flags, exec::Full>,
                },
                (_, true) => Fast::Memory {
                    base: fast::<U, WRITE, $mx, $flags, exec::Base>,
                    full: fast::<U, WRITE, $mx, $flags, exec::Full>,
                },
            }
        }};
    }
    if desc.two_stage || desc.no_wait || desc.control {
        return None;
    }
    Some(match (desc.unit, desc.mxcsr, desc.flags) {
        (Unit::Sse, false, false) => by_memory!(Sse, false, false),
        (Unit::Sse, false, true) => by_memory!(Sse, false, true),
        (Unit::Sse, true, false) => by_memory!(Sse, true, false),
        (Unit::Sse, true, true) => by_memory!(Sse, true, true),
        (Unit::Avx, false, false) => by_memory!(Avx, false, false),
        (Unit::Avx, false, true) => by_memory!(Avx, false, true),
        (Unit::Avx, true, false) => by_memory!(Avx, true, false),
        (Unit::Avx, true, true) => by_memory!(Avx, true, true),
        (Unit::X87, false, false) => by_memory!(X87, false, false),
        (Unit::X87, false, true) => by_memory!(X87, false, true),
        (Unit::Mmx, false, false) => by_memory!(Mmx, false, false),
        _ => return None,
    })
}

/// Whether an instruction of the unit may run now without further ado.
#[inline(always)]
fn ready<const UNIT: u8>(cpu: &Cpu) -> bool {
    const SSE: u8 = Unit::Sse as u8;
    const AVX: u8 = Unit::Avx as u8;
    let off = cpu.s.cr0 & (cr0::EM | cr0::TS);
    match UNIT {
        SSE => off == 0 && cpu.s.cr4 & cr4::OSFXSR != 0,
        AVX => {
            off & cr0::TS == 0
                && cpu.s.cr4 & cr4::OSXSAVE != 0
                && cpu.s.xcr0 & 6 == 6
                && cpu.s.protected()
        }
        // A live x87 unit has nothing pending.
        _ => off == 0 && cpu.s.cr4 & cr4::OSFXSR != 0 && cpu.fp_runtime.is_live(),
    }
}

/// Runs the instruction that `op` stands for.
///
/// # Safety
/// As `op::Handler`; `op.imm` is the address of a leaked `Desc` of this unit, kind of memory
/// operand and use of MXCSR and flags.
unsafe fn fast<const UNIT: u8, const MEM: u8, const MX: bool, const STATUS: bool, E: Ea>(
    cpu: &mut Cpu,
    op: *const Op,
) {
    const X87: u8 = Unit::X87 as u8;
    // SAFETY: the caller's promise.
    let (o, desc) = unsafe { (&*op, &*((*op).imm as usize as *const Desc)) };
    if !ready::<UNIT>(cpu) {
        return slow(cpu, op);
    }
    let mut mem = std::ptr::null_mut();
    let mut addr = 0;
    if MEM != NONE {
        addr = E::addr(cpu, op);
        if addr & u64::from(desc.align) != 0 {
            return slow(cpu, op);
        }
        match cpu.host_ptr(addr, usize::from(desc.len), MEM == WRITE) {
            Some(p) => mem = p,
            None => return slow(cpu, op),
        }
    }
    if STATUS {
        cpu.fp_runtime.flags = cpu.s.rflags() & rflags::STATUS | 2;
    }
    let mxcsr = cpu.s.fp.mxcsr();
    if MX && mxcsr & !FLAGS == MASKS {
        call_quick(cpu, o, desc, mem);
    } else if MX {
        if mxcsr & MASKS != MASKS {
            return slow(cpu, op);
        }
        cpu.sync_mxcsr();
        cpu.fp_runtime.run_mxcsr = control(mxcsr);
        cpu.fp_runtime.unmasked = 0;
        call(cpu, o, desc, mem);
    } else {
        call(cpu, o, desc, mem);
    }
    if STATUS {
        cpu.s.set_status(cpu.fp_runtime.flags);
    }
    if UNIT == X87 {
        let rip = cpu.s.block_rip.wrapping_add(u64::from(o.off));
        set_instruction_pointer(cpu, rip, desc);
        if MEM != NONE {
            set_data_pointer(cpu, o, addr.wrapping_sub(cpu.s.ea_base[o.seg()]));
        }
        if cpu.fp_runtime.fsw & 0x80 != 0 {
            cpu.sync_fp();
        }
    }
    // SAFETY: the caller's promise; this kind of operation falls through.
    unsafe { exec::next(cpu, op) }
}

/// The same with all checks.
#[cold]
#[inline(never)]
fn slow(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: `op` is the running operation.
    let o = unsafe { &*op };
    cpu.s.rip = cpu
        .s
        .block_rip
        .wrapping_add(u64::from(o.off) + u64::from(o.len));
    attempt!(cpu, op, kept(cpu, o));
    // SAFETY: it falls through.
    unsafe { exec::next_after_device(cpu, op) }
}
