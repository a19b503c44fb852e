//! From guest bytes to blocks of operations.

mod arith;
mod bits;
mod control;
mod other;
mod pick;

use std::cell::Cell;
use std::sync::atomic::{Ordering, fence};

use iced_x86::{Decoder, DecoderError, DecoderOptions, Encoder, Instruction, OpKind, Register};

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::exec;
use crate::machine::Mail;
use crate::op::{Block, Handler, Op, Plain};
use crate::simd::{self, Fast};
use crate::state::seg;

/// Bit of a mode: the block holds one instruction.
pub(crate) const MODE_SINGLE: u8 = 8;
/// Bit of a mode: offsets in the code segment are checked against its limit.
pub(crate) const MODE_SEGMENTED: u8 = 16;
/// Bit of a mode: 32-bit code all of whose segments but FS and GS span the 4 GiB from 0, as all operating
/// systems have them: offsets are linear addresses, and no check can fail but at their very end.
pub(crate) const MODE_FLAT: u8 = 32;
/// The mode of 64-bit code.
const MODE_64: u8 = 2 | 4;
/// Most instructions in a block.
const MAX_INSTRUCTIONS: usize = 48;
/// So often code is read again that another vCPU changes meanwhile.
const ATTEMPTS: u32 = 16;
/// Most bytes looked at for one.
const WINDOW: usize = 512;
/// Bytes of the longest instruction.
const MAX_LENGTH: usize = 15;

/// How an instruction is run.
pub(crate) enum Emit {
    /// Not at all.
    Nothing,
    /// By a handler, going on with the next operation.
    Next(Handler, Op),
    /// By a handler that ends the block.
    End(Handler, Op),
    /// The same with a second slot, for the way of a branch not taken.
    Branch(Handler, Op),
    /// By a plain handler.
    Plain(Plain, Op),
    /// By a plain handler that ends the block.
    PlainEnd(Plain, Op),
}

/// Classes of memory operands, by the `exec::Ea` that computes them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum EaClass {
    Base,
    Full,
    Flat,
    Legacy,
}

/// Picks a word type by size in bytes.
macro_rules! sized {
    ($size:expr, $t:ident => $x:expr) => {
        match $size {
            1 => {
                type $t = u8;
                $x
            }
            2 => {
                type $t = u16;
                $x
            }
            4 => {
                type $t = u32;
                $x
            }
            _ => {
                type $t = u64;
                $x
            }
        }
    };
}
pub(crate) use sized;

/// Picks a handler by class: one for an `exec::Ea`, or the one for all forms.
macro_rules! by_ea {
    ($class:expr, $e:ident => $x:expr, $slow:expr) => {
        match $class {
            $crate::decode::EaClass::Base => {
                type $e = $crate::exec::Base;
                $x
            }
            $crate::decode::EaClass::Full => {
                type $e = $crate::exec::Full;
                $x
            }
            $crate::decode::EaClass::Flat => {
                type $e = $crate::exec::Flat;
                $x
            }
            $crate::decode::EaClass::Legacy => $slow,
        }
    };
}
pub(crate) use by_ea;

/// One instruction being decoded.
pub(crate) struct Context<'a> {
    pub cpu: &'a Cpu,
    pub insn: &'a Instruction,
    /// 64-bit mode.
    pub mode64: bool,
    /// `MODE_FLAT`.
    pub flat: bool,
    /// Offset of the block's start in its page.
    page_offset: u64,
    /// With length, offset and memory operand filled in.
    pub op: Op,
    pub class: EaClass,
}

/// Byte offset of a register from `CpuState::gpr`.
pub(crate) fn reg(register: Register) -> u8 {
    match register {
        Register::AH => 1,
        Register::CH => 9,
        Register::DH => 17,
        Register::BH => 25,
        r if r.is_gpr() => (r.full_register() as u32 - Register::RAX as u32) as u8 * 8,
        _ => Op::NO_REG,
    }
}

