//! What the vCPUs of one virtual machine share.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::Duration;

use crate::apic::Apic;
use crate::attention::Attention;
use crate::memory::{Memory, MemoryError, PAGE_MASK, PAGE_SIZE};

/// What one vCPU (or the machine) tells another, taken at its next block boundary.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mail {
    /// Guest code in these 64-byte chunks of the page was overwritten.
    CodeWritten { page: u64, chunks: u64 },
    /// The page now holds code: stop writing to it behind everyone's back.
    CodePage { page: u64 },
    /// Memory slots changed.
    Slots,
    /// Written pages are recorded anew.
    DirtyLog,
    /// Writes to a slot are recorded from now on, or no longer.
    Logging,
    /// Somebody wants to know where its code is.
    Recent,
}

/// A vCPU as others reach it.
#[derive(Debug)]
pub(crate) struct Peer {
    pub apic: Arc<Apic>,
    pub attention: Arc<Attention>,
    mail: Mutex<Vec<Mail>>,
    /// Messages were taken and acted on up to here.
    seen: (Mutex<u64>, std::sync::Condvar),
    /// The vCPU is inside `run`.
    running: Mutex<bool>,
    /// Its answer to `Mail::Recent`.
    recent: Mutex<Option<Vec<u64>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

impl Peer {
    pub(crate) fn new(apic: Arc<Apic>, attention: Arc<Attention>) -> Self {
        Self {
            apic,
            attention,
            mail: Mutex::default(),
            seen: (Mutex::new(0), std::sync::Condvar::new()),
            running: Mutex::new(false),
            recent: Mutex::default(),
        }
    }

    pub(crate) fn post(&self, mail: Mail) {
        lock(&self.mail).push(mail);
        self.attention.raise(Attention::MAIL);
    }

    pub(crate) fn take_mail(&self) -> Vec<Mail> {
        self.attention.clear(Attention::MAIL);
        std::mem::take(&mut *lock(&self.mail))
    }

    /// Every message taken so far has been acted on.
    pub(crate) fn acknowledge(&self) {
        *lock(&self.seen.0) += 1;
        self.seen.1.notify_all();
    }

    pub(crate) fn tell_recent(&self, code: Vec<u64>) {
        *lock(&self.recent) = Some(code);
    }

    /// The answer to `Mail::Recent`, which was posted before: nothing of a vCPU that does not run, or is long in a
    /// device's write.
    fn await_recent(&self) -> Vec<u64> {
        let mut seen = lock(&self.seen.0);
        for _ in 0..20 {
            if let Some(code) = lock(&self.recent).take() {
                return code;
            }
            if !*lock(&self.running) {
                break;
            }
            seen = match self.seen.1.wait_timeout(seen, Duration::from_millis(10)) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        Vec::new()
    }

    pub(crate) fn set_running(&self, running: bool) {
        *lock(&self.running) = running;
        if !running {
            self.acknowledge();
        }
    }

    /// Waits until what was posted before has been acted on, or the vCPU is out of `run` (it
    /// takes its mail before it goes in again).
    fn settle(&self) {
        let mut seen = lock(&self.seen.0);
        let start = *seen;
        // A vCPU in a device's write may take long; it must not hold up others for ever.
        for _ in 0..200 {
            if *seen != start || !*lock(&self.running) || lock(&self.mail).is_empty() {
                return;
            }
            seen = match self.seen.1.wait_timeout(seen, Duration::from_millis(10)) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        log::warn!("vCPU {} did not take its messages in time", self.apic.id());
    }
}

/// A virtual machine as its vCPUs see it: memory, each other, time.
#[derive(Debug, Default)]
pub struct Machine {
    /// Guest-physical memory.
    pub memory: Memory,
    pub(crate) peers: RwLock<Vec<Arc<Peer>>>,
    /// The paravirtual clock.
    pub time: crate::paravirt::Clock,
    /// The offset of the vCPU's TSC that was last set from outside.
    tsc_set: Mutex<Option<u64>>,
    /// Serialises locked accesses that no host instruction can do in one go.
    split_lock: Mutex<()>,
}

impl Machine {
    /// A machine without memory and vCPUs; its paravirtual clock starts at 0.
    pub fn new() -> Arc<Self> {
        let machine = Self::default();
        machine.set_clock(0);
        Arc::new(machine)
    }

    pub(crate) fn peers(&self) -> Vec<Arc<Peer>> {
        match self.peers.read() {
            Ok(guard) => guard.clone(),
            Err(poisoned) => poisoned.into_inner().clone(),
        }
    }

    pub(crate) fn add_peer(&self, peer: Arc<Peer>) {
        match self.peers.write() {
            Ok(mut guard) => guard.push(peer),
            Err(poisoned) => poisoned.into_inner().push(peer),
        }
    }

    pub(crate) fn remove_peer(&self, peer: &Arc<Peer>) {
        match self.peers.write() {
            Ok(mut guard) => guard.retain(|p| !Arc::ptr_eq(p, peer)),
            Err(poisoned) => poisoned.into_inner().retain(|p| !Arc::ptr_eq(p, peer)),
        }
    }

    /// The local APICs of all vCPUs.
    pub fn apics(&self) -> Vec<Arc<Apic>> {
        self.peers().iter().map(|p| p.apic.clone()).collect()
    }

    /// The caller's turn at locked accesses that take several host instructions.
    pub(crate) fn split_turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.split_lock)
    }

