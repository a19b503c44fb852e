//! What a restored state needs besides its registers.

use crate::cpu::Cpu;
use crate::exception::Exception;
use crate::state::{cr0, cr4};

impl Cpu {
    /// Fetches the PDPTEs that CR3 points to, where PAE paging without long mode keeps them in
    /// the processor (Intel SDM vol. 3, 4.4.1). Saved states do not hold them: what is in
    /// memory is taken for what was loaded, as KVM does.
    pub fn restore_pdptes(&mut self) {
        let s = &mut self.s;
        if s.cr0 & cr0::PG == 0 || s.cr4 & cr4::PAE == 0 || s.long_mode() {
            return;
        }
        let mut bytes = [0; 32];
        if !self.machine.memory.read(s.cr3 & 0xffff_ffe0, &mut bytes) {
            log::debug!("CR3 {:#x} is not RAM", s.cr3);
        }
        for (entry, bytes) in s.pdpte.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *entry = u64::from_le_bytes(*bytes);
        }
    }

    /// The exception the next `run` delivers first.
    pub fn injected(&self) -> Option<Exception> {
        self.pending
    }

    /// Sets the exception the next `run` delivers first: vector and error code. CR2 has been
    /// set already.
    pub fn inject(&mut self, exception: Option<(u8, Option<u32>)>) {
        self.pending = exception.map(|(vector, code)| Exception {
            // A page fault's address goes to CR2 on delivery: it stays what it is.
            cr2: self.s.cr2,
            code: code.unwrap_or(0),
            vector,
            has_code: code.is_some(),
        });
    }
}
