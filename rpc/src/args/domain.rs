//! Domains: life cycle, definition, state: the arguments and answers of their procedures.

use crate::limits::{SECURITY_LABEL_LIST_MAX, SECURITY_LABEL_MAX};
use crate::types::{Domain, TypedParam};
use crate::xdr::{CharList, List, Uuid, xdr_structs};

xdr_structs! {
    DomainGetSchedulerTypeArgs {
        dom: Domain,
    }
    DomainGetSchedulerTypeRet {
        kind: String,
        nparams: i32,
    }
    DomainCreateXmlArgs {
        xml_desc: String,
        flags: u32,
    }
    DomainCreateXmlRet {
        dom: Domain,
    }
    DomainCreateXmlWithFilesArgs {
        xml_desc: String,
        flags: u32,
    }
    DomainCreateXmlWithFilesRet {
        dom: Domain,
    }
    DomainLookupByIdArgs {
        id: i32,
    }
    DomainLookupByIdRet {
        dom: Domain,
    }
    DomainLookupByUuidArgs {
        uuid: Uuid,
    }
    DomainLookupByUuidRet {
        dom: Domain,
    }
    DomainLookupByNameArgs {
        name: String,
    }
    DomainLookupByNameRet {
        dom: Domain,
    }
    DomainSuspendArgs {
        dom: Domain,
    }
    DomainResumeArgs {
        dom: Domain,
    }
    DomainPmSuspendForDurationArgs {
        dom: Domain,
        target: u32,
        duration: u64,
        flags: u32,
    }
    DomainPmWakeupArgs {
        dom: Domain,
        flags: u32,
    }
    DomainShutdownArgs {
        dom: Domain,
    }
    DomainRebootArgs {
        dom: Domain,
        flags: u32,
    }
    DomainResetArgs {
        dom: Domain,
        flags: u32,
    }
    DomainDestroyArgs {
        dom: Domain,
    }
    DomainDestroyFlagsArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetOsTypeArgs {
        dom: Domain,
    }
    DomainGetOsTypeRet {
        kind: String,
    }
    DomainGetMaxMemoryArgs {
        dom: Domain,
    }
    DomainGetMaxMemoryRet {
        memory: u64,
    }
    DomainSetMaxMemoryArgs {
        dom: Domain,
        memory: u64,
    }
    DomainSetMemoryArgs {
        dom: Domain,
        memory: u64,
    }
    DomainSetMemoryFlagsArgs {
        dom: Domain,
        memory: u64,
        flags: u32,
    }
    DomainGetInfoArgs {
        dom: Domain,
    }
    DomainGetInfoRet {
        state: u32,
        max_mem: u64,
        memory: u64,
        nr_virt_cpu: u32,
        cpu_time: u64,
    }
    DomainSaveArgs {
        dom: Domain,
        to: String,
    }
    DomainSaveFlagsArgs {
        dom: Domain,
        to: String,
        dxml: Option<String>,
        flags: u32,
    }
    DomainSaveParamsArgs {
        dom: Domain,
        params: List<TypedParam, 64>,
        flags: u32,
    }
    DomainRestoreArgs {
        from: String,
    }
    DomainRestoreFlagsArgs {
        from: String,
        dxml: Option<String>,
        flags: u32,
    }
    DomainRestoreParamsArgs {
        params: List<TypedParam, 64>,
        flags: u32,
    }
    DomainSaveImageGetXmlDescArgs {
        file: String,
        flags: u32,
    }
    DomainSaveImageGetXmlDescRet {
        xml: String,
    }
    DomainSaveImageDefineXmlArgs {
        file: String,
        dxml: String,
        flags: u32,
    }
    DomainCoreDumpArgs {
        dom: Domain,
        to: String,
        flags: u32,
    }
    DomainCoreDumpWithFormatArgs {
        dom: Domain,
        to: String,
        dumpformat: u32,
        flags: u32,
    }
    DomainScreenshotArgs {
        dom: Domain,
        screen: u32,
        flags: u32,
    }
    DomainScreenshotRet {
        mime: Option<String>,
    }
    DomainGetXmlDescArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetXmlDescRet {
        xml: String,
    }
    DomainCreateArgs {
        dom: Domain,
    }
    DomainCreateWithFlagsArgs {
        dom: Domain,
        flags: u32,
    }
    DomainCreateWithFlagsRet {
        dom: Domain,
    }
    DomainCreateWithFilesArgs {
        dom: Domain,
        flags: u32,
    }
    DomainCreateWithFilesRet {
        dom: Domain,
    }
    DomainDefineXmlArgs {
        xml: String,
    }
    DomainDefineXmlRet {
        dom: Domain,
    }
    DomainDefineXmlFlagsArgs {
        xml: String,
        flags: u32,
    }
    DomainDefineXmlFlagsRet {
        dom: Domain,
    }
    DomainUndefineArgs {
        dom: Domain,
    }
    DomainUndefineFlagsArgs {
        dom: Domain,
        flags: u32,
    }
    DomainInjectNmiArgs {
        dom: Domain,
        flags: u32,
    }
    DomainSendKeyArgs {
        dom: Domain,
        codeset: u32,
        holdtime: u32,
        keycodes: List<u32, 16>,
        flags: u32,
    }
    DomainSendProcessSignalArgs {
        dom: Domain,
        pid_value: i64,
        signum: u32,
        flags: u32,
    }
    DomainGetSecurityLabelArgs {
        dom: Domain,
    }
    DomainGetSecurityLabelRet {
        label: CharList<SECURITY_LABEL_MAX>,
        enforcing: i32,
    }
    DomainGetSecurityLabelListArgs {
        dom: Domain,
    }
    DomainGetSecurityLabelListRet {
        labels: List<DomainGetSecurityLabelRet, SECURITY_LABEL_LIST_MAX>,
        ret: i32,
    }
    DomainAttachDeviceArgs {
        dom: Domain,
        xml: String,
    }
    DomainAttachDeviceFlagsArgs {
        dom: Domain,
        xml: String,
        flags: u32,
    }
    DomainDetachDeviceArgs {
        dom: Domain,
        xml: String,
    }
    DomainDetachDeviceFlagsArgs {
        dom: Domain,
        xml: String,
        flags: u32,
    }
    DomainUpdateDeviceFlagsArgs {
        dom: Domain,
        xml: String,
        flags: u32,
    }
    DomainDetachDeviceAliasArgs {
        dom: Domain,
        alias: String,
        flags: u32,
    }
    DomainGetAutostartArgs {
        dom: Domain,
    }
    DomainGetAutostartRet {
        autostart: i32,
    }
    DomainSetAutostartArgs {
        dom: Domain,
        autostart: i32,
    }
    DomainSetMetadataArgs {
        dom: Domain,
        kind: i32,
        metadata: Option<String>,
        key: Option<String>,
        uri: Option<String>,
        flags: u32,
    }
    DomainGetMetadataArgs {
        dom: Domain,
        kind: i32,
        uri: Option<String>,
        flags: u32,
    }
    DomainGetMetadataRet {
        metadata: String,
    }
    DomainGetHostnameArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetHostnameRet {
        hostname: String,
    }
    DomainIsActiveArgs {
        dom: Domain,
    }
    DomainIsActiveRet {
        active: i32,
    }
    DomainIsPersistentArgs {
        dom: Domain,
    }
    DomainIsPersistentRet {
        persistent: i32,
    }
    DomainIsUpdatedArgs {
        dom: Domain,
    }
    DomainIsUpdatedRet {
        updated: i32,
    }
    DomainManagedSaveArgs {
        dom: Domain,
        flags: u32,
    }
    DomainHasManagedSaveImageArgs {
        dom: Domain,
        flags: u32,
    }
    DomainHasManagedSaveImageRet {
        result: i32,
    }
    DomainManagedSaveRemoveArgs {
        dom: Domain,
        flags: u32,
    }
    DomainManagedSaveGetXmlDescArgs {
        dom: Domain,
        flags: u32,
    }
    DomainManagedSaveGetXmlDescRet {
        xml: String,
    }
    DomainManagedSaveDefineXmlArgs {
        dom: Domain,
        dxml: Option<String>,
        flags: u32,
    }
    DomainOpenConsoleArgs {
        dom: Domain,
        dev_name: Option<String>,
        flags: u32,
    }
    DomainOpenChannelArgs {
        dom: Domain,
        name: Option<String>,
        flags: u32,
    }
    DomainGetControlInfoArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetControlInfoRet {
        state: u32,
        details: u32,
        state_time: u64,
    }
    DomainShutdownFlagsArgs {
        dom: Domain,
        flags: u32,
    }
    DomainRenameArgs {
        dom: Domain,
        new_name: Option<String>,
        flags: u32,
    }
    DomainRenameRet {
        retcode: i32,
    }
    DomainSetLifecycleActionArgs {
        dom: Domain,
        kind: u32,
        action: u32,
        flags: u32,
    }
    DomainGetMessagesArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetMessagesRet {
        msgs: List<String, 2048>,
    }
    DomainGraphicsReloadArgs {
        dom: Domain,
        kind: u32,
        flags: u32,
    }
    DomainGetAutostartOnceArgs {
        dom: Domain,
    }
    DomainGetAutostartOnceRet {
        autostart: i32,
    }
    DomainSetAutostartOnceArgs {
        dom: Domain,
        autostart: i32,
    }
}
