//! From words, or a line of text, to commands with their options.
//!
//! The rules are virsh's. A line has commands separated by `;` or a line break; single quotes keep everything,
//! double quotes keep everything but the backslash, a backslash keeps the next character; `#` at the start
//! of a word begins a comment. An option is `--name`, `--name value` or `--name=value`; a value without
//! a name goes to the first option in the command's order that still lacks one; after `--` there are values only.

use crate::command::{self, Args, Command, Group, Kind};

/// A command ready to run.
#[derive(Debug)]
pub struct Parsed {
    /// Which one.
    pub command: &'static Command,
    /// With what.
    pub args: Args,
}

/// A piece of input.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    /// The end of a command.
    Separator,
}

/// Parses a line of text, which may hold several commands. An error in any of them refuses all.
///
/// # Errors
///
/// What is wrong, in virsh's words.
pub fn parse_line(groups: &'static [Group], line: &str) -> Result<Vec<Parsed>, String> {
    parse(groups, tokens(line)?)
}

/// Parses one command given as separate words, in which nothing is special.
///
/// # Errors
///
/// What is wrong, in virsh's words.
pub fn parse_words(groups: &'static [Group], words: &[String]) -> Result<Vec<Parsed>, String> {
    parse(groups, words.iter().cloned().map(Token::Word).collect())
}

fn parse(groups: &'static [Group], tokens: Vec<Token>) -> Result<Vec<Parsed>, String> {
    let mut commands = Vec::new();
    for words in tokens.split(|token| *token == Token::Separator) {
        let words = words.iter().filter_map(|token| match token {
            Token::Word(word) => Some(word.as_str()),
            Token::Separator => None,
        });
        if let Some(command) = parse_command(groups, words)? {
            commands.push(command);
        }
    }
    Ok(commands)
}

/// Splits a line into words and separators.
fn tokens(line: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = line.chars().peekable();
    loop {
        while rest.next_if(|c| matches!(c, ' ' | '\t')).is_some() {}
        match rest.peek() {
            None => return Ok(tokens),
            Some(';' | '\n') => {
                rest.next();
                tokens.push(Token::Separator);
                continue;
            }
            Some('#') => {
                while rest.next_if(|c| *c != '\n').is_some() {}
                continue;
            }
            Some(_) => {}
        }
        let mut word = String::new();
        let (mut single, mut double) = (false, false);
        // A backslash before a line break only joins the lines: it is no word by itself.
        let mut is_word = false;
        while let Some(&c) = rest.peek() {
            if !single && !double && matches!(c, ' ' | '\t' | ';' | '\n') {
                break;
            }
            rest.next();
            match c {
                '\'' if !double => {
                    single = !single;
                    is_word = true;
                }
                '"' if !single => {
                    double = !double;
                    is_word = true;
                }
                '\\' if !single => match rest.next() {
                    None => return Err("dangling \\".into()),
                    Some('\n') => {}
                    Some(escaped) => {
                        word.push(escaped);
                        is_word = true;
                    }
                },
                _ => {
                    word.push(c);
                    is_word = true;
                }
            }
        }
        if double {
            return Err("missing \"".into());
        }
        if is_word {
            tokens.push(Token::Word(word));
        }
    }
}

/// The options of a command being filled in.
struct Filling {
    command: &'static Command,
    given: Vec<(usize, String)>,
}

impl Filling {
    fn seen(&self, index: usize) -> bool {
        self.given.iter().any(|(given, _)| *given == index)
    }

    /// The option that a value without a name goes to.
    fn next_positional(&self) -> Option<usize> {
        self.command
            .options
            .iter()
            .enumerate()
            .position(|(index, option)| match option.kind {
                Kind::Flag => false,
                Kind::Rest => true,
                Kind::Number | Kind::Text | Kind::Data => !option.named_only && !self.seen(index),
            })
    }
}

/// Former names of options: what they are called now, and the value that they stand for if they take none.
fn alias(command: &str, option: &str) -> Option<(&'static str, Option<&'static str>)> {
    Some(match (command, option) {
        ("setmem" | "setmaxmem", "kilobytes") => ("size", None),
        ("undefine", "delete-snapshots") => ("delete-storage-volume-snapshots", None),
        ("attach-disk", "shareable") => ("mode", Some("shareable")),
        ("echo", "str") => ("string", None),
        _ => return None,
    })
}

