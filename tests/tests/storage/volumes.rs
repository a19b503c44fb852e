//! Volumes: what is made, what is refused, what is listed.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use vireo_tests::{Rig, Run};

use super::{SECRET, both, both_refuse, missing, pattern, pool, program};

#[test]
fn volumes_are_what_was_asked_for() {
    if missing(&["virsh", "qemu-img"]) {
        return;
    }
    let (rig, folder) = pool();
    let path = |name: &str| folder.join(name).display().to_string();
    let create = |args: &[&str]| {
        let mut all = vec!["vol-create-as", "p"];
        all.extend(args);
        rig.vireo(&all).ok();
    };
    create(&["a.img", "10M"]);
    create(&["b.qcow2", "10M", "--format", "qcow2"]);
    create(&[
        "c.qcow2",
        "10M",
        "--format",
        "qcow2",
        "--backing-vol",
        "b.qcow2",
        "--backing-vol-format",
        "qcow2",
    ]);
    create(&["d.qcow2", "10M", "--format", "qcow2", "--prealloc-metadata"]);
    create(&["e.img", "10M", "--allocation", "0"]);
    create(&["f.img", "10M", "--allocation", "5M"]);
    create(&[
        "g.qcow2",
        "10M",
        "--format",
        "qcow2",
        "--prealloc-metadata",
        "--allocation",
        "0",
    ]);
    let blocks = |name: &str| fs::metadata(path(name)).unwrap().blocks() * 512;
    assert!(blocks("a.img") >= 10 << 20);
    assert_eq!(blocks("e.img"), 0);
    assert!((5 << 20..6 << 20).contains(&blocks("f.img")));
    assert!(blocks("d.qcow2") >= 10 << 20, "falloc");
    assert!(blocks("g.qcow2") < 1 << 20, "metadata");
    for name in ["b.qcow2", "c.qcow2", "d.qcow2", "g.qcow2"] {
        program("qemu-img", &["check", "-q", &path(name)]);
    }
    let map = program("qemu-img", &["map", "--output=json", &path("g.qcow2")]);
    assert!(map.contains("\"offset\""), "clusters are there: {map}");
    let info = program("qemu-img", &["info", &path("c.qcow2")]);
    assert!(
        info.contains(&format!("backing file: {}", path("b.qcow2"))),
        "{info}"
    );
    both(&rig, &["vol-list", "p"]);
    let details = both(&rig, &["vol-list", "p", "--details"]);
    assert!(
        details.contains(&format!(
            " a.img     {}     file   10.00 MiB   10.00 MiB",
            path("a.img")
        )),
        "{details}"
    );
    let info = both(&rig, &["vol-info", "e.img", "p", "--bytes"]);
    assert_eq!(
        info,
        "Name:           e.img\nType:           file\nCapacity:       10485760 bytes\nAllocation:     0 bytes\n\n"
    );
    both(&rig, &["vol-info", "e.img", "p", "--physical"]);
    assert_eq!(both(&rig, &["vol-key", "a.img", "p"]).trim(), path("a.img"));
    assert_eq!(
        both(&rig, &["vol-path", "a.img", "p"]).trim(),
        path("a.img")
    );
    assert_eq!(both(&rig, &["vol-name", &path("a.img")]), "a.img\n\n");
    assert_eq!(both(&rig, &["vol-pool", &path("a.img")]), "p\n\n");
    let xml = rig.vireo(&["vol-dumpxml", "c.qcow2", "p"]).ok();
    assert!(xml.contains("<format type='qcow2'/>"));
    assert!(
        xml.contains(&format!(
            "<backingStore>\n    <path>{}</path>\n    <format type='qcow2'/>",
            path("b.qcow2")
        )),
        "{xml}"
    );

    let file = rig.write(
        "v2.xml",
        "<volume><name>v2</name><capacity unit='MiB'>10</capacity><target><format type='qcow2'/>\
         <permissions><mode>0640</mode></permissions><clusterSize unit='KiB'>128</clusterSize>\
         <features><lazy_refcounts/><extended_l2/></features></target></volume>",
    );
    rig.virsh(&["vol-create", "p", &file, "--validate"]).ok();
    let info = program("qemu-img", &["info", "--output=json", &path("v2")]);
    for words in [
        "\"cluster-size\": 131072",
        "\"lazy-refcounts\": true",
        "\"extended-l2\": true",
        "\"compat\": \"1.1\"",
    ] {
        assert!(info.contains(words), "{words} in {info}");
    }
    assert_eq!(fs::metadata(path("v2")).unwrap().mode() & 0o777, 0o640);
    rig.vireo(&["pool-refresh", "p"]).ok();
    let xml = both(&rig, &["vol-dumpxml", "v2", "p"]);
    for words in [
        "<compat>1.1</compat>",
        "<clusterSize unit='B'>131072</clusterSize>",
        "<lazy_refcounts/>",
        "<mode>0640</mode>",
    ] {
        assert!(xml.contains(words), "{words} in {xml}");
    }
    let old = rig.write(
        "v1.xml",
        "<volume><name>v1</name><capacity unit='MiB'>10</capacity><target><format type='qcow2'/>\
         <compat>0.10</compat></target></volume>",
    );
    rig.vireo(&["vol-create", "p", &old]).ok();
    let info = program("qemu-img", &["info", "--output=json", &path("v1")]);
    assert!(info.contains("\"compat\": \"0.10\""), "{info}");
    rig.vireo(&["vol-delete", "v1", "p"]).ok();
    assert!(!folder.join("v1").exists());
    assert!(
        both_refuse(&rig, &["vol-delete", "v1", "p"])
            .contains("no storage vol with matching path 'v1'")
    );
}

