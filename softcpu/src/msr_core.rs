//! Model-specific registers that are the CPU core's own (Intel SDM vol. 4).

use crate::cpu::{Cpu, host_tsc};
use crate::exception::{Exception, Fallible};
use crate::msr;
use crate::state::{CoreMsrs, MC_BANKS, cr0, efer, seg};

const TSC: u32 = 0x10;
const SPEC_CTRL: u32 = 0x48;
const PRED_CMD: u32 = 0x49;
const TSC_ADJUST: u32 = 0x3b;
const MTRR_CAP: u32 = 0xfe;
const ARCH_CAPABILITIES: u32 = 0x10a;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MCG_CTL: u32 = 0x17b;
/// First register of the first machine-check bank (Intel SDM vol. 3, 16.3.2); four to a bank.
const MC0: u32 = 0x400;
/// The banks, a global control register, software error recovery: what QEMU's guests see. No
/// machine check ever comes.
pub const MCG_CAP_VALUE: u64 = MC_BANKS as u64 | 1 << 8 | 1 << 24;
const MISC_ENABLE: u32 = 0x1a0;
const DEBUGCTL: u32 = 0x1d9;
const PAT: u32 = 0x277;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const XSS: u32 = 0xda0;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;
/// Platform and microcode identification, which guests read without asking.
const PLATFORM_ID: u32 = 0x17;
const UCODE_REV: u32 = 0x8b;
const UCODE_WRITE: u32 = 0x79;
const FLUSH_CMD: u32 = 0x10b;
const P5_MC_ADDR: u32 = 0;
const P5_MC_TYPE: u32 = 1;
const OSVW_LENGTH: u32 = 0xc001_0140;
const OSVW_STATUS: u32 = 0xc001_0141;
/// CPUID.7.0:EDX bits that come with IA32_SPEC_CTRL: IBRS, STIBP, SSBD.
const SPEC_CTRL_BITS: u32 = 1 << 26 | 1 << 27 | 1 << 31;
/// IA32_DEBUGCTL: LBR (nothing is recorded), BTF; the rest of the first 16 has to do with what
/// is not there and may be set.
const DEBUGCTL_BITS: u64 = 0xffff;
const FEATURE_CONTROL: u32 = 0x3a;
const PERF_STATUS: u32 = 0x198;
const LAST_BRANCH: [u32; 4] = [0x1db, 0x1dc, 0x1dd, 0x1de];

/// Number of variable-range MTRRs.
const MTRR_VARIABLE: usize = 8;

/// Not affected by Meltdown, SSB, MDS, TAA, the MMIO, branch history, gather and register file
/// flaws and their kin, and with enhanced IBRS, which needs no more than to be switched on
/// (Intel SDM vol. 4, table 2-2): what a guest does against them would only cost time here.
const ARCH_CAPABILITIES_VALUE: u64 = {
    let bits = [0, 1, 3, 4, 5, 6, 8, 13, 14, 15, 20, 24, 26, 27, 62];
    let mut value = 0;
    let mut i = 0;
    while i < bits.len() {
        value |= 1 << bits[i];
        i += 1;
    }
    value
};

fn fixed_mtrr(index: u32) -> Option<usize> {
    match index {
        0x250 => Some(0),
        0x258 | 0x259 => Some((index - 0x258 + 1) as usize),
        0x268..=0x26f => Some((index - 0x268 + 3) as usize),
        _ => None,
    }
}

fn variable_mtrr(index: u32) -> Option<usize> {
    (0x200..0x200 + 2 * MTRR_VARIABLE as u32)
        .contains(&index)
        .then(|| (index - 0x200) as usize)
}

/// The machine-check banks' registers.
pub const MACHINE_CHECK_BANKS: std::ops::Range<u32> = MC0..MC0 + 4 * MC_BANKS as u32;

/// Bank and register of a machine-check bank's MSR.
fn bank(index: u32) -> Option<(usize, usize)> {
    let at = index.checked_sub(MC0)? as usize;
    MACHINE_CHECK_BANKS
        .contains(&index)
        .then_some((at / 4, at % 4))
}

/// The plain storage of an MSR that needs no more than that.
fn storage(msr: &mut CoreMsrs, index: u32) -> Option<&mut u64> {
    Some(match index {
        STAR => &mut msr.star,
        SFMASK => &mut msr.sfmask,
        SYSENTER_CS => &mut msr.sysenter_cs,
        TSC_AUX => &mut msr.tsc_aux,
        MISC_ENABLE => &mut msr.misc_enable,
        DEBUGCTL => &mut msr.debugctl,
        MCG_STATUS => &mut msr.mcg_status,
        MCG_CTL => &mut msr.mcg_ctl,
        _ => {
            if let Some(i) = fixed_mtrr(index) {
                &mut msr.mtrr_fixed[i]
            } else if let Some((bank, register)) = bank(index) {
                &mut msr.mc[bank][register]
            } else {
                &mut msr.mtrr_variable[variable_mtrr(index)?]
            }
        }
    })
}

