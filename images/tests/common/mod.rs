//! What the tests of images share: QEMU's tools as the other side, and a seeded generator.
#![allow(dead_code, missing_docs, reason = "each test uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use images::luks::{FilePart, Volume};
use images::{Error, File, Image, IoBuf, Qcow2, Raw, qcow2};

/// xorshift64*
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit.max(1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    pub fn fill(&mut self, data: &mut [u8]) {
        for chunk in data.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// How long randomised tests go on: `short` in an ordinary run, `long` with VIREO_SOAK=1.
pub fn rounds(short: u64, long: u64) -> u64 {
    if std::env::var_os("VIREO_SOAK").is_some_and(|v| v == "1") {
        long
    } else {
        short
    }
}

/// The first seed: of VIREO_SEED, or of the clock.
pub fn seed() -> u64 {
    if let Some(seed) = std::env::var("VIREO_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
    {
        return seed;
    }
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    now.as_nanos() as u64 % 1_000_000_000
}

/// A folder that goes away.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "vireo-images-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// False, and said so, where a tool is missing.
pub fn have(test: &str, tool: &str) -> bool {
    if Command::new(tool).arg("--version").output().is_ok() {
        return true;
    }
    println!("left out: {test} needs {tool}");
    false
}

/// Runs a tool; panics with what it says if it fails.
pub fn run(tool: &str, args: &[&str]) -> String {
    let mut out = Command::new(tool).args(args).output().unwrap();
    for _ in 0..20 {
        // qemu-img times its own key derivation, and gives up where the host's clock of its CPU time is too coarse.
        if !String::from_utf8_lossy(&out.stderr).contains("accurate CPU usage") {
            break;
        }
        out = Command::new(tool).args(args).output().unwrap();
    }
    assert!(
        out.status.success(),
        "{tool} {args:?}: {}\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

pub fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args)
}

/// The passphrase of every encrypted image here.
pub const PASSPHRASE: &str = "sesame";
pub const SECRET: &str = "secret,id=s,data=sesame";

/// How QEMU's tools are told of an image.
pub fn named(path: &Path, format: &str) -> Vec<String> {
    let encrypted = format == "qcow2"
        && qcow2::Header::read(&File::open(path, false).unwrap())
            .unwrap()
            .encryption
            != qcow2::Encryption::None;
    let words: Vec<String> = if encrypted {
        let options = format!(
            "driver=qcow2,encrypt.key-secret=s,file.filename={}",
            text(path)
        );
        vec![
            "--object".into(),
            SECRET.into(),
            "--image-opts".into(),
            options,
        ]
    } else {
        vec!["-f".into(), format.into(), text(path).into()]
    };
    words
}

/// Panics unless `qemu-img check` finds nothing, not even a leak.
pub fn check_clean(path: &Path) {
    let mut args = vec!["check".to_owned()];
    args.extend(named(path, "qcow2"));
    qemu_img(&args.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Runs qemu-io's commands.
pub fn qemu_io(path: &Path, commands: &[String]) {
    let mut args: Vec<String> = commands
        .iter()
        .flat_map(|command| ["-c".to_owned(), command.clone()])
        .collect();
    args.extend(named(path, "qcow2"));
    run(
        "qemu-io",
        &args.iter().map(String::as_str).collect::<Vec<_>>(),
    );
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What qemu-img reads from an image.
pub fn content(path: &Path, format: &str, snapshot: Option<&str>, scratch: &Scratch) -> Vec<u8> {
    let raw = scratch.path("content.raw");
    let mut args = vec!["convert".to_owned(), "-O".into(), "raw".into()];
    if let Some(snapshot) = snapshot {
        args.extend(["-l".to_owned(), snapshot.to_owned()]);
    }
    args.extend(named(path, format));
    args.push(text(&raw).into());
    qemu_img(&args.iter().map(String::as_str).collect::<Vec<_>>());
    std::fs::read(&raw).unwrap()
}

pub fn read(image: &dyn Image, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
    let mut data = vec![0xee; len];
    // SAFETY: lives until the call has returned.
    image.read(offset, &[unsafe { IoBuf::new(data.as_mut_ptr(), len) }])?;
    Ok(data)
}

/// Writes `data` as several buffers.
pub fn write(image: &dyn Image, offset: u64, data: &[u8]) -> Result<(), Error> {
    let mut copy = data.to_vec();
    let middle = data.len() / 3;
    let (a, b) = copy.split_at_mut(middle);
    // SAFETY: live until the call has returned.
    let bufs = unsafe {
        [
            IoBuf::new(a.as_mut_ptr(), a.len()),
            IoBuf::new(b.as_mut_ptr(), b.len()),
        ]
    };
    image.write(offset, &bufs)
}

/// A file and everything behind it, opened as its header says; paths are relative to its folder.
pub fn open(path: &Path, writable: bool) -> Result<Qcow2, Error> {
    let file = File::open(path, writable)?;
    let header = qcow2::Header::read(&file)?;
    let near = |name: &std::ffi::OsStr| path.parent().unwrap().join(name);
    let mut options = qcow2::Options::default();
    if let Some(name) = &header.backing {
        let below: Arc<dyn Image> = match header.backing_format.as_deref() {
            Some("raw") => Arc::new(Raw::new(File::open(&near(name), false)?)?),
            _ => Arc::new(open(&near(name), false)?),
        };
        options.backing = Some(below);
    }
    if let Some(name) = &header.data_file {
        options.data_file = Some(File::open(&near(name), writable)?);
    }
    if let qcow2::Encryption::Luks { offset, length } = header.encryption {
        let part = FilePart {
            file: &file,
            start: offset,
            len: length,
        };
        options.cipher = Some(Volume::open(&part, PASSPHRASE.as_bytes())?.cipher()?);
    }
    Qcow2::open(file, options)
}
