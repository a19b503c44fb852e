//! kvmclock: a page that tells the guest how to turn its TSC into nanoseconds.
//!
//! All vCPUs extrapolate from the same moment, so that they agree with each other to the tick.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Mutex, PoisonError};

use crate::cpu::{Cpu, host_tsc};
use crate::tsc;

/// A moment on both clocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reference {
    /// Host TSC.
    pub tsc: u64,
    /// The paravirtual clock then, in nanoseconds.
    pub ns: u64,
    /// Which setting of the clock this is.
    pub generation: u64,
}

/// A machine's paravirtual clock: runs with the host's TSC from when it was set.
#[derive(Debug, Default)]
pub struct Clock {
    reference: Mutex<Reference>,
}

impl Clock {
    /// The moment it counts from.
    pub fn reference(&self) -> Reference {
        *self
            .reference
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Nanoseconds now.
    pub fn now(&self) -> u64 {
        let then = self.reference();
        let ticks = host_tsc().wrapping_sub(then.tsc).cast_signed().max(0);
        then.ns.wrapping_add(tsc::to_ns(ticks.cast_unsigned()))
    }

    /// Sets it. vCPUs show it from their next `run` on.
    pub fn set(&self, ns: u64) {
        let mut reference = self
            .reference
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *reference = Reference {
            tsc: host_tsc(),
            ns,
            generation: reference.generation + 1,
        };
    }
}

/// Multiplier and shift: nanoseconds = ((ticks << shift) * multiplier) >> 32, where a
/// negative shift goes right.
fn scale(khz: u64) -> (u32, i8) {
    let exact = |shift: i32| (1_000_000_u128 << (32 - shift)) / u128::from(khz.max(1));
    let mut shift = 0;
    while exact(shift) > u128::from(u32::MAX) && shift < 31 {
        shift += 1;
    }
    while exact(shift - 1) <= u128::from(u32::MAX) && shift > -31 {
        shift -= 1;
    }
    (exact(shift).min(u128::from(u32::MAX)) as u32, shift as i8)
}

/// The clock cannot go backwards between vCPUs.
const STABLE: u8 = 1;
/// The guest was stopped; it takes this back itself when it has seen it.
const GUEST_STOPPED: u8 = 2;

impl Cpu {
    pub(super) fn pv_write(&self, gpa: u64, data: &[u8]) {
        if !self.machine.memory.write(gpa, data) {
            log::debug!("the guest's paravirtual record {gpa:#x} is not RAM");
        }
    }

    /// Writes `struct pvclock_vcpu_time_info` where the guest wants it. The version is odd
    /// while the rest changes.
    pub(super) fn write_system_time(&mut self) {
        let reference = self.machine.time.reference();
        self.pv.generation = reference.generation;
        if self.pv.system_time & 1 == 0 {
            return;
        }
        let gpa = self.pv.system_time & !1;
        let (mut version, mut flags) = ([0; 4], [0]);
        let memory = &self.machine.memory;
        if !memory.read(gpa, &mut version) || !memory.read(gpa + 29, &mut flags) {
            log::debug!("the guest's clock page {gpa:#x} is not RAM");
            return;
        }
        let mut flags = STABLE | flags[0] & GUEST_STOPPED;
        if std::mem::take(&mut self.pv.stopped) {
            flags |= GUEST_STOPPED;
        }
        let version = u32::from_le_bytes(version) | 1;
        let (multiplier, shift) = scale(tsc::khz());
        let mut body = [0; 28];
        body[4..12].copy_from_slice(&reference.tsc.wrapping_add(self.s.tsc_offset).to_le_bytes());
        body[12..20].copy_from_slice(&reference.ns.to_le_bytes());
        body[20..24].copy_from_slice(&multiplier.to_le_bytes());
        body[24] = shift.cast_unsigned();
        body[25] = flags;
        self.pv_write(gpa, &version.to_le_bytes());
        fence(Ordering::SeqCst);
        self.pv_write(gpa + 4, &body);
        fence(Ordering::SeqCst);
        self.pv_write(gpa, &version.wrapping_add(1).to_le_bytes());
    }

    /// Writes `struct pvclock_wall_clock`: the time of day when the clock was 0.
    pub(super) fn write_wall_clock(&mut self) {
        let gpa = self.pv.wall_clock;
        let wall = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
            .saturating_sub(std::time::Duration::from_nanos(self.machine.time.now()));
        let mut version = [0; 4];
        if !self.machine.memory.read(gpa, &mut version) {
            log::debug!("the guest's wall clock {gpa:#x} is not RAM");
            return;
        }
        let version = u32::from_le_bytes(version) | 1;
        self.pv_write(gpa, &version.to_le_bytes());
        fence(Ordering::SeqCst);
        // 32 bits of seconds are all the interface has.
        self.pv_write(gpa + 4, &(wall.as_secs() as u32).to_le_bytes());
        self.pv_write(gpa + 8, &wall.subsec_nanos().to_le_bytes());
        fence(Ordering::SeqCst);
        self.pv_write(gpa, &version.wrapping_add(1).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::scale;

    #[test]
    fn a_second_of_ticks_is_a_second() {
        for khz in [
            100_000, 1_000_000, 1_996_249, 2_400_000, 3_700_123, 5_000_000,
        ] {
            let (multiplier, shift) = scale(khz);
            let ticks = u128::from(khz * 1000);
            let shifted = if shift < 0 {
                ticks >> -shift
            } else {
                ticks << shift
            };
            let ns = (shifted * u128::from(multiplier)) >> 32;
            assert!(ns.abs_diff(1_000_000_000) <= 2, "{khz} kHz: {ns} ns");
        }
    }
}
