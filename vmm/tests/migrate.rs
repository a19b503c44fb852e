//! A machine that moves from one process to another, by hand.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use common::{Client, Rig, backends, guests, wait_for};
use vmm_api::config::{Backend, Resource, VcpuHotplug};
use vmm_api::control::{
    Answer, Call, Event, ExitCause, FromVmm, MachineState, MigrateOptions, Reply,
};
use vmm_api::devices::{DeviceConfig, DeviceKind, PciAddress};
use vmm_api::migrate::{self, Code, Extra, HEADER, Header, Hello, Kind, Verdict};

const PLAIN: MigrateOptions = MigrateOptions {
    bandwidth: 0,
    downtime_ms: 300,
    zstd_level: None,
    auto_converge: None,
    direct: true,
    disks: Vec::new(),
    incremental: false,
};

/// A machine whose guest says the alphabet for ever, as its memory tells it where it is.
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

/// Starts the other side for `connections` connections; their near ends.
fn await_machine(target: &mut Rig, connections: usize) -> Vec<File> {
    let at = target.path("incoming");
    let listener = UnixListener::bind(&at).unwrap();
    target.config.incoming = vec![Resource::Path(at); connections];
    target.start();
    (0..connections)
        .map(|_| {
            let (stream, _) = listener.accept().unwrap();
            File::from(OwnedFd::from(stream))
        })
        .collect()
}

/// Waits until the other side has everything, or the call is answered.
fn ready(client: &mut Client, call: u64) -> Result<(), String> {
    loop {
        match client.receive().expect("the source's process ended") {
            FromVmm::Event(Event::MigrationReady) => return Ok(()),
            FromVmm::Event(_) => {}
            FromVmm::Reply(Reply { id, result }) => {
                assert_eq!(id, call);
                return Err(result.unwrap_err().message);
            }
        }
    }
}

fn begin(source: &Rig, options: MigrateOptions, connections: &[File]) -> (Client, u64) {
    let mut client = source.connect();
    let files: Vec<&File> = connections.iter().collect();
    let call = client.send_with(Call::Migrate(options), &files);
    (client, call)
}

#[test]
fn a_machine_goes_on_in_another_process() {
    let packed = MigrateOptions {
        zstd_level: Some(1),
        ..PLAIN
    };
    let braked = MigrateOptions {
        auto_converge: Some((30, 20)),
        ..PLAIN
    };
    let ways = [
        (PLAIN, 1),
        (packed.clone(), 1),
        (PLAIN, 3),
        (packed, 2),
        (braked, 1),
    ];
    let all = backends();
    for &first in &all {
        for &second in &all {
            let mut source = reciting(first);
            source.start();
            grows(&source, 40);
            let mut said = String::new();
            for (options, connections) in ways.clone() {
                let mut target = reciting(second);
                let near = await_machine(&mut target, connections);
                let (mut client, call) = begin(&source, options, &near);
                drop(near);
                ready(&mut client, call).unwrap();
                // Both stand still: nobody says anything.
                assert_eq!(client.state(), MachineState::Paused);
                let here = source.serial().len();
                assert_eq!(target.serial(), "");
                let mut other = target.connect();
                assert_eq!(other.state(), MachineState::Paused);
                other.call(Call::Resume).unwrap();
                source.wait();
                assert_eq!(source.record().cause, ExitCause::Migrated);
                assert_eq!(source.serial().len(), here);
                said += &source.serial();
                grows(&target, 30);
                source = target;
            }
            said += &source.serial();
            assert!(said.len() > 150);
            in_order(&said);
        }
    }
}

#[test]
fn until_it_is_given_away_the_source_may_keep_it() {
    for backend in backends() {
        let mut source = reciting(backend);
        source.start();
        grows(&source, 20);
        // Given up after everything has gone.
        let mut target = reciting(backend);
        let near = await_machine(&mut target, 2);
        let (mut client, call) = begin(&source, PLAIN, &near);
        drop(near);
        ready(&mut client, call).unwrap();
        source.connect().call(Call::AbortJob).unwrap();
        grows(&source, 20);
        target.wait();
        assert_eq!(target.record().cause, ExitCause::Failed);
        assert_eq!(target.serial(), "");
        // The other side dies before it runs.
        let mut target = reciting(backend);
        let near = await_machine(&mut target, 1);
        let (mut client, call) = begin(&source, PLAIN, &near);
        drop(near);
        ready(&mut client, call).unwrap();
        target.signal(libc::SIGKILL);
        grows(&source, 20);
        // Whoever asked for it goes.
        let mut target = reciting(backend);
        let near = await_machine(&mut target, 1);
        let (mut client, call) = begin(&source, PLAIN, &near);
        drop(near);
        ready(&mut client, call).unwrap();
        drop(client);
        grows(&source, 20);
        target.wait();
        assert_eq!(target.serial(), "");
        in_order(&source.serial());
    }
}