#[test]
fn bad_volumes_are_refused_and_leave_nothing() {
    if missing(&["virsh"]) {
        return;
    }
    let (rig, folder) = pool();
    rig.vireo(&["vol-create-as", "p", "a", "1M"]).ok();
    let said = both_refuse(&rig, &["vol-create-as", "p", "a", "1M"]);
    assert!(said.contains("storage volume 'a' exists already"), "{said}");
    fs::write(folder.join("unseen"), "x").unwrap();
    let said = both_refuse(&rig, &["vol-create-as", "p", "unseen", "1M"]);
    assert!(said.contains("already exists"), "{said}");
    assert_eq!(fs::read(folder.join("unseen")).unwrap(), b"x");
    let refused = |inner: &str, words: &str| {
        let file = rig.write("v.xml", format!("<volume>{inner}</volume>"));
        let said = both_refuse(&rig, &["vol-create", "p", &file]);
        assert!(said.contains(words), "{words:?} in {said}");
    };
    refused("", "missing volume name element");
    refused("<name>v</name>", "missing capacity element");
    for name in ["a/b", ".", "..", "../x"] {
        refused(
            &format!("<name>{name}</name><capacity>1</capacity>"),
            "volume name",
        );
    }
    let v = |more: &str| format!("<name>v</name><capacity unit='M'>1</capacity>{more}");
    refused(
        &v("<target><format type='bogus'/></target>"),
        "unknown volume format type bogus",
    );
    refused(
        &v("<target><format type='vmdk'/></target>"),
        "'vmdk' cannot be made",
    );
    refused(
        &v("<target><format type='qcow2'/><compat>2.0</compat></target>"),
        "no compat level 2.0",
    );
    refused(
        &v(
            "<target><compat>0.10</compat><format type='qcow2'/><features><lazy_refcounts/></features></target>",
        ),
        "lazy_refcounts not supported with compat level 0.10",
    );
    refused(
        &v("<target><format type='qcow2'/><clusterSize>12345</clusterSize></target>"),
        "cluster size",
    );
    refused(
        &v(
            "<target><format type='qcow2'/></target><backingStore><path>/nosuch</path><format type='raw'/></backingStore>",
        ),
        "inaccessible backing store volume /nosuch",
    );
    refused(
        &v("<backingStore><path>/nosuch</path></backingStore>"),
        "backing storage not supported for raw volumes",
    );
    refused(
        &v("<target><encryption format='luks'/></target>"),
        "A single <secret type='passphrase'...> element is expected",
    );
    refused(
        &v(&format!(
            "<target><encryption format='luks'><secret type='passphrase' uuid='{SECRET}'/></encryption></target>"
        )),
        "no secret with matching uuid",
    );
    refused(
        "<name>v</name><capacity unit='EiB'>20</capacity>",
        "value too large",
    );
    refused(
        "<name>v</name><capacity unit='TiB'>5000</capacity>",
        "error: ",
    );
    assert!(
        both_refuse(
            &rig,
            &["vol-create-as", "p", "m", "1M", "--prealloc-metadata"]
        )
        .contains("metadata preallocation is not supported for raw volumes")
    );
    assert!(both_refuse(&rig, &["vol-create-as", "p", "m", "1x"]).contains("Malformed size 1x"));
    let names: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(!rig.vireo(&["vol-list", "p"]).ok().contains(" v "));
}

