mod contract;

use std::time::Instant;

use super::*;
use crate::feature;
use crate::testing::{Driver, LIMIT, Random};

const RAM: u64 = 8 << 20;

#[derive(Debug, Default)]
struct Hook(Mutex<Vec<u64>>);

impl ActualHook for Hook {
    fn actual(&self, bytes: u64) {
        self.0.lock().unwrap().push(bytes);
    }
}

fn options() -> BalloonOptions {
    BalloonOptions {
        ram_bytes: RAM,
        target_bytes: 0,
        stats_period_seconds: 0,
        free_page_reporting: true,
        deflate_on_oom: true,
        hook: None,
    }
}

struct Rig {
    balloon: Balloon,
    driver: Driver,
}

fn rig_with(options: BalloonOptions, features: u64) -> Rig {
    let mut balloon = Balloon::new(options).unwrap();
    let offered = balloon.features() | feature::TRANSPORT;
    let mut driver = Driver::new(&balloon.queue_sizes(), offered & features);
    balloon.activate(driver.activation()).unwrap();
    Rig { balloon, driver }
}

fn rig() -> Rig {
    rig_with(options(), u64::MAX)
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|p| p.to_le_bytes()).collect()
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn config(balloon: &Balloon) -> (u32, u32) {
    let mut data = [0; 12];
    balloon.read_config(0, &mut data);
    assert_eq!(data[8..], [0; 4]);
    let word = |i: usize| u32::from_le_bytes(data[i..i + 4].try_into().unwrap());
    (word(0), word(4))
}

#[test]
fn the_target_is_told_and_the_guest_answers() {
    let hook = Arc::new(Hook::default());
    let mut options = options();
    options.target_bytes = 6 << 20;
    options.hook = Some(Arc::clone(&hook) as _);
    let mut rig = rig_with(options, u64::MAX);
    let handle = rig.balloon.handle();
    assert_eq!(config(&rig.balloon), (512, 0));
    handle.set_target(4 << 20);
    rig.driver.interrupt.wait("target", |seen| seen.config == 1);
    assert_eq!(config(&rig.balloon), (1024, 0));
    handle.set_target(4 << 20);
    assert_eq!(rig.driver.interrupt.seen().config, 1, "no news");
    rig.balloon.write_config(4, &512_u32.to_le_bytes());
    // Elsewhere nothing can be written.
    rig.balloon.write_config(0, &[9; 4]);
    rig.balloon.write_config(u32::MAX, &[9; 4]);
    assert_eq!(config(&rig.balloon), (1024, 512));
    assert_eq!(*hook.0.lock().unwrap(), [6 << 20]);
    let stats = handle.stats();
    assert_eq!((stats.actual_bytes, stats.target_bytes), (6 << 20, 4 << 20));
    // A guest that lies harms only itself.
    rig.balloon.write_config(4, &[0xff; 4]);
    assert_eq!(handle.stats().actual_bytes, 0);
    handle.set_target(u64::MAX);
    assert_eq!(config(&rig.balloon).0, 0);
    rig.balloon.pause();
    handle.set_target(1 << 20);
    let before = rig.driver.interrupt.seen().config;
    rig.balloon.resume();
    assert_eq!(rig.driver.interrupt.seen().config, before + 1);
}

#[test]
fn pages_go_to_the_host_and_come_back() {
    let mut rig = rig();
    rig.driver.ram.write(0x60_0000, &[7; 0x5000]);
    // Three in a row, one of them not RAM, and the largest there is.
    let pages = numbers(&[0x601, 0x600, 0x603, 0x12345, u32::MAX]);
    rig.driver.request(0, &[&pages, &[1, 2]], &[]);
    let at = |page: u64| rig.driver.ram.read(page << 12, 1)[0];
    assert_eq!(
        [at(0x600), at(0x601), at(0x602), at(0x603), at(0x604)],
        [0, 0, 7, 0, 7]
    );
    rig.driver.request(1, &[&numbers(&[0x600])], &[]);
    assert_eq!(rig.driver.interrupt.seen().needs_reset, None);
    rig.balloon.pause();
    assert_eq!(rig.driver.ram.unreported(), [0; 0]);
}

#[test]
fn a_range_that_is_partly_ram_is_taken_in_part() {
    let mut rig = rig();
    let end = RAM / PAGE;
    rig.driver
        .ram
        .write(RAM - 2 * PAGE, &[7; 2 * PAGE as usize]);
    let pages: Vec<u32> = (0..10).map(|i| (end - 2 + i) as u32).collect();
    rig.driver.request(0, &[&numbers(&pages)], &[]);
    assert_eq!(
        rig.driver.ram.read(RAM - 2 * PAGE, 2 * PAGE),
        vec![0; 2 * PAGE as usize]
    );
}

