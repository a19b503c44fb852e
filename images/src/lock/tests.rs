use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use super::*;
use crate::testing::{Scratch, have};

fn open(path: &std::path::Path) -> fs::File {
    fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

#[test]
fn two_writers_never_readers_always() {
    let dir = Scratch::new();
    let path = dir.file("disk", 1 << 20);
    let allowed = |first, second| {
        let (a, b) = (open(&path), open(&path));
        change(&a, "disk", Usage::NONE, first).unwrap();
        let result = change(&b, "disk", Usage::NONE, second);
        assert!(matches!(result, Ok(()) | Err(Error::Locked { .. })));
        // What was refused has left nothing behind: the first one can go on to anything.
        if result.is_err() {
            change(&a, "disk", first, Usage::NONE).unwrap();
            change(&a, "disk", Usage::NONE, Usage::WRITE).unwrap();
        }
        result.is_ok()
    };
    let all = [Usage::READ, Usage::WRITE_RAW, Usage::WRITE, Usage::SHARED];
    let together: Vec<(usize, usize)> = (0..4)
        .flat_map(|a| (0..4).map(move |b| (a, b)))
        .filter(|&(a, b)| allowed(all[a], all[b]))
        .collect();
    assert_eq!(together, [(0, 0), (3, 3)]);
}

#[test]
fn the_lock_goes_with_the_description_and_ends_with_its_last_copy() {
    let dir = Scratch::new();
    let path = dir.file("disk", 4096);
    let daemon = open(&path);
    change(&daemon, "disk", Usage::NONE, Usage::WRITE).unwrap();
    let vmm = daemon.try_clone().unwrap();
    drop(daemon);
    let other = open(&path);
    assert!(change(&other, "disk", Usage::NONE, Usage::READ).is_err());
    drop(vmm);
    change(&other, "disk", Usage::NONE, Usage::READ).unwrap();
    // A guest that reads may become one that writes, and back.
    change(&other, "disk", Usage::READ, Usage::WRITE).unwrap();
    change(&other, "disk", Usage::WRITE, Usage::READ).unwrap();
    change(open(&path), "disk", Usage::NONE, Usage::READ).unwrap();
}

#[test]
fn the_message_names_the_holder() {
    let dir = Scratch::new();
    let path = dir.file("disk", 4096);
    let held = open(&path);
    change(&held, "disk", Usage::NONE, Usage::WRITE).unwrap();
    // In another process: only there is the lock held once ours is closed.
    let mut child = Command::new("sleep")
        .arg("30")
        .stdin(Stdio::from(held.try_clone().unwrap()))
        .spawn()
        .unwrap();
    drop(held);
    let said = change(open(&path), "disk", Usage::NONE, Usage::WRITE)
        .unwrap_err()
        .to_string();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(
        said,
        format!("disk is in use by process {} (sleep)", child.id())
    );
}

#[test]
fn qemu_and_we_respect_each_other() {
    if !have("qemu-img") || !have("qemu-io") {
        eprintln!("left out: qemu_and_we_respect_each_other needs qemu-utils");
        return;
    }
    let dir = Scratch::new();
    let path = dir.path().join("disk.qcow2");
    let qemu_img = |args: &[&str]| {
        let output = Command::new("qemu-img")
            .args(args)
            .arg(&path)
            .output()
            .unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg("1M")
        .status()
        .unwrap();
    assert!(status.success());

    // A guest of ours runs: qemu-img fails as it does on QEMU's guests.
    let ours = open(&path);
    change(&ours, "disk.qcow2", Usage::NONE, Usage::WRITE).unwrap();
    let (ok, said) = qemu_img(&["info"]);
    assert!(
        !ok && said.contains("Failed to get shared \"write\" lock"),
        "{said}"
    );
    let (ok, said) = qemu_img(&["check"]);
    assert!(!ok && said.contains("Failed to get"), "{said}");
    assert!(qemu_img(&["info", "-U"]).0);
    // Read only, others may read and not write.
    change(&ours, "disk.qcow2", Usage::WRITE, Usage::READ).unwrap();
    assert!(qemu_img(&["info"]).0);
    let (ok, said) = qemu_img(&["check", "-r", "all"]);
    assert!(
        !ok && said.contains("Failed to get \"write\" lock"),
        "{said}"
    );
    change(&ours, "disk.qcow2", Usage::READ, Usage::NONE).unwrap();

    // QEMU has it: we are refused, and told who.
    for (args, allowed) in [(&["-r"][..], &[Usage::READ][..]), (&[], &[])] {
        let mut qemu_io = Command::new("qemu-io")
            .args(args)
            .args(["-f", "qcow2"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It has opened the image when it answers.
        let mut input = qemu_io.stdin.take().unwrap();
        input.write_all(b"length\n").unwrap();
        let mut output = BufReader::new(qemu_io.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        for usage in [Usage::READ, Usage::WRITE_RAW, Usage::WRITE, Usage::SHARED] {
            let result = change(open(&path), "disk.qcow2", Usage::NONE, usage);
            assert_eq!(
                result.is_ok(),
                allowed.contains(&usage),
                "{args:?} {usage:?}"
            );
            if let Err(error) = result {
                assert_eq!(
                    error.to_string(),
                    format!("disk.qcow2 is in use by process {} (qemu-io)", qemu_io.id())
                );
            }
        }
        drop(input);
        qemu_io.wait().unwrap();
    }
}
