//! Single instructions through `decode_fp` and its handlers, without the block loop.

use iced_x86::{Decoder, DecoderOptions, OpKind, Register};

use super::{decode_fp, host_fp_features};
use crate::cpu::Cpu;
use crate::cpuid::Leaf;
use crate::exception::{Exception, Fallible};
use crate::machine::Machine;
use crate::memory::PAGE_SIZE;
use crate::op::Op;
use crate::state::{Segment, cr0, cr4, efer, seg};

/// Guest memory in bytes: flat from 0, no paging.
const RAM: u64 = 16 * PAGE_SIZE;
/// Where code is said to be.
const RIP: u64 = 0x1000;
/// Where RSI points.
const DATA: u64 = 0x4000;

struct Guest {
    cpu: Box<Cpu>,
    machine: std::sync::Arc<Machine>,
}

fn leaves() -> Vec<Leaf> {
    let f = host_fp_features();
    let leaf = |function, index, regs| Leaf {
        function,
        index,
        regs,
    };
    vec![
        leaf(1, None, [0, 0, f.l1_ecx, f.l1_edx]),
        leaf(7, Some(0), [0, f.l7_ebx, f.l7_ecx, 0]),
        leaf(0xd, Some(1), [f.xsave_eax, 0, 0, 0]),
        leaf(0x8000_0001, None, [0, 0, f.e1_ecx, f.e1_edx]),
    ]
}

unsafe fn never(_: &mut Cpu, _: *const Op) {}

impl Guest {
    fn new() -> Self {
        let machine = Machine::new();
        // SAFETY: a new anonymous mapping, leaked: it outlives every use.
        unsafe {
            let host = libc::mmap(
                std::ptr::null_mut(),
                RAM as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(host, libc::MAP_FAILED);
            machine
                .map_memory(0, 0, RAM, host.cast(), false, false)
                .expect("a valid slot");
        }
        let mut cpu = Cpu::new(&machine, 0, &leaves());
        cpu.s.cr0 = cr0::PE | cr0::NE;
        cpu.s.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.s.efer = efer::LMA;
        cpu.s.seg[seg::CS] = Segment {
            access: 0xa09b,
            selector: 0x10,
            ..Segment::default()
        };
        cpu.s.xcr0 = 7;
        cpu.s.fp.legacy[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        cpu.s.fp.legacy[4] = 0;
        cpu.s.gpr[6] = DATA;
        cpu.slots = machine.memory.snapshot();
        cpu.state_changed();
        Self { cpu, machine }
    }

    /// Runs one instruction; `None`: it doesn't exist.
    fn try_run(&mut self, bytes: &[u8]) -> Option<Fallible<()>> {
        let insn = Decoder::with_ip(64, bytes, RIP, DecoderOptions::NONE).decode();
        assert_eq!(insn.len(), bytes.len(), "{bytes:02x?}");
        let fp = decode_fp(&self.cpu, &insn, bytes)?;
        let reg = |r: Register| match r {
            Register::None => Op::NO_REG,
            r if r.is_gpr() => r.number() as u8 * 8,
            _ => Op::NO_REG,
        };
        let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        let op = Op {
            f: never,
            a: fp.a,
            b: fp.b,
            base: if memory {
                reg(insn.memory_base())
            } else {
                Op::NO_REG
            },
            index: if memory {
                reg(insn.memory_index())
            } else {
                Op::NO_REG
            },
            ea: (seg::DS as u8) << 2 | insn.memory_index_scale().trailing_zeros() as u8,
            len: bytes.len() as u8,
            off: 0,
            disp: insn.memory_displacement64() as i64,
            imm: fp.data,
        };
        self.cpu.s.rip = RIP + bytes.len() as u64;
        Some((fp.handler)(&mut self.cpu, &op))
    }

    fn run(&mut self, bytes: &[u8]) -> Fallible<()> {
        self.try_run(bytes)
            .unwrap_or_else(|| panic!("{bytes:02x?} is unknown"))
    }

    fn ok(&mut self, bytes: &[u8]) {
        assert_eq!(self.run(bytes), Ok(()), "{bytes:02x?}");
    }

    fn write(&self, addr: u64, data: &[u8]) {
        assert!(self.machine.memory.write(addr, data));
    }

    fn read<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.machine.memory.read(addr, &mut data));
        data
    }

