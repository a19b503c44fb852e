//! Other programs (`mount`, `mkfs`, `showmount`), each with a time limit.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{error, system};
use crate::error::{ErrorCode, Result};

/// Most that is read of what a program says, bytes.
const OUTPUT_MOST: u64 = 1 << 20;
/// How often it is looked whether a program has ended.
const STEP: Duration = Duration::from_millis(5);

/// What a program said.
#[derive(Debug)]
pub struct Said {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// The command as a person would type it.
fn shown(program: &str, args: &[&str]) -> String {
    let mut shown = program.to_owned();
    for arg in args {
        shown.push(' ');
        shown.push_str(arg);
    }
    shown
}

/// Runs a program to its end, or until `limit`: then it is killed, and left behind if even that
/// does not end it (it waits inside the kernel for a server).
///
/// # Errors
/// It is not installed, or was too slow.
pub fn run(program: &str, args: &[&str], limit: Duration) -> Result<Said> {
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => system(format!("Cannot find '{program}' in path"), &cause),
            _ => system(format!("cannot run '{program}'"), &cause),
        })?;
    let collect = |from: Option<Box<dyn Read + Send>>| {
        thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(from) = from {
                // What was read until an error is what there is.
                let _ = from.take(OUTPUT_MOST).read_to_end(&mut text);
            }
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let out = collect(child.stdout.take().map(|o| Box::new(o) as _));
    let err = collect(child.stderr.take().map(|e| Box::new(e) as _));
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => thread::sleep(STEP),
            Ok(None) => {
                kill(&mut child);
                return Err(error(
                    ErrorCode::OPERATION_TIMEOUT,
                    format!(
                        "'{}' did not end within {} seconds",
                        shown(program, args),
                        limit.as_secs()
                    ),
                ));
            }
            Err(cause) => return Err(system(format!("cannot wait for '{program}'"), &cause)),
        }
    };
    let text = |thread: thread::JoinHandle<String>| thread.join().unwrap_or_default();
    Ok(Said {
        status,
        out: text(out),
        err: text(err),
    })
}

/// Runs a program that must succeed.
///
/// # Errors
/// As [`run`]; VIR_ERR_INTERNAL_ERROR with what it said.
pub fn must(program: &str, args: &[&str], limit: Duration) -> Result<Said> {
    let said = run(program, args, limit)?;
    if said.status.success() {
        return Ok(said);
    }
    Err(error(
        ErrorCode::INTERNAL_ERROR,
        format!(
            "Child process ({}) unexpected {}: {}",
            shown(program, args),
            said.status.to_string().replace(": ", " "),
            said.err.trim_end()
        ),
    ))
}

fn kill(child: &mut Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // SAFETY: kill(2) has no memory effects; the process group is the child's own, and the
        // child is not reaped yet.
        unsafe { libc::kill(-pid, libc::SIGKILL) };
    }
    // Reaped if it ends at once; else init does it after us.
    for _ in 0..100 {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(STEP);
    }
    log::warn!("process {} does not end although it was killed", child.id());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_end_or_are_ended() {
        let said = run(
            "sh",
            &["-c", "echo a; echo b >&2; exit 3"],
            Duration::from_secs(20),
        )
        .unwrap();
        assert_eq!((said.out.as_str(), said.err.as_str()), ("a\n", "b\n"));
        assert_eq!(said.status.code(), Some(3));
        let slow = run("sleep", &["1000"], Duration::from_millis(50)).unwrap_err();
        assert_eq!(slow.code, ErrorCode::OPERATION_TIMEOUT);
        let missing = run("no-such-program-here", &[], Duration::from_secs(1)).unwrap_err();
        assert!(
            missing
                .message
                .starts_with("Cannot find 'no-such-program-here' in path")
        );
        let failed = must(
            "sh",
            &["-c", "echo why >&2; exit 32"],
            Duration::from_secs(20),
        )
        .unwrap_err();
        assert_eq!(
            failed.message,
            "internal error: Child process (sh -c echo why >&2; exit 32) unexpected exit status 32: why"
        );
    }
}
