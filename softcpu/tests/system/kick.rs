//! Guests that never come to the end of an instruction, or of an event, by themselves: a kick
//! gets their vCPU out all the same, within a limit that only a hang exceeds.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use softcpu::attention::Attention;
use softcpu::state::gpr;
use softcpu::{Cpu, Exit};

use crate::rig::{CODE, DATA, Guest, IDT, Ports, STACK, TSS};

/// Far more than it takes, on a machine that does a lot else.
const LIMIT: Duration = Duration::from_secs(20);

/// Runs `cpu` and kicks it `times` times; it leaves each time. A hang ends the test's process.
fn kicked(cpu: &mut Cpu, times: u32) {
    let attention = cpu.attention.clone();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let done = &done;
        scope.spawn(move || {
            let start = Instant::now();
            while !done.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(2));
                attention.raise(Attention::KICK);
                if start.elapsed() > LIMIT {
                    eprintln!("a kick did not end the run");
                    std::process::abort();
                }
            }
        });
        let ports = Ports::default();
        for _ in 0..times {
            assert_eq!(cpu.run(&ports), Exit::Kicked);
        }
        done.store(true, Ordering::SeqCst);
    });
    // One that came too late.
    cpu.attention.clear(Attention::KICK);
}

#[test]
fn a_debug_exception_that_its_own_delivery_raises_again() {
    // mov [rdi], al, where the word is the one that #DB's stack begins with.
    let mut g = Guest::long(&[0x88, 0x07, 0xf4]);
    let top = STACK + 0x1000;
    g.put64(TSS + 0x24, top);
    let gate = g.get64(IDT + 16);
    g.put64(IDT + 16, gate | 1 << 32);
    g.cpu.s.gpr[gpr::RDI] = top - 8;
    g.cpu.s.dr[0] = top - 8;
    g.cpu.s.dr7 = 0x400 | 2 | 0b1001 << 16;
    g.cpu.state_changed();
    kicked(&mut g.cpu, 3);
    // It goes on as before: the trap is not lost. Without the breakpoint the handler runs.
    g.cpu.s.dr7 = 0x400;
    g.cpu.state_changed();
    assert_eq!(g.exception().vector, 1);
}

#[test]
fn interrupts_held_off_by_every_instruction() {
    // l: mov ss, [rsi]; mov ss, [rsi]; jmp l, with a breakpoint on that word.
    let mut g = Guest::long(&[0x8e, 0x16, 0x8e, 0x16, 0xeb, 0xfa]);
    g.put64(DATA, 0x10);
    g.cpu.s.gpr[gpr::RSI] = DATA;
    g.cpu.s.dr[1] = DATA;
    g.cpu.s.dr7 = 0x400 | 1 << 3 | 0b0111 << 20;
    // #DB's handler returns.
    g.put(DATA + 0x100, &[0x48, 0xcf]);
    let at = DATA + 0x100;
    let gate = at & 0xffff | 0x08 << 16 | 0xee00 << 32 | (at >> 16) << 48;
    g.put64(IDT + 16, gate);
    g.cpu.state_changed();
    kicked(&mut g.cpu, 3);
}

#[test]
fn an_exception_whose_handler_raises_it_again() {
    // ud2, whose handler's gate leads back to it.
    let mut g = Guest::long(&[0x0f, 0x0b]);
    let gate = CODE & 0xffff | 0x08 << 16 | 0xee00 << 32 | (CODE >> 16) << 48;
    g.put64(IDT + 16 * 6, gate | 1 << 32);
    g.put64(TSS + 0x24, STACK + 0x1000);
    kicked(&mut g.cpu, 3);
}

#[test]
fn code_that_another_never_stops_changing() {
    // l: mov eax, imm; jmp l, and the other: l: inc dword [rdi]; jmp l, on that immediate.
    let mut g = Guest::long(&[0xb8, 0, 0, 0, 0, 0xeb, 0xf9]);
    let mut other = crate::smp::second(&g, &[0xff, 0x07, 0xeb, 0xfc]);
    other.s.gpr[gpr::RDI] = CODE + 1;
    std::thread::scope(|scope| {
        scope.spawn(|| kicked(&mut g.cpu, 5));
        kicked(&mut other, 5);
    });
}
