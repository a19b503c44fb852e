//! A vCPU's whole state, between KVM's structs and ours.

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, Msrs, Xsave, kvm_debugregs, kvm_dtable, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::Shared;
use super::ioctl::os;
use crate::{Error, Events, Regs, Result, RunState, Segment, Sregs, Table, VcpuState};

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
/// Bytes of `kvm_xsave` without its tail.
const XSAVE_BASE: usize = size_of::<kvm_xsave>();
/// `KVM_X86_SHADOW_INT_STI`: an interrupt shadow is restored as that of STI.
const SHADOW_STI: u8 = 2;

pub(super) fn get(fd: &VcpuFd, shared: &Shared) -> Result<VcpuState> {
    // First: it makes KVM act on an INIT or SIPI that has arrived.
    let mp_state = os("KVM_GET_MP_STATE", fd.get_mp_state())?.mp_state;
    let run_state = match mp_state {
        KVM_MP_STATE_RUNNABLE => RunState::Runnable,
        KVM_MP_STATE_HALTED => RunState::Halted,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
            RunState::WaitForSipi
        }
        other => {
            let message = format!("KVM reports the vCPU in a state we do not know: {other}");
            return Err(Error::Invalid(message));
        }
    };
    let mut debug = [0; 6];
    if shared.has_debugregs {
        let regs = os("KVM_GET_DEBUGREGS", fd.get_debug_regs())?;
        debug[..4].copy_from_slice(&regs.db);
        debug[4] = regs.dr6;
        debug[5] = regs.dr7;
    }
    let xcr0 = if shared.has_xcrs {
        let xcrs = os("KVM_GET_XCRS", fd.get_xcrs())?;
        let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
        xcrs.xcrs[..count]
            .iter()
            .find(|x| x.xcr == 0)
            .map_or(1, |x| x.value)
    } else {
        1
    };
    let sregs = os("KVM_GET_SREGS", fd.get_sregs())?;
    let events = os("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?;
    let lapic = os("KVM_GET_LAPIC", fd.get_lapic())?;
    Ok(VcpuState {
        regs: regs_from(&os("KVM_GET_REGS", fd.get_regs())?),
        sregs: sregs_from(&sregs),
        debug,
        xsave: get_xsave(fd, shared)?,
        xcr0,
        msrs: get_msrs(fd, &shared.msrs)?,
        apic: lapic.regs.iter().map(|&b| b.cast_unsigned()).collect(),
        run_state,
        events: events_from(&events),
    })
}

pub(super) fn set(fd: &VcpuFd, shared: &Shared, state: &VcpuState) -> Result<()> {
    let mp_state = match state.run_state {
        RunState::Runnable => KVM_MP_STATE_RUNNABLE,
        RunState::Halted => KVM_MP_STATE_HALTED,
        RunState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    // Running first: KVM takes pending events only in that state.
    let runnable = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    os("KVM_SET_MP_STATE", fd.set_mp_state(runnable))?;
    os("KVM_SET_REGS", fd.set_regs(&regs_to(&state.regs)))?;
    // The APIC's mode (in `sregs`) must be known before its registers.
    os("KVM_SET_SREGS", fd.set_sregs(&sregs_to(&state.sregs)))?;
    if shared.has_xcrs {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0] = kvm_xcr {
            xcr: 0,
            value: state.xcr0,
            ..Default::default()
        };
        os("KVM_SET_XCRS", fd.set_xcrs(&xcrs))?;
    }
    set_xsave(fd, shared, &state.xsave)?;
    if shared.has_debugregs {
        let [db0, db1, db2, db3, dr6, dr7] = state.debug;
        let regs = kvm_debugregs {
            db: [db0, db1, db2, db3],
            dr6,
            dr7,
            ..Default::default()
        };
        os("KVM_SET_DEBUGREGS", fd.set_debug_regs(&regs))?;
    }
    let mut lapic = kvm_lapic_state::default();
    if state.apic.len() != lapic.regs.len() {
        return Err(Error::Invalid(format!(
            "a local APIC's state is {} bytes, not {}",
            lapic.regs.len(),
            state.apic.len()
        )));
    }
    for (to, from) in lapic.regs.iter_mut().zip(&state.apic) {
        *to = from.cast_signed();
    }
    os("KVM_SET_LAPIC", fd.set_lapic(&lapic))?;
    // After the APIC: its timer's mode decides whether a deadline is taken.
    set_msrs(fd, &state.msrs)?;
    let events = events_to(&state.events);
    os("KVM_SET_VCPU_EVENTS", fd.set_vcpu_events(&events))?;
    os(
        "KVM_SET_MP_STATE",
        fd.set_mp_state(kvm_mp_state { mp_state }),
    )
}

