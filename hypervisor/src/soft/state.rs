//! A vCPU's whole state, between the software CPU's structs and ours.

use softcpu::attention::Attention;
use softcpu::paravirt::msr as pv;
use softcpu::state::{CoreMsrs, CpuState, FpState, seg};
use softcpu::{Cpu, MACHINE_CHECK_BANKS, host_tsc};

use crate::{Error, Events, Regs, Result, RunState, Segment, Sregs, Table, VcpuState};

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
/// XSTATE_BV: x87, SSE, AVX.
const X87_SSE: u64 = 3;
const AVX: u64 = 4;
const LEGACY: usize = 512;
const HEADER: usize = 64;
const YMM_HIGH: usize = 256;

pub(super) fn get(cpu: &Cpu) -> VcpuState {
    let s = &cpu.s;
    let now = host_tsc();
    VcpuState {
        regs: regs_from(s),
        sregs: sregs_from(cpu),
        debug: [s.dr[0], s.dr[1], s.dr[2], s.dr[3], s.dr6, s.dr7],
        xsave: xsave_from(&s.fp, s.xcr0),
        xcr0: s.xcr0,
        msrs: msrs_from(cpu),
        apic: cpu.apic.save(now),
        run_state: match (s.waiting_for_sipi, s.halted) {
            (true, _) => RunState::WaitForSipi,
            (false, true) => RunState::Halted,
            (false, false) => RunState::Runnable,
        },
        events: Events {
            exception: cpu
                .injected()
                .map(|e| (e.vector, e.has_code.then_some(e.code))),
            interrupt: None,
            interrupt_shadow: s.shadow && s.shadow_rip == s.rip,
            nmi_pending: cpu.attention.get() & Attention::NMI != 0,
            nmi_masked: s.nmi_masked,
        },
    }
}

pub(super) fn set(cpu: &mut Cpu, state: &VcpuState) -> Result<()> {
    // Everything that can be refused first.
    let fp = xsave_to(&state.xsave)?;
    let mut next = cpu.s.clone();
    let mut own = OwnMsrs::default();
    next.msr = CoreMsrs::default();
    for &(index, value) in &state.msrs {
        set_msr(&mut next, &mut own, index, value)?;
    }
    next.fp = fp;
    next.xcr0 = state.xcr0;
    let [dr0, dr1, dr2, dr3, dr6, dr7] = state.debug;
    next.dr = [dr0, dr1, dr2, dr3];
    next.dr6 = dr6;
    next.dr7 = dr7;
    regs_to(&mut next, &state.regs);
    sregs_to(&mut next, &state.sregs);
    next.waiting_for_sipi = state.run_state == RunState::WaitForSipi;
    next.halted = state.run_state == RunState::Halted;
    next.shadow = state.events.interrupt_shadow;
    next.shadow_rip = next.rip;
    next.nmi_masked = state.events.nmi_masked;

    if let Some(value) = own.tsc {
        next.tsc_offset = cpu.machine.tsc_offset_for(value);
    }
    cpu.s = next;
    cpu.pv.system_time = own.system_time;
    cpu.pv.wall_clock = own.wall_clock;
    cpu.pv.steal.msr = own.steal_time;
    cpu.pv.eoi = softcpu::paravirt::PvEoi::at(own.eoi);
    let now = host_tsc();
    cpu.apic.load(&state.apic, state.sregs.apic_base, now);
    cpu.apic.set_tsc_offset(cpu.s.tsc_offset, now);
    cpu.apic.set_tsc_deadline(own.deadline, now);
    cpu.apic.set_cr8(state.sregs.cr8);
    if let Some(vector) = state.events.interrupt {
        // Accepted but not delivered: it goes back to where it was taken from.
        cpu.apic.retract(vector);
    }
    if state.events.nmi_pending {
        cpu.attention.raise(Attention::NMI);
    } else {
        cpu.attention.clear(Attention::NMI);
    }
    cpu.restore_pdptes();
    cpu.state_changed();
    cpu.inject(state.events.exception);
    Ok(())
}

/// MSRs that are not in `CoreMsrs`.
#[derive(Debug, Default)]
struct OwnMsrs {
    tsc: Option<u64>,
    deadline: u64,
    system_time: u64,
    wall_clock: u64,
    steal_time: u64,
    eoi: u64,
}

/// MTRRs of fixed ranges (Intel SDM vol. 3, 12.11.2.2), in the order of `mtrr_fixed`.
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
const MTRR_VARIABLE: u32 = 0x200;