/// An MSR that holds a linear address.
fn address(msr: &mut CoreMsrs, index: u32) -> Option<&mut u64> {
    Some(match index {
        LSTAR => &mut msr.lstar,
        CSTAR => &mut msr.cstar,
        SYSENTER_ESP => &mut msr.sysenter_esp,
        SYSENTER_EIP => &mut msr.sysenter_eip,
        KERNEL_GS_BASE => &mut msr.kernel_gs_base,
        _ => return None,
    })
}

/// Whether the vCPU's CPUID offers what the register belongs to.
fn offered(cpu: &Cpu, index: u32) -> bool {
    let f = &cpu.features;
    match index {
        STAR | SFMASK | LSTAR | CSTAR => f.syscall(),
        SYSENTER_CS | SYSENTER_ESP | SYSENTER_EIP => f.sep(),
        FS_BASE | GS_BASE | KERNEL_GS_BASE => f.long_mode(),
        TSC_AUX => f.rdtscp() || f.rdpid(),
        PAT => f.pat(),
        MCG_CAP | MCG_STATUS | MCG_CTL => f.mca(),
        _ if bank(index).is_some() => f.mca(),
        MTRR_CAP | MTRR_DEF_TYPE => f.mtrr(),
        SPEC_CTRL => {
            let intel = SPEC_CTRL_BITS & f.l7_edx != 0;
            intel || f.ibrs() || f.amd_stibp() || f.amd_ssbd()
        }
        PRED_CMD => f.l7_edx >> 26 & 1 != 0 || f.ibpb(),
        FLUSH_CMD => f.l7_edx >> 28 & 1 != 0,
        ARCH_CAPABILITIES => f.l7_edx >> 29 & 1 != 0,
        XSS => f.xsaves(),
        TSC_ADJUST => f.tsc_adjust(),
        OSVW_LENGTH | OSVW_STATUS => f.osvw(),
        _ if fixed_mtrr(index).is_some() || variable_mtrr(index).is_some() => f.mtrr(),
        _ => true,
    }
}

/// Registers of AMD's processors that systems look at without asking, and what they say:
/// nothing of what they are about is there. (LFENCE waits for what is before it.)
fn amd(index: u32) -> Option<u64> {
    match index {
        // HWCR, SYSCFG, NB_CFG, interrupt pending, MMIO configuration base, SMM, VM_CR.
        0xc001_0015 | 0xc001_0010 | 0xc001_001f | 0xc001_0055 | 0xc001_0058 | 0xc001_0112
        | 0xc001_0113 | 0xc001_0114 => Some(0),
        // LS_CFG, DC_CFG, BU_CFG2.
        0xc001_1020 | 0xc001_1022 | 0xc001_102a => Some(0),
        // DE_CFG.
        0xc001_1029 => Some(2),
        _ => None,
    }
}

/// RDMSR.
pub fn read(cpu: &mut Cpu, index: u32) -> Fallible<u64> {
    if !offered(cpu, index) {
        return Err(Exception::GP0);
    }
    if let Some(value) = storage(&mut cpu.s.msr, index) {
        return Ok(*value);
    }
    if let Some(value) = address(&mut cpu.s.msr, index) {
        return Ok(*value);
    }
    Ok(match index {
        TSC => cpu.tsc(),
        TSC_ADJUST => cpu.s.msr.tsc_adjust,
        EFER => cpu.s.efer,
        FS_BASE => cpu.s.seg[seg::FS].base,
        GS_BASE => cpu.s.seg[seg::GS].base,
        PAT => cpu.s.msr.pat,
        MTRR_CAP => 0x500 | MTRR_VARIABLE as u64,
        MTRR_DEF_TYPE => cpu.s.msr.mtrr_def_type,
        XSS => cpu.s.msr.xss,
        SPEC_CTRL => cpu.s.msr.spec_ctrl,
        ARCH_CAPABILITIES => ARCH_CAPABILITIES_VALUE,
        MCG_CAP => MCG_CAP_VALUE,
        PLATFORM_ID | PERF_STATUS | P5_MC_ADDR | P5_MC_TYPE => 0,
        // No known flaw.
        OSVW_LENGTH | OSVW_STATUS => 0,
        UCODE_REV => 1 << 32,
        FEATURE_CONTROL => 1,
        index if LAST_BRANCH.contains(&index) => 0,
        _ if cpu.features.amd && amd(index).is_some() => amd(index).unwrap_or_default(),
        _ => return msr::read(cpu, index),
    })
}

