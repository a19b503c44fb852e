//! Starting a domain: from a definition to a process that runs, or to nothing at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use tokio::sync::watch as watch_channel;
use vmm_api::config::{MachineConfig, Resource, RestoreConfig};
use vmm_api::control::{Answer, Call, Event, ExitRecord, FromVmm};
use xml_schemas::Domain as Definition;

use super::devices::Surroundings;
use super::job::Work;
use super::machine::{self, Machine, Made, Names};
use super::object::{Live, Pinned};
use super::record::{Folder, Record};
use super::state::{Lifecycle, PausedReason, RunningReason, State};
use super::{Driver, channels, limits, saved_image, startup_policy, vcpu_plug, vcpus, watch};
use crate::cgroups::Groups;
use crate::control::{self, Control, ControlError, Frames};
use crate::drivers::network::plug::Owner;
use crate::error::{Error, ErrorCode, Result};
use crate::events::DomainEvent;
use crate::files::{self, Durability};
use crate::killpoint::killpoint;
use crate::logger;
use crate::vmm_process::{self, Launch, Spawned, VmmProcess};

/// How long a VMM may take until its machine is built: large kernels come from slow disks.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a VMM may take to set its vCPUs going.
const RESUME_LIMIT: Duration = Duration::from_secs(10);
/// How long a killed process may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How a domain is started.
#[derive(Debug, Default)]
pub struct StartOptions {
    /// Its first instruction waits for `resume`.
    pub paused: bool,
    /// It ends with the connection that started it.
    pub autodestroy: bool,
    /// It goes on from here instead of booting.
    pub from: Option<Origin>,
    /// It comes from another host instead of booting. It is `paused` then.
    pub arriving: Option<Arrival>,
}

/// A machine that is coming from another host.
#[derive(Debug)]
pub struct Arrival {
    /// The id that it was announced with.
    pub id: i32,
    /// The connected sockets.
    pub connections: Vec<OwnedFd>,
    /// Has the reason, or ends, when nothing is to come of it.
    pub cancel: watch_channel::Receiver<Option<&'static str>>,
}

/// A saved machine to go on with.
#[derive(Debug)]
pub struct Origin {
    /// The image, open for reading.
    pub file: File,
    /// What people call it.
    pub path: PathBuf,
    /// It is read whole before the guest goes on.
    pub copy: bool,
    /// It is used up by this: the domain's own managed save.
    pub managed: bool,
    /// A snapshot's.
    pub snapshot: bool,
}

impl Origin {
    /// How the domain's being there is told, how it runs, and how it is paused.
    fn told(options: &StartOptions) -> (Lifecycle, RunningReason, Lifecycle) {
        match options.from.as_ref() {
            None => (
                Lifecycle::StartedBooted,
                RunningReason::Booted,
                Lifecycle::SuspendedPaused,
            ),
            Some(from) if from.snapshot => (
                Lifecycle::StartedFromSnapshot,
                RunningReason::FromSnapshot,
                Lifecycle::SuspendedFromSnapshot,
            ),
            Some(_) => (
                Lifecycle::StartedRestored,
                RunningReason::Restored,
                Lifecycle::SuspendedRestored,
            ),
        }
    }
}

/// What the VMM gets of a saved machine.
struct Saved {
    file: File,
    path: PathBuf,
    copy: bool,
}

impl Saved {
    fn of(from: &Origin) -> Result<Self> {
        let path = from.path.clone();
        let file = from
            .file
            .try_clone()
            .map_err(|e| Error::system(format!("cannot open '{}'", path.display()), &e))?;
        Ok(Self {
            file,
            path,
            copy: from.copy,
        })
    }
}

/// A process that was started, and what belongs to it.
struct Prepared {
    id: i32,
    definition: Definition,
    spawned: Spawned,
    control: StdUnixStream,
    record: Record,
    cleanup: Cleanup,
    names: Names,
    log: PathBuf,
    log_start: u64,
}

