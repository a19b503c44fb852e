//! Domains: statistics, tuning, block devices, guest agent: the arguments and answers of their procedures.

use crate::limits::{
    CPU_STATS_PARAMS_MAX, CPUMAP_MAX, CPUMAPS_MAX, DOMAIN_DISK_ERRORS_MAX, DOMAIN_INTERFACE_MAX,
    DOMAIN_MEMORY_STATS_MAX, GUEST_INFO_PARAMS_MAX, PEEK_MAX, STATS_PARAMS_MAX, VCPU_INFO_MAX,
};
use crate::types::{Domain, TypedParam};
use crate::xdr::{List, Opaque, xdr_structs};

xdr_structs! {
    VcpuInfo {
        number: u32,
        state: i32,
        cpu_time: u64,
        cpu: i32,
    }
    DomainDiskError {
        disk: String,
        error: i32,
    }
    DomainGetSchedulerParametersArgs {
        dom: Domain,
        nparams: i32,
    }
    DomainGetSchedulerParametersRet {
        params: List<TypedParam, 16>,
    }
    DomainGetSchedulerParametersFlagsArgs {
        dom: Domain,
        nparams: i32,
        flags: u32,
    }
    DomainGetSchedulerParametersFlagsRet {
        params: List<TypedParam, 16>,
    }
    DomainSetSchedulerParametersArgs {
        dom: Domain,
        params: List<TypedParam, 16>,
    }
    DomainSetSchedulerParametersFlagsArgs {
        dom: Domain,
        params: List<TypedParam, 16>,
        flags: u32,
    }
    DomainSetBlkioParametersArgs {
        dom: Domain,
        params: List<TypedParam, 16>,
        flags: u32,
    }
    DomainGetBlkioParametersArgs {
        dom: Domain,
        nparams: i32,
        flags: u32,
    }
    DomainGetBlkioParametersRet {
        params: List<TypedParam, 16>,
        nparams: i32,
    }
    DomainSetMemoryParametersArgs {
        dom: Domain,
        params: List<TypedParam, 16>,
        flags: u32,
    }
    DomainGetMemoryParametersArgs {
        dom: Domain,
        nparams: i32,
        flags: u32,
    }
    DomainGetMemoryParametersRet {
        params: List<TypedParam, 16>,
        nparams: i32,
    }
    DomainBlockResizeArgs {
        dom: Domain,
        disk: String,
        size: u64,
        flags: u32,
    }
    DomainSetNumaParametersArgs {
        dom: Domain,
        params: List<TypedParam, 16>,
        flags: u32,
    }
    DomainGetNumaParametersArgs {
        dom: Domain,
        nparams: i32,
        flags: u32,
    }
    DomainGetNumaParametersRet {
        params: List<TypedParam, 16>,
        nparams: i32,
    }
    DomainSetPerfEventsArgs {
        dom: Domain,
        params: List<TypedParam, 64>,
        flags: u32,
    }
    DomainGetPerfEventsArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetPerfEventsRet {
        params: List<TypedParam, 64>,
    }
    DomainBlockStatsArgs {
        dom: Domain,
        path: String,
    }
    DomainBlockStatsRet {
        rd_req: i64,
        rd_bytes: i64,
        wr_req: i64,
        wr_bytes: i64,
        errs: i64,
    }
    DomainBlockStatsFlagsArgs {
        dom: Domain,
        path: String,
        nparams: i32,
        flags: u32,
    }
    DomainBlockStatsFlagsRet {
        params: List<TypedParam, 16>,
        nparams: i32,
    }
    DomainInterfaceStatsArgs {
        dom: Domain,
        device: String,
    }
    DomainInterfaceStatsRet {
        rx_bytes: i64,
        rx_packets: i64,
        rx_errs: i64,
        rx_drop: i64,
        tx_bytes: i64,
        tx_packets: i64,
        tx_errs: i64,
        tx_drop: i64,
    }
    DomainSetInterfaceParametersArgs {
        dom: Domain,
        device: String,
        params: List<TypedParam, 16>,
        flags: u32,
    }
    DomainGetInterfaceParametersArgs {
        dom: Domain,
        device: String,
        nparams: i32,
        flags: u32,
    }
    DomainGetInterfaceParametersRet {
        params: List<TypedParam, 16>,
        nparams: i32,
    }
    DomainMemoryStatsArgs {
        dom: Domain,
        max_stats: u32,
        flags: u32,
    }
    DomainMemoryStat {
        tag: i32,
        val: u64,
    }
    DomainMemoryStatsRet {
        stats: List<DomainMemoryStat, DOMAIN_MEMORY_STATS_MAX>,
    }
    DomainBlockPeekArgs {
        dom: Domain,
        path: String,
        offset: u64,
        size: u32,
        flags: u32,
    }
    DomainBlockPeekRet {
        buffer: Opaque<PEEK_MAX>,
    }
    DomainMemoryPeekArgs {
        dom: Domain,
        offset: u64,
        size: u32,
        flags: u32,
    }
    DomainMemoryPeekRet {
        buffer: Opaque<PEEK_MAX>,
    }
    DomainGetBlockInfoArgs {
        dom: Domain,
        path: String,
        flags: u32,
    }
    DomainGetBlockInfoRet {
        allocation: u64,
        capacity: u64,
        physical: u64,
    }
    DomainSetMemoryStatsPeriodArgs {
        dom: Domain,
        period: i32,
        flags: u32,
    }
    DomainSetVcpusArgs {
        dom: Domain,
        nvcpus: u32,
    }
    DomainSetVcpusFlagsArgs {
        dom: Domain,
        nvcpus: u32,
        flags: u32,
    }
    DomainGetVcpusFlagsArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetVcpusFlagsRet {
        num: i32,
    }
    DomainPinVcpuArgs {
        dom: Domain,
        vcpu: u32,
        cpumap: Opaque<CPUMAP_MAX>,
    }
    DomainPinVcpuFlagsArgs {
        dom: Domain,
        vcpu: u32,
        cpumap: Opaque<CPUMAP_MAX>,
        flags: u32,
    }
    DomainGetVcpuPinInfoArgs {
        dom: Domain,
        ncpumaps: i32,
        maplen: i32,
        flags: u32,
    }
    DomainGetVcpuPinInfoRet {
        cpumaps: Opaque<CPUMAPS_MAX>,
        num: i32,
    }
    DomainPinEmulatorArgs {
        dom: Domain,
        cpumap: Opaque<CPUMAP_MAX>,
        flags: u32,
    }
    DomainGetEmulatorPinInfoArgs {
        dom: Domain,
        maplen: i32,
        flags: u32,
    }
    DomainGetEmulatorPinInfoRet {
        cpumaps: Opaque<CPUMAPS_MAX>,
        ret: i32,
    }
    DomainGetVcpusArgs {
        dom: Domain,
        maxinfo: i32,
        maplen: i32,
    }
    DomainGetVcpusRet {
        info: List<VcpuInfo, VCPU_INFO_MAX>,
        cpumaps: Opaque<CPUMAPS_MAX>,
    }
    DomainGetMaxVcpusArgs {
        dom: Domain,
    }
    DomainGetMaxVcpusRet {
        num: i32,
    }
    DomainIothreadInfo {
        iothread_id: u32,
        cpumap: Opaque<CPUMAP_MAX>,
    }
    DomainGetIothreadInfoArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetIothreadInfoRet {
        info: List<DomainIothreadInfo, VCPU_INFO_MAX>,
        ret: u32,
    }
    DomainPinIothreadArgs {
        dom: Domain,
        iothreads_id: u32,
        cpumap: Opaque<CPUMAP_MAX>,
        flags: u32,
    }
    DomainAddIothreadArgs {
        dom: Domain,
        iothread_id: u32,
        flags: u32,
    }
    DomainDelIothreadArgs {
        dom: Domain,
        iothread_id: u32,
        flags: u32,
    }
    DomainSetIothreadParamsArgs {
        dom: Domain,
        iothread_id: u32,
        params: List<TypedParam, 64>,
        flags: u32,
    }
    DomainBlockJobAbortArgs {
        dom: Domain,
        path: String,
        flags: u32,
    }
    DomainGetBlockJobInfoArgs {
        dom: Domain,
        path: String,
        flags: u32,
    }
    DomainGetBlockJobInfoRet {
        found: i32,
        kind: i32,
        bandwidth: u64,
        cur: u64,
        end: u64,
    }
    DomainBlockJobSetSpeedArgs {
        dom: Domain,
        path: String,
        bandwidth: u64,
        flags: u32,
    }
    DomainBlockPullArgs {
        dom: Domain,
        path: String,
        bandwidth: u64,
        flags: u32,
    }
    DomainBlockRebaseArgs {
        dom: Domain,
        path: String,
        base: Option<String>,
        bandwidth: u64,
        flags: u32,
    }
    DomainBlockCopyArgs {
        dom: Domain,
        path: String,
        destxml: String,
        params: List<TypedParam, 16>,
        flags: u32,
    }
    DomainBlockCommitArgs {
        dom: Domain,
        disk: String,
        base: Option<String>,
        top: Option<String>,
        bandwidth: u64,
        flags: u32,
    }
    DomainSetBlockIoTuneArgs {
        dom: Domain,
        disk: String,
        params: List<TypedParam, 32>,
        flags: u32,
    }
    DomainGetBlockIoTuneArgs {
        dom: Domain,
        disk: Option<String>,
        nparams: i32,
        flags: u32,
    }
    DomainGetBlockIoTuneRet {
        params: List<TypedParam, 32>,
        nparams: i32,
    }
    DomainGetCpuStatsArgs {
        dom: Domain,
        nparams: u32,
        start_cpu: i32,
        ncpus: u32,
        flags: u32,
    }
    DomainGetCpuStatsRet {
        params: List<TypedParam, CPU_STATS_PARAMS_MAX>,
        nparams: i32,
    }
    DomainGetJobInfoArgs {
        dom: Domain,
    }
    DomainGetJobInfoRet {
        kind: i32,
        time_elapsed: u64,
        time_remaining: u64,
        data_total: u64,
        data_processed: u64,
        data_remaining: u64,
        mem_total: u64,
        mem_processed: u64,
        mem_remaining: u64,
        file_total: u64,
        file_processed: u64,
        file_remaining: u64,
    }
    DomainGetJobStatsArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetJobStatsRet {
        kind: i32,
        params: List<TypedParam, 64>,
    }
    DomainAbortJobArgs {
        dom: Domain,
    }
    DomainAbortJobFlagsArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetStateArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetStateRet {
        state: i32,
        reason: i32,
    }
    DomainOpenGraphicsArgs {
        dom: Domain,
        idx: u32,
        flags: u32,
    }
    DomainOpenGraphicsFdArgs {
        dom: Domain,
        idx: u32,
        flags: u32,
    }
    DomainGetDiskErrorsArgs {
        dom: Domain,
        maxerrors: u32,
        flags: u32,
    }
    DomainGetDiskErrorsRet {
        errors: List<DomainDiskError, DOMAIN_DISK_ERRORS_MAX>,
        nerrors: i32,
    }
    DomainFstrimArgs {
        dom: Domain,
        mount_point: Option<String>,
        minimum: u64,
        flags: u32,
    }
    DomainGetTimeArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetTimeRet {
        seconds: i64,
        nseconds: u32,
    }
    DomainSetTimeArgs {
        dom: Domain,
        seconds: i64,
        nseconds: u32,
        flags: u32,
    }
    DomainFsfreezeArgs {
        dom: Domain,
        mountpoints: List<String, 256>,
        flags: u32,
    }
    DomainFsfreezeRet {
        filesystems: i32,
    }
    DomainFsthawArgs {
        dom: Domain,
        mountpoints: List<String, 256>,
        flags: u32,
    }
    DomainFsthawRet {
        filesystems: i32,
    }
    DomainStatsRecord {
        dom: Domain,
        params: List<TypedParam, STATS_PARAMS_MAX>,
    }
    DomainFsinfo {
        mountpoint: String,
        name: String,
        fstype: String,
        dev_aliases: List<String, 256>,
    }
    DomainGetFsinfoArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetFsinfoRet {
        info: List<DomainFsinfo, 256>,
        ret: u32,
    }
    DomainIpAddr {
        kind: i32,
        addr: String,
        prefix: u32,
    }
    DomainInterface {
        name: String,
        hwaddr: Option<String>,
        addrs: List<DomainIpAddr, DOMAIN_INTERFACE_MAX>,
    }
    DomainInterfaceAddressesArgs {
        dom: Domain,
        source: u32,
        flags: u32,
    }
    DomainInterfaceAddressesRet {
        ifaces: List<DomainInterface, DOMAIN_INTERFACE_MAX>,
    }
    DomainSetUserPasswordArgs {
        dom: Domain,
        user: Option<String>,
        password: Option<String>,
        flags: u32,
    }
    DomainGetGuestVcpusArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetGuestVcpusRet {
        params: List<TypedParam, 64>,
    }
    DomainSetGuestVcpusArgs {
        dom: Domain,
        cpumap: String,
        state: i32,
        flags: u32,
    }
    DomainSetVcpuArgs {
        dom: Domain,
        cpumap: String,
        state: i32,
        flags: u32,
    }
    DomainSetBlockThresholdArgs {
        dom: Domain,
        dev: String,
        threshold: u64,
        flags: u32,
    }
    DomainGetLaunchSecurityInfoArgs {
        dom: Domain,
        flags: u32,
    }
    DomainGetLaunchSecurityInfoRet {
        params: List<TypedParam, 64>,
    }
    DomainSetLaunchSecurityStateArgs {
        dom: Domain,
        params: List<TypedParam, 64>,
        flags: u32,
    }
    DomainGetGuestInfoArgs {
        dom: Domain,
        types: u32,
        flags: u32,
    }
    DomainGetGuestInfoRet {
        params: List<TypedParam, GUEST_INFO_PARAMS_MAX>,
    }
    DomainAgentSetResponseTimeoutArgs {
        dom: Domain,
        timeout: i32,
        flags: u32,
    }
    DomainAgentSetResponseTimeoutRet {
        result: i32,
    }
    DomainBackupBeginArgs {
        dom: Domain,
        backup_xml: String,
        checkpoint_xml: Option<String>,
        flags: u32,
    }
    DomainBackupGetXmlDescArgs {
        dom: Domain,
        flags: u32,
    }
    DomainBackupGetXmlDescRet {
        xml: String,
    }
    DomainAuthorizedSshKeysGetArgs {
        dom: Domain,
        user: String,
        flags: u32,
    }
    DomainAuthorizedSshKeysGetRet {
        keys: List<String, 2048>,
    }
    DomainAuthorizedSshKeysSetArgs {
        dom: Domain,
        user: String,
        keys: List<String, 2048>,
        flags: u32,
    }
    DomainStartDirtyRateCalcArgs {
        dom: Domain,
        seconds: i32,
        flags: u32,
    }
    DomainFdAssociateArgs {
        dom: Domain,
        name: String,
        flags: u32,
    }
    DomainSetThrottleGroupArgs {
        dom: Domain,
        group: String,
        params: List<TypedParam, 32>,
        flags: u32,
    }
    DomainDelThrottleGroupArgs {
        dom: Domain,
        group: Option<String>,
        flags: u32,
    }
}
