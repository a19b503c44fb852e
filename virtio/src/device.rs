//! What every virtio device is: one life-cycle contract.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::memory::GuestMemory;

/// How a device tells its driver something. Given by the transport.
pub trait Interrupt: Send + Sync + std::fmt::Debug {
    /// Queue `index` has used buffers (2.7.7; the device has already checked that the driver
    /// wants to know).
    fn queue(&self, index: u16);
    /// The configuration has changed (2.5): bumps the generation and notifies.
    fn config(&self);
    /// The device can't go on (2.1.2): DEVICE_NEEDS_RESET is set, the driver notified. The device
    /// touches its queues no more until it is reset.
    fn needs_reset(&self, reason: &str);
}

/// A queue as the driver set it up (4.1.4.3). The transport has checked nothing but that the size
/// is a power of two within the device's limit: the rings may be anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Entries, a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the driver area (available ring).
    pub driver: u64,
    /// Of the device area (used ring).
    pub device: u64,
    /// Index in the available ring the device goes on from (0 for a new queue).
    pub next_available: u16,
    /// Index in the used ring the device goes on from.
    pub next_used: u16,
}

/// What a device is activated with.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM.
    pub memory: Arc<dyn GuestMemory>,
    /// Features the driver accepted, transport ones among them (`VIRTIO_F_EVENT_IDX`, ...).
    pub features: u64,
    /// The queues by index: `None` where the driver enabled none.
    pub queues: Vec<Option<QueueSetup>>,
    /// For each queue an eventfd, non-blocking, that is signalled when the driver notifies it
    /// (by the transport or, through an ioeventfd, by the hypervisor). Present for every queue.
    pub kicks: Vec<OwnedFd>,
    /// The way back.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device can't be set going or restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A system call.
    #[error("{call}: {source}")]
    Os {
        /// Which.
        call: &'static str,
        /// Its error.
        source: std::io::Error,
    },
    /// A saved state of another kind, of a newer version, or that contradicts itself.
    #[error("saved state of {kind}: {reason}")]
    State {
        /// The device's kind.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// What the caller asked for is not possible (a size the backend can't take, say).
    #[error("{0}")]
    Invalid(String),
}

/// A device's saved state. Readers know older versions, and refuse newer ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Payload {
    /// Which kind of device: `virtio-blk`, ...
    pub kind: String,
    /// Version of `state`'s layout.
    pub version: u32,
    /// The device's state struct.
    pub state: serde_json::Value,
}

impl Payload {
    /// Writes `state` down.
    ///
    /// # Errors
    /// A value that can't be written down.
    pub fn new(
        kind: &'static str,
        version: u32,
        state: &impl Serialize,
    ) -> Result<Self, DeviceError> {
        let state = serde_json::to_value(state).map_err(|error| DeviceError::State {
            kind,
            reason: error.to_string(),
        })?;
        Ok(Self {
            kind: kind.to_owned(),
            version,
            state,
        })
    }

    /// Reads a state of `kind` whose layout has had one version so far, `version`.
    ///
    /// # Errors
    /// [`DeviceError::State`]: another kind or version, or not of that layout.
    pub fn open<T: for<'a> Deserialize<'a>>(
        &self,
        kind: &'static str,
        version: u32,
    ) -> Result<T, DeviceError> {
        let bad = |reason| DeviceError::State { kind, reason };
        if self.kind != kind {
            return Err(bad(format!("it is one of {}", self.kind)));
        }
        if self.version != version {
            return Err(bad(format!(
                "version {}, but this is version {version}",
                self.version
            )));
        }
        T::deserialize(&self.state).map_err(|error| bad(error.to_string()))
    }
}

