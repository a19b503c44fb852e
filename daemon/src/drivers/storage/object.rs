//! A pool in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, Semaphore, watch};
use uuid::Uuid;
use xml_schemas::pool::{self, Sizes};
use xml_schemas::volume::Volume;

use super::error;
use crate::drivers::domain::blocking;
use crate::error::{ErrorCode, Result};

/// Threads that may be busy with one pool's files at a time.
pub const THREADS: usize = 8;
/// How long a call waits for others that are busy with the same pool.
const PATIENCE: Duration = Duration::from_secs(30);

/// A pool.
#[derive(Debug)]
pub struct Pool {
    /// Its uuid, which never changes.
    pub uuid: Uuid,
    inner: Mutex<Inner>,
    /// Held by what starts, stops, builds or refreshes the pool.
    job: Arc<tokio::sync::Mutex<()>>,
    threads: Arc<Semaphore>,
    /// Whether its volumes are known: not yet when the daemon has just found it active.
    loaded: watch::Sender<bool>,
}

/// What is known of a pool.
#[derive(Debug)]
pub struct Inner {
    /// As it is now.
    pub definition: Arc<pool::Pool>,
    /// As it will be when it is started the next time.
    pub next_definition: Option<Arc<pool::Pool>>,
    /// There is a file with its definition.
    pub persistent: bool,
    /// It is started with the host.
    pub autostart: bool,
    /// Its volumes can be used.
    pub active: bool,
    /// It is being started, which may take as long as a server takes to answer.
    pub starting: bool,
    /// Of its file system.
    pub sizes: Sizes,
    /// By name.
    pub volumes: BTreeMap<String, Entry>,
    /// Volumes being made or removed: the pool cannot go meanwhile.
    pub jobs: u32,
}

/// A volume in its pool.
#[derive(Debug, Clone, Default)]
pub struct Entry {
    /// As it was when it was last looked at.
    pub volume: Volume,
    /// It is being made.
    pub building: bool,
    /// How many calls read or write it.
    pub in_use: u32,
}

impl Entry {
    /// A volume that nobody uses.
    pub fn new(volume: Volume) -> Self {
        Self {
            volume,
            ..Self::default()
        }
    }

    /// Whether it can be changed or removed.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID.
    pub fn check_free(&self) -> Result<()> {
        self.check_built()?;
        if self.in_use > 0 {
            return Err(error(
                ErrorCode::OPERATION_INVALID,
                format!("volume '{}' is still in use.", self.volume.name),
            ));
        }
        Ok(())
    }

    /// Whether it is whole.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID.
    pub fn check_built(&self) -> Result<()> {
        if self.building {
            return Err(error(
                ErrorCode::OPERATION_INVALID,
                format!("volume '{}' is still being allocated.", self.volume.name),
            ));
        }
        Ok(())
    }
}

impl Inner {
    /// An inactive pool.
    pub fn new(definition: Arc<pool::Pool>, persistent: bool) -> Self {
        Self {
            definition,
            next_definition: None,
            persistent,
            autostart: false,
            active: false,
            starting: false,
            sizes: Sizes::default(),
            volumes: BTreeMap::new(),
            jobs: 0,
        }
    }

    /// # Errors
    /// VIR_ERR_OPERATION_INVALID.
    pub fn check_active(&self) -> Result<()> {
        if self.active {
            return Ok(());
        }
        self.check_settled()?;
        Err(error(
            ErrorCode::OPERATION_INVALID,
            format!("storage pool '{}' is not active", self.definition.name),
        ))
    }

    /// # Errors
    /// VIR_ERR_OPERATION_INVALID: it is `still` or `already` active.
    pub fn check_inactive(&self, word: &str) -> Result<()> {
        if !self.active {
            return self.check_settled();
        }
        Err(error(
            ErrorCode::OPERATION_INVALID,
            format!("storage pool '{}' is {word} active", self.definition.name),
        ))
    }

    /// # Errors
    /// VIR_ERR_OPERATION_INVALID: it is being started.
    fn check_settled(&self) -> Result<()> {
        if !self.starting {
            return Ok(());
        }
        Err(error(
            ErrorCode::OPERATION_INVALID,
            format!("pool '{}' is starting up", self.definition.name),
        ))
    }

