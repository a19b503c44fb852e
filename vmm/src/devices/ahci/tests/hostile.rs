//! A guest that does whatever it likes: nothing panics, hangs, or touches memory unreported.

use super::*;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// An address: mostly RAM, sometimes its end, sometimes nowhere.
    fn address(&mut self) -> u64 {
        match self.below(8) {
            0 => RAM as u64 - self.below(4096),
            1 => self.next(),
            2 => u64::MAX - self.below(256),
            _ => self.below(RAM as u64),
        }
    }

    fn frame(&mut self) -> [u8; 20] {
        const COMMANDS: [u8; 28] = [
            0x06, 0x08, 0x20, 0x24, 0x25, 0x27, 0x2f, 0x30, 0x35, 0x3d, 0x42, 0x60, 0x61, 0x90,
            0xa0, 0xa1, 0xb0, 0xc4, 0xc6, 0xc8, 0xca, 0xe5, 0xe7, 0xea, 0xec, 0xef, 0xf8, 0xff,
        ];
        let command = self.pick(&COMMANDS);
        let count = self.pick(&[0, 1, 2, 8, 255, 0xffff, 5 << 3]);
        let features = self.pick(&[0, 1, 2, 3, 0x82, 0xd0, 0xda, 0xffff]);
        let lba = self.pick(&[0, 1, 2040, 2047, 2048, 0xffff_ffff_ffff, 0xc2_4f00, 0x10]);
        let mut frame = ata(command, lba, count, features);
        match self.below(16) {
            0 => frame[self.below(20) as usize] = self.next() as u8,
            // The control register.
            1 => (frame[1], frame[15]) = (0, self.pick(&[0, 4])),
            _ => {}
        }
        frame
    }

    fn packet(&mut self) -> [u8; 12] {
        const OPERATIONS: [u8; 21] = [
            0x00, 0x03, 0x12, 0x1b, 0x1e, 0x25, 0x28, 0x2b, 0x43, 0x46, 0x4a, 0x51, 0x5a, 0xa8,
            0xad, 0xbb, 0xbd, 0xbe, 0x2a, 0x52, 0xff,
        ];
        let mut packet = [0; 12];
        for byte in &mut packet {
            *byte = self.pick(&[0, 0, 0, 1, 2, 0x10, 0x2a, 0xff]);
        }
        packet[0] = self.pick(&OPERATIONS);
        packet
    }
}

fn attack(seed: u64, steps: u32) {
    println!("VIREO_SEED={seed}");
    let mut random = Random(seed);
    let policy = random.pick(&[Policy::default(), stop_for_errors()]);
    let rig = Rig::with(policy).run();
    let mut medium = true;
    for _ in 0..steps {
        let port = random.below(3) as u32;
        let slot = random.below(32) as u32;
        match random.below(24) {
            // A command with its table, mostly as it should be.
            0..=9 => {
                let regions: Vec<(u64, u32)> = (0..random.below(5))
                    .map(|_| {
                        let len = random.pick(&[1, 2, 511, 512, 4096, 65536, 1 << 22]);
                        (random.address() & 0xffff_ffff, len)
                    })
                    .collect();
                let packet = random.packet();
                let packet = if port == 1 { &packet[..] } else { &[] };
                rig.put(port, slot, &random.frame(), packet, &regions);
                if random.below(2) == 0 {
                    rig.set(port, SACT, 1 << slot);
                }
                rig.set(port, CI, 1 << slot);
            }
            10 => rig.set(port, CI, random.next() as u32),
            11 => rig.set(port, SACT, random.next() as u32),
            // A header somewhere, of anything.
            12 => {
                let at = Rig::list(port) + 32 * u64::from(slot);
                let words = [random.next() as u32, 0, random.address() as u32, 0];
                rig.ram.write(at, &words.map(u32::to_le_bytes).concat());
                rig.set(port, CI, 1 << slot);
            }
            // Tables and frames where nothing is, or over one another.
            13 => {
                let register = random.pick(&[0x00, 0x04, 0x08, 0x0c]);
                let value = match register {
                    0x04 | 0x0c => u32::from(random.below(4) == 0),
                    _ => random.address() as u32,
                };
                rig.set(port, register, value);
            }
            14 => rig.start(port),
            15 => rig.set(port, CMD, random.next() as u32),
            16 => rig.set(port, SCTL, random.pick(&[0, 1, 4, 0x300, 0x301])),
            17 => {
                let offset = random.below(0x2000) as u32 & !3;
                if offset < 8 {
                    rig.disk.let_go();
                }
                rig.write(offset, random.next() as u32);
            }
            18 => {
                let width = random.pick(&[1, 2, 4]);
                let offset = random.below(0x2000) as u32 / u32::from(width) * u32::from(width);
                if offset < 8 {
                    rig.disk.let_go();
                }
                rig.ahci.write_bar(5, offset, width, random.next() as u32);
                rig.ahci.read_bar(5, offset, width);
            }
            19 => match random.below(4) {
                0 => rig.disk.hold(),
                1 => rig
                    .disk
                    .fail(random.pick(&[None, Some(libc::EIO), Some(libc::ENOSPC)])),
                2 => rig
                    .cd
                    .fail(random.pick(&[None, Some(libc::EIO), Some(libc::ENOMEDIUM)])),
                _ => rig.disk.let_go(),
            },
            20 => {
                // Whatever rests must not wait for a disk that never answers.
                rig.disk.let_go();
                let offset = random.pick(&[4, 4, 4, 0x42, 0x44, 0x4c, 0x24]);
                rig.ahci.write_config(offset, 2, random.next() as u32 | 6);
            }
            21 => {
                rig.disk.let_go();
                rig.ahci.pause();
                assert!(!rig.ram.has_unreported(), "seed {seed}");
                let saved = rig.ahci.save().unwrap();
                if random.below(2) == 0 {
                    let there = Rig::on(policy, rig.disk.clone(), rig.cd.clone());
                    there.drives[1].medium_changed(medium);
                    there.ahci.load(&saved).unwrap();
                    assert_eq!(there.ahci.save().unwrap(), saved, "seed {seed}");
                }
                rig.ahci.resume();
            }
            22 => {
                rig.disk.let_go();
                match random.below(4) {
                    0 => rig.ahci.reset(),
                    1 => rig.write(4, 1),
                    _ => {}
                }
                rig.ahci.write_config(4, 2, 6);
                rig.start(port);
            }
            _ => {
                medium = random.below(2) == 0;
                rig.drives[1].medium_changed(medium);
            }
        }
    }
    // After all of that it works as ever.
    rig.disk.let_go();
    rig.disk.fail(None);
    rig.ahci.reset();
    assert!(!rig.ram.has_unreported(), "seed {seed}");
    let rig = rig.run();
    let (status, _, data) = rig.carry_out(0, &ata(0x25, 0, 1, 0), &[], 512);
    assert_eq!(status, 0x50, "seed {seed}");
    assert!(data == rig.disk.data()[..512], "seed {seed}");
}

