//! Ports, MMIO, doorbells, memory slots.

use std::os::fd::AsFd;

use hypervisor::{Backend, IoAddress, MemorySlot, Vm};

use crate::rig::{self, Access, Mode, RAM, Ram, Rig, slot};
use crate::{count, eventfd, guests, outcome, same};

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
fn written_pages_are_logged_once() {
    // SAFETY: as in `Rig::new`.
    same(|backend| logged_once(backend, |vm, slot| unsafe { vm.map_memory(slot) }));
}

#[test]
fn writes_to_mapped_memory_are_logged_from_then_on() {
    // SAFETY: as in `Rig::new`.
    same(|backend| logged_once(backend, |vm, slot| unsafe { vm.log_writes(slot) }));
}

fn logged_once(backend: Backend, begin: impl Fn(&dyn Vm, MemorySlot) -> hypervisor::Result<()>) {
    let mut rig = Rig::new(backend, Mode::Long, guests::dirty());
    assert!(rig.vm.dirty_log(0).is_err(), "not logged yet");
    let logged = MemorySlot {
        log_dirty: true,
        ..slot(&rig.ram, 0, 0)
    };
    begin(&*rig.vm, logged).unwrap();
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
    rig.vm.memory_written(0x3_0ffc, 8);
    rig.vm.memory_written(RAM as u64 - 1, 4096);
    rig.vm.memory_written(0x4_0000, 0);
    assert_eq!(
        pages(rig.vm.dirty_log(0).unwrap()),
        [0x30, 0x31, RAM / 4096 - 1],
        "what devices wrote"
    );
    assert_eq!(pages(rig.vm.dirty_log(0).unwrap()), []);
}

#[test]
fn code_that_a_device_overwrote_is_not_run_again() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, guests::called());
        // mov al, N; ret
        rig.ram.write(0x2_0000, &[0xb0, 1, 0xc3]);
        let (vm, ram) = (rig.vm.clone(), rig.ram.clone());
        rig.bus.on_port(move |port, value| {
            if port == 0x81 {
                let next = u8::try_from(value + 1).unwrap();
                ram.write(0x2_0000, &[0xb0, next, 0xc3]);
                vm.memory_written(0x2_0000, 3);
            }
        });
        rig.run_to_stop();
        rig.bus.bytes(0x80)
    });
    assert_eq!(got, [1, 1, 2, 2, 3, 3]);
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
