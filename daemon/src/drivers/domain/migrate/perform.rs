//! The side that a guest leaves: Perform, which moves it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rpc::tls::TlsClient;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use vmm_api::control::{Answer, Call, JobStatus, MigrateOptions};
use vmm_api::migrate::{self, Kind, Preamble};

use super::settle::Target;
use super::source::{Outgoing, Reply, is_undecided, refusal, so_far};
use super::uri::Place;
use super::{CONNECT_LIMIT, Params, check, flags, lock, storage, tls};
use crate::drivers::domain::Driver;
use crate::drivers::domain::block_jobs::without_block_job;
use crate::drivers::domain::job as jobs;
use crate::drivers::domain::lifecycle::ask;
use crate::drivers::domain::object::Pinned;
use crate::drivers::domain::state::State;
use crate::drivers::domain::tuning;
use crate::error::{Error, ErrorCode, Result};
use crate::killpoint::killpoint;

impl Driver {
    /// Perform: moves the guest to the target that was prepared. On return both stand still, and
    /// the target may take it.
    ///
    /// # Errors
    /// It did not go; the guest runs on here.
    pub async fn migrate_perform(
        self: &Arc<Self>,
        domain: &Pinned,
        client: u64,
        params: &Params,
        flags: u64,
        cookie: &[u8],
    ) -> Result<Vec<u8>> {
        let begun = self.goes_on_with(domain, client)?;
        let performing = self.perform(domain, client, params, flags, cookie, begun);
        let performed = performing.await;
        if let (Err(error), true) = (&performed, begun) {
            // Where it has not ended yet.
            self.job_failed(domain, error, JobStatus::default());
        }
        performed
    }

    /// As [`Driver::migrate_perform`]; where it is `begun`, the job has begun, and is the caller's to end.
    pub(super) async fn perform(
        self: &Arc<Self>,
        domain: &Pinned,
        client: u64,
        params: &Params,
        flags: u64,
        cookie: &[u8],
        begun: bool,
    ) -> Result<Vec<u8>> {
        check(flags)?;
        if flags & flags::OFFLINE != 0 {
            return Ok(Vec::new());
        }
        let place = Place::parse(params.uri.as_deref().ok_or_else(|| {
            Error::new(
                ErrorCode::INVALID_ARG,
                "the target gave no URI for the guest",
            )
        })?)?;
        let job = domain.job_in_migration().await?;
        let limits = {
            let inner = domain.lock();
            let live = inner.live()?;
            if !begun {
                live.work.check_none()?;
            }
            self.check_protection(domain.uuid, live.change_protection, client)?;
            inner.migration
        };
        without_block_job(domain).await?;
        let along = {
            let inner = domain.lock();
            storage::chosen(&inner.live()?.definition, params, flags)?
        };
        let secure = match flags & flags::TLS {
            0 => None,
            _ => {
                let certificates = self.migrations.certificates.get_or_init(Default::default);
                let client = certificates.client()?;
                Some((client, params.tls_destination.clone()))
            }
        };
        let options = MigrateOptions {
            bandwidth: match params.bandwidth {
                Some(mib) if mib > 0 => mib.saturating_mul(1 << 20),
                _ => limits.bandwidth,
            },
            downtime_ms: limits.downtime_ms,
            zstd_level: params.packing(flags)?,
            auto_converge: params.converge(flags)?,
            direct: false,
            disks: along
                .iter()
                .map(|disk| tuning::id(disk.alias.as_ref()))
                .collect::<Result<_>>()?,
            incremental: flags & flags::NON_SHARED_INC != 0,
        };
        let connections = params.connections(flags)?;
        let given_up = match begun {
            true => domain.lock().live()?.work.given_up(),
            false => self.job_begins(domain)?,
        };
        killpoint("migrate.connecting");
        let token = String::from_utf8_lossy(cookie).into_owned();
        let target = Target {
            place,
            uuid: domain.uuid,
            token,
            secure,
        };
        let connecting = connect(&target, connections);
        let (control, was_running, ready, sockets) = {
            let connected = jobs::unless(&given_up, connecting).await;
            killpoint("migrate.connected");
            let (ready_sender, ready) = oneshot::channel();
            let mut inner = domain.lock();
            let running = matches!(inner.state, State::Running(_));
            let begun = connected.and_then(|sockets| {
                let live = inner.live_mut()?;
                live.migration_ready = Some(ready_sender);
                Ok((live.control.clone(), running, ready, sockets))
            });
            drop(inner);
            begun.inspect_err(|error| self.job_failed(domain, error, JobStatus::default()))?
        };
        let failed = async |error: Error, status: JobStatus, undecided: bool| {
            self.job_failed(domain, &error, status);
            // It was paused for this only, or its disks are still the other side's.
            if was_running && !undecided {
                self.go_on(domain).await;
            }
            error
        };
        if flags & flags::LIVE == 0
            && was_running
            && let Err(error) = ask(domain, Call::Pause).await
        {
            return Err(failed(error, JobStatus::default(), false).await);
        }
        let reply = match control.send_with(Call::Migrate(options), sockets) {
            Ok(reply) => reply,
            Err(error) => {
                return Err(failed(jobs::not_begun(error), JobStatus::default(), false).await);
            }
        };
        let mut reply = reply;
        killpoint("migrate.moving");
        // From here on the VMM itself refuses what can't be done meanwhile; what can (a suspend,
        // say) does not wait for the end.
        drop(job);
        let unheard = tokio::select! {
            biased;
            Ok(()) = ready => None,
            answer = &mut reply => {
                let (status, undecided) = (so_far(&answer), is_undecided(&answer));
                return Err(failed(refusal(answer), status, undecided).await);
            }
            () = given_up.notified() => Some(jobs::cancelled()),
            error = jobs::silence(domain) => Some(error),
        };
        if let Some(error) = unheard {
            // It hears of that when it listens again; the target, and whoever moves the guest, do not wait for it.
            let _ = control.send(Call::AbortJob);
            drop(self.heed(domain, reply, was_running, target));
            self.job_failed(domain, &error, JobStatus::default());
            return Err(error);
        }
        let status = match ask(domain, Call::JobStatus).await {
            Ok(Answer::Job(Some(status))) => status,
            _ => JobStatus::default(),
        };
        self.note_job_so_far(domain, status, target.note());
        killpoint("migrate.performed");
        let heard = self.heed(domain, reply, was_running, target);
        lock(&self.migrations.outgoing).insert(
            domain.uuid,
            Outgoing {
                client,
                reply: Some(heard.reply),
                was_running,
                failed: heard.failed,
                said: heard.said,
            },
        );
        serde_json::to_vec(&status).map_err(|error| Error::internal(error.to_string()))
    }

