//! The daemon under many domains and clients, against libvirtd with virsh, both driven over the same protocol.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rpc::args::*;
use rpc::client::{Client, ClientConfig};
use rpc::procs;
use tokio::runtime::{Builder, Runtime};
use vireo_tests::{Kernel, Rig, linux_guest, tiny_guest};

use super::{Libvirt, report};

/// How many defines a client has on their way where it does not wait for each.
const AT_ONCE: usize = 32;

/// One of the two daemons.
struct Side<'a> {
    socket: PathBuf,
    uri: &'static str,
    /// Runs its own command-line client.
    command: Box<dyn Fn() -> Command + 'a>,
    xml: String,
}

fn runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

async fn open(socket: &Path, uri: &str) -> Client {
    let client = Client::connect_unix(socket, ClientConfig::default())
        .await
        .unwrap();
    client.open(Some(uri), false).await.unwrap();
    client
}

async fn list(client: &Client) -> usize {
    let args = ConnectListAllDomainsArgs {
        need_results: 1,
        flags: 3,
    };
    let answer = client.call(procs::CONNECT_LIST_ALL_DOMAINS, &args).await;
    answer.unwrap().domains.len()
}

impl Side<'_> {
    /// Seconds that the client takes for a command.
    fn run(&self, args: &[&str]) -> f64 {
        let began = Instant::now();
        let status = (self.command)()
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .stdin(Stdio::null())
            .status();
        assert!(status.is_ok_and(|status| status.success()), "{args:?}");
        began.elapsed().as_secs_f64()
    }

    /// Seconds that the command takes to define these files one after the other, on its one connection.
    fn define_files(&self, files: &[String]) -> f64 {
        let mut commands = String::new();
        for file in files {
            commands.push_str(&format!("define {file}\n"));
        }
        let began = Instant::now();
        let mut child = (self.command)()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || stdin.write_all(commands.as_bytes()));
        let output = child.wait_with_output().unwrap();
        let took = began.elapsed().as_secs_f64();
        writer.join().unwrap().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.matches(" defined from ").count(), files.len());
        took
    }

    /// Seconds to define domains number `from` to `to` on one connection, each before the next.
    ///
    /// The client has one thread, as stock clients have: it does not wait for another one of its own.
    fn define(&self, from: usize, to: usize) -> f64 {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let client = open(&self.socket, self.uri).await;
            let began = Instant::now();
            for number in from..to {
                let xml = self.xml.replace("NAME", &format!("d{number}"));
                let args = DomainDefineXmlArgs { xml };
                client.call(procs::DOMAIN_DEFINE_XML, &args).await.unwrap();
            }
            let took = began.elapsed().as_secs_f64();
            client.close().await.unwrap();
            took
        })
    }

    /// The same with `AT_ONCE` calls on their way at any time: each is answered when its definition is on the disk.
    fn define_together(&self, runtime: &Runtime, from: usize, to: usize) -> f64 {
        runtime.block_on(async {
            let client = open(&self.socket, self.uri).await;
            let next = Arc::new(AtomicUsize::new(from));
            let began = Instant::now();
            let callers: Vec<_> = (0..AT_ONCE)
                .map(|_| {
                    let (client, next) = (client.clone(), Arc::clone(&next));
                    let template = self.xml.clone();
                    tokio::spawn(async move {
                        loop {
                            let number = next.fetch_add(1, Ordering::Relaxed);
                            if number >= to {
                                break;
                            }
                            let xml = template.replace("NAME", &format!("d{number}"));
                            let args = DomainDefineXmlArgs { xml };
                            client.call(procs::DOMAIN_DEFINE_XML, &args).await.unwrap();
                        }
                    })
                })
                .collect();
            for caller in callers {
                caller.await.unwrap();
            }
            let took = began.elapsed().as_secs_f64();
            client.close().await.unwrap();
            took
        })
    }

    /// Seconds until 100 clients that come at once have each listed the domains.
    fn crowd(&self, runtime: &Runtime) -> f64 {
        runtime.block_on(async {
            let began = Instant::now();
            let clients: Vec<_> = (0..100)
                .map(|_| {
                    let (socket, uri) = (self.socket.clone(), self.uri);
                    tokio::spawn(async move {
                        let client = open(&socket, uri).await;
                        list(&client).await;
                        client.close().await.unwrap();
                    })
                })
                .collect();
            for client in clients {
                client.await.unwrap();
            }
            began.elapsed().as_secs_f64()
        })
    }

    fn start(&self, runtime: &Runtime, count: usize) -> usize {
        runtime.block_on(async {
            let client = open(&self.socket, self.uri).await;
            let mut started = 0;
            for number in 0..count {
                let args = DomainLookupByNameArgs {
                    name: format!("d{number}"),
                };
                let dom = client.call(procs::DOMAIN_LOOKUP_BY_NAME, &args).await;
                let dom = dom.unwrap().dom;
                // Paused, so that neither daemon waits for processors that guests keep busy.
                const START_PAUSED: u32 = 1;
                let args = DomainCreateWithFlagsArgs {
                    dom,
                    flags: START_PAUSED,
                };
                let answer = client.call(procs::DOMAIN_CREATE_WITH_FLAGS, &args).await;
                started += usize::from(answer.is_ok());
            }
            started
        })
    }

    /// Seconds from now until a list has so many domains.
    fn until(&self, runtime: &Runtime, domains: usize) -> f64 {
        runtime.block_on(async {
            let began = Instant::now();
            while began.elapsed() < Duration::from_secs(120) {
                if let Ok(client) =
                    Client::connect_unix(&self.socket, ClientConfig::default()).await
                    && client.open(Some(self.uri), false).await.is_ok()
                    && list(&client).await >= domains
                {
                    return began.elapsed().as_secs_f64();
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            f64::NAN
        })
    }
}

/// Seconds that so many appends of 2 KiB to a file that is allocated take, each synced: what no daemon does without.
fn appends(rig: &Rig, count: usize) -> f64 {
    let file = rig.write("appends", vec![0; count * 2048]);
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.sync_all().unwrap();
    let began = Instant::now();
    for number in 0..count as u64 {
        file.write_all_at(&[1; 2048], number * 2048).unwrap();
        file.sync_data().unwrap();
    }
    began.elapsed().as_secs_f64()
}

/// Resident MiB now.
fn resident(pid: u32) -> f64 {
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|kib| kib.split_whitespace().next()?.parse::<f64>().ok())
        .map_or(f64::NAN, |kib| kib / 1024.0)
}

