//! Definitions, whatever happens to the daemon.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::{Daemon, Root, connect, define, definition, lookup, names, refusal, xml};
use rpc::args::{
    DomainGetXmlDescArgs, DomainRenameArgs, DomainSetAutostartArgs, DomainUndefineFlagsArgs,
};
use rpc::procs;

#[tokio::test]
async fn conflicts_and_unknown_names_get_libvirts_errors() {
    let root = Root::new();
    let _daemon = Daemon::start(&root);
    let client = connect(&root).await;
    define(&client, &definition("a", 1, "x")).await.unwrap();
    define(&client, &definition("a", 1, "y")).await.unwrap();
    let same_name = refusal(define(&client, &definition("a", 2, "x")).await);
    assert_eq!((same_name.0, same_name.1), (9, 20));
    assert_eq!(
        same_name.2,
        "operation failed: domain 'a' already exists with uuid 00000000-0000-0000-0000-000000000001"
    );
    let same_uuid = refusal(define(&client, &definition("b", 1, "x")).await);
    assert_eq!(
        same_uuid.2,
        "operation failed: domain 'a' is already defined with uuid \
         00000000-0000-0000-0000-000000000001"
    );
    let unknown = refusal(lookup(&client, "nosuch").await);
    assert_eq!(
        unknown,
        (
            42,
            10,
            "Domain not found: no domain with matching name 'nosuch'".to_owned()
        )
    );
    // VIR_ERR_XML_DETAIL and VIR_ERR_XML_ERROR, as libvirt tells the two apart.
    assert_eq!(refusal(define(&client, "<domain").await).0, 35);
    assert_eq!(refusal(define(&client, "<foo/>").await).0, 27);
    assert_eq!(names(&client).await, ["a"]);
}

#[tokio::test]
async fn definitions_survive_an_orderly_end_and_a_kill() {
    let root = Root::new();
    let daemon = Daemon::start(&root);
    let client = connect(&root).await;
    let dom = define(&client, &definition("a", 1, "first")).await.unwrap();
    let autostart = DomainSetAutostartArgs { dom, autostart: 1 };
    client
        .call(procs::DOMAIN_SET_AUTOSTART, &autostart)
        .await
        .unwrap();
    assert!(daemon.terminate().success());
    assert!(!root.socket().exists());
    let daemon = Daemon::start(&root);
    let client = connect(&root).await;
    let dom = lookup(&client, "a").await.unwrap();
    assert!(xml(&client, dom).await.contains("<title>first</title>"));
    assert!(
        root.domains()
            .join("autostart/a.xml")
            .symlink_metadata()
            .is_ok()
    );
    daemon.kill();
    let _daemon = Daemon::start(&root);
    let client = connect(&root).await;
    assert_eq!(names(&client).await, ["a"]);
}

/// What is in a folder, but for the journal.
fn names_below(folder: &std::path::Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".journal")
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_daemon_killed_at_any_point_of_a_write_keeps_what_it_has_promised() {
    for point in [
        "store.promised",
        "files.temp-made",
        "files.half-written",
        "files.temp-written",
        "files.renamed",
    ] {
        let root = Root::new();
        let daemon = Daemon::start(&root);
        define(&connect(&root).await, &definition("a", 1, "old"))
            .await
            .unwrap();
        // In an orderly way: nothing is left to be written when the next one starts.
        assert!(daemon.terminate().success());
        let daemon = Daemon::start_with(&root, &[("VIREO_KILL_AT", point)]);
        let client = connect(&root).await;
        let answer = define(&client, &definition("a", 1, "new")).await;
        // The file is written while the client is answered, or before.
        assert!(answer.is_err() || point != "store.promised", "{point}");
        daemon.wait();
        let _daemon = Daemon::start(&root);
        let client = connect(&root).await;
        let text = xml(&client, lookup(&client, "a").await.unwrap()).await;
        assert!(text.contains("<title>new</title>"), "{point}: {text}");
        let files = names_below(&root.domains());
        assert_eq!(files, ["a.xml", "autostart"], "{point}");
    }
}

#[tokio::test]
async fn a_daemon_killed_while_it_renames_or_removes_keeps_one_whole_domain_or_none() {
    for point in [
        "store.rename-linked",
        "store.rename-saved",
        "store.renamed",
        "store.link-removed",
        "store.removed",
    ] {
        let root = Root::new();
        let daemon = Daemon::start(&root);
        define(&connect(&root).await, &definition("old", 1, "x"))
            .await
            .unwrap();
        daemon.kill();
        let daemon = Daemon::start_with(&root, &[("VIREO_KILL_AT", point)]);
        let client = connect(&root).await;
        let dom = lookup(&client, "old").await.unwrap();
        if point.contains("rename") {
            let args = DomainRenameArgs {
                dom,
                new_name: Some("new".to_owned()),
                flags: 0,
            };
            client.call(procs::DOMAIN_RENAME, &args).await.unwrap_err();
        } else {
            let args = DomainUndefineFlagsArgs { dom, flags: 0 };
            client
                .call(procs::DOMAIN_UNDEFINE_FLAGS, &args)
                .await
                .unwrap_err();
        }
        daemon.wait();
        let _daemon = Daemon::start(&root);
        let expected: &[&str] = match point {
            "store.rename-linked" | "store.link-removed" => &["old"],
            "store.removed" => &[],
            _ => &["new"],
        };
        assert_eq!(names(&connect(&root).await).await, expected, "{point}");
    }
}

