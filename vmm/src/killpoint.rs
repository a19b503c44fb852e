//! Named points at which a test can have the VMM die, as `kill -9` would, or stand still, as one that hangs.
//!
//! `VIREO_KILL_AT=NAME` or `VIREO_STOP_AT=NAME` (or several: `NAME,NAME`) in its environment; without them a point costs a
//! comparison.

use std::sync::OnceLock;

use nix::sys::signal::{Signal, raise};

static CHOSEN: OnceLock<[Option<String>; 2]> = OnceLock::new();

fn is_among(chosen: Option<&str>, name: &str) -> bool {
    chosen.is_some_and(|chosen| chosen.split(',').any(|one| one == name))
}

/// Dies or stops here if the environment chose this point.
pub fn killpoint(name: &str) {
    let variables = ["VIREO_KILL_AT", "VIREO_STOP_AT"];
    let chosen = CHOSEN.get_or_init(|| variables.map(|variable| std::env::var(variable).ok()));
    for (chosen, signal) in chosen.iter().zip([Signal::SIGKILL, Signal::SIGSTOP]) {
        if is_among(chosen.as_deref(), name)
            // To this thread, which so does not go on until another one has taken the signal.
            && let Err(error) = raise(signal)
        {
            log::error!("raise: {error}");
        }
    }
}
