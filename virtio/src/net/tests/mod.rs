//! A card between a mock driver and a socket pair.

mod contract;
mod hostile;
mod tap;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::features as f;
use super::*;
use crate::feature;
use crate::testing::{Driver, LIMIT};

const MAC: Mac = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc];
const OTHER: Mac = [0x52, 0x54, 0, 1, 1, 1];
const ALL: u64 = u64::MAX;
const CONTROL: usize = 2;

fn options() -> NetOptions {
    NetOptions {
        mac: MAC,
        mtu: None,
        link_up: true,
        filter_source_mac: false,
        inbound: Bandwidth::default(),
        outbound: Bandwidth::default(),
    }
}

/// Card, driver, and the stream's other end.
struct Rig {
    net: Net,
    driver: Driver,
    peer: UnixStream,
}

fn stream() -> (UnixStream, Box<dyn Backend>) {
    let (peer, ours) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    (peer, Box::new(Stream::new(ours.into()).unwrap()))
}

fn rig_with(options: NetOptions, features: u64) -> Rig {
    let (peer, backend) = stream();
    let mut net = Net::new(options, vec![backend]).unwrap();
    let mut driver = Driver::new(
        &net.queue_sizes(),
        (net.features() | feature::TRANSPORT) & features,
    );
    net.activate(driver.activation()).unwrap();
    Rig { net, driver, peer }
}

fn rig() -> Rig {
    rig_with(options(), ALL)
}

fn frame(to: Mac, from: Mac, length: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[8, 0]].concat();
    frame.extend((frame.len()..length).map(|i| (i % 253) as u8));
    frame
}

impl Rig {
    /// The guest sends a frame.
    fn transmit(&mut self, frame: &[u8]) {
        let used = self.driver.request(1, &[&[0; HEADER], frame], &[]);
        assert_eq!(used.len, 0);
    }

    /// What the other end gets next.
    fn take(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.peer.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.peer.read_exact(&mut frame).unwrap();
        frame
    }

    /// The other end sends a frame.
    fn give(&mut self, frame: &[u8]) {
        let length = (frame.len() as u32).to_be_bytes();
        self.peer.write_all(&[&length, frame].concat()).unwrap();
    }

    /// The driver offers receive buffers.
    fn post(&mut self, count: usize, size: u32) {
        for _ in 0..count {
            self.driver.add(0, &[], &[size]);
        }
        self.driver.kick(0);
    }

    /// The next frame the guest gets, put together from its buffers.
    fn received(&mut self) -> Vec<u8> {
        let first = self.driver.wait(0);
        let count = u16::from_le_bytes([first.data[10], first.data[11]]);
        let mut all = first.data[..first.len as usize].to_vec();
        for _ in 1..count {
            let next = self.driver.wait(0);
            all.extend(&next.data[..next.len as usize]);
        }
        assert_eq!(all[..10], [0; 10], "no offloads");
        all.split_off(HEADER)
    }

    fn command(&mut self, data: &[u8]) -> u8 {
        self.driver.request(CONTROL, &[data], &[1]).data[0]
    }

    fn status(&self) -> u16 {
        let mut status = [0; 2];
        self.net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    }
}

/// Waits until `condition` holds.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn configuration() {
    let mut options = options();
    options.mtu = Some(9000);
    let rig = rig_with(options, ALL);
    let mut config = [0xff; 20];
    rig.net.read_config(0, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..12], [1, 0, 1, 0, 0x28, 0x23]);
    assert_eq!(config[12..], [0; 8]);
    rig.net.read_config(u32::MAX, &mut config);
    assert_eq!(config, [0; 20]);
    let features = rig.net.features();
    assert_eq!(features & (f::OFFLOADS | f::MQ), 0, "a stream has none");
    assert_ne!(features & f::MTU, 0);
}

#[test]
fn frames_go_both_ways() {
    let mut rig = rig();
    for length in [14, 60, 1514, 65_000] {
        let frame = frame(OTHER, MAC, length);
        rig.transmit(&frame);
        assert_eq!(rig.take(), frame);
    }
    rig.post(64, 2048);
    for length in [14, 60, 1514] {
        let frame = frame(MAC, OTHER, length);
        rig.give(&frame);
        assert_eq!(rig.received(), frame);
    }
    let stats = rig.net.handle().stats();
    assert_eq!((stats.tx_packets, stats.tx_bytes), (4, 66_588));
    assert_eq!((stats.rx_packets, stats.rx_bytes), (3, 1588));
    rig.net.pause();
    assert_eq!(rig.driver.ram.unreported(), [0; 0]);
}

