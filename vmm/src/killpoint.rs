//! Named points at which a test can have the VMM die, as `kill -9` would.
//!
//! `VIREO_KILL_AT=NAME` in its environment; without it a point costs one comparison.

use std::sync::OnceLock;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

static CHOSEN: OnceLock<Option<String>> = OnceLock::new();

/// Dies here if the environment chose this point.
pub fn killpoint(name: &str) {
    let chosen = CHOSEN.get_or_init(|| std::env::var("VIREO_KILL_AT").ok());
    if chosen.as_deref() == Some(name)
        && let Err(error) = kill(Pid::this(), Signal::SIGKILL)
    {
        log::error!("kill: {error}");
    }
}
