//! Registers, resets, interrupts, pauses and saved states.

use super::*;

#[test]
fn registers_are_as_after_power_on() {
    let rig = Rig::new();
    assert_eq!(rig.ahci.read_config(0, 4), 0x2922_8086);
    assert_eq!(rig.ahci.read_config(8, 4), 0x0106_0102);
    assert_eq!(rig.read(0x00) & 0x1f, 2, "three ports");
    assert_eq!(rig.read(0x00) >> 8 & 0x1f, 31);
    assert_eq!(
        (rig.read(0x04), rig.read(0x0c), rig.read(0x10)),
        (1 << 31, 7, 0x1_0301)
    );
    let ports = [0, 1, 2].map(|port| (rig.get(port, SIG), rig.get(port, SSTS), rig.get(port, TFD)));
    let none = (u32::MAX, 0, 0x7f);
    assert_eq!(
        ports,
        [(0x101, 0x133, 0x150), (0xeb14_0101, 0x133, 0x100), none]
    );
    assert_eq!((rig.get(3, SIG), rig.read(0x1ffc)), (0, 0), "no such port");
    // Halves and bytes of registers.
    rig.ahci.write_bar(5, 0x101, 1, 0xab);
    rig.ahci.write_bar(5, 0x102, 2, 0x1234);
    assert_eq!(rig.get(0, 0), 0x1234_a800);
    assert_eq!(rig.ahci.read_bar(5, 0x102, 1), 0x34);
}

#[test]
fn a_link_that_is_reset_comes_up_with_the_signature() {
    let rig = Rig::running();
    for port in [0, 1] {
        rig.stop(port);
        rig.ram.write(Rig::list(port) + 0x440, &[0; 20]);
        rig.set(port, SCTL, 0x301);
        assert_eq!((rig.get(port, SSTS), rig.get(port, TFD)), (0, 0x7f));
        rig.set(port, SCTL, 0x300);
        assert_eq!(rig.get(port, SSTS), 0x133);
        assert_eq!(rig.get(port, SIG), [0x101, 0xeb14_0101][port as usize]);
        assert_eq!(rig.frame(port, 0x40, 1), [0x34], "the frame");
        // PxIS.PCS is there as long as PxSERR.DIAG.X is.
        rig.set(port, IS, u32::MAX);
        assert_ne!(rig.get(port, IS) & 1 << 6, 0);
        rig.set(port, SERR, u32::MAX);
        assert_eq!((rig.get(port, IS), rig.get(port, SERR)), (0, 0));
        rig.set(port, CMD, FRE | ST);
        let command = [0xec, 0xa1][port as usize];
        assert_eq!(
            rig.carry_out(port, &ata(command, 0, 0, 0), &[], 512).0,
            0x50
        );
    }
    // Where nothing is, nothing comes up.
    rig.set(2, SCTL, 1);
    rig.set(2, SCTL, 0);
    assert_eq!((rig.get(2, SSTS), rig.get(2, TFD)), (0, 0x7f));
    // A soft reset: the control register's bit on and off.
    let mut frame = ata(0, 0, 0, 0);
    frame[1] = 0;
    frame[15] = 1 << 2;
    rig.carry_out(0, &frame, &[], 0);
    frame[15] = 0;
    rig.carry_out(0, &frame, &[], 0);
    assert_eq!(rig.get(0, TFD), 0x150);
}

