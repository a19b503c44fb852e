//! Native code for one guest instruction: load the vector registers it uses, run it with its
//! memory operand at [RSI], store what it writes.
//!
//! Registers inside a thunk: RDI = `FpState`, RSI = memory operand, R8 = the general register
//! operand (or register 0 for instructions with implied ones), R9 = `Runtime`; RAX, RCX, RDX,
//! and all vector registers are scratch, as the sysv64 ABI has it.

use iced_x86::{
    CpuidFeature, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register, RflagsBits,
};

use super::key::Key;
use super::runtime::Runtime;
use crate::state::{CpuState, FpState};

/// A thunk's entry. Returns non-zero if a SIMD exception struck that the guest doesn't mask;
/// then no register was written.
pub(super) type Entry = unsafe extern "sysv64" fn(
    fp: *mut FpState,
    mem: *mut u8,
    unused: usize,
    unused: usize,
    gpr: *mut u64,
    runtime: *mut Runtime,
) -> u32;

/// What kind of unit an instruction uses, hence which checks come before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// None: only its encoding is that of an SSE instruction (MOVNTI).
    Integer,
    X87,
    Mmx,
    Sse,
    Avx,
}

/// What a handler must know about an instruction. Lives as long as the process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Desc {
    pub entry: Entry,
    /// The same for a guest whose MXCSR is like the host's: flags raised are left there.
    pub quick: Entry,
    pub key: Key,
    pub unit: Unit,
    /// Size of the memory operand in bytes.
    pub len: u8,
    /// Alignment mask of its address.
    pub align: u8,
    /// It is written.
    pub writes: bool,
    /// May raise SIMD exceptions after having touched memory or MMX registers.
    pub two_stage: bool,
    /// Uses XMM registers although `unit` is MMX.
    pub mixed: bool,
    /// Uses MXCSR.
    pub mxcsr: bool,
    /// Status flags go in and out through `Runtime::flags`.
    pub flags: bool,
    /// x87: doesn't look at pending exceptions.
    pub no_wait: bool,
    /// x87: leaves the instruction and data pointers alone.
    pub control: bool,
    /// FNINIT.
    pub initialises: bool,
    /// x87: its last 11 opcode bits.
    pub fop: u16,
}

impl Desc {
    /// See `simd::plainly`.
    pub(super) fn plainly(&self, insn: &Instruction) -> Option<super::Plainly> {
        let named = matches!(implied(insn.mnemonic()), Implied::None);
        let fits = matches!(self.unit, Unit::Sse | Unit::Integer) && named && !self.two_stage;
        fits.then_some(super::Plainly {
            align: self.align,
            mxcsr: self.mxcsr,
        })
    }
}

/// Why no thunk could be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum ThunkError {
    #[error("cannot encode the instruction for this host: {0}")]
    Encode(#[from] iced_x86::IcedError),
}

/// Offset of XMM `n` in `FpState`.
fn low(n: u8) -> i32 {
    (std::mem::offset_of!(FpState, legacy) + 160 + 16 * usize::from(n)) as i32
}

/// Offset of the upper half of YMM `n`.
fn high(n: u8) -> i32 {
    (std::mem::offset_of!(FpState, ymm_high) + 16 * usize::from(n)) as i32
}

/// Offset of `CpuState::cc` from the `FpState` in it.
const CC: i32 =
    std::mem::offset_of!(CpuState, cc) as i32 - std::mem::offset_of!(CpuState, fp) as i32;

struct Emitter(Vec<u8>);

impl Emitter {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// `opcode` with a ModRM byte for `reg, [base + disp32]`, where `base` is RDI or R8, R9
    /// (whose REX.B is the caller's).
    fn at(&mut self, opcode: &[u8], reg: u8, base: u8, disp: i32) {
        self.bytes(opcode);
        self.bytes(&[0x80 | (reg & 7) << 3 | base]);
        self.bytes(&disp.to_le_bytes());
    }

