//! The capabilities document: what the host is, and what guests it runs.

use crate::dom::{Element, format_element};
use crate::domain::MachineName;

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
    /// Machine names.
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
    /// The document, with the blank lines that libvirt puts between its parts.
    pub fn format(&self) -> String {
        let mut out = String::from("<capabilities>\n\n");
        format_element(&mut out, &self.host.element(), 1);
        out.push('\n');
        for guest in &self.guests {
            format_element(&mut out, &guest.element(), 1);
            out.push('\n');
        }
        out.push_str("</capabilities>\n");
        out
    }
}

fn text(name: &str, value: impl ToString) -> Element {
    Element::with_text(name, value.to_string())
}

fn number(element: Element, name: &str, value: impl ToString) -> Element {
    element.with_attr(name, value.to_string())
}

impl HostCapabilities {
    fn element(&self) -> Element {
        let mut host = Element::new("host");
        if let Some(uuid) = &self.uuid {
            host.push(text("uuid", uuid));
        }
        host.push(self.cpu.element());
        let mut power = Element::new("power_management");
        for kind in &self.power_management {
            power.push(Element::new(kind));
        }
        host.push(power);
        if let Some(iommu) = self.iommu {
            host.push(Element::new("iommu").with_attr("support", if iommu { "yes" } else { "no" }));
        }
        if !self.migration_transports.is_empty() {
            let mut transports = Element::new("uri_transports");
            for transport in &self.migration_transports {
                transports.push(text("uri_transport", transport));
            }
            host.push(
                Element::new("migration_features")
                    .with_child(Element::new("live"))
                    .with_child(transports),
            );
        }
        if !self.cells.is_empty() {
            let mut cells = number(Element::new("cells"), "num", self.cells.len());
            for cell in &self.cells {
                cells.push(cell.element());
            }
            host.push(Element::new("topology").with_child(cells));
        }
        host
    }
}

impl HostCpu {
    fn element(&self) -> Element {
        let mut cpu = Element::new("cpu");
        cpu.push(text("arch", &self.arch));
        if let Some(model) = &self.model {
            cpu.push(text("model", model));
        }
        if let Some(vendor) = &self.vendor {
            cpu.push(text("vendor", vendor));
        }
        // The schema has no place for a revision of 0.
        if let Some(version) = self.microcode.filter(|&v| v > 0) {
            cpu.push(number(Element::new("microcode"), "version", version));
        }
        if let Some((family, model, stepping)) = self.signature.filter(|s| s.0 > 0) {
            let mut e = number(Element::new("signature"), "family", family);
            e.set_attr("model", model.to_string());
            e.set_attr("stepping", stepping.to_string());
            cpu.push(e);
        }
        if let Some((frequency, scaling)) = self.tsc.filter(|t| t.0 > 0) {
            cpu.push(
                number(
                    Element::new("counter").with_attr("name", "tsc"),
                    "frequency",
                    frequency,
                )
                .with_attr("scaling", if scaling { "yes" } else { "no" }),
            );
        }
        if let Some((sockets, dies, cores, threads)) = self.topology {
            let mut e = Element::new("topology");
            for (name, value) in [
                ("sockets", sockets),
                ("dies", dies),
                ("cores", cores),
                ("threads", threads),
            ] {
                e.set_attr(name, value.max(1).to_string());
            }
            cpu.push(e);
        }
        for feature in &self.features {
            cpu.push(Element::new("feature").with_attr("name", feature));
        }
        for size in &self.page_sizes_kib {
            let e = Element::new("pages").with_attr("unit", "KiB");
            cpu.push(number(e, "size", size));
        }
        cpu
    }
}

