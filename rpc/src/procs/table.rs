//! The table itself: one row a procedure.

use super::{Access, Procedure, ProcedureInfo, StreamKind};
use crate::args::*;

macro_rules! access {
    (read) => {
        Access::Read
    };
    (read $back:literal $mask:literal) => {
        Access::ReadUnless {
            back: $back,
            mask: $mask,
        }
    };
    (write) => {
        Access::Write
    };
}

macro_rules! stream {
    () => {
        None
    };
    (upload) => {
        Some(StreamKind::Upload)
    };
    (download) => {
        Some(StreamKind::Download)
    };
    (duplex) => {
        Some(StreamKind::Duplex)
    };
}

macro_rules! is_event {
    () => {
        false
    };
    (event) => {
        true
    };
}

// NUMBER NAME(arguments) -> answer; then who may call it (read: everybody; unless(back, mask): see Access; write: only
// connections with full rights), the direction of raw data, and whether it is an event.
macro_rules! procedures {
    ($($number:literal $name:ident($args:ty) -> $ret:ty, $access:ident $(unless($back:literal, $mask:literal))?
        $(stream $stream:ident)? $(as $event:ident)?;)*) => {
        $(
            #[doc = concat!("Procedure ", $number, ": `REMOTE_PROC_", stringify!($name), "`.")]
            pub const $name: Procedure<$args, $ret> = Procedure::new($number);
        )*

        /// All procedures, in the order of their numbers.
        pub static PROCEDURES: &[ProcedureInfo] = &[
            $(ProcedureInfo {
                number: $number,
                name: stringify!($name),
                access: access!($access $($back $mask)?),
                stream: stream!($($stream)?),
                event: is_event!($($event)?),
            },)*
        ];

        #[cfg(test)]
        pub(crate) fn for_each_procedure(visitor: &mut impl super::tests::Visitor) {
            $(visitor.visit::<$args, $ret>(&PROCEDURES[$number - 1]);)*
        }
    };
}

