//! The declarative command table: parser, help and completion derive from it.

use crate::failure::{Failure, Result};
use crate::shell::Shell;

/// A group of commands, as `help` shows it.
#[derive(Debug)]
pub struct Group {
    /// Heading: `Domain Management`.
    pub title: &'static str,
    /// What `help` takes to show the group only: `domain`.
    pub keyword: &'static str,
    /// The commands, in the order in which they are listed.
    pub commands: &'static [Command],
}

impl Group {
    /// Whether its commands are for programs only: no list shows them.
    pub const fn is_hidden(&self) -> bool {
        self.title.is_empty()
    }
}

/// The function behind a command.
pub type Handler = fn(&mut Shell, &Args) -> Result;

/// A command.
#[derive(Debug)]
pub struct Command {
    /// What one types.
    pub name: &'static str,
    /// One line for the list of commands.
    pub summary: &'static str,
    /// A paragraph for `help COMMAND`; empty: the summary says everything.
    pub description: &'static str,
    /// The options, in the order in which they are shown and take positional values.
    pub options: &'static [Opt],
    /// What it does.
    pub handler: Handler,
    /// The shell connects to the daemon before it calls the handler.
    pub connects: bool,
}

/// What an option takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: `--all`.
    Flag,
    /// A number, `--timeout 5`; in its positional place also without the name.
    Number,
    /// A text, `--mode acpi`; in its positional place also without the name.
    Text,
    /// The command's object, `<domain>`.
    Data,
    /// All remaining words.
    Rest,
}

/// What an option's value is completed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Nothing.
    None,
    /// Names of domains.
    Domains,
    /// Names of domains that are so (virConnectListAllDomainsFlags).
    DomainsThat(u32),
    /// Names of files.
    Files,
    /// Names of commands and groups.
    Commands,
    /// Names of domain events.
    Events,
    /// Names of networks.
    Networks,
    /// Names of network events.
    NetworkEvents,
    /// Names of storage pools.
    Pools,
    /// Names of storage pool events.
    PoolEvents,
    /// Names of volumes of the pool that the option `pool` names.
    Volumes,
    /// Names of snapshots of the domain that the option `domain` names.
    Snapshots,
    /// Names of checkpoints of the domain that the option `domain` names.
    Checkpoints,
    /// Targets of disks of that domain.
    Disks,
    /// MAC addresses of network interfaces of that domain.
    Nics,
    /// Names of devices of the host.
    NodeDevices,
    /// Names of node device events.
    NodeDeviceEvents,
    /// UUIDs of secrets.
    Secrets,
    /// Names of secret events.
    SecretEvents,
    /// Names of network interfaces of the host.
    HostInterfaces,
    /// These words.
    Words(&'static [&'static str]),
}

/// An option of a command.
#[derive(Debug, Clone, Copy)]
pub struct Opt {
    /// The name after the two dashes.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// The command cannot do without it.
    pub required: bool,
    /// Only `--name value` sets it, never a value's position.
    pub named_only: bool,
    /// An empty value is a value.
    pub allow_empty: bool,
    /// One line for `help COMMAND`.
    pub help: &'static str,
    /// What completes its value.
    pub values: Values,
}

impl Opt {
    const fn new(name: &'static str, kind: Kind, help: &'static str) -> Self {
        Self {
            name,
            kind,
            required: false,
            named_only: false,
            allow_empty: false,
            help,
            values: Values::None,
        }
    }

    /// This option, which the command cannot do without.
    pub const fn required(mut self) -> Self {
        self.required = true;
        self
    }

    /// This option, which a position never sets.
    pub const fn named_only(mut self) -> Self {
        self.named_only = true;
        self
    }

    /// This option, which may be empty.
    pub const fn allow_empty(mut self) -> Self {
        self.allow_empty = true;
        self
    }

    /// This option, completed from these values.
    pub const fn values(mut self, values: Values) -> Self {
        self.values = values;
        self
    }
}

/// An option that takes nothing.
pub const fn flag(name: &'static str, help: &'static str) -> Opt {
    Opt::new(name, Kind::Flag, help)
}

