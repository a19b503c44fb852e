//! Debug registers, single step, and an external debugger's breakpoints (Intel SDM vol. 3,
//! 18.2).
//!
//! While an instruction breakpoint is enabled, instructions run one by one. Pages with data
//! breakpoints never hit in the TLB, and the slow path looks closer.

use crate::attention::Attention;
use crate::cpu::{Cpu, Exit};
use crate::exception::Exception;
use crate::state::{cr4, rflags};

/// What a breakpoint of DR7 waits for (its R/W field).
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const IO: u64 = 2;
const ACCESS: u64 = 3;

/// DR6: single step.
const BS: u64 = 1 << 14;
/// IA32_DEBUGCTL: single step stops at branches only; last branch recording.
const BTF: u64 = 1 << 1;
const LBR: u64 = 1 << 0;

/// What RFLAGS.TF means for an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TrapRule {
    /// A trap follows if it was set before (almost always).
    Before,
    /// If it is set afterwards: SYSCALL and SYSRET.
    After,
    /// None follows: software interrupts.
    Never,
}

impl Cpu {
    /// Enabled breakpoints of DR7: number, R/W field, length in bytes.
    fn breakpoints(&self) -> impl Iterator<Item = (usize, u64, u64)> + use<> {
        let dr7 = self.s.dr7;
        (0..4)
            .filter(move |n| dr7 >> (2 * n) & 3 != 0)
            .map(move |n| {
                let field = dr7 >> (16 + 4 * n) & 15;
                let len = [1, 2, 8, 4][(field >> 2) as usize];
                (n as usize, field & 3, len)
            })
    }

    /// To be called after a debug register was written.
    pub(crate) fn debug_registers_changed(&mut self) {
        let watching = self
            .breakpoints()
            .any(|(_, kind, _)| kind == WRITE || kind == ACCESS)
            || !self.debug.watchpoints.is_empty();
        if watching || self.watching {
            self.watching = watching;
            self.flush_tlb_all();
        }
        self.attention.raise(Attention::SELF);
    }

    /// Some data breakpoint lies in the page of `addr`.
    pub(crate) fn page_watched(&self, addr: u64) -> bool {
        self.breakpoints().any(|(n, kind, len)| {
            let first = self.s.dr[n] & !(len - 1);
            (kind == WRITE || kind == ACCESS) && first >> 12 == addr >> 12
        }) || self.debug.watchpoints.iter().any(|watch| {
            let last = watch.address.wrapping_add(watch.len.saturating_sub(1));
            (watch.address >> 12..=last >> 12).contains(&(addr >> 12))
        })
    }

    /// Notes the data breakpoints that an access hits: a trap after the instruction.
    #[cold]
    pub(crate) fn note_access(&mut self, addr: u64, len: usize, write: bool) {
        for (n, kind, size) in self.breakpoints() {
            let first = self.s.dr[n] & !(size - 1);
            let overlap = addr < first.wrapping_add(size) && first < addr.wrapping_add(len as u64);
            if overlap && (kind == ACCESS || kind == WRITE && write) {
                self.note_hit(n);
            }
        }
        let hit = self.debug.watchpoints.iter().find(|watch| {
            let end = watch.address.wrapping_add(watch.len);
            (write || watch.reads) && addr < end && watch.address < addr.wrapping_add(len as u64)
        });
        if let Some(watch) = hit {
            self.external_hit = Some(watch.address);
            self.stop_after = true;
            self.attention.raise(Attention::SELF);
        }
    }

    /// The same for a port.
    pub(crate) fn note_port(&mut self, port: u16, size: usize) {
        if self.s.dr7 & 0xff == 0 || self.s.cr4 & cr4::DE == 0 {
            return;
        }
        let port = u64::from(port);
        for (n, kind, len) in self.breakpoints() {
            let first = self.s.dr[n] & !(len - 1);
            if kind == IO && port < first + len && first < port + size as u64 {
                self.note_hit(n);
            }
        }
    }

    fn note_hit(&mut self, n: usize) {
        self.note_trap(1 << n);
    }

    /// Adds a trap (a bit of DR6) to those that follow the running instruction.
    pub(crate) fn note_trap(&mut self, bits: u64) {
        self.watch_hits |= bits;
        self.stop_after = true;
        self.attention.raise(Attention::SELF);
    }

    /// The single-step trap of an instruction that was left with RFLAGS.TF set and is trapped
    /// by that.
    pub(crate) fn note_step(&mut self) {
        self.note_trap(BS);
    }

    /// MOV SS and POP SS hold off traps until after the next instruction.
    pub(crate) fn traps_held(&self) -> bool {
        self.s.shadow && self.s.shadow_ss && self.s.rip == self.s.shadow_rip
    }

    /// Turns waiting traps into a pending #DB.
    pub(crate) fn take_watch_hits(&mut self) {
        let hits = std::mem::take(&mut self.watch_hits);
        if hits != 0 && self.pending.is_none() {
            self.s.dr6 = self.s.dr6 & !0xf | hits;
            self.pending = Some(Exception::DB);
        }
    }

    /// What #DB switches off on its way to the guest.
    pub(crate) fn debug_exception(&mut self) {
        self.s.dr7 &= !(1 << 13);
        self.s.msr.debugctl &= !(BTF | LBR);
    }

    /// Instructions have to run one by one.
    pub(crate) fn stepping(&self) -> bool {
        self.s.flags & rflags::TF != 0
            || self.debug.single_step
            || !self.debug.breakpoints.is_empty()
            || self.s.dr7 & 0xff != 0 && self.breakpoints().any(|(_, kind, _)| kind == EXECUTE)
    }

    /// Runs one instruction, if no breakpoint is in the way.
    pub(crate) fn run_one(&mut self) -> Option<Exit> {
        let linear = self.code_linear(self.s.rip);
        if !std::mem::take(&mut self.debug_resumed) && self.debug.breakpoints.contains(&linear) {
            return Some(Exit::Debug { watch: None });
        }
        if self.s.flags & rflags::RF == 0 {
            let mut hits = 0;
            for (n, kind, _) in self.breakpoints() {
                if kind == EXECUTE && self.s.dr[n] == linear {
                    hits |= 1 << n;
                }
            }
            if hits != 0 {
                self.s.dr6 = self.s.dr6 & !0xf | hits;
                self.pending = Some(Exception::DB);
                return None;
            }
        }
        self.s.flags &= !rflags::RF;
        let mut trap = self.s.flags & rflags::TF != 0;
        self.trap_rule = TrapRule::Before;
        let start = self.s.rip;
        let len = self.step();
        trap &= self.trap_rule == TrapRule::Before;
        // A branch not taken, or none.
        if self.s.msr.debugctl & BTF != 0 && self.s.rip == start.wrapping_add(len) {
            trap = false;
        }
        if trap && self.pending.is_none() && !self.traps_held() {
            self.note_trap(BS);
        }
        self.debug.single_step.then(|| Exit::Debug {
            watch: self.external_hit.take(),
        })
    }
}
