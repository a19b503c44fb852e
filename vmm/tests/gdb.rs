//! gdb at a small guest: Debian's gdb in batch mode, on both backends.

mod common;

use std::process::{Command, Output, Stdio};

use common::{Rig, backends, guests, wait_for};
use vmm_api::config::Backend;

/// Where guests are loaded and entered.
const ENTRY: u64 = 0x10_0000;

/// A guest that stores a counter, adds to it, and ends; data at 0x180000. Offsets of its
/// instructions are in the comments.
fn counter() -> Vec<u8> {
    vec![
        0xb8, 0x05, 0x00, 0x00, 0x00, // 0: mov eax, 5
        0xa3, 0x00, 0x00, 0x18, 0x00, // 5: mov [0x180000], eax
        0x83, 0xc0, 0x02, // 10: add eax, 2
        0x90, // 13: nop
        0xff, 0x05, 0x00, 0x00, 0x18, 0x00, // 14: inc dword [0x180000]
        0x90, // 20: nop
        0xa1, 0x00, 0x00, 0x18, 0x00, // 21: mov eax, [0x180000]
        0xe6, 0xf4, // 26: out 0xf4, al: the debug exit
        0xeb, 0xfe, // 28: jmp $
    ]
}

fn start(rig: &mut Rig) -> String {
    let socket = rig.path("gdb");
    rig.start_with(&["--gdb", socket.to_str().unwrap(), "--gdb-wait"]);
    wait_for("gdb's socket", || socket.exists().then_some(()));
    socket.to_str().unwrap().to_owned()
}

fn gdb(socket: &str, commands: &[&str]) -> Output {
    let mut gdb = Command::new("timeout");
    gdb.args([
        "100",
        "gdb",
        "-nx",
        "-batch",
        "-ex",
        "set architecture i386:x86-64",
    ]);
    gdb.args(["-ex", "set tcp connect-timeout 30"]);
    gdb.args(["-ex", &format!("target remote {socket}")]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    gdb.stdin(Stdio::null()).output().unwrap()
}

fn have_gdb() -> bool {
    let found = Command::new("gdb").arg("--version").output().is_ok();
    if !found {
        println!("left out: gdb's protocol needs gdb");
    }
    found
}

#[test]
fn gdb_breaks_steps_watches_and_writes() {
    if !have_gdb() {
        return;
    }
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(&counter()));
        let socket = start(&mut rig);
        let at = |offset: u64| format!("*{:#x}", ENTRY + offset);
        // KVM without hardware virtualization runs the guest in an emulator that knows no data
        // breakpoints.
        let watches = backend == Backend::Soft || hypervisor::host::report().prefers_kvm();
        if !watches {
            println!("left out: watchpoints on KVM needs hardware virtualization");
        }
        let watch = |command: &'static str| if watches { command } else { "echo" };
        let output = gdb(
            &socket,
            &[
                &format!("tbreak {}", at(5)),
                "continue",
                "printf \"A eax=%d\\n\", $rax",
                "stepi",
                "printf \"B rip=%#lx mem=%d\\n\", $rip, *(int*)0x180000",
                watch("watch *(int*)0x180000"),
                watch("continue"),
                watch("printf \"C rip=%#lx mem=%d\\n\", $rip, *(int*)0x180000"),
                "delete",
                &format!("hbreak {}", at(21)),
                "continue",
                "set var *(int*)0x180000 = 0x33",
                "set var $rbx = 0x1122334455667788",
                "printf \"D rbx=%#lx cr0=%#lx\\n\", $rbx, $cr0 & 1",
                "info threads",
                "delete",
                "detach",
            ],
        );
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let both = format!(
            "{backend:?}: {text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let after_store = ENTRY + 10;
        assert!(text.contains("A eax=5"), "{both}");
        assert!(
            text.contains(&format!("B rip={after_store:#x} mem=5")),
            "{both}"
        );
        assert!(!watches || text.contains("Old value = 5"), "{both}");
        assert!(
            !watches || text.contains(&format!("C rip={:#x} mem=6", ENTRY + 20)),
            "{both}"
        );
        assert!(text.contains("D rbx=0x1122334455667788 cr0=0x1"), "{both}");
        assert!(text.contains("vCPU 0"), "{both}");
        // Let go, it ends with what gdb wrote.
        assert_eq!(rig.wait().code(), Some(0x33 << 1 | 1), "{both}");
    }
}

#[test]
fn gdb_interrupts_a_guest_that_runs_and_sees_every_vcpu() {
    if !have_gdb() {
        return;
    }
    let mut rig = Rig::new(Backend::Soft, &guests::elf(&[0x40, 0xeb, 0xfd]));
    rig.config.vcpus = 3;
    let socket = start(&mut rig);
    // gdb in the foreground waits for Ctrl-C: sent by a shell of its own after a while.
    let output = gdb(
        &socket,
        &[
            "python import os, signal, threading",
            "python threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()",
            "continue",
            "printf \"stopped at %#lx\\n\", (long)$rip & ~3",
            "info threads",
            "thread 3",
            "printf \"third=%#lx\\n\", $rip",
            "kill",
        ],
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let both = format!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        text.contains(&format!("stopped at {:#x}", ENTRY & !3)),
        "{both}"
    );
    assert!(text.contains("vCPU 2"), "{both}");
    assert!(text.contains("third=0xfff0"), "{both}");
    rig.signal(15);
    assert_eq!(rig.wait().code(), Some(0));
}
