//! Decoded operations and blocks of them.
//!
//! A block is a straight run of operations decoded from one physical page, the last of which
//! decides where to go on. Operations run threaded: each handler calls the next one, and the
//! last one of a block the first of the next, as its last act. Release builds turn that into
//! a jump; without it the stack is bounded by `Cpu::left` and the length of a block.

use std::cell::Cell;

use crate::cpu::Cpu;
use crate::exception::Exception;

/// A handler as blocks call it. It goes on with the next operation, or with the next block,
/// until something wants attention: then it returns with `CpuState::rip` set.
///
/// # Safety
/// `op` points into a live block of `cpu`, which ends with an operation that doesn't fall
/// through.
pub type Handler = unsafe fn(cpu: &mut Cpu, op: *const Op);

/// A handler in plain Rust, for whatever is not hot: `cpu.s.rip` already points to the next
/// instruction, and may be changed where the operation ends its block. On `Err` nothing has
/// been changed that the guest could see.
pub type Plain = fn(cpu: &mut Cpu, op: &Op) -> Result<(), Exception>;

/// One decoded instruction (or one fused pair). `Plain` ones take two slots, see `Op::plain`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Op {
    /// What runs it.
    pub f: Handler,
    /// First register operand: byte offset from `CpuState::gpr` (AH is 1). For helpers' own
    /// operations: theirs.
    pub a: u8,
    /// Second register operand, as `a`.
    pub b: u8,
    /// Base register of the memory operand: byte offset (`Op::NO_REG` where none, `Op::RIP`
    /// for RIP-relative: `disp` then counts from the block's start).
    pub base: u8,
    /// Index register, as `base`.
    pub index: u8,
    /// Memory operand: scale (bits 0..2, log2), segment (2..5), `Op::EA_*` (5..7).
    pub ea: u8,
    /// Length of the instruction in bytes.
    pub len: u8,
    /// Its offset from the block's start.
    pub off: u16,
    /// Displacement of the memory operand. In a branch's slot: the address of the first
    /// operation of the block it leads to, once known (0 before).
    pub disp: i64,
    /// Immediate operand, branch target relative to the block's start, or the owner's data.
    pub imm: u64,
}

const _: () = assert!(size_of::<Op>() == 32);

impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Op")
            .field("off", &self.off)
            .field("len", &self.len)
            .field("a", &self.a)
            .field("b", &self.b)
            .finish_non_exhaustive()
    }
}

impl Op {
    /// Byte offset of `CpuState::zero`.
    pub const NO_REG: u8 = 128;
    /// Byte offset of `CpuState::block_rip`.
    pub const RIP: u8 = 136;
    /// 64-bit addresses.
    pub const EA_64: u8 = 0;
    /// 64-bit mode with the address-size prefix: the offset is cut to 32 bits.
    pub const EA_64_32: u8 = 1;
    /// Segmented with 32-bit offsets.
    pub const EA_32: u8 = 2;
    /// Segmented with 16-bit offsets.
    pub const EA_16: u8 = 3;

    /// log2 of the index register's factor.
    #[inline(always)]
    pub fn scale(&self) -> u32 {
        u32::from(self.ea & 3)
    }

    /// Segment register of the memory operand.
    #[inline(always)]
    pub fn seg(&self) -> usize {
        usize::from(self.ea >> 2 & 7)
    }

    /// `Op::EA_*`.
    #[inline(always)]
    pub fn ea_kind(&self) -> u8 {
        self.ea >> 5
    }
}

/// A decoded block. Lives until the whole code cache of its vCPU is dropped; one that guest
/// writes made stale has all its operations' handlers replaced.
#[derive(Debug)]
#[repr(C)]
pub struct Block {
    /// First operation.
    pub ops: *mut Op,
    /// Number of slots at `ops`.
    pub count: u16,
    /// Bytes of guest code.
    pub len: u16,
    /// Mode it was decoded in (see `Cpu::mode`; bit 3: one instruction only).
    pub mode: u8,
    /// Guest code was overwritten.
    pub stale: Cell<bool>,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Page of the bytes that lie past the end of the first page, or 0 with `crosses` false.
    pub gpa2: u64,
    /// The last instruction continues on another page.
    pub crosses: bool,
    /// Next block in the same bucket of the look-up table.
    pub hash_next: Cell<*const Block>,
}
