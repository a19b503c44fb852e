//! Code for the ends of blocks: to the next block's code without leaving, if everything about
//! the way is known.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::asm::host::*;
use super::asm::{at, cond};
use super::emit::Emitter;
use super::item::{Item, guest_gpr};
use super::layout;
use crate::decode::seg_number;
use crate::op::Op;
use crate::state::{gpr, seg};

/// The ways in which blocks end that are translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Jcc,
    Jmp,
    Call,
    JmpTo,
    CallTo,
    Ret,
    Other,
}

fn end(insn: &Instruction) -> End {
    let target = match insn.op0_kind() {
        OpKind::Register => insn.op0_register().is_gpr64(),
        OpKind::Memory => {
            let (base, index) = (insn.memory_base(), insn.memory_index());
            insn.memory_size().size() == 8
                && (base == Register::RIP || base.is_gpr64())
                && (index == Register::None || index.is_gpr64())
        }
        _ => false,
    };
    match insn.mnemonic() {
        _ if insn.is_jcc_short_or_near() => End::Jcc,
        M::Jmp if insn.op0_kind() == OpKind::NearBranch64 => End::Jmp,
        M::Call if insn.op0_kind() == OpKind::NearBranch64 => End::Call,
        M::Jmp if target => End::JmpTo,
        M::Call if target => End::CallTo,
        M::Ret if insn.stack_pointer_increment() >= 8 => End::Ret,
        _ => End::Other,
    }
}

impl Emitter {
    /// The block's end where it falls through: `op`, number `slot`, knows where to.
    pub(super) fn fall(&mut self, slot: usize, op: Op) {
        self.flush();
        self.go_direct(slot, slot, &op, op.imm);
    }

    /// The block's end where its last instruction decides. `slot`: its operations.
    pub(super) fn end_with(&mut self, item: &Item, slot: impl Fn(usize) -> Op) {
        self.registers.release();
        let op = slot(item.slot);
        match end(&item.insn) {
            End::Jcc => {
                self.flush();
                self.restore_flags();
                let taken = self.asm.jcc(condition(&item.insn));
                let after = u64::from(op.off) + u64::from(op.len);
                self.go_direct(item.slot, item.slot + 1, &slot(item.slot + 1), after);
                self.asm.here(taken);
                self.go_direct(item.slot, item.slot, &op, op.imm);
            }
            End::Jmp => {
                self.flush();
                self.go_direct(item.slot, item.slot, &op, op.imm);
            }
            End::Call => {
                let sp = self.registers.get(&mut self.asm, gpr::RSP as u8, true);
                self.flush();
                self.asm.lea(RSI, at(sp, -8));
                self.translate(8, true, item.slot);
                let known = self.find_direct(item.slot, item.slot, &op, op.imm);
                self.push_return(&op);
                self.commit_direct(known, op.imm);
            }
            End::CallTo => {
                self.flush();
                self.target(item);
                self.asm
                    .load(RSI, at(RDI, layout::gpr_slot(gpr::RSP as u8)));
                self.asm.lea(RSI, at(RSI, -8));
                self.translate(8, true, item.slot);
                self.find_indirect(item.slot);
                self.push_return(&op);
                self.commit_indirect();
            }
            End::JmpTo => {
                self.flush();
                self.target(item);
                self.find_indirect(item.slot);
                self.commit_indirect();
            }
            End::Ret => {
                let sp = self.registers.get(&mut self.asm, gpr::RSP as u8, true);
                self.flush();
                self.asm.mov(RSI, sp);
                self.translate(8, false, item.slot);
                self.asm.load(R8, at(RSI, 0));
                self.find_indirect(item.slot);
                self.asm
                    .load(RAX, at(RDI, layout::gpr_slot(gpr::RSP as u8)));
                self.asm.lea(RAX, at(RAX, 8 + op.imm as i32));
                self.asm
                    .store(RAX, at(RDI, layout::gpr_slot(gpr::RSP as u8)));
                self.commit_indirect();
            }
            End::Other => {
                self.flush();
                let out = self.asm.jmp();
                self.leave_at(out, item.slot);
            }
        }
    }

    /// Brings the state up to date: the operation at the end may have to do its work.
    fn flush(&mut self) {
        self.save_flags();
        self.registers.save(&mut self.asm);
    }

    /// The target of an indirect branch, in R8. All registers are in the state.
    fn target(&mut self, item: &Item) {
        let insn = &item.insn;
        if let Some(guest) = guest_gpr(insn.op0_register())
            && insn.op0_kind() == OpKind::Register
        {
            self.asm.load(R8, at(RDI, layout::gpr_slot(guest)));
            return;
        }
        let disp = insn.memory_displacement64() as i32;
        match guest_gpr(insn.memory_base()) {
            Some(guest) => self.asm.load(RSI, at(RDI, layout::gpr_slot(guest))),
            None => self.asm.load(RSI, at(RDI, layout::BLOCK_RIP)),
        }
        match guest_gpr(insn.memory_index()) {
            Some(guest) => {
                self.asm.load(RAX, at(RDI, layout::gpr_slot(guest)));
                let scale = insn.memory_index_scale().trailing_zeros() as u8;
                let mut place = at(RSI, disp);
                place.index = Some((RAX, scale));
                self.asm.lea(RSI, place);
            }
            None => self.asm.lea(RSI, at(RSI, disp)),
        }
        let segment = seg_number(insn.memory_segment());
        if segment == seg::FS || segment == seg::GS {
            let base = at(RDI, layout::segment_base(segment));
            self.asm.mem(true, &[0x03], RSI, base);
        }
        self.translate(8, false, item.slot);
        self.asm.load(R8, at(RSI, 0));
    }