    fn set_xmm(&mut self, n: usize, value: u128) {
        self.cpu.s.fp.legacy[160 + 16 * n..][..16].copy_from_slice(&value.to_le_bytes());
    }

    fn xmm(&self, n: usize) -> u128 {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.cpu.s.fp.legacy[160 + 16 * n..][..16]);
        u128::from_le_bytes(bytes)
    }

    fn high(&self, n: usize) -> u128 {
        u128::from_le_bytes(self.cpu.s.fp.ymm_high[n])
    }
}

const A: u128 = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100;

#[test]
fn sse_registers_and_memory() {
    let mut g = Guest::new();
    g.set_xmm(1, A);
    g.set_xmm(9, 1);
    g.cpu.s.fp.ymm_high[9] = [7; 16];
    g.ok(&[0x66, 0x44, 0x0f, 0xfc, 0xc9]); // paddb xmm9, xmm1
    assert_eq!(g.xmm(9), A + 1);
    assert_eq!(
        g.high(9),
        u128::from_ne_bytes([7; 16]),
        "legacy SSE keeps the upper half"
    );
    g.ok(&[0xf3, 0x44, 0x0f, 0x7f, 0x4e, 0x03]); // movdqu [rsi+3], xmm9
    assert_eq!(u128::from_le_bytes(g.read(DATA + 3)), A + 1);
    g.ok(&[0xf3, 0x0f, 0x6f, 0x56, 0x03]); // movdqu xmm2, [rsi+3]
    assert_eq!(g.xmm(2), A + 1);
    // Again, now through the TLB, and over the end of the page.
    g.ok(&[0xf3, 0x0f, 0x6f, 0x56, 0x03]);
    assert_eq!(g.xmm(2), A + 1);
    g.cpu.s.gpr[6] = DATA + PAGE_SIZE - 8;
    g.ok(&[0xf3, 0x0f, 0x7f, 0x16]); // movdqu [rsi], xmm2
    assert_eq!(u128::from_le_bytes(g.read(DATA + PAGE_SIZE - 8)), A + 1);
    g.ok(&[0xf3, 0x0f, 0x6f, 0x1e]); // movdqu xmm3, [rsi]
    assert_eq!(g.xmm(3), A + 1);
    // movdqa wants alignment.
    assert_eq!(g.run(&[0x66, 0x0f, 0x6f, 0x1e]), Err(Exception::GP0));
}

#[test]
fn general_registers_and_flags() {
    let mut g = Guest::new();
    g.cpu.s.gpr[11] = 0x8899_aabb_ccdd_eeff;
    g.ok(&[0x66, 0x49, 0x0f, 0x6e, 0xc3]); // movq xmm0, r11
    assert_eq!(g.xmm(0), 0x8899_aabb_ccdd_eeff);
    g.cpu.s.gpr[10] = u64::MAX;
    g.ok(&[0x66, 0x44, 0x0f, 0xd7, 0xd0]); // pmovmskb r10d, xmm0
    assert_eq!(g.cpu.s.gpr[10], 0xff);
    g.set_xmm(1, u128::from(1.5_f64.to_bits()));
    g.set_xmm(2, u128::from(1.5_f64.to_bits()));
    g.cpu.s.set_status(0);
    g.ok(&[0x66, 0x0f, 0x2f, 0xca]); // comisd xmm1, xmm2
    assert_eq!(g.cpu.s.rflags() & 0x8d5, 0x40);
    g.ok(&[0xf2, 0x48, 0x0f, 0x2d, 0xd9]); // cvtsd2si rbx, xmm1
    assert_eq!(g.cpu.s.gpr[3], 2);
    assert_eq!(g.cpu.s.fp.mxcsr(), 0x1fa0, "inexact");
    // pcmpistri xmm0, xmm0, 0x18: ECX and flags.
    g.ok(&[0x66, 0x0f, 0x3a, 0x63, 0xc0, 0x18]);
    assert_eq!(g.cpu.s.gpr[1], 16);
}

