//! A machine on its way to another process (`vmm_api::migrate` has the stream): the connection,
//! and the two sides. What a machine's states are is `machine::save`'s business, as for saves.

pub mod disks;
pub mod link;
pub mod source;
mod stuck;
pub mod target;

pub use source::{Right, Source, Tuning};
pub use target::{Incoming, Permit};
