//! The guest agent: a program in the guest that answers JSON commands on a channel (QEMU's guest
//! agent protocol reference, "guest-sync-delimited"). Everything it says is the guest's word.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Value, json};
use xml_schemas::Domain as Definition;

use super::leases::Card;
use crate::error::{Error, ErrorCode, Result};

/// The agent's channel.
pub const CHANNEL: &str = "org.qemu.guest_agent.0";
/// How long an agent may take for one command, as libvirt waits for it.
const LIMIT: Duration = Duration::from_secs(5);
/// The longest answer.
const ANSWER_MAX: usize = 4 << 20;
/// Most cards, and most addresses of one, that are passed on.
const LIST_MAX: usize = 2048;

fn silent(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::AGENT_UNRESPONSIVE, what.to_string())
}

/// The host's end of the agent's channel in a running definition.
///
/// # Errors
/// VIR_ERR_ARGUMENT_UNSUPPORTED where there is no such channel, VIR_ERR_AGENT_UNRESPONSIVE where no
/// agent has opened it.
fn socket(definition: &Definition) -> Result<&str> {
    let mut channels = definition.devices.rest.iter();
    let is_agent = |name: &xml_schemas::dom::Element| name.attr("name") == Some(CHANNEL);
    let found = channels.find_map(|channel| {
        let target = channel.child("target").filter(|target| is_agent(target))?;
        let path = channel.child("source")?.attr("path")?;
        (channel.name == "channel").then_some((path, target.attr("state")))
    });
    match found {
        None => Err(Error::new(
            ErrorCode::ARGUMENT_UNSUPPORTED,
            "QEMU guest agent is not configured",
        )),
        Some((path, Some("connected"))) => Ok(path),
        Some(_) => Err(silent("QEMU guest agent is not connected")),
    }
}

/// A connection for one command.
struct Agent {
    stream: UnixStream,
    deadline: Instant,
    seen: Vec<u8>,
}

impl Agent {
    /// Connects, and makes sure that what comes next is an answer to this connection.
    fn connect(path: &str) -> Result<Self> {
        let stream = UnixStream::connect(path).map_err(silent)?;
        stream.set_write_timeout(Some(LIMIT)).map_err(silent)?;
        let mut agent = Self {
            stream,
            deadline: Instant::now() + LIMIT,
            seen: Vec::new(),
        };
        // What an earlier, impatient client did not wait for ends at the 0xff that comes first.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let id = now.map_or(1, |now| now.subsec_nanos()) | 1;
        let sync = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        agent.stream.write_all(&[0xff]).map_err(silent)?;
        agent.send(&sync)?;
        loop {
            let line = agent.line()?;
            let Some(at) = line.iter().rposition(|byte| *byte == 0xff) else {
                continue;
            };
            if answer(&line[at + 1..])? == json!(id) {
                return Ok(agent);
            }
        }
    }

    fn send(&mut self, command: &Value) -> Result<()> {
        let text = format!("{command}\n");
        self.stream.write_all(text.as_bytes()).map_err(silent)
    }

    /// The next line.
    fn line(&mut self) -> Result<Vec<u8>> {
        loop {
            if let Some(end) = self.seen.iter().position(|byte| *byte == b'\n') {
                let rest = self.seen.split_off(end + 1);
                return Ok(std::mem::replace(&mut self.seen, rest));
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(silent("the agent did not answer within 5 seconds"));
            }
            if self.seen.len() > ANSWER_MAX {
                return Err(silent("its answer is too long"));
            }
            self.stream.set_read_timeout(Some(left)).map_err(silent)?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(silent("the agent's channel was closed")),
                Ok(count) => self.seen.extend_from_slice(&buffer[..count]),
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock
                            | std::io::ErrorKind::TimedOut
                            | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(silent(error)),
            }
        }
    }
}

/// What a command returned.
fn answer(line: &[u8]) -> Result<Value> {
    let mut reply: Value = serde_json::from_slice(line)
        .map_err(|error| Error::internal(format!("cannot parse the agent's answer: {error}")))?;
    if let Some(error) = reply.get("error") {
        let text = error.get("desc").and_then(Value::as_str);
        return Err(Error::internal(format!(
            "unable to execute QEMU agent command: {}",
            text.unwrap_or("it does not say why")
        )));
    }
    Ok(reply
        .get_mut("return")
        .map_or(Value::Null, serde_json::Value::take))
}

/// Runs a command without arguments. Waits at most five seconds.
///
/// # Errors
/// No agent, or one that does not answer, or refuses.
pub fn command(definition: &Definition, name: &str) -> Result<Value> {
    let mut agent = Agent::connect(socket(definition)?)?;
    agent.send(&json!({ "execute": name }))?;
    let line = agent.line()?;
    answer(&line)
}

#[derive(Deserialize)]
struct AgentCard {
    name: String,
    #[serde(rename = "hardware-address", default)]
    mac: Option<String>,
    #[serde(rename = "ip-addresses", default)]
    addresses: Vec<AgentAddress>,
}

#[derive(Deserialize)]
struct AgentAddress {
    #[serde(rename = "ip-address")]
    address: std::net::IpAddr,
    prefix: u32,
}

/// The guest's own view of its network cards.
///
/// # Errors
/// As [`command`].
pub fn interfaces(definition: &Definition) -> Result<Vec<Card>> {
    cards(command(definition, "guest-network-get-interfaces")?)
}

fn cards(answer: Value) -> Result<Vec<Card>> {
    let cards: Vec<AgentCard> = serde_json::from_value(answer)
        .map_err(|error| Error::internal(format!("malformed list of interfaces: {error}")))?;
    let card = |card: AgentCard| {
        let addresses = card.addresses.into_iter().take(LIST_MAX);
        Card {
            name: card.name,
            mac: card.mac.unwrap_or_default(),
            addresses: addresses.map(|a| (a.address, a.prefix)).collect(),
        }
    };
    Ok(cards.into_iter().take(LIST_MAX).map(card).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_qemus_agent_says() {
        let said = br#"{"return": [{"name": "lo", "ip-addresses": [{"ip-address-type": "ipv4",
            "ip-address": "127.0.0.1", "prefix": 8}], "hardware-address": "00:00:00:00:00:00"},
            {"name": "sit0"}]}"#;
        let found = cards(answer(said).unwrap()).unwrap();
        assert_eq!(found[0].addresses, [("127.0.0.1".parse().unwrap(), 8)]);
        assert_eq!(
            (found[1].name.as_str(), found[1].mac.as_str()),
            ("sit0", "")
        );
        let refused =
            answer(br#"{"error": {"class": "CommandNotFound", "desc": "no such thing"}}"#);
        assert!(refused.unwrap_err().message.contains("no such thing"));
        assert!(cards(json!({"name": 1})).is_err());
        assert!(answer(b"\xff\xfe").is_err());
    }

    #[test]
    fn passes_over_what_was_meant_for_others() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .write_all(b"{\"return\": 7}\n\xff{\"return\": 8}\n")
            .unwrap();
        let mut agent = Agent {
            stream: ours,
            deadline: Instant::now() + LIMIT,
            seen: Vec::new(),
        };
        assert_eq!(agent.line().unwrap(), b"{\"return\": 7}\n");
        assert_eq!(agent.line().unwrap(), b"\xff{\"return\": 8}\n");
        drop(theirs);
        assert!(agent.line().is_err());
    }
}
