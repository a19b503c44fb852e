//! Who has a guest that was given away, when its VMM can't say: the line to the other side broke at that moment, or nothing
//! comes over it any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rpc::tls::TlsClient;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;
use uuid::Uuid;
use vmm_api::control::{Answer, Call, Failure};
use vmm_api::migrate::{self, ASKS, HEADER, Header, Kind, Preamble, Verdict};

use super::CONNECT_LIMIT;
use super::perform::reach;
use super::source::{Answered, BACK_LIMIT, Reply, is_undecided, so_far};
use super::uri::Place;
use crate::drivers::domain::Driver;
use crate::drivers::domain::lifecycle::ask;
use crate::drivers::domain::object::Domain;
use crate::drivers::domain::state::State;
use crate::error::{Error, Result};
use crate::killpoint::killpoint;

/// How long the target may take to know: the machine there may have to be given up first.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// From one attempt to ask it to the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// For how long it is asked.
const LIMIT: Duration = Duration::from_secs(600);
/// How long the VMM may take to say how it ended, when whoever moves the guest has said so.
const GRACE: Duration = Duration::from_secs(3);
/// How long it may take when it has been told.
const TOLD_LIMIT: Duration = Duration::from_secs(30);

/// What a user is told where nobody knows who has the guest.
pub(in crate::drivers::domain) fn unknown() -> Error {
    Error::failed(format!(
        "migration failed: {}; it stays paused here: if it does not run there, resume has it go on here; if it does, \
         destroy ends what is left of it here",
        migrate::UNKNOWN
    ))
}

/// Where a guest went, and what lets one in there.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) place: Place,
    pub(super) uuid: Uuid,
    pub(super) token: String,
    pub(super) secure: Option<(TlsClient, Option<String>)>,
}

/// The same, for the next daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::drivers::domain) struct TargetNote {
    place: String,
    token: String,
    /// Whether it is reached by TLS, and whose certificate it has to show then, if not its host's.
    tls: bool,
    name: Option<String>,
}

impl Target {
    pub(super) fn note(&self) -> TargetNote {
        TargetNote {
            place: self.place.to_string(),
            token: self.token.clone(),
            tls: self.secure.is_some(),
            name: self.secure.as_ref().and_then(|(_, name)| name.clone()),
        }
    }

    /// Whether the guest has come there.
    async fn has_it(&self) -> Result<bool> {
        let failed = |error: &dyn std::fmt::Display| Error::failed(error.to_string());
        let preamble = Preamble {
            uuid: self.uuid.to_string(),
            token: self.token.clone(),
            index: ASKS,
            total: 1,
        };
        let frame = migrate::json_frame(Kind::Preamble, &preamble).map_err(|e| failed(&e))?;
        let reaching = reach(&self.place, &frame, self.secure.as_ref());
        let fd = timeout(CONNECT_LIMIT, reaching).await;
        let fd = fd.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        // Any stream socket: the calls that are made on it are the same.
        let stream = fd.map(std::os::unix::net::UnixStream::from);
        let stream = stream.and_then(UnixStream::from_std);
        let mut stream = stream.map_err(|e| failed(&e))?;
        let answer = async {
            let mut head = [0; HEADER];
            stream.read_exact(&mut head).await?;
            let header = Header::decode(head).map_err(std::io::Error::other)?;
            if header.kind != Kind::Verdict {
                return Err(std::io::Error::other("no answer"));
            }
            let mut body = vec![0; header.len as usize];
            stream.read_exact(&mut body).await?;
            migrate::parse::<Verdict>(&body).map_err(std::io::Error::other)
        };
        let verdict = timeout(ANSWER_LIMIT, answer).await;
        let verdict = verdict.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        let verdict = verdict.map_err(|e| failed(&e))?;
        Ok(verdict.refused.is_none())
    }
}

/// Comes back when this has been said.
async fn when(said: &mut watch::Receiver<Option<bool>>, is: impl FnMut(&Option<bool>) -> bool) {
    if said.wait_for(is).await.is_err() {
        std::future::pending::<()>().await;
    }
}

impl Driver {
    /// The VMM's last word. Where it does not know who has the guest, or does not answer although whoever moves the guest
    /// has `said` whether it came, the target is asked, and the VMM told.
    pub(super) async fn last_word(
        self: &Arc<Self>,
        domain: &Domain,
        mut reply: Reply,
        target: &Target,
        mut said: watch::Receiver<Option<bool>>,
    ) -> Answered {
        let Some(id) = domain.lock().live.as_ref().map(|live| live.id) else {
            return reply.await;
        };
        let mut answer = tokio::select! {
            biased;
            answer = &mut reply => Some(answer),
            () = when(&mut said, Option::is_some) => timeout(GRACE, &mut reply).await.ok(),
        };
        let since = Instant::now();
        loop {
            self.is_settling(domain, id, answer.as_ref().is_some_and(is_undecided));
            if let Some(heard) = answer.take_if(|heard| !is_undecided(heard)) {
                return heard;
            }
            killpoint("migrate.undecided");
            let came = tokio::select! {
                biased;
                // Who says so has it from the target.
                () = when(&mut said, |said| *said == Some(true)) => Some(true),
                late = &mut reply, if answer.is_none() => {
                    answer = Some(late);
                    continue;
                }
                came = target.has_it() => {
                    let came = came.inspect_err(|error| {
                        log::debug!("domain '{}': the target does not say: {error}", domain.name().name);
                    });
                    came.ok()
                }
            };
            if !stands_still(domain, id) {
                // Somebody here has decided, or its end is about to be told.
                break;
            }
            if let Some(came) = came
                && let Some(settled) = self.settle(domain, &mut answer, &mut reply, came).await
            {
                self.is_settling(domain, id, false);
                return settled;
            }
            if since.elapsed() >= LIMIT {
                log::error!("domain '{}': {}", domain.name().name, unknown().message);
                break;
            }
            tokio::time::sleep(INTERVAL).await;
        }
        self.is_settling(domain, id, false);
        match answer {
            Some(answer) => answer,
            None => reply.await,
        }
    }

