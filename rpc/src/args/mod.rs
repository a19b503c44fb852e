//! The arguments and answers of libvirt's procedures, one struct each.
//!
//! The name of a struct is the procedure's name in camel case with `Args`, `Ret`, or `Msg` for events:
//! `DOMAIN_GET_STATE` takes [`DomainGetStateArgs`] and answers [`DomainGetStateRet`]. A procedure that takes or
//! answers nothing uses `()`. Fields have the protocol's names in snake case, except `type`, which is `kind`.
//! All of them in one namespace: `use rpc::args::*` is fine.

mod connect;
mod domain;
mod events;
mod migrate;
mod misc;
mod network;
mod node;
mod qemu;
mod snapshot;
mod storage;
mod tuning;

pub use connect::*;
pub use domain::*;
pub use events::*;
pub use migrate::*;
pub use misc::*;
pub use network::*;
pub use node::*;
pub use qemu::*;
pub use snapshot::*;
pub use storage::*;
pub use tuning::*;
