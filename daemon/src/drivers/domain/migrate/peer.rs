//! Peer to peer: the source's daemon makes the calls on the target itself.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rpc::args::{
    ConnectSupportsFeatureArgs, DomainMigrateFinish3ParamsArgs, DomainMigratePrepare3ParamsArgs,
};
use rpc::client::{Client, ClientConfig, ClientError};
use rpc::procs::{self, Procedure};
use rpc::transport::Transport;
use rpc::uri::Parts;
use rpc::xdr::{Decode, Encode};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::source::{Begun, Kept};
use super::ssh::{self, Passing};
use super::{CONNECT_LIMIT, Params, flags, lock, tls};
use vmm_api::control::JobStatus;

use crate::drivers::domain::Driver;
use crate::drivers::domain::job as jobs;
use crate::drivers::domain::object::{Live, Pinned};
use crate::drivers::domain::state::State;
use crate::error::{Error, ErrorCode, Result};

/// VIR_DRV_FEATURE_MIGRATION_PARAMS
const FEATURE_PARAMS: i32 = 13;
/// Where daemons listen.
const TCP_PORT: u16 = 16509;
const TLS_PORT: u16 = 16514;
/// How long the target may take for one call, as long as it shows signs of life meanwhile.
const CALL_LIMIT: Duration = Duration::from_secs(120);
/// How long it may take to be there at all.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// How long it may go on about a guest that, as this side knows, does not come.
const LEFT_LIMIT: Duration = Duration::from_secs(5);

impl Driver {
    /// Moves a domain to the daemon at `uri`, all calls of it.
    ///
    /// # Errors
    /// It did not go; it runs on here.
    pub async fn migrate_to_peer(
        self: &Arc<Self>,
        domain: &Pinned,
        client: u64,
        uri: &str,
        params: &Params,
        flags: u64,
    ) -> Result<()> {
        let mut flags = flags;
        if matches!(domain.lock().state, State::Paused(_)) {
            // Whoever is paused here is to be paused there.
            flags |= flags::PAUSED;
        }
        let begun = self.migrate_begin(domain, client, params, flags).await?;
        // From now on it can be given up, and nobody else moves or changes it.
        let given_up = match flags & flags::OFFLINE {
            0 => {
                let job = domain.job_in_migration().await;
                job.and_then(|_job| self.job_begins(domain))
            }
            _ => Ok(Arc::default()),
        };
        let moved = match &given_up {
            Ok(given_up) => {
                let moving = self.move_begun(domain, client, uri, params, flags, begun, given_up);
                moving.await
            }
            Err(error) => Err(error.clone()),
        };
        self.end_protection(domain);
        if let (Err(error), Ok(own)) = (&moved, &given_up) {
            // What was in the way before the guest could move is told as a job that has failed, too.
            let goes_on = |live: &Live| Arc::ptr_eq(&live.work.given_up(), own);
            if domain.lock().live.as_ref().is_some_and(goes_on) {
                self.job_failed(domain, error, JobStatus::default());
            }
        }
        moved
    }

