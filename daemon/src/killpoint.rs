//! Named points at which a test can have the daemon die, as a power cut or `kill -9` would, or stand still, as one that
//! hangs.
//!
//! `VIREO_KILL_AT=NAME` or `VIREO_STOP_AT=NAME` (or several: `NAME,NAME`) in its environment; without them a point costs a
//! comparison.
//! `VIREO_LIMIT=NAME=SECONDS` makes a limit shorter that a test could not wait for.

use std::sync::OnceLock;
use std::time::Duration;

static CHOSEN: OnceLock<[Option<String>; 2]> = OnceLock::new();

fn is_among(chosen: Option<&str>, name: &str) -> bool {
    chosen.is_some_and(|chosen| chosen.split(',').any(|one| one == name))
}

/// Dies or stops here if the environment chose this point.
pub fn killpoint(name: &str) {
    let variables = ["VIREO_KILL_AT", "VIREO_STOP_AT"];
    let chosen = CHOSEN.get_or_init(|| variables.map(|variable| std::env::var(variable).ok()));
    for (chosen, signal) in chosen.iter().zip([libc::SIGKILL, libc::SIGSTOP]) {
        if is_among(chosen.as_deref(), name) {
            // To this thread, which so does not go on until another one has taken the signal.
            // SAFETY: takes and gives plain numbers.
            unsafe {
                libc::raise(signal);
            }
        }
    }
}

/// The limit of this name: as it is, unless the environment has another one for a test.
pub fn limit(name: &str, usual: Duration) -> Duration {
    let chosen = std::env::var("VIREO_LIMIT").ok();
    let seconds = chosen.as_deref().and_then(|chosen| {
        let (named, seconds) = chosen.split_once('=')?;
        seconds.parse().ok().filter(|_| named == name)
    });
    seconds.map_or(usual, Duration::from_secs)
}
