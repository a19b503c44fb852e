//! Log lines on standard error, and the process's name.

use std::ffi::CString;
use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug | Level::Trace => "debug",
        };
        // In raw mode the terminal needs its carriage return. A closed standard error is
        // nobody's to complain to.
        drop(
            std::io::stderr()
                .write_all(format!("vireo-vmm: {level}: {}\r\n", record.args()).as_bytes()),
        );
    }

    fn flush(&self) {}
}

/// Starts logging, as much as `VIREO_LOG` says.
pub fn start() {
    let level = std::env::var("VIREO_LOG")
        .ok()
        .and_then(|text| text.parse().ok());
    log::set_max_level(level.unwrap_or(LevelFilter::Warn));
    // A second start in one process (tests) keeps the first.
    drop(log::set_logger(&Stderr));
}

/// Shows the domain's name (15 bytes of it) in process lists.
pub fn set_name(name: &str) {
    let mut end = name.len().min(15);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let short = name[..end].replace('\0', "");
    if let Ok(short) = CString::new(short) {
        // SAFETY: PR_SET_NAME copies at most 16 bytes of a string that lives through the call.
        unsafe { libc::prctl(libc::PR_SET_NAME, short.as_ptr()) };
    }
}
