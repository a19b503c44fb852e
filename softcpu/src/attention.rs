//! How other threads get a vCPU's attention: one word of flags, tested between blocks, and a
//! futex on it for a vCPU that sleeps in `hlt`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The flag word of one vCPU. Shared by everyone who may interrupt it.
#[derive(Debug, Default)]
pub struct Attention {
    flags: AtomicU32,
}

impl Attention {
    /// The local APIC holds an interrupt that its priority rules would let through.
    pub const IRQ: u32 = 1 << 0;
    /// A non-maskable interrupt waits.
    pub const NMI: u32 = 1 << 1;
    /// INIT was signalled.
    pub const INIT: u32 = 1 << 2;
    /// A start-up IPI was signalled.
    pub const SIPI: u32 = 1 << 3;
    /// Leave `run` with `Exit::Kicked`.
    pub const KICK: u32 = 1 << 4;
    /// Messages of other vCPUs or of the machine wait (code and mapping changes).
    pub const MAIL: u32 = 1 << 5;
    /// The vCPU's own: leave the block loop to look at something.
    pub const SELF: u32 = 1 << 6;
    /// Another vCPU ends this one's `hlt`, the present or the next one (PV unhalt).
    pub const UNHALT: u32 = 1 << 7;

    /// The flags now.
    #[inline(always)]
    pub fn get(&self) -> u32 {
        self.flags.load(Ordering::Relaxed)
    }

    /// Sets `bits` and wakes the vCPU if it sleeps.
    pub fn raise(&self, bits: u32) {
        let old = self.flags.fetch_or(bits, Ordering::SeqCst);
        if old & bits != bits {
            // SAFETY: FUTEX_WAKE on a word we own; the kernel only reads the address.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.flags.as_ptr(),
                    libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                    i32::MAX,
                );
            }
        }
    }

    /// Clears `bits`; what was set of all flags before.
    pub fn clear(&self, bits: u32) -> u32 {
        self.flags.fetch_and(!bits, Ordering::SeqCst)
    }

    /// Sleeps until a flag in `mask` is set or `timeout` has passed.
    pub fn wait(&self, mask: u32, timeout: Duration) {
        let now = self.flags.load(Ordering::SeqCst);
        if now & mask != 0 {
            return;
        }
        let ts = libc::timespec {
            tv_sec: timeout.as_secs().min(3600) as libc::time_t,
            tv_nsec: libc::c_long::from(timeout.subsec_nanos() as i32),
        };
        // SAFETY: FUTEX_WAIT on a word we own with a valid relative timeout; any return
        // (woken, changed, timed out, signal) only means "look again".
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.flags.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                now,
                &raw const ts,
            );
        }
    }
}
