//! Sockets between guest and host (5.10), stream sockets only.
//!
//! On the host they are UNIX sockets, as Firecracker and crosvm have them. A host program that
//! wants port P of the guest connects to the device's listener, says `CONNECT P\n`, and hears
//! `OK Q\n` when the guest has accepted, Q being its own port. What the guest connects to as port
//! P of the host is a program that listens on `<prefix>_P`.

mod connection;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;
mod worker;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use muxer::Muxer;
use worker::{QUEUES, Worker};

use crate::device::{Activation, Device, DeviceError, Interrupt, Payload, QueueSetup};
use crate::life::{Life, os, read_structure, restored};
use crate::memory::GuestMemory;
use crate::queue::Queue;

const KIND: &str = "virtio-vsock";
const VERSION: u32 = 1;
/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1 << 0;
const QUEUE_SIZE: u16 = 256;

/// How the device is made.
#[derive(Debug)]
pub struct VsockOptions {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// Where host programs connect: a listening UNIX socket.
    pub listener: Option<OwnedFd>,
    /// What the guest connects to: for host port P the UNIX socket `<prefix>_P`.
    pub prefix: Option<PathBuf>,
}

/// What is saved: connections are not, the guest hears that they are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The queues, by index.
    pub queues: Vec<Option<QueueSetup>>,
}

/// A socket device.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    /// While it is not with the thread.
    muxer: Option<Muxer>,
    life: Life<Worker>,
    activation: Option<Active>,
}

/// What stays after activation.
#[derive(Debug)]
struct Active {
    memory: Arc<dyn GuestMemory>,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
}

impl Vsock {
    /// The device.
    ///
    /// # Errors
    /// A context id that is not for guests, or the kernel's refusal.
    pub fn new(options: VsockOptions) -> Result<Self, DeviceError> {
        if options.cid < 3 || options.cid == u32::MAX {
            return Err(DeviceError::Invalid(format!(
                "{} is no guest's context id",
                options.cid
            )));
        }
        let listener = options.listener.map(UnixListener::from);
        if let Some(listener) = &listener {
            listener.set_nonblocking(true).map_err(os("fcntl"))?;
        }
        Ok(Self {
            cid: options.cid,
            muxer: Some(Muxer::new(options.cid.into(), listener, options.prefix)),
            life: Life::default(),
            activation: None,
        })
    }

    fn prepare(&mut self, activation: Activation) -> Result<Worker, DeviceError> {
        let (memory, features) = (activation.memory, activation.features);
        let interrupt = activation.interrupt;
        let Some(muxer) = self.muxer.take() else {
            return Err(DeviceError::Invalid(
                "the thread before still has the connections".into(),
            ));
        };
        let mut queues = Vec::new();
        let mut broken = false;
        for setup in activation.queues.iter().take(QUEUES) {
            let queue = setup.and_then(|setup| {
                Queue::new(&memory, &setup, features)
                    .map_err(|error| {
                        interrupt.needs_reset(&error.to_string());
                        broken = true;
                    })
                    .ok()
            });
            queues.push(queue);
        }
        self.activation = Some(Active {
            memory,
            features,
            interrupt: Arc::clone(&interrupt),
        });
        Ok(Worker {
            muxer,
            interrupt,
            queues,
            kicks: activation.kicks,
            lost: false,
            again: false,
            broken,
        })
    }
}

impl Device for Vsock {
    fn id(&self) -> u16 {
        19
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_structure(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {
        // Read-only (5.10.4).
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let worker = self.prepare(activation)?;
        self.life.start("vsock", worker)
    }

    fn reset(&mut self) {
        if let Some(mut worker) = self.life.take() {
            worker.muxer.clear();
            self.muxer = Some(worker.muxer);
        }
        self.activation = None;
    }

    fn reset_queue(&mut self, index: u16) {
        self.life.with(move |worker, poll| {
            worker.replace_queue(index.into(), None, poll);
        });
    }

    fn enable_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), DeviceError> {
        let Some(active) = &self.activation else {
            return Ok(());
        };
        match Queue::new(&active.memory, &setup, active.features) {
            Ok(queue) => {
                self.life.with(move |worker, poll| {
                    worker.replace_queue(index.into(), Some(queue), poll);
                });
            }
            Err(error) => active.interrupt.needs_reset(&error.to_string()),
        }
        Ok(())
    }

    fn pause(&mut self) {
        if let Err(error) = self.life.pause()
            && let Some(active) = &self.activation
        {
            active.interrupt.needs_reset(&error.to_string());
        }
    }

    fn resume(&mut self) {
        if let Err(error) = self.life.resume("vsock")
            && let Some(active) = &self.activation
        {
            active.interrupt.needs_reset(&error.to_string());
        }
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        self.life.at_rest(KIND)?;
        let queues = self.life.paused().map_or_else(
            || vec![None; QUEUES],
            |worker| {
                let queues = worker.queues.iter();
                queues.map(|q| q.as_ref().map(Queue::setup)).collect()
            },
        );
        Payload::new(KIND, VERSION, &State { queues })
    }

    fn load(
        &mut self,
        payload: &Payload,
        activation: Option<Activation>,
    ) -> Result<(), DeviceError> {
        let state: State = payload.open(KIND, VERSION)?;
        let Some(mut activation) = activation else {
            return Ok(());
        };
        restored(KIND, &mut activation.queues, &state.queues)?;
        let mut worker = self.prepare(activation)?;
        worker.lost = true;
        self.life = Life::Paused(worker);
        Ok(())
    }
}