/// Number of a segment register.
pub(crate) fn seg_number(register: Register) -> usize {
    match register {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

impl Context<'_> {
    /// Operand `n` is memory.
    pub(crate) fn is_mem(&self, n: u32) -> bool {
        self.insn.op_kind(n) == OpKind::Memory
    }

    /// Operand `n` is a register.
    pub(crate) fn is_reg(&self, n: u32) -> bool {
        self.insn.op_kind(n) == OpKind::Register
    }

    /// For `Op::b` of a branch's slot: the target, relative to the block, lies in its page.
    pub(crate) fn links(&self, target: u64) -> u8 {
        u8::from(self.page_offset.wrapping_add(target) < 4096)
    }

    /// Byte offset of register operand `n`.
    pub(crate) fn reg(&self, n: u32) -> u8 {
        reg(self.insn.op_register(n))
    }

    /// Size in bytes of operand `n` (register or memory).
    pub(crate) fn size(&self, n: u32) -> usize {
        if self.is_mem(n) {
            self.insn.memory_size().size()
        } else {
            self.insn.op_register(n).size()
        }
    }

    /// Operand `n` for `muldiv::value`: a register, or `Op::NO_REG` for memory.
    pub(crate) fn reg_or_mem(&self, n: u32) -> u8 {
        if self.is_mem(n) {
            Op::NO_REG
        } else {
            self.reg(n)
        }
    }
}

/// The operation's fields that follow from the encoding alone.
fn base_op(insn: &Instruction, offset: u16, mode: u8) -> (Op, EaClass) {
    let mode64 = mode & 3 == 2;
    let mut op = Op {
        f: exec::undefined,
        a: 0,
        b: 0,
        base: Op::NO_REG,
        index: Op::NO_REG,
        ea: (seg::DS as u8) << 2,
        len: insn.len() as u8,
        off: offset,
        disp: 0,
        imm: 0,
    };
    let string = matches!(
        insn.op0_kind(),
        OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
    ) || matches!(
        insn.op1_kind(),
        OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI
    );
    let memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
    if string {
        op.ea = (seg_number(insn.memory_segment()) as u8) << 2;
        return (op, EaClass::Legacy);
    }
    if !memory {
        return (op, EaClass::Full);
    }
    let base = insn.memory_base();
    let index = insn.memory_index();
    op.disp = insn.memory_displacement64() as i64;
    let mut addr_size = if mode64 { 8 } else { mode as usize & 1 };
    for r in [base, index] {
        if r.is_gpr() {
            addr_size = r.size();
        }
    }
    match base {
        Register::None => {}
        Register::RIP | Register::EIP => {
            // Decoded with the block at address 0: the displacement counts from there.
            op.base = Op::RIP;
            addr_size = if base == Register::EIP { 4 } else { 8 };
        }
        r => op.base = reg(r),
    }
    if index.is_gpr() {
        op.index = reg(index);
    }
    if !base.is_gpr() && !index.is_gpr() && op.base != Op::RIP {
        // A displacement alone: its size is the address size's.
        addr_size = match insn.memory_displ_size() {
            2 => 2,
            4 if !mode64 => 4,
            _ => addr_size,
        };
        if mode64 && insn.memory_displ_size() == 4 {
            // With the address-size prefix; without, the decoder says 8.
            addr_size = 4;
        }
    }
    if addr_size == 0 {
        addr_size = 2;
    } else if addr_size == 1 {
        addr_size = 4;
    }
    let scale = insn.memory_index_scale().trailing_zeros() as u8;
    let mut segment = seg_number(insn.memory_segment());
    if mode64 && segment < seg::FS {
        // 64-bit mode ignores the other prefixes; only which fault an address raises is left.
        let stack = matches!(base.full_register(), Register::RSP | Register::RBP);
        segment = if stack { seg::SS } else { seg::DS };
    }
    let kind = match (mode64, addr_size) {
        (true, 4) => Op::EA_64_32,
        (true, _) => Op::EA_64,
        (false, 2) => Op::EA_16,
        (false, _) => Op::EA_32,
    };
    op.ea = scale | (segment as u8) << 2 | kind << 5;
    let class = if kind == Op::EA_32
        && mode & MODE_FLAT != 0
        && matches!(segment, seg::DS | seg::ES | seg::SS)
    {
        EaClass::Flat
    } else if kind != Op::EA_64 {
        EaClass::Legacy
    } else if op.index == Op::NO_REG && segment != seg::FS && segment != seg::GS {
        EaClass::Base
    } else {
        EaClass::Full
    };
    (op, class)
}

/// Has the decoder and the encoder make their tables, which takes a millisecond and a half.
pub fn get_ready() {
    let nop = Decoder::with_ip(64, &[0x90], 0, DecoderOptions::NONE).decode();
    if let Err(error) = Encoder::new(64).encode(&nop, 0) {
        log::debug!("encoding a nop: {error}");
    }
}

impl Cpu {
    /// Decodes the block at linear address `linear`, which is guest-physical `gpa`.
    pub(crate) fn decode_block(
        &mut self,
        linear: u64,
        gpa: u64,
        mode: u8,
    ) -> Fallible<*const Block> {
        if self.cache.full() {
            self.cache.clear();
            self.link = std::ptr::null_mut();
        }
        // Guest code can change while it is decoded, by another vCPU; then once more. Where that
        // doesn't end, what was read is run once: a processor may run any mixture of old and new.
        let mut attempts = 0;
        loop {
            attempts += 1;
            if let Some(block) = self.try_decode(Some(linear), gpa, mode, attempts > ATTEMPTS)? {
                return Ok(block);
            }
        }
    }

    /// Decodes what is likely to be run soon, from these guest-physical addresses, as long as `go_on` says so. They are
    /// guesses: whatever is there is decoded as 64-bit code, found only by code that is at this address, and forgotten
    /// like everything decoded when it is overwritten (`Machine::memory_written`).
    pub fn decode_ahead(&mut self, places: &[u64], go_on: &dyn Fn() -> bool) {
        // That memory was made known: it would be taken for a reason to forget everything later.
        self.take_mail();
        for &gpa in places {
            if !go_on() || self.cache.full() {
                return;
            }
            if self.slots.find(gpa).is_none() || self.cache.has(gpa, MODE_64) {
                continue;
            }
            // What changes meanwhile, and what can't be decoded by itself, is decoded when it is run.
            if let Err(error) = self.try_decode(None, gpa, MODE_64, false) {
                log::trace!("decoding {gpa:#x} ahead: {error:?}");
            }
        }
    }

    /// `None`: the code changed meanwhile. With `anyway` it is taken as it was read, and forgotten
    /// at the next look at this vCPU's messages. Without a linear address what goes on on another page is `None`, too.
    fn try_decode(
        &mut self,
        linear: Option<u64>,
        gpa: u64,
        mode: u8,
        anyway: bool,
    ) -> Fallible<Option<*const Block>> {
        let rip = self.s.rip;
        let mut room = WINDOW.min((4096 - (gpa & 0xfff)) as usize);
        let mut limited = false;
        if mode & 3 != 2 {
            let limit = u64::from(self.s.seg[seg::CS].limit);
            if rip > limit {
                return Err(Exception::GP0);
            }
            if limit - rip < room as u64 {
                room = (limit - rip + 1) as usize;
                limited = true;
            }
        }
        let mut window = [0xff; WINDOW];
        self.read_code(gpa, &mut window[..room]);

        let mut ops = std::mem::take(&mut self.cache.scratch);
        ops.clear();
        let (len, complete) = self.decode_window(&window[..room], gpa & 0xfff, mode, &mut ops);
        let mut block = Block {
            ops: std::ptr::null_mut(),
            count: 0,
            len: len as u16,
            mode,
            stale: Cell::new(false),
            gpa,
            gpa2: 0,
            crosses: false,
            hash_next: Cell::new(std::ptr::null()),
        };
        let mut second = [0; 15];
        if !complete && len == 0 {
            // The first instruction goes on beyond the window: on the next page.
            if limited {
                self.cache.scratch = ops;
                return Err(Exception::GP0);
            }
            let Some(linear) = linear else {
                self.cache.scratch = ops;
                return Ok(None);
            };
            let next_page = self.wrap_linear((linear & !0xfff).wrapping_add(4096));
            let gpa2 = self.translate_fetch(next_page)?;
            self.read_code(gpa2, &mut second);
            let mut joined = [0xff; 30];
            joined[..room].copy_from_slice(&window[..room]);
            joined[room..room + 15].copy_from_slice(&second);
            let (len, _) = self.decode_window(
                &joined[..room + 15],
                gpa & 0xfff,
                mode | MODE_SINGLE,
                &mut ops,
            );
            block.len = len.max(1) as u16;
            block.crosses = true;
            block.gpa2 = gpa2;
        }
        self.watch_code(&block);
        let first = usize::from(block.len).min(room);
        let same = self.same_code(gpa, &window[..first])
            && (!block.crosses
                || self.same_code(block.gpa2, &second[..usize::from(block.len) - first]));
        if !same && anyway {
            for &page in &[block.gpa & !0xfff, block.gpa2][..1 + usize::from(block.crosses)] {
                let chunks = block.chunks(page);
                self.peer.post(Mail::CodeWritten { page, chunks });
            }
        }
        let result = (same || anyway).then(|| self.cache.insert(&ops, block));
        self.cache.scratch = ops;
        Ok(result)
    }

    pub(crate) fn read_code(&self, gpa: u64, bytes: &mut [u8]) {
        match self.slots.host(gpa) {
            // SAFETY: within one page of a slot.
            Some(host) => unsafe {
                std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len());
            },
            // Nothing answers instruction fetches outside memory.
            None => bytes.fill(0xff),
        }
    }

    fn same_code(&self, gpa: u64, bytes: &[u8]) -> bool {
        let mut now = [0xff; WINDOW];
        self.read_code(gpa, &mut now[..bytes.len()]);
        now[..bytes.len()] == *bytes
    }

    /// Makes writes to the block's guest code noticed from now on.
    fn watch_code(&mut self, block: &Block) {
        let pages = [block.gpa & !0xfff, block.gpa2];
        for &page in &pages[..1 + usize::from(block.crosses)] {
            let Some(slot) = self.slots.find(page) else {
                continue;
            };
            let old = slot
                .code_map(page)
                .fetch_or(block.chunks(page), Ordering::SeqCst);
            if old == 0 {
                self.slow_writes(page);
                for peer in self.machine.peers() {
                    if !std::sync::Arc::ptr_eq(&peer, &self.peer) {
                        peer.post(Mail::CodePage { page });
                    }
                }
            }
        }
        fence(Ordering::SeqCst);
    }

    /// Decodes as many instructions as belong into one block. Bytes used, and whether it
    /// ended for another reason than the end of the window.
    fn decode_window(
        &mut self,
        bytes: &[u8],
        page_offset: u64,
        mode: u8,
        ops: &mut Vec<Op>,
    ) -> (usize, bool) {
        let bitness = [16, 32, 64, 64][usize::from(mode & 3)];
        let mut decoder = Decoder::with_ip(bitness, bytes, 0, DecoderOptions::NO_WBNOINVD);
        let mut insn = Instruction::default();
        let max = if mode & MODE_SINGLE != 0 {
            1
        } else {
            MAX_INSTRUCTIONS
        };
        self.cache.flags.clear();
        if has_first_slot(mode) {
            let (op, _) = base_op(&Instruction::default(), 0, mode);
            ops.push(self.cache.native.first_slot(op));
        }
        let mut used = 0;
        let mut fusible = None;
        for _ in 0..max {
            if used == bytes.len() {
                break;
            }
            decoder.decode_out(&mut insn);
            if insn.is_invalid() {
                if decoder.last_error() == DecoderError::NoMoreBytes {
                    if used > 0 {
                        break;
                    }
                    return (0, false);
                }
                let (mut op, _) = base_op(&Instruction::default(), used as u16, mode);
                op.len = 1;
                if too_long(&bytes[used..], bitness) {
                    op.f = exec::overlong;
                }
                ops.push(op);
                return ((used + MAX_LENGTH).min(bytes.len()), true);
            }
            let end = used + insn.len();
            let (op, class) = base_op(&insn, used as u16, mode);
            let context = Context {
                cpu: self,
                insn: &insn,
                mode64: mode & 3 == 2,
                flat: mode & MODE_FLAT != 0,
                page_offset,
                op,
                class,
            };
            if let Some(compare) = fusible.take()
                && let Some(f) = control::fused(compare, &context)
                && let Some(last) = ops.last_mut()
            {
                last.f = f;
            }
            fusible = control::fusible(&context);
            let first = ops.len();
            let ended = context.emit(&bytes[used..end], ops);
            self.cache.flags.push(context.flag_use(first));
            used = end;
            if ended {
                drop_dead_flags(ops, &self.cache.flags);
                exec::fuse::fuse(ops);
                return (used, true);
            }
        }
        drop_dead_flags(ops, &self.cache.flags);
        exec::fuse::fuse(ops);
        let (mut op, _) = base_op(&Instruction::default(), used as u16, mode);
        op.len = 0;
        op.f = exec::branch::fall;
        op.imm = used as u64;
        op.b = u8::from(page_offset + (used as u64) < 4096);
        ops.push(op);
        (used, true)
    }
}

