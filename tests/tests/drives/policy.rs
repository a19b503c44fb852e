//! Images that need not be there (`startupPolicy`).

use super::*;

fn with_policy(source: &str, policy: &str, device: &str, dev: &str) -> String {
    let policy = match policy {
        "" => String::new(),
        policy => format!(" startupPolicy='{policy}'"),
    };
    format!(
        "<disk type='file' device='{device}'><source file='{source}'{policy}/>\
         <target dev='{dev}' bus='sata'/></disk>"
    )
}

#[test]
fn a_missing_medium_is_left_out_as_far_as_the_definition_says() {
    let rig = Rig::new();
    rig.vireo(&["list"]).ok();
    let events = Events::of(&rig);
    let iso = rig.path("gone.iso").display().to_string();
    let put = || rig.write("gone.iso", vec![0; 1 << 20]);
    let image = rig.path("image").display().to_string();
    // Whether a boot goes on without it, and whether a saved guest does.
    for (policy, boots, goes_on) in [
        ("", false, false),
        ("mandatory", false, false),
        ("requisite", false, true),
        ("optional", true, true),
    ] {
        let name = format!("guest{policy}");
        rig.define(&small(
            &rig,
            &name,
            &with_policy(&iso, policy, "cdrom", "sda"),
        ));
        let dropped =
            format!("event 'disk-change' for domain '{name}' disk sata0-0-0: {iso} -> : changed");
        let check = |run: vireo_tests::Run, fine: bool| {
            if !fine {
                let error = run.fails();
                let words =
                    format!("Cannot access storage file '{iso}': No such file or directory");
                assert!(error.contains(&words), "{policy}: {error}");
                return;
            }
            run.ok();
            assert_eq!(
                events.take(&name, "'lifecycle'"),
                [dropped.as_str()],
                "{policy}"
            );
            let live = disk(&rig, &name, "sda", &[]);
            assert!(
                !live.contains("<source") && live.contains("<driver name='qemu'/>"),
                "{live}"
            );
            assert!(disk(&rig, &name, "sda", &["--inactive"]).contains(&iso));
            rig.vireo(&["destroy", &name]).ok();
        };
        events.take(&name, "Defined");
        let _ = std::fs::remove_file(&iso);
        check(rig.vireo(&["start", &name]), boots);
        put();
        rig.vireo(&["start", &name]).ok();
        rig.vireo(&["save", &name, &image]).ok();
        events.take(&name, "Saved");
        std::fs::remove_file(&iso).unwrap();
        check(rig.virsh(&["restore", &image]), goes_on);
        if !goes_on {
            put();
            rig.virsh(&["restore", &image]).ok();
            assert!(disk(&rig, &name, "sda", &[]).contains(&iso));
            rig.vireo(&["destroy", &name]).ok();
        }
        put();
        rig.vireo(&["start", &name]).ok();
        rig.vireo(&["managedsave", &name]).ok();
        events.take(&name, "Saved");
        std::fs::remove_file(&iso).unwrap();
        check(rig.vireo(&["start", &name]), goes_on);
    }
    // A disk that need not be there goes as a whole.
    let gone = rig.path("gone.img").display().to_string();
    rig.define(&small(
        &rig,
        "disk",
        &with_policy(&gone, "optional", "disk", "sdb"),
    ));
    events.take("disk", "Defined");
    rig.virsh(&["start", "disk"]).ok();
    assert_eq!(
        events.take("disk", "'lifecycle'"),
        [format!(
            "event 'disk-change' for domain 'disk' disk sata0-0-1: {gone} -> : dropped"
        )]
    );
    let list = rig.vireo(&["domblklist", "disk"]).ok();
    assert!(!list.contains("sdb"), "{list}");
    rig.vireo(&["destroy", "disk"]).ok();
}
