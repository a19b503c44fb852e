//! End-to-end tests: what they share.
//!
//! A [`Rig`] is one relocated Vireo (`VIREO_ROOT` in a temporary folder) with its own daemon;
//! dropping it ends every process it started and removes the folder. Tests run in parallel and
//! beside a user's own Vireo.

pub mod certificates;
mod control;
pub mod drives;
mod guests;
pub mod hosts;
pub mod iso;
mod machine;
pub mod moves;
pub mod namespace;
mod rig;
pub mod sshd;
mod terminal;

pub use control::Control;
pub use guests::{
    Kernel, grub_disk, linux_guest, tiny_guest, tiny_guest_with_panic_port, tiny_kernel,
};
pub use machine::{Guest, Said, machine};
pub use rig::{Rig, Run, both, both_refuse, have_kvm, left_out, soak, which};
pub use terminal::Terminal;
