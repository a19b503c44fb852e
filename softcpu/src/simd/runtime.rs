//! What thunks and their handlers keep beside the guest's state, and the guest's x87 state in
//! the host's x87 unit.

use std::arch::asm;

use crate::cpu::Cpu;
use crate::state::FpState;

/// MXCSR while Rust code runs: what the ABI asks for.
const HOST_MXCSR: u32 = 0x1f80;

/// Offset of the FXSAVE image's FSW.
pub(super) const FSW: usize = 2;
/// Offset of the FXSAVE image's MXCSR.
const MXCSR: usize = 24;
/// Bytes of the FXSAVE image that hold x87 and MMX state: all before XMM0.
const X87_LEN: usize = 160;
/// Its ST/MM registers.
const STACK: std::ops::Range<usize> = 32..X87_LEN;

/// Memory that thunks address relative to R9. Their layout is known to `thunk`.
#[repr(C, align(64))]
pub struct Runtime {
    /// MXCSR for the instruction: the guest's with all exceptions masked and no flags.
    pub(super) run_mxcsr: u32,
    /// MXCSR after it.
    pub(super) out_mxcsr: u32,
    host_mxcsr: u32,
    /// Exception flags that are not masked by the guest.
    pub(super) unmasked: u32,
    /// Status flags before and after.
    pub(super) flags: u64,
    /// FSW after an x87 instruction.
    pub(super) fsw: u16,
    /// The host's x87 unit holds the guest's x87 state, which in `FpState` is out of date.
    /// Never so while an exception is pending in it.
    live: bool,
    /// The host's MXCSR is the guest's but for flags set earlier: since this was set, guest
    /// instructions alone have changed it, and the flags they raised are not in `FpState` yet.
    simd_live: bool,
    /// Stands in for guest memory that can't be reached in one piece.
    pub(super) bounce: Bounce,
    /// Goes through fxrstor and fxsave, which also touch MXCSR and XMM.
    image: [u8; 512],
}

/// Buffer in the alignment the most demanding instruction asks for.
#[repr(C, align(64))]
pub(super) struct Bounce(pub [u8; 128]);

impl Runtime {
    pub(super) const RUN_MXCSR: i32 = std::mem::offset_of!(Self, run_mxcsr) as i32;
    pub(super) const OUT_MXCSR: i32 = std::mem::offset_of!(Self, out_mxcsr) as i32;
    /// Distance of the MXCSR that gathers.
    pub(crate) const HOST_MXCSR: i32 = std::mem::offset_of!(Self, host_mxcsr) as i32;
    pub(super) const UNMASKED: i32 = std::mem::offset_of!(Self, unmasked) as i32;
    pub(super) const FLAGS: i32 = std::mem::offset_of!(Self, flags) as i32;
    /// Distance of the flag that the host's MXCSR gathers the guest's flags.
    pub(crate) const SIMD_LIVE: usize = std::mem::offset_of!(Self, simd_live);
    pub(super) const FSW: i32 = std::mem::offset_of!(Self, fsw) as i32;

    /// The host's x87 unit holds the guest's state, with nothing pending.
    #[inline(always)]
    pub(super) fn is_live(&self) -> bool {
        self.live
    }