fn get_xsave(fd: &VcpuFd, shared: &Shared) -> Result<Vec<u8>> {
    let mut area = new_xsave(shared.xsave_size)?;
    if shared.xsave_size > 0 {
        // SAFETY: the area has the size KVM_CAP_XSAVE2 gave for this VM; this process asks
        // for no dynamic XSTATE feature, which would enlarge it.
        os("KVM_GET_XSAVE2", unsafe { fd.get_xsave2(&mut area) })?;
    } else {
        let xsave = os("KVM_GET_XSAVE", fd.get_xsave())?;
        // SAFETY: only the fixed part is written; the length is not changed.
        unsafe { area.as_mut_fam_struct() }.xsave.region = xsave.region;
    }
    let fixed = area.as_fam_struct_ref().xsave.region;
    let words = fixed.iter().chain(area.as_slice());
    Ok(words.flat_map(|word| word.to_le_bytes()).collect())
}

fn set_xsave(fd: &VcpuFd, shared: &Shared, bytes: &[u8]) -> Result<()> {
    let mut area = new_xsave(shared.xsave_size)?;
    let tail = XSAVE_BASE + area.as_slice().len() * 4;
    if bytes.get(tail..).is_some_and(|b| b.iter().any(|&b| b != 0)) {
        return Err(Error::Invalid(
            "the saved XSAVE area holds more than this host's processor".to_owned(),
        ));
    }
    let mut words = bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    });
    // SAFETY: only the fixed part is written; the length is not changed.
    let fixed = unsafe { area.as_mut_fam_struct() };
    for (to, from) in fixed.xsave.region.iter_mut().zip(words.by_ref()) {
        *to = from;
    }
    for (to, from) in area.as_mut_slice().iter_mut().zip(words) {
        *to = from;
    }
    // SAFETY: the area is as large as KVM takes it to be (see `get_xsave`).
    os("KVM_SET_XSAVE", unsafe { fd.set_xsave2(&area) })
}

fn new_xsave(size: usize) -> Result<Xsave> {
    Xsave::new(size.saturating_sub(XSAVE_BASE).div_ceil(4))
        .map_err(|_| Error::Invalid(format!("KVM wants an XSAVE area of {size} bytes")))
}

fn get_msrs(fd: &VcpuFd, list: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut values = Vec::with_capacity(list.len());
    let mut rest = list;
    while !rest.is_empty() {
        let count = rest.len().min(KVM_MAX_MSR_ENTRIES);
        let done = read_msrs(fd, &rest[..count], &mut values)?;
        // KVM stops at one this vCPU does not have: it is not part of the state.
        rest = &rest[if done < count { done + 1 } else { done }..];
    }
    Ok(values)
}

/// Reads the first of `list` up to one that fails; how many.
fn read_msrs(fd: &VcpuFd, list: &[u32], values: &mut Vec<(u32, u64)>) -> Result<usize> {
    let entries: Vec<_> = list
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut msrs = msrs_from(&entries)?;
    let done = os("KVM_GET_MSRS", fd.get_msrs(&mut msrs))?;
    let read = msrs.as_slice().iter().take(done);
    values.extend(read.map(|msr| (msr.index, msr.data)));
    Ok(done)
}

fn set_msrs(fd: &VcpuFd, list: &[(u32, u64)]) -> Result<()> {
    let mut order: Vec<_> = list.to_vec();
    // The deadline counts in terms of the TSC.
    order.sort_by_key(|&(index, _)| match index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    let entries: Vec<_> = order
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    let mut rest = entries.as_slice();
    while let Some(first) = rest.first() {
        let count = rest.len().min(KVM_MAX_MSR_ENTRIES);
        let done = match fd.set_msrs(&msrs_from(&rest[..count])?) {
            Ok(done) => done,
            Err(error) => return os("KVM_SET_MSRS", Err(error)),
        };
        if done == 0 {
            refuse_unless_same(fd, first)?;
            rest = &rest[1..];
        } else {
            rest = &rest[done..];
        }
    }
    Ok(())
}

/// An MSR that KVM would not set matters only if its value would have changed something.
fn refuse_unless_same(fd: &VcpuFd, wanted: &kvm_msr_entry) -> Result<()> {
    let mut now = Vec::new();
    read_msrs(fd, &[wanted.index], &mut now)?;
    let same = match now.first() {
        Some(&(_, value)) => value == wanted.data,
        None => wanted.data == 0,
    };
    if same {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "this host's KVM cannot set MSR {:#x} to {:#x}",
        wanted.index, wanted.data
    )))
}

