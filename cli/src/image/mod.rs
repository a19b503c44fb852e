//! `vireo image`: the image tool beside the manager, with qemu-img's sub-commands, options, output
//! and exit codes, for raw, qcow2 and LUKS images.

mod amend;
mod args;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod help;
mod info;
mod json;
mod keys;
mod map;
mod measure;
mod open;
mod options;
mod progress;
mod rebase;
mod resize;
mod snapshot;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use args::Args;

/// Why a sub-command did not do what it was asked to.
#[derive(Debug)]
pub enum Failure {
    /// What it is called with makes no sense.
    Usage {
        /// The sub-command whose help says more.
        command: Option<String>,
        /// In words.
        what: String,
        /// The words name the program and the command already.
        prefixed: bool,
    },
    /// What happened, and the exit code.
    Failed(String, u8),
}

impl Failure {
    /// An ordinary failure.
    pub fn new(what: impl Into<String>) -> Self {
        Self::Failed(what.into(), 1)
    }

    /// A call that makes no sense.
    pub fn usage(command: &str, what: impl Into<String>) -> Self {
        Self::Usage {
            command: Some(command.to_owned()),
            what: what.into(),
            prefixed: false,
        }
    }

    /// The same with another exit code.
    pub fn code(self, code: u8) -> Self {
        match self {
            Self::Failed(what, _) => Self::Failed(what, code),
            usage @ Self::Usage { .. } => usage,
        }
    }
}

impl From<images::Error> for Failure {
    fn from(error: images::Error) -> Self {
        Self::new(open::message(&error))
    }
}

/// What a sub-command did: its exit code.
pub type Done = Result<u8, Failure>;

struct Command {
    name: &'static str,
    run: fn(Args) -> Done,
    specs: &'static [args::Spec],
}

const COMMANDS: &[Command] = &[
    Command {
        name: "amend",
        run: amend::run,
        specs: amend::SPECS,
    },
    Command {
        name: "bench",
        run: bench::run,
        specs: bench::SPECS,
    },
    Command {
        name: "bitmap",
        run: bitmap::run,
        specs: bitmap::SPECS,
    },
    Command {
        name: "check",
        run: check::run,
        specs: check::SPECS,
    },
    Command {
        name: "commit",
        run: commit::run,
        specs: commit::SPECS,
    },
    Command {
        name: "compare",
        run: compare::run,
        specs: compare::SPECS,
    },
    Command {
        name: "convert",
        run: convert::run,
        specs: convert::SPECS,
    },
    Command {
        name: "create",
        run: create::run,
        specs: create::SPECS,
    },
    Command {
        name: "dd",
        run: dd::run,
        specs: dd::SPECS,
    },
    Command {
        name: "info",
        run: info::run,
        specs: info::SPECS,
    },
    Command {
        name: "map",
        run: map::run,
        specs: map::SPECS,
    },
    Command {
        name: "measure",
        run: measure::run,
        specs: measure::SPECS,
    },
    Command {
        name: "rebase",
        run: rebase::run,
        specs: rebase::SPECS,
    },
    Command {
        name: "resize",
        run: resize::run,
        specs: resize::SPECS,
    },
    Command {
        name: "snapshot",
        run: snapshot::run,
        specs: snapshot::SPECS,
    },
];

/// Runs `vireo image` with the words after it.
pub fn main(words: Vec<OsString>) -> ExitCode {
    let code = match run(words) {
        Ok(code) => code,
        Err(Failure::Failed(what, code)) => {
            if !what.is_empty() {
                error(&what);
            }
            code
        }
        Err(Failure::Usage {
            command,
            what,
            prefixed,
        }) => {
            if prefixed {
                eprintln!("vireo {what}");
            } else {
                error(&what);
            }
            match command {
                Some(command) => {
                    eprintln!("Try 'vireo image {command} --help' for more info");
                }
                None => eprintln!("Try 'vireo image --help' for more info"),
            }
            1
        }
    };
    // Whoever reads the output may have gone; that is his business.
    let _ = std::io::stdout().flush();
    ExitCode::from(code)
}

fn run(words: Vec<OsString>) -> Done {
    let mut words = words.into_iter();
    let missing = |what: &str| Failure::Usage {
        command: None,
        what: what.to_owned(),
        prefixed: false,
    };
    let Some(name) = words.next() else {
        return Err(missing("Not enough arguments"));
    };
    let name = name.to_string_lossy().into_owned();
    match name.as_str() {
        "-h" | "--help" => {
            say(&help::all());
            return Ok(0);
        }
        "-V" | "--version" => {
            say(concat!(
                "vireo image version ",
                env!("CARGO_PKG_VERSION"),
                "\n"
            ));
            return Ok(0);
        }
        option if option.starts_with('-') => {
            return Err(Failure::Usage {
                command: None,
                what: format!("image: unrecognized option '{option}'"),
                prefixed: true,
            });
        }
        _ => {}
    }
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        return Err(missing(&format!("Command not found: {name}")));
    };
    let args = Args::parse(&name, command.specs, words.collect())?;
    if args.has("help") {
        say(&help::of(command.name, command.specs));
        return Ok(0);
    }
    (command.run)(args)
}

/// Says that something went wrong.
pub fn error(what: &str) {
    eprintln!("vireo image: {what}");
}

/// Prints a result.
pub fn say(what: &str) {
    // Whoever reads it may have gone; that is his business.
    let _ = std::io::stdout().write_all(what.as_bytes());
}
