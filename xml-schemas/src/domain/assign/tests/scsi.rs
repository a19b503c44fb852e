//! SCSI controllers and their disks.

use super::*;

const VIRTIO: &str = "<controller type='scsi' model='virtio-scsi'/>";

fn disk(dev: &str, rest: &str) -> String {
    format!("<disk type='file'><source file='/a'/><target dev='{dev}' bus='scsi'/>{rest}</disk>")
}

fn at(address: &str) -> String {
    format!("<address type='drive' {address}/>")
}

/// Disks with their places, controllers with models and addresses, each with its id.
fn places(machine: &str, devices: &str) -> Vec<String> {
    let mut domain = define(machine, devices).unwrap();
    let text = domain.format(View::Inactive);
    let mut again = Domain::parse(&text, Validation::Strict).unwrap().domain;
    again.fill_defaults(&host()).unwrap();
    assert_eq!(again.format(View::Inactive), text);
    assert!(
        domain.unsupported().is_empty(),
        "{:?}",
        domain.unsupported()
    );
    domain.devices.assign_aliases();
    let mut found = Vec::new();
    for e in &domain.devices.rest {
        let alias = crate::domain::device::alias(e).unwrap_or_default();
        if let Some(place) = crate::domain::device::DriveAddress::of(e).unwrap() {
            found.push(format!("{alias} {} {}", place.target, place.unit));
        } else if is_controller(e, "scsi") {
            let address = PciAddress::of(e).unwrap().unwrap();
            let model = e.attr("model").unwrap();
            found.push(format!("{alias} {model} {}", &address.to_string()[5..]));
        }
    }
    found
}

#[test]
fn disks_have_libvirts_places_and_controllers_are_virtio() {
    assert_eq!(
        places("q35", &(disk("sda", "") + &disk("sdb", ""))),
        [
            "scsi0-0-0-0 0 0",
            "scsi0-0-0-1 0 1",
            "scsi0 virtio-scsi 01:00.0"
        ]
    );
    // Seven to a controller by their names; those before it are made, too.
    assert_eq!(
        places("pc", &disk("sdo", "")),
        [
            "scsi2-0-0-0 0 0",
            "scsi0 virtio-scsi 00:02.0",
            "scsi1 virtio-scsi 00:03.0",
            "scsi2 virtio-scsi 00:04.0"
        ]
    );
    assert_eq!(
        places(
            "q35",
            &(VIRTIO.to_owned() + &disk("vdb", &at("target='255' unit='16383'")))
        ),
        ["scsi0-0-255-16383 255 16383", "scsi0 virtio-scsi 01:00.0"]
    );
    for model in ["", "model='auto'"] {
        let controller = format!("<controller type='scsi' {model}/>");
        assert_eq!(places("q35", &controller), ["scsi0 virtio-scsi 01:00.0"]);
    }
    // Controllers have their turn in the order in which they are listed.
    let serial = "<controller type='virtio-serial' index='0'/>";
    assert_eq!(
        places("pc", &(serial.to_owned() + VIRTIO)),
        ["scsi0 virtio-scsi 00:03.0"]
    );
    let plain = define(
        "q35",
        "<controller type='scsi'><driver queues='0' iothread='0'/></controller>",
    );
    assert!(!plain.unwrap().format(View::Inactive).contains("<driver"));
}

