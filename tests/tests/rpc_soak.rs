//! Random calls from several clients at once; then the daemon's view, its files and its processes must agree, also
//! after a `kill -9`. `make soak` does it for long.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rpc::args::*;
use rpc::client::{Client, ClientConfig, ClientError};
use rpc::frame::{Frame, Header};
use rpc::procs;
use rpc::types::Domain;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vireo_tests::{Rig, soak, tiny_guest};

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

async fn client(socket: &Path) -> Client {
    let client = Client::connect_unix(socket, ClientConfig::default())
        .await
        .unwrap();
    client.open(Some("vireo:///system"), false).await.unwrap();
    client
}

/// A call may fail, as others change the same domains; the connection must not.
fn calm<T>(result: Result<T, ClientError>) {
    match result {
        Ok(_) | Err(ClientError::Remote(_)) => {}
        Err(error) => panic!("{error}"),
    }
}

/// One client's calls.
async fn calls(socket: &Path, template: &str, seed: u64, count: u32) {
    let mut random = Random(seed | 1);
    let mut client = client(socket).await;
    for _ in 0..count {
        let name = NAMES[random.below(NAMES.len() as u64) as usize].to_owned();
        let found = client
            .call(
                procs::DOMAIN_LOOKUP_BY_NAME,
                &DomainLookupByNameArgs { name: name.clone() },
            )
            .await;
        let dom = match found {
            Ok(found) => found.dom,
            Err(ClientError::Remote(_)) => Domain::new(name.clone(), [7; 16], None),
            Err(error) => panic!("{error}"),
        };
        let flags = 0;
        match random.below(16) {
            0 | 1 => {
                let xml = template.replace("<name>x<", &format!("<name>{name}<"));
                calm(
                    client
                        .call(procs::DOMAIN_DEFINE_XML, &DomainDefineXmlArgs { xml })
                        .await,
                );
            }
            2 => {
                let xml_desc = template.replace("<name>x<", &format!("<name>{name}<"));
                let args = DomainCreateXmlArgs { xml_desc, flags };
                calm(client.call(procs::DOMAIN_CREATE_XML, &args).await);
            }
            3 => calm(
                client
                    .call(procs::DOMAIN_UNDEFINE, &DomainUndefineArgs { dom })
                    .await,
            ),
            4 | 5 => calm(
                client
                    .call(procs::DOMAIN_CREATE, &DomainCreateArgs { dom })
                    .await,
            ),
            6 => calm(
                client
                    .call(procs::DOMAIN_DESTROY, &DomainDestroyArgs { dom })
                    .await,
            ),
            7 => calm(
                client
                    .call(procs::DOMAIN_SUSPEND, &DomainSuspendArgs { dom })
                    .await,
            ),
            8 => calm(
                client
                    .call(procs::DOMAIN_RESUME, &DomainResumeArgs { dom })
                    .await,
            ),
            9 => {
                let autostart = random.below(2) as i32;
                let args = DomainSetAutostartArgs { dom, autostart };
                calm(client.call(procs::DOMAIN_SET_AUTOSTART, &args).await);
            }
            10 => {
                let args = DomainSetMetadataArgs {
                    dom,
                    metadata: Some(format!("{}", random.next())),
                    ..Default::default()
                };
                calm(client.call(procs::DOMAIN_SET_METADATA, &args).await);
            }
            11 => {
                let args = DomainGetXmlDescArgs { dom, flags };
                calm(client.call(procs::DOMAIN_GET_XML_DESC, &args).await);
            }
            12 => {
                let args = ConnectDomainEventCallbackRegisterAnyArgs {
                    event_id: random.below(30) as i32,
                    dom: (random.below(2) == 0).then_some(dom),
                };
                let registered = client
                    .call(procs::CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY, &args)
                    .await;
                calm(registered);
            }
            13 => {
                let args = ConnectListAllDomainsArgs {
                    need_results: 1,
                    flags: random.below(4) as u32,
                };
                calm(client.call(procs::CONNECT_LIST_ALL_DOMAINS, &args).await);
            }
            14 => {
                // Gone in the middle of a call.
                let args = DomainCreateArgs { dom };
                let call = client.call(procs::DOMAIN_CREATE, &args);
                let _ = tokio::time::timeout(Duration::from_micros(200), call).await;
                client = self::client(socket).await;
            }
            _ => {
                let args = DomainRebootArgs { dom, flags };
                calm(client.call(procs::DOMAIN_REBOOT, &args).await);
            }
        }
    }
    client.close().await.unwrap();
}

/// Arguments that make no sense for every procedure, where nothing can be changed.
async fn nonsense(socket: &Path, seed: u64, count: u32) {
    let mut random = Random(seed | 1);
    let mut left = count;
    while left > 0 {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        let mut bytes = Frame::raw(Header::call(procs::CONNECT_OPEN, 0), vec![0; 8])
            .to_wire()
            .unwrap();
        for serial in 1..20 {
            left = left.saturating_sub(1);
            let mut payload = Vec::new();
            for _ in 0..random.below(20) {
                let word = match random.below(4) {
                    0 | 1 => random.below(5) as u32,
                    2 => [u32::MAX, 0x7fff_ffff, 16_385, 0x6162_6300][random.below(4) as usize],
                    _ => random.next() as u32,
                };
                payload.extend(word.to_be_bytes());
            }
            let mut header = Header::call(procs::CONNECT_OPEN, serial);
            header.procedure = random.below(460) as i32;
            if header.procedure != procs::CONNECT_CLOSE.number() {
                bytes.extend(Frame::raw(header, payload).to_wire().unwrap());
            }
        }
        let goodbye = Frame::raw(Header::call(procs::CONNECT_CLOSE, 20), Vec::new());
        bytes.extend(goodbye.to_wire().unwrap());
        stream.write_all(&bytes).await.unwrap();
        let mut answers = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut answers));
        read.await.expect("the daemon hangs").unwrap();
        assert!(answers.len() >= 28, "no answer at all");
    }
}

