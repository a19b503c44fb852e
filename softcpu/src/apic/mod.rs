//! The local APIC (Intel SDM vol. 3, chapter 11).
//!
//! Its registers are atomics in the layout of the register page: other threads inject
//! interrupts by setting bits in IRR and raising the vCPU's attention, without a lock.

mod delivery;
mod registers;
#[cfg(test)]
mod tests;
mod timer;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

pub use delivery::{DeliveryMode, Message, deliver};

use crate::attention::Attention;
use crate::machine::Machine;
use timer::Timer;

/// What the core has to do after a write to a local APIC register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApicEffect {
    /// Nothing.
    None,
    /// A level-triggered interrupt with this vector was acknowledged: leave `run` with
    /// `Exit::IoapicEoi`.
    Eoi(u8),
}

/// Indices of registers: the offset in the page divided by 16 (SDM table 11-1).
mod reg {
    pub const ID: usize = 0x02;
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const PPR: usize = 0x0a;
    pub const EOI: usize = 0x0b;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const TMR: usize = 0x18;
    pub const IRR: usize = 0x20;
    pub const ESR: usize = 0x28;
    pub const ICR: usize = 0x30;
    pub const ICR_HIGH: usize = 0x31;
    pub const LVT_TIMER: usize = 0x32;
    pub const LVT_THERMAL: usize = 0x33;
    pub const LVT_PERFORMANCE: usize = 0x34;
    pub const LVT_LINT0: usize = 0x35;
    pub const LVT_LINT1: usize = 0x36;
    pub const LVT_ERROR: usize = 0x37;
    pub const INITIAL_COUNT: usize = 0x38;
    pub const CURRENT_COUNT: usize = 0x39;
    pub const DIVIDE: usize = 0x3e;
    pub const SELF_IPI: usize = 0x3f;
    pub const COUNT: usize = 0x40;
}

/// Version 0x14 (integrated), entries of the LVT less one: 5.
const VERSION: u32 = 0x0005_0014;
/// Mask bit of an LVT entry.
const LVT_MASKED: u32 = 1 << 16;
/// An LVT entry that lets the PC/AT's interrupt controllers through.
const EXTINT: u32 = 7 << 8;
/// Software-enable bit of SVR.
const SVR_ENABLE: u32 = 1 << 8;

/// Bits of IA32_APIC_BASE (SDM vol. 3, 11.4.4 and 11.12.1).
mod base {
    pub const BSP: u64 = 1 << 8;
    pub const EXTD: u64 = 1 << 10;
    pub const ENABLE: u64 = 1 << 11;
    pub const ADDRESS: u64 = 0xfee0_0000;
    /// The page's address, for 52 physical bits.
    pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;
}

/// Errors in ESR (SDM vol. 3, 11.5.3).
mod esr {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// One vCPU's local APIC. Other threads inject through it.
#[derive(Debug)]
pub struct Apic {
    id: u32,
    attention: Arc<Attention>,
    machine: OnceLock<Weak<Machine>>,
    base: AtomicU64,
    regs: [AtomicU32; reg::COUNT],
    /// Errors not yet latched into ESR.
    errors: AtomicU32,
    sipi_vector: AtomicU8,
    /// The level of the LINT0 input: the output of the PC/AT's interrupt controllers.
    lint0: AtomicBool,
    /// Vectors whose EOI the I/O APIC wants to hear of.
    ioapic_vectors: [AtomicU64; 4],
    timer: Timer,
}

impl Apic {
    /// A local APIC after power-up. `id` 0 is the bootstrap processor's.
    pub fn new(id: u32, attention: Arc<Attention>) -> Self {
        let bsp = if id == 0 { base::BSP } else { 0 };
        let apic = Self {
            id,
            attention,
            machine: OnceLock::new(),
            base: AtomicU64::new(base::ADDRESS | base::ENABLE | bsp),
            regs: [const { AtomicU32::new(0) }; reg::COUNT],
            errors: AtomicU32::new(0),
            sipi_vector: AtomicU8::new(0),
            lint0: AtomicBool::new(false),
            ioapic_vectors: [const { AtomicU64::new(0) }; 4],
            timer: Timer::default(),
        };
        apic.reset_registers();
        apic
    }

    /// Tells it its machine: the other processors its IPIs go to.
    pub fn connect(&self, machine: &Arc<Machine>) {
        // A second call could only name the same machine.
        let _ = self.machine.set(Arc::downgrade(machine));
    }

