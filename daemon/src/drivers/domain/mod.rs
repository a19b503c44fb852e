//! The domain driver: definitions in files, running domains in processes of their own.

pub mod agent;
pub mod block_jobs;
mod channels;
pub mod console;
pub mod define;
pub mod devices;
pub mod dirtyrate;
pub mod dump;
pub mod firmware;
pub mod guest_info;
mod image_numbers;
pub mod iothreads;
pub mod job;
mod job_note;
pub mod keys;
pub mod leases;
pub mod lifecycle;
pub mod limits;
pub mod machine;
mod media;
pub mod metadata;
pub mod migrate;
pub mod networks;
pub mod object;
pub mod plug;
pub mod query;
pub mod record;
pub mod recover;
pub mod save;
pub mod saved_image;
mod scsi;
pub mod sections;
pub mod snapshot;
pub mod start;
mod startup_policy;
pub mod state;
mod stored;
mod threshold;
pub mod tunables;
pub mod tuning;
pub mod update;
mod vcpu_plug;
pub mod vcpus;
pub mod watch;
mod which_device;
mod written;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use xml_schemas::domain::HostFacts;

use self::object::{Domain, Inner, Pinned, Registry};
use self::record::{Folder, Record};
use crate::drivers::{network, secret, storage};
use crate::error::{Error, ErrorCode, Result};
use crate::events::{DomainEvent, DomainName, Hub};
use crate::files::{self, Durability};
use crate::node;
use crate::roots::Roots;
use crate::store::Store;

/// Everything about domains.
#[derive(Debug)]
pub struct Driver {
    /// Where things live.
    pub roots: Roots,
    /// Persistent definitions.
    pub store: Store,
    /// All domains.
    pub registry: Arc<Registry>,
    /// What cards are connected to.
    pub networks: Arc<network::Driver>,
    /// What opens images.
    pub secrets: Arc<secret::Driver>,
    /// Where images may be.
    pub storage: Arc<storage::Driver>,
    /// Who wants to know.
    pub hub: Arc<Hub>,
    /// The program that runs a domain.
    pub vmm: PathBuf,
    /// This boot of the host.
    pub boot_id: String,
    /// Domains that go, and that come.
    migrations: migrate::Migrations,
    next_id: Mutex<i32>,
    /// The host, and when it was looked at.
    host: Mutex<Option<(Instant, Arc<HostFacts>)>>,
}

impl Driver {
    /// A driver without domains yet; see [`recover::load`].
    ///
    /// # Errors
    /// The store cannot be opened.
    pub fn new(roots: Roots, vmm: PathBuf) -> io::Result<Self> {
        let boot_id = record::boot_id();
        let store = Store::open(roots.domains(), &boot_id)?;
        let hub = Arc::new(Hub::default());
        let secrets = Arc::new(secret::Driver::open(roots.secrets(), Arc::clone(&hub))?);
        let networks = Arc::new(network::Driver::new(roots.clone(), Arc::clone(&hub))?);
        let storage = storage::Driver::new(
            &roots,
            boot_id.clone(),
            Arc::clone(&secrets),
            Arc::clone(&hub),
        )?;
        files::remove_leftovers(&roots.live_domains())?;
        let next_id = fs::read_to_string(next_id_file(&roots))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(1);
        Ok(Self {
            roots,
            store,
            registry: Arc::default(),
            networks,
            secrets,
            storage: Arc::new(storage),
            hub,
            vmm,
            boot_id,
            migrations: migrate::Migrations::default(),
            next_id: Mutex::new(next_id),
            host: Mutex::default(),
        })
    }

    /// What definitions are held against, as the host is now, or was a moment ago: looking takes as long as parsing.
    pub fn host(&self) -> Arc<HostFacts> {
        const MOMENT: Duration = Duration::from_secs(1);
        let mut seen = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        match &*seen {
            Some((when, facts)) if when.elapsed() < MOMENT => Arc::clone(facts),
            _ => {
                let facts = Arc::new(node::facts(&self.vmm));
                *seen = Some((Instant::now(), Arc::clone(&facts)));
                facts
            }
        }
    }

    /// An id that no domain has had since the host's boot.
    fn next_id(&self) -> io::Result<i32> {
        let mut next = self.next_id.lock().unwrap_or_else(PoisonError::into_inner);
        let id = *next;
        let following = id.checked_add(1).unwrap_or(1);
        files::write_atomically(
            &next_id_file(&self.roots),
            following.to_string().as_bytes(),
            Durability::Process,
        )?;
        *next = following;
        Ok(id)
    }

