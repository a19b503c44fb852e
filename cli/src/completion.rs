//! What the Tab key offers: commands, their options, and the values of those.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::validate::Validator;
use rustyline::{Context, Helper};

use crate::command::{self, Command, Group, Kind, Opt, Values};
use crate::commands::GROUPS;
use crate::names::names;
use crate::options;
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

/// What could stand where a word stands.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Command,
    /// An option of a command that is not there yet.
    Options(Vec<&'static str>),
    Value(Values),
    Nothing,
}

/// Where something could stand.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// Where in the last word the value begins.
    start: usize,
    wanted: Wanted,
    /// What the options before it say.
    given: Vec<(&'static str, String)>,
}

/// Finds out what could stand where the last word of a command stands.
fn place(before: &[&str], word: &str) -> Place {
    let mut place = Place {
        start: 0,
        wanted: Wanted::Command,
        given: Vec::new(),
    };
    let Some((name, before)) = before.split_first() else {
        return place;
    };
    let Some(command) = command::find(GROUPS, name) else {
        place.wanted = Wanted::Nothing;
        return place;
    };
    let mut seen = Vec::new();
    let mut pending: Option<&Opt> = None;
    for word in before {
        if let Some(option) = pending.take() {
            place.given.push((option.name, (*word).to_owned()));
            continue;
        }
        let option = word.strip_prefix("--").and_then(|option| {
            let (name, inline) = option
                .split_once('=')
                .map_or((option, None), |(name, value)| (name, Some(value)));
            let option = command.options.iter().find(|option| option.name == name)?;
            Some((option, inline))
        });
        match option {
            Some((option, inline)) => {
                seen.push(option.name);
                match inline {
                    Some(value) => place.given.push((option.name, value.to_owned())),
                    None => pending = (option.kind != Kind::Flag).then_some(option),
                }
            }
            None => {
                if let Some(option) = next_positional(command, &seen) {
                    seen.push(option.name);
                    place.given.push((option.name, (*word).to_owned()));
                }
            }
        }
    }
    if let Some(option) = pending {
        place.wanted = Wanted::Value(values(command, option));
        return place;
    }
    if let Some((name, _)) = word
        .strip_prefix("--")
        .and_then(|word| word.split_once('='))
    {
        let option = command.options.iter().find(|known| known.name == name);
        place.start = "--".len() + name.len() + "=".len();
        place.wanted = option.map_or(Wanted::Nothing, |it| Wanted::Value(values(command, it)));
        return place;
    }
    let positional = next_positional(command, &seen)
        .map(|option| values(command, option))
        .filter(|values| *values != Values::None);
    place.wanted = match positional {
        Some(values) if !word.starts_with('-') => Wanted::Value(values),
        _ => {
            let names = command.options.iter().map(|option| option.name);
            Wanted::Options(names.filter(|name| !seen.contains(name)).collect())
        }
    };
    place
}

/// The commands on one disk of a domain.
const BLOCK: &[&str] = &[
    "blkdeviotune",
    "blockcommit",
    "blockcopy",
    "blockjob",
    "blockpull",
    "blockresize",
    "change-media",
    "detach-disk",
    "domblkinfo",
    "domblkstat",
    "domblkthreshold",
];

/// Commands that mean something for some domains only, and for which (virConnectListAllDomainsFlags).
const STATES: &[(&str, u32)] = &[
    ("console", ACTIVE),
    ("destroy", ACTIVE),
    ("domjobabort", ACTIVE),
    ("dump", ACTIVE),
    ("inject-nmi", ACTIVE),
    ("managedsave", ACTIVE),
    ("reboot", ACTIVE),
    ("reset", ACTIVE),
    ("resume", PAUSED),
    ("save", ACTIVE),
    ("shutdown", ACTIVE),
    ("start", INACTIVE),
    ("suspend", RUNNING),
];
const ACTIVE: u32 = 1;
const INACTIVE: u32 = 2;
const RUNNING: u32 = 16;
const PAUSED: u32 = 32;

/// What completes an option's value: what its command says, or else what options of that name mean anywhere.
fn values(command: &Command, option: &Opt) -> Values {
    if option.values == Values::Domains
        && let Some((_, are)) = STATES.iter().find(|(name, _)| *name == command.name)
    {
        return Values::DomainsThat(*are);
    }
    if option.values != Values::None || option.kind == Kind::Flag {
        return option.values;
    }
    match option.name {
        "domain" => Values::Domains,
        "network" => Values::Networks,
        "pool" | "inputpool" => Values::Pools,
        "vol" | "inputvol" => Values::Volumes,
        "snapshotname" => Values::Snapshots,
        "checkpointname" => Values::Checkpoints,
        "secret" => Values::Secrets,
        "device" if command.name.starts_with("nodedev-") => Values::NodeDevices,
        "interface" if command.name.starts_with("iface-") => Values::HostInterfaces,
        "file" => Values::Files,
        "interface" | "mac" => Values::Nics,
        "path" | "device" | "target" | "dev" if BLOCK.contains(&command.name) => Values::Disks,
        _ => Values::None,
    }
}