    fn load(&mut self, unit: Unit, n: u8) {
        if unit == Unit::Avx {
            // vmovups xmm, [rdi+..]; vinsertf128 ymm, ymm, [rdi+..], 1
            self.at(&[0xc5, 0x78 | (!n & 8) << 4, 0x10], n, RDI, low(n));
            let (r, v) = ((!n & 8) << 4, (!n & 15) << 3);
            self.at(&[0xc4, r | 0x63, v | 5, 0x18], n, RDI, high(n));
            self.bytes(&[1]);
        } else {
            let rex: &[u8] = if n & 8 != 0 { &[0x44] } else { &[] };
            self.bytes(rex);
            self.at(&[0x0f, 0x10], n, RDI, low(n));
        }
    }

    fn store(&mut self, unit: Unit, n: u8) {
        if unit == Unit::Avx {
            // vmovups [rdi+..], xmm; vextractf128 [rdi+..], ymm, 1
            self.at(&[0xc5, 0x78 | (!n & 8) << 4, 0x11], n, RDI, low(n));
            self.at(&[0xc4, (!n & 8) << 4 | 0x63, 0x7d, 0x19], n, RDI, high(n));
            self.bytes(&[1]);
        } else {
            let rex: &[u8] = if n & 8 != 0 { &[0x44] } else { &[] };
            self.bytes(rex);
            self.at(&[0x0f, 0x11], n, RDI, low(n));
        }
    }

    fn ret(&mut self, unit: Unit) {
        if unit == Unit::Avx {
            self.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
        }
        self.bytes(&[0xc3]);
    }
}

const RDI: u8 = 7;
const R8: u8 = 0;
const R9: u8 = 1;

/// General registers an instruction uses, beyond its address.
enum Gpr {
    None,
    /// One explicit operand, in RAX.
    Explicit,
    /// PCMPxSTRx: RAX and RDX in, RCX out.
    Strings,
}

