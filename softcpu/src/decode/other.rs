//! Strings, flags, segments, system instructions.

use iced_x86::{Code, Mnemonic as M, OpKind, Register};

use super::{Context, Emit, reg, seg_number};
use crate::exec::string::{self, kind};
use crate::exec::{self, control, descriptor, rare, system};
use crate::op::{Op, Plain};
use crate::state::seg;

pub(crate) fn decode(c: &Context) -> Option<Emit> {
    let m = c.insn.mnemonic();
    let f = &c.cpu.features;
    let imm = |imm: u64| Op { imm, ..c.op };
    Some(match m {
        // Hints that do nothing where they aren't known.
        M::Cldemote | M::Prefetchit0 | M::Prefetchit1 => Emit::Next(exec::nop, c.op),
        M::Nop | M::Endbr32 | M::Endbr64 | M::Reservednop | M::Rdsspd | M::Rdsspq => Emit::Nothing,
        M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2 => Emit::Next(exec::nop, c.op),
        // Loads are in order as it is.
        M::Lfence if f.sse2() => Emit::Next(exec::nop, c.op),
        M::Mfence if f.sse2() => Emit::Next(exec::fence, c.op),
        M::Sfence if f.sse() => Emit::Plain(system::sfence, c.op),
        M::Serialize if f.serialize() => Emit::PlainEnd(system::serialize, c.op),
        M::Pause => Emit::PlainEnd(system::pause, c.op),
        M::Clc => Emit::Plain(rare::flag_op, imm(0)),
        M::Stc => Emit::Plain(rare::flag_op, imm(1)),
        M::Cmc => Emit::Plain(rare::flag_op, imm(2)),
        M::Cld => Emit::Plain(rare::flag_op, imm(3)),
        M::Std => Emit::Plain(rare::flag_op, imm(4)),
        M::Lahf if !c.mode64 || f.lahf64() => Emit::Plain(rare::lahf, c.op),
        M::Sahf if !c.mode64 || f.lahf64() => Emit::Plain(rare::sahf, c.op),
        M::Xlatb => Emit::Plain(rare::xlat, xlat(c)),
        M::Aaa => Emit::Plain(rare::bcd, imm(0)),
        M::Aas => Emit::Plain(rare::bcd, imm(1)),
        M::Daa => Emit::Plain(rare::bcd, imm(2)),
        M::Das => Emit::Plain(rare::bcd, imm(3)),
        M::Aam => Emit::Plain(rare::aam, imm(c.insn.immediate(0) & 0xff)),
        M::Aad => Emit::Plain(rare::aad, imm(c.insn.immediate(0) & 0xff)),
        M::Salc => Emit::Plain(rare::salc, c.op),
        M::Bound => {
            let op = Op {
                a: c.reg(0),
                b: c.size(0) as u8,
                ..c.op
            };
            Emit::Plain(rare::bound, op)
        }
        M::Movnti if f.sse2() => {
            let op = Op {
                a: c.reg(1),
                b: c.size(0) as u8,
                ..c.op
            };
            Emit::Plain(rare::store_reg, op)
        }
        M::Clflush if f.clflush() => Emit::Plain(rare::touch, c.op),
        M::Clflushopt if f.clflushopt() => Emit::Plain(rare::touch, c.op),
        M::Clwb if f.clwb() => Emit::Plain(rare::touch, c.op),
        M::Movsb
        | M::Movsw
        | M::Movsd
        | M::Movsq
        | M::Cmpsb
        | M::Cmpsw
        | M::Cmpsd
        | M::Cmpsq
        | M::Stosb
        | M::Stosw
        | M::Stosd
        | M::Stosq
        | M::Lodsb
        | M::Lodsw
        | M::Lodsd
        | M::Lodsq
        | M::Scasb
        | M::Scasw
        | M::Scasd
        | M::Scasq
        | M::Insb
        | M::Insw
        | M::Insd
        | M::Outsb
        | M::Outsw
        | M::Outsd => return strings(c),
        M::Mov => return special_moves(c),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            let index = match m {
                M::Lds => seg::DS,
                M::Les => seg::ES,
                M::Lfs => seg::FS,
                M::Lgs => seg::GS,
                _ => seg::SS,
            };
            let op = Op {
                a: c.reg(0),
                b: c.size(0) as u8,
                imm: index as u64,
                ..c.op
            };
            Emit::PlainEnd(rare::load_far_pointer, op)
        }
        M::In => Emit::PlainEnd(system::port_in, port(c, 0, 1)),
        M::Out => Emit::PlainEnd(system::port_out, port(c, 1, 0)),
        M::Cli => Emit::Plain(system::cli, c.op),
        M::Sti => Emit::PlainEnd(system::sti, c.op),
        M::Hlt => Emit::PlainEnd(system::hlt, c.op),
        M::Cpuid => Emit::PlainEnd(system::cpuid, c.op),
        M::Rdtsc if f.tsc() => Emit::Plain(system::rdtsc, imm(0)),
        M::Rdtscp if f.rdtscp() => Emit::Plain(system::rdtsc, imm(1)),
        M::Rdpmc => Emit::Plain(system::rdpmc, c.op),
        M::Rdpid if f.rdpid() => Emit::Plain(
            system::rdpid,
            Op {
                a: c.reg(0),
                ..c.op
            },
        ),
        M::Rdmsr if f.msr() => Emit::PlainEnd(system::rdmsr, c.op),
        M::Wrmsr if f.msr() => Emit::PlainEnd(system::wrmsr, c.op),
        M::Swapgs => Emit::Plain(system::swapgs, c.op),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase if f.fsgsbase() => {
            let index = if matches!(m, M::Rdfsbase | M::Wrfsbase) {
                seg::FS
            } else {
                seg::GS
            };
            let write = u64::from(matches!(m, M::Wrfsbase | M::Wrgsbase)) << 8;
            let op = Op {
                a: c.reg(0),
                b: c.size(0) as u8,
                imm: index as u64 | write,
                ..c.op
            };
            Emit::Plain(system::fsgsbase, op)
        }
        M::Lgdt => Emit::Plain(descriptor::load_table, table(c, 0)),
        M::Lidt => Emit::Plain(descriptor::load_table, table(c, 1)),
        M::Sgdt => Emit::Plain(descriptor::store_table, imm(0)),
        M::Sidt => Emit::Plain(descriptor::store_table, imm(1)),
        M::Sldt => Emit::Plain(descriptor::store_word, word(c, 0)),
        M::Str => Emit::Plain(descriptor::store_word, word(c, 1)),
        M::Smsw => Emit::Plain(descriptor::store_word, word(c, 2)),
        M::Lldt => Emit::Plain(descriptor::load_system, word(c, 0)),
        M::Ltr => Emit::Plain(descriptor::load_system, word(c, 1)),
        M::Lmsw => Emit::PlainEnd(control::lmsw, word(c, 0)),
        M::Clts => Emit::Plain(control::clts, c.op),
        M::Verr => Emit::Plain(descriptor::verify, word(c, 0)),
        M::Verw => Emit::Plain(descriptor::verify, word(c, 1)),
        M::Lar | M::Lsl => {
            let a = if c.is_mem(1) { Op::NO_REG } else { c.reg(1) };
            let imm = u64::from(c.reg(0)) | u64::from(m == M::Lsl) << 8;
            Emit::Plain(
                descriptor::lar_lsl,
                Op {
                    a,
                    b: c.size(0) as u8,
                    imm,
                    ..c.op
                },
            )
        }
        M::Arpl => Emit::Plain(
            descriptor::arpl,
            Op {
                b: 2,
                imm: c.reg(1).into(),
                ..word(c, 0)
            },
        ),
        M::Invlpg => Emit::PlainEnd(control::invlpg, c.op),
        M::Invpcid if f.invpcid() => Emit::PlainEnd(
            control::invpcid,
            Op {
                a: c.reg(0),
                ..c.op
            },
        ),
        M::Clzero if f.clzero() => Emit::Plain(rare::clzero, clzero(c)),
        M::Wbinvd | M::Invd => Emit::Plain(system::wbinvd, c.op),
        M::Stac if f.smap() => Emit::Plain(system::set_ac, imm(1)),
        M::Clac if f.smap() => Emit::Plain(system::set_ac, imm(0)),
        M::Xgetbv if f.xsave() => Emit::Plain(control::xgetbv, c.op),
        M::Xsetbv if f.xsave() => Emit::PlainEnd(control::xsetbv, c.op),
        M::Rdrand if f.rdrand() => Emit::Plain(system::random, random(c, 0)),
        M::Rdseed if f.rdseed() => Emit::Plain(system::random, random(c, 1)),
        M::Monitor if f.monitor() => Emit::Plain(system::monitor, c.op),
        M::Mwait if f.monitor() => Emit::PlainEnd(system::mwait, c.op),
        M::Vmcall | M::Vmmcall => Emit::PlainEnd(system::hypercall, c.op),
        _ => return None,
    })
}