    /// Stores the address after `op` at the host address in RSI and takes 8 off RSP.
    fn push_return(&mut self, op: &Op) {
        let after = i32::from(op.off) + i32::from(op.len);
        self.asm.load(RAX, at(RDI, layout::BLOCK_RIP));
        self.asm.lea(RAX, at(RAX, after));
        self.asm.store(RAX, at(RSI, 0));
        let sp = at(RDI, layout::gpr_slot(gpr::RSP as u8));
        self.asm.mem(true, &[0x83], 5, sp); // sub qword [..], 8
        self.asm.bytes(&[8]);
    }

    /// Goes on at `target` (relative to the block), by the way that operation number `slot`
    /// knows; where it doesn't, operation number `leave` has to.
    fn go_direct(&mut self, leave: usize, slot: usize, op: &Op, target: u64) {
        let known = self.find_direct(leave, slot, op, target);
        self.commit_direct(known, target);
    }

    /// Puts the next block's first slot into RDX, or leaves to operation number `leave`. For a
    /// target outside the page the way is looked up, the target then is in R8: returns whether
    /// the link's slot is in R9 instead. Changes RAX, RCX and flags.
    fn find_direct(&mut self, leave: usize, slot: usize, op: &Op, target: u64) -> bool {
        if op.b == 0 {
            self.asm.load(R8, at(RDI, layout::BLOCK_RIP));
            match i32::try_from(target as i64) {
                Ok(distance) => self.asm.lea(R8, at(R8, distance)),
                Err(_) => {
                    // Not within 2 GiB: no near branch, so it can't be. The operation knows.
                    let out = self.asm.jmp();
                    self.leave_at(out, leave);
                }
            }
            self.find_indirect(leave);
            return false;
        }
        self.asm.imm64(R9, self.op(slot).addr() as u64);
        self.asm.load(RDX, at(R9, layout::OP_DISP));
        self.asm.reg(true, &[0x85], RDX, RDX); // test
        let unknown = self.asm.jcc(cond::E);
        self.leave_at(unknown, leave);
        true
    }

    /// Puts the first slot of the block at R8 into RDX if the jump cache knows it, or leaves.
    fn find_indirect(&mut self, leave: usize) {
        let jump = self.jump;
        let asm = &mut self.asm;
        asm.mov(RAX, R8);
        asm.shift(true, 5, RAX, 12);
        asm.reg(true, &[0x31], R8, RAX); // xor
        asm.alu(false, 4, RAX, jump.mask);
        asm.shift(true, 4, RAX, 5);
        asm.imm64(RCX, jump.base);
        asm.reg(true, &[0x01], RCX, RAX); // add
        asm.mem(true, &[0x39], R8, at(RAX, 0)); // cmp
        let other = asm.jcc(cond::NE);
        asm.mov(RCX, R8);
        asm.shift(true, 5, RCX, 63);
        let mut key = at(RDI, layout::JUMP_KEY);
        key.index = Some((RCX, 3));
        asm.load(RCX, key);
        asm.mem(true, &[0x39], RCX, at(RAX, 8)); // cmp
        let void = asm.jcc(cond::NE);
        asm.load(RDX, at(RAX, 16));
        self.leave_at(other, leave);
        self.leave_at(void, leave);
    }

    /// To the block in RDX, `target` from this one, by `find_direct`.
    fn commit_direct(&mut self, linked: bool, target: u64) {
        if !linked {
            return self.commit_indirect();
        }
        let rip = at(RDI, layout::BLOCK_RIP);
        // A linked target lies in the same page.
        self.asm.mem(true, &[0x81], 0, rip); // add qword [..], ..
        self.asm.bytes(&(target as i32).to_le_bytes());
        self.asm.store(R9, at(RDI, layout::LINK));
        self.asm.mem(false, &[0xff], 4, at(RDX, layout::OP_IMM)); // jmp
    }

    /// To the block in RDX, whose address is in R8.
    fn commit_indirect(&mut self) {
        self.asm.store(R8, at(RDI, layout::BLOCK_RIP));
        self.asm.mem(true, &[0xc7], 0, at(RDI, layout::LINK)); // mov qword [..], 0
        self.asm.bytes(&[0; 4]);
        self.asm.mem(false, &[0xff], 4, at(RDX, layout::OP_IMM)); // jmp
    }
}

/// The number of a Jcc's condition.
fn condition(insn: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match insn.condition_code() {
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
        _ => 15,
    }
}
