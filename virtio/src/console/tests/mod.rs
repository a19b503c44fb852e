mod contract;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::message::*;
use super::*;
use crate::feature;
use crate::testing::{Driver, LIMIT, Random, Used};

/// A host side that takes so many bytes.
#[derive(Debug, Default)]
struct Host {
    got: Mutex<Vec<u8>>,
    room: AtomicUsize,
    rooms: AtomicUsize,
    opens: Mutex<Vec<bool>>,
}

impl HostPort for Host {
    fn send(&self, bytes: &[u8]) -> usize {
        let taken = self.room.load(Ordering::SeqCst).min(bytes.len());
        self.room.fetch_sub(taken, Ordering::SeqCst);
        self.got.lock().unwrap().extend(&bytes[..taken]);
        taken
    }

    fn input_room(&self) {
        self.rooms.fetch_add(1, Ordering::SeqCst);
    }

    fn guest_open(&self, open: bool) {
        self.opens.lock().unwrap().push(open);
    }
}

impl Host {
    fn with_room(room: usize) -> Arc<Self> {
        let host = Self::default();
        host.room.store(room, Ordering::SeqCst);
        Arc::new(host)
    }

    fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < LIMIT, "{what}: {self:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn has(&self, bytes: &[u8]) {
        self.until("output", |h| h.got.lock().unwrap().len() >= bytes.len());
        assert_eq!(*self.got.lock().unwrap(), bytes);
    }
}

fn port(number: u32, console: bool, name: &str, host: &Arc<Host>) -> PortOptions {
    PortOptions {
        number,
        console,
        name: name.into(),
        connected: false,
        host: Arc::clone(host) as _,
    }
}

const PLENTY: usize = usize::MAX / 2;

struct Rig {
    console: Console,
    driver: Driver,
    zero: Arc<Host>,
    agent: Arc<Host>,
}

/// A console at 0 and an agent's channel at 1.
fn new(zero: &Arc<Host>, agent: &Arc<Host>) -> Console {
    Console::new(ConsoleOptions {
        ports: vec![
            port(0, true, "", zero),
            port(1, false, "org.qemu.guest_agent.0", agent),
        ],
        max_ports: 4,
    })
    .unwrap()
}

/// The same with a driver, not yet ready.
fn cold(features: u64) -> Rig {
    let zero = Host::with_room(PLENTY);
    let agent = Host::with_room(PLENTY);
    let mut console = new(&zero, &agent);
    let offered = console.features() | feature::TRANSPORT;
    let mut driver = Driver::new(&console.queue_sizes(), offered & features);
    console.activate(driver.activation()).unwrap();
    Rig {
        console,
        driver,
        zero,
        agent,
    }
}

/// Message, and what comes after it.
fn parts(used: &Used) -> (u32, u16, u16, Vec<u8>) {
    let data = &used.data[..used.len as usize];
    let message = Message::decode(data[..8].try_into().unwrap());
    (message.port, message.event, message.value, data[8..].into())
}

fn say(driver: &mut Driver, port: u32, event: u16, value: u16) {
    let message = Message { port, event, value }.encode(&[]);
    driver.request(3, &[&message], &[]);
}

fn hear(driver: &mut Driver) -> (u32, u16, u16, Vec<u8>) {
    let used = driver.wait(2);
    driver.add(2, &[], &[128]);
    driver.kick(2);
    parts(&used)
}

/// Up to both ports being open in the guest.
fn shake_hands(driver: &mut Driver) {
    for _ in 0..8 {
        driver.add(2, &[], &[128]);
    }
    driver.kick(2);
    say(driver, u32::MAX, DEVICE_READY, 1);
    assert_eq!(hear(driver), (0, PORT_ADD, 1, vec![]));
    assert_eq!(hear(driver), (1, PORT_ADD, 1, vec![]));
    say(driver, 0, PORT_READY, 1);
    assert_eq!(hear(driver), (0, CONSOLE_PORT, 1, vec![]));
    say(driver, 0, PORT_OPEN, 1);
    say(driver, 1, PORT_READY, 1);
    let name = b"org.qemu.guest_agent.0".to_vec();
    assert_eq!(hear(driver), (1, PORT_NAME, 1, name));
    say(driver, 1, PORT_OPEN, 1);
}

