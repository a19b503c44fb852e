//! Boots a vmlinux with a PVH note on the software CPU, its serial port on standard output:
//! `boot VMLINUX [INITRD [CMDLINE]]`.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use softcpu::attention::Attention;
use softcpu::cpuid::Leaf;
use softcpu::state::{gpr, seg};
use softcpu::{Bus, Cpu, Exit, Flow, Machine};

#[derive(Default)]
struct Board {
    out: AtomicU64,
    stop: std::sync::Mutex<Vec<u8>>,
}

impl Bus for Board {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(match port {
            0x3fd => 0x60,
            0x3f8..=0x3ff => 0,
            _ => 0xff,
        });
    }
    fn port_write(&self, port: u16, data: &[u8]) -> Flow {
        if port == 0x3f8 {
            self.out.fetch_add(1, Ordering::Relaxed);
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(&data[..1]);
            let _ = out.flush();
            if let Ok(mut line) = self.stop.lock() {
                line.push(data[0]);
                if line.ends_with(b"Run /init") || line.ends_with(b"# ") {
                    return Flow::Stop;
                }
            }
        }
        if port == 0xf4 || port == 0x64 && data[0] == 0xfe {
            return Flow::Stop;
        }
        Flow::Continue
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) -> Flow {
        Flow::Continue
    }
}

fn leaf(function: u32, index: Option<u32>, regs: [u32; 4]) -> Leaf {
    Leaf {
        function,
        index,
        regs,
    }
}