#[test]
fn encrypted_volumes_open_with_their_secret() {
    if missing(&["qemu-img"]) {
        return;
    }
    let (rig, folder) = pool();
    let secret = rig.write(
        "secret.xml",
        format!(
            "<secret><uuid>{SECRET}</uuid><usage type='volume'><volume>/x</volume></usage></secret>"
        ),
    );
    rig.vireo(&["secret-define", &secret]).ok();
    let value = rig.write("value", "hello");
    rig.vireo(&["secret-set-value", SECRET, "--file", &value, "--plain"])
        .ok();
    for (name, format) in [("r", "raw"), ("q", "qcow2")] {
        let file = rig.write(
            "v.xml",
            format!(
                "<volume><name>{name}</name><capacity unit='MiB'>4</capacity><target><format type='{format}'/>\
                 <encryption format='luks'><secret type='passphrase' uuid='{SECRET}'/>\
                 <cipher name='aes' size='128' mode='cbc' hash='sha256'/><ivgen name='essiv' hash='sha256'/>\
                 </encryption></target></volume>"
            ),
        );
        rig.vireo(&["vol-create", "p", &file]).ok();
        rig.vireo(&["vol-resize", name, "8M", "p"]).ok();
        let path = folder.join(name).display().to_string();
        let options = if format == "raw" {
            format!("driver=luks,key-secret=s,file.filename={path}")
        } else {
            format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}")
        };
        let info = program(
            "qemu-img",
            &[
                "info",
                "--object",
                "secret,id=s,data=hello",
                "--image-opts",
                &options,
            ],
        );
        assert!(info.contains("virtual size: 8 MiB"), "{info}");
        let zeroes = rig.path("zeroes").display().to_string();
        program("qemu-img", &["create", "-q", "-f", "raw", &zeroes, "8M"]);
        // Opens with that passphrase; with another one it does not.
        let wrong: Run = Command::new("qemu-img")
            .args([
                "convert",
                "--object",
                "secret,id=s,data=wrong",
                "--image-opts",
                &options,
            ])
            .args(["-O", "raw", rig.path("out").to_str().unwrap()])
            .output()
            .unwrap()
            .into();
        assert_ne!(wrong.status, 0);
        rig.vireo(&["pool-refresh", "p"]).ok();
        let xml = rig.vireo(&["vol-dumpxml", name, "p"]).ok();
        assert!(xml.contains("<encryption format='luks'>"), "{xml}");
        assert!(
            xml.contains("<capacity unit='bytes'>8388608</capacity>"),
            "{xml}"
        );
    }
}