#[test]
fn a_stopped_port_runs_until_nothing_of_it_touches_memory() {
    let rig = Rig::running();
    rig.disk.hold();
    rig.ram.write(DATA, &[0; 512]);
    rig.put(0, 0, &ata(0x25, 0, 1, 0), &[], &[(DATA, 512)]);
    rig.set(0, CI, 1);
    rig.wait("a read to be begun", || rig.disk.held() == 1);
    rig.set(0, CMD, FRE);
    assert_eq!((rig.get(0, CI), rig.get(0, CMD) & CR), (0, CR));
    // Started again at once: what was in hand is still nobody's.
    rig.set(0, CMD, FRE | ST);
    rig.put(0, 5, &ata(0xec, 0, 0, 0), &[], &[(DATA + 0x1000, 512)]);
    rig.set(0, CI, 1 << 5);
    rig.set(0, IS, u32::MAX);
    rig.disk.let_go();
    rig.wait("the next command", || rig.get(0, CI) == 0);
    assert_eq!(rig.get(0, IS), 1 << 1, "of the second command only");
    // The link reset while a command is in hand: busy until it is over.
    rig.disk.hold();
    rig.put(0, 0, &ata(0x25, 0, 1, 0), &[], &[(DATA, 512)]);
    rig.set(0, CI, 1);
    rig.wait("a read to be begun", || rig.disk.held() == 1);
    rig.set(0, SCTL, 1);
    rig.set(0, SCTL, 0);
    assert_eq!((rig.get(0, TFD), rig.get(0, SSTS)), (0x80, 0));
    rig.disk.let_go();
    rig.wait("the link", || rig.get(0, SSTS) == 0x133);
    assert_eq!((rig.get(0, TFD), rig.get(0, CI)), (0x150, 0));
}

#[test]
fn interrupts_go_by_the_pin_or_by_message() {
    let rig = Rig::running();
    let pin = || rig.ears.pin.load(Ordering::SeqCst);
    rig.carry_out(0, &ata(0xe7, 0, 0, 0), &[], 0);
    assert!(pin());
    assert_eq!((rig.read(8), rig.get(0, IS)), (1, 1));
    // The controller's own bit is only what the ports' bits make it.
    rig.write(8, 1);
    assert!(pin());
    rig.set(0, IS, 1);
    assert!(!pin());
    // What the guest has not switched on.
    rig.set(0, IE, 0);
    rig.carry_out(0, &ata(0xe7, 0, 0, 0), &[], 0);
    assert!(!pin());
    rig.set(0, IE, 1);
    assert!(pin());
    rig.write(4, 0);
    assert!(!pin());
    rig.write(4, 2);
    // The capability: a message of 64 bits.
    assert_eq!(rig.ahci.read_config(0x34, 1), 0x40);
    assert_eq!(rig.ahci.read_config(0x40, 4), 0x0080_0005);
    rig.ahci.write_config(0x44, 4, 0xfee0_1000);
    rig.ahci.write_config(0x4c, 2, 0x4123);
    rig.ahci.write_config(0x42, 2, 1);
    assert!(!pin());
    let messages = || std::mem::take(&mut *lock(&rig.ears.messages));
    assert_eq!(messages(), [(0xfee0_1000, 0x4123)], "what was pending");
    rig.set(0, IS, u32::MAX);
    rig.carry_out(0, &ata(0xe7, 0, 0, 0), &[], 0);
    assert_eq!(messages().len(), 1);
    rig.set(0, IS, 0);
    rig.write(8, 1);
    assert_eq!(messages().len(), 1, "still pending, so once more");
    rig.set(0, IS, 1);
    rig.write(8, 1);
    assert_eq!(messages().len(), 0);
}

#[test]
fn nothing_reaches_memory_without_bus_mastering() {
    let rig = Rig::running();
    rig.ahci.write_config(4, 2, 2);
    rig.put(0, 0, &ata(0x25, 0, 1, 0), &[], &[(DATA, 512)]);
    rig.set(0, CI, 1);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.get(0, CI), 1);
    assert_eq!(rig.ram.read(DATA, 512), [0; 512]);
    rig.ahci.write_config(4, 2, 6);
    rig.wait("the command", || rig.get(0, CI) == 0);
    assert!(rig.ram.read(DATA, 512) == rig.disk.data()[..512]);
}

