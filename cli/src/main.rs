//! vireo, the command: virsh's commands over libvirt's wire protocol.

mod command;
mod commands;
mod compatibility;
mod completion;
mod connection;
mod editor;
mod failure;
mod far;
mod help;
mod image;
mod keys;
mod names;
mod options;
mod output;
mod parser;
mod shell;
mod signals;
mod size;
mod table;
mod terminal;
mod time;
mod uri;
mod validate;
mod xpath;

use std::process::ExitCode;

use options::{Action, Options};
use output::Output;
use shell::Shell;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1).peekable();
    // A tool of its own, which needs no daemon.
    if words.next_if(|word| word == "image").is_some() {
        return image::main(words.collect());
    }
    let words = words.map(|word| word.to_string_lossy().into_owned());
    let succeeded = match options::parse(words) {
        Ok(options) => run(&options),
        Err(error) => {
            Output::new(false).error(&error);
            false
        }
    };
    if succeeded {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(options: &Options) -> bool {
    match options.action {
        Action::Help => {
            let mut text = options::USAGE.to_owned();
            help::groups(commands::GROUPS, &mut text, "");
            text.push_str(
                "\n  (specify help <group> for details about the commands in the group)\n",
            );
            text.push_str("\n  (specify help <command> for details about the command)\n\n");
            Output::new(false).print(text);
        }
        Action::ShortVersion => Output::new(false).print(concat!(env!("CARGO_PKG_VERSION"), "\n")),
        Action::LongVersion => Output::new(false).print(format!(
            "Vireo {}, the command line tool of the Vireo virtual machine manager\n\
             Speaks libvirt's protocol, as of libvirt {}\n",
            env!("CARGO_PKG_VERSION"),
            commands::host::API
        )),
        Action::Run if options.words.is_empty() => return shell::interact(Shell::new(options)),
        Action::Run => return Shell::new(options).run_words(&options.words),
    }
    true
}
