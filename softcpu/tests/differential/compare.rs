//! Differences between two final states, in words.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};

use crate::case::{CODE, DATA, DATA_LEN, Output, XMM, YMM_HIGH, settle_xsave};
use crate::generate::Case;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
/// Status flags and DF: what user code can see change here.
const FLAGS: u64 = 0xcd5;

/// The instructions of a case.
pub fn listing(case: &Case) -> String {
    let mut text = String::new();
    for insn in &case.instructions {
        let at = (insn.ip() - case.input.shape.code()) as usize;
        let bits = case.input.shape.bits;
        let decoded = Decoder::with_ip(
            bits,
            &case.input.code[at..],
            insn.ip(),
            DecoderOptions::NONE,
        )
        .decode();
        let bytes = &case.input.code[at..at + decoded.len()];
        let _ = writeln!(
            text,
            "    {:x}: {:?} {bytes:02x?}",
            insn.ip(),
            decoded.code()
        );
    }
    text
}

/// The encoding forms of a case.
pub fn forms(case: &Case) -> String {
    let names: Vec<_> = case
        .instructions
        .iter()
        .map(|i| format!("{:?}", i.code()))
        .collect();
    names.join(" ")
}

/// By how many bytes a page fault's address may differ.
fn slack(case: &Case) -> u64 {
    use Mnemonic as M;
    let long = case.instructions.iter().any(|i| {
        matches!(
            i.mnemonic(),
            M::Fxrstor
                | M::Fxrstor64
                | M::Frstor
                | M::Fldenv
                | M::Maskmovq
                | M::Maskmovdqu
                | M::Vmaskmovdqu
        )
    });
    // Which of two bad operands is read first, neither.
    let two = case
        .instructions
        .iter()
        .any(|i| matches!(i.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq));
    match (two, long) {
        (true, _) => u64::MAX,
        (_, true) => 512,
        _ => 0,
    }
}

/// Whether which bytes are accessed depends on a register.
fn is_masked(insn: &Instruction) -> bool {
    let name = format!("{:?}", insn.mnemonic()).to_lowercase();
    name.contains("mask") && !name.contains("msk") || name.contains("gather")
}

/// What processors differ in.
fn unspecified(case: &Case, expected: &Output, actual: &Output) -> bool {
    use Mnemonic as M;
    // AMD's MXCSR.MM, which isn't offered.
    if expected.xsave[26] & 2 != 0 {
        return true;
    }
    // An address that is misaligned as well as out of bounds raises the one or the other.
    let checked = case.input.rflags & 1 << 18 != 0;
    let any = |filter: fn(&Instruction) -> bool| case.instructions.iter().any(filter);
    let (host, ours) = (expected.vector, actual.vector);
    if checked && (matches!((host, ours), (17, 12..=14) | (12..=14, 17)) || any(is_masked)) {
        return true;
    }
    if matches!((host, ours), (12, 13) | (13, 12)) && any(|i| i.memory_size().size() >= 16) {
        return true;
    }
    // An operand that runs over the end of 4 GiB may wrap around or exceed the segment.
    let wraps = case.input.shape.bits == 32 && (expected.cr2 as i32).unsigned_abs() < 64;
    if expected.vector == 14 && wraps {
        return true;
    }
    // This host's MASKMOV also faults at bytes that are not selected, and its POPA has popped
    // some registers already when it faults.
    let masked =
        |i: &Instruction| matches!(i.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu);
    expected.vector == 14 && any(masked)
        || matches!(expected.vector, 12..=14 | 17)
            && any(|i| matches!(i.mnemonic(), M::Popa | M::Popad))
}