#[test]
fn a_large_frame_is_spread_over_buffers_and_waits_for_them() {
    let mut rig = rig();
    let frame = frame(MAC, OTHER, 9000);
    rig.give(&frame);
    // Not enough at first: nothing may be lost or given in part.
    rig.post(2, 2048);
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.driver.used(0).is_none());
    rig.post(10, 2048);
    assert_eq!(rig.received(), frame);
    assert_eq!(rig.driver.in_flight(0), 12 - 5);
    rig.net.pause();
    assert_eq!(rig.driver.ram.unreported(), [0; 0]);
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped() {
    let mut rig = rig_with(options(), ALL & !f::MRG_RXBUF);
    rig.post(2, 1526);
    rig.give(&frame(MAC, OTHER, 3000));
    let fits = frame(MAC, OTHER, 1514);
    rig.give(&fits);
    assert_eq!(rig.received(), fits);
    assert_eq!(rig.net.handle().stats().rx_dropped, 1);
}

#[test]
fn the_guest_says_what_it_wants_to_receive() {
    let mut rig = rig();
    rig.post(10, 2048);
    assert_eq!(rig.command(&[0, 0, 0]), 0, "not promiscuous");
    rig.give(&frame(OTHER, OTHER, 60));
    let own = frame(MAC, OTHER, 60);
    rig.give(&own);
    assert_eq!(rig.received(), own, "the other one was left out");
    assert_eq!(rig.command(&[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    assert_eq!(rig.net.handle().mac(), [2, 0, 0, 0, 0, 9]);
    rig.give(&own);
    let moved = frame([2, 0, 0, 0, 0, 9], OTHER, 60);
    rig.give(&moved);
    assert_eq!(rig.received(), moved);
    assert_eq!(rig.command(&[9, 9, 9]), 1);
    rig.net.pause();
    assert_eq!(rig.driver.ram.unreported(), [0; 0]);
}

#[test]
fn only_the_own_source_address_goes_out() {
    let mut options = options();
    options.filter_source_mac = true;
    let mut rig = rig_with(options, ALL);
    assert_eq!(rig.net.features() & f::CTRL_MAC_ADDR, 0);
    rig.transmit(&frame(OTHER, OTHER, 60));
    let own = frame(OTHER, MAC, 60);
    rig.transmit(&own);
    assert_eq!(rig.take(), own);
    assert_eq!(rig.net.handle().stats().tx_dropped, 1);
}

#[test]
fn the_cable_is_pulled_and_put_in_again() {
    let mut rig = rig();
    let handle = rig.net.handle();
    rig.post(4, 2048);
    handle.set_link(false);
    rig.driver.interrupt.wait("link", |seen| seen.config == 1);
    assert_eq!(rig.status(), 0);
    rig.transmit(&frame(OTHER, MAC, 60));
    rig.give(&frame(MAC, OTHER, 60));
    until("a dropped frame", || handle.stats().rx_dropped == 1);
    assert_eq!(handle.stats().tx_dropped, 1);
    assert!(!handle.stats().link_up);
    handle.set_link(true);
    rig.driver.interrupt.wait("link", |seen| seen.config == 2);
    assert_eq!(rig.status(), 1);
    let frame = frame(OTHER, MAC, 61);
    rig.transmit(&frame);
    assert_eq!(rig.take(), frame);
}

#[test]
fn a_peer_that_goes_away_takes_the_link_down() {
    let mut rig = rig();
    rig.post(4, 2048);
    let (peer, _) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut rig.peer, peer));
    rig.driver.interrupt.wait("link", |seen| seen.config == 1);
    assert_eq!(rig.status(), 0);
    rig.transmit(&frame(OTHER, MAC, 60));
    assert!(!rig.net.handle().stats().link_up);
    rig.net.handle().set_link(true);
    assert_eq!(rig.status(), 0, "there is no other end");
}

#[test]
fn limits_hold_and_can_be_lifted() {
    let mut options = options();
    options.outbound = Bandwidth {
        average: 1,
        peak: 0,
        burst: 1,
    };
    options.inbound = options.outbound;
    let mut rig = rig_with(options, ALL);
    // The least burst is 64 KiB: the first two go, then nothing for hours.
    for _ in 0..3 {
        rig.driver
            .add(1, &[&[0; HEADER], &frame(OTHER, MAC, 60_000)], &[]);
    }
    rig.driver.kick(1);
    let mut seen = 0;
    for _ in 0..2 {
        rig.driver.wait(1);
        seen += rig.take().len();
    }
    assert_eq!(seen, 120_000);
    rig.post(100, 2048);
    let packet = frame(MAC, OTHER, 1400);
    for _ in 0..60 {
        rig.give(&packet);
    }
    for _ in 0..47 {
        assert_eq!(rig.received(), packet);
    }
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.driver.used(0).is_none() && rig.driver.used(1).is_none());
    let none = Some(Bandwidth::default());
    rig.net.handle().set_bandwidth(none, none);
    assert_eq!(rig.take().len(), 60_000);
    for _ in 0..13 {
        assert_eq!(rig.received(), packet);
    }
}