#[tokio::test]
async fn a_daemon_killed_at_random_loses_nothing_that_it_acknowledged() {
    let seed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .subsec_nanos();
    println!("seed {seed}");
    let mut random = u64::from(seed) | 1;
    let root = Root::new();
    let mut acknowledged = 0u32;
    for round in 0..20u32 {
        let daemon = Daemon::start(&root);
        let client = connect(&root).await;
        if round > 0 {
            let text = xml(&client, lookup(&client, "a").await.unwrap()).await;
            let title = text.split("<title>").nth(1).unwrap();
            let title: u32 = title.split('<').next().unwrap().parse().unwrap();
            assert!(title >= acknowledged, "{title} after {acknowledged}");
        }
        let first = acknowledged + 1;
        define(&client, &definition("a", 1, &first.to_string()))
            .await
            .unwrap();
        acknowledged = first;
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(random % 20_000));
            daemon.kill();
        });
        while define(
            &client,
            &definition("a", 1, &(acknowledged + 1).to_string()),
        )
        .await
        .is_ok()
        {
            acknowledged += 1;
        }
        killer.join().unwrap();
    }
}

#[tokio::test]
async fn damaged_files_are_left_out_and_left_alone() {
    let root = Root::new();
    fs::create_dir_all(root.domains()).unwrap();
    fs::write(root.domains().join("bad.xml"), "<domain").unwrap();
    fs::write(root.domains().join("good.xml"), definition("good", 1, "x")).unwrap();
    let _daemon = Daemon::start(&root);
    assert_eq!(names(&connect(&root).await).await, ["good"]);
    assert_eq!(
        fs::read_to_string(root.domains().join("bad.xml")).unwrap(),
        "<domain"
    );
    let log = fs::read_to_string(root.0.join("var/log/vireo/vireod.log")).unwrap();
    assert!(log.contains("bad.xml: left out"), "{log}");
}

/// A daemon trusts the sum that is above a definition; what a hand has changed it reads in full.
#[tokio::test]
async fn what_was_stored_is_read_when_it_is_used_and_what_was_changed_by_hand_at_once() {
    let root = Root::new();
    let daemon = Daemon::start(&root);
    let client = connect(&root).await;
    for (name, number) in [("kept", 1), ("changed", 2), ("later", 3)] {
        define(&client, &definition(name, number, "first"))
            .await
            .unwrap();
    }
    // An orderly end: all files are written.
    assert!(daemon.terminate().success());
    let edit = |name: &str, change: &dyn Fn(String) -> String| {
        let path = root.domains().join(name);
        fs::write(&path, change(fs::read_to_string(&path).unwrap())).unwrap();
    };
    edit("changed.xml", &|text| text.replace("first", "by hand"));
    // As if another version had stored what this one does not understand.
    edit("later.xml", &|text| {
        let (header, xml) = text.split_once("-->\n\n").unwrap();
        let xml = xml.replace("<memory unit='KiB'>", "<memory unit='of tomorrow'>");
        let (words, _) = header.rsplit_once(' ').unwrap();
        let (words, _) = words.rsplit_once(' ').unwrap();
        format!(
            "{words} {:08x} -->\n\n{xml}",
            crc32c::crc32c(xml.as_bytes())
        )
    });
    let _daemon = Daemon::start(&root);
    let client = connect(&root).await;
    assert_eq!(names(&client).await, ["changed", "kept", "later"]);
    for (name, title) in [("kept", "first"), ("changed", "by hand")] {
        let text = xml(&client, lookup(&client, name).await.unwrap()).await;
        assert!(text.contains(&format!("<title>{title}</title>")), "{text}");
    }
    let dom = lookup(&client, "later").await.unwrap();
    let asked = DomainGetXmlDescArgs { dom, flags: 0 };
    let error = refusal(client.call(procs::DOMAIN_GET_XML_DESC, &asked).await);
    let words = "the stored definition of domain 'later' cannot be read";
    assert!(error.2.contains(words), "{}", error.2);
    let log = fs::read_to_string(root.0.join("var/log/vireo/vireod.log")).unwrap();
    assert!(log.contains(words), "{log}");
    // It is there to be defined anew.
    define(&client, &definition("later", 3, "again"))
        .await
        .unwrap();
    let text = xml(&client, lookup(&client, "later").await.unwrap()).await;
    assert!(text.contains("<title>again</title>"), "{text}");
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_is_an_error_and_changes_nothing() {
    let root = Root::new();
    let _daemon = Daemon::start(&root);
    let client = connect(&root).await;
    // As good as a full disk, and possible without one, even for the superuser.
    fs::create_dir(root.domains().join("a.xml")).unwrap();
    let error = refusal(define(&client, &definition("a", 1, "x")).await);
    assert_eq!(error.0, 38, "{}", error.2);
    assert!(error.2.starts_with("cannot write '"), "{}", error.2);
    assert!(names(&client).await.is_empty());
    assert_eq!(names_below(&root.domains()), ["a.xml", "autostart"]);
}

#[tokio::test]
async fn one_daemon_a_root() {
    let root = Root::new();
    let _daemon = Daemon::start(&root);
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_vireod"))
        .arg("--root")
        .arg(&root.0)
        .output()
        .unwrap();
    assert!(!second.status.success());
    let text = String::from_utf8_lossy(&second.stderr);
    assert!(text.contains("another vireod (process "), "{text}");
    // The first one still serves.
    assert!(names(&connect(&root).await).await.is_empty());
}
