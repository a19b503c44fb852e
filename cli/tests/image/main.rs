//! `vireo image` against qemu-img: what ours makes is checked and read by theirs, what theirs
//! makes is read by ours, and both print the same.
#![allow(missing_docs, reason = "a test")]

mod failures;
mod keys;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

/// xorshift64*
struct Random(u64);

impl Random {
    /// Of VIREO_SEED, or of the clock; printed.
    fn new(what: &str) -> Self {
        let seed = std::env::var("VIREO_SEED")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| {
                let now = std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .unwrap();
                now.as_nanos() as u64 % 1_000_000_000
            });
        println!("{what}: VIREO_SEED={seed}");
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % limit.max(1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len() as u64) as usize]
    }
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(what: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vireo-image-{what}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// False, and said so, where QEMU's tools are missing.
fn have(test: &str) -> bool {
    let there = ["qemu-img", "qemu-io"]
        .iter()
        .all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !there {
        println!("left out: {test} needs qemu-img and qemu-io");
    }
    there
}

fn ours() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    command.arg("image");
    command
}

fn run(mut command: Command, folder: &Path, args: &[&str]) -> Output {
    command
        .args(args)
        .current_dir(folder)
        .env("TZ", "UTC")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn vireo(folder: &Path, args: &[&str]) -> Output {
    run(ours(), folder, args)
}

fn qemu(folder: &Path, args: &[&str]) -> Output {
    // On a busy host it sometimes can't measure how fast it derives keys.
    for _ in 0..20 {
        let output = run(Command::new("qemu-img"), folder, args);
        if !String::from_utf8_lossy(&output.stderr).contains("accurate CPU usage") {
            return output;
        }
    }
    run(Command::new("qemu-img"), folder, args)
}

/// Panics with what was said if it failed.
fn well(output: &Output, what: &[&str]) -> String {
    assert!(
        output.status.success(),
        "{what:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn vireo_ok(folder: &Path, args: &[&str]) -> String {
    well(&vireo(folder, args), args)
}

fn qemu_ok(folder: &Path, args: &[&str]) -> String {
    well(&qemu(folder, args), args)
}

fn qemu_io(folder: &Path, args: &[&str]) {
    well(&run(Command::new("qemu-io"), folder, args), args);
}

/// Removes what differs between QEMU's versions, or between two images of the same content.
fn strip(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for name in [
                "children",
                "actual-size",
                "compressed",
                "uuid",
                "iters",
                "master-key-iters",
                "detached-header",
                "date-sec",
                "date-nsec",
                "offset",
                "image-end-offset",
                "fragmented-clusters",
            ] {
                fields.remove(name);
            }
            // A cluster's end that the file does not have, or has as a hole: told by chance.
            if fields.get("data") == Some(&Value::Bool(true)) {
                fields.insert("zero".into(), false.into());
            }
            fields.values_mut().for_each(strip);
        }
        Value::Array(list) => list.iter_mut().for_each(strip),
        _ => {}
    }
}

fn json(text: &str) -> Value {
    let mut value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    strip(&mut value);
    join(&mut value);
    value
}

/// Joins neighbours of a map that are alike: versions differ in where they cut.
fn join(value: &mut Value) {
    let Value::Array(list) = value else { return };
    let kind = |one: &Value| {
        let mut one = one.clone();
        if let Value::Object(fields) = &mut one {
            fields.remove("start");
            fields.remove("length");
        }
        one
    };
    let mut joined: Vec<Value> = Vec::new();
    for one in std::mem::take(list) {
        match joined.last_mut() {
            Some(last) if last["length"].is_u64() && kind(last) == kind(&one) => {
                let both = last["length"].as_u64().unwrap() + one["length"].as_u64().unwrap();
                last["length"] = both.into();
            }
            _ => joined.push(one),
        }
    }
    *list = joined;
}

/// Both look at the same files, and must say the same.
fn same_json(folder: &Path, args: &[&str]) {
    let (ours, theirs) = (vireo(folder, args), qemu(folder, args));
    assert_eq!(
        ours.status.code(),
        theirs.status.code(),
        "{args:?}: {}{}",
        String::from_utf8_lossy(&ours.stderr),
        String::from_utf8_lossy(&theirs.stderr)
    );
    let text = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(json(&text(&ours)), json(&text(&theirs)), "{args:?}");
}

