//! Decoded code: blocks by guest-physical address, and the way to them from an instruction
//! pointer.
//!
//! Every vCPU has its own, so nothing here is locked. Blocks are never freed one by one: one
//! whose guest code changed is made stale, and memory comes back when the whole cache is
//! dropped because it has grown too large.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::decode::{FlagUse, has_first_slot};
use crate::native::Native;
use crate::op::{Block, Handler, Op};
use crate::run::{stale, stale_block};

/// Slots of operations in one piece of the arena.
const PIECE: usize = 1024;
/// Blocks in one piece of their arena.
const BLOCK_PIECE: usize = 256;
/// Bytes that all caches of the process may fill together.
const MOST: usize = 12 << 20;
/// Bytes that each may fill in any case.
const SHARE: usize = 1 << 20;
/// Bytes that they fill.
static FILLED: AtomicUsize = AtomicUsize::new(0);
const HASH_BITS: u32 = 15;
const JUMP_SIZE: usize = 8192;
const SEEN_WORDS: usize = 64;

/// An address recently jumped to. Known to translated code.
#[repr(C)]
#[derive(Clone, Copy)]
struct Jump {
    linear: u64,
    key: u64,
    ops: *const Op,
    block: *const Block,
}

const NO_JUMP: Jump = Jump {
    linear: 0,
    key: u64::MAX,
    ops: std::ptr::null(),
    block: std::ptr::null(),
};

/// The decoded code of one vCPU.
pub(crate) struct CodeCache {
    ops: Vec<Box<[Op]>>,
    ops_used: usize,
    blocks: Vec<Vec<Block>>,
    hash: Box<[*const Block]>,
    pages: HashMap<u64, Vec<*const Block>>,
    jump: Box<[Jump]>,
    /// What a jump entry of the lower (upper) half must carry to be valid now.
    key: [u64; 2],
    ways: Ways,
    /// Ways in the upper half by global pages alone, which all address spaces have in common.
    common: Half,
    /// Bytes of operations, blocks and translated code.
    filled: usize,
    /// The generation used last.
    newest: u64,
    context: u64,
    /// Times the whole cache was dropped.
    pub dropped: u64,
    /// Where a block's operations are collected.
    pub scratch: Vec<Op>,
    /// What they do with the status flags.
    pub flags: Vec<FlagUse>,
    /// Blocks translated into host code.
    pub native: Native,
}

impl std::fmt::Debug for CodeCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeCache")
            .field("pages", &self.pages.len())
            .finish_non_exhaustive()
    }
}

impl Default for CodeCache {
    fn default() -> Self {
        Self {
            ops: Vec::new(),
            ops_used: PIECE,
            blocks: Vec::new(),
            hash: vec![std::ptr::null(); 1 << HASH_BITS].into(),
            pages: HashMap::new(),
            jump: vec![NO_JUMP; JUMP_SIZE].into(),
            key: [0; 2],
            ways: Ways {
                lower: Half::new(1),
                upper: None,
            },
            common: Half::new(2),
            filled: 0,
            newest: 2,
            context: 0,
            dropped: 0,
            scratch: Vec::new(),
            flags: Vec::new(),
            native: Native::default(),
        }
    }
}

const _: () = assert!(size_of::<Jump>() == 32);

impl Drop for CodeCache {
    fn drop(&mut self) {
        self.emptied();
    }
}

/// Which jump entries are valid in half an address space.
#[derive(Debug, Clone, Copy)]
struct Half {
    /// No two halves share one.
    generation: u64,
    /// Hashed linear pages that jump entries may exist for.
    seen: [u64; SEEN_WORDS],
}

impl Half {
    fn new(generation: u64) -> Self {
        Self {
            generation,
            seen: [0; SEEN_WORDS],
        }
    }

    fn has_seen(&self, linear: u64) -> bool {
        let (word, bit) = seen_slot(linear);
        self.seen[word] >> bit & 1 != 0
    }
}

/// Which jump entries are valid in an address space.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ways {
    lower: Half,
    /// Of the upper half, once it has led through a page that is not global: until then the
    /// common ones hold.
    upper: Option<Half>,
}