#[test]
fn a_source_that_dies_leaves_no_twin() {
    let mut source = reciting(Backend::Soft);
    source.start();
    grows(&source, 20);
    let mut target = reciting(Backend::Soft);
    let near = await_machine(&mut target, 1);
    let (mut client, call) = begin(&source, PLAIN, &near);
    drop(near);
    ready(&mut client, call).unwrap();
    source.signal(libc::SIGKILL);
    target.wait();
    assert_eq!(target.serial(), "");
    assert!(target.record().message.contains("source"));
}

#[test]
fn what_does_not_fit_is_refused_before_anything_moves() {
    let mut source = reciting(Backend::Soft);
    source.config.cpu.model = None;
    source.start();
    grows(&source, 20);
    let refused = |change: &dyn Fn(&mut Rig), words: &str| {
        let mut target = reciting(Backend::Soft);
        target.config.cpu.model = None;
        change(&mut target);
        let near = await_machine(&mut target, 1);
        let (mut client, call) = begin(&source, PLAIN, &near);
        drop(near);
        let error = ready(&mut client, call).unwrap_err();
        assert!(error.contains(words), "{error}");
        assert_eq!(client.state(), MachineState::Running);
        target.wait();
    };
    refused(&|rig| rig.config.memory_bytes = 32 << 20, "bytes of memory");
    refused(&|rig| rig.config.vcpus = 2, "vCPUs");
    refused(&|rig| rig.config.serials.clear(), "uart0");
    if backends().contains(&Backend::Kvm) {
        refused(&|rig| rig.config.backend = Backend::Kvm, "CPU features: ");
    }
    grows(&source, 20);
    in_order(&source.serial());
}

#[test]
fn a_peer_that_is_no_machine_is_refused() {
    let mut source = reciting(Backend::Soft);
    source.start();
    grows(&source, 10);
    let (near, far) = UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut &far, b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
    let (mut client, call) = begin(&source, PLAIN, &[File::from(OwnedFd::from(near))]);
    let error = ready(&mut client, call).unwrap_err();
    assert!(error.contains("protocol"), "{error}");
    grows(&source, 20);
    // And one that is no source.
    let mut target = reciting(Backend::Soft);
    let near = await_machine(&mut target, 1);
    std::io::Write::write_all(&mut &near[0], &[0xff; 64]).unwrap();
    target.wait();
    assert_eq!(target.record().cause, ExitCause::Failed);
    in_order(&source.serial());
}

