//! A machine of 16 MiB with descriptor tables, page tables and exception stubs, for guests of
//! a few bytes.

use std::sync::{Arc, Mutex};

use softcpu::cpuid::Leaf;
use softcpu::state::{Segment, cr0, cr4, efer, gpr, seg};
use softcpu::{Bus, Cpu, Exit, Flow, Machine};

pub const RAM: usize = 16 << 20;
/// Where a guest's code goes.
pub const CODE: u64 = 0x1_0000;
/// Top of its stack.
pub const STACK: u64 = 0x2_0000;
/// Free for data.
pub const DATA: u64 = 0x3_0000;
const GDT: u64 = 0x800;
pub const IDT: u64 = 0x4000;
const STUBS: u64 = 0x5000;
pub const TSS: u64 = 0x6000;
pub const PD: u64 = 0x9000;
/// Page table of the first 2 MiB.
pub const PT: u64 = 0xa000;
pub const PML4: u64 = 0x7000;
pub const PDPT: u64 = 0x8000;

/// Ports that were written.
#[derive(Default)]
pub struct Ports(pub Mutex<Vec<(u16, u32)>>);

impl Bus for Ports {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn port_write(&self, port: u16, data: &[u8]) -> Flow {
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        self.0
            .lock()
            .unwrap()
            .push((port, u32::from_le_bytes(value)));
        if port == 0xf4 {
            Flow::Stop
        } else {
            Flow::Continue
        }
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xa5);
    }
    fn mmio_write(&self, addr: u64, _: &[u8]) -> Flow {
        if addr == 0xf000_0000 {
            Flow::Stop
        } else {
            Flow::Continue
        }
    }
}

pub struct Guest {
    pub cpu: Box<Cpu>,
    pub machine: Arc<Machine>,
    pub ports: Ports,
    ram: *mut u8,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.machine.unmap_memory(0);
        // SAFETY: mapped by `new` with this length; the machine has let go of it.
        unsafe { libc::munmap(self.ram.cast(), RAM) };
    }
}

/// An exception as its stub saw it.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub vector: u64,
    pub code: u64,
    pub rip: u64,
}

pub fn leaves() -> Vec<Leaf> {
    let leaf = |function, index, regs| Leaf {
        function,
        index,
        regs,
    };
    vec![
        leaf(0, None, [7, 0, 0, 0]),
        // Beside the usual: CX16, PCID; FSGSBASE, SMEP, INVPCID, SMAP; LA57.
        leaf(1, None, [0, 0, 1 << 13 | 1 << 17 | 1 << 23, 0x078b_fbff]),
        leaf(7, Some(0), [0, 1 | 1 << 7 | 1 << 10 | 1 << 20, 1 << 16, 0]),
        leaf(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        leaf(
            0x8000_0001,
            None,
            [0, 0, 1, 1 << 11 | 1 << 20 | 1 << 26 | 1 << 29],
        ),
        leaf(0x8000_0008, None, [40, 0, 0, 0]),
    ]
}

/// These tests are compiled twice, the second time with all code translated.
pub const TRANSLATED: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"system_translated");

impl Guest {
    /// In real mode at CODE, segments at 0.
    pub fn real(code: &[u8]) -> Self {
        // SAFETY: a fresh mapping.
        let ram = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RAM,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(ram, libc::MAP_FAILED);
        let ram = ram.cast::<u8>();
        let machine = Machine::new();
        // SAFETY: `drop` unmaps only after the slot is gone.
        unsafe { machine.map_memory(0, 0, RAM as u64, ram, false, true) }.unwrap();
        let mut cpu = Cpu::new(&machine, 0, &leaves());
        if TRANSLATED {
            cpu.translate_after(0);
        }
        cpu.s.seg[seg::CS] = Segment {
            base: CODE,
            limit: 0xffff,
            access: 0x9b,
            selector: (CODE >> 4) as u16,
        };
        cpu.s.rip = 0;
        cpu.s.gpr[gpr::RSP] = 0x8000;
        let guest = Self {
            cpu,
            machine,
            ports: Ports::default(),
            ram,
        };
        guest.put(CODE, code);
        guest
    }

