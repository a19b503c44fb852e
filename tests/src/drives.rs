//! What tests of drives share.

use std::fs::{self, File};

use serde_json::Value;
use vmm_api::config::{MachineConfig, Resource, RestoreConfig};
use vmm_api::control::Call;
use vmm_api::devices::DeviceConfig;

use crate::{Control, Guest, Rig};

/// Configurations of devices.
pub fn devices(list: Vec<Value>) -> Vec<DeviceConfig> {
    let parsed = list.into_iter().map(serde_json::from_value);
    parsed.collect::<Result<_, _>>().unwrap()
}

/// Sectors, each with its own number in it.
pub fn numbered(sectors: u32) -> Vec<u8> {
    (0..sectors)
        .flat_map(|n| [n.to_le_bytes(); 128].concat())
        .collect()
}

/// Saves and restores a guest three times while it uses `/dev/sda` and a CD-ROM with `text.txt` in `/dev/sr0`: the guest
/// that goes on. Its control socket is `control`.
pub fn saved_in_use(rig: &Rig, config: &mut MachineConfig, mut guest: Guest) -> Guest {
    guest
        .run(
            "mkdir /mnt; mount -t iso9660 -o ro /dev/sr0 /mnt; i=0; echo 0 >/rounds; \
             (while :; do dd if=/dev/zero of=/dev/sda bs=64k count=32 oflag=direct 2>/dev/null || echo disk >>/bad; \
             cat /mnt/text.txt >/dev/null || echo cd >>/bad; echo 3 >/proc/sys/vm/drop_caches; \
             i=$((i + 1)); echo $i >/rounds; done) &",
        )
        .ok();
    // The count's file is empty for a moment each time.
    let wait = "n=$(cat /rounds); while [ \"$(cat /rounds)\" = \"$n\" ]; do sleep 0.1; done; \
        cat /bad 2>/dev/null; true";
    assert_eq!(guest.run(wait).ok(), "");
    for round in 0..3 {
        let mut control = Control::connect(&rig.path("control"));
        let image = rig.path(&format!("image{round}"));
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
        control.ask(save, &[&file]).unwrap();
        control.call(Call::Stop).unwrap();
        guest.wait();
        let _ = fs::remove_file(rig.path("control"));
        config.restore = Some(RestoreConfig {
            image: Resource::Path(image),
            copy: false,
        });
        guest = Guest::resume(rig, config);
        assert_eq!(guest.run(wait).ok(), "", "round {round}");
    }
    guest
}