/// Removes what a start made, unless the start succeeds.
struct Cleanup {
    folder: Folder,
    made: Made,
    done: bool,
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        if !self.done {
            self.made.undo();
            self.folder.remove();
        }
    }
}

/// Starts `domain` with `definition`. The caller holds its job.
///
/// # Errors
/// Why it cannot run; nothing of the attempt is left then but lines in its log.
pub async fn start(
    driver: &Arc<Driver>,
    domain: &Pinned,
    definition: &Arc<Definition>,
    mut options: StartOptions,
) -> Result<()> {
    if domain.lock().live.is_some() {
        return Err(Error::invalid("domain is already running"));
    }
    let mut definition = Arc::clone(definition);
    let dropped = if startup_policy::is_stated(&definition) {
        let (driver, wanted) = (Arc::clone(driver), Arc::clone(&definition));
        let cold = options.from.is_none() && options.arriving.is_none();
        let (now, dropped) = super::blocking(move || {
            let mut now = Definition::clone(&wanted);
            let dropped = startup_policy::apply(&mut now, &driver.storage, cold);
            (now, dropped)
        })
        .await?;
        if !dropped.is_empty() {
            definition = Arc::new(now);
        }
        dropped
    } else {
        Vec::new()
    };
    let startable = definition.check_startable(&driver.host())?;
    let left_out = startable.left_out.iter().map(ToString::to_string).collect();
    let prepared = {
        let (driver, definition) = (Arc::clone(driver), Arc::clone(&definition));
        let from = options.from.as_ref().map(Saved::of).transpose()?;
        let autodestroy = options.autodestroy;
        let arriving = options.arriving.as_mut();
        let arriving = arriving.map(|a| (a.id, std::mem::take(&mut a.connections)));
        super::blocking(move || {
            prepare(&driver, &definition, left_out, autodestroy, from, arriving)
        })
        .await??
    };
    killpoint("start.spawned");
    let process = prepared.spawned.watch().map_err(|(error, spawned)| {
        let killed = spawned.kill();
        log::error!("cannot watch the VMM process: {error}; kill: {killed:?}");
        Error::system("cannot watch the VMM process", &error)
    })?;
    let process = Arc::new(process);
    let opened = control::open(prepared.control);
    let ready = match opened {
        Ok((control, mut frames)) => {
            let cancel = options.arriving.as_ref().map(|a| a.cancel.clone());
            wait_until_built(&control, &mut frames, &process, cancel)
                .await
                .map(|vcpus| (control, frames, vcpus))
        }
        Err(error) => Err(Failure::Said(error.to_string())),
    };
    let (control, frames, vcpus) = match ready {
        Ok(ready) => ready,
        Err(failure) => {
            end_process(&process).await;
            let why = failure.words(&prepared.cleanup.folder, &prepared.log, prepared.log_start);
            return Err(failure.error(&prepared.names.explain(&why)));
        }
    };
    let started = Started {
        id: prepared.id,
        definition: prepared.definition,
        record: prepared.record,
        cleanup: prepared.cleanup,
        process,
        control,
        frames,
        vcpus,
        dropped,
    };
    started.run(driver, domain, options).await
}

/// A machine that is built and waits for its first instruction.
struct Started {
    id: i32,
    definition: Definition,
    record: Record,
    cleanup: Cleanup,
    process: Arc<VmmProcess>,
    control: Control,
    frames: Frames,
    /// The vCPUs that it has, where it can tell.
    vcpus: Option<Vec<u32>>,
    /// What it does without, as its images are not there.
    dropped: Vec<DomainEvent>,
}

