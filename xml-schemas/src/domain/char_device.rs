//! Serial ports and consoles.

use super::View;
use super::parse::bad_attribute;
use crate::dom::Element;
use crate::error::XmlError;
use crate::units::number;

/// Whether a character device is a port or a console.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CharRole {
    /// `<serial>`.
    Serial,
    /// `<console>`.
    Console,
}

/// A serial port or console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CharDevice {
    /// The other end.
    pub source: CharSource,
    /// Children of `<source>` (seclabel, reconnect).
    pub source_rest: Vec<Element>,
    /// A file that also gets everything the guest writes.
    pub log: Option<CharLog>,
    /// What the guest sees.
    pub target: CharTarget,
    /// `<alias name=…>`: the device's id in a running domain, or the user's (`ua-…`).
    pub alias: Option<String>,
    /// Every other child (address, acpi, boot…).
    pub rest: Vec<Element>,
}

/// `<log>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CharLog {
    /// Absolute path.
    pub file: String,
    /// Whether the file is kept at start; `None` is libvirt's default, off.
    pub append: Option<bool>,
}

/// `<target>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CharTarget {
    /// Serial: `isa-serial`, `pci-serial`… Console: `serial`, `virtio`…
    pub target_type: Option<String>,
    /// Port number; filled by default.
    pub port: Option<u32>,
    /// `<model name=…>` (serial only).
    pub model: Option<String>,
}

/// The host's end of a character device: `type` and `<source>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CharSource {
    /// Output is dropped, there is no input.
    Null,
    /// A pseudo-terminal made at start.
    Pty {
        /// `/dev/pts/N` of a running domain.
        path: Option<String>,
    },
    /// A file that gets the output.
    File {
        /// Path on the host.
        path: String,
        /// Whether the file is kept at start.
        append: Option<bool>,
    },
    /// A UNIX socket.
    Unix {
        /// Listen or connect.
        mode: SocketMode,
        /// Path on the host; `None`: chosen at start (only when listening).
        path: Option<String>,
    },
    /// A TCP socket.
    Tcp {
        /// Listen or connect.
        mode: SocketMode,
        /// Address or name; `None` for any address when listening.
        host: Option<String>,
        /// Port number or service name.
        service: String,
        /// What is spoken on it.
        protocol: TcpProtocol,
        /// `tls='yes'|'no'`, as written.
        tls: Option<bool>,
    },
    /// Any other kind that libvirt has; refused at start.
    Other {
        /// `type`.
        kind: String,
        /// `<source>`, `<protocol>`, `<clipboard>`… as written.
        parts: Vec<Element>,
    },
}

/// Who waits for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SocketMode {
    /// The VMM listens.
    Bind,
    /// The VMM connects.
    Connect,
}

/// `<protocol type=…>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TcpProtocol {
    /// Bytes as they are.
    Raw,
    /// RFC 854.
    Telnet,
    /// TELNET over TLS.
    Telnets,
    /// TLS.
    Tls,
}

impl CharSource {
    /// `type` in documents.
    pub fn kind(&self) -> &str {
        match self {
            Self::Null => "null",
            Self::Pty { .. } => "pty",
            Self::File { .. } => "file",
            Self::Unix { .. } => "unix",
            Self::Tcp { .. } => "tcp",
            Self::Other { kind, .. } => kind,
        }
    }
}

impl CharDevice {
    /// A device with that other end and nothing else stated.
    pub fn new(source: CharSource) -> Self {
        Self {
            source,
            source_rest: Vec::new(),
            log: None,
            target: CharTarget::default(),
            alias: None,
            rest: Vec::new(),
        }
    }
}

