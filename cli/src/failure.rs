//! What a failed command leaves to be printed, in virsh's form.

use std::fmt;

use rpc::error::ErrorCode;

/// Why a command failed.
///
/// Each line is printed on standard error after `error: `: first what the command wanted to do, then why
/// it could not. No line at all is a failure whose exit code says everything (`ttyconsole` without one).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failure {
    /// The lines, outermost first.
    pub lines: Vec<String>,
    /// The connection cannot be used any more: the shell drops it and connects again at the next command.
    pub disconnected: bool,
    /// libvirt's error code, where the daemon gave one.
    pub code: Option<ErrorCode>,
}

/// The outcome of a command or of a step of one.
pub type Result<T = ()> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure with one line.
    pub fn new(line: impl Into<String>) -> Self {
        Self {
            lines: vec![line.into()],
            ..Self::default()
        }
    }

    /// A failure that prints nothing.
    pub fn silent() -> Self {
        Self::default()
    }

    /// Puts what was attempted in front of the reason.
    #[must_use]
    pub fn context(mut self, line: impl Into<String>) -> Self {
        self.lines.insert(0, line.into());
        self
    }

    /// True when the daemon said that it does not have the call, or the driver not the function.
    pub fn is_unsupported(&self) -> bool {
        self.code == Some(ErrorCode::NO_SUPPORT)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines.join(": "))
    }
}

/// Adds a line to a failure on its way up.
pub trait Context<T> {
    /// Puts what was attempted in front of the reason, if there is a failure.
    fn context(self, line: impl Into<String>) -> Result<T>;

    /// As [`Context::context`], for a line that is costly to make.
    fn with_context(self, line: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, line: impl Into<String>) -> Result<T> {
        self.map_err(|failure| failure.context(line))
    }

    fn with_context(self, line: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|failure| failure.context(line()))
    }
}
