//! Connection URIs, taken apart.

/// Options that tell this side how to reach the daemon, which does not hear of them.
const OWN_OPTIONS: &[&str] = &[
    "command",
    "keyfile",
    "known_hosts",
    "known_hosts_verify",
    "mode",
    "name",
    "netcat",
    "no_tty",
    "no_verify",
    "pkipath",
    "proxy",
    "socket",
    "sshauth",
];

/// Why a URI can't be read, in libvirt's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UriError(String);

/// The parts of a URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts<'a> {
    /// `vireo`, `qemu`, ...
    pub driver: &'a str,
    /// What follows the `+`.
    pub transport: Option<&'a str>,
    /// `user@`
    pub user: Option<&'a str>,
    /// A name or an address, IPv6 without brackets; may be empty.
    pub host: String,
    /// `:port`
    pub port: Option<u16>,
    /// `/system`
    pub path: &'a str,
    /// Options that are for this side.
    own: Vec<(&'a str, String)>,
    /// Options that are for the daemon.
    other: Vec<&'a str>,
}

impl<'a> Parts<'a> {
    /// Takes a URI apart.
    ///
    /// # Errors
    /// It is malformed.
    pub fn parse(uri: &'a str) -> Result<Self, UriError> {
        let Some((scheme, rest)) = uri
            .split_once("://")
            .filter(|(scheme, _)| !scheme.is_empty())
        else {
            return Err(UriError(format!(
                "no connection driver available for URI '{uri}' does not include a driver name"
            )));
        };
        let malformed =
            |why: &str| UriError(format!("invalid argument: malformed URI '{uri}': {why}"));
        let (driver, transport) = match scheme.split_once('+') {
            Some((driver, transport)) => (driver, Some(transport)),
            None => (scheme, None),
        };
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, query.split('#').next().unwrap_or_default()),
            None => (rest, ""),
        };
        let slash = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(slash);
        let (user, authority) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => {
                let (host, port) = v6
                    .split_once(']')
                    .ok_or_else(|| malformed("']' is missing"))?;
                (host, port.strip_prefix(':'))
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let port = port
            .map(str::parse)
            .transpose()
            .map_err(|_| malformed("not a port number"))?;
        let mut own = Vec::new();
        let mut other = Vec::new();
        for option in query.split(['&', ';']).filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some((name, value)) if OWN_OPTIONS.contains(&name) => {
                    let value = percent_decode(value).ok_or_else(|| malformed("bad % sequence"))?;
                    own.push((name, value));
                }
                _ => other.push(option),
            }
        }
        let host = percent_decode(host).ok_or_else(|| malformed("bad % sequence"))?;
        Ok(Self {
            driver,
            transport,
            user,
            host,
            port,
            path,
            own,
            other,
        })
    }

    /// The value of an option for this side.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<&str> {
        let found = self.own.iter().find(|(option, _)| *option == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Whether an option for this side is on.
    #[must_use]
    pub fn flag(&self, name: &str) -> bool {
        self.option(name).is_some_and(|value| value != "0")
    }

    /// What the daemon is asked to open: without transport and options for this side.
    #[must_use]
    pub fn name(&self) -> String {
        let mut name = format!("{}://{}", self.driver, self.path);
        if !self.other.is_empty() {
            name.push('?');
            name.push_str(&self.other.join("&"));
        }
        name
    }
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let high = char::from(rest.next()?).to_digit(16)?;
            let low = char::from(rest.next()?).to_digit(16)?;
            bytes.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}
