//! What a wrong definition gets: libvirt's words and numbers, and the line.

mod common;

use common::host;
use xml_schemas::ErrorCode as Code;
use xml_schemas::domain::{View, check_name};
use xml_schemas::{Domain, Validation, XmlError};

fn define(xml: &str) -> Result<Domain, XmlError> {
    let mut domain = Domain::parse(xml, Validation::Lenient)?.domain;
    domain.fill_defaults(&host())?;
    Ok(domain)
}

fn refused(xml: &str) -> (Code, String) {
    match define(xml) {
        Ok(domain) => panic!("taken:\n{xml}\nas\n{}", domain.format(View::Inactive)),
        Err(e) => (e.code(), e.to_string()),
    }
}

/// A definition whose parts can be replaced.
fn with(part: &str, replacement: &str) -> String {
    let xml = "<domain type='qemu'>\n<name>a</name>\n<memory>1024</memory>\n<vcpu>1</vcpu>\n\
               <os><type>hvm</type></os>\n<clock offset='utc'/>\n<devices>\n<serial type='pty'/>\n\
               </devices>\n</domain>";
    assert!(xml.contains(part));
    xml.replace(part, replacement)
}

#[test]
fn the_pattern_itself_is_fine() {
    define(&with("1024", "1024")).unwrap();
}

#[test]
fn wrong_parts_get_libvirts_words_and_numbers() {
    for (part, replacement, code, message) in [
        (
            "type='qemu'",
            "",
            Code::Internal,
            "internal error: missing domain type attribute (line 1)",
        ),
        (
            "'qemu'",
            "'foo'",
            Code::ConfigUnsupported,
            "unsupported configuration: invalid domain type foo (line 1)",
        ),
        (
            "'qemu'",
            "'xen'",
            Code::ConfigUnsupported,
            "unsupported configuration: domain type 'xen' does not run here, only 'kvm' and 'qemu' \
             do (line 1)",
        ),
        (
            "<name>a</name>",
            "",
            Code::NoName,
            "missing name information",
        ),
        (
            "<name>a</name>",
            "<name></name>",
            Code::NoName,
            "missing name information (line 2)",
        ),
        (
            "<name>a",
            "<name>a/b",
            Code::Xml,
            "XML error: name a/b cannot contain '/' (line 2)",
        ),
        (
            "<name>a",
            "<name>..",
            Code::Xml,
            "XML error: name '..' cannot name a domain (line 2)",
        ),
        (
            "<name>a",
            "<name>a&#10;b",
            Code::XmlDetail,
            "invalid char in name: \\n (line 2)",
        ),
        (
            "<vcpu>",
            "<uuid>zz</uuid><vcpu>",
            Code::Internal,
            "internal error: malformed uuid element (line 4)",
        ),
        (
            "<vcpu>",
            "<title>a\nb</title><vcpu>",
            Code::Xml,
            "XML error: Domain title can't contain newlines (line 4)",
        ),
        (
            "1024",
            "0",
            Code::Xml,
            "XML error: Memory size must be specified via <memory> or in the <numa> configuration \
             (line 3)",
        ),
        (
            "<memory>1024</memory>",
            "",
            Code::Xml,
            "XML error: Memory size must be specified via <memory> or in the <numa> configuration",
        ),
        (
            "1024",
            "-5",
            Code::Xml,
            "XML error: Invalid value '-5' for element or attribute './memory[1]' (line 3)",
        ),
        (
            "<memory>",
            "<memory unit='foo'>",
            Code::InvalidArg,
            "invalid argument: unknown suffix 'foo' (line 3)",
        ),
        (
            "<memory>",
            "<memory unit='EiB'>",
            Code::Overflow,
            "numerical overflow: value too large: 1024EiB (line 3)",
        ),
        (
            "<vcpu>1",
            "<vcpu>0",
            Code::Xml,
            "XML error: invalid maximum number of vCPUs '0' (line 4)",
        ),
        (
            "<vcpu>1",
            "<vcpu>x",
            Code::Xml,
            "XML error: maximum vcpus count must be an integer (line 4)",
        ),
        (
            "<vcpu>1",
            "<vcpu>10000",
            Code::ConfigUnsupported,
            "unsupported configuration: Maximum CPUs greater than specified machine type limit 64",
        ),
        (
            "<vcpu>1",
            "<vcpu current='4'>2",
            Code::ConfigUnsupported,
            "unsupported configuration: maximum vCPU count must not be less than current vCPU \
             count (line 4)",
        ),
        (
            "<os><type>hvm</type></os>",
            "",
            Code::Xml,
            "XML error: an os <type> must be specified",
        ),
        (
            ">hvm<",
            "><",
            Code::Xml,
            "XML error: an os <type> must be specified (line 5)",
        ),
        (
            ">hvm<",
            ">foo<",
            Code::ConfigUnsupported,
            "unsupported configuration: unknown OS type 'foo' (line 5)",
        ),
        (
            ">hvm<",
            ">exe<",
            Code::ConfigUnsupported,
            "unsupported configuration: no support for os type 'exe': only 'hvm' domains run",
        ),
        (
            "<type>",
            "<type arch='aarch64'>",
            Code::ConfigUnsupported,
            "unsupported configuration: No emulator found for arch 'aarch64'",
        ),
        (
            "<type>",
            "<type machine='s390-ccw-virtio'>",
            Code::ConfigUnsupported,
            "unsupported configuration: unsupported machine type 's390-ccw-virtio'",
        ),
        (
            "</type>",
            "</type><boot dev='foo'/>",
            Code::Xml,
            "XML error: Invalid value for attribute 'dev' in element 'boot': 'foo'. (line 5)",
        ),
        (
            "</type>",
            "</type><kernel>vmlinuz</kernel>",
            Code::Xml,
            "XML error: Invalid value 'vmlinuz' for element 'kernel' (line 5)",
        ),
        (
            "'utc'",
            "'foo'",
            Code::ConfigUnsupported,
            "unsupported configuration: unknown clock offset 'foo' (line 6)",
        ),
        (
            "<clock",
            "<on_crash>foo</on_crash><clock",
            Code::ConfigUnsupported,
            "unsupported configuration: unknown on_crash action: foo (line 6)",
        ),
        (
            "<clock",
            "<on_reboot>coredump-restart</on_reboot><clock",
            Code::ConfigUnsupported,
            "unsupported configuration: unknown on_reboot action: coredump-restart (line 6)",
        ),
        (
            "'pty'",
            "'foo'",
            Code::ConfigUnsupported,
            "unsupported configuration: unknown type presented to host for character device: foo \
             (line 8)",
        ),
        (
            "'pty'",
            "'file'",
            Code::Internal,
            "internal error: Missing source path attribute for char device (line 8)",
        ),
        (
            "<serial type='pty'/>",
            "<serial type='tcp'><source mode='bind' host='x'/></serial>",
            Code::Internal,
            "internal error: Missing source service attribute for char device (line 8)",
        ),
        (
            "<serial type='pty'/>",
            "<serial type='pty'><target port='x'/></serial>",
            Code::Xml,
            "XML error: Invalid port number: x (line 8)",
        ),
        (
            "<serial type='pty'/>",
            "<console type='pty'/><console type='null'/>",
            Code::ConfigUnsupported,
            "unsupported configuration: Only the first console can be a serial port (line 8)",
        ),
        (
            "<serial type='pty'/>",
            "<disk type='file'><source file='/x'/></disk>",
            Code::Xml,
            "XML error: Missing required element 'target' in element 'disk' (line 8)",
        ),
        (
            "domain",
            "network",
            Code::Xml,
            "XML error: expecting root element of 'domain', not 'network' (line 1)",
        ),
    ] {
        assert_eq!(
            refused(&with(part, replacement)),
            (code, message.to_owned()),
            "{part} -> {replacement}"
        );
    }
    assert_eq!(Code::Xml.number(), 27);
    assert_eq!(Code::InvalidSchema.number(), 92);
    assert_eq!(Code::ConfigUnsupported.number(), 67);
}

