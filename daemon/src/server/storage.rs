//! Storage pools and volumes.

use std::future::Future;
use std::sync::Arc;

use rpc::args::*;
use rpc::procs;
use rpc::server::Router;
use rpc::stream::Stream;
use rpc::types;
use uuid::Uuid;
use xml_schemas::pool::capabilities;

use super::{Answer, Call, Daemon, count};
use crate::drivers::domain::blocking;
use crate::drivers::storage::Driver;
use crate::drivers::storage::object::Pool;
use crate::drivers::storage::volume::{Info, Reference};
use crate::error::{Error, Result, check_flags};

/// The functions for pools and volumes.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    volume_routes(pool_routes(router))
}

fn pool_routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::CONNECT_NUM_OF_STORAGE_POOLS, num_of_pools)
        .on(procs::CONNECT_LIST_STORAGE_POOLS, list_pools)
        .on(procs::CONNECT_NUM_OF_DEFINED_STORAGE_POOLS, num_of_defined)
        .on(procs::CONNECT_LIST_DEFINED_STORAGE_POOLS, list_defined)
        .on(procs::CONNECT_LIST_ALL_STORAGE_POOLS, list_all_pools)
        .on(procs::CONNECT_FIND_STORAGE_POOL_SOURCES, find_sources)
        .on(
            procs::CONNECT_GET_STORAGE_POOL_CAPABILITIES,
            get_capabilities,
        )
        .on(procs::STORAGE_POOL_LOOKUP_BY_NAME, lookup_by_name)
        .on(procs::STORAGE_POOL_LOOKUP_BY_UUID, lookup_by_uuid)
        .on(procs::STORAGE_POOL_LOOKUP_BY_VOLUME, lookup_by_volume)
        .on(
            procs::STORAGE_POOL_LOOKUP_BY_TARGET_PATH,
            lookup_by_target_path,
        )
        .on(procs::STORAGE_POOL_DEFINE_XML, define_xml)
        .on(procs::STORAGE_POOL_CREATE_XML, create_xml)
        .on(procs::STORAGE_POOL_CREATE, create)
        .on(procs::STORAGE_POOL_BUILD, build)
        .on(procs::STORAGE_POOL_DESTROY, destroy)
        .on(procs::STORAGE_POOL_DELETE, delete)
        .on(procs::STORAGE_POOL_UNDEFINE, undefine)
        .on(procs::STORAGE_POOL_REFRESH, refresh)
        .on(procs::STORAGE_POOL_GET_INFO, get_info)
        .on(procs::STORAGE_POOL_GET_XML_DESC, get_xml_desc)
        .on(procs::STORAGE_POOL_GET_AUTOSTART, get_autostart)
        .on(procs::STORAGE_POOL_SET_AUTOSTART, set_autostart)
        .on(procs::STORAGE_POOL_IS_ACTIVE, is_active)
        .on(procs::STORAGE_POOL_IS_PERSISTENT, is_persistent)
        .on(procs::STORAGE_POOL_NUM_OF_VOLUMES, num_of_volumes)
        .on(procs::STORAGE_POOL_LIST_VOLUMES, list_volumes)
        .on(procs::STORAGE_POOL_LIST_ALL_VOLUMES, list_all_volumes)
}

fn volume_routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::STORAGE_VOL_LOOKUP_BY_NAME, vol_lookup_by_name)
        .on(procs::STORAGE_VOL_LOOKUP_BY_KEY, vol_lookup_by_key)
        .on(procs::STORAGE_VOL_LOOKUP_BY_PATH, vol_lookup_by_path)
        .on(procs::STORAGE_VOL_CREATE_XML, vol_create_xml)
        .on(procs::STORAGE_VOL_CREATE_XML_FROM, vol_create_xml_from)
        .on(procs::STORAGE_VOL_DELETE, vol_delete)
        .on(procs::STORAGE_VOL_WIPE, vol_wipe)
        .on(procs::STORAGE_VOL_WIPE_PATTERN, vol_wipe_pattern)
        .on(procs::STORAGE_VOL_RESIZE, vol_resize)
        .on(procs::STORAGE_VOL_GET_INFO, vol_get_info)
        .on(procs::STORAGE_VOL_GET_INFO_FLAGS, vol_get_info_flags)
        .on(procs::STORAGE_VOL_GET_XML_DESC, vol_get_xml_desc)
        .on(procs::STORAGE_VOL_GET_PATH, vol_get_path)
        .on_stream(procs::STORAGE_VOL_UPLOAD, vol_upload)
        .on_stream(procs::STORAGE_VOL_DOWNLOAD, vol_download)
}