/// A virtio device behind its transport.
///
/// ```text
///             activate                pause
///   inactive ----------->  running  ---------->  paused
///      ^  \                   |  ^  <----------    |  save (any number of times)
///      |   \ load             |      resume        |
///      +----\-----------------+--------------------+
///            \   reset                      reset
///             `--> paused (as it was when saved; nothing touched yet)
/// ```
///
/// The transport owns the device and calls it from one thread at a time: the vCPU thread that
/// writes a register, or the VMM's main thread. Host resources (files, sockets, threads' pools)
/// belong to the device from its construction to its drop; guest memory is touched only between
/// `activate` and the next `pause` or `reset` have returned.
///
/// - `activate`: the driver has set DRIVER_OK, and negotiated `features`. The device starts its
///   own threads. A queue that lies outside RAM is no error here: the device calls
///   `Interrupt::needs_reset` when it finds out.
/// - `reset`: the driver, or the machine's reset. In any state. When it returns nothing of the
///   device touches guest memory any more, no request is in flight, and the guest-visible state
///   (configuration included) is as it was made. A request that takes long on the host is waited
///   for with a limit of 30 s, then given up with its buffers kept alive.
/// - `reset_queue`: the driver resets one queue (2.6.1): as `reset`, for that queue alone.
/// - `enable_queue`: the driver sets that queue up again (2.6.1), or for the first time after
///   DRIVER_OK where it negotiated `VIRTIO_F_RING_RESET`. The transport pauses a device that was
///   paused again.
/// - `pause`: the machine is being paused, all vCPUs already are. Requests in flight are finished
///   (or, where that can wait for ever, kept for later in the state). When it returns nothing of
///   the device touches guest memory, and interrupts it owed have been sent.
///   One whose thread doesn't come to rest within 30 s is given up: it needs a reset.
/// - `resume`: goes on where `pause` left off. vCPUs are resumed after the devices.
/// - `save`: only while paused or inactive, else it is refused (one that was given up never is at
///   rest). Everything the guest can observe, the indices of every queue in use among them, in one
///   plain struct.
/// - `load`: into a device made from the same configuration, inactive. With `activation` where the
///   saved device was active; `resume` then sets it going. A queue of `activation` that the state
///   has no indices for is refused. A device that needed a reset when it was saved gets no queues.
pub trait Device: Send + std::fmt::Debug {
    /// The device id (5): 1 net, 2 block, ...
    fn id(&self) -> u16;

    /// Name of its kind, as in `Payload::kind`.
    fn kind(&self) -> &'static str;

    /// Feature bits it offers, without the transport's own (`VIRTIO_F_VERSION_1`,
    /// `VIRTIO_F_INDIRECT_DESC`, `VIRTIO_F_EVENT_IDX`, `VIRTIO_F_RING_RESET`), which every device
    /// here has.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two up to 1024. Its length is the number of
    /// queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads its configuration structure (4.1.4.6); bytes beyond the structure are zero.
    fn read_config(&self, offset: u32, data: &mut [u8]);

    /// Writes it; read-only bytes and bytes beyond the structure are ignored.
    fn write_config(&mut self, offset: u32, data: &[u8]);

    /// See the life cycle above.
    ///
    /// # Errors
    /// The host's refusal (threads, event loops). The transport sets DEVICE_NEEDS_RESET then.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// See the life cycle above.
    fn reset(&mut self);

    /// See the life cycle above. Returns when the queue is at rest.
    fn reset_queue(&mut self, index: u16);

    /// See the life cycle above.
    ///
    /// # Errors
    /// As `activate`.
    fn enable_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), DeviceError>;

    /// See the life cycle above.
    fn pause(&mut self);

    /// See the life cycle above.
    fn resume(&mut self);

    /// See the life cycle above.
    ///
    /// # Errors
    /// It is not at rest, or a value that can't be written down.
    fn save(&self) -> Result<Payload, DeviceError>;

    /// See the life cycle above.
    ///
    /// # Errors
    /// [`DeviceError::State`], or the host's refusal.
    fn load(
        &mut self,
        payload: &Payload,
        activation: Option<Activation>,
    ) -> Result<(), DeviceError>;
}
