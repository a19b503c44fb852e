//! Code for the instructions inside a block.

use iced_x86::{Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

use super::asm::host::*;
use super::asm::{Asm, Mem, Patch, at, cond};
use super::item::{Item, Kind, by_cl, general_form, guest_gpr, writes};
use super::layout;
use super::registers::{Registers, Unsaved};
use super::{AWAY_AT, JumpTable, LEAVE_AT, PEXT_MASK_AT, run_one};
use crate::decode::seg_number;
use crate::op::Op;
use crate::simd::Plainly;
use crate::state::{cr0, cr4, gpr, seg};
use crate::tlb::{HALF, SIZE};

/// The instruction cannot be encoded with other registers.
pub(super) struct Unfit;

/// Iced's names of host registers.
fn named(register: u8, size: usize) -> Register {
    let n = u32::from(register);
    match size {
        // Without AH to BH, which have the numbers of SPL to DIL.
        1 if n < 4 => Register::AL + n,
        1 => Register::SPL + (n - 4),
        2 => Register::AX + n,
        4 => Register::EAX + n,
        _ => Register::RAX + n,
    }
}

/// Code of one block in the making.
pub(super) struct Emitter {
    pub asm: Asm,
    pub registers: Registers,
    /// `CpuState::cc` is right.
    pub cc_valid: bool,
    /// The host's flags are the guest's.
    pub host_flags: bool,
    /// SSE is known to be enabled; MXCSR to be the guest's.
    sse_known: bool,
    mxcsr_known: bool,
    /// Ways out in the middle: where from, what to save, which operation to leave to.
    leaves: Vec<(Vec<Patch>, Unsaved, *const Op)>,
    factory: InstructionInfoFactory,
    encoder: Encoder,
    /// Where the code will be, as distance from the start of the memory for code.
    place: usize,
    pext: Option<u64>,
    /// The block's first slot.
    pub ops: *const Op,
    /// The block's flag of being stale.
    stale: *const u8,
    pub jump: JumpTable,
}

impl Emitter {
    pub(super) fn new(
        place: usize,
        pext: Option<u64>,
        ops: *const Op,
        stale: *const u8,
        jump: JumpTable,
    ) -> Self {
        Self {
            asm: Asm::default(),
            registers: Registers::new(),
            cc_valid: true,
            host_flags: false,
            sse_known: false,
            mxcsr_known: false,
            leaves: Vec::new(),
            factory: InstructionInfoFactory::new(),
            encoder: Encoder::new(64),
            place,
            pext,
            ops,
            stale,
            jump,
        }
    }

    /// Operation number `slot` of the block.
    pub(super) fn op(&self, slot: usize) -> *const Op {
        // Only ever an address here.
        self.ops.wrapping_add(slot)
    }

    /// Position of `LEAVE` as the code sees it.
    fn leave_position(&self) -> i64 {
        LEAVE_AT as i64 - self.place as i64
    }

    /// The rest of the code: the ways out.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let leave = self.leave_position();
        for (from, unsaved, op) in std::mem::take(&mut self.leaves) {
            for jump in from {
                self.asm.here(jump);
            }
            unsaved.store(&mut self.asm);
            self.asm.imm64(RAX, op.addr() as u64);
            let out = self.asm.jmp();
            self.asm.patch(out, leave);
        }
        self.asm.code
    }

    /// Leaves at `from` to operation number `slot`, all of the instruction still to be done.
    pub(super) fn leave_at(&mut self, from: Patch, slot: usize) {
        let op = self.op(slot);
        let unsaved = self.registers.unsaved();
        match self.leaves.last_mut() {
            Some((jumps, same, to)) if *to == op && *same == unsaved => jumps.push(from),
            _ => self.leaves.push((vec![from], unsaved, op)),
        }
    }

    /// A block's beginning: leaves to whoever entered if something wants attention, as
    /// `Cpu::busy` does.
    pub(super) fn begin(&mut self) {
        let away = AWAY_AT as i64 - self.place as i64;
        let asm = &mut self.asm;
        asm.mem(false, &[0x83], 5, at(RDI, layout::LEFT)); // sub dword [..], 1
        asm.bytes(&[1]);
        let over = asm.jcc(cond::S);
        asm.load(RAX, at(RDI, layout::ATTENTION));
        asm.load32(RAX, at(RAX, 0));
        asm.mem(false, &[0x85], RAX, at(RDI, layout::ATTENTION_MASK)); // test
        let wanted = asm.jcc(cond::NE);
        asm.patch(over, away);
        asm.patch(wanted, away);
    }

    /// Makes `CpuState::cc` right. Changes no flags, but RAX.
    pub(super) fn save_flags(&mut self) {
        if !self.cc_valid {
            // lahf; seto al; movzx eax, ax
            self.asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x0f, 0xb7, 0xc0]);
            self.asm.store(RAX, at(RDI, layout::CC));
            self.cc_valid = true;
        }
    }

    /// Makes the host's flags the guest's. Changes RAX.
    pub(super) fn restore_flags(&mut self) {
        if !self.host_flags {
            self.asm.load32(RAX, at(RDI, layout::CC));
            // add al, 127: overflows with OF; sahf
            self.asm.bytes(&[0x04, 0x7f, 0x9e]);
            self.host_flags = true;
        }
    }

    /// The host's flags are about to be changed.
    fn lose_flags(&mut self, item: &Item) {
        if item.flags_live {
            self.save_flags();
        }
        self.host_flags = false;
    }

    /// The block's start, in `register`.
    fn block_rip(&mut self, register: u8) {
        self.asm.load(register, at(RDI, layout::BLOCK_RIP));
    }

    /// Linear address of the memory operand, in RSI.
    fn address(&mut self, insn: &Instruction) {
        let disp = insn.memory_displacement64() as i32;
        let index = guest_gpr(insn.memory_index()).map(|g| {
            let scale = insn.memory_index_scale().trailing_zeros() as u8;
            (self.registers.get(&mut self.asm, g, true), scale)
        });
        let base = match guest_gpr(insn.memory_base()) {
            Some(g) => self.registers.get(&mut self.asm, g, true),
            None => {
                if insn.memory_base() == Register::RIP {
                    self.block_rip(RSI);
                } else {
                    self.asm.imm64(RSI, 0);
                }
                RSI
            }
        };
        self.asm.lea(RSI, Mem { base, index, disp });
        let segment = seg_number(insn.memory_segment());
        if segment == seg::FS || segment == seg::GS {
            let base = at(RDI, layout::segment_base(segment));
            self.asm.mem(true, &[0x03], RSI, base);
        }
    }

    /// Turns the linear address of `len` bytes in RSI into a host address; leaves if that takes
    /// more than a look into the TLB. Changes RAX, RCX and flags.
    pub(super) fn translate(&mut self, len: usize, write: bool, slot: usize) {
        let asm = &mut self.asm;
        match self.pext {
            Some(_) => {
                // pext rax, rsi, [mask]
                asm.bytes(&[0xc4, 0xe2, 0xca, 0xf5, 0x05]);
                let mask = PEXT_MASK_AT as i64 - self.place as i64;
                let distance = mask - (asm.len() as i64 + 4);
                asm.bytes(&(distance as i32).to_le_bytes());
                asm.shift(false, 4, RAX, 4);
            }
            None => {
                asm.mov(RAX, RSI);
                asm.shift(true, 5, RAX, 12);
                asm.alu(false, 4, RAX, HALF as i32 - 1);
                asm.shift(false, 4, RAX, 4);
                asm.mov(RCX, RSI);
                asm.shift(true, 7, RCX, 63);
                asm.alu(false, 4, RCX, (HALF * 16) as i32);
                asm.reg(true, &[0x01], RCX, RAX);
            }
        }
        asm.mem(true, &[0x03], RAX, at(RDI, layout::TLB));
        if len == 1 {
            asm.mov(RCX, RSI);
        } else {
            asm.lea(RCX, at(RSI, len as i32 - 1));
        }
        asm.alu(true, 4, RCX, -4096);
        let table = if write {
            layout::TLB_WRITE
        } else {
            layout::TLB_READ
        };
        asm.mem(true, &[0x3b], RCX, at(RAX, table));
        let miss = asm.jcc(cond::NE);
        asm.mem(true, &[0x03], RSI, at(RAX, table + 8));
        self.leave_at(miss, slot);
    }

    /// The memory operand's host address, in RSI.
    fn memory(&mut self, item: &Item, write: bool) {
        self.lose_flags(item);
        self.address(&item.insn);
        if let Kind::Sse(Plainly { align, .. }) = item.kind
            && align != 0
        {
            self.asm.bytes(&[0x40, 0xf6, 0xc6, align]); // test sil, ..
            let odd = self.asm.jcc(cond::NE);
            self.leave_at(odd, item.slot);
        }
        self.translate(item.insn.memory_size().size(), write, item.slot);
    }

    /// The guest's register `g` in its host register.
    fn get(&mut self, g: usize) -> u8 {
        self.registers.get(&mut self.asm, g as u8, true)
    }

    /// `host` becomes the guest's register `g`.
    fn set(&mut self, g: usize, host: u8) {
        let to = self.registers.get(&mut self.asm, g as u8, false);
        self.asm.mov(to, host);
        self.registers.changed(g as u8);
    }

    /// Code for an instruction.
    pub(super) fn item(&mut self, item: &Item) -> Result<(), Unfit> {
        self.registers.release();
        match item.kind {
            Kind::Nothing | Kind::End => {}
            Kind::Same => self.same(item, None)?,
            Kind::Accumulator => {
                self.get(gpr::RAX);
                self.same(item, Some((true, false)))?;
                self.set(gpr::RAX, RAX);
            }
            Kind::Extend => {
                self.get(gpr::RAX);
                self.get(gpr::RDX);
                self.same(item, Some((true, true)))?;
                self.set(gpr::RDX, RDX);
            }
            Kind::Wide => {
                self.get(gpr::RAX);
                self.get(gpr::RDX);
                self.same(item, Some((true, true)))?;
                self.set(gpr::RAX, RAX);
                if self.operand_size(item) > 1 {
                    self.set(gpr::RDX, RDX);
                }
            }
            Kind::Sse(how) => self.sse(item, how)?,
            Kind::Lea => self.lea(item)?,
            Kind::Push => self.push(item),
            Kind::Pop => self.pop(item),
            Kind::Leave => self.leave(item),
            Kind::Call => self.call(item),
        }
        Ok(())
    }

    fn operand_size(&self, item: &Item) -> usize {
        match item.insn.op0_kind() {
            OpKind::Memory => item.insn.memory_size().size(),
            _ => item.insn.op0_register().size(),
        }
    }

    /// The instruction itself on host registers; `implied`: the guest's RAX, RDX go into the
    /// host's before.
    fn same(&mut self, item: &Item, implied: Option<(bool, bool)>) -> Result<(), Unfit> {
        let mut insn = item.insn;
        insn.set_code(general_form(insn.code()));
        let count = insn.op_count();
        let info = self.factory.info(&item.insn);
        let accesses: Vec<OpAccess> = (0..count).map(|n| info.op_access(n)).collect();
        for n in 0..count {
            if insn.op_kind(n) == OpKind::Memory {
                self.memory(item, writes(accesses[n as usize]));
                operand_at_rsi(&mut insn);
            }
        }
        let cl = by_cl(&insn);
        let mut changed = 0_u16;
        // Old values that matter, whichever operand comes first.
        let whole = overwrites(&item.insn);
        let (mut needed, mut needed_xmms) = (0_u16, 0_u16);
        for n in 0..count {
            let register = insn.op_register(n);
            let access = accesses[n as usize];
            if insn.op_kind(n) != OpKind::Register || access == OpAccess::None {
                continue;
            }
            if register.is_xmm() && !(access == OpAccess::Write && whole) {
                needed_xmms |= 1 << (register.number() & 15);
            }
            if let Some(guest) = guest_gpr(register)
                && !(access == OpAccess::Write && register.size() >= 4)
            {
                needed |= 1 << guest;
            }
        }
        for n in 0..count {
            let register = insn.op_register(n);
            if insn.op_kind(n) != OpKind::Register || cl && n == count - 1 {
                continue;
            }
            let access = accesses[n as usize];
            if register.is_xmm() {
                let number = register.number() as u8 & 15;
                let load = needed_xmms >> number & 1 != 0;
                self.registers.xmm(&mut self.asm, number, load);
                continue;
            }
            let Some(guest) = guest_gpr(register) else {
                return Err(Unfit);
            };
            let load = needed >> guest & 1 != 0;
            let host = self.registers.get(&mut self.asm, guest, load);
            insn.set_op_register(n, named(host, register.size()));
            if writes(access) {
                changed |= 1 << guest;
            }
        }
        if cl {
            let count = self.get(gpr::RCX);
            self.asm.mov(RCX, count);
        }
        if item.uses_flags {
            self.restore_flags();
        }
        if let Some((rax, rdx)) = implied {
            if rax {
                let host = self.get(gpr::RAX);
                self.asm.mov(RAX, host);
            }
            if rdx {
                let host = self.get(gpr::RDX);
                self.asm.mov(RDX, host);
            }
        }
        self.encode(&insn)?;
        if item.sets_flags {
            self.cc_valid = false;
            self.host_flags = true;
        }
        for guest in (0..16).filter(|g| changed >> g & 1 != 0) {
            self.registers.changed(guest);
        }
        for n in 0..count {
            let register = insn.op_register(n);
            if insn.op_kind(n) == OpKind::Register
                && register.is_xmm()
                && writes(accesses[n as usize])
            {
                self.registers.xmm_changed(register.number() as u8);
            }
        }
        Ok(())
    }

    fn encode(&mut self, insn: &Instruction) -> Result<(), Unfit> {
        self.encoder.encode(insn, 0).map_err(|_| Unfit)?;
        let mut code = self.encoder.take_buffer();
        self.asm.bytes(&code);
        code.clear();
        self.encoder.set_buffer(code);
        Ok(())
    }

    fn sse(&mut self, item: &Item, how: Plainly) -> Result<(), Unfit> {
        if !self.sse_known || how.mxcsr && !self.mxcsr_known {
            self.lose_flags(item);
        }
        if !self.sse_known {
            let asm = &mut self.asm;
            asm.mem(false, &[0xf6], 0, at(RDI, layout::CR0));
            asm.bytes(&[(cr0::EM | cr0::TS) as u8]);
            let off = asm.jcc(cond::NE);
            asm.mem(false, &[0xf7], 0, at(RDI, layout::CR4));
            asm.bytes(&(cr4::OSFXSR as u32).to_le_bytes());
            let unknown = asm.jcc(cond::E);
            self.leave_at(off, item.slot);
            self.leave_at(unknown, item.slot);
            self.sse_known = true;
        }
        if how.mxcsr && !self.mxcsr_known {
            let asm = &mut self.asm;
            asm.load32(RAX, at(RDI, layout::MXCSR));
            asm.alu(false, 4, RAX, !0x3f);
            asm.alu(false, 7, RAX, 0x1f80);
            let other = asm.jcc(cond::NE);
            // Runtime::gather
            asm.mem(false, &[0x80], 7, at(RDI, layout::SIMD_LIVE)); // cmp byte [..], 0
            asm.bytes(&[0]);
            let gathers = asm.jcc(cond::NE);
            asm.mem(false, &[0x0f, 0xae], 2, at(RDI, layout::HOST_MXCSR)); // ldmxcsr
            asm.mem(false, &[0xc6], 0, at(RDI, layout::SIMD_LIVE)); // mov byte [..], 1
            asm.bytes(&[1]);
            asm.here(gathers);
            self.leave_at(other, item.slot);
            self.mxcsr_known = true;
        }
        self.same(item, None)
    }

    fn lea(&mut self, item: &Item) -> Result<(), Unfit> {
        let insn = &item.insn;
        let Some(guest) = guest_gpr(insn.op0_register()) else {
            return Err(Unfit);
        };
        let index = guest_gpr(insn.memory_index()).map(|g| {
            let scale = insn.memory_index_scale().trailing_zeros() as u8;
            (self.registers.get(&mut self.asm, g, true), scale)
        });
        let base = match guest_gpr(insn.memory_base()) {
            Some(g) => self.registers.get(&mut self.asm, g, true),
            None if insn.memory_base() == Register::RIP => {
                self.block_rip(RSI);
                RSI
            }
            None => {
                self.asm.imm64(RSI, 0);
                RSI
            }
        };
        let to = self.registers.get(&mut self.asm, guest, false);
        let wide = insn.op0_register().size() == 8;
        let disp = insn.memory_displacement64() as i32;
        self.asm.mem(wide, &[0x8d], to, Mem { base, index, disp });
        self.registers.changed(guest);
        Ok(())
    }

    fn push(&mut self, item: &Item) {
        self.lose_flags(item);
        let sp = self.get(gpr::RSP);
        self.asm.lea(RSI, at(sp, -8));
        self.translate(8, true, item.slot);
        if let Some(guest) = guest_gpr(item.insn.op0_register()) {
            let value = self.registers.get(&mut self.asm, guest, true);
            self.asm.store(value, at(RSI, 0));
        } else {
            self.asm.mem(true, &[0xc7], 0, at(RSI, 0));
            let value = item.insn.immediate(0) as i32;
            self.asm.bytes(&value.to_le_bytes());
        }
        self.asm.lea(sp, at(sp, -8));
        self.registers.changed(gpr::RSP as u8);
    }

    fn pop(&mut self, item: &Item) {
        self.lose_flags(item);
        let sp = self.get(gpr::RSP);
        self.asm.mov(RSI, sp);
        self.translate(8, false, item.slot);
        if let Some(guest) = guest_gpr(item.insn.op0_register()) {
            let to = self.registers.get(&mut self.asm, guest, false);
            self.asm.load(to, at(RSI, 0));
            self.registers.changed(guest);
        }
        self.asm.lea(sp, at(sp, 8));
        self.registers.changed(gpr::RSP as u8);
    }

    fn leave(&mut self, item: &Item) {
        self.lose_flags(item);
        let (sp, bp) = (self.get(gpr::RSP), self.get(gpr::RBP));
        self.asm.mov(RSI, bp);
        self.translate(8, false, item.slot);
        self.asm.lea(sp, at(bp, 8));
        self.asm.load(bp, at(RSI, 0));
        self.registers.changed(gpr::RSP as u8);
        self.registers.changed(gpr::RBP as u8);
    }

    /// By its operation.
    fn call(&mut self, item: &Item) {
        self.save_flags();
        self.registers.save(&mut self.asm);
        self.registers.forget();
        self.asm.imm64(RSI, item.copy.addr() as u64);
        let run: unsafe extern "sysv64" fn(*mut crate::cpu::Cpu, *const Op) -> u32 = run_one;
        self.asm.imm64(RAX, run as usize as u64);
        self.asm.alu(true, 0, RDI, -layout::BIAS);
        self.asm.bytes(&[0xff, 0xd0]); // call rax
        self.asm.load(RDI, at(RSP, 0));
        self.asm.bytes(&[0x85, 0xc0]); // test eax, eax
        let ended = self.asm.jcc(cond::E);
        let leave = self.leave_position();
        // RAX is null.
        self.asm.patch(ended, leave);
        // Its own write may have been to this block.
        self.asm.imm64(RAX, self.stale.addr() as u64);
        self.asm.bytes(&[0x80, 0x38, 0]); // cmp byte [rax], 0
        let stale = self.asm.jcc(cond::NE);
        self.host_flags = false;
        self.sse_known = false;
        self.mxcsr_known = false;
        self.leave_at(stale, item.slot + item.slots);
    }
}

/// Whether the first operand's old value does not matter: moves of whole registers.
fn overwrites(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    let memory = insn.op_kind(1) == OpKind::Memory;
    match insn.mnemonic() {
        M::Movaps | M::Movups | M::Movapd | M::Movupd | M::Movdqa | M::Movdqu => true,
        M::Movd | M::Movq | M::Pshufd => true,
        M::Movss | M::Movsd => memory,
        _ => false,
    }
}

/// Makes [RSI] the memory operand.
fn operand_at_rsi(insn: &mut Instruction) {
    insn.set_segment_prefix(Register::None);
    insn.set_memory_base(Register::RSI);
    insn.set_memory_index(Register::None);
    insn.set_memory_index_scale(1);
    insn.set_memory_displacement64(0);
    insn.set_memory_displ_size(0);
}

/// What PEXT takes of an address for the TLB's slot.
pub(super) const PEXT_MASK: u64 = (HALF as u64 - 1) << 12 | 1 << 63;
const _: () = assert!(SIZE == 2 * HALF && HALF.is_power_of_two());
