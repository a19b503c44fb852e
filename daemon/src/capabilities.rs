//! What the host is, and what domains it runs: the two capabilities documents.

use std::arch::x86_64::__cpuid_count;
use std::path::Path;

use hypervisor::cpu::features::{self, Place, Reg};
use hypervisor::cpu::models::{self, Vendor};
use hypervisor::host;
use xml_schemas::capabilities::{
    Capabilities, Cell, CellCpu, GuestCapabilities, GuestMachine, HostCapabilities, HostCpu,
};
use xml_schemas::domain::{MAX_VCPUS, MachineName};
use xml_schemas::domcaps::{
    CpuModes, CustomModel, DeviceCapability, DomainCapabilities, HostModel,
};

use crate::error::{Error, ErrorCode, Result};
use crate::node;

/// Architectures of guests, with their word size.
const ARCHITECTURES: [(&str, u32); 2] = [("i686", 32), ("x86_64", 64)];

/// `<capabilities>`
pub fn host(vmm: &Path, data: &Path) -> String {
    let capabilities = Capabilities {
        host: HostCapabilities {
            uuid: node::host_uuid(data),
            cpu: host_cpu(),
            power_management: Vec::new(),
            iommu: Some(
                Path::new("/sys/class/iommu")
                    .read_dir()
                    .is_ok_and(|mut d| d.next().is_some()),
            ),
            migration_transports: Vec::new(),
            cells: node::nodes().into_iter().map(cell).collect(),
        },
        guests: ARCHITECTURES
            .iter()
            .map(|&(arch, word_size)| guest(vmm, arch, word_size))
            .collect(),
    };
    capabilities.format()
}

fn guest(vmm: &Path, arch: &str, word_size: u32) -> GuestCapabilities {
    let machine = |machine: &MachineName| GuestMachine {
        name: machine.name.to_owned(),
        canonical: machine.canonical.map(str::to_owned),
        max_cpus: MAX_VCPUS,
    };
    GuestCapabilities {
        arch: arch.to_owned(),
        word_size,
        emulator: vmm.display().to_string(),
        machines: MachineName::ALL.iter().map(machine).collect(),
        domain_types: domain_types().into_iter().map(str::to_owned).collect(),
    }
}

/// What ordinary guests run on here: `kvm` only where hardware stands behind it.
fn domain_types() -> Vec<&'static str> {
    if host::report().prefers_kvm() {
        vec!["qemu", "kvm"]
    } else {
        vec!["qemu"]
    }
}

fn cell(id: u32) -> Cell {
    const PAGE_KIB: u64 = 4;
    let memory_kib = node::node_memory(id, "MemTotal").unwrap_or_else(node::memory_kib);
    let distances = (0u32..).zip(node::node_distances(id)).collect();
    let cpu = |id| {
        let place = node::place(id);
        CellCpu {
            id,
            place: Some((place.socket, place.die, place.core)),
            siblings: node::siblings(id),
        }
    };
    Cell {
        id,
        memory_kib,
        pages: std::iter::once((PAGE_KIB, memory_kib / PAGE_KIB))
            .chain(
                node::huge_pages_kib()
                    .into_iter()
                    .map(|kib| (kib, node::huge_pages(id, kib))),
            )
            .collect(),
        distances,
        cpus: node::node_cpus(id).into_iter().map(cpu).collect(),
    }
}

/// Whether this host's CPU shows a feature.
fn host_has(place: Place) -> bool {
    let family = place.function & 0x8000_0000;
    if __cpuid_count(family, 0).eax < place.function {
        return false;
    }
    let leaf = __cpuid_count(place.function, place.index);
    let register = match place.reg {
        Reg::Eax => leaf.eax,
        Reg::Ebx => leaf.ebx,
        Reg::Ecx => leaf.ecx,
        Reg::Edx => leaf.edx,
    };
    register & (1 << place.bit) != 0
}

/// Every feature of this host's CPU.
pub fn host_features() -> Vec<&'static str> {
    features::all()
        .filter(|(_, place)| host_has(*place))
        .map(|(name, _)| name)
        .collect()
}

/// A vendor as libvirt spells it.
pub fn vendor_name(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Intel => "Intel",
        Vendor::Amd => "AMD",
        Vendor::Hygon => "Hygon",
    }
}