/// What differs, or `None`.
pub fn difference(
    case: &Case,
    data: &[u8; DATA_LEN],
    expected: &Output,
    actual: &Output,
) -> Option<String> {
    if unspecified(case, expected, actual) {
        return None;
    }
    let mut text = String::new();
    let mut note = |name: &str, before: u64, host: u64, ours: u64| {
        if host != ours {
            let _ = writeln!(
                text,
                "  {name}: {before:#x} -> host {host:#x}, here {ours:#x}"
            );
        }
    };
    // Outside 64-bit mode there are 8 registers of 32 bits; what becomes of the rest is open.
    let (registers, mask) = if case.input.shape.bits == 64 {
        (16, u64::MAX)
    } else {
        (8, 0xffff_ffff)
    };
    for (i, name) in NAMES.iter().enumerate().take(registers) {
        note(
            name,
            case.input.gpr[i],
            expected.gpr[i] & mask,
            actual.gpr[i] & mask,
        );
    }
    note("rip", case.input.shape.code(), expected.rip, actual.rip);
    let flags = FLAGS & !case.undefined(expected.rip);
    note(
        "flags",
        case.input.rflags & flags,
        expected.rflags & flags,
        actual.rflags & flags,
    );
    note("vector", 0, expected.vector, actual.vector);
    if expected.vector == actual.vector {
        // The kernel reports an error code of its own for traps without one.
        if matches!(expected.vector, 10..=14 | 17) {
            // What else is in the host's address space is its own affair.
            let ours =
                expected.cr2.wrapping_sub(DATA) < DATA_LEN as u64 || expected.cr2 & !0xfff == CODE;
            let hidden = u64::from(expected.vector == 14 && !ours);
            note(
                "error code",
                0,
                expected.error & !hidden,
                actual.error & !hidden,
            );
        }
        // Which byte of a long operand is touched first is nobody's business.
        if expected.vector == 14 && expected.cr2.abs_diff(actual.cr2) > slack(case) {
            note("cr2", 0, expected.cr2, actual.cr2);
        }
    }
    let (mut host, mut ours) = (expected.xsave, actual.xsave);
    settle_xsave(&mut host);
    settle_xsave(&mut ours);
    let before = &case.input.xsave;
    let word = |area: &[u8], at: usize, len: usize| {
        area[at..at + len]
            .iter()
            .rev()
            .fold(0_u64, |v, &b| v << 8 | u64::from(b))
    };
    // With several exceptions in one instruction of which some are unmasked, which others get
    // recorded depends on the order of its steps.
    if expected.vector == 19 && actual.vector == 19 {
        for area in [&mut host, &mut ours] {
            area[24] &= !0x3f;
        }
    }
    for (name, at, len) in [
        ("fcw", 0, 2),
        ("fsw", 2, 2),
        ("ftw", 4, 1),
        ("mxcsr", 24, 4),
    ] {
        note(
            name,
            word(before, at, len),
            word(&host, at, len),
            word(&ours, at, len),
        );
    }
    let mut slots = |name: &str, start: usize, count: usize, len: usize| {
        for i in 0..count {
            let at = start + 16 * i;
            let (h, o) = (&host[at..at + len], &ours[at..at + len]);
            if h != o {
                let _ = writeln!(
                    text,
                    "  {name}{i}: {:02x?}\n    host {h:02x?}\n    here {o:02x?}",
                    &before[at..at + len]
                );
            }
        }
    };
    slots("st", 32, 8, 10);
    slots("xmm", XMM.start, 16, 16);
    slots("ymm high ", YMM_HIGH.start, 16, 16);
    let mut shown = 0;
    for i in (0..DATA_LEN).step_by(8) {
        let range = i..i + 8;
        if expected.data[range.clone()] != actual.data[range.clone()] && shown < 4 {
            shown += 1;
            let _ = writeln!(
                text,
                "  memory {:x}: {:02x?}\n    host {:02x?}\n    here {:02x?}",
                DATA + i as u64,
                &data[range.clone()],
                &expected.data[range.clone()],
                &actual.data[range]
            );
        }
    }
    (!text.is_empty()).then(|| format!("{}{text}", listing(case)))
}
