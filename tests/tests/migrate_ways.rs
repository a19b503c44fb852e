//! Ways that a migration takes: ssh between the two daemons, and disks that are encrypted.

use vireo_tests::moves::{answers, daemon, is_there};
use vireo_tests::sshd::Sshd;
use vireo_tests::{Rig, Run, left_out, tiny_guest, which};

fn place(rig: &Rig) -> String {
    format!("unix://{}", rig.path("incoming").display())
}

#[test]
fn one_daemon_reaches_the_other_through_ssh() {
    let (here, there) = (Rig::new(), Rig::new());
    let Some(sshd) = Sshd::start(&there) else {
        return;
    };
    let _daemons = [daemon(&here, None), daemon(&there, None)];
    here.define(&tiny_guest(&here, "tiny", "qemu"));
    here.vireo(&["start", "tiny"]).ok();
    answers(&here, "tiny");
    let known = here.write("known", "");
    let key = sshd.key.display();
    let uri = |options: &str| {
        let port = sshd.port;
        format!("qemu+ssh://root@127.0.0.1:{port}/system?known_hosts={known}{options}")
    };
    let at = place(&there);
    let moves = |from: &Rig, uri: &str, at: &str| {
        let args = [
            "migrate",
            "--live",
            "--p2p",
            "tiny",
            uri,
            "--migrateuri",
            at,
        ];
        from.vireo(&args)
    };
    let refused = |options: &str, words: &str| {
        let said = moves(&here, &uri(options), &at).fails();
        assert!(said.contains(words), "{options}: {said}");
        assert!(here.state("tiny").starts_with("running"));
        assert!(!is_there(&there));
    };
    // Nobody is asked whether a host is to be trusted, or for a password.
    let with_key = format!("&keyfile={key}");
    refused(&with_key, "Host key verification failed");
    refused("&no_verify=1&keyfile=/dev/null", "Permission denied");
    let trusting = format!("{with_key}&no_verify=1");
    refused(
        &format!("{trusting}&command=/bin/sh"),
        "no other command than ssh",
    );
    refused(&format!("{trusting}&socket=/nowhere"), "/nowhere");
    let nobody = format!("qemu+ssh://root@127.0.0.1:1/system?known_hosts={known}");
    let said = moves(&here, &nobody, &at).fails();
    assert!(said.contains("Connection refused"), "{said}");
    let told = here
        .vireo(&["domjobinfo", "tiny", "--completed", "--rawstats"])
        .ok();
    assert!(told.contains("Connection refused"), "{told}");
    moves(&here, &uri(&trusting), &at).ok();
    answers(&there, "tiny");
    assert!(!is_there(&here));
    // And back, with netcat on the far side.
    if !which("nc") {
        return left_out("ssh with netcat needs nc");
    }
    let Some(back) = Sshd::start(&here) else {
        return;
    };
    let (key, socket) = (back.key.display(), here.socket());
    let uri = format!(
        "qemu+ssh://root@127.0.0.1:{}/system?keyfile={key}&known_hosts=/dev/null&no_verify=1\
         &proxy=netcat&socket={}",
        back.port,
        socket.display()
    );
    moves(&there, &uri, &place(&here)).ok();
    answers(&here, "tiny");
    assert!(!is_there(&there));
}

const SECRET: &str = "3f8f2a10-0f6c-4f0c-9a6e-6f1d3f6f0a53";

/// A pool of its own, and a secret, if it has this value here.
fn prepared(rig: &Rig, value: Option<&str>) {
    let folder = rig.path("images");
    std::fs::create_dir_all(&folder).unwrap();
    let folder = folder.display().to_string();
    rig.vireo(&["pool-define-as", "p", "dir", "--target", &folder])
        .ok();
    rig.vireo(&["pool-start", "p"]).ok();
    if let Some(value) = value {
        secret(rig, value);
    }
}

fn secret(rig: &Rig, value: &str) {
    let secret = rig.write(
        "secret.xml",
        format!(
            "<secret><uuid>{SECRET}</uuid><usage type='volume'><volume>/x</volume></usage></secret>"
        ),
    );
    rig.vireo(&["secret-define", &secret]).ok();
    let file = rig.write("value", value);
    rig.vireo(&["secret-set-value", SECRET, "--file", &file, "--plain"])
        .ok();
}

/// What a volume holds, opened with this passphrase.
fn content(rig: &Rig, name: &str, format: &str, passphrase: &str) -> Run {
    let path = rig.path("images").join(name);
    let key = match format {
        "raw" => "driver=luks,key-secret=s",
        _ => "driver=qcow2,encrypt.key-secret=s",
    };
    let options = format!("{key},file.filename={}", path.display());
    let object = format!("secret,id=s,data={passphrase}");
    let out = rig.path("content").display().to_string();
    let convert = [
        "image",
        "convert",
        "--object",
        &object,
        "--image-opts",
        &options,
    ];
    rig.vireo(&[&convert[..], &["-O", "raw", &out]].concat())
}

