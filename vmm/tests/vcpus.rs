//! vCPUs that come and go while the guest runs.

mod common;

use std::fs::File;

use common::{Client, Rig, backends, guests, wait_for};
use vmm_api::config::{Backend, Resource, RestoreConfig, VcpuHotplug};
use vmm_api::control::{Answer, Call, Event, MachineState};

/// A guest that looks after its vCPUs, of which it has one of three.
fn pluggable(backend: Backend, cmdline: &str) -> Rig {
    let mut rig = Rig::new(backend, &guests::elf(guests::pluggable()));
    // One that every host's KVM has.
    rig.config.cpu.model = Some("pentium2".into());
    rig.config.boot.cmdline = cmdline.into();
    rig.config.vcpus = 3;
    let absent = [1, 2].into();
    rig.config.vcpu_hotplug = Some(VcpuHotplug { absent });
    rig
}

fn says(rig: &mut Rig, text: &str) {
    let what = format!("the guest to say {text}");
    wait_for(&what, || {
        assert_eq!(rig.ended(), None);
        let said = rig.serial();
        assert!(text.starts_with(&said), "{said:?} instead of {text:?}");
        (said == text).then_some(())
    });
}

fn plug(client: &mut Client, vcpu: u32) -> Result<Answer, String> {
    let vcpus = vec![vcpu];
    client.call(Call::PlugVcpus { vcpus })
}

fn unplug(client: &mut Client, vcpu: u32) -> Result<Answer, String> {
    client.call(Call::UnplugVcpu { vcpu })
}

/// The vCPUs that are there.
fn there(client: &mut Client) -> Vec<u32> {
    client.status().vcpus.unwrap()
}

fn gone(client: &mut Client, vcpu: u32) {
    wait_for("the vCPU to go", || {
        (!there(client).contains(&vcpu)).then_some(())
    });
}

#[test]
fn they_come_run_go_and_come_again() {
    for backend in backends() {
        let mut rig = pluggable(backend, "");
        rig.start();
        says(&mut rig, "w");
        let mut client = rig.connect();
        assert_eq!(there(&mut client), [0]);
        plug(&mut client, 2).unwrap();
        says(&mut rig, "wiA");
        assert_eq!(there(&mut client), [0, 2]);
        assert!(plug(&mut client, 2).unwrap_err().contains("already"));
        assert!(plug(&mut client, 3).unwrap_err().contains("can have 3"));
        assert!(unplug(&mut client, 0).unwrap_err().contains("first"));
        assert!(unplug(&mut client, 1).unwrap_err().contains("no vCPU 1"));
        unplug(&mut client, 2).unwrap();
        says(&mut rig, "wiAre");
        gone(&mut client, 2);
        assert!(client.events.contains(&Event::VcpuRemoved { vcpu: 2 }));
        assert_eq!(client.status().vcpu_time_ns[2], 0);
        // The machine's hold on its vCPUs goes with the times.
        client.call(Call::Pause).unwrap();
        plug(&mut client, 2).unwrap();
        plug(&mut client, 1).unwrap();
        assert_eq!(client.state(), MachineState::Paused);
        client.call(Call::Resume).unwrap();
        wait_for("both", || {
            let said = rig.serial();
            let count = |letter| said.matches(letter).count();
            (count('i') == 3 && count('A') == 3).then_some(())
        });
        client.call(Call::Pause).unwrap();
        client.call(Call::Resume).unwrap();
        client.call(Call::Nmi).unwrap();
        assert_eq!(there(&mut client), [0, 1, 2]);
    }
}

#[test]
fn they_stay_over_a_reset_unless_the_guest_was_asked_for_them() {
    for backend in backends() {
        let mut rig = pluggable(backend, "keep");
        rig.start();
        says(&mut rig, "w");
        let mut client = rig.connect();
        plug(&mut client, 1).unwrap();
        says(&mut rig, "wiA");
        client.call(Call::Reset).unwrap();
        // It finds vCPU 1 there, and hears of nothing.
        says(&mut rig, "wiAw");
        assert_eq!(there(&mut client), [0, 1]);
        plug(&mut client, 2).unwrap();
        says(&mut rig, "wiAwiA");
        unplug(&mut client, 1).unwrap();
        says(&mut rig, "wiAwiAr");
        wait_for("the guest's refusal", || {
            client.status();
            let kept = Event::VcpuKept { vcpu: 1 };
            client.events.contains(&kept).then_some(())
        });
        assert_eq!(there(&mut client), [0, 1, 2]);
        client.call(Call::Pause).unwrap();
        unplug(&mut client, 2).unwrap();
        client.call(Call::Reset).unwrap();
        assert_eq!(
            there(&mut client),
            [0, 1],
            "a guest that begins anew has let go"
        );
        client.call(Call::Resume).unwrap();
        says(&mut rig, "wiAwiArw");
    }
}

