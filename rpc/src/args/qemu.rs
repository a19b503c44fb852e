//! The QEMU program: the arguments and answers of its procedures.

use crate::types::Domain;
use crate::xdr::xdr_structs;

xdr_structs! {
    QemuDomainMonitorCommandArgs {
        dom: Domain,
        cmd: String,
        flags: u32,
    }
    QemuDomainMonitorCommandRet {
        result: String,
    }
    QemuDomainAttachArgs {
        pid_value: u32,
        flags: u32,
    }
    QemuDomainAttachRet {
        dom: Domain,
    }
    QemuDomainAgentCommandArgs {
        dom: Domain,
        cmd: String,
        timeout: i32,
        flags: u32,
    }
    QemuDomainAgentCommandRet {
        result: Option<String>,
    }
    QemuConnectDomainMonitorEventRegisterArgs {
        dom: Option<Domain>,
        event: Option<String>,
        flags: u32,
    }
    QemuConnectDomainMonitorEventRegisterRet {
        callback_id: i32,
    }
    QemuConnectDomainMonitorEventDeregisterArgs {
        callback_id: i32,
    }
    QemuDomainMonitorEventMsg {
        callback_id: i32,
        dom: Domain,
        event: String,
        seconds: i64,
        micros: u32,
        details: Option<String>,
    }
}
