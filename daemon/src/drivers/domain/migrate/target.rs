//! The side that a guest comes to: Prepare, Finish.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rpc::tls::TlsServer;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::oneshot::error::RecvError;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use uuid::Uuid;
use vmm_api::control::{Answer, Call, Failure, JobStatus};
use vmm_api::migrate::{self, Kind, Verdict};
use xml_schemas::Domain as Definition;
use xml_schemas::domain::View;

use super::listener::{Listener, PREAMBLE_LIMIT, Stream};
use super::telling::{Hears, Telling};
use super::{Params, check, flags, lock, storage};
use crate::drivers::domain::job as jobs;
use crate::drivers::domain::lifecycle::end;
use crate::drivers::domain::object::{Coming, Domain, Pinned};
use crate::drivers::domain::record::ArrivalNote;
use crate::drivers::domain::start::{self, Arrival, StartOptions};
use crate::drivers::domain::state::{Lifecycle, PausedReason, State};
use crate::drivers::domain::{Driver, job::Operation};
use crate::error::{Error, ErrorCode, ErrorDomain, Result};
use crate::events::DomainEvent;
use crate::killpoint::killpoint;
use crate::node;

/// How long a target waits for the source to connect.
const AWAIT_LIMIT: Duration = Duration::from_secs(60);
/// How long what was cancelled may take to be gone.
const CANCEL_LIMIT: Duration = Duration::from_secs(20);
/// How long the VMM may take to say that its machine is built, after it has told the source so: less than the source
/// waits then.
const ARRIVE_LIMIT: Duration = Duration::from_secs(20);
/// From one look at whether the source is still there to the next.
const SOURCE_INTERVAL: Duration = Duration::from_secs(1);
/// How long the VMM may take to end by itself when it is not.
const VOID_LIMIT: Duration = Duration::from_secs(3);
/// How long the machine may take to hear from the source that it may run.
const TAKE_LIMIT: Duration = Duration::from_secs(10);
/// Why nothing comes of it, mostly.
const CANCELLED: &str = "the migration was cancelled";

/// What a VMM answers.
pub(super) type Answered = std::result::Result<std::result::Result<Answer, Failure>, RecvError>;

/// A domain that was prepared for.
#[derive(Debug)]
pub struct Arriving {
    /// The connection that prepared it.
    client: u64,
    flags: u64,
    pub(super) domain: Pinned,
    /// What it is announced with; none offline.
    pub(super) id: Option<i32>,
    /// To be stored.
    persistent: Arc<Definition>,
    /// The machine's coming; none offline.
    task: Option<JoinHandle<Result<()>>>,
    /// Volumes that were made for it.
    volumes: Vec<storage::Volume>,
    /// Where its source can ask what became of it; none offline.
    pub(super) telling: Option<Telling>,
    /// Its VMM has been given the right to run it.
    pub(super) taken: Arc<AtomicBool>,
}

impl Arriving {
    /// Its source may still come, or is coming.
    fn goes_on(&self) -> bool {
        self.task.as_ref().is_some_and(|task| !task.is_finished())
    }
}

/// What Prepare gives.
#[derive(Debug)]
pub struct Prepared {
    /// For the source.
    pub cookie: Vec<u8>,
    /// Where the guest is to go.
    pub uri: Option<String>,
}

