//! Storage pools and volumes, as users of virsh, virt-install and libvirt's Python module know them.

mod contents;
mod guests;
mod pools;
mod volumes;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use vireo_tests::{Rig, Run, both, both_refuse, left_out, which};

const SECRET: &str = "22222222-2222-2222-2222-222222222221";

#[track_caller]
fn program(program: &str, args: &[&str]) -> String {
    let run: Run = Command::new(program)
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        .output()
        .unwrap()
        .into();
    assert_eq!(run.status, 0, "{program} {args:?}: {} {}", run.out, run.err);
    run.out
}

/// A rig with an active pool `p` in its folder `p`.
fn pool() -> (Rig, PathBuf) {
    let rig = Rig::new();
    let folder = rig.path("p");
    let target = folder.to_str().unwrap().to_owned();
    let made = rig
        .vireo(&["pool-create-as", "p", "dir", "--target", &target, "--build"])
        .ok();
    assert_eq!(made, "Pool p created\n\n");
    (rig, folder)
}

fn is_root() -> bool {
    // SAFETY: geteuid(2) takes nothing and returns a number.
    unsafe { libc::geteuid() == 0 }
}

fn missing(programs: &[&str]) -> bool {
    for program in programs {
        if !which(program) {
            left_out(&format!("needs {program}"));
            return true;
        }
    }
    false
}

/// What a pool or volume prints, without what no two of them have in common.
fn steady(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let varies = ["<atime>", "<mtime>", "<ctime>", "<uuid>", "unit='bytes'>"];
        if !varies.iter().any(|word| line.contains(word)) {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// Something to be found again: every MiB says which it is, and every other one is a hole.
fn pattern(path: &Path, mebibytes: u64) {
    let file = File::create(path).unwrap();
    file.set_len(mebibytes << 20).unwrap();
    for n in (0..mebibytes).step_by(2) {
        file.write_all_at(format!("mebibyte {n}").as_bytes(), n << 20)
            .unwrap();
    }
}