/// A core MSR's place.
fn core_msr(m: &mut CoreMsrs, index: u32) -> Option<&mut u64> {
    Some(match index {
        0x3b => &mut m.tsc_adjust,
        0x48 => &mut m.spec_ctrl,
        0x174 => &mut m.sysenter_cs,
        0x175 => &mut m.sysenter_esp,
        0x176 => &mut m.sysenter_eip,
        0x17a => &mut m.mcg_status,
        0x17b => &mut m.mcg_ctl,
        0x1a0 => &mut m.misc_enable,
        0x1d9 => &mut m.debugctl,
        0x277 => &mut m.pat,
        0x2ff => &mut m.mtrr_def_type,
        0xda0 => &mut m.xss,
        0xc000_0081 => &mut m.star,
        0xc000_0082 => &mut m.lstar,
        0xc000_0083 => &mut m.cstar,
        0xc000_0084 => &mut m.sfmask,
        0xc000_0102 => &mut m.kernel_gs_base,
        0xc000_0103 => &mut m.tsc_aux,
        MTRR_VARIABLE..0x210 => &mut m.mtrr_variable[(index - MTRR_VARIABLE) as usize],
        _ if MACHINE_CHECK_BANKS.contains(&index) => {
            let at = (index - MACHINE_CHECK_BANKS.start) as usize;
            &mut m.mc[at / 4][at % 4]
        }
        _ => {
            let slot = MTRR_FIXED.iter().position(|&fixed| fixed == index)?;
            &mut m.mtrr_fixed[slot]
        }
    })
}

/// All indices `core_msr` knows.
fn core_indices() -> impl Iterator<Item = u32> {
    [
        0x3b,
        0x48,
        0x174,
        0x175,
        0x176,
        0x17a,
        0x17b,
        0x1a0,
        0x1d9,
        0x277,
        0x2ff,
        0xda0,
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084,
        0xc000_0102,
        0xc000_0103,
    ]
    .into_iter()
    .chain(MTRR_VARIABLE..0x210)
    .chain(MTRR_FIXED)
    .chain(MACHINE_CHECK_BANKS)
}

/// MSRs that another backend saves but that are its processor's identity or switched off by
/// what this backend's CPUID offers: no state.
fn inert(index: u32) -> bool {
    matches!(
        index,
        0x34 | 0x3a | 0x8b | 0x9e | 0xce | 0x10a | 0x140 | 0x345 | 0x480
            ..=0x493 | 0xc001_0015 | 0xc001_1029 | 0x4b56_4d05
    )
}

fn msrs_from(cpu: &Cpu) -> Vec<(u32, u64)> {
    let mut core = cpu.s.msr;
    let mut list: Vec<(u32, u64)> = core_indices()
        .filter_map(|index| core_msr(&mut core, index).map(|value| (index, *value)))
        .collect();
    list.extend([
        (TSC, cpu.tsc()),
        (TSC_DEADLINE, cpu.apic.tsc_deadline()),
        (pv::WALL_CLOCK_NEW, cpu.pv.wall_clock),
        (pv::SYSTEM_TIME_NEW, cpu.pv.system_time),
        (pv::STEAL_TIME, cpu.pv.steal.msr),
        (pv::EOI, cpu.pv.eoi.msr),
    ]);
    list
}

fn set_msr(s: &mut CpuState, own: &mut OwnMsrs, index: u32, value: u64) -> Result<()> {
    match index {
        TSC => own.tsc = Some(value),
        TSC_DEADLINE => own.deadline = value,
        // The old and the new name of the same register.
        pv::WALL_CLOCK | pv::WALL_CLOCK_NEW => own.wall_clock = value,
        pv::SYSTEM_TIME | pv::SYSTEM_TIME_NEW => own.system_time = value,
        pv::STEAL_TIME => own.steal_time = value,
        pv::EOI => own.eoi = value,
        _ => match core_msr(&mut s.msr, index) {
            Some(place) => *place = value,
            None if value == 0 || inert(index) => {}
            None => {
                return Err(Error::Invalid(format!(
                    "the software CPU has no MSR {index:#x} to set to {value:#x}"
                )));
            }
        },
    }
    Ok(())
}

fn xsave_from(fp: &FpState, xcr0: u64) -> Vec<u8> {
    let mut area = Vec::with_capacity(LEGACY + HEADER + YMM_HIGH);
    area.extend(fp.legacy);
    let mut header = fp.header;
    header[0] = X87_SSE | xcr0 & AVX;
    header[1] = 0;
    area.extend(header.iter().flat_map(|word| word.to_le_bytes()));
    area.extend(fp.ymm_high.iter().flatten());
    area
}