#[test]
fn a_saved_machine_has_those_that_were_there() {
    let all = backends();
    for (&first, &second) in all.iter().zip(all.iter().rev()) {
        let mut rig = pluggable(first, "");
        rig.start();
        says(&mut rig, "w");
        let mut client = rig.connect();
        plug(&mut client, 2).unwrap();
        says(&mut rig, "wiA");
        // The guest has heard of neither when it is saved.
        client.call(Call::Pause).unwrap();
        plug(&mut client, 1).unwrap();
        unplug(&mut client, 2).unwrap();
        let image = rig.path("image");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&image)
            .unwrap();
        let save = Call::Save {
            xml: "<domain/>".into(),
            id: [1; 16],
            running: Some(true),
        };
        client.call_with(save, &[&file]).unwrap();
        client.call(Call::Stop).unwrap();
        rig.wait();
        // Whatever the configuration says of those at the start.
        for absent in [vec![1, 2], vec![], vec![2]] {
            let mut next = pluggable(second, "");
            let absent = absent.into_iter().collect();
            next.config.vcpu_hotplug = Some(VcpuHotplug { absent });
            next.config.start_paused = true;
            next.config.restore = Some(RestoreConfig {
                image: Resource::Path(image.clone()),
                copy: false,
            });
            next.start();
            let mut client = next.connect();
            assert_eq!(there(&mut client), [0, 1, 2]);
            client.call(Call::Resume).unwrap();
            wait_for("the guest", || {
                assert_eq!(next.ended(), None, "{first:?} to {second:?}");
                let said = next.serial();
                (said.len() == 4).then_some(said)
            });
            // One is looked at first, and vCPU 1 says its letter whenever it gets there.
            let said = next.serial();
            let mut letters: Vec<char> = said.chars().collect();
            letters.sort_unstable();
            assert_eq!(letters, ['A', 'e', 'i', 'r'], "{said}");
            gone(&mut client, 2);
            assert_eq!(there(&mut client), [0, 1]);
            plug(&mut client, 2).unwrap();
            let all = format!("{said}iA");
            says(&mut next, &all);
        }
    }
}

#[test]
fn those_that_wait_use_no_time() {
    let mut rig = pluggable(Backend::Soft, "");
    rig.config.vcpu_hotplug = Some(VcpuHotplug::default());
    rig.config.start_paused = true;
    rig.start();
    let mut client = rig.connect();
    let mut spent = || client.status().vcpu_time_ns.iter().sum::<u64>();
    let before = spent();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let after = spent();
    assert!(after - before < 30_000_000, "{before} {after}");
}

#[test]
fn what_can_not_be_is_refused() {
    let mut rig = pluggable(Backend::Soft, "");
    let mut bad = |change: &dyn Fn(&mut Rig), what: &str| {
        let before = rig.config.clone();
        change(&mut rig);
        assert_eq!(rig.run(), 1, "{what}");
        let said = rig.stderr();
        assert!(said.contains(what), "{said}");
        rig.config = before;
    };
    let absent = |vcpu| {
        Some(VcpuHotplug {
            absent: [vcpu].into(),
        })
    };
    bad(&|rig| rig.config.vcpu_hotplug = absent(0), "but the first");
    bad(&|rig| rig.config.vcpu_hotplug = absent(3), "but the first");
    bad(&|rig| rig.config.acpi = false, "ACPI");
    rig.config.vcpu_hotplug = None;
    rig.start();
    let mut client = rig.connect();
    assert_eq!(there(&mut client), [0, 1, 2]);
    assert!(plug(&mut client, 1).unwrap_err().contains("for good"));
    assert!(unplug(&mut client, 1).unwrap_err().contains("for good"));
}
