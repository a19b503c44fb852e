//! Tests of the loader, on images made here.

use std::io::Write;

use super::*;
use crate::num::Fields as _;
use crate::testing::TempDir;

const MIB: u64 = 1 << 20;

/// A 64-bit ELF kernel at 1 MiB with a PVH note, `body` as its text.
fn elf(body: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(0x0010_0010_u32.to_le_bytes());
    let text_at = 64 + 2 * 56 + note.len() as u64;
    let mut image = vec![0; 64];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    image[16..20].copy_from_slice(&[2, 0, 62, 0]);
    image[24..32].copy_from_slice(&0x10_0000_u64.to_le_bytes());
    image[32..40].copy_from_slice(&64_u64.to_le_bytes());
    image[52..54].copy_from_slice(&64_u16.to_le_bytes());
    image[54..56].copy_from_slice(&56_u16.to_le_bytes());
    image[56..58].copy_from_slice(&2_u16.to_le_bytes());
    let length = body.len() as u64;
    let headers = [
        (1_u32, text_at, MIB, length, length + 0x1000),
        (4, 64 + 2 * 56, 0, note.len() as u64, note.len() as u64),
    ];
    for (kind, offset, address, file, memory) in headers {
        image.extend(kind.to_le_bytes());
        image.extend(5_u32.to_le_bytes());
        for field in [offset, address, address, file, memory, 0] {
            image.extend(field.to_le_bytes());
        }
    }
    image.extend(note);
    image.extend(body);
    image
}

/// A bzImage around a packed payload (with its length at the end).
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[0x211] = 1;
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    image[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
    let length = u32::try_from(payload.len()).unwrap();
    image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&MIB.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x8_0000_u32.to_le_bytes());
    image.extend([0x90; 16]);
    image.extend(payload);
    image
}

fn sized(mut packed: Vec<u8>, plain: &[u8]) -> Vec<u8> {
    packed.extend(u32::try_from(plain.len()).unwrap().to_le_bytes());
    packed
}

fn lz4(plain: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    // Two blocks, as a large kernel has.
    for part in plain.chunks(plain.len().div_ceil(2)) {
        let block = lz4_flex::block::compress(part);
        packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        packed.extend(block);
    }
    sized(packed, plain)
}

fn zstd(plain: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; plain.len() + 1024];
    let size = zstd_safe::compress(&mut packed[..], plain, 3).unwrap();
    packed.truncate(size);
    sized(packed, plain)
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    // With a file name, as gzip writes it.
    let mut packed = vec![0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 2, 3];
    packed.extend(b"vmlinux.bin\0");
    packed.extend(miniz_oxide::deflate::compress_to_vec(plain, 6));
    packed.extend([0; 4]);
    sized(packed, plain)
}

/// With the branch filter, as Linux's build packs kernels.
fn xz(plain: &[u8]) -> Vec<u8> {
    let mut options = lzma_rust2::XzOptions::with_preset(3);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(plain).unwrap();
    sized(writer.finish().unwrap(), plain)
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::new())
    }

    fn named(&self, name: &str, content: &[u8]) -> Named {
        let path = self.0.path().join(name);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        file.write_all(content).unwrap();
        Named {
            file,
            name: path.display().to_string(),
        }
    }

    fn boot(&self, kernel: &[u8]) -> Boot {
        Boot {
            kernel: self.named("kernel", kernel),
            initrd: Some(self.named("initrd", b"initrd!")),
            cmdline: "quiet".into(),
            no_unpack: false,
            rsdp: Some(layout::RSDP),
        }
    }
}

fn text(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut buffer = vec![0; len];
    memory.read(at, &mut buffer).unwrap();
    buffer
}

/// Checks everything a PVH guest is told.
fn check_pvh(memory: &GuestMemory, entry: &Entry, body: &[u8]) {
    assert_eq!(entry.eip, 0x0010_0010);
    assert_eq!(text(memory, MIB, body.len()), body);
    let info = text(memory, entry.ebx.into(), 56);
    assert_eq!(info.u32_at(0), Some(0x336e_c578));
    assert_eq!(info.u32_at(12), Some(1));
    assert_eq!(text(memory, info.u64_at(24).unwrap(), 6), b"quiet\0");
    assert_eq!(info.u64_at(32), Some(layout::RSDP));
    let module = text(memory, info.u64_at(16).unwrap(), 16);
    assert_eq!(text(memory, module.u64_at(0).unwrap(), 7), b"initrd!");
    assert_eq!(module.u64_at(8), Some(7));
    let map = text(memory, info.u64_at(40).unwrap(), 24);
    assert_eq!((map.u64_at(0), map.u32_at(16)), (Some(0), Some(1)));
    assert_eq!(info.u32_at(48), Some(5));
}

