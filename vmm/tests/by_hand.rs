//! `vireo-vmm --config` with small guests: how each run ends, and what the user sees.

mod common;

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use common::{Rig, backends, guests, wait_for};
use vmm_api::config::{CharBackend, LifecycleAction, Resource};
use vmm_api::control::{ExitCause, MachineState};

#[test]
fn debug_exit_gives_the_status_and_serial_output_is_in_the_file() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::hello()));
        assert_eq!(rig.run(), 0x21 << 1 | 1);
        assert_eq!(rig.serial(), "hi\n");
        assert_eq!(rig.record().cause, ExitCause::Shutdown);
    }
}

#[test]
fn works_without_a_control_socket_on_standard_output() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::hello()));
        rig.config.control = None;
        rig.config.exit_record = None;
        rig.config.serials[0].backend = CharBackend::Stdio;
        rig.config.serials[0].log = Some(Resource::Path(rig.path("log")));
        rig.start();
        assert_eq!(rig.wait().code(), Some(0x43));
        assert_eq!(rig.stdout(), "hi\n");
        assert_eq!(std::fs::read(rig.path("log")).unwrap(), b"hi\n");
    }
}

#[test]
fn standard_input_goes_to_the_guest() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::echo()));
        rig.config.serials[0].backend = CharBackend::Stdio;
        let child = rig.start();
        let mut input = child.stdin.take().unwrap();
        let mut output = child.stdout.take().unwrap();
        common::expect(&mut output, "> ");
        input.write_all(b"abc").unwrap();
        common::expect(&mut output, "bcd");
        input.write_all(b"q").unwrap();
        assert_eq!(rig.wait().code(), Some(0));
    }
}

#[test]
fn multiboot_kernel_runs() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::multiboot(guests::hello()));
        assert_eq!(rig.run(), 0x43);
        assert_eq!(rig.serial(), "hi\n");
    }
}

#[test]
fn guest_gets_its_command_line_and_powers_off() {
    for backend in backends() {
        for acpi in [true, false] {
            let mut rig = Rig::new(backend, &guests::elf(guests::cmdline()));
            rig.config.boot.cmdline = "console=ttyS0 quiet".into();
            rig.config.acpi = acpi;
            assert_eq!(rig.run(), 0);
            assert_eq!(rig.serial(), "console=ttyS0 quiet");
            assert_eq!(rig.record().cause, ExitCause::Shutdown);
        }
    }
}

#[test]
fn every_kind_of_reset_starts_over_with_clean_memory() {
    for backend in backends() {
        for way in ["k", "r", "t"] {
            let mut rig = Rig::new(backend, &guests::elf(guests::twice()));
            rig.config.boot.cmdline = way.into();
            assert_eq!(rig.run(), 0, "{}", rig.stderr());
            assert_eq!(rig.serial(), "12", "{backend:?} {way}");
        }
    }
}

#[test]
fn reset_ends_the_machine_where_on_reboot_says_destroy() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::twice()));
        rig.config.boot.cmdline = "r".into();
        rig.config.on_reboot = LifecycleAction::Destroy;
        assert_eq!(rig.run(), 0);
        assert_eq!(rig.serial(), "1");
        assert_eq!(rig.record().cause, ExitCause::Shutdown);
    }
}

#[test]
fn power_off_restarts_where_on_poweroff_says_so() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::twice()));
        rig.config.boot.cmdline = "o".into();
        rig.config.on_poweroff = LifecycleAction::Restart;
        rig.start();
        // The second run powers off again, and so on: its mark comes more than once.
        wait_for("two restarts", || (rig.serial().len() >= 3).then_some(()));
        assert!(rig.serial().starts_with("122"), "{}", rig.serial());
    }
}

#[test]
fn crash_does_what_on_crash_says() {
    for backend in backends() {
        let rig = |action| {
            let mut rig = Rig::new(backend, &guests::elf(guests::twice()));
            rig.config.boot.cmdline = "p".into();
            rig.config.on_crash = action;
            rig
        };
        let mut destroyed = rig(LifecycleAction::Destroy);
        assert_eq!(destroyed.run(), 1);
        assert_eq!(destroyed.record().cause, ExitCause::Crashed);
        let message = destroyed.stderr();
        assert!(message.contains("panicked"), "{message}");

        let mut restarted = rig(LifecycleAction::Restart);
        assert_eq!(restarted.run(), 0);
        assert_eq!(restarted.serial(), "12");

        let mut preserved = rig(LifecycleAction::Preserve);
        preserved.start();
        let mut client = preserved.connect();
        wait_for("the crash", || {
            (client.state() == MachineState::Crashed).then_some(())
        });
        wait_for("its output", || (preserved.serial() == "1").then_some(()));
    }
}

#[test]
fn sigterm_ends_it_in_order() {
    for backend in backends() {
        for kernel in [guests::chatter(), guests::stuck()] {
            let mut rig = Rig::new(backend, &guests::elf(kernel));
            rig.start();
            wait_for("output", || (!rig.serial().is_empty()).then_some(()));
            rig.signal(libc::SIGTERM);
            assert_eq!(rig.wait().code(), Some(0));
            assert_eq!(rig.record().cause, ExitCause::Stopped);
        }
    }
}