/// An option that takes a text.
pub const fn text(name: &'static str, help: &'static str) -> Opt {
    Opt::new(name, Kind::Text, help)
}

/// An option that takes a number.
pub const fn number(name: &'static str, help: &'static str) -> Opt {
    Opt::new(name, Kind::Number, help)
}

/// A required object of the command.
pub const fn data(name: &'static str, help: &'static str) -> Opt {
    Opt::new(name, Kind::Data, help).required()
}

/// All remaining words.
pub const fn rest(name: &'static str, help: &'static str) -> Opt {
    Opt::new(name, Kind::Rest, help)
}

/// The required `domain` option, explained by what it may be.
pub const fn domain(help: &'static str) -> Opt {
    data("domain", help).values(Values::Domains)
}

/// The domain option of most commands.
pub const DOMAIN: Opt = domain("domain name, id or uuid");

/// A command's options as they were given.
#[derive(Debug)]
pub struct Args {
    command: &'static Command,
    given: Vec<(usize, String)>,
}

impl Args {
    /// The options given: indexes into the command's options, and values.
    pub fn new(command: &'static Command, given: Vec<(usize, String)>) -> Self {
        Self { command, given }
    }

    fn raw(&self, name: &str) -> Option<(&'static Opt, &str)> {
        let index = self
            .command
            .options
            .iter()
            .position(|option| option.name == name);
        debug_assert!(
            index.is_some(),
            "{} has no option {name}",
            self.command.name
        );
        let index = index?;
        let (_, value) = self.given.iter().find(|(given, _)| *given == index)?;
        Some((&self.command.options[index], value))
    }

    /// Whether an option was given.
    pub fn has(&self, name: &str) -> bool {
        self.raw(name).is_some()
    }

    /// The text of an option, if it was given.
    ///
    /// # Errors
    ///
    /// It was given, but empty, and may not be.
    pub fn text(&self, name: &str) -> Result<Option<&str>> {
        match self.raw(name) {
            Some((option, "")) if !option.allow_empty => Err(Failure::new(format!(
                "Failed to get option '{name}': Option argument is empty"
            ))),
            Some((_, value)) => Ok(Some(value)),
            None => Ok(None),
        }
    }

    /// The text of an option that the parser made sure of.
    ///
    /// # Errors
    ///
    /// It is empty, and may not be.
    pub fn required(&self, name: &str) -> Result<&str> {
        self.text(name)?.ok_or_else(|| {
            Failure::new(format!(
                "Failed to get option '{name}': Mandatory option not present"
            ))
        })
    }

    /// The number of an option, if it was given.
    ///
    /// # Errors
    ///
    /// It is not a number, or not one of this type.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(value) = self.text(name)? else {
            return Ok(None);
        };
        // `str::parse` takes a leading plus sign as C's strtol does, and no blanks, units or hex.
        value.parse().map(Some).map_err(|_| {
            Failure::new(format!(
                "Numeric value '{value}' for <{name}> option is malformed or out of range"
            ))
        })
    }

    /// All words that an option of kind [`Kind::Rest`] took.
    pub fn rest(&self, name: &str) -> Vec<&str> {
        let index = self
            .command
            .options
            .iter()
            .position(|option| option.name == name);
        self.given
            .iter()
            .filter(|(given, _)| Some(*given) == index)
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// Refuses two options given together.
    ///
    /// # Errors
    ///
    /// Both were given.
    pub fn exclusive(&self, first: &str, second: &str) -> Result {
        if self.has(first) && self.has(second) {
            return Err(Failure::new(format!(
                "Options --{first} and --{second} are mutually exclusive"
            )));
        }
        Ok(())
    }

    /// Refuses an option without the other that it needs.
    ///
    /// # Errors
    ///
    /// The first was given, the second was not.
    pub fn requires(&self, option: &str, needed: &str) -> Result {
        if self.has(option) && !self.has(needed) {
            return Err(Failure::new(format!(
                "Option --{needed} is required by option --{option}"
            )));
        }
        Ok(())
    }
}

/// Finds a command by its name.
pub fn find(groups: &[Group], name: &str) -> Option<&'static Command> {
    groups
        .iter()
        .flat_map(|group| group.commands)
        .find(|command| command.name == name)
}
