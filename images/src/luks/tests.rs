use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::*;
use crate::Raw;
use crate::testing::{Random, Scratch, have};

const QUICK: Duration = Duration::from_millis(10);
const SIZE: u64 = 2 << 20;

fn raw(path: &Path) -> Arc<dyn Image> {
    Arc::new(Raw::new(File::open(path, true).unwrap()).unwrap())
}

/// A new image of ours with `SIZE` bytes of content.
fn create(dir: &Scratch, name: &str, spec: Spec, passphrase: &[u8]) -> (PathBuf, Luks) {
    let path = dir.file(name, header_len(&spec).unwrap() + SIZE);
    let below = raw(&path);
    let store = ImageStore {
        image: &*below,
        name,
    };
    let volume = Volume::create(&store, spec, passphrase, QUICK).unwrap();
    let image = Luks::new(below, &volume).unwrap();
    (path, image)
}

fn write(image: &dyn Image, offset: u64, data: &mut [u8]) {
    image.write(offset, &[IoBuf::from_slice(data)]).unwrap();
}

fn read(image: &dyn Image, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    image.read(offset, &[IoBuf::from_slice(&mut data)]).unwrap();
    data
}

fn specs() -> Vec<Spec> {
    let spec = |mode, vector, hash, key_bytes| Spec {
        mode,
        vector,
        hash,
        key_bytes,
    };
    vec![
        Spec::default(),
        spec(Mode::Xts, Vector::Plain64, Hash::Sha512, 32),
        spec(Mode::Xts, Vector::Plain, Hash::Sha1, 64),
        spec(Mode::Cbc, Vector::EssivSha256, Hash::Sha1, 32),
        spec(Mode::Cbc, Vector::EssivSha256, Hash::Sha256, 16),
        spec(Mode::Cbc, Vector::Plain64, Hash::Sha512, 32),
    ]
}