#[test]
fn unmasked_simd_exceptions_leave_the_destination() {
    let mut g = Guest::new();
    g.set_xmm(0, u128::from(1.0_f64.to_bits()));
    g.set_xmm(1, 0);
    g.cpu.s.fp.set_mxcsr(0x1f80 & !0x200);
    let divide = [0xf2, 0x0f, 0x5e, 0xc1]; // divsd xmm0, xmm1
    assert_eq!(g.run(&divide), Err(Exception::XM));
    assert_eq!(g.xmm(0), u128::from(1.0_f64.to_bits()));
    assert_eq!(g.cpu.s.fp.mxcsr(), 0x1d84);
    g.cpu.s.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(g.run(&divide), Err(Exception::UD));
    g.cpu.s.fp.set_mxcsr(0x1f80);
    g.ok(&divide);
    assert_eq!(g.xmm(0), u128::from(f64::INFINITY.to_bits()));
}

#[test]
fn x87_and_its_exceptions() {
    let mut g = Guest::new();
    g.write(DATA, &2.25_f64.to_le_bytes());
    g.ok(&[0xdd, 0x06]); // fld qword [rsi]
    g.ok(&[0xd8, 0xc0]); // fadd st, st
    g.ok(&[0xdd, 0x5e, 0x08]); // fstp qword [rsi+8]
    assert_eq!(f64::from_le_bytes(g.read(DATA + 8)), 4.5);
    g.ok(&[0xd9, 0xe8]); // fld1
    g.ok(&[0xd9, 0xee]); // fldz
    g.cpu.sync_fp();
    assert_eq!(g.cpu.s.fp.legacy[4], 0xc0);
    // Divide by zero unmasked: recorded, delivered at the next waiting instruction.
    g.write(DATA + 32, &0x37b_u16.to_le_bytes());
    g.ok(&[0xd9, 0x6e, 0x20]); // fldcw [rsi+32]
    g.ok(&[0xd8, 0xf9]); // fdivr st, st(1)
    g.cpu.s.gpr[0] = u64::MAX;
    g.ok(&[0xdf, 0xe0]); // fnstsw ax
    assert_eq!(g.cpu.s.gpr[0], 0xffff_ffff_ffff_b084);
    assert_eq!(g.run(&[0xd9, 0xe8]), Err(Exception::MF));
    assert_eq!(g.run(&[0x9b]), Err(Exception::MF));
    g.ok(&[0xd9, 0x76, 0x40]); // fnstenv [rsi+64]
    let environment: [u8; 28] = g.read(DATA + 64);
    assert_eq!(
        &environment[12..16],
        &(RIP as u32).to_le_bytes(),
        "FIP is the guest's"
    );
    g.ok(&[0xdb, 0xe2]); // fnclex
    g.ok(&[0x9b]);
    g.cpu.s.cr0 |= cr0::TS;
    assert_eq!(g.run(&[0xd9, 0xe8]), Err(Exception::NM));
}

#[test]
fn mmx_shares_the_x87_registers() {
    let mut g = Guest::new();
    g.cpu.s.gpr[0] = 0x1122_3344_5566_7788;
    g.ok(&[0x48, 0x0f, 0x6e, 0xd0]); // movq mm2, rax
    g.ok(&[0x0f, 0xfc, 0xd2]); // paddb mm2, mm2
    g.ok(&[0x48, 0x0f, 0x7e, 0xd3]); // movq rbx, mm2
    assert_eq!(g.cpu.s.gpr[3], 0x2244_6688_aacc_ee10);
    g.cpu.sync_fp();
    assert_eq!(g.cpu.s.fp.legacy[4], 0xff);
    assert_eq!(g.cpu.s.fp.legacy[32 + 32 + 8..][..2], [0xff, 0xff]);
    g.ok(&[0x0f, 0x77]); // emms
    g.cpu.sync_fp();
    assert_eq!(g.cpu.s.fp.legacy[4], 0);
    // maskmovq mm2, mm2 to [rdi]
    g.cpu.s.gpr[7] = DATA;
    g.ok(&[0x0f, 0xf7, 0xd2]);
    assert_eq!(g.read(DATA), [0, 0xee, 0xcc, 0xaa, 0x88, 0, 0, 0]);
}

