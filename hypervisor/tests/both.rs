//! The same small guests on both backends: the same exits, the same bus accesses in the same
//! order, the same final state.

#[path = "both/guests.rs"]
mod guests;
#[path = "both/rig.rs"]
mod rig;

use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use hypervisor::cpu::{CpuRequest, Topology};
use hypervisor::{Backend, Exit, IoAddress, MemorySlot, Msi, Regs, RunState, VcpuState, Vm};
use rig::{Access, Mode, RAM, Ram, Rig, slot};

/// What a guest did, as both backends must agree on it.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    exits: Vec<Exit>,
    seen: Vec<Access>,
    regs: Regs,
}

/// The backends that can run here; says which are left out.
fn backends() -> Vec<Backend> {
    let mut backends = vec![Backend::Soft];
    match hypervisor::create(Backend::Kvm) {
        Ok(_) => backends.push(Backend::Kvm),
        Err(error) => println!("left out: needs /dev/kvm ({error})"),
    }
    backends
}

/// Runs `code` to its stop on every backend.
fn outcome(mode: Mode, code: &[u8]) -> Outcome {
    same(|backend| {
        let mut rig = Rig::new(backend, mode, code);
        let exits = rig.run_to_stop();
        outcome_of(rig, exits)
    })
}

fn outcome_of(mut rig: Rig, exits: Vec<Exit>) -> Outcome {
    Outcome {
        exits,
        seen: rig.bus.seen(),
        regs: rig.vcpu.state().unwrap().regs,
    }
}

/// Does `what` on every backend; all must give the same.
fn same<T: PartialEq + std::fmt::Debug>(what: impl Fn(Backend) -> T) -> T {
    let mut first: Option<(Backend, T)> = None;
    for backend in backends() {
        let now = what(backend);
        match &first {
            None => first = Some((backend, now)),
            Some((other, then)) => {
                assert_eq!(then, &now, "left: {other:?}, right: {backend:?}");
            }
        }
    }
    first.unwrap().1
}

#[test]
fn port_io_of_every_width() {
    let got = outcome(Mode::Real, guests::ports());
    assert_eq!(
        got.seen,
        [
            Access::In(0x60, 1),
            Access::In(0x3f8, 1),
            Access::In(0x3f8, 2),
            Access::In(0x3f8, 4),
            Access::Out(0x80, vec![0x11]),
            Access::Out(0x3f8, vec![0x11]),
            Access::Out(0x3f8, vec![0x11, 0x22]),
            Access::Out(0x3f8, vec![0x11, 0x22, 0x33, 0x44]),
            Access::Out(0xf4, vec![0x11]),
        ]
    );
    assert_eq!(got.regs.rbx, 0x8877_6655);
    // The instruction after the one that stopped is next.
    assert_eq!(got.regs.rip, rig::CODE + guests::ports().len() as u64 - 1);
}

#[test]
fn string_port_io_is_one_access_an_element() {
    let got = outcome(Mode::Real, guests::string_ports());
    let mut expected = vec![Access::In(0x100, 1); 5];
    expected.extend(vec![Access::In(0x100, 2); 3]);
    expected.push(Access::In(0x100, 4));
    expected.extend([0x11, 0x22, 0x33, 0x44].map(|b| Access::Out(0x100, vec![b])));
    expected.push(Access::Out(0x100, vec![0x55, 0x66, 0x77, 0x88]));
    expected.push(Access::Out(0x100, vec![0x99, 0xaa, 0xbb, 0xcc]));
    expected.push(Access::Out(0x100, vec![0xdd, 0xee]));
    expected.push(Access::Out(0xf4, vec![0]));
    assert_eq!(got.seen, expected);
    assert_eq!(got.regs.rdi, 0x2000 + 15);
    assert_eq!(got.regs.rsi, 0x2000 + 14);
}

