//! What a target tells of a guest whose source does not know whether it has come: the line between them broke when it was
//! to change sides.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rpc::tls::TlsServer;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;
use vmm_api::migrate::{self, ASKS, Kind, Verdict};

use super::listener::{Listener, Stream};
use super::uri::Place;
use super::{Migrations, lock};
use crate::drivers::domain::Driver;
use crate::drivers::domain::object::Domain;
use crate::drivers::domain::state::State;

/// For how long it can be asked, unless whoever moves the guest takes its leave before, who then has heard of it.
const LINGER: Duration = Duration::from_secs(60);
/// The same where whoever moves the guest had taken its leave before it was known: the source asks all the time by then.
const SHORT_LINGER: Duration = Duration::from_secs(10);
/// How long one who asks waits for it to be known.
const PENDING_LIMIT: Duration = Duration::from_secs(60);
/// How long what is being said may take.
const LAST_LIMIT: Duration = Duration::from_secs(1);
/// Who ask at once.
const ASKING_MOST: usize = 8;
/// From one look at a guest whose VMM can't be asked to the next, and how long one looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
const LOOK_LIMIT: Duration = Duration::from_secs(600);

/// Where a source learns what became of a guest: as long as this lives.
#[derive(Debug)]
pub(super) struct Telling {
    mover: Arc<Mover>,
    /// Where the target listens.
    place: Place,
    /// Whether it has come.
    known: watch::Sender<Option<bool>>,
}

/// Whoever moves a guest.
#[derive(Debug)]
pub(super) struct Mover {
    /// Its connection.
    client: u64,
    has_left: AtomicBool,
}

/// What there is to be told.
#[derive(Debug, Clone)]
pub(super) struct Hears {
    mover: Arc<Mover>,
    known: watch::Receiver<Option<bool>>,
}

impl Telling {
    pub(super) fn hears(&self) -> Hears {
        Hears {
            mover: Arc::clone(&self.mover),
            known: self.known.subscribe(),
        }
    }
}

impl Hears {
    /// Comes back when nobody can want to know any more.
    async fn over(mut self) {
        if self.known.wait_for(Option::is_some).await.is_err() {
            return;
        }
        let linger = match self.mover.has_left.load(Ordering::Relaxed) {
            true => SHORT_LINGER,
            false => LINGER,
        };
        let forgotten = async { while self.known.changed().await.is_ok() {} };
        let _ = timeout(linger, forgotten).await;
    }
}

impl Migrations {
    /// What is to be told of a guest that this client moves to this place.
    pub(super) fn telling(&self, client: u64, place: Place) -> Telling {
        let mover = Arc::new(Mover {
            client,
            has_left: AtomicBool::new(false),
        });
        let mut all = lock(&self.movers);
        all.retain(|mover| mover.strong_count() > 0);
        all.push(Arc::downgrade(&mover));
        Telling {
            mover,
            place,
            known: watch::Sender::new(None),
        }
    }

    /// It is known whether a guest has come.
    pub(super) fn tell(&self, telling: Option<Telling>, came: bool) {
        let Some(telling) = telling else { return };
        telling.known.send_replace(Some(came));
        let mut all = lock(&self.told);
        all.retain(|telling| !telling.known.is_closed());
        all.push(telling);
    }

    /// Whoever has moved guests has taken its leave.
    pub(super) fn nobody_asks(&self, client: u64) {
        for mover in lock(&self.movers).iter().filter_map(Weak::upgrade) {
            if mover.client == client {
                mover.has_left.store(true, Ordering::Relaxed);
            }
        }
        lock(&self.told).retain(|telling| telling.mover.client != client);
    }

    /// Another guest is to come to the place that this URI names: whoever asks there has had the time to. Whether it has
    /// been taken until now.
    pub(super) fn make_way(&self, uri: Option<&str>) -> bool {
        let Some(Ok(wanted)) = uri.map(Place::parse) else {
            return false;
        };
        let is_it = |place: &Place| match (place, &wanted) {
            (Place::Unix(one), Place::Unix(other)) => one == other,
            (Place::Tcp { port: one, .. }, Place::Tcp { port: other, .. }) => one == other,
            _ => false,
        };
        let mut all = lock(&self.told);
        let before = all.len();
        all.retain(|telling| !is_it(&telling.place));
        all.len() < before
    }
}

impl Driver {
    /// The VMM of a guest that may have come can't be asked, but lives: what is seen of it later tells.
    pub(super) fn tell_what_is_seen(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        telling: Option<Telling>,
        id: i32,
    ) {
        let (driver, domain) = (Arc::clone(self), Arc::clone(domain));
        tokio::spawn(async move {
            let since = Instant::now();
            while since.elapsed() < LOOK_LIMIT {
                tokio::time::sleep(LOOK_INTERVAL).await;
                {
                    let inner = domain.lock();
                    let Some(live) = inner.live.as_ref().filter(|live| live.id == id) else {
                        // It has ended, and nobody heard whether it had run.
                        return;
                    };
                    let taken = live.taken.load(Ordering::Acquire) || inner.coming.is_none();
                    if !taken && !matches!(inner.state, State::Running(_)) {
                        continue;
                    }
                }
                driver.migrations.tell(telling, true);
                return;
            }
        });
    }
}

impl Listener {
    /// Answers those who ask what became of the guest, until nobody can want to know any more.
    pub(super) async fn tell(
        self,
        uuid: Uuid,
        token: String,
        tls: Option<TlsServer>,
        hears: Hears,
    ) {
        let over = hears.clone().over();
        tokio::pin!(over);
        let mut asking = JoinSet::new();
        loop {
            tokio::select! {
                () = &mut over => break,
                Some(_) = asking.join_next() => {}
                stream = self.accept(), if asking.len() < ASKING_MOST => match stream {
                    Ok(stream) => {
                        let (token, tls, known) = (token.clone(), tls.clone(), hears.known.clone());
                        asking.spawn(async move {
                            if let Err(error) = answer(stream, uuid, &token, tls, known).await {
                                log::debug!("whoever asks what became of a guest: {error}");
                            }
                        });
                    }
                    Err(error) => {
                        log::warn!("nobody can ask what became of a guest: {error}");
                        break;
                    }
                },
            }
        }
        drop(self);
        let _ = timeout(LAST_LIMIT, async {
            while asking.join_next().await.is_some() {}
        })
        .await;
    }
}

/// Answers one who asks; says nothing where nothing is known.
async fn answer(
    stream: Stream,
    uuid: Uuid,
    token: &str,
    tls: Option<TlsServer>,
    mut known: watch::Receiver<Option<bool>>,
) -> io::Result<()> {
    let introduced = stream.introduce(uuid, token, tls.as_ref()).await;
    let (mut stream, preamble) = introduced.map_err(io::Error::other)?;
    if preamble.index != ASKS {
        return Err(io::Error::other("it does not ask"));
    }
    let waiting = async {
        known
            .wait_for(Option::is_some)
            .await
            .map_or(None, |known| *known)
    };
    let came = timeout(PENDING_LIMIT, waiting).await.unwrap_or(None);
    let verdict = match came {
        Some(true) => Verdict::well(),
        Some(false) => Verdict::refused("the guest has not come, and will not"),
        None => return Ok(()),
    };
    let frame = migrate::json_frame(Kind::Verdict, &verdict).map_err(io::Error::other)?;
    let telling = stream.write_all(&frame);
    timeout(LAST_LIMIT, telling).await.unwrap_or(Ok(()))
}
