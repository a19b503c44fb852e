//! The options before the command.

use std::path::PathBuf;

/// What the program was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Run commands, or the shell if there are none.
    Run,
    /// Print the usage and all commands.
    Help,
    /// Print the version number.
    ShortVersion,
    /// Print the version and what it can do.
    LongVersion,
}

/// The global options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What to do.
    pub action: Action,
    /// `--connect`: the URI that must be reachable.
    pub uri: Option<String>,
    /// `--root`: the folder below which the daemon and its sockets live.
    pub root: Option<PathBuf>,
    /// `--readonly`
    pub readonly: bool,
    /// `--quiet`
    pub quiet: bool,
    /// `--timing`
    pub timing: bool,
    /// `--debug`: 0 tells the most, 4 (the default) nothing beyond errors.
    pub debug: u8,
    /// `--escape`: the key that leaves a console, as it was written.
    pub escape: Escape,
    /// `--keepalive-interval`, in seconds; 0 turns it off.
    pub keepalive_interval: Option<u32>,
    /// `--keepalive-count`
    pub keepalive_count: Option<u32>,
    /// `--log`
    pub log: Option<PathBuf>,
    /// What is wrong but doesn't keep the program from running.
    pub warnings: Vec<String>,
    /// The command and its words, or one line of commands.
    pub words: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            action: Action::Run,
            uri: None,
            root: None,
            readonly: false,
            quiet: false,
            timing: false,
            debug: 4,
            escape: Escape::default(),
            keepalive_interval: None,
            keepalive_count: None,
            log: None,
            warnings: Vec::new(),
            words: Vec::new(),
        }
    }
}

/// The key that leaves a console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Escape(String);

impl Default for Escape {
    fn default() -> Self {
        Self("^]".into())
    }
}

impl Escape {
    /// A key as people write it: one character, or `^` and the letter pressed with Ctrl.
    pub fn parse(text: &str) -> Option<Self> {
        let valid = match text.as_bytes() {
            [b'^'] => false,
            [b'^', letter] => matches!(letter.to_ascii_uppercase(), b'@'..=b'_'),
            [_] => true,
            _ => false,
        };
        valid.then(|| Self(text.to_owned()))
    }

    /// The byte that the terminal sends for the key.
    pub fn byte(&self) -> u8 {
        match self.0.as_bytes() {
            [b'^', letter] => letter.to_ascii_uppercase() ^ 0x40,
            [byte, ..] => *byte,
            [] => 0x1d,
        }
    }

    /// The key for people: `^] (Ctrl + ])`.
    pub fn describe(&self) -> String {
        match self.0.strip_prefix('^') {
            Some(letter) => format!("{} (Ctrl + {letter})", self.0),
            None => self.0.clone(),
        }
    }
}

/// What `-h` prints before the commands.
pub const USAGE: &str = "
vireo [options]... [<command_string>]
vireo [options]... <command> [args...]

  options:
    -c | --connect=URI      the daemon to talk to: vireo:///system, vireo:///session,
                            qemu+unix:///system?socket=PATH
    -d | --debug=NUM        debug level [0-4]
    -e | --escape <char>    key that leaves a console (default ^])
    -h | --help             this help
    -k | --keepalive-interval=NUM
                            seconds between signs of life, 0 for none
    -K | --keepalive-count=NUM
                            how many of them may go unanswered
    -l | --log=FILE         write errors to a file, too
    -q | --quiet            print no messages of success and no table headers
    -r | --readonly         look, but change nothing
         --root=DIR         use the daemon that keeps everything below DIR
    -t | --timing           tell how long each command took
    -v                      short version
    -V                      long version
         --version[=TYPE]   version, TYPE is short or long (default short)
  commands (non interactive mode):

";