impl Ways {
    /// Forgets those of a linear page that are its own.
    fn forget_page(&mut self, linear: u64, newest: &mut u64) {
        let half = if linear >> 63 == 0 {
            Some(&mut self.lower)
        } else {
            self.upper.as_mut()
        };
        if let Some(half) = half
            && half.has_seen(linear)
        {
            *newest += 1;
            *half = Half::new(*newest);
        }
    }
}

#[inline(always)]
fn jump_slot(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize & (JUMP_SIZE - 1)
}

fn hash_slot(gpa: u64, mode: u8) -> usize {
    ((gpa ^ u64::from(mode) << 3).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - HASH_BITS)) as usize
}

fn seen_slot(linear: u64) -> (usize, u32) {
    let page = linear >> 12;
    let hash = page ^ page >> 12;
    ((hash >> 6) as usize % SEEN_WORDS, (hash % 64) as u32)
}

impl CodeCache {
    /// Distance of the keys by half: jump entries at 8 are compared with them.
    pub(crate) const KEY: usize = std::mem::offset_of!(Self, key);

    /// The jump cache, and the mask of its index.
    pub(crate) fn jump_table(&self) -> (*const u8, usize) {
        (self.jump.as_ptr().cast(), JUMP_SIZE - 1)
    }

    /// Accounts for `bytes` more.
    fn fill(&mut self, bytes: usize) {
        self.filled += bytes;
        FILLED.fetch_add(bytes, Ordering::Relaxed);
    }

    fn emptied(&mut self) {
        FILLED.fetch_sub(std::mem::take(&mut self.filled), Ordering::Relaxed);
    }

    /// Puts translated code where it is to run. `None`: there is no room.
    pub(crate) fn place(&mut self, code: &[u8]) -> Option<u64> {
        let at = self.native.place(code)?;
        self.fill(code.len());
        Some(at)
    }

    fn update_keys(&mut self) {
        let upper = self.ways.upper.as_ref().unwrap_or(&self.common);
        self.key[0] = self.ways.lower.generation << 8 | self.context;
        self.key[1] = upper.generation << 8 | self.context;
    }

    fn next_half(&mut self) -> Half {
        self.newest += 1;
        Half::new(self.newest)
    }

    /// The mode code runs in now.
    #[inline]
    pub(crate) fn set_context(&mut self, mode: u8, user: bool) {
        self.context = u64::from(mode) << 1 | u64::from(user);
        self.update_keys();
    }

    /// Drops everything. No block may be running.
    pub(crate) fn clear(&mut self) {
        self.hash.fill(std::ptr::null());
        self.pages = HashMap::new();
        self.emptied();
        self.ops.clear();
        self.ops_used = PIECE;
        self.blocks.clear();
        self.jump.fill(NO_JUMP);
        self.native.clear();
        self.dropped += 1;
        self.forget_addresses(true);
    }

    /// The ways from linear addresses to blocks are void: those by pages that are not global,
    /// and the others too if `global`.
    pub(crate) fn forget_addresses(&mut self, global: bool) {
        self.ways = self.fresh_ways();
        if global {
            self.common = self.next_half();
        }
        self.update_keys();
    }

    /// The ways of an address space nothing is known of.
    pub(crate) fn fresh_ways(&mut self) -> Ways {
        Ways {
            lower: self.next_half(),
            upper: None,
        }
    }

    /// Code was found by a page of the upper half that is not global.
    pub(crate) fn local_upper(&mut self) {
        if self.ways.upper.is_none() {
            self.ways.upper = Some(self.next_half());
            self.update_keys();
        }
    }

    /// Goes over to another address space; the ways of the one before.
    pub(crate) fn replace_ways(&mut self, ways: Ways) -> Ways {
        let before = std::mem::replace(&mut self.ways, ways);
        self.update_keys();
        before
    }

    /// The same for one linear page.
    pub(crate) fn forget_page(&mut self, linear: u64) {
        self.ways.forget_page(linear, &mut self.newest);
        if linear >> 63 != 0 && self.common.has_seen(linear) {
            self.common = self.next_half();
        }
        self.update_keys();
    }