/// WRMSR.
pub fn write(cpu: &mut Cpu, index: u32, value: u64) -> Fallible<()> {
    if !offered(cpu, index) {
        return Err(Exception::GP0);
    }
    let memory_type = |t: &u8| matches!(t, 0 | 1 | 4 | 5 | 6);
    if fixed_mtrr(index).is_some() && !value.to_le_bytes().iter().all(memory_type) {
        return Err(Exception::GP0);
    }
    if let Some(i) = variable_mtrr(index) {
        if i & 1 == 0 && !memory_type(&(value as u8)) {
            return Err(Exception::GP0);
        }
        let reserved = if i & 1 == 0 { 0xf00 } else { 0x7ff };
        if value & reserved != 0 || value & !cpu.tlbs.phys_mask != 0 {
            return Err(Exception::GP0);
        }
    }
    // Control is all or nothing; a status can only be cleared (Intel SDM vol. 3, 16.3.2.2).
    let wrong = match bank(index) {
        Some((_, 0)) => value != 0 && value != u64::MAX,
        Some((_, 1)) => value != 0,
        _ => index == MCG_CTL && value != 0 && value != u64::MAX,
    };
    if wrong {
        return Err(Exception::GP0);
    }
    if index == DEBUGCTL && value & !DEBUGCTL_BITS != 0 {
        return Err(Exception::GP0);
    }
    if let Some(place) = storage(&mut cpu.s.msr, index) {
        *place = match index {
            // Bits a guest may set and read back; the rest is fixed.
            TSC_AUX | SFMASK => value & 0xffff_ffff,
            _ => value,
        };
        return Ok(());
    }
    if address(&mut cpu.s.msr, index).is_some() {
        cpu.check_canonical(value).map_err(|_| Exception::GP0)?;
        if let Some(place) = address(&mut cpu.s.msr, index) {
            *place = value;
        }
        return Ok(());
    }
    match index {
        // Either moves the other along (Intel SDM vol. 3, 18.17.3).
        TSC => {
            let offset = value.wrapping_sub(host_tsc());
            let moved = offset.wrapping_sub(cpu.s.tsc_offset);
            cpu.s.msr.tsc_adjust = cpu.s.msr.tsc_adjust.wrapping_add(moved);
            cpu.set_tsc_offset(offset);
        }
        TSC_ADJUST => {
            let moved = value.wrapping_sub(cpu.s.msr.tsc_adjust);
            cpu.s.msr.tsc_adjust = value;
            cpu.set_tsc_offset(cpu.s.tsc_offset.wrapping_add(moved));
        }
        EFER => return write_efer(cpu, value),
        FS_BASE | GS_BASE => {
            cpu.check_canonical(value).map_err(|_| Exception::GP0)?;
            let i = if index == FS_BASE { seg::FS } else { seg::GS };
            cpu.s.seg[i].base = value;
            cpu.s.ea_base[i] = value;
        }
        PAT => {
            if value
                .to_le_bytes()
                .iter()
                .any(|t| !matches!(t, 0 | 1 | 4..=7))
            {
                return Err(Exception::GP0);
            }
            cpu.s.msr.pat = value;
        }
        MTRR_DEF_TYPE => {
            if value & !0xcff != 0 || !memory_type(&(value as u8)) {
                return Err(Exception::GP0);
            }
            cpu.s.msr.mtrr_def_type = value;
        }
        XSS => {
            if value != 0 {
                return Err(Exception::GP0);
            }
        }
        // IBRS, STIBP, SSBD.
        SPEC_CTRL if value & !7 == 0 => cpu.s.msr.spec_ctrl = value,
        // Flushes and microcode loads have nothing to do.
        PRED_CMD | FLUSH_CMD if value & !1 == 0 => {}
        UCODE_REV | UCODE_WRITE | P5_MC_ADDR | P5_MC_TYPE => {}
        MTRR_CAP | ARCH_CAPABILITIES | MCG_CAP | PLATFORM_ID | SPEC_CTRL | PRED_CMD | FLUSH_CMD => {
            return Err(Exception::GP0);
        }
        _ if cpu.features.amd && amd(index).is_some() => {}
        _ => return msr::write(cpu, index, value),
    }
    Ok(())
}

fn write_efer(cpu: &mut Cpu, value: u64) -> Fallible<()> {
    let f = &cpu.features;
    let mut known = 0;
    for (has, bit) in [
        (f.syscall(), efer::SCE),
        (f.long_mode(), efer::LME | efer::LMA),
        (f.nx(), efer::NXE),
        (f.ffxsr(), efer::FFXSR),
    ] {
        if has {
            known |= bit;
        }
    }
    let old = cpu.s.efer;
    if value & !known != 0 || (old ^ value) & efer::LME != 0 && cpu.s.cr0 & cr0::PG != 0 {
        return Err(Exception::GP0);
    }
    cpu.s.efer = value & !efer::LMA | old & efer::LMA;
    if (old ^ value) & efer::NXE != 0 {
        cpu.flush_tlb_all();
    }
    Ok(())
}