#[test]
fn several_pairs() {
    let (mut first, backend) = stream();
    let (mut second, other) = stream();
    let mut net = Net::new(options(), vec![backend, other]).unwrap();
    let features = net.features() | feature::TRANSPORT;
    assert_ne!(features & f::MQ, 0);
    let mut driver = Driver::new(&net.queue_sizes(), features);
    net.activate(driver.activation()).unwrap();
    let sent = frame(OTHER, MAC, 100);
    for (queue, peer) in [(1, &mut first), (3, &mut second)] {
        driver.request(queue, &[&[0; HEADER], &sent], &[]);
        let mut bytes = [0; 104];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[4..], sent);
    }
    // Until the guest says so, the second pair receives nothing.
    driver.add(2, &[], &[2048]);
    driver.kick(2);
    second
        .write_all(&[&100_u32.to_be_bytes()[..], &sent].concat())
        .unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(driver.used(2).is_none());
    assert_eq!(driver.request(4, &[&[4, 0, 3, 0]], &[1]).data, [1]);
    assert_eq!(driver.request(4, &[&[4, 0, 2, 0]], &[1]).data, [0]);
    assert_eq!(driver.wait(2).len as usize, HEADER + 100);
}

#[test]
fn queues_are_reset_one_by_one() {
    let mut rig = rig();
    rig.post(5, 2048);
    rig.net.reset_queue(0);
    rig.driver.reset_queue(0);
    let frame = frame(MAC, OTHER, 200);
    rig.give(&frame);
    rig.transmit(&frame);
    assert_eq!(rig.take(), frame, "the other queue goes on");
    rig.net.enable_queue(0, rig.driver.queues[0].setup).unwrap();
    rig.post(5, 2048);
    assert_eq!(rig.received(), frame);
}

#[test]
fn after_a_reset_it_is_as_new() {
    let mut rig = rig();
    rig.command(&[0, 0, 0]);
    rig.command(&[1, 1, 2, 0, 0, 0, 0, 9]);
    rig.post(5, 2048);
    rig.net.reset();
    let mut mac = [0; 6];
    rig.net.read_config(0, &mut mac);
    assert_eq!(mac, MAC);
    rig.driver.reset();
    rig.net.activate(rig.driver.activation()).unwrap();
    let frame = frame(OTHER, OTHER, 100);
    rig.transmit(&frame);
    assert_eq!(rig.take(), frame);
    rig.post(5, 2048);
    rig.give(&frame);
    assert_eq!(rig.received(), frame);
}

#[test]
fn a_saved_card_goes_on_elsewhere_and_announces_itself() {
    let mut rig = rig();
    rig.post(8, 2048);
    rig.command(&[0, 0, 0]);
    rig.give(&frame(MAC, OTHER, 100));
    rig.received();
    rig.net.pause();
    let saved = rig.net.save().unwrap();
    assert_eq!(saved.kind, "virtio-net");
    let setups: Vec<_> = rig.driver.queues.iter().map(|q| Some(q.setup)).collect();
    let (peer, backend) = stream();
    let mut other = Net::new(options(), vec![backend]).unwrap();
    other
        .load(&saved, Some(rig.driver.reactivation(&setups)))
        .unwrap();
    assert_eq!(other.save().unwrap(), saved);
    rig.net = other;
    rig.peer = peer;
    rig.driver.interrupt.clear();
    rig.net.resume();
    rig.driver
        .interrupt
        .wait("announce", |seen| seen.config > 0);
    assert_eq!(rig.status(), 3);
    // Switches hear of it whatever the guest does.
    let told = rig.take();
    assert_eq!(told[..14], [&[0xff; 6], &MAC[..], &[0x80, 0x35]].concat());
    assert_eq!(told.len(), 60);
    for _ in 1..5 {
        assert_eq!(rig.take(), told, "and again");
    }
    assert_eq!(rig.command(&[3, 0]), 0);
    assert_eq!(rig.status(), 1);
    let wanted = frame(MAC, OTHER, 500);
    rig.give(&frame(OTHER, OTHER, 500));
    rig.give(&wanted);
    assert_eq!(rig.received(), wanted, "the filter came along");
    rig.transmit(&wanted);
    assert_eq!(rig.take(), wanted);
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let rig = rig();
    let mut net = rig.net;
    net.pause();
    let saved = net.save().unwrap();
    net.reset();
    let mut payload = saved.clone();
    payload.version += 1;
    assert!(net.load(&payload, None).is_err());
    let mut payload = saved.clone();
    payload.kind = "virtio-blk".into();
    assert!(net.load(&payload, None).is_err());
    let mut payload = saved;
    payload.state["pairs"] = 9.into();
    assert!(net.load(&payload, None).is_err());
}
