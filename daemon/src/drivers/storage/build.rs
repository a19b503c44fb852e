//! Making and removing a pool's place: its folder, a file system.

use std::sync::Arc;

use super::object::Pool;
use super::{Driver, error, folder, mount};
use crate::error::{ErrorCode, Result, check_flags};
use crate::events::PoolEvent;

/// virStoragePoolBuildFlags.
pub mod build_flags {
    /// Makes a file system, whatever is there.
    pub const OVERWRITE: u32 = 8;
    /// Makes a file system if nothing is there.
    pub const NO_OVERWRITE: u32 = 4;
}

use build_flags::{NO_OVERWRITE, OVERWRITE};

impl Driver {
    /// Builds a pool that is not active.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for an active one; the system's.
    pub async fn build(&self, pool: &Arc<Pool>, flags: u32) -> Result<()> {
        pool.lock().check_inactive("already")?;
        let _job = pool.job().await?;
        pool.lock().check_inactive("already")?;
        build(pool, flags).await?;
        self.emit(pool, PoolEvent::Created);
        Ok(())
    }

    /// Removes a pool's folder, which must be empty.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for an active pool; the system's.
    pub async fn delete(&self, pool: &Arc<Pool>, flags: u32) -> Result<()> {
        pool.lock().check_inactive("still")?;
        let _job = pool.job().await?;
        let definition = {
            let inner = pool.lock();
            inner.check_inactive("still")?;
            inner.check_idle()?;
            Arc::clone(&inner.definition)
        };
        check_flags(flags, 0, "virStorageBackendDeleteLocal")?;
        pool.run(move || folder::remove(&definition.path)).await?;
        self.emit(pool, PoolEvent::Deleted);
        Ok(())
    }
}

/// The work of `build`, for a caller that has the pool's job.
pub(super) async fn build(pool: &Arc<Pool>, flags: u32) -> Result<()> {
    check_flags(
        flags,
        OVERWRITE | NO_OVERWRITE,
        "virStorageBackendFileSystemBuild",
    )?;
    if flags & OVERWRITE != 0 && flags & NO_OVERWRITE != 0 {
        return Err(error(
            ErrorCode::INVALID_ARG,
            "Flags 'VIR_STORAGE_POOL_BUILD_OVERWRITE' and 'VIR_STORAGE_POOL_BUILD_NO_OVERWRITE' are mutually exclusive",
        ));
    }
    let definition = Arc::clone(&pool.lock().definition);
    pool.run(move || {
        folder::build(&definition.path, &definition.permissions)?;
        if flags & (OVERWRITE | NO_OVERWRITE) != 0 {
            mount::format(&definition, flags & OVERWRITE != 0)?;
        }
        Ok(())
    })
    .await
}