#[test]
fn elf_with_pvh_note() {
    let files = Files::new();
    let memory = GuestMemory::new(16 * MIB).unwrap();
    let body: Vec<u8> = (0..5000_u32).map(|i| i.to_le_bytes()[0]).collect();
    let entry = load(&memory, &files.boot(&elf(&body))).unwrap();
    check_pvh(&memory, &entry, &body);
}

#[test]
fn bzimage_of_every_packing() {
    let files = Files::new();
    let body: Vec<u8> = (0..300_000_u32).map(|i| (i / 7).to_le_bytes()[0]).collect();
    let kernel = elf(&body);
    for (name, payload) in [
        ("lz4", lz4(&kernel)),
        ("zstd", zstd(&kernel)),
        ("gzip", gzip(&kernel)),
        ("xz", xz(&kernel)),
    ] {
        // In guest memory, and where the guest is too small for that, beside it.
        for size in [16 * MIB, MIB + (640 << 10)] {
            let memory = GuestMemory::new(size).unwrap();
            let entry = load(&memory, &files.boot(&bzimage(&payload)))
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            check_pvh(&memory, &entry, &body);
            let used = memory.resident();
            assert!(used < MIB, "{name}: unpacking left {used} bytes behind");
        }
    }
}

#[test]
fn bzimage_with_its_own_decompressor() {
    let files = Files::new();
    let memory = GuestMemory::new(16 * MIB).unwrap();
    for (image, no_unpack) in [
        (bzimage(b"BZh9 and so on"), false),
        (bzimage(&lz4(&elf(b"x"))), true),
    ] {
        memory.clear().unwrap();
        let boot = Boot {
            no_unpack,
            ..files.boot(&image)
        };
        let entry = load(&memory, &boot).unwrap();
        assert_eq!(entry.eip, 0x10_0000);
        assert_eq!(entry.selectors, Some((0x10, 0x18)));
        assert_eq!(text(&memory, MIB, 16), [0x90; 16]);
        let page = text(&memory, entry.esi.into(), 4096);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(page[0x210], 0xff);
        let cmdline = page.u32_at(0x228).unwrap();
        assert_eq!(text(&memory, cmdline.into(), 6), b"quiet\0");
        let initrd = page.u32_at(0x218).unwrap();
        assert_eq!(text(&memory, initrd.into(), 7), b"initrd!");
        assert_eq!(page.u64_at(0x70), Some(layout::RSDP));
        assert_eq!(page[0x1e8], 5);
    }
}

fn multiboot(flags: u32, rest: &[u32]) -> Vec<u8> {
    let mut image = vec![0; 16];
    let sum = 0_u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    for word in [0x1bad_b002, flags, sum].iter().chain(rest) {
        image.extend(word.to_le_bytes());
    }
    image.extend(b"kernel text");
    image
}

#[test]
fn multiboot_flat_with_module() {
    let files = Files::new();
    let memory = GuestMemory::new(16 * MIB).unwrap();
    let kernel = multiboot(
        1 << 16 | 3,
        &[0x20_0010, 0x20_0000, 0, 0x20_8000, 0x20_0030],
    );
    let boot = files.boot(&kernel);
    let entry = load(&memory, &boot).unwrap();
    assert_eq!((entry.eip, entry.eax), (0x20_0030, 0x2bad_b002));
    assert_eq!(text(&memory, 0x20_0000, kernel.len()), kernel);
    let info = text(&memory, entry.ebx.into(), 72);
    assert_eq!(info.u32_at(8), Some(15 * 1024), "KiB above 1 MiB");
    let line = format!("{} quiet\0", boot.kernel.name);
    assert_eq!(
        text(&memory, info.u32_at(16).unwrap().into(), line.len()),
        line.as_bytes()
    );
    assert_eq!(info.u32_at(20), Some(1));
    let module = text(&memory, info.u32_at(24).unwrap().into(), 16);
    assert_eq!(
        text(&memory, module.u32_at(0).unwrap().into(), 7),
        b"initrd!"
    );
    assert_eq!(module.u32_at(4).unwrap() - module.u32_at(0).unwrap(), 7);
    let name = info.u32_at(64).unwrap();
    assert_eq!(text(&memory, name.into(), 6), b"vireo\0");
}

