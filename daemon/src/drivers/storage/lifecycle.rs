//! Starting, stopping and refreshing pools.

use std::collections::BTreeMap;
use std::sync::Arc;

use xml_schemas::Validation;
use xml_schemas::pool;

use super::build::{build, build_flags};
use super::object::{Entry, Inner, Pool};
use super::{Driver, check_new, error, folder, mount, system};
use crate::error::{ErrorCode, Result, check_flags};
use crate::events::PoolEvent;
use crate::files::{self, Durability};

/// virStoragePoolCreateFlags.
mod create_flags {
    pub const WITH_BUILD: u32 = 1;
    pub const WITH_BUILD_OVERWRITE: u32 = 2;
    pub const WITH_BUILD_NO_OVERWRITE: u32 = 4;
}

impl Driver {
    /// Starts a pool.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for an active one; the system's. A pool that was mounted for it
    /// is unmounted then.
    pub async fn start(&self, pool: &Arc<Pool>, flags: u32) -> Result<()> {
        let build_with = build_choice(flags)?;
        let _starting = pool.begin_start()?;
        let _job = pool.job().await?;
        self.activate(pool, build_with).await
    }

    /// Defines a pool that has no file, and starts it. Nothing of it is left if that fails.
    ///
    /// # Errors
    /// As for define and start.
    pub async fn create(&self, xml: &str, flags: u32) -> Result<Arc<Pool>> {
        let build_with = build_choice(flags)?;
        let new = Arc::new(pool::Pool::parse(xml, Validation::Lenient)?);
        let (pool, starting) = {
            let mut pools = self.pools();
            match check_new(&pools, &new, true)? {
                Some(known) => {
                    let starting = known.begin_start()?;
                    // As it is defined, but this once with what was given.
                    let mut inner = known.lock();
                    if inner.next_definition.is_none() {
                        inner.next_definition = Some(Arc::clone(&inner.definition));
                    }
                    inner.definition = Arc::clone(&new);
                    drop(inner);
                    (known, starting)
                }
                None => {
                    let pool = Pool::new(Inner::new(Arc::clone(&new), false));
                    pools.push(Arc::clone(&pool));
                    let starting = pool.begin_start()?;
                    (pool, starting)
                }
            }
        };
        let started = match pool.job().await {
            Ok(_job) => self.activate(&pool, build_with).await,
            Err(error) => Err(error),
        };
        drop(starting);
        if let Err(error) = started {
            self.settle(&pool);
            return Err(error);
        }
        Ok(pool)
    }

    /// An inactive pool becomes what its definition is; one without goes.
    fn settle(&self, pool: &Arc<Pool>) {
        let mut pools = self.pools();
        let mut inner = pool.lock();
        if inner.active {
            return;
        }
        if let Some(next) = inner.next_definition.take() {
            inner.definition = next;
        }
        inner.volumes = BTreeMap::new();
        if !inner.persistent {
            drop(inner);
            pools.retain(|p| !Arc::ptr_eq(p, pool));
        }
    }

    async fn activate(&self, pool: &Arc<Pool>, build_with: Option<u32>) -> Result<()> {
        if let Some(flags) = build_with {
            build(pool, flags).await?;
        }
        let definition = Arc::clone(&pool.lock().definition);
        let backend = Arc::clone(&definition);
        let scan = pool
            .run(move || {
                let was_mounted = mount::is_mounted(&backend)?;
                mount::mount(&backend)?;
                folder::scan(&backend.path).inspect_err(|_| {
                    if !was_mounted && let Err(error) = mount::unmount(&backend) {
                        log::error!("pool '{}': {error}", backend.name);
                    }
                })
            })
            .await?;
        self.write_state(&definition)?;
        {
            let mut inner = pool.lock();
            inner.active = true;
            take(&mut inner, scan);
        }
        self.emit(pool, PoolEvent::Started);
        Ok(())
    }

    /// Stops a pool; a transient one is gone then.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for an inactive one, VIR_ERR_INTERNAL_ERROR while volumes are
    /// made in it; the system's.
    pub async fn destroy(&self, pool: &Arc<Pool>) -> Result<()> {
        // Not after a wait for a start that hangs.
        pool.lock().check_active()?;
        let _job = pool.job().await?;
        let definition = {
            let inner = pool.lock();
            inner.check_active()?;
            inner.check_idle()?;
            Arc::clone(&inner.definition)
        };
        let backend = Arc::clone(&definition);
        // A folder needs nothing done, and so nothing that could hang.
        if definition.kind != pool::PoolType::Dir {
            pool.run(move || mount::unmount(&backend)).await?;
        }
        self.deactivate(pool, &definition)
    }