#[test]
fn mmio_of_every_width() {
    let got = outcome(Mode::Long, guests::mmio());
    let base = 0x3000_0000;
    let rdx = 0xffee_ddcc_bbaa_9988_u64.to_le_bytes();
    assert_eq!(
        got.seen[..10],
        [
            Access::Read(base, 1),
            Access::Read(base + 2, 2),
            Access::Read(base + 4, 4),
            Access::Read(base + 8, 8),
            Access::Write(base, rdx[..1].to_vec()),
            Access::Write(base + 2, rdx[..2].to_vec()),
            Access::Write(base + 4, rdx[..4].to_vec()),
            Access::Write(base + 8, rdx.to_vec()),
            Access::Write(base + 0x10, vec![0x78, 0x56, 0x34, 0x12]),
            Access::Read(base + 0x14, 4),
        ]
    );
}

#[test]
fn arithmetic_ends_in_the_same_registers() {
    outcome(Mode::Protected, guests::arithmetic());
}

/// A message to processor 0 in physical mode.
fn msi(vector: u32) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: vector,
    }
}

/// Does `act` when the guest writes `port`.
fn on_port(rig: &Rig, port: u16, act: impl Fn(&dyn Vm) + Send + Sync + 'static) {
    let vm = Arc::clone(&rig.vm);
    rig.bus.on_port(move |p, _| {
        if p == port {
            act(&*vm);
        }
    });
}

#[test]
fn a_halted_guest_wakes_by_msi() {
    for (mode, code) in [
        (Mode::Long, guests::wait_for_interrupt()),
        (Mode::Protected, guests::wait_for_interrupt_32()),
    ] {
        let got = same(|backend| {
            let mut rig = Rig::new(backend, mode, code);
            rig.gate(mode, 0x40, 0x100);
            on_port(&rig, 0x81, |vm| vm.signal_msi(msi(0x40)).unwrap());
            let exits = rig.run_to_stop();
            outcome_of(rig, exits)
        });
        assert_eq!(got.exits, []);
        assert_eq!(got.regs.rsp, 0x5000);
    }
}

#[test]
fn a_halted_guest_wakes_by_msi_from_another_thread() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::wait_for_interrupt());
        rig.gate(Mode::Long, 0x40, 0x100);
        let vm = Arc::clone(&rig.vm);
        rig.bus.on_port(move |port, _| {
            if port == 0x81 {
                let vm = Arc::clone(&vm);
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(20));
                    vm.signal_msi(msi(0x40)).unwrap();
                });
            }
        });
        let exits = rig.run_to_stop();
        assert_eq!(rig.bus.bytes(0x80), [0x40, 1]);
        outcome_of(rig, exits)
    });
}

#[test]
fn interrupts_come_by_priority_and_after_the_eoi() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::two_interrupts());
        rig.gate(Mode::Long, 0x31, 0x100);
        rig.gate(Mode::Long, 0x52, 0x140);
        on_port(&rig, 0x81, |vm| {
            vm.signal_msi(msi(0x31)).unwrap();
            vm.signal_msi(msi(0x52)).unwrap();
        });
        let exits = rig.run_to_stop();
        assert_eq!(rig.bus.bytes(0x80), [0x52, 0x31]);
        outcome_of(rig, exits)
    });
}

fn eventfd() -> OwnedFd {
    // SAFETY: no pointers; the result is checked and owned by nobody else.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match std::fs::File::from(fd.try_clone().unwrap()).read(&mut bytes) {
        Ok(8) => u64::from_ne_bytes(bytes),
        _ => 0,
    }
}

fn ring(fd: &OwnedFd) {
    let mut file = std::fs::File::from(fd.try_clone().unwrap());
    file.write_all(&1u64.to_ne_bytes()).unwrap();
}

#[test]
fn a_halted_guest_wakes_by_irqfd() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::wait_for_interrupt());
        rig.gate(Mode::Long, 0x40, 0x100);
        let fd = eventfd();
        let first = msi(0x99);
        rig.vm.register_irqfd(fd.as_fd(), 24, first).unwrap();
        // Registered again: another message.
        rig.vm.register_irqfd(fd.as_fd(), 24, msi(0x40)).unwrap();
        assert!(rig.vm.register_irqfd(fd.as_fd(), 3, first).is_err());
        let device = fd.try_clone().unwrap();
        on_port(&rig, 0x81, move |_| ring(&device));
        let exits = rig.run_to_stop();
        assert_eq!(rig.bus.bytes(0x80), [0x40, 1]);
        rig.vm.unregister_irqfd(fd.as_fd(), 24).unwrap();
        outcome_of(rig, exits)
    });
}

