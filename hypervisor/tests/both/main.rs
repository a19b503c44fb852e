//! The same small guests on both backends: the same exits, the same bus accesses in the same
//! order, the same final state.

#[macro_use]
mod guests;
mod hostile;
mod interrupts;
mod io;
mod rig;
mod state;
mod system;

use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use hypervisor::{Backend, Exit, Msi, Regs, Vm};
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
