//! Exceptions that a saved state was about to deliver.

use crate::cpu::Cpu;
use crate::exception::Exception;

impl Cpu {
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