fn xlat(c: &Context) -> Op {
    let kind = match (c.insn.op0_kind(), c.insn.memory_base()) {
        (OpKind::Memory, Register::BX) => Op::EA_16,
        (OpKind::Memory, Register::EBX) if c.mode64 => Op::EA_64_32,
        (OpKind::Memory, Register::EBX) => Op::EA_32,
        _ => Op::EA_64,
    };
    let segment = seg_number(c.insn.memory_segment()) as u8;
    Op {
        ea: segment << 2 | kind << 5,
        disp: 0,
        ..c.op
    }
}

/// CLZERO's implied operand: RAX by the address size.
fn clzero(c: &Context) -> Op {
    let kind = match (c.insn.code(), c.mode64) {
        (Code::Clzerow, _) => Op::EA_16,
        (Code::Clzerod, true) => Op::EA_64_32,
        (Code::Clzerod, false) => Op::EA_32,
        _ => Op::EA_64,
    };
    let segment = match c.insn.segment_prefix() {
        Register::None => seg::DS,
        prefix => seg_number(prefix),
    };
    let segment = if c.mode64 && segment < seg::FS {
        seg::DS
    } else {
        segment
    };
    Op {
        base: reg(Register::RAX),
        ea: (segment as u8) << 2 | kind << 5,
        ..c.op
    }
}

