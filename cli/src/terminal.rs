//! The terminal in raw mode, and given back as it was, however the program ends.

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// The settings to go back to, for the signal handler; set before it is installed.
static SAVED: AtomicPtr<libc::termios> = AtomicPtr::new(std::ptr::null_mut());
/// The terminal is raw.
static RAW: AtomicBool = AtomicBool::new(false);

/// Signals that end the program.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Standard input's terminal in raw mode; dropping this gives it back.
///
/// A signal that ends the program gives it back first: that happens in the handler itself, so that it works
/// also while the program waits in a write to a terminal that takes no more.
#[derive(Debug)]
pub struct RawTerminal {
    saved: libc::termios,
    handlers: Vec<(libc::c_int, libc::sigaction)>,
}

impl RawTerminal {
    /// Makes the terminal raw: every key goes through, nothing is echoed, no key makes a signal.
    ///
    /// # Errors
    ///
    /// Standard input is no terminal, or doesn't let itself be changed.
    pub fn new() -> io::Result<Self> {
        // SAFETY: cfmakeraw only changes the fields of the struct it is given.
        Self::changed(|settings| unsafe { libc::cfmakeraw(settings) })
    }

    /// Keys are not shown while they are typed; nothing else changes.
    ///
    /// # Errors
    ///
    /// As [`RawTerminal::new`].
    pub fn hidden() -> io::Result<Self> {
        Self::changed(|settings| settings.c_lflag &= !libc::ECHO)
    }

    fn changed(change: impl FnOnce(&mut libc::termios)) -> io::Result<Self> {
        let mut saved = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the pointer is to a live local of the right type, which is written in full on success.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, saved.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded and has written it.
        let saved = unsafe { saved.assume_init() };
        // Never freed: a handler that is just running on another thread may still read it.
        SAVED.store(Box::into_raw(Box::new(saved)), Ordering::Release);
        let mut terminal = Self {
            saved,
            handlers: Vec::new(),
        };
        for signal in ENDING {
            terminal.handle(signal)?;
        }
        let mut raw = saved;
        change(&mut raw);
        RAW.store(true, Ordering::Release);
        // SAFETY: the pointer is to a live local.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSAFLUSH, &raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(terminal)
    }

    fn handle(&mut self, signal: libc::c_int) -> io::Result<()> {
        // SAFETY: `sigaction` is plain data for which all zeroes is valid; the handler is a function with the
        // C calling convention that calls only what is safe in a signal handler; pointers are to live locals.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction =
                give_back_and_end as extern "C" fn(libc::c_int) as libc::sighandler_t;
            libc::sigemptyset(&mut action.sa_mask);
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, &action, &mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            self.handlers.push((signal, before));
        }
        Ok(())
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if RAW.swap(false, Ordering::AcqRel) {
            // TCSADRAIN: what the guest printed last is shown before the mode changes.
            // SAFETY: the pointer is to a live field.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSADRAIN, &self.saved) };
        }
        for (signal, before) in &self.handlers {
            // SAFETY: the pointer is to a live element that sigaction itself filled in.
            unsafe { libc::sigaction(*signal, before, std::ptr::null_mut()) };
        }
    }
}

extern "C" fn give_back_and_end(signal: libc::c_int) {
    if RAW.swap(false, Ordering::AcqRel) {
        let saved = SAVED.load(Ordering::Acquire);
        if !saved.is_null() {
            // SAFETY: tcsetattr may be called in signal handlers; the settings were stored in full before this
            // handler was installed and are never freed.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved) };
        }
    }
    // End by the signal, so that whoever waits for this program sees why.
    // SAFETY: both calls may be made in signal handlers and touch no memory.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