#[test]
fn doorbells_ring_instead_of_reaching_the_bus() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::doorbells());
        let (mmio, port) = (eventfd(), eventfd());
        let at = IoAddress::Mmio(0x3000_0000);
        let vm = &rig.vm;
        vm.register_ioeventfd(mmio.as_fd(), at, 4, Some(7)).unwrap();
        vm.register_ioeventfd(port.as_fd(), IoAddress::Port(0x90), 2, None)
            .unwrap();
        assert!(vm.register_ioeventfd(mmio.as_fd(), at, 4, Some(7)).is_err());
        rig.run_to_stop();
        assert_eq!((count(&mmio), count(&port)), (1, 1));
        assert_eq!(
            rig.bus.seen(),
            [
                Access::Write(0x3000_0000, vec![8, 0, 0, 0]),
                Access::Write(0x3000_0004, vec![7, 0, 0, 0]),
                Access::Out(0x90, vec![1]),
                Access::Out(0xf4, vec![1]),
            ]
        );
        let vm = &rig.vm;
        vm.unregister_ioeventfd(mmio.as_fd(), at, 4, Some(7))
            .unwrap();
        assert!(
            vm.unregister_ioeventfd(mmio.as_fd(), at, 4, Some(7))
                .is_err()
        );
    });
}

#[test]
fn exceptions_reach_their_handlers() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::exceptions());
        rig.gate(Mode::Long, 0, 0x100);
        rig.gate(Mode::Long, 6, 0x120);
        rig.gate(Mode::Long, 14, 0x140);
        rig.gate(Mode::Long, 13, 0x180);
        let exits = rig.run_to_stop();
        outcome_of(rig, exits)
    });
    let out = |bytes: &[u8]| Access::Out(0x80, bytes.to_vec());
    assert_eq!(
        got.seen[..7],
        [
            out(&[0]),
            out(&[6]),
            out(&[14]),
            out(&[2, 0, 0, 0]),
            out(&[0x23, 1, 0, 0x80]),
            out(&[13]),
            out(&[0xf8, 0xff, 0, 0]),
        ]
    );
    assert_eq!(got.regs.rsp, 0x5000);
}

#[test]
fn real_mode_interrupts_and_the_way_into_protected_mode() {
    let got = outcome(Mode::Real, guests::real_interrupt());
    assert_eq!(got.seen[0], Access::Out(0x80, vec![8]));
    let got = outcome(Mode::Real, guests::mode_switch());
    assert_eq!(got.seen[1], Access::Out(0x80, vec![0x18, 0]));
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::triple_fault());
        assert_eq!(rig.run(), Exit::Shutdown);
    });
}

#[test]
fn written_pages_are_logged_once() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::dirty());
        assert!(rig.vm.dirty_log(0).is_err(), "not logged yet");
        let logged = MemorySlot {
            log_dirty: true,
            ..slot(&rig.ram, 0, 0)
        };
        // SAFETY: as in `Rig::new`.
        unsafe { rig.vm.map_memory(logged) }.unwrap();
        let pages = |log: Vec<u64>| -> Vec<usize> {
            let bits = log.len() * 64;
            (0..bits)
                .filter(|i| log[i / 64] >> (i % 64) & 1 != 0)
                // Page tables, GDT and stack: accessed bits are the processor's business.
                .filter(|&page| page >= 0x10)
                .collect()
        };
        rig.run_to_stop();
        assert_eq!(pages(rig.vm.dirty_log(0).unwrap()), [0x20, 0x21, 0x40]);
        assert_eq!(pages(rig.vm.dirty_log(0).unwrap()), []);
        rig.run_to_stop();
        assert_eq!(pages(rig.vm.dirty_log(0).unwrap()), [0x60]);
        assert_eq!(rig.vm.dirty_log(0).unwrap().len(), RAM / 4096 / 64);
    });
}

