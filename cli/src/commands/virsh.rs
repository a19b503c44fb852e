//! The shell's own commands.

use std::path::PathBuf;

use super::{GROUPS, os_message};
use crate::command::{Args, Command, Values, find, flag, rest, text};
use crate::failure::{Failure, Result};
use crate::help;
use crate::shell::Shell;

/// `cd`
pub const CD: Command = Command {
    name: "cd",
    summary: "change the current directory",
    description: "Goes to another folder.",
    options: &[text("dir", "where to go (default: home or else root)").values(Values::Files)],
    handler: cd,
    connects: false,
};

/// `pwd`
pub const PWD: Command = Command {
    name: "pwd",
    summary: "print the current directory",
    description: "Prints the current folder.",
    options: &[],
    handler: pwd,
    connects: false,
};

/// `echo`
pub const ECHO: Command = Command {
    name: "echo",
    summary: "echo arguments. Used for internal testing.",
    description: "Prints its words, quoted if asked to.",
    options: &[
        flag("shell", "quoted for a shell"),
        flag("xml", "quoted for XML"),
        flag(
            "split",
            "each word's parts between ',' on lines of their own; ',,' stands for ','",
        ),
        flag("err", "print on standard error"),
        rest("string", "the words").allow_empty(),
    ],
    handler: echo,
    connects: false,
};

/// `help`
pub const HELP: Command = Command {
    name: "help",
    summary: "print help",
    description: "Lists the commands, those of one group, or explains one command.",
    options: &[text("command", "a command, or a group's keyword").values(Values::Commands)],
    handler: help_command,
    connects: false,
};

/// `quit`
pub const QUIT: Command = Command {
    name: "quit",
    summary: "quit this interactive terminal",
    description: "",
    options: &[],
    handler: quit,
    connects: false,
};

/// `exit`
pub const EXIT: Command = Command {
    name: "exit",
    summary: "quit this interactive terminal",
    description: "",
    options: &[],
    handler: quit,
    connects: false,
};

/// `connect`
pub const CONNECT: Command = Command {
    name: "connect",
    summary: "(re)connect to hypervisor",
    description: "Connects to another daemon, or once more to the same.",
    options: &[
        text("name", "its connection URI"),
        flag("readonly", "look, but change nothing"),
    ],
    handler: connect,
    connects: false,
};

fn cd(shell: &mut Shell, args: &Args) -> Result {
    if !shell.interactive {
        return Err(Failure::new("cd: command valid only in interactive mode"));
    }
    let dir = match args.text("dir")? {
        Some(dir) => PathBuf::from(dir),
        None => std::env::var_os("HOME").map_or_else(|| PathBuf::from("/"), PathBuf::from),
    };
    std::env::set_current_dir(&dir)
        .map_err(|error| Failure::new(format!("cd: {}: {}", os_message(&error), dir.display())))
}

fn pwd(shell: &mut Shell, _: &Args) -> Result {
    let dir = std::env::current_dir().map_err(|error| {
        Failure::new(format!(
            "pwd: cannot get current directory: {}",
            os_message(&error)
        ))
    })?;
    shell.out.print(format!("{}\n", dir.display()));
    Ok(())
}

fn echo(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("shell", "xml")?;
    args.exclusive("shell", "split")?;
    args.exclusive("xml", "split")?;
    let words: Vec<String> = args
        .rest("string")
        .into_iter()
        .map(|word| quote(word, args))
        .collect();
    let text = words.join(if args.has("split") { "\n" } else { " " });
    if args.has("err") {
        shell.out.error(&text);
    } else {
        shell.out.print(text);
    }
    Ok(())
}

fn quote(word: &str, args: &Args) -> String {
    if args.has("shell") {
        quote_shell(word)
    } else if args.has("xml") {
        quote_xml(word)
    } else if args.has("split") {
        split(word).join("\n")
    } else {
        word.to_owned()
    }
}

/// A word that a shell takes as it is.
fn quote_shell(word: &str) -> String {
    let harmless = |c: char| c.is_ascii_alphanumeric() || "%+,-./:=@_".contains(c) || !c.is_ascii();
    if !word.is_empty() && word.chars().all(harmless) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn quote_xml(word: &str) -> String {
    let mut quoted = String::with_capacity(word.len());
    for c in word.chars() {
        match c {
            '&' => quoted.push_str("&amp;"),
            '<' => quoted.push_str("&lt;"),
            '>' => quoted.push_str("&gt;"),
            '"' => quoted.push_str("&quot;"),
            '\'' => quoted.push_str("&apos;"),
            _ => quoted.push(c),
        }
    }
    quoted
}

/// The parts between commas; two commas stand for one that is part of the text.
fn split(word: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = word.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

fn help_command(shell: &mut Shell, args: &Args) -> Result {
    let mut text = String::new();
    match args.text("command")? {
        None => {
            text.push_str("Grouped commands:\n\n");
            help::groups(GROUPS, &mut text, ":");
        }
        Some(name) => {
            // virsh calls its own group by its own name.
            let keyword = if name == "virsh" { "vireo" } else { name };
            if let Some(command) = find(GROUPS, name) {
                text = help::command(command);
            } else if let Some(group) = GROUPS.iter().find(|group| group.keyword == keyword) {
                help::group(group, &mut text, ":");
            } else {
                return Err(Failure::new(format!(
                    "command or command group '{name}' doesn't exist"
                )));
            }
        }
    }
    shell.out.print(text);
    Ok(())
}

fn quit(shell: &mut Shell, _: &Args) -> Result {
    shell.leave();
    Ok(())
}

fn connect(shell: &mut Shell, args: &Args) -> Result {
    let uri = args.text("name")?.map(str::to_owned);
    shell.connect(uri.as_deref(), args.has("readonly"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quote_shell("a"), "a");
        assert_eq!(quote_shell("b c"), "'b c'");
        assert_eq!(quote_shell("it's"), "'it'\\''s'");
        assert_eq!(quote_shell(""), "''");
    }

    #[test]
    fn words_are_split_at_single_commas() {
        assert_eq!(split("a,b,,c"), ["a", "b,c"]);
        assert_eq!(split(""), [""]);
    }

    #[test]
    fn words_are_quoted_for_xml() {
        assert_eq!(quote_xml("<a>&\""), "&lt;a&gt;&amp;&quot;");
    }
}