#[test]
fn what_cannot_be_has_libvirts_words() {
    let config = "unsupported configuration: ";
    let internal = "internal error: ";
    let lsilogic = "<controller type='scsi' model='lsilogic'>";
    for (devices, kind, words) in [
        (
            disk("sda", &at("unit='1'")) + &disk("sdb", ""),
            config,
            "Found duplicate drive address for disk with target name 'sda' controller='0' bus='0' target='0' unit='1'",
        ),
        (
            disk("sda", &at("bus='1'")),
            internal,
            "SCSI controller only supports 1 bus",
        ),
        (
            disk("sda", "<address type='pci' slot='5'/>"),
            config,
            "Invalid address type 'pci' for the disk 'sda' with the bus type 'scsi'",
        ),
        (
            disk("foo", ""),
            "XML error: ",
            "Unknown disk name 'foo' and no address specified",
        ),
        (
            disk("sda", "<wwn>5000c50015ea71</wwn>"),
            internal,
            "Malformed wwn: 5000c50015ea71",
        ),
        (
            disk("sda", "<vendor>123456789</vendor>"),
            config,
            "disk vendor is more than 8 characters",
        ),
        (
            disk("sda", "<product>12345678901234567</product>"),
            config,
            "disk product is more than 16 characters",
        ),
        (
            disk("sda", "<vendor>\u{e4}</vendor>"),
            "XML error: ",
            "disk vendor is not printable string",
        ),
        (
            disk("sda", "<driver name='qemu' queues='2'/>"),
            config,
            "queues attribute in disk driver element is only supported by virtio-blk",
        ),
        (
            format!("{lsilogic}<driver queues='2'/></controller>"),
            config,
            "'queues' is only supported by virtio-scsi controller",
        ),
        (
            format!("{lsilogic}<driver iothread='2'/></controller>"),
            "XML error: ",
            "'iothread' attribute only supported for virtio scsi controllers",
        ),
    ] {
        let error = define_with("q35", &devices, Validation::Lenient);
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with(&format!("{kind}{words}")), "{error}");
    }
}

#[test]
fn what_the_machine_does_not_have_is_refused_by_name() {
    let refused = |devices: &str| {
        let domain = define("q35", devices).unwrap();
        let found = domain.unsupported();
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let lsilogic = "<controller type='scsi' index='0' model='lsilogic'/>";
    assert_eq!(
        refused(&(lsilogic.to_owned() + &disk("sda", ""))),
        ["disk 'sda' (it is at a SCSI controller of model 'lsilogic': use virtio-scsi)"]
    );
    // What is empty is done without, as before there were any.
    let empty = "<disk type='file' device='cdrom'><target dev='sda' bus='scsi'/></disk>";
    let domain = define("q35", &(lsilogic.to_owned() + empty)).unwrap();
    assert!(domain.unsupported().is_empty());
    let left_out = domain.left_out();
    let left_out: Vec<&str> = left_out.iter().map(|what| what.name.as_str()).collect();
    assert_eq!(left_out, ["disk 'sda'", "controller 'scsi'"]);
    assert_eq!(
        refused(&(VIRTIO.to_owned() + &disk("sda", &at("target='256'")))),
        [
            "disk 'sda' (no such place at a scsi controller: controller='0' bus='0' target='256' unit='0')"
        ]
    );
    assert_eq!(
        refused("<controller type='scsi' model='virtio-scsi'><driver queues='17'/></controller>"),
        ["controller 'scsi' (more than 16 queues)"]
    );
    assert_eq!(
        refused("<controller type='scsi' model='virtio-scsi'><driver packed='on'/></controller>"),
        ["controller 'scsi' (driver packed='on')"]
    );
    let lun = "<disk type='block' device='lun'><source dev='/dev/x'/><target dev='sda' bus='scsi'/></disk>";
    assert_eq!(refused(lun), ["disk 'sda' (device 'lun')"]);
}

/// An earlier version has left them out, and so stored them without places.
#[test]
fn what_was_stored_before_gets_places() {
    let text = "<domain type='qemu'><name>a</name><memory>65536</memory><os><type machine='pc-q35-7.2'>hvm</type>\
         <kernel>/k</kernel></os><devices><disk type='file' device='cdrom'><target dev='sdb' bus='scsi'/></disk>\
         <controller type='scsi' index='0' model='virtio-scsi'/>\
         <controller type='pci' index='0' model='pcie-root'/></devices></domain>";
    let mut domain = Domain::parse_stored(text).unwrap();
    domain.place_drives().unwrap();
    domain.devices.assign_aliases();
    let live = domain.format(View::Live);
    for part in [
        "scsi0-0-0-1",
        "<address type='pci' domain='0x0000' bus='0x01'",
    ] {
        assert!(live.contains(part), "{live}");
    }
    let before = domain.clone();
    domain.place_drives().unwrap();
    assert_eq!(domain, before);
}
