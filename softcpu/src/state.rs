//! A vCPU's architectural state, laid out so that generated code can reach it later.

/// Index of a segment register in `CpuState::seg` (the encoding of ModRM's reg field).
pub mod seg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Index of a general register in `CpuState::gpr`.
pub mod gpr {
    #![allow(missing_docs)]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// RFLAGS bits (Intel SDM vol. 1, 3.4.3).
pub mod rflags {
    #![allow(missing_docs)]
    pub const CF: u64 = 1 << 0;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six status flags, which live in `CpuState::cc`.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits.
pub mod cr0 {
    #![allow(missing_docs)]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
pub mod cr4 {
    #![allow(missing_docs)]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// EFER bits.
pub mod efer {
    #![allow(missing_docs)]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const FFXSR: u64 = 1 << 14;
}

/// A segment register with its hidden part.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes, granularity applied, inclusive.
    pub limit: u32,
    /// Bits 8..24 of a descriptor's second doubleword shifted right by 8 (limit bits zero);
    /// bit 16 set = unusable. The same form as `hypervisor::Segment`.
    pub access: u32,
    /// Visible selector.
    pub selector: u16,
}

impl Segment {
    /// Bit of `access`: the register holds a null selector.
    pub const UNUSABLE: u32 = 1 << 16;

    /// Descriptor type (4 bits).
    pub const fn kind(&self) -> u32 {
        self.access & 15
    }
    /// S bit: code or data, not system.
    pub const fn is_code_or_data(&self) -> bool {
        self.access & 0x10 != 0
    }
    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        (self.access >> 5 & 3) as u8
    }
    /// P bit.
    pub const fn present(&self) -> bool {
        self.access & 0x80 != 0
    }
    /// L bit: 64-bit code.
    pub const fn long(&self) -> bool {
        self.access & 0x2000 != 0
    }
    /// D/B bit: 32-bit default.
    pub const fn big(&self) -> bool {
        self.access & 0x4000 != 0
    }
    /// Writable data that spans the 4 GiB from 0, upwards.
    pub const fn flat_data(&self) -> bool {
        self.base == 0 && self.limit == u32::MAX && self.access & 0xe == 2 && !self.unusable()
    }
    /// The register holds no segment.
    pub const fn unusable(&self) -> bool {
        self.access & Self::UNUSABLE != 0
    }
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Table {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u16,
}

/// x87, MMX, SSE and AVX state in the layout of XSAVE's standard form (Intel SDM vol. 1,
/// 13.4), so that the host's own fxsave/fxrstor/xsave/xrstor work on it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct FpState {
    /// The FXSAVE image: FCW 0, FSW 2, FTW (abridged) 4, FOP 6, FIP 8, FDP 16, MXCSR 24,
    /// ST/MM registers from 32 in 16-byte slots, XMM0..15 from 160.
    pub legacy: [u8; 512],
    /// XSAVE header: XSTATE_BV, XCOMP_BV, reserved.
    pub header: [u64; 8],
    /// Upper halves of YMM0..15.
    pub ymm_high: [[u8; 16]; 16],
}

impl std::fmt::Debug for FpState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FpState")
            .field("fcw", &u16::from_le_bytes([self.legacy[0], self.legacy[1]]))
            .field("mxcsr", &format_args!("{:#x}", self.mxcsr()))
            .finish_non_exhaustive()
    }
}

impl Default for FpState {
    /// The state after reset: FCW 0x40, MXCSR 0x1f80 (Intel SDM vol. 3, table 9-1).
    fn default() -> Self {
        let mut fp = Self {
            legacy: [0; 512],
            header: [0; 8],
            ymm_high: [[0; 16]; 16],
        };
        fp.legacy[0] = 0x40;
        fp.legacy[4] = 0xff;
        fp.set_mxcsr(0x1f80);
        fp
    }
}

impl FpState {
    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([
            self.legacy[24],
            self.legacy[25],
            self.legacy[26],
            self.legacy[27],
        ])
    }

    /// Sets MXCSR; the caller has checked reserved bits.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.legacy[24..28].copy_from_slice(&value.to_le_bytes());
    }
}

/// The MSRs that are the CPU core's own state.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CoreMsrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub debugctl: u64,
    pub xss: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 16],
    pub mcg_status: u64,
    pub mcg_ctl: u64,
    /// Machine-check banks: control, status, address, miscellaneous.
    pub mc: [[u64; 4]; MC_BANKS],
}

/// Machine-check banks, as many as QEMU gives its guests.
pub const MC_BANKS: usize = 10;

impl Default for CoreMsrs {
    /// All zero, with every machine check reported.
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            pat: 0,
            misc_enable: 0,
            spec_ctrl: 0,
            debugctl: 0,
            xss: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            mcg_status: 0,
            mcg_ctl: u64::MAX,
            mc: [[u64::MAX, 0, 0, 0]; MC_BANKS],
        }
    }
}

