//! Interrupt messages: from ICR, from MSIs, and whom they reach (SDM vol. 3, 11.6, 11.11).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Apic, SVR_ENABLE, base, esr, reg};
use crate::attention::Attention;

/// The delivery mode field (3 bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryMode {
    /// To all destinations.
    Fixed,
    /// To the destination with the lowest priority.
    LowestPriority,
    /// System management interrupt: there is no SMM, so it is dropped.
    Smi,
    /// Reserved: dropped.
    Reserved,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI.
    StartUp,
    /// From an 8259: there is none, so it is dropped.
    ExtInt,
}

impl DeliveryMode {
    /// From the low three bits of `bits`.
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => Self::Reserved,
        }
    }
}

/// An interrupt on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Destination: an id, or a set of logical ids.
    pub destination: u32,
    /// The destination is logical.
    pub logical: bool,
    /// How it is delivered.
    pub mode: DeliveryMode,
    /// Vector.
    pub vector: u8,
    /// Level-triggered.
    pub level: bool,
}

impl Message {
    /// An MSI (SDM vol. 3, 11.11); the high half of the address carries bits 8..32 of the
    /// destination, as KVM has it. `None` where the address is not an interrupt's.
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        let low = address as u32;
        if low >> 20 != 0xfee {
            return None;
        }
        let redirect = low & (1 << 3) != 0;
        let mode = match DeliveryMode::from_bits(data >> 8) {
            DeliveryMode::Fixed if redirect => DeliveryMode::LowestPriority,
            mode => mode,
        };
        Some(Self {
            destination: low >> 12 & 0xff | (address >> 32) as u32 & 0xffff_ff00,
            logical: low & (1 << 2) != 0,
            mode,
            vector: data as u8,
            level: data & (1 << 15) != 0,
        })
    }
}

/// Where the next search for the lowest priority begins, so that equals take turns.
static TURN: AtomicU32 = AtomicU32::new(0);

/// Delivers `message` to those of `apics` it is meant for. From any thread.
pub fn deliver(apics: &[Arc<Apic>], message: &Message) {
    if message.mode != DeliveryMode::LowestPriority {
        for apic in apics.iter().filter(|apic| apic.is_destination(message)) {
            apic.receive(message.mode, message.vector, message.level);
        }
        return;
    }
    let takes =
        |apic: &&Arc<Apic>| apic.is_destination(message) && apic.get(reg::SVR) & SVR_ENABLE != 0;
    let turn = TURN.fetch_add(1, Ordering::Relaxed) as usize;
    let start = turn.checked_rem(apics.len()).unwrap_or(0);
    let (before, after) = apics.split_at(start);
    let lowest = after
        .iter()
        .chain(before)
        .filter(takes)
        .min_by_key(|apic| apic.ppr() >> 4);
    if let Some(apic) = lowest {
        apic.receive(DeliveryMode::Fixed, message.vector, message.level);
    }
}

impl Apic {
    /// Whether a message is for this APIC, by the mode it is in (SDM vol. 3, 11.6.2).
    fn is_destination(&self, message: &Message) -> bool {
        let value = self.base();
        if value & base::ENABLE == 0 {
            return false;
        }
        let dest = message.destination;
        let ldr = self.get(reg::LDR);
        if value & base::EXTD != 0 {
            return dest == u32::MAX
                || if message.logical {
                    dest >> 16 == ldr >> 16 && dest & ldr & 0xffff != 0
                } else {
                    dest == self.id
                };
        }
        if dest == 0xff || dest == u32::MAX {
            return true;
        }
        if !message.logical {
            return dest == self.get(reg::ID) >> 24;
        }
        let ldr = ldr >> 24;
        if self.get(reg::DFR) >> 28 == 0xf {
            dest & ldr != 0
        } else {
            let cluster = dest >> 4 & 15;
            (cluster == 15 || cluster == ldr >> 4) && dest & ldr & 15 != 0
        }
    }

    fn receive(&self, mode: DeliveryMode, vector: u8, level: bool) {
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.accept(vector, level),
            DeliveryMode::Nmi => self.attention.raise(Attention::NMI),
            DeliveryMode::Init => self.attention.raise(Attention::INIT),
            DeliveryMode::StartUp => {
                self.sipi_vector.store(vector, Ordering::SeqCst);
                self.attention.raise(Attention::SIPI);
            }
            DeliveryMode::Smi | DeliveryMode::ExtInt | DeliveryMode::Reserved => {
                log::debug!("vCPU {}: a {mode:?} interrupt is dropped", self.id);
            }
        }
    }

    /// Sends what was written to ICR; `destination` as the present mode has it.
    pub(super) fn send_ipi(&self, low: u32, destination: u32) {
        let mode = DeliveryMode::from_bits(low >> 8);
        let assert = low & (1 << 14) != 0;
        let level = low & (1 << 15) != 0;
        if mode == DeliveryMode::Init && level && !assert {
            // INIT level de-assert: no processor since the Pentium does anything with it.
            return;
        }
        let vector = low as u8;
        let has_vector = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if has_vector && vector < 16 {
            self.error(esr::SEND_ILLEGAL_VECTOR);
            return;
        }
        let message = Message {
            destination,
            logical: low & (1 << 11) != 0,
            mode,
            vector,
            level,
        };
        let shorthand = low >> 18 & 3;
        if shorthand == 1 {
            if mode == DeliveryMode::Fixed {
                self.accept(vector, level);
            }
            return;
        }
        let Some(machine) = self.machine.get().and_then(|m| m.upgrade()) else {
            return;
        };
        let apics = machine.apics();
        match shorthand {
            0 => deliver(&apics, &message),
            _ => {
                for apic in apics.iter().filter(|a| a.enabled()) {
                    if shorthand == 2 || apic.id != self.id {
                        apic.receive(mode, vector, level);
                    }
                }
            }
        }
    }
}