    fn deactivate(&self, pool: &Arc<Pool>, definition: &pool::Pool) -> Result<()> {
        let file = self.state_file(&definition.name);
        files::remove_if_there(&file)
            .map_err(|e| system(format!("cannot remove {}", file.display()), &e))?;
        pool.lock().active = false;
        self.emit(pool, PoolEvent::Stopped);
        self.settle(pool);
        Ok(())
    }

    /// Looks at a pool's volumes anew. A pool that cannot be looked at is stopped, as in libvirt.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for an inactive one; the system's.
    pub async fn refresh(&self, pool: &Arc<Pool>, flags: u32) -> Result<()> {
        check_flags(flags, 0, "storagePoolRefresh")?;
        pool.lock().check_active()?;
        let _job = pool.job().await?;
        let definition = {
            let inner = pool.lock();
            inner.check_active()?;
            inner.check_idle()?;
            Arc::clone(&inner.definition)
        };
        let backend = Arc::clone(&definition);
        let scanned = pool
            .run(move || {
                if !mount::is_mounted(&backend)? {
                    return Err(error(
                        ErrorCode::OPERATION_INVALID,
                        format!("the file system of pool '{}' is not mounted", backend.name),
                    ));
                }
                folder::scan(&backend.path)
            })
            .await;
        match scanned {
            Ok(scan) => {
                let mut inner = pool.lock();
                take(&mut inner, scan);
                drop(inner);
                pool.set_loaded(true);
                self.emit(pool, PoolEvent::Refreshed);
                Ok(())
            }
            Err(error) if error.code == ErrorCode::OPERATION_TIMEOUT => Err(error),
            Err(error) => {
                pool.set_loaded(true);
                log::error!("pool '{}' is stopped: {error}", definition.name);
                self.deactivate(pool, &definition)?;
                Err(error)
            }
        }
    }

    /// Where the next daemon reads that a pool is active.
    pub(super) fn state_file(&self, name: &str) -> std::path::PathBuf {
        self.live.join(format!("{name}.xml"))
    }

    fn write_state(&self, definition: &pool::Pool) -> Result<()> {
        let file = self.state_file(&definition.name);
        let text = definition.format(pool::Sizes::default());
        files::write_atomically(&file, text.as_bytes(), Durability::Process)
            .map_err(|e| system(format!("cannot write {}", file.display()), &e))
    }
}

/// What a look at the folder found, with what was known and can't be seen there.
fn take(inner: &mut Inner, scan: folder::Scan) {
    let mut definition = (*inner.definition).clone();
    definition.permissions = scan.permissions;
    inner.definition = Arc::new(definition);
    inner.sizes = scan.sizes;
    let mut before = std::mem::take(&mut inner.volumes);
    inner.volumes = scan
        .volumes
        .into_iter()
        .map(|(name, volume)| {
            let mut entry = Entry::new(volume);
            if let Some(old) = before.remove(&name) {
                entry.in_use = old.in_use;
                entry.building = old.building;
            }
            (name, entry)
        })
        .collect();
    // What is being made can't be seen yet.
    let unseen = before.into_iter().filter(|(_, entry)| entry.building);
    inner.volumes.extend(unseen);
}

/// How a pool is to be built before it starts, if it is.
fn build_choice(flags: u32) -> Result<Option<u32>> {
    use create_flags::{WITH_BUILD, WITH_BUILD_NO_OVERWRITE, WITH_BUILD_OVERWRITE};
    check_flags(
        flags,
        WITH_BUILD | WITH_BUILD_OVERWRITE | WITH_BUILD_NO_OVERWRITE,
        "storagePoolCreate",
    )?;
    let (over, no) = (
        flags & WITH_BUILD_OVERWRITE,
        flags & WITH_BUILD_NO_OVERWRITE,
    );
    if over != 0 && no != 0 {
        return Err(error(
            ErrorCode::INVALID_ARG,
            "Flags 'VIR_STORAGE_POOL_CREATE_WITH_BUILD_OVERWRITE' and \
             'VIR_STORAGE_POOL_CREATE_WITH_BUILD_NO_OVERWRITE' are mutually exclusive",
        ));
    }
    Ok(if over != 0 {
        Some(build_flags::OVERWRITE)
    } else if no != 0 {
        Some(build_flags::NO_OVERWRITE)
    } else if flags & WITH_BUILD != 0 {
        Some(0)
    } else {
        None
    })
}