impl Driver {
    /// Prepare: makes a place for the domain, and says where it is to go.
    ///
    /// # Errors
    /// Why it can't come; nothing is left then.
    pub async fn migrate_prepare(
        self: &Arc<Self>,
        client: u64,
        params: &Params,
        flags: u64,
        cookie: &[u8],
    ) -> Result<Prepared> {
        check(flags)?;
        let cookie = storage::Cookie::read(cookie)?;
        if cookie.daemon == Some(self.migrations.own().to_string()) {
            return Err(Error::internal(format!(
                "Attempt to migrate guest to the same host {}",
                node::hostname()
            )));
        }
        let xml = params
            .dxml
            .as_deref()
            .ok_or_else(|| Error::new(ErrorCode::INTERNAL_ERROR, "no domain XML passed"))?;
        if let Some(name) = &params.dname {
            xml_schemas::domain::check_name(name)?;
        }
        let renamed = |mut definition: Definition| {
            if let Some(name) = &params.dname {
                definition.name.clone_from(name);
            }
            Arc::new(definition)
        };
        let definition = renamed(self.parse_of_guest(xml)?);
        let persistent = match &params.persistent_xml {
            Some(text) => {
                let given = self.parse(text, false)?;
                crate::drivers::domain::save::check_same(&definition, &given)?;
                renamed(given)
            }
            None => Arc::clone(&definition),
        };
        let uuid = definition.uuid.unwrap_or_default();
        let domain = self.registry.pin_or_make(uuid, &definition.name)?;
        if domain.lock().is_active() {
            return Err(active(&definition.name));
        }
        let offline = flags & flags::OFFLINE != 0;
        if !offline {
            // Before anything moves: what this host can't run.
            definition.check_startable(&self.host())?;
        }
        let mut arriving = Arriving {
            client,
            flags,
            domain,
            id: None,
            persistent,
            task: None,
            volumes: Vec::new(),
            telling: None,
            taken: Arc::default(),
        };
        // Clients want one even where nothing is to be sent.
        let nowhere = || format!("tcp:{}", node::hostname());
        let mut prepared = Prepared {
            cookie: Vec::new(),
            uri: Some(params.uri.clone().unwrap_or_else(nowhere)),
        };
        if !offline {
            let secure = match flags & flags::TLS {
                0 => None,
                _ => {
                    let certificates = self.migrations.certificates.get_or_init(Default::default);
                    Some(certificates.server()?)
                }
            };
            let along = storage::chosen(&definition, params, flags)?;
            let volumes = &mut arriving.volumes;
            let room = self
                .make_volumes(uuid, &along, &cookie, flags, volumes)
                .await;
            let bound = match room {
                Ok(()) => {
                    // Who asks there what became of an earlier one has had the time to.
                    let made_way = self.migrations.make_way(params.uri.as_deref());
                    Listener::bind_soon(params, made_way).await
                }
                Err(error) => Err(error),
            };
            let bound = bound.and_then(|(listener, place)| {
                let (id, cancelled) = self.announce(&arriving.domain, &definition)?;
                Ok((listener, place, id, cancelled))
            });
            let (listener, place, id, cancelled) = match bound {
                Ok(bound) => bound,
                Err(error) => {
                    self.unmake_volumes(uuid, volumes).await;
                    return Err(error);
                }
            };
            arriving.id = Some(id);
            let token = Uuid::new_v4().to_string();
            prepared.cookie = token.clone().into_bytes();
            prepared.uri = Some(place.to_string());
            let telling = self.migrations.telling(client, place);
            let known = telling.hears();
            arriving.telling = Some(telling);
            let pinned = self
                .registry
                .pin(&arriving.domain)
                .ok_or_else(|| Error::internal("the domain has left the list"))?;
            let driver = Arc::clone(self);
            let definition = Arc::clone(&definition);
            arriving.task = Some(tokio::spawn(async move {
                let received = driver.receive(
                    &pinned,
                    listener,
                    (token, secure, known),
                    definition,
                    id,
                    cancelled,
                );
                let received = received.await;
                if received.is_err() {
                    driver.did_not_come(&pinned, id);
                }
                received
            }));
        }
        killpoint("migrate.prepared");
        let useless = {
            let mut all = lock(&self.migrations.arriving);
            match all.get(&definition.name).is_some_and(Arriving::goes_on) {
                // Another one was faster.
                true => Err(arriving),
                // One that nobody finished: the newer one counts.
                false => Ok(all.insert(definition.name.clone(), arriving)),
            }
        };
        match useless {
            Ok(None) => Ok(prepared),
            Ok(Some(before)) => {
                self.cancel(before).await;
                Ok(prepared)
            }
            Err(ours) => {
                self.cancel(ours).await;
                Err(active(&definition.name))
            }
        }
    }

