//! Faults, traps and aborts on their way to the guest (Intel SDM vol. 3, 6.15).

/// An exception an instruction raises: what the guest's handler will be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// For #PF: the linear address that goes to CR2. Else 0.
    pub cr2: u64,
    /// Error code, where `has_code`.
    pub code: u32,
    /// Vector, 0..32.
    pub vector: u8,
    /// The vector pushes an error code.
    pub has_code: bool,
}

/// Result of anything that may fault.
pub type Fallible<T> = Result<T, Exception>;

impl Exception {
    /// #DE, divide error.
    pub const DE: Self = Self::plain(0);
    /// #DB, debug.
    pub const DB: Self = Self::plain(1);
    /// #BR, bound range exceeded.
    pub const BR: Self = Self::plain(5);
    /// #UD, invalid opcode.
    pub const UD: Self = Self::plain(6);
    /// #NM, device not available.
    pub const NM: Self = Self::plain(7);
    /// #MF, x87 floating-point error.
    pub const MF: Self = Self::plain(16);
    /// #XM, SIMD floating-point error.
    pub const XM: Self = Self::plain(19);
    /// #GP(0).
    pub const GP0: Self = Self::gp(0);
    /// #SS(0).
    pub const SS0: Self = Self::ss(0);
    /// #AC(0), alignment check.
    pub const AC0: Self = Self::coded(17, 0);

    /// An exception without error code.
    pub const fn plain(vector: u8) -> Self {
        Self {
            cr2: 0,
            code: 0,
            vector,
            has_code: false,
        }
    }

    /// An exception with error code.
    pub const fn coded(vector: u8, code: u32) -> Self {
        Self {
            cr2: 0,
            code,
            vector,
            has_code: true,
        }
    }

    /// #TS(code), invalid TSS.
    pub const fn ts(code: u32) -> Self {
        Self::coded(10, code)
    }

    /// #NP(code), segment not present.
    pub const fn np(code: u32) -> Self {
        Self::coded(11, code)
    }

    /// #SS(code), stack fault.
    pub const fn ss(code: u32) -> Self {
        Self::coded(12, code)
    }

    /// #GP(code), general protection.
    pub const fn gp(code: u32) -> Self {
        Self::coded(13, code)
    }

    /// #PF(code) at linear address `cr2`.
    pub const fn pf(cr2: u64, code: u32) -> Self {
        Self {
            cr2,
            code,
            vector: 14,
            has_code: true,
        }
    }
}
