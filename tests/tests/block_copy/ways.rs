//! Ways to ask for a copy, and what is refused.

use std::fs;
use std::path::Path;

use vireo_tests::{Rig, Run, left_out, which};

use super::*;

#[test]
fn what_is_there_is_used_and_what_can_not_be_is_refused() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    let (images, before) = tiny(&rig, "one", true);
    let path = |name: &str| rig.path(name).display().to_string();
    let virsh = |words: &[&str]| {
        let all = ["blockcopy", "one", "vda", "--transient-job"];
        rig.virsh(&[&all[..], words].concat())
    };
    // As the stock daemon says it.
    let there = rig.write("there", "something");
    let fifo = path("fifo");
    tool("mkfifo", &[&fifo]);
    let xml = |name: &str, text: &str| rig.write(&format!("{name}.xml"), text);
    let network = "<disk type='network'><source protocol='nbd' name='x'><host name='localhost'/></source></disk>";
    let behind = format!(
        "<disk type='file'><source file='/x'/><driver type='qcow2'/><backingStore type='file'>\
         <format type='raw'/><source file='{}'/></backingStore></disk>",
        images[0]
    );
    let secret = "0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f";
    let sealed = format!(
        "<disk type='file'><driver name='qemu' type='raw'/><source file='{}'><encryption format='luks'>\
         <secret type='passphrase' uuid='{secret}'/></encryption></source></disk>",
        path("sealed")
    );
    let sealed = xml("sealed", &sealed);
    let domain = xml("domain", "<domain/>");
    let none = xml("none", "<disk type='file'/>");
    let (network, behind) = (xml("network", network), xml("behind", &behind));
    let refused = [
        (
            vec!["--dest", &*there],
            "unsupported configuration: external destination file for disk vda already exists and is not a block device: ",
        ),
        (
            vec!["--dest", "/none/x"],
            "error: failed to create copy target: No such file or directory",
        ),
        (
            vec!["--dest", "/none/x", "--reuse-external"],
            "error: missing destination file for disk vda: /none/x: No such file or directory",
        ),
        (
            vec!["--dest", "/none/x", "--blockdev"],
            "error: missing destination file for disk vda: /none/x: No such file or directory",
        ),
        (
            vec!["--dest", "/dev/null", "--blockdev"],
            "invalid argument: blockdev flag requested for disk vda, but file '/dev/null' is not a block device",
        ),
        (vec!["--dest", &*fifo], "nor a block device"),
        (
            vec!["--dest", "/x", "--shallow", "--format", "raw"],
            "unsupported configuration: shallow copy of disk 'vda' into a raw file is not possible",
        ),
        (
            vec!["--dest", "/x", "--format", "foo"],
            "unsupported configuration: unknown driver format value 'foo'",
        ),
        (
            vec!["--dest", "/x", "--format", "vmdk"],
            "unsupported configuration: disk 'vda': format 'vmdk' of '/x'",
        ),
        (
            vec!["--dest", "/x", "--granularity", "3"],
            "invalid argument: granularity must be power of 2",
        ),
        (
            vec!["--dest", "/x", "--granularity", "256"],
            "Parameter 'granularity' expects a value in range [512B, 64MB]",
        ),
        (
            vec!["--xml", &*domain],
            "XML error: expecting root element of 'disk', not 'domain'",
        ),
        (
            vec!["--xml", &*none],
            "error: missing source information for device\n",
        ),
        (vec!["--xml", &*network], "source of type 'network'"),
        (
            vec!["--xml", &*behind],
            "invalid argument: backingStore of mirror without VIR_DOMAIN_BLOCK_COPY_SHALLOW doesn't make sense",
        ),
        (
            vec!["--xml", &*sealed],
            "Secret not found: no secret with matching uuid '0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f'",
        ),
        // Its own image, and what is behind it.
        (
            vec!["--dest", &*images[1], "--reuse-external"],
            "is in use by",
        ),
        (
            vec!["--dest", &*images[0], "--reuse-external", "--format", "raw"],
            "is in use by",
        ),
    ];
    for (words, why) in &refused {
        let error = virsh(words).fails();
        assert!(error.contains(why), "{words:?}: {error}");
        assert!(!Path::new("/x").exists(), "{words:?}");
    }
    let error = rig
        .virsh(&["blockcopy", "one", "vda", "--dest", "/x"])
        .fails();
    assert!(
        error.contains("Requested operation is not valid: domain is not transient"),
        "{error}"
    );
    let error = rig
        .virsh(&["blockcopy", "one", "vdz", "--dest", "/x"])
        .fails();
    assert!(
        error.contains("invalid argument: disk 'vdz' not found in domain"),
        "{error}"
    );

    // Of another size: it fails, and is told so.
    let small = path("small");
    qemu_img(&["create", "-q", "-f", "qcow2", &small, "1M"]);
    let run = virsh(&[
        "--dest",
        &small,
        "--reuse-external",
        "--format",
        "qcow2",
        "--wait",
    ]);
    assert!(run.out.contains("Copy failed"), "{run:?}");
    assert!(!element(&rig, "one", false).contains("mirror"));
    assert!(free(&small));
    // One that was there, with something in it and something behind it; its format is found out.
    let [_, used] = chain(&rig, "used");
    tool("qemu-io", &["-c", "write -P 0x99 0 20M", &used]);
    virsh(&["--dest", &used, "--reuse-external", "--pivot"]).ok();
    let now = element(&rig, "one", false);
    assert!(
        now.contains("type='qcow2'/><source file") && now.contains("<backingStore/><target"),
        "{now}"
    );
    answers(&rig, "one");
    // An encrypted one.
    let file = xml(
        "secret",
        &format!(
            "<secret><uuid>{secret}</uuid><usage type='volume'><volume>x</volume></usage></secret>"
        ),
    );
    rig.vireo(&["secret-define", &file]).ok();
    rig.vireo(&["secret-set-value", secret, "--base64", "c2VjcmV0"])
        .ok();
    virsh(&["--xml", &sealed, "--pivot"]).ok();
    let stored = element(&rig, "one", true);
    assert!(
        stored.contains(&format!("<secret type='passphrase' uuid='{secret}'/>")),
        "{stored}"
    );
    answers(&rig, "one");
    rig.vireo(&["destroy", "one"]).ok();
    // It is the disk's at its next start, and goes into a plain one.
    rig.vireo(&["start", "one"]).ok();
    let raw = path("raw");
    virsh(&["--dest", &raw, "--format", "raw", "--pivot"]).ok();
    rig.vireo(&["destroy", "one"]).ok();
    assert!(!element(&rig, "one", true).contains("encryption"));
    assert!(fs::read(&raw).unwrap() == before);
    assert!(content(&rig, &used) == before);
    let options = format!("driver=luks,key-secret=s,file.filename={}", path("sealed"));
    let plain = path("plain");
    qemu_img(&[
        "convert",
        "--object",
        "secret,id=s,data=secret",
        "--image-opts",
        &options,
        "-O",
        "raw",
        &plain,
    ]);
    assert!(fs::read(&plain).unwrap() == before);
}

