//! Peer to peer: the source's daemon makes the calls on the target itself.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rpc::args::{
    ConnectSupportsFeatureArgs, DomainMigrateFinish3ParamsArgs, DomainMigratePrepare3ParamsArgs,
};
use rpc::client::{Client, ClientConfig, ClientError};
use rpc::procs;
use rpc::transport::Transport;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::source::Begun;
use super::{CONNECT_LIMIT, Params, flags, tls};
use crate::drivers::domain::Driver;
use crate::drivers::domain::object::Pinned;
use crate::drivers::domain::state::State;
use crate::error::{Error, ErrorCode, Result};

/// VIR_DRV_FEATURE_MIGRATION_PARAMS
const FEATURE_PARAMS: i32 = 13;
/// Where daemons listen.
const TCP_PORT: u16 = 16509;
const TLS_PORT: u16 = 16514;
/// How long the target may take for one call.
const CALL_LIMIT: Duration = Duration::from_secs(120);

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
        let moved = self.move_begun(domain, client, uri, params, flags, begun);
        let moved = moved.await;
        self.end_protection(domain);
        moved
    }

    async fn move_begun(
        self: &Arc<Self>,
        domain: &Pinned,
        client: u64,
        uri: &str,
        params: &Params,
        flags: u64,
        begun: Begun,
    ) -> Result<()> {
        let peer = connect(uri).await?;
        let args = ConnectSupportsFeatureArgs {
            feature: FEATURE_PARAMS,
        };
        let supported = call(peer.call(procs::CONNECT_SUPPORTS_FEATURE, &args)).await?;
        if supported.supported == 0 {
            let text = format!("the daemon at '{uri}' does not know migration parameters");
            return Err(Error::new(ErrorCode::OPERATION_UNSUPPORTED, text));
        }
        let mut to_target = params.clone();
        to_target.dxml = Some(begun.xml);
        let prepare = DomainMigratePrepare3ParamsArgs {
            params: to_target.write().into(),
            cookie_in: begun.cookie.into(),
            flags: wire_flags(flags),
        };
        let prepared = call(peer.call(procs::DOMAIN_MIGRATE_PREPARE3_PARAMS, &prepare)).await?;
        let mut own = params.clone();
        if prepared.uri_out.is_some() {
            own.uri = prepared.uri_out;
        }
        let performed = self
            .migrate_perform(domain, client, &own, flags, &prepared.cookie_out.0)
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
        let finished = call(peer.call(procs::DOMAIN_MIGRATE_FINISH3_PARAMS, &finish)).await;
        // What went wrong first is what the caller hears.
        if let Err(error) = performed {
            self.migrate_confirm(domain, flags, true).await?;
            return Err(error);
        }
        let persist_failed = |error: &Error| error.code == ErrorCode::MIGRATE_PERSIST_FAILED;
        match finished {
            Ok(_) => self.migrate_confirm(domain, flags, false).await,
            Err(error) if persist_failed(&error) => {
                let keep = flags & !flags::UNDEFINE_SOURCE;
                self.migrate_confirm(domain, keep, false).await?;
                Err(error)
            }
            Err(error) => {
                // If the target took it all the same, the two VMMs know.
                self.migrate_confirm(domain, flags, true).await?;
                if domain.lock().live.is_some() || flags & flags::OFFLINE != 0 {
                    return Err(error);
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

/// `HOST[:PORT]`, an IPv6 address in brackets.
fn host_and_port(place: &str, usual: u16) -> Option<(String, u16)> {
    let (host, port) = match place.strip_prefix('[') {
        Some(inner) => {
            let (host, after) = inner.split_once(']')?;
            (host, after.strip_prefix(':'))
        }
        None => match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    let port = port.map_or(Some(usual), |port| port.parse().ok())?;
    Some((host.to_owned(), port))
}

/// The procedures have 32 bits of them.
fn wire_flags(flags: u64) -> u32 {
    u32::try_from(flags).unwrap_or(u32::MAX)
}

async fn call<T>(calling: impl Future<Output = std::result::Result<T, ClientError>>) -> Result<T> {
    match timeout(CALL_LIMIT, calling).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(ClientError::Remote(error))) => Err(Error {
            code: error.code,
            domain: error.domain,
            message: error.message().to_owned(),
        }),
        Ok(Err(error)) => Err(Error::failed(format!("the target's daemon: {error}"))),
        Err(_) => Err(Error::new(
            ErrorCode::OPERATION_TIMEOUT,
            "the target's daemon does not answer",
        )),
    }
}

/// Opens `qemu+unix:///system?socket=PATH`, `qemu+tcp://HOST[:PORT]/system` or
/// `qemu+tls://HOST[:PORT]/system` (or `vireo+…`). A host without a transport means TLS.
async fn connect(uri: &str) -> Result<Client> {
    let bad = |what: &str| {
        let text = format!("peer-to-peer migration to '{uri}': {what}");
        Error::new(ErrorCode::INVALID_ARG, text)
    };
    let (scheme, rest) = uri
        .split_once("://")
        .ok_or_else(|| bad("it is no URI of a daemon"))?;
    let (driver, transport) = scheme.split_once('+').unwrap_or((scheme, ""));
    if !matches!(driver, "qemu" | "vireo") {
        return Err(bad("only qemu and vireo are supported"));
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (host, path) = place.split_once('/').unwrap_or((place, "system"));
    let name = format!("{driver}:///{path}");
    let config = ClientConfig {
        connect_timeout: CONNECT_LIMIT,
        ..ClientConfig::default()
    };
    let unreachable = |error: ClientError| {
        let text = format!("cannot connect to '{uri}': {error}");
        Error::new(ErrorCode::OPERATION_FAILED, text)
    };
    let client = match transport {
        "unix" => {
            let socket = query
                .split('&')
                .find_map(|pair| pair.strip_prefix("socket="))
                .ok_or_else(|| bad("the socket is missing"))?;
            let connecting = Client::connect_unix(socket, config).await;
            connecting.map_err(unreachable)?
        }
        "tcp" | "tls" | "" if !host.is_empty() => {
            let private = transport != "tcp";
            let usual = if private { TLS_PORT } else { TCP_PORT };
            let (host, port) = host_and_port(host, usual).ok_or_else(|| bad("its port is none"))?;
            let connecting = TcpStream::connect((host.as_str(), port));
            let connecting = timeout(CONNECT_LIMIT, connecting).await;
            let stream = connecting.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
            let stream = stream.map_err(|error| unreachable(error.into()))?;
            let option = |name: &str| {
                let mut all = query.split('&').filter_map(|pair| pair.split_once('='));
                all.find(|(key, _)| *key == name).map(|(_, value)| value)
            };
            if private {
                let verify = option("no_verify").is_none_or(|value| value == "0");
                let folder = option("pkipath").map(std::path::Path::new);
                let client = tls::client_of_daemons(folder, verify)?;
                let secured = client.connect(&host, stream).await;
                Client::new(secured.map_err(|e| unreachable(e.into()))?, config)
            } else {
                Client::new(Transport::new(stream), config)
            }
        }
        other => {
            return Err(bad(&format!(
                "transport '{other}' is not supported between daemons: there are unix, tcp and tls"
            )));
        }
    };
    call(client.open(Some(&name), false)).await?;
    Ok(client)
}
