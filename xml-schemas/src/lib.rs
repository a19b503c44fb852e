//! libvirt XML documents: parse, validate, default, format.
//!
//! A document goes through three stages: text becomes a bounded tree ([`dom`]), the tree is held
//! against the table of what libvirt allows ([`grammar`]), and what Vireo acts on becomes typed
//! ([`domain::Domain`]); everything else stays a subtree and is printed back in libvirt's order.

pub mod capabilities;
pub mod cpuset;
pub mod dom;
pub mod domain;
pub mod domcaps;
mod error;
pub mod grammar;
pub mod network;
pub mod pool;
pub mod secret;
pub mod snapshot;
pub mod units;
pub mod volume;

pub use domain::{Domain, Parsed};
pub use error::{ErrorCode, ErrorDomain, Warning, XmlError};
pub use network::Network;

/// What happens to elements and attributes that libvirt's schema does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validation {
    /// The document is refused (`virsh define --validate`).
    Strict,
    /// They are kept out, with a warning each. Bad values of known attributes are still refused.
    Lenient,
}