#[test]
fn console_on_a_socket_waits_for_its_peer() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::echo()));
        let path = rig.path("console");
        rig.config.serials[0].backend = CharBackend::Listen {
            socket: Resource::Path(path.clone()),
            telnet: false,
            wait: true,
        };
        rig.start();
        let mut control = rig.connect();
        assert_eq!(control.state(), MachineState::Paused, "nobody is there yet");
        let mut peer = UnixStream::connect(&path).unwrap();
        peer.set_read_timeout(Some(common::LIMIT)).unwrap();
        common::expect(&mut peer, "> ");
        // More than the UART holds: nothing is lost.
        let line = "abcdefghijklmnop".repeat(20);
        peer.write_all(line.as_bytes()).unwrap();
        common::expect(&mut peer, &"bcdefghijklmnopq".repeat(20));
        // Another peer comes after the first has gone.
        drop(peer);
        let mut second = UnixStream::connect(&path).unwrap();
        second.set_read_timeout(Some(common::LIMIT)).unwrap();
        second.write_all(b"xq").unwrap();
        common::expect(&mut second, "y");
        assert_eq!(rig.wait().code(), Some(0));
    }
}

#[test]
fn telnet_is_stripped() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::echo()));
        let path = rig.path("console");
        let listen = CharBackend::Listen {
            socket: Resource::Path(path.clone()),
            telnet: true,
            wait: false,
        };
        rig.config.serials[0].backend = listen;
        rig.start();
        let mut peer = wait_for("the console", || UnixStream::connect(&path).ok());
        peer.set_read_timeout(Some(common::LIMIT)).unwrap();
        peer.write_all(&[255, 253, 3, b'a', 255, 241, b'q'])
            .unwrap();
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut peer, &mut all).unwrap();
        assert!(all.starts_with(&[255, 251, 1]), "{all:?}");
        assert!(all.ends_with(b"> b"), "{all:?}");
    }
}

#[test]
fn console_on_a_connected_socket() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::echo()));
        let listener = UnixListener::bind(rig.path("peer")).unwrap();
        rig.config.serials[0].backend = CharBackend::Connected(Resource::Path(rig.path("peer")));
        rig.start();
        let (mut peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(common::LIMIT)).unwrap();
        peer.write_all(b"1").unwrap();
        common::expect(&mut peer, "> 2");
        peer.write_all(b"q").unwrap();
        assert_eq!(rig.wait().code(), Some(0));
    }
}

#[test]
fn pty_keeps_what_was_said_before_it_is_opened() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::echo()));
        rig.config.serials[0].backend = CharBackend::Pty(None);
        rig.start();
        let mut control = rig.connect();
        let path = control.status().serial_ptys[0].clone().unwrap();
        for round in 0..3 {
            let mut pty = std::fs::File::options()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap();
            if round == 0 {
                common::expect(&mut pty, "> ");
            }
            pty.write_all(b"hello").unwrap();
            common::expect(&mut pty, "ifmmp");
        }
        let mut pty = std::fs::File::options().write(true).open(&path).unwrap();
        pty.write_all(b"q").unwrap();
        assert_eq!(rig.wait().code(), Some(0));
    }
}

#[test]
fn a_reader_that_does_not_read_does_not_stop_the_guest() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::chatter()));
        rig.config.serials[0].backend = CharBackend::Pty(None);
        rig.config.serials[0].log = Some(Resource::Path(rig.path("log")));
        rig.start();
        let mut control = rig.connect();
        let path = control.status().serial_ptys[0].clone().unwrap();
        let reader = std::fs::File::open(path).unwrap();
        let length = || std::fs::metadata(rig.path("log")).map_or(0, |m| m.len());
        wait_for("output far beyond all buffers", || {
            (length() > 200_000).then_some(())
        });
        assert_eq!(control.state(), MachineState::Running);
        drop(reader);
    }
}

#[test]
fn says_what_is_wrong_and_fails() {
    type Case = (&'static str, fn(&mut Rig));
    let cases: [Case; 9] = [
        ("nowhere", |rig| {
            rig.config.boot.kernel = Some(Resource::Path("/nowhere/kernel".into()))
        }),
        ("not a kernel", |rig| {
            std::fs::write(rig.path("kernel"), "#!/bin/sh").unwrap()
        }),
        ("directory", |rig| {
            rig.config.boot.kernel = Some(Resource::Path("/".into()))
        }),
        ("0 bytes", |rig| rig.config.memory_bytes = 0),
        ("more than this host has", |rig| {
            rig.config.memory_bytes = 1 << 50
        }),
        ("at least one vCPU", |rig| rig.config.vcpus = 0),
        ("10000 vCPUs", |rig| rig.config.vcpus = 10_000),
        ("already taken", |rig| {
            rig.config.debug_exit_port = Some(0x3fb)
        }),
        ("descriptor 77", |rig| {
            rig.config.control = Some(Resource::Fd(77))
        }),
    ];
    for (expected, spoil) in cases {
        let mut rig = Rig::new(
            vmm_api::config::Backend::Soft,
            &guests::elf(guests::hello()),
        );
        spoil(&mut rig);
        assert_eq!(rig.run(), 1, "{expected}");
        let message = rig.stderr();
        assert!(message.contains(expected), "{expected}: {message}");
        assert_eq!(rig.record().cause, ExitCause::Failed);
        assert!(rig.record().message.contains(expected));
    }
}

#[test]
fn bad_configs_are_refused_with_their_place() {
    let rig = Rig::new(vmm_api::config::Backend::Soft, b"");
    let path = rig.path("bad.json");
    for (text, expected) in [
        ("{", "bad.json: EOF"),
        ("{\"version\":1,\"bogus\":2}", "unknown field `bogus`"),
        ("[]", "bad.json: "),
    ] {
        std::fs::write(&path, text).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_vireo-vmm"))
            .arg("--config")
            .arg(&path)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(message.contains(expected), "{message}");
    }
}
