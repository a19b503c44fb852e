//! A machine saved, restored, dumped, by hand.

mod common;

use std::fs::File;
use std::path::Path;

use common::{Rig, backends, guests, wait_for};
use vmm_api::config::{Backend, Resource, RestoreConfig};
use vmm_api::control::{Answer, Call, Event, MachineState};
use vmm_api::saved::{Image, Section};

fn empty(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap()
}

fn save() -> Call {
    Call::Save {
        xml: "<domain/>".into(),
        id: [1; 16],
        running: None,
    }
}

fn reciting(backend: Backend) -> Rig {
    let mut rig = Rig::new(backend, &guests::elf(guests::alphabet()));
    // One that every host's KVM has.
    rig.config.cpu.model = Some("pentium2".into());
    rig
}

fn grows(rig: &Rig, by: usize) {
    let before = rig.serial().len();
    wait_for("more output", || {
        (rig.serial().len() >= before + by).then_some(())
    });
}

/// Every letter follows the one before it.
fn in_order(said: &str) {
    for pair in said.as_bytes().windows(2) {
        let next = if pair[0] == b'z' { b'a' } else { pair[0] + 1 };
        assert_eq!(pair[1], next, "in {said}");
    }
}

/// Saves the running machine of `rig` and ends it.
fn save_and_end(rig: &mut Rig, image: &Path) {
    let mut client = rig.connect();
    let file = empty(image);
    let answer = client.call_with(save(), &[&file]).unwrap();
    assert!(matches!(answer, Answer::Job(Some(_))), "{answer:?}");
    assert_eq!(client.state(), MachineState::Paused);
    client.call(Call::Stop).unwrap();
    rig.wait();
}

/// A machine of the same configuration that goes on from `image`, and what it said so far.
fn restored(from: &Rig, backend: Backend, image: &Path, copy: bool) -> Rig {
    let mut rig = reciting(backend);
    rig.config.restore = Some(RestoreConfig {
        image: Resource::Path(image.to_owned()),
        copy,
    });
    rig.config.on_poweroff = from.config.on_poweroff;
    rig
}

#[test]
fn a_saved_machine_goes_on_wherever_it_is_restored() {
    let all = backends();
    for &first in &all {
        for &second in &all {
            let mut rig = reciting(first);
            rig.start();
            grows(&rig, 40);
            let mut said = String::new();
            for round in 0..3 {
                let image = rig.path("image");
                save_and_end(&mut rig, &image);
                said += &rig.serial();
                let mut next = restored(&rig, second, &image, round % 2 == 1);
                next.start();
                wait_for("the guest", || {
                    assert_eq!(next.ended(), None, "{first:?} to {second:?}");
                    (next.serial().len() > 30).then_some(())
                });
                rig = next;
            }
            said += &rig.serial();
            assert!(said.len() > 120);
            in_order(&said);
        }
    }
}

#[test]
fn a_machine_is_saved_while_it_runs() {
    for backend in backends() {
        let mut rig = reciting(backend);
        rig.start();
        grows(&rig, 40);
        let mut client = rig.connect();
        let mut other = rig.connect();
        for round in 0..4 {
            let path = rig.path(&format!("live-{round}"));
            let live = Call::SaveLive {
                xml: "<domain/>".into(),
                id: [round; 16],
                disks: Vec::new(),
            };
            if round == 1 {
                other.call(Call::Pause).unwrap();
            }
            let answer = client.call_with(live, &[&empty(&path)]).unwrap();
            assert!(matches!(answer, Answer::Job(Some(_))), "{answer:?}");
            let header = Image::open(&File::open(&path).unwrap()).unwrap().header;
            assert_eq!(header.id, [round; 16]);
            assert_eq!(header.running, round != 1);
            if round == 1 {
                assert_eq!(other.state(), MachineState::Paused);
                other.call(Call::Resume).unwrap();
            }
            assert_eq!(other.state(), MachineState::Running);
            grows(&rig, 20);
            // All of it is of one moment, and whole.
            let mut next = restored(&rig, backend, &path, round != 2);
            next.start();
            if round == 1 {
                next.connect().call(Call::Resume).unwrap();
            }
            wait_for("the guest", || {
                assert_eq!(next.ended(), None);
                (next.serial().len() > 30).then_some(())
            });
            in_order(&next.serial());
        }
        // The dirty log is off again, and on for the next one: of other kinds, too.
        let image = rig.path("image");
        save_and_end(&mut rig, &image);
        in_order(&rig.serial());
    }
}