#[test]
fn a_kick_counts_before_and_during_a_run() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::spin());
        let kicker = rig.vcpu.kicker();
        kicker.kick();
        assert_eq!(rig.run(), Exit::Kicked);
        assert_eq!(rig.vcpu.state().unwrap().regs.rax, 0, "nothing ran");
        for _ in 0..20 {
            let kicker = Arc::clone(&kicker);
            let kick = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(2));
                kicker.kick();
            });
            assert_eq!(rig.run(), Exit::Kicked);
            kick.join().unwrap();
        }
        assert_ne!(rig.vcpu.state().unwrap().regs.rax, 0);
        // From a device, on the vCPU's own thread: the I/O is complete when `run` returns.
        let mut rig = Rig::new(backend, Mode::Real, guests::ports());
        let kicker = rig.vcpu.kicker();
        rig.bus.on_port(move |port, _| {
            if port == 0x80 {
                kicker.kick();
            }
        });
        assert_eq!(rig.run(), Exit::Kicked);
        assert_eq!(rig.bus.seen().last(), Some(&Access::Out(0x80, vec![0x11])));
        rig.run_to_stop();
        assert_eq!(rig.bus.seen().len(), 9);
    });
}

#[test]
fn a_kick_wakes_a_halted_guest() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::wait_for_interrupt());
        let kicker = rig.vcpu.kicker();
        rig.bus.on_port(move |port, _| {
            if port == 0x81 {
                let kicker = Arc::clone(&kicker);
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(20));
                    kicker.kick();
                });
            }
        });
        assert_eq!(rig.run(), Exit::Kicked);
        let state = rig.vcpu.state().unwrap();
        assert_eq!(state.run_state, RunState::Halted);
        // It halts on, and wakes for its interrupt after all.
        rig.gate(Mode::Long, 0x40, 0x100);
        rig.vm.signal_msi(msi(0x40)).unwrap();
        rig.run_to_stop();
        assert_eq!(rig.bus.bytes(0x80), [0x40, 1]);
    });
}

/// What can be compared as a whole: the TSC runs on.
fn comparable(state: &VcpuState) -> VcpuState {
    let mut state = state.clone();
    state.msrs.clear();
    state.xsave.clear();
    state.apic.clear();
    state
}

#[test]
fn a_state_got_and_set_is_the_same() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::compute());
        rig.run_to_stop();
        let mut state = rig.vcpu.state().unwrap();
        state.debug = [0x1111, 0x2222, 0x3333, 0x4444, 0xffff_0ff0, 0x400];
        state.sregs.cr8 = 3;
        state.apic[0x80] = 0x30;
        state.regs.r8 = u64::MAX;
        state.xsave[160..176].copy_from_slice(&[0xab; 16]);
        // XSTATE_BV: x87 and SSE are there.
        state.xsave[512] |= 3;
        state.events.nmi_masked = true;
        for (index, value) in &mut state.msrs {
            match *index {
                0xc000_0082 => *value = 0xffff_8000_1234_5678,
                0xc000_0102 => *value = 0x1_2345_6789,
                0x176 => *value = 0x7777,
                _ => {}
            }
        }
        rig.vcpu.set_state(&state).unwrap();
        let mut again = rig.vcpu.state().unwrap();
        // The processor's own view of its priority.
        again.apic[0xa0] = state.apic[0xa0];
        for (offset, (now, then)) in again.apic.iter().zip(&state.apic).enumerate() {
            assert_eq!(now, then, "APIC register at {offset:#x}");
        }
        for (offset, (now, then)) in again.xsave.iter().zip(&state.xsave).enumerate() {
            assert_eq!(now, then, "XSAVE byte {offset:#x}");
        }
        assert_eq!(comparable(&again), comparable(&state));
        let msr = |state: &VcpuState, index| state.msrs.iter().find(|m| m.0 == index).copied();
        for index in [0xc000_0082, 0xc000_0102, 0x176, 0x277] {
            assert_eq!(msr(&again, index), msr(&state, index), "{index:#x}");
            assert!(msr(&again, index).is_some(), "{index:#x}");
        }
    });
}

