//! The control socket: framed JSON over a UNIX stream socket.
//!
//! A frame is a big-endian `u32` length (of what follows, at most [`MAX_FRAME`]) and one JSON
//! value. The caller sends [`Request`]s; the VMM answers each with a [`Reply`] carrying the same
//! id, and sends [`Event`]s of its own accord, in order, to every connection. Several connections
//! may be open. A frame that is too long or not understood ends its connection, not the VMM.

use serde::{Deserialize, Serialize};

use crate::config::LifecycleAction;

/// Longest frame in bytes, without its length field.
pub const MAX_FRAME: u32 = 1 << 20;

/// A call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the caller.
    pub id: u64,
    /// What to do.
    pub call: Call,
}

/// What can be asked of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// State and facts: `Answer::Status`.
    Query,
    /// Stops all vCPUs between two instructions; returns when they are stopped.
    Pause,
    /// Lets them run.
    Resume,
    /// Ends the process at once, as pulling the plug does.
    Stop,
    /// Presses the ACPI power button.
    PowerButton,
    /// Hard reset, as the reset button does.
    Reset,
    /// NMI to every vCPU.
    Nmi,
    /// What the guest's own power-off does from now on (libvirt's set-lifecycle-action; `reboot`
    /// is a power button press with `Restart` set, put back by the caller after `Event::Shutdown`).
    OnPoweroff(LifecycleAction),
}

/// The answer to a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's id.
    pub id: u64,
    /// What came of it.
    pub result: Result<Answer, Failure>,
}

/// A call's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done.
    Done,
    /// To `Query`.
    Status(Status),
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For people.
    pub message: String,
}

/// A machine's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Running, paused...
    pub state: MachineState,
    /// CPU time of all vCPU threads so far, nanoseconds.
    pub vcpu_time_ns: Vec<u64>,
    /// CPU time of the whole process, nanoseconds.
    pub process_time_ns: u64,
    /// For each serial port: its pseudo-terminal's path, where it has one.
    pub serial_ptys: Vec<Option<String>>,
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// vCPUs run.
    Running,
    /// Paused by the user, or started so.
    Paused,
    /// Preserved after a panic (`on_crash` preserve).
    Crashed,
    /// Preserved after power-off or reset.
    Halted,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// vCPUs stopped (a `Pause`).
    Paused,
    /// vCPUs run.
    Resumed,
    /// The guest powered itself off.
    Shutdown,
    /// The guest reset itself, or was reset; it boots again if `on_reboot` says so.
    Reset,
    /// The guest panicked (pvpanic), or the backend gave up.
    Crashed {
        /// What happened, for people.
        reason: String,
        /// True for pvpanic; false where the backend cannot go on.
        guest_fault: bool,
    },
    /// The process ends now; nothing follows.
    Exiting(ExitRecord),
}

/// A frame from the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromVmm {
    /// Answers a request.
    Reply(Reply),
    /// Happened by itself.
    Event(Event),
}

/// Why a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The cause.
    pub cause: ExitCause,
    /// Details for people; may be empty.
    pub message: String,
}

/// The cause of a VMM's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitCause {
    /// The guest powered off, or reset with `on_reboot` destroy.
    Shutdown,
    /// `Call::Stop` or SIGTERM.
    Stopped,
    /// The guest panicked with `on_crash` destroy.
    Crashed,
    /// The machine could not be built, or the backend cannot go on.
    Failed,
}