    /// Initial APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The flags of the vCPU it belongs to.
    pub fn attention(&self) -> &Arc<Attention> {
        &self.attention
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    /// Guest-physical address of the register page; `None` where it answers to MSRs only, or
    /// is switched off.
    pub fn page(&self) -> Option<u64> {
        let value = self.base();
        (value & (base::ENABLE | base::EXTD) == base::ENABLE).then_some(value & base::ADDRESS_MASK)
    }

    fn x2apic(&self) -> bool {
        self.base() & base::EXTD != 0
    }

    fn enabled(&self) -> bool {
        self.base() & base::ENABLE != 0
    }

    fn software_enabled(&self) -> bool {
        self.get(reg::SVR) & SVR_ENABLE != 0
    }

    fn get(&self, index: usize) -> u32 {
        self.regs[index].load(Ordering::Relaxed)
    }

    fn set(&self, index: usize, value: u32) {
        self.regs[index].store(value, Ordering::Relaxed);
    }

    /// What INIT does to the APIC (SDM vol. 3, 11.4.7.3): everything but its id and base.
    pub fn init(&self) {
        self.reset_registers();
        self.attention.clear(Attention::IRQ);
    }

    /// The vector of the last start-up IPI: the processor starts at `vector << 12`.
    pub fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::SeqCst)
    }