/// The same for a line of the shell's own prompt, and where in the line the word's value begins.
fn place_in_line(line: &str) -> (usize, Place) {
    let segment = line.rfind([';', '\n']).map_or(0, |at| at + 1);
    let text = &line[segment..];
    let start = segment + text.rfind([' ', '\t']).map_or(0, |at| at + 1);
    let before: Vec<&str> = line[segment..start]
        .split([' ', '\t'])
        .filter(|word| !word.is_empty())
        .collect();
    let place = place(&before, &line[start..]);
    (start + place.start, place)
}

/// What could stand there, whatever was typed already; `None`: a file.
fn candidates(shell: &mut Shell, place: &Place) -> Option<Vec<String>> {
    Some(match &place.wanted {
        Wanted::Command => command_names(),
        Wanted::Options(names) => names.iter().map(|name| format!("--{name}")).collect(),
        Wanted::Value(Values::Commands) => {
            let groups = visible().map(|group| group.keyword.to_owned());
            command_names().into_iter().chain(groups).collect()
        }
        Wanted::Value(Values::Words(words)) => {
            words.iter().map(|word| (*word).to_owned()).collect()
        }
        Wanted::Value(Values::Files) => return None,
        Wanted::Value(values) => names(shell, *values, &place.given).unwrap_or_default(),
        Wanted::Nothing => Vec::new(),
    })
}

/// What a shell could put for the last of these words, which follow the program's name; nothing if it is a file.
pub fn of_words(shell: &mut Shell, words: &[String]) -> Vec<String> {
    let Some((word, before)) = words.split_last() else {
        return Vec::new();
    };
    let options = match options::parse(before.iter().cloned()) {
        Ok(options) => options,
        // The last of them waits for its value.
        Err(_) => {
            let last = before.last().map_or("", String::as_str);
            let uris: &[&str] = match last {
                "-c" | "--connect" => &["vireo:///system", "vireo:///session", "qemu:///system"],
                _ => &[],
            };
            let uris = uris.iter().map(|uri| (*uri).to_owned());
            return uris.filter(|uri| uri.starts_with(word)).collect();
        }
    };
    if options.words.is_empty() && word.starts_with('-') {
        return options::long_names()
            .map(|name| format!("--{name}"))
            .filter(|name| name.starts_with(word))
            .collect();
    }
    // The daemon that the line is about, which is not started for this.
    shell.retarget(&options);
    let before: Vec<&str> = options.words.iter().map(String::as_str).collect();
    let place = place(&before, word);
    let (kept, typed) = word.split_at(place.start);
    let mut found: Vec<String> = candidates(shell, &place)
        .unwrap_or_default()
        .into_iter()
        .filter(|candidate| candidate.starts_with(typed))
        .map(|candidate| format!("{kept}{candidate}"))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
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
        let (start, place) = place_in_line(line);
        // Borrowed already: the editor runs inside a command, which nothing does.
        let Ok(mut shell) = self.shell.try_borrow_mut() else {
            return Ok((start, Vec::new()));
        };
        let Some(candidates) = candidates(&mut shell, &place) else {
            return self.files.complete_path(line, at);
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

fn visible() -> impl Iterator<Item = &'static Group> {
    GROUPS.iter().filter(|group| !group.is_hidden())
}

fn command_names() -> Vec<String> {
    visible()
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

    fn wanted(line: &str) -> (usize, Wanted) {
        let (start, place) = place_in_line(line);
        (start, place.wanted)
    }

    #[test]
    fn what_the_line_says_already_is_known() {
        let given = |line: &str| place_in_line(line).1.given;
        let domain = vec![("domain", "x".to_owned())];
        assert_eq!(given("domif-setlink x "), domain);
        assert_eq!(given("domif-setlink --domain x --"), domain);
        assert_eq!(given("domif-setlink --domain=x "), domain);
    }

    #[test]
    fn an_option_without_values_of_its_own_is_completed_by_its_name() {
        assert_eq!(
            wanted("secret-dumpxml "),
            (15, Wanted::Value(Values::Secrets))
        );
        assert_eq!(wanted("net-event "), (10, Wanted::Value(Values::Networks)));
    }

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