    /// As [`Driver::next_id`].
    ///
    /// # Errors
    /// The system's.
    fn new_id(&self) -> Result<i32> {
        self.next_id()
            .map_err(|e| Error::system("cannot write the next domain id", &e))
    }

    /// Ids below this one are taken.
    fn ids_from(&self, least: i32) {
        let mut next = self.next_id.lock().unwrap_or_else(PoisonError::into_inner);
        *next = least.max(*next);
    }

    /// Writes what the next daemon must know of a running domain.
    fn write_record(&self, inner: &Inner) {
        let Some(live) = &inner.live else { return };
        let mut record = Record::new(
            live.id,
            self.boot_id.clone(),
            inner.state,
            live.autodestroy,
            live.made.clone(),
        );
        record.process = Some(live.process.identity());
        record.saving.clone_from(&live.work.saving);
        record.agent_timeout = inner.agent_timeout;
        record.migration = inner.migration;
        record.arrival.clone_from(&live.arrival);
        record.next_image = live.next_image;
        if let Err(error) = record.write(&Folder(live.folder.clone())) {
            // The domain runs on; only the next daemon would show an older state of it.
            log::error!("domain '{}': cannot write its state: {error}", inner.name);
        }
    }

    /// How long the guest's agent may take from now on.
    pub fn set_agent_timeout(&self, domain: &Domain, timeout: i32) {
        let mut inner = domain.lock();
        inner.agent_timeout = timeout;
        self.write_record(&inner);
    }

    /// The domain with that name.
    ///
    /// # Errors
    /// VIR_ERR_NO_DOMAIN.
    pub fn by_name(&self, name: &str) -> Result<Arc<Domain>> {
        self.registry
            .by_name(name)
            .ok_or_else(|| no_domain(format!("no domain with matching name '{name}'")))
    }

    /// The domain with that uuid.
    ///
    /// # Errors
    /// VIR_ERR_NO_DOMAIN.
    pub fn by_uuid(&self, uuid: Uuid) -> Result<Arc<Domain>> {
        self.registry
            .by_uuid(uuid)
            .ok_or_else(|| no_domain(format!("no domain with matching uuid '{uuid}'")))
    }

    /// The running domain with that id.
    ///
    /// # Errors
    /// VIR_ERR_NO_DOMAIN.
    pub fn by_id(&self, id: i32) -> Result<Arc<Domain>> {
        self.registry
            .by_id(id)
            .ok_or_else(|| no_domain(format!("no domain with matching id {id}")))
    }

    /// The domain that a client means, which it names by uuid.
    ///
    /// # Errors
    /// VIR_ERR_NO_DOMAIN.
    pub fn find(&self, name: &str, uuid: Uuid) -> Result<Arc<Domain>> {
        self.registry
            .by_uuid(uuid)
            .ok_or_else(|| no_domain(format!("no domain with matching uuid '{uuid}' ({name})")))
    }

    /// As [`Driver::find`], and it stays there while the caller works on it.
    ///
    /// # Errors
    /// VIR_ERR_NO_DOMAIN.
    pub fn pin(&self, name: &str, uuid: Uuid) -> Result<Pinned> {
        let domain = self.find(name, uuid)?;
        self.registry
            .pin(&domain)
            .ok_or_else(|| no_domain(format!("no domain with matching uuid '{uuid}' ({name})")))
    }

    /// Tells who wants to know.
    pub fn emit(&self, domain: &DomainName, event: &DomainEvent) {
        self.hub.emit(domain, event);
    }

    /// How many domains run, or are on their way here.
    pub fn running(&self) -> usize {
        let all = self.registry.all();
        all.iter().filter(|d| d.lock().is_active()).count()
    }
}

fn no_domain(detail: String) -> Error {
    Error::new(ErrorCode::NO_DOMAIN, detail)
}

fn next_id_file(roots: &Roots) -> PathBuf {
    roots.live_domains().join("next-id")
}

/// Runs what blocks (disks, process creation) where it holds nobody up.
///
/// # Errors
/// VIR_ERR_INTERNAL_ERROR if it panicked.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::internal(format!("a call failed inside: {error}")))
}
