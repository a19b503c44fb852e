//! A vCPU on the software CPU.

use std::sync::Arc;

use softcpu::attention::Attention;
use softcpu::cpuid::Leaf;
use softcpu::{Cpu, Machine};

use super::doorbells::{DoorbellBus, Doorbells};
use crate::{Bus, CpuidEntry, DebugControl, Exit, Kicker, Result, Vcpu, VcpuState, Watchpoint};

/// One vCPU.
#[derive(Debug)]
pub(super) struct SoftVcpu {
    cpu: Box<Cpu>,
    doorbells: Arc<Doorbells>,
}

#[derive(Debug)]
struct SoftKicker(Arc<Attention>);

impl Kicker for SoftKicker {
    fn kick(&self) {
        self.0.raise(Attention::KICK);
    }
}

impl SoftVcpu {
    pub(super) fn new(machine: &Arc<Machine>, id: u32, doorbells: Arc<Doorbells>) -> Self {
        let mut cpu = Cpu::new(machine, id, &[]);
        cpu.s.waiting_for_sipi = id != 0;
        Self { cpu, doorbells }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit> {
        let bus = DoorbellBus {
            bus,
            doorbells: &self.doorbells,
        };
        Ok(match self.cpu.run(&bus) {
            softcpu::Exit::Kicked => Exit::Kicked,
            softcpu::Exit::Stopped => Exit::Stopped,
            softcpu::Exit::Shutdown => Exit::Shutdown,
            softcpu::Exit::IoapicEoi(vector) => Exit::IoapicEoi(vector),
            softcpu::Exit::DeadHalt => Exit::DeadHalt,
            softcpu::Exit::Debug { watch } => Exit::Debug { watch },
            softcpu::Exit::InternalError { reason, rip } => Exit::InternalError { reason, rip },
        })
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(SoftKicker(Arc::clone(&self.cpu.attention)))
    }

    fn set_cpuid(&mut self, leaves: &[CpuidEntry]) -> Result<()> {
        let leaves: Vec<_> = leaves
            .iter()
            .map(|leaf| Leaf {
                function: leaf.function,
                index: leaf.index_significant.then_some(leaf.index),
                regs: [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx],
            })
            .collect();
        self.cpu.set_cpuid(&leaves);
        self.cpu.state_changed();
        Ok(())
    }

    fn state(&mut self) -> Result<VcpuState> {
        Ok(super::state::get(&self.cpu))
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        super::state::set(&mut self.cpu, state)
    }

    fn set_debug(&mut self, control: &DebugControl) -> Result<()> {
        let watch = |watch: &Watchpoint| softcpu::Watchpoint {
            address: watch.address,
            len: watch.len,
            reads: watch.reads,
        };
        self.cpu.set_debug(softcpu::DebugRequest {
            single_step: control.single_step,
            breakpoints: control.breakpoints.clone(),
            watchpoints: control.watchpoints.iter().map(watch).collect(),
        });
        Ok(())
    }

    fn was_stopped(&mut self) -> Result<()> {
        self.cpu.was_stopped();
        Ok(())
    }

    fn decode_ahead(&mut self, code: &[u64], go_on: &dyn Fn() -> bool) {
        self.cpu.decode_ahead(code, go_on);
    }

    fn inject_nmi(&self) -> Result<()> {
        self.cpu.attention.raise(Attention::NMI);
        Ok(())
    }
}