#[test]
fn a_running_guest_moves_between_backends() {
    let all = backends();
    let run = |path: &[Backend]| {
        let mut rig = Rig::new(path[0], Mode::Long, guests::compute());
        for backend in &path[1..] {
            rig.run_to_stop();
            let state = rig.vcpu.state().unwrap();
            let ram = rig.ram.read(0, RAM);
            rig = Rig::new(*backend, Mode::Long, guests::compute());
            rig.ram.write(0, &ram);
            rig.vcpu.set_state(&state).unwrap();
        }
        rig.run_to_stop();
        let regs = rig.vcpu.state().unwrap().regs;
        (regs, rig.ram.read(0x10_0000, 0x1000))
    };
    let stay = run(&[all[0]; 4]);
    assert_eq!(stay.0.rbp, 4);
    for &a in &all {
        for &b in &all {
            assert_eq!(run(&[a, b, a, b]), stay, "{a:?} {b:?}");
        }
    }
}

#[test]
fn a_halted_guest_with_an_interrupt_under_way_moves_between_backends() {
    for &from in &backends() {
        for &to in &backends() {
            let code = guests::wait_for_interrupt();
            let mut rig = Rig::new(from, Mode::Long, code);
            let kicker = rig.vcpu.kicker();
            on_port(&rig, 0x81, move |_| kicker.kick());
            // Stopped between OUT and STI: interrupts off, APIC on.
            assert_eq!(rig.run(), Exit::Kicked);
            rig.vm.signal_msi(msi(0x40)).unwrap();
            let state = rig.vcpu.state().unwrap();
            let mut next = Rig::new(to, Mode::Long, code);
            next.gate(Mode::Long, 0x40, 0x100);
            next.vcpu.set_state(&state).unwrap();
            next.run_to_stop();
            assert_eq!(next.bus.bytes(0x80), [0x40, 1], "{from:?} to {to:?}");
        }
    }
}

#[test]
fn the_eoi_of_a_level_interrupt_is_reported() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::wait_for_interrupt());
        rig.gate(Mode::Long, 0x40, 0x100);
        let mut pins = [None; 24];
        pins[5] = Some((msi(0x40), true));
        pins[6] = Some((msi(0x41), false));
        rig.vm.set_ioapic_routes(&pins).unwrap();
        assert!(rig.vm.set_ioapic_routes(&[None; 25]).is_err());
        on_port(&rig, 0x81, |vm| vm.signal_msi(msi(0x40 | 1 << 15)).unwrap());
        let exits = rig.run_to_stop();
        outcome_of(rig, exits)
    });
    assert_eq!(got.exits, [Exit::IoapicEoi(0x40)]);
}

#[test]
fn the_apic_timer_wakes_a_halted_guest() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::timers());
        rig.gate(Mode::Long, 0x41, 0x100);
        rig.run_to_stop();
        rig.bus.seen()
    });
    let out = |bytes: &[u8]| Access::Out(0x80, bytes.to_vec());
    assert_eq!(got[..3], [out(&[0x41]), out(&[0x41]), out(&[0; 4])]);
}

#[test]
fn x2apic_mode_and_msrs_that_are_not_there() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::x2apic());
        rig.gate(Mode::Long, 0x40, 0x100);
        rig.gate(Mode::Long, 13, 0x140);
        rig.run_to_stop();
        rig.bus.seen()
    });
    let out = |bytes: &[u8]| Access::Out(0x80, bytes.to_vec());
    assert_eq!(
        got[..7],
        [
            out(&[0; 4]),
            out(&[1, 0, 0, 0]),
            out(&[0x40]),
            out(&[13]),
            out(&[0; 4]),
            out(&[13]),
            out(&[0; 4]),
        ]
    );
}

