use std::sync::Arc;

use super::*;
use crate::cpu::host_tsc;

const APIC_BASE: u32 = 0x1b;
const SVR: u32 = 0xf0;
const EOI: u32 = 0xb0;

fn apic(id: u32) -> Arc<Apic> {
    let apic = Apic::new(id, Arc::new(Attention::default()));
    apic.mmio_write(SVR, 0x1ff);
    Arc::new(apic)
}

fn x2apic(id: u32) -> Arc<Apic> {
    let apic = apic(id);
    apic.msr_write(APIC_BASE, apic.base() | 1 << 10).unwrap();
    apic
}

fn msi(address: u64, data: u32) -> Message {
    Message::from_msi(address, data).unwrap()
}

fn irq(apic: &Apic) -> bool {
    apic.attention().get() & Attention::IRQ != 0
}

#[test]
fn interrupts_come_out_by_priority_and_nest() {
    let apic = apic(0);
    let all = [apic.clone()];
    for vector in [0x31, 0x55, 0x52] {
        deliver(&all, &msi(0xfee0_0000, vector));
    }
    assert!(irq(&apic));
    assert_eq!(apic.take_interrupt(), Some(0x55));
    // 0x52 is in the same class, 0x31 below.
    assert!(!irq(&apic));
    assert_eq!(apic.take_interrupt(), None);
    deliver(&all, &msi(0xfee0_0000, 0x61));
    assert_eq!(apic.take_interrupt(), Some(0x61));
    assert_eq!(apic.mmio_write(EOI, 0), ApicEffect::None);
    assert_eq!(apic.take_interrupt(), None);
    apic.mmio_write(EOI, 0);
    assert!(irq(&apic));
    assert_eq!(apic.take_interrupt(), Some(0x52));
    apic.mmio_write(EOI, 0);
    assert_eq!(apic.take_interrupt(), Some(0x31));
    apic.mmio_write(EOI, 0);
    assert_eq!(apic.take_interrupt(), None);
}

#[test]
fn the_task_priority_holds_back_its_class_and_below() {
    let apic = apic(0);
    apic.set_cr8(5);
    assert_eq!(apic.mmio_read(0x80), 0x50);
    deliver(std::slice::from_ref(&apic), &msi(0xfee0_0000, 0x5f));
    assert_eq!(apic.take_interrupt(), None);
    apic.set_cr8(4);
    assert!(irq(&apic));
    assert_eq!(apic.take_interrupt(), Some(0x5f));
    assert_eq!(apic.mmio_read(0xa0), 0x50);
}

#[test]
fn a_level_interrupt_is_reported_when_acknowledged() {
    let apic = apic(0);
    apic.set_ioapic_vectors([0, 1 << (0x61 - 64), 0, 0]);
    deliver(
        std::slice::from_ref(&apic),
        &msi(0xfee0_0000, 0x61 | 1 << 15 | 1 << 14),
    );
    assert_ne!(apic.mmio_read(0x1b0) & 2, 0, "TMR");
    apic.take_interrupt();
    assert_eq!(apic.mmio_write(EOI, 0), ApicEffect::Eoi(0x61));
    deliver(std::slice::from_ref(&apic), &msi(0xfee0_0000, 0x62));
    apic.take_interrupt();
    assert_eq!(apic.mmio_write(EOI, 0), ApicEffect::None);
}

#[test]
fn destinations_in_every_mode() {
    let flat = [apic(0), apic(1), apic(2)];
    for (id, apic) in flat.iter().enumerate() {
        apic.mmio_write(0xd0, 1 << (24 + id));
    }
    let reached = |apics: &[Arc<Apic>], message: &Message| {
        deliver(apics, message);
        let hits: Vec<u32> = apics
            .iter()
            .filter(|a| a.take_interrupt().is_some())
            .map(|a| a.id())
            .collect();
        for apic in apics {
            apic.mmio_write(EOI, 0);
        }
        hits
    };
    // Physical, broadcast, logical flat.
    assert_eq!(reached(&flat, &msi(0xfee0_1000, 0x40)), [1]);
    assert_eq!(reached(&flat, &msi(0xfeef_f000, 0x40)), [0, 1, 2]);
    assert_eq!(reached(&flat, &msi(0xfee0_5004, 0x40)), [0, 2]);
    // Cluster.
    for (id, apic) in flat.iter().enumerate() {
        apic.mmio_write(0xe0, 0x0fff_ffff);
        apic.mmio_write(0xd0, if id == 2 { 0x21 } else { 0x11 << id } << 24);
    }
    assert_eq!(reached(&flat, &msi(0xfee1_1004, 0x40)), [0]);
    assert_eq!(reached(&flat, &msi(0xfee2_1004, 0x40)), [2]);
    assert_eq!(reached(&flat, &msi(0xfeef_1004, 0x40)), [0, 2]);
    // Lowest priority takes one.
    flat[0].set_cr8(3);
    for apic in &flat {
        apic.mmio_write(0xe0, 0xffff_ffff);
        apic.mmio_write(0xd0, 1 << 24);
    }
    for _ in 0..4 {
        let one = reached(&flat, &msi(0xfee0_1004, 0x140));
        assert!(one == [1] || one == [2], "{one:?}");
    }
    // x2APIC: cluster in the high half, and ids above 255.
    let far = [x2apic(17), x2apic(18), x2apic(300)];
    let to = |destination, logical| Message {
        destination,
        logical,
        mode: DeliveryMode::Fixed,
        vector: 0x40,
        level: false,
    };
    assert_eq!(reached(&far, &to(300, false)), [300]);
    assert_eq!(reached(&far, &to(0x0001_0006, true)), [17, 18]);
    assert_eq!(reached(&far, &to(u32::MAX, false)), [17, 18, 300]);
    assert_eq!(reached(&far, &msi(0x0000_0100_fee2_c000, 0x40)), [300]);
}

