//! Storage pools and volumes, as users of virsh, virt-install and libvirt's Python module know them.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vireo_tests::{Rig, Run, left_out, tiny_guest, tiny_kernel, which};

const SECRET: &str = "22222222-2222-2222-2222-222222222221";

/// Both clients say the same; it is returned.
#[track_caller]
fn both(rig: &Rig, args: &[&str]) -> String {
    let ours = rig.vireo(args).ok();
    assert_eq!(rig.virsh(args).ok(), ours, "{args:?}");
    ours
}

/// Both clients refuse it in the same words.
#[track_caller]
fn both_refuse(rig: &Rig, args: &[&str]) -> String {
    let ours = rig.vireo(args).fails();
    assert_eq!(rig.virsh(args).fails(), ours, "{args:?}");
    ours
}

#[track_caller]
fn program(program: &str, args: &[&str]) -> String {
    let run: Run = Command::new(program)
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        .output()
        .unwrap()
        .into();
    assert_eq!(run.status, 0, "{program} {args:?}: {} {}", run.out, run.err);
    run.out
}

/// A rig with an active pool `p` in its folder `p`.
fn pool() -> (Rig, PathBuf) {
    let rig = Rig::new();
    let folder = rig.path("p");
    let target = folder.to_str().unwrap().to_owned();
    let made = rig
        .vireo(&["pool-create-as", "p", "dir", "--target", &target, "--build"])
        .ok();
    assert_eq!(made, "Pool p created\n\n");
    (rig, folder)
}

fn is_root() -> bool {
    // SAFETY: geteuid(2) takes nothing and returns a number.
    unsafe { libc::geteuid() == 0 }
}

fn missing(programs: &[&str]) -> bool {
    for program in programs {
        if !which(program) {
            left_out(&format!("needs {program}"));
            return true;
        }
    }
    false
}

