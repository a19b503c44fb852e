//! The storage driver: pools are folders (of the host, or of a file system mounted for them),
//! volumes are the files in them.
//!
//! What touches a pool's files runs on blocking threads and outside every lock that another pool
//! needs, at most [`object::THREADS`] at a time for one pool: a file system that does not answer
//! holds up nobody but who asked for it. What is known of a pool and its volumes is in memory.

mod build;
mod command;
mod copy;
mod create;
mod folder;
mod lifecycle;
mod load;
mod mount;
pub mod object;
pub mod probe;
mod transfer;
pub mod volume;
mod wipe;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use xml_schemas::pool::{self, PoolType};
use xml_schemas::{ErrorCode as XmlErrorCode, Validation};

use self::object::{Inner, Pool};
use crate::drivers::secret;
use crate::error::{Error, ErrorCode, ErrorDomain, Result, check_flags, plain};
use crate::events::{Hub, PoolEvent};
use crate::files;
use crate::roots::Roots;
use crate::store::Store;

pub use folder::open as open_to_look;
pub use load::{autostart, load};

/// Filters of lists (virConnectListAllStoragePoolsFlags).
mod list_flags {
    pub const INACTIVE: u32 = 1;
    pub const ACTIVE: u32 = 2;
    pub const PERSISTENT: u32 = 4;
    pub const TRANSIENT: u32 = 8;
    pub const AUTOSTART: u32 = 16;
    pub const NO_AUTOSTART: u32 = 32;
    /// Bits of virStoragePoolType begin here.
    pub const TYPES: u32 = 6;
    /// What there is of them, vstorage included.
    pub const ALL: u32 = 0x000f_ffff;
}

/// VIR_STORAGE_XML_INACTIVE
const XML_INACTIVE: u32 = 1;

/// Everything about pools.
pub struct Driver {
    store: Store,
    /// One file for each active pool.
    live: PathBuf,
    boot_id: String,
    pools: Mutex<Vec<Arc<Pool>>>,
    secrets: Arc<secret::Driver>,
    hub: Arc<Hub>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Driver({})", self.live.display())
    }
}

/// An error of this driver.
pub(crate) fn error(code: ErrorCode, detail: impl Into<String>) -> Error {
    Error::of(ErrorDomain::STORAGE, code, detail)
}

/// VIR_ERR_SYSTEM_ERROR of this driver.
pub(crate) fn system(what: impl fmt::Display, cause: &io::Error) -> Error {
    error(ErrorCode::SYSTEM_ERROR, format!("{what}: {}", plain(cause)))
}

/// What images say went wrong.
pub(crate) fn image_error(cause: images::Error) -> Error {
    match cause {
        images::Error::Io { what, source } => system(what, &source),
        images::Error::Unsupported { .. } => {
            error(ErrorCode::CONFIG_UNSUPPORTED, cause.to_string())
        }
        images::Error::Locked { .. } => error(ErrorCode::OPERATION_INVALID, cause.to_string()),
        other => error(ErrorCode::OPERATION_FAILED, other.to_string()),
    }
}

fn no_pool(detail: String) -> Error {
    error(ErrorCode::NO_STORAGE_POOL, detail)
}

impl Driver {
    /// A driver without pools yet; see [`load()`].
    ///
    /// # Errors
    /// The store cannot be opened.
    pub fn new(
        roots: &Roots,
        boot_id: String,
        secrets: Arc<secret::Driver>,
        hub: Arc<Hub>,
    ) -> io::Result<Self> {
        let store = Store::open(roots.storage(), &boot_id)?;
        let live = roots.live_storage();
        files::make_folder(&live, 0o700)?;
        files::remove_leftovers(&live)?;
        Ok(Self {
            store,
            live,
            boot_id,
            pools: Mutex::default(),
            secrets,
            hub,
        })
    }

    /// All pools. Short: nothing is waited for under this lock but a definition's file.
    fn pools(&self) -> MutexGuard<'_, Vec<Arc<Pool>>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pools as they are now, by name.
    pub fn all(&self) -> Vec<Arc<Pool>> {
        let mut all = self.pools().clone();
        all.sort_by_cached_key(|pool| pool.name());
        all
    }

    /// The pool with that name.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_POOL.
    pub fn by_name(&self, name: &str) -> Result<Arc<Pool>> {
        let found = self.pools().iter().find(|p| p.name() == name).cloned();
        found.ok_or_else(|| no_pool(format!("no storage pool with matching name '{name}'")))
    }

