//! Where a guest goes: `tcp:HOST[:PORT]`, `tcp://HOST[:PORT]`, `unix:///PATH`.

use std::path::PathBuf;

use crate::error::{Error, ErrorCode, Result};

/// A place that a target listens at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// TCP.
    Tcp {
        /// A name or an address, IPv6 without brackets.
        host: String,
        /// Its port, if it is said.
        port: Option<u16>,
    },
    /// A UNIX socket.
    Unix(PathBuf),
}

impl Place {
    /// Reads one.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG.
    pub fn parse(uri: &str) -> Result<Self> {
        let bad = |what: &str| {
            let text = format!("migration URI '{uri}': {what}");
            Error::new(ErrorCode::INVALID_ARG, text)
        };
        if let Some(path) = uri.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                return Err(bad("the socket's path must be absolute"));
            }
            return Ok(Self::Unix(path.into()));
        }
        let rest = uri
            .strip_prefix("tcp:")
            .ok_or_else(|| bad("only tcp and unix are supported"))?;
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        // As in libvirt: a path or a query says nothing.
        let rest = rest.split(['/', '?']).next().unwrap_or(rest);
        let (host, port) = match rest.strip_prefix('[') {
            Some(inner) => {
                let (host, after) = inner
                    .split_once(']')
                    .ok_or_else(|| bad("its address has no end"))?;
                let port = after.strip_prefix(':');
                if port.is_none() && !after.is_empty() {
                    return Err(bad("what follows the address is no port"));
                }
                (host, port)
            }
            None => match rest.rsplit_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (rest, None),
            },
        };
        if host.is_empty() {
            return Err(bad("the host is missing"));
        }
        let port = port
            .map(|port| match port.parse() {
                Ok(0) | Err(_) => Err(bad("its port is none")),
                Ok(port) => Ok(port),
            })
            .transpose()?;
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "tcp:[{host}]")?;
                } else {
                    write!(f, "tcp:{host}")?;
                }
                match port {
                    Some(port) => write!(f, ":{port}"),
                    None => Ok(()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_spellings() {
        let tcp = |host: &str, port| Place::Tcp {
            host: host.to_owned(),
            port,
        };
        for (text, place) in [
            ("tcp:b", tcp("b", None)),
            ("tcp://b/", tcp("b", None)),
            ("tcp://b:5/x?a=b", tcp("b", Some(5))),
            ("tcp:b:49152", tcp("b", Some(49152))),
            ("tcp://[::1]:7", tcp("::1", Some(7))),
            ("unix:///run/x", Place::Unix("/run/x".into())),
            ("unix:/run/x", Place::Unix("/run/x".into())),
        ] {
            let parsed = Place::parse(text).unwrap();
            assert_eq!(parsed, place);
            assert_eq!(Place::parse(&parsed.to_string()).unwrap(), parsed);
        }
        for text in [
            "",
            "rdma:b",
            "tcp:",
            "tcp:b:0",
            "tcp:b:x",
            "unix:x",
            "tcp:[::1",
            "tcp:[::1]x",
        ] {
            assert!(Place::parse(text).is_err(), "{text}");
        }
    }
}