#[test]
fn both_say_the_same_of_what_each_has_made() {
    if !have("both_say_the_same_of_what_each_has_made") {
        return;
    }
    let scratch = Scratch::new("same");
    let folder = &scratch.0;
    for (n, make) in [vireo_ok, qemu_ok].into_iter().enumerate() {
        let name = |what: &str| format!("{what}{n}");
        let secret = ["--object", "secret,id=s,data=abc"];
        let base = name("base");
        make(folder, &["create", "-q", "-f", "raw", &base, "3M"]);
        qemu_io(folder, &["-f", "raw", "-c", "write -P 7 1M 64k", &base]);
        let list: [(&str, &[&str]); 9] = [
            ("plain", &["-f", "qcow2"]),
            ("old", &["-f", "qcow2", "-o", "compat=0.10"]),
            ("backed", &["-f", "qcow2", "-F", "raw", "-b", &base]),
            (
                "fine",
                &[
                    "-f",
                    "qcow2",
                    "-o",
                    "extended_l2=on,cluster_size=32k,refcount_bits=8",
                ],
            ),
            (
                "lazy",
                &[
                    "-f",
                    "qcow2",
                    "-o",
                    "lazy_refcounts=on,compression_type=zstd",
                ],
            ),
            (
                "full",
                &["-f", "qcow2", "-o", "preallocation=full,cluster_size=4k"],
            ),
            (
                "data",
                &["-f", "qcow2", "-o", "data_file=data.raw,data_file_raw=on"],
            ),
            ("luks", &["-f", "luks", "-o", "key-secret=s,iter-time=10"]),
            (
                "secret",
                &[
                    "-f",
                    "qcow2",
                    "-o",
                    "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,\
                     encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha1",
                ],
            ),
        ];
        for (what, options) in list {
            let image = name(what);
            let mut args = vec!["create"];
            args.extend(secret);
            args.extend(options);
            args.extend([image.as_str(), "4M"]);
            let said = make(folder, &args);
            let image = image.as_str();
            let open = if what == "luks" { "luks" } else { "qcow2" };
            // What is printed when an image is made is the same, too.
            let theirs = qemu_ok(
                folder,
                &args
                    .iter()
                    .map(|arg| if *arg == image { "other" } else { arg })
                    .collect::<Vec<_>>(),
            );
            assert_eq!(said.replace(image, "other"), theirs);
            if !matches!(what, "luks" | "secret") {
                qemu_io(
                    folder,
                    &[
                        "-c",
                        "write -P 5 64k 100k",
                        "-c",
                        "write -z 1M 256k",
                        "-c",
                        "discard 64k 64k",
                        image,
                    ],
                );
                same_json(folder, &["map", "--output=json", image]);
                same_json(folder, &["check", "--output=json", image]);
                if what != "data" {
                    same_json(folder, &["measure", "--output=json", "-O", "qcow2", image]);
                }
                same_json(
                    folder,
                    &[
                        "map",
                        "--output=json",
                        "--start-offset=70k",
                        "--max-length=1M",
                        image,
                    ],
                );
            }
            if what == "plain" {
                make(folder, &["snapshot", "-c", "first", image]);
                make(folder, &["bitmap", "--add", "-g", "4k", image, "b"]);
                make(folder, &["bitmap", "--add", "--disable", image, "c"]);
            }
            for chain in [None, Some("--backing-chain")] {
                let mut args = vec!["info", "--output=json", "-f", open, image];
                args.extend(chain);
                same_json(folder, &args);
            }
        }
        for (options, size) in [
            ("cluster_size=4k", "1G"),
            ("cluster_size=2M,refcount_bits=64", "777M"),
            ("extended_l2=on,preallocation=metadata", "100G"),
        ] {
            same_json(
                folder,
                &[
                    "measure",
                    "--output=json",
                    "-O",
                    "qcow2",
                    "-o",
                    options,
                    "--size",
                    size,
                ],
            );
        }
    }
}

/// An image, what is behind it, and what a guest should see.
struct Story {
    scratch: Scratch,
    random: Random,
    image: String,
    content: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    bitmaps: Vec<String>,
    count: u32,
    log: Vec<String>,
}