/// Everything architectural about one vCPU but its local APIC.
#[repr(C)]
#[derive(Debug, Clone)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15. Operations address registers by byte
    /// offset from here (AH is byte 1).
    pub gpr: [u64; 16],
    /// Always 0: the base or index register of an operand that has none.
    pub zero: u64,
    /// RIP of the running block's first instruction: operations are relative to it.
    pub block_rip: u64,
    /// RIP. Inside a block only current where a plain handler runs: then it already points
    /// to the next instruction.
    pub rip: u64,
    /// Status flags: OF in bit 0, and in bits 8..16 SF ZF 0 AF 0 PF 1 CF as LAHF gives them.
    pub cc: u64,
    /// RFLAGS without the six status flags; bit 1 set.
    pub flags: u64,
    /// Base added to an effective address, by segment: 0 for ES, CS, SS, DS in 64-bit mode.
    pub ea_base: [u64; 6],
    /// ES, CS, SS, DS, FS, GS.
    pub seg: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: Table,
    /// IDTR.
    pub idtr: Table,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0..DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// Guest TSC = host TSC + this.
    pub tsc_offset: u64,
    /// PDPTEs loaded by a CR3 write in PAE mode.
    pub pdpte: [u64; 4],
    /// Current privilege level.
    pub cpl: u8,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// In HLT.
    pub halted: bool,
    /// After INIT, or an application processor before its first start-up IPI.
    pub waiting_for_sipi: bool,
    /// Interrupts are held off while RIP is `shadow_rip` (after STI, MOV SS, POP SS).
    pub shadow: bool,
    /// The shadow also holds off debug traps (MOV SS, POP SS).
    pub shadow_ss: bool,
    /// See `shadow`.
    pub shadow_rip: u64,
    /// Core MSRs.
    pub msr: CoreMsrs,
    /// x87, MMX, SSE, AVX.
    pub fp: FpState,
}

impl Default for CpuState {
    /// The state after power-up (Intel SDM vol. 3, table 9-1), at FFFF_FFF0.
    fn default() -> Self {
        let data = Segment {
            base: 0,
            limit: 0xffff,
            access: 0x93,
            selector: 0,
        };
        let mut seg = [data; 6];
        seg[seg::CS] = Segment {
            base: 0xffff_0000,
            limit: 0xffff,
            access: 0x9b,
            selector: 0xf000,
        };
        let mut gpr = [0; 16];
        gpr[gpr::RDX] = 0x600;
        let mut state = Self {
            gpr,
            zero: 0,
            block_rip: 0,
            rip: 0xfff0,
            cc: 0x200,
            flags: 2,
            ea_base: [0; 6],
            seg,
            ldtr: Segment {
                limit: 0xffff,
                access: 0x82,
                ..Segment::default()
            },
            tr: Segment {
                limit: 0xffff,
                access: 0x8b,
                ..Segment::default()
            },
            gdtr: Table {
                base: 0,
                limit: 0xffff,
            },
            idtr: Table {
                base: 0,
                limit: 0xffff,
            },
            cr0: cr0::ET | cr0::NW | cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            tsc_offset: 0,
            pdpte: [0; 4],
            cpl: 0,
            nmi_masked: false,
            halted: false,
            waiting_for_sipi: false,
            shadow: false,
            shadow_ss: false,
            shadow_rip: 0,
            msr: CoreMsrs {
                pat: 0x0007_0406_0007_0406,
                misc_enable: 1,
                ..CoreMsrs::default()
            },
            fp: FpState::default(),
        };
        for (base, seg) in state.ea_base.iter_mut().zip(&state.seg) {
            *base = seg.base;
        }
        state
    }
}

impl CpuState {
    /// Whole RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.flags & !rflags::STATUS | (self.cc >> 8 & 0xd5) | (self.cc & 1) << 11
    }

    /// Replaces the six status flags by those of `value`.
    #[inline]
    pub fn set_status(&mut self, value: u64) {
        self.cc = (value & 0xd5) << 8 | 0x200 | (value >> 11 & 1);
    }

    /// CR0.PE and not virtual-8086.
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0 && self.flags & rflags::VM == 0
    }

    /// CR0.PE, virtual-8086 mode included.
    pub fn protected_or_v86(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// EFER.LMA: 64-bit or compatibility mode.
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// 64-bit mode proper.
    pub fn mode64(&self) -> bool {
        self.long_mode() && self.seg[seg::CS].long()
    }

    /// Virtual-8086 mode.
    pub fn v8086(&self) -> bool {
        self.flags & rflags::VM != 0
    }

    /// IOPL.
    pub fn iopl(&self) -> u8 {
        (self.flags >> 12 & 3) as u8
    }
}