    /// In 64-bit mode at CODE, privilege level 0, all memory mapped to itself: the first
    /// 2 MiB by 4 KiB pages, all open to user mode.
    pub fn long(code: &[u8]) -> Self {
        let mut guest = Self::real(code);
        guest.put64(PML4, PDPT | 7);
        guest.put64(PDPT, PD | 7);
        guest.put64(PDPT + 8 * 3, 0xc000_0087);
        guest.put64(PD, PT | 7);
        for i in 1..RAM as u64 >> 21 {
            guest.put64(PD + 8 * i, i << 21 | 0x87);
        }
        for i in 0..512 {
            guest.put64(PT + 8 * i, i << 12 | 7);
        }
        guest.gdt();
        for vector in 0..32u64 {
            let stub = STUBS + 16 * vector;
            let has_code = matches!(vector, 8 | 10..=14 | 17);
            // push 0 (in place of an error code); push vector; hlt
            let bytes: &[u8] = if has_code { &[] } else { &[0x6a, 0] };
            guest.put(stub, bytes);
            guest.put(stub + bytes.len() as u64, &[0x6a, vector as u8, 0xf4]);
            let low = stub & 0xffff | 0x08 << 16 | 0xee00 << 32 | (stub >> 16) << 48;
            guest.put64(IDT + 16 * vector, low);
            guest.put64(IDT + 16 * vector + 8, 0);
        }
        guest.put64(TSS + 4, STACK + 0x2000);
        // No I/O permission map.
        guest.put(TSS + 102, &[0xff; 2]);
        let s = &mut guest.cpu.s;
        s.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
        s.cr3 = PML4;
        s.cr4 = cr4::PAE | cr4::PGE | cr4::DE;
        s.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        s.seg[seg::CS] = Segment {
            base: 0,
            limit: u32::MAX,
            access: 0xa09b,
            selector: 8,
        };
        guest.flat_data();
        let s = &mut guest.cpu.s;
        s.rip = CODE;
        s.gpr[gpr::RSP] = STACK;
        guest.cpu.state_changed();
        guest
    }

    /// In 32-bit protected mode at CODE without paging.
    pub fn protected(code: &[u8]) -> Self {
        let mut guest = Self::real(code);
        guest.gdt();
        for vector in 0..32u64 {
            let stub = STUBS + 16 * vector;
            let has_code = matches!(vector, 8 | 10..=14 | 17);
            let bytes: &[u8] = if has_code { &[] } else { &[0x6a, 0] };
            guest.put(stub, bytes);
            guest.put(stub + bytes.len() as u64, &[0x6a, vector as u8, 0xf4]);
            let gate = stub & 0xffff | 0x18 << 16 | 0xee00 << 32 | (stub >> 16) << 48;
            guest.put64(IDT + 8 * vector, gate);
        }
        guest.cpu.s.cr0 = cr0::PE | cr0::NE | cr0::ET;
        guest.cpu.s.seg[seg::CS] = Segment {
            base: 0,
            limit: u32::MAX,
            access: 0xc09b,
            selector: 0x18,
        };
        guest.flat_data();
        guest.cpu.s.rip = CODE;
        guest.cpu.s.gpr[gpr::RSP] = STACK;
        guest.cpu.state_changed();
        guest
    }

    fn flat_data(&mut self) {
        for i in [seg::DS, seg::ES, seg::SS, seg::FS, seg::GS] {
            self.cpu.s.seg[i] = Segment {
                base: 0,
                limit: u32::MAX,
                access: 0xc093,
                selector: 0x10,
            };
        }
    }

    /// 8 code64, 0x10 data, 0x18 code32, 0x20 user code64, 0x28 user data, 0x30 small data,
    /// 0x38 TSS (two entries), 0x48 second TSS.
    fn gdt(&mut self) {
        let tss = |base: u64, kind: u64| 0x67 | base << 16 | kind << 40;
        for (i, entry) in [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x0040_9300_0000_00ff,
            tss(TSS, 0x8b),
            0,
            tss(TSS + 0x100, 0x89),
        ]
        .into_iter()
        .enumerate()
        {
            self.put64(GDT + 8 * i as u64, entry);
        }
        self.cpu.s.gdtr.base = GDT;
        self.cpu.s.gdtr.limit = 0x4f;
        self.cpu.s.idtr.base = IDT;
        self.cpu.s.idtr.limit = 0xfff;
        self.cpu.s.tr = Segment {
            base: TSS,
            limit: 0x67,
            access: 0x8b,
            selector: 0x38,
        };
    }

    pub fn put(&self, addr: u64, bytes: &[u8]) {
        assert!(self.machine.memory.write(addr, bytes));
    }

    pub fn put64(&self, addr: u64, value: u64) {
        self.put(addr, &value.to_le_bytes());
    }

    pub fn get64(&self, addr: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.machine.memory.read(addr, &mut bytes));
        u64::from_le_bytes(bytes)
    }

    pub fn run(&mut self) -> Exit {
        self.cpu.run(&self.ports)
    }

    /// Runs to a halt.
    pub fn halt(&mut self) {
        assert_eq!(self.run(), Exit::DeadHalt, "{:x?}", self.cpu.s);
    }

    /// Runs to the halt of an exception's stub (64-bit mode).
    pub fn exception(&mut self) -> Seen {
        self.halt();
        let sp = self.cpu.s.gpr[gpr::RSP];
        Seen {
            vector: self.get64(sp),
            code: self.get64(sp + 8),
            rip: self.get64(sp + 16),
        }
    }

    pub fn rax(&self) -> u64 {
        self.cpu.s.gpr[gpr::RAX]
    }
}