    #[expect(clippy::too_many_arguments, reason = "what was begun, and for whom")]
    async fn move_begun(
        self: &Arc<Self>,
        domain: &Pinned,
        client: u64,
        uri: &str,
        params: &Params,
        flags: u64,
        begun: Begun,
        given_up: &Notify,
    ) -> Result<()> {
        let reaching = async {
            let peer = Peer::connect(uri).await?;
            let args = ConnectSupportsFeatureArgs {
                feature: FEATURE_PARAMS,
            };
            let supported = peer.call(procs::CONNECT_SUPPORTS_FEATURE, &args).await?;
            if supported.supported == 0 {
                let text = format!("the daemon at '{uri}' does not know migration parameters");
                return Err(Error::new(ErrorCode::OPERATION_UNSUPPORTED, text));
            }
            Ok(peer)
        };
        let peer = jobs::unless(given_up, reaching).await?;
        let mut to_target = params.clone();
        to_target.dxml = Some(begun.xml);
        let prepare = DomainMigratePrepare3ParamsArgs {
            params: to_target.write().into(),
            cookie_in: begun.cookie.into(),
            flags: wire_flags(flags),
        };
        // A target whose Prepare is given up hears of it by the end of the connection.
        let preparing = peer.call(procs::DOMAIN_MIGRATE_PREPARE3_PARAMS, &prepare);
        let prepared = jobs::unless(given_up, preparing).await?;
        let mut own = params.clone();
        if prepared.uri_out.is_some() {
            own.uri = prepared.uri_out;
        }
        let performed = self
            .perform(domain, client, &own, flags, &prepared.cookie_out.0, true)
            .await;
        let name = match &params.dname {
            Some(name) => name.clone(),
            None => domain.name().name,
        };
        let finish = DomainMigrateFinish3ParamsArgs {
            params: vec![rpc::types::TypedParam::new(
                "destination_name",
                rpc::types::TypedValue::String(name),
            )]
            .into(),
            cookie_in: performed.clone().unwrap_or_default().into(),
            flags: wire_flags(flags),
            cancelled: i32::from(performed.is_err()),
        };
        let failed = {
            let all = lock(&self.migrations.outgoing);
            all.get(&domain.uuid)
                .map(|outgoing| outgoing.failed.clone())
        };
        let left = async {
            let known = async {
                let known = match failed {
                    Some(mut failed) => failed.wait_for(|&failed| failed).await.is_ok(),
                    None => false,
                };
                if !known {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = known => {}
                // Its VMM does not listen either.
                () = given_up.notified() => {}
            }
            tokio::time::sleep(LEFT_LIMIT).await;
        };
        let mut silent = false;
        let finished = tokio::select! {
            finished = peer.call(procs::DOMAIN_MIGRATE_FINISH3_PARAMS, &finish) => finished,
            () = left => {
                silent = true;
                Err(Error::new(
                    ErrorCode::OPERATION_TIMEOUT,
                    "the target's daemon does not say that the guest has not come",
                ))
            }
        };
        // What went wrong first is what the caller hears.
        if let Err(error) = performed {
            self.migrate_confirm(domain, flags, true).await?;
            peer.leave();
            return Err(error);
        }
        let persist_failed = |error: &Error| error.code == ErrorCode::MIGRATE_PERSIST_FAILED;
        match finished {
            Ok(_) => {
                self.migrate_confirm(domain, flags, false).await?;
                peer.leave();
                Ok(())
            }
            Err(error) if persist_failed(&error) => {
                let keep = flags & !flags::UNDEFINE_SOURCE;
                self.migrate_confirm(domain, keep, false).await?;
                peer.leave();
                Err(error)
            }
            Err(error) => {
                // If the target took it all the same, the two VMMs know.
                let kept = self.confirm(domain, flags, true).await?;
                if kept.as_ref().is_none_or(|kept| !kept.undecided) {
                    peer.leave();
                }
                if domain.lock().live.is_some() || flags & flags::OFFLINE != 0 {
                    // Who has given it up knows why, and so does the source where the target says nothing; and more than the target's words counts that nobody knows where it is.
                    let told = |kept: &Kept| {
                        kept.undecided || kept.error.code == ErrorCode::OPERATION_ABORTED || silent
                    };
                    return Err(kept.filter(told).map_or(error, |kept| kept.error));
                }
                if flags & (flags::PERSIST_DEST | flags::UNDEFINE_SOURCE) == 0 {
                    return Ok(());
                }
                let text = format!(
                    "the guest runs on the target, whose daemon did not finish, though: {}",
                    error.message
                );
                Err(Error::new(ErrorCode::MIGRATE_PERSIST_FAILED, text))
            }
        }
    }
}

/// The procedures have 32 bits of them.
fn wire_flags(flags: u64) -> u32 {
    u32::try_from(flags).unwrap_or(u32::MAX)
}

async fn call<T>(
    calling: impl Future<Output = std::result::Result<T, ClientError>>,
    limit: Duration,
) -> Result<T> {
    match timeout(limit, calling).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(ClientError::Remote(error))) => Err(Error {
            code: error.code,
            domain: error.domain,
            message: error.message().to_owned(),
        }),
        Ok(Err(error)) => Err(Error::failed(format!("the target's daemon: {error}"))),
        Err(_) => Err(Error::new(
            ErrorCode::OPERATION_TIMEOUT,
            format!(
                "the target's daemon has not answered for {} s",
                limit.as_secs()
            ),
        )),
    }
}

