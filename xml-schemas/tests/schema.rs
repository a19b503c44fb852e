//! Our output against libvirt's own RELAX NG schema.

mod common;

use common::{files, host, read, refused_by_libvirt};
use xml_schemas::capabilities::{
    Capabilities, Cell, CellCpu, GuestCapabilities, HostCapabilities, HostCpu,
};
use xml_schemas::domain::View;
use xml_schemas::domcaps::{
    CpuModes, CustomModel, DeviceCapability, DomainCapabilities, HostModel,
};
use xml_schemas::{Domain, Validation};

#[test]
fn what_is_printed_validates() {
    let mut documents = Vec::new();
    for path in files("").into_iter().chain(files("libvirt")) {
        let name = path.display().to_string();
        let mut domain = Domain::parse(&read(&path), Validation::Lenient)
            .unwrap_or_else(|e| panic!("{name}: {e}"))
            .domain;
        domain.fill_defaults(&host()).unwrap();
        documents.push((name.clone(), domain.format(View::Inactive)));
        domain.id = Some(7);
        domain.devices.assign_aliases();
        domain.devices.set_pty_path(0, "/dev/pts/3");
        documents.push((format!("{name} (live)"), domain.format(View::Live)));
    }
    if let Some(refused) = refused_by_libvirt("domain.rng", &documents) {
        assert_eq!(refused, [""; 0]);
    }
}

#[test]
fn capabilities_validate() {
    let capabilities = Capabilities {
        host: HostCapabilities {
            uuid: Some("8c1ac7e6-0a0e-4b3c-9f43-2f0e3d4c9c11".to_owned()),
            cpu: HostCpu {
                arch: "x86_64".to_owned(),
                model: Some("EPYC".to_owned()),
                vendor: Some("AMD".to_owned()),
                microcode: Some(0),
                signature: Some((23, 1, 2)),
                tsc: Some((2_000_000_000, true)),
                topology: Some((1, 1, 2, 1)),
                features: vec!["vme".to_owned()],
                page_sizes_kib: vec![4, 2048],
            },
            power_management: vec!["suspend_mem".to_owned()],
            iommu: Some(false),
            migration_transports: vec!["tcp".to_owned()],
            cells: vec![Cell {
                id: 0,
                memory_kib: 1000,
                pages: vec![(4, 250)],
                distances: vec![(0, 10)],
                cpus: vec![
                    CellCpu {
                        id: 0,
                        place: Some((0, 0, 0)),
                        siblings: Some("0".to_owned()),
                    },
                    CellCpu {
                        id: 1,
                        ..CellCpu::default()
                    },
                ],
            }],
        },
        guests: vec![
            GuestCapabilities::new("x86_64", "/usr/bin/vireo-vmm", 8, Some(64)),
            GuestCapabilities::new("i686", "/usr/bin/vireo-vmm", 8, None),
        ],
    };
    let least = Capabilities {
        host: HostCapabilities {
            cpu: HostCpu {
                arch: "x86_64".to_owned(),
                ..HostCpu::default()
            },
            ..HostCapabilities::default()
        },
        guests: Vec::new(),
    };
    let documents = [
        ("full".to_owned(), capabilities.format()),
        ("least".to_owned(), least.format()),
    ];
    if let Some(refused) = refused_by_libvirt("capability.rng", &documents) {
        assert_eq!(refused, [""; 0]);
    }
}

#[test]
fn domain_capabilities_validate() {
    let full = DomainCapabilities {
        path: "/usr/bin/vireo-vmm".to_owned(),
        domain_type: "qemu".to_owned(),
        machine: "pc-q35-7.2".to_owned(),
        arch: "x86_64".to_owned(),
        max_vcpus: 8,
        firmware: vec!["bios".to_owned()],
        loaders: vec!["/usr/share/OVMF/OVMF_CODE.fd".to_owned()],
        cpu: CpuModes {
            host_passthrough: true,
            maximum: true,
            host_model: Some(HostModel {
                model: "EPYC".to_owned(),
                vendor: Some("AMD".to_owned()),
                features: vec![("x2apic".to_owned(), true), ("vme".to_owned(), false)],
            }),
            custom: vec![CustomModel {
                name: "qemu64".to_owned(),
                usable: Some(true),
                vendor: String::new(),
            }],
        },
        devices: vec![
            DeviceCapability {
                name: "disk".to_owned(),
                supported: true,
                enums: vec![("bus".to_owned(), vec!["virtio".to_owned()])],
            },
            DeviceCapability::unsupported("graphics"),
        ],
        features: vec![("genid".to_owned(), false)],
    };
    let least = DomainCapabilities {
        path: "/usr/bin/vireo-vmm".to_owned(),
        domain_type: "kvm".to_owned(),
        arch: "x86_64".to_owned(),
        ..DomainCapabilities::default()
    };
    let documents = [
        ("full".to_owned(), full.format()),
        ("least".to_owned(), least.format()),
    ];
    if let Some(refused) = refused_by_libvirt("domaincaps.rng", &documents) {
        assert_eq!(refused, [""; 0]);
    }
}