fn succeeds(command: &mut Command) -> String {
    let mut output = command.stdin(Stdio::null()).output().unwrap();
    for _ in 0..20 {
        // qemu-img times its own key derivation, and gives up where the host's clock of its CPU time is too coarse.
        let coarse = String::from_utf8_lossy(&output.stderr).contains("accurate CPU usage");
        if output.status.success() || !coarse {
            break;
        }
        output = command.output().unwrap();
    }
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// qemu-img or qemu-io with the passphrase "secret" as `s`.
fn qemu(program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    let (verb, rest) = if program == "qemu-img" {
        (&args[..1], &args[1..])
    } else {
        (&[][..], args)
    };
    command
        .args(verb)
        .args(["--object", "secret,id=s,data=secret"])
        .args(rest);
    succeeds(&mut command)
}

fn as_qemu_names(path: &Path) -> String {
    format!(
        "driver=luks,key-secret=s,file.driver=file,file.filename={}",
        path.display()
    )
}

#[test]
fn content_is_what_was_written_and_only_with_the_passphrase() {
    let mut random = Random::new("luks");
    for spec in specs() {
        let dir = Scratch::new();
        let (path, image) = create(&dir, "disk", spec, b"open sesame");
        assert_eq!(image.size(), SIZE);
        let mut model = read(&image, 0, SIZE as usize);
        for _ in 0..100 {
            let most = if random.below(4) == 0 { 400_000 } else { 3000 };
            let len = random.below(most);
            let start = random.below(SIZE - len);
            let range = start as usize..(start + len) as usize;
            match random.below(4) {
                0 => {
                    image.write_zeroes(start, len, true).unwrap();
                    model[range].fill(0);
                }
                1 => assert_eq!(read(&image, start, len as usize), model[range]),
                _ => {
                    let mut data = vec![0; len as usize];
                    random.fill(&mut data);
                    write(&image, start, &mut data);
                    model[range].copy_from_slice(&data);
                }
            }
        }
        image.flush().unwrap();
        drop(image);
        let again = Luks::open(raw(&path), "disk", b"open sesame").unwrap();
        assert!(read(&again, 0, SIZE as usize) == model);
        assert!(again.discard(0, SIZE).is_ok());
        assert!(read(&again, 0, SIZE as usize) == model);
        let said = Luks::open(raw(&path), "disk", b"open sesam").unwrap_err();
        assert!(matches!(said, Error::Passphrase { .. }), "{said}");
        assert!(
            again
                .write(SIZE - 1, &[IoBuf::from_slice(&mut [0; 2])])
                .is_err()
        );
    }
}

#[test]
fn keys_come_and_go() {
    let dir = Scratch::new();
    let (path, mut image) = create(&dir, "disk", Spec::default(), b"first");
    write(&image, 4096, &mut [7; 512]);
    image.flush().unwrap();
    image = Luks::open(raw(&path), "disk", b"first").unwrap();
    let below = raw(&path);
    let store = ImageStore {
        image: &*below,
        name: "disk",
    };
    let mut volume = Volume::open(&store, b"first").unwrap();
    assert_eq!(volume.slot(), 0);
    assert_eq!(
        volume
            .add_key(&store, None, b"second", QUICK, false)
            .unwrap(),
        1
    );
    assert_eq!(
        volume
            .add_key(&store, Some(7), b"third", QUICK, false)
            .unwrap(),
        7
    );
    assert!(
        volume
            .add_key(&store, Some(1), b"no", QUICK, false)
            .is_err()
    );
    assert!(
        volume
            .add_key(&store, Some(8), b"no", QUICK, false)
            .is_err()
    );
    volume.remove_key(&store, 0, false).unwrap();
    assert!(volume.remove_key(&store, 0, false).is_err());
    assert!(Luks::open(raw(&path), "disk", b"first").is_err());
    for passphrase in [&b"second"[..], b"third"] {
        let other = Luks::open(raw(&path), "disk", passphrase).unwrap();
        assert_eq!(read(&other, 4096, 512), [7; 512]);
    }
    // What was open stays open.
    assert_eq!(read(&image, 4096, 512), [7; 512]);
    volume.remove_key(&store, 1, false).unwrap();
    let said = volume.remove_key(&store, 7, false).unwrap_err();
    assert!(said.to_string().contains("the last one"), "{said}");
    volume.remove_key(&store, 7, true).unwrap();
    assert!(Luks::open(raw(&path), "disk", b"third").is_err());
}

#[test]
fn a_header_that_lies_is_refused() {
    let mut random = Random::new("luks headers");
    let dir = Scratch::new();
    let (path, _) = create(&dir, "disk", Spec::default(), b"x");
    let below = raw(&path);
    let mut good = [0; HEADER];
    below.read(0, &[IoBuf::from_slice(&mut good)]).unwrap();
    let room = below.size();
    let parse = |bytes: &[u8; HEADER]| Header::parse("disk", bytes, room);
    let header = parse(&good).unwrap();
    assert_eq!(header.to_bytes(), good);
    let with = |at: usize, bytes: &[u8]| {
        let mut header = good;
        header[at..at + bytes.len()].copy_from_slice(bytes);
        parse(&header).unwrap_err().to_string()
    };
    assert!(with(0, b"M").contains("not a LUKS volume"));
    assert!(with(6, &[0, 2]).contains("LUKS version 2"));
    assert!(with(8, b"serpent").contains("serpent"));
    assert!(with(40, b"xts-benbi\0").contains("xts-benbi"));
    assert!(with(72, b"whirlpool").contains("whirlpool"));
    assert!(with(104, &[0xff; 4]).contains("payload"));
    assert!(with(104, &[0; 4]).contains("payload"));
    assert!(with(108, &[0, 0, 0, 16]).contains("128 bits"));
    assert!(with(164, &[0xff; 4]).contains("rounds"));
    assert!(with(208, &[1; 4]).contains("neither on nor off"));
    assert!(with(212, &[0xff; 4]).contains("rounds"));
    assert!(with(248, &[0; 4]).contains("lies on something else"));
    assert!(with(252, &[0, 0, 0, 1]).contains("stripes"));
    // Whatever it says: an answer, quickly.
    for _ in 0..5000 {
        let mut header = good;
        for _ in 0..1 + random.below(3) {
            header[random.below(HEADER as u64) as usize] = random.next() as u8;
        }
        if let Ok(header) = parse(&header) {
            assert!(header.payload <= room);
        }
    }
    assert!(
        read_header(&ImageStore {
            image: &*raw(&dir.file("short", 500)),
            name: "short"
        })
        .is_err()
    );
}

#[test]
fn qemu_reads_ours_and_we_read_qemus() {
    if !have("qemu-img") || !have("qemu-io") {
        eprintln!("left out: qemu_reads_ours_and_we_read_qemus needs qemu-utils");
        return;
    }
    let mut random = Random::new("luks with qemu");
    for spec in specs() {
        let dir = Scratch::new();
        let mut content = vec![0; SIZE as usize];
        random.fill(&mut content);
        let plain = dir.path().join("plain");
        std::fs::write(&plain, &content).unwrap();
        let plain = plain.display().to_string();

        let (path, image) = create(&dir, "ours", spec, b"secret");
        write(&image, 0, &mut content);
        image.flush().unwrap();
        drop(image);
        let theirs = as_qemu_names(&path);
        qemu(
            "qemu-img",
            &[
                "compare",
                "--image-opts",
                &theirs,
                &format!("driver=raw,file.driver=file,file.filename={plain}"),
            ],
        );

        // qemu-img measures its PBKDF2 for a second or more: twice is enough.
        if spec.mode == Mode::Xts && spec != Spec::default()
            || spec.key_bytes == 16
            || spec.vector == Vector::Plain64 && spec.mode == Mode::Cbc
        {
            continue;
        }
        let path = dir.path().join("theirs");
        let (cipher, mode, vector, hash) = (
            match (spec.mode, spec.key_bytes) {
                (Mode::Xts, 32) | (Mode::Cbc, 16) => "aes-128",
                _ => "aes-256",
            },
            if spec.mode == Mode::Xts { "xts" } else { "cbc" },
            match spec.vector {
                Vector::Plain => "ivgen-alg=plain",
                Vector::Plain64 => "ivgen-alg=plain64",
                Vector::EssivSha256 => "ivgen-alg=essiv,ivgen-hash-alg=sha256",
            },
            match spec.hash {
                Hash::Sha1 => "sha1",
                Hash::Sha256 => "sha256",
                Hash::Sha512 => "sha512",
            },
        );
        let options = format!(
            "key-secret=s,iter-time=10,cipher-alg={cipher},cipher-mode={mode},{vector},hash-alg={hash}"
        );
        let file = path.display().to_string();
        qemu(
            "qemu-img",
            &["create", "-q", "-f", "luks", "-o", &options, &file, "2M"],
        );
        qemu(
            "qemu-img",
            &[
                "convert",
                "-n",
                "--target-image-opts",
                "-f",
                "raw",
                &plain,
                &as_qemu_names(&path),
            ],
        );
        let image = Luks::open(raw(&path), "theirs", b"secret").unwrap();
        assert_eq!(image.size(), SIZE);
        assert!(read(&image, 0, SIZE as usize) == content, "{spec:?}");
    }
}

#[test]
fn a_grown_volume_keeps_its_content_and_takes_more() {
    let mut random = Random::new("grown luks");
    let dir = Scratch::new();
    let (path, image) = create(&dir, "grown", Spec::default(), b"secret");
    let mut content = vec![0; SIZE as usize];
    random.fill(&mut content);
    write(&image, 0, &mut content);
    image.resize(SIZE + (1 << 20)).unwrap();
    assert_eq!(image.size(), SIZE + (1 << 20));
    let mut more = vec![0; 1 << 20];
    random.fill(&mut more);
    write(&image, SIZE, &mut more);
    image.flush().unwrap();
    drop(image);
    content.extend(&more);
    let image = Luks::open(raw(&path), "grown", b"secret").unwrap();
    assert!(read(&image, 0, content.len()) == content);
    drop(image);
    if !have("qemu-img") {
        eprintln!("left out: qemu-img's look at a grown volume needs qemu-utils");
        return;
    }
    // QEMU sees the same, and what it grows we do.
    let plain = dir.path().join("plain");
    std::fs::write(&plain, &content).unwrap();
    let plain = format!(
        "driver=raw,file.driver=file,file.filename={}",
        plain.display()
    );
    let theirs = as_qemu_names(&path);
    qemu("qemu-img", &["compare", "--image-opts", &theirs, &plain]);
    qemu("qemu-img", &["resize", "-q", "--image-opts", &theirs, "4M"]);
    let image = Luks::open(raw(&path), "grown", b"secret").unwrap();
    assert_eq!(image.size(), 4 << 20);
    assert!(read(&image, 0, content.len()) == content);
}

#[test]
fn cryptsetup_reads_ours_and_we_read_cryptsetups() {
    if !have("cryptsetup") && !Path::new("/usr/sbin/cryptsetup").exists() {
        eprintln!("left out: cryptsetup_reads_ours_and_we_read_cryptsetups needs cryptsetup-bin");
        return;
    }
    let cryptsetup = |args: &[&str]| {
        let mut command = Command::new("cryptsetup");
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .args(args);
        command
    };
    for spec in specs() {
        let dir = Scratch::new();
        let key = dir.path().join("key");
        std::fs::write(&key, b"secret").unwrap();
        let key = key.display().to_string();
        let (path, image) = create(&dir, "ours", spec, b"secret");
        drop(image);
        let ours = path.display().to_string();
        let open = [
            "open",
            "--test-passphrase",
            "--type",
            "luks1",
            "--key-file",
            &key,
        ];
        succeeds(cryptsetup(&open).arg(&ours));
        let dump = succeeds(&mut cryptsetup(&["luksDump", &ours]));
        assert!(dump.contains(&spec.cipher_mode()), "{dump}");
        // It adds a passphrase of its own, which we take.
        let other = dir.path().join("other");
        std::fs::write(&other, b"other").unwrap();
        let other = other.display().to_string();
        let fast = ["--pbkdf-force-iterations", "1000", "--key-file", &key];
        succeeds(cryptsetup(&["luksAddKey"]).args(fast).args([&ours, &other]));
        let below = raw(&path);
        let store = ImageStore {
            image: &*below,
            name: "ours",
        };
        assert_eq!(Volume::open(&store, b"other").unwrap().slot(), 1);

        let theirs = dir.file("theirs", 8 << 20);
        let hash = match spec.hash {
            Hash::Sha1 => "sha1",
            Hash::Sha256 => "sha256",
            Hash::Sha512 => "sha512",
        };
        succeeds(
            cryptsetup(&["luksFormat", "-q", "--type", "luks1", "--hash", hash])
                .args(["--cipher", &format!("aes-{}", spec.cipher_mode())])
                .args(["--key-size", &(spec.key_bytes * 8).to_string()])
                .args(fast)
                .arg(&theirs),
        );
        let image = Luks::open(raw(&theirs), "theirs", b"secret").unwrap();
        assert!(image.size() > 4 << 20);
    }
}

#[test]
fn qcow2s_header_opens_where_it_lies() {
    if !have("qemu-img") {
        eprintln!("left out: qcow2s_header_opens_where_it_lies needs qemu-utils");
        return;
    }
    let dir = Scratch::new();
    let path = dir.path().join("disk.qcow2");
    let file = path.display().to_string();
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", options, &file, "1M"],
    );
    // The header extension 0x0537be77 says where.
    let bytes = std::fs::read(&path).unwrap();
    let at = bytes
        .windows(8)
        .position(|window| window == [0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16])
        .unwrap()
        + 8;
    let field = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let opened = File::open(&path, true).unwrap();
    let part = FilePart {
        file: &opened,
        start: field(at),
        len: field(at + 8),
    };
    Volume::open(&part, b"secret").unwrap().cipher().unwrap();
    assert!(matches!(
        Volume::open(&part, b"wrong"),
        Err(Error::Passphrase { .. })
    ));
}