impl Started {
    async fn run(
        mut self,
        driver: &Arc<Driver>,
        domain: &Pinned,
        options: StartOptions,
    ) -> Result<()> {
        let folder = self.cleanup.folder.clone();
        let agent = channels::shut(&mut self.definition.devices.rest);
        if let Some(there) = &self.vcpus {
            // One that goes on has those that it had.
            vcpu_plug::are(&mut self.definition, there);
        }
        if options.from.as_ref().is_none_or(|from| !from.managed) {
            // One that was left from long ago must not be taken for this start's.
            saved_image::drop_taken(&driver.managed_save(&domain.name().name));
        }
        if options.arriving.is_none() {
            driver.forget_job(domain);
        }
        self.record.process = Some(self.process.identity());
        let written = folder
            .write_definition(&self.definition)
            .and_then(|()| self.record.write(&folder));
        if let Err(error) = written {
            end_process(&self.process).await;
            return Err(Error::system("cannot write the domain's state", &error));
        }
        killpoint("start.recorded");
        if let Some(from) = options.from.as_ref().filter(|from| from.managed)
            && let Err(error) = saved_image::take(&from.path)
        {
            end_process(&self.process).await;
            return Err(error);
        }
        killpoint("start.image-taken");
        // Before its first instruction, which memory of which node may depend on.
        let pid = self.process.identity().pid;
        if let Err(error) = place(&self.cleanup.made.groups, &self.definition, pid).await {
            end_process(&self.process).await;
            return Err(error);
        }
        self.cleanup.made.groups.mark_all_ready();
        let (ended_sender, ended) = watch_channel::channel(false);
        {
            let mut inner = domain.lock();
            inner.live = Some(Live {
                id: self.id,
                definition: Arc::new(self.definition),
                process: Arc::clone(&self.process),
                control: self.control.clone(),
                folder: folder.0,
                made: std::mem::take(&mut self.cleanup.made),
                disk_errors: Vec::new(),
                balloon_told: (None, false),
                dirty_rate: super::dirtyrate::DirtyRate::default(),
                autodestroy: options.autodestroy,
                destroying: false,
                suspended: false,
                rebooting: false,
                resetting: false,
                console: None,
                migration_ready: None,
                arrival: None,
                change_protection: false,
                settling: false,
                taken: Arc::default(),
                vcpus_change: self.vcpus.is_some(),
                vcpu_kept: None,
                next_image: self.record.next_image,
                block_jobs: Vec::new(),
                work: Work::default(),
                ended: ended.clone(),
            });
            inner.migration.is_new();
            // From here on its end is the watcher's business.
            self.cleanup.done = true;
            let (started, running, suspended) = Origin::told(&options);
            inner.state = if options.paused {
                State::Paused(match options.from {
                    _ if options.arriving.is_some() => PausedReason::Migration,
                    Some(Origin { snapshot: true, .. }) => PausedReason::FromSnapshot,
                    _ => PausedReason::User,
                })
            } else {
                State::Running(running)
            };
            let name = domain.name_in(&inner);
            let told = |event| driver.hub.emit(&name, &event);
            self.dropped.into_iter().for_each(told);
            if agent {
                // VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_DISCONNECTED, _REASON_DOMAIN_STARTED
                told(DomainEvent::AgentLifecycle(2, 1));
            }
            // One that arrives was told of when it was announced.
            if options.arriving.is_none() {
                // libvirt's clients know it so: processors run first, and then it is said what runs.
                if matches!(started, Lifecycle::StartedBooted) && !options.paused {
                    told(DomainEvent::Lifecycle(Lifecycle::ResumedUnpaused));
                }
                told(DomainEvent::Lifecycle(started));
                if options.paused {
                    told(DomainEvent::Lifecycle(suspended));
                } else if matches!(started, Lifecycle::StartedRestored) {
                    told(DomainEvent::Lifecycle(Lifecycle::ResumedFromSnapshot));
                }
            }
            driver.write_record(&inner);
        }
        tokio::spawn(watch::watch(
            watch::Watched {
                driver: Arc::clone(driver),
                domain: Arc::clone(domain),
                process: Arc::clone(&self.process),
                control: self.control.clone(),
                ended: ended_sender,
                catching_up: AtomicBool::new(false),
            },
            self.frames,
        ));
        if options.from.is_some() || options.arriving.is_some() {
            // Where it left them.
            let trays = driver.catch_up_media(domain, None).await;
            if let Err(error) = trays {
                log::warn!("domain '{}': its drives: {error}", domain.name().name);
            }
        }
        let managed = options.from.filter(|from| from.managed);
        if options.paused {
            if let Some(from) = &managed {
                saved_image::drop_taken(&from.path);
            }
            return Ok(());
        }
        if let Err(error) = self.control.call(Call::Resume, RESUME_LIMIT).await
            // A guest may be done before we hear that it began.
            && !(error == ControlError::Closed && ended_by_itself(ended.clone()).await)
        {
            let kill = self.process.kill();
            log::warn!(
                "domain '{}' did not begin: {error}; {kill:?}",
                domain.name().name
            );
            if let (Some(from), ControlError::Refused(_)) = (&managed, &error) {
                // Not an instruction of it has run.
                saved_image::give_back(&from.path);
            }
            return Err(Error::internal(format!("the guest did not begin: {error}")));
        }
        if let Some(from) = &managed {
            saved_image::drop_taken(&from.path);
        }
        Ok(())
    }
}

