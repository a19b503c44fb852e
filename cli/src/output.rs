//! Standard output and standard error, in virsh's manner.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Where a command prints.
///
/// Standard output is buffered and written out before anything goes to standard error, so that both read in
/// the right order when they end up in the same place.
#[derive(Debug)]
pub struct Output {
    buffer: Vec<u8>,
    log: Option<File>,
    /// Leaves out what is for people only: messages of success, table headers, blank lines.
    pub quiet: bool,
}

/// The buffer is written out when it holds this many bytes.
const FLUSH_AT: usize = 32 * 1024;

impl Output {
    /// Output to the process's standard streams.
    pub fn new(quiet: bool) -> Self {
        Self {
            buffer: Vec::new(),
            log: None,
            quiet,
        }
    }

    /// Also appends every error to a file (`--log`).
    ///
    /// # Errors
    ///
    /// The file cannot be opened for appending.
    pub fn log_to(&mut self, path: &Path) -> io::Result<()> {
        self.log = Some(OpenOptions::new().append(true).create(true).open(path)?);
        Ok(())
    }

    /// Prints text as it is.
    pub fn print(&mut self, text: impl AsRef<str>) {
        self.print_bytes(text.as_ref().as_bytes());
    }

    /// Prints bytes as they are.
    pub fn print_bytes(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= FLUSH_AT {
            self.flush();
        }
    }

    /// Prints text unless `--quiet` was given.
    pub fn print_extra(&mut self, text: impl AsRef<str>) {
        if !self.quiet {
            self.print(text);
        }
    }

    /// Writes out what is buffered.
    ///
    /// A reader that has gone away (`vireo list | head -1`) ends the program quietly with status 1; any
    /// other failure to write is reported and ends it too: output that is lost must not look like success.
    pub fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(&self.buffer).and_then(|()| stdout.flush());
        self.buffer.clear();
        if let Err(error) = written {
            if error.kind() != io::ErrorKind::BrokenPipe {
                // Standard error is the last resort; if it is gone as well, the exit status remains.
                let _ = writeln!(
                    io::stderr(),
                    "error: cannot write to standard output: {error}"
                );
            }
            std::process::exit(1);
        }
    }

    /// Prints `error: ` and a line on standard error, and into the log.
    pub fn error(&mut self, line: &str) {
        self.error_raw(&format!("error: {line}\n"));
        if let Some(log) = &mut self.log {
            let stamp = crate::time::local("%Y.%m.%d %H:%M:%S");
            let entry = format!("[{stamp} vireo {}] ERROR {line}\n", std::process::id());
            if let Err(error) = log.write_all(entry.as_bytes()) {
                self.log = None;
                self.error_raw(&format!("error: failed to write the log file: {error}\n"));
            }
        }
    }

    /// Prints on standard error without a prefix.
    pub fn error_raw(&mut self, text: &str) {
        self.flush();
        // Nobody reads the messages: the exit status still tells.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.flush();
    }
}