/// What a pool or volume prints, without what no two of them have in common.
fn steady(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let varies = ["<atime>", "<mtime>", "<ctime>", "<uuid>", "unit='bytes'>"];
        if !varies.iter().any(|word| line.contains(word)) {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

#[test]
fn a_pools_life() {
    if missing(&["virsh"]) {
        return;
    }
    let rig = Rig::new();
    let target = rig.path("p").display().to_string();
    let defined = rig.vireo(&["pool-define-as", "p", "dir", "--target", &target]);
    assert_eq!(defined.ok(), "Pool p defined\n\n");
    assert!(rig.path("etc/vireo/storage/p.xml").exists());
    assert_eq!(
        both_refuse(&rig, &["pool-start", "p"]),
        format!(
            "error: Failed to start pool p\nerror: cannot open directory '{target}': No such file or directory\n"
        )
    );
    both(&rig, &["pool-build", "p"]);
    let mode = fs::metadata(&target).unwrap().mode();
    assert_eq!(mode & 0o777, 0o711);
    rig.virsh(&["pool-start", "p"]).ok();
    assert!(both_refuse(&rig, &["pool-start", "p"]).contains("storage pool 'p' is already active"));
    both(&rig, &["pool-autostart", "p"]);
    assert_eq!(
        both(&rig, &["pool-list", "--all"]),
        " Name   State    Autostart\n----------------------------\n p      active   yes\n\n"
    );
    both(&rig, &["pool-list", "--details"]);
    both(&rig, &["pool-list", "--all", "--name"]);
    both(&rig, &["pool-list", "--type", "dir", "--uuid"]);
    both(&rig, &["pool-info", "p"]);
    both(&rig, &["pool-info", "p", "--bytes"]);
    let xml = both(&rig, &["pool-dumpxml", "p"]);
    assert_eq!(
        steady(&xml),
        format!(
            "<pool type='dir'>
  <name>p</name>
  <source>
  </source>
  <target>
    <path>{target}</path>
    <permissions>
      <mode>0711</mode>
      <owner>{}</owner>
      <group>{}</group>
    </permissions>
  </target>
</pool>

",
            fs::metadata(&target).unwrap().uid(),
            fs::metadata(&target).unwrap().gid(),
        )
    );
    both(&rig, &["pool-dumpxml", "p", "--inactive"]);
    let uuid = both(&rig, &["pool-uuid", "p"]);
    assert_eq!(both(&rig, &["pool-name", uuid.trim()]), "p\n\n");
    both(&rig, &["pool-refresh", "p"]);
    both(&rig, &["pool-capabilities"]);
    for word in ["pool-delete", "pool-undefine"] {
        assert!(both_refuse(&rig, &[word, "p"]).contains("storage pool 'p' is still active"));
    }
    fs::write(rig.path("p/v"), "x").unwrap();
    rig.virsh(&["pool-destroy", "p"]).ok();
    assert!(both_refuse(&rig, &["pool-destroy", "p"]).contains("'p' is not active"));
    assert!(both_refuse(&rig, &["vol-list", "p"]).contains("'p' is not active"));
    assert!(both_refuse(&rig, &["pool-delete", "p"]).contains("Directory not empty"));
    fs::remove_file(rig.path("p/v")).unwrap();
    rig.virsh(&["pool-delete", "p"]).ok();
    assert!(!Path::new(&target).exists());
    rig.vireo(&["pool-undefine", "p"]).ok();
    assert!(!rig.path("etc/vireo/storage/p.xml").exists());
    assert!(
        both_refuse(&rig, &["pool-info", "p"]).contains("no storage pool with matching name 'p'")
    );
}

#[test]
fn bad_pools_are_refused_in_libvirts_words() {
    if missing(&["virsh"]) {
        return;
    }
    let (rig, folder) = pool();
    let folder = folder.display().to_string();
    let other = rig.path("other").display().to_string();
    let as_ = |name: &str, kind: &str, more: &[&str]| {
        let mut args = vec!["pool-define-as", name, kind];
        args.extend(more);
        both_refuse(&rig, &args)
    };
    assert!(as_("x", "bogus", &[]).contains("Invalid value for attribute 'type'"));
    for kind in [
        "logical", "disk", "iscsi", "rbd", "zfs", "gluster", "scsi", "mpath",
    ] {
        let said = as_("x", kind, &["--target", &other]);
        assert!(said.contains(&format!("({kind})")), "{said}");
    }
    assert!(as_("y", "dir", &[]).contains("missing storage pool target path"));
    assert!(as_("y/z", "dir", &["--target", &other]).contains("cannot contain '/'"));
    assert!(as_("y", "dir", &["--target", "foo"]).contains("not absolute"));
    assert!(as_("p", "dir", &["--target", &other]).contains("pool 'p' already exists with uuid"));
    assert!(as_("q", "dir", &["--target", &folder]).contains("conflict with pool: 'p'"));
    assert!(as_("n", "netfs", &["--target", &other]).contains("source host name"));
    assert!(as_("f", "fs", &["--target", &other]).contains("source device name"));
    assert!(!rig.path("etc/vireo/storage/y.xml").exists());
    let strict = rig.write(
        "bad.xml",
        format!(
            "<pool type='dir'><name>b</name><bogus/><target><path>{other}</path></target></pool>"
        ),
    );
    assert!(both_refuse(&rig, &["pool-define", &strict, "--validate"]).contains("bogus"));
    assert!(both_refuse(&rig, &["pool-autostart", "p"]).contains("pool has no config file"));
    assert!(
        both_refuse(&rig, &["find-storage-pool-sources", "dir"])
            .contains("does not support source discovery")
    );
    assert!(
        both_refuse(&rig, &["find-storage-pool-sources", "netfs"])
            .contains("hostname must be specified")
    );
    // A transient pool that can't start leaves nothing.
    let gone = rig.vireo(&["pool-create-as", "t", "dir", "--target", "/nonexistent/x"]);
    assert!(gone.fails().contains("cannot open directory"));
    assert!(rig.vireo(&["pool-info", "t"]).fails().contains("not found"));
}

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

/// Something to be found again: every MiB says which it is, and every other one is a hole.
fn pattern(path: &Path, mebibytes: u64) {
    let file = File::create(path).unwrap();
    file.set_len(mebibytes << 20).unwrap();
    for n in (0..mebibytes).step_by(2) {
        file.write_all_at(format!("mebibyte {n}").as_bytes(), n << 20)
            .unwrap();
    }
}

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
    assert!(both_refuse(&rig, &["vol-clone", "a", "b", "p"]).contains("exists already"));
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

#[test]
fn pools_survive_the_daemon() {
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    for (name, words) in [("kept", "pool-define-as"), ("transient", "pool-create-as")] {
        let target = rig.path(name).display().to_string();
        fs::create_dir(&target).unwrap();
        rig.vireo(&[words, name, "dir", "--target", &target]).ok();
    }
    rig.vireo(&["pool-start", "kept"]).ok();
    rig.vireo(&["pool-autostart", "kept"]).ok();
    rig.vireo(&["vol-create-as", "kept", "v", "1M"]).ok();
    let before = rig.vireo(&["pool-list", "--all"]).ok();
    // SAFETY: kill(2) has no memory effects; the process is this test's child.
    unsafe { libc::kill(daemon.id() as i32, libc::SIGKILL) };
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    assert_eq!(rig.vireo(&["pool-list", "--all"]).ok(), before);
    let listed = rig.vireo(&["vol-list", "kept"]).ok();
    assert!(listed.contains(" v "), "{listed}");
    // One whose folder has gone meanwhile is not active any more.
    fs::remove_dir(rig.path("transient")).unwrap();
    // SAFETY: as above.
    unsafe { libc::kill(daemon.id() as i32, libc::SIGKILL) };
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    let deadline = Instant::now() + Duration::from_secs(30);
    while rig
        .vireo(&["pool-list", "--all", "--name"])
        .ok()
        .contains("transient")
    {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    // After the host's boot nothing is active but what starts with it.
    // SAFETY: as above.
    unsafe { libc::kill(daemon.id() as i32, libc::SIGKILL) };
    daemon.wait().unwrap();
    fs::remove_dir_all(rig.path("run")).unwrap();
    let mut daemon = rig.daemon();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !rig.vireo(&["pool-list", "--name"]).ok().contains("kept") {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

/// A file system whose server never answers; gone when it is dropped.
struct Silent {
    path: CString,
    _server: File,
}

impl Silent {
    fn mount(path: &Path) -> Option<Self> {
        let server = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .ok()?;
        let path = CString::new(path.to_str()?).ok()?;
        let options = CString::new(format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        ))
        .ok()?;
        // SAFETY: all strings are terminated and live here.
        let mounted = unsafe {
            libc::mount(
                c"vireo-test".as_ptr(),
                path.as_ptr(),
                c"fuse".as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        (mounted == 0).then_some(Self {
            path,
            _server: server,
        })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        // SAFETY: the string is terminated and lives here.
        unsafe { libc::umount2(self.path.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn a_pool_that_hangs_holds_up_nobody_else() {
    if !is_root() {
        return left_out("needs root and /dev/fuse");
    }
    let (rig, folder) = pool();
    let hanging = rig.path("hanging");
    fs::create_dir(&hanging).unwrap();
    fs::write(hanging.join("v"), "x").unwrap();
    let target = hanging.display().to_string();
    rig.vireo(&["pool-define-as", "h", "dir", "--target", &target])
        .ok();
    rig.vireo(&["pool-start", "h"]).ok();
    rig.vireo(&["vol-list", "h"]).ok();
    let Some(silent) = Silent::mount(&hanging) else {
        return left_out("needs root and /dev/fuse");
    };
    let mut waiting: Vec<_> = (0..12)
        .map(|n| {
            let args: &[&str] = match n % 3 {
                0 => &["pool-refresh", "h"],
                1 => &["vol-info", "v", "h"],
                _ => &["vol-create-as", "h", "new", "1M"],
            };
            rig.command("vireo").args(args).spawn().unwrap()
        })
        .collect();
    // Long enough for all of them to have arrived there.
    std::thread::sleep(Duration::from_millis(500));
    assert!(
        waiting.iter_mut().any(|c| c.try_wait().unwrap().is_none()),
        "it does hang"
    );
    rig.vireo(&["vol-create-as", "p", "v", "1M"]).ok();
    rig.vireo(&["vol-info", "v", "p"]).ok();
    rig.vireo(&["pool-refresh", "p"]).ok();
    assert!(folder.join("v").exists());
    let listed = rig.vireo(&["pool-list", "--all", "--details"]).ok();
    assert!(listed.contains(" h "), "{listed}");
    rig.vireo(&["vol-list", "h"]).ok();
    rig.vireo(&["pool-dumpxml", "h"]).ok();
    rig.vireo(&["vol-path", &format!("{}/v", folder.display())])
        .ok();
    rig.vireo(&["list", "--all"]).ok();
    drop(silent);
    for mut client in waiting {
        client.wait().unwrap();
    }
}

#[test]
fn a_volume_is_a_disk() {
    let (rig, folder) = pool();
    if missing(&["qemu-img"]) {
        return;
    }
    let image = |name: &str| folder.join(name).display().to_string();
    rig.vireo(&["vol-create-as", "p", "v", "4M", "--allocation", "0"])
        .ok();
    let guest = |pool: &str, volume: &str| {
        tiny_guest(&rig, "t", "qemu").replace(
            "</devices>",
            &format!(
                "<disk type='volume' device='disk'><driver name='qemu' type='raw'/>\
                 <source pool='{pool}' volume='{volume}'/><target dev='vda' bus='virtio'/></disk></devices>"
            ),
        )
    };
    for (pool, volume, words) in [
        ("nosuch", "v", "no storage pool with matching name 'nosuch'"),
        ("p", "nosuch", "no storage vol with matching name 'nosuch'"),
    ] {
        rig.define(&guest(pool, volume));
        let said = rig.vireo(&["start", "t"]).fails();
        assert!(said.contains(words), "{said}");
        rig.vireo(&["undefine", "t"]).ok();
    }
    rig.define(&guest("p", "v"));
    let info = rig.vireo(&["domblkinfo", "t", "vda"]).ok();
    assert!(info.contains("Capacity:       4194304"), "{info}");
    rig.vireo(&["start", "t"]).ok();
    let xml = rig.vireo(&["dumpxml", "t"]).ok();
    assert!(xml.contains("<source pool='p' volume='v'"), "{xml}");
    rig.vireo(&["destroy", "t"]).ok();

    // What a guest wrote into its raw disk is no reason to open another file for it.
    let precious = rig.write("precious", vec![7; 1 << 20]);
    program(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &precious,
            "-F",
            "raw",
            &image("x"),
            "1M",
        ],
    );
    let forged = fs::read(image("x")).unwrap();
    let file = File::options().write(true).open(image("v")).unwrap();
    file.write_all_at(&forged, 0).unwrap();
    rig.vireo(&["pool-refresh", "p"]).ok();
    rig.vireo(&["start", "t"]).ok();
    let xml = rig.vireo(&["dumpxml", "t"]).ok();
    assert!(xml.contains("<backingStore/>"), "{xml}");
    assert!(!xml.contains("precious"), "{xml}");
    let vmm = rig.processes("vireo-vmm");
    for pid in vmm {
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            assert_ne!(target, Path::new(&precious));
        }
    }
    // Nor is it resized or wiped while the guest runs.
    assert!(
        rig.vireo(&["vol-wipe", "v", "p"])
            .fails()
            .contains("in use")
    );
    rig.vireo(&["destroy", "t"]).ok();
    rig.vireo(&["pool-destroy", "p"]).ok();
    let said = rig.vireo(&["start", "t"]).fails();
    assert!(
        said.contains("no storage pool with matching name 'p'"),
        "{said}"
    );
}

#[test]
fn a_domain_goes_with_its_volumes() {
    let (rig, folder) = pool();
    let image = |name: &str| folder.join(name).display().to_string();
    let outside = rig.write("outside.img", "x");
    let guest = || {
        for name in ["v", "w"] {
            rig.vireo(&["vol-create-as", "p", name, "1M"]).ok();
        }
        let disks = format!(
            "<disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vda' bus='virtio'/></disk>\
             <disk type='file' device='disk'><source file='{}'/><target dev='vdb' bus='virtio'/></disk>\
             <disk type='file' device='disk'><source file='{outside}'/><target dev='vdc' bus='virtio'/></disk></devices>",
            image("w")
        );
        rig.define(&tiny_guest(&rig, "t", "qemu").replace("</devices>", &disks));
    };
    guest();
    let said = rig.vireo(&["undefine", "t", "--storage", "vdz"]).fails();
    assert!(
        said.contains("'vdz' was not found in domain's definition"),
        "{said}"
    );
    let said = rig
        .vireo(&["undefine", "t", "--storage", &format!("vda,{}", image("w"))])
        .ok();
    assert!(
        said.contains(&format!("Volume 'vda'({}) removed.", image("v"))),
        "{said}"
    );
    assert!(
        said.contains(&format!("Volume 'vdb'({}) removed.", image("w"))),
        "{said}"
    );
    assert!(!folder.join("v").exists() && !folder.join("w").exists());
    guest();
    let run = rig.vireo(&["undefine", "t", "--remove-all-storage", "--wipe-storage"]);
    assert!(
        run.err
            .contains("is not managed by libvirt. Remove it manually."),
        "{}",
        run.err
    );
    assert!(!folder.join("v").exists() && !folder.join("w").exists());
    assert!(Path::new(&outside).exists());
    if which("virsh") {
        guest();
        rig.virsh(&["undefine", "t", "--remove-all-storage"]).ok();
        assert!(!folder.join("v").exists() && !folder.join("w").exists());
    }
}

#[test]
fn what_happens_to_pools_is_told() {
    let rig = Rig::new();
    rig.vireo(&["pool-list"]).ok();
    let log = rig.path("events");
    let mut listener = rig
        .command("vireo")
        .args(["pool-event", "--loop", "--event", "lifecycle"])
        .stdout(File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let heard = || fs::read_to_string(&log).unwrap();
    let target = rig.path("p").display().to_string();
    let deadline = Instant::now() + Duration::from_secs(30);
    // Until it listens.
    while heard().is_empty() {
        assert!(Instant::now() < deadline);
        rig.vireo(&["pool-define-as", "first", "dir", "--target", "/nonexistent"])
            .ok();
        rig.vireo(&["pool-undefine", "first"]).ok();
    }
    rig.vireo(&["pool-define-as", "p", "dir", "--target", &target])
        .ok();
    for word in [
        "pool-build",
        "pool-start",
        "pool-destroy",
        "pool-delete",
        "pool-undefine",
    ] {
        rig.vireo(&[word, "p"]).ok();
    }
    let words = [
        "Defined",
        "Created",
        "Started",
        "Stopped",
        "Deleted",
        "Undefined",
    ];
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let text = heard();
        let of: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("pool 'p'") || line.contains("pool p"))
            .filter_map(|line| line.split_whitespace().last())
            .collect();
        if of == words {
            break;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::sleep(Duration::from_millis(20));
    }
    listener.kill().unwrap();
    listener.wait().unwrap();
}

#[test]
fn a_file_system_is_mounted_for_its_pool() {
    if !is_root() {
        return left_out("needs root and loop devices");
    }
    if missing(&["losetup", "mkfs.ext4", "mount"]) {
        return;
    }
    let rig = Rig::new();
    let image = rig.path("fs.img");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let attached: Run = Command::new("losetup")
        .args(["--find", "--show"])
        .arg(&image)
        .output()
        .unwrap()
        .into();
    if attached.status != 0 {
        return left_out("needs root and loop devices");
    }
    let device = attached.out.trim().to_owned();
    let detach = || program("losetup", &["--detach", &device]);
    let target = rig.path("mnt").display().to_string();
    rig.vireo(&[
        "pool-define-as",
        "f",
        "fs",
        "--source-dev",
        &device,
        "--source-format",
        "ext4",
        "--target",
        &target,
    ])
    .ok();
    let built = rig.vireo(&["pool-build", "f", "--no-overwrite"]);
    if built.status != 0 {
        detach();
        panic!("{}", built.err);
    }
    let again = rig.vireo(&["pool-build", "f", "--no-overwrite"]);
    let started = rig.vireo(&["pool-start", "f"]);
    let volume = rig.vireo(&["vol-create-as", "f", "v", "1M"]);
    let mounted = fs::read_to_string("/proc/self/mounts").unwrap();
    let stopped = rig.vireo(&["pool-destroy", "f"]);
    let after = fs::read_to_string("/proc/self/mounts").unwrap();
    detach();
    assert!(again.fails().contains("known already"));
    started.ok();
    volume.ok();
    stopped.ok();
    assert!(mounted.contains(&target));
    assert!(!after.contains(&target));
    assert!(!rig.path("mnt/v").exists());
}

#[test]
fn stock_programs_make_and_clone_guests() {
    if missing(&["virt-install", "virt-clone", "virsh", "qemu-img"]) {
        return;
    }
    let rig = Rig::new();
    // Clients of others do not start it.
    rig.vireo(&["list"]).ok();
    let kernel = rig.write("kernel", tiny_kernel());
    let uri = rig.uri();
    let install = |name: &str, disk: &str| -> Run {
        rig.stock("virt-install")
            .args([
                "--connect",
                &uri,
                "--name",
                name,
                "--memory",
                "64",
                "--import",
            ])
            .args([
                "--virt-type",
                "qemu",
                "--network",
                "none",
                "--graphics",
                "none",
            ])
            .args(["--noautoconsole", "--osinfo", "generic", "--disk", disk])
            .args(["--boot", &format!("kernel={kernel}")])
            .output()
            .unwrap()
            .into()
    };
    let images = rig.path("images");
    fs::create_dir(&images).unwrap();
    let path = images.join("one.qcow2").display().to_string();
    install(
        "one",
        &format!("path={path},size=0.01,format=qcow2,bus=virtio"),
    )
    .ok();
    program("qemu-img", &["check", "-q", "-U", &path]);
    let pools = rig.vireo(&["pool-list", "--all", "--name"]).ok();
    assert!(pools.contains("images"), "{pools}");
    let disks = rig.vireo(&["domblklist", "one"]).ok();
    assert!(disks.contains(&path), "{disks}");
    install("two", "pool=images,size=0.01,bus=virtio").ok();
    let existing = images.join("three.img").display().to_string();
    File::create(&existing).unwrap().set_len(1 << 20).unwrap();
    install("three", &format!("path={existing},bus=virtio")).ok();
    for name in ["one", "two", "three"] {
        rig.vireo(&["destroy", name]).ok();
    }
    program("qemu-io", &["-c", "write -P 9 0 64k", &path]);
    let clone: Run = rig
        .stock("virt-clone")
        .args([
            "--connect",
            &uri,
            "--original",
            "one",
            "--name",
            "four",
            "--auto-clone",
        ])
        .output()
        .unwrap()
        .into();
    clone.ok();
    let disks = rig.vireo(&["domblklist", "four"]).ok();
    let copy = images.join("four.qcow2").display().to_string();
    assert!(disks.contains(&copy), "{disks}");
    program("qemu-img", &["compare", "-q", &path, &copy]);
}

#[test]
fn libvirts_python_module_handles_storage() {
    if missing(&["python3"]) {
        return;
    }
    let has = Command::new("/usr/bin/python3")
        .args(["-c", "import libvirt"])
        .output();
    if !has.is_ok_and(|out| out.status.success()) {
        return left_out("needs python3-libvirt");
    }
    let (rig, folder) = pool();
    let code = r#"
import libvirt, sys
conn = libvirt.open(sys.argv[1])
pool = conn.storagePoolLookupByName("p")
assert pool.info()[0] == libvirt.VIR_STORAGE_POOL_RUNNING
vol = pool.createXML("<volume><name>v</name><capacity unit='MiB'>4</capacity><allocation>0</allocation></volume>", 0)
assert pool.listVolumes() == ["v"] and pool.numOfVolumes() == 1
assert conn.storageVolLookupByPath(vol.path()).name() == "v"
assert vol.storagePoolLookupByVolume().name() == "p"
stream = conn.newStream(0)
vol.upload(stream, 0, 0, 0)
data = bytes(range(256)) * 4096
stream.sendAll(lambda st, n, left: left.pop(0) if left else b"", [data[i:i + 65536] for i in range(0, len(data), 65536)])
stream.finish()
stream = conn.newStream(0)
vol.download(stream, 0, len(data), 0)
got = []
stream.recvAll(lambda st, chunk, got: got.append(chunk), got)
stream.finish()
assert b"".join(got) == data
stream = conn.newStream(0)
vol.download(stream, 0, 0, libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
parts = []
stream.sparseRecvAll(lambda st, chunk, p: p.append(len(chunk)), lambda st, n, p: p.append(-n), parts)
stream.finish()
assert sum(abs(n) for n in parts) == 4 << 20 and any(n < 0 for n in parts), parts
vol.resize(8 << 20, 0)
assert vol.info()[1] == 8 << 20
vol.wipe(0)
try:
    pool.createXML("<volume><name>v</name><capacity>1</capacity></volume>", 0)
    raise SystemExit("made twice")
except libvirt.libvirtError as e:
    assert e.get_error_code() == libvirt.VIR_ERR_STORAGE_VOL_EXIST, e
    assert e.get_error_domain() == libvirt.VIR_FROM_STORAGE
try:
    conn.storagePoolLookupByName("nosuch")
    raise SystemExit("found")
except libvirt.libvirtError as e:
    assert e.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_POOL
vol.delete(0)
try:
    conn.storageVolLookupByPath(sys.argv[2])
    raise SystemExit("found")
except libvirt.libvirtError as e:
    assert e.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_VOL
print("all is well")
"#;
    let run: Run = rig
        .stock("/usr/bin/python3")
        .args(["-c", code, &rig.uri(), folder.join("v").to_str().unwrap()])
        .output()
        .unwrap()
        .into();
    assert_eq!(run.clone().ok(), "all is well\n", "{}", run.err);
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

#[test]
fn a_network_file_system_is_mounted_for_its_pool() {
    if !is_root() {
        return left_out("needs root");
    }
    // There is no server here: what mounts is a stand-in that mounts memory by the same name.
    let rig = Rig::new();
    let script = |name: &str, text: &str| {
        let file = rig.write(&format!("bin/{name}"), format!("#!/bin/sh\n{text}\n"));
        program("chmod", &["+x", &file]);
    };
    script(
        "mount",
        "echo \"$@\" > \"$(dirname \"$0\")/../asked\"\n\
         [ -e \"$(dirname \"$0\")/../down\" ] && { echo 'mount.nfs: Connection refused' >&2; exit 32; }\n\
         exec /bin/mount -t tmpfs \"$5\" \"$6\"",
    );
    script(
        "showmount",
        "[ \"$3\" = server ] && printf '/exports/a b  *\\n/exports/c 192.0.2.0/24\\n'",
    );
    let path = format!(
        "{}:{}",
        rig.path("bin").display(),
        std::env::var("PATH").unwrap()
    );
    let vireo = |args: &[&str]| -> Run {
        rig.command("vireo")
            .env("PATH", &path)
            .args(args)
            .output()
            .unwrap()
            .into()
    };
    let target = rig.path("mnt").display().to_string();
    vireo(&[
        "pool-define-as",
        "n",
        "netfs",
        "--source-host",
        "server",
        "--source-path",
        "/exports/c",
        "--source-format",
        "nfs",
        "--source-protocol-ver",
        "4.2",
        "--target",
        &target,
    ])
    .ok();
    vireo(&["pool-build", "n"]).ok();
    fs::write(rig.path("down"), "").unwrap();
    let said = vireo(&["pool-start", "n"]).fails();
    assert!(
        said.contains("unexpected exit status 32: mount.nfs: Connection refused"),
        "{said}"
    );
    fs::remove_file(rig.path("down")).unwrap();
    vireo(&["pool-start", "n"]).ok();
    let asked = fs::read_to_string(rig.path("asked")).unwrap();
    assert_eq!(
        asked,
        format!("-o nodev,nosuid,noexec,nfsvers=4.2 -t nfs server:/exports/c {target}\n")
    );
    vireo(&["vol-create-as", "n", "v", "1M"]).ok();
    let mounted = || {
        fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains(&target)
    };
    assert!(mounted());
    // A pool whose file system somebody took away is stopped when that is seen.
    program("umount", &[&target]);
    let said = vireo(&["pool-refresh", "n"]).fails();
    assert!(said.contains("is not mounted"), "{said}");
    assert!(vireo(&["pool-info", "n"]).ok().contains("inactive"));
    vireo(&["pool-start", "n"]).ok();
    vireo(&["pool-destroy", "n"]).ok();
    assert!(!mounted());
    let sources = vireo(&["find-storage-pool-sources-as", "netfs", "server"]).ok();
    assert_eq!(
        sources,
        "<sources>
  <source>
    <host name='server'/>
    <dir path='/exports/a b'/>
    <format type='nfs'/>
  </source>
  <source>
    <host name='server'/>
    <dir path='/exports/c'/>
    <format type='nfs'/>
  </source>
</sources>

"
    );
    let said = vireo(&["find-storage-pool-sources-as", "netfs", "other"]).fails();
    assert!(
        said.contains("no storage pools were found on host 'other'"),
        "{said}"
    );
}