/// Makes the code for `key`, and everything about it but its addresses: the second is that of
/// the quick form's beginning in the code.
pub(super) fn compile(key: Key) -> Result<(Vec<u8>, usize, Desc), ThunkError> {
    let insn = key.instruction();
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&insn);
    let mut vectors: Vec<(u8, bool)> = Vec::new();
    let mut add = |n: u8, written: bool| match vectors.iter_mut().find(|v| v.0 == n) {
        Some(v) => v.1 |= written,
        None => vectors.push((n, written)),
    };
    let mut gpr = Gpr::None;
    let mut memory = None;
    let (mut mmx, mut mixed) = (false, false);
    for i in 0..insn.op_count() {
        let access = info.op_access(i);
        let written = writes(access);
        match insn.op_kind(i) {
            OpKind::Register => {
                let register = insn.op_register(i);
                if register.is_vector_register() {
                    add(register.number() as u8, written);
                    mixed = true;
                } else if register.is_mm() {
                    mmx = true;
                } else if register.is_gpr() {
                    gpr = Gpr::Explicit;
                }
            }
            OpKind::Memory => memory = Some(written),
            _ => {}
        }
    }
    let mnemonic = insn.mnemonic();
    match implied(mnemonic) {
        Implied::None => {}
        Implied::Xmm0Read => add(0, false),
        Implied::Xmm0Written => {
            gpr = Gpr::Strings;
            add(0, true);
        }
        Implied::Rcx => gpr = Gpr::Strings,
    }
    let unit = if insn.encoding() == EncodingKind::VEX {
        Unit::Avx
    } else if mmx || mnemonic == Mnemonic::Emms {
        Unit::Mmx
    } else if super::is_x87(&insn) {
        Unit::X87
    } else if mnemonic == Mnemonic::Movnti {
        Unit::Integer
    } else {
        Unit::Sse
    };
    let mxcsr = unit != Unit::X87 && uses_mxcsr(mnemonic);
    let status = RflagsBits::OF
        | RflagsBits::SF
        | RflagsBits::ZF
        | RflagsBits::AF
        | RflagsBits::CF
        | RflagsBits::PF;
    let flags = (insn.rflags_read() | insn.rflags_modified()) & status != 0;
    let len = if memory.is_some() {
        insn.memory_size().size() as u8
    } else {
        0
    };

    // All of them new: the thunk puts them where they belong.
    let new_flags = flags
        && matches!(unit, Unit::Sse | Unit::Avx)
        && matches!(gpr, Gpr::None)
        && insn.rflags_read() & status == 0
        && insn.rflags_modified() & status == status;
    let flags = flags && !new_flags;
    let mut encoder = Encoder::new(64);
    encoder.encode(&insn, 0)?;
    let itself = encoder.take_buffer();

    let mut e = Emitter(Vec::with_capacity(192));
    let mut quick = 0;
    let forms: &[bool] = if mxcsr { &[true, false] } else { &[false] };
    for &mxcsr in forms {
        quick = e.0.len();
        for &(n, _) in &vectors {
            e.load(unit, n);
        }
        match gpr {
            Gpr::None => {}
            Gpr::Explicit => e.at(&[0x49, 0x8b], 0, R8, 0), // mov rax, [r8]
            Gpr::Strings => {
                e.at(&[0x49, 0x8b], 0, R8, 0);
                e.at(&[0x49, 0x8b], 2, R8, 16); // mov rdx, [r8+16]
            }
        }
        if flags {
            e.at(&[0x41, 0xff], 6, R9, Runtime::FLAGS); // push qword [r9+..]
            e.bytes(&[0x9d]); // popfq
        }
        if mxcsr {
            e.at(&[0x41, 0x0f, 0xae], 2, R9, Runtime::RUN_MXCSR); // ldmxcsr
        }
        e.bytes(&itself);
        if new_flags {
            // lahf; seto al; movzx eax, ax; mov [r9+..], rax
            e.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x0f, 0xb7, 0xc0]);
            e.at(&[0x49, 0x89], 0, R9, Runtime::FLAGS);
        }
        if flags {
            e.bytes(&[0x9c]); // pushfq
            e.at(&[0x41, 0x8f], 0, R9, Runtime::FLAGS); // pop qword [r9+..]
        }
        let mut skip = None;
        if mxcsr {
            e.at(&[0x41, 0x0f, 0xae], 3, R9, Runtime::OUT_MXCSR); // stmxcsr
            e.at(&[0x41, 0x0f, 0xae], 2, R9, Runtime::HOST_MXCSR); // ldmxcsr
            let scratch = match gpr {
                Gpr::None => 0,
                _ => 2, // edx: eax holds the result
            };
            e.at(&[0x41, 0x8b], scratch, R9, Runtime::OUT_MXCSR); // mov scratch, [r9+..]
            e.bytes(&[0x83, 0xe0 | scratch, 0x3f]); // and scratch, 0x3f
            e.at(&[0x41, 0x85], scratch, R9, Runtime::UNMASKED); // test [r9+..], scratch
            e.bytes(&[0x75, 0]); // jnz fault
            skip = Some(e.0.len());
            // or [rdi + mxcsr], scratch
            e.at(
                &[0x09],
                scratch,
                RDI,
                (std::mem::offset_of!(FpState, legacy) + 24) as i32,
            );
        }
        if new_flags {
            // mov rax, [r9+..]; mov [rdi+..], rax
            e.at(&[0x49, 0x8b], 0, R9, Runtime::FLAGS);
            e.at(&[0x48, 0x89], 0, RDI, CC);
        }
        for &(n, written) in &vectors {
            if written {
                e.store(unit, n);
            }
        }
        match gpr {
            Gpr::None => {}
            Gpr::Explicit => e.at(&[0x49, 0x89], 0, R8, 0), // mov [r8], rax
            Gpr::Strings if matches!(implied(mnemonic), Implied::Rcx) => {
                e.at(&[0x49, 0x89], 1, R8, 8); // mov [r8+8], rcx
            }
            Gpr::Strings => {}
        }
        if matches!(unit, Unit::X87) {
            e.at(&[0x41, 0xdd], 7, R9, Runtime::FSW); // fnstsw [r9+..]
        }
        e.bytes(&[0x31, 0xc0]); // xor eax, eax
        e.ret(unit);
        if let Some(at) = skip {
            // The code between is a few stores, far below 128 bytes.
            e.0[at - 1] = (e.0.len() - at) as u8;
            e.bytes(&[0xb8, 1, 0, 0, 0]); // mov eax, 1
            e.ret(unit);
        }
    }
    let writes = memory == Some(true);
    let desc = Desc {
        entry: unfinished,
        quick: unfinished,
        key,
        unit,
        len,
        align: alignment(&insn, unit, len) - 1,
        writes,
        two_stage: mxcsr && (writes || unit == Unit::Mmx),
        mixed: mixed && unit == Unit::Mmx,
        mxcsr,
        flags,
        no_wait: unit == Unit::X87 && waits_not(mnemonic),
        control: unit == Unit::X87 && is_control(mnemonic),
        initialises: mnemonic == Mnemonic::Fninit,
        fop: key.fop(),
    };
    Ok((e.0, quick, desc))
}

