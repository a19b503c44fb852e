//! Storage pools and volumes: the arguments and answers of their procedures.

use crate::limits::LIST_MAX;
use crate::types::{StoragePool, StorageVol};
use crate::xdr::{List, Uuid, xdr_structs};

xdr_structs! {
    StoragePoolLookupByUuidArgs {
        uuid: Uuid,
    }
    StoragePoolLookupByUuidRet {
        pool: StoragePool,
    }
    StoragePoolLookupByNameArgs {
        name: String,
    }
    StoragePoolLookupByNameRet {
        pool: StoragePool,
    }
    StoragePoolLookupByVolumeArgs {
        vol: StorageVol,
    }
    StoragePoolLookupByVolumeRet {
        pool: StoragePool,
    }
    StoragePoolLookupByTargetPathArgs {
        path: String,
    }
    StoragePoolLookupByTargetPathRet {
        pool: StoragePool,
    }
    StoragePoolCreateXmlArgs {
        xml: String,
        flags: u32,
    }
    StoragePoolCreateXmlRet {
        pool: StoragePool,
    }
    StoragePoolDefineXmlArgs {
        xml: String,
        flags: u32,
    }
    StoragePoolDefineXmlRet {
        pool: StoragePool,
    }
    StoragePoolBuildArgs {
        pool: StoragePool,
        flags: u32,
    }
    StoragePoolUndefineArgs {
        pool: StoragePool,
    }
    StoragePoolCreateArgs {
        pool: StoragePool,
        flags: u32,
    }
    StoragePoolDestroyArgs {
        pool: StoragePool,
    }
    StoragePoolDeleteArgs {
        pool: StoragePool,
        flags: u32,
    }
    StoragePoolRefreshArgs {
        pool: StoragePool,
        flags: u32,
    }
    StoragePoolGetXmlDescArgs {
        pool: StoragePool,
        flags: u32,
    }
    StoragePoolGetXmlDescRet {
        xml: String,
    }
    StoragePoolGetInfoArgs {
        pool: StoragePool,
    }
    StoragePoolGetInfoRet {
        state: u32,
        capacity: u64,
        allocation: u64,
        available: u64,
    }
    StoragePoolGetAutostartArgs {
        pool: StoragePool,
    }
    StoragePoolGetAutostartRet {
        autostart: i32,
    }
    StoragePoolSetAutostartArgs {
        pool: StoragePool,
        autostart: i32,
    }
    StoragePoolNumOfVolumesArgs {
        pool: StoragePool,
    }
    StoragePoolNumOfVolumesRet {
        num: i32,
    }
    StoragePoolListVolumesArgs {
        pool: StoragePool,
        maxnames: i32,
    }
    StoragePoolListVolumesRet {
        names: List<String, LIST_MAX>,
    }
    StorageVolLookupByNameArgs {
        pool: StoragePool,
        name: String,
    }
    StorageVolLookupByNameRet {
        vol: StorageVol,
    }
    StorageVolLookupByKeyArgs {
        key: String,
    }
    StorageVolLookupByKeyRet {
        vol: StorageVol,
    }
    StorageVolLookupByPathArgs {
        path: String,
    }
    StorageVolLookupByPathRet {
        vol: StorageVol,
    }
    StorageVolCreateXmlArgs {
        pool: StoragePool,
        xml: String,
        flags: u32,
    }
    StorageVolCreateXmlRet {
        vol: StorageVol,
    }
    StorageVolCreateXmlFromArgs {
        pool: StoragePool,
        xml: String,
        clonevol: StorageVol,
        flags: u32,
    }
    StorageVolCreateXmlFromRet {
        vol: StorageVol,
    }
    StorageVolDeleteArgs {
        vol: StorageVol,
        flags: u32,
    }
    StorageVolWipeArgs {
        vol: StorageVol,
        flags: u32,
    }
    StorageVolWipePatternArgs {
        vol: StorageVol,
        algorithm: u32,
        flags: u32,
    }
    StorageVolGetXmlDescArgs {
        vol: StorageVol,
        flags: u32,
    }
    StorageVolGetXmlDescRet {
        xml: String,
    }
    StorageVolGetInfoArgs {
        vol: StorageVol,
    }
    StorageVolGetInfoRet {
        kind: i32,
        capacity: u64,
        allocation: u64,
    }
    StorageVolGetInfoFlagsArgs {
        vol: StorageVol,
        flags: u32,
    }
    StorageVolGetInfoFlagsRet {
        kind: i32,
        capacity: u64,
        allocation: u64,
    }
    StorageVolGetPathArgs {
        vol: StorageVol,
    }
    StorageVolGetPathRet {
        name: String,
    }
    StorageVolResizeArgs {
        vol: StorageVol,
        capacity: u64,
        flags: u32,
    }
    StoragePoolIsActiveArgs {
        pool: StoragePool,
    }
    StoragePoolIsActiveRet {
        active: i32,
    }
    StoragePoolIsPersistentArgs {
        pool: StoragePool,
    }
    StoragePoolIsPersistentRet {
        persistent: i32,
    }
    StorageVolUploadArgs {
        vol: StorageVol,
        offset: u64,
        length: u64,
        flags: u32,
    }
    StorageVolDownloadArgs {
        vol: StorageVol,
        offset: u64,
        length: u64,
        flags: u32,
    }
    StoragePoolListAllVolumesArgs {
        pool: StoragePool,
        need_results: i32,
        flags: u32,
    }
    StoragePoolListAllVolumesRet {
        vols: List<StorageVol, LIST_MAX>,
        ret: u32,
    }
}
