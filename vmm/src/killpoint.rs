//! Named points at which a test can have the VMM die, as `kill -9` would, or stand still, as one that hangs.
//!
//! `VIREO_KILL_AT=NAME` or `VIREO_STOP_AT=NAME` in its environment; without them a point costs a comparison.

use std::sync::OnceLock;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

static CHOSEN: OnceLock<[Option<String>; 2]> = OnceLock::new();

/// Dies or stops here if the environment chose this point.
pub fn killpoint(name: &str) {
    let variables = ["VIREO_KILL_AT", "VIREO_STOP_AT"];
    let chosen = CHOSEN.get_or_init(|| variables.map(|variable| std::env::var(variable).ok()));
    for (chosen, signal) in chosen.iter().zip([Signal::SIGKILL, Signal::SIGSTOP]) {
        if chosen.as_deref() == Some(name)
            && let Err(error) = kill(Pid::this(), signal)
        {
            log::error!("kill: {error}");
        }
    }
}
