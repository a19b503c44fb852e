//! Standard input and output: raw mode, and a way out of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::{CharError, os};

/// Ctrl-A starts an escape.
const ESCAPE: u8 = 1;

/// The process's own terminal, pipe or file.
#[derive(Debug)]
pub struct Stdio {
    input: Option<OwnedFd>,
    output: OwnedFd,
    saved: Option<Termios>,
    escape: bool,
}

/// What the user typed, without escapes.
#[derive(Debug, PartialEq, Eq)]
pub struct Typed {
    /// For the guest.
    pub data: Vec<u8>,
    /// Ctrl-A x.
    pub quit: bool,
}

impl Stdio {
    /// Standard input and output. A terminal is put into raw mode until this is dropped.
    ///
    /// # Errors
    /// A descriptor is closed, or the terminal refuses.
    pub fn open() -> Result<Self, CharError> {
        let duplicate = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned().map_err(|error| CharError::Os {
                what: "standard input or output".into(),
                errno: nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0)),
            })
        };
        let input = duplicate(std::io::stdin().as_fd())?;
        let output = duplicate(std::io::stdout().as_fd())?;
        let mut saved = None;
        if let Ok(termios) = tcgetattr(&input) {
            let mut raw = termios.clone();
            cfmakeraw(&mut raw);
            tcsetattr(&input, SetArg::TCSANOW, &raw).map_err(os("tcsetattr"))?;
            saved = Some(termios);
        }
        Ok(Self {
            input: Some(input),
            output,
            saved,
            escape: false,
        })
    }

    /// Standard error, output only.
    ///
    /// # Errors
    /// The descriptor is closed.
    pub fn stderr() -> Result<Self, CharError> {
        let output = std::io::stderr()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| CharError::Os {
                what: "standard error".into(),
                errno: nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0)),
            })?;
        Ok(Self {
            input: None,
            output,
            saved: None,
            escape: false,
        })
    }

    /// Where input comes from.
    #[must_use]
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd)
    }

    /// Where output goes.
    #[must_use]
    pub fn output(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }

    /// Takes escapes out of what was typed: Ctrl-A x quits, Ctrl-A Ctrl-A (or a) is Ctrl-A.
    /// Input that is no terminal has no escapes.
    pub fn typed(&mut self, input: &[u8]) -> Typed {
        let mut typed = Typed {
            data: Vec::with_capacity(input.len()),
            quit: false,
        };
        if self.saved.is_none() {
            typed.data.extend(input);
            return typed;
        }
        for &byte in input {
            if std::mem::take(&mut self.escape) {
                match byte {
                    b'x' | b'X' => typed.quit = true,
                    b'a' | ESCAPE => typed.data.push(ESCAPE),
                    other => typed.data.extend([ESCAPE, other]),
                }
            } else if byte == ESCAPE {
                self.escape = true;
            } else {
                typed.data.push(byte);
            }
        }
        typed
    }

    /// A terminal is in raw mode.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.saved.is_some()
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        if let (Some(input), Some(saved)) = (&self.input, &self.saved)
            && let Err(error) = tcsetattr(input, SetArg::TCSADRAIN, saved)
        {
            log::error!("restoring the terminal: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chardev::Pty;

    #[test]
    fn escapes_only_on_a_terminal() {
        let pty = Pty::open().unwrap();
        let slave: OwnedFd = std::fs::File::options()
            .read(true)
            .write(true)
            .open(pty.path())
            .unwrap()
            .into();
        let saved = tcgetattr(&slave).unwrap();
        let output = slave.try_clone().unwrap();
        let mut stdio = Stdio {
            input: Some(slave),
            output,
            saved: Some(saved),
            escape: false,
        };
        assert_eq!(
            stdio.typed(b"a\x01"),
            Typed {
                data: b"a".into(),
                quit: false
            }
        );
        assert_eq!(
            stdio.typed(b"\x01b\x01cd"),
            Typed {
                data: b"\x01b\x01cd".into(),
                quit: false
            }
        );
        assert!(stdio.typed(b"\x01x").quit);
        stdio.saved = None;
        assert_eq!(
            stdio.typed(b"\x01x"),
            Typed {
                data: b"\x01x".into(),
                quit: false
            }
        );
    }
}