#[test]
fn fxsave_and_fxrstor() {
    let mut g = Guest::new();
    g.set_xmm(15, A);
    g.ok(&[0xd9, 0xeb]); // fldpi
    g.ok(&[0x48, 0x0f, 0xae, 0x06]); // fxsave64 [rsi]
    assert_eq!(u128::from_le_bytes(g.read(DATA + 160 + 240)), A);
    assert_eq!(g.read(DATA + 8), RIP.to_le_bytes());
    g.ok(&[0xdb, 0xe3]); // fninit
    g.set_xmm(15, 0);
    g.ok(&[0x48, 0x0f, 0xae, 0x0e]); // fxrstor64 [rsi]
    assert_eq!(g.xmm(15), A);
    g.ok(&[0xdd, 0x5e, 0x08]); // fstp qword [rsi+8]
    assert_eq!(f64::from_le_bytes(g.read(DATA + 8)), std::f64::consts::PI);
    g.write(DATA + 24, &[0xff; 4]);
    assert_eq!(g.run(&[0x48, 0x0f, 0xae, 0x0e]), Err(Exception::GP0));
    // Into an area on which an access would fault: nothing is changed.
    g.cpu.s.gpr[6] = DATA + 8;
    assert_eq!(g.run(&[0x48, 0x0f, 0xae, 0x06]), Err(Exception::GP0));
}

#[test]
fn avx_zeroes_and_gathers() {
    if !host_fp_features().avx2() {
        println!("left out: needs AVX2");
        return;
    }
    let mut g = Guest::new();
    g.set_xmm(1, A);
    g.cpu.s.fp.ymm_high[1] = A.to_le_bytes();
    g.ok(&[0xc5, 0x75, 0xfc, 0xc9]); // vpaddb ymm9, ymm1, ymm1
    assert_eq!(g.xmm(9), g.high(9));
    assert_ne!(g.high(9), 0);
    g.ok(&[0xc5, 0x71, 0xfc, 0xc9]); // vpaddb xmm9, xmm1, xmm1
    assert_eq!(g.high(9), 0);
    for i in 0..64_u32 {
        g.write(DATA + u64::from(i) * 4, &(i * 3).to_le_bytes());
    }
    g.set_xmm(2, 0x0000_0005_0000_0004_0000_0003_0000_0002);
    g.set_xmm(3, 0xffff_ffff_0000_0000_8000_0000_ffff_ffff);
    g.set_xmm(4, u128::MAX);
    // vpgatherdd xmm4, [rsi+xmm2*4], xmm3
    g.ok(&[0xc4, 0xe2, 0x61, 0x90, 0x24, 0x96]);
    assert_eq!(g.xmm(4), 0x0000_000f_ffff_ffff_0000_0009_0000_0006);
    assert_eq!(g.xmm(3), 0);
    // vzeroall
    g.ok(&[0xc5, 0xfc, 0x77]);
    assert_eq!((g.xmm(4), g.high(1)), (0, 0));
    // XSAVE and XRSTOR of it all.
    g.set_xmm(7, A);
    g.cpu.s.fp.ymm_high[7] = A.to_le_bytes();
    g.cpu.s.gpr[0] = 7;
    g.cpu.s.gpr[2] = 0;
    g.ok(&[0x48, 0x0f, 0xae, 0x26]); // xsave64 [rsi]
    g.ok(&[0xc5, 0xfc, 0x77]);
    g.ok(&[0x48, 0x0f, 0xae, 0x2e]); // xrstor64 [rsi]
    assert_eq!((g.xmm(7), g.high(7)), (A, A));
    g.cpu.s.xcr0 = 3;
    assert_eq!(g.run(&[0xc5, 0xfc, 0x77]), Err(Exception::UD));
}

