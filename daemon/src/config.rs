//! `vireod.conf`: libvirtd.conf's settings, as far as they mean something here.
//!
//! A line is `name = value`, a value a number, a quoted text or a list of those in brackets; `#` begins a comment.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rpc::server::{Keepalive, ServerConfig};
use rpc::tls::ServerFiles;

use crate::drivers::domain::migrate::tls::Certificates;

/// How clients of a socket prove who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Auth {
    /// The socket's permissions say it all.
    None,
    /// polkit is asked.
    Polkit,
}

/// The settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where plain TCP is served, if it is.
    pub tcp: Option<String>,
    /// Where TLS is served, if it is.
    pub tls: Option<String>,
    /// Its files.
    pub tls_files: ServerFiles,
    /// Certificates for guests that move.
    pub migrate_tls: Certificates,
    /// How clients of the socket for everything prove who they are; unset: polkit where it is installed.
    pub auth_rw: Option<Auth>,
    /// The same for the socket for looking.
    pub auth_ro: Auth,
    /// The group that may use the socket for everything.
    pub group: String,
    /// The permissions of the socket for everything, if they are said.
    pub rw_mode: Option<u32>,
    /// Those of the other.
    pub ro_mode: u32,
    /// Limits and keepalive.
    pub server: ServerConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tcp: None,
            tls: None,
            tls_files: ServerFiles {
                ca: "/etc/pki/CA/cacert.pem".into(),
                crl: Some(PathBuf::from(CRL)).filter(|path| path.exists()),
                certificate: "/etc/pki/libvirt/servercert.pem".into(),
                key: "/etc/pki/libvirt/private/serverkey.pem".into(),
                verify: true,
            },
            migrate_tls: Certificates::default(),
            auth_rw: None,
            auth_ro: Auth::None,
            group: "libvirt".to_owned(),
            rw_mode: None,
            ro_mode: 0o777,
            server: ServerConfig::default(),
        }
    }
}

const CRL: &str = "/etc/pki/CA/cacrl.pem";

/// Settings that would let fewer in than we could keep out: better no daemon than an open one.
const REFUSED: &[&str] = &[
    "tls_allowed_dn_list",
    "sasl_allowed_username_list",
    "access_drivers",
];

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Number(i64),
    Text(String),
    List(Vec<String>),
}

/// Reads the file; one that is not there changes nothing.
///
/// # Errors
/// It cannot be read, or asks for what is not there.
pub fn read(path: &Path) -> Result<Config, String> {
    const MOST: u64 = 1 << 20;
    let text = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Config::default()),
        Ok(it) if it.len() > MOST => Err("it is too large".to_owned()),
        _ => fs::read_to_string(path).map_err(|error| error.to_string()),
    };
    text.and_then(|text| parse(&text))
        .map_err(|why| format!("{}: {why}", path.display()))
}

