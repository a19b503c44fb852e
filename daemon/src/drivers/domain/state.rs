//! Domain states, their reasons, and lifecycle events: libvirt's numbers.

use serde::{Deserialize, Serialize};

/// A domain's state with its reason (virDomainState and the enumerations beside it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// vCPUs run.
    Running(RunningReason),
    /// vCPUs are stopped.
    Paused(PausedReason),
    /// The guest has powered off, its process has not ended yet.
    Shutdown,
    /// Not there.
    Shutoff(ShutoffReason),
    /// Panicked, and kept or about to end.
    Crashed,
}

/// Why a domain runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunningReason {
    /// Started.
    Booted = 1,
    /// Came from another host.
    Migrated = 2,
    /// Restored from a saved image.
    Restored = 3,
    /// Reverted to a snapshot.
    FromSnapshot = 4,
    /// Resumed.
    Unpaused = 5,
    /// A migration was given up.
    MigrationCanceled = 6,
    /// A save was given up.
    SaveCanceled = 8,
}

/// Why a domain is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PausedReason {
    /// Somebody asked for it.
    User = 1,
    /// On its way to another host, or from there.
    Migration = 2,
    /// Being saved.
    Save = 3,
    /// Being dumped.
    Dump = 4,
    /// A disk request failed on the host's side.
    IoError = 5,
    /// The watchdog was not fed.
    Watchdog = 6,
    /// Reverted to a snapshot.
    FromSnapshot = 7,
    /// Powered off or reset with `preserve`.
    ShuttingDown = 8,
    /// A snapshot is being made.
    Snapshot = 9,
    /// Its first instruction is yet to come.
    StartingUp = 11,
}

/// Why a domain is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutoffReason {
    /// Never started since the daemon knows it.
    Unknown = 0,
    /// The guest powered off.
    Shutdown = 1,
    /// `destroy`.
    Destroyed = 2,
    /// The guest panicked, or the process died.
    Crashed = 3,
    /// It runs on another host.
    Migrated = 4,
    /// Saved.
    Saved = 5,
    /// The machine could not go on.
    Failed = 6,
    /// Reverted to a snapshot of a time when it was off.
    FromSnapshot = 7,
}

impl State {
    /// virDomainState and reason.
    pub fn numbers(self) -> (i32, i32) {
        match self {
            Self::Running(reason) => (1, reason as i32),
            Self::Paused(reason) => (3, reason as i32),
            Self::Shutdown => (4, 0),
            Self::Shutoff(reason) => (5, reason as i32),
            Self::Crashed => (6, 1),
        }
    }
}

/// A lifecycle event with its detail (virDomainEventType and the enumerations beside it).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// A new persistent definition.
    DefinedAdded,
    /// A changed persistent definition.
    DefinedUpdated,
    /// The definition under its new name.
    DefinedRenamed,
    /// The persistent definition is gone.
    UndefinedRemoved,
    /// The old name is gone.
    UndefinedRenamed,
    /// Started.
    StartedBooted,
    /// Came from another host.
    StartedMigrated,
    /// Started from a saved image.
    StartedRestored,
    /// Started by reverting to a snapshot.
    StartedFromSnapshot,
    /// Paused on request.
    SuspendedPaused,
    /// Paused to go to another host, or as it came from there.
    SuspendedMigrated,
    /// Paused for a disk error.
    SuspendedIoError,
    /// Paused by the watchdog.
    SuspendedWatchdog,
    /// Paused as it was restored.
    SuspendedRestored,
    /// Paused as a snapshot is.
    SuspendedFromSnapshot,
    /// Resumed on request.
    ResumedUnpaused,
    /// Runs on after a migration.
    ResumedMigrated,
    /// Runs on from a saved image.
    ResumedFromSnapshot,
    /// Off, by itself.
    StoppedShutdown,
    /// Off, by `destroy`.
    StoppedDestroyed,
    /// Off, after a panic.
    StoppedCrashed,
    /// Off here: it runs on another host.
    StoppedMigrated,
    /// Off, and saved.
    StoppedSaved,
    /// Off, by reverting to a snapshot.
    StoppedFromSnapshot,
    /// Off: its process died or could not go on.
    StoppedFailed,
    /// The guest has powered off.
    ShutdownGuest,
    /// The host ends the guest.
    ShutdownHost,
    /// The guest panicked.
    CrashedPanicked,
}

impl Lifecycle {
    /// Event and detail.
    pub fn numbers(self) -> (i32, i32) {
        match self {
            Self::DefinedAdded => (0, 0),
            Self::DefinedUpdated => (0, 1),
            Self::DefinedRenamed => (0, 2),
            Self::UndefinedRemoved => (1, 0),
            Self::UndefinedRenamed => (1, 1),
            Self::StartedBooted => (2, 0),
            Self::StartedMigrated => (2, 1),
            Self::StartedRestored => (2, 2),
            Self::StartedFromSnapshot => (2, 3),
            Self::SuspendedPaused => (3, 0),
            Self::SuspendedMigrated => (3, 1),
            Self::SuspendedIoError => (3, 2),
            Self::SuspendedWatchdog => (3, 3),
            Self::SuspendedRestored => (3, 4),
            Self::SuspendedFromSnapshot => (3, 5),
            Self::ResumedUnpaused => (4, 0),
            Self::ResumedMigrated => (4, 1),
            Self::ResumedFromSnapshot => (4, 2),
            Self::StoppedShutdown => (5, 0),
            Self::StoppedDestroyed => (5, 1),
            Self::StoppedCrashed => (5, 2),
            Self::StoppedMigrated => (5, 3),
            Self::StoppedSaved => (5, 4),
            Self::StoppedFromSnapshot => (5, 6),
            Self::StoppedFailed => (5, 5),
            Self::ShutdownGuest => (6, 1),
            Self::ShutdownHost => (6, 2),
            Self::CrashedPanicked => (8, 0),
        }
    }
}