fn strings(c: &Context) -> Option<Emit> {
    let (kind, size) = match c.insn.mnemonic() {
        M::Movsb => (kind::MOVS, 1),
        M::Movsw => (kind::MOVS, 2),
        M::Movsd => (kind::MOVS, 4),
        M::Movsq => (kind::MOVS, 8),
        M::Cmpsb => (kind::CMPS, 1),
        M::Cmpsw => (kind::CMPS, 2),
        M::Cmpsd => (kind::CMPS, 4),
        M::Cmpsq => (kind::CMPS, 8),
        M::Stosb => (kind::STOS, 1),
        M::Stosw => (kind::STOS, 2),
        M::Stosd => (kind::STOS, 4),
        M::Stosq => (kind::STOS, 8),
        M::Lodsb => (kind::LODS, 1),
        M::Lodsw => (kind::LODS, 2),
        M::Lodsd => (kind::LODS, 4),
        M::Lodsq => (kind::LODS, 8),
        M::Scasb => (kind::SCAS, 1),
        M::Scasw => (kind::SCAS, 2),
        M::Scasd => (kind::SCAS, 4),
        M::Scasq => (kind::SCAS, 8),
        M::Insb => (kind::INS, 1),
        M::Insw => (kind::INS, 2),
        M::Insd => (kind::INS, 4),
        M::Outsb => (kind::OUTS, 1),
        M::Outsw => (kind::OUTS, 2),
        _ => (kind::OUTS, 4),
    };
    let mut addr_size = None;
    for n in 0..c.insn.op_count() {
        addr_size = match c.insn.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
            _ => addr_size,
        };
    }
    // MOVSD and CMPSD are SSE2 instructions as well: those have no such operand.
    let addr_size = addr_size?;
    let rep = if c.insn.has_repne_prefix() {
        2
    } else {
        u8::from(c.insn.has_rep_prefix())
    };
    let ea = (seg_number(c.insn.memory_segment()) as u8) << 2;
    let op = Op {
        ea,
        imm: string::pack(kind, size, rep, addr_size),
        ..c.op
    };
    Some(if rep == 0 {
        if matches!(kind, kind::INS | kind::OUTS) {
            Emit::PlainEnd(string::single, op)
        } else {
            Emit::Plain(string::single, op)
        }
    } else {
        Emit::PlainEnd(string::repeat, op)
    })
}

