//! vCPU state at the first instruction.

use hypervisor::{RunState, Segment, Table, VcpuState};

use crate::layout;
use crate::loader::Entry;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;

/// Flat 4 GiB segments (Intel SDM vol. 3, 3.4.5): present, code or data, 32-bit, accessed.
fn flat(selector: u16, kind: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access: 0xc090 | kind,
    }
}

/// The first vCPU at a kernel's entry: 32-bit protected mode, no paging, interrupts off.
pub fn at_entry(power_on: &VcpuState, entry: &Entry) -> VcpuState {
    let mut state = power_on.clone();
    let (code, data) = entry.selectors.unwrap_or((0x08, 0x10));
    let sregs = &mut state.sregs;
    sregs.cs = flat(code, 0xb);
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat(data, 0x3);
    }
    // A busy 32-bit TSS of minimal size, and no LDT.
    sregs.tr = Segment {
        selector: 0,
        base: 0,
        limit: 0x67,
        access: 0x8b,
    };
    sregs.ldt = Segment {
        selector: 0,
        base: 0,
        limit: 0,
        access: 0x1_0082,
    };
    sregs.gdt = match entry.selectors {
        Some(_) => Table {
            base: layout::GDT,
            limit: 31,
        },
        None => Table::default(),
    };
    sregs.idt = Table::default();
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr2 = 0;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    let regs = &mut state.regs;
    *regs = hypervisor::Regs {
        rflags: 2,
        ..hypervisor::Regs::default()
    };
    regs.rip = entry.eip.into();
    regs.rax = entry.eax.into();
    regs.rbx = entry.ebx.into();
    regs.rsi = entry.esi.into();
    state.run_state = RunState::Runnable;
    state
}

/// The others: waiting for their start-up message.
pub fn waiting(power_on: &VcpuState) -> VcpuState {
    VcpuState {
        run_state: RunState::WaitForSipi,
        ..power_on.clone()
    }
}