fn parse(text: &str) -> Result<Config, String> {
    let mut settings = Settings(settings(text)?);
    for name in REFUSED {
        if settings.0.contains_key(*name) {
            return Err(format!("{name} is not supported"));
        }
    }
    let mut config = Config::default();
    let address = settings.text("listen_addr")?.unwrap_or("0.0.0.0".into());
    let address = if address.contains(':') {
        format!("[{address}]")
    } else {
        address
    };
    let port = |port: Option<String>, default: &str| {
        let port = port.unwrap_or_else(|| default.to_owned());
        port.parse::<u16>()
            .map(|port| format!("{address}:{port}"))
            .map_err(|_| format!("'{port}' is no port"))
    };
    let tls = port(settings.text("tls_port")?, "16514")?;
    let tcp = port(settings.text("tcp_port")?, "16509")?;
    config.tls = settings.flag("listen_tls")?.unwrap_or(false).then_some(tls);
    config.tcp = settings.flag("listen_tcp")?.unwrap_or(false).then_some(tcp);
    let auth_tcp = settings.text("auth_tcp")?;
    if config.tcp.is_some() && auth_tcp.as_deref() != Some("none") {
        return Err(
            "listen_tcp needs auth_tcp = \"none\": there is no SASL here, and everybody who reaches the port may do \
             everything"
                .to_owned(),
        );
    }
    if let Some(other) = settings.text("auth_tls")?.filter(|auth| auth != "none") {
        return Err(format!("auth_tls = \"{other}\" is not supported"));
    }
    for (name, file) in [
        ("ca_file", &mut config.tls_files.ca),
        ("cert_file", &mut config.tls_files.certificate),
        ("key_file", &mut config.tls_files.key),
    ] {
        if let Some(path) = settings.text(name)? {
            *file = path.into();
        }
    }
    if let Some(path) = settings.text("crl_file")? {
        config.tls_files.crl = Some(path.into());
    }
    if let Some(folder) = settings.text("migrate_tls_x509_cert_dir")? {
        config.migrate_tls.folder = folder.into();
    }
    if let Some(verify) = settings.flag("migrate_tls_x509_verify")? {
        config.migrate_tls.verify = verify;
    }
    let unverified = settings.flag("tls_no_verify_certificate")?;
    config.tls_files.verify = !unverified.unwrap_or(false);
    config.auth_rw = settings.auth("auth_unix_rw")?;
    config.auth_ro = settings.auth("auth_unix_ro")?.unwrap_or(Auth::None);
    if let Some(group) = settings.text("unix_sock_group")? {
        config.group = group;
    }
    config.rw_mode = settings.mode("unix_sock_rw_perms")?;
    if let Some(mode) = settings.mode("unix_sock_ro_perms")? {
        config.ro_mode = mode;
    }
    let server = &mut config.server;
    for (name, place) in [
        ("max_clients", &mut server.max_clients),
        ("max_anonymous_clients", &mut server.max_anonymous_clients),
        ("max_client_requests", &mut server.max_client_requests),
    ] {
        if let Some(number) = settings.number(name)? {
            *place = usize::try_from(number)
                .ok()
                .filter(|&number| number > 0)
                .ok_or_else(|| format!("{name} = {number} makes no sense"))?;
        }
    }
    let mut keepalive = server.keepalive.unwrap_or(Keepalive {
        interval: Duration::from_secs(5),
        count: 5,
    });
    let mut asks = true;
    if let Some(seconds) = settings.number("keepalive_interval")? {
        // Zero or less: never.
        asks = seconds > 0;
        keepalive.interval = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    }
    if let Some(count) = settings.number("keepalive_count")? {
        keepalive.count = u32::try_from(count)
            .map_err(|_| format!("keepalive_count = {count} makes no sense"))?;
    }
    server.keepalive = asks.then_some(keepalive);
    for name in settings.0.keys() {
        log::warn!("vireod.conf: {name} means nothing here");
    }
    Ok(config)
}

/// What is not read yet.
struct Settings(HashMap<String, Value>);

impl Settings {
    fn text(&mut self, name: &str) -> Result<Option<String>, String> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(Value::List(_)) => Err(format!("{name} is no list")),
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<i64>, String> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::Number(number)) => Ok(Some(number)),
            Some(Value::Text(_) | Value::List(_)) => Err(format!("{name} must be a number")),
        }
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>, String> {
        match self.number(name)? {
            None => Ok(None),
            Some(0) => Ok(Some(false)),
            Some(1) => Ok(Some(true)),
            Some(other) => Err(format!("{name} = {other}: must be 0 or 1")),
        }
    }

    fn auth(&mut self, name: &str) -> Result<Option<Auth>, String> {
        match self.text(name)?.as_deref() {
            None => Ok(None),
            Some("none") => Ok(Some(Auth::None)),
            Some("polkit") => Ok(Some(Auth::Polkit)),
            Some(other) => Err(format!("{name} = \"{other}\" is not supported")),
        }
    }

    fn mode(&mut self, name: &str) -> Result<Option<u32>, String> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        u32::from_str_radix(&text, 8)
            .ok()
            .filter(|mode| mode & !0o777 == 0)
            .map(Some)
            .ok_or_else(|| format!("{name} = \"{text}\" is no file mode"))
    }
}

fn settings(text: &str) -> Result<HashMap<String, Value>, String> {
    let mut found = HashMap::new();
    let mut rest = text;
    loop {
        rest = skip(rest);
        if rest.is_empty() {
            return Ok(found);
        }
        let line = 1 + text[..text.len() - rest.len()].matches('\n').count();
        let at = |why: &str| format!("line {line}: {why}");
        let (name, value) = rest.split_once('=').ok_or_else(|| at("'=' is missing"))?;
        let name = name.trim();
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(at("a setting's name is missing"));
        }
        let (value, after) = value_of(value.trim_start_matches([' ', '\t'])).map_err(|e| at(&e))?;
        found.insert(name.to_owned(), value);
        rest = after;
    }
}

