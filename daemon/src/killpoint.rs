//! Named points at which a test can have the daemon die, as a power cut or `kill -9` would.
//!
//! `VIREO_KILL_AT=NAME` in the daemon's environment; without it a point costs one comparison.

use std::sync::OnceLock;

static CHOSEN: OnceLock<Option<String>> = OnceLock::new();

/// Dies here if the environment chose this point.
pub fn killpoint(name: &str) {
    let chosen = CHOSEN.get_or_init(|| std::env::var("VIREO_KILL_AT").ok());
    if chosen.as_deref() == Some(name) {
        // SAFETY: getpid and kill take and return plain numbers.
        unsafe {
            libc::kill(libc::getpid(), libc::SIGKILL);
        }
    }
}