    /// The same for an address space that is not running; what is common is `forget_page`'s.
    pub(crate) fn forget_page_of(&mut self, ways: &mut Ways, linear: u64) {
        ways.forget_page(linear, &mut self.newest);
    }

    /// The block at a linear address, if the way there is still known.
    #[inline(always)]
    pub(crate) fn jump(&self, linear: u64) -> Option<*const Block> {
        let entry = &self.jump[jump_slot(linear)];
        // SAFETY: an entry with a valid key points to a block of the arena: dropping the
        // arena clears the entries.
        (entry.linear == linear
            && entry.key == self.key[(linear >> 63) as usize]
            && !unsafe { &*entry.block }.stale.get())
        .then_some(entry.block)
    }

    /// The first operation of the block at a linear address, if the way there is still known.
    /// It may be stale.
    #[inline(always)]
    pub(crate) fn jump_ops(&self, linear: u64) -> Option<*const Op> {
        // SAFETY: jump_slot() is below JUMP_SIZE, the length of `jump`.
        let entry = unsafe { self.jump.get_unchecked(jump_slot(linear)) };
        (entry.linear == linear && entry.key == self.key[(linear >> 63) as usize])
            .then_some(entry.ops)
    }

    /// Remembers the way to `block`.
    pub(crate) fn remember(&mut self, linear: u64, block: *const Block) {
        self.jump[jump_slot(linear)] = Jump {
            linear,
            key: self.key[(linear >> 63) as usize],
            // SAFETY: as in `jump`: the caller got it from this cache just now.
            ops: unsafe { (*block).ops },
            block,
        };
        // SAFETY: as in `jump`: the caller got it from this cache just now.
        let len = u64::from(unsafe { &*block }.len);
        for addr in [linear, linear.wrapping_add(len.saturating_sub(1))] {
            let (word, bit) = seen_slot(addr);
            let half = if addr >> 63 == 0 {
                &mut self.ways.lower
            } else {
                self.ways.upper.as_mut().unwrap_or(&mut self.common)
            };
            half.seen[word] |= 1 << bit;
        }
    }

