//! The key slots of encrypted images.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use super::failures::same;
use super::{Scratch, have, json, qemu, qemu_ok, vireo};

const SECRETS: [&str; 6] = [
    "--object",
    "secret,id=a,data=aaa",
    "--object",
    "secret,id=b,data=bbb",
    "--object",
    "secret,id=c,data=ccc",
];

/// Which slots have a key, as qemu-img tells it.
fn slots(folder: &Path, image: &str) -> Vec<bool> {
    let said = json(&qemu_ok(folder, &["info", "--output=json", image]));
    let data = &said["format-specific"]["data"];
    let slots = match &data["slots"] {
        Value::Array(slots) => slots,
        _ => data["encrypt"]["slots"].as_array().unwrap(),
    };
    slots.iter().map(|slot| slot["active"] == true).collect()
}

#[test]
fn key_slots_change_as_qemu_img_changes_them() {
    if !have("key_slots_change_as_qemu_img_changes_them") {
        return;
    }
    let scratch = Scratch::new("keys");
    let folder = &scratch.0;
    for (format, prefix) in [("luks", ""), ("qcow2", "encrypt.")] {
        let options = format!("{prefix}key-secret=a,{prefix}iter-time=10");
        let options = match format {
            "qcow2" => format!("encrypt.format=luks,{options}"),
            _ => options,
        };
        for image in ["ours", "theirs"] {
            let create = ["create", "-q", "-f", format, "-o", &options, image, "4M"];
            qemu_ok(folder, &[&create[..1], &SECRETS, &create[1..]].concat());
        }
        // What opens it, what is asked, and whether by force.
        for (opens, change, force) in [
            ("a", "state=active", false),
            ("a", "state=inactive", false),
            ("a", "state=active,new-secret=b,old-secret=a", false),
            ("a", "state=active,new-secret=b,keyslot=0", false),
            ("a", "state=active,new-secret=b,keyslot=9", false),
            ("a", "state=active,new-secret=nope", false),
            ("a", "state=active,new-secret=b,iter-time=10", false),
            (
                "a",
                "state=active,new-secret=c,iter-time=10,keyslot=5",
                false,
            ),
            ("a", "state=inactive,old-secret=b,new-secret=c", false),
            ("c", "state=inactive,old-secret=b", false),
            ("a", "state=inactive,old-secret=b", false),
            ("a", "state=inactive,keyslot=5,old-secret=a", false),
            ("a", "state=inactive,keyslot=5", false),
            ("a", "state=inactive,keyslot=5", false),
            ("a", "state=inactive,keyslot=0", false),
            ("a", "state=inactive,old-secret=a", false),
            (
                "a",
                "state=active,new-secret=b,keyslot=0,iter-time=10",
                true,
            ),
            ("b", "state=inactive,keyslot=0", false),
            ("b", "state=inactive,keyslot=0", true),
        ] {
            let change: Vec<String> = change
                .split(',')
                .map(|option| format!("{prefix}{option}"))
                .collect();
            let change = change.join(",");
            let amend = |image: &str, run: fn(&Path, &[&str]) -> Output| {
                let name =
                    format!("driver={format},{prefix}key-secret={opens},file.filename={image}");
                let more: &[&str] = if force { &["--force"] } else { &[] };
                let line = ["--image-opts", &name, "-o", &change];
                run(folder, &[&["amend"], &SECRETS[..], more, &line].concat())
            };
            let ours = amend("ours", vireo);
            let theirs = amend("theirs", qemu);
            same(&ours, &theirs, &[format, opens, &change]);
            assert_eq!(
                slots(folder, "ours"),
                slots(folder, "theirs"),
                "{format}: {change}"
            );
        }
        assert!(!slots(folder, "ours").contains(&true), "{format}");
        for image in ["ours", "theirs"] {
            std::fs::remove_file(folder.join(image)).unwrap();
        }
    }
}
