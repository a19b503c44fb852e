//! VMCALL and VMMCALL (Linux, Documentation/virt/kvm/x86/hypercalls.rst).

use super::{feature, offered};
use crate::apic::{DeliveryMode, Message, deliver};
use crate::attention::Attention;
use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::state::gpr;

const KICK_CPU: u64 = 5;
const SEND_IPI: u64 = 10;

/// `KVM_ENOSYS` and `KVM_EPERM`, negative.
const UNKNOWN: u64 = 0u64.wrapping_sub(1000);
const NOT_PERMITTED: u64 = 0u64.wrapping_sub(1);

/// Runs the hypercall in the registers; the result is in RAX.
///
/// # Errors
/// #UD where the guest was not told of hypercalls.
pub fn hypercall(cpu: &mut Cpu) -> Fallible<()> {
    if !offered(cpu, u32::MAX) {
        return Err(Exception::UD);
    }
    let long = cpu.s.mode64();
    let arg = |register: usize| {
        let value = cpu.s.gpr[register];
        if long { value } else { value & 0xffff_ffff }
    };
    let result = match arg(gpr::RAX) {
        _ if cpu.s.cpl != 0 => NOT_PERMITTED,
        KICK_CPU if offered(cpu, feature::PV_UNHALT) => {
            let target = arg(gpr::RCX);
            let apics = cpu.machine.apics();
            if let Some(apic) = apics.iter().find(|apic| u64::from(apic.id()) == target) {
                apic.attention().raise(Attention::UNHALT);
            }
            0
        }
        SEND_IPI if offered(cpu, feature::PV_SEND_IPI) => send_ipi(
            cpu,
            [arg(gpr::RBX), arg(gpr::RCX)],
            arg(gpr::RDX),
            arg(gpr::RSI),
            if long { 64 } else { 32 },
        ),
        _ => UNKNOWN,
    };
    cpu.s.gpr[gpr::RAX] = if long { result } else { result & 0xffff_ffff };
    Ok(())
}

/// Sends an interrupt to the processors in a bitmap of APIC ids that starts at `min`; how many.
fn send_ipi(cpu: &Cpu, bitmap: [u64; 2], min: u64, icr: u64, width: u32) -> u64 {
    let mode = DeliveryMode::from_bits((icr >> 8) as u32);
    // Shorthands and logical destinations have no meaning here.
    if !matches!(mode, DeliveryMode::Fixed | DeliveryMode::Nmi) || icr & 0x000c_0800 != 0 {
        return 0u64.wrapping_sub(22);
    }
    let apics = cpu.machine.apics();
    let mut count = 0;
    for apic in &apics {
        let Some(offset) = u64::from(apic.id()).checked_sub(min) else {
            continue;
        };
        let (word, bit) = (offset / u64::from(width), offset % u64::from(width));
        let set = usize::try_from(word)
            .ok()
            .and_then(|word| bitmap.get(word))
            .is_some_and(|bits| bits >> bit & 1 != 0);
        if set {
            let message = Message {
                destination: apic.id(),
                logical: false,
                mode,
                vector: icr as u8,
                level: false,
            };
            deliver(std::slice::from_ref(apic), &message);
            count += 1;
        }
    }
    count
}
