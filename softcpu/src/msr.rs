//! Model-specific registers of the local APIC and of KVM's paravirtual interface. Those that
//! are the CPU core's own are in `msr_core`.

use crate::cpu::{Cpu, host_tsc};
use crate::exception::{Exception, Fallible};
use crate::paravirt;

const APIC_BASE: u32 = 0x1b;
const TSC_DEADLINE: u32 = 0x6e0;
const X2APIC_FIRST: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8ff;
/// x2APIC enable in IA32_APIC_BASE.
const EXTD: u64 = 1 << 10;

/// RDMSR of what the core doesn't know.
pub fn read(cpu: &mut Cpu, index: u32) -> Fallible<u64> {
    match index {
        APIC_BASE | X2APIC_FIRST..=X2APIC_LAST => {
            cpu.settle_eoi();
            cpu.apic.msr_read(index)
        }
        TSC_DEADLINE if cpu.features.tsc_deadline() => cpu.apic.msr_read(index),
        _ => paravirt::read_msr(cpu, index),
    }
}

/// WRMSR of what the core doesn't know.
pub fn write(cpu: &mut Cpu, index: u32, value: u64) -> Fallible<()> {
    match index {
        APIC_BASE if value & EXTD != 0 && !cpu.features.x2apic() => return Err(Exception::GP0),
        APIC_BASE if value >> cpu.features.phys_bits.clamp(32, 52) != 0 => {
            return Err(Exception::GP0);
        }
        TSC_DEADLINE if !cpu.features.tsc_deadline() => return Err(Exception::GP0),
        APIC_BASE | TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {}
        _ => return paravirt::write_msr(cpu, index, value),
    }
    cpu.settle_eoi();
    if index == TSC_DEADLINE {
        cpu.apic.set_tsc_offset(cpu.s.tsc_offset, host_tsc());
    }
    let effect = cpu.apic.msr_write(index, value)?;
    cpu.apic_effect(effect);
    cpu.deadline = cpu.apic.deadline();
    if index == APIC_BASE {
        // The page at the old or new place is no longer, or now, the APIC's.
        cpu.flush_tlb_all();
    }
    Ok(())
}