/// Who made this host's CPU.
pub fn host_vendor() -> Option<Vendor> {
    match node::cpuinfo("vendor_id").as_deref() {
        Some("GenuineIntel") => Some(Vendor::Intel),
        Some("AuthenticAMD") => Some(Vendor::Amd),
        Some("HygonGenuine") => Some(Vendor::Hygon),
        _ => None,
    }
}

/// The model of the host's vendor that has most of what the host has and nothing else.
fn nearest_model(have: &[&str]) -> Option<&'static models::Model> {
    let vendor = host_vendor();
    models::names()
        .filter_map(models::find)
        .filter(|model| vendor == Some(model.vendor))
        .filter(|model| model.features().iter().all(|f| have.contains(f)))
        .max_by_key(|model| model.features().len())
}

fn host_cpu() -> HostCpu {
    let have = host_features();
    let model = nearest_model(&have);
    let of_model = model.map(models::Model::features).unwrap_or_default();
    let number = |name: &str| -> Option<u32> { node::cpuinfo(name)?.parse().ok() };
    let microcode = node::cpuinfo("microcode")
        .and_then(|text| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok());
    let info = node::info();
    HostCpu {
        arch: "x86_64".to_owned(),
        model: model.map(|model| model.name.to_owned()),
        vendor: host_vendor().map(|vendor| vendor_name(vendor).to_owned()),
        microcode,
        signature: match (number("cpu family"), number("model"), number("stepping")) {
            (Some(family), Some(model), Some(stepping)) => Some((family, model, stepping)),
            _ => None,
        },
        tsc: None,
        topology: Some((info.sockets, 1, info.cores, info.threads)),
        features: have
            .into_iter()
            .filter(|feature| !of_model.contains(feature))
            .map(str::to_owned)
            .collect(),
        page_sizes_kib: std::iter::once(4).chain(node::huge_pages_kib()).collect(),
    }
}

/// What is asked of the second document; what is not said is chosen.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// The program.
    pub emulator: Option<String>,
    /// `x86_64` or `i686`.
    pub arch: Option<String>,
    /// The machine's name.
    pub machine: Option<String>,
    /// `kvm` or `qemu`.
    pub virttype: Option<String>,
}

/// Those that libvirt has a name for.
const KNOWN_ARCHITECTURES: &str = "alpha armv6l armv7b armv7l aarch64 cris i686 ia64 itanium lm32 loongarch64 m68k \
    microblaze microblazeel mips mipsel mips64 mips64el or32 parisc parisc64 ppc ppc64 ppc64le ppcemb riscv32 riscv64 \
    s390 s390x sh4 sh4eb sparc sparc64 unicore32 x86_64 xtensa xtensaeb";

/// `<domainCapabilities>`
///
/// # Errors
/// What libvirt says of an architecture, a machine, a type or a program it does not have.
pub fn domain(vmm: &Path, wanted: &Wanted) -> Result<String> {
    let bad = |text| Error::new(ErrorCode::INVALID_ARG, text);
    let path = vmm.display().to_string();
    let arch = wanted.arch.as_deref().unwrap_or("x86_64");
    if !KNOWN_ARCHITECTURES.split(' ').any(|known| known == arch) {
        return Err(bad(format!("unknown architecture: {arch}")));
    }
    if !ARCHITECTURES.iter().any(|(known, _)| *known == arch) {
        return Err(Error::unsupported(format!(
            "unable to find any emulator to serve '{arch}' architecture"
        )));
    }
    if let Some(emulator) = wanted.emulator.as_deref().filter(|&e| e != path) {
        return Err(bad(format!(
            "'{emulator}' is not the emulator here, which is '{path}'"
        )));
    }
    let report = host::report();
    let kvm = report.prefers_kvm();
    let domain_type = match wanted.virttype.as_deref() {
        None if kvm => "kvm",
        None | Some("qemu") => "qemu",
        Some("kvm") if kvm => "kvm",
        Some("kvm") => {
            return Err(bad(format!(
                "the accel 'kvm' is not supported by '{path}' on this host: {report}"
            )));
        }
        Some(other) => return Err(bad(format!("unknown virttype: {other}"))),
    };
    let machine = wanted.machine.as_deref().unwrap_or(MachineName::DEFAULT);
    let machine = MachineName::canonical(machine).ok_or_else(|| {
        bad(format!(
            "the machine '{machine}' is not supported by emulator '{path}'"
        ))
    })?;
    let bios = crate::drivers::domain::firmware::bios();
    let i440fx = machine.starts_with("pc-i440fx");
    let capabilities = DomainCapabilities {
        path,
        domain_type: domain_type.to_owned(),
        machine,
        arch: arch.to_owned(),
        max_vcpus: MAX_VCPUS,
        firmware: bios.map(|_| "bios".to_owned()).into_iter().collect(),
        loaders: bios.map(str::to_owned).into_iter().collect(),
        cpu: cpu_modes(domain_type == "kvm"),
        devices: devices(i440fx),
        features: [
            ("vmcoreinfo", false),
            ("genid", true),
            ("backingStoreInput", true),
            ("backup", false),
        ]
        .map(|(name, works)| (name.to_owned(), works))
        .into(),
    };
    Ok(capabilities.format())
}

