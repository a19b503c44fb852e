//! Keys that are pressed from outside, as the guest sees them.

mod common;

use std::fs::{self, File};

use common::{Rig, backends, guests, wait_for};
use vmm_api::config::{Backend, Resource, RestoreConfig};
use vmm_api::control::Call;

fn keys(keys: &[u16], hold_ms: u32) -> Call {
    Call::SendKeys {
        keys: keys.to_vec(),
        hold_ms,
    }
}

/// The bytes that the keyboard's controller gave the guest.
fn typed(rig: &Rig) -> Vec<u8> {
    let all = fs::read(rig.path("serial")).unwrap();
    all.strip_prefix(b"> ")
        .map(<[u8]>::to_vec)
        .unwrap_or_default()
}

#[track_caller]
fn comes(rig: &Rig, want: &[u8]) {
    wait_for("the keys", || {
        (typed(rig).len() >= want.len()).then_some(())
    });
    assert_eq!(typed(rig), want);
}

fn typist(backend: Backend) -> Rig {
    let mut rig = Rig::new(backend, &guests::elf(guests::typist()));
    rig.config.cpu.model = Some("pentium2".into());
    rig
}

#[test]
fn keys_are_pressed_in_order_and_let_go_of_the_other_way_round() {
    for backend in backends() {
        let mut rig = typist(backend);
        rig.start();
        let mut client = rig.connect();
        wait_for("the guest", || rig.serial().ends_with("> ").then_some(()));
        client.call(keys(&[0x1d, 0x38, 0xe053], 1)).unwrap();
        let mut all = vec![0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
        comes(&rig, &all);
        // Others while some are held; a machine that stands still.
        client.call(keys(&[0x2a], 600_000)).unwrap();
        client.call(keys(&[0x1e], 0)).unwrap();
        all.extend([0x2a, 0x1e, 0x9e]);
        comes(&rig, &all);
        client.call(Call::Pause).unwrap();
        client.call(keys(&[0x30], 1)).unwrap();
        client.call(Call::Resume).unwrap();
        all.extend([0x30, 0xb0]);
        comes(&rig, &all);
        for wrong in [0, 0x80, 0xe000, 0xe1ff, 0xffff] {
            assert!(client.call(keys(&[wrong], 1)).is_err(), "{wrong:#x}");
        }
        assert!(client.call(keys(&[0x1e; 17], 1)).is_err());
        for _ in 0..63 {
            client.call(keys(&[], 600_000)).unwrap();
        }
        assert!(client.call(keys(&[], 600_000)).is_err());
        client.call(Call::Stop).unwrap();
        rig.wait();
    }
}

#[test]
fn nobody_holds_keys_where_a_machine_was_saved_to() {
    for backend in backends() {
        let mut rig = typist(backend);
        rig.start();
        let mut client = rig.connect();
        wait_for("the guest", || rig.serial().ends_with("> ").then_some(()));
        client.call(keys(&[0x38, 0xe053], 600_000)).unwrap();
        comes(&rig, &[0x38, 0xe0, 0x53]);
        let image = rig.path("image");
        let file = File::create_new(&image).unwrap();
        let save = Call::Save {
            xml: "<domain/>".into(),
            id: [1; 16],
            running: None,
        };
        client.call_with(save, &[&file]).unwrap();
        client.call(Call::Stop).unwrap();
        rig.wait();
        rig.config.restore = Some(RestoreConfig {
            image: Resource::Path(image),
            copy: false,
        });
        fs::remove_file(rig.path("serial")).unwrap();
        rig.start();
        let mut client = rig.connect();
        client.call(Call::Resume).unwrap();
        wait_for("the keys", || {
            (fs::read(rig.path("serial")).unwrap_or_default().len() >= 3).then_some(())
        });
        assert_eq!(fs::read(rig.path("serial")).unwrap(), [0xe0, 0xd3, 0xb8]);
        client.call(Call::Stop).unwrap();
        rig.wait();
    }
}
