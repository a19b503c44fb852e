//! A look at the guest's memory from outside.

use vmm_api::control::{MAX_PEEK, MachineState};

use super::Machine;
use crate::gdb::memory;
use crate::num::to_usize;

impl Machine {
    /// Bytes of RAM; `linear`: where vCPU 0's page tables have them now, for which it stands still for a moment.
    pub(super) fn peek(
        &mut self,
        address: u64,
        bytes: u32,
        linear: bool,
    ) -> Result<Vec<u8>, String> {
        if bytes > MAX_PEEK {
            return Err(format!("{bytes} bytes are more than {MAX_PEEK}"));
        }
        let wanted = to_usize(bytes.into());
        let out_of_ram = || format!("there is no memory at {address:#x} for {bytes} bytes");
        if !linear {
            let mut found = vec![0; wanted];
            let read = self.memory.read(address, &mut found);
            return read.map(|()| found).map_err(|_| out_of_ram());
        }
        if self.job.is_some() {
            return Err("a job is running".to_owned());
        }
        let runs = self.state == MachineState::Running;
        if runs && let Err(error) = self.threads.hold() {
            // Those that do stand still were to for a moment only.
            self.threads.run();
            return Err(error.to_string());
        }
        let state = self.threads.call(0, |vcpu| vcpu.state());
        if runs {
            self.threads.run();
        }
        let state = state.map_err(|error| error.to_string())?;
        let state = state.map_err(|error| format!("vCPU 0: {error}"))?;
        let found = memory::read(&self.memory, &state.sregs, address, wanted);
        if found.len() == wanted {
            Ok(found)
        } else {
            Err(out_of_ram())
        }
    }
}