fn reference(pool: &Pool) -> types::StoragePool {
    types::StoragePool {
        name: pool.name(),
        uuid: pool.uuid.into_bytes(),
    }
}

fn vol_reference(volume: Reference) -> types::StorageVol {
    types::StorageVol {
        pool: volume.pool,
        name: volume.name,
        key: volume.key,
    }
}

fn find(call: &Call, pool: &types::StoragePool) -> Answer<Arc<Pool>> {
    let driver = &call.state().domains.storage;
    Ok(driver.find(&pool.name, Uuid::from_bytes(pool.uuid))?)
}

fn driver(call: &Call) -> Arc<Driver> {
    Arc::clone(&call.state().domains.storage)
}

/// Runs what has been begun to its end, whether or not the client still waits.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Answer<T> {
    let done = tokio::spawn(work)
        .await
        .map_err(|error| Error::internal(format!("a call failed inside: {error}")))?;
    Ok(done?)
}

/// VIR_CONNECT_LIST_STORAGE_POOLS_INACTIVE and _ACTIVE.
const INACTIVE: u32 = 1;
const ACTIVE: u32 = 2;

fn most(maxnames: i32) -> usize {
    usize::try_from(maxnames).unwrap_or(0)
}

async fn num_of_pools(call: Call, (): ()) -> Answer<ConnectNumOfStoragePoolsRet> {
    let num = count(driver(&call).list(ACTIVE)?.len());
    Ok(ConnectNumOfStoragePoolsRet { num })
}

async fn list_pools(
    call: Call,
    args: ConnectListStoragePoolsArgs,
) -> Answer<ConnectListStoragePoolsRet> {
    let found = driver(&call).list(ACTIVE)?;
    let names = found.iter().map(|pool| pool.name());
    Ok(ConnectListStoragePoolsRet {
        names: names.take(most(args.maxnames)).collect(),
    })
}

async fn num_of_defined(call: Call, (): ()) -> Answer<ConnectNumOfDefinedStoragePoolsRet> {
    let num = count(driver(&call).list(INACTIVE)?.len());
    Ok(ConnectNumOfDefinedStoragePoolsRet { num })
}

async fn list_defined(
    call: Call,
    args: ConnectListDefinedStoragePoolsArgs,
) -> Answer<ConnectListDefinedStoragePoolsRet> {
    let found = driver(&call).list(INACTIVE)?;
    let names = found.iter().map(|pool| pool.name());
    Ok(ConnectListDefinedStoragePoolsRet {
        names: names.take(most(args.maxnames)).collect(),
    })
}

async fn list_all_pools(
    call: Call,
    args: ConnectListAllStoragePoolsArgs,
) -> Answer<ConnectListAllStoragePoolsRet> {
    let found = driver(&call).list(args.flags)?;
    let ret = u32::try_from(found.len()).unwrap_or(u32::MAX);
    let pools = if args.need_results != 0 {
        found.iter().map(|pool| reference(pool)).collect()
    } else {
        Vec::new().into()
    };
    Ok(ConnectListAllStoragePoolsRet { pools, ret })
}

async fn find_sources(
    call: Call,
    args: ConnectFindStoragePoolSourcesArgs,
) -> Answer<ConnectFindStoragePoolSourcesRet> {
    let driver = driver(&call);
    let find = move || driver.find_sources(&args.kind, args.src_spec.as_deref(), args.flags);
    let xml = blocking(find).await??;
    Ok(ConnectFindStoragePoolSourcesRet { xml })
}

async fn get_capabilities(
    _call: Call,
    args: ConnectGetStoragePoolCapabilitiesArgs,
) -> Answer<ConnectGetStoragePoolCapabilitiesRet> {
    check_flags(args.flags, 0, "storageConnectGetStoragePoolCapabilities")?;
    Ok(ConnectGetStoragePoolCapabilitiesRet {
        capabilities: capabilities(),
    })
}