    /// The pool with that uuid.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_POOL.
    pub fn by_uuid(&self, uuid: Uuid) -> Result<Arc<Pool>> {
        self.lookup(uuid)
            .ok_or_else(|| no_pool(format!("no storage pool with matching uuid '{uuid}'")))
    }

    /// The pool a client means, which it names by uuid.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_POOL.
    pub fn find(&self, name: &str, uuid: Uuid) -> Result<Arc<Pool>> {
        self.lookup(uuid).ok_or_else(|| {
            no_pool(format!(
                "no storage pool with matching uuid '{uuid}' ({name})"
            ))
        })
    }

    fn lookup(&self, uuid: Uuid) -> Option<Arc<Pool>> {
        self.pools().iter().find(|p| p.uuid == uuid).cloned()
    }

    /// The active pool whose volumes are in that folder.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_POOL.
    pub fn by_target_path(&self, path: &str) -> Result<Arc<Pool>> {
        let clean = pool::clean_path(path);
        let found = self
            .pools()
            .iter()
            .find(|p| {
                let inner = p.lock();
                inner.active && inner.definition.path == clean
            })
            .cloned();
        found.ok_or_else(|| {
            no_pool(format!(
                "no storage pool with matching target path '{path}'"
            ))
        })
    }

    /// All that pass the filters, by name.
    ///
    /// # Errors
    /// Unknown flags.
    pub fn list(&self, flags: u32) -> Result<Vec<Arc<Pool>>> {
        use list_flags::*;
        check_flags(flags, ALL, "storageConnectListAllStoragePools")?;
        let passes = |yes: u32, no: u32, holds: bool| {
            flags & (yes | no) == 0 || flags & if holds { yes } else { no } != 0
        };
        let types = flags >> TYPES;
        let mut all = self.all();
        all.retain(|pool| {
            let inner = pool.lock();
            passes(ACTIVE, INACTIVE, inner.active)
                && passes(PERSISTENT, TRANSIENT, inner.persistent)
                && passes(AUTOSTART, NO_AUTOSTART, inner.autostart)
                && (types == 0 || types & (1 << (inner.definition.kind as u32)) != 0)
        });
        Ok(all)
    }

    /// Defines a pool, or defines it anew; what is active goes on as it is until it is stopped.
    ///
    /// # Errors
    /// A bad document; another pool has that name, uuid or source; the disk.
    pub fn define(&self, xml: &str, flags: u32) -> Result<Arc<Pool>> {
        /// VIR_STORAGE_POOL_DEFINE_VALIDATE
        const VALIDATE: u32 = 1;
        check_flags(flags, VALIDATE, "storagePoolDefineXML")?;
        let new = Arc::new(pool::Pool::parse(xml, validation(flags & VALIDATE != 0))?);
        let mut pools = self.pools();
        let known = check_new(&pools, &new, false)?;
        let text = new.format(pool::Sizes::default());
        self.store.save(&new.name, &text).map_err(|e| {
            system(
                format!("cannot write the definition of pool '{}'", new.name),
                &e,
            )
        })?;
        let pool = match known {
            Some(pool) => {
                let mut inner = pool.lock();
                inner.persistent = true;
                if inner.active || inner.starting {
                    inner.next_definition = Some(new);
                } else {
                    inner.definition = new;
                }
                drop(inner);
                pool
            }
            None => {
                let pool = Pool::new(Inner::new(new, true));
                pools.push(Arc::clone(&pool));
                pool
            }
        };
        drop(pools);
        self.emit(&pool, PoolEvent::Defined);
        Ok(pool)
    }

    /// Removes a definition.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for an active pool; the disk.
    pub fn undefine(&self, pool: &Arc<Pool>) -> Result<()> {
        let mut pools = self.pools();
        let mut inner = pool.lock();
        inner.check_inactive("still")?;
        inner.check_idle()?;
        if inner.persistent {
            self.store.remove(&inner.definition.name).map_err(|e| {
                let name = &inner.definition.name;
                system(format!("cannot remove the definition of pool '{name}'"), &e)
            })?;
        }
        inner.persistent = false;
        inner.autostart = false;
        drop(inner);
        pools.retain(|p| p.uuid != pool.uuid);
        drop(pools);
        self.emit(pool, PoolEvent::Undefined);
        Ok(())
    }