    /// Makes the host's MXCSR gather the flags that instructions raise, for a guest whose
    /// MXCSR asks for what the ABI has: rounding to nearest, all exceptions masked.
    #[inline(always)]
    pub(super) fn gather(&mut self) {
        if self.simd_live {
            return;
        }
        // SAFETY: loads the ABI's own MXCSR.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const self.host_mxcsr, options(nostack, readonly));
        }
        self.simd_live = true;
    }

    fn host_mxcsr() -> u32 {
        let mut now = 0_u32;
        // SAFETY: writes four bytes to `now`.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut now, options(nostack));
        }
        now
    }

    /// Puts the flags gathered into the guest's MXCSR.
    #[inline]
    pub(super) fn gathered(&mut self, fp: &mut FpState) {
        if self.simd_live {
            fp.set_mxcsr(fp.mxcsr() | Self::host_mxcsr() & 0x3f);
            self.simd_live = false;
        }
    }

    /// Takes the guest's x87 state into the host's unit.
    #[inline]
    pub(super) fn enter(&mut self, fp: &FpState) {
        if self.live {
            return;
        }
        self.image[..X87_LEN].copy_from_slice(&fp.legacy[..X87_LEN]);
        // It is loaded as well, and must not lose what has been gathered.
        let mxcsr = Self::host_mxcsr();
        self.image[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
        // SAFETY: the image is 64-byte aligned and 512 bytes long, its MXCSR is the host's, and
        // all registers it loads are declared clobbered. Rust code and the x86-64 ABI use
        // neither x87 nor MMX, so that what it leaves there disturbs nobody; a pending
        // exception can't strike, because only non-waiting instructions run until `leave`.
        unsafe {
            asm!("fxrstor64 [{}]", in(reg) self.image.as_ptr(), clobber_abi("sysv64"),
                options(nostack, readonly));
        }
        self.live = true;
    }

    /// Writes the guest's x87 state back, and leaves the host's unit as the ABI wants it.
    #[inline]
    pub(super) fn leave(&mut self, fp: &mut FpState) {
        if !self.live {
            return;
        }
        // SAFETY: as in `enter`; neither instruction waits for pending exceptions.
        unsafe {
            asm!("fxsave64 [{}]", "fninit", in(reg) self.image.as_mut_ptr(), clobber_abi("sysv64"),
                options(nostack));
        }
        self.live = false;
        fp.legacy[..5].copy_from_slice(&self.image[..5]);
        fp.legacy[STACK].copy_from_slice(&self.image[STACK]);
    }

    /// Stores the x87 environment in the 32-bit protected-mode format, as FNSTENV does,
    /// with FCW's exceptions masked afterwards. The pointers in it are of no use.
    pub(super) fn store_environment(&mut self, fp: &mut FpState) -> [u8; 28] {
        let mut image = [0; 28];
        self.enter(fp);
        // SAFETY: FNSTENV writes 28 bytes to `image` and doesn't wait for exceptions; the x87
        // unit is the guest's until `leave`.
        unsafe {
            asm!("fnstenv [{}]", in(reg) image.as_mut_ptr(), options(nostack));
        }
        self.leave(fp);
        image
    }

    /// Loads FCW, FSW and FTW from an environment in that format. No exception is pending.
    pub(super) fn load_environment(&mut self, fp: &mut FpState, image: &[u8; 28]) {
        self.enter(fp);
        // SAFETY: FLDENV reads 28 bytes of `image`; no exception is pending that it could
        // wait for, and one pending afterwards is stored by `leave`, which doesn't wait.
        unsafe {
            asm!("fldenv [{}]", in(reg) image.as_ptr(), options(nostack, readonly));
        }
        self.leave(fp);
    }

    /// FNINIT, but for the pointers.
    pub(super) fn initialise(&mut self, fp: &mut FpState) {
        self.enter(fp);
        // SAFETY: the x87 unit is the guest's until `leave`; FNINIT doesn't wait.
        unsafe {
            asm!("fninit", options(nomem, nostack));
        }
        self.leave(fp);
    }

    /// Does to the x87 state what every MMX instruction does: TOP 0, all registers valid.
    /// Then MMn is the n-th register of the FXSAVE image.
    pub(super) fn become_mmx(&mut self, fp: &mut FpState) {
        self.enter(fp);
        // SAFETY: reads a register of the guest's; no exception is pending (the caller has
        // checked).
        unsafe {
            asm!("movq {}, mm0", out(reg) _, options(nomem, nostack));
        }
        self.leave(fp);
    }

    /// An x87 exception that the guest didn't mask waits.
    #[inline]
    pub(super) fn pending(&self, fp: &FpState) -> bool {
        !self.live && unmasked(fp) != 0
    }
}

/// The exception flags set in FSW that FCW doesn't mask.
#[inline]
pub(super) fn unmasked(fp: &FpState) -> u8 {
    fp.legacy[FSW] & !fp.legacy[0] & 0x3f
}

/// Makes ES and B of an FSW loaded from memory agree with its exception flags.
pub(super) fn settle_fsw(fp: &mut FpState) {
    let busy = unmasked(fp) != 0;
    fp.legacy[FSW] = fp.legacy[FSW] & 0x7f | u8::from(busy) << 7;
    fp.legacy[FSW + 1] = fp.legacy[FSW + 1] & 0x7f | u8::from(busy) << 7;
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            run_mxcsr: HOST_MXCSR,
            out_mxcsr: HOST_MXCSR,
            host_mxcsr: HOST_MXCSR,
            unmasked: 0,
            flags: 2,
            fsw: 0,
            live: false,
            simd_live: false,
            bounce: Bounce([0; 128]),
            image: [0; 512],
        }
    }
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime")
            .field("live", &self.live)
            .finish_non_exhaustive()
    }
}

impl Cpu {
    /// Brings `s.fp` up to date and gives the host's x87 unit back. To be called on the thread
    /// that ran the vCPU before anyone else looks at its state or it moves to another thread.
    pub fn sync_fp(&mut self) {
        self.fp_runtime.leave(&mut self.s.fp);
        self.sync_mxcsr();
    }

    /// Brings the guest's MXCSR up to date. To be called before anyone looks at it, and before
    /// code runs that may compute with floating-point numbers of its own.
    #[inline]
    pub(crate) fn sync_mxcsr(&mut self) {
        self.fp_runtime.gathered(&mut self.s.fp);
    }
}
