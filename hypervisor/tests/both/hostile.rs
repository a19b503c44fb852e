//! States that a damaged or forged file could bring: the software CPU takes or refuses them,
//! and runs on until it is kicked.

use std::sync::Arc;
use std::time::Duration;

use hypervisor::{Backend, Exit, RunState, VcpuState};

use crate::guests;
use crate::rig::{Mode, Rig};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// Mostly small, at times anything.
    fn value(&mut self) -> u64 {
        match self.below(4) {
            0 => self.next(),
            1 => 1 << self.below(64),
            2 => u64::MAX << self.below(64),
            _ => self.below(0x20_0000),
        }
    }
}

fn damage(state: &mut VcpuState, random: &mut Random) {
    let value = random.value();
    let sregs = &mut state.sregs;
    match random.below(22) {
        0 => sregs.cr0 = value,
        1 => sregs.cr3 = value,
        2 => sregs.cr4 = value,
        3 => sregs.efer = value,
        4 => sregs.cr8 = value,
        5 => sregs.apic_base = value,
        6 => sregs.cs.access = value as u32,
        7 => sregs.ss.access = value as u32,
        8 => sregs.ds.base = value,
        9 => sregs.cs.limit = value as u32,
        10 => sregs.gdt.base = value,
        11 => sregs.idt.base = value,
        12 => sregs.tr.base = value,
        13 => state.regs.rip = value,
        14 => state.regs.rflags = value,
        15 => state.regs.rsp = value,
        16 => state.debug[random.below(6) as usize] = value,
        17 => {
            let at = random.below(state.apic.len() as u64) as usize;
            state.apic[at] = value as u8;
        }
        18 => {
            let at = random.below(state.xsave.len() as u64) as usize;
            state.xsave[at] = value as u8;
        }
        19 => state.xcr0 = value,
        20 => {
            let at = random.below(state.msrs.len() as u64) as usize;
            state.msrs[at].1 = value;
        }
        _ => {
            let vector = value as u8;
            let code = (value & 0x100 != 0).then_some(value as u32);
            state.events.exception = (value & 0x200 != 0).then_some((vector, code));
            state.events.interrupt = (value & 0x400 != 0).then_some(vector);
            state.events.interrupt_shadow = value & 0x800 != 0;
            state.events.nmi_pending = value & 0x1000 != 0;
            state.events.nmi_masked = value & 0x2000 != 0;
            state.run_state = [RunState::Runnable, RunState::Halted, RunState::WaitForSipi]
                [(value >> 16) as usize % 3];
        }
    }
}

#[test]
fn a_forged_state_harms_only_its_guest() {
    let seed = 0x5eed_57a7;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    for round in 0..150 {
        let mode = [Mode::Real, Mode::Protected, Mode::Long][random.below(3) as usize];
        let code = [guests::compute(), guests::spin(), guests::exceptions()];
        let mut rig = Rig::new(Backend::Soft, mode, code[random.below(3) as usize]);
        let mut state = rig.vcpu.state().unwrap();
        for _ in 0..1 + random.below(5) {
            damage(&mut state, &mut random);
        }
        println!("round {round}");
        if let Err(error) = rig.vcpu.set_state(&state) {
            println!("refused: {error}");
            continue;
        }
        let kicker = rig.vcpu.kicker();
        let kick = {
            let kicker = Arc::clone(&kicker);
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(2));
                kicker.kick();
            })
        };
        for _ in 0..100 {
            match rig.run() {
                Exit::Kicked | Exit::Shutdown => break,
                Exit::InternalError { reason, rip } => panic!("{reason} at {rip:#x}"),
                _ => {}
            }
        }
        kick.join().unwrap();
        rig.vcpu.state().unwrap();
    }
}