/// Stands in `Desc::entry` until the code has an address.
unsafe extern "sysv64" fn unfinished(
    _: *mut FpState,
    _: *mut u8,
    _: usize,
    _: usize,
    _: *mut u64,
    _: *mut Runtime,
) -> u32 {
    0
}

fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

enum Implied {
    None,
    /// A third operand.
    Xmm0Read,
    /// PCMPxSTRM.
    Xmm0Written,
    /// PCMPxSTRI.
    Rcx,
}

fn implied(mnemonic: Mnemonic) -> Implied {
    use Mnemonic as M;
    match mnemonic {
        M::Pblendvb | M::Blendvps | M::Blendvpd | M::Sha256rnds2 => Implied::Xmm0Read,
        M::Pcmpestrm
        | M::Pcmpistrm
        | M::Vpcmpestrm
        | M::Vpcmpistrm
        | M::Pcmpestrm64
        | M::Vpcmpestrm64 => Implied::Xmm0Written,
        M::Pcmpestri
        | M::Pcmpistri
        | M::Vpcmpestri
        | M::Vpcmpistri
        | M::Pcmpestri64
        | M::Vpcmpestri64 => Implied::Rcx,
        _ => Implied::None,
    }
}

/// Arithmetic, conversion and comparison of floating-point numbers, by the mnemonic's family.
fn uses_mxcsr(mnemonic: Mnemonic) -> bool {
    let name = format!("{mnemonic:?}").to_ascii_uppercase();
    let name = name.strip_prefix('V').unwrap_or(&name);
    const FAMILIES: [&str; 17] = [
        "ADD", "SUB", "MUL", "DIV", "SQRT", "MIN", "MAX", "CMP", "COMI", "UCOMI", "CVT", "ROUND",
        "DP", "HADD", "HSUB", "FM", "FNM",
    ];
    FAMILIES.iter().any(|f| name.starts_with(f))
}

/// Alignment of the memory operand in bytes (Intel SDM vol. 1, 4.1.1 and 14.9).
fn alignment(insn: &Instruction, unit: Unit, len: u8) -> u8 {
    use Mnemonic as M;
    let aligned = match unit {
        // AMD's SHA instructions take any address, Intel's fault: a guest made for either runs.
        Unit::Sse | Unit::Mmx => {
            len == 16
                && !insn.cpuid_features().contains(&CpuidFeature::SHA)
                && !matches!(
                    insn.mnemonic(),
                    M::Movups
                        | M::Movupd
                        | M::Movdqu
                        | M::Lddqu
                        | M::Pcmpestri
                        | M::Pcmpestri64
                        | M::Pcmpestrm
                        | M::Pcmpestrm64
                        | M::Pcmpistri
                        | M::Pcmpistrm
                )
        }
        Unit::Avx => matches!(
            insn.mnemonic(),
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        ),
        _ => false,
    };
    if aligned && len != 0 { len } else { 1 }
}

fn waits_not(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Fninit | M::Fnclex | M::Fnstcw | M::Fnstsw | M::Fneni | M::Fndisi | M::Fnsetpm
    )
}

fn is_control(mnemonic: Mnemonic) -> bool {
    waits_not(mnemonic) || mnemonic == Mnemonic::Fldcw
}

/// RSI.
pub(super) const MEMORY: Register = Register::RSI;
