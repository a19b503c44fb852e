//! One domain in memory, and the list of all.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use uuid::Uuid;

use super::job::{Last, Operation, Work};
use super::machine::Made;
use super::state::{Lifecycle, ShutoffReason, State};
use super::stored::Stored;
use crate::control::Control;
use crate::error::{Error, ErrorCode, ErrorDomain, Result};
use crate::events::DomainName;
use crate::vmm_process::VmmProcess;

tokio::task_local! {
    /// The call that is being answered, as libvirt's function is called.
    pub static CALL: String;
}

/// How long a call waits for another one that changes the same domain.
const JOB_LIMIT: Duration = Duration::from_secs(30);

/// A domain.
#[derive(Debug)]
pub struct Domain {
    /// Its uuid.
    pub uuid: Uuid,
    /// Held by whoever changes it: at most one at a time, in order of arrival.
    job: tokio::sync::Mutex<()>,
    /// The call that has held it last, and since when.
    holder: Mutex<(String, Instant)>,
    /// Held by whoever talks to the guest's agent.
    pub(super) agent: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
}

/// What is known of a domain. Locked for moments only, never across a wait.
#[derive(Debug)]
pub struct Inner {
    /// Its name.
    pub name: String,
    /// The definition in the store.
    pub persistent: Option<Stored>,
    /// It is started with the host.
    pub autostart: bool,
    /// Its state.
    pub state: State,
    /// What there is while it runs.
    pub live: Option<Live>,
    /// It is on its way here from another host, whether its process is there already or not.
    pub coming: Option<Coming>,
    /// The job before its process ended.
    pub last_job: Option<Last>,
    /// How long the guest's agent may take (virDomainAgentResponseTimeoutValues, or seconds).
    pub agent_timeout: i32,
    /// What its migrations keep to.
    pub migration: super::migrate::Limits,
    /// Calls that work on it: it stays in the list for so long.
    pins: usize,
    /// It has left the list.
    gone: bool,
}

/// A domain that is coming from another host: seen by all, changed by nobody.
#[derive(Debug)]
pub struct Coming {
    /// The id that it has from the beginning.
    pub id: i32,
    /// What was announced.
    pub definition: Arc<xml_schemas::Domain>,
    /// Since when.
    pub began: Instant,
    /// Gives it up, and says why. Dropped with this: when it is decided what became of it.
    pub given_up: watch::Sender<Option<&'static str>>,
    /// Somebody here has asked for its end.
    pub destroyed: bool,
}

impl Coming {
    /// How it is told that it did not come.
    pub fn end(&self) -> (ShutoffReason, Lifecycle) {
        match self.destroyed {
            true => (ShutoffReason::Destroyed, Lifecycle::StoppedDestroyed),
            false => (ShutoffReason::Failed, Lifecycle::StoppedFailed),
        }
    }
}