fn parse_command<'a>(
    groups: &'static [Group],
    mut words: impl Iterator<Item = &'a str>,
) -> Result<Option<Parsed>, String> {
    let Some(name) = words.next() else {
        return Ok(None);
    };
    if name.starts_with('#') {
        return Ok(None);
    }
    let command =
        command::find(groups, name).ok_or_else(|| format!("unknown command: '{name}'"))?;
    let is_help = command.name == "help";
    let mut filling = Filling {
        command,
        given: Vec::new(),
    };
    let mut wants_help = false;
    let mut values_only = false;
    while let Some(word) = words.next() {
        let option = word
            .strip_prefix("--")
            .filter(|name| !values_only && name.starts_with(|c: char| c.is_ascii_alphanumeric()));
        if let Some(option) = option {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option, None),
            };
            let (name, value) = match alias(command.name, name) {
                Some((name, Some(stands_for))) => (name, Some(stands_for)),
                Some((name, None)) => (name, value),
                None => (name, value),
            };
            let Some(index) = command
                .options
                .iter()
                .position(|option| option.name == name)
            else {
                if name == "help" {
                    wants_help = true;
                } else if !is_help {
                    return Err(format!(
                        "command '{}' doesn't support option --{name}",
                        command.name
                    ));
                }
                continue;
            };
            let definition = &command.options[index];
            if filling.seen(index) && definition.kind != Kind::Rest {
                return Err(format!("option --{name} already seen"));
            }
            let value = match (definition.kind, value) {
                (Kind::Flag, Some(_)) => return Err(format!("invalid '=' after option --{name}")),
                (Kind::Flag, None) => "",
                (_, Some(value)) => value,
                (kind, None) => words.next().ok_or_else(|| {
                    let what = if kind == Kind::Number {
                        "number"
                    } else {
                        "string"
                    };
                    format!("expected syntax: --{name} <{what}>")
                })?,
            };
            filling.given.push((index, value.to_owned()));
        } else if word == "--" && !values_only {
            values_only = true;
        } else if let Some(index) = filling.next_positional() {
            filling.given.push((index, word.to_owned()));
        } else if !is_help && !wants_help {
            return Err(format!("unexpected data '{word}'"));
        }
    }
    if wants_help {
        return help_on(groups, command).map(Some);
    }
    let missing: Vec<String> = (command.options.iter().enumerate())
        .filter(|(index, option)| option.required && !filling.seen(*index))
        .map(|(_, option)| match option.kind {
            Kind::Data | Kind::Rest => {
                format!(
                    "command '{}' requires <{}> option",
                    command.name, option.name
                )
            }
            _ => format!(
                "command '{}' requires --{} option",
                command.name, option.name
            ),
        })
        .collect();
    if !missing.is_empty() {
        return Err(missing.join("\nerror: "));
    }
    Ok(Some(Parsed {
        command,
        args: Args::new(command, filling.given),
    }))
}