fn msrs_from(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| Error::Invalid("too many MSRs".to_owned()))
}

fn regs_from(r: &kvm_regs) -> Regs {
    Regs {
        rax: r.rax,
        rcx: r.rcx,
        rdx: r.rdx,
        rbx: r.rbx,
        rsp: r.rsp,
        rbp: r.rbp,
        rsi: r.rsi,
        rdi: r.rdi,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        rip: r.rip,
        rflags: r.rflags,
    }
}

fn regs_to(r: &Regs) -> kvm_regs {
    kvm_regs {
        rax: r.rax,
        rcx: r.rcx,
        rdx: r.rdx,
        rbx: r.rbx,
        rsp: r.rsp,
        rbp: r.rbp,
        rsi: r.rsi,
        rdi: r.rdi,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        rip: r.rip,
        rflags: r.rflags,
    }
}

fn segment_from(s: &kvm_segment) -> Segment {
    let bit = |value: u8, shift: u32| u32::from(value & 1) << shift;
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        access: u32::from(s.type_ & 15)
            | bit(s.s, 4)
            | u32::from(s.dpl & 3) << 5
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15)
            | bit(s.unusable, 16),
    }
}

fn segment_to(s: &Segment) -> kvm_segment {
    let bits = |shift: u32, mask: u32| (s.access >> shift & mask) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: bits(0, 15),
        s: bits(4, 1),
        dpl: bits(5, 3),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        unusable: bits(16, 1),
        padding: 0,
    }
}

fn sregs_from(s: &kvm_bindings::kvm_sregs) -> Sregs {
    let table = |t: &kvm_dtable| Table {
        base: t.base,
        limit: t.limit,
    };
    Sregs {
        cs: segment_from(&s.cs),
        ds: segment_from(&s.ds),
        es: segment_from(&s.es),
        fs: segment_from(&s.fs),
        gs: segment_from(&s.gs),
        ss: segment_from(&s.ss),
        tr: segment_from(&s.tr),
        ldt: segment_from(&s.ldt),
        gdt: table(&s.gdt),
        idt: table(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
    }
}

fn sregs_to(s: &Sregs) -> kvm_bindings::kvm_sregs {
    let table = |t: &Table| kvm_dtable {
        base: t.base,
        limit: t.limit,
        ..Default::default()
    };
    kvm_bindings::kvm_sregs {
        cs: segment_to(&s.cs),
        ds: segment_to(&s.ds),
        es: segment_to(&s.es),
        fs: segment_to(&s.fs),
        gs: segment_to(&s.gs),
        ss: segment_to(&s.ss),
        tr: segment_to(&s.tr),
        ldt: segment_to(&s.ldt),
        gdt: table(&s.gdt),
        idt: table(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        // Interrupts in flight go by KVM_SET_VCPU_EVENTS.
        interrupt_bitmap: [0; 4],
    }
}

fn events_from(e: &kvm_vcpu_events) -> Events {
    let exception = (e.exception.injected != 0 || e.exception.pending != 0).then(|| {
        let code = (e.exception.has_error_code != 0).then_some(e.exception.error_code);
        (e.exception.nr, code)
    });
    Events {
        exception,
        interrupt: (e.interrupt.injected != 0).then_some(e.interrupt.nr),
        interrupt_shadow: e.interrupt.shadow != 0,
        // One that was injected but not delivered is delivered again, and masks then.
        nmi_pending: e.nmi.pending != 0 || e.nmi.injected != 0,
        nmi_masked: e.nmi.masked != 0 && e.nmi.injected == 0,
    }
}

fn events_to(e: &Events) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some((vector, code)) = e.exception {
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = u8::from(code.is_some());
        events.exception.error_code = code.unwrap_or(0);
    }
    if let Some(vector) = e.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
    }
    if e.interrupt_shadow {
        events.interrupt.shadow = SHADOW_STI;
    }
    events.nmi.pending = u8::from(e.nmi_pending);
    events.nmi.masked = u8::from(e.nmi_masked);
    events
}
