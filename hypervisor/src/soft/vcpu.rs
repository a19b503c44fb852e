//! A vCPU on the software CPU.

use std::sync::Arc;

use softcpu::attention::Attention;
use softcpu::cpuid::Leaf;
use softcpu::{Cpu, Machine};

use super::doorbells::{DoorbellBus, Doorbells};
use crate::{Bus, CpuidEntry, Exit, Kicker, Result, Vcpu, VcpuState};

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
            softcpu::Exit::Debug => Exit::Debug,
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

    fn inject_nmi(&self) -> Result<()> {
        self.cpu.attention.raise(Attention::NMI);
        Ok(())
    }
}