fn xsave_to(area: &[u8]) -> Result<FpState> {
    let mut fp = FpState::default();
    let Some((legacy, rest)) = area.split_first_chunk::<LEGACY>() else {
        return Err(Error::Invalid(format!(
            "an XSAVE area is at least {} bytes, not {}",
            LEGACY + HEADER,
            area.len()
        )));
    };
    let mut components = X87_SSE;
    if let Some((bits, _)) = rest.split_first_chunk::<8>() {
        components = u64::from_le_bytes(*bits);
    }
    if components & !(X87_SSE | AVX) != 0 {
        return Err(Error::Invalid(format!(
            "the software CPU has no XSAVE components {:#x}",
            components & !(X87_SSE | AVX)
        )));
    }
    let reset = fp.legacy;
    fp.legacy = *legacy;
    if components & 1 == 0 {
        // In its initial state; the area may hold anything. FCW is then 0x37f.
        fp.legacy[..24].copy_from_slice(&reset[..24]);
        fp.legacy[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        fp.legacy[4] = 0;
        fp.legacy[32..160].fill(0);
    }
    if components & 2 == 0 {
        fp.legacy[160..416].fill(0);
    }
    if components & AVX != 0
        && let Some(ymm) = rest.get(HEADER..HEADER + YMM_HIGH)
    {
        let (rows, _) = ymm.as_chunks::<16>();
        fp.ymm_high.copy_from_slice(rows);
    }
    fp.header[0] = X87_SSE | components & AVX;
    Ok(fp)
}

fn regs_from(s: &CpuState) -> Regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = s.gpr;
    Regs {
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: s.rip,
        rflags: (s.rflags() & !stale_resume_flag(s)) | 2,
    }
}

/// RF, where it holds nothing off: processors clear it after every instruction, the software
/// CPU only where it could matter.
fn stale_resume_flag(s: &CpuState) -> u64 {
    const ENABLED_BREAKPOINTS: u64 = 0xff;
    if s.dr7 & ENABLED_BREAKPOINTS == 0 {
        softcpu::state::rflags::RF
    } else {
        0
    }
}

fn regs_to(s: &mut CpuState, r: &Regs) {
    s.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    s.rip = r.rip;
    s.flags = r.rflags & !softcpu::state::rflags::STATUS | 2;
    s.set_status(r.rflags);
}

fn segment_from(s: &softcpu::state::Segment) -> Segment {
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        access: s.access,
    }
}

fn segment_to(s: &Segment) -> softcpu::state::Segment {
    softcpu::state::Segment {
        base: s.base,
        limit: s.limit,
        access: s.access & 0x1_f0ff,
        selector: s.selector,
    }
}

fn sregs_from(cpu: &Cpu) -> Sregs {
    let s = &cpu.s;
    let table = |t: &softcpu::state::Table| Table {
        base: t.base,
        limit: t.limit,
    };
    Sregs {
        cs: segment_from(&s.seg[seg::CS]),
        ds: segment_from(&s.seg[seg::DS]),
        es: segment_from(&s.seg[seg::ES]),
        fs: segment_from(&s.seg[seg::FS]),
        gs: segment_from(&s.seg[seg::GS]),
        ss: segment_from(&s.seg[seg::SS]),
        tr: segment_from(&s.tr),
        ldt: segment_from(&s.ldtr),
        gdt: table(&s.gdtr),
        idt: table(&s.idtr),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: cpu.apic.cr8(),
        efer: s.efer,
        apic_base: cpu.apic.base(),
    }
}

fn sregs_to(s: &mut CpuState, r: &Sregs) {
    let table = |t: &Table| softcpu::state::Table {
        base: t.base,
        limit: t.limit,
    };
    for (index, from) in [
        (seg::CS, &r.cs),
        (seg::DS, &r.ds),
        (seg::ES, &r.es),
        (seg::FS, &r.fs),
        (seg::GS, &r.gs),
        (seg::SS, &r.ss),
    ] {
        s.seg[index] = segment_to(from);
    }
    s.tr = segment_to(&r.tr);
    s.ldtr = segment_to(&r.ldt);
    s.gdtr = table(&r.gdt);
    s.idtr = table(&r.idt);
    s.cr0 = r.cr0;
    s.cr2 = r.cr2;
    s.cr3 = r.cr3;
    s.cr4 = r.cr4;
    s.efer = r.efer;
    // As on hardware, the privilege level is SS's (Intel SDM vol. 3, 24.3.1.2).
    s.cpl = if s.v8086() {
        3
    } else if s.protected() {
        s.seg[seg::SS].dpl()
    } else {
        0
    };
}
