//! Whether this VMM can run a definition, decided at start and by name.

use super::{Domain, HostFacts};
use crate::error::XmlError;

/// Something a definition asks for that the machine does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported {
    /// What, as a person would name it: `disk 'vda'`, `tpm`, `cputune`.
    pub name: String,
    /// Why, or what to do about it; may be empty.
    pub reason: String,
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        if !self.reason.is_empty() {
            write!(f, " ({})", self.reason)?;
        }
        Ok(())
    }
}

/// A definition that can be started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Startable {
    /// Devices that a guest with a text console does without; the log and `dominfo` name them.
    pub left_out: Vec<Unsupported>,
}

pub(super) fn check_startable(domain: &Domain, host: &HostFacts) -> Result<Startable, XmlError> {
    if domain.memory.total_kib > host.memory_kib {
        return Err(XmlError::unsupported(format!(
            "the domain's {} KiB of memory are more than the host's {} KiB",
            domain.memory.total_kib, host.memory_kib
        )));
    }
    if let (super::DomainType::Kvm, Err(reason)) = (domain.domain_type, &host.kvm) {
        return Err(XmlError::unsupported(format!(
            "domain type 'kvm' cannot run here: {reason}; use type='qemu' for the software CPU"
        )));
    }
    let refused = unsupported(domain);
    if refused.is_empty() {
        return Ok(Startable {
            left_out: left_out(domain),
        });
    }
    let names: Vec<String> = refused.iter().map(ToString::to_string).collect();
    Err(XmlError::unsupported(format!(
        "this machine does not have: {}",
        names.join(", ")
    )))
}

pub(super) fn unsupported(domain: &Domain) -> Vec<Unsupported> {
    let mut found = Vec::new();
    if domain.os.kernel.is_none() {
        found.push(Unsupported {
            name: "boot from disk or network".to_owned(),
            reason: "there is no firmware yet: give <kernel> in <os>".to_owned(),
        });
    }
    found
}

pub(super) fn left_out(_domain: &Domain) -> Vec<Unsupported> {
    Vec::new()
}