#[test]
fn nmi_init_and_start_up_reach_the_processor() {
    let apic = apic(1);
    let all = [apic.clone()];
    for (mode, flag) in [
        (4, Attention::NMI),
        (5, Attention::INIT),
        (6, Attention::SIPI),
    ] {
        deliver(&all, &msi(0xfee0_1000, mode << 8 | 0x9a));
        assert_ne!(apic.attention().get() & flag, 0, "{mode}");
    }
    assert_eq!(apic.sipi_vector(), 0x9a);
}

#[test]
fn illegal_vectors_are_errors() {
    let apic = apic(0);
    apic.mmio_write(0x370, 0xfe);
    deliver(std::slice::from_ref(&apic), &msi(0xfee0_0000, 3));
    assert_eq!(apic.take_interrupt(), Some(0xfe));
    apic.mmio_write(0x280, 0);
    assert_eq!(apic.mmio_read(0x280), 1 << 6);
    apic.mmio_write(0x280, 0);
    assert_eq!(apic.mmio_read(0x280), 0);
}

#[test]
fn a_disabled_apic_takes_no_interrupts_and_masks_its_table() {
    let apic = apic(0);
    apic.mmio_write(0x350, 0x700);
    apic.mmio_write(SVR, 0xff);
    assert_ne!(apic.mmio_read(0x350) & 1 << 16, 0);
    deliver(std::slice::from_ref(&apic), &msi(0xfee0_0000, 0x40));
    assert_eq!(apic.take_interrupt(), None);
}

#[test]
fn the_timer_in_its_three_modes() {
    let apic = apic(0);
    let second = crate::tsc::from_ns(1_000_000_000);
    // One-shot, divided by 1: 1e9 counts are a second.
    apic.mmio_write(0x3e0, 0xb);
    apic.mmio_write(0x320, 0x40);
    apic.mmio_write(0x380, 1_000_000_000);
    let deadline = apic.deadline();
    assert!(deadline > host_tsc() + second / 2);
    assert!(apic.mmio_read(0x390) > 500_000_000);
    apic.poll_timer(deadline - 1);
    assert_eq!(apic.take_interrupt(), None);
    apic.poll_timer(deadline);
    assert_eq!(apic.take_interrupt(), Some(0x40));
    assert_eq!(apic.deadline(), u64::MAX);
    apic.mmio_write(EOI, 0);
    // Periodic.
    apic.mmio_write(0x320, 1 << 17 | 0x40);
    apic.mmio_write(0x380, 1_000_000);
    let first = apic.deadline();
    apic.poll_timer(first);
    assert_eq!(apic.deadline(), first + second / 1000);
    assert_eq!(apic.take_interrupt(), Some(0x40));
    apic.mmio_write(EOI, 0);
    // TSC-deadline: entering it disarms; a deadline in the past fires at once.
    apic.mmio_write(0x320, 2 << 17 | 0x40);
    assert_eq!(apic.deadline(), u64::MAX);
    apic.set_tsc_offset(1000, 5_000);
    apic.set_tsc_deadline(9_000, 5_000);
    assert_eq!(apic.deadline(), 8_000);
    apic.set_tsc_offset(2000, 5_000);
    assert_eq!(apic.deadline(), 7_000);
    apic.poll_timer(7_000);
    assert_eq!(apic.take_interrupt(), Some(0x40));
    assert_eq!(apic.tsc_deadline(), 0);
    apic.mmio_write(EOI, 0);
    apic.set_tsc_deadline(1, 5_000);
    apic.poll_timer(5_000);
    assert_eq!(apic.take_interrupt(), Some(0x40));
    // Masked: it runs out silently.
    apic.mmio_write(EOI, 0);
    apic.mmio_write(0x320, 1 << 16 | 2 << 17 | 0x40);
    apic.set_tsc_deadline(1, 5_000);
    apic.poll_timer(5_000);
    assert_eq!(apic.take_interrupt(), None);
}