    /// Where the blocks of 64-bit code begin that were jumped to lately.
    pub(crate) fn recent(&self) -> Vec<u64> {
        let all = self.jump.iter().filter_map(|entry| {
            // SAFETY: as in `jump`; entries that never were in use are null.
            let block = unsafe { entry.block.as_ref() }?;
            (has_first_slot(block.mode) && !block.crosses && !block.stale.get())
                .then_some(block.gpa)
        });
        let mut all: Vec<u64> = all.collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Whether there is a block from `gpa` in `mode`.
    pub(crate) fn has(&self, gpa: u64, mode: u8) -> bool {
        self.find(gpa, gpa, mode).is_some()
    }

    /// The block decoded from `gpa` in `mode`. Once it was at `linear`, perhaps.
    pub(crate) fn find(&self, linear: u64, gpa: u64, mode: u8) -> Option<&Block> {
        // A way that has become void often leads where it did.
        let entry = &self.jump[jump_slot(linear)];
        // SAFETY: as in `jump`; entries that never were in use are null.
        if let Some(b) = unsafe { entry.block.as_ref() }
            && (b.gpa, b.mode) == (gpa, mode)
            && !b.stale.get()
        {
            return Some(b);
        }
        let mut block = self.hash[hash_slot(gpa, mode)];
        // SAFETY: the chain holds blocks of the arena only.
        while let Some(b) = unsafe { block.as_ref() } {
            if b.gpa == gpa && b.mode == mode {
                return Some(b);
            }
            block = b.hash_next.get();
        }
        None
    }

    /// The cache has reached its limit: `clear` it before inserting more.
    pub(crate) fn full(&self) -> bool {
        self.filled > SHARE && FILLED.load(Ordering::Relaxed) > MOST
    }

    /// Keeps operations until everything is dropped. Null: there are none.
    pub(crate) fn keep(&mut self, ops: &[Op]) -> *mut Op {
        if self.ops_used + ops.len() > PIECE {
            let Some(&filler) = ops.first() else {
                return std::ptr::null_mut();
            };
            let len = PIECE.max(ops.len());
            self.ops.push(vec![filler; len].into_boxed_slice());
            self.fill(len * size_of::<Op>());
            self.ops_used = 0;
        }
        let Some(piece) = self.ops.last_mut() else {
            return std::ptr::null_mut();
        };
        let dest = &mut piece[self.ops_used..self.ops_used + ops.len()];
        dest.copy_from_slice(ops);
        self.ops_used += ops.len();
        dest.as_mut_ptr()
    }

    /// Adds a block.
    pub(crate) fn insert(&mut self, ops: &[Op], mut block: Block) -> *const Block {
        block.ops = self.keep(ops);
        if block.ops.is_null() {
            return std::ptr::null();
        }
        block.count = ops.len() as u16;
        let bucket = hash_slot(block.gpa, block.mode);
        block.hash_next = Cell::new(self.hash[bucket]);

        if self.blocks.last().is_none_or(|p| p.len() == BLOCK_PIECE) {
            self.blocks.push(Vec::with_capacity(BLOCK_PIECE));
            // With their places in the pages' lists.
            self.fill(BLOCK_PIECE * (size_of::<Block>() + 16));
        }
        let Some(piece) = self.blocks.last_mut() else {
            return std::ptr::null();
        };
        // The vector never grows past its capacity, so blocks don't move.
        piece.push(block);
        let block: *const Block = &raw const piece[piece.len() - 1];
        self.hash[bucket] = block;
        // SAFETY: just placed.
        let b = unsafe { &*block };
        self.pages.entry(b.gpa & !0xfff).or_default().push(block);
        if b.crosses {
            self.pages.entry(b.gpa2).or_default().push(block);
        }
        block
    }

    /// Makes every block stale that was decoded from one of these 64-byte chunks of a page.
    pub(crate) fn invalidate(&mut self, page: u64, chunks: u64) {
        let Some(mut list) = self.pages.remove(&page) else {
            return;
        };
        list.retain(|&block| {
            // SAFETY: the lists hold blocks of the arena only.
            let b = unsafe { &*block };
            if b.stale.get() {
                return false;
            }
            if b.chunks(page) & chunks == 0 {
                return true;
            }
            self.unlink(block);
            b.stale.set(true);
            if has_first_slot(b.mode) {
                // SAFETY: its first operation is one.
                unsafe { self.native.void(b.ops) };
            }
            let mut handler: Handler = stale_block;
            for i in 0..usize::from(b.count) {
                // SAFETY: `ops` points to `count` operations of the arena. The block may be
                // running: its handlers read the next operation's address only after the
                // write that brought us here.
                unsafe { (*b.ops.add(i)).f = handler };
                handler = stale;
            }
            false
        });
        if !list.is_empty() {
            self.pages.insert(page, list);
        }
    }

    fn unlink(&mut self, block: *const Block) {
        // SAFETY: blocks of the arena only, here and in the chain.
        let b = unsafe { &*block };
        let bucket = hash_slot(b.gpa, b.mode);
        if self.hash[bucket] == block {
            self.hash[bucket] = b.hash_next.get();
            return;
        }
        let mut at = self.hash[bucket];
        // SAFETY: as above.
        while let Some(other) = unsafe { at.as_ref() } {
            if other.hash_next.get() == block {
                other.hash_next.set(b.hash_next.get());
                return;
            }
            at = other.hash_next.get();
        }
    }
}

impl Block {
    /// Which 64-byte chunks of `page` it was decoded from.
    pub(crate) fn chunks(&self, page: u64) -> u64 {
        let range = |first: u64, last: u64| {
            let (first, last) = (first >> 6 & 63, last >> 6 & 63);
            (u64::MAX >> (63 - (last - first))) << first
        };
        let last = self.gpa + u64::from(self.len).max(1) - 1;
        let mut chunks = 0;
        if self.gpa & !0xfff == page {
            chunks |= range(self.gpa, last.min(page | 0xfff));
        }
        if self.crosses && self.gpa2 == page {
            chunks |= range(0, last & 0xfff);
        }
        chunks
    }
}