/// MOV with segment, control and debug registers.
fn special_moves(c: &Context) -> Option<Emit> {
    let mov = |r: Register, system: Register, from: Plain, to: Plain, first: Register| {
        let number = system as u64 - first as u64;
        let op = Op {
            a: reg(r),
            b: r.size() as u8,
            imm: number,
            ..c.op
        };
        if c.insn.op0_register() == r {
            Emit::Plain(from, op)
        } else {
            Emit::PlainEnd(to, op)
        }
    };
    if c.is_reg(0) && c.is_reg(1) {
        let (a, b) = (c.insn.op0_register(), c.insn.op1_register());
        for (r, system) in [(a, b), (b, a)] {
            if system.is_cr() {
                let (from, to) = (control::mov_from_cr, control::mov_to_cr);
                return Some(mov(r, system, from, to, Register::CR0));
            }
            if system.is_dr() {
                let (from, to) = (control::mov_from_dr, control::mov_to_dr);
                return Some(mov(r, system, from, to, Register::DR0));
            }
        }
    }
    if c.is_reg(0) && c.insn.op0_register().is_segment_register() {
        let index = seg_number(c.insn.op0_register());
        let op = Op {
            b: c.reg_or_mem(1),
            imm: index as u64,
            ..c.op
        };
        return Some(Emit::PlainEnd(rare::mov_to_seg, op));
    }
    if c.is_reg(1) && c.insn.op1_register().is_segment_register() {
        let (a, b) = if c.is_mem(0) {
            (Op::NO_REG, 2)
        } else {
            (c.reg(0), c.size(0) as u8)
        };
        let imm = seg_number(c.insn.op1_register()) as u64;
        return Some(Emit::Plain(rare::mov_from_seg, Op { a, b, imm, ..c.op }));
    }
    None
}

fn port(c: &Context, accumulator: u32, number: u32) -> Op {
    let imm = if c.is_reg(number) {
        0x1_0000
    } else {
        c.insn.immediate(number) & 0xff
    };
    Op {
        b: c.size(accumulator) as u8,
        imm,
        ..c.op
    }
}

fn table(c: &Context, which: u64) -> Op {
    let a = if matches!(c.insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        2
    } else {
        4
    };
    Op {
        a,
        imm: which,
        ..c.op
    }
}

fn word(c: &Context, which: u64) -> Op {
    let (a, b) = if c.is_mem(0) {
        (Op::NO_REG, 2)
    } else {
        (c.reg(0), c.size(0) as u8)
    };
    Op {
        a,
        b,
        imm: which,
        ..c.op
    }
}

fn random(c: &Context, which: u64) -> Op {
    Op {
        a: c.reg(0),
        b: c.size(0) as u8,
        imm: which,
        ..c.op
    }
}