#[test]
fn x2apic_mode_and_its_rules() {
    let apic = apic(0x12);
    assert!(apic.msr_read(0x802).is_err(), "not in x2APIC mode");
    apic.msr_write(APIC_BASE, apic.base() | 1 << 10).unwrap();
    assert_eq!(apic.page(), None);
    assert_eq!(apic.msr_read(0x802), Ok(0x12));
    assert_eq!(apic.msr_read(0x80d), Ok(0x1_0004));
    // Reserved bits, read-only and missing registers.
    assert!(apic.msr_write(0x80b, 1).is_err());
    assert!(apic.msr_write(0x802, 1).is_err());
    assert!(apic.msr_write(0x80f, 1 << 9).is_err());
    assert!(apic.msr_read(0x80e).is_err());
    assert!(apic.msr_read(0x80b).is_err());
    // Self-IPI.
    apic.msr_write(0x83f, 0x77).unwrap();
    assert_eq!(apic.take_interrupt(), Some(0x77));
    assert_eq!(apic.msr_write(0x80b, 0), Ok(ApicEffect::None));
    // Straight back to xAPIC mode is forbidden; by way of off it isn't.
    let x2 = apic.base();
    assert!(apic.msr_write(APIC_BASE, x2 & !(1 << 10)).is_err());
    apic.msr_write(APIC_BASE, x2 & !(3 << 10)).unwrap();
    assert!(apic.msr_write(APIC_BASE, x2).is_err());
    apic.msr_write(APIC_BASE, x2 & !(1 << 10)).unwrap();
    assert_eq!(apic.mmio_read(0x20), 0x1200_0000);
}

#[test]
fn a_saved_page_restores_everything() {
    let one = apic(3);
    one.mmio_write(0xd0, 0x0800_0000);
    one.mmio_write(0x3e0, 3);
    one.mmio_write(0x320, 0x40);
    one.mmio_write(0x380, 1_000_000);
    deliver(std::slice::from_ref(&one), &msi(0xfee0_3000, 0x51));
    deliver(std::slice::from_ref(&one), &msi(0xfee0_3000, 0x41));
    assert_eq!(one.take_interrupt(), Some(0x51));
    let now = host_tsc();
    let page = one.save(now);
    assert_eq!(page.len(), 1024);
    let two = Apic::new(3, Arc::default());
    two.load(&page, one.base(), now);
    let again = two.save(now);
    for offset in (0..page.len()).step_by(16) {
        let value = |page: &[u8]| u32::from_le_bytes(page[offset..offset + 4].try_into().unwrap());
        // The count is cut to whole nanoseconds on the way to TSC ticks and back.
        let slack = u32::from(offset == 0x390);
        assert!(
            value(&page).abs_diff(value(&again)) <= slack,
            "{offset:#x}: {:#x}, {:#x}",
            value(&page),
            value(&again)
        );
    }
    two.mmio_write(EOI, 0);
    assert_eq!(two.take_interrupt(), Some(0x41));
}

#[test]
fn ipis_reach_the_other_processors_of_the_machine() {
    let machine = Machine::new();
    let cpus: Vec<_> = (0..3)
        .map(|id| crate::Cpu::new(&machine, id, &[]))
        .collect();
    for cpu in &cpus {
        cpu.apic.mmio_write(SVR, 0x1ff);
    }
    let hits = || -> Vec<u32> {
        let hits = cpus.iter().filter(|c| c.apic.take_interrupt().is_some());
        let ids = hits.map(|c| c.apic.id()).collect();
        for cpu in &cpus {
            cpu.apic.mmio_write(EOI, 0);
        }
        ids
    };
    let send = |high: u32, low: u32| {
        cpus[1].apic.mmio_write(0x310, high);
        cpus[1].apic.mmio_write(0x300, low);
    };
    send(2 << 24, 0x45);
    assert_eq!(hits(), [2]);
    send(0, 1 << 18 | 0x45);
    assert_eq!(hits(), [1]);
    send(0, 2 << 18 | 0x45);
    assert_eq!(hits(), [0, 1, 2]);
    send(0, 3 << 18 | 0x45);
    assert_eq!(hits(), [0, 2]);
    // INIT to all others, and its de-assertion, which does nothing.
    send(0, 3 << 18 | 0x4500 | 1 << 15);
    let init = |i: usize| cpus[i].attention.clear(Attention::INIT) & Attention::INIT != 0;
    assert!(init(0) && !init(1) && init(2));
    send(0, 3 << 18 | 0x0500 | 1 << 15);
    assert!(!init(0) && !init(2));
}
