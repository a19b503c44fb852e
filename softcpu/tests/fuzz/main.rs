//! Guests that try to break out: random code, page tables, descriptor tables, registers and
//! states. They may only harm themselves: no panic, nothing touched outside their memory (it
//! lies between pages that nobody may touch), and `run` always returns soon after a kick.
//!
//! `VIREO_SEED` runs one case; with `VIREO_SOAK=1` cases run for minutes.

#![allow(missing_docs)]

mod code;
mod memory;
#[allow(dead_code)]
#[path = "../differential/random.rs"]
mod random;
mod state;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use random::Random;
use softcpu::attention::Attention;
use softcpu::{Bus, Cpu, Exit, Flow, Machine};

/// Cases of a short run.
const CASES: u64 = 200;
/// How long a soak runs.
const SOAK: Duration = Duration::from_secs(240);
/// A run that doesn't return this long after a kick is stuck. (Far more than it may take, for
/// machines that do a lot else.)
const STUCK: Duration = Duration::from_secs(30);
/// How long a guest runs between two kicks.
const TURN: Duration = Duration::from_millis(1);

/// Devices that answer at random, and at times stop the machine.
struct Devices(Mutex<Random>);

impl Devices {
    fn answer(&self, data: &mut [u8]) {
        let value = self.0.lock().unwrap().integer().to_le_bytes();
        for (to, from) in data.iter_mut().zip(value.iter().cycle()) {
            *to = *from;
        }
    }
    fn flow(&self) -> Flow {
        if self.0.lock().unwrap().one_in(16) {
            Flow::Stop
        } else {
            Flow::Continue
        }
    }
}

impl Bus for Devices {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4));
        self.answer(data);
    }
    fn port_write(&self, _: u16, data: &[u8]) -> Flow {
        assert!(matches!(data.len(), 1 | 2 | 4));
        self.flow()
    }
    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4 | 8));
        assert!(addr >> 52 == 0, "{addr:#x}");
        self.answer(data);
    }
    fn mmio_write(&self, addr: u64, data: &[u8]) -> Flow {
        assert!(matches!(data.len(), 1 | 2 | 4 | 8));
        assert!(addr >> 52 == 0, "{addr:#x}");
        self.flow()
    }
}

/// Kicks whatever runs, again and again, and watches that it notices.
struct Kicker {
    now: Arc<Mutex<Vec<Arc<Attention>>>>,
    /// Runs finished.
    returned: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Kicker {
    fn new() -> Self {
        let now: Arc<Mutex<Vec<Arc<Attention>>>> = Arc::default();
        let returned = Arc::new(AtomicU64::new(0));
        let done = Arc::new(AtomicBool::new(false));
        let thread = {
            let (now, returned, done) = (now.clone(), returned.clone(), done.clone());
            std::thread::spawn(move || {
                let (mut seen, mut since) = (0, Instant::now());
                while !done.load(Ordering::SeqCst) {
                    std::thread::sleep(TURN);
                    let count = returned.load(Ordering::SeqCst);
                    if count != seen {
                        (seen, since) = (count, Instant::now());
                    }
                    if since.elapsed() > STUCK {
                        eprintln!("a guest ran on for {STUCK:?} after a kick");
                        std::process::abort();
                    }
                    for attention in now.lock().unwrap().iter() {
                        attention.raise(Attention::KICK);
                    }
                }
            })
        };
        Self {
            now,
            returned,
            done,
            thread: Some(thread),
        }
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        self.done.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Lets one vCPU run for a few turns, with a new state now and then.
fn drive(cpu: &mut Cpu, random: &mut Random, returned: &AtomicU64) {
    let devices = Devices(Mutex::new(Random::new(random.next())));
    let mut turns = 1 + random.below(2);
    let mut exits = 0;
    while turns > 0 && exits < 60 {
        let exit = cpu.run(&devices);
        returned.fetch_add(1, Ordering::SeqCst);
        exits += 1;
        match exit {
            Exit::Kicked => turns -= 1,
            Exit::Shutdown | Exit::DeadHalt => state::random(cpu, random),
            Exit::Stopped | Exit::IoapicEoi(_) | Exit::Debug { .. } => {}
            Exit::InternalError { reason, rip } => panic!("{reason} at {rip:#x}"),
        }
        // Between runs a save reads everything.
        cpu.sync_fp();
        let _ = (cpu.s.rflags(), cpu.injected(), cpu.apic.save(0));
    }
}

fn case(seed: u64, kicker: &Kicker) {
    println!("VIREO_SEED={seed:#x}");
    let mut random = Random::new(seed);
    let machine = Machine::new();
    let ram = memory::Memory::new(&machine);
    ram.fill(&mut random);
    let count = if random.one_in(6) { 2 } else { 1 };
    let mut cpus: Vec<Box<Cpu>> = (0..count)
        .map(|id| {
            let mut cpu = Cpu::new(&machine, id, &state::leaves(&mut random));
            state::random(&mut cpu, &mut random);
            cpu.translate_after(random.pick(&[0, 2, 200]));
            cpu
        })
        .collect();
    *kicker.now.lock().unwrap() = cpus.iter().map(|c| c.attention.clone()).collect();
    let returned = &*kicker.returned;
    std::thread::scope(|scope| {
        for cpu in &mut cpus {
            let mut random = Random::new(random.next());
            if count == 1 {
                drive(cpu, &mut random, returned);
            } else {
                scope.spawn(move || drive(cpu, &mut random, returned));
            }
        }
    });
    kicker.now.lock().unwrap().clear();
    drop(cpus);
    // The machine lets go of the memory before it goes.
    ram.unmap(&machine);
}

#[test]
fn hostile_guests_only_harm_themselves() {
    let kicker = Kicker::new();
    if let Ok(text) = std::env::var("VIREO_SEED") {
        let seed = u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a hex number");
        return case(seed, &kicker);
    }
    if std::env::var("VIREO_SOAK").is_ok_and(|v| v == "1") {
        let start = Instant::now();
        let mut seeds = Random::new(
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |d| d.as_nanos() as u64),
        );
        while start.elapsed() < SOAK {
            case(seeds.next(), &kicker);
        }
        return;
    }
    let mut seeds = Random::new(0x5eed_f022);
    for _ in 0..CASES {
        case(seeds.next(), &kicker);
    }
}