    /// The offset from the host's TSC for a vCPU whose TSC is set to `value` from outside. What
    /// is within a second of where the last one set is by now is meant to be the same: states
    /// of several vCPUs are never restored at one instant, but their TSCs must agree. (KVM
    /// does the same.)
    pub fn tsc_offset_for(&self, value: u64) -> u64 {
        let now = crate::cpu::host_tsc();
        let fresh = value.wrapping_sub(now);
        let mut last = lock(&self.tsc_set);
        let offset = match *last {
            Some(offset) if near(now.wrapping_add(offset), value) => offset,
            _ => fresh,
        };
        *last = Some(offset);
        offset
    }

    /// The offset for a vCPU that comes later: its TSC agrees with that of the others.
    pub(crate) fn tsc_offset(&self) -> u64 {
        lock(&self.tsc_set).unwrap_or(0)
    }

    fn tell_all(&self, mail: Mail) {
        let peers = self.peers();
        for peer in &peers {
            peer.post(mail);
        }
        for peer in &peers {
            peer.settle();
        }
    }

    /// Makes host memory visible to the guest, replacing slot `id` if there is one.
    ///
    /// # Safety
    /// As `Memory::map`.
    pub unsafe fn map_memory(
        &self,
        id: u32,
        gpa: u64,
        len: u64,
        host: *mut u8,
        readonly: bool,
        log_dirty: bool,
    ) -> Result<(), MemoryError> {
        // SAFETY: the caller's promise is the callee's.
        unsafe {
            self.memory.map(id, gpa, len, host, readonly, log_dirty)?;
        }
        self.tell_all(Mail::Slots);
        Ok(())
    }

    /// Writes to slot `id` are recorded from now on, or no longer. On return all vCPUs keep to it; what they have decoded
    /// stays.
    pub fn log_writes(&self, id: u32, on: bool) -> Result<(), MemoryError> {
        self.memory.log_writes(id, on)?;
        self.tell_all(Mail::Logging);
        Ok(())
    }

    /// Takes a slot away. On return no vCPU uses it.
    pub fn unmap_memory(&self, id: u32) -> Result<(), MemoryError> {
        self.memory.unmap(id)?;
        self.tell_all(Mail::Slots);
        Ok(())
    }

    /// Pages of slot `id` written since the last call, one bit a page, and clears them.
    pub fn dirty_log(&self, id: u32) -> Result<Vec<u64>, MemoryError> {
        // vCPUs mark a page when they first get at it, so they have to forget it afterwards:
        // what they wrote in between is in pages that are in this log already.
        let log = self.memory.take_dirty(id)?;
        self.tell_all(Mail::DirtyLog);
        Ok(log)
    }

    /// The guest-physical addresses of the blocks of 64-bit code that each vCPU has run lately, by its number, for
    /// `Cpu::decode_ahead` in another process. Of one that does not run nothing is known.
    pub fn recent_code(&self) -> Vec<(u32, Vec<u64>)> {
        let peers = self.peers();
        for peer in &peers {
            *lock(&peer.recent) = None;
            peer.post(Mail::Recent);
        }
        let told = |peer: &Arc<Peer>| (peer.apic.id(), peer.await_recent());
        peers.iter().map(told).collect()
    }

    /// A device has written `len` bytes of RAM at `gpa`: dirty logs record it, and code decoded
    /// from there is forgotten before any interrupt that the device sends afterwards is taken.
    pub fn memory_written(&self, gpa: u64, len: u64) {
        let slots = self.memory.snapshot();
        let Some(end) = gpa.checked_add(len).filter(|_| len > 0) else {
            return;
        };
        let mut peers: Option<Vec<Arc<Peer>>> = None;
        let mut at = gpa;
        while at < end {
            let page = at & !PAGE_MASK;
            let next = end.min(page + PAGE_SIZE);
            if let Some(slot) = slots.find(at) {
                slot.mark_dirty(at);
                let (first, last) = (at >> 6 & 63, (next - 1) >> 6 & 63);
                let chunks = (u64::MAX >> (63 - (last - first))) << first;
                let code = slot.code_map(at);
                // Whoever decodes from here again sets the bits again, before it reads the bytes.
                if code.load(Ordering::Acquire) & chunks != 0
                    && code.fetch_and(!chunks, Ordering::AcqRel) & chunks != 0
                {
                    for peer in peers.get_or_insert_with(|| self.peers()) {
                        peer.post(Mail::CodeWritten { page, chunks });
                    }
                }
            }
            at = next;
        }
    }

    /// The paravirtual clock in nanoseconds.
    pub fn clock(&self) -> u64 {
        self.time.now()
    }

    /// Sets the paravirtual clock.
    pub fn set_clock(&self, nanoseconds: u64) {
        self.time.set(nanoseconds);
    }
}

/// Less than a second lies between two values of the TSC.
fn near(a: u64, b: u64) -> bool {
    a.abs_diff(b) < crate::tsc::khz() * 1000
}

/// The host's CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut ts = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes to a local of the right type; CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut ts) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::host_tsc;

    #[test]
    fn counters_set_one_after_the_other_agree() {
        let machine = Machine::new();
        let value = 1 << 40;
        let first = machine.tsc_offset_for(value);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(machine.tsc_offset_for(value + 1000), first);
        // Far away is another time on purpose.
        let other = machine.tsc_offset_for(1 << 50);
        assert!(near(host_tsc().wrapping_add(other), 1 << 50));
        assert_ne!(other, first);
    }
}
