//! The program `vireo-vmm`: arguments, config, exit record, exit status.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use vmm_api::config::{MachineConfig, Resource};
use vmm_api::control::{ExitCause, ExitRecord};

use crate::machine::{Ending, Machine, block_signals};
use crate::{gdb, resource};

const USAGE: &str = "\
Usage: vireo-vmm --config FILE | --config-fd N [--gdb PATH | tcp:HOST:PORT [--gdb-wait]]

Runs one virtual machine, described in JSON, until it ends.

  --config FILE    the machine's description
  --config-fd N    the same, from an inherited descriptor
  --gdb ADDRESS    gdb may look at the guest through this UNIX socket or TCP port
  --gdb-wait       the guest's first instruction waits for gdb
  --version        version
  --help           this text

A serial port on standard input and output: Ctrl-A x ends the machine, Ctrl-A a sends Ctrl-A.
Exit status: 0 after an orderly end, (V << 1) | 1 after V was written to the debug exit port,
1 after a failure or a crash of the guest (the message is on standard error).
VIREO_LOG=error|warn|info|debug sets how much is logged to standard error (default: warn).
";

/// Longest config in bytes.
const CONFIG_MAX: u64 = 4 << 20;

/// How long the process of a guest that has left keeps its memory.
const LINGER: Duration = Duration::from_millis(20);

/// What `--gdb` asked for.
struct Gdb {
    address: gdb::Address,
    wait: bool,
}

enum Arguments {
    Run(Resource, Option<Gdb>),
    Print(String),
}