#[test]
fn writes_to_read_only_memory_reach_the_bus() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::rom());
        let rom = Ram::new(0x1000);
        rom.write(8, &[1, 2, 3, 4]);
        let readonly = MemorySlot {
            readonly: true,
            ..slot(&rom, 1, 0x1000_0000)
        };
        // SAFETY: the slot is unmapped below, before `rom` goes.
        unsafe { rig.vm.map_memory(readonly) }.unwrap();
        rig.run_to_stop();
        rig.vm.unmap_memory(1).unwrap();
        assert!(rig.vm.unmap_memory(1).is_err());
        rig.bus.seen()
    });
    let out = |bytes: &[u8]| Access::Out(0x80, bytes.to_vec());
    assert_eq!(
        got[..3],
        [
            out(&[1, 2, 3, 4]),
            Access::Write(0x1000_0008, vec![0x55; 4]),
            out(&[1, 2, 3, 4]),
        ]
    );
}

#[test]
fn memory_slots_are_checked() {
    same(|backend| {
        let rig = Rig::new(backend, Mode::Long, guests::spin());
        let ram = Ram::new(0x2000);
        let good = slot(&ram, 7, 0x4000_0000);
        let bad = [
            MemorySlot { len: 0, ..good },
            MemorySlot { len: 100, ..good },
            MemorySlot { gpa: 0x123, ..good },
            MemorySlot {
                gpa: u64::MAX - 0xfff,
                ..good
            },
            MemorySlot {
                host: std::ptr::null_mut(),
                ..good
            },
            // Over the machine's RAM.
            MemorySlot { gpa: 0, ..good },
        ];
        for slot in bad {
            // SAFETY: `ram` outlives this; these are refused anyway.
            assert!(unsafe { rig.vm.map_memory(slot) }.is_err(), "{slot:?}");
        }
        for gpa in [good.gpa, 0x5000_0000] {
            // SAFETY: unmapped below.
            unsafe { rig.vm.map_memory(MemorySlot { gpa, ..good }) }.unwrap();
        }
        rig.vm.unmap_memory(7).unwrap();
    });
}

#[test]
fn a_second_processor_starts_by_init_and_sipi() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::start_other());
        rig.ram.write(0x3000, guests::other());
        let mut other = rig.add_vcpu(1);
        assert_eq!(other.state().unwrap().run_state, RunState::WaitForSipi);
        let kicker = other.kicker();
        let bus = Arc::clone(&rig.bus);
        let thread = std::thread::spawn(move || rig::run_limited(&mut *other, &*bus));
        rig.run_to_stop();
        kicker.kick();
        let exit = thread.join().unwrap();
        assert!(matches!(exit, Exit::Kicked | Exit::DeadHalt), "{exit:?}");
        assert_eq!(rig.bus.bytes(0x80), [0, 3, 2]);
        assert_eq!(rig.ram.read_u32(0x4000), 0x600d);
    });
}

#[test]
fn an_nmi_interrupts_a_loop() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::wait_for_nmi());
        rig.gate(Mode::Long, 2, 0x100);
        let kicker = rig.vcpu.kicker();
        on_port(&rig, 0x81, move |_| kicker.kick());
        assert_eq!(rig.run(), Exit::Kicked);
        rig.vcpu.inject_nmi().unwrap();
        rig.run_to_stop();
        assert_eq!(rig.bus.bytes(0x80), [2]);
    });
}

#[test]
fn cpuid_says_where_it_runs() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::cpuid());
        let request = CpuRequest {
            model: None,
            features: &[],
            topology: Topology::flat(1),
        };
        let made = hypervisor::cpu::template(&*rig.vm, &request).unwrap();
        rig.vcpu.set_cpuid(&made.for_vcpu(0)).unwrap();
        rig.run_to_stop();
        rig.bus.bytes(0x80)
    });
    assert_eq!(got[..8], *b"KVMKVMKV");
    assert_eq!(got[8..], [0, 0, 0, 0, 1, 0, 0, 0]);
}