#[test]
fn a_live_save_that_fails_or_is_given_up_leaves_the_guest_running() {
    for backend in backends() {
        let mut rig = reciting(backend);
        rig.start();
        grows(&rig, 10);
        let live = || Call::SaveLive {
            xml: String::new(),
            id: [1; 16],
            disks: Vec::new(),
        };
        let mut client = rig.connect();
        assert!(client.call(live()).unwrap_err().contains("not there"));
        let read_only = File::open("/dev/null").unwrap();
        let error = client.call_with(live(), &[&read_only]).unwrap_err();
        println!("{error}");
        let unknown = Call::SaveLive {
            xml: String::new(),
            id: [1; 16],
            disks: vec![("nobody".into(), "new".into())],
        };
        let (one, two) = (empty(&rig.path("one")), empty(&rig.path("two")));
        let error = client.call_with(unknown, &[&one, &two]).unwrap_err();
        assert!(error.contains("there is no disk 'nobody'"), "{error}");
        // Its asker goes, at any moment of it.
        let mut other = rig.connect();
        for round in 0..6 {
            let mut asker = rig.connect();
            let path = rig.path(&format!("given-up-{round}"));
            asker.send_with(live(), &[&empty(&path)]);
            std::thread::sleep(std::time::Duration::from_millis(round));
            drop(asker);
            wait_for("the job's end", || {
                let status = other.call(Call::JobStatus).unwrap();
                matches!(status, Answer::Job(None)).then_some(())
            });
            assert_eq!(other.state(), MachineState::Running);
        }
        grows(&rig, 30);
        in_order(&rig.serial());
    }
}

/// Either the guest goes on, or all CPU features in the way are named.
#[test]
fn a_guest_of_a_richer_cpu_is_refused_with_the_list() {
    let all = backends();
    for &first in &all {
        for &second in &all {
            let mut rig = reciting(first);
            rig.config.cpu.model = None;
            rig.start();
            grows(&rig, 10);
            let image = rig.path("image");
            save_and_end(&mut rig, &image);
            let mut next = restored(&rig, second, &image, false);
            next.config.cpu.model = None;
            next.start();
            let before = next.serial().len();
            wait_for("the guest or a refusal", || match next.ended() {
                Some(said) => {
                    assert!(first != second, "{said}");
                    assert!(said.contains("lacks CPU features: "), "{said}");
                    Some(())
                }
                None => (next.serial().len() > before + 10).then_some(()),
            });
        }
    }
}

#[test]
fn a_failed_save_leaves_the_guest_running() {
    for backend in backends() {
        let mut rig = reciting(backend);
        rig.start();
        grows(&rig, 10);
        let mut client = rig.connect();
        assert!(client.call(save()).unwrap_err().contains("descriptor"));
        let read_only = File::open("/dev/null").unwrap();
        let error = client.call_with(save(), &[&read_only]).unwrap_err();
        println!("{error}");
        assert_eq!(client.state(), MachineState::Running);
        grows(&rig, 30);
        in_order(&rig.serial());
    }
}

#[test]
fn a_save_is_given_up_when_its_asker_goes() {
    let mut rig = reciting(Backend::Soft);
    rig.start();
    grows(&rig, 10);
    let mut other = rig.connect();
    let mut asker = rig.connect();
    asker.send_with(save(), &[&empty(&rig.path("image"))]);
    drop(asker);
    wait_for("the guest", || {
        (other.state() == MachineState::Running).then_some(())
    });
    grows(&rig, 30);
    in_order(&rig.serial());
}

