//! Threads whose work takes its time.

use std::io;

/// What such a thread runs for at a time, as the scheduler is told. The usual is 0.7 ms to 3 ms.
const SLICE_NS: u64 = 20_000_000;
/// What the system gives by itself.
const USUAL: u64 = 0;

/// `SCHED_ATTR_SIZE_VER0`.
const SIZE: u32 = 48;
const _: () = assert!(size_of::<Attributes>() == 48);

/// `struct sched_attr` (sched_setattr(2)), as it was first.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// While this lives the calling thread, and threads that it starts, have long slices of time: a thread with shorter ones,
/// a vCPU that wakes, need not wait until one is used up, which the kernel only looks at every few milliseconds. The share
/// of the processor stays the same. Linux 6.12 and later; others take no notice.
#[derive(Debug)]
pub struct Leisurely(());

impl Leisurely {
    /// From now on.
    #[must_use]
    pub fn begin() -> Self {
        slices(SLICE_NS);
        Self(())
    }
}

impl Drop for Leisurely {
    fn drop(&mut self) {
        slices(USUAL);
    }
}

fn slices(runtime: u64) {
    let mut own = Attributes::default();
    // SAFETY: 0 is the calling thread; the struct is as long as stated, and lives for the call.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut own, SIZE, 0) };
    // Whoever has given this thread another policy means it.
    if got != 0 || own.policy != libc::SCHED_OTHER as u32 {
        return;
    }
    own.size = SIZE;
    own.runtime = runtime;
    // SAFETY: as above.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const own, 0) } != 0 {
        log::debug!("sched_setattr: {}", io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Option<u64> {
        let mut own = Attributes::default();
        // SAFETY: as above.
        let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut own, SIZE, 0) };
        (got == 0).then_some(own.runtime)
    }

    #[test]
    fn a_threads_slices_are_long_for_a_while() {
        let before = now().unwrap();
        if before == 0 {
            return println!("left out: needs Linux 6.12 (slices of threads)");
        }
        {
            let _slices = Leisurely::begin();
            assert_eq!(now(), Some(SLICE_NS));
            let inherited = std::thread::spawn(now).join().unwrap();
            assert_eq!(inherited, Some(SLICE_NS));
        }
        assert_eq!(now(), Some(before));
    }
}