/// What the daemon says: each domain's state, and whether it is kept.
fn view(rig: &Rig) -> BTreeMap<String, (bool, bool)> {
    let list = |flag: &str| -> BTreeSet<String> {
        let said = rig.vireo(&["list", "--all", "--name", flag]).ok();
        said.split_whitespace().map(str::to_owned).collect()
    };
    let (kept, live) = (list("--persistent"), {
        let said = rig.vireo(&["list", "--name"]).ok();
        said.split_whitespace()
            .map(str::to_owned)
            .collect::<BTreeSet<_>>()
    });
    kept.union(&live)
        .map(|name| (name.clone(), (kept.contains(name), live.contains(name))))
        .collect()
}

/// The daemon, the files and the processes agree.
fn agree(rig: &Rig) {
    // What was going on when the last client left may still be ending.
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let view = view(rig);
        let kept: BTreeSet<String> = view
            .iter()
            .filter(|(_, (kept, _))| *kept)
            .map(|(name, _)| name.clone())
            .collect();
        let files: BTreeSet<String> = fs::read_dir(rig.path("etc/vireo/domains"))
            .unwrap()
            .flatten()
            .filter_map(|entry| {
                let path = entry.path();
                let is_xml = path.is_file() && path.extension().is_some_and(|e| e == "xml");
                is_xml.then(|| path.file_stem()?.to_str().map(str::to_owned))?
            })
            .collect();
        let live = view.values().filter(|(_, live)| *live).count();
        let processes = rig.processes("vireo-vmm").len();
        if kept == files && live == processes {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "the daemon says {view:?}; files of {files:?}; {processes} processes"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The daemon, without children of its own that are about to become something else.
fn daemon(rig: &Rig) -> Vec<i32> {
    let mut all = rig.processes("vireod");
    let parent = |pid: &i32| -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // proc(5): the parent is the second field behind the name.
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    let children: Vec<i32> = all
        .iter()
        .filter(|pid| parent(pid).is_some_and(|parent| all.contains(&parent)))
        .copied()
        .collect();
    all.retain(|pid| !children.contains(pid));
    all
}

#[test]
fn random_calls_of_many_clients_leave_everything_in_agreement() {
    let seed = std::env::var("VIREO_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| {
        std::time::UNIX_EPOCH
            .elapsed()
            .map_or(1, |now| now.as_nanos() as u64)
    });
    println!("VIREO_SEED={seed}");
    let mut random = Random(seed | 1);
    let rig = Rig::new();
    let template = tiny_guest(&rig, "x", "qemu");
    rig.vireo(&["list"]).ok();
    let looking = rig.path("run/vireo/vireo-sock-ro");
    // `VIREO_SOAK=300` is for five minutes, `VIREO_SOAK=1` for as long as it ought to be.
    let wanted = std::env::var("VIREO_SOAK")
        .ok()
        .and_then(|s| s.parse().ok());
    let long = wanted.filter(|seconds| *seconds > 1).unwrap_or(1200);
    let end = Instant::now() + Duration::from_secs(if soak() { long } else { 0 });
    loop {
        let served_by = daemon(&rig);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let seeds: Vec<u64> = (0..5).map(|_| random.next()).collect();
        runtime.block_on(async {
            let socket = rig.socket();
            let work = async {
                tokio::join!(
                    calls(&socket, &template, seeds[0], 60),
                    calls(&socket, &template, seeds[1], 60),
                    calls(&socket, &template, seeds[2], 60),
                    calls(&socket, &template, seeds[3], 60),
                    nonsense(&looking, seeds[4], 400),
                )
            };
            tokio::time::timeout(Duration::from_secs(240), work)
                .await
                .expect("a call hangs");
        });
        assert_eq!(daemon(&rig), served_by, "the daemon is another one");
        agree(&rig);
        // The next daemon finds all of it again.
        let before = view(&rig);
        for pid in served_by {
            // SAFETY: kill has no memory effects; the pid is this rig's daemon.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        let gone = Instant::now() + Duration::from_secs(10);
        while !rig.processes("vireod").is_empty() && Instant::now() < gone {
            std::thread::sleep(Duration::from_millis(5));
        }
        let after = view(&rig);
        let persistent = |view: &BTreeMap<String, (bool, bool)>| -> Vec<_> {
            view.iter()
                .filter(|(_, (kept, live))| *kept || *live)
                .map(|(name, state)| (name.clone(), *state))
                .collect()
        };
        // Domains that were not running and are to be are started by the new daemon.
        for (name, (kept, live)) in persistent(&before) {
            let now = after.get(&name).copied();
            assert!(
                now.is_some_and(|(k, l)| k == kept && (l || !live)),
                "{name} was {:?} and is {now:?}",
                (kept, live)
            );
        }
        agree(&rig);
        if Instant::now() >= end {
            return;
        }
    }
}
