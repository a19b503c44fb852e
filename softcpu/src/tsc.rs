//! How fast the host's time-stamp counter runs.

use std::sync::OnceLock;
use std::time::Duration;

use crate::cpu::host_tsc;
use crate::machine::monotonic_ns;

/// The moment that a measurement counts from.
static FIRST: OnceLock<(u64, u64)> = OnceLock::new();
/// What a measurement takes at least: a reading is off by some ten nanoseconds, hence a few millionths.
const AT_LEAST_NS: u64 = 3_000_000;

/// Begins to measure, where that is needed: whoever asks for the frequency later waits the less.
pub fn begin() {
    FIRST.get_or_init(moment);
}

/// TSC ticks a second, in kHz.
pub fn khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| from_cpuid().unwrap_or_else(measure).max(1))
}

/// Ticks in `ns` nanoseconds.
pub fn from_ns(ns: u64) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(khz()) / 1_000_000).unwrap_or(u64::MAX)
}

/// Nanoseconds in `ticks`.
pub fn to_ns(ticks: u64) -> u64 {
    u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(khz())).unwrap_or(u64::MAX)
}

/// What the processor (leaf 0x15, Intel SDM vol. 2, CPUID) or the hypervisor under us (leaf
/// 0x4000_0010, as VMware and KVM have it) says.
fn from_cpuid() -> Option<u64> {
    use std::arch::x86_64::__cpuid;
    let max = __cpuid(0).eax;
    if max >= 0x15 {
        let leaf = __cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            let hz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax);
            return Some(hz / 1000);
        }
    }
    let hypervisor = __cpuid(1).ecx & (1 << 31) != 0;
    if hypervisor && (0x4000_0010..0x4000_1000).contains(&__cpuid(0x4000_0000).eax) {
        let khz = u64::from(__cpuid(0x4000_0010).eax);
        // Whatever else a hypervisor keeps there is not between 100 MHz and 10 GHz.
        if (100_000..10_000_000).contains(&khz) {
            return Some(khz);
        }
    }
    None
}

/// A moment on both clocks: of several readings the one least disturbed in between.
fn moment() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..64 {
        let before = host_tsc();
        let ns = monotonic_ns();
        let after = host_tsc();
        let width = after.wrapping_sub(before);
        if width < best.0 {
            best = (width, before.wrapping_add(width / 2), ns);
        }
    }
    (best.1, best.2)
}

/// Against CLOCK_MONOTONIC, which is also what the paravirtual clock goes by.
fn measure() -> u64 {
    let (tsc, ns) = *FIRST.get_or_init(moment);
    let left = AT_LEAST_NS.saturating_sub(monotonic_ns().saturating_sub(ns));
    std::thread::sleep(Duration::from_nanos(left));
    let (tsc2, ns2) = moment();
    let elapsed = u128::from(ns2.saturating_sub(ns).max(1));
    let ticks = u128::from(tsc2.wrapping_sub(tsc));
    u64::try_from(ticks * 1_000_000 / elapsed).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_a_processors() {
        assert!((100_000..10_000_000).contains(&khz()), "{} kHz", khz());
        let measured = measure();
        let off = khz().abs_diff(measured) * 100 / measured;
        assert!(off <= 2, "said {} kHz, measured {measured} kHz", khz());
    }

    #[test]
    fn conversions_are_inverse_up_to_rounding() {
        for ns in [0, 1_000, 1_000_000, 123_456_789_012] {
            assert!(to_ns(from_ns(ns)).abs_diff(ns) <= 20, "{ns}");
        }
    }
}