#[test]
fn encrypted_disks_go_along_and_are_encrypted_there() {
    let bytes: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
    for format in ["raw", "qcow2"] {
        let (here, there) = (Rig::new(), Rig::new());
        let _daemons = [daemon(&here, None), daemon(&there, None)];
        prepared(&here, Some("ours"));
        prepared(&there, None);
        let encryption = format!(
            "<encryption format='luks'><secret type='passphrase' uuid='{SECRET}'/></encryption>"
        );
        let volume = here.write(
            "v.xml",
            format!(
                "<volume><name>v</name><capacity unit='MiB'>1</capacity><target><format type='{format}'/>\
                 {encryption}</target></volume>"
            ),
        );
        here.vireo(&["vol-create", "p", &volume]).ok();
        let plain = here.write("plain", &bytes);
        let path = here.path("images/v").display().to_string();
        let key = match format {
            "raw" => "driver=luks,key-secret=s",
            _ => "driver=qcow2,encrypt.key-secret=s",
        };
        let target = format!("{key},file.filename={path}");
        let object = "secret,id=s,data=ours";
        here.vireo(&[
            "image",
            "convert",
            "-n",
            "-f",
            "raw",
            "--object",
            object,
            "--target-image-opts",
            &plain,
            &target,
        ])
        .ok();
        let device = format!(
            "<disk type='volume' device='disk'><driver name='qemu' type='{format}'/><source pool='p' volume='v'>\
             {encryption}</source><target dev='vda' bus='virtio'/></disk><console"
        );
        here.define(&tiny_guest(&here, "tiny", "qemu").replace("<console", &device));
        here.vireo(&["start", "tiny"]).ok();
        answers(&here, "tiny");
        let (uri, at) = (there.uri(), place(&there));
        let args = [
            "migrate",
            "--live",
            "--copy-storage-all",
            "tiny",
            &uri,
            "--migrateuri",
            &at,
        ];
        // The target has no such secret.
        let said = here.vireo(&args).fails();
        assert!(said.contains("secret"), "{format}: {said}");
        assert!(here.state("tiny").starts_with("running"));
        assert!(!is_there(&there));
        assert!(!there.path("images/v").exists(), "{format}");
        // It has one, of another value: what is made there opens with that.
        secret(&there, "theirs");
        here.vireo(&args).ok();
        answers(&there, "tiny");
        there.vireo(&["destroy", "tiny"]).ok();
        assert_ne!(content(&there, "v", format, "ours").status, 0, "{format}");
        content(&there, "v", format, "theirs").ok();
        assert!(
            std::fs::read(there.path("content")).unwrap() == bytes,
            "{format}"
        );
        // One that is there already, and does not open with what the target has.
        std::fs::copy(here.path("images/v"), there.path("images/v")).unwrap();
        here.vireo(&["start", "tiny"]).ok();
        let said = here.vireo(&args).fails();
        assert!(
            said.contains("passphrase") || said.contains("password"),
            "{format}: {said}"
        );
        assert!(here.state("tiny").starts_with("running"));
        assert!(!is_there(&there));
        answers(&here, "tiny");
    }
}

/// What a client would have the guest be at the target is what it is: libvirt's words for what is not.
#[test]
fn a_definition_of_another_machine_is_refused() {
    let (here, there) = (Rig::new(), Rig::new());
    let _daemons = [daemon(&here, None), daemon(&there, None)];
    let cpu = "<cpu mode='custom' match='exact'><model>Nehalem</model>\
               <feature policy='disable' name='vmx'/><feature policy='disable' name='sse4.2'/></cpu>";
    let xml = tiny_guest(&here, "tiny", "qemu");
    here.define(&xml.replace("</os>", &format!("</os>{cpu}")));
    here.vireo(&["start", "tiny"]).ok();
    answers(&here, "tiny");
    let own = here.vireo(&["dumpxml", "--migratable", "tiny"]).ok();
    let (uri, at) = (there.uri(), place(&there));
    let moves = |xml: &str, p2p: bool| {
        let file = here.write("given.xml", xml);
        let mut args = vec!["migrate", "--live", "tiny", &uri, "--migrateuri", &at];
        args.extend(["--xml", &file]);
        if p2p {
            args.push("--p2p");
        }
        here.vireo(&args)
    };
    let feature = |name: &str| {
        let at = own.find(name).unwrap();
        let (start, end) = (own[..at].rfind("<feature").unwrap(), own[at..].find("/>"));
        own[start..at + end.unwrap() + 2].to_owned()
    };
    for (from, to, words) in [
        (
            "type='qemu'",
            "type='kvm'",
            "Target domain virt type kvm does not match source qemu",
        ),
        (
            "Nehalem",
            "Westmere",
            "Target CPU model Westmere does not match source Nehalem",
        ),
        (
            "sse4.2",
            "sse4.1",
            "Target CPU feature sse4.1 does not match source sse4.2",
        ),
        (
            &feature("vmx"),
            "",
            "Target CPU feature count 1 does not match source 2",
        ),
        (
            &feature("vmx"),
            "<feature policy='force' name='vmx'/>",
            "Target CPU feature policy force does not match source disable",
        ),
    ] {
        let given = own.replacen(from, to, 1);
        assert_ne!(given, own, "{words}");
        for p2p in [false, true] {
            let said = moves(&given, p2p).fails();
            assert!(said.contains("unsupported configuration: "), "{said}");
            assert!(said.contains(words), "{said}");
        }
    }
    answers(&here, "tiny");
    assert!(!is_there(&there));
    moves(&own, false).ok();
    answers(&there, "tiny");
}