    fn reset_registers(&self) {
        for register in &self.regs {
            register.store(0, Ordering::Relaxed);
        }
        self.set(reg::VERSION, VERSION);
        self.set(reg::DFR, u32::MAX);
        self.set(reg::SVR, 0xff);
        for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
            self.set(lvt, LVT_MASKED);
        }
        if self.base() & base::BSP != 0 {
            // As firmware finds it on QEMU and KVM: the PC/AT's controllers get through.
            self.set(reg::LVT_LINT0, EXTINT);
        }
        self.errors.store(0, Ordering::Relaxed);
        self.timer.stop();
        self.set_ids();
    }

    /// ID and LDR as they are in the present mode.
    fn set_ids(&self) {
        if self.x2apic() {
            self.set(reg::ID, self.id);
            self.set(reg::LDR, (self.id >> 4) << 16 | 1 << (self.id & 15));
        } else {
            self.set(reg::ID, self.id << 24);
        }
    }

    /// The highest vector set in the 256-bit register that begins at `first`.
    fn highest(&self, first: usize) -> Option<u8> {
        (0..8).rev().find_map(|word| {
            let bits = self.regs[first + word].load(Ordering::SeqCst);
            (bits != 0).then(|| (word as u32 * 32 + 31 - bits.leading_zeros()) as u8)
        })
    }

    fn set_bit(&self, first: usize, vector: u8) {
        let word = &self.regs[first + usize::from(vector >> 5)];
        word.fetch_or(1 << (vector & 31), Ordering::SeqCst);
    }

    fn clear_bit(&self, first: usize, vector: u8) {
        let word = &self.regs[first + usize::from(vector >> 5)];
        word.fetch_and(!(1 << (vector & 31)), Ordering::SeqCst);
    }

    /// Processor priority (SDM vol. 3, 11.8.3.1).
    fn ppr(&self) -> u32 {
        let tpr = self.get(reg::TPR);
        let isr = u32::from(self.highest(reg::ISR).unwrap_or(0));
        if tpr >> 4 >= isr >> 4 {
            tpr
        } else {
            isr & 0xf0
        }
    }

    /// The interrupt that may be delivered now.
    fn deliverable(&self) -> Option<u8> {
        let vector = self.highest(reg::IRR)?;
        (u32::from(vector) >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// To be called when priorities went down: what was held back may be due.
    fn reconsider(&self) {
        if self.deliverable().is_some() || self.has_extint() {
            self.attention.raise(Attention::IRQ);
        }
    }

    /// Sets the LINT0 input. From any thread.
    pub fn set_lint0(&self, level: bool) {
        let was = self.lint0.swap(level, Ordering::SeqCst);
        if self.has_extint() {
            self.attention.raise(Attention::IRQ);
        } else if level && !was && self.enabled() {
            // Not an 8259's, but an interrupt of the APIC's own.
            self.fire(reg::LVT_LINT0);
        }
    }

    /// The PC/AT's interrupt controllers ask for an interrupt, and are let through: by LINT0's
    /// entry, or because the APIC is switched off and the pin is the processor's INTR.
    pub fn has_extint(&self) -> bool {
        let entry = self.get(reg::LVT_LINT0);
        self.lint0.load(Ordering::SeqCst)
            && (!self.enabled()
                || entry & LVT_MASKED == 0
                    && DeliveryMode::from_bits(entry >> 8) == DeliveryMode::ExtInt)
    }

    /// Takes the interrupt to deliver now, moving it from IRR to ISR; `None` where priorities
    /// hold everything back. Clears `Attention::IRQ` when nothing more is deliverable.
    pub fn take_interrupt(&self) -> Option<u8> {
        // Cleared before looking: what comes in meanwhile raises it again.
        self.attention.clear(Attention::IRQ);
        if self.has_extint() {
            // It came only now.
            self.attention.raise(Attention::IRQ);
        }
        if !self.enabled() {
            return None;
        }
        let vector = self.deliverable()?;
        self.clear_bit(reg::IRR, vector);
        self.set_bit(reg::ISR, vector);
        self.reconsider();
        Some(vector)
    }

    /// Undoes `take_interrupt` for an interrupt that was not delivered after all.
    pub fn retract(&self, vector: u8) {
        self.clear_bit(reg::ISR, vector);
        self.set_bit(reg::IRR, vector);
        self.attention.raise(Attention::IRQ);
    }

    /// Whether an interrupt could be delivered now, were the processor to take it.
    pub fn has_interrupt(&self) -> bool {
        self.has_extint() || self.enabled() && self.deliverable().is_some()
    }

    /// Accepts a fixed interrupt. From any thread.
    fn accept(&self, vector: u8, level: bool) {
        if vector < 16 {
            self.error(esr::RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        if !self.software_enabled() {
            return;
        }
        if level {
            self.set_bit(reg::TMR, vector);
        } else {
            self.clear_bit(reg::TMR, vector);
        }
        self.set_bit(reg::IRR, vector);
        self.attention.raise(Attention::IRQ);
    }

    /// Sends the interrupt of a local source.
    fn fire(&self, lvt: usize) {
        let entry = self.get(lvt);
        if entry & LVT_MASKED != 0 {
            return;
        }
        match DeliveryMode::from_bits(entry >> 8) {
            DeliveryMode::Nmi => self.attention.raise(Attention::NMI),
            DeliveryMode::Fixed => self.accept(entry as u8, false),
            _ => {}
        }
    }

    /// Notes an error, and interrupts where that is asked for.
    fn error(&self, bit: u32) {
        let old = self.errors.fetch_or(bit, Ordering::SeqCst);
        let entry = self.get(reg::LVT_ERROR);
        // An illegal vector in the error entry itself must not raise errors for ever.
        if old & bit == 0 && entry & LVT_MASKED == 0 && entry as u8 >= 16 {
            self.accept(entry as u8, false);
        }
    }

    /// Whether nobody but this APIC needs to hear of the end of `vector`'s interrupt, and no other
    /// one waits for it.
    pub(crate) fn ends_silently(&self, vector: u8) -> bool {
        let (word, bit) = (usize::from(vector >> 5), vector & 31);
        let level = self.regs[reg::TMR + word].load(Ordering::SeqCst) >> bit & 1 != 0;
        let heard = self.ioapic_vectors[usize::from(vector >> 6)].load(Ordering::SeqCst);
        !level
            && heard >> (vector & 63) & 1 == 0
            && self.highest(reg::ISR) == Some(vector)
            && self.highest(reg::IRR).is_none()
    }

    /// End of the interrupt in service.
    pub(crate) fn end_of_interrupt(&self) -> ApicEffect {
        let Some(vector) = self.highest(reg::ISR) else {
            return ApicEffect::None;
        };
        self.clear_bit(reg::ISR, vector);
        self.reconsider();
        let word = self.ioapic_vectors[usize::from(vector >> 6)].load(Ordering::SeqCst);
        if word >> (vector & 63) & 1 != 0 {
            ApicEffect::Eoi(vector)
        } else {
            ApicEffect::None
        }
    }

    /// Which vectors' EOIs the I/O APIC wants to hear of, one bit a vector.
    pub fn set_ioapic_vectors(&self, vectors: [u64; 4]) {
        for (to, from) in self.ioapic_vectors.iter().zip(vectors) {
            to.store(from, Ordering::SeqCst);
        }
    }

    /// CR8 (bits 4..8 of TPR).
    pub fn cr8(&self) -> u64 {
        u64::from(self.get(reg::TPR) >> 4)
    }

    /// Sets CR8; bits above 3 have been refused by the caller.
    pub fn set_cr8(&self, value: u64) {
        self.set_tpr((value as u32 & 15) << 4);
    }

    fn set_tpr(&self, value: u32) {
        self.set(reg::TPR, value & 0xff);
        self.reconsider();
    }

    /// The register page as it is saved (1 KiB, the form of KVM_GET_LAPIC), at host TSC `now`.
    pub fn save(&self, now: u64) -> Vec<u8> {
        let mut page = vec![0; reg::COUNT * 16];
        for (index, slot) in page.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let value = match index {
                reg::PPR => self.ppr(),
                reg::CURRENT_COUNT => self.current_count(now),
                _ => self.get(index),
            };
            slot[..4].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    /// Sets everything from a saved page and IA32_APIC_BASE, at host TSC `now`. A short page
    /// leaves the rest zero. The TSC deadline is set apart from it.
    pub fn load(&self, page: &[u8], base: u64, now: u64) {
        self.timer.stop();
        self.base.store(base, Ordering::Relaxed);
        let (slots, _) = page.as_chunks::<16>();
        for (index, register) in self.regs.iter().enumerate() {
            let value = slots.get(index).map_or(0, |slot| {
                u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]])
            });
            register.store(value, Ordering::SeqCst);
        }
        self.set(reg::VERSION, VERSION);
        self.set_ids();
        self.errors.store(0, Ordering::Relaxed);
        let count = self.get(reg::CURRENT_COUNT);
        self.restart_timer(count, now);
        self.attention.clear(Attention::IRQ);
        self.reconsider();
    }
}
