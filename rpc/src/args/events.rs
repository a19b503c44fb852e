//! Event messages: the arguments and answers of their procedures.

use crate::limits::{GRAPHICS_IDENTITY_MAX, TUNABLE_PARAMS_MAX};
use crate::types::{Domain, Network, NodeDevice, Secret, StoragePool, TypedParam};
use crate::xdr::{List, xdr_structs};

xdr_structs! {
    DomainEventLifecycleMsg {
        dom: Domain,
        event: i32,
        detail: i32,
    }
    DomainEventCallbackLifecycleMsg {
        callback_id: i32,
        msg: DomainEventLifecycleMsg,
    }
    DomainEventRebootMsg {
        dom: Domain,
    }
    DomainEventCallbackRebootMsg {
        callback_id: i32,
        msg: DomainEventRebootMsg,
    }
    DomainEventRtcChangeMsg {
        dom: Domain,
        offset: i64,
    }
    DomainEventCallbackRtcChangeMsg {
        callback_id: i32,
        msg: DomainEventRtcChangeMsg,
    }
    DomainEventWatchdogMsg {
        dom: Domain,
        action: i32,
    }
    DomainEventCallbackWatchdogMsg {
        callback_id: i32,
        msg: DomainEventWatchdogMsg,
    }
    DomainEventIoErrorMsg {
        dom: Domain,
        src_path: String,
        dev_alias: String,
        action: i32,
    }
    DomainEventCallbackIoErrorMsg {
        callback_id: i32,
        msg: DomainEventIoErrorMsg,
    }
    DomainEventIoErrorReasonMsg {
        dom: Domain,
        src_path: String,
        dev_alias: String,
        action: i32,
        reason: String,
    }
    DomainEventCallbackIoErrorReasonMsg {
        callback_id: i32,
        msg: DomainEventIoErrorReasonMsg,
    }
    DomainEventGraphicsAddress {
        family: i32,
        node: String,
        service: String,
    }
    DomainEventGraphicsIdentity {
        kind: String,
        name: String,
    }
    DomainEventGraphicsMsg {
        dom: Domain,
        phase: i32,
        local: DomainEventGraphicsAddress,
        remote: DomainEventGraphicsAddress,
        auth_scheme: String,
        subject: List<DomainEventGraphicsIdentity, GRAPHICS_IDENTITY_MAX>,
    }
    DomainEventCallbackGraphicsMsg {
        callback_id: i32,
        msg: DomainEventGraphicsMsg,
    }
    DomainEventBlockJobMsg {
        dom: Domain,
        path: String,
        kind: i32,
        status: i32,
    }
    DomainEventCallbackBlockJobMsg {
        callback_id: i32,
        msg: DomainEventBlockJobMsg,
    }
    DomainEventDiskChangeMsg {
        dom: Domain,
        old_src_path: Option<String>,
        new_src_path: Option<String>,
        dev_alias: String,
        reason: i32,
    }
    DomainEventCallbackDiskChangeMsg {
        callback_id: i32,
        msg: DomainEventDiskChangeMsg,
    }
    DomainEventTrayChangeMsg {
        dom: Domain,
        dev_alias: String,
        reason: i32,
    }
    DomainEventCallbackTrayChangeMsg {
        callback_id: i32,
        msg: DomainEventTrayChangeMsg,
    }
    DomainEventPmwakeupMsg {
        dom: Domain,
    }
    DomainEventCallbackPmwakeupMsg {
        callback_id: i32,
        reason: i32,
        msg: DomainEventPmwakeupMsg,
    }
    DomainEventPmsuspendMsg {
        dom: Domain,
    }
    DomainEventCallbackPmsuspendMsg {
        callback_id: i32,
        reason: i32,
        msg: DomainEventPmsuspendMsg,
    }
    DomainEventBalloonChangeMsg {
        dom: Domain,
        actual: u64,
    }
    DomainEventCallbackBalloonChangeMsg {
        callback_id: i32,
        msg: DomainEventBalloonChangeMsg,
    }
    DomainEventPmsuspendDiskMsg {
        dom: Domain,
    }
    DomainEventCallbackPmsuspendDiskMsg {
        callback_id: i32,
        reason: i32,
        msg: DomainEventPmsuspendDiskMsg,
    }
    DomainEventControlErrorMsg {
        dom: Domain,
    }
    DomainEventCallbackControlErrorMsg {
        callback_id: i32,
        msg: DomainEventControlErrorMsg,
    }
    DomainEventDeviceRemovedMsg {
        dom: Domain,
        dev_alias: String,
    }
    DomainEventCallbackDeviceRemovedMsg {
        callback_id: i32,
        msg: DomainEventDeviceRemovedMsg,
    }
    DomainEventBlockJob2Msg {
        callback_id: i32,
        dom: Domain,
        dst: String,
        kind: i32,
        status: i32,
    }
    DomainEventBlockThresholdMsg {
        callback_id: i32,
        dom: Domain,
        dev: String,
        path: Option<String>,
        threshold: u64,
        excess: u64,
    }
    DomainEventCallbackTunableMsg {
        callback_id: i32,
        dom: Domain,
        params: List<TypedParam, TUNABLE_PARAMS_MAX>,
    }
    DomainEventCallbackDeviceAddedMsg {
        callback_id: i32,
        dom: Domain,
        dev_alias: String,
    }
    ConnectEventConnectionClosedMsg {
        reason: i32,
    }
    NetworkEventLifecycleMsg {
        callback_id: i32,
        net: Network,
        event: i32,
        detail: i32,
    }
    StoragePoolEventLifecycleMsg {
        callback_id: i32,
        pool: StoragePool,
        event: i32,
        detail: i32,
    }
    StoragePoolEventRefreshMsg {
        callback_id: i32,
        pool: StoragePool,
    }
    NodeDeviceEventLifecycleMsg {
        callback_id: i32,
        dev: NodeDevice,
        event: i32,
        detail: i32,
    }
    NodeDeviceEventUpdateMsg {
        callback_id: i32,
        dev: NodeDevice,
    }
    DomainEventCallbackAgentLifecycleMsg {
        callback_id: i32,
        dom: Domain,
        state: i32,
        reason: i32,
    }
    DomainEventCallbackMigrationIterationMsg {
        callback_id: i32,
        dom: Domain,
        iteration: i32,
    }
    DomainEventCallbackJobCompletedMsg {
        callback_id: i32,
        dom: Domain,
        params: List<TypedParam, 64>,
    }
    DomainEventCallbackDeviceRemovalFailedMsg {
        callback_id: i32,
        dom: Domain,
        dev_alias: String,
    }
    DomainEventCallbackMetadataChangeMsg {
        callback_id: i32,
        dom: Domain,
        kind: i32,
        nsuri: Option<String>,
    }
    DomainEventMemoryFailureMsg {
        callback_id: i32,
        dom: Domain,
        recipient: i32,
        action: i32,
        flags: u32,
    }
    SecretEventLifecycleMsg {
        callback_id: i32,
        secret: Secret,
        event: i32,
        detail: i32,
    }
    SecretEventValueChangedMsg {
        callback_id: i32,
        secret: Secret,
    }
    DomainEventMemoryDeviceSizeChangeMsg {
        callback_id: i32,
        dom: Domain,
        alias: String,
        size: u64,
    }
    NetworkEventCallbackMetadataChangeMsg {
        callback_id: i32,
        net: Network,
        kind: i32,
        nsuri: Option<String>,
    }
    DomainEventNicMacChangeMsg {
        callback_id: i32,
        dom: Domain,
        alias: String,
        old_mac: String,
        new_mac: String,
    }
}
