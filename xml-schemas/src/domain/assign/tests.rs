//! Against what libvirt 9.0 assigns for the same devices.

use super::*;
use crate::Validation;
use crate::domain::{HostFacts, View};

fn define(machine: &str, devices: &str) -> Result<Domain, XmlError> {
    let xml = format!(
        "<domain type='qemu'><name>a</name><memory>65536</memory><os><type machine='{machine}'>\
         hvm</type><kernel>/k</kernel></os><devices>{devices}</devices></domain>"
    );
    let mut domain = Domain::parse(&xml, Validation::Strict)?.domain;
    domain.fill_defaults(&HostFacts {
        emulator: "/usr/bin/vireo-vmm".into(),
        kvm: Err("no /dev/kvm".into()),
        memory_kib: 1 << 20,
        kvm_max_vcpus: 8,
        soft_max_vcpus: 8,
    })?;
    Ok(domain)
}

/// Every device with its address, as libvirt prints it: `disk 06:00.0`.
fn addresses(domain: &Domain) -> Vec<String> {
    let text = |e: &Element| {
        let address = PciAddress::of(e).unwrap()?.to_string();
        let multi = e.child("address").unwrap().attr("multifunction") == Some("on");
        let what = match index_of(e) {
            Some(index) if is_controller(e, "pci") => {
                let target = e.child("target").unwrap();
                assert_eq!(target.attr("chassis").unwrap(), index.to_string());
                format!("port {index} {}", target.attr("port").unwrap())
            }
            _ => e.name.to_string(),
        };
        let multi = if multi { " multi" } else { "" };
        Some(format!("{what} {}{multi}", &address[5..]))
    };
    let mut all: Vec<_> = domain.devices.rest.iter().filter_map(text).collect();
    all.sort();
    all
}

const SOME: &str = "<disk type='file'><source file='/a'/><target dev='vda'/></disk>\
    <disk type='file'><source file='/b'/><target dev='vdb'/></disk>\
    <interface type='bridge'><source bridge='br0'/></interface>\
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
    <channel type='pty'><target type='virtio' name='foo'/></channel>\
    <console type='pty'><target type='serial'/></console>\
    <console type='pty'><target type='virtio'/></console>\
    <rng model='virtio'><backend model='random'/></rng><vsock/>";

/// What libvirt 9.0 assigns for the same devices.
#[test]
fn q35_addresses_are_libvirts() {
    let domain = define("q35", SOME).unwrap();
    assert_eq!(
        addresses(&domain),
        [
            "controller 02:00.0",
            "disk 03:00.0",
            "disk 04:00.0",
            "interface 01:00.0",
            "memballoon 05:00.0",
            "port 1 0x8 00:01.0 multi",
            "port 2 0x9 00:01.1",
            "port 3 0xa 00:01.2",
            "port 4 0xb 00:01.3",
            "port 5 0xc 00:01.4",
            "port 6 0xd 00:01.5",
            "port 7 0xe 00:01.6",
            "port 8 0xf 00:01.7",
            "rng 06:00.0",
            "vsock 07:00.0",
        ]
    );
    let channels: Vec<_> = domain
        .devices
        .rest
        .iter()
        .filter(|e| e.name == "channel")
        .map(|e| channel_place(e).unwrap())
        .collect();
    assert_eq!(channels, [(0, Some(1)), (0, Some(2))]);
}

#[test]
fn i440fx_addresses_are_libvirts() {
    let domain = define("pc", SOME).unwrap();
    assert_eq!(
        addresses(&domain),
        [
            "controller 00:03.0",
            "disk 00:04.0",
            "disk 00:05.0",
            "interface 00:02.0",
            "memballoon 00:06.0",
            "rng 00:07.0",
            "vsock 00:08.0",
        ]
    );
}

#[test]
fn what_is_stated_stays_and_what_was_assigned_is_stable() {
    let stated = "<disk type='file'><source file='/a'/><target dev='vda'/>\
         <address type='pci' bus='9' slot='0'/></disk>\
         <watchdog model='i6300esb'/>";
    let domain = define("q35", stated).unwrap();
    let first = addresses(&domain);
    assert_eq!(
        first,
        [
            "disk 09:00.0",
            "memballoon 01:00.0",
            "port 1 0x8 00:01.0 multi",
            "port 2 0x9 00:01.1",
            "port 3 0xa 00:01.2",
            "port 4 0xb 00:01.3",
            "port 5 0xc 00:01.4",
            "port 6 0xd 00:01.5",
            "port 7 0xe 00:01.6",
            "port 8 0xf 00:01.7",
            "port 9 0x10 00:02.0",
            "watchdog 00:03.0",
        ]
    );
    let text = domain.format(View::Inactive);
    let mut again = Domain::parse(&text, Validation::Strict).unwrap().domain;
    super::assign(&mut again).unwrap();
    assert_eq!(addresses(&again), first);
    assert_eq!(again.format(View::Inactive), text);
}

#[test]
fn conflicts_have_libvirts_words() {
    let disk = |dev: &str, address: &str| {
        format!(
            "<disk type='file'><source file='/a'/><target dev='{dev}'/>\
             <address type='pci' {address}/></disk>"
        )
    };
    for (devices, words) in [
        (
            disk("vda", "bus='0' slot='5'") + &disk("vdb", "bus='0' slot='5'"),
            "XML error: Attempted double use of PCI Address 0000:00:05.0",
        ),
        (
            disk("vda", "bus='1' slot='3'"),
            "XML error: Invalid PCI address 0000:01:03.0. slot must be <= 0",
        ),
        (
            disk("vda", "domain='1' bus='0' slot='2'"),
            "XML error: Invalid PCI address 0001:00:02.0. Only PCI domain 0 is available",
        ),
        (
            disk("vda", "bus='1' slot='0'") + &disk("vda", "bus='2' slot='0'"),
            "XML error: target 'vda' duplicated for disk sources '/a' and '/a'",
        ),
        (
            "<channel type='pty'><target type='virtio' name='x'/><address type='virtio-serial' \
             controller='0' bus='0' port='3'/></channel><channel type='pty'><target \
             type='virtio' name='y'/><address type='virtio-serial' controller='0' bus='0' \
             port='3'/></channel>"
                .to_owned(),
            "XML error: virtio serial port 3 on controller 0 is already occupied",
        ),
    ] {
        let error = define("q35", &devices).unwrap_err().to_string();
        assert!(error.starts_with(words), "{error}");
    }
}

#[test]
fn running_devices_have_libvirts_ids() {
    let mut domain = define("q35", SOME).unwrap();
    domain.devices.assign_aliases();
    let ids: Vec<_> = domain
        .devices
        .rest
        .iter()
        .filter_map(super::super::device::alias)
        .filter(|id| !id.starts_with("pci."))
        .collect();
    assert_eq!(
        ids,
        [
            "virtio-disk0",
            "virtio-disk1",
            "virtio-serial0",
            "pcie.0",
            "net0",
            "channel0",
            "channel1",
            "balloon0",
            "rng0",
            "vsock0",
        ]
    );
    assert_eq!(
        domain.devices.consoles[1].alias.as_deref(),
        Some("console1")
    );
}
