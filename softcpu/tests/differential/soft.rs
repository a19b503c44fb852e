//! The same cases on the software CPU: 64-bit, ring 3, paging on, with a kernel that consists
//! of one `out` per vector.

use std::sync::Arc;

use softcpu::cpuid::Leaf;
use softcpu::state::{Segment, Table, cr0, cr4, efer, seg};
use softcpu::{Bus, Cpu, Exit, Flow, Machine};

use crate::case::{CODE, DATA, DATA_LEN, DATA_PAGES, Input, Output, XMM, XSAVE_LEN, YMM_HIGH};

/// Where the first 64 KiB of physical memory are for the kernel: in the upper half, where also
/// the host has only its kernel.
const HIGH: u64 = 0xffff_8000_0000_0000;
const RAM_LEN: u64 = 1 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT_KERNEL: u64 = 0x4000;
const PT_CODE: u64 = 0x5000;
const PT_DATA: u64 = 0x6000;
const PDPT_HIGH: u64 = 0x7000;
const PD_HIGH: u64 = 0xf000;
const GDT: u64 = 0x8000;
const IDT: u64 = 0x9000;
const TSS: u64 = 0xa000;
const STUBS: u64 = 0xb000;
const STACK_TOP: u64 = 0xe000;
const CODE_PHYS: u64 = 0x1_0000;
const DATA_PHYS: u64 = 0x2_0000;

/// A vCPU that runs cases.
pub struct Soft {
    cpu: Box<Cpu>,
    machine: Arc<Machine>,
    /// Cases run by translated code so far.
    translated: usize,
}

/// Stops at every `out`: the port is the vector.
struct Ports;

impl Bus for Ports {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, port: u16, _: &[u8]) -> Flow {
        LAST.with(|l| l.set(Some(port)));
        Flow::Stop
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) -> Flow {
        Flow::Continue
    }
}

thread_local! {
    static LAST: std::cell::Cell<Option<u16>> = const { std::cell::Cell::new(None) };
}

fn host_leaves() -> Vec<Leaf> {
    let mut leaves = Vec::new();
    for (function, indices) in [
        (0, 1),
        (1, 1),
        (7, 1),
        (0xd, 3),
        (0x8000_0000, 1),
        (0x8000_0001, 1),
        (0x8000_0008, 1),
    ] {
        for index in 0..indices {
            let r = std::arch::x86_64::__cpuid_count(function, index);
            let mut regs = [r.eax, r.ebx, r.ecx, r.edx];
            let fp = softcpu::simd::host_fp_features();
            match (function, index) {
                (0xd, 1) => regs[0] &= fp.xsave_eax,
                (0x8000_0001, _) => {
                    // Not modelled: XOP, FMA4, TBM, 3DNow!, misaligned SSE.
                    regs[2] &= !(1 << 11 | 1 << 16 | 1 << 21 | 1 << 7);
                    regs[3] &= !(3 << 30);
                }
                _ => {}
            }
            leaves.push(Leaf {
                function,
                index: (indices > 1 || function == 7).then_some(index),
                regs,
            });
        }
    }
    leaves
}

