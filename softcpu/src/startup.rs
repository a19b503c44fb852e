//! INIT and the start-up IPI (Intel SDM vol. 3, 10.4 and table 9-1).

use std::time::Duration;

use crate::attention::Attention;
use crate::cpu::Cpu;
use crate::state::{CpuState, cr0, gpr, seg};

/// Bit of IA32_APIC_BASE: the bootstrap processor.
const BSP: u64 = 1 << 8;

impl Cpu {
    /// Acts on INIT and start-up IPIs, and waits for one where there is nothing to run until
    /// it comes. `true`: everything has to be looked at again.
    pub(crate) fn startup_events(&mut self) -> bool {
        let flags = self.attention.get();
        if flags & Attention::INIT != 0 {
            self.attention.clear(Attention::INIT);
            self.init();
            return true;
        }
        if flags & Attention::SIPI != 0 {
            self.attention.clear(Attention::SIPI);
            if self.s.waiting_for_sipi {
                self.start_up(self.apic.sipi_vector());
            }
            return true;
        }
        if self.s.waiting_for_sipi {
            let wanted = Attention::INIT
                | Attention::SIPI
                | Attention::KICK
                | Attention::MAIL
                | Attention::SELF;
            self.attention.wait(wanted, Duration::from_secs(3600));
            return true;
        }
        false
    }

    /// The state after INIT: as after power-up, but for the FPU, most MSRs, the TSC and the
    /// cache's control bits.
    fn init(&mut self) {
        self.sync_fp();
        let old = &self.s;
        let signature = self.cpuid.leaf(1, 0).map_or(0x600, |[eax, ..]| eax);
        let mut fresh = CpuState {
            cr0: cr0::ET | old.cr0 & (cr0::NW | cr0::CD),
            xcr0: old.xcr0,
            tsc_offset: old.tsc_offset,
            msr: old.msr,
            fp: old.fp,
            waiting_for_sipi: self.apic.base() & BSP == 0,
            ..CpuState::default()
        };
        fresh.gpr[gpr::RDX] = u64::from(signature);
        self.s = fresh;
        self.apic.init();
        self.pv.eoi = crate::paravirt::PvEoi::default();
        self.attention.clear(Attention::NMI);
        self.pending = None;
        self.dead_halt_reported = false;
        self.deadline = self.apic.deadline();
        self.state_changed();
    }

    fn start_up(&mut self, vector: u8) {
        self.s.waiting_for_sipi = false;
        let cs = &mut self.s.seg[seg::CS];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.s.rip = 0;
        self.state_changed();
    }
}