fn parse<I: Iterator<Item = String>>(mut arguments: I) -> Result<Arguments, String> {
    let mut config = None;
    let (mut address, mut wait) = (None, false);
    while let Some(argument) = arguments.next() {
        let (name, inline) = match argument.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (argument, None),
        };
        let mut value = || {
            inline
                .clone()
                .or_else(|| arguments.next())
                .ok_or(format!("{name} needs a value"))
        };
        match name.as_str() {
            "--config" => config = Some(Resource::Path(PathBuf::from(value()?))),
            "--config-fd" => {
                let text = value()?;
                let fd: RawFd = text
                    .parse()
                    .map_err(|_| format!("{text} is not a descriptor number"))?;
                config = Some(Resource::Fd(fd));
            }
            "--gdb" => address = Some(value()?.parse::<gdb::Address>()?),
            "--gdb-wait" => wait = true,
            "--version" | "-V" => {
                return Ok(Arguments::Print(format!(
                    "vireo-vmm {}\n",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            "--help" | "-h" => return Ok(Arguments::Print(USAGE.into())),
            _ => return Err(format!("unknown argument {name}; see vireo-vmm --help")),
        }
    }
    if wait && address.is_none() {
        return Err("--gdb-wait: where is gdb awaited? Give --gdb as well".into());
    }
    let gdb = address.map(|address| Gdb { address, wait });
    config
        .map(|config| Arguments::Run(config, gdb))
        .ok_or_else(|| "which machine? See vireo-vmm --help".into())
}

fn read_config(at: &Resource) -> Result<MachineConfig, String> {
    let name = resource::name(at);
    let file = resource::open_read(at).map_err(|e| e.to_string())?;
    let mut text = Vec::new();
    file.take(CONFIG_MAX + 1)
        .read_to_end(&mut text)
        .map_err(|e| format!("{name}: {e}"))?;
    if text.len() as u64 > CONFIG_MAX {
        return Err(format!("{name}: longer than {CONFIG_MAX} bytes"));
    }
    serde_json::from_slice(&text).map_err(|e| format!("{name}: {e}"))
}

/// Where the exit record goes; a path is written beside itself and renamed, so that nobody
/// reads half of it.
enum RecordFile {
    Descriptor(File),
    Path(PathBuf),
}

impl RecordFile {
    fn open(at: &Resource) -> Result<Self, String> {
        match at {
            Resource::Fd(_) => resource::open_write(at)
                .map(Self::Descriptor)
                .map_err(|e| e.to_string()),
            Resource::Path(path) => Ok(Self::Path(path.clone())),
        }
    }

    fn write(self, record: &ExitRecord) -> std::io::Result<()> {
        let text = serde_json::to_vec(record)?;
        match self {
            Self::Descriptor(mut file) => file.write_all(&text),
            Self::Path(path) => {
                let mut partial = path.clone().into_os_string();
                partial.push(".new");
                std::fs::write(&partial, &text)?;
                std::fs::rename(&partial, &path)
            }
        }
    }
}

/// Runs the program with its `arguments` (without its own name); returns the exit status.
pub fn main<I: Iterator<Item = String>>(arguments: I) -> i32 {
    one_arena();
    crate::logger::start();
    let (at, gdb) = match parse(arguments) {
        Ok(Arguments::Run(at, gdb)) => (at, gdb),
        Ok(Arguments::Print(text)) => {
            // Nobody to tell if standard output is closed.
            return i32::from(std::io::stdout().write_all(text.as_bytes()).is_err());
        }
        Err(message) => return fail(&message),
    };
    let config = match read_config(&at) {
        Ok(config) => config,
        Err(message) => return fail(&message),
    };
    crate::logger::set_name(&config.name);
    let record = match config
        .exit_record
        .as_ref()
        .map(RecordFile::open)
        .transpose()
    {
        Ok(record) => record,
        Err(message) => return fail(&message),
    };
    let ending = run(config, gdb.as_ref());
    if ending.record.cause == ExitCause::Failed || ending.record.cause == ExitCause::Crashed {
        fail(&ending.record.message);
    }
    if let Some(record) = record
        && let Err(error) = record.write(&ending.record)
    {
        return fail(&format!("writing the exit record: {error}"));
    }
    ending.status
}

/// One heap for all threads: a vCPU thread's own would start with pages of its own and grow by
/// a system call a page.
fn one_arena() {
    // SAFETY: sets a parameter of the allocator; before any other thread exists.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } == 0 {
        log::debug!("mallopt: the allocator keeps an arena a thread");
    }
}

fn run(config: MachineConfig, gdb: Option<&Gdb>) -> Ending {
    let machine = block_signals()
        .and_then(|()| Machine::new(config))
        .and_then(|mut machine| {
            machine.watch_signals()?;
            if let Some(gdb) = gdb {
                machine.serve_gdb(&gdb.address, gdb.wait)?;
            }
            Ok(machine)
        });
    match machine {
        Ok(mut machine) => {
            let ending = machine.run();
            if ending.record.cause == ExitCause::Migrated {
                // Giving much memory back would be in the way of a guest that goes on on this host.
                std::thread::sleep(LINGER);
            }
            // The process ends: threads and memory go with it at once.
            std::mem::forget(machine);
            ending
        }
        Err(error) => {
            let record = ExitRecord {
                cause: ExitCause::Failed,
                message: error.to_string(),
            };
            Ending { record, status: 1 }
        }
    }
}

fn fail(message: &str) -> i32 {
    eprintln!("vireo-vmm: {message}");
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Result<Arguments, String> {
        parse(words.iter().map(|w| (*w).to_owned()))
    }

    #[test]
    fn takes_a_config_either_way() {
        assert!(matches!(
            arguments(&["--config", "m.json"]),
            Ok(Arguments::Run(Resource::Path(_), None))
        ));
        assert!(matches!(
            arguments(&["--config-fd=7"]),
            Ok(Arguments::Run(Resource::Fd(7), None))
        ));
    }

    #[test]
    fn says_what_is_wrong() {
        assert!(arguments(&[]).is_err());
        assert!(arguments(&["--config"]).is_err());
        assert!(arguments(&["--config-fd", "x"]).is_err());
        assert!(arguments(&["--bogus"]).is_err());
    }
}