/// `COMMAND --help` is `help COMMAND`.
fn help_on(groups: &'static [Group], command: &'static Command) -> Result<Parsed, String> {
    let help = command::find(groups, "help").ok_or("unknown command: 'help'")?;
    Ok(Parsed {
        command: help,
        args: Args::new(help, vec![(0, command.name.to_owned())]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::GROUPS;

    fn line(text: &str) -> Vec<Parsed> {
        parse_line(GROUPS, text).unwrap()
    }

    fn refused(text: &str) -> String {
        parse_line(GROUPS, text).unwrap_err()
    }

    fn names(text: &str) -> Vec<&'static str> {
        line(text)
            .iter()
            .map(|parsed| parsed.command.name)
            .collect()
    }

    #[test]
    fn commands_are_separated_by_semicolons_and_lines() {
        assert_eq!(names("list --all; dominfo x"), ["list", "dominfo"]);
        assert_eq!(names("list ;; list"), ["list", "list"]);
        assert_eq!(names("list\nlist --name"), ["list", "list"]);
        assert_eq!(names(";"), [""; 0]);
        assert_eq!(names("  list --name  "), ["list"]);
    }

    #[test]
    fn a_hash_begins_a_comment_only_at_the_start_of_a_word() {
        assert_eq!(names("# foo; list"), [""; 0]);
        assert_eq!(names("#foo\nlist"), ["list"]);
        assert_eq!(
            line("dominfo test # x")[0].args.text("domain"),
            Ok(Some("test"))
        );
        assert_eq!(line("echo a#b #c")[0].args.rest("string"), ["a#b"]);
    }

    #[test]
    fn quotes_and_backslashes_keep_characters() {
        let parsed = line(r#"echo a\;b 'a"b' "c'd" "e\"f" g\ h"#);
        assert_eq!(
            parsed[0].args.rest("string"),
            ["a;b", "a\"b", "c'd", "e\"f", "g h"]
        );
        assert_eq!(
            line("dominfo \"te\"st")[0].args.text("domain"),
            Ok(Some("test"))
        );
        assert_eq!(
            line("dominfo 'test; list")[0].args.text("domain"),
            Ok(Some("test; list"))
        );
        assert_eq!(refused("dominfo \"test"), "missing \"");
        assert_eq!(refused("dominfo test\\"), "dangling \\");
        assert_eq!(line("echo b \\\n c")[0].args.rest("string"), ["b", "c"]);
    }

    #[test]
    fn words_of_the_shell_are_taken_as_they_are() {
        let words = |words: &[&str]| {
            parse_words(
                GROUPS,
                &words
                    .iter()
                    .map(|word| (*word).to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(
            words(&["list --all", "x"]).unwrap_err(),
            "unknown command: 'list --all'"
        );
        assert_eq!(words(&["list", "#x"]).unwrap_err(), "unexpected data '#x'");
        let parsed = words(&["dominfo", "a b"]).unwrap();
        assert_eq!(parsed[0].args.text("domain"), Ok(Some("a b")));
        let parsed = words(&["dominfo", ""]).unwrap();
        assert_eq!(
            parsed[0].args.text("domain").unwrap_err().lines,
            ["Failed to get option 'domain': Option argument is empty"]
        );
    }

    #[test]
    fn values_go_by_name_or_by_place() {
        for text in [
            "dominfo x",
            "dominfo --domain x",
            "dominfo --domain=x",
            "dominfo -- x",
        ] {
            assert_eq!(line(text)[0].args.text("domain"), Ok(Some("x")), "{text}");
        }
        let parsed = line("shutdown x acpi");
        assert_eq!(parsed[0].args.text("mode"), Ok(Some("acpi")));
        let parsed = line("event --timeout 0 x lifecycle");
        assert_eq!(parsed[0].args.text("domain"), Ok(Some("x")));
        assert_eq!(parsed[0].args.text("event"), Ok(Some("lifecycle")));
        assert_eq!(refused("dumpxml x //name"), "unexpected data '//name'");
        assert_eq!(
            line("dominfo ---x")[0].args.text("domain"),
            Ok(Some("---x"))
        );
        assert_eq!(line("dominfo -x")[0].args.text("domain"), Ok(Some("-x")));
    }

    #[test]
    fn errors_are_in_virshs_words() {
        assert_eq!(refused("x"), "unknown command: 'x'");
        assert_eq!(refused("lis"), "unknown command: 'lis'");
        assert_eq!(refused("a'b"), "unknown command: 'ab'");
        assert_eq!(
            refused("list --x"),
            "command 'list' doesn't support option --x"
        );
        assert_eq!(refused("start"), "command 'start' requires <domain> option");
        assert_eq!(
            refused("dominfo --"),
            "command 'dominfo' requires <domain> option"
        );
        assert_eq!(refused("list x"), "unexpected data 'x'");
        assert_eq!(refused("list -- --name"), "unexpected data '--name'");
        assert_eq!(
            refused("dominfo --domain"),
            "expected syntax: --domain <string>"
        );
        assert_eq!(
            refused("event --timeout"),
            "expected syntax: --timeout <number>"
        );
        assert_eq!(refused("list --name="), "invalid '=' after option --name");
        assert_eq!(refused("list --all --all"), "option --all already seen");
        assert_eq!(
            refused("dominfo x --domain x"),
            "option --domain already seen"
        );
        assert_eq!(refused("list; nosuch"), "unknown command: 'nosuch'");
    }

    #[test]
    fn former_names_of_options_are_known() {
        let given = |text: &str| line(text)[0].args.text("mode").unwrap().map(str::to_owned);
        assert_eq!(
            given("attach-disk a b c --shareable").as_deref(),
            Some("shareable")
        );
        assert_eq!(
            line("setmem a --kilobytes 5")[0].args.text("size").unwrap(),
            Some("5")
        );
        assert_eq!(line("echo --str a b")[0].args.rest("string"), ["a", "b"]);
        assert!(refused("list --kilobytes 5").contains("doesn't support option --kilobytes"));
    }

    #[test]
    fn help_as_an_option_shows_help() {
        let parsed = line("dominfo --help foo");
        assert_eq!(parsed[0].command.name, "help");
        assert_eq!(parsed[0].args.text("command"), Ok(Some("dominfo")));
        assert_eq!(names("help list foo --bar"), ["help"]);
    }

    #[test]
    fn no_line_makes_the_parser_panic() {
        // A small xorshift: the seed is printed, and a failure shows the line.
        let mut seed = std::process::id() | 1;
        println!("seed {seed}");
        let pieces = [
            "list", "dominfo", "--all", "--domain", "=", "'", "\"", "\\", ";", "#", " ", "é", "--",
            "\n",
        ];
        for _ in 0..2000 {
            let mut text = String::new();
            for _ in 0..8 {
                seed ^= seed << 13;
                seed ^= seed >> 17;
                seed ^= seed << 5;
                text.push_str(pieces[seed as usize % pieces.len()]);
            }
            // Refusing is as good as taking it.
            let _ = parse_line(GROUPS, &text);
        }
    }
}
