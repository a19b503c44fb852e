//! From a block's guest code to host code.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::emit::{Emitter, PEXT_MASK};
use super::item::{Item, Kind, find_live_flags};
use super::{JumpTable, reached};
use crate::cpu::Cpu;
use crate::decode;
use crate::op::{Block, Op};

/// Result of a translation.
pub(super) enum Made {
    Code(Vec<u8>),
    /// It would gain nothing, or the guest's code has changed meanwhile.
    Nothing,
}

/// The instructions of a block and its operation that falls through at the end, if it does.
struct Listing {
    items: Vec<Item>,
    fall: Option<usize>,
    bytes: Vec<u8>,
}

/// Reads the block's code once more. `None`: it isn't what its operations were made of.
fn list(cpu: &Cpu, block: &Block, ops: &[Op]) -> Option<Listing> {
    let mut bytes = vec![0; block.len.into()];
    cpu.read_code(block.gpa, &mut bytes);
    let mut decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NO_WBNOINVD);
    let mut insn = Instruction::default();
    let mut items = Vec::new();
    // The first slot is no instruction's.
    let mut slot = 1;
    let mut used = 0;
    while used < bytes.len() {
        decoder.decode_out(&mut insn);
        let first = ops.get(slot)?;
        if insn.is_invalid() {
            items.push(Item::new(&insn, slot, 1));
            slot += 1;
            break;
        }
        let mine = |op: &&Op| usize::from(op.off) == used && usize::from(op.len) == insn.len();
        let slots = ops[slot..].iter().take_while(mine).count();
        if slots == 0 && usize::from(first.off) < used + insn.len() {
            return None;
        }
        items.push(Item::new(&insn, slot, slots));
        slot += slots;
        used += insn.len();
    }
    let fall = match ops.len() - slot {
        0 => {
            items.last_mut()?.kind = Kind::End;
            None
        }
        1 if ops[slot].len == 0 => Some(slot),
        _ => return None,
    };
    Some(Listing { items, fall, bytes })
}

/// Translates a block that has been found just now.
pub(super) fn compile(cpu: &mut Cpu, block: *const Block) -> Made {
    // SAFETY: the caller's: it is in this vCPU's cache, which does not lose it here.
    let b = unsafe { &*block };
    if b.crosses || b.stale.get() {
        return Made::Nothing;
    }
    // SAFETY: as above. Nothing is run here that would change them.
    let ops = unsafe { std::slice::from_raw_parts(b.ops.cast_const(), b.count.into()) };
    let Some(mut listing) = list(cpu, b, ops) else {
        return Made::Nothing;
    };
    let mut forced = vec![false; listing.items.len()];
    loop {
        for (item, &forced) in listing.items.iter_mut().zip(&forced) {
            item.settle(cpu, forced);
        }
        find_live_flags(&mut listing.items);
        let called = listing
            .items
            .iter()
            .filter(|i| i.kind == Kind::Call)
            .count();
        if 2 * called > listing.items.len() {
            return Made::Nothing;
        }
        for item in &mut listing.items {
            if item.kind == Kind::Call && item.copy.is_null() {
                let at = usize::from(ops[item.slot].off);
                let bytes = &listing.bytes[at..at + item.insn.len()];
                let mut copy = decode::alone(cpu, &item.insn, bytes, ops[item.slot], b);
                let Some(&last) = copy.last() else {
                    return Made::Nothing;
                };
                copy.push(Op { f: reached, ..last });
                item.copy = cpu.cache.keep(&copy);
                if item.copy.is_null() {
                    return Made::Nothing;
                }
            }
        }
        match emit(cpu, b, ops, &listing) {
            Ok(code) => return Made::Code(code),
            Err(unfit) => forced[unfit] = true,
        }
    }
}

/// The code, or the number of the instruction that can't be encoded with other registers.
fn emit(cpu: &Cpu, block: &Block, ops: &[Op], listing: &Listing) -> Result<Vec<u8>, usize> {
    let native = &cpu.cache.native;
    let mut emitter = Emitter::new(
        native.used,
        native.pext.then_some(PEXT_MASK),
        block.ops,
        block.stale.as_ptr().cast(),
        JumpTable::of(&cpu.cache),
    );
    emitter.begin();
    for (n, item) in listing.items.iter().enumerate() {
        emitter.item(item).map_err(|_| n)?;
    }
    match (listing.fall, listing.items.last()) {
        (None, Some(last)) => emitter.end_with(last, |n| ops[n]),
        (Some(fall), _) => emitter.fall(fall, ops[fall]),
        (None, None) => {}
    }
    Ok(emitter.finish())
}