#[test]
fn the_clock_goes_on_from_where_it_is_set() {
    same(|backend| {
        let rig = Rig::new(backend, Mode::Long, guests::spin());
        let hour = 3_600_000_000_000;
        rig.vm.set_clock(hour).unwrap();
        let now = rig.vm.clock().unwrap();
        assert!((hour..2 * hour).contains(&now), "{now}");
        assert!(rig.vm.clock().unwrap() >= now);
    });
}

/// Nanoseconds that the page of a paravirtual clock gives for the TSC value `tsc`.
fn clock_from_page(page: &[u8], tsc: u64) -> u64 {
    let u64_at = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    assert_eq!(u32_at(0) % 2, 0, "the version is even");
    assert_ne!(u32_at(0), 0);
    let ticks = u128::from(tsc.wrapping_sub(u64_at(8)));
    let shift = page[28].cast_signed();
    let scaled = if shift < 0 {
        ticks >> -shift
    } else {
        ticks << shift
    };
    u64_at(16) + ((scaled * u128::from(u32_at(24))) >> 32) as u64
}

#[test]
fn the_paravirtual_clock_agrees_with_the_machines() {
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::pv_clock());
        let hour = 3_600_000_000_000;
        rig.vm.set_clock(5 * hour).unwrap();
        for (hours, stops) in [(5, 1), (9, 2)] {
            rig.run_to_stop();
            assert_eq!(rig.bus.bytes(0xf4).len(), stops);
            let msrs = rig.vcpu.state().unwrap().msrs;
            let tsc = msrs.iter().find(|m| m.0 == 0x10).unwrap().1;
            let now = clock_from_page(&rig.ram.read(0x4000, 32), tsc);
            assert!((hours * hour..(hours + 1) * hour).contains(&now), "{now}");
            // Set while stopped, as on resume: seen from the next run on.
            rig.vm.set_clock(9 * hour).unwrap();
        }
        let wall = rig.ram.read_u32(0x4044);
        let now = std::time::SystemTime::now();
        let epoch = now.duration_since(std::time::UNIX_EPOCH).unwrap();
        let boot = epoch.as_secs() - 5 * 3600;
        assert!(u64::from(wall).abs_diff(boot) < 600, "{wall}");
        rig.bus.bytes(0x80)
    });
}

#[test]
fn an_ipi_by_hypercall_arrives() {
    let hardware = hypervisor::host::report().prefers_kvm();
    if !hardware {
        println!("left out on KVM: needs hardware virtualization (VMMCALL)");
    }
    let run = |backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::pv_ipi());
        rig.gate(Mode::Long, 0x40, 0x100);
        rig.run_to_stop();
        rig.bus.bytes(0x80)
    };
    let expected = [1, 0, 0, 0, 0x18, 0xfc, 0xff, 0xff, 0x40];
    assert_eq!(run(Backend::Soft), expected);
    if hardware {
        assert_eq!(run(Backend::Kvm), expected);
    }
}

#[test]
fn an_instruction_kvm_cannot_emulate_is_named() {
    let report = hypervisor::host::report();
    if report.verdict() != hypervisor::host::KvmVerdict::SoftwareNested {
        println!("left out: needs a KVM without hardware virtualization");
        return;
    }
    let mut rig = Rig::new(Backend::Kvm, Mode::Long, guests::cmpxchg16b());
    let Exit::InternalError { reason, rip } = rig.run() else {
        panic!("no internal error");
    };
    assert!(reason.contains("cmpxchg16b (48 0f c7 0e)"), "{reason}");
    assert_eq!(rip, rig::CODE + 5);
}

#[test]
fn a_halt_that_nothing_ends_is_reported_once_by_the_software_cpu() {
    let mut rig = Rig::new(Backend::Soft, Mode::Long, guests::dead_halt());
    assert_eq!(rig.run(), Exit::DeadHalt);
    let kicker = rig.vcpu.kicker();
    let kick = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        kicker.kick();
    });
    assert_eq!(rig.run(), Exit::Kicked);
    kick.join().unwrap();
}