#[test]
fn a_machine_that_never_ran_is_saved_too() {
    for backend in backends() {
        let mut rig = reciting(backend);
        rig.config.start_paused = true;
        rig.start();
        let image = rig.path("image");
        save_and_end(&mut rig, &image);
        assert!(
            !Image::open(&File::open(&image).unwrap())
                .unwrap()
                .header
                .running
        );
        let mut next = restored(&rig, backend, &image, false);
        next.start();
        grows(&next, 30);
        assert!(next.serial().starts_with('a'));
        in_order(&next.serial());
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason_and_kept() {
    let mut rig = reciting(Backend::Soft);
    rig.start();
    grows(&rig, 10);
    let image = rig.path("image");
    save_and_end(&mut rig, &image);
    let refused = |change: &dyn Fn(&mut Rig), image: &Path, words: &str| {
        let mut next = restored(&rig, Backend::Soft, image, true);
        change(&mut next);
        assert_eq!(next.run(), 1);
        let said = next.stderr();
        assert!(said.contains(words), "{said}");
        assert!(image.exists());
    };
    refused(
        &|r| r.config.memory_bytes = 32 << 20,
        &image,
        "bytes of memory",
    );
    refused(&|r| r.config.vcpus = 2, &image, "it has 1 vCPUs");
    refused(&|r| r.config.serials.clear(), &image, "uart0");
    let bytes = std::fs::read(&image).unwrap();
    let other = rig.path("other");
    std::fs::write(&other, &bytes[..bytes.len() / 2]).unwrap();
    refused(&|_| (), &other, "truncated");
    std::fs::write(&other, b"hello").unwrap();
    refused(&|_| (), &other, "not a saved image");
    let mut flipped = bytes.clone();
    // The guest's counter.
    let at = bytes.len() - (16 << 20) + (2 << 20);
    flipped[at + 1] ^= 0x40;
    std::fs::write(&other, &flipped).unwrap();
    refused(
        &|_| (),
        &other,
        "guest memory at 0x200000 has another checksum",
    );
    // Mapped, it is noticed in the background.
    let mut next = restored(&rig, Backend::Soft, &other, false);
    next.start();
    let mut client = next.connect();
    assert!(client.rest().iter().any(|event| matches!(event,
            Event::Exiting(record) if record.message.contains("another checksum"))));
}

#[test]
fn a_reset_after_a_restore_boots_with_clean_memory() {
    for backend in backends() {
        let mut rig = reciting(backend);
        rig.start();
        grows(&rig, 5);
        let image = rig.path("image");
        save_and_end(&mut rig, &image);
        let mut next = restored(&rig, backend, &image, false);
        next.start();
        grows(&next, 5);
        next.connect().call(Call::Reset).unwrap();
        grows(&next, 30);
        // It says the alphabet from its start again, once (where, only the machine knows:
        // Reset is answered when it is done, and the guest does not wait for us).
        let said = next.serial();
        let follows = |pair: &[u8]| pair[1] == if pair[0] == b'z' { b'a' } else { pair[0] + 1 };
        let breaks: Vec<usize> = said
            .as_bytes()
            .windows(2)
            .enumerate()
            .filter(|(_, pair)| !follows(pair))
            .map(|(at, _)| at + 1)
            .collect();
        match breaks[..] {
            [at] => assert_eq!(said.as_bytes()[at], b'a', "in {said}"),
            // It was reset just after a z.
            [] => (),
            _ => panic!("in {said}"),
        }
    }
}

#[test]
fn a_dump_is_an_elf_core() {
    for backend in backends() {
        let mut rig = reciting(backend);
        rig.start();
        grows(&rig, 10);
        let mut client = rig.connect();
        for live in [false, true] {
            let path = rig.path(&format!("core-{live}"));
            let dump = Call::Dump {
                hold: false,
                live,
                devices: true,
            };
            let file = empty(&path);
            client.call_with(dump, &[&file]).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(&bytes[..4], b"\x7fELF");
            assert_eq!(client.state(), MachineState::Running);
            grows(&rig, 10);
        }
        in_order(&rig.serial());
    }
}

/// Another value somewhere in a state.
fn forge(value: &mut serde_json::Value, random: &mut dyn FnMut(u64) -> u64) {
    use serde_json::Value;
    match value {
        Value::Array(list) if !list.is_empty() => {
            let at = usize::try_from(random(list.len() as u64)).unwrap();
            match random(8) {
                0 => drop(list.remove(at)),
                1 => list.extend(list.clone()),
                _ => forge(&mut list[at], random),
            }
        }
        Value::Object(map) if !map.is_empty() => {
            let at = usize::try_from(random(map.len() as u64)).unwrap();
            let key = map.keys().nth(at).unwrap().clone();
            if random(12) == 0 {
                map.remove(&key);
            } else {
                forge(map.get_mut(&key).unwrap(), random);
            }
        }
        Value::Bool(on) => *on = !*on,
        Value::Number(_) => {
            *value = match random(6) {
                0 => 0.into(),
                1 => 255.into(),
                2 => u64::MAX.into(),
                3 => random(1 << 32).into(),
                4 => (1_u64 << random(64)).into(),
                _ => (-1).into(),
            }
        }
        _ => *value = Value::String("?".into()),
    }
}

/// States with right checksums and wrong content: refused with a reason, or the guest's own harm.
#[test]
fn forged_states_do_no_harm_to_the_host() {
    let seed: u64 = std::env::var("VIREO_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::process::id().into());
    println!("VIREO_SEED={seed}");
    let mut state = seed | 1;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below.max(1)
    };
    let mut rig = reciting(Backend::Soft);
    let disk = rig.path("disk.raw");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let device = |id: &str, slot: u8, kind: serde_json::Value| {
        let address = serde_json::json!({"bus": 0, "device": slot, "function": 0});
        serde_json::json!({"id": id, "address": address, "kind": kind})
    };
    let devices = serde_json::json!([
        device(
            "port",
            1,
            serde_json::json!({"root_port": {"index": 1, "chassis": 1, "port": 1, "hotplug": true}})
        ),
        device(
            "rng0",
            2,
            serde_json::json!({"rng": {"source": {"path": "/dev/urandom"}}})
        ),
        device("balloon0", 3, serde_json::json!({"balloon": {}})),
        device(
            "disk0",
            4,
            serde_json::json!({"disk": {"image": {"file": {"path": disk}, "name": "disk.raw", "format": "raw"}}})
        ),
        device(
            "watchdog0",
            5,
            serde_json::json!({"watchdog": {"action": "reset"}})
        ),
    ]);
    rig.config.devices = serde_json::from_value(devices).unwrap();
    rig.start();
    grows(&rig, 10);
    let image = rig.path("image");
    save_and_end(&mut rig, &image);
    let file = File::open(&image).unwrap();
    let whole = Image::open(&file).unwrap();
    let sections = whole.sections().unwrap();
    let ram = whole.header.ram_bytes;
    let (mut refused, mut ran) = (0, 0);
    let rounds = match std::env::var_os("VIREO_SOAK") {
        Some(_) => 3000,
        None => 60,
    };
    for round in 0..rounds {
        let mut forged = sections.clone();
        let at = usize::try_from(random(forged.len() as u64)).unwrap();
        let part = &sections[at];
        let mut state = part.state().unwrap();
        forge(&mut state, &mut random);
        forged[at] = Section::new(&*part.id, &*part.kind, part.version, &state).unwrap();
        let path = rig.path("forged");
        drop(std::fs::remove_file(&path));
        let file = empty(&path);
        let plan = vmm_api::saved::Plan::begin(&file, [2; 16], "", true, &forged, ram).unwrap();
        plan.finish(&file).unwrap();
        let mut next = restored(&rig, Backend::Soft, &path, false);
        next.config.devices.clone_from(&rig.config.devices);
        next.start();
        let deadline = std::time::Instant::now() + std::time::Duration::from_millis(100);
        let mut ended = next.ended();
        while ended.is_none() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(2));
            ended = next.ended();
        }
        match ended {
            Some(said) => {
                assert!(said.starts_with("exit status"), "round {round}: {said}");
                assert!(!said.contains("panicked"), "round {round}: {said}");
                refused += 1;
            }
            None => {
                next.signal(libc::SIGTERM);
                next.wait();
                let said = next.stderr();
                assert!(!said.contains("panicked"), "round {round}: {said}");
                ran += 1;
            }
        }
    }
    println!("{refused} ended, {ran} ran");
}
