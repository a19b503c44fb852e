//! What the tests' domains boot.

use std::path::PathBuf;

use crate::Rig;

/// A Debian kernel that `make test` (the generic ones: `make soak`) unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's.
    V6_1,
    /// Debian 12's backport of 13's.
    V6_12,
    /// Debian 12's for 32-bit PCs, with PAE paging.
    I386,
    /// Debian 12's for any PC.
    Generic6_1,
    /// Its backport of 13's.
    Generic6_12,
}

impl Kernel {
    /// Folder with `vmlinuz` and `initrd.img`.
    pub fn folder(self) -> PathBuf {
        let guests = std::env::var_os("VIREO_TEST_GUESTS")
            .map(PathBuf::from)
            .expect("VIREO_TEST_GUESTS is not set: run the tests through `make test`");
        guests.join(match self {
            Self::V6_1 => "linux-image-cloud-amd64",
            Self::V6_12 => "linux-image-6.12-cloud-amd64",
            Self::I386 => "linux-image-686-pae",
            Self::Generic6_1 => "linux-image-amd64",
            Self::Generic6_12 => "linux-image-6.12-amd64",
        })
    }

    /// It has been unpacked.
    pub fn is_there(self) -> bool {
        self.folder().join("vmlinuz").exists()
    }

    /// A whole Debian with systemd as an initramfs, where `make soak` has made one.
    pub fn debian() -> Option<PathBuf> {
        let image = Self::V6_1
            .folder()
            .with_file_name("debian")
            .join("initrd.img");
        image.exists().then_some(image)
    }

    /// What `uname -m` says.
    pub fn machine(self) -> &'static str {
        if self == Self::I386 { "i686" } else { "x86_64" }
    }

    /// What `uname -r` starts with.
    pub fn release(self) -> &'static str {
        match self {
            Self::V6_1 | Self::I386 | Self::Generic6_1 => "6.1.",
            Self::V6_12 | Self::Generic6_12 => "6.12.",
        }
    }
}

/// Domain XML of a Linux guest with a busybox shell on a pty console, on the software CPU.
pub fn linux_guest(name: &str, kernel: Kernel) -> String {
    let folder = kernel.folder();
    let folder = folder.display();
    format!(
        "<domain type='qemu'>\n  <name>{name}</name>\n  <memory unit='MiB'>256</memory>\n  <vcpu>1</vcpu>\n  \
         <os>\n    <type arch='x86_64' machine='q35'>hvm</type>\n    <kernel>{folder}/vmlinuz</kernel>\n    \
         <initrd>{folder}/initrd.img</initrd>\n    <cmdline>console=ttyS0 vireo.hostname={name}</cmdline>\n  </os>\n  \
         <features>\n    <acpi/>\n    <apic/>\n  </features>\n  <devices>\n    <console type='pty'/>\n  </devices>\n</domain>\n"
    )
}

/// Domain XML of a guest of a few bytes that obeys keys typed on its serial console:
/// it prints `TINY`, then echoes; `q` powers off (ACPI S5), `r` resets (port 0xcf9),
/// `f` triple-faults, `p` panics (pvpanic).
pub fn tiny_guest(rig: &Rig, name: &str, virt_type: &str) -> String {
    let kernel = rig.write("tiny.elf", tiny_kernel());
    format!(
        "<domain type='{virt_type}'>\n  <name>{name}</name>\n  <memory unit='MiB'>16</memory>\n  <vcpu>1</vcpu>\n  \
         <os>\n    <type>hvm</type>\n    <kernel>{kernel}</kernel>\n  </os>\n  \
         <features>\n    <acpi/>\n  </features>\n  <devices>\n    <console type='pty'/>\n  </devices>\n</domain>\n"
    )
}

/// A disk from which GRUB boots that kernel with its initramfs; `None` where there are no tools to make one.
pub fn grub_disk(rig: &Rig, kernel: Kernel) -> Option<PathBuf> {
    let tools = ["grub-mkrescue", "xorriso", "mformat"];
    if !tools.iter().all(|tool| crate::which(tool)) {
        return None;
    }
    rig.write(
        "iso/boot/grub/grub.cfg",
        "serial --unit=0\nterminal_input serial\nterminal_output serial\nset timeout=0\n\
         menuentry linux {\n linux /boot/vmlinuz console=ttyS0 quiet\n initrd /boot/initrd.img\n}\n",
    );
    for name in ["vmlinuz", "initrd.img"] {
        let copy = rig.path("iso/boot").join(name);
        std::fs::copy(kernel.folder().join(name), copy).unwrap();
    }
    let image = rig.path("disk.img");
    let made = std::process::Command::new("grub-mkrescue")
        .arg("-o")
        .args([&image, &rig.path("iso")])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    Some(image)
}