#[test]
fn odd_files_are_listed_or_left_out() {
    if missing(&["virsh", "qemu-img"]) {
        return;
    }
    let (rig, folder) = pool();
    let path = |name: &str| folder.join(name).display().to_string();
    let qemu_img = |args: &[&str]| program("qemu-img", args);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "loop2",
        "-F",
        "qcow2",
        &path("loop1"),
        "1M",
    ]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "loop1",
        "-F",
        "qcow2",
        &path("loop2"),
        "1M",
    ]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "gone",
        "-F",
        "qcow2",
        &path("orphan"),
        "1M",
    ]);
    qemu_img(&["create", "-q", "-f", "vmdk", &path("x.vmdk"), "3M"]);
    qemu_img(&["create", "-q", "-f", "vdi", &path("x.vdi"), "2M"]);
    let header = fs::read(path("orphan")).unwrap();
    let forged = |name: &str, at: usize, bytes: &[u8]| {
        let mut image = header.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(folder.join(name), image).unwrap();
    };
    forged("huge-backing", 16, &u32::MAX.to_be_bytes());
    forged("huge-l1", 36, &u32::MAX.to_be_bytes());
    forged("huge-size", 24, &u64::MAX.to_be_bytes());
    forged("huge-clusters", 20, &63u32.to_be_bytes());
    forged("future", 72, &u64::MAX.to_be_bytes());
    fs::write(folder.join("short"), b"QFI\xfb\0\0\0\x03garbage").unwrap();
    fs::write(folder.join("empty"), b"").unwrap();
    fs::create_dir(folder.join("sub")).unwrap();
    std::os::unix::fs::symlink("nowhere", folder.join("dangling")).unwrap();
    std::os::unix::fs::symlink("x.vdi", folder.join("link")).unwrap();
    let fifo = CString::new(path("fifo")).unwrap();
    // SAFETY: the name is terminated and lives here.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    let _socket = std::os::unix::net::UnixListener::bind(folder.join("s"));
    rig.vireo(&["pool-refresh", "p"]).ok();
    let listed = both(&rig, &["vol-list", "p", "--details"]);
    let kind = |name: &str| {
        let line = listed
            .lines()
            .find(|line| line.starts_with(&format!(" {name} ")));
        line.map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            format!("{} {} {}", words[2], words[3], words[4])
        })
    };
    for name in ["dangling", "fifo", "s"] {
        assert_eq!(kind(name), None, "{listed}");
    }
    for (name, said) in [
        ("loop1", "file 1.00 MiB"),
        ("orphan", "file 1.00 MiB"),
        ("x.vmdk", "file 3.00 MiB"),
        ("x.vdi", "file 2.00 MiB"),
        ("link", "file 2.00 MiB"),
        ("short", "file 15.00 B"),
        ("empty", "file 0.00 B"),
        ("sub", "dir 0.00 B"),
    ] {
        assert_eq!(kind(name).as_deref(), Some(said), "{name} in {listed}");
    }
    for name in [
        "huge-backing",
        "huge-l1",
        "huge-size",
        "huge-clusters",
        "future",
    ] {
        let xml = both(&rig, &["vol-dumpxml", name, "p"]);
        assert!(xml.contains("<format type='qcow2'/>"), "{xml}");
    }
    for name in [
        "loop1", "orphan", "huge-l1", "future", "short", "sub", "x.vdi",
    ] {
        let said = rig.vireo(&["vol-clone", name, "copy", "p"]).fails();
        assert!(said.contains("Failed to clone vol"), "{said}");
        assert!(!folder.join("copy").exists(), "{name}");
        assert!(!rig.vireo(&["vol-list", "p"]).ok().contains(" copy "));
    }
    rig.vireo(&["vol-delete", "sub", "p"]).ok();
    assert!(!folder.join("sub").exists());
}

#[test]
fn a_volume_is_there_whole_or_not_at_all() {
    if missing(&["virsh"]) {
        return;
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let folder = rig.path("p");
    fs::create_dir(&folder).unwrap();
    rig.vireo(&[
        "pool-define-as",
        "p",
        "dir",
        "--target",
        folder.to_str().unwrap(),
    ])
    .ok();
    rig.vireo(&["pool-start", "p"]).ok();
    pattern(&folder.join("a"), 64);
    let whole = fs::read(folder.join("a")).unwrap();
    rig.vireo(&["pool-refresh", "p"]).ok();
    for delay in [0, 3, 10, 30, 60] {
        // Not ours: it would start another daemon.
        let mut client = rig
            .virsh_command()
            .args(["vol-clone", "a", "b", "p"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        // SAFETY: kill(2) has no memory effects; the process is this test's child.
        unsafe { libc::kill(daemon.id() as i32, libc::SIGKILL) };
        daemon.wait().unwrap();
        client.wait().unwrap();
        match fs::read(folder.join("b")) {
            Ok(copy) => {
                assert!(copy == whole, "half of it is there");
                fs::remove_file(folder.join("b")).unwrap();
            }
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        daemon = rig.daemon();
        rig.vireo(&["pool-refresh", "p"]).ok();
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
