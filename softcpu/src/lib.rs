//! The software x86-64 CPU: decode, execute, MMU, local APIC.
//!
//! Knows no device and no KVM. Everything outside RAM goes through [`Bus`].

mod alu;
pub mod apic;
pub mod attention;
mod bus;
mod cache;
mod cpu;
pub mod cpuid;
mod debug;
mod decode;
mod exception;
mod exec;
mod features;
mod inject;
mod interrupt;
pub mod machine;
pub mod memory;
mod mmu;
pub mod msr;
mod msr_core;
mod native;
mod op;
mod paging;
pub mod paravirt;
mod pcid;
mod run;
mod segment;
pub mod simd;
mod startup;
pub mod state;
mod task;
mod tlb;
pub mod tsc;
mod vme;

pub use bus::{Bus, Flow};
pub use cpu::{Cpu, DebugRequest, Exit, Watchpoint, host_tsc};
pub use decode::get_ready;
pub use exception::{Exception, Fallible};
pub use features::Features;
pub use machine::Machine;
pub use mmu::Word;
pub use msr_core::{MACHINE_CHECK_BANKS, MCG_CAP_VALUE as MCG_CAP};
pub use op::{Block, Handler, Op, Plain};
