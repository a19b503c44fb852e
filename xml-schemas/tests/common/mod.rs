//! What the tests of whole documents share.
#![allow(dead_code)] // Each test program uses its part.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use xml_schemas::Domain;
use xml_schemas::domain::HostFacts;

/// Where libvirt's packages put its RELAX NG schemas.
const SCHEMAS: &str = "/usr/share/libvirt/schemas";

pub fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// The documents in a folder of the test data, in order.
pub fn files(folder: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(data().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "xml"))
        .collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn host() -> HostFacts {
    HostFacts {
        emulator: "/usr/bin/vireo-vmm".to_owned(),
        kvm: Ok(()),
        memory_kib: 1 << 30,
        kvm_max_vcpus: 64,
        soft_max_vcpus: 64,
    }
}

/// The definition without what only a running instance has.
pub fn inactive(mut domain: Domain) -> Domain {
    domain.id = None;
    domain
}

/// Whether libvirt's own schema takes the documents: the names of those it does not take, with
/// its reason. `None`, and a line that says so, where the schema is not installed.
pub fn refused_by_libvirt(schema: &str, documents: &[(String, String)]) -> Option<Vec<String>> {
    let schema = Path::new(SCHEMAS).join(schema);
    let xmllint = Command::new("xmllint")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !schema.exists() || !xmllint.is_ok_and(|status| status.success()) {
        println!("left out: needs xmllint and libvirt's schemas (libxml2-utils, libvirt0)");
        return None;
    }
    let folder = std::env::temp_dir().join(format!("vireo-schema-{}", uuid::Uuid::new_v4()));
    std::fs::create_dir(&folder).unwrap();
    for (index, (_, text)) in documents.iter().enumerate() {
        std::fs::write(folder.join(format!("{index}.xml")), text).unwrap();
    }
    let mut refused = Vec::new();
    let all: Vec<usize> = (0..documents.len()).collect();
    for chunk in all.chunks(500) {
        let output = Command::new("xmllint")
            .current_dir(&folder)
            .args(["--noout", "--relaxng"])
            .arg(&schema)
            .args(chunk.iter().map(|index| format!("{index}.xml")))
            .output()
            .unwrap();
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        for &index in chunk {
            let valid = format!("{index}.xml validates");
            if !messages.lines().any(|line| line == valid) {
                let reason: Vec<_> = messages
                    .lines()
                    .filter(|l| l.starts_with(&format!("{index}.xml:")))
                    .collect();
                refused.push(format!("{}: {}", documents[index].0, reason.join("; ")));
            }
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
    Some(refused)
}