#[test]
fn strict_refuses_what_lenient_keeps_out_with_a_warning() {
    let xml = with("<clock", "<foo/>\n<clock");
    let parsed = Domain::parse(&xml, Validation::Lenient).unwrap();
    assert_eq!(parsed.warnings.len(), 1);
    assert!(!parsed.domain.format(View::Inactive).contains("foo"));
    let error = Domain::parse(&xml, Validation::Strict).unwrap_err();
    assert_eq!(error.code(), Code::InvalidSchema);
    assert_eq!(error.line(), Some(6));
    assert_eq!(
        error.to_string(),
        "XML document failed to validate against schema: element 'foo' is not allowed in element \
         'domain' (line 6)"
    );
}

#[test]
fn names_that_libvirt_takes_are_taken() {
    for name in [
        "a",
        ".hidden",
        "centos 7",
        "ünïcode",
        "a.b-c_d",
        "-x",
        "'\"<&",
    ] {
        assert_eq!(check_name(name), Ok(()), "{name}");
    }
    for name in [
        "",
        " ",
        ".",
        "..",
        "a/b",
        "a\nb",
        "a\u{7f}",
        &"x".repeat(201),
    ] {
        assert!(check_name(name).is_err(), "{name}");
    }
}

#[test]
fn uuids_are_read_as_libvirt_reads_them() {
    for text in [
        "8c1ac7e6-0a0e-4b3c-9f43-2f0e3d4c9c11",
        "8C1AC7E60A0E4B3C9F432F0E3D4C9C11",
        " 8c1ac7e6 0a0e 4b3c 9f43 2f0e3d4c9c11 ",
    ] {
        let xml = with("<vcpu>", &format!("<uuid>{text}</uuid><vcpu>"));
        let domain = Domain::parse(&xml, Validation::Lenient);
        match domain {
            Ok(parsed) => assert_eq!(
                parsed.domain.uuid.unwrap().to_string(),
                "8c1ac7e6-0a0e-4b3c-9f43-2f0e3d4c9c11"
            ),
            Err(e) => panic!("{text}: {e}"),
        }
    }
    for text in ["8c1ac7e6", "8c1ac7e6-0a0e-4b3c-9f43-2f0e3d4c9c1g", "é"] {
        let xml = with("<vcpu>", &format!("<uuid>{text}</uuid><vcpu>"));
        assert!(define(&xml).is_err(), "{text}");
    }
}
