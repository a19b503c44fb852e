//! CPU models and features.

/// Bits.
pub mod bits {
    /// CPUID.1:ECX.
    pub const TSC_DEADLINE: u32 = 1 << 24;
}
