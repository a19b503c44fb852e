//! What shells need to complete vireo's command lines.

use crate::command::{Args, Command, Values, data, rest};
use crate::completion;
use crate::failure::{Failure, Result};
use crate::shell::Shell;

/// `completion`
pub const COMPLETION: Command = Command {
    name: "completion",
    summary: "print a shell's completion script",
    description: "Prints what makes bash, zsh or fish complete vireo's commands, options and names of objects.",
    options: &[data("shell", "bash, zsh or fish").values(Values::Words(&["bash", "zsh", "fish"]))],
    handler: script,
    connects: false,
};

/// `complete`, which those scripts call.
pub const COMPLETE: Command = Command {
    name: "complete",
    summary: "internal command for completion scripts",
    description: "Prints what the last word could be, one a line; nothing where it is a file.",
    options: &[rest("string", "the words so far").allow_empty()],
    handler: complete,
    connects: false,
};

/// `compatibility`, from which docs/compatibility.md is made.
pub const COMPATIBILITY: Command = Command {
    name: "compatibility",
    summary: "internal command for the documentation",
    description: "Prints which of virsh's commands are there, in Markdown.",
    options: &[],
    handler: compatibility,
    connects: false,
};

fn compatibility(shell: &mut Shell, _: &Args) -> Result {
    shell.out.quiet = true;
    shell.out.print(crate::compatibility::table(super::GROUPS));
    Ok(())
}

fn script(shell: &mut Shell, args: &Args) -> Result {
    let script = match args.required("shell")? {
        "bash" => include_str!("../../completions/vireo.bash"),
        "zsh" => include_str!("../../completions/vireo.zsh"),
        "fish" => include_str!("../../completions/vireo.fish"),
        other => {
            return Err(Failure::new(format!(
                "no completion for '{other}': it is there for bash, zsh and fish"
            )));
        }
    };
    shell.out.print(script);
    Ok(())
}

fn complete(shell: &mut Shell, args: &Args) -> Result {
    let words: Vec<String> = args.rest("string").into_iter().map(str::to_owned).collect();
    shell.out.quiet = true;
    for found in completion::of_words(shell, &words) {
        // A name with a line break cannot be told apart from two names.
        if !found.contains('\n') {
            shell.out.print(format!("{found}\n"));
        }
    }
    Ok(())
}