/// A running domain.
#[derive(Debug)]
pub struct Live {
    /// Its id.
    pub id: i32,
    /// The definition it runs with.
    pub definition: Arc<xml_schemas::Domain>,
    /// Its process.
    pub process: Arc<VmmProcess>,
    /// The way to talk to it.
    pub control: Control,
    /// Its folder below `run`.
    pub folder: PathBuf,
    /// What is to be removed at its end.
    pub made: Made,
    /// When the guest's use of memory was last told, and whether it is about to be told again.
    pub balloon_told: (Option<Instant>, bool),
    /// Disks that had an error, by target, with virDomainDiskErrorCode.
    pub disk_errors: Vec<(String, i32)>,
    /// How fast its memory changes.
    pub dirty_rate: super::dirtyrate::DirtyRate,
    /// It ends with its creator's connection.
    pub autodestroy: bool,
    /// Somebody has asked for its end.
    pub destroying: bool,
    /// Somebody has suspended it: that a migration came to nothing does not let it run.
    pub suspended: bool,
    /// The next power-off of the guest is a reboot.
    pub rebooting: bool,
    /// The next reset is the host's, not the guest's.
    pub resetting: bool,
    /// Taken by the open console: dropping the sender closes it.
    pub console: Option<tokio::sync::oneshot::Sender<()>>,
    /// Told when the other side of its migration has everything.
    pub migration_ready: Option<tokio::sync::oneshot::Sender<()>>,
    /// Nobody is to change it until whoever migrates it has confirmed.
    pub change_protection: bool,
    /// It comes from elsewhere: what is to be done when it is this side's.
    pub arrival: Option<super::record::ArrivalNote>,
    /// It was given away, and whether it arrived is being found out.
    pub settling: bool,
    /// It comes from elsewhere, and its VMM has been given the right to run it.
    pub taken: Arc<AtomicBool>,
    /// Its VMM knows of vCPUs that come and go.
    pub vcpus_change: bool,
    /// The vCPU that the guest would not let go of last.
    pub vcpu_kept: Option<u32>,
    /// The number of the next image of its disks (see `image_numbers`).
    pub next_image: u32,
    /// What is remembered of its disks' jobs.
    pub block_jobs: Vec<super::block_jobs::Pending>,
    /// What takes long on it: a save, a dump.
    pub work: Work,
    /// Becomes true when everything about its end is done.
    pub ended: watch::Receiver<bool>,
}

impl Inner {
    /// Whether clients see it.
    pub fn visible(&self) -> bool {
        self.persistent.is_some() || self.is_active()
    }

    /// Whether it is there, running or paused or about to come.
    pub fn is_active(&self) -> bool {
        self.live.is_some() || self.coming.is_some()
    }

    /// Its id, -1 if it is off.
    pub fn id(&self) -> i32 {
        match (&self.live, &self.coming) {
            (Some(live), _) => live.id,
            (None, Some(coming)) => coming.id,
            (None, None) => -1,
        }
    }

    /// The definition in effect: the running one, else the stored one.
    ///
    /// # Errors
    /// As [`Inner::stored`].
    pub fn definition(&self) -> Result<Option<Arc<xml_schemas::Domain>>> {
        match (&self.live, &self.coming) {
            (Some(live), _) => Ok(Some(Arc::clone(&live.definition))),
            (None, Some(coming)) => Ok(Some(Arc::clone(&coming.definition))),
            (None, None) => self.stored(),
        }
    }

    /// The stored definition.
    ///
    /// # Errors
    /// VIR_ERR_INTERNAL_ERROR: an earlier version of this program has stored what this one does not understand.
    pub fn stored(&self) -> Result<Option<Arc<xml_schemas::Domain>>> {
        let read = self.persistent.as_ref().map(Stored::read).transpose();
        read.map_err(|error| {
            let name = &self.name;
            let text = format!("the stored definition of domain '{name}' cannot be read: {error}");
            log::error!("{text}");
            Error::internal(text)
        })
    }

    /// # Errors
    /// VIR_ERR_OPERATION_TIMEOUT while it is on its way here.
    pub fn check_settled(&self) -> Result<()> {
        match self.coming {
            None => Ok(()),
            Some(_) => Err(comes()),
        }
    }

    /// The running domain.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off.
    pub fn live(&self) -> Result<&Live> {
        let off = || match self.coming {
            Some(_) => comes(),
            None => not_running(),
        };
        self.live.as_ref().ok_or_else(off)
    }

    /// The running domain, to be changed.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off.
    pub fn live_mut(&mut self) -> Result<&mut Live> {
        let comes_yet = self.coming.is_some();
        let off = || if comes_yet { comes() } else { not_running() };
        self.live.as_mut().ok_or_else(off)
    }
}

/// What is said to whoever would change a domain that is on its way here. libvirt's words: there, too, one waits for
/// the job that moves it, though in vain and for half a minute.
fn comes() -> Error {
    Error::new(
        ErrorCode::OPERATION_TIMEOUT,
        "cannot acquire state change lock (held by incoming migration)",
    )
}