impl Cell {
    fn element(&self) -> Element {
        let mut cell = number(Element::new("cell"), "id", self.id);
        cell.push(text("memory", self.memory_kib).with_attr("unit", "KiB"));
        for (size, count) in &self.pages {
            let e = text("pages", count).with_attr("unit", "KiB");
            cell.push(number(e, "size", size));
        }
        if !self.distances.is_empty() {
            let mut distances = Element::new("distances");
            for (id, value) in &self.distances {
                let e = number(Element::new("sibling"), "id", id);
                distances.push(number(e, "value", value));
            }
            cell.push(distances);
        }
        let mut cpus = number(Element::new("cpus"), "num", self.cpus.len());
        for cpu in &self.cpus {
            let mut e = number(Element::new("cpu"), "id", cpu.id);
            if let Some((socket, die, core)) = cpu.place {
                e.set_attr("socket_id", socket.to_string());
                e.set_attr("die_id", die.to_string());
                e.set_attr("core_id", core.to_string());
                e.set_opt_attr("siblings", cpu.siblings.as_deref());
            }
            cpus.push(e);
        }
        cell.push(cpus);
        cell
    }
}

impl GuestCapabilities {
    /// What Vireo offers for `arch` (`x86_64` or `i686`): every machine name, the software CPU,
    /// and KVM if `kvm_max_vcpus` is given.
    pub fn new(
        arch: &str,
        emulator: &str,
        soft_max_vcpus: u32,
        kvm_max_vcpus: Option<u32>,
    ) -> Self {
        let max_cpus = kvm_max_vcpus.unwrap_or(0).max(soft_max_vcpus);
        let mut domain_types = vec!["qemu".to_owned()];
        if kvm_max_vcpus.is_some() {
            domain_types.push("kvm".to_owned());
        }
        Self {
            arch: arch.to_owned(),
            word_size: if arch == "i686" { 32 } else { 64 },
            emulator: emulator.to_owned(),
            machines: MachineName::ALL
                .iter()
                .map(|m| GuestMachine {
                    name: m.name.to_owned(),
                    canonical: m.canonical.map(str::to_owned),
                    max_cpus,
                })
                .collect(),
            domain_types,
        }
    }

    fn element(&self) -> Element {
        let mut arch = Element::new("arch").with_attr("name", &self.arch);
        arch.push(text("wordsize", self.word_size));
        arch.push(text("emulator", &self.emulator));
        for machine in &self.machines {
            let mut e = text("machine", &machine.name);
            e.set_opt_attr("canonical", machine.canonical.as_deref());
            e.set_attr("maxCpus", machine.max_cpus.to_string());
            arch.push(e);
        }
        for kind in &self.domain_types {
            arch.push(Element::new("domain").with_attr("type", kind));
        }
        let mut features = Element::new("features");
        if self.arch == "i686" {
            features.push(Element::new("pae"));
            features.push(Element::new("nonpae"));
        }
        for (name, toggle) in [("acpi", "yes"), ("apic", "no")] {
            features.push(
                Element::new(name)
                    .with_attr("default", "on")
                    .with_attr("toggle", toggle),
            );
        }
        features.push(Element::new("cpuselection"));
        features.push(Element::new("deviceboot"));
        Element::new("guest")
            .with_child(text("os_type", "hvm"))
            .with_child(arch)
            .with_child(features)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_libvirts() {
        let capabilities = Capabilities {
            host: HostCapabilities {
                cpu: HostCpu {
                    arch: "x86_64".into(),
                    topology: Some((1, 1, 2, 1)),
                    ..HostCpu::default()
                },
                iommu: Some(false),
                ..HostCapabilities::default()
            },
            guests: vec![GuestCapabilities::new("x86_64", "/bin/v", 8, Some(16))],
        };
        let text = capabilities.format();
        let start = "<capabilities>\n\n  <host>\n    <cpu>\n      <arch>x86_64</arch>\n      \
                     <topology sockets='1' dies='1' cores='2' threads='1'/>\n    </cpu>\n    \
                     <power_management/>\n    <iommu support='no'/>\n  </host>\n\n  <guest>\n";
        assert!(text.starts_with(start), "{text}");
        assert!(text.contains("<machine canonical='pc-q35-7.2' maxCpus='16'>q35</machine>"));
        assert!(text.contains("<domain type='kvm'/>"));
        assert!(text.ends_with("  </guest>\n\n</capabilities>\n"));
    }
}
