//! The guest agent: a program in the guest that answers JSON commands on a channel (QEMU's guest
//! agent protocol reference, "guest-sync-delimited"). Everything it says is the guest's word.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Value, json};
use xml_schemas::Domain as Definition;

use super::leases::Card;
use super::object::{Domain, not_running};
use super::state::State;
use crate::error::{Error, ErrorCode, Result};

/// The agent's channel.
pub const CHANNEL: &str = "org.qemu.guest_agent.0";
/// How long an agent may take for one command, as libvirt waits for it.
const LIMIT: Duration = Duration::from_secs(5);
/// The longest that anybody waits for one.
const LONGEST: Duration = Duration::from_secs(300);
/// How long a refusal to power off may take to come.
const REFUSAL: Duration = Duration::from_secs(2);
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
pub fn socket(definition: &Definition) -> Result<&str> {
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
    limit: Duration,
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
            limit: LIMIT,
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
                return Err(silent(format!(
                    "the agent did not answer within {} seconds",
                    self.limit.as_secs()
                )));
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

/// One exchange with an agent: the line it answers with, or none where `limit` passes without one.
fn exchange(path: &str, command: &str, limit: Duration) -> Result<Vec<u8>> {
    let mut agent = Agent::connect(path)?;
    agent.deadline = Instant::now() + limit;
    agent.limit = limit;
    let line = format!("{}\n", command.trim_end());
    let sent = agent.stream.write_all(line.as_bytes());
    sent.map_err(silent)?;
    agent.line()
}

/// Runs a command without arguments. Waits at most five seconds.
///
/// # Errors
/// No agent, or one that does not answer, or refuses.
pub fn command(definition: &Definition, name: &str) -> Result<Value> {
    let command = json!({ "execute": name }).to_string();
    answer(&exchange(socket(definition)?, &command, LIMIT)?)
}

/// How long an agent may take where nobody has said (VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK).
pub fn usual_limit() -> i32 {
    -2
}

/// How long a command may take (virDomainAgentResponseTimeoutValues, or seconds).
///
/// # Errors
/// VIR_ERR_INVALID_ARG for what is neither.
pub fn limit(timeout: i32) -> Result<Duration> {
    match timeout {
        // "As long as it takes" has an end too: a command that is done late is lost, not its caller.
        -2 => Ok(LONGEST),
        -1 => Ok(LIMIT),
        0 => Ok(Duration::ZERO),
        seconds => u64::try_from(seconds)
            .map(|seconds| Duration::from_secs(seconds).min(LONGEST))
            .map_err(|_| {
                Error::new(
                    ErrorCode::INVALID_ARG,
                    "guest agent timeout '%d' is less than the minimum '-2'"
                        .replace("%d", &timeout.to_string()),
                )
            }),
    }
}

impl Domain {
    /// The running definition of a domain whose guest can answer.
    fn agents(&self) -> Result<(Arc<Definition>, i32)> {
        let inner = self.lock();
        let live = inner.live()?;
        if !matches!(inner.state, State::Running(_)) {
            return Err(not_running());
        }
        socket(&live.definition)?;
        Ok((Arc::clone(&live.definition), inner.agent_timeout))
    }

    /// There is an agent that can be asked.
    ///
    /// # Errors
    /// There is none, or the domain does not run.
    pub fn agent_there(&self) -> Result<()> {
        self.agents().map(drop)
    }

    /// Whether an agent listens.
    pub fn has_agent(&self) -> bool {
        self.agents().is_ok()
    }

    /// Runs a command of the guest's agent, one at a time, and returns the line it answers with.
    ///
    /// # Errors
    /// No agent, or one that does not answer in time.
    pub async fn agent_line(&self, command: String, timeout: Option<i32>) -> Result<Vec<u8>> {
        let (definition, usual) = self.agents()?;
        let limit = limit(timeout.unwrap_or(usual))?;
        let Ok(_turn) = tokio::time::timeout(LONGEST, self.agent.lock()).await else {
            return Err(silent("another command of the agent does not end"));
        };
        super::blocking(move || exchange(socket(&definition)?, &command, limit)).await?
    }

    /// Runs a command of the guest's agent and returns what it returns.
    ///
    /// # Errors
    /// As [`Domain::agent_line`]; its refusal.
    pub async fn agent_command(&self, name: &str, arguments: Option<Value>) -> Result<Value> {
        let mut command = json!({ "execute": name });
        if let Some(arguments) = arguments {
            command["arguments"] = arguments;
        }
        let line = self.agent_line(command.to_string(), None).await?;
        answer(&line).map_err(|error| named(error, name))
    }

    /// Asks the agent to power the guest off or to reboot it. An agent that goes down with its guest says
    /// nothing any more: only a refusal is an error.
    ///
    /// # Errors
    /// No agent; its refusal.
    pub async fn agent_shutdown(&self, reboot: bool) -> Result<()> {
        let (definition, _) = self.agents()?;
        let mode = if reboot { "reboot" } else { "powerdown" };
        let command = json!({"execute": "guest-shutdown", "arguments": {"mode": mode}}).to_string();
        let _turn = self.agent.lock().await;
        let done = super::blocking(move || {
            let mut agent = Agent::connect(socket(&definition)?)?;
            agent.deadline = Instant::now() + REFUSAL;
            let line = format!("{command}\n");
            agent.stream.write_all(line.as_bytes()).map_err(silent)?;
            Ok::<_, Error>(agent.line().ok())
        });
        match done.await?? {
            Some(line) => answer(&line)
                .map(drop)
                .map_err(|error| named(error, "guest-shutdown")),
            None => Ok(()),
        }
    }
}

/// A refusal with the command it is about.
fn named(error: Error, command: &str) -> Error {
    let (before, after) = ("agent command: ", format!("agent command '{command}': "));
    Error {
        message: error.message.replacen(before, &after, 1),
        ..error
    }
}

/// An answer as it is handed on: one line of JSON without blanks between its parts.
///
/// # Errors
/// It is no JSON.
pub fn compact(line: &[u8]) -> Result<String> {
    let text = std::str::from_utf8(line).ok();
    let text = text.filter(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok());
    let text = text.ok_or_else(|| Error::internal("cannot parse json: the agent's answer"))?;
    let (mut out, mut inside, mut escaped) = (String::with_capacity(text.len()), false, false);
    for c in text.chars() {
        if inside {
            (inside, escaped) = (c != '"' || escaped, c == '\\' && !escaped);
        } else if c.is_ascii_whitespace() {
            continue;
        } else {
            inside = c == '"';
        }
        out.push(c);
    }
    Ok(out)
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

pub(super) fn cards(answer: Value) -> Result<Vec<Card>> {
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

    /// QEMU's own agent, on this host: it only tells.
    #[test]
    fn qemus_agent_is_understood() {
        use super::super::guest_info::{self, PARTS};
        let temp = crate::files::testing::TempFolder::new();
        let socket = temp.0.join("agent");
        let agent = std::process::Command::new("qemu-ga")
            .args(["-m", "unix-listen", "-p"])
            .arg(&socket)
            .arg("-t")
            .arg(&temp.0)
            .arg("-f")
            .arg(temp.0.join("pid"))
            .stderr(std::process::Stdio::null())
            .spawn();
        let Ok(mut agent) = agent else {
            println!("left out the agent needs qemu-ga (qemu-guest-agent)");
            return;
        };
        let started = Instant::now();
        while !socket.exists() && started.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let path = socket.display().to_string();
        let ask = |name: &str| {
            let command = json!({ "execute": name }).to_string();
            exchange(&path, &command, LIMIT).and_then(|line| answer(&line))
        };
        let told: Vec<_> = PARTS
            .iter()
            .map(|part| ask(part.command).and_then(|a| (part.params)(a, &|_| Vec::new())))
            .collect();
        let (time, vcpus, nonsense) = (ask("guest-get-time"), ask("guest-get-vcpus"), ask("bogus"));
        let raw = exchange(&path, "{\"execute\":\"guest-ping\"}", LIMIT);
        agent.kill().unwrap();
        agent.wait().unwrap();
        for (part, params) in PARTS.iter().zip(told) {
            let params = params.unwrap_or_else(|e| panic!("{}: {e}", part.command));
            assert!(!params.is_empty(), "{}", part.command);
        }
        assert!(time.unwrap().as_i64().unwrap() > 1_600_000_000_000_000_000);
        assert!(!guest_info::vcpus(vcpus.unwrap()).unwrap().is_empty());
        let error = nonsense.unwrap_err();
        assert!(
            error
                .message
                .contains("unable to execute QEMU agent command"),
            "{error}"
        );
        assert_eq!(compact(&raw.unwrap()).unwrap(), "{\"return\":{}}");
    }

    #[test]
    fn answers_lose_their_blanks_but_not_those_in_texts() {
        let line = b"{\"return\": {\"a b\": [1, \"x \\\" y\"], \"c\\\\\": true}}\r\n";
        let wanted = "{\"return\":{\"a b\":[1,\"x \\\" y\"],\"c\\\\\":true}}";
        assert_eq!(compact(line).unwrap(), wanted);
        assert!(compact(b"{").is_err());
        assert!(limit(-3).is_err());
        assert_eq!(limit(7), Ok(Duration::from_secs(7)));
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
            limit: LIMIT,
            seen: Vec::new(),
        };
        assert_eq!(agent.line().unwrap(), b"{\"return\": 7}\n");
        assert_eq!(agent.line().unwrap(), b"\xff{\"return\": 8}\n");
        drop(theirs);
        assert!(agent.line().is_err());
    }
}