/// What is said of a domain that had to run.
pub fn not_running() -> Error {
    let (domain, code) = (ErrorDomain::DOMAIN, ErrorCode::OPERATION_INVALID);
    Error::of(domain, code, "domain is not running")
}

impl Domain {
    fn new(uuid: Uuid, name: String) -> Self {
        Self {
            uuid,
            job: tokio::sync::Mutex::new(()),
            holder: Mutex::new((String::new(), Instant::now())),
            agent: tokio::sync::Mutex::new(()),
            inner: Mutex::new(Inner {
                name,
                persistent: None,
                autostart: false,
                state: State::Shutoff(ShutoffReason::Unknown),
                live: None,
                coming: None,
                last_job: None,
                agent_timeout: super::agent::usual_limit(),
                migration: super::migrate::Limits::default(),
                pins: 0,
                gone: false,
            }),
        }
    }

    /// Looks at it, or changes what is known of it.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How events and answers name it.
    pub fn name(&self) -> DomainName {
        let inner = self.lock();
        self.name_in(&inner)
    }

    /// As [`Domain::name`], for who has locked it.
    pub fn name_in(&self, inner: &Inner) -> DomainName {
        DomainName {
            name: inner.name.clone(),
            uuid: self.uuid,
            id: inner.id(),
        }
    }
}

/// All domains.
#[derive(Debug, Default)]
pub struct Registry {
    maps: Mutex<Maps>,
}

#[derive(Debug, Default)]
struct Maps {
    by_uuid: HashMap<Uuid, Arc<Domain>>,
    /// In the order in which they are listed. A domain that is being renamed has two names.
    by_name: BTreeMap<String, Arc<Domain>>,
}

/// A domain that stays in the list for as long as this lives.
#[derive(Debug)]
pub struct Pinned {
    registry: Arc<Registry>,
    domain: Arc<Domain>,
}

impl std::ops::Deref for Pinned {
    type Target = Arc<Domain>;

    fn deref(&self) -> &Arc<Domain> {
        &self.domain
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut maps = self.registry.lock();
        self.domain.lock().pins -= 1;
        remove_if_unused(&mut maps, &self.domain);
    }
}

impl Pinned {
    /// Waits until no other call changes the domain.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_TIMEOUT after half a minute; VIR_ERR_OPERATION_INVALID while it is on its
    /// way to another host: what changed here then would not be so there.
    pub async fn job(&self) -> Result<tokio::sync::MutexGuard<'_, ()>> {
        let guard = self.job_in_migration().await?;
        if let Some(live) = &self.lock().live
            && (live.work.is(Operation::MigrationOut) || live.change_protection)
        {
            return Err(Error::invalid(
                "domain is being migrated: it can't be changed meanwhile",
            ));
        }
        Ok(guard)
    }

    /// The same for what may be done to a domain that is on its way to another host, too.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_TIMEOUT after half a minute, or if it is on its way here.
    pub async fn job_in_migration(&self) -> Result<tokio::sync::MutexGuard<'_, ()>> {
        self.lock().check_settled()?;
        let guard = self.job_of_arrival().await?;
        self.lock().check_settled()?;
        Ok(guard)
    }

    /// The same for whoever brings it here.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_TIMEOUT after half a minute.
    pub async fn job_of_arrival(&self) -> Result<tokio::sync::MutexGuard<'_, ()>> {
        self.job_within(JOB_LIMIT).await
    }

    async fn job_within(&self, limit: Duration) -> Result<tokio::sync::MutexGuard<'_, ()>> {
        let holder = || {
            let holder = self.domain.holder.lock();
            holder.unwrap_or_else(PoisonError::into_inner)
        };
        if let Ok(guard) = tokio::time::timeout(limit, self.domain.job.lock()).await {
            let call = CALL.try_with(Clone::clone);
            *holder() = (call.unwrap_or_else(|_| "vireod".into()), Instant::now());
            return Ok(guard);
        }
        let (call, since) = &*holder();
        let seconds = since.elapsed().as_secs();
        Err(Error::new(
            ErrorCode::OPERATION_TIMEOUT,
            format!("cannot acquire state change lock (held by {call} for {seconds}s)"),
        ))
    }
}