#[test]
fn a_transient_domain_and_the_older_call() {
    if !prepared() {
        return;
    }
    if !which("python3") {
        return left_out("needs python3, and libvirt's library");
    }
    let rig = Rig::new();
    let (_, before) = tiny(&rig, "one", false);
    let program = rig.write("rebase.py", include_str!("../../clients/rebase.py"));
    let rebase = |base: &str, flags: u32, bandwidth: u64| -> String {
        let numbers = [flags.to_string(), bandwidth.to_string()];
        let mut python = rig.stock("python3");
        let python = python
            .args([&program, &rig.uri(), "one", "vda", base])
            .args(&numbers);
        let run: Run = python.output().unwrap().into();
        run.ok().trim().to_owned()
    };
    let dest = rig.path("dest").display().to_string();
    // VIR_DOMAIN_BLOCK_REBASE_COPY, _COPY_RAW, _RELATIVE, _BANDWIDTH_BYTES
    assert_eq!(
        rebase("relative", 8, 0),
        "8 invalid argument: absolute path must be used as block copy target"
    );
    assert_eq!(
        rebase(&dest, 8 | 16, 0),
        "74 argument unsupported: Relative backing during copy not supported yet"
    );
    assert_eq!(rebase(&dest, 8 | 4 | 64, 1), "0 no error");
    assert_eq!(
        rebase(&dest, 8, 0),
        "83 block copy still active: disk 'vda' already in active block job"
    );
    rig.virsh(&["blockjob", "one", "vda", "--bandwidth", "0"])
        .ok();
    waited("ready", || {
        element(&rig, "one", false).contains("ready='yes'")
    });
    rig.virsh(&["blockjob", "one", "vda", "--pivot"]).ok();
    let disk = element(&rig, "one", false);
    assert!(
        disk.contains(&format!("type='raw'/><source file='{dest}' index='3'/>")),
        "{disk}"
    );
    // While it stands still, too.
    rig.vireo(&["suspend", "one"]).ok();
    let more = rig.path("more").display().to_string();
    rig.virsh(&["blockcopy", "one", "vda", "--dest", &more, "--pivot"])
        .ok();
    assert!(rig.state("one").starts_with("paused"));
    rig.vireo(&["resume", "one"]).ok();
    answers(&rig, "one");
    rig.vireo(&["destroy", "one"]).ok();
    assert!(fs::read(&dest).unwrap() == before);
    assert!(fs::read(&more).unwrap() == before);
}

