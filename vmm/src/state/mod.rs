//! A whole machine's state on its way to a file and back: guest memory, ELF cores, the job that
//! writes them. What the states are is the machine's business (`machine::save`).

pub mod block_job;
pub mod core;
pub mod dirty;
pub mod image;
pub mod job;
pub mod live;
pub mod ram;
pub mod switch;