    /// From now on clients see it, paused, and nobody may change it.
    fn announce(
        &self,
        domain: &Domain,
        definition: &Arc<Definition>,
    ) -> Result<(i32, watch::Receiver<Option<&'static str>>)> {
        let id = self.new_id()?;
        let mut definition = Definition::clone(definition);
        definition.id = u32::try_from(id).ok();
        let (given_up, hears) = watch::channel(None);
        let mut inner = domain.lock();
        if inner.is_active() {
            return Err(active(&inner.name));
        }
        inner.coming = Some(Coming {
            id,
            definition: Arc::new(definition),
            began: Instant::now(),
            given_up,
            destroyed: false,
        });
        inner.state = State::Paused(PausedReason::Migration);
        let event = DomainEvent::Lifecycle(Lifecycle::StartedMigrated);
        self.emit(&domain.name_in(&inner), &event);
        Ok((id, hears))
    }

    /// It is off, as before. Where its process was there already, its end has said so.
    fn did_not_come(&self, domain: &Domain, id: i32) {
        let mut inner = domain.lock();
        if inner.live.is_some() {
            return;
        }
        if let Some(coming) = inner.coming.take_if(|coming| coming.id == id) {
            let (reason, event) = coming.end();
            inner.state = State::Shutoff(reason);
            self.emit(&domain.name_in(&inner), &DomainEvent::Lifecycle(event));
        }
    }

    /// Waits for the source, and builds the machine that it sends.
    async fn receive(
        self: &Arc<Self>,
        domain: &Pinned,
        listener: Listener,
        (token, secure, known): (String, Option<TlsServer>, Hears),
        definition: Arc<Definition>,
        id: i32,
        cancel: watch::Receiver<Option<&'static str>>,
    ) -> Result<()> {
        let _job = domain.job_of_arrival().await?;
        let uuid = definition.uuid.unwrap_or_default();
        let mut hears = cancel.clone();
        let given_up = async {
            hears
                .wait_for(Option::is_some)
                .await
                .map_or(None, |why| *why)
        };
        let streams = tokio::select! {
            streams = timeout(AWAIT_LIMIT, listener.gather(uuid, &token, secure.as_ref())) => match streams {
                Ok(streams) => streams?,
                Err(_) => {
                    let text = "the source did not connect";
                    return Err(Error::new(ErrorCode::OPERATION_TIMEOUT, text));
                }
            },
            why = given_up => return Err(unwanted(why)),
        };
        // Whether it has come may be asked here, when the time has come for that.
        tokio::spawn(listener.tell(uuid, token, secure, known));
        killpoint("migrate.gathered");
        let bad = |error: io::Error| Error::system("the guest's connection", &error);
        let connections = streams.into_iter().map(Stream::into_fd);
        let connections = connections.collect::<io::Result<Vec<_>>>().map_err(bad)?;
        let first = connections.first().map(OwnedFd::try_clone);
        let first = first.transpose().map_err(bad)?;
        let options = StartOptions {
            paused: true,
            arriving: Some(Arrival {
                id,
                connections,
                cancel: cancel.clone(),
            }),
            ..StartOptions::default()
        };
        let started = {
            let starting = start::start(self, domain, &definition, options);
            tokio::pin!(starting);
            let gone = async {
                match &first {
                    Some(first) => source_gone(first).await,
                    None => std::future::pending().await,
                }
                // It says so itself, if it can.
                tokio::time::sleep(VOID_LIMIT).await;
            };
            tokio::select! {
                started = &mut starting => started,
                () = gone => {
                    self.give_up(domain, id, "the source of the migration has gone");
                    starting.await
                }
            }
        };
        if started.is_ok() && (cancel.borrow().is_some() || cancel.has_changed().is_err()) {
            // Its machine was faster.
            end(domain, false).await?;
            return Err(unwanted(*cancel.borrow()));
        }
        if let (Err(error), Some(first)) = (&started, first) {
            log::warn!("domain '{}' did not come: {error}", definition.name);
            // If the VMM never lived to say so itself.
            let given_up = *cancel.borrow();
            tell(first, given_up.unwrap_or(&error.message)).await;
        }
        started
    }