    /// # Errors
    /// VIR_ERR_INTERNAL_ERROR, as libvirt has it.
    pub fn check_idle(&self) -> Result<()> {
        if self.jobs == 0 {
            return Ok(());
        }
        Err(error(
            ErrorCode::INTERNAL_ERROR,
            format!(
                "pool '{}' has asynchronous jobs running.",
                self.definition.name
            ),
        ))
    }

    /// The volume of that name.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_VOL.
    pub fn volume(&self, name: &str) -> Result<&Entry> {
        self.volumes.get(name).ok_or_else(|| no_volume(name))
    }

    /// The same, to be changed.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_VOL.
    pub fn volume_mut(&mut self, name: &str) -> Result<&mut Entry> {
        self.volumes.get_mut(name).ok_or_else(|| no_volume(name))
    }

    /// Space that a volume takes, or gives back where it is negative.
    pub fn account(&mut self, before: Option<u64>, after: Option<u64>) {
        let (before, after) = (before.unwrap_or(0), after.unwrap_or(0));
        let sizes = &mut self.sizes;
        sizes.allocation = (sizes.allocation + after).saturating_sub(before);
        sizes.available = (sizes.available + before).saturating_sub(after);
    }
}

fn no_volume(name: &str) -> crate::error::Error {
    error(
        ErrorCode::NO_STORAGE_VOL,
        format!("no storage vol with matching name '{name}'"),
    )
}

/// Keeps others from starting, stopping or refreshing the pool.
pub type Job = OwnedMutexGuard<()>;

/// A pool is being started as long as this is there.
#[derive(Debug)]
pub struct Starting(Arc<Pool>);

impl Drop for Starting {
    fn drop(&mut self) {
        self.0.lock().starting = false;
    }
}

impl Pool {
    /// A pool whose volumes are known.
    pub fn new(inner: Inner) -> Arc<Self> {
        Arc::new(Self {
            uuid: inner.definition.uuid,
            inner: Mutex::new(inner),
            job: Arc::default(),
            threads: Arc::new(Semaphore::new(THREADS)),
            loaded: watch::Sender::new(true),
        })
    }

    /// What is known of it. Nothing is waited for under this lock.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.lock().definition.name.clone()
    }

    /// Whether its volumes are known yet.
    pub fn set_loaded(&self, loaded: bool) {
        self.loaded.send_replace(loaded);
    }

    /// Waits until its volumes are known.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_TIMEOUT.
    pub async fn loaded(&self) -> Result<()> {
        let mut loaded = self.loaded.subscribe();
        let waited = tokio::time::timeout(PATIENCE, loaded.wait_for(|loaded| *loaded)).await;
        match waited {
            Ok(_) => Ok(()),
            Err(_) => Err(self.busy()),
        }
    }

    fn busy(&self) -> crate::error::Error {
        error(
            ErrorCode::OPERATION_TIMEOUT,
            format!(
                "pool '{}' is busy with other calls, or its file system does not answer",
                self.name()
            ),
        )
    }

    /// Waits for its turn to change the pool as a whole.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_TIMEOUT.
    pub async fn job(&self) -> Result<Job> {
        let waiting = Arc::clone(&self.job).lock_owned();
        tokio::time::timeout(PATIENCE, waiting)
            .await
            .map_err(|_| self.busy())
    }

    /// Says that an inactive pool is being started.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID: it is active or being started.
    pub fn begin_start(self: &Arc<Self>) -> Result<Starting> {
        let mut inner = self.lock();
        inner.check_inactive("already")?;
        inner.starting = true;
        drop(inner);
        Ok(Starting(Arc::clone(self)))
    }

    /// Runs what touches the pool's files where it holds up nobody else.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_TIMEOUT if the pool's threads are all busy; the work's.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = Arc::clone(&self.threads).acquire_owned();
        let permit = match tokio::time::timeout(PATIENCE, permit).await {
            Ok(Ok(permit)) => permit,
            _ => return Err(self.busy()),
        };
        blocking(move || {
            let done = work();
            drop(permit);
            done
        })
        .await?
    }
}