/// Whether blocks decoded in `mode` begin with a slot for `native`.
pub(crate) fn has_first_slot(mode: u8) -> bool {
    mode & (3 | MODE_SINGLE) == 2
}

/// The operations of one instruction of `block` by itself: as `op`, the first of those in the
/// block, but neither joined with others nor without flags. None if it ends its block.
pub(crate) fn alone(cpu: &Cpu, insn: &Instruction, bytes: &[u8], op: Op, block: &Block) -> Vec<Op> {
    let mode = block.mode;
    let (op, class) = base_op(insn, op.off, mode);
    let context = Context {
        cpu,
        insn,
        mode64: mode & 3 == 2,
        flat: mode & MODE_FLAT != 0,
        page_offset: block.gpa & 0xfff,
        op,
        class,
    };
    let mut ops = Vec::new();
    if context.emit(bytes, &mut ops) {
        ops.clear();
    }
    ops
}

/// Whether what starts at `bytes` is no instruction because it would be longer than any may be.
fn too_long(bytes: &[u8], bitness: u32) -> bool {
    let Some(most) = bytes.get(..MAX_LENGTH) else {
        return false;
    };
    // It starts with a prefix, then. What remains would still go on.
    let mut decoder = Decoder::with_ip(bitness, &most[1..], 0, DecoderOptions::NONE);
    let _ = decoder.decode();
    decoder.last_error() == DecoderError::NoMoreBytes
}