/// A daemon that was reached.
struct Peer {
    client: Client,
    /// ssh, where that passes on.
    passing: Option<Passing>,
}

impl Peer {
    async fn call<A: Encode, R: Decode>(&self, procedure: Procedure<A, R>, args: &A) -> Result<R> {
        call(self.client.call(procedure, args), CALL_LIMIT).await
    }

    /// Nothing more will be asked there.
    fn leave(self) {
        tokio::spawn(async move {
            if let Err(error) = self.client.close().await {
                log::debug!("the target's daemon: {error}");
            }
            drop(self.passing);
        });
    }

    /// Opens `qemu+unix:///system?socket=PATH`, or `qemu+tcp`, `qemu+tls` or `qemu+ssh` with a host (or `vireo+…`). A
    /// host without a transport means TLS.
    async fn connect(uri: &str) -> Result<Self> {
        let bad = |what: &str| {
            let text = format!("peer-to-peer migration to '{uri}': {what}");
            Error::new(ErrorCode::INVALID_ARG, text)
        };
        let parts = Parts::parse(uri).map_err(|error| bad(&error.to_string()))?;
        if !matches!(parts.driver, "qemu" | "vireo") {
            return Err(bad("only qemu and vireo are supported"));
        }
        let peer = Self::reach(uri, &parts, &bad).await?;
        let name = parts.name();
        let opened = call(peer.client.open(Some(&name), false), OPEN_LIMIT).await;
        match (opened, &peer.passing) {
            (Ok(()), _) => Ok(peer),
            (Err(error), Some(ssh)) => {
                let why = ssh.said().await.unwrap_or(error.message);
                let text = format!("cannot connect to '{uri}': {why}");
                Err(Error::new(ErrorCode::OPERATION_FAILED, text))
            }
            (Err(error), None) => Err(error),
        }
    }

    async fn reach(
        uri: &str,
        parts: &Parts<'_>,
        bad: &(dyn Fn(&str) -> Error + Sync),
    ) -> Result<Self> {
        let config = ClientConfig {
            connect_timeout: CONNECT_LIMIT,
            ..ClientConfig::default()
        };
        let unreachable = |error: ClientError| {
            let text = format!("cannot connect to '{uri}': {error}");
            Error::new(ErrorCode::OPERATION_FAILED, text)
        };
        let mut passing = None;
        let client = match parts.transport {
            Some("unix") => {
                let socket = parts.option("socket");
                let socket = socket.ok_or_else(|| bad("the socket is missing"))?;
                let connecting = Client::connect_unix(socket, config).await;
                connecting.map_err(unreachable)?
            }
            Some("ssh") if !parts.host.is_empty() => {
                if parts.option("command").is_some() {
                    return Err(bad("a daemon runs no other command than ssh"));
                }
                let (client, ssh) = ssh::connect(parts, config)?;
                passing = Some(ssh);
                client
            }
            Some("tcp" | "tls") | None if !parts.host.is_empty() => {
                let private = parts.transport != Some("tcp");
                let usual = if private { TLS_PORT } else { TCP_PORT };
                let (host, port) = (&parts.host, parts.port.unwrap_or(usual));
                let connecting = TcpStream::connect((host.as_str(), port));
                let connecting = timeout(CONNECT_LIMIT, connecting).await;
                let stream =
                    connecting.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
                let stream = stream.map_err(|error| unreachable(error.into()))?;
                if private {
                    let folder = parts.option("pkipath").map(std::path::Path::new);
                    let client = tls::client_of_daemons(folder, !parts.flag("no_verify"))?;
                    let secured = timeout(CONNECT_LIMIT, client.connect(host, stream)).await;
                    let secured =
                        secured.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
                    Client::new(secured.map_err(|e| unreachable(e.into()))?, config)
                } else {
                    Client::new(Transport::new(stream), config)
                }
            }
            Some("tcp" | "tls" | "ssh") | None => return Err(bad("the host is missing")),
            Some(other) => {
                return Err(bad(&format!(
                    "transport '{other}' is not supported between daemons: there are unix, tcp, tls and ssh"
                )));
            }
        };
        Ok(Self { client, passing })
    }
}