fn leaves() -> Vec<Leaf> {
    let text = |s: &[u8; 4]| u32::from_le_bytes(*s);
    let edx1 = 1
        | 1 << 3
        | 1 << 4
        | 1 << 5
        | 1 << 6
        | 1 << 8
        | 1 << 9
        | 1 << 11
        | 1 << 12
        | 1 << 13
        | 1 << 15
        | 1 << 16
        | 1 << 19
        | 1 << 23
        | 1 << 24
        | 1 << 25
        | 1 << 26;
    let ecx1 =
        1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | 1 << 24 | 1 << 30 | 1 << 31;
    vec![
        leaf(0, None, [7, text(b"Genu"), text(b"ntel"), text(b"ineI")]),
        leaf(1, None, [0x0006_06a6, 0x0001_0800, ecx1, edx1]),
        leaf(7, Some(0), [0, 1 | 1 << 9 | 1 << 18, 0, 1 << 4 | 1 << 29]),
        leaf(
            0x4000_0000,
            None,
            [0x4000_0001, text(b"KVMK"), text(b"VMKV"), text(b"M\0\0\0")],
        ),
        leaf(
            0x4000_0001,
            None,
            [softcpu::paravirt::feature::ALL, 0, 0, 0],
        ),
        leaf(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        leaf(
            0x8000_0001,
            None,
            [0, 0, 1, 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29],
        ),
        leaf(0x8000_0007, None, [0, 0, 0, 1 << 8]),
        leaf(0x8000_0008, None, [40 | 48 << 8, 0, 0, 0]),
    ]
}

fn u(data: &[u8], at: usize, n: usize) -> u64 {
    let mut b = [0; 8];
    b[..n].copy_from_slice(&data[at..at + n]);
    u64::from_le_bytes(b)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let elf = std::fs::read(&args[1]).expect("kernel");
    let initrd = args
        .get(2)
        .filter(|s| !s.is_empty())
        .map(|f| std::fs::read(f).expect("initrd"));
    let cmdline = args
        .get(3)
        .cloned()
        .unwrap_or("console=ttyS0 earlyprintk=serial,ttyS0 quiet panic=-1".into());
    let ram = 256u64 << 20;
    // SAFETY: a fresh anonymous mapping.
    let host = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            ram as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    }
    .cast::<u8>();
    let start = Instant::now();
    let machine = Machine::new();
    // SAFETY: mapped until the process ends.
    unsafe { machine.map_memory(0, 0, ram, host, false, false) }.expect("map");
    let mem = &machine.memory;
    let mut entry = 0;
    let phoff = u(&elf, 32, 8) as usize;
    for i in 0..u(&elf, 56, 2) as usize {
        let p = phoff + i * 56;
        let (kind, off, paddr, size) = (
            u(&elf, p, 4),
            u(&elf, p + 8, 8) as usize,
            u(&elf, p + 24, 8),
            u(&elf, p + 32, 8) as usize,
        );
        if kind == 1 {
            assert!(mem.write(paddr, &elf[off..off + size]));
        } else if kind == 4 {
            let mut at = off;
            while at + 12 <= off + size {
                let (n, d, t) = (
                    u(&elf, at, 4) as usize,
                    u(&elf, at + 4, 4) as usize,
                    u(&elf, at + 8, 4),
                );
                let desc = at + 12 + n.next_multiple_of(4);
                if t == 18 && &elf[at + 12..at + 15] == b"Xen" {
                    entry = u(&elf, desc, 4);
                }
                at = desc + d.next_multiple_of(4);
            }
        }
    }
    println!("entry {entry:#x}");
    let mut info = vec![0u8; 56];
    let put = |v: &mut [u8], at: usize, x: u64, n: usize| {
        v[at..at + n].copy_from_slice(&x.to_le_bytes()[..n])
    };
    put(&mut info, 0, 0x336e_c578, 4);
    put(&mut info, 4, 1, 4);
    if let Some(initrd) = &initrd {
        let at = (ram - initrd.len() as u64) & !0xfff;
        assert!(mem.write(at, initrd));
        let mut module = vec![0u8; 32];
        put(&mut module, 0, at, 8);
        put(&mut module, 8, initrd.len() as u64, 8);
        assert!(mem.write(0x6100, &module));
        put(&mut info, 12, 1, 4);
        put(&mut info, 16, 0x6100, 8);
    }
    let mut line = cmdline.into_bytes();
    line.push(0);
    assert!(mem.write(0x7000, &line));
    put(&mut info, 24, 0x7000, 8);
    put(&mut info, 40, 0x6200, 8);
    put(&mut info, 48, 2, 4);
    let mut map = vec![0u8; 48];
    put(&mut map, 8, 0x9_f000, 8);
    put(&mut map, 16, 1, 4);
    put(&mut map, 24, 0x10_0000, 8);
    put(&mut map, 32, ram - 0x10_0000, 8);
    put(&mut map, 40, 1, 4);
    assert!(mem.write(0x6200, &map));
    assert!(mem.write(0x6000, &info));

    let mut cpu = Cpu::new(&machine, 0, &leaves());
    for (i, access) in [
        (seg::CS, 0xc09b),
        (seg::DS, 0xc093),
        (seg::ES, 0xc093),
        (seg::SS, 0xc093),
    ] {
        cpu.s.seg[i].base = 0;
        cpu.s.seg[i].limit = u32::MAX;
        cpu.s.seg[i].access = access;
    }
    cpu.s.cr0 = 0x11;
    cpu.s.rip = entry;
    cpu.s.gpr[gpr::RBX] = 0x6000;
    cpu.state_changed();
    let board = Board::default();
    let attention = cpu.attention.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(2));
            attention.raise(Attention::KICK);
        }
    });
    let limit: u64 = std::env::var("LIMIT")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(60);
    let exit = loop {
        let exit = cpu.run(&board);
        if exit != Exit::Kicked && exit != Exit::DeadHalt {
            break exit;
        }
        eprintln!(
            "[{:.1}s, CPU {:.2}s, rip {:#x}{}]",
            start.elapsed().as_secs_f64(),
            cpu_seconds(),
            cpu.s.rip,
            if cpu.s.halted { " halted" } else { "" }
        );
        if start.elapsed().as_secs() > limit {
            break exit;
        }
    };
    let rss = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let rss = rss.lines().find(|l| l.starts_with("VmHWM")).unwrap_or("");
    println!(
        "\n{exit:?} after {:.2}s, CPU {:.2}s, rip {:#x}, {rss}, {cpu:?}",
        start.elapsed().as_secs_f64(),
        cpu_seconds(),
        cpu.s.rip
    );
}

fn cpu_seconds() -> f64 {
    // SAFETY: fills a local of the right type.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let s = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    s(usage.ru_utime) + s(usage.ru_stime)
}
