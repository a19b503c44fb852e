//! What can't be done, and what is damaged.

use std::path::Path;
use std::process::Output;

use super::{Scratch, have, qemu, qemu_io, qemu_ok, vireo, vireo_ok};

/// Both do the same with the same words: code and output.
#[track_caller]
pub fn alike(folder: &Path, line: &[&str]) {
    let (ours, theirs) = (vireo(folder, line), qemu(folder, line));
    same(&ours, &theirs, line);
}

/// Both have ended alike.
#[track_caller]
pub fn same(ours: &Output, theirs: &Output, line: &[&str]) {
    let said = |output: &Output, name: &str| {
        String::from_utf8_lossy(&output.stderr).replace(&format!("{name}: "), "")
    };
    assert_eq!(
        said(ours, "vireo image").trim_end(),
        said(theirs, "qemu-img").trim_end(),
        "{line:?}"
    );
    assert_eq!(
        String::from_utf8_lossy(&ours.stdout),
        String::from_utf8_lossy(&theirs.stdout),
        "{line:?}"
    );
    assert_eq!(ours.status.code(), theirs.status.code(), "{line:?}");
}

#[test]
fn both_fail_alike() {
    if !have("both_fail_alike") {
        return;
    }
    let scratch = Scratch::new("fail");
    let folder = &scratch.0;
    qemu_ok(folder, &["create", "-q", "-f", "qcow2", "a", "1M"]);
    qemu_ok(folder, &["create", "-q", "-f", "raw", "r", "1M"]);
    qemu_io(folder, &["-f", "raw", "-c", "write -P 9 5k 1k", "r"]);
    let lines: &[&[&str]] = &[
        &["info", "none"],
        &["check", "none"],
        &["check", "r"],
        &["compare", "a", "none"],
        &["compare", "-f", "qcow2", "-F", "raw", "a", "r"],
        &["compare", "-s", "a", "a"],
        &["snapshot", "-a", "none", "a"],
        &["snapshot", "-d", "none", "a"],
        &["bitmap", "--remove", "a", "none"],
        &["bitmap", "--add", "-g", "5", "a", "x"],
        &["resize", "a", "512k"],
        &["resize", "--preallocation=falloc", "a", "1M"],
        &["create", "-f", "nonsense", "x", "1M"],
        &["create", "-f", "qcow2", "-o", "nonsense=1", "x", "1M"],
        &["create", "-f", "qcow2", "-o", "cluster_size=100", "x", "1M"],
        &["create", "-f", "qcow2", "-b", "none", "-F", "raw", "x"],
        &["create", "-f", "qcow2", "-b", "a", "x"],
        &["create", "-f", "raw", "x"],
        &["convert", "none", "x"],
        &["convert", "-O", "qcow2", "a", "nowhere/x"],
        &["convert", "-O", "raw", "-c", "a", "x"],
        &["convert", "-l", "none", "a", "x"],
        &["convert", "-S", "3", "a", "x"],
        &["commit", "a"],
        &["rebase", "-b", "none", "-F", "raw", "a"],
        &["rebase", "-u", "-b", "none", "a"],
        &["amend", "-o", "nonsense=1", "a"],
        &["amend", "-o", "backing_file=r,backing_fmt=raw", "a"],
        &["amend", "-o", "encrypt.state=active", "a"],
        &["amend", "-o", "help", "a"],
        &["amend", "-o", "help", "r"],
        &["amend", "-f", "luks", "-o", "help"],
        &["resize", "a", "-512k"],
        &["convert", "--bitmaps", "-O", "qcow2", "-f", "raw", "r", "x"],
        &["measure"],
        &["dd", "if=a"],
    ];
    for line in lines {
        alike(folder, line);
    }
    // What fails leaves nothing behind.
    assert!(!folder.join("x").exists());
    // Formats that are not ours are refused by name.
    qemu_ok(folder, &["create", "-q", "-f", "vmdk", "v", "1M"]);
    let said = vireo(folder, &["info", "v"]);
    assert_eq!(said.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&said.stderr).contains("vmdk"));
}

#[test]
fn what_is_damaged_is_seen_and_left_alone() {
    if !have("what_is_damaged_is_seen_and_left_alone") {
        return;
    }
    let scratch = Scratch::new("damaged");
    let folder = &scratch.0;
    qemu_ok(folder, &["create", "-q", "-f", "qcow2", "a", "1M"]);
    qemu_io(folder, &["-f", "qcow2", "-c", "write -P 9 0 128k", "a"]);
    // The first L2 entry (the table is the fifth cluster of a new image) with a bit that has no
    // meaning: nothing that a repair may guess at.
    let path = folder.join("a");
    let mut bytes = std::fs::read(&path).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let l2 = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    bytes[l2 as usize + 6] |= 1;
    std::fs::write(&path, &bytes).unwrap();
    for args in [
        &["check", "-q", "a"][..],
        &["check", "-q", "-r", "leaks", "a"],
        &["check", "-q", "-r", "all", "a"],
    ] {
        assert_eq!(vireo(folder, args).status.code(), Some(2), "{args:?}");
        assert_eq!(qemu(folder, args).status.code(), Some(2), "{args:?}");
    }
    let said = vireo(folder, &["check", "a"]);
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("reserved bits set: 80000000"), "{said}");

    // A version of the future is refused, not taken for a disk's bytes.
    bytes[7] = 9;
    std::fs::write(folder.join("future"), &bytes).unwrap();
    for line in [&["info", "future"][..], &["convert", "future", "x"]] {
        let said = vireo(folder, line);
        assert_eq!(said.status.code(), Some(1));
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.contains("version 9"), "{said}");
        assert_eq!(qemu(folder, line).status.code(), Some(1));
    }
    assert!(!folder.join("x").exists());

    // What is too large is not begun.
    let said = vireo(folder, &["create", "-q", "-f", "qcow2", "x", "70000T"]);
    assert_eq!(said.status.code(), Some(1));
    assert!(!folder.join("x").exists());
    // Less is a number, not an option.
    qemu_ok(folder, &["create", "-q", "-f", "raw", "r", "3M"]);
    vireo_ok(
        folder,
        &["resize", "-q", "-f", "raw", "--shrink", "r", "-1M"],
    );
    assert_eq!(std::fs::metadata(folder.join("r")).unwrap().len(), 2 << 20);
}
