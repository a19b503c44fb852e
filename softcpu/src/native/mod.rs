//! Blocks that run often are translated into host code.
//!
//! The code does what the block's operations do in the common case, with the guest's own
//! instructions on other registers: general registers are taken into host registers as they are
//! needed, XMM registers into themselves, status flags live in the host's. Wherever something is
//! not common (a miss in the TLB, a unit that is off, an unknown branch target) it writes all
//! that to `CpuState` and leaves to the block's operation for that instruction, which starts
//! over: exceptions, devices, code that is written to are the operations' affair alone.
//! Instructions that are not translated run by their operations, called from the code.
//!
//! The first slot of a block in 64-bit mode counts its runs until it is translated; after that it
//! holds the way into the code. From code to code the way is a jump through that slot's `imm`,
//! which leads to `STUB` while there is none.

mod asm;
mod compile;
mod emit;
mod ends;
mod item;
mod layout;
mod registers;

use crate::cache::CodeCache;
use crate::cpu::Cpu;
use crate::exec;
use crate::op::{Block, Handler, Op};
use crate::simd::Arena;

/// Bytes of translated code of one vCPU: when they are used up everything decoded is dropped.
const SIZE: usize = 8 << 20;
/// Memory for code is looked after in pieces of this many bytes.
const WRITTEN: usize = 64 << 10;
/// Runs of a block before it is translated.
const THRESHOLD: u32 = 200;

/// Goes into translated code; returns the operation to go on with, or null.
type Enter = unsafe extern "sysv64" fn(cpu: *mut Cpu, code: u64) -> *const Op;

/// A vCPU's translated code.
#[derive(Debug)]
pub(crate) struct Native {
    /// None: this host allows no code to be made.
    arena: Option<Arena>,
    enter: Option<Enter>,
    /// Address of the code that leaves to the operation in RDX.
    stub: u64,
    /// Address of the first byte of code.
    base: u64,
    /// Bytes in use.
    used: usize,
    /// Memory was given out before: this CPU may have fetched other code from there.
    again: bool,
    /// PEXT is quick on this host.
    pext: bool,
    /// Code is made as for a host that has nothing beyond x86-64-v1.
    oldest: bool,
    threshold: u32,
    /// A block has run often enough.
    wanted: bool,
    /// The operation called from translated code went on to the next one.
    reached: bool,
}

/// What became of a translation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Done, or not to be done.
    Settled,
    /// There is no room any more.
    Full,
}

/// RBX, RBP, R12 to R15 and RDI, which leads into the `Cpu`, on the stack, then to the code.
const ENTER: &[u8] = &[
    0x48, 0x83, 0xef, 0x80, // sub rdi, -BIAS
    0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, // push rbx, rbp, r12..r15
    0x57, // push rdi
    0xff, 0xe6, // jmp rsi
];
/// Leaves to the operation in RDX.
const STUB: &[u8] = &[0x48, 0x89, 0xd0]; // mov rax, rdx
/// Leaves to the operation in RAX. Follows `STUB`.
const LEAVE: &[u8] = &[
    0x5f, // pop rdi
    0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, // pop r15..r12, rbp, rbx
    0xc3, // ret
];
/// Leaves to nothing at the address of a block that is not to run now. Followed by `LEAVE`.
const AWAY: &[u8] = &[
    0x48,
    0x8b,
    0x47,
    layout::BLOCK_RIP as u8, // mov rax, [block_rip]
    0x48,
    0x89,
    0x47,
    layout::RIP as u8, // mov [rip], rax
    0x31,
    0xc0, // xor eax, eax
];
const _: () = assert!(layout::BIAS == 128 && layout::RIP < 128 && layout::BLOCK_RIP >= 0);
/// Distance of `LEAVE` from the start.
const LEAVE_AT: usize = ENTER.len() + STUB.len();
/// Distance of `AWAY`.
const AWAY_AT: usize = LEAVE_AT + LEAVE.len();
/// Where PEXT's mask for TLB slots is.
const PEXT_MASK_AT: usize = 64;
/// Bytes they take.
const FIXED: usize = 80;
const _: () = assert!(AWAY_AT + AWAY.len() + LEAVE.len() <= PEXT_MASK_AT);

/// The jump cache's place and the mask of its index.
#[derive(Debug, Clone, Copy)]
struct JumpTable {
    base: u64,
    mask: i32,
}

impl JumpTable {
    fn of(cache: &CodeCache) -> Self {
        let (base, mask) = cache.jump_table();
        Self {
            base: base.addr() as u64,
            mask: mask as i32,
        }
    }
}

impl Default for Native {
    fn default() -> Self {
        let mut native = Self {
            arena: None,
            enter: None,
            stub: 0,
            base: 0,
            used: FIXED,
            again: false,
            pext: quick_pext(),
            oldest: false,
            threshold: THRESHOLD,
            wanted: false,
            reached: false,
        };
        match Arena::new(SIZE) {
            Ok(arena) => native.set_arena(arena),
            Err(error) => log::warn!("no memory for translated code, guests will be slow: {error}"),
        }
        native
    }
}

/// Whether PEXT exists and is not microcoded, as on AMD's before family 19h.
fn quick_pext() -> bool {
    if !is_x86_feature_detected!("bmi2") {
        return false;
    }
    let vendor = std::arch::x86_64::__cpuid(0).ecx;
    let version = std::arch::x86_64::__cpuid(1).eax;
    let family = (version >> 8 & 15) + (version >> 20 & 255);
    let amd = vendor == u32::from_le_bytes(*b"cAMD");
    !amd || family >= 0x19
}