/// What an instruction does with the status flags, for finding those nobody looks at.
#[derive(Clone, Copy)]
pub(crate) struct FlagUse {
    /// Index of its operation.
    op: usize,
    /// It needs them, or may fault or stop: then all of them must be right before it.
    needs: bool,
    /// It sets all of them.
    sets: bool,
    /// Its handler without flags.
    quiet: Option<Handler>,
}

/// Gives instructions whose flags are overwritten before anyone can look at them the handlers
/// that don't compute them.
fn drop_dead_flags(ops: &mut [Op], flags: &[FlagUse]) {
    let mut live = true;
    for flag_use in flags.iter().rev() {
        if !live && let Some(f) = flag_use.quiet {
            ops[flag_use.op].f = f;
        }
        live = flag_use.needs || live && !flag_use.sets;
    }
}

impl Context<'_> {
    /// What this instruction, whose operation is number `op`, does with the status flags.
    fn flag_use(&self, op: usize) -> FlagUse {
        use iced_x86::{Mnemonic as M, RflagsBits};
        let plain = (0..self.insn.op_count()).all(|n| match self.insn.op_kind(n) {
            OpKind::Register => self.insn.op_register(n).is_gpr(),
            OpKind::Memory => false,
            _ => true,
        });
        // All others may fault, or are rare enough not to matter.
        let pure = plain
            && matches!(
                self.insn.mnemonic(),
                M::Add
                    | M::Or
                    | M::And
                    | M::Sub
                    | M::Xor
                    | M::Cmp
                    | M::Test
                    | M::Inc
                    | M::Dec
                    | M::Neg
                    | M::Not
                    | M::Shl
                    | M::Shr
                    | M::Sar
                    | M::Rol
                    | M::Ror
                    | M::Mov
                    | M::Movzx
                    | M::Movsx
                    | M::Movsxd
                    | M::Bswap
                    | M::Imul
                    | M::Cdqe
            )
            || matches!(self.insn.mnemonic(), M::Lea | M::Nop);
        let all = RflagsBits::OF
            | RflagsBits::SF
            | RflagsBits::ZF
            | RflagsBits::AF
            | RflagsBits::CF
            | RflagsBits::PF;
        let quiet = arith::quiet(self);
        // A shift by nothing leaves the flags alone.
        let shift = matches!(self.insn.mnemonic(), M::Shl | M::Shr | M::Sar);
        FlagUse {
            op,
            needs: !pure || self.insn.rflags_read() & all != 0,
            sets: self.insn.rflags_modified() & all == all && (!shift || quiet.is_some()),
            quiet,
        }
    }

    /// Adds one instruction's operations; whether the block ends with it.
    fn emit(&self, bytes: &[u8], ops: &mut Vec<Op>) -> bool {
        let op = self.op;
        let emit = control::exchange_like_pause(self, bytes)
            .or_else(|| arith::decode(self))
            .or_else(|| control::decode(self))
            .or_else(|| other::decode(self))
            .or_else(|| {
                let fp = simd::decode_fp(self.cpu, self.insn, bytes)?;
                let op = Op {
                    a: fp.a,
                    b: fp.b,
                    imm: fp.data,
                    ..op
                };
                Some(match (fp.fast, self.class) {
                    (Some(Fast::Registers(f)), _) => Emit::Next(f, op),
                    (Some(Fast::Memory { base, .. }), EaClass::Base) => Emit::Next(base, op),
                    (Some(Fast::Memory { full, .. }), EaClass::Full) => Emit::Next(full, op),
                    _ => Emit::Plain(fp.handler, op),
                })
            })
            .unwrap_or(Emit::End(exec::undefined, op));
        match emit {
            Emit::Nothing => false,
            Emit::Next(f, op) => {
                ops.push(Op { f, ..op });
                false
            }
            Emit::End(f, op) => {
                ops.push(Op { f, ..op });
                true
            }
            Emit::Branch(f, op) => {
                ops.push(Op { f, ..op });
                let b = self.links(u64::from(op.off) + u64::from(op.len));
                ops.push(Op { f, b, ..op });
                true
            }
            Emit::Plain(handler, op) => {
                push_plain(ops, exec::plain, handler, op);
                false
            }
            Emit::PlainEnd(handler, op) => {
                push_plain(ops, exec::plain_end, handler, op);
                true
            }
        }
    }
}

fn push_plain(ops: &mut Vec<Op>, f: Handler, handler: Plain, op: Op) {
    ops.push(Op { f, ..op });
    ops.push(Op {
        imm: handler as usize as u64,
        ..op
    });
}
