use std::sync::Arc;

use super::*;
use crate::testing::{Driver, Random};

const ALL: u64 = feature::INDIRECT_DESC | feature::EVENT_IDX;

fn pair(size: u16, features: u64) -> (Driver, Queue) {
    let driver = Driver::new(&[size], features);
    let memory: Arc<dyn GuestMemory> = driver.ram.clone();
    let queue = Queue::new(&memory, &driver.queues[0].setup, features).unwrap();
    (driver, queue)
}

/// The chain's bytes back, readable ones turned upside down.
fn echo(queue: &mut Queue, chain: &mut Chain) -> usize {
    let mut count = 0;
    while queue.pop(chain).unwrap() {
        let mut data = vec![0; chain.readable().len() as usize];
        assert_eq!(chain.read_at(0, &mut data), data.len());
        data.iter_mut().for_each(|byte| *byte = !*byte);
        let written = chain.write_at(0, &data);
        queue.push(chain, written as u32);
        count += 1;
    }
    count
}

#[test]
fn buffers_go_there_and_back_direct_and_indirect_around_the_ring() {
    for features in [0, ALL] {
        let (mut driver, mut queue) = pair(8, features);
        let mut chain = queue.chain();
        for round in 0..66_000_u32 {
            let text = round.to_le_bytes();
            let wanted: Vec<u8> = text.iter().map(|byte| !byte).collect();
            if features == ALL && round % 3 == 0 {
                driver.add_indirect(0, &[&text[..1], &text[1..]], &[3, 4]);
            } else {
                driver.add(0, &[&text[..3], &text[3..]], &[1, 3]);
            }
            assert_eq!(echo(&mut queue, &mut chain), 1);
            assert!(driver.used(0).is_none(), "not yet published");
            let _ = queue.publish();
            let used = driver.used(0).unwrap();
            assert_eq!((used.len, &used.data[..4]), (4, &wanted[..]));
        }
        assert_eq!(queue.in_flight(), 0);
        assert!(driver.ram.unreported().is_empty());
    }
}

#[test]
fn tells_memory_of_every_byte_it_writes_in_a_batch_around_the_end() {
    let (mut driver, mut queue) = pair(4, ALL);
    let mut chain = queue.chain();
    for count in [3, 4, 2, 4, 1] {
        for _ in 0..count {
            driver.add(0, &[], &[64]);
        }
        while queue.pop(&mut chain).unwrap() {
            chain.write_at(0, &[9; 40]);
            queue.push(&chain, 40);
        }
        let _ = queue.publish();
        assert!(!queue.enable_notifications().unwrap());
        assert!(driver.ram.unreported().is_empty());
        while driver.used(0).is_some() {}
    }
}

#[test]
fn interrupts_only_when_the_driver_wants_one() {
    let (mut driver, mut queue) = pair(8, ALL);
    let mut chain = queue.chain();
    // The event index is 0: the first buffer is asked for, the following ones are not.
    for wanted in [true, false, false] {
        driver.add(0, &[], &[1]);
        echo(&mut queue, &mut chain);
        assert_eq!(queue.publish(), wanted);
        assert!(!queue.publish(), "nothing new");
    }
    let (mut driver, mut queue) = pair(8, 0);
    let mut chain = queue.chain();
    for flags in [0, 1, 0] {
        driver.set_flags(0, flags);
        driver.add(0, &[], &[1]);
        echo(&mut queue, &mut chain);
        assert_eq!(queue.publish(), flags == 0);
    }
}

#[test]
fn the_driver_kicks_only_when_the_device_wants_one() {
    for features in [0, ALL] {
        let (mut driver, mut queue) = pair(8, features);
        driver.activation();
        let mut chain = queue.chain();
        driver.add(0, &[], &[1]);
        assert!(driver.kick(0));
        queue.disable_notifications();
        echo(&mut queue, &mut chain);
        driver.add(0, &[], &[1]);
        assert!(!driver.kick(0), "the device is looking anyway");
        assert!(
            queue.enable_notifications().unwrap(),
            "more came before the device slept"
        );
        echo(&mut queue, &mut chain);
        assert!(!queue.enable_notifications().unwrap());
        driver.add(0, &[], &[1]);
        assert!(driver.kick(0));
    }
}