    /// The VMM's last word is waited for from now on, or the target's: where nothing comes of the migration, the guest goes
    /// on at once, whenever somebody confirms that.
    fn heed(
        self: &Arc<Self>,
        domain: &Pinned,
        reply: Reply,
        was_running: bool,
        target: Target,
    ) -> Heard {
        let (pass_on, passed) = oneshot::channel();
        let (tell, failed) = watch::channel(false);
        let (said, hears) = watch::channel(None);
        let driver = Arc::clone(self);
        let domain = Arc::clone(&**domain);
        tokio::spawn(async move {
            let answer = driver.last_word(&domain, reply, &target, hears).await;
            if let Ok(Err(_)) = &answer {
                // Nobody may be interested.
                let _ = tell.send(true);
                if was_running && !is_undecided(&answer) {
                    driver.go_on(&domain).await;
                }
            }
            if let Ok(answer) = answer {
                let _ = pass_on.send(answer);
            }
        });
        Heard {
            reply: passed,
            failed,
            said,
        }
    }
}

/// What is heard of a guest that has gone as far as it can.
struct Heard {
    /// Who has it.
    reply: Reply,
    /// Becomes true if it is this side.
    failed: watch::Receiver<bool>,
    /// Whoever moves it says whether it came.
    said: watch::Sender<Option<bool>>,
}

/// Connects to the target and says who comes.
async fn connect(target: &Target, total: u32) -> Result<Vec<OwnedFd>> {
    let place = &target.place;
    let cannot = |error: &std::io::Error| {
        Error::system(
            format!("unable to connect to the target at '{place}'"),
            error,
        )
    };
    let mut sockets = Vec::new();
    for index in 0..total {
        let preamble = Preamble {
            uuid: target.uuid.to_string(),
            token: target.token.clone(),
            index,
            total,
        };
        let frame = migrate::json_frame(Kind::Preamble, &preamble)
            .map_err(|error| Error::internal(error.to_string()))?;
        let connecting = reach(place, &frame, target.secure.as_ref());
        let socket = timeout(CONNECT_LIMIT, connecting).await;
        let socket = socket.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        sockets.push(socket.map_err(|error| cannot(&error))?);
    }
    Ok(sockets)
}

/// A connection to the target, which begins with these bytes.
pub(super) async fn reach(
    place: &Place,
    first: &[u8],
    secure: Option<&(TlsClient, Option<String>)>,
) -> std::io::Result<OwnedFd> {
    Ok(match place {
        Place::Unix(path) => {
            let mut stream = UnixStream::connect(path).await?;
            match secure {
                Some(secure) => seal(stream, secure, "localhost", first).await?,
                None => {
                    stream.write_all(first).await?;
                    stream.into_std()?.into()
                }
            }
        }
        Place::Tcp { host, port } => {
            let port = port.ok_or(std::io::ErrorKind::AddrNotAvailable)?;
            let mut stream = TcpStream::connect((host.as_str(), port)).await?;
            stream.set_nodelay(true)?;
            match secure {
                Some(secure) => seal(stream, secure, host, first).await?,
                None => {
                    stream.write_all(first).await?;
                    stream.into_std()?.into()
                }
            }
        }
    })
}

/// TLS over a connection, which begins with these bytes.
async fn seal(
    stream: impl tls::Stream + 'static,
    (client, name): &(TlsClient, Option<String>),
    host: &str,
    first: &[u8],
) -> std::io::Result<OwnedFd> {
    let mut stream = client
        .secure(name.as_deref().unwrap_or(host), stream)
        .await?;
    stream.write_all(first).await?;
    stream.flush().await?;
    tls::join(stream)
}