/// Puts the threads of a machine where they are to run.
async fn place(groups: &Groups, definition: &Definition, pid: u32) -> Result<()> {
    if groups.is_empty() && !vcpus::is_placed(definition) {
        return Ok(());
    }
    let (groups, definition) = (groups.clone(), definition.clone());
    super::blocking(move || {
        limits::place(&groups, &definition, pid)?;
        vcpus::place(&definition, pid)
    })
    .await?
}

async fn ended_by_itself(mut ended: watch_channel::Receiver<bool>) -> bool {
    let end = ended.wait_for(|&ended| ended);
    matches!(tokio::time::timeout(RESUME_LIMIT, end).await, Ok(Ok(_)))
}

/// Ends a process that never became a domain.
async fn end_process(process: &VmmProcess) {
    if let Err(error) = process.kill() {
        log::error!("cannot kill process {}: {error}", process.identity().pid);
    }
    if tokio::time::timeout(KILL_LIMIT, process.ended())
        .await
        .is_err()
    {
        log::error!("process {} does not end", process.identity().pid);
    }
}

/// Why a machine was not built.
enum Failure {
    /// Its process ended; it may have said why.
    Ended(Option<ExitRecord>),
    /// It took too long.
    TooLong,
    /// In words.
    Said(String),
    /// It did not come to be because somebody did not want it any more.
    GivenUp(&'static str),
}

impl Failure {
    /// For people: the VMM's own last words, where there are any.
    fn words(&self, folder: &Folder, log: &std::path::Path, log_start: u64) -> String {
        match self {
            Self::Said(words) => words.clone(),
            Self::GivenUp(why) => (*why).to_owned(),
            Self::TooLong => format!("no answer in {} seconds", START_LIMIT.as_secs()),
            Self::Ended(record) => record
                .clone()
                .or_else(|| folder.exit_record())
                .map(|record| record.message)
                .filter(|message| !message.is_empty())
                .or_else(|| last_line(log, log_start).ok().flatten())
                .unwrap_or_else(|| "it said nothing".to_owned()),
        }
    }