#[test]
fn instructions_cpuid_does_not_offer_are_unknown() {
    let mut g = Guest::new();
    let fma = [0xc4, 0xe2, 0xf1, 0x98, 0xc2];
    let paddb = [0x66, 0x0f, 0xfc, 0xc1];
    g.cpu.set_cpuid(&[Leaf {
        function: 1,
        index: None,
        regs: [0, 0, 0, 1 << 25 | 1 << 26],
    }]);
    assert!(g.try_run(&fma).is_none());
    assert!(g.try_run(&paddb).is_some());
    assert!(g.try_run(&[0xd9, 0xe8]).is_none(), "no FPU");
}

#[test]
fn xsave_leaves_out_what_is_initial_and_xrstor_puts_it_back() {
    let mut g = Guest::new();
    g.cpu.s.gpr[0] = 7;
    g.cpu.s.gpr[2] = 0;
    g.set_xmm(3, A);
    g.write(DATA, &[0xee; 832]);
    g.write(DATA + 512, &[0; 64]);
    g.ok(&[0x48, 0x0f, 0xc7, 0x26]); // xsavec64 [rsi]
    assert_eq!(
        u64::from_le_bytes(g.read(DATA + 512)),
        2,
        "XSTATE_BV: only SSE"
    );
    assert_eq!(
        u64::from_le_bytes(g.read(DATA + 520)),
        1 << 63 | 7,
        "XCOMP_BV"
    );
    assert_eq!(g.read::<16>(DATA + 32), [0xee; 16], "x87 is initial");
    assert_eq!(g.read::<16>(DATA + 576), [0xee; 16], "AVX is initial");
    g.set_xmm(3, 0);
    g.ok(&[0xd9, 0xe8]); // fld1
    g.cpu.s.fp.ymm_high[3] = [1; 16];
    g.ok(&[0x48, 0x0f, 0xae, 0x2e]); // xrstor64 [rsi]
    assert_eq!((g.xmm(3), g.high(3)), (A, 0));
    assert_eq!(g.cpu.s.fp.legacy[4], 0, "the x87 stack is empty again");
    // Only what is asked for, and the rest of XSTATE_BV stays.
    g.cpu.s.gpr[0] = 1;
    g.write(DATA + 512, &6_u64.to_le_bytes());
    g.write(DATA + 520, &[0; 8]);
    g.ok(&[0xd9, 0xe8]); // fld1
    g.ok(&[0x48, 0x0f, 0xae, 0x26]); // xsave64 [rsi]
    assert_eq!(u64::from_le_bytes(g.read(DATA + 512)), 7);
}

