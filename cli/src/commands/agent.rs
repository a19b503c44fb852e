//! What the guest's agent is asked for.

use std::time::{SystemTime, UNIX_EPOCH};

use rpc::args::*;
use rpc::procs;

use super::{ANY, find_domain, params};
use crate::command::{Args, Command, DOMAIN, data, flag, number, rest, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::table::Table;

/// `qemu-agent-command`
pub const QEMU_AGENT_COMMAND: Command = Command {
    name: "qemu-agent-command",
    summary: "QEMU Guest Agent Command",
    description: "Runs any command of the guest's agent.",
    options: &[
        DOMAIN,
        number("timeout", "seconds to wait for the answer").named_only(),
        flag("async", "without waiting"),
        flag("block", "waiting as long as it takes"),
        flag("pretty", "the answer in several lines"),
        rest("cmd", "the command").required(),
    ],
    handler: qemu_agent_command,
    connects: true,
};

/// `guest-agent-timeout`
pub const GUEST_AGENT_TIMEOUT: Command = Command {
    name: "guest-agent-timeout",
    summary: "Set the guest agent timeout",
    description: "Says how long the guest's agent may take for an answer.",
    options: &[DOMAIN, number("timeout", "seconds").named_only()],
    handler: guest_agent_timeout,
    connects: true,
};

/// `domtime`
pub const DOMTIME: Command = Command {
    name: "domtime",
    summary: "domain time",
    description: "Shows the guest's time, or changes it.",
    options: &[
        DOMAIN,
        flag("now", "to this host's"),
        flag("pretty", "as a date"),
        flag("sync", "to the guest's real-time clock"),
        number("time", "to this one: seconds since 1970").named_only(),
    ],
    handler: domtime,
    connects: true,
};

/// `domhostname`
pub const DOMHOSTNAME: Command = Command {
    name: "domhostname",
    summary: "print the domain's hostname",
    description: "",
    options: &[DOMAIN, text("source", "lease or agent").named_only()],
    handler: domhostname,
    connects: true,
};

/// `guestinfo`
pub const GUESTINFO: Command = Command {
    name: "guestinfo",
    summary: "query information about the guest (via agent)",
    description: "Shows what the guest says of itself.",
    options: &[
        DOMAIN,
        flag("user", "who is logged in"),
        flag("os", "its system"),
        flag("timezone", "its time zone"),
        flag("hostname", "its name"),
        flag("filesystem", "its file systems"),
        flag("disk", "its disks"),
        flag("interface", "its network interfaces"),
    ],
    handler: guestinfo,
    connects: true,
};

/// `domfsinfo`
pub const DOMFSINFO: Command = Command {
    name: "domfsinfo",
    summary: "Get information of domain's mounted filesystems.",
    description: "Shows the guest's file systems that are mounted.",
    options: &[DOMAIN],
    handler: domfsinfo,
    connects: true,
};

/// `domfsfreeze`
pub const DOMFSFREEZE: Command = Command {
    name: "domfsfreeze",
    summary: "Freeze domain's mounted filesystems.",
    description: "Holds up writes to the guest's file systems.",
    options: &[DOMAIN, rest("mountpoint", "only these")],
    handler: domfsfreeze,
    connects: true,
};

/// `domfsthaw`
pub const DOMFSTHAW: Command = Command {
    name: "domfsthaw",
    summary: "Thaw domain's mounted filesystems.",
    description: "Lets writes to the guest's file systems go on.",
    options: &[DOMAIN, rest("mountpoint", "only these")],
    handler: domfsthaw,
    connects: true,
};

/// `domfstrim`
pub const DOMFSTRIM: Command = Command {
    name: "domfstrim",
    summary: "Invoke fstrim on domain's mounted filesystems.",
    description: "Has the guest give back what its file systems don't use.",
    options: &[
        DOMAIN,
        number("minimum", "bytes of free ranges worth the work"),
        text("mountpoint", "only this one").named_only(),
    ],
    handler: domfstrim,
    connects: true,
};

/// `set-user-password`
pub const SET_USER_PASSWORD: Command = Command {
    name: "set-user-password",
    summary: "set the user password inside the domain",
    description: "Changes the password of a user of the guest.",
    options: &[
        DOMAIN,
        data("user", "the user"),
        data("password", "the new password"),
        flag("encrypted", "it is encrypted already"),
    ],
    handler: set_user_password,
    connects: true,
};

/// `get-user-sshkeys`
pub const GET_USER_SSHKEYS: Command = Command {
    name: "get-user-sshkeys",
    summary: "list authorized SSH keys for given user (via agent)",
    description: "Shows the keys by which a user of the guest may log in.",
    options: &[DOMAIN, data("user", "the user")],
    handler: get_user_sshkeys,
    connects: true,
};

/// `set-user-sshkeys`
pub const SET_USER_SSHKEYS: Command = Command {
    name: "set-user-sshkeys",
    summary: "manipulate authorized SSH keys file for given user (via agent)",
    description: "Changes the keys by which a user of the guest may log in.",
    options: &[
        DOMAIN,
        data("user", "the user"),
        text("file", "a file of keys"),
        flag("reset", "the keys there are go first"),
        flag("remove", "the keys of the file go"),
    ],
    handler: set_user_sshkeys,
    connects: true,
};

fn qemu_agent_command(shell: &mut Shell, args: &Args) -> Result {
    let mut timeout = -1;
    let given: Option<i32> = args.number("timeout")?;
    let dom = find_domain(shell, args, ANY)?;
    if let Some(seconds) = given {
        if seconds < 1 {
            return Err(Failure::new("timeout must be positive"));
        }
        timeout = seconds;
    }
    for (name, value) in [("async", 0), ("block", -2)] {
        if args.has(name) {
            timeout = value;
        }
    }
    let chosen = ["timeout", "async", "block"]
        .iter()
        .filter(|name| args.has(name));
    if chosen.count() > 1 {
        return Err(Failure::new(
            "timeout, async and block options are exclusive",
        ));
    }
    let asked = QemuDomainAgentCommandArgs {
        dom,
        cmd: args.rest("cmd").join(" "),
        timeout,
        flags: 0,
    };
    let found = shell.call(procs::DOMAIN_QEMU_AGENT_COMMAND, &asked)?;
    let text = found.result.unwrap_or_default();
    let text = if args.has("pretty") {
        pretty(&text)
    } else {
        text
    };
    shell.out.print(format!("{text}\n"));
    Ok(())
}

/// JSON in several lines, two blanks a level. What is no JSON comes out somehow, but all of it.
pub(super) fn pretty(text: &str) -> String {
    let (mut out, mut depth, mut inside, mut escaped) = (String::new(), 0usize, false, false);
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.push_str(&"  ".repeat(depth.min(256)));
    };
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if inside {
            (inside, escaped) = (c != '"' || escaped, c == '\\' && !escaped);
            out.push(c);
            continue;
        }
        match c {
            '{' | '[' => {
                out.push(c);
                if chars.next_if(|next| matches!(next, '}' | ']')).is_some() {
                    out.push(if c == '{' { '}' } else { ']' });
                } else {
                    depth += 1;
                    line(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            c if c.is_ascii_whitespace() => {}
            c => {
                inside = c == '"';
                out.push(c);
            }
        }
    }
    out
}

fn guest_agent_timeout(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let timeout = args.number("timeout")?.unwrap_or(-2);
    let asked = DomainAgentSetResponseTimeoutArgs {
        dom,
        timeout,
        flags: 0,
    };
    shell.call(procs::DOMAIN_AGENT_SET_RESPONSE_TIMEOUT, &asked)?;
    Ok(())
}

fn domtime(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("time", "now")?;
    args.exclusive("time", "sync")?;
    args.exclusive("now", "sync")?;
    let given: Option<i64> = args.number("time")?;
    let dom = find_domain(shell, args, ANY)?;
    if given.is_some() || args.has("now") || args.has("sync") {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        let asked = DomainSetTimeArgs {
            dom,
            seconds: given.unwrap_or(if args.has("now") { now } else { 0 }),
            nseconds: 0,
            flags: u32::from(args.has("sync")),
        };
        return shell.call(procs::DOMAIN_SET_TIME, &asked);
    }
    let asked = DomainGetTimeArgs { dom, flags: 0 };
    let time = shell.call(procs::DOMAIN_GET_TIME, &asked)?.seconds;
    shell.out.print(if args.has("pretty") {
        // virsh ends this line nowhere.
        format!("Time: {}", date(time))
    } else {
        format!("Time: {time}\n")
    });
    Ok(())
}

/// A time as a date of UTC: days since 1970 to the civil calendar (H. Hinnant, "chrono-Compatible
/// Low-Level Date Algorithms").
fn date(time: i64) -> String {
    let (days, seconds) = (time.div_euclid(86_400), time.rem_euclid(86_400));
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

fn domhostname(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let flags = match args.text("source")? {
        None => 0,
        Some("lease") => 1,
        Some("agent") => 2,
        Some(other) => return Err(Failure::new(format!("Unknown data source '{other}'"))),
    };
    let asked = DomainGetHostnameArgs { dom, flags };
    let found = shell
        .call(procs::DOMAIN_GET_HOSTNAME, &asked)
        .context("failed to get hostname")?;
    shell.out.print(format!("{}\n", found.hostname));
    Ok(())
}

fn guestinfo(shell: &mut Shell, args: &Args) -> Result {
    const TYPES: [&str; 7] = [
        "user",
        "os",
        "timezone",
        "hostname",
        "filesystem",
        "disk",
        "interface",
    ];
    let bits = (0..).zip(TYPES).filter(|(_, name)| args.has(name));
    let types = bits.fold(0, |all, (bit, _)| all | 1u32 << bit);
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainGetGuestInfoArgs {
        dom,
        types,
        flags: 0,
    };
    let found = shell.call(procs::DOMAIN_GET_GUEST_INFO, &asked)?;
    for param in &found.params.0 {
        let value = params::text(&param.value);
        shell.out.print(format!("{:<20}: {value}\n", param.field));
    }
    Ok(())
}

fn domfsinfo(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainGetFsinfoArgs { dom, flags: 0 };
    let found = shell
        .call(procs::DOMAIN_GET_FSINFO, &asked)
        .context("Unable to get filesystem information")?;
    if found.info.is_empty() {
        shell
            .out
            .print_extra("No filesystems are mounted in the domain");
        return Ok(());
    }
    let mut table = Table::new(&["Mountpoint", "Name", "Type", "Target"]);
    for fs in found.info.0 {
        let targets = fs.dev_aliases.0.join(",");
        table.row([fs.mountpoint, fs.name, fs.fstype, targets]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

fn mountpoints(args: &Args) -> Vec<String> {
    let words = args.rest("mountpoint");
    words.into_iter().map(str::to_owned).collect()
}

fn domfsfreeze(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let mountpoints = mountpoints(args).into();
    let asked = DomainFsfreezeArgs {
        dom,
        mountpoints,
        flags: 0,
    };
    let found = shell
        .call(procs::DOMAIN_FSFREEZE, &asked)
        .context("Unable to freeze filesystems")?;
    let text = format!("Froze {} filesystem(s)\n", found.filesystems);
    shell.out.print_extra(text);
    Ok(())
}

fn domfsthaw(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let mountpoints = mountpoints(args).into();
    let asked = DomainFsthawArgs {
        dom,
        mountpoints,
        flags: 0,
    };
    let found = shell
        .call(procs::DOMAIN_FSTHAW, &asked)
        .context("Unable to thaw filesystems")?;
    let text = format!("Thawed {} filesystem(s)\n", found.filesystems);
    shell.out.print_extra(text);
    Ok(())
}

fn domfstrim(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainFstrimArgs {
        dom,
        mount_point: args.text("mountpoint")?.map(str::to_owned),
        minimum: args.number("minimum")?.unwrap_or(0),
        flags: 0,
    };
    shell
        .call(procs::DOMAIN_FSTRIM, &asked)
        .context("Unable to invoke fstrim")
}

fn set_user_password(shell: &mut Shell, args: &Args) -> Result {
    let user = args.required("user")?.to_owned();
    let password = args.required("password")?.to_owned();
    let dom = find_domain(shell, args, ANY)?;
    let name = dom.name.clone();
    let asked = DomainSetUserPasswordArgs {
        dom,
        user: Some(user.clone()),
        password: Some(password),
        flags: u32::from(args.has("encrypted")),
    };
    shell.call(procs::DOMAIN_SET_USER_PASSWORD, &asked)?;
    let text = format!("Password set successfully for {user} in {name}");
    shell.out.print_extra(text);
    Ok(())
}

fn get_user_sshkeys(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainAuthorizedSshKeysGetArgs {
        dom,
        user: args.required("user")?.to_owned(),
        flags: 0,
    };
    let found = shell.call(procs::DOMAIN_AUTHORIZED_SSH_KEYS_GET, &asked)?;
    for key in found.keys.0 {
        shell.out.print(format!("{key}\n"));
    }
    Ok(())
}

fn set_user_sshkeys(shell: &mut Shell, args: &Args) -> Result {
    /// virDomainAuthorizedSSHKeysSetFlags
    const APPEND: u32 = 1;
    const REMOVE: u32 = 2;
    args.requires("remove", "file")?;
    args.exclusive("reset", "remove")?;
    let dom = find_domain(shell, args, ANY)?;
    let user = args.required("user")?.to_owned();
    let mut flags = if args.has("reset") { 0 } else { APPEND };
    if args.has("remove") {
        flags = REMOVE;
    }
    let mut keys = Vec::new();
    if let Some(file) = args.text("file")? {
        let text = super::read_definition(file)?;
        let lines = text.lines().filter(|line| !line.is_empty());
        keys = lines.map(str::to_owned).collect::<Vec<_>>();
        if keys.is_empty() {
            return Err(Failure::new(format!("File {file} contains no keys")));
        }
    } else if !args.has("reset") {
        return Err(Failure::new("Option --file is required"));
    }
    let asked = DomainAuthorizedSshKeysSetArgs {
        dom,
        user,
        keys: keys.into(),
        flags,
    };
    shell.call(procs::DOMAIN_AUTHORIZED_SSH_KEYS_SET, &asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_utcs() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(-1), "1969-12-31 23:59:59");
    }

    #[test]
    fn json_is_broken_into_lines() {
        let text = pretty("{\"a\":[1,\"x,{\"],\"b\":{},\"c\":[]}");
        assert_eq!(
            text,
            "{\n  \"a\": [\n    1,\n    \"x,{\"\n  ],\n  \"b\": {},\n  \"c\": []\n}"
        );
        pretty("]}{{[");
    }
}
