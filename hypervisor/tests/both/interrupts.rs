//! Interrupts, exceptions, timers, and the second processor.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::{Backend, Exit, RunState};

use crate::rig::{self, Access, Mode, Rig};
use crate::{eventfd, guests, msi, on_port, outcome, outcome_of, ring, same};

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
fn interrupts_end_by_a_bit_in_memory_unless_another_waits() {
    let hardware = hypervisor::host::report().prefers_kvm();
    if !hardware {
        println!("left out on KVM: needs hardware virtualization (PV EOI)");
    }
    let run = |backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::pv_eoi());
        rig.gate(Mode::Long, 0x40, 0x100);
        rig.gate(Mode::Long, 0x31, 0x180);
        let vm = Arc::clone(&rig.vm);
        rig.bus.on_port(move |port, _| match port {
            0x81 => vm.signal_msi(msi(0x40)).unwrap(),
            0x82 => vm.signal_msi(msi(0x31)).unwrap(),
            _ => {}
        });
        rig.run_to_stop();
        rig.bus.bytes(0x80)
    };
    // The word is set with each first interrupt, taken back when another comes, and set again
    // with that one.
    let expected = [0x40, 1, 0x40, 1, 0, 0x31, 1, 0];
    assert_eq!(run(Backend::Soft), expected);
    if hardware {
        assert_eq!(run(Backend::Kvm), expected);
    }
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

/// No time is asserted here: the host may be busy. The figure is for who reads the output.
#[test]
fn a_kick_ends_the_run_of_a_guest_that_spins() {
    let mut rig = Rig::new(Backend::Soft, Mode::Long, &[0xeb, 0xfe]);
    let mut worst = Duration::ZERO;
    for _ in 0..50 {
        let kicker = rig.vcpu.kicker();
        let kick = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2));
            let when = Instant::now();
            kicker.kick();
            when
        });
        assert_eq!(rig.run(), Exit::Kicked);
        let end = Instant::now();
        worst = worst.max(end.saturating_duration_since(kick.join().unwrap()));
    }
    println!("worst of 50 kicks: {worst:?}");
}