/// What a source is told by the other side at two moments: while nothing is decided, and after it has given the guest
/// away. Only the latter leaves it unknown who has it, whatever words are used.
#[test]
fn only_a_guest_that_was_given_away_may_be_elsewhere() {
    let failure = |client: &mut Client| loop {
        match client.receive().expect("the source's process ended") {
            FromVmm::Event(_) => {}
            FromVmm::Reply(Reply { result, .. }) => return result.unwrap_err(),
        }
    };
    let mut source = reciting(Backend::Soft);
    source.start();
    grows(&source, 10);
    let (near, mut far) = UnixStream::pair().unwrap();
    let words = format!("no; {}", migrate::UNKNOWN);
    let refused = migrate::json_frame(Kind::Verdict, &Verdict::refused(&words)).unwrap();
    far.write_all(&refused).unwrap();
    let (mut client, _) = begin(&source, PLAIN, &[File::from(OwnedFd::from(near))]);
    let said = failure(&mut client);
    assert_eq!(said.message, words);
    assert_eq!(said.undecided, Some(false));
    assert!(!said.is_undecided());
    grows(&source, 10);
    let given = || {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut client, call) = begin(&source, PLAIN, &[File::from(OwnedFd::from(near))]);
        overhear(&far);
        ready(&mut client, call).unwrap();
        let early = client.call(Call::Settle { gone: true }).unwrap_err();
        assert_eq!(early, "the guest was not given away");
        migrate::send(&mut &far, Kind::Ask, &[]).unwrap();
        migrate::expect(&mut &far, Kind::Grant).unwrap();
        (client, far)
    };
    // Nothing comes any more; whoever has asked the other side knows that it has not got it.
    let (mut client, far) = given();
    let mut other = source.connect();
    other.call(Call::Settle { gone: false }).unwrap();
    let said = failure(&mut client);
    assert_eq!(said.undecided, Some(false), "{said:?}");
    drop(far);
    grows(&source, 10);
    // Somebody may be between the two: that the connection ends does not say that the other side has.
    for gone in [false, true] {
        let (mut client, far) = given();
        drop(far);
        let said = failure(&mut client);
        assert_eq!(said.undecided, Some(true), "{said:?}");
        assert!(said.message.contains(migrate::UNKNOWN), "{said:?}");
        assert_eq!(client.state(), MachineState::Paused);
        // Until somebody knows.
        client.call(Call::Settle { gone }).unwrap();
        if !gone {
            client.call(Call::Resume).unwrap();
            grows(&source, 10);
            client.call(Call::Settle { gone: true }).unwrap_err();
        }
    }
    source.wait();
    assert_eq!(source.record().cause, ExitCause::Migrated);
    in_order(&source.serial());
}

#[test]
fn how_far_it_is_can_be_asked_and_its_limits_changed() {
    let mut source = reciting(Backend::Soft);
    source.start();
    grows(&source, 10);
    let mut target = reciting(Backend::Soft);
    let near = await_machine(&mut target, 1);
    // It would take for ever.
    let slow = MigrateOptions {
        bandwidth: 1,
        ..PLAIN
    };
    let (mut client, call) = begin(&source, slow, &near);
    drop(near);
    let mut other = source.connect();
    wait_for("the first bytes", || {
        match other.call(Call::JobStatus).unwrap() {
            Answer::Job(Some(status)) => status
                .migration
                .filter(|status| status.transferred > 0 && status.iteration == 1)
                .map(drop),
            answer => panic!("{answer:?}"),
        }
    });
    assert_eq!(other.state(), MachineState::Running);
    let faster = Call::SetMigration {
        bandwidth: Some(0),
        downtime_ms: Some(100),
    };
    other.call(faster).unwrap();
    ready(&mut client, call).unwrap();
    target.connect().call(Call::Resume).unwrap();
    source.wait();
    grows(&target, 20);
    in_order(&(source.serial() + &target.serial()));
}

#[test]
fn a_limit_that_cannot_be_met_is_given_up_and_the_guest_is_fast_again() {
    let mut source = reciting(Backend::Soft);
    source.start();
    grows(&source, 10);
    let mut target = reciting(Backend::Soft);
    let near = await_machine(&mut target, 1);
    // A page takes 0.8 s, and the guest writes one in whatever little time it is left of that.
    let hopeless = MigrateOptions {
        bandwidth: 5_000,
        downtime_ms: 1,
        auto_converge: Some((99, 1)),
        ..PLAIN
    };
    let (mut client, call) = begin(&source, hopeless, &near);
    drop(near);
    let error = ready(&mut client, call).unwrap_err();
    let words = "the downtime limit of 1 ms can't be met: the guest writes ";
    assert!(error.contains(words), "{error}");
    assert!(
        error.contains(" although it is slowed down by 99 %, "),
        "{error}"
    );
    assert!(error.contains(" MiB/s are sent, and the "), "{error}");
    assert_eq!(source.connect().state(), MachineState::Running);
    grows(&source, 20);
    in_order(&source.serial());
    target.wait();
    assert_eq!(target.serial(), "");
}

/// A disk of this format in that file.
fn disk(rig: &mut Rig, format: &str, path: &std::path::Path, backing: Option<&std::path::Path>) {
    let mut image = serde_json::json!({"format": format, "file": {"path": path}, "name": "own"});
    if let Some(backing) = backing {
        image["backing"] =
            serde_json::json!({"format": "raw", "file": {"path": backing}, "name": "base"});
    }
    let config = serde_json::json!({ "image": image });
    rig.config.devices.push(DeviceConfig {
        id: "virtio-disk0".into(),
        address: PciAddress {
            bus: 0,
            device: 1,
            function: 0,
        },
        kind: DeviceKind::Disk(serde_json::from_value(config).unwrap()),
    });
}

