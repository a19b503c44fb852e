//! What KVM offers its guests beyond a processor, offered the same way: the paravirtual clock,
//! steal time, TLB flushes that don't wake who sleeps, and the hypercalls that send interrupts
//! to many and wake a vCPU that waits for a lock (Linux, Documentation/virt/kvm/x86).
//!
//! Not offered, because it would cost more than it saves here: asynchronous page faults.

mod clock;
mod eoi;
mod hypercall;
mod steal;

pub use clock::{Clock, Reference};
pub use eoi::PvEoi;
pub use hypercall::hypercall;
pub use steal::Steal;

use crate::cpu::{Cpu, host_tsc};
use crate::exception::{Exception, Fallible};

/// Bits of CPUID leaf 0x4000_0001, EAX (the default of `cpuid`).
pub mod feature {
    #![allow(missing_docs)]
    pub const CLOCKSOURCE: u32 = 1 << 0;
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    pub const STEAL_TIME: u32 = 1 << 5;
    pub const PV_EOI: u32 = 1 << 6;
    pub const PV_UNHALT: u32 = 1 << 7;
    pub const PV_TLB_FLUSH: u32 = 1 << 9;
    pub const PV_SEND_IPI: u32 = 1 << 11;
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
    /// All that is offered.
    pub const ALL: u32 = CLOCKSOURCE
        | NOP_IO_DELAY
        | CLOCKSOURCE2
        | STEAL_TIME
        | PV_EOI
        | PV_UNHALT
        | PV_TLB_FLUSH
        | PV_SEND_IPI
        | CLOCKSOURCE_STABLE;
}

/// The paravirtual MSRs.
pub mod msr {
    #![allow(missing_docs)]
    pub const WALL_CLOCK: u32 = 0x11;
    pub const SYSTEM_TIME: u32 = 0x12;
    pub const WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
    pub const SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    pub const STEAL_TIME: u32 = 0x4b56_4d03;
    pub const EOI: u32 = 0x4b56_4d04;
}

/// A vCPU's own part.
#[derive(Debug, Default)]
pub struct Paravirt {
    /// Where the guest wants the clock's page (guest-physical); bit 0: enabled.
    pub system_time: u64,
    /// Where it last wanted the wall clock.
    pub wall_clock: u64,
    /// Steal time.
    pub steal: Steal,
    /// PV EOI.
    pub eoi: PvEoi,
    /// The machine was stopped: the clock's page is to say so.
    pub(crate) stopped: bool,
    /// `Reference::generation` the clock's page was written from.
    generation: u64,
}

fn offered(cpu: &Cpu, bits: u32) -> bool {
    let [max, ..] = cpu.cpuid.leaf(0x4000_0000, 0).unwrap_or_default();
    let [eax, ..] = cpu.cpuid.leaf(0x4000_0001, 0).unwrap_or_default();
    max > 0x4000_0000 && eax & bits != 0
}

/// RDMSR of a paravirtual register.
pub(crate) fn read_msr(cpu: &Cpu, index: u32) -> Fallible<u64> {
    match index {
        msr::WALL_CLOCK if offered(cpu, feature::CLOCKSOURCE) => Ok(cpu.pv.wall_clock),
        msr::SYSTEM_TIME if offered(cpu, feature::CLOCKSOURCE) => Ok(cpu.pv.system_time),
        msr::WALL_CLOCK_NEW if offered(cpu, feature::CLOCKSOURCE2) => Ok(cpu.pv.wall_clock),
        msr::SYSTEM_TIME_NEW if offered(cpu, feature::CLOCKSOURCE2) => Ok(cpu.pv.system_time),
        msr::STEAL_TIME if offered(cpu, feature::STEAL_TIME) => Ok(cpu.pv.steal.msr),
        msr::EOI if offered(cpu, feature::PV_EOI) => Ok(cpu.pv.eoi.msr),
        _ => Err(Exception::GP0),
    }
}

/// WRMSR of a paravirtual register.
pub(crate) fn write_msr(cpu: &mut Cpu, index: u32, value: u64) -> Fallible<()> {
    // What cannot be read cannot be written.
    read_msr(cpu, index)?;
    match index {
        msr::WALL_CLOCK | msr::WALL_CLOCK_NEW => {
            cpu.pv.wall_clock = value;
            cpu.write_wall_clock();
        }
        msr::STEAL_TIME => {
            if value & steal::RESERVED != 0 {
                return Err(Exception::GP0);
            }
            cpu.set_steal_time(value);
        }
        msr::EOI => {
            if value & eoi::RESERVED != 0 {
                return Err(Exception::GP0);
            }
            cpu.set_pv_eoi(value);
        }
        _ => {
            cpu.pv.system_time = value;
            cpu.write_system_time();
        }
    }
    Ok(())
}

impl Cpu {
    /// Whether the guest was told of any of these features.
    pub(crate) fn offered(&self, bits: u32) -> bool {
        offered(self, bits)
    }

    /// Sets the guest's TSC to the host's plus `offset`; what counts in terms of it follows.
    pub(crate) fn set_tsc_offset(&mut self, offset: u64) {
        self.s.tsc_offset = offset;
        self.apic.set_tsc_offset(offset, host_tsc());
        self.deadline = self.apic.deadline();
        self.write_system_time();
    }

    /// The machine was stopped by its owner. The guest's clock went on; its watchdogs should not
    /// take the gap for a hang.
    pub fn was_stopped(&mut self) {
        if self.pv.system_time & 1 != 0 {
            self.pv.stopped = true;
            self.write_system_time();
        }
    }

    /// To be called before guest code runs: the clock may have been set meanwhile.
    pub(crate) fn refresh_clock(&mut self) {
        if self.pv.system_time & 1 != 0
            && self.machine.time.reference().generation != self.pv.generation
        {
            self.write_system_time();
        }
    }
}
