//! Model-specific registers of the local APIC and of KVM's paravirtual interface. Those that
//! are the CPU core's own are in `msr_core`.

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};

/// RDMSR of what the core doesn't know.
pub fn read(cpu: &mut Cpu, index: u32) -> Fallible<u64> {
    cpu.apic.clone().msr_read(index)
}

/// WRMSR of what the core doesn't know.
pub fn write(cpu: &mut Cpu, index: u32, value: u64) -> Fallible<()> {
    let _ = (cpu, index, value);
    Err(Exception::GP0)
}