impl Story {
    fn new(round: u64) -> Self {
        let mut random = Random::new("image stories");
        random.0 = random
            .0
            .wrapping_add(round.wrapping_mul(0x1234_5678_9abc_def1))
            | 1;
        let mut story = Self {
            scratch: Scratch::new(&format!("story{round}")),
            random,
            image: String::new(),
            content: Vec::new(),
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            count: 0,
            log: Vec::new(),
        };
        let size = (1 + story.random.below(6000)) * 512;
        story.image = story.fresh();
        story.ours(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            &story.image.clone(),
            &size.to_string(),
        ]);
        story.content = vec![0; size as usize];
        story
    }

    fn fresh(&mut self) -> String {
        self.count += 1;
        format!("i{}", self.count)
    }

    fn ours(&mut self, args: &[&str]) -> String {
        self.log.push(args.join(" "));
        let output = vireo(&self.scratch.0, args);
        assert!(
            output.status.success(),
            "{:#?}\n{}",
            self.log,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What qemu-img sees in it.
    fn seen(&self, image: &str) -> Vec<u8> {
        let raw = self.scratch.0.join("seen.raw");
        qemu_ok(
            &self.scratch.0,
            &["convert", "-O", "raw", image, "seen.raw"],
        );
        std::fs::read(raw).unwrap()
    }

    fn verify(&self) {
        let check = qemu(&self.scratch.0, &["check", "-f", "qcow2", &self.image]);
        assert!(
            check.status.success(),
            "{:#?}\n{}{}",
            self.log,
            String::from_utf8_lossy(&check.stdout),
            String::from_utf8_lossy(&check.stderr)
        );
        let seen = self.seen(&self.image);
        assert_eq!(seen.len(), self.content.len(), "{:#?}", self.log);
        let differ = seen.iter().zip(&self.content).position(|(a, b)| a != b);
        assert_eq!(differ, None, "{:#?}", self.log);
    }

    fn write(&mut self) {
        let size = self.content.len() as u64;
        for _ in 0..1 + self.random.below(4) {
            let at = self.random.below(size / 512) * 512;
            let len = (1 + self.random.below(((size - at) / 512).min(400))) * 512;
            let byte = self.random.below(4) as u8;
            let line = if byte == 0 && self.random.one_in(2) {
                format!("write -z {at} {len}")
            } else {
                format!("write -P {byte} {at} {len}")
            };
            self.log.push(line.clone());
            qemu_io(&self.scratch.0, &["-f", "qcow2", "-c", &line, &self.image]);
            self.content[at as usize..(at + len) as usize].fill(byte);
        }
    }

    /// A new image with the same content, by convert.
    fn convert(&mut self) {
        let (old, new) = (self.image.clone(), self.fresh());
        let old_version = self.random.one_in(6);
        let cluster = self.random.pick(&["512", "4096", "65536", "65536", "2M"]);
        let mut options = format!("cluster_size={cluster}");
        if old_version {
            options.push_str(",compat=0.10");
        } else {
            if cluster == "65536" && self.random.one_in(2) {
                options.push_str(",extended_l2=on");
            }
            if self.random.one_in(2) {
                options.push_str(",compression_type=zstd");
            }
            options.push_str(",refcount_bits=");
            options.push_str(self.random.pick(&["8", "16", "64"]));
            if self.random.one_in(3) {
                options.push_str(",lazy_refcounts=on");
            }
        }
        let compress = self.random.one_in(2);
        if !compress && self.random.one_in(3) {
            options.push_str(",preallocation=");
            options.push_str(self.random.pick(&["metadata", "falloc", "full"]));
        }
        let mut args = vec!["convert", "-O", "qcow2", "-o", &options];
        if compress {
            args.push("-c");
        }
        for flag in ["-W", "--salvage"] {
            if self.random.one_in(3) {
                args.push(flag);
            }
        }
        let threads = (1 + self.random.below(4)).to_string();
        args.extend(["-m", &threads]);
        if self.random.one_in(2) {
            args.extend(["-S", self.random.pick(&["0", "512", "64k"])]);
        }
        args.extend([old.as_str(), new.as_str()]);
        self.ours(&args);
        self.image = new;
        self.snapshots.clear();
        self.bitmaps.clear();
    }

    /// An overlay becomes the image.
    fn overlay(&mut self) {
        let (old, new) = (self.image.clone(), self.fresh());
        self.ours(&[
            "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &old, &new,
        ]);
        self.image = new;
        self.snapshots.clear();
        self.bitmaps.clear();
    }

    fn rebase(&mut self) {
        if !self.snapshots.is_empty() {
            // What they leave to the backing file would change.
            return;
        }
        let (image, base) = (self.image.clone(), self.fresh());
        let size = 512 * (1 + self.random.below(6000));
        self.ours(&["create", "-q", "-f", "qcow2", &base, &size.to_string()]);
        let line = format!("write -P 2 0 {}", 512 * (1 + self.random.below(size / 512)));
        qemu_io(&self.scratch.0, &["-f", "qcow2", "-c", &line, &base]);
        let mut args = vec!["rebase"];
        if self.random.one_in(3) {
            args.push("-c");
        }
        if self.random.one_in(4) {
            args.extend(["-b", ""]);
        } else {
            args.extend(["-F", "qcow2", "-b", &base]);
        }
        args.push(&image);
        self.ours(&args);
    }

    fn commit(&mut self) {
        let base = self.image.clone();
        self.overlay();
        self.write();
        let image = self.image.clone();
        if self.random.one_in(2) {
            self.ours(&["commit", "-q", &image]);
        } else {
            self.ours(&["commit", "-q", "-d", &image]);
        }
        self.verify();
        // All is in the base, too.
        assert!(self.seen(&base) == self.content, "{:#?}", self.log);
    }

    fn snapshot(&mut self) {
        let image = self.image.clone();
        let which = self.random.below(self.snapshots.len() as u64) as usize;
        match self.random.below(3) {
            1 if !self.snapshots.is_empty() => {
                let (name, content) = self.snapshots[which].clone();
                self.ours(&["snapshot", "-a", &name, &image]);
                self.content = content;
            }
            2 if !self.snapshots.is_empty() => {
                let (name, _) = self.snapshots.remove(which);
                self.ours(&["snapshot", "-d", &name, &image]);
            }
            _ => {
                let name = format!("s{}", self.log.len());
                let args = ["snapshot", "-c", &name, &image];
                self.log.push(args.join(" "));
                let output = vireo(&self.scratch.0, &args);
                if !output.status.success() {
                    // Hundreds of compressed clusters fit into one, and narrow refcounts are full then.
                    let said = String::from_utf8_lossy(&output.stderr);
                    let full = said.contains("its refcounts can't count one more snapshot");
                    assert!(full, "{:#?}\n{said}", self.log);
                    let folder = &self.scratch.0;
                    std::fs::copy(folder.join(&image), folder.join("full")).unwrap();
                    let theirs = qemu(folder, &["snapshot", "-c", &name, "full"]);
                    assert!(!theirs.status.success(), "{:#?}", self.log);
                    return;
                }
                self.snapshots.push((name.clone(), self.content.clone()));
                let options = format!("snapshot.name={name}");
                self.ours(&["convert", "-l", &options, "-O", "raw", &image, "snap.raw"]);
                let raw = std::fs::read(self.scratch.0.join("snap.raw")).unwrap();
                assert!(raw == self.content, "{:#?}", self.log);
            }
        }
    }

    fn resize(&mut self) {
        let image = self.image.clone();
        let version = self.ours(&["info", "--output=json", &image]);
        if json(&version)["format-specific"]["data"]["compat"] == "0.10"
            && !self.snapshots.is_empty()
        {
            return;
        }
        let size = 512 * (1 + self.random.below(8000));
        self.ours(&["resize", "-q", "--shrink", &image, &size.to_string()]);
        self.content.resize(size as usize, 0);
    }

    fn bitmap(&mut self) {
        let image = self.image.clone();
        let info = self.ours(&["info", "--output=json", &image]);
        if json(&info)["format-specific"]["data"]["compat"] == "0.10" {
            return;
        }
        let which = self.random.below(self.bitmaps.len() as u64) as usize;
        if self.bitmaps.is_empty() || self.random.one_in(2) {
            let name = format!("b{}", self.log.len());
            let size = self.random.pick(&["512", "4k", "64k", "1M"]);
            self.ours(&["bitmap", "--add", "-g", size, &image, &name]);
            self.bitmaps.push(name);
        } else if self.random.one_in(3) {
            let name = self.bitmaps.remove(which);
            self.ours(&["bitmap", "--remove", &image, &name]);
        } else {
            let name = self.bitmaps[which].clone();
            let other = self.bitmaps[0].clone();
            match self.random.below(4) {
                0 => self.ours(&["bitmap", "--clear", &image, &name]),
                1 => self.ours(&["bitmap", "--disable", &image, &name]),
                2 => self.ours(&["bitmap", "--enable", &image, &name]),
                _ => self.ours(&["bitmap", "--merge", &other, &image, &name]),
            };
        }
        // None of them is broken by what came before.
        let info = qemu_ok(&self.scratch.0, &["info", "--output=json", &image]);
        let info = json(&info);
        let list = info["format-specific"]["data"]["bitmaps"].as_array();
        let list = list.cloned().unwrap_or_default();
        assert_eq!(list.len(), self.bitmaps.len(), "{:#?}", self.log);
        for one in list {
            let flags = one["flags"].to_string();
            assert!(!flags.contains("in-use"), "{:#?}\n{one}", self.log);
        }
    }

    fn amend(&mut self) {
        let image = self.image.clone();
        let info = self.ours(&["info", "--output=json", &image]);
        let data = json(&info)["format-specific"]["data"].clone();
        if data["compat"] == "0.10" {
            self.ours(&["amend", "-o", "compat=1.1", &image]);
        } else if self.random.one_in(4)
            && data["refcount-bits"] == 16
            && data["extended-l2"] == false
            && data["compression-type"] == "zlib"
            && self.snapshots.is_empty()
            && self.bitmaps.is_empty()
        {
            self.ours(&["amend", "-o", "compat=0.10", &image]);
        } else if self.random.one_in(2) {
            let bits = self.random.pick(&["8", "16", "32", "64"]);
            self.ours(&["amend", "-o", &format!("refcount_bits={bits}"), &image]);
        } else {
            let on = self.random.pick(&["on", "off"]);
            self.ours(&["amend", "-o", &format!("lazy_refcounts={on}"), &image]);
        }
    }

    fn step(&mut self) {
        match self.random.below(12) {
            0..=2 => self.write(),
            3 => self.convert(),
            4 => self.rebase(),
            5 => self.commit(),
            6 | 7 => self.snapshot(),
            8 => self.resize(),
            9 => self.bitmap(),
            10 => self.amend(),
            _ => self.overlay(),
        }
        self.verify();
    }
}

#[test]
fn qemu_img_agrees_with_every_step_of_random_stories() {
    if !have("qemu_img_agrees_with_every_step_of_random_stories") {
        return;
    }
    let long = std::env::var_os("VIREO_SOAK").is_some_and(|soak| soak == "1");
    for round in 0..if long { 300 } else { 4 } {
        let mut story = Story::new(round);
        for _ in 0..16 {
            story.step();
        }
    }
}

#[test]
fn killed_commits_and_rebases_lose_nothing() {
    if !have("killed_commits_and_rebases_lose_nothing") {
        return;
    }
    let scratch = Scratch::new("killed");
    let folder = &scratch.0;
    let mut random = Random::new("killed commits and rebases");
    for round in 0..6 {
        for name in ["base", "other", "top"] {
            let _ = std::fs::remove_file(folder.join(name));
        }
        vireo_ok(folder, &["create", "-q", "-f", "qcow2", "base", "16M"]);
        vireo_ok(folder, &["create", "-q", "-f", "qcow2", "other", "16M"]);
        qemu_io(folder, &["-c", "write -P 1 0 12M", "base"]);
        qemu_io(folder, &["-c", "write -P 2 2M 12M", "other"]);
        let create = [
            "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", "top",
        ];
        vireo_ok(folder, &create);
        qemu_io(
            folder,
            &[
                "-c",
                "write -P 3 1M 3M",
                "-c",
                "write -z 5M 1M",
                "-c",
                "write -P 4 13M 2M",
                "top",
            ],
        );
        qemu_ok(folder, &["convert", "-O", "raw", "top", "model"]);
        let args: &[&str] = if round % 2 == 0 {
            &["commit", "top", "-r", "20M"]
        } else {
            &["rebase", "-F", "qcow2", "-b", "other", "top"]
        };
        let mut child = ours()
            .args(args)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(
            1 + random.below(if round % 2 == 0 { 250 } else { 60 }),
        ));
        let _ = child.kill();
        let _ = child.wait();
        for image in ["top", "base", "other"] {
            // Leaks are no harm (3); anything else is.
            let check = qemu(folder, &["check", image]);
            assert!(
                matches!(check.status.code(), Some(0 | 3)),
                "{round} {image}: {check:?}"
            );
        }
        let same = qemu(folder, &["compare", "top", "model"]);
        assert_eq!(same.status.code(), Some(0), "{round}: {same:?}");
        // Done again it comes to its end.
        vireo_ok(
            folder,
            &args[..args.len().min(if round % 2 == 0 { 2 } else { 6 })],
        );
        let same = qemu(folder, &["compare", "top", "model"]);
        assert_eq!(same.status.code(), Some(0), "{round}: {same:?}");
    }
}