    /// Finish: the source has sent everything, and the domain runs here from now on; or nothing
    /// comes of it.
    ///
    /// # Errors
    /// It did not come; it is not here then.
    pub async fn migrate_finish(
        self: &Arc<Self>,
        name: &str,
        cookie: &[u8],
        flags: u64,
        cancelled: bool,
    ) -> Result<Arc<Domain>> {
        check(flags)?;
        let arriving = lock(&self.migrations.arriving)
            .remove(name)
            .ok_or_else(|| {
                let text = format!("no domain with matching name '{name}'");
                Error::new(ErrorCode::NO_DOMAIN, text)
            })?;
        if cancelled {
            self.cancel(arriving).await;
            // By this code clients know to tell what went wrong before.
            return Err(Error::new(
                ErrorCode::MIGRATE_FINISH_OK,
                format!("domain '{name}' did not come"),
            ));
        }
        killpoint("migrate.finishing");
        let began = Instant::now();
        let flags = flags | arriving.flags;
        let mut arriving = arriving;
        let Some(mut task) = arriving.task.take() else {
            self.store(&arriving, flags).await?;
            return Ok(Arc::clone(&arriving.domain));
        };
        let came = match timeout(ARRIVE_LIMIT, &mut task).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(Error::internal(error.to_string())),
            Err(_) => {
                arriving.task = Some(task);
                if let Some(id) = arriving.id {
                    let text = "its VMM did not say in time that the machine is built";
                    self.give_up(&arriving.domain, id, text);
                }
                let text = format!(
                    "waited {} s in vain for the domain's VMM to say that its machine is built",
                    ARRIVE_LIMIT.as_secs()
                );
                Err(Error::new(ErrorCode::OPERATION_TIMEOUT, text))
            }
        };
        if let Err(error) = came {
            self.cancel(arriving).await;
            return Err(error);
        }
        let domain = Arc::clone(&arriving.domain);
        // It is the other daemon's word, for statistics only.
        let status: JobStatus = serde_json::from_slice(cookie).unwrap_or_default();
        // If this daemon can't see it through, whoever finds the guest here knows what else is to be done.
        let note = ArrivalNote {
            persistent: (flags & flags::PERSIST_DEST != 0)
                .then(|| arriving.persistent.format(View::Inactive)),
            paused: flags & flags::PAUSED != 0,
        };
        let begun = {
            let mut inner = domain.lock();
            let begun = inner.live_mut().and_then(|live| {
                live.work.begin(Operation::MigrationIn)?;
                live.arrival = Some(note);
                arriving.taken = Arc::clone(&live.taken);
                Ok(live.control.clone())
            });
            self.write_record(&inner);
            begun
        };
        killpoint("migrate.arrived");
        // Before it can have written to them: from then on nobody takes them away.
        self.keep_volumes(domain.uuid);
        let paused = flags & flags::PAUSED != 0;
        let call = if paused { Call::Claim } else { Call::Resume };
        let asked = begun.and_then(|control| control.send(call).map_err(jobs::not_begun));
        let mut answer = match asked {
            Ok(answer) => answer,
            Err(error) => {
                self.cancel(arriving).await;
                return Err(error);
            }
        };
        let Ok(answered) = timeout(TAKE_LIMIT, &mut answer).await else {
            // It may have the right to run by now, and then nobody else has: it is left alone. When it comes round, it
            // runs, or hears from the source that it is not to, and ends.
            let text = format!(
                "the domain's VMM has not answered for {} s: it runs here if it has taken the guest over",
                TAKE_LIMIT.as_secs()
            );
            log::error!("domain '{name}': {text}");
            let driver = Arc::clone(self);
            tokio::spawn(async move {
                let answered = answer.await;
                let name = arriving.domain.name().name;
                let taken = driver.taken(arriving, flags, status, began, answered).await;
                match taken {
                    Ok(_) => log::info!("domain '{name}' has come after all"),
                    Err(error) => log::warn!("domain '{name}' has not come: {error}"),
                }
            });
            return Err(Error::new(ErrorCode::OPERATION_TIMEOUT, text));
        };
        killpoint("migrate.resumed");
        self.taken(arriving, flags, status, began, answered).await
    }

    pub(super) async fn store(self: &Arc<Self>, arriving: &Arriving, flags: u64) -> Result<()> {
        if flags & flags::PERSIST_DEST == 0 {
            return Ok(());
        }
        let xml = arriving.persistent.format(View::Inactive);
        self.define(&xml, 0).await.map(drop)
    }

    /// Whoever waits for it does so no longer.
    fn give_up(&self, domain: &Domain, id: i32, because: &'static str) {
        // Another one of that name may come by now.
        let inner = domain.lock();
        if let Some(coming) = inner.coming.as_ref().filter(|coming| coming.id == id) {
            coming.given_up.send_if_modified(|why| {
                let first = why.is_none();
                why.get_or_insert(because);
                first
            });
        }
    }

    /// Nothing comes of it.
    pub(super) async fn cancel(&self, mut arriving: Arriving) {
        let Some(id) = arriving.id else { return };
        // Nobody has a question about it: it has not asked for the guest.
        arriving.telling = None;
        let domain = Arc::clone(&arriving.domain);
        let name = domain.name().name;
        self.give_up(&domain, id, CANCELLED);
        if let Some(task) = arriving.task.as_mut() {
            match timeout(CANCEL_LIMIT, task).await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(error))) => log::debug!("domain '{name}': {error}"),
                Ok(Err(error)) => log::error!("domain '{name}': {error}"),
                Err(_) => log::error!("domain '{name}': its arrival can't be stopped"),
            }
        }
        // It may be there already, but has not been given away.
        let is_there = (domain.lock().live.as_ref()).is_some_and(|live| live.id == id);
        if is_there && let Err(error) = end(&domain, false).await {
            log::debug!("domain '{name}': {error}");
        }
        self.did_not_come(&domain, id);
        self.unmake_volumes(arriving.domain.uuid, &arriving.volumes)
            .await;
    }

    /// A connection has gone, and with it whoever would have finished.
    pub(super) fn arrivals_of_gone(self: &Arc<Self>, client: u64, goodbye: bool) {
        // One that dies may be followed by another one, which has not heard what this one has.
        if goodbye {
            self.migrations.nobody_asks(client);
        }
        let gone: Vec<Arriving> = {
            let mut all = lock(&self.migrations.arriving);
            let names: Vec<String> = all
                .iter()
                .filter(|(_, arriving)| arriving.client == client)
                .map(|(name, _)| name.clone())
                .collect();
            names.iter().filter_map(|name| all.remove(name)).collect()
        };
        for arriving in gone {
            let driver = Arc::clone(self);
            tokio::spawn(async move { driver.cancel(arriving).await });
        }
    }
}