fn cpu_modes(kvm: bool) -> CpuModes {
    let have = host_features();
    let custom = models::names()
        .filter_map(models::find)
        .map(|model| CustomModel {
            name: model.name.to_owned(),
            // The software CPU decides at start, feature by feature.
            usable: kvm.then(|| model.features().iter().all(|f| have.contains(f))),
            vendor: vendor_name(model.vendor).to_owned(),
        });
    let host_model = || {
        let model = nearest_model(&have)?;
        let of_model = model.features();
        let beyond = have.iter().filter(|f| !of_model.contains(f));
        Some(HostModel {
            model: model.name.to_owned(),
            vendor: Some(vendor_name(model.vendor).to_owned()),
            features: beyond.map(|f| ((*f).to_owned(), true)).collect(),
        })
    };
    CpuModes {
        host_passthrough: kvm,
        maximum: true,
        host_model: if kvm { host_model() } else { None },
        custom: custom.collect(),
    }
}

/// libvirt's device kinds, and what the machine has of them.
fn devices(i440fx: bool) -> Vec<DeviceCapability> {
    let there = |name: &str, enums: &[(&str, &[&str])]| DeviceCapability {
        name: name.to_owned(),
        supported: true,
        enums: enums
            .iter()
            .map(|(name, values)| {
                let values = values.iter().map(|value| (*value).to_owned());
                ((*name).to_owned(), values.collect())
            })
            .collect(),
    };
    // What is called IDE is an AHCI controller here: a definition may have it where QEMU's would.
    let buses: &[&str] = match i440fx {
        true => &["ide", "scsi", "virtio", "sata"],
        false => &["scsi", "virtio", "sata"],
    };
    vec![
        there(
            "disk",
            &[
                ("diskDevice", &["disk", "cdrom"]),
                ("bus", buses),
                ("model", &["virtio", "virtio-non-transitional"]),
            ],
        ),
        DeviceCapability::unsupported("graphics"),
        DeviceCapability::unsupported("video"),
        DeviceCapability::unsupported("hostdev"),
        there(
            "rng",
            &[
                ("model", &["virtio", "virtio-non-transitional"]),
                ("backendModel", &["random", "builtin"]),
            ],
        ),
        DeviceCapability::unsupported("filesystem"),
        DeviceCapability::unsupported("tpm"),
        DeviceCapability::unsupported("redirdev"),
        there("channel", &[("type", &["pty", "unix"])]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_document_names_the_software_cpu() {
        let temp = crate::files::testing::TempFolder::new();
        let text = host(Path::new("/usr/bin/vireo-vmm"), &temp.0);
        assert!(text.starts_with("<capabilities>"), "{text}");
    }

    #[test]
    fn what_is_not_there_is_refused_as_libvirt_does() {
        let of = |arch: Option<&str>, machine: Option<&str>, virttype: Option<&str>| {
            let wanted = Wanted {
                arch: arch.map(str::to_owned),
                machine: machine.map(str::to_owned),
                virttype: virttype.map(str::to_owned),
                emulator: None,
            };
            domain(Path::new("/vmm"), &wanted)
        };
        assert!(of(None, None, Some("qemu")).is_ok());
        assert_eq!(of(Some("aarch64"), None, None).unwrap_err().code.0, 67);
        assert_eq!(
            of(Some("bogus"), None, None).unwrap_err().message,
            "invalid argument: unknown architecture: bogus"
        );
        assert_eq!(
            of(None, Some("foo"), None).unwrap_err().message,
            "invalid argument: the machine 'foo' is not supported by emulator '/vmm'"
        );
        assert_eq!(of(None, None, Some("xen")).unwrap_err().code.0, 8);
    }
}