/// Content with long runs of zeroes.
fn content(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut all = vec![0u8; bytes];
    for (number, part) in all.chunks_mut(37 << 10).enumerate() {
        if number % 5 < 2 {
            continue;
        }
        for byte in part {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
    }
    all
}

fn make_qcow2(path: &std::path::Path, size: u64, backing: Option<&std::path::Path>) {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    let file = images::File::new(file.into(), "new").unwrap();
    let options = images::qcow2::Create {
        backing: backing.map(|path| (path.as_os_str().to_owned(), "raw".to_owned())),
        ..images::qcow2::Create::new(size)
    };
    images::qcow2::create(file, None, &options).unwrap();
}

#[test]
fn disks_go_along() {
    let size = 9 << 20;
    for (format, connections, incremental) in
        [("raw", 1, false), ("qcow2", 3, false), ("qcow2", 2, true)]
    {
        let mut source = reciting(Backend::Soft);
        let mut target = reciting(Backend::Soft);
        let wanted = content(size, 7);
        let (from, to) = (source.path("own"), target.path("own"));
        std::fs::write(&from, &wanted).unwrap();
        let base = target.path("base");
        match (format, incremental) {
            ("raw", _) => {
                disk(&mut source, "raw", &from, None);
                // What was there before is gone after.
                std::fs::write(&to, content(size, 99)).unwrap();
                disk(&mut target, "raw", &to, None);
            }
            (_, false) => {
                disk(&mut source, "raw", &from, None);
                make_qcow2(&to, size as u64, None);
                disk(&mut target, "qcow2", &to, None);
            }
            (_, true) => {
                // Nothing of what is behind the source's image goes.
                let top = source.path("top");
                make_qcow2(&top, size as u64, Some(&from));
                disk(&mut source, "qcow2", &top, Some(&from));
                std::fs::write(&base, &wanted).unwrap();
                make_qcow2(&to, size as u64, Some(&base));
                disk(&mut target, "qcow2", &to, Some(&base));
            }
        }
        source.start();
        grows(&source, 20);
        let near = await_machine(&mut target, connections);
        let options = MigrateOptions {
            disks: vec!["virtio-disk0".into()],
            incremental,
            ..PLAIN
        };
        let (mut client, call) = begin(&source, options, &near);
        drop(near);
        ready(&mut client, call).unwrap();
        let Answer::Job(Some(status)) = source.connect().call(Call::JobStatus).unwrap() else {
            panic!("no job");
        };
        let migration = status.migration.unwrap();
        let total = if incremental { 0 } else { size as u64 };
        assert_eq!(migration.disk_total, total);
        assert_eq!((migration.disk_sent, migration.disk_left), (total, 0));
        target.connect().call(Call::Resume).unwrap();
        source.wait();
        grows(&target, 20);
        target.connect().call(Call::Stop).unwrap();
        target.wait();
        if format == "raw" {
            assert!(std::fs::read(&to).unwrap() == wanted);
            continue;
        }
        let file = File::open(&to).unwrap();
        let file = images::File::new(file.into(), "own").unwrap();
        let backing = incremental.then(|| {
            let file = images::File::new(File::open(&base).unwrap().into(), "base").unwrap();
            Box::new(images::chain::ImageConfig::new(
                images::chain::Format::Raw,
                file,
            ))
        });
        let image = images::chain::open(images::chain::ImageConfig {
            backing,
            read_only: true,
            ..images::chain::ImageConfig::new(images::chain::Format::Qcow2, file)
        });
        let image = image.unwrap();
        let mut got = vec![0; size];
        images::read_bytes(&*image, 0, &mut got).unwrap();
        assert!(got == wanted, "{format} {incremental}");
        if incremental {
            let extent = image.extent(0, size as u64).unwrap();
            assert_eq!((extent.len, extent.depth), (size as u64, 1), "{extent:?}");
        }
    }
}

#[test]
fn disks_that_do_not_fit_stay() {
    let mut source = reciting(Backend::Soft);
    let path = source.path("own");
    std::fs::write(&path, content(2 << 20, 3)).unwrap();
    disk(&mut source, "raw", &path, None);
    source.start();
    grows(&source, 20);
    let refused = |change: &dyn Fn(&mut Rig), words: &str| {
        let mut target = reciting(Backend::Soft);
        change(&mut target);
        let near = await_machine(&mut target, 1);
        let options = MigrateOptions {
            disks: vec!["virtio-disk0".into()],
            ..PLAIN
        };
        let (mut client, call) = begin(&source, options, &near);
        drop(near);
        let error = ready(&mut client, call).unwrap_err();
        assert!(error.contains(words), "{error}");
        target.wait();
        grows(&source, 20);
    };
    refused(&|_| {}, "there is no disk virtio-disk0 here");
    refused(
        &|rig| {
            let path = rig.path("own");
            std::fs::write(&path, vec![0; 1 << 20]).unwrap();
            disk(rig, "raw", &path, None);
        },
        "disk virtio-disk0 has 2097152 bytes there, 1048576 here",
    );
    // The same file: it would be read and written at once.
    refused(&|rig| disk(rig, "raw", &path, None), "own");
    in_order(&source.serial());
}

/// Everything that a source sends before it gives its machine away, answered as a target would that takes no more than it
/// has to.
fn overhear(far: &UnixStream) -> Vec<u8> {
    overhear_taking(far, Vec::new())
}

fn overhear_taking(mut far: &UnixStream, takes: Vec<Extra>) -> Vec<u8> {
    let mut heard = Vec::new();
    let mut next = |far: &mut &UnixStream| {
        let mut head = [0; HEADER];
        far.read_exact(&mut head).unwrap();
        let header = Header::decode(head).unwrap();
        let body = header.body(far).unwrap();
        heard.extend([&head, &body[..]].concat());
        (header.kind, body.is_empty())
    };
    let well = migrate::json_frame(Kind::Verdict, &Verdict::well()).unwrap();
    assert_eq!(next(&mut far).0, Kind::Hello);
    let fits = Verdict {
        takes,
        ..Verdict::well()
    };
    let fits = migrate::json_frame(Kind::Verdict, &fits).unwrap();
    far.write_all(&fits).unwrap();
    while next(&mut far) != (Kind::State, true) {}
    far.write_all(&well).unwrap();
    heard
}

/// Brings the machine of a stored stream to life.
fn play(stored: &[u8], target: &mut Rig) {
    let near = await_machine(target, 1);
    let mut near = &near[0];
    let header = Header::decode(stored[..HEADER].try_into().unwrap()).unwrap();
    let (hello, rest) = stored.split_at(HEADER + header.len as usize);
    near.write_all(hello).unwrap();
    let heard = |near: &mut &File, kind| migrate::expect(near, kind).unwrap();
    // What comes behind this is read over by those who don't know it.
    let fits = heard(&mut near, Kind::Verdict);
    assert!(fits.starts_with(br#"{"refused":null"#));
    let mut rest = rest;
    while let Some(head) = rest.first_chunk() {
        let header = Header::decode(*head).unwrap();
        let (frame, after) = rest.split_at(HEADER + header.len as usize);
        near.write_all(frame).unwrap();
        rest = after;
        if header.kind == Kind::Code {
            heard(&mut near, Kind::CodeTaken);
        }
    }
    assert_eq!(heard(&mut near, Kind::Verdict), br#"{"refused":null}"#);
    let mut client = target.connect();
    std::thread::scope(|scope| {
        scope.spawn(move || client.call(Call::Resume).unwrap());
        heard(&mut near, Kind::Ask);
        migrate::send(&mut near, Kind::Grant, &[]).unwrap();
        heard(&mut near, Kind::Running);
    });
}

/// A guest came here from a Vireo of the time when the stream's layouts, and those of all states in it, were first
/// written down, and goes on. `VIREO_STORE_STREAM=FILE` stores what this build sends.
#[test]
fn a_machine_of_an_older_build_goes_on() {
    let mut source = reciting(Backend::Soft);
    source.start();
    grows(&source, 30);
    let packed = MigrateOptions {
        zstd_level: Some(19),
        ..PLAIN
    };
    let (near, far) = UnixStream::pair().unwrap();
    let (mut client, call) = begin(&source, packed, &[File::from(OwnedFd::from(near))]);
    let fresh = overhear(&far);
    ready(&mut client, call).unwrap();
    let next = |said: &str| match said.as_bytes().last() {
        Some(b'z') => 'a',
        Some(letter) => char::from(letter + 1),
        None => panic!("it has said nothing"),
    };
    let mut target = reciting(Backend::Soft);
    play(&fresh, &mut target);
    grows(&target, 20);
    // The source stands; what it said may still be on its way to the file.
    let said = wait_for("the source's last word", || {
        let said = source.serial();
        target.serial().starts_with(next(&said)).then_some(said)
    });
    in_order(&target.serial());
    if let Some(file) = std::env::var_os("VIREO_STORE_STREAM") {
        let all = [&[next(&said) as u8], &fresh[..]].concat();
        std::fs::write(file, all).unwrap();
        return;
    }
    let (first, stored) = include_bytes!("streams/1.bin").split_first().unwrap();
    let mut target = reciting(Backend::Soft);
    play(stored, &mut target);
    grows(&target, 20);
    assert!(target.serial().starts_with(char::from(*first)));
    in_order(&target.serial());
    // At that time a machine had none but the vCPUs that it began with.
    let mut target = reciting(Backend::Soft);
    target.config.vcpus = 3;
    let absent = [1, 2].into();
    target.config.vcpu_hotplug = Some(VcpuHotplug { absent });
    play(stored, &mut target);
    grows(&target, 20);
    let mut client = target.connect();
    assert_eq!(client.status().vcpus, Some(vec![0]));
    let refused = client.call(Call::PlugVcpus { vcpus: vec![1] });
    assert!(refused.unwrap_err().contains("for good"));
}

/// A machine on the software CPU that recites in 64-bit mode.
fn reciting_long() -> Rig {
    Rig::new(Backend::Soft, &guests::elf(guests::alphabet_long()))
}

fn frames(mut stream: &[u8]) -> Vec<(Kind, &[u8])> {
    let mut all = Vec::new();
    while let Some(head) = stream.first_chunk() {
        let header = Header::decode(*head).unwrap();
        let (frame, rest) = stream.split_at(HEADER + header.len as usize);
        all.push((header.kind, frame));
        stream = rest;
    }
    all
}

/// Where the code of a guest is that recites: 64-bit code of one page.
fn is_its_code(place: u64) -> bool {
    (0x10_0000..0x10_1000).contains(&place)
}

#[test]
fn where_its_code_is_is_told_to_whoever_takes_it() {
    let mut source = reciting_long();
    source.start();
    grows(&source, 40);
    // Does not say that it is ready: it is not waited for.
    for takes in [Vec::new(), vec![Extra::Code], vec![Extra::Other(1.into())]] {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut client, call) = begin(&source, PLAIN, &[File::from(OwnedFd::from(near))]);
        let heard = overhear_taking(&far, takes.clone());
        ready(&mut client, call).unwrap();
        let all = frames(&heard);
        let codes: Vec<_> = all
            .iter()
            .filter(|(kind, _)| *kind == Kind::Code)
            .map(|(_, frame)| Code::decode(&frame[HEADER..]).unwrap())
            .collect();
        match &codes[..] {
            [] => assert!(!takes.contains(&Extra::Code)),
            [code] => {
                assert!(takes.contains(&Extra::Code));
                let places = &code.vcpus[&0];
                assert!(places.iter().any(|at| is_its_code(*at)), "{places:x?}");
            }
            _ => panic!("{codes:?}"),
        }
        drop(far);
        client.answer(call).unwrap_err();
        grows(&source, 20);
    }
    in_order(&source.serial());
}

#[test]
fn code_that_comes_again_after_it_was_decoded_ahead_is_what_runs() {
    let mut source = reciting_long();
    source.start();
    grows(&source, 40);
    let (near, far) = UnixStream::pair().unwrap();
    let (mut client, call) = begin(&source, PLAIN, &[File::from(OwnedFd::from(near))]);
    let heard = overhear_taking(&far, vec![Extra::Code]);
    ready(&mut client, call).unwrap();
    let all = frames(&heard);
    let code = all.iter().find(|(kind, _)| *kind == Kind::Code).unwrap();
    let mut code = Code::decode(&code.1[HEADER..]).unwrap();
    let places = code.vcpus.get_mut(&0).unwrap();
    // Hints, of whatever quality.
    let ram = source.config.memory_bytes;
    places.extend([0, 1, ram - 1, ram, ram + 4096, 0xfee0_0000, u64::MAX]);
    places.extend((0..4096).map(|offset| 0x10_0000 + offset));
    code.vcpus.insert(7, vec![0x10_0000]);
    let code = migrate::frame(Kind::Code, &code.encode()).unwrap();
    // Where it begins first, it would stop at once.
    let stop = [&0x10_0000u64.to_le_bytes()[..], &[0xf4; 4096]].concat();
    let stop = migrate::frame(Kind::Pages, &stop).unwrap();
    let (hello, rest) = all.split_first().unwrap();
    let mut stream = [hello.1, &stop, &code].concat();
    for (kind, frame) in rest {
        // (The source's own would be a second one, which is read over and not answered.)
        if *kind != Kind::Code {
            stream.extend(*frame);
        }
    }
    let mut target = reciting_long();
    play(&stream, &mut target);
    grows(&target, 60);
    in_order(&target.serial());
    let said = source.serial() + &target.serial();
    in_order(&said[said.len() - target.serial().len() - 1..]);
    // Where memory holds much is only a hint, too.
    let mut vague: Hello = migrate::parse(&hello.1[HEADER..]).unwrap();
    assert_eq!(vague.ram_bytes, ram);
    let (much, all_of_it) = (u64::MAX, (0, ram));
    vague.content = vec![(0, 0), (3, 7), (ram - 4096, 8192), (much, much), all_of_it];
    for last in [(0, ram), (0, much), (1 << 60, 1), (ram, 2 << 20)] {
        vague.content.push(last);
        let vague = migrate::json_frame(Kind::Hello, &vague).unwrap();
        let stream = [&vague, &stream[hello.1.len()..]].concat();
        let mut target = reciting_long();
        play(&stream, &mut target);
        grows(&target, 30);
        in_order(&target.serial());
    }
    // What is no list is refused.
    for wrong in [&[1, 2, 3, 4, 5][..], &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]] {
        let mut target = reciting_long();
        let near = await_machine(&mut target, 1);
        let mut near = &near[0];
        near.write_all(hello.1).unwrap();
        migrate::expect(&mut near, Kind::Verdict).unwrap();
        migrate::send(&mut near, Kind::Code, wrong).unwrap();
        let error = migrate::expect(&mut near, Kind::Verdict).unwrap();
        let error: Verdict = migrate::parse(&error).unwrap();
        let error = error.into_result().unwrap_err().to_string();
        assert!(error.contains("list of code"), "{error}");
        target.wait();
    }
}

#[test]
fn a_guest_that_gdb_has_stopped_stays_so() {
    if std::process::Command::new("gdb")
        .arg("--version")
        .output()
        .is_err()
    {
        println!("left out: a stopped guest that moves needs gdb");
        return;
    }
    let mut source = reciting(Backend::Soft);
    let socket = source.path("gdb");
    source.start_with(&["--gdb", socket.to_str().unwrap(), "--gdb-wait"]);
    wait_for("gdb's socket", || socket.exists().then_some(()));
    let braked = MigrateOptions {
        auto_converge: Some((50, 20)),
        ..PLAIN
    };
    let mut target = reciting(Backend::Soft);
    let near = await_machine(&mut target, 1);
    let (mut client, call) = begin(&source, braked, &near);
    drop(near);
    ready(&mut client, call).unwrap();
    source.connect().call(Call::AbortJob).unwrap();
    client.answer(call).unwrap_err();
    target.wait();
    assert_eq!(client.state(), MachineState::Running);
    // Its first instruction is still to come.
    let gdb = std::process::Command::new("timeout")
        .args([
            "100",
            "gdb",
            "-nx",
            "-batch",
            "-ex",
            "set architecture i386:x86-64",
        ])
        .args(["-ex", "set tcp connect-timeout 30", "-ex"])
        .arg(format!("target remote {}", socket.display()))
        .args([
            "-ex",
            "stepi",
            "-ex",
            "printf \"counted\\n\"",
            "-ex",
            "detach",
        ])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&gdb.stdout).into_owned();
    assert!(said.contains("counted"), "{gdb:?}");
    // One step is not enough for the first letter; let go of, it says them all.
    grows(&source, 20);
    assert!(source.serial().starts_with('a'));
}
