//! Register access: by memory (xAPIC) and by MSR (x2APIC).

use std::sync::atomic::Ordering;

use super::timer::TimerMode;
use super::{Apic, ApicEffect, LVT_MASKED, SVR_ENABLE, base, esr, reg};
use crate::cpu::host_tsc;
use crate::exception::{Exception, Fallible};

const MSR_APIC_BASE: u32 = 0x1b;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// x2APIC registers: this plus the register's index (SDM table 11-6).
const MSR_X2APIC: u32 = 0x800;

/// Bits of an LVT entry the guest may set, by register.
fn lvt_bits(index: usize) -> u32 {
    match index {
        // Vector, mask, mode.
        reg::LVT_TIMER => 0x0007_00ff,
        // And delivery mode, polarity, trigger mode (pins only).
        reg::LVT_LINT0 | reg::LVT_LINT1 => 0x0001_a7ff,
        // Thermal, performance: delivery mode.
        reg::LVT_THERMAL | reg::LVT_PERFORMANCE => 0x0001_07ff,
        // Error.
        _ => 0x0001_00ff,
    }
}

impl Apic {
    /// Reads 32 bits at `offset` (16-byte aligned) of the register page.
    pub fn mmio_read(&self, offset: u32) -> u32 {
        let index = (offset >> 4) as usize;
        if index < reg::COUNT && offset & 15 == 0 {
            self.read_register(index)
        } else {
            self.error(esr::ILLEGAL_REGISTER);
            0
        }
    }

    /// Writes 32 bits at `offset` (16-byte aligned) of the register page.
    pub fn mmio_write(&self, offset: u32, value: u32) -> ApicEffect {
        let index = (offset >> 4) as usize;
        if offset & 15 != 0 || index >= reg::COUNT {
            self.error(esr::ILLEGAL_REGISTER);
            return ApicEffect::None;
        }
        match index {
            // Read-only since the Pentium 4; kept, so that delivery and CPUID agree.
            reg::ID => {}
            reg::LDR => self.set(reg::LDR, value & 0xff00_0000),
            reg::DFR => self.set(reg::DFR, value | 0x0fff_ffff),
            reg::ICR_HIGH => self.set(reg::ICR_HIGH, value & 0xff00_0000),
            reg::ICR => {
                self.set(reg::ICR, value & 0x000c_cfff);
                self.send_ipi(value, self.get(reg::ICR_HIGH) >> 24);
            }
            reg::SELF_IPI => self.error(esr::ILLEGAL_REGISTER),
            _ => return self.write_register(index, value),
        }
        ApicEffect::None
    }

    fn read_register(&self, index: usize) -> u32 {
        match index {
            reg::PPR => self.ppr(),
            reg::CURRENT_COUNT => self.current_count(host_tsc()),
            reg::EOI | reg::SELF_IPI => 0,
            _ => self.get(index),
        }
    }