procedures! {
1 CONNECT_OPEN(ConnectOpenArgs) -> (), read;
2 CONNECT_CLOSE(()) -> (), read;
3 CONNECT_GET_TYPE(()) -> ConnectGetTypeRet, read;
4 CONNECT_GET_VERSION(()) -> ConnectGetVersionRet, read;
5 CONNECT_GET_MAX_VCPUS(ConnectGetMaxVcpusArgs) -> ConnectGetMaxVcpusRet, read;
6 NODE_GET_INFO(()) -> NodeGetInfoRet, read;
7 CONNECT_GET_CAPABILITIES(()) -> ConnectGetCapabilitiesRet, read;
8 DOMAIN_ATTACH_DEVICE(DomainAttachDeviceArgs) -> (), write;
9 DOMAIN_CREATE(DomainCreateArgs) -> (), write;
10 DOMAIN_CREATE_XML(DomainCreateXmlArgs) -> DomainCreateXmlRet, write;
11 DOMAIN_DEFINE_XML(DomainDefineXmlArgs) -> DomainDefineXmlRet, write;
12 DOMAIN_DESTROY(DomainDestroyArgs) -> (), write;
13 DOMAIN_DETACH_DEVICE(DomainDetachDeviceArgs) -> (), write;
14 DOMAIN_GET_XML_DESC(DomainGetXmlDescArgs) -> DomainGetXmlDescRet, read unless(4, 9);
15 DOMAIN_GET_AUTOSTART(DomainGetAutostartArgs) -> DomainGetAutostartRet, read;
16 DOMAIN_GET_INFO(DomainGetInfoArgs) -> DomainGetInfoRet, read;
17 DOMAIN_GET_MAX_MEMORY(DomainGetMaxMemoryArgs) -> DomainGetMaxMemoryRet, read;
18 DOMAIN_GET_MAX_VCPUS(DomainGetMaxVcpusArgs) -> DomainGetMaxVcpusRet, read;
19 DOMAIN_GET_OS_TYPE(DomainGetOsTypeArgs) -> DomainGetOsTypeRet, read;
20 DOMAIN_GET_VCPUS(DomainGetVcpusArgs) -> DomainGetVcpusRet, read;
21 CONNECT_LIST_DEFINED_DOMAINS(ConnectListDefinedDomainsArgs) -> ConnectListDefinedDomainsRet, read;
22 DOMAIN_LOOKUP_BY_ID(DomainLookupByIdArgs) -> DomainLookupByIdRet, read;
23 DOMAIN_LOOKUP_BY_NAME(DomainLookupByNameArgs) -> DomainLookupByNameRet, read;
24 DOMAIN_LOOKUP_BY_UUID(DomainLookupByUuidArgs) -> DomainLookupByUuidRet, read;
25 CONNECT_NUM_OF_DEFINED_DOMAINS(()) -> ConnectNumOfDefinedDomainsRet, read;
26 DOMAIN_PIN_VCPU(DomainPinVcpuArgs) -> (), write;
27 DOMAIN_REBOOT(DomainRebootArgs) -> (), write;
28 DOMAIN_RESUME(DomainResumeArgs) -> (), write;
29 DOMAIN_SET_AUTOSTART(DomainSetAutostartArgs) -> (), write;
30 DOMAIN_SET_MAX_MEMORY(DomainSetMaxMemoryArgs) -> (), write;
31 DOMAIN_SET_MEMORY(DomainSetMemoryArgs) -> (), write;
32 DOMAIN_SET_VCPUS(DomainSetVcpusArgs) -> (), write;
33 DOMAIN_SHUTDOWN(DomainShutdownArgs) -> (), write;
34 DOMAIN_SUSPEND(DomainSuspendArgs) -> (), write;
35 DOMAIN_UNDEFINE(DomainUndefineArgs) -> (), write;
36 CONNECT_LIST_DEFINED_NETWORKS(ConnectListDefinedNetworksArgs) -> ConnectListDefinedNetworksRet, read;
37 CONNECT_LIST_DOMAINS(ConnectListDomainsArgs) -> ConnectListDomainsRet, read;
38 CONNECT_LIST_NETWORKS(ConnectListNetworksArgs) -> ConnectListNetworksRet, read;
39 NETWORK_CREATE(NetworkCreateArgs) -> (), write;
40 NETWORK_CREATE_XML(NetworkCreateXmlArgs) -> NetworkCreateXmlRet, write;
41 NETWORK_DEFINE_XML(NetworkDefineXmlArgs) -> NetworkDefineXmlRet, write;
42 NETWORK_DESTROY(NetworkDestroyArgs) -> (), write;
43 NETWORK_GET_XML_DESC(NetworkGetXmlDescArgs) -> NetworkGetXmlDescRet, read;
44 NETWORK_GET_AUTOSTART(NetworkGetAutostartArgs) -> NetworkGetAutostartRet, read;
45 NETWORK_GET_BRIDGE_NAME(NetworkGetBridgeNameArgs) -> NetworkGetBridgeNameRet, read;
46 NETWORK_LOOKUP_BY_NAME(NetworkLookupByNameArgs) -> NetworkLookupByNameRet, read;
47 NETWORK_LOOKUP_BY_UUID(NetworkLookupByUuidArgs) -> NetworkLookupByUuidRet, read;
48 NETWORK_SET_AUTOSTART(NetworkSetAutostartArgs) -> (), write;
49 NETWORK_UNDEFINE(NetworkUndefineArgs) -> (), write;
50 CONNECT_NUM_OF_DEFINED_NETWORKS(()) -> ConnectNumOfDefinedNetworksRet, read;
51 CONNECT_NUM_OF_DOMAINS(()) -> ConnectNumOfDomainsRet, read;
52 CONNECT_NUM_OF_NETWORKS(()) -> ConnectNumOfNetworksRet, read;
53 DOMAIN_CORE_DUMP(DomainCoreDumpArgs) -> (), write;
54 DOMAIN_RESTORE(DomainRestoreArgs) -> (), write;
55 DOMAIN_SAVE(DomainSaveArgs) -> (), write;
56 DOMAIN_GET_SCHEDULER_TYPE(DomainGetSchedulerTypeArgs) -> DomainGetSchedulerTypeRet, read;
57 DOMAIN_GET_SCHEDULER_PARAMETERS(DomainGetSchedulerParametersArgs) -> DomainGetSchedulerParametersRet, read;
58 DOMAIN_SET_SCHEDULER_PARAMETERS(DomainSetSchedulerParametersArgs) -> (), write;
59 CONNECT_GET_HOSTNAME(()) -> ConnectGetHostnameRet, read;
60 CONNECT_SUPPORTS_FEATURE(ConnectSupportsFeatureArgs) -> ConnectSupportsFeatureRet, read;
61 DOMAIN_MIGRATE_PREPARE(DomainMigratePrepareArgs) -> DomainMigratePrepareRet, write;
62 DOMAIN_MIGRATE_PERFORM(DomainMigratePerformArgs) -> (), write;
63 DOMAIN_MIGRATE_FINISH(DomainMigrateFinishArgs) -> DomainMigrateFinishRet, write;
64 DOMAIN_BLOCK_STATS(DomainBlockStatsArgs) -> DomainBlockStatsRet, read;
65 DOMAIN_INTERFACE_STATS(DomainInterfaceStatsArgs) -> DomainInterfaceStatsRet, read;
66 AUTH_LIST(()) -> AuthListRet, read;
67 AUTH_SASL_INIT(()) -> AuthSaslInitRet, read;
68 AUTH_SASL_START(AuthSaslStartArgs) -> AuthSaslStartRet, read;
69 AUTH_SASL_STEP(AuthSaslStepArgs) -> AuthSaslStepRet, read;
70 AUTH_POLKIT(()) -> AuthPolkitRet, read;
71 CONNECT_NUM_OF_STORAGE_POOLS(()) -> ConnectNumOfStoragePoolsRet, read;
72 CONNECT_LIST_STORAGE_POOLS(ConnectListStoragePoolsArgs) -> ConnectListStoragePoolsRet, read;
73 CONNECT_NUM_OF_DEFINED_STORAGE_POOLS(()) -> ConnectNumOfDefinedStoragePoolsRet, read;
74 CONNECT_LIST_DEFINED_STORAGE_POOLS(ConnectListDefinedStoragePoolsArgs) -> ConnectListDefinedStoragePoolsRet, read;
75 CONNECT_FIND_STORAGE_POOL_SOURCES(ConnectFindStoragePoolSourcesArgs) -> ConnectFindStoragePoolSourcesRet, write;
76 STORAGE_POOL_CREATE_XML(StoragePoolCreateXmlArgs) -> StoragePoolCreateXmlRet, write;
77 STORAGE_POOL_DEFINE_XML(StoragePoolDefineXmlArgs) -> StoragePoolDefineXmlRet, write;
78 STORAGE_POOL_CREATE(StoragePoolCreateArgs) -> (), write;
79 STORAGE_POOL_BUILD(StoragePoolBuildArgs) -> (), write;
80 STORAGE_POOL_DESTROY(StoragePoolDestroyArgs) -> (), write;
81 STORAGE_POOL_DELETE(StoragePoolDeleteArgs) -> (), write;
82 STORAGE_POOL_UNDEFINE(StoragePoolUndefineArgs) -> (), write;
83 STORAGE_POOL_REFRESH(StoragePoolRefreshArgs) -> (), write;
84 STORAGE_POOL_LOOKUP_BY_NAME(StoragePoolLookupByNameArgs) -> StoragePoolLookupByNameRet, read;
85 STORAGE_POOL_LOOKUP_BY_UUID(StoragePoolLookupByUuidArgs) -> StoragePoolLookupByUuidRet, read;
86 STORAGE_POOL_LOOKUP_BY_VOLUME(StoragePoolLookupByVolumeArgs) -> StoragePoolLookupByVolumeRet, read;
87 STORAGE_POOL_GET_INFO(StoragePoolGetInfoArgs) -> StoragePoolGetInfoRet, read;
88 STORAGE_POOL_GET_XML_DESC(StoragePoolGetXmlDescArgs) -> StoragePoolGetXmlDescRet, read;
89 STORAGE_POOL_GET_AUTOSTART(StoragePoolGetAutostartArgs) -> StoragePoolGetAutostartRet, read;
90 STORAGE_POOL_SET_AUTOSTART(StoragePoolSetAutostartArgs) -> (), write;
91 STORAGE_POOL_NUM_OF_VOLUMES(StoragePoolNumOfVolumesArgs) -> StoragePoolNumOfVolumesRet, read;
92 STORAGE_POOL_LIST_VOLUMES(StoragePoolListVolumesArgs) -> StoragePoolListVolumesRet, read;
93 STORAGE_VOL_CREATE_XML(StorageVolCreateXmlArgs) -> StorageVolCreateXmlRet, write;
94 STORAGE_VOL_DELETE(StorageVolDeleteArgs) -> (), write;
95 STORAGE_VOL_LOOKUP_BY_NAME(StorageVolLookupByNameArgs) -> StorageVolLookupByNameRet, read;
96 STORAGE_VOL_LOOKUP_BY_KEY(StorageVolLookupByKeyArgs) -> StorageVolLookupByKeyRet, read;
97 STORAGE_VOL_LOOKUP_BY_PATH(StorageVolLookupByPathArgs) -> StorageVolLookupByPathRet, read;
98 STORAGE_VOL_GET_INFO(StorageVolGetInfoArgs) -> StorageVolGetInfoRet, read;
99 STORAGE_VOL_GET_XML_DESC(StorageVolGetXmlDescArgs) -> StorageVolGetXmlDescRet, read;
100 STORAGE_VOL_GET_PATH(StorageVolGetPathArgs) -> StorageVolGetPathRet, read;
101 NODE_GET_CELLS_FREE_MEMORY(NodeGetCellsFreeMemoryArgs) -> NodeGetCellsFreeMemoryRet, read;
102 NODE_GET_FREE_MEMORY(()) -> NodeGetFreeMemoryRet, read;
103 DOMAIN_BLOCK_PEEK(DomainBlockPeekArgs) -> DomainBlockPeekRet, write;
104 DOMAIN_MEMORY_PEEK(DomainMemoryPeekArgs) -> DomainMemoryPeekRet, write;
105 CONNECT_DOMAIN_EVENT_REGISTER(()) -> ConnectDomainEventRegisterRet, read;
106 CONNECT_DOMAIN_EVENT_DEREGISTER(()) -> ConnectDomainEventDeregisterRet, read;
107 DOMAIN_EVENT_LIFECYCLE(DomainEventLifecycleMsg) -> (), read as event;
108 DOMAIN_MIGRATE_PREPARE2(DomainMigratePrepare2Args) -> DomainMigratePrepare2Ret, write;
109 DOMAIN_MIGRATE_FINISH2(DomainMigrateFinish2Args) -> DomainMigrateFinish2Ret, write;
110 CONNECT_GET_URI(()) -> ConnectGetUriRet, read;
111 NODE_NUM_OF_DEVICES(NodeNumOfDevicesArgs) -> NodeNumOfDevicesRet, read;
112 NODE_LIST_DEVICES(NodeListDevicesArgs) -> NodeListDevicesRet, read;
113 NODE_DEVICE_LOOKUP_BY_NAME(NodeDeviceLookupByNameArgs) -> NodeDeviceLookupByNameRet, read;
114 NODE_DEVICE_GET_XML_DESC(NodeDeviceGetXmlDescArgs) -> NodeDeviceGetXmlDescRet, read;
115 NODE_DEVICE_GET_PARENT(NodeDeviceGetParentArgs) -> NodeDeviceGetParentRet, read;
116 NODE_DEVICE_NUM_OF_CAPS(NodeDeviceNumOfCapsArgs) -> NodeDeviceNumOfCapsRet, read;
117 NODE_DEVICE_LIST_CAPS(NodeDeviceListCapsArgs) -> NodeDeviceListCapsRet, read;
118 NODE_DEVICE_DETTACH(NodeDeviceDettachArgs) -> (), write;
119 NODE_DEVICE_RE_ATTACH(NodeDeviceReAttachArgs) -> (), write;
120 NODE_DEVICE_RESET(NodeDeviceResetArgs) -> (), write;
121 DOMAIN_GET_SECURITY_LABEL(DomainGetSecurityLabelArgs) -> DomainGetSecurityLabelRet, read;
122 NODE_GET_SECURITY_MODEL(()) -> NodeGetSecurityModelRet, read;
123 NODE_DEVICE_CREATE_XML(NodeDeviceCreateXmlArgs) -> NodeDeviceCreateXmlRet, write;
124 NODE_DEVICE_DESTROY(NodeDeviceDestroyArgs) -> (), write;
125 STORAGE_VOL_CREATE_XML_FROM(StorageVolCreateXmlFromArgs) -> StorageVolCreateXmlFromRet, write;
126 CONNECT_NUM_OF_INTERFACES(()) -> ConnectNumOfInterfacesRet, read;
127 CONNECT_LIST_INTERFACES(ConnectListInterfacesArgs) -> ConnectListInterfacesRet, read;
128 INTERFACE_LOOKUP_BY_NAME(InterfaceLookupByNameArgs) -> InterfaceLookupByNameRet, read;
129 INTERFACE_LOOKUP_BY_MAC_STRING(InterfaceLookupByMacStringArgs) -> InterfaceLookupByMacStringRet, read;
130 INTERFACE_GET_XML_DESC(InterfaceGetXmlDescArgs) -> InterfaceGetXmlDescRet, read;
131 INTERFACE_DEFINE_XML(InterfaceDefineXmlArgs) -> InterfaceDefineXmlRet, write;
132 INTERFACE_UNDEFINE(InterfaceUndefineArgs) -> (), write;
133 INTERFACE_CREATE(InterfaceCreateArgs) -> (), write;
134 INTERFACE_DESTROY(InterfaceDestroyArgs) -> (), write;
135 CONNECT_DOMAIN_XML_FROM_NATIVE(ConnectDomainXmlFromNativeArgs) -> ConnectDomainXmlFromNativeRet, write;
136 CONNECT_DOMAIN_XML_TO_NATIVE(ConnectDomainXmlToNativeArgs) -> ConnectDomainXmlToNativeRet, write;
137 CONNECT_NUM_OF_DEFINED_INTERFACES(()) -> ConnectNumOfDefinedInterfacesRet, read;
138 CONNECT_LIST_DEFINED_INTERFACES(ConnectListDefinedInterfacesArgs) -> ConnectListDefinedInterfacesRet, read;
139 CONNECT_NUM_OF_SECRETS(()) -> ConnectNumOfSecretsRet, read;
140 CONNECT_LIST_SECRETS(ConnectListSecretsArgs) -> ConnectListSecretsRet, read;
141 SECRET_LOOKUP_BY_UUID(SecretLookupByUuidArgs) -> SecretLookupByUuidRet, read;
142 SECRET_DEFINE_XML(SecretDefineXmlArgs) -> SecretDefineXmlRet, write;
143 SECRET_GET_XML_DESC(SecretGetXmlDescArgs) -> SecretGetXmlDescRet, read;
144 SECRET_SET_VALUE(SecretSetValueArgs) -> (), write;
145 SECRET_GET_VALUE(SecretGetValueArgs) -> SecretGetValueRet, write;
146 SECRET_UNDEFINE(SecretUndefineArgs) -> (), write;
147 SECRET_LOOKUP_BY_USAGE(SecretLookupByUsageArgs) -> SecretLookupByUsageRet, read;
148 DOMAIN_MIGRATE_PREPARE_TUNNEL(DomainMigratePrepareTunnelArgs) -> (), write stream upload;
149 CONNECT_IS_SECURE(()) -> ConnectIsSecureRet, read;
150 DOMAIN_IS_ACTIVE(DomainIsActiveArgs) -> DomainIsActiveRet, read;
151 DOMAIN_IS_PERSISTENT(DomainIsPersistentArgs) -> DomainIsPersistentRet, read;
152 NETWORK_IS_ACTIVE(NetworkIsActiveArgs) -> NetworkIsActiveRet, read;
153 NETWORK_IS_PERSISTENT(NetworkIsPersistentArgs) -> NetworkIsPersistentRet, read;
154 STORAGE_POOL_IS_ACTIVE(StoragePoolIsActiveArgs) -> StoragePoolIsActiveRet, read;
155 STORAGE_POOL_IS_PERSISTENT(StoragePoolIsPersistentArgs) -> StoragePoolIsPersistentRet, read;
156 INTERFACE_IS_ACTIVE(InterfaceIsActiveArgs) -> InterfaceIsActiveRet, read;
157 CONNECT_GET_LIB_VERSION(()) -> ConnectGetLibVersionRet, read;
158 CONNECT_COMPARE_CPU(ConnectCompareCpuArgs) -> ConnectCompareCpuRet, read;
159 DOMAIN_MEMORY_STATS(DomainMemoryStatsArgs) -> DomainMemoryStatsRet, read;
160 DOMAIN_ATTACH_DEVICE_FLAGS(DomainAttachDeviceFlagsArgs) -> (), write;
161 DOMAIN_DETACH_DEVICE_FLAGS(DomainDetachDeviceFlagsArgs) -> (), write;
162 CONNECT_BASELINE_CPU(ConnectBaselineCpuArgs) -> ConnectBaselineCpuRet, read;
163 DOMAIN_GET_JOB_INFO(DomainGetJobInfoArgs) -> DomainGetJobInfoRet, read;
164 DOMAIN_ABORT_JOB(DomainAbortJobArgs) -> (), write;
165 STORAGE_VOL_WIPE(StorageVolWipeArgs) -> (), write;
166 DOMAIN_MIGRATE_SET_MAX_DOWNTIME(DomainMigrateSetMaxDowntimeArgs) -> (), write;
167 CONNECT_DOMAIN_EVENT_REGISTER_ANY(ConnectDomainEventRegisterAnyArgs) -> (), read;
168 CONNECT_DOMAIN_EVENT_DEREGISTER_ANY(ConnectDomainEventDeregisterAnyArgs) -> (), read;
169 DOMAIN_EVENT_REBOOT(DomainEventRebootMsg) -> (), read as event;
170 DOMAIN_EVENT_RTC_CHANGE(DomainEventRtcChangeMsg) -> (), read as event;
171 DOMAIN_EVENT_WATCHDOG(DomainEventWatchdogMsg) -> (), read as event;
172 DOMAIN_EVENT_IO_ERROR(DomainEventIoErrorMsg) -> (), read as event;
173 DOMAIN_EVENT_GRAPHICS(DomainEventGraphicsMsg) -> (), read as event;
174 DOMAIN_UPDATE_DEVICE_FLAGS(DomainUpdateDeviceFlagsArgs) -> (), write;
175 NWFILTER_LOOKUP_BY_NAME(NwfilterLookupByNameArgs) -> NwfilterLookupByNameRet, read;
176 NWFILTER_LOOKUP_BY_UUID(NwfilterLookupByUuidArgs) -> NwfilterLookupByUuidRet, read;
177 NWFILTER_GET_XML_DESC(NwfilterGetXmlDescArgs) -> NwfilterGetXmlDescRet, read;
178 CONNECT_NUM_OF_NWFILTERS(()) -> ConnectNumOfNwfiltersRet, read;
179 CONNECT_LIST_NWFILTERS(ConnectListNwfiltersArgs) -> ConnectListNwfiltersRet, read;
180 NWFILTER_DEFINE_XML(NwfilterDefineXmlArgs) -> NwfilterDefineXmlRet, write;
181 NWFILTER_UNDEFINE(NwfilterUndefineArgs) -> (), write;
182 DOMAIN_MANAGED_SAVE(DomainManagedSaveArgs) -> (), write;
183 DOMAIN_HAS_MANAGED_SAVE_IMAGE(DomainHasManagedSaveImageArgs) -> DomainHasManagedSaveImageRet, read;
184 DOMAIN_MANAGED_SAVE_REMOVE(DomainManagedSaveRemoveArgs) -> (), write;
185 DOMAIN_SNAPSHOT_CREATE_XML(DomainSnapshotCreateXmlArgs) -> DomainSnapshotCreateXmlRet, write;
186 DOMAIN_SNAPSHOT_GET_XML_DESC(DomainSnapshotGetXmlDescArgs) -> DomainSnapshotGetXmlDescRet, read unless(4, 1);
187 DOMAIN_SNAPSHOT_NUM(DomainSnapshotNumArgs) -> DomainSnapshotNumRet, read;
188 DOMAIN_SNAPSHOT_LIST_NAMES(DomainSnapshotListNamesArgs) -> DomainSnapshotListNamesRet, read;
189 DOMAIN_SNAPSHOT_LOOKUP_BY_NAME(DomainSnapshotLookupByNameArgs) -> DomainSnapshotLookupByNameRet, read;
190 DOMAIN_HAS_CURRENT_SNAPSHOT(DomainHasCurrentSnapshotArgs) -> DomainHasCurrentSnapshotRet, read;
191 DOMAIN_SNAPSHOT_CURRENT(DomainSnapshotCurrentArgs) -> DomainSnapshotCurrentRet, read;
192 DOMAIN_REVERT_TO_SNAPSHOT(DomainRevertToSnapshotArgs) -> (), write;
193 DOMAIN_SNAPSHOT_DELETE(DomainSnapshotDeleteArgs) -> (), write;
194 DOMAIN_GET_BLOCK_INFO(DomainGetBlockInfoArgs) -> DomainGetBlockInfoRet, read;
195 DOMAIN_EVENT_IO_ERROR_REASON(DomainEventIoErrorReasonMsg) -> (), read as event;
196 DOMAIN_CREATE_WITH_FLAGS(DomainCreateWithFlagsArgs) -> DomainCreateWithFlagsRet, write;
197 DOMAIN_SET_MEMORY_PARAMETERS(DomainSetMemoryParametersArgs) -> (), write;
198 DOMAIN_GET_MEMORY_PARAMETERS(DomainGetMemoryParametersArgs) -> DomainGetMemoryParametersRet, read;
199 DOMAIN_SET_VCPUS_FLAGS(DomainSetVcpusFlagsArgs) -> (), write;
200 DOMAIN_GET_VCPUS_FLAGS(DomainGetVcpusFlagsArgs) -> DomainGetVcpusFlagsRet, read unless(4, 8);
201 DOMAIN_OPEN_CONSOLE(DomainOpenConsoleArgs) -> (), write stream duplex;
202 DOMAIN_IS_UPDATED(DomainIsUpdatedArgs) -> DomainIsUpdatedRet, read;
203 CONNECT_GET_SYSINFO(ConnectGetSysinfoArgs) -> ConnectGetSysinfoRet, read;
204 DOMAIN_SET_MEMORY_FLAGS(DomainSetMemoryFlagsArgs) -> (), write;
205 DOMAIN_SET_BLKIO_PARAMETERS(DomainSetBlkioParametersArgs) -> (), write;
206 DOMAIN_GET_BLKIO_PARAMETERS(DomainGetBlkioParametersArgs) -> DomainGetBlkioParametersRet, read;
207 DOMAIN_MIGRATE_SET_MAX_SPEED(DomainMigrateSetMaxSpeedArgs) -> (), write;
208 STORAGE_VOL_UPLOAD(StorageVolUploadArgs) -> (), write stream upload;
209 STORAGE_VOL_DOWNLOAD(StorageVolDownloadArgs) -> (), write stream download;
210 DOMAIN_INJECT_NMI(DomainInjectNmiArgs) -> (), write;
211 DOMAIN_SCREENSHOT(DomainScreenshotArgs) -> DomainScreenshotRet, write stream download;
212 DOMAIN_GET_STATE(DomainGetStateArgs) -> DomainGetStateRet, read;
213 DOMAIN_MIGRATE_BEGIN3(DomainMigrateBegin3Args) -> DomainMigrateBegin3Ret, write;
214 DOMAIN_MIGRATE_PREPARE3(DomainMigratePrepare3Args) -> DomainMigratePrepare3Ret, write;
215 DOMAIN_MIGRATE_PREPARE_TUNNEL3(DomainMigratePrepareTunnel3Args) -> DomainMigratePrepareTunnel3Ret, write stream upload;
216 DOMAIN_MIGRATE_PERFORM3(DomainMigratePerform3Args) -> DomainMigratePerform3Ret, write;
217 DOMAIN_MIGRATE_FINISH3(DomainMigrateFinish3Args) -> DomainMigrateFinish3Ret, write;
218 DOMAIN_MIGRATE_CONFIRM3(DomainMigrateConfirm3Args) -> (), write;
219 DOMAIN_SET_SCHEDULER_PARAMETERS_FLAGS(DomainSetSchedulerParametersFlagsArgs) -> (), write;
220 INTERFACE_CHANGE_BEGIN(InterfaceChangeBeginArgs) -> (), write;
221 INTERFACE_CHANGE_COMMIT(InterfaceChangeCommitArgs) -> (), write;
222 INTERFACE_CHANGE_ROLLBACK(InterfaceChangeRollbackArgs) -> (), write;
223 DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS(DomainGetSchedulerParametersFlagsArgs) -> DomainGetSchedulerParametersFlagsRet, read;
224 DOMAIN_EVENT_CONTROL_ERROR(DomainEventControlErrorMsg) -> (), read as event;
225 DOMAIN_PIN_VCPU_FLAGS(DomainPinVcpuFlagsArgs) -> (), write;
226 DOMAIN_SEND_KEY(DomainSendKeyArgs) -> (), write;
227 NODE_GET_CPU_STATS(NodeGetCpuStatsArgs) -> NodeGetCpuStatsRet, read;
228 NODE_GET_MEMORY_STATS(NodeGetMemoryStatsArgs) -> NodeGetMemoryStatsRet, read;
229 DOMAIN_GET_CONTROL_INFO(DomainGetControlInfoArgs) -> DomainGetControlInfoRet, read;
230 DOMAIN_GET_VCPU_PIN_INFO(DomainGetVcpuPinInfoArgs) -> DomainGetVcpuPinInfoRet, read;
231 DOMAIN_UNDEFINE_FLAGS(DomainUndefineFlagsArgs) -> (), write;
232 DOMAIN_SAVE_FLAGS(DomainSaveFlagsArgs) -> (), write;
233 DOMAIN_RESTORE_FLAGS(DomainRestoreFlagsArgs) -> (), write;
234 DOMAIN_DESTROY_FLAGS(DomainDestroyFlagsArgs) -> (), write;
235 DOMAIN_SAVE_IMAGE_GET_XML_DESC(DomainSaveImageGetXmlDescArgs) -> DomainSaveImageGetXmlDescRet, write;
236 DOMAIN_SAVE_IMAGE_DEFINE_XML(DomainSaveImageDefineXmlArgs) -> (), write;
237 DOMAIN_BLOCK_JOB_ABORT(DomainBlockJobAbortArgs) -> (), write;
238 DOMAIN_GET_BLOCK_JOB_INFO(DomainGetBlockJobInfoArgs) -> DomainGetBlockJobInfoRet, read;
239 DOMAIN_BLOCK_JOB_SET_SPEED(DomainBlockJobSetSpeedArgs) -> (), write;
240 DOMAIN_BLOCK_PULL(DomainBlockPullArgs) -> (), write;
241 DOMAIN_EVENT_BLOCK_JOB(DomainEventBlockJobMsg) -> (), read as event;
242 DOMAIN_MIGRATE_GET_MAX_SPEED(DomainMigrateGetMaxSpeedArgs) -> DomainMigrateGetMaxSpeedRet, write;
243 DOMAIN_BLOCK_STATS_FLAGS(DomainBlockStatsFlagsArgs) -> DomainBlockStatsFlagsRet, read;
244 DOMAIN_SNAPSHOT_GET_PARENT(DomainSnapshotGetParentArgs) -> DomainSnapshotGetParentRet, read;
245 DOMAIN_RESET(DomainResetArgs) -> (), write;
246 DOMAIN_SNAPSHOT_NUM_CHILDREN(DomainSnapshotNumChildrenArgs) -> DomainSnapshotNumChildrenRet, read;
247 DOMAIN_SNAPSHOT_LIST_CHILDREN_NAMES(DomainSnapshotListChildrenNamesArgs) -> DomainSnapshotListChildrenNamesRet, read;
248 DOMAIN_EVENT_DISK_CHANGE(DomainEventDiskChangeMsg) -> (), read as event;
249 DOMAIN_OPEN_GRAPHICS(DomainOpenGraphicsArgs) -> (), write;
250 NODE_SUSPEND_FOR_DURATION(NodeSuspendForDurationArgs) -> (), write;
251 DOMAIN_BLOCK_RESIZE(DomainBlockResizeArgs) -> (), write;
252 DOMAIN_SET_BLOCK_IO_TUNE(DomainSetBlockIoTuneArgs) -> (), write;
253 DOMAIN_GET_BLOCK_IO_TUNE(DomainGetBlockIoTuneArgs) -> DomainGetBlockIoTuneRet, read;
254 DOMAIN_SET_NUMA_PARAMETERS(DomainSetNumaParametersArgs) -> (), write;
255 DOMAIN_GET_NUMA_PARAMETERS(DomainGetNumaParametersArgs) -> DomainGetNumaParametersRet, read;
256 DOMAIN_SET_INTERFACE_PARAMETERS(DomainSetInterfaceParametersArgs) -> (), write;
257 DOMAIN_GET_INTERFACE_PARAMETERS(DomainGetInterfaceParametersArgs) -> DomainGetInterfaceParametersRet, read;
258 DOMAIN_SHUTDOWN_FLAGS(DomainShutdownFlagsArgs) -> (), write;
259 STORAGE_VOL_WIPE_PATTERN(StorageVolWipePatternArgs) -> (), write;
260 STORAGE_VOL_RESIZE(StorageVolResizeArgs) -> (), write;
261 DOMAIN_PM_SUSPEND_FOR_DURATION(DomainPmSuspendForDurationArgs) -> (), write;
262 DOMAIN_GET_CPU_STATS(DomainGetCpuStatsArgs) -> DomainGetCpuStatsRet, read;
263 DOMAIN_GET_DISK_ERRORS(DomainGetDiskErrorsArgs) -> DomainGetDiskErrorsRet, read;
264 DOMAIN_SET_METADATA(DomainSetMetadataArgs) -> (), write;
265 DOMAIN_GET_METADATA(DomainGetMetadataArgs) -> DomainGetMetadataRet, read;
266 DOMAIN_BLOCK_REBASE(DomainBlockRebaseArgs) -> (), write;
267 DOMAIN_PM_WAKEUP(DomainPmWakeupArgs) -> (), write;
268 DOMAIN_EVENT_TRAY_CHANGE(DomainEventTrayChangeMsg) -> (), read as event;
269 DOMAIN_EVENT_PMWAKEUP(DomainEventPmwakeupMsg) -> (), read as event;
270 DOMAIN_EVENT_PMSUSPEND(DomainEventPmsuspendMsg) -> (), read as event;
271 DOMAIN_SNAPSHOT_IS_CURRENT(DomainSnapshotIsCurrentArgs) -> DomainSnapshotIsCurrentRet, read;
272 DOMAIN_SNAPSHOT_HAS_METADATA(DomainSnapshotHasMetadataArgs) -> DomainSnapshotHasMetadataRet, read;
273 CONNECT_LIST_ALL_DOMAINS(ConnectListAllDomainsArgs) -> ConnectListAllDomainsRet, read;
274 DOMAIN_LIST_ALL_SNAPSHOTS(DomainListAllSnapshotsArgs) -> DomainListAllSnapshotsRet, read;
275 DOMAIN_SNAPSHOT_LIST_ALL_CHILDREN(DomainSnapshotListAllChildrenArgs) -> DomainSnapshotListAllChildrenRet, read;
276 DOMAIN_EVENT_BALLOON_CHANGE(DomainEventBalloonChangeMsg) -> (), read as event;
277 DOMAIN_GET_HOSTNAME(DomainGetHostnameArgs) -> DomainGetHostnameRet, write;
278 DOMAIN_GET_SECURITY_LABEL_LIST(DomainGetSecurityLabelListArgs) -> DomainGetSecurityLabelListRet, read;
279 DOMAIN_PIN_EMULATOR(DomainPinEmulatorArgs) -> (), write;
280 DOMAIN_GET_EMULATOR_PIN_INFO(DomainGetEmulatorPinInfoArgs) -> DomainGetEmulatorPinInfoRet, read;
281 CONNECT_LIST_ALL_STORAGE_POOLS(ConnectListAllStoragePoolsArgs) -> ConnectListAllStoragePoolsRet, read;
282 STORAGE_POOL_LIST_ALL_VOLUMES(StoragePoolListAllVolumesArgs) -> StoragePoolListAllVolumesRet, read;
283 CONNECT_LIST_ALL_NETWORKS(ConnectListAllNetworksArgs) -> ConnectListAllNetworksRet, read;
284 CONNECT_LIST_ALL_INTERFACES(ConnectListAllInterfacesArgs) -> ConnectListAllInterfacesRet, read;
285 CONNECT_LIST_ALL_NODE_DEVICES(ConnectListAllNodeDevicesArgs) -> ConnectListAllNodeDevicesRet, read;
286 CONNECT_LIST_ALL_NWFILTERS(ConnectListAllNwfiltersArgs) -> ConnectListAllNwfiltersRet, read;
287 CONNECT_LIST_ALL_SECRETS(ConnectListAllSecretsArgs) -> ConnectListAllSecretsRet, read;
288 NODE_SET_MEMORY_PARAMETERS(NodeSetMemoryParametersArgs) -> (), write;
289 NODE_GET_MEMORY_PARAMETERS(NodeGetMemoryParametersArgs) -> NodeGetMemoryParametersRet, read;
290 DOMAIN_BLOCK_COMMIT(DomainBlockCommitArgs) -> (), write;
291 NETWORK_UPDATE(NetworkUpdateArgs) -> (), write;
292 DOMAIN_EVENT_PMSUSPEND_DISK(DomainEventPmsuspendDiskMsg) -> (), read as event;
293 NODE_GET_CPU_MAP(NodeGetCpuMapArgs) -> NodeGetCpuMapRet, read;
294 DOMAIN_FSTRIM(DomainFstrimArgs) -> (), write;
295 DOMAIN_SEND_PROCESS_SIGNAL(DomainSendProcessSignalArgs) -> (), write;
296 DOMAIN_OPEN_CHANNEL(DomainOpenChannelArgs) -> (), write stream duplex;
297 NODE_DEVICE_LOOKUP_SCSI_HOST_BY_WWN(NodeDeviceLookupScsiHostByWwnArgs) -> NodeDeviceLookupScsiHostByWwnRet, read;
298 DOMAIN_GET_JOB_STATS(DomainGetJobStatsArgs) -> DomainGetJobStatsRet, read;
299 DOMAIN_MIGRATE_GET_COMPRESSION_CACHE(DomainMigrateGetCompressionCacheArgs) -> DomainMigrateGetCompressionCacheRet, read;
300 DOMAIN_MIGRATE_SET_COMPRESSION_CACHE(DomainMigrateSetCompressionCacheArgs) -> (), write;
301 NODE_DEVICE_DETACH_FLAGS(NodeDeviceDetachFlagsArgs) -> (), write;
302 DOMAIN_MIGRATE_BEGIN3_PARAMS(DomainMigrateBegin3ParamsArgs) -> DomainMigrateBegin3ParamsRet, write;
303 DOMAIN_MIGRATE_PREPARE3_PARAMS(DomainMigratePrepare3ParamsArgs) -> DomainMigratePrepare3ParamsRet, write;
304 DOMAIN_MIGRATE_PREPARE_TUNNEL3_PARAMS(DomainMigratePrepareTunnel3ParamsArgs) -> DomainMigratePrepareTunnel3ParamsRet, write stream upload;
305 DOMAIN_MIGRATE_PERFORM3_PARAMS(DomainMigratePerform3ParamsArgs) -> DomainMigratePerform3ParamsRet, write;
306 DOMAIN_MIGRATE_FINISH3_PARAMS(DomainMigrateFinish3ParamsArgs) -> DomainMigrateFinish3ParamsRet, write;
307 DOMAIN_MIGRATE_CONFIRM3_PARAMS(DomainMigrateConfirm3ParamsArgs) -> (), write;
308 DOMAIN_SET_MEMORY_STATS_PERIOD(DomainSetMemoryStatsPeriodArgs) -> (), write;
309 DOMAIN_CREATE_XML_WITH_FILES(DomainCreateXmlWithFilesArgs) -> DomainCreateXmlWithFilesRet, write;
310 DOMAIN_CREATE_WITH_FILES(DomainCreateWithFilesArgs) -> DomainCreateWithFilesRet, write;
311 DOMAIN_EVENT_DEVICE_REMOVED(DomainEventDeviceRemovedMsg) -> (), read as event;
312 CONNECT_GET_CPU_MODEL_NAMES(ConnectGetCpuModelNamesArgs) -> ConnectGetCpuModelNamesRet, read;
313 CONNECT_NETWORK_EVENT_REGISTER_ANY(ConnectNetworkEventRegisterAnyArgs) -> ConnectNetworkEventRegisterAnyRet, read;
314 CONNECT_NETWORK_EVENT_DEREGISTER_ANY(ConnectNetworkEventDeregisterAnyArgs) -> (), read;
315 NETWORK_EVENT_LIFECYCLE(NetworkEventLifecycleMsg) -> (), read as event;
316 CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY(ConnectDomainEventCallbackRegisterAnyArgs) -> ConnectDomainEventCallbackRegisterAnyRet, read;
317 CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY(ConnectDomainEventCallbackDeregisterAnyArgs) -> (), read;
318 DOMAIN_EVENT_CALLBACK_LIFECYCLE(DomainEventCallbackLifecycleMsg) -> (), read as event;
319 DOMAIN_EVENT_CALLBACK_REBOOT(DomainEventCallbackRebootMsg) -> (), read as event;
320 DOMAIN_EVENT_CALLBACK_RTC_CHANGE(DomainEventCallbackRtcChangeMsg) -> (), read as event;
321 DOMAIN_EVENT_CALLBACK_WATCHDOG(DomainEventCallbackWatchdogMsg) -> (), read as event;
322 DOMAIN_EVENT_CALLBACK_IO_ERROR(DomainEventCallbackIoErrorMsg) -> (), read as event;
323 DOMAIN_EVENT_CALLBACK_GRAPHICS(DomainEventCallbackGraphicsMsg) -> (), read as event;
324 DOMAIN_EVENT_CALLBACK_IO_ERROR_REASON(DomainEventCallbackIoErrorReasonMsg) -> (), read as event;
325 DOMAIN_EVENT_CALLBACK_CONTROL_ERROR(DomainEventCallbackControlErrorMsg) -> (), read as event;
326 DOMAIN_EVENT_CALLBACK_BLOCK_JOB(DomainEventCallbackBlockJobMsg) -> (), read as event;
327 DOMAIN_EVENT_CALLBACK_DISK_CHANGE(DomainEventCallbackDiskChangeMsg) -> (), read as event;
328 DOMAIN_EVENT_CALLBACK_TRAY_CHANGE(DomainEventCallbackTrayChangeMsg) -> (), read as event;
329 DOMAIN_EVENT_CALLBACK_PMWAKEUP(DomainEventCallbackPmwakeupMsg) -> (), read as event;
330 DOMAIN_EVENT_CALLBACK_PMSUSPEND(DomainEventCallbackPmsuspendMsg) -> (), read as event;
331 DOMAIN_EVENT_CALLBACK_BALLOON_CHANGE(DomainEventCallbackBalloonChangeMsg) -> (), read as event;
332 DOMAIN_EVENT_CALLBACK_PMSUSPEND_DISK(DomainEventCallbackPmsuspendDiskMsg) -> (), read as event;
333 DOMAIN_EVENT_CALLBACK_DEVICE_REMOVED(DomainEventCallbackDeviceRemovedMsg) -> (), read as event;
334 DOMAIN_CORE_DUMP_WITH_FORMAT(DomainCoreDumpWithFormatArgs) -> (), write;
335 DOMAIN_FSFREEZE(DomainFsfreezeArgs) -> DomainFsfreezeRet, write;
336 DOMAIN_FSTHAW(DomainFsthawArgs) -> DomainFsthawRet, write;
337 DOMAIN_GET_TIME(DomainGetTimeArgs) -> DomainGetTimeRet, write;
338 DOMAIN_SET_TIME(DomainSetTimeArgs) -> (), write;
339 DOMAIN_EVENT_BLOCK_JOB_2(DomainEventBlockJob2Msg) -> (), read as event;
340 NODE_GET_FREE_PAGES(NodeGetFreePagesArgs) -> NodeGetFreePagesRet, read;
341 NETWORK_GET_DHCP_LEASES(NetworkGetDhcpLeasesArgs) -> NetworkGetDhcpLeasesRet, read;
342 CONNECT_GET_DOMAIN_CAPABILITIES(ConnectGetDomainCapabilitiesArgs) -> ConnectGetDomainCapabilitiesRet, write;
343 DOMAIN_OPEN_GRAPHICS_FD(DomainOpenGraphicsFdArgs) -> (), write;
344 CONNECT_GET_ALL_DOMAIN_STATS(ConnectGetAllDomainStatsArgs) -> ConnectGetAllDomainStatsRet, read;
345 DOMAIN_BLOCK_COPY(DomainBlockCopyArgs) -> (), write;
346 DOMAIN_EVENT_CALLBACK_TUNABLE(DomainEventCallbackTunableMsg) -> (), read as event;
347 NODE_ALLOC_PAGES(NodeAllocPagesArgs) -> NodeAllocPagesRet, write;
348 DOMAIN_EVENT_CALLBACK_AGENT_LIFECYCLE(DomainEventCallbackAgentLifecycleMsg) -> (), read as event;
349 DOMAIN_GET_FSINFO(DomainGetFsinfoArgs) -> DomainGetFsinfoRet, write;
350 DOMAIN_DEFINE_XML_FLAGS(DomainDefineXmlFlagsArgs) -> DomainDefineXmlFlagsRet, write;
351 DOMAIN_GET_IOTHREAD_INFO(DomainGetIothreadInfoArgs) -> DomainGetIothreadInfoRet, read;
352 DOMAIN_PIN_IOTHREAD(DomainPinIothreadArgs) -> (), write;
353 DOMAIN_INTERFACE_ADDRESSES(DomainInterfaceAddressesArgs) -> DomainInterfaceAddressesRet, read unless(8, 1);
354 DOMAIN_EVENT_CALLBACK_DEVICE_ADDED(DomainEventCallbackDeviceAddedMsg) -> (), read as event;
355 DOMAIN_ADD_IOTHREAD(DomainAddIothreadArgs) -> (), write;
356 DOMAIN_DEL_IOTHREAD(DomainDelIothreadArgs) -> (), write;
357 DOMAIN_SET_USER_PASSWORD(DomainSetUserPasswordArgs) -> (), write;
358 DOMAIN_RENAME(DomainRenameArgs) -> DomainRenameRet, write;
359 DOMAIN_EVENT_CALLBACK_MIGRATION_ITERATION(DomainEventCallbackMigrationIterationMsg) -> (), read as event;
360 CONNECT_REGISTER_CLOSE_CALLBACK(()) -> (), read;
361 CONNECT_UNREGISTER_CLOSE_CALLBACK(()) -> (), read;
362 CONNECT_EVENT_CONNECTION_CLOSED(ConnectEventConnectionClosedMsg) -> (), read as event;
363 DOMAIN_EVENT_CALLBACK_JOB_COMPLETED(DomainEventCallbackJobCompletedMsg) -> (), read as event;
364 DOMAIN_MIGRATE_START_POST_COPY(DomainMigrateStartPostCopyArgs) -> (), write;
365 DOMAIN_GET_PERF_EVENTS(DomainGetPerfEventsArgs) -> DomainGetPerfEventsRet, read;
366 DOMAIN_SET_PERF_EVENTS(DomainSetPerfEventsArgs) -> (), write;
367 DOMAIN_EVENT_CALLBACK_DEVICE_REMOVAL_FAILED(DomainEventCallbackDeviceRemovalFailedMsg) -> (), read as event;
368 CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY(ConnectStoragePoolEventRegisterAnyArgs) -> ConnectStoragePoolEventRegisterAnyRet, read;
369 CONNECT_STORAGE_POOL_EVENT_DEREGISTER_ANY(ConnectStoragePoolEventDeregisterAnyArgs) -> (), read;
370 STORAGE_POOL_EVENT_LIFECYCLE(StoragePoolEventLifecycleMsg) -> (), read as event;
371 DOMAIN_GET_GUEST_VCPUS(DomainGetGuestVcpusArgs) -> DomainGetGuestVcpusRet, write;
372 DOMAIN_SET_GUEST_VCPUS(DomainSetGuestVcpusArgs) -> (), write;
373 STORAGE_POOL_EVENT_REFRESH(StoragePoolEventRefreshMsg) -> (), read as event;
374 CONNECT_NODE_DEVICE_EVENT_REGISTER_ANY(ConnectNodeDeviceEventRegisterAnyArgs) -> ConnectNodeDeviceEventRegisterAnyRet, read;
375 CONNECT_NODE_DEVICE_EVENT_DEREGISTER_ANY(ConnectNodeDeviceEventDeregisterAnyArgs) -> (), read;
376 NODE_DEVICE_EVENT_LIFECYCLE(NodeDeviceEventLifecycleMsg) -> (), read as event;
377 NODE_DEVICE_EVENT_UPDATE(NodeDeviceEventUpdateMsg) -> (), read as event;
378 STORAGE_VOL_GET_INFO_FLAGS(StorageVolGetInfoFlagsArgs) -> StorageVolGetInfoFlagsRet, read;
379 DOMAIN_EVENT_CALLBACK_METADATA_CHANGE(DomainEventCallbackMetadataChangeMsg) -> (), read as event;
380 CONNECT_SECRET_EVENT_REGISTER_ANY(ConnectSecretEventRegisterAnyArgs) -> ConnectSecretEventRegisterAnyRet, read;
381 CONNECT_SECRET_EVENT_DEREGISTER_ANY(ConnectSecretEventDeregisterAnyArgs) -> (), read;
382 SECRET_EVENT_LIFECYCLE(SecretEventLifecycleMsg) -> (), read as event;
383 SECRET_EVENT_VALUE_CHANGED(SecretEventValueChangedMsg) -> (), read as event;
384 DOMAIN_SET_VCPU(DomainSetVcpuArgs) -> (), write;
385 DOMAIN_EVENT_BLOCK_THRESHOLD(DomainEventBlockThresholdMsg) -> (), read as event;
386 DOMAIN_SET_BLOCK_THRESHOLD(DomainSetBlockThresholdArgs) -> (), write;
387 DOMAIN_MIGRATE_GET_MAX_DOWNTIME(DomainMigrateGetMaxDowntimeArgs) -> DomainMigrateGetMaxDowntimeRet, read;
388 DOMAIN_MANAGED_SAVE_GET_XML_DESC(DomainManagedSaveGetXmlDescArgs) -> DomainManagedSaveGetXmlDescRet, read unless(4, 1);
389 DOMAIN_MANAGED_SAVE_DEFINE_XML(DomainManagedSaveDefineXmlArgs) -> (), write;
390 DOMAIN_SET_LIFECYCLE_ACTION(DomainSetLifecycleActionArgs) -> (), write;
391 STORAGE_POOL_LOOKUP_BY_TARGET_PATH(StoragePoolLookupByTargetPathArgs) -> StoragePoolLookupByTargetPathRet, read;
392 DOMAIN_DETACH_DEVICE_ALIAS(DomainDetachDeviceAliasArgs) -> (), write;
393 CONNECT_COMPARE_HYPERVISOR_CPU(ConnectCompareHypervisorCpuArgs) -> ConnectCompareHypervisorCpuRet, write;
394 CONNECT_BASELINE_HYPERVISOR_CPU(ConnectBaselineHypervisorCpuArgs) -> ConnectBaselineHypervisorCpuRet, write;
395 NODE_GET_SEV_INFO(NodeGetSevInfoArgs) -> NodeGetSevInfoRet, write;
396 DOMAIN_GET_LAUNCH_SECURITY_INFO(DomainGetLaunchSecurityInfoArgs) -> DomainGetLaunchSecurityInfoRet, write;
397 NWFILTER_BINDING_LOOKUP_BY_PORT_DEV(NwfilterBindingLookupByPortDevArgs) -> NwfilterBindingLookupByPortDevRet, read;
398 NWFILTER_BINDING_GET_XML_DESC(NwfilterBindingGetXmlDescArgs) -> NwfilterBindingGetXmlDescRet, read;
399 NWFILTER_BINDING_CREATE_XML(NwfilterBindingCreateXmlArgs) -> NwfilterBindingCreateXmlRet, write;
400 NWFILTER_BINDING_DELETE(NwfilterBindingDeleteArgs) -> (), write;
401 CONNECT_LIST_ALL_NWFILTER_BINDINGS(ConnectListAllNwfilterBindingsArgs) -> ConnectListAllNwfilterBindingsRet, read;
402 DOMAIN_SET_IOTHREAD_PARAMS(DomainSetIothreadParamsArgs) -> (), write;
403 CONNECT_GET_STORAGE_POOL_CAPABILITIES(ConnectGetStoragePoolCapabilitiesArgs) -> ConnectGetStoragePoolCapabilitiesRet, read;
404 NETWORK_LIST_ALL_PORTS(NetworkListAllPortsArgs) -> NetworkListAllPortsRet, read;
405 NETWORK_PORT_LOOKUP_BY_UUID(NetworkPortLookupByUuidArgs) -> NetworkPortLookupByUuidRet, read;
406 NETWORK_PORT_CREATE_XML(NetworkPortCreateXmlArgs) -> NetworkPortCreateXmlRet, write;
407 NETWORK_PORT_GET_PARAMETERS(NetworkPortGetParametersArgs) -> NetworkPortGetParametersRet, read;
408 NETWORK_PORT_SET_PARAMETERS(NetworkPortSetParametersArgs) -> (), write;
409 NETWORK_PORT_GET_XML_DESC(NetworkPortGetXmlDescArgs) -> NetworkPortGetXmlDescRet, read;
410 NETWORK_PORT_DELETE(NetworkPortDeleteArgs) -> (), write;
411 DOMAIN_CHECKPOINT_CREATE_XML(DomainCheckpointCreateXmlArgs) -> DomainCheckpointCreateXmlRet, write;
412 DOMAIN_CHECKPOINT_GET_XML_DESC(DomainCheckpointGetXmlDescArgs) -> DomainCheckpointGetXmlDescRet, read unless(4, 1);
413 DOMAIN_LIST_ALL_CHECKPOINTS(DomainListAllCheckpointsArgs) -> DomainListAllCheckpointsRet, read;
414 DOMAIN_CHECKPOINT_LIST_ALL_CHILDREN(DomainCheckpointListAllChildrenArgs) -> DomainCheckpointListAllChildrenRet, read;
415 DOMAIN_CHECKPOINT_LOOKUP_BY_NAME(DomainCheckpointLookupByNameArgs) -> DomainCheckpointLookupByNameRet, read;
416 DOMAIN_CHECKPOINT_GET_PARENT(DomainCheckpointGetParentArgs) -> DomainCheckpointGetParentRet, read;
417 DOMAIN_CHECKPOINT_DELETE(DomainCheckpointDeleteArgs) -> (), write;
418 DOMAIN_GET_GUEST_INFO(DomainGetGuestInfoArgs) -> DomainGetGuestInfoRet, write;
419 CONNECT_SET_IDENTITY(ConnectSetIdentityArgs) -> (), read;
420 DOMAIN_AGENT_SET_RESPONSE_TIMEOUT(DomainAgentSetResponseTimeoutArgs) -> DomainAgentSetResponseTimeoutRet, write;
421 DOMAIN_BACKUP_BEGIN(DomainBackupBeginArgs) -> (), write;
422 DOMAIN_BACKUP_GET_XML_DESC(DomainBackupGetXmlDescArgs) -> DomainBackupGetXmlDescRet, read;
423 DOMAIN_EVENT_MEMORY_FAILURE(DomainEventMemoryFailureMsg) -> (), read as event;
424 DOMAIN_AUTHORIZED_SSH_KEYS_GET(DomainAuthorizedSshKeysGetArgs) -> DomainAuthorizedSshKeysGetRet, write;
425 DOMAIN_AUTHORIZED_SSH_KEYS_SET(DomainAuthorizedSshKeysSetArgs) -> (), write;
426 DOMAIN_GET_MESSAGES(DomainGetMessagesArgs) -> DomainGetMessagesRet, read;
427 DOMAIN_START_DIRTY_RATE_CALC(DomainStartDirtyRateCalcArgs) -> (), write;
428 NODE_DEVICE_DEFINE_XML(NodeDeviceDefineXmlArgs) -> NodeDeviceDefineXmlRet, write;
429 NODE_DEVICE_UNDEFINE(NodeDeviceUndefineArgs) -> (), write;
430 NODE_DEVICE_CREATE(NodeDeviceCreateArgs) -> (), write;
431 NWFILTER_DEFINE_XML_FLAGS(NwfilterDefineXmlFlagsArgs) -> NwfilterDefineXmlFlagsRet, write;
432 NETWORK_DEFINE_XML_FLAGS(NetworkDefineXmlFlagsArgs) -> NetworkDefineXmlFlagsRet, write;
433 NODE_DEVICE_GET_AUTOSTART(NodeDeviceGetAutostartArgs) -> NodeDeviceGetAutostartRet, write;
434 NODE_DEVICE_SET_AUTOSTART(NodeDeviceSetAutostartArgs) -> (), write;
435 NODE_DEVICE_IS_PERSISTENT(NodeDeviceIsPersistentArgs) -> NodeDeviceIsPersistentRet, read;
436 NODE_DEVICE_IS_ACTIVE(NodeDeviceIsActiveArgs) -> NodeDeviceIsActiveRet, read;
437 NETWORK_CREATE_XML_FLAGS(NetworkCreateXmlFlagsArgs) -> NetworkCreateXmlFlagsRet, write;
438 DOMAIN_EVENT_MEMORY_DEVICE_SIZE_CHANGE(DomainEventMemoryDeviceSizeChangeMsg) -> (), read as event;
439 DOMAIN_SET_LAUNCH_SECURITY_STATE(DomainSetLaunchSecurityStateArgs) -> (), write;
440 DOMAIN_SAVE_PARAMS(DomainSaveParamsArgs) -> (), write;
441 DOMAIN_RESTORE_PARAMS(DomainRestoreParamsArgs) -> (), write;
442 DOMAIN_ABORT_JOB_FLAGS(DomainAbortJobFlagsArgs) -> (), write;
443 DOMAIN_FD_ASSOCIATE(DomainFdAssociateArgs) -> (), write;
444 NETWORK_SET_METADATA(NetworkSetMetadataArgs) -> (), write;
445 NETWORK_GET_METADATA(NetworkGetMetadataArgs) -> NetworkGetMetadataRet, read;
446 NETWORK_EVENT_CALLBACK_METADATA_CHANGE(NetworkEventCallbackMetadataChangeMsg) -> (), read as event;
447 NODE_DEVICE_UPDATE(NodeDeviceUpdateArgs) -> (), write;
448 DOMAIN_GRAPHICS_RELOAD(DomainGraphicsReloadArgs) -> (), write;
449 DOMAIN_GET_AUTOSTART_ONCE(DomainGetAutostartOnceArgs) -> DomainGetAutostartOnceRet, read;
450 DOMAIN_SET_AUTOSTART_ONCE(DomainSetAutostartOnceArgs) -> (), write;
451 DOMAIN_SET_THROTTLE_GROUP(DomainSetThrottleGroupArgs) -> (), write;
452 DOMAIN_DEL_THROTTLE_GROUP(DomainDelThrottleGroupArgs) -> (), write;
453 DOMAIN_EVENT_NIC_MAC_CHANGE(DomainEventNicMacChangeMsg) -> (), read as event;}