fn stop(pid: u32) {
    // SAFETY: kill has no memory effects; the process is one that this bench started.
    unsafe { libc::kill(pid as i32, libc::SIGTERM) };
    let proc = PathBuf::from(format!("/proc/{pid}/stat"));
    let gone = || {
        let stat = std::fs::read_to_string(&proc).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while !gone() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// All of it. `VIREO_BENCH_DOMAINS` and `VIREO_BENCH_GUESTS` are how many there are at the end (10,000 and 100).
pub fn run(runs: usize) {
    println!("## The manager: many domains and clients");
    let number = |name: &str, default: usize| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    let most = number("VIREO_BENCH_DOMAINS", 10_000);
    let guests = number("VIREO_BENCH_GUESTS", 100);
    let (rig, theirs_rig) = (Rig::new(), Rig::new());
    let runtime = runtime();
    let mut ours_daemon = rig.daemon();
    let template = |xml: String| xml.replace("<name>x<", "<name>NAME<");
    let ours = Side {
        socket: rig.socket(),
        uri: "vireo:///system",
        command: Box::new(|| rig.command("vireo")),
        xml: template(tiny_guest(&rig, "x", "qemu")),
    };
    let mut peer = Libvirt::start(&theirs_rig, &linux_guest("bench", Kernel::V6_1));
    if let Some(peer) = &peer {
        let _ = peer.virsh().args(["undefine", "bench"]).output();
    }
    let sides = |peer: &Option<Libvirt>, folder: Option<PathBuf>| {
        peer.as_ref().zip(folder).map(|(_, folder)| Side {
            socket: folder.join("run/libvirt/libvirt-sock"),
            uri: "qemu:///session",
            command: {
                let folder = folder.clone();
                Box::new(move || {
                    let mut command = Libvirt::unprivileged(&folder, "virsh");
                    command.args(["-c", "qemu:///session"]);
                    command
                })
            },
            xml: ours.xml.clone(),
        })
    };
    let folder = peer.as_ref().map(|peer| peer.folder.clone());
    let theirs = sides(&peer, folder);
    const PEER: &str = "virsh + libvirtd";
    let both = |what: &str, times: usize, unit: (&str, f64), work: &dyn Fn(&Side<'_>) -> f64| {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for _ in 0..times {
            a.push(work(&ours));
            b.extend(theirs.as_ref().map(work));
        }
        report(what, unit.0, unit.1, a, PEER, b);
    };
    let ms = ("ms", 1e3);
    let idle = theirs.as_ref().zip(peer.as_ref());
    report(
        "resident, idle",
        "MiB",
        1.0,
        vec![resident(ours_daemon.id())],
        "libvirtd",
        idle.map(|(_, peer)| resident(peer.daemon.id()))
            .into_iter()
            .collect(),
    );
    both("connect and leave", runs * 4, ms, &|side| {
        side.run(&["quit"])
    });
    both("list, no domains", runs * 4, ms, &|side| {
        side.run(&["list", "--all"])
    });
    let thousand = most.min(1_000);
    both(
        &format!("{thousand} defines on one connection, one at a time"),
        1,
        ms,
        &|side| side.define(0, thousand),
    );
    report(
        &format!("of which the disk: {thousand} appends of 2 KiB, each synced"),
        "ms",
        1e3,
        vec![appends(&rig, thousand)],
        "",
        Vec::new(),
    );
    both(&format!("list, {thousand} domains"), runs, ms, &|side| {
        side.run(&["list", "--all"])
    });
    both("100 clients at once, each a list", runs, ms, &|side| {
        side.crowd(&runtime)
    });
    if most > thousand {
        let next = (2 * thousand).min(most);
        let what = format!(
            "{} defines on one connection, {AT_ONCE} calls in flight",
            next - thousand
        );
        both(&what, 1, ms, &|side| {
            side.define_together(&runtime, thousand, next)
        });
        both("the rest of the defines, one at a time", 1, ms, &|side| {
            side.define(next, most)
        });
        both(&format!("list, {most} domains"), runs.min(3), ms, &|side| {
            side.run(&["list", "--all"])
        });
    }
    both(
        "guests that could be started, paused",
        1,
        ("", 1.0),
        &|side| side.start(&runtime, guests) as f64,
    );
    report(
        &format!("resident, {most} domains, {guests} of them started"),
        "MiB",
        1.0,
        vec![resident(ours_daemon.id())],
        "libvirtd",
        peer.iter().map(|peer| resident(peer.daemon.id())).collect(),
    );
    // The daemons again, in turn, until they list them all.
    let (mut times, mut their_times) = (Vec::new(), Vec::new());
    for _ in 0..runs.min(3) {
        stop(ours_daemon.id());
        let _ = ours_daemon.wait();
        let mut command = rig.command("vireod");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let began = Instant::now();
        ours_daemon = command.spawn().unwrap();
        times.push(began.elapsed().as_secs_f64() + ours.until(&runtime, most));
        let (Some(peer), Some(side)) = (&mut peer, &theirs) else {
            continue;
        };
        stop(peer.daemon.id());
        let _ = peer.daemon.wait();
        let mut command = Libvirt::unprivileged(&peer.folder, "libvirtd");
        command.args(["-t", "600"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let began = Instant::now();
        if let Ok(daemon) = command.spawn() {
            peer.daemon = daemon;
            their_times.push(began.elapsed().as_secs_f64() + side.until(&runtime, most));
        }
    }
    report(
        &format!("restart with {most} definitions, {guests} started, to a whole list"),
        "ms",
        1e3,
        times,
        PEER,
        their_times,
    );
    report(
        &format!("resident after that, {most} domains, {guests} of them started"),
        "MiB",
        1.0,
        vec![resident(ours_daemon.id())],
        "libvirtd",
        peer.iter().map(|peer| resident(peer.daemon.id())).collect(),
    );
    let files: Vec<_> = (0..thousand)
        .map(|number| {
            rig.write(
                &format!("f{number}.xml"),
                ours.xml.replace("NAME", &format!("f{number}")),
            )
        })
        .collect();
    both(
        &format!("{thousand} defines by one run of the command, a file each"),
        1,
        ms,
        &|side| side.define_files(&files),
    );
    println!();
    if let Some(peer) = &peer {
        for number in 0..guests {
            let _ = peer
                .virsh()
                .args(["destroy", &format!("d{number}")])
                .output();
        }
    }
}