#[test]
fn xts_is_the_standards() {
    // IEEE 1619-2007, annex B, vectors 4 (AES-128, first block) and 10 (AES-256, first block).
    let hex = |text: &str| -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    };
    for (key, sector, cipher_text) in [
        (
            "2718281828459045235360287471352631415926535897932384626433832795",
            0,
            "27a7479befa1d476489f308cd4cfa6e2",
        ),
        (
            "2718281828459045235360287471352662497757247093699959574966967627\
             3141592653589793238462643383279502884197169399375105820974944592",
            0xff,
            "1c3b3a102f770386e4836c99e370cf9b",
        ),
    ] {
        let mut data: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let plain = data.clone();
        let cipher = SectorCipher::new(Mode::Xts, Vector::Plain64, &hex(key)).unwrap();
        cipher.encrypt(sector * 512, &mut data);
        assert_eq!(data[..16], hex(cipher_text));
        cipher.decrypt(sector * 512, &mut data);
        assert_eq!(data, plain);
    }
}

#[test]
#[ignore = "speed, to be looked at"]
fn speed() {
    let mut data = vec![0x5a; 1 << 20];
    for spec in specs() {
        let key: Vec<u8> = (0..spec.key_bytes as u8).collect();
        let cipher = keyed(&spec, &key).unwrap();
        let mut times = [f64::INFINITY; 2];
        for _ in 0..30 {
            let begun = std::time::Instant::now();
            cipher.encrypt(0, &mut data);
            let middle = std::time::Instant::now();
            cipher.decrypt(0, &mut data);
            times[0] = times[0].min((middle - begun).as_secs_f64());
            times[1] = times[1].min(middle.elapsed().as_secs_f64());
        }
        let rounds = kdf::rounds_in(spec.hash, spec.key_bytes, Duration::from_secs(1));
        println!(
            "{spec:?}: {:.0} MiB/s encrypting, {:.0} MiB/s decrypting, {rounds} PBKDF2 rounds/s",
            1.0 / times[0],
            1.0 / times[1]
        );
    }
}