#[test]
fn free_pages_are_reported_on_whatever_queue_the_driver_counts() {
    for (queue, features) in [(4, u64::MAX), (3, u64::MAX), (2, !F_STATS_VQ)] {
        let mut rig = rig_with(options(), features);
        let at = rig.driver.alloc(3 * PAGE).next_multiple_of(PAGE);
        rig.driver.ram.write(at, &[7; 4096]);
        rig.driver
            .write_descriptor(queue, 0, at, PAGE as u32, 1 | 2, 1);
        rig.driver
            .write_descriptor(queue, 1, RAM - PAGE, PAGE as u32, 2, 0);
        rig.driver.offer(queue, 0);
        rig.driver.ring(queue);
        let handle = rig.balloon.handle();
        until("reported", || handle.stats().reported == 2 * PAGE);
        assert_eq!(rig.driver.ram.read(at, 4096), vec![0; 4096]);
    }
}

#[test]
fn statistics_are_asked_for() {
    let mut rig = rig();
    let handle = rig.balloon.handle();
    let first = [stat(4, 1000), stat(5, 2000)].concat();
    rig.driver.add(2, &[&first], &[]);
    rig.driver.kick(2);
    until("statistics", || handle.stats().free == Some(1000));
    let stats = handle.stats();
    assert!(stats.updated > 0);
    assert_eq!((stats.total, stats.swap_in), (Some(2000), None));
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.driver.used(2).is_none(), "nobody asks");
    handle.set_stats_period(1);
    rig.driver.wait(2);
    for value in [3000, 4000] {
        rig.driver.add(2, &[&stat(4, value)], &[]);
        rig.driver.kick(2);
        until("statistics", || handle.stats().free == Some(value));
        if value == 3000 {
            rig.driver.wait(2);
        }
    }
    assert_eq!(handle.stats().total, Some(2000));
}

#[test]
fn a_saved_balloon_goes_on() {
    let mut rig = rig();
    rig.balloon.handle().set_target(5 << 20);
    rig.balloon.write_config(4, &100_u32.to_le_bytes());
    rig.driver.add(2, &[&stat(4, 1000)], &[]);
    rig.driver.kick(2);
    let handle = rig.balloon.handle();
    until("statistics", || handle.stats().free == Some(1000));
    rig.balloon.pause();
    let saved = rig.balloon.save().unwrap();
    let setups: Vec<_> = rig.driver.queues.iter().map(|q| Some(q.setup)).collect();
    let mut other = Balloon::new(options()).unwrap();
    other
        .load(&saved, Some(rig.driver.reactivation(&setups)))
        .unwrap();
    assert_eq!(other.save().unwrap(), saved);
    assert_eq!(config(&other), (768, 100));
    other.resume();
    other.handle().set_stats_period(1);
    rig.driver.wait(2);
    rig.driver.request(0, &[&numbers(&[0x700])], &[]);
    other.reset();
    assert_eq!(config(&other), (768, 0), "the target stands");
    let mut payload = saved;
    payload.state["actual"] = "x".into();
    assert!(other.load(&payload, None).is_err());
}

#[test]
fn queues_are_reset_one_by_one() {
    let mut rig = rig();
    rig.driver.add(2, &[&stat(4, 1)], &[]);
    rig.driver.kick(2);
    let handle = rig.balloon.handle();
    until("statistics", || handle.stats().free == Some(1));
    rig.balloon.reset_queue(2);
    rig.driver.reset_queue(2);
    rig.balloon
        .enable_queue(2, rig.driver.queues[2].setup)
        .unwrap();
    rig.driver.add(2, &[&stat(4, 2)], &[]);
    rig.driver.kick(2);
    until("statistics", || handle.stats().free == Some(2));
}

#[test]
fn queues_with_anything_in_them() {
    let mut random = Random::new("balloon queues");
    for _ in 0..60 {
        let mut options = options();
        options.stats_period_seconds = 1;
        let mut rig = rig_with(options, u64::MAX);
        for _ in 0..20 {
            let queue = random.below(5) as usize;
            rig.driver.scramble(queue, &mut random);
            rig.balloon.handle().set_target(random.next());
            rig.balloon
                .handle()
                .set_stats_period(random.below(2) as u32);
        }
        rig.balloon.pause();
        rig.balloon.save().unwrap();
        rig.balloon.resume();
        rig.balloon.reset();
        rig.driver.reset();
        rig.balloon.activate(rig.driver.activation()).unwrap();
        rig.driver.request(1, &[&numbers(&[1])], &[]);
    }
}
