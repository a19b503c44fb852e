//! A process that writes through the engine is killed: what it was told is durable is there, and
//! the image is whole.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use images::chain::{self, Format, ImageConfig};
use images::engine::{Aio, Cache, Engine, Op, Options, Queue, Request};
use images::iovec::AlignedBuf;
use images::{File, Image};

const BLOCK: u64 = 8192;
const BLOCKS: u64 = 2048;
const LIMIT: Duration = Duration::from_secs(60);

/// What the child is told by its environment: image, format, "direct" or not, seed.
const TOLD: &str = "VIREO_KILL_TEST";

fn open(path: &Path, format: Format, direct: bool) -> Arc<dyn Image> {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(path)
        .unwrap();
    let file = File::new(OwnedFd::from(file), "disk").unwrap();
    chain::open(ImageConfig::new(format, file)).unwrap()
}

/// splitmix64 of a round's `i`th choice.
fn choice(seed: u64, round: u64, i: u64) -> u64 {
    let mut z = seed
        .wrapping_add(round.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .wrapping_add(i.wrapping_mul(0xd1b5_4a32_d192_ed03));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a round does to which blocks: the value they have then, 0 for zeroes.
fn round(seed: u64, round: u64) -> HashMap<u64, u64> {
    (0..1 + choice(seed, round, 99) % 24)
        .map(|i| {
            let what = choice(seed, round, i);
            let value = if what >> 60 == 0 {
                0
            } else {
                (round << 16) | (i + 1)
            };
            (what % BLOCKS, value)
        })
        .collect()
}

fn wait(queue: &mut Queue) {
    let mut done = Vec::new();
    assert!(queue.drain(LIMIT, &mut done));
    for completion in done {
        completion.result.unwrap();
    }
}

/// The process that is killed.
#[test]
#[ignore = "the other test's child"]
fn child() {
    let Ok(told) = std::env::var(TOLD) else {
        return;
    };
    let told: Vec<&str> = told.split(',').collect();
    let [path, format, direct, seed] = told[..] else {
        panic!("{told:?}");
    };
    let direct = direct == "direct";
    let image = open(Path::new(path), Format::from_name(format).unwrap(), direct);
    let options = Options {
        cache: if direct {
            Cache::None
        } else {
            Cache::Writeback
        },
        aio: if direct { Aio::Ring } else { Aio::Threads },
        discard: true,
        ..Options::default()
    };
    let seed = seed.parse().unwrap();
    let mut queue = Engine::new(image, options).queue(Arc::new(())).unwrap();
    let mut memory = AlignedBuf::new(BLOCK as usize * 32).unwrap();
    for number in 1_u64.. {
        for (slot, (block, value)) in round(seed, number).into_iter().enumerate() {
            let start = slot * BLOCK as usize;
            let bytes = &mut memory[start..start + BLOCK as usize];
            for word in bytes.chunks_exact_mut(8) {
                word.copy_from_slice(&value.to_le_bytes());
            }
            let io = memory.io(usize::MAX).part(start, BLOCK as usize);
            queue.submit(Request {
                op: match value {
                    0 => Op::WriteZeroes { unmap: true },
                    _ => Op::Write,
                },
                offset: block * BLOCK,
                len: if value == 0 { BLOCK } else { 0 },
                bufs: if value == 0 { Vec::new() } else { vec![io] },
                token: block,
            });
        }
        wait(&mut queue);
        queue.submit(Request {
            op: Op::Flush,
            offset: 0,
            len: 0,
            bufs: Vec::new(),
            token: 0,
        });
        wait(&mut queue);
        let mut out = std::io::stdout().lock();
        writeln!(out, "\nflushed {number}").unwrap();
        out.flush().unwrap();
    }
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn qemu_img(args: &[&str], path: &Path) -> Option<i32> {
    let status = Command::new("qemu-img")
        .args(args)
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status();
    status.unwrap().code()
}

/// Starts the child, lets it do `rounds` and a little more, kills it; the last round it has said
/// is durable.
fn run_and_kill(path: &Path, format: &str, direct: bool, seed: u64, rounds: u64) -> u64 {
    let direct = if direct { "direct" } else { "cached" };
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(TOLD, format!("{},{format},{direct},{seed}", path.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut last = 0;
    let mut killed = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(number) = line.strip_prefix("flushed ") {
            last = number.parse().unwrap();
        }
        if last >= rounds && !killed {
            // Somewhere in a later round, never at the same place.
            std::thread::sleep(Duration::from_micros(choice(seed, last, 7) % 3000));
            child.kill().unwrap();
            killed = true;
        }
    }
    child.wait().unwrap();
    assert!(killed, "the child ended by itself after round {last}");
    last
}

#[test]
fn what_was_flushed_survives_a_kill() {
    if !std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|folder| folder.join("qemu-img").is_file())
    {
        eprintln!("left out: what_was_flushed_survives_a_kill needs qemu-utils");
        return;
    }
    let seed = std::env::var("VIREO_SEED").map_or_else(
        |_| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            now.as_nanos() as u64
        },
        |seed| seed.parse().unwrap(),
    );
    println!("VIREO_SEED={seed}");
    let times = if std::env::var_os("VIREO_SOAK").is_some() {
        40
    } else {
        2
    };
    let folder = std::env::temp_dir().join(format!("vireo-kill-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let folder = Scratch(folder);
    for (format, options) in [
        ("raw", None),
        ("qcow2", Some("cluster_size=64k")),
        ("qcow2", Some("cluster_size=4k,refcount_bits=64")),
        ("qcow2", Some("cluster_size=16k,extended_l2=on")),
    ] {
        for direct in [false, true] {
            let path = folder.0.join("disk");
            let size = (BLOCKS * BLOCK).to_string();
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", format]);
            if let Some(options) = options {
                create.args(["-o", options]);
            }
            assert!(create.arg(&path).arg(size).status().unwrap().success());
            // What each block must be, and what it may be instead.
            let mut must: HashMap<u64, u64> = HashMap::new();
            let mut may: HashMap<u64, Vec<u64>> = HashMap::new();
            for time in 0..times {
                let seed = choice(seed, time, 5);
                let rounds = 1 + choice(seed, 0, 6) % 60;
                let last = run_and_kill(&path, format, direct, seed, rounds);
                for number in 1..=last {
                    for (block, value) in round(seed, number) {
                        must.insert(block, value);
                        may.remove(&block);
                    }
                }
                // Begun when it was killed, and perhaps even durable without our having heard it.
                for number in last + 1..=last + 2 {
                    for (block, value) in round(seed, number) {
                        may.entry(block).or_default().push(value);
                    }
                }
                let context = format!("{format} {options:?} direct {direct} seed {seed}");
                if format == "qcow2" {
                    // 3: clusters that nobody uses, as after any crash.
                    let code = qemu_img(&["check", "-q", "-f", "qcow2"], &path);
                    assert!(
                        matches!(code, Some(0 | 3)),
                        "{context}: check says {code:?}"
                    );
                }
                let image = open(&path, Format::from_name(format).unwrap(), false);
                let mut data = AlignedBuf::new((BLOCKS * BLOCK) as usize).unwrap();
                image.read(0, &[data.io(usize::MAX)]).unwrap();
                for block in 0..BLOCKS {
                    let content = &data[(block * BLOCK) as usize..][..BLOCK as usize];
                    let expected = must.get(&block).copied().unwrap_or(0);
                    let also = may.get(&block).map_or(&[][..], |values| values);
                    for word in content.chunks_exact(8) {
                        let got = u64::from_le_bytes(word.try_into().unwrap());
                        assert!(
                            got == expected || also.contains(&got),
                            "{context}: block {block} is {got:#x}, not {expected:#x} or {also:x?}"
                        );
                    }
                    // What is there now is what the next run begins with.
                    let first = u64::from_le_bytes(content[..8].try_into().unwrap());
                    if content
                        .chunks_exact(8)
                        .all(|word| word == first.to_le_bytes())
                    {
                        must.insert(block, first);
                        may.remove(&block);
                    }
                }
            }
            fs::remove_file(&path).unwrap();
        }
    }
}
