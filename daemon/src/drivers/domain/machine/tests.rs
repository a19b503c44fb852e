use std::io::{Read, Write};

use xml_schemas::Validation;
use xml_schemas::domain::HostFacts;

use super::*;
use crate::files::testing::TempFolder;

fn around(folder: &TempFolder) -> Surroundings {
    let secrets =
        crate::drivers::secret::Driver::open(folder.0.join("secrets"), std::sync::Arc::default());
    let secrets = std::sync::Arc::new(secrets.unwrap());
    let roots = crate::roots::Roots::choose(Some(&folder.0), false, |_| None).unwrap();
    let storage = crate::drivers::storage::Driver::new(
        &roots,
        String::new(),
        std::sync::Arc::clone(&secrets),
        std::sync::Arc::default(),
    );
    let hub = std::sync::Arc::default();
    let networks = crate::drivers::network::Driver::new(roots, hub);
    Surroundings {
        channels: folder.0.join("channel"),
        folder: folder.0.clone(),
        logs: folder.0.clone(),
        taken_cids: Vec::new(),
        secrets,
        storage: std::sync::Arc::new(storage.unwrap()),
        networks: std::sync::Arc::new(networks.unwrap()),
        owner: crate::drivers::network::plug::Owner {
            name: "t".to_owned(),
            uuid: uuid::Uuid::from_u128(1),
        },
    }
}

fn domain(kernel: &Path, devices: &str) -> Domain {
    let xml = format!(
        "<domain type='qemu'><name>t</name><memory unit='MiB'>8</memory>
         <os><type>hvm</type><kernel>{}</kernel></os>
         <features><acpi/></features><devices>{devices}</devices></domain>",
        kernel.display()
    );
    let mut domain = Domain::parse(&xml, Validation::Lenient).unwrap().domain;
    let host = HostFacts {
        emulator: "/usr/bin/vireo-vmm".to_owned(),
        kvm: Ok(()),
        memory_kib: 1 << 20,
        kvm_max_vcpus: 4,
        soft_max_vcpus: 4,
    };
    domain.fill_defaults(&host).unwrap();
    domain
}

fn kernel(folder: &TempFolder) -> PathBuf {
    let kernel = folder.0.join("kernel");
    fs::write(&kernel, "kernel").unwrap();
    kernel
}

#[test]
fn a_machine_has_its_kernel_and_its_terminal() {
    let folder = TempFolder::new();
    let machine = build(
        &domain(&kernel(&folder), "<serial type='pty'/>"),
        7,
        around(&folder),
    )
    .unwrap();
    assert_eq!(machine.config.memory_bytes, 8 << 20);
    assert!(machine.config.acpi);
    assert_eq!(machine.descriptors.len(), 2);
    let live = machine.definition.format(xml_schemas::domain::View::Live);
    assert!(live.contains("id='7'"), "{live}");
    assert!(live.contains("<source path='/dev/pts/"), "{live}");
    assert!(live.contains("<alias name='serial0'/>"), "{live}");
}

#[test]
fn a_failed_build_leaves_no_socket() {
    let folder = TempFolder::new();
    let socket = folder.0.join("s.sock");
    let devices = format!(
        "<serial type='unix'><source mode='bind' path='{}'/></serial>
         <serial type='file'><source path='{}/out'/></serial>
         <serial type='file'><source path='{}/nowhere/out'/></serial>",
        socket.display(),
        folder.0.display(),
        folder.0.display(),
    );
    let error = build(&domain(&kernel(&folder), &devices), 1, around(&folder)).unwrap_err();
    let expected = format!(
        "cannot open '{}/nowhere/out': No such file or directory",
        folder.0.display()
    );
    assert_eq!(error.message, expected);
    assert!(!socket.exists());
    assert!(!folder.0.join("out").exists());
}

#[test]
fn messages_name_files() {
    let names = Names(vec![(14, "/k".to_owned())]);
    assert_eq!(
        names.explain("descriptor 14: not a kernel"),
        "'/k': not a kernel"
    );
    assert_eq!(names.explain("descriptor 144: x"), "descriptor 144: x");
}

#[test]
fn kernels_must_be_files() {
    let folder = TempFolder::new();
    let error = build(&domain(&folder.0.join("no"), ""), 1, around(&folder)).unwrap_err();
    assert_eq!(error.code.0, 38);
    assert!(error.message.starts_with("cannot open kernel '"), "{error}");
    let error = build(&domain(&folder.0, ""), 1, around(&folder)).unwrap_err();
    assert!(error.message.ends_with("is not a file"), "{error}");
}

#[test]
fn terminals_pass_bytes_unchanged() {
    let (mut master, path) = open_pty().unwrap();
    let mut slave = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    master.write_all(b"a\r\n\x03").unwrap();
    let mut bytes = [0; 4];
    slave.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"a\r\n\x03");
    slave.write_all(b"b\n").unwrap();
    let mut bytes = [0; 2];
    master.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"b\n");
}

#[test]
fn clocks() {
    let at = |offset| {
        let clock = Clock {
            offset,
            timers: Vec::new(),
        };
        rtc_offset(&clock, UNIX_EPOCH + Duration::from_secs(1000))
    };
    let variable = ClockOffset::Variable {
        adjustment: -5,
        localtime: false,
    };
    assert_eq!(at(variable), Ok(-5));
    assert_eq!(at(ClockOffset::Absolute { start: Some(400) }), Ok(-600));
    let utc = ClockOffset::Utc {
        adjustment: Some("x".to_owned()),
    };
    assert!(at(utc).is_err());
}