/// [`tiny_guest`] with `<panic model='isa'/>`, so that `p` panics, and `on_crash` as given.
pub fn tiny_guest_with_panic_port(
    rig: &Rig,
    name: &str,
    virt_type: &str,
    on_crash: &str,
) -> String {
    tiny_guest(rig, name, virt_type).replace(
        "  <devices>\n",
        &format!("  <on_crash>{on_crash}</on_crash>\n  <devices>\n    <panic model='isa'/>\n"),
    )
}

/// Physical address the tiny kernel is loaded at and entered.
const ENTRY: u32 = 0x10_0000;

/// The tiny kernel as an ELF file with a PVH entry note (32-bit protected mode, flat).
pub fn tiny_kernel() -> Vec<u8> {
    let code = tiny_code();
    let note: Vec<u8> = [
        4u32.to_le_bytes().as_slice(),  // name size
        8u32.to_le_bytes().as_slice(),  // descriptor size
        18u32.to_le_bytes().as_slice(), // XEN_ELFNOTE_PHYS32_ENTRY
        b"Xen\0",
        u64::from(ENTRY).to_le_bytes().as_slice(),
    ]
    .concat();
    let (headers, code_at) = (64 + 2 * 56, 4096usize);
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend_from_slice(&2u16.to_le_bytes()); // executable
    elf.extend_from_slice(&62u16.to_le_bytes()); // x86-64
    elf.extend_from_slice(&1u32.to_le_bytes());
    elf.extend_from_slice(&u64::from(ENTRY).to_le_bytes());
    elf.extend_from_slice(&64u64.to_le_bytes()); // program headers
    elf.extend_from_slice(&0u64.to_le_bytes());
    elf.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    let mut segment = |kind: u32, offset: usize, address: u64, size: usize| {
        elf.extend_from_slice(&kind.to_le_bytes());
        elf.extend_from_slice(&7u32.to_le_bytes());
        for word in [offset as u64, address, address, size as u64, size as u64, 4] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
    };
    segment(1, code_at, u64::from(ENTRY), code.len()); // PT_LOAD
    segment(4, headers, 0, note.len()); // PT_NOTE
    elf.extend_from_slice(&note);
    elf.resize(code_at, 0);
    elf.extend_from_slice(&code);
    elf
}

/// 32-bit code; labels are patched in by hand-counted short jumps, checked by the asserts.
fn tiny_code() -> Vec<u8> {
    let mut code = Code::default();
    for byte in b"TINY\n" {
        code.put_char(*byte);
    }
    let again = code.0.len();
    // Wait for a byte: in al, LSR; test al, 1; pause; jz back.
    code.emit(&[
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0xf3, 0x90, 0x74, 0xf5,
    ]);
    code.emit(&[0x66, 0xba, 0xf8, 0x03, 0xec]); // mov dx, 0x3f8; in al, dx
    // q: ACPI S5 through PM1a_CNT (SLP_TYPa | SLP_EN).
    let value = (5u16 << 10) | 1 << 13;
    let [low, high] = value.to_le_bytes();
    let [port_low, port_high] = 0x604u16.to_le_bytes();
    code.on_key(
        b'q',
        &[
            0x66, 0xba, port_low, port_high, 0x66, 0xb8, low, high, 0x66, 0xef,
        ],
    );
    // r: reset through 0xcf9.
    code.on_key(b'r', &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee]);
    // f: an empty IDT (6 zero bytes on the stack we make below us), then ud2.
    code.on_key(
        b'f',
        &[
            0xbc, 0, 0, 8, 0, 0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b,
        ],
    );
    // p: pvpanic "panicked".
    code.on_key(b'p', &[0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee]);
    // Echo: out 0x3f8, al; jmp again.
    code.emit(&[0x66, 0xba, 0xf8, 0x03, 0xee]);
    let back = i32::try_from(again).unwrap() - i32::try_from(code.0.len() + 5).unwrap();
    code.emit(&[0xe9]);
    code.emit(&back.to_le_bytes());
    code.0
}

#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn emit(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// mov dx, 0x3f8; mov al, byte; out dx, al.
    fn put_char(&mut self, byte: u8) {
        self.emit(&[0x66, 0xba, 0xf8, 0x03, 0xb0, byte, 0xee]);
    }

    /// cmp al, key; jne over; action.
    fn on_key(&mut self, key: u8, action: &[u8]) {
        self.emit(&[0x3c, key, 0x75, u8::try_from(action.len()).unwrap()]);
        self.emit(action);
    }
}
