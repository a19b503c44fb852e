//! The memory balloon.

use std::sync::Arc;

use virtio::balloon::{ActualHook, Balloon, BalloonHandle, BalloonOptions};
use vmm_api::control::{BalloonStats, Event};
use vmm_api::devices::{BalloonConfig, DeviceConfig};

use super::{Builder, failed};
use crate::machine::MachineError;
use crate::notices::{Notice, Notices};

#[derive(Debug)]
struct Changes(Arc<Notices>);

impl ActualHook for Changes {
    fn actual(&self, bytes: u64) {
        self.0.send(Notice::Tell(Event::BalloonChange {
            actual_bytes: bytes,
        }));
    }
}

/// What the balloon knows.
pub fn stats(handle: &BalloonHandle) -> BalloonStats {
    let stats = handle.stats();
    BalloonStats {
        actual_bytes: stats.actual_bytes,
        target_bytes: stats.target_bytes,
        updated: stats.updated,
        swap_in: stats.swap_in,
        swap_out: stats.swap_out,
        major_faults: stats.major_faults,
        minor_faults: stats.minor_faults,
        free: stats.free,
        total: stats.total,
        available: stats.available,
        disk_caches: stats.disk_caches,
        hugetlb_allocations: stats.hugetlb_allocations,
        hugetlb_failures: stats.hugetlb_failures,
        reported: stats.reported,
    }
}

impl Builder {
    pub(super) fn balloon(
        &mut self,
        device: &DeviceConfig,
        config: &BalloonConfig,
    ) -> Result<(), MachineError> {
        if self.balloon.is_some() {
            return Err(failed(device, "a machine has one balloon"));
        }
        let options = BalloonOptions {
            ram_bytes: self.ram_bytes,
            target_bytes: if config.target_bytes == 0 {
                self.ram_bytes
            } else {
                config.target_bytes
            },
            stats_period_seconds: config.stats_period_seconds,
            free_page_reporting: config.free_page_reporting,
            deflate_on_oom: config.deflate_on_oom,
            hook: Some(Arc::new(Changes(self.notices.clone()))),
        };
        let balloon = Balloon::new(options).map_err(|error| failed(device, error))?;
        self.balloon = Some(balloon.handle());
        self.virtio(device, Box::new(balloon))
    }
}