#[test]
fn goes_on_where_a_saved_queue_was() {
    let (mut driver, mut queue) = pair(4, ALL);
    let mut chain = queue.chain();
    for _ in 0..3 {
        driver.add(0, &[], &[1]);
        echo(&mut queue, &mut chain);
        let _ = queue.publish();
        driver.used(0).unwrap();
    }
    let first = driver.add(0, &[b"a"], &[1]);
    driver.add(0, &[b"b"], &[1]);
    assert!(queue.pop(&mut chain).unwrap());
    let setup = queue.setup();
    assert_eq!((setup.next_available, setup.next_used), (4, 3));
    let memory: Arc<dyn GuestMemory> = driver.ram.clone();
    let mut queue = Queue::new(&memory, &setup, ALL).unwrap();
    assert_eq!(queue.in_flight(), 1);
    let mut kept = queue.chain();
    queue.pop_head(first, &mut kept).unwrap();
    assert_eq!(kept.read_array(0), Some(*b"a"));
    assert_eq!(echo(&mut queue, &mut chain), 1);
    queue.push(&kept, 0);
    let _ = queue.publish();
    assert_eq!(driver.used(0).unwrap().data, [!b'b']);
    assert_eq!(driver.used(0).unwrap().head, first);
}

#[test]
fn a_chain_popped_can_be_put_back() {
    let (mut driver, mut queue) = pair(4, ALL);
    let mut chain = queue.chain();
    driver.add(0, &[b"x"], &[]);
    assert!(queue.pop(&mut chain).unwrap());
    queue.undo_pop();
    assert!(queue.has_available().unwrap());
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!(chain.read_array(0), Some(*b"x"));
    assert!(!queue.pop(&mut chain).unwrap());
}

/// What a queue of 8 says to the driver's descriptors, offered from 0.
fn verdict(prepare: impl FnOnce(&mut Driver)) -> QueueError {
    let (mut driver, mut queue) = pair(8, ALL);
    prepare(&mut driver);
    let mut chain = queue.chain();
    let error = queue.pop(&mut chain).unwrap_err();
    assert!(queue.is_broken());
    assert_eq!(queue.pop(&mut chain), Ok(false), "nothing more comes out");
    queue.push(&chain, 1);
    assert!(!queue.publish());
    assert_eq!(driver.used(0), None, "nothing is written any more");
    error
}

#[test]
fn refuses_loops() {
    let error = verdict(|driver| {
        driver.write_descriptor(0, 0, 0x10_0000, 1, 1, 1);
        driver.write_descriptor(0, 1, 0x10_0000, 1, 1, 0);
        driver.offer(0, 0);
    });
    assert_eq!(error, QueueError::Loop { head: 0 });
    let error = verdict(|driver| {
        driver.write_descriptor(0, 0, 0x10_0000, 32, 4, 0);
        driver.write_descriptor_at(0x10_0000, 0, 0x11_0000, 1, 1, 1);
        driver.write_descriptor_at(0x10_0000, 1, 0x11_0000, 1, 1, 0);
        driver.offer(0, 0);
    });
    assert_eq!(error, QueueError::Loop { head: 0 });
}

#[test]
fn refuses_numbers_beyond_the_table() {
    let error = verdict(|driver| driver.offer(0, 8));
    assert_eq!(error, QueueError::Index { index: 8, count: 8 });
    let error = verdict(|driver| {
        driver.write_descriptor(0, 0, 0x10_0000, 32, 4, 0);
        driver.write_descriptor_at(0x10_0000, 0, 0x11_0000, 1, 1, 2);
        driver.offer(0, 0);
    });
    assert_eq!(error, QueueError::Index { index: 2, count: 2 });
}

#[test]
fn refuses_an_index_that_runs_away() {
    let error = verdict(|driver| driver.set_available(0, 9));
    assert_eq!(
        error,
        QueueError::RanAway {
            available: 9,
            next: 0
        }
    );
}

#[test]
fn refuses_buffers_and_tables_outside_ram_and_lengths_that_overflow() {
    for (address, len, flags) in [
        (u64::MAX - 3, 8, 0),
        (u64::MAX, u32::MAX, 2),
        ((8 << 20) - 1, 2, 0),
        (8 << 20, 16, 4),
    ] {
        let error = verdict(|driver| {
            driver.write_descriptor(0, 0, address, len, flags, 0);
            driver.offer(0, 0);
        });
        assert!(matches!(error, QueueError::Outside { .. }), "{error}");
    }
}

#[test]
fn refuses_readable_after_writable() {
    let error = verdict(|driver| {
        driver.write_descriptor(0, 0, 0x10_0000, 1, 3, 1);
        driver.write_descriptor(0, 1, 0x10_0000, 1, 0, 0);
        driver.offer(0, 0);
    });
    assert_eq!(error, QueueError::Order { head: 0 });
}