impl Native {
    fn set_arena(&mut self, arena: Arena) {
        let mut fixed = [ENTER, STUB, LEAVE, AWAY, LEAVE].concat();
        fixed.resize(PEXT_MASK_AT, 0xcc);
        fixed.extend_from_slice(&emit::PEXT_MASK.to_le_bytes());
        // SAFETY: nobody knows this memory yet.
        let Some(base) = (unsafe { arena.place(0, &fixed) }) else {
            return;
        };
        self.base = base.addr() as u64;
        self.stub = self.base + ENTER.len() as u64;
        // SAFETY: `ENTER` has this signature.
        self.enter = Some(unsafe { std::mem::transmute::<*const u8, Enter>(base) });
        self.arena = Some(arena);
    }

    /// Forgets all code. None may be running.
    pub(crate) fn clear(&mut self) {
        self.again |= self.used > FIXED;
        if let Some(arena) = &self.arena
            && self.used > WRITTEN
        {
            arena.discard(WRITTEN, self.used);
        }
        self.used = FIXED;
        self.wanted = false;
    }

    /// A block's first slot.
    pub(crate) fn first_slot(&self, op: Op) -> Op {
        Op {
            f: warming,
            disp: self.threshold.into(),
            imm: self.stub,
            ..op
        }
    }

    /// A block has run often enough to be translated. Says so once.
    #[inline(always)]
    pub(crate) fn take_wanted(&mut self) -> bool {
        std::mem::take(&mut self.wanted)
    }

    /// To be called when a block with a first slot has become stale.
    ///
    /// # Safety
    /// `first` is a first slot.
    pub(crate) unsafe fn void(&self, first: *mut Op) {
        // SAFETY: the caller's promise.
        unsafe { (*first).imm = self.stub };
    }

    /// Puts code where `used` says. `None`: no room.
    pub(crate) fn place(&mut self, code: &[u8]) -> Option<u64> {
        let arena = self.arena.as_ref()?;
        // SAFETY: nothing of this vCPU runs translated code now, and these bytes belong to no
        // block.
        let at = unsafe { arena.place(self.used, code)? };
        let before = self.used / WRITTEN;
        self.used += code.len().next_multiple_of(16);
        let now = self.used / WRITTEN;
        if now != before {
            arena.written(before * WRITTEN, now * WRITTEN);
        }
        if self.again {
            // Written under another address than it is fetched from (Intel SDM vol. 3, 8.1.3).
            std::arch::x86_64::__cpuid(0);
        }
        Some(at.addr() as u64)
    }
}

/// Handler of a first slot: counts.
unsafe fn warming(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler); slots are this vCPU's own.
    unsafe {
        let first = &mut *op.cast_mut();
        first.disp -= 1;
        if first.disp >= 0 {
            return exec::next(cpu, op);
        }
    }
    // Translating may drop blocks, so that none may be running.
    cpu.cache.native.wanted = true;
    cpu.link = std::ptr::null_mut();
    cpu.s.rip = cpu.s.block_rip;
}

/// Handler of a first slot: there is code.
unsafe fn native(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise (op::Handler): `imm` leads to code of this block, which returns
    // null or an operation of a live block.
    unsafe {
        let Some(enter) = cpu.cache.native.enter else {
            return exec::next(cpu, op);
        };
        let next = enter(cpu, (*op).imm);
        if !next.is_null() {
            ((*next).f)(cpu, next);
        }
    }
}

/// Handler after the copy of an operation that is called from code.
unsafe fn reached(cpu: &mut Cpu, _: *const Op) {
    cpu.cache.native.reached = true;
}

/// Runs one operation for translated code: a copy that is followed by `reached`. 0: it did not go
/// on to the next.
unsafe extern "sysv64" fn run_one(cpu: *mut Cpu, op: *const Op) -> u32 {
    // SAFETY: the code passes on the `Cpu` it was entered with, of which the handler that entered
    // makes no use meanwhile, and an operation that `compile` made for it.
    unsafe {
        let cpu = &mut *cpu;
        cpu.cache.native.reached = false;
        ((*op).f)(cpu, op);
        cpu.cache.native.reached.into()
    }
}

impl Cpu {
    /// Blocks that have run more than `runs` times are translated.
    pub fn translate_after(&mut self, runs: u32) {
        self.cache.native.threshold = runs;
        self.cache.clear();
        self.link = std::ptr::null_mut();
    }

    /// Whether code is made as for a host with no instructions beyond x86-64-v1, which is otherwise
    /// found out. For tests: every host has those.
    pub fn translate_for_oldest_host(&mut self, oldest: bool) {
        self.cache.native.oldest = oldest;
        self.cache.native.pext = !oldest && quick_pext();
        self.cache.clear();
        self.link = std::ptr::null_mut();
    }

    /// Translates `block`, which is about to run. None may be running.
    pub(crate) fn make_native(&mut self, block: *const Block) -> Outcome {
        // SAFETY: `find_block` returned it just now.
        let first = unsafe { (*block).ops };
        // SAFETY: a block has operations.
        let op = unsafe { &mut *first };
        if op.f as usize != warming as Handler as usize || op.disp >= 0 {
            return Outcome::Settled;
        }
        if self.cache.full() {
            return Outcome::Full;
        }
        op.f = exec::nop;
        match compile::compile(self, block) {
            compile::Made::Code(code) => match self.cache.place(&code) {
                Some(at) => {
                    op.imm = at;
                    op.f = native;
                }
                None if self.cache.native.arena.is_some() => return Outcome::Full,
                None => {}
            },
            compile::Made::Nothing => {}
        }
        Outcome::Settled
    }
}
