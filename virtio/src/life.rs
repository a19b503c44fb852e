//! A device's thread from activation to reset.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::device::{DeviceError, Payload, QueueSetup};
use crate::worker::{Handler, Poll, Worker};

/// Where a device (or a queue pair of it) is in its life cycle, and its handler with it.
#[derive(Debug, Default)]
pub(crate) enum Life<H> {
    /// Nothing runs, nothing is kept.
    #[default]
    Inactive,
    /// At rest.
    Paused(H),
    /// On its thread.
    Running(Worker<H>),
}

impl<H: Handler> Life<H> {
    /// Sets `handler` going.
    pub fn start(&mut self, name: &str, handler: H) -> Result<(), DeviceError> {
        let worker = Worker::start(name, handler).map_err(os("a device's thread"))?;
        *self = Self::Running(worker);
        Ok(())
    }

    /// Brings the thread to rest and keeps its handler. One that doesn't answer is given up.
    pub fn pause(&mut self) {
        *self = match std::mem::take(self) {
            Self::Running(worker) => match worker.stop() {
                Ok(handler) => Self::Paused(handler),
                Err(error) => {
                    log::error!("pausing: {error}");
                    Self::Inactive
                }
            },
            other => other,
        };
    }

    /// Asks the thread to stop, without waiting.
    pub fn ask_to_stop(&self) {
        if let Self::Running(worker) = self {
            worker.ask_to_stop();
        }
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&mut self, name: &str) -> Result<(), DeviceError> {
        match std::mem::take(self) {
            Self::Paused(handler) => self.start(name, handler),
            other => {
                *self = other;
                Ok(())
            }
        }
    }

    /// Brings the thread to rest; its handler, if there was one.
    pub fn take(&mut self) -> Option<H> {
        self.pause();
        match std::mem::take(self) {
            Self::Paused(handler) => Some(handler),
            _ => None,
        }
    }

    /// The handler while paused.
    pub fn paused(&self) -> Option<&H> {
        match self {
            Self::Paused(handler) => Some(handler),
            _ => None,
        }
    }

    /// Runs `call` on the handler, wherever it is; `None`: there is none, or it doesn't answer.
    /// It gets the poll if the thread runs.
    pub fn with<R: Send + 'static>(
        &mut self,
        call: impl FnOnce(&mut H, Option<&Poll>) -> R + Send + 'static,
    ) -> Option<R> {
        match self {
            Self::Inactive => None,
            Self::Paused(handler) => Some(call(handler, None)),
            Self::Running(worker) => match worker.call(move |h, poll| call(h, Some(poll))) {
                Ok(result) => Some(result),
                Err(error) => {
                    log::error!("{error}");
                    None
                }
            },
        }
    }
}

/// A system call's error as a device's.
pub(crate) fn os(call: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Os { call, source }
}

/// The queues' addresses from the transport with the indices the device had saved. One it had no
/// indices for was of no use to it, and goes on as the transport has it.
pub(crate) fn restored(given: &mut [Option<QueueSetup>], saved: &[Option<QueueSetup>]) {
    for (given, saved) in given.iter_mut().zip(saved) {
        if let (Some(given), Some(saved)) = (given, saved) {
            given.next_available = saved.next_available;
            given.next_used = saved.next_used;
        }
    }
}

/// A payload of `state`.
pub(crate) fn payload<S: Serialize>(
    kind: &'static str,
    version: u32,
    state: &S,
) -> Result<Payload, DeviceError> {
    let state = serde_json::to_value(state).map_err(|error| DeviceError::State {
        kind,
        reason: error.to_string(),
    })?;
    Ok(Payload {
        kind: kind.to_owned(),
        version,
        state,
    })
}

/// The state in `payload`, if it is of this kind and version.
pub(crate) fn state<S: DeserializeOwned>(
    payload: &Payload,
    kind: &'static str,
    version: u32,
) -> Result<S, DeviceError> {
    let wrong = |reason| Err(DeviceError::State { kind, reason });
    if payload.kind != kind {
        return wrong(format!("it is one of {}", payload.kind));
    }
    if payload.version != version {
        return wrong(format!(
            "version {}, but this is version {version}",
            payload.version
        ));
    }
    S::deserialize(&payload.state).or_else(|error| wrong(error.to_string()))
}

/// Reads `data.len()` bytes at `offset` of a configuration structure; beyond it are zeroes.
pub(crate) fn read_structure(structure: &[u8], offset: u32, data: &mut [u8]) {
    data.fill(0);
    let rest = structure.get(offset as usize..).unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}

/// Locks; a thread that panicked while it held the lock left plain data behind.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
