//! Domains that run, with whatever stands in for the VMM.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::common::{Daemon, Root, connect, connect_to, define, lookup, names, refusal};
use rpc::args::{
    DomainCreateArgs, DomainDestroyArgs, DomainGetInfoArgs, DomainGetStateArgs,
    DomainShutdownFlagsArgs,
};
use rpc::procs;
use rpc::types::Domain;

/// A program in the VMM's place.
fn vmm(root: &Root, script: &str) -> String {
    let path = root.0.join("vmm");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

fn startable(root: &Root, kernel: &str, devices: &str) -> String {
    let path = root.0.join("kernel");
    fs::write(&path, "kernel").unwrap();
    let kernel = kernel.replace("KERNEL", &path.display().to_string());
    format!(
        "<domain type='qemu'><name>t</name><uuid>{}</uuid><memory unit='MiB'>16</memory>\
         <os><type>hvm</type>{kernel}</os><devices>{devices}</devices></domain>",
        uuid::Uuid::from_u128(7)
    )
}

const KERNEL: &str = "<kernel>KERNEL</kernel>";

/// Folders of running domains.
fn live(root: &Root) -> Vec<PathBuf> {
    let entries = fs::read_dir(root.0.join("run/vireo/domains")).unwrap();
    entries
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir())
        .collect()
}

async fn start(client: &rpc::client::Client, dom: Domain) -> (i32, i32, String) {
    refusal(
        client
            .call(procs::DOMAIN_CREATE, &DomainCreateArgs { dom })
            .await,
    )
}

#[tokio::test]
async fn a_failed_start_says_why_and_leaves_nothing_behind() {
    let root = Root::new();
    let program = vmm(
        &root,
        "echo something first >&2; echo the last word >&2; exit 1",
    );
    let _daemon = Daemon::start_with(&root, &[("VIREO_VMM", &program)]);
    let client = connect(&root).await;
    let socket = root.0.join("serial.sock");
    let serial = format!(
        "<serial type='unix'><source mode='bind' path='{}'/></serial>",
        socket.display()
    );
    let dom = define(&client, &startable(&root, KERNEL, &serial))
        .await
        .unwrap();
    let (code, domain, message) = start(&client, dom.clone()).await;
    assert_eq!((code, domain), (1, 10));
    assert!(message.ends_with(": the last word"), "{message}");
    assert!(live(&root).is_empty());
    assert!(!socket.exists());
    let args = DomainGetStateArgs { dom, flags: 0 };
    let state = client.call(procs::DOMAIN_GET_STATE, &args).await.unwrap();
    assert_eq!((state.state, state.reason), (5, 0));
}

#[tokio::test]
async fn what_cannot_start_is_refused_before_anything_is_made() {
    let root = Root::new();
    let program = vmm(&root, "exit 1");
    let _daemon = Daemon::start_with(&root, &[("VIREO_VMM", &program)]);
    let client = connect(&root).await;
    let missing = "<kernel>/nonexistent/kernel</kernel>";
    for (kernel, devices, code, words) in [
        (
            missing,
            "",
            38,
            "cannot open kernel '/nonexistent/kernel': No such file or directory",
        ),
        (
            "<loader readonly='yes' type='pflash'>/x.fd</loader>",
            "",
            67,
            "firmware in flash memory",
        ),
        (
            KERNEL,
            "<disk type='file'><source file='/x'/><target dev='vda' bus='virtio'/></disk>",
            38,
            "Cannot access storage file '/x': No such file or directory",
        ),
        (
            KERNEL,
            "<disk type='file'><source file='/x'/><target dev='sda' bus='usb'/></disk>",
            67,
            "sda",
        ),
    ] {
        let dom = define(&client, &startable(&root, kernel, devices))
            .await
            .unwrap();
        let error = start(&client, dom).await;
        assert_eq!(error.0, code, "{}", error.2);
        assert!(error.2.contains(words), "{}", error.2);
        assert!(live(&root).is_empty());
    }
}

#[tokio::test]
async fn a_start_cut_short_is_cleared_away() {
    for point in ["start.prepared", "start.spawned"] {
        let root = Root::new();
        // Holds on to its control socket and says nothing, so nobody learns that it runs.
        let program = vmm(&root, "exec sleep 600");
        let env = [("VIREO_VMM", program.as_str()), ("VIREO_KILL_AT", point)];
        let daemon = Daemon::start_with(&root, &env);
        let client = connect(&root).await;
        let dom = define(&client, &startable(&root, KERNEL, ""))
            .await
            .unwrap();
        let args = DomainCreateArgs { dom };
        client.call(procs::DOMAIN_CREATE, &args).await.unwrap_err();
        daemon.wait();
        let folder = &live(&root)[0];
        let pid = fs::read_to_string(folder.join("process")).ok();
        let pid = pid.and_then(|stat| Some(stat.split_once(' ')?.0.to_owned()));
        let _daemon = Daemon::start(&root);
        assert!(live(&root).is_empty(), "{point}");
        if let Some(pid) = pid {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            assert!(!stat.contains("(sleep) S"), "{point}: it runs on: {stat}");
        }
        let client = connect(&root).await;
        assert_eq!(names(&client).await, ["t"], "{point}");
    }
}

#[tokio::test]
async fn what_needs_a_running_domain_says_so() {
    let root = Root::new();
    let _daemon = Daemon::start(&root);
    let client = connect(&root).await;
    let dom = define(&client, &startable(&root, KERNEL, ""))
        .await
        .unwrap();
    let not_running = "Requested operation is not valid: domain is not running";
    let args = DomainDestroyArgs { dom: dom.clone() };
    let error = refusal(client.call(procs::DOMAIN_DESTROY, &args).await);
    assert_eq!(error, (55, 20, not_running.to_owned()));
    let args = DomainShutdownFlagsArgs {
        dom: dom.clone(),
        flags: 0,
    };
    let error = refusal(client.call(procs::DOMAIN_SHUTDOWN_FLAGS, &args).await);
    assert_eq!(error.2, not_running);
    for (flags, code, words) in [
        (2, 55, "domain is not running"),
        (
            8,
            8,
            "unsupported flags (0x8) in function qemuDomainShutdownFlags",
        ),
    ] {
        let args = DomainShutdownFlagsArgs {
            dom: dom.clone(),
            flags,
        };
        let error = refusal(client.call(procs::DOMAIN_SHUTDOWN_FLAGS, &args).await);
        assert_eq!(error.0, code);
        assert!(error.2.ends_with(words), "{}", error.2);
    }
}

#[tokio::test]
async fn the_read_only_socket_looks_and_does_not_touch() {
    let root = Root::new();
    let _daemon = Daemon::start(&root);
    let client = connect(&root).await;
    define(&client, &startable(&root, KERNEL, ""))
        .await
        .unwrap();
    let looking = connect_to(&root.0.join("run/vireo/vireo-sock-ro")).await;
    let dom = lookup(&looking, "t").await.unwrap();
    let args = DomainGetInfoArgs { dom: dom.clone() };
    let info = looking.call(procs::DOMAIN_GET_INFO, &args).await.unwrap();
    assert_eq!((info.state, info.max_mem), (5, 16 << 10));
    assert_eq!(start(&looking, dom).await.0, 29);
}