impl Soft {
    pub fn new() -> Self {
        let machine = Machine::new();
        // SAFETY: new anonymous memory that is never unmapped.
        unsafe {
            let host = libc::mmap(
                std::ptr::null_mut(),
                RAM_LEN as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(host, libc::MAP_FAILED);
            machine
                .map_memory(0, 0, RAM_LEN, host.cast(), false, false)
                .expect("a valid slot");
        }
        let cpu = Cpu::new(&machine, 0, &host_leaves());
        let soft = Self {
            cpu,
            machine,
            translated: 0,
        };
        soft.build_kernel();
        soft
    }

    fn put(&self, at: u64, value: u64) {
        assert!(self.machine.memory.write(at, &value.to_le_bytes()));
    }

    fn build_kernel(&self) {
        const USER: u64 = 7;
        const READ_ONLY: u64 = 5;
        const NX: u64 = 1 << 63;
        // Accessed and dirty already.
        const AD: u64 = 0x60;
        self.put(PML4, PDPT | USER);
        self.put(PDPT, PD | USER);
        self.put(PML4 + 8 * 256, PDPT_HIGH | 3);
        self.put(PDPT_HIGH, PD_HIGH | 3);
        self.put(PD_HIGH, PT_KERNEL | 3);
        self.put(PD + 8 * (CODE >> 21), PT_CODE | USER);
        self.put(PD + 8 * (DATA >> 21), PT_DATA | USER);
        for page in 0..16 {
            self.put(PT_KERNEL + 8 * page, page << 12 | 3 | AD);
        }
        self.put(PT_CODE, CODE_PHYS | READ_ONLY | AD);
        self.put(PT_DATA, DATA_PHYS | READ_ONLY | NX | AD);
        for page in 1..DATA_PAGES as u64 {
            self.put(
                PT_DATA + 8 * page,
                (DATA_PHYS + (page << 12)) | USER | NX | AD,
            );
        }
        self.put(GDT + 0x08, 0x00af_9b00_0000_ffff);
        self.put(GDT + 0x10, 0x00cf_9300_0000_ffff);
        self.put(GDT + 0x20, 0x00cf_fb00_0000_ffff);
        self.put(GDT + 0x28, 0x00cf_f300_0000_ffff);
        self.put(GDT + 0x30, 0x00af_fb00_0000_ffff);
        for vector in 0..32 {
            let stub = HIGH + STUBS + vector * 16;
            assert!(
                self.machine
                    .memory
                    .write(stub - HIGH, &[0xe6, vector as u8, 0xf4, 0xeb, 0xfd])
            );
            // A 64-bit interrupt gate, reachable from ring 3 for INT3.
            let dpl = if vector == 3 { 3 } else { 0 };
            let low = stub & 0xffff
                | 0x08 << 16
                | (0x8e00 | dpl << 13) << 32
                | (stub >> 16 & 0xffff) << 48;
            self.put(IDT + 16 * vector, low);
            self.put(IDT + 16 * vector + 8, stub >> 32);
        }
        self.put(TSS + 4, HIGH + STACK_TOP);
        let code = [0xcc; 4096];
        assert!(self.machine.memory.write(CODE_PHYS, &code));
    }

    /// Runs one case by decoded operations.
    pub fn run(&mut self, data: &[u8; DATA_LEN], input: &Input) -> Result<Output, String> {
        assert!(self.machine.memory.write(CODE_PHYS, &input.code));
        // Drops code decoded from what was there before.
        self.cpu.translate_after(u32::MAX);
        self.begin(data, input);
        self.cpu.state_changed();
        self.finish()
    }

    /// Runs one case by translated code, for the second time: then memory has been found and
    /// blocks are linked. Every other case by the code that older hosts get.
    pub fn run_translated(
        &mut self,
        data: &[u8; DATA_LEN],
        input: &Input,
    ) -> Result<Output, String> {
        assert!(self.machine.memory.write(CODE_PHYS, &input.code));
        self.cpu.translate_after(0);
        self.cpu.translate_for_oldest_host(self.translated % 2 == 1);
        self.translated += 1;
        self.begin(data, input);
        self.cpu.state_changed();
        self.finish()?;
        self.begin(data, input);
        self.cpu.registers_changed();
        self.finish()
    }

    /// The state and memory a case begins with.
    fn begin(&mut self, data: &[u8; DATA_LEN], input: &Input) {
        assert!(self.machine.memory.write(DATA_PHYS, data));
        let s = &mut self.cpu.s;
        *s = softcpu::state::CpuState::default();
        s.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        s.cr3 = PML4;
        s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        s.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        s.xcr0 = 7;
        s.gdtr = Table {
            base: HIGH + GDT,
            limit: 0x37,
        };
        s.idtr = Table {
            base: HIGH + IDT,
            limit: 0x1ff,
        };
        s.tr = Segment {
            base: HIGH + TSS,
            limit: 0x67,
            access: 0x8b,
            selector: 0x18,
        };
        for (i, segment) in s.seg.iter_mut().enumerate() {
            let shape = input.shape;
            let (base, limit, access, selector) = match i {
                seg::CS if shape.segmented => {
                    let big = if shape.bits == 32 { 0x40fb } else { 0xfb };
                    (CODE, 0xfff, big, 7)
                }
                seg::SS if shape.segmented => {
                    let big = if shape.stack == 32 { 0x40f3 } else { 0xf3 };
                    (DATA, DATA_LEN as u32 - 1, big, 0x17)
                }
                seg::DS | seg::ES if shape.segmented => (DATA, DATA_LEN as u32 - 1, 0xf3, 0xf),
                seg::CS if shape.bits == 64 => (0, u32::MAX, 0xa0fb, 0x33),
                seg::CS => (0, u32::MAX, 0xc0fb, 0x23),
                _ => (0, u32::MAX, 0xc0f3, 0x2b),
            };
            *segment = Segment {
                base,
                limit,
                access,
                selector,
            };
        }
        s.cpl = 3;
        s.gpr = input.gpr;
        s.rip = input.shape.code();
        s.flags = input.rflags & !softcpu::state::rflags::STATUS | 2;
        s.set_status(input.rflags);
        s.fp.legacy[..464].copy_from_slice(&input.xsave[..464]);
        s.fp.ymm_high
            .as_flattened_mut()
            .copy_from_slice(&input.xsave[YMM_HIGH]);
    }

    /// Runs it to its end.
    fn finish(&mut self) -> Result<Output, String> {
        LAST.with(|l| l.set(None));
        let exit = self.cpu.run(&Ports);
        self.cpu.sync_fp();
        let vector = match (exit, LAST.with(std::cell::Cell::get)) {
            (Exit::Stopped, Some(vector)) => u64::from(vector),
            (exit, _) => return Err(format!("{exit:?} at {:#x}", self.cpu.s.rip)),
        };
        let s = &self.cpu.s;
        let mut frame = [0; 48];
        assert!(
            self.machine
                .memory
                .read(s.gpr[4].wrapping_sub(HIGH), &mut frame),
            "RSP {:#x}",
            s.gpr[4]
        );
        let word = |i: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&frame[8 * i..8 * i + 8]);
            u64::from_le_bytes(bytes)
        };
        let coded = matches!(vector, 8 | 10..=14 | 17);
        let at = usize::from(coded);
        let mut out = Output {
            gpr: s.gpr,
            rip: word(at),
            rflags: word(at + 2),
            vector,
            error: if coded { word(0) } else { 0 },
            cr2: s.cr2,
            xsave: [0; XSAVE_LEN],
            data: [0; DATA_LEN],
        };
        out.gpr[4] = word(at + 3);
        out.xsave[..512].copy_from_slice(&s.fp.legacy);
        out.xsave[XMM].copy_from_slice(&s.fp.legacy[XMM]);
        out.xsave[YMM_HIGH].copy_from_slice(s.fp.ymm_high.as_flattened());
        out.xsave[512] = 7;
        assert!(self.machine.memory.read(DATA_PHYS, &mut out.data));
        Ok(out)
    }
}
