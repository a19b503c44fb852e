//! Guest RAM as devices get at it.

use std::sync::Arc;

use hypervisor::Vm;
use virtio::OutsideRam;

use crate::memory::GuestMemory;

/// Guest RAM, and who must be told of what devices write there.
#[derive(Debug)]
pub struct Ram {
    memory: Arc<GuestMemory>,
    vm: Arc<dyn Vm>,
}

impl Ram {
    /// The memory of `vm`.
    pub fn new(memory: Arc<GuestMemory>, vm: Arc<dyn Vm>) -> Self {
        Self { memory, vm }
    }
}

impl virtio::GuestMemory for Ram {
    fn host(&self, start: u64, len: u64) -> Result<*mut u8, OutsideRam> {
        self.memory
            .host(start, len)
            .map_err(|_| OutsideRam { start, len })
    }

    fn wrote(&self, start: u64, len: u64) {
        self.vm.memory_written(start, len);
    }

    fn discard(&self, start: u64, len: u64) -> Result<(), OutsideRam> {
        let outside = OutsideRam { start, len };
        let end = start.checked_add(len).ok_or(outside)?;
        let first = crate::num::align_up(start, crate::memory::PAGE).ok_or(outside)?;
        let last = end & !(crate::memory::PAGE - 1);
        if first >= last {
            return self.host(start, len).map(|_| ());
        }
        self.memory.discard(first..last).map_err(|_| outside)?;
        self.vm.memory_written(first, last - first);
        Ok(())
    }
}
