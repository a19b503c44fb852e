//! Instructions whose memory accesses depend on a mask: MASKMOVQ, MASKMOVDQU, VMASKMOV,
//! VPMASKMOV and the gathers.

use iced_x86::{CodeSize, Instruction, Mnemonic, OpKind, Register};

use super::FpOp;
use super::execute::{check_avx, check_pending, check_sse};
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::op::{Op, Plain};
use crate::state::{FpState, cr0, gpr, seg};

/// Largest vector in bytes.
const MAX: usize = 32;

/// Operands of a masked access, packed into `Op::imm`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Masked {
    /// Register loaded or stored; a gather's destination.
    data: u8,
    mask: u8,
    /// Gather: vector of indices.
    index: u8,
    /// Bytes of an element.
    size: u8,
    /// Number of elements.
    count: u8,
    /// Gather: bytes of an index.
    index_size: u8,
    /// VEX-encoded.
    vex: bool,
    /// MASKMOV's implied operand, as in `Op::ea`.
    ea: u8,
}

impl Masked {
    fn pack(self) -> u64 {
        u64::from_le_bytes([
            self.data,
            self.mask,
            self.index,
            self.size,
            self.count,
            self.index_size,
            self.vex.into(),
            self.ea,
        ])
    }

    fn of(op: &Op) -> Self {
        let [data, mask, index, size, count, index_size, vex, ea] = op.imm.to_le_bytes();
        Self {
            data,
            mask,
            index,
            size,
            count,
            index_size,
            vex: vex != 0,
            ea,
        }
    }

    fn len(self) -> usize {
        usize::from(self.size) * usize::from(self.count)
    }
}

/// Recognises them.
pub(super) fn decode(insn: &Instruction) -> Option<FpOp> {
    use Mnemonic as M;
    let number = |i: u32| insn.op_register(i).number() as u8;
    let bytes = |r: Register| r.size() as u8;
    let (handler, masked): (Plain, Masked) = match insn.mnemonic() {
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {
            let mmx = insn.mnemonic() == M::Maskmovq;
            let wide = insn.code_size() == CodeSize::Code64;
            let kind = match insn.op0_kind() {
                OpKind::MemorySegRDI => Op::EA_64,
                OpKind::MemorySegEDI if wide => Op::EA_64_32,
                OpKind::MemorySegEDI => Op::EA_32,
                _ => Op::EA_16,
            };
            let segment = match insn.memory_segment() {
                Register::ES => seg::ES,
                Register::CS => seg::CS,
                Register::SS => seg::SS,
                Register::FS => seg::FS,
                Register::GS => seg::GS,
                _ => seg::DS,
            };
            let masked = Masked {
                data: number(1),
                mask: number(2),
                size: 1,
                count: if mmx { 8 } else { 16 },
                vex: insn.mnemonic() == M::Vmaskmovdqu,
                ea: kind << 5 | (segment as u8) << 2,
                ..Masked::default()
            };
            (if mmx { maskmovq } else { maskmovdqu }, masked)
        }
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
            let size = match insn.mnemonic() {
                M::Vmaskmovps | M::Vpmaskmovd => 4,
                _ => 8,
            };
            let store = insn.op0_kind() == OpKind::Memory;
            let masked = Masked {
                data: number(if store { 2 } else { 0 }),
                mask: number(1),
                size,
                count: bytes(insn.op_register(1)) / size,
                vex: true,
                ..Masked::default()
            };
            (if store { masked_store } else { masked_load }, masked)
        }
        M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd
        | M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq => {
            let (index_size, size) = match insn.mnemonic() {
                M::Vgatherdps | M::Vpgatherdd => (4, 4),
                M::Vgatherdpd | M::Vpgatherdq => (4, 8),
                M::Vgatherqps | M::Vpgatherqd => (8, 4),
                _ => (8, 8),
            };
            let masked = Masked {
                data: number(0),
                mask: number(2),
                index: insn.memory_index().number() as u8,
                size,
                count: (bytes(insn.memory_index()) / index_size)
                    .min(bytes(insn.op_register(0)) / size),
                index_size,
                vex: true,
                ..Masked::default()
            };
            (gather, masked)
        }
        _ => return None,
    };
    Some(FpOp {
        handler,
        fast: None,
        a: 0,
        b: 0,
        data: masked.pack(),
    })
}

fn vector(fp: &FpState, n: u8) -> [u8; MAX] {
    let n = usize::from(n & 15);
    let mut value = [0; MAX];
    value[..16].copy_from_slice(&fp.legacy[160 + 16 * n..][..16]);
    value[16..].copy_from_slice(&fp.ymm_high[n]);
    value
}

fn set_vector(fp: &mut FpState, n: u8, value: &[u8; MAX]) {
    let n = usize::from(n & 15);
    fp.legacy[160 + 16 * n..][..16].copy_from_slice(&value[..16]);
    fp.ymm_high[n].copy_from_slice(&value[16..]);
}

/// The memory operand without index, `distance` bytes further on.
fn moved(op: &Op, distance: i64) -> Op {
    Op {
        disp: op.disp.wrapping_add(distance),
        ..*op
    }
}

/// Whether element `i` of `size` bytes is selected: its top bit.
fn selected(mask: &[u8; MAX], i: usize, size: usize) -> bool {
    mask[i * size + size - 1] & 0x80 != 0
}

