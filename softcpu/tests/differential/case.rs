//! One case: a state to start from, and a state found at the end.

/// Where code is, in user space of both machines.
pub const CODE: u64 = 0x1000_0000;
/// Bytes of code a case may have; the page is filled up with INT3.
pub const CODE_LEN: usize = 256;
/// Where data is: one page that may only be read, then pages that may be written, then
/// nothing.
pub const DATA: u64 = 0x2000_0000;
/// Pages of data.
pub const DATA_PAGES: usize = 4;
/// Bytes of data.
pub const DATA_LEN: usize = DATA_PAGES * 4096;
/// Bytes of an XSAVE area with x87, SSE and AVX.
pub const XSAVE_LEN: usize = 832;

/// The kind of code and of segments.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// 64, 32 or 16.
    pub bits: u32,
    /// Bits of the stack pointer, where `segmented`.
    pub stack: u32,
    /// CS begins at `CODE` and has its limit at the page's end; DS, ES and SS begin at `DATA`
    /// and end with it. Else all are flat.
    pub segmented: bool,
}

impl Shape {
    /// 64-bit mode.
    pub const LONG: Self = Self::flat(64);

    /// Flat segments.
    pub const fn flat(bits: u32) -> Self {
        Self {
            bits,
            stack: bits,
            segmented: false,
        }
    }

    /// Segments with bases and limits.
    pub const fn segmented(bits: u32, stack: u32) -> Self {
        Self {
            bits,
            stack,
            segmented: true,
        }
    }

    /// Offset of `CODE` in its segment.
    pub fn code(self) -> u64 {
        if self.segmented { 0 } else { CODE }
    }

    /// Offset of `DATA` in its segment.
    pub fn data(self) -> u64 {
        if self.segmented { 0 } else { DATA }
    }
}

/// General registers in encoding order.
pub type Gprs = [u64; 16];

/// Initial state. Shared with the native child as plain memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Input {
    pub gpr: Gprs,
    pub rflags: u64,
    pub code: [u8; CODE_LEN],
    pub xsave: [u8; XSAVE_LEN],
    pub shape: Shape,
}

/// Final state, and what ended the case.
#[repr(C)]
#[derive(Clone)]
pub struct Output {
    pub gpr: Gprs,
    pub rip: u64,
    pub rflags: u64,
    pub vector: u64,
    pub error: u64,
    pub cr2: u64,
    pub xsave: [u8; XSAVE_LEN],
    pub data: [u8; DATA_LEN],
}

/// XMM registers in an XSAVE area.
pub const XMM: std::ops::Range<usize> = 160..416;
/// Upper halves of YMM registers in an XSAVE area.
pub const YMM_HIGH: std::ops::Range<usize> = 576..832;

/// Clears what is in its initial state according to XSTATE_BV, so that areas can be compared.
pub fn settle_xsave(area: &mut [u8; XSAVE_LEN]) {
    let present = area[512];
    if present & 1 == 0 {
        area[..24].fill(0);
        area[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        area[32..160].fill(0);
    }
    if present & 2 == 0 {
        area[XMM].fill(0);
    }
    if present & 4 == 0 {
        area[YMM_HIGH].fill(0);
    }
}
