//! Kicks, state, moving between backends, clocks, CPUID, what KVM cannot do.

use std::sync::Arc;
use std::time::Duration;

use hypervisor::cpu::{CpuRequest, Topology};
use hypervisor::{Backend, Exit, RunState, VcpuState};

use crate::rig::{self, Access, Mode, RAM, Rig};
use crate::{backends, guests, msi, on_port, same};

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

#[test]
fn a_kick_takes_effect_within_a_millisecond() {
    // The best of many, on a machine that may do a lot else: a kick that waits for a timer's end
    // never comes below its period.
    same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::spin());
        let kicker = rig.vcpu.kicker();
        let best = (0..200).map(|_| {
            let kicker = Arc::clone(&kicker);
            let kick = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(1));
                let now = std::time::Instant::now();
                kicker.kick();
                now
            });
            assert_eq!(rig.run(), Exit::Kicked);
            let then = std::time::Instant::now();
            then.saturating_duration_since(kick.join().unwrap())
        });
        let best = best.min().unwrap();
        assert!(best < Duration::from_millis(1), "{backend:?}: {best:?}");
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
fn a_guest_with_pae_paging_moves_between_backends() {
    let mut able = backends();
    if !hypervisor::host::report().prefers_kvm() {
        println!("left out on KVM: needs hardware virtualization (PAE paging)");
        able.retain(|&backend| backend == Backend::Soft);
    }
    for &from in &able {
        for &to in &able {
            let mut rig = Rig::new(from, Mode::Protected, guests::pae());
            rig.run_to_stop();
            let state = rig.vcpu.state().unwrap();
            let mut next = Rig::new(to, Mode::Protected, guests::pae());
            next.vcpu.set_state(&state).unwrap();
            next.run_to_stop();
            assert_eq!(
                next.bus.bytes(0x80),
                [0x35, 0x12, 0, 0],
                "{from:?} to {to:?}"
            );
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
fn machine_check_banks_are_there_and_part_of_the_state() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::machine_check_banks());
        rig.gate(Mode::Long, 13, 0x100);
        rig.run_to_stop();
        let state = rig.vcpu.state().unwrap();
        let msr = |index| state.msrs.iter().find(|m| m.0 == index).map(|m| m.1);
        (rig.bus.bytes(0x80), msr(0x424), msr(0x425), msr(0x426))
    });
    // Ten banks, a control register, software error recovery; all reported; #GP.
    let said = [10, 1, 0, 1, 0xff, 0xff, 0xff, 0xff, 13];
    assert_eq!(
        got,
        (said.to_vec(), Some(u64::MAX), Some(0), Some(0x1234_5678))
    );
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
