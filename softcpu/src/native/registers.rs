//! Which guest registers are in which host registers while a block runs.

use super::asm::host::*;
use super::asm::{Asm, at};
use super::layout::{gpr_slot, xmm_slot};

/// Host registers that may hold a guest's. RAX, RCX, RDX and RSI are scratch, RDI the `Cpu`.
const POOL: [u8; 10] = [RBX, RBP, R12, R13, R14, R15, R8, R9, R10, R11];
const NONE: u8 = 0xff;

/// What must be written to the state where a block is left in its middle.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Unsaved {
    /// Guest register, host register.
    gprs: Vec<(u8, u8)>,
    xmms: u16,
}

impl Unsaved {
    /// Writes it.
    pub(super) fn store(&self, asm: &mut Asm) {
        for &(guest, host) in &self.gprs {
            asm.store(host, at(RDI, gpr_slot(guest)));
        }
        for n in (0..16).filter(|n| self.xmms >> n & 1 != 0) {
            asm.mem(false, &[0x0f, 0x11], n, at(RDI, xmm_slot(n)));
        }
    }
}

/// The registers at one point of the code.
#[derive(Debug)]
pub(super) struct Registers {
    /// By guest register.
    host: [u8; 16],
    /// By guest register: when it was used last.
    used: [u32; 16],
    now: u32,
    /// Guest registers whose host register is newer than the state.
    dirty: u16,
    /// Guest registers that the current instruction uses.
    held: u16,
    /// XMM registers that are loaded.
    xmms: u16,
    xmms_dirty: u16,
}

impl Registers {
    pub(super) fn new() -> Self {
        Self {
            host: [NONE; 16],
            used: [0; 16],
            now: 0,
            dirty: 0,
            held: 0,
            xmms: 0,
            xmms_dirty: 0,
        }
    }

    /// The instruction before is done.
    pub(super) fn release(&mut self) {
        self.held = 0;
        self.now += 1;
    }

    /// The host register of `guest`, with its value if `load`.
    pub(super) fn get(&mut self, asm: &mut Asm, guest: u8, load: bool) -> u8 {
        let g = usize::from(guest);
        self.used[g] = self.now;
        self.held |= 1 << guest;
        if self.host[g] != NONE {
            return self.host[g];
        }
        let free = POOL.into_iter().find(|r| !self.host.contains(r));
        let register = free.unwrap_or_else(|| {
            // An instruction holds at most five, so there is one.
            let oldest = (0..16)
                .filter(|&i| self.host[i] != NONE && self.held >> i & 1 == 0)
                .min_by_key(|&i| self.used[i])
                .unwrap_or(0);
            let register = self.host[oldest];
            if self.dirty >> oldest & 1 != 0 {
                asm.store(register, at(RDI, gpr_slot(oldest as u8)));
                self.dirty &= !(1 << oldest);
            }
            self.host[oldest] = NONE;
            register
        });
        self.host[g] = register;
        if load {
            asm.load(register, at(RDI, gpr_slot(guest)));
        }
        register
    }

    /// `guest`'s host register has a new value.
    pub(super) fn changed(&mut self, guest: u8) {
        self.dirty |= 1 << guest;
    }

    /// XMM register `n` is about to be used, its old value too if `load`.
    pub(super) fn xmm(&mut self, asm: &mut Asm, n: u8, load: bool) {
        if self.xmms >> n & 1 == 0 {
            self.xmms |= 1 << n;
            if load {
                asm.mem(false, &[0x0f, 0x10], n, at(RDI, xmm_slot(n)));
            }
        }
    }

    /// XMM register `n` has a new value.
    pub(super) fn xmm_changed(&mut self, n: u8) {
        self.xmms_dirty |= 1 << n;
    }

    /// What is newer here than in the state.
    pub(super) fn unsaved(&self) -> Unsaved {
        Unsaved {
            gprs: (0..16)
                .filter(|g| self.dirty >> g & 1 != 0)
                .map(|g| (g, self.host[usize::from(g)]))
                .collect(),
            xmms: self.xmms_dirty,
        }
    }

    /// Writes all that to the state. No flags are changed.
    pub(super) fn save(&mut self, asm: &mut Asm) {
        self.unsaved().store(asm);
        self.dirty = 0;
        self.xmms_dirty = 0;
    }

    /// The state may have changed: nothing is in registers any more.
    pub(super) fn forget(&mut self) {
        self.host = [NONE; 16];
        self.xmms = 0;
    }
}