#[test]
fn xrstor_refuses_bad_areas() {
    let xrstor = [0x48, 0x0f, 0xae, 0x2e];
    let mut g = Guest::new();
    g.cpu.s.gpr[0] = 7;
    g.cpu.s.gpr[2] = 0;
    let area = |g: &Guest, state_bv: u64, comp_bv: u64, reserved: u64| {
        g.write(DATA, &[0; 832]);
        for (i, word) in [state_bv, comp_bv, reserved].iter().enumerate() {
            g.write(DATA + 512 + 8 * i as u64, &word.to_le_bytes());
        }
    };
    for (state_bv, comp_bv, reserved) in [
        (8, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (0, 1 << 63 | 8, 0),
        (4, 1 << 63 | 3, 0),
        (0, 1 << 63 | 7, 1),
    ] {
        area(&g, state_bv, comp_bv, reserved);
        assert_eq!(
            g.run(&xrstor),
            Err(Exception::GP0),
            "{state_bv} {comp_bv:x} {reserved}"
        );
    }
    area(&g, 0, 0, 0);
    g.write(DATA + 24, &0x1_0000_u32.to_le_bytes());
    assert_eq!(g.run(&xrstor), Err(Exception::GP0), "MXCSR");
    g.cpu.s.gpr[6] = DATA + 16;
    assert_eq!(g.run(&xrstor), Err(Exception::GP0), "alignment");
    g.cpu.s.cr4 &= !cr4::OSXSAVE;
    assert_eq!(g.run(&xrstor), Err(Exception::UD));
}

#[test]
fn fnsave_and_frstor() {
    let mut g = Guest::new();
    g.ok(&[0xd9, 0xeb]); // fldpi
    g.ok(&[0xd9, 0xe8]); // fld1
    g.ok(&[0xdd, 0x36]); // fnsave [rsi]
    g.cpu.sync_fp();
    assert_eq!(g.cpu.s.fp.legacy[..5], [0x7f, 3, 0, 0, 0]);
    let image: [u8; 28] = g.read(DATA);
    assert_eq!(
        &image[..12],
        &[
            0x7f, 3, 0xff, 0xff, 0, 0x30, 0xff, 0xff, 0xff, 0x0f, 0xff, 0xff
        ]
    );
    g.ok(&[0xdd, 0x26]); // frstor [rsi]
    g.ok(&[0xde, 0xc1]); // faddp
    g.ok(&[0xdd, 0x1e]); // fstp qword [rsi]
    assert_eq!(f64::from_le_bytes(g.read(DATA)), std::f64::consts::PI + 1.0);
    // The 14-byte form.
    g.ok(&[0x66, 0xd9, 0x36]); // fnstenv [rsi]
    assert_eq!(g.read::<6>(DATA)[..2], [0x7f, 3]);
    assert_eq!(g.read::<2>(DATA + 6), (RIP as u16).to_le_bytes());
    g.ok(&[0x66, 0xd9, 0x26]); // fldenv [rsi]
}

#[test]
fn impossible_mxcsr_of_a_restored_state_does_no_harm() {
    let mut g = Guest::new();
    g.cpu.s.fp.set_mxcsr(u32::MAX);
    g.ok(&[0x0f, 0x58, 0xc0]); // addps xmm0, xmm0
    g.cpu.s.fp.legacy[..24].fill(0xff);
    g.cpu.s.fp.legacy[0] = 0x7f;
    g.ok(&[0xdb, 0xe2]); // fnclex
    g.ok(&[0xd9, 0xe8]); // fld1
}

#[test]
fn endless_new_instructions_are_slow_not_big() {
    let mut g = Guest::new();
    g.set_xmm(1, 0x0000_0003_0000_0002_0000_0001_0000_0000);
    for imm in 0..=255_u8 {
        for registers in 0..=255_u8 {
            // pshufd xmm, xmm, imm
            let rex = 0x40 | (registers >> 5 & 4) | (registers >> 3 & 1);
            let modrm = 0xc0 | (registers >> 4 & 7) << 3 | registers & 7;
            let bytes = [0x66, rex, 0x0f, 0x70, modrm, imm];
            let insn = Decoder::with_ip(64, &bytes, RIP, DecoderOptions::NONE).decode();
            assert!(decode_fp(&g.cpu, &insn, &bytes).is_some());
        }
    }
    g.ok(&[0x66, 0x0f, 0x70, 0xd1, 0x1b]); // pshufd xmm2, xmm1, 0x1b
    g.ok(&[0x66, 0x44, 0x0f, 0x70, 0xf9, 0xff]); // pshufd xmm15, xmm1, 0xff
    assert_eq!(g.xmm(2), 0x0000_0000_0000_0001_0000_0002_0000_0003);
    assert_eq!(g.xmm(15), 0x0000_0003_0000_0003_0000_0003_0000_0003);
    // One that is surely new.
    g.ok(&[0x66, 0x0f, 0x3a, 0x0f, 0xd1, 0x04]); // palignr xmm2, xmm1, 4
    assert_eq!(
        g.xmm(2),
        0x0000_0000_0000_0003_0000_0002_0000_0001 | 3 << 96
    );
}