async fn lookup_by_name(
    call: Call,
    args: StoragePoolLookupByNameArgs,
) -> Answer<StoragePoolLookupByNameRet> {
    let pool = reference(&*driver(&call).by_name(&args.name)?);
    Ok(StoragePoolLookupByNameRet { pool })
}

async fn lookup_by_uuid(
    call: Call,
    args: StoragePoolLookupByUuidArgs,
) -> Answer<StoragePoolLookupByUuidRet> {
    let pool = driver(&call).by_uuid(Uuid::from_bytes(args.uuid))?;
    Ok(StoragePoolLookupByUuidRet {
        pool: reference(&pool),
    })
}

async fn lookup_by_volume(
    call: Call,
    args: StoragePoolLookupByVolumeArgs,
) -> Answer<StoragePoolLookupByVolumeRet> {
    let pool = driver(&call).by_name(&args.vol.pool)?;
    Ok(StoragePoolLookupByVolumeRet {
        pool: reference(&pool),
    })
}

async fn lookup_by_target_path(
    call: Call,
    args: StoragePoolLookupByTargetPathArgs,
) -> Answer<StoragePoolLookupByTargetPathRet> {
    let pool = driver(&call).by_target_path(&args.path)?;
    Ok(StoragePoolLookupByTargetPathRet {
        pool: reference(&pool),
    })
}

async fn define_xml(call: Call, args: StoragePoolDefineXmlArgs) -> Answer<StoragePoolDefineXmlRet> {
    let driver = driver(&call);
    let pool = blocking(move || driver.define(&args.xml, args.flags)).await??;
    Ok(StoragePoolDefineXmlRet {
        pool: reference(&pool),
    })
}

async fn create_xml(call: Call, args: StoragePoolCreateXmlArgs) -> Answer<StoragePoolCreateXmlRet> {
    let driver = driver(&call);
    let pool = whole(async move { driver.create(&args.xml, args.flags).await }).await?;
    Ok(StoragePoolCreateXmlRet {
        pool: reference(&pool),
    })
}

async fn create(call: Call, args: StoragePoolCreateArgs) -> Answer<()> {
    let (driver, pool) = (driver(&call), find(&call, &args.pool)?);
    whole(async move { driver.start(&pool, args.flags).await }).await
}

async fn build(call: Call, args: StoragePoolBuildArgs) -> Answer<()> {
    let (driver, pool) = (driver(&call), find(&call, &args.pool)?);
    whole(async move { driver.build(&pool, args.flags).await }).await
}

async fn destroy(call: Call, args: StoragePoolDestroyArgs) -> Answer<()> {
    let (driver, pool) = (driver(&call), find(&call, &args.pool)?);
    whole(async move { driver.destroy(&pool).await }).await
}

async fn delete(call: Call, args: StoragePoolDeleteArgs) -> Answer<()> {
    let (driver, pool) = (driver(&call), find(&call, &args.pool)?);
    whole(async move { driver.delete(&pool, args.flags).await }).await
}

async fn undefine(call: Call, args: StoragePoolUndefineArgs) -> Answer<()> {
    let (driver, pool) = (driver(&call), find(&call, &args.pool)?);
    Ok(blocking(move || driver.undefine(&pool)).await??)
}

async fn refresh(call: Call, args: StoragePoolRefreshArgs) -> Answer<()> {
    let (driver, pool) = (driver(&call), find(&call, &args.pool)?);
    whole(async move { driver.refresh(&pool, args.flags).await }).await
}

async fn get_info(call: Call, args: StoragePoolGetInfoArgs) -> Answer<StoragePoolGetInfoRet> {
    /// VIR_STORAGE_POOL_INACTIVE, VIR_STORAGE_POOL_RUNNING
    const STATES: [u32; 2] = [0, 2];
    let pool = find(&call, &args.pool)?;
    let inner = pool.lock();
    Ok(StoragePoolGetInfoRet {
        state: STATES[usize::from(inner.active)],
        capacity: inner.sizes.capacity,
        allocation: inner.sizes.allocation,
        available: inner.sizes.available,
    })
}

