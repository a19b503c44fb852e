//! The procedures of the QEMU program, which stand beside the others with [`QEMU_BASE`] added to their numbers.

use super::{Access, Procedure, ProcedureInfo, QEMU_BASE};
use crate::args::*;

macro_rules! procedures {
    ($($number:literal $name:ident($args:ty) -> $ret:ty;)*) => {
        $(
            #[doc = concat!("Procedure ", $number, " of the QEMU program: `", stringify!($name), "`.")]
            pub const $name: Procedure<$args, $ret> = Procedure::new(QEMU_BASE + $number);
        )*

        /// All of them; every one needs a connection with full rights.
        pub static QEMU_PROCEDURES: &[ProcedureInfo] = &[
            $(ProcedureInfo {
                number: QEMU_BASE + $number,
                name: stringify!($name),
                access: Access::Write,
                stream: None,
                event: false,
            },)*
        ];
    };
}

procedures! {
    1 DOMAIN_QEMU_MONITOR_COMMAND(QemuDomainMonitorCommandArgs) -> QemuDomainMonitorCommandRet;
    2 DOMAIN_QEMU_ATTACH(QemuDomainAttachArgs) -> QemuDomainAttachRet;
    3 DOMAIN_QEMU_AGENT_COMMAND(QemuDomainAgentCommandArgs) -> QemuDomainAgentCommandRet;
    4 CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER(QemuConnectDomainMonitorEventRegisterArgs)
        -> QemuConnectDomainMonitorEventRegisterRet;
    5 CONNECT_DOMAIN_QEMU_MONITOR_EVENT_DEREGISTER(QemuConnectDomainMonitorEventDeregisterArgs) -> ();
}

/// Message 6 of the QEMU program: an event of QEMU's monitor.
pub const DOMAIN_QEMU_MONITOR_EVENT: Procedure<QemuDomainMonitorEventMsg, ()> =
    Procedure::new(QEMU_BASE + 6);
