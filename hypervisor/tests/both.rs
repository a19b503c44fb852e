//! The same small guests on both backends: the same exits, the same bus accesses in the same
//! order, the same final state.

#[path = "both/guests.rs"]
mod guests;
#[path = "both/rig.rs"]
mod rig;

use hypervisor::{Backend, Exit, Regs};
use rig::{Access, Mode, Rig};

/// What a guest did, as both backends must agree on it.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    exits: Vec<Exit>,
    seen: Vec<Access>,
    regs: Regs,
}

/// The backends that can run here; says which are left out.
fn backends() -> Vec<Backend> {
    let mut backends = vec![];
    if hypervisor::create(Backend::Soft).is_ok() {
        backends.push(Backend::Soft);
    }
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