    /// As [`Driver::last_word`], of a guest that an earlier daemon gave away: the target is asked until it says whether it
    /// has it, or the VMM knows. Whether it has gone; none if nobody knows by the time that users are told so.
    pub(in crate::drivers::domain) async fn has_gone(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        id: i32,
        note: Option<&TargetNote>,
        was_running: bool,
    ) -> Option<bool> {
        let Some(target) = note.and_then(|note| self.target(domain, note)) else {
            return (!is_undecided_still(domain).await).then_some(false);
        };
        self.is_settling(domain, id, true);
        let (tell, mut told) = watch::channel(None);
        let (driver, asking) = (Arc::clone(self), Arc::clone(domain));
        tokio::spawn(async move {
            let name = asking.name().name;
            let since = Instant::now();
            while since.elapsed() < LIMIT && stands_still(&asking, id) {
                if !is_undecided_still(&asking).await {
                    break;
                }
                match target.has_it().await {
                    Ok(came) if stands_still(&asking, id) => {
                        log::info!(
                            "domain '{name}': the target has {}got it",
                            if came { "" } else { "not " }
                        );
                        match ask(&asking, Call::Settle { gone: came }).await {
                            Ok(_) => {
                                // Nobody may be waiting any longer.
                                let _ = tell.send(Some(came));
                                // Also where users were told by then that nobody knows.
                                if !came && was_running {
                                    driver.go_on(&asking).await;
                                }
                                break;
                            }
                            Err(error) => log::warn!("domain '{name}': {error}"),
                        }
                    }
                    Ok(_) => break,
                    Err(error) => log::debug!("domain '{name}': the target does not say: {error}"),
                }
                tokio::time::sleep(INTERVAL).await;
            }
            driver.is_settling(&asking, id, false);
        });
        // Its sender goes without a word where the VMM knew.
        let known = match timeout(BACK_LIMIT, told.wait_for(Option::is_some)).await {
            Ok(Ok(known)) => *known,
            Ok(Err(_)) | Err(_) => None,
        };
        match known {
            Some(_) => known,
            None => (!is_undecided_still(domain).await).then_some(false),
        }
    }

    fn target(&self, domain: &Domain, note: &TargetNote) -> Option<Target> {
        let found = || {
            let secure = match note.tls {
                false => None,
                true => {
                    let certificates = self.migrations.certificates.get_or_init(Default::default);
                    Some((certificates.client()?, note.name.clone()))
                }
            };
            Ok::<_, Error>(Target {
                place: Place::parse(&note.place)?,
                uuid: domain.uuid,
                token: note.token.clone(),
                secure,
            })
        };
        let cannot = |error: &Error| {
            let name = domain.name().name;
            log::warn!("domain '{name}': the target of its migration can't be asked: {error}");
        };
        found().inspect_err(cannot).ok()
    }

    /// Whether nobody is to decide by hand for now.
    fn is_settling(&self, domain: &Domain, id: i32, settling: bool) {
        let mut inner = domain.lock();
        if let Some(live) = inner.live.as_mut().filter(|live| live.id == id) {
            live.settling = settling;
        }
    }

    /// The target has said whether the guest came: the VMM hears of it. What is to be taken for its answer.
    async fn settle(
        &self,
        domain: &Domain,
        answer: &mut Option<Answered>,
        reply: &mut Reply,
        came: bool,
    ) -> Option<Answered> {
        let name = domain.name().name;
        log::info!(
            "domain '{name}': the target has {}got it",
            if came { "" } else { "not " }
        );
        if let Err(error) = ask(domain, Call::Settle { gone: came }).await {
            log::warn!("domain '{name}': {error}");
            if came || answer.is_none() {
                return None;
            }
        }
        let answer = match answer {
            Some(answer) => answer,
            None => {
                let late = timeout(TOLD_LIMIT, reply).await.ok()?;
                // Its line may have ended just before it heard.
                match is_undecided(&late) {
                    true => answer.insert(late),
                    false => return Some(late),
                }
            }
        };
        let job = so_far(answer);
        Some(Ok(match came {
            true => Ok(Answer::Job(Some(job))),
            false => Err(Failure {
                message: "the line to the other side broke when the guest was to change sides, and it has not come there"
                    .to_owned(),
                job: Some(job),
                undecided: Some(false),
                locked: false,
            }),
        }))
    }
}

/// Whether its VMM has given the guest away, and knows nothing more. One that does not answer may have ended: who watches
/// it tells.
pub(in crate::drivers::domain) async fn is_undecided_still(domain: &Domain) -> bool {
    match ask(domain, Call::Query).await {
        Ok(Answer::Status(status)) => status.undecided,
        Ok(_) => false,
        Err(_) => domain.lock().live.is_some(),
    }
}

/// Whether this guest stands still.
fn stands_still(domain: &Domain, id: i32) -> bool {
    let inner = domain.lock();
    matches!(inner.state, State::Paused(_)) && inner.live.as_ref().is_some_and(|live| live.id == id)
}