impl Rig {
    fn say(&mut self, port: u32, event: u16, value: u16) {
        say(&mut self.driver, port, event, value);
    }

    fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        hear(&mut self.driver)
    }

    /// A guest that has both ports open.
    fn warm() -> Self {
        let mut rig = cold(u64::MAX);
        shake_hands(&mut rig.driver);
        rig.zero
            .until("open", |h| *h.opens.lock().unwrap() == [true]);
        rig.agent
            .until("open", |h| *h.opens.lock().unwrap() == [true]);
        rig
    }
}

#[test]
fn configuration() {
    let rig = cold(u64::MAX);
    let mut config = [0xff; 12];
    rig.console.handle().resize(80, 25);
    rig.console.read_config(0, &mut config);
    assert_eq!(config, [80, 0, 25, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(rig.console.queue_sizes().len(), 10);
    assert_eq!(rig.console.features(), F_SIZE | F_MULTIPORT);
    rig.driver.interrupt.wait("size", |seen| seen.config == 1);
    for (number, max_ports, name) in [(4, 4, ""), (0, 0, ""), (0, 512, ""), (0, 1, "x")] {
        let ports = vec![port(number, false, &name.repeat(64), &rig.zero)];
        assert!(Console::new(ConsoleOptions { ports, max_ports }).is_err());
    }
}

#[test]
fn bytes_go_both_ways() {
    let mut rig = Rig::warm();
    rig.driver.request(1, &[b"login", b": "], &[]);
    rig.zero.has(b"login: ");
    // Port 1's queues come after the control queues.
    let long: Vec<u8> = (0..40_000).map(|i| (i % 251) as u8).collect();
    rig.driver.request(5, &[&long], &[]);
    rig.agent.has(&long);
    let agent = rig.console.handle().port(1);
    assert_eq!(agent.receive(b"{\"execute\":"), 11);
    assert_eq!(agent.receive(b"\"guest-ping\"}"), 13);
    let used = rig.driver.request(4, &[], &[64]);
    let mut got = used.data[..used.len as usize].to_vec();
    if got.len() < 24 {
        let used = rig.driver.request(4, &[], &[64]);
        got.extend(&used.data[..used.len as usize]);
    }
    assert_eq!(got, b"{\"execute\":\"guest-ping\"}");
    rig.console.pause();
    assert_eq!(rig.driver.ram.unreported(), [0; 0]);
}

#[test]
fn a_reader_that_does_not_read_stops_only_its_own_port() {
    let mut rig = Rig::warm();
    rig.agent.room.store(3, Ordering::SeqCst);
    rig.driver.add(5, &[b"abc", b"def"], &[]);
    rig.driver.add(5, &[b"ghi"], &[]);
    rig.driver.kick(5);
    rig.agent.has(b"abc");
    rig.driver.request(1, &[b"hello"], &[]);
    rig.zero.has(b"hello");
    assert!(rig.driver.used(5).is_none());
    rig.agent.room.store(4, Ordering::SeqCst);
    rig.console.handle().port(1).output_room();
    rig.driver.wait(5);
    rig.agent.has(b"abcdefg");
    rig.agent.room.store(PLENTY, Ordering::SeqCst);
    rig.console.handle().port(1).output_room();
    rig.driver.wait(5);
    rig.agent.has(b"abcdefghi");
}

#[test]
fn input_waits_for_room() {
    let mut rig = Rig::warm();
    let agent = rig.console.handle().port(1);
    let bytes: Vec<u8> = (0..shared::INPUT + 100).map(|i| (i % 241) as u8).collect();
    assert_eq!(agent.receive(&bytes), shared::INPUT);
    assert_eq!(agent.receive(b"x"), 0);
    let mut got: Vec<u8> = Vec::new();
    while got.len() < shared::INPUT {
        let used = rig.driver.request(4, &[], &[1000]);
        got.extend(&used.data[..used.len as usize]);
    }
    assert_eq!(got, bytes[..shared::INPUT]);
    rig.agent
        .until("room", |h| h.rooms.load(Ordering::SeqCst) == 1);
    assert_eq!(agent.receive(&bytes[shared::INPUT..]), 100);
}

#[test]
fn each_side_hears_of_the_other() {
    let mut rig = Rig::warm();
    let agent = rig.console.handle().port(1);
    agent.peer(true);
    assert_eq!(rig.hear(), (1, PORT_OPEN, 1, vec![]));
    agent.peer(false);
    assert_eq!(rig.hear(), (1, PORT_OPEN, 0, vec![]));
    assert_eq!(agent.receive(b"stale"), 5);
    rig.say(1, PORT_OPEN, 0);
    rig.agent
        .until("closed", |h| *h.opens.lock().unwrap() == [true, false]);
    assert_eq!(agent.receive(b"nobody"), 0);
    rig.say(1, PORT_OPEN, 1);
    rig.agent
        .until("room", |h| h.rooms.load(Ordering::SeqCst) == 1);
    assert_eq!(agent.receive(b"new"), 3);
    let used = rig.driver.request(4, &[], &[64]);
    assert_eq!(used.data[..used.len as usize], *b"new");
    rig.console.reset();
    assert_eq!(*rig.agent.opens.lock().unwrap(), [true, false, true, false]);
}

#[test]
fn a_console_is_resized() {
    let mut rig = Rig::warm();
    rig.console.handle().resize(132, 43);
    assert_eq!(rig.hear(), (0, RESIZE, 1, vec![43, 0, 132, 0]));
}

#[test]
fn ports_are_plugged_and_unplugged() {
    let mut rig = Rig::warm();
    let handle = rig.console.handle();
    let host = Host::with_room(PLENTY);
    assert!(handle.add_port(port(1, false, "x", &host)).is_err());
    assert!(handle.add_port(port(4, false, "x", &host)).is_err());
    assert!(handle.remove_port(3).is_err());
    handle.add_port(port(2, false, "new", &host)).unwrap();
    assert_eq!(rig.hear(), (2, PORT_ADD, 1, vec![]));
    rig.say(2, PORT_READY, 1);
    assert_eq!(rig.hear(), (2, PORT_NAME, 1, b"new".to_vec()));
    rig.driver.request(7, &[b"hi"], &[]);
    host.has(b"hi");
    handle.remove_port(1).unwrap();
    handle.add_port(port(1, false, "again", &host)).unwrap();
    assert_eq!(rig.hear(), (1, PORT_REMOVE, 1, vec![]));
    assert_eq!(rig.hear(), (1, PORT_ADD, 1, vec![]));
    assert_eq!(*rig.agent.opens.lock().unwrap(), [true, false]);
    // A port that nobody has: what is written there is gone.
    rig.driver.request(9, &[b"lost"], &[]);
}

#[test]
fn a_driver_of_one_port() {
    let mut rig = cold(!F_MULTIPORT);
    assert_eq!(*rig.zero.opens.lock().unwrap(), [true]);
    rig.driver.request(1, &[b"out"], &[]);
    rig.zero.has(b"out");
    assert_eq!(rig.console.handle().port(0).receive(b"in"), 2);
    assert_eq!(rig.driver.request(0, &[], &[2]).data, b"in");
}

#[test]
fn a_saved_device_goes_on_in_the_middle_of_everything() {
    let mut rig = Rig::warm();
    let agent = rig.console.handle().port(1);
    assert_eq!(agent.receive(b"question"), 8);
    rig.agent.room.store(2, Ordering::SeqCst);
    rig.driver.add(5, &[b"answer"], &[]);
    rig.driver.kick(5);
    rig.agent.has(b"an");
    let mut there = false;
    while rig.driver.in_flight(2) > 0 {
        there = !there;
        agent.peer(there);
        rig.driver.wait(2);
    }
    // The driver has no buffer to hear of this.
    rig.console.handle().remove_port(0).unwrap();
    rig.console.pause();
    let saved = rig.console.save().unwrap();
    let setups: Vec<_> = rig.driver.queues.iter().map(|q| Some(q.setup)).collect();
    let host = Host::with_room(PLENTY);
    let zero = Host::with_room(PLENTY);
    let mut other = new(&zero, &host);
    other
        .load(&saved, Some(rig.driver.reactivation(&setups)))
        .unwrap();
    assert!(host.opens.lock().unwrap().is_empty());
    rig.console = other;
    rig.console.resume();
    rig.driver.wait(5);
    host.has(b"swer");
    assert_eq!(*host.opens.lock().unwrap(), [true]);
    let used = rig.driver.request(4, &[], &[64]);
    assert_eq!(used.data[..used.len as usize], *b"question");
    for _ in 0..3 {
        rig.driver.add(2, &[], &[128]);
    }
    rig.driver.kick(2);
    let heard: Vec<_> = (0..2).map(|_| parts(&rig.driver.wait(2)).1).collect();
    assert_eq!(heard, [PORT_REMOVE, PORT_ADD]);
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let mut rig = Rig::warm();
    rig.console.pause();
    let saved = rig.console.save().unwrap();
    let fresh = || {
        Console::new(ConsoleOptions {
            ports: vec![port(0, true, "", &Host::with_room(0))],
            max_ports: 2,
        })
        .unwrap()
    };
    assert!(fresh().load(&saved, None).is_err(), "port 1 is missing");
    let mut payload = saved;
    payload.state["ports"] = serde_json::json!({});
    fresh().load(&payload, None).unwrap();
    payload.state["ready"] = 1.into();
    assert!(fresh().load(&payload, None).is_err());
}

#[test]
fn queues_are_reset_one_by_one() {
    let mut rig = Rig::warm();
    rig.agent.room.store(1, Ordering::SeqCst);
    rig.driver.add(5, &[b"abc"], &[]);
    rig.driver.kick(5);
    rig.agent.has(b"a");
    rig.console.reset_queue(5);
    rig.driver.reset_queue(5);
    rig.agent.room.store(PLENTY, Ordering::SeqCst);
    rig.console
        .enable_queue(5, rig.driver.queues[5].setup)
        .unwrap();
    rig.driver.request(5, &[b"xyz"], &[]);
    rig.agent.has(b"axyz");
}

#[test]
fn queues_with_anything_in_them() {
    let mut random = Random::new("console queues");
    for _ in 0..60 {
        let mut rig = Rig::warm();
        rig.agent.room.store(1 << 20, Ordering::SeqCst);
        let handle = rig.console.handle();
        for _ in 0..20 {
            let queue = random.below(10) as usize;
            rig.driver.scramble(queue, &mut random);
            let port = handle.port(random.below(5) as u32);
            let _ = port.receive(&vec![7; random.below(3000) as usize]);
            port.peer(random.once_in(2));
            port.output_room();
        }
        rig.console.pause();
        rig.console.save().unwrap();
        rig.console.resume();
        rig.console.reset();
        rig.driver.reset();
        rig.console.activate(rig.driver.activation()).unwrap();
        rig.driver.add(2, &[], &[128]);
        rig.driver.kick(2);
        rig.say(0, DEVICE_READY, 1);
        assert_eq!(rig.hear(), (0, PORT_ADD, 1, vec![]));
    }
}