/// Takes a domain out of the list when nothing keeps it there.
fn remove_if_unused(maps: &mut Maps, domain: &Domain) {
    let mut inner = domain.lock();
    if inner.pins == 0 && !inner.visible() && !inner.gone {
        inner.gone = true;
        maps.by_uuid.remove(&domain.uuid);
        maps.by_name.remove(&inner.name);
    }
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The domain with that uuid, as far as clients see it.
    pub fn by_uuid(&self, uuid: Uuid) -> Option<Arc<Domain>> {
        let domain = self.lock().by_uuid.get(&uuid).cloned()?;
        domain.lock().visible().then_some(())?;
        Some(domain)
    }

    /// The domain with that name, as far as clients see it.
    pub fn by_name(&self, name: &str) -> Option<Arc<Domain>> {
        let domain = self.lock().by_name.get(name).cloned()?;
        domain.lock().visible().then_some(())?;
        Some(domain)
    }

    /// The running domain with that id.
    pub fn by_id(&self, id: i32) -> Option<Arc<Domain>> {
        let all = self.all();
        all.into_iter().find(|d| {
            let inner = d.lock();
            inner.is_active() && inner.id() == id
        })
    }

    /// All that clients see, by name.
    pub fn all(&self) -> Vec<Arc<Domain>> {
        self.each(|domain, _| Some(Arc::clone(domain)))
    }

    /// What `pick` makes of all that clients see, by name; in one go, so that it must not wait for anything.
    pub fn each<T>(&self, pick: impl Fn(&Arc<Domain>, &Inner) -> Option<T>) -> Vec<T> {
        let maps = self.lock();
        let visible = maps.by_name.iter().filter_map(|(name, domain)| {
            let inner = domain.lock();
            let seen = inner.visible() && inner.name == *name;
            seen.then(|| pick(domain, &inner)).flatten()
        });
        visible.collect()
    }

    /// Keeps a domain in the list; `None` if it has left it.
    pub fn pin(self: &Arc<Self>, domain: &Arc<Domain>) -> Option<Pinned> {
        let _maps = self.lock();
        let mut inner = domain.lock();
        if inner.gone {
            return None;
        }
        inner.pins += 1;
        drop(inner);
        Some(Pinned {
            registry: Arc::clone(self),
            domain: Arc::clone(domain),
        })
    }

    /// Keeps the domain with that uuid and name in the list, after making it if there is none.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_FAILED: only the name or only the uuid is another domain's.
    pub fn pin_or_make(self: &Arc<Self>, uuid: Uuid, name: &str) -> Result<Pinned> {
        let conflict = |text| {
            Err(Error::of(
                ErrorDomain::DOMAIN,
                ErrorCode::OPERATION_FAILED,
                text,
            ))
        };
        let mut maps = self.lock();
        let domain = match (maps.by_uuid.get(&uuid), maps.by_name.get(name)) {
            (Some(domain), _) => {
                let known = domain.lock().name.clone();
                if known != name {
                    return conflict(format!(
                        "domain '{known}' is already defined with uuid {uuid}"
                    ));
                }
                Arc::clone(domain)
            }
            (None, Some(other)) => {
                let other = other.uuid;
                return conflict(format!("domain '{name}' already exists with uuid {other}"));
            }
            (None, None) => {
                let domain = Arc::new(Domain::new(uuid, name.to_owned()));
                maps.by_uuid.insert(uuid, Arc::clone(&domain));
                maps.by_name.insert(name.to_owned(), Arc::clone(&domain));
                domain
            }
        };
        domain.lock().pins += 1;
        Ok(Pinned {
            registry: Arc::clone(self),
            domain,
        })
    }

    /// Gives a pinned domain another name in the list, and holds that name even if the rename
    /// fails later (see [`Registry::finish_rename`]).
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_FAILED: the name is another domain's.
    pub fn claim_name(&self, domain: &Arc<Domain>, name: &str) -> Result<()> {
        let mut maps = self.lock();
        if maps.by_name.contains_key(name) {
            return Err(Error::of(
                ErrorDomain::DOMAIN,
                ErrorCode::OPERATION_INVALID,
                format!("domain with name '{name}' already exists"),
            ));
        }
        maps.by_name.insert(name.to_owned(), Arc::clone(domain));
        Ok(())
    }

    /// Ends a rename to `new`: for good (the old name becomes free) or not (the new one does).
    pub fn finish_rename(&self, domain: &Domain, new: &str, done: bool) {
        let mut maps = self.lock();
        let mut inner = domain.lock();
        if done {
            let old = std::mem::replace(&mut inner.name, new.to_owned());
            maps.by_name.remove(&old);
        } else {
            maps.by_name.remove(new);
        }
    }

    /// Takes a domain out of the list when nothing keeps it there.
    pub fn remove_if_unused(&self, domain: &Domain) {
        remove_if_unused(&mut self.lock(), domain);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> Arc<Registry> {
        Arc::default()
    }

    const ONE: Uuid = Uuid::from_u128(1);
    const TWO: Uuid = Uuid::from_u128(2);

    #[test]
    fn a_domain_without_definition_leaves_with_its_last_pin() {
        let registry = registry();
        let first = registry.pin_or_make(ONE, "a").unwrap();
        let second = registry.pin(&first).unwrap();
        assert!(registry.by_name("a").is_none(), "nothing to see yet");
        let kept = Arc::clone(&first);
        drop(first);
        assert_eq!(
            registry.pin_or_make(TWO, "a").unwrap_err().message,
            "operation failed: domain 'a' already exists with uuid \
             00000000-0000-0000-0000-000000000001"
        );
        drop(second);
        assert!(registry.pin(&kept).is_none());
        registry.pin_or_make(TWO, "a").unwrap();
    }

    #[tokio::test]
    async fn who_waits_in_vain_hears_for_whom() {
        let registry = registry();
        let pin = registry.pin_or_make(ONE, "a").unwrap();
        let held = CALL
            .scope("virDomainReset".into(), pin.job())
            .await
            .unwrap();
        let error = pin.job_within(Duration::from_millis(1)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::OPERATION_TIMEOUT);
        let words = "cannot acquire state change lock (held by virDomainReset for ";
        assert!(error.message.contains(words), "{error}");
        drop(held);
        drop(pin.job_within(JOB_LIMIT).await.unwrap());
    }

    #[test]
    fn a_uuid_has_one_name() {
        let registry = registry();
        let _pin = registry.pin_or_make(ONE, "a").unwrap();
        let error = registry.pin_or_make(ONE, "b").unwrap_err();
        assert_eq!((error.code.0, error.domain.0), (9, 20));
        assert!(error.message.contains("'a' is already defined with uuid"));
    }

    #[test]
    fn renames_hold_both_names_until_they_end() {
        let registry = registry();
        let pin = registry.pin_or_make(ONE, "a").unwrap();
        registry.claim_name(&pin, "b").unwrap();
        assert!(registry.pin_or_make(TWO, "b").is_err());
        registry.finish_rename(&pin, "b", false);
        drop(registry.pin_or_make(TWO, "b").unwrap());
        registry.claim_name(&pin, "b").unwrap();
        registry.finish_rename(&pin, "b", true);
        assert_eq!(pin.lock().name, "b");
        drop(registry.pin_or_make(TWO, "a").unwrap());
    }
}
