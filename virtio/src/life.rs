//! A device's thread from activation to reset.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::device::{DeviceError, QueueSetup};
use crate::worker::{Handler, Poll, Starter, Stuck, Worker};

/// Where a device (or a queue pair of it) is in its life cycle, and its handler with it.
#[derive(Debug, Default)]
pub enum Life<H> {
    /// Nothing runs, nothing is kept.
    #[default]
    Inactive,
    /// At rest.
    Paused(H),
    /// On its thread.
    Running(Worker<H>),
    /// Given up with whatever it holds, until the next reset: its thread didn't come to rest.
    Lost,
}

impl<H: Handler> Life<H> {
    /// Sets `handler` going.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn start(&mut self, name: &str, handler: H) -> Result<(), DeviceError> {
        self.start_by(None, name, handler)
    }

    /// The same, by a starter of its own.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn start_by(
        &mut self,
        starter: Option<&Starter>,
        name: &str,
        handler: H,
    ) -> Result<(), DeviceError> {
        let worker = Worker::start_by(starter, name, handler).map_err(os("a device's thread"))?;
        *self = Self::Running(worker);
        Ok(())
    }

    /// Brings the thread to rest and keeps its handler.
    ///
    /// # Errors
    /// It doesn't answer, and is given up: the driver must be told that the device needs a reset.
    pub fn pause(&mut self) -> Result<(), Stuck> {
        match std::mem::take(self) {
            Self::Running(worker) => match worker.stop() {
                Ok(handler) => *self = Self::Paused(handler),
                Err(error) => {
                    *self = Self::Lost;
                    return Err(error);
                }
            },
            other => *self = other,
        }
        Ok(())
    }

    /// Whether what it holds can be saved.
    ///
    /// # Errors
    /// It runs, or was given up: what it has in flight would be missing from the state.
    pub fn at_rest(&self, kind: &'static str) -> Result<(), DeviceError> {
        match self {
            Self::Inactive | Self::Paused(_) => Ok(()),
            Self::Running(_) => Err(DeviceError::Invalid(format!("{kind}: it is not paused"))),
            Self::Lost => Err(DeviceError::Invalid(format!(
                "{kind}: it has not come to rest: {Stuck}"
            ))),
        }
    }

    /// Asks the thread to stop, without waiting.
    pub fn ask_to_stop(&self) {
        if let Self::Running(worker) = self {
            worker.ask_to_stop();
        }
    }

    /// Goes on after [`Self::pause`].
    ///
    /// # Errors
    /// The host's refusal.
    pub fn resume(&mut self, name: &str) -> Result<(), DeviceError> {
        self.resume_by(None, name)
    }

    /// The same, by a starter of its own.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn resume_by(&mut self, starter: Option<&Starter>, name: &str) -> Result<(), DeviceError> {
        match std::mem::take(self) {
            Self::Paused(handler) => self.start_by(starter, name, handler),
            other => {
                *self = other;
                Ok(())
            }
        }
    }

    /// Brings the thread to rest; its handler, if there was one.
    pub fn take(&mut self) -> Option<H> {
        if let Err(error) = self.pause() {
            log::error!("resetting: {error}");
        }
        match std::mem::take(self) {
            Self::Paused(handler) => Some(handler),
            _ => None,
        }
    }

    /// The handler while paused.
    #[must_use]
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
            Self::Inactive | Self::Lost => None,
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
pub fn os(call: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Os { call, source }
}

/// Gives the queues that the transport has on the indices the device had saved.
///
/// # Errors
/// The device saved no indices for one of them, or indices of another queue: going on from 0 would
/// run requests a second time. A device that was broken when it was saved gets no queues from the
/// transport, so every one here was in use.
pub(crate) fn restored(
    kind: &'static str,
    given: &mut [Option<QueueSetup>],
    saved: &[Option<QueueSetup>],
) -> Result<(), DeviceError> {
    for (index, given) in given.iter_mut().enumerate() {
        let Some(given) = given else { continue };
        let same_place = |saved: &QueueSetup| {
            QueueSetup {
                next_available: given.next_available,
                next_used: given.next_used,
                ..*saved
            } == *given
        };
        match saved.get(index).copied().flatten() {
            Some(saved) if same_place(&saved) => *given = saved,
            _ => {
                return Err(DeviceError::State {
                    kind,
                    reason: format!("queue {index} is in use, but its indices are not there"),
                });
            }
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    struct Idle;

    impl Handler for Idle {
        fn begin(&mut self, _poll: &Poll) -> io::Result<()> {
            Ok(())
        }
        fn ready(&mut self, _token: u64, _poll: &Poll) {}
    }

    #[test]
    fn only_what_is_at_rest_can_be_saved() {
        let mut life = Life::default();
        assert!(life.at_rest("test").is_ok());
        life.start("idle", Idle).unwrap();
        assert!(life.at_rest("test").is_err());
        life.pause().unwrap();
        assert!(life.at_rest("test").is_ok());
        life.resume("idle").unwrap();
        assert!(life.take().is_some());
        // What a thread that hangs leaves behind: nothing starts before the reset.
        life = Life::Lost;
        assert!(life.at_rest("test").is_err());
        life.resume("idle").unwrap();
        assert!(life.paused().is_none() && life.at_rest("test").is_err());
        assert!(life.take().is_none());
        assert!(life.at_rest("test").is_ok());
    }
}