fn active(name: &str) -> Error {
    Error::of(
        ErrorDomain::DOMAIN,
        ErrorCode::OPERATION_INVALID,
        format!("domain is already active as '{name}'"),
    )
}

/// Why nothing is to come of it.
fn unwanted(why: Option<&'static str>) -> Error {
    Error::new(ErrorCode::OPERATION_ABORTED, why.unwrap_or(CANCELLED))
}

/// Comes back when the source has closed its end.
async fn source_gone(connection: &OwnedFd) {
    loop {
        // Only its end is of interest: what comes is for somebody else.
        let mut one = [libc::pollfd {
            fd: connection.as_raw_fd(),
            events: libc::POLLRDHUP,
            revents: 0,
        }];
        // SAFETY: one entry, which lives here, and the descriptor in it is open; no time is waited.
        let ready = unsafe { libc::poll(one.as_mut_ptr(), 1, 0) };
        if ready > 0 {
            return;
        }
        tokio::time::sleep(SOURCE_INTERVAL).await;
    }
}

/// Tells the source why nothing comes of it.
async fn tell(to: OwnedFd, why: &str) {
    let Ok(frame) = migrate::json_frame(Kind::Verdict, &Verdict::refused(why)) else {
        return;
    };
    let told = async {
        // Either kind of socket: the calls are the same.
        let stream = std::os::unix::net::UnixStream::from(to);
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)?.write_all(&frame).await
    };
    if let Ok(Err(error)) = timeout(PREAMBLE_LIMIT, told).await {
        log::debug!("the source can't be told: {error}");
    }
}