/// VMASKMOV and VPMASKMOV from memory.
fn masked_load(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_avx(cpu)?;
    let m = Masked::of(op);
    let size = usize::from(m.size);
    let mask = vector(&cpu.s.fp, m.mask);
    let mut value = [0; MAX];
    for i in (0..usize::from(m.count)).filter(|&i| selected(&mask, i, size)) {
        let addr = cpu.operand(&moved(op, (i * size) as i64), size, false)?;
        let element = &mut value[i * size..][..size];
        if size == 4 {
            element.copy_from_slice(&cpu.read_u32(addr)?.to_le_bytes());
        } else {
            element.copy_from_slice(&cpu.read_u64(addr)?.to_le_bytes());
        }
    }
    set_vector(&mut cpu.s.fp, m.data, &value);
    Ok(())
}

/// VMASKMOV and VPMASKMOV to memory.
fn masked_store(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_avx(cpu)?;
    let m = Masked::of(op);
    let (mask, data) = (vector(&cpu.s.fp, m.mask), vector(&cpu.s.fp, m.data));
    store(cpu, op, m, &mask, &data)
}

/// Stores the selected elements, all or none.
fn store(cpu: &mut Cpu, op: &Op, m: Masked, mask: &[u8; MAX], data: &[u8; MAX]) -> Fallible<()> {
    let size = usize::from(m.size);
    let mut targets = [None; MAX];
    for i in (0..usize::from(m.count)).filter(|&i| selected(mask, i, size)) {
        let addr = cpu.operand(&moved(op, (i * size) as i64), size, true)?;
        if cpu.host_ptr(addr, size, true).is_none() {
            cpu.check_write(addr, size)?;
        }
        targets[i] = Some(addr);
    }
    for (i, addr) in targets.into_iter().enumerate() {
        if let Some(addr) = addr {
            cpu.write_bytes(addr, &data[i * size..][..size])?;
        }
    }
    Ok(())
}

/// MASKMOV's implied operand at DS:[rDI].
fn at_rdi(op: &Op, m: Masked) -> Op {
    Op {
        base: (gpr::RDI * 8) as u8,
        index: Op::NO_REG,
        ea: m.ea,
        disp: 0,
        ..*op
    }
}

/// MASKMOVDQU, VMASKMOVDQU.
fn maskmovdqu(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    let m = Masked::of(op);
    if m.vex {
        check_avx(cpu)?;
    } else {
        check_sse(cpu)?;
    }
    let (mask, data) = (vector(&cpu.s.fp, m.mask), vector(&cpu.s.fp, m.data));
    let op = at_rdi(op, m);
    cpu.operand(&op, m.len(), true)?;
    store(cpu, &op, m, &mask, &data)
}

/// MASKMOVQ.
fn maskmovq(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    if cpu.s.cr0 & cr0::EM != 0 {
        return Err(Exception::UD);
    }
    if cpu.s.cr0 & cr0::TS != 0 {
        return Err(Exception::NM);
    }
    check_pending(cpu)?;
    let m = Masked::of(op);
    cpu.sync_fp();
    cpu.fp_runtime.become_mmx(&mut cpu.s.fp);
    let op = at_rdi(op, m);
    cpu.operand(&op, m.len(), true)?;
    let register = |fp: &FpState, n: u8| {
        let mut value = [0; MAX];
        value[..8].copy_from_slice(&fp.legacy[32 + 16 * usize::from(n & 7)..][..8]);
        value
    };
    let (mask, data) = (register(&cpu.s.fp, m.mask), register(&cpu.s.fp, m.data));
    store(cpu, &op, m, &mask, &data)
}

/// VGATHER and VPGATHER: element by element, so that a fault leaves what was done.
fn gather(cpu: &mut Cpu, op: &Op) -> Fallible<()> {
    check_avx(cpu)?;
    let m = Masked::of(op);
    if m.data == m.mask || m.data == m.index || m.mask == m.index {
        return Err(Exception::UD);
    }
    let (size, index_size) = (usize::from(m.size), usize::from(m.index_size));
    let indices = vector(&cpu.s.fp, m.index);
    let mut mask = vector(&cpu.s.fp, m.mask);
    let mut value = vector(&cpu.s.fp, m.data);
    let base = Op {
        index: Op::NO_REG,
        ..*op
    };
    for i in 0..usize::from(m.count) {
        if selected(&mask, i, size) {
            let bytes = &indices[i * index_size..][..index_size];
            let wide = bytes.iter().rev().fold(0, |v, &b| v << 8 | i64::from(b));
            let index = if index_size == 4 {
                i64::from(wide as i32)
            } else {
                wide
            };
            let mut element = [0; 8];
            let read = cpu
                .operand(&moved(&base, index << op.scale()), size, false)
                .and_then(|addr| cpu.read_bytes(addr, &mut element[..size]));
            if let Err(fault) = read {
                set_vector(&mut cpu.s.fp, m.data, &value);
                set_vector(&mut cpu.s.fp, m.mask, &mask);
                return Err(fault);
            }
            value[i * size..][..size].copy_from_slice(&element[..size]);
        }
        mask[i * size..][..size].fill(0);
    }
    value[m.len()..].fill(0);
    set_vector(&mut cpu.s.fp, m.data, &value);
    set_vector(&mut cpu.s.fp, m.mask, &[0; MAX]);
    Ok(())
}
