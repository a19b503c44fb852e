//! A machine on its way to another process (`vmm_api::migrate` has the stream): the connection,
//! and the two sides. What a machine's states are is `machine::save`'s business, as for saves.

pub mod ahead;
pub mod disks;
mod gate;
mod inbox;
pub mod link;
pub mod source;
mod stuck;
pub mod target;

pub use ahead::Ahead;
pub use source::{Right, Source, Tuning};
pub use target::{Incoming, Permit};

/// A moment of a hand-over, for whoever looks for where its time goes (`VIREO_LOG=debug`): microseconds of the monotonic
/// clock, which both sides have in common where they are on one host.
pub fn moment(what: &str) {
    if log::log_enabled!(log::Level::Debug) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let now = now.map_or(0, |now| now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000);
        log::debug!("{now} us: {what}");
    }
}
