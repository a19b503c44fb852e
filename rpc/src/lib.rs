//! libvirt's wire protocol, both sides of it: XDR, messages, procedures, client, server, raw data streams, events.
//!
//! | module | what is in it |
//! |---|---|
//! | [`procs`] | one typed constant a procedure (`procs::DOMAIN_CREATE`), and the table of all 453 |
//! | [`args`] | one struct for what a procedure takes and answers (`DomainCreateArgs`) |
//! | [`types`] | references to domains, networks, ...; typed parameters |
//! | [`error`] | the error that crosses the wire, its codes and domains |
//! | [`server`] | connections, calls, the [`server::Router`] from procedures to functions, events |
//! | [`client`] | connecting, calling, event reception |
//! | [`stream`] | raw data behind a call: consoles, uploads, downloads |
//! | [`tls`] | certificates on both sides |
//! | [`uri`], [`ssh`] | what a connection URI says, and the command that it means |
//! | [`frame`], [`xdr`], [`transport`], [`limits`] | what the others are made of |
//!
//! # A server
//!
//! A procedure is one async function of the call and its arguments. The [`server::Router`] decodes and encodes;
//! the server answers whatever nobody registered with "unknown procedure", refuses what a read-only connection may not
//! do, and serves nothing but what belongs there before the connection is opened.
//!
//! ```no_run
//! use rpc::args::{DomainGetStateArgs, DomainGetStateRet};
//! use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
//! use rpc::server::{Call, Router, Server, ServerConfig, SocketAccess};
//! use rpc::procs;
//!
//! struct Daemon;
//!
//! async fn open(_call: Call<Daemon>, _args: rpc::args::ConnectOpenArgs) -> Result<(), RemoteError> {
//!     Ok(())
//! }
//!
//! async fn get_state(call: Call<Daemon>, args: DomainGetStateArgs) -> Result<DomainGetStateRet, RemoteError> {
//!     let daemon: &Daemon = call.state();
//!     # let _ = daemon;
//!     Err(RemoteError::new(ErrorCode::NO_DOMAIN, ErrorDomain::QEMU, format!("no domain named '{}'", args.dom.name)))
//! }
//!
//! async fn run() -> std::io::Result<()> {
//!     let router = Router::new(Daemon).on(procs::CONNECT_OPEN, open).on(procs::DOMAIN_GET_STATE, get_state);
//!     let server = Server::new(router, ServerConfig::default());
//!     let listener = tokio::net::UnixListener::bind("/run/example/sock")?;
//!     server.serve_unix(listener, SocketAccess::ReadWrite).await
//! }
//! ```
//!
//! A procedure with raw data is registered by [`server::Router::on_stream`]; its function gets a [`stream::Stream`],
//! hands it to a task, and returns. Data flow once the answer has been sent. Events: keep the [`server::Connection`] of
//! the call that registered, and use [`server::Connection::send_event`]; forget it when
//! [`server::Connection::closed`] resolves, or in the function given to [`server::Router::on_disconnect`].
//!
//! # A client
//!
//! ```no_run
//! use rpc::client::{Client, ClientConfig};
//! use rpc::args::DomainLookupByNameArgs;
//! use rpc::procs;
//!
//! async fn run() -> Result<(), rpc::client::ClientError> {
//!     let client = Client::connect_unix("/run/vireo/vireo-sock", ClientConfig::default()).await?;
//!     client.open(Some("vireo:///system"), false).await?;
//!     let dom = client.call(procs::DOMAIN_LOOKUP_BY_NAME, &DomainLookupByNameArgs { name: "x".into() }).await?.dom;
//!     println!("{}", dom.id);
//!     client.close().await
//! }
//! ```

pub mod args;
pub mod client;
pub mod error;
pub mod frame;
mod keepalive;
pub mod limits;
pub mod procs;
mod queue;
pub mod server;
pub mod ssh;
pub mod stream;
pub mod tls;
pub mod transport;
pub mod types;
pub mod uri;
pub mod xdr;