async fn get_xml_desc(
    call: Call,
    args: StoragePoolGetXmlDescArgs,
) -> Answer<StoragePoolGetXmlDescRet> {
    let pool = find(&call, &args.pool)?;
    let xml = driver(&call).xml(&pool, args.flags)?;
    Ok(StoragePoolGetXmlDescRet { xml })
}

async fn get_autostart(
    call: Call,
    args: StoragePoolGetAutostartArgs,
) -> Answer<StoragePoolGetAutostartRet> {
    let pool = find(&call, &args.pool)?;
    let autostart = i32::from(pool.lock().autostart);
    Ok(StoragePoolGetAutostartRet { autostart })
}

async fn set_autostart(call: Call, args: StoragePoolSetAutostartArgs) -> Answer<()> {
    let (driver, pool) = (driver(&call), find(&call, &args.pool)?);
    Ok(blocking(move || driver.set_autostart(&pool, args.autostart != 0)).await??)
}

async fn is_active(call: Call, args: StoragePoolIsActiveArgs) -> Answer<StoragePoolIsActiveRet> {
    let pool = find(&call, &args.pool)?;
    let active = i32::from(pool.lock().active);
    Ok(StoragePoolIsActiveRet { active })
}

async fn is_persistent(
    call: Call,
    args: StoragePoolIsPersistentArgs,
) -> Answer<StoragePoolIsPersistentRet> {
    let pool = find(&call, &args.pool)?;
    let persistent = i32::from(pool.lock().persistent);
    Ok(StoragePoolIsPersistentRet { persistent })
}

async fn num_of_volumes(
    call: Call,
    args: StoragePoolNumOfVolumesArgs,
) -> Answer<StoragePoolNumOfVolumesRet> {
    let pool = find(&call, &args.pool)?;
    let num = count(driver(&call).volumes(&pool).await?.len());
    Ok(StoragePoolNumOfVolumesRet { num })
}

async fn list_volumes(
    call: Call,
    args: StoragePoolListVolumesArgs,
) -> Answer<StoragePoolListVolumesRet> {
    let pool = find(&call, &args.pool)?;
    let volumes = driver(&call).volumes(&pool).await?;
    let names = volumes.into_iter().map(|volume| volume.name);
    Ok(StoragePoolListVolumesRet {
        names: names.take(most(args.maxnames)).collect(),
    })
}

async fn list_all_volumes(
    call: Call,
    args: StoragePoolListAllVolumesArgs,
) -> Answer<StoragePoolListAllVolumesRet> {
    check_flags(args.flags, 0, "storagePoolListAllVolumes")?;
    let pool = find(&call, &args.pool)?;
    let volumes = driver(&call).volumes(&pool).await?;
    let ret = u32::try_from(volumes.len()).unwrap_or(u32::MAX);
    let vols = if args.need_results != 0 {
        volumes.into_iter().map(vol_reference).collect()
    } else {
        Vec::new().into()
    };
    Ok(StoragePoolListAllVolumesRet { vols, ret })
}

async fn vol_lookup_by_name(
    call: Call,
    args: StorageVolLookupByNameArgs,
) -> Answer<StorageVolLookupByNameRet> {
    let pool = find(&call, &args.pool)?;
    let volume = driver(&call).volume_by_name(&pool, &args.name).await?;
    Ok(StorageVolLookupByNameRet {
        vol: vol_reference(volume),
    })
}

async fn vol_lookup_by_key(
    call: Call,
    args: StorageVolLookupByKeyArgs,
) -> Answer<StorageVolLookupByKeyRet> {
    let volume = driver(&call).volume_by_key(&args.key).await?;
    Ok(StorageVolLookupByKeyRet {
        vol: vol_reference(volume),
    })
}

async fn vol_lookup_by_path(
    call: Call,
    args: StorageVolLookupByPathArgs,
) -> Answer<StorageVolLookupByPathRet> {
    let volume = driver(&call).volume_by_path(&args.path).await?;
    Ok(StorageVolLookupByPathRet {
        vol: vol_reference(volume),
    })
}

async fn vol_create_xml(
    call: Call,
    args: StorageVolCreateXmlArgs,
) -> Answer<StorageVolCreateXmlRet> {
    let (driver, pool) = (driver(&call), find(&call, &args.pool)?);
    let volume =
        whole(async move { driver.create_volume(&pool, &args.xml, args.flags).await }).await?;
    Ok(StorageVolCreateXmlRet {
        vol: vol_reference(volume),
    })
}

