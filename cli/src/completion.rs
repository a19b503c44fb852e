//! What the Tab key offers: commands, their options, and the values of those.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::validate::Validator;
use rustyline::{Context, Helper};

use crate::command::{self, Command, Kind, Opt, Values};
use crate::commands::GROUPS;
use crate::shell::Shell;

/// Completion for the line editor; asks the daemon for names only when they are needed.
pub struct Completion {
    shell: Rc<RefCell<Shell>>,
    files: FilenameCompleter,
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion").finish_non_exhaustive()
    }
}

impl Completion {
    /// Completion for a shell. It borrows the shell only during [`Completer::complete`].
    pub fn new(shell: Rc<RefCell<Shell>>) -> Self {
        Self {
            shell,
            files: FilenameCompleter::new(),
        }
    }
}

/// What could stand at the end of a line.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Command,
    /// An option of a command that is not there yet.
    Options(Vec<&'static str>),
    Value(Values),
    Nothing,
}

/// Finds out what could stand where the last word of a line stands, and where that word begins.
fn wanted(line: &str) -> (usize, Wanted) {
    let segment = line.rfind([';', '\n']).map_or(0, |at| at + 1);
    let text = &line[segment..];
    let start = segment + text.rfind([' ', '\t']).map_or(0, |at| at + 1);
    let word = &line[start..];
    let mut before = line[segment..start]
        .split([' ', '\t'])
        .filter(|word| !word.is_empty());
    let Some(name) = before.next() else {
        return (start, Wanted::Command);
    };
    let Some(command) = command::find(GROUPS, name) else {
        return (start, Wanted::Nothing);
    };
    let mut seen = Vec::new();
    let mut pending: Option<&Opt> = None;
    for word in before {
        if pending.take().is_some() {
            continue;
        }
        let option = word.strip_prefix("--").and_then(|option| {
            let (name, inline) = option
                .split_once('=')
                .map_or((option, false), |(name, _)| (name, true));
            let option = command.options.iter().find(|option| option.name == name)?;
            Some((option, inline))
        });
        match option {
            Some((option, inline)) => {
                seen.push(option.name);
                pending = (option.kind != Kind::Flag && !inline).then_some(option);
            }
            None => {
                if let Some(option) = next_positional(command, &seen) {
                    seen.push(option.name);
                }
            }
        }
    }
    if let Some(option) = pending {
        return (start, Wanted::Value(option.values));
    }
    if let Some((option, _)) = word
        .strip_prefix("--")
        .and_then(|word| word.split_once('='))
    {
        let values = command
            .options
            .iter()
            .find(|known| known.name == option)
            .map(|known| known.values);
        let start = start + "--".len() + option.len() + "=".len();
        return (start, values.map_or(Wanted::Nothing, Wanted::Value));
    }
    let positional = next_positional(command, &seen).filter(|option| option.values != Values::None);
    match positional {
        Some(option) if !word.starts_with('-') => (start, Wanted::Value(option.values)),
        _ => {
            let names = command.options.iter().map(|option| option.name);
            (
                start,
                Wanted::Options(names.filter(|name| !seen.contains(name)).collect()),
            )
        }
    }
}

fn next_positional(command: &Command, seen: &[&str]) -> Option<&'static Opt> {
    let command = command::find(GROUPS, command.name)?;
    command.options.iter().find(|option| match option.kind {
        Kind::Flag => false,
        Kind::Rest => true,
        _ => !option.named_only && !seen.contains(&option.name),
    })
}

impl Completer for Completion {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        at: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let line = &line[..at];
        let (start, wanted) = wanted(line);
        let candidates: Vec<String> = match wanted {
            Wanted::Command => command_names(),
            Wanted::Options(names) => names.iter().map(|name| format!("--{name}")).collect(),
            Wanted::Value(Values::Commands) => {
                let groups = GROUPS.iter().map(|group| group.keyword.to_owned());
                command_names().into_iter().chain(groups).collect()
            }
            Wanted::Value(Values::Domains) => {
                // Borrowed already: the editor runs inside a command, which nothing does.
                self.shell
                    .try_borrow_mut()
                    .map(|mut shell| shell.domain_names())
                    .unwrap_or_default()
            }
            Wanted::Value(Values::Events) => crate::commands::events::NAMES
                .iter()
                .map(|name| (*name).to_owned())
                .collect(),
            Wanted::Value(Values::Words(words)) => {
                words.iter().map(|word| (*word).to_owned()).collect()
            }
            Wanted::Value(Values::Files) => return self.files.complete_path(line, at),
            Wanted::Value(Values::None) | Wanted::Nothing => Vec::new(),
        };
        let typed = &line[start..];
        let mut matching: Vec<String> = candidates
            .into_iter()
            .filter(|candidate| candidate.starts_with(typed))
            .collect();
        matching.sort_unstable();
        let only = matching.len() == 1;
        let pairs = matching.into_iter().map(|candidate| {
            let mut replacement = quoted(&candidate);
            if only {
                replacement.push(' ');
            }
            Pair {
                display: candidate,
                replacement,
            }
        });
        Ok((start, pairs.collect()))
    }
}

fn command_names() -> Vec<String> {
    GROUPS
        .iter()
        .flat_map(|group| group.commands)
        .map(|command| command.name.to_owned())
        .collect()
}

/// A word with a backslash before what the parser would take apart.
fn quoted(word: &str) -> String {
    let mut quoted = String::with_capacity(word.len());
    for c in word.chars() {
        if matches!(c, ' ' | '\t' | ';' | '\'' | '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted
}

impl Hinter for Completion {
    type Hint = String;
}

impl Highlighter for Completion {}

impl Validator for Completion {}

impl Helper for Completion {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_is_a_command() {
        assert_eq!(wanted(""), (0, Wanted::Command));
        assert_eq!(wanted("do"), (0, Wanted::Command));
        assert_eq!(wanted("list; do"), (6, Wanted::Command));
        assert_eq!(wanted("nosuch x"), (7, Wanted::Nothing));
    }

    #[test]
    fn an_object_comes_before_options() {
        assert_eq!(wanted("dominfo "), (8, Wanted::Value(Values::Domains)));
        assert_eq!(
            wanted("dominfo --domain "),
            (17, Wanted::Value(Values::Domains))
        );
        assert_eq!(
            wanted("dominfo --domain=x"),
            (17, Wanted::Value(Values::Domains))
        );
        assert_eq!(wanted("domstate x "), (11, Wanted::Options(vec!["reason"])));
        assert_eq!(
            wanted("domstate --reason "),
            (18, Wanted::Value(Values::Domains))
        );
        assert_eq!(
            wanted("domstate --"),
            (9, Wanted::Options(vec!["domain", "reason"]))
        );
        assert_eq!(wanted("define "), (7, Wanted::Value(Values::Files)));
    }

    #[test]
    fn names_with_blanks_are_quoted() {
        assert_eq!(quoted("a b;c"), "a\\ b\\;c");
    }
}
