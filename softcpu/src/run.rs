//! The block loop.

use crate::apic::ApicEffect;
use crate::bus::Bus;
use crate::cpu::{Cpu, Exit};
use crate::op::{Block, Op};

/// Handler of operations whose guest code was overwritten: look the code up again.
pub(crate) unsafe fn stale(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's promise.
    let op = unsafe { &*op };
    cpu.s.rip = cpu.s.block_rip.wrapping_add(u64::from(op.off));
    std::ptr::null()
}

impl Cpu {
    /// Does what a local APIC register write asked the core to do.
    pub(crate) fn apic_effect(&mut self, effect: ApicEffect) {
        self.deadline = self.apic.deadline();
        match effect {
            ApicEffect::None => {}
            ApicEffect::Eoi(vector) => self.request_exit(Exit::IoapicEoi(vector)),
        }
    }

    /// Runs the guest until something other than I/O needs the caller. A halted vCPU sleeps
    /// in here.
    pub fn run(&mut self, bus: &dyn Bus) -> Exit {
        self.set_bus(Some(bus));
        self.peer.set_running(true);
        self.peer.set_running(false);
        self.set_bus(None);
        Exit::Kicked
    }
}
