//! The stock virsh against our server.

mod common;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{Folder, serve_at};
use rpc::server::{Keepalive, ServerConfig, SocketAccess};

/// Runs virsh with a limit; `None` where it is not installed.
async fn virsh(socket: &Path, args: &[&str]) -> Option<Output> {
    let uri = format!("qemu+unix:///system?socket={}", socket.display());
    let mut command = Command::new("timeout");
    command
        .args(["20", "virsh", "-c", &uri])
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    tokio::task::spawn_blocking(move || {
        if Command::new("virsh").arg("--version").output().is_err() {
            println!("left out: needs virsh (Debian: libvirt-clients)");
            return None;
        }
        Some(command.output().unwrap())
    })
    .await
    .unwrap()
}

fn text(output: &Output) -> (String, String) {
    (
        String::from_utf8_lossy(&output.stdout).into(),
        String::from_utf8_lossy(&output.stderr).into(),
    )
}

#[tokio::test]
async fn virsh_lists_domains_and_shows_errors() {
    let folder = Folder::new("virsh");
    let socket = folder.0.join("sock");
    let _server = serve_at(&socket, SocketAccess::ReadWrite, ServerConfig::default());

    let Some(output) = virsh(&socket, &["list", "--all"]).await else {
        return;
    };
    let (out, err) = text(&output);
    assert!(output.status.success(), "{out}{err}");
    let rows: Vec<String> = out
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert!(rows.contains(&"7 running running".to_owned()), "{out}");
    assert!(rows.contains(&"- idle shut off".to_owned()), "{out}");

    let output = virsh(&socket, &["domstate", "nosuch"]).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let (_, err) = text(&output);
    assert!(
        err.contains("error: failed to get domain 'nosuch'"),
        "{err}"
    );

    let output = virsh(&socket, &["nodeinfo"]).await.unwrap();
    let (out, err) = text(&output);
    assert!(
        out.contains("CPU model:           x86_64") && out.contains("2097152 KiB"),
        "{out}{err}"
    );

    let output = virsh(&socket, &["start", "running"]).await.unwrap();
    let (_, err) = text(&output);
    assert!(err.contains("Domain is already active"), "{err}");

    // What nobody serves is "not supported", and the connection goes on.
    let output = virsh(&socket, &["capabilities; list --name"])
        .await
        .unwrap();
    let (out, err) = text(&output);
    assert!(err.contains("unknown procedure: 7"), "{err}");
    assert_eq!(out.trim(), "running");
}

#[tokio::test]
async fn virsh_on_a_read_only_socket_looks_but_touches_not() {
    let folder = Folder::new("virsh-ro");
    let socket = folder.0.join("sock");
    let _server = serve_at(&socket, SocketAccess::ReadOnly, ServerConfig::default());

    let Some(output) = virsh(&socket, &["domstate", "running"]).await else {
        return;
    };
    assert_eq!(text(&output).0.trim(), "running");
    let output = virsh(&socket, &["start", "idle"]).await.unwrap();
    let (_, err) = text(&output);
    assert!(
        err.contains("operation forbidden: read only access prevents virDomainCreate"),
        "{err}"
    );
}

#[tokio::test]
async fn virsh_waits_for_events_while_being_asked_whether_it_lives() {
    let folder = Folder::new("virsh-events");
    let socket = folder.0.join("sock");
    let keepalive = Keepalive {
        interval: Duration::from_millis(50),
        count: 10,
    };
    let config = ServerConfig {
        keepalive: Some(keepalive),
        ..Default::default()
    };
    let _server = serve_at(&socket, SocketAccess::ReadWrite, config);

    let Some(output) = virsh(&socket, &["event", "--all", "--timeout", "2"]).await else {
        return;
    };
    let (out, err) = text(&output);
    assert!(
        out.contains("event loop timed out") && out.contains("events received: 0"),
        "{out}{err}"
    );
}

/// virsh's console wants a terminal, which `script` (Debian: bsdutils, always installed) provides.
#[tokio::test]
async fn virsh_console_talks_to_a_stream_until_the_guest_ends_it() {
    use tokio::io::AsyncWriteExt;

    let folder = Folder::new("virsh-console");
    let socket = folder.0.join("sock");
    let _server = serve_at(&socket, SocketAccess::ReadWrite, ServerConfig::default());
    if virsh(&socket, &["quit"]).await.is_none() {
        return;
    }
    let line = format!(
        "virsh -c 'qemu+unix:///system?socket={}' console running",
        socket.display()
    );
    let log = folder.0.join("typed");
    let (mut keyboard, typed) = tokio::net::UnixStream::pair().unwrap();
    let typed = typed.into_std().unwrap();
    typed.set_nonblocking(false).unwrap();
    let typed = std::os::fd::OwnedFd::from(typed);
    let output = tokio::task::spawn_blocking(move || {
        let mut command = Command::new("timeout");
        command
            .args(["20", "script", "-qfec", &line])
            .arg(&log)
            .env("LC_ALL", "C");
        command
            .stdin(typed)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        std::fs::read(&log).unwrap()
    });
    // The guest's echo takes what comes in one piece as one line, so "bye" must come alone.
    let shown = |text: &str| {
        let path = folder.0.join("typed");
        let text = text.to_owned();
        async move {
            for _ in 0..1000 {
                if String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_default())
                    .contains(&text)
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!(
                "no {text:?} within 10 s: {:?}",
                std::fs::read_to_string(&path)
            );
        }
    };
    shown("hello from the guest").await;
    keyboard.write_all(b"one two three").await.unwrap();
    shown("one two three").await;
    keyboard.write_all(b"bye").await.unwrap();
    let output = String::from_utf8_lossy(&output.await.unwrap()).into_owned();
    assert!(output.contains("Connected to domain 'running'"), "{output}");
    assert!(!output.contains("error"), "{output}");
}
