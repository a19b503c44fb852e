//! A machine that moves from one process to another, by hand.

mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use common::{Client, Rig, backends, guests, wait_for};
use vmm_api::config::{Backend, Resource};
use vmm_api::control::{
    Answer, Call, Event, ExitCause, FromVmm, MachineState, MigrateOptions, Reply,
};

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