    /// Whether a pool is started with the host.
    ///
    /// # Errors
    /// VIR_ERR_INTERNAL_ERROR for a pool without a definition; the disk.
    pub fn set_autostart(&self, pool: &Pool, on: bool) -> Result<()> {
        let mut inner = pool.lock();
        if !inner.persistent {
            return Err(error(ErrorCode::INTERNAL_ERROR, "pool has no config file"));
        }
        self.store
            .set_autostart(&inner.definition.name, on)
            .map_err(|e| {
                let name = &inner.definition.name;
                system(format!("cannot set autostart of pool '{name}'"), &e)
            })?;
        inner.autostart = on;
        Ok(())
    }

    /// A pool's document.
    ///
    /// # Errors
    /// Unknown flags.
    pub fn xml(&self, pool: &Pool, flags: u32) -> Result<String> {
        check_flags(flags, XML_INACTIVE, "storagePoolGetXMLDesc")?;
        let inner = pool.lock();
        let shown = match &inner.next_definition {
            Some(next) if flags & XML_INACTIVE != 0 => next,
            _ => &inner.definition,
        };
        Ok(shown.format(inner.sizes))
    }

    /// What a server offers for pools.
    ///
    /// # Errors
    /// VIR_ERR_NO_SUPPORT for types that have no way to tell; VIR_ERR_OPERATION_FAILED if there
    /// is nothing.
    pub fn find_sources(&self, kind: &str, spec: Option<&str>, flags: u32) -> Result<String> {
        check_flags(flags, 0, "storageConnectFindStoragePoolSources")?;
        let kind = PoolType::from_name(kind).map_err(|error| match error.code() {
            XmlErrorCode::Xml => Error::internal(format!("unknown storage pool type {kind}")),
            _ => error.into(),
        })?;
        if kind != PoolType::Netfs {
            return Err(error(
                ErrorCode::NO_SUPPORT,
                format!(
                    "pool type '{}' does not support source discovery",
                    kind.name()
                ),
            ));
        }
        let source = match spec {
            Some(spec) => pool::Source::parse(spec, kind)?,
            None => pool::Source::default(),
        };
        let [host] = source.hosts.as_slice() else {
            return Err(error(
                ErrorCode::INVALID_ARG,
                "hostname must be specified for netfs sources",
            ));
        };
        let found = mount::exports(host)?;
        if found.is_empty() {
            return Err(error(
                ErrorCode::OPERATION_FAILED,
                format!("no storage pools were found on host '{}'", host.name),
            ));
        }
        Ok(pool::sources(&found, kind))
    }

    fn emit(&self, pool: &Pool, event: PoolEvent) {
        self.hub.pool(&pool.name(), pool.uuid, event);
    }
}

fn validation(strict: bool) -> Validation {
    if strict {
        Validation::Strict
    } else {
        Validation::Lenient
    }
}

/// Whether a definition can be taken beside the others; the pool that it redefines, if any.
fn check_new(pools: &[Arc<Pool>], new: &pool::Pool, to_start: bool) -> Result<Option<Arc<Pool>>> {
    let failed = |detail: String| Err(error(ErrorCode::OPERATION_FAILED, detail));
    let mut known = None;
    for pool in pools {
        let inner = pool.lock();
        let old = &inner.definition;
        if pool.uuid == new.uuid {
            if old.name != new.name {
                return failed(format!(
                    "pool '{}' is already defined with uuid {}",
                    old.name, pool.uuid
                ));
            }
            if to_start && inner.active {
                return Err(error(
                    ErrorCode::OPERATION_INVALID,
                    format!("pool is already active as '{}'", old.name),
                ));
            }
            known = Some(Arc::clone(pool));
        } else if old.name == new.name {
            return failed(format!(
                "pool '{}' already exists with uuid {}",
                old.name, pool.uuid
            ));
        }
    }
    for pool in pools.iter().filter(|p| p.uuid != new.uuid) {
        let inner = pool.lock();
        if same_source(&inner.definition, new) {
            return failed(format!(
                "Storage source conflict with pool: '{}'",
                inner.definition.name
            ));
        }
    }
    Ok(known)
}

fn same_source(one: &pool::Pool, other: &pool::Pool) -> bool {
    one.kind == other.kind
        && match one.kind {
            PoolType::Dir => one.path == other.path,
            PoolType::Fs => one.source.devices == other.source.devices,
            PoolType::Netfs => {
                one.source.dir == other.source.dir && one.source.hosts == other.source.hosts
            }
        }
}
