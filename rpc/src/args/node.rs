//! The host and its devices: the arguments and answers of their procedures.

use crate::limits::{CPUMAP_MAX, NODE_DEVICE_LIST_MAX, SECURITY_MODEL_MAX};
use crate::types::{NodeDevice, TypedParam};
use crate::xdr::{CharArray, CharList, List, Opaque, xdr_structs};

xdr_structs! {
    NodeCpuStat {
        field: String,
        value: u64,
    }
    NodeMemoryStat {
        field: String,
        value: u64,
    }
    NodeGetInfoRet {
        model: CharArray<32>,
        memory: u64,
        cpus: i32,
        mhz: i32,
        nodes: i32,
        sockets: i32,
        cores: i32,
        threads: i32,
    }
    NodeGetCpuStatsArgs {
        cpu_num: i32,
        nparams: i32,
        flags: u32,
    }
    NodeGetCpuStatsRet {
        params: List<NodeCpuStat, 16>,
        nparams: i32,
    }
    NodeGetMemoryStatsArgs {
        nparams: i32,
        cell_num: i32,
        flags: u32,
    }
    NodeGetMemoryStatsRet {
        params: List<NodeMemoryStat, 16>,
        nparams: i32,
    }
    NodeGetCellsFreeMemoryArgs {
        start_cell: i32,
        maxcells: i32,
    }
    NodeGetCellsFreeMemoryRet {
        cells: List<u64, 1024>,
    }
    NodeGetFreeMemoryRet {
        free_mem: u64,
    }
    NodeGetSecurityModelRet {
        model: CharList<SECURITY_MODEL_MAX>,
        doi: CharList<SECURITY_MODEL_MAX>,
    }
    NodeNumOfDevicesArgs {
        cap: Option<String>,
        flags: u32,
    }
    NodeNumOfDevicesRet {
        num: i32,
    }
    NodeListDevicesArgs {
        cap: Option<String>,
        maxnames: i32,
        flags: u32,
    }
    NodeListDevicesRet {
        names: List<String, NODE_DEVICE_LIST_MAX>,
    }
    NodeDeviceLookupByNameArgs {
        name: String,
    }
    NodeDeviceLookupByNameRet {
        dev: NodeDevice,
    }
    NodeDeviceLookupScsiHostByWwnArgs {
        wwnn: String,
        wwpn: String,
        flags: u32,
    }
    NodeDeviceLookupScsiHostByWwnRet {
        dev: NodeDevice,
    }
    NodeDeviceGetXmlDescArgs {
        name: String,
        flags: u32,
    }
    NodeDeviceGetXmlDescRet {
        xml: String,
    }
    NodeDeviceGetParentArgs {
        name: String,
    }
    NodeDeviceGetParentRet {
        parent_name: Option<String>,
    }
    NodeDeviceNumOfCapsArgs {
        name: String,
    }
    NodeDeviceNumOfCapsRet {
        num: i32,
    }
    NodeDeviceListCapsArgs {
        name: String,
        maxnames: i32,
    }
    NodeDeviceListCapsRet {
        names: List<String, NODE_DEVICE_LIST_MAX>,
    }
    NodeDeviceDettachArgs {
        name: String,
    }
    NodeDeviceDetachFlagsArgs {
        name: String,
        driver_name: Option<String>,
        flags: u32,
    }
    NodeDeviceReAttachArgs {
        name: String,
    }
    NodeDeviceResetArgs {
        name: String,
    }
    NodeDeviceCreateXmlArgs {
        xml_desc: String,
        flags: u32,
    }
    NodeDeviceCreateXmlRet {
        dev: NodeDevice,
    }
    NodeDeviceDestroyArgs {
        name: String,
    }
    NodeDeviceDefineXmlArgs {
        xml_desc: String,
        flags: u32,
    }
    NodeDeviceDefineXmlRet {
        dev: NodeDevice,
    }
    NodeDeviceUndefineArgs {
        name: String,
        flags: u32,
    }
    NodeDeviceCreateArgs {
        name: String,
        flags: u32,
    }
    NodeDeviceGetAutostartArgs {
        name: String,
    }
    NodeDeviceGetAutostartRet {
        autostart: i32,
    }
    NodeDeviceSetAutostartArgs {
        name: String,
        autostart: i32,
    }
    NodeDeviceIsPersistentArgs {
        name: String,
    }
    NodeDeviceIsPersistentRet {
        persistent: i32,
    }
    NodeDeviceIsActiveArgs {
        name: String,
    }
    NodeDeviceIsActiveRet {
        active: i32,
    }
    NodeSuspendForDurationArgs {
        target: u32,
        duration: u64,
        flags: u32,
    }
    NodeSetMemoryParametersArgs {
        params: List<TypedParam, 64>,
        flags: u32,
    }
    NodeGetMemoryParametersArgs {
        nparams: i32,
        flags: u32,
    }
    NodeGetMemoryParametersRet {
        params: List<TypedParam, 64>,
        nparams: i32,
    }
    NodeGetCpuMapArgs {
        need_map: i32,
        need_online: i32,
        flags: u32,
    }
    NodeGetCpuMapRet {
        cpumap: Opaque<CPUMAP_MAX>,
        online: u32,
        ret: i32,
    }
    NodeGetFreePagesArgs {
        pages: List<u32, 1024>,
        start_cell: i32,
        cell_count: u32,
        flags: u32,
    }
    NodeGetFreePagesRet {
        counts: List<u64, 1024>,
    }
    NodeAllocPagesArgs {
        page_sizes: List<u32, 1024>,
        page_counts: List<u64, 1024>,
        start_cell: i32,
        cell_count: u32,
        flags: u32,
    }
    NodeAllocPagesRet {
        ret: i32,
    }
    NodeGetSevInfoArgs {
        nparams: i32,
        flags: u32,
    }
    NodeGetSevInfoRet {
        params: List<TypedParam, 64>,
        nparams: i32,
    }
    NodeDeviceUpdateArgs {
        dev: NodeDevice,
        xml_desc: String,
        flags: u32,
    }
}