#[test]
fn a_reset_ends_everything() {
    let rig = Rig::running();
    rig.carry_out(0, &ata(0xe7, 0, 0, 0), &[], 0);
    // The controller's own: configuration stays.
    rig.write(4, 1);
    assert_eq!(
        (rig.read(4), rig.read(8), rig.get(0, CMD), rig.get(0, IS)),
        (1 << 31, 0, 6, 0)
    );
    assert!(!rig.ears.pin.load(Ordering::SeqCst));
    assert_eq!(rig.ahci.read_config(4, 2) & 6, 6);
    rig.start(0);
    assert_eq!(rig.carry_out(0, &ata(0xec, 0, 0, 0), &[], 512).0, 0x50);
    // The function's.
    rig.carry_out(0, &ata(0xef, 0, 0, 0x82), &[], 0);
    rig.ahci.reset();
    assert_eq!(rig.ahci.read_config(4, 2) & 6, 0);
    assert!(!rig.disk.writethrough.load(Ordering::Relaxed));
}

#[test]
fn a_command_that_stopped_the_machine_is_carried_out_where_it_goes_on() {
    let rig = Rig::with(stop_for_errors()).run();
    let before = rig.disk.data();
    rig.disk.fail(Some(libc::ENOSPC));
    rig.ram.write(DATA, &[0x5a; 1024]);
    // One that is alone, at the other port one that can't fail; then queued ones.
    for (slots, frames) in [
        (0b1, vec![ata(0x35, 3, 2, 0)]),
        (0b11, vec![queued(0x61, 8, 1, 0), queued(0x61, 9, 1, 1)]),
    ] {
        for (slot, frame) in (0..).zip(&frames) {
            rig.put(0, slot, frame, &[], &[(DATA, 1024)]);
        }
        let queued = slots != 1;
        if queued {
            rig.set(0, SACT, slots);
        }
        rig.set(0, IS, u32::MAX);
        lock(&rig.ears.failures).clear();
        rig.set(0, CI, slots);
        rig.wait("failures", || !lock(&rig.ears.failures).is_empty());
        assert_eq!(
            lock(&rig.ears.failures)[0].action,
            virtio::block::Action::Stop
        );
        rig.ahci.pause();
        assert_eq!(rig.get(0, IS), 0, "the guest doesn't learn of it");
        let saved = rig.ahci.save().unwrap();

        // Elsewhere, with room.
        let there = Rig::on(stop_for_errors(), Store::new(CAPACITY), rig.cd.clone());
        there.ram.write(0, &rig.ram.read(0, RAM as u64));
        there.ahci.load(&saved).unwrap();
        assert_eq!(there.ahci.save().unwrap(), saved);
        there.ahci.resume();
        there.wait("the commands", || {
            there.get(0, CI) | there.get(0, SACT) == 0
        });
        let mut expected = before.clone();
        let at = if queued { 8 * 512 } else { 3 * 512 };
        expected[at..at + 1024].fill(0x5a);
        assert!(there.disk.data() == expected);
        assert_eq!(there.get(0, IS), if queued { 1 << 3 } else { 1 });

        // Here, too.
        rig.disk.fail(None);
        rig.ahci.resume();
        rig.wait("the commands", || rig.get(0, CI) | rig.get(0, SACT) == 0);
        lock(&rig.disk.state).data = before.clone();
        rig.disk.fail(Some(libc::ENOSPC));
    }
}

#[test]
fn a_state_of_another_controller_is_refused() {
    let rig = Rig::running();
    assert!(rig.ahci.save().is_err(), "it runs");
    rig.ahci.pause();
    let saved = rig.ahci.save().unwrap();
    let host = crate::pci::testing::host();
    let other = Ahci::new(vec![None, None, None], rig.ram.clone(), host.clone()).unwrap();
    let error = other.load(&saved).unwrap_err().to_string();
    assert!(
        error.contains("a drive at port 0 on one side only"),
        "{error}"
    );
    let other = Ahci::new(vec![None], rig.ram.clone(), host).unwrap();
    assert!(other.load(&saved).is_err());
}