#[test]
fn refuses_bad_indirect_tables() {
    for (len, flags, inner) in [
        (16, 5, 0),        // goes on after the table
        (0, 4, 0),         // empty
        (17, 4, 0),        // half a descriptor
        (16 * 1025, 4, 0), // longer than any queue
        (16, 4, 4),        // a table in the table
    ] {
        let error = verdict(|driver| {
            driver.write_descriptor(0, 0, 0x10_0000, len, flags, 1);
            driver.write_descriptor_at(0x10_0000, 0, 0x11_0000, 16, inner, 0);
            driver.offer(0, 0);
        });
        assert!(matches!(error, QueueError::Indirect { .. }), "{error}");
    }
    let (mut driver, mut queue) = pair(8, 0);
    driver.add_indirect(0, &[b"x"], &[]);
    let mut chain = queue.chain();
    assert!(queue.pop(&mut chain).is_err(), "not negotiated");
}

#[test]
fn refuses_a_chain_of_4_gib() {
    // 8 MiB of RAM named 512 times.
    let (driver, _) = pair(1024, ALL);
    let memory: Arc<dyn GuestMemory> = driver.ram.clone();
    let mut driver = driver;
    let mut queue = Queue::new(&memory, &driver.queues[0].setup, ALL).unwrap();
    for index in 0..1024 {
        driver.write_descriptor(0, index, 0, 8 << 20, 1, index + 1);
    }
    driver.offer(0, 0);
    let error = queue.pop(&mut queue.chain()).unwrap_err();
    assert_eq!(error, QueueError::Length { head: 0 });
}

#[test]
fn refuses_rings_outside_ram_or_misaligned() {
    let (driver, _) = pair(8, ALL);
    let memory: Arc<dyn GuestMemory> = driver.ram.clone();
    let good = driver.queues[0].setup;
    let end = driver.ram.len();
    for setup in [
        QueueSetup { size: 0, ..good },
        QueueSetup { size: 6, ..good },
        QueueSetup {
            descriptors: 8,
            ..good
        },
        QueueSetup {
            descriptors: end - 112,
            ..good
        },
        QueueSetup { driver: 1, ..good },
        QueueSetup {
            driver: end - 20,
            ..good
        },
        QueueSetup { device: 2, ..good },
        QueueSetup {
            device: u64::MAX - 3,
            ..good
        },
    ] {
        assert!(Queue::new(&memory, &setup, ALL).is_err(), "{setup:?}");
    }
}

#[test]
fn zero_length_descriptors_are_passed_over() {
    let (mut driver, mut queue) = pair(8, ALL);
    driver.write_descriptor(0, 0, u64::MAX, 0, 1, 1);
    driver.write_descriptor(0, 1, 0x10_0000, 4, 2, 0);
    driver.offer(0, 0);
    let mut chain = queue.chain();
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!((chain.readable().len(), chain.writable().len()), (0, 4));
    assert_eq!(chain.writable().segments().len(), 1);
}

#[test]
fn slices_cross_segments() {
    let (mut driver, mut queue) = pair(8, ALL);
    driver.add(0, &[b"abc", b"defg", b"h"], &[]);
    let mut chain = queue.chain();
    queue.pop(&mut chain).unwrap();
    let mut iovecs = Vec::new();
    chain.readable().iovecs(2, 5, &mut iovecs);
    let lens: Vec<usize> = iovecs.iter().map(|iovec| iovec.iov_len).collect();
    assert_eq!(lens, [1, 4]);
    assert_eq!(chain.read_array(2), Some(*b"cdefg"));
    assert_eq!(chain.read_array::<3>(6), None);
}

#[test]
fn survives_random_rings() {
    let mut random = Random::new("survives_random_rings");
    for _ in 0..60 {
        let (mut driver, mut queue) = pair(16, if random.once_in(4) { 0 } else { ALL });
        driver.activation();
        let mut chain = queue.chain();
        for _ in 0..32 {
            driver.scramble(0, &mut random);
            while let Ok(true) = queue.pop(&mut chain) {
                let mut data = [0; 100];
                chain.read_at(random.below(100) as u32, &mut data);
                let written = chain.write_at(0, &data);
                queue.push(&chain, written as u32);
            }
            let _ = queue.publish();
            let _ = queue.enable_notifications();
        }
        assert!(driver.ram.unreported().is_empty());
    }
}
