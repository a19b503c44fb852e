//! What of a migration can be changed and seen while it goes on.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use vmm_api::control::{MigrateOptions, MigrationStatus};

use crate::devices::lock;

/// Who may run the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Right {
    /// This process.
    Own = 0,
    /// The other one.
    Given = 1,
    /// It was given away, and whether it arrived is not known: this process must not run it.
    Unknown = 2,
}

/// What can be changed, and seen, while it goes on.
#[derive(Debug)]
pub struct Tuning {
    pub(super) bandwidth: AtomicU64,
    pub(super) downtime_ms: AtomicU64,
    right: AtomicU8,
    /// Whoever has asked the other side says that it was not taken over.
    not_taken: AtomicBool,
    pub(super) sent: AtomicU64,
    pub(super) pages: AtomicU64,
    pub(super) left: AtomicU64,
    pub(super) disk_total: AtomicU64,
    pub(super) disk_sent: AtomicU64,
    pub(super) disk_left: AtomicU64,
    status: Mutex<MigrationStatus>,
    pub(super) throttle: AtomicU32,
}

impl Tuning {
    /// At the beginning.
    #[must_use]
    pub fn new(options: &MigrateOptions) -> Self {
        Self {
            bandwidth: AtomicU64::new(options.bandwidth),
            downtime_ms: AtomicU64::new(options.downtime_ms),
            right: AtomicU8::new(Right::Own as u8),
            not_taken: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            left: AtomicU64::new(0),
            disk_total: AtomicU64::new(0),
            disk_sent: AtomicU64::new(0),
            disk_left: AtomicU64::new(0),
            status: Mutex::default(),
            throttle: AtomicU32::new(0),
        }
    }

    /// Sets what is given.
    pub fn set(&self, bandwidth: Option<u64>, downtime_ms: Option<u64>) {
        if let Some(bandwidth) = bandwidth {
            self.bandwidth.store(bandwidth, Ordering::Relaxed);
        }
        if let Some(downtime) = downtime_ms {
            self.downtime_ms.store(downtime, Ordering::Relaxed);
        }
    }

    /// Who may run the machine now.
    #[must_use]
    pub fn right(&self) -> Right {
        match self.right.load(Ordering::Acquire) {
            0 => Right::Own,
            1 => Right::Given,
            // The line may have ended just before that was said, or just after.
            _ if self.is_not_taken() => Right::Own,
            _ => Right::Unknown,
        }
    }

    /// The other side never got the right to run, says whoever has asked it.
    pub fn was_not_taken(&self) {
        self.not_taken.store(true, Ordering::Release);
    }

    pub(super) fn is_not_taken(&self) -> bool {
        self.not_taken.load(Ordering::Acquire)
    }

    /// How far it is.
    #[must_use]
    pub fn status(&self) -> MigrationStatus {
        MigrationStatus {
            transferred: self.sent.load(Ordering::Relaxed),
            pages: self.pages.load(Ordering::Relaxed),
            remaining: self.left.load(Ordering::Relaxed),
            disk_total: self.disk_total.load(Ordering::Relaxed),
            disk_sent: self.disk_sent.load(Ordering::Relaxed),
            disk_left: self.disk_left.load(Ordering::Relaxed),
            throttle: u8::try_from(self.throttle.load(Ordering::Relaxed)).unwrap_or(u8::MAX),
            ..*lock(&self.status)
        }
    }

    pub(super) fn give(&self, right: Right) {
        self.right.store(right as u8, Ordering::Release);
    }

    pub(super) fn change(&self, with: impl FnOnce(&mut MigrationStatus)) {
        with(&mut lock(&self.status));
    }
}
