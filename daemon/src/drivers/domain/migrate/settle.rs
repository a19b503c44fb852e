//! Who has a guest that was given away, when its VMM can't say: the line to the other side broke at that moment, or nothing
//! comes over it any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rpc::tls::TlsClient;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;
use uuid::Uuid;
use vmm_api::control::{Answer, Call, Failure};
use vmm_api::migrate::{self, ASKS, HEADER, Header, Kind, Preamble, Verdict};

use super::CONNECT_LIMIT;
use super::perform::reach;
use super::source::{Answered, Reply, is_undecided, so_far};
use super::uri::Place;
use crate::drivers::domain::Driver;
use crate::drivers::domain::lifecycle::ask;
use crate::drivers::domain::object::Domain;
use crate::drivers::domain::state::State;
use crate::error::{Error, Result};

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
pub(super) fn unknown() -> Error {
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

impl Target {
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
        let Some(answer) = answer else {
            return timeout(TOLD_LIMIT, reply).await.ok();
        };
        let job = so_far(answer);
        Some(Ok(match came {
            true => Ok(Answer::Job(Some(job))),
            false => Err(Failure {
                message: "the line to the other side broke when the guest was to change sides, and it has not come there"
                    .to_owned(),
                job: Some(job),
                undecided: Some(false),
            }),
        }))
    }
}

/// Whether this guest stands still.
fn stands_still(domain: &Domain, id: i32) -> bool {
    let inner = domain.lock();
    matches!(inner.state, State::Paused(_)) && inner.live.as_ref().is_some_and(|live| live.id == id)
}
