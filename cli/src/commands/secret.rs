//! Secrets.

use std::io::{BufRead, Read};

use rpc::args::{
    ConnectListAllSecretsArgs, SecretDefineXmlArgs, SecretGetValueArgs, SecretGetXmlDescArgs,
    SecretLookupByUuidArgs, SecretSetValueArgs, SecretUndefineArgs,
};
use rpc::procs;
use rpc::types::Secret;

use super::definition::{WRAP, XPATH, print_selected};
use super::{format_uuid, os_message, parse_uuid, read_definition};
use crate::command::{Args, Command, Opt, Values, data, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::table::Table;

const SECRET: Opt = data("secret", "the secret's UUID");

/// `secret-define`
pub const SECRET_DEFINE: Command = Command {
    name: "secret-define",
    summary: "define or modify a secret from an XML file",
    description: "Defines a secret, or changes it. Its value is given by secret-set-value.",
    options: &[
        data("file", "the file with its definition").values(Values::Files),
        flag("validate", "check the definition against the schema"),
    ],
    handler: define,
    connects: true,
};

/// `secret-dumpxml`
pub const SECRET_DUMPXML: Command = Command {
    name: "secret-dumpxml",
    summary: "secret attributes in XML",
    description: "Shows a secret's definition.",
    options: &[SECRET, XPATH, WRAP],
    handler: dumpxml,
    connects: true,
};

/// `secret-get-value`
pub const SECRET_GET_VALUE: Command = Command {
    name: "secret-get-value",
    summary: "Output a secret value",
    description: "Shows a secret's value in Base64, unless it is private.",
    options: &[SECRET, flag("plain", "as it is")],
    handler: get_value,
    connects: true,
};

/// `secret-list`
pub const SECRET_LIST: Command = Command {
    name: "secret-list",
    summary: "list secrets",
    description: "Shows the secrets.",
    options: &[
        flag("ephemeral", "those kept in memory only"),
        flag("no-ephemeral", "those kept on the disk"),
        flag("private", "those whose value nobody is told"),
        flag("no-private", "those whose value can be asked for"),
    ],
    handler: list,
    connects: true,
};

/// `secret-set-value`
pub const SECRET_SET_VALUE: Command = Command {
    name: "secret-set-value",
    summary: "set a secret value",
    description: "Gives a secret its value, in Base64 unless it is said to be plain.",
    options: &[
        SECRET,
        text("file", "a file that holds the value")
            .named_only()
            .values(Values::Files),
        flag("plain", "the file's bytes are the value"),
        flag("interactive", "ask for the value"),
        text(
            "base64",
            "the value (everybody on the host can see it there)",
        ),
    ],
    handler: set_value,
    connects: true,
};

/// `secret-undefine`
pub const SECRET_UNDEFINE: Command = Command {
    name: "secret-undefine",
    summary: "undefine a secret",
    description: "Removes a secret with its value.",
    options: &[SECRET],
    handler: undefine,
    connects: true,
};

fn find(shell: &mut Shell, args: &Args) -> Result<Secret> {
    lookup(shell, args.required("secret")?)
}

/// The secret with that UUID.
pub(super) fn lookup(shell: &mut Shell, word: &str) -> Result<Secret> {
    let found = match parse_uuid(word) {
        Some(uuid) => shell.call(
            procs::SECRET_LOOKUP_BY_UUID,
            &SecretLookupByUuidArgs { uuid },
        ),
        None => Err(Failure::new(format!(
            "invalid argument: uuidstr in virSecretLookupByUUIDString must be a valid UUID: {word}"
        ))),
    };
    Ok(found
        .context(format!("failed to get secret '{word}'"))?
        .secret)
}

fn define(shell: &mut Shell, args: &Args) -> Result {
    let file = args.required("file")?;
    let xml = read_definition(file)?;
    let asked = SecretDefineXmlArgs {
        xml,
        flags: u32::from(args.has("validate")),
    };
    let secret = shell
        .call(procs::SECRET_DEFINE_XML, &asked)
        .context(format!("Failed to set attributes from {file}"))?
        .secret;
    shell
        .out
        .print_extra(format!("Secret {} created\n", format_uuid(&secret.uuid)));
    Ok(())
}

fn dumpxml(shell: &mut Shell, args: &Args) -> Result {
    args.requires("wrap", "xpath")?;
    let secret = find(shell, args)?;
    let asked = SecretGetXmlDescArgs { secret, flags: 0 };
    let xml = shell.call(procs::SECRET_GET_XML_DESC, &asked)?.xml;
    print_selected(shell, args, &xml)
}

fn get_value(shell: &mut Shell, args: &Args) -> Result {
    let secret = find(shell, args)?;
    let asked = SecretGetValueArgs { secret, flags: 0 };
    let value = shell.call(procs::SECRET_GET_VALUE, &asked)?.value.0;
    if args.has("plain") {
        shell.out.print_bytes(&value);
    } else {
        shell.out.print(base64(&value));
    }
    Ok(())
}

fn list(shell: &mut Shell, args: &Args) -> Result {
    let mut flags = 0;
    for (at, name) in ["ephemeral", "no-ephemeral", "private", "no-private"]
        .into_iter()
        .enumerate()
    {
        if args.has(name) {
            flags |= 1 << at;
        }
    }
    let asked = ConnectListAllSecretsArgs {
        need_results: 1,
        flags,
    };
    let mut secrets = match shell.call(procs::CONNECT_LIST_ALL_SECRETS, &asked) {
        Ok(found) => found.secrets.0,
        // As for a daemon that only lacks this way of asking: what the older one says is told.
        Err(failure) if failure.is_unsupported() => {
            shell
                .call(procs::CONNECT_NUM_OF_SECRETS, &())
                .context("Failed to count secrets")?;
            return Err(failure);
        }
        Err(failure) => return Err(failure.context("Failed to list node secrets")),
    };
    secrets.sort_by_key(|secret| secret.uuid);
    let mut table = Table::new(&["UUID", "Usage"]);
    for secret in secrets {
        let usage = match secret.usage_type {
            1 => "volume",
            2 => "ceph",
            3 => "iscsi",
            4 => "tls",
            5 => "vtpm",
            _ => "",
        };
        let usage = if usage.is_empty() {
            "Unused".to_owned()
        } else {
            format!("{usage} {}", secret.usage_id)
        };
        table.row([format_uuid(&secret.uuid), usage]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

/// The most that libvirt's protocol takes, bytes; in Base64 it is a third more.
const VALUE_MAX: u64 = 64 << 10;

fn set_value(shell: &mut Shell, args: &Args) -> Result {
    for (first, second) in [
        ("file", "base64"),
        ("plain", "base64"),
        ("interactive", "file"),
        ("interactive", "base64"),
        ("interactive", "plain"),
    ] {
        args.exclusive(first, second)?;
    }
    args.requires("plain", "file")?;
    let secret = find(shell, args)?;
    let value = if let Some(text) = args.text("base64")? {
        shell
            .out
            .error("Passing secret value as command-line argument is insecure!");
        decode(text.as_bytes())?
    } else if let Some(path) = args.text("file")? {
        let mut bytes = Vec::new();
        let failed = |what: &'static str| {
            move |error| {
                Failure::new(format!(
                    "Failed to {what} file '{path}': {}",
                    os_message(&error)
                ))
            }
        };
        let file = std::fs::File::open(path).map_err(failed("open"))?;
        file.take(2 * VALUE_MAX)
            .read_to_end(&mut bytes)
            .map_err(failed("read"))?;
        if args.has("plain") {
            bytes
        } else {
            decode(&bytes)?
        }
    } else if args.has("interactive") {
        ask(shell)?
    } else {
        return Err(Failure::new("Input secret value is missing"));
    };
    let asked = SecretSetValueArgs {
        secret,
        value: value.into(),
        flags: 0,
    };
    shell
        .call(procs::SECRET_SET_VALUE, &asked)
        .context("Failed to set secret value")?;
    shell.out.print_extra("Secret value set\n");
    Ok(())
}

/// Asks for a line that is not shown while it is typed.
fn ask(shell: &mut Shell) -> Result<Vec<u8>> {
    shell.out.print("Enter new value for secret:");
    shell.out.flush();
    // Not a terminal: nothing is shown anyhow.
    let hidden = crate::terminal::RawTerminal::hidden().ok();
    let mut line = String::new();
    let read = std::io::stdin().lock().take(VALUE_MAX).read_line(&mut line);
    drop(hidden);
    shell.out.print("\n");
    read.map_err(|error| Failure::new(format!("Failed to read secret: {}", os_message(&error))))?;
    let value = line.trim_end_matches(['\n', '\r']);
    if value.is_empty() {
        return Err(Failure::new("Failed to read secret"));
    }
    Ok(value.as_bytes().to_vec())
}

fn undefine(shell: &mut Shell, args: &Args) -> Result {
    let secret = find(shell, args)?;
    let word = args.required("secret")?;
    shell
        .call(procs::SECRET_UNDEFINE, &SecretUndefineArgs { secret })
        .context(format!("Failed to delete secret {word}"))?;
    shell.out.print_extra(format!("Secret {word} deleted\n"));
    Ok(())
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// RFC 4648, 4.
fn base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut word = 0u32;
        for at in 0..3 {
            word = word << 8 | u32::from(chunk.get(at).copied().unwrap_or(0));
        }
        for at in 0..4 {
            if at <= chunk.len() {
                let digit = (word >> (18 - 6 * at)) & 63;
                text.push(char::from(ALPHABET[digit as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

/// The same backwards; white space is left out.
fn decode(text: &[u8]) -> Result<Vec<u8>> {
    let bad = || Failure::new("Invalid base64 data");
    let mut digits: Vec<u8> = text
        .iter()
        .copied()
        .filter(|b| !b.is_ascii_whitespace())
        .collect();
    while digits.last() == Some(&b'=') {
        digits.pop();
    }
    let mut bytes = Vec::new();
    let (mut word, mut bits) = (0u32, 0);
    for digit in &digits {
        let value = ALPHABET
            .iter()
            .position(|known| known == digit)
            .and_then(|at| u32::try_from(at).ok())
            .ok_or_else(bad)?;
        word = (word << 6 | value) & 0x3fff;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits & 0xff) as u8);
        }
    }
    // A single digit is no byte.
    if digits.len() % 4 == 1 {
        return Err(bad());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_goes_both_ways() {
        for (plain, coded) in [
            ("", ""),
            ("h", "aA=="),
            ("he", "aGU="),
            ("hel", "aGVs"),
            ("hello", "aGVsbG8="),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
            assert_eq!(decode(coded.as_bytes()).unwrap(), plain.as_bytes());
        }
        assert_eq!(decode(b"aGVs\nbG8=\n").unwrap(), b"hello");
        assert!(decode(b"!!").is_err());
        assert!(decode(b"a").is_err());
    }
}