pub(super) fn parse(mut element: Element) -> Result<CharDevice, XmlError> {
    let line = element.line;
    let kind = element.attr("type").unwrap_or("pty").to_owned();
    let mut device = CharDevice::new(source(&mut element, &kind)?);
    // A pseudo-terminal's path is in either place.
    if let (CharSource::Pty { path: path @ None }, Some(tty)) =
        (&mut device.source, element.attr("tty"))
    {
        *path = Some(tty.to_owned());
    }
    if !matches!(device.source, CharSource::Other { .. })
        && let Some(mut source) = element.take_child("source")
    {
        device.source_rest = source.take_elements();
    }
    if let Some(log) = element.take_child("log") {
        device.log = Some(CharLog {
            file: log
                .attr("file")
                .map(str::to_owned)
                .ok_or_else(|| bad_attribute(&log, "file"))?,
            append: on_off(&log, "append")?,
        });
    }
    if let Some(target) = element.take_child("target") {
        let port = match target.attr("port") {
            Some(text) => Some(number(text).ok_or_else(|| {
                XmlError::xml(format!("Invalid port number: {text}")).at(target.line)
            })?),
            None => None,
        };
        device.target = CharTarget {
            target_type: target.attr("type").map(str::to_owned),
            port,
            model: target
                .child("model")
                .and_then(|m| m.attr("name"))
                .map(str::to_owned),
        };
        check_target(&element.name, &device.target).map_err(|e| e.at(line))?;
    }
    device.alias = element
        .take_child("alias")
        .and_then(|a| a.attr("name").map(str::to_owned));
    // Of repeated sources libvirt takes the first too.
    element.take_children("source");
    device.rest = element.take_elements();
    Ok(device)
}

/// A serial port's kind is not a console's, though the schema takes either in both places.
fn check_target(role: &str, target: &CharTarget) -> Result<(), XmlError> {
    let Some(kind) = target.target_type.as_deref() else {
        return Ok(());
    };
    let known = match role {
        "serial" => matches!(
            kind,
            "isa-serial"
                | "usb-serial"
                | "pci-serial"
                | "spapr-vio-serial"
                | "system-serial"
                | "sclp-serial"
                | "isa-debug"
        ),
        _ => matches!(
            kind,
            "serial" | "xen" | "uml" | "virtio" | "lxc" | "openvz" | "sclp" | "sclplm"
        ),
    };
    if known {
        Ok(())
    } else {
        Err(XmlError::unsupported(format!(
            "unknown target type '{kind}' specified for character device"
        )))
    }
}

fn source(element: &mut Element, kind: &str) -> Result<CharSource, XmlError> {
    let line = element.line;
    let source = element.child("source");
    let attr = |name: &str| {
        source
            .and_then(|s| s.attr(name))
            .filter(|v| !v.is_empty())
            .map(str::to_owned)
    };
    let needed = |name: &str| {
        attr(name).ok_or_else(|| {
            XmlError::internal(format!("Missing source {name} attribute for char device")).at(line)
        })
    };
    let mode = || match source.map(|s| (s, s.attr("mode"))) {
        None | Some((_, None | Some("connect"))) => Ok(SocketMode::Connect),
        Some((_, Some("bind"))) => Ok(SocketMode::Bind),
        Some((s, Some(_))) => Err(bad_attribute(s, "mode")),
    };
    Ok(match kind {
        "null" => CharSource::Null,
        "pty" => CharSource::Pty { path: attr("path") },
        "file" => CharSource::File {
            path: needed("path")?,
            append: source.map_or(Ok(None), |s| on_off(s, "append"))?,
        },
        // A channel's socket is made where nothing else is said.
        "unix" if element.name == "channel" && attr("path").is_none() => CharSource::Unix {
            mode: SocketMode::Bind,
            path: None,
        },
        "unix" => CharSource::Unix {
            mode: mode()?,
            path: Some(needed("path")?),
        },
        "tcp" => {
            let service = needed("service")?;
            let host = Some(needed("host")?);
            let tls = source.and_then(|s| s.attr("tls")).map(|v| v == "yes");
            let mode = mode()?;
            let protocol = element.take_child("protocol");
            let protocol = match protocol.as_ref().map(|p| (p, p.attr("type"))) {
                None | Some((_, None | Some("raw"))) => TcpProtocol::Raw,
                Some((_, Some("telnet"))) => TcpProtocol::Telnet,
                Some((_, Some("telnets"))) => TcpProtocol::Telnets,
                Some((_, Some("tls"))) => TcpProtocol::Tls,
                Some((p, Some(_))) => return Err(bad_attribute(p, "type")),
            };
            CharSource::Tcp {
                mode,
                host,
                service,
                protocol,
                tls,
            }
        }
        "dev" | "pipe" | "stdio" | "udp" | "vc" | "spicevmc" | "spiceport" | "nmdm"
        | "qemu-vdagent" | "dbus" => {
            let mut parts = element.take_children("source");
            parts.extend(element.take_children("protocol"));
            CharSource::Other {
                kind: kind.to_owned(),
                parts,
            }
        }
        other => {
            return Err(XmlError::unsupported(format!(
                "unknown type presented to host for character device: {other}"
            ))
            .at(line));
        }
    })
}

