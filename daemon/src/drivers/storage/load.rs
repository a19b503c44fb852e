//! What the daemon finds when it starts: definitions, pools that are active, and those that are
//! to be.

use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use xml_schemas::Validation;
use xml_schemas::pool::Pool as Definition;

use super::Driver;
use super::object::{Inner, Pool};
use crate::drivers::domain::blocking;
use crate::files::{self, Durability};
use crate::store::Identity;

/// How long the domains that start with the host wait for the pools that do.
const AUTOSTART_LIMIT: Duration = Duration::from_secs(30);

/// Reads definitions and finds active pools again. Their volumes are looked at behind the scenes:
/// a file system that does not answer must not hold up the daemon.
///
/// # Errors
/// A folder cannot be read.
pub fn load(driver: &Arc<Driver>) -> io::Result<()> {
    let parse = |text: &str| {
        let pool = Definition::parse(text, Validation::Lenient).map_err(|e| e.to_string())?;
        let identity = Identity {
            name: pool.name.clone(),
            uuid: pool.uuid,
        };
        Ok((identity, pool))
    };
    for loaded in driver.store.load(|text| parse(text.xml))? {
        let mut inner = Inner::new(Arc::new(loaded.object), true);
        inner.autostart = loaded.autostart;
        driver.pools().push(Pool::new(inner));
    }
    for entry in fs::read_dir(&driver.live)? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "xml") {
            continue;
        }
        let read = fs::read_to_string(&path).map_err(|e| e.to_string());
        match read.and_then(|text| parse(&text)) {
            Ok((_, definition)) => find_again(driver, definition),
            Err(why) => log::error!("{}: left out: {why}", path.display()),
        }
    }
    Ok(())
}

fn find_again(driver: &Arc<Driver>, definition: Definition) {
    let mut pools = driver.pools();
    let known = pools.iter().find(|p| p.uuid == definition.uuid).cloned();
    let pool = match known {
        Some(pool) => {
            let mut inner = pool.lock();
            // As it was started, which is not always as it is defined now.
            inner.next_definition = Some(Arc::clone(&inner.definition));
            inner.definition = Arc::new(definition);
            drop(inner);
            pool
        }
        None => {
            if pools.iter().any(|p| p.name() == definition.name) {
                log::error!(
                    "active pool '{}': another one has its name now",
                    definition.name
                );
                return;
            }
            let pool = Pool::new(Inner::new(Arc::new(definition), false));
            pools.push(Arc::clone(&pool));
            pool
        }
    };
    drop(pools);
    pool.lock().active = true;
    pool.set_loaded(false);
    let driver = Arc::clone(driver);
    tokio::spawn(async move {
        if let Err(error) = driver.refresh(&pool, 0).await {
            log::error!("pool '{}' is not active any more: {error}", pool.name());
        }
    });
}

/// Starts what is to be started with the host, once a boot, all at the same time.
pub async fn autostart(driver: &Arc<Driver>) {
    let marker = driver.live.join("autostarted");
    if fs::read_to_string(&marker).is_ok_and(|id| id == driver.boot_id) {
        return;
    }
    let boot = driver.boot_id.clone();
    let write = move || files::write_atomically(&marker, boot.as_bytes(), Durability::Process);
    match blocking(write).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return log::error!("no autostart of pools: cannot note it: {error}"),
        Err(error) => return log::error!("no autostart of pools: {error}"),
    }
    let mut starting = Vec::new();
    for pool in driver.all() {
        let wanted = {
            let inner = pool.lock();
            inner.autostart && !inner.active
        };
        if !wanted {
            continue;
        }
        let driver = Arc::clone(driver);
        starting.push(tokio::spawn(async move {
            match driver.start(&pool, 0).await {
                Ok(()) => log::info!("pool '{}' started with the host", pool.name()),
                Err(error) => log::error!("autostart of pool '{}': {error}", pool.name()),
            }
        }));
    }
    let all = async {
        for task in starting {
            // A task that failed inside has been reported by the runtime.
            let _ = task.await;
        }
    };
    if tokio::time::timeout(AUTOSTART_LIMIT, all).await.is_err() {
        log::warn!("some pools are still starting; the domains are started without them");
    }
}
