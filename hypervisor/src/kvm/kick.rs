//! Getting a thread out of `KVM_RUN`.
//!
//! The kicker sends a real-time signal; its handler, on the vCPU's own thread, sets
//! `immediate_exit` in that thread's `kvm_run` page. Whether the signal comes just before the
//! ioctl, inside it, or while a device is being served, the next or current `KVM_RUN` returns
//! `EINTR` after completing what was outstanding: no kick is lost.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::kvm_run;

use crate::{Error, Kicker, Result};

thread_local! {
    // A const-initialised Cell without a destructor: reading it in a signal handler is plain
    // memory access.
    static RUNNING: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal used for kicks. A process that blocks or handles signals must leave it alone.
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 7
}

extern "C" fn on_kick(_signal: i32) {
    let run = RUNNING.get();
    if !run.is_null() {
        // SAFETY: the pointer is set only while `Entered` lives on this thread, which the
        // vCPU's mapping of `kvm_run` outlives; the handler runs on the same thread, so the
        // store is sequenced with the thread's own accesses (which are volatile as well).
        unsafe { ptr::addr_of_mut!((*run).immediate_exit).write_volatile(1) };
    }
}

/// Installs the handler, once for the process.
pub(super) fn install() -> Result<()> {
    static DONE: OnceLock<std::result::Result<(), i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: an all-zero sigaction is a valid value of that plain C struct.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as extern "C" fn(i32) as usize;
        // KVM_RUN returns EINTR all the same; the system calls of devices go on undisturbed.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler touches only a thread-local Cell and the kvm_run page, which is
        // async-signal-safe; the struct is initialised.
        match unsafe { libc::sigaction(kick_signal(), &action, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or_default()),
        }
    });
    done.map_err(|errno| Error::Os {
        call: "sigaction",
        source: std::io::Error::from_raw_os_error(errno),
    })
}

/// One vCPU's kick state.
#[derive(Debug, Default)]
pub(super) struct KvmKicker {
    pending: AtomicBool,
    /// Thread in `run`. Signals are sent under this lock, so never to a thread that has gone.
    thread: Mutex<Option<libc::pid_t>>,
}

impl Kicker for KvmKicker {
    fn kick(&self) {
        self.pending.store(true, Ordering::SeqCst);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tid) = *thread {
            // SAFETY: tgkill takes three integers; the thread is alive (see `thread`), and the
            // signal has a handler. It can fail only if the thread is gone, which the lock
            // excludes, or if the queue of signals is full, in which case one is under way.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
        }
    }
}

/// This thread is in `run`; kicks reach it until this is dropped.
#[derive(Debug)]
pub(super) struct Entered {
    kicker: Arc<KvmKicker>,
}

impl Entered {
    /// Registers the calling thread as the one that runs the vCPU of `run`.
    ///
    /// # Safety
    /// `run` must stay mapped until the value is dropped, on the same thread.
    pub(super) unsafe fn new(kicker: &Arc<KvmKicker>, run: *mut kvm_run) -> Self {
        // SAFETY: the caller vouches for the mapping. Kicks that set the flag for an earlier
        // run are covered by `pending`, which the caller looks at after this.
        unsafe { ptr::addr_of_mut!((*run).immediate_exit).write_volatile(0) };
        RUNNING.set(run);
        compiler_fence(Ordering::SeqCst);
        // SAFETY: no arguments, no failure.
        let tid = unsafe { libc::gettid() };
        *kicker.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(tid);
        Self {
            kicker: Arc::clone(kicker),
        }
    }

    /// Whether a kick is outstanding; takes it.
    pub(super) fn take_kick(&self) -> bool {
        self.kicker.pending.swap(false, Ordering::SeqCst)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        *self
            .kicker
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        RUNNING.set(ptr::null_mut());
    }
}