fn on_off(element: &Element, attribute: &str) -> Result<Option<bool>, XmlError> {
    match element.attr(attribute) {
        None => Ok(None),
        Some("on") => Ok(Some(true)),
        Some("off") => Ok(Some(false)),
        Some(_) => Err(bad_attribute(element, attribute)),
    }
}

pub(super) fn format(name: &str, device: &CharDevice, view: View) -> Element {
    let mut e = Element::new(name).with_attr("type", device.source.kind());
    let switch = |on: bool| if on { "on" } else { "off" };
    let mode = |m: SocketMode| match m {
        SocketMode::Bind => "bind",
        SocketMode::Connect => "connect",
    };
    let mut source = Element::new("source");
    let mut protocol = None;
    match &device.source {
        CharSource::Null => {}
        CharSource::Pty { path } => {
            if let (View::Live, Some(path)) = (view, path) {
                // Older clients look for it here.
                if name == "console" {
                    e.set_attr("tty", path);
                }
                source.set_attr("path", path);
            }
        }
        CharSource::File { path, append } => {
            source.set_attr("path", path);
            source.set_opt_attr("append", append.map(switch));
        }
        CharSource::Unix { mode: m, path } => {
            source.set_attr("mode", mode(*m));
            source.set_opt_attr("path", path.as_deref());
        }
        CharSource::Tcp {
            mode: m,
            host,
            service,
            protocol: p,
            tls,
        } => {
            source.set_attr("mode", mode(*m));
            source.set_opt_attr("host", host.as_deref());
            source.set_attr("service", service);
            source.set_opt_attr("tls", tls.map(|t| if t { "yes" } else { "no" }));
            let kind = match p {
                TcpProtocol::Raw => "raw",
                TcpProtocol::Telnet => "telnet",
                TcpProtocol::Telnets => "telnets",
                TcpProtocol::Tls => "tls",
            };
            protocol = Some(Element::new("protocol").with_attr("type", kind));
        }
        CharSource::Other { parts, .. } => {
            for part in parts {
                e.push(part.clone());
            }
        }
    }
    for child in &device.source_rest {
        source.push(child.clone());
    }
    if !source.is_empty() {
        e.push(source);
    }
    if let Some(protocol) = protocol {
        e.push(protocol);
    }
    if let Some(log) = &device.log {
        let mut l = Element::new("log").with_attr("file", &log.file);
        l.set_opt_attr("append", log.append.map(switch));
        e.push(l);
    }
    let mut target = Element::new("target");
    target.set_opt_attr("type", device.target.target_type.as_deref());
    target.set_opt_attr("port", device.target.port.map(|p| p.to_string()));
    if let Some(model) = &device.target.model {
        target.push(Element::new("model").with_attr("name", model));
    }
    if !target.is_empty() {
        e.push(target);
    }
    if let Some(alias) = &device.alias
        && (view == View::Live || alias.starts_with("ua-"))
    {
        e.push(Element::new("alias").with_attr("name", alias));
    }
    for other in &device.rest {
        e.push(other.clone());
    }
    e
}