/// Some of the numbers in a state are others, some of its truths are lies.
fn forge(random: &mut Random, value: &mut serde_json::Value) {
    use serde_json::Value;
    match value {
        Value::Array(all) => all.iter_mut().for_each(|value| forge(random, value)),
        Value::Object(all) => all.values_mut().for_each(|value| forge(random, value)),
        Value::Bool(is) if random.below(4) == 0 => *is = !*is,
        Value::Number(number) if random.below(4) == 0 => {
            let large = number.as_u64().is_none_or(|number| number > 0xff);
            let bits = random.pick(if large { &[5, 16, 32] } else { &[1, 5, 8] });
            *number = (random.next() >> (64 - bits)).into();
        }
        _ => {}
    }
}

#[test]
fn forged_states_harm_nobody() {
    let seed = std::env::var("VIREO_SEED").map_or(7, |seed| seed.parse().unwrap());
    println!("VIREO_SEED={seed}");
    let mut random = Random(seed);
    let rig = Rig::running();
    for slot in 0..8 {
        rig.put(0, slot, &queued(0x60, 0, 1, slot), &[], &[(DATA, 512)]);
        rig.put(
            1,
            slot,
            &ata(0xa0, 0, 0, 1),
            &[0x28, 0, 0, 0, 0, 0, 0, 0, 1],
            &[(DATA, 2048)],
        );
    }
    rig.ahci.pause();
    let saved = rig.ahci.save().unwrap();
    let mut taken = 0;
    for _ in 0..300 {
        let mut forged = saved.clone();
        for part in ["interrupt", "ports", "drives"] {
            forge(&mut random, &mut forged.state[part]);
        }
        let there = Rig::on(Policy::default(), rig.disk.clone(), rig.cd.clone());
        there.ram.write(0, &rig.ram.read(0, RAM as u64));
        if there.ahci.load(&forged).is_err() {
            continue;
        }
        taken += 1;
        there.ahci.resume();
        for port in 0..2 {
            there.set(port, CI, 0xff);
        }
        there.ahci.pause();
        assert!(!there.ram.has_unreported());
        there.ahci.reset();
        there.ahci.resume();
        let there = there.run();
        let (status, _, _) = there.carry_out(0, &ata(0xec, 0, 0, 0), &[], 512);
        assert_eq!(status, 0x50);
    }
    assert!(taken > 10, "{taken}");
}

#[test]
fn a_hostile_guest_harms_nobody() {
    if let Ok(seed) = std::env::var("VIREO_SEED") {
        return attack(seed.parse().unwrap(), 4000);
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let first = now.unwrap().as_nanos() as u64;
    let minutes = if std::env::var_os("VIREO_SOAK").is_some() {
        5
    } else {
        0
    };
    let until = Instant::now() + Duration::from_secs(4 + 60 * minutes);
    for seed in first.. {
        attack(seed, 4000);
        if Instant::now() > until {
            break;
        }
    }
}
