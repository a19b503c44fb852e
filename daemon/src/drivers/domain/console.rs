//! A client at a domain's pseudo-terminal.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use rpc::stream::{Stream, serve_duplex};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use xml_schemas::domain::CharSource;

use super::Driver;
use super::object::{Domain, Inner};
use crate::error::{Error, Result, check_flags};

/// VIR_DOMAIN_CONSOLE_FORCE: whoever is there now is thrown out.
const FORCE: u32 = 1;
/// VIR_DOMAIN_CONSOLE_SAFE: only if nobody else can be there. Here that is always so.
const SAFE: u32 = 2;

impl Driver {
    /// Connects a client with a domain's console: its first one, or the device with that alias.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if the domain is off, VIR_ERR_OPERATION_FAILED if somebody is
    /// there already, VIR_ERR_INTERNAL_ERROR if there is no such device or it is no terminal.
    pub fn open_console(
        &self,
        domain: &Domain,
        device: Option<&str>,
        flags: u32,
        stream: Stream,
    ) -> Result<()> {
        check_flags(flags, FORCE | SAFE, "qemuDomainOpenConsole")?;
        let mut inner = domain.lock();
        let path = terminal(&inner, device)?;
        let cannot = |error: std::io::Error| {
            Error::system(format!("cannot open the domain's console {path}"), &error)
        };
        let live = inner.live_mut()?;
        let taken = live.console.as_ref().is_some_and(|held| !held.is_closed());
        if taken && flags & FORCE == 0 {
            return Err(Error::failed(
                "Active console session exists for this domain",
            ));
        }
        let terminal = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
            .open(&path)
            .map_err(cannot)?;
        // A terminal is waited for as a pipe is; only the name of the type says otherwise.
        let from = pipe::Receiver::from_file_unchecked(terminal.try_clone().map_err(cannot)?)
            .map_err(cannot)?;
        let to = pipe::Sender::from_file_unchecked(terminal).map_err(cannot)?;
        let (held, mut thrown_out) = oneshot::channel::<()>();
        // Dropping the earlier one's sender ends its session.
        live.console = Some(held);
        let name = inner.name.clone();
        drop(inner);
        tokio::spawn(async move {
            tokio::select! {
                served = serve_duplex(stream, from, to) => {
                    if let Err(error) = served {
                        log::debug!("console of domain '{name}': {error}");
                    }
                }
                _ = &mut thrown_out => {
                    log::info!("console of domain '{name}': taken over by another client");
                }
            }
        });
        Ok(())
    }
}

/// The path of the terminal meant.
fn terminal(inner: &Inner, device: Option<&str>) -> Result<String> {
    let devices = &inner.live()?.definition.devices;
    let all = || devices.serials.iter().chain(&devices.consoles);
    let found = match device {
        None => devices.consoles.first().or_else(|| devices.serials.first()),
        Some(alias) => all().find(|d| d.alias.as_deref() == Some(alias)),
    };
    let shown = device.unwrap_or("(default)");
    let Some(found) = found else {
        return Err(Error::internal(format!(
            "cannot find character device {shown}"
        )));
    };
    match &found.source {
        CharSource::Pty { path: Some(path) } => Ok(path.clone()),
        _ => Err(Error::internal(format!(
            "character device {} is not using a PTY",
            found.alias.as_deref().unwrap_or(shown)
        ))),
    }
}

impl Driver {
    /// Connects a client with a channel of the guest: its first one, or the one with that name or alias.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if the domain is off, VIR_ERR_INTERNAL_ERROR if there is no such
    /// channel or it is no socket of ours; whoever is at it already keeps it.
    pub async fn open_channel(
        &self,
        domain: &Domain,
        name: Option<&str>,
        flags: u32,
        stream: Stream,
    ) -> Result<()> {
        /// VIR_DOMAIN_CHANNEL_FORCE
        const CHANNEL_FORCE: u32 = 1;
        check_flags(flags, CHANNEL_FORCE, "qemuDomainOpenChannel")?;
        let path = {
            let inner = domain.lock();
            let devices = &inner.live()?.definition.devices;
            let mut channels = devices.rest.iter().filter(|e| e.name == "channel");
            let found = channels.find(|channel| {
                let target = channel.child("target").and_then(|t| t.attr("name"));
                let alias = channel.child("alias").and_then(|a| a.attr("name"));
                name.is_none_or(|name| target == Some(name) || alias == Some(name))
            });
            let shown = name.unwrap_or("(default)");
            let Some(found) = found else {
                return Err(Error::internal(format!("cannot find channel {shown}")));
            };
            let path = found.child("source").and_then(|source| source.attr("path"));
            match path.filter(|_| found.attr("type") == Some("unix")) {
                Some(path) => path.to_owned(),
                None => {
                    return Err(Error::internal(format!(
                        "channel {shown} is not using a UNIX socket"
                    )));
                }
            }
        };
        let socket = tokio::net::UnixStream::connect(&path).await;
        let socket = socket.map_err(|e| Error::system(format!("cannot connect to {path}"), &e))?;
        let (from, to) = socket.into_split();
        let name = domain.name().name;
        tokio::spawn(async move {
            if let Err(error) = serve_duplex(stream, from, to).await {
                log::debug!("channel of domain '{name}': {error}");
            }
        });
        Ok(())
    }
}