async fn vol_create_xml_from(
    call: Call,
    args: StorageVolCreateXmlFromArgs,
) -> Answer<StorageVolCreateXmlFromRet> {
    let (driver, pool) = (driver(&call), find(&call, &args.pool)?);
    let volume = whole(async move {
        let from = driver.pool_of(&args.clonevol.pool).await?;
        driver
            .clone_volume(&pool, &args.xml, &from, &args.clonevol.name, args.flags)
            .await
    })
    .await?;
    Ok(StorageVolCreateXmlFromRet {
        vol: vol_reference(volume),
    })
}

async fn vol_delete(call: Call, args: StorageVolDeleteArgs) -> Answer<()> {
    let driver = driver(&call);
    whole(async move {
        driver
            .delete_volume(&args.vol.pool, &args.vol.name, args.flags)
            .await
    })
    .await
}

async fn wipe(call: Call, vol: types::StorageVol, algorithm: u32, flags: u32) -> Answer<()> {
    let driver = driver(&call);
    whole(async move {
        driver
            .wipe_volume(&vol.pool, &vol.name, algorithm, flags)
            .await
    })
    .await
}

async fn vol_wipe(call: Call, args: StorageVolWipeArgs) -> Answer<()> {
    /// VIR_STORAGE_VOL_WIPE_ALG_ZERO
    const ZERO: u32 = 0;
    wipe(call, args.vol, ZERO, args.flags).await
}

async fn vol_wipe_pattern(call: Call, args: StorageVolWipePatternArgs) -> Answer<()> {
    wipe(call, args.vol, args.algorithm, args.flags).await
}

async fn vol_resize(call: Call, args: StorageVolResizeArgs) -> Answer<()> {
    let driver = driver(&call);
    whole(async move {
        driver
            .resize_volume(&args.vol.pool, &args.vol.name, args.capacity, args.flags)
            .await
    })
    .await
}

async fn info(call: &Call, vol: &types::StorageVol, flags: u32) -> Answer<Info> {
    let driver = driver(call);
    Ok(driver.volume_info(&vol.pool, &vol.name, flags).await?)
}

async fn vol_get_info(call: Call, args: StorageVolGetInfoArgs) -> Answer<StorageVolGetInfoRet> {
    let info = info(&call, &args.vol, 0).await?;
    Ok(StorageVolGetInfoRet {
        kind: info.kind,
        capacity: info.capacity,
        allocation: info.allocation,
    })
}

async fn vol_get_info_flags(
    call: Call,
    args: StorageVolGetInfoFlagsArgs,
) -> Answer<StorageVolGetInfoFlagsRet> {
    let info = info(&call, &args.vol, args.flags).await?;
    Ok(StorageVolGetInfoFlagsRet {
        kind: info.kind,
        capacity: info.capacity,
        allocation: info.allocation,
    })
}

async fn vol_get_xml_desc(
    call: Call,
    args: StorageVolGetXmlDescArgs,
) -> Answer<StorageVolGetXmlDescRet> {
    let driver = driver(&call);
    let xml = driver
        .volume_xml(&args.vol.pool, &args.vol.name, args.flags)
        .await?;
    Ok(StorageVolGetXmlDescRet { xml })
}

async fn vol_get_path(call: Call, args: StorageVolGetPathArgs) -> Answer<StorageVolGetPathRet> {
    let name = driver(&call)
        .volume_path(&args.vol.pool, &args.vol.name)
        .await?;
    Ok(StorageVolGetPathRet { name })
}

async fn vol_upload(call: Call, args: StorageVolUploadArgs, stream: Stream) -> Answer<()> {
    let volume = (args.vol.pool.as_str(), args.vol.name.as_str());
    let part = (args.offset, args.length);
    Ok(driver(&call)
        .upload(volume, part, args.flags, stream)
        .await?)
}

async fn vol_download(call: Call, args: StorageVolDownloadArgs, stream: Stream) -> Answer<()> {
    let volume = (args.vol.pool.as_str(), args.vol.name.as_str());
    let part = (args.offset, args.length);
    Ok(driver(&call)
        .download(volume, part, args.flags, stream)
        .await?)
}
