//! What volumes contain: copied, resized, wiped, moved in and out.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use vireo_tests::which;

use super::{both_refuse, missing, pattern, pool, program};

#[test]
fn copies_have_the_content_of_what_they_are_made_from() {
    if missing(&["virsh", "qemu-img"]) {
        return;
    }
    let (rig, folder) = pool();
    let path = |name: &str| folder.join(name).display().to_string();
    pattern(&folder.join("a"), 8);
    program(
        "qemu-img",
        &["convert", "-O", "qcow2", &path("a"), &path("b")],
    );
    program(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &path("b"),
            "-F",
            "qcow2",
            &path("top"),
        ],
    );
    program("qemu-io", &["-c", "write -P 7 1M 1M", &path("top")]);
    rig.vireo(&["pool-refresh", "p"]).ok();
    rig.vireo(&["vol-clone", "a", "a2", "p"]).ok();
    assert_eq!(fs::read(path("a")).unwrap(), fs::read(path("a2")).unwrap());
    rig.virsh(&["vol-clone", "b", "b2", "p"]).ok();
    rig.vireo(&["vol-clone", "top", "top2", "p"]).ok();
    let info = program("qemu-img", &["info", &path("top2")]);
    assert!(info.contains("backing file:"), "{info}");
    for (one, other) in [("b", "b2"), ("top", "top2")] {
        program("qemu-img", &["check", "-q", &path(other)]);
        program("qemu-img", &["compare", "-q", &path(one), &path(other)]);
    }
    let raw = rig.write("raw.xml", "<volume><name>flat</name><capacity>0</capacity><allocation>0</allocation><target><format type='raw'/></target></volume>");
    for name in ["top", "b"] {
        rig.vireo(&["vol-create-from", "p", &raw, name, "--inputpool", "p"])
            .ok();
        program(
            "qemu-img",
            &["compare", "-q", "-F", "raw", &path(name), &path("flat")],
        );
        assert!(
            fs::metadata(path("flat")).unwrap().blocks() * 512 < 8 << 20,
            "holes stay holes"
        );
        rig.vireo(&["vol-delete", "flat", "p"]).ok();
    }
    let qcow2 = rig.write("qcow2.xml", "<volume><name>q</name><capacity unit='MiB'>16</capacity><target><format type='qcow2'/></target></volume>");
    rig.virsh(&["vol-create-from", "p", &qcow2, "a", "--inputpool", "p"])
        .ok();
    program("qemu-img", &["check", "-q", &path("q")]);
    program("qemu-img", &["compare", "-q", &path("a"), &path("q")]);
    assert!(both_refuse(&rig, &["vol-clone", "a", "b", "p"]).contains("already in use"));
}

#[test]
fn resizing_and_wiping() {
    if missing(&["virsh", "qemu-img"]) {
        return;
    }
    let (rig, folder) = pool();
    let len = |name: &str| fs::metadata(folder.join(name)).unwrap().len();
    rig.vireo(&["vol-create-as", "p", "a", "4M", "--allocation", "0"])
        .ok();
    assert_eq!(
        rig.vireo(&["vol-resize", "a", "8M", "p"]).ok(),
        "Size of volume 'a' successfully changed to 8M\n\n"
    );
    assert_eq!(len("a"), 8 << 20);
    rig.vireo(&["vol-resize", "a", "2M", "p", "--delta"]).ok();
    assert_eq!(len("a"), 10 << 20);
    assert!(both_refuse(&rig, &["vol-resize", "a", "1M", "p"]).contains("unless shrink flag"));
    rig.virsh(&["vol-resize", "a", "-6M", "p", "--delta", "--shrink"])
        .ok();
    assert_eq!(len("a"), 4 << 20);
    rig.vireo(&["vol-resize", "a", "6M", "p", "--allocate"])
        .ok();
    assert!(fs::metadata(folder.join("a")).unwrap().blocks() * 512 >= 2 << 20);
    assert!(
        both_refuse(&rig, &["vol-resize", "a", "1M", "p", "--shrink"])
            .contains("below existing allocation")
    );
    assert!(both_refuse(&rig, &["vol-resize", "a", "4096T", "p"]).contains("Not enough space"));
    rig.vireo(&["vol-create-as", "p", "q", "4M", "--format", "qcow2"])
        .ok();
    rig.vireo(&["vol-resize", "q", "8M", "p"]).ok();
    rig.vireo(&["vol-resize", "q", "2M", "p", "--shrink"]).ok();
    let info = rig.vireo(&["vol-info", "q", "p"]).ok();
    assert!(info.contains("Capacity:       2.00 MiB"), "{info}");
    program(
        "qemu-img",
        &["check", "-q", folder.join("q").to_str().unwrap()],
    );

    let file = File::options().write(true).open(folder.join("a")).unwrap();
    file.write_all_at(b"a secret", 1 << 20).unwrap();
    rig.vireo(&["vol-wipe", "a", "p"]).ok();
    assert!(fs::read(folder.join("a")).unwrap().iter().all(|b| *b == 0));
    assert_eq!(len("a"), 6 << 20);
    for (algorithm, last) in [("dod", Some(0xff)), ("bsi", Some(0x7f)), ("random", None)] {
        rig.virsh(&["vol-wipe", "a", "p", "--algorithm", algorithm])
            .ok();
        let content = fs::read(folder.join("a")).unwrap();
        match last {
            Some(byte) => assert!(content.iter().all(|b| *b == byte), "{algorithm}"),
            None => assert!(content.windows(2).any(|w| w[0] != w[1])),
        }
        assert_eq!(content.len(), 6 << 20);
    }
    assert!(
        both_refuse(&rig, &["vol-wipe", "a", "p", "--algorithm", "trim"]).contains("not supported")
    );
    assert!(
        both_refuse(&rig, &["vol-wipe", "a", "p", "--algorithm", "x"])
            .contains("Unsupported algorithm 'x'")
    );
}

