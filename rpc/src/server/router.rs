//! From procedures to functions.

use std::collections::HashMap;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Connection, Request, Response, ResponseFuture, Service};
use crate::error::{ErrorCode, ErrorDomain, RemoteError};
use crate::procs::Procedure;
use crate::stream::Stream;
use crate::xdr::{Decode, Encode, XdrError, from_bytes, to_bytes};

/// One call as a function sees it. `S` is what all functions share: the daemon.
#[derive(Debug)]
pub struct Call<S> {
    state: Arc<S>,
    connection: Connection,
    fds: Arc<Mutex<Fds>>,
}

#[derive(Debug, Default)]
struct Fds {
    came: Vec<OwnedFd>,
    go: Vec<OwnedFd>,
}

impl<S> Clone for Call<S> {
    fn clone(&self) -> Self {
        Call {
            state: Arc::clone(&self.state),
            connection: self.connection.clone(),
            fds: Arc::clone(&self.fds),
        }
    }
}

impl<S> Call<S> {
    /// What all functions share.
    pub fn state(&self) -> &Arc<S> {
        &self.state
    }

    /// The connection that the call came on.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Takes the descriptors that came with the call.
    pub fn take_fds(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds.lock().unwrap_or_else(PoisonError::into_inner).came)
    }

    /// Sends these descriptors with the answer.
    pub fn answer_with_fds(&self, fds: Vec<OwnedFd>) {
        self.fds
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .go
            .extend(fds);
    }
}

type Handler<S> = Box<dyn Fn(Call<S>, Request) -> ResponseFuture + Send + Sync>;
type Hook<S> = Box<dyn Fn(&Arc<S>, &Connection) + Send + Sync>;

/// A [`Service`] of one async function a procedure.
///
/// Parts of a daemon register their own: `fn routes(router: Router<Daemon>) -> Router<Daemon>`.
pub struct Router<S> {
    state: Arc<S>,
    handlers: HashMap<i32, Handler<S>>,
    gone: Option<Hook<S>>,
}

impl<S> std::fmt::Debug for Router<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router")
            .field("procedures", &self.procedures())
            .finish_non_exhaustive()
    }
}

impl<S: Send + Sync + 'static> Router<S> {
    /// A router without procedures.
    pub fn new(state: impl Into<Arc<S>>) -> Self {
        Router {
            state: state.into(),
            handlers: HashMap::new(),
            gone: None,
        }
    }

    /// Answers a procedure with an async function. A later registration replaces an earlier one.
    #[must_use]
    pub fn on<A, R, F, Fut>(mut self, procedure: Procedure<A, R>, function: F) -> Self
    where
        A: Decode + Send + 'static,
        R: Encode + Send + 'static,
        F: Fn(Call<S>, A) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, RemoteError>> + Send + 'static,
    {
        let handler = move |call: Call<S>, request: Request| -> ResponseFuture {
            match from_bytes::<A>(&request.payload) {
                Ok(args) => finish(call.clone(), function(call, args)),
                Err(error) => refuse(error),
            }
        };
        self.handlers.insert(procedure.number(), Box::new(handler));
        self
    }

    /// Answers a procedure that has raw data: the function hands the stream to a task of its own and returns. Data
    /// written meanwhile are sent once the answer has been; if the function fails, the stream is closed.
    #[must_use]
    pub fn on_stream<A, R, F, Fut>(mut self, procedure: Procedure<A, R>, function: F) -> Self
    where
        A: Decode + Send + 'static,
        R: Encode + Send + 'static,
        F: Fn(Call<S>, A, Stream) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, RemoteError>> + Send + 'static,
    {
        let handler = move |call: Call<S>, mut request: Request| -> ResponseFuture {
            match (from_bytes::<A>(&request.payload), request.stream.take()) {
                (Ok(args), Some(stream)) => finish(call.clone(), function(call, args, stream)),
                (Err(error), _) => refuse(error),
                (Ok(_), None) => {
                    let text = format!("procedure {} has no stream", request.procedure);
                    Box::pin(std::future::ready(Err(RemoteError::rpc(text))))
                }
            }
        };
        self.handlers.insert(procedure.number(), Box::new(handler));
        self
    }

    /// Calls a function once for each connection that is gone, to drop what was registered for it.
    #[must_use]
    pub fn on_disconnect(
        mut self,
        function: impl Fn(&Arc<S>, &Connection) + Send + Sync + 'static,
    ) -> Self {
        self.gone = Some(Box::new(function));
        self
    }
}

impl<S> Router<S> {
    /// The numbers of the procedures that have a function, in order; for tables of what is there.
    pub fn procedures(&self) -> Vec<i32> {
        let mut numbers: Vec<i32> = self.handlers.keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }
}

/// The answer to arguments that cannot be decoded.
fn refuse(error: XdrError) -> ResponseFuture {
    let error = RemoteError::rpc(format!("Unable to decode message payload: {error}"));
    Box::pin(std::future::ready(Err(error)))
}

/// The function's result, encoded.
fn finish<S, R, Fut>(call: Call<S>, answer: Fut) -> ResponseFuture
where
    S: Send + Sync + 'static,
    R: Encode + Send + 'static,
    Fut: Future<Output = Result<R, RemoteError>> + Send + 'static,
{
    Box::pin(async move {
        let answer = answer.await?;
        let payload = to_bytes(&answer).map_err(|error| {
            RemoteError::new(
                ErrorCode::INTERNAL_ERROR,
                ErrorDomain::RPC,
                format!("Unable to encode message payload: {error}"),
            )
        })?;
        let fds = std::mem::take(&mut call.fds.lock().unwrap_or_else(PoisonError::into_inner).go);
        Ok(Response { payload, fds })
    })
}

impl<S: Send + Sync + 'static> Service for Router<S> {
    fn call(&self, mut request: Request) -> ResponseFuture {
        let Some(handler) = self.handlers.get(&request.procedure) else {
            return Box::pin(std::future::ready(Err(RemoteError::unknown_procedure(
                request.procedure,
            ))));
        };
        let call = Call {
            state: Arc::clone(&self.state),
            connection: request.connection.clone(),
            fds: Arc::new(Mutex::new(Fds {
                came: std::mem::take(&mut request.fds),
                go: Vec::new(),
            })),
        };
        handler(call, request)
    }

    fn disconnected(&self, connection: &Connection) {
        if let Some(gone) = &self.gone {
            gone(&self.state, connection);
        }
    }
}
