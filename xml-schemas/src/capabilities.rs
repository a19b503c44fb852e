//! The capabilities document: what the host is, and what guests it runs.

use crate::dom::{Element, format_element};

/// `<capabilities>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// `<host>`.
    pub host: HostCapabilities,
    /// `<guest>` elements, by architecture.
    pub guests: Vec<GuestCapabilities>,
}

/// `<host>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostCapabilities {
    /// The host's UUID (SMBIOS, or made once and kept).
    pub uuid: Option<String>,
    /// The host's CPU.
    pub cpu: HostCpu,
    /// `suspend_mem`, `suspend_disk`, `suspend_hybrid` as far as the host can.
    pub power_management: Vec<String>,
    /// Whether an IOMMU is active.
    pub iommu: Option<bool>,
    /// URI transports that migration understands (`tcp`); empty: no migration yet.
    pub migration_transports: Vec<String>,
    /// NUMA nodes.
    pub cells: Vec<Cell>,
}

/// `<host><cpu>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostCpu {
    /// `x86_64`.
    pub arch: String,
    /// libvirt's name of the nearest model.
    pub model: Option<String>,
    /// `Intel`, `AMD`…
    pub vendor: Option<String>,
    /// Microcode revision.
    pub microcode: Option<u64>,
    /// Signature: family, model, stepping.
    pub signature: Option<(u32, u32, u32)>,
    /// TSC frequency in Hz, and whether the guest can be given another one.
    pub tsc: Option<(u64, bool)>,
    /// Sockets, dies, cores, threads: each at least 1.
    pub topology: Option<(u32, u32, u32, u32)>,
    /// Features beyond the model.
    pub features: Vec<String>,
    /// Page sizes in KiB.
    pub page_sizes_kib: Vec<u64>,
}

/// A NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cell {
    /// Node number.
    pub id: u32,
    /// Its memory in KiB.
    pub memory_kib: u64,
    /// Pages it has: size in KiB, count.
    pub pages: Vec<(u64, u64)>,
    /// Distance to each node: node number, distance.
    pub distances: Vec<(u32, u32)>,
    /// Its CPUs.
    pub cpus: Vec<CellCpu>,
}

/// A CPU of a NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CellCpu {
    /// The kernel's number.
    pub id: u32,
    /// Socket, die, core; `None` if the kernel does not say.
    pub place: Option<(u32, u32, u32)>,
    /// Numbers of the CPUs on the same core, as a list like `0,4`.
    pub siblings: Option<String>,
}

/// `<guest>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestCapabilities {
    /// `x86_64` or `i686`.
    pub arch: String,
    /// 64 or 32.
    pub word_size: u32,
    /// Path of `vireo-vmm`.
    pub emulator: String,
    /// Machine names: name, the canonical name if it is an alias, most vCPUs.
    pub machines: Vec<GuestMachine>,
    /// `qemu` (the software CPU) and, where it is usable, `kvm`.
    pub domain_types: Vec<String>,
}

/// `<machine>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestMachine {
    /// The name in documents.
    pub name: String,
    /// What it stands for, if it is an alias.
    pub canonical: Option<String>,
    /// The most vCPUs.
    pub max_cpus: u32,
}

impl Capabilities {
    /// The document.
    pub fn format(&self) -> String {
        let mut out = String::new();
        format_element(&mut out, &self.to_element(), 0);
        out.push('\n');
        out
    }
}

impl Capabilities {
    fn to_element(&self) -> Element {
        Element::new("capabilities")
    }
}
