//! I/O threads: groups of threads that serve the disks assigned to them (`<driver iothread=…>`).

use std::collections::BTreeMap;
use std::sync::Arc;

use images::engine::Pool;
use virtio::worker::Starter;
use vmm_api::devices::IoThreadConfig;

use crate::num::to_usize;

/// Workers that there may be if nothing is said of them, as in QEMU.
const WORKERS: u32 = 64;
/// Workers that may be kept without work.
const MOST_IDLE: u32 = 4096;

/// One of them. Where its starter runs, all run that come after.
#[derive(Debug, Clone)]
pub struct IoThread {
    /// Starts the queues' threads.
    pub starter: Starter,
    /// Does what the queues' threads would have to wait for.
    pub pool: Arc<Pool>,
    config: IoThreadConfig,
}

/// All of them, by their numbers.
#[derive(Debug, Clone, Default)]
pub struct IoThreads(BTreeMap<u32, IoThread>);

impl IoThreads {
    /// Makes one, or changes the one of that number.
    ///
    /// # Errors
    /// The kernel's refusal of a thread, or a number there can't be, in words for the caller.
    pub fn set(&mut self, config: IoThreadConfig) -> Result<(), String> {
        if config.id == 0 || config.id > IoThreadConfig::MOST {
            return Err(format!("there can be no I/O thread {}", config.id));
        }
        if config.pool_min.is_some_and(|least| least > MOST_IDLE) {
            return Err(format!(
                "{MOST_IDLE} threads are the most that are kept without work"
            ));
        }
        let failed = |error: &dyn std::fmt::Display| format!("I/O thread {}: {error}", config.id);
        let name = config.thread_name();
        let mut thread = match self.0.get(&config.id) {
            Some(known) => known.clone(),
            None => IoThread {
                starter: Starter::new(&name).map_err(|error| failed(&error))?,
                pool: Arc::new(Pool::named(&name)),
                config,
            },
        };
        let (least, most) = (
            config.pool_min.unwrap_or(0),
            config.pool_max.unwrap_or(WORKERS),
        );
        if (least, most) != thread.size() || least > 0 {
            let pool = Arc::clone(&thread.pool);
            let resize = move || pool.set_size(to_usize(least.into()), to_usize(most.into()));
            let resized = thread.starter.run(resize).map_err(|error| failed(&error))?;
            resized.map_err(|error| failed(&error))?;
        }
        let grow = (config.poll_grow.into(), config.poll_shrink.into());
        thread
            .starter
            .polling()
            .set(config.poll_max_ns, grow.0, grow.1);
        thread.config = config;
        self.0.insert(config.id, thread);
        Ok(())
    }

    /// The one of that number.
    ///
    /// # Errors
    /// There is none, in words for the caller.
    pub fn get(&self, id: u32) -> Result<&IoThread, String> {
        let found = self.0.get(&id);
        found.ok_or_else(|| format!("there is no I/O thread {id}"))
    }

    /// Takes one away that no disk has. Its threads end as soon as they have nothing to do.
    ///
    /// # Errors
    /// There is none, in words for the caller.
    pub fn remove(&mut self, id: u32) -> Result<(), String> {
        let thread = self.0.remove(&id);
        let thread = thread.ok_or_else(|| format!("there is no I/O thread {id}"))?;
        // Fewer are none that could not be started.
        drop(thread.pool.set_size(0, to_usize(WORKERS.into())));
        Ok(())
    }

    /// What they are like.
    pub fn list(&self) -> Vec<IoThreadConfig> {
        self.0.values().map(|thread| thread.config).collect()
    }
}

impl IoThread {
    /// Least and most workers.
    fn size(&self) -> (u32, u32) {
        let config = &self.config;
        (
            config.pool_min.unwrap_or(0),
            config.pool_max.unwrap_or(WORKERS),
        )
    }
}