struct Long {
    name: &'static str,
    letter: char,
    value: Value,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Value {
    No,
    Required,
    Optional,
}

/// `R` and `W` stand for options that have no letter.
const LONG: &[Long] = &[
    Long {
        name: "connect",
        letter: 'c',
        value: Value::Required,
    },
    Long {
        name: "debug",
        letter: 'd',
        value: Value::Required,
    },
    Long {
        name: "escape",
        letter: 'e',
        value: Value::Required,
    },
    Long {
        name: "help",
        letter: 'h',
        value: Value::No,
    },
    Long {
        name: "keepalive-interval",
        letter: 'k',
        value: Value::Required,
    },
    Long {
        name: "keepalive-count",
        letter: 'K',
        value: Value::Required,
    },
    Long {
        name: "log",
        letter: 'l',
        value: Value::Required,
    },
    Long {
        name: "quiet",
        letter: 'q',
        value: Value::No,
    },
    Long {
        name: "readonly",
        letter: 'r',
        value: Value::No,
    },
    Long {
        name: "root",
        letter: 'R',
        value: Value::Required,
    },
    Long {
        name: "timing",
        letter: 't',
        value: Value::No,
    },
    Long {
        name: "version",
        letter: 'W',
        value: Value::Optional,
    },
];

/// Letters that work after one dash.
const SHORT: &str = "cdehkKlqrtvV";

/// Reads the options up to the first word that is none.
///
/// # Errors
///
/// What is wrong, in virsh's words.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Options, String> {
    let mut options = Options::default();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        if word == "--" {
            options.words = words.collect();
            break;
        }
        if let Some(long) = word.strip_prefix("--") {
            let (name, inline) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let option = find_long(name).ok_or_else(|| unsupported(&word))?;
            let value = match (option.value, inline) {
                (Value::No, Some(_)) => return Err(unsupported(&format!("-{}", option.letter))),
                (Value::Required, None) => Some(words.next().ok_or_else(|| missing(option))?),
                (_, inline) => inline,
            };
            options.set(option.letter, value)?;
        } else if let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) {
            let mut letters = letters.chars();
            while let Some(letter) = letters.next() {
                if !SHORT.contains(letter) {
                    return Err(unsupported(&format!("-{letter}")));
                }
                let option = LONG.iter().find(|option| option.letter == letter);
                let value = match option.filter(|option| option.value == Value::Required) {
                    None => None,
                    Some(option) => {
                        let attached: String = letters.by_ref().collect();
                        Some(if attached.is_empty() {
                            words.next().ok_or_else(|| missing(option))?
                        } else {
                            attached
                        })
                    }
                };
                options.set(letter, value)?;
                if options.is_version() {
                    return Ok(options);
                }
            }
        } else {
            options.words = std::iter::once(word).chain(words).collect();
            break;
        }
        if options.is_version() {
            return Ok(options);
        }
    }
    Ok(options)
}

/// A long option by its name or an unambiguous beginning of it.
fn find_long(name: &str) -> Option<&'static Long> {
    if let Some(exact) = LONG.iter().find(|option| option.name == name) {
        return Some(exact);
    }
    let mut matching = LONG.iter().filter(|option| option.name.starts_with(name));
    matching.next().filter(|_| matching.next().is_none())
}

/// The names of the long options.
pub fn long_names() -> impl Iterator<Item = &'static str> {
    LONG.iter().map(|option| option.name)
}

fn unsupported(option: &str) -> String {
    format!("unsupported option '{option}'. See --help.")
}

fn missing(option: &Long) -> String {
    if SHORT.contains(option.letter) {
        format!(
            "option '-{}'/'--{}' requires an argument",
            option.letter, option.name
        )
    } else {
        format!("option '--{}' requires an argument", option.name)
    }
}

impl Options {
    fn is_version(&self) -> bool {
        matches!(self.action, Action::ShortVersion | Action::LongVersion)
    }

