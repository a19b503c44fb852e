//! Running the programs that do part of the work, for a limited time.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::error;
use crate::error::{Error, ErrorCode, Result, plain};
use crate::vmm_process::{open_pidfd, wait_for_end};

/// The longest complaint of a program that is passed on, bytes.
const WORDS_MAX: usize = 4096;

/// The path of a program: in PATH, or where only the superuser's PATH may lead.
///
/// # Errors
/// VIR_ERR_SYSTEM_ERROR: it is not installed.
pub fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            error(
                ErrorCode::SYSTEM_ERROR,
                format!("Cannot find '{name}' in path: No such file or directory"),
            )
        })
}

/// A child whose end can be waited for.
pub struct Running {
    /// The process.
    pub child: Child,
    pidfd: OwnedFd,
}

impl Running {
    /// Starts a program.
    ///
    /// # Errors
    /// The system's.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        let mut child = command.spawn()?;
        match open_pidfd(child.id()) {
            Ok(pidfd) => Ok(Self { child, pidfd }),
            Err(error) => {
                // It is of no use without; neither call can do more than fail.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Whether it ends within that time.
    pub fn ends_within(&self, limit: Duration) -> bool {
        wait_for_end(&self.pidfd, limit)
    }
}

/// Runs a program with `input` on its standard input; gives what it wrote.
///
/// # Errors
/// It is not there, fails, or takes longer than `limit`.
pub fn run(path: &Path, arguments: &[&str], input: &str, limit: Duration) -> Result<String> {
    let name = path.display();
    let cannot = |e: &io::Error| Error::system(format!("Cannot run {name}"), e);
    let mut command = Command::new(path);
    command
        .args(arguments)
        .current_dir("/")
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut running = Running::start(&mut command).map_err(|e| cannot(&e))?;
    // Threads of their own: it may read late, and its output may be more than a pipe holds.
    let words = |from: Option<OwnedFd>| {
        let from = from.map(File::from);
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let limit = 16 << 20;
            match from.map(|from| from.take(limit).read_to_end(&mut text)) {
                None | Some(Ok(_)) => {}
                Some(Err(error)) => log::debug!("a program's output: {error}"),
            }
            text
        })
    };
    let out = words(running.child.stdout.take().map(OwnedFd::from));
    let err = words(running.child.stderr.take().map(OwnedFd::from));
    if let Some(mut stdin) = running.child.stdin.take() {
        let input = input.to_owned();
        std::thread::spawn(move || {
            // One that ends before it has read everything says why itself.
            if let Err(error) = stdin.write_all(input.as_bytes()) {
                log::debug!("a program's input: {error}");
            }
        });
    }
    let timely = running.ends_within(limit);
    if !timely && let Err(error) = running.child.kill() {
        log::error!("cannot kill {name}: {error}");
    }
    let status = running.child.wait().map_err(|e| cannot(&e))?;
    if !timely {
        return Err(error(
            ErrorCode::OPERATION_TIMEOUT,
            format!("{name} did not end within {} seconds", limit.as_secs()),
        ));
    }
    let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
        let bytes = thread.join().unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    if status.success() {
        return Ok(text(out));
    }
    Err(failed(&name.to_string(), &status, &text(err)))
}

/// A program that ended badly, with its last words.
pub fn failed(name: &str, status: &std::process::ExitStatus, words: &str) -> Error {
    let how = match status.code() {
        Some(code) => format!("exit status {code}"),
        None => "end by a signal".to_owned(),
    };
    let mut words = words.trim().to_owned();
    let mut cut = words.len().min(WORDS_MAX);
    while !words.is_char_boundary(cut) {
        cut -= 1;
    }
    words.truncate(cut);
    error(
        ErrorCode::INTERNAL_ERROR,
        format!("Child process ({name}) unexpected {how}: {words}"),
    )
}

/// Writes a kernel's setting.
///
/// # Errors
/// The system's, with the path.
pub fn set_kernel(path: &str, value: &str) -> Result<()> {
    // Often it is so already, and in a container it could not be written.
    if std::fs::read_to_string(path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    std::fs::write(path, value).map_err(|e| {
        error(
            ErrorCode::SYSTEM_ERROR,
            format!("cannot write to {path}: {}", plain(&e)),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_run_to_their_end_or_to_the_limit() {
        let sh = find("sh").unwrap();
        let second = Duration::from_secs(20);
        assert_eq!(
            run(&sh, &["-c", "cat; echo y"], "x", second).unwrap(),
            "xy\n"
        );
        let error = run(&sh, &["-c", "echo why >&2; exit 3"], "", second).unwrap_err();
        assert!(error.message.contains("exit status 3: why"), "{error}");
        let error = run(
            &sh,
            &["-c", "exec sleep 600"],
            "",
            Duration::from_millis(50),
        )
        .unwrap_err();
        assert_eq!(error.code, ErrorCode::OPERATION_TIMEOUT);
        let error = find("no-such-program-anywhere").unwrap_err();
        assert_eq!(error.code, ErrorCode::SYSTEM_ERROR);
    }
}