    fn error(&self, why: &str) -> Error {
        match self {
            Self::TooLong => Error::new(
                ErrorCode::OPERATION_TIMEOUT,
                format!("the VMM did not build the machine: {why}"),
            ),
            Self::GivenUp(why) => Error::new(ErrorCode::OPERATION_ABORTED, *why),
            _ => Error::internal(format!("the VMM ended before the guest began: {why}")),
        }
    }
}

/// Waits for the answer to a first question, which comes when the machine is built: the vCPUs it has.
async fn wait_until_built(
    control: &Control,
    frames: &mut Frames,
    process: &VmmProcess,
    cancel: Option<watch_channel::Receiver<Option<&'static str>>>,
) -> std::result::Result<Option<Vec<u32>>, Failure> {
    // One that comes from elsewhere takes as long as its memory takes to come; whoever moves it
    // says when to give up.
    let limit = cancel.is_none().then_some(START_LIMIT);
    let cancelled = async {
        match cancel {
            // Its sender goes only after it has told.
            Some(mut cancel) => match cancel.wait_for(Option::is_some).await {
                Ok(why) => why.unwrap_or("it was cancelled"),
                Err(_) => "it was cancelled",
            },
            None => std::future::pending().await,
        }
    };
    tokio::pin!(cancelled);
    let said = |error: &dyn std::fmt::Display| Failure::Said(error.to_string());
    let mut answer = control.send(Call::Query).map_err(|e| said(&e))?;
    let mut record = None;
    let wait = async {
        loop {
            tokio::select! {
                frame = frames.next() => match frame {
                    Ok(Some(FromVmm::Reply(reply))) => {
                        if let Some(waiting) = control.take(&reply) {
                            waiting.answer(reply.result);
                        }
                    }
                    Ok(Some(FromVmm::Event(Event::Exiting(exit)))) => record = Some(exit),
                    Ok(Some(FromVmm::Event(_))) => {}
                    Ok(None) => {
                        process.ended().await;
                        return Err(Failure::Ended(record));
                    }
                    Err(error) => return Err(said(&error)),
                },
                answered = &mut answer => return match answered {
                    Ok(Ok(Answer::Status(status))) => Ok(status.vcpus),
                    Ok(Ok(_)) => Ok(None),
                    Ok(Err(failure)) => Err(Failure::Said(failure.message)),
                    Err(_) => Err(Failure::Ended(None)),
                },
                _ = process.ended() => return Err(Failure::Ended(record)),
                why = &mut cancelled => return Err(Failure::GivenUp(why)),
            }
        }
    };
    match limit {
        Some(limit) => tokio::time::timeout(limit, wait)
            .await
            .unwrap_or(Err(Failure::TooLong)),
        None => wait.await,
    }
}

/// Opens everything and starts the process.
fn prepare(
    driver: &Driver,
    definition: &Definition,
    left_out: Vec<String>,
    autodestroy: bool,
    from: Option<Saved>,
    arriving: Option<(i32, Vec<OwnedFd>)>,
) -> Result<Prepared> {
    let cannot = |what: &str, error: &io::Error| Error::system(what, error);
    let (id, arriving) = match arriving {
        Some(announced) => announced,
        None => (driver.new_id()?, Vec::new()),
    };
    let uuid = definition.uuid.unwrap_or_default();
    let folder = Folder::make(driver.roots.live_domains().join(uuid.to_string()))
        .map_err(|e| cannot("cannot make the domain's state folder", &e))?;
    let mut cleanup = Cleanup {
        folder: folder.clone(),
        made: Made::default(),
        done: false,
    };
    let around = Surroundings {
        channels: driver.roots.channels(),
        folder: folder.0.clone(),
        logs: driver.roots.domain_logs(),
        taken_cids: driver.guest_cids(),
        secrets: Arc::clone(&driver.secrets),
        networks: Arc::clone(&driver.networks),
        owner: Owner {
            name: definition.name.clone(),
            uuid,
        },
        storage: Arc::clone(&driver.storage),
    };
    let machine = machine::build(definition, id, around)?;
    let Machine {
        mut config,
        definition,
        mut descriptors,
        mut names,
        made,
        next_image,
    } = machine;
    cleanup.made = made;
    cleanup.made.groups = limits::plan(driver, &definition, id)?;
    if let Some(Saved { file, path, copy }) = from {
        names.add(file.as_raw_fd(), path.display().to_string());
        config.restore = Some(RestoreConfig {
            image: Resource::Fd(file.as_raw_fd()),
            copy,
        });
        descriptors.push(file.into());
    }

    for (number, connection) in arriving.into_iter().enumerate() {
        names.add(
            connection.as_raw_fd(),
            format!("the migration's connection {number}"),
        );
        config.incoming.push(Resource::Fd(connection.as_raw_fd()));
        descriptors.push(connection);
    }

    let state = State::Paused(PausedReason::StartingUp);
    let made = cleanup.made.clone();
    let mut record = Record::new(id, driver.boot_id.clone(), state, autodestroy, made);
    record.next_image = next_image;
    record
        .write(&folder)
        .map_err(|e| cannot("cannot write the domain's state", &e))?;
    killpoint("start.prepared");
    let groups = &cleanup.made.groups;
    limits::make(groups, &definition)?;
    let entries = groups.entries()?;

    let listener = files::listen_unix(&folder.control())
        .map_err(|e| cannot("cannot make the control socket", &e))?;
    let control = files::connect_unix(&folder.control())
        .map_err(|e| cannot("cannot connect to the control socket", &e))?;
    let exit = create(&folder.exit()).map_err(|e| cannot("cannot make the exit record", &e))?;
    config.control = Some(Resource::Fd(listener.as_raw_fd()));
    config.exit_record = Some(Resource::Fd(exit.as_raw_fd()));
    descriptors.push(listener.into());
    descriptors.push(exit.into());
    write_config(&folder, &config)
        .map_err(|e| cannot("cannot write the VMM's configuration", &e))?;

    let log_path = driver
        .roots
        .domain_logs()
        .join(format!("{}.log", definition.name));
    let in_log = |e: &io::Error| Error::system(format!("cannot write {}", log_path.display()), e);
    let mut log = logger::open_log(&log_path).map_err(|e| in_log(&e))?;
    log.write_all(header(&config, &left_out).as_bytes())
        .map_err(|e| in_log(&e))?;
    let log_start = log.seek(SeekFrom::End(0)).map_err(|e| in_log(&e))?;
    let stat_copy =
        create(&folder.stat()).map_err(|e| cannot("cannot make the process record", &e))?;
    let vmm = driver.vmm.display().to_string();
    let spawned = vmm_process::spawn(Launch {
        program: &driver.vmm,
        config: &folder.config(),
        log,
        stat_copy,
        inherited: descriptors,
        groups: entries,
        policy: limits::policy(&definition),
    })
    .map_err(|e| Error::system(format!("cannot start '{vmm}'"), &e))?;
    Ok(Prepared {
        id,
        definition,
        spawned,
        control,
        record,
        cleanup,
        names,
        log: log_path,
        log_start,
    })
}

fn create(path: &std::path::Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

fn write_config(folder: &Folder, config: &MachineConfig) -> io::Result<()> {
    let json = serde_json::to_vec_pretty(config)?;
    files::write_atomically(&folder.config(), &json, Durability::Process)
}

/// The log's lines about a start.
fn header(config: &MachineConfig, left_out: &[String]) -> String {
    let now = logger::timestamp(SystemTime::now());
    let mut lines = format!(
        "{now}: starting up vireo version: {}, uuid: {}, cpu: {:?}, memory: {} KiB, vcpus: {}, serial ports: {}\n",
        env!("CARGO_PKG_VERSION"),
        config.uuid,
        config.backend,
        config.memory_bytes / 1024,
        config.vcpus,
        config.serials.len(),
    );
    for device in left_out {
        lines.push_str(&format!("{now}: left out of the machine: {device}\n"));
    }
    lines
}

/// The last line that is not empty after `start`, at most 1 KiB of it.
fn last_line(log: &std::path::Path, start: u64) -> io::Result<Option<String>> {
    const MOST: u64 = 1024;
    let mut file = File::open(log)?;
    let end = fs::metadata(log)?.len();
    file.seek(SeekFrom::Start(start.max(end.saturating_sub(MOST))))?;
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text
        .lines()
        .map(str::trim)
        .rfind(|l| !l.is_empty())
        .map(str::to_owned))
}