    fn set(&mut self, letter: char, value: Option<String>) -> Result<(), String> {
        let text = value.as_deref().unwrap_or_default();
        let positive = || {
            text.parse::<i32>()
                .map_err(|_| format!("Invalid value for option -{letter}"))
                .and_then(|number| {
                    u32::try_from(number).map_err(|_| {
                        format!("option -{letter} requires a positive integer argument")
                    })
                })
        };
        match letter {
            'c' => self.uri = Some(text.to_owned()),
            'd' => match text.parse::<i32>() {
                Ok(level @ 0..=4) => self.debug = u8::try_from(level).unwrap_or(4),
                Ok(level) => {
                    self.warnings
                        .push(format!("ignoring debug level {level} out of range [0-4]"));
                }
                Err(_) => return Err("option -d takes a numeric argument".into()),
            },
            'e' => {
                self.escape = Escape::parse(text)
                    .ok_or_else(|| format!("Invalid string '{text}' for escape sequence"))?;
            }
            'h' => self.action = Action::Help,
            'k' => self.keepalive_interval = Some(positive()?),
            'K' => self.keepalive_count = Some(positive()?),
            'l' => self.log = Some(PathBuf::from(text)),
            'q' => self.quiet = true,
            'r' => self.readonly = true,
            'R' => self.root = Some(PathBuf::from(text)),
            't' => self.timing = true,
            'V' => self.action = Action::LongVersion,
            'W' if text == "long" => self.action = Action::LongVersion,
            'v' | 'W' => self.action = Action::ShortVersion,
            _ => return Err(unsupported(&format!("-{letter}"))),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(words: &[&str]) -> Result<Options, String> {
        parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn options_end_at_the_command() {
        let options = given(&["-q", "-c", "vireo:///session", "list", "-q", "--all"]).unwrap();
        assert!(options.quiet);
        assert_eq!(options.uri.as_deref(), Some("vireo:///session"));
        assert_eq!(options.words, ["list", "-q", "--all"]);
        assert_eq!(
            given(&["--", "list", "--name"]).unwrap().words,
            ["list", "--name"]
        );
    }

    #[test]
    fn values_can_be_attached_and_names_shortened() {
        for words in [
            &["-qcu"][..],
            &["-qc", "u"],
            &["-q", "--connect=u"],
            &["-q", "--conn", "u"],
        ] {
            let options = given(words).unwrap();
            assert!(options.quiet, "{words:?}");
            assert_eq!(options.uri.as_deref(), Some("u"), "{words:?}");
        }
        assert_eq!(
            given(&["--root", "/x"]).unwrap().root,
            Some(PathBuf::from("/x"))
        );
        assert!(given(&["--re"]).unwrap().readonly);
    }

    #[test]
    fn errors_are_in_virshs_words() {
        let error = |words: &[&str]| given(words).unwrap_err();
        assert_eq!(
            error(&["-c"]),
            "option '-c'/'--connect' requires an argument"
        );
        assert_eq!(
            error(&["--keepalive-interval"]),
            "option '-k'/'--keepalive-interval' requires an argument"
        );
        assert_eq!(error(&["-x"]), "unsupported option '-x'. See --help.");
        assert_eq!(error(&["--foo"]), "unsupported option '--foo'. See --help.");
        assert_eq!(
            error(&["--keepalive"]),
            "unsupported option '--keepalive'. See --help."
        );
        assert_eq!(
            error(&["--quiet=1"]),
            "unsupported option '-q'. See --help."
        );
        assert_eq!(error(&["-k", "x"]), "Invalid value for option -k");
        assert_eq!(
            error(&["-k", "-1"]),
            "option -k requires a positive integer argument"
        );
        assert_eq!(error(&["-d", "x"]), "option -d takes a numeric argument");
        assert_eq!(
            error(&["-e", "ab"]),
            "Invalid string 'ab' for escape sequence"
        );
        assert_eq!(error(&["-e", ""]), "Invalid string '' for escape sequence");
        assert_eq!(
            given(&["-d", "9"]).unwrap().warnings,
            ["ignoring debug level 9 out of range [0-4]"]
        );
    }

    #[test]
    fn versions_win_over_what_follows() {
        assert_eq!(
            given(&["-v", "--foo"]).unwrap().action,
            Action::ShortVersion
        );
        assert_eq!(given(&["-vV"]).unwrap().action, Action::ShortVersion);
        assert_eq!(
            given(&["--version=long"]).unwrap().action,
            Action::LongVersion
        );
        assert_eq!(given(&["--ver"]).unwrap().action, Action::ShortVersion);
    }

    #[test]
    fn escape_keys() {
        assert_eq!(Escape::default().byte(), 0x1d);
        assert_eq!(Escape::default().describe(), "^] (Ctrl + ])");
        assert_eq!(Escape::parse("^a").unwrap().byte(), 1);
        assert_eq!(Escape::parse("~").unwrap().byte(), b'~');
        assert_eq!(Escape::parse("~").unwrap().describe(), "~");
    }
}
