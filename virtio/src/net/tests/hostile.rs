//! Drivers and peers that break rules.

use super::*;
use crate::testing::Random;

#[test]
fn queues_with_anything_in_them() {
    let mut random = Random::new("net queues");
    for round in 0..60 {
        let mut rig = rig();
        let mut peer = rig.peer.try_clone().unwrap();
        peer.set_nonblocking(true).unwrap();
        for _ in 0..10 {
            let queue = random.below(3) as usize;
            rig.driver.scramble(queue, &mut random);
            let frame = frame(MAC, OTHER, 14 + random.below(3000) as usize);
            let length = (frame.len() as u32).to_be_bytes();
            // A full socket is no matter here.
            let _ = peer.write(&[&length[..], &frame].concat());
            let _ = peer.read(&mut [0; 65536]);
        }
        rig.net.pause();
        rig.net.save().unwrap();
        if round % 2 == 0 {
            rig.net.resume();
        }
        rig.net.reset();
        rig.driver.reset();
        let (peer, backend) = stream();
        rig.peer = peer;
        rig.net.backends = vec![Some(backend)];
        rig.net.shared = Net::new(options(), vec![stream().1]).unwrap().shared;
        rig.net.activate(rig.driver.activation()).unwrap();
        let frame = frame(OTHER, MAC, 99);
        rig.transmit(&frame);
        assert_eq!(rig.take(), frame, "it works after a reset");
    }
}

#[test]
fn frames_of_odd_shapes_are_dropped() {
    let mut rig = rig();
    rig.driver.request(1, &[&[0; 5]], &[]);
    rig.driver.request(1, &[], &[100]);
    rig.driver.request(1, &[&[0; HEADER + 13]], &[]);
    rig.driver.request(1, &[&vec![0; HEADER + 70_000]], &[]);
    // Offloads that were not negotiated.
    let mut header = [0; HEADER];
    header[1] = 1;
    rig.driver
        .request(1, &[&header, &frame(OTHER, MAC, 60)], &[]);
    assert_eq!(rig.net.handle().stats().tx_dropped, 5);
    // In more pieces than a system call takes.
    let long = frame(OTHER, MAC, 1000);
    let bytes = [&[0; HEADER], &long[..]].concat();
    let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
    rig.driver.add_indirect(1, &pieces, &[]);
    rig.driver.kick(1);
    rig.driver.wait(1);
    assert_eq!(rig.take(), long);
}

#[test]
fn receive_buffers_without_room() {
    let mut rig = rig();
    rig.post(4, 0);
    rig.post(30, 1);
    rig.driver.add_indirect(0, &[], &[1; 1000]);
    rig.driver.kick(0);
    let sent = frame(MAC, OTHER, 700);
    rig.give(&sent);
    let mut got = 0;
    while got < HEADER + 700 {
        got += rig.driver.wait(0).len as usize;
    }
    assert_eq!(got, HEADER + 700);
}

#[test]
fn a_control_command_without_end() {
    let mut rig = rig();
    assert_eq!(rig.command(&vec![1; 100_000]), 1);
    rig.driver.request(CONTROL, &[&[0, 0, 1]], &[]);
    rig.driver.request(CONTROL, &[], &[1]);
}