#[test]
fn says_what_is_no_kernel() {
    let files = Files::new();
    let memory = GuestMemory::new(16 * MIB).unwrap();
    let say = |kernel: &[u8]| load(&memory, &files.boot(kernel)).unwrap_err().to_string();
    assert!(
        say(b"#!/bin/sh").contains("kernel: not a kernel"),
        "{}",
        say(b"#!/bin/sh")
    );
    assert!(say(b"").contains("not a kernel"));
    let mut other = elf(b"x");
    other[18] = 183;
    assert!(say(&other).contains("another processor"));
    let mut noteless = elf(b"x");
    noteless[64 + 56] = 0;
    assert!(say(&noteless).contains("PVH"), "{}", say(&noteless));
    assert!(say(&multiboot(1 << 15, &[])).contains("Multiboot"));
}

#[test]
fn says_what_does_not_fit() {
    let files = Files::new();
    let memory = GuestMemory::new(2 * MIB).unwrap();
    let say = |boot: &Boot| load(&memory, boot).unwrap_err().to_string();
    assert!(say(&files.boot(&elf(&vec![0; 3 << 20]))).contains("not fit"));
    let long = Boot {
        cmdline: "x".repeat(20_000),
        ..files.boot(&elf(b"x"))
    };
    assert!(say(&long).contains("20000 bytes"));
    let zero = Boot {
        cmdline: "a\0b".into(),
        ..files.boot(&elf(b"x"))
    };
    assert!(say(&zero).contains("command line"));
    let initrd = Boot {
        initrd: Some(files.named("big", &vec![1; 2 << 20])),
        ..files.boot(&elf(b"x"))
    };
    assert!(say(&initrd).contains("big"), "{}", say(&initrd));
    let mut low = elf(b"x");
    low[64 + 24..64 + 32].copy_from_slice(&0x9_0000_u64.to_le_bytes());
    assert!(say(&files.boot(&low)).contains("boot data"));
    let mut wrap = elf(b"x");
    wrap[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(say(&files.boot(&wrap)).contains("overflows"));
}

#[test]
fn says_what_is_damaged() {
    let files = Files::new();
    let memory = GuestMemory::new(16 * MIB).unwrap();
    for payload in [
        lz4(&elf(&[1; 5000])),
        zstd(&elf(&[1; 5000])),
        gzip(&elf(&[1; 5000])),
        xz(&elf(&[1; 5000])),
    ] {
        let mut cut = bzimage(&payload);
        cut.truncate(cut.len() - 10);
        let error = load(&memory, &files.boot(&cut)).unwrap_err();
        assert!(error.to_string().contains("damaged"), "{error}");
        memory.clear().unwrap();
    }
}

/// Small and quick, good enough to place damage (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        to_index(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32, limit)
    }
}

fn to_index(value: u64, limit: usize) -> usize {
    crate::num::to_usize(value) % limit
}

#[test]
fn survives_truncated_and_mutated_images() {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs()
        | 1;
    println!("seed {seed}");
    let mut random = Random(seed);
    let files = Files::new();
    let memory = GuestMemory::new(4 * MIB).unwrap();
    let kernel = elf(&[7; 3000]);
    let images = [
        kernel.clone(),
        bzimage(&lz4(&kernel)),
        bzimage(&zstd(&kernel)),
        bzimage(&gzip(&kernel)),
        bzimage(&xz(&kernel)),
        multiboot(1 << 16, &[0x20_0010, 0x20_0000, 0, 0x20_8000, 0x20_0030]),
    ];
    for round in 0..600 {
        let mut image = images[round % images.len()].clone();
        if round % 3 == 0 {
            image.truncate(random.below(image.len()));
        }
        for _ in 0..random.below(6) {
            // Headers are hit more often than bodies.
            let reach = if random.below(2) == 0 {
                image.len().min(0x270)
            } else {
                image.len()
            };
            if reach > 0 {
                let at = random.below(reach);
                image[at] = [0, 0xff, 0x7f, 0x80, 1][random.below(5)];
            }
        }
        let mut boot = files.boot(&image);
        boot.no_unpack = random.below(8) == 0;
        // Either outcome is right; a panic or a hang is not.
        drop(load(&memory, &boot));
        memory.clear().unwrap();
    }
}