#[test]
fn uploads_and_downloads() {
    if missing(&["virsh"]) {
        return;
    }
    let (rig, folder) = pool();
    let local = rig.path("local");
    pattern(&local, 9);
    let local = local.display().to_string();
    let down = rig.path("down");
    for client in ["vireo", "virsh"] {
        let run = |args: &[&str]| {
            if client == "vireo" {
                rig.vireo(args).ok()
            } else {
                rig.virsh(args).ok()
            }
        };
        for sparse in [false, true] {
            let name = format!("{client}-{sparse}");
            run(&["vol-create-as", "p", &name, "9M", "--allocation", "0"]);
            let more: &[&str] = if sparse { &["--sparse"] } else { &[] };
            let with = |args: &[&str]| run(&[args, more].concat());
            with(&["vol-upload", &name, &local, "p"]);
            assert_eq!(
                fs::read(folder.join(&name)).unwrap(),
                fs::read(&local).unwrap(),
                "{name}"
            );
            let blocks = fs::metadata(folder.join(&name)).unwrap().blocks() * 512;
            assert_eq!(blocks < 5 << 20, sparse, "{name}: {blocks}");
            let _ = fs::remove_file(&down);
            with(&["vol-download", &name, down.to_str().unwrap(), "p"]);
            assert_eq!(
                fs::read(&down).unwrap(),
                fs::read(&local).unwrap(),
                "{name}"
            );
            if sparse {
                assert!(
                    fs::metadata(&down).unwrap().blocks() * 512 < 5 << 20,
                    "{name}"
                );
            }
        }
        let name = format!("{client}-false");
        run(&[
            "vol-download",
            &name,
            down.to_str().unwrap(),
            "p",
            "--offset",
            "2097152",
            "--length",
            "10",
        ]);
        assert_eq!(fs::read(&down).unwrap(), b"mebibyte 2");
        // More than there is room for is not cut off unseen.
        let more = ["vol-upload", &name, &local, "p", "--length", "1048576"];
        let said = match client {
            "vireo" => rig.vireo(&more).fails(),
            _ => rig.virsh(&more).fails(),
        };
        assert!(said.contains("more data came for volume"), "{said}");
        let piece = rig.write("piece", "PIECE");
        run(&["vol-upload", &name, &piece, "p", "--offset", "3"]);
        let content = fs::read(folder.join(&name)).unwrap();
        assert_eq!(&content[..10], b"mebPIECE 0");
        assert_eq!(content.len(), 9 << 20);
    }
    assert!(
        both_refuse(&rig, &["vol-upload", "vireo-true", "/nosuch", "p"])
            .contains("cannot read /nosuch")
    );
    // What was uploaded is what it is now.
    if which("qemu-img") {
        let image = rig.path("image").display().to_string();
        program("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"]);
        rig.vireo(&["vol-upload", "vireo-true", &image, "p"]).ok();
        let info = rig.vireo(&["vol-info", "vireo-true", "p"]).ok();
        assert!(info.contains("Capacity:       64.00 MiB"), "{info}");
    }
}
