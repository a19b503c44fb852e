//! Where clients come in: two sockets always, ports if they are wanted.

use std::path::Path;
use std::sync::Arc;

use rpc::server::{Authorizer, Entrance, Server, SocketAccess};
use rpc::tls::TlsServer;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::config::{Auth, Config};
use crate::error::plain;
use crate::polkit::Polkit;
use crate::roots::Roots;
use crate::sockets;

/// What serves a socket or port.
pub type Serving = JoinHandle<std::io::Result<()>>;

/// Serves all that the settings say.
///
/// # Errors
/// What cannot be listened on, or which file is not as it should be.
pub async fn serve(
    server: &Server,
    roots: &Roots,
    config: &Config,
) -> Result<Vec<Serving>, String> {
    let polkit = |auth: Auth| -> Result<Option<Arc<dyn Authorizer>>, String> {
        match (auth, Polkit::find()) {
            (Auth::None, _) => Ok(None),
            (Auth::Polkit, Some(polkit)) => Ok(Some(Arc::new(polkit))),
            (Auth::Polkit, None) => {
                Err("the settings ask for polkit, but pkcheck is not installed".to_owned())
            }
        }
    };
    let auth_rw = config.auth_rw.unwrap_or_else(|| usual_auth(roots));
    if auth_rw == Auth::Polkit {
        log::info!("polkit decides who may use {}", roots.socket().display());
    }
    let rw_mode = match (auth_rw, config.rw_mode) {
        (_, Some(mode)) => Some(mode),
        // polkit decides.
        (Auth::Polkit, None) => Some(0o777),
        (Auth::None, None) => None,
    };
    let mut serving = Vec::new();
    for (path, access, auth, mode) in [
        (
            roots.socket(),
            SocketAccess::ReadWrite,
            auth_rw,
            sockets::Mode {
                group: Some(&config.group),
                mode: rw_mode,
            },
        ),
        (
            roots.read_only_socket(),
            SocketAccess::ReadOnly,
            config.auth_ro,
            sockets::Mode {
                group: None,
                mode: Some(config.ro_mode),
            },
        ),
    ] {
        let listener = sockets::listen(&path, &mode)
            .map_err(|e| format!("cannot listen on {}: {}", path.display(), plain(&e)))?;
        let entrance = Entrance {
            access,
            authorizer: polkit(auth)?,
        };
        let server = server.clone();
        serving.push(tokio::spawn(async move {
            server.serve_unix(listener, entrance).await
        }));
    }
    if let Some(address) = &config.tcp {
        serving.push(port(server, address, None).await?);
    }
    if let Some(address) = &config.tls {
        let tls = TlsServer::new(&config.tls_files).map_err(|e| e.to_string())?;
        if !config.tls_files.verify {
            log::warn!(
                "TLS clients need no certificate: everybody who reaches the port may do everything"
            );
        }
        serving.push(port(server, address, Some(tls)).await?);
    }
    Ok(serving)
}

/// The host's own daemon asks polkit where libvirt's actions are installed; others are one user's.
fn usual_auth(roots: &Roots) -> Auth {
    let host = roots.config == Path::new("/etc/vireo");
    if host && Polkit::find().is_some() && Polkit::knows_libvirt() {
        Auth::Polkit
    } else {
        Auth::None
    }
}

async fn port(server: &Server, address: &str, tls: Option<TlsServer>) -> Result<Serving, String> {
    let what = if tls.is_some() { "TLS" } else { "TCP" };
    let cannot = |e: std::io::Error| format!("cannot listen on {what} {address}: {}", plain(&e));
    let listener = TcpListener::bind(address).await.map_err(cannot)?;
    let bound = listener.local_addr().map_err(cannot)?;
    log::info!("serving {what} {bound}");
    let server = server.clone();
    Ok(tokio::spawn(async move {
        server
            .serve_tcp(listener, tls, SocketAccess::ReadWrite)
            .await
    }))
}
