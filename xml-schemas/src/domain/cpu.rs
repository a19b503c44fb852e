//! `<cpu>`: model, features and topology.

use crate::dom::Element;

/// `<cpu>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cpu {
    /// `custom`, `host-model`, `host-passthrough` or `maximum`.
    pub mode: Option<String>,
    /// `minimum`, `exact` or `strict`.
    pub match_: Option<String>,
    /// `none`, `partial` or `full`.
    pub check: Option<String>,
    /// `on` or `off`: whether a guest on this CPU can migrate.
    pub migratable: Option<String>,
    /// `<model>`.
    pub model: Option<CpuModel>,
    /// `<vendor>`.
    pub vendor: Option<String>,
    /// `<topology>`.
    pub topology: Option<CpuTopology>,
    /// `<feature>` elements.
    pub features: Vec<CpuFeature>,
    /// Every other child (cache, maxphysaddr, numa).
    pub rest: Vec<Element>,
}

/// `<cpu><model>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuModel {
    /// A CPU model's name; may be empty when only the attributes are given.
    pub name: String,
    /// `allow` or `forbid`.
    pub fallback: Option<String>,
    /// What CPUID says the vendor is.
    pub vendor_id: Option<String>,
}

/// `<cpu><topology>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTopology {
    /// Sockets, at least 1.
    pub sockets: u32,
    /// Dies a socket; 1 if not stated.
    pub dies: u32,
    /// Cores a die.
    pub cores: u32,
    /// Threads a core.
    pub threads: u32,
}

impl CpuTopology {
    /// How many vCPUs it has; none where nobody could count them.
    pub fn vcpus(&self) -> Option<u32> {
        let all = self.sockets.checked_mul(self.dies)?;
        all.checked_mul(self.cores)?.checked_mul(self.threads)
    }

    /// Whether the APIC ids of its vCPUs, which have a field for each level, are ones that any interrupt reaches.
    pub fn has_ids(&self) -> bool {
        let bits = |count: u32| u64::from(u32::BITS - count.saturating_sub(1).leading_zeros());
        let (threads, cores) = (self.threads, self.dies.saturating_mul(self.cores));
        let last = |count: u32| u64::from(count.saturating_sub(1));
        let (core, socket) = (bits(threads), bits(threads) + bits(cores));
        let id = (u128::from(last(self.sockets)) << socket)
            + (u128::from(last(cores)) << core)
            + u128::from(last(threads));
        id < 255
    }
}

/// `<cpu><feature>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuFeature {
    /// libvirt's name of the feature.
    pub name: String,
    /// What is asked for; `None` as for the host's own CPU.
    pub policy: Option<FeaturePolicy>,
}

/// `<feature policy=…>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FeaturePolicy {
    /// The guest sees it even if the host does not have it.
    Force,
    /// The host must have it, and the guest sees it.
    Require,
    /// The guest sees it if the host has it.
    Optional,
    /// The guest does not see it.
    Disable,
    /// The host must not have it.
    Forbid,
}

impl FeaturePolicy {
    /// The name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Force => "force",
            Self::Require => "require",
            Self::Optional => "optional",
            Self::Disable => "disable",
            Self::Forbid => "forbid",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "force" => Self::Force,
            "require" => Self::Require,
            "optional" => Self::Optional,
            "disable" => Self::Disable,
            "forbid" => Self::Forbid,
            _ => return None,
        })
    }
}
