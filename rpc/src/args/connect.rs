//! Connection and authentication: the arguments and answers of their procedures.

use super::DomainStatsRecord;
use crate::limits::{
    AUTH_TYPES_MAX, CPU_MODELS_MAX, LIST_MAX, NODE_DEVICE_LIST_MAX, SASL_DATA_MAX,
};
use crate::types::{
    Domain, Interface, Network, NodeDevice, NwFilter, NwFilterBinding, Secret, StoragePool,
    TypedParam,
};
use crate::xdr::{CharList, List, xdr_structs};

xdr_structs! {
    ConnectOpenArgs {
        name: Option<String>,
        flags: u32,
    }
    ConnectSupportsFeatureArgs {
        feature: i32,
    }
    ConnectSupportsFeatureRet {
        supported: i32,
    }
    ConnectGetTypeRet {
        kind: String,
    }
    ConnectGetVersionRet {
        hv_ver: u64,
    }
    ConnectGetLibVersionRet {
        lib_ver: u64,
    }
    ConnectGetHostnameRet {
        hostname: String,
    }
    ConnectGetSysinfoArgs {
        flags: u32,
    }
    ConnectGetSysinfoRet {
        sysinfo: String,
    }
    ConnectGetUriRet {
        uri: String,
    }
    ConnectGetMaxVcpusArgs {
        kind: Option<String>,
    }
    ConnectGetMaxVcpusRet {
        max_vcpus: i32,
    }
    ConnectGetCapabilitiesRet {
        capabilities: String,
    }
    ConnectGetDomainCapabilitiesArgs {
        emulatorbin: Option<String>,
        arch: Option<String>,
        machine: Option<String>,
        virttype: Option<String>,
        flags: u32,
    }
    ConnectGetDomainCapabilitiesRet {
        capabilities: String,
    }
    ConnectListDomainsArgs {
        maxids: i32,
    }
    ConnectListDomainsRet {
        ids: List<i32, LIST_MAX>,
    }
    ConnectNumOfDomainsRet {
        num: i32,
    }
    ConnectListDefinedDomainsArgs {
        maxnames: i32,
    }
    ConnectListDefinedDomainsRet {
        names: List<String, LIST_MAX>,
    }
    ConnectNumOfDefinedDomainsRet {
        num: i32,
    }
    ConnectNumOfNetworksRet {
        num: i32,
    }
    ConnectListNetworksArgs {
        maxnames: i32,
    }
    ConnectListNetworksRet {
        names: List<String, LIST_MAX>,
    }
    ConnectNumOfDefinedNetworksRet {
        num: i32,
    }
    ConnectListDefinedNetworksArgs {
        maxnames: i32,
    }
    ConnectListDefinedNetworksRet {
        names: List<String, LIST_MAX>,
    }
    ConnectNumOfNwfiltersRet {
        num: i32,
    }
    ConnectListNwfiltersArgs {
        maxnames: i32,
    }
    ConnectListNwfiltersRet {
        names: List<String, LIST_MAX>,
    }
    ConnectNumOfInterfacesRet {
        num: i32,
    }
    ConnectListInterfacesArgs {
        maxnames: i32,
    }
    ConnectListInterfacesRet {
        names: List<String, LIST_MAX>,
    }
    ConnectNumOfDefinedInterfacesRet {
        num: i32,
    }
    ConnectListDefinedInterfacesArgs {
        maxnames: i32,
    }
    ConnectListDefinedInterfacesRet {
        names: List<String, LIST_MAX>,
    }
    AuthListRet {
        types: List<i32, AUTH_TYPES_MAX>,
    }
    AuthSaslInitRet {
        mechlist: String,
    }
    AuthSaslStartArgs {
        mech: String,
        nil: i32,
        data: CharList<SASL_DATA_MAX>,
    }
    AuthSaslStartRet {
        complete: i32,
        nil: i32,
        data: CharList<SASL_DATA_MAX>,
    }
    AuthSaslStepArgs {
        nil: i32,
        data: CharList<SASL_DATA_MAX>,
    }
    AuthSaslStepRet {
        complete: i32,
        nil: i32,
        data: CharList<SASL_DATA_MAX>,
    }
    AuthPolkitRet {
        complete: i32,
    }
    ConnectNumOfStoragePoolsRet {
        num: i32,
    }
    ConnectListStoragePoolsArgs {
        maxnames: i32,
    }
    ConnectListStoragePoolsRet {
        names: List<String, LIST_MAX>,
    }
    ConnectNumOfDefinedStoragePoolsRet {
        num: i32,
    }
    ConnectListDefinedStoragePoolsArgs {
        maxnames: i32,
    }
    ConnectListDefinedStoragePoolsRet {
        names: List<String, LIST_MAX>,
    }
    ConnectFindStoragePoolSourcesArgs {
        kind: String,
        src_spec: Option<String>,
        flags: u32,
    }
    ConnectFindStoragePoolSourcesRet {
        xml: String,
    }
    ConnectDomainEventRegisterRet {
        cb_registered: i32,
    }
    ConnectDomainEventDeregisterRet {
        cb_registered: i32,
    }
    ConnectDomainXmlFromNativeArgs {
        native_format: String,
        native_config: String,
        flags: u32,
    }
    ConnectDomainXmlFromNativeRet {
        domain_xml: String,
    }
    ConnectDomainXmlToNativeArgs {
        native_format: String,
        domain_xml: String,
        flags: u32,
    }
    ConnectDomainXmlToNativeRet {
        native_config: String,
    }
    ConnectNumOfSecretsRet {
        num: i32,
    }
    ConnectListSecretsArgs {
        maxuuids: i32,
    }
    ConnectListSecretsRet {
        uuids: List<String, LIST_MAX>,
    }
    ConnectIsSecureRet {
        secure: i32,
    }
    ConnectCompareCpuArgs {
        xml: String,
        flags: u32,
    }
    ConnectCompareCpuRet {
        result: i32,
    }
    ConnectBaselineCpuArgs {
        xml_cpus: List<String, 256>,
        flags: u32,
    }
    ConnectBaselineCpuRet {
        cpu: String,
    }
    ConnectDomainEventRegisterAnyArgs {
        event_id: i32,
    }
    ConnectDomainEventDeregisterAnyArgs {
        event_id: i32,
    }
    ConnectDomainEventCallbackRegisterAnyArgs {
        event_id: i32,
        dom: Option<Domain>,
    }
    ConnectDomainEventCallbackRegisterAnyRet {
        callback_id: i32,
    }
    ConnectDomainEventCallbackDeregisterAnyArgs {
        callback_id: i32,
    }
    ConnectListAllDomainsArgs {
        need_results: i32,
        flags: u32,
    }
    ConnectListAllDomainsRet {
        domains: List<Domain, LIST_MAX>,
        ret: u32,
    }
    ConnectListAllStoragePoolsArgs {
        need_results: i32,
        flags: u32,
    }
    ConnectListAllStoragePoolsRet {
        pools: List<StoragePool, LIST_MAX>,
        ret: u32,
    }
    ConnectListAllNetworksArgs {
        need_results: i32,
        flags: u32,
    }
    ConnectListAllNetworksRet {
        nets: List<Network, LIST_MAX>,
        ret: u32,
    }
    ConnectListAllInterfacesArgs {
        need_results: i32,
        flags: u32,
    }
    ConnectListAllInterfacesRet {
        ifaces: List<Interface, LIST_MAX>,
        ret: u32,
    }
    ConnectListAllNodeDevicesArgs {
        need_results: i32,
        flags: u32,
    }
    ConnectListAllNodeDevicesRet {
        devices: List<NodeDevice, NODE_DEVICE_LIST_MAX>,
        ret: u32,
    }
    ConnectListAllNwfiltersArgs {
        need_results: i32,
        flags: u32,
    }
    ConnectListAllNwfiltersRet {
        filters: List<NwFilter, LIST_MAX>,
        ret: u32,
    }
    ConnectListAllSecretsArgs {
        need_results: i32,
        flags: u32,
    }
    ConnectListAllSecretsRet {
        secrets: List<Secret, LIST_MAX>,
        ret: u32,
    }
    ConnectGetCpuModelNamesArgs {
        arch: String,
        need_results: i32,
        flags: u32,
    }
    ConnectGetCpuModelNamesRet {
        models: List<String, CPU_MODELS_MAX>,
        ret: i32,
    }
    ConnectNetworkEventRegisterAnyArgs {
        event_id: i32,
        net: Option<Network>,
    }
    ConnectNetworkEventRegisterAnyRet {
        callback_id: i32,
    }
    ConnectNetworkEventDeregisterAnyArgs {
        callback_id: i32,
    }
    ConnectStoragePoolEventRegisterAnyArgs {
        event_id: i32,
        pool: Option<StoragePool>,
    }
    ConnectStoragePoolEventRegisterAnyRet {
        callback_id: i32,
    }
    ConnectStoragePoolEventDeregisterAnyArgs {
        callback_id: i32,
    }
    ConnectNodeDeviceEventRegisterAnyArgs {
        event_id: i32,
        dev: Option<NodeDevice>,
    }
    ConnectNodeDeviceEventRegisterAnyRet {
        callback_id: i32,
    }
    ConnectNodeDeviceEventDeregisterAnyArgs {
        callback_id: i32,
    }
    ConnectGetAllDomainStatsArgs {
        doms: List<Domain, LIST_MAX>,
        stats: u32,
        flags: u32,
    }
    ConnectGetAllDomainStatsRet {
        ret_stats: List<DomainStatsRecord, LIST_MAX>,
    }
    ConnectSecretEventRegisterAnyArgs {
        event_id: i32,
        secret: Option<Secret>,
    }
    ConnectSecretEventRegisterAnyRet {
        callback_id: i32,
    }
    ConnectSecretEventDeregisterAnyArgs {
        callback_id: i32,
    }
    ConnectCompareHypervisorCpuArgs {
        emulator: Option<String>,
        arch: Option<String>,
        machine: Option<String>,
        virttype: Option<String>,
        xml_cpu: String,
        flags: u32,
    }
    ConnectCompareHypervisorCpuRet {
        result: i32,
    }
    ConnectBaselineHypervisorCpuArgs {
        emulator: Option<String>,
        arch: Option<String>,
        machine: Option<String>,
        virttype: Option<String>,
        xml_cpus: List<String, 256>,
        flags: u32,
    }
    ConnectBaselineHypervisorCpuRet {
        cpu: String,
    }
    ConnectListAllNwfilterBindingsArgs {
        need_results: i32,
        flags: u32,
    }
    ConnectListAllNwfilterBindingsRet {
        bindings: List<NwFilterBinding, LIST_MAX>,
        ret: u32,
    }
    ConnectGetStoragePoolCapabilitiesArgs {
        flags: u32,
    }
    ConnectGetStoragePoolCapabilitiesRet {
        capabilities: String,
    }
    ConnectSetIdentityArgs {
        params: List<TypedParam, 20>,
        flags: u32,
    }
}
