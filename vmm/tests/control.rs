//! The control socket of a running machine.

mod common;

use std::io::{Read, Write};

use common::{Rig, backends, guests, wait_for};
use vmm_api::config::LifecycleAction;
use vmm_api::control::{Call, Event, ExitCause, MachineState};

fn chattering(backend: vmm_api::config::Backend) -> Rig {
    let mut rig = Rig::new(backend, &guests::elf(guests::chatter()));
    rig.start();
    rig
}

fn output_grows(rig: &Rig) {
    let before = rig.serial().len();
    wait_for("more output", || {
        (rig.serial().len() > before).then_some(())
    });
}

#[test]
fn pauses_and_resumes() {
    for backend in backends() {
        let mut rig = chattering(backend);
        let mut client = rig.connect();
        output_grows(&rig);
        client.call(Call::Pause).unwrap();
        assert_eq!(client.state(), MachineState::Paused);
        // What was written before the pause may still be on its way to the file.
        let mut last = usize::MAX;
        wait_for("quiet", || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            let now = rig.serial().len();
            (std::mem::replace(&mut last, now) == now).then_some(())
        });
        let paused_at = client.status().vcpu_time_ns;
        client.call(Call::Pause).unwrap();
        client.call(Call::Resume).unwrap();
        output_grows(&rig);
        assert!(client.status().vcpu_time_ns[0] > paused_at[0]);
        client.call(Call::Stop).unwrap();
        let events = client.rest();
        let names: Vec<_> = events
            .iter()
            .filter(|e| matches!(e, Event::Paused | Event::Resumed))
            .collect();
        assert_eq!(names, [&Event::Paused, &Event::Resumed]);
        assert!(
            matches!(events.last(), Some(Event::Exiting(record)) if record.cause == ExitCause::Stopped)
        );
        assert_eq!(rig.wait().code(), Some(0));
    }
}

#[test]
fn processors_that_stand_still_take_no_time() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::chatter()));
        rig.config.vcpus = 3;
        rig.start();
        output_grows(&rig);
        let mut client = rig.connect();
        client.call(Call::Pause).unwrap();
        let spent = |client: &mut common::Client| client.status().vcpu_time_ns.iter().sum::<u64>();
        let before = spent(&mut client);
        // However long this really takes: they have nothing to do.
        std::thread::sleep(std::time::Duration::from_millis(500));
        let spent = spent(&mut client) - before;
        assert!(spent < 50_000_000, "{backend:?}: {spent} ns");
    }
}

#[test]
fn starts_paused_when_told_and_resets() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::echo()));
        rig.config.start_paused = true;
        rig.start();
        let mut client = rig.connect();
        assert_eq!(client.state(), MachineState::Paused);
        assert_eq!(rig.serial(), "");
        client.call(Call::Reset).unwrap();
        assert_eq!(
            client.state(),
            MachineState::Paused,
            "a reset does not start it"
        );
        client.call(Call::Resume).unwrap();
        wait_for("the prompt", || (rig.serial() == "> ").then_some(()));
        client.call(Call::Reset).unwrap();
        wait_for("the prompt again", || {
            (rig.serial() == "> > ").then_some(())
        });
        assert_eq!(client.state(), MachineState::Running);
        assert_eq!(client.events, [Event::Reset, Event::Resumed, Event::Reset]);
    }
}

#[test]
fn power_button_and_what_power_off_does() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::button()));
        rig.start();
        let mut client = rig.connect();
        wait_for("the guest", || (rig.serial() == "w").then_some(()));
        client
            .call(Call::OnPoweroff(LifecycleAction::Restart))
            .unwrap();
        client.call(Call::PowerButton).unwrap();
        wait_for("the restart", || (rig.serial() == "wbw").then_some(()));
        client
            .call(Call::OnPoweroff(LifecycleAction::Preserve))
            .unwrap();
        client.call(Call::PowerButton).unwrap();
        wait_for("the power-off", || {
            (client.state() == MachineState::Halted).then_some(())
        });
        assert!(client.call(Call::Resume).unwrap_err().contains("reset"));
        client
            .call(Call::OnPoweroff(LifecycleAction::Destroy))
            .unwrap();
        client.call(Call::Reset).unwrap();
        wait_for("the guest again", || {
            (rig.serial() == "wbwbw").then_some(())
        });
        client.call(Call::PowerButton).unwrap();
        let events = client.rest();
        assert_eq!(events.iter().filter(|e| **e == Event::Shutdown).count(), 3);
        assert!(
            matches!(events.last(), Some(Event::Exiting(record)) if record.cause == ExitCause::Shutdown)
        );
        assert_eq!(rig.wait().code(), Some(0));
    }
}

#[test]
fn crash_is_told_before_the_end() {
    for backend in backends() {
        let mut rig = Rig::new(backend, &guests::elf(guests::twice()));
        rig.config.boot.cmdline = "p".into();
        rig.config.start_paused = true;
        rig.start();
        let mut client = rig.connect();
        client.call(Call::Resume).unwrap();
        let events = client.rest();
        assert!(
            events.iter().any(|e| matches!(
                e,
                Event::Crashed {
                    guest_fault: true,
                    ..
                }
            )),
            "{events:?}"
        );
        assert!(
            matches!(events.last(), Some(Event::Exiting(record)) if record.cause == ExitCause::Crashed)
        );
        rig.wait();
    }
}

#[test]
fn malformed_frames_end_their_connection_only() {
    for backend in backends() {
        let rig = chattering(backend);
        let mut good = rig.connect();
        let mut rest = Vec::new();
        for bad in [
            &b"\xff\xff\xff\xff"[..],
            b"\0\0\0\x02{}",
            b"\0\0\0\x01x",
            b"\0\0\0\0",
        ] {
            let mut client = rig.connect();
            client.stream.write_all(bad).unwrap();
            // What was sent to it before (events) may still come; then the end.
            assert!(client.stream.read_to_end(&mut rest).is_ok());
        }
        let mut half = rig.connect();
        half.stream.write_all(&[0, 0]).unwrap();
        drop(half);
        assert_eq!(good.state(), MachineState::Running);
    }
}

#[test]
fn a_client_that_does_not_read_does_not_disturb() {
    for backend in backends() {
        let rig = chattering(backend);
        let mut deaf = rig.connect();
        let mut good = rig.connect();
        // Fills every buffer in between; ends when the VMM gives the connection up.
        let body = br#"{"id":1,"call":"query"}"#;
        let frame = [&u32::try_from(body.len()).unwrap().to_be_bytes()[..], body].concat();
        let many = frame.repeat(1000);
        deaf.stream
            .set_write_timeout(Some(std::time::Duration::from_secs(2)))
            .unwrap();
        for _ in 0..200 {
            if deaf.stream.write_all(&many).is_err() {
                break;
            }
        }
        assert_eq!(good.state(), MachineState::Running);
        good.call(Call::Pause).unwrap();
        good.call(Call::Nmi).unwrap();
        assert_eq!(good.state(), MachineState::Paused);
    }
}