#[test]
fn both_clients_say_the_same_of_copies() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    tiny(&rig, "one", true);
    tiny(&rig, "two", true);
    let file = rig.write("x.xml", "<disk type='file'><source file='/none/x'/></disk>");
    let copy = rig.path("NAME.copy").display().to_string();
    let other = rig.path("NAME.other").display().to_string();
    let words = |text: &str| -> Vec<String> {
        let fill = |word: &str| match word {
            "COPY" => copy.clone(),
            "OTHER" => other.clone(),
            "FILE" => file.clone(),
            other => other.to_owned(),
        };
        text.split_whitespace().map(fill).collect()
    };
    for text in [
        "blockcopy NAME vda",
        "blockcopy NAME vda --dest COPY",
        "blockcopy NAME vda COPY --print-xml",
        "blockcopy NAME vda COPY --print-xml --format qcow2 --shallow",
        "blockcopy NAME vda COPY --print-xml --blockdev --format raw",
        "blockcopy NAME vda --xml FILE --print-xml",
        "blockcopy NAME vda --xml FILE --transient-job",
        "blockcopy NAME vda --xml FILE --dest COPY",
        "blockcopy NAME vda COPY --pivot --finish",
        "blockcopy NAME vda COPY --granularity 3",
        "blockcopy NAME vda COPY --timeout 0",
        "blockcopy NAME vda --dest COPY --bandwidth 99999999999999",
        "blockcopy NAME vda --dest COPY --bandwidth 18446744073709551615",
        "blockcopy NAME vdz --dest COPY --transient-job",
        "blockcopy NAME vda --dest COPY --transient-job --wait",
        "blockjob NAME vda --raw",
        "blockjob NAME vda --info",
        "blockcopy NAME vda --dest COPY --transient-job",
        "blockjob NAME vda --pivot",
        "blockcopy NAME vda --dest COPY --transient-job --reuse-external",
        "blockcopy NAME vda --dest OTHER --transient-job --finish",
        "blockjob NAME vda --abort",
        "blockcopy NAME vda --dest OTHER --transient-job --reuse-external --pivot --format qcow2",
        "blockcopy NAME vda --dest COPY --transient-job --reuse-external --bandwidth 1 --bytes",
        "blockjob NAME vda --info",
        "blockjob NAME vda --pivot",
        "blockjob NAME vda --async",
    ] {
        let with = |name: &str| -> Vec<String> {
            words(text)
                .iter()
                .map(|word| word.replace("NAME", name))
                .collect()
        };
        let (one, two) = (with("one"), with("two"));
        let one: Vec<&str> = one.iter().map(String::as_str).collect();
        let two: Vec<&str> = two.iter().map(String::as_str).collect();
        let (a, b) = (rig.vireo(&one), rig.virsh(&two));
        let alike = |text: &str| {
            text.replace("one", "NAME")
                .replace("two", "NAME")
                .replace("process ", "")
        };
        let words = |text: &str| {
            // Who holds it, and how far it is, may differ.
            let lines = text.lines().filter(|line| !line.contains("is in use by"));
            lines.map(alike).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(words(&a.out), words(&b.out), "{text}");
        assert_eq!(words(&a.err), words(&b.err), "{text}");
        assert_eq!(a.status, b.status, "{text}");
    }
    for name in ["one", "two"] {
        rig.vireo(&["destroy", name]).ok();
    }
}
