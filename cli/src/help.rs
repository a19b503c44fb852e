//! The text of `help`, in virsh's layout.

use std::fmt::Write;

use crate::command::{Command, Group, Kind};

/// All groups, for `help` (with a colon after the heading) and `--help` (without).
pub fn groups(groups: &[Group], text: &mut String, colon: &str) {
    for group in groups.iter().filter(|group| !group.is_hidden()) {
        self::group(group, text, colon);
        text.push('\n');
    }
}

/// One group and its commands.
pub fn group(group: &Group, text: &mut String, colon: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        " {} (help keyword '{}'){colon}",
        group.title, group.keyword
    );
    for command in group.commands {
        let _ = writeln!(text, "    {:<30} {}", command.name, command.summary);
    }
}

/// One command: NAME, SYNOPSIS, DESCRIPTION, OPTIONS.
pub fn command(command: &Command) -> String {
    let mut text = format!(
        "  NAME\n    {} - {}\n\n  SYNOPSIS\n    {}",
        command.name, command.summary, command.name
    );
    // Whether words without a name can already go to the option before the remaining ones.
    let mut after_data = false;
    for option in command.options {
        let name = option.name;
        let form = match option.kind {
            Kind::Flag => format!("[--{name}]"),
            Kind::Number if option.required => {
                after_data = true;
                format!("<{name}>")
            }
            Kind::Number => format!("[--{name} <number>]"),
            Kind::Text => format!("[--{name} <string>]"),
            Kind::Data => {
                after_data = true;
                if option.required {
                    format!("<{name}>")
                } else {
                    format!("[<{name}>]")
                }
            }
            Kind::Rest => match (after_data, option.required) {
                (true, true) => format!("{{[--{name}] <string>}}..."),
                (true, false) => format!("[[--{name}] <string>]..."),
                (false, true) => format!("<{name}>..."),
                (false, false) => format!("[<{name}>]..."),
            },
        };
        text.push(' ');
        text.push_str(&form);
    }
    text.push('\n');
    if !command.description.is_empty() {
        text.push_str("\n  DESCRIPTION\n    ");
        text.push_str(command.description);
        text.push('\n');
    }
    if !command.options.is_empty() {
        text.push_str("\n  OPTIONS\n");
        for option in command.options {
            let name = option.name;
            let form = match option.kind {
                Kind::Flag => format!("--{name}"),
                Kind::Number if option.required => format!("[--{name}] <number>"),
                Kind::Number => format!("--{name} <number>"),
                Kind::Text => format!("--{name} <string>"),
                Kind::Data => format!("[--{name}] <string>"),
                Kind::Rest if after_data => format!("[--{name}] <string>"),
                Kind::Rest => format!("<{name}>"),
            };
            let _ = writeln!(text, "    {form:<15}  {}", option.help);
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::find;
    use crate::commands::GROUPS;

    #[test]
    fn the_layout_is_virshs() {
        let shown = command(find(GROUPS, "domstate").unwrap());
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[1].starts_with("    domstate - "), "{shown}");
        assert_eq!(
            lines[3..5],
            ["  SYNOPSIS", "    domstate <domain> [--reason]"]
        );
        assert_eq!(lines[6], "  DESCRIPTION");
        assert_eq!(lines[9], "  OPTIONS");
        assert!(
            lines[10].starts_with("    [--domain] <string>  "),
            "{shown}"
        );
        assert!(lines[11].starts_with("    --reason         "), "{shown}");
        assert!(shown.ends_with("\n\n"), "{shown}");
    }

    #[test]
    fn words_that_follow_an_object_may_carry_the_name() {
        let shown = command(find(GROUPS, "desc").unwrap());
        assert!(shown.contains(" [[--new-desc] <string>]...\n"), "{shown}");
        let shown = command(find(GROUPS, "echo").unwrap());
        assert!(shown.contains(" [<string>]...\n"), "{shown}");
        assert!(shown.contains("\n    <string>         "), "{shown}");
    }

    #[test]
    fn names_are_unique_and_options_too() {
        let mut names: Vec<&str> = GROUPS
            .iter()
            .flat_map(|group| group.commands)
            .map(|command| command.name)
            .collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        for command in GROUPS.iter().flat_map(|group| group.commands) {
            for (index, option) in command.options.iter().enumerate() {
                let others = &command.options[index + 1..];
                assert!(
                    others.iter().all(|other| other.name != option.name),
                    "{} {}",
                    command.name,
                    option.name
                );
            }
        }
    }
}