    /// Writes a register that is the same in both modes.
    fn write_register(&self, index: usize, value: u32) -> ApicEffect {
        match index {
            reg::TPR => self.set_tpr(value),
            reg::EOI => return self.end_of_interrupt(),
            reg::SVR => {
                self.set(reg::SVR, value & 0x1ff);
                if value & SVR_ENABLE == 0 {
                    for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
                        self.set(lvt, self.get(lvt) | LVT_MASKED);
                    }
                }
            }
            reg::ESR => {
                let errors = self.errors.swap(0, Ordering::SeqCst);
                self.set(reg::ESR, errors);
            }
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                let mut value = value & lvt_bits(index);
                if !self.software_enabled() {
                    value |= LVT_MASKED;
                }
                if index != reg::LVT_TIMER {
                    self.set(index, value);
                    self.reconsider();
                } else if value >> 17 & 3 != 3 {
                    self.set_timer_lvt(value);
                }
            }
            reg::INITIAL_COUNT => {
                if self.timer_mode() != TimerMode::TscDeadline {
                    self.set(reg::INITIAL_COUNT, value);
                    self.restart_timer(value, host_tsc());
                }
            }
            reg::DIVIDE => self.set_divisor(value, host_tsc()),
            _ => self.error(esr::ILLEGAL_REGISTER),
        }
        ApicEffect::None
    }

    /// Reads IA32_APIC_BASE, TSC_DEADLINE or an x2APIC MSR.
    pub fn msr_read(&self, index: u32) -> Fallible<u64> {
        match index {
            MSR_APIC_BASE => Ok(self.base()),
            MSR_TSC_DEADLINE => Ok(self.tsc_deadline()),
            _ => {
                let register = self.x2apic_register(index)?;
                match register {
                    reg::ICR => {
                        let high = u64::from(self.get(reg::ICR_HIGH));
                        Ok(high << 32 | u64::from(self.get(reg::ICR)))
                    }
                    reg::ID
                    | reg::VERSION
                    | reg::TPR
                    | reg::PPR
                    | reg::LDR
                    | reg::SVR
                    | reg::ISR..=reg::ESR
                    | reg::LVT_TIMER..=reg::CURRENT_COUNT
                    | reg::DIVIDE => Ok(self.read_register(register).into()),
                    _ => Err(Exception::GP0),
                }
            }
        }
    }

    /// Writes IA32_APIC_BASE, TSC_DEADLINE or an x2APIC MSR.
    pub fn msr_write(&self, index: u32, value: u64) -> Fallible<ApicEffect> {
        match index {
            MSR_APIC_BASE => self.set_base(value)?,
            MSR_TSC_DEADLINE => self.set_tsc_deadline(value, host_tsc()),
            _ => return self.x2apic_write(self.x2apic_register(index)?, value),
        }
        Ok(ApicEffect::None)
    }

    fn x2apic_register(&self, index: u32) -> Fallible<usize> {
        let register = index.wrapping_sub(MSR_X2APIC) as usize;
        if self.x2apic() && register < reg::COUNT {
            Ok(register)
        } else {
            Err(Exception::GP0)
        }
    }

    /// Reserved bits are not forgiven here (SDM vol. 3, 11.12.1.3).
    fn x2apic_write(&self, register: usize, value: u64) -> Fallible<ApicEffect> {
        let allowed: u64 = match register {
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x1ff,
            reg::ICR => 0xffff_ffff_000c_cfff,
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                // Delivery status and remote IRR are read-only, and may be written back.
                u64::from(lvt_bits(register)) | 1 << 12 | 1 << 14
            }
            reg::INITIAL_COUNT => 0xffff_ffff,
            reg::DIVIDE => 0xb,
            _ => return Err(Exception::GP0),
        };
        if value & !allowed != 0 {
            return Err(Exception::GP0);
        }
        let low = value as u32;
        match register {
            reg::ICR => {
                self.set(reg::ICR, low);
                self.set(reg::ICR_HIGH, (value >> 32) as u32);
                self.send_ipi(low, (value >> 32) as u32);
                Ok(ApicEffect::None)
            }
            reg::SELF_IPI => {
                if low < 16 {
                    self.error(esr::SEND_ILLEGAL_VECTOR);
                } else {
                    self.accept(low as u8, false);
                }
                Ok(ApicEffect::None)
            }
            _ => Ok(self.write_register(register, low)),
        }
    }

    /// IA32_APIC_BASE and its modes (SDM vol. 3, 11.12.5).
    fn set_base(&self, value: u64) -> Fallible<()> {
        let known = base::ADDRESS_MASK | base::BSP | base::ENABLE | base::EXTD;
        let old = self.base();
        let (was_on, was_x2) = (old & base::ENABLE != 0, old & base::EXTD != 0);
        let (on, x2) = (value & base::ENABLE != 0, value & base::EXTD != 0);
        let refused = value & !known != 0 || x2 && !on || was_x2 && on && !x2 || !was_on && x2;
        if refused {
            return Err(Exception::GP0);
        }
        self.base.store(value, Ordering::SeqCst);
        if was_on && !on {
            self.init();
            self.reconsider();
        } else if x2 && !was_x2 {
            self.set(reg::ICR_HIGH, 0);
            self.set_ids();
        }
        Ok(())
    }
}
