//! What instructions do to status flags and to the flow of control.

use iced_x86::{Instruction, Mnemonic, OpKind};

/// A jump or call to a fixed place.
pub fn is_branch(insn: &Instruction) -> bool {
    matches!(
        insn.op0_kind(),
        OpKind::NearBranch64 | OpKind::NearBranch32 | OpKind::NearBranch16
    )
}

/// Where it leads.
pub fn target(insn: &Instruction) -> u64 {
    insn.near_branch_target()
}

pub fn set_branch(insn: &mut Instruction, target: u64) {
    match insn.op0_kind() {
        OpKind::NearBranch64 => insn.set_near_branch64(target),
        OpKind::NearBranch32 => insn.set_near_branch32(target as u32),
        _ => insn.set_near_branch16(target as u16),
    }
}

/// Status flags without a defined value before each instruction and at the end, on any way
/// there. `None`: one of them is read.
pub fn undefined_flags(instructions: &[Instruction]) -> Option<Vec<u64>> {
    let mut undefined = vec![0; instructions.len() + 1];
    for (i, insn) in instructions.iter().enumerate() {
        let mut now = undefined[i];
        let pushes = matches!(
            insn.mnemonic(),
            Mnemonic::Pushf | Mnemonic::Pushfq | Mnemonic::Lahf
        );
        if status(insn.rflags_read()) & now != 0 || pushes && now != 0 {
            return None;
        }
        if !may_keep_flags(insn) {
            now &= !status(insn.rflags_modified());
        }
        now |= status(insn.rflags_undefined());
        undefined[i + 1] |= now;
        if is_branch(insn) {
            let target = instructions
                .iter()
                .position(|t| t.ip() == insn.near_branch_target());
            undefined[target.unwrap_or(instructions.len())] |= now;
        }
    }
    Some(undefined)
}

/// A string instruction.
pub fn is_repeatable(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Movsb
            | M::Movsw
            | M::Movsd
            | M::Movsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsd
            | M::Cmpsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
    )
}

/// Instructions that may leave the flags they usually write as they were.
pub fn may_keep_flags(insn: &Instruction) -> bool {
    use Mnemonic as M;
    is_repeatable(insn.mnemonic())
        || matches!(
            insn.mnemonic(),
            M::Shl
                | M::Shr
                | M::Sar
                | M::Sal
                | M::Rol
                | M::Ror
                | M::Rcl
                | M::Rcr
                | M::Shld
                | M::Shrd
        )
}

/// The tables' flag bits as RFLAGS bits (status flags only).
pub fn status(bits: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    [
        (B::OF, 11),
        (B::SF, 7),
        (B::ZF, 6),
        (B::AF, 4),
        (B::CF, 0),
        (B::PF, 2),
    ]
    .iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |flags, (_, shift)| flags | 1 << shift)
}