/// What is left behind white space and comments.
fn skip(mut text: &str) -> &str {
    loop {
        text = text.trim_start();
        match text.strip_prefix('#') {
            Some(comment) => text = comment.find('\n').map_or("", |end| &comment[end..]),
            None => return text,
        }
    }
}

fn value_of(text: &str) -> Result<(Value, &str), String> {
    if let Some(mut rest) = text.strip_prefix('[') {
        let mut list = Vec::new();
        loop {
            rest = skip(rest);
            if let Some(after) = rest.strip_prefix(']') {
                return Ok((Value::List(list), after));
            }
            let (item, after) = quoted(rest)?;
            list.push(item);
            rest = skip(after);
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
    }
    if text.starts_with(['"', '\'']) {
        let (text, rest) = quoted(text)?;
        return Ok((Value::Text(text), rest));
    }
    let end = text
        .find(|c: char| c.is_whitespace() || c == '#')
        .unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let number = number
        .parse()
        .map_err(|_| format!("'{number}' is neither a number nor a quoted text"))?;
    Ok((Value::Number(number), rest))
}

fn quoted(text: &str) -> Result<(String, &str), String> {
    let quote = text
        .chars()
        .next()
        .filter(|c| matches!(c, '"' | '\''))
        .ok_or("a quoted text is missing")?;
    let inner = &text[1..];
    match inner.find([quote, '\n']) {
        Some(end) if inner[end..].starts_with(quote) => {
            Ok((inner[..end].to_owned(), &inner[end + 1..]))
        }
        _ => Err("a text's closing quote is missing".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_libvirtds() {
        let config = parse(
            "# how\nlisten_tls = 1 # yes\nlisten_tcp = 1\nauth_tcp = \"none\"\ntls_port = \"7\"\n\
             listen_addr = \"::1\"\nca_file = '/x/ca'\nunix_sock_group = \"vm\"\n\
             unix_sock_rw_perms = \"0770\"\nauth_unix_rw = \"polkit\"\nmax_clients = 7\n\
             keepalive_interval = -1\nhost_uuid = \"x\"\nlog_filters = [ \"a\", # one\n\"b\" ]\n",
        )
        .unwrap();
        assert_eq!(config.tls.as_deref(), Some("[::1]:7"));
        assert_eq!(config.tcp.as_deref(), Some("[::1]:16509"));
        assert_eq!(config.tls_files.ca, Path::new("/x/ca"));
        assert!(config.tls_files.verify);
        assert_eq!((config.group.as_str(), config.rw_mode), ("vm", Some(0o770)));
        assert_eq!(config.auth_rw, Some(Auth::Polkit));
        assert_eq!(config.server.max_clients, 7);
        assert_eq!(config.server.keepalive, None);
        assert_eq!(parse(""), Ok(Config::default()));
        let none = read(Path::new("/nonexistent/vireod.conf"));
        assert_eq!(none, Ok(Config::default()));
    }

    #[test]
    fn what_would_leave_a_door_open_is_refused() {
        for (text, why) in [
            ("listen_tcp = 1", "auth_tcp"),
            ("listen_tcp = 1\nauth_tcp = \"sasl\"", "auth_tcp"),
            ("auth_tls = \"sasl\"", "auth_tls"),
            ("auth_unix_rw = \"sasl\"", "auth_unix_rw"),
            ("tls_allowed_dn_list = [\"CN=x\"]", "tls_allowed_dn_list"),
            ("\n\nlisten_tls = yes", "line 3"),
            ("listen_tls = 2", "0 or 1"),
            ("listen_tls", "'='"),
            ("max_clients = 0", "max_clients"),
            ("unix_sock_ro_perms = \"999\"", "file mode"),
            ("ca_file = \"x", "quote"),
            ("ca_file = [\"x\"", "quoted"),
            ("ca_file = [\"x\"]", "no list"),
            ("tls_port = \"70000\"", "port"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
